import itertools
from pathlib import Path

import pytest

from convert import names
from convert.files import open_model, read_json
from qlora_jax.config import LlamaConfig

MODELS = ("llama32/fp32", "llama2/fp32_sharded", "llamabias/fp32")


def config(**changes) -> LlamaConfig:
    fields = dict(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
    )
    return LlamaConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    "tied, attention_bias, mlp_bias", [*itertools.product([False, True], repeat=3)]
)
def test_parse_is_the_inverse_of_spell(tied, attention_bias, mlp_bias):
    c = config(
        tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias
    )
    table = names.keys(c)
    for key, (path, layer) in table.items():
        assert names.parse_key(key) == (path, layer)
        assert names.hf_key(path, layer) == key
    stacked = sum(names.is_stacked(p) for p in names.shapes(c))
    plain = len(names.shapes(c)) - stacked
    assert len(table) == 3 * stacked + plain
    assert stacked == 9 + 4 * attention_bias + 3 * mlp_bias
    assert plain == (2 if tied else 3)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_table_lists_exactly_the_keys_and_shapes_of_hf(golden: Path, name):
    path = golden / name
    c = LlamaConfig.from_hf(read_json(path / "config.json"))
    files, shapes = open_model(path), names.shapes(c)
    assert set(names.keys(c)) == set(files)
    for key, (where, _) in names.keys(c).items():
        assert files[key].shape == shapes[where]


def test_number_with_leading_zero_is_no_layer():
    assert names.parse_key("model.layers.03.mlp.up_proj.weight")[1] is None


def test_peft_key_is_peft_spelling():
    module = ("model", "layers", "self_attn", "q_proj")
    assert (
        names.peft_key(module, 3, "lora_A")
        == "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    )
    assert (
        names.peft_key(("lm_head",), None, "lora_B")
        == "base_model.model.lm_head.lora_B.weight"
    )


def test_grouped_heads_and_explicit_head_dim_give_the_shapes():
    shapes = names.shapes(config())
    layer = {p[-2]: s for p, s in shapes.items() if names.is_projection(p)}
    assert layer == {
        "q_proj": (12, 8),
        "k_proj": (6, 8),
        "v_proj": (6, 8),
        "o_proj": (8, 12),
        "gate_proj": (12, 8),
        "up_proj": (12, 8),
        "down_proj": (8, 12),
    }
