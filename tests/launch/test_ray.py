"""launch/ray_train.py on a Ray cluster of nodes that are processes of this machine.

make ray
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.ray,
    # Ray starts its processes with a fork, in which nothing of JAX is used, and leaves
    # their files and sockets open.
    pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy_train.py")
STEPS = 8
# Ray's actors need minutes to start on two busy cores.
LIMIT = 600


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    # On a node of its own, what starts the run outlives the others.
    cluster.add_node(num_cpus=0)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start(cluster, tmp_path):
    """Starts the launcher on a run in `tmp_path`, with files for the toy."""
    started = []

    def start_with(*marks, options=()):
        for name in ("run.toml", *marks):
            (tmp_path / name).touch()
        command = [
            *(sys.executable, ROOT / "launch/ray_train.py", "run.toml", "--nodes", "2"),
            *("--program", f"{sys.executable} {TOY}", *options),
        ]
        environment = os.environ | {
            "RAY_ADDRESS": cluster.address,
            "JAX_PLATFORMS": "cpu",
        }
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path))
        return started[-1]

    yield start_with
    for process in started:
        process.kill()
        process.wait()


def starts(directory):
    """(process, of how many, from which step) of each start."""
    path = directory / "starts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["process"], row["of"], row["step"]) for row in rows]


def sum_of(processes_by_step):
    """The sum that the toy has at the end."""
    return sum(
        float(np.full(count, 1 / step / count, np.float32).sum())
        for step, count in enumerate(processes_by_step, 1)
    )


@pytest.mark.parametrize("killed", [(0,), (1,)])
def test_a_killed_process_restarts_all_which_continue_bit_equal(
    cluster, start, tmp_path, killed
):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    launcher = start(*(f"kill-{index}" for index in killed))
    assert launcher.wait(LIMIT) == 0
    assert json.loads((tmp_path / "sum.json").read_text()) == [STEPS, sum_of([2] * 8)]
    assert sorted(starts(tmp_path)) == [(0, 2, 0), (0, 2, 3), (1, 2, 0), (1, 2, 3)]


def test_an_error_ends_the_run_at_once_with_its_status(cluster, start, tmp_path):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    assert start("refuse-1").wait(LIMIT) == 2
    # Process 0 waited for process 1 in vain.
    assert not (tmp_path / "starts.jsonl").exists()


def test_a_run_that_loses_a_node_continues_on_the_others(cluster, start, tmp_path):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    launcher = start("wait", options=("--min-nodes", "1"))

    def wait_until(happened):
        end = time.monotonic() + LIMIT
        while not happened():
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.2)

    note = tmp_path / "sum.json"
    wait_until(lambda: note.exists() and json.loads(note.read_text())[0] == 3)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_until(lambda: len(starts(tmp_path)) == 3)
    (tmp_path / "wait").unlink()
    assert launcher.wait(LIMIT) == 0
    assert json.loads(note.read_text()) == [STEPS, sum_of([2] * 3 + [1] * 5)]
    assert sorted(starts(tmp_path)) == [(0, 1, 3), (0, 2, 0), (1, 2, 0)]
