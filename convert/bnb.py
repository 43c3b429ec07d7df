"""bitsandbytes 4-bit tensors on disk <-> `NF4Tensor`.

A quantized weight `P.weight` is several tensors: the codes (bytes, [n/2, 1], viewed as
`bnb_4bit_quant_storage`), `.absmax`, `.quant_map`, under double quantization
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, JSON as
bytes. A weight is quantized if it has this last tensor, whatever the configuration
says. Bytes are read and written unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from convert.files import DTYPES, FLOAT_DTYPES, Mismatches, TensorFiles
from convert.output import Entry
from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora import match_patterns
from qlora_jax.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    NF4_CODE,
    READ_BLOCK_SIZES,
    NF4Tensor,
)
from qlora_jax.tree import HEAD

_STATE = ".quant_state.bitsandbytes__"
# dtypes that packed bytes may be viewed as -> safetensors' names.
# `bnb_4bit_quant_storage` is a view: another dtype and length, the same bytes.
_STORAGES = {"uint8": "U8", **FLOAT_DTYPES}


@dataclass(frozen=True)
class QuantState:
    """The JSON of one quantized weight."""

    shape: tuple[int, int]
    dtype: str
    nested_offset: float | None
    """float32 value; None without double quantization."""
    block_size: int = BLOCK_SIZE
    """Weights that share a scale."""

    @property
    def double_quant(self) -> bool:
        """Whether block scales are 8-bit."""
        return self.nested_offset is not None


def packed_type(files: TensorFiles, key: str) -> str | None:
    """Returns "nf4" or "fp4" if the weight `key` is stored in 4 bits, else None."""
    for kind in ("nf4", "fp4"):
        if f"{key}{_STATE}{kind}" in files:
            return kind
    return None


def part_names(key: str, double_quant: bool) -> list[str]:
    """Returns the names of all tensors of the quantized weight `key`."""
    parts = ["", ".absmax", ".quant_map", f"{_STATE}nf4"]
    if double_quant:
        parts += [".nested_absmax", ".nested_quant_map"]
    return [key + part for part in parts]


def check(
    files: TensorFiles, key: str, shape: tuple[int, ...], problems: Mismatches
) -> tuple[QuantState | None, list[str]]:
    """Checks a quantized weight without reading its large arrays.

    Args:
      files: of the checkpoint.
      key: of the weight.
      shape: expected shape.
      problems: collects what is wrong.

    Returns:
      (its state, or None if there is a problem; the names of its tensors).
    """
    # Either sign demands every part of double quantization, so that a file that lost
    # some of them is not taken for one without it.
    double = f"{key}.nested_absmax" in files or (
        f"{key}.absmax" in files and files[f"{key}.absmax"].dtype == "U8"
    )
    names = part_names(key, double)
    missing = [name for name in names if name not in files]
    for name in missing:
        problems.add("missing tensors", name)
    if missing:
        return None, names
    try:
        # names[3]: the JSON, a byte tensor, since safetensors holds nothing else.
        raw = json.loads(files.read_bytes(names[3]).tobytes())
        state = _parse(raw, double)
    except (ValueError, KeyError, TypeError) as error:
        problems.add("unusable quantization states", f"{names[3]} ({error})")
        return None, names
    if state.shape != shape:
        problems.add(
            "tensors of another shape",
            f"{key} {list(state.shape)} instead of {list(shape)}",
        )
        return None, names
    mismatches = _mismatches(files, key, math.prod(shape), state)
    # `NF4Tensor` has no table of its own: with another one the same codes would be
    # other weights. (The nested table is kept in the tensor and may be any.)
    if not mismatches and (
        files.read(f"{key}.quant_map").tobytes() != NF4_CODE.tobytes()
    ):
        kind = "tables of values that are not NF4's"
        mismatches.append((kind, f"{key}.quant_map"))
    for kind, description in mismatches:
        problems.add(kind, description)
    return (None if mismatches else state), names


def _mismatches(
    files: TensorFiles, key: str, size: int, state: QuantState
) -> list[tuple[str, str]]:
    """Compares dtypes and sizes with those of a weight of `size` elements."""
    # A scale for each block of the row-major [out, in] matrix; blocks may straddle
    # rows, and the last one may be shorter.
    blocks, double = -(-size // state.block_size), state.double_quant
    expected = {
        f"{key}.absmax": ("U8" if double else "F32", blocks),
        f"{key}.quant_map": ("F32", 16),
    }
    if double:
        groups = -(-blocks // NESTED_BLOCK_SIZE)
        expected[f"{key}.nested_absmax"] = ("F32", groups)
        expected[f"{key}.nested_quant_map"] = ("F32", 256)
    wrong_dtype, wrong_shape = "tensors of another dtype", "tensors of another shape"
    mismatches = []
    for name, (dtype, length) in expected.items():
        info = files[name]
        if info.dtype != dtype:
            mismatches.append((wrong_dtype, f"{name} {info.dtype} instead of {dtype}"))
        elif math.prod(info.shape) != length:
            description = f"{name} {list(info.shape)} instead of [{length}]"
            mismatches.append((wrong_shape, description))
    # In bytes, because the shape follows the storage dtype. An odd weight is padded.
    info, code_bytes = files[key], -(-size // 2)
    if info.dtype not in _STORAGES.values():
        mismatches.append((wrong_dtype, f"{key} {info.dtype} instead of U8"))
    elif info.nbytes != code_bytes:
        description = (
            f"{key} {info.nbytes} bytes instead of {code_bytes} (two weights a byte)"
        )
        mismatches.append((wrong_shape, description))
    return mismatches


def _parse(raw: Mapping[str, Any], double: bool) -> QuantState:
    """Reads the JSON of a weight; raises ValueError for unsupported values."""
    if raw["quant_type"] != "nf4":
        raise ValueError(f"`quant_type` is {raw['quant_type']!r}; only 'nf4' is read")
    block_size = raw["blocksize"]
    if type(block_size) is not int or block_size not in READ_BLOCK_SIZES:
        raise ValueError(
            f"`blocksize` is {block_size!r:.80}; expected one of "
            f"{', '.join(map(str, READ_BLOCK_SIZES))}"
        )
    if raw["dtype"] not in FLOAT_DTYPES:
        raise ValueError(f"`dtype` is {raw['dtype']!r}; expected a 16 or 32-bit float")
    offset = None
    if double:
        offset = float(raw["nested_offset"])
        # Python's JSON reader accepts NaN and Infinity.
        if not math.isfinite(offset):
            raise ValueError(f"`nested_offset` is {offset}")
        if raw["nested_blocksize"] != NESTED_BLOCK_SIZE:
            raise ValueError(
                f"`nested_blocksize` is {raw['nested_blocksize']}; only "
                f"{NESTED_BLOCK_SIZE} is read"
            )
        if raw["nested_dtype"] != "float32":
            raise ValueError(f"`nested_dtype` is {raw['nested_dtype']!r}, not float32")
    out_features, in_features = raw["shape"]
    shape = (out_features, in_features)
    return QuantState(shape, raw["dtype"], offset, block_size)


def read_into(files: TensorFiles, key: str, state: QuantState, out: NF4Tensor) -> None:
    """Reads the quantized weight `key` into the arrays of `out` (one layer's views)."""
    # File and array hold the codes in the same order ([out, in] row-major, the first
    # weight of a pair in the high nibble), so the bytes are copied, never transposed.
    files.read_into(key, out.codes)
    files.read_into(f"{key}.absmax", out.absmax)
    if state.double_quant:
        files.read_into(f"{key}.nested_absmax", out.nested_absmax)
        files.read_into(f"{key}.nested_quant_map", out.nested_quant_map)
        # JSON holds a float32 value in the digits of a float64: narrowing it is exact.
        out.nested_offset[...] = np.float32(state.nested_offset)


def read(files: TensorFiles, key: str, state: QuantState) -> NF4Tensor:
    """Returns the quantized weight `key` as an `NF4Tensor` of numpy arrays."""
    tensor = empty(
        state.shape,
        double_quant=state.double_quant,
        dtype=state.dtype,
        block_size=state.block_size,
    )
    read_into(files, key, state, tensor)
    return tensor


def empty(
    shape: tuple[int, int],
    *,
    double_quant: bool,
    dtype: str,
    leading: tuple[int, ...] = (),
    block_size: int = BLOCK_SIZE,
) -> NF4Tensor:
    """Makes an `NF4Tensor` of uninitialized numpy arrays."""
    return jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        nf4.abstract(
            shape,
            double_quant=double_quant,
            dtype=dtype,
            leading=leading,
            block_size=block_size,
        ),
    )


def dequantize(tensor: NF4Tensor) -> NDArray:
    """Dequantizes to the dtype before packing; on the CPU, so that no GPU is needed."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        device = None
    with jax.default_device(device):
        return np.asarray(_dequantize(tensor))


_dequantize = jax.jit(nf4.dequantize)


def _state_json(tensor: NF4Tensor, layer: int | None) -> bytes:
    """Returns the JSON of one weight, character for character as bitsandbytes does."""
    # Order of keys, separators and digits are those of bitsandbytes' `json.dumps`,
    # which keeps the bytes of a file that is loaded and saved.
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": tensor.block_size,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
    }
    if tensor.double_quant:
        state["nested_blocksize"] = tensor.nested_block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = _host(tensor.nested_offset, layer).item()
    return json.dumps(state).encode()


def entries(
    key: str, tensor: NF4Tensor, layer: int | None, *, quant_storage: str
) -> list[Entry]:
    """Returns the tensors of a file that hold one layer of a quantized weight.

    `quant_storage` must have passed `storage_problem`.
    """
    blocks = -(-math.prod(tensor.shape) // tensor.block_size)
    code_bytes = -(-math.prod(tensor.shape) // 2)
    storage = DTYPES[_STORAGES[quant_storage]]
    absmax_dtype = np.dtype(np.uint8 if tensor.double_quant else np.float32)

    # [out, in/2] or flat -> the column [bytes / itemsize, 1] that bitsandbytes stores.
    def codes() -> NDArray:
        return _host(tensor.codes, layer).reshape(-1).view(storage).reshape(-1, 1)

    def absmax() -> NDArray:
        return _host(tensor.absmax, layer).reshape(-1)

    state = np.frombuffer(_state_json(tensor, layer), np.uint8)
    out = [
        Entry(key, storage, (code_bytes // storage.itemsize, 1), codes),
        Entry(f"{key}.absmax", absmax_dtype, (blocks,), absmax),
        Entry.of(f"{key}.quant_map", NF4_CODE),
        Entry.of(f"{key}{_STATE}nf4", state),
    ]
    if tensor.double_quant:
        out += [
            Entry.of(f"{key}.{name}", _host(getattr(tensor, name), layer))
            # `nested_offset` is in the JSON only.
            for name in ("nested_absmax", "nested_quant_map")
        ]
    return out


def _host(array: Any, layer: int | None) -> NDArray:
    """Returns one layer of an array on the host, as a view where possible."""
    return np.ascontiguousarray(np.asarray(array if layer is None else array[layer]))


def storage_problem(tensor: NF4Tensor, quant_storage: str) -> str | None:
    """Returns why the codes cannot be viewed as `quant_storage`; None if they can."""
    if quant_storage not in _STORAGES:
        return (
            f"`quant_storage`={quant_storage!r} is not known; expected one of "
            f"{', '.join(_STORAGES)}"
        )
    size = DTYPES[_STORAGES[quant_storage]].itemsize
    count = -(-math.prod(tensor.shape) // 2)
    if count % size:
        return (
            f"{count} bytes of codes (shape {list(tensor.shape)}) are not a multiple "
            f"of the size of {quant_storage}; use quant_storage='uint8'"
        )
    return None


def new_quantization_config(
    *,
    compute_dtype: str,
    quant_storage: str,
    double_quant: bool,
) -> dict[str, Any]:
    """Returns the `quantization_config` that transformers would write."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": quant_storage,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def skip_modules(
    original: Sequence[str] | None,
    *,
    dense: Sequence[str],
    packed: Sequence[str],
    packed_head: bool = False,
) -> list[str] | None:
    """Returns the `llm_int8_skip_modules` for these dense and packed linear modules.

    The list of the original file is kept where it still holds: entries that select a
    packed module are removed, and projections with dense modules that no entry selects
    are added. None stands for the output head, so a list must name the head too, unless
    it is packed (`packed_head`).
    """
    if packed_head:
        packed = [*packed, HEAD[-1]]
        original = original or []
    entries = None
    missing = list(dense)
    if original is not None:
        # transformers builds a dense layer wherever an entry matches, and could not
        # load packed bytes into it.
        selected = _selected(original, [*dense, *packed])
        entries = [entry for entry in original if selected[entry].isdisjoint(packed)]
        in_16_bit = set().union(*(selected[entry] for entry in entries))
        missing = [module for module in dense if module not in in_16_bit]
    if not missing:
        return entries
    # Short names select every layer: a stack is dense in all its layers or in none.
    projections = dict.fromkeys(module.rpartition(".")[2] for module in missing)
    return [*(["lm_head"] if entries is None else entries), *projections]


def _selected(entries: Sequence[str], modules: Sequence[str]) -> dict[str, set[str]]:
    """Returns the modules that transformers keeps in 16 bit for each entry.

    Raises:
      UserError: an entry takes too long to match.
    """
    # The two rules of transformers: `re.match` from the start of the path up to the
    # border of a component, and `str.endswith`.
    match = functools.partial(
        match_patterns,
        field="config.json: `llm_int8_skip_modules`",
        inside=r"(?:{})(?:(?<=\.)|(?=\.|$))",
    )
    out = {entry: {m for m in modules if m.endswith(entry)} for entry in entries}
    expressions = []
    for entry in out:
        with contextlib.suppress(UserError):  # an end of a path need not be valid
            match((entry,))
            expressions.append(entry)
    for entry, names in match(tuple(expressions), tuple(modules)).items():
        out[entry].update(names)
    return out
