"""The weighted sum of adapters as one adapter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import qlora_jax as qj
from qlora_jax.errors import UserError
from qlora_jax.lora.combine import combine_adapters
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import factor_out, init_adapters
from qlora_jax.lora.targets import select
from qlora_jax.tree import EMBEDDING, PROJECTIONS, dotted
from tests.lora.reference import HEADS, LOGITS, LORAS, ROWS, draw, logits, updates


def drawn(base, loras, weights):
    """(configuration, tree, weight) of each, with different numbers."""
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
    config, base = models[tied]
    parts = drawn(base, [LORAS[name] for name in names], (0.7, -1.3))
    errors = {}
    lora, tree = combine_adapters(parts, base, errors=errors)
    assert set(errors.values()) == {0.0} and "total" in errors
    assert_is_sum(base, (lora, tree), parts)
    # Every scaling is 1, every rank the sum of the ranks.
    ranks = {}
    for one, _, _ in parts:
        for a in select(base, one).adapted:
            for name, rank in zip(dotted(a.path, a.layers), a.ranks, strict=True):
                ranks[name] = ranks.get(name, 0) + rank
    for a in select(base, lora).adapted:
        names = dotted(a.path, a.layers)
        assert a.ranks == tuple(ranks[name] for name in names)
        assert a.scalings == tuple(float(rank > 0) for rank in a.ranks)
    # It is an adapter like any other: a file, and a model that computes the same.
    convert.save_adapter(tmp_path / "a", lora, tree, config)
    again, read = convert.load_adapter(tmp_path / "a", config)
    assert again == dataclasses.replace(lora, target_modules=again.target_modules)
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    got = logits(config, base, bind(tree, base, lora))
    assert np.abs(got - logits(config, base)).max() > 1000 * LOGITS


def test_the_combined_model_is_the_model_with_the_sum_in_its_weights(models):
    config, base = models[False]
    parts = drawn(base, (LORAS["plain"], LORAS["tables"]), (2, -1))
    lora, tree = combine_adapters(parts, base)
    dense = jax.tree.map(lambda leaf: np.array(leaf), base)
    for name, update in weighted(base, parts).items():
        path = name.split(".")
        if "layers" in path:
            target = dense["model"]["layers"][path[3]][path[4]]["weight"][int(path[2])]
        elif path == list(EMBEDDING):
            target = dense["model"]["embed_tokens"]["weight"].T
        else:
            target = dense["lm_head"]["weight"]
        target += update.astype(np.float32)
    want = logits(config, dense)
    np.testing.assert_allclose(
        logits(config, base, bind(tree, base, lora)), want, atol=5 * LOGITS
    )


def test_an_adapter_minus_itself_is_the_base(models):
    config, base = models[False]
    tree = draw(base, LORAS["plain"])
    parts = [(LORAS["plain"], tree, 0.4), (LORAS["plain"], tree, -0.4)]
    lora, difference = combine_adapters(parts, base)
    assert lora.r == 8
    got = logits(config, base, bind(difference, base, lora))
    np.testing.assert_allclose(got, logits(config, base), atol=LOGITS)
    # A weight of 0 leaves an adapter out; a single one may remain.
    parts = [(LORAS["plain"], tree, 0), (LORAS["plain"], tree, 1)]
    result = combine_adapters(parts, base)
    assert result[0].r == 4
    assert_is_sum(base, result, parts[1:])


def test_the_configuration_names_its_modules_briefly(models):
    _, base = models[True]

    def combined(*names):
        parts = drawn(base, [LORAS[n] for n in names], (1.0,) * len(names))
        return combine_adapters(parts, base)[0]

    lora = combined("plain", "rslora")
    assert set(lora.target_modules) == {*PROJECTIONS}
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (4, 4, False)
    assert lora.rank_pattern == {"down_proj": 7, "q_proj": 7}
    assert lora.alpha_pattern == lora.rank_pattern
    lora = combined("one layer")
    assert lora.target_modules == ("model.layers.1.self_attn.o_proj",)
    lora = combined("patterns")
    assert lora.target_modules == ("lm_head", "up_proj", "v_proj")
    ranks = {"v_proj": 1, r"model\.layers\.1\.mlp\.up_proj": 5}
    assert dict(lora.rank_pattern) == ranks


def test_settings_that_all_adapters_share_are_kept(models):
    _, base = models[False]

    def combined(**second):
        one = LoraConfig(
            r=2, lora_dropout=0.1, base_model_name_or_path="x", base_fingerprint="f"
        )
        two = dataclasses.replace(one, **second)
        return combine_adapters(drawn(base, (one, two), (1, 1)), base)[0]

    same = combined()
    assert (same.lora_dropout, same.base_model_name_or_path) == (0.1, "x")
    assert same.base_fingerprint == "f"
    other = combined(
        lora_dropout=0.2, base_model_name_or_path="y", base_fingerprint=None
    )
    assert other.lora_dropout == 0.0
    assert other.base_model_name_or_path is other.base_fingerprint is None


def test_biases_of_b_are_summed(models):
    _, base = models[False]
    one = LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=("q_proj",))
    two = LoraConfig(
        r=1,
        lora_alpha=5,
        lora_bias=True,
        target_modules=("q_proj", "lm_head"),
        layers_to_transform=0,
    )
    three = LoraConfig(r=3, target_modules=("k_proj", "q_proj"))
    parts = drawn(base, (one, two, three), (2.0, -0.5, 1.0))
    lora, tree = combine_adapters(parts, base)
    assert lora.lora_bias
    got, want = updates(base, lora, tree), weighted(base, parts)
    for name in [name for name in got if name not in want]:
        assert name.endswith("k_proj+") and not got.pop(name).any()
    assert_same_updates(got, want)


# --- Tied embeddings ---


def test_tied_tables_stay_tied_where_all_adapters_tie_them(models):
    config, base = models[True]
    tying = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=("embed_tokens", "q_proj"),
        ensure_weight_tying=True,
    )
    loras = (tying, LORAS["one layer"], dataclasses.replace(tying, r=3))
    parts = drawn(base, loras, (0.5, -2.0, 1))
    for method in ("cat", "svd"):
        lora, tree = combine_adapters(parts, base, method=method, r=None)
        assert lora.ensure_weight_tying and "lm_head" not in tree
        assert select(base, lora).adapted[-1].tied_to == EMBEDDING
    assert_is_sum(base, combine_adapters(parts, base), parts)
    # With an adapter of the head only they are two updates, no longer tied.
    head = LoraConfig(r=1, target_modules=("lm_head",))
    parts.append((head, draw(base, head, 4), 1.0))
    lora, tree = combine_adapters(parts, base)
    assert not lora.ensure_weight_tying and "lora_A" in tree["lm_head"]
    assert_is_sum(base, (lora, tree), parts)


def test_a_tied_head_of_another_scaling_becomes_a_separate_update(models):
    _, base = models[True]
    lora = LoraConfig(
        r=2,
        target_modules=("embed_tokens",),
        alpha_pattern={"lm_head": 5},
        ensure_weight_tying=True,
    )
    parts = [(lora, draw(base, lora), 1.0)]
    result, tree = combine_adapters(parts, base)
    assert not result.ensure_weight_tying
    assert_is_sum(base, (result, tree), parts)


# --- The best approximation ---


@pytest.mark.parametrize("tied", [False, True])
def test_svd_is_the_best_approximation_of_its_rank(models, tied):
    _, base = models[tied]
    names = ("plain", "rslora", "tables", "patterns")
    parts = drawn(base, [LORAS[n] for n in names], (0.7, -1.3, 2.0, 0.5))
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
        lost[stacked] = lost.get(stacked, 0.0) + best**2
        total[stacked] = total.get(stacked, 0.0) + np.sum(singular**2)
    assert errors.keys() == {*lost, "total"}
    for name in lost:
        expected = np.sqrt(lost[name] / total[name])
        np.testing.assert_allclose(errors[name], expected, atol=1e-6)
    overall = np.sqrt(sum(lost.values()) / sum(total.values()))
    np.testing.assert_allclose(errors["total"], overall, rtol=1e-6)


def test_svd_of_enough_rank_is_the_sum(models):
    _, base = models[False]
    parts = drawn(base, (LORAS["plain"], LORAS["one layer"]), (1.0, 1.0))
    errors = {}
    lora, tree = combine_adapters(parts, base, method="svd", r=8, errors=errors)
    assert lora.r == 8 and errors["total"] < 1e-7
    assert_is_sum(base, (lora, tree), parts)
    # Without `r` it is the largest rank there is.
    assert combine_adapters(parts, base, method="svd")[0].r == 4


def test_svd_of_nothing_is_nothing(models):
    _, base = models[False]
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    tree = jax.tree.map(np.zeros_like, draw(base, lora))
    errors = {}
    _, tree = combine_adapters([(lora, tree, 1)], base, method="svd", errors=errors)
    assert errors["total"] == 0.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


# --- Parts that replace instead of adding ---


@pytest.mark.parametrize("lora", [HEADS, ROWS])
@pytest.mark.parametrize("tied", [False, True])
def test_what_all_adapters_replace_alike_is_kept(models, lora, tied):
    config, base = models[tied]
    one, two = draw(base, lora, 0), draw(base, lora, 1)
    for name in ("norm", "embed_tokens"):
        if name in one["model"]:
            two["model"][name] = one["model"][name]
    if "lm_head" in one:
        two["lm_head"] = one["lm_head"]
    layers = two["model"]["layers"]
    for name in ("input_layernorm", "post_attention_layernorm"):
        if name in layers:
            layers[name] = one["model"]["layers"][name]
    result, tree = combine_adapters([(lora, one, 3.0), (lora, two, -1.0)], base)
    assert result.modules_to_save == lora.modules_to_save
    assert result.trainable_token_indices == lora.trainable_token_indices
    assert result.r == 4
    kept = {k: v for k, v in tree["model"].items() if k != "layers"}
    for name, node in kept.items():
        jax.tree.map(np.testing.assert_array_equal, node, one["model"][name])
    bind(tree, base, result)


def test_parts_that_replace_and_differ_are_refused_by_name(models):
    _, base = models[False]
    plain = LORAS["plain"]
    one = (HEADS, draw(base, HEADS, 0), 1.0)
    for other in ((HEADS, draw(base, HEADS, 1), 1.0), (plain, draw(base, plain), 1.0)):
        message = "lm_head.weight` is trained in .* between adapter 0 and adapter 1"
        with pytest.raises(UserError, match=message):
            combine_adapters([one, other], base)
    rows = (ROWS, draw(base, ROWS, 0), 1.0)
    message = r"tokens.trainable_tokens_delta` is trained in .* must have the same\."
    with pytest.raises(UserError, match=message):
        combine_adapters([rows, (ROWS, draw(base, ROWS, 1), 1.0)], base)
    other = dataclasses.replace(ROWS, trainable_token_indices=(1, 3))
    with pytest.raises(UserError, match=message):
        combine_adapters([rows, (other, draw(base, ROWS, 0), 1.0)], base)


def test_trained_biases_of_different_modules_are_refused(golden):
    _, base = convert.load_llama(golden / "llamabias/fp32", quantization=None)
    one = LoraConfig(r=2, target_modules=("q_proj",), bias="lora_only")
    two = dataclasses.replace(one, target_modules=("k_proj",))
    same = (one, draw(base, one), 1.0)
    assert combine_adapters([same, same], base)[0].bias == "lora_only"
    with pytest.raises(UserError, match=r"q_proj.bias` is trained in full"):
        combine_adapters([same, (two, draw(base, two), 1.0)], base)
    # Settings that train no bias of this base do not differ.
    base["model"]["layers"]["mlp"]["up_proj"].pop("bias")
    kept = dict(r=2, modules_to_save=("lm_head",))
    mlp = LoraConfig(target_modules=("up_proj",), bias="lora_only", **kept)
    attention = LoraConfig(target_modules=("q_proj",), **kept)
    parts = [(c, draw(base, c), 1.0) for c in (mlp, attention)]
    parts[1][1]["lm_head"] = parts[0][1]["lm_head"]
    assert combine_adapters(parts, base)[0].bias == "none"
    none = dataclasses.replace(two, bias="none")
    with pytest.raises(UserError, match=r"q_proj.bias` is trained in full"):
        combine_adapters([same, (none, draw(base, none), 1.0)], base)


def test_what_has_no_sum_is_refused(models):
    _, base = models[False]
    plain = LORAS["plain"]
    good = (plain, draw(base, plain), 1.0)
    dora = dataclasses.replace(plain, use_dora=True)
    with pytest.raises(UserError, match="adapter 1: `use_dora` rescales the weight"):
        combine_adapters([good, (dora, draw(base, dora), 1.0)], base)
    changed = dataclasses.replace(plain, init_lora_weights="olora")
    with pytest.raises(UserError, match="adapter 0: .*'olora'.*qlora_jax.absorb"):
        combine_adapters([(changed, draw(base, changed), 1.0), good], base)
    biased = LoraConfig(r=1, lora_bias=True, target_modules=("q_proj",))
    parts = [(c, draw(base, c), 1.0) for c in (biased, LORAS["tables"])]
    with pytest.raises(UserError, match="`lora_bias` and one adapts the embedding"):
        combine_adapters(parts, base)
    broken = draw(base, LORAS["one layer"])
    broken["model"]["layers"]["self_attn"]["o_proj"]["lora_B"][1, 0, 0] = np.nan
    message = r"adapter 1: `model.layers.1.self_attn.o_proj` has NaN or infinity"
    for method in ("cat", "svd"):
        with pytest.raises(UserError, match=message):
            parts = [good, (LORAS["one layer"], broken, 1.0)]
            combine_adapters(parts, base, method=method)
    with pytest.raises(UserError, match=r"unexpected model.layers.mlp"):
        combine_adapters([(LORAS["rslora"], good[1], 1.0)], base)


def test_an_absorbed_adapter_can_be_combined(models):
    config, base = models[False]
    lora = LoraConfig(r=2, init_lora_weights="olora", target_modules=("q_proj",))
    start = init_adapters(jax.random.key(0), base, lora)
    factored = factor_out(base, start, lora)
    trained = jax.tree.map(lambda leaf: leaf * 1.5, start)
    absorbed = qj.absorb(lora, trained, factored)
    part = (*absorbed, 1.0)
    result, tree = combine_adapters([part, (*absorbed, 0.5)], base)
    assert_same_updates(updates(base, result, tree), weighted(base, [(*absorbed, 1.5)]))


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
def test_unusable_arguments_are_refused(models, weights, options, message):
    _, base = models[False]
    lora = LORAS["one layer"]
    function = combine_adapters
    while hasattr(function, "__wrapped__"):  # past the type checks of the tests
        function = function.__wrapped__
    with pytest.raises(UserError, match=message):
        function([(lora, draw(base, lora), w) for w in weights], base, **options)


# --- Real adapters ---


@pytest.mark.parametrize("name", ["plain", "rslora", "rank_alpha_pattern", "emb_lora"])
def test_stored_adapters_keep_their_logits_when_they_are_combined(golden, name):
    config, base = convert.load_llama(golden / "llama32/fp32", quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    folder = golden / "adapters/llama32" / name
    lora, tree = convert.load_adapter(folder, config)
    other, other_tree = convert.load_adapter(
        golden / "adapters/llama32/layers_to_transform", config
    )
    # One and another, less the other: the stored logits again.
    parts = [(lora, tree, 1.0), (other, other_tree, 0.5), (other, other_tree, -0.5)]
    result, combined = combine_adapters(parts, base)
    stored = np.load(folder / "logits.npz")
    got = logits(config, base, bind(combined, base, result), stored["ids"].astype(int))
    # The tolerance of all comparisons with these files: float32 against float64.
    assert np.abs(np.asarray(got) - stored["logits"]).max() <= 3e-5
