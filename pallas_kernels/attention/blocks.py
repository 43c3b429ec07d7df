"""What the attention kernels share: which blocks meet, how they are loaded and masked.

Everything here is about blocks of rows. `reach` computes, with plain array operations
and before a kernel runs, which blocks of the other side a block has to look at. The
rest are parts of a kernel's body: `stream` brings one block after the other through a
ring of buffers, `masked` hides what a query may not see, `products` and `add_products`
use the tensor cores.

Imported only when a kernel is used; written for and checked with jax 0.11.2 and 0.12.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows of a product of one warpgroup."""
GROUPS = 2
"""Warpgroups of a block of threads."""
BLOCK = GROUPS * ROWS
"""Rows of a block of threads, queries or keys."""
MASKED = -(2.0**100)
"""Large and negative but finite, and a power of two: its product with any scale is
exact, so that two masked scores differ by nothing however they are rounded."""


# --- Which blocks meet ---


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


# --- Loading and masking ---


class Ring(NamedTuple):
    """Barriers of a ring of buffers, one for each slot."""

    ready: Any
    """Passed when the copies into the slot are complete."""
    free: Any
    """Passed when every warpgroup has used the slot."""
    stages: int
    """Slots of the ring, at least 2."""


def stream(
    ring: Ring,
    group: Any,
    steps: Any,
    *,
    fetch: Callable[[Any, Any], None],
    compute: Callable[[Any, Any, Any], Any],
    carry: Any,
    interpret: bool,
) -> Any:
    """Loops over steps whose operands come through a ring of buffers.

    The first warpgroup fetches operands, one step after the other group is done with
    the slot's previous ones: it need not wait as long as they are less than a step
    apart.

    Args:
      ring: the barriers.
      group: the warpgroup.
      steps: how many, at least 1.
      fetch: starts the copies of a step into a slot; they arrive at `ready.at[slot]`.
      compute: (step, slot, carry) -> carry.
      carry: of the first step.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The carry of the last step.
    """
    ready, free, stages = ring

    @pl.when(group == 0)
    def _() -> None:
        # Fills the ring. Later steps are fetched into slots as these become free.
        for stage in range(stages):
            pl.when(stage < steps)(lambda stage=stage: fetch(stage, stage))

    def step(number: Any, carry: Any) -> Any:
        slot = jax.lax.rem(number, stages)
        plgpu.barrier_wait(ready.at[slot])
        carry = compute(number, slot, carry)
        if interpret:
            # It demands a fence between a load and a copy to the same address. A device
            # needs none: a load is over when its thread arrives.
            plgpu.commit_smem()
        plgpu.barrier_arrive(free.at[slot])

        @pl.when((group == 0) & (number > 0))
        def _() -> None:
            previous_slot = jax.lax.rem(number - 1, stages)
            plgpu.barrier_wait(free.at[previous_slot])
            # The next step whose operands belong into that slot.
            following = number - 1 + stages
            pl.when(following < steps)(lambda: fetch(following, previous_slot))

        return carry

    carry = jax.lax.fori_loop(0, steps, step, carry)

    @pl.when(group == 0)
    def _() -> None:
        # The loop has waited for the slots of all steps but the last.
        plgpu.barrier_wait(free.at[jax.lax.rem(steps - 1, stages)])

    return carry


class Mark(NamedTuple):
    """One comparison that hides keys from queries."""

    queries: Any
    keys: Any
    """int32 vectors in any memory."""
    visible: Callable[[jax.Array, jax.Array], jax.Array]
    """Of their numbers, [queries, keys]."""

    def of(self, queries: tuple, keys: tuple) -> Mark:
        """Returns the mark of some queries and keys."""
        return Mark(self.queries.at[queries], self.keys.at[keys], self.visible)


def masked(
    scores: jax.Array, clear: Any, marks: list[Mark], *, transposed: bool
) -> jax.Array:
    """Hides what a query may not see: later keys, distant ones, other segments.

    Indices are read from memory like the ids. Counted by the threads they would not
    change from step to step, and the compiler would keep them in registers, of which
    there are none to spare.

    Args:
      scores: float32 [queries, keys], or with `transposed` [keys, queries].
      clear: whether there is nothing to hide.
      marks: what is compared, of the queries and of the keys.
      transposed: whether the keys come first.

    Returns:
      The scores, `MASKED` where hidden.
    """
    axes = (1, 0) if transposed else (0, 1)

    def hide(scores: jax.Array) -> jax.Array:
        for mark in marks:
            queries, keys = (
                across(vector(ref, axis), scores.shape, axis)
                for ref, axis in zip((mark.queries, mark.keys), axes, strict=True)
            )
            scores = jnp.where(mark.visible(queries, keys), scores, MASKED)
            # Or all comparisons would come first, and their operands wait in registers.
            scores = jax.lax.optimization_barrier(scores)
        return scores

    return jax.lax.cond(clear, lambda scores: scores, hide, scores)


# --- The tensor cores ---

_WGMMA = plgpu.Layout.WGMMA
_SUMS: Any = plgpu.WGMMAAccumulatorRef
_LOAD: Any = plgpu.load  # jax 0.10, which has no kernels, declares other arguments


def products(*pairs: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """Computes `a @ b` for each pair in shared memory, in float32.

    All are started before the first is waited for.
    """

    def multiply(*sums: Any) -> tuple[jax.Array, ...]:
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, b)
        # Reading an accumulator waits for its products.
        return tuple(total[...] for total in sums)

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(multiply, *(_SUMS(s, jnp.float32) for s in shapes))


def add_products(
    *terms: tuple[jax.Array, Any, Any], interpret: bool
) -> tuple[jax.Array, ...]:
    """Computes `sums + a @ b` for each (sums, a, b).

    All are started before the first is waited for. `a` is in registers or in shared
    memory, `b` in shared memory.
    """
    if interpret:
        # It has no product with an operand in registers: an ordinary one replaces it.
        return tuple(
            sums + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
            if isinstance(a, jax.Array)
            else sums + products((a, b))[0]
            for sums, a, b in terms
        )

    def multiply(sums: tuple[Any, ...]) -> None:
        for total, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(total, a, b)

    return pl.run_state(multiply)(tuple(_SUMS.init(sums) for sums, _, _ in terms))


def zeros(rows: int, columns: int) -> jax.Array:
    """Returns sums to add products to."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), _WGMMA)


def full(rows: int, value: float) -> jax.Array:
    """Returns a float32 number for each row of a product."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), _WGMMA.reduce(1))


def vector(ref: Any, axis: int) -> jax.Array:
    """Loads a number for each row (axis 0) or column (axis 1) of a product."""
    return _LOAD(ref, layout=_WGMMA.reduce(1 - axis), optimized=False)


def across(x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """Repeats a number for each row (axis 0) or column (axis 1)."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def launch(
    body: Any,
    out: Any,
    scratch: list[Any],
    *,
    grid: dict[str, int],
    interpret: Any,
) -> Any:
    """Makes a kernel of two warpgroups from a body; the last grid axis runs first."""
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=tuple(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS,
        thread_name="group",
        # Exponentials as `ex2.approx`. Lane semantics takes the layouts given above;
        # the default since jax 0.11 infers them.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        **settings,
    )
