"""Settings of an adapter that match nothing in a model, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qlora_jax.errors import UserError, did_you_mean
from qlora_jax.lora.config import LoraConfig
from qlora_jax.tree import FUSED_PROJECTIONS, QUANTIZED, Path, Shape, dotted

# Module -> shape of its weight in one layer, and number of layers.
Modules = Mapping[Path, tuple[Shape, int | None]]


def ends_in(path: str, name: str) -> bool:
    """Whether a module path ends in a name, at a dot."""
    return path == name or path.endswith(f".{name}")


def unmatched_targets(modules: Modules, lora: LoraConfig) -> tuple[str, ...]:
    """Returns the entries of a `target_modules` list that match nothing."""
    if isinstance(lora.target_modules, str):
        return ()
    paths = [p for path, (_, n) in modules.items() for p in dotted(path, n)]
    # Against all modules: a name whose modules are all excluded is not a typo.
    unmatched = [
        name
        for name in lora.target_modules
        if not any(ends_in(path, name) for path in paths)
    ]
    if set(lora.target_modules) == set(QUANTIZED):
        # The default has the names of all families, of which a model has some.
        for fused, parts in FUSED_PROJECTIONS.items():
            other = (fused,) if fused in unmatched else parts
            unmatched = [name for name in unmatched if name not in other]
    return tuple(unmatched)


def rows_of(name: str, modules: Iterable[str]) -> str:
    """Names the weight of this model whose rows a missing projection is, or "".

    Args:
      name: a target that matches nothing.
      modules: last parts of the names of the model's modules.
    """
    last = name.rpartition(".")[2]
    for fused, parts in FUSED_PROJECTIONS.items():
        if last in parts and fused in modules:
            return f" Here {', '.join(parts)} are rows of `{fused}`: name that."
        if last == fused and set(parts) <= set(modules):
            return f" Here it is {', '.join(f'`{part}`' for part in parts)}."
    return ""


def nothing_matches(modules: Modules, lora: LoraConfig) -> UserError:
    """Returns the error for settings that select no module, with the likely cause."""
    targets = lora.target_modules
    names = {path[-1] for path in modules}
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    values = {name: getattr(lora, name) for name in (*limits, "modules_to_save")}
    set_limits = [f"`{k}`={v!r:.200}" for k, v in values.items() if v is not None]
    count = max((n for _, n in modules.values() if n is not None), default=0)
    # A string is a pattern, so that the name of a module alone matches none.
    is_name = isinstance(targets, str) and targets in names
    suggestion = (
        " A string is a regular expression for the full path of a module; modules are "
        f'named in a list: ["{targets}"].'
        if is_name
        else _rows_of_first(targets, names) or did_you_mean(targets, names)
    )
    return UserError(
        f"`target_modules`={targets!r:.200} matches no linear module and no embedding "
        f"of this model{' under ' if set_limits else ''}{', '.join(set_limits)}."
        + (f" Layers here: 0 to {count - 1}." if absent_layers(lora, count) else "")
        + suggestion
        + f" Modules here: {', '.join(sorted(names))}."
    )


def _rows_of_first(targets: tuple[str, ...] | str, names: set[str]) -> str:
    targets = () if isinstance(targets, str) else targets
    return next(filter(None, (rows_of(name, names) for name in targets)), "")


def absent_layers(lora: LoraConfig, count: int) -> tuple[int, ...]:
    """Returns the `layers_to_transform` that a model of `count` layers lacks."""
    numbers = lora.layers_to_transform or ()
    numbers = (numbers,) if isinstance(numbers, int) else numbers
    return tuple(n for n in numbers if n >= count)


def quoted(names: list[str]) -> str:
    """Lists names for a message, the first ten of them."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(f"{n!r:.80}" for n in names[:10]) + more
