"""Runs of two processes, with two devices each: stopped, killed and continued."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_jax.runs.rows import METRICS, read_metrics
from tests.runs.mesh_cases import settings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 12
NUMBER = "JAX_NUM_CPU_DEVICES"
ENVIRONMENT = {
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "PYTHONPATH": str(ROOT),
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Pair:
    """Two processes of `qlora-jax train`."""

    def __init__(
        self,
        file: Path,
        output: Path,
        *options: tuple[str, ...],
        devices: tuple[int, int] = (2, 2),
    ):
        port = free_port()
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "qlora_jax.cli", "train", str(file)),
                    *("--output-dir", str(output), "--mesh.processes", "2"),
                    *("--mesh.coordinator", f"127.0.0.1:{port}"),
                    *("--mesh.process", str(index)),
                    *(options[index] if options else ()),
                ],
                env=os.environ | ENVIRONMENT | {NUMBER: str(devices[index])},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for index in range(2)
        ]

    def end(self) -> tuple[list[int], list[str]]:
        """Waits for both; returns their statuses and what they wrote to stderr."""
        texts = [process.communicate(timeout=240)[1] for process in self.processes]
        return [process.returncode for process in self.processes], texts


def signal_after(pair: Pair, output: Path, steps: int, number: int) -> None:
    """Sends a signal to process 1 once the run has logged so many steps."""
    rows = output / METRICS
    while not (rows.exists() and rows.read_text().count('"loss"') >= steps):
        assert pair.processes[0].poll() is None, pair.end()
        time.sleep(0.02)
    pair.processes[1].send_signal(number)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Keeps the programs of all processes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("programs")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def run_file(llama_dir, rows_file, tmp_path_factory):
    from qlora_jax.runs.config import MeshConfig
    from qlora_jax.runs.toml import to_toml

    folder = tmp_path_factory.mktemp("processes")
    config = settings(
        str(llama_dir),
        str(rows_file),
        folder / "run",
        MeshConfig(fsdp=2),
        train={"steps": STEPS},
        eval={"examples": 8, "every": 4},
    )
    file = folder / "run.toml"
    file.write_text(to_toml(config))
    return file


def outcome(output: Path) -> tuple[str, list[float], dict]:
    """Returns the adapter's digest, all losses, and what was measured."""
    weights = (output / "adapter/adapter_model.safetensors").read_bytes()
    losses = [row["loss"] for row in read_metrics(output)]
    report = json.loads((output / "report.json").read_text())
    return hashlib.sha256(weights).hexdigest(), losses, report["eval"]


def test_a_stopped_and_a_killed_process_change_nothing(run_file, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    statuses, texts = Pair(run_file, whole).end()
    assert statuses == [0, 0], texts
    # What both would say is said by one.
    assert f"step {STEPS}/{STEPS}" in texts[0] and "step" not in texts[1]

    pair = Pair(run_file, broken)
    signal_after(pair, broken, 2, signal.SIGTERM)
    statuses, texts = pair.end()
    assert statuses == [143, 143], texts
    assert "everything is saved" in texts[0]
    # The command that it says is that of each process; the run's settings are of all.
    for index, text in enumerate(texts):
        command = text.rstrip().splitlines()[-1]
        assert command.endswith(f"--mesh.processes 2 --mesh.process {index}")
    assert "coordinator" not in (broken / "config.toml").read_text()
    stopped = len(read_metrics(broken))
    assert 2 <= stopped < STEPS

    pair = Pair(run_file, broken)
    signal_after(pair, broken, stopped + 1, signal.SIGKILL)
    statuses, texts = pair.end()
    assert statuses == [75, -signal.SIGKILL], texts
    assert "process 1" in texts[0].lower() and "Traceback" not in texts[0]

    statuses, texts = Pair(run_file, broken).end()
    assert statuses == [0, 0], texts
    assert outcome(broken) == outcome(whole)


def test_processes_with_other_settings_end_before_anything_is_written(
    run_file, tmp_path
):
    output = tmp_path / "run"
    pair = Pair(run_file, output, (), ("--train.learning-rate", "0.5"))
    statuses, texts = pair.end()
    assert statuses == [2, 2], texts
    for text in texts:
        assert "learning_rate" in text and "0.5" in text and "Traceback" not in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("output", "devices", "status", "message"),
    [
        ("rows.jsonl", (2, 2), 1, "The output directory .* is a file"),
        ("rows.jsonl/run", (2, 2), 1, "The output directory .* is a file"),
        ("run", (2, 1), 2, r"number of devices: 2 on process 0 \(.*; 1 on process 1"),
    ],
)
def test_what_cannot_be_ends_both_with_its_reason(
    run_file, tmp_path, output, devices, status, message
):
    (tmp_path / "rows.jsonl").touch()
    pair = Pair(run_file, tmp_path / output, devices=devices)
    statuses, texts = pair.end()
    assert statuses == [status, status], texts
    for text in texts:
        assert re.search(message, text) and "Traceback" not in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
