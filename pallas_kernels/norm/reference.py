"""What the kernels of an RMSNorm compute, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.product import contract


def rms_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: bool = False,
) -> Float[Array, "*B D"]:
    """Computes x / sqrt(mean(x^2) + eps) * w in float32, in the dtype of `x`.

    The factor w is 1 + weight with `offset`. Without it w is weight, and the quotient
    is rounded before it is multiplied, as in transformers.
    """
    wide = x.astype(jnp.float32)
    quotient = wide * _inverse(wide, eps)
    if not offset:
        quotient = quotient.astype(x.dtype).astype(jnp.float32)
    return multiply(quotient, factor(weight, x.dtype, offset=offset)).astype(x.dtype)


def factor(
    weight: Float[Array, " D"], dtype: DTypeLike, *, offset: bool
) -> Float32[Array, " D"]:
    """Returns the factor of each feature: 1 + weight, or weight in the dtype of x."""
    if offset:
        return 1.0 + weight.astype(jnp.float32)
    return weight.astype(dtype).astype(jnp.float32)


def multiply(
    x: Float32[Array, "*B D"], each: Float32[Array, " D"]
) -> Float32[Array, "*B D"]:
    """Multiplies each feature with its own number."""
    return x * jnp.expand_dims(each, range(x.ndim - 1))


def _inverse(wide: Float32[Array, "*B D"], eps: float) -> Float32[Array, "*B 1"]:
    return jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def forward(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    a: Float[Array, "R D"],
    scaling: Float32[Array, " R"],
    *,
    eps: float,
    offset: bool = False,
) -> Float[Array, "*B K"]:
    """Computes `[y | scaling (a y)]` of y = `rms_norm(x)`; as `gpu.forward`."""
    y = rms_norm(x, weight, eps=eps, offset=offset)
    inner = multiply(contract(y, a, 1).astype(jnp.float32), scaling)
    return jnp.concatenate([y, inner.astype(y.dtype)], axis=-1)


def backward(
    dx_ext: Float[Array, "*B K"],
    z: Float[Array, "*B R"],
    a: Float[Array, "R D"],
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    dres: Float[Array, "*B D"],
    *,
    eps: float,
    offset: bool = False,
) -> Float[Array, "*B D"]:
    """Computes the gradient of x; as `gpu.backward`, from the sum of the product."""
    wide = x.astype(jnp.float32)
    inverse = _inverse(wide, eps)
    dh = dx_ext[..., : x.shape[-1]].astype(jnp.float32)
    dh = dh + contract(z, a, 0, jnp.float32)
    dy = multiply(dh, factor(weight, x.dtype, offset=offset))
    mean = jnp.mean(dy * wide, axis=-1, keepdims=True)
    dx = inverse * dy - wide * (inverse**3 * mean) + dres.astype(jnp.float32)
    return dx.astype(x.dtype)


def weight_gradient(
    dx_ext: Float[Array, "*B K"],
    z: Float[Array, "*B R"],
    a: Float[Array, "R D"],
    x: Float[Array, "*B D"],
    *,
    eps: float,
) -> Float32[Array, " D"]:
    """Computes the gradient of the norm's weight, with or without an offset."""
    wide = x.astype(jnp.float32)
    dh = dx_ext[..., : x.shape[-1]].astype(jnp.float32)
    dh = dh + contract(z, a, 0, jnp.float32)
    return (dh * wide * _inverse(wide, eps)).reshape(-1, x.shape[-1]).sum(axis=0)
