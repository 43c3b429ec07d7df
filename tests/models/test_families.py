"""The families' configurations, against the classes of transformers."""

import dataclasses

import pytest

from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.config_fields import SIZES as SIZE_FIELDS
from qlora_jax.models.config_notes import unread_fields
from qlora_jax.models.families import FAMILIES, family_of

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
}
# Fields that both sides have under one name.
FIELDS = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
    *("max_position_embeddings", "initializer_range", "embedding_multiplier"),
    *("attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
of_each_family = pytest.mark.parametrize("model_type", FAMILIES)


def read(model_type, **fields):
    architectures = [family_of(model_type).architectures[0]]
    base = {"model_type": model_type, "architectures": architectures, **SIZES}
    return LlamaConfig.from_hf(base | fields)


@pytest.fixture(scope="module")
def theirs():
    """A function: (model_type, fields) -> transformers' configuration."""
    from transformers import AutoConfig

    return lambda model_type, **fields: AutoConfig.for_model(
        model_type, **(SIZES | fields)
    )


def layer_types(config):
    kinds = config.layer_types or ("full_attention",) * config.num_hidden_layers
    return list(kinds)


@of_each_family
def test_absent_keys_have_the_class_defaults_of_transformers(theirs, model_type):
    ours, other = read(model_type), theirs(model_type)
    for name in FIELDS:
        if not hasattr(other, name):
            continue
        value = getattr(other, name)
        if value is None and name == "head_dim":
            value = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        assert getattr(ours, name) == value, name
    activation = getattr(other, "hidden_activation", None) or other.hidden_act
    assert ours.hidden_act == activation
    window = getattr(other, "sliding_window", None)
    expected = getattr(other, "layer_types", None)
    if expected is None:
        kind = "full_attention" if window is None else "sliding_attention"
        expected = [kind] * SIZES["num_hidden_layers"]
    assert layer_types(ours) == expected
    if "sliding_attention" in expected:
        assert ours.sliding_window == window
    rope = other.rope_parameters
    if "full_attention" in rope:
        assert ours.rope_local_base_freq == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert ours.rope_theta == rope["rope_theta"]
    for name in ("no_rope_layers",):
        if hasattr(other, name):
            assert list(ours.no_rope_layers) == list(getattr(other, name))
    for bias in ("attention_bias", "mlp_bias", "attention_out_bias"):
        if bias in family_of(model_type).biases.values():
            assert getattr(ours, bias) == getattr(other, bias)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mistral", {"sliding_window": 3}),
        ("mistral", {"sliding_window": None}),
        ("ministral", {"sliding_window": 3}),
        (
            "ministral",
            {
                "sliding_window": 3,
                "layer_types": ["full_attention", "sliding_attention"] * 3,
            },
        ),
        ("ministral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 3}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 3}),
        ("smollm3", {"no_rope_layer_interval": 3}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1, 0]}),
        ("gemma2", {"sliding_window": 3}),
        # Which of the two reads this field differs.
        ("gemma2", {"sliding_window_pattern": 3, "sliding_window": 3}),
        ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 3}),
        ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4}),
        ("phi3", {"sliding_window": 3}),
    ],
)
def test_layers_are_of_the_kinds_of_transformers(theirs, model_type, fields):
    ours, other = read(model_type, **fields), theirs(model_type, **fields)
    expected = getattr(other, "layer_types", None)
    if expected is None:
        kind = "full_attention" if other.sliding_window is None else "sliding_attention"
        expected = [kind] * SIZES["num_hidden_layers"]
    assert layer_types(ours) == expected
    windows = {kind.window for kind in ours.layer_kinds}
    assert windows - {None} == (
        {other.sliding_window} if "sliding_attention" in expected else set()
    )
    rotated = getattr(other, "no_rope_layers", None) or [1] * 6
    assert [kind.rope != "none" for kind in ours.layer_kinds] == list(
        map(bool, rotated)
    )
    if model_type == "gemma3_text":
        rope = other.rope_parameters
        assert ours.rope_theta == rope["full_attention"]["rope_theta"]
        assert ours.rope_local_base_freq == rope["sliding_attention"]["rope_theta"]


@of_each_family
@pytest.mark.parametrize("has_file", [True, False])
def test_a_config_is_read_back_as_it_was_written(model_type, has_file):
    config = read(model_type)
    if not has_file:
        config = dataclasses.replace(config, raw={})
    assert LlamaConfig.from_hf(config.to_hf()) == config
    changed = dataclasses.replace(
        config, vocab_size=128, tie_word_embeddings=not config.tie_word_embeddings
    )
    written = changed.to_hf()
    assert LlamaConfig.from_hf(written) == changed
    if has_file:  # nothing else is changed or added
        expected = {"vocab_size", "tie_word_embeddings", *config.raw}
        assert written.keys() - expected <= {"rope_theta", "rope_scaling"} | (
            {"rope_local_base_freq"} if model_type == "gemma3_text" else set()
        )


def test_defaults_that_a_file_spells_out_stay_in_it():
    scaling = {
        **dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4),
        **dict(beta_fast=32.0, truncate=True),
    }
    config = read("qwen2", rope_theta=500.0, rope_scaling=scaling)
    assert config.to_hf()["rope_scaling"] == scaling
    changed = dataclasses.replace(config, rope_theta=501.0).to_hf()
    assert LlamaConfig.from_hf(changed).rope_scaling == config.rope_scaling


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "qwen3_moe",
            {},
            "model_type='qwen3_moe', a mixture of experts, is not supported. Suppo",
        ),
        ("qwen3_5", {}, "is not supported"),
        ("mistral", {"sliding_window": 0}, "must be a positive integer, or null"),
        ("mistral", {"sliding_window": -4}, "must be a positive integer, or null"),
        ("qwen2", {"layer_types": ["full_attention"]}, "each of the 6 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 6}, "`layer_types` must"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 6},
            "`use_sliding_window` is false",
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, "each of the 6 layers"),
        ("smollm3", {"no_rope_layers": [2] * 6}, "`no_rope_layers` must list"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is not"),
        ("phi3", {"partial_rotary_factor": 0.3}, "must be even for rotary"),
        ("phi3", {"partial_rotary_factor": 0}, "must be even for rotary"),
        ("phi3", {"partial_rotary_factor": 1.5}, "share of `head_dim`, at most 1"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default"}},
            "must have the fields of both kinds of layers",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "'yarn' of the windowed layers",
        ),
        ("gemma3_text", {"rope_local_base_freq": 0}, "must be > 0, got 0"),
        ("gemma2", {"final_logit_softcapping": 0}, "must be > 0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "must be > 0, got 0"),
        ("granite", {"logits_scaling": 0}, "another number than 0"),
        ("granite", {"logits_scaling": "8"}, "`logits_scaling` must be a number"),
        ("gemma", {"hidden_act": "relu"}, "`hidden_act`='relu' is not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(model_type, fields, message):
    with pytest.raises(UserError, match=message):
        raw = {"model_type": model_type, **SIZES}
        LlamaConfig.from_hf(raw | fields)


def test_a_mistral_with_layer_types_is_a_ministral():
    kinds = ["full_attention", "sliding_attention"] * 3
    config = read("mistral", sliding_window=3, layer_types=kinds)
    assert layer_types(config) == kinds


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [("gemma", "gelu_pytorch_tanh"), ("gemma2", "gelu"), ("gemma3_text", "gelu")],
)
def test_gelu_means_the_tanh_form_in_the_first_gemma_only(model_type, activation):
    key = family_of(model_type).activation_key
    assert read(model_type, **{key: "gelu"}).hidden_act == activation


@pytest.mark.parametrize(
    ("model_type", "fields", "notes"),
    [
        # transformers reads it and never caps.
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, ["`attn_logit_softcapping`"]),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [2]}},
            [],
        ),
        ("mistral", {"attention_bias": True}, ["`attention_bias`=True"]),
        (
            "gemma2",
            {"sliding_window_pattern": 3, "attn_logit_softcapping": None},
            ["`sliding_window_pattern`=3"],
        ),
        ("granite", {"attention_dropout": 0.1}, ["`attention_dropout`=0.1"]),
    ],
)
def test_fields_that_are_not_computed_are_named(model_type, fields, notes):
    config = read(model_type, **fields, head_dim=2)
    assert config.attn_logit_softcapping is None
    named = unread_fields(config.raw, config.vocab_size)
    assert len(named) == len(notes)
    assert all(a.startswith(b) for a, b in zip(named, notes, strict=True))


# Fields that may be null in one family or another.
NULLABLE = (
    *SIZE_FIELDS,
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("original_max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"),
    *("use_sliding_window", "max_window_layers", "no_rope_layer_interval"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    *("logits_scaling", "query_pre_attn_scalar", "final_logit_softcapping"),
    *("attn_logit_softcapping", "partial_rotary_factor", "hidden_act"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling"),
)


@of_each_family
@pytest.mark.parametrize("field", NULLABLE)
def test_null_is_refused_by_name_where_transformers_refuses_it(
    theirs, model_type, field
):
    activation = family_of(model_type).activation_key
    field = activation if field == "hidden_act" else field
    fields = {"hidden_size": 128, field: None}
    try:
        theirs(model_type, **fields)
    except Exception:  # several classes, of huggingface_hub
        with pytest.raises(UserError, match=f"`{field}`"):
            read(model_type, **fields)
    else:
        read(model_type, **fields)


def test_what_to_do_about_null_is_said():
    several = {"hidden_size": None, "head_dim": None}
    message = (
        "`hidden_size`, `head_dim` are null, and a 'qwen3' model must have a value"
    )
    with pytest.raises(UserError, match=message) as caught:
        read("qwen3", **several)
    assert "remove the field" not in str(caught.value)
    with pytest.raises(UserError, match="`head_dim` is null.*or remove the field if"):
        read("qwen3", head_dim=None)


def test_the_documentation_lists_every_family(repository):
    page = (repository / "docs" / "models.md").read_text().partition("\n## ")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("| `"): row[1] for row in rows[1:]}
    assert listed == {name: family.models for name, family in FAMILIES.items()}


def test_a_config_of_mixture_of_experts_or_sinks_is_refused():
    for fields in ({"num_local_experts": 8}, {"num_experts": 4}):
        with pytest.raises(UserError, match="mixture of experts"):
            read("llama", **fields)
    with pytest.raises(UserError, match="attention_chunk_size"):
        read("llama", attention_chunk_size=8192)
