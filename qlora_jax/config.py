"""Model and adapter configuration, in the words of Hugging Face and PEFT.

`LlamaConfig` holds what the computation needs from a `config.json`; `LoraConfig` what
it needs from an `adapter_config.json`. Both refuse at construction what the model
cannot honour, so that nothing downstream has to check again. Field names are the
files' own. The Hugging Face file exists in two generations (transformers 4 writes
`rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`); both are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from qlora_jax.errors import UserError

IGNORE = -100
"""The label of a token that is not supervised, as in Hugging Face."""

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; the fields of `rope_scaling`."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    """Ratio of the stretched to the native context length."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """Context length before stretching (tokens); llama3 only."""

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

    `raw` keeps the `config.json` it came from, so that a checkpoint can be written
    back with every field its author put there. It takes no part in equality.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    """Context length the checkpoint is meant for (tokens)."""
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
        if self.head_dim % 2:
            raise UserError(
                f"config: `head_dim` must be even for rotary embeddings, "
                f"got {self.head_dim}."
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All token ids that end a generation (possibly none)."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return self.eos_token_id

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """The `quantization_config` of the file this came from, if any."""
        return self.raw.get("quantization_config")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Reads the content of a Hugging Face `config.json`.

        Raises:
          UserError: another architecture, a missing field, or a feature (rope type,
            activation, quantization method) that this model does not compute.
        """
        _refuse_other_architectures(raw)
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
                f"config.json lacks {', '.join(f'`{m}`' for m in missing)}. A Llama "
                "config.json states all of them; is the file complete?"
            )
        heads = raw["num_attention_heads"]
        for name in needed:
            if isinstance(raw[name], bool) or not isinstance(raw[name], int):
                raise UserError(
                    f"config.json: `{name}` must be an integer, got {raw[name]!r}."
                )
        if raw.get("head_dim") is None and raw["hidden_size"] % max(heads, 1):
            raise UserError(
                f"config.json has no `head_dim` and `hidden_size`={raw['hidden_size']} "
                f"is no multiple of `num_attention_heads`={heads}."
            )
        theta, scaling = _read_rope(raw)
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // max(heads, 1),
            max_position_embeddings=raw.get("max_position_embeddings") or 2048,
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
            raw=dict(raw),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a `config.json`: `raw` with this configuration's values laid over.

        The rope fields are written in the form (transformers 4 or 5) that `raw` has,
        and in the transformers-4 form, which every reader knows, where there is none.
        """
        out = dict(self.raw)
        out.setdefault("architectures", ["LlamaForCausalLM"])
        out["model_type"] = "llama"
        out["hidden_act"] = "silu"
        for f in dataclasses.fields(self):
            if f.name in ("raw", "rope_theta", "rope_scaling"):
                continue
            value = getattr(self, f.name)
            if value is None and f.name not in out:
                continue
            out[f.name] = list(value) if isinstance(value, tuple) else value
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_hf()
        if "rope_parameters" in out:
            parameters = {"rope_type": "default"} if scaling is None else scaling
            out["rope_parameters"] = {**parameters, "rope_theta": self.rope_theta}
        else:
            out["rope_theta"] = self.rope_theta
            out["rope_scaling"] = scaling
        return out


def _refuse_other_architectures(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or []
    if kind != "llama" or any(a != "LlamaForCausalLM" for a in architectures):
        found = f"model_type={kind!r}, architectures={list(architectures)!r}"
        raise UserError(
            f"This is no Llama causal language model: config.json says {found}. "
            "Supported: model_type 'llama' with LlamaForCausalLM (Llama 2, 3, 3.1, "
            "3.2, 3.3, TinyLlama)."
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(
            f"config.json: `hidden_act`={raw['hidden_act']!r} is not supported; "
            "Llama models use 'silu'."
        )
    if raw.get("attention_dropout"):
        raise UserError(
            f"config.json: `attention_dropout`={raw['attention_dropout']} is not "
            "supported; set it to 0 (use `lora_dropout` to regularize)."
        )
    quant = raw.get("quantization_config")
    if quant is not None:
        method = quant.get("quant_method", "bitsandbytes")
        four_bit = quant.get("load_in_4bit", quant.get("_load_in_4bit", False))
        if method != "bitsandbytes" or not four_bit:
            raise UserError(
                f"config.json: checkpoints quantized with {method!r} "
                f"(load_in_4bit={bool(four_bit)}) are not supported. Supported: "
                "bitsandbytes 4-bit NF4, or an unquantized checkpoint."
            )
        if quant.get("bnb_4bit_quant_type", "fp4") != "nf4":
            raise UserError(
                "config.json: `bnb_4bit_quant_type`="
                f"{quant.get('bnb_4bit_quant_type', 'fp4')!r} is not supported; only "
                "'nf4' is. Start from the unquantized checkpoint instead."
            )


def _read_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    parameters = raw.get("rope_parameters")
    if parameters is not None:
        theta = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
        scaling = parameters
    else:
        theta = raw.get("rope_theta", 10000.0)
        scaling = raw.get("rope_scaling") or {}
    theta = float(10000.0 if theta is None else theta)
    kind = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"config.json: rope type {kind!r} is not supported. Supported: 'default', "
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
            f"config.json: rope type {kind!r} needs "
            f"{', '.join(f'`{m}`' for m in missing)}."
        )
    return theta, RopeScaling(rope_type=kind, **{n: scaling[n] for n in needed})


# Fields of PEFT's adapter_config.json that change what an adapter computes and that
# this project does not compute. The value listed is the one that switches each off.
_PEFT_OFF: Mapping[str, Any] = MappingProxyType(
    {
        "bias": "none",
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "use_dora": False,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "trainable_token_indices": None,
        "layer_replication": None,
        "target_parameters": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "velora_config": None,
        "monteclora_config": None,
        "corda_config": None,
        "eva_config": None,
        "lora_ga_config": None,
        "megatron_config": None,
        "ensure_weight_tying": False,
    }
)


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how; field names and meanings are PEFT's `LoraConfig`.

    The update of a linear layer is `scaling * B @ A` (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685) with `scaling = lora_alpha / r`, or
    `lora_alpha / sqrt(r)` under `use_rslora` (https://arxiv.org/abs/2312.03732).
    """

    r: int = 16
    """Rank of every update."""
    lora_alpha: int | float = 16
    """Numerator of the scaling."""
    target_modules: tuple[str, ...] | str = PROJECTIONS
    """Module names (matched as path suffixes), "all-linear", or a regular expression
    that has to match whole module paths."""
    lora_dropout: float = 0.0
    """Probability of dropping an input element of the adapter while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """How A starts (B starts at zero): Kaiming-uniform as PEFT, or N(0, 1/r^2)."""
    base_model_name_or_path: str | None = None
    """Where the base is found; written into adapter_config.json."""
    revision: str | None = None
    """Revision of the base, where its name is one of a hub."""

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise UserError(f"lora: `r` must be a positive integer, got {self.r!r}.")
        if not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise UserError(f"lora: `lora_alpha` must be > 0, got {self.lora_alpha!r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(
                f"lora: `lora_dropout` must lie in [0, 1), got {self.lora_dropout!r}."
            )
        targets = self.target_modules
        if not isinstance(targets, str):
            targets = tuple(targets)
            # A command line gives a list of one; no module name looks like these two.
            alone = targets[0] if len(targets) == 1 else ""
            if alone == "all-linear" or set(alone) & set("*+?[](){}|\\^$"):
                targets = alone
            object.__setattr__(self, "target_modules", targets)
        if len(self.target_modules) == 0:
            raise UserError(
                "lora: `target_modules` is empty. Name modules such as 'q_proj', or "
                "give 'all-linear'."
            )
        if self.init_lora_weights not in ("default", "gaussian"):
            raise UserError(
                f"lora: `init_lora_weights`={self.init_lora_weights!r} is not "
                "supported. Supported: 'default', 'gaussian'."
            )

    @property
    def scaling(self) -> float:
        """The factor of `B @ A`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any]) -> LoraConfig:
        """Reads the content of PEFT's `adapter_config.json`.

        PEFT's own defaults apply to absent fields (r=8, lora_alpha=8, q_proj and
        v_proj as targets of a Llama).

        Raises:
          UserError: another method than LoRA, or a LoRA feature that is not computed
            here, named with its value.
        """
        if raw.get("peft_type") != "LORA":
            raise UserError(
                f"adapter_config.json: `peft_type` is {raw.get('peft_type')!r}; only "
                "'LORA' adapters are supported."
            )
        refused = [
            f"`{name}`={raw[name]!r}"
            for name, off in _PEFT_OFF.items()
            if name in raw and raw[name] not in (off, None, False, [], {})
        ]
        init = raw.get("init_lora_weights", True)
        if init not in (True, False, "gaussian"):
            # Those initializations change the base weights; the adapter alone, on the
            # original base, would compute something else.
            refused.append(f"`init_lora_weights`={init!r}")
        if raw.get("runtime_config"):
            refused.append("`runtime_config`")
        if refused:
            raise UserError(
                "adapter_config.json uses LoRA features that are not supported: "
                f"{', '.join(refused)}."
            )
        targets = raw.get("target_modules")
        if targets is None:
            targets = ("q_proj", "v_proj")
        return cls(
            r=raw.get("r", 8),
            lora_alpha=raw.get("lora_alpha", 8),
            target_modules=(
                targets if isinstance(targets, str) else tuple(sorted(targets))
            ),
            lora_dropout=float(raw.get("lora_dropout", 0.0) or 0.0),
            use_rslora=bool(raw.get("use_rslora", False)),
            init_lora_weights="gaussian" if init == "gaussian" else "default",
            base_model_name_or_path=raw.get("base_model_name_or_path"),
            revision=raw.get("revision"),
        )

    def to_peft(self) -> dict[str, Any]:
        """Returns the content of an `adapter_config.json` that PEFT reads."""
        out: dict[str, Any] = dict(_PEFT_OFF)
        out.update(
            peft_type="LORA",
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            init_lora_weights=(
                "gaussian" if self.init_lora_weights == "gaussian" else True
            ),
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.revision,
            target_modules=(
                self.target_modules
                if isinstance(self.target_modules, str)
                else sorted(self.target_modules)
            ),
        )
        return out
