"""What a person sees of a run: a progress line, metrics.jsonl, loss.png.

metrics.jsonl is the record that the others are drawn from: one JSON object a step,
written as the step is done, each step once however often the run was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

METRICS = "metrics.jsonl"


class Watch:
    """Writes one line a step to metrics.jsonl and shows progress on stderr.

    On a terminal that is a bar with loss, tokens/s and time left; elsewhere a plain
    line every few steps. Lines of steps after `start` that an interrupted run left
    behind are dropped: those steps are taken again.
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
    ) -> None:
        """Opens the metrics of a run directory.

        Args:
          directory: of the run.
          start: steps already taken.
          steps: steps of the whole run.
          schedule: step -> learning rate.
          every: steps between plain lines.
          began: `time.perf_counter()` when the command started.
        """
        self._path = directory / METRICS
        self._start, self._steps, self._every = start, steps, every
        # All at once: a rate asked of the device for each step would wait for the step.
        self._rates = np.asarray(schedule(jnp.arange(start, steps))).tolist()
        self._began = self._first = self._last = began
        self.last_loss: float | None = None
        self.seconds_to_first_step: float | None = None
        self.peak_memory: int | None = None
        kept = [row for row in read_metrics(directory) if row["step"] <= start]
        if kept:
            self.last_loss = kept[-1]["loss"]
        temporary = self._path.with_name(METRICS + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self._path)

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
        row = {
            "step": step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": self._rates[step - 1 - self._start],
            "supervised_tokens": values["supervised_tokens"],
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
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


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line cut off by a kill is dropped."""
    path = directory / METRICS
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def peak_memory_bytes() -> int:
    """Peak memory: of the device where it says, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def draw_loss(directory: Path) -> Path | None:
    """Draws loss and learning rate over steps as loss.png.

    Returns:
      The picture's path; None (with a line on stderr) without matplotlib or metrics.
    """
    rows = read_metrics(directory)
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(
            "loss.png is not drawn: install matplotlib (pip install qlora-jax[plots]).",
            file=sys.stderr,
        )
        return None
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows], float)
    rate = np.array([row["learning_rate"] for row in rows])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, color="tab:blue", alpha=0.35, linewidth=1, label="loss")
    if len(rows) >= 10:
        # A mean over 5 % of the run, centred: it does not lag behind a fall. Towards
        # both ends its window shrinks, evenly on both sides.
        count, width = len(rows), max(len(rows) // 40, 1) * 2 + 1
        here = np.arange(count)
        half = np.minimum(np.minimum(here, count - 1 - here), width // 2)
        sums = np.cumsum(np.concatenate([[0.0], loss]))
        mean = (sums[here + half + 1] - sums[here - half]) / (2 * half + 1)
        axes.plot(
            steps, mean, color="tab:blue", linewidth=2, label=f"mean of {width} steps"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(
        steps,
        rate,
        color="tab:orange",
        linewidth=1,
        alpha=0.7,
        linestyle="--",
        label="learning rate",
    )
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0, top=max(rate.max(), 1e-12) * 1.3)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    path = directory / "loss.png"
    temporary = directory / "loss.tmp.png"
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    return path
