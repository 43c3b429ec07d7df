"""Speed of the NF4 kernels on this machine's GPU, beside what the GPU can do at most.

    python scripts/bench_kernels.py                       # the whole list, Llama 3.1 8B
    python scripts/bench_kernels.py --quick --budget 300  # the important part of it
    python scripts/bench_kernels.py --only matmul --model 1b --model 70b
    python scripts/bench_kernels.py --dry-run             # what would run, in its order

Measured: `nf4_dequantize` to bf16 (8-bit and float32 block scales, of one weight and of
a layer in a stack), `nf4_matmul` with few and with many rows, and its gradient dX; all
projections of all layers in one program ("pass"); and two ceilings, a device copy and a
large bf16 product. Each by "xla" and by the kernels, which multiply in two ways: here
"pallas" is to write the weight out and leave the product to XLA, "fused" (few rows) is
never to write it. `--tune` adds the settings of the kernels, and a third way to
multiply, "wgmma" (tens to hundreds of rows, Hopper only): it is used where it turns out
the fastest, and nowhere else. With `--peer-python` (torch and bitsandbytes on the same
GPU) bitsandbytes beside them.

How a time is taken: scripts/time_kernels.py, which does it in a process of its own. A
kernel that takes its process down, or does not end, costs its own row. GB/s counts the
bytes that must move (packed weight, `x` and result, once each) whatever an
implementation moves; the floor of a row is the longer of its bytes and its operations
at the two ceilings.

The kernels are compared with "xla" first: weights must be equal, bit for bit; products
agree with those in float32, and with one-hot rows show each weight. What differs is a
failure (exit status 1) and is not timed.

Writes kernels_DEVICE.json and .md to benchmarks/ and, for choosing an implementation,
DEVICE.json to pallas_kernels/tuned/. Without a GPU it writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if not installed

from convert.output import write_text
from pallas_kernels.device import device_slug
from pallas_kernels.nf4.shapes import MIDDLE_ROWS, MODELS, ROWS, distinct, packed_bytes

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("dequantize", "matmul", "backward")
# A product of at most so many rows may be computed from the packed bytes.
FEW_ROWS = 64
# Weights and results of the calls in turn: several times the cache of any GPU.
ROTATED_BYTES = 512 << 20
# One implementation is faster than another if by more than this: less is noise.
MARGIN = 1.02
BACKWARD_ROWS = (2048, 8192)
TUNED_ROWS = (1, 16)
WGMMA_ROWS = (FEW_ROWS, *MIDDLE_ROWS, 1024)
# A kernel that has not been compiled, compared and timed by then hangs (seconds).
LONGEST_ROW = 180.0
METHOD = (
    "Device time from profiler traces (union of the events on its streams over the "
    "calls of a trace; median of the traces; `method` clock: by the host's clock, "
    "for want of a trace). Calls go round over weights and results of "
    f"{ROTATED_BYTES >> 20} MiB together."
)


@dataclass(frozen=True)
class Task:
    """One thing to time."""

    kind: str
    """Of `KINDS`."""
    implementation: str
    """"xla", "pallas", "fused", "wgmma" or, of the peer, "bitsandbytes"."""
    shape: tuple[int, int] | None
    """(O, I); None = a pass, all projections of all layers of `model`."""
    rows: int = 0
    """Rows of `x`; 0 for dequantize."""
    double_quant: bool = True
    stacked: bool = True
    """Through `layer=` of a stack, as the layers of a model are."""
    model: str = ""
    """Of a pass: a key of `shapes.MODELS`."""
    tuning: tuple[tuple[str, Any], ...] = ()
    """Arguments of the kernel other than its own choice."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        words = [self.kind, "x".join(map(str, self.shape or ()))]
        words += [f"{self.model} pass"] * (self.shape is None)
        words += [f"{self.rows} rows"] * bool(self.rows)
        words += ["float32 scales"] * (not self.double_quant)
        words += ["one weight"] * (not self.stacked)
        words += [f"{k}={v}" for k, v in self.tuning]
        return " ".join([*filter(None, words), self.implementation])

    @property
    def weights(self) -> list[tuple[tuple[int, int], int]]:
        """(shape, how many) of the weights of one call."""
        if self.shape is not None:
            return [(self.shape, 1)]
        return [(p.shape, p.layers) for p in MODELS[self.model].projections]

    @property
    def bytes(self) -> int:
        """Bytes that one call must read and write."""
        total = 0
        for (o, i), count in self.weights:
            wide = (o + i) * self.rows if self.rows else o * i
            packed = packed_bytes((o, i), double_quant=self.double_quant)
            total += count * (packed + 2 * wide)
        return total

    @property
    def flops(self) -> int:
        """Operations of the product; 0 for dequantize."""
        return sum(2 * self.rows * o * i * count for (o, i), count in self.weights)

    def request(self, traces: int) -> dict[str, Any]:
        """What time_kernels.py and peer_gpu.py are asked for it."""
        copies = 2 if self.shape is None else max(2, -(-ROTATED_BYTES // self.bytes))
        return {
            **asdict(self),
            "do": "time",
            "tuning": dict(self.tuning),
            "copies": copies,
            "traces": traces,
        }


def tasks(
    models: Sequence[str], kinds: Sequence[str] = KINDS, *, quick: bool = False
) -> list[Task]:
    """Lists what there is to time, the most important first."""
    out: dict[Task, int] = {}

    def add(rank: int, kind: str, shape: Any, rows: int = 0, **named: Any) -> None:
        few = 0 < rows <= FEW_ROWS
        for one in ("xla", "fused" if few else "pallas"):
            if kind in kinds:
                out.setdefault(Task(kind, one, shape, rows, **named), rank)
        if few and not quick and kind in kinds and shape:
            out.setdefault(Task(kind, "pallas", shape, rows, **named), 7)

    for model in models:
        add(0, "dequantize", None, model=model)
        add(1, "matmul", None, 1, model=model)
        add(5, "matmul", None, 16, model=model)
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
    return sorted(out, key=out.__getitem__)


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
        Task(kind, one, shape, rows, tuning=tuple(choice.items()))
        for kind, one, rows, candidates in tried
        if kind in kinds
        for shape in distinct(tuple(models))
        for choice in candidates(shape, rows)
    ]


class Budget:
    """Seconds to spend, and what was left out when they were not enough."""

    def __init__(
        self, seconds: float | None, clock: Callable[[], float] = time.monotonic
    ):
        self.seconds, self.clock, self.started = seconds, clock, clock()
        self.longest: dict[str, float] = {}
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds; infinite without a limit."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (self.clock() - self.started)

    def take(self, name: str, kind: str, run: Callable[[], Any]) -> Any:
        """Runs unless the longest run of this kind so far would no longer fit."""
        begun = self.clock()
        if self.left <= self.longest.get(kind, 0.0):
            self.left_out.append(name)
            return None
        result = run()
        self.longest[kind] = max(self.longest.get(kind, 0.0), self.clock() - begun)
        return result


class Worker:
    """A process that answers a line of JSON with a line of JSON; started anew if lost.

    `described` is its first line: {"device", ...}, or {"error"}.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[str] | None = None
        self.described = self.start()

    def start(self) -> dict[str, Any]:
        """Starts the process; returns what it says of itself."""
        self.close()
        with open(self.log, "a") as log:
            try:
                process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, "PYTHONPATH": _with_root()},
                )
            except OSError as error:
                return {"error": str(error)}
        self.process = process
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    lines.put(line)
            lines.put("")

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        self.lines = lines
        found = self.receive(LONGEST_ROW)
        return {"error": found["failed"]} if "failed" in found else found

    def receive(self, seconds: float) -> dict[str, Any]:
        """Waits for a line; {"failed"}, and the process ended, if none comes."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"failed": f"no answer within {seconds:.0f} s; process ended"}
        if not line:
            last = (self.log.read_text().strip().splitlines() or ["no message"])[-1]
            code = self.process.wait() if self.process else None
            self.close()
            return {"failed": f"process ended with status {code}: {last}"[:1000]}
        return json.loads(line)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Asks; a lost process, or one that lost its device, is started anew before."""
        if self.process is None and "error" in (found := self.start()):
            return {"failed": found["error"]}
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in the log
        found = self.receive(LONGEST_ROW)
        if found.get("alive") is False:
            self.close()
        return found

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            self.reader.join()
            self.process = None


def _with_root() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


# --- Results ---


def row(task: Task, timing: dict[str, Any], ceiling: dict[str, Any]) -> dict[str, Any]:
    """Puts a time beside what it stands for."""
    us = timing["device_us"]
    least = max(
        task.bytes / ceiling["copy_gb_s"] / 1e3,
        task.flops / ceiling["matmul_tflop_s"] / 1e6,
    )
    return {
        **asdict(task),
        "shape": list(task.shape) if task.shape else None,
        "tuning": dict(task.tuning),
        **timing,
        "bytes": task.bytes,
        "flops": task.flops,
        "gb_s": task.bytes / us / 1e3,
        "tflop_s": task.flops / us / 1e6,
        "floor_us": least,
        "of_floor": least / us,
    }


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
    """Has the tasks checked and timed into `result`, as far as the budget goes."""
    for task in todo:
        passes = "pass" if task.shape is None else ""
        kind = f"{task.kind} {task.implementation} {passes}"
        found = budget.take(task.name, kind, partial(ask, task.request(traces)))
        result["left_out"] = list(budget.left_out)
        if found is None:
            continue
        if "timing" in found:
            last = row(task, found["timing"], result["ceilings"])
            result["rows"].append(last)
            said = f"{last['device_us']:.1f} us, {last['of_floor']:.0%} of the ceiling"
        elif "unavailable" in found:
            reason = found["unavailable"]
            result["unavailable"].setdefault(reason, []).append(task.name)
            said = f"not available: {reason.splitlines()[0][:100]}"
        else:
            result["failures"][task.name] = found["failed"]
            said = f"FAILED: {found['failed'].splitlines()[0][:200]}"
        say(f"{task.name}: {said}")
        save()


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
    times: dict[tuple, dict[str, float]] = {}
    fastest: dict[str, tuple[float, dict[str, Any]]] = {}
    for one in result["rows"]:
        if one["shape"] is None or not (one["stacked"] and one["double_quant"]):
            continue
        shape, rows, us = (
            "x".join(map(str, one["shape"])),
            one["rows"],
            one["device_us"],
        )
        if one["tuning"]:
            kind = "wgmma" if one["implementation"] == "wgmma" else one["kind"]
            key = f"{kind} {shape} {rows}"
            if key not in fastest or us < fastest[key][0]:
                fastest[key] = us, one["tuning"]
        else:
            both = times.setdefault((one["kind"], shape, rows), {})
            both[one["implementation"]] = us
    out: dict[str, Any] = {"fused_rows": {}, "wgmma_rows": {}, "dequantize": {}}
    lost, passed = set(), set()
    for (kind, shape, rows), both in sorted(times.items()):
        if kind == "dequantize" and {"xla", "pallas"} <= set(both):
            wins = both["pallas"] * MARGIN < both["xla"]
            out["dequantize"][shape] = "pallas" if wins else "xla"
        elif kind == "matmul" and {"xla", "fused"} <= set(both):
            out["fused_rows"].setdefault(shape, 0)
            others = min(us for name, us in both.items() if name != "fused")
            if both["fused"] * MARGIN >= others:
                lost.add(shape)
            elif shape not in lost:
                out["fused_rows"][shape] = rows
        tried = fastest.get(f"wgmma {shape} {rows}")
        if kind == "matmul" and tried is not None and shape not in passed:
            if tried[0] * MARGIN < min(both.values()):
                out["wgmma_rows"].setdefault(shape, [rows, rows])[1] = rows
            elif shape in out["wgmma_rows"]:
                passed.add(shape)
    if fastest:
        out["tuning"] = {key: tuning for key, (_, tuning) in fastest.items()}
    return {"device": result["device"], "jax": result["machine"]["jax"], **out}


def table(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    where, ceiling = result["machine"], result["ceilings"]
    lines = [
        f"# NF4 kernels on one {result['device']}",
        "",
        "Made by `scripts/bench_kernels.py`; do not edit. "
        + ", ".join(f"{k} {v}" for k, v in where.items() if v)
        + f". {result['method']}",
        "",
        f"Ceilings in the same run: copy {ceiling['copy_gb_s']:,.0f} GB/s (read and "
        f"written), bf16 product {ceiling['matmul_tflop_s']:,.0f} TFLOP/s. "
        f"bitsandbytes: {result['peer']}.",
    ]
    if not result["complete"]:
        lines += ["", "**Not complete: the run was stopped.**"]
    for kind in KINDS:
        rows = [r for r in result["rows"] if r["kind"] == kind and not r["tuning"]]
        if not rows:
            continue
        rows.sort(
            key=lambda r: (
                r["shape"] or [],
                not r["double_quant"],
                r["rows"],
                r["model"],
            )
        )
        heads = ("weight", "rows", "scales", "stack", "by", "us", "GB/s", "TFLOP/s")
        heads += ("of the floor", "us by the clock")
        lines += ["", f"## {kind}", "", f"| {' | '.join(heads)} |"]
        lines.append("|---" * len(heads) + "|")
        for r in rows:
            shape = "x".join(map(str, r["shape"] or ()))
            speed = f"{r['tflop_s']:,.0f}" if r["flops"] else ""
            lines.append(
                f"| {shape or r['model'] + ', all layers'} "
                f"| {r['rows'] or ''} | {'8-bit' if r['double_quant'] else 'float32'} "
                f"| {'yes' if r['stacked'] else 'no'} | {r['implementation']} "
                f"| {r['device_us']:,.1f} | {r['gb_s']:,.0f} "
                f"| {speed} | {r['of_floor']:.0%} | {r['call_us']:,.1f} |"
            )
    chosen = choices(result)
    if chosen["fused_rows"]:
        lines += ["", "Rows up to which the fused product is the fastest: "]
        lines[-1] += ", ".join(
            f"{shape} {rows}" for shape, rows in chosen["fused_rows"].items()
        )
    if chosen["wgmma_rows"]:
        lines += ["", "Rows for which `nf4.wgmma` is the fastest: "]
        lines[-1] += ", ".join(
            f"{shape} {first} to {last}"
            for shape, (first, last) in chosen["wgmma_rows"].items()
        )
    for name, found in (
        ("Failed", [f"{k}: {v}" for k, v in result["failures"].items()]),
        (
            "bitsandbytes failed",
            [f"{k}: {v}" for k, v in result["peer_failures"].items()],
        ),
        (
            "Not available",
            [f"{why} ({len(t)} rows)" for why, t in result["unavailable"].items()],
        ),
        ("Left out for want of time", result["left_out"]),
    ):
        if found:
            lines += ["", f"## {name}", ""]
            lines += [f"- {line}".replace("\n", " ") for line in found]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--only", choices=KINDS, action="append", help="may be repeated")
    p.add_argument(
        "--model", choices=tuple(MODELS), action="append", help="default 8b; repeatable"
    )
    p.add_argument("--quick", action="store_true", help="the important rows, one trace")
    p.add_argument("--tune", action="store_true", help="the kernels' tunables as well")
    p.add_argument("--budget", type=float, help="seconds; the rest is left out")
    p.add_argument("--peer-python", help="Python with torch and bitsandbytes")
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder")
    p.add_argument("--tuned", type=Path, default=ROOT / "pallas_kernels" / "tuned")
    p.add_argument("--dry-run", action="store_true", help="list what would run")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 without a GPU or after a failure."""
    args = parser().parse_args(argv)
    models, kinds = tuple(args.model or ("8b",)), tuple(args.only or KINDS)
    todo = tasks(models, kinds, quick=args.quick)
    if args.tune:
        todo += tunable_tasks(models, kinds)
    if args.dry_run:
        print("\n".join(task.name for task in todo))
        return 0
    say = partial(print, flush=True)
    budget, traces = Budget(args.budget), 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        here = Path(__file__)
        ask = Worker([sys.executable, str(here.with_name("time_kernels.py"))], log)
        if "error" in ask.described:
            print(
                f"bench_kernels: {ask.described['error']}. It measures kernels on a "
                "GPU and has nothing to say without one; nothing was written.",
                file=sys.stderr,
            )
            return 1
        result = {**ask.described, "method": METHOD, "complete": False}
        result |= {"options": {"models": models, "kinds": kinds, "quick": args.quick}}
        result |= {"rows": [], "failures": {}, "unavailable": {}, "left_out": []}
        result |= {"peer": "not asked for", "peer_failures": {}}
        name = f"kernels_{device_slug(result['device'])}"

        def save() -> None:
            args.output.mkdir(parents=True, exist_ok=True)
            rows = json.dumps(result, indent=1) + "\n"
            write_text(args.output / f"{name}.json", rows)
            write_text(args.output / f"{name}.md", table(result))

        try:
            found = ask({"do": "ceilings"})
            if "ceilings" not in found:
                print(f"bench_kernels: {found['failed']}", file=sys.stderr)
                return 1
            result["ceilings"] = found["ceilings"]
            run_tasks(todo, ask, result, budget, traces=traces, save=save, say=say)
        finally:
            ask.close()
        if args.peer_python:
            script = str(here.with_name("peer_gpu.py"))
            peer = Worker([args.peer_python, script, "kernels"], log)
            if "error" in peer.described:
                result["peer"] = f"was not there: {peer.described['error']}"[:500]
            else:
                result["peer"] = peer.described["peer"]
                theirs = [
                    replace(task, implementation="bitsandbytes", stacked=False)
                    for task in tasks(models, kinds, quick=True)
                    if task.implementation == "xla" and task.shape
                ]
                beside = {**result, "failures": result["peer_failures"]}
                run_tasks(theirs, peer, beside, budget, save=save, say=say)
            peer.close()
            say(f"bitsandbytes: {result['peer']}")
    result["complete"] = True
    save()
    chosen = choices(result)
    if chosen["fused_rows"] or chosen["dequantize"]:
        args.tuned.mkdir(parents=True, exist_ok=True)
        path = args.tuned / f"{device_slug(result['device'])}.json"
        write_text(path, json.dumps(chosen, indent=1) + "\n")
    say(
        f"{args.output / name}.json, .md: {len(result['rows'])} rows, "
        f"{len(result['failures'])} failures, {len(result['left_out'])} left out for "
        "want of time"
    )
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
