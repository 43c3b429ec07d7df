"""Which layers of a model are windowed, and which rotate: from its config.json.

Newer files list `layer_types`; older ones give rules, by family, that transformers'
configuration classes turn into that list. Both are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from qlora_jax.errors import UserError
from qlora_jax.models.config_fields import is_integer
from qlora_jax.models.families import Family

FULL, SLIDING = "full_attention", "sliding_attention"


class LayerKind(NamedTuple):
    """How one layer's attention differs from the others'."""

    window: int | None
    """Keys that a query sees, itself included; None = all before it."""
    rope: Literal["global", "local", "none"]
    """Its rotary table: that of `rope_theta`, of `rope_local_base_freq`, or none."""


def read_layer_types(
    raw: Mapping[str, Any], family: Family, rotated: tuple[int, ...]
) -> tuple[int | None, tuple[str, ...]]:
    """Reads the window and the layers that have it.

    Args:
      raw: content of config.json, with a number of layers.
      family: of its model type.
      rotated: `no_rope_layers`.

    Returns:
      (window, "full_attention" or "sliding_attention" of each layer); (None, ()) where
      no layer has a window.

    Raises:
      UserError: a window or layer types that no model can have.
    """
    layers = raw["num_hidden_layers"]
    # Null is a value here: "no window". Only an absent key has the class default.
    window = raw.get("sliding_window", family.default("sliding_window"))
    if family.layer_kinds == "none":
        return None, ()
    if family.window_is_optional and not raw.get("use_sliding_window"):
        window = None
    if window is not None and not (is_integer(window) and window > 0):
        raise UserError(
            f"config.json: `sliding_window` must be a positive integer, or null for no "
            f"window, got {window!r:.80}."
        )
    types = raw.get("layer_types") if "layer_types" in family.fields else None
    if types is None:
        types = _types_by_rule(raw, family, window, rotated)
    known = (FULL, SLIDING)
    valid = isinstance(types, (list, tuple)) and all(kind in known for kind in types)
    if not valid or len(types) != layers:
        raise UserError(
            f"config.json: `layer_types` must list {FULL!r} or {SLIDING!r} for each of "
            f"the {layers} layers, got {types!r:.160}."
        )
    if SLIDING not in types:
        return None, ()
    if window is None:
        raise UserError(
            f"config.json: `layer_types` has {SLIDING!r}, and no `sliding_window` says "
            "how many tokens it sees (or `use_sliding_window` is false)."
        )
    return window, tuple(types)


def _types_by_rule(
    raw: Mapping[str, Any],
    family: Family,
    window: int | None,
    rotated: tuple[int, ...],
) -> list[str]:
    """Returns the types that transformers derives for a file without the list."""
    layers = range(raw["num_hidden_layers"])
    if window is None:
        return [FULL for _ in layers]
    if family.layer_kinds == "qwen":
        first = _integer(raw, "max_window_layers", family)
        return [SLIDING if i >= first else FULL for i in layers]
    if family.layer_kinds == "smollm3":
        return [SLIDING if rotated and not rotated[i] else FULL for i in layers]
    if family.layer_kinds == "alternating":
        # Every n-th layer sees everything; not every family reads the n.
        has_pattern = "sliding_window_pattern" in family.fields
        pattern = _integer(raw if has_pattern else {}, "sliding_window_pattern", family)
        return [SLIDING if (i + 1) % pattern else FULL for i in layers]
    return [SLIDING for _ in layers]


def read_no_rope_layers(raw: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """Reads for each layer whether it rotates (1) or not (0); () where all do.

    Raises:
      UserError: a list that does not fit the layers.
    """
    if "no_rope_layers" not in family.fields:
        return ()
    layers = raw["num_hidden_layers"]
    flags = raw.get("no_rope_layers")
    if flags is None:
        interval = _integer(raw, "no_rope_layer_interval", family)
        flags = [int((i + 1) % interval != 0) for i in range(layers)]
    valid = isinstance(flags, (list, tuple)) and all(flag in (0, 1) for flag in flags)
    if not valid or len(flags) != layers:
        raise UserError(
            "config.json: `no_rope_layers` must list 1 (rotates) or 0 (does not) for "
            f"each of the {layers} layers, got {flags!r:.160}."
        )
    return () if all(flags) else tuple(int(flag) for flag in flags)


def _integer(raw: Mapping[str, Any], name: str, family: Family) -> int:
    # transformers takes an absent key and null alike here.
    value = raw.get(name)
    value = family.default(name) if value is None else value
    least = 0 if name == "max_window_layers" else 1
    if not is_integer(value) or value < least:
        raise UserError(
            f"config.json: `{name}` must be an integer of at least {least}, got "
            f"{value!r:.80}."
        )
    return value
