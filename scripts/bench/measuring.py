"""Measurements in separate processes, each printing one JSON object last."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.runs.environment import versions

FOLDER = Path(__file__).resolve().parent


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command; returns the JSON object that it prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_bench(*args: str) -> dict[str, Any]:
    """Runs `python scripts/bench ARGS`; returns the JSON object that it prints."""
    return run_json([sys.executable, str(FOLDER), *args])


def read_file(path: Path) -> np.ndarray:
    """Reads a file into memory that the process has not touched before."""
    content = np.empty(path.stat().st_size, np.uint8)
    view, done = memoryview(content), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view[done : done + (1 << 28)]):
            done += count
    return content


def write_rows(path: Path, config: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows measured for a model, with the machine and the versions, as JSON."""
    machine = {"processor": platform.machine(), **versions()}
    result = {"config": config.parent.name, "machine": machine, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
