import dataclasses
import json
import math

import pytest

from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig, RopeScaling

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_absent_fields_have_the_defaults_of_transformers():
    config = LlamaConfig.from_hf(TINY)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)
    assert config.initializer_range == 0.02
    assert config.eos_token_ids == () and config.quantization_config is None


def test_fields_of_the_file_win_over_defaults():
    config = LlamaConfig.from_hf(
        {
            **TINY,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_theta": 500000,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "eos_token_id": [7, 8],
        }
    )
    assert (config.num_key_value_heads, config.head_dim) == (2, 32)
    assert isinstance(config.rope_theta, float) and config.rope_theta == 5e5
    assert config.tie_word_embeddings and config.attention_bias and config.mlp_bias
    assert config.eos_token_ids == (7, 8)


@pytest.mark.parametrize("eos, ids", [(None, ()), (2, (2,)), ([1, 2], (1, 2))])
def test_end_tokens_are_a_tuple(eos, ids):
    assert LlamaConfig.from_hf({**TINY, "eos_token_id": eos}).eos_token_ids == ids


@pytest.mark.parametrize("absent", [None, {}, {"rope_type": "default"}])
def test_no_rope_scaling_in_any_spelling(absent):
    assert LlamaConfig.from_hf({**TINY, "rope_scaling": absent}).rope_scaling is None


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_both_generations_of_rope_fields_read_equal(scaling):
    four = {**TINY, "rope_theta": 5e5, "rope_scaling": scaling}
    old_name = {k: v for k, v in scaling.items() if k != "rope_type"}
    older = {
        **TINY,
        "rope_theta": 5e5,
        "rope_scaling": {**old_name, "type": scaling["rope_type"]},
    }
    five = {**TINY, "rope_parameters": {**scaling, "rope_theta": 5e5}}
    configs = [LlamaConfig.from_hf(raw) for raw in (four, older, five)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_scaling.factor == scaling["factor"]
    assert configs[0].rope_theta == 5e5


def test_a_config_is_hashable_and_raw_is_not_compared():
    one = LlamaConfig.from_hf({**TINY, "comment": "a"})
    two = LlamaConfig.from_hf({**TINY, "comment": "b"})
    assert one == two and hash(one) == hash(two)
    assert one.raw["comment"] == "a"
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.vocab_size = 3


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"eos_token_id": [1, 2], "tie_word_embeddings": True, "torch_dtype": "float16"},
    ],
)
def test_a_written_config_reads_back_equal(extra):
    raw = {**TINY, **extra, "transformers_version": "4.0", "unknown": [1, {"a": None}]}
    config = LlamaConfig.from_hf(raw)
    written = config.to_hf()
    json.dumps(written, allow_nan=False)
    assert LlamaConfig.from_hf(written) == config
    assert {k: written[k] for k in raw if not k.startswith("rope")} == {
        k: v for k, v in raw.items() if not k.startswith("rope")
    }
    # The rope fields stay in the generation they came in.
    assert ("rope_parameters" in written) == ("rope_parameters" in raw)
    assert ("rope_scaling" in written) == ("rope_parameters" not in raw)


def test_a_changed_value_is_written_over_the_original():
    config = LlamaConfig.from_hf({**TINY, "tie_word_embeddings": True})
    changed = dataclasses.replace(config, tie_word_embeddings=False, vocab_size=128)
    written = changed.to_hf()
    assert (written["tie_word_embeddings"], written["vocab_size"]) == (False, 128)


@pytest.mark.parametrize(
    "field", [k for k in TINY if k not in ("model_type", "architectures")]
)
def test_a_missing_field_is_named(field):
    raw = {k: v for k, v in TINY.items() if k != field}
    with pytest.raises(UserError, match=f"config.json lacks `{field}`"):
        LlamaConfig.from_hf(raw)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "Not a Llama causal lang",
        ),
        ({"model_type": None}, "Not a Llama causal language model"),
        ({"hidden_act": "gelu"}, "`hidden_act`='gelu' is not supported"),
        ({"attention_dropout": 0.1}, "`attention_dropout`=0.1 is not"),
        ({"hidden_size": 65}, "no `head_dim` and `hidden_size`=65"),
        ({"vocab_size": "100"}, "`vocab_size` must be an integer, got '100'"),
        ({"num_hidden_layers": True}, "must be an integer, got True"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be a positive integer"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive"),
        ({"num_key_value_heads": 3}, "=4 must be a multiple of `num_key_value_heads`"),
        ({"head_dim": 15}, "`head_dim` must be even"),
        ({"max_position_embeddings": -1}, "`max_position_embeddings` must be a pos"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs `factor`"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs `low_freq_factor`, `high_freq_factor`, `original_max_pos",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": 0.0}}, "factor` must be > 0, got 0"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "must be smaller than `high_freq_factor`, got 4.0 and 4.0",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
        (
            {"quantization_config": {"load_in_8bit": True}},
            r"'bitsandbytes' \(load_in_4bit=False\)",
        ),
        (
            {"quantization_config": {"load_in_4bit": True}},
            "`bnb_4bit_quant_type`='fp4' is not supported; only 'nf4'",
        ),
    ],
)
def test_features_that_are_not_computed_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf({**TINY, **change})


@pytest.mark.parametrize("spelled", ["load_in_4bit", "_load_in_4bit"])
def test_a_bitsandbytes_config_is_kept(spelled):
    quant = {spelled: True, "bnb_4bit_quant_type": "nf4"}
    config = LlamaConfig.from_hf({**TINY, "quantization_config": quant})
    assert config.quantization_config == quant


@pytest.mark.real
def test_every_published_llama_config_loads_and_every_other_is_refused(shared_data):
    facts = json.loads((shared_data / "configs" / "facts_from_litgpt.json").read_text())
    folders = sorted(p.parent for p in (shared_data / "configs").glob("*/config.json"))
    assert len(folders) == 15
    llamas = 0
    for folder in folders:
        raw = json.loads((folder / "config.json").read_text())
        if raw["model_type"] != "llama":
            with pytest.raises(UserError, match=f"model_type='{raw['model_type']}'"):
                LlamaConfig.from_hf(raw)
            continue
        llamas += 1
        config = LlamaConfig.from_hf(raw)
        told = facts[folder.name]
        for name in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "rope_theta"),
            *("max_position_embeddings", "rms_norm_eps", "attention_bias"),
        ):
            assert getattr(config, name) == told[name], (folder.name, name)
        assert config.vocab_size == told["padded_vocab_size"]
        assert (config.rope_scaling is None) == (told["rope_scaling"] is None)
        if config.rope_scaling is not None:
            stretched = dict(told["rope_scaling"])
            length = stretched.pop("original_max_seq_len")
            stretched["original_max_position_embeddings"] = length
            assert config.rope_scaling.to_hf() == stretched
        assert LlamaConfig.from_hf(config.to_hf()) == config
    assert llamas == 6


@pytest.mark.parametrize("factor", [math.inf, math.nan, -1.0])
def test_rope_factors_are_positive_numbers(factor):
    with pytest.raises(UserError, match="`rope_scaling.factor` must be > 0"):
        RopeScaling("linear", factor)


# --- Tensors of custom modules ---

GATE = "model.layers.self_attn.gate.weight"


def test_tensors_of_custom_modules_are_written_and_read():
    raw = {**TINY, "extra_tensors": {GATE: [4, 64], "model.scale": []}}
    config = LlamaConfig.from_hf(raw)
    assert dict(config.extra_tensors) == {GATE: (4, 64), "model.scale": ()}
    written = json.loads(json.dumps(config.to_hf()))
    assert written["extra_tensors"] == {GATE: [4, 64], "model.scale": []}
    assert LlamaConfig.from_hf(written) == config
    plain = LlamaConfig.from_hf(TINY)
    assert plain.extra_tensors == {} and "extra_tensors" not in plain.to_hf()
    assert hash(config) != hash(plain) and config != plain


@pytest.mark.parametrize(
    "table",
    [
        [GATE],
        {GATE: 4},
        {GATE: [4, 0]},
        {GATE: [True]},
        {GATE: [4.0]},
        {GATE: "64"},
        {"a b": [1]},
        {"../x": [1]},
        {"": [1]},
    ],
)
def test_tensors_of_custom_modules_have_names_and_shapes(table):
    with pytest.raises(UserError, match="`extra_tensors` must map dotted names to sha"):
        LlamaConfig.from_hf({**TINY, "extra_tensors": table})


@pytest.mark.parametrize(
    "name, value, what",
    [
        ("architectures", 1, "a list of names"),
        ("architectures", [3], "a list of names"),
        ("rms_norm_eps", None, "a number"),
        ("rms_norm_eps", 10**400, "a number"),
        ("rms_norm_eps", True, "a number"),
        ("initializer_range", float("nan"), "a number"),
        ("rope_theta", [], "a number"),
        ("rope_scaling", "x", "an object"),
        ("rope_parameters", 0, "an object"),
        ("rope_scaling", {"rope_type": "linear", "factor": "x"}, "a number"),
        ("quantization_config", "", "an object"),
        ("bos_token_id", [], "an integer"),
        ("pad_token_id", {}, "an integer"),
        ("eos_token_id", [[]], "an integer, or a list"),
        ("vocab_size", 10**30, "an integer"),
        ("num_key_value_heads", "4", "an integer"),
        ("extra_tensors", {"a": ["x"]}, "shapes"),
    ],
)
def test_values_of_another_type_are_refused_by_name(name, value, what):
    raw = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    with pytest.raises(UserError, match=f"`{name}.*{what}"):
        LlamaConfig.from_hf({**raw, name: value})
