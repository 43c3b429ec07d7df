"""From ranks to a configuration that selects just these modules."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.combine import describe, module_names, shortest_ends
from qlora_jax.lora.targets import select
from qlora_jax.tree import dotted

L, D, V = 12, 8, 20


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def base(*, tied=False):
    """Shapes of a model with a custom `q_proj` next to the usual one."""

    def linear():
        return {"weight": abstract(L, D, D)}

    tree = {
        "model": {
            "embed_tokens": {"weight": abstract(V, D)},
            "layers": {
                "input_layernorm": {"weight": abstract(L, D)},
                "self_attn": {"q_proj": linear(), "k_proj": linear()},
                "mine": {"q_proj": linear(), "inner": {"gate": linear()}},
            },
            "norm": {"weight": abstract(D)},
        }
    }
    if not tied:
        tree["lm_head"] = {"weight": abstract(V, D)}
    return tree


def layer(i, name):
    return f"model.layers.{i}.{name}"


def described(ranks, tree):
    """The configuration, checked: it selects these ranks, scaled by 1, no others."""
    lora = describe(ranks, tree)
    selected = {}
    for a in select(tree, lora).adapted:
        for name, rank, scaling in zip(
            dotted(a.path, a.layers), a.ranks, a.scalings, strict=True
        ):
            if rank:
                selected[name] = rank
                assert scaling == 1.0
    assert selected == ranks
    assert lora.rank_pattern == lora.alpha_pattern
    return lora


def test_modules_have_the_shortest_name_that_selects_no_other():
    tree = base()
    keys = {layer(i, "self_attn.k_proj"): 2 for i in range(L)}
    assert described(keys, tree).target_modules == ("k_proj",)
    mine = {layer(i, "mine.q_proj"): 2 for i in range(L)}
    assert described(mine, tree).target_modules == ("mine.q_proj",)
    usual = {layer(i, "self_attn.q_proj"): 2 for i in range(L)}
    assert described(mine | usual, tree).target_modules == ("q_proj",)
    one = {layer(1, "self_attn.k_proj"): 3}  # and neither layer 10 nor 11
    assert described(one, tree).target_modules == (layer(1, "self_attn.k_proj"),)


def test_ranks_that_differ_are_patterns_of_names():
    tree = base()
    ranks = {layer(i, "self_attn.k_proj"): 4 for i in range(L)}
    ranks |= {layer(i, "mine.inner.gate"): 2 for i in range(L)}
    ranks |= {layer(1, "mine.inner.gate"): 7, "lm_head": 4, "model.embed_tokens": 1}
    lora = described(ranks, tree)
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
    for i, name in itertools.product(
        range(L), ("self_attn.q_proj", "self_attn.k_proj", "mine.q_proj")
    ):
        names.append(layer(i, name))
    ranks = {n: int(r) for n in names if (r := rng.integers(0, 4))}
    lora = described(ranks, tree)
    # The order of the patterns means nothing: PEFT writes them sorted.
    backwards = dict(reversed(lora.rank_pattern.items()))
    other = dataclasses.replace(lora, rank_pattern=backwards, alpha_pattern=backwards)
    assert select(tree, other) == select(tree, lora)


def test_other_fields_are_kept():
    lora = describe({"lm_head": 3}, base(), lora_dropout=0.5, base_fingerprint="f")
    assert (lora.lora_dropout, lora.base_fingerprint) == (0.5, "f")


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
    message = "`b.q` cannot be targeted without `a.b.q`"
    with pytest.raises(UserError, match=message):
        shortest_ends(["b.q"], among=names)
