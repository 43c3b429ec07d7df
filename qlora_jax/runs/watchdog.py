"""Ends a process whose step hangs, so that a launcher starts all of them again.

    with Watchdog(peers.name(), leave=peers.leave) as watchdog:
        for step, batch in enumerate(batches, 1):
            ...                                  # take the step
            watchdog.reset(step)
            with watchdog.paused("saving"):
                save()

A process that is stuck, in a network or a driver, still answers JAX's heartbeats, and
the others wait in their step for ever.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

from qlora_jax.runs.channel import TRY_AGAIN, leave_at_once

# Steps whose times make the median.
_TIMES = 64


class Watchdog:
    """Ends this process, with status 75, when a step takes far too long.

    A thread watches while the `with` block runs. The limit is the larger of a minimum
    and a multiple of the median time of the last steps.

    Args:
      name: of this process, for the message.
      minimum: seconds.
      factor: multiple of the median.
      leave: ends the process; called with the status and the message.
    """

    def __init__(
        self,
        name: str,
        *,
        minimum: float = 300.0,
        factor: float = 10.0,
        leave: Callable[[int, str], object] = leave_at_once,
    ):
        self._name, self._minimum, self._factor = name, minimum, factor
        self._leave = leave
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._changed = threading.Condition()
        self._began, self._step = time.monotonic(), 0
        self._doing: str | None = None
        self._limit: float | None = minimum
        """Of what is under way; None = it may take as long as it wants."""
        self._ended = False
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def __enter__(self) -> Watchdog:
        """Starts watching: the first step begins now."""
        self._start(None, self.limit)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends watching."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def limit(self) -> float:
        """Seconds that the next step may take."""
        if not self._times:
            return self._minimum
        return max(self._minimum, self._factor * statistics.median(self._times))

    def reset(self, step: int) -> None:
        """Notes that a step is done, and that the next one begins.

        Args:
          step: its number.
        """
        self._times.append(time.monotonic() - self._began)
        self._step = step
        self._start(None, self.limit)

    @contextlib.contextmanager
    def paused(self, doing: str, limit: float | None = None) -> Iterator[None]:
        """Does not count the block as a part of the step; the next step begins after.

        Args:
          doing: what is done, for the message ("saving").
          limit: seconds that it may take; None = any time.
        """
        self._start(doing, limit)
        try:
            yield
        finally:
            self._start(None, self.limit)

    def _start(self, doing: str | None, limit: float | None) -> None:
        with self._changed:
            self._began, self._doing, self._limit = time.monotonic(), doing, limit
            self._changed.notify_all()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left = None
                if self._limit is not None:
                    left = self._began + self._limit - time.monotonic()
                    if left <= 0:
                        break
                self._changed.wait(left)
            if self._ended:
                return
            message = self._message()
        self._leave(TRY_AGAIN, message)

    def _message(self) -> str:
        doing = self._doing or f"step {self._step + 1}"
        return (
            f"{self._name[0].upper()}{self._name[1:]}: {doing} is not done after "
            f"{self._limit:,.0f} s, and the process ends. Another process, the network "
            "or the GPU is stuck: the hosts' system logs (Xid, NVLink, InfiniBand) may "
            "say which. The run continues from its newest checkpoint when all "
            "processes are started again."
        )
