"""A run as a directory: what may become one, and that one process writes there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.files import read_json
from qlora_jax.directories import ADAPTER, ADAPTER_EMA, BEST, CHECKPOINTS, REPORT, START
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs.toml import SETTINGS
from qlora_jax.watch import read_metrics


def check_directory(directory: Path) -> None:
    """Refuses, before any work is done, what cannot become a run directory."""
    above = next(p for p in [directory, *directory.absolute().parents] if p.exists())
    if not above.is_dir():
        raise UserError(f"The output directory `{directory}`: `{above}` is a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"The output directory `{directory}` cannot be written: no permission to "
            f"write in `{above}`."
        )
    if not directory.is_dir():
        return
    if (directory / SETTINGS).is_file():
        _check_not_lost(directory)
        return
    if any(directory.iterdir()):
        raise UserError(
            f"The output directory `{directory}` is not empty and holds no run "
            f"({SETTINGS}). Give an empty or new directory."
        )


def _check_not_lost(directory: Path) -> None:
    """Refuses a run whose adapter is there and whose checkpoints are gone.

    It would start over, and write over the adapter. A run that was killed before its
    first checkpoint has no adapter yet: that is written after it.
    """
    adapter, checkpoints = directory / ADAPTER, directory / CHECKPOINTS
    if not adapter.is_dir() or any(checkpoints.glob("step_*")):
        return
    rows = read_metrics(directory)
    taken = f" ({rows[-1]['step']:,} steps)" if rows else ""
    raise CheckpointError(
        f"The training of this run{taken} exists only as `{adapter}`: `{checkpoints}` "
        "holds no checkpoint, and with them the state of the optimizer is lost. To go "
        "on from that adapter with a fresh optimizer state, give another --output-dir "
        f"and `train.adapter_init` = {str(adapter)!r}. To start over, delete "
        f"`{adapter}`."
    )


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Makes the run directory and keeps other processes from training in it.

    A start that fails before anything was written leaves no empty directory behind.
    """
    places = [directory, *directory.parents]
    made = [place for place in places if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"The output directory `{directory}` cannot be made: {error.strerror}."
        ) from error
    try:
        # The system gives the lock back when the process ends, however it ends.
        # Some network file systems have no locks; there the user has to know.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"Another process is training in `{directory}`. Wait until it "
                    "ends, or give another --output-dir."
                ) from None
        # What a killed process left of an adapter half-written.
        for name in (ADAPTER, ADAPTER_EMA, BEST, START):
            for left in directory.glob(f".{name}.*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # one that holds something stays
            for place in made:
                place.rmdir()


def finished_report(directory: Path, start: int, steps: int) -> dict[str, Any] | None:
    """The report of a run that has nothing left to do; None if something is left."""
    path = directory / REPORT
    if start < steps or not path.is_file() or not (directory / ADAPTER).is_dir():
        return None
    report = read_json(path)
    return report if report.get("steps") == steps else None
