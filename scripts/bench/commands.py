"""Runs a user's commands on a checkpoint of a real model's shape; measures each.

    python scripts/bench commands --output benchmarks/commands.json

A checkpoint of random bfloat16 weights in the shape of Qwen3-0.6B (or of the
config.json given) is written, quantized, trained on for two steps from the 16-bit and
from the 4-bit files, its adapter exported, and merged. For each command: seconds on the
clock and of all processors, the most memory that its process held (the kernel's count),
and the bytes that it wrote. Then results are checked: sizes, the adapter as it loads,
and some merged weights against base + update computed here. Takes minutes, 6 GB of disk
and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.params import abstract_base
from qlora_jax.nf4 import dequantize
from qlora_jax.runs.environment import versions
from scripts.bench.measuring import run_bench

# Published config.json of Qwen3-0.6B.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LENGTH = 256
"""Tokens of a row; a step has two."""


def make_checkpoint(directory: Path, config: LlamaConfig) -> None:
    """Writes a checkpoint of random bfloat16 weights."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if "norm" in str(path):
            return np.ones(leaf.shape, jnp.bfloat16)
        values = np.empty(leaf.shape, jnp.bfloat16)
        for part in values.reshape(-1, leaf.shape[-1]).reshape(leaf.shape[0], -1):
            part[:] = 0.02 * rng.standard_normal(part.shape, np.float32)
        return values

    shapes = abstract_base(config, quantization=None, dtype="bfloat16")
    base = jax.tree_util.tree_map_with_path(draw, shapes)
    convert.save_llama(directory, config, base)


def write_rows(file: Path, vocabulary: int) -> None:
    """Writes four rows of random token ids, all of them supervised."""
    rng = np.random.default_rng(1)
    with file.open("w") as out:
        for tokens in rng.integers(0, vocabulary, (4, LENGTH)).tolist():
            out.write(json.dumps({"input_ids": tokens, "labels": tokens}) + "\n")


def run(name: str, module: str, *args: str, made: Path) -> dict[str, Any]:
    """Runs a command in a process of its own; returns what it took.

    Args:
      name: of the row.
      module: of the command's program.
      *args: its arguments.
      made: what it writes.
    """
    command = [sys.executable, "-m", module, *args]
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=said)
        # The usage of this one child; `subprocess` would leave only that of all.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    return {
        "command": name,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "written_gb": directory_bytes(made) / 1e9,
    }


def directory_bytes(path: Path) -> int:
    """Returns the bytes of all files of a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def run_commands(folder: Path) -> list[dict[str, Any]]:
    """Runs the commands on FOLDER/model and FOLDER/rows.jsonl, one after the other."""
    jax_cli, convert_cli = "qlora_jax.cli", "qlora_jax.cli.convert"
    model, packed, run_dir = folder / "model", folder / "model-nf4", folder / "run"

    def train(name: str, base: Path, out: Path) -> dict[str, Any]:
        settings = {
            "model.path": base,
            "data.path": folder / "rows.jsonl",
            "data.format": "tokens",
            "data.max-length": LENGTH,
            "train.steps": 2,
            "train.batch-size": 2,
            # Large, so that two steps change the weights by more than their rounding.
            "train.learning-rate": 1e-2,
            "train.lr-scheduler": "constant",
            "output-dir": out,
        }
        options = [f"--{key}={value}" for key, value in settings.items()]
        return run(name, jax_cli, "train", *options, made=out)

    quantize = ("quantize", str(model), str(packed))
    adapter, merged = folder / "adapter", folder / "merged"
    export = ("adapter", str(run_dir / "adapter"), str(adapter))
    merge = ("merge", str(run_dir), str(merged))
    return [
        run("quantize", jax_cli, *quantize, made=packed),
        train("train, quantized while loading", model, run_dir),
        train("train, 4-bit checkpoint", packed, folder / "run-nf4"),
        run("export the adapter", convert_cli, *export, made=adapter),
        run("merge", jax_cli, *merge, made=merged),
    ]


def check(folder: Path, layers: Sequence[int]) -> dict[str, Any]:
    """Checks what the commands made; returns the largest differences.

    Args:
      folder: of `run_commands`.
      layers: whose weights are compared.
    """
    config, base = convert.load_llama(folder / "model", quantization="nf4_dq")
    lora, adapters = convert.load_adapter(folder / "adapter", config)
    _, merged = convert.load_llama(folder / "merged", quantization=None)
    differences, updates = {}, {}
    for part, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        weight, update, result = (
            tree["model"]["layers"][part][name] for tree in (base, adapters, merged)
        )
        dense = np.asarray(dequantize(weight["weight"]), np.float32)
        for layer in layers:
            a, b = (np.asarray(update[f"lora_{x}"], np.float32)[layer] for x in "AB")
            delta = lora.lora_alpha / lora.r * b @ a
            expected = dense[layer] + delta
            found = np.asarray(result["weight"][layer], np.float32)
            key = f"layers.{layer}.{part}.{name}"
            # Rounded once to bfloat16: half an ulp is 2^-8 of the value at most.
            scale = np.maximum(np.abs(expected), 2.0**-100)
            differences[key] = float((np.abs(found - expected) / scale).max())
            updates[key] = float(np.abs(delta).max() / np.abs(dense[layer]).max())
    embedding, tokens = (
        np.asarray(tree["model"]["embed_tokens"]["weight"])[:64]
        for tree in (base, merged)
    )
    return {
        "largest_relative_difference": differences,
        "largest_update_over_largest_weight": updates,
        "embeddings_equal": bool((embedding == tokens).all()),
        "rank": lora.r,
        "bytes": {
            name: directory_bytes(folder / name)
            for name in ("model", "model-nf4", "adapter", "merged")
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """Renders the table of docs/benchmarks.md."""
    lines = [
        "| command | seconds | of processors | memory | written |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['command']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | "
        f"{row['peak_gb']:.1f} GB | {row['written_gb']:.2f} GB |"
        for row in report["rows"]
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and checks the commands, prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="bench commands",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, nargs="?", help="config.json of a model")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    raw = convert.read_json(args.config) if args.config else QWEN3
    config = LlamaConfig.from_hf(raw)
    if args.make:
        make_checkpoint(args.make, config)
        print("{}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Elsewhere: a process begins with the memory of the one that starts it, and its
        # most is counted from there.
        given = [str(args.config)] if args.config else []
        run_bench("commands", *given, "--make", str(folder / "model"))
        write_rows(folder / "rows.jsonl", config.vocab_size)
        rows = run_commands(folder)
        for row in rows:
            print(
                f"{row['command']:<32}{row['seconds']:8.1f} s{row['peak_gb']:8.2f} GB "
                f"of memory{row['written_gb']:8.2f} GB written",
                flush=True,
            )
        last = config.num_hidden_layers - 1
        checks = check(folder, (0, last))
    print(json.dumps(checks, indent=1))
    worst = max(checks["largest_relative_difference"].values())
    if worst > 2.0**-8 or not checks["embeddings_equal"]:
        sys.exit("the merged weights are not base + update, rounded to bfloat16")
    if args.output:
        report = {
            "model": raw,
            "tokens_a_step": 2 * LENGTH,
            "rows": rows,
            "checks": checks,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "versions": versions(),
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n")
