import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import delta
from qlora_jax.models.layers import (
    Compute,
    Embed,
    Linear,
    ModuleAdapter,
    RMSNorm,
    embed,
    linear,
    multiply,
)

OUT, IN = 24, 64


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


WEIGHT = 0.1 * draw(OUT, IN)
PACKED = jax.tree.map(jnp.asarray, nf4.quantize(np.asarray(WEIGHT), double_quant=True))
ADAPTER = {"lora_A": draw(4, IN, seed=1), "lora_B": draw(OUT, 4, seed=2)}
BIAS = draw(OUT, seed=3)
ROWS = {
    "trainable_tokens_delta": draw(3, IN, seed=6),
    "token_indices": jnp.asarray([17, 0, 5], jnp.int32),
}
RESIDUAL = (draw(2, IN, seed=7), draw(OUT, 2, seed=8))
DORA = {**ADAPTER, "lora_magnitude_vector": jnp.abs(draw(OUT, seed=5))}
FORMS = {
    "none": {},
    "update": ADAPTER,
    "biased": {**ADAPTER, "lora_bias": draw(OUT, seed=9)},
    "dora": DORA,
    "lower_rank": {  # of two, filled up to four with zeros
        **DORA,
        "lora_A": ADAPTER["lora_A"].at[2:].set(0.0),
        "lora_B": ADAPTER["lora_B"].at[:, 2:].set(0.0),
    },
    "rows": ROWS,
    "rows_and_update": {**ROWS, **ADAPTER},
}
BOTH = pytest.mark.parametrize("weight", [WEIGHT, PACKED], ids=["dense", "packed"])


def unpacked(weight):
    return nf4.dequantize(weight) if weight is PACKED else weight


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def equal(got, want):
    np.testing.assert_array_equal(got, want)


def gradients_agree(got, want):
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        # Sums of some hundred float32 terms; padding and unused rows have none.
        assert np.abs(g - w).max() <= 1e-5 * np.abs(w).max()
        assert not g[w == 0].any()


def dense_weight(weight, adapter, residual=None):
    """The one weight that an adapter with half its update stands for.

    In float64 of numpy's arrays; of jax's, its gradient leaves out the norm of DoRA.
    """
    if residual is not None:
        weight = weight - residual[1] @ residual[0]
    if "trainable_tokens_delta" in adapter:
        place = np.eye(OUT, dtype=weight.dtype)[np.asarray(ROWS["token_indices"])]
        rows = adapter["trainable_tokens_delta"]
        weight = weight + place.T @ (rows - place @ weight)
    if "lora_A" in adapter:
        weight = weight + 0.5 * (adapter["lora_B"] @ adapter["lora_A"])
    if "lora_magnitude_vector" in adapter:
        norm = (weight**2).sum(1) ** 0.5
        if not isinstance(norm, np.ndarray):
            norm = jax.lax.stop_gradient(norm)
        weight = (adapter["lora_magnitude_vector"] / norm)[:, None] * weight
    return weight


def trained(arrays):
    return {name: a for name, a in arrays.items() if name != "token_indices"}


def whole(arrays):
    """With the indices that rows come with."""
    return {**ROWS, **arrays} if "trainable_tokens_delta" in arrays else arrays


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_equals_its_dense_weight(form, weight):
    x, arrays = draw(2, 5, IN, seed=4), FORMS[form]
    for bias, residual in itertools.product((None, BIAS), (None, RESIDUAL)):
        if residual is not None and "lora_magnitude_vector" in arrays:
            continue  # refused by LoraConfig
        got = linear(x, weight, bias, ModuleAdapter(arrays, jnp.float32(0.5), residual))
        full = dense_weight(*map(double, (unpacked(weight), arrays, residual)))
        offset = 0.5 * double(arrays.get("lora_bias", np.zeros(OUT)))
        want = double(x) @ full.T + (offset if bias is None else offset + double(bias))
        # float32 sums of 64 terms; the update is of order 20.
        exact = residual is None and form in ("none", "update")
        np.testing.assert_allclose(got, want, atol=5e-5 if exact else 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
def test_every_form_computes_in_every_dtype(compute, form):
    x, adapter = draw(3, IN, seed=4).astype(compute), ModuleAdapter(FORMS[form], 0.5)
    for weight, dtype in itertools.product((WEIGHT, PACKED), (None, jnp.float32)):
        wide = linear(x.astype(jnp.float32), weight, BIAS, adapter)
        got = linear(x, weight, BIAS, adapter, dtype=dtype)
        assert got.dtype == (dtype or compute)
        error = np.abs(np.asarray(got, np.float32) - wide).max()
        # A few roundings of 2^-8 or 2^-11, of values of order 20.
        assert error <= {"bfloat16": 0.4, "float16": 0.05, "float32": 1e-5}[compute]


def test_a_scaling_of_zero_is_the_plain_layer_without_gradient():
    # In a stack, a layer without adapter has zeros, also as magnitude.
    x, unused = draw(3, IN), jax.tree.map(jnp.zeros_like, DORA)

    def unscaled(arrays):
        return linear(x, WEIGHT, BIAS, ModuleAdapter(arrays, jnp.float32(0.0)))

    equal(unscaled(unused), linear(x, WEIGHT, BIAS))
    gradient = jax.grad(lambda arrays: unscaled(arrays).sum())(unused)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_layer_are_those_of_its_dense_weight(form, weight):
    def ours(x, arrays):
        y = linear(x, weight, BIAS, ModuleAdapter(whole(arrays), 0.5))
        return (y**2).sum()

    def plain(x, arrays):
        y = x @ dense_weight(unpacked(weight), arrays).T
        offset = BIAS + 0.5 * arrays.get("lora_bias", jnp.zeros(OUT))
        return ((y + offset[None]) ** 2).sum()

    arguments = draw(3, IN), trained(FORMS[form])
    gradients_agree(*(jax.grad(f, (0, 1))(*arguments) for f in (ours, plain)))


# --- The module ---


@BOTH
def test_the_module_is_the_function_of_its_variables(weight):
    x, quarter = draw(3, IN), {"scaling": jnp.float32(0.25)}
    config = LoraConfig(r=4, lora_alpha=2)
    module = Linear(OUT, Compute("float32", lora=config), use_bias=True)
    params = {"weight": weight, "bias": BIAS}
    subtracted = {f"residual_{n}": a for n, a in zip("AB", RESIDUAL, strict=True)}
    for more, arrays, adapter in (
        ({}, {}, None),
        ({}, ADAPTER, ModuleAdapter(ADAPTER, 0.5)),  # the scaling of the settings
        *(({}, {**a, **quarter}, ModuleAdapter(a, 0.25)) for a in FORMS.values()),
        (subtracted, {**ADAPTER, **quarter}, ModuleAdapter(ADAPTER, 0.25, RESIDUAL)),
    ):
        got = module.apply({"params": {**params, **more}, "lora": arrays}, x)
        equal(got, linear(x, weight, BIAS, adapter))


def test_a_fresh_module_makes_its_weight_in_file_orientation():
    module = Linear(OUT, use_bias=True, initializer_range=0.5)
    params = module.init(jax.random.key(0), draw(3, IN))["params"]
    assert params["weight"].shape == (OUT, IN) and params["bias"].shape == (OUT,)
    # 1,536 draws: five standard errors of a deviation.
    assert abs(float(params["weight"].std()) / 0.5 - 1) < 5 * 0.71 / np.sqrt(OUT * IN)


@pytest.mark.parametrize(
    "config",
    [None, LoraConfig(r=4, rank_pattern={"q_proj": 2}), LoraConfig(use_dora=True)],
)
def test_an_adapter_without_a_scaling_is_refused(config):
    message = (
        r"has an adapter whose scaling is not known. Give the model `qlora_jax.bind\("
        r"adapters, base, lora_config\)` .* build it with `Compute\(lora=lora_config\)`"
    )
    compute, params = Compute("float32", lora=config), {"weight": WEIGHT}
    for module, arrays, inputs in (
        (Linear(OUT, compute), ADAPTER, draw(3, IN)),
        (Embed(OUT, IN, compute), OF_TABLE, jnp.asarray([[3]])),
    ):
        with pytest.raises(UserError, match=message):
            module.apply({"params": params, "lora": arrays}, inputs)


@BOTH
@pytest.mark.parametrize("is_trained", [None, True, False])
def test_a_tensor_trained_in_full_replaces_that_of_the_base(weight, is_trained):
    x = draw(3, IN)
    full = {"weight": draw(OUT, IN, seed=11), "bias": draw(OUT, seed=12)}
    flags = {}
    if is_trained is not None:
        flags = {f"{name}_trained": jnp.asarray(is_trained) for name in full}
    module = Linear(OUT, Compute("float32"), use_bias=True)

    def call(full):
        params = {"weight": weight, "bias": BIAS}
        return module.apply({"params": params, "lora": {**full, **flags}}, x)

    base = unpacked(weight), BIAS
    equal(call(full), linear(x, *(base if is_trained is False else full.values())))
    for leaf in jax.tree.leaves(jax.grad(lambda full: call(full).sum())(full)):
        assert np.asarray(leaf).any() == (is_trained is not False)


def test_norms_tables_and_tied_heads_can_be_trained_in_full():
    x, tokens = draw(3, IN), jnp.asarray([[3, 0, 7]])
    scale, table = draw(IN, seed=13), draw(OUT, IN, seed=14)

    def call(module, full, *inputs, frozen=None, **more):
        variables = {"params": frozen or {}, "lora": {"weight": full}}
        return module.apply(variables, *inputs, **more)

    norm, embedding = RMSNorm(1e-5), Embed(OUT, IN, Compute("float32"))
    want = norm.apply({"params": {"weight": scale}}, x)
    equal(call(norm, scale, x, frozen={"weight": jnp.ones(IN)}), want)
    equal(call(embedding, table, tokens, frozen={"weight": WEIGHT}), table[tokens])
    # A trained weight precedes the embedding of a tied head.
    head = Linear(OUT, Compute("float32"))
    equal(head.apply({"params": {}}, x, weight=WEIGHT), linear(x, WEIGHT))
    equal(call(head, table, x, weight=WEIGHT), linear(x, table))


def test_dropout_is_active_with_a_key_only():
    config = LoraConfig(r=4, lora_dropout=0.5)
    module = Linear(OUT, Compute("float32", lora=config))
    x = draw(3, IN)

    def call(key=None):
        rngs = None if key is None else {"dropout": key}
        variables = {"params": {"weight": WEIGHT}, "lora": ADAPTER}
        return module.apply(variables, x, rngs=rngs)

    plain = call()
    equal(plain, linear(x, WEIGHT, None, ModuleAdapter(ADAPTER, config.scaling)))
    keys = [jax.random.key(i) for i in range(2)]
    first, second = map(call, keys)
    assert (first != plain).any() and (first != second).any()
    equal(first, call(keys[0]))
    # The base is not dropped: the average over many keys is the plain result.
    mean = jax.vmap(call)(jax.random.split(jax.random.key(9), 2000)).mean(0)
    spread = float(jnp.abs(delta(x, ADAPTER, config.scaling)).max()) * 2
    assert jnp.abs(mean - plain).max() < 5 * spread / np.sqrt(2000)


# --- Embedding ---

TABLE = draw(OUT, IN, seed=20)
OF_TABLE = {
    "lora_embedding_A": draw(4, OUT, seed=21),
    "lora_embedding_B": draw(IN, 4, seed=22),
}
TABLE_FORMS = {
    "none": {},
    "update": OF_TABLE,
    "dora": {**OF_TABLE, "lora_magnitude_vector": jnp.abs(draw(IN, seed=23))},
    "rows": ROWS,
}
TOKENS = jnp.asarray([[3, 17, 0, 3], [5, 23, 17, 1]], jnp.int32)


def dense_table(table, adapter):
    """As of a layer of the transposed table, except for rows."""
    if "trainable_tokens_delta" in adapter:
        return dense_weight(table, adapter)
    names = {name.replace("embedding_", ""): a for name, a in adapter.items()}
    return dense_weight(table.T, names).T


@pytest.mark.parametrize("form", TABLE_FORMS)
def test_embed_equals_a_lookup_in_the_dense_table(form):
    arrays = TABLE_FORMS[form]
    got = embed(TOKENS, TABLE, ModuleAdapter(arrays, jnp.float32(0.5)))
    want = dense_table(double(TABLE), double(arrays))[np.asarray(TOKENS)]
    # Float32 sums of four terms and of 24 squares.
    np.testing.assert_allclose(got, want, atol=1e-5)
    narrow = embed(TOKENS, TABLE, ModuleAdapter(arrays, 0.5), dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    error = np.abs(narrow.astype(jnp.float32) - got)
    assert (error <= 3 * 2.0**-8 * (np.abs(got) + 4)).all()  # of both summands
    # The module is the function, in the dtype of its computation.
    bound = {**arrays, "scaling": jnp.float32(0.5)}
    module = Embed(OUT, IN, Compute("bfloat16"))
    equal(module.apply({"params": {"weight": TABLE}, "lora": bound}, TOKENS), narrow)


@pytest.mark.parametrize("form", ["update", "dora", "rows"])
def test_gradients_of_an_embedding_are_those_of_the_table(form):
    weights = draw(2, 4, IN, seed=24)

    def ours(arrays):
        return (weights * embed(TOKENS, TABLE, ModuleAdapter(whole(arrays), 0.5))).sum()

    def plain(arrays):
        return (weights * dense_table(TABLE, arrays)[TOKENS]).sum()

    arrays = trained(TABLE_FORMS[form])
    gradients_agree(jax.grad(ours)(arrays), jax.grad(plain)(arrays))


# --- Settings ---


@pytest.mark.parametrize(
    "field, value",
    {"dtype": "f64", "attention": "flash", "remat": "x", "kernels": "triton"}.items(),
)
def test_unknown_choices_are_refused(field, value):
    compute = Compute()
    object.__setattr__(compute, field, value)  # past the type checks of the tests
    with pytest.raises(UserError, match=rf"`{field}` must be one of .*, got '{value}'"):
        compute.__post_init__()


def test_a_layer_reads_its_weight_from_a_lifted_stack():
    x = draw(3, IN)
    stack = jax.tree.map(lambda a: jnp.stack([jnp.zeros_like(a), a]), PACKED)
    params, stacks = nf4.lift_stacks({"weight": stack})
    variables = {"params": jax.tree.map(lambda a: a[1], params), "stacks": stacks}
    for adapter in ({}, {**ADAPTER, "scaling": jnp.float32(0.5)}, DORA):
        module = Linear(OUT, Compute("float32", lora=LoraConfig(r=4)))
        plain = {"params": {"weight": PACKED}, "lora": adapter}
        equal(module.apply({**variables, "lora": adapter}, x), module.apply(plain, x))


def test_stacks_are_lifted_only_for_the_pallas_kernels():
    stack = jax.tree.map(lambda a: a[None], PACKED)
    variables = {"params": {"q_proj": {"weight": stack}}, "lora": {}}
    for kernels in ("auto", "xla"):
        assert Compute(kernels=kernels).arrange(variables) == variables
    lifted = Compute(kernels="pallas").arrange(variables)
    assert lifted["stacks"] == variables["params"] and lifted["lora"] == {}
    assert lifted["params"]["q_proj"]["weight"].codes is None
    assert Compute(kernels="pallas").arrange(lifted) == lifted


def test_unavailable_kernels_are_refused_with_the_reason():
    # 13 features do not fill a block, which no kernel takes on any device.
    odd = nf4.quantize(np.ones((4, 13), np.float32), double_quant=False)
    params = {"weight": jax.tree.map(jnp.asarray, odd)}
    module = Linear(4, Compute("float32", kernels="pallas"))
    with pytest.raises(UserError) as refused:
        module.apply({"params": params}, draw(3, 13))
    message = str(refused.value)
    assert message.startswith("kernels='pallas' cannot be used here: ")
    assert message.endswith("Use 'auto' or 'xla'.") and message.count("Use ") == 1


@pytest.mark.parametrize("factor", [0.22, 12.0, 1.0])
def test_a_factor_of_the_configuration_is_not_rounded_to_bfloat16(factor):
    x = jnp.linspace(-5, 5, 1001).astype(jnp.bfloat16)
    got = np.asarray(multiply(x, factor), np.float64)
    want = np.asarray(x, np.float64) * factor
    assert multiply(x, factor).dtype == x.dtype
    # Half an ulp of the result; a rounded factor of 0.22 is off by 0.12 % more.
    np.testing.assert_allclose(got, want, rtol=2.0**-8 * 1.001)


def test_compute_is_a_static_argument():
    assert hash(Compute(lora=LoraConfig())) == hash(Compute(lora=LoraConfig()))
