"""Several runs one after the other, each killed on the way: a chain as it is in life.

    python scripts/chain.py read.toml answer.toml --output chain.json

Each run file is given to `qlora-jax train`. Halfway through its steps the process is
killed (SIGKILL), and the same command continues it; `--no-kill` lets it be. A later run
starts from an earlier one where its file says so (`train.adapter_init`). At the end a
table: what was trained before and after, the loss at the start and at the end, on
held-out data too if the run has some, and where it was killed and went on.
"""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if not installed

from convert.files import read_json
from convert.output import write_text
from qlora_jax.errors import UserError
from qlora_jax.runs.directory import REPORT, STARTED
from qlora_jax.runs.metrics import read_evaluations, read_metrics
from qlora_jax.runs.toml import read_config


def train(file: Path, *, kill: bool, timeout: float = 24 * 3600.0) -> dict[str, Any]:
    """Takes a run to its end; returns its row of the table.

    Raises:
      UserError: the directory holds a run already, or the command failed.
    """
    config = read_config(file)
    directory = Path(config.output_dir)
    if directory.exists():
        raise UserError(f"`{directory}` exists; a chain makes its runs itself.")
    command = [sys.executable, "-m", "qlora_jax.cli", "train", str(file)]
    killed = continued = None
    if kill:
        killed = _kill_halfway(command, directory, timeout)
        status, continued = _continue(command)
    else:
        status = subprocess.run(command).returncode
    if status:
        raise UserError(f"`{' '.join(command)}` ended with {status}.")
    report = read_json(directory / REPORT)
    rows, held = read_metrics(directory), read_evaluations(directory)
    origin = report["continued_from"] or {}
    few = max(len(rows) // 20, 1)
    return {
        "run": str(directory),
        "steps": report["steps"],
        "killed_after": killed,
        "continued_from_step": continued,
        "max_length": config.data.max_length,
        "trainable_parameters_before": origin.get("trainable_parameters_before"),
        "trainable_parameters": report["trainable_parameters"],
        "groups": report["groups"],
        "loss_first": sum(row["loss"] for row in rows[:few]) / few,
        "loss_last": sum(row["loss"] for row in rows[-few:]) / few,
        "eval_loss_first": held[0]["eval_loss"] if held else None,
        "eval_loss_last": held[-1]["eval_loss"] if held else None,
        "seconds": sum(row["seconds"] for row in rows),
        "versions": report["versions"],
    }


def _kill_halfway(command: Sequence[str], directory: Path, timeout: float) -> int:
    """Starts a run and kills it after half of its steps; returns how many it took."""
    began = time.monotonic()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if time.monotonic() - began > timeout:
                process.kill()
                raise UserError(f"`{directory}` got nowhere in {timeout:.0f} s.")
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
            "killed. A chain wants runs of some steps; `--no-kill` lets them be."
        )
    rows = read_metrics(directory)
    return rows[-1]["step"]


def _continue(command: Sequence[str]) -> tuple[int, int]:
    """Gives the command again; returns its status and the step it went on from."""
    step = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("Continuing from step "):
                step = int(line.split()[3])
    return process.returncode, step


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """The rows as a person reads them."""
    out = rich.table.Table()
    heads = ("run", "steps", "killed", "went on", "trained", "loss", "held out")
    for name in heads:
        out.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        before = row["trainable_parameters_before"]
        held = row["eval_loss_last"]
        out.add_row(
            row["run"],
            f"{row['steps']:,}",
            "" if row["killed_after"] is None else f"after {row['killed_after']:,}",
            ""
            if row["continued_from_step"] is None
            else f"from {row['continued_from_step']:,}",
            f"{row['trainable_parameters']:,}"
            + ("" if before is None else f" (before: {before:,})"),
            f"{row['loss_first']:.3f} to {row['loss_last']:.3f}",
            "" if held is None else f"{row['eval_loss_first']:.3f} to {held:.3f}",
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Takes the chain; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="run files, in order")
    parser.add_argument("--no-kill", action="store_true", help="let the runs be")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    rows = []
    try:
        for file in args.files:
            rows.append(train(file, kill=not args.no_kill))
    except UserError as error:
        print(f"chain: {error}", file=sys.stderr)
        return 1
    if args.output is not None:
        write_text(args.output, json.dumps(rows, indent=1) + "\n")
    rich.console.Console(width=120).print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
