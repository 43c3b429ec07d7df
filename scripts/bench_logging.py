"""What watching a run costs: its time beside the time of a training step.

    python scripts/bench_logging.py --output benchmarks/logging.json

The numbers of a step are written down as a run writes them (`Loop.note`: from the
device, to metrics.jsonl and the progress line, with TensorBoard too where tensorboardX
is installed), thousands of times over, on a pseudo-terminal where a bar is drawn and
without one. Beside it stands the best step of `scripts/bench_cpu.py ours` at its usual
shape, in a process of its own. The bar and loss.png are drawn by threads; what those
take is given as a share of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.runs.config import LogConfig
from qlora_jax.runs.metrics import Watch, open_trackers
from qlora_jax.runs.plots import draw_loss
from qlora_jax.runs.resume import versions
from qlora_jax.runs.runner import Loop


class Tokens:
    """Batches that say their number of tokens."""

    def tokens(self, index: int) -> int:
        """Tokens of a batch."""
        return 2048


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Makes stderr a terminal that no one looks at."""
    ours, theirs = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 65536):
                pass

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    before = sys.stderr
    sys.stderr = os.fdopen(theirs, "w")
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


def note_steps(directory: Path, steps: int, report_to: tuple[str, ...]) -> list[float]:
    """Seconds that each of so many notes took."""
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
            schedule=lambda step: step * jnp.float32(1e-6),
            every=log.every,
            began=time.perf_counter(),
            trackers=trackers,
        ) as watch,
    ):
        loop: Any = object.__new__(Loop)  # of its parts a note uses these two
        loop.watch, loop.batches = watch, Tokens()
        for index in range(steps):
            # New arrays, as each step gives them.
            fresh = jax.block_until_ready(jax.tree.map(lambda a: a + 0, metrics))
            started = time.perf_counter()
            loop.note(index, fresh, {})
            seconds.append(time.perf_counter() - started)
    return seconds


def idle_bar(directory: Path, seconds: float) -> float:
    """CPU seconds a second that the bar takes while a step computes."""
    watch = Watch(
        directory,
        start=0,
        steps=1000,
        schedule=lambda step: step * jnp.float32(1e-6),
        every=10,
        began=time.perf_counter(),
    )
    with watch:
        watch.step(1, {"loss": 1.0, "grad_norm": 1.0, "supervised_tokens": 9}, 9)
        before, started = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        spent = time.process_time() - before
        return spent / (time.perf_counter() - started)


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--notes", type=int, default=3000, help="steps to write down")
    p.add_argument("--seconds", type=float, default=5.0, help="to watch an idle bar")
    p.add_argument(
        "--step-seconds",
        type=float,
        help="time of a training step; default: measure it (a minute or two)",
    )
    p.add_argument("--output", type=Path, help="JSON file to write")
    return p


def step_seconds() -> float:
    """The best step of the CPU benchmark."""
    command = [sys.executable, str(Path(__file__).with_name("bench_cpu.py")), "ours"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["step_min_s"]


def main() -> None:
    """Measures, prints, writes."""
    args = parser().parse_args()
    step = args.step_seconds or step_seconds()
    kinds: dict[str, tuple[Any, tuple[str, ...]]] = {
        "plain lines": (quiet, ()),
        "bar": (terminal, ()),
    }
    if importlib.util.find_spec("tensorboardX") is not None:
        kinds["bar, TensorBoard"] = (terminal, ("tensorboard",))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (where, report_to)) in enumerate(kinds.items()):
            directory = Path(folder) / str(number)
            directory.mkdir()
            with where():
                taken = np.array(note_steps(directory, args.notes, report_to)[10:])
            rows[name] = {
                "mean_ms": 1e3 * float(taken.mean()),
                "median_ms": 1e3 * float(np.median(taken)),
                "p99_ms": 1e3 * float(np.percentile(taken, 99)),
                "share_of_a_step": float(taken.mean()) / step,
            }
        idle = Path(folder) / "idle"
        idle.mkdir()
        with terminal():
            share = idle_bar(idle, args.seconds)
        started = time.perf_counter()
        drawn = draw_loss(Path(folder) / "0")
        drawing = time.perf_counter() - started if drawn else None
    report = {
        "step_s": step,
        "notes": rows,
        "bar_share_of_a_core": share,
        "drawing_s": drawing,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }
    print(f"a training step            {step:.3f} s")
    for name, row in rows.items():
        print(
            f"a note, {name:<18} {row['mean_ms']:.3f} ms (median "
            f"{row['median_ms']:.3f}, 99 % {row['p99_ms']:.3f}): "
            f"{row['share_of_a_step']:.4%} of a step"
        )
    print(f"the bar meanwhile          {share:.2%} of one core")
    if drawing is not None:
        print(f"loss.png of {args.notes:,} steps     {drawing:.2f} s, in a thread")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
