"""What the kernels of a gated activation compute, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.product import contract, outer


def forward(
    gate_up: Float[Array, "T F2"], a: Float[Array, "R F"]
) -> tuple[Float[Array, "T F"], Float[Array, "T R"]]:
    """Computes `h = silu(gate) up` and `h a^T`; as `gpu.forward`."""
    gate, up = _split(gate_up)
    h = (jax.nn.silu(gate) * up).astype(gate_up.dtype)
    return h, contract(h, a, 1)


def backward(
    gate_up: Float[Array, "T F2"],
    dh: Float[Array, "T F"],
    z: tuple[Float[Array, "T R1"], Float[Array, "T R2"], Float[Array, "T R3"]],
) -> tuple[Float[Array, "T F2"], tuple[Float32[Array, "R F"], ...]]:
    """Computes the derivative, and the products with it; as `gpu.backward`."""
    gate, up = _split(gate_up)
    wide = dh.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate = wide * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    values = [v.astype(gate_up.dtype) for v in (dgate, wide * silu, silu * up)]
    pairs = jnp.stack(values[:2], axis=-1).reshape(gate_up.shape)
    products = (outer(each, v) for each, v in zip(z, values, strict=True))
    return pairs, tuple(products)


def _split(
    gate_up: Float[Array, "T F2"],
) -> tuple[Float32[Array, "T F"], Float32[Array, "T F"]]:
    wide = gate_up.astype(jnp.float32).reshape(gate_up.shape[0], -1, 2)
    return wide[..., 0], wide[..., 1]
