"""Checkpoints of a run: what changes, saved with Orbax, and what must not, compared.

A checkpoint holds the train state (step, adapters, optimizer moments, PRNG key) and a
JSON record: how many batches were used (the whole data cursor, since batches are a
function of their index), the configuration, and fingerprints of the base and of the
data. The frozen base is not saved again. Orbax writes in the background into a
temporary directory that it renames when complete, and keeps the newest few.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.train import TrainState


@dataclass(frozen=True)
class CheckpointConfig:
    """The `[checkpoint]` section of a run file."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"checkpoint: `{name}` must be at least 1, got "
                    f"{getattr(self, name)}."
                )


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits at the end."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        """Opens (and creates, if need be) the directory."""
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            step_prefix="step",
            create=True,
            # What a killed process left half-written.
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with _disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(self, *exc: Any) -> None:
        """Waits for a save under way and closes."""
        with _disk_errors(self.directory):
            self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

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
        with _disk_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_saveable(state)),
                    record=ocp.args.JsonSave(dict(record)),
                ),
            )

    def wait(self) -> None:
        """Returns when the save under way is complete on disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """Reads the record of a step."""
        with _read_errors(self.path(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )
        return restored["record"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a step into the structure, shapes and devices of `like`.

        Raises:
          CheckpointError: files that are damaged or of another structure.
        """
        target = jax.tree.map(_abstract, _saveable(like))
        with _read_errors(self.path(step)):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
            )["state"]
        return TrainState(
            step=restored["step"],
            adapters=restored["adapters"],
            opt_state=restored["opt_state"],
            key=jax.random.wrap_key_data(
                restored["key"], impl=jax.random.key_impl(like.key)
            ),
        )


def compare_records(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to continue a run whose base, adapter, data or arithmetic has changed.

    Args:
      saved: record of the checkpoint; a nested mapping of plain values.
      now: the record that the run would write.

    Raises:
      UserError: every entry that differs, with both values.
    """
    before, after = _flat(saved), _flat(now)
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(
            "This run cannot be continued: what it was started with has changed: "
            f"{'; '.join(changed)}. Undo the change to continue, or give another "
            "--output-dir to start a new run."
        )


def tree_fingerprint(tree: Any) -> str:
    """Hashes every leaf of a tree: path, dtype, shape and bytes.

    Leaves are hashed side by side on all cores (blake2b, 32 hex digits).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)

    def one(item: tuple[Any, Any]) -> bytes:
        path, leaf = item
        array = np.ascontiguousarray(leaf)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        )
        digest.update(array.reshape(-1).view(np.uint8))
        return digest.digest()

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(one, leaves))
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


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


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint cannot be written to `{directory}`: "
            f"{error.strerror or error}. Earlier checkpoints there are intact; free "
            "some space or mend the directory, and give the same command to continue."
        ) from error
    except ValueError as error:
        # tensorstore, which Orbax writes through, reports a full disk as ValueError.
        if "No space left" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CheckpointError(
            f"The checkpoint cannot be written to `{directory}`: no space left on the "
            "device. Earlier checkpoints there are intact; free some space, and give "
            "the same command to continue."
        ) from error


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise a dozen types here
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"The checkpoint `{path}` cannot be read ({type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}). If it is damaged, delete that "
            "directory: the same command then continues from the checkpoint before."
        ) from error
