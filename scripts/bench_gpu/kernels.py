"""Measures the NF4 kernels on this machine's GPU, and what the GPU can do at most.

    python scripts/bench_gpu kernels                       # all rows, Llama 3.1 8B
    python scripts/bench_gpu kernels --quick --budget 300  # the important rows
    python scripts/bench_gpu kernels --only matmul --model 1b --model 70b
    python scripts/bench_gpu kernels --list                # what would run, in order
    python scripts/bench_gpu kernels --dry-run             # on any device, small

Measured: `nf4_dequantize` to bf16 (8-bit and float32 block scales, of one weight and of
a layer in a stack), `nf4_matmul` with few and with many rows, and its gradient dX; all
projections of all layers in one program ("pass"); an RMSNorm with the low-rank products
of its output ("norm", of the adapters of q, k and v, and its derivative); the MLP's
activation with the low-rank products around it ("gated", and its derivative); and two
ceilings, a device copy and a large bf16 product. Each by "xla" and by the kernels,
which multiply in two ways: here "pallas" writes the weight out and leaves the product
to XLA, "fused" (few rows) never writes it. `--tune` adds the settings of the kernels,
and a third way to multiply, "wgmma" (tens to hundreds of rows, Hopper only): it is used
where it turns out the fastest, and nowhere else. `--peer-python` (torch and
bitsandbytes on the same GPU) adds bitsandbytes.

timing.py describes how a time is taken, in a separate process. GB/s counts the bytes
that must move (packed weight, `x` and result, once each) whatever an implementation
moves; the floor of a row is the longer of its bytes and its operations at the two
ceilings.

The kernels are compared with "xla" first: weights must be equal, bit for bit; products
agree with those in float32, and with one-hot rows show each weight. A difference is a
failure (exit status 1) and the row is not timed.

Writes kernels_DEVICE.json and .md to benchmarks/ and, for choosing an implementation,
DEVICE.json to pallas_kernels/tuned/. Without a GPU it writes nothing. `--dry-run` runs
one row of each kind on small weights, in XLA where there is no GPU, and chooses
nothing; its table goes to `--output` if that is given.
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

from pallas_kernels.device import device_slug
from pallas_kernels.nf4.shapes import MIDDLE_ROWS, MODELS, ROWS, distinct, packed_bytes
from scripts.bench_gpu.nf4_operations import PASSES, answer
from scripts.bench_gpu.results import (
    MARGIN,
    Recorder,
    markdown_table,
    one_of_each,
    problem_sections,
    write_choices,
    write_result,
)
from scripts.bench_gpu.timing import serve
from scripts.bench_gpu.worker import ROOT, Budget, Worker, subcommand

KINDS = ("dequantize", "matmul", "backward", *PASSES)
# Tokens of a training step, and the rank of its adapters.
STEP_ROWS = 8192
RANK = 16
# A product of at most so many rows may be computed from the packed bytes.
FEW_ROWS = 64
# Weights and results of the calls in turn: several times the cache of any GPU.
ROTATED_BYTES = 512 << 20
BACKWARD_ROWS = (2048, 8192)
TUNED_ROWS = (1, 16)
WGMMA_ROWS = (FEW_ROWS, *MIDDLE_ROWS, 1024)
METHOD = (
    "Device time from profiler traces (union of the events on its streams over the "
    "calls of a trace; median of the traces; `method` clock: by the host's clock, "
    "for want of a trace). Calls go round over weights and results of "
    f"{ROTATED_BYTES >> 20} MiB together."
)

# --- What is timed ---


@dataclass(frozen=True)
class Task:
    """One thing to time."""

    kind: str
    """Of `KINDS`."""
    implementation: str
    """"xla", "pallas", "fused", "wgmma" or, of the peer, "bitsandbytes"."""
    shape: tuple[int, int] | None
    """(O, I), of one of `PASSES` (ranks, features); None = all projections of all
    layers of `model`, in one pass."""
    rows: int = 0
    """Rows of `x`; 0 for dequantize."""
    double_quant: bool = True
    stacked: bool = True
    """Through `layer=` of a stack, as the layers of a model are."""
    model: str = ""
    """Of a pass: a key of `shapes.MODELS`."""
    tuning: tuple[tuple[str, Any], ...] = ()
    """Arguments of the kernel other than its default choice."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        words = [self.kind, "x".join(map(str, self.shape or ()))]
        words += [f"{self.model} pass"] * (self.shape is None)
        words += [f"{self.rows} rows"] * bool(self.rows)
        is_pass = self.kind in PASSES
        words += ["float32 scales"] * (not self.double_quant and not is_pass)
        words += ["one weight"] * (not self.stacked and not is_pass)
        words += [f"{k}={v}" for k, v in self.tuning]
        return " ".join([*filter(None, words), self.implementation])

    @property
    def group(self) -> str:
        """Kind, implementation, and whether it is a pass."""
        passes = "pass" if self.shape is None else ""
        return f"{self.kind} {self.implementation} {passes}"

    @property
    def weights(self) -> list[tuple[tuple[int, int], int]]:
        """(shape, how many) of the weights of one call."""
        if self.shape is not None:
            return [(self.shape, 1)]
        return [(p.shape, p.layers) for p in MODELS[self.model].projections]

    @property
    def bytes(self) -> int:
        """Bytes that one call must read and write."""
        if self.kind in PASSES and self.shape:
            module = PASSES[self.kind]
            return module.count_bytes(self.kind, self.shape, self.rows)
        total = 0
        for (o, i), count in self.weights:
            wide = (o + i) * self.rows if self.rows else o * i
            packed = packed_bytes((o, i), double_quant=self.double_quant)
            total += count * (packed + 2 * wide)
        return total

    @property
    def flops(self) -> int:
        """Operations of the products; 0 for dequantize."""
        if self.kind in PASSES and self.shape:
            module = PASSES[self.kind]
            return module.count_flops(self.kind, self.shape, self.rows)
        return sum(2 * self.rows * o * i * count for (o, i), count in self.weights)

    def request(self, traces: int) -> dict[str, Any]:
        """Returns what nf4_operations.py and the peer are asked for."""
        copies = 2 if self.shape is None else max(2, -(-ROTATED_BYTES // self.bytes))
        return {
            **asdict(self),
            "do": "time",
            "tuning": dict(self.tuning),
            "copies": copies,
            "traces": traces,
        }

    def row(self, timing: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the row of a timing: speeds, and the floor at the ceilings."""
        us, ceilings = timing["device_us"], result["ceilings"]
        floor = max(
            self.bytes / ceilings["copy_gb_s"] / 1e3,
            self.flops / ceilings["matmul_tflop_s"] / 1e6,
        )
        return {
            **asdict(self),
            "shape": list(self.shape) if self.shape else None,
            "tuning": dict(self.tuning),
            **timing,
            "bytes": self.bytes,
            "flops": self.flops,
            "gb_s": self.bytes / us / 1e3,
            "tflop_s": self.flops / us / 1e6,
            "floor_us": floor,
            "of_floor": floor / us,
        }

    def summary(self, row: dict[str, Any]) -> str:
        """Returns a row in a few words."""
        return f"{row['device_us']:.1f} us, {row['of_floor']:.0%} of the ceiling"


def tasks(
    models: Sequence[str], kinds: Sequence[str] = KINDS, *, quick: bool = False
) -> list[Task]:
    """Lists what there is to time, the most important first."""
    ranks: dict[Task, int] = {}

    def add(rank: int, kind: str, shape: Any, rows: int = 0, **options: Any) -> None:
        if kind not in kinds:
            return
        few = 0 < rows <= FEW_ROWS
        for implementation in ("xla", "fused" if few else "pallas"):
            ranks.setdefault(Task(kind, implementation, shape, rows, **options), rank)
        if few and not quick and shape:
            ranks.setdefault(Task(kind, "pallas", shape, rows, **options), 7)

    for model in models:
        add(0, "dequantize", None, model=model)
        add(1, "matmul", None, 1, model=model)
        add(5, "matmul", None, 16, model=model)
        sizes = MODELS[model]
        for kind in PASSES:
            # Of a norm those of q, k and v; of the activation those of each layer.
            shape = (3 * RANK, sizes.hidden_size)
            if kind.startswith("gated"):
                shape = (RANK, sizes.intermediate_size)
            add(2, kind, shape, STEP_ROWS, double_quant=False, stacked=False)
    for shape in distinct(tuple(models)):
        add(2, "dequantize", shape)
        for rows in TUNED_ROWS:
            add(3, "matmul", shape, rows)
        add(4, "backward", shape, BACKWARD_ROWS[0])
        if quick:
            continue
        for rows in ROWS:
            add(6 if rows <= FEW_ROWS else 8, "matmul", shape, rows)
        add(7, "dequantize", shape, stacked=False)
        add(9, "dequantize", shape, double_quant=False)
        for rows in BACKWARD_ROWS:
            add(9, "backward", shape, rows)
    return sorted(ranks, key=ranks.__getitem__)


def tunable_tasks(models: Sequence[str], kinds: Sequence[str]) -> list[Task]:
    """Lists the settings of the kernels that can be tried."""
    try:
        from pallas_kernels.nf4 import gpu, wgmma
    except ImportError:  # jax without the Pallas that the kernels need
        return []
    tried: list[tuple[str, str, int, Callable[..., list[dict]]]] = [
        ("dequantize", "pallas", 0, partial(gpu.candidates, "dequantize"))
    ]
    for rows in TUNED_ROWS:
        tried.append(("matmul", "fused", rows, partial(gpu.candidates, "matmul")))
    for rows in WGMMA_ROWS:
        tried.append(("matmul", "wgmma", rows, wgmma.candidates))
    return [
        Task(kind, implementation, shape, rows, tuning=tuple(choice.items()))
        for kind, implementation, rows, candidates in tried
        if kind in kinds
        for shape in distinct(tuple(models))
        for choice in candidates(shape, rows)
    ]


# --- From times to choices ---

# (kind, "OxI", rows) -> implementation -> us
Times = dict[tuple[str, str, int], dict[str, float]]


def choices(result: dict[str, Any]) -> dict[str, Any]:
    """Derives the data of pallas_kernels/tuned from measured rows.

    Returns:
      device, jax; fused_rows: "OxI" -> the most rows for which "fused" was the fastest
      at every measured number of rows up to it, 0 if not at the fewest; wgmma_rows:
      "OxI" -> the first and the last of the neighbouring numbers of rows for which
      "wgmma" was, absent where for none;
      dequantize: "OxI" -> the faster implementation ("xla" where the difference is
      noise); tuning: "kind OxI rows" -> the fastest candidate, where there were any.
    """
    times: Times = {}
    fastest: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["shape"] is None or not (row["stacked"] and row["double_quant"]):
            continue
        shape, rows = "x".join(map(str, row["shape"])), row["rows"]
        us, implementation = row["device_us"], row["implementation"]
        if row["tuning"]:
            kind = "wgmma" if implementation == "wgmma" else row["kind"]
            key = f"{kind} {shape} {rows}"
            if key not in fastest or us < fastest[key][0]:
                fastest[key] = us, row["tuning"]
        else:
            times.setdefault((row["kind"], shape, rows), {})[implementation] = us
    times = dict(sorted(times.items()))
    chosen: dict[str, Any] = {
        "device": result["device"],
        "jax": result["machine"]["jax"],
        "fused_rows": _fused_rows(times),
        "wgmma_rows": _wgmma_rows(times, {k: us for k, (us, _) in fastest.items()}),
        "dequantize": {
            shape: "pallas" if by["pallas"] * MARGIN < by["xla"] else "xla"
            for (kind, shape, _), by in times.items()
            if kind == "dequantize" and {"xla", "pallas"} <= set(by)
        },
    }
    if fastest:
        chosen["tuning"] = {key: tuning for key, (_, tuning) in fastest.items()}
    return chosen


def _fused_rows(times: Times) -> dict[str, int]:
    most: dict[str, int] = {}
    lost = set()
    for (kind, shape, rows), by in times.items():
        if kind != "matmul" or not {"xla", "fused"} <= set(by):
            continue
        most.setdefault(shape, 0)
        others = min(us for name, us in by.items() if name != "fused")
        if by["fused"] * MARGIN >= others:
            lost.add(shape)
        elif shape not in lost:
            most[shape] = rows
    return most


def _wgmma_rows(times: Times, fastest: Mapping[str, float]) -> dict[str, list[int]]:
    ranges: dict[str, list[int]] = {}
    passed = set()
    for (kind, shape, rows), by in times.items():
        us = fastest.get(f"wgmma {shape} {rows}")
        if kind != "matmul" or us is None or shape in passed:
            continue
        if us * MARGIN < min(by.values()):
            ranges.setdefault(shape, [rows, rows])[1] = rows
        elif shape in ranges:
            passed.add(shape)
    return ranges


# --- The table ---


def table(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    machine, ceilings = result["machine"], result["ceilings"]
    lines = [
        f"# NF4 kernels on one {result['device']}",
        "",
        "Made by `scripts/bench_gpu kernels`; do not edit. "
        + ", ".join(f"{k} {v}" for k, v in machine.items() if v)
        + f". {result['method']}",
        "",
        f"Ceilings in the same run: copy {ceilings['copy_gb_s']:,.0f} GB/s (read and "
        f"written), bf16 product {ceilings['matmul_tflop_s']:,.0f} TFLOP/s. "
        f"bitsandbytes: {result['peer']}.",
    ]
    if not result["complete"]:
        lines += ["", "**Not complete: the run was stopped.**"]
    for kind in KINDS:
        rows = [r for r in result["rows"] if r["kind"] == kind and not r["tuning"]]
        if rows:
            lines += ["", f"## {kind}", "", *_rows_table(rows)]
    chosen = choices(result)
    for title, shapes in (
        ("Rows up to which the fused product is the fastest", chosen["fused_rows"]),
        (
            "Rows for which `nf4.wgmma` is the fastest",
            {k: f"{a} to {b}" for k, (a, b) in chosen["wgmma_rows"].items()},
        ),
    ):
        if shapes:
            listed = ", ".join(f"{shape} {rows}" for shape, rows in shapes.items())
            lines += ["", f"{title}: {listed}"]
    unavailable = result["unavailable"].items()
    lines += problem_sections(
        {
            "Failed": [f"{k}: {v}" for k, v in result["failures"].items()],
            "bitsandbytes failed": [
                f"{k}: {v}" for k, v in result["peer_failures"].items()
            ],
            "Not available": [f"{why} ({len(t)} rows)" for why, t in unavailable],
            "Left out for want of time": result["left_out"],
        }
    )
    return "\n".join(lines) + "\n"


def _rows_table(rows: list[dict[str, Any]]) -> list[str]:
    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["shape"] or [], not row["double_quant"], row["rows"], row["model"]

    heads = ("weight", "rows", "scales", "stack", "by", "us", "GB/s", "TFLOP/s")
    return markdown_table(
        (*heads, "of the floor", "us by the clock"),
        [
            (
                "x".join(map(str, r["shape"] or ())) or r["model"] + ", all layers",
                r["rows"] or "",
                *(
                    ("", "")
                    if r["kind"] in PASSES
                    else (
                        "8-bit" if r["double_quant"] else "float32",
                        "yes" if r["stacked"] else "no",
                    )
                ),
                r["implementation"],
                f"{r['device_us']:,.1f}",
                f"{r['gb_s']:,.0f}",
                f"{r['tflop_s']:,.0f}" if r["flops"] else "",
                f"{r['of_floor']:.0%}",
                f"{r['call_us']:,.1f}",
            )
            for r in sorted(rows, key=order)
        ],
    )


# --- The command line ---


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        prog="bench_gpu kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--only", choices=KINDS, action="append", help="may be repeated")
    p.add_argument(
        "--model", choices=tuple(MODELS), action="append", help="default 8b; repeatable"
    )
    p.add_argument("--quick", action="store_true", help="the important rows, one trace")
    p.add_argument("--tune", action="store_true", help="the kernels' tunables as well")
    p.add_argument("--budget", type=float, help="seconds; the rest is left out")
    p.add_argument("--peer-python", help="Python with torch and bitsandbytes")
    p.add_argument("--output", type=Path, help="folder, default benchmarks")
    p.add_argument("--tuned", type=Path, default=ROOT / "pallas_kernels" / "tuned")
    p.add_argument("--list", action="store_true", help="list what would run")
    p.add_argument("--dry-run", action="store_true", help="small, on any device")
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return p


def measure_peer(
    python: str, log: Path, recorder: Recorder, todo: Sequence[Task]
) -> None:
    """Times bitsandbytes on the shapes of the tasks, under another Python."""
    script = str(ROOT / "scripts" / "peer")
    peer = Worker([python, script, "gpu", "kernels"], log)
    result = recorder.result
    if "error" in peer.description:
        result["peer"] = f"was not there: {peer.description['error']}"[:500]
    else:
        result["peer"] = peer.description["peer"]
        theirs = [
            replace(task, implementation="bitsandbytes", stacked=False)
            for task in todo
            if task.implementation == "xla" and task.shape and task.kind not in PASSES
        ]
        # The same rows; failures apart, since only ours decide on the exit status.
        view = {**result, "failures": result["peer_failures"]}
        replace(recorder, result=view).run(theirs, peer)
    peer.close()
    recorder.say(f"bitsandbytes: {result['peer']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 without a GPU or after a failure."""
    args = parser().parse_args(argv)
    if args.work:
        return serve(answer, dry_run=args.dry_run)
    models, kinds = tuple(args.model or ("8b",)), tuple(args.only or KINDS)
    todo = tasks(models, kinds, quick=args.quick)
    if args.tune:
        todo += tunable_tasks(models, kinds)
    if args.list:
        print("\n".join(task.name for task in todo))
        return 0
    if args.dry_run:
        todo = one_of_each(todo)
    say, budget = partial(print, flush=True), Budget(args.budget)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        worker = Worker(subcommand("kernels", dry_run=args.dry_run), log)
        if "error" in worker.description:
            reason = f"{worker.description['error']}; nothing was written"
            print(f"bench_gpu kernels: {reason}.", file=sys.stderr)
            return 1
        result = {**worker.description, "method": METHOD, "complete": False}
        result |= {"options": {"models": models, "kinds": kinds, "quick": args.quick}}
        result |= {"rows": [], "failures": {}, "unavailable": {}, "left_out": []}
        result |= {"peer": "not asked for", "peer_failures": {}}
        name = f"kernels_{device_slug(result['device'])}"
        output = args.output or Path(folder if args.dry_run else ROOT / "benchmarks")
        save = partial(write_result, output, name, result, table)
        recorder = Recorder(result, budget, save, say, by_reason=True)
        try:
            measured = worker({"do": "ceilings"})
            if "ceilings" not in measured:
                print(f"bench_gpu kernels: {measured['failed']}", file=sys.stderr)
                return 1
            result["ceilings"] = measured["ceilings"]
            recorder.run(todo, worker, traces=1 if args.quick else 3)
        finally:
            worker.close()
        if args.peer_python and not args.dry_run:
            quick = tasks(models, kinds, quick=True)
            measure_peer(args.peer_python, log, recorder, quick)
        result["complete"] = True
        save()
    chosen = choices(result)
    if (chosen["fused_rows"] or chosen["dequantize"]) and not args.dry_run:
        write_choices(args.tuned, "", chosen)
    say(
        f"{output / name}.json, .md: {len(result['rows'])} rows, "
        f"{len(result['failures'])} failures, {len(result['left_out'])} left out for "
        "want of time"
    )
    return 1 if result["failures"] else 0
