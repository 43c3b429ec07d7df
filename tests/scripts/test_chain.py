"""scripts/chain.py: runs one after the other, killed on the way and continued."""

import json
import os
import subprocess
import sys

import pytest

RUN = """
output_dir = "{name}"
[model]
path = "{model}"
dtype = "float32"
quantization = "none"
[data]
path = "{rows}"
format = "tokens"
max_length = {length}
packing = true
[eval]
examples = 4
every = 150
at_start = true
[train]
steps = 300
batch_size = 2
learning_rate = 1e-2
{start}
[checkpoint]
every = 40
[log]
plot = false
"""


@pytest.mark.slow
def test_a_chain_is_killed_and_goes_on(repository, tmp_path, llama_dir, rows_file):
    starts = {"one": (64, ""), "two": (96, 'adapter_init = "one/adapter"')}
    for name, (length, start) in starts.items():
        text = RUN.format(
            name=name, model=llama_dir, rows=rows_file, length=length, start=start
        )
        (tmp_path / f"{name}.toml").write_text(text)
    script = str(repository / "scripts" / "chain.py")
    command = [sys.executable, script, "one.toml", "two.toml", "--output", "chain.json"]
    there = {
        "cwd": tmp_path,
        "capture_output": True,
        "text": True,
        "env": os.environ | {"PYTHONPATH": str(repository)},
    }
    done = subprocess.run(command, **there)
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "chain.json").read_text())
    for row in (one, two):
        assert row["steps"] == 300 and row["killed_after"] >= 150
        assert 0 < row["continued_from_step"] <= row["killed_after"]
        assert row["loss_last"] < row["loss_first"]
    assert one["trainable_parameters_before"] is None
    assert two["trainable_parameters_before"] == one["trainable_parameters"]
    assert f"after {two['killed_after']}" in done.stdout
    # What is there stays there.
    again = subprocess.run(command, **there)
    assert again.returncode == 1
    assert "chain: `one` exists; a chain makes its runs itself." in again.stderr
