"""Processes that train and are ended by a signal: forks, commands, and groups."""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from qlora_jax.cli.main import main as command_line
from qlora_jax.runs.channel import TRY_AGAIN
from qlora_jax.runs.directory import REPORT
from qlora_jax.runs.runner import run as _run_is_imported_before_forks  # noqa: F401

QLORA_JAX = (sys.executable, "-m", "qlora_jax.cli")
POLL_SECONDS = 0.002

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


class Group:
    """Processes that train together; the part of `subprocess.Popen` that is used here.

    A signal goes to one of them, whose exit status counts.
    """

    def __init__(self, processes: Sequence[subprocess.Popen], target: int) -> None:
        """Takes the processes, and which of them is signalled."""
        self.processes, self.target = processes, processes[target]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the status once all have ended, or None.

        Where the others have not ended as they should it is theirs.
        """
        statuses = [process.poll() for process in self.processes]
        if None in statuses:
            return None
        wrong = {*statuses} - {0, TRY_AGAIN, self.target.returncode}
        self.returncode = wrong.pop() if wrong else self.target.returncode
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to one process."""
        self.target.send_signal(number)


class Launcher:
    """Starts `qlora-jax` processes, as forks or as commands."""

    def __init__(self, directory: Path, fork: bool, processes: int = 1) -> None:
        """Sets up the log and a cache of compiled programs in `directory`."""
        self.directory, self.fork, self.processes = directory, fork, processes
        self.rng = random.Random(0)
        self.log = directory / "process.log"
        self.status: int | None = None
        settings = {
            "jax_compilation_cache_dir": str(directory / "cache"),
            "jax_persistent_cache_min_compile_time_secs": "0",
            "jax_cpu_collectives_implementation": "gloo",
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
        with open(self.log, "w") as log, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
            mesh = ["--mesh.coordinator", address]
            mesh += ["--mesh.processes", str(self.processes), "--mesh.process"]
            started = [
                subprocess.Popen(
                    [*QLORA_JAX, *args, *((*mesh, str(n)) * (self.processes > 1))],
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                )
                for n in range(self.processes)
            ]
        return Group(started, self.rng.randrange(self.processes))

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
