"""The failures a user can cause and mend, and how several are said at once.

Anything else that is raised is a defect of this library. The command line prints these
as one paragraph and exits with status 1; every other exception keeps its traceback.

Who mends a run file or a data file wants the list, not its first entry: what is wrong
is written down (`Problems`), the rest is looked at all the same, and all of it is
refused at the end.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_LIMIT = 100
_SHOWN = 20
# Rows that are named where several have the same problem.
_ROWS = 5
# "train.jsonl:12: what is wrong", or "data.parquet row 12: ...".
_OF_A_ROW = re.compile(
    r"(?P<file>.+?)(?P<between>:| row )(?P<row>\d+): (?P<what>.*)", re.S
)


class UserError(ValueError):
    """A value, file or setting the user gave cannot be used.

    The message says what was expected, what came, and what to do next.

    Args:
      message: all of it.
      problems: the things that are wrong one by one, where the message lists several;
        each can be read without the others.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class CheckpointError(UserError):
    """A checkpoint, adapter or tokenizer on disk is missing, damaged or not understood.

    The message names the file, and the tensor or field in it.
    """


class Problems:
    """Collects what is wrong; `refuse` raises it as one error.

    Args:
      of: what the problems are with; in front of a list of them.
    """

    def __init__(self, of: str | None = None):
        self._of = of
        self._messages: list[str] = []
        self._first: UserError | None = None

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, problem: UserError | str, where: str = "") -> None:
        """Writes a problem, or all those of an error, down; each once.

        Args:
          problem: a sentence, or an error with one or several.
          where: goes in front of each.

        Raises:
          UserError: it is the hundredth; a file with that many is not read to its end.
        """
        found = (problem,) if isinstance(problem, str) else problem.problems
        if isinstance(problem, UserError) and not (self._messages or where):
            self._first = problem
        for message in found:
            if where + message in self._messages:
                continue
            self._messages.append(where + message)
            if len(self._messages) >= _LIMIT:
                self.refuse(more=True)

    @contextlib.contextmanager
    def collected(self, where: str = "") -> Iterator[None]:
        """Writes down what is raised inside, and goes on after it.

        Args:
          where: goes in front of each problem.
        """
        try:
            yield
        except UserError as error:
            self.add(error, where)

    def refuse(self, *, more: bool = False) -> None:
        """Raises what was written down, if anything was.

        Args:
          more: reading stopped early, so there may be further problems.

        Raises:
          UserError: the one problem, or error, as it is, or a list of the first twenty.
        """
        count = len(self._messages)
        if self._first is not None and count == len(self._first.problems):
            raise self._first
        if count == 1:
            raise UserError(self._messages[0])
        if count:
            found = _grouped(self._messages)
            lines = [f"- {message}" for message, _ in found[:_SHOWN]]
            rest = sum(number for _, number in found[_SHOWN:])
            if rest:
                lines.append(f"- and {rest} more of this kind or another")
            at_least = "at least " if more else ""
            of = f" with {self._of}" if self._of else ""
            raise UserError(
                f"{at_least}{count} problems{of}:\n" + "\n".join(lines), self._messages
            )


def _grouped(messages: Iterable[str]) -> list[tuple[str, int]]:
    """Messages that say the same of several rows as one, with their number."""
    groups: dict[Any, list[str]] = {}
    for message in messages:
        match = _OF_A_ROW.fullmatch(message)
        key = (match["file"], match["between"], match["what"]) if match else message
        groups.setdefault(key, []).append(match["row"] if match else "")
    found = []
    for key, rows in groups.items():
        if isinstance(key, str):
            found.append((key, 1))
            continue
        file, between, what = key
        some, more = ", ".join(rows[:_ROWS]), len(rows) - _ROWS
        listed = some + (f" and {more} more" if more > 0 else "")
        found.append((f"{file}{between}{listed}: {what}", len(rows)))
    return found


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raises what is wrong in one place as one error, if anything is.

    Args:
      where: the place, in a word or two; the message starts with it.
      problems: sentences.

    Raises:
      UserError: the one problem, or a list of them.
    """
    found = list(problems)
    if len(found) == 1:
        raise UserError(f"{where}: {found[0]}")
    if found:
        lines = "".join(f"\n- {problem}" for problem in found)
        raise UserError(
            f"{where}: {len(found)} problems:{lines}",
            [f"{where}: {problem}" for problem in found],
        )


def readable_bytes(nbytes: float) -> str:
    """A size for people, in units of 1e9 or 1e6 bytes."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"


def say(text: str) -> None:
    """Tells the person who started the run."""
    print(text, file=sys.stderr, flush=True)
