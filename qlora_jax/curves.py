"""Curves as SVG, for a page that has to hold its pictures itself.

    svg = chart([Curve("loss", steps, losses)], unit="nats")

A run of a hundred thousand steps would make a page of megabytes, so a long curve is
drawn by the least and the largest value of each of a few hundred pieces: it looks as it
would with all points, spikes included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

# Pieces that a long curve is cut into; each gives two points.
_PIECES = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 26


@dataclass(frozen=True)
class Curve:
    """Values over steps; those that are not finite are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: Literal["one", "two", "three"] = "one"
    kind: Literal["line", "faint", "points"] = "line"


def chart(
    curves: Sequence[Curve],
    *,
    label: str,
    width: int = 760,
    height: int = 200,
    zero: bool = False,
    number: Callable[[float], str] | None = None,
) -> str:
    """Draws curves over common axes.

    Args:
      curves: at least one with a finite value, or the chart says that there is none.
      label: of the picture, for those who do not see it.
      width: of the picture, in pixels at its natural size.
      height: likewise.
      zero: begin the vertical axis at 0.
      number: text of a value; default the shortest that tells the ticks apart.

    Returns:
      An `<svg>` element.
    """
    finite = [(curve, *_finite(curve)) for curve in curves]
    finite = [(curve, x, y) for curve, x, y in finite if len(x)]
    if not finite:
        return f"<p><small>{escape(label)}: no values yet.</small></p>"
    x_low = min(float(x.min()) for _, x, _ in finite)
    x_high = max(float(x.max()) for _, x, _ in finite)
    y_low = min(float(y.min()) for _, _, y in finite)
    y_high = max(float(y.max()) for _, _, y in finite)
    if zero:
        y_low = min(y_low, 0.0)
    if y_high <= y_low:
        y_high = y_low + max(abs(y_low) * 0.1, 1e-12)
    if x_high <= x_low:
        x_low, x_high = x_low - 1.0, x_high + 1.0
    if not (zero and y_low == 0.0):
        y_low -= 0.04 * (y_high - y_low)
    y_high += 0.04 * (y_high - y_low)
    wide, high = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + wide * (x - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        return _TOP + high * (1 - (y - y_low) / (y_high - y_low))

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    ]
    marks, step = ticks(y_low, y_high, max(4, height // 50))
    show = number or (lambda value: _number(value, step))
    for mark in marks:
        at = down(mark)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" '
            f'y2="{at:.1f}"/><text x="{_LEFT - 6}" y="{at + 4:.1f}" '
            f'text-anchor="end">{escape(show(mark))}</text>'
        )
    marks, step = ticks(x_low, x_high, width // 90)
    for mark in marks:
        parts.append(
            f'<text x="{across(mark):.1f}" y="{height - 6}" text-anchor="middle">'
            f"{escape(_number(mark, step))}</text>"
        )
    for curve, x, y in finite:
        x, y = thinned(x, y)
        points = " ".join(
            f"{across(a):.1f},{down(b):.1f}"
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
        )
        style = f'style="stroke: var(--{curve.color})"'
        if len(x) > 1:
            parts.append(f'<polyline class="{curve.kind}" {style} points="{points}"/>')
        if len(x) == 1 or curve.kind == "points":
            parts += [
                _dot(curve, across(a), down(b), a, b)
                for a, b in zip(x.tolist(), y.tolist(), strict=True)
            ]
    return "".join([*parts, "</svg>"])


def legend(curves: Sequence[Curve]) -> str:
    """What the colours of curves mean."""
    entries = [
        f'<span><i class="{curve.kind}" style="background: var(--{curve.color})"></i>'
        f"{escape(curve.label)}</span>"
        for curve in curves
    ]
    return f'<p class="legend">{" ".join(entries)}</p>'


def _dot(curve: Curve, across: float, down: float, x: float, y: float) -> str:
    return (
        f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.2" style="fill: '
        f'var(--{curve.color})"><title>{escape(curve.label)}, step {x:g}: {y:.5g}'
        "</title></circle>"
    )


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(curve.steps, float), np.asarray(curve.values, float)
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Few enough points to draw: of each piece of a long curve the least and largest.

    Args:
      x: float [points], ascending.
      y: float [points], finite.
    """
    if len(x) <= 2 * _PIECES:
        return x, y
    kept = [0, len(x) - 1]
    for piece in np.array_split(np.arange(len(x)), _PIECES):
        kept += [piece[np.argmin(y[piece])], piece[np.argmax(y[piece])]]
    places = np.unique(kept)
    return x[places], y[places]


def ticks(low: float, high: float, count: int) -> tuple[list[float], float]:
    """Round numbers between two, about so many, and the step from one to the next."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)], step


def _number(value: float, step: float) -> str:
    """A tick's text, with the digits that its neighbours differ in."""
    if abs(value) >= 1e6 or (value and step < 1e-4):
        return f"{value:.1e}" if value else "0"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
