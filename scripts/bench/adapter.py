"""Measures how fast a large adapter is written and read, and the memory that takes.

    python scripts/bench adapter llama-3.1-8b/config.json

The adapter is as large as adapters get: r=64 on all linear layers, and embed_tokens and
lm_head in full; for Llama-3.1-8B 1,218,445,312 parameters, 4.9 GB. Each measurement is
a separate process: reading the bytes of the file (loading cannot be faster),
`convert.load_adapter`, `convert.save_adapter`. The files are read from the page cache,
so that the disk does not count.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from convert.files import read_json
from convert.peft import ADAPTER_WEIGHTS
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.tree import put
from scripts.bench.measuring import read_file, run_bench, write_rows


def peak_gb() -> float:
    """Returns the peak resident memory of this process (GB = 1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make_adapters(config: LlamaConfig, lora: LoraConfig) -> dict[str, Any]:
    """Makes a trained tree of arbitrary numbers."""
    tree: dict[str, Any] = {}
    for path, shape in (
        select(model_params.abstract_base(config), lora).shapes().items()
    ):
        put(tree, path, np.full(shape, 0.5, np.float32))
    return tree


def measure(operation: str, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """Measures one of "save", "read", "load"; the process does nothing else."""
    lora = LoraConfig(r=64, modules_to_save=("embed_tokens", "lm_head"))
    file = directory / "adapter" / ADAPTER_WEIGHTS
    # Kept to the end: the peak of memory includes the result.
    result: Any = make_adapters(config, lora) if operation == "save" else None
    before, began = peak_gb(), time.perf_counter()
    if operation == "save":
        convert.save_adapter(directory / "adapter", lora, result, config)
    elif operation == "load":
        result = convert.load_adapter(directory / "adapter", config)
    else:
        result = read_file(file)
    seconds = time.perf_counter() - began
    size = file.stat().st_size
    return {
        "what": operation,
        "file_bytes": size,
        "seconds": seconds,
        "gb_per_s": size / seconds / 1e9,
        "peak_gb_above_start": peak_gb() - before,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all measurements; prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="bench adapter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="config.json of a Llama")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--operation", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.operation:
        jax.config.update("jax_platforms", "cpu")
        config = LlamaConfig.from_hf(read_json(args.config))
        print(json.dumps(measure(args.operation, config, args.directory)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for operation in ("save", "read", "load", "read", "load"):
            row = run_bench(
                *("adapter", str(args.config), "--directory", directory),
                *("--operation", operation),
            )
            rows.append(row)
            print(
                f"{row['what']:<6}{row['file_bytes'] / 1e9:8.2f} GB"
                f"{row['seconds']:8.2f} s{row['gb_per_s']:8.2f} GB/s"
                f"{row['peak_gb_above_start']:8.2f} GB of memory",
                flush=True,
            )
    if args.output:
        write_rows(args.output, args.config, rows)
