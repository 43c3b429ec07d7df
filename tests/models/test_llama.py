import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig, RopeScaling
from qlora_jax.models.layers import Compute, Linear, RMSNorm
from qlora_jax.models.llama import Llama, empty_cache
from qlora_jax.models.params import shapes
from qlora_jax.models.rope import inverse_frequencies, rope_table, rotate
from qlora_jax.tree import is_stacked, walk
from tests.models.reference import (
    CONFIG,
    adapters,
    base,
    dequantized,
    numpy_llama,
    prompt,
)

MODEL = Llama(CONFIG, Compute("float32"))


@functools.partial(jax.jit, static_argnames="model")
def apply(model, variables, tokens, **keywords):
    return model.apply(variables, tokens, **keywords)


def logits(model, tokens, tree=None, **keywords):
    return apply(model, {"params": tree or base()}, tokens, **keywords)


# Another order of float32 sums of at most 96 terms, twice over; logits of order one.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


# --- Parameters ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_tree_is_that_of_hugging_face_with_stacked_layers(tied, bias):
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias
    )
    init = Llama(config, Compute("float32")).init
    tree = jax.eval_shape(init, jax.random.key(0), prompt(1, 4))["params"]
    # Those of the reader of files, which compares them with the tensors in there.
    want = {p: (2, *s) if is_stacked(p) else s for p, s in shapes(config).items()}
    assert {path: leaf.shape for path, leaf in walk(tree)} == want
    layer = tree["model"]["layers"]["mlp"]["down_proj"]
    assert layer["weight"].shape == (2, 64, 96)
    assert ("lm_head" in tree, "bias" in layer) == (not tied, bias)


def test_layers_start_differently():
    weight = base()["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    assert not np.array_equal(weight[0], weight[1])


# --- Computation ---


@pytest.mark.parametrize(
    "attention, remat", [("eager", "full"), ("xla", "none"), ("xla", "save_matmuls")]
)
def test_logits_are_those_of_the_formulas(attention, remat):
    model = Llama(CONFIG, Compute("float32", attention=attention, remat=remat))
    got = logits(model, prompt())
    assert got.dtype == jnp.float32
    close(got, numpy_llama(base(), prompt()))


def test_packed_weights_compute_as_their_dense_values():
    packed = base(packed=True)
    got = logits(MODEL, prompt(), packed)
    close(got, numpy_llama(dequantized(packed), prompt()))
    far = np.abs(got - numpy_llama(base(), prompt())).max()
    assert far > 1e-2  # quantization does something, so the comparison can tell


def test_bf16_stays_near_float32():
    # Each of some 20 operations rounds to 2^-8 of values of order one; errors add up at
    # random. Logits have a deviation of about one.
    wide = numpy_llama(base(), prompt())
    narrow = logits(Llama(CONFIG, Compute("bfloat16")), prompt())
    assert narrow.dtype == jnp.float32
    error = np.asarray(narrow - wide)
    assert np.sqrt((error**2).mean()) < 0.02 * float(wide.std())


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
    want = numpy_llama(base(), tokens)
    if attention == "eager":
        mask = mask.astype(bool)  # as good as integers
    got = logits(model, padded, attention_mask=mask, positions=positions)
    close(got[:, real], want)
    assert np.isfinite(np.asarray(got)).all()
    if side == "left":  # rotary embedding: only differences of positions matter
        close(logits(model, padded, attention_mask=mask)[:, real], want)


@pytest.mark.parametrize("attention", ["eager", "xla"])
def test_documents_of_a_packed_row_do_not_see_each_other(attention):
    model = Llama(CONFIG, Compute("float32", attention=attention))
    parts = [prompt(1, n, seed=n) for n in (5, 4, 3)]
    row = jnp.concatenate([*parts, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [3] * 3 + [0] * 2], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(4), *range(3), 0, 0]], jnp.int32)
    got = logits(model, row, segment_ids=segments, positions=positions)
    want = np.concatenate([numpy_llama(base(), part) for part in parts], axis=1)
    close(got[:, :12], want)


def test_a_mask_and_segments_may_be_given_together():
    segments = jnp.asarray([[1] * 6 + [2] * 6] * 2, jnp.int32)
    mask = jnp.asarray([[1] * 6 + [1] * 4 + [0] * 2] * 2, jnp.int32)
    both = logits(MODEL, prompt(), segment_ids=segments, attention_mask=mask)
    one = logits(MODEL, prompt(), segment_ids=segments * mask)
    np.testing.assert_array_equal(both, one)


def test_tied_embeddings_are_the_head():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    tree = {"model": base()["model"]}
    got = logits(Llama(tied, Compute("float32")), prompt(), tree)
    close(got, numpy_llama(tree, prompt()))
    same = logits(MODEL, prompt(), {**tree, "lm_head": tree["model"]["embed_tokens"]})
    np.testing.assert_array_equal(got, same)


# --- Rotary positions ---


def test_rotary_frequencies_follow_their_formulas():
    plain = np.asarray(inverse_frequencies(CONFIG))
    # float32 powers: a few ulps.
    np.testing.assert_allclose(plain, 1e4 ** (-np.arange(0, 16, 2) / 16), rtol=5e-7)
    linear = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_array_equal(inverse_frequencies(linear), plain / 4)
    positions = jnp.arange(6)[None]
    jax.tree.map(
        close, rope_table(4 * positions, linear), rope_table(positions, CONFIG)
    )
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    llama3 = inverse_frequencies(dataclasses.replace(CONFIG, rope_scaling=scaling))
    turns = 64 * plain.astype(np.float64) / (2 * np.pi)  # over the original context
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    want = (1 - smooth) * plain / 8 + smooth * plain
    np.testing.assert_allclose(llama3, want, rtol=1e-6)
    # All three cases of the formula occur.
    assert (smooth == 0).any() and (smooth == 1).any()
    assert ((smooth > 0.02) & (smooth < 0.98)).any()


def test_windowed_layers_keep_their_theta_beside_longrope():
    scaling = RopeScaling(
        *("longrope", 2.0),
        original_max_position_embeddings=4,
        short_factor=(2.0,) * 8,
        long_factor=(3.0,) * 8,
    )
    changed = dataclasses.replace(
        CONFIG, rope_scaling=scaling, rope_local_base_freq=500.0
    )
    positions, long = jnp.asarray([[1]]), jnp.asarray([[True]])
    exponents = -np.arange(0, 16, 2) / 16
    for kind, angle, factor in (
        # sqrt(1 + log 2 / log 4)
        ("global", 1e4**exponents / 3, np.sqrt(1.5)),
        ("local", 500.0**exponents, 1.0),
    ):
        cos, sin = rope_table(positions, changed, kind, long)
        # float32 powers and sines: a few ulps.
        np.testing.assert_allclose(cos.ravel(), factor * np.cos(angle), rtol=2e-6)
        np.testing.assert_allclose(sin.ravel(), factor * np.sin(angle), rtol=2e-6)


def test_rotation_turns_pairs_by_the_position():
    x = np.random.default_rng(0).standard_normal(16)
    frequency = 1e4 ** (-np.arange(0, 16, 2) / 16)
    for position in (0, 1000):
        table = rope_table(jnp.full((1, 1), position), CONFIG)
        got = rotate(jnp.asarray(x, jnp.float32)[None, None, None], table)
        turned = (x[:8] + 1j * x[8:]) * np.exp(1j * position * frequency)
        # Angles of 1,000 in float32 are good to 6e-5.
        want = np.concatenate([turned.real, turned.imag])
        np.testing.assert_allclose(got[0, 0, 0], want, atol=2e-4 if position else 1e-6)


def test_rms_norm_is_computed_in_float32():
    x = jnp.full((1, 4), 300.0, jnp.float16)  # squares overflow float16
    y = RMSNorm(1e-6).apply({"params": {"weight": jnp.ones(4)}}, x)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, jnp.ones((1, 4), jnp.float16))


# --- Decoding with a cache ---


@functools.partial(jax.jit, static_argnames="model")
def decode(model, tokens, cache, positions, mask=None):
    mask = jnp.ones_like(tokens) if mask is None else mask
    settings = {"attention_mask": mask, "positions": positions, "method": "decode"}
    return model.apply({"params": base()}, tokens, cache, **settings)


@pytest.mark.parametrize("prefill, attention", [(1, "xla"), (5, "eager"), (12, "xla")])
def test_decoding_step_by_step_equals_the_whole_forward_pass(prefill, attention):
    model = Llama(CONFIG, Compute("float32", attention=attention))
    tokens = prompt()
    want = numpy_llama(base(), tokens)
    cache = empty_cache(CONFIG, 2, 16, jnp.float32)  # more slots than tokens
    start = 0
    for stop in [prefill, *range(prefill + 1, 13)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
        got, cache = decode(model, tokens[:, start:stop], cache, positions)
        close(got, want[:, stop - 1])
        start = stop
    assert cache.length == 12
    assert cache.segment_ids.tolist() == [[1] * 12 + [0] * 4] * 2


def test_prompts_padded_on_the_left_decode_as_they_do_alone():
    lengths, width, new = [3, 7, 5], 7, 4
    prompts = [prompt(1, n, seed=n) for n in lengths]
    following = prompt(3, new, seed=99)
    batch = jnp.concatenate(
        [jnp.pad(p, ((0, 0), (width - p.shape[1], 0))) for p in prompts]
    )
    mask = jnp.asarray([[0] * (width - n) + [1] * n for n in lengths], jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    cache = empty_cache(CONFIG, 3, width + new, jnp.float32)
    got, cache = decode(MODEL, batch, cache, positions, mask)
    outputs, before = [got], decode._cache_size()
    for i in range(new):
        positions = jnp.asarray(lengths, jnp.int32)[:, None] + i
        got, cache = decode(MODEL, following[:, i : i + 1], cache, positions)
        outputs.append(got)
    assert decode._cache_size() == before + 1  # steps of one shape
    for row, p in enumerate(prompts):
        whole = jnp.concatenate([p, following[row : row + 1]], axis=1)
        want = numpy_llama(base(), whole)[0, p.shape[1] - 1 :]
        close(jnp.stack(outputs)[:, row], want)


def test_the_cache_holds_keys_and_values_of_the_dtype_asked_for():
    cache = empty_cache(CONFIG, 3, 10)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 10, 16)
    assert cache.k.dtype == jnp.bfloat16
    positions = jnp.broadcast_to(jnp.arange(4)[None], (3, 4))
    got, cache = decode(
        Llama(CONFIG, Compute("bfloat16")), prompt(3, 4), cache, positions
    )
    assert cache.k.dtype == jnp.bfloat16 and got.shape == (3, 61)


# --- Adapters in the model ---


def test_a_zero_adapter_is_the_base_bit_for_bit():
    lora = LoraConfig(r=4, target_modules="all-linear")
    for dtype, tree in (("float32", base()), ("bfloat16", base(packed=True))):
        zero = init_adapters(jax.random.key(0), tree, lora)
        model = Llama(CONFIG, Compute(dtype, lora=lora))
        got = apply(model, {"params": tree, "lora": zero}, prompt())
        np.testing.assert_array_equal(got, logits(model, prompt(), tree))


def test_an_adapter_equals_the_weight_it_stands_for():
    lora = LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, target_modules=("v_proj", "lm_head")
    )
    tree = jax.tree.map(lambda a: a, base())
    value = [
        t["model"]["layers"]["self_attn"]["v_proj"] for t in (tree, adapters(lora))
    ]
    for target, part in (value, (tree["lm_head"], adapters(lora)["lm_head"])):
        update = jnp.matmul(part["lora_B"], part["lora_A"], precision="highest")
        target["weight"] = target["weight"] + lora.scaling * update
    model = Llama(CONFIG, Compute("float32", lora=lora))
    got = apply(model, {"params": base(), "lora": adapters(lora)}, prompt())
    close(got, numpy_llama(tree, prompt()))


def test_adapters_of_equal_shapes_take_turns_without_compiling():
    # Scalings, layers and rows are in the bound tree, not in the model.
    seen, before = [], apply._cache_size()
    for fields in (
        dict(r=2),
        dict(r=2, lora_alpha=7, use_rslora=True),
        dict(r=2, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
        dict(r=2, layers_to_transform=(1,)),
        dict(r=1, rank_pattern={"layers.0.self_attn.q_proj": 2}),
    ):
        lora = LoraConfig(target_modules=("q_proj",), **fields)
        tree = init_adapters(jax.random.key(0), base(), lora)
        part = tree["model"]["layers"]["self_attn"]["q_proj"]
        part["lora_B"] = jnp.ones_like(part["lora_B"])
        # Equal models and configurations built anew are one static argument.
        model = Llama(dataclasses.replace(CONFIG), Compute("float32"))
        bound = bind(tree, base(), lora)
        seen.append(apply(model, {"params": base(), "lora": bound}, prompt()))
    assert apply._cache_size() == before + 1
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
    ones = init_adapters(jax.random.key(0), tree, lora)
    # A weight of zero and an adapter that is the identity: what remains is the input,
    # ones, with some elements dropped and the others doubled.
    tree = jax.tree.map(jnp.zeros_like, tree)
    ones = jax.tree.map(lambda a: jnp.stack([jnp.eye(64)] * 2), ones)
    tree["model"]["layers"]["self_attn"]["place"] = jnp.asarray([1.0, 100.0])
    x, rope = jnp.zeros((2, 12, 64)), rope_table(jnp.arange(12)[None], CONFIG)

    @jax.jit
    def masks(key):
        (stream, _), _ = model.apply(
            {"params": tree, "lora": ones},
            rngs={"dropout": key},
            method=lambda m: m.model.layers(
                (x, None), rope, None, None, (None, None), None
            ),
        )
        return stream

    def digits(key):
        number = np.asarray(masks(jax.random.key(key))).round().astype(int)
        return [number // 10**i % 10 for i in range(4)]

    seen = [*digits(1), *digits(2)]
    assert len(seen) == 8
    for i, mask in enumerate(seen):
        assert set(np.unique(mask)) == {0, 1}
        # 1,536 draws: five standard errors. Independent masks agree in half of them.
        allowed = 5 * 0.5 / np.sqrt(mask.size)
        assert abs(mask.mean() - 0.5) < allowed
        for other in seen[:i]:
            assert abs((mask == other).mean() - 0.5) < allowed
    np.testing.assert_array_equal(seen[:4], digits(1))
