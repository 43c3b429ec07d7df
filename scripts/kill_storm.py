"""Kills a run again and again at random moments; its end must be that of a quiet run.

    python scripts/kill_storm.py run.toml --kills 50

The run is taken once without interruption, then once more in another directory, where
each life of the process is ended by a signal: some before the training starts, most
while it trains and writes checkpoints. Each next life continues. At the end adapter,
optimizer moments and the losses of all steps are compared, bit for bit; the status is 1
if they differ. With `--signal TERM` each life is asked to stop and has to say how to go
on; the next life is started with just that command.

A run with few steps to a checkpoint meets most: `--every 1` writes one at each step.
`--fork` starts lives as forks of a process that has imported everything but has touched
no device, which saves the seconds that importing takes; otherwise each life is a start
of its own, as a user's is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.cli import main as command_line
from qlora_jax.runs.directory import ADAPTER, CHECKPOINTS, REPORT
from qlora_jax.runs.metrics import METRICS, read_metrics
from qlora_jax.runs.runner import run as _run_is_imported_before_forks  # noqa: F401
from qlora_jax.runs.toml import read_config, to_toml

# Of the signals, how many come while a life starts up and compiles.
EARLY = 0.15
_CHILDREN = resource.RUSAGE_CHILDREN
POLL = 0.002


class Fork:
    """A life as a fork of this process; what is used here of `subprocess.Popen`."""

    def __init__(self, args: list[str], log: Path) -> None:
        """Starts `qlora-jax ARGS`."""
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            status = command_line(args)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The status, or None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)


class Storm:
    """Starts lives of runs, in one way or the other."""

    def __init__(self, directory: Path, fork: bool) -> None:
        """Sets up the place for logs and compiled programs."""
        self.directory, self.fork = directory, fork
        self.log = directory / "life.log"
        self.status: int | None = None
        settings = {
            "jax_compilation_cache_dir": str(directory / "cache"),
            "jax_persistent_cache_min_compile_time_secs": "0",
        }
        self.environment = os.environ | {k.upper(): v for k, v in settings.items()}
        if fork:
            jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_enable_compilation_cache", True)

    def start(self, args: list[str]) -> Any:
        """Starts `qlora-jax ARGS`; its output goes to the log."""
        if self.fork:
            return Fork(args, self.log)
        with open(self.log, "w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "qlora_jax.cli", *args],
                stdout=log,
                stderr=log,
                env=self.environment,
            )

    def finish(self, args: list[str]) -> float:
        """Runs to the end; returns the seconds it took."""
        began = time.perf_counter()
        life = self.start(args)
        while life.poll() is None:
            time.sleep(POLL)
        if life.returncode:
            raise SystemExit(f"status {life.returncode}:\n{self.log.read_text()}")
        return time.perf_counter() - began

    def live(
        self, args: list[str], metrics: Path, number: int, early: float, late: float
    ) -> str:
        """One life, ended by a signal.

        Args:
          args: of the command.
          metrics: of the run, which shows when training has begun.
          number: of the signal.
          early: seconds after the start, or infinite.
          late: seconds after the first step.

        Returns:
          Where the signal met it: "start", "training", or "end" when it was finished.
        """
        before = _inode(metrics)
        began, opened, due = time.perf_counter(), None, float("inf")
        life = self.start(args)
        while life.poll() is None:
            now = time.perf_counter()
            if opened is None and _inode(metrics) != before:
                opened = metrics.stat().st_size  # the rows of earlier lives
            if opened is not None and due == float("inf"):
                due = now + late if metrics.stat().st_size > opened else due
            if now - began >= early or now >= due:
                life.send_signal(number)
                break
            time.sleep(POLL)
        met = "start" if due == float("inf") else "training"
        while life.poll() is None:
            time.sleep(POLL)
        self.status = life.returncode
        accepted = {-number} if number == signal.SIGKILL else {0, -number, 128 + number}
        if life.returncode not in accepted | {0}:
            raise SystemExit(f"status {life.returncode}:\n{self.log.read_text()}")
        return "end" if (metrics.parent / REPORT).is_file() else met


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def compare(one: Path, two: Path) -> tuple[int, list[str]]:
    """Compares two finished runs.

    Returns:
      The bytes of the states, and what differs.
    """
    differs = []
    weights = Path(ADAPTER) / "adapter_model.safetensors"
    if (one / weights).read_bytes() != (two / weights).read_bytes():
        differs.append("adapter")
    states = []
    for directory in (one, two):
        paths = (directory / CHECKPOINTS).glob("step_*")
        newest = max(paths, key=lambda path: int(path.name.removeprefix("step_")))
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(newest.resolve() / "state")
        states.append(jax.tree_util.tree_leaves_with_path(state))
    for (path, a), (other, b) in zip(*states, strict=True):
        if path != other or not np.array_equal(np.asarray(a), np.asarray(b)):
            differs.append(jax.tree_util.keystr(path))
    rows = [
        [
            (row["step"], row["loss"], row["grad_norm"])
            for row in read_metrics(directory)
        ]
        for directory in (one, two)
    ]
    if rows[0] != rows[1]:
        differs.append("losses")
    return sum(np.asarray(leaf).nbytes for _, leaf in states[0]), differs


def storm(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The quiet run, the storm, the comparison; returns the figures."""
    config = read_config(args.config)
    if args.every is not None:
        checkpoint = dataclasses.replace(config.checkpoint, every=args.every)
        config = dataclasses.replace(config, checkpoint=checkpoint)
    files = []
    for name in ("straight", "storm"):
        output = str(directory / name)
        files.append(directory / f"{name}.toml")
        files[-1].write_text(to_toml(dataclasses.replace(config, output_dir=output)))
    lives, number = Storm(directory, args.fork), signal.Signals[f"SIG{args.signal}"]
    quiet, run = directory / "straight", directory / "storm"
    whole = lives.finish(["train", str(files[0])])
    rows = read_metrics(quiet)
    training = sum(row["seconds"] for row in rows[1:])
    # Together the lives come about half the way.
    window = training / max(args.kills, 1)
    print(f"uninterrupted: {len(rows)} steps, {whole:.1f} s, {training:.1f} s of them")

    chance, met, command = random.Random(args.seed), Counter(), str(files[1])
    began = time.perf_counter()
    for kill in range(args.kills):
        early = float("inf")
        if chance.random() < EARLY:
            early = chance.uniform(0.0, whole - training)
        late = chance.uniform(0.0, window)
        where = lives.live(["train", command], run / METRICS, number, early, late)
        met[where] += 1
        met["half a checkpoint"] += any(run.glob(f"{CHECKPOINTS}/*.orbax-checkpoint*"))
        met["half an adapter"] += any(run.glob(f".{ADAPTER}.*"))
        text = lives.log.read_text()
        # Another status: the signal came in the moment behind the last step.
        if args.signal == "TERM" and where == "training" and lives.status == 0:
            line = text.rstrip().splitlines()[-1]
            program, _train, command = shlex.split(line)
            if program != "qlora-jax":
                raise SystemExit(f"no command to go on with:\n{text}")
            met["said how to go on"] += 1
        if args.verbose:
            print(f"{kill + 1}: {where}, {late:.3f} s", flush=True)
    seconds = time.perf_counter() - began
    lives.finish(["train", command])
    nbytes, differs = compare(quiet, run)
    return {
        "signal": f"SIG{args.signal}",
        "signals": args.kills,
        "while starting": met["start"],
        "while training": met["training"],
        "after the end": met["end"],
        "said how to go on": met["said how to go on"],
        "left half a checkpoint": met["half a checkpoint"],
        "left half an adapter": met["half an adapter"],
        "seconds": round(seconds, 1),
        "processor seconds": round(sum(resource.getrusage(_CHILDREN)[:2]), 1),
        "steps": len(rows),
        "bytes compared": nbytes,
        "differs": differs,
    }


def main() -> int:
    """Runs it; prints a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "config", type=Path, help="run file; its output_dir is not used"
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--every", type=int, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="import once, then fork")
    parser.add_argument(
        "--directory", type=Path, help="where to work; default temporary"
    )
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        figures = storm(args, directory.resolve())
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<24}{value}")
    print("DIFFERENT" if figures["differs"] else "equal, bit for bit")
    return 1 if figures["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
