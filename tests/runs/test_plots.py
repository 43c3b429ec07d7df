"""loss.png, its share of a run's time, and the geometry of charts."""

import itertools
import json
import sys
import threading
from unittest import mock

import numpy as np
import pytest

from qlora_jax.runs import plots
from qlora_jax.runs.plots import BackgroundPlot, Curve, chart, draw_loss, thin

# --- loss.png ---


def write_metrics(directory, evaluations=()):
    always = {"learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0}
    always |= {"seconds": 1.0, "peak_memory_bytes": 1}
    rows = [{"step": i, "loss": 9 / i, **always} for i in range(1, 60)]
    rows += [
        {"step": step, "eval_loss": loss, "eval_perplexity": 9.0}
        for step, loss in evaluations
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)


def test_the_image_shows_losses_and_leaves_no_other_file(tmp_path):
    assert draw_loss(tmp_path) is None  # no metrics yet
    write_metrics(tmp_path)
    image = draw_loss(tmp_path)
    assert image == tmp_path / "loss.png"
    content = image.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}
    # Held-out losses are drawn too, one that is not finite among them.
    write_metrics(tmp_path, [(0, 5.0), (20, float("nan")), (40, 4.0)])
    draw_loss(tmp_path)
    assert image.read_bytes() != content


def test_without_matplotlib_nothing_is_drawn(tmp_path, capsys, monkeypatch):
    write_metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_loss(tmp_path, quiet=True) is None
    assert capsys.readouterr().err == ""
    assert draw_loss(tmp_path) is None
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "half"), [(0, 0), (3, 3), (100, 5), (197, 2), (199, 0)]
)
def test_the_running_mean_is_centred_and_shrinks_at_the_ends(index, half):
    values = np.random.default_rng(0).normal(size=200)
    mean, width = plots.running_mean(values)
    assert width == 11
    expected = values[index - half : index + half + 1].mean()
    # Differences of float64 sums of 200 numbers of size 1.
    np.testing.assert_allclose(mean[index], expected, atol=1e-13)


def test_background_drawing_takes_half_a_percent_of_the_time(tmp_path):
    now = 0.0
    drawn, may_end = [], threading.Event()

    def draw(directory, quiet):
        nonlocal now
        may_end.wait(10)
        drawn.append(now)
        now += 2.0  # what it takes

    plot = BackgroundPlot(tmp_path, draw=draw, clock=lambda: now)
    assert not plot.start_if_due()
    now = 100.0
    assert plot.start_if_due()
    # While one is running there is no second one, however long it takes.
    now = 5000.0
    assert not plot.start_if_due()
    may_end.set()
    plot.wait()
    assert drawn == [5000.0]
    pause = 2.0 / 0.005  # the drawing has ended; it took 2 s since 5000
    now += pause - 1
    assert not plot.start_if_due()
    # The first drawing also counted the time in which it was held up.
    for wait in (1_000_001 - pause, pause + 1):
        now += wait
        assert plot.start_if_due()
        plot.wait()
    assert len(drawn) == 3


def test_a_full_disk_is_a_note(tmp_path, capsys):
    draw = mock.Mock(side_effect=OSError("no space left"))
    plot = BackgroundPlot(tmp_path, draw=draw, clock=itertools.count(0, 500).__next__)
    assert plot.start_if_due()
    plot.wait()
    assert "loss.png was not drawn: no space left" in capsys.readouterr().err


# --- Charts ---


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
    values, _ = plots.ticks(low, high, 5)
    # Products of a count and a power of ten in float64.
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-18)


def test_a_thinned_curve_keeps_its_spikes_and_ends():
    x = np.arange(100_000.0)
    y = np.sin(x / 9000)
    y[41_234], y[77_777] = 9.0, -9.0
    kept_x, kept_y = thin(x, y)
    assert len(kept_x) <= 602 and kept_y.max() == 9.0 and kept_y.min() == -9.0
    assert kept_x[0] == 0 and kept_x[-1] == 99_999 and (np.diff(kept_x) > 0).all()
    np.testing.assert_array_equal(y[kept_x.astype(int)], kept_y)
    short = np.arange(5.0)
    assert thin(short, short)[0] is short


def test_points_are_in_proportion_to_their_values():
    curve = Curve("held out", [0, 25, 50, 100], [4.0, 3.0, float("nan"), 2.0], "eval")
    picture = chart([curve], label="loss", width=400, height=200)
    (line,) = picture.lines
    assert not line.dots
    (x0, y0), (x1, y1), (x2, y2) = line.points  # without the value that is not finite
    assert (x0, x2) == (picture.left, picture.right)
    assert 0 < y0 < y1 < y2 < 200  # the larger the higher up
    # Pixels are rounded to a tenth.
    assert x1 - x0 == pytest.approx((x2 - x0) / 4, abs=0.1)
    assert y1 - y0 == pytest.approx((y2 - y0) / 2, abs=0.1)
    labels = {label: y for y, label in picture.y_ticks}
    assert labels["4"] == y0 and labels["2"] == y2
    assert (x2, "100") in picture.x_ticks


def test_one_value_is_a_dot_and_points_are_dots_on_a_line():
    (line,) = chart([Curve("a", [3], [1.5])], label="one").lines
    assert [dot[2] for dot in line.dots] == ["a, step 3: 1.5"]
    (line,) = chart([Curve("a", [1, 2], [5.0, 6.0], style="points")], label="two").lines
    assert [dot[:2] for dot in line.dots] == line.points
    # Curves without a finite value and flat ones have charts too.
    assert not chart([Curve("a", [1], [float("inf")])], label="none").lines
    (line,) = chart([Curve("a", [1, 2], [0.0, 0.0])], label="flat").lines
    assert len(line.points) == 2
    zero = chart([Curve("a", [1, 2], [4.0, 5.0])], label="zero", from_zero=True)
    assert zero.y_ticks[0] == (zero.height - 26, "0")
