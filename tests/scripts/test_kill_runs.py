"""Runs that are killed continue, and end as uninterrupted ones do."""

import functools
import json

import pytest

pytestmark = pytest.mark.slow

RUN = """
{top}
[model]
path = "{model}"
dtype = "float32"
quantization = "none"
remat = "none"
attention = "eager"
[data]
path = "{rows}"
format = "tokens"
max_length = {length}
packing = true
[train]
steps = {steps}
batch_size = 2
learning_rate = 1e-2
{more}
[log]
plot = false
"""
CHAIN = """
[checkpoint]
every = 20
[eval]
examples = 4
every = 60
at_start = true
"""
STORM = """
lr_scheduler = "cosine"
[lora]
r = 4
lora_alpha = 8
lora_dropout = 0.2
target_modules = ["q_proj", "down_proj"]
"""


@pytest.fixture
def write_run(tmp_path, llama_dir, rows_file):
    """Writes a run file for a small model."""

    def write(name, **values):
        values = {"length": 64, "top": ""} | values
        text = RUN.format(model=llama_dir, rows=rows_file, **values)
        (tmp_path / name).write_text(text)

    return write


@pytest.fixture
def kill_runs(run_script, tmp_path):
    """Runs the script in `tmp_path`."""
    return functools.partial(run_script, "kill_runs", cwd=tmp_path)


def test_a_chain_is_killed_and_continues(kill_runs, write_run, tmp_path):
    starts = {"first": (64, ""), "second": (96, 'adapter_init = "first/adapter"')}
    for name, (length, start) in starts.items():
        settings = {"steps": 120, "top": f'output_dir = "{name}"', "length": length}
        write_run(f"{name}.toml", more=start + CHAIN, **settings)
    command = ("chain", "first.toml", "second.toml", "--output", "chain.json")
    done = kill_runs(*command)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "chain.json").read_text())
    for row in (first, second):
        assert row["steps"] == 120 and row["killed_after"] >= 60
        assert 0 < row["continued_from_step"] <= row["killed_after"]
        assert row["loss_last"] < row["loss_first"]
    assert first["trainable_parameters_before"] is None
    assert second["trainable_parameters_before"] == first["trainable_parameters"]
    assert f"after {second['killed_after']}" in done.stdout
    # An existing run is never trained over.
    again = kill_runs(*command)
    assert again.returncode == 1
    assert "`first` exists; a chain starts its runs itself." in again.stderr


# Steps, options, and that the kills met what they were for; most of them meet the
# writing. (How many come while a process starts up, and whether one of a few leaves
# half a checkpoint, depends on how fast the machine is.)
STORMS = {
    "forks": (
        40,
        ("--kills", "16", "--fork"),
        {"while training": 8},
    ),
    "operations on files": (
        30,
        ("--kills", "20", "--calls", "2"),
        {"while starting": 5, "while training": 1},
    ),
    "processes": (12, ("--kills", "2"), {}),
    "asked to stop": (
        30,
        ("--kills", "5", "--signal", "TERM", "--fork"),
        {"said how to go on": 2},
    ),
    "two processes": (12, ("--kills", "1", "--processes", "2"), {}),
    # As many as take minutes: `make fuzz`.
    "every operation": (30, ("--kills", "40", "--calls"), {"while starting": 10}),
    "many forks": (
        120,
        ("--kills", "50", "--fork"),
        {"while training": 30, "left half a checkpoint": 5},
    ),
    "two processes, many times": (
        40,
        ("--kills", "20", "--processes", "2"),
        {"while training": 10},
    ),
}
MANY = ("every operation", "many forks", "two processes, many times")


@pytest.mark.parametrize(
    ("steps", "options", "least"),
    [
        pytest.param(*storm, marks=[pytest.mark.fuzz] * (name in MANY), id=name)
        for name, storm in STORMS.items()
    ],
)
def test_a_storm_changes_nothing(kill_runs, write_run, steps, options, least):
    write_run("run.toml", steps=steps, more=STORM)
    done = kill_runs("storm", "run.toml", "--every", "1", "--json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-2])
    assert figures["differs"] == [] and figures["steps"] == steps
    assert figures["bytes compared"] > 3 * 4 * 2560  # adapters and two moments
    for name, number in least.items():
        assert figures[name] >= number, name
    if "TERM" in options:  # a process that is asked to stop finishes what it writes
        assert figures["left half a checkpoint"] == 0
