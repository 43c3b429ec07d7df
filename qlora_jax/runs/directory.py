"""What a directory is: a base, an adapter, or a run, and what it says for itself.

A path given to a command may be any of the three. What a run directory was trained with
is taken from its settings, so that it is loaded again as it was, and so is each of the
adapters in it.

A run as a directory: what may become one, and that one process writes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convert.files import read_json
from convert.peft import CHAT_TEMPLATE, CONFIG, peft_directory
from qlora_jax.data.config import DataConfig
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.metrics import read_metrics
from qlora_jax.runs.toml import SETTINGS, read_config

# What lies in a run directory, beside its settings.
ADAPTER, START = "adapter", "initial_adapter"
ADAPTER_EMA = "adapter_ema"
REPORT, CHECKPOINTS = "report.json", "checkpoints"
# The adapter with the best held-out loss.
BEST = "best_adapter"
# What is known of a run when its first step is about to be taken.
STARTED = "started.json"
# What is asked and measured as the run is.
_ADAPTERS = (ADAPTER, ADAPTER_EMA, BEST)
_STEP = re.compile(r"step_(\d+)")


def template_text(data: DataConfig, say: Callable[[str], None]) -> str | None:
    """The text of the template file that conversations are written with.

    Args:
      data: of a run. Of several sources with conversations, the first one's counts.
      say: is told where they do not agree.

    Returns:
      The text; None where there are no conversations, or the tokenizer's own template
      writes them.

    Raises:
      UserError: the file cannot be read.
    """
    first, *others = _template_files(data)
    if others:
        own = "the tokenizer's own"
        say(
            "Note: the sources write conversations with several chat templates: "
            f"{', '.join(f or own for f in (first, *others))}. The first is the one "
            "that `chat` takes"
            + ("." if first is None else f", and is kept as {CHAT_TEMPLATE}.")
        )
    if first is None:
        return None
    try:
        return Path(first).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`data.chat_template`: cannot read {first}: {error}"
        ) from error


def _template_files(data: DataConfig) -> list[str | None]:
    """The templates of conversations, each once; None stands for the tokenizer's."""
    found = [one.chat_template for one in data.each if one.format == "messages"]
    return list(dict.fromkeys(found)) or [None]


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or an adapter of; else None."""
    if (path / SETTINGS).is_file():
        return path
    # By its whole path: "." has no name.
    whole = Path(os.path.abspath(path))
    inside = whole.name in _ADAPTERS and (whole / CONFIG).is_file()
    if not inside or not (whole.parent / SETTINGS).is_file():
        return None
    return path.parent if path.name == whole.name else whole.parent


def run_settings(path: Path) -> RunConfig | None:
    """The settings of the run that `path` is, or an adapter of; else None."""
    run = run_of(path)
    return None if run is None else read_config(run)


def kept_settings(run: Path) -> RunConfig:
    """The settings of a run directory, to read its data with once more.

    The directory may have been moved since, and the template file edited: it is named
    where it is, and the text that the run kept takes the place of the file.
    """
    config = read_config(run)
    config = dataclasses.replace(config, output_dir=str(run))
    own = _template_files(config.data)[0]
    places = (run / name / CHAT_TEMPLATE for name in _ADAPTERS)
    kept = next((place for place in places if place.is_file()), None)
    if own is None or kept is None:
        return config

    def swapped(one: Any) -> Any:
        same = one.chat_template == own
        return dataclasses.replace(one, chat_template=str(kept)) if same else one

    sources = tuple(map(swapped, config.data.sources))
    data = dataclasses.replace(swapped(config.data), sources=sources)
    return dataclasses.replace(config, data=data, eval=swapped(config.eval))


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a directory among checkpoints, damaged or not, the newest first.

    Args:
      directory: of the checkpoints; it need not exist.
    """
    found = directory.iterdir() if directory.is_dir() else ()
    matches = (_STEP.fullmatch(path.name) for path in found)
    return sorted((int(m[1]) for m in matches if m), reverse=True)


def adapter_directory(path: Path) -> Path | None:
    """The PEFT directory that `path` is, or holds as a run directory; else None."""
    place = peft_directory(path)
    return place if (place / CONFIG).is_file() else None


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
