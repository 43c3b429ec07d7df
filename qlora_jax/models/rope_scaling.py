"""The rotary fields of a config.json: theta, and how frequencies are scaled.

The file exists in two generations: transformers 4 writes `rope_theta` and
`rope_scaling`, transformers 5 `rope_parameters`. Both are read, with the precedence of
transformers 5 in a file that has both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qlora_jax.errors import UserError
from qlora_jax.models.config_fields import is_number
from qlora_jax.models.families import Family

_ORIGINAL = "original_max_position_embeddings"
# Rope type -> the fields that it needs, and those that it may have.
_FIELDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        (
            *("attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor", _ORIGINAL),
        ("factor", "attention_factor"),
    ),
}
# Null in a file is the same as left out, for these.
_LISTS = ("short_factor", "long_factor")


def rope_fields(kind: Any) -> tuple[str, ...]:
    """Returns the fields of `rope_scaling` that a rope type reads; () if it is none."""
    if not isinstance(kind, str) or kind not in _FIELDS:
        return ()
    needed, optional = _FIELDS[kind]
    return (*needed, *optional)


def rope_value(name: str, value: Any) -> Any:
    """Returns a field of `rope_scaling` as a run's settings keep it: hashable.

    An option of a command line has a list or a switch as text: "[1.0, 1.5]", "1.0,1.5",
    "false". What is none stays as it is, to be refused by `read_rope_scaling`.
    """
    if isinstance(value, str) and name in (*_LISTS, "truncate"):
        text = value.lower()
        if name in _LISTS and not text.startswith("["):
            text = f"[{text}]"
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled; the fields of `rope_scaling`."""

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float | None = None
    """Ratio of the extended to the native context length; longrope alone derives it
    from `max_position_embeddings` if it is None."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """Native context length (tokens); not of linear."""
    attention_factor: float | None = None
    """Factor of cos and sin; None = derived from `factor`. yarn and longrope."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Rotations within the native context at the ends of YaRN's ramp."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the ends of YaRN's ramp are rounded to whole dimensions."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """LongRoPE's divisors of the frequencies, one for each pair of dimensions: of texts
    up to the native context length, and of longer ones."""

    def __post_init__(self) -> None:
        kind, factor = self.rope_type, self.factor
        if factor is None and kind != "longrope":
            raise UserError(f"`rope_scaling.factor` is missing; {kind!r} needs it.")
        if factor is not None and not (math.isfinite(factor) and factor > 0):
            raise UserError(f"`rope_scaling.factor` must be > 0, got {factor}.")
        if kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                "`rope_scaling.low_freq_factor` must be smaller than "
                f"`high_freq_factor`, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}."
            )
        if kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise UserError(
                "`rope_scaling.beta_fast` must be larger than `beta_slow`, and both > "
                f"0, got {self.beta_fast} and {self.beta_slow}."
            )
        if kind != "linear" and self.original_max_position_embeddings < 1:
            raise UserError(
                f"`rope_scaling.{_ORIGINAL}` must be > 0, got "
                f"{self.original_max_position_embeddings}."
            )
        if kind == "longrope":
            short, long = self.short_factor, self.long_factor
            # Divisors of frequencies.
            if len(short) != len(long) or not short or min(*short, *long) <= 0:
                raise UserError(
                    "`rope_scaling.short_factor` and `long_factor` must be lists of "
                    f"one length with numbers > 0, got {len(short)} and {len(long)}, "
                    f"the smallest {min((*short, *long), default=None)}."
                )

    def __str__(self) -> str:
        """Says how positions are scaled, after "scaled": "by 2 (linear)"."""
        if self.factor is None:
            return f"by a factor for each frequency ({self.rope_type})"
        return f"by {self.factor:g} ({self.rope_type})"

    def to_hf(self) -> dict[str, Any]:
        """Returns the `rope_scaling` object of a transformers-4 config."""
        out: dict[str, Any] = {"rope_type": self.rope_type}
        needed, optional = _FIELDS[self.rope_type]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in (*needed, *optional):
            value = getattr(self, name)
            if name in needed or value != defaults[name]:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


class Rope(NamedTuple):
    """The rotary fields of a model."""

    theta: float
    scaling: RopeScaling | None
    local_theta: float | None
    """Of the windowed layers, where they have their own."""
    partial_rotary_factor: float
    """Share of a head that is rotated."""


def read_rope(raw: Mapping[str, Any], family: Family) -> Rope:
    """Reads the rotary fields of a config.json by the precedence of transformers 5.

    `rope_scaling` counts before `rope_parameters`, and a theta in either before the one
    next to them. What transformers fails on, or passes over, is refused by name.

    Raises:
      UserError: fields that are missing, null or of another type, or a rope type that
        is not computed.
    """
    source = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    fields = dict(raw.get(source) or {})
    local_theta = None
    if family.ropes_by_layer_type:
        fields, local_theta = _read_ropes_by_layer_type(raw, family)
        source = "rope_parameters"
    nested = [name for name, value in fields.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"config.json: `{source}` has fields for single kinds of layers "
            f"({', '.join(map(repr, nested))!s:.80}), and the layers of this model are "
            f"of one kind. Write `rope_type` and `rope_theta` directly into `{source}`."
        )
    theta_name = f"{source}.rope_theta" if "rope_theta" in fields else "rope_theta"
    default = family.default("rope_theta") or 10000.0
    theta = fields.get("rope_theta", raw.get("rope_theta", default))
    if theta is None:
        raise UserError(
            f"config.json: `{theta_name}` is null, so the base of the rotary "
            "frequencies is unknown. Write the value of the original checkpoint there "
            "(Llama 2: 10000, Llama 3: 500000)."
        )
    kind = _rope_type(fields, "config.json")
    kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind != "default" and kind not in family.rope_types:
        raise unsupported_type(kind, "config.json", family.rope_types)
    partial_name = "partial_rotary_factor"
    inside = partial_name in fields
    partial = fields[partial_name] if inside else raw.get(partial_name, 1.0)
    if partial_name not in family.fields:
        # transformers' Llama passes over it under "default".
        if kind != "default" and partial is not None and partial != 1:
            raise UserError(
                f"config.json: `partial_rotary_factor`={partial!r:.80} is not "
                f"supported; models of model_type {raw.get('model_type')!r:.40} rotate "
                "whole heads."
            )
        partial = 1.0
    elif partial is None:
        name = f"{source}.{partial_name}" if inside else partial_name
        raise UserError(
            f"config.json: `{name}` is null, so it is unknown which part of a head is "
            "rotated. Write the value of the original checkpoint there, or remove the "
            "field if whole heads are."
        )
    if kind in ("llama3", "yarn", "longrope"):
        length = raw.get("max_position_embeddings") or family.default(
            "max_position_embeddings"
        )
        inner = fields.get(_ORIGINAL)
        # A field of the file itself counts before that of the object.
        outer = raw.get(_ORIGINAL, family.default(_ORIGINAL))
        fields[_ORIGINAL] = outer or inner or length
    fields["rope_type"] = kind
    scaling = read_rope_scaling(fields)
    return Rope(float(theta), scaling, local_theta, float(partial))


def _read_ropes_by_layer_type(
    raw: Mapping[str, Any], family: Family
) -> tuple[dict[str, Any], float]:
    """Reads theta and scaling of the unwindowed layers, and theta of the windowed."""
    full, local = {}, family.default("rope_local_base_freq")
    nested = dict(raw.get("rope_parameters") or {})
    if nested and not {"full_attention", "sliding_attention"} & nested.keys():
        raise UserError(
            "config.json: `rope_parameters` must have the fields of both kinds of "
            "layers, 'full_attention' and 'sliding_attention', got "
            f"{', '.join(map(repr, nested))!s:.80}."
        )
    for name, value in nested.items():
        if value is not None and not isinstance(value, Mapping):
            raise UserError(
                f"config.json: `rope_parameters.{name}` must be an object, got "
                f"{value!r:.80}."
            )
    full.update(nested.get("full_attention") or {})
    full.update(raw.get("rope_scaling") or {})
    local = raw.get("rope_local_base_freq", local)
    sliding = nested.get("sliding_attention") or {}
    local = sliding.get("rope_theta", local)
    kind = _rope_type(sliding, "config.json")
    if kind != "default":
        raise UserError(
            f"config.json: rope type {kind!r:.80} of the windowed layers is not "
            "supported (`rope_parameters.sliding_attention`); they take 'default'."
        )
    if not is_number(local) or local <= 0:
        raise UserError(
            "config.json: the theta of the windowed layers (`rope_local_base_freq`, "
            f"`rope_parameters.sliding_attention`) must be > 0, got {local!r:.80}."
        )
    return full, float(local)


def _rope_type(scaling: Mapping[str, Any], where: str) -> Any:
    # `type` is the older name of the key.
    name = "rope_type" if "rope_type" in scaling else "type"
    kind = scaling.get(name, "default")
    if kind is None:
        raise UserError(
            f"{where}: `rope_scaling.{name}` is null. Write 'default', 'linear' or "
            "'llama3', or leave the whole object out."
        )
    return kind


def unsupported_type(kind: Any, where: str, supported: tuple[str, ...]) -> UserError:
    """Makes the error for a rope type that is not among those supported."""
    names = ", ".join(map(repr, supported))
    reason = ""
    if kind == "dynamic":
        reason = (
            " Its frequencies depend on the longest row computed so far, so a row "
            "would train differently in another batch."
        )
    return UserError(
        f"{where}: rope type {kind!r:.80} is not supported. Supported: {names}.{reason}"
    )


def read_rope_scaling(
    scaling: Mapping[str, Any], where: str = "config.json"
) -> RopeScaling | None:
    """Reads a `rope_scaling` object; None for the type "default".

    Args:
      scaling: its fields.
      where: the file or section it is from; starts a message.

    Raises:
      UserError: another type than those of `RopeScaling`, or fields that are missing
        or of another type.
    """
    kind = _rope_type(scaling, where)
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise unsupported_type(kind, where, ("default", *_FIELDS))
    needed, optional = _FIELDS[kind]
    missing = [name for name in needed if scaling.get(name) is None]
    if missing:
        raise UserError(
            f"{where}: rope type {kind!r} needs {', '.join(f'`{m}`' for m in missing)}."
        )
    values: dict[str, Any] = {}
    for name in (*needed, *optional):
        value = scaling.get(name)
        if value is None:
            continue
        if name in _LISTS:
            if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
                raise UserError(
                    f"{where}: `rope_scaling.{name}` must be a list of numbers, got "
                    f"{value!r:.80}."
                )
            value = tuple(float(number) for number in value)
        elif name == "truncate":
            if not isinstance(value, bool):
                raise UserError(
                    f"{where}: `rope_scaling.truncate` must be true or false, got "
                    f"{value!r:.80}."
                )
        elif not is_number(value):
            raise UserError(
                f"{where}: `rope_scaling.{name}` must be a number, got {value!r:.80}."
            )
        values[name] = value
    return RopeScaling(rope_type=kind, **values)  # pyright: ignore[reportArgumentType]
