"""Speed of attention on this machine's GPU: our kernels, cuDNN, and blocks in XLA.

    python scripts/bench_attention.py                       # Llama 3.2 1B and 3.1 8B
    python scripts/bench_attention.py --quick --budget 120  # the important part of it
    python scripts/bench_attention.py --dry-run             # what would run, in order

Measured: the output, and the derivative with the output before it, in bfloat16, of
16,384 tokens in rows of several lengths: rows of one document ("whole"), which cuDNN
takes too, and rows of several documents and some padding ("packed"), which it does not.

Operations are those of the scores that are seen, 4 a score and unit of head_dim for the
output and 10 more for the derivative, whatever an implementation computes. How a time
is taken: scripts/time_kernels.py. Each implementation is first compared with the
formula in float32 on a shorter row; what differs is a failure (exit status 1) and is
not timed. A kernel that takes its process down, or does not end, costs its own row.

Writes attention_DEVICE.json and .md to benchmarks/ and, for choosing an implementation,
DEVICE-attention.json to pallas_kernels/tuned/. Without a GPU it writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if not installed

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import MARGIN, Budget, Worker
from time_kernels import alive, describe, measure

from convert.output import write_text
from pallas_kernels.attention.xla import reference_attention
from pallas_kernels.device import device_slug
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.errors import UserError
from qlora_jax.models.attention import attention

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 16384
LENGTHS = (2048, 8192, 16384)
# Lengths of the documents of a packed row, over and over; then padding.
DOCUMENTS = (310, 130, 900, 1700, 60, 2400, 640)
PADDING = 1 / 32
COMPARED = 640
METHOD = (
    "Device time from profiler traces (union of the events on its streams; median of "
    "the traces; `method` clock: by the host's clock, for want of a trace)."
)


@dataclass(frozen=True)
class Task:
    """One thing to time."""

    model: str
    """A key of `shapes.MODELS`, for the heads."""
    length: int
    packed: bool
    gradient: bool
    """The derivative with the output before it, or the output alone."""
    implementation: str
    """"pallas", "cudnn" or "xla"."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        what = "derivative" if self.gradient else "output"
        kind = "packed" if self.packed else "whole"
        return f"{self.model} {what} {self.length} {kind} {self.implementation}"

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return max(1, TOKENS // self.length)

    @property
    def flops(self) -> int:
        """Operations of the scores that are seen."""
        sizes = MODELS[self.model]
        lengths = np.bincount(segments(self.length, self.packed))
        seen = int((lengths * (lengths + 1) // 2)[1:].sum()) * self.rows
        each = sizes.num_attention_heads * sizes.head_dim * seen
        return (14 if self.gradient else 4) * each


def segments(length: int, packed: bool) -> np.ndarray:
    """The documents 1, 2, ... of a row, int32 [length]; 0 = padding."""
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


# --- The process that has the GPU ---


def operands(task: Task, length: int, rows: int) -> tuple[Any, ...]:
    """Makes q, k, v, the derivative of the output, and segment ids or None."""
    sizes = MODELS[task.model]
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
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


def chosen(task: Task) -> Callable[..., Any]:
    """The operation by the task's implementation."""

    def call(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return attention(q, k, v, segment_ids=ids, implementation=task.implementation)

    return operation(task, call)


def mismatch(task: Task) -> str | None:
    """Compares with the formula in float32; returns what differs, None if nothing.

    Softmax weights (which sum to one), their gradients and the results are rounded to
    bfloat16: three half-ulps of the largest element.
    """
    arrays = operands(task, COMPARED, 1)
    wide = [None if a is None else a.astype(jnp.float32) for a in arrays[:4]]
    exact = operation(task, lambda *a: reference_attention(*a)[0])
    want = jax.tree.leaves(jax.jit(exact)(*wide, arrays[4]))
    got = jax.tree.leaves(jax.jit(chosen(task))(*arrays))
    names = ("out", "dq", "dk", "dv")
    differing = []
    for name, a, b in zip(names, got, want, strict=False):
        worst = float(jnp.abs(a.astype(jnp.float32) - b).max())
        bound = 3 * 2.0**-8 * max(1.0, float(jnp.abs(b).max()))
        if not worst <= bound:
            differing.append(f"{name} by {worst:.3g}, {bound:.3g} is rounding")
    return "; ".join(differing) or None


def answer(request: dict[str, Any], **how: Any) -> dict[str, Any]:
    """Answers one task: {"timing"}, {"failed"} or {"unavailable"}."""
    traces = request.pop("traces", 3)
    task = Task(**request)
    try:
        if wrong := mismatch(task):
            return {"failed": f"differs from the formula: {wrong}"}
        arrays = operands(task, task.length, task.rows)
        run = jax.jit(chosen(task)).lower(*arrays).compile()
        timing = measure(lambda i: run(*arrays), keep=2, traces=traces, **how)
        memory = run.memory_analysis()
        workspace = getattr(memory, "temp_size_in_bytes", None)
        return {"timing": timing | {"temporary_bytes": workspace}}
    except (UserError, ValueError, NotImplementedError) as error:
        return {"unavailable": str(error)[:1000]}
    except Exception as error:  # also what a compiler or a driver throws
        return {"failed": f"{type(error).__name__}: {error}"[:1000], "alive": alive()}


def work() -> int:
    """Answers until standard input ends; 1 without a GPU."""
    # Whatever a library prints must not stand between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = describe()
    print(json.dumps(found), file=out, flush=True)
    if "error" in found:
        return 1
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)
    return 0


# --- The process that asks it ---


def run_tasks(
    todo: Sequence[Task],
    ask: Callable[[dict[str, Any]], dict[str, Any]],
    result: dict[str, Any],
    budget: Budget,
    *,
    traces: int = 3,
    save: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Has the tasks compared and timed into `result`, as far as the budget goes."""
    for task in todo:
        request = asdict(task) | {"traces": traces}
        found = budget.take(task.name, task.implementation, partial(ask, request))
        result["left_out"] = list(budget.left_out)
        if found is None:
            continue
        if "timing" in found:
            speed = task.flops / found["timing"]["device_us"] / 1e6
            sizes = {"flops": task.flops, "rows": task.rows, "tflop_s": speed}
            result["rows"].append(asdict(task) | found["timing"] | sizes)
            said = f"{found['timing']['device_us']:.1f} us, {speed:.0f} TFLOP/s"
        elif "unavailable" in found:
            result["unavailable"][task.name] = found["unavailable"]
            said = f"not available: {found['unavailable'].splitlines()[0][:100]}"
        else:
            result["failures"][task.name] = found["failed"]
            said = f"FAILED: {found['failed'].splitlines()[0][:200]}"
        say(f"{task.name}: {said}")
        save()


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
            both = models.setdefault(row["model"], {})
            both[row["implementation"]] = row["device_us"]
    found: dict[str, int | None] = {}
    for case, lengths in sorted(times.items()):
        found[case] = None
        for length, models in sorted(lengths.items(), reverse=True):
            won = all(
                "pallas" in both
                and len(both) > 1
                and both["pallas"] * MARGIN
                < min(v for k, v in both.items() if k != "pallas")
                for both in models.values()
            )
            if not won:
                break
            found[case] = length
    known = {"device": result["device"], "jax": result["machine"]["jax"]}
    return {**known, "from_length": found}


def table(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    where = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v)
    lines = [
        f"# Attention on one {result['device']}",
        "",
        f"Made by `scripts/bench_attention.py`; do not edit. {where}. {METHOD}",
    ]
    if not result["complete"]:
        lines += ["", "**Not complete: the run was stopped.**"]
    heads = ("heads of", "length", "rows", "row", "computed", "by", "us", "TFLOP/s")
    heads += ("temporary MB",)
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        memory = row.get("temporary_bytes")
        memory = "" if memory is None else f"{memory / 1e6:,.0f}"
        lines.append(
            f"| {row['model']} | {row['length']:,} | {row['rows']} "
            f"| {'packed' if row['packed'] else 'whole'} "
            f"| {'derivative' if row['gradient'] else 'output'} "
            f"| {row['implementation']} | {row['device_us']:,.1f} "
            f"| {row['tflop_s']:,.0f} | {memory} |"
        )
    for name, found in (
        ("Failed", [f"{k}: {v}" for k, v in result["failures"].items()]),
        ("Not available", [f"{k}: {v}" for k, v in result["unavailable"].items()]),
        ("Left out for want of time", result["left_out"]),
    ):
        if found:
            lines += ["", f"## {name}", ""]
            lines += [f"- {line}".replace("\n", " ") for line in found]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--model", choices=tuple(MODELS), action="append", help="default 1b and 8b"
    )
    p.add_argument("--quick", action="store_true", help="one length, one trace")
    p.add_argument("--budget", type=float, help="seconds; the rest is left out")
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder")
    p.add_argument("--tuned", type=Path, default=ROOT / "pallas_kernels" / "tuned")
    p.add_argument("--dry-run", action="store_true", help="list what would run")
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 without a GPU or after a failure."""
    args = parser().parse_args(argv)
    if args.work:
        return work()
    todo = tasks(tuple(args.model or ("1b", "8b")), quick=args.quick)
    if args.dry_run:
        print("\n".join(task.name for task in todo))
        return 0
    say = partial(print, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ask = Worker([sys.executable, __file__, "--work"], Path(folder) / "log")
        if "error" in ask.described:
            print(
                f"bench_attention: {ask.described['error']}. It measures kernels on a "
                "GPU and has nothing to say without one; nothing was written.",
                file=sys.stderr,
            )
            return 1
        result = {**ask.described, "complete": False, "rows": [], "left_out": []}
        result |= {"failures": {}, "unavailable": {}}
        name = f"attention_{device_slug(result['device'])}"

        def save() -> None:
            args.output.mkdir(parents=True, exist_ok=True)
            write_text(
                args.output / f"{name}.json", json.dumps(result, indent=1) + "\n"
            )
            write_text(args.output / f"{name}.md", table(result))

        try:
            budget, traces = Budget(args.budget), 1 if args.quick else 3
            run_tasks(todo, ask, result, budget, traces=traces, save=save, say=say)
        finally:
            ask.close()
    result["complete"] = True
    save()
    found = choices(result)
    if found["from_length"]:
        args.tuned.mkdir(parents=True, exist_ok=True)
        path = args.tuned / f"{device_slug(result['device'])}-attention.json"
        write_text(path, json.dumps(found, indent=1) + "\n")
    say(f"{args.output / name}.json, .md: {len(result['rows'])} rows")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
