"""Files and directories that appear complete or not at all.

safetensors are written tensor by tensor, each made when its turn comes, so that a
checkpoint larger than memory can be written. A directory is filled under a temporary
name beside its final one, synced, and renamed.
"""

from __future__ import annotations

import contextlib
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

import numpy as np
from numpy.typing import NDArray

from convert.files import DTYPES, INDEX, SINGLE
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
        """An entry for an array at hand."""
        return cls(name, array.dtype, array.shape, lambda: array)


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one file, tensor by tensor, in the library's own layout.

    That layout (wide dtypes first, then by name; header padded with spaces to a
    multiple of 8) makes the same tensors give the same file, whoever writes it.
    """
    ordered, text = _layout(entries, metadata)
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
            del data  # not beside the next one
            on_bytes(e.nbytes)
        file.flush()
        os.fsync(file.fileno())


def safetensors_bytes(entries: Sequence[Entry], metadata: Mapping[str, str]) -> int:
    """Size of the file that `write_safetensors` would write, to the byte."""
    return 8 + len(_layout(entries, metadata)[1]) + sum(e.nbytes for e in entries)


def _layout(
    entries: Sequence[Entry], metadata: Mapping[str, str]
) -> tuple[list[Entry], bytes]:
    """The entries in file order, and the padded header."""
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


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes JSON as transformers and PEFT do: indented, keys sorted."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copies the bytes of one file, to the disk."""
    with open(source, "rb") as old, open(target, "wb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def check_new_directory(path: Path, *, overwrite: bool = False) -> None:
    """Refuses a place that `new_directory` would refuse; ask before long work.

    Raises:
      UserError: `path` is a file, or a directory with something in it.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"Cannot write the directory `{path}`: a file is there.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"`{path}` exists and is not empty; nothing was written. Give a new "
            "directory, or remove this one."
        )


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a directory to fill beside `path`, which takes its name at the end.

    After an error nothing is left behind, and what was at `path` is as before.

    Raises:
      UserError: `path` exists and is not an empty directory (unless `overwrite`), or
        it cannot be written (disk full, no permission).
    """
    path = Path(os.path.abspath(path))
    check_new_directory(path, overwrite=overwrite)
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
                try:
                    os.rename(temporary, path)
                except BaseException:  # a signal as well
                    if not path.exists():
                        os.rename(aside, path)
                    raise
                shutil.rmtree(aside)
            else:
                os.rename(temporary, path)
            _sync(path.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
    except OSError as error:
        raise UserError(
            f"Cannot write `{path}`: {error.strerror or error}. Nothing was left "
            "behind."
        ) from error


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def progress_bar(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes just done; draws a bar if `show`."""
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
