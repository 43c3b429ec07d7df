"""safetensors on disk: strict reading, streamed writing, directories that appear whole.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}
and the tensors' bytes (https://huggingface.co/docs/safetensors). The safetensors
library checks a file when it is opened; tensors are then read with plain file reads
straight into the place where they are wanted, so that no tensor is held twice and a
file that shrinks under us is an error and not a bus error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from qlora_jax.errors import CheckpointError, UserError

# safetensors' names <-> numpy dtypes. Others (F8_E5M2, ...) exist; no file that this
# project reads may have them, and the checks of keys and dtypes say so by name.
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        out = np.empty(info.shape, DTYPES[info.dtype])
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: NDArray) -> None:
        """Reads the bytes of one tensor into `out`, which has as many, contiguous."""
        info = self[name]
        flat = out.reshape(-1).view(np.uint8)
        if flat.size != info.nbytes or not np.may_share_memory(out, flat):
            raise AssertionError(f"`{name}`: no place for {info.nbytes} bytes")
        target = memoryview(flat)
        try:
            with open(info.file, "rb", buffering=0) as file:
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


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Opens one safetensors file; returns its tensors and its metadata.

    Raises:
      CheckpointError: missing, truncated or malformed file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start.startswith((b"version ", b"<!DOCTYP", b"<html")):
                raise CheckpointError(
                    f"`{path}` is a Git LFS pointer or a web page, not the file "
                    "itself; download the checkpoint again (`git lfs pull`)."
                )
            # The library's checks: header length, JSON, offsets without gap or overlap
            # that end where the file ends.
            with safetensors.safe_open(path, framework="np"):
                pass
            length = int.from_bytes(start, "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` does not exist.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read `{path}`: {error.strerror}.") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"`{path}` is truncated or damaged ({error}); download or copy it again."
        ) from error
    metadata = header.pop("__metadata__", {})
    infos = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        infos[name] = TensorInfo(
            file=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=8 + length + begin,
            nbytes=end - begin,
        )
    return infos, metadata


def read_json(path: Path) -> Any:
    """Reads a JSON object; a malformed file is named."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` does not exist.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read `{path}`: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"`{path}` is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"`{path}` must hold a JSON object, got {type(value).__name__}."
        )
    return value


def check_model_directory(path: Path) -> None:
    """Refuses what is no Hugging Face model directory, saying what it is instead."""
    if not path.exists():
        raise CheckpointError(
            f"`{path}` does not exist. A model is a local Hugging Face directory; a "
            "name on the Hub has to be downloaded first (`hf download NAME "
            "--local-dir DIR`)."
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
            f"`{path}` is a PEFT adapter, not a model. Give its base model here, and "
            "this directory as the adapter."
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
        isinstance(f, str) and f == os.path.basename(f) for f in weight_map.values()
    ):
        raise CheckpointError(
            f"`{index}` has no `weight_map` of tensor names to file names in the same "
            "directory."
        )
    problems = Problems(f"The shards in `{path}` and {INDEX} disagree")
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


class Problems:
    """Collects what is wrong with a checkpoint, to say it all in one error."""

    _SHOWN = 10

    def __init__(self, subject: str):
        self.subject = subject
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        """Notes one problem."""
        self.found.setdefault(kind, []).append(item)

    def check(self, hint: str = "") -> None:
        """Raises `CheckpointError` if any problem was noted."""
        if not self.found:
            return
        parts = []
        for kind, items in self.found.items():
            shown = ", ".join(items[: self._SHOWN])
            more = len(items) - self._SHOWN
            rest = f" and {more} more" if more > 0 else ""
            parts.append(f"{len(items)} {kind}: {shown}{rest}")
        raise CheckpointError(f"{self.subject}. {'; '.join(parts)}. {hint}".rstrip())


# --- Writing ---


@dataclass(frozen=True)
class Entry:
    """One tensor to be written; `read` is called when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], NDArray] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, array: NDArray) -> Entry:
        """An entry for an array at hand."""
        return cls(name, array.dtype, array.shape, lambda: array)


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one file, tensor by tensor, in the library's own layout.

    That layout (wide dtypes first, then by name; header padded with spaces to a multiple
    of 8) makes the same tensors give the same file, whoever writes it.
    """
    ordered = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for e in ordered:
        header[e.name] = {
            "dtype": _NAMES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [offset, offset + e.nbytes],
        }
        offset += e.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for e in ordered:
            array = e.read()
            if array.shape != e.shape or array.dtype != e.dtype:
                raise AssertionError(f"`{e.name}`: {array.dtype}{array.shape} != {e}")
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            del array
            file.write(memoryview(data))
            on_bytes(e.nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_model_files(
    directory: Path,
    entries: Sequence[Entry],
    *,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` and the index.

    Entries keep their order from shard to shard; a tensor larger than a shard gets one
    of its own.
    """
    if max_shard_bytes < 1:
        raise UserError(f"`max_shard_bytes` must be positive, got {max_shard_bytes}.")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(directory / SINGLE, entries, metadata, on_bytes)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard, metadata, on_bytes)
        weight_map.update({entry.name: name for entry in shard})
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(e.shape) for e in entries),
            "total_size": sum(e.nbytes for e in entries),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(directory / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as transformers and PEFT do: indented, keys sorted."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


# Disk full, quota reached, file size limit: the user's to mend.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a directory to fill beside `path`, which takes its name at the end.

    After an error nothing is left behind, and what was at `path` is as before.

    Raises:
      UserError: `path` exists and is not an empty directory (unless `overwrite`), or
        the disk is full or not writable.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"Cannot write the directory `{path}`: a file is there.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"`{path}` exists and is not empty; nothing was written. Give a new "
            "directory, or remove this one."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            # mkdtemp makes it private; give it the mode any new directory gets.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(stat.S_IMODE(0o777 & ~mask))
            _sync(temporary)
            if overwrite and path.is_dir() and any(path.iterdir()):
                aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
                os.rename(path, aside)
                os.rename(temporary, path)
                shutil.rmtree(aside)
            else:
                os.rename(temporary, path)
            _sync(path.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"Cannot write `{path}`: {error.strerror}. Nothing was left behind."
        ) from error


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
