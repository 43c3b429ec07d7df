"""Checkpoints of a run: the state that changes, saved with Orbax and checked.

A checkpoint holds the train state (step, adapters, optimizer moments, PRNG key) and a
JSON record: how many batches were used (which is all of the data cursor, since batches
are a function of their index) and what must be unchanged to continue
(`qlora_jax.runs.resume`). The frozen base is not saved again. Orbax writes in the
background into a temporary directory that it renames when complete, and keeps the
newest few.

The record also holds checksums of the arrays and of itself: Orbax notices a file that
is truncated or missing, but reads most flipped bits silently.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import stat
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from convert import read_json
from qlora_jax.errors import CheckpointError, UserError, say
from qlora_jax.runs.checksum import checksum
from qlora_jax.runs.config import CheckpointConfig
from qlora_jax.runs.directory import saved_steps
from qlora_jax.runs.interruption import AtOnce
from qlora_jax.runs.processes import Peers
from qlora_jax.training import TrainState

_T = TypeVar("_T")

# In which all processes must have read a checkpoint.
_READ_SECONDS = 3600.0
# Bytes that a checkpoint may need in addition to its arrays.
_SLACK = 1 << 20
_CHECKSUMS = "checksums"
# What Orbax writes about a checkpoint; and its name where that is damaged.
_METADATA = "_CHECKPOINT_METADATA"
_ASIDE = f"damaged{_METADATA}"


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was saved; an older one may be intact."""


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits at the end."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        peers: Peers | None = None,
        cleanup: bool = True,
    ) -> None:
        """Opens (and creates, if need be) the directory.

        Args:
          directory: of the checkpoints.
          config: how many are kept.
          peers: the processes of the run, which all call the same methods.
          cleanup: delete half-written checkpoints of a process that was killed. Orbax
            does so in a thread, which may outlive a manager that only reads.

        Raises:
          CheckpointError: it cannot be written.
        """
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            step_prefix="step",
            create=True,
            cleanup_tmp_directories=cleanup,
            enable_async_checkpointing=True,
        )
        _silence_orbax()
        self.peers = Peers() if peers is None else peers
        self.peers.on_first(
            "opening the checkpoints", lambda: _set_aside_metadata(self.directory)
        )
        with disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    # Trained floats hardly compress, and trying takes longer than
                    # writing them.
                    "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Waits for a save under way and closes."""
        if kind is AtOnce:  # the next start removes what is half-written
            return
        try:
            with disk_errors(self.directory):
                self._manager.close()
        except CheckpointError:
            if kind is None:  # else the first error is already being raised
                raise

    def latest(self) -> int | None:
        """Returns the newest step that is complete or being saved, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps that have a directory, newest first, damaged or not."""
        steps = {*self._manager.all_steps(), *saved_steps(self.directory)}
        return self.peers.broadcast(sorted(steps, reverse=True), "finding checkpoints")

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint so that it is not one; returns the new path."""

        def rename() -> str:
            path, number = self.directory / f"damaged_step_{step}", 1
            while path.exists():
                number += 1
                path = self.directory / f"damaged_step_{step}_{number}"
            with disk_errors(self.directory):
                os.rename(self.path(step), path)
            return str(path)

        path = self.peers.on_first("setting a checkpoint aside", rename)
        with disk_errors(self.directory):
            self._manager.reload()
        return Path(path)

    def path(self, step: int) -> Path:
        """Returns the directory of a step."""
        return self.directory / f"step_{step}"

    def save(self, state: TrainState, record: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied to the host.

        Raises:
          CheckpointError: the disk is full or not writable, now or during the previous
            save; earlier checkpoints are intact.
        """
        step = int(state.step)
        if step == self.latest():
            return
        tree = _saveable(state)
        record = dict(record)
        # The digest is of the record without its checksums, as reading finds it.
        record[_CHECKSUMS] = {"state": checksum(tree), "record": _digest(record)}
        # Orbax keeps the older checkpoints until this one is complete.
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        with disk_errors(self.directory):
            self.peers.on_first("saving", lambda: self._check_space(nbytes))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree),
                    record=ocp.args.JsonSave(record),
                ),
            )

    def _check_space(self, nbytes: int) -> None:
        """Reserves the bytes for a moment; raises `OSError` if the disk lacks them.

        Orbax would notice only in its background threads, which report it verbosely,
        at the next save.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        probe = self.directory / ".space"
        probe.unlink(missing_ok=True)  # opening a pipe would wait for its reader
        try:
            with open(probe, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes + _SLACK)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise  # the others mean that the file system cannot reserve
        finally:
            probe.unlink(missing_ok=True)

    def wait(self) -> None:
        """Waits until the current save is complete on disk."""
        with disk_errors(self.directory):
            self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """Reads the record of a step.

        Raises:
          DamagedCheckpointError: it is missing, or differs from what was saved.
        """
        return self._record_and_checksums(step)[0]

    def _record_and_checksums(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
        def read() -> tuple[dict[str, Any], dict[str, str]]:
            record = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )["record"]
            checksums = record.pop(_CHECKSUMS, {})
            _compare_checksum("record", checksums, _digest(record))
            return record, checksums

        return self._read(step, read)

    def _read(self, step: int, read: Callable[[], _T]) -> _T:
        """Returns what `read` returns; if it fails on one process, all raise."""
        result, failure = None, None
        try:
            result = _read_checkpoint(self.path(step), read)
        except CheckpointError as error:
            failure = error
        damaged = isinstance(failure, DamagedCheckpointError)
        told = None if failure is None else [str(failure), damaged]
        for outcome in self.peers.gather(told, "reading a checkpoint", _READ_SECONDS):
            if outcome is not None:
                text, damaged = outcome
                raise (DamagedCheckpointError if damaged else CheckpointError)(
                    text
                ) from failure
        return cast(_T, result)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a step into the structure, shapes and devices of `like`.

        Raises:
          DamagedCheckpointError: files that are damaged or of another structure.
          CheckpointError: files that cannot be read now.
        """
        target = jax.tree.map(_abstract, _saveable(like))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        checksums = self._record_and_checksums(step)[1]

        def read() -> Any:
            args = ocp.args.PyTreeRestore(target, restore_args=restore_args)
            state = self._manager.restore(step, args=ocp.args.Composite(state=args))
            _compare_checksum("state", checksums, checksum(state["state"]))
            return state["state"]

        # The shapes, dtypes and devices of `like` are asked for, so a checkpoint of
        # another structure is an error and not a conversion.
        restored = self._read(step, read)
        return TrainState(
            step=restored["step"],
            adapters=restored["adapters"],
            opt_state=restored["opt_state"],
            key=jax.random.wrap_key_data(
                restored["key"], impl=jax.random.key_impl(like.key)
            ),
        )


def _check_files(path: Path) -> None:
    """Raises if there is a pipe, a socket or a device in the checkpoint at `path`.

    Orbax would open it and wait for its writer, in a thread that no signal reaches.

    Raises:
      DamagedCheckpointError: names the first; or the checkpoint is itself not a
        directory.
    """
    if path.exists() and not path.is_dir():
        raise DamagedCheckpointError(
            f"The checkpoint `{path}` cannot be read (it is not a directory)."
        )
    seen = set()
    # `os.walk` goes on where a directory vanishes, as a half-written checkpoint does.
    for root, directories, names in os.walk(path, followlinks=True):
        # Links may lead in circles.
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()
        seen.add(real)
        for file in (Path(root, name) for name in names):
            if file.name != _ASIDE and _is_endless(file):
                raise DamagedCheckpointError(
                    f"The checkpoint `{path}` cannot be read (`{file}` is a pipe or a "
                    "device, not a file)."
                )


def _is_endless(path: Path) -> bool:
    """Whether opening or reading this may never end; a broken link or loop does."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _set_aside_metadata(directory: Path) -> None:
    """Renames a checkpoint's description by Orbax where it is not a JSON object.

    Orbax cannot open the directory of all checkpoints with it, and can without it.
    """
    for step in saved_steps(directory):
        path = directory / f"step_{step}" / _METADATA
        if not os.path.lexists(path):
            continue
        try:
            read_json(path)
        except CheckpointError as error:
            aside = path.with_name(_ASIDE)
            try:
                with disk_errors(directory):
                    os.replace(path, aside)
            except CheckpointError:
                # A run under way may have deleted an old checkpoint in the meantime.
                if os.path.lexists(path):
                    raise
                continue
            say(f"Note: {error} It is not needed, and is kept as `{aside}`.")


def _saveable(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "adapters": state.adapters,
        "opt_state": state.opt_state,
        # A typed key as its uint32 words; the implementation is the program's.
        "key": jax.random.key_data(state.key),
    }


def _abstract(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _compare_checksum(name: str, saved: Mapping[str, str], current: str) -> None:
    if saved.get(name) != current:
        raise ValueError(f"the {name} is not what was saved, by its checksum")


# In messages of libraries that hide the errno: strerror's words or their own.
_DISK_WORDS = (
    "No space left",
    "RESOURCE_EXHAUSTED",
    "File too large",
    "quota exceeded",
    "Read-only file system",
    "Permission denied",
    "Input/output error",
)


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turns a failure to write in `directory` into an error with advice.

    Raises:
      CheckpointError: the disk is full, a quota is used up, no permission.
    """
    try:
        yield
    except UserError:  # of another process, for one
        raise
    except Exception as error:  # tensorstore raises ValueError, Orbax various types
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            reasons = [words for words in _DISK_WORDS if words in str(error)]
            if not reasons:
                raise
            reason = reasons[0]
        raise CheckpointError(
            f"`{directory}` cannot be written: {reason}. The checkpoints there are "
            "intact; free some space or mend the directory, and give the same command "
            "to continue."
        ) from error


# Reasons that may pass: an intact checkpoint cannot be read, nor could an older one.
_TRANSIENT_WORDS = (
    "Permission denied",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "Too many open files",
    "Cannot allocate memory",
)


def _read_checkpoint(path: Path, read: Callable[[], _T]) -> _T:
    """Returns `read()`, which reads a part of the checkpoint at `path`.

    Files that can be read to an end are checked first.

    Raises:
      DamagedCheckpointError: the files are to blame.
      CheckpointError: the failure may be transient.
    """
    _check_files(path)
    try:
        return read()
    except Exception as error:  # Orbax and tensorstore raise a dozen types here
        read_error = _read_error(path, error)
    raise read_error


def _read_error(path: Path, error: Exception) -> CheckpointError:
    # The innermost cause has the reason; those around it have the path, at length.
    # Chained exceptions from the outside in.
    messages, cause = str(error), error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
        messages += str(cause)
    reason = (str(cause).strip().splitlines() or ["no message"])[0]
    if len(reason) > 160:
        reason = reason[:160] + "..."
    text = f"The checkpoint `{path}` cannot be read ({type(cause).__name__}: {reason})."
    transient = isinstance(error, MemoryError) or any(
        words in messages for words in _TRANSIENT_WORDS
    )
    return (CheckpointError if transient else DamagedCheckpointError)(text)


@functools.cache
def _silence_orbax() -> None:
    """Drops what Orbax prints about failures, in this process from now on.

    They are raised as well, and our message tells them. Where one of many reads or
    writes fails, a page is printed for each, from threads and from the garbage
    collector, at times of their own: hence for good.
    """
    unraisable, in_thread = sys.unraisablehook, threading.excepthook

    def unraisable_hook(arguments: Any) -> None:
        late = "Event loop is closed" in str(arguments.exc_value)
        if not late and not isinstance(arguments.object, types.CoroutineType):
            unraisable(arguments)

    def thread_hook(arguments: threading.ExceptHookArgs) -> None:
        frames = traceback.walk_tb(arguments.exc_traceback)
        if not any("orbax" in frame.f_code.co_filename for frame, _ in frames):
            in_thread(arguments)

    sys.unraisablehook, threading.excepthook = unraisable_hook, thread_hook
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "never retrieved" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", r"coroutine '\w*Store\..* was never awaited")
