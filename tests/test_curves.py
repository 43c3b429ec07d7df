"""Curves as SVG: round ticks, long curves thinned, nothing that is not a number."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from qlora_jax.curves import Curve, chart, legend, thinned, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (2.31, 2.39, [2.32, 2.34, 2.36, 2.38]),
        (-3e-4, 2e-4, [-3e-4, -2e-4, -1e-4, 0, 1e-4, 2e-4]),
        (99_000.0, 101_500.0, [99_000, 99_500, 100_000, 100_500, 101_000, 101_500]),
    ],
)
def test_ticks_are_round_numbers_between(low, high, expected):
    found, _ = ticks(low, high, 5)
    # Products of a count and a power of ten in float64.
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-18)


def test_a_long_curve_keeps_its_spikes():
    x = np.arange(100_000.0)
    y = np.sin(x / 9000)
    y[41_234], y[77_777] = 9.0, -9.0
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) <= 602 and kept_y.max() == 9.0 and kept_y.min() == -9.0
    assert kept_x[0] == 0 and kept_x[-1] == 99_999 and (np.diff(kept_x) > 0).all()
    np.testing.assert_array_equal(y[kept_x.astype(int)], kept_y)
    short = np.arange(5.0)
    assert thinned(short, short)[0] is short


def test_points_lie_where_their_values_are():
    curve = Curve("held <out> & more", [0, 50, 100], [4.0, float("nan"), 2.0], "two")
    svg = chart([curve], label="a <label>", width=400, height=200)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "a <label>"
    (line,) = root.iter("polyline")
    points = line.get("points")
    assert points is not None
    (x0, y0), (x1, y1) = ([float(v) for v in p.split(",")] for p in points.split())
    assert x0 < x1 and y0 < y1  # what is larger is higher up
    texts = [t.text for t in root.iter("text")]
    assert "4" in texts and "2" in texts and "100" in texts
    assert "held &lt;out&gt; &amp; more" in legend([curve])


def test_one_value_and_none():
    (dot,) = ElementTree.fromstring(
        chart([Curve("a", [3], [1.5], kind="points")], label="one")
    ).iter("circle")
    assert next(dot.iter("title")).text == "a, step 3: 1.5"
    assert "no values yet" in chart([Curve("a", [1], [float("inf")])], label="none")
    flat = ElementTree.fromstring(chart([Curve("a", [1, 2], [0.0, 0.0])], label="flat"))
    assert len(list(flat.iter("polyline"))) == 1
