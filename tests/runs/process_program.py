"""Toy runs of several processes: steps over all devices, and one process that fails.

Reads one run a line, `PROCESSES CASE PORT`, forks its processes, and prints their
[exit status, stderr] as a line of JSON. JAX is imported once.

Process 1 is the one that fails, or process 0 where the case ends in "_first". A process
prints what it comes to, and ends like the command line does.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.errors import UserError, say
from qlora_jax.runs.interruption import Interruption, RunInterrupted
from qlora_jax.runs.processes import connect, stop_flags
from qlora_jax.runs.watchdog import Watchdog

jax.config.update("jax_num_cpu_devices", 2)


@jax.jit
def step(x, flags):
    """Sums over all devices: 1 on each, for ever."""
    return x * 0 + x.sum() / x.size, flags.sum()


def fail(case):
    """Fails in the way of the case."""
    if case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if case == "stuck":
        time.sleep(100)
    if case == "defect":
        raise LookupError("a defect")


def take_steps(peers, case):
    """Takes steps until a process wants to stop."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.ones(1, np.float32)
    )
    x, _ = step(x, stop_flags(mesh, False))
    # The one that waits for the stuck one ends; both limits would pass together.
    limit = 1.5 if case == "wait" else 300.0
    with (
        Interruption() as interruption,
        Watchdog(peers.name(), minimum=limit, leave=peers.leave) as watchdog,
    ):
        for number in range(1, 9):
            try:
                if number == 3:
                    fail(case)
                x, stopping = step(x, stop_flags(mesh, interruption.signal is not None))
                stopping = stopping.item()
            except Exception as error:
                stop = peers.explain(error, number)
                if stop is None:
                    raise
                peers.leave(stop.status, stop.text)
            watchdog.reset(number)
            if stopping:
                break
    value = x.addressable_shards[0].data.item()
    say(f"step {number}: {value}")
    if stopping:
        if peers.is_first:
            time.sleep(0.5)  # it saves; the others may be done before
            say(f"told to leave: {peers._channel.stop}")
        raise RunInterrupted("SIGTERM", number, 8, Path("run.toml"))


def main(address, count, index, case):
    """Is one process of a run."""
    chosen = index == (0 if case.endswith("_first") else 1)
    case = case.removesuffix("_first")
    with connect(address, count, index, timeout=30) as peers:
        say(f"devices {jax.device_count()}, {len(jax.local_devices())} here")
        peers.agree({"data": "b" if case == "differ" and chosen else "a"})
        with peers.together("reading the data"):
            if case == "no_data" and chosen:
                raise UserError("There is no file `rows.jsonl`.")
        others = "wait" if case == "stuck" else ""
        take_steps(peers, case if chosen else others)


def fork(*arguments):
    """Starts a process; returns its id, and the file that its stderr goes to."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        process = os.fork()
        if process:
            return process, file.name
        os.dup2(file.fileno(), 2)
        os.dup2(2, 1)
    try:
        main(*arguments)
    except RunInterrupted as error:
        say(f"{error}")
        sys.exit(error.status)
    except UserError as error:
        say(f"{error}")
        sys.exit(1 if error.status is None else error.status)
    sys.exit(0)


for line in sys.stdin:
    count, case, port = line.split()
    results = []
    address = f"127.0.0.1:{port}"
    for process, file in [
        fork(address, int(count), index, case) for index in range(int(count))
    ]:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with open(file) as stream:
            results.append((status, stream.read()))
        os.unlink(file)
    print(json.dumps(results), flush=True)
