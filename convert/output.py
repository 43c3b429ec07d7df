"""Model directories, written tensor by tensor.

Each tensor is computed when its turn comes, so that a checkpoint larger than memory can
be written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.atomic import write_bytes, write_json
from convert.files import DTYPES, WEIGHTS_FILE, WEIGHTS_INDEX
from qlora_jax.errors import UserError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


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
        """Makes an entry of an array in memory."""
        return cls(name, array.dtype, array.shape, lambda: array)


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one file, tensor by tensor, in the layout of the safetensors library.

    That layout (wide dtypes first, then by name; header padded with spaces to a
    multiple of 8) makes the file a function of its tensors, byte for byte.
    """
    ordered, header = _layout(entries, metadata)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for e in ordered:
            array = e.read()
            if array.shape != e.shape or array.dtype != e.dtype:
                raise AssertionError(f"`{e.name}`: {array.dtype}{array.shape} != {e}")
            # As bytes: numpy exports no buffer of ml_dtypes' bfloat16.
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            del array
            file.write(memoryview(data))
            del data  # free it before the next tensor is computed
            on_bytes(e.nbytes)
        # The caller renames the file's directory into place, which must not outlive a
        # power failure that the bytes do not.
        file.flush()
        os.fsync(file.fileno())


def safetensors_bytes(entries: Sequence[Entry], metadata: Mapping[str, str]) -> int:
    """Returns the exact size of the file that `write_safetensors` would write."""
    return 8 + len(_layout(entries, metadata)[1]) + sum(e.nbytes for e in entries)


def _layout(
    entries: Sequence[Entry], metadata: Mapping[str, str]
) -> tuple[list[Entry], bytes]:
    """Returns the entries in file order, and the padded header."""
    # Wide dtypes first: every tensor starts at a multiple of its item size.
    ordered = sorted(entries, key=lambda e: (-_RANK[e.dtype], e.name))
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
    return ordered, text


def write_model_files(
    directory: Path,
    entries: Sequence[Entry],
    *,
    max_shard_bytes: int,
    progress: bool = False,
) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` and the index.

    Entries keep their order from shard to shard; a larger tensor gets a shard for
    itself.
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
    # transformers writes it, and its older versions refuse a file without it.
    metadata = {"format": "pt"}
    total_size = sum(e.nbytes for e in entries)
    weight_map = {}
    with progress_bar("Writing", total_size, progress) as advance:
        for i, shard in enumerate(shards, start=1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            name = WEIGHTS_FILE if len(shards) == 1 else name
            write_safetensors(directory / name, shard, metadata, advance)
            weight_map.update({entry.name: name for entry in shard})
    if len(shards) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(e.shape) for e in entries),
            "total_size": total_size,
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(directory / WEIGHTS_INDEX, index)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a directory by their names, which may have a folder."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_bytes(directory / name, content)


@contextlib.contextmanager
def progress_bar(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes just done; draws a bar if `show`."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
