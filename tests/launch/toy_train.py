"""Stands in for `qlora-jax train` in tests of launchers: same options and statuses.

    python toy_train.py train DIRECTORY/run.toml --mesh.coordinator HOST:PORT
      --mesh.processes N --mesh.process I

The processes meet in JAX's distributed runtime and add a number a step. Process 0 keeps
the sum in DIRECTORY/sum.json, where the next start continues. Files in DIRECTORY change
what happens: `kill-I` (process I kills itself in step 4, once), `refuse-I` (process I
ends with status 2), `wait` (step 4 begins when it is gone).
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

STEPS = 8


def main() -> None:
    """Adds up to step `STEPS`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["train"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--mesh.coordinator", dest="coordinator", required=True)
    parser.add_argument("--mesh.processes", dest="processes", type=int, required=True)
    parser.add_argument("--mesh.process", dest="process", type=int, required=True)
    args = parser.parse_args()
    directory = args.run.parent
    if (directory / f"refuse-{args.process}").exists():
        sys.exit(2)
    jax.distributed.initialize(
        args.coordinator, args.processes, args.process, initialization_timeout=60
    )
    note = directory / "sum.json"
    done, total = json.loads(note.read_text()) if note.exists() else (0, 0.0)
    with (directory / "starts.jsonl").open("a") as starts:
        row = {"process": args.process, "of": args.processes, "step": done}
        starts.write(json.dumps(row) + "\n")
    for step in range(done + 1, STEPS + 1):
        while step == 4 and (directory / "wait").exists():
            time.sleep(0.1)
        killed = directory / f"kill-{args.process}"
        if step == 4 and killed.exists():
            killed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        # Each process has its share of 1 / step.
        share = np.float32(1 / step / args.processes)
        total += float(multihost_utils.process_allgather(share).sum())
        if args.process == 0:
            partial = note.with_suffix(".partial")
            partial.write_text(json.dumps([step, total]))
            partial.replace(note)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"a process was lost: {error}", file=sys.stderr, flush=True)
        os._exit(75)
