"""Measures what logging a run costs, as a share of the time of a training step.

    python scripts/bench logging --output benchmarks/logging.json

The numbers of a step are logged as a run logs them (`log_step`: from the device to
metrics.jsonl and the progress line, and to TensorBoard where tensorboardX is
installed), thousands of times, on a pseudo-terminal where a bar is drawn and without
one. They are compared with the best step of `bench cpu ours` at its default shape, in a
separate process. The bar and loss.png are drawn by threads; their time is given as a
share of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pty
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.runs.config import LogConfig
from qlora_jax.runs.environment import versions
from qlora_jax.runs.loop import log_step
from qlora_jax.runs.metrics import Watch, open_trackers
from qlora_jax.runs.plots import draw_loss
from scripts.bench.measuring import run_bench


def schedule(step: jax.Array) -> jax.Array:
    """Returns a learning rate for each step."""
    return jnp.float32(1e-6) * step.astype(jnp.float32)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Makes stderr a terminal whose output is thrown away."""
    reading, writing = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(reading, 65536):
                pass

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    before = sys.stderr
    sys.stderr = os.fdopen(writing, "w")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        reader.join(5)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Throws away what is written to stderr."""
    before = sys.stderr
    with open(os.devnull, "w") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = before


def log_steps(directory: Path, steps: int, report_to: tuple[str, ...]) -> list[float]:
    """Logs steps; returns the seconds that each took."""
    log = LogConfig(report_to=report_to)
    metrics = {
        "loss": jnp.float32(2.5),
        "grad_norm": jnp.float32(1.25),
        "supervised_tokens": jnp.int32(2044),
        "finite": jnp.bool_(True),
    }
    seconds = []
    with (
        open_trackers(log, directory, {}, 0) as trackers,
        Watch(
            directory,
            start=0,
            steps=steps,
            schedule=schedule,
            every=log.every,
            began=time.perf_counter(),
            trackers=trackers,
        ) as watch,
    ):
        for index in range(steps):
            # New arrays, as each step gives them.
            fresh = jax.block_until_ready(jax.tree.map(jnp.array, metrics))
            started = time.perf_counter()
            log_step(watch, index + 1, fresh, tokens=2048)
            seconds.append(time.perf_counter() - started)
    return seconds


def idle_bar(directory: Path, seconds: float) -> float:
    """Returns the CPU seconds a second that the bar takes while a step computes."""
    watch = Watch(
        directory,
        start=0,
        steps=1000,
        schedule=schedule,
        every=10,
        began=time.perf_counter(),
    )
    with watch:
        watch.step(1, {"loss": 1.0, "grad_norm": 1.0, "supervised_tokens": 9}, 9)
        before, started = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        spent = time.process_time() - before
        return spent / (time.perf_counter() - started)


def measure(folder: Path, notes: int, seconds: float, step: float) -> dict[str, Any]:
    """Measures each way to log, an idle bar, and drawing.

    Args:
      folder: to write runs in.
      notes: steps to log each way.
      seconds: to watch an idle bar.
      step: seconds of a training step.
    """
    ways: dict[str, tuple[Any, tuple[str, ...]]] = {
        "plain lines": (quiet, ()),
        "bar": (terminal, ()),
    }
    if importlib.util.find_spec("tensorboardX") is not None:
        ways["bar, TensorBoard"] = (terminal, ("tensorboard",))
    rows = {}
    for number, (name, (stderr, report_to)) in enumerate(ways.items()):
        directory = folder / str(number)
        directory.mkdir()
        with stderr():
            taken = np.array(log_steps(directory, notes, report_to)[10:])
        rows[name] = {
            "mean_ms": 1e3 * float(taken.mean()),
            "median_ms": 1e3 * float(np.median(taken)),
            "p99_ms": 1e3 * float(np.percentile(taken, 99)),
            "share_of_a_step": float(taken.mean()) / step,
        }
    idle = folder / "idle"
    idle.mkdir()
    with terminal():
        share = idle_bar(idle, seconds)
    started = time.perf_counter()
    drawn = draw_loss(folder / "0")
    return {
        "step_s": step,
        "notes": rows,
        "bar_share_of_a_core": share,
        "drawing_s": time.perf_counter() - started if drawn else None,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the figures, and writes JSON if asked to."""
    p = argparse.ArgumentParser(
        prog="bench logging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--notes", type=int, default=3000, help="steps to log")
    p.add_argument("--seconds", type=float, default=5.0, help="to watch an idle bar")
    p.add_argument(
        "--step-seconds",
        type=float,
        help="time of a training step; default: measure it (a minute or two)",
    )
    p.add_argument("--output", type=Path, help="JSON file to write")
    args = p.parse_args(argv)
    step = args.step_seconds or run_bench("cpu", "ours")["step_min_s"]
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), args.notes, args.seconds, step)
    print(f"a training step            {step:.3f} s")
    for name, row in report["notes"].items():
        print(
            f"a note, {name:<18} {row['mean_ms']:.3f} ms (median "
            f"{row['median_ms']:.3f}, 99 % {row['p99_ms']:.3f}): "
            f"{row['share_of_a_step']:.4%} of a step"
        )
    print(f"the bar meanwhile          {report['bar_share_of_a_core']:.2%} of one core")
    if report["drawing_s"] is not None:
        drawing = report["drawing_s"]
        print(f"loss.png of {args.notes:,} steps     {drawing:.2f} s, in a thread")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
