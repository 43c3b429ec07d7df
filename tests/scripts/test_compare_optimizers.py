"""Every optimizer runs, and its state is counted."""

import json

import pytest


@pytest.mark.real
@pytest.mark.slow
def test_every_optimizer_runs_with_its_state_size(run_script, shared_data, tmp_path):
    text = (shared_data / "text" / "tinyshakespeare" / "input.txt").read_text()
    data = tmp_path / "text.txt"
    data.write_text(text[:20_000])
    output = tmp_path / "optimizers.json"
    options = ["--model", shared_data / "stories260K", "--data", data]
    options += ["--steps", "12", "--output", output]
    # Two of the runs differ from two others in their seed alone.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    done = run_script("compare_optimizers.py", *options, **cache)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["runs"]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 + len(rows) == 8
    sizes = {row["optimizer"]: row["state_bytes"] for row in rows}
    trained = rows[0]["trained_parameters"]
    assert 8 * trained <= sizes["adamw"] < 8.01 * trained
    assert sizes["adamw_8bit"] < sizes["lion"] < sizes["adamw"]
    for row in rows:
        assert 2 < row["losses"]["last 20"] < 7
    # The same data in the same order: seeds differ, optimizers start alike.
    assert rows[0]["losses"] != rows[2]["losses"]
