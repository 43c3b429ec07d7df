"""metrics.jsonl, samples.jsonl, the plain progress lines, utilization."""

import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning.estimate import model_flops_per_token
from qlora_jax.planning.step import Step
from qlora_jax.training.step import TrainConfig, schedule
from qlora_jax.watch import (
    Watch,
    Work,
    measured_until,
    peak_memory_bytes,
    process_seconds,
    read_evaluations,
    read_metrics,
    read_rows,
    read_samples,
    work_of,
)

CONFIG = TrainConfig(steps=6, learning_rate=0.5, warmup_steps=2)


def watch(directory, start=0, every=2, **options):
    return Watch(
        directory,
        start=start,
        steps=6,
        schedule=schedule(CONFIG, 6),
        every=every,
        began=time.perf_counter(),
        **options,
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


def measured(step, loss):
    return {
        "step": step,
        "eval_loss": loss,
        "eval_perplexity": 2.0,
        "eval_tokens": 9,
        "eval_seconds": 0.5,
    }


def test_measurements_and_samples_stand_between_the_steps(tmp_path, capsys):
    told = []

    class Told:
        def note(self, row):
            told.append(row)

        def sample(self, step, prompt, text):
            told.append((step, prompt, text))

        def close(self):
            pass

    def take(w, step):
        w.step(step, values(step), 20)
        w.evaluated(measured(step, 3.0 - step / 10), "  best so far")
        w.sampled(step, {"Zoë:": f" {step}\n[bold]x"})

    with watch(tmp_path, trackers=[Told()]) as w:
        for step in (1, 2, 3):
            take(w, step)
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write('{"step": 4, "prompt": "Zo\u00eb'.encode()[:-1])  # cut in a letter
    err = capsys.readouterr().err
    assert "step 2/6  held-out loss 2.8000  perplexity 2  (0.5 s)  best so far" in err
    assert "step 3, a sample:\n    Zoë: 3\n    [bold]x\n" in err
    # Continued from 2: rows of any kind after it are dropped, others kept.
    with watch(tmp_path, start=2) as w:
        assert [row["step"] for row in w.evaluations] == [1, 2]
        assert w.sampled_steps == {1, 2} and w.last_loss == 4.0
        take(w, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    losses = [row["eval_loss"] for row in read_evaluations(tmp_path)]
    assert losses == [2.9, 2.8, 2.7]
    kinds = ["eval_loss" in row for row in read_rows(tmp_path / "metrics.jsonl")]
    assert kinds == [False, True] * 3
    texts = [row["text"] for row in read_samples(tmp_path)]
    assert texts == [f" {step}\n[bold]x" for step in (1, 2, 3)]
    assert told[0]["loss"] == 5.0 and told[1]["eval_loss"] == 2.9
    assert told[2] == (1, "Zoë:", " 1\n[bold]x")
    assert measured_until(tmp_path, 2) == read_evaluations(tmp_path)[:2]


def test_the_time_of_a_measurement_is_not_that_of_the_next_step(tmp_path):
    with watch(tmp_path) as w:
        w.step(1, values(1), 20)
        time.sleep(0.3)
        w.go_on()
        w.step(2, values(2), 20)
    assert read_metrics(tmp_path)[1]["seconds"] < 0.3


def test_utilization_where_the_peak_is_known(tmp_path, capsys):
    with watch(tmp_path, work=Work(flops_per_token=6e9, peak_flops=1e12)) as w:
        w.step(1, values(1), 20)
        w.step(2, values(2), 20)
    for row in read_metrics(tmp_path):
        # The same product in another order.
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 0.006, rel=1e-12)
    assert "  MFU " in capsys.readouterr().err


def step_of(dtype="bfloat16", remat="full", length=512):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    lora = LoraConfig(r=4, target_modules=("q_proj",))
    return Step(config, Compute(dtype=dtype, remat=remat, lora=lora), length=length)


def test_the_work_of_the_model_by_hand():
    # Documents of 4 and 12 tokens: a token lies in one of (16 + 144) / 16 = 10.
    lengths = np.array([4, 12])
    head_dim, layers, r = 8, 3, 4
    linear = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    # Forward and the input's gradient, 2 operations each; no gradient of the base.
    expected = layers * 4 * linear + 4 * 64 * 32
    # Scores and their sum, causal: forward 2 x 10 x width, backward 2.5 times that.
    expected += layers * 2 * 10 * 4 * head_dim * 3.5
    # q_proj's A and B: forward, input's gradient, own gradient.
    expected += layers * r * (32 + 32) * 6
    for remat in ("none", "full"):  # what is computed twice is counted once
        step = step_of(remat=remat)
        assert model_flops_per_token(step, lengths) == expected


def test_the_peak_is_known_by_the_device_s_own_name(monkeypatch):
    assert work_of(step_of(), np.array([5])) is None  # a CPU

    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    work = work_of(step_of(), np.array([5]))
    assert work is not None and work.peak_flops == 989e12
    assert work_of(step_of(dtype="float32"), np.array([5])) is None
    Device.device_kind = "NVIDIA H200 NVL"
    assert work_of(step_of(), np.array([5])) is None


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
