import json

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.verify import compare
from qlora_jax.errors import CheckpointError, UserError

KEY = "model.layers.1.mlp.up_proj.weight"


def test_shards_and_a_single_file_are_the_same(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    a, b = save_model(tiny, tensors, "a"), save_model(tiny, tensors, "b", shards=3)
    found = compare(a, b)
    assert found.equal
    assert (found.kind, found.tensors) == ("model", len(tensors))


def test_every_kind_of_difference(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    other = dict(tensors)
    del other["lm_head.weight"]
    other["extra"] = np.zeros(1, np.float32)
    other[KEY] = tensors[KEY].copy()
    other[KEY][3, 4] += 0.5
    other["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    shape_key = "model.embed_tokens.weight"
    other[shape_key] = tensors[shape_key][:-1]
    nan_key = "model.layers.0.input_layernorm.weight"
    other[nan_key] = np.full(64, np.nan, np.float32)
    a = save_model(tiny, tensors, "a")
    b = save_model({**tiny, "rms_norm_eps": 0.5}, other, "b")
    found = compare(a, b)
    assert not found.equal
    assert (found.missing, found.extra) == (["lm_head.weight"], ["extra"])
    assert found.config == {"rms_norm_eps": [1e-6, 0.5]}
    different = {d.name: d for d in found.different}
    assert set(different) == {KEY, "model.norm.weight", shape_key, nan_key}
    assert different[KEY].max_abs_difference == pytest.approx(0.5, abs=1e-6)
    norm = different["model.norm.weight"]
    assert (norm.a, norm.b) == ("F32 [64]", "BF16 [64]")
    assert 0 < norm.max_abs_difference < 0.02
    assert different[shape_key].b == "F32 [23, 64]"
    assert different[shape_key].max_abs_difference is None
    assert different[nan_key].max_abs_difference is None
    assert json.loads(json.dumps(found.to_json()))["equal"] is False


def test_minus_zero_is_another_byte(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    tensors[KEY][0, 0] = 0.0
    other = {**tensors, KEY: tensors[KEY].copy()}
    other[KEY][0, 0] = -0.0
    found = compare(save_model(tiny, tensors, "a"), save_model(tiny, other, "b"))
    assert [d.max_abs_difference for d in found.different] == [0.0]


def test_adapters(tiny, make_adapter):
    a = make_adapter(tiny, name="a")
    same = make_adapter(tiny, name="same", base_model_name_or_path="elsewhere")
    assert compare(a, same).equal
    found = compare(a, make_adapter(tiny, name="alpha", lora_alpha=7))
    assert found.config == {"lora_alpha": [6, 7]}
    assert not found.equal
    found = compare(a, make_adapter(tiny, name="seed", seed=2))
    assert len(found.different) == 8
    found = compare(a, make_adapter(tiny, ("q_proj",), name="fewer"))
    assert len(found.missing) == 4
    assert found.config == {"target_modules": [["down_proj", "q_proj"], ["q_proj"]]}


def test_run_directory_stands_for_its_adapter(tiny, make_adapter, tmp_path):
    make_adapter(tiny)
    assert compare(tmp_path, tmp_path / "adapter").kind == "adapter"


def test_packed_and_dense_differ(tiny_model, tmp_path):
    out = tmp_path / "packed"
    convert.save_llama(out, *convert.load_llama(tiny_model))
    found = compare(tiny_model, out)
    assert len(found.extra) == 14 * 3
    assert len(found.different) == 14


def test_adapter_against_model(tiny, tiny_model, make_adapter):
    with pytest.raises(UserError, match="is an adapter and `.*` is a model; give two"):
        compare(make_adapter(tiny), tiny_model)


def test_unreadable_directory(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(tiny_model, tmp_path / "no")


def test_dtype_that_cannot_be_compared(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    tensors["x"] = np.zeros(4, ml_dtypes.float8_e4m3fn)
    a, b = save_model(tiny, tensors, "a"), save_model(tiny, tensors, "b")
    with pytest.raises(UserError, match="`x`: F8_E4M3 .* cannot be compared"):
        compare(a, b)
