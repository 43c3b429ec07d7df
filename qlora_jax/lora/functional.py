"""LoRA as pure functions on trees and arrays.

Adapters are a second tree beside the base, with the same module paths; the tree itself
decides what is adapted. A linear layer `y = W x` with {lora_A, lora_B} becomes
`y = W x + scaling * B (A x)` (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    base      {"model": {"layers": {"self_attn": {"q_proj": {"weight": [L, O, I]}}}}}
    adapters  {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": [L, R, I],
                                                             "lora_B": [L, O, R]}}}}}

Arrays of a module (layers are stacked on a leading axis L; float32; PEFT's names):

    linear      lora_A [R, I], lora_B [O, R]; lora_bias [O]; lora_magnitude_vector [O]
    embedding   lora_embedding_A [R, V], lora_embedding_B [D, R];
                lora_magnitude_vector [D]
    some rows   trainable_tokens_delta [n, D], which replace the rows (PEFT's name)
    whole       weight or bias, which replace the base's

`bind` makes of the trained tree what the model takes: it adds the constants (scalings,
which layers, which rows) and lets a tied head share what it shares. It is called where
the gradient is taken, so that shared arrays get the sum of their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.product import dense_matmul, precision
from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import Path


def bind(
    adapters: Mapping[str, Any], base: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Completes a trained tree to the "lora" collection that the model takes.

    Adds, under the module they belong to: `scaling` ([L], or [] outside the stack),
    `weight_trained` and `bias_trained` (bool [L]) where a tensor is trained in some
    layers only, `token_indices` [n] of rows that are trained alone; and, where the
    output head is tied to the embedding, the head's share of what trains both. Nothing
    is computed but transposes, so it costs nothing inside a jitted step.

    Args:
      adapters: from `init_adapters` or `convert.load_adapter`.
      base: parameter tree, arrays or shapes; only its structure matters.
      lora: the configuration the adapters belong to.

    Raises:
      UserError: arrays that `lora` does not describe for this base, or lack of some.
    """
    selection = select(base, lora)
    _check(adapters, selection.shapes())
    bound = trees.copy(adapters)
    for a in selection.adapted:
        node = trees.node(bound, a.path)
        if a.tied_to is not None:
            other = trees.node(bound, a.tied_to)
            node["lora_A"] = jnp.transpose(other["lora_embedding_B"])
            node["lora_B"] = jnp.transpose(other["lora_embedding_A"])
        scalings = np.asarray(a.scalings, np.float32)
        node["scaling"] = jnp.asarray(scalings if a.layers else scalings[0])
    for w in selection.full_tensors:
        node = trees.node(bound, w.path[:-1])
        if w.tied_to is not None:
            node[w.path[-1]] = trees.node(bound, w.tied_to[:-1])[w.tied_to[-1]]
        elif not all(w.trained):
            node[f"{w.path[-1]}_trained"] = jnp.asarray(np.asarray(w.trained))
    for r in selection.rows:
        node = trees.node(bound, r.path)
        if r.tied_to is not None:
            other = trees.node(bound, r.tied_to)
            node["trainable_tokens_delta"] = other["trainable_tokens_delta"]
        node["token_indices"] = jnp.asarray(np.asarray(r.indices, np.int32))
    return bound


def abstract_adapters(base: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """Returns the shapes of the trained tree that `lora` describes for this base."""
    tree: dict[str, Any] = {}
    for path, shape in select(base, lora).shapes().items():
        trees.put(tree, path, jax.ShapeDtypeStruct(shape, jnp.float32))
    return tree


def delta(
    x: Float[Array, "*B I"],
    adapter: Mapping[str, Array],
    scaling: float | Array,
    *,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "*B O"]:
    """Computes `scaling * (B (A dropout(x)) + lora_bias)` in the dtype of `x`.

    The scale is applied to the rank-wide product, the smallest tensor on the way.

    Args:
      x: inputs, features last.
      adapter: {"lora_A": [R, I], "lora_B": [O, R]}, perhaps "lora_bias" [O]; or, with
        "rows" (int32 [B], an adapter's number for each row of `x`, -1 = none), all of
        them with a leading axis of adapters.
      scaling: factor of the update; with "rows" [N].
      dropout: probability of dropping an input element; 0 or no key = none.
      key: PRNG key for the dropout mask.

    Returns:
      The update [..., O].

    Raises:
      UserError: a leading axis of adapters without "rows", or "rows" of another batch.
    """
    if dropout > 0.0 and key is not None:
        keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros((), x.dtype))
    if "rows" in adapter:
        return _mixed(x, adapter, jnp.asarray(scaling))
    refuse_stack(adapter["lora_A"])
    inner = checkpoint_name(dense_matmul(x, adapter["lora_A"]), "lora_inner")
    y: Any = dense_matmul(_scaled(inner, scaling), adapter["lora_B"])
    if "lora_bias" in adapter:
        bias = _scaled(adapter["lora_bias"], scaling).astype(y.dtype)
        y = y + jnp.expand_dims(bias, range(y.ndim - 1))
    return y


def _scaled(x: Array, scaling: float | Array) -> Array:
    """In float32: a factor rounded to bf16 would be off by up to 0.4 %."""
    factor = jnp.asarray(scaling, jnp.float32)
    factor = jnp.expand_dims(factor, range(x.ndim)) if factor.ndim == 0 else factor
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _mixed(x: Array, adapter: Mapping[str, Array], scaling: Array) -> Array:
    """The update with an adapter of its own for each row of the batch.

    Reads, in every layer, a copy of A and B for each row.
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])  # the head in generation has no T
    number, chosen = pick_rows(adapter["rows"], x)
    a, b = adapter["lora_A"][number], adapter["lora_B"][number]
    factor = jnp.expand_dims(scaling[number], (1, 2))
    product = partial(jnp.einsum, precision=precision(x.dtype))
    inner = product("bti,bri->btr", flat, a.astype(x.dtype))
    inner = (inner.astype(jnp.float32) * factor).astype(x.dtype)
    y = product("btr,bor->bto", inner, b.astype(x.dtype))
    if "lora_bias" in adapter:
        bias = jnp.expand_dims(adapter["lora_bias"][number], 1) * factor
        y = y + bias.astype(y.dtype)
    y = jnp.where(chosen, y, jnp.zeros((), y.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def pick_rows(
    rows: Int[Array, " B"], x: Array
) -> tuple[Int[Array, " B"], Bool[Array, "B 1 1"]]:
    """Which adapter each row reads, and whether it has one at all.

    Raises:
      UserError: a batch that `rows` was not made for.
    """
    if x.shape[0] != rows.shape[0]:
        raise UserError(
            f"`rows` names the adapters of {rows.shape[0]} rows, and the batch is of "
            f"shape {list(x.shape)}. Give `with_rows` one number for each row of it."
        )
    return jnp.maximum(rows, 0), jnp.expand_dims(rows >= 0, (1, 2))


def refuse_stack(array: Array) -> None:
    """Refuses adapters in a stack where nothing says which row has which.

    Raises:
      UserError: a factor with an axis of adapters.
    """
    if array.ndim == 3:
        raise UserError(
            f"This is a stack of {array.shape[0]} adapters, and nothing says which row "
            "of the batch has which. Give the model `with_rows(stack, rows)`."
        )


def row_norms(
    weight: Float[Array, "O I"] | NF4Tensor,
    a: Float32[Array, "R I"] | None = None,
    b: Float32[Array, "O R"] | None = None,
    scaling: float | Array = 1.0,
    *,
    dtype: Any = jnp.float32,
) -> Float32[Array, " O"]:
    """Computes the 2-norm of each row of `W + scaling * B A` without forming it.

    `|W + sBA|^2 = |W|^2 + 2s (W A^T) . B + s^2 (B (A A^T)) . B`, row by row: one
    product of W with the R rows of A, where forming B A would write another W. No
    gradient flows through it, as DoRA has it (arXiv:2402.09353, section 4.3).

    Args:
      weight: array, or NF4 tensor.
      a: lora_A; None = the norms of W alone.
      b: lora_B.
      scaling: factor of `B A`.
      dtype: in which W is dequantized and multiplied.
    """
    if isinstance(weight, NF4Tensor):
        dense = nf4.dequantize(weight, dtype)
    else:
        dense = weight.astype(dtype)
    dense = jax.lax.stop_gradient(dense)
    wide = dense.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=1)
    if a is not None and b is not None:
        a, b = jax.lax.stop_gradient(a), jax.lax.stop_gradient(b)
        s = jnp.asarray(scaling, jnp.float32)
        cross: Any = dense_matmul(a.astype(dtype), dense, jnp.float32)  # [R, O]
        gram: Any = dense_matmul(a, a)
        both: Any = dense_matmul(b, gram)
        square = square + jnp.sum((2.0 * s * cross.T + s * s * both) * b, axis=1)
    # Rounding may leave a tiny negative number where the row is zero.
    return jnp.sqrt(jnp.maximum(square, 0.0))


def rescale(
    magnitude: Float32[Array, " O"],
    norms: Float32[Array, " O"],
    scaling: float | Array,
) -> Float32[Array, " O"]:
    """DoRA's factor of each output, 1 in a layer that is not adapted (scaling 0)."""
    norms = checkpoint_name(jax.lax.stop_gradient(norms), "dora_norm")
    # A zero row stays zero, whatever its magnitude.
    factor = magnitude / jnp.where(norms > 0.0, norms, 1.0)
    return jnp.where(jnp.asarray(scaling) > 0.0, factor, 1.0)


def replace_columns(
    y: Float[Array, "*B V"],
    x: Float[Array, "*B D"],
    rows: Float32[Array, "n D"],
    indices: Int[Array, " n"],
) -> Float[Array, "*B V"]:
    """The product `x W^T` after some rows of W were replaced."""
    own: Any = dense_matmul(x, rows, y.dtype)
    return y.at[..., indices].set(own, unique_indices=True)


def _check(adapters: Mapping[str, Any], wanted: Mapping[Path, tuple[int, ...]]) -> None:
    found = {
        tuple(k.key for k in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)
    }
    problems = [f"no {'.'.join(p)}" for p in wanted if p not in found]
    problems += [f"unexpected {'.'.join(p)}" for p in found if p not in wanted]
    problems += [
        f"{'.'.join(p)} {list(found[p])} instead of {list(shape)}"
        for p, shape in wanted.items()
        if p in found and found[p] != tuple(shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            "The adapter tree is not the one its LoRA configuration describes for "
            f"this model: {'; '.join(problems[:5])}{more}."
        )
