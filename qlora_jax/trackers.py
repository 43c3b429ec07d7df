"""The numbers of a run for TensorBoard and Weights & Biases, by their own libraries.

    with trackers(log, directory, settings, start) as found:
        for tracker in found: tracker.note(row)

A row is an object of metrics.jsonl. Names are those that the Hugging Face trainers
write, train/loss and eval/loss, so that runs of both stand in one chart.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qlora_jax.errors import UserError
from qlora_jax.runs.config import LogConfig

# `report_to` -> the library, and the extra that installs it.
_LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
FOLDER = "tensorboard"
_WANDB_ID = ".wandb_id"


@runtime_checkable
class Tracker(Protocol):
    """What a run tells the numbers to."""

    def note(self, row: Mapping[str, Any]) -> None:
        """Takes one object of metrics.jsonl."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Takes what the model wrote after a prompt."""

    def close(self) -> None:
        """Writes what is left."""


def check_trackers(log: LogConfig) -> None:
    """Refuses, before any work is done, a library that is not installed.

    Raises:
      UserError: it names the library and how to install it.
    """
    for name in log.report_to:
        library = _LIBRARIES[name]
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f'log: `report_to` = ["{name}"] needs {library}, which is not '
                f"installed: pip install {library}."
            )


@contextlib.contextmanager
def trackers(
    log: LogConfig, directory: Path, settings: Mapping[str, Any], start: int
) -> Iterator[list[Tracker]]:
    """Opens what `log.report_to` names, and closes it at the end.

    Args:
      log: which, and the names that the run has there.
      directory: of the run.
      settings: of the run, nested; shown beside the numbers.
      start: steps already taken; what was noted of later ones is taken back.
    """
    name = log.run_name or directory.absolute().name
    with contextlib.ExitStack() as stack:
        found: list[Tracker] = []
        for kind in log.report_to:
            if kind == "tensorboard":
                one: Tracker = _TensorBoard(directory, start)
            else:
                one = _WeightsAndBiases(directory, log.project, name, settings)
            stack.callback(one.close)
            found.append(one)
        yield found


def named(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names that the Hugging Face trainers write."""
    out = {}
    for key, value in row.items():
        if key != "step" and isinstance(value, (int, float)):
            kind, name = ("eval", key[5:]) if key[:5] == "eval_" else ("train", key)
            out[f"{kind}/{name}"] = value
    return out


class _TensorBoard:
    """Event files in RUN/tensorboard/."""

    def __init__(self, directory: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        # Events of steps that are taken again are hidden by those written now.
        place = directory / FOLDER
        again = start + 1 if place.is_dir() else None
        self._writer: Any = SummaryWriter(str(place), purge_step=again)

    def note(self, row: Mapping[str, Any]) -> None:
        for name, value in named(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        # It is shown as Markdown, where an indented block stands as it is.
        shown = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(f"samples/{prompt[:60]}", shown, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, continued when ours is."""

    def __init__(
        self, directory: Path, project: str, name: str, settings: Mapping[str, Any]
    ) -> None:
        import wandb

        self._wandb: Any = wandb
        place = directory / _WANDB_ID
        known = place.read_text().strip() if place.is_file() else None
        self._run: Any = wandb.init(
            project=project,
            name=name,
            dir=str(directory),
            id=known,
            resume="allow",
            config=json.loads(json.dumps(settings, default=dict)),
        )
        place.write_text(f"{self._run.id}\n")
        # Its own count of steps cannot go back to a checkpoint.
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    def note(self, row: Mapping[str, Any]) -> None:
        self._run.log({**named(row), "train/global_step": row["step"]})

    def sample(self, step: int, prompt: str, text: str) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "text"])
        table.add_data(step, prompt, text)
        self._run.log({"samples": table, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()
