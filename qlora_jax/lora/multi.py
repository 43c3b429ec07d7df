"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int
from numpy.typing import NDArray

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.combine import (
    _adapted_nodes,
    _check_parts,
    _numbered,
    _rank,
    _read,
    _union,
)
from qlora_jax.tree import LAYERS


def stack_adapters(parts: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """Puts N adapters side by side, so that each row of a batch can have its own.

    The adapters may differ in rank, scaling, targets and layers: ranks are padded with
    zeros to the largest, and a module that an adapter lacks has zeros there. Arrays get
    an axis of adapters (lora_A [L, N, R, I], `scaling` [L, N]; without L outside the
    layers). A stack of equal shapes takes the place of another without compiling
    anything again.

    Args:
      parts: (configuration, trained tree) of each adapter; its number is its place.
      base: parameter tree of the model, of arrays or shapes; only its structure
        matters.

    Returns:
      What `with_rows` takes.

    Raises:
      UserError: no adapters, one that does not fit the base, or one that does more than
        add to weights: DoRA, tensors or token rows trained whole, a changed base.
    """
    _check_parts(parts, weighted=False)
    if not parts:
        raise UserError("A stack needs at least one adapter, got none.")
    read = [
        _read(name, number, lora, tree, 1.0, base)
        for number, (name, (lora, tree)) in enumerate(
            zip(_numbered(parts), parts, strict=True)
        )
    ]
    for one in read:
        for where in one.replaced:
            raise UserError(
                f"{one.name}: `{'.'.join(where)}` replaces what the base "
                "has, for all rows of a batch. Only updates of low rank can differ "
                "from row to row; adapt that module with LoRA."
            )
    stacked: dict[str, Any] = {}
    for path, found in _union(read).items():
        first = found[0][1]
        leading = () if first.layers is None else (first.layers,)
        scaling = np.zeros((*leading, len(read)), np.float32)
        arrays: dict[str, NDArray[np.float32]] = {}
        wide = max(_rank(a, node) for _, a, node in found)
        for one, a, node in found:
            scaling[..., one.number] = a.scalings if a.layers else a.scalings[0]
            for name in [n for n in node if n.startswith("lora_")]:
                array = np.asarray(node[name], np.float32)
                shape, place = list(array.shape[len(leading) :]), [slice(None)]
                if name.endswith("_A"):
                    shape[0], place = wide, [slice(shape[0]), slice(None)]
                elif name.endswith("_B"):
                    shape[1], place = wide, [slice(None), slice(shape[1])]
                if name not in arrays:
                    full = (*leading, len(read), *shape)
                    arrays[name] = np.zeros(full, np.float32)
                arrays[name][..., one.number, *place] = array
        trees.node(stacked, path).update(
            {name: jnp.asarray(array) for name, array in arrays.items()},
            scaling=jnp.asarray(scaling),
        )
    return stacked


def with_rows(
    stack: Mapping[str, Any], rows: Int[Array, " B"] | Sequence[int] | NDArray
) -> dict[str, Any]:
    """Says which adapter of a stack each row of the batch has.

    The result is the "lora" collection for `Llama.apply` and `generate_tokens`. Each
    layer reads the factors of every row, `B (O + I) R` numbers a module, beside the
    weight that all rows share.

    Args:
      stack: from `stack_adapters`.
      rows: int [B], an adapter's number for each row; -1 = the base alone. May be
        traced: what is compiled does not depend on the numbers.

    Raises:
      UserError: a tree that is no stack; numbers that are no integers, or of no adapter
        (as far as they are known when this is called).
    """
    known = None if isinstance(rows, Tracer) else np.asarray(rows)
    own = jnp.asarray(rows)
    if own.ndim != 1 or not jnp.issubdtype(own.dtype, jnp.integer):
        raise UserError(
            "`rows` must be a list of integers, one for each row of the batch, got "
            f"{own.dtype} of shape {list(own.shape)}."
        )
    own = own.astype(jnp.int32)
    out = trees.copy(stack)
    for path, node in _adapted_nodes(out, ()):
        in_layers = path[: len(LAYERS)] == LAYERS
        scaling = node["scaling"]
        if scaling.ndim != 1 + in_layers:
            raise UserError(
                f"`{'.'.join(path)}` holds one adapter and no stack of them. Give "
                "what `stack_adapters` returns."
            )
        count = scaling.shape[-1]
        if known is not None and known.size:
            low, high = int(known.min()), int(known.max())
            if low < -1 or high >= count:
                raise UserError(
                    f"`rows` has {low if low < -1 else high}, and the stack has "
                    f"{count} adapters (0 to {count - 1}; -1 for none)."
                )
        shape = (scaling.shape[0], *own.shape) if in_layers else own.shape
        node["rows"] = jnp.broadcast_to(own, shape)
    return out
