"""Everything there is to check and to measure on a GPU, in one command.

    python scripts/gpu_check.py                      # all parts, 10 minutes at most
    python scripts/gpu_check.py --list
    python scripts/gpu_check.py --only tests --only kernels --budget 300
    python scripts/gpu_check.py --model path/to/hf-llama --peer-python python3

The tests marked `gpu`; the kernels (scripts/bench_kernels.py); decoding and training of
a model with random weights of a real model's sizes, with the kernels "xla" and "pallas"
(scripts/bench_gpu.py); attention (scripts/bench_attention.py); with `--model` a short
training of that checkpoint; with `--peer-python` transformers and bitsandbytes beside
it (scripts/peer_gpu.py). The most important part comes first.

Each part is a process of its own with a time limit: one that fails, hangs or takes the
device down is reported, and the others still run. What no longer fits into `--budget`
is left out, and said to be. Progress goes to standard output; gpu_check_DEVICE.json and
.md in `--output` are written anew after every part. Exit status 1 if a part failed.

Without a GPU it says so, writes nothing and ends with 1. The tests take the `dev`
extra.
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

from convert.output import write_text
from pallas_kernels.device import device_slug

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
# Less than this is not enough for a part to import and compile (seconds).
LEAST = 20.0
PROBE = """
import json, jax
from qlora_jax.run_record import versions
d = jax.devices()[0]
print(json.dumps({"platform": d.platform, "device": d.device_kind} | versions()))
"""


@dataclass(frozen=True)
class Part:
    """One thing to check or to measure."""

    name: str
    command: tuple[str, ...]
    """{folder} stands for a folder of its own, {seconds} for the time it may use."""
    limit: float
    """Seconds."""
    says: str


def gpu_tests() -> list[str]:
    """Test files with a test marked `gpu`: the others need packages it does not."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "pytest.mark.gpu" in file.read_text()]


def parts(args: argparse.Namespace) -> list[Part]:
    """Lists the parts, the most important first."""
    python = sys.executable
    bench = (python, str(SCRIPTS / "bench_gpu.py"))
    size = ("--size", args.size)
    out = [
        Part(
            "tests",
            (python, "-m", "pytest", *gpu_tests(), "-m", "gpu", "-q", "-rf")
            + ("-p", "no:cacheprovider"),
            240,
            "the tests marked gpu",
        ),
        Part(
            "kernels",
            (python, str(SCRIPTS / "bench_kernels.py"), "--budget", "{seconds}")
            + ("--output", "{folder}", "--tuned", str(args.tuned))
            + ("--model", args.size)
            + (() if args.budget > 1200 else ("--quick",))
            + (("--peer-python", args.peer_python) if args.peer_python else ()),
            max(200, 0.4 * args.budget),
            "the kernels, timed beside what the GPU can do",
        ),
    ]
    attention = Part(
        "attention",
        (python, str(SCRIPTS / "bench_attention.py"), "--budget", "{seconds}")
        + ("--output", "{folder}", "--tuned", str(args.tuned))
        + (() if args.budget > 1200 else ("--quick",)),
        max(150, 0.2 * args.budget),
        "attention, timed beside cuDNN and XLA",
    )

    def decode(kernels: str, batch: int) -> Part:
        options = (*size, "--kernels", kernels, "--batch", str(batch))
        return Part(
            f"decode {batch} {kernels}",
            (*bench, "decode", *options),
            120,
            f"tokens/s of generation, batch {batch}, 1,024 tokens of context",
        )

    def train(kernels: str, remat: str) -> Part:
        options = (*size, "--kernels", kernels, "--remat", remat, "--batch", "4")
        return Part(
            f"train {remat} {kernels}",
            (*bench, "train", *options),
            150,
            "24 training steps, batch 4 x 2,048 tokens",
        )

    out += [decode("xla", 1), decode("pallas", 1)]
    out += [train("xla", "full"), train("pallas", "full")]
    out += [attention, decode("xla", 16), decode("pallas", 16)]
    if args.model:
        options = ("--checkpoint", str(args.model), "--batch", "4", "--length", "512")
        out.append(
            Part(
                "train checkpoint",
                (*bench, "train", *options),
                150,
                f"24 training steps of {args.model}",
            )
        )
    out.append(train("xla", "save_matmuls"))
    # Long rows: few steps, for what they take of the memory beside what was planned.
    for length, remat, steps, limit in (
        (131072, "full", 2, 300),
        (262144, "offload", 1, 500),
    ):
        options = ("--length", str(length), "--remat", remat, "--steps", str(steps))
        out.append(
            Part(
                f"train {length} {remat}",
                (*bench, "train", *size, *options),
                limit,
                f"{steps} step(s) of one row of {length:,} tokens",
            )
        )
    if args.peer_python and args.size == "8b":
        peer = (args.peer_python, str(SCRIPTS / "peer_gpu.py"), "decode")
        out += [
            Part(
                f"decode {batch} transformers",
                (*peer, "--batch", str(batch)),
                150,
                "the same generation by transformers + PEFT + bitsandbytes",
            )
            for batch in (1, 16)
        ]
    return out


def child_environment() -> dict[str, str]:
    """What the parts run in: this checkout, on the GPU."""
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cuda,cpu",  # an error without a GPU, not a run on the CPU
        # A part may start processes that use the device too: memory as it is needed.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


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
    """Returns the last line of a text that is a JSON object."""
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


def run_parts(
    todo: Sequence[Part],
    result: dict[str, Any],
    budget: float,
    *,
    execute: Callable[[Sequence[str], float], tuple[int | None, str]],
    save: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs the parts into `result["parts"]`, as far as the budget goes."""
    started = clock()
    for part in todo:
        seconds = min(part.limit, budget - (clock() - started))
        if seconds < LEAST:
            record: dict[str, Any] = {"status": "left out", "seconds": 0.0}
        else:
            say(f"{part.name}: {part.says} (at most {seconds:.0f} s)")
            record = run_part(part, seconds, execute=execute)
        result["parts"][part.name] = record
        said = f"{part.name}: {record['status']}, {record['seconds']:.0f} s"
        if record["status"] in ("failed", "out of time"):
            said += "\n" + record["tail"][-1500:]
        say(said)
        save()


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
    lines += _train_lines(training, ceiling.get("matmul_tflop_s"))
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


def _decode_lines(found: Mapping[str, Any]) -> list[str]:
    if not found:
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
        name.split()[1]: one["floor_tokens_per_s"]
        for name, one in found.items()
        if one.get("floor_tokens_per_s")
    }
    for name, one in found.items():
        _, batch, by = name.split()
        floor = one.get("floor_tokens_per_s") or floors.get(batch)
        share = f"{floor:,.0f} | {one['tokens_per_s'] / floor:.0%}" if floor else " | "
        lines.append(
            f"| {batch} | {by} | {one['tokens_per_s']:,.1f} | {one['ms_per_step']:.2f} "
            f"| {one['prefill_ms']:,.1f} | {share} |"
        )
    return lines


def _train_lines(found: Mapping[str, Any], product: float | None) -> list[str]:
    if not found:
        return []
    lines = [
        "",
        "## Training",
        "",
        "The jitted step, median; MFU against the data sheet, beside it against the "
        "bf16 product measured in the same run.",
        "",
        "| run | tokens/s | step ms | MFU | of product | peak GB | planned GB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        rate = one["tokens_per_s"] * one["flops_per_token"] / 1e12
        share = f"{rate / product:.0%}" if product else ""
        mfu = "" if one["mfu"] is None else f"{one['mfu']:.1%}"
        peak = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e9:.1f}"
        losses = one["losses"]
        lines.append(
            f"| {name.removeprefix('train ')} | {one['tokens_per_s']:,.0f} "
            f"| {1e3 * one['step_s']:,.1f} | {mfu} | {share} | {peak} "
            f"| {one['planned_bytes'] / 1e9:.1f} "
            f"| {losses[0]:.3f} to {losses[-1]:.3f} |"
        )
    return lines


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--list", action="store_true", help="show the parts")
    p.add_argument("--only", action="append", metavar="PART", help="may be repeated")
    p.add_argument("--budget", type=float, default=570, help="seconds for everything")
    p.add_argument("--size", default="8b", help="model sizes: 1b, 3b, 8b or 70b")
    p.add_argument("--model", type=Path, help="HF directory to train as well")
    p.add_argument("--peer-python", help="Python with torch and bitsandbytes")
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder")
    p.add_argument("--tuned", type=Path, default=ROOT / "pallas_kernels" / "tuned")
    return p


def _why_no_gpu(found: Mapping[str, Any], output: str) -> str:
    """What jax said where there is no GPU, in a line."""
    if found.get("device"):
        return f"its device is {found['device']}"
    lines = [line for line in output.splitlines() if line.strip()] or ["no answer"]
    return lines[-1] if len(lines[-1]) <= 300 else f"{lines[-1][:300]} ..."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; 1 without a GPU or after a failure."""
    args = parser().parse_args(argv)
    todo = parts(args)
    if args.list:
        for part in todo:
            print(f"{part.name:<22} {part.says} (at most {part.limit:.0f} s)")
        return 0
    names = [part.name for part in todo]
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        print(
            f"gpu_check: no part {', '.join(unknown)}; there are {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    if args.only:
        todo = [part for part in todo if part.name in args.only]
    started = time.monotonic()
    environment = child_environment()
    probe = [sys.executable, "-c", PROBE]
    _, output = run_child(probe, 120, environment)
    found = last_json(output) or {}
    if found.pop("platform", None) != "gpu":
        reason = _why_no_gpu(found, output)
        print(
            f"gpu_check: jax finds no GPU here ({reason}); nothing was checked or "
            "written.",
            file=sys.stderr,
        )
        return 1
    result: dict[str, Any] = {
        "device": found.pop("device"),
        "machine": found,
        "budget_s": args.budget,
        "parts": {},
        "complete": False,
    }
    name = f"gpu_check_{device_slug(result['device'])}"

    def save() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text(args.output / f"{name}.json", json.dumps(result, indent=1) + "\n")
        write_text(args.output / f"{name}.md", table(result))

    run_parts(
        todo,
        result,
        args.budget - (time.monotonic() - started),
        execute=partial(run_child, environment=environment),
        save=save,
        say=partial(print, flush=True),
    )
    result["complete"] = True
    save()
    print(f"{args.output / name}.json, .md")
    bad = ("failed", "out of time")
    return int(any(record["status"] in bad for record in result["parts"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
