"""Kills training runs on purpose and checks that they continue.

    python scripts/kill_runs chain read.toml answer.toml --output chain.json
    python scripts/kill_runs storm run.toml --kills 50 --every 1

`chain` trains one run file after the other with `qlora-jax train`. Each process is
killed (SIGKILL) halfway through its steps, and the same command continues the run;
`--no-kill` trains without interruption. A later run starts from an earlier one where
its file names it (`train.adapter_init`). The table at the end shows for each run the
trained parameters before and after, the first and the last loss (on held-out data too,
if the run has some), after which step it was killed and from which it continued.

`storm` trains a run once without interruption, then a second time in another directory,
where each process is ended by a signal: some before training starts, most while it
trains and writes checkpoints. Each next process continues. At the end the adapter, the
optimizer's moments and the losses of all steps are compared, bit for bit; the exit
status is 1 if they differ. With `--signal TERM` each process is asked to stop and must
print the command that continues the run, which starts the next process. `--every 1`
writes a checkpoint at each step, so that most signals meet one. With `--calls` each
process is killed at one of its operations on files of the run (opening, making,
renaming, deleting), from the first to the last, or with a number N at every N-th: just
before it, or within the next milliseconds, while the file is written. `--fork` starts
processes as forks of one that has imported everything but has touched no device, which
saves the seconds that importing takes; otherwise each is started as a user starts it.
With `--processes 2` two processes train together, one of them is killed, and the other
must end with status 75 (give each its devices: JAX_NUM_CPU_DEVICES=4).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # if not installed

from qlora_jax.errors import UserError
from scripts.kill_runs.chain import chain
from scripts.kill_runs.storm import storm


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("chain", help="several runs, each killed halfway")
    c.set_defaults(run=chain)
    c.add_argument("files", nargs="+", type=Path, help="run files, in order")
    c.add_argument("--no-kill", action="store_true", help="train without interruption")
    c.add_argument("--output", type=Path, help="JSON file to write")
    s = commands.add_parser("storm", help="one run, killed again and again")
    s.set_defaults(run=storm)
    s.add_argument("config", type=Path, help="run file; its output_dir is not used")
    s.add_argument("--kills", type=int, default=50)
    s.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    s.add_argument("--every", type=int, help="steps between checkpoints")
    s.add_argument("--seed", type=int, default=0)
    s.add_argument(
        "--calls",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="kill at every N-th operation on files",
    )
    s.add_argument("--fork", action="store_true", help="import once, then fork")
    s.add_argument("--processes", type=int, default=1, help="that train together")
    s.add_argument("--directory", type=Path, help="to work in; default temporary")
    s.add_argument("--verbose", action="store_true")
    s.add_argument("--json", action="store_true", help="print the figures as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    if args.command == "storm" and args.processes > 1:
        if args.fork or args.calls or args.signal != "KILL":
            p.error("--processes goes with neither --fork, --calls nor --signal TERM")
    try:
        return args.run(args)
    except UserError as error:
        print(f"kill_runs {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
