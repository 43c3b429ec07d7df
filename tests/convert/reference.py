"""What several of these tests read, compare and damage."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from convert.checkpoint import open_model
from qlora_jax import tree as trees
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig

MODEL = "model.safetensors"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def read(path: Path, name: str = "config.json") -> Any:
    return json.loads((path / name).read_text())


def edit_json(file: Path, **fields: Any) -> None:
    """Sets fields; "REMOVED" removes one."""
    raw = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in raw.items() if v != "REMOVED"}))


def all_tensors(path: Path) -> dict[str, np.ndarray]:
    files = open_model(path)
    return {key: files.read(key) for key in files}


def equal_arrays(a: Any, b: Any) -> bool:
    """Whether two trees, or dictionaries, have the same arrays, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def same_file(a: Path, b: Path, name: str = MODEL) -> bool:
    return (a / name).read_bytes() == (b / name).read_bytes()


def pack(source: Path, out: Path, quantization: Any = "nf4") -> Path:
    """Writes a 4-bit copy of a checkpoint."""
    convert.save_llama(out, *convert.load_llama(source, quantization=quantization))
    return out


def adapter_of(config: LlamaConfig, lora: LoraConfig, fill: Any) -> dict[str, Any]:
    """An adapter's tree; `fill` makes an array of a shape."""
    tree: dict[str, Any] = {}
    selection = select(model_params.abstract_base(config), lora)
    for path, shape in selection.shapes().items():
        trees.put(tree, path, fill(shape))
    return tree


def ones(shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32)
