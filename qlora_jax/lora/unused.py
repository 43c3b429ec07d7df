"""Settings of an adapter that select nothing in a model, which PEFT passes over."""

from __future__ import annotations

from qlora_jax.lora.config import AT_END, LoraConfig
from qlora_jax.lora.patterns import first_matches
from qlora_jax.lora.targets import Selection, absent_layers
from qlora_jax.tree import LAYERS, dotted


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


def unused_settings(lora: LoraConfig, selection: Selection) -> list[str]:
    """Lists targets, layers and patterns that select nothing; args as above."""
    counts = [a.layers for a in selection.adapted if a.path[: len(LAYERS)] == LAYERS]
    absent = absent_layers(lora, max(filter(None, counts), default=0)) if counts else ()
    return [
        *(f"`target_modules` of {name!r:.100}" for name in selection.unmatched),
        *(f"`layers_to_transform` of {layer}" for layer in absent),
        *unused_patterns(lora, selection),
    ]
