"""A run that is killed again and again, and compared with one that is not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import shlex
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.runs.directory import ADAPTER, CHECKPOINTS
from qlora_jax.runs.rows import METRICS, read_metrics
from qlora_jax.runs.toml import read_config, to_toml
from scripts.kill_runs.processes import Launcher

# Share of the signals that come while a process starts up and compiles.
EARLY = 0.15
# A small file is written in less.
WRITING_SECONDS = 0.005


def compare_runs(directories: Sequence[Path]) -> tuple[int, list[str]]:
    """Compares two finished runs, bit for bit: one without and one with interruptions.

    Returns:
      The bytes of the states, and the names of what differs.
    """
    differences, states = [], []
    weights = [
        (directory / ADAPTER / "adapter_model.safetensors").read_bytes()
        for directory in directories
    ]
    if weights[0] != weights[1]:
        differences.append("adapter")
    for directory in directories:
        paths = (directory / CHECKPOINTS).glob("step_*")
        newest = max(paths, key=lambda path: int(path.name.removeprefix("step_")))
        path = newest.resolve() / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            # Whole and on the host, whatever devices they were on.
            metadata: Any = checkpointer.metadata(path)
            tree = getattr(metadata, "item_metadata", metadata)
            tree = getattr(tree, "tree", tree)
            arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            state = checkpointer.restore(path, arrays)
        states.append(jax.tree_util.tree_leaves_with_path(state))
    for (path, a), (other_path, b) in zip(*states, strict=True):
        if path != other_path or not np.array_equal(np.asarray(a), np.asarray(b)):
            differences.append(jax.tree_util.keystr(path))
    rows = [
        [
            (row["step"], row["loss"], row["grad_norm"])
            for row in read_metrics(directory)
        ]
        for directory in directories
    ]
    if rows[0] != rows[1]:
        differences.append("losses")
    straight, killed = map(_file_names, directories)
    differences += [f"a file left behind: {name}" for name in killed - straight]
    return sum(np.asarray(leaf).nbytes for _, leaf in states[0]), differences


def _file_names(directory: Path) -> set[str]:
    """Returns the names of a run's files, without those within checkpoints."""
    paths = (path.relative_to(directory) for path in directory.rglob("*"))
    return {str(p) for p in paths if p.parts[0] != CHECKPOINTS or len(p.parts) <= 2}


def write_run_files(args: argparse.Namespace, directory: Path) -> list[Path]:
    """Writes the run file twice, for two directories; returns the files."""
    config = read_config(args.config)
    if args.every is not None:
        checkpoint = dataclasses.replace(config.checkpoint, every=args.every)
        config = dataclasses.replace(config, checkpoint=checkpoint)
    files = []
    for name in ("straight", "storm"):
        output = str(directory / name)
        files.append(directory / f"{name}.toml")
        files[-1].write_text(to_toml(dataclasses.replace(config, output_dir=output)))
    return files


def kill_repeatedly(
    args: argparse.Namespace,
    launcher: Launcher,
    file: Path,
    startup: float,
    training: float,
) -> tuple[Counter, str]:
    """Starts the run of a file again and again, each time ending it by a signal.

    Args:
      args: kills, signal, seed, verbose of the command line.
      launcher: starts the processes.
      file: run file; its run is `launcher.directory / file.stem`.
      startup: seconds that the uninterrupted run took before it trained.
      training: seconds that it trained.

    Returns:
      How many signals met what, and the argument of `qlora-jax train` that continues.
    """
    run, command = launcher.directory / file.stem, str(file)
    number, rng = signal.Signals[f"SIG{args.signal}"], random.Random(args.seed)
    # Together the processes train for about half of the run.
    window = training / max(args.kills, 1)
    counts = Counter()
    for kill in range(args.kills):
        early = float("inf")
        if rng.random() < EARLY:
            early = rng.uniform(0.0, startup)
        late = rng.uniform(0.0, window)
        if args.calls:
            late = rng.choice((0.0, rng.uniform(0.0, WRITING_SECONDS)))
            call = 1 + kill * args.calls
            when = launcher.kill_at_call(["train", command], run / METRICS, call, late)
        else:
            when = launcher.interrupt(
                ["train", command], run / METRICS, number, early, late
            )
        counts[when] += 1
        partial_checkpoints = run.glob(f"{CHECKPOINTS}/*.orbax-checkpoint*")
        counts["half a checkpoint"] += any(partial_checkpoints)
        counts["half an adapter"] += any(run.glob(f".{ADAPTER}.*"))
        log = launcher.log.read_text()
        # At once, while it starts or after the last step, there is none.
        last = log.rstrip().splitlines()[-1].strip() if log.strip() else ""
        if args.signal == "TERM" and last.startswith("qlora-jax train "):
            _program, _train, command = shlex.split(last)
            counts["command to continue"] += 1
        if args.verbose:
            print(f"{kill + 1}: {when}, {late:.3f} s", flush=True)
    return counts, command


def measure_storm(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Trains without and with interruptions and compares; returns the figures."""
    straight, file = write_run_files(args, directory)
    launcher = Launcher(directory, args.fork or args.calls > 0, args.processes)
    total = launcher.finish(["train", str(straight)])
    rows = read_metrics(directory / "straight")
    training = sum(row["seconds"] for row in rows[1:])
    print(f"uninterrupted: {len(rows)} steps, {total:.1f} s, {training:.1f} s of them")
    began = time.perf_counter()
    counts, command = kill_repeatedly(args, launcher, file, total - training, training)
    seconds = time.perf_counter() - began
    launcher.finish(["train", command])
    nbytes, differences = compare_runs([directory / "straight", directory / "storm"])
    processor = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "signal": f"SIG{args.signal}",
        "signals": args.kills,
        "while starting": counts["start"],
        "while training": counts["training"],
        "after the end": counts["end"],
        "said how to go on": counts["command to continue"],
        "left half a checkpoint": counts["half a checkpoint"],
        "left half an adapter": counts["half an adapter"],
        "seconds": round(seconds, 1),
        "processor seconds": round(processor.ru_utime + processor.ru_stime, 1),
        "steps": len(rows),
        "bytes compared": nbytes,
        "differs": differences,
    }


def storm(args: argparse.Namespace) -> int:
    """Runs a storm and prints its figures; 1 if the two runs differ."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        figures = measure_storm(args, directory.resolve())
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<24}{value}")
    print("DIFFERENT" if figures["differs"] else "equal, bit for bit")
    return 1 if figures["differs"] else 0
