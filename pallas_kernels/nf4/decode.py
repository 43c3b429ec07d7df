"""The linear layers of a decoded token, for NVIDIA GPUs, in few kernels.

A token of a model of 8B in 16-bit activations is a few kilobytes for each layer: the
time of a layer is that of reading its packed weights, as long as they are read by few
kernels. `products` computes packed weights that share an input, with what comes before
and after them:

  before  the factor of the norm, and `A x` of the adapters, from the parts of their
          sums that the kernel before has left (`pallas_kernels.nf4.parts`)
  after   the adapters' `B (A x)`, the sum with the residual stream or the gated
          activation, and parts of the same sums for the linear layers that follow

A block of threads stays for all of its share, which is cut into units of 16
out_features: the table for decoding is loaded once, and while a unit is computed the
next one is on its way to L2.

This is the kernel; not measured on a GPU. `products_reference` computes the same in
plain jax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import device, mosaic
from pallas_kernels.mosaic import BLOCK, COLUMN, LANES, ROWS
from pallas_kernels.nf4.decode_plan import (
    MAX_ROWS,
    UNIT,
    WARPS,
    Plan,
    plan_for,
    scale_columns,
)
from pallas_kernels.nf4.gpu import (
    block_scales,
    clip_layer,
    kernel,
    operands,
    pair_table,
)
from pallas_kernels.nf4.parts import (
    Following,
    Prepared,
    add_up,
    added_reference,
    lanes_of,
    layer_of,
    prepared_reference,
    terms,
    total,
)
from pallas_kernels.nf4.reference import Packed as Packed
from pallas_kernels.nf4.reference import dequantize


class Update(NamedTuple):
    """The low-rank update of a weight."""

    b: Float[Array, "L O R"]
    """`scaling * B` in the dtype of x."""
    offset: int
    """Of the R columns of `A x` that are this weight's."""


def products(
    x: Float[Array, "M I"],
    weights: Sequence[Packed],
    *,
    shapes: Sequence[tuple[int, int]],
    updates: Sequence[Update | None] | None = None,
    parts: Float32[Array, "P M C"] | None = None,
    eps: float | None = None,
    biases: Sequence[Float[Array, "L _"] | None] | None = None,
    residual: Float[Array, "M O"] | None = None,
    multiplier: float = 1.0,
    gated: bool = False,
    following: Following | None = None,
    plan: Plan | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "M N"], Prepared | None]:
    """Computes `x @ W.T + (A x) @ B.T` of several weights side by side, as one kernel.

    The table's 16 values are rounded to the dtype of x, the block scales never; sums,
    updates, the activation and the residual are float32, rounded once at the end.

    Args:
      x: bfloat16 or float16, M up to `MAX_ROWS`.
      weights: the stacks, all with the same layer.
      shapes: (O, I) of each.
      updates: the low-rank update of each, None where it has none.
      parts: what adds up to `A x` of all updates; before it, with `eps`, the sum of
        squares of each row of what x is a multiple of.
      eps: of the norm whose factor multiplies the products; None without a norm.
      biases: the bias of each, None where it has none.
      residual: added to the result; of a single weight.
      multiplier: of the result, before the residual is added.
      gated: return silu(gate) * up of the two weights instead.
      following: what reads the result, of a single weight or `gated`.
      plan: how the work is divided; default `plan_for`.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The results in the dtype of x, N = the sum of all O, or O if `gated`; and the
      input of what follows.

    Raises:
      ValueError: shapes that the kernel cannot compute.
    """
    count, in_features = x.shape
    following = following or Following()
    sums_read = 0 if parts is None else parts.shape[2]
    sums_left = following.columns
    if plan is None:
        # The interpreter needs a CPU thread for each warpgroup, or waits for ever.
        limits = {"multiprocessors": device.multiprocessors()}
        limits = {"multiprocessors": 2, "max_groups": 2} if interpret else limits
        columns = (sums_read, sums_left)
        plan = plan_for(shapes, count, gated=gated, columns=columns, **limits)
    blocks = in_features // BLOCK
    if plan is None or blocks % (WARPS * plan.groups * plan.chunk):
        raise ValueError(
            f"`products` cannot compute {count} rows with weights {list(shapes)}: it "
            f"takes up to {MAX_ROWS} rows, out_features in multiples of {UNIT} and one "
            f"in_features for all, in multiples of {WARPS * BLOCK}, of which {plan} "
            "must give each warp whole chunks."
        )
    updates = [None] * len(weights) if updates is None else list(updates)
    biases = [None] * len(weights) if biases is None else list(biases)
    groups, chunk, grid = plan
    rows = -(-count // 8) * 8
    share = blocks // (WARPS * groups)
    columns = scale_columns(blocks, groups)
    nested = [w.nested is not None for w in weights]
    interpreted = bool(interpret)
    gather = functools.partial(mosaic.gather, interpret=interpreted)
    # Weights that are computed together; the first unit and the first result of each.
    together = [(0, 1)] if gated else [(w,) for w in range(len(weights))]
    units = [shapes[ws[0]][0] // UNIT for ws in together]
    starts = [sum(units[:i]) for i in range(len(units))]
    out_features = sum(units) * UNIT
    # Of the parts: before A x comes the sum of squares.
    squares, numbers = int(eps is not None), count * sums_read
    ends = [0 if u is None else u.offset + u.b.shape[2] for u in updates]
    if squares + max(ends) != sums_read:
        raise ValueError(
            f"`products`: {sums_read} parts a row do not belong to {max(ends)} columns "
            f"of adapters and {'a' if squares else 'no'} norm."
        )
    if sums_left and len(together) > 1:
        raise ValueError(
            f"`products`: one result can be prepared for what follows, not "
            f"{len(together)}."
        )

    def nf4_products(*operands: Any) -> None:
        refs: list[Any] = list(operands)

        def take(number: int) -> list[Any]:
            return [refs.pop(0) for _ in range(number)]

        x, layer, table = take(3)
        stacks = [take(5 if n else 2) for n in nested]
        bs: list[Any] = [None if u is None else take(1)[0] for u in updates]
        bias_refs: list[Any] = [None if b is None else take(1)[0] for b in biases]

        def optional(condition: Any) -> Any:
            return take(1)[0] if condition else None

        parts_ref = optional(parts is not None)
        residual_ref = optional(residual is not None)
        next_a = optional(following.rank)
        next_norm = optional(following.squares)
        out = take(1)[0]
        next_x, next_parts = optional(following.squares), optional(sums_left)
        table_s, scales_s, sums_s, ready, done = take(5)
        quant_maps_s = optional(any(nested))
        shares_s, totals_s = take(2) if parts is not None else (None, None)
        left_s: list[Any] = take(2) if sums_left else [None, None]
        values_s, sums_left_s = left_s
        block = jax.lax.axis_index("block")
        group = jax.lax.axis_index("group")
        warps = pl.ds(group * WARPS, WARPS)

        # Computed where they are needed: threads have no registers to spare.
        def this_layer() -> Any:
            return clip_layer(layer[0], stacks[0][0].shape[0])

        def next_layer() -> Any:
            return layer_of(layer[0], following)

        def first_unit(start: int) -> Any:
            """Returns the first unit of this block of threads from `start` on."""
            return (block + (-start % grid)) % grid

        def fetch(segment: int, unit: Any) -> None:
            """Starts to bring a warpgroup's share of a unit to L2."""
            unit = jnp.minimum(unit, units[segment] - 1)
            for w in together[segment]:
                codes, absmax = stacks[w][:2]
                rows = pl.ds(unit * UNIT, UNIT)
                scales = pl.ds(unit * UNIT * blocks, UNIT * blocks)
                for ref in (
                    codes.at[this_layer(), rows, warps],
                    absmax.at[this_layer(), scales],
                ):
                    mosaic.prefetch(ref, interpret=interpreted)
            if next_a is not None:
                size = UNIT * following.rank
                ref = next_a.at[next_layer(), pl.ds(unit * size, size)]
                mosaic.prefetch(ref, interpret=interpreted)

        for segment, start in enumerate(starts):
            fetch(segment, first_unit(start))
        sums_of = {"numbers": numbers, "groups": groups, "interpret": interpreted}
        if parts_ref is not None:
            add_up(parts_ref, shares_s, group=group, **sums_of)
        if sums_left:

            @pl.when(group == 0)
            def _() -> None:
                zeros = jnp.zeros(sums_left_s.shape, jnp.float32)
                layout = mosaic.strided(zeros.shape)
                sums_left_s[...] = plgpu.layout_cast(zeros, layout)

        # Each warpgroup copies its share of the table.
        entries = pl.ds(
            group * (table_s.shape[0] // groups), table_s.shape[0] // groups
        )
        table_s[entries] = mosaic.load(table.at[entries], 4)
        quant_map = {}
        for number, w in enumerate(w for w, n in enumerate(nested) if n):
            quant_map[w] = quant_maps_s.at[number]

            @pl.when(group == number % groups)
            def _(source: Any = stacks[w][4], target: Any = quant_map[w]) -> None:
                target[...] = mosaic.load(source.at[this_layer()], 2)

        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        if totals_s is not None:

            @pl.when(group == 0)
            def _() -> None:
                # Read after the barrier that follows a unit's products.
                totals_s[...] = total(shares_s, **sums_of)

        def multiply(w: int, unit: Any) -> jax.Array:
            """Returns a warpgroup's share of the sums: of a quarter for each warp."""
            codes, absmax, *levels = stacks[w]
            layer_index = this_layer()
            # "Row" 16 q + r of a warpgroup is the share of its warp q in row r.
            row = mosaic.iota((ROWS, columns), 0)
            index = (unit * UNIT + row % UNIT) * blocks
            index = index + (group * WARPS + row // UNIT) * share
            # A surplus column repeats the last block's scale; nothing reads it.
            index = index + jnp.minimum(mosaic.iota((ROWS, columns), 1), share - 1)
            scales_s[group] = block_scales(
                absmax,
                tuple(levels),
                quant_map.get(w),
                layer_index,
                index,
                interpret=interpreted,
            )

            def step(i: Any, sums: jax.Array) -> jax.Array:
                part = pl.ds(i * (chunk * BLOCK // 2), chunk * (BLOCK // 2))
                inputs = pl.ds(i * (chunk * BLOCK), chunk * BLOCK)
                return mosaic.coded_product(
                    sums,
                    codes.at[layer_index, pl.ds(unit * UNIT, UNIT), warps, part],
                    x.at[:, warps, inputs],
                    scales_s.at[group, :, pl.ds(i * chunk, chunk)],
                    table_s,
                    interpret=interpreted,
                )

            layout = mosaic.accumulator(rows)
            sums = plgpu.layout_cast(jnp.zeros((ROWS, rows), jnp.float32), layout)
            return jax.lax.fori_loop(0, share // chunk, step, sums)

        def from_totals(row: Any, column: Any) -> jax.Array:
            index = jnp.minimum(row, count - 1) * sums_read + column
            return gather(totals_s, index, jnp.float32)

        def result(slot: Any, n: int, w: int, unit: Any) -> jax.Array:
            """Adds up the sums of all warps, and the low-rank update: [rows * UNIT]."""
            lane = mosaic.iota((rows * UNIT,), 0)
            row, m = lane % UNIT, lane // UNIT
            value: Any = None
            # In a fixed order, unlike atomic additions: every run has the same bits.
            for g in range(groups):
                for warp in range(WARPS):
                    index = m * COLUMN + (UNIT * warp + row)
                    part = gather(sums_s.at[slot, n, g], index, jnp.float32)
                    value = part if value is None else value + part
            update = updates[w]
            if update is not None:
                rank = update.b.shape[2]
                b_start = (unit * UNIT + row) * rank
                first = squares + update.offset
                unroll = math.gcd(rank, 8)

                def term(i: Any, value: jax.Array) -> jax.Array:
                    for k in range(unroll):
                        number = i * unroll + k
                        b = gather(bs[w].at[this_layer()], b_start + number, x.dtype)
                        a = from_totals(m, first + number)
                        value = value + b.astype(jnp.float32) * a
                    return value

                value = jax.lax.fori_loop(0, rank // unroll, term, value)
            if eps is not None:
                mean = from_totals(m, 0) * (1 / in_features)
                value = value * jax.lax.rsqrt(mean + eps)
            bias = bias_refs[w]
            if bias is not None:
                new = gather(bias.at[this_layer()], unit * UNIT + row, bias.dtype)
                value = value + new.astype(jnp.float32)
            return value

        def prepare(unit: Any, value: jax.Array, is_last: Any) -> None:
            """Adds a unit's results to the parts for what follows."""
            value = value.astype(out.dtype).astype(jnp.float32)
            if next_norm is not None:
                lane = mosaic.iota((rows * UNIT,), 0)
                index = unit * UNIT + lane % UNIT
                weight = gather(next_norm.at[next_layer()], index, next_norm.dtype)
                y = value * weight.astype(jnp.float32)
                place = next_x.at[:, pl.ds(unit * UNIT, UNIT)]
                mosaic.store_rows(place, y, interpret=interpreted)
                values_s[1] = y.astype(out.dtype).astype(jnp.float32)
            # Also a barrier of the warpgroup; the next unit's come after another one.
            values_s[0] = value
            new = terms(
                following,
                values_s.at[0],
                values_s.at[following.squares],
                None if next_a is None else next_a.at[next_layer()],
                unit * UNIT,
                rows=count,
                features=UNIT,
                interpret=interpreted,
            )
            # Earlier units' sums; loaded before, they would be in the way.
            new = new + mosaic.load(sums_left_s, 1)
            layout = mosaic.strided(new.shape)
            mosaic.store(sums_left_s, new, layout, interpret=interpreted)

            @pl.when(is_last)
            def _() -> None:
                place = next_parts.at[pl.ds(block, 1)]
                mosaic.store_rows(place, new, interpret=interpreted)

        def finish(segment: int, slot: Any, unit: Any, is_last: Any) -> None:
            values = [result(slot, n, w, unit) for n, w in enumerate(together[segment])]
            if gated:
                gate, up = values
                values = [gate / (1.0 + jnp.exp(-gate)) * up]
            (value,) = values
            value = value if multiplier == 1 else value * multiplier
            if residual_ref is not None:
                lane = mosaic.iota((rows * UNIT,), 0)
                index = jnp.minimum(lane // UNIT, count - 1) * out.shape[1]
                index = index + (unit * UNIT + lane % UNIT)
                stream = gather(residual_ref, index, x.dtype)
                value = value + stream.astype(jnp.float32)
            place = pl.ds(starts[segment] * UNIT + unit * UNIT, UNIT)
            mosaic.store_rows(out.at[:, place], value, interpret=interpreted)
            if sums_left:
                prepare(unit, value, is_last)

        # Units that this block of threads has computed; the sums of one are added up
        # by one warpgroup while the others go on, so there are two places for them.
        before: Any = 0
        for segment, start in enumerate(starts):
            first = first_unit(start)

            def step(
                i: Any,
                carry: None,
                segment: int = segment,
                first: Any = first,
                before: Any = before,
            ) -> None:
                unit, turn = first + i * grid, before + i
                slot = turn % 2
                fetch(segment, unit + grid)
                for n, w in enumerate(together[segment]):
                    sums = multiply(w, unit)
                    mosaic.store_columns(
                        sums_s.at[slot, n, group], sums, interpret=interpreted
                    )
                plgpu.barrier_arrive(done)
                # Whoever passes here a unit later has seen this one's sums added up.
                plgpu.barrier_wait(done)

                @pl.when(group == turn % groups)
                def _() -> None:
                    finish(segment, slot, unit, unit + grid >= units[segment])

            number = (units[segment] - first + grid - 1) // grid
            jax.lax.fori_loop(0, number, step, None)
            before = before + number

    width = rows * COLUMN
    scratch = [
        plgpu.SMEM((256 * LANES,), jnp.int32),
        plgpu.SMEM((groups, ROWS, columns), jnp.float32),
        plgpu.SMEM((2, len(together[0]), groups, width), jnp.float32),
        plgpu.Barrier(num_arrivals=groups),
        plgpu.Barrier(num_arrivals=groups),
    ]
    if any(nested):
        scratch.append(plgpu.SMEM((sum(nested), 256), jnp.float32))
    if parts is not None:
        lanes = lanes_of(numbers)
        scratch.append(plgpu.SMEM((groups * lanes,), jnp.float32))
        scratch.append(plgpu.SMEM((lanes,), jnp.float32))
    outs = [jax.ShapeDtypeStruct((count, out_features), x.dtype)]
    if sums_left:
        lanes = lanes_of(count * sums_left)
        scratch.append(plgpu.SMEM((2, rows * UNIT), jnp.float32))
        scratch.append(plgpu.SMEM((lanes,), jnp.float32))
        outs += outs[: following.squares]
        outs.append(jax.ShapeDtypeStruct((grid, count * sums_left), jnp.float32))
    run = kernel(
        nf4_products,
        outs,
        scratch,
        grid={"block": grid},
        groups=groups,
        interpret=interpret,
    )
    # Warp q of a warpgroup has the q-th share of its in_features.
    warps, bytes_each = WARPS * groups, share * (BLOCK // 2)
    arrays: list[Any] = [x.reshape(count, warps, share * BLOCK), weights[0].layer]
    arrays.append(np.repeat(pair_table(jnp.dtype(x.dtype).name), LANES))
    for weight, shape in zip(weights, shapes, strict=True):
        arrays += operands(weight, shape[0], warps, bytes_each)[1:]
    arrays += [u.b.reshape(u.b.shape[0], -1) for u in updates if u is not None]
    arrays += [bias for bias in biases if bias is not None]
    arrays += [a.reshape(-1) for a in (parts, residual) if a is not None]
    if not sums_left:
        return run(*arrays)[0], None
    if following.a is not None:
        arrays.append(following.a.reshape(following.a.shape[0], -1))
    arrays += [] if following.norm is None else [following.norm]
    y, *prepared = run(*arrays)
    next_parts = prepared[-1].reshape(grid, count, sums_left)
    return y, Prepared(prepared[0] if following.squares else y, next_parts)


def products_reference(
    x: Float[Array, "M I"],
    weights: Sequence[Packed],
    *,
    shapes: Sequence[tuple[int, int]],
    updates: Sequence[Update | None] | None = None,
    parts: Float32[Array, "P M C"] | None = None,
    eps: float | None = None,
    biases: Sequence[Float[Array, "L _"] | None] | None = None,
    residual: Float[Array, "M O"] | None = None,
    multiplier: float = 1.0,
    gated: bool = False,
    following: Following | None = None,
) -> tuple[Float[Array, "M N"], Prepared | None]:
    """Computes `products` in float32, from weights that are not rounded."""
    wide = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    results = []
    factor, inner = added_reference(parts, x.shape[1], eps)
    for w, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        layer = None if weight.layer is None else weight.layer.reshape(())
        full = dequantize(weight._replace(layer=layer), shape=shape, dtype=jnp.float32)
        y = wide(x.astype(jnp.float32), full.T)
        update = updates[w] if updates is not None else None
        if update is not None and inner is not None:
            b = update.b[layer].astype(jnp.float32)
            y = y + wide(inner[:, update.offset :][:, : b.shape[1]], b.T)
        y = y if factor is None else factor * y
        bias = biases[w] if biases is not None else None
        results.append(y if bias is None else y + bias[layer].astype(jnp.float32)[None])
    if gated:
        gate, up = results
        results = [jax.nn.silu(gate) * up]
    y = multiplier * jnp.concatenate(results, axis=1)
    y = y if residual is None else y + residual.astype(jnp.float32)
    y, layer = y.astype(x.dtype), weights[0].layer
    if following is None or not following.columns or layer is None:
        return y, None
    return y, prepared_reference(y, layer, following)
