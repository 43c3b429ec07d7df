"""bitsandbytes 4-bit tensors on disk <-> `NF4Tensor`.

A quantized weight `P.weight` is several tensors: the codes (bytes, [n/2, 1], viewed as
`bnb_4bit_quant_storage`), `.absmax`, `.quant_map`, under double quantization
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, JSON as
bytes. A weight is quantized if it has this last tensor, whatever the configuration
says. Bytes are read and written unchanged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from convert.files import (
    DTYPES,
    FLOAT_DTYPES,
    Mismatches,
    TensorFiles,
    check_finite,
    is_shape,
)
from convert.output import Entry
from qlora_jax import nf4
from qlora_jax.errors import CheckpointError, say
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

# A real one has about 200.
_MAX_STATE_BYTES = 10_000
_FLOAT32_MAX = float(np.finfo(np.float32).max)


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
        state = _read_state(files, names[3], double)
    except ValueError as error:
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


def _read_state(files: TensorFiles, name: str, double: bool) -> QuantState:
    """Reads the JSON of a weight from a tensor of bytes.

    Raises:
      ValueError: it is not the JSON of a quantized weight, or has unsupported values.
    """
    if files[name].nbytes > _MAX_STATE_BYTES:
        raise ValueError(
            f"{files[name].nbytes:,} bytes, and at most {_MAX_STATE_BYTES:,} are read"
        )
    try:
        raw = json.loads(files.read_bytes(name).tobytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")

    def check(field: str, expected: str | int, which: str) -> None:
        value = raw.get(field)
        # By type as well: True == 1, and 64.0 == 64.
        if type(value) is not type(expected) or value != expected:
            raise ValueError(f"`{field}` is {value!r:.100}; only {which} is read")

    check("quant_type", "nf4", "'nf4'")
    block_size = raw.get("blocksize")
    if type(block_size) is not int or block_size not in READ_BLOCK_SIZES:
        raise ValueError(
            f"`blocksize` is {block_size!r:.80}; expected one of "
            f"{', '.join(map(str, READ_BLOCK_SIZES))}"
        )
    dtype = raw.get("dtype")
    if not (isinstance(dtype, str) and dtype in FLOAT_DTYPES):
        raise ValueError(f"`dtype` is {dtype!r:.100}; expected a 16 or 32-bit float")
    offset: Any = None
    if double:
        offset = raw.get("nested_offset")
        # Python's JSON reader accepts NaN and Infinity.
        if type(offset) not in (int, float) or not abs(offset) <= _FLOAT32_MAX:
            raise ValueError(f"`nested_offset` is {offset!r:.100}, not a float32")
        offset = float(offset)
        check("nested_blocksize", NESTED_BLOCK_SIZE, str(NESTED_BLOCK_SIZE))
        check("nested_dtype", "float32", "'float32'")
    shape = raw.get("shape")
    if not (is_shape(shape) and len(shape) == 2):
        raise ValueError(f"`shape` is {shape!r:.100}; expected two sizes")
    return QuantState((shape[0], shape[1]), dtype, offset, block_size)


def read_into(files: TensorFiles, key: str, state: QuantState, out: NF4Tensor) -> None:
    """Reads the quantized weight `key` into the arrays of `out` (one layer's views).

    Raises:
      CheckpointError: it would dequantize to NaN or infinity.
    """
    # File and array hold the codes in the same order ([out, in] row-major, the first
    # weight of a pair in the high nibble), so the bytes are copied, never transposed.
    files.read_into(key, out.codes)
    files.read_into(f"{key}.absmax", out.absmax)
    if state.double_quant:
        files.read_into(f"{key}.nested_absmax", out.nested_absmax)
        files.read_into(f"{key}.nested_quant_map", out.nested_quant_map)
        # JSON holds a float32 value in the digits of a float64: narrowing it is exact.
        out.nested_offset[...] = np.float32(state.nested_offset)
    _check_scales(key, out, state)


def _check_scales(key: str, tensor: NF4Tensor, state: QuantState) -> None:
    """Raises where weights would be NaN or infinity.

    A code stands for a finite value of at most 1, so weights are finite if the scales
    of their blocks are, in the dtype that weights are rounded to.
    """
    scales = np.asarray(tensor.absmax).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if state.double_quant:
            groups = np.repeat(tensor.nested_absmax.reshape(-1), NESTED_BLOCK_SIZE)
            scales = tensor.nested_quant_map.reshape(-1)[scales]
            scales = scales * groups[: scales.size] + tensor.nested_offset
        rounded = scales.astype(DTYPES[FLOAT_DTYPES[state.dtype]])
    check_finite(scales, key)
    try:
        check_finite(rounded, key)
    except CheckpointError:
        raise CheckpointError(
            f"Tensor `{key}` has scales beyond the range of {state.dtype}, the dtype "
            "of its quantization state; the file is damaged."
        ) from None


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
    original: Any,
    *,
    dense: Sequence[str],
    packed: Sequence[str],
    packed_head: bool = False,
) -> list[str] | None:
    """Returns the `llm_int8_skip_modules` for these dense and packed linear modules.

    Entries of the original file are kept where they still hold: names that may select a
    packed module are removed, and projections with dense modules that no entry selects
    are added. None stands for the output head, so a list must name the head too, unless
    it is packed (`packed_head`).

    Versions of transformers read an entry in several ways, as a name or as a regular
    expression. What is returned means the same to all of them: what is not a name is
    left out, with a note, and the projections are named.

    Args:
      original: the value in the file, whatever it is.
      dense: paths of the linear modules in 16 or 32 bit.
      packed: of those in 4 bit.
      packed_head: whether the output head is in 4 bit too.
    """
    if packed_head:
        packed = [*packed, HEAD[-1]]
        original = original or []
    entries = None
    missing = list(dense)
    if original is not None:
        listed = original if isinstance(original, list) else [original]
        names = [entry for entry in listed if _is_module_name(entry)]
        # transformers builds a dense layer wherever an entry matches, and could not
        # load packed bytes into it.
        entries = [
            name for name in names if not any(_may_select(name, m) for m in packed)
        ]
        missing = [m for m in dense if not any(_selects(name, m) for name in entries)]
        if len(names) < len(listed):
            say(
                f"Note: config.json: {len(listed) - len(names)} of {len(listed)} "
                "entries of `llm_int8_skip_modules` are not names of modules, and are "
                "left out. The projections that are not quantized are named."
            )
    if not missing:
        return entries
    # Short names select every layer: a stack is dense in all its layers or in none.
    projections = dict.fromkeys(module.rpartition(".")[2] for module in missing)
    return [*(["lm_head"] if entries is None else entries), *projections]


_MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


def _is_module_name(entry: Any) -> bool:
    return isinstance(entry, str) and _MODULE_NAME.fullmatch(entry) is not None


def _may_select(name: str, module: str) -> bool:
    """Whether some version of transformers keeps a module in 16 bit for an entry."""
    # As an expression at the beginning of the path (a "." is any character), as an end
    # of it, or as anything within it up to a ".".
    return (
        re.match(name, module) is not None
        or module.endswith(name)
        or f"{name}." in module
    )


def _selects(name: str, module: str) -> bool:
    """Whether every version of transformers keeps a module in 16 bit for an entry."""
    # Versions 4 take the path of a module, or of one around it, and last components;
    # versions 5 the beginning of a path up to the border of a component, and any end.
    return f"{module}.".startswith(f"{name}.") or module.rpartition(".")[2] == name
