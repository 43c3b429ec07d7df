"""The hub that process 0 runs, which passes messages between the processes of a run.

`qlora_jax.runs.channel` has the other end, the messages, and why they exist.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.runs.channel import (
    TRY_AGAIN,
    Stop,
    describe_lost,
    encode,
    list_processes,
    set_keepalive,
)
from qlora_jax.version import __version__

# Deaths within this time have one cause, such as a switch, and are named together.
_TOGETHER_SECONDS = 0.3
# After a stop the hub waits this long for the processes to leave.
_LINGER_SECONDS = 60.0
# A process that takes no message for so long is as good as dead.
_SEND_SECONDS = 60.0
# A stranger sends no hello: this many bytes of a line tell.
_HELLO_BYTES = 4096


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket for the connections of all processes.

    Like JAX's own service it trusts the network: whoever can reach the port can end the
    run, but messages are data and never code.

    Args:
      host: name of this host for the others. One of the loopback is bound as it is;
        else every interface is, since a name may be that of a forwarding service.
      port: to listen on.

    Raises:
      OSError: the port is taken, or may not be used.
    """
    if _is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
        )
    return socket.create_server(("", port), backlog=512)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(eq=False)
class _Connection:
    """The hub's end of a connection."""

    socket: socket.socket
    index: int | None = None
    """None before its hello."""
    received: bytearray = field(default_factory=bytearray)

    def read_lines(self) -> Iterator[dict[str, Any]]:
        """Yields the messages that arrived.

        Raises:
          ConnectionError: the connection was closed.
          ValueError: what arrived is not a message.
        """
        chunk = self.socket.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError
        self.received += chunk
        if self.index is None and len(self.received) > _HELLO_BYTES:
            raise ValueError("not a hello")
        *lines, rest = self.received.split(b"\n")
        self.received = bytearray(rest)
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not a message")
            yield message


@dataclass
class _Round:
    """An exchange that not all have joined."""

    stage: str
    deadline: float
    limit: float
    values: dict[int, Any] = field(default_factory=dict)


class Hub(threading.Thread):
    """Passes messages between the processes, in a thread of process 0.

    Args:
      listener: of `listen`; closed when all have come, so that JAX's service can use
        the port.
      count: processes of the run.
      limit: seconds within which all must come.
    """

    def __init__(self, listener: socket.socket, count: int, limit: float):
        super().__init__(name="hub of the processes", daemon=True)
        self._listener, self._count, self._limit = listener, count, limit
        self._connections: list[_Connection] = []
        self._members: dict[int, dict[str, Any]] = {}
        """Hellos by process."""
        self._left: set[int] = set()
        self._lost: list[int] = []
        self._reason: Stop | None = None
        self._rounds: dict[int, _Round] = {}
        self._deadline = time.monotonic() + limit
        """Of what the hub waits for, apart from rounds."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        # Process 0's own connection needs no address.
        self.first, inner = socket.socketpair()
        self._own = self._add(inner)

    def run(self) -> None:
        """Serves until every process has left."""
        try:
            while any(c.index is not None or c is self._own for c in self._connections):
                for key, _ in self._selector.select(self._seconds_left()):
                    if key.data is None:
                        self._accept()
                    else:
                        self._receive(key.data)
                if not self._check_deadlines():
                    break
        finally:
            self._close_listener()
            for connection in list(self._connections):
                self._drop(connection)
            self._selector.close()

    def _gathering(self) -> bool:
        return len(self._members) < self._count

    def _waits(self) -> bool:
        return bool(self._gathering() or self._lost or self._reason)

    def _seconds_left(self) -> float | None:
        deadlines = [r.deadline for r in self._rounds.values()]
        if self._waits():
            deadlines.append(self._deadline)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _check_deadlines(self) -> bool:
        """Acts on deadlines that have passed; returns False when the hub is to end."""
        now = time.monotonic()
        if self._waits() and now >= self._deadline:
            if self._reason is not None:
                return False
            if self._lost:
                text = describe_lost(sorted(self._lost), self._members)
                self._stop_all(TRY_AGAIN, text)
            else:
                absent = [i for i in range(self._count) if i not in self._members]
                self._stop_all(
                    TRY_AGAIN,
                    f"Expected {self._count} processes within {self._limit:g} s; "
                    f"{list_processes(absent, {})} did not come. Each process is "
                    "started with its own `mesh.process`, from 0 to "
                    f"{self._count - 1}, and the same `mesh.coordinator`. The output "
                    "of the missing ones says what keeps them.",
                )
        for round_ in [] if self._reason else list(self._rounds.values()):
            if now >= round_.deadline:
                absent = [i for i in range(self._count) if i not in round_.values]
                self._stop_all(
                    TRY_AGAIN,
                    f"{round_.stage}: {list_processes(absent, self._members)} did not "
                    f"answer within {round_.limit:g} s, and the others wait. The run "
                    "continues from its newest checkpoint when all processes are "
                    "started again.",
                )
        return True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            connection, _ = self._listener.accept()
            set_keepalive(connection)
            self._add(connection)

    def _add(self, connection: socket.socket) -> _Connection:
        connection.settimeout(_SEND_SECONDS)
        entry = _Connection(connection)
        self._connections.append(entry)
        self._selector.register(connection, selectors.EVENT_READ, entry)
        return entry

    def _receive(self, connection: _Connection) -> None:
        if connection not in self._connections:  # dropped in this turn of the loop
            return
        try:
            for message in connection.read_lines():
                self._take(connection, message)
        except (OSError, ValueError, KeyError, TypeError):
            self._lose(connection)

    def _lose(self, connection: _Connection) -> None:
        """Drops a connection that was closed or is broken."""
        self._drop(connection)
        index = connection.index
        if index is not None and index not in self._left and self._reason is None:
            if not self._lost:
                self._deadline = time.monotonic() + _TOGETHER_SECONDS
            self._lost.append(index)

    def _take(self, connection: _Connection, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if connection.index is None:
            if kind != "hello":
                raise ValueError("not a hello")
            self._welcome(connection, message)
        elif kind == "round":
            self._join(connection.index, message)
        elif kind == "end":
            name = list_processes([connection.index], self._members)
            name, text = f"{name[0].upper()}{name[1:]}", message["text"]
            # Where the text says already who it is.
            text = text if text.startswith(name) else f"{name} ended: {text}"
            self._left.add(connection.index)
            self._drop(connection)
            self._stop_all(message["status"], text)
        elif kind == "bye":
            self._left.add(connection.index)

    def _welcome(self, connection: _Connection, hello: dict[str, Any]) -> None:
        index, count = hello["process"], hello["processes"]
        if self._reason is not None:
            connection.index = index
            self._send(connection, {"kind": "stop", **vars(self._reason)})
            return
        problem = None
        if hello["version"] != __version__:
            problem = (
                f"Process {index} ({hello['host']}) has version {hello['version']} of "
                f"qlora-jax, and process 0 has {__version__}. Install the same on "
                "every host."
            )
        elif count != self._count:
            problem = (
                f"Process {index} ({hello['host']}) was started with `mesh.processes` "
                f"= {count}, and process 0 with {self._count}. All need the same."
            )
        elif index in self._members:
            hosts = (self._members[index], hello)
            who = " and ".join(f"{h['host']} (pid {h['pid']})" for h in hosts)
            problem = (
                f"Two processes say that they are process {index} of {count}: on "
                f"{who}. Each needs its own `mesh.process`, from 0 to {count - 1}."
            )
        # A process that is refused hears it too, and is not missed after.
        connection.index = index if problem is None else -1
        if problem is not None:
            self._left.add(-1)
            self._stop_all(2, problem)
            return
        self._members[index] = hello
        if not self._gathering():
            self._close_listener()
            for other in list(self._connections):
                if other.index is None:  # a stranger
                    self._drop(other)
            members = [self._members[i] for i in range(self._count)]
            self._send_all({"kind": "members", "members": members})

    def _join(self, index: int, message: dict[str, Any]) -> None:
        number, stage, limit = message["number"], message["stage"], message["limit"]
        round_ = self._rounds.setdefault(
            number, _Round(stage, time.monotonic() + limit, limit)
        )
        if round_.stage != stage:
            self._stop_all(
                1,
                f"The processes are not at the same place: process {index} at "
                f"{stage!r}, others at {round_.stage!r}. They run different code or "
                "took different decisions, which is a defect of qlora-jax.",
            )
            return
        round_.values[index] = message["value"]
        if len(round_.values) == self._count:
            del self._rounds[number]
            values = [round_.values[i] for i in range(self._count)]
            self._send_all({"kind": "round", "number": number, "values": values})

    def _stop_all(self, status: int, text: str) -> None:
        if self._reason is None:
            self._reason = Stop(status, text)
            self._deadline = time.monotonic() + _LINGER_SECONDS
            self._rounds.clear()
            self._close_listener()
            self._send_all({"kind": "stop", "status": status, "text": text})

    def _send_all(self, message: Mapping[str, Any]) -> None:
        for connection in list(self._connections):
            if connection.index is not None:
                self._send(connection, message)

    def _send(self, connection: _Connection, message: Mapping[str, Any]) -> None:
        try:
            connection.socket.sendall(encode(message))
        except OSError:
            self._lose(connection)

    def _close_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()
