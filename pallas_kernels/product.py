"""Matrix products with float32 sums, and their derivatives.

One convention for all of them: weights are [out, in] as checkpoints store them, the
sum runs in float32 whatever the operands are, and float32 operands really are
multiplied in float32 (no tf32).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

# Of the narrower operand: what XLA pads bf16 to for the tensor cores.
_TENSOR_CORE_ROWS = 8


def contract(
    a: Float[Array, "*B C"], b: Array, axis: int, dtype: DTypeLike | None = None
) -> Array:
    """Sums over the last axis of `a` and axis `axis` (0 or 1) of the matrix `b`.

    Sums are float32 also for bf16 operands.

    Args:
      a: left operand, any leading axes.
      b: matrix in the dtype of `a`.
      axis: axis of `b` to sum over.
      dtype: of the result; default that of `a`.

    Returns:
      The product [*B, N] with N the other axis of `b`.
    """
    dtype = a.dtype if dtype is None else jnp.dtype(dtype)
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((a.ndim - 1,), (axis,)), ((), ())),
        precision=precision(a.dtype),
    )

    # A GPU rounds as it writes: asked for float32 it would write twice the bytes, read
    # them again to round, and could not add to an earlier result in place. A CPU with
    # bf16 instructions is twice as fast when asked for float32.
    def rounded_after(a: Array, b: Array) -> Array:
        return product(a, b, preferred_element_type=jnp.float32).astype(dtype)

    def rounded_within(a: Array, b: Array) -> Array:
        return product(a, b, preferred_element_type=dtype)

    if dtype == jnp.float32:
        # Nothing is left to round, so the platforms differ in the padding alone.
        if a.dtype == jnp.float32 or math.prod(a.shape[:-1]) != 1:
            return rounded_within(a, b)
        return jax.lax.platform_dependent(
            a,
            b,
            cuda=functools.partial(padded_row_product, axis=axis),
            default=rounded_within,
        )
    return jax.lax.platform_dependent(a, b, cpu=rounded_after, default=rounded_within)


def padded_row_product(a: Array, b: Array, axis: int) -> Array:
    """Computes the float32 product of one row of 16 bits, as one of several rows.

    Of one row XLA:GPU makes a float32 product of matrix and vector, before which it
    writes all of `b` in float32: five times its bytes.

    Args:
      a: the row, with any leading axes of length 1.
      b: as for `contract`.
      axis: as for `contract`.
    """
    rows = jnp.zeros((_TENSOR_CORE_ROWS, a.shape[-1]), a.dtype)
    y = contract(rows.at[0].set(a.reshape(-1)), b, axis, jnp.float32)
    return y[0].reshape(*a.shape[:-1], y.shape[1])


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision of a product that keeps all bits of float32 operands."""
    # XLA's default would multiply float32 as tf32 (10 bits) on a GPU.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_matmul(
    x: Float[Array, "*B I"], weight: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "*B O"]:
    """Computes `x @ weight.T`, multiplying in the dtype of `x`.

    `weight` may have another dtype (a float32 adapter under bf16 compute): it is cast
    for the product, and its gradient is summed and returned in its own dtype, never
    rounded to that of `x` on the way.

    Args:
      x: inputs, features last.
      weight: [O, I].
      dtype: of the result; default that of `x`.
    """
    return contract(x, weight.astype(x.dtype), 1, dtype)


def _dense_fwd(
    x: Array, weight: Array, dtype: DTypeLike | None
) -> tuple[Array, tuple[Array, Array]]:
    return dense_matmul(x, weight, dtype), (x, weight)


def _dense_bwd(
    dtype: DTypeLike | None, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    del dtype
    x, weight = residuals
    # y = x w^T, so dx = dy w and dw = dy^T x.
    dy = dy.astype(x.dtype)
    # dy is float32 where y was asked for in float32 (logits); rounded, both products
    # run on 16-bit operands like the forward one.
    dx = contract(dy, weight.astype(x.dtype), 0)
    return dx, outer(dy, x).astype(weight.dtype)


def outer(a: Float[Array, "*B M"], b: Float[Array, "*B N"]) -> Float32[Array, "M N"]:
    """Sums `a^T b` over the rows, in float32.

    The compiler transposes the left operand, so the narrower one goes there (for an
    adapter the one of width r).
    """
    # dw = dy^T x sums over all tokens, so over every axis but the last.
    rows = tuple(range(a.ndim - 1))
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=((rows, rows), ((), ())),
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
    if a.shape[-1] <= b.shape[-1]:
        return product(a, b)
    # Without the barrier the transposition is folded back into the product, which costs
    # over twice the time on a CPU.
    return jax.lax.optimization_barrier(product(b, a)).T


dense_matmul.defvjp(_dense_fwd, _dense_bwd)
