import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora import functional as lora
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.layers import (
    Compute,
    Embed,
    Linear,
    ModuleAdapter,
    RMSNorm,
    embed,
    linear,
)

OUT, IN = 24, 64


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


WEIGHT = 0.1 * draw(OUT, IN)
PACKED = jax.tree.map(jnp.asarray, nf4.quantize(np.asarray(WEIGHT), double_quant=True))
ADAPTER = {"lora_A": draw(4, IN, seed=1), "lora_B": draw(OUT, 4, seed=2)}
BIAS = draw(OUT, seed=3)
MAGNITUDE = jnp.abs(draw(OUT, seed=5))
ROWS = {
    "trainable_tokens_delta": draw(3, IN, seed=6),
    "token_indices": jnp.asarray([17, 0, 5], jnp.int32),
}
RESIDUAL = (draw(2, IN, seed=7), draw(OUT, 2, seed=8))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_linear_is_weight_plus_bias_plus_scaled_update(packed, bias, adapter):
    x = draw(2, 5, IN, seed=4)
    weight = PACKED if packed else WEIGHT
    got = linear(x, weight, bias, adapter and ModuleAdapter(adapter, 0.5))
    dense = np.asarray(nf4.dequantize(PACKED) if packed else WEIGHT, np.float64)
    wide = np.asarray(x, np.float64)
    want = wide @ dense.T
    if bias is not None:
        want = want + np.asarray(bias)
    if adapter is not None:
        a, b = (np.asarray(adapter[k], np.float64) for k in ("lora_A", "lora_B"))
        want = want + 0.5 * wide @ a.T @ b.T
    # float32 sums of 64 terms; the update is of order 20.
    np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_zero_adapter_changes_no_bit(packed):
    x = draw(3, IN, seed=5, dtype="bfloat16")
    weight = PACKED if packed else WEIGHT
    zero = {**ADAPTER, "lora_B": jnp.zeros_like(ADAPTER["lora_B"])}
    with_zero = linear(x, weight, BIAS, ModuleAdapter(zero, 2.0))
    np.testing.assert_array_equal(with_zero, linear(x, weight, BIAS))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
def test_the_result_has_the_dtype_of_the_input_or_the_requested_one(packed, compute):
    x = draw(3, IN, dtype=compute)
    weight = PACKED if packed else WEIGHT
    assert linear(x, weight, BIAS, ModuleAdapter(ADAPTER)).dtype == compute
    wide = linear(x, weight, BIAS, ModuleAdapter(ADAPTER), dtype=jnp.float32)
    assert wide.dtype == jnp.float32


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def equivalent(weight, bias, adapter, scaling, residual):
    """Returns the dense weight and bias, in float64, that compute the same."""
    weight = double(nf4.dequantize(weight) if weight is PACKED else weight)
    adapter = double(adapter)
    if residual is not None:
        weight = weight - double(residual[1]) @ double(residual[0])
    if "trainable_tokens_delta" in adapter:
        weight[adapter["token_indices"].astype(int)] = adapter["trainable_tokens_delta"]
    if "lora_A" in adapter:
        weight = weight + scaling * adapter["lora_B"] @ adapter["lora_A"]
    if "lora_magnitude_vector" in adapter:
        norm = np.linalg.norm(weight, axis=1)
        weight = (adapter["lora_magnitude_vector"] / norm)[:, None] * weight
    extra = scaling * adapter.get("lora_bias", np.zeros(OUT))
    return weight, extra + (0.0 if bias is None else double(bias))


FORMS = {
    "biased": {**ADAPTER, "lora_bias": draw(OUT, seed=9)},
    "dora": {**ADAPTER, "lora_magnitude_vector": MAGNITUDE},
    "rows": ROWS,
    "rows_and_update": {**ROWS, **ADAPTER},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_every_form_of_adapter_equals_its_dense_weight(packed, bias, form):
    x = draw(2, 5, IN, seed=4)
    weight = PACKED if packed else WEIGHT
    for residual in (None, RESIDUAL):
        if residual is not None and form == "dora":
            continue  # refused by LoraConfig
        adapter = ModuleAdapter(FORMS[form], jnp.float32(0.5), residual)
        got = linear(x, weight, bias, adapter)
        full, offset = equivalent(weight, bias, FORMS[form], 0.5, residual)
        # float32 sums of 64 terms; the update is of order 20.
        np.testing.assert_allclose(got, double(x) @ full.T + offset, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
def test_every_form_computes_in_every_dtype(compute, form):
    x = draw(3, IN, seed=4).astype(compute)
    for weight in (WEIGHT, PACKED):
        adapter = ModuleAdapter(FORMS[form], 0.5)
        wide = linear(x.astype(jnp.float32), weight, BIAS, adapter)
        for dtype in (None, jnp.float32):
            got = linear(x, weight, BIAS, adapter, dtype=dtype)
            assert got.dtype == (dtype or compute)
            error = np.abs(np.asarray(got, np.float32) - wide).max()
            # A few roundings of 2^-8 or 2^-11, of values of order 20.
            assert error <= {"bfloat16": 0.4, "float16": 0.05, "float32": 1e-5}[compute]


def test_a_scaling_of_zero_is_the_plain_layer_without_gradient():
    # In a stack, a layer without adapter has zeros, also as magnitude.
    x, zero = draw(3, IN), jnp.float32(0.0)
    unused = {
        **jax.tree.map(jnp.zeros_like, ADAPTER),
        "lora_magnitude_vector": jnp.zeros(OUT),
    }
    got = linear(x, WEIGHT, BIAS, ModuleAdapter(unused, zero))
    np.testing.assert_array_equal(got, linear(x, WEIGHT, BIAS))
    gradient = jax.grad(lambda a: linear(x, WEIGHT, BIAS, ModuleAdapter(a, zero)).sum())
    for leaf in jax.tree.leaves(gradient(unused)):
        assert not leaf.any()


def test_padding_of_a_rank_has_no_gradient():
    x = draw(3, IN)
    padded = {
        "lora_A": ADAPTER["lora_A"].at[2:].set(0.0),
        "lora_B": ADAPTER["lora_B"].at[:, 2:].set(0.0),
        "lora_magnitude_vector": MAGNITUDE,
    }
    gradient = jax.grad(
        lambda a: (linear(x, PACKED, BIAS, ModuleAdapter(a)) ** 2).sum()
    )(padded)
    assert np.asarray(gradient["lora_A"][:2]).all()
    assert not gradient["lora_A"][2:].any() and not gradient["lora_B"][:, 2:].any()


def test_the_norm_of_dora_has_no_gradient():
    x = draw(3, IN)
    adapter = FORMS["dora"]
    norms = lora.row_norms(WEIGHT, ADAPTER["lora_A"], ADAPTER["lora_B"], 0.5)

    def detached(x, adapter):
        weight = WEIGHT + 0.5 * adapter["lora_B"] @ adapter["lora_A"]
        factor = adapter["lora_magnitude_vector"] / norms
        return ((x @ (factor[:, None] * weight).T + BIAS[None]) ** 2).sum()

    def ours(x, adapter):
        return (linear(x, WEIGHT, BIAS, ModuleAdapter(adapter, 0.5)) ** 2).sum()

    got, want = (jax.grad(f, argnums=(0, 1))(x, adapter) for f in (ours, detached))
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        # Sums of some hundred float32 terms.
        assert np.abs(g - w).max() <= 1e-5 * np.abs(w).max()


def test_a_replaced_row_only_has_the_gradient_of_its_column():
    x = draw(3, IN)

    def total(rows, columns):
        adapter = {**ROWS, "trainable_tokens_delta": rows}
        return linear(x, WEIGHT, None, ModuleAdapter(adapter))[:, columns].sum()

    unrelated = jax.grad(total)(ROWS["trainable_tokens_delta"], np.asarray([1, 2, 3]))
    assert not unrelated.any()
    gradient = jax.grad(total)(ROWS["trainable_tokens_delta"], np.asarray([0]))
    np.testing.assert_allclose(gradient[1], x.sum(0), rtol=1e-6)
    assert not gradient[0].any() and not gradient[2].any()


def test_gradients_reach_input_and_adapter():
    x = draw(3, IN)
    dx, da = jax.grad(
        lambda x, a: linear(x, PACKED, None, ModuleAdapter(a, 0.5)).sum(),
        argnums=(0, 1),
    )(x, ADAPTER)
    dense = nf4.dequantize(PACKED)
    a, b = ADAPTER["lora_A"], ADAPTER["lora_B"]
    # float32 sums of at most 64 terms, values of order ten.
    column = dense.sum(0) + 0.5 * b.sum(0) @ a
    np.testing.assert_allclose(dx, np.broadcast_to(column, (3, IN)), atol=5e-5)
    np.testing.assert_allclose(
        da["lora_B"], np.broadcast_to(0.5 * (x @ a.T).sum(0), (OUT, 4)), atol=5e-5
    )
    want = 0.5 * jnp.outer(b.sum(0), x.sum(0))
    np.testing.assert_allclose(da["lora_A"], want, atol=1e-4)


# --- The module ---


def test_the_module_reads_a_dense_a_packed_and_an_adapted_weight():
    x = draw(3, IN)
    module = Linear(OUT, Compute("float32", lora=LoraConfig(r=4, lora_alpha=2)))
    for weight in (WEIGHT, PACKED):
        params = {"weight": weight}
        np.testing.assert_array_equal(
            module.apply({"params": params}, x), linear(x, weight)
        )
        np.testing.assert_array_equal(
            module.apply({"params": params, "lora": ADAPTER}, x),
            linear(x, weight, None, ModuleAdapter(ADAPTER, 0.5)),
        )


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
    compute = Compute("float32", lora=config)
    with pytest.raises(UserError, match=message):
        Linear(OUT, compute).apply(
            {"params": {"weight": WEIGHT}, "lora": ADAPTER}, draw(3, IN)
        )
    table = {"lora_embedding_A": draw(4, OUT), "lora_embedding_B": draw(IN, 4)}
    with pytest.raises(UserError, match=message):
        Embed(OUT, IN, compute).apply(
            {"params": {"weight": WEIGHT}, "lora": table}, jnp.asarray([[3]])
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_bound_adapter_brings_its_scaling(form):
    x = draw(3, IN)
    # The scaling of the configuration, 1, is not used.
    module = Linear(OUT, Compute("float32", lora=LoraConfig()), use_bias=True)
    bound = {**FORMS[form], "scaling": jnp.float32(0.25)}
    params = {"weight": PACKED, "bias": BIAS}
    np.testing.assert_array_equal(
        module.apply({"params": params, "lora": bound}, x),
        linear(x, PACKED, BIAS, ModuleAdapter(FORMS[form], 0.25)),
    )


def test_a_residual_is_subtracted_from_the_weight():
    x = draw(3, IN)
    params = {"weight": PACKED, "residual_A": RESIDUAL[0], "residual_B": RESIDUAL[1]}
    bound = {**ADAPTER, "scaling": jnp.float32(0.25)}
    np.testing.assert_array_equal(
        Linear(OUT, Compute("float32")).apply({"params": params, "lora": bound}, x),
        linear(x, PACKED, None, ModuleAdapter(ADAPTER, 0.25, RESIDUAL)),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("is_trained", [None, True, False])
def test_a_tensor_trained_in_full_replaces_that_of_the_base(packed, is_trained):
    x, weight, bias = draw(3, IN), draw(OUT, IN, seed=11), draw(OUT, seed=12)
    frozen = {"weight": PACKED if packed else WEIGHT, "bias": BIAS}
    full = {"weight": weight, "bias": bias}
    if is_trained is not None:
        full |= {f"{n}_trained": jnp.asarray(is_trained) for n in ("weight", "bias")}
    module = Linear(OUT, Compute("float32"), use_bias=True)
    variables = {"params": frozen, "lora": full}
    dense = nf4.dequantize(PACKED) if packed else WEIGHT
    want = linear(x, dense, BIAS) if is_trained is False else linear(x, weight, bias)
    np.testing.assert_array_equal(module.apply(variables, x), want)

    def loss(trained):
        return module.apply({"params": frozen, "lora": {**full, **trained}}, x).sum()

    for leaf in jax.tree.leaves(jax.grad(loss)({"weight": weight, "bias": bias})):
        assert np.asarray(leaf).any() == (is_trained is not False)


def test_a_norm_and_a_table_can_be_trained_in_full():
    x, scale = draw(3, IN), draw(IN, seed=13)
    params = {"params": {"weight": jnp.ones(IN)}}
    np.testing.assert_array_equal(
        RMSNorm(1e-5).apply({**params, "lora": {"weight": scale}}, x),
        RMSNorm(1e-5).apply({"params": {"weight": scale}}, x),
    )
    tokens, table = jnp.asarray([[3, 0, 7]]), draw(OUT, IN, seed=14)
    module = Embed(OUT, IN, Compute("float32"))
    got = module.apply(
        {"params": {"weight": WEIGHT}, "lora": {"weight": table}}, tokens
    )
    np.testing.assert_array_equal(got, table[tokens])


def test_a_trained_weight_of_a_tied_head_precedes_the_embedding():
    x, head = draw(3, IN), draw(OUT, IN, seed=15)
    module = Linear(OUT, Compute("float32"))
    tied = module.apply({"params": {}}, x, weight=WEIGHT)
    np.testing.assert_array_equal(tied, linear(x, WEIGHT))
    trained = module.apply({"params": {}, "lora": {"weight": head}}, x, weight=WEIGHT)
    np.testing.assert_array_equal(trained, linear(x, head))


def test_dropout_is_active_with_a_key_only():
    config = LoraConfig(r=4, lora_dropout=0.5)
    module = Linear(OUT, Compute("float32", lora=config))
    variables = {"params": {"weight": WEIGHT}, "lora": ADAPTER}
    x = draw(3, IN)
    plain = module.apply(variables, x)
    np.testing.assert_array_equal(
        plain, linear(x, WEIGHT, None, ModuleAdapter(ADAPTER, config.scaling))
    )
    keys = [{"dropout": jax.random.key(i)} for i in range(2)]
    first, second = (module.apply(variables, x, rngs=key) for key in keys)
    assert (first != plain).any() and (first != second).any()
    np.testing.assert_array_equal(first, module.apply(variables, x, rngs=keys[0]))
    # The base is not dropped: the average over many keys is the plain result.
    keys = jax.random.split(jax.random.key(9), 2000)
    mean = jax.vmap(lambda k: module.apply(variables, x, rngs={"dropout": k}))(
        keys
    ).mean(0)
    update = lora.delta(x, ADAPTER, config.scaling)
    spread = float(jnp.abs(update).max()) * 2
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


@pytest.mark.parametrize("form", TABLE_FORMS)
def test_embed_equals_a_lookup_in_the_dense_table(form):
    tokens = jnp.asarray([[3, 17, 0, 3], [5, 23, 17, 1]], jnp.int32)
    adapter = double(TABLE_FORMS[form])
    table = double(TABLE)
    if form == "rows":
        table[[17, 0, 5]] = adapter["trainable_tokens_delta"]
    if "lora_embedding_A" in adapter:
        b, a = adapter["lora_embedding_B"], adapter["lora_embedding_A"]
        table = table + 0.5 * (b @ a).T
    if form == "dora":  # columns, over the vocabulary
        factor = adapter["lora_magnitude_vector"] / np.linalg.norm(table, axis=0)
        table = table * factor[None, :]
    got = embed(tokens, TABLE, ModuleAdapter(TABLE_FORMS[form], jnp.float32(0.5)))
    # Float32 sums of four terms and of 24 squares.
    np.testing.assert_allclose(got, table[np.asarray(tokens)], atol=1e-5)
    half = ModuleAdapter(TABLE_FORMS[form], 0.5)
    narrow = embed(tokens, TABLE, half, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    error = np.abs(narrow.astype(jnp.float32) - got)
    assert (error <= 3 * 2.0**-8 * (np.abs(got) + 4)).all()  # of both summands
    # The module is the function, in the dtype of its computation.
    bound = {**TABLE_FORMS[form], "scaling": jnp.float32(0.5)}
    module = Embed(OUT, IN, Compute("bfloat16"))
    np.testing.assert_array_equal(
        module.apply({"params": {"weight": TABLE}, "lora": bound}, tokens), narrow
    )


@pytest.mark.parametrize("form", ["update", "dora", "rows"])
def test_gradients_of_an_embedding_are_those_of_the_table(form):
    tokens = jnp.asarray([[3, 17, 0, 3], [5, 23, 17, 1]], jnp.int32)
    weights = draw(2, 4, IN, seed=24)
    indices = {"token_indices": ROWS["token_indices"]} if form == "rows" else {}

    def ours(adapter):
        half = ModuleAdapter({**adapter, **indices}, 0.5)
        return (weights * embed(tokens, TABLE, half)).sum()

    def plain(adapter):
        table = TABLE
        if form == "rows":
            table = table.at[ROWS["token_indices"]].set(
                adapter["trainable_tokens_delta"]
            )
        else:
            b, a = adapter["lora_embedding_B"], adapter["lora_embedding_A"]
            table = table + 0.5 * (b @ a).T
        if form == "dora":
            norm = jax.lax.stop_gradient(jnp.linalg.norm(table, axis=0))
            table = table * (adapter["lora_magnitude_vector"] / norm)[None]
        return (weights * table[tokens]).sum()

    trained = {k: v for k, v in TABLE_FORMS[form].items() if k != "token_indices"}
    got, want = jax.grad(ours)(trained), jax.grad(plain)(trained)
    for name, g in got.items():
        w = np.asarray(want[name])
        assert np.abs(g - w).max() <= 1e-5 * np.abs(w).max(), name
        assert not np.asarray(g)[w == 0].any(), name  # tokens that do not occur


# --- Settings ---


@pytest.mark.parametrize(
    "field, value",
    [
        ("dtype", "float64"),
        ("attention", "flash"),
        ("remat", "some"),
        ("kernels", "triton"),
    ],
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
    for adapter in ({}, {**ADAPTER, "scaling": jnp.float32(0.5)}, {**FORMS["dora"]}):
        module = Linear(OUT, Compute("float32", lora=LoraConfig(r=4)))
        np.testing.assert_array_equal(
            module.apply({**variables, "lora": adapter}, x),
            module.apply({"params": {"weight": PACKED}, "lora": adapter}, x),
        )


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


def test_compute_is_a_static_argument():
    assert hash(Compute(lora=LoraConfig())) == hash(Compute(lora=LoraConfig()))
