import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert
from convert import bnb
from convert.files import Mismatches, TensorFiles, read_header
from convert.output import Entry, write_safetensors
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.nf4 import NF4_CODE, quantize
from tests.convert.reference import (
    MODEL,
    edit_json,
    equal_arrays,
    pack,
    read,
    same_file,
)

FRAGMENTS = ("llama_1b_nf4", "llama_1b_nf4_double_quant")
Q = "model.layers.1.self_attn.q_proj.weight"
SUFFIX = ".quant_state.bitsandbytes__nf4"
STATE = f"{Q}{SUFFIX}"


def open_file(path: Path) -> TensorFiles:
    return TensorFiles(path.parent, read_header(path)[0])


def read_checked(files: TensorFiles, key: str, shape):
    """A weight, and the names of its tensors."""
    problems = Mismatches("x")
    state, parts = bnb.check(files, key, shape, problems)
    problems.check()
    return bnb.read(files, key, state), parts


@pytest.mark.real
@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_dequantize_as_on_cuda_and_come_back(shared_data, tmp_path, name):
    files = open_file(shared_data / "bnb-fragments" / f"{name}.safetensors")
    key = "model.layers.0.mlp.gate_proj.weight"
    shape = tuple(json.loads(files.read_bytes(key + SUFFIX).tobytes())["shape"])
    tensor, parts = read_checked(files, key, shape)
    assert set(parts) == {n for n in files if n.startswith(key)}
    expected = files.read("expected_bf16").view(ml_dtypes.bfloat16)
    got = bnb.dequantize(tensor)
    assert got.dtype == ml_dtypes.bfloat16
    assert got.tobytes() == expected.tobytes()
    out = tmp_path / "out.safetensors"
    write_safetensors(out, bnb.entries(key, tensor, None, quant_storage="uint8"), {})
    back = open_file(out)
    assert set(back) == set(parts)
    for n in parts:
        assert (back[n].dtype, back[n].shape) == (files[n].dtype, files[n].shape)
        assert back.read_bytes(n).tobytes() == files.read_bytes(n).tobytes()


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
    back, parts = read_checked(files, "w", shape)
    assert sorted(parts) == sorted(files)
    assert equal_arrays(back, tensor)


@pytest.mark.parametrize("block_size", [32, 128, 256])
@pytest.mark.parametrize("shape", [(8, 256), (6, 64), (3, 65)])
def test_blocks_of_other_sizes_are_read_and_come_back(tmp_path, shape, block_size):
    rng = np.random.default_rng(0)
    size, out = shape[0] * shape[1], tmp_path / "x.safetensors"
    codes = rng.integers(0, 256, -(-size // 2), np.uint8)
    absmax = rng.uniform(0.5, 1, -(-size // block_size)).astype(np.float32)
    raw = {"quant_type": "nf4", "blocksize": block_size, "dtype": "float32"}
    tensors = {
        "w": codes.reshape(-1, 1),
        "w.absmax": absmax,
        "w.quant_map": NF4_CODE,
        f"w{SUFFIX}": np.frombuffer(
            json.dumps({**raw, "shape": list(shape)}).encode(), np.uint8
        ),
    }
    write_safetensors(out, [Entry.of(n, t) for n, t in tensors.items()], {})
    tensor, _ = read_checked(open_file(out), "w", shape)
    index = np.stack([codes >> 4, codes & 15], -1).reshape(-1)[:size]
    want = (NF4_CODE[index] * np.repeat(absmax, block_size)[:size]).reshape(shape)
    np.testing.assert_array_equal(bnb.dequantize(tensor), want)
    again = bnb.entries("w", tensor, None, quant_storage="uint8")
    assert {e.name: e.read().tobytes() for e in again} == {
        name: value.tobytes() for name, value in tensors.items()
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", ["llama32/nf4", "llama32/nf4_dq", "llama2/nf4"])
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_quant_storage_is_a_view_of_the_same_bytes(golden, tmp_path, name, storage):
    config, base = convert.load_llama(golden / name)
    out = tmp_path / "out"
    convert.save_llama(out, config, base, quant_storage=storage)
    assert read(out)["quantization_config"]["bnb_4bit_quant_storage"] == storage
    assert equal_arrays(convert.load_llama(out)[1], base)
    # Kept when it is saved again: the law holds for such files too.
    assert same_file(pack(out, tmp_path / "again"), out)


def test_storage_that_does_not_divide_the_bytes(make_model, tmp_path):
    one = {"num_attention_heads": 1, "num_key_value_heads": 1}
    path = make_model(intermediate_size=7, hidden_size=8, **one)
    config, base = convert.load_llama(path)
    with pytest.raises(UserError, match="`quant_storage`='int3' is not known; exp"):
        convert.save_llama(tmp_path / "out", config, base, quant_storage="int3")
    convert.save_llama(tmp_path / "out", config, base, quant_storage="float32")
    path = make_model(name="odd", intermediate_size=9, hidden_size=6, **one)
    config, base = convert.load_llama(path)
    message = "bytes of codes .*are not a multiple of the size of float32; use quant_st"
    with pytest.raises(UserError, match=message):
        convert.save_llama(tmp_path / "no", config, base, quant_storage="float32")


# --- Files that are not as they should be ---


@pytest.fixture
def packed(tiny_model, tmp_path) -> Path:
    """A double-quantized checkpoint on disk, to be damaged."""
    return pack(tiny_model, tmp_path / "packed", "nf4_dq")


def text_of_state(text: bytes):
    return lambda t: t.update({STATE: np.frombuffer(text, np.uint8)})


def state(**fields):
    def change(tensors):
        raw = {**json.loads(tensors[STATE].tobytes()), **fields}
        raw = {name: value for name, value in raw.items() if value is not None}
        text_of_state(json.dumps(raw).encode())(tensors)

    return change


def part(name: str, value):
    """A change: another array in the place of a part of a weight."""
    return lambda t: t.update({Q + name: value(t[Q + name])})


def next_value(table):
    table = table.copy()
    table[3] = np.nextafter(table[3], np.float32(1))
    return table


def call_fp4(tensors):
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


def quantize_embedding(tensors):
    key = "model.embed_tokens.weight"
    table = quantize(tensors.pop(key), double_quant=False)
    for entry in bnb.entries(key, table, None, quant_storage="uint8"):
        tensors[entry.name] = entry.read()


PARTS = [
    ("", "U8", "2047 bytes instead of 2048"),
    (".absmax", "U8", r"\[63\] instead of \[64\]"),
    (".quant_map", "F32", r"\[15\] instead of \[16\]"),
    (".nested_absmax", "F32", r"\[0\] instead of \[1\]"),
    (".nested_quant_map", "F32", r"\[255\] instead of \[256\]"),
]
DAMAGES = [
    (state(blocksize=96), "`blocksize` is 96; expected one of 32, 64, 128"),
    (state(blocksize=64.0), "`blocksize` is 64.0; expected"),
    (state(blocksize=128), r"absmax \[64\] instead of \[32\]"),
    (state(quant_type="fp4"), "`quant_type` is 'fp4'; only 'nf4'"),
    (state(dtype="int8"), "`dtype` is 'int8'; expected a 16 or 32-bit float"),
    (state(nested_blocksize=128), "`nested_blocksize` is 128; only 256"),
    (state(nested_dtype="float16"), "`nested_dtype` is 'float16'; only 'float32'"),
    *(
        (state(nested_offset=value), "`nested_offset` is .*, not a float32")
        for value in (float("nan"), float("inf"), 10**400, 1e300, None, True, "0", [])
    ),
    *(
        (state(shape=value), "`shape` is .*; expected two sizes")
        for value in ([64], [64] * 3, [True, 64], [64.0, 64], [-1, 64], "64", None)
    ),
    (state(quant_type=["nf4"]), r"`quant_type` is \['nf4'\]; only"),
    (state(dtype={}), "`dtype` is {}; expected"),
    (state(shape=[32, 128]), r"q_proj.weight \[32, 128\] instead of \[64, 64\]"),
    *(
        (text_of_state(text), f"1 unusable quantization.*{STATE}")
        for text in (b"{", b"\xff", b"3", b"[" * 9000, b" " * 20_000)
    ),
    *(
        (lambda t, name=name: t.pop(Q + name), f"1 missing tensors: {Q}{name}[.]$")
        for name, *_ in PARTS
    ),
    *(
        (part(name, lambda a: a.reshape(-1)[:-1]), f"another shape: {Q}{name} {size}")
        for name, _, size in PARTS
    ),
    *(
        (
            part(name, lambda a: a.astype(np.int64)),
            f"another dtype: {Q}{name} I64 instead of {dtype}",
        )
        for name, dtype, _ in PARTS
    ),
    (part(".quant_map", next_value), f"not NF4's: {Q}.quant_map"),
    (
        part(".nested_absmax", lambda a: np.full_like(a, np.nan)),
        f"Tensor `{Q}` contains NaN",
    ),
    (
        part(".nested_quant_map", lambda a: np.full_like(a, np.nan)),
        f"Tensor `{Q}` contains NaN",
    ),
    (call_fp4, f"FP4, which is not supported.*: {Q}"),
    (quantize_embedding, "must stay 16-bit .*: model.embed_tokens.weight"),
]


@pytest.mark.parametrize("change, match", DAMAGES)
def test_a_damaged_weight_is_refused_by_name(packed, edit_tensors, change, match):
    edit_tensors(packed / MODEL, change)
    with pytest.raises(CheckpointError, match=match):
        convert.load_llama(packed)


def test_scales_that_are_not_finite(tiny_model, tmp_path, edit_tensors):
    out = pack(tiny_model, tmp_path / "packed", "nf4")
    edit_tensors(out / MODEL, part(".absmax", lambda a: np.full_like(a, np.nan)))
    with pytest.raises(CheckpointError, match=f"Tensor `{Q}` contains NaN"):
        convert.load_llama(out)


def test_scales_beyond_the_dtype_of_the_weights(tiny_model, tmp_path, edit_tensors):
    """1e5 is a float32, and infinite in float16, to which weights are rounded."""
    out = pack(tiny_model, tmp_path / "packed", "nf4")
    edit_tensors(out / MODEL, part(".absmax", lambda a: np.full_like(a, 1e5)))
    convert.load_llama(out)
    edit_tensors(out / MODEL, state(dtype="float16"))
    with pytest.raises(CheckpointError, match=f"`{Q}` has scales beyond .* float16"):
        convert.load_llama(out, dtype="float32")


# --- Modules left dense ---


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_modules_left_in_16_bit_stay_so(packed, edit_tensors, tmp_path, quantization):
    def unpack(tensors):
        for key in (Q, Q.replace("1", "0")):
            for name in [n for n in tensors if n.startswith(key)]:
                del tensors[name]
            tensors[key] = np.full((64, 64), 0.25, ml_dtypes.bfloat16)

    made = {**read(packed)["quantization_config"], "bnb_4bit_compute_dtype": "float16"}
    edit_json(packed / "config.json", quantization_config=made)
    edit_tensors(packed / MODEL, unpack)
    config, base = convert.load_llama(packed, quantization=quantization)
    attention = base["model"]["layers"]["self_attn"]
    assert attention["q_proj"]["weight"].dtype == ml_dtypes.bfloat16
    assert attention["q_proj"]["weight"].shape == (2, 64, 64)
    assert attention["k_proj"]["weight"].double_quant
    convert.save_llama(tmp_path / "out", config, base)
    assert same_file(tmp_path / "out", packed)
    kept = read(tmp_path / "out")["quantization_config"]
    assert kept["bnb_4bit_compute_dtype"] == "float16"


def test_new_config_names_what_was_left_dense(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model)
    _, dense = convert.load_llama(tiny_model, quantization=None)
    base["model"]["layers"]["mlp"] = dense["model"]["layers"]["mlp"]
    convert.save_llama(tmp_path / "out", config, base)
    made = read(tmp_path / "out")["quantization_config"]
    skipped = ["lm_head", "gate_proj", "up_proj", "down_proj"]
    assert made["llm_int8_skip_modules"] == skipped
    assert not made["bnb_4bit_use_double_quant"]


@pytest.mark.golden
def test_new_config_is_the_one_transformers_writes(golden, tmp_path):
    out = pack(golden / "llama32/fp32", tmp_path / "out", "nf4_dq")
    assert read(out) == read(golden / "llama32/nf4_dq")


def test_the_tensors_say_what_is_packed_not_the_config(make_model, packed, tmp_path):
    old = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path = make_model(name="dense", quantization_config=old)
    config, base = convert.load_llama(path, quantization=None)
    layers = base["model"]["layers"]
    assert layers["mlp"]["up_proj"]["weight"].dtype == np.float32
    convert.save_llama(tmp_path / "out", config, base)
    assert "quantization_config" not in read(tmp_path / "out")

    edit_json(packed / "config.json", quantization_config="REMOVED")
    _, base = convert.load_llama(packed, quantization=None)
    assert base["model"]["layers"]["mlp"]["up_proj"]["weight"].double_quant
