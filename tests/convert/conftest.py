"""Small checkpoints and adapters made by the safetensors library, not by our writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import names
from qlora_jax.config import LlamaConfig

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

Tensors = dict[str, np.ndarray]
Save = Callable[[Tensors, Path], Path]


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The config.json of a two-layer Llama; change it at will."""
    return dict(TINY)


@pytest.fixture
def make_tensors() -> Callable[..., Tensors]:
    """Makes the tensors of a dense checkpoint, seeded."""

    def make(raw: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> Tensors:
        config = LlamaConfig.from_hf(raw)
        shapes = names.shapes(config)
        rng = np.random.default_rng(seed)
        return {
            key: rng.standard_normal(shapes[path], np.float32).astype(dtype)
            for key, (path, _) in names.keys(config).items()
        }

    return make


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes config.json and weights; `shards` splits them over so many files."""

    def save(
        raw: dict[str, Any], tensors: Tensors, name: str = "model", shards: int = 1
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(raw))
        if shards == 1:
            safetensors.numpy.save_file(
                tensors, path / "model.safetensors", {"format": "pt"}
            )
            return path
        keys = sorted(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {k: tensors[k] for k in keys[i::shards]}
            safetensors.numpy.save_file(part, path / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        return path

    return save


@pytest.fixture
def tiny_model(
    tiny: dict[str, Any], make_tensors: Callable[..., Tensors], save_model: Any
) -> Path:
    """A dense float32 checkpoint on disk."""
    return save_model(tiny, make_tensors(tiny))


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT directory for a configuration, seeded."""

    def make(
        raw: dict[str, Any],
        targets: tuple[str, ...] = ("q_proj", "down_proj"),
        r: int = 3,
        dtype: Any = np.float32,
        name: str = "adapter",
        seed: int = 1,
        **fields: Any,
    ) -> Path:
        config = LlamaConfig.from_hf(raw)
        rng = np.random.default_rng(seed)
        tensors = {}
        for path, (out, inner) in (
            (p, s) for p, s in names.shapes(config).items() if p[-2] in targets
        ):
            for layer in range(config.num_hidden_layers):
                for part, shape in (("lora_A", (r, inner)), ("lora_B", (out, r))):
                    module = f"{names.PEFT_PREFIX}{names.hf_key(path[:-1], layer)}"
                    key = f"{module}.{part}.weight"
                    tensors[key] = rng.standard_normal(shape, np.float32).astype(dtype)
        path = tmp_path / name
        path.mkdir()
        safetensors.numpy.save_file(
            tensors, path / "adapter_model.safetensors", {"format": "pt"}
        )
        (path / "adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "r": r,
                    "lora_alpha": 6,
                    "target_modules": list(targets),
                    "base_model_name_or_path": "some/base",
                    **fields,
                }
            )
        )
        return path

    return make


@pytest.fixture
def edit_tensors() -> Callable[[Path, Callable[[Tensors], Any]], None]:
    """Rewrites a safetensors file after a change to its tensors."""

    def edit(file: Path, change: Callable[[Tensors], Any]) -> None:
        tensors = dict(safetensors.numpy.load_file(file))
        change(tensors)
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})

    return edit


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of half a gigabyte in two shards, to measure memory with.

    Four layers, 2048 x 8192; all layers hold the same bytes.
    """
    raw = {
        **TINY,
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
        for where, shape in names.shapes(config).items()
    }
    table = list(names.keys(config).items())
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
