"""What a window saves in attention as an H200 would run it: products are counted."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pallas_kernels.device import jax_has_kernels
from scripts.bench.windows import visible

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11"),
]

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 4096


@pytest.mark.parametrize("window", [512, 1024])
def test_products_outside_of_a_window_are_not_computed(gpu_compiler, window):
    command = [gpu_compiler, str(ROOT / "scripts/bench"), "windows", "--operations"]
    command += [f"--length={LENGTH}", f"--window={window}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    rows = json.loads(child.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 4
    heads, width = 32, 128
    for row in rows:
        # Blocks cover whole windows: of a side of at most half the longest block, 1,024
        # tokens, or 128 of our kernels, the keys of one more block a query.
        side = 128 if row["implementation"] == "pallas" else 512
        products = {"forward": 2, "backward": 7}[row["pass"]]
        if row["implementation"] == "xla" and row["pass"] == "backward":
            products = 5
        most = 2 * products * heads * width * LENGTH * (window + side)
        assert row["window"] <= most
        seen = 2 * products * heads * width * visible(LENGTH, window)
        assert seen < row["window"] < row["full"]
