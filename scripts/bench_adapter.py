"""How fast a large adapter is written and read, and how much memory that takes.

    python scripts/bench_adapter.py llama-3.1-8b/config.json

By default the adapter is the one that fills disks: r=64 on all linear layers, with
embed_tokens and lm_head saved whole; for Llama-3.1-8B 1,218,445,312 parameters, 4.9 GB.
Each measurement is a process of its own: reading the bytes of the file (what loading
cannot beat), `convert.load_adapter`, `convert.save_adapter`. The files are read from
the page cache, so that the disk does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from convert import names
from convert.files import read_json
from convert.peft import WEIGHTS
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.runs.resume import versions


def peak_gb() -> float:
    """Peak resident memory of this process (GB = 1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make(config: LlamaConfig, lora: LoraConfig) -> dict[str, Any]:
    """A trained tree of arbitrary numbers."""
    tree: dict[str, Any] = {}
    for path, shape in (
        select(model_params.abstract_base(config), lora).shapes().items()
    ):
        names.put(tree, path, np.full(shape, 0.5, np.float32))
    return tree


def measure(what: str, config_path: Path, directory: Path) -> dict[str, Any]:
    """One measurement; the process does nothing else."""
    config = LlamaConfig.from_hf(read_json(config_path))
    lora = LoraConfig(r=64, modules_to_save=("embed_tokens", "lm_head"))
    file = directory / "adapter" / WEIGHTS
    if what == "save":
        tree = make(config, lora)
        before, began = peak_gb(), time.perf_counter()
        convert.save_adapter(directory / "adapter", lora, tree, config)
    elif what == "load":
        before, began = peak_gb(), time.perf_counter()
        _, tree = convert.load_adapter(directory / "adapter", config)
    else:
        before, began = peak_gb(), time.perf_counter()
        with open(file, "rb", buffering=0) as opened:
            whole = np.empty(file.stat().st_size, np.uint8)
            view, done = memoryview(whole), 0
            while count := opened.readinto(view[done : done + (1 << 28)]):
                done += count
    seconds = time.perf_counter() - began
    size = file.stat().st_size
    return {
        "what": what,
        "file_bytes": size,
        "seconds": seconds,
        "gb_per_s": size / seconds / 1e9,
        "peak_gb_above_start": peak_gb() - before,
    }


def main() -> None:
    """Runs all measurements; prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path, help="config.json of a Llama")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        jax.config.update("jax_platforms", "cpu")
        print(json.dumps(measure(args.one, args.config, args.directory)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for what in ("save", "read", "load", "read", "load"):
            command = [sys.executable, __file__, str(args.config)]
            command += ["--one", what, "--directory", directory]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            print(
                f"{row['what']:<6}{row['file_bytes'] / 1e9:8.2f} GB"
                f"{row['seconds']:8.2f} s{row['gb_per_s']:8.2f} GB/s"
                f"{row['peak_gb_above_start']:8.2f} GB of memory"
            )
    if args.output:
        machine = {"processor": platform.machine(), **versions()}
        result = {"config": args.config.parent.name, "machine": machine, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
