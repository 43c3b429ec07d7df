"""From ranks to a configuration that selects just these modules."""

import dataclasses

import jax
import numpy as np
import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.combine import describe, module_names, shortest_ends
from qlora_jax.lora.targets import select
from tests.lora.reference import by_layer

L, D, V = 12, 8, 20


def base(*, tied=False):
    """Shapes of a model with a custom `q_proj` next to the usual one."""

    def weight(*shape):
        return {"weight": jax.ShapeDtypeStruct(shape, np.float32)}

    linear, table = weight(L, D, D), weight(V, D)
    layers = {
        **{"input_layernorm": weight(L, D), "mine": {"q_proj": linear}},
        "self_attn": {"q_proj": linear, "k_proj": linear},
    }
    layers["mine"]["inner"] = {"gate": linear}
    model = {"embed_tokens": table, "layers": layers, "norm": weight(D)}
    return {"model": model, **({} if tied else {"lm_head": table})}


def layer(i, name):
    return f"model.layers.{i}.{name}"


def described(ranks, tree):
    """The configuration, checked: it selects these ranks, scaled by 1, no others."""
    lora = describe(ranks, tree)
    found = {name: values for _, name, _, *values in by_layer(tree, lora)}
    assert found == {name: [rank, 1.0] for name, rank in ranks.items()}
    assert lora.rank_pattern == lora.alpha_pattern
    return lora


def every(name):
    return [layer(i, name) for i in range(L)]


@pytest.mark.parametrize(
    "names, targets",
    [
        (every("self_attn.k_proj"), ("k_proj",)),
        (every("mine.q_proj"), ("mine.q_proj",)),
        ([*every("mine.q_proj"), *every("self_attn.q_proj")], ("q_proj",)),
        # And neither layer 10 nor 11.
        ([layer(1, "self_attn.k_proj")], (layer(1, "self_attn.k_proj"),)),
    ],
)
def test_modules_have_the_shortest_name_that_selects_no_other(names, targets):
    assert described(dict.fromkeys(names, 2), base()).target_modules == targets


def test_ranks_that_differ_are_patterns_of_names():
    ranks = dict.fromkeys(every("self_attn.k_proj"), 4)
    ranks |= dict.fromkeys(every("mine.inner.gate"), 2)
    ranks |= {layer(1, "mine.inner.gate"): 7, "lm_head": 4, "model.embed_tokens": 1}
    lora = described(ranks, base())
    assert lora.r == lora.lora_alpha == 4
    assert lora.target_modules == ("embed_tokens", "gate", "k_proj", "lm_head")
    written = {"embed_tokens": 1, r"model\.layers\.1\.mine\.inner\.gate": 7}
    others = {rf"model\.layers\.{i}\.mine\.inner\.gate": 2 for i in range(L) if i != 1}
    assert dict(lora.rank_pattern) == written | others


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_any_ranks_can_be_described(tied, seed):
    tree = base(tied=tied)
    rng = np.random.default_rng(seed)
    names = ["lm_head", "model.embed_tokens"]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mine.q_proj"):
        names += every(name)
    ranks = {n: int(r) for n in names if (r := rng.integers(0, 4))}
    lora = described(ranks, tree)
    # The order of the patterns means nothing: PEFT writes them sorted.
    backwards = dict(reversed(lora.rank_pattern.items()))
    other = dataclasses.replace(lora, rank_pattern=backwards, alpha_pattern=backwards)
    assert select(tree, other) == select(tree, lora)


def test_the_names_of_all_modules_are_listed_a_tied_head_too():
    for tied in (False, True):
        names = list(module_names(base(tied=tied)))
        assert len(set(names)) == len(names)
        assert {"lm_head", "model", "model.norm", layer(11, "mine.inner")} <= set(names)
        assert sum("q_proj" in name for name in names) == 2 * L


def test_a_name_is_spelled_out_where_every_end_means_another_too():
    names = ["a.b.q", "c.b.q", "b.q"]
    assert shortest_ends(["b.q"], among=["b.q", "d.k"]) == ["q"]
    assert shortest_ends(names, among=names) == ["q"]
    assert shortest_ends(["a.b.q"], among=names) == ["a.b.q"]
    with pytest.raises(UserError, match="`b.q` cannot be targeted without `a.b.q`"):
        shortest_ends(["b.q"], among=names)
