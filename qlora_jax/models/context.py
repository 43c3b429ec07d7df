"""The tokens of a row divided over the devices of the mesh's axis "context".

Attention in causal order costs a late token more than an early one, so device d of n
has the chunks d and 2n - 1 - d of 2n (`pallas_kernels.attention.context`). A batch has
its tokens in the order of the row; `divide_tokens` puts them into that of the devices:

    row      0 1 2 3 4 5 6 7          n = 2, chunks of two tokens
    devices  0 1 6 7 | 2 3 4 5

Rows are padded at the end to two equal chunks for each device: no token sees what comes
after it, and the padding has no label. Without the axis, or with one device, every
function here returns what it is given.

The mesh is that of the trace (`jax.sharding.use_abstract_mesh`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from pallas_kernels.attention.context import chunk_order
from qlora_jax.models.sharding import row_axes, row_devices

AXIS = "context"


def divide_tokens(x: Any, fill: int = 0) -> Any:
    """Puts tokens in the order of the devices, and divides them.

    Args:
      x: [B, T, ...] in the order of the row, or [1, T], the same for all rows; or None.
      fill: value of the padding.

    Returns:
      [B, S, ...] with S the next multiple of two tokens for each device.
    """
    devices = row_devices()
    if x is None or devices == 1:
        return x
    rows, length, *features = x.shape
    pad = -length % (2 * devices)
    widths = ((0, 0), (0, pad), *((0, 0),) * len(features))
    x = jnp.pad(x, widths, constant_values=fill)
    # Every device has the whole row, of which it takes its part.
    chunks = x.reshape(rows, 2 * devices, -1, *features)[:, chunk_order(devices)]
    return divide(chunks.reshape(rows, length + pad, *features))


def divide(x: Array) -> Array:
    """Divides an array [B, S, ...], in the order of the devices, among them."""
    if row_devices() == 1:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(row_axes() if x.shape[0] > 1 else None, AXIS)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def join_tokens(x: Array, length: int) -> Array:
    """Puts tokens back in the order of the row, without the padding.

    Args:
      x: [B, S, ...] in the order of the devices.
      length: T.

    Returns:
      [B, T, ...].
    """
    devices = row_devices()
    if devices == 1:
        return x
    rows, padded, *features = x.shape
    chunks = x.reshape(rows, 2 * devices, -1, *features)
    chunks = chunks[:, np.argsort(chunk_order(devices))]
    return chunks.reshape(rows, padded, *features)[:, :length]


def row_index(
    length: int, chunk: Int[Array, ""] | int = 0, chunks: int = 1
) -> Int[Array, " s"]:
    """Returns the index in the row of tokens in the order of the devices.

    Args:
      length: S.
      chunk: which of them, as `cut_chunks` cuts the tokens of every device; the indices
        of their padding mean nothing.
      chunks: their number.
    """
    devices = row_devices()
    part = length // devices
    size = -(-part // chunks)
    place = chunk * size + jnp.arange(size, dtype=jnp.int32)
    if devices == 1:
        return place
    place = (jnp.arange(0, length, part)[:, None] + place[None]).reshape(-1)
    # Two chunks of a device in the order of the row, as above.
    half = part // 2
    first = jnp.asarray(chunk_order(devices) * half, jnp.int32)
    return first[place // half] + place % half
