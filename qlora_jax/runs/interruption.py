"""Stops a run on a signal: between two steps, with everything saved.

    with Interruption() as interruption:
        for batch in batches:
            state = step(state, batch)
            if interruption.signal is not None:
                save(state)
                break

A handler only takes a note, because Python may call it between any two instructions;
the loop reads the note where stopping is safe. The handlers exist only inside the
`with` block and only in the main thread, where Python allows them: a run that a
notebook server starts in another thread handles no signals.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Requests to end: schedulers send the first, Ctrl-C the second.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AtOnce(KeyboardInterrupt):
    """The user signalled again during the save, and does not want to wait for it."""


class RunInterrupted(KeyboardInterrupt):
    """A signal stopped a run between two steps; everything up to there is saved.

    Not an error of the run, so `except Exception` lets it pass, and what follows an
    unfinished run is not done: the next cell of a notebook, the next line of a script.

    Attributes:
      signal: "SIGTERM" or "SIGINT".
      step: steps taken.
      steps: steps of the whole run.
      command: continues the run, with the options that say which process this is; so
        does the same call of `run`.
      status: exit status of a process that a signal ended (143 or 130).
    """

    def __init__(
        self,
        name: str,
        step: int,
        steps: int,
        settings: Path,
        options: Sequence[str] = (),
    ):
        self.signal, self.step, self.steps = name, step, steps
        self.command = shlex.join(["qlora-jax", "train", str(settings), *options])
        self.status = 128 + signal.Signals[name]
        super().__init__(
            f"stopped by {name} after step {step} of {steps}; everything is saved. To "
            f"continue:\n\n    {self.command}"
        )


class Interruption:
    """Notes SIGTERM and SIGINT while its `with` block runs.

    The first signal is noted in `signal`. A second one prints what the process is
    doing. A third one, or a second SIGINT, raises `AtOnce`. A signal that is ignored,
    as SIGINT under a shell's `&`, stays ignored; handlers that were not set from Python
    are not replaced.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal, such as "SIGTERM"; None before."""
        self._received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Sets the handlers, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            for number in SIGNALS:
                previous = signal.getsignal(number)
                # `getsignal` returns None for a handler that C code installed.
                if previous is not None and previous != signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        except BaseException:  # a signal between the two
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        """Restores the previous handlers."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _frame: Any) -> None:
        self._received.append(number)
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal = name
            _print(f"{name}: the step under way is finished, then the run is saved.")
        elif len(self._received) > 2 or self._received == [signal.SIGINT] * 2:
            raise AtOnce(name)
        else:
            _print(
                f"{name}: the run is being saved already. Once more ends it at once; "
                "it then continues from the checkpoint before."
            )


def _print(text: str) -> None:
    """Writes a line to stderr from a handler.

    sys.stderr is not reentrant, and the interrupted code may be using it.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
