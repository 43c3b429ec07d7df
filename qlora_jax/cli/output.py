"""What a command prints, and how its process ends.

A report goes to stdout: in two columns for people, or with `--json` as one object with
every digit. `console` and `print_report` import rich when they are called, because
`qlora-jax --help` goes without it.

Until a command begins its work, SIGINT and SIGTERM end the process at once, so that no
signal is lost, or becomes a traceback, inside an import:

    exit_on_signals("qlora-jax")    in the console script, before large imports
    with signals_raise(): ...       around the work, which cleans up after itself
    leave(status)                   at the end
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_jax.runs.interruption import SIGNALS, AtOnce

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
      run: does the work, with signals that raise; returns the report.
      as_json: print the report as a JSON object.
      show: prints it for people; default `print_report`.

    Returns:
      The exit status, 0.
    """
    with signals_raise():
        report = run()
        if as_json:
            print(json.dumps(report))
        else:
            (show or print_report)(report)
    return 0


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
            yield f"{indent}{key}", ""
            yield from _rows(value, f"{indent}  ")
        else:
            yield f"{indent}{key}", format_value(value)


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
        pairs = (f"{key} {format_value(entry)}" for key, entry in value.items())
        return ", ".join(pairs) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value)) or "none"
    return str(value)


def print_note(text: str) -> None:
    """Prints a note on stderr."""
    print(f"Note: {text}.", file=sys.stderr)


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
    """SIGTERM, where `signals_raise` is in force."""


STOPS = (KeyboardInterrupt, Terminated, BrokenPipeError)
"""What ends a command from outside; a broken pipe: the reader of stdout has gone."""

_RAISED_BY = {
    KeyboardInterrupt: signal.SIGINT,
    AtOnce: signal.SIGINT,
    Terminated: signal.SIGTERM,
}
_RESEND_SECONDS = 0.02


def exit_on_signals(program: str) -> None:
    """Makes SIGINT and SIGTERM end the process, with a line on stderr.

    Signals that are ignored, as SIGINT is under a shell's `&`, stay ignored.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == handler:
            signal.signal(number, _Exit(program))


class _Exit:
    """A signal handler that ends the process.

    An exception would not do: libraries catch what is raised while they are imported,
    and Python only reports what is raised in a callback.
    """

    def __init__(self, program: str):
        self._program = program

    def __call__(self, number: int, _frame: Any) -> NoReturn:
        how = "interrupted" if number == signal.SIGINT else "terminated"
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self._program}: {how}.\n".encode())
        os._exit(128 + number)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated`, as Ctrl-C raises `KeyboardInterrupt`.

    So what a command has begun to write is removed. Nothing changes outside the main
    thread, or for a signal that has a handler of someone else's.

    Where a handler raises within a callback of the garbage collector or a `__del__`,
    Python reports the exception and goes on. Such a signal is sent once more.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    report = sys.unraisablehook
    changed = []
    try:
        if isinstance(before.get(signal.SIGINT), _Exit):
            changed.append(signal.SIGINT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        terminate = before.get(signal.SIGTERM)
        if isinstance(terminate, _Exit) or terminate == signal.SIG_DFL:
            changed.append(signal.SIGTERM)
            signal.signal(signal.SIGTERM, _terminate)
            sys.unraisablehook = _resend_or(report)
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
        sys.unraisablehook = report


def _resend_or(report: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a hook that sends a signal again whose exception was lost."""

    def hook(unraisable: Any) -> None:
        number = _RAISED_BY.get(unraisable.exc_type)
        if number is None:
            report(unraisable)
            return
        # Not at once: that would be within the same callback.
        again = threading.Timer(_RESEND_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    return hook


def _terminate(_number: int, _frame: Any) -> NoReturn:
    raise Terminated


def report_stop(command: str, error: BaseException, hint: str = "") -> int:
    """Prints on stderr which of `STOPS` ended a command; returns its exit status."""
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        return 1
    how = "terminated" if isinstance(error, Terminated) else "interrupted"
    if isinstance(error, AtOnce):
        how = "ended at once"
    print(f"{command}: {how}.{hint}", file=sys.stderr)
    return 128 + _RAISED_BY[type(error)]


def leave(status: int) -> NoReturn:
    """Ends the process; at once where a signal has ended the work.

    Threads of the compiler may still run then, which crash (a segmentation fault) in an
    orderly shutdown, and threads that write a checkpoint would be waited for.
    """
    if status in (128 + number for number in SIGNALS):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
