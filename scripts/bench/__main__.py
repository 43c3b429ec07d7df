"""Measures the parts of a run on a CPU.

    python scripts/bench cpu compare --peer-python .venv-peer/bin/python
    python scripts/bench data DATA.jsonl --tokenizer DIR --completion '{answer}'
    python scripts/bench adapter llama-3.1-8b/config.json
    python scripts/bench checkpoint llama-3.1-8b/config.json
    python scripts/bench logging --output benchmarks/logging.json
    python scripts/bench windows --output benchmarks/windows.json
    python scripts/bench commands --output benchmarks/commands.json

`python scripts/bench COMMAND --help` describes a command and its options.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = {
    "cpu": "cpu",
    "data": "data",
    "adapter": "adapter",
    "checkpoint": "checkpoint",
    "logging": "logging_cost",
    "windows": "windows",
    "commands": "commands",
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=MODULES)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    module = importlib.import_module(f"scripts.bench.{MODULES[args.command]}")
    return module.main(args.options)


if __name__ == "__main__":
    # The repository in place of this folder, whose modules have common names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
