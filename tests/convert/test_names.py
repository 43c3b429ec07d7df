import itertools
from pathlib import Path

import jax
import pytest

from convert.checkpoint import open_model
from convert.names import checkpoint_keys
from qlora_jax import tree as trees
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from tests.convert.reference import read

MODELS = ("llama32/fp32", "llama2/fp32_sharded", "llamabias/fp32")


def config(**changes) -> LlamaConfig:
    fields = {
        **{"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "head_dim": 6},
        **{"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    return LlamaConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    "tied, attention_bias, mlp_bias", [*itertools.product([False, True], repeat=3)]
)
def test_parse_key_inverts_hf_key(tied, attention_bias, mlp_bias):
    c = config(
        tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias
    )
    table, shapes = checkpoint_keys(c), model_params.shapes(c)
    for key, (path, layer) in table.items():
        assert trees.parse_key(key) == (path, layer)
        assert trees.hf_key(path, layer) == key
    stacked = sum(map(trees.is_stacked, shapes))
    plain = len(shapes) - stacked
    assert len(table) == 3 * stacked + plain
    assert stacked == 9 + 4 * attention_bias + 3 * mlp_bias
    assert plain == (2 if tied else 3)
    # The abstract tree has the shapes of the table, layers in front.
    assert {
        path: leaf.shape for path, leaf in trees.walk(model_params.abstract_base(c))
    } == {p: (3, *s) if trees.is_stacked(p) else s for p, s in shapes.items()}


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_table_lists_exactly_the_keys_and_shapes_of_hf(golden: Path, name):
    c = LlamaConfig.from_hf(read(golden / name))
    files, shapes = open_model(golden / name), model_params.shapes(c)
    table = {key: shapes[where] for key, (where, _) in checkpoint_keys(c).items()}
    assert table == {key: files[key].shape for key in files}


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


def test_grouped_heads_and_explicit_head_dim_give_the_shapes():
    layers = model_params.abstract_base(config())["model"]["layers"]
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], layers)
    assert {name: leaf["weight"] for name, leaf in shapes["self_attn"].items()} == {
        **{"q_proj": (12, 8), "k_proj": (6, 8), "v_proj": (6, 8), "o_proj": (8, 12)}
    }
    assert {name: leaf["weight"] for name, leaf in shapes["mlp"].items()} == {
        **{"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    }
