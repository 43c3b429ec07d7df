"""Token and label arrays of all examples, in memory or in a memory-mapped cache.

An example is a slice, so a data set of any size is two flat arrays and a list of
offsets. `Sink` writes them, `Examples` reads them. `MappedExamples` reads them from
files that need not fit in memory: it regularly returns the pages it has read to the
system, so that the process stays small however much it reads.

The cache holds the arrays of one source:

    DIR/KEY/tokens.i4, labels.i4, lengths.npy, supervised.npy, meta.json

KEY hashes everything that the tokens depend on (file contents, tokenizer, settings), so
a cache cannot be stale. It is written under another name and renamed when complete; one
process writes it while others wait.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int32, Int64

from qlora_jax.data.builtin_templates import template_file
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.report import DataReport, from_dict
from qlora_jax.errors import UserError
from qlora_jax.reading import open_file, read_bytes

# The dtype in memory and on disk; on every platform of JAX it is the native int32.
_INT32 = np.dtype("<i4")
# Array entries processed at a time (4 MiB).
CHUNK = 1 << 20
# Examples read from a map before its pages are released. One read faults in about
# 64 KiB around it in each of two files, so this is about 32 MiB.
_READS_PER_RELEASE = 256
_ARRAY_FILES = ("tokens.i4", "labels.i4")
# To be raised when the same rows give other tokens or labels, or the files change.
_CACHE_VERSION = 5
# Settings that change the order of the examples and not their content.
_ORDER_FIELDS = ("seed", "shuffle", "packed")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Concatenated token and label arrays of all examples.

    Attributes:
      tokens: int32 [N], token ids.
      labels: int32 [N], aligned with `tokens` (not shifted); `IGNORE` where nothing is
        supervised, and at the first position of every example, which no position of
        the same example predicts.
      offsets: int64 [examples + 1]; example `i` is `offsets[i] : offsets[i + 1]`.
      supervised: int32 [examples], supervised tokens of each.
      report: counts of rows read, kept and dropped.
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
        """Returns tokens and labels of one example (views)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.labels[span]

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """int64 [examples], tokens in each example."""
        return np.diff(self.offsets)

    def used(self) -> Int32[np.ndarray, " ids"]:
        """Returns the distinct token ids that occur, ascending."""
        ids = np.zeros(0, np.int32)
        for chunk in self._chunks(self.tokens):
            ids = np.union1d(ids, chunk).astype(np.int32)
        return ids

    def hash_into(self, digest: Any) -> None:
        """Updates a `hashlib` digest with tokens, labels, offsets and their sizes."""
        for values in (self.tokens, self.labels, self.offsets):
            # Without the length, [1, 2] and [3] would hash like [1] and [2, 3].
            digest.update(str(len(values)).encode() + b":")
            for chunk in self._chunks(values):
                # The same hash on every platform.
                little = chunk.astype(chunk.dtype.newbyteorder("<"), copy=False)
                digest.update(np.ascontiguousarray(little))

    def release(self) -> None:
        """Frees memory that can be read from disk again; does nothing here."""

    def count_label(self, token_id: int | None) -> int:
        """Counts how often a token id is supervised; None never is."""
        if token_id is None:
            return 0
        return sum(int((c == token_id).sum()) for c in self._chunks(self.labels))

    def _chunks(self, values: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(values), CHUNK):
            yield values[start : start + CHUNK]
            self.release()


@dataclasses.dataclass(frozen=True)
class MappedExamples(Examples):
    """`Examples` whose tokens and labels are memory-mapped files.

    Attributes:
      maps: the maps of both files.
    """

    maps: tuple[mmap.mmap, ...] = ()
    _reads: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Returns tokens and labels of one example (copies)."""
        tokens, labels = super().__getitem__(index)
        copies = tokens.copy(), labels.copy()
        if next(self._reads) % _READS_PER_RELEASE == _READS_PER_RELEASE - 1:
            self.release()
        return copies

    def release(self) -> None:
        """Removes the pages that were read from this process's memory."""
        for view in self.maps:
            # Nothing is lost: clean pages of a file are read again when they are
            # needed.
            if hasattr(mmap, "MADV_DONTNEED"):
                view.madvise(mmap.MADV_DONTNEED)


class Sink:
    """Writes examples one by one.

    Args:
      directory: directory for the arrays; None keeps them in memory.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        # 8 and 4 bytes an example; Python's integers in a list take several times that.
        self._lengths = array.array("q")
        self._supervised = array.array("i")
        self._streams: list[IO[bytes]] = [
            io.BytesIO() if directory is None else open(directory / name, "wb")
            for name in _ARRAY_FILES
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
        """Returns the examples added so far; no more can be added."""
        lengths, supervised = self.lengths, self.supervised
        if self.directory is not None:
            for stream in self._streams:
                stream.flush()
                os.fsync(stream.fileno())
            self.close()
            return _map_examples(self.directory, lengths, supervised, report)
        # Views, not copies; while they exist, a stream cannot grow.
        buffers = [stream.getbuffer() for stream in self._streams]  # pyright: ignore[reportAttributeAccessIssue]
        tokens, labels = (np.frombuffer(buffer, _INT32) for buffer in buffers)
        return Examples(tokens, labels, _offsets(lengths), supervised, report)

    def close(self) -> None:
        """Closes the files."""
        if self.directory is not None:
            for stream in self._streams:
                stream.close()


def fingerprint(config: DataConfig, examples: Examples) -> str:
    """Hashes the content of examples and the settings of their source."""
    settings = json.dumps(config.content_settings, sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    examples.hash_into(digest)
    return digest.hexdigest()


def _offsets(lengths: np.ndarray) -> Int64[np.ndarray, " examples_plus_1"]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _map_examples(
    directory: Path, lengths: Any, supervised: Any, report: DataReport
) -> MappedExamples:
    maps = []
    for name in _ARRAY_FILES:
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


# --- The cache ---


def cache_directory(
    config: DataConfig, run_directory: str | Path | None
) -> Path | None:
    """Resolves `data.cache`; None without a cache.

    Raises:
      UserError: it is "auto" and there is no run directory.
    """
    if config.cache is None:
        return None
    if config.cache != "auto":
        return Path(config.cache)
    if run_directory is None:
        raise UserError(
            "`data.cache` = 'auto' is named after a run directory, and there is none "
            "here. Name a directory, or leave it out."
        )
    run = Path(run_directory)
    return run.with_name(run.name + ".data")


def cache_key(
    config: DataConfig, content_hashes: Sequence[str], tokenizer: Any, vocab_size: int
) -> str:
    """Hashes everything that the tokens of a source depend on."""
    settings = config.content_settings
    # One cache serves every seed.
    for name in _ORDER_FIELDS:
        settings.pop(name, None)
    template = None
    if config.chat_template is not None:
        with contextlib.suppress(OSError):  # the renderer reports a missing template
            template = read_bytes(template_file(config.chat_template)).hex()
    parts = {
        "version": _CACHE_VERSION,
        "settings": settings,
        "chat_template": template,
        "content": list(content_hashes),
        "tokenizer": None if config.format == "tokens" else _tokenizer_key(tokenizer),
        "vocab_size": vocab_size,
        # Another version may split the same string into other tokens.
        "libraries": {
            name: importlib.metadata.version(name)
            for name in ("transformers", "tokenizers")
        },
    }
    serialized = json.dumps(parts, sort_keys=True)
    # 128 bits: a short name that no other key has.
    return hashlib.sha256(serialized.encode()).hexdigest()[:32]


def cached(
    directory: Path,
    key: str,
    config: DataConfig,
    build: Callable[[Path], Examples],
) -> Examples:
    """Maps the cache of a key, building it first if it does not exist.

    Args:
      directory: parent directory of all caches.
      key: from `cache_key`.
      config: the source, for the fingerprint of its examples.
      build: writes the arrays into a directory and returns the examples.

    Raises:
      UserError: the directory cannot be written, or `build` raises it.
    """
    entry = directory / key
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f".{key}.lock"):
            # Asked under the lock: the process that held it before may have built it.
            found = _read_entry(entry)
            if found is None:
                _remove(entry)
                _build_entry(entry, directory / f".{key}.partial", config, build)
                found = _read_entry(entry)
    except OSError as error:
        raise UserError(
            f"`data.cache`: cannot write {directory}: {error}. Tokens and labels take "
            "8 bytes a token there; name another directory, or free disk space."
        ) from error
    if found is None:
        raise UserError(
            f"`data.cache`: {entry} was written and cannot be read. Delete it, or name "
            "another directory."
        )
    examples, settings = found
    if settings == config.content_settings:
        return examples
    report = examples.report
    # Another seed gives another fingerprint of the same examples.
    values = report.as_dict() | {"fingerprint": fingerprint(config, examples)}
    return dataclasses.replace(examples, report=from_dict(values))


def _build_entry(
    entry: Path,
    partial: Path,
    config: DataConfig,
    build: Callable[[Path], Examples],
) -> None:
    # A leftover is of a process that was killed: this one holds the lock.
    _remove(partial)
    partial.mkdir()
    try:
        examples = build(partial)
        np.save(partial / "lengths.npy", examples.lengths)
        np.save(partial / "supervised.npy", examples.supervised)
        meta = {
            "settings": config.content_settings,
            "report": examples.report.as_dict(),
            "sizes": {name: (partial / name).stat().st_size for name in _ARRAY_FILES},
        }
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
        # The rename must not reach the disk before the files do.
        for file in partial.iterdir():
            _fsync(file)
        os.rename(partial, entry)
        _fsync(entry.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_entry(entry: Path) -> tuple[MappedExamples, dict[str, Any]] | None:
    """Maps what `_build_entry` wrote.

    Returns:
      The examples and the settings they were made with; None if something is missing
      or damaged.
    """
    try:
        meta = json.loads(read_bytes(entry / "meta.json"))
        sizes = meta["sizes"]
        if any(_size(entry / name) != sizes[name] for name in _ARRAY_FILES):
            return None
        lengths, supervised = (
            _load_array(entry / f"{name}.npy") for name in ("lengths", "supervised")
        )
        # As many tokens as the files have, in examples of at least one.
        is_sound = (
            lengths.dtype == np.int64
            and supervised.dtype == np.int32
            and lengths.shape == supervised.shape == (len(lengths),)
            and bool((lengths >= 0).all())
            and int(lengths.sum()) * _INT32.itemsize == sizes[_ARRAY_FILES[0]]
        )
        if not is_sound:
            return None
        report = from_dict(meta["report"])
        return _map_examples(entry, lengths, supervised, report), meta["settings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except (EOFError, RecursionError, MemoryError):  # of JSON, or of a header's claim
        return None


def _load_array(path: Path) -> np.ndarray:
    with open_file(path) as file:
        return np.load(file)


def _size(path: Path) -> int:
    """Returns the size of a regular file."""
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def _remove(path: Path) -> None:
    """Removes a directory, or what is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes that build the same cache.

    The operating system releases the lock when a process ends, however it ends. Some
    network file systems have no locks; there two processes must not start at once.
    """
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tokenizer_key(tokenizer: Any) -> str:
    """Hashes everything that a tokenizer's output depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Normalization, splitting, merges and added tokens, as tokenizer.json has them.
        rules = backend.to_str()
    else:  # a slow tokenizer cannot print its rules; its vocabulary stands for them
        vocabulary = tokenizer.get_vocab().items()
        rules = json.dumps(sorted(vocabulary, key=lambda item: item[1]))
    parts = [
        type(tokenizer).__name__,
        rules,
        repr(getattr(tokenizer, "chat_template", None)),
        repr(getattr(tokenizer, "bos_token_id", None)),
        repr(getattr(tokenizer, "eos_token_id", None)),
        # A chat template may write any of them.
        repr(getattr(tokenizer, "special_tokens_map", None)),
        # Whether transformers adds BOS may be a setting outside the rules.
        repr(tokenizer("a", add_special_tokens=True)["input_ids"]),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
