"""Checks and measures everything that needs a GPU, in one command.

    python scripts/gpu_check.py                      # all parts, 10 minutes at most
    python scripts/gpu_check.py --list
    python scripts/gpu_check.py --part tests --part kernels --budget 300
    python scripts/gpu_check.py --dry-run            # all parts, narrow, on any machine
    python scripts/gpu_check.py --model path/to/hf-llama --peer-python python3

Training and decoding of models with random weights of real models' sizes, with the
kernels "xla" and "pallas" (`bench_gpu model`); attention (`bench_gpu attention`); the
kernels (`bench_gpu kernels`); with `--model` a short training of that checkpoint; with
`--peer-python` training and generation by transformers, PEFT and bitsandbytes too, and
training by Unsloth if it is there (scripts/peer); the tests marked `gpu`. The most
important part comes first.

Each part is a separate process with a time limit: one that fails, hangs or takes the
device down is reported, and the others still run. What no longer fits into `--budget`
is left out and listed. Progress goes to standard output; gpu_check_DEVICE.json and .md
in `--output` are rewritten after every part. Exit status 1 if a part failed.

Parts share one compilation cache (build/xla_cache). With `--part`, results of earlier
parts on this device are kept.

Without a GPU it prints why, writes nothing and ends with 1. The tests need pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if not installed

from convert.atomic import write_text
from pallas_kernels.device import device_slug

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, TESTS = ROOT / "scripts", ROOT / "tests"
# Less than this is not enough for a part to import and compile (seconds).
LEAST = 20.0
PROBE = """
import json, jax
from qlora_jax.runs.environment import versions
d = jax.devices()[0]
print(json.dumps({"platform": d.platform, "device": d.device_kind} | versions()))
"""


@dataclass(frozen=True)
class Part:
    """One thing to check or to measure."""

    name: str
    command: tuple[str, ...]
    """{folder} stands for an empty folder, {seconds} for the time it may use."""
    limit: float
    """Seconds."""
    summary: str


def gpu_tests() -> list[str]:
    """Returns the files with tests marked `gpu`, by a conftest.py above them too."""
    marked = {p for p in TESTS.rglob("*.py") if "pytest.mark.gpu" in p.read_text()}
    marked |= {path.parent for path in marked if path.name == "conftest.py"}
    files = sorted(TESTS.rglob("test_*.py"))
    return [str(file) for file in files if marked & {file, *file.parents}]


def list_parts(args: argparse.Namespace) -> list[Part]:
    """Lists the parts, the most important first."""
    # "none" and "save_matmuls" have a program for each layer, unless it is a loop.
    fused, loop = ("--fusion", "fused"), ("--scan-layers", "true")
    separate = ("--lora-products", "separate")
    packed = (*loop, "--packed", "--attention", "pallas")
    recipe = ("--size", "qwen3-8b", "--accumulation", "4", "--packed")
    recipe += ("--optimizer", "adamw_8bit", "--steps", "8")
    parts = [
        train_part(args, "xla", "none"),
        train_part(args, "xla", "none", *fused, name="none fused"),
        train_part(args, "xla", "full"),
        train_part(args, "xla", "auto", *recipe, batch=2, name="qwen3-8b recipe"),
    ]
    if args.peer_python and args.size == "8b":
        parts += [
            peer_part(args, name, by, "train", "--by", by, *options)
            for name, (_, by, options) in PEERS.items()
        ]
    parts += [
        train_part(args, "xla", "save_matmuls"),
        train_part(args, "xla", "save_matmuls", *loop, name="save_matmuls loop"),
        train_part(args, "xla", "save_matmuls", *packed, name="packed attention"),
        train_part(args, "xla", "none", *separate, name="none separate adapters"),
    ]
    small = ("qwen3-0.6b", "qwen3-1.7b")
    parts += [train_part(args, "xla", "auto", "--size", s, name=s) for s in small]
    parts += [attention_part(args), kernels_part(args)]
    parts += [decode_part(args, "xla", 1), decode_part(args, "pallas", 1)]
    parts.append(train_part(args, "pallas", "full"))
    parts += [decode_part(args, "xla", 16), decode_part(args, "pallas", 16)]
    if args.model:
        options = ("--checkpoint", str(args.model), "--batch", "4", "--length", "512")
        command = bench_gpu("model", "train", *options)
        parts.append(Part("train checkpoint", command, 150, f"train {args.model}"))
    # Few steps: what matters is the memory that they take, and that was planned.
    parts.append(long_row_part(args, 131072, "full", steps=2, limit=300))
    parts.append(long_row_part(args, 262144, "offload", steps=1, limit=500))
    if args.peer_python and args.size == "8b":
        parts += [
            peer_part(args, f"decode {n} {_HF}", _HF, "decode", "--batch", str(n))
            for n in (1, 16)
        ]
    tests = (sys.executable, "-m", "pytest", *gpu_tests(), "-m", "gpu", "-q", "-rf")
    tests += ("-p", "no:cacheprovider")
    return [*parts, Part("tests", tests, 300, "the tests marked gpu")]


def bench_gpu(*arguments: str) -> tuple[str, ...]:
    """Returns the command line of scripts/bench_gpu."""
    return (sys.executable, str(SCRIPTS / "bench_gpu"), *arguments)


def peer_part(args: argparse.Namespace, name: str, by: str, *options: str) -> Part:
    """Returns a part that another library computes on the GPU."""
    command = (args.peer_python, str(SCRIPTS / "peer"), "gpu", *options)
    return Part(name, command, 200, f"the same by {by}")


# Parts of the peer -> the part of ours that does the same, the library, and options.
# Unsloth recomputes in a way of its own.
_HF, _AGAIN = "transformers", ("--gradient-checkpointing", "1")
_RECIPE = ("--size", "qwen3-8b", "--batch", "2", "--accumulation", "4", *_AGAIN)
PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "train none transformers": ("train none xla", _HF, ()),
    "train full transformers": ("train full xla", _HF, _AGAIN),
    "train qwen3-8b transformers": (
        "train qwen3-8b recipe",
        _HF,
        (*_RECIPE, "--optimizer", "adamw_8bit", "--steps", "5"),
    ),
    "train none unsloth": ("train none xla", "unsloth", ()),
    "train full unsloth": ("train full xla", "unsloth", _AGAIN),
}


def _table_options(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the options of a benchmark that writes a table into `{folder}`."""
    options = ("--budget", "{seconds}", "--output", "{folder}")
    options += ("--tuned", str(args.tuned))
    return options if args.budget > 1200 else (*options, "--quick")


def kernels_part(args: argparse.Namespace) -> Part:
    """Returns the part that times the NF4 kernels."""
    command = bench_gpu("kernels", *_table_options(args), "--model", args.size)
    if args.peer_python:
        command += ("--peer-python", args.peer_python)
    limit = max(200, 0.4 * args.budget)
    return Part("kernels", command, limit, "the kernels, and what the GPU can do")


def attention_part(args: argparse.Namespace) -> Part:
    """Returns the part that times attention."""
    command = bench_gpu("attention", *_table_options(args))
    return Part("attention", command, max(150, 0.2 * args.budget), "ours and cuDNN's")


def decode_part(args: argparse.Namespace, kernels: str, batch: int) -> Part:
    """Returns a part that generates."""
    options = ("--size", args.size, "--kernels", kernels, "--batch", str(batch))
    summary = f"tokens/s of generation, batch {batch}, 1,024 tokens of context"
    command = bench_gpu("model", "decode", *options)
    return Part(f"decode {batch} {kernels}", command, 120, summary)


def train_part(
    args: argparse.Namespace,
    kernels: str,
    remat: str,
    *options: str,
    batch: int = 4,
    name: str | None = None,
) -> Part:
    """Returns a part that trains on short rows."""
    chosen = ("--size", args.size, "--kernels", kernels, "--remat", remat)
    chosen += ("--batch", str(batch), *options)  # the last of an option counts
    # A program for each layer takes a minute to compile, and more to tune.
    unrolled = remat != "full" and "--scan-layers" not in options
    return Part(
        f"train {name or f'{remat} {kernels}'}",
        bench_gpu("model", "train", *chosen),
        300 if unrolled else 150,
        f"training steps, batch {batch} x 2,048 tokens {' '.join(options)}".rstrip(),
    )


def long_row_part(
    args: argparse.Namespace, length: int, remat: str, *, steps: int, limit: float
) -> Part:
    """Returns a part that trains on one long row."""
    options = ("--length", str(length), "--remat", remat, "--steps", str(steps))
    return Part(
        f"train {length} {remat}",
        bench_gpu("model", "train", "--size", args.size, *options),
        limit,
        f"{steps} step(s) of one row of {length:,} tokens",
    )


# --- Running a part ---


def child_environment() -> dict[str, str]:
    """Returns the environment of the parts: this checkout, on the GPU."""
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cuda,cpu",  # an error without a GPU, not a run on the CPU
        # A part may start processes that use the device too: memory as it is needed.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # What one part has compiled, another, or the next call, need not compile again.
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / "build" / "xla_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        # What needs a limit of pinned memory above JAX's 64 GiB.
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "80",
    }


def dry_run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Runs a part on narrow models and any device; see `run_child`."""
    environment = {**child_environment(), "JAX_PLATFORMS": ""}
    environment |= {k: v for k, v in os.environ.items() if k == "JAX_PLATFORMS"}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    # The tests have no narrow form: what is shown is that they can be collected.
    option = "--collect-only" if "pytest" in command else "--dry-run"
    return run_child([*command, option], seconds, environment)


def run_child(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int | None, str]:
    """Runs a command; returns its exit status, None if it ran out of time, and output.

    The command leads a process group, and the group is ended with it.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
        output.seek(0)
        return status, output.read()


def last_json(text: str) -> dict[str, Any] | None:
    """Returns the last line that is a JSON object, parsed."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def run_part(
    part: Part,
    seconds: float,
    *,
    execute: Callable[[Sequence[str], float], tuple[int | None, str]],
) -> dict[str, Any]:
    """Runs one part; returns its record.

    Returns:
      status ("ok", "failed", "out of time", "not available" or "no tests"), seconds,
      exit_status, result (what it measured, if it did) and tail (the end of its
      output).
    """
    with tempfile.TemporaryDirectory() as folder:
        # What a benchmark does after its budget (the last row, writing) takes time too.
        values = {
            "folder": folder,
            "seconds": f"{max(seconds - 45, 0.5 * seconds):.0f}",
        }
        command = [
            word.format(**values) if word in ("{folder}", "{seconds}") else word
            for word in part.command
        ]
        started = time.monotonic()
        exit_status, output = execute(command, seconds)
        record: dict[str, Any] = {
            "status": {0: "ok", None: "out of time"}.get(exit_status, "failed"),
            "seconds": time.monotonic() - started,
            "exit_status": exit_status,
            "command": list(part.command),
            "result": last_json(output),
            "tail": output[-4000:],
        }
        for file in Path(folder).glob(f"{part.name}_*.*"):
            text = file.read_text()
            if file.suffix == ".json":
                record["result"] = json.loads(text)
            elif file.suffix == ".md":
                record["table"] = text
    if part.name == "tests":
        record["result"] = {"summary": (output.strip().splitlines() or [""])[-1]}
        if exit_status == 5:  # pytest: nothing was collected
            record["status"] = "no tests"
    tables = ("kernels", "attention")  # in which single rows may be unavailable
    if "unavailable" in (record["result"] or {}) and part.name not in tables:
        record["status"] = "not available"
    return record


@dataclass(frozen=True)
class Runner:
    """Runs parts in turn, as far as the budget goes."""

    execute: Callable[[Sequence[str], float], tuple[int | None, str]]
    """Runs a command for so many seconds; returns its exit status and output."""
    save: Callable[[], None] = lambda: None
    """Called after each part."""
    say: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.monotonic

    def run(self, todo: Sequence[Part], records: dict[str, Any], budget: float) -> None:
        """Runs the parts; puts their records into `records`."""
        started = self.clock()
        for part in todo:
            seconds = min(part.limit, budget - (self.clock() - started))
            if seconds < LEAST:
                record: dict[str, Any] = {"status": "left out", "seconds": 0.0}
            else:
                self.say(f"{part.name}: {part.summary} (at most {seconds:.0f} s)")
                record = run_part(part, seconds, execute=self.execute)
            records[part.name] = record
            line = f"{part.name}: {record['status']}, {record['seconds']:.0f} s"
            if record["status"] in ("failed", "out of time"):
                line += "\n" + record["tail"][-1500:]
            self.say(line)
            self.save()


# --- The table ---


def table(result: dict[str, Any]) -> str:
    """Renders a result as Markdown."""
    records = result["parts"]
    kernels = (records.get("kernels") or {}).get("result") or {}
    ceiling = kernels.get("ceilings") or {}
    versions = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [
        f"# Checked on one {result['device']}",
        "",
        f"Made by `scripts/gpu_check.py`; do not edit. {versions}.",
        "",
        "| part | outcome | seconds |",
        "|---|---|---|",
    ]
    for name, record in records.items():
        note = (record.get("result") or {}).get("summary", "")
        note = f": {note}" if note else ""
        lines.append(f"| {name} | {record['status']}{note} | {record['seconds']:.0f} |")
    measured = {
        name: record["result"]
        for name, record in records.items()
        if (record.get("result") or {}).get("tokens_per_s")
    }
    lines += _decode_lines({k: v for k, v in measured.items() if k[:6] == "decode"})
    training = {k: v for k, v in measured.items() if k[:5] == "train"}
    ours = {k: v for k, v in training.items() if k not in PEERS}
    lines += _train_lines(ours, ceiling.get("matmul_tflop_s"))
    lines += _peer_lines(training)
    reasons = {
        name: (record.get("result") or {}).get("unavailable") or record["tail"][-600:]
        for name, record in records.items()
        if record["status"] in ("failed", "out of time", "not available")
    }
    if reasons:
        lines += ["", "## Why"]
        for name, reason in reasons.items():
            quoted = "\n".join(f"    {line}" for line in reason.strip().splitlines())
            lines += ["", f"{name}:", "", quoted]
    text = "\n".join(lines) + "\n"
    for part in ("kernels", "attention"):
        inner = (records.get(part) or {}).get("table", "")
        text += "\n#" + inner.replace("\n## ", "\n### ") if inner else ""
    return text


def _decode_lines(results: Mapping[str, Any]) -> list[str]:
    if not results:
        return []
    lines = [
        "",
        "## Decoding",
        "",
        "Greedy, after a prompt of 1,024 tokens, LoRA r=16 on every projection. Floor: "
        "packed weights and output head read once a step.",
        "",
        "| batch | by | tokens/s | ms a step | prefill ms | floor tokens/s | of it |",
        "|---|---|---|---|---|---|---|",
    ]
    floors = {
        name.split()[1]: result["floor_tokens_per_s"]
        for name, result in results.items()
        if result.get("floor_tokens_per_s")
    }
    for name, result in results.items():
        _, batch, by = name.split()
        speed = result["tokens_per_s"]
        floor = result.get("floor_tokens_per_s") or floors.get(batch)
        share = f"{floor:,.0f} | {speed / floor:.0%}" if floor else " | "
        lines.append(
            f"| {batch} | {by} | {speed:,.1f} | {result['ms_per_step']:.2f} "
            f"| {result['prefill_ms']:,.1f} | {share} |"
        )
    return lines


def _train_lines(results: Mapping[str, Any], product: float | None) -> list[str]:
    if not results:
        return []
    lines = [
        "",
        "## Training",
        "",
        "The jitted step, median; MFU against the data sheet, and against the bf16 "
        "product measured in the same run.",
        "",
        "| run | tokens/s | step ms | MFU | of product | peak GB | planned GB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        rate = result["tokens_per_s"] * result["flops_per_token"] / 1e12
        share = f"{rate / product:.0%}" if product else ""
        mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
        peak = _gigabytes(result)
        losses = result["losses"]
        lines.append(
            f"| {name.removeprefix('train ')} | {result['tokens_per_s']:,.0f} "
            f"| {1e3 * result['step_s']:,.1f} | {mfu} | {share} | {peak} "
            f"| {result['planned_bytes'] / 1e9:.1f} "
            f"| {losses[0]:.3f} to {losses[-1]:.3f} |"
        )
    return lines


def _peer_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns a line for each measured peer: its speed, and ours over it."""
    lines = []
    for name in results.keys() & PEERS.keys():
        theirs, ours = results[name], PEERS[name][0]
        line = f"- {name[6:]}: {theirs['tokens_per_s']:,.0f} tokens/s"
        line += f", peak {_gigabytes(theirs)} GB"
        if mine := results.get(ours):
            ratio = mine["tokens_per_s"] / theirs["tokens_per_s"]
            line += f"; ours ({ours[6:]}) {ratio:.2f} times that"
        lines.append(line)
    return ["", "The same training by PyTorch:", "", *sorted(lines)] if lines else []


def _gigabytes(result: Mapping[str, Any]) -> str:
    peak = result["peak_bytes"]
    return "" if peak is None else f"{peak / 1e9:.1f}"


# --- The command line ---


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--list", action="store_true", help="show the parts")
    p.add_argument(
        *("--only", "--part"),
        action="append",
        metavar="PART",
        help="may be repeated; the results of other parts are kept",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="all parts, narrow, on any device"
    )
    p.add_argument(
        "--budget", type=float, default=570, help="seconds for everything (%(default)s)"
    )
    p.add_argument("--size", default="8b", help="model sizes: 1b, 3b, 8b or 70b")
    p.add_argument("--model", type=Path, help="HF directory to train as well")
    p.add_argument("--peer-python", help="Python with torch and bitsandbytes")
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder")
    p.add_argument(
        "--tuned",
        type=Path,
        default=ROOT / "pallas_kernels" / "tuned",
        help="folder of measured tiles",
    )
    return p


def _why_no_gpu(probed: Mapping[str, Any], output: str) -> str:
    """Returns in a line what jax printed where there is no GPU."""
    if probed.get("device"):
        return f"its device is {probed['device']}"
    lines = [line for line in output.splitlines() if line.strip()] or ["no answer"]
    return lines[-1] if len(lines[-1]) <= 300 else f"{lines[-1][:300]} ..."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; 1 without a GPU or after a failure."""
    args = parser().parse_args(argv)
    todo = list_parts(args)
    if args.list:
        for part in todo:
            print(f"{part.name:<22} {part.summary} (at most {part.limit:.0f} s)")
        print(f"at most {sum(part.limit for part in todo):,.0f} s together")
        return 0
    names = [part.name for part in todo]
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        print(
            f"gpu_check: there is no part {', '.join(unknown)}; the parts are "
            f"{', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    if args.only:
        todo = [part for part in todo if part.name in args.only]
    if args.dry_run:
        records: dict[str, Any] = {}
        Runner(dry_run, say=partial(print, flush=True)).run(todo, records, 1e9)
        result = {"device": "dry run", "machine": {}, "parts": records}
        print(table(result))
        return int(any(record["status"] == "failed" for record in records.values()))
    started = time.monotonic()
    environment = child_environment()
    _, output = run_child([sys.executable, "-c", PROBE], 120, environment)
    probed = last_json(output) or {}
    if probed.pop("platform", None) != "gpu":
        print(
            f"gpu_check: jax finds no GPU here ({_why_no_gpu(probed, output)}); "
            "nothing was checked or written.",
            file=sys.stderr,
        )
        return 1
    result = {
        "device": probed.pop("device"),
        "machine": probed,
        "budget_s": args.budget,
        "parts": {},
        "complete": False,
    }
    name = f"gpu_check_{device_slug(result['device'])}"
    if args.only and (args.output / f"{name}.json").is_file():
        earlier = json.loads((args.output / f"{name}.json").read_text())
        result["parts"] = earlier["parts"]

    def save() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text(args.output / f"{name}.json", json.dumps(result, indent=1) + "\n")
        write_text(args.output / f"{name}.md", table(result))

    execute = partial(run_child, environment=environment)
    left = args.budget - (time.monotonic() - started)
    Runner(execute, save, partial(print, flush=True)).run(todo, result["parts"], left)
    result["complete"] = True
    save()
    print(f"{args.output / name}.json, .md")
    bad = ("failed", "out of time")
    return int(any(result["parts"][part.name]["status"] in bad for part in todo))


if __name__ == "__main__":
    raise SystemExit(main())
