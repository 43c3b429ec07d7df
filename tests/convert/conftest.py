"""Checkpoints, small and large, and the measure of peak memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.names import checkpoint_keys
from convert.output import Entry, write_model_files
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig

_MEASURE = """
import re, sys
import convert, jax

def read(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+)", status.read())[1]) * 1024

def peak(work, *args, **options):
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # resets the peak
    result = work(*args, **options)
    print(read("VmHWM") - before)
    return result

def warm(work, *args, **options):
    # The first call starts threads and fills caches, which are not counted.
    global before
    work(*args, **options)
    before = read("VmRSS")

"""


@pytest.fixture
def measure() -> Callable[..., list[int]]:
    """A function: program and arguments -> numbers that it prints.

    The program runs in a process of its own. `warm(work, ...)` and then
    `peak(work, ...)` print by how many bytes the resident memory grew at most.
    """
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs Linux's /proc")

    def run(program: str, *args: object) -> list[int]:
        command = [sys.executable, "-c", _MEASURE + program, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    return run


@pytest.fixture
def make_model(tiny: dict[str, Any], make_tensors: Any, save_model: Any) -> Any:
    """A function: change of the tensors, fields of config.json -> directory."""

    def make(
        change: Callable[..., Any] | None = None,
        name: str = "model",
        *,
        dtype: Any = np.float32,
        shards: int = 1,
        **fields: Any,
    ) -> Path:
        raw = {**tiny, **fields}
        tensors = make_tensors(raw, dtype)
        if change is not None:
            change(tensors)
        return save_model(raw, tensors, name, shards)

    return make


@pytest.fixture
def config(tiny: dict[str, Any]) -> LlamaConfig:
    """The configuration of `tiny_model`."""
    return LlamaConfig.from_hf(tiny)


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of half a gigabyte in two shards, to measure memory with.

    Four layers, 2048 x 8192; all layers hold the same bytes.
    """
    raw = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        **{"torch_dtype": "float32", "tie_word_embeddings": False},
        **{"max_position_embeddings": 32, "vocab_size": 1000, "hidden_size": 2048},
        **{"intermediate_size": 8192, "num_hidden_layers": 4},
        **{"num_attention_heads": 16, "num_key_value_heads": 4},
    }
    config = LlamaConfig.from_hf(raw)
    path = tmp_path_factory.mktemp("big")
    (path / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    made = {
        where: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for where, shape in model_params.shapes(config).items()
    }
    keys = checkpoint_keys(config)
    entries = [Entry.of(key, made[where]) for key, (where, _) in keys.items()]
    write_model_files(path, entries, max_shard_bytes=300_000_000)
    return path
