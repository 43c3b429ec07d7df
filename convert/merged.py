"""What each tensor of a base becomes when an adapter is folded into it.

    linear      W' = W + s B A;  DoRA: its rows times m / |row|
    embedding   E' = E + s (B A)^T;  DoRA: its columns times m / |column|
    some rows   replaced, before the update is added
    bias        b' = b + s lora_bias
    whole       replaced

The sums are float32 and are rounded once. A tensor is worked on in blocks of rows, in
its own place where the dtype allows, so that nothing of its size is held beside it.

The result may need what the base has not: a bias, where an adapter has `lora_bias`, and
a head of its own, where embedding and head of a tied model come apart. `fold` says so
with the configuration it returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import names
from convert.hf import cast
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import (
    AdaptedModule,
    FullTensor,
    Selection,
    TokenRows,
    select,
)
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig, apply_changes
from qlora_jax.tree import EMBEDDING, HEAD, PROJECTIONS

# Elements worked on in one go: small against a tensor, large enough for the products.
_BLOCK = 1 << 21

_BIASED = {"self_attn": "attention_bias", "mlp": "mlp_bias"}


@dataclass(frozen=True)
class Update:
    """What is done to one tensor, in this order."""

    whole: NDArray[np.float32] | None = None
    """Takes its place."""
    rows: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """Numbers of rows, and what takes their place."""
    product: tuple[NDArray[np.float32], NDArray[np.float32], float] | None = None
    """[O, R], [R, I] and a factor: their product is added."""
    magnitude: NDArray[np.float32] | None = None
    """Norms that the rows get, or ..."""
    of_columns: bool = False
    """... the columns."""
    added: NDArray[np.float32] | None = None
    """Is added (to a bias)."""

    def apply(
        self, tensor: NDArray, dtype: np.dtype, key: str
    ) -> tuple[NDArray, float]:
        """Computes the new tensor; `tensor` may be overwritten.

        Returns:
          It, and the largest absolute difference from the old one.

        Raises:
          CheckpointError: NaN, infinity or overflow, naming `key`.
        """
        in_place = tensor.dtype == dtype and tensor.flags.writeable
        out = tensor if in_place else np.empty(tensor.shape, dtype)
        largest = 0.0
        factors = self._column_factors(tensor) if self.of_columns else None
        for block in _blocks(tensor.shape):
            old = tensor[block]
            new = cast(self._new(block, old, factors), dtype, key)
            difference = np.subtract(new, old, dtype=np.float32)
            np.abs(difference, out=difference)
            largest = max(largest, float(difference.max(initial=0.0)))
            out[block] = new
        return out, largest

    def _new(
        self, block: slice, old: NDArray, factors: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """The rows `block` in float32."""
        new = self._sum(block, old)
        if factors is not None:
            new *= factors
        elif self.magnitude is not None:
            squares = np.einsum("oi,oi->o", new, new)
            new *= _ratio(self.magnitude[block], squares)[:, None]
        return new

    def _sum(self, block: slice, old: NDArray) -> NDArray[np.float32]:
        """The rows `block` before they are rescaled."""
        if self.whole is not None:
            new = np.array(self.whole[block], np.float32)
        elif self.product is not None:
            left, right, scaling = self.product
            new = left[block] @ right
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
        squares = np.zeros(tensor.shape[1])
        for block in _blocks(tensor.shape):
            new = self._sum(block, tensor[block])
            squares += np.einsum("oi,oi->i", new, new)
        return _ratio(self.magnitude, squares)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the leading axis."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    step = max(_BLOCK // max(width, 1), 1)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _ratio(magnitude: NDArray[np.float32], squares: NDArray) -> NDArray[np.float32]:
    """DoRA's factors. A row (or column) of zeros stays one."""
    norms = np.sqrt(squares).astype(np.float32)
    norms[norms == 0] = 1
    return magnitude / norms


@dataclass(frozen=True)
class Folded:
    """A base with an adapter in it: what it is, and what is done to which tensor."""

    config: LlamaConfig
    """Of the result."""
    updates: Mapping[str, Update]
    """Hugging Face key -> what is done; other tensors are not changed."""
    sources: Mapping[str, str | None]
    """Tensors that the base has not -> the one they start from, or None for zeros."""


def fold(config: LlamaConfig, lora: LoraConfig, adapters: Mapping[str, Any]) -> Folded:
    """Finds what an adapter does to each tensor of a base.

    Args:
      config: of the base.
      lora: of the adapter.
      adapters: its tree (numpy arrays).

    Raises:
      UserError: a trained bias where the base can have none.
    """
    selection = select(model_params.abstract_base(config), lora)
    arrays = dict(names.walk(adapters))
    tied = config.tie_word_embeddings
    untie = tied and not _stay_equal(selection)
    flags = _needed_biases(config, selection, arrays)
    folded = dataclasses.replace(
        apply_changes(config, lora.base_config_changes),
        tie_word_embeddings=tied and not untie,
        **dict.fromkeys(flags, True),
    )
    parts: dict[str, dict[str, Any]] = {}
    for w in selection.full_tensors:
        _whole(parts, w, arrays)
    for r in selection.rows:
        _rows(parts, r, arrays)
    for a in selection.adapted:
        _adapted(parts, a, arrays)
    known = names.keys(config)
    sources: dict[str, str | None] = {
        key: None for key in names.keys(folded) if key not in known
    }
    head, embedding = (".".join((*path, "weight")) for path in (HEAD, EMBEDDING))
    if untie:
        sources[head] = embedding
    elif tied:
        parts.pop(head, None)  # the embedding's, which it equals
    return Folded(
        folded, {key: Update(**given) for key, given in parts.items()}, sources
    )


def _stay_equal(selection: Selection) -> bool:
    """Whether embedding and head of a tied model remain one table."""
    table, head = (*EMBEDDING, "weight"), (*HEAD, "weight")
    wholes = {w.path: w for w in selection.full_tensors}
    rows = {r.path: r for r in selection.rows}
    adapted = {a.path: a for a in selection.adapted}
    for one, two in (
        (wholes.get(table), wholes.get(head)),
        (rows.get(EMBEDDING), rows.get(HEAD)),
        (adapted.get(EMBEDDING), adapted.get(HEAD)),
    ):
        if one is None and two is None:
            continue
        if one is None or two is None or two.tied_to is None:
            return False
        if isinstance(one, AdaptedModule) and isinstance(two, AdaptedModule):
            # DoRA rescales the columns of the one and the rows of the other.
            if one.dora or one.scalings != two.scalings:
                return False
    return True


def _needed_biases(
    config: LlamaConfig, selection: Selection, arrays: Mapping[names.Path, NDArray]
) -> set[str]:
    """The configuration's switches of biases that `lora_bias` needs."""
    known = model_params.shapes(config)
    needed = set()
    for a in selection.adapted:
        if not a.lora_bias or (*a.path, "bias") in known:
            continue
        if not arrays[*a.path, "lora_bias"].any():
            continue
        block = a.path[-2] if a.path[:-2] == names.LAYERS else ""
        if block not in _BIASED or a.path[-1] not in PROJECTIONS:
            raise UserError(
                f"The adapter has a bias for `{'.'.join(a.path)}` (`lora_bias`), and "
                "a Llama checkpoint has no place for a bias there, so it cannot be "
                "merged. Use it as an adapter, or train without `lora_bias` on that "
                "module."
            )
        needed.add(_BIASED[block])
    return needed


def _whole(
    parts: dict[str, dict[str, Any]],
    w: FullTensor,
    arrays: Mapping[names.Path, NDArray],
) -> None:
    array = arrays[w.tied_to or w.path]
    for index, chosen in enumerate(w.trained):
        if chosen:
            layer = None if w.layers is None else index
            value = array if layer is None else array[layer]
            parts.setdefault(names.hf_key(w.path, layer), {})["whole"] = value


def _rows(
    parts: dict[str, dict[str, Any]], r: TokenRows, arrays: Mapping[names.Path, NDArray]
) -> None:
    rows = arrays[*(r.tied_to or r.path), "trainable_tokens_delta"]
    part = parts.setdefault(".".join((*r.path, "weight")), {})
    part["rows"] = np.asarray(r.indices, np.int64), rows


def _adapted(
    parts: dict[str, dict[str, Any]],
    a: AdaptedModule,
    arrays: Mapping[names.Path, NDArray],
) -> None:
    by_table = a.kind == "embedding" or a.tied_to is not None
    left, right = (
        ("lora_embedding_A", "lora_embedding_B") if by_table else ("lora_B", "lora_A")
    )
    place = a.tied_to or a.path
    for index, (rank, scaling) in enumerate(zip(a.ranks, a.scalings, strict=True)):
        if not rank:
            continue
        layer = None if a.layers is None else index

        def take(path: names.Path, layer: int | None = layer) -> NDArray:
            return arrays[path] if layer is None else arrays[path][layer]

        one, two = take((*place, left)), take((*place, right))
        if by_table:  # E + s (B A)^T
            one, two = one[:rank].T, two[:, :rank].T
        else:
            one, two = one[:, :rank], two[:rank]
        magnitude = None
        if a.dora:
            magnitude = take((*a.path, "lora_magnitude_vector"))
        if a.dora or (one.any() and two.any()):  # else nothing is added
            part = parts.setdefault(names.hf_key((*a.path, "weight"), layer), {})
            part.update(product=(one, two, scaling), magnitude=magnitude)
            part["of_columns"] = a.dora and a.kind == "embedding"
        if a.lora_bias:
            bias = take((*a.path, "lora_bias")) * np.float32(scaling)
            if bias.any():
                key = names.hf_key((*a.path, "bias"), layer)
                parts.setdefault(key, {})["added"] = bias
