"""An adapter that is trained further, and the settings given beside it.

An adapter says itself what it is: its rank, its targets, its scaling. Whoever trains it
further, or asks what that takes, may repeat these settings. Some of them can be changed
at no loss, the factor of the update and the dropout; for all others, another value
would mean another adapter, and is refused by name rather than passed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.lora_config import LoraConfig
from qlora_jax.targets import select

CHANGEABLE = ("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout")
"""Settings that leave the trained arrays what they are."""
# Of the base, or the same in every adapter.
_NOT_COMPARED = (
    "base_model_name_or_path",
    "revision",
    "base_fingerprint",
    "base_config_changes",
    "task_type",
)
_NO_ORDER = ("target_modules", "exclude_modules", "modules_to_save")


def given_fields(lora: LoraConfig) -> set[str]:
    """Fields that are not at their defaults: in Python, those that someone gave."""
    plain = LoraConfig()
    return {
        f.name
        for f in dataclasses.fields(lora)
        if getattr(lora, f.name) != getattr(plain, f.name)
    }


def continued(
    own: LoraConfig,
    wanted: LoraConfig,
    given: Collection[str],
    base: Mapping[str, Any],
    *,
    name: str,
    changeable: Collection[str] = CHANGEABLE,
) -> tuple[LoraConfig, list[str]]:
    """Returns an adapter's configuration with what was given beside it.

    Settings that select the same modules of `base` with the same ranks and factors are
    equal, however they are spelled.

    Args:
      own: the adapter's.
      wanted: holds the values of the fields in `given`.
      given: names of the fields that someone gave.
      base: parameter tree of the model, of arrays or shapes.
      name: what the adapter is called in a message.
      changeable: fields whose value may be another one than the adapter's.

    Returns:
      The configuration, and what it changes ("lora_alpha 8 -> 16").

    Raises:
      UserError: fields that contradict the adapter, all of them.
    """
    other = [
        f.name
        for f in dataclasses.fields(own)
        if f.name in given
        and f.name not in _NOT_COMPARED
        and _plain(own, f.name) != _plain(wanted, f.name)
    ]
    if "init_lora_weights" in other and wanted.init_lora_weights == "default":
        other.remove("init_lora_weights")  # no start of its own is asked for
    changed = [field for field in other if field in changeable]
    fixed = [field for field in other if field not in changeable]
    if fixed and _select_alike(own, wanted, fixed, base):
        fixed = []
    if fixed:
        values = ", ".join(
            f"`{field}`={_short(wanted, field)} (the adapter's: {_short(own, field)})"
            for field in fixed
        )
        raise UserError(
            f"`{name}` is an adapter with settings of its own, which contradict those "
            f"given: {values}. Leave these out"
            + (
                f"; {', '.join(f'`{field}`' for field in changeable)} may be changed."
                if changeable
                else "."
            )
        )
    lora = dataclasses.replace(own, **{f: getattr(wanted, f) for f in changed})
    notes = [f"{f} {_short(own, f)} -> {_short(wanted, f)}" for f in changed]
    return lora, notes


def _plain(lora: LoraConfig, field: str) -> Any:
    """A value without what carries no meaning."""
    value = getattr(lora, field)
    if field in _NO_ORDER and isinstance(value, tuple):
        return sorted(value)
    return lora.token_rows if field == "trainable_token_indices" else value


def _short(lora: LoraConfig, field: str) -> str:
    return f"{getattr(lora, field)!r:.120}"


def _select_alike(
    own: LoraConfig, wanted: LoraConfig, fields: list[str], base: Mapping[str, Any]
) -> bool:
    if "init_lora_weights" in fields:
        return False
    try:
        respelled = dataclasses.replace(own, **{f: getattr(wanted, f) for f in fields})
        one, two = select(base, own), select(base, respelled)
    except UserError:  # no such adapter, or not of this base
        return False
    return (one.adapted, one.whole, one.rows) == (two.adapted, two.whole, two.rows)
