"""The families of models, by `model_type`: what each changes of the Llama block.

One block computes all of them (`qlora_jax.models.llama`). It reads the switches of its
configuration and of the family's entry here, never the name of a family. An entry has
what a config.json does not say: the defaults of absent keys, which are those of
transformers' configuration class and differ between families, the projections that have
a bias, and the parts of the block that have no field at all.

A new family of this kind is one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_jax.errors import UserError

_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION_BIAS: dict[str, str | bool] = dict.fromkeys(
    (*_QKV, "o_proj"), "attention_bias"
)
_MLP_BIAS: dict[str, str | bool] = dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp_bias"
)

_COMMON: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Family:
    """What a `model_type` computes; the fields are its differences from Llama."""

    architectures: tuple[str, ...]
    """Accepted names in config.json's `architectures`; the first is written."""
    models: str
    """Known members, for messages and the docs."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that a config.json leaves out, where they differ from Llama's."""
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    """Projection -> whether it has a bias: a constant, or the field that says so."""
    fields: frozenset[str] = frozenset()
    """Optional fields of config.json that this family computes."""
    not_null: frozenset[str] = frozenset()
    """Fields of which null means something in other families, and nothing here."""
    activation_key: str = "hidden_act"
    gelu_is_approximate: bool = False
    """The first files say "gelu" and mean the tanh form."""
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys, before the rotation."""
    fused: bool = False
    """q, k, v are rows of one `qkv_proj`; gate and up of one `gate_up_proj`."""
    norm_offset: bool = False
    """Norms multiply with 1 + weight, in float32."""
    post_norms: bool = False
    """Norms after attention and MLP as well, before their sums with the residual."""
    scaled_embeddings: bool = False
    """Embeddings are multiplied with sqrt(hidden_size), rounded to their dtype."""
    layer_kinds: Literal["none", "window", "qwen", "smollm3", "alternating"] = "none"
    """How windows follow from config.json where it has no `layer_types`."""
    window_is_optional: bool = False
    """A window counts only with `use_sliding_window`."""
    ropes_by_layer_type: bool = False
    """Windowed layers rotate with a theta of their own."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "longrope")
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of rope types in older files."""

    def default(self, name: str) -> Any:
        """Returns the value of a key that a config.json leaves out."""
        return self.defaults.get(name, _COMMON.get(name))


_LLAMA_BIASES = {**_ATTENTION_BIAS, **_MLP_BIAS}
_QWEN_WINDOWS = frozenset({"sliding_window", "layer_types"})
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA_NOT_NULL = frozenset({"num_key_value_heads", "head_dim"})
_MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        # The second is what the first conversions of Llama wrote.
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        models="Llama 2, 3, 3.1, 3.2, 3.3, TinyLlama, SmolLM2, Yi",
        biases=_LLAMA_BIASES,
    ),
    "mistral": Family(
        architectures=("MistralForCausalLM",),
        models="Mistral 7B, Nemo, Small, Codestral, Devstral",
        defaults=_MISTRAL_DEFAULTS,
        not_null=frozenset({"num_key_value_heads"}),
        # With `layer_types` it is a Ministral, to transformers' Auto classes too.
        fields=frozenset({"sliding_window", "layer_types"}),
        layer_kinds="window",
    ),
    "ministral": Family(
        architectures=("MinistralForCausalLM",),
        models="Ministral 8B",
        defaults=_MISTRAL_DEFAULTS,
        not_null=frozenset({"num_key_value_heads"}),
        fields=frozenset({"sliding_window", "layer_types"}),
        layer_kinds="window",
    ),
    "qwen2": Family(
        architectures=("Qwen2ForCausalLM",),
        models="Qwen2, Qwen2.5, Qwen2.5-Coder, R1 distills",
        defaults=_QWEN_DEFAULTS,
        biases=dict.fromkeys(_QKV, True),
        fields=_QWEN_WINDOWS,
        layer_kinds="qwen",
        window_is_optional=True,
    ),
    "qwen3": Family(
        architectures=("Qwen3ForCausalLM",),
        models="Qwen3 0.6B to 32B",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        not_null=frozenset({"head_dim"}),
        biases=_ATTENTION_BIAS,
        fields=_QWEN_WINDOWS,
        qk_norm=True,
        layer_kinds="qwen",
        window_is_optional=True,
    ),
    "phi3": Family(
        architectures=("Phi3ForCausalLM",),
        models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        fields=frozenset({"sliding_window", "partial_rotary_factor"}),
        fused=True,
        layer_kinds="window",
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "smollm3": Family(
        architectures=("SmolLM3ForCausalLM",),
        models="SmolLM3",
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
            "no_rope_layer_interval": 4,
            "rope_theta": 2_000_000.0,
        },
        biases=_LLAMA_BIASES,
        fields=frozenset({"sliding_window", "layer_types", "no_rope_layers"}),
        layer_kinds="smollm3",
        window_is_optional=True,
    ),
    "granite": Family(
        architectures=("GraniteForCausalLM",),
        models="Granite 3.0 to 3.3",
        defaults={
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        biases=_LLAMA_BIASES,
        fields=frozenset(
            {
                *("embedding_multiplier", "attention_multiplier"),
                *("residual_multiplier", "logits_scaling"),
            }
        ),
    ),
    "seed_oss": Family(
        architectures=("SeedOssForCausalLM",),
        models="Seed-OSS 36B",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
        },
        biases={
            **dict.fromkeys(_QKV, "attention_bias"),
            "o_proj": "attention_out_bias",
            **_MLP_BIAS,
        },
        fields=frozenset({"attention_out_bias"}),
    ),
    "gemma": Family(
        architectures=("GemmaForCausalLM",),
        models="Gemma 2B and 7B, CodeGemma",
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        biases=_ATTENTION_BIAS,
        not_null=_GEMMA_NOT_NULL,
        gelu_is_approximate=True,
        norm_offset=True,
        scaled_embeddings=True,
    ),
    "gemma2": Family(
        architectures=("Gemma2ForCausalLM",),
        models="Gemma 2 2B, 9B, 27B",
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        biases=_ATTENTION_BIAS,
        not_null=_GEMMA_NOT_NULL,
        fields=frozenset(
            {
                *("sliding_window", "layer_types", "query_pre_attn_scalar"),
                *("attn_logit_softcapping", "final_logit_softcapping"),
            }
        ),
        activation_key="hidden_activation",
        norm_offset=True,
        post_norms=True,
        scaled_embeddings=True,
        layer_kinds="alternating",
    ),
    "gemma3_text": Family(
        architectures=("Gemma3ForCausalLM",),
        models="Gemma 3 270M, 1B; the text model of 4B, 12B, 27B",
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            # A `text_config` leaves out what is as in the class.
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        biases=_ATTENTION_BIAS,
        not_null=_GEMMA_NOT_NULL,
        fields=frozenset(
            {
                # transformers has `attn_logit_softcapping` too, and never caps.
                *("sliding_window", "layer_types", "query_pre_attn_scalar"),
                *("final_logit_softcapping", "rope_local_base_freq"),
                "sliding_window_pattern",
            }
        ),
        activation_key="hidden_activation",
        qk_norm=True,
        norm_offset=True,
        post_norms=True,
        scaled_embeddings=True,
        layer_kinds="alternating",
        ropes_by_layer_type=True,
    ),
}
"""`model_type` -> its entry."""


WITH_TEXT_MODEL: Mapping[str, tuple[str, str]] = {
    "gemma3": ("Gemma3", "gemma3_text"),
    "mistral3": ("Mistral3", "mistral"),
}
"""`model_type` of models of images and text -> the first part of their architectures'
names, and the family of their text model, where that does not say it itself."""


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config.json of the text model within a model of images and text.

    Others are returned as they are. How the weights are quantized and which tokens end
    a text is said once, for both.

    Raises:
      UserError: a text model that is not supported, or another head than that of a
        language model.
    """
    kind, text = raw.get("model_type"), raw.get("text_config")
    if not isinstance(kind, str) or kind not in WITH_TEXT_MODEL:
        return raw
    if not isinstance(text, Mapping):
        raise UserError(
            f"config.json: model_type={kind!r} needs a `text_config`, an object with "
            f"the configuration of its text model; got {text!r:.80}. Is the file "
            "complete?"
        )
    first, default = WITH_TEXT_MODEL[kind]
    names = raw.get("architectures")
    known = (f"{first}ForConditionalGeneration", f"{first}Model")
    if names is not None and (
        not isinstance(names, list) or set(map(str, names)) - {*known}
    ):
        raise UserError(
            f"Not a causal language model: config.json has model_type={kind!r}, "
            f"architectures={names!r:.200}. Supported with this model_type: {known[0]}."
        )
    text = {**text, "model_type": text.get("model_type", default)}
    if kind == "gemma3" and text["model_type"] != default:
        # transformers reads every text model of it as this one.
        raise UserError(
            f"config.json: `text_config.model_type`={text['model_type']!r:.80} within "
            f"a {kind!r} is not supported; {default!r} is."
        )
    outer = ("quantization_config", "torch_dtype", "dtype", "transformers_version")
    outer += ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings")
    family = family_of(text["model_type"], "text_config.model_type")
    return {
        **{name: raw[name] for name in outer if name in raw},
        **text,
        "architectures": [family.architectures[0]],
    }


# Those whose name does not say so.
_MIXTURES_OF_EXPERTS = (
    *("mixtral", "gpt_oss", "dbrx", "llama4", "llama4_text", "deepseek_v2"),
    *("deepseek_v3", "jamba"),
)


def family_of(model_type: Any, where: str = "model_type") -> Family:
    """Returns the entry of a `model_type`; `where` is its field in the file.

    Raises:
      UserError: another family, with the list of those that are supported.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        names = "; ".join(f"{name} ({f.models})" for name, f in FAMILIES.items())
        kind = str(model_type).lower()
        is_mixture = "moe" in kind or kind in _MIXTURES_OF_EXPERTS
        raise UserError(
            f"config.json: {where}={model_type!r:.100}"
            f"{', a mixture of experts,' if is_mixture else ''} is not supported. "
            "Supported: "
            f"{names}; and the text models of {' and '.join(WITH_TEXT_MODEL)}."
        )
    return family
