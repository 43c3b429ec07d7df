"""The key tables: the name of each tensor in a file -> its path in our parameter tree.

`qlora_jax.tree` spells a path as a Hugging Face key and back. `checkpoint_keys` lists
the keys of a dense checkpoint, `adapter_keys` those of a PEFT adapter, which are module
names of the checkpoint between a prefix and the name of an array:

    base_model.model. <module>  .lora_A.weight [r, in], .lora_B.weight [out, r]
                                .lora_B.bias, .lora_magnitude_vector [out]
                                .lora_embedding_A [r, rows], .lora_embedding_B
                                .token_adapter.trainable_tokens_delta [n, features]
                                .base_layer.bias of an adapted module, .bias of others
                                .weight of a fully trained module
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qlora_jax.lora import AdaptedModule, LoraConfig, Selection
from qlora_jax.models import LlamaConfig, shapes
from qlora_jax.tree import Path, Shape, hf_key, is_stacked

PEFT_PREFIX = "base_model.model."

# Name of an array in our tree -> what PEFT's key has behind the module.
# A linear's pair are modules in PEFT and have a `weight`; an embedding's are bare
# arrays.
_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}


def checkpoint_keys(config: LlamaConfig) -> dict[str, tuple[Path, int | None]]:
    """Returns (path, layer) of every key of a dense checkpoint, layer by layer."""
    paths = list(shapes(config))
    stacked = [path for path in paths if is_stacked(path)]
    first = paths.index(stacked[0])
    single: list[tuple[Path, int | None]] = [
        (path, None) for path in paths if not is_stacked(path)
    ]
    layers: list[tuple[Path, int | None]] = [
        (path, layer) for layer in range(config.num_hidden_layers) for path in stacked
    ]
    # The layers follow the embeddings, as in a checkpoint; nothing stacked precedes.
    table = (*single[:first], *layers, *single[first:])
    return {hf_key(path, layer): (path, layer) for path, layer in table}


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter file, and the array in our tree that holds it."""

    path: Path
    """Of the array."""
    layer: int | None
    rank: int | None
    """Rank of the update in this layer; the array may be padded to a larger one."""
    shape: Shape
    """In the file."""
    copy: Literal["", "equal", "transposed"] = ""
    """How this is a copy of another tensor in the file, for a tied head."""

    @property
    def module(self) -> tuple[Path, int | None]:
        """The module in one layer that the tensor belongs to."""
        return self.path[:-1], self.layer

    @property
    def is_update(self) -> bool:
        """Whether this is a part of a low-rank update."""
        return self.path[-1].startswith("lora_")

    def view(self, array: Any) -> Any:
        """Returns the part of the array that the file holds."""
        if self.layer is not None:
            array = array[self.layer]
        if self.rank is not None:
            # A is [r, in] and B [out, r]. A stack is padded to the largest rank of its
            # layers; the padding is not in the file.
            rank_first = self.path[-1] in ("lora_A", "lora_embedding_A")
            array = array[: self.rank] if rank_first else array[:, : self.rank]
        return array.T if self.copy == "transposed" else array


def adapter_keys(selection: Selection, lora: LoraConfig) -> dict[str, AdapterTensor]:
    """Returns every key that the file of an adapter must have.

    Args:
      selection: what the adapter's configuration selects in the model.
      lora: that configuration.
    """
    tensors: dict[str, AdapterTensor] = {}
    adapted = set()
    for module in selection.adapted:
        for index, rank in enumerate(module.ranks):
            if rank:
                layer = None if module.layers is None else index
                adapted.add((module.path, layer))
                tensors.update(_update_keys(module, layer, rank))
    for full in selection.full_tensors:
        path, name = full.path[:-1], full.path[-1]
        for index, is_trained in enumerate(full.trained):
            if not is_trained:
                continue
            layer = None if full.layers is None else index
            # PEFT wraps an adapted module: its own weight and bias move to
            # `base_layer`.
            prefix = "base_layer." if (path, layer) in adapted else ""
            tensors[adapter_key(path, layer, prefix + name)] = AdapterTensor(
                path=full.tied_to or full.path,
                layer=layer,
                rank=None,
                shape=full.shape,
                copy="equal" if full.tied_to else "",
            )
    for rows in selection.rows:
        # Of tied tables PEFT saves the embedding's rows only.
        if rows.tied_to is None:
            # Despite its name it holds the new rows, not their differences.
            name = "trainable_tokens_delta"
            tensors[adapter_key(rows.path, None, f"token_adapter.{name}")] = (
                AdapterTensor(
                    path=(*rows.path, name),
                    layer=None,
                    rank=None,
                    shape=(len(rows.indices), rows.features),
                )
            )
    return tensors


def adapter_key(module: Path, layer: int | None, suffix: str) -> str:
    """Spells a tensor of a module as PEFT does."""
    return f"{PEFT_PREFIX}{hf_key(module, layer)}.{suffix}"


def _update_keys(
    module: AdaptedModule, layer: int | None, rank: int
) -> dict[str, AdapterTensor]:
    """The tensors of one module's update in one layer."""
    tensors = {}
    for name, shape in module.parts_of(rank).items():
        tensors[adapter_key(module.path, layer, _SUFFIXES[name])] = AdapterTensor(
            path=(*module.path, name),
            layer=layer,
            # Biases and magnitudes are the vectors without a rank axis.
            rank=rank if name.endswith(("_A", "_B")) else None,
            shape=shape,
        )
    if module.tied_to is not None:
        # A head computes x E^T: the embedding's pair, transposed and exchanged.
        # E + s (B A)^T = E + s A^T B^T, with A [r, rows] and B [columns, r], so that
        # the head's pair is lora_B = A^T and lora_A = B^T.
        rows, columns = module.shape
        for name, source, shape in (
            ("lora_A", "lora_embedding_B", (rank, columns)),
            ("lora_B", "lora_embedding_A", (rows, rank)),
        ):
            tensors[adapter_key(module.path, layer, _SUFFIXES[name])] = AdapterTensor(
                path=(*module.tied_to, source),
                layer=None,
                rank=rank,
                shape=shape,
                copy="transposed",
            )
    return tensors
