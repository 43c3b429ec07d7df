"""safetensors and JSON files, read strictly.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}
and the tensors' bytes (https://huggingface.co/docs/safetensors). The safetensors
library checks a file when it is opened; tensors are then read with plain file reads
straight into their destination, so that no tensor is held twice and a file that is
truncated meanwhile is an error and not a bus error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from qlora_jax.errors import CheckpointError
from qlora_jax.reading import open_file, read_bytes

# safetensors' names -> numpy dtypes, in the library's order. Others (F8_E5M2, ...)
# exist; the checks refuse files that have them and name the tensor.
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
}
# Dtypes of weights that are not quantized -> safetensors' names, and back.
FLOAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOAT_NAMES = {name: dtype for dtype, name in FLOAT_DTYPES.items()}

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

MAX_JSON_BYTES = 4_000_000
"""The longest JSON that is read; the header of a 405B model in 4 bits has a fifth."""


@dataclass(frozen=True)
class TensorInfo:
    """Location, dtype and shape of one tensor."""

    file: Path
    dtype: str
    """As safetensors spells it ("BF16")."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    nbytes: int


class TensorFiles:
    """The tensors of one or several safetensors files, by name; reads on demand."""

    def __init__(
        self,
        directory: Path,
        infos: Mapping[str, TensorInfo],
        left_out: Mapping[str, TensorInfo] | None = None,
    ):
        self.directory = directory
        self.infos = dict(infos)
        self.left_out = dict(left_out or {})
        """Tensors of the files that are of another model, such as a vision tower."""

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def __getitem__(self, name: str) -> TensorInfo:
        return self.infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def in_file_order(self, names: Sequence[str]) -> list[str]:
        """Sorts names by file and position, the order that reads sequentially."""
        return sorted(names, key=lambda n: (self[n].file, self[n].start))

    def read(self, name: str) -> NDArray:
        """Returns one tensor as a new array."""
        info = self[name]
        out = _new_array(name, info.shape, DTYPES[info.dtype])
        self.read_into(name, out)
        return out

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        """Returns the bytes of one tensor, whatever its dtype."""
        out = _new_array(name, (self[name].nbytes,), np.dtype(np.uint8))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: NDArray) -> None:
        """Reads the bytes of one tensor into `out`, contiguous and of the same size."""
        info = self[name]
        if out.nbytes == info.nbytes == 0:
            return
        # Of an array that is not contiguous, `reshape` returns a copy, and what is read
        # into it would be lost.
        flat = out.reshape(-1).view(np.uint8)
        if flat.size != info.nbytes or not np.may_share_memory(out, flat):
            raise AssertionError(f"`{name}`: `out` does not hold {info.nbytes} bytes")
        target = memoryview(flat)
        try:
            with open_file(info.file) as file:
                file.seek(info.start)
                done = 0
                while done < info.nbytes:
                    # A read may return less than it was asked for (Linux: 2 GiB at
                    # most).
                    count = file.readinto(target[done : done + (1 << 28)])
                    if not count:
                        raise CheckpointError(
                            f"`{info.file}` ended in the middle of tensor `{name}`: "
                            "the file changed while it was read. Load it again."
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(
                f"Cannot read tensor `{name}` from `{info.file}`: {error.strerror}."
            ) from error

    def read_ahead(self, name: str) -> None:
        """Asks the system to start reading a tensor that will be read next."""
        info = self[name]
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), open(info.file, "rb") as file:
                os.posix_fadvise(
                    file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED
                )


def _new_array(name: str, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        size = math.prod(shape) * dtype.itemsize
        raise CheckpointError(
            f"Tensor `{name}` of {size:,} bytes does not fit in memory."
        ) from None


# Of a Git LFS pointer, and of a web page.
_OTHER_STARTS = (b"version ", b"<!DOCTYP", b"<!doctyp", b"<html")


def _not_itself(path: Path) -> str:
    return (
        f"`{path}` is a Git LFS pointer or a web page, not the file itself; download "
        "it again (`git lfs pull`, or `hf download`)."
    )


def broken_link(path: Path) -> str | None:
    """Returns the message for a symbolic link without its file; None if it is not one.

    A copy of a download cache that leaves out the files the cache links to has such.
    """
    if not path.is_symlink() or path.exists():
        return None
    return (
        f"`{path}` is a symbolic link to `{os.readlink(path)}`, which does not exist. "
        "Copy the directory with the files that it links to (`cp -rL`), or download it "
        "again."
    )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Opens one safetensors file; returns its tensors and its metadata.

    Raises:
      CheckpointError: missing, truncated or malformed file.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start.startswith(_OTHER_STARTS):
                raise CheckpointError(_not_itself(path))
            length = int.from_bytes(start, "little")
            # A length beyond the file is damage, which the library reports better.
            if MAX_JSON_BYTES < length <= size:
                raise CheckpointError(
                    f"`{path}` has a header of {length:,} bytes, and at most "
                    f"{MAX_JSON_BYTES:,} are read. No Llama checkpoint needs as many; "
                    "is it one?"
                )
            # The library's checks: header length, JSON, offsets without gap or overlap
            # that end where the file ends.
            with safetensors.safe_open(path, framework="np"):
                pass
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        # Checked again because the library accepts names and shapes that numpy and
        # error messages cannot take, and because the file can change in between.
        return _read_entries(header, path, data=8 + length, size=size)
    except FileNotFoundError:
        message = broken_link(path) or f"`{path}` does not exist."
        raise CheckpointError(message) from None
    except OSError as error:
        raise CheckpointError(f"Cannot read `{path}`: {error.strerror}.") from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"`{path}` is truncated or damaged ({_short(error)}); download or copy it "
            "again."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # `json` keeps the last of two equal names; another reader may keep the first.
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("the same name twice in the header")
    return out


def _read_entries(
    header: Any, path: Path, *, data: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads a parsed header of a file of `size` bytes, whose tensors start at `data`.

    Raises:
      ValueError: an invalid entry.
    """
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("the metadata does not map names to strings")
    infos = {}
    for name, entry in header.items():
        if not is_name(name):
            raise ValueError(f"a tensor with the name {name[:100]!r}")
        if not isinstance(entry, dict):
            raise ValueError(f"the entry of `{name}` is not a JSON object")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not (isinstance(dtype, str) and is_shape(shape)):
            raise ValueError(f"`{name}` has no dtype and shape")
        offsets = entry.get("data_offsets")
        if not (is_shape(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
            raise ValueError(f"`{name}` has no valid begin and end offsets")
        begin, end = offsets
        # numpy's bounds, which an empty array has to keep too.
        itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 1
        if math.prod(max(n, 1) for n in shape) * itemsize >= 1 << 63:
            raise ValueError(f"`{name}` has a shape that no array can have")
        if dtype in DTYPES and math.prod(shape) * itemsize != end - begin:
            raise ValueError(f"the size of `{name}` does not match its shape")
        infos[name] = TensorInfo(path, dtype, tuple(shape), data + begin, end - begin)
    end = data
    # By size too: an empty tensor starts where its neighbour does and comes first.
    for info in sorted(infos.values(), key=lambda i: (i.start, i.nbytes)):
        if info.start != end:
            raise ValueError("tensors overlap, or there is a gap between them")
        end += info.nbytes
    if end != size:
        raise ValueError("the tensors do not end where the file ends")
    return infos, metadata


def is_name(text: str) -> bool:
    """Whether this can name a tensor or file, and be printed unescaped."""
    return 0 < len(text) <= 500 and text.isprintable()


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers >= 0 of at most numpy's rank."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON object of at most `limit` bytes.

    Raises:
      CheckpointError: a missing, oversized or malformed file.
    """
    try:
        text = read_bytes(path, limit)
        if text.startswith(_OTHER_STARTS):
            raise CheckpointError(_not_itself(path))
        value = json.loads(text.decode())
        if _is_deep(value):
            raise RecursionError
    except FileNotFoundError:
        message = broken_link(path) or f"`{path}` does not exist."
        raise CheckpointError(message) from None
    except OSError as error:
        raise CheckpointError(f"Cannot read `{path}`: {error.strerror}.") from error
    except RecursionError:
        raise CheckpointError(
            f"`{path}` is nested too deeply. Is it the right file?"
        ) from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"`{path}` is not valid JSON ({_short(error)})."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"`{path}` must hold a JSON object, got {type(value).__name__}."
        )
    return value


def _is_deep(value: Any) -> bool:
    """Whether a JSON value has more than 50 levels, too many to print or compare."""
    level = [value]
    for _ in range(50):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


def _short(error: Exception) -> str:
    """Returns the start of an error's text, which may quote the file, on one line."""
    text = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:300])


class Mismatches:
    """Collects the tensors that differ from what is expected, as one error.

    The message counts them by kind and names the first of each. (For problems that are
    sentences, see `qlora_jax.errors.Problems`.)
    """

    def __init__(self, subject: str, *, shown: int = 10):
        self.subject = subject
        self._shown = shown
        self.by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        """Adds a tensor, or file, to the mismatches of a kind."""
        self.by_kind.setdefault(kind, []).append(item)

    def check(self, hint: str = "", *, cause: str = "") -> None:
        """Raises `CheckpointError` if there are any.

        Args:
          hint: what to do; ends the message.
          cause: the probable cause of all of them; precedes the list.
        """
        if not self.by_kind:
            return
        parts = []
        for kind, items in self.by_kind.items():
            shown = ", ".join(items[: self._shown])
            more = len(items) - self._shown
            rest = f" and {more} more" if more > 0 else ""
            parts.append(f"{len(items)} {kind}: {shown}{rest}")
        sentences = (f"{self.subject}.", cause, f"{'; '.join(parts)}.", hint)
        raise CheckpointError(" ".join(filter(None, sentences)))


def check_finite(array: NDArray, name: str) -> None:
    """Raises `CheckpointError` where a float array holds NaN or infinity."""
    # On the bits: one comparison of integers, the same for every dtype.
    exponent, integer = {
        "float32": (0x7F800000, np.uint32),
        "bfloat16": (0x7F80, np.uint16),
        "float16": (0x7C00, np.uint16),
    }[array.dtype.name]
    bits = array.reshape(-1).view(integer)
    mask = integer(exponent)
    step = 1 << 20  # bounds the scratch memory
    for start in range(0, bits.size, step):
        # Exactly NaN and infinity have all exponent bits set.
        if ((bits[start : start + step] & mask) == mask).any():
            raise CheckpointError(
                f"Tensor `{name}` contains NaN or infinity; the file is damaged or its "
                "training diverged."
            )
