"""Measures this machine's GPU: kernels, attention, and a model's speed.

    python scripts/bench_gpu kernels --quick --budget 300
    python scripts/bench_gpu attention --budget 900
    python scripts/bench_gpu model decode --size 8b --batch 1 --context 1024
    python scripts/bench_gpu model train --size 8b --batch 4 --length 2048

`python scripts/bench_gpu COMMAND --help` describes a command and its options. Without a
GPU each prints why, writes nothing and ends with status 1: its figures mean nothing
elsewhere.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("kernels", "attention", "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="bench_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    return importlib.import_module(f"scripts.bench_gpu.{args.command}").main(
        args.options
    )


if __name__ == "__main__":
    # The repository in place of this folder: transformers would take `kernels.py` here
    # for the package `kernels`.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
