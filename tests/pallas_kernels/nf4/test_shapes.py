import math

import pytest

from pallas_kernels.nf4.shapes import MODELS, ODD, ROWS, distinct, packed_bytes
from qlora_jax import nf4
from qlora_jax.lora.targets import linear_modules
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.params import tree_bytes
from qlora_jax.planning.estimate import abstract_base


@pytest.mark.parametrize("key", MODELS)
def test_a_model_has_the_projections_of_its_configuration(key):
    model = MODELS[key]
    modules = linear_modules(abstract_base(LlamaConfig.from_hf(model.hf_config)))
    got = {p.name: (*p.shape, p.layers) for p in model.projections}
    assert got == {path[-1]: modules[path] for path in modules if path[-1] in got}
    assert len(got) == 7


@pytest.mark.parametrize(
    "key, published", [("1b", 1.24e9), ("3b", 3.21e9), ("8b", 8.03e9), ("70b", 70.6e9)]
)
def test_the_sizes_add_up_to_the_published_number_of_parameters(key, published):
    model = MODELS[key]
    tables = 1 if model.tie_word_embeddings else 2
    norms = model.hidden_size * (2 * model.num_hidden_layers + 1)
    embeddings = tables * model.vocab_size * model.hidden_size
    total = model.quantized_weights + embeddings + norms
    assert total == pytest.approx(published, rel=4e-3)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [*ODD.values(), (14336, 4096), (1024, 8192)])
def test_packed_bytes_are_those_of_the_tensor(shape, double_quant):
    leaf = nf4.abstract(shape, double_quant=double_quant, dtype="bfloat16")
    assert packed_bytes(shape, double_quant=double_quant) == tree_bytes(leaf)


def test_shapes_are_listed_once_with_where_they_occur():
    uses = distinct(("1b", "8b"))
    assert uses[(4096, 4096)] == ["8b q_proj", "8b o_proj"]
    assert uses[(2048, 8192)] == ["1b down_proj"]
    assert sum(map(len, uses.values())) == 14
    assert len(ROWS) == len(set(ROWS)) and sorted(ROWS) == list(ROWS)


def test_odd_shapes_are_of_every_kind():
    kinds = {
        (o % 2, i % 64 == 0, i % 128 == 0, math.prod((o, i)) % 2)
        for o, i in ODD.values()
    }
    assert len(kinds) >= 6
    assert len(set(ODD.values())) == len(ODD)
