"""What a command prints, and how its process ends.

A report goes to stdout: in two columns for people, or with `--json` as one object with
every digit. `console` and `print_report` import rich when they are called, because
`qlora-jax --help` goes without it.

    with signals_raise(): ...     around all of a command, its imports included
    report_stop(name, error)      what to print, and the exit status
    open_streams(), leave(status) begin and end the process
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from qlora_jax.errors import UserError, say, visible
from qlora_jax.runs import SIGNALS, AtOnce

if TYPE_CHECKING:
    from rich.console import Console

# Columns of a line where output is piped: programs that read it want whole lines.
_UNLIMITED = 100_000

# --- Reports ---


def run_and_print(
    run: Callable[[], Mapping[str, Any]],
    *,
    as_json: bool,
    show: Callable[[Any], None] | None = None,
) -> int:
    """Runs a command and prints its report.

    Args:
      run: does the work; returns the report.
      as_json: print the report as a JSON object.
      show: prints it for people; default `print_report`.

    Returns:
      The exit status, 0.
    """
    report = run()
    with _to_stdout():
        if as_json:
            print(json.dumps(report))
        else:
            (show or print_report)(report)
    return 0


def print_text(text: str, end: str = "\n") -> None:
    """Prints text of a model or a user on stdout, at once.

    A file or another program gets it as it is. On a terminal, characters that it would
    obey are shown by their code points.
    """
    with _to_stdout():
        print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


@contextlib.contextmanager
def _to_stdout() -> Iterator[None]:
    """Raises where stdout takes no more what is printed within.

    Raises:
      UserError: the disk with the file is full, for example.
      BrokenPipeError: the reader has gone, which is no failure.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"Its output cannot be written to stdout: {error.strerror or error}. The "
            "work is done; what was to be printed is lost."
        ) from error


def print_report(report: Mapping[str, Any]) -> None:
    """Prints a report in two columns; nested entries are indented."""
    from rich.table import Column, Table

    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for row in _rows(report):
        table.add_row(*row)
    printer = console()
    with printer.capture() as capture:
        printer.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())  # rich fills the last column with spaces


def _rows(report: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        if isinstance(value, Mapping) and value:
            yield visible(f"{indent}{key}"), ""
            yield from _rows(value, f"{indent}  ")
        else:
            yield visible(f"{indent}{key}"), format_value(value)


def format_value(value: Any) -> str:
    """Formats a value for people: six digits, "-" for None, "none" for an empty list.

    >>> format_value({"r": 1234, "bias": None, "on": True})
    'r 1,234, bias -, on yes'
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        pairs = (f"{visible(key)} {format_value(v)}" for key, v in value.items())
        return ", ".join(pairs) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value)) or "none"
    return visible(str(value))


def print_note(text: str) -> None:
    """Prints a note on stderr."""
    say(f"Note: {text}.")


def console() -> Console:
    """Returns a console for stdout that prints names as they are, piped ones unbroken.

    A tensor's name may hold "[/b]" or ":x:", which rich would read as markup.
    """
    from rich.console import Console

    printer = Console(markup=False, emoji=False, highlight=False)
    if printer.is_terminal:
        return printer
    return Console(markup=False, emoji=False, highlight=False, width=_UNLIMITED)


# --- The end of a process ---


class Terminated(BaseException):
    """SIGTERM within `signals_raise`."""


STOPS = (KeyboardInterrupt, Terminated, BrokenPipeError)
"""What ends a command from outside; a broken pipe: the reader of stdout has gone."""

_RAISED_BY = {
    KeyboardInterrupt: signal.SIGINT,
    AtOnce: signal.SIGINT,
    Terminated: signal.SIGTERM,
}
_RESEND_SECONDS = 0.02


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated`, as Ctrl-C raises `KeyboardInterrupt`.

    So what a command has begun to write is removed. Nothing changes outside the main
    thread, or for a signal that is ignored or has a handler of someone else's.

    An exception can be lost: a library may catch it while it is imported, or turn it
    into an ImportError or a crash, and in a callback of the garbage collector or a
    `__del__` Python reports it and goes on. So a signal waits for the end of an import
    (a second one does not), and one whose exception was lost is sent once more.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {
            # Only Python's defaults are replaced, never a handler that the caller
            # installed.
            number: signal.getsignal(number)
            for number in SIGNALS
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        }
    report = sys.unraisablehook
    handlers = [_RaisingHandler(number) for number in before]
    try:
        for handler in handlers:
            signal.signal(handler.number, handler)
        if before:
            sys.unraisablehook = _resend_or(report)
        yield
    finally:
        for number, default in before.items():
            signal.signal(number, default)
        sys.unraisablehook = report
        for handler in handlers:
            handler.raise_deferred()


class _RaisingHandler:
    """Raises for a signal, at once or after the import that is under way."""

    def __init__(self, number: int):
        self.number = number
        self._deferred = self._resent = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal from outside, or one that `_resend` sent."""
        resent, self._resent = self._resent, False
        # An exception inside an import may be swallowed, and would leave a module that
        # is only half there.
        if _is_importing(frame):
            if self._deferred and not resent:
                with contextlib.suppress(OSError):
                    os.write(2, b"\nEnded during an import.\n")
                os._exit(128 + number)
            self._deferred = True
            _call_soon(self._resend)
            return
        self._deferred = True
        self.raise_deferred()

    def raise_deferred(self) -> None:
        """Raises if a signal came that has not raised yet."""
        if self._deferred:
            self._deferred = False
            raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated

    def _resend(self) -> None:
        if self._deferred:
            self._resent = True
            os.kill(os.getpid(), self.number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _call_soon(function: Callable[..., None], *args: Any) -> None:
    """Calls a function in another thread, when this handler or callback has ended."""
    timer = threading.Timer(_RESEND_SECONDS, function, args)
    timer.daemon = True
    timer.start()


def _resend_or(report: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a hook that sends a signal again whose exception was lost."""

    def hook(unraisable: Any) -> None:
        number = _RAISED_BY.get(unraisable.exc_type)
        if number is None:
            report(unraisable)
        else:
            _call_soon(os.kill, os.getpid(), number)

    return hook


def report_stop(command: str, error: BaseException, hint: str = "") -> int:
    """Prints on stderr which of `STOPS` ended a command; returns its exit status."""
    if isinstance(error, BrokenPipeError):
        return 1
    how = "terminated" if isinstance(error, Terminated) else "interrupted"
    if isinstance(error, AtOnce):
        how = "ended at once"
    say(f"{command}: {how}.{hint}")
    # As shells report a process that a signal ended.
    return 128 + _RAISED_BY[type(error)]


def open_streams() -> None:
    """Prepares the standard streams of a process, before it opens any file.

    Those that it was started without are opened: else the next file would get the
    number of stderr, and what a library prints would be written into it. What the
    encoding of stdout lacks is written as an escape, and bytes of stdin that are not
    text arrive as half surrogate pairs, which are refused where they are used.
    """
    closed = [
        name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None
    ]
    for name in closed:
        # The lowest number that is free: that of the stream.
        handle = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(handle, True)
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(handle, mode, encoding="utf-8", closefd=False))
    for name, errors in (("stdin", "surrogateescape"), ("stdout", "backslashreplace")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)
    if "stdout" in closed:
        say("Note: stdout is closed: what this command reports is not shown.")


def _flush(stream: TextIO) -> OSError | None:
    """Flushes a stream; where that fails, what it holds is dropped.

    Python flushes once more at exit, and would complain in its own words.
    """
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def leave(status: int) -> NoReturn:
    """Ends the process; at once where a signal has ended the work.

    Threads of the compiler may still run then, which crash (a segmentation fault) in an
    orderly shutdown, and threads that write a checkpoint would be waited for.
    """
    error = _flush(sys.stdout)
    if error is not None and status == 0:
        status = 1
        if not isinstance(error, BrokenPipeError):
            say(f"The output cannot be written to stdout: {error.strerror}.")
    _flush(sys.stderr)  # what cannot be said is lost, as in `say`
    if status in (128 + number for number in SIGNALS):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
