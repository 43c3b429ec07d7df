import copy
import pickle

import pytest

from qlora_jax.tree import FrozenDict, dotted, hf_key, is_stacked, parse_key


def test_a_frozen_dict_compares_and_hashes_in_its_order_and_cannot_be_changed():
    one, two = FrozenDict(a=1, b=2), FrozenDict(b=2, a=1)
    assert one == {"a": 1, "b": 2} and hash(one) == hash(FrozenDict(a=1, b=2))
    assert one != two and dict(one) == dict(two)
    for name, args in (
        *(("__setitem__", ("c", 3)), ("__delitem__", "a"), ("setdefault", ("c", 3))),
        *(("update", [{"c": 3}]), ("pop", "a"), ("popitem", ()), ("clear", ())),
    ):
        with pytest.raises(TypeError, match="a FrozenDict cannot be changed"):
            getattr(one, name)(*args)
    assert one == {"a": 1, "b": 2}
    for same in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert same == one and type(same) is FrozenDict


Q_PROJ = ("model", "layers", "self_attn", "q_proj")


@pytest.mark.parametrize(
    "path, layer, key",
    [
        (Q_PROJ, 3, "model.layers.3.self_attn.q_proj"),
        (("model", "layers", "scale"), 0, "model.layers.0.scale"),
        (("model", "norm", "weight"), None, "model.norm.weight"),
        (("lm_head",), None, "lm_head"),
    ],
)
def test_a_key_is_parsed_to_the_path_that_spells_it(path, layer, key):
    assert hf_key(path, layer) == key
    assert parse_key(key) == (path, layer)
    assert is_stacked(path) == (layer is not None)


def test_a_number_with_a_leading_zero_is_not_a_layer():
    assert parse_key("model.layers.03.mlp.up_proj.weight")[1] is None


def test_dotted_spells_every_layer():
    assert dotted(("lm_head",), None) == ["lm_head"]
    assert dotted(Q_PROJ, 2) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
