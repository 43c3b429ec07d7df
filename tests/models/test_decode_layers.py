"""Layers of a decoded token: as the modules compute them, and where they are refused.

With the kernels' references in place of the kernels, which have tests of their own.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.models import decode_layers
from qlora_jax.models.block import Attention
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama, empty_cache
from tests.models.reference import CONFIG, adapters, base, dequantized, prompt

# Inputs in multiples of 256, as the kernels take them.
PLAIN = dataclasses.replace(
    CONFIG,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=8,
    head_dim=32,
    initializer_range=0.05,
)
# Layers with windows and layers without a rotation; heads as the kernels take them.
KINDS = dataclasses.replace(
    PLAIN,
    num_attention_heads=4,
    head_dim=64,
    model_type="smollm3",
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
    no_rope_layers=(1, 0),
)
# Biases, of some layers, and a factor of what is added to the residual stream.
BIASED = dataclasses.replace(
    PLAIN, model_type="llama", attention_bias=True, residual_multiplier=0.5
)
# Norms of queries and keys, with attention of the modules and that of the kernels.
NORMED = dataclasses.replace(PLAIN, model_type="qwen3")
NORMED_64 = dataclasses.replace(NORMED, num_attention_heads=4, head_dim=64)
# Ranks and scalings differ, and not every layer has an adapter.
LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    rank_pattern={"q_proj": 2},
    alpha_pattern={"up_proj": 1},
)


@pytest.fixture
def kernels(monkeypatch):
    """The device has the kernels, and they are their references."""
    if not device.jax_has_kernels():
        pytest.skip("the kernels need jax 0.11, which Python 3.11 cannot have")
    from pallas_kernels.attention import decode as cached
    from pallas_kernels.nf4 import decode, inner

    monkeypatch.setattr(decode_layers, "kernels_refusal", lambda *_: None)
    monkeypatch.setattr(decode, "products", decode.products_reference)
    monkeypatch.setattr(inner, "inner", inner.inner_reference)
    monkeypatch.setattr(cached, "attend", cached.attend_reference)


@functools.cache
def model_of(config, lora=LORA, dtype="bfloat16", kernels="pallas"):
    return Llama(config, Compute(dtype, remat="none", kernels=kernels, lora=lora))


def moved(path, leaf):
    """A vector of each layer that is no longer 0 (biases) or 1 (norms)."""
    # The leaves of a packed weight are attributes.
    is_vector = leaf.ndim == 2 and hasattr(path[-1], "key")
    if not is_vector or "layers" not in str(path):
        return leaf
    key = jax.random.key(len(str(path)))
    return leaf + 0.2 * jax.random.normal(key, leaf.shape)


def variables_of(config, lora=LORA):
    params = jax.tree.map_with_path(moved, base(config, packed=True))
    if lora is None:
        return {"params": params}
    return {"params": params, "lora": bind(adapters(lora, config), params, lora)}


def decoded(model, variables, cache, token):
    """The logits of one more token of each row, and the cache with it."""
    ones = jnp.ones_like(token)
    positions = jnp.full_like(token, 9) - jnp.array([[0], [3], [0]])
    named = {"attention_mask": ones, "positions": positions, "method": "decode"}
    return jax.jit(lambda v, c: model.apply(v, token, c, **named))(variables, cache)


# Of 240, 384 and 336 numbers that are left for gate and up, down, and q, k, v.
@pytest.mark.parametrize(
    ("config", "lora", "most_parts", "left"),
    [
        *((PLAIN, LORA, 400, 4), (PLAIN, LORA, 300, 2), (PLAIN, LORA, 0, 1)),
        # Norms alone.
        (PLAIN, None, 400, 2),
        *((KINDS, LORA, 400, 4), (BIASED, LORA, 400, 4)),
        *((NORMED, LORA, 400, 4), (NORMED_64, LORA, 400, 4)),
    ],
)
def test_a_token_is_that_of_the_modules_and_closer_to_float32(
    config, lora, most_parts, left, kernels, monkeypatch
):
    from pallas_kernels.nf4 import decode_plan

    monkeypatch.setattr(decode_plan, "_MAX_PARTS", most_parts)
    variables = variables_of(config, lora)
    # Three rows, the second of which begins with padding.
    tokens, mask = prompt(3, 9), jnp.ones((3, 9), jnp.int32).at[1, :3].set(0)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    named = {"attention_mask": mask, "positions": positions, "method": "decode"}
    exact = model_of(config, lora, dtype="float32", kernels="xla")
    wide = {**variables, "params": dequantized(variables["params"])}
    cache = empty_cache(config, 3, 64, jnp.float32)
    _, cache = jax.jit(lambda v, c: exact.apply(v, tokens, c, **named))(wide, cache)
    narrow = cache._replace(k=cache.k.astype("bfloat16"), v=cache.v.astype("bfloat16"))
    token = prompt(3, 1, seed=1)
    want, longer = decoded(exact, wide, cache, token)
    modules, _ = decoded(
        model_of(config, lora, kernels="xla"), variables, narrow, token
    )
    model = model_of(config, lora)
    prepared = model.arrange(variables, rows=3)
    groups = prepared["decode"]["model"].values()
    assert sum("follows" in group for group in groups) == left
    got, got_cache = decoded(model, prepared, narrow, token)
    error, of_modules = (float(abs(y - want).max()) for y in (got, modules))
    assert got.dtype == jnp.float32 and error <= 1.5 * of_modules <= 0.1
    assert got_cache.length == 10
    np.testing.assert_array_equal(got_cache.segment_ids, longer.segment_ids)
    for name in "kv":
        ours, theirs = getattr(got_cache, name), getattr(longer, name)
        # Keys of up to 4 from activations of 8 bits.
        np.testing.assert_allclose(ours.astype("float32"), theirs, atol=0.05)
        # Only the token's own slot is written.
        kept = jnp.arange(64) != 9
        before = getattr(narrow, name)
        np.testing.assert_array_equal(ours[:, :, :, kept], before[:, :, :, kept])


def refusal_of(model, variables, rows=3):
    return decode_layers.refusal(model.config, model.compute, variables, rows) or ""


OTHER_LAYERS = {
    "norms and an activation": {"model_type": "gemma", "hidden_act": "gelu"},
    "fused projections": {"model_type": "phi3"},
}


@pytest.mark.parametrize("changes", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_other_families_keep_their_modules(changes, kernels):
    model = model_of(dataclasses.replace(PLAIN, **changes))
    variables = model.compute.arrange(variables_of(PLAIN))
    assert "not those of Llama" in refusal_of(model, variables)
    assert "decode" not in model.arrange(variables, rows=3)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_keep_their_modules(changes, kernels):
    lora = dataclasses.replace(LORA, **changes)
    model = model_of(PLAIN, lora)
    variables = model.compute.arrange(variables_of(PLAIN, lora))
    assert "not plain LoRA" in refusal_of(model, variables)
    assert "decode" not in model.arrange(variables, rows=3)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_tree_whose_scalings_are_not_known_is_left_to_the_modules(lora, kernels):
    params = base(PLAIN, packed=True)
    variables = {"params": params, "lora": adapters(LORA, PLAIN)}  # not bound
    model = model_of(PLAIN, lora)
    refused = refusal_of(model, model.compute.arrange(variables))
    assert re.search("the scaling of `.*` is not known", refused)
    with pytest.raises(UserError, match="scaling is not known"):
        cache = empty_cache(PLAIN, 3, 64)
        decoded(model, model.arrange(variables, rows=3), cache, prompt(3, 1))


def test_other_settings_keep_their_modules(kernels, monkeypatch):
    variables = variables_of(PLAIN)

    def refusal(model, rows=3):
        return refusal_of(model, model.compute.arrange(variables), rows)

    model = model_of(PLAIN)
    assert refusal(model) == ""
    assert "17 rows" in refusal(model, 17)
    for kernels in ("auto", "xla"):
        assert "not selected" in refusal(model_of(PLAIN, kernels=kernels))
    assert "decode" not in model.clone(attention_cls=Attention).arrange(variables, 3)
    assert "16 bits" in refusal(model_of(PLAIN, dtype="float32"))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module, projection = name.split(".")
        node = dict(variables["params"]["model"]["layers"][module])
        weight = node[projection]["weight"]
        for other, reason in (
            (dataclasses.replace(weight, dtype="bfloat16"), "stored in bfloat16"),
            (nf4.dequantize(weight), "not packed"),
        ):
            changed = {module: node | {projection: {"weight": other}}}
            params = trees.copy(variables["params"])
            params["model"]["layers"] |= changed
            with_other = {**variables, "params": params}
            float16 = model_of(PLAIN, dtype="float16")
            arranged = float16.compute.arrange(with_other)
            assert reason in refusal_of(float16, arranged)
    monkeypatch.setattr(decode_layers, "kernels_refusal", lambda *_: "no GPU.")
    assert refusal(model) == "no GPU."
