"""Tokens and labels of all examples, one after the other: in memory, or on disk.

The one idea: an example is a slice, so a data set of any size is two flat arrays and a
list of offsets. `Sink` writes them, `Examples` reads them, `MappedExamples` reads them
from files that need not fit in memory: it gives the pages it has touched back to the
system again and again, so that the process stays small however much it reads.
"""

import array
import dataclasses
import hashlib
import io
import itertools
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int32, Int64

from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.report import DataReport
from qlora_jax.data.settings import PLACES, DataConfig

# On disk too. All that jax runs on is little-endian, where this is int32 itself.
_INT32 = np.dtype("<i4")
# Entries of an array looked at in one go (4 MiB).
PIECE = 1 << 20
# Examples read from a map before its pages are given back. One read maps some 64 KiB
# around it in each of two files, so this is about 32 MiB.
_READS = 256
NAMES = ("tokens.i4", "labels.i4")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token and label arrays of all examples, one after the other.

    Attributes:
      tokens: int32 [N], token ids.
      labels: int32 [N], aligned with `tokens` (not shifted); `IGNORE` where nothing is
        supervised, and at the first position of every example, which no position of
        the same example predicts.
      offsets: int64 [examples + 1]; example `i` is `offsets[i] : offsets[i + 1]`.
      supervised: int32 [examples], supervised tokens of each.
      report: what was read, kept and dropped.
    """

    tokens: Int32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " examples_plus_1"]
    supervised: Int32[np.ndarray, " examples"]
    report: DataReport

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.offsets) - 1

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Tokens and labels of one example (views)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.labels[span]

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """int64 [examples], tokens in each example."""
        return np.diff(self.offsets)

    def used(self) -> Int32[np.ndarray, " ids"]:
        """The different token ids that occur, ascending."""
        found = np.zeros(0, np.int32)
        for piece in self._pieces(self.tokens):
            found = np.union1d(found, piece).astype(np.int32)
        return found

    def hash_into(self, digest: Any) -> None:
        """Feeds tokens, labels and offsets to a hash of `hashlib`, with their sizes."""
        for values in (self.tokens, self.labels, self.offsets):
            digest.update(str(len(values)).encode() + b":")
            for piece in self._pieces(values):
                little = piece.astype(piece.dtype.newbyteorder("<"), copy=False)
                digest.update(np.ascontiguousarray(little))

    def release(self) -> None:
        """Gives memory back that can be read again from disk; here there is none."""

    def _pieces(self, values: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(values), PIECE):
            yield values[start : start + PIECE]
            self.release()


@dataclasses.dataclass(frozen=True)
class MappedExamples(Examples):
    """`Examples` whose tokens and labels are files, mapped into memory.

    Attributes:
      maps: the two maps.
    """

    maps: tuple[mmap.mmap, ...] = ()
    _reads: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Tokens and labels of one example (copies)."""
        tokens, labels = super().__getitem__(index)
        copies = tokens.copy(), labels.copy()
        if next(self._reads) % _READS == _READS - 1:
            self.release()
        return copies

    def release(self) -> None:
        """Takes the pages that were read out of this process's memory."""
        for view in self.maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                view.madvise(mmap.MADV_DONTNEED)


def map_examples(
    directory: Path, lengths: Any, supervised: Any, report: DataReport
) -> MappedExamples:
    """Maps the files that a `Sink` wrote.

    Args:
      directory: where they are.
      lengths: int64 [examples], tokens in each example.
      supervised: int32 [examples], supervised tokens of each.
      report: what was read, kept and dropped.
    """
    maps = []
    for name in NAMES:
        with open(directory / name, "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tokens, labels = (np.frombuffer(view, _INT32) for view in maps)
    return MappedExamples(
        tokens=tokens,
        labels=labels,
        offsets=_offsets(lengths),
        supervised=supervised,
        report=report,
        maps=tuple(maps),
    )


class Sink:
    """Takes examples one by one.

    Args:
      directory: where the arrays are written; None keeps them in memory.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._lengths = array.array("q")
        self._supervised = array.array("i")
        self._streams: list[IO[bytes]] = [
            io.BytesIO() if directory is None else open(directory / name, "wb")
            for name in NAMES
        ]

    def __len__(self) -> int:
        return len(self._lengths)

    def add(
        self, tokens: Int32[np.ndarray, " T"], labels: Int32[np.ndarray, " T"]
    ) -> None:
        """Appends one example."""
        for stream, values in zip(self._streams, (tokens, labels), strict=True):
            stream.write(np.ascontiguousarray(values, _INT32).data)
        self._lengths.append(len(tokens))
        self._supervised.append(int((labels != IGNORE).sum()))

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """int64 [examples], tokens in each example so far."""
        return np.array(self._lengths, np.int64)

    @property
    def supervised(self) -> Int32[np.ndarray, " examples"]:
        """int32 [examples], supervised tokens of each example so far."""
        return np.array(self._supervised, np.int32)

    def examples(self, report: DataReport) -> Examples:
        """What was added, to be read; nothing more can be added."""
        lengths, supervised = self.lengths, self.supervised
        if self.directory is not None:
            for stream in self._streams:
                stream.flush()
                os.fsync(stream.fileno())
            self.close()
            return map_examples(self.directory, lengths, supervised, report)
        buffers = [stream.getbuffer() for stream in self._streams]  # pyright: ignore[reportAttributeAccessIssue]
        tokens, labels = (np.frombuffer(buffer, _INT32) for buffer in buffers)
        return Examples(tokens, labels, _offsets(lengths), supervised, report)

    def close(self) -> None:
        """Closes the files."""
        if self.directory is not None:
            for stream in self._streams:
                stream.close()


def quartiles(supervised: np.ndarray) -> tuple[int, ...]:
    """Least, quartiles and most of a count per example, each one that occurs."""
    places = np.percentile(supervised, (0, 25, 50, 75, 100), method="lower")
    return tuple(int(value) for value in places)


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The settings of one source that change what its batches hold."""
    settings = dataclasses.asdict(config) | {"train_on": config.supervised}
    for name in PLACES:
        del settings[name]
    return settings


def fingerprint(config: DataConfig, examples: Examples) -> str:
    """Hash of what an `Examples` holds and of the settings of its source."""
    settings = json.dumps(settings_of(config), sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    examples.hash_into(digest)
    return digest.hexdigest()


def _offsets(lengths: np.ndarray) -> Int64[np.ndarray, " examples_plus_1"]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
