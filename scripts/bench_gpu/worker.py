"""Processes that answer lines of JSON, and the time that they may take."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A kernel that has not been compiled, compared and timed by then hangs (seconds).
LONGEST_ROW = 180.0


class Budget:
    """Seconds to spend, and the names of what was left out for want of them."""

    def __init__(
        self, seconds: float | None, clock: Callable[[], float] = time.monotonic
    ):
        self.seconds, self.clock, self.started = seconds, clock, clock()
        self.longest: dict[str, float] = {}
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds; infinite without a limit."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (self.clock() - self.started)

    def take(self, name: str, group: str, run: Callable[[], Any]) -> Any:
        """Runs unless the longest run of this group so far would no longer fit."""
        began = self.clock()
        if self.left <= self.longest.get(group, 0.0):
            self.left_out.append(name)
            return None
        result = run()
        self.longest[group] = max(self.longest.get(group, 0.0), self.clock() - began)
        return result


class Worker:
    """A process that answers a line of JSON with a line of JSON; restarted if lost.

    A kernel that takes the device or the process down, or does not end, costs one
    answer. `description` is the first line: {"device", ...}, or {"error"}.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[str] | None = None
        self.description = self.start()

    def start(self) -> dict[str, Any]:
        """Starts the process; returns its description."""
        self.close()
        path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        with open(self.log, "a") as log:
            try:
                process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                )
            except OSError as error:
                return {"error": str(error)}
        self.process = process
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    lines.put(line)
            lines.put("")

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        self.lines = lines
        description = self.receive(LONGEST_ROW)
        if "failed" in description:
            return {"error": description["failed"]}
        return description

    def receive(self, seconds: float) -> dict[str, Any]:
        """Waits for a line; {"failed"}, and the process ended, if none comes."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"failed": f"no answer within {seconds:.0f} s; process ended"}
        if not line:
            last = (self.log.read_text().strip().splitlines() or ["no message"])[-1]
            code = self.process.wait() if self.process else None
            self.close()
            return {"failed": f"process ended with status {code}: {last}"[:1000]}
        return json.loads(line)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request, restarting a process that is lost or lost its device."""
        if self.process is None and "error" in (description := self.start()):
            return {"failed": description["error"]}
        assert self.process is not None and self.process.stdin is not None
        # A broken pipe: the process has ended, and its last line is in the log.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        answer = self.receive(LONGEST_ROW)
        if answer.get("alive") is False:
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            self.reader.join()
            self.process = None


def subcommand(name: str, *, dry_run: bool = False) -> list[str]:
    """Returns the command of the worker of `kernels` or `attention`."""
    command = [sys.executable, str(Path(__file__).parent), name, "--work"]
    return [*command, "--dry-run"] if dry_run else command
