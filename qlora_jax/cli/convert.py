"""`qlora-convert`: adapters and checkpoints between formats, on the command line.

Exit status: 0 done, 1 a failure the user can fix (one paragraph on stderr), 2 wrong
usage, 130 or 143 interrupted or terminated (nothing half-written is left). Of `verify`,
as of diff: 0 the same, 1 different, 2 a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from qlora_jax.cli.main import Command, Program, dispatch
from qlora_jax.cli.output import leave, open_streams

QLORA_CONVERT = Program(
    name="qlora-convert",
    commands={
        "adapter": Command(
            summary="Check an adapter against its base and write a clean PEFT "
            "directory.",
            module="adapter",
        ),
        "combine": Command(
            summary="Make one adapter of the weighted sum of several.", module="combine"
        ),
        "merge": Command(
            summary="Merge an adapter into its base: a checkpoint that needs no PEFT.",
            module="merge",
        ),
        "model": Command(
            summary="Write a checkpoint in another dtype, in NF4, or dequantized.",
            module="model",
        ),
        "verify": Command(
            summary="Compare two adapters or two checkpoints tensor by tensor.",
            module="verify",
            failure=2,
        ),
    },
    stop_hint=" Nothing half-written is left.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `qlora-convert`; returns the exit status."""
    return dispatch(QLORA_CONVERT, sys.argv[1:] if argv is None else argv)


def entry() -> NoReturn:
    """The console script: runs one command and leaves with its status."""
    open_streams()
    leave(main())


if __name__ == "__main__":
    entry()
