"""The weighted sum of adapters as one adapter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import qlora_jax as qj
from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.combine import combine_adapters
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import factor_out, init_adapters
from qlora_jax.lora.targets import select
from qlora_jax.tree import EMBEDDING, parse_key
from tests.lora.reference import LOGITS, LORAS, by_layer, config, draw, logits, updates

replace, equal = dataclasses.replace, np.testing.assert_array_equal
PLAIN, HEADS, ROWS = (LORAS[name] for name in ("plain", "heads", "rows"))


def drawn(base, loras, weights):
    """(Configuration, tree, weight) of each, with different numbers."""
    loras = [LORAS[lora] if isinstance(lora, str) else lora for lora in loras]
    pairs = enumerate(zip(loras, weights, strict=True))
    return [(lora, draw(base, lora, seed), weight) for seed, (lora, weight) in pairs]


def weighted(base, parts):
    total = {}
    for lora, tree, weight in parts:
        for name, update in updates(base, lora, tree).items():
            total[name] = total.get(name, 0.0) + weight * update
    return total


def assert_same_updates(got, want):
    assert got.keys() == want.keys()
    for name in want:
        # Sums of float32 products of order ten, scaled once more.
        np.testing.assert_allclose(got[name], want[name], atol=3e-6, err_msg=name)


def assert_is_sum(base, result, parts):
    assert_same_updates(updates(base, *result), weighted(base, parts))


# --- Sums ---

PAIRS = (
    *(("plain", "rslora"), ("rslora", "patterns"), ("patterns", "one layer")),
    *(("one layer", "tables"), ("tables", "plain")),
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", PAIRS)
def test_a_combination_is_the_weighted_sum_of_updates(models, names, tied, tmp_path):
    llama, base = models[tied]
    parts = drawn(base, names, (0.7, -1.3))
    errors = {}
    lora, tree = combine_adapters(parts, base, errors=errors)
    assert set(errors.values()) == {0.0} and "total" in errors
    assert_is_sum(base, (lora, tree), parts)
    # Every scaling is 1, every rank the sum of the ranks.
    ranks = {}
    for one, _, _ in parts:
        for _, name, _, rank, _ in by_layer(base, one):
            ranks[name] = ranks.get(name, 0) + rank
    found = {name: values for _, name, _, *values in by_layer(base, lora)}
    assert found == {name: [rank, 1.0] for name, rank in ranks.items()}
    # It is an adapter like any other: a file, and a model that computes the same.
    convert.save_adapter(tmp_path / "a", lora, tree, llama)
    again, read = convert.load_adapter(tmp_path / "a", llama)
    assert again == replace(lora, target_modules=again.target_modules)
    jax.tree.map(equal, read, tree)


def test_the_combined_model_is_the_model_with_the_sum_in_its_weights(models):
    llama, base = models[False]
    parts = drawn(base, ("plain", "tables"), (2, -1))
    lora, tree = combine_adapters(parts, base)
    dense = jax.tree.map(lambda leaf: np.array(leaf), base)
    for name, update in weighted(base, parts).items():
        path, layer = parse_key(name)
        weight = trees.at(dense, (*path, "weight"))
        target = weight.T if path == EMBEDDING else weight
        (target if layer is None else target[layer])[...] += update.astype(np.float32)
    want, plain = logits(llama, dense), logits(llama, base)
    got = logits(llama, base, bind(tree, base, lora))
    np.testing.assert_allclose(got, want, atol=5 * LOGITS)
    assert np.abs(got - plain).max() > 1000 * LOGITS


def test_an_adapter_minus_itself_is_the_base(models):
    llama, base = models[False]
    tree = draw(base, PLAIN)
    lora, difference = combine_adapters([(PLAIN, tree, 0.4), (PLAIN, tree, -0.4)], base)
    assert lora.r == 8
    got = logits(llama, base, bind(difference, base, lora))
    np.testing.assert_allclose(got, logits(llama, base), atol=LOGITS)
    # A weight of 0 leaves an adapter out; a single one may remain.
    parts = [(PLAIN, tree, 0), (PLAIN, tree, 1)]
    result = combine_adapters(parts, base)
    assert result[0].r == 4
    assert_is_sum(base, result, parts[1:])


def test_settings_that_all_adapters_share_are_kept(base):
    shared = dict(lora_dropout=0.1, base_model_name_or_path="x", base_fingerprint="f")
    one = config(r=2, **shared)
    others = dict(lora_dropout=0.2, base_model_name_or_path="y", base_fingerprint=None)
    neither = dict(
        lora_dropout=0.0, base_model_name_or_path=None, base_fingerprint=None
    )
    for fields, kept in (({}, shared), (others, neither)):
        parts = drawn(base, (one, replace(one, **fields)), (1, 1))
        lora, _ = combine_adapters(parts, base)
        assert {name: getattr(lora, name) for name in kept} == kept


def test_biases_of_b_are_summed(base):
    biased = dict(lora_bias=True)
    loras = (
        config("q_proj", r=2, lora_alpha=3, **biased),
        config("q_proj", "lm_head", r=1, lora_alpha=5, layers_to_transform=0, **biased),
        config("k_proj", "q_proj", r=3),
    )
    parts = drawn(base, loras, (2.0, -0.5, 1.0))
    lora, tree = combine_adapters(parts, base)
    assert lora.lora_bias
    got, want = updates(base, lora, tree), weighted(base, parts)
    for name in [name for name in got if name not in want]:
        assert name.endswith("k_proj+") and not got.pop(name).any()
    assert_same_updates(got, want)


# --- Tied embeddings ---


def test_tied_tables_stay_tied_where_all_adapters_tie_them(models):
    _, base = models[True]
    fields = dict(lora_alpha=3, ensure_weight_tying=True)
    tying = config("embed_tokens", "q_proj", r=2, **fields)
    parts = drawn(base, (tying, "one layer", replace(tying, r=3)), (0.5, -2.0, 1))
    for method in ("cat", "svd"):
        lora, tree = combine_adapters(parts, base, method=method, r=None)
        assert lora.ensure_weight_tying and "lm_head" not in tree
        assert select(base, lora).adapted[-1].tied_to == EMBEDDING
    assert_is_sum(base, combine_adapters(parts, base), parts)
    # With an adapter of the head only they are two updates, no longer tied.
    head = config("lm_head", r=1)
    parts.append((head, draw(base, head, 4), 1.0))
    lora, tree = combine_adapters(parts, base)
    assert not lora.ensure_weight_tying and "lora_A" in tree["lm_head"]
    assert_is_sum(base, (lora, tree), parts)


def test_a_tied_head_of_another_scaling_becomes_a_separate_update(models):
    _, base = models[True]
    fields = dict(alpha_pattern={"lm_head": 5}, ensure_weight_tying=True)
    parts = drawn(base, (config("embed_tokens", r=2, **fields),), (1.0,))
    lora, tree = combine_adapters(parts, base)
    assert not lora.ensure_weight_tying
    assert_is_sum(base, (lora, tree), parts)


# --- The best approximation ---


@pytest.mark.parametrize("tied", [False, True])
def test_svd_is_the_best_approximation_of_its_rank(models, tied):
    _, base = models[tied]
    names = ("plain", "rslora", "tables", "patterns")
    parts = drawn(base, names, (0.7, -1.3, 2.0, 0.5))
    want, errors = weighted(base, parts), {}
    lora, tree = combine_adapters(parts, base, method="svd", r=3, errors=errors)
    got = updates(base, lora, tree)
    assert lora.r == 3 and not lora.rank_pattern and got.keys() == want.keys()
    lost, total = {}, {}
    for name, dense in want.items():
        singular = np.linalg.svd(dense, compute_uv=False)
        distance = np.linalg.norm(got[name] - dense)
        best = np.sqrt(np.sum(singular[3:] ** 2))
        # Eckart and Young: no matrix of rank 3 is nearer. float32 factors.
        np.testing.assert_allclose(distance, best, rtol=1e-5, atol=1e-5)
        stacked = re.sub(r"\.\d+\.", ".", name)
        for key in (stacked, "total"):
            lost[key] = lost.get(key, 0.0) + best**2
            total[key] = total.get(key, 0.0) + np.sum(singular**2)
    expected = {name: np.sqrt(lost[name] / total[name]) for name in lost}
    assert errors == pytest.approx(expected, abs=1e-6, rel=0)
    assert errors["total"] == pytest.approx(expected["total"], rel=1e-6)


def test_svd_of_enough_rank_is_the_sum(base):
    parts = drawn(base, ("plain", "one layer"), (1.0, 1.0))
    errors = {}
    lora, tree = combine_adapters(parts, base, method="svd", r=8, errors=errors)
    assert lora.r == 8 and errors["total"] < 1e-7
    assert_is_sum(base, (lora, tree), parts)
    # Without `r` it is the largest rank there is.
    assert combine_adapters(parts, base, method="svd")[0].r == 4


def test_svd_of_nothing_is_nothing(base):
    lora = config(r=2)
    tree = jax.tree.map(np.zeros_like, draw(base, lora))
    errors = {}
    _, tree = combine_adapters([(lora, tree, 1)], base, method="svd", errors=errors)
    assert errors["total"] == 0.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


# --- Parts that replace instead of adding ---


@pytest.mark.parametrize("lora", [HEADS, ROWS])
@pytest.mark.parametrize("tied", [False, True])
def test_what_all_adapters_replace_alike_is_kept(models, lora, tied):
    _, base = models[tied]
    one, two = draw(base, lora, 0), draw(base, lora, 1)
    kept = [path for path, _ in trees.walk(one) if not path[-1].startswith("lora_")]
    for path in kept:
        trees.put(two, path, trees.at(one, path))
    result, tree = combine_adapters([(lora, one, 3.0), (lora, two, -1.0)], base)
    assert result.modules_to_save == lora.modules_to_save
    assert result.trainable_token_indices == lora.trainable_token_indices
    assert result.r == 4
    for path in kept:
        equal(trees.at(tree, path), trees.at(one, path))
    bind(tree, base, result)


def test_parts_that_replace_and_differ_are_refused_by_name(base):
    head = "lm_head.weight` is trained in .* between adapter 0 and adapter 1"
    only = "lm_head.weight` is trained in full, .* only by one of adapter 0 and"
    row = r"tokens.trainable_tokens_delta` is trained in .* must have the same\."
    one = draw(base, ROWS)
    other = replace(ROWS, trainable_token_indices=(1, 3))
    for parts, message in (
        (drawn(base, (HEADS, HEADS), (1.0, 1.0)), head),
        (drawn(base, (HEADS, PLAIN), (1.0, 1.0)), only),
        (drawn(base, (ROWS, ROWS), (1.0, 1.0)), row),
        ([(ROWS, one, 1.0), (other, one, 1.0)], row),
    ):
        with pytest.raises(UserError, match=message):
            combine_adapters(parts, base)


def test_trained_biases_of_different_modules_are_refused(golden):
    _, base = convert.load_llama(golden / "llamabias/fp32", quantization=None)
    one = config("q_proj", r=2, bias="lora_only")
    two = config("k_proj", r=2, bias="lora_only")
    same = (one, draw(base, one), 1.0)
    assert combine_adapters([same, same], base)[0].bias == "lora_only"
    for other in (two, replace(two, bias="none")):
        with pytest.raises(UserError, match=r"q_proj.bias` is trained in full"):
            combine_adapters([same, (other, draw(base, other), 1.0)], base)
    # Settings that train no bias of this base do not differ.
    base["model"]["layers"]["mlp"]["up_proj"].pop("bias")
    kept = dict(r=2, modules_to_save=("lm_head",))
    loras = config("up_proj", bias="lora_only", **kept), config("q_proj", **kept)
    parts = drawn(base, loras, (1.0, 1.0))
    parts[1][1]["lm_head"] = parts[0][1]["lm_head"]
    assert combine_adapters(parts, base)[0].bias == "none"


@pytest.mark.parametrize(
    "loras, message",
    [
        ((PLAIN, config(use_dora=True)), "adapter 1: `use_dora` rescales the weight"),
        (
            (config(init_lora_weights="olora"), PLAIN),
            "adapter 0: .*'olora'.*qlora_jax.absorb",
        ),
        (
            (config(lora_bias=True), "tables"),
            "`lora_bias` and one adapts the embedding",
        ),
    ],
)
def test_what_has_no_sum_is_refused(base, loras, message):
    with pytest.raises(UserError, match=message):
        combine_adapters(drawn(base, loras, (1.0, 1.0)), base)


def test_nan_and_a_tree_of_another_configuration_are_refused(base):
    parts = drawn(base, ("plain", "one layer"), (1.0, 1.0))
    broken = parts[1][1]["model"]["layers"]["self_attn"]["o_proj"]
    broken["lora_B"][1, 0, 0] = np.nan
    message = r"adapter 1: `model.layers.1.self_attn.o_proj` has NaN or infinity"
    for method in ("cat", "svd"):
        with pytest.raises(UserError, match=message):
            combine_adapters(parts, base, method=method)
    with pytest.raises(UserError, match=r"unexpected model.layers.mlp"):
        combine_adapters([(LORAS["rslora"], parts[0][1], 1.0)], base)


def test_an_absorbed_adapter_can_be_combined(base):
    lora = config(r=2, init_lora_weights="olora")
    start = init_adapters(jax.random.key(0), base, lora)
    factored = factor_out(base, start, lora)
    absorbed = qj.absorb(lora, jax.tree.map(lambda leaf: leaf * 1.5, start), factored)
    result = combine_adapters([(*absorbed, 1.0), (*absorbed, 0.5)], base)
    assert_is_sum(base, result, [(*absorbed, 1.5)])


@pytest.mark.parametrize(
    "weights, options, message",
    [
        ((1.0,), {"method": "linear"}, "`method` must be 'cat' or 'svd', got 'linear'"),
        ((1.0,), {"r": 4}, "`r` needs the method 'svd' .*--method"),
        (("one",), {}, "adapter 0: its weight must be a finite number, got 'one'"),
        ((1.0,), {"method": "svd", "r": 0}, "`r` must be a positive integer, got 0"),
        ((float("nan"),), {}, "adapter 0: its weight must be a finite number, got nan"),
        ((0.0, 0), {}, "nothing to combine: 2 adapters, none with a weight"),
        ((), {}, "nothing to combine: 0 adapters"),
    ],
)
def test_unusable_arguments_are_refused(base, weights, options, message):
    function = combine_adapters
    while hasattr(function, "__wrapped__"):  # past the type checks of the tests
        function = function.__wrapped__
    parts = drawn(base, ["one layer"] * len(weights), weights)
    with pytest.raises(UserError, match=message):
        function(parts, base, **options)


# --- Real adapters ---


@pytest.mark.parametrize("name", ["plain", "rslora", "rank_alpha_pattern", "emb_lora"])
def test_stored_adapters_keep_their_logits_when_they_are_combined(golden, name):
    llama, base = convert.load_llama(golden / "llama32/fp32", quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    folder = golden / "adapters/llama32"
    one = convert.load_adapter(folder / name, llama)
    other = convert.load_adapter(folder / "layers_to_transform", llama)
    # One and another, less the other: the stored logits again.
    parts = [(*one, 1.0), (*other, 0.5), (*other, -0.5)]
    lora, tree = combine_adapters(parts, base)
    stored = np.load(folder / name / "logits.npz")
    got = logits(llama, base, bind(tree, base, lora), stored["ids"].astype(int))
    # The tolerance of all comparisons with these files: float32 against float64.
    assert np.abs(np.asarray(got) - stored["logits"]).max() <= 3e-5
