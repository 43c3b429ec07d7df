"""safetensors on disk, read strictly.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}
and the tensors' bytes (https://huggingface.co/docs/safetensors). The safetensors
library checks a file when it is opened; tensors are then read with plain file reads
straight into the place where they are wanted, so that no tensor is held twice and a
file that shrinks under us is an error and not a bus error.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from qlora_jax.errors import CheckpointError

# safetensors' names -> numpy dtypes, in the library's order. Others (F8_E5M2, ...)
# exist; no file that this project reads may have them, and the checks say so by name.
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

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""Beside an adapter or a tokenizer: how conversations are written."""

MAX_JSON_BYTES = 4_000_000
"""The longest JSON that is read; the header of a 405B model in 4 bits has a fifth."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is."""

    file: Path
    dtype: str
    """As safetensors spells it ("BF16")."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    nbytes: int


class TensorFiles:
    """The tensors of one or several safetensors files, by name; reads on demand."""

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo]):
        self.directory = directory
        self.infos = dict(infos)

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
        """Reads the bytes of one tensor into `out`, which has as many, contiguous."""
        info = self[name]
        if out.nbytes == info.nbytes == 0:
            return
        flat = out.reshape(-1).view(np.uint8)
        if flat.size != info.nbytes or not np.may_share_memory(out, flat):
            raise AssertionError(f"`{name}`: no place for {info.nbytes} bytes")
        target = memoryview(flat)
        try:
            with _open_file(info.file) as file:
                file.seek(info.start)
                done = 0
                while done < info.nbytes:
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
        """Asks the system to start reading a tensor that will be wanted next."""
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


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Opens one safetensors file; returns its tensors and its metadata.

    Raises:
      CheckpointError: missing, truncated or malformed file.
    """
    try:
        with _open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start.startswith((b"version ", b"<!DOCTYP", b"<html")):
                raise CheckpointError(
                    f"`{path}` is a Git LFS pointer or a web page, not the file "
                    "itself; download the checkpoint again (`git lfs pull`)."
                )
            length = int.from_bytes(start, "little")
            if MAX_JSON_BYTES < length <= size:
                raise CheckpointError(
                    f"`{path}` has a header of {length:,} bytes, and at most "
                    f"{MAX_JSON_BYTES:,} are read. No checkpoint of a Llama has as "
                    "many; is it one?"
                )
            # The library's checks: header length, JSON, offsets without gap or overlap
            # that end where the file ends.
            with safetensors.safe_open(path, framework="np"):
                pass
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        # What is handed out is checked here as well: the library lets pass what other
        # readers of the header would stumble over.
        return _read_entries(header, path, data=8 + length, size=size)
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` does not exist.") from None
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
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("the same name twice in the header")
    return out


def _read_entries(
    header: Any, path: Path, *, data: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads a parsed header of a file of `size` bytes, whose tensors start at `data`.

    Raises:
      ValueError: anything in it is not as it has to be.
    """
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("the metadata is no table of texts")
    infos = {}
    for name, entry in header.items():
        if not is_name(name):
            raise ValueError(f"a tensor with the name {name[:100]!r}")
        if not isinstance(entry, dict):
            raise ValueError(f"`{name}` is described by no JSON object")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not (isinstance(dtype, str) and _is_shape(shape)):
            raise ValueError(f"`{name}` has no dtype and shape")
        offsets = entry.get("data_offsets")
        if not (_is_shape(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
            raise ValueError(f"`{name}` has no offsets of its begin and end")
        begin, end = offsets
        # numpy's own bounds, which hold for an array without elements too.
        itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 1
        if math.prod(max(n, 1) for n in shape) * itemsize >= 1 << 63:
            raise ValueError(f"`{name}` has a shape that no array can have")
        if dtype in DTYPES and math.prod(shape) * itemsize != end - begin:
            raise ValueError(f"`{name}` has another size than its shape says")
        infos[name] = TensorInfo(path, dtype, tuple(shape), data + begin, end - begin)
    place = data
    for info in sorted(infos.values(), key=lambda i: (i.start, i.nbytes)):
        if info.start != place:
            raise ValueError("tensors overlap, or there is a gap between them")
        place += info.nbytes
    if place != size:
        raise ValueError("the tensors end elsewhere than the file")
    return infos, metadata


def is_name(text: str) -> bool:
    """Whether this may be the name of a tensor, and stand in a message as it is."""
    return 0 < len(text) <= 500 and text.isprintable()


def _is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of numbers >= 0, no longer than a numpy shape."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def read_json(path: Path) -> Any:
    """Reads a JSON object; a malformed file is named."""
    try:
        with _open_file(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(
                f"`{path}` is larger than {MAX_JSON_BYTES:,} bytes, the most that is "
                "read. Is it the right file?"
            )
        value = json.loads(text.decode())
        if _is_deep(value):
            raise RecursionError
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` does not exist.") from None
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
    """Whether a JSON value has more than 50 levels, too many to print or compare it."""
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
    """The text of an error, which may quote the file: one line, and not the whole."""
    text = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def _open_file(path: Path) -> io.BufferedReader:
    """Opens for reading what is a file, not what blocks (a pipe) or never ends."""
    file = open(path, "rb", opener=_open_now)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"`{path}` is no file but a pipe or a device.")
    return file


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def check_model_directory(path: Path) -> None:
    """Refuses what is no Hugging Face model directory, saying what it is instead."""
    if not path.exists():
        raise CheckpointError(
            f"`{path}` does not exist{_seen_from(path)}. A model is a local Hugging "
            "Face directory; a name on the Hub has to be downloaded first (`hf "
            "download NAME --local-dir DIR`)."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"`{path}` is a file; give the directory that holds config.json and the "
            "safetensors files."
        )
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"`{path}` is a PEFT adapter, not a model. Give the directory of its base "
            "model here."
        )
    raise CheckpointError(
        f"`{path}` has no config.json, so it is no Hugging Face model directory."
    )


def open_model(path: Path) -> TensorFiles:
    """Opens the safetensors files of a model directory, sharded or not.

    Raises:
      CheckpointError: no or other weight files, a missing shard, an index that
        disagrees with its shards; all disagreements in one message.
    """
    single, index = path / SINGLE, path / INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"`{path}` has both {SINGLE} and {INDEX}; which one is meant cannot be "
            "told. Remove the stale one."
        )
    if single.is_file():
        return TensorFiles(path, read_header(single)[0])
    if not index.is_file():
        raise CheckpointError(_no_weights(path))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        is_name(key) and isinstance(f, str) and is_name(f) and f == os.path.basename(f)
        for key, f in weight_map.items()
    ):
        raise CheckpointError(
            f"`{index}` has no `weight_map` of tensor names to file names in the same "
            "directory."
        )
    problems = Mismatches(f"The shards in `{path}` and {INDEX} disagree")
    infos: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).is_file():
            problems.add("missing files", name)
            continue
        for key, info in read_header(path / name)[0].items():
            if key in infos:
                problems.add(
                    "tensors in two shards", f"{key} ({infos[key].file.name}, {name})"
                )
            elif key not in weight_map:
                problems.add("tensors that the index does not name", f"{key} ({name})")
            elif weight_map[key] != name:
                problems.add(
                    "tensors in another shard than the index says",
                    f"{key} ({name} instead of {weight_map[key]})",
                )
            infos[key] = info
    for key, name in weight_map.items():
        if key not in infos and (path / name).is_file():
            problems.add("tensors that their shard lacks", f"{key} ({name})")
    problems.check(hint="Download or copy the checkpoint again.")
    return TensorFiles(path, infos)


def _no_weights(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    shards = [n for n in names if n.endswith(".safetensors")]
    if pickles and not shards:
        return (
            f"`{path}` holds its weights in pickle files ({', '.join(pickles[:3])}), "
            "which can run any code when they are opened and are therefore not read. "
            "Convert once with transformers: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)`."
        )
    if shards:
        return (
            f"`{path}` has {', '.join(shards[:3])} but neither {SINGLE} nor {INDEX}; "
            "download the index file too."
        )
    return f"`{path}` has no weights: neither {SINGLE} nor {INDEX} is there."


def _seen_from(path: Path) -> str:
    """Where a relative path was looked for."""
    return "" if path.is_absolute() else f" in `{Path.cwd()}`, where this runs"


class Mismatches:
    """Collects the tensors that differ from what is expected, as one error.

    A message counts them by kind and names the first of each. (A list of sentences is
    `qlora_jax.errors.Problems`.)
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
    exponent, integer = {
        "float32": (0x7F800000, np.uint32),
        "bfloat16": (0x7F80, np.uint16),
        "float16": (0x7C00, np.uint16),
    }[array.dtype.name]
    bits = array.reshape(-1).view(integer)
    mask = integer(exponent)
    step = 1 << 20  # bounds the scratch memory
    for start in range(0, bits.size, step):
        # NaN and infinity, and they alone, have all exponent bits set.
        if ((bits[start : start + step] & mask) == mask).any():
            raise CheckpointError(
                f"Tensor `{name}` contains NaN or infinity; the file is damaged or its "
                "training diverged."
            )


def carried(*paths: Path) -> dict[str, str]:
    """What goes with adapters wherever they go: the chat template they have in common.

    Args:
      *paths: PEFT directories.

    Returns:
      What `save_adapter` takes as `beside`.

    Raises:
      CheckpointError: a template that cannot be read.
    """
    found: set[str | None] = set()
    for path in paths:
        file = path / CHAT_TEMPLATE
        try:
            found.add(file.read_text("utf-8") if file.is_file() else None)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"`{file}` cannot be read as text: {error}. Mend it, or delete it: the "
                "tokenizer's own template is used then."
            ) from error
    template = found.pop() if len(found) == 1 else None
    return {} if template is None else {CHAT_TEMPLATE: template}
