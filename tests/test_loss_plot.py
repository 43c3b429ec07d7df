"""loss.png, and how seldom it is drawn while a run is under way."""

import json
import sys
import threading

import numpy as np

from qlora_jax.loss_plot import Redrawing, draw_loss, running_mean


def write(directory, evaluations=()):
    rows = [{"step": i, "loss": 9 / i, "learning_rate": 0.1} for i in range(1, 60)]
    rows += [{"step": step, "eval_loss": loss} for step, loss in evaluations]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)


def test_the_picture(tmp_path, capsys, monkeypatch):
    assert draw_loss(tmp_path) is None  # no metrics yet
    write(tmp_path)
    picture = draw_loss(tmp_path)
    assert picture == tmp_path / "loss.png"
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}
    # Held-out losses are drawn too, one that is not finite among them.
    write(tmp_path, [(0, 5.0), (20, float("nan")), (40, 4.0)])
    draw_loss(tmp_path)
    assert picture.read_bytes() != content
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_loss(tmp_path, quiet=True) is None
    assert capsys.readouterr().err == ""
    assert draw_loss(tmp_path) is None
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_mean_is_centred():
    values = np.random.default_rng(0).normal(size=200)
    mean, width = running_mean(values)
    assert width == 11
    for at, half in ((0, 0), (3, 3), (100, 5), (197, 2), (199, 0)):
        wanted = values[at - half : at + half + 1].mean()
        # Differences of float64 sums of 200 numbers of size 1.
        np.testing.assert_allclose(mean[at], wanted, atol=1e-13)


def test_drawing_takes_half_a_percent_of_the_time(tmp_path, capsys):
    now = 0.0
    drawn, may_end = [], threading.Event()

    def draw(directory, quiet):
        nonlocal now
        may_end.wait(10)
        drawn.append(now)
        now += 2.0  # what it takes

    redrawing = Redrawing(tmp_path, draw=draw, clock=lambda: now)
    assert not redrawing.now_and_then()
    now = 100.0
    assert redrawing.now_and_then()
    # While one is under way there is no second one, however long it takes.
    now = 5000.0
    assert not redrawing.now_and_then()
    may_end.set()
    redrawing.wait()
    assert drawn == [5000.0]
    began = now  # the drawing has ended; it took 2 s since 5000
    waits = 2.0 / 0.005
    now = began + waits - 1
    assert not redrawing.now_and_then()
    # The first drawing also counted the time in which it was held up.
    now = began + 1_000_000
    assert redrawing.now_and_then()
    redrawing.wait()
    now = drawn[-1] + 2.0 + waits + 1
    assert redrawing.now_and_then()
    redrawing.wait()
    assert len(drawn) == 3

    def full(directory, quiet):
        raise OSError("no space left")

    redrawing = Redrawing(tmp_path, draw=full, clock=lambda: now)
    now += 1000.0
    assert redrawing.now_and_then()
    redrawing.wait()
    assert "loss.png was not drawn: no space left" in capsys.readouterr().err
