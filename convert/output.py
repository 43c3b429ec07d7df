"""Atomic output: files and directories that appear complete or not at all.

safetensors are written tensor by tensor, each computed when its turn comes, so that a
checkpoint larger than memory can be written. A directory is filled under a temporary
name next to its final one, synced, and renamed.
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


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, or replaces it; it is complete at every moment."""
    # Next to the target: a rename is atomic within one file system only.
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # After fsync: the new name must not reach the disk before the content.
        os.replace(temporary, path)
    except BaseException:  # a signal as well
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, by `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes JSON as transformers and PEFT do, indented, by `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a directory by their names, which may have a folder."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_bytes(directory / name, content)


def check_new_directory(path: Path, *, overwrite: bool = False) -> None:
    """Raises where `new_directory` would; call it before long work.

    Raises:
      UserError: `path` is a file, or a directory with something in it.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"Cannot write the directory `{path}`: it is a file.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"`{path}` exists and is not empty; nothing was written. Give a new "
            "directory, or remove this one."
        )


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory to fill, which is renamed to `path` at the end.

    After an error or a signal nothing is left behind, and `path` is as before.

    Raises:
      UserError: `path` exists and is not an empty directory (unless `overwrite`), or
        it cannot be written (disk full, no permission).
    """
    # Gives "." and ".." a name and a parent, and keeps symbolic links.
    path = Path(os.path.abspath(path))
    check_new_directory(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            # mkdtemp makes it private; set the mode of any new directory.
            # The mask can only be read by setting it.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(stat.S_IMODE(0o777 & ~mask))
            # The entries reach the disk before the rename, and the rename before
            # success is reported.
            _sync(temporary)
            if overwrite and path.is_dir() and any(path.iterdir()):
                _replace(path, temporary)
            else:
                # Replaces an empty directory, and fails if it was filled in the
                # meantime.
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


def _replace(path: Path, temporary: Path) -> None:
    """Exchanges a directory for a new one; an error puts the old one back."""
    # POSIX exchanges no two directories at once, so the old one steps aside first.
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:  # a signal as well, before, between or after the two
        if path.exists():  # not moved yet, or the new one is in place
            shutil.rmtree(old)
        else:
            os.rename(old, path)
        raise
    shutil.rmtree(old)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
