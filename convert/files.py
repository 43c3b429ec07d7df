"""safetensors on disk, read strictly.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}
and the tensors' bytes (https://huggingface.co/docs/safetensors). The safetensors
library checks a file when it is opened; tensors are then read with plain file reads
straight into the place where they are wanted, so that no tensor is held twice and a
file that shrinks under us is an error and not a bus error.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        """Returns the bytes of one tensor, whatever its dtype."""
        out = np.empty(self[name].nbytes, np.uint8)
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
