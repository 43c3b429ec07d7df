"""Adam whose moments are held in 8 bits (Dettmers et al., arXiv:2110.02861).

Each moment is a byte for each number and a float32 for each 256 of them: 2.03 bytes a
parameter for both, instead of 8. A block is scaled by its largest absolute value to
[-1, 1], and each number coded as the nearest of 256 values spaced like a floating-point
number with a movable point: seven decades, finer towards 1. The first moment has a
sign, the second has none and twice the values in each decade. Both are decoded, moved
and used in float32, and coded again.

Two rules keep small numbers safe. An array of fewer than 4,096 numbers stays float32.
And of the second moment, what is not 0 is never coded as 0, but as the smallest value:
the update divides by its root, and 0 would make of a small gradient an update without
bound. (bitsandbytes, which has the same tables, lets it be 0.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, UInt8

from qlora_jax.nf4 import DYNAMIC_MAP

BLOCK = 256
"""Numbers that share a scale, of the array read row by row."""

SMALLEST = 4096
"""Numbers of the smallest array that is coded."""


def _unsigned_map() -> np.ndarray:
    """Seven decades, decade i holding 2^(i+1) midpoints of an even grid on [0.1, 1]."""
    values = [np.zeros(1), np.ones(1)]
    for decade in range(7):
        grid = np.linspace(0.1, 1.0, 2 ** (decade + 1) + 1)
        values.append(10.0 ** (decade - 6) * (grid[:-1] + grid[1:]) / 2)
    return np.sort(np.concatenate(values)).astype(np.float32)


SIGNED, UNSIGNED = DYNAMIC_MAP, _unsigned_map()


class Coded(NamedTuple):
    """An array in 8 bits."""

    codes: Any
    """uint8, in the array's shape."""
    absmax: Any
    """float32 [G], one for each block."""


class Adam8bitState(NamedTuple):
    """Both moments; leaves are `Coded`, or float32 where they are small."""

    count: Any
    """Steps taken, int32 []."""
    mu: Any
    nu: Any


def encode(x: Float32[Array, "..."], table: np.ndarray) -> Coded:
    """Codes an array block by block, each number as the nearest value of `table`.

    Args:
      x: finite numbers; not below 0 where `table` is not.
      table: float32 [256], ascending, within [-1, 1].
    """
    blocks = _blocks(x)
    absmax = jnp.abs(blocks).max(axis=1)
    # A block of zeros has the scale 0, and zeros.
    scaled = blocks / jnp.where(absmax > 0, absmax, 1.0)[:, None]
    middle = jnp.asarray((table[:-1] + table[1:]) / np.float32(2))
    # Unrolled it is eight look-ups that fuse; a loop would hold indices of all numbers.
    codes = jnp.searchsorted(middle, scaled, method="scan_unrolled").astype(jnp.uint8)
    if table[0] == 0:
        codes = jnp.where((codes == 0) & (blocks > 0), jnp.uint8(1), codes)
    return Coded(codes.reshape(-1)[: x.size].reshape(x.shape), absmax)


def decode(coded: Coded, table: np.ndarray) -> Float32[Array, "..."]:
    """The numbers that `encode` chose."""
    codes: UInt8[Array, "..."] = coded.codes
    values = _blocks(jnp.asarray(table)[codes]) * coded.absmax[:, None]
    return values.reshape(-1)[: codes.size].reshape(codes.shape)


def _blocks(x: Array) -> Array:
    """[G, 256], the last block filled up with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def scale_by_adam_8bit(
    b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments of 8 bits.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    def zeros(leaf: Any, table: np.ndarray) -> Any:
        if leaf.size < SMALLEST:
            return jnp.zeros(leaf.shape, jnp.float32)
        zero = int(np.searchsorted(table, 0.0))
        codes = jnp.full(leaf.shape, zero, jnp.uint8)
        blocks = math.ceil(leaf.size / BLOCK)
        return Coded(codes, jnp.zeros((blocks,), jnp.float32))

    def init(params: Any) -> Adam8bitState:
        return Adam8bitState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda leaf: zeros(leaf, SIGNED), params),
            nu=jax.tree.map(lambda leaf: zeros(leaf, UNSIGNED), params),
        )

    def moved(old: Any, new: Array, keep: float, table: np.ndarray) -> Array:
        before = decode(old, table) if isinstance(old, Coded) else old
        return keep * before + (1.0 - keep) * new

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count: Any = optax.safe_increment(state.count)
        taken = count.astype(jnp.float32)
        first, second = 1.0 - b1**taken, 1.0 - b2**taken
        leaves, structure = jax.tree.flatten(updates)
        out, mus, nus = [], [], []
        for g, mu, nu in zip(
            leaves,
            structure.flatten_up_to(state.mu),
            structure.flatten_up_to(state.nu),
            strict=True,
        ):
            m, v = moved(mu, g, b1, SIGNED), moved(nu, g * g, b2, UNSIGNED)
            out.append((m / first) / (jnp.sqrt(v / second) + eps))
            mus.append(encode(m, SIGNED) if isinstance(mu, Coded) else m)
            nus.append(encode(v, UNSIGNED) if isinstance(nu, Coded) else v)
        restored = [structure.unflatten(part) for part in (out, mus, nus)]
        return restored[0], Adam8bitState(count, restored[1], restored[2])

    return optax.GradientTransformation(init, update)
