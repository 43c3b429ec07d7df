"""NF4 in plain array operations: the "xla" implementation, and all tests' reference."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

# The 16 values, as float32, that bitsandbytes writes as `quant_map`: quantiles of a
# normal distribution scaled to [-1, 1], with an exact 0 between 7 negative and 8
# positive values (arXiv:2305.14314).
NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


class Nested(NamedTuple):
    """Second level of double quantization: turns 8-bit `absmax` into float32."""

    absmax: Float32[Array, " M"]
    """Scale of each group of `nested_block_size` blocks."""
    offset: Float32[Array, ""]
    """Mean of the tensor's absmax, subtracted before coding."""
    quant_map: Float32[Array, " 256"]
    """The 256 values of the 8-bit codes."""


class Packed(NamedTuple):
    """The arrays of a packed weight, or of a stack of them and the layer to read."""

    codes: Array
    """uint8, aligned or flat (see `pallas_kernels.nf4`); [L, ...] with `layer`."""
    absmax: Array
    """float32 or uint8 block scales, likewise."""
    nested: Nested | None
    """The second level, exactly when `absmax` is uint8; its arrays likewise."""
    layer: Array | None
    """int32, which of the stacked layers; None = one weight without that axis."""

    def unstack(self) -> Packed:
        """Returns the layer without the axis of layers, copied out of the stack."""
        if self.layer is None:
            return self
        arrays = (self.codes, self.absmax, self.nested)
        # As in the kernels; an index of jax would count -1 from the end.
        layer = jnp.clip(self.layer, 0, self.codes.shape[0] - 1)
        codes, absmax, nested = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), arrays
        )
        return Packed(codes, absmax, nested, None)

    def stack(self) -> Packed:
        """Returns a stack, as the kernels read it, with `layer` of shape [1]."""
        if self.layer is not None:
            return self._replace(layer=self.layer.reshape(1))
        arrays = (self.codes, self.absmax, self.nested)
        codes, absmax, nested = jax.tree.map(lambda a: a[None], arrays)
        return Packed(codes, absmax, nested, jnp.zeros(1, jnp.int32))


def dequantize_absmax(
    absmax: UInt8[Array, "..."], nested: Nested, *, nested_block_size: int = 256
) -> Float32[Array, "..."]:
    """Computes `quant_map[absmax] * nested.absmax[group] + offset` in float32.

    The product and the sum are rounded one after the other, as bitsandbytes does.

    Args:
      absmax: 8-bit codes; groups run over its flattened order.
      nested: scales, offset and table of the second level.
      nested_block_size: codes that share one scale.

    Returns:
      float32 scales in the shape of `absmax`.
    """
    values = nested.quant_map[absmax.reshape(-1).astype(jnp.int32)]
    pad = -values.size % nested_block_size
    # Groups of 256 run on across rows, like the bytes in a file.
    groups = jnp.pad(values, (0, pad)).reshape(-1, nested_block_size)
    # A maximum that changes nothing finite keeps a compiler from contracting product
    # and sum into one rounding; jax 0.10 drops an optimization barrier on CPU first.
    lowest = jnp.finfo(jnp.float32).min
    scaled = jnp.maximum(groups * nested.absmax[:, None], lowest)
    flat = scaled.reshape(-1)[: values.size] + nested.offset
    return flat.reshape(absmax.shape)


def round_to(values: Float32[Array, "..."], dtype: DTypeLike) -> Float32[Array, "..."]:
    """Rounds float32 values to those of a 16-bit dtype, to nearest even.

    A cast there and back would do the same, and is what a compiler removes.
    """
    dtype = jnp.dtype(dtype)
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(values, info.nexp, info.nmant)
    if dtype != jnp.float16:
        return rounded
    # `reduce_precision` flushes what is subnormal in float16: multiples of 2^-24.
    step = np.float32(info.smallest_subnormal)
    subnormal = jnp.round(values / step) * step
    return jnp.where(
        jnp.abs(values) < np.float32(info.smallest_normal), subnormal, rounded
    )


def dequantize(
    packed: Packed,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike,
    rounded_to: DTypeLike | None = None,
    block_size: int = 64,
    nested_block_size: int = 256,
) -> Float[Array, "O I"]:
    """Computes `NF4_CODE[codes] * absmax[block]`, rounded once to `dtype`.

    Args:
      packed: the weight.
      shape: (O, I) of the weight.
      dtype: of the result.
      rounded_to: 16-bit dtype that the float32 product is rounded to before.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.

    Returns:
      The weight [O, I].
    """

    def rounded(values: Array) -> Array:
        return values if rounded_to is None else round_to(values, rounded_to)

    codes, absmax, nested, _ = packed.unstack()
    out_features, in_features = shape
    if nested is not None:
        absmax = dequantize_absmax(absmax, nested, nested_block_size=nested_block_size)
    aligned = in_features % block_size == 0
    if aligned:
        codes = codes.reshape(out_features, in_features // 2)
    # The high nibble is the first weight of a byte.
    indices = jnp.stack([codes >> 4, codes & 0xF], axis=-1)
    values = jnp.asarray(NF4_CODE)[indices.astype(jnp.int32)]
    if aligned:
        # With rows as an axis a sharding of out_features passes through the reshape.
        # [O, I / 64, 64] times [O, I / 64, 1].
        grouped = values.reshape(out_features, in_features // block_size, block_size)
        # Scales stay float32: the product is all that is rounded.
        scales = absmax.reshape(out_features, in_features // block_size, 1)
        return rounded(grouped * scales).reshape(shape).astype(dtype)
    size, blocks = out_features * in_features, absmax.size
    # The last byte may hold one weight, the last block fewer than `block_size`.
    flat = values.reshape(-1)[:size]
    flat = jnp.pad(flat, (0, blocks * block_size - size)).reshape(blocks, block_size)
    scaled = (flat * absmax.reshape(blocks, 1)).reshape(-1)[:size]
    return rounded(scaled).reshape(shape).astype(dtype)
