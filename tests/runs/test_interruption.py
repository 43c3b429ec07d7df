"""Signals are noted, answered and given back; a run stops with everything saved."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_jax.cli.main import main
from qlora_jax.errors import CheckpointError
from qlora_jax.runs.interruption import (
    SIGNALS,
    AtOnce,
    Interruption,
)
from qlora_jax.runs.metrics import Watch, read_metrics
from qlora_jax.runs.runner import run
from qlora_jax.runs.toml import read_config

pytestmark = pytest.mark.usefixtures("handlers")


# --- the handlers ---


@pytest.mark.parametrize(
    ("sent", "at_once"),
    [
        (("SIGTERM",), False),
        (("SIGINT",), False),
        (("SIGTERM", "SIGTERM"), False),
        (("SIGTERM", "SIGINT"), False),
        (("SIGINT", "SIGTERM"), False),
        (("SIGINT", "SIGINT"), True),
        (("SIGTERM", "SIGTERM", "SIGTERM"), True),
        (("SIGTERM", "SIGINT", "SIGINT"), True),
    ],
)
def test_the_first_signal_is_noted_and_the_third_obeyed(sent, at_once, capfd):
    with Interruption() as interruption:
        assert interruption.signal is None
        for name in sent[:-1]:
            signal.raise_signal(signal.Signals[name])
        if at_once:
            with pytest.raises(AtOnce, match=sent[-1]):
                signal.raise_signal(signal.Signals[sent[-1]])
        else:
            signal.raise_signal(signal.Signals[sent[-1]])
        assert interruption.signal == sent[0]
    err = capfd.readouterr().err
    assert f"{sent[0]}: the step under way is finished, then the run is saved." in err
    # All but the first and the one that was obeyed.
    assert err.count("the run is being saved already") == len(sent) - 1 - at_once


def test_handlers_are_restored_after_an_error():
    def mine(number, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, mine)
    with pytest.raises(ZeroDivisionError), Interruption():
        assert signal.getsignal(signal.SIGTERM) != mine
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == mine
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is None
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_sets_no_handler():
    states = []

    def body():
        with Interruption() as interruption:
            states.append([signal.getsignal(number) for number in SIGNALS])
            states.append(interruption.signal)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert states == [[signal.SIG_DFL, signal.default_int_handler], None]


# --- whole runs ---

RUN = """
output_dir = "{output}"
[model]
path = "{model}"
dtype = "float32"
quantization = "none"
remat = "none"
attention = "eager"
[data]
path = "{rows}"
format = "tokens"
max_length = 64
packing = true
[train]
steps = {steps}
batch_size = 2
learning_rate = 1e-2
warmup_steps = 3
lr_scheduler = "cosine"
[lora]
r = 4
lora_alpha = 8
lora_dropout = 0.2
target_modules = ["q_proj", "down_proj"]
[checkpoint]
every = 4
[log]
plot = false
"""
STEPS = 12


@pytest.fixture(scope="module")
def write(tmp_path_factory, llama_dir, rows_file):
    """A function: name of a run directory -> its run file, and the directory."""
    folder = tmp_path_factory.mktemp("runs")

    def write(name):
        file, output = folder / f"{name}.toml", folder / name
        text = RUN.format(model=llama_dir, rows=rows_file, output=output, steps=STEPS)
        file.write_text(text)
        return file, output

    return write


@pytest.fixture(scope="module")
def straight(write):
    """An uninterrupted run."""
    file, output = write("straight")
    run(read_config(file))
    return output


def assert_same(expected: Path, actual: Path) -> None:
    weights = "adapter/adapter_model.safetensors"
    assert (actual / weights).read_bytes() == (expected / weights).read_bytes()
    assert (actual / "report.json").is_file()
    steps, records = [], []
    for directory in (expected, actual):
        steps.append([(r["step"], r["loss"]) for r in read_metrics(directory)])
        record = directory / f"checkpoints/step_{STEPS}/record/metadata"
        records.append(json.loads(record.read_text()))
    assert steps[0] == steps[1] and len(steps[0]) == STEPS
    # Checksums of step, adapter, moments and key.
    assert records[0]["checksums"]["state"] == records[1]["checksums"]["state"]


def stopping_at(monkeypatch, step, name):
    """Raises a signal when a step is noted; the next one is under way by then."""
    noted = Watch.step

    def note(self, number, *rest):
        noted(self, number, *rest)
        if number == step:
            signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(Watch, "step", note)


# See test_checkpoint.py: reads that end late, where one of many has failed.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
def test_stopped_damaged_and_lost(write, straight, monkeypatch, capsys):
    """The life of one run: each part goes on where the one before ended."""
    file, output = write("run")
    stopping_at(monkeypatch, 5, "SIGTERM")
    assert run(read_config(file)) == {"interrupted": "SIGTERM", "step": 6}
    monkeypatch.undo()
    assert (output / "checkpoints" / "step_6").is_dir()
    assert (output / "adapter").is_dir() and not (output / "report.json").exists()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 6

    # On the command line the last thing printed is the command that continues.
    stopping_at(monkeypatch, 8, "SIGINT")
    assert main(["train", str(file)]) == 0
    monkeypatch.undo()
    shown, last = capsys.readouterr().out.rstrip().split("\n\n")
    assert shown == ("Stopped by SIGINT after step 9; all of it is saved. To continue:")
    assert last == f"    qlora-jax train {shlex.quote(str(output / 'config.toml'))}"
    program, *args = shlex.split(last)
    assert main(args) == 0
    assert_same(straight, output)

    # Zeros in the newest checkpoint: the steps after the one before are taken again.
    for path in (output / "checkpoints" / "step_12" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    run(read_config(file))
    err = capsys.readouterr().err
    aside = output.resolve() / "checkpoints" / "damaged_step_12"
    assert f"it is kept as `{aside}`, for you to delete, and the run goes on" in err
    assert "of step 9: 3 steps are taken again." in err
    assert "Continuing from step 9 of 12." in err
    assert aside.is_dir()
    assert_same(straight, output)

    # Without checkpoints: not from the start as if nothing had been.
    shutil.rmtree(output / "checkpoints")
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError) as refused:
        run(read_config(file))
    adapter = str(output / "adapter")
    assert f"training of this run (12 steps) exists only as `{adapter}`" in str(
        refused.value
    )
    assert f"`train.adapter_init` = {adapter!r}" in str(refused.value)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_before_the_first_step_there_is_nothing_to_save(
    write, monkeypatch, capsys, name, status
):
    from qlora_jax.runs import prepare as prepared

    def loading(*_, **__):
        signal.raise_signal(signal.Signals[name])

    file, output = write(f"early {name}")
    monkeypatch.setattr(prepared, "load_examples", loading)
    assert main(["train", str(file)]) == status
    stopped = "terminated" if name == "SIGTERM" else "interrupted"
    message = f"qlora-jax train: {stopped}. No step was under way. The same command"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not output.exists()


AT_ONCE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from qlora_jax.runs.runner import AdapterWriter
from qlora_jax.cli.main import entry
write = AdapterWriter.write
def during_the_save(self, state):
    if int(state.step) == 8:
        for name in ("SIGTERM", "SIGTERM", "SIGTERM"):
            signal.raise_signal(signal.Signals[name])
    write(self, state)
AdapterWriter.write = during_the_save
entry()
"""


def test_an_immediate_stop_loses_nothing_but_steps(write, straight):
    file, output = write("at once")
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, "train", str(file)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ,
        timeout=300,
    )
    assert done.returncode == 130, done.stderr
    assert "is finished, then the run is saved" in done.stderr
    assert "is being saved already" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("qlora-jax train: ended at once.")
    assert "Traceback" not in done.stderr
    run(read_config(file))
    assert_same(straight, output)
