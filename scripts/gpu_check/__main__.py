"""Checks and measures everything that needs a GPU, in one command.

    python scripts/gpu_check                      # all parts, 10 minutes at most
    python scripts/gpu_check --list
    python scripts/gpu_check --part tests --part kernels --budget 300
    python scripts/gpu_check --dry-run            # all parts, narrow, on any machine
    python scripts/gpu_check --model path/to/hf-llama --peer-python python3

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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # if not installed

from convert.atomic import write_text
from pallas_kernels.device import device_slug
from scripts.gpu_check.parts import PEERS, ROOT, Part, list_parts

# Less than this is not enough for a part to import and compile (seconds).
LEAST = 20.0
PROBE = """
import json, jax
from qlora_jax.runs.environment import versions
d = jax.devices()[0]
print(json.dumps({"platform": d.platform, "device": d.device_kind} | versions()))
"""


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
        f"Made by `scripts/gpu_check`; do not edit. {versions}.",
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
        prog="gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
