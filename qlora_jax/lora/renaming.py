"""Settings of an adapter, for a model whose modules have other names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from qlora_jax.lora.config import AT_END, LoraConfig
from qlora_jax.lora.patterns import first_matches
from qlora_jax.lora.targets import matching
from qlora_jax.tree import FrozenDict


def rename(
    lora: LoraConfig,
    linears: Collection[str],
    modules: Collection[str],
    old_name: Callable[[str], str],
) -> LoraConfig:
    """Returns the settings that select what others select under old names.

    Settings that mean the same under both names stay as they are; else the modules are
    listed.

    Args:
      lora: settings for the old names.
      linears: new dotted paths of the modules that can be adapted.
      modules: new dotted paths of all modules.
      old_name: from a new path to the old one.

    Returns:
      `lora`, or what replaces it. Names in `modules_to_save` that none of `modules`
      has, under neither name, are left out.
    """
    linears = tuple(sorted(linears))
    old = {old_name(path): path for path in linears}
    chosen = {old[path] for path in matching(old, lora)}
    out = dataclasses.replace(lora, modules_to_save=_saved(lora, modules, old_name))
    if chosen and matching(linears, out) != chosen:
        last = {path.rpartition(".")[2] for path in chosen}
        for names in (last, chosen):  # the shorter list, if it selects the same
            out = dataclasses.replace(
                out,
                target_modules=tuple(sorted(names)),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
            )
            if matching(linears, out) == chosen:
                break
    old_names = {path: name for name, path in old.items() if path in chosen}
    tables = {
        name: _pattern_table(name, getattr(lora, name), old_names)
        for name in ("rank_pattern", "alpha_pattern")
    }
    return dataclasses.replace(out, **tables)


def _saved(
    lora: LoraConfig, modules: Collection[str], old_name: Callable[[str], str]
) -> tuple[str, ...] | None:
    """Returns `modules_to_save` for the new names."""
    out: list[str] = []
    for name in lora.modules_to_save or ():
        # PEFT compares ends of paths.
        hits = [path for path in modules if old_name(path).endswith(name)]
        same = hits == [path for path in modules if path.endswith(name)]
        out += [name] if same and hits else hits
    return tuple(dict.fromkeys(out)) or None


def _pattern_table(
    field: str, table: Mapping[str, Any], old_names: Mapping[str, str]
) -> Mapping[str, Any]:
    """Returns a table of patterns that gives new names the values of their old ones."""

    def values(names: tuple[str, ...]) -> dict[str, Any]:
        where = f"lora: `{field}`"
        found = first_matches(tuple(table), names, field=where, inside=AT_END)
        return {name: table[pattern] for name, pattern in found.items()}

    of_old, of_new = values(tuple(old_names.values())), values(tuple(old_names))
    wanted = {new: of_old[old] for new, old in old_names.items() if old in of_old}
    if wanted == of_new:
        return table
    return FrozenDict({re.escape(name): value for name, value in wanted.items()})
