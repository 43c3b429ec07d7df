"""bitsandbytes 4-bit tensors on disk <-> `NF4Tensor`.

A quantized weight `P.weight` is several tensors: the codes (bytes, [n/2, 1], viewed as
`bnb_4bit_quant_storage`), `.absmax`, `.quant_map`, under double quantization
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, a JSON
text as bytes. The presence of that last one, not the configuration, says that a weight
is quantized. Bytes are taken over and given back unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np
from numpy.typing import NDArray

from convert.files import DTYPES, Mismatches, TensorFiles
from convert.output import Entry
from qlora_jax import nf4
from qlora_jax.choices import Dtype
from qlora_jax.errors import UserError
from qlora_jax.lora.patterns import match_patterns
from qlora_jax.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    NF4_CODE,
    NF4Tensor,
    abstract,
)

_STATE = ".quant_state.bitsandbytes__"
_STORAGES = ("uint8", *get_args(Dtype))
_SAFETENSORS_NAME = {"uint8": "U8", "bfloat16": "BF16", "float16": "F16"}
_SAFETENSORS_NAME["float32"] = "F32"


@dataclass(frozen=True)
class QuantState:
    """What the JSON text of one quantized weight says."""

    shape: tuple[int, int]
    dtype: str
    nested_offset: float | None
    """float32 value; None without double quantization."""

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
    """Names of all tensors that make up the quantized weight `key`."""
    parts = ["", ".absmax", ".quant_map", f"{_STATE}nf4"]
    if double_quant:
        parts += [".nested_absmax", ".nested_quant_map"]
    return [key + part for part in parts]


def check(
    files: TensorFiles, key: str, shape: tuple[int, ...], problems: Mismatches
) -> tuple[QuantState | None, list[str]]:
    """Checks everything but the large arrays of the quantized weight `key`.

    Returns:
      Its state (None if there is a problem, which is noted), and the names of the
      tensors that belong to it.
    """
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
    blocks = -(-math.prod(shape) // BLOCK_SIZE)
    wanted = {
        f"{key}.absmax": ("U8" if double else "F32", blocks),
        f"{key}.quant_map": ("F32", 16),
    }
    if double:
        groups = -(-blocks // NESTED_BLOCK_SIZE)
        wanted[f"{key}.nested_absmax"] = ("F32", groups)
        wanted[f"{key}.nested_quant_map"] = ("F32", 256)
    good = True
    for name, (dtype, size) in wanted.items():
        if files[name].dtype != dtype:
            problems.add(
                "tensors of another dtype",
                f"{name} {files[name].dtype} instead of {dtype}",
            )
            good = False
        elif math.prod(files[name].shape) != size:
            problems.add(
                "tensors of another shape",
                f"{name} {list(files[name].shape)} instead of [{size}]",
            )
            good = False
    info = files[key]
    if info.dtype not in _SAFETENSORS_NAME.values():
        problems.add("tensors of another dtype", f"{key} {info.dtype} instead of U8")
        good = False
    elif info.nbytes != -(-math.prod(shape) // 2):
        problems.add(
            "tensors of another shape",
            f"{key} {info.nbytes} bytes instead of {-(-math.prod(shape) // 2)} (two "
            "weights a byte)",
        )
        good = False
    if good and files.read(f"{key}.quant_map").tobytes() != NF4_CODE.tobytes():
        problems.add("tables of values that are not NF4's", f"{key}.quant_map")
        good = False
    return (state if good else None), names


def _parse(raw: Mapping[str, Any], double: bool) -> QuantState:
    """Reads the JSON text; raises ValueError with what is not supported."""
    if raw["quant_type"] != "nf4":
        raise ValueError(f"`quant_type` is {raw['quant_type']!r}; only 'nf4' is read")
    if raw["blocksize"] != BLOCK_SIZE:
        raise ValueError(
            f"`blocksize` is {raw['blocksize']}; only {BLOCK_SIZE}, which transformers "
            "writes, is read"
        )
    if raw["dtype"] not in _STORAGES[1:]:
        raise ValueError(f"`dtype` is {raw['dtype']!r}; expected a 16 or 32-bit float")
    offset = None
    if double:
        offset = float(raw["nested_offset"])
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
    return QuantState((out_features, in_features), raw["dtype"], offset)


def read_into(files: TensorFiles, key: str, state: QuantState, out: NF4Tensor) -> None:
    """Reads the quantized weight `key` into the arrays of `out` (one layer's views)."""
    files.read_into(key, out.codes)
    files.read_into(f"{key}.absmax", out.absmax)
    if state.double_quant:
        files.read_into(f"{key}.nested_absmax", out.nested_absmax)
        files.read_into(f"{key}.nested_quant_map", out.nested_quant_map)
        out.nested_offset[...] = np.float32(state.nested_offset)


def read(files: TensorFiles, key: str, state: QuantState) -> NF4Tensor:
    """Returns the quantized weight `key` as an `NF4Tensor` of numpy arrays."""
    tensor = empty(state.shape, double_quant=state.double_quant, dtype=state.dtype)
    read_into(files, key, state, tensor)
    return tensor


def empty(
    shape: tuple[int, int],
    *,
    double_quant: bool,
    dtype: str,
    leading: tuple[int, ...] = (),
) -> NF4Tensor:
    """Makes an `NF4Tensor` of uninitialized numpy arrays."""
    return jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        abstract(shape, double_quant=double_quant, dtype=dtype, leading=leading),
    )


def dequantize(tensor: NF4Tensor) -> NDArray:
    """Dequantizes on the CPU, even where there is an accelerator, to its own dtype."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        device = None
    with jax.default_device(device):
        return np.asarray(_dequantize(tensor))


_dequantize = jax.jit(nf4.dequantize)


def _state_text(tensor: NF4Tensor, layer: int | None) -> bytes:
    """The JSON text of one weight, to the character as bitsandbytes writes it."""
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
    """The tensors that the weight `key`, layer `layer` of `tensor`, becomes in a file.

    `quant_storage` has been checked with `storage_problem`.
    """
    blocks = -(-math.prod(tensor.shape) // tensor.block_size)
    code_bytes = -(-math.prod(tensor.shape) // 2)
    storage = DTYPES[_SAFETENSORS_NAME[quant_storage]]
    absmax_dtype = np.dtype(np.uint8 if tensor.double_quant else np.float32)

    def codes() -> NDArray:
        return _host(tensor.codes, layer).reshape(-1).view(storage).reshape(-1, 1)

    def absmax() -> NDArray:
        return _host(tensor.absmax, layer).reshape(-1)

    text = np.frombuffer(_state_text(tensor, layer), np.uint8)
    out = [
        Entry(key, storage, (code_bytes // storage.itemsize, 1), codes),
        Entry(f"{key}.absmax", absmax_dtype, (blocks,), absmax),
        Entry.of(f"{key}.quant_map", NF4_CODE),
        Entry.of(f"{key}{_STATE}nf4", text),
    ]
    if tensor.double_quant:
        out += [
            Entry.of(f"{key}.{name}", _host(getattr(tensor, name), layer))
            for name in ("nested_absmax", "nested_quant_map")
        ]
    return out


def _host(array: Any, layer: int | None) -> NDArray:
    """One layer of an array, on the host; a view where it is there already."""
    return np.ascontiguousarray(np.asarray(array if layer is None else array[layer]))


def storage_problem(tensor: NF4Tensor, quant_storage: str) -> str | None:
    """Says why the codes of `tensor` cannot be viewed as `quant_storage`, if so."""
    if quant_storage not in _STORAGES:
        return (
            f"`quant_storage`={quant_storage!r} is not known; expected one of "
            f"{', '.join(_STORAGES)}"
        )
    size = DTYPES[_SAFETENSORS_NAME[quant_storage]].itemsize
    count = -(-math.prod(tensor.shape) // 2)
    if count % size:
        return (
            f"{count} bytes of codes (shape {list(tensor.shape)}) are no whole number "
            f"of {quant_storage}; use quant_storage='uint8'"
        )
    return None


def new_quantization_config(
    *,
    compute_dtype: str,
    quant_storage: str,
    double_quant: bool,
) -> dict[str, Any]:
    """The `quantization_config` that transformers writes for such a checkpoint."""
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
    own: Sequence[str] | None, *, dense: Sequence[str], packed: Sequence[str]
) -> list[str] | None:
    """The `llm_int8_skip_modules` for such dense and packed linear modules.

    It is `own`, the list of the file the model came from, as far as that holds: without
    entries that select a packed module, and with the projections whose dense modules it
    does not all select. None stands for the output head alone, so a list has to name
    that too.
    """
    entries = None
    missing = list(dense)
    if own is not None:
        selected = _selected(own, [*dense, *packed])
        entries = [entry for entry in own if selected[entry].isdisjoint(packed)]
        in_16_bit = set().union(*(selected[entry] for entry in entries))
        missing = [module for module in dense if module not in in_16_bit]
    if not missing:
        return entries
    projections = dict.fromkeys(module.rpartition(".")[2] for module in missing)
    return [*(["lm_head"] if entries is None else entries), *projections]


def _selected(entries: Sequence[str], modules: Sequence[str]) -> dict[str, set[str]]:
    """The modules that transformers leaves in 16 bit for each entry of the list.

    Raises:
      UserError: an entry takes too long to match.
    """
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
