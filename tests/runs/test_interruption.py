"""Signals are noted, answered and given back; a run stops with everything saved."""

import shlex
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from qlora_jax.cli.main import main
from qlora_jax.errors import CheckpointError
from qlora_jax.runs import prepare as prepared
from qlora_jax.runs.interruption import (
    SIGNALS,
    AtOnce,
    Interruption,
    RunInterrupted,
)
from qlora_jax.runs.runner import run
from qlora_jax.runs.toml import to_toml
from tests.runs.directories import (
    LATE_READS,
    after_step,
    assert_same_runs,
    losses,
    train_in_a_process,
    weights,
)

pytestmark = pytest.mark.usefixtures("handlers", "compile_each_program_once")


# --- the handlers ---


@pytest.mark.parametrize(
    ("sent", "at_once"),
    [
        *(("TERM", False), ("INT", False), ("TERM TERM", False), ("TERM INT", False)),
        *(("INT TERM", False), ("INT INT", True), ("TERM TERM TERM", True)),
        ("TERM INT INT", True),
    ],
)
def test_the_first_signal_is_noted_and_the_third_obeyed(sent, at_once, capfd):
    sent = [f"SIG{name}" for name in sent.split()]
    obeyed = pytest.raises(AtOnce, match=sent[-1]) if at_once else nullcontext()
    with Interruption() as interruption:
        assert interruption.signal is None
        for name in sent[:-1]:
            signal.raise_signal(signal.Signals[name])
        with obeyed:
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


@pytest.fixture(scope="module")
def config_of(make, tmp_path_factory):
    """A function: name -> a run of 12 steps with packed rows and dropout."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"steps": 12, "warmup_steps": 3, "lr_scheduler": "cosine"}
    return lambda name: make(
        folder / name,
        model={"quantization": "none", "remat": "none", "attention": "eager"},
        data={"packing": True},
        train=train,
        lora={"lora_dropout": 0.2},
    )


@pytest.fixture(scope="module")
def straight(config_of):
    """An uninterrupted run."""
    run(config_of("straight"))
    return Path(config_of("straight").output_dir)


def signalled(step, name):
    """Runs within get a signal after a step; the next one is under way by then."""
    return after_step(step, lambda: signal.raise_signal(signal.Signals[name]))


@LATE_READS
def test_stopped_damaged_and_lost(config_of, straight, capsys):
    """The life of one run: each part goes on where the one before ended."""
    config = config_of("run")
    output, file = Path(config.output_dir), Path(f"{config.output_dir}.toml")
    file.write_text(to_toml(config))
    with signalled(5, "SIGTERM"):
        with pytest.raises(RunInterrupted) as stopped:
            run(config)
    reached = (stopped.value.signal, stopped.value.step, stopped.value.steps)
    assert reached == ("SIGTERM", 6, 12) and stopped.value.status == 143
    assert (output / "checkpoints" / "step_6").is_dir()
    assert (output / "adapter").is_dir() and not (output / "report.json").exists()
    assert len(losses(output)) == 6

    # On the command line the last thing printed is the command that continues.
    with signalled(8, "SIGINT"):
        assert main(["train", str(file)]) == 130
    shown, last = capsys.readouterr().err.rstrip().split("\n\n")[-2:]
    assert shown.splitlines()[-1] == (
        "qlora-jax train: stopped by SIGINT after step 9 of 12; everything is saved. "
        "To continue:"
    )
    assert last == f"    qlora-jax train {shlex.quote(str(output / 'config.toml'))}"
    program, *args = shlex.split(last)
    assert main(args) == 0
    assert_same_runs(straight, config)

    # Zeros in the newest checkpoint: the steps after the one before are taken again.
    for path in (output / "checkpoints" / "step_12" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    run(config)
    err = capsys.readouterr().err
    aside = output.resolve() / "checkpoints" / "damaged_step_12"
    assert f"it is kept as `{aside}`, for you to delete, and the run goes on" in err
    assert "of step 9: 3 steps are taken again." in err
    assert "Continuing from step 9 of 12." in err
    assert aside.is_dir()
    assert_same_runs(straight, config)

    # Without checkpoints: not from the start as if nothing had been.
    shutil.rmtree(output / "checkpoints")
    before = weights(output)
    with pytest.raises(CheckpointError) as refused:
        run(config)
    message, adapter = str(refused.value), str(output / "adapter")
    assert f"training of this run (12 steps) exists only as `{adapter}`" in message
    assert f"`train.adapter_init` = {adapter!r}" in message
    assert weights(output) == before


@pytest.mark.parametrize(
    ("name", "status", "stopped"),
    [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")],
)
def test_before_the_first_step_there_is_nothing_to_save(
    config_of, tmp_path, monkeypatch, capsys, name, status, stopped
):
    def loading(*_, **__):
        signal.raise_signal(signal.Signals[name])

    config = config_of(f"early {name}")
    (tmp_path / "run.toml").write_text(to_toml(config))
    monkeypatch.setattr(prepared, "load_examples", loading)
    assert main(["train", str(tmp_path / "run.toml")]) == status
    message = f"qlora-jax train: {stopped}. No step was under way. The same command"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not Path(config.output_dir).exists()


AT_ONCE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from qlora_jax.runs.adapter_writer import AdapterWriter
write = AdapterWriter.write
def during_the_save(self, state, *args):
    if int(state.step) == 8:
        for name in ("SIGTERM", "SIGTERM", "SIGTERM"):
            signal.raise_signal(signal.Signals[name])
    write(self, state, *args)
AdapterWriter.write = during_the_save
"""


def test_an_immediate_stop_loses_nothing_but_steps(
    config_of, straight, compile_each_program_once
):
    config = config_of("at once")
    done = train_in_a_process(config, AT_ONCE, compile_each_program_once)
    assert done.returncode == 130, done.stderr
    assert "is finished, then the run is saved" in done.stderr
    assert "is being saved already" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("qlora-jax train: ended at once.")
    assert "Traceback" not in done.stderr
    run(config)
    assert_same_runs(straight, config)
