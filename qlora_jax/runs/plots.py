"""The curves of a run: loss.png by matplotlib, and charts for the report as geometry.

    draw_loss(directory)                              writes RUN/loss.png
    chart([Curve("loss", steps, losses)], label=...)  pixels for the `chart` macro of
                                                      templates/macros.html

`BackgroundPlot` redraws loss.png during a run, in a thread, within a fixed small share
of the time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from convert import new_file
from qlora_jax.errors import say
from qlora_jax.runs.rows import read_evaluations, read_metrics

LOSS_PLOT = "loss.png"
# Runs of fewer steps show the loss of each step alone, without the mean.
MIN_STEPS_FOR_MEAN = 10

_TRAIN_COLOR, _EVAL_COLOR, _RATE_COLOR = "#4c78a8", "#d1495b", "#6b705c"
# Share of a run's time that drawing may take, and the assumed seconds of the first
# drawing, which imports matplotlib.
_TIME_SHARE, _FIRST_SECONDS = 0.005, 0.5
# A longer curve than two points per bucket is thinned: a page with 100,000 points per
# curve would have megabytes.
_BUCKETS = 300
# Margins of a chart in pixels, for the labels of the ticks.
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 26


def running_mean(
    values: Float[np.ndarray, " steps"],
) -> tuple[Float[np.ndarray, " steps"], int]:
    """Averages each value with its neighbors: 5 % of the values, at least three.

    The window is centred, so the mean does not lag behind a falling loss; towards both
    ends it shrinks evenly on both sides.

    Returns:
      The means, and the width of the full window.
    """
    # 2 (n / 40) + 1: a twentieth of the values, and odd, so that it has a centre.
    count, width = len(values), max(len(values) // 40, 1) * 2 + 1
    index = np.arange(count)
    half = np.minimum(np.minimum(index, count - 1 - index), width // 2)
    # mean[i] = (sums[i + half + 1] - sums[i - half]) / (2 half + 1): linear in count.
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1), width


# --- loss.png ---


def draw_loss(directory: Path, *, quiet: bool = False) -> Path | None:
    """Draws training loss, held-out loss and learning rate over steps as loss.png.

    Args:
      directory: of the run.
      quiet: print nothing if matplotlib is missing.

    Returns:
      Path of the image; None without metrics, or without matplotlib (with a line on
      stderr).
    """
    rows, evaluations = read_metrics(directory), read_evaluations(directory)
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        if not quiet:
            say("loss.png is not drawn: pip install matplotlib.")
        return None
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    _draw_training_loss(loss_axes, rows)
    if evaluations:
        _draw_held_out_loss(loss_axes, evaluations)
    loss_axes.set_ylabel("loss (nats per supervised token)")
    loss_axes.legend(loc="upper right", frameon=False)
    _draw_learning_rate(rate_axes, rows)
    rate_axes.set_xlabel("step")
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # Renamed when complete: an image viewer may reload the file at any time.
    with new_file(directory / LOSS_PLOT) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return directory / LOSS_PLOT


def _draw_training_loss(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    loss = np.array([row["loss"] for row in rows], float)
    with_mean = len(rows) >= MIN_STEPS_FOR_MEAN
    axes.plot(
        *(steps, loss),
        color=_TRAIN_COLOR,
        alpha=0.3 if with_mean else 1.0,
        linewidth=1,
        label="each step" if with_mean else "training loss",
    )
    if with_mean:
        mean, width = running_mean(loss)
        label = f"training loss, mean of {width} steps"
        axes.plot(steps, mean, color=_TRAIN_COLOR, linewidth=2, label=label)


def _draw_held_out_loss(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    loss = np.array([row["eval_loss"] for row in rows], float)
    axes.plot(
        *(steps, loss),
        color=_EVAL_COLOR,
        linewidth=1.5,
        marker="o",
        markersize=4,
        label="held-out loss",
    )
    if np.isfinite(loss).any():
        best = int(np.nanargmin(np.where(np.isfinite(loss), loss, np.nan)))
        axes.plot(
            *(steps[best], loss[best]),
            color=_EVAL_COLOR,
            linestyle="none",
            marker="o",
            markersize=10,
            markerfacecolor="none",
            label=f"best: {loss[best]:.4f} at step {steps[best]}",
        )


def _draw_learning_rate(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = [row["step"] for row in rows]
    rates = [row["learning_rate"] for row in rows]
    axes.plot(steps, rates, color=_RATE_COLOR, linewidth=1.5)
    axes.fill_between(steps, rates, color=_RATE_COLOR, alpha=0.15, linewidth=0)
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0, top=max(*rates, 1e-12) * 1.15)


class BackgroundPlot:
    """Redraws loss.png in a thread, for at most half a percent of the run's time.

    Args:
      directory: of the run.
      draw: takes the directory and `quiet`.
      clock: seconds.
    """

    def __init__(
        self,
        directory: Path,
        *,
        draw: Callable[..., Any] = draw_loss,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._draw, self._clock = directory, draw, clock
        self._thread: threading.Thread | None = None
        # As if a first drawing had just been made: 0.5 s / 0.005 = 100 s.
        self._due = clock() + _FIRST_SECONDS / _TIME_SHARE

    def start_if_due(self) -> bool:
        """Starts a drawing if the last one is long enough ago; returns whether."""
        if self._clock() < self._due or (
            self._thread is not None and self._thread.is_alive()
        ):
            return False
        self._due = math.inf  # until the thread knows how long its drawing took
        self._thread = threading.Thread(target=self._run, name=LOSS_PLOT, daemon=True)
        self._thread.start()
        return True

    def _run(self) -> None:
        began = self._clock()
        try:
            self._draw(self._directory, quiet=True)
        except (
            OSError
        ) as error:  # on a full disk the checkpoints fail the run, not this
            say(f"Note: loss.png was not drawn: {error}.")
        # t seconds of drawing, then t / 0.005 without one.
        self._due = self._clock() + (self._clock() - began) / _TIME_SHARE

    def wait(self) -> None:
        """Returns when no drawing is running."""
        if self._thread is not None:
            self._thread.join()


# --- Charts ---


@dataclass(frozen=True)
class Curve:
    """Values over steps; values that are not finite are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: Literal["train", "eval"] = "train"
    style: Literal["line", "faint", "points"] = "line"


@dataclass(frozen=True)
class Line:
    """A curve in a chart: its points in pixels, and those with a dot."""

    curve: Curve
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float, str]]
    """x and y in pixels, and the tooltip."""


@dataclass(frozen=True)
class Chart:
    """Curves over common axes, in pixels; without lines if no value is finite."""

    label: str
    """For those who do not see the image."""
    width: int
    height: int
    x_ticks: Sequence[tuple[float, str]] = ()
    """Distance from the left edge, and the label."""
    y_ticks: Sequence[tuple[float, str]] = ()
    """Distance from the top edge, and the label."""
    lines: Sequence[Line] = ()

    @property
    def left(self) -> int:
        """Left end of the grid lines."""
        return _LEFT

    @property
    def right(self) -> int:
        """Right end of the grid lines."""
        return self.width - _RIGHT


def chart(
    curves: Sequence[Curve],
    *,
    label: str,
    width: int = 760,
    height: int = 200,
    from_zero: bool = False,
) -> Chart:
    """Lays curves out over common axes.

    Args:
      curves: at least one.
      label: describes the image for those who do not see it.
      width: in pixels at the natural size.
      height: likewise.
      from_zero: start the vertical axis at 0.
    """
    finite = [(curve, *_finite(curve)) for curve in curves]
    finite = [(curve, x, y) for curve, x, y in finite if len(x)]
    if not finite:
        return Chart(label, width, height)
    x_range = _x_range(np.concatenate([x for _, x, _ in finite]))
    y_range = _y_range(np.concatenate([y for _, _, y in finite]), from_zero)
    x_axis = _Axis(*x_range, _LEFT, width - _RIGHT)
    y_axis = _Axis(*y_range, height - _BOTTOM, _TOP)  # pixels count from the top
    return Chart(
        label,
        width,
        height,
        x_axis.ticks(width // 90),
        y_axis.ticks(max(4, height // 50)),
        [_line(curve, x, y, x_axis, y_axis) for curve, x, y in finite],
    )


@dataclass(frozen=True)
class _Axis:
    """Maps the values from `low` to `high` to the pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def pixel(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        # A tenth of a pixel is not visible, and more digits would make the page longer.
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        values, step = ticks(self.low, self.high, count)
        return [(self.pixel(value), _tick_label(value, step)) for value in values]


def _line(
    curve: Curve, x: np.ndarray, y: np.ndarray, x_axis: _Axis, y_axis: _Axis
) -> Line:
    x, y = thin(x, y)
    points = [
        (x_axis.pixel(step), y_axis.pixel(value))
        for step, value in zip(x.tolist(), y.tolist(), strict=True)
    ]
    if len(points) > 1 and curve.style != "points":
        return Line(curve, points, ())
    tooltips = [
        f"{curve.label}, step {step:g}: {value:.5g}"
        for step, value in zip(x.tolist(), y.tolist(), strict=True)
    ]
    dots = [(*p, tooltip) for p, tooltip in zip(points, tooltips, strict=True)]
    return Line(curve, points, dots)


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(curve.steps, float), np.asarray(curve.values, float)
    mask = np.isfinite(x) & np.isfinite(y)
    return x[mask], y[mask]


def _x_range(x: np.ndarray) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _y_range(y: np.ndarray, from_zero: bool) -> tuple[float, float]:
    low, high = float(y.min()), float(y.max())
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-12)
    # Four percent of air, so that a curve does not run along the edge; below, not if
    # the axis starts at 0.
    if not (from_zero and low == 0.0):
        low -= 0.04 * (high - low)
    return low, high + 0.04 * (high - low)


def thin(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]
) -> tuple[Float[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    """Keeps the minimum and the maximum of each bucket of a long curve.

    The curve looks as it would with all points, spikes included.

    Args:
      x: ascending.
      y: finite.
    """
    if len(x) <= 2 * _BUCKETS:
        return x, y
    kept = [0, len(x) - 1]
    for bucket in np.array_split(np.arange(len(x)), _BUCKETS):
        # `unique` below also sorts, so both come in their order in time.
        kept += [bucket[np.argmin(y[bucket])], bucket[np.argmax(y[bucket])]]
    index = np.unique(kept)
    return x[index], y[index]


def ticks(low: float, high: float, count: int) -> tuple[list[float], float]:
    """Returns about `count` round numbers between two values, and their step."""
    least = (high - low) / count
    # The largest power of ten not above the wanted distance; then 1, 2, 5 or 10 times
    # it.
    power = 10.0 ** math.floor(math.log10(least))
    # The tolerances keep a tick that rounding moved past an end by its last bits.
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= least * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)], step


def _tick_label(value: float, step: float) -> str:
    """Formats a tick with the digits that tell it from its neighbors."""
    if abs(value) >= 1e6 or (value and step < 1e-4):
        return f"{value:.1e}" if value else "0"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
