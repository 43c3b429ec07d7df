"""A run as a directory: stopped anywhere, continued, it ends as if it had not been.

Kills are real: a process of its own, which a few lines before the command kill at a
given step, or between writing a checkpoint and giving it its name.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.data.batches import Batches
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.runs.checkpoint import Checkpoints
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.metrics import read_metrics
from qlora_jax.runs.runner import run
from qlora_jax.runs.toml import read_config, to_toml
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state

STEPS = 20
# Packed rows, two micro-batches, dropout, shuffled; 24 rows make about 6 packed ones,
# so that 20 steps of 2 x 2 rows cross many epochs.
EVERYTHING = {
    "data": {"packing": True, "seed": 3},
    "train": {
        "gradient_accumulation_steps": 2,
        "warmup_steps": 3,
        "lr_scheduler": "cosine",
    },
    "lora": {"lora_dropout": 0.2},
}


@pytest.fixture(scope="module", autouse=True)
def cache(compile_each_program_once):
    """Many runs here are the same program; see also `command`."""
    return compile_each_program_once


def losses(directory: Path) -> list[tuple[int, float, float]]:
    rows = read_metrics(directory)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def final_state(directory: Path, config: RunConfig):
    """The newest saved state, read without the runner."""
    architecture, base = convert.load_llama(config.model.path, quantization=None)
    adapters = init_adapters(jax.random.key(9), base, config.lora)
    like = init_state(adapters, make_optimizer(config.train, STEPS), jax.random.key(9))
    with Checkpoints(directory / "checkpoints", config.checkpoint) as checkpoints:
        newest = checkpoints.latest()
        assert newest is not None
        state = checkpoints.restore(newest, like)
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def assert_same_trees(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_runs(expected: Path, actual: Path, config: RunConfig) -> None:
    assert losses(actual) == losses(expected)
    assert [step for step, _, _ in losses(actual)] == list(range(1, STEPS + 1))
    weights = Path("adapter/adapter_model.safetensors")
    assert (actual / weights).read_bytes() == (expected / weights).read_bytes()
    states = [final_state(directory, config) for directory in (expected, actual)]
    assert int(states[0].step) == STEPS
    assert_same_trees(*states)
    files = [{p.name for p in run.iterdir()} for run in (expected, actual)]
    assert not files[1] - files[0]
    saved = {path.name for path in (actual / "checkpoints").iterdir()}
    assert saved == {"step_16", "step_20"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, make):
    """A function: name of a setting -> directory of an uninterrupted run."""
    done = {}

    def straight(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "run"
            run(make(done[name], **SETTINGS[name]))
        return done[name]

    return straight


SETTINGS = {
    "plain": {"model": {"quantization": "none", "remat": "none"}},
    "everything": EVERYTHING,
}

# Steps here are faster than the writing of a checkpoint in the background. The signal
# is raised in this thread: sent to the process, it may come when the run is over. Tests
# that a shell runs in the background inherit from it that SIGINT is ignored.
AT_STEP = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from qlora_jax.runs.metrics import Watch
noted = Watch.step
def step(self, number, *rest):
    noted(self, number, *rest)
    if number == {number}:
        newest = self.directory / "checkpoints" / "step_{saved}"
        while {saved} and not newest.exists():
            time.sleep(0.01)
        signal.raise_signal(signal.{signal})
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


def at_step(number: int, signal: str, saved: int) -> str:
    """Lines that signal the process after a step, once a checkpoint is complete."""
    return AT_STEP.format(number=number, signal=signal, saved=saved)


def command(
    config: RunConfig, tmp_path: Path, before: str = "", cache: str | None = None
):
    """Runs `qlora-jax train FILE` in a process of its own.

    It compiles its program itself, as a user's does, unless told where to find it.
    """
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(config))
    program = f"{before}\nfrom qlora_jax.cli.main import entry\nentry()"
    known = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": cache}
    return subprocess.run(
        [sys.executable, "-c", program, "train", str(file)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | known,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("setting", "before", "newest"),
    [
        ("plain", at_step(10, "SIGKILL", 8), "step_8"),
        ("everything", at_step(14, "SIGKILL", 12), "step_12"),
        ("everything", AT_RENAME.format(number=12), "step_8"),
        ("everything", at_step(3, "SIGKILL", 0), None),
        ("everything", AT_RENAME.format(number=20), "step_16"),
    ],
    ids=["plain", "everything", "in a checkpoint", "before any", "in the last"],
)
def test_killed_and_continued_equals_uninterrupted(
    tmp_path, make, straight, cache, setting, before, newest, request
):
    config = make(tmp_path / "run", **SETTINGS[setting])
    anew = request.node.callspec.id in ("plain", "everything")
    killed = command(config, tmp_path, before, None if anew else cache)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    complete = [
        p.name
        for p in (tmp_path / "run" / "checkpoints").iterdir()
        if p.name.removeprefix("step_").isdigit()
    ]
    assert max(complete, key=lambda n: int(n[5:]), default=None) == newest
    run(config)
    assert_same_runs(straight(setting), tmp_path / "run", config)


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_a_finished_run_is_not_changed(tmp_path, make, capsys):
    config = make(tmp_path / "run", train={"steps": 3})
    first = run(config)
    before = snapshot(tmp_path / "run")
    capsys.readouterr()
    assert run(config) == first
    assert "finished (step 3 of 3); nothing was changed" in capsys.readouterr().err
    after = snapshot(tmp_path / "run")
    assert before.pop("config.toml")[1] == after.pop("config.toml")[1]
    assert before == after


def test_killed_before_the_report_the_run_is_completed(tmp_path, make):
    config = make(tmp_path / "run", train={"steps": 3})
    first = run(config)
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    (tmp_path / "run" / "report.json").unlink()
    weights.unlink()
    # What a kill in the middle of writing the adapter leaves.
    (tmp_path / "run" / ".adapter.abc").mkdir()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    second = run(config)
    assert weights.read_bytes() == content
    assert not (tmp_path / "run" / ".adapter.abc").exists()
    assert second["final_loss"] == first["final_loss"]
    assert len(losses(tmp_path / "run")) == 3


def test_a_longer_run_continues_with_a_note(tmp_path, make, capsys):
    run(make(tmp_path / "run", train={"steps": 3}))
    report = run(make(tmp_path / "run", train={"steps": 5}))
    assert report["steps"] == 5
    err = capsys.readouterr().err
    assert "was to take 3 steps and now takes 5; from here the learning rate" in err
    assert "Continuing from step 3 of 5." in err
    assert len(losses(tmp_path / "run")) == 5
    assert read_config(tmp_path / "run" / "config.toml").train.steps == 5
    with pytest.raises(UserError, match="has taken 5 steps already, and is now to end"):
        run(make(tmp_path / "run", train={"steps": 4}))


# --- what must not change ---


@pytest.fixture(scope="module")
def started(tmp_path_factory, make):
    """A run of two steps, to be continued with something changed."""
    directory = tmp_path_factory.mktemp("started") / "run"
    run(make(directory, train={"steps": 2}))
    return directory


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
def test_a_changed_setting_is_refused_and_nothing_is_written(
    started, make, sections, difference
):
    before = snapshot(started)
    sections["train"] = {"steps": 4, **sections.get("train", {})}
    with pytest.raises(UserError, match=f"has changed:\n(- .*\n)*- .*{difference}"):
        run(make(started, **sections))
    assert snapshot(started) == before


def test_a_changed_byte_of_the_base_is_refused(started, make, llama_dir, tmp_path):
    for file in llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = snapshot(started)
    changed = make(started, model={"path": str(tmp_path)}, train={"steps": 4})
    with pytest.raises(
        UserError, match=r"base_fingerprint: '\w{64}' -> '\w{64}' \(the wei"
    ):
        run(changed)
    assert snapshot(started) == before


def test_changed_data_is_refused_and_moved_data_is_not(
    started, make, rows_file, tmp_path
):
    moved = tmp_path / "moved.jsonl"
    lines = rows_file.read_text().splitlines()
    moved.write_text("\n".join(lines[1:]))
    before = snapshot(started)
    with pytest.raises(UserError, match=r"data\.fingerprint: '\w+' -> '\w+'"):
        run(make(started, data={"path": str(moved)}, train={"steps": 4}))
    assert snapshot(started) == before
    moved.write_text("\n".join(lines))
    run(make(started, data={"path": str(moved)}, train={"steps": 2}))


# --- the steps ---


def test_a_run_compiles_its_step_once(tmp_path, make, caplog):
    with caplog.at_level(logging.DEBUG, "jax._src.interpreters.pxla"):
        run(make(tmp_path / "run", train={"steps": 3}, checkpoint={"every": 2}))
        run(make(tmp_path / "run", train={"steps": 9}, checkpoint={"every": 2}))
    compiled = [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("Compiling")
        and "train_step" in record.getMessage()
    ]
    assert len(compiled) == 2, "once in each process"


def test_metrics_adapter_and_report_agree(tmp_path, make, llama_dir, rows_file):
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
    batches = Batches(
        examples,
        config.data,
        batch_size=2,
        accumulation_steps=2,
        pad_token_id=0,
        steps=4,
    )
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
    lora, adapters = convert.load_adapter(
        directory / "adapter", convert.abstract_llama(llama_dir)[0]
    )
    assert (lora.r, lora.lora_alpha) == (4, 8)
    assert lora.base_model_name_or_path == str(llama_dir)
    state = final_state(directory, config)
    assert_same_trees(state.adapters, adapters)

    # report.json: the numbers, counted from the arrays.
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert report["trainable_parameters"] == trained
    assert sum(report["groups"].values()) == trained
    weights = directory / "adapter" / "adapter_model.safetensors"
    assert report["adapter_bytes"] == weights.stat().st_size
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


def test_a_run_can_start_from_an_adapter(tmp_path, make, capsys):
    run(make(tmp_path / "one", train={"steps": 2}))
    adapter = tmp_path / "one" / "adapter"
    train = {"steps": 1, "learning_rate": 0.0, "adapter_init": str(adapter)}
    config = make(tmp_path / "two", train=train)
    run(config)
    assert "Starting from the adapter" in capsys.readouterr().err
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "two" / weights).read_bytes() == (
        tmp_path / "one" / weights
    ).read_bytes()
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
    tmp_path, make, capsys, monkeypatch, edit_tensors
):
    from qlora_jax.runs import prepare as prepared
    from qlora_jax.runs import runner

    source = tmp_path / "adapter"
    base = convert.load_llama(make("x").model.path, quantization=None)[1]
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=("q_proj",))
    adapters = init_adapters(jax.random.key(0), base, lora)
    convert.save_adapter(source, lora, jax.device_get(adapters), base)
    config = make(
        tmp_path / "new" / "run",
        lora={"target_modules": ("q_proj",), "lora_alpha": 16},
        train={"steps": 1, "adapter_init": str(source)},
    )
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


def test_modules_of_the_base_need_their_classes(tmp_path, make, llama_dir):
    base = shutil.copytree(llama_dir, tmp_path / "base")
    raw = json.loads((base / "config.json").read_text())
    raw["extra_tensors"] = {"model.layers.self_attn.gate.weight": [4, 64]}
    (base / "config.json").write_text(json.dumps(raw))
    file = base / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.gate.weight"
        tensors[key] = np.ones((4, 64), np.float32)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    more = {"model": {"path": str(base)}, "lora": {"target_modules": ("gate",)}}
    with pytest.raises(UserError, match="in Python .*the command line takes none"):
        run(make(tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_rows_are_the_same_by_list_and_by_module(tmp_path, make, capsys):
    rows = {"target_modules": ("q_proj",), "trainable_token_indices": (5, 6)}
    run(make(tmp_path / "run", lora=rows, train={"steps": 1}))
    rows["trainable_token_indices"] = {"embed_tokens": (5, 6)}
    run(make(tmp_path / "run", lora=rows, train={"steps": 1}))
    assert "This run is finished" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, make, monkeypatch):
    from qlora_jax.training import step as train

    real = train.train_step

    def step(state, base, batch, **options):
        new, metrics = real(state, base, batch, **options)
        return new, {**metrics, "finite": state.step != 6}

    config = make(tmp_path / "run", train={"steps": 8})
    run(make(tmp_path / "good", train={"steps": 8}))
    monkeypatch.setattr(train, "train_step", step)
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
    config = make(
        tmp_path / "run", train={"learning_rate": 1e38}, checkpoint={"every": 50}
    )
    with pytest.raises(UserError, match=r"Step \d+ is not finite.*no checkpoint yet"):
        run(config)


# --- the directory ---


def test_the_output_directory_has_to_be_a_run_or_empty(tmp_path, make):
    (tmp_path / "file").write_text("mine")
    for directory, problem in (
        ("file", "`.*file` is a file"),
        ("file/run", "`.*/file` is a file"),
        ("", "not empty and holds no run"),
    ):
        with pytest.raises(UserError, match=problem):
            run(make(tmp_path / directory))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_cannot_be_written_is_refused_at_once(
    tmp_path, make, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write in"):
        run(make(tmp_path / "run"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="`/proc/run` cannot be made"):
        run(make("/proc/run"))


def test_two_processes_do_not_train_in_the_same_directory(tmp_path, make):
    import fcntl

    config = make(tmp_path / "run", train={"steps": 1})
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process is training in"):
            run(config)
    finally:
        os.close(handle)
    run(config)


# Once a checkpoint is complete, no file may grow beyond a size.
FULL = """
import resource, time
from qlora_jax.runs.metrics import Watch
noted = Watch.step
def step(self, number, *rest):
    noted(self, number, *rest)
    if number == 5:
        while not (self.directory / "checkpoints" / "step_4").exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
Watch.step = step
"""


def test_a_full_disk_costs_nothing_but_time(tmp_path, make, straight, cache):
    config = make(tmp_path / "run", **EVERYTHING)
    full = command(config, tmp_path, FULL, cache)
    assert full.returncode == 1, full.stderr
    *lines, last = full.stderr.splitlines()
    # The lines of every run, and none of the threads that write.
    known = ("24 of 24 rows", "Plan: ", "Training ", "  default: ")
    assert all(line.startswith(known) for line in lines), lines
    assert last.startswith("qlora-jax train: ")
    assert "cannot be written: File too large. The checkpoints there are" in last
    assert "give the same command to continue" in last
    assert (tmp_path / "run" / "checkpoints" / "step_4").is_dir()
    run(config)
    assert_same_runs(straight("everything"), tmp_path / "run", config)
