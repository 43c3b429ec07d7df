"""Kills training runs on purpose and checks that they continue.

    python scripts/kill_runs.py chain read.toml answer.toml --output chain.json
    python scripts/kill_runs.py storm run.toml --kills 50 --every 1

`chain` trains one run file after the other with `qlora-jax train`. Each process is
killed (SIGKILL) halfway through its steps, and the same command continues the run;
`--no-kill` trains without interruption. A later run starts from an earlier one where
its file names it (`train.adapter_init`). The table at the end shows for each run the
trained parameters before and after, the first and the last loss (on held-out data too,
if the run has some), after which step it was killed and from which it continued.

`storm` trains a run once without interruption, then a second time in another directory,
where each process is ended by a signal: some before training starts, most while it
trains and writes checkpoints. Each next process continues. At the end the adapter, the
optimizer's moments and the losses of all steps are compared, bit for bit; the exit
status is 1 if they differ. With `--signal TERM` each process is asked to stop and must
print the command that continues the run, which starts the next process. `--every 1`
writes a checkpoint at each step, so that most signals meet one. With `--calls` each
process is killed at one of its operations on files of the run (opening, making,
renaming, deleting), from the first to the last, or with a number N at every N-th: just
before it, or within the next milliseconds, while the file is written. `--fork` starts
processes as forks of one that has imported everything but has touched no device, which
saves the seconds that importing takes; otherwise each is started as a user starts it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if not installed

import jax
import numpy as np
import orbax.checkpoint as ocp
import rich.console
import rich.table

from convert.atomic import write_text
from convert.files import read_json
from qlora_jax.cli.main import main as command_line
from qlora_jax.errors import UserError
from qlora_jax.runs.directory import ADAPTER, CHECKPOINTS, REPORT, STARTED
from qlora_jax.runs.rows import METRICS, read_evaluations, read_metrics
from qlora_jax.runs.runner import run as _run_is_imported_before_forks  # noqa: F401
from qlora_jax.runs.toml import read_config, to_toml

QLORA_JAX = (sys.executable, "-m", "qlora_jax.cli")
# Share of the signals of a storm that come while a process starts up and compiles.
EARLY = 0.15
POLL_SECONDS = 0.002
# A small file is written in less.
WRITING_SECONDS = 0.005

# --- A chain: one run after the other, each killed halfway ---


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


# --- A storm: one run, killed again and again ---


FILE_CALLS = (
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"),
    *("os.listdir", "os.scandir", "shutil.rmtree"),
)
"""The audit events of Python that name a file first."""


def kill_at_call(directory: Path, number: int, seconds: float) -> None:
    """Kills this process at its n-th operation on a file in or below a directory.

    Args:
      directory: absolute.
      number: of the operation, from 1.
      seconds: after the operation began; 0 = before it.
    """
    count, prefix = 0, str(directory)

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_CALLS and str(arguments[0]).startswith(prefix):
            count += 1
            if count == number:
                threading.Timer(seconds, kill).start() if seconds else kill()

    sys.addaudithook(hook)


class Fork:
    """A fork of this process; the part of `subprocess.Popen` that is used here."""

    def __init__(
        self, args: list[str], log: Path, before: Callable[[], None] = lambda: None
    ) -> None:
        """Starts `qlora-jax ARGS`; calls `before` in the new process first."""
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            before()
            status = command_line(args)
        except BaseException:
            traceback.print_exc()  # `os._exit` would lose it
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process."""
        os.kill(self.pid, number)


class Launcher:
    """Starts `qlora-jax` processes, as forks or as commands."""

    def __init__(self, directory: Path, fork: bool) -> None:
        """Sets up the log and a cache of compiled programs in `directory`."""
        self.directory, self.fork = directory, fork
        self.log = directory / "process.log"
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
        """Starts `qlora-jax ARGS` with its output in the log; returns the process."""
        if self.fork:
            return Fork(args, self.log)
        with open(self.log, "w") as log:
            return subprocess.Popen(
                [*QLORA_JAX, *args], stdout=log, stderr=log, env=self.environment
            )

    def finish(self, args: list[str]) -> float:
        """Runs `qlora-jax ARGS` to its end; returns the seconds it took."""
        began = time.perf_counter()
        process = self.start(args)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
        if process.returncode:
            raise SystemExit(f"status {process.returncode}:\n{self.log.read_text()}")
        return time.perf_counter() - began

    def kill_at_call(
        self, args: list[str], metrics: Path, number: int, seconds: float
    ) -> str:
        """Starts `qlora-jax ARGS`, a fork, and kills it at an operation on a file.

        Args:
          args: of the command.
          metrics: file of the run.
          number: of the operation in or below the run directory, from 1.
          seconds: from its beginning to the kill.

        Returns:
          When the kill came, as `interrupt`.
        """
        size = metrics.stat().st_size if metrics.is_file() else 0
        before = functools.partial(kill_at_call, metrics.parent, number, seconds)
        process = Fork(args, self.log, before)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
        if process.returncode not in (-signal.SIGKILL, 0):
            raise SystemExit(f"status {process.returncode}:\n{self.log.read_text()}")
        if (metrics.parent / REPORT).is_file():
            return "end"
        trained = metrics.is_file() and metrics.stat().st_size > size
        return "training" if trained else "start"

    def interrupt(
        self, args: list[str], metrics: Path, number: int, early: float, late: float
    ) -> str:
        """Starts `qlora-jax ARGS` and ends it by a signal.

        Args:
          args: of the command.
          metrics: file of the run, which shows when training has begun.
          number: of the signal.
          early: seconds from the start to the signal, or infinite.
          late: seconds from the first step to the signal.

        Returns:
          When the signal came: "start", "training", or "end" if the run was finished.
        """
        before = _inode(metrics)
        began, size, due = time.perf_counter(), None, float("inf")
        process = self.start(args)
        while process.poll() is None:
            now = time.perf_counter()
            if size is None and _inode(metrics) != before:
                size = metrics.stat().st_size  # the rows of earlier processes
            if size is not None and due == float("inf"):
                due = now + late if metrics.stat().st_size > size else due
            if now - began >= early or now >= due:
                process.send_signal(number)
                break
            time.sleep(POLL_SECONDS)
        when = "start" if due == float("inf") else "training"
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
        self.status = process.returncode
        accepted = {0, -number, 128 + number}  # 0: the signal came after the last step
        if process.returncode not in accepted:
            raise SystemExit(f"status {process.returncode}:\n{self.log.read_text()}")
        return "end" if (metrics.parent / REPORT).is_file() else when


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


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
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(newest.resolve() / "state")
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
    launcher = Launcher(directory, args.fork or args.calls > 0)
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


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("chain", help="several runs, each killed halfway")
    c.set_defaults(run=chain)
    c.add_argument("files", nargs="+", type=Path, help="run files, in order")
    c.add_argument("--no-kill", action="store_true", help="train without interruption")
    c.add_argument("--output", type=Path, help="JSON file to write")
    s = commands.add_parser("storm", help="one run, killed again and again")
    s.set_defaults(run=storm)
    s.add_argument("config", type=Path, help="run file; its output_dir is not used")
    s.add_argument("--kills", type=int, default=50)
    s.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    s.add_argument("--every", type=int, help="steps between checkpoints")
    s.add_argument("--seed", type=int, default=0)
    s.add_argument(
        "--calls",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="kill at every N-th operation on files",
    )
    s.add_argument("--fork", action="store_true", help="import once, then fork")
    s.add_argument("--directory", type=Path, help="to work in; default temporary")
    s.add_argument("--verbose", action="store_true")
    s.add_argument("--json", action="store_true", help="print the figures as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"kill_runs {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
