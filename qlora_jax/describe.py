"""From ranks to a configuration: the inverse of `qlora_jax.targets.select`.

PEFT has no table of modules, only rules: `target_modules` lists ends of module paths,
`rank_pattern` and `alpha_pattern` match them with regular expressions. Here the rules
are found that select given modules with given ranks and nothing else. Each module is
called by the shortest end of its path that means it alone or its equals: `q_proj` where
all are meant, `model.layers.3.self_attn.q_proj` where one is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from qlora_jax.errors import UserError
from qlora_jax.lora_config import LoraConfig
from qlora_jax.tree import HEAD, LAYERS, FrozenDict, Path, dotted


def describe(
    ranks: Mapping[str, int], base: Mapping[str, Any], **others: Any
) -> LoraConfig:
    """Returns the configuration of adapters of these ranks, all scalings 1.

    Args:
      ranks: Hugging Face module path -> rank, for every adapted module.
      base: parameter tree of the model, of arrays or shapes.
      others: further fields of the configuration, which leave the selection as it is.

    Raises:
      UserError: as `shortest_ends`.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns: dict[str, int] = {}
    for rank in sorted(set(ranks.values()) - {usual}):
        names = [name for name, own in ranks.items() if own == rank]
        # Expressions of different ranks match different modules: their order, which
        # PEFT loses in writing, does not matter.
        patterns |= {re.escape(end): rank for end in shortest_ends(names, among=ranks)}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=tuple(shortest_ends(ranks, among=module_names(base))),
        rank_pattern=FrozenDict(patterns),
        alpha_pattern=FrozenDict(patterns),
        **others,
    )


def shortest_ends(names: Iterable[str], *, among: Iterable[str]) -> list[str]:
    """Finds the shortest ends of `names` that are ends of no other name of `among`.

    Raises:
      UserError: a name that is an end of another as a whole.
    """
    wanted = set(names)
    meant: dict[str, set[str]] = {}
    for name in {*among, *wanted}:
        for end in _ends(name):
            meant.setdefault(end, set()).add(name)
    found = {}
    for name in wanted:
        found[name] = next((e for e in _ends(name) if meant[e] <= wanted), None)
        if found[name] is None:
            other = min(meant[name] - wanted)
            raise UserError(
                f"`{name}` cannot be named alone: `{other}` ends alike, and PEFT's "
                "lists of modules mean both. Give one of your modules another name."
            )
    return sorted(set(found.values()))


def _ends(name: str) -> list[str]:
    """Ends of a dotted name up to the layer's number, then the whole name."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    start = numbers[-1] + 1 if numbers else 0
    return [*(".".join(parts[i:]) for i in range(len(parts) - 1, start - 1, -1)), name]


def module_names(base: Mapping[str, Any]) -> Iterator[str]:
    """Lists every module of a model, a tied head too, as Hugging Face spells them."""

    def walk(node: Mapping[str, Any], path: Path) -> Iterator[Path]:
        for name, child in node.items():
            if isinstance(child, Mapping):
                yield (*path, name)
                yield from walk(child, (*path, name))

    layers = jax.tree.leaves(base["model"]["layers"])[0].shape[0]
    for path in {HEAD, *walk(base, ())}:
        stacked = path[: len(LAYERS)] == LAYERS and path != LAYERS
        yield from dotted(path, layers if stacked else None)
