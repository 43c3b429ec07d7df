"""Which blocks of queries and keys meet, and in which order they do.

`reach` computes, with plain array operations and before a kernel runs, which blocks of
the other side a block has to look at. `operands` passes that to a kernel, where
`Visits` makes an order of it: first the blocks of which something is hidden, then the
others, so that each kind has a loop of its own.

Imported only when a kernel is used; written for and checked with jax 0.11.2 and 0.12.0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 64
"""Rows of a product of one warpgroup."""
GROUPS = 2
"""Warpgroups of a block of threads that compute."""
BLOCK = GROUPS * ROWS
"""Rows of a block of threads, queries or keys."""


class Reach(NamedTuple):
    """For each block, the blocks of the other side that it meets; int32 [B, blocks]."""

    first: jax.Array
    last: jax.Array
    """Those in [first, last] are looked at; nothing in the others is visible."""
    clear_from: jax.Array
    clear_to: jax.Array
    """Those in [clear_from, clear_to) are visible throughout: no mask is needed."""


def reach(
    segments: jax.Array,
    rows: int,
    other_rows: int,
    *,
    queries: bool,
    window: jax.Array | int | None = None,
) -> Reach:
    """Computes which blocks meet.

    Segment ids need not ascend. Two blocks do not meet if the ranges of their ids other
    than 0 are disjoint, and at most one of them holds a 0. Padding is not part of the
    range: else a block of the last document and padding would meet the whole row.

    Args:
      segments: int32 [B, T].
      rows: of a block.
      other_rows: of a block of the other side.
      queries: whether the blocks are of queries, and the others of keys; or the
        reverse.
      window: keys that a query sees, itself included; None = all before it.

    Returns:
      The ranges, exact where segments are contiguous.
    """
    ids, other_ids = _ids(segments, rows), _ids(segments, other_rows)
    count = other_ids.padded.shape[1]
    ids = _Ids(*(a[:, :, None] for a in ids))
    other_ids = _Ids(*(a[:, None, :] for a in other_ids))
    # [B, blocks, other blocks]: only reductions over the last axis leave the fusion.
    meets = (ids.lowest <= other_ids.highest) & (other_ids.lowest <= ids.highest)
    meets |= ids.padded & other_ids.padded
    # All ids equal: both ranges are one and the same number. (With L and H of the other
    # side, l = H >= L = h >= l.)
    clear = (ids.lowest == other_ids.highest) & (other_ids.lowest == ids.highest)
    clear &= ~(ids.padded | other_ids.padded)
    other = jnp.arange(count, dtype=jnp.int32)[None, None, :]
    start = rows * jnp.arange(segments.shape[1] // rows, dtype=jnp.int32)
    start = start[None, :, None]
    # Causally visible in part, and throughout.
    if queries:
        causal = other * other_rows < start + rows
        fully_causal = (other + 1) * other_rows <= start
        # Smallest and largest distance of a key from a query.
        nearest = start - (other + 1) * other_rows + 1
        farthest = start + rows - 1 - other * other_rows
    else:
        causal = (other + 1) * other_rows > start
        fully_causal = other * other_rows >= start + rows
        nearest = other * other_rows - (start + rows - 1)
        farthest = (other + 1) * other_rows - 1 - start
    meets &= causal
    if window is not None:
        meets &= nearest < window
        clear &= farthest < window
    # Never empty: a block meets the one on its diagonal, as every token sees itself.
    first = jnp.where(meets, other, count).min(axis=2)
    last = jnp.where(meets, other, -1).max(axis=2)
    fully_causal_count = fully_causal.sum(axis=2, dtype=jnp.int32)
    unclear = fully_causal & ~clear
    # Next to the diagonal, from the last block that holds another segment.
    if queries:
        clear_from = jnp.where(unclear, other + 1, 0).max(axis=2)
        clear_to = jnp.broadcast_to(fully_causal_count, first.shape)
    else:
        clear_from = jnp.broadcast_to(count - fully_causal_count, first.shape)
        clear_to = jnp.where(unclear, other, count).min(axis=2)
    return Reach(first, last, clear_from, clear_to)


def causal_reach(
    batch: int, length: int, rows: int, other_rows: int, *, queries: bool
) -> Reach:
    """Returns the `reach` of rows of one segment, without a computation."""
    count = length // other_rows
    start = rows * np.arange(length // rows, dtype=np.int32)
    if queries:
        last = (start + rows - 1) // other_rows
        # From key 0 to the diagonal; clear are blocks that end before the first query.
        limits = (0 * start, last, 0 * start, start // other_rows)
    else:
        # Clear from the first query block that begins after the last key.
        clear_from = -(-(start + rows) // other_rows)
        everything = 0 * start + count
        limits = (start // other_rows, everything - 1, clear_from, everything)
    return Reach(*(jnp.asarray(np.tile(limit, (batch, 1))) for limit in limits))


class _Ids(NamedTuple):
    """The ids in each block: the range of those other than 0, and whether any is 0."""

    lowest: jax.Array
    highest: jax.Array
    padded: jax.Array


def _ids(segments: jax.Array, rows: int) -> _Ids:
    ids = segments.reshape(segments.shape[0], -1, rows)
    padding = ids == 0
    # Neutral elements of min and max: a block of padding has an empty range, which is
    # disjoint from every other.
    limits = jnp.iinfo(jnp.int32)
    return _Ids(
        jnp.where(padding, limits.max, ids).min(axis=2),
        jnp.where(padding, limits.min, ids).max(axis=2),
        padding.any(axis=2),
    )


def longest_first(limits: Reach) -> jax.Array:
    """Returns the blocks of all rows, numbered row by row, in order of their length.

    That is the number of blocks that they meet. Computed without a sort, which would be
    a kernel of its own: the comparisons of all pairs are reduced at once.
    """
    length = (limits.last - limits.first).reshape(-1)
    number = np.arange(length.size, dtype=np.int32)
    before = length[None, :] > length[:, None]
    before |= (length[None, :] == length[:, None]) & (number[None, :] < number[:, None])
    rank = before.sum(axis=1, dtype=jnp.int32)
    return jnp.where(rank[None, :] == number[:, None], number, 0).sum(axis=1)


# --- Within a kernel ---


class Schedule(NamedTuple):
    """Which tiles, a block of rows of one head each, a block of threads computes.

    As many blocks of threads as there are multiprocessors stay, and go over the tiles
    in rounds, from the longest to the shortest. Every other round runs backwards, so
    that no block gets the longer ones each time.
    """

    order: Any
    """Of `longest_first`."""
    heads: int
    blocks: int
    """Of a row."""
    threads: int
    """Blocks of threads."""

    def rounds(self) -> Any:
        """Returns how many tiles this block of threads computes."""
        full, rest = divmod(self.order.shape[0] * self.heads, self.threads)
        return full + (self._place(full) < rest).astype(jnp.int32)

    def tile(self, number: Any) -> tuple[Any, Any, Any]:
        """Returns row, head and block of a round's tile; past the last, of the last.

        Heads run first: those that share keys run together and find them in L2.
        """
        tile = number * self.threads + self._place(number)
        tile = jnp.minimum(tile, self.order.shape[0] * self.heads - 1)
        block = self.order[jax.lax.div(tile, self.heads)]
        head = jax.lax.rem(tile, self.heads)
        return jax.lax.div(block, self.blocks), head, jax.lax.rem(block, self.blocks)

    def _place(self, number: Any) -> Any:
        own = jax.lax.axis_index("block")
        backwards = jax.lax.rem(number, 2) == 1
        return jnp.where(backwards, self.threads - 1 - own, own)


class Visits(NamedTuple):
    """The order in which one block goes over those of the other side.

    Blocks of which something is hidden come first: those before the clear ones, then
    those after. The one on the diagonal is always among them. Where a block goes over
    several heads, the masked blocks of all heads come before the clear ones.
    """

    first: Any
    before: Any
    """Masked blocks of a head before the clear ones."""
    masked_each: Any
    """Masked blocks of a head, at least 1."""
    clear_from: Any
    clear_to: Any
    masked: Any
    """Steps with masked blocks."""
    total: Any
    """Steps."""

    @classmethod
    def of(cls, limits: Reach, row: Any, block: Any, heads: int = 1) -> Visits:
        """Reads the limits of a block, which are scalars."""
        first, last, clear_from, clear_to = (limit[row, block] for limit in limits)
        clear_from = jnp.maximum(first, clear_from)
        clear_to = jnp.maximum(clear_from, jnp.minimum(last + 1, clear_to))
        before, each = clear_from - first, last + 1 - first
        masked = each - (clear_to - clear_from)
        steps = (masked * heads, each * heads)
        return cls(first, before, masked, clear_from, clear_to, *steps)

    def block(self, step: Any) -> Any:
        """Returns the block of a step."""
        is_masked, number = self._of_its_kind(step)
        number = jax.lax.rem(number, self._each(is_masked))
        after = self.clear_to + number - self.before
        masked = jnp.where(number < self.before, self.first + number, after)
        return jnp.where(is_masked, masked, self.clear_from + number)

    def member(self, step: Any) -> Any:
        """Returns the number of the head of a step."""
        is_masked, number = self._of_its_kind(step)
        return jax.lax.div(number, self._each(is_masked))

    def _of_its_kind(self, step: Any) -> tuple[Any, Any]:
        is_masked = step < self.masked
        return is_masked, jnp.where(is_masked, step, step - self.masked)

    def _each(self, is_masked: Any) -> Any:
        return jnp.where(is_masked, self.masked_each, self.clear_to - self.clear_from)


def operands(
    segments: jax.Array | None,
    window: jax.Array | int | None,
    batch: int,
    length: int,
    other_rows: int,
    *,
    queries: bool,
) -> list[jax.Array]:
    """Returns what a kernel takes besides matrices; `split` takes it apart again.

    Args:
      segments: int32 [B, T], or None for one segment.
      window: keys that a query sees, itself included; None = all before it.
      batch: B.
      length: T.
      other_rows: as for `reach`.
      queries: as for `reach`.

    Returns:
      The limits of `Reach`; the marks of every token, int32 [B, 1 or 2, T]: its index
      and its segment id, if there are segments; the window [1], if there is one.
    """
    marks = index = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32), (batch, 1, length)
    )
    if segments is not None:
        marks = jnp.concatenate([index, segments[:, None]], axis=1)
    if segments is None and window is None:
        limits = causal_reach(batch, length, BLOCK, other_rows, queries=queries)
        return [*limits, marks]
    ids = jnp.ones((batch, length), jnp.int32) if segments is None else segments
    limits = reach(ids, BLOCK, other_rows, queries=queries, window=window)
    if window is None:
        return [*limits, marks]
    return [*limits, marks, jnp.asarray(window, jnp.int32).reshape(1)]


class Given(NamedTuple):
    """References to the arrays of `operands`."""

    limits: Reach
    marks: Any
    window: Any
    """None where there is none."""

    @classmethod
    def split(cls, refs: Any, *, windowed: bool) -> tuple[Given, Any]:
        """Splits the references of a kernel; those that follow come second."""
        refs = list(refs)
        limits = Reach(*(refs.pop(0) for _ in Reach._fields))
        marks = refs.pop(0)
        return cls(limits, marks, refs.pop(0) if windowed else None), refs
