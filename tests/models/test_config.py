import dataclasses
import json
import math

import pytest

from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig, RopeScaling
from qlora_jax.models.config_notes import unread_fields
from qlora_jax.models.params import shapes
from qlora_jax.tree import is_stacked

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
LINEAR = {"rope_type": "linear", "factor": 4.0}
NATIVE = {"original_max_position_embeddings": 1024}
YARN = {"rope_type": "yarn", "factor": 2.0, **NATIVE}
FACTORS = [1.0 + i / 8 for i in range(8)]
LONG = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    **NATIVE,
}


def read(**fields):
    return LlamaConfig.from_hf({**TINY, **fields})


def test_absent_fields_have_the_defaults_of_transformers():
    config = read()
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)
    assert config.initializer_range == 0.02
    assert config.eos_token_ids == () and config.quantization_config is None


def test_fields_of_the_file_win_over_defaults():
    fields = {"num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5}
    flags = dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), True)
    config = read(rope_theta=500000, **fields, **flags)
    for name, value in (fields | flags).items():
        assert getattr(config, name) == value
    assert isinstance(config.rope_theta, float) and config.rope_theta == 5e5


@pytest.mark.parametrize("eos, ids", [(None, ()), (2, (2,)), ([1, 2], (1, 2))])
def test_end_tokens_are_a_tuple(eos, ids):
    assert read(eos_token_id=eos).eos_token_ids == ids


@pytest.mark.parametrize("eos", [-1, 100, [2, 100]])
def test_end_tokens_outside_the_vocabulary_end_nothing_and_are_named(eos):
    config = read(eos_token_id=eos)
    assert config.eos_token_ids == ((2,) if isinstance(eos, list) else ())
    (note,) = unread_fields(config.raw, config.vocab_size)
    assert note.startswith("`eos_token_id`=") and "100 tokens" in note
    # In a vocabulary that has grown it is one.
    if eos != -1:
        grown = dataclasses.replace(config, vocab_size=101)
        assert 100 in grown.eos_token_ids and not unread_fields(grown.raw, 101)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sliding_window": 4}, ["`sliding_window`=4"]),
        ({"sliding_window": 4096}, []),
        ({"compression_config": {"format": "dense"}}, ["`compression_config`="]),
        ({"quantization": {"bits": 4}}, ["`quantization`="]),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 3}, []),
        ({"layer_types": ["sliding_attention"] * 3}, ["`layer_types`"]),
        ({"embedding_multiplier": 12.0}, ["`embedding_multiplier`=12.0"]),
        ({"embedding_multiplier": 1.0, "use_qk_norm": False}, []),
        ({"auto_map": {"AutoModel": "a.B"}}, ["`auto_map`"]),
        ({"partial_rotary_factor": 0.5}, ["`partial_rotary_factor`=0.5"]),
        ({"rope_scaling": LINEAR}, []),
        ({"rope_scaling": {**LLAMA3, "type": "llama3"}}, []),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
            ["`rope_parameters.factor`=4.0 (`rope_parameters.rope_type` is 'default')"],
        ),
        (
            {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            ["`rope_scaling.partial_rotary_factor`=0.5"],
        ),
        (
            {"rope_scaling": {**LINEAR, "attention_factor": 2.0}},
            ["`rope_scaling.attention_factor`=2.0"],
        ),
        ({"rope_scaling": {**LINEAR, "type": "default"}}, ["`rope_scaling.type`"]),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            ["`rope_parameters`"],
        ),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            ["`rope_theta`=1000000.0"],
        ),
    ],
)
def test_fields_that_a_llama_passes_over_are_named(fields, named):
    config = read(**fields)
    notes = unread_fields(config.raw, config.vocab_size)
    assert len(notes) == len(named)
    for note, start in zip(notes, named, strict=True):
        assert note.startswith(start)


@pytest.mark.parametrize("absent", [None, {}, {"rope_type": "default"}])
def test_no_rope_scaling_in_any_spelling(absent):
    assert read(rope_scaling=absent).rope_scaling is None


@pytest.mark.parametrize("scaling", [LLAMA3, LINEAR])
def test_both_generations_of_rope_fields_read_equal(scaling):
    old_name = {k: v for k, v in scaling.items() if k != "rope_type"}
    old_name["type"] = scaling["rope_type"]
    four, older = (read(rope_theta=5e5, rope_scaling=s) for s in (scaling, old_name))
    assert four == older == read(rope_parameters={**scaling, "rope_theta": 5e5})
    assert four.rope_scaling.factor == scaling["factor"]
    assert four.rope_theta == 5e5


DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
NO_NATIVE = {k: v for k, v in LLAMA3.items() if not k.startswith("original")}


# Values: what transformers computes with (tests/peer/test_rope_fields.py).
ROPE_FIELDS = [
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
    ({"rope_parameters": DEFAULT, "rope_theta": None}, 5e5, None),
    ({"rope_parameters": DEFAULT, "rope_scaling": {}}, 5e5, None),
    ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, 1e4, LINEAR),
    ({"rope_parameters": LINEAR, "rope_scaling": DEFAULT}, 5e5, None),
    ({"rope_scaling": {**LLAMA3, "rope_theta": 5e5}}, 5e5, LLAMA3),
    ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, 1e4, None),
    (
        {"rope_scaling": NO_NATIVE, "max_position_embeddings": 8192},
        *(1e4, LLAMA3),
    ),
    (
        {
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 5},
            "original_max_position_embeddings": 8192,
        },
        *(1e4, LLAMA3),
    ),
    ({"rope_theta": 5e5, "partial_rotary_factor": 0.5}, 5e5, None),
    ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 1}}, 1e4, LINEAR),
]


@pytest.mark.parametrize("fields, theta, scaling", ROPE_FIELDS)
def test_rope_fields_have_the_precedence_of_transformers(fields, theta, scaling):
    config = read(**fields)
    assert config.rope_theta == theta
    assert config.rope_scaling == (scaling and RopeScaling(**scaling))
    # Written once, so that no reader can prefer another.
    written = config.to_hf()
    assert LlamaConfig.from_hf(written) == config
    assert ("rope_parameters" in written) != ("rope_scaling" in written)
    assert ("rope_parameters" in written) != ("rope_theta" in written)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_theta": None}, "`rope_theta` is null"),
        ({"rope_theta": None, "rope_scaling": LINEAR}, "`rope_theta` is null"),
        (
            {"rope_parameters": {**DEFAULT, "rope_theta": None}, "rope_theta": 5e5},
            "`rope_parameters.rope_theta` is null",
        ),
        (
            {"rope_parameters": {"full_attention": DEFAULT}},
            "single kinds of layers .'full_attention'",
        ),
        ({"rope_scaling": {"rope_type": None, "type": "linear"}}, "rope_type` is null"),
        (
            {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}},
            "`partial_rotary_factor`=0.5 is not supported",
        ),
        ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "=0.5 is not supp"),
        ({"partial_rotary_factor": "x"}, "`partial_rotary_factor` must be a number"),
    ],
)
def test_rope_fields_that_transformers_fails_on_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        read(**fields)


def test_a_config_is_hashable_and_raw_is_not_compared():
    one, two = read(comment="a"), read(comment="b")
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
        {"rope_scaling": LINEAR},
        {"eos_token_id": [1, 2], "tie_word_embeddings": True, "torch_dtype": "float16"},
    ],
)
def test_a_written_config_reads_back_equal(extra):
    raw = {**TINY, **extra, "transformers_version": "4.0", "unknown": [1, {"a": None}]}
    config = LlamaConfig.from_hf(raw)
    written = config.to_hf()
    json.dumps(written, allow_nan=False)
    assert LlamaConfig.from_hf(written) == config
    for name, value in raw.items():
        assert name.startswith("rope") or written[name] == value
    # The rope fields stay in the generation they came in.
    assert ("rope_parameters" in written) == ("rope_parameters" in raw)
    assert ("rope_scaling" in written) == ("rope_parameters" not in raw)


def test_a_changed_value_is_written_over_the_original():
    config = read(tie_word_embeddings=True)
    changed = dataclasses.replace(config, tie_word_embeddings=False, vocab_size=128)
    written = changed.to_hf()
    assert (written["tie_word_embeddings"], written["vocab_size"]) == (False, 128)


@pytest.mark.parametrize("field", [k for k in TINY if "_size" in k or "num_" in k])
def test_a_missing_field_is_named(field):
    raw = {k: v for k, v in TINY.items() if k != field}
    with pytest.raises(UserError, match=f"config.json lacks `{field}`"):
        LlamaConfig.from_hf(raw)


GATE = "model.layers.self_attn.gate.weight"


@pytest.mark.parametrize(
    ("pad", "padding"), [(None, 0), (0, 0), (5, 5), (23, 23), (24, 0), (-1, 0)]
)
def test_rows_are_filled_with_a_token_of_the_vocabulary(tiny, pad, padding):
    assert LlamaConfig.from_hf({**tiny, "pad_token_id": pad}).padding_id == padding


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "model_type",
            "mixtral",
            "model_type='mixtral', a mix.* is not supported.*qwen3",
        ),
        ("model_type", None, "model_type=None is not supported"),
        ("architectures", ["LlamaForSequenceClassification"], "Not a causal language"),
        ("hidden_act", "relu", "`hidden_act`='relu' is not supported"),
        ("use_bidirectional_attention", True, "every token attends to later ones too"),
        ("hidden_size", 65, "no `head_dim` and `hidden_size`=65"),
        ("vocab_size", "100", "`vocab_size` must be an integer, got '100'"),
        ("num_hidden_layers", True, "must be an integer, got True"),
        ("num_hidden_layers", 0, "`num_hidden_layers` must be a positive integer"),
        ("num_attention_heads", 0, "`num_attention_heads` must be a positive"),
        ("num_key_value_heads", 3, "=4 must be a multiple of `num_key_value_heads`"),
        ("head_dim", 15, "must be even for rotary embeddings, got 15"),
        ("max_position_embeddings", -1, "`max_position_embeddings` must be a pos"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "in another batch"),
        ("rope_scaling", {"rope_type": "yarn"}, "'yarn' needs `factor`"),
        ("rope_scaling", {**YARN, "beta_slow": 32}, "larger than `beta_slow`"),
        ("rope_scaling", {**YARN, "truncate": 1}, "truncate` must be true or false"),
        ("rope_scaling", {**LONG, "long_factor": 2}, "long_factor` must be a list"),
        ("rope_scaling", {**LONG, "long_factor": [1.0]}, "lists of one length"),
        (
            "rope_scaling",
            {**LONG, "long_factor": [2.0], "short_factor": [1.0]},
            "must have 8 numbers, one for each pair",
        ),
        ("rope_scaling", {"rope_type": "linear"}, "'linear' needs `factor`"),
        (
            "rope_scaling",
            {"rope_type": "llama3", "factor": 8.0},
            "needs `low_freq_factor`, `high_freq_factor`.$",
        ),
        ("rope_scaling", {**LLAMA3, "factor": 0.0}, "factor` must be > 0, got 0"),
        (
            "rope_scaling",
            {**LLAMA3, "low_freq_factor": 4.0},
            "must be smaller than `high_freq_factor`, got 4.0 and 4.0",
        ),
        ("quantization_config", {"quant_method": "gptq"}, "quantized with 'gptq'"),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "'bitsandbytes', and not in 4 bits",
        ),
        (
            "quantization_config",
            {"bits": 4},
            "quantized in a way that it does not name",
        ),
        # A transformers 5 Llama then attends in both directions.
        ("is_causal", False, "every token attends to later ones too"),
        ("attention_bias", "false", "`attention_bias` must be true or false"),
        ("tie_word_embeddings", 0, "`tie_word_embeddings` must be true or false"),
        ("num_key_value_heads", 0, "`num_key_value_heads` must be a positive integer"),
        ("head_dim", 0, "`head_dim` must be a positive integer"),
        ("rms_norm_eps", -1e-5, "`rms_norm_eps` must be >= 0"),
        ("rope_theta", 0, "`rope_theta` must be > 0"),
        (
            "quantization_config",
            {"load_in_4bit": True},
            "`bnb_4bit_quant_type`='fp4' is not supported; only 'nf4'",
        ),
        # Values of another type, by name.
        ("architectures", 1, "`architectures.*a list of names"),
        ("architectures", [3], "`architectures.*a list of names"),
        ("rms_norm_eps", None, "`rms_norm_eps.*a number"),
        ("rms_norm_eps", 10**400, "`rms_norm_eps.*a number"),
        ("rms_norm_eps", True, "`rms_norm_eps.*a number"),
        ("initializer_range", math.nan, "`initializer_range.*a number"),
        ("rope_theta", [], "`rope_theta.*a number"),
        ("rope_scaling", "x", "`rope_scaling.*an object"),
        ("rope_parameters", 0, "`rope_parameters.*an object"),
        ("rope_scaling", {**LINEAR, "factor": "x"}, "`rope_scaling.*a number"),
        ("quantization_config", "", "`quantization_config.*an object"),
        (
            "quantization_config",
            {"bnb_4bit_quant_storage": ["uint8"]},
            "quantization_config.bnb_4bit_quant_storage` must be a string",
        ),
        ("bos_token_id", [], "`bos_token_id.*an integer"),
        ("pad_token_id", {}, "`pad_token_id.*an integer"),
        ("eos_token_id", [[]], "`eos_token_id.*an integer, or a list"),
        ("vocab_size", 10**30, "`vocab_size.*an integer"),
        ("num_key_value_heads", "4", "`num_key_value_heads.*an integer"),
        # Tensors of custom modules have names and shapes.
        *(
            ("extra_tensors", table, "`extra_tensors` must map dotted names to shapes")
            for table in (
                *([GATE], {GATE: 4}, {GATE: [4, 0]}, {GATE: [True]}, {GATE: [4.0]}),
                *({GATE: "64"}, {"a": ["x"]}, {"a b": [1]}, {"../x": [1]}, {"": [1]}),
            )
        ),
    ],
)
def test_what_is_not_computed_or_has_another_type_is_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        read(**{name: value})


@pytest.mark.parametrize("spelled", ["load_in_4bit", "_load_in_4bit"])
def test_a_bitsandbytes_config_is_kept(spelled):
    quant = {spelled: True, "bnb_4bit_quant_type": "nf4"}
    assert read(quantization_config=quant).quantization_config == quant


# Numbers of parameters that the hub shows for each model.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.real
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_their_facts_and_counts(shared_data, name):
    facts = json.loads((shared_data / "configs" / "facts_from_litgpt.json").read_text())
    raw = json.loads((shared_data / "configs" / name / "config.json").read_text())
    config = LlamaConfig.from_hf(raw)
    told = facts[name]
    for field in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps"),
    ):
        assert getattr(config, field) == told[field], field
    assert config.has_bias("q_proj") == told["attention_bias"]
    assert config.sliding_window == told["sliding_window"]
    assert config.family.qk_norm == told["norm_qk"]
    assert (config.rope_scaling is None) == (told["rope_scaling"] is None)
    if config.rope_scaling is not None:
        stretched = dict(told["rope_scaling"])
        length = stretched.pop("original_max_seq_len")
        stretched["original_max_position_embeddings"] = length
        assert config.rope_scaling.to_hf() == stretched
    written = config.to_hf()
    assert LlamaConfig.from_hf(written) == config
    assert {name: written[name] for name in raw} == raw
    count = sum(
        math.prod(shape) * (config.num_hidden_layers if is_stacked(path) else 1)
        for path, shape in shapes(config).items()
    )
    assert count == PUBLISHED[name]


def test_every_published_config_is_counted(shared_data):
    folders = {file.parent.name for file in shared_data.glob("configs/*/config.json")}
    assert folders == set(PUBLISHED)


@pytest.mark.parametrize("factor", [math.inf, math.nan, -1.0])
def test_rope_factors_are_positive_numbers(factor):
    with pytest.raises(UserError, match="`rope_scaling.factor` must be > 0"):
        RopeScaling("linear", factor)


def test_tensors_of_custom_modules_are_written_and_read():
    config = read(extra_tensors={GATE: [4, 64], "model.scale": []})
    assert dict(config.extra_tensors) == {GATE: (4, 64), "model.scale": ()}
    written = json.loads(json.dumps(config.to_hf()))
    assert written["extra_tensors"] == {GATE: [4, 64], "model.scale": []}
    assert LlamaConfig.from_hf(written) == config
    plain = read()
    assert plain.extra_tensors == {} and "extra_tensors" not in plain.to_hf()
    assert hash(config) != hash(plain) and config != plain
