"""Runs one after the other, each of which is killed halfway and continued."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from convert.atomic import write_text
from convert.files import read_json
from qlora_jax.errors import UserError
from qlora_jax.runs.directory import REPORT, STARTED
from qlora_jax.runs.rows import read_evaluations, read_metrics
from qlora_jax.runs.toml import read_config
from scripts.kill_runs.processes import QLORA_JAX


def train_in_chain(
    file: Path, *, kill: bool, timeout: float = 24 * 3600.0
) -> dict[str, Any]:
    """Trains a run to its end; returns its row of the table.

    Raises:
      UserError: the run's directory exists already, or the command failed.
    """
    config = read_config(file)
    directory = Path(config.output_dir)
    if directory.exists():
        raise UserError(
            f"`{directory}` exists; a chain starts its runs itself. Delete it or "
            "give another `output_dir`."
        )
    command = [*QLORA_JAX, "train", str(file)]
    killed = continued = None
    if kill:
        killed = kill_halfway(command, directory, timeout)
        status, continued = continue_run(command)
    else:
        status = subprocess.run(command).returncode
    if status:
        raise UserError(f"`{' '.join(command)}` ended with {status}.")
    report = read_json(directory / REPORT)
    rows, evaluations = read_metrics(directory), read_evaluations(directory)
    origin = report["continued_from"] or {}
    twentieth = max(len(rows) // 20, 1)
    return {
        "run": str(directory),
        "steps": report["steps"],
        "killed_after": killed,
        "continued_from_step": continued,
        "max_length": config.data.max_length,
        "trainable_parameters_before": origin.get("trainable_parameters_before"),
        "trainable_parameters": report["trainable_parameters"],
        "groups": report["groups"],
        "loss_first": sum(row["loss"] for row in rows[:twentieth]) / twentieth,
        "loss_last": sum(row["loss"] for row in rows[-twentieth:]) / twentieth,
        "eval_loss_first": evaluations[0]["eval_loss"] if evaluations else None,
        "eval_loss_last": evaluations[-1]["eval_loss"] if evaluations else None,
        "seconds": sum(row["seconds"] for row in rows),
        "versions": report["versions"],
    }


def kill_halfway(command: Sequence[str], directory: Path, timeout: float) -> int:
    """Starts a run and kills it after half of its steps; returns the last step."""
    began = time.monotonic()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if time.monotonic() - began > timeout:
                process.kill()
                raise UserError(
                    f"`{directory}` did not reach half of its steps in {timeout:.0f} s."
                )
            started = directory / STARTED
            if started.is_file():
                half = read_json(started)["planned_steps"] // 2
                rows = read_metrics(directory)
                if rows and rows[-1]["step"] >= half:
                    process.kill()
                    break
            time.sleep(0.05)
    if process.returncode != -signal.SIGKILL:
        raise UserError(
            f"`{' '.join(command)}` ended with {process.returncode} before it could be "
            "killed. Use runs with more steps, or `--no-kill`."
        )
    return read_metrics(directory)[-1]["step"]


def continue_run(command: Sequence[str]) -> tuple[int, int]:
    """Runs the command again; returns its status and the step it continued from."""
    step = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("Continuing from step "):
                step = int(line.split()[3])
    return process.returncode, step


def chain_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Returns the rows of a chain as a table."""
    table = rich.table.Table()
    heads = ("run", "steps", "killed", "continued", "trained", "loss", "held out")
    for name in heads:
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        killed, continued = row["killed_after"], row["continued_from_step"]
        before, eval_loss = row["trainable_parameters_before"], row["eval_loss_last"]
        table.add_row(
            row["run"],
            f"{row['steps']:,}",
            "" if killed is None else f"after {killed:,}",
            "" if continued is None else f"from {continued:,}",
            f"{row['trainable_parameters']:,}"
            + ("" if before is None else f" (before: {before:,})"),
            f"{row['loss_first']:.3f} to {row['loss_last']:.3f}",
            ""
            if eval_loss is None
            else f"{row['eval_loss_first']:.3f} to {eval_loss:.3f}",
        )
    return table


def chain(args: argparse.Namespace) -> int:
    """Trains the runs of a chain; prints their table, and writes JSON if asked to."""
    rows = [train_in_chain(file, kill=not args.no_kill) for file in args.files]
    if args.output is not None:
        write_text(args.output, json.dumps(rows, indent=1) + "\n")
    rich.console.Console(width=120).print(chain_table(rows))
    return 0
