"""Model configuration: the fields of a Hugging Face `config.json`.

`LlamaConfig` holds the fields that the computation needs, with their names in the file,
of every family in `qlora_jax.models.families`. It raises at construction if the model
does not compute what they ask for, so that nothing else has to check again.

A run may change its base's config.json, for a longer context:

    config = apply_changes(config, {"max_position_embeddings": 8192})

The changes are settings of the run (`[model]`). Its adapter is only correct with them,
so they are saved in the adapter's directory and apply wherever it is loaded or merged.
A `LoraConfig` holds them as JSON, which is hashable and has one spelling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.models.config_fields import (
    ACTIVATIONS,
    SIZES,
    check_architecture,
    check_nulls,
    check_types,
    is_integer,
    read_activation,
)
from qlora_jax.models.families import Family, family_of, text_config
from qlora_jax.models.layer_kinds import (
    FULL,
    SLIDING,
    LayerKind,
    read_layer_types,
    read_no_rope_layers,
)
from qlora_jax.models.rope_scaling import (
    RopeScaling,
    read_rope,
    read_rope_scaling,
    rope_fields,
    unsupported_type,
)
from qlora_jax.tree import FrozenDict


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a checkpoint; hashable, hence a static jit argument.

    The class is named for the block that all families share. `family` has the switches
    that no field of config.json expresses.

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
    """Biases on q_proj, k_proj, v_proj and, in most families, o_proj (`has_bias`)."""
    attention_out_bias: bool = False
    """Bias on o_proj, in families where it has a field of its own."""
    mlp_bias: bool = False
    """Biases on gate_proj, up_proj and down_proj."""
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    hidden_act: str = "silu"
    """Activation of the MLP; `hidden_activation` in some families' files."""
    sliding_window: int | None = None
    """Keys that a query of a windowed layer sees, itself included."""
    layer_types: tuple[str, ...] = ()
    """"full_attention" or "sliding_attention" of each layer; () = all full."""
    no_rope_layers: tuple[int, ...] = ()
    """1 for each layer that rotates queries and keys, 0 for others; () = all do."""
    rope_local_base_freq: float | None = None
    """Theta of the windowed layers, where it is another."""
    partial_rotary_factor: float = 1.0
    """Share of a head's dimensions that is rotated."""
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    """Factor of the scores; None = `query_pre_attn_scalar`, or else `head_dim`, to the
    power of -1/2."""
    query_pre_attn_scalar: float | None = None
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logits_scaling: float = 1.0
    """Divisor of the logits."""
    attn_logit_softcapping: float | None = None
    """c in c tanh(score / c); None = no cap."""
    final_logit_softcapping: float | None = None
    """c in c tanh(logit / c); None = no cap."""
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
        width = self.query_pre_attn_scalar
        for name, valid, limit in (
            # Under a root or a power, which is NaN elsewhere.
            ("rms_norm_eps", self.rms_norm_eps >= 0, ">= 0"),
            ("rope_theta", self.rope_theta > 0, "> 0"),
            ("query_pre_attn_scalar", width is None or width > 0, "> 0"),
            # Divisors.
            ("logits_scaling", self.logits_scaling != 0, "another number than 0"),
            ("attn_logit_softcapping", self.attn_logit_softcapping != 0, "> 0"),
            ("final_logit_softcapping", self.final_logit_softcapping != 0, "> 0"),
        ):
            if not valid:
                raise UserError(
                    f"config: `{name}` must be {limit}, got {getattr(self, name)}."
                )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"config: `hidden_act`={self.hidden_act!r:.80} is not supported; "
                f"{', '.join(map(repr, ACTIVATIONS))} are."
            )
        for name in ("layer_types", "no_rope_layers"):
            values = getattr(self, name)
            if values and len(values) != self.num_hidden_layers:
                raise UserError(
                    f"config: `{name}` has {len(values)} entries for "
                    f"{self.num_hidden_layers} layers."
                )
        if self.partial_rotary_factor > 1:
            raise UserError(
                "config: `partial_rotary_factor` is a share of `head_dim`, at most 1, "
                f"got {self.partial_rotary_factor}."
            )
        if self.head_dim % 2 or self.rotary_dim % 2 or self.rotary_dim < 2:
            raise UserError(
                "config: `head_dim`, and the part of it that `partial_rotary_factor` "
                f"leaves, must be even for rotary embeddings, got {self.head_dim} and "
                f"{self.rotary_dim}."
            )
        factors = self.rope_scaling.short_factor if self.rope_scaling else ()
        if factors and len(factors) != self.rotary_dim // 2:
            raise UserError(
                "config: `rope_scaling.short_factor` and `long_factor` must have "
                f"{self.rotary_dim // 2} numbers, one for each pair of rotated "
                f"dimensions, got {len(factors)}."
            )

    @property
    def family(self) -> Family:
        """What the model type switches in the block."""
        return family_of(self.model_type)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        if self.attention_multiplier is not None:
            return float(self.attention_multiplier)
        width = self.query_pre_attn_scalar
        return float(self.head_dim if width is None else width) ** -0.5

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Window and rotary table of every layer."""
        kinds = []
        for i in range(self.num_hidden_layers):
            slides = bool(self.layer_types) and self.layer_types[i] == SLIDING
            rope = "global"
            if self.no_rope_layers and not self.no_rope_layers[i]:
                rope = "none"
            elif slides and self.rope_local_base_freq is not None:
                rope = "local"
            kinds.append(LayerKind(self.sliding_window if slides else None, rope))
        return tuple(kinds)

    def has_bias(self, projection: str) -> bool:
        """Returns whether a projection of a layer has a bias ("q_proj")."""
        rule = self.family.biases.get(projection, False)
        return getattr(self, rule) if isinstance(rule, str) else rule

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
        raw = text_config(raw)
        check_types(raw)
        family = check_architecture(raw)
        check_nulls(raw, family)
        # A text model may leave its sizes to the class.
        sizes = {name: family.default(name) for name in SIZES}
        raw = {**{k: v for k, v in sizes.items() if v is not None}, **raw}
        missing = [name for name in SIZES if raw.get(name) is None]
        if missing:
            raise UserError(
                f"config.json lacks {', '.join(f'`{m}`' for m in missing)}. The "
                f"config.json of a {raw['model_type']!r} model has all of them; is the "
                "file complete?"
            )
        for name in SIZES:
            if not is_integer(raw[name]):
                raise UserError(
                    f"config.json: `{name}` must be an integer, got {raw[name]!r:.80}."
                )
        heads, width = raw["num_attention_heads"], raw["hidden_size"]

        def given(name: str) -> Any:
            # An absent key has the default of transformers' configuration class.
            return raw.get(name, family.default(name))

        head_dim = given("head_dim")
        if head_dim is None and width % max(heads, 1):
            raise UserError(
                f"config.json has no `head_dim` and `hidden_size`={width} is not a "
                f"multiple of `num_attention_heads`={heads}."
            )
        theta, scaling, local_theta, partial = read_rope(raw, family)
        eos = raw.get("eos_token_id")
        no_rope_layers = read_no_rope_layers(raw, family)
        window, layer_types = read_layer_types(raw, family, no_rope_layers)
        key_value_heads = given("num_key_value_heads")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=width,
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            # Files of models without grouped heads leave it out, or have null.
            num_key_value_heads=heads if key_value_heads is None else key_value_heads,
            head_dim=width // max(heads, 1) if head_dim is None else head_dim,
            # 0 is a value, and is refused like every other that no model can have.
            max_position_embeddings=given("max_position_embeddings"),
            rms_norm_eps=float(given("rms_norm_eps")),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(given("tie_word_embeddings")),
            attention_bias=bool(given("attention_bias")),
            attention_out_bias=bool(given("attention_out_bias")),
            mlp_bias=bool(given("mlp_bias")),
            initializer_range=float(given("initializer_range")),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=raw.get("pad_token_id"),
            model_type=raw["model_type"],
            hidden_act=read_activation(raw, family),
            sliding_window=window,
            layer_types=layer_types,
            no_rope_layers=no_rope_layers,
            rope_local_base_freq=local_theta,
            partial_rotary_factor=partial,
            extra_tensors=_read_extra_tensors(raw.get("extra_tensors") or {}),
            raw=dict(raw),
            **{
                name: float(value)
                for name in _FACTORS
                if name in family.fields and (value := given(name)) is not None
            },
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a `config.json`: `raw`, with what this configuration has otherwise.

        Fields stay as `raw` has them where they say the same. The rope fields are
        written in one form, that of `raw`: `rope_parameters` (transformers 5), or else
        `rope_theta` and `rope_scaling` (transformers 4), which every reader knows.
        """
        out = dict(self.raw)
        out["architectures"] = [self.family.architectures[0]]
        original = LlamaConfig.from_hf(self.raw) if self.raw else None
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "raw" or f.name in _ROPE or not self._has_field(f.name):
                continue
            if original is not None and getattr(original, f.name) == value:
                continue
            self._write_field(out, f.name, value)
        if SLIDING in self.layer_types and self.family.window_is_optional:
            out["use_sliding_window"] = True
        self._write_rope(out, original)
        return out

    def _has_field(self, name: str) -> bool:
        """Whether config.json files of this family have a field."""
        if name in ("attention_bias", "attention_out_bias", "mlp_bias"):
            return name in self.family.biases.values()
        return name not in _OPTIONAL or name in self.family.fields

    def _write_field(self, out: dict[str, Any], name: str, value: Any) -> None:
        """Writes one field into a config.json."""
        if name == "layer_types":
            value = value or (FULL,) * self.num_hidden_layers
        elif name == "no_rope_layers":
            value = value or (1,) * self.num_hidden_layers
        elif name == "extra_tensors":
            value = {key: list(shape) for key, shape in value.items()} or None
        key = self.family.activation_key if name == "hidden_act" else name
        # Null is written where an absent key would mean something else.
        if value is None and key not in out and self.family.default(name) is None:
            return
        out[key] = list(value) if isinstance(value, tuple) else value

    def _write_rope(self, out: dict[str, Any], original: LlamaConfig | None) -> None:
        """Writes the rope fields into a config.json, in the form that it has."""
        is_new = bool(out.get("rope_parameters"))
        stray = is_new and (out.keys() & {"rope_theta", "rope_scaling"})
        unchanged = original is not None and all(
            getattr(original, name) == getattr(self, name) for name in _ROPE
        )
        if unchanged and is_new and not stray:
            return
        family, partial = self.family, self.partial_rotary_factor
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_hf()
        if unchanged and scaling is not None:
            # What a file says of a default stays said.
            given = self.raw.get("rope_scaling") or {}
            known = rope_fields(scaling["rope_type"])
            scaling |= {
                k: v for k, v in given.items() if k in known and k not in scaling
            }
        # Readers take these before, or for want of, what is written below.
        native = out.pop("original_max_position_embeddings", None)
        if family.default("original_max_position_embeddings") is not None:
            if self.rope_scaling is not None:
                native = self.rope_scaling.original_max_position_embeddings
            if native is not None:
                out["original_max_position_embeddings"] = native
        out.pop("partial_rotary_factor", None)
        if "partial_rotary_factor" in family.fields and partial != 1:
            out["partial_rotary_factor"] = partial
        local = self.rope_local_base_freq
        if is_new:
            for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
                out.pop(name, None)
            parameters = {"rope_type": "default"} if scaling is None else scaling
            parameters = {**parameters, "rope_theta": self.rope_theta}
            if "partial_rotary_factor" in family.fields:
                parameters["partial_rotary_factor"] = partial
            if family.ropes_by_layer_type:
                sliding = {"rope_type": "default", "rope_theta": local}
                parameters = {
                    "full_attention": parameters,
                    "sliding_attention": sliding,
                }
            out["rope_parameters"] = parameters
        else:
            out.pop("rope_parameters", None)
            out["rope_theta"] = self.rope_theta
            out["rope_scaling"] = scaling
            if family.ropes_by_layer_type:
                out["rope_local_base_freq"] = local


# Fields that one function writes, for what one says depends on the others.
_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
# Fields that only some families have.
_FACTORS = (
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    *("logits_scaling", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_OPTIONAL = (*_FACTORS, "sliding_window", "layer_types", "no_rope_layers")


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


CHANGEABLE_FIELDS = ("max_position_embeddings", "rope_scaling")
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
    values = read_changes({} if changes is None else changes, where)
    scaling = values.get("rope_scaling")
    if scaling is not None and scaling.rope_type not in config.family.rope_types:
        # What is written would not be read again, here or by transformers.
        raise unsupported_type(scaling.rope_type, where, config.family.rope_types)
    return dataclasses.replace(config, **values)


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
        kind = scaling.get("rope_type", scaling.get("type"))
        known = rope_fields(kind)
        # The fields of an unknown type are not what is wrong with it.
        if known or kind in (None, "default"):
            known = ("rope_type", "type", *known)
            _check_names(scaling, known, f"{where}: rope_scaling")
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
