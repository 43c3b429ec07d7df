"""The linear layers of a decoded token, for NVIDIA GPUs, in few kernels.

A token of a model of 8B in 16-bit activations is a few kilobytes for each layer: the
time of a layer is that of reading its packed weights, as long as they are read by few
kernels. There are two here:

  inner     the norm before a group of linear layers, and `A x` of their adapters
  products  packed weights that share an input, with what follows them: the adapters'
            `B (A x)`, and the sum with the residual stream or the gated activation

A block of threads stays for all of its share of `products`, which is cut into units of
16 out_features: the table for decoding is loaded once, and while a unit is computed the
next one is on its way to L2.

These are the kernels; not measured on a GPU. `products_reference` and `inner_reference`
compute the same in plain jax.
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
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import device, mosaic
from pallas_kernels.mosaic import BLOCK, COLUMN, LANES, ROWS, WARPGROUP
from pallas_kernels.nf4.gpu import (
    block_scales,
    clip_layer,
    kernel,
    operands,
    pair_table,
)
from pallas_kernels.nf4.reference import Packed as Packed
from pallas_kernels.nf4.reference import dequantize

MAX_ROWS = 16
"""Rows that `products` takes at most."""
UNIT = 16
"""Out_features that are computed together: the rows of a product of the tensor cores.
Small units divide evenly among the multiprocessors."""
_WARPS = 4
"""Of a warpgroup; they share the in_features of a unit."""
# What a block of threads has on every device since Ampere, and a multiprocessor of
# Hopper for all of its blocks, less what each takes for itself (CUDA C++ Programming
# Guide).
_SHARED_LIMIT, _SHARED_OF_ALL = 99 * 1024, 224 * 1024


class Update(NamedTuple):
    """The low-rank update of a weight."""

    b: Float[Array, "L O R"]
    """`scaling * B` in the dtype of x."""
    offset: int
    """Of the R columns of `inner` that are this weight's."""


class Plan(NamedTuple):
    """How `products` is divided."""

    groups: int
    """Warpgroups of a block of threads; they share the in_features."""
    chunk: int
    """Blocks of 64 weights whose codes a thread loads at once."""
    blocks: int
    """Blocks of threads, each with every `blocks`-th unit."""


def plan_for(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    *,
    gated: bool = False,
    multiprocessors: int = 132,
    max_groups: int = 8,
) -> Plan | None:
    """Divides the products with weights of one input; None if they cannot be computed.

    Args:
      shapes: (O, I) of each.
      rows: of x.
      gated: whether the two weights are those of a gate and its values.
      multiprocessors: of the device.
      max_groups: warpgroups of a block of threads at most.
    """
    if not 0 < rows <= MAX_ROWS or len({shape[1] for shape in shapes}) != 1:
        return None
    if gated and (len(shapes) != 2 or shapes[0] != shapes[1]):
        return None
    blocks = shapes[0][1] // BLOCK
    if shapes[0][1] % BLOCK or any(shape[0] % UNIT for shape in shapes):
        return None
    units = sum(shape[0] // UNIT for shape in shapes) // (2 if gated else 1)
    # Eight warpgroups are 1,024 threads of 64 registers: too few for the sums of more
    # rows, or to compute two weights in turn.
    max_groups = min(max_groups, 8 if rows <= 8 and not gated else 4)
    for groups in (8, 4, 2, 1):
        if groups > max_groups or blocks % (_WARPS * groups):
            continue
        shared = _shared_bytes(shapes, rows, groups, gated)
        # Enough threads for a multiprocessor's registers, 128 each where there are few.
        at_once = min(max(4 // groups, 1), _SHARED_OF_ALL // shared)
        if shared <= _SHARED_LIMIT:
            chunk = 1 if blocks // (_WARPS * groups) % 2 else 2
            return Plan(groups, chunk, min(at_once * multiprocessors, units))
    return None


def _shared_bytes(
    shapes: Sequence[tuple[int, int]], rows: int, groups: int, gated: bool
) -> int:
    """Returns the shared memory of a block of threads of `products`."""
    # In 4-byte words: the pairs, 32 copies; the tables of 8-bit scales; the scales of
    # each warpgroup; the sums, of two units at a time, of each warpgroup.
    table, quant_maps = 256 * LANES, 256 * len(shapes)
    scales = groups * ROWS * _scale_columns(shapes[0][1] // BLOCK, groups)
    padded = -(-rows // 8) * 8
    sums = 2 * (2 if gated else 1) * groups * padded * COLUMN
    return 4 * (table + quant_maps + scales + sums)


def _scale_columns(blocks: int, groups: int) -> int:
    """Returns a warp's scales of a row: even, to spread over 128 threads."""
    share = blocks // (_WARPS * groups)
    return share + share % 2


def products(
    x: Float[Array, "M I"],
    weights: Sequence[Packed],
    *,
    shapes: Sequence[tuple[int, int]],
    updates: Sequence[Update | None] | None = None,
    inner: Float32[Array, "M R"] | None = None,
    residual: Float[Array, "M O"] | None = None,
    gated: bool = False,
    plan: Plan | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """Computes `x @ W.T + inner @ B.T` of several weights side by side, as one kernel.

    The table's 16 values are rounded to the dtype of x, the block scales never; sums,
    updates, the activation and the residual are float32, rounded once at the end.

    Args:
      x: bfloat16 or float16, M up to `MAX_ROWS`.
      weights: the stacks, all with the same layer.
      shapes: (O, I) of each.
      updates: the low-rank update of each, None where it has none.
      inner: `A x` of all updates.
      residual: added to the result; of a single weight.
      gated: return silu(gate) * up of the two weights instead.
      plan: how the work is divided; default `plan_for`.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The results in the dtype of x, N = the sum of all O; or O if `gated`.

    Raises:
      ValueError: shapes that the kernel cannot compute.
    """
    count, in_features = x.shape
    if plan is None:
        # The interpreter needs a CPU thread for each warpgroup, or waits for ever.
        limits = {"multiprocessors": device.multiprocessors()}
        limits = {"multiprocessors": 2, "max_groups": 2} if interpret else limits
        plan = plan_for(shapes, count, gated=gated, **limits)
    blocks = in_features // BLOCK
    if plan is None or blocks % (_WARPS * plan.groups * plan.chunk):
        raise ValueError(
            f"`products` cannot compute {count} rows with weights {list(shapes)}: it "
            f"takes up to {MAX_ROWS} rows, out_features in multiples of {UNIT} and one "
            f"in_features for all, in multiples of {_WARPS * BLOCK}, of which {plan} "
            "must give each warp whole chunks."
        )
    updates = [None] * len(weights) if updates is None else list(updates)
    groups, chunk, grid = plan
    rows = -(-count // 8) * 8
    share = blocks // (_WARPS * groups)
    columns = _scale_columns(blocks, groups)
    nested = [w.nested is not None for w in weights]
    interpreted = bool(interpret)
    gather = functools.partial(mosaic.gather, interpret=interpreted)
    # Weights that are computed together; the first unit and the first result of each.
    together = [(0, 1)] if gated else [(w,) for w in range(len(weights))]
    units = [shapes[ws[0]][0] // UNIT for ws in together]
    starts = [sum(units[:i]) for i in range(len(units))]
    inner_width = 0 if inner is None else inner.shape[1]

    def nf4_products(*operands: Any) -> None:
        refs: list[Any] = list(operands)

        def take(number: int) -> list[Any]:
            return [refs.pop(0) for _ in range(number)]

        x, layer, table = take(3)
        stacks = [take(5 if n else 2) for n in nested]
        bs: list[Any] = [None if u is None else take(1)[0] for u in updates]
        inner_ref = take(1)[0] if inner is not None else None
        residual_ref = take(1)[0] if residual is not None else None
        out, table_s, scales_s, sums_s, ready, done, *quant_maps_s = refs
        layer_index = clip_layer(layer[0], stacks[0][0].shape[0])
        block = jax.lax.axis_index("block")
        group = jax.lax.axis_index("group")
        warps = pl.ds(group * _WARPS, _WARPS)

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
                    codes.at[layer_index, rows, warps],
                    absmax.at[layer_index, scales],
                ):
                    mosaic.prefetch(ref, interpret=interpreted)

        for segment, start in enumerate(starts):
            fetch(segment, first_unit(start))
        # Each warpgroup copies its share of the table.
        entries = pl.ds(
            group * (table_s.shape[0] // groups), table_s.shape[0] // groups
        )
        table_s[entries] = mosaic.load(table.at[entries], 4)
        quant_map = {}
        for number, w in enumerate(w for w, n in enumerate(nested) if n):
            quant_map[w] = quant_maps_s[0].at[number]

            @pl.when(group == number % groups)
            def _(source: Any = stacks[w][4], target: Any = quant_map[w]) -> None:
                target[...] = mosaic.load(source.at[layer_index], 2)

        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)

        def multiply(w: int, unit: Any) -> jax.Array:
            """Returns a warpgroup's share of the sums: of a quarter for each warp."""
            codes, absmax, *levels = stacks[w]
            # "Row" 16 q + r of a warpgroup is the share of its warp q in row r.
            row = mosaic.iota((ROWS, columns), 0)
            index = (unit * UNIT + row % UNIT) * blocks
            index = index + (group * _WARPS + row // UNIT) * share
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

        def total(slot: Any, n: int, w: int, unit: Any) -> jax.Array:
            """Adds up the sums of all warps, and the low-rank update: [rows * UNIT]."""
            lane = mosaic.iota((rows * UNIT,), 0)
            row, m = lane % UNIT, lane // UNIT
            value: Any = None
            # In a fixed order, unlike atomic additions: every run has the same bits.
            for g in range(groups):
                for warp in range(_WARPS):
                    index = m * COLUMN + (UNIT * warp + row)
                    part = gather(sums_s.at[slot, n, g], index, jnp.float32)
                    value = part if value is None else value + part
            update = updates[w]
            if update is None:
                return value
            rank = update.b.shape[2]
            b_start = (unit * UNIT + row) * rank
            inner_start = jnp.minimum(m, count - 1) * inner_width + update.offset
            unroll = math.gcd(rank, 8)

            def term(i: Any, value: jax.Array) -> jax.Array:
                for k in range(unroll):
                    b = gather(
                        bs[w].at[layer_index], b_start + (i * unroll + k), x.dtype
                    )
                    a = gather(inner_ref, inner_start + (i * unroll + k), jnp.float32)
                    value = value + b.astype(jnp.float32) * a
                return value

            return jax.lax.fori_loop(0, rank // unroll, term, value)

        def finish(segment: int, slot: Any, unit: Any) -> None:
            values = [total(slot, n, w, unit) for n, w in enumerate(together[segment])]
            if gated:
                gate, up = values
                values = [gate / (1.0 + jnp.exp(-gate)) * up]
            (value,) = values
            if residual_ref is not None:
                lane = mosaic.iota((rows * UNIT,), 0)
                index = jnp.minimum(lane // UNIT, count - 1) * out.shape[1]
                index = index + (unit * UNIT + lane % UNIT)
                stream = gather(residual_ref, index, x.dtype)
                value = value + stream.astype(jnp.float32)
            place = pl.ds(starts[segment] * UNIT + unit * UNIT, UNIT)
            mosaic.store_rows(out.at[:, place], value, interpret=interpreted)

        # Units that this block of threads has computed; the sums of one are added up
        # by one warpgroup while the others go on, so there are two places for them.
        turn: Any = jnp.int32(0)
        for segment, start in enumerate(starts):
            first = first_unit(start)

            def step(
                i: Any, turn: Any, segment: int = segment, first: Any = first
            ) -> Any:
                unit, slot = first + i * grid, turn % 2
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
                    finish(segment, slot, unit)

                return turn + 1

            number = (units[segment] - first + grid - 1) // grid
            turn = jax.lax.fori_loop(0, number, step, turn)

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
    out_features = sum(units) * UNIT
    run = kernel(
        nf4_products,
        jax.ShapeDtypeStruct((count, out_features), x.dtype),
        scratch,
        grid={"block": grid},
        groups=groups,
        interpret=interpret,
    )
    # Warp q of a warpgroup has the q-th share of its in_features.
    parts, bytes_each = _WARPS * groups, share * (BLOCK // 2)
    arrays: list[Any] = [x.reshape(count, parts, share * BLOCK), weights[0].layer]
    arrays.append(np.repeat(pair_table(jnp.dtype(x.dtype).name), LANES))
    for weight, shape in zip(weights, shapes, strict=True):
        arrays += operands(weight, shape[0], parts, bytes_each)[1:]
    arrays += [u.b.reshape(u.b.shape[0], -1) for u in updates if u is not None]
    arrays += [a.reshape(-1) for a in (inner, residual) if a is not None]
    return run(*arrays)


def products_reference(
    x: Float[Array, "M I"],
    weights: Sequence[Packed],
    *,
    shapes: Sequence[tuple[int, int]],
    updates: Sequence[Update | None] | None = None,
    inner: Float32[Array, "M R"] | None = None,
    residual: Float[Array, "M O"] | None = None,
    gated: bool = False,
) -> Float[Array, "M N"]:
    """Computes `products` in float32, from weights that are not rounded."""
    wide = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    results = []
    for w, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        layer = None if weight.layer is None else weight.layer.reshape(())
        full = dequantize(weight._replace(layer=layer), shape=shape, dtype=jnp.float32)
        y = wide(x.astype(jnp.float32), full.T)
        update = updates[w] if updates is not None else None
        if update is not None and inner is not None:
            b = update.b[layer].astype(jnp.float32)
            y = y + wide(inner[:, update.offset :][:, : b.shape[1]], b.T)
        results.append(y)
    if gated:
        gate, up = results
        results = [jax.nn.silu(gate) * up]
    y = jnp.concatenate(results, axis=1)
    y = y if residual is None else y + residual.astype(jnp.float32)
    return y.astype(x.dtype)


# --- What comes before a group of linear layers ---


class Norm(NamedTuple):
    """An RMSNorm, of which every layer has a weight."""

    weight: Float[Array, "L D"]
    eps: float


def inner(
    x: Float[Array, "M I"],
    layer: Int32[Array, " 1"],
    *,
    norm: Norm | None = None,
    a: Float[Array, "L R I"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "M I"], Float32[Array, "M R"] | None]:
    """Computes the normed x, and `A x` of it, as one kernel.

    A block of threads computes one number of one row, and norms the row for itself:
    its sum of squares needs no second kernel.

    Args:
      x: in bfloat16 or float16, I a multiple of 128.
      layer: the layer, clipped to those that exist.
      norm: applied to x first.
      a: the A of all adapters, below one another, in the dtype of x.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The normed x (x itself without a norm), rounded as `qlora_jax.models` does, and
      the float32 products, None without `a`.
    """
    if norm is None and a is None:
        return x, None
    count, width = x.shape
    rank = 0 if a is None else a.shape[1]
    part = math.gcd(width, 4096)
    each = min(part // WARPGROUP, 8)
    starts = range(0, width, part)

    def nf4_inner(*operands: Any) -> None:
        refs: list[Any] = list(operands)
        x, layer = refs.pop(0), refs.pop(0)
        weight: Any = None if norm is None else refs.pop(0)
        a_ref: Any = None if a is None else refs.pop(0)
        out = None if norm is None else refs.pop(0)
        inner_ref = None if a is None else refs.pop(0)
        number = jax.lax.axis_index("number")
        row = jax.lax.axis_index("row")
        layers = (weight if a is None else a).shape[0]
        layer_index = clip_layer(layer[0], layers)

        def load(ref: Any, start: int) -> jax.Array:
            return mosaic.load(ref.at[pl.ds(start, part)], each)

        scale = None
        if norm is not None:
            squares: Any = None
            for start in starts:
                wide = load(x.at[row], start).astype(jnp.float32)
                squares = wide * wide + (0.0 if squares is None else squares)
            scale = jax.lax.rsqrt(jnp.sum(squares) / width + norm.eps)

        def normed(start: int) -> jax.Array:
            values = load(x.at[row], start)
            if scale is None:
                return values
            wide = values.astype(jnp.float32) * scale
            # Rounded before it is multiplied with the weight, as in transformers.
            factor = load(weight.at[layer_index], start)
            return wide.astype(values.dtype) * factor

        if inner_ref is not None:

            @pl.when(number < rank)
            def _() -> None:
                terms: Any = None
                for start in starts:
                    left = load(a_ref.at[layer_index, number], start)
                    term = left.astype(jnp.float32) * normed(start).astype(jnp.float32)
                    terms = term if terms is None else terms + term
                inner_ref[row, number] = jnp.sum(terms)

        if out is not None:

            @pl.when(number == rank)
            def _() -> None:
                for start in starts:
                    mosaic.store(
                        out.at[row, pl.ds(start, part)],
                        normed(start),
                        mosaic.strided((part,), each),
                        interpret=bool(interpret),
                    )

    outputs, arrays = [], [x, layer]
    if norm is not None:
        outputs.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        arrays.append(norm.weight.astype(x.dtype))
    if a is not None:
        outputs.append(jax.ShapeDtypeStruct((count, rank), jnp.float32))
        arrays.append(a)
    run = kernel(
        nf4_inner,
        outputs,
        [],
        grid={"number": rank + (norm is not None), "row": count},
        interpret=interpret,
    )
    results = list(run(*arrays))
    y = x if norm is None else results.pop(0)
    return y, results[0] if results else None


def inner_reference(
    x: Float[Array, "M I"],
    layer: Int32[Array, " 1"],
    *,
    norm: Norm | None = None,
    a: Float[Array, "L R I"] | None = None,
) -> tuple[Float[Array, "M I"], Float32[Array, "M R"] | None]:
    """Computes `inner` in plain jax."""
    if norm is not None:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean + norm.eps)
        weight = norm.weight[layer].reshape(1, -1)
        x = wide.astype(x.dtype) * weight.astype(x.dtype)
    if a is None:
        return x, None
    left = a[layer[0]].astype(jnp.float32)
    return x, jnp.matmul(x.astype(jnp.float32), left.T, precision="highest")
