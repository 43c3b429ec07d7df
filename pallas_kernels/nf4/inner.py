"""What comes before a group of linear layers of a decoded token, as a kernel.

The norm, and `A x` of the adapters. It runs where the kernel that writes x leaves no
parts of these sums (`pallas_kernels.nf4.parts`): before the first layer, and for many
rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import WARPGROUP
from pallas_kernels.nf4.gpu import clip_layer, kernel


class Norm(NamedTuple):
    """An RMSNorm, of which every layer has a weight."""

    weight: Float[Array, "L D"]
    eps: float


def inner(
    x: Float[Array, "M I"],
    layer: Int32[Array, " 1"],
    *,
    norm: Norm | None = None,
    a: Float[Array, "L R I"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "M I"], Float32[Array, "M R"] | None]:
    """Computes the normed x, and `A x` of it, as one kernel.

    A block of threads computes one number of one row, and norms the row for itself:
    its sum of squares needs no second kernel.

    Args:
      x: in bfloat16 or float16, I a multiple of 128.
      layer: the layer, clipped to those that exist.
      norm: applied to x first.
      a: the A of all adapters, below one another, in the dtype of x.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The normed x (x itself without a norm), rounded as `qlora_jax.models` does, and
      the float32 products, None without `a`.
    """
    if norm is None and a is None:
        return x, None
    count, width = x.shape
    rank = 0 if a is None else a.shape[1]
    part = math.gcd(width, 4096)
    each = min(part // WARPGROUP, 8)
    starts = range(0, width, part)

    def nf4_inner(*operands: Any) -> None:
        refs: list[Any] = list(operands)
        x, layer = refs.pop(0), refs.pop(0)
        weight: Any = None if norm is None else refs.pop(0)
        a_ref: Any = None if a is None else refs.pop(0)
        out = None if norm is None else refs.pop(0)
        inner_ref = None if a is None else refs.pop(0)
        number = jax.lax.axis_index("number")
        row = jax.lax.axis_index("row")
        layers = (weight if a is None else a).shape[0]
        layer_index = clip_layer(layer[0], layers)

        def load(ref: Any, start: int) -> jax.Array:
            return mosaic.load(ref.at[pl.ds(start, part)], each)

        scale = None
        if norm is not None:
            squares: Any = None
            for start in starts:
                wide = load(x.at[row], start).astype(jnp.float32)
                squares = wide * wide + (0.0 if squares is None else squares)
            scale = jax.lax.rsqrt(jnp.sum(squares) / width + norm.eps)

        def normed(start: int) -> jax.Array:
            values = load(x.at[row], start)
            if scale is None:
                return values
            wide = values.astype(jnp.float32) * scale
            # Rounded before it is multiplied with the weight, as in transformers.
            factor = load(weight.at[layer_index], start)
            return wide.astype(values.dtype) * factor

        if inner_ref is not None:

            @pl.when(number < rank)
            def _() -> None:
                terms: Any = None
                for start in starts:
                    left = load(a_ref.at[layer_index, number], start)
                    term = left.astype(jnp.float32) * normed(start).astype(jnp.float32)
                    terms = term if terms is None else terms + term
                inner_ref[row, number] = jnp.sum(terms)

        if out is not None:

            @pl.when(number == rank)
            def _() -> None:
                for start in starts:
                    mosaic.store(
                        out.at[row, pl.ds(start, part)],
                        normed(start),
                        mosaic.strided((part,), each),
                        interpret=bool(interpret),
                    )

    outputs, arrays = [], [x, layer]
    if norm is not None:
        outputs.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        arrays.append(norm.weight.astype(x.dtype))
    if a is not None:
        outputs.append(jax.ShapeDtypeStruct((count, rank), jnp.float32))
        arrays.append(a)
    run = kernel(
        nf4_inner,
        outputs,
        [],
        grid={"number": rank + (norm is not None), "row": count},
        interpret=interpret,
    )
    results = list(run(*arrays))
    y = x if norm is None else results.pop(0)
    return y, results[0] if results else None


def inner_reference(
    x: Float[Array, "M I"],
    layer: Int32[Array, " 1"],
    *,
    norm: Norm | None = None,
    a: Float[Array, "L R I"] | None = None,
) -> tuple[Float[Array, "M I"], Float32[Array, "M R"] | None]:
    """Computes `inner` in plain jax."""
    if norm is not None:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean + norm.eps)
        weight = norm.weight[layer].reshape(1, -1)
        x = wide.astype(x.dtype) * weight.astype(x.dtype)
    if a is None:
        return x, None
    left = a[layer[0]].astype(jnp.float32)
    return x, jnp.matmul(x.astype(jnp.float32), left.T, precision="highest")
