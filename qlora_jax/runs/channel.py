"""Messages between the processes of a run, and the news that one of them has ended.

Process 0 runs a hub. Every process, process 0 too, has one connection to it, from
before JAX's runtime is started until the run ends:

  - No process starts JAX's runtime before all are there with the same count. It cannot
    say who is missing, and ends a process from C++.
  - Values are exchanged with a time limit, and who did not answer is named. No device
    is needed for it.
  - The operating system closes the connection of a process that dies, so the others
    know at once. JAX notices after the heartbeat limit, and then aborts the process;
    until then a step that needs the dead process hangs.

A message is a line of JSON with the field `kind`:

  to the hub     hello (process, processes, host, pid, version), round (number, stage,
                 limit, value), end (status, text), bye
  from the hub   members (members), round (number, values), stop (status, text)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from qlora_jax.errors import UserError, say
from qlora_jax.version import __version__

TRY_AGAIN = 75
"""Exit status of a failure that may pass (EX_TEMPFAIL): a launcher starts again."""

# An exchange that the hub leaves unanswered this long after its limit: process 0 hangs.
_SLACK_SECONDS = 30.0
# More than another thread needs to end the process.
_LEAVE_SECONDS = 60.0
# A dead host answers no probes: its connection is closed after 10 + 6 * 5 seconds.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 6,
    "TCP_USER_TIMEOUT": 40_000,
}
_RETRY_SECONDS = 0.25


class PeerError(UserError):
    """Another process of the run has ended, does not answer, or refuses this one.

    Args:
      message: which process, and what to do.
      status: exit status for this process: 2 for wrong settings, 75 for what may pass,
        else that of the process that ended.
    """

    def __init__(self, message: str, status: int = TRY_AGAIN):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Stop:
    """Why all processes must end."""

    status: int
    text: str


def leave_at_once(status: int, message: str | None = None) -> NoReturn:
    """Ends this process without waiting for anything.

    At an orderly exit JAX waits for all processes, also for dead ones.

    Args:
      status: the exit status.
      message: printed on stderr before.
    """
    if message is not None:
        say(message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def list_processes(indices: Sequence[int], members: Mapping[int, Any]) -> str:
    """Names processes with their hosts: "process 1 (node7)".

    Args:
      indices: of the processes.
      members: their hellos, as far as they came.
    """
    names = [
        f"{index} ({members[index]['host']})" if index in members else str(index)
        for index in indices
    ]
    if len(names) == 1:
        return f"process {names[0]}"
    return f"processes {', '.join(names[:-1])} and {names[-1]}"


def describe_lost(indices: Sequence[int], members: Mapping[int, Any]) -> str:
    """Says that processes ended without a word, and what to do."""
    name, one = list_processes(indices, members), len(indices) == 1
    return (
        f"{name[0].upper()}{name[1:]} {'was' if one else 'were'} lost: "
        f"{'it' if one else 'they'} ended without a word, by a kill, a crash or a host "
        "that is gone. The last lines of its output, or the scheduler's events (out of "
        "memory, preemption), say why. The run continues from its newest checkpoint "
        "when all processes are started again."
    )


def set_keepalive(connection: socket.socket) -> None:
    """Makes the system close a connection to a host that is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # the last is Linux's
        if option is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def encode(message: Mapping[str, Any]) -> bytes:
    """Returns a message as a line."""
    return json.dumps(message).encode() + b"\n"


class Channel:
    """A process's connection to the hub, which a thread reads.

    Args:
      connection: to the hub.
      hello: what this process says of itself.
      grace: seconds that the main thread has to notice a stop, by an exchange or by the
        failure of its step, before this process is ended. The main thread may wait for
        ever for a dead process.
      hub: that runs in this process.

    Raises:
      ConnectionError: the hub is not one of this library, or was closed.
      PeerError: the processes do not belong together, or did not all come.
    """

    def __init__(
        self,
        connection: socket.socket,
        hello: Mapping[str, Any],
        *,
        limit: float,
        grace: float = 5.0,
        hub: threading.Thread | None = None,
    ):
        self._socket, self.grace, self._hub = connection, grace, hub
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._results: dict[int, list[Any]] = {}
        self._rounds, self._closing, self._noticed = 0, False, False
        self._leaving, self._closed = threading.Lock(), threading.Event()
        self.stop: Stop | None = None
        """Why all processes must end, once one has."""
        self.cleanups: list[Callable[[], None]] = []
        """Called before this process ends without unwinding."""
        connection.settimeout(limit)
        self._send({"kind": "hello", "version": __version__, **hello})
        answer = self._read()
        if answer.get("kind") == "stop":
            self._lines.close()
            connection.close()
            raise PeerError(answer["text"], answer["status"])
        if answer.get("kind") != "members":
            raise ConnectionError("what answers there is not a run of qlora-jax")
        self.members: list[dict[str, Any]] = answer["members"]
        """The hello of every process."""
        connection.settimeout(None)
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def exchange(self, stage: str, value: Any, limit: float) -> list[Any]:
        """Returns the values of all processes, in their order.

        Every process calls it with the same stages in the same order.

        Args:
          stage: what is exchanged, for messages.
          value: of this process; what JSON can hold.
          limit: seconds in which all must have called it, from the first on.

        Raises:
          PeerError: a process has ended or did not answer.
        """
        number, self._rounds = self._rounds, self._rounds + 1
        self.raise_stop()
        message = {"number": number, "stage": stage, "limit": limit, "value": value}
        # The reading thread finds out why a hub is gone.
        with contextlib.suppress(OSError):
            self._send({"kind": "round", **message})
        with self._changed:
            answered = self._changed.wait_for(
                lambda: self.stop is not None or number in self._results,
                limit + _SLACK_SECONDS,
            )
            if not answered:
                name = list_processes([0], dict(enumerate(self.members)))
                text = f"{stage}: {name} did not answer within {limit:g} s."
                self.stop = Stop(TRY_AGAIN, text)
            # An answer counts that comes just before the end of another process: the
            # answer may say why.
            if number in self._results:
                return self._results.pop(number)
        self.raise_stop()
        raise AssertionError("no answer without a reason")

    def raise_stop(self) -> None:
        """Raises if the processes must end.

        Raises:
          PeerError: with the reason.
        """
        if self.stop is not None:
            self._noticed = True
            raise PeerError(self.stop.text, self.stop.status)

    def wait_for_stop(self, seconds: float) -> Stop | None:
        """Returns why the processes must end, as soon as it is known.

        Args:
          seconds: how long to wait for it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.stop is not None, seconds)
        self._noticed = self._noticed or self.stop is not None
        return self.stop

    def end(self, status: int, text: str) -> None:
        """Tells the other processes that this one ends, and why; they end too."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._send({"kind": "end", "status": status, "text": text})

    def wait_for_others(self) -> None:
        """Waits, in process 0, until the others have ended after a stop.

        JAX aborts those that are still there when its service in this process ends.
        """
        if self._hub is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._hub.join(4 * self.grace)

    def leave(self, status: int, text: str | None) -> NoReturn:
        """Ends this process after a stop, or after `end`; process 0 is the last.

        Args:
          status: the exit status.
          text: printed before.
        """
        if not self._leaving.acquire(blocking=False):
            time.sleep(_LEAVE_SECONDS)  # another thread is at it
        if text is not None:
            say(text)
        for cleanup in self.cleanups:
            with contextlib.suppress(OSError):
                cleanup()
        self.wait_for_others()
        leave_at_once(status)

    def close(self) -> None:
        """Leaves; the processes have agreed that the run has ended."""
        self._closing = True
        self._closed.set()
        with contextlib.suppress(OSError):
            self._send({"kind": "bye"})
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            self._socket.sendall(encode(message))

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
            message = json.loads(line) if line else None
        except ValueError:
            message = {}
        if message is None:
            raise ConnectionResetError("the connection was closed")
        return message if isinstance(message, dict) else {}

    def _listen(self) -> None:
        stop, grace = None, self.grace
        while stop is None:
            try:
                message = self._read()
            except OSError:
                # JAX's service was there too: JAX aborts this process in a moment.
                grace = 0.0
                text = describe_lost([0], dict(enumerate(self.members)))
                stop = Stop(TRY_AGAIN, text)
                break
            if message.get("kind") == "stop":
                stop = Stop(message["status"], message["text"])
            elif message.get("kind") == "round":
                with self._changed:
                    self._results[message["number"]] = message["values"]
                    self._changed.notify_all()
        if not self._closing:
            with self._changed:
                self.stop = self.stop or stop
                self._changed.notify_all()
            closed = self._closed.wait(grace)
            if not closed and not self._noticed:
                self.leave(self.stop.status, self.stop.text)
            # The main thread is on its way out, and may wait there.
            if not closed and not self._closed.wait(6 * self.grace):
                self.leave(self.stop.status, None)
        self._lines.close()
        self._socket.close()


def reach(
    host: str, port: int, hello: Mapping[str, Any], *, limit: float, grace: float = 5.0
) -> Channel:
    """Connects to the hub of process 0, which may start later than this process.

    Args:
      host: of process 0.
      port: that its hub listens on.
      hello: what this process says of itself.
      limit: seconds to try, and then to wait for the other processes.
      grace: as in `Channel`.

    Raises:
      PeerError: nobody answered, or the processes do not belong together.
    """
    deadline, reason = time.monotonic() + limit, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), min(5.0, left))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            set_keepalive(connection)
            try:
                # The hub knows who is missing: it gives up first.
                return Channel(connection, hello, limit=limit + 10, grace=grace)
            except OSError as error:
                reason = str(error)
                connection.close()
        time.sleep(min(_RETRY_SECONDS, max(0.0, left)))
    raise PeerError(
        f"Process {hello['process']} ({hello['host']}) did not reach process 0 at "
        f"`{host}:{port}` within {limit:g} s: {reason}. Expected a process 0 on the "
        "host that `mesh.coordinator` names, started at about the same time, and a "
        "port that no firewall closes. The output of process 0 says whether it started."
    )
