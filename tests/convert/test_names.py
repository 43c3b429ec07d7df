import itertools
from pathlib import Path

import pytest

from convert.checkpoint import open_model
from convert.files import read_json
from convert.names import PEFT_PREFIX, checkpoint_keys
from qlora_jax import tree as trees
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig

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
def test_parse_key_inverts_hf_key(tied, attention_bias, mlp_bias):
    c = config(
        tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias
    )
    table = checkpoint_keys(c)
    for key, (path, layer) in table.items():
        assert trees.parse_key(key) == (path, layer)
        assert trees.hf_key(path, layer) == key
    stacked = sum(trees.is_stacked(p) for p in model_params.shapes(c))
    plain = len(model_params.shapes(c)) - stacked
    assert len(table) == 3 * stacked + plain
    assert stacked == 9 + 4 * attention_bias + 3 * mlp_bias
    assert plain == (2 if tied else 3)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_table_lists_exactly_the_keys_and_shapes_of_hf(golden: Path, name):
    path = golden / name
    c = LlamaConfig.from_hf(read_json(path / "config.json"))
    files, shapes = open_model(path), model_params.shapes(c)
    assert set(checkpoint_keys(c)) == set(files)
    for key, (where, _) in checkpoint_keys(c).items():
        assert files[key].shape == shapes[where]


def test_module_names_of_peft_have_a_prefix_and_are_those_of_hf_behind_it():
    module = ("model", "layers", "self_attn", "q_proj")
    key = f"{PEFT_PREFIX}{trees.hf_key(module, 3)}"
    assert key == "base_model.model.model.layers.3.self_attn.q_proj"
    head = f"{PEFT_PREFIX}{trees.hf_key(('lm_head',))}"
    assert head == "base_model.model.lm_head"
    assert trees.parse_key(key.removeprefix(PEFT_PREFIX)) == (module, 3)


def test_tensors_of_custom_modules_are_in_the_table_and_in_the_tree():
    extra = {"model.layers.self_attn.gate.weight": (4, 8), "model.scale": ()}
    c = config(extra_tensors=extra)
    gate = ("model", "layers", "self_attn", "gate", "weight")
    assert model_params.shapes(c)[gate] == (4, 8)
    table = checkpoint_keys(c)
    for layer in range(3):
        key = f"model.layers.{layer}.self_attn.gate.weight"
        assert table[key] == (gate, layer) == trees.parse_key(key)
    assert table["model.scale"] == (("model", "scale"), None)
    assert len(table) == len(checkpoint_keys(config())) + 4
    tree = model_params.abstract_base(c)
    assert tree["model"]["layers"]["self_attn"]["gate"]["weight"].shape == (3, 4, 8)
    assert tree["model"]["scale"].shape == ()


def test_the_abstract_tree_has_the_shapes_of_the_table():
    c = config(attention_bias=True)
    leaves = dict(trees.walk(model_params.abstract_base(c)))
    assert {
        path: leaf.shape[trees.is_stacked(path) :] for path, leaf in leaves.items()
    } == model_params.shapes(c)
    stacked = [leaf for path, leaf in leaves.items() if trees.is_stacked(path)]
    assert {leaf.shape[0] for leaf in stacked} == {3}


def test_grouped_heads_and_explicit_head_dim_give_the_shapes():
    shapes = model_params.shapes(config())
    layer = {p[-2]: s for p, s in shapes.items() if model_params.is_projection(p)}
    assert layer == {
        "q_proj": (12, 8),
        "k_proj": (6, 8),
        "v_proj": (6, 8),
        "o_proj": (8, 12),
        "gate_proj": (12, 8),
        "up_proj": (12, 8),
        "down_proj": (8, 12),
    }
