"""A run as a directory: its files, its settings, and the lock of the process in it.

RUN/config.toml       the settings of the run
RUN/metrics.jsonl     one object a step, and one an evaluation
RUN/samples.jsonl     continuations generated during the run
RUN/checkpoints/      written by Orbax
RUN/adapter/          the adapter of the newest checkpoint, a PEFT directory
RUN/adapter_ema/      with `train.ema_decay`, its moving average
RUN/best_adapter/     the adapter with the best held-out loss
RUN/initial_adapter/  with pissa or olora, the part factored out of the base
RUN/loss.png          drawn from metrics.jsonl
RUN/started.json      data, sizes, device and versions, written before the first step
RUN/autotune.json     on a GPU, the kernels that XLA chose, for when it is continued
RUN/report.json       the same with the results, written when the run is complete
RUN/report.html       all of it as a page for a browser
RUN/published.json    with `hub.model_id`, where the adapter was published
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from convert import (
    ADAPTER_CONFIG,
    CHAT_TEMPLATE_FILE,
    is_leftover,
    parse_hub_name,
    remove_leftovers,
)
from qlora_jax.data import DataConfig, Source, template_file
from qlora_jax.errors import CheckpointError, UserError, say
from qlora_jax.reading import read_text
from qlora_jax.runs.config import EvalConfig, RunConfig
from qlora_jax.runs.rows import read_facts, read_metrics
from qlora_jax.runs.toml import SETTINGS, read_config, settings_file

ADAPTER, ADAPTER_EMA = "adapter", "adapter_ema"
BEST, START = "best_adapter", "initial_adapter"
REPORT, CHECKPOINTS, STARTED = "report.json", "checkpoints", "started.json"
REPORT_FIELDS = {
    *("steps", "final_loss", "trainable_parameters", "groups", "adapter_bytes", "data"),
}
"""What a program reads of a complete run's report."""
# Adapters that are used like the run itself: on its base, in its form. START is not
# among them, since it belongs to the base that the run changed.
_ADAPTERS = (ADAPTER, ADAPTER_EMA, BEST)
_STEP = re.compile(r"step_(\d+)")
_Templated = TypeVar("_Templated", Source, DataConfig, EvalConfig)


def find_run(path: Path) -> Path | None:
    """Returns the run directory that `path` is, or is an adapter of; else None."""
    # Whatever it is: what is no file is refused when it is read, not passed over.
    if os.path.lexists(path / SETTINGS):
        return path
    absolute = Path(os.path.abspath(path))  # "." has no name
    is_adapter = absolute.name in _ADAPTERS and (absolute / ADAPTER_CONFIG).is_file()
    if not is_adapter or not os.path.lexists(absolute.parent / SETTINGS):
        return None
    return path.parent if path.name == absolute.name else absolute.parent


def read_settings(run: Path) -> RunConfig:
    """Reads the settings of a run directory, adapted to where and what it is now.

    The directory may have been moved and the chat template file edited since the run:
    `output_dir` is the directory, and the run's copy of the template replaces the file.
    """
    config = dataclasses.replace(read_config(run), output_dir=str(run))
    original = _template_files(config.data)[0]
    copies = (run / name / CHAT_TEMPLATE_FILE for name in _ADAPTERS)
    copy = next((file for file in copies if file.is_file()), None)
    if original is None or copy is None:
        return config

    def with_copy(settings: _Templated) -> _Templated:
        if settings.chat_template != original:
            return settings
        return dataclasses.replace(settings, chat_template=str(copy))

    sources = tuple(map(with_copy, config.data.sources))
    data = dataclasses.replace(with_copy(config.data), sources=sources)
    return dataclasses.replace(config, data=data, eval=with_copy(config.eval))


def where_it_is(config: RunConfig, file: Path) -> RunConfig:
    """Returns the settings of a run, with the directory that they are read from.

    A run directory that was moved or copied, or whose `output_dir` is relative to
    another working directory, names a place where another run may be, or none.

    Args:
      config: what `file` holds.
      file: a run file, or a run directory.
    """
    directory = settings_file(file).parent
    is_run = settings_file(file).name == SETTINGS and (directory / STARTED).is_file()
    there = Path(config.output_dir)
    if not is_run or os.path.realpath(directory) == os.path.realpath(there):
        return config
    say(
        f"Note: this run was started as `{there}` and is continued where it is now, in "
        f"`{directory}`. (--output-dir gives another directory.)"
    )
    return dataclasses.replace(config, output_dir=str(directory))


@contextlib.contextmanager
def relative_paths(
    config: RunConfig,
    file: Path,
    given: Collection[str] = (),
    read: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Says, of an error inside, which paths of a run file lead nowhere from here.

    Args:
      config: what `file` holds, with the options that were given.
      file: a run file, or a run directory.
      given: keys of these options, whose paths are relative to where they are given.
      read: keys of the paths that are read -> the option that gives another, or "".
        Default all, with the option of their name.
    """
    try:
        yield
    except UserError as error:
        lost = {
            key: path
            for key, path in _relative_paths(config).items()
            if key not in given
            and (read is None or key in read)
            and not glob.glob(path)
        }
        parents = Path(os.path.realpath(settings_file(file))).parents

        def leads_to(path: str) -> bool:
            return any(glob.glob(str(parent / path)) for parent in parents)

        # What the hub has is not lost; whether it has it, is said by the error.
        lost = {
            key: path
            for key, path in lost.items()
            if parse_hub_name(path) is None or leads_to(path)
        }
        found = [
            parent
            for parent in parents
            if all(glob.glob(str(parent / path)) for path in lost.values())
        ]
        here = Path.cwd()
        if not lost or (here in parents and not found):
            raise
        names = " and ".join(f"`{key}` = {path!r}" for key, path in lost.items())
        named = {key: f"--{key}" for key in lost if ".sources" not in key}
        named = named if read is None else read
        options = " ".join(named[key] for key in lost if named.get(key))
        are = "are relative paths" if len(lost) > 1 else "is a relative path"
        start = f"`{found[0]}`" if found else "the directory where the run was started"
        gap = "\n" if "\n" in str(error) else " "
        raise type(error)(
            f"{error}{gap}{names} {are} of `{settings_file(file)}`, and there is "
            f"nothing there from the current directory, `{here}`. Start the command "
            f"in {start}" + (f", or give {options}." if options else "."),
            error.problems,
        ) from error


def _relative_paths(config: RunConfig) -> dict[str, str]:
    """Returns the paths that a run reads and that depend on the working directory."""
    named: dict[str, Any] = {
        "model.path": config.model.path,
        "data.path": config.data.path,
        "eval.path": config.eval.path,
        "train.adapter_init": config.train.adapter_init,
    }
    for number, source in enumerate(config.data.sources):
        named[f"data.sources[{number}].path"] = source.path
    return {
        key: path
        for key, paths in named.items()
        for path in ((paths,) if isinstance(paths, str) else paths or ())
        if path and not path.startswith("hf:") and not Path(path).is_absolute()
    }


def template_text(data: DataConfig, say: Callable[[str], None]) -> str | None:
    """Reads the chat template file that a run's conversations are written with.

    Args:
      data: of a run. Of several sources with conversations, the first one counts.
      say: receives a note if they use different templates.

    Returns:
      The text; None if there are no conversations, or the tokenizer's own template
      writes them.

    Raises:
      UserError: the file cannot be read.
    """
    first, *others = _template_files(data)
    if others:
        names = ", ".join(f or "the tokenizer's own" for f in (first, *others))
        say(
            "Note: the sources write conversations with several chat templates: "
            f"{names}. The first is the one that `chat` takes"
            + ("." if first is None else f", and is kept as {CHAT_TEMPLATE_FILE}.")
        )
    if first is None:
        return None
    try:
        return read_text(template_file(first))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`data.chat_template`: cannot read {first}: {error}"
        ) from error


def _template_files(data: DataConfig) -> list[str | None]:
    """Returns the distinct templates of conversations; None is the tokenizer's own."""
    files = [s.chat_template for s in data.each if s.writes_conversations]
    return list(dict.fromkeys(files)) or [None]


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps that have a checkpoint directory, newest first, damaged or not.

    Args:
      directory: of the checkpoints; need not exist.
    """
    paths = directory.iterdir() if directory.is_dir() else ()
    matches = (_STEP.fullmatch(path.name) for path in paths)
    return sorted((int(m[1]) for m in matches if m), reverse=True)


def check_directory(directory: Path) -> None:
    """Raises if a directory cannot become, or is not, a run directory.

    Raises:
      UserError: a file, no permission, or a directory with other content.
      CheckpointError: a run whose checkpoints are lost.
    """
    parents = [directory, *directory.absolute().parents]
    existing = next(p for p in parents if p.exists())
    if not existing.is_dir():
        raise UserError(f"The output directory `{directory}`: `{existing}` is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"The output directory `{directory}` cannot be written: no permission to "
            f"write in `{existing}`."
        )
    if not directory.is_dir():
        return
    if (directory / SETTINGS).is_file():
        _check_not_lost(directory)
        return
    # What a process left that was killed before it had written the settings is removed
    # under the lock.
    if not all(is_leftover(path.name) for path in directory.iterdir()):
        raise UserError(
            f"The output directory `{directory}` is not empty and holds no run "
            f"({SETTINGS}). Give an empty or new directory."
        )


def _check_not_lost(directory: Path) -> None:
    """Raises if a run has an adapter but no checkpoints.

    It would start over and overwrite the adapter. (A run that was killed before its
    first checkpoint has no adapter yet: the checkpoint is written first.)
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
def run_lock(directory: Path) -> Iterator[Callable[[], None]]:
    """Makes the run directory and keeps other processes from training in it.

    A start that fails before anything was written leaves no empty directory behind.

    Yields:
      A function that removes what was made, as far as it is empty: for a process that
      ends without leaving the block.

    Raises:
      UserError: the directory cannot be made, or another process holds the lock.
    """
    created = [path for path in (directory, *directory.parents) if not path.exists()]

    def remove() -> None:
        with contextlib.suppress(OSError):  # directories with content remain
            # From the innermost outwards; the first that has content ends it.
            for path in created:
                path.rmdir()

    try:
        directory.mkdir(parents=True, exist_ok=True)
        # The lock is on the directory itself: no lock file that could be left behind.
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"The output directory `{directory}` cannot be made: {error.strerror}."
        ) from error
    try:
        # The system releases the lock when the process ends, however it ends. Some
        # network file systems have no locks; the run goes on without one there.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"Another process is training in `{directory}`. Wait until it "
                    "ends, or give another --output-dir."
                ) from None
        # Half-written files and adapters of a process that was killed.
        remove_leftovers(directory)
        yield remove
    finally:
        os.close(handle)
        remove()


def finished_report(directory: Path, start: int, steps: int) -> dict[str, Any] | None:
    """Returns the report of a complete run; None if something is left to do."""
    if start < steps or not (directory / ADAPTER).is_dir():
        return None
    report = read_facts(directory / REPORT)
    # Without one of its fields it is damaged, and is written again.
    if report is None or not REPORT_FIELDS <= report.keys():
        return None
    return report if report["steps"] == steps else None
