"""NF4 weights: dequantization, and the matrix product that keeps them packed.

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) stores a weight as the
index of the nearest of 16 fixed values, two indices a byte with the first one in the
high nibble, times the largest magnitude (`absmax`) of its block of 64 consecutive
weights. The byte layout is that of bitsandbytes, so its files need no conversion.

Layouts, for a weight of shape [O, I] (out_features, in_features) flattened row by row:
  aligned (I % 64 == 0): codes [O, I/2], absmax [O, I/64]; blocks lie within rows.
  flat (any other I): codes [ceil(O*I/2)], absmax [ceil(O*I/64)]; blocks cross rows.

Under double quantization `absmax` is itself 8-bit: index into a 256-entry table, times
a scale for each 256 blocks, plus one offset for the tensor (`Nested`).

The one idea of `nf4_matmul`: its derivative keeps the packed bytes as the only residual
of the weight and dequantizes once more, so training holds no 16-bit copy of a layer
beyond the layer being computed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.product import contract

# The 16 values, as float32, that bitsandbytes writes as `quant_map`.
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
    """Second level of double quantization: what turns 8-bit `absmax` into float32."""

    absmax: Float32[Array, " M"]
    """Scale of each group of `nested_block_size` blocks."""
    offset: Float32[Array, ""]
    """Mean of the tensor's absmax, taken off before coding."""
    quant_map: Float32[Array, " 256"]
    """The 256 values an 8-bit code stands for."""


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
    groups = jnp.pad(values, (0, pad)).reshape(-1, nested_block_size)
    # A maximum that changes nothing finite keeps a compiler from contracting product
    # and sum into one rounding; jax 0.10 drops an optimization barrier on CPU first.
    lowest = jnp.finfo(jnp.float32).min
    scaled = jnp.maximum(groups * nested.absmax[:, None], lowest)
    flat = scaled.reshape(-1)[: values.size] + nested.offset
    return flat.reshape(absmax.shape)


def nf4_dequantize(
    codes: UInt8[Array, "..."],
    absmax: Array,
    nested: Nested | None = None,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike,
    block_size: int = 64,
    nested_block_size: int = 256,
    layer: Int32[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "O I"]:
    """Computes `NF4_CODE[codes] * absmax[block]`, rounded once to `dtype`.

    Args:
      codes: packed 4-bit indices, aligned or flat (see the module's text).
      absmax: block scales in the matching layout; float32, or uint8 with `nested`.
      nested: the second level, exactly when `absmax` is uint8.
      shape: (O, I) of the weight.
      dtype: of the result; the product is float32 and rounded to nearest even.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
      layer: given, all arrays have one leading axis and the weight is this layer's.
      implementation: "xla", "pallas", or None: the best known for the device.

    Returns:
      The weight [O, I].

    Raises:
      ValueError: codes or absmax whose size does not fit `shape`, `nested` that does
        not go with the type of `absmax`, or an implementation that cannot be had.
    """
    _check_implementation(implementation)
    if layer is not None:
        codes, absmax, nested = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False),
            (codes, absmax, nested),
        )
    out_features, in_features = shape
    size = out_features * in_features
    blocks = -(-size // block_size)
    if codes.size != -(-size // 2) or absmax.size != blocks:
        raise ValueError(
            f"`nf4_dequantize`: a weight of shape {shape} has {-(-size // 2)} code "
            f"bytes and {blocks} block scales, got {codes.size} and {absmax.size}."
        )
    if (absmax.dtype == jnp.uint8) != (nested is not None):
        raise ValueError(
            "`nf4_dequantize`: `nested` goes with 8-bit `absmax` and only with it, got "
            f"absmax of {absmax.dtype} and nested={'given' if nested else None}."
        )
    if nested is not None:
        absmax = dequantize_absmax(absmax, nested, nested_block_size=nested_block_size)
    aligned = in_features % block_size == 0
    if aligned:
        codes = codes.reshape(out_features, in_features // 2)
    indices = jnp.stack([codes >> 4, codes & 0xF], axis=-1)
    values = jnp.asarray(NF4_CODE)[indices.astype(jnp.int32)]
    if aligned:
        grouped = values.reshape(out_features, in_features // block_size, block_size)
        scales = absmax.reshape(out_features, in_features // block_size, 1)
        return (grouped * scales).reshape(shape).astype(dtype)
    flat = values.reshape(-1)[:size]
    flat = jnp.pad(flat, (0, blocks * block_size - size)).reshape(blocks, block_size)
    return (
        (flat * absmax.reshape(blocks, 1))
        .reshape(-1)[:size]
        .reshape(shape)
        .astype(dtype)
    )


def _check_implementation(implementation: str | None) -> None:
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(
            f"`implementation` must be 'xla', 'pallas' or None, got {implementation!r}."
        )
    if implementation == "pallas":
        raise ValueError("implementation='pallas' cannot be used: not written yet.")


class _Meta(NamedTuple):
    """Everything static about a packed weight; hashable."""

    shape: tuple[int, int]
    out_dtype: str
    block_size: int
    nested_block_size: int
    implementation: str | None


def nf4_matmul(
    x: Float[Array, "*B I"],
    codes: UInt8[Array, "..."],
    absmax: Array,
    nested: Nested | None = None,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike | None = None,
    block_size: int = 64,
    nested_block_size: int = 256,
    layer: Int32[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B O"]:
    """Computes `x @ W.T` with `W = nf4_dequantize(...)` in the dtype of `x`.

    Sums are float32, rounded to `dtype` (default: that of `x`) at the end. The
    derivative exists for `x` alone (the packed weight is frozen) and keeps only the
    packed bytes.

    Args:
      x: inputs, features last.
      codes: as for `nf4_dequantize`.
      absmax: as for `nf4_dequantize`.
      nested: as for `nf4_dequantize`.
      shape: (O, I) of the weight.
      dtype: of the result; default that of `x`.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
      layer: as for `nf4_dequantize`.
      implementation: as for `nf4_dequantize`.

    Returns:
      The product [..., O].
    """
    _check_implementation(implementation)
    if x.shape[-1] != shape[1]:
        raise ValueError(
            f"`nf4_matmul`: the weight takes {shape[1]} features, `x` has shape "
            f"{x.shape}."
        )
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    meta = _Meta(shape, dtype.name, block_size, nested_block_size, implementation)
    return _matmul(meta, x, (codes, absmax, nested, layer))


def _weight(meta: _Meta, packed: tuple, dtype: DTypeLike) -> Array:
    codes, absmax, nested, layer = packed
    return nf4_dequantize(
        codes,
        absmax,
        nested,
        shape=meta.shape,
        dtype=dtype,
        block_size=meta.block_size,
        nested_block_size=meta.nested_block_size,
        layer=layer,
        implementation=meta.implementation,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(meta: _Meta, x: Array, packed: tuple) -> Array:
    return contract(x, _weight(meta, packed, x.dtype), 1, meta.out_dtype)


def _matmul_fwd(meta: _Meta, x: Array, packed: tuple) -> tuple[Array, tuple]:
    # The empty array carries the dtype of `x`, which `dy` need not have.
    return _matmul(meta, x, packed), (packed, jnp.zeros((0,), x.dtype))


def _matmul_bwd(meta: _Meta, residuals: tuple, dy: Array) -> tuple[Array, None]:
    packed, like = residuals
    dy = dy.astype(like.dtype)
    return contract(dy, _weight(meta, packed, dy.dtype), 0), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
