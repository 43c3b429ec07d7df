"""Measures attention on this machine's GPU: our kernels, cuDNN, and blocks in XLA.

    python scripts/bench_gpu attention                       # Llama 3.2 1B and 3.1 8B
    python scripts/bench_gpu attention --quick --budget 120  # the important rows
    python scripts/bench_gpu attention --list                # what would run, in order
    python scripts/bench_gpu attention --dry-run             # on any device, short rows

Measured: the output, and the derivative with the output before it, in bfloat16, of
16,384 tokens in rows of several lengths: rows of one document ("whole"), which cuDNN
takes too, and rows of several documents and some padding ("packed"), which it does not.

Operations are those of the unmasked scores, 4 a score and unit of head_dim for the
output and 10 more for the derivative, whatever an implementation computes. timing.py
describes how a time is taken. Each implementation is first compared with the formula in
float32 on a shorter row; a difference is a failure (exit status 1) and the row is not
timed. A kernel that takes its process down, or does not end, costs one row.

Writes attention_DEVICE.json and .md to benchmarks/ and, for choosing an implementation,
DEVICE-attention.json to pallas_kernels/tuned/. Without a GPU it writes nothing.
`--dry-run` runs a row of each implementation on few tokens, in XLA where there is no
GPU, and chooses nothing; its table goes to `--output` if that is given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.xla import reference_attention
from pallas_kernels.device import device_slug
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.errors import UserError
from qlora_jax.models.attention import attention
from scripts.bench_gpu.results import (
    MARGIN,
    Recorder,
    markdown_table,
    one_of_each,
    problem_sections,
    write_choices,
    write_result,
)
from scripts.bench_gpu.timing import failure, measure, random_key, serve
from scripts.bench_gpu.worker import ROOT, Budget, Worker, subcommand

TOKENS = 16384
LENGTHS = (2048, 8192, 16384)
# Lengths of the documents of a packed row, over and over; then padding.
DOCUMENTS = (310, 130, 900, 1700, 60, 2400, 640)
PADDING = 1 / 32
COMPARED = 640
DRY = 64
"""Tokens of a dry run's rows."""
METHOD = (
    "Device time from profiler traces (union of the events on its streams; median of "
    "the traces; `method` clock: by the host's clock, for want of a trace)."
)

# --- What is timed ---


@dataclass(frozen=True)
class Task:
    """One thing to time."""

    model: str
    """A key of `shapes.MODELS`, for the heads."""
    length: int
    packed: bool
    gradient: bool
    """The derivative with the output before it, or the output only."""
    implementation: str
    """"pallas", "cudnn" or "xla"."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        what = "derivative" if self.gradient else "output"
        kind = "packed" if self.packed else "whole"
        return f"{self.model} {what} {self.length} {kind} {self.implementation}"

    @property
    def group(self) -> str:
        """The implementation."""
        return self.implementation

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return max(1, TOKENS // self.length)

    @property
    def flops(self) -> int:
        """Operations of the unmasked scores."""
        sizes = MODELS[self.model]
        lengths = np.bincount(segments(self.length, self.packed))
        scores = int((lengths * (lengths + 1) // 2)[1:].sum()) * self.rows
        each = sizes.num_attention_heads * sizes.head_dim * scores
        return (14 if self.gradient else 4) * each

    def request(self, traces: int) -> dict[str, Any]:
        """Returns what a worker is asked for."""
        return asdict(self) | {"traces": traces}

    def row(self, timing: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the row of a timing, with its speed."""
        speed = self.flops / timing["device_us"] / 1e6
        sizes = {"flops": self.flops, "rows": self.rows, "tflop_s": speed}
        return asdict(self) | timing | sizes

    def summary(self, row: dict[str, Any]) -> str:
        """Returns a row in a few words."""
        return f"{row['device_us']:.1f} us, {row['tflop_s']:.0f} TFLOP/s"


def segments(length: int, packed: bool) -> np.ndarray:
    """Returns the documents 1, 2, ... of a row, int32 [length]; 0 = padding."""
    ids = np.ones(length, np.int32)
    if packed:
        many = np.tile(DOCUMENTS, -(-length // sum(DOCUMENTS)))
        ids = np.repeat(np.arange(len(many), dtype=np.int32) + 1, many)[:length]
        ids[length - int(length * PADDING) :] = 0
    return ids


def tasks(models: Sequence[str], *, quick: bool = False) -> list[Task]:
    """Lists what there is to time, the most important first."""
    return [
        Task(model, length, packed, gradient, implementation)
        for length in (LENGTHS[1:2] if quick else LENGTHS)
        for gradient in (True, False)
        for model in models
        for packed in (True, False)
        for implementation in ("pallas", "xla", "cudnn")
        if not (packed and implementation == "cudnn")
    ]


# --- In the process that has the GPU ---


def operands(task: Task, length: int, rows: int) -> tuple[Any, ...]:
    """Makes q, k, v, the derivative of the output, and segment ids or None."""
    sizes = MODELS[task.model]
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    keys = jax.random.split(random_key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (rows, length, n, sizes.head_dim), jnp.bfloat16)
        for key, n in zip(keys, (heads, groups, groups, heads), strict=True)
    )
    ids = jnp.asarray(np.tile(segments(length, task.packed), (rows, 1)))
    return q, k, v, dout, ids if task.packed else None


def operation(task: Task, call: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns f(q, k, v, dout, ids): the output, and its derivative if asked for."""

    def run(q: Any, k: Any, v: Any, dout: Any, ids: Any) -> Any:
        if not task.gradient:
            return call(q, k, v, ids)
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, ids), q, k, v)
        return out, *pull(dout)

    return run


def implemented(task: Task) -> Callable[..., Any]:
    """Returns the operation by the task's implementation."""

    def call(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return attention(q, k, v, segment_ids=ids, implementation=task.implementation)

    return operation(task, call)


def mismatch(task: Task, length: int = COMPARED) -> str | None:
    """Compares with the formula in float32; returns the differences, None if equal.

    Softmax weights (which sum to one), their gradients and the results are rounded to
    bfloat16: three half-ulps of the largest element.
    """
    arrays = operands(task, length, 1)
    in_float32 = [None if a is None else a.astype(jnp.float32) for a in arrays[:4]]
    formula = jax.jit(operation(task, lambda *a: reference_attention(*a)[0]))
    want = jax.tree.leaves(formula(*in_float32, arrays[4]))
    got = jax.tree.leaves(jax.jit(implemented(task))(*arrays))
    names = ("out", "dq", "dk", "dv")
    differences = []
    for name, a, b in zip(names, got, want, strict=False):
        worst = float(jnp.abs(a.astype(jnp.float32) - b).max())
        bound = 3 * 2.0**-8 * max(1.0, float(jnp.abs(b).max()))
        if not worst <= bound:
            differences.append(f"{name} by {worst:.3g}, {bound:.3g} is rounding")
    return "; ".join(differences) or None


def answer(
    request: dict[str, Any], *, dry_run: bool = False, **how: Any
) -> dict[str, Any]:
    """Answers one task: {"timing"}, {"failed"} or {"unavailable"}."""
    traces = request.pop("traces", 3)
    task = Task(**request)
    length, rows = (DRY, 1) if dry_run else (task.length, task.rows)
    if dry_run and jax.default_backend() != "gpu":
        task = replace(task, implementation="xla")
    try:
        if wrong := mismatch(task, DRY if dry_run else COMPARED):
            return {"failed": f"differs from the formula: {wrong}"}
        arrays = operands(task, length, rows)
        run = jax.jit(implemented(task)).lower(*arrays).compile()
        timing = measure(lambda i: run(*arrays), keep=2, traces=traces, **how)
        memory = run.memory_analysis()
        workspace = getattr(memory, "temp_size_in_bytes", None)
        return {"timing": timing | {"temporary_bytes": workspace}}
    except (UserError, ValueError, NotImplementedError) as error:
        return {"unavailable": str(error)[:1000]}
    except Exception as error:
        return failure(error)


# --- From times to choices ---


def choices(result: dict[str, Any]) -> dict[str, Any]:
    """Derives the data of pallas_kernels/tuned from measured rows.

    Returns:
      device, jax; from_length: "head_dim whole" or "head_dim packed" -> the least
      length from which on the derivative was the fastest with our kernels, for every
      model measured; null where it was not at the largest.
    """
    times: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for row in result["rows"]:
        if row["gradient"]:
            width = MODELS[row["model"]].head_dim
            case = f"{width} {'packed' if row['packed'] else 'whole'}"
            models = times.setdefault(case, {}).setdefault(row["length"], {})
            by = models.setdefault(row["model"], {})
            by[row["implementation"]] = row["device_us"]
    from_length: dict[str, int | None] = {}
    for case, lengths in sorted(times.items()):
        from_length[case] = None
        for length, models in sorted(lengths.items(), reverse=True):
            if not all(map(_pallas_is_fastest, models.values())):
                break
            from_length[case] = length
    known = {"device": result["device"], "jax": result["machine"]["jax"]}
    return {**known, "from_length": from_length}


def _pallas_is_fastest(times: Mapping[str, float]) -> bool:
    others = [us for name, us in times.items() if name != "pallas"]
    if "pallas" not in times or not others:
        return False
    return times["pallas"] * MARGIN < min(others)


def table(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v)
    lines = [
        f"# Attention on one {result['device']}",
        "",
        f"Made by `scripts/bench_gpu attention`; do not edit. {machine}. {METHOD}",
    ]
    if not result["complete"]:
        lines += ["", "**Not complete: the run was stopped.**"]
    heads = ("heads of", "length", "rows", "row", "computed", "by", "us", "TFLOP/s")
    rows = []
    for row in result["rows"]:
        memory = row.get("temporary_bytes")
        rows.append(
            (
                row["model"],
                f"{row['length']:,}",
                row["rows"],
                "packed" if row["packed"] else "whole",
                "derivative" if row["gradient"] else "output",
                row["implementation"],
                f"{row['device_us']:,.1f}",
                f"{row['tflop_s']:,.0f}",
                "" if memory is None else f"{memory / 1e6:,.0f}",
            )
        )
    lines += ["", *markdown_table((*heads, "temporary MB"), rows)]
    lines += problem_sections(
        {
            "Failed": [f"{k}: {v}" for k, v in result["failures"].items()],
            "Not available": [f"{k}: {v}" for k, v in result["unavailable"].items()],
            "Left out for want of time": result["left_out"],
        }
    )
    return "\n".join(lines) + "\n"


# --- The command line ---


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        prog="bench_gpu attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model", choices=tuple(MODELS), action="append", help="default 1b and 8b"
    )
    p.add_argument("--quick", action="store_true", help="one length, one trace")
    p.add_argument("--budget", type=float, help="seconds; the rest is left out")
    p.add_argument("--output", type=Path, help="folder, default benchmarks")
    p.add_argument("--tuned", type=Path, default=ROOT / "pallas_kernels" / "tuned")
    p.add_argument("--list", action="store_true", help="list what would run")
    p.add_argument("--dry-run", action="store_true", help="short, on any device")
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 without a GPU or after a failure."""
    args = parser().parse_args(argv)
    if args.work:
        return serve(answer, dry_run=args.dry_run)
    todo = tasks(tuple(args.model or ("1b", "8b")), quick=args.quick)
    if args.list:
        print("\n".join(task.name for task in todo))
        return 0
    if args.dry_run:
        todo = one_of_each(todo)
    say = partial(print, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = subcommand("attention", dry_run=args.dry_run)
        worker = Worker(command, Path(folder) / "log")
        if "error" in worker.description:
            reason = f"{worker.description['error']}; nothing was written"
            print(f"bench_gpu attention: {reason}.", file=sys.stderr)
            return 1
        result = {**worker.description, "complete": False, "rows": [], "left_out": []}
        result |= {"failures": {}, "unavailable": {}}
        name = f"attention_{device_slug(result['device'])}"
        output = args.output or Path(folder if args.dry_run else ROOT / "benchmarks")
        save = partial(write_result, output, name, result, table)
        recorder = Recorder(result, Budget(args.budget), save, say)
        try:
            recorder.run(todo, worker, traces=1 if args.quick else 3)
        finally:
            worker.close()
        result["complete"] = True
        save()
    chosen = choices(result)
    if chosen["from_length"] and not args.dry_run:
        write_choices(args.tuned, "-attention", chosen)
    say(f"{output / name}.json, .md: {len(result['rows'])} rows")
    return 1 if result["failures"] else 0
