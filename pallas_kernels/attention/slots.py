"""Attention of one token to 64 slots of a cache, on the tensor cores.

Each of the four warps of a warpgroup has 16 of the slots, for up to 8 query heads that
share a key/value head. As in `pallas_kernels.mosaic`, the inline code has next to it
what it means on ordinary arrays, which is what the interpreter runs.

A thread is lane 4 g + q. Scores are `mma.m16n8k16` of the queries (8 heads, and 8 rows
of zeros) with the keys of 8 slots, so that a thread has head g and slots 2 q, 2 q + 1:
just what the second product, of the values with the weights of 16 slots, takes as its
right operand. Which feature is which column of the first product, and which row of the
second, is free, and chosen so that all loads from memory are 16 neighbouring bytes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels import inline
from pallas_kernels.inline import LANES, WARPGROUP
from pallas_kernels.mosaic import strided

SLOTS = 64
HEADS = 8
"""Query heads of a key/value head at most."""
MASKED = -1e30
"""Large and negative but finite: with -inf a row that sees nothing would be NaN."""
_WARPS = WARPGROUP // LANES


def initial_state(width: int, *, interpret: bool) -> jax.Array:
    """Returns the state before any slot, of heads of `width` features.

    For each warp and head: the maximum score, in units of log 2, the sum of the
    weights, and the weighted sum of the values. A thread has the first of its head g,
    its own slots' share of the second, and a quarter of `width` numbers of the third.
    """
    shape = ((2 + width // 4) * WARPGROUP,)
    if interpret:
        top = jnp.arange(shape[0]) % (2 + width) == 0
        return jnp.where(top, jnp.float32(MASKED), jnp.float32(0))
    index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=strided(shape))
    return jnp.where(index < WARPGROUP, jnp.float32(MASKED), jnp.float32(0))


def slot_of(index: jax.Array) -> jax.Array:
    """Returns the slot, of 64, whose bias `attend` takes as element `index` of 512."""
    thread, number = index % WARPGROUP, index // WARPGROUP
    warp, quad = thread // LANES, thread % 4
    return 16 * warp + 2 * quad + number % 2 + 8 * (number // 2)


def attend(
    state: jax.Array,
    q: Any,
    k: Any,
    v: Any,
    bias: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Returns the state after 64 more slots.

    Args:
      state: from `initial_state` or an earlier call.
      q: float32 [8, H] in shared memory: queries times the scale, which are rounded to
        the dtype of `k`.
      k: keys, bfloat16 or float16 [64, H] in global memory; H a multiple of 64.
      v: values [64, H] in global memory.
      bias: float32 [512] in the layout `strided((512,))`: what is added to the scores
        of the slots of `slot_of`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The state, scores in units of log 2.
    """
    width = k.shape[1]
    if interpret:
        return _attend_arrays(state, q[...].astype(k.dtype), k[...], v[...], bias)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(k.dtype).name]
    dtype = jnp.dtype(k.dtype)

    @inline.function(
        arg_types=(strided(state.shape), *(plgpu.RefType(),) * 3, strided(bias.shape)),
        return_type=inline.result_type(state.shape, jnp.float32, strided(state.shape)),
    )
    def step(ctx: Any, state: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
        del ctx
        group = arith.divui(inline.lane(), inline.const(4))
        quad = arith.remui(inline.lane(), inline.const(4))
        first = arith.muli(inline.warp(), inline.const(16))

        def load(ref: Any, row: Any, unit: Any) -> list[Any]:
            column = arith.muli(unit, inline.const(8))
            return inline.load_words(ref, row, column, count=4)

        def load_query(unit: Any) -> list[Any]:
            words = []
            for half in range(2):
                column = plus(arith.muli(unit, inline.const(8)), 4 * half)
                loaded = inline.load_words(q, group, column, count=4, shared=True)
                values = [inline.as_float(word) for word in loaded]
                words += [inline.pack_narrow(values[n : n + 2], dtype) for n in (0, 2)]
            return words

        def plus(value: Any, number: int) -> Any:
            return arith.addi(value, inline.const(number))

        # All loads from global memory start before anything waits for one.
        keys = [
            [
                load(k, arith.addi(first, plus(group, 8 * tile)), plus(quad, 4 * i))
                for i in range(width // 32)
            ]
            for tile in range(2)
        ]
        pair = arith.addi(first, arith.muli(quad, inline.const(2)))
        values = [
            [load(v, plus(pair, n), plus(group, 8 * i)) for n in (0, 1, 8, 9)]
            for i in range(width // 64)
        ]
        scores = []
        nothing = inline.const(0)
        for tile in range(2):
            part = [inline.zero()] * 4
            for i in range(width // 32):
                query = load_query(plus(quad, 4 * i))
                for half in (0, 2):
                    left = [query[half], nothing, query[half + 1], nothing]
                    right = keys[tile][i][half : half + 2]
                    part = inline.mma(kind, part, left, right)
            scores += part[:2]
        numbers = [inline.first_element(r) for r in bias.registers.reshape(-1)]
        scores = [arith.addf(s, b) for s, b in zip(scores, numbers, strict=True)]
        old = [inline.first_element(r) for r in state.registers.reshape(-1)]
        top = old[0]
        for score in scores:
            top = arith.maximumf(top, score)
        # The four threads of a head; each has four of the 16 slots.
        for mask in (1, 2):
            other = arith.xori(inline.lane(), inline.const(mask))
            top = arith.maximumf(top, inline.shuffle(top, other))
        weights = [inline.exp2(arith.subf(score, top)) for score in scores]
        share = inline.exp2(arith.subf(old[0], top))
        total = arith.mulf(old[1], share)
        for weight in weights:
            total = arith.addf(total, weight)
        # The sums of the values belong to heads 2 q and 2 q + 1.
        lanes = [arith.muli(quad, inline.const(8))]
        lanes.append(plus(lanes[0], 4))
        shares = [inline.shuffle(share, lane) for lane in lanes]
        right = [inline.pack_narrow(weights[n : n + 2], dtype) for n in (0, 2)]
        sums = []
        for i in range(width // 64):
            for word in range(4):
                rows = [values[i][n][word] for n in range(4)]
                left = [
                    inline.pair_halves(rows[2 * n], rows[2 * n + 1], high)
                    for n in range(2)
                    for high in (False, True)
                ]
                before = old[2 + 4 * len(sums) :][:4]
                before = [arith.mulf(b, shares[c % 2]) for c, b in enumerate(before)]
                sums.append(inline.mma(kind, before, left, right))
        new = [top, total, *(value for part in sums for value in part)]
        return inline.array_of(
            [inline.pack([value]) for value in new],
            state.registers.shape,
            strided((len(new) * WARPGROUP,)),
        )

    return step(state, q, k, v, bias)


def _attend_arrays(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
) -> jax.Array:
    """Computes `attend`; the state is [4, 8, 2 + H] and padding."""
    width, dtype = k.shape[1], k.dtype
    top, total, sums = _parts(state, width)
    # Threads of group 0 have the biases of all slots of their warp.
    by_slot = bias.reshape(2, 2, _WARPS, LANES)[..., :4]  # [half, odd, warp, quad]
    by_slot = by_slot.transpose(2, 0, 3, 1).reshape(_WARPS, 1, SLOTS // _WARPS)
    k, v = (a.astype(jnp.float32).reshape(_WARPS, -1, width) for a in (k, v))
    scores = jnp.einsum("nh,wsh->wns", q.astype(jnp.float32), k) + by_slot
    new_top = jnp.maximum(top, scores.max(axis=2))
    weights = jnp.exp2(scores - new_top[:, :, None])
    share = jnp.exp2(top - new_top)
    total = total * share + weights.sum(axis=2)
    narrow = weights.astype(dtype).astype(jnp.float32)
    sums = sums * share[:, :, None] + jnp.einsum("wns,wsh->wnh", narrow, v)
    columns = [new_top[:, :, None], total[:, :, None], sums]
    new = jnp.concatenate(columns, axis=2).reshape(-1)
    return jnp.pad(new, (0, state.size - new.size))


def _parts(state: jax.Array, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    parts = state[: _WARPS * HEADS * (2 + width)].reshape(_WARPS, HEADS, 2 + width)
    return parts[..., 0], parts[..., 1], parts[..., 2:]


def store_state(maxima: Any, sums: Any, state: jax.Array, *, interpret: bool) -> None:
    """Stores the state in shared memory, without a barrier.

    Args:
      maxima: float32 [4 * 8 * 4]: of each warp and head the maximum, the sum of the
        weights, and two numbers without a meaning.
      sums: float32 [4 * 8 * H]: of each warp and head the weighted sum of the values.
      state: from `attend`.
      interpret: whether the interpreter runs the kernel.
    """
    width = sums.shape[0] // (_WARPS * HEADS)
    if interpret:
        top, total, values = _parts(state, width)
        maxima[...] = jnp.stack([top, total, top, total], axis=2).reshape(-1)
        sums[...] = values.reshape(-1)
        return

    @inline.function(arg_types=(plgpu.RefType(), plgpu.RefType(), strided(state.shape)))
    def write(ctx: Any, maxima: Any, sums: Any, state: Any) -> None:
        del ctx
        group = arith.divui(inline.lane(), inline.const(4))
        quad = arith.remui(inline.lane(), inline.const(4))
        head = arith.addi(arith.muli(inline.warp(), inline.const(HEADS)), group)
        values = [inline.first_element(r) for r in state.registers.reshape(-1)]
        # Each of the four threads of a head has added up the weights of its own slots.
        for mask in (1, 2):
            other = arith.xori(inline.lane(), inline.const(mask))
            values[1] = arith.addf(values[1], inline.shuffle(values[1], other))
        is_total = arith.cmpi(
            arith.CmpIPredicate.eq, arith.remui(quad, inline.const(2)), inline.const(1)
        )
        place = arith.addi(arith.muli(head, inline.const(4)), quad)
        value = arith.select(is_total, values[1], values[0])
        memref.store(value, maxima, [inline.as_index(place)])
        pair = arith.muli(inline.warp(), inline.const(HEADS))
        pair = arith.addi(pair, arith.muli(quad, inline.const(2)))
        start = arith.muli(pair, inline.const(width))
        start = arith.addi(start, arith.muli(group, inline.const(8)))
        for number, value in enumerate(values[2:]):
            part, place = divmod(number, 4)
            chunk, word = divmod(part, 4)
            # Columns are heads 2 q and 2 q + 1, rows features 2 word and 2 word + 1.
            offset = 64 * chunk + 2 * word + place // 2 + width * (place % 2)
            index = arith.addi(start, inline.const(offset))
            memref.store(value, sums, [inline.as_index(index)])

    write(maxima, sums, state)
