"""Which process of a run this is: from settings, or from Slurm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qlora_jax.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Which process this is."""

    host: str
    """Of process 0, for the others."""
    port: int
    count: int
    index: int


def place_problems(
    coordinator: str | None, processes: int | None, process: int | None
) -> Iterator[str]:
    """Yields what is wrong with the settings that say which process this is.

    Args:
      coordinator: as of `connect`, like the others.
      processes: how many.
      process: which.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 or (processes == 1 and not process):
        return
    if missing:
        yield (
            f"{_listed(given.keys() - set(missing))} given, and {_listed(missing)} "
            "missing. Several processes need all three: the address of process 0 "
            '(`coordinator`, "host:port"), how many there are (`processes`), and which '
            "one this is (`process`, from 0). In a job step of Slurm (srun) leave out "
            "all three."
        )
        return
    assert coordinator is not None and processes is not None and process is not None
    if processes < 1 or not 0 <= process < processes:
        yield (
            f"`process` must be from 0 to `processes` - 1, got process = {process} "
            f"with processes = {processes}."
        )
    host, port = _split(coordinator)
    is_host = re.fullmatch(r"[\w.:%-]+", host)
    if not is_host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        yield (
            "`coordinator` must be the host and port of process 0, such as "
            f'"node1:3579", got {coordinator!r}.'
        )


def find_place(
    coordinator: str | None, processes: int | None, process: int | None
) -> Place | None:
    """Finds out which process this is; None = the only one.

    Args:
      coordinator: as of `connect`, like the others.
      processes: how many.
      process: which.

    Raises:
      UsageError: incomplete or contradictory settings.
    """
    for problem in place_problems(coordinator, processes, process):
        raise UsageError(f"mesh: {problem}")
    if processes == 1:
        return None
    if coordinator is None or processes is None or process is None:
        return _slurm_place()
    host, port = _split(coordinator)
    return Place(host, int(port), processes, process)


def _split(coordinator: str) -> tuple[str, str]:
    host, _, port = coordinator.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _slurm_place() -> Place | None:
    """Returns this task's place in a job step of Slurm with several tasks."""
    # A batch script, or a shell of salloc, is in a job of several tasks without being
    # one of them: the step counts.
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS") or "1")
    if count == 1:
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    absent = [name for name in names if name not in os.environ]
    if absent:
        raise UsageError(
            f"A job step of Slurm with {count} tasks lacks {', '.join(absent)} in its "
            "environment. Give `mesh.coordinator`, `mesh.processes` and "
            "`mesh.process`."
        )
    index, nodes, job = (os.environ[name] for name in names)
    # "node7", "node[3-5,7],other", "node[3,5]-ib", "rack[1-2]n[3-4]": of each bracket
    # the first, and then what comes before a comma.
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).partition(",")[0]
    # Above the ports that Linux gives to connections; steps of a job differ.
    step = int(os.environ.get("SLURM_STEP_ID", "0"))
    return Place(host, 61440 + (int(job) + step) % 4096, count, int(index))
