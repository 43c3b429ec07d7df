"""Model configuration: the fields of a Hugging Face `config.json`.

`LlamaConfig` holds the fields that the computation needs, with their names in the file.
It raises at construction if the model does not compute what they ask for, so that
nothing else has to check again. The file exists in two generations: transformers 4
writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. Both are
read, with the precedence of transformers 5 in a file that has both.

A run may change its base's config.json, for a longer context:

    config = apply_changes(config, {"max_position_embeddings": 8192})

The changes are settings of the run (`[model]`). Its adapter is only correct with them,
so they are saved in the adapter's directory and apply wherever it is loaded or merged.
A `LoraConfig` holds them as JSON, which is hashable and has one spelling.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_jax.errors import UserError
from qlora_jax.models.config_fields import (
    check_architecture,
    check_types,
    is_integer,
    is_number,
)
from qlora_jax.tree import FrozenDict


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled; the fields of `rope_scaling`."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    """Ratio of the extended to the native context length."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """Native context length (tokens); llama3 only."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise UserError(f"`rope_scaling.factor` must be > 0, got {self.factor}.")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                "`rope_scaling.low_freq_factor` must be smaller than "
                f"`high_freq_factor`, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}."
            )

    def to_hf(self) -> dict[str, Any]:
        """Returns the `rope_scaling` object of a transformers-4 config."""
        out: dict[str, Any] = {"rope_type": self.rope_type, "factor": self.factor}
        if self.rope_type == "llama3":
            out["low_freq_factor"] = self.low_freq_factor
            out["high_freq_factor"] = self.high_freq_factor
            out["original_max_position_embeddings"] = (
                self.original_max_position_embeddings
            )
        return out


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a Llama checkpoint; hashable, hence a static jit argument.

    `raw` keeps the `config.json` that was read, so that a checkpoint is written back
    with all of its fields. It does not take part in comparisons.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    """Context length of the checkpoint (tokens)."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q_proj, k_proj, v_proj and o_proj."""
    mlp_bias: bool = False
    """Biases on gate_proj, up_proj and down_proj."""
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra_tensors: Mapping[str, tuple[int, ...]] = FrozenDict()
    """Tensors of custom modules: dotted path, without the number of a layer
    (`model.layers.self_attn.gate.weight`) -> shape."""
    raw: Mapping[str, Any] = field(
        default_factory=dict, compare=False, hash=False, repr=False
    )

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"config: `{name}` must be a positive integer, got {value!r}."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config: `num_attention_heads`={self.num_attention_heads} must be a "
                f"multiple of `num_key_value_heads`={self.num_key_value_heads}."
            )
        object.__setattr__(
            self, "extra_tensors", _read_extra_tensors(self.extra_tensors)
        )
        for name, valid, limit in (
            ("rms_norm_eps", self.rms_norm_eps >= 0, ">= 0"),
            ("rope_theta", self.rope_theta > 0, "> 0"),
        ):
            # Both are under a root or a power, which is NaN elsewhere.
            if not valid:
                raise UserError(
                    f"config: `{name}` must be {limit}, got {getattr(self, name)}."
                )
        if self.head_dim % 2:
            raise UserError(
                f"config: `head_dim` must be even for rotary embeddings, "
                f"got {self.head_dim}."
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a generation; possibly none.

        Ids outside the vocabulary, such as -1, end none: `unread_fields` names them.
        """
        if self.eos_token_id is None:
            return ()
        eos = self.eos_token_id
        ids = (eos,) if isinstance(eos, int) else eos
        return tuple(token for token in ids if 0 <= token < self.vocab_size)

    @property
    def padding_id(self) -> int:
        """A token id of the vocabulary to fill rows with.

        Files have -1 for none, or the id of a token for which no row was added.
        """
        token = self.pad_token_id
        return token if token is not None and 0 <= token < self.vocab_size else 0

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """The `quantization_config` of the file, if it has one."""
        return self.raw.get("quantization_config")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Reads the content of a Hugging Face `config.json`.

        Raises:
          UserError: another architecture, a missing field, or a feature (rope type,
            activation, quantization method) that this model does not compute.
        """
        check_types(raw)
        check_architecture(raw)
        needed = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [name for name in needed if raw.get(name) is None]
        if missing:
            raise UserError(
                f"config.json lacks {', '.join(f'`{m}`' for m in missing)}. The "
                "config.json of a Llama has all of them; is the file complete?"
            )
        heads = raw["num_attention_heads"]
        for name in needed:
            if not is_integer(raw[name]):
                raise UserError(
                    f"config.json: `{name}` must be an integer, got {raw[name]!r:.80}."
                )
        if raw.get("head_dim") is None and raw["hidden_size"] % max(heads, 1):
            raise UserError(
                f"config.json has no `head_dim` and `hidden_size`={raw['hidden_size']} "
                f"is not a multiple of `num_attention_heads`={heads}."
            )
        theta, scaling = _read_rope(raw)
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            # Files of models without grouped heads leave it out, or have null.
            num_key_value_heads=_given(raw, "num_key_value_heads", heads),
            head_dim=_given(raw, "head_dim", raw["hidden_size"] // max(heads, 1)),
            max_position_embeddings=_given(raw, "max_position_embeddings", 2048),
            # An absent key has the default of transformers' LlamaConfig.
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            initializer_range=float(raw.get("initializer_range", 0.02)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=raw.get("pad_token_id"),
            extra_tensors=_read_extra_tensors(raw.get("extra_tensors") or {}),
            raw=dict(raw),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a `config.json`: `raw` updated with this configuration's values.

        The rope fields are written once, in the form that `raw` has: `rope_parameters`
        (transformers 5), or else `rope_theta` and `rope_scaling` (transformers 4),
        which every reader knows.
        """
        out = dict(self.raw)
        out["architectures"] = ["LlamaForCausalLM"]
        out["model_type"] = "llama"
        out["hidden_act"] = "silu"
        for f in dataclasses.fields(self):
            if f.name in ("raw", "rope_theta", "rope_scaling"):
                continue
            value = getattr(self, f.name)
            if f.name == "extra_tensors":
                value = {name: list(shape) for name, shape in value.items()} or None
            if value is None and f.name not in out:
                continue
            out[f.name] = list(value) if isinstance(value, tuple) else value
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_hf()
        # Readers take these before, or for want of, what is written below.
        out.pop("original_max_position_embeddings", None)
        out.pop("partial_rotary_factor", None)
        if out.get("rope_parameters"):
            out.pop("rope_theta", None)
            out.pop("rope_scaling", None)
            parameters = {"rope_type": "default"} if scaling is None else scaling
            out["rope_parameters"] = {**parameters, "rope_theta": self.rope_theta}
        else:
            out.pop("rope_parameters", None)
            out["rope_theta"] = self.rope_theta
            out["rope_scaling"] = scaling
        return out


def _given(raw: Mapping[str, Any], name: str, default: int) -> int:
    # 0 is a value, and is refused like every other that no model can have.
    value = raw.get(name)
    return default if value is None else value


def _read_extra_tensors(table: Any) -> FrozenDict[tuple[int, ...]]:
    valid = isinstance(table, Mapping) and all(
        isinstance(shape, (list, tuple))
        and all(type(n) is int and n > 0 for n in shape)
        and name.replace(".", "").replace("_", "").isalnum()
        for name, shape in table.items()
    )
    if not valid:
        raise UserError(
            "config: `extra_tensors` must map dotted names to shapes (lists of "
            f"positive integers), got {table!r:.80}."
        )
    return FrozenDict({name: tuple(shape) for name, shape in table.items()})


def _read_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads theta and scaling by the precedence of transformers 5.

    `rope_scaling` counts before `rope_parameters`, and a theta in either before the one
    next to them. What transformers fails on, or passes over, is refused by name.
    """
    source = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    fields = dict(raw.get(source) or {})
    nested = [name for name, value in fields.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"config.json: `{source}` has fields for single kinds of layers "
            f"({', '.join(map(repr, nested))!s:.80}), and the layers of a Llama are of "
            f"one kind. Write `rope_type` and `rope_theta` directly into `{source}`."
        )
    theta_name = f"{source}.rope_theta" if "rope_theta" in fields else "rope_theta"
    theta = fields.get("rope_theta", raw.get("rope_theta", 10000.0))
    if theta is None:
        raise UserError(
            f"config.json: `{theta_name}` is null, so the base of the rotary "
            "frequencies is unknown. Write the value of the original checkpoint there "
            "(Llama 2: 10000, Llama 3: 500000)."
        )
    kind = _rope_type(fields, "config.json")
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    # transformers' Llama passes over it under "default".
    if kind != "default" and partial is not None and partial != 1:
        raise UserError(
            f"config.json: `partial_rotary_factor`={partial!r:.80} is not supported; a "
            "Llama rotates whole heads."
        )
    if kind == "llama3":
        native = "original_max_position_embeddings"
        length = raw.get("max_position_embeddings", 2048)
        # An own field of the file counts before that of the object.
        fields[native] = raw.get(native, fields.get(native, length))
    return float(theta), read_rope_scaling(fields)


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


def read_rope_scaling(
    scaling: Mapping[str, Any], where: str = "config.json"
) -> RopeScaling | None:
    """Reads a `rope_scaling` object; None for the type "default".

    Args:
      scaling: its fields.
      where: the file or section it is from; starts a message.

    Raises:
      UserError: another type than "linear" and "llama3", or fields that are missing or
        not numbers.
    """
    kind = _rope_type(scaling, where)
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{where}: rope type {kind!r:.80} is not supported. Supported: 'default', "
            "'linear', 'llama3'."
        )
    needed = ["factor"]
    if kind == "llama3":
        needed += [
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ]
    missing = [n for n in needed if scaling.get(n) is None]
    if missing:
        raise UserError(
            f"{where}: rope type {kind!r} needs {', '.join(f'`{m}`' for m in missing)}."
        )
    for name in needed:
        if not is_number(scaling[name]):
            raise UserError(
                f"{where}: `rope_scaling.{name}` must be a number, got "
                f"{scaling[name]!r:.80}."
            )
    return RopeScaling(rope_type=kind, **{n: scaling[n] for n in needed})


CHANGEABLE_FIELDS = ("max_position_embeddings", "rope_scaling")
_SCALING = (
    *("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)
# Fields that the shapes of the weights tell, or that change no result.
_NOT_COMPUTED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "extra_tensors", "raw"),
    *("max_position_embeddings", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("attention_bias", "attention_out_bias", "mlp_bias"),
)


def computed_fields(config: LlamaConfig) -> dict[str, Any]:
    """Returns what a configuration says of the computation beyond the weights.

    Two bases with the same weights are the same model only if they agree in it.

    Args:
      config: architecture.

    Returns:
      Fields and their values as JSON has them.
    """
    values = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in _NOT_COMPUTED
    }
    scaling = config.rope_scaling
    values["rope_scaling"] = None if scaling is None else scaling.to_hf()
    return json.loads(json.dumps(values))


CHANGES_FILE = "base_config.json"
"""In an adapter's directory. (Some tools take a directory with a config.json for a
model.)"""


def apply_changes(
    config: LlamaConfig, changes: Mapping[str, Any] | str | None, where: str = "config"
) -> LlamaConfig:
    """Returns a configuration with the changed fields.

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
        config, **read_changes({} if changes is None else changes, where)
    )


def read_changes(changes: Any, where: str) -> dict[str, Any]:
    """Reads changes into the values that a `LlamaConfig` has.

    Raises:
      UserError: as `change`.
    """
    if not isinstance(changes, Mapping):
        raise UserError(f"{where}: must be an object, got {changes!r:.80}.")
    _check_names(changes, CHANGEABLE_FIELDS, where)
    values: dict[str, Any] = {}
    length, scaling = (changes.get(name) for name in CHANGEABLE_FIELDS)
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


def changes_to_json(changes: Mapping[str, Any]) -> str | None:
    """Returns changes as a `LoraConfig` holds them; None if there are none."""
    present = {
        name: changes[name]
        for name in CHANGEABLE_FIELDS
        if changes.get(name) is not None
    }
    return json.dumps(present, sort_keys=True) if present else None


def undo_changes(config: LlamaConfig) -> LlamaConfig:
    """Undoes the changes; returns the configuration of the base's config.json."""
    if not config.raw:
        return config
    base = LlamaConfig.from_hf(config.raw)
    return dataclasses.replace(
        config, **{name: getattr(base, name) for name in CHANGEABLE_FIELDS}
    )
