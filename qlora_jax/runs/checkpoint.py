"""Checkpoints of a run: what changes, saved with Orbax, and what must not, compared.

A checkpoint holds the train state (step, adapters, optimizer moments, PRNG key) and a
JSON record: how many batches were used (the whole data cursor, since batches are a
function of their index), the configuration, and fingerprints of the base and of the
data. The frozen base is not saved again. Orbax writes in the background into a
temporary directory that it renames when complete, and keeps the newest few.

The record also holds checksums, of the arrays and of itself: Orbax notices a file that
is cut off or missing, but reads most flipped bits without a word.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.nf4 import crc32, fingerprint_tree
from qlora_jax.runs.config import CheckpointConfig
from qlora_jax.runs.directory import saved_steps
from qlora_jax.runs.interruption import AtOnce
from qlora_jax.training.step import TrainState

# Bytes that a checkpoint may need beside its arrays.
_SLACK = 1 << 20
_CHECKSUMS = "checksums"


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was saved; an older one may be."""


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits at the end."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        """Opens (and creates, if need be) the directory.

        Raises:
          CheckpointError: it cannot be written.
        """
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            step_prefix="step",
            create=True,
            # What a killed process left half-written.
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    # Floats that were trained do not compress, and it costs more
                    # time than the disk takes.
                    "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Waits for a save under way and closes."""
        if kind is AtOnce:  # what is half-written goes with the next start
            return
        try:
            with disk_errors(self.directory):
                self._manager.close()
        except CheckpointError:
            if kind is None:  # else the error on its way out came first
                raise

    def latest(self) -> int | None:
        """The newest step that is complete or being saved, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Every step that has a directory, damaged or not, the newest first."""
        found = {*self._manager.all_steps(), *saved_steps(self.directory)}
        return sorted(found, reverse=True)

    def set_aside(self, step: int) -> Path:
        """Renames a step's directory so that it is no checkpoint; returns its place."""
        place, number = self.directory / f"damaged_step_{step}", 1
        while place.exists():
            number += 1
            place = self.directory / f"damaged_step_{step}_{number}"
        with disk_errors(self.directory):
            os.rename(self.path(step), place)
            self._manager.reload()
        return place

    def path(self, step: int) -> Path:
        """Directory of a step."""
        return self.directory / f"step_{step}"

    def save(self, state: TrainState, record: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied to the host.

        Raises:
          CheckpointError: the disk is full or not writable (now, or in the save
            before); earlier checkpoints are intact.
        """
        step = int(state.step)
        if step == self.latest():
            return
        tree = _saveable(state)
        record = dict(record)
        record[_CHECKSUMS] = {"state": _checksum(tree), "record": _digest(record)}
        with disk_errors(self.directory):
            self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree),
                    record=ocp.args.JsonSave(record),
                ),
            )

    def _check_space(self, nbytes: int) -> None:
        """Reserves the bytes for a moment; `OSError` where they are not to be had.

        Orbax would notice in its background threads, which say it in many words and at
        the next save.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        probe = self.directory / ".space"
        try:
            with open(probe, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes + _SLACK)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise  # else: a file system that cannot reserve
        finally:
            probe.unlink(missing_ok=True)

    def wait(self) -> None:
        """Returns when the save under way is complete on disk."""
        with disk_errors(self.directory):
            self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """Reads the record of a step.

        Raises:
          DamagedCheckpointError: it is missing, or not what was saved.
        """
        record = self._record(step)
        record.pop(_CHECKSUMS, None)
        return record

    def _record(self, step: int) -> dict[str, Any]:
        """The record with its checksums, itself checked."""

        def read() -> dict[str, Any]:
            record = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )["record"]
            rest = {key: value for key, value in record.items() if key != _CHECKSUMS}
            # Runs that were started before there were checksums have none.
            if len(rest) < len(record):
                _check("record", record[_CHECKSUMS]["record"], _digest(rest))
            return record

        return _read(self.path(step), read)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a step into the structure, shapes and devices of `like`.

        Raises:
          DamagedCheckpointError: files that are damaged or of another structure.
          CheckpointError: files that cannot be read now.
        """
        target = jax.tree.map(_abstract, _saveable(like))
        checksums = self._record(step).get(_CHECKSUMS)

        def read() -> Any:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        target,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(
                            target
                        ),
                    )
                ),
            )["state"]
            if checksums is not None:
                _check("state", checksums["state"], _checksum(restored))
            return restored

        restored = _read(self.path(step), read)
        return TrainState(
            step=restored["step"],
            adapters=restored["adapters"],
            opt_state=restored["opt_state"],
            key=jax.random.wrap_key_data(
                restored["key"], impl=jax.random.key_impl(like.key)
            ),
        )


# What a hash in a record is of.
_DATA = "data.fingerprint"
_MEANT = {
    "base_fingerprint": " (the weights of the base, or how they are quantized)",
    _DATA: " (the rows of the data files, the tokenizer, or the chat template)",
}


def compare_records(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuses to continue a run whose base, adapter, data or arithmetic has changed.

    Args:
      saved: record of the checkpoint; a nested mapping of plain values.
      now: the record that the run would write.
      defaults: of settings that a run may be older than, nested likewise.

    Raises:
      UserError: every entry that differs, with both values.
    """
    before = _flat(defaults or {}) | _flat(saved)
    after = _flat(now)
    known = _flat(saved).keys() | after.keys()
    keys = {key for key in known if before.get(key) != after.get(key)}
    if any(key.startswith("data.") for key in keys - {_DATA}):
        keys.discard(_DATA)  # which follows from the others
    if keys:
        changed = "".join(
            f"\n- {key}: {before.get(key)!r} -> {after.get(key)!r}{_MEANT.get(key, '')}"
            for key in sorted(keys)
        )
        raise UserError(
            "This run cannot be continued: what it was started with has changed:"
            f"{changed}\nUndo the change to continue, or give another --output-dir to "
            "start a new run."
        )


def _saveable(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "adapters": state.adapters,
        "opt_state": state.opt_state,
        "key": jax.random.key_data(state.key),
    }


def _abstract(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _checksum(tree: Any) -> str:
    """Of the arrays in their order; a library may rename what they are kept in."""
    return fingerprint_tree(jax.tree.leaves(tree), crc32)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check(name: str, saved: str, found: str) -> None:
    if saved != found:
        raise ValueError(f"the {name} is not what was saved, by its checksum")


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries by their dotted names, with the values that JSON gives back."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = json.loads(json.dumps(value))
    return out


# What libraries that hide the errno say, in the words of strerror or of their own.
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
    """Turns a failure to write below `directory` into one that says what to do.

    Raises:
      CheckpointError: the disk is full, a quota is used up, no permission.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # tensorstore says ValueError, Orbax what it likes
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


# What keeps a good checkpoint from being read: an older one would fare no better.
_PASSING_WORDS = (
    "Permission denied",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "Too many open files",
    "Cannot allocate memory",
)


_T = TypeVar("_T")


def _read(path: Path, read: Callable[[], _T]) -> _T:
    """Returns `read()`, which reads something of the checkpoint at `path`.

    Raises:
      DamagedCheckpointError: it failed for what lies there.
      CheckpointError: it failed for what may pass.
    """
    with _quiet_about_unfinished():
        try:
            return read()
        except Exception as error:  # Orbax and tensorstore raise a dozen types here
            failed = _read_error(path, error)
        # Where one of many reads has failed Orbax leaves the others behind.
        gc.collect()
    raise failed


def _read_error(path: Path, error: Exception) -> CheckpointError:
    whole, cause = "", error
    while True:
        whole += str(cause)
        if cause.__cause__ is None or not isinstance(cause.__cause__, Exception):
            break
        cause = cause.__cause__  # says why; those above say where, at length
    reason = (str(cause).strip().splitlines() or ["no message"])[0]
    if len(reason) > 160:
        reason = reason[:160] + "..."
    text = f"The checkpoint `{path}` cannot be read ({type(cause).__name__}: {reason})."
    passing = isinstance(error, MemoryError) or any(w in whole for w in _PASSING_WORDS)
    return (CheckpointError if passing else DamagedCheckpointError)(text)


@contextlib.contextmanager
def _quiet_about_unfinished() -> Iterator[None]:
    """Drops what unfinished reads say when they die: a page on stderr for each.

    Some come to an end in threads of tensorstore, after the event loop has.
    """
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        late = "Event loop is closed" in str(unraisable.exc_value)
        if not late and not isinstance(unraisable.object, types.CoroutineType):
            hook(unraisable)

    sys.unraisablehook = quiet
    try:
        yield
    finally:
        sys.unraisablehook = hook
