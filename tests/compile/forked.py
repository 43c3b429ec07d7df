"""Compiles steps in forks of one process, and each step once.

`qlora_jax.planning.compile` starts a process for each compilation. Here it is a fork of
one that has imported everything, which is a quarter of the time of a step, and equal
requests of all tests and test processes share an answer.
"""

import fcntl
import functools
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.planning import compile

# No device is touched by these, and XLA reads its settings when one is.
IMPORTED = ("convert", "qlora_jax.planning.estimate", "qlora_jax.planning.step")
LOG = "stderr.log"


@functools.cache
def forks() -> Any:
    """The process that is forked, started with the first compilation."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    return context


def run_compiler(
    python: str, folder: Path, gpu: Any, timeout: float, *, shared: Path
) -> Any:
    """Takes the place of `compile._run_compiler`; `shared` holds the answers."""
    assert python == sys.executable
    request = (folder / compile.REQUEST).read_bytes()
    known = shared / hashlib.sha256(request).hexdigest()
    known.mkdir(parents=True, exist_ok=True)
    with open(known / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (known / compile.ANSWER).exists():
            done = _run_fork(folder, gpu, timeout)
            if done.returncode:
                return done
            for name in (compile.PROGRAM, compile.ANSWER):
                if (folder / name).exists():
                    shutil.copy(folder / name, known)
    for name in (compile.PROGRAM, compile.ANSWER):
        if (known / name).exists():
            shutil.copy(known / name, folder)
    return subprocess.CompletedProcess([], 0, "", "")


def _run_fork(folder: Path, gpu: Any, timeout: float) -> Any:
    process = forks().Process(target=_compile, args=(str(folder),))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise UserError(f"compiling for {gpu.name} took longer than {timeout:.0f} s.")
    log = folder / LOG
    stderr = log.read_text() if log.exists() else ""
    return subprocess.CompletedProcess([], process.exitcode, "", stderr)


def _compile(folder: str) -> None:
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(compile.main([folder]))
