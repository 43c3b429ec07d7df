"""Serves several adapters in one batch, one for each row.

stack = stack_adapters([(lora1, a1), (lora2, a2)], base)
logits = model.apply({"params": base, "lora": with_rows(stack, [0, 1, -1])}, tokens)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int
from numpy.typing import NDArray

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.combine import (
    Use,
    check_parts,
    factor_names,
    modules_of,
    numbered,
    read_adapter,
)
from qlora_jax.tree import Path, is_stacked


def stack_adapters(parts: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks N adapters, so that each row of a batch can have another one.

    The adapters may differ in rank, scaling, targets and layers: ranks are padded with
    zeros to the largest, and a module that an adapter lacks has zeros there. Arrays get
    an axis of adapters (lora_A [L, N, R, I], `scaling` [L, N]; without L outside the
    layers). A stack of equal shapes can be exchanged without compiling again.

    Args:
      parts: (configuration, trained tree) of each adapter, in the order of their
        indices.
      base: parameter tree of the model, of arrays or shapes; only its structure
        matters.

    Returns:
      The stack, for `with_rows`.

    Raises:
      UserError: no adapters, one that does not fit the base, or one that does more than
        add to weights: DoRA, tensors or token rows trained in full, a changed base.
    """
    check_parts(parts, weighted=False)
    if not parts:
        raise UserError("A stack needs at least one adapter, got none.")
    adapters = [
        read_adapter(name, lora, tree, base, index=index)
        for index, (name, (lora, tree)) in enumerate(
            zip(numbered(parts), parts, strict=True)
        )
    ]
    for adapter in adapters:
        for path in adapter.replaced:
            raise UserError(
                f"{adapter.name}: `{'.'.join(path)}` replaces a tensor of the base for "
                "all rows of a batch. Only low-rank updates can differ by row; adapt "
                "that module with LoRA."
            )
    stack: dict[str, Any] = {}
    for path, uses in modules_of(adapters).items():
        trees.node(stack, path).update(_stack_module(uses, len(adapters)))
    return stack


def _stack_module(uses: Sequence[Use], count: int) -> dict[str, Array]:
    """Stacks the arrays of one module over `count` adapters."""
    module = uses[0].module
    leading = () if module.layers is None else (module.layers,)
    # 0 where an adapter lacks the module, as its factors there.
    scaling = np.zeros((*leading, count), np.float32)
    arrays: dict[str, NDArray[np.float32]] = {}
    rank = max(use.arrays[factor_names(use.module)[0]].shape[-2] for use in uses)
    for adapter, a, own_arrays in uses:
        scaling[..., adapter.index] = a.scalings if a.layers else a.scalings[0]
        for name in own_arrays:
            if not name.startswith("lora_"):
                continue
            array = np.asarray(own_arrays[name], np.float32)
            # Zero rows of A and columns of B pad the ranks, and change no product.
            shape = list(array.shape[len(leading) :])
            used = [slice(n) for n in shape]
            if name.endswith("_A"):
                shape[0] = rank
            elif name.endswith("_B"):
                shape[1] = rank
            if name not in arrays:
                # [*L, N, R, I], [*L, N, O, R] or, of a bias, [*L, N, O].
                arrays[name] = np.zeros((*leading, count, *shape), np.float32)
            arrays[name][..., adapter.index, *used] = array
    return {name: jnp.asarray(v) for name, v in {**arrays, "scaling": scaling}.items()}


def with_rows(
    stack: Mapping[str, Any], rows: Int[Array, " B"] | Sequence[int] | NDArray
) -> dict[str, Any]:
    """Returns the "lora" collection with the adapter of each row of the batch.

    It is for `Llama.apply` and `generate_tokens`. Each layer reads the factors of every
    row, `B (O + I) R` numbers a module, and the weight that all rows share.

    Args:
      stack: from `stack_adapters`.
      rows: int [B], index of each row's adapter; -1 = the base without one. May be
        traced: what is compiled does not depend on the values.

    Raises:
      UserError: a tree that is not a stack; `rows` that are not integers, or no indices
        of adapters (unless they are traced).
    """
    known = None if isinstance(rows, Tracer) else np.asarray(rows)
    indices = jnp.asarray(rows)
    if indices.ndim != 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise UserError(
            "`rows` must be a list of integers, one for each row of the batch, got "
            f"{indices.dtype} of shape {list(indices.shape)}."
        )
    indices = indices.astype(jnp.int32)
    out = trees.copy(stack)
    for path, node in _adapted_nodes(out, ()):
        scaling = node["scaling"]
        if scaling.ndim != 1 + is_stacked(path):
            raise UserError(
                f"`{'.'.join(path)}` has one adapter, not a stack. Give what "
                "`stack_adapters` returns."
            )
        count = scaling.shape[-1]
        if known is not None and known.size:
            low, high = int(known.min()), int(known.max())
            if low < -1 or high >= count:
                raise UserError(
                    f"`rows` has {low if low < -1 else high}, and the stack has "
                    f"{count} adapters (0 to {count - 1}; -1 for none)."
                )
        # A copy for each layer: the scan over layers slices every leaf.
        shape = (*scaling.shape[:-1], *indices.shape)
        node["rows"] = jnp.broadcast_to(indices, shape)
    return out


def _adapted_nodes(
    node: dict[str, Any], path: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    if "scaling" in node:
        yield path, node
    for name, child in node.items():
        if isinstance(child, dict):
            yield from _adapted_nodes(child, (*path, name))
