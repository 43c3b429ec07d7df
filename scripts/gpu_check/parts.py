"""What is checked and measured on a GPU, in order."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS, TESTS = ROOT / "scripts", ROOT / "tests"


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
