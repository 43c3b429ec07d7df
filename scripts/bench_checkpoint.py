"""How long a large train state takes to be saved and to be read back.

    python scripts/bench_checkpoint.py llama-3.1-8b/config.json

The state is that of a run with r=64 on all linear layers: adapters and AdamW's two
moments in float32, for Llama-3.1-8B 3 x 167,772,160 numbers, 2.01 GB. With `--whole` it
has embed_tokens and lm_head as well, 14.6 GB, and needs three times that in memory.

Each measurement is a process of its own. "read" is what restoring cannot beat: the
bytes of the files, from the page cache into memory that the process has not touched
before. "restore" is a run's own way from the directory to arrays on the device, with
the checksum of all of them; "checksum" is that alone. "save" is all of saving, and says
what part of it a run waits for; it trains on while the rest is written. On a machine
that is busy with other things only the processor's seconds can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
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
import jax.numpy as jnp
import numpy as np
import optax

from convert import names
from convert.files import read_json
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import crc32, fingerprint_tree
from qlora_jax.runs.checkpoint import Checkpoints
from qlora_jax.runs.config import CheckpointConfig
from qlora_jax.runs.resume import versions
from qlora_jax.training.step import TrainState, init_state

STEP = 1


def make(config: LlamaConfig, whole: bool, random: bool) -> TrainState:
    """A state of random numbers, which compress as little as trained ones, or zeros."""
    saved = ("embed_tokens", "lm_head") if whole else None
    lora = LoraConfig(r=64, target_modules="all-linear", modules_to_save=saved)
    generator = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> jax.Array:
        if not random:
            return jnp.zeros(shape, jnp.float32)
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    tree: dict[str, Any] = {}
    for path, shape in (
        select(model_params.abstract_base(config), lora).shapes().items()
    ):
        names.put(tree, path, array(shape))
    state = init_state(tree, optax.adamw(1e-4), jax.random.key(0))
    moments = jax.tree.map(
        lambda leaf: array(leaf.shape) if leaf.ndim else leaf, state.opt_state
    )
    return dataclasses.replace(state, step=jnp.int32(STEP), opt_state=moments)


def measure(what: str, config: LlamaConfig, whole: bool, place: Path) -> dict[str, Any]:
    """One measurement; the process does nothing else."""
    waited, before = None, resource.getrusage(resource.RUSAGE_SELF)
    if what == "read":
        files = [p for p in (place / f"step_{STEP}").rglob("*") if p.is_file()]
        began = time.perf_counter()
        buffers = []
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                buffers.append(np.empty(file.stat().st_size, np.uint8))
                view, done = memoryview(buffers[-1]), 0
                while count := opened.readinto(view[done : done + (1 << 28)]):
                    done += count
        seconds, size = time.perf_counter() - began, sum(b.nbytes for b in buffers)
    else:
        state = make(config, whole, random=what != "restore")
        arrays = [state.adapters, state.opt_state]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        with Checkpoints(place, CheckpointConfig()) as checkpoints:
            before = resource.getrusage(resource.RUSAGE_SELF)
            began = time.perf_counter()
            if what == "save":
                checkpoints.save(state, {"batches": STEP})
                waited = time.perf_counter() - began
                checkpoints.wait()
            elif what == "restore":
                jax.block_until_ready(checkpoints.restore(STEP, state).adapters)
            else:
                fingerprint_tree(arrays, crc32)
            seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "what": what,
        "bytes": size,
        "seconds": seconds,
        "waited_seconds": waited,
        "user_seconds": usage.ru_utime - before.ru_utime,
        "system_seconds": usage.ru_stime - before.ru_stime,
        "gb_per_s": size / seconds / 1e9,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    """Runs all measurements; prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path, help="config.json of a Llama")
    parser.add_argument("--whole", action="store_true", help="embeddings and head too")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        jax.config.update("jax_platforms", "cpu")
        config = LlamaConfig.from_hf(read_json(args.config))
        print(json.dumps(measure(args.one, config, args.whole, args.directory)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for what in ("save", "checksum", "read", "restore", "read", "restore"):
            command = [sys.executable, __file__, str(args.config), "--one", what]
            command += ["--directory", directory, *["--whole"] * args.whole]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(row := json.loads(done.stdout.splitlines()[-1]))
            waited = row["waited_seconds"]
            print(
                f"{what:<10}{row['bytes'] / 1e9:8.2f} GB{row['seconds']:8.2f} s"
                f"{row['gb_per_s']:8.2f} GB/s{row['peak_gb']:8.2f} GB at most"
                f"{row['user_seconds']:8.2f} s user"
                f"{row['system_seconds']:8.2f} s system"
                + (f"{waited:8.2f} s waited for" if waited is not None else ""),
                flush=True,
            )
    if args.output:
        machine = {"processor": platform.machine(), **versions()}
        result = {"config": args.config.parent.name, "machine": machine, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
