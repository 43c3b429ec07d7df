"""Tokenized once, kept on disk: the examples of one source, mapped into memory.

    DIR/KEY/tokens.i4, labels.i4, lengths.npy, supervised.npy, meta.json

The one idea: KEY is a hash of all that the tokens depend on (what the files hold, the
tokenizer, the settings), so a cache is right or is not found. It is written beside its
place and renamed when it is complete; one process writes it while others wait for it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data.arrays import (
    NAMES,
    Examples,
    fingerprint,
    map_examples,
    settings_of,
)
from qlora_jax.data.report import from_dict
from qlora_jax.data.settings import DataConfig
from qlora_jax.data.sources import Place
from qlora_jax.errors import UserError

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
