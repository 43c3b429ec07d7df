"""The timing half of bench_kernels.py: answers requests about one GPU, line by line.

bench_kernels.py starts it as a process of its own, so that a kernel which takes the
device or the process down costs one row. A request is one JSON object on a line of
standard input ({"do": "ceilings"}, or a task of bench_kernels.py), its answer one line
of standard output. The first line says what the device is; without a GPU, that there
is none, and the process ends.

A time is the time that the device was busy, from a profiler trace: the union of the
events on its streams over the number of calls, median of several traces. Where a trace
has no device events it is the difference between two numbers of calls by the host's
clock. Calls go round over weights and results that together exceed any cache.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, nf4_dequantize, nf4_matmul
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax import nf4
from qlora_jax.runs.resume import versions

Request = Mapping[str, Any]
Shape = tuple[int, int]

# --- Timing ---


def busy(events: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals (start, duration)."""
    total, end = 0.0, float("-inf")
    for start, duration in sorted(events):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def profile(run: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """Runs under the profiler; returns "plane: line" -> (start, duration) in ns.

    Only devices' lines have their events read; those of the host are named.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    events = line.events if plane.name.startswith("/device:") else ()
                    kept = found.setdefault(f"{plane.name}: {line.name}", [])
                    kept += [(e.start_ns, e.duration_ns) for e in events]
    return found


def traced(run: Callable[[], Any]) -> float:
    """Returns the seconds that the GPU was busy while `run` ran, 0 if unknown."""
    # Lines other than the streams sum these up, gaps included.
    return 1e-9 * busy(
        event
        for name, events in profile(run).items()
        if name.startswith("/device:GPU") and ": Stream" in name
        for event in events
    )


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
      keep: results held at a time, so that they do not all share one piece of memory.
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
        held: collections.deque[Any] = collections.deque(maxlen=keep)
        started = clock()
        for i in range(count):
            held.append(call(i))
        jax.block_until_ready(list(held))
        return clock() - started

    batch(max(2, min(keep, 8)))  # compiles, and fills the memory of the results
    once = min(batch(3) for _ in range(2)) / 3
    calls = max(4, min(500, int(seconds / max(once, 1e-9))))
    few = max(1, calls // 4)
    by_clock = []
    for _ in range(traces):
        short, whole = batch(few), batch(calls + few)
        # On a busy host the short run can be the longer one.
        less = (whole - short) / calls
        by_clock.append(less if less > 0 else whole / (calls + few))
    on_clock = statistics.median(by_clock)
    by_trace = [trace(partial(batch, calls)) / calls for _ in range(traces)]
    # A device is not busy for longer than the host waits: such a trace is no measure.
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


def ceilings(size: int = 2 << 30, width: int = 8192, **how: Any) -> dict[str, Any]:
    """Measures a copy (GB/s, read and written) and a bf16 product (TFLOP/s)."""
    words = jax.random.bits(_key(0), (size // 4,), jnp.uint32)
    copies = [jax.jit(jnp.copy), jax.jit(lambda a: a ^ jnp.uint32(1))]
    times = [measure(lambda _, f=f: f(words), keep=2, **how) for f in copies]
    copy = min(times, key=lambda t: t["device_us"])
    a, b = (jax.random.normal(_key(i), (width, width), jnp.bfloat16) for i in (1, 2))
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


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="rbg")  # fast on a device, and needs no scratch


# --- What is timed ---


def random_weight(
    shape: Shape, double_quant: bool, leading: tuple[int, ...], seed: int = 0
) -> tuple[jax.Array, jax.Array, Any]:
    """Makes codes, absmax and nested on the device, of weights around 0.03."""
    blank = nf4.abstract(
        shape, double_quant=double_quant, dtype="bfloat16", leading=leading
    )
    key = iter(jax.random.split(_key(seed), 3))

    def bits(leaf: Any) -> jax.Array:
        return jax.random.bits(next(key), leaf.shape, jnp.uint8)

    def uniform(leaf: Any, low: float, high: float) -> jax.Array:
        return jax.random.uniform(next(key), leaf.shape, minval=low, maxval=high)

    if not double_quant:
        return bits(blank.codes), uniform(blank.absmax, 0.02, 0.08), None
    filled = dataclasses.replace(
        blank,
        codes=bits(blank.codes),
        absmax=bits(blank.absmax),
        nested_absmax=uniform(blank.nested_absmax, 0.005, 0.02),
        nested_offset=jnp.full(leading, 0.05, jnp.float32),
        nested_quant_map=jnp.broadcast_to(
            jnp.asarray(nf4.DYNAMIC_MAP), blank.nested_quant_map.shape
        ),
    )
    return filled.codes, filled.absmax, filled.nested()


@contextlib.contextmanager
def as_if_measured(
    kind: str, shape: Shape, one: str, rows: int, tuning: dict[str, int] | None
) -> Iterator[None]:
    """Says, while a program is traced, what "pallas" is to choose for a shape.

    Which of its ways to multiply so many rows ("fused", "wgmma", or neither), and with
    which settings: which is what is to be measured here, whatever was measured before.
    """
    before = device.tuned
    name = f"{shape[0]}x{shape[1]}"
    kind = "wgmma" if one == "wgmma" else kind
    choices = {f"{kind} {name} {rows}": tuning} if tuning else {}
    measured = {
        "fused_rows": {name: rows if one == "fused" else 0},
        "wgmma_rows": {name: [rows, rows]} if one == "wgmma" else {},
        "tuning": choices,
    }
    device.tuned = lambda *_: measured
    try:
        yield
    finally:
        device.tuned = before


def operation(
    request: Request, shape: Shape, **changes: Any
) -> Callable[..., jax.Array]:
    """Returns f(layer, operand, packed): what the request does to one weight."""
    request = {**request, **changes}
    one = request["implementation"]
    named: dict[str, Any] = {
        "shape": shape,
        "implementation": "pallas" if one in ("fused", "wgmma") else one,
    }
    tuning = request.get("tuning")

    def dequantize(layer: Any, operand: Any, packed: Any) -> jax.Array:
        del operand
        with as_if_measured("dequantize", shape, "", 0, tuning):
            return nf4_dequantize(*packed, dtype=jnp.bfloat16, layer=layer, **named)

    def matmul(layer: Any, x: Any, packed: Any) -> jax.Array:
        with as_if_measured("matmul", shape, one, x.shape[0], tuning):
            return nf4_matmul(x, *packed, layer=layer, **named)

    def backward(layer: Any, dy: Any, packed: Any) -> jax.Array:
        # Linear in x: the forward product is not needed, and not computed.
        x = jnp.zeros((dy.shape[0], shape[1]), dy.dtype)
        with as_if_measured("backward", shape, "", 0, None):
            (dx,) = jax.vjp(lambda x: matmul(layer, x, packed), x)[1](dy)
        return dx

    kinds = {"dequantize": dequantize, "matmul": matmul, "backward": backward}
    return kinds[request["kind"]]


def operand(request: Request, shape: Shape, one_hot: bool = False) -> Any:
    """Makes `x`, or dy for backward, in bf16: random, or rows with a single 1."""
    rows = request["rows"]
    if not rows:
        return None
    width = shape[0] if request["kind"] == "backward" else shape[1]
    if one_hot:
        return jax.nn.one_hot(
            (7919 * jnp.arange(rows)) % width, width, dtype=jnp.bfloat16
        )
    return jax.random.normal(_key(3), (rows, width), jnp.bfloat16)


def single(request: Request) -> Callable[[int], Any]:
    """Returns call(i) for a request with one shape, over `copies` weights in turn."""
    shape, copies = _pair(request["shape"]), request["copies"]
    x, run = operand(request, shape), jax.jit(operation(request, shape))
    if request["stacked"]:
        stack = random_weight(shape, request["double_quant"], (copies,))
        layers = [jnp.int32(i) for i in range(copies)]
        return lambda i: run(layers[i % copies], x, stack)
    weights = [
        random_weight(shape, request["double_quant"], (), seed)
        for seed in range(copies)
    ]
    return lambda i: run(None, x, weights[i % copies])


def whole_pass(request: Request) -> Callable[[int], Any]:
    """Returns call(i) that goes through all layers of a model in one program."""
    projections = MODELS[request["model"]].projections
    layers = request.get("layers") or projections[0].layers
    stacks = [
        random_weight(p.shape, request["double_quant"], (layers,), seed)
        for seed, p in enumerate(projections)
    ]
    inputs = [operand(request, p.shape) for p in projections]

    @jax.jit
    def run(inputs: Any, stacks: Any) -> Any:
        def one(layer: jax.Array) -> list[jax.Array]:
            return [
                operation(request, p.shape)(layer, x, stack)
                for p, x, stack in zip(projections, inputs, stacks, strict=True)
            ]

        # The results are carried: each layer writes them, none may be left out. The
        # first layer's start the loop, and a corner of the last one's comes out, so
        # that nothing else is written.
        last = jax.lax.fori_loop(
            1, layers, lambda layer, _: one(layer), one(jnp.int32(0))
        )
        return [a[:1, :64] for a in last]

    return lambda i: run(inputs, stacks)


def _pair(shape: Any) -> Shape:
    out_features, in_features = shape
    return out_features, in_features


def mismatch(request: Request) -> str | None:
    """Compares with "xla" and with float32; returns what differs, None if nothing.

    Weights must be equal bit for bit. A product with a row of a single 1 is one weight,
    where a kernel may have rounded the table's value instead of it: a relative 1/128
    at most, and neighbouring table values are over 1/5 apart. Other products are sums,
    in an order that is the implementation's affair.
    """
    differing = []
    shapes = [request["shape"]]
    if request["shape"] is None:
        shapes = [p.shape for p in MODELS[request["model"]].projections]
    stacked = request["stacked"]
    leading, layer = ((2,), jnp.int32(1)) if stacked else ((), None)
    for shape in dict.fromkeys(map(_pair, shapes)):
        packed = random_weight(shape, request["double_quant"], leading)
        plain = {"implementation": "xla", "tuning": None}
        this = jax.jit(operation(request, shape))
        reference = jax.jit(operation(request, shape, **plain))
        exact = operand(request, shape, one_hot=True)
        got, want = this(layer, exact, packed), reference(layer, exact, packed)
        if request["rows"]:
            got, want = got.astype(jnp.float32), want.astype(jnp.float32)
            wrong = int(jnp.sum(~(jnp.abs(got - want) <= jnp.abs(want) / 64)))
        else:
            wrong = int(jnp.sum(got != want))
        if wrong:
            what = "one-hot products" if request["rows"] else "weights"
            differing.append(f"{shape}: {wrong:,} of {got.size:,} {what} differ")
        if not request["rows"]:
            continue
        x = operand(request, shape)
        dequantize = operation(request, shape, kind="dequantize", **plain)
        weight = jax.jit(dequantize)(layer, None, packed).astype(jnp.float32)
        weight = weight if request["kind"] == "backward" else weight.T
        wide = jnp.dot(
            x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST
        )
        # Results have 8 bits. Table values of 8 bits add an error that does not shrink
        # where terms cancel: of 65,536 products the largest is 1/115 of the typical
        # size, and there are up to 10^8.
        size = jnp.sqrt(jnp.mean(wide * wide))
        bound = jnp.abs(wide) / 256 + size / 64
        for name, function in (("this", this), ("xla", reference)):
            error = jnp.abs(function(layer, x, packed).astype(jnp.float32) - wide)
            wrong = int(jnp.sum(~(error <= bound)))
            if wrong:
                differing.append(f"{shape}: {wrong:,} of {name} beyond rounding")
    return "; ".join(differing) or None


# --- Requests and answers ---


def answer(request: Request, **how: Any) -> dict[str, Any]:
    """Answers one request: {"ceilings"}, {"timing"}, {"failed"} or {"unavailable"}."""
    if request["do"] == "ceilings":
        return {"ceilings": ceilings(**how)}
    how = {"traces": request.get("traces", 3), **how}
    try:
        if request["implementation"] != "xla" and (wrong := mismatch(request)):
            return {"failed": f"differs from xla: {wrong}"}
        call = single(request) if request["shape"] else whole_pass(request)
        return {"timing": measure(call, keep=request["copies"], **how)}
    except (ValueError, NotImplementedError) as error:
        return {"unavailable": str(error)[:1000]}
    except Exception as error:  # also what a compiler or a driver throws
        return {"failed": f"{type(error).__name__}: {error}"[:1000], "alive": alive()}


def alive() -> bool:
    """Whether the device still computes: a faulty kernel can take it away."""
    try:
        return int(jax.jit(lambda a: a + 1)(jnp.int32(1))) == 2
    except Exception:
        return False


def describe() -> dict[str, Any]:
    """Names the device and what the times depend on; {"error"} without a GPU."""
    try:
        device = jax.devices()[0]
    except Exception as error:  # jax raises as many kinds as there are drivers
        return {"error": f"jax finds no device: {error!r}"[:500]}
    if device.platform != "gpu":
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


def main() -> int:
    """Answers until standard input ends; 1 without a GPU."""
    # Whatever a library prints must not stand between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    found = describe()
    say(found)
    if "error" in found:
        return 1
    for line in sys.stdin:
        say(answer(json.loads(line)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
