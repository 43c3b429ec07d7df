import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig, RopeScaling
from qlora_jax.models.layers import Compute, Linear
from qlora_jax.models.llama import Attention, Llama, RMSNorm, empty_cache
from qlora_jax.models.rope import inverse_frequencies, rope_table, rotate

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,  # not a multiple of 64: packed flat
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
)
FLOAT32 = Compute("float32")


@functools.cache
def base(config=CONFIG, seed=0):
    tokens = jnp.zeros((1, 4), jnp.int32)
    init = jax.jit(Llama(config, FLOAT32).init)
    return init(jax.random.key(seed), tokens)["params"]


def quantized(tree):
    """The tree with every projection of the layers packed."""

    def pack(path, leaf):
        names = [str(key.key) for key in path]
        if not names[-2].endswith("_proj") or names[-1] != "weight":
            return leaf
        layers = [nf4.quantize(np.asarray(w), double_quant=True) for w in leaf]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return jax.tree_util.tree_map_with_path(pack, tree)


def prompt(batch=2, length=12, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 61, (batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnames="model")
def logits(model, variables, tokens, **keywords):
    return model.apply(variables, tokens, **keywords)


# Another order of float32 sums of at most 96 terms, twice over; logits of order one.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


# --- Parameters ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_tree_is_that_of_hugging_face_with_stacked_layers(tied, bias):
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias
    )
    tree = jax.eval_shape(
        Llama(config, FLOAT32).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, tree)
    layers = {
        "input_layernorm": {"weight": (2, 64)},
        "post_attention_layernorm": {"weight": (2, 64)},
        "self_attn": {
            "q_proj": {"weight": (2, 64, 64)},
            "k_proj": {"weight": (2, 32, 64)},
            "v_proj": {"weight": (2, 32, 64)},
            "o_proj": {"weight": (2, 64, 64)},
        },
        "mlp": {
            "gate_proj": {"weight": (2, 96, 64)},
            "up_proj": {"weight": (2, 96, 64)},
            "down_proj": {"weight": (2, 64, 96)},
        },
    }
    if bias:
        for block in ("self_attn", "mlp"):
            for module in layers[block].values():
                module["bias"] = module["weight"][:2]
    want = {
        "model": {
            "embed_tokens": {"weight": (61, 64)},
            "layers": layers,
            "norm": {"weight": (64,)},
        }
    }
    if not tied:
        want["lm_head"] = {"weight": (61, 64)}
    assert shapes == want


def test_layers_start_differently():
    weight = base()["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    assert not np.array_equal(weight[0], weight[1])


# --- Computation ---


def numpy_llama(tree, tokens, config):
    """The model in float64 numpy, written from the formulas."""
    model = jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width, length = config.head_dim, tokens.shape[1]
    frequency = config.rope_theta ** (-np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * frequency
    turn = np.exp(1j * angle)[None, :, None]

    def norm(x, weight):
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight
        )

    def rotated(x):
        z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = model["model"]["embed_tokens"]["weight"][np.asarray(tokens)]
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], model["model"]["layers"])
        a, m = layer["self_attn"], layer["mlp"]
        h = norm(x, layer["input_layernorm"]["weight"])

        def split(name, count, a=a, h=h):
            return (h @ a[name]["weight"].T).reshape(*h.shape[:2], count, width)

        q, k = rotated(split("q_proj", heads)), rotated(split("k_proj", groups))
        v = np.repeat(split("v_proj", groups), heads // groups, 2)
        k = np.repeat(k, heads // groups, 2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(width)
        scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bnts,bsnh->btnh", weights, v).reshape(*x.shape[:2], -1)
        x = x + out @ a["o_proj"]["weight"].T
        h = norm(x, layer["post_attention_layernorm"]["weight"])
        gate = h @ m["gate_proj"]["weight"].T
        h = gate / (1 + np.exp(-gate)) * (h @ m["up_proj"]["weight"].T)
        x = x + h @ m["down_proj"]["weight"].T
    x = norm(x, model["model"]["norm"]["weight"])
    head = model.get("lm_head", model["model"]["embed_tokens"])["weight"]
    return x @ head.T


@pytest.mark.parametrize(
    "attention, remat", [("eager", "full"), ("xla", "none"), ("xla", "save_matmuls")]
)
def test_logits_are_those_of_the_formulas(attention, remat):
    model = Llama(CONFIG, Compute("float32", attention=attention, remat=remat))
    got = logits(model, {"params": base()}, prompt())
    assert got.dtype == jnp.float32
    close(got, numpy_llama(base(), prompt(), CONFIG))


def test_packed_weights_compute_as_their_dense_values():
    packed = quantized(base())
    dequantize = jax.jit(nf4.dequantize)
    dense = jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, nf4.NF4Tensor) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, nf4.NF4Tensor),
    )
    got = logits(Llama(CONFIG, FLOAT32), {"params": packed}, prompt())
    close(got, numpy_llama(dense, prompt(), CONFIG))
    far = np.abs(got - numpy_llama(base(), prompt(), CONFIG)).max()
    assert far > 1e-2  # quantization does something, so the comparison can tell


def test_bf16_stays_near_float32():
    # Each of some 20 operations rounds to 2^-8 of values of order one; errors add up at
    # random. Logits have a deviation of about one.
    wide = numpy_llama(base(), prompt(), CONFIG)
    narrow = logits(Llama(CONFIG, Compute("bfloat16")), {"params": base()}, prompt())
    assert narrow.dtype == jnp.float32
    error = np.asarray(narrow - wide)
    assert np.sqrt((error**2).mean()) < 0.02 * float(wide.std())


def test_a_token_sees_nothing_after_it():
    model = Llama(CONFIG, FLOAT32)
    tokens = prompt()
    other = tokens.at[:, 7:].set(1)
    one, two = (logits(model, {"params": base()}, t) for t in (tokens, other))
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert (one[:, 7:] != two[:, 7:]).any()


@pytest.mark.parametrize("attention", ["eager", "xla"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, attention):
    model = Llama(CONFIG, Compute("float32", attention=attention))
    tokens = prompt(length=7)
    pad = ((0, 0), (5, 0) if side == "left" else (0, 5))
    padded = jnp.pad(tokens, pad, constant_values=3)
    mask = jnp.pad(jnp.ones_like(tokens), pad)
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    real = slice(5, None) if side == "left" else slice(0, 7)
    want = numpy_llama(base(), tokens, CONFIG)
    if attention == "eager":
        mask = mask.astype(bool)  # as good as integers
    got = logits(
        model, {"params": base()}, padded, attention_mask=mask, positions=positions
    )
    close(got[:, real], want)
    assert np.isfinite(np.asarray(got)).all()
    if side == "left":  # rotary embedding: only differences of positions matter
        got = logits(model, {"params": base()}, padded, attention_mask=mask)
        close(got[:, real], want)


@pytest.mark.parametrize("attention", ["eager", "xla"])
def test_documents_of_a_packed_row_do_not_see_each_other(attention):
    model = Llama(CONFIG, Compute("float32", attention=attention))
    parts = [prompt(1, n, seed=n) for n in (5, 4, 3)]
    row = jnp.concatenate([*parts, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [3] * 3 + [0] * 2], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(4), *range(3), 0, 0]], jnp.int32)
    got = logits(
        model, {"params": base()}, row, segment_ids=segments, positions=positions
    )
    start = 0
    for part in parts:
        want = numpy_llama(base(), part, CONFIG)
        close(got[:, start : start + part.shape[1]], want)
        start += part.shape[1]


def test_a_mask_and_segments_may_be_given_together():
    model = Llama(CONFIG, FLOAT32)
    tokens = prompt()
    segments = jnp.asarray([[1] * 6 + [2] * 6] * 2, jnp.int32)
    mask = jnp.asarray([[1] * 6 + [1] * 4 + [0] * 2] * 2, jnp.int32)
    both = logits(
        model, {"params": base()}, tokens, segment_ids=segments, attention_mask=mask
    )
    one = logits(model, {"params": base()}, tokens, segment_ids=segments * mask)
    np.testing.assert_array_equal(both, one)


def test_tied_embeddings_are_the_head():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    tree = dict(base())
    tree.pop("lm_head")
    got = logits(Llama(tied, FLOAT32), {"params": tree}, prompt())
    close(got, numpy_llama(tree, prompt(), tied))
    untied = {**tree, "lm_head": tree["model"]["embed_tokens"]}
    same = logits(Llama(CONFIG, FLOAT32), {"params": untied}, prompt())
    np.testing.assert_array_equal(got, same)


def test_the_program_is_compiled_once_for_equal_models_and_shapes():
    before = logits._cache_size()
    for i in range(3):  # equal models built anew, as static arguments
        model = Llama(
            dataclasses.replace(CONFIG), Compute("float32", lora=LoraConfig(r=3))
        )
        logits(model, {"params": base()}, prompt(3, 5, seed=i))
    assert logits._cache_size() == before + 1


# --- Rotary positions ---


def test_rotary_frequencies_follow_their_formulas():
    plain = np.asarray(inverse_frequencies(CONFIG))
    # float32 powers: a few ulps.
    np.testing.assert_allclose(plain, 1e4 ** (-np.arange(0, 16, 2) / 16), rtol=5e-7)

    def stretched(scaling):
        config = dataclasses.replace(CONFIG, rope_scaling=scaling)
        return np.asarray(inverse_frequencies(config))

    linear = stretched(RopeScaling("linear", 4.0))
    np.testing.assert_array_equal(linear, plain / 4)
    llama3 = stretched(RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    for got, f in zip(llama3, plain.astype(np.float64), strict=True):
        turns = 64 * f / (2 * np.pi)  # of this pair, over the original context
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        want = (1 - smooth) * f / 8 + smooth * f
        np.testing.assert_allclose(got, want, rtol=1e-6)
    # All three cases of the formula occur.
    ratio = llama3 / plain
    assert (ratio == 1).any() and (ratio == 1 / 8).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


def test_linear_scaling_is_the_same_as_slower_positions():
    scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 2.0))
    even = 2 * jnp.arange(6)[None]
    got = rope_table(even, scaled)
    jax.tree.map(close, got, rope_table(jnp.arange(6)[None], CONFIG))


def test_rotation_keeps_lengths_and_depends_on_differences_of_positions():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in "qk")

    def at(x, position):
        return rotate(x, rope_table(jnp.full((1, 1), position), CONFIG))

    close(jnp.linalg.norm(at(q, 1000)), jnp.linalg.norm(q))
    np.testing.assert_array_equal(at(q, 0), q)
    # Angles of 1,000 in float32 are good to 6e-5.
    one, two = ((at(q, p + 7) * at(k, p)).sum() for p in (0, 1000))
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_rms_norm_is_computed_in_float32():
    x = jnp.full((1, 4), 300.0, jnp.float16)  # squares overflow float16
    y = RMSNorm(1e-6).apply({"params": {"weight": jnp.ones(4)}}, x)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, jnp.ones((1, 4), jnp.float16))


# --- Decoding with a cache ---


@functools.partial(jax.jit, static_argnames="model")
def decode(model, variables, tokens, cache, mask, positions):
    return model.apply(
        variables,
        tokens,
        cache,
        attention_mask=mask,
        positions=positions,
        method="decode",
    )


@pytest.mark.parametrize("prefill, attention", [(1, "xla"), (5, "eager"), (12, "xla")])
def test_decoding_step_by_step_equals_the_whole_forward_pass(prefill, attention):
    model = Llama(CONFIG, Compute("float32", attention=attention))
    variables = {"params": base()}
    tokens = prompt()
    want = numpy_llama(base(), tokens, CONFIG)
    cache = empty_cache(CONFIG, 2, 16, jnp.float32)  # more slots than tokens
    start = 0
    for stop in [prefill, *range(prefill + 1, 13)]:
        part = tokens[:, start:stop]
        positions = jnp.broadcast_to(jnp.arange(start, stop)[None], part.shape)
        got, cache = decode(
            model, variables, part, cache, jnp.ones_like(part), positions
        )
        close(got, want[:, stop - 1])
        start = stop
    assert cache.length == 12
    assert cache.segment_ids.tolist() == [[1] * 12 + [0] * 4] * 2


def test_prompts_padded_on_the_left_decode_as_they_do_alone():
    model, variables = Llama(CONFIG, FLOAT32), {"params": base()}
    lengths, width, new = [3, 7, 5], 7, 4
    prompts = [prompt(1, n, seed=n) for n in lengths]
    following = prompt(3, new, seed=99)
    batch = jnp.concatenate(
        [jnp.pad(p, ((0, 0), (width - p.shape[1], 0))) for p in prompts]
    )
    mask = jnp.asarray([[0] * (width - n) + [1] * n for n in lengths], jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    cache = empty_cache(CONFIG, 3, width + new, jnp.float32)
    got, cache = decode(model, variables, batch, cache, mask, positions)
    outputs = [got]
    for i in range(new):
        column = following[:, i : i + 1]
        positions = jnp.asarray(lengths, jnp.int32)[:, None] + i
        got, cache = decode(
            model, variables, column, cache, jnp.ones_like(column), positions
        )
        outputs.append(got)
    for row, p in enumerate(prompts):
        whole = jnp.concatenate([p, following[row : row + 1]], axis=1)
        want = numpy_llama(base(), whole, CONFIG)[0, p.shape[1] - 1 :]
        close(jnp.stack(outputs)[:, row], want)


def test_steps_of_one_shape_are_compiled_once():
    model, variables = Llama(CONFIG, FLOAT32), {"params": base()}
    cache = empty_cache(CONFIG, 1, 9, jnp.float32)
    before = decode._cache_size()
    for i in range(4):
        token = prompt(1, 1, seed=i)
        _, cache = decode(
            model, variables, token, cache, jnp.ones_like(token), jnp.full((1, 1), i)
        )
    assert decode._cache_size() == before + 1


def test_the_cache_holds_keys_and_values_of_the_dtype_asked_for():
    cache = empty_cache(CONFIG, 3, 10)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 10, 16)
    assert cache.k.dtype == jnp.bfloat16
    model = Llama(CONFIG, Compute("bfloat16"))
    tokens = prompt(3, 4)
    got, cache = decode(
        model,
        {"params": base()},
        tokens,
        cache,
        jnp.ones_like(tokens),
        jnp.broadcast_to(jnp.arange(4)[None], (3, 4)),
    )
    assert cache.k.dtype == jnp.bfloat16 and got.shape == (3, 61)


# --- Modules of one's own ---


class Doubled(Attention):
    """Attention, times two."""

    def __call__(self, *args):
        out, kv = super().__call__(*args)
        return 2 * out, kv


class Mixer(nn.Module):
    """No attention at all: one projection under a name of its own."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x, rope, segments, kv=None, cached=None):
        mixed = jnp.cumsum(x, axis=1).astype(x.dtype)
        return Linear(self.config.hidden_size, self.compute, name="my_proj")(mixed), kv


class Gate(nn.Module):
    """An MLP that gates with a sigmoid."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        return Linear(self.config.hidden_size, self.compute, name="gate_proj")(
            jax.nn.sigmoid(x)
        )


def test_an_attention_of_ones_own_takes_the_place_of_ours():
    doubled = Llama(CONFIG, FLOAT32, attention_cls=Doubled)
    got = logits(doubled, {"params": base()}, prompt())
    tree = jax.tree.map(lambda a: a, base())
    out = tree["model"]["layers"]["self_attn"]["o_proj"]
    out["weight"] = 2 * out["weight"]
    close(got, numpy_llama(tree, prompt(), CONFIG))


def test_projections_of_ones_own_are_adapted_by_their_name():
    lora = LoraConfig(r=2, target_modules=("my_proj", "gate_proj"))
    model = Llama(
        CONFIG, Compute("float32", lora=lora), attention_cls=Mixer, mlp_cls=Gate
    )
    tree = model.init(jax.random.key(0), prompt())["params"]
    adapters = init_adapters(jax.random.key(1), tree, lora)
    layers = adapters["model"]["layers"]
    assert layers["self_attn"]["my_proj"]["lora_A"].shape == (2, 2, 64)
    plain = logits(model, {"params": tree}, prompt())
    variables = {"params": tree, "lora": adapters}
    np.testing.assert_array_equal(logits(model, variables, prompt()), plain)
    grads = jax.jit(
        jax.grad(lambda a: model.apply({"params": tree, "lora": a}, prompt()).sum())
    )(adapters)
    for block, name in (("self_attn", "my_proj"), ("mlp", "gate_proj")):
        for layer in grads["model"]["layers"][block][name]["lora_B"]:
            assert np.asarray(layer).any()


# --- Adapters in the model ---


def test_a_zero_adapter_is_the_base_bit_for_bit():
    lora = LoraConfig(r=4, target_modules="all-linear")
    for dtype, tree in (("float32", base()), ("bfloat16", quantized(base()))):
        adapters = init_adapters(jax.random.key(0), tree, lora)
        model = Llama(CONFIG, Compute(dtype, lora=lora))
        got = logits(model, {"params": tree, "lora": adapters}, prompt())
        want = logits(model, {"params": tree}, prompt())
        np.testing.assert_array_equal(got, want)


def test_an_adapter_equals_the_weight_it_stands_for():
    lora = LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, target_modules=("v_proj", "lm_head")
    )
    adapters = init_adapters(jax.random.key(0), base(), lora)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    adapters = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), adapters
    )
    tree = jax.tree.map(lambda a: a, base())
    value = [t["model"]["layers"]["self_attn"]["v_proj"] for t in (tree, adapters)]
    for target, part in (value, (tree["lm_head"], adapters["lm_head"])):
        update = jnp.matmul(part["lora_B"], part["lora_A"], precision="highest")
        target["weight"] = target["weight"] + lora.scaling * update
    model = Llama(CONFIG, Compute("float32", lora=lora))
    got = logits(model, {"params": base(), "lora": adapters}, prompt())
    close(got, numpy_llama(tree, prompt(), CONFIG))


def test_adapters_of_equal_shapes_take_turns_without_compiling():
    # Scalings, layers and rows are in the bound tree, not in the model.
    model = Llama(CONFIG, FLOAT32)
    seen, before = [], logits._cache_size()
    for fields in (
        dict(r=2),
        dict(r=2, lora_alpha=7, use_rslora=True),
        dict(r=2, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
        dict(r=2, layers_to_transform=(1,)),
        dict(r=1, rank_pattern={"layers.0.self_attn.q_proj": 2}),
    ):
        lora = LoraConfig(target_modules=("q_proj",), **fields)
        adapters = init_adapters(jax.random.key(0), base(), lora)
        part = adapters["model"]["layers"]["self_attn"]["q_proj"]
        part["lora_B"] = jnp.ones_like(part["lora_B"])
        bound = bind(adapters, base(), lora)
        seen.append(logits(model, {"params": base(), "lora": bound}, prompt()))
    assert logits._cache_size() == before + 1
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one - other).max() > 1e-3


class ShowMasks(nn.Module):
    """Writes the dropout masks of two projections as decimal digits."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x, rope, segments, kv=None, cached=None):
        place = self.param("place", nn.initializers.ones, ())
        one, two = (
            Linear(x.shape[-1], self.compute, name=name)(jnp.ones_like(x))
            for name in ("one_proj", "two_proj")
        )
        return place * (one + 10 * two) / 2, kv


class Nothing(nn.Module):
    """An MLP that adds nothing."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        return jnp.zeros_like(x)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_differs_between_layers_projections_and_keys(remat):
    lora = LoraConfig(
        r=64, lora_alpha=64, lora_dropout=0.5, target_modules="all-linear"
    )
    compute = Compute("float32", lora=lora, remat=remat)
    model = Llama(CONFIG, compute, attention_cls=ShowMasks, mlp_cls=Nothing)
    tree = model.init(jax.random.key(0), prompt())["params"]
    adapters = init_adapters(jax.random.key(0), tree, lora)
    # A weight of zero and an adapter that is the identity: what remains is the input,
    # ones, with some elements dropped and the others doubled.
    tree = jax.tree.map(jnp.zeros_like, tree)
    adapters = jax.tree.map(lambda a: jnp.stack([jnp.eye(64)] * 2), adapters)
    tree["model"]["layers"]["self_attn"]["place"] = jnp.asarray([1.0, 100.0])
    x = jnp.zeros((2, 12, 64))
    rope = rope_table(jnp.arange(12)[None], CONFIG)

    @jax.jit
    def masks(key):
        (stream, _), _ = model.apply(
            {"params": tree, "lora": adapters},
            rngs={"dropout": key},
            method=lambda m: m.model.layers((x, None), rope, None, None, None),
        )
        return stream

    def digits(key):
        number = np.asarray(masks(jax.random.key(key))).round().astype(int)
        return [number // 10**i % 10 for i in range(4)]

    one, two = digits(1), digits(2)
    for mask in (*one, *two):
        assert set(np.unique(mask)) == {0, 1}
        # 1,536 draws: five standard errors.
        assert abs(mask.mean() - 0.5) < 5 * 0.5 / np.sqrt(mask.size)
    everything = [*one, *two]
    for i, mask in enumerate(everything):
        for other in everything[:i]:
            # Independent masks agree in half of their elements.
            assert abs((mask == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(mask.size)
    for mask, again in zip(one, digits(1), strict=True):
        np.testing.assert_array_equal(mask, again)
