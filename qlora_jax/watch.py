"""What a person sees of a run while it goes on: a progress line, and metrics.jsonl.

metrics.jsonl is the record that pictures and pages are drawn from. It has one JSON
object a step, written as the step is done, each step once however often the run was
interrupted; and between them one for each measurement on held-out data:

    {"step", "loss", "grad_norm", "learning_rate", ...}          `read_metrics`
    {"step", "eval_loss", "eval_perplexity", "eval_tokens", ...} `read_evaluations`

samples.jsonl has what the model wrote: {"step", "prompt", "text"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from qlora_jax.cards import card_called
from qlora_jax.errors import readable_bytes
from qlora_jax.estimate import model_flops_per_token
from qlora_jax.step_memory import Step
from qlora_jax.trackers import Tracker

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Work:
    """What a token costs, and what the device could do at most."""

    flops_per_token: float
    """Of the model, forward and backward; nothing that is computed twice."""
    peak_flops: float
    """FLOP/s, by the device's data sheet."""


def work_of(step: Step, lengths: np.ndarray) -> Work | None:
    """The work of a step's tokens on the device at hand; None without a known peak.

    Peaks are those of 16-bit products on the cards of `qlora_jax.cards`, known by the
    names that they give themselves.

    Args:
      step: the step that is trained.
      lengths: tokens of each document.
    """
    card = card_called(jax.local_devices()[0].device_kind)
    if card is None or step.compute.dtype == "float32":
        return None
    return Work(model_flops_per_token(step, lengths), card.flops)


class Watch:
    """Writes one line a step to metrics.jsonl and shows progress on stderr.

    On a terminal that is a bar with loss, tokens/s, memory and time left; elsewhere a
    plain line every few steps. Lines of steps after `start` that an interrupted run
    left behind are dropped: those steps are taken again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        start: int,
        steps: int,
        schedule: Callable[[Any], Any],
        every: int,
        began: float,
        work: Work | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Opens the metrics of a run directory.

        Args:
          directory: of the run.
          start: steps already taken.
          steps: steps of the whole run.
          schedule: step -> learning rate.
          every: steps between plain lines.
          began: `time.perf_counter()` when the command started.
          work: for the model FLOPs utilization (MFU), where the device's peak is
            known: operations that the model needs, of those the device could do.
          trackers: get every row too.
        """
        self._path, self._samples = directory / METRICS, directory / SAMPLES
        self._work, self._trackers = work, trackers
        self._start, self._steps, self._every = start, steps, every
        # All at once: a rate asked of the device for each step would wait for the step.
        self._rates = np.asarray(schedule(jnp.arange(start, steps))).tolist()
        self._began = self._first = self._last = began
        self.last_loss: float | None = None
        self.seconds_to_first_step: float | None = None
        self.peak_memory: int | None = None
        rows = _keep(self._path, start)
        self.sampled_steps = {row["step"] for row in _keep(self._samples, start)}
        kept = [row for row in rows if "loss" in row]
        if kept:
            self.last_loss = kept[-1]["loss"]
        self.evaluations = [row for row in rows if "eval_loss" in row]

    def __enter__(self) -> Watch:
        """Starts the bar."""
        self._file = open(self._path, "a")
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
            refresh_per_second=2,  # each takes about a millisecond of a core
        )
        self._plain = not self._bar.console.is_terminal
        self._task = self._bar.add_task(
            "train", total=self._steps, completed=self._start, numbers="compiling"
        )
        if not self._plain:
            self._bar.start()
        self._last = time.perf_counter()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Closes file and bar."""
        if not self._plain:
            self._bar.stop()
        # On a full disk closing fails again, and the first failure says more.
        with contextlib.suppress(*[OSError] if kind else []):
            self._file.close()

    def sync(self) -> None:
        """Makes sure that what was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def step(self, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """Notes the numbers of step `step` (from 1), which used `tokens` tokens."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = now - self._began
            self._first = now
        self.peak_memory = peak_memory_bytes()
        self.last_loss = values["loss"]
        row: dict[str, Any] = {
            "step": step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": self._rates[step - 1 - self._start],
            "supervised_tokens": values["supervised_tokens"],
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        numbers = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if self._work is not None:
            done = self._work.flops_per_token * row["tokens_per_second"]
            row["mfu"] = done / self._work.peak_flops
            numbers += f"  MFU {row['mfu']:.1%}"
        self._write(row)
        numbers += f"  {readable_bytes(self.peak_memory)}"
        self._bar.update(self._task, completed=step, numbers=numbers)
        if self._plain and (step % self._every == 0 or step == self._steps):
            # Of the steps after the first, which waited for the compiler.
            taken = step - self._start - 1
            left = (now - self._first) / taken * (self._steps - step) if taken else None
            print(
                f"step {step}/{self._steps}  {numbers}  lr {row['learning_rate']:.2e}"
                + ("" if left is None else f"  {left:,.0f} s left"),
                file=sys.stderr,
                flush=True,
            )

    def evaluated(self, row: Mapping[str, Any], remark: str = "") -> None:
        """Notes a measurement on held-out data; `remark` is for people."""
        self._write(row)
        self.evaluations.append(dict(row))
        self._say(
            f"step {row['step']}/{self._steps}  held-out loss {row['eval_loss']:.4f}  "
            f"perplexity {row['eval_perplexity']:.4g}  ({row['eval_seconds']:.1f} s)"
            + remark
        )

    def go_on(self) -> None:
        """Says that the next step begins now: what was done since is not its time."""
        self._last = time.perf_counter()

    def sampled(self, step: int, texts: Mapping[str, str]) -> None:
        """Notes what the model wrote, by prompt."""
        with open(self._samples, "a", encoding="utf-8") as file:
            for prompt, text in texts.items():
                row = {"step": step, "prompt": prompt, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                for tracker in self._trackers:
                    tracker.sample(step, prompt, text)
            file.flush()
            os.fsync(file.fileno())
        for prompt, text in texts.items():
            shown = (prompt + text.rstrip()).replace("\n", "\n    ")
            self._say(f"step {step}, a sample:\n    {shown}")

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.note(row)

    def _say(self, text: str) -> None:
        if self._plain:
            print(text, file=sys.stderr, flush=True)
        else:  # above the bar
            self._bar.console.print(text, markup=False, highlight=False, emoji=False)


def _keep(path: Path, start: int) -> list[dict[str, Any]]:
    """Drops the rows of steps after `start` from a file of rows; the others."""
    if not path.is_file():
        return []
    kept = [row for row in read_rows(path) if row["step"] <= start]
    temporary = path.with_name(path.name + ".tmp")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def process_seconds() -> float:
    """Seconds since this process was started, imports included."""
    try:
        # The 22nd field, in clock ticks since the system started; names of programs
        # may hold spaces, so count from behind their parenthesis.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # another system than Linux
        return 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON objects; a last line cut off by a kill is dropped."""
    if not path.is_file():
        return []
    rows = []
    # A kill may cut a character too.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl."""
    return [row for row in read_rows(directory / METRICS) if "loss" in row]


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """The measurements on held-out data in metrics.jsonl."""
    return [row for row in read_rows(directory / METRICS) if "eval_loss" in row]


def measured_until(directory: Path, start: int) -> list[dict[str, Any]]:
    """The measurements up to a step."""
    return [row for row in read_evaluations(directory) if row["step"] <= start]


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """What the model wrote on the way, from samples.jsonl."""
    return read_rows(directory / SAMPLES)


def peak_memory_bytes() -> int:
    """Peak memory: of the device where it says, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
