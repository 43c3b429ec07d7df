"""Trains on a Ray cluster, one process a node, and restarts them when one is lost.

    python launch/ray_train.py RUN.toml --nodes 2 [-- OPTIONS]

Ray Train starts a worker on each node and reserves the node's GPUs for it. Each worker
runs, as a child process,

    qlora-jax train RUN.toml OPTIONS --mesh.coordinator HOST:PORT --mesh.processes N
      --mesh.process I

where HOST is the node of worker 0. A child process has an exit status, which says what
to do next; it may end at once when another one is lost; and its main thread gets
signals, while Ray calls the training function in another thread. Ray's `JaxTrainer`
starts JAX inside the worker, so it is not used.

    status                   what happens
    0 on all nodes           ends, status 0
    1, 2: an error           ends on all nodes at once, with that status
    75, a signal, a lost     all processes are ended and started again, at most
    node                     --max-failures times (a preempted node does not count)

The run continues from its newest checkpoint, so its output directory and all paths in
RUN.toml must be on storage that every node has. Relative paths are relative to the
directory in which this program is started.

The environment of every node has qlora-jax and `ray[train]` 2.60 (`make ray`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

# Exit statuses of `qlora-jax train`: it failed or cannot use what it was given; another
# process was lost.
ERRORS, LOST = (1, 2), 75
# Becomes the command in argv[2:], after asking the kernel to kill it when the thread
# that started it ends: a worker that Ray kills must not leave a process on the GPUs.
# The worker may have ended before the request. 1 is PR_SET_PDEATHSIG.
CHILD = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, signal.SIGKILL) != 0 or os.getppid() != int(sys.argv[1]):
    sys.exit("The Ray worker that started this process has ended.")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


def coordinator_address() -> str:
    """Returns HOST:PORT of this node, with a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = ray.util.get_node_ip_address()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def train_on_node(config: dict[str, Any]) -> None:
    """Runs one process of the training, in a Ray worker.

    Args:
      config: "command", the words of `qlora-jax train` without the options of the mesh,
        and "directory", the working directory.

    Raises:
      OSError: the directory is not on this node.
      CalledProcessError: the process ended with another status than 0.
    """
    context = ray.train.get_context()
    # A new address for every start, also after a failure: all workers call this.
    address = broadcast_from_rank_zero(coordinator_address())
    command = [
        *config["command"],
        *("--mesh.coordinator", address),
        *("--mesh.processes", str(context.get_world_size())),
        *("--mesh.process", str(context.get_world_rank())),
    ]
    print(f"Starting {shlex.join(command)}", flush=True)
    watched = [sys.executable, "-c", CHILD, str(os.getpid()), *command]
    status = subprocess.call(watched, cwd=config["directory"])
    if status != 0:
        raise subprocess.CalledProcessError(status, command)


def is_final(error: Exception) -> bool:
    """Returns whether a worker failed in a way that another start would repeat."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode in ERRORS
    return isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError)


class EndOnError(UserCallback):
    """Ends the run, in place of a restart, when a process fails by itself.

    Ray Train restarts after every exception of a worker, but not after one of a
    callback.
    """

    def after_exception(
        self, run_context: Any, worker_exceptions: dict[int, Exception]
    ) -> None:
        """Raises an error that is final; Ray calls this before it decides."""
        for _, error in sorted(worker_exceptions.items()):
            if is_final(error):
                raise error


def exit_status(failure: TrainingFailedError) -> int:
    """Returns the status for the failure of a run: that of a process, if one has it."""
    if isinstance(failure, ControllerError):
        errors = [failure.controller_failure]
        while isinstance(errors[0], ControllerError):
            errors = [errors[0].controller_failure]
    else:
        errors = list(getattr(failure, "worker_failures", {}).values())
    statuses = [
        error.returncode
        for error in errors
        if isinstance(error, subprocess.CalledProcessError)
    ]
    if not statuses:
        return 1 if isinstance(failure, ControllerError) else LOST
    # The process that was killed, before those that then missed it.
    status = next((status for status in statuses if status != LOST), LOST)
    return 128 - status if status < 0 else status


def gpus_per_node() -> int:
    """Returns the number of GPUs of each node of the cluster, 0 if there are none.

    Raises:
      SystemExit: nodes have different numbers of GPUs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counts = {int(resources.get("GPU", 0)) for resources in nodes} - {0}
    if len(counts) > 1:
        raise SystemExit(
            f"The nodes of this Ray cluster have {sorted(counts)} GPUs. Every process "
            "must have as many as the others: say how many with --gpus-per-node."
        )
    return counts.pop() if counts else 0


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        description="Trains on a Ray cluster, one process a node.",
        epilog="What follows -- is passed on to `qlora-jax train`.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN.toml", type=Path, help="the run file")
    parser.add_argument("--nodes", type=int, required=True, help="number of processes")
    parser.add_argument(
        "--min-nodes",
        type=int,
        help="train on fewer nodes, at least this many, while others are missing",
    )
    parser.add_argument(
        "--gpus-per-node", type=int, help="default: all; 0 trains on the CPU"
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=10,
        help="restarts after a process was lost (a preempted node does not count)",
    )
    parser.add_argument(
        "--program", default="qlora-jax", help="the program, as every node finds it"
    )
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse takes no positional arguments after options.
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end], argparse.Namespace(options=words[end + 1 :]))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on the cluster of RAY_ADDRESS or of this machine; returns the status."""
    args = read_arguments(argv)
    if not args.run.is_file():
        print(f"There is no run file `{args.run}`.", file=sys.stderr)
        return 2
    ray.init()
    gpus = gpus_per_node() if args.gpus_per_node is None else args.gpus_per_node
    nodes = (args.min_nodes, args.nodes) if args.min_nodes else args.nodes
    command = [*shlex.split(args.program), "train", str(args.run), *args.options]
    trainer = DataParallelTrainer(
        train_on_node,
        train_loop_config={"command": command, "directory": str(Path.cwd())},
        scaling_config=ScalingConfig(
            num_workers=nodes,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1},
            placement_strategy="STRICT_SPREAD",
        ),
        run_config=RunConfig(
            failure_config=FailureConfig(max_failures=args.max_failures),
            callbacks=[EndOnError()],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as failure:
        print(f"The run ended: {failure}", file=sys.stderr)
        return exit_status(failure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
