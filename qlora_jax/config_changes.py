"""Changes that a run makes to its base's config.json: a longer context.

    config = change(config, {"max_position_embeddings": 8192, "rope_scaling": {...}})

A run has them as settings (`[model]`). The adapter is only correct with them, so they
are saved in its directory, as fields of config.json, and apply wherever it is loaded or
merged. A `LoraConfig` holds them as JSON, which is hashable and has one spelling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from qlora_jax.config import LlamaConfig, read_rope_scaling
from qlora_jax.errors import UserError

FIELDS = ("max_position_embeddings", "rope_scaling")
_SCALING = (
    *("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)
FILE = "base_config.json"
"""In an adapter's directory. (Some tools take a directory with a config.json for a
model.)"""


def change(
    config: LlamaConfig, changes: Mapping[str, Any] | str | None, where: str = "config"
) -> LlamaConfig:
    """Returns a configuration with these fields changed.

    Args:
      config: of the base.
      changes: fields of config.json, or an object of them as JSON; None = none.
      where: the file or section they are from; starts a message.

    Raises:
      UserError: fields that cannot be changed, or values that no model can have.
    """
    if isinstance(changes, str):
        try:
            changes = json.loads(changes)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: this is not JSON: {error}.") from error
    return dataclasses.replace(
        config, **check_changes({} if changes is None else changes, where)
    )


def check_changes(changes: Any, where: str) -> dict[str, Any]:
    """Reads changes into the values that a `LlamaConfig` has.

    Raises:
      UserError: as `change`.
    """
    if not isinstance(changes, Mapping):
        raise UserError(f"{where}: must be an object, got {changes!r:.80}.")
    _check_names(changes, FIELDS, where)
    values: dict[str, Any] = {}
    length, scaling = (changes.get(name) for name in FIELDS)
    if length is not None:
        if type(length) is not int or not 0 < length < 1 << 31:
            raise UserError(
                f"{where}: `max_position_embeddings` must be a positive integer, got "
                f"{length!r:.80}."
            )
        values["max_position_embeddings"] = length
    if scaling is not None:
        if not isinstance(scaling, Mapping):
            raise UserError(
                f"{where}: `rope_scaling` must be a table, got {scaling!r:.80}."
            )
        _check_names(scaling, _SCALING, f"{where}: rope_scaling")
        values["rope_scaling"] = read_rope_scaling(scaling, where)
    return values


def _check_names(table: Mapping[str, Any], known: tuple, where: str) -> None:
    unknown = [name for name in table if name not in known]
    if unknown:
        raise UserError(
            f"{where}: `{unknown[0]!s:.80}` cannot be changed; "
            f"{', '.join(f'`{name}`' for name in known)} can."
        )


def as_text(changes: Mapping[str, Any]) -> str | None:
    """Returns changes as a `LoraConfig` holds them; None if there are none."""
    present = {name: changes[name] for name in FIELDS if changes.get(name) is not None}
    return json.dumps(present, sort_keys=True) if present else None


def restored(config: LlamaConfig) -> LlamaConfig:
    """Undoes the changes; returns the configuration of the base's config.json."""
    if not config.raw:
        return config
    base = LlamaConfig.from_hf(config.raw)
    return dataclasses.replace(config, **{name: getattr(base, name) for name in FIELDS})
