"""The weights of a base with an adapter merged in, tensor by tensor.

    linear      W' = W + s B A;  DoRA: its rows times m / |row|
    embedding   E' = E + s (B A)^T;  DoRA: its columns times m / |column|
    some rows   replaced, before the update is added
    bias        b' = b + s lora_bias
    full        replaced (modules_to_save)

The sums are float32 and are rounded once. A tensor is updated in blocks of rows, in
place where the dtype allows, so that no second array of its size is needed.

The result may have tensors that the base lacks: a bias, where the adapter has
`lora_bias`, and a separate head, where embedding and head of a tied model become
different. The configuration that `compute_merged_weights` returns has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.hf import cast
from convert.names import checkpoint_keys
from qlora_jax.errors import UserError
from qlora_jax.lora import (
    AdaptedModule,
    FullTensor,
    LoraConfig,
    Selection,
    TokenRows,
    select,
)
from qlora_jax.models import LlamaConfig, apply_changes
from qlora_jax.models import params as model_params
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, Path, hf_key, walk

# Elements per block: small against a tensor, large enough for fast products.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class Update:
    """The steps that change one tensor, in this order."""

    replacement: NDArray[np.float32] | None = None
    """Replaces the tensor."""
    rows: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """Row numbers, and the rows that replace them."""
    product: tuple[NDArray[np.float32], NDArray[np.float32], float] | None = None
    """[O, R], [R, I] and a factor; their product is added."""
    magnitude: NDArray[np.float32] | None = None
    """DoRA's norms, to which the rows (or columns) are rescaled."""
    of_columns: bool = False
    """Whether `magnitude` has the norms of columns."""
    added: NDArray[np.float32] | None = None
    """Is added (to a bias)."""

    def apply(
        self, tensor: NDArray, dtype: np.dtype, key: str
    ) -> tuple[NDArray, float]:
        """Computes the new tensor; `tensor` may be overwritten.

        Returns:
          (new tensor, largest absolute difference from the old one).

        Raises:
          CheckpointError: NaN, infinity or overflow, naming `key`.
        """
        # Each block is read before it is overwritten, so one array serves as both.
        in_place = tensor.dtype == dtype and tensor.flags.writeable
        out = tensor if in_place else np.empty(tensor.shape, dtype)
        largest = 0.0
        # A column's norm needs all rows: a pass of its own, before the first is
        # overwritten.
        factors = self._column_factors(tensor) if self.of_columns else None
        for block in _blocks(tensor.shape):
            old = tensor[block]
            new = cast(self._new(block, old, factors), dtype, key)
            # After rounding: an update that the dtype cannot hold does not count.
            difference = np.subtract(new, old, dtype=np.float32)
            np.abs(difference, out=difference)
            largest = max(largest, float(difference.max(initial=0.0)))
            out[block] = new
        return out, largest

    def _new(
        self, block: slice, old: NDArray, factors: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Returns the rows `block` in float32."""
        new = self._sum(block, old)
        if factors is not None:
            new *= factors
        elif self.magnitude is not None:
            # DoRA (arXiv 2402.09353): W' = m (W + s B A) / |W + s B A|, a norm for each
            # output, which is a row.
            squares = np.einsum("oi,oi->o", new, new)
            new *= _ratio(self.magnitude[block], squares)[:, None]
        return new

    def _sum(self, block: slice, old: NDArray) -> NDArray[np.float32]:
        """Returns the rows `block` before they are rescaled."""
        if self.replacement is not None:
            new = np.array(self.replacement[block], np.float32)
        elif self.product is not None:
            left, right, scaling = self.product
            new = left[block] @ right
            # W' = W + s (B A), every step in float32; `old` of 16 bits is widened in
            # the sum.
            new *= np.float32(scaling)
            np.add(new, self._replaced(block, old), out=new, dtype=np.float32)
        else:
            new = self._replaced(block, old).astype(np.float32)
        if self.added is not None:
            new += self.added[block]
        return new

    def _replaced(self, block: slice, old: NDArray) -> NDArray:
        if self.rows is None:
            return old
        numbers, rows = self.rows
        inside = (numbers >= block.start) & (numbers < block.stop)
        if not inside.any():
            return old
        new = old.astype(np.float32)
        new[numbers[inside] - block.start] = rows[inside]
        return new

    def _column_factors(self, tensor: NDArray) -> NDArray[np.float32]:
        assert self.magnitude is not None
        # float64: a column of an embedding has as many rows as the vocabulary.
        squares = np.zeros(tensor.shape[1])
        for block in _blocks(tensor.shape):
            new = self._sum(block, tensor[block])
            squares += np.einsum("oi,oi->i", new, new)
        return _ratio(self.magnitude, squares)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields slices of the leading axis, of about `_BLOCK` elements."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    step = max(_BLOCK // max(width, 1), 1)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _ratio(magnitude: NDArray[np.float32], squares: NDArray) -> NDArray[np.float32]:
    """DoRA's factors m / |row|, from the sums of squares."""
    norms = np.sqrt(squares).astype(np.float32)
    norms[norms == 0] = 1  # a row of zeros stays one
    return magnitude / norms


@dataclass(frozen=True)
class MergedWeights:
    """How a base with an adapter merged in differs from the base."""

    config: LlamaConfig
    """Of the result."""
    updates: Mapping[str, Update]
    """Hugging Face key -> its update; other tensors are unchanged."""
    sources: Mapping[str, str | None]
    """Added key -> key of the base that the tensor starts from; None for zeros."""


def compute_merged_weights(
    config: LlamaConfig, lora: LoraConfig, adapters: Mapping[str, Any]
) -> MergedWeights:
    """Finds the update of each tensor of a base.

    Args:
      config: of the base.
      lora: of the adapter.
      adapters: its tree (numpy arrays).

    Raises:
      UserError: a trained bias of a module that has none in such a checkpoint.
    """
    selection = select(model_params.abstract_base(config), lora)
    arrays = dict(walk(adapters))
    tied = config.tie_word_embeddings
    untie = tied and not _stay_equal(selection)
    merged_config = dataclasses.replace(
        apply_changes(config, lora.base_config_changes),
        tie_word_embeddings=tied and not untie,
        **dict.fromkeys(_needed_biases(config, selection, arrays), True),
    )
    fields: dict[str, dict[str, Any]] = {}
    for full in selection.full_tensors:
        _add_replacement(fields, full, arrays)
    for rows in selection.rows:
        _add_rows(fields, rows, arrays)
    for module in selection.adapted:
        _add_low_rank(fields, module, arrays)
    base_keys = checkpoint_keys(config)
    sources: dict[str, str | None] = {
        key: None for key in checkpoint_keys(merged_config) if key not in base_keys
    }
    head, embedding = (".".join((*path, "weight")) for path in (HEAD, EMBEDDING))
    if untie:
        sources[head] = embedding
    elif tied:
        fields.pop(head, None)  # equal to the embedding's
    updates = {key: Update(**values) for key, values in fields.items()}
    return MergedWeights(merged_config, updates, sources)


def _stay_equal(selection: Selection) -> bool:
    """Whether embedding and head of a tied model remain one table."""
    table, head_table = (*EMBEDDING, "weight"), (*HEAD, "weight")
    full = {tensor.path: tensor for tensor in selection.full_tensors}
    rows = {rows.path: rows for rows in selection.rows}
    adapted = {module.path: module for module in selection.adapted}
    for embedding, head in (
        (full.get(table), full.get(head_table)),
        (rows.get(EMBEDDING), rows.get(HEAD)),
        (adapted.get(EMBEDDING), adapted.get(HEAD)),
    ):
        if embedding is None and head is None:
            continue
        # Changed on one side only, or on both without sharing the update.
        if embedding is None or head is None or head.tied_to is None:
            return False
        if isinstance(embedding, AdaptedModule) and isinstance(head, AdaptedModule):
            # DoRA rescales the columns of the embedding and the rows of the head.
            if embedding.dora or embedding.scalings != head.scalings:
                return False
    return True


def _needed_biases(
    config: LlamaConfig, selection: Selection, arrays: Mapping[Path, NDArray]
) -> set[str]:
    """The configuration fields that give the result the biases of `lora_bias`."""
    base_shapes = model_params.shapes(config)
    needed = set()
    for module in selection.adapted:
        path = module.path
        if not module.lora_bias or (*path, "bias") in base_shapes:
            continue
        # Zeros change nothing, and need no tensor in the result.
        if not arrays[*path, "lora_bias"].any():
            continue
        rule = config.family.biases.get(path[-1]) if path[:-2] == LAYERS else None
        if not isinstance(rule, str):
            raise UserError(
                f"The adapter has a bias for `{'.'.join(path)}` (`lora_bias`), and a "
                f"checkpoint of model_type {config.model_type!r} has no bias there, so "
                "it cannot be merged. Use it as an adapter, or train without "
                "`lora_bias` on that module."
            )
        # A field stands for several projections; the others get zeros.
        needed.add(rule)
    return needed


def _add_replacement(
    fields: dict[str, dict[str, Any]],
    full: FullTensor,
    arrays: Mapping[Path, NDArray],
) -> None:
    array = arrays[full.tied_to or full.path]
    for index, is_trained in enumerate(full.trained):
        if is_trained:
            layer = None if full.layers is None else index
            value = array if layer is None else array[layer]
            fields.setdefault(hf_key(full.path, layer), {})["replacement"] = value


def _add_rows(
    fields: dict[str, dict[str, Any]],
    rows: TokenRows,
    arrays: Mapping[Path, NDArray],
) -> None:
    values = arrays[*(rows.tied_to or rows.path), "trainable_tokens_delta"]
    update = fields.setdefault(hf_key((*rows.path, "weight")), {})
    update["rows"] = np.asarray(rows.indices, np.int64), values


def _add_low_rank(
    fields: dict[str, dict[str, Any]],
    module: AdaptedModule,
    arrays: Mapping[Path, NDArray],
) -> None:
    by_table = module.kind == "embedding" or module.tied_to is not None
    left_name, right_name = (
        ("lora_embedding_A", "lora_embedding_B") if by_table else ("lora_B", "lora_A")
    )
    source = module.tied_to or module.path
    for index, (rank, scaling) in enumerate(
        zip(module.ranks, module.scalings, strict=True)
    ):
        if not rank:
            continue
        layer = None if module.layers is None else index

        def take(path: Path, layer: int | None = layer) -> NDArray:
            return arrays[path] if layer is None else arrays[path][layer]

        left, right = take((*source, left_name)), take((*source, right_name))
        if by_table:  # E + s (B A)^T
            # [rows, r] and [r, features].
            left, right = left[:rank].T, right[:, :rank].T
        else:
            # W + s B A: [out, r] and [r, in]; a stack is padded above this layer's
            # rank.
            left, right = left[:, :rank], right[:rank]
        magnitude = None
        if module.dora:
            # m may have been trained away from the norm even where B A is zero.
            magnitude = take((*module.path, "lora_magnitude_vector"))
        if module.dora or (left.any() and right.any()):  # else nothing is added
            update = fields.setdefault(hf_key((*module.path, "weight"), layer), {})
            update["product"] = left, right, scaling
            update["magnitude"] = magnitude
            update["of_columns"] = module.dora and module.kind == "embedding"
        if module.lora_bias:
            # PEFT scales the output of `lora_B`, which includes its bias.
            bias = take((*module.path, "lora_bias")) * np.float32(scaling)
            if bias.any():
                key = hf_key((*module.path, "bias"), layer)
                fields.setdefault(key, {})["added"] = bias
