import ml_dtypes
import numpy as np
import pytest

from convert.merged_weights import Update, compute_merged_weights
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig

BF16 = ml_dtypes.bfloat16


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


W, A, B, M = normal(12, 10), normal(3, 10, seed=1), normal(12, 3, seed=2), 0.5
ROWS = (np.array([11, 0, 5]), normal(3, 10, seed=3))


def replaced(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[ROWS[0]] = ROWS[1]
    return w


def scaled(w: np.ndarray, norms: np.ndarray, axis: int) -> np.ndarray:
    return w * norms / np.linalg.norm(w, axis=axis, keepdims=True)


SUM = W + 0.5 * B @ A
CASES = {
    "product": (Update(product=(B, A, 0.5)), SUM),
    "replacement": (Update(replacement=normal(12, 10, seed=4)), normal(12, 10, seed=4)),
    "rows": (Update(rows=ROWS), replaced(W)),
    "rows, product": (
        Update(rows=ROWS, product=(B, A, 2.0)),
        replaced(W) + 2 * B @ A,
    ),
    "magnitudes": (
        Update(product=(B, A, 0.5), magnitude=np.full(12, M, np.float32)),
        scaled(SUM, np.full((12, 1), M), 1),
    ),
    "magnitudes of columns": (
        Update(
            product=(B, A, 0.5),
            magnitude=np.arange(1, 11, dtype=np.float32),
            of_columns=True,
        ),
        scaled(SUM, np.arange(1, 11)[None], 0),
    ),
    "added": (Update(added=normal(12, seed=5)), None),
    "replacement, added": (
        Update(replacement=normal(12, seed=6), added=normal(12, seed=5)),
        None,
    ),
}


@pytest.mark.parametrize("block", [1, 30, 1 << 20])  # elements: 1, 3 or all rows
@pytest.mark.parametrize("name", CASES)
def test_every_update_in_blocks_of_any_size(monkeypatch, name, block):
    monkeypatch.setattr("convert.merged_weights._BLOCK", block)
    update, expected = CASES[name]
    old = W
    if expected is None:
        old = normal(12, seed=7)
        start = old if update.replacement is None else update.replacement
        expected = start + update.added
    got, largest = update.apply(old.copy(), np.dtype(np.float32), "w")
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert largest == pytest.approx(np.abs(got - old).max())


@pytest.mark.parametrize("source_dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("target", [np.float32, np.float16, BF16])
def test_the_sum_is_rounded_once_and_in_place_where_the_dtype_allows(
    source_dtype, target
):
    update, _ = CASES["product"]
    old = W.astype(source_dtype)
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
    weight = W.copy()
    weight[3] = 0
    left = B.copy()
    left[3] = 0
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


def tree(config: LlamaConfig, lora: LoraConfig, value: float = 1.0):
    shapes = select(model_params.abstract_base(config), lora).shapes()
    out: dict = {}
    for path, shape in shapes.items():
        trees.put(out, path, np.full(shape, value, np.float32))
    return out


def merged_ones(tiny, value=1.0, config=None, **fields):
    config = LlamaConfig.from_hf({**tiny, **(config or {})})
    lora = LoraConfig(**{"r": 2, "target_modules": ("q_proj",), **fields})
    return config, compute_merged_weights(config, lora, tree(config, lora, value))


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    "fields, stays",
    [
        ({}, True),
        ({"target_modules": ("embed_tokens",)}, False),
        ({"target_modules": ("lm_head",)}, False),
        ({"target_modules": ("embed_tokens", "lm_head")}, False),
        ({"target_modules": ("lm_head",), "ensure_weight_tying": True}, True),
        (
            {
                "target_modules": ("lm_head",),
                "ensure_weight_tying": True,
                "alpha_pattern": {"lm_head": 5},
            },
            False,
        ),
        (
            {
                "target_modules": ("embed_tokens",),
                "ensure_weight_tying": True,
                "use_dora": True,
            },
            False,
        ),
        ({"modules_to_save": ("embed_tokens",)}, False),
        ({"modules_to_save": ("embed_tokens", "lm_head")}, False),
        ({"modules_to_save": ("lm_head",), "ensure_weight_tying": True}, True),
        ({"trainable_token_indices": (1, 2)}, True),
        ({"trainable_token_indices": {"lm_head": (1, 2)}}, False),
        ({"trainable_token_indices": {"embed_tokens": (1,), "lm_head": (2,)}}, False),
        ({"trainable_token_indices": (1,), "target_modules": ("lm_head",)}, False),
        ({"modules_to_save": ("norm",), "bias": "all"}, True),
    ],
)
def test_a_tied_head_stays_tied_where_it_stays_equal(tiny, fields, stays):
    config, result = merged_ones(tiny, config=TIED, **fields)
    assert result.config.tie_word_embeddings == stays
    embedding = "model.embed_tokens.weight"
    assert result.sources == ({} if stays else {"lm_head.weight": embedding})
    assert "lm_head.weight" not in result.updates or not stays
    # An untied model stays one, and needs nothing.
    _, untied = merged_ones(tiny, **fields)
    assert not untied.config.tie_word_embeddings
    assert untied.sources == {}


def test_biases_that_the_base_lacks_are_added(tiny):
    config, result = merged_ones(tiny, lora_bias=True, target_modules=("q_proj",))
    assert (result.config.attention_bias, result.config.mlp_bias) == (True, False)
    keys = [f"model.layers.{i}.self_attn.{p}_proj.bias" for i in "01" for p in "qkvo"]
    assert result.sources == dict.fromkeys(keys)
    assert {k for k in result.updates if k.endswith("bias")} == {keys[0], keys[4]}
    _, result = merged_ones(tiny, lora_bias=True, target_modules=("up_proj", "o_proj"))
    assert result.config.attention_bias and result.config.mlp_bias
    assert len(result.sources) == 2 * 7
    # Biases that are all zero, and those that have a place, ask for nothing.
    _, result = merged_ones(tiny, value=0.0, lora_bias=True)
    assert (result.sources, result.updates) == ({}, {})
    _, result = merged_ones(tiny, config={"attention_bias": True}, lora_bias=True)
    assert result.sources == {}
    assert "model.layers.1.self_attn.q_proj.bias" in result.updates


def test_a_bias_that_no_llama_has_is_refused(tiny):
    match = "a bias for `lm_head` .`lora_bias`., and a Llama checkpoint has no bias"
    with pytest.raises(UserError, match=match):
        merged_ones(tiny, lora_bias=True, target_modules=("lm_head",))
    extra = {"model.layers.self_attn.gate.weight": [8, 64]}
    with pytest.raises(UserError, match="a bias for `model.layers.self_attn.gate`"):
        merged_ones(
            tiny,
            config={"extra_tensors": extra},
            lora_bias=True,
            target_modules=("gate",),
        )
    extra["model.layers.self_attn.gate.bias"] = [8]
    _, result = merged_ones(
        tiny, config={"extra_tensors": extra}, lora_bias=True, target_modules=("gate",)
    )
    assert set(result.updates) == {
        f"model.layers.{i}.self_attn.gate.{n}" for i in "01" for n in ("weight", "bias")
    }


def test_layers_that_are_not_adapted_and_updates_of_zero_are_unchanged(tiny):
    _, result = merged_ones(tiny, layers_to_transform=1)
    assert set(result.updates) == {"model.layers.1.self_attn.q_proj.weight"}
    _, result = merged_ones(tiny, value=0.0)
    assert result.updates == {}
    _, result = merged_ones(tiny, modules_to_save=("layers.0.mlp",))
    replaced_keys = {k for k, u in result.updates.items() if u.replacement is not None}
    assert replaced_keys == {
        f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }


def test_ranks_and_scalings_by_layer(tiny):
    _, result = merged_ones(
        tiny,
        r=4,
        lora_alpha=2,
        rank_pattern={r"layers\.1\..*q_proj": 1},
        use_rslora=True,
    )
    shapes = {}
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.q_proj.weight"
        left, right, scaling = result.updates[key].product
        shapes[layer] = (left.shape, right.shape, scaling)
    assert shapes == {0: ((64, 4), (4, 64), 1.0), 1: ((64, 1), (1, 64), 2.0)}
