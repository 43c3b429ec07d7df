"""A process of a toy run: steps over all devices, and one process that fails.

    python process_program.py COORDINATOR PROCESSES PROCESS CASE

Process 1 is the one that fails, or process 0 where CASE ends in "_first". It prints
what it comes to, and ends like the command line does.
"""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.errors import UserError, say
from qlora_jax.runs.interruption import Interruption
from qlora_jax.runs.processes import connect, stop_flags
from qlora_jax.runs.watchdog import Watchdog

coordinator, processes, process, case = sys.argv[1:]
chosen = int(process) == (0 if case.endswith("_first") else 1)
case = case.removesuffix("_first")
jax.config.update("jax_num_cpu_devices", 2)


@jax.jit
def step(x, flags):
    """Sums over all devices: 1 on each, for ever."""
    return x * 0 + x.sum() / x.size, flags.sum()


def fail(number):
    """Fails in the way of the case, in the process that is chosen."""
    if not chosen or number != 3:
        return
    if case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if case == "stuck":
        time.sleep(100)
    if case == "defect":
        raise LookupError("a defect")


def take_steps(peers):
    """Takes steps until a process wants to stop."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.ones(1, np.float32)
    )
    x, _ = step(x, stop_flags(mesh, False))
    with (
        Interruption() as interruption,
        Watchdog(peers.name(), minimum=1.5, leave=peers.leave) as watchdog,
    ):
        for number in range(1, 9):
            try:
                fail(number)
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
        say(f"stopped after step {number} at {value}")


def main():
    """Runs the case."""
    with connect(coordinator, int(processes), int(process), timeout=30) as peers:
        say(f"devices {jax.device_count()}, {len(jax.local_devices())} here")
        peers.agree({"data": "b" if case == "differ" and chosen else "a"})
        with peers.together("reading the data"):
            if case == "no_data" and chosen:
                raise UserError("There is no file `rows.jsonl`.")
        take_steps(peers)


try:
    main()
except UserError as error:
    say(f"{error}")
    sys.exit(1 if error.status is None else error.status)
