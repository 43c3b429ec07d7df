"""Attention of a decoded token to the cache, for NVIDIA GPUs.

`attend` rotates the token's queries and key, writes key and value into the cache in
place and attends to the cache, reading only the slots in use: as much as the cache of
the tokens so far, once. The slots of a row and key/value head are divided among several
blocks of threads where rows and heads are few; a second kernel weighs their results,
and the last one leaves parts of what the output projection's adapter needs of all of
them (`pallas_kernels.nf4.parts`).

These are the kernels; not measured on a GPU. `attend_reference` computes the same in
plain jax.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import device, mosaic
from pallas_kernels.attention import slots
from pallas_kernels.attention.slots import HEADS, MASKED, SLOTS
from pallas_kernels.mosaic import WARPGROUP
from pallas_kernels.nf4.gpu import clip_layer, kernel
from pallas_kernels.nf4.parts import (
    Following,
    Prepared,
    layer_of,
    leave_row,
    leave_row_scratch,
    prepared_reference,
)

_WARPS = 4
_LOG2_E = 1 / math.log(2)


class Token(NamedTuple):
    """Where a token is, in each row."""

    layer: Int32[Array, "1"]
    """The layer of the cache."""
    slot: Int32[Array, "1"]
    """The slot of the cache that the token is written to."""
    segments: Int32[Array, "B S"]
    """The ids of all slots, the token's own among them: it sees the slots of its id, up
    to its own."""
    window: Int32[Array, "1"] | None = None
    """How many slots it sees, its own among them; None = all."""


class HeadNorms(NamedTuple):
    """RMSNorms of queries and keys over the width of a head, before the rotation."""

    q: Float[Array, "L H"]
    k: Float[Array, "L H"]
    eps: float


def refusal(
    heads: int, kv_heads: int, width: int, slot_count: int, softcap: float | None
) -> str | None:
    """Returns why `attend` cannot compute a case, or None."""
    if width % 64 or width > 256:
        return f"heads of {width} features; it takes 64, 128, 192 or 256."
    if heads % kv_heads or heads // kv_heads > HEADS:
        return f"{heads} heads for {kv_heads}; it takes up to {HEADS} for each."
    if slot_count % SLOTS:
        return f"{slot_count} slots; it takes multiples of {SLOTS}."
    return None if softcap is None else "it has no soft cap on the scores."


def splits_for(
    rows: int, kv_heads: int, slot_count: int, multiprocessors: int = 132
) -> int:
    """Returns how many blocks of threads share the slots of a row and head."""
    # Two for each multiprocessor, so that the loads of one overlap with the products of
    # the other; none has less than the 64 slots that it takes at a time.
    wanted = 2 * multiprocessors // (rows * kv_heads)
    return max(1, min(wanted, slot_count // SLOTS))


def attend(
    qkv: Float[Array, "B NH"],
    rope: tuple[Float32[Array, "B R2"], Float32[Array, "B R2"]],
    cache: tuple[Float[Array, "L B K S H"], Float[Array, "L B K S H"]],
    token: Token,
    *,
    scale: float,
    norms: HeadNorms | None = None,
    following: Following | None = None,
    splits: int | None = None,
    interpret: Any = False,
) -> tuple[Prepared, tuple[Array, Array]]:
    """Writes a token of each row into the cache, and attends to it.

    Args:
      qkv: queries, keys and values of the token, heads side by side, in bfloat16 or
        float16.
      rope: cos and sin, for pairs (i, i + R/2) of the first R features of a head.
      cache: keys and values, updated in place where the caller gives them up.
      token: where it is.
      scale: factor of the scores.
      norms: of queries and keys.
      following: what reads the output: adapters, without a norm.
      splits: blocks of threads for a row and key/value head; default `splits_for`.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The attention output, N heads side by side, with the parts for what follows; and
      the cache with the token.

    Raises:
      ValueError: `refusal` has a reason.
    """
    rows, kv_heads, slot_count, width = cache[0].shape[1:]
    heads = qkv.shape[1] // width - 2 * kv_heads
    reason = refusal(heads, kv_heads, width, slot_count, None)
    if reason is not None:
        raise ValueError(f"`attend` cannot compute {reason}")
    if splits is None:
        count = device.multiprocessors()
        splits = splits_for(rows, kv_heads, slot_count, count)
    group = heads // kv_heads
    half = rope[0].shape[1]
    dtype = jnp.dtype(qkv.dtype)
    interpreted = bool(interpret)
    gather = functools.partial(mosaic.gather, interpret=interpreted)
    # With several splits, the second kernel leaves the parts.
    leaves = following is not None and splits == 1
    out_count = 1 + (leaves or splits > 1)

    def cached_attention(*operands: Any) -> None:
        qkv, cos, sin, layer, at, segments, *rest = operands
        window = None if token.window is None else rest.pop(0)
        q_norm, k_norm = (rest.pop(0) if norms else None for _ in range(2))
        a: Any = rest.pop(0) if leaves else None
        k, v, *rest = rest
        outs, (q_s, maxima_s, sums_s, done, *rest) = rest[:out_count], rest[out_count:]
        norms_s: list[Any] = rest[:2] if norms else [None, None]
        squares_s, factors_s = norms_s
        row_s = rest[2:] if norms else rest
        row, head, split = (jax.lax.axis_index(n) for n in ("row", "head", "split"))
        index = (clip_layer(layer[0], k.shape[0]), row, head)
        slot = at[0]
        last, first = slot // SLOTS, 0
        if window is not None:
            first = jnp.maximum(slot - window[0] + 1, 0) // SLOTS

        if norms is not None:
            # Eight threads for each query head, and for the key, which is number
            # `group`; the rest repeat it.
            lane = mosaic.iota((WARPGROUP,), 0)
            own = jnp.minimum(lane // 8, group)
            start = jnp.where(own < group, head * group + own, heads + head) * width
            squares: Any = 0.0
            for n in range(width // 8):
                value = gather(qkv.at[row], start + (8 * n + lane % 8), dtype)
                value = value.astype(jnp.float32)
                squares = squares + value * value
            # Assignments are barriers as well.
            squares_s[...] = squares
            shares = (lane // 8) * 8
            squares = sum(gather(squares_s, shares + n, jnp.float32) for n in range(8))
            factors_s[...] = jax.lax.rsqrt(squares * (1 / width) + norms.eps)

        def rotated(number: Any, feature: jax.Array) -> jax.Array:
            """Returns features of query heads, or of the key, in float32."""
            is_key = isinstance(number, int)
            start = (heads + head if is_key else head * group + number) * width
            weight = k_norm if is_key else q_norm
            factor: Any = None
            if norms is not None:
                place = number * 8 + feature * 0
                factor = gather(factors_s, place, jnp.float32)

            def load(feature: jax.Array) -> jax.Array:
                value = gather(qkv.at[row], start + feature, dtype).astype(jnp.float32)
                if weight is None:
                    return value
                own = gather(weight.at[index[0]], feature, weight.dtype)
                return value * factor * own.astype(jnp.float32)

            value = load(feature)
            is_first = (feature % (2 * half)) < half
            other = feature + jnp.where(is_first, half, -half)
            is_rotated = feature < 2 * half
            other = jnp.where(is_rotated, other, feature)
            pair = load(other)
            angle = feature % half
            c = gather(cos.at[row], angle, jnp.float32)
            s = gather(sin.at[row], angle, jnp.float32)
            turned = value * c + pair * jnp.where(is_first, -s, s)
            return jnp.where(is_rotated, turned, value)

        # The block of threads that attends to the token's slot writes it.
        @pl.when((last - first) % splits == split)
        def write() -> None:
            feature = mosaic.iota((max(width, WARPGROUP),), 0) % width
            key = rotated(group, feature)
            place = (heads + kv_heads + head) * width + feature
            value = gather(qkv.at[row], place, dtype).astype(jnp.float32)
            for stack, new in ((k, key), (v, value)):
                place = stack.at[*index, pl.ds(slot, 1)]
                mosaic.store_rows(place, new, interpret=interpreted)

        shape = (HEADS, width)
        number = jnp.minimum(mosaic.iota(shape, 0), group - 1)
        queries = rotated(number, mosaic.iota(shape, 1))
        # Also a barrier: the key and the value have been written.
        q_s[...] = queries * (scale * _LOG2_E)

        def step(i: Any, state: jax.Array) -> jax.Array:
            start = (first + split + i * splits) * SLOTS
            place = start + slots.slot_of(mosaic.iota((4 * WARPGROUP,), 0))
            ids = gather(segments.at[row], place, jnp.int32)
            visible = (ids == segments[row, slot]) & (place <= slot)
            if window is not None:
                visible = visible & (slot - place < window[0])
            bias = jnp.where(visible, jnp.float32(0), jnp.float32(MASKED))
            keys, values = (a.at[*index, pl.ds(start, SLOTS)] for a in (k, v))
            return slots.attend(state, q_s, keys, values, bias, interpret=interpreted)

        steps = (last - first - split + splits) // splits
        state = slots.initial_state(width, interpret=interpreted)
        state = jax.lax.fori_loop(0, steps, step, state)
        slots.store_state(maxima_s, sums_s, state, interpret=interpreted)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        def of_warps(number: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            """Returns the maximum of a head over the warps, and their shares."""
            tops = [
                gather(maxima_s, (w * HEADS + number) * 4, jnp.float32)
                for w in range(_WARPS)
            ]
            top = functools.reduce(jnp.maximum, tops)
            return top, [jnp.exp2(t - top) for t in tops]

        def totals(number: jax.Array, shares: list[jax.Array]) -> jax.Array:
            total: Any = sum(
                share * gather(maxima_s, (w * HEADS + number) * 4 + 1, jnp.float32)
                for w, share in enumerate(shares)
            )
            return total

        element = mosaic.iota((HEADS * width,), 0)
        number = element // width
        _, shares = of_warps(number)
        value: Any = sum(
            share * gather(sums_s, w * HEADS * width + element, jnp.float32)
            for w, share in enumerate(shares)
        )
        if splits == 1:
            value = value / totals(number, shares)
            mosaic.store_rows(outs[0].at[row, head], value, interpret=interpreted)
            if following is not None:
                value = value.astype(dtype).astype(jnp.float32)
                leave_row(
                    following,
                    value,
                    outs[1].at[head, pl.ds(row, 1)],
                    a.at[layer_of(layer[0], following)],
                    head * (group * width),
                    tuple(row_s),
                    features=group * width,
                    interpret=interpreted,
                )
            return
        mosaic.store_rows(outs[0].at[row, head, split], value, interpret=interpreted)
        element = mosaic.iota((WARPGROUP,), 0)
        number = jnp.minimum(element // 2, HEADS - 1)
        top, shares = of_warps(number)
        value = jnp.where(element % 2 == 0, top, totals(number, shares))
        mosaic.store_rows(outs[1].at[row, head, split], value, interpret=interpreted)

    scratch = [
        plgpu.SMEM((HEADS, width), jnp.float32),
        plgpu.SMEM((_WARPS * HEADS * 4,), jnp.float32),
        plgpu.SMEM((_WARPS * HEADS * width,), jnp.float32),
        plgpu.Barrier(num_arrivals=1),
    ]
    outs = [jax.ShapeDtypeStruct((rows, kv_heads, group, width), dtype)]
    arrays = [qkv, *rope, token.layer, token.slot, token.segments]
    arrays += [] if token.window is None else [token.window]
    if norms is not None:
        arrays += [norms.q, norms.k]
        scratch += [plgpu.SMEM((WARPGROUP,), jnp.float32)] * 2
    if splits > 1:
        parts = (rows, kv_heads, splits, group)
        outs = [jax.ShapeDtypeStruct((*parts, n), jnp.float32) for n in (width, 2)]
    elif following is not None:
        arrays.append(_flat(following))
        parts = (kv_heads, rows, following.rank)
        outs.append(jax.ShapeDtypeStruct(parts, jnp.float32))
        scratch += leave_row_scratch(following, HEADS * width)
    refs = [jax.new_ref(a) for a in cache]
    run = kernel(
        cached_attention,
        outs,
        scratch,
        grid={"split": splits, "head": kv_heads, "row": rows},
        interpret=interpret,
    )
    results = list(run(*arrays, *refs))
    k, v = (jax.freeze(ref) for ref in refs)
    if splits == 1:
        out = results[0].reshape(rows, heads * width)
        return Prepared(out, results[1] if leaves else None), (k, v)
    sums, maxima = results
    prepared = _weigh(sums, maxima, token.layer, following, dtype, interpret)
    return prepared, (k, v)


def _weigh(
    sums: Array,
    maxima: Array,
    layer: Array,
    following: Following | None,
    dtype: Any,
    interpret: Any,
) -> Prepared:
    """Adds up what the blocks of threads of a row and head have computed."""
    rows, kv_heads, splits, group, width = sums.shape
    features = kv_heads * group * width
    interpreted = bool(interpret)
    gather = functools.partial(mosaic.gather, interpret=interpreted)

    def weigh_splits(sums: Any, maxima: Any, *refs: Any) -> None:
        out, *rest = refs if following is None else refs[2:]
        row, part = jax.lax.axis_index("row"), jax.lax.axis_index("part")
        feature = part * WARPGROUP + mosaic.iota((WARPGROUP,), 0)
        # Surplus threads repeat the last feature; their results are cut off.
        feature = jnp.minimum(feature, features - 1)
        head = feature // width
        # Element [row, key/value head, split, head of the group].
        first = (row * kv_heads + head // group) * (splits * group) + head % group

        def step(split: Any, carry: tuple) -> tuple:
            top, total, value = carry
            place = first + split * group
            new = gather(maxima, 2 * place, jnp.float32)
            higher = jnp.maximum(top, new)
            before, now = jnp.exp2(top - higher), jnp.exp2(new - higher)
            part = gather(sums, place * width + feature % width, jnp.float32)
            weights = gather(maxima, 2 * place + 1, jnp.float32)
            return higher, total * before + weights * now, value * before + part * now

        place = first
        carry = (
            gather(maxima, 2 * place, jnp.float32),
            gather(maxima, 2 * place + 1, jnp.float32),
            gather(sums, place * width + feature % width, jnp.float32),
        )
        _, total, value = jax.lax.fori_loop(1, splits, step, carry)
        value = (value / total).astype(dtype)
        place = out.at[row, pl.ds(part * WARPGROUP, WARPGROUP)]
        layout = mosaic.strided((WARPGROUP,))
        mosaic.store(place, value, layout, interpret=interpreted)
        if following is not None:
            (layer, a), (parts, *scratch) = refs[:2], rest
            wide = value.astype(jnp.float32)
            is_feature = part * WARPGROUP + mosaic.iota((WARPGROUP,), 0) < features
            leave_row(
                following,
                jnp.where(is_feature, wide, jnp.float32(0)),
                parts.at[part, pl.ds(row, 1)],
                a.at[layer_of(layer[0], following)],
                part * WARPGROUP,
                tuple(scratch),
                features=WARPGROUP,
                interpret=interpreted,
            )

    parts = -(-features // WARPGROUP)
    outs = [jax.ShapeDtypeStruct((rows, parts * WARPGROUP), dtype)]
    arrays, scratch = [sums.reshape(-1), maxima.reshape(-1)], []
    if following is not None:
        arrays += [layer, _flat(following)]
        shape = (parts, rows, following.rank)
        outs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        scratch = leave_row_scratch(following, WARPGROUP)
    run = kernel(
        weigh_splits,
        outs,
        scratch,
        grid={"part": parts, "row": rows},
        interpret=interpret,
    )
    out, *rest = run(*arrays)
    return Prepared(out[:, :features], rest[0] if rest else None)


def _flat(following: Following) -> Array:
    """Returns A of all layers: [L, I * R]."""
    assert following.a is not None
    return following.a.reshape(following.a.shape[0], -1)


def attend_reference(
    qkv: Float[Array, "B NH"],
    rope: tuple[Float32[Array, "B R2"], Float32[Array, "B R2"]],
    cache: tuple[Float[Array, "L B K S H"], Float[Array, "L B K S H"]],
    token: Token,
    *,
    scale: float,
    norms: HeadNorms | None = None,
    following: Following | None = None,
) -> tuple[Prepared, tuple[Array, Array]]:
    """Computes `attend` in float32, with the cache in its own dtype."""
    rows, kv_heads, slot_count, width = cache[0].shape[1:]
    heads = qkv.shape[1] // width - 2 * kv_heads
    half = rope[0].shape[1]
    wide = qkv.astype(jnp.float32).reshape(rows, -1, width)
    q, k, v = jnp.split(wide, [heads, heads + kv_heads], axis=1)
    if norms is not None:

        def normed(x: Array, weight: Array) -> Array:
            mean = jnp.mean(x * x, axis=2, keepdims=True)
            factor = weight[token.layer[0]].astype(jnp.float32)
            return x * jax.lax.rsqrt(mean + norms.eps) * factor[None, None]

        q, k = normed(q, norms.q), normed(k, norms.k)

    def rotated(x: Array) -> Array:
        a, b, rest = jnp.split(x, [half, 2 * half], axis=2)
        cos, sin = (a[:, None] for a in rope)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=2)

    layer, slot = token.layer[0], token.slot[0]
    k, v = (
        stack.at[layer, :, :, slot].set(new.astype(stack.dtype))
        for stack, new in zip(cache, (rotated(k), v), strict=True)
    )
    place = jnp.arange(slot_count)[None]
    own = token.segments[:, slot][:, None]
    visible = (token.segments == own) & (place <= slot)
    if token.window is not None:
        visible = visible & (slot - place < token.window[0])
    grouped = rotated(q).reshape(rows, kv_heads, -1, width)
    keys, values = (a[layer].astype(jnp.float32) for a in (k, v))
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = product("bkgh,bksh->bkgs", grouped, keys) * scale
    weights = jax.nn.softmax(
        jnp.where(visible[:, None, None], scores, jnp.float32(MASKED)), axis=3
    )
    out = product("bkgs,bksh->bkgh", weights, values)
    out = out.reshape(rows, heads * width).astype(qkv.dtype)
    if following is None:
        return Prepared(out, None), (k, v)
    return prepared_reference(out, token.layer, following), (k, v)
