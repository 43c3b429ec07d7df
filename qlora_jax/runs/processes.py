"""The processes of a run, one a host with all its GPUs.

    with connect(coordinator, processes, process) as peers:
        peers.agree({"settings": ..., "versions": ...})
        with peers.together("reading the data"):
            data = read()                  # one fails: all raise
        start = peers.on_first("choosing a checkpoint", newest)

Process 0 decides, and the others take its decisions. A run of one process does none of
this: `peers` answers at once, and JAX's distributed runtime is not started.

What ends one process ends all, with one message in each: a failure in `together` or of
the block is told to the others; a process that dies closes its connection, and the
others leave within seconds, also from a step that waits for it. Exit status 2 stands
for wrong settings, 75 for what may pass when all processes are started again.

All stop after the same step if each puts its flag into the step (`stop_flags`) and acts
on the sum, which is the same on all:

    metrics["stopping"] = flags.sum()      # in the jitted step
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.errors import UsageError, UserError, say
from qlora_jax.runs.channel import (
    TRY_AGAIN,
    Channel,
    PeerError,
    Stop,
    leave_at_once,
    list_processes,
    reach,
)
from qlora_jax.runs.hub import Hub, listen
from qlora_jax.runs.interruption import RunInterrupted
from qlora_jax.runs.place import Place, find_place

T = TypeVar("T")

HEARTBEAT_SECONDS = 60
"""JAX aborts a process that hears nothing of another for so long."""
# What one process does while the others wait: reading a large base from a slow disk.
_WORK_SECONDS = 3600.0
# A value that every process has at hand.
_ANSWER_SECONDS = 300.0
# In which the others hear that, and why, the processes do not belong together.
_REFUSAL_SECONDS = 20.0
# Words of errors of a collective operation that another process did not take part in.
_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (closed|reset)|broken pipe|coordination service|heartbeat|"
    r"collective|\bpeer\b|socket closed",
    re.I,
)


class Peers:
    """The processes of this run, seen from one of them.

    Attributes:
      index: of this process, from 0.
      count: of processes.
    """

    def __init__(self, place: Place | None = None, channel: Channel | None = None):
        self.index = 0 if place is None else place.index
        self.count = 1 if place is None else place.count
        self._channel = channel

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes and decides."""
        return self.index == 0

    def name(self, *indices: int) -> str:
        """Names processes with their hosts, by default this one."""
        members = (
            {} if self._channel is None else dict(enumerate(self._channel.members))
        )
        return list_processes(indices or [self.index], members)

    def gather(
        self, value: Any, stage: str = "gather", limit: float | None = None
    ) -> Any:
        """Returns the values of all processes, on each of them.

        Args:
          value: of this process; what JSON can hold.
          stage: what is gathered, for messages.
          limit: seconds in which all must call it, from the first on; default 300.

        Returns:
          A list by process.

        Raises:
          PeerError: a process has ended, or did not call it.
        """
        if self._channel is None:
            return [value]
        limit = _ANSWER_SECONDS if limit is None else limit
        return self._channel.exchange(stage, value, limit)

    def broadcast(
        self, value: T, stage: str = "broadcast", limit: float | None = None
    ) -> T:
        """Returns process 0's value on all processes; arguments as of `gather`.

        Raises:
          PeerError: a process has ended, or did not call it.
        """
        return self.gather(value if self.is_first else None, stage, limit)[0]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Checks that all processes have the same facts.

        Args:
          facts: name -> value, such as a hash.

        Raises:
          UsageError: they differ; the same message on all processes.
        """
        everyone = self.gather(dict(facts), "comparing the processes")
        problems = []
        for name in dict.fromkeys(name for each in everyone for name in each):
            by_value: dict[str, list[int]] = {}
            for index, each in enumerate(everyone):
                by_value.setdefault(str(each.get(name, "nothing")), []).append(index)
            if len(by_value) > 1:
                values = "; ".join(
                    f"{value} on {self.name(*indices)}"
                    for value, indices in by_value.items()
                )
                problems.append(f"{name}: {values}")
        if problems:
            raise UsageError(
                f"The {self.count} processes of this run differ. "
                f"{'. '.join(problems)}. Start the same command, with the same "
                "packages, files and GPUs, on every host."
            )

    @contextlib.contextmanager
    def together(self, stage: str, limit: float | None = None) -> Iterator[None]:
        """Waits for all processes after the block; if it failed on one, all raise.

        Args:
          stage: what is done in the block, for messages ("reading the data").
          limit: seconds in which all must have done it, from the first on; default
            3,600.

        Raises:
          UserError: the block's own, or one that says which other process had which.
            Any other exception of the block is raised where it came, and a `UserError`
            on the others.
          PeerError: a process has ended, or did not answer.
        """
        if self._channel is None:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except PeerError:  # the others have it too
            raise
        except Exception as error:
            failure = error
        limit = _WORK_SECONDS if limit is None else limit
        outcome = None
        if failure is not None:
            outcome = {"status": _exit_status(failure), "text": _describe(failure)}
        self._raise_first(stage, failure, self.gather(outcome, stage, limit))

    def on_first(
        self, stage: str, compute: Callable[[], T], limit: float | None = None
    ) -> T:
        """Returns on all processes what process 0 computes; if it fails, all raise.

        Args:
          stage: what is done, for messages.
          compute: called in process 0 alone; returns what JSON can hold.
          limit: seconds in which it must be done; default 3,600.

        Raises:
          UserError: as `together`.
        """
        value: Any = None
        with self.together(stage, limit):
            if self.is_first:
                value = compute()
        return self.broadcast(value, stage)

    def _raise_first(
        self, stage: str, failure: Exception | None, outcomes: list[Any]
    ) -> None:
        if failure is not None:
            raise failure
        failed = {i: outcome for i, outcome in enumerate(outcomes) if outcome}
        if not failed:
            return
        texts: dict[str, list[int]] = {}
        for index, outcome in failed.items():
            texts.setdefault(outcome["text"], []).append(index)
        message = " ".join(
            f"{stage} failed on {self.name(*indices)}: {text}"
            for text, indices in texts.items()
        )
        statuses = [outcome["status"] for outcome in failed.values()]
        raise PeerError(message[0].upper() + message[1:], max(statuses))

    def explain(self, error: BaseException, step: int | None = None) -> Stop | None:
        """Says which process is to blame for the failure of a step.

            except Exception as error:
                stop = peers.explain(error, step)
                if stop is None:
                    raise
                peers.leave(stop.status, stop.text)

        Args:
          error: that the step raised.
          step: its number.

        Returns:
          One message with an exit status, or None if nothing points to another process:
          the error is this process's own.
        """
        if self._channel is None:
            return None
        communication = _COMMUNICATION.search(str(error))
        # A closed connection is known at once, and a silent host after 40 seconds.
        stop = self._channel.wait_for_stop(45.0 if communication else 2.0)
        at = "" if step is None else f"Step {step}: "
        if stop is not None:
            return Stop(stop.status, at + stop.text)
        if communication is None:
            return None
        reason = str(error).strip().split("\n")[0][:300]
        return Stop(
            TRY_AGAIN,
            f"{at}{self.name()} could not exchange data with the others, and none of "
            f"them is known to have ended: {reason}. It may be the network. The "
            "run continues from its newest checkpoint when all are started again.",
        )

    def before_leaving(self, cleanup: Callable[[], None]) -> None:
        """Has a function called if this process ends without unwinding."""
        if self._channel is not None:
            self._channel.cleanups.append(cleanup)

    def leave(self, status: int, text: str) -> NoReturn:
        """Ends this process at once, and all others with the same status.

        Args:
          status: of this process, and of others that have no reason of their own.
          text: why; printed here, and by the others as what ended this one.
        """
        if self._channel is None:
            leave_at_once(status, text)
        self._channel.end(status, text)
        self._channel.leave(status, text)


def stop_flags(mesh: Mesh, stopping: bool) -> jax.Array:
    """Returns the flags of all processes, one for each device.

    Every process calls it before the same step, with a flag of its own, and the sum in
    the step is above 0 on all processes if one wants to stop.

    Args:
      mesh: of the step, over the devices of all processes.
      stopping: whether this process wants to stop.

    Returns:
      int32 [devices], divided over all axes of the mesh.
    """
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.full(1, stopping, np.int32)
    )


@contextlib.contextmanager
def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300.0,
) -> Iterator[Peers]:
    """Connects the processes of a run and starts JAX's distributed runtime.

    Without settings, a job step of Slurm with several tasks says which process this is;
    anything else is one process, for which nothing is started. All GPUs that a process
    sees are its own.

    A process can do this once. If the block raises, the others end as well, and this
    process ends at its exit without waiting for them.

    Args:
      coordinator: "host:port" of process 0, the same for all.
      processes: how many there are.
      process: index of this one, from 0.
      timeout: seconds in which all must come.

    Raises:
      UsageError: settings that are incomplete, or differ between the processes.
      PeerError: a port in use, a process that does not come or cannot be reached.
    """
    place = find_place(coordinator, processes, process)
    if place is None:
        yield Peers()
        return
    began = time.monotonic()
    say(
        f"Process {place.index} of {place.count} on {socket.gethostname()}: waiting "
        f"for the others at {place.host}:{place.port}, at most {timeout:g} s."
    )
    hub, channel = _open(place, timeout)
    if place.index:
        say("All processes are here; process 0 says what the run does.")
    peers = Peers(place, channel)
    interrupted = None
    try:
        _start_jax(place, max(10.0, began + timeout - time.monotonic()))
        peers.gather(None, "starting JAX", timeout)
        try:
            yield peers
        except RunInterrupted as error:  # after the same step on all, and all is saved
            interrupted = error
        # Others may wait long for process 0, which writes and publishes.
        peers.gather(None, "the end of the run", _WORK_SECONDS)
        jax.distributed.shutdown()
        channel.close()
    except BaseException as error:
        status = _exit_status(error)
        # An exit in the middle is no success of the others.
        channel.end(status or 1, _describe(error))
        channel.wait_for_others()
        # JAX's own exit would wait for all processes. This comes before it.
        atexit.register(leave_at_once, status)
        raise
    if hub is not None:
        hub.join(10)
    if interrupted is not None:
        raise interrupted


def _exit_status(error: BaseException) -> int:
    """Returns the exit status of a process that an exception ends."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    if isinstance(error, SystemExit):
        return (
            error.code if isinstance(error.code, int) else int(error.code is not None)
        )
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if not isinstance(error, Exception):  # how the command line raises SIGTERM
        return 128 + signal.SIGTERM
    return 1


def _describe(error: BaseException) -> str:
    """Returns what other processes say of an exception."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}. Its output has the traceback."
    # A signal, or an exit. `RunInterrupted` says what is saved.
    if str(error):
        return str(error)
    status = _exit_status(error)
    if status - 128 in (signal.SIGINT, signal.SIGTERM):
        return f"stopped by {signal.Signals(status - 128).name}."
    return f"exit status {status}."


def _open(place: Place, timeout: float) -> tuple[Hub | None, Channel]:
    """Connects this process to the hub, which process 0 starts."""
    hello = {
        "process": place.index,
        "processes": place.count,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    if place.index:
        return None, reach(place.host, place.port, hello, limit=timeout)
    try:
        listener = listen(place.host, place.port)
    except OSError as error:
        raise PeerError(
            f"Process 0 cannot listen on port {place.port}: "
            f"{error.strerror or error}. Another program has it, or a run that is "
            "still ending. Choose another port in `mesh.coordinator`, for all "
            "processes."
        ) from error
    hub = Hub(listener, place.count, timeout)
    hub.start()
    try:
        # The hub gives up first, and says why.
        return hub, Channel(hub.first, hello, limit=timeout + 10, hub=hub)
    except PeerError:
        # To the others as well, as long as this process lives.
        hub.join(_REFUSAL_SECONDS)
        raise


def _start_jax(place: Place, timeout: float) -> None:
    """Starts JAX's distributed runtime; all processes are there."""
    # It would take SIGTERM from the handlers of `interruption`, in C++.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            f"[{place.host}]:{place.port}"
            if ":" in place.host
            else f"{place.host}:{place.port}",
            place.count,
            place.index,
            # Slurm's detection would leave each process one GPU.
            cluster_detection_method="deactivate",
            initialization_timeout=round(timeout),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise PeerError(f"JAX's distributed runtime did not start: {error}") from error
    except RuntimeError as error:  # of JAX's Python: it is too late
        raise UserError(
            "A run on several processes must be the first to use JAX in each of them, "
            f"and the only one: {error}"
        ) from error
