"""Several adapters: sums as one adapter, stacks for one batch."""

import dataclasses
import functools
import re
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import qlora_jax as qj
from qlora_jax.errors import UserError
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.lora.combine import combine_adapters
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters, bind, delta
from qlora_jax.lora.init import factor_out, init_adapters
from qlora_jax.lora.multi import stack_adapters, with_rows
from qlora_jax.lora.targets import select
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.runs.loading import load
from qlora_jax.tree import EMBEDDING, HEAD, dotted

TOKENS = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)
# float32 logits of order one, summed in another order.
LOGITS = 1e-5

# Different ranks, scalings, targets and layers; each can be combined with each.
LORAS = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    "rslora": LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=("q_proj", "down_proj")
    ),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=("v_proj", "up_proj", "lm_head"),
        rank_pattern={r"layers\.1\.mlp\.up_proj": 5, "v_proj": 1},
        alpha_pattern={"lm_head": 1.5},
    ),
    "one layer": LoraConfig(
        r=2, lora_alpha=7, target_modules=("o_proj",), layers_to_transform=1
    ),
    "tables": LoraConfig(
        r=3, lora_alpha=2, target_modules=("embed_tokens", "lm_head", "k_proj")
    ),
}


@pytest.fixture(scope="module")
def models(llama_dir):
    """(config, base) of a small model, by whether embedding and head are tied."""
    config, base = convert.load_llama(llama_dir, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    return {False: (config, base), True: (tied, {"model": base["model"]})}


def draw(base, lora, seed=0, spread=0.4):
    """A trained tree of random numbers, zero where ranks are padded."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
        lambda leaf: spread * rng.standard_normal(leaf.shape).astype(np.float32),
        abstract_adapters(base, lora),
    )
    for a in select(base, lora).adapted:
        node = tree
        for part in a.path:
            node = node.get(part, {})
        for layer, rank in enumerate(a.ranks):
            where = () if a.layers is None else (layer,)
            for name in node:
                if name.endswith("_A"):
                    node[name][where][rank:] = 0
                elif name.endswith("_B"):
                    node[name][where][:, rank:] = 0
                elif name == "lora_bias" and not rank:
                    node[name][where] = 0
    return tree


def updates(base, lora, tree):
    """Dense updates by dotted module path, in float64, and biases by path + '+'."""
    out = {}
    bound = bind(tree, base, lora)
    for a in select(base, lora).adapted:
        node = bound
        for part in a.path:
            node = node[part]
        names = ("lora_A", "lora_B")
        if a.kind == "embedding":
            names = ("lora_embedding_A", "lora_embedding_B")
        both = [np.asarray(node[name], np.float64) for name in names]
        for layer, name in enumerate(dotted(a.path, a.layers)):
            if a.ranks[layer]:
                where = () if a.layers is None else (layer,)
                out[name] = a.scalings[layer] * both[1][where] @ both[0][where]
                if "lora_bias" in node:
                    bias = np.asarray(node["lora_bias"], np.float64)[where]
                    out[f"{name}+"] = a.scalings[layer] * bias
    return out


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


@functools.cache
def jitted(config, dtype="float32"):
    # Without recomputation, which no gradient needs here: it compiles faster.
    return jax.jit(Llama(config, Compute(dtype, remat="none")).apply)


def logits(config, base, lora_collection=None, tokens=TOKENS):
    variables = {"params": base}
    if lora_collection is not None:
        variables["lora"] = lora_collection
    return jitted(config)(variables, tokens)


# --- Sums ---

PAIRS = [
    ("plain", "rslora"),
    ("rslora", "patterns"),
    ("patterns", "one layer"),
    ("one layer", "tables"),
    ("tables", "plain"),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", PAIRS)
def test_a_combination_is_the_weighted_sum_of_updates(models, names, tied, tmp_path):
    config, base = models[tied]
    parts = [
        (LORAS[name], draw(base, LORAS[name], seed), weight)
        for seed, (name, weight) in enumerate(zip(names, (0.7, -1.3), strict=True))
    ]
    errors = {}
    lora, tree = combine_adapters(parts, base, errors=errors)
    assert set(errors.values()) == {0.0} and "total" in errors
    assert_same_updates(updates(base, lora, tree), weighted(base, parts))
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
    parts = [
        (LORAS[n], draw(base, LORAS[n], 3), w)
        for n, w in (("plain", 2), ("tables", -1))
    ]
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


def test_an_adapter_less_itself_is_the_base(models):
    config, base = models[False]
    tree = draw(base, LORAS["plain"])
    parts = [(LORAS["plain"], tree, 0.4), (LORAS["plain"], tree, -0.4)]
    lora, difference = combine_adapters(parts, base)
    assert lora.r == 8
    got = logits(config, base, bind(difference, base, lora))
    np.testing.assert_allclose(got, logits(config, base), atol=LOGITS)
    # A weight of 0 leaves an adapter out, and one may stand alone.
    lora, alone = combine_adapters(
        [(LORAS["plain"], tree, 0), (*parts[0][:2], 1)], base
    )
    assert lora.r == 4
    assert_same_updates(updates(base, lora, alone), updates(base, LORAS["plain"], tree))


def test_the_configuration_names_what_it_selects_in_few_words(models):
    _, base = models[True]

    def combined(*names):
        parts = [(LORAS[n], draw(base, LORAS[n]), 1.0) for n in names]
        return combine_adapters(parts, base)[0]

    lora = combined("plain", "rslora")
    assert set(lora.target_modules) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (4, 4, False)
    assert lora.rank_pattern == {"down_proj": 7, "q_proj": 7}
    assert lora.alpha_pattern == lora.rank_pattern
    lora = combined("one layer")
    assert lora.target_modules == ("model.layers.1.self_attn.o_proj",)
    lora = combined("patterns")
    assert lora.target_modules == ("lm_head", "up_proj", "v_proj")
    assert dict(lora.rank_pattern) == {
        "v_proj": 1,
        r"model\.layers\.1\.mlp\.up_proj": 5,
    }


def test_what_all_configurations_say_is_kept(models):
    _, base = models[False]

    def combined(**second):
        one = LoraConfig(
            r=2, lora_dropout=0.1, base_model_name_or_path="x", base_fingerprint="f"
        )
        two = dataclasses.replace(one, **second)
        return combine_adapters([(c, draw(base, c), 1) for c in (one, two)], base)[0]

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
    parts = [
        (c, draw(base, c, i), w)
        for i, (c, w) in enumerate([(one, 2.0), (two, -0.5), (three, 1.0)])
    ]
    lora, tree = combine_adapters(parts, base)
    assert lora.lora_bias
    got, want = updates(base, lora, tree), weighted(base, parts)
    for name in [name for name in got if name not in want]:
        assert name.endswith("k_proj+") and not got.pop(name).any()
    assert_same_updates(got, want)


# --- The head that follows the embedding ---


def test_tied_tables_stay_tied_where_all_adapters_tie_them(models):
    config, base = models[True]
    tying = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=("embed_tokens", "q_proj"),
        ensure_weight_tying=True,
    )
    parts = [
        (tying, draw(base, tying, 1), 0.5),
        (LORAS["one layer"], draw(base, LORAS["one layer"], 2), -2.0),
        (
            dataclasses.replace(tying, r=3),
            draw(base, dataclasses.replace(tying, r=3)),
            1,
        ),
    ]
    for method in ("cat", "svd"):
        lora, tree = combine_adapters(parts, base, method=method, r=None)
        assert lora.ensure_weight_tying and "lm_head" not in tree
        assert select(base, lora).adapted[-1].tied_to == EMBEDDING
    lora, tree = combine_adapters(parts, base)
    assert_same_updates(updates(base, lora, tree), weighted(base, parts))
    # With an adapter of the head alone they are two updates, and tied no longer.
    apart = LoraConfig(r=1, target_modules=("lm_head",))
    parts.append((apart, draw(base, apart, 4), 1.0))
    lora, tree = combine_adapters(parts, base)
    assert not lora.ensure_weight_tying and "lora_A" in tree["lm_head"]
    assert_same_updates(updates(base, lora, tree), weighted(base, parts))


def test_a_tied_head_of_another_scaling_becomes_an_update_of_its_own(models):
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
    assert_same_updates(updates(base, result, tree), weighted(base, parts))


# --- The best approximation ---


@pytest.mark.parametrize("tied", [False, True])
def test_svd_is_the_best_approximation_of_its_rank(models, tied):
    _, base = models[tied]
    parts = [
        (LORAS[n], draw(base, LORAS[n], i), w)
        for i, (n, w) in enumerate(
            [("plain", 0.7), ("rslora", -1.3), ("tables", 2.0), ("patterns", 0.5)]
        )
    ]
    want, errors = weighted(base, parts), {}
    lora, tree = combine_adapters(parts, base, method="svd", r=3, errors=errors)
    got = updates(base, lora, tree)
    assert lora.r == 3 and not lora.rank_pattern and got.keys() == want.keys()
    lost, whole = {}, {}
    for name, dense in want.items():
        singular = np.linalg.svd(dense, compute_uv=False)
        distance = np.linalg.norm(got[name] - dense)
        best = np.sqrt(np.sum(singular[3:] ** 2))
        # Eckart and Young: no matrix of rank 3 is nearer. float32 factors.
        np.testing.assert_allclose(distance, best, rtol=1e-5, atol=1e-5)
        stacked = re.sub(r"\.\d+\.", ".", name)
        lost[stacked] = lost.get(stacked, 0.0) + best**2
        whole[stacked] = whole.get(stacked, 0.0) + np.sum(singular**2)
    assert errors.keys() == {*lost, "total"}
    for name in lost:
        expected = np.sqrt(lost[name] / whole[name])
        np.testing.assert_allclose(errors[name], expected, atol=1e-6)
    total = np.sqrt(sum(lost.values()) / sum(whole.values()))
    np.testing.assert_allclose(errors["total"], total, rtol=1e-6)


def test_svd_of_enough_rank_is_the_sum(models):
    _, base = models[False]
    parts = [(LORAS[n], draw(base, LORAS[n]), 1.0) for n in ("plain", "one layer")]
    errors = {}
    lora, tree = combine_adapters(parts, base, method="svd", r=8, errors=errors)
    assert lora.r == 8 and errors["total"] < 1e-7
    assert_same_updates(updates(base, lora, tree), weighted(base, parts))
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


# --- What replaces instead of adding ---

HEADS = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("norm", "lm_head"))
ROWS = LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(3, 1))


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


def test_what_replaces_otherwise_is_refused_by_name(models):
    _, base = models[False]
    plain = LORAS["plain"]
    one = (HEADS, draw(base, HEADS, 0), 1.0)
    for other in ((HEADS, draw(base, HEADS, 1), 1.0), (plain, draw(base, plain), 1.0)):
        message = r"lm_head.weight` is trained in full.*differs between adapter 0 and adapter 1"
        with pytest.raises(UserError, match=message):
            combine_adapters([one, other], base)
    rows = (ROWS, draw(base, ROWS, 0), 1.0)
    message = r"embed_tokens.trainable_tokens_delta` is trained in full.*must have the same"
    with pytest.raises(UserError, match=message):
        combine_adapters([rows, (ROWS, draw(base, ROWS, 1), 1.0)], base)
    other = dataclasses.replace(ROWS, trainable_token_indices=(1, 3))
    with pytest.raises(UserError, match=message):
        combine_adapters([rows, (other, draw(base, ROWS, 0), 1.0)], base)


def test_biases_of_the_base_that_go_with_other_modules_are_refused(golden):
    _, base = convert.load_llama(golden / "llamabias/fp32", quantization=None)
    one = LoraConfig(r=2, target_modules=("q_proj",), bias="lora_only")
    two = dataclasses.replace(one, target_modules=("k_proj",))
    same = (one, draw(base, one), 1.0)
    assert combine_adapters([same, same], base)[0].bias == "lora_only"
    with pytest.raises(UserError, match=r"q_proj.bias` is trained in full"):
        combine_adapters([same, (two, draw(base, two), 1.0)], base)
    # Biases that none of them trains are trained by none, whatever their settings say.
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


def test_parts_of_another_form_are_refused(models):
    base = models[False][1]
    lora = LORAS["one layer"]
    tree = draw(base, lora)
    pairs, triples = r"\(configuration, trained tree\)", "trained tree, weight"
    with pytest.raises(UserError, match=rf"{pairs}.* got \(tree, configuration\)"):
        stack_adapters([(tree, lora)], base)
    with pytest.raises(UserError, match=rf"{pairs}, got tree"):
        stack_adapters(tree, base)
    with pytest.raises(UserError, match="adapter 1: .* got configuration"):
        stack_adapters([(lora, tree), lora], base)
    with pytest.raises(UserError, match=rf"{triples}.*\(configuration, tree\)"):
        combine_adapters([(lora, tree)], base)
    with pytest.raises(UserError, match=rf"{triples}.*\(float, configuration, tree"):
        combine_adapters([(0.5, lora, tree)], base)
    with pytest.raises(UserError, match="must be a list of .*got configuration"):
        combine_adapters(lora, base)


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


# --- Stacks ---

STACKS = {
    "different": ("plain", "rslora", "patterns", "one layer"),
    "tables": ("tables", "one layer", "patterns"),
    "same": ("plain", "plain"),
}


@pytest.mark.parametrize(
    "names, tied",
    [(STACKS["different"], False), (STACKS["tables"], True), (STACKS["same"], False)],
    ids=STACKS,
)
def test_every_row_is_computed_with_its_own_adapter(models, names, tied):
    config, base = models[tied]
    parts = [(LORAS[n], draw(base, LORAS[n], i)) for i, n in enumerate(names)]
    stack = stack_adapters(parts, base)
    rows = [1, -1, 0, len(parts) - 1]
    got = logits(config, base, with_rows(stack, rows))
    for i, row in enumerate(rows):
        own = None if row < 0 else bind(parts[row][1], base, parts[row][0])
        alone = logits(config, base, own, TOKENS[i : i + 1])
        np.testing.assert_allclose(got[i], alone[0], atol=LOGITS)
    assert np.abs(got[0] - logits(config, base)[0]).max() > 1000 * LOGITS


def test_a_tied_adapter_and_biases_of_b_go_into_a_stack(models):
    config, base = models[True]
    loras = [
        LoraConfig(
            r=2,
            target_modules=("embed_tokens",),
            alpha_pattern={"lm_head": 5},
            ensure_weight_tying=True,
        ),
        LoraConfig(
            r=3, lora_alpha=2, lora_bias=True, target_modules=("lm_head", "q_proj")
        ),
    ]
    parts = [(lora, draw(base, lora, i)) for i, lora in enumerate(loras)]
    got = logits(config, base, with_rows(stack_adapters(parts, base), [0, 1, -1, 1]))
    for i, own in enumerate([0, 1, None, 1]):
        own = None if own is None else bind(parts[own][1], base, parts[own][0])
        alone = logits(config, base, own, TOKENS[i : i + 1])
        np.testing.assert_allclose(got[i], alone[0], atol=LOGITS)


def test_the_stack_has_an_axis_of_adapters(models):
    _, base = models[False]
    parts = [
        (LORAS[n], draw(base, LORAS[n])) for n in ("patterns", "one layer", "tables")
    ]
    stack = with_rows(stack_adapters(parts, base), [2, 0])
    attention = stack["model"]["layers"]["self_attn"]
    assert attention["o_proj"]["lora_A"].shape == (2, 3, 2, 64)
    assert attention["o_proj"]["scaling"].tolist() == [[0, 0, 0], [0, 3.5, 0]]
    assert attention["o_proj"]["rows"].tolist() == [[2, 0], [2, 0]]
    assert stack["lm_head"]["lora_B"].shape == (3, 32, 3)
    assert stack["lm_head"]["scaling"].tolist() == [0.75, 0, np.float32(2 / 3)]
    assert stack["lm_head"]["rows"].tolist() == [2, 0]
    table = stack["model"]["embed_tokens"]
    assert table["lora_embedding_A"].shape == (3, 3, 32)
    assert "lora_bias" not in attention["o_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_without_an_adapter_is_the_base_to_the_bit(models, dtype):
    config, base = models[False]
    lora = LORAS["tables"]
    # Whatever stands in the adapters: nothing times infinity would not be a number.
    tree = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), draw(base, lora))
    stack = with_rows(stack_adapters([(lora, tree)], base), [-1] * 4)
    run = jitted(config, dtype)
    got = run({"params": base, "lora": stack}, TOKENS)
    np.testing.assert_array_equal(got, run({"params": base}, TOKENS))


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_rows_differ_on_a_packed_base_too(llama_dir, quantization):
    config, base = convert.load_llama(llama_dir, quantization=quantization)
    base = jax.tree.map(jnp.asarray, base)
    lora = LORAS["plain"]
    parts = [(lora, draw(base, lora, i)) for i in range(2)]
    got = logits(config, base, with_rows(stack_adapters(parts, base), [1, 0, -1, 1]))
    for i, row in enumerate([1, 0]):
        alone = logits(config, base, bind(parts[row][1], base, lora), TOKENS[i : i + 1])
        np.testing.assert_allclose(got[i], alone[0], atol=LOGITS)


def test_bf16_rows_are_as_near_as_bf16_allows(models):
    config, base = models[False]
    parts = [
        (LORAS[n], draw(base, LORAS[n], i)) for i, n in enumerate(("plain", "tables"))
    ]
    run = jitted(config, "bfloat16")
    stack = with_rows(stack_adapters(parts, base), [0, 1, 1, 0])
    got = run({"params": base, "lora": stack}, TOKENS)
    for i, row in enumerate([0, 1, 1, 0]):
        own = bind(parts[row][1], base, parts[row][0])
        alone = run({"params": base, "lora": own}, TOKENS[i : i + 1])
        exact = logits(config, base, own, TOKENS[i : i + 1])
        # No further from the float32 result than twice what bf16 is alone.
        error = np.abs(alone - exact).max()
        assert np.abs(got[i] - exact[0]).max() <= 2 * error


def test_generation_is_that_of_each_row_alone(models):
    config, base = models[True]
    names = ("tables", "plain")
    parts = [(LORAS[n], draw(base, LORAS[n], i)) for i, n in enumerate(names)]
    stack = stack_adapters(parts, base)
    model = Llama(config, Compute("float32"))
    prompts, rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]], [1, 0, 1, -1]

    def generate(prompts, lora, **settings):
        variables = {"params": base} if lora is None else {"params": base, "lora": lora}
        return generate_tokens(model, variables, prompts, max_new_tokens=8, **settings)

    together = generate(prompts, with_rows(stack, rows))
    for prompt, row, got in zip(prompts, rows, together, strict=True):
        own = None if row < 0 else bind(parts[row][1], base, parts[row][0])
        assert got == generate([prompt], own)[0]
    assert together[0] != together[3]  # one prompt, with and without an adapter


# --- What is compiled ---


@contextmanager
def compilations():
    """Counts every program that is compiled meanwhile."""
    found = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_other_rows_and_other_adapters_of_equal_shapes_compile_nothing(models):
    config, base = models[False]
    lora = LORAS["tables"]
    first = stack_adapters([(lora, draw(base, lora, i)) for i in range(2)], base)
    other = dataclasses.replace(lora, lora_alpha=11)
    second = stack_adapters([(other, draw(base, lora, i)) for i in (5, 6)], base)
    run = jax.jit(Llama(config, Compute("float32")).apply)
    tokens = jnp.asarray(TOKENS)
    with compilations() as found:
        one = run({"params": base, "lora": with_rows(first, [0, 1, -1, 0])}, tokens)
    assert found  # it does count
    with compilations() as found:
        two = run({"params": base, "lora": with_rows(first, [1, 1, 0, -1])}, tokens)
        three = run({"params": base, "lora": with_rows(second, [0, 1, -1, 0])}, tokens)
    assert not found and run._cache_size() == 1
    assert (one != two).any() and (one != three).any()


def test_rows_may_be_an_argument_of_what_is_compiled(models):
    config, base = models[False]
    lora = LORAS["plain"]
    stack = stack_adapters([(lora, draw(base, lora, i)) for i in range(2)], base)
    model, tokens = Llama(config, Compute("float32")), jnp.asarray(TOKENS)

    @jax.jit
    def run(rows):
        return model.apply({"params": base, "lora": with_rows(stack, rows)}, tokens)

    for rows in ([0, 1, -1, 0], [1, 1, 1, -1]):
        got = run(jnp.asarray(rows))
        want = logits(config, base, with_rows(stack, rows))
        np.testing.assert_allclose(got, want, atol=LOGITS)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=2, target_modules="all-linear"),
        dataclasses.replace(LORAS["tables"], ensure_weight_tying=True, use_dora=True),
    ],
    ids=["plain", "everything"],
)
def test_a_model_changes_its_adapter_without_compiling_anything(shared_data, lora):
    model = load(shared_data / "stories260K", quantization=None, dtype="float32")
    tokens = jnp.asarray([[1, 403, 407, 261, 378]], jnp.int32)

    def ask(lora_alpha, seed):
        own = dataclasses.replace(lora, lora_alpha=lora_alpha)
        tree = jax.tree.map(jnp.asarray, draw(model.base, own, seed, spread=0.5))
        adapted = dataclasses.replace(model, adapters=tree, lora_config=own)
        with compilations() as found:
            logits = adapted.logits(tokens)
            texts = adapted.generate(["Once upon a"], max_new_tokens=12)
        return np.asarray(logits), texts, len(found)

    logits, texts, compiled = ask(3, 0)
    assert compiled
    again, other_texts, compiled = ask(7.5, 1)
    assert compiled == 0
    assert (logits != again).any() and texts != other_texts
    same, same_texts, _ = ask(3, 0)
    assert (logits == same).all() and texts == same_texts


# --- Errors of stacks ---


def test_what_cannot_differ_from_row_to_row_is_refused(models):
    _, base = models[False]
    for lora, message in (
        (dataclasses.replace(HEADS, use_dora=True), "adapter 1: `use_dora` rescales"),
        (HEADS, r"adapter 1: `lm_head.weight` replaces a tensor of the base"),
        (ROWS, r"adapter 1: `model.embed_tokens.trainable_tokens_delta` replaces"),
        (
            LoraConfig(r=2, init_lora_weights="pissa"),
            "adapter 1: .*'pissa'.*absorb",
        ),
    ):
        parts = [(LORAS["plain"], draw(base, LORAS["plain"])), (lora, draw(base, lora))]
        with pytest.raises(UserError, match=message):
            stack_adapters(parts, base)
    with pytest.raises(UserError, match="at least one adapter, got none"):
        stack_adapters([], base)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([0, 2], r"`rows` has 2, and the stack has 2 adapters \(0 to 1; -1 for none\)"),
        ([0, -2], "`rows` has -2"),
        ([0.0, 1.0], "list of integers, .* got float32"),
        ([[0, 1]], r"one for each row of the batch, got int32 of shape \[1, 2\]"),
    ],
)
def test_unusable_rows_are_refused(models, rows, message):
    _, base = models[False]
    lora = LORAS["tables"]
    stack = stack_adapters([(lora, draw(base, lora))] * 2, base)
    with pytest.raises(UserError, match=message):
        with_rows(stack, np.asarray(rows))


def test_a_tree_that_is_no_stack_is_refused(models):
    _, base = models[False]
    for name in ("plain", "tables"):
        bound = bind(draw(base, LORAS[name]), base, LORAS[name])
        with pytest.raises(UserError, match="has one adapter, not a stack"):
            with_rows(bound, [0])


def test_a_stack_without_rows_and_rows_of_another_batch_are_refused(models):
    config, base = models[False]
    for name in ("plain", "tables"):
        lora = LORAS[name]
        stack = stack_adapters([(lora, draw(base, lora))], base)
        message = r"stack of 1 adapters without row indices.*`with_rows\(stack, rows\)`"
        with pytest.raises(UserError, match=message):
            logits(config, base, stack)
        message = r"adapters of 3 rows, and the batch has the shape \[4, 9"
        with pytest.raises(UserError, match=message):
            logits(config, base, with_rows(stack, [0, 0, 0]))


def test_a_layer_of_another_shape_has_rows_too():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    stack = {"lora_A": draw(2, 3, 8), "lora_B": draw(2, 5, 3)}
    x, scaling = draw(4, 2, 6, 8), jnp.asarray([0.5, 2.0])
    rows = jnp.asarray([1, 0, -1, 1])
    got = delta(x, {**stack, "rows": rows}, scaling)
    for i, row in enumerate(rows.tolist()):
        one = {name: array[row] for name, array in stack.items()}
        want = delta(x[i], one, scaling[row]) if row >= 0 else 0 * got[i]
        np.testing.assert_allclose(got[i], want, atol=1e-5)


# --- Real adapters ---


def test_a_trained_adapter_and_its_base_in_one_batch(shared_data):
    config, base = convert.load_llama(shared_data / "stories260K", quantization=None)
    path = shared_data / "adapters/stories260K-lora-r8-shakespeare"
    lora, tree = convert.load_adapter(path, base)
    half, tree_half = combine_adapters([(lora, tree, 0.5)], base)
    twice = combine_adapters([(half, tree_half, 1.0)] * 2, base)
    base = jax.tree.map(jnp.asarray, base)
    stack = stack_adapters([(lora, tree), twice, (half, tree_half)], base)
    tokens = np.tile(np.asarray([[1, 403, 407, 261, 378, 300]], np.int32), (4, 1))
    got = np.asarray(logits(config, base, with_rows(stack, [-1, 0, 1, 2]), tokens))
    plain = logits(config, base, None, tokens[:1])
    own = logits(config, base, bind(tree, base, lora), tokens[:1])
    # These logits reach 13; as close as stored outputs of other libraries are held to.
    close = 3e-5
    np.testing.assert_allclose(got[0], plain[0], atol=close)
    np.testing.assert_allclose(got[1], own[0], atol=close)
    np.testing.assert_allclose(got[2], own[0], atol=close)
    assert np.abs(got[3] - got[1]).max() > 100 * LOGITS
    assert HEAD not in select(base, lora).shapes()


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
