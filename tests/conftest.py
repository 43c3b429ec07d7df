"""Settings and fixtures for every test.

Strict by default: dtype promotion and rank promotion raise, warnings are errors
(pyproject.toml), annotations are checked. No network, no accelerator unless
JAX_PLATFORMS asks for one, no compilation cache from an earlier run.
"""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

# Before jax is imported, and inherited by the processes a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
import safetensors.numpy
from jaxtyping import install_import_hook

# Shapes and types of the three packages are checked while the tests run. An int may
# stand where a float is asked for (PEP 484). Here and not as an option of the command
# line, because jaxtyping's option cannot take both an argument and several packages.
install_import_hook(
    ("qlora_jax", "pallas_kernels", "convert"),
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints, texts and stored outputs beside the repository.

    A test that needs it is skipped where it is absent, and fails there under CI=true:
    a green run that compared nothing would say more than it knows.
    """
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        reason = f"no test data: `{folder}` does not exist"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """Trained checkpoints and real text."""
    return shared / "data"


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Stored outputs of HF, PEFT and bitsandbytes."""
    return shared / "golden"


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a two-layer float32 Llama of 32 tokens, without a tokenizer."""
    from convert import names  # not above: the hook sees what is imported behind it
    from qlora_jax.config import LlamaConfig

    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    config = LlamaConfig.from_hf(raw)
    shapes = names.shapes(config)
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal(shapes[path], np.float32) * 0.1
        for key, (path, _) in names.keys(config).items()
    }
    path = tmp_path_factory.mktemp("llama")
    (path / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 rows of `input_ids` and `labels` for `llama_dir`."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with open(path, "w") as file:
        for length in rng.integers(6, 30, 24).tolist():
            ids = ((rng.integers(1, 32) + 3 * np.arange(length)) % 31 + 1).tolist()
            row = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that gives a fresh PRNG key at each call, the same in each run."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))
