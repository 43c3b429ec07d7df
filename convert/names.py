"""The key table: Hugging Face tensor names <-> paths in our parameter tree.

`qlora_jax.tree` spells a path as a Hugging Face key and back. PEFT writes the same
module names behind `base_model.model.`. `shapes` lists the tensors of a configuration;
everything that is read or written is checked against it.

Every tensor of a PEFT adapter file, and its place in our tree.

What has to be in the file follows from what the configuration selects in the model
(`qlora_jax.lora.targets`): one key for each array of each adapted layer, as PEFT spells it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from convert import names
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import Selection
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.params import shapes
from qlora_jax.tree import LAYERS as LAYERS
from qlora_jax.tree import Path as Path
from qlora_jax.tree import Shape as Shape
from qlora_jax.tree import hf_key as hf_key
from qlora_jax.tree import is_stacked as is_stacked
from qlora_jax.tree import parse_key as parse_key
from qlora_jax.tree import put as put
from qlora_jax.tree import walk as walk

PEFT_PREFIX = "base_model.model."


def keys(config: LlamaConfig) -> dict[str, tuple[Path, int | None]]:
    """Every Hugging Face key of a dense checkpoint, layer by layer."""
    table = list(shapes(config))
    stacked = [p for p in table if is_stacked(p)]
    first = table.index(stacked[0])
    out: dict[str, tuple[Path, int | None]] = {}
    for path in table[:first]:
        out[hf_key(path)] = (path, None)
    for layer in range(config.num_hidden_layers):
        for path in stacked:
            out[hf_key(path, layer)] = (path, layer)
    for path in table[first:]:
        if not is_stacked(path):
            out[hf_key(path)] = (path, None)
    return out


def leaf_dtype(leaf: Any) -> str:
    """Name of an array's dtype ("bfloat16"), be it numpy's or jax's."""
    return np.dtype(leaf.dtype).name


# Name of an array in our tree -> what PEFT's key has behind the module.
_SUFFIX = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter file, and its place in our tree."""

    path: names.Path
    """Of the array."""
    layer: int | None
    rank: int | None
    """Ranks used, where the array may have more."""
    shape: tuple[int, ...]
    """In the file."""
    copy: Literal["", "equal", "transposed"] = ""
    """Whether the array is held elsewhere in the file, and how this is a copy of it."""

    def view(self, array: Any) -> Any:
        """The part of the array that the file holds."""
        if self.layer is not None:
            array = array[self.layer]
        if self.rank is not None:
            in_rows = self.path[-1] in ("lora_A", "lora_embedding_A")
            array = array[: self.rank] if in_rows else array[:, : self.rank]
        return array.T if self.copy == "transposed" else array


def slots(selection: Selection, lora: LoraConfig) -> dict[str, Slot]:
    """Every key the adapter file has to have."""
    out: dict[str, Slot] = {}

    def key(module: names.Path, layer: int | None, suffix: str) -> str:
        return f"{names.PEFT_PREFIX}{names.hf_key(module, layer)}.{suffix}"

    adapted = set()
    for a in selection.adapted:
        for index, rank in enumerate(a.ranks):
            if not rank:
                continue
            layer = None if a.layers is None else index
            adapted.add((a.path, layer))
            for name, shape in a.parts_of(rank).items():
                ranked = name.endswith(("_A", "_B"))
                out[key(a.path, layer, _SUFFIX[name])] = Slot(
                    (*a.path, name), layer, rank if ranked else None, shape
                )
            if a.tied_to is not None:
                rows, columns = a.shape
                for name, other, shape in (
                    ("lora_A", "lora_embedding_B", (rank, columns)),
                    ("lora_B", "lora_embedding_A", (rows, rank)),
                ):
                    out[key(a.path, layer, _SUFFIX[name])] = Slot(
                        (*a.tied_to, other), None, rank, shape, "transposed"
                    )
    for w in selection.full_tensors:
        for index, chosen in enumerate(w.trained):
            if chosen:
                layer = None if w.layers is None else index
                module, name = w.path[:-1], w.path[-1]
                inside = "base_layer." if (module, layer) in adapted else ""
                out[key(module, layer, inside + name)] = Slot(
                    w.tied_to or w.path,
                    layer,
                    None,
                    w.shape,
                    "equal" if w.tied_to else "",
                )
    for r in selection.rows:
        if r.tied_to is None:
            name = "trainable_tokens_delta"
            out[key(r.path, None, f"token_adapter.{name}")] = Slot(
                (*r.path, name), None, None, (len(r.indices), r.features)
            )
    return out
