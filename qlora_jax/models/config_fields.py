"""The fields of a config.json: their types, and what other models compute with them.

Of about thirty fields that files of Llama models have, `LlamaConfig` holds those that
the computation needs. A field that stands for something else is refused, or, where
transformers' Llama passes over it too, named (`unread_fields`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from qlora_jax.errors import UserError

_INTEGERS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "bos_token_id",
    "pad_token_id",
)
_NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor")
# Which of them transformers 5 has in `rope_parameters`.
_MAY_BE_NULL = ("rope_theta", "partial_rotary_factor")
_ROPE_NUMBERS = (
    "partial_rotary_factor",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "is_causal")
_QUANTIZATION_STRINGS = (
    *("quant_method", "bnb_4bit_quant_type"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
)


def check_types(raw: Mapping[str, Any]) -> None:
    """Raises if a field that may be left out has a value of another type."""

    def type_error(name: str, expected: str, value: Any) -> UserError:
        return UserError(
            f"config.json: `{name}` must be {expected}, got {value!r:.80}."
        )

    for name in _INTEGERS:
        value = raw.get(name)
        if value is not None and not is_integer(value):
            raise type_error(name, "an integer", value)
    for name in _NUMBERS:
        if name in raw and not is_number(raw[name]):
            if name in _MAY_BE_NULL and raw[name] is None:
                continue
            raise type_error(name, "a number", raw[name])
    for name in _FLAGS:
        # The string "false" is true to Python.
        if raw.get(name) is not None and not isinstance(raw[name], bool):
            raise type_error(name, "true or false", raw[name])
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        value = raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise type_error(name, "an object", value)
    for name in ("rope_scaling", "rope_parameters"):
        for inner in _ROPE_NUMBERS:
            value = (raw.get(name) or {}).get(inner)
            if value is not None and not is_number(value):
                raise type_error(f"{name}.{inner}", "a number", value)
    for inner in _QUANTIZATION_STRINGS:
        value = (raw.get("quantization_config") or {}).get(inner)
        if value is not None and not isinstance(value, str):
            raise type_error(f"quantization_config.{inner}", "a string", value)
    names = raw.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise type_error("architectures", "a list of names", names)
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(map(is_integer, ids)):
        raise type_error("eos_token_id", "an integer, or a list of them", eos)


def is_integer(value: Any) -> bool:
    """Whether a value of a file is an integer of 32 bits."""
    # A bool is an int to `isinstance`; `true` in a file is not the number 1.
    return type(value) is int and abs(value) < 1 << 31


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a file is a finite number."""
    # False for NaN, and for integers that floats cannot hold.
    return type(value) in (int, float) and abs(value) < 1e30


def check_architecture(raw: Mapping[str, Any]) -> None:
    """Raises `UserError` for another architecture, activation or quantization."""
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or []
    is_headless = kind == "llama" and architectures == ["LlamaModel"]
    if is_headless and not raw.get("tie_word_embeddings"):
        raise UserError(
            "config.json: a `LlamaModel` has no output head, and these embeddings are "
            "not tied to one (`tie_word_embeddings`), so it gives no logits. Start "
            "from the causal language model that it was taken from."
        )
    # The second is what the first conversions of Llama wrote.
    known = {"LlamaForCausalLM", "LLaMAForCausalLM"}
    if not is_headless and (kind != "llama" or not known.issuperset(architectures)):
        raise UserError(
            "Not a Llama causal language model: config.json has "
            f"model_type={kind!r:.100}, architectures={list(architectures)!r:.200}. "
            "Supported: model_type 'llama', "
            "LlamaForCausalLM (Llama 2, 3, 3.1, 3.2, 3.3, TinyLlama)."
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(
            f"config.json: `hidden_act`={raw['hidden_act']!r} is not supported; "
            "Llama models use 'silu'."
        )
    if raw.get("is_causal") is False:
        raise UserError(
            "config.json: `is_causal` is false: every token attends to later ones too, "
            "as in models that embed text. Only causal language models are supported."
        )
    if raw.get("attention_dropout"):
        raise UserError(
            f"config.json: `attention_dropout`={raw['attention_dropout']} is not "
            "supported; set it to 0 (use `lora_dropout` to regularize)."
        )
    quant = raw.get("quantization_config")
    if quant is not None:
        method = quant.get("quant_method")
        # transformers writes both; older files lack the one with the underscore.
        four_bit = quant.get("load_in_4bit", quant.get("_load_in_4bit", False))
        if method not in ("bitsandbytes", None) or not four_bit:
            how = f"with {method!r}" if method else "in a way that it does not name"
            if method == "bitsandbytes":
                how = "with 'bitsandbytes', and not in 4 bits (`load_in_4bit`),"
            raise UserError(
                f"config.json: checkpoints quantized {how} are not supported "
                "(`quantization_config`). Supported: bitsandbytes 4-bit NF4, or an "
                "unquantized checkpoint. Start from the model that this one was "
                "quantized from."
            )
        # fp4 is the default of transformers: a file without the field is not NF4.
        if quant.get("bnb_4bit_quant_type", "fp4") != "nf4":
            raise UserError(
                "config.json: `bnb_4bit_quant_type`="
                f"{quant.get('bnb_4bit_quant_type', 'fp4')!r} is not supported; only "
                "'nf4' is. Start from the unquantized checkpoint instead."
            )


# Fields that change what models of other families compute, and the values under which
# they change nothing.
_OTHER_MODELS: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "no_rope_layers": ([],),
    "use_parallel_residual": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    # How other programs quantized the weights; such weights have other tensors.
    "compression_config": (),
    "quantization": (),
}
# Rope type -> the fields of `rope_scaling` or `rope_parameters` that it reads.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}


def unread_fields(raw: Mapping[str, Any], vocab_size: int) -> list[str]:
    """Lists what a config.json says and a Llama does not compute.

    transformers passes over it too, with or without a warning.

    Args:
      raw: content of the file, as `LlamaConfig.from_hf` accepts it.
      vocab_size: of the model, which may have grown.

    Returns:
      Fields with their values, and why they are not used where that is not clear.
    """
    out = [
        f"`{name}`={raw[name]!r:.80}"
        for name, off in _OTHER_MODELS.items()
        if raw.get(name) is not None and raw[name] not in off
    ]
    window = raw.get("sliding_window")
    longest = raw.get("max_position_embeddings") or 2048
    if is_number(window) and 0 < window < longest:
        out.append(f"`sliding_window`={window}")
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and {"full_attention"} != set(map(str, kinds)):
        out.append(f"`layer_types`={kinds!r:.80}")
    if isinstance(raw.get("auto_map"), Mapping):
        out.append(f"`auto_map`={dict(raw['auto_map'])!r:.80} (custom code is not run)")
    out += _unread_rope(raw)
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    absent = [i for i in ids if i is not None and not 0 <= i < vocab_size]
    if absent:
        out.append(
            f"`eos_token_id`={', '.join(map(str, absent))} (the vocabulary has "
            f"{vocab_size:,} tokens)"
        )
    return out


def _unread_rope(raw: Mapping[str, Any]) -> list[str]:
    """Lists the fields of rotary embeddings that their type does not read."""
    names = [name for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    if not names:
        partial = raw.get("partial_rotary_factor")
        return [] if partial in (None, 1) else [f"`partial_rotary_factor`={partial}"]
    # The first counts, as in transformers.
    source, fields = names[0], raw[names[0]]
    name = "rope_type" if "rope_type" in fields else "type"
    kind = fields.get(name, "default")
    known = {"rope_theta", "rope_type", *_ROPE_FIELDS.get(kind, ())}
    unread = {
        f"{source}.{field}": value
        for field, value in fields.items()
        if value is not None
        and field not in known
        and not (field == "partial_rotary_factor" and value == 1)
        and not (field == "type" and value == kind)
    }
    if kind == "default" and raw.get("partial_rotary_factor") not in (None, 1):
        unread["partial_rotary_factor"] = raw["partial_rotary_factor"]
    theta = raw.get("rope_theta")
    if "rope_theta" in fields and theta not in (None, fields["rope_theta"]):
        unread["rope_theta"] = theta
    if len(names) > 1 and raw[names[1]] != fields:
        unread[names[1]] = dict(raw[names[1]])
    return [
        f"`{field}`={value!r:.80} (`{source}.{name}` is {kind!r:.80})"
        for field, value in unread.items()
    ]
