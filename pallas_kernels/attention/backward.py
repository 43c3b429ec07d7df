"""The backward pass of causal attention within segments, for Hopper GPUs.

It recomputes the softmax weights from one number for each query and head, the logarithm
of the sum of the exponentials. Two kernels, in each of which a block of threads (two
warpgroups of 64 rows, and one that copies) computes the rows that it writes:
  queries     writes queries, goes over keys:     dq
  keys        writes keys, goes over queries:     dk, dv
Both recompute the scores. That is 7 products for the 5 of one kernel that adds to dq
from many blocks at once; it needs no float32 dq in memory, no atomic operation, and
gives the same bits each time. docs/attention.md has the counts.

In both the product that adds a step's derivatives of the scores is started with the
products of the next step's scores, so that the tensor cores get one long sequence from
each warpgroup in turn.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.blocks import (
    LOG2E,
    Form,
    Ring,
    Tiles,
    Turns,
    across,
    add_products,
    launch,
    masked,
    opaque,
    products,
    vector,
    zeros,
)
from pallas_kernels.attention.reach import BLOCK, GROUPS, ROWS, Given, Visits, operands
from pallas_kernels.mosaic import operand

# What the registers of a thread and the shared memory of a block (227 KiB) hold.
QUERIES = {64: Tiles(128, 4), 128: Tiles(128, 2)}
"""Head width -> how the kernel that computes dq goes over the keys."""
KEYS = {64: Tiles(128, 3), 128: Tiles(64, 4)}
"""How the kernel that computes dk and dv goes over the queries."""


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
    split = functools.partial(Given.split, windowed=window is not None)
    marks = 1 if segments is None else 2
    interpreted = bool(interpret)

    def place() -> tuple[Any, Any, Any]:
        """Row of the batch, head, and block: those with the most keys begin first."""
        axis = jax.lax.axis_index
        return axis("row"), axis("head"), length // BLOCK - 1 - axis("block")

    def copy(q: Any, k: Any, v: Any, dout: Any, numbers: Any, *refs: Any) -> None:
        del q, dout, numbers
        given, (_, _, _, _, k_ring, v_ring, _) = split(refs)
        row, head, block = place()
        visits = Visits.of(given.limits, row, block)

        def step(number: Any, carry: None) -> None:
            del carry
            step_keys = pl.ds(visits.block(number) * keys, keys)
            source = (row, step_keys, jax.lax.div(head, sharing))
            k_ring.copy(number, k.at[source], given.marks.at[row, :, step_keys])
            v_ring.copy(number, v.at[source])

        jax.lax.fori_loop(0, visits.total, step, None)

    def compute(
        group: Any, q: Any, k: Any, v: Any, dout: Any, numbers: Any, *refs: Any
    ) -> None:
        del v
        given, refs = split(refs)
        dq, q_s, dout_s, rows_ready, k_ring, v_ring, turns = refs
        turns = Turns(turns, group)
        row, head, block = place()
        visits = Visits.of(given.limits, row, block)
        queries = pl.ds(block * BLOCK + group * ROWS, ROWS)
        target = (row, queries, head)
        plgpu.copy_gmem_to_smem(q.at[target], q_s.at[group], rows_ready.at[group])
        plgpu.copy_gmem_to_smem(dout.at[target], dout_s.at[group], rows_ready.at[group])
        # One of each for a row, in registers through all steps.
        lse, inner = (vector(numbers.at[row, head, i, queries], 0) for i in range(2))
        rows = [vector(given.marks.at[row, i, queries], 0) for i in range(marks)]
        window = None if given.window is None else given.window[0]

        def dscores_of(scores: Any, dweights: Any, columns: Any, hidden: bool) -> Any:
            scores = form.cap(scores)
            if hidden:
                scores = masked(scores, rows, columns, window, transposed=False)
            # p = e^(s - lse) is at most 1, so no maximum is needed here.
            factor = form.scale * LOG2E
            weights = jnp.exp2(scores * factor - across(lse, scores.shape))
            # ds = p (dp - inner); the scale multiplies the sum once, at the end.
            dscores = weights * (dweights - across(inner, scores.shape))
            return form.through_cap(dscores, scores).astype(k.dtype)

        def step_of(hidden: bool) -> Any:
            def step(number: Any, sums: Any) -> Any:
                k_s, columns = k_ring.wait(number)
                (v_s,) = v_ring.wait(number)
                turns.wait()
                own = opaque(group)
                scores, dweights = products(
                    (q_s.at[own], k_s.transpose((1, 0))),
                    (dout_s.at[own], v_s.transpose((1, 0))),
                    started=turns.give,
                )
                v_ring.release(number, interpret=interpreted)
                dscores = dscores_of(scores, dweights, columns, hidden)
                (sums,) = add_products((sums, dscores, k_s), interpret=interpreted)
                k_ring.release(number, interpret=interpreted)
                return sums

            return step

        plgpu.barrier_wait(rows_ready.at[group])
        turns.begin()
        sums = zeros(ROWS, width)
        sums = jax.lax.fori_loop(0, visits.masked, step_of(True), sums)
        sums = jax.lax.fori_loop(visits.masked, visits.total, step_of(False), sums)
        q_s[group] = (sums * form.slope).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[group], dq.at[target])
        turns.end()
        plgpu.wait_smem_to_gmem(0)

    run = launch(
        copy,
        compute,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [
            operand((GROUPS, ROWS, width), q.dtype),
            operand((GROUPS, ROWS, width), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            Ring.of(
                stages,
                operand((stages, keys, width), q.dtype),
                plgpu.SMEM((stages, marks, keys), jnp.int32),
            ),
            Ring.of(stages, operand((stages, keys, width), q.dtype)),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
        name="attention_backward_queries",
        grid={"block": length // BLOCK, "row": batch, "head": heads},
        interpret=interpret,
    )
    arrays = operands(segments, window, batch, length, keys, queries=True)
    return run(q, k, v, dout, numbers, *arrays)


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

    Scores are [keys, queries], so that they are the left operand of both sums. One
    block of threads goes through all query heads that share its keys, so nothing is
    added in memory.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    sharing = heads // groups
    if tiles is None:
        # With a cap, the capped scores are kept for its derivative.
        tiles = KEYS[width] if form.inner is None else Tiles(64, 4)
    queries, stages = tiles
    split = functools.partial(Given.split, windowed=window is not None)
    marks = 1 if segments is None else 2
    interpreted = bool(interpret)

    def place() -> tuple[Any, Any, Any]:
        """Row of the batch, head, and block: those with the most queries come first."""
        axis = jax.lax.axis_index
        return axis("row"), axis("head"), axis("block")

    def copy(q: Any, k: Any, v: Any, dout: Any, numbers: Any, *refs: Any) -> None:
        del k, v
        given, (_, _, _, _, _, q_ring, dout_ring, _) = split(refs)
        row, head, block = place()
        visits = Visits.of(given.limits, row, block, sharing)

        def step(number: Any, carry: None) -> None:
            del carry
            step_queries = pl.ds(visits.block(number) * queries, queries)
            query_head = head * sharing + visits.member(number)
            source = (row, step_queries, query_head)
            lse, inner = (
                numbers.at[row, query_head, pl.ds(i, 1), step_queries] for i in range(2)
            )
            step_marks = given.marks.at[row, :, step_queries]
            q_ring.copy(number, q.at[source], lse, step_marks)
            dout_ring.copy(number, dout.at[source], inner)

        jax.lax.fori_loop(0, visits.total, step, None)

    def compute(
        group: Any, q: Any, k: Any, v: Any, dout: Any, numbers: Any, *refs: Any
    ) -> None:
        del dout, numbers
        given, refs = split(refs)
        dk, dv, k_s, v_s, rows_ready, q_ring, dout_ring, turns = refs
        turns = Turns(turns, group)
        row, head, block = place()
        visits = Visits.of(given.limits, row, block, sharing)
        keys = pl.ds(block * BLOCK + group * ROWS, ROWS)
        target = (row, keys, head)
        plgpu.copy_gmem_to_smem(k.at[target], k_s.at[group], rows_ready.at[group])
        plgpu.copy_gmem_to_smem(v.at[target], v_s.at[group], rows_ready.at[group])
        rows = [vector(given.marks.at[row, i, keys], 0) for i in range(marks)]
        window = None if given.window is None else given.window[0]

        def step_of(hidden: bool) -> Any:
            def step(number: Any, carry: Any) -> Any:
                dk, dv = carry
                q_s, lse, columns = q_ring.wait(number)
                dout_s, inner = dout_ring.wait(number)
                turns.wait()
                own = opaque(group)
                # dp^T = v dout^T
                scores, dweights = products(
                    (k_s.at[own], q_s.transpose((1, 0))),
                    (v_s.at[own], dout_s.transpose((1, 0))),
                    started=turns.give,
                )
                scores = form.cap(scores)
                if hidden:
                    scores = masked(scores, rows, columns, window, transposed=True)
                lse = across(vector(lse.at[0], 1), scores.shape, 1)
                weights = jnp.exp2(scores * (form.scale * LOG2E) - lse)
                inner = across(vector(inner.at[0], 1), scores.shape, 1)
                dscores = form.through_cap(weights * (dweights - inner), scores)
                weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
                # With keys as rows, `weights` is p^T: dv += p^T dout
                (dv,) = add_products((dv, weights, dout_s), interpret=interpreted)
                dout_ring.release(number, interpret=interpreted)
                # dk += ds^T q
                (dk,) = add_products((dk, dscores, q_s), interpret=interpreted)
                q_ring.release(number, interpret=interpreted)
                return dk, dv

            return step

        plgpu.barrier_wait(rows_ready.at[group])
        turns.begin()
        carry = (zeros(ROWS, width), zeros(ROWS, width))
        carry = jax.lax.fori_loop(0, visits.masked, step_of(True), carry)
        carry = jax.lax.fori_loop(visits.masked, visits.total, step_of(False), carry)
        dk_sums, dv_sums = carry
        # Only dk has the scale: dv is a product with p itself.
        k_s[group] = (dk_sums * form.slope).astype(dk.dtype)
        v_s[group] = dv_sums.astype(dv.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s.at[group], dk.at[target])
        plgpu.copy_smem_to_gmem(v_s.at[group], dv.at[target])
        turns.end()
        plgpu.wait_smem_to_gmem(0)

    run = launch(
        copy,
        compute,
        (
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        [
            operand((GROUPS, ROWS, width), q.dtype),
            operand((GROUPS, ROWS, width), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            Ring.of(
                stages,
                operand((stages, queries, width), q.dtype),
                plgpu.SMEM((stages, 1, queries), jnp.float32),
                plgpu.SMEM((stages, marks, queries), jnp.int32),
            ),
            Ring.of(
                stages,
                operand((stages, queries, width), q.dtype),
                plgpu.SMEM((stages, 1, queries), jnp.float32),
            ),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
        name="attention_backward_keys",
        grid={"block": length // BLOCK, "row": batch, "head": groups},
        interpret=interpret,
    )
    arrays = operands(segments, window, batch, length, queries, queries=False)
    dk, dv = run(q, k, v, dout, numbers, *arrays)
    return dk, dv
