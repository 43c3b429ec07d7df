"""The forward pass of causal attention within segments, for Hopper GPUs.

The blockwise algorithm with a running softmax (Dao 2023,
https://arxiv.org/abs/2307.08691): scores never leave the registers. Two warpgroups take
turns (Shah et al. 2024, https://arxiv.org/abs/2407.08608): while the products of one
occupy the tensor cores, the other computes its softmax weights. A third one copies.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.attention.blocks import (
    LOG2E,
    MASKED,
    Form,
    Ring,
    Tiles,
    Turns,
    across,
    add_products,
    full,
    launch,
    masked,
    products,
    vector,
    zeros,
)
from pallas_kernels.attention.reach import (
    BLOCK,
    GROUPS,
    ROWS,
    Given,
    Reach,
    Schedule,
    Visits,
    longest_first,
    operands,
)
from pallas_kernels.mosaic import operand

# What the registers of a thread and the shared memory of a block (227 KiB) hold.
TILES = {64: Tiles(128, 4), 128: Tiles(128, 2)}
"""Head width -> how the kernel goes over the keys."""


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
    keys, stages = tiles or TILES[width]
    form = Form.of(width, scale, softcap)
    scale = form.scale * LOG2E
    split = functools.partial(Given.split, windowed=window is not None)
    marks = 1 if segments is None else 2
    interpreted = bool(interpret)

    arrays = operands(segments, window, batch, length, keys, queries=True)
    order = longest_first(Reach(*arrays[: len(Reach._fields)]))
    # The interpreter gets few blocks of threads, each of which goes over several tiles.
    threads = 2 if interpreted else device.multiprocessors()
    threads = min(threads, order.size * heads)

    def schedule_of(order: Any) -> Schedule:
        return Schedule(order, heads, length // BLOCK, threads)

    def copy(q: Any, k: Any, v: Any, order: Any, *refs: Any) -> None:
        given, (_, _, q_ring, k_ring, v_ring, _) = split(refs)
        schedule = schedule_of(order)

        def tile(number: Any, earlier: Any) -> Any:
            row, head, block = schedule.tile(number)
            visits = Visits.of(given.limits, row, block)
            q_ring.copy(
                number,
                *(
                    q.at[row, pl.ds(block * BLOCK + group * ROWS, ROWS), head]
                    for group in range(GROUPS)
                ),
            )

            def step(number: Any, carry: None) -> None:
                del carry
                step_keys = pl.ds(visits.block(number) * keys, keys)
                source = (row, step_keys, jax.lax.div(head, sharing))
                step_marks = given.marks.at[row, :, step_keys]
                k_ring.copy(earlier + number, k.at[source], step_marks)
                v_ring.copy(earlier + number, v.at[source])

            jax.lax.fori_loop(0, visits.total, step, None)
            return earlier + visits.total

        jax.lax.fori_loop(0, schedule.rounds(), tile, 0)

    def compute(group: Any, q: Any, k: Any, v: Any, order: Any, *refs: Any) -> None:
        del q, k
        given, refs = split(refs)
        out, lse, q_ring, k_ring, v_ring, turns = refs
        turns = Turns(turns, group)
        schedule = schedule_of(order)
        window = None if given.window is None else given.window[0]

        def read(number: Any) -> Any:
            """Reads what is known of a tile before it is computed."""
            row, head, block = schedule.tile(number)
            visits = Visits.of(given.limits, row, block)
            queries = block * BLOCK + group * ROWS
            rows = [
                vector(given.marks.at[row, i, pl.ds(queries, ROWS)], 0)
                for i in range(marks)
            ]
            return (row, head, queries), visits, rows

        def tile(number: Any, carry: Any) -> Any:
            earlier, ((row, head, queries), visits, rows) = carry
            (q_s,) = q_ring.wait(number)
            q_s = q_s.at[group]
            sums, top, total = attend(q_s, rows, visits, earlier)
            # The memory answers while the output is written.
            following = read(number + 1)
            queries = pl.ds(queries, ROWS)
            # A query sees at least itself, so the total is not 0. No product reads q
            # now: its buffer takes the output, in the layout that the copy expects.
            q_s[...] = (sums * across(1.0 / total, sums.shape)).astype(out.dtype)
            # Back to base e: ln(sum e^s) = m ln 2 + ln l.
            lse[row, head, queries] = top * (1.0 / LOG2E) + jnp.log(total)
            # Threads wrote the buffer: only now may the copy engine read it.
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, out.at[row, queries, head])
            # The buffer takes other queries once the copy has read it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            q_ring.release(number, interpret=interpreted)
            return earlier + visits.total, following

        def attend(q_s: Any, rows: Any, visits: Visits, earlier: Any) -> Any:
            """Returns the sums, maxima and totals of a warpgroup's queries."""

            def weights_of(
                number: Any, scores: Any, columns: Any, carry: Any, hidden: bool
            ) -> Any:
                """The weights of a step, and what becomes of the earlier ones."""
                top, total = carry
                scores = form.cap(scores)
                if hidden:
                    scores = masked(scores, rows, columns, window, transposed=False)
                k_ring.release(earlier + number, interpret=interpreted)
                # As in `xla._flash_fwd`, with exponentials of base 2.
                # The scale multiplies the maximum and, within the exponent, the scores:
                # one multiply-add for each, and no pass of its own.
                new_top = jnp.maximum(top, scores.max(axis=1) * scale)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * scale - across(new_top, scores.shape))
                # Summed in float32, before the product takes the weights as bfloat16.
                total = total * shrink + weights.sum(axis=1)
                return weights.astype(v.dtype), (new_top, total), shrink

            def step_of(hidden: bool) -> Any:
                def step(number: Any, carry: Any) -> Any:
                    sums, weights, numbers = carry
                    k_s, columns = k_ring.wait(earlier + number)
                    (v_s,) = v_ring.wait(earlier + number - 1)
                    turns.wait()
                    # The last step's weights times values and, right behind, this
                    # step's scores. `wgmma` reads a 16-bit operand in either order: the
                    # transposition of k is a flag, not a copy.
                    sums, scores = add_products(
                        (sums, weights, v_s),
                        (zeros(ROWS, keys), q_s, k_s.transpose((1, 0))),
                        started=turns.give,
                        first_done=lambda: v_ring.release(
                            earlier + number - 1, interpret=interpreted
                        ),
                        interpret=interpreted,
                    )
                    weights, numbers, shrink = weights_of(
                        number, scores, columns, numbers, hidden
                    )
                    return sums * across(shrink, sums.shape), weights, numbers

                return step

            # The first step has no weights before it. Something is hidden from it.
            k_s, columns = k_ring.wait(earlier)
            turns.wait()
            (scores,) = products((q_s, k_s.transpose((1, 0))), started=turns.give)
            # The running maximum starts below a masked score, so that the first visible
            # score wipes out what came of masked ones.
            numbers = full(ROWS, 2 * MASKED), full(ROWS, 0.0)
            weights, numbers, _ = weights_of(0, scores, columns, numbers, True)
            carry = (zeros(ROWS, width), weights, numbers)
            carry = jax.lax.fori_loop(1, visits.masked, step_of(True), carry)
            carry = jax.lax.fori_loop(
                visits.masked, visits.total, step_of(False), carry
            )
            sums, weights, numbers = carry
            last = earlier + visits.total - 1
            (v_s,) = v_ring.wait(last)
            turns.wait()
            (sums,) = add_products(
                (sums, weights, v_s), started=turns.give, interpret=interpreted
            )
            v_ring.release(last, interpret=interpreted)
            return sums, *numbers

        turns.begin()
        jax.lax.fori_loop(0, schedule.rounds(), tile, (0, read(0)))
        turns.end()
        # The last copy reads shared memory, which is given away when the threads end.
        plgpu.wait_smem_to_gmem(0)

    run = launch(
        copy,
        compute,
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        [
            Ring.of(2, operand((2, GROUPS, ROWS, width), q.dtype), arrivals=GROUPS),
            Ring.of(
                stages,
                operand((stages, keys, width), q.dtype),
                plgpu.SMEM((stages, marks, keys), jnp.int32),
            ),
            Ring.of(stages, operand((stages, keys, width), q.dtype)),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
        name="attention_forward",
        grid={"block": threads},
        interpret=interpret,
    )
    out, lse = run(q, k, v, order, *arrays)
    return out, lse
