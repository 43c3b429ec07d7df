"""A run as a directory: stopped anywhere, continued, it ends as if it had not been.

Kills are real: a process of its own, which a few lines before the command kill at a
given step, or between writing a checkpoint and giving it its name.
"""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.data.batches import Batches
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs import prepare as prepared
from qlora_jax.runs import runner
from qlora_jax.runs.rows import read_metrics
from qlora_jax.runs.runner import run
from qlora_jax.runs.toml import read_config
from qlora_jax.training import step as training
from tests.runs.directories import (
    assert_same_runs,
    assert_same_trees,
    final_state,
    losses,
    train_in_a_process,
    weights,
)


@pytest.fixture(scope="module", autouse=True)
def cache(compile_each_program_once):
    """Many runs here are the same program; see also `train_in_a_process`."""
    return compile_each_program_once


@pytest.fixture(scope="module")
def everything(make):
    """A function: directory -> a run of 20 steps with packed rows, two micro-batches,
    dropout, shuffled; 24 rows make about 6 packed ones, so it crosses many epochs.
    """
    schedule = {"warmup_steps": 3, "lr_scheduler": "cosine"}
    return lambda directory: make(
        directory,
        data={"packing": True, "seed": 3},
        train={"gradient_accumulation_steps": 2, **schedule},
        lora={"lora_dropout": 0.2},
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory, everything):
    """The directory of such a run, uninterrupted."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    run(everything(directory))
    return directory


@pytest.fixture(scope="module")
def short(tmp_path_factory, make):
    """The directory of a finished run of three steps."""
    directory = tmp_path_factory.mktemp("short") / "run"
    run(make(directory, train={"steps": 3}))
    return directory


# Steps here are faster than the writing of a checkpoint in the background. The signal
# is raised in this thread: sent to the process, it may come when the run is over.
AT_STEP = """
import signal, time
from qlora_jax.runs.metrics import Watch
noted = Watch.step
def step(self, number, *rest):
    noted(self, number, *rest)
    if number == {number}:
        newest = self.directory / "checkpoints" / "step_{saved}"
        while {saved} and not newest.exists():
            time.sleep(0.01)
        {action}
Watch.step = step
"""
# Audit hooks see a rename before it happens.
AT_RENAME = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("step_{number}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def killed_at(number: int, saved: int) -> str:
    """Lines that kill the process after a step, once a checkpoint is complete."""
    kill = "signal.raise_signal(signal.SIGKILL)"
    return AT_STEP.format(number=number, saved=saved, action=kill)


@pytest.mark.parametrize(
    ("before", "newest"),
    [
        (killed_at(14, saved=12), "step_12"),
        (AT_RENAME.format(number=12), "step_8"),
        (killed_at(3, saved=0), None),
        (AT_RENAME.format(number=20), "step_16"),
    ],
    ids=["anew", "in a checkpoint", "before any", "in the last"],
)
def test_killed_and_continued_equals_uninterrupted(
    tmp_path, everything, straight, cache, before, newest, request
):
    config = everything(tmp_path / "run")
    anew = request.node.callspec.id == "anew"
    killed = train_in_a_process(config, before, None if anew else cache)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()]
    complete = [name for name in names if name.removeprefix("step_").isdigit()]
    assert max(complete, key=lambda n: int(n[5:]), default=None) == newest
    run(config)
    assert_same_runs(straight, config)
    assert {path.name for path in checkpoints.iterdir()} == {"step_16", "step_20"}


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_a_finished_run_is_not_changed(tmp_path, make, short, capsys):
    directory = shutil.copytree(short, tmp_path / "run")
    before, config = snapshot(directory), make(directory, train={"steps": 3})
    report = run(config)
    assert report == json.loads((short / "report.json").read_text())
    assert report["resumed_from_step"] is None
    assert "finished (step 3 of 3); nothing was changed" in capsys.readouterr().err
    after = snapshot(directory)
    del before["config.toml"], after["config.toml"]
    assert before == after and read_config(directory / "config.toml") == config


def test_killed_before_the_report_the_run_is_completed(tmp_path, make, short):
    directory = shutil.copytree(short, tmp_path / "run")
    (directory / "report.json").unlink()
    (directory / "adapter" / "adapter_model.safetensors").unlink()
    # What a kill in the middle of writing the adapter leaves.
    (directory / ".adapter.0123abcd.qlora-jax-partial").mkdir()
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    report = run(make(directory, train={"steps": 3}))
    assert weights(directory) == weights(short)
    assert not (directory / ".adapter.0123abcd.qlora-jax-partial").exists()
    assert report["final_loss"] == losses(short)[-1][1]
    assert len(losses(directory)) == 3


def test_a_longer_run_continues_with_a_note(tmp_path, make, short, capsys):
    directory = shutil.copytree(short, tmp_path / "run")
    report = run(make(directory, train={"steps": 5}))
    assert report["steps"] == 5 and report["resumed_from_step"] == 3
    err = capsys.readouterr().err
    assert "was to take 3 steps and now takes 5; from here the learning rate" in err
    assert "Continuing from step 3 of 5." in err
    assert len(losses(directory)) == 5
    assert read_config(directory / "config.toml").train.steps == 5
    with pytest.raises(UserError, match="has taken 5 steps already, and is now to end"):
        run(make(directory, train={"steps": 4}))


# --- what must not change ---


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"lora": {"r": 8}}, r"lora\.r: 4 -> 8"),
        ({"lora": {"target_modules": "all-linear"}}, r"lora\.target_modules: \["),
        ({"train": {"learning_rate": 0.5}}, r"train\.learning_rate: 0\.01 -> 0\.5"),
        ({"train": {"batch_size": 1}}, r"train\.batch_size: 2 -> 1"),
        ({"train": {"seed": 5}}, r"train\.seed: 0 -> 5"),
        ({"model": {"dtype": "bfloat16"}}, r"model\.dtype: 'float32' -> 'bfloat16'"),
        ({"model": {"quantization": "nf4"}}, r"quantization: 'nf4_dq' -> 'nf4'"),
        ({"model": {"lm_head": "nf4"}}, r"lm_head: 'auto, device or host' -> 'nf4'"),
        ({"data": {"shuffle": False}}, r"data\.shuffle: True -> False"),
        ({"data": {"max_length": 63}}, r"data\.max_length: 64 -> 63"),
    ],
)
def test_a_changed_setting_is_refused_before_data_are_read_and_nothing_is_written(
    short, make, monkeypatch, sections, difference
):
    before = snapshot(short)
    monkeypatch.setattr(prepared, "load_examples", pytest.fail)
    sections["train"] = {"steps": 4, **sections.get("train", {})}
    with pytest.raises(UserError, match=f"has changed:\n(- .*\n)*- .*{difference}"):
        run(make(short, **sections))
    assert snapshot(short) == before


def test_changed_weights_and_data_are_refused_and_moved_data_are_not(
    short, make, llama_dir, rows_file, tmp_path
):
    base = shutil.copytree(llama_dir, tmp_path / "base")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (base / "model.safetensors").write_bytes(content)
    moved, lines = tmp_path / "moved.jsonl", rows_file.read_text().splitlines()
    moved.write_text("\n".join(lines[1:]))
    directory = shutil.copytree(short, tmp_path / "run")
    before = snapshot(directory)
    for section, path, message in (
        ("model", base, r"base_fingerprint: '\w{64}' -> '\w{64}' \(the wei"),
        ("data", moved, r"data\.fingerprint: '\w+' -> '\w+'"),
    ):
        with pytest.raises(UserError, match=message):
            run(make(directory, train={"steps": 4}, **{section: {"path": str(path)}}))
    assert snapshot(directory) == before
    moved.write_text("\n".join(lines))
    run(make(directory, data={"path": str(moved)}, train={"steps": 3}))


# --- the steps ---


def test_a_run_compiles_its_step_once(tmp_path, make, caplog):
    with caplog.at_level(logging.DEBUG, "jax._src.interpreters.pxla"):
        for steps in (3, 9):
            run(make(tmp_path / "run", train={"steps": steps}, checkpoint={"every": 2}))
    messages = [record.getMessage() for record in caplog.records]
    compiled = [text for text in messages if text.startswith("Compiling")]
    once_in_each_process = [text for text in compiled if "train_step" in text]
    assert len(once_in_each_process) == 2


def test_metrics_adapter_and_report_agree(tmp_path, make, architecture, llama_dir):
    config = make(
        tmp_path / "run",
        data={"packing": True},
        train={"steps": 4, "gradient_accumulation_steps": 2, "lr_scheduler": "linear"},
        log={"plot": True},
    )
    report = run(config)
    directory = tmp_path / "run"
    assert json.loads((directory / "report.json").read_text()) == report

    # metrics.jsonl: the fields, and tokens counted from the batches themselves.
    rows = read_metrics(directory)
    examples = load_examples(config.data, None, vocab_size=32)
    sizes = {"batch_size": 2, "accumulation_steps": 2, "pad_token_id": 0}
    batches = Batches(examples, config.data, **sizes, steps=4)
    for index, row in enumerate(rows):
        assert set(row) == {
            *("step", "loss", "grad_norm", "learning_rate", "supervised_tokens"),
            *("tokens_per_second", "seconds", "peak_memory_bytes"),
        }
        batch = batches[index]
        assert row["step"] == index + 1
        assert row["supervised_tokens"] == (batch["labels"][..., 1:] != -100).sum()
        tokens = row["tokens_per_second"] * row["seconds"]
        np.testing.assert_allclose(tokens, (batch["segment_ids"] > 0).sum(), rtol=1e-9)
        np.testing.assert_allclose(row["learning_rate"], 1e-2 * (4 - index) / 4, 1e-6)
        assert row["peak_memory_bytes"] > 0
    assert report["final_loss"] == rows[-1]["loss"]

    # adapter/: what the newest checkpoint holds.
    lora, adapters = convert.load_adapter(directory / "adapter", architecture)
    assert (lora.r, lora.lora_alpha) == (4, 8)
    assert lora.base_model_name_or_path == str(llama_dir)
    state = final_state(directory, config)
    assert_same_trees(state.adapters, adapters)

    # report.json: the numbers, counted from the arrays.
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert report["trainable_parameters"] == trained
    assert sum(report["groups"].values()) == trained
    assert report["adapter_bytes"] == len(weights(directory))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert report["optimizer_bytes"] == nbytes == trained * 8 + 8
    dense = safetensors.numpy.load_file(llama_dir / "model.safetensors").values()
    assert report["base_parameters"] == sum(tensor.size for tensor in dense)
    assert report["versions"]["jax"] == jax.__version__
    assert report["data"]["fingerprint"] == examples.report.fingerprint
    assert report["seconds_to_first_step"] > 0

    # config.toml: read again it is the configuration.
    assert read_config(directory / "config.toml") == config
    picture = (directory / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_run_can_start_from_an_adapter(tmp_path, make, short, capsys):
    train = {"steps": 1, "learning_rate": 0.0, "adapter_init": str(short / "adapter")}
    run(make(tmp_path / "two", train=train))
    assert "Starting from the adapter" in capsys.readouterr().err
    assert weights(tmp_path / "two") == weights(short)
    assert read_config(tmp_path / "two" / "config.toml").lora.r == 4
    # Its rank is its own; the factor and the dropout may change, and stay changed.
    with pytest.raises(UserError, match=r"`r`=9 \(the adapter's: 4\)"):
        run(make(tmp_path / "three" / "run", lora={"r": 9}, train=train))
    assert not (tmp_path / "three").exists()
    capsys.readouterr()
    run(make(tmp_path / "three", lora={"lora_alpha": 24}, train=train))
    err = capsys.readouterr().err
    assert "(r=4, lora_alpha=24, lora_dropout=0.0)" in err
    assert "Changed: lora_alpha 8 -> 24." in err
    run(read_config(tmp_path / "three" / "config.toml"))
    assert "This run is finished" in capsys.readouterr().err


def test_a_start_that_fails_leaves_nothing_behind(
    tmp_path, make, short, capsys, monkeypatch, edit_tensors
):
    source = shutil.copytree(short / "adapter", tmp_path / "adapter")
    start = {"steps": 1, "adapter_init": str(source)}
    config = make(tmp_path / "new" / "run", lora={"lora_alpha": 16}, train=start)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def widen(tensors):
        tensors[key] = np.pad(tensors[key], ((0, 8), (0, 0)))

    def spoil(tensors):
        tensors[key] = np.full((64, 4), np.nan, np.float32)

    # Of another base: said before large data are read.
    monkeypatch.setattr(prepared, "_QUICK_BYTES", -1)
    monkeypatch.setattr(prepared, "load_examples", None)
    edit_tensors(source / "adapter_model.safetensors", widen)
    with pytest.raises(CheckpointError, match=r"\[72, 4\] instead of \[64, 4\]"):
        run(config)
    # So are targets that the model does not have.
    with pytest.raises(UserError, match="Did you mean .*q_proj"):
        run(make(tmp_path / "new" / "run", lora={"target_modules": ("q_prj",)}))
    monkeypatch.undo()
    # What only the values tell comes before the run begins.
    edit_tensors(source / "adapter_model.safetensors", spoil)
    with pytest.raises(CheckpointError, match="contains NaN"):
        run(config)
    assert "Training" not in capsys.readouterr().err
    # And where the directory was made already, it goes again.
    monkeypatch.setattr(runner, "init_adapters", widen)
    with pytest.raises(TypeError):
        run(make(tmp_path / "new" / "run", train={"steps": 1}))
    assert not (tmp_path / "new").exists()


def test_modules_of_the_base_need_their_classes(
    tmp_path, make, llama_dir, edit_tensors
):
    base = shutil.copytree(llama_dir, tmp_path / "base")
    raw = json.loads((base / "config.json").read_text())
    raw["extra_tensors"] = {"model.layers.self_attn.gate.weight": [4, 64]}
    (base / "config.json").write_text(json.dumps(raw))
    keys = [f"model.layers.{layer}.self_attn.gate.weight" for layer in range(2)]
    gates = dict.fromkeys(keys, np.ones((4, 64), np.float32))
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(gates))
    more = {"model": {"path": str(base)}, "lora": {"target_modules": ("gate",)}}
    with pytest.raises(UserError, match="in Python .*the command line takes none"):
        run(make(tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_rows_are_the_same_by_list_and_by_module(tmp_path, make, capsys):
    for rows in ((5, 6), {"embed_tokens": (5, 6)}):
        lora = {"target_modules": ("q_proj",), "trainable_token_indices": rows}
        run(make(tmp_path / "run", lora=lora, train={"steps": 1}))
    assert "This run is finished" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, make, monkeypatch):
    real = training.train_step

    def step(state, base, batch, **options):
        new, metrics = real(state, base, batch, **options)
        return new, {**metrics, "finite": state.step != 6}

    config = make(tmp_path / "run", train={"steps": 8})
    run(make(tmp_path / "good", train={"steps": 8}))
    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(UserError, match="Step 7 is not finite: loss ") as stopped:
        run(config)
    message = str(stopped.value)
    file = tmp_path / "run" / "nonfinite_step_7.npz"
    assert str(file) in message and "(number 6)" in message
    assert str(tmp_path / "run" / "checkpoints" / "step_4") in message
    batch = np.load(file)
    assert batch["tokens"].shape == batch["labels"].shape == (1, 2, 64)
    # Whatever it was is over: the same command goes on.
    monkeypatch.undo()
    run(config)
    assert losses(tmp_path / "run") == losses(tmp_path / "good")


def test_a_learning_rate_far_too_high_stops_the_run(tmp_path, make):
    train, checkpoint = {"learning_rate": 1e38}, {"every": 50}
    with pytest.raises(UserError, match=r"Step \d+ is not finite.*no checkpoint yet"):
        run(make(tmp_path / "run", train=train, checkpoint=checkpoint))


# --- the directory ---


def test_the_output_directory_has_to_be_a_run_or_empty_and_writable(
    tmp_path, make, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(prepared, "load_examples", pytest.fail)
    for directory, problem in (
        (tmp_path / "file", "`.*file` is a file"),
        (tmp_path / "file" / "run", "`.*/file` is a file"),
        (tmp_path, "not empty and holds no run"),
        ("/proc/run", "`/proc/run` cannot be made"),
    ):
        with pytest.raises(UserError, match=problem):
            run(make(directory))
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write in"):
        run(make(tmp_path / "run"))


# Once a checkpoint is complete, no file may grow beyond a size.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"


def test_a_full_disk_costs_nothing_but_time(tmp_path, everything, straight, cache):
    config = everything(tmp_path / "run")
    before = AT_STEP.format(number=5, saved=4, action=LIMIT)
    full = train_in_a_process(config, before, cache)
    assert full.returncode == 1, full.stderr
    *lines, last = full.stderr.splitlines()
    # The lines of every run, and none of the threads that write.
    known = ("24 of 24 rows", "Compiling ", "Plan: ", "Loading ", "Training ")
    known += ("  default: ", "step 1/20")
    assert all(line.startswith(known) for line in lines), lines
    assert last.startswith("qlora-jax train: ")
    assert "cannot be written: File too large. The checkpoints there are" in last
    assert "give the same command to continue" in last
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "step_4").is_dir()
    run(config)
    assert_same_runs(straight, config)
    assert {path.name for path in checkpoints.iterdir()} == {"step_16", "step_20"}
