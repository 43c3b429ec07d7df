"""Checksums of arrays, computed where the arrays are.

    checksum(tree)    64 hexadecimal digits

An array that is divided among devices is not brought together: each device sums up its
part. The sums are of integers modulo 2^32, which no order of summation changes, so the
checksum is the same on every mesh.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def checksum(tree: Any) -> str:
    """Hashes the leaves of a tree in their order, not the names of its containers.

    Libraries may rename those (the fields of an optax state, for example). One changed
    bit always changes the result; of other changes one in 2^64 does not, unless someone
    chooses it: it detects damage and not forgery. A collective where several processes
    share an array.

    Args:
      tree: of arrays with elements of at most 32 bits.
    """
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        whole.update(f"{leaf.dtype.name} {list(leaf.shape)} ".encode())
        # One is waited for before the next begins: see `compiled_step._in_order`.
        whole.update(np.asarray(_sums(leaf)).astype("<u4").tobytes())
    return whole.hexdigest()


@jax.jit
def _sums(array: Array) -> UInt32[Array, "2"]:
    """Returns two sums over hashes of the elements' bits and positions.

    Hashes, because sums of the bits with weights by position miss the most significant
    bits of two elements: with odd weights they cancel out modulo 2^32, and with even
    ones the first bits of one element are lost.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        # Modulo 2^32 too: only elements 2^32 apart share a position.
        stride = jnp.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
        iota = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position = position + iota * stride
    # The finalizer of MurmurHash3 (Appleby, public domain) up to its last step. It is
    # one to one, so an element that alone changes always changes the sum.
    x = bits ^ (position * jnp.uint32(0x9E3779B1))
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    second = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x2C1B3C6D)
    first = x ^ (x >> jnp.uint32(16))
    zero = jnp.zeros((), jnp.uint32)
    # Both in one pass: in two, the hashes would be computed twice.
    sums = jax.lax.reduce(
        (first, second),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(array.ndim)),
    )
    return jnp.stack(sums)
