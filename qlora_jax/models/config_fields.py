"""Checks of a config.json: types of fields, architecture, quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from qlora_jax.errors import UserError
from qlora_jax.models.families import Family, family_of

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
"""Activations of the MLP that are computed (`swish` is `silu`)."""

_INTEGERS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "bos_token_id",
    "pad_token_id",
    "sliding_window",
)
_NUMBERS = (
    *("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    *("logits_scaling", "query_pre_attn_scalar", "rope_local_base_freq"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
# Those that transformers 5 has in `rope_parameters`, those for which null means that
# there is none, and those that `check_nulls` refuses where a family reads them.
_MAY_BE_NULL = (
    *("rope_theta", "partial_rotary_factor"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    *("logits_scaling", "query_pre_attn_scalar", "rope_local_base_freq"),
)
_ROPE_NUMBERS = (
    "partial_rotary_factor",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"),
    *("is_causal", "use_sliding_window", "use_bidirectional_attention"),
)
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


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
"""Fields that every model has."""
# Fields that a family has if its configuration class has a value for them.
_OF_SOME_FAMILIES = (
    *("max_window_layers", "no_rope_layer_interval"),
    *("original_max_position_embeddings", "query_pre_attn_scalar"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    *("logits_scaling", "rope_local_base_freq"),
)


def _fields_with_a_value(family: Family) -> list[str]:
    """Lists the fields of config.json that cannot be null in a family.

    They are those for which transformers 5 takes no null. An absent key has the default
    of the class, and null has no meaning.
    """
    names = [*SIZES, "max_position_embeddings", "tie_word_embeddings"]
    names += [name for name in family.biases.values() if isinstance(name, str)]
    names += [n for n in _OF_SOME_FAMILIES if family.default(n) is not None]
    names += ["use_sliding_window"] * family.window_is_optional
    return list(dict.fromkeys([*names, *sorted(family.not_null)]))


def check_nulls(raw: Mapping[str, Any], family: Family) -> None:
    """Raises if a field is null that must have a value."""
    nulls = [n for n in _fields_with_a_value(family) if n in raw and raw[n] is None]
    if nulls:
        names = ", ".join(f"`{name}`" for name in nulls)
        optional = [name for name in nulls if name not in SIZES]
        advice = "Write the value that the model was trained with"
        if len(optional) == len(nulls):
            advice += (
                ", or remove the field if it is the one of transformers' "
                "configuration class"
            )
        raise UserError(
            f"config.json: {names} {'is' if len(nulls) == 1 else 'are'} null, and a "
            f"{raw['model_type']!r} model must have a value there: transformers 5 "
            f"refuses null too. {advice}."
        )


def is_integer(value: Any) -> bool:
    """Whether a value of a file is an integer of 32 bits."""
    # A bool is an int to `isinstance`; `true` in a file is not the number 1.
    return type(value) is int and abs(value) < 1 << 31


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a file is a finite number."""
    # False for NaN, and for integers that floats cannot hold.
    return type(value) in (int, float) and abs(value) < 1e30


# Fields of models whose block is another -> values under which they mean nothing, and
# what they mean otherwise.
_EXPERTS = ((0, 1), "a mixture of experts")
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), _EXPERTS),
    "attention_chunk_size": ((), "attention within chunks"),
    "attention_sinks": ((False,), "attention sinks"),
    "use_attention_sinks": ((False,), "attention sinks"),
    "alibi": ((False,), "positions by ALiBi"),
    "use_alibi": ((False,), "positions by ALiBi"),
    "position_embedding_type": (("rope", "rotary"), "other positions than rotary ones"),
    "full_attention_interval": ((1,), "linear attention in some layers"),
    "kv_lora_rank": ((), "latent attention"),
}


def check_architecture(raw: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
      UserError: another architecture, or a way of quantization or attention that is
        not computed.
    """
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or []
    family = family_of(kind)
    causal = family.architectures[0]
    headless = causal.replace("ForCausalLM", "Model").replace("Gemma3M", "Gemma3TextM")
    is_headless = architectures == [headless]
    tied = raw.get("tie_word_embeddings", family.default("tie_word_embeddings"))
    if is_headless and not tied:
        raise UserError(
            f"config.json: a `{headless}` has no output head, and these embeddings are "
            "not tied to one (`tie_word_embeddings`), so it gives no logits. Start "
            "from the causal language model that it was taken from."
        )
    if not is_headless and not set(family.architectures).issuperset(architectures):
        raise UserError(
            "Not a causal language model: config.json has "
            f"model_type={kind!r:.100}, architectures={list(architectures)!r:.200}. "
            f"Supported with this model_type: {causal} ({family.models})."
        )
    for name, (off, meaning) in _REFUSED.items():
        if raw.get(name) is not None and raw[name] not in off:
            raise UserError(
                f"config.json: `{name}`={raw[name]!r:.80} stands for {meaning}, which "
                "is not computed here. If the model has none of it, remove the field."
            )
    if raw.get("is_causal") is False:
        raise UserError(
            "config.json: `is_causal` is false: every token attends to later ones too, "
            "as in models that embed text. Only causal language models are supported."
        )
    if raw.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: `use_bidirectional_attention` is set: every token attends to "
            "later ones too. Only causal language models are supported."
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
    return family


def read_activation(raw: Mapping[str, Any], family: Family) -> str:
    """Reads the activation of the MLP, by the name that transformers has for it."""
    name = raw.get(family.activation_key, family.default("hidden_act") or "silu")
    if name == "swish":
        return "silu"
    if name == "gelu" and family.gelu_is_approximate:
        return "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UserError(
            f"config.json: `{family.activation_key}`={name!r:.80} is not supported; "
            f"{', '.join(map(repr, ACTIVATIONS))} are."
        )
    return name
