"""Tokens and labels of all examples, one after the other: in memory, or on disk.

The one idea: an example is a slice, so a data set of any size is two flat arrays and a
list of offsets. `Sink` writes them, `Examples` reads them, `MappedExamples` reads them
from files that need not fit in memory: it gives the pages it has touched back to the
system again and again, so that the process stays small however much it reads.

Tokenized once, kept on disk: the examples of one source, mapped into memory.

    DIR/KEY/tokens.i4, labels.i4, lengths.npy, supervised.npy, meta.json

The one idea: KEY is a hash of all that the tokens depend on (what the files hold, the
tokenizer, the settings), so a cache is right or is not found. It is written beside its
place and renamed when it is complete; one process writes it while others wait for it.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int32, Int64

from qlora_jax.data.config import PLACES, DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.report import DataReport, from_dict
from qlora_jax.data.sources import Place
from qlora_jax.errors import UserError

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


# Raise it when the same rows give other tokens or labels, or the files change.
_VERSION = 1
# Settings that change the order of examples and not what they hold.
_ORDER = ("seed", "shuffle")


def cache_directory(
    config: DataConfig, run_directory: str | Path | None
) -> Path | None:
    """Where `data.cache` is; None without one.

    Raises:
      UserError: it is "auto", and there is no run it could be beside.
    """
    if config.cache is None:
        return None
    if config.cache != "auto":
        return Path(config.cache)
    if run_directory is None:
        raise UserError(
            "`data.cache` = 'auto' is beside the directory of a run, and here is none. "
            "Name a directory, or leave it out."
        )
    run = Path(run_directory)
    return run.with_name(run.name + ".data")


def cache_key(
    config: DataConfig, places: list[Place], tokenizer: Any, vocab_size: int
) -> str:
    """Hash of all that the tokens of a source depend on."""
    settings = {k: v for k, v in settings_of(config).items() if k not in _ORDER}
    template = None
    if config.chat_template is not None:
        with contextlib.suppress(OSError):  # reading it says what is wrong with it
            template = Path(config.chat_template).read_bytes().hex()
    parts = {
        "version": _VERSION,
        "settings": settings,
        "chat_template": template,
        "content": [_content(place) for place in places],
        "tokenizer": None if config.format == "tokens" else _tokenizer_key(tokenizer),
        "vocab_size": vocab_size,
        "libraries": {
            name: importlib.metadata.version(name)
            for name in ("transformers", "tokenizers")
        },
    }
    whole = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def cached(
    directory: Path,
    key: str,
    config: DataConfig,
    build: Callable[[Path], Examples],
) -> Examples:
    """Maps the cache of a key, and builds it before if it is not there.

    Args:
      directory: of all caches.
      key: what `cache_key` gave.
      config: the source, for the fingerprint of its examples.
      build: writes the arrays into a directory and returns the examples.

    Raises:
      UserError: the directory cannot be written; what `build` raises.
    """
    place = directory / key
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f".{key}.lock"):
            if not _complete(place):
                shutil.rmtree(place, ignore_errors=True)
                _build(place, directory / f".{key}.partial", config, build)
    except OSError as error:
        raise UserError(
            f"`data.cache`: cannot write {directory}: {error}. Tokens and labels take "
            "8 bytes a token there; give another directory, or make room."
        ) from error
    meta = json.loads((place / "meta.json").read_text())
    report = from_dict(meta["report"])
    examples = map_examples(
        place, np.load(place / "lengths.npy"), np.load(place / "supervised.npy"), report
    )
    if meta["settings"] == settings_of(config):
        return examples
    # Another seed gives another fingerprint of the same examples.
    values = report.as_dict() | {"fingerprint": fingerprint(config, examples)}
    return dataclasses.replace(examples, report=from_dict(values))


def _build(
    place: Path,
    partial: Path,
    config: DataConfig,
    build: Callable[[Path], Examples],
) -> None:
    # Whoever left it has no lock on it any more.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        examples = build(partial)
        np.save(partial / "lengths.npy", examples.lengths)
        np.save(partial / "supervised.npy", examples.supervised)
        meta = {
            "settings": settings_of(config),
            "report": examples.report.as_dict(),
            "sizes": {name: (partial / name).stat().st_size for name in NAMES},
        }
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
        for file in partial.iterdir():
            _sync(file)
        os.rename(partial, place)
        _sync(place.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _complete(place: Path) -> bool:
    """Whether all files are there with the sizes they were written with."""
    try:
        sizes = json.loads((place / "meta.json").read_text())["sizes"]
        return all((place / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes that build the same cache.

    The system gives the lock back when a process ends, however it ends. Some network
    file systems have no locks; there two processes must not start at once.
    """
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _content(place: Place) -> str:
    try:
        return place.content()
    except OSError as error:
        raise UserError(f"`data.path`: cannot read {place.name}: {error}") from error


def _tokenizer_key(tokenizer: Any) -> str:
    """Hash of what a tokenizer does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else _vocabulary(tokenizer)
    parts = [
        type(tokenizer).__name__,
        rules,
        repr(getattr(tokenizer, "chat_template", None)),
        repr(getattr(tokenizer, "bos_token_id", None)),
        repr(getattr(tokenizer, "eos_token_id", None)),
        # What transformers puts around a text may be a setting beside the rules.
        repr(tokenizer("a", add_special_tokens=True)["input_ids"]),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """The vocabulary of a tokenizer that has no rules to print, as one text."""
    return json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
