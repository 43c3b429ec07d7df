"""Runs on a mesh of virtual devices train like those on one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runs.mesh_cases import CASES


@pytest.fixture(scope="module")
def trained(llama_dir, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.runs.mesh_cases"),
            *(str(llama_dir), str(rows_file), str(folder), str(folder / "out.json")),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_device(trained, case):
    one, mesh = trained[case]
    assert one["mesh"] == {"data": 1}
    assert mesh["mesh"] == CASES[case][0]
    # Sums over rows are taken in another order: float32 rounds by 6e-8, and each step
    # starts from the weights of the step before. A norm sums up many squares.
    for name, limit in (("losses", 1e-6), ("held_out", 1e-6), ("norms", 1e-5)):
        np.testing.assert_allclose(mesh[name], one[name], rtol=limit)


@pytest.mark.parametrize("case", [case for case in CASES if "fsdp" in CASES[case][0]])
def test_fsdp_divides_what_a_device_holds(trained, case):
    one, mesh = (result["bytes"] for result in trained[case])
    assert mesh["base"] < 0.75 * one["base"]
    assert mesh["optimizer"] < one["optimizer"]
    axes = CASES[case][0]
    # Rows are divided along `data` and `fsdp`, before a step divides their tokens.
    rows = axes.get("data", 1) * axes["fsdp"]
    assert mesh["batch"] * rows == one["batch"]


def test_a_run_goes_on_on_other_devices(trained):
    begun_on_one, begun_on_mesh = trained["longer"]
    assert begun_on_one["mesh"] == {"data": 2, "fsdp": 4}
    assert begun_on_mesh["mesh"] == {"data": 1}
    # As above: half of each was computed on the other's devices.
    for name in ("losses", "held_out"):
        np.testing.assert_allclose(begun_on_one[name], begun_on_mesh[name], rtol=1e-6)
    assert begun_on_one["losses"][:4] == trained["measured"][0]["losses"]
