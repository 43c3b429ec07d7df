"""Metrics and samples on disk, progress on stderr, MFU, and trackers.

TensorBoard runs in its own library and is read back; W&B is a stand-in of its API.
"""

import importlib.util
import struct
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import FrozenDict, LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning.estimate import model_flops_per_token
from qlora_jax.planning.step import Step
from qlora_jax.runs import metrics
from qlora_jax.runs.config import LogConfig
from qlora_jax.runs.metrics import Watch, check_trackers, open_trackers
from qlora_jax.runs.rows import read_evaluations, read_metrics, read_samples
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.parameter_groups import schedule

CONFIG = TrainConfig(steps=6, learning_rate=0.5, warmup_steps=2)


def make_watch(directory, start=0, **options):
    options |= {"start": start, "steps": 6, "schedule": schedule(CONFIG, 6), "every": 2}
    return Watch(directory, began=time.perf_counter(), **options)


def take(watch, *steps):
    for step in steps:
        watch.step(step, values(step), 20)


def values(step):
    return {"loss": 6.0 - step, "grad_norm": 1.0, "supervised_tokens": 10}


def evaluation(step):
    measured = {"eval_loss": 3.0 - step / 10, "eval_perplexity": 2.0, "eval_tokens": 9}
    return {"step": step, **measured, "eval_seconds": 0.5}


# --- Rows ---


def test_each_step_is_one_row_with_its_learning_rate_on_disk_at_once(tmp_path, capsys):
    with make_watch(tmp_path) as watch:
        for step in range(1, 7):
            take(watch, step)
            # A kill loses no step that was done.
            assert read_metrics(tmp_path)[-1]["step"] == step
    rows = read_metrics(tmp_path)
    expected = [0.0, 0.25, 0.5, 0.375, 0.25, 0.125]
    np.testing.assert_allclose([r["learning_rate"] for r in rows], expected, 1e-6)
    assert all(r["tokens_per_second"] * r["seconds"] == pytest.approx(20) for r in rows)
    assert watch.last_loss == 0.0 and watch.seconds_to_first_step > 0
    # Without a terminal progress is a line for the first step and every few.
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "2/6", "4/6", "6/6"]
    assert "loss 4.0000" in lines[1] and "lr 2.50e-01" in lines[1]
    assert lines[1].endswith("s left") and "left" not in lines[0]


def test_rows_and_samples_are_kept_up_to_the_step_continued_from(tmp_path, capsys):
    def take_all(watch, step):
        take(watch, step)
        watch.evaluated(evaluation(step), "  best so far")
        watch.sampled(step, {"Zoë:": f" {step}\n[bold]x"})

    tracker = mock.Mock()
    with make_watch(tmp_path, trackers=[tracker]) as watch:
        for step in (1, 2, 3):
            take_all(watch, step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with open(tmp_path / "samples.jsonl", "ab") as file:  # cut inside a character
        file.write('{"step": 4, "prompt": "Zo\u00eb'.encode()[:-1])
    err = capsys.readouterr().err
    assert "step 2/6  held-out loss 2.8000  perplexity 2  (0.5 s)  best so far" in err
    assert "step 3, a sample:\n    Zoë: 3\n    [bold]x\n" in err
    (first,), (second,) = (call.args for call in tracker.log.call_args_list[:2])
    assert first["loss"] == 5.0 and second["eval_loss"] == 2.9
    assert tracker.log_sample.call_args_list[0].args == (1, "Zoë:", " 1\n[bold]x")

    with make_watch(tmp_path, start=2) as watch:
        assert [row["step"] for row in watch.evaluations] == [1, 2]
        assert watch.sampled_steps == {1, 2} and watch.last_loss == 4.0
        take_all(watch, 3)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["learning_rate"] == pytest.approx(0.5)
    evaluations = read_evaluations(tmp_path)
    assert [row["eval_loss"] for row in evaluations] == [2.9, 2.8, 2.7]
    assert read_evaluations(tmp_path, until=2) == evaluations[:2]
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert ["eval_loss" in row for row in rows] == [False, True] * 3
    texts = [row["text"] for row in read_samples(tmp_path)]
    assert texts == [f" {step}\n[bold]x" for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "line",
    [
        *("5", "null", '"x"', "[]", "{}", "{", "[" * 100_000, "1" * 5000, "\\udfff"),
        *('{"step": "1", "loss": 1}', '{"step": 1e3, "eval_loss": 1}', "\0"),
        '{"step": 1, "loss": 1e999, "grad_norm": 1}',
    ],
)
def test_lines_that_no_run_writes_are_left_out_and_counted(tmp_path, capsys, line):
    with make_watch(tmp_path) as watch:
        take(watch, 1, 2)
    file = tmp_path / "metrics.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[0], line, rows[1], line[:40]]))
    capsys.readouterr()
    with make_watch(tmp_path, start=2) as watch:
        take(watch, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    err = capsys.readouterr().err
    assert "of the 4 lines of `metrics.jsonl` are not what a run writes" in err
    assert "the first is line 2." in err


def test_restart_timer_excludes_the_time_since_the_last_step(tmp_path):
    with make_watch(tmp_path) as watch:
        take(watch, 1)
        time.sleep(0.3)
        watch.restart_timer()
        take(watch, 2)
    assert read_metrics(tmp_path)[1]["seconds"] < 0.3


def test_a_failing_close_does_not_hide_the_first_error(tmp_path):
    with pytest.raises(ValueError, match="first"), make_watch(tmp_path) as watch:
        watch._file.close()
        watch._file = mock.Mock(close=mock.Mock(side_effect=OSError("full")))
        raise ValueError("first")


# --- Model FLOPs utilization ---


def test_mfu_is_model_flops_per_second_over_the_peak(tmp_path, capsys):
    work = metrics.Work(flops_per_token=6e9, peak_flops=1e12)
    with make_watch(tmp_path, work=work) as watch:
        take(watch, 1, 2)
    for row in read_metrics(tmp_path):
        # The same product in another order.
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 0.006, rel=1e-12)
    assert "  MFU " in capsys.readouterr().err


def make_step(dtype="bfloat16", remat="full", length=512):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=3)
    lora = LoraConfig(r=4, target_modules=("q_proj",))
    return Step(config, Compute(dtype=dtype, remat=remat, lora=lora), length=length)


@pytest.mark.parametrize("remat", ["none", "full"])  # recomputation is not counted
def test_model_flops_per_token_are_those_counted_by_hand(remat):
    # Documents of 4 and 12 tokens: a token is in one of (16 + 144) / 16 = 10.
    lengths = np.array([4, 12])
    head_dim, layers, r = 8, 3, 4
    linear = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    # Forward and the input's gradient, 2 operations each; no gradient of the base.
    expected = layers * 4 * linear + 4 * 64 * 32
    # Scores and their sum, causal: forward 2 x 10 x width, backward 2.5 times that.
    expected += layers * 2 * 10 * 4 * head_dim * 3.5
    # q_proj's A and B: forward, input's gradient, own gradient.
    expected += layers * r * (32 + 32) * 6
    assert model_flops_per_token(make_step(remat=remat), lengths) == expected


def test_the_peak_is_known_by_the_device_kind_and_for_16_bits(monkeypatch):
    assert metrics.work_of(make_step(), np.array([5])) is None  # a CPU

    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    work = metrics.work_of(make_step(), np.array([5]))
    assert work is not None and work.peak_flops == 989e12
    several = metrics.work_of(make_step(), np.array([5]), devices=8)
    assert several is not None and several.peak_flops == 8 * 989e12
    assert metrics.work_of(make_step(dtype="float32"), np.array([5])) is None
    Device.device_kind = "NVIDIA H200 NVL"
    assert metrics.work_of(make_step(), np.array([5])) is None


def test_peak_memory_and_age_of_the_process():
    jax.local_devices()
    assert metrics.peak_memory_bytes() > 10_000_000
    program = (
        "import time; time.sleep(0.3)\n"
        "from qlora_jax.runs.metrics import process_seconds\n"
        "print(process_seconds())"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    elapsed = time.perf_counter() - began
    assert 0.3 <= float(done.stdout) <= elapsed + 0.1
    assert metrics.process_seconds() > 0


# --- Trackers ---

TRAIN = {"step": 3, "loss": 2.5, "learning_rate": 0.125, "seconds": 1.5}
EVAL = {"step": 4, "eval_loss": 2.25, "eval_tokens": 7, "eval_data": "abc"}


def read_events(directory):
    """Returns (step, tag, value) of the event files, in the order they were written.

    A record is its length (8 bytes), a checksum (4), the event and a checksum (4).
    """
    events = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (size,) = struct.unpack_from("<Q", data, start)
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + size])
            start += 16 + size
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                events.append((event.step, value.tag, text or value.simple_value))
            if event.session_log.status == event_pb2.SessionLog.START:
                events.append((event.step, "start", None))
    return events


def test_tensorboard_gets_the_hugging_face_names_and_purges_repeated_steps(tmp_path):
    log = LogConfig(report_to=("tensorboard",))
    with open_trackers(log, tmp_path, {}, 0) as (board,):
        board.log(TRAIN)
        board.log(EVAL)
        board.log_sample(4, "Once", "upon\na <time>")
    assert read_events(tmp_path) == [
        (3, "train/loss", 2.5),
        (3, "train/learning_rate", 0.125),
        (3, "train/seconds", 1.5),
        (4, "eval/loss", 2.25),
        (4, "eval/tokens", 7.0),
        (4, "samples/Once/text_summary", "    upon\n    a <time>\n"),
    ]
    for start in (2, 0):
        with open_trackers(log, tmp_path, {}, start) as (board,):
            board.log(TRAIN)
        assert (start + 1, "start", None) in read_events(tmp_path)


def test_wandb_resumes_one_run_and_finishes_it_after_an_error(tmp_path, monkeypatch):
    wandb = mock.Mock()
    theirs = wandb.init.return_value
    theirs.id = "k1"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = LogConfig(report_to=("wandb",), project="stories")
    directory = tmp_path / "third"
    directory.mkdir()
    settings = {"lora": FrozenDict({"r": 4})}
    for start in (0, 2):
        with open_trackers(log, directory, settings, start) as (run,):
            run.log(TRAIN)
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["id"], second["id"]) == (None, "k1")
    assert first["name"] == "third" and first["project"] == "stories"
    assert first["config"] == {"lora": {"r": 4}} and first["resume"] == "allow"
    # Steps are repeated after a kill, so they are a metric like the others.
    theirs.define_metric.assert_any_call("*", step_metric="train/global_step")
    assert theirs.log.call_args_list[0].args[0] == {
        **{"train/loss": 2.5, "train/learning_rate": 0.125, "train/seconds": 1.5},
        "train/global_step": 3,
    }
    assert theirs.finish.call_count == 2
    with pytest.raises(ValueError), open_trackers(log, directory, {}, 2) as (run,):
        run.log_sample(4, "Once", "upon")
        raise ValueError
    wandb.Table.assert_called_once_with(columns=["step", "prompt", "text"])
    assert theirs.log.call_args.args[0]["samples"] == wandb.Table.return_value
    wandb.Table.return_value.add_data.assert_called_once_with(4, "Once", "upon")
    assert theirs.finish.call_count == 3


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_tracker_package_is_named(name, package, monkeypatch):
    check_trackers(LogConfig(report_to=("tensorboard",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(LogConfig())
    with pytest.raises(UserError, match=rf'"{name}"\] needs .*pip install {package}\.'):
        check_trackers(LogConfig(report_to=(name,)))
