"""The numbers of a run: progress on stderr, metrics.jsonl, TensorBoard, W&B.

metrics.jsonl is the record that plots and reports are made from. It gets one JSON
object per training step as soon as the step is done, and one per evaluation on held-out
data. A step appears once, however often the run was interrupted:

    {"step", "loss", "grad_norm", "learning_rate", ...}
    {"step", "eval_loss", "eval_perplexity", "eval_tokens", ...}

samples.jsonl has the generated samples: {"step", "prompt", "text"}. `rows` reads both.

Trackers get the same rows under the names that the Hugging Face trainers use
(train/loss, eval/loss), so that runs of both libraries share one chart.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jaxtyping import Integer

from convert import write_text
from qlora_jax.errors import UserError, readable_bytes, say, visible
from qlora_jax.planning import Step, gpu_named, model_flops_per_token
from qlora_jax.runs.config import LogConfig
from qlora_jax.runs.rows import METRICS, SAMPLES, read_rows

TENSORBOARD, WANDB_ID = "tensorboard", ".wandb_id"

# Value of `report_to` -> the package to install for it.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


# --- Model FLOPs utilization ---


@dataclass(frozen=True)
class Work:
    """The two numbers that model FLOPs utilization (MFU) is computed from.

    MFU = flops_per_token * tokens_per_second / peak_flops, of all devices together.
    """

    flops_per_token: float
    """Of the model, forward and backward; recomputation is not counted."""
    peak_flops: float
    """FLOP/s by the data sheet of the devices."""


def work_of(
    step: Step, lengths: Integer[np.ndarray, " documents"], *, devices: int = 1
) -> Work | None:
    """Returns the MFU terms on the devices at hand; None if their peak is not known.

    The peaks in `qlora_jax.planning.gpus` are those of 16-bit products: float32 has
    none.

    Args:
      step: the training step.
      lengths: tokens of each document.
      devices: that share the step.
    """
    card = gpu_named(jax.local_devices()[0].device_kind)
    if card is None or step.compute.dtype == "float32":
        return None
    return Work(model_flops_per_token(step, lengths), devices * card.flops)


# --- Trackers ---


@runtime_checkable
class Tracker(Protocol):
    """Receives the numbers of a run."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs a row of metrics.jsonl."""

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Logs what the model generated after a prompt."""

    def close(self) -> None:
        """Flushes and closes."""


def check_trackers(log: LogConfig) -> None:
    """Checks that the packages that `log.report_to` needs are installed.

    Raises:
      UserError: one is missing.
    """
    for name in log.report_to:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f'log: `report_to` = ["{name}"] needs {package}, which is not '
                f"installed: pip install {package}."
            )


@contextlib.contextmanager
def open_trackers(
    log: LogConfig, directory: Path, settings: Mapping[str, Any], start: int
) -> Iterator[list[Tracker]]:
    """Opens the trackers that `log.report_to` names, and closes them at the end.

    Args:
      log: the trackers, and the run's name in them.
      directory: of the run.
      settings: of the run, nested; logged as its configuration.
      start: steps already taken; what was logged for later ones is withdrawn.
    """
    name = log.run_name or directory.absolute().name
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        for kind in log.report_to:
            tracker: Tracker
            if kind == "tensorboard":
                tracker = _TensorBoard(directory, start)
            else:
                tracker = _WeightsAndBiases(directory, log.project, name, settings)
            stack.callback(tracker.close)
            trackers.append(tracker)
        yield trackers


def _hf_names(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row under the names of the Hugging Face trainers."""
    scalars = {}
    for key, value in row.items():
        if key != "step" and isinstance(value, (int, float)):
            name = key.removeprefix("eval_")
            scalars[f"{'train' if name == key else 'eval'}/{name}"] = value
    return scalars


class _TensorBoard:
    """Event files in RUN/tensorboard/."""

    def __init__(self, directory: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        events = directory / TENSORBOARD
        # Tells TensorBoard to hide the events of steps that are repeated.
        purge_step = start + 1 if events.is_dir() else None
        self._writer: Any = SummaryWriter(str(events), purge_step=purge_step)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in _hf_names(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        # TensorBoard renders Markdown; an indented block is shown verbatim.
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(f"samples/{prompt[:60]}", block, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A W&B run, resumed by its id when the training run is continued."""

    def __init__(
        self, directory: Path, project: str, name: str, settings: Mapping[str, Any]
    ) -> None:
        import wandb

        self._wandb: Any = wandb
        id_file = directory / WANDB_ID
        self._run: Any = wandb.init(
            project=project,
            name=name,
            dir=str(directory),
            id=id_file.read_text().strip() if id_file.is_file() else None,
            resume="allow",
            # Plain JSON values only.
            config=json.loads(json.dumps(settings, default=dict)),
        )
        id_file.write_text(f"{self._run.id}\n")
        # W&B's own step counter cannot go back to a checkpoint.
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log({**_hf_names(row), "train/global_step": row["step"]})

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "text"])
        table.add_data(step, prompt, text)
        self._run.log({"samples": table, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


# --- Writing ---


def _truncate(path: Path, start: int) -> list[dict[str, Any]]:
    """Deletes the rows of steps after `start` from a file; returns the others."""
    if not path.exists():
        return []
    notes: list[str] = []
    # The steps after the checkpoint are taken again and write their rows again.
    rows = [row for row in read_rows(path, notes) if row["step"] <= start]
    for note in notes:
        say(f"Note: {note}")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, "".join(lines))
    return rows


@dataclass(eq=False)
class Watch:
    """Writes metrics.jsonl and samples.jsonl and shows progress on stderr.

    On a terminal, progress is a bar with loss, tokens/s, memory and time left;
    elsewhere a plain line every few steps. Rows of steps after `start`, left by an
    interrupted run, are deleted because those steps are repeated.
    """

    directory: Path
    """Of the run."""
    _: KW_ONLY
    start: int
    """Steps already taken."""
    steps: int
    """Steps of the complete run."""
    schedule: Callable[[Any], Any]
    """Step -> learning rate, on arrays."""
    every: int
    """Steps between plain lines."""
    began: float
    """`time.perf_counter()` when the command started."""
    work: Work | None = None
    """For the MFU, where the device's peak is known."""
    trackers: Sequence[Tracker] = ()
    """Get every row too."""
    writes: bool = True
    """Whether this process writes and shows what all processes have."""

    def __post_init__(self) -> None:
        """Restores the state from the rows up to `start`."""
        # In one call: reading a rate from the device per step would wait for the step.
        self._rates = np.asarray(
            self.schedule(jnp.arange(self.start, self.steps))
        ).tolist()
        self._first = self._last = self.began
        self.seconds_to_first_step: float | None = None
        self.peak_memory: int | None = None
        rows, samples = [], []
        if self.writes:
            rows = _truncate(self.directory / METRICS, self.start)
            samples = _truncate(self.directory / SAMPLES, self.start)
        losses = [row["loss"] for row in rows if "loss" in row]
        self.last_loss: float | None = losses[-1] if losses else None
        self.evaluations = [row for row in rows if "eval_loss" in row]
        self.sampled_steps = {row["step"] for row in samples}

    def __enter__(self) -> Watch:
        """Opens metrics.jsonl and starts the bar."""
        path = self.directory / METRICS if self.writes else os.devnull
        self._file = open(path, "a")
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True, quiet=not self.writes),
            refresh_per_second=2,  # a refresh takes about a millisecond of a core
        )
        self._plain = not self._bar.console.is_terminal
        self._task = self._bar.add_task(
            "train", total=self.steps, completed=self.start, numbers="compiling"
        )
        if not self._plain:
            self._bar.start()
        self.restart_timer()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Closes the bar and the file."""
        if not self._plain:
            self._bar.stop()
        # On a full disk, closing fails again; the first error says more.
        with contextlib.suppress(*[OSError] if kind else []):
            self._file.close()

    def restart_timer(self) -> None:
        """Restarts the step timer, so that what came before is not counted."""
        self._last = time.perf_counter()

    def sync(self) -> None:
        """Flushes metrics.jsonl to the disk."""
        self._file.flush()
        if self.writes:  # /dev/null has no disk
            os.fsync(self._file.fileno())

    def step(self, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """Writes the metrics of a training step.

        Args:
          step: its number, from 1.
          values: loss, grad_norm and supervised_tokens.
          tokens: tokens of its batch, padding excluded.
        """
        now = time.perf_counter()
        # From one reading of metrics to the next: in a steady state the time of a step.
        seconds, self._last = now - self._last, now
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = now - self.began
            self._first = now
        self.peak_memory = peak_memory_bytes()
        self.last_loss = values["loss"]
        row: dict[str, Any] = {
            "step": step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": self._rates[step - 1 - self.start],
            "supervised_tokens": values["supervised_tokens"],
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        if self.work is not None:
            flops = self.work.flops_per_token * row["tokens_per_second"]
            row["mfu"] = flops / self.work.peak_flops
        self._write(row)
        self._show_progress(row, now)

    def evaluated(self, row: Mapping[str, Any], remark: str = "") -> None:
        """Writes an evaluation; `remark` is appended to the line on the terminal."""
        self._write(row)
        self.evaluations.append(dict(row))
        self._print(
            f"step {row['step']}/{self.steps}  held-out loss {row['eval_loss']:.4f}  "
            f"perplexity {row['eval_perplexity']:.4g}  ({row['eval_seconds']:.1f} s)"
            + remark
        )

    def sampled(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes generated samples, given as prompt -> continuation."""
        self.sampled_steps.add(step)
        if not self.writes:
            return
        with open(self.directory / SAMPLES, "a", encoding="utf-8") as file:
            for prompt, text in texts.items():
                row = {"step": step, "prompt": prompt, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                for tracker in self.trackers:
                    tracker.log_sample(step, prompt, text)
            file.flush()
            os.fsync(file.fileno())
        for prompt, text in texts.items():
            indented = (prompt + text.rstrip()).replace("\n", "\n    ")
            self._print(f"step {step}, a sample:\n    {indented}")

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.log(row)

    def _show_progress(self, row: Mapping[str, Any], now: float) -> None:
        step = row["step"]
        numbers = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in row:
            numbers += f"  MFU {row['mfu']:.1%}"
        numbers += f"  {readable_bytes(row['peak_memory_bytes'])}"
        self._bar.update(self._task, completed=step, numbers=numbers)
        is_shown = step % self.every == 0 or step in (self.start + 1, self.steps)
        if not (self._plain and is_shown):
            return
        line = f"step {step}/{self.steps}  {numbers}  lr {row['learning_rate']:.2e}"
        # Extrapolated without the first step, which waited for the compiler.
        timed = step - self.start - 1
        if timed:
            left = (now - self._first) / timed * (self.steps - step)
            line += f"  {left:,.0f} s left"
        self._print(line)

    def _print(self, text: str) -> None:
        if not self.writes:
            return
        text = visible(text)
        # As `say`: the run goes on when nobody reads its progress any longer.
        with contextlib.suppress(OSError):
            if self._plain:
                print(text, file=sys.stderr, flush=True)
            else:  # above the bar
                console = self._bar.console
                console.print(text, markup=False, highlight=False, emoji=False)


def peak_memory_bytes() -> int:
    """Returns the peak memory of the device if it reports one, else of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # `ru_maxrss` is in bytes on macOS and in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_seconds() -> float:
    """Returns the seconds since this process started, imports included."""
    try:
        # starttime is field 22 of /proc/PID/stat, in clock ticks since boot. Field 2 is
        # the program's name and may contain spaces, so count from its parenthesis.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # not Linux
        return 0.0
