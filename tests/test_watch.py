"""metrics.jsonl, the plain progress lines, the picture."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qlora_jax.loss_plot import draw_loss
from qlora_jax.train import TrainConfig, schedule
from qlora_jax.watch import (
    Watch,
    peak_memory_bytes,
    process_seconds,
    read_metrics,
)

CONFIG = TrainConfig(steps=6, learning_rate=0.5, warmup_steps=2)


def watch(directory, start=0, every=2):
    return Watch(
        directory,
        start=start,
        steps=6,
        schedule=schedule(CONFIG, 6),
        every=every,
        began=time.perf_counter(),
    )


def values(step):
    return {"loss": 6.0 - step, "grad_norm": 1.0, "supervised_tokens": 10}


def test_one_object_a_step_with_its_learning_rate(tmp_path):
    with watch(tmp_path) as w:
        for step in range(1, 7):
            w.step(step, values(step), 20)
            # On disk at once: a kill loses no step that was done.
            assert read_metrics(tmp_path)[-1]["step"] == step
    rows = read_metrics(tmp_path)
    expected = [0.0, 0.25, 0.5, 0.375, 0.25, 0.125]
    np.testing.assert_allclose([r["learning_rate"] for r in rows], expected, 1e-6)
    assert all(r["tokens_per_second"] * r["seconds"] == pytest.approx(20) for r in rows)
    assert w.last_loss == 0.0 and w.seconds_to_first_step > 0


def test_steps_that_are_taken_again_are_written_once(tmp_path):
    with watch(tmp_path) as w:
        for step in range(1, 6):
            w.step(step, values(step), 20)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with watch(tmp_path, start=3) as w:
        assert w.last_loss == 3.0
        w.step(4, values(4), 20)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["learning_rate"] == pytest.approx(0.375)


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with watch(tmp_path) as w:
        for step in range(1, 7):
            w.step(step, values(step), 20)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert "loss 4.0000" in lines[0] and "lr 2.50e-01" in lines[0]
    assert lines[0].endswith("s left")


def test_a_failing_close_does_not_hide_the_first_error(tmp_path):
    with pytest.raises(ValueError, match="first"), watch(tmp_path) as w:
        w._file.close()

        class Full:
            def close(self):
                raise OSError("full")

        w._file = Full()
        raise ValueError("first")


def test_the_picture(tmp_path, capsys, monkeypatch):
    assert draw_loss(tmp_path) is None  # no metrics yet
    rows = [{"step": i, "loss": 9 / i, "learning_rate": 0.1} for i in range(1, 60)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    picture = draw_loss(tmp_path)
    assert picture == tmp_path / "loss.png"
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_loss(tmp_path) is None
    assert "pip install qlora-jax[plots]" in capsys.readouterr().err


def test_memory_and_age_of_the_process():
    jax.local_devices()
    assert peak_memory_bytes() > 10_000_000
    program = (
        "import time; time.sleep(0.3); from qlora_jax.watch import process_seconds; "
        "print(process_seconds())"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    elapsed = time.perf_counter() - began
    assert 0.3 <= float(done.stdout) <= elapsed + 0.1
    assert process_seconds() > 0
