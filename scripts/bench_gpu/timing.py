"""Times calls on one GPU, and answers requests for times line by line.

A time is the time that the device was busy, from a profiler trace: the union of the
events on its streams over the number of calls, median of several traces. Where a trace
has no device events it is the difference between two numbers of calls by the host's
clock.
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.runs.environment import versions

# --- One time ---


def busy(events: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals (start, duration)."""
    total, end = 0.0, float("-inf")
    for start, duration in sorted(events):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def profile(run: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """Runs under the profiler; returns "plane: line" -> (start, duration) in ns.

    Events are read from the lines of devices only; the host's lines are empty.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    lines: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    events = line.events if plane.name.startswith("/device:") else ()
                    kept = lines.setdefault(f"{plane.name}: {line.name}", [])
                    kept += [(e.start_ns, e.duration_ns) for e in events]
    return lines


def traced(run: Callable[[], Any]) -> float:
    """Returns the seconds that the GPU was busy while `run` ran, 0 if unknown."""
    # Lines other than the streams sum these up, gaps included.
    return 1e-9 * busy(
        event
        for name, events in profile(run).items()
        if name.startswith("/device:GPU") and ": Stream" in name
        for event in events
    )


def _seconds_by_clock(batch: Callable[[int], float], calls: int) -> float:
    """Returns the seconds of a call: a long batch less a short one."""
    few = max(1, calls // 4)
    short, long = batch(few), batch(calls + few)
    # On a busy host the short batch can be the longer one.
    difference = (long - short) / calls
    return difference if difference > 0 else long / (calls + few)


def measure(
    call: Callable[[int], Any],
    *,
    keep: int,
    seconds: float = 0.04,
    traces: int = 3,
    trace: Callable[[Callable[[], Any]], float] = traced,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times `call(0)`, `call(1)`, ... by the device.

    Args:
      call: starts the i-th call; returns its result without waiting for it.
      keep: results kept at a time, so that they do not all share one piece of memory.
      seconds: that one trace should take.
      traces: how many.
      trace: runs a function and returns the seconds the device was busy, or 0.
      clock: of the host.

    Returns:
      device_us (median of the traces), spread (largest less smallest, over the
      median), call_us (by the host's clock, launches included), calls, and method:
      "trace", or "clock" where device_us is call_us for want of a trace.
    """

    def batch(count: int) -> float:
        results: collections.deque[Any] = collections.deque(maxlen=keep)
        started = clock()
        for i in range(count):
            results.append(call(i))
        jax.block_until_ready(list(results))
        return clock() - started

    batch(max(2, min(keep, 8)))  # compiles, and fills the memory of the results
    once = min(batch(3) for _ in range(2)) / 3
    calls = max(4, min(500, int(seconds / max(once, 1e-9))))
    by_clock = [_seconds_by_clock(batch, calls) for _ in range(traces)]
    on_clock = statistics.median(by_clock)
    by_trace = [trace(partial(batch, calls)) / calls for _ in range(traces)]
    # A device is not busy for longer than the host waits: such a trace is wrong.
    good = min(by_trace) > 0 and statistics.median(by_trace) < 1.5 * on_clock
    times = by_trace if good else by_clock
    middle = statistics.median(times)
    if middle <= 0:
        raise RuntimeError(
            f"no time could be measured: the trace has no device events, and {calls} "
            f"calls took {on_clock * calls:.3g} s by the clock"
        )
    return {
        "device_us": 1e6 * middle,
        "spread": (max(times) - min(times)) / middle,
        "call_us": 1e6 * on_clock,
        "calls": calls,
        "method": "trace" if good else "clock",
    }


def random_key(seed: int) -> jax.Array:
    """Returns a key that is fast on a device and needs no scratch memory."""
    return jax.random.key(seed, impl="rbg")


def ceilings(size: int = 2 << 30, width: int = 8192, **how: Any) -> dict[str, Any]:
    """Measures a copy (GB/s, read and written) and a bf16 product (TFLOP/s)."""
    words = jax.random.bits(random_key(0), (size // 4,), jnp.uint32)
    copies = [jax.jit(jnp.copy), jax.jit(lambda a: a ^ jnp.uint32(1))]
    times = [measure(lambda _, f=f: f(words), keep=2, **how) for f in copies]
    copy = min(times, key=lambda t: t["device_us"])
    a, b = (
        jax.random.normal(random_key(i), (width, width), jnp.bfloat16) for i in (1, 2)
    )
    dot = jax.jit(jnp.dot)
    product = measure(lambda _: dot(a, b), keep=2, **how)
    lines = profile(lambda: dot(a, b).block_until_ready())
    return {
        "copy_gb_s": 2 * size / copy["device_us"] / 1e3,
        "copy": copy | {"bytes": 2 * size},
        "matmul_tflop_s": 2 * width**3 / product["device_us"] / 1e6,
        "matmul": product | {"width": width},
        # What a trace consists of here, should the times come from the clock.
        "trace": {name: len(events) for name, events in lines.items()},
    }


# --- The process that has the GPU ---


def alive() -> bool:
    """Returns whether the device still computes: a faulty kernel can take it away."""
    try:
        return int(jax.jit(lambda a: a + 1)(jnp.int32(1))) == 2
    except Exception:
        return False


def failure(error: Exception) -> dict[str, Any]:
    """Answers a request that raised what a compiler or a driver throws."""
    return {"failed": f"{type(error).__name__}: {error}"[:1000], "alive": alive()}


def describe(any_device: bool = False) -> dict[str, Any]:
    """Returns the device and what the times depend on.

    Without a GPU it is {"error"}, unless any device will do.
    """
    try:
        device = jax.devices()[0]
    except Exception as error:  # jax raises as many kinds as there are drivers
        return {"error": f"jax finds no device: {error!r}"[:500]}
    if device.platform != "gpu" and not any_device:
        return {"error": f"jax finds no GPU, only {device.platform}"}
    driver = ""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        driver = done.stdout.strip().split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    return {
        "device": device.device_kind,
        "machine": {"driver": driver, "cores": os.cpu_count(), **versions()},
    }


def serve(answer: Callable[..., dict[str, Any]], *, dry_run: bool = False) -> int:
    """Answers requests until standard input ends; 1 without a GPU.

    In a dry run any device will do, and `answer` is told.

    A request is one JSON object on a line of standard input, its answer one line of
    standard output. The first line describes the device.
    """
    # Whatever a library prints must not stand between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    description = describe(any_device=dry_run)
    print(json.dumps(description), file=out, flush=True)
    if "error" in description:
        return 1
    for line in sys.stdin:
        given = answer(json.loads(line), dry_run=dry_run)
        print(json.dumps(given), file=out, flush=True)
    return 0
