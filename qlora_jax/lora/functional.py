"""LoRA as pure functions on trees and arrays.

Adapters are a second tree with the module paths of the base; its leaves decide what is
adapted. A linear layer `y = W x` with {lora_A, lora_B} becomes
`y = W x + scaling * B (A x)` (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    base      {"model": {"layers": {"self_attn": {"q_proj": {"weight": [L, O, I]}}}}}
    adapters  {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": [L, R, I],
                                                             "lora_B": [L, O, R]}}}}}

Arrays of a module (layers are stacked on a leading axis L; float32; PEFT's names):

    linear      lora_A [R, I], lora_B [O, R]; lora_bias [O]; lora_magnitude_vector [O]
    embedding   lora_embedding_A [R, V], lora_embedding_B [D, R];
                lora_magnitude_vector [D]
    token rows  trainable_tokens_delta [n, D], which replace the rows (PEFT's name)
    in full     weight or bias, which replace those of the base

`bind` turns the trained tree into the "lora" collection of the model: it adds the
constants (scalings, layers, rows) and the arrays that a tied head shares. It is called
inside the function that is differentiated, so that shared arrays get the sum of their
gradients.
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
from qlora_jax.lora.dropout import drop
from qlora_jax.lora.targets import select
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import Path, Shape


def bind(
    adapters: Mapping[str, Any], base: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Returns the "lora" collection of the model: the trained tree with its constants.

    Adds to each module: `scaling` ([L], or [] outside the stack), `weight_trained` and
    `bias_trained` (bool [L]) where a tensor is trained in some layers only,
    `token_indices` [n] of rows that are trained alone, and to a tied head the arrays it
    shares with the embedding. It only transposes, which costs nothing under jit.

    Args:
      adapters: from `init_adapters` or `convert.load_adapter`.
      base: parameter tree, arrays or shapes; only its structure matters.
      lora: the configuration the adapters belong to.

    Raises:
      UserError: arrays that are missing, or that `lora` does not have on this base.
    """
    selection = select(base, lora)
    _check_shapes(adapters, selection.shapes())
    bound = trees.copy(adapters)
    for a in selection.adapted:
        node = trees.node(bound, a.path)
        if a.tied_to is not None:
            other = trees.node(bound, a.tied_to)
            # The table E + s (B A)^T = E + s A^T B^T is the head's weight [V, D], so
            # its factors are lora_B = A^T and lora_A = B^T.
            node["lora_A"] = jnp.transpose(other["lora_embedding_B"])
            node["lora_B"] = jnp.transpose(other["lora_embedding_A"])
        # A constant, not a leaf of the trained tree: no optimizer sees it.
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
    """Returns the shapes of the trained tree of `lora` on this base."""
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
    index: Int[Array, " T"] | None = None,
    saved: bool = False,
) -> Float[Array, "*B O"]:
    """Computes `scaling * (B (A dropout(x)) + lora_bias)` in the dtype of `x`.

    The scaling multiplies `A x`, the smallest tensor on the way: [..., R].

    Args:
      x: inputs, features last.
      adapter: {"lora_A": [R, I], "lora_B": [O, R]}, optional "lora_bias" [O]; with
        "rows" (int32 [B], index of the adapter of each row of `x`, -1 = none) all of
        them have a leading axis of adapters.
      scaling: factor of the update; with "rows" [N].
      dropout: probability of dropping an input element; 0 or no key = none.
      key: PRNG key for the dropout mask.
      index: of the tokens of x in their rows, as `dropout.draw` takes it.
      saved: as `name_product` takes it.

    Returns:
      The update [..., O].

    Raises:
      UserError: a leading axis of adapters without "rows", or "rows" of another length
        than the batch.
    """
    if dropout > 0.0 and key is not None:
        x = drop(x, dropout, key, index)
    if "rows" in adapter:
        return _delta_by_row(x, adapter, jnp.asarray(scaling))
    refuse_stack(adapter["lora_A"])
    # [..., R]: cheap to keep, while computing it again reads all of x.
    inner: Any = dense_matmul(x, adapter["lora_A"])
    inner = name_product(inner, "lora_inner", saved=saved)
    # On the rank side: on [..., O] the scaling would be a pass of its own over memory.
    y: Any = dense_matmul(_scaled(inner, scaling), adapter["lora_B"])
    if "lora_bias" in adapter:
        bias = _scaled(adapter["lora_bias"], scaling).astype(y.dtype)
        y = y + jnp.expand_dims(bias, range(y.ndim - 1))
    return y


def name_product(
    y: Float[Array, "*B O"], name: str, *, saved: bool
) -> Float[Array, "*B O"]:
    """Names a matrix product for the policies of `jax.checkpoint`.

    Args:
      y: the product.
      name: for the policies.
      saved: whether one of them keeps it. The product then stands alone in the program:
        without the barrier, the XLA of jax 0.11 multiplies twice on a GPU, once to use
        the product, once to write it into the stack of all layers.
    """
    return checkpoint_name(jax.lax.optimization_barrier(y) if saved else y, name)


def _scaled(x: Array, scaling: float | Array) -> Array:
    # In float32: a factor rounded to bf16 would be off by up to 0.4 %.
    factor = jnp.asarray(scaling, jnp.float32)
    factor = jnp.expand_dims(factor, range(x.ndim)) if factor.ndim == 0 else factor
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _delta_by_row(
    x: Float[Array, "B ... I"],
    adapter: Mapping[str, Array],
    scaling: Float[Array, " N"],
) -> Float[Array, "B ... O"]:
    """Computes the update with another adapter for each row of the batch.

    Every layer gathers a copy of A and B for each row.
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])  # the head in generation has no T
    index, adapted = pick_rows(adapter["rows"], x)
    # [B, R, I] and [B, O, R]
    a, b = adapter["lora_A"][index], adapter["lora_B"][index]
    factor = jnp.expand_dims(scaling[index], (1, 2))
    product = partial(jnp.einsum, precision=precision(x.dtype))
    # [B, T, R], then [B, T, O].
    inner = product("bti,bri->btr", flat, a.astype(x.dtype))
    inner = (inner.astype(jnp.float32) * factor).astype(x.dtype)
    y = product("btr,bor->bto", inner, b.astype(x.dtype))
    if "lora_bias" in adapter:
        bias = jnp.expand_dims(adapter["lora_bias"][index], 1) * factor
        y = y + bias.astype(y.dtype)
    # A choice, not a product with 0: an adapter may contain infinities.
    y = jnp.where(adapted, y, jnp.zeros((), y.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def pick_rows(
    rows: Int[Array, " B"], x: Array
) -> tuple[Int[Array, " B"], Bool[Array, "B 1 1"]]:
    """Returns the index of each row's adapter, and whether the row has one.

    Raises:
      UserError: `rows` of another length than the batch.
    """
    if x.shape[0] != rows.shape[0]:
        raise UserError(
            f"`rows` has the adapters of {rows.shape[0]} rows, and the batch has the "
            f"shape {list(x.shape)}. Give `with_rows` one index for each row."
        )
    # -1 reads adapter 0, whose update is then dropped.
    return jnp.maximum(rows, 0), jnp.expand_dims(rows >= 0, (1, 2))


def refuse_stack(array: Array) -> None:
    """Raises if adapters are stacked and no row indices are given.

    Raises:
      UserError: a factor with an axis of adapters.
    """
    if array.ndim == 3:
        raise UserError(
            f"This is a stack of {array.shape[0]} adapters without row indices. Give "
            "the model `with_rows(stack, rows)`."
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
    gradient flows through it, as in DoRA (arXiv:2402.09353, section 4.3).

    Args:
      weight: array, or NF4 tensor.
      a: lora_A; None = the norms of W alone.
      b: lora_B.
      scaling: factor of `B A`.
      dtype: in which W is dequantized and multiplied; sums are float32.
    """
    if isinstance(weight, NF4Tensor):
        dense = nf4.dequantize(weight, dtype)
    else:
        dense = weight.astype(dtype)
    dense = jax.lax.stop_gradient(dense)
    weight_f32 = dense.astype(jnp.float32)
    square = jnp.sum(weight_f32 * weight_f32, axis=1)  # |W|^2
    if a is not None and b is not None:
        a, b = jax.lax.stop_gradient(a), jax.lax.stop_gradient(b)
        s = jnp.asarray(scaling, jnp.float32)
        cross: Any = dense_matmul(a.astype(dtype), dense, jnp.float32)  # A W^T [R, O]
        # dense_matmul(b, gram) is b gram^T, and gram is symmetric.
        gram: Any = dense_matmul(a, a)  # A A^T [R, R]
        b_gram: Any = dense_matmul(b, gram)
        # Row o: 2 s (W A^T)_o . b_o + s^2 (B A A^T)_o . b_o
        square = square + jnp.sum((2.0 * s * cross.T + s * s * b_gram) * b, axis=1)
    # Rounding may leave a tiny negative number where the row is zero.
    return jnp.sqrt(jnp.maximum(square, 0.0))


def rescale(
    magnitude: Float32[Array, " O"],
    norms: Float32[Array, " O"],
    scaling: float | Array,
) -> Float32[Array, " O"]:
    """Computes DoRA's factor `m / |W + s B A|`, 1 where not adapted (scaling 0)."""
    # A constant c to the derivative: y = (m / c) u gives du = (m / c) dy and
    # dm = sum(dy u) / c. The full gradient of a row would lose its part along the row.
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
    """Returns `y = x W^T` with the columns of the rows of W that are replaced."""
    columns: Any = dense_matmul(x, rows, y.dtype)
    # The derivative of a set drops dy of what it replaces: x gets its gradient through
    # the new rows there, not through the frozen ones.
    return y.at[..., indices].set(columns, unique_indices=True)


def _check_shapes(adapters: Mapping[str, Any], expected: Mapping[Path, Shape]) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.walk(adapters)}
    problems = [f"no {'.'.join(p)}" for p in expected if p not in shapes]
    problems += [f"unexpected {'.'.join(p)}" for p in shapes if p not in expected]
    problems += [
        f"{'.'.join(p)} {list(shapes[p])} instead of {list(shape)}"
        for p, shape in expected.items()
        if p in shapes and shapes[p] != tuple(shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            "The adapter tree does not fit its LoRA configuration on this model: "
            f"{'; '.join(problems[:5])}{more}."
        )
