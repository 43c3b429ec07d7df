"""A checkpoint large enough to measure memory with."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.names import checkpoint_keys
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of half a gigabyte in two shards, to measure memory with.

    Four layers, 2048 x 8192; all layers hold the same bytes.
    """
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "max_position_embeddings": 32,
        "vocab_size": 1000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig.from_hf(raw)
    path = tmp_path_factory.mktemp("big")
    (path / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    made = {
        where: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for where, shape in model_params.shapes(config).items()
    }
    table = list(checkpoint_keys(config).items())
    weight_map = {}
    for i, part in enumerate((table[: len(table) // 2], table[len(table) // 2 :])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        tensors = {key: made[where] for key, (where, _) in part}
        safetensors.numpy.save_file(tensors, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    return path
