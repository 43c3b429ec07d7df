"""What a run changes in the config.json of its base: a longer context.

    config = change(config, {"max_position_embeddings": 8192, "rope_scaling": {...}})

The changes are a run's settings (`[model]`). Its adapter means nothing without them, so
that they lie beside it, in the words of config.json, and hold wherever it is loaded or
merged. In a `LoraConfig` they are JSON text: hashable, and equal where they are equal.
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
"""Beside adapter_config.json. (A config.json there would make it a model to some.)"""


def change(
    config: LlamaConfig, changes: Mapping[str, Any] | str | None, where: str = "config"
) -> LlamaConfig:
    """Returns a configuration with these fields changed.

    Args:
      config: of the base.
      changes: fields as a config.json has them; or JSON text of them; None = none.
      where: what the changes are a part of, for a message.

    Raises:
      UserError: fields that cannot be changed, or values that no model can have.
    """
    if isinstance(changes, str):
        try:
            changes = json.loads(changes)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: this is no JSON: {error}.") from error
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
    _refuse_unknown(changes, FIELDS, where)
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
        _refuse_unknown(scaling, _SCALING, f"{where}: rope_scaling")
        values["rope_scaling"] = read_rope_scaling(scaling, where)
    return values


def _refuse_unknown(table: Mapping[str, Any], known: tuple, where: str) -> None:
    unknown = [name for name in table if name not in known]
    if unknown:
        raise UserError(
            f"{where}: `{unknown[0]!s:.80}` is nothing that can be changed; "
            f"{', '.join(f'`{name}`' for name in known)} are."
        )


def as_text(changes: Mapping[str, Any]) -> str | None:
    """Changes as a `LoraConfig` holds them; None where there are none."""
    given = {name: changes[name] for name in FIELDS if changes.get(name) is not None}
    return json.dumps(given, sort_keys=True) if given else None


def restored(config: LlamaConfig) -> LlamaConfig:
    """The configuration that the base's own config.json has, of a changed one."""
    if not config.raw:
        return config
    own = LlamaConfig.from_hf(config.raw)
    return dataclasses.replace(config, **{name: getattr(own, name) for name in FIELDS})
