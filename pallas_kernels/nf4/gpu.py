"""The NF4 kernels for NVIDIA GPUs, in Pallas (Mosaic GPU).

`dequantize` writes a weight out, `product` multiplies a few rows with it without ever
writing it. Both read the packed bytes of one layer where they lie in the stack of all
layers, and both decode the 8-bit block scales of double quantization on the way.
docs/nf4_kernels.md explains them with pictures and counts.

What they share: a packed byte is decoded by looking it up in shared memory, where the
table is kept once for each of the 32 lanes of a warp, so that no two lanes ever ask one
bank. (Choosing among 16 values by comparing takes some 19 integer instructions a
weight, twice the time that the memory traffic takes; a lookup takes three.)

These are the bodies; `pallas_kernels.nf4.api` chooses, checks and differentiates.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import mosaic
from pallas_kernels.mosaic import BLOCK, LANES, ROWS, WARPGROUP
from pallas_kernels.nf4.reference import NF4_CODE

MOST_ROWS = 64
"""Rows that `product` takes at most."""


class Packed(NamedTuple):
    """A stack of packed weights; L is 1 for one that stands alone."""

    codes: jax.Array
    """uint8 [L, ...], N/2 bytes a layer."""
    absmax: jax.Array
    """float32 or uint8 [L, ...], N/64 a layer."""
    nested: tuple[jax.Array, jax.Array, jax.Array] | None
    """Of double quantization: scales [L, ceil(N/16384)], offset [L], table [L, 256]."""
    layer: jax.Array
    """int32 [1]: the layer that is meant."""

    def operands(self, *codes_shape: int) -> list[jax.Array]:
        """The arrays as a kernel takes them, codes in the given shape a layer."""
        layers = self.codes.shape[0]
        out = [self.layer, self.codes.reshape(layers, *codes_shape)]
        out.append(self.absmax.reshape(layers, -1))
        if self.nested is not None:
            scales, offset, table = self.nested
            out += [scales, offset.reshape(layers), table]
        return out


def dequantize_refusal(size: int, words: int | None = None) -> str | None:
    """Says why `dequantize` cannot do a weight of so many elements, or None."""
    unit = 8 * WARPGROUP * (words or 1)
    if size % unit:
        return f"it needs a multiple of {unit} weights, and this one has {size}."
    return None


def dequantize(
    packed: Packed,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike,
    words: int | None = None,
    steps: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Writes one layer's weight.

    A block of threads goes over `steps` tiles; in each, a thread reads `words` times 4
    bytes of codes, 8 weights, and writes 16 bytes of them at a time (bf16), so that
    every access of a warp covers neighbouring memory. The next tile's codes are asked
    for before this tile is decoded.

    Args:
      packed: the stack.
      shape: (O, I).
      dtype: of the result.
      words: 32-bit words of codes a thread and tile: 1, 2, 4 or 8.
      steps: tiles a block of threads; any number.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The weight [O, I].
    """
    size = math.prod(shape)
    if words is None:
        words = next(w for w in (4, 2, 1) if size % (8 * WARPGROUP * w) == 0)
    tile = 8 * WARPGROUP * words
    tiles = size // tile
    if steps is None:
        steps = 8
    steps = next(s for s in range(min(steps, tiles), 0, -1) if tiles % s == 0)
    nested = packed.nested is not None
    table = np.repeat(NF4_CODE, LANES)
    interpreted = bool(interpret)

    def body(layer: Any, codes: Any, absmax: Any, *rest: Any) -> None:
        levels: Any = rest[:3] if nested else ()
        rest = rest[len(levels) :]
        table, out, table_s, *quant_map_s = rest
        number = existing(layer[0], codes.shape[0])
        first = jax.lax.axis_index("block") * steps
        table_s[...] = mosaic.load(table, 4)
        if nested:
            quant_map_s[0][...] = mosaic.load(levels[2].at[number], 2)

        def fetch(step: Any) -> tuple[jax.Array, jax.Array]:
            at = (first + step) * (tile // 2)
            raw = mosaic.load(codes.at[number, pl.ds(at, tile // 2)], 4)
            word = (first + step) * (tile // 8) + mosaic.iota((tile // 8,), 0)
            kind = jnp.int32 if nested else jnp.float32
            # Eight words hold the 64 weights that share a scale.
            scale = mosaic.gather(
                absmax.at[number], word >> 3, kind, interpret=interpreted
            )
            return mosaic.as_words(raw, interpret=interpreted), scale

        def step(i: Any, fetched: tuple[jax.Array, jax.Array]) -> Any:
            # Past the end the last tile is fetched again, and not used.
            following = fetch(jnp.minimum(i + 1, steps - 1))
            word, scale = fetched
            if nested:
                # A tile never straddles two groups: both are powers of two.
                group = (first + i) * (tile // BLOCK) // 256
                scale = mosaic.gather(
                    quant_map_s[0], scale, jnp.float32, interpret=interpreted
                )
                scale = _absmax(scale, levels[0][number, group], levels[1][number])
            values = []
            for k in range(8):
                # Byte k // 2 of a little-endian word, the high nibble first.
                shift = 8 * (k // 2) + (0 if k % 2 else 4)
                code = (word >> shift) & 0xF
                value = mosaic.gather(
                    table_s,
                    code,
                    jnp.float32,
                    interpret=interpreted,
                    copies=LANES,
                )
                values.append(value * scale)
            weights = mosaic.interleave(values, interpret=interpreted)
            # An assignment would have the threads wait for each other, twice a tile.
            mosaic.store(
                out.at[pl.ds((first + i) * tile, tile)],
                weights.astype(out.dtype),
                mosaic.strided((tile,), 8),
                interpret=interpreted,
            )
            return following

        jax.lax.fori_loop(0, steps, step, fetch(0))

    scratch = [plgpu.SMEM((16 * LANES,), jnp.float32)]
    if nested:
        scratch.append(plgpu.SMEM((256,), jnp.float32))
    run = kernel(
        body,
        jax.ShapeDtypeStruct((size,), dtype),
        scratch,
        grid={"block": tiles // steps},
        interpret=interpret,
    )
    return run(*packed.operands(size // 2), table).reshape(shape)


class Split(NamedTuple):
    """How a product's sums are shared out."""

    groups: int
    """Warpgroups of a block of threads; each sums over its share of in_features."""
    parts: int
    """Blocks of threads that share the sums of the same 64 out_features."""
    chunk: int
    """Blocks of 64 weights whose codes a thread asks for at once."""


def split_for(
    shape: tuple[int, int], rows: int, *, most_groups: int = 8
) -> Split | None:
    """Shares out the sums of a product; None where the kernel cannot do the shape.

    Enough warps to keep the memory busy (at least 16 for each of 132 multiprocessors,
    where the weight is large enough), few enough registers to let them run.

    Args:
      shape: (O, I).
      rows: of x.
      most_groups: warpgroups of a block of threads at most.
    """
    out_features, in_features = shape
    blocks = in_features // BLOCK
    if out_features % ROWS or in_features % BLOCK or rows > MOST_ROWS:
        return None
    most_groups = min(most_groups, 8 if rows <= 16 else 4)
    limit = _shared_limit(rows)
    for groups in (8, 4, 2, 1):
        if groups > most_groups or blocks % (2 * groups):
            continue
        tiles, parts = out_features // ROWS, 1
        while blocks % (4 * groups * parts) == 0 and (
            (tiles * parts * groups < 4 * 132 and parts < 16)
            or _shared(blocks, rows, groups, parts) > limit
        ):
            parts *= 2
        if _shared(blocks, rows, groups, parts) > limit:
            continue
        each = blocks // groups // parts
        # What fits in the registers of a thread, 64 of 1,024 threads or 128 of 512;
        # ptxas spills where one more block's codes and inputs are asked for.
        chunk = 2 if rows <= 32 and each % 2 == 0 else 1
        return Split(groups, parts, chunk)
    return None


def _shared(blocks: int, rows: int, groups: int, parts: int) -> int:
    """Bytes of shared memory that a block of threads of `product` takes."""
    table, maps = 256 * LANES, groups * 256
    scales, sums = ROWS * blocks // parts, groups * ROWS * -(-rows // 8) * 8
    return 4 * (table + maps + scales + sums)


def _shared_limit(rows: int) -> int:
    # What every device since Ampere has, and for many rows what those for data centers
    # have.
    return 99 * 1024 if rows <= 32 else 163 * 1024


def candidates(kind: str, shape: tuple[int, int], rows: int = 0) -> list[dict]:
    """Lists the choices that can be tried for a shape, for a measurement to decide.

    Args:
      kind: "dequantize" or "matmul".
      shape: (O, I).
      rows: of x, for "matmul".

    Returns:
      Arguments of `dequantize` (words, steps), or of a `Split`.
    """
    out_features, in_features = shape
    size, blocks = out_features * in_features, in_features // BLOCK
    if kind == "dequantize":
        return [
            {"words": words, "steps": steps}
            for words in (1, 2, 4, 8)
            for steps in (1, 4, 16, 64)
            if size % (8 * WARPGROUP * words * steps) == 0
        ]
    if split_for(shape, rows) is None:
        return []
    return [
        {"groups": groups, "parts": parts, "chunk": chunk}
        for groups in (2, 4, 8)
        for parts in (1, 2, 4, 8)
        for chunk in (1, 2, 4)
        if blocks % (2 * groups * parts) == 0
        and blocks // groups // parts % chunk == 0
        and _shared(blocks, rows, groups, parts) <= _shared_limit(rows)
    ]


def product(
    x: jax.Array,
    packed: Packed,
    *,
    shape: tuple[int, int],
    split: Split | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Computes `x @ W.T` for a few rows, from the packed bytes.

    The weight is the left operand of the tensor cores' `mma` and the rows of x, padded
    to a multiple of 8, the right one. A block of threads takes 64 out_features; its
    warpgroups share in_features and add up at the end through shared memory.

    Args:
      x: [M, I], bfloat16 or float16, M up to `MOST_ROWS`.
      packed: the stack.
      shape: (O, I).
      split: how the sums are shared out; default `split_for`.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      float32 [M, O].
    """
    out_features, in_features = shape
    count = x.shape[0]
    if split is None:
        # The interpreter needs a CPU thread for each warpgroup, or waits for ever.
        split = split_for(shape, count, most_groups=2 if interpret else 8)
    assert split is not None
    x = jnp.pad(x, ((0, -count % 8), (0, 0)))
    rows = x.shape[0]
    groups, parts, chunk = split
    blocks = in_features // BLOCK
    each = blocks // groups // parts
    if each * groups * parts != blocks or each % chunk or each % 2:
        raise ValueError(
            f"`product`: {split} does not divide the {blocks} blocks of 64 weights of "
            f"in_features={in_features} into even shares of whole chunks; `split_for` "
            "gives one that does."
        )
    nested = packed.nested is not None
    share = 256 * LANES // groups
    interpreted = bool(interpret)

    def body(x: Any, layer: Any, codes: Any, absmax: Any, *rest: Any) -> None:
        levels: Any = rest[:3] if nested else ()
        rest = rest[len(levels) :]
        table, out, table_s, scales_s, sums_s, ready, done, *quant_map_s = rest
        number = existing(layer[0], codes.shape[0])
        tile = jax.lax.axis_index("tile")
        part = jax.lax.axis_index("part")
        group = jax.lax.axis_index("group")
        # In blocks of 64 weights, along in_features.
        first = (part * groups + group) * each

        def weights(block: Any, count: int) -> Any:
            return codes.at[
                number, pl.ds(tile * ROWS, ROWS), pl.ds(block * 32, count * 32)
            ]

        mosaic.prefetch(weights(first, each), interpret=interpreted)
        mine = pl.ds(group * share, share)
        table_s[mine] = mosaic.load(table.at[mine], 4)
        if nested:
            quant_map_s[0][group] = mosaic.load(levels[2].at[number], 2)
        where = (ROWS, each)
        index = (tile * ROWS + mosaic.iota(where, 0)) * blocks
        index = index + (first + mosaic.iota(where, 1))
        map_s = quant_map_s[0].at[group] if nested else None
        scales_s[group] = block_scales(
            absmax, levels, map_s, number, index, interpret=interpreted
        )
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)

        def step(i: Any, sums: jax.Array) -> jax.Array:
            return mosaic.coded_product(
                sums,
                weights(first + i * chunk, chunk),
                x.at[:, pl.ds((first + i * chunk) * BLOCK, chunk * BLOCK)],
                scales_s.at[group, :, pl.ds(i * chunk, chunk)],
                table_s,
                interpret=interpreted,
            )

        layout = mosaic.accumulator(rows)
        sums = plgpu.layout_cast(jnp.zeros((ROWS, rows), jnp.float32), layout)
        sums = jax.lax.fori_loop(0, each // chunk, step, sums)
        mosaic.store(sums_s.at[group], sums, layout, interpret=interpreted)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(group == 0)
        def _() -> None:
            total = mosaic.load(sums_s.at[0], 4)
            for other in range(1, groups):
                total = total + mosaic.load(sums_s.at[other], 4)
            out[part, pl.ds(tile * ROWS, ROWS)] = total

    scratch = [
        plgpu.SMEM((256 * LANES,), jnp.int32),
        plgpu.SMEM((groups, ROWS, each), jnp.float32),
        plgpu.SMEM((groups, ROWS, rows), jnp.float32),
        plgpu.Barrier(num_arrivals=groups),
        plgpu.Barrier(num_arrivals=groups),
    ]
    if nested:
        scratch.append(plgpu.SMEM((groups, 256), jnp.float32))
    run = kernel(
        body,
        jax.ShapeDtypeStruct((parts, out_features, rows), jnp.float32),
        scratch,
        grid={"tile": out_features // ROWS, "part": parts},
        threads=groups,
        interpret=interpret,
    )
    table = np.repeat(_pair_table(jnp.dtype(x.dtype).name), LANES)
    sums = run(x, *packed.operands(out_features, in_features // 2), table)
    return sums.sum(axis=0)[:, :count].T


def kernel(
    body: Any,
    out: Any,
    scratch: list[Any],
    *,
    grid: dict[str, int],
    interpret: Any,
    threads: int | None = None,
) -> Any:
    """A kernel that stores `out`, on a grid of blocks of `threads` warpgroups."""
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    if threads is not None:
        settings |= {"num_threads": threads, "thread_name": "group"}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=tuple(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        **settings,
    )


def block_scales(
    absmax: Any,
    levels: tuple[Any, ...],
    quant_map: Any,
    number: Any,
    index: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Reads block scales within a kernel, and decodes those of 8 bits.

    Args:
      absmax: [L, N/64] in global memory.
      levels: scales, offset and table of double quantization, in global memory; or ().
      quant_map: float32 [256] in shared memory, the layer's table, with `levels`.
      number: the layer.
      index: int32, which of the layer's blocks; in the layout `mosaic.strided`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      float32 scales, in the shape and layout of `index`.
    """
    gather = functools.partial(mosaic.gather, interpret=interpret)
    if not levels:
        return gather(absmax.at[number], index, jnp.float32)
    value = gather(quant_map, gather(absmax.at[number], index, jnp.int32), jnp.float32)
    above = gather(levels[0].at[number], index >> 8, jnp.float32)
    return _absmax(value, above, levels[1][number])


def existing(layer: Any, layers: int) -> Any:
    """The layer, or the nearest that exists."""
    # In the kernel: outside, a kernel of its own would clip one number.
    return jnp.minimum(jnp.maximum(layer, 0), layers - 1)


def _absmax(value: jax.Array, scale: Any, offset: Any) -> jax.Array:
    # As in `reference.dequantize_absmax`: a maximum that changes nothing finite keeps
    # product and sum from being contracted into one rounding.
    lowest = float(np.finfo(np.float32).min)
    return jnp.maximum(value * scale, lowest) + offset


@functools.cache
def _pair_table(dtype: str) -> np.ndarray:
    """The two values of each byte in 16 bits, as int32, the first in the low half."""
    values = NF4_CODE.astype(jnp.dtype(dtype)).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return (values[byte >> 4] | values[byte & 0xF] << 16).view(np.int32)
