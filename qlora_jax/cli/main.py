"""`qlora-jax`: train, evaluate, ask, inspect, plan, merge and quantize.

Exit status: 0 done, 1 a failure the user can fix (one paragraph on stderr), 2 wrong
usage, 130 interrupted, 143 terminated (a run that was training is saved then).
What a command reports goes to stdout, as a table or, with `--json`, as one JSON object;
progress goes to stderr.

A program is a table of commands. This module imports next to nothing, and a command's
module only when that command is chosen, so that `--help` and a typing error answer at
once.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from qlora_jax.cli.output import (
    STOPS,
    leave,
    open_streams,
    report_stop,
    signals_raise,
)
from qlora_jax.errors import UserError, did_you_mean, say

# What the system says of a path that a user gave; other failures are defects.
_REFUSED_BY_SYSTEM = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Where a command is implemented, and its line in the program's help."""

    summary: str
    """The first line of the command's own help."""
    module: str
    """Module of this package; imported when the command is chosen."""
    function: str = "main"
    """In that module: arguments -> exit status."""
    failure: int = 1
    """Exit status of a `UserError`."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A console script: a name and its commands."""

    name: str
    commands: Mapping[str, Command]
    stop_hint: str = ""
    """Printed after the name of a command that a signal has stopped."""

    def usage(self) -> str:
        """Returns the text of `--help`."""
        rows = "".join(
            f"  {name:<10}{command.summary}\n"
            for name, command in self.commands.items()
        )
        return (
            f"usage: {self.name} COMMAND ...\n\ncommands:\n{rows}\n"
            f"`{self.name} COMMAND --help` lists the options of a command."
        )


QLORA_JAX = Program(
    name="qlora-jax",
    commands={
        "train": Command(
            summary="Fine-tune a model, or continue a run.", module="train"
        ),
        "eval": Command(
            summary="Measure loss and perplexity on a data file or held-out examples.",
            module="eval",
        ),
        "generate": Command(
            summary="Continue prompts; prompt and continuation go to stdout.",
            module="generate",
        ),
        "chat": Command(
            summary="Chat with a model in the terminal.",
            module="generate",
            function="chat",
        ),
        "data": Command(
            summary="Show what a run would train on: tokens, labels, lengths.",
            module="data",
        ),
        "report": Command(
            summary="Write an HTML page about a run, finished or under way.",
            module="report",
        ),
        "inspect": Command(
            summary="Count what a run trains and stores; reads configurations only.",
            module="inspect",
        ),
        "plan": Command(
            summary="Plan the memory of a run on a GPU; reads no weights and no data.",
            module="plan",
        ),
        "merge": Command(
            summary="Merge an adapter into its base: a checkpoint that needs no PEFT.",
            module="merge",
            function="main_of_qlora_jax",
        ),
        "quantize": Command(
            summary="Quantize a checkpoint to a bitsandbytes-4bit directory (NF4).",
            module="quantize",
        ),
        "tokens": Command(
            summary="Find untrained rows of the vocabulary; repair them; add tokens.",
            module="tokens",
        ),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `qlora-jax`; returns the exit status."""
    return dispatch(QLORA_JAX, sys.argv[1:] if argv is None else argv)


def entry() -> NoReturn:
    """The console script: runs one command and leaves with its status."""
    open_streams()
    leave(main())


def dispatch(program: Program, argv: Sequence[str]) -> int:
    """Imports the module of the chosen command and runs it.

    Args:
      program: the table of commands.
      argv: name of a command, and its arguments.

    Returns:
      The exit status.
    """
    name, *args = argv or [""]
    title = f"{program.name} {name}"
    try:
        if name in ("-h", "--help"):
            print(program.usage())
            return 0
        command = program.commands.get(name)
        if command is None:
            print(f"{_unknown(program, name)}{program.usage()}", file=sys.stderr)
            return 2
        with signals_raise():
            return _run(command, title, args)
    except STOPS as error:
        return report_stop(title, error, program.stop_hint)


def _run(command: Command, title: str, args: Sequence[str]) -> int:
    try:
        module = importlib.import_module(f"qlora_jax.cli.{command.module}")
        return getattr(module, command.function)(args)
    except UserError as error:
        say(f"{title}: {error}")
        return command.failure if error.status is None else error.status
    except OSError as error:
        if error.errno not in _REFUSED_BY_SYSTEM:
            raise
        # Without a name it is an open file or stream that takes no more.
        where = "its output" if error.filename is None else f"`{error.filename}`"
        say(f"{title}: {where}: {error.strerror}.")
        return command.failure
    except UnicodeEncodeError as error:
        # A name that is not UTF-8, or a locale that is not; else it is a defect.
        bad = error.object[error.start : error.end]
        say(
            f"{title}: {ascii(bad)[:40]} in {ascii(error.object)[:80]} cannot be "
            f"written as {error.encoding}. Names of files and other text must be "
            "UTF-8: rename what is not, or set a UTF-8 locale (LC_ALL=C.UTF-8)."
        )
        return command.failure
    except SystemExit as error:  # how tyro ends, for --help and for wrong usage
        return error.code if isinstance(error.code, int) else 2


def _unknown(program: Program, name: str) -> str:
    """Returns the paragraph about a command that does not exist."""
    if not name:
        return ""
    hint = did_you_mean(name, program.commands)
    return f"{program.name}: no command {name!r}.{hint}\n\n"
