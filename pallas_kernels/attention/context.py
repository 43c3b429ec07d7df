"""Attention in plain XLA where the tokens of a row are divided over devices.

Of a row's 2n equal chunks, device d of n has chunks d and 2n - 1 - d, in this order: an
early one, whose queries see few keys, and a late one, whose queries see many. Of the
pairs of chunks on and below the diagonal each device then computes 2n + 1, the same
number as every other:

    n = 2     keys  0  1  2  3
    chunk 0         x              device 0
    chunk 1         x  x           device 1
    chunk 2         x  x  x        device 1
    chunk 3         x  x  x  x     device 0

Every device gathers the keys and values of all, and sums their gradients for all, which
are then added up where the keys came from (a reduce-scatter). Queries, outputs and
everything else stay where they are. The backward pass gathers again, so that what is
kept for it is divided as well.

The loop over pairs of blocks is that of `pallas_kernels.attention.xla`: what is
particular to a device, which blocks it visits, is data of one program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.variant import PLAIN, Variant
from pallas_kernels.attention.xla import (
    Layout,
    backward_blocks,
    block_sizes,
    block_under,
    by_window,
    flat,
    forward_blocks,
    see,
    slice_block,
    tie,
)


def chunk_order(devices: int) -> np.ndarray:
    """Returns the chunks of a row in the order of the devices that have them.

    0, 2n - 1, 1, 2n - 2, ...: two of each device.
    """
    first = np.arange(devices)
    return np.stack([first, 2 * devices - 1 - first], axis=1).reshape(-1)


def divided_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    variant: Variant = PLAIN,
    choice: Int[Array, ""] | None = None,
    *,
    axis: str = "context",
    row_axes: tuple[str, ...] = (),
) -> Float[Array, "B T N H"]:
    """Computes `blockwise_attention` of rows whose tokens are divided over devices.

    Trace it under a mesh (`jax.sharding.use_abstract_mesh`) with these axes. The
    tokens are in the order of `chunk_order`; T is a multiple of two chunks for each
    device. Differentiable in reverse mode; the residuals are named "attention_out" and
    "attention_lse".

    Args:
      q: queries.
      k: keys.
      v: values.
      segment_ids: equal ids see each other; None = one segment.
      variant: scale, soft cap and windows.
      choice: which of several windows; None where there is one.
      axis: of the mesh, which divides T.
      row_axes: of the mesh, which divide B.

    Raises:
      ValueError: T is not a multiple of two chunks for each device.
    """
    devices = jax.sharding.get_abstract_mesh().shape[axis]
    if q.shape[1] % (2 * devices):
        raise ValueError(
            f"`divided_attention`: {q.shape[1]} tokens are not two chunks for each of "
            f"{devices} devices. Pad them to a multiple of {2 * devices}."
        )
    variant = variant.for_length(q.shape[1])
    choice = None if len(variant.windows) == 1 else choice
    static = _Static(variant, devices, axis, row_axes)
    out: Any = _attention(static, q, k, v, segment_ids, choice)
    return out


class _Static(NamedTuple):
    variant: Variant
    devices: int
    axis: str
    row_axes: tuple[str, ...]

    @property
    def tokens(self) -> PartitionSpec:
        """How arrays [B, T, ...] are divided."""
        return PartitionSpec(self.row_axes, self.axis)

    @property
    def queries(self) -> PartitionSpec:
        """How an array [B, K, G, T] is divided."""
        return PartitionSpec(self.row_axes, None, None, self.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
) -> Array:
    return _attention_fwd(static, q, k, v, segments, choice)[0]


def _attention_fwd(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
) -> tuple[Array, tuple]:
    tokens = static.tokens
    out, lse = jax.shard_map(
        _by_platform(_forward_here, static),
        in_specs=(tokens, tokens, tokens, tokens, PartitionSpec()),
        out_specs=(tokens, static.queries),
        # Loops start from zeros that are the same on every device, and do not end so.
        check_vma=False,
    )(q, k, v, segments, choice)
    # Named as in `pallas_kernels.attention.xla`, and outside of the devices' program.
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, choice, out, lse)


def _attention_bwd(static: _Static, residuals: tuple, dout: Array) -> tuple:
    *arrays, out, lse = residuals
    tokens = static.tokens
    gradients = jax.shard_map(
        _by_platform(_backward_here, static),
        in_specs=(*(tokens,) * 4, PartitionSpec(), tokens, static.queries, tokens),
        out_specs=(tokens, tokens, tokens),
        check_vma=False,
    )(*arrays, out, lse, dout)
    # Segment ids and the choice are integers and have no derivative.
    return *gradients, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# --- The program of a device: its tokens of q, k and v, [b, t, heads, H] ---


def _by_platform(function: Callable, static: _Static) -> Callable:
    """Returns the function with blocks that suit the platform."""

    def on_device(q: Array, *arrays: Array | None) -> Any:
        chunk = q.shape[1] // 2

        def in_blocks_of(most: int) -> Callable:
            # As few blocks as cover a chunk, of a multiple of 8 tokens.
            block = -(-chunk // -(-chunk // most) // 8) * 8
            here = _Here(static, block, chunk)
            return lambda *present: function(here, *_restore(arrays, present))

        cpu, default = block_sizes(q)
        return jax.lax.platform_dependent(
            q,
            *(a for a in arrays if a is not None),
            cpu=in_blocks_of(cpu),
            default=in_blocks_of(default),
        )

    return on_device


def _restore(arrays: tuple, present: tuple) -> list:
    """Returns q and the arrays with the present ones in the place of themselves."""
    some = iter(present)
    return [next(some), *(None if a is None else next(some) for a in arrays)]


class _Here(NamedTuple):
    """How the tokens of a device are cut."""

    static: _Static
    block: int
    chunk: int
    """Tokens of a chunk."""

    @property
    def padded(self) -> int:
        """Tokens of a chunk of full blocks."""
        return -(-self.chunk // self.block) * self.block

    def pad(self, a: Array | None, axis: int = 1) -> Any:
        """Pads both chunks of a device to full blocks."""
        if a is None or self.padded == self.chunk:
            return a
        chunks = a.reshape(*a.shape[:axis], 2, self.chunk, *a.shape[axis + 1 :])
        widths = [(0, 0)] * chunks.ndim
        widths[axis + 1] = (0, self.padded - self.chunk)
        return jnp.pad(chunks, widths).reshape(
            *a.shape[:axis], 2 * self.padded, *a.shape[axis + 1 :]
        )

    def cut(self, a: Array, axis: int = 1) -> Array:
        """Removes what `pad` adds."""
        if self.padded == self.chunk:
            return a
        chunks = a.reshape(*a.shape[:axis], 2, self.padded, *a.shape[axis + 1 :])
        chunks = jax.lax.slice_in_dim(chunks, 0, self.chunk, axis=axis + 1)
        return chunks.reshape(*a.shape[:axis], 2 * self.chunk, *a.shape[axis + 1 :])

    def gather(self, a: Array | None) -> Any:
        """Returns [b, t, ...] of all devices, in their order, in full blocks."""
        if a is None:
            return None
        return jax.lax.all_gather(self.pad(a), self.static.axis, axis=1, tiled=True)

    def scatter(self, a: Array) -> Array:
        """Adds up what all devices have of an array that `gather` returns."""
        summed = jax.lax.psum_scatter(
            a, self.static.axis, scatter_dimension=1, tiled=True
        )
        return self.cut(summed)

    @property
    def layout(self) -> _Divided:
        """The blocks that this device visits."""
        device = jax.lax.axis_index(self.static.axis)
        return _Divided(self.static.devices, self.chunk, self.padded, device)


def _forward_here(
    here: _Here,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
) -> tuple[Array, Array]:
    groups, width = k.shape[2:]
    padded, layout, variant = here.pad(q), here.layout, here.static.variant

    def forward(window: int | None, *arrays: Array) -> tuple[Array, Array]:
        side = block_under(window, here.block, padded)
        return forward_blocks(
            side, variant, window, groups, width, *arrays, layout=layout
        )

    arrays = flat(padded, here.gather(k), here.gather(v))
    arrays = arrays if segments is None else (*arrays, here.gather(segments))
    out, lse = by_window(variant, choice, forward, *arrays)
    return here.cut(out).reshape(q.shape), here.cut(lse, axis=3)


def _backward_here(
    here: _Here,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    groups, width = k.shape[2:]
    padded, layout, variant = here.pad(q), here.layout, here.static.variant

    def backward(window: int | None, *arrays: Array) -> tuple[Array, Array, Array]:
        side = block_under(window, here.block, padded)
        return backward_blocks(
            side, variant, window, groups, width, *arrays, layout=layout
        )

    arrays = flat(
        *(padded, here.gather(k), here.gather(v), here.pad(out), here.pad(dout))
    )
    arrays = (*arrays, here.pad(lse, axis=3))
    arrays = arrays if segments is None else (*arrays, here.gather(segments))
    dq, dk, dv = by_window(variant, choice, backward, *arrays)
    dk, dv = here.scatter(dk), here.scatter(dv)
    return here.cut(dq).reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


class _Divided(Layout):
    """The blocks of one device's queries, and of the keys of all.

    A query block is numbered as on its device, a key block as in the row.
    """

    def __init__(self, devices: int, chunk: int, padded: int, device: Array) -> None:
        self.devices, self.chunk, self.padded = devices, chunk, padded
        self.device: Any = device

    def pairs(
        self, blocks: int, block: int, window: int | None, q: Array
    ) -> tuple[Array, Array]:
        number = max(
            int(self._visited(device, np.arange(blocks), block, window).sum())
            for device in range(self.devices)
        )
        # Without windows all devices visit as many. Otherwise those that have fewer go
        # on past the diagonal of their last block, where nothing is visible.
        i = jnp.arange(blocks, dtype=jnp.int32)
        visited = self._visited(self.device, i, block, window)
        ends = jnp.cumsum(visited)
        pair = jnp.arange(number, dtype=jnp.int32)
        i = jnp.searchsorted(ends, pair, side="right").astype(jnp.int32)
        i = jnp.minimum(i, blocks - 1)
        j = self.first_key(i, block, window) + pair - (ends - visited)[i]
        return tie((i, j.astype(jnp.int32)), q)

    def _visited(self, device: Any, i: Any, block: int, window: int | None) -> Any:
        """Returns how many key blocks each query block of a device visits."""
        row = self._in_row(device, i, block)
        return row - self._first(row, block, window) + 1

    def _in_row(self, device: Any, i: Any, block: int) -> Any:
        """Returns the number in the row of query block i of a device."""
        of_chunk = self.padded // block
        late = i // of_chunk  # 0 or 1: the device's second chunk
        chunk = device + late * (2 * self.devices - 1 - 2 * device)
        return chunk * of_chunk + i % of_chunk

    def _start(self, row: Any, block: int) -> Any:
        """Returns the index in the row, without padding, at which a block begins."""
        of_chunk = self.padded // block
        return row // of_chunk * self.chunk + row % of_chunk * block

    def _first(self, row: Any, block: int, window: int | None) -> Any:
        if window is None:
            return 0 * row
        module: Any = jnp if isinstance(row, jax.Array) else np
        seen = module.maximum(self._start(row, block) - window + 1, 0)
        of_chunk = self.padded // block
        first = seen // self.chunk * of_chunk + seen % self.chunk // block
        # A block of padding alone may begin where the next chunk does.
        return module.minimum(first, row)

    def first_key(self, i: Any, block: int, window: int | None) -> Any:
        return self._first(self._in_row(self.device, i, block), block, window)

    def key_place(self, j: Array, block: int) -> Array:
        of_chunk, last = self.padded // block, 2 * self.devices - 1
        chunk = jnp.minimum(j // of_chunk, last)
        # Where `chunk_order` has it.
        place = jnp.where(chunk < self.devices, 2 * chunk, 2 * (last - chunk) + 1)
        return place * of_chunk + j % of_chunk

    def visible(
        self, segments: Array | None, i: Array, j: Array, block: int, window: int | None
    ) -> Bool[Array, "B t s"]:
        row = self._in_row(self.device, i, block)
        inner = jnp.arange(block)
        columns = self._start(j, block) + inner
        seen = see(self._start(row, block) + inner, columns, window)
        if self.padded != self.chunk:
            of_chunk = self.padded // block
            seen = seen & (j % of_chunk * block + inner < self.chunk)[None, None]
        if segments is None:
            return seen
        q_segments, k_segments = (
            slice_block(segments, self.key_place(number, block), block)
            for number in (row, j)
        )
        return seen & (q_segments[:, :, None] == k_segments[:, None, :])
