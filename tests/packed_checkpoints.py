"""4-bit checkpoints with damaged tensors, and their weights worked out in numpy."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import safetensors.numpy

from convert import checkpoint_keys, load_llama, save_llama
from qlora_jax.models import LlamaConfig, shapes
from qlora_jax.nf4 import NF4_CODE
from tests.convert.test_fuzz import MODEL, Rng, change_bytes, change_header, change_json

# Blocks and groups of blocks of which the last is not full.
CONFIG = {**MODEL, "hidden_size": 24, "intermediate_size": 700, "vocab_size": 8}
WEIGHTS = "model.safetensors"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE = ".quant_state.bitsandbytes__nf4"
SCALES = (
    *(np.nan, np.inf, -np.inf, 3.4028235e38, -3.4e38, 1e38, 1e5, 65504, 65520),
    *(0.0, -0.0, 1e-45, -1.0, 1e-38),
)


@functools.cache
def sound_files() -> list[bytes]:
    """A file of each form and dtype."""
    rng, files = np.random.default_rng(0), []
    config = LlamaConfig.from_hf(CONFIG)
    dense = {}
    for key, (path, _) in checkpoint_keys(config).items():
        dense[key] = rng.normal(size=shapes(config)[path]).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        for quantization in ("nf4", "nf4_dq"):
            for dtype in ("float32", "float16", "bfloat16"):
                source, packed = (Path(name, quantization, dtype, d) for d in "ab")
                source.mkdir(parents=True)
                (source / "config.json").write_text(json.dumps(CONFIG))
                tensors = {k: v.astype(dtype) for k, v in dense.items()}
                safetensors.numpy.save_file(tensors, source / WEIGHTS)
                save_llama(packed, *load_llama(source, quantization=quantization))
                files.append((packed / WEIGHTS).read_bytes())
    return files


def _parse(data: bytes) -> dict[str, Any]:
    """Name -> [safetensors' dtype, shape, bytes]."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    rest = data[8 + length :]
    return {
        name: [info["dtype"], info["shape"], rest[slice(*info["data_offsets"])]]
        for name, info in header.items()
    }


def _join(tensors: dict[str, Any]) -> bytes:
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [end, end := end + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    contents = b"".join(data for _, _, data in tensors.values())
    return len(text).to_bytes(8, "little") + text + contents


def damaged_file(rng: Rng) -> bytes:
    """A sound file with one to four damages, of values for the most part."""
    files = sound_files()
    data = files[int(rng.integers(len(files)))]
    if rng.random() < 0.1:
        return change_header(rng, data)
    if rng.random() < 0.1:
        return change_bytes(rng, data)
    tensors = _parse(data)
    packed = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    for _ in range(int(rng.integers(1, 5))):
        key = packed[int(rng.integers(len(packed)))]
        names = [key, *(key + p for p in (STATE, *PARTS) if key + p in tensors)]
        _damage(rng, tensors[names[int(rng.integers(len(names)))]])
    return _join(tensors)


def _damage(rng: Rng, tensor: list[Any]) -> None:
    dtype, shape, data = tensor
    kind = int(rng.integers(12))
    if kind == 0 and len(data) % 4 == 0:  # the same bytes, called something else
        dtype = ("U8", "F32", "F16", "BF16", "I32", "I8")[int(rng.integers(6))]
        size = {"U8": 1, "I8": 1, "F32": 4, "I32": 4}.get(dtype, 2)
        shape = [len(data) // size, 1]
    elif kind == 1:
        shape = [*shape, 1] if rng.random() < 0.5 else [1, *shape]
    elif data[:1] == b"{":
        try:
            data = change_json(rng, data)
        except ValueError:  # it is not JSON any longer
            data = change_bytes(rng, data)
        shape = [len(data)]
    elif dtype == "F32":
        values = np.frombuffer(data, np.float32).copy()
        one = np.float32(SCALES[int(rng.integers(len(SCALES)))])
        if kind < 4:
            values[:] = one
        elif kind < 10:
            values[rng.integers(len(values), size=int(rng.integers(1, 4)))] = one
        else:
            values.view(np.uint32)[rng.integers(len(values))] ^= np.uint32(
                1 << int(rng.integers(32))
            )
        data = values.tobytes()
    else:
        octets = np.frombuffer(data, np.uint8).copy()
        octets[rng.integers(len(octets), size=int(rng.integers(1, 9)))] = rng.integers(
            256
        )
        data = octets.tobytes()
    tensor[:] = dtype, shape, data


def expected_weight(data: bytes, key: str) -> np.ndarray:
    """A packed weight of a file, as bitsandbytes dequantizes it."""
    tensors: dict[str, Any] = {
        name: np.frombuffer(content, {"F32": np.float32}.get(dtype, np.uint8))
        for name, (dtype, _, content) in _parse(data).items()
        if name.startswith(key)
    }
    state = json.loads(tensors[key + STATE].tobytes())
    scales = tensors[f"{key}.absmax"]
    if f"{key}.nested_absmax" in tensors:
        groups = np.repeat(tensors[f"{key}.nested_absmax"], state["nested_blocksize"])
        scales = tensors[f"{key}.nested_quant_map"][scales] * groups[: len(scales)]
        scales = scales + np.float32(state["nested_offset"])
    pairs = tensors[key].view(np.uint8)
    values = np.asarray(NF4_CODE)[np.stack([pairs >> 4, pairs & 15], 1).reshape(-1)]
    rows, columns = state["shape"]
    values = values[: rows * columns]
    weights = values * np.repeat(scales, state["blocksize"])[: len(values)]
    return weights.astype(state["dtype"]).reshape(rows, columns)
