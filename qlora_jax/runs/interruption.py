"""Signals that ask a run to stop: it stops between two steps, with everything saved.

    with Interruption() as interruption:
        for batch in batches:
            state = step(state, batch)
            if interruption.signal is not None:
                save(state)
                break

A handler only takes a note, because Python may call it between any two instructions;
the loop looks at the note where stopping is safe. The handlers exist inside the `with`
block alone, and only in the main thread, where Python allows them: a run that a
notebook server starts in another thread goes on as if this module did not exist.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

# Both ask for an end: schedulers send the first, Ctrl-C the second.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AtOnce(KeyboardInterrupt):
    """Someone asked again while the run was being saved, and does not want to wait."""


class Interruption:
    """Notes SIGTERM and SIGINT while its `with` block runs.

    The first signal is noted in `signal`. A second one is answered with a line that
    says what the process is doing. A third one, or a second SIGINT, raises `AtOnce`.
    A signal that is ignored, as SIGINT under a shell's `&`, stays ignored; handlers
    that were not set from Python are left alone.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal, such as "SIGTERM"; None before."""
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Sets the handlers, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        except BaseException:  # one that came between the two
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        """Puts back the handlers that were there."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _frame: Any) -> None:
        self._received.append(number)
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal = name
            _tell(f"{name}: the step under way is finished, then the run is saved.")
        elif len(self._received) > 2 or self._received == [signal.SIGINT] * 2:
            raise AtOnce(name)
        else:
            _tell(
                f"{name}: the run is being saved already. Once more ends it at once; "
                "it then continues from the checkpoint before."
            )


def _tell(text: str) -> None:
    """Writes a line to stderr from a handler.

    Python's own stream refuses to be entered twice, and may be in use just now.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
