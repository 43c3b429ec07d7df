"""Failures that a user can cause and fix, and what is printed about them.

`UserError` is such a failure; any other exception is a defect of this library. The
command line prints a `UserError` as one paragraph and exits with status 1, or 2 if it
is a `UsageError`; every other exception keeps its traceback.

Someone who fixes a run file or a data file wants to see every mistake at once:
`Problems` collects them while checking goes on, and raises them as one error.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

# At this many problems checking stops, so that a file of millions of bad rows fails
# fast; a message lists fewer, and of rows with the same problem fewer still.
_LIMIT = 100
_SHOWN = 20
_SHOWN_ROWS = 5
# "train.jsonl:12: the problem", or "data.parquet row 12: the problem".
_ROW_PROBLEM = re.compile(
    r"(?P<file>.+?)(?P<separator>:| row )(?P<row>\d+): (?P<problem>.*)", re.S
)


class UserError(ValueError):
    """A value, file or setting that a user gave cannot be used.

    The message says what was expected, what came, and what to do next.

    Args:
      message: the complete message.
      problems: the problems it lists, where there are several; each is a sentence that
        can be read on its own.
    """

    status: int | None = None
    """Exit status of a command that it ends; None = 1, or what the command says."""

    def __init__(self, message: str, problems: Iterable[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class UsageError(UserError):
    """A command line is wrong: an option that does not exist, or one out of place."""

    status = 2


class CheckpointError(UserError):
    """A checkpoint, adapter or tokenizer on disk is missing, damaged or not understood.

    The message names the file, and the tensor or field in it.
    """


class Problems:
    """Collects problems and raises them as one error.

    Args:
      subject: what the problems are with ("the data"), for the first line of a list.
    """

    def __init__(self, subject: str | None = None):
        self._subject = subject
        self._messages: list[str] = []
        self._first: UserError | None = None

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, problem: UserError | str, prefix: str = "") -> None:
        """Adds a problem, or all those of an error; one that was added before is not.

        Args:
          problem: a sentence, or an error with one or several.
          prefix: starts each message.

        Raises:
          UserError: it is the hundredth.
        """
        messages = (problem,) if isinstance(problem, str) else problem.problems
        # If it stays the only one, it is raised itself, with its class and its cause.
        if isinstance(problem, UserError) and not (self._messages or prefix):
            self._first = problem
        for message in messages:
            if prefix + message in self._messages:
                continue
            self._messages.append(prefix + message)
            if len(self._messages) >= _LIMIT:
                self.raise_if_any(stopped_early=True)

    @contextlib.contextmanager
    def collecting(self, prefix: str = "") -> Iterator[None]:
        """Adds a `UserError` that is raised inside, and continues after the block.

        Args:
          prefix: starts each message.
        """
        try:
            yield
        except UserError as error:
            self.add(error, prefix)

    def raise_if_any(self, *, stopped_early: bool = False) -> None:
        """Raises the collected problems; does nothing if there are none.

        Args:
          stopped_early: there may be further problems that were not looked for.

        Raises:
          UserError: the first twenty as a list. A single error is raised as it is, so
            that its class and cause are kept.
        """
        count = len(self._messages)
        if self._first is not None and count == len(self._first.problems):
            raise self._first
        if count == 1:
            raise UserError(self._messages[0])
        if count:
            groups = group_rows(self._messages)
            lines = [f"- {message}" for message, _ in groups[:_SHOWN]]
            rest = sum(number for _, number in groups[_SHOWN:])
            if rest:
                lines.append(f"- and {rest} more of this kind or another")
            at_least = "at least " if stopped_early else ""
            subject = f" with {self._subject}" if self._subject else ""
            raise UserError(
                f"{at_least}{count} problems{subject}:\n" + "\n".join(lines),
                self._messages,
            )


def raise_problems(subject: str, problems: Iterable[str], prefix: str = "") -> None:
    """Raises these problems as one error; does nothing if there are none.

    Args:
      subject: what they are with, for the first line of a list.
      problems: sentences.
      prefix: starts each message.
    """
    collected = Problems(subject)
    for problem in problems:
        collected.add(problem, prefix)
    collected.raise_if_any()


def group_rows(messages: Iterable[str]) -> list[tuple[str, int]]:
    """Joins messages about several rows with the same problem; counts each group."""
    groups: dict[Any, list[str]] = {}
    for message in messages:
        match = _ROW_PROBLEM.fullmatch(message)
        # Messages that differ in the row number alone are one line of the list.
        key = match.group("file", "separator", "problem") if match else message
        groups.setdefault(key, []).append(match["row"] if match else "")
    joined = []
    for key, rows in groups.items():
        if isinstance(key, str):
            joined.append((key, 1))
            continue
        file, separator, problem = key
        listed, more = ", ".join(rows[:_SHOWN_ROWS]), len(rows) - _SHOWN_ROWS
        listed += f" and {more} more" if more > 0 else ""
        joined.append((f"{file}{separator}{listed}: {problem}", len(rows)))
    return joined


def did_you_mean(names: str | Iterable[str], known: Iterable[str]) -> str:
    """Suggests known names close to unknown ones.

    Args:
      names: a name that is not known, or several.
      known: the names that are.

    Returns:
      A sentence with a space before it, or "" where no known name is close.
    """
    import difflib  # 15 ms, for a message that is rarely needed

    names, known = [names] if isinstance(names, str) else names, list(known)
    close = {m for name in names for m in difflib.get_close_matches(name, known, n=1)}
    if not close:
        return ""
    return f" Did you mean {', '.join(f'`{name}`' for name in sorted(close))}?"


def readable_bytes(nbytes: float) -> str:
    """Formats a size in units of 1e9 or 1e6 bytes."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"


def counted(number: int, noun: str) -> str:
    """Formats a number of things: "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


# Control characters except tab and newline, line and paragraph separators, bidi marks
# (which let text read otherwise than it is stored), and surrogates (JSON allows them,
# UTF-8 does not).
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Replaces characters that a terminal or a browser obeys or hides by [U+XXXX].

    Whatever comes from a file goes through it before it is shown.

    >>> visible("\x1b[31mred")
    '[U+001B][31mred'
    """
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


# Of the thread, and of those that copy its context.
_QUIET: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Lets `say` print nothing inside, where another process says the same."""
    token = _QUIET.set(wanted)
    try:
        yield
    finally:
        _QUIET.reset(token)


def say(text: str) -> None:
    """Prints a message on stderr: on a terminal, broken at words to its width.

    A file gets whole lines, which can be searched. Characters that a terminal would
    obey are shown by their code points. What cannot be printed (the reader has gone,
    the disk with the log is full) is lost: the work is worth more than its messages.
    """
    if _QUIET.get() or sys.stderr is None:  # the process was started without one
        return
    text = visible(text)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(_wrap(line, width) for line in text.split("\n"))
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _wrap(line: str, width: int) -> str:
    """Breaks a line at words; what follows an indent or a bullet is indented like it.

    A command to copy stays in one line.
    """
    indent = len(line) - len(line.lstrip(" ").removeprefix("- "))
    if len(line) <= width or indent >= 4:
        return line
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
