"""Causal attention within segments for Hopper GPUs, in Pallas (Mosaic GPU).

The blockwise algorithm with a running softmax (Dao 2023,
https://arxiv.org/abs/2307.08691): scores never leave the registers, and the backward
keeps one number for each query and head, the logarithm of the sum of its exponentials.

Three kernels, in each of which a block of threads (two warpgroups of 64 rows) computes
the rows that it writes:
  forward     writes queries, goes over keys:     out, lse
  queries     writes queries, goes over keys:     dq
  keys        writes keys, goes over queries:     dk, dv
The two of the backward both recompute the scores. That is 7 products for the 5 of one
kernel that adds to dq from many blocks at once; it needs no float32 dq in memory, no
atomic operation, and gives the same bits each time.

These are the kernels; `pallas_kernels.attention.api` chooses, checks and
differentiates. docs/attention.md has the counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.blocks import (
    BLOCK,
    GROUPS,
    MASKED,
    ROWS,
    Mark,
    Reach,
    Ring,
    across,
    add_products,
    causal_reach,
    full,
    launch,
    masked,
    products,
    reach,
    stream,
    vector,
    zeros,
)
from pallas_kernels.mosaic import operand

# exp2 is one instruction; scores are scaled by log2(e) so that it gives exp.
LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """How a kernel goes over the other side."""

    width: int
    """Rows of the other side that a step takes: 64 or 128."""
    stages: int
    """Steps whose operands are in shared memory at once, at least 2."""


# What the registers of a thread (255) and the shared memory of a block (227 KiB) hold;
# ptxas spills if a step is wider.
FORWARD = {64: Tiles(128, 4), 128: Tiles(128, 3)}
"""Head width -> how `forward` goes over the keys."""
QUERIES = {64: Tiles(128, 4), 128: Tiles(64, 4)}
"""How the kernel that computes dq goes over the keys."""
KEYS = {64: Tiles(128, 4), 128: Tiles(64, 4)}
"""How the kernel that computes dk and dv goes over the queries."""


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention, and the log-sum-exp of every query's scores.

    Args:
      q: bfloat16 [B, T, N, H], T a multiple of `BLOCK`, H 64 or 128.
      k: bfloat16 [B, T, K, H].
      v: bfloat16 [B, T, K, H].
      segments: int32 [B, T], or None for one segment.
      window: keys that a query sees, itself included; None = all before it. It may be
        an array: blocks outside of it are left out by the ranges given to the kernel.
      scale: factor of the scores; None = H^-1/2.
      softcap: c in c tanh(score / c); None = no cap.
      tiles: how to go over the keys.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The output, as `q`, and the natural logarithms, float32 [B, N, T].
    """
    batch, length, heads, width = q.shape
    # Consecutive query heads share a key/value head.
    sharing = heads // k.shape[2]
    keys, stages = tiles or FORWARD[width]
    form = Form.of(width, scale, softcap)
    scale = form.scale * LOG2E
    split_refs = _refs_splitter(segments, window)

    def attention_forward(q: Any, k: Any, v: Any, *refs: Any) -> None:
        limits, marks, refs = split_refs(refs)
        out, lse, q_s, k_s, v_s, rows_ready, ready, free = refs
        row, head, block, group = _program_ids(length // BLOCK)
        queries = pl.ds(block * BLOCK + group * ROWS, ROWS)
        target = (row, queries, head)
        plgpu.copy_gmem_to_smem(q.at[target], q_s.at[group], rows_ready.at[group])
        # Scalars: which key blocks are visited, and which of them without a mask.
        first, last, *clear = (limit[row, block] for limit in limits)

        def fetch(step: Any, slot: Any) -> None:
            source = (
                row,
                pl.ds((first + step) * keys, keys),
                jax.lax.div(head, sharing),
            )
            plgpu.copy_gmem_to_smem(k.at[source], k_s.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(v.at[source], v_s.at[slot], ready.at[slot])

        def compute(step: Any, slot: Any, carry: Any) -> Any:
            sums, top, total = carry
            key_block = first + step
            step_keys = pl.ds(key_block * keys, keys)
            # [64 queries, keys]. `wgmma` reads a 16-bit operand in either order: the
            # transposition of k is a flag, not a copy.
            (scores,) = products((q_s.at[group], k_s.at[slot].transpose((1, 0))))
            scores = masked(
                form.cap(scores),
                (key_block >= clear[0]) & (key_block < clear[1]),
                [mark.of((row, queries), (row, step_keys)) for mark in marks],
                transposed=False,
            )
            # As in `xla._flash_fwd`, with exponentials of base 2.
            # The scale multiplies the maximum and, within the exponent, the scores: one
            # multiply-add for each, and no pass of its own.
            new_top = jnp.maximum(top, scores.max(axis=1) * scale)
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores * scale - across(new_top, scores.shape))
            # Summed in float32, before the product below takes the weights as bfloat16.
            total = total * shrink + weights.sum(axis=1)
            sums = sums * across(shrink, sums.shape)
            (sums,) = add_products(
                (sums, weights.astype(v.dtype), v_s.at[slot]), interpret=bool(interpret)
            )
            return sums, new_top, total

        # A warpgroup waits for its own rows only.
        plgpu.barrier_wait(rows_ready.at[group])
        # The running maximum starts below a masked score, so that the first visible
        # score wipes out what came of masked ones.
        sums, top, total = stream(
            Ring(ready, free, stages),
            group,
            last - first + 1,
            fetch=fetch,
            compute=compute,
            carry=(zeros(ROWS, width), full(ROWS, 2 * MASKED), full(ROWS, 0.0)),
            interpret=bool(interpret),
        )
        # A query sees at least itself, so the total is not 0. No product reads q any
        # more: its buffer takes the output, in the layout that the copy expects.
        q_s[group] = (sums * across(1.0 / total, sums.shape)).astype(out.dtype)
        # Back to base e: ln(sum e^s) = m ln 2 + ln l.
        lse[row, head, queries] = top * (1.0 / LOG2E) + jnp.log(total)
        # Threads wrote the buffer: only now may the copy engine read it.
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[group], out.at[target])
        # The copy reads shared memory, which is given away when the threads end.
        plgpu.wait_smem_to_gmem(0)

    run = launch(
        attention_forward,
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        [
            operand((GROUPS, ROWS, width), q.dtype),
            operand((stages, keys, width), q.dtype),
            operand((stages, keys, width), q.dtype),
            # Arrivals that complete each: the copy of q; the copies of k and v into a
            # slot; the warpgroups that have used the slot.
            plgpu.Barrier(num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        ],
        # Heads run first: those that share keys run together and find them in L2.
        grid={"block": length // BLOCK, "row": batch, "head": heads},
        interpret=interpret,
    )
    operands = _operands(segments, window, batch, length, keys, queries=True)
    out, lse = run(q, k, v, *operands)
    return out, lse


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    window: jax.Array | int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    query_tiles: Tiles | None = None,
    key_tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the derivative from the results of `forward`.

    Args:
      q: as for `forward`.
      k: as for `forward`.
      v: as for `forward`.
      segments: as for `forward`.
      out: its output.
      lse: its log-sum-exp.
      dout: bfloat16, the derivative with respect to `out`.
      window: as for `forward`.
      scale: as for `forward`.
      softcap: as for `forward`.
      query_tiles: how the kernel that writes dq goes over the keys.
      key_tiles: how the kernel that writes dk and dv goes over the queries.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      dq, dk and dv in bfloat16, each rounded once from float32 sums.
    """
    # The softmax's derivative subtracts the sum over the keys of weight times its
    # derivative, which equals this sum over the head's width.
    inner = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    # [B, N, 2, T]: both numbers of a block of queries come with one copy.
    numbers = jnp.stack([lse * LOG2E, inner.swapaxes(1, 2)], axis=2)
    form = Form.of(q.shape[-1], scale, softcap)
    arrays = (q, k, v, dout, numbers, segments, window, form)
    dq = _backward_queries(*arrays, tiles=query_tiles, interpret=interpret)
    dk, dv = _backward_keys(*arrays, tiles=key_tiles, interpret=interpret)
    return dq, dk, dv


def _backward_queries(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    numbers: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | int | None,
    form: Form,
    *,
    tiles: Tiles | None,
    interpret: Any,
) -> jax.Array:
    """Computes dq."""
    batch, length, heads, width = q.shape
    sharing = heads // k.shape[2]
    keys, stages = tiles or QUERIES[width]
    split_refs = _refs_splitter(segments, window)

    def attention_backward_queries(
        q: Any, k: Any, v: Any, dout: Any, numbers: Any, *refs: Any
    ) -> None:
        limits, marks, refs = split_refs(refs)
        dq, q_s, dout_s, k_s, v_s, rows_ready, ready, free = refs
        row, head, block, group = _program_ids(length // BLOCK)
        queries = pl.ds(block * BLOCK + group * ROWS, ROWS)
        target = (row, queries, head)
        plgpu.copy_gmem_to_smem(q.at[target], q_s.at[group], rows_ready.at[group])
        plgpu.copy_gmem_to_smem(dout.at[target], dout_s.at[group], rows_ready.at[group])
        # One of each for a row, in registers through all steps.
        lse, inner = (vector(numbers.at[row, head, i, queries], 0) for i in range(2))
        first, last, *clear = (limit[row, block] for limit in limits)

        def fetch(step: Any, slot: Any) -> None:
            source = (
                row,
                pl.ds((first + step) * keys, keys),
                jax.lax.div(head, sharing),
            )
            plgpu.copy_gmem_to_smem(k.at[source], k_s.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(v.at[source], v_s.at[slot], ready.at[slot])

        def compute(step: Any, slot: Any, sums: Any) -> Any:
            key_block = first + step
            step_keys = pl.ds(key_block * keys, keys)
            scores, dweights = products(
                (q_s.at[group], k_s.at[slot].transpose((1, 0))),
                (dout_s.at[group], v_s.at[slot].transpose((1, 0))),
            )
            scores = masked(
                form.cap(scores),
                (key_block >= clear[0]) & (key_block < clear[1]),
                [mark.of((row, queries), (row, step_keys)) for mark in marks],
                transposed=False,
            )
            # p = e^(s - lse) is at most 1, so no maximum is needed here.
            factor = form.scale * LOG2E
            weights = jnp.exp2(scores * factor - across(lse, scores.shape))
            # ds = p (dp - inner); the scale multiplies the sum once, at the end.
            dscores = weights * (dweights - across(inner, scores.shape))
            dscores = form.through_cap(dscores, scores)
            (sums,) = add_products(
                (sums, dscores.astype(k.dtype), k_s.at[slot]), interpret=bool(interpret)
            )
            return sums

        plgpu.barrier_wait(rows_ready.at[group])
        sums = stream(
            Ring(ready, free, stages),
            group,
            last - first + 1,
            fetch=fetch,
            compute=compute,
            carry=zeros(ROWS, width),
            interpret=bool(interpret),
        )
        q_s[group] = (sums * form.slope).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[group], dq.at[target])
        plgpu.wait_smem_to_gmem(0)

    run = launch(
        attention_backward_queries,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [
            operand((GROUPS, ROWS, width), q.dtype),
            operand((GROUPS, ROWS, width), q.dtype),
            operand((stages, keys, width), q.dtype),
            operand((stages, keys, width), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        ],
        grid={"block": length // BLOCK, "row": batch, "head": heads},
        interpret=interpret,
    )
    operands = _operands(segments, window, batch, length, keys, queries=True)
    return run(q, k, v, dout, numbers, *operands)


def _backward_keys(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    numbers: jax.Array,
    segments: jax.Array | None,
    window: jax.Array | int | None,
    form: Form,
    *,
    tiles: Tiles | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Computes dk and dv.

    Scores are [keys, queries], so that they are the left operand of both sums.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    sharing = heads // groups
    queries, stages = tiles or KEYS[width]
    split_refs = _refs_splitter(segments, window)

    def attention_backward_keys(
        q: Any, k: Any, v: Any, dout: Any, numbers: Any, *refs: Any
    ) -> None:
        limits, marks, refs = split_refs(refs)
        dk, dv, k_s, v_s, q_s, dout_s, numbers_s, rows_ready, ready, free = refs
        row, head, block, group = _program_ids(length // BLOCK)
        # Of keys the first blocks have the most queries to go over.
        block = length // BLOCK - 1 - block
        keys = pl.ds(block * BLOCK + group * ROWS, ROWS)
        target = (row, keys, head)
        plgpu.copy_gmem_to_smem(k.at[target], k_s.at[group], rows_ready.at[group])
        plgpu.copy_gmem_to_smem(v.at[target], v_s.at[group], rows_ready.at[group])
        first, last, *clear = (limit[row, block] for limit in limits)
        # dk and dv of a key/value head sum over all query heads that share it. One
        # block of threads goes through them, so nothing is added in memory.
        steps_per_head = last - first + 1

        def fetch(step: Any, slot: Any) -> None:
            # All queries of one head after another.
            query_head = head * sharing + jax.lax.div(step, steps_per_head)
            query_block = first + jax.lax.rem(step, steps_per_head)
            step_queries = pl.ds(query_block * queries, queries)
            for array, buffer in ((q, q_s), (dout, dout_s)):
                source = array.at[row, step_queries, query_head]
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])
            source = numbers.at[row, query_head, :, step_queries]
            plgpu.copy_gmem_to_smem(source, numbers_s.at[slot], ready.at[slot])

        def compute(step: Any, slot: Any, carry: Any) -> Any:
            dk, dv = carry
            query_block = first + jax.lax.rem(step, steps_per_head)
            step_queries = pl.ds(query_block * queries, queries)
            # With dk and dv in them, the registers have room for two matrices of
            # scores, but not while one of them is masked.
            (scores,) = products((k_s.at[group], q_s.at[slot].transpose((1, 0))))
            scores = masked(
                form.cap(scores),
                (query_block >= clear[0]) & (query_block < clear[1]),
                [mark.of((row, step_queries), (row, keys)) for mark in marks],
                transposed=True,
            )
            lse = across(vector(numbers_s.at[slot, 0], 1), scores.shape, 1)
            weights = jnp.exp2(scores * (form.scale * LOG2E) - lse)
            # With keys as rows, `weights` is p^T: dv += p^T dout, and dp^T = v dout^T.
            dv, dweights = add_products(
                (dv, weights.astype(q.dtype), dout_s.at[slot]),
                (
                    zeros(*scores.shape),
                    v_s.at[group],
                    dout_s.at[slot].transpose((1, 0)),
                ),
                interpret=bool(interpret),
            )
            inner = across(vector(numbers_s.at[slot, 1], 1), scores.shape, 1)
            dscores = form.through_cap(weights * (dweights - inner), scores)
            # dk += ds^T q
            (dk,) = add_products(
                (dk, dscores.astype(q.dtype), q_s.at[slot]), interpret=bool(interpret)
            )
            return dk, dv

        plgpu.barrier_wait(rows_ready.at[group])
        dk_sums, dv_sums = stream(
            Ring(ready, free, stages),
            group,
            steps_per_head * sharing,
            fetch=fetch,
            compute=compute,
            carry=(zeros(ROWS, width), zeros(ROWS, width)),
            interpret=bool(interpret),
        )
        # Only dk has the scale: dv is a product with p itself.
        k_s[group] = (dk_sums * form.slope).astype(dk.dtype)
        v_s[group] = dv_sums.astype(dv.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s.at[group], dk.at[target])
        plgpu.copy_smem_to_gmem(v_s.at[group], dv.at[target])
        plgpu.wait_smem_to_gmem(0)

    run = launch(
        attention_backward_keys,
        (
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        [
            operand((GROUPS, ROWS, width), q.dtype),
            operand((GROUPS, ROWS, width), q.dtype),
            operand((stages, queries, width), q.dtype),
            operand((stages, queries, width), q.dtype),
            # lse and inner of a step's queries: the third copy into a slot.
            plgpu.SMEM((stages, 2, queries), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        ],
        grid={"block": length // BLOCK, "row": batch, "head": groups},
        interpret=interpret,
    )
    operands = _operands(segments, window, batch, length, queries, queries=False)
    dk, dv = run(q, k, v, dout, numbers, *operands)
    return dk, dv


class Form(NamedTuple):
    """How scores follow from products q k^T."""

    scale: float
    """Factor of the scores, after the cap if there is one."""
    slope: float
    """Factor of the derivative with respect to q and k."""
    inner: float | None
    """Factor of the products within tanh; None = no cap."""

    @classmethod
    def of(cls, width: int, scale: float | None, softcap: float | None) -> Form:
        """Returns the form for heads of a width; as `forward` takes the others."""
        scale = 1.0 / math.sqrt(width) if scale is None else scale
        if softcap is None:
            return cls(scale, scale, None)
        # c tanh(scale q k / c): the cap itself becomes the factor.
        return cls(softcap, scale, scale / softcap)

    def cap(self, products: jax.Array) -> jax.Array:
        """Returns what `scale` multiplies to scores."""
        return products if self.inner is None else jnp.tanh(products * self.inner)

    def through_cap(self, dscores: jax.Array, capped: jax.Array) -> jax.Array:
        """Returns the derivative before the cap; `capped` may be masked."""
        if self.inner is None:
            return dscores
        # A masked score is far outside of the range of tanh, and its square infinite.
        slope = jnp.where(capped < -1.5, 0.0, 1.0 - capped * capped)
        return dscores * slope


def _program_ids(blocks: int) -> tuple[Any, Any, Any, Any]:
    """Returns row of the batch, head, block of rows and warpgroup; last blocks first.

    Of queries the last blocks have the most keys to go over, and what takes longest
    should not begin last.
    """
    axis = jax.lax.axis_index
    return axis("row"), axis("head"), blocks - 1 - axis("block"), axis("group")


def _operands(
    segments: jax.Array | None,
    window: jax.Array | int | None,
    batch: int,
    length: int,
    other_rows: int,
    *,
    queries: bool,
) -> list[jax.Array]:
    """Returns the ranges of blocks, and what is compared where blocks are masked."""
    # In the order in which `masked` compares them: indices, ids, ends of windows.
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    marks = [index] if segments is None else [index, segments]
    if window is not None:
        # A key is seen by the queries before index + window.
        marks.append(index + jnp.asarray(window, jnp.int32))
    if segments is None and window is None:
        limits = causal_reach(batch, length, BLOCK, other_rows, queries=queries)
    else:
        ids = jnp.ones_like(index) if segments is None else segments
        limits = reach(ids, BLOCK, other_rows, queries=queries, window=window)
    return [*limits, *marks]


def _refs_splitter(
    segments: jax.Array | None, window: jax.Array | int | None
) -> Callable[[Any], tuple[Reach, list[Mark], Any]]:
    """Returns a function that splits the refs of `_operands` from those that follow."""
    limits, count = len(Reach._fields), 1 + (segments is not None)
    end = limits + count + (window is not None)

    def split(refs: Any) -> tuple[Reach, list[Mark], Any]:
        index, *others = refs[limits:end]
        marks = [Mark(index, index, jnp.greater_equal)]
        if segments is not None:
            marks.append(Mark(others[0], others[0], jnp.equal))
        if window is not None:
            marks.append(Mark(index, others[-1], jnp.less))
        return Reach(*refs[:limits]), marks, refs[end:]

    return split
