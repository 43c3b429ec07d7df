"""scripts/kill_storm.py: runs that are killed again and again end as a quiet one."""

import json
import os
import subprocess
import sys

import pytest

RUN = """
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
lr_scheduler = "cosine"
[lora]
r = 4
lora_alpha = 8
lora_dropout = 0.2
target_modules = ["q_proj", "down_proj"]
[log]
plot = false
"""


@pytest.fixture
def storm(repository, tmp_path, llama_dir, rows_file):
    """A function: steps, options -> the figures that the script prints."""

    def storm(steps, *args):
        file = tmp_path / "run.toml"
        file.write_text(RUN.format(model=llama_dir, rows=rows_file, steps=steps))
        script = str(repository / "scripts" / "kill_storm.py")
        done = subprocess.run(
            [sys.executable, script, str(file), "--every", "1", "--json", *args],
            capture_output=True,
            text=True,
            cwd=repository,
            env=os.environ | {"PYTHONPATH": str(repository)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-2])

    return storm


@pytest.mark.slow
def test_fifty_kills_change_nothing(storm):
    figures = storm(120, "--kills", "50", "--fork")
    assert figures["differs"] == [] and figures["steps"] == 120
    assert figures["bytes compared"] > 3 * 4 * 2560  # adapters and two moments
    # That the kills met what they were for; most of them meet the writing. (How many
    # come while a life starts up depends on how fast the machine starts one.)
    assert figures["while training"] >= 30
    assert figures["left half a checkpoint"] >= 5


@pytest.mark.slow
def test_processes_of_their_own(storm):
    assert storm(12, "--kills", "2")["differs"] == []


@pytest.mark.slow
def test_runs_that_are_asked_to_stop_say_how_to_go_on(storm):
    figures = storm(30, "--kills", "5", "--signal", "TERM", "--fork")
    assert figures["differs"] == []
    assert figures["said how to go on"] >= 2
    assert figures["left half a checkpoint"] == 0
