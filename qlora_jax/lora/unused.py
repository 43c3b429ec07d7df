"""Settings of an adapter that select nothing in a model, which PEFT passes over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_jax.lora.config import AT_END, LoraConfig
from qlora_jax.lora.patterns import first_matches
from qlora_jax.lora.targets import Selection, linear_modules, matching
from qlora_jax.lora.unmatched import absent_layers, rows_of
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, dotted, hf_key


def unused_patterns(lora: LoraConfig, selection: Selection) -> list[str]:
    """Lists the patterns for ranks and alphas that set neither of any adapted module.

    Such a pattern matches no path, as "^q_proj" and "base_model.model.model.layers.0"
    do, or only paths that an earlier pattern of its table matches.

    Args:
      lora: the settings.
      selection: what they select in a model.
    """
    paths = tuple(
        path
        for module in selection.adapted
        for path, rank in zip(
            dotted(module.path, module.layers), module.ranks, strict=True
        )
        if rank
    )
    out = []
    for name in ("rank_pattern", "alpha_pattern"):
        table = getattr(lora, name)
        field = f"lora: `{name}`"
        first = first_matches(tuple(table), paths, field=field, inside=AT_END)
        used = set(first.values())
        out += [f"`{name}` of {p!r:.100}" for p in table if p not in used]
    return out


def unused_exclusions(lora: LoraConfig, base: Mapping[str, Any]) -> list[str]:
    """Lists what `exclude_modules` names and a model does not have.

    Args:
      lora: the settings.
      base: parameter tree of the model, of arrays or shapes.
    """
    paths = [hf_key(EMBEDDING), hf_key(HEAD)]
    for module, (_, _, layers) in linear_modules(base).items():
        paths += dotted(module, layers)
    value = lora.exclude_modules or ()
    # Twice, because a list of one may be read as an expression.
    entries = [value] if isinstance(value, str) else [(name, name) for name in value]
    return [
        f"`exclude_modules` of {(entry if isinstance(entry, str) else entry[0])!r:.100}"
        for entry in entries
        if matching(paths, LoraConfig(target_modules=".*", exclude_modules=entry))
        == set(paths)
    ]


def unused_settings(
    lora: LoraConfig, selection: Selection, base: Mapping[str, Any]
) -> list[str]:
    """Lists names, layers and patterns that select nothing; arguments as above."""
    counts = [a.layers for a in selection.adapted if a.path[: len(LAYERS)] == LAYERS]
    absent = absent_layers(lora, max(filter(None, counts), default=0)) if counts else ()
    names = {path[-1] for path in linear_modules(base)}
    parts = {n: rows_of(n, names).strip().rstrip(".") for n in selection.unmatched}
    return [
        *(
            f"`target_modules` of {name!r:.100}" + (f" ({part})" if part else "")
            for name, part in parts.items()
        ),
        *(f"`layers_to_transform` of {layer}" for layer in absent),
        *unused_exclusions(lora, base),
        *unused_patterns(lora, selection),
    ]
