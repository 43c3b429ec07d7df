"""Measures how long a large train state takes to be saved and to be read back.

    python scripts/bench checkpoint llama-3.1-8b/config.json

The state is that of a run with r=64 on all linear layers: adapters and AdamW's two
moments in float32, for Llama-3.1-8B 3 x 167,772,160 numbers, 2.01 GB. With `--whole` it
has embed_tokens and lm_head as well, 14.6 GB, and needs three times that in memory.

Each measurement is a separate process. "read" reads the bytes of the files, from the
page cache into memory that the process has not touched before; restoring cannot be
faster. "restore" goes from the directory to arrays on the device, as a run does, with
the checksum of all of them; "checksum" is that checksum by itself. "save" is all of
saving; `waited_seconds` is the part for which a run waits, and it trains on while the
rest is written. On a machine that is busy with other work only the processor's seconds
can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.files import read_json
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.runs.checkpoint import Checkpoints
from qlora_jax.runs.checksum import checksum
from qlora_jax.runs.config import CheckpointConfig
from qlora_jax.training.step import TrainState, init_state
from qlora_jax.tree import put
from scripts.bench.measuring import read_file, run_bench, write_rows

STEP = 1


def make_state(config: LlamaConfig, tables: bool, random: bool) -> TrainState:
    """Makes a train state.

    Args:
      config: of the model.
      tables: whether embed_tokens and lm_head are trained too.
      random: random numbers, which compress as little as trained ones; else zeros.
    """
    modules_to_save = ("embed_tokens", "lm_head") if tables else None
    lora = LoraConfig(
        r=64, target_modules="all-linear", modules_to_save=modules_to_save
    )
    generator = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> jax.Array:
        if not random:
            return jnp.zeros(shape, jnp.float32)
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    tree: dict[str, Any] = {}
    for path, shape in (
        select(model_params.abstract_base(config), lora).shapes().items()
    ):
        put(tree, path, array(shape))
    state = init_state(tree, optax.adamw(1e-4), jax.random.key(0))
    moments = jax.tree.map(
        lambda leaf: array(leaf.shape) if leaf.ndim else leaf, state.opt_state
    )
    return dataclasses.replace(state, step=jnp.int32(STEP), opt_state=moments)


def measure(
    operation: str, config: LlamaConfig, tables: bool, directory: Path
) -> dict[str, Any]:
    """Measures one of "save", "checksum", "read", "restore", with its memory."""
    waited, before = None, resource.getrusage(resource.RUSAGE_SELF)
    if operation == "read":
        files = [p for p in (directory / f"step_{STEP}").rglob("*") if p.is_file()]
        began = time.perf_counter()
        contents = [read_file(file) for file in files]
        seconds = time.perf_counter() - began
        size = sum(content.nbytes for content in contents)
    else:
        state = make_state(config, tables, random=operation != "restore")
        arrays = [state.adapters, state.opt_state]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        with Checkpoints(directory, CheckpointConfig()) as checkpoints:
            before = resource.getrusage(resource.RUSAGE_SELF)
            began = time.perf_counter()
            if operation == "save":
                checkpoints.save(state, {"batches": STEP})
                waited = time.perf_counter() - began
                checkpoints.wait()
            elif operation == "restore":
                jax.block_until_ready(checkpoints.restore(STEP, state).adapters)
            else:
                checksum(arrays)
            seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "what": operation,
        "bytes": size,
        "seconds": seconds,
        "waited_seconds": waited,
        "user_seconds": usage.ru_utime - before.ru_utime,
        "system_seconds": usage.ru_stime - before.ru_stime,
        "gb_per_s": size / seconds / 1e9,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all measurements; prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="bench checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="config.json of a Llama")
    parser.add_argument(
        "--whole", dest="tables", action="store_true", help="embeddings and head too"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--operation", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.operation:
        jax.config.update("jax_platforms", "cpu")
        config = LlamaConfig.from_hf(read_json(args.config))
        row = measure(args.operation, config, args.tables, args.directory)
        print(json.dumps(row))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for operation in ("save", "checksum", "read", "restore", "read", "restore"):
            row = run_bench(
                *("checkpoint", str(args.config), "--directory", directory),
                *("--operation", operation, *["--whole"] * args.tables),
            )
            rows.append(row)
            waited = row["waited_seconds"]
            print(
                f"{operation:<10}{row['bytes'] / 1e9:8.2f} GB{row['seconds']:8.2f} s"
                f"{row['gb_per_s']:8.2f} GB/s{row['peak_gb']:8.2f} GB at most"
                f"{row['user_seconds']:8.2f} s user"
                f"{row['system_seconds']:8.2f} s system"
                + (f"{waited:8.2f} s waited for" if waited is not None else ""),
                flush=True,
            )
    if args.output:
        write_rows(args.output, args.config, rows)
