"""loss.png: training loss, held-out loss and learning rate over the steps of a run.

`draw_loss` draws it from metrics.jsonl. `Redrawing` does so while a run is under way,
in a thread, and so seldom that it takes a fixed small share of the time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.watch import read_evaluations, read_metrics

LOSS_PLOT = "loss.png"
# Share of the time of a run that may go into drawing, and what the first drawing is
# taken to cost (it imports matplotlib), in seconds.
_SHARE, _FIRST = 0.005, 0.5


def running_mean(values: np.ndarray) -> tuple[np.ndarray, int]:
    """A mean over 5 % of the values, centred: it does not lag behind a fall.

    Towards both ends its window shrinks, evenly on both sides.

    Args:
      values: float [steps].

    Returns:
      float [steps], and the width of the window.
    """
    count, width = len(values), max(len(values) // 40, 1) * 2 + 1
    here = np.arange(count)
    half = np.minimum(np.minimum(here, count - 1 - here), width // 2)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[here + half + 1] - sums[here - half]) / (2 * half + 1), width


def draw_loss(directory: Path, *, quiet: bool = False) -> Path | None:
    """Draws losses and learning rate over steps as loss.png.

    Args:
      directory: of the run.
      quiet: say nothing where matplotlib is missing.

    Returns:
      The picture's path; None (with a line on stderr) without matplotlib or metrics.
    """
    rows, evaluations = read_metrics(directory), read_evaluations(directory)
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError:
        if not quiet:
            print(
                "loss.png is not drawn: pip install matplotlib.",
                file=sys.stderr,
            )
        return None
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows], float)
    rate = np.array([row["learning_rate"] for row in rows])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    long = len(rows) >= 10
    axes.plot(
        *(steps, loss),
        color="#4c78a8",
        alpha=0.3 if long else 1.0,
        linewidth=1,
        label="each step" if long else "training loss",
    )
    if long:
        mean, width = running_mean(loss)
        axes.plot(
            *(steps, mean),
            color="#4c78a8",
            linewidth=2,
            label=f"training loss, mean of {width} steps",
        )
    if evaluations:
        at = np.array([row["step"] for row in evaluations])
        held = np.array([row["eval_loss"] for row in evaluations], float)
        axes.plot(
            *(at, held),
            color="#d1495b",
            linewidth=1.5,
            marker="o",
            markersize=4,
            label="held-out loss",
        )
        if np.isfinite(held).any():
            best = int(np.nanargmin(np.where(np.isfinite(held), held, np.nan)))
            axes.plot(
                *(at[best], held[best]),
                color="#d1495b",
                linestyle="none",
                marker="o",
                markersize=10,
                markerfacecolor="none",
                label=f"best: {held[best]:.4f} at step {at[best]}",
            )
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", frameon=False)
    below.plot(steps, rate, color="#6b705c", linewidth=1.5)
    below.fill_between(steps, rate, color="#6b705c", alpha=0.15, linewidth=0)
    below.set_ylabel("learning rate")
    below.yaxis.set_major_locator(MaxNLocator(3))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    below.set_ylim(bottom=0, top=max(rate.max(), 1e-12) * 1.15)
    below.grid(alpha=0.25)
    below.set_xlabel("step")
    for one in (axes, below):
        one.spines[["top", "right"]].set_visible(False)
    path = directory / LOSS_PLOT
    temporary = directory / "loss.tmp.png"
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    return path


class Redrawing:
    """Draws in the background, for at most half a percent of the time."""

    def __init__(
        self,
        directory: Path,
        *,
        draw: Callable[..., Any] = draw_loss,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Draws nothing yet.

        Args:
          directory: of the run.
          draw: takes the directory and `quiet`.
          clock: seconds.
        """
        self._directory, self._draw, self._clock = directory, draw, clock
        self._thread: threading.Thread | None = None
        self._due = clock() + _FIRST / _SHARE

    def now_and_then(self) -> bool:
        """Starts a drawing if the last one was long enough ago; says whether."""
        if self._clock() < self._due or (
            self._thread is not None and self._thread.is_alive()
        ):
            return False
        self._due = float("inf")  # until the drawing knows what it took
        self._thread = threading.Thread(target=self._one, name="loss.png", daemon=True)
        self._thread.start()
        return True

    def _one(self) -> None:
        began = self._clock()
        try:
            self._draw(self._directory, quiet=True)
        except OSError as error:  # a full disk; the run says so where it matters
            print(f"Note: loss.png was not drawn: {error}.", file=sys.stderr)
        self._due = self._clock() + (self._clock() - began) / _SHARE

    def wait(self) -> None:
        """Returns when no drawing is under way."""
        if self._thread is not None:
            self._thread.join()
