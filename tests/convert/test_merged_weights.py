import ml_dtypes
import numpy as np
import pytest

from convert.merged_weights import Update, compute_merged_weights
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from tests.convert.reference import adapter_of

BF16 = ml_dtypes.bfloat16


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


W, A, B, M = normal(12, 10), normal(3, 10, seed=1), normal(12, 3, seed=2), 0.5
ROWS = (np.array([11, 0, 5]), normal(3, 10, seed=3))
BIAS, OTHER_BIAS, ADDED = (normal(12, seed=seed) for seed in (7, 6, 5))
REPLACED = W.copy()
REPLACED[ROWS[0]] = ROWS[1]
PRODUCT = {"product": (B, A, 0.5)}
SUM = W + 0.5 * B @ A
TENS = np.arange(1, 11, dtype=np.float32)


def scaled(w: np.ndarray, norms: np.ndarray | float, axis: int) -> np.ndarray:
    return w * norms / np.linalg.norm(w, axis=axis, keepdims=True)


CASES = {
    "product": (W, Update(**PRODUCT), SUM),
    "replacement": (W, Update(replacement=SUM), SUM),
    "rows": (W, Update(rows=ROWS), REPLACED),
    "rows, product": (W, Update(rows=ROWS, product=(B, A, 2.0)), REPLACED + 2 * B @ A),
    "magnitudes": (
        W,
        Update(**PRODUCT, magnitude=np.full(12, M, np.float32)),
        scaled(SUM, M, 1),
    ),
    "magnitudes of columns": (
        W,
        Update(**PRODUCT, magnitude=TENS, of_columns=True),
        scaled(SUM, TENS[None], 0),
    ),
    "added": (BIAS, Update(added=ADDED), BIAS + ADDED),
    "replacement, added": (
        BIAS,
        Update(replacement=OTHER_BIAS, added=ADDED),
        OTHER_BIAS + ADDED,
    ),
}


@pytest.mark.parametrize("block", [1, 30, 1 << 20])  # elements: 1, 3 or all rows
@pytest.mark.parametrize("name", CASES)
def test_every_update_in_blocks_of_any_size(monkeypatch, name, block):
    monkeypatch.setattr("convert.merged_weights._BLOCK", block)
    old, update, expected = CASES[name]
    got, largest = update.apply(old.copy(), np.dtype(np.float32), "w")
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert largest == pytest.approx(np.abs(got - old).max())


@pytest.mark.parametrize("source_dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("target", [np.float32, np.float16, BF16])
def test_the_sum_is_rounded_once_and_in_place_if_it_fits(source_dtype, target):
    update, old = Update(**PRODUCT), W.astype(source_dtype)
    exact = (0.5 * (B @ A) + old.astype(np.float32)).astype(target)
    array = old.copy()
    got, _ = update.apply(array, np.dtype(target), "w")
    assert got.dtype == target
    assert got.tobytes() == exact.tobytes()
    assert (got is array) == (source_dtype == target)
    array = old.copy()
    array.flags.writeable = False  # as what jax hands out
    again, _ = update.apply(array, np.dtype(target), "w")
    assert again.tobytes() == exact.tobytes()
    assert array.tobytes() == old.tobytes()


def test_rows_of_zeros_stay_zeros_whatever_their_magnitude():
    weight, left = W.copy(), B.copy()
    weight[3] = left[3] = 0
    update = Update(product=(left, A, 0.5), magnitude=np.full(12, 2, np.float32))
    got, _ = update.apply(weight, np.dtype(np.float32), "w")
    assert not got[3].any()
    norms = np.linalg.norm(np.delete(got, 3, 0), axis=1)
    np.testing.assert_allclose(norms, 2, rtol=1e-6)


def test_overflow_and_nan_are_named():
    update = Update(product=(1000 * B, 1000 * A, 1.0))
    with pytest.raises(CheckpointError, match="`w` has values beyond float16"):
        update.apply(W.copy(), np.dtype(np.float16), "w")
    bad = W.copy()
    bad[2, 2] = np.nan
    with pytest.raises(CheckpointError, match="`w` contains NaN or infinity"):
        update.apply(bad, np.dtype(np.float32), "w")


# --- What a base becomes ---


@pytest.fixture
def merged_full(tiny):
    """A function: settings -> what a base and an adapter full of one value become."""

    def make(*targets, value=1.0, config=None, **fields):
        config = LlamaConfig.from_hf({**tiny, **(config or {})})
        targets = {"target_modules": targets or ("q_proj",)}
        lora = LoraConfig(**{"r": 2, **targets, **fields})
        adapter = adapter_of(config, lora, lambda s: np.full(s, value, np.float32))
        return compute_merged_weights(config, lora, adapter)

    return make


TYING = {"ensure_weight_tying": True}
TABLES = ("embed_tokens", "lm_head")
ROWS_OF_BOTH = {"embed_tokens": (1,), "lm_head": (2,)}


@pytest.mark.parametrize(
    "targets, fields, stays",
    [
        ((), {}, True),
        (("embed_tokens",), {}, False),
        (("lm_head",), {}, False),
        (TABLES, {}, False),
        (("lm_head",), TYING, True),
        (("lm_head",), {**TYING, "alpha_pattern": {"lm_head": 5}}, False),
        (("embed_tokens",), {**TYING, "use_dora": True}, False),
        ((), {"modules_to_save": ("embed_tokens",)}, False),
        ((), {"modules_to_save": TABLES}, False),
        ((), {"modules_to_save": ("lm_head",), **TYING}, True),
        ((), {"trainable_token_indices": (1, 2)}, True),
        ((), {"trainable_token_indices": {"lm_head": (1, 2)}}, False),
        ((), {"trainable_token_indices": ROWS_OF_BOTH}, False),
        (("lm_head",), {"trainable_token_indices": (1,)}, False),
        ((), {"modules_to_save": ("norm",), "bias": "all"}, True),
    ],
)
def test_a_tied_head_stays_tied_if_it_stays_equal(merged_full, targets, fields, stays):
    tied = {"tie_word_embeddings": True}
    result = merged_full(*targets, config=tied, **fields)
    assert result.config.tie_word_embeddings == stays
    embedding = "model.embed_tokens.weight"
    assert result.sources == ({} if stays else {"lm_head.weight": embedding})
    assert "lm_head.weight" not in result.updates or not stays
    # An untied model stays one, and needs nothing.
    untied = merged_full(*targets, **fields)
    assert not untied.config.tie_word_embeddings
    assert untied.sources == {}


def test_biases_that_the_base_lacks_are_added(merged_full):
    result = merged_full("q_proj", lora_bias=True)
    assert (result.config.attention_bias, result.config.mlp_bias) == (True, False)
    keys = [f"model.layers.{i}.self_attn.{p}_proj.bias" for i in "01" for p in "qkvo"]
    assert result.sources == dict.fromkeys(keys)
    assert {k for k in result.updates if k.endswith("bias")} == {keys[0], keys[4]}
    result = merged_full("up_proj", "o_proj", lora_bias=True)
    assert result.config.attention_bias and result.config.mlp_bias
    assert len(result.sources) == 2 * 7
    # Biases that are all zero, and those that have a place, ask for nothing.
    result = merged_full(value=0.0, lora_bias=True)
    assert (result.sources, result.updates) == ({}, {})
    result = merged_full(config={"attention_bias": True}, lora_bias=True)
    assert result.sources == {}
    assert "model.layers.1.self_attn.q_proj.bias" in result.updates


def test_a_bias_that_no_llama_has_is_refused(merged_full):
    match = "a bias for .lm_head. .`lora_bias`., and a checkpoint of model_type 'llama'"
    with pytest.raises(UserError, match=match):
        merged_full("lm_head", lora_bias=True)
    extra = {"model.layers.self_attn.gate.weight": [8, 64]}
    gate = {"config": {"extra_tensors": extra}, "lora_bias": True}
    with pytest.raises(UserError, match="a bias for `model.layers.self_attn.gate`"):
        merged_full("gate", **gate)
    extra["model.layers.self_attn.gate.bias"] = [8]
    assert set(merged_full("gate", **gate).updates) == {
        f"model.layers.{i}.self_attn.gate.{n}" for i in "01" for n in ("weight", "bias")
    }


def test_layers_that_are_not_adapted_and_updates_of_zero_are_unchanged(merged_full):
    updates = merged_full(layers_to_transform=1).updates
    assert set(updates) == {"model.layers.1.self_attn.q_proj.weight"}
    assert merged_full(value=0.0).updates == {}
    updates = merged_full(modules_to_save=("layers.0.mlp",)).updates
    assert {k for k, u in updates.items() if u.replacement is not None} == {
        f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }


def test_ranks_and_scalings_by_layer(merged_full):
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 1}, "use_rslora": True}
    updates = merged_full(r=4, lora_alpha=2, **patterns).updates
    for layer, rank, scaling in ((0, 4, 1.0), (1, 1, 2.0)):
        update = updates[f"model.layers.{layer}.self_attn.q_proj.weight"]
        left, right, factor = update.product
        assert (left.shape, right.shape, factor) == ((64, rank), (rank, 64), scaling)
