"""What the attention kernels share: which blocks meet, how they come and are masked.

Everything here is about blocks of rows. `reach` says, with plain array operations and
before a kernel runs, which blocks of the other side a block has to look at. The rest
are the parts of a kernel's body: `stream` brings one block after the other through a
ring of buffers, `masked` hides what is not to be seen, `products` and `add_products`
are the tensor cores'.

Imported only when a kernel is asked for; written for and checked with jax 0.11.2 and
0.12.0.
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


class Reach(NamedTuple):
    """The blocks of the other side that each own block meets; int32 [B, own blocks]."""

    first: jax.Array
    last: jax.Array
    """Those in [first, last] are looked at, the others have nothing to be seen."""
    clear_from: jax.Array
    clear_to: jax.Array
    """Those in [clear_from, clear_to) are seen whole, and nothing in them masked."""


def reach(segments: jax.Array, own: int, other: int, *, queries: bool) -> Reach:
    """Finds which blocks meet.

    Segment ids need not ascend. Two blocks do not meet if the ranges of their ids other
    than 0 are disjoint, and at most one of them holds a 0: padding stands apart, so
    that a block of the last document and padding does not meet the whole row.

    Args:
      segments: int32 [B, T].
      own: rows of an own block.
      other: rows of a block of the other side.
      queries: whether the own rows are queries, and the others keys; or the reverse.

    Returns:
      The ranges, exact where segments are contiguous.
    """
    mine, theirs = _ids(segments, own), _ids(segments, other)
    count = theirs.padded.shape[1]
    mine = _Ids(*(a[:, :, None] for a in mine))
    theirs = _Ids(*(a[:, None, :] for a in theirs))
    meets = (mine.lowest <= theirs.highest) & (theirs.lowest <= mine.highest)
    meets |= mine.padded & theirs.padded
    clear = (mine.lowest == theirs.highest) & (theirs.lowest == mine.highest)
    clear &= ~(mine.padded | theirs.padded)
    at = jnp.arange(count, dtype=jnp.int32)[None, None, :]
    start = own * jnp.arange(segments.shape[1] // own, dtype=jnp.int32)[None, :, None]
    if queries:
        causal, whole = at * other < start + own, (at + 1) * other <= start
    else:
        causal, whole = (at + 1) * other > start, at * other >= start + own
    meets &= causal
    first = jnp.where(meets, at, count).min(axis=2)
    last = jnp.where(meets, at, -1).max(axis=2)
    wholly = whole.sum(axis=2, dtype=jnp.int32)
    if queries:
        clear_from = jnp.where(whole & ~clear, at + 1, 0).max(axis=2)
        clear_to = jnp.broadcast_to(wholly, first.shape)
    else:
        clear_from = jnp.broadcast_to(count - wholly, first.shape)
        clear_to = jnp.where(whole & ~clear, at, count).min(axis=2)
    return Reach(first, last, clear_from, clear_to)


def causal_reach(
    batch: int, length: int, own: int, other: int, *, queries: bool
) -> Reach:
    """What `reach` finds for rows of one segment, without a computation."""
    count = length // other
    start = own * np.arange(length // own, dtype=np.int32)
    if queries:
        limits = (0 * start, (start + own - 1) // other, 0 * start, start // other)
    else:
        limits = (start // other, 0 * start + count - 1)
        limits += (-(-(start + own) // other), 0 * start + count)
    return Reach(*(jnp.asarray(np.tile(limit, (batch, 1))) for limit in limits))


class _Ids(NamedTuple):
    """The ids in each block: the range of those other than 0, and whether any is 0."""

    lowest: jax.Array
    highest: jax.Array
    padded: jax.Array


def _ids(segments: jax.Array, block: int) -> _Ids:
    ids = segments.reshape(segments.shape[0], -1, block)
    padding = ids == 0
    limits = jnp.iinfo(jnp.int32)
    return _Ids(
        jnp.where(padding, limits.max, ids).min(axis=2),
        jnp.where(padding, limits.min, ids).max(axis=2),
        padding.any(axis=2),
    )


def stream(
    group: Any,
    steps: Any,
    stages: int,
    fetch: Callable[[Any, Any], None],
    compute: Callable[[Any, Any, Any], Any],
    carry: Any,
    *,
    ready: Any,
    free: Any,
    interpret: bool,
) -> Any:
    """Loops over steps whose operands come through a ring of buffers.

    The first warpgroup asks for operands, one step after the other one is done with
    what lay there before: it need not wait as long as they are less than a step apart.

    Args:
      group: the warpgroup.
      steps: how many, at least 1.
      stages: buffers of the ring, at least 2.
      fetch: starts the copies of a step into a slot; they arrive at `ready.at[slot]`.
      compute: (step, slot, carry) -> carry.
      carry: what the first step is given.
      ready: a barrier for each slot, passed when its copies are there.
      free: a barrier for each slot, passed when every warpgroup has used it.
      interpret: whether the interpreter runs the kernel.

    Returns:
      What the last step gave.
    """

    @pl.when(group == 0)
    def _() -> None:
        for stage in range(stages):
            pl.when(stage < steps)(lambda stage=stage: fetch(stage, stage))

    def one(step: Any, carry: Any) -> Any:
        slot = jax.lax.rem(step, stages)
        plgpu.barrier_wait(ready.at[slot])
        carry = compute(step, slot, carry)
        if interpret:
            # It wants a fence between a load and a copy to the same place, which a
            # device does without: a load is over when its thread arrives.
            plgpu.commit_smem()
        plgpu.barrier_arrive(free.at[slot])

        @pl.when((group == 0) & (step > 0))
        def _() -> None:
            before = jax.lax.rem(step - 1, stages)
            plgpu.barrier_wait(free.at[before])
            following = step - 1 + stages
            pl.when(following < steps)(lambda: fetch(following, before))

        return carry

    carry = jax.lax.fori_loop(0, steps, one, carry)

    @pl.when(group == 0)
    def _() -> None:
        plgpu.barrier_wait(free.at[jax.lax.rem(steps - 1, stages)])

    return carry


def masked(
    scores: jax.Array, clear: Any, marks: list[tuple[Any, Any]], *, transposed: bool
) -> jax.Array:
    """Hides what a query may not see: later keys, and those of other segments.

    Indices are read from memory like the ids. Counted by the threads they would not
    change from step to step, and the compiler would keep them in registers, of which
    there are none to spare.

    Args:
      scores: float32 [queries, keys], or with `transposed` [keys, queries].
      clear: whether there is nothing to hide.
      marks: of the queries and of the keys, int32 vectors in any memory: their indices,
        and their segment ids unless all are one.
      transposed: which side is which.

    Returns:
      The scores, `MASKED` where hidden.
    """

    def hide(scores: jax.Array) -> jax.Array:
        for pair, seen in zip(marks, (jnp.greater_equal, jnp.equal), strict=False):
            queries, keys = (
                across(vector(side, axis), scores.shape, axis)
                for side, axis in zip(
                    pair, (1, 0) if transposed else (0, 1), strict=True
                )
            )
            scores = jnp.where(seen(queries, keys), scores, MASKED)
            # Or all comparisons would come first, and their operands wait in registers.
            scores = jax.lax.optimization_barrier(scores)
        return scores

    return jax.lax.cond(clear, lambda scores: scores, hide, scores)


_WGMMA = plgpu.Layout.WGMMA
_SUMS: Any = plgpu.WGMMAAccumulatorRef
_LOAD: Any = plgpu.load  # jax 0.10, which has no kernels, knows other arguments


def products(*pairs: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """Computes `a @ b` for each pair, in float32; all lie in shared memory.

    All are begun before the first is waited for.
    """

    def multiply(*sums: Any) -> tuple[jax.Array, ...]:
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, b)
        return tuple(total[...] for total in sums)

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(multiply, *(_SUMS(s, jnp.float32) for s in shapes))


def add_products(
    *terms: tuple[jax.Array, Any, Any], interpret: bool
) -> tuple[jax.Array, ...]:
    """Computes `sums + a @ b` for each (sums, a, b).

    All are begun before the first is waited for. `a` is in registers or in shared
    memory, `b` in shared memory. The interpreter knows no product with an operand in
    registers, and is given an ordinary one of the same arrays.
    """
    if interpret:
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
    """Sums to add products to."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), _WGMMA)


def full(rows: int, value: float) -> jax.Array:
    """A float32 number for each row of a product."""
    whole = jnp.full((rows,), value, jnp.float32)
    return plgpu.layout_cast(whole, _WGMMA.reduce(1))


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
    """Makes a kernel of two warpgroups out of a body; the last grid axis runs first."""
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=tuple(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        **settings,
    )
