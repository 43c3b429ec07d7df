import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert import bnb
from convert.files import Mismatches, TensorFiles, read_header
from convert.output import write_safetensors
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import quantize

FRAGMENTS = ("llama_1b_nf4", "llama_1b_nf4_double_quant")
Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def open_file(path: Path) -> TensorFiles:
    return TensorFiles(path.parent, read_header(path)[0])


@pytest.mark.real
@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_dequantize_as_on_cuda_and_are_written_back(
    shared_data, tmp_path, name
):
    files = open_file(shared_data / "bnb-fragments" / f"{name}.safetensors")
    key = "model.layers.0.mlp.gate_proj.weight"
    text = files.read_bytes(f"{key}.quant_state.bitsandbytes__nf4").tobytes()
    shape = tuple(json.loads(text)["shape"])
    problems = Mismatches("fragment")
    state, parts = bnb.check(files, key, shape, problems)
    problems.check()
    assert set(parts) == {n for n in files if n.startswith(key)}
    tensor = bnb.read(files, key, state)
    got = bnb.dequantize(tensor)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        got.reshape(-1).view(np.uint16), files.read("expected_bf16").view(np.uint16)
    )
    out = tmp_path / "out.safetensors"
    write_safetensors(out, bnb.entries(key, tensor, None, quant_storage="uint8"), {})
    back = open_file(out)
    assert set(back) == set(parts)
    for part in parts:
        assert (back[part].dtype, back[part].shape) == (
            files[part].dtype,
            files[part].shape,
        )
        assert back.read_bytes(part).tobytes() == files.read_bytes(part).tobytes()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (4, 192), (300, 64)])
def test_any_shape_and_storage_comes_back(tmp_path, shape, storage, double_quant):
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    tensor = quantize(weight, double_quant=double_quant)
    if bnb.storage_problem(tensor, storage) is not None:
        size = np.dtype(storage if storage != "bfloat16" else "uint16").itemsize
        assert -(-weight.size // 2) % size
        return
    out = tmp_path / "x.safetensors"
    write_safetensors(out, bnb.entries("w", tensor, None, quant_storage=storage), {})
    files = open_file(out)
    assert files["w"].shape[1] == 1
    problems = Mismatches("x")
    state, parts = bnb.check(files, "w", shape, problems)
    problems.check()
    assert sorted(parts) == sorted(files)
    back = bnb.read(files, "w", state)
    assert jax.tree.structure(back) == jax.tree.structure(tensor)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tensor), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["llama32/nf4", "llama32/nf4_dq", "llama2/nf4"])
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_quant_storage_is_another_view_of_the_same_bytes(
    golden, tmp_path, name, storage
):
    config, base = convert.load_llama(golden / name)
    out = tmp_path / "out"
    convert.save_llama(out, config, base, quant_storage=storage)
    raw = json.loads((out / "config.json").read_text())
    assert raw["quantization_config"]["bnb_4bit_quant_storage"] == storage
    _, back = convert.load_llama(out)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)
    # Kept when it is saved again: the law holds for such files too.
    convert.save_llama(tmp_path / "again", *convert.load_llama(out))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


def test_storage_that_does_not_divide_the_bytes(
    tiny, make_tensors, save_model, tmp_path
):
    raw = {**tiny, "intermediate_size": 7, "hidden_size": 8, "num_attention_heads": 1}
    raw["num_key_value_heads"] = 1
    config, base = convert.load_llama(save_model(raw, make_tensors(raw)))
    with pytest.raises(UserError, match="`quant_storage`='int3' is not known; exp"):
        convert.save_llama(tmp_path / "out", config, base, quant_storage="int3")
    convert.save_llama(tmp_path / "out", config, base, quant_storage="float32")
    raw["intermediate_size"] = 9
    raw["hidden_size"] = 6
    config, base = convert.load_llama(save_model(raw, make_tensors(raw), "odd"))
    message = "bytes of codes .*are not a multiple of the size of float32; use quant_st"
    with pytest.raises(UserError, match=message):
        convert.save_llama(tmp_path / "no", config, base, quant_storage="float32")


# --- Files that are not as they should be ---


@pytest.fixture
def packed(tiny_model, tmp_path) -> Path:
    """A double-quantized checkpoint on disk, to be damaged."""
    out = tmp_path / "packed"
    convert.save_llama(out, *convert.load_llama(tiny_model, quantization="nf4_dq"))
    return out


def set_state(packed: Path, edit_tensors, **fields) -> None:
    def change(tensors):
        state = json.loads(tensors[STATE].tobytes())
        for name, value in fields.items():
            if value is None:
                del state[name]
            else:
                state[name] = value
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    edit_tensors(packed / "model.safetensors", change)


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(blocksize=128), "`blocksize` is 128; only 64"),
        (dict(quant_type="fp4"), "`quant_type` is 'fp4'; only 'nf4'"),
        (dict(dtype="int8"), "`dtype` is 'int8'; expected a 16 or 32-bit float"),
        (dict(nested_blocksize=128), "`nested_blocksize` is 128; only 256"),
        (dict(nested_dtype="float16"), "`nested_dtype` is 'float16', not float32"),
        (dict(nested_offset=float("nan")), "`nested_offset` is nan"),
        (dict(nested_offset=None), "nested_offset"),
        (dict(shape=[64]), "not enough values"),
        (dict(shape=[32, 128]), r"q_proj.weight \[32, 128\] instead of \[64, 64\]"),
    ],
)
def test_state_that_is_not_supported(packed, edit_tensors, fields, match):
    set_state(packed, edit_tensors, **fields)
    with pytest.raises(CheckpointError, match=match):
        convert.load_llama(packed)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"3"])
def test_state_that_is_no_json_object(packed, edit_tensors, text):
    def change(tensors):
        tensors[STATE] = np.frombuffer(text, np.uint8)

    edit_tensors(packed / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=f"1 unusable quantization.*{STATE}"):
        convert.load_llama(packed)


@pytest.mark.parametrize(
    "part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
def test_missing_part(packed, edit_tensors, part):
    edit_tensors(packed / "model.safetensors", lambda t: t.pop(Q + part))
    with pytest.raises(CheckpointError, match=f"1 missing tensors: {Q}{part}[.]$"):
        convert.load_llama(packed)


@pytest.mark.parametrize(
    "part, dtype, size",
    [
        ("", "U8", "2047 bytes instead of 2048"),
        (".absmax", "U8", r"\[63\] instead of \[64\]"),
        (".quant_map", "F32", r"\[15\] instead of \[16\]"),
        (".nested_absmax", "F32", r"\[0\] instead of \[1\]"),
        (".nested_quant_map", "F32", r"\[255\] instead of \[256\]"),
    ],
)
def test_part_of_another_size_or_dtype(packed, edit_tensors, part, dtype, size):
    file = packed / "model.safetensors"
    good = safetensors.numpy.load_file(file)[Q + part]

    def put(value):
        edit_tensors(file, lambda t: t.update({Q + part: value}))

    put(good.reshape(-1)[:-1])
    with pytest.raises(CheckpointError, match=f"another shape: {Q}{part} {size}"):
        convert.load_llama(packed)
    put(good.astype(np.int64))
    match = f"another dtype: {Q}{part} I64 instead of {dtype}"
    with pytest.raises(CheckpointError, match=match):
        convert.load_llama(packed)


def test_table_of_other_values(packed, edit_tensors):
    def change(tensors):
        changed = tensors[f"{Q}.quant_map"].copy()
        changed[3] = np.nextafter(changed[3], np.float32(1))
        tensors[f"{Q}.quant_map"] = changed

    edit_tensors(packed / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=f"not NF4's: {Q}.quant_map"):
        convert.load_llama(packed)


@pytest.mark.parametrize("part", ["absmax", "nested_absmax"])
def test_scales_that_are_not_finite(tiny_model, tmp_path, edit_tensors, part):
    out = tmp_path / "packed"
    quantization = "nf4" if part == "absmax" else "nf4_dq"
    convert.save_llama(out, *convert.load_llama(tiny_model, quantization=quantization))

    def change(tensors):
        tensors[f"{Q}.{part}"] = np.full_like(tensors[f"{Q}.{part}"], np.nan)

    edit_tensors(out / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=f"Tensor `{Q}` contains NaN"):
        convert.load_llama(out)


def test_fp4_is_refused_by_name(packed, edit_tensors):
    def change(tensors):
        tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)

    edit_tensors(packed / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=f"FP4, which is not supported.*: {Q}"):
        convert.load_llama(packed)


def test_quantized_head_is_refused(packed, edit_tensors):
    def change(tensors):
        head = quantize(tensors.pop("lm_head.weight"), double_quant=False)
        for entry in bnb.entries("lm_head.weight", head, None, quant_storage="uint8"):
            tensors[entry.name] = entry.read()

    edit_tensors(packed / "model.safetensors", change)
    with pytest.raises(CheckpointError, match="must stay 16-bit .*: lm_head.weight"):
        convert.load_llama(packed)


# --- Modules left dense ---


def unpack(packed: Path, edit_tensors, keys) -> dict[str, np.ndarray]:
    put = {}

    def change(tensors):
        for key in keys:
            shape = json.loads(
                tensors[f"{key}.quant_state.bitsandbytes__nf4"].tobytes()
            )["shape"]
            for name in [n for n in tensors if n.startswith(key)]:
                del tensors[name]
            put[key] = np.full(shape, 0.25, ml_dtypes.bfloat16)
        tensors.update(put)

    edit_tensors(packed / "model.safetensors", change)
    return put


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_modules_left_in_16_bit_stay_so(packed, edit_tensors, tmp_path, quantization):
    keys = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    unpack(packed, edit_tensors, keys)
    config, base = convert.load_llama(packed, quantization=quantization)
    attention = base["model"]["layers"]["self_attn"]
    assert attention["q_proj"]["weight"].dtype == ml_dtypes.bfloat16
    assert attention["q_proj"]["weight"].shape == (2, 64, 64)
    assert attention["k_proj"]["weight"].double_quant
    convert.save_llama(tmp_path / "out", config, base)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        packed / "model.safetensors"
    ).read_bytes()


def test_new_config_names_what_was_left_dense(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model)
    _, dense = convert.load_llama(tiny_model, quantization=None)
    base["model"]["layers"]["mlp"] = dense["model"]["layers"]["mlp"]
    convert.save_llama(tmp_path / "out", config, base)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization_config"]["llm_int8_skip_modules"] == [
        "lm_head",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert not raw["quantization_config"]["bnb_4bit_use_double_quant"]


@pytest.mark.golden
def test_new_config_is_the_one_transformers_writes(golden, tmp_path):
    config, base = convert.load_llama(golden / "llama32/fp32", quantization="nf4_dq")
    convert.save_llama(tmp_path / "out", config, base)
    ours, theirs = (
        json.loads((d / "config.json").read_text())
        for d in (tmp_path / "out", golden / "llama32/nf4_dq")
    )
    assert ours == theirs


def test_old_quantization_config_without_packed_weights_counts_as_dense(
    tiny, make_tensors, save_model, tmp_path
):
    raw = {
        **tiny,
        "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }
    path = save_model(raw, make_tensors(raw))
    config, base = convert.load_llama(path, quantization=None)
    assert not any(
        model_params.is_projection(p) and hasattr(v, "codes")
        for p, v in trees.walk(base)
    )
    convert.save_llama(tmp_path / "out", config, base)
    assert "quantization_config" not in json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )


def test_packed_weights_need_no_quantization_config(packed):
    file = packed / "config.json"
    raw = json.loads(file.read_text())
    del raw["quantization_config"]
    file.write_text(json.dumps(raw))
    config, base = convert.load_llama(packed, quantization=None)
    assert isinstance(config, LlamaConfig)
    assert base["model"]["layers"]["mlp"]["up_proj"]["weight"].double_quant
