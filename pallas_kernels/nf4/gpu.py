"""The NF4 kernels for NVIDIA GPUs, in Pallas (Mosaic GPU).

`dequantize` writes a weight to memory, `matmul` multiplies a few rows with it without
writing it. Both read the packed bytes of one layer in place, within the stack of all
layers, and both decode the 8-bit block scales of double quantization on the way.
docs/nf4_kernels.md explains them with pictures and counts.

A packed byte is decoded by looking it up in shared memory, where the table has one copy
for each of the 32 lanes of a warp, so that no two lanes ever read the same bank.
(Selecting among 16 values by comparisons takes some 19 integer instructions a weight,
twice the time of the memory traffic; a lookup takes three.)

These are the kernels; `pallas_kernels.nf4.api` chooses, checks and differentiates.
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
from pallas_kernels.nf4.reference import NF4_CODE, Packed

MAX_ROWS = 64
"""Rows that `matmul` takes at most."""
MULTIPROCESSORS = 132
"""Of an H100 or H200: the work is cut so that each has enough of it."""


def dequantize_refusal(size: int, words: int | None = None) -> str | None:
    """Returns why `dequantize` cannot decode a weight of `size` elements, or None."""
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
    """Decodes the weight of one layer.

    A block of threads goes over `steps` tiles; in each, a thread reads `words` times 4
    bytes of codes, 8 weights, and writes 16 bytes of them at a time (bf16), so that
    every access of a warp covers neighbouring memory. The next tile's codes are loaded
    before this tile is decoded.

    Args:
      packed: the stack.
      shape: (O, I).
      dtype: of the result.
      words: 32-bit words of codes per thread and tile: 1, 2, 4 or 8.
      steps: tiles per block of threads; lowered to a divisor of their number.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The weight [O, I].
    """
    size = math.prod(shape)
    if words is None:
        # The widest tile that divides the weight: no access needs a bounds check.
        words = next(w for w in (4, 2, 1) if size % (8 * WARPGROUP * w) == 0)
    tile = 8 * WARPGROUP * words
    tiles = size // tile
    limit = min(steps or 8, tiles)
    # A divisor, so that every block of threads has the same number of tiles.
    steps = next(s for s in range(limit, 0, -1) if tiles % s == 0)
    nested = packed.nested is not None
    interpreted = bool(interpret)
    gather = functools.partial(mosaic.gather, interpret=interpreted)

    def nf4_dequantize(layer: Any, codes: Any, absmax: Any, *refs: Any) -> None:
        levels: Any = refs[:3] if nested else ()
        table, out, table_s, *quant_map_s = refs[len(levels) :]
        layer_index = clip_layer(layer[0], codes.shape[0])
        first_tile = jax.lax.axis_index("block") * steps
        table_s[...] = mosaic.load(table, 4)
        if nested:
            quant_map_s[0][...] = mosaic.load(levels[2].at[layer_index], 2)

        def fetch(step: Any) -> tuple[jax.Array, jax.Array]:
            """Loads a tile's codes as words, and the undecoded scale of each word."""
            start = (first_tile + step) * (tile // 2)
            raw = mosaic.load(codes.at[layer_index, pl.ds(start, tile // 2)], 4)
            word = (first_tile + step) * (tile // 8) + mosaic.iota((tile // 8,), 0)
            # 8-bit scales stay indices into the table until it is their tile's turn.
            scale_dtype = jnp.int32 if nested else jnp.float32
            # Eight words hold the 64 weights that share a scale.
            scale = gather(absmax.at[layer_index], word >> 3, scale_dtype)
            return mosaic.as_words(raw, interpret=interpreted), scale

        def step(i: Any, fetched: tuple[jax.Array, jax.Array]) -> Any:
            # Past the end the last tile is fetched again, and not used.
            following = fetch(jnp.minimum(i + 1, steps - 1))
            word, scale = fetched
            if nested:
                # A tile never straddles two groups: both are powers of two.
                group = (first_tile + i) * (tile // BLOCK) // 256
                scale = _dequantize_absmax(
                    gather(quant_map_s[0], scale, jnp.float32),
                    levels[0][layer_index, group],
                    levels[1][layer_index],
                )
            values = []
            for k in range(8):
                # Byte k // 2 of a little-endian word, the high nibble first.
                shift = 8 * (k // 2) + (0 if k % 2 else 4)
                code = (word >> shift) & 0xF
                value = gather(table_s, code, jnp.float32, copies=LANES)
                values.append(value * scale)
            weights = mosaic.interleave(values, interpret=interpreted)
            # An assignment would make the threads wait for each other, twice a tile.
            mosaic.store(
                out.at[pl.ds((first_tile + i) * tile, tile)],
                weights.astype(out.dtype),
                mosaic.strided((tile,), 8),
                interpret=interpreted,
            )
            return following

        # The carry is the next tile, on its way from memory while this one is decoded.
        jax.lax.fori_loop(0, steps, step, fetch(0))

    scratch = [plgpu.SMEM((16 * LANES,), jnp.float32)]
    if nested:
        scratch.append(plgpu.SMEM((256,), jnp.float32))
    run = kernel(
        nf4_dequantize,
        jax.ShapeDtypeStruct((size,), dtype),
        scratch,
        grid={"block": tiles // steps},
        interpret=interpret,
    )
    # Copies are neighbours, so copy i of every entry is in bank i.
    table = np.repeat(NF4_CODE, LANES)
    return run(*operands(packed, size // 2), table).reshape(shape)


class Split(NamedTuple):
    """How the sums of a product are divided."""

    groups: int
    """Warpgroups of a block of threads; each sums over its share of in_features."""
    parts: int
    """Blocks of threads that share the sums of the same 64 out_features."""
    chunk: int
    """Blocks of 64 weights whose codes a thread loads at once."""


def split_for(
    shape: tuple[int, int], rows: int, *, max_groups: int = 8
) -> Split | None:
    """Divides the sums of a product; None if the kernel cannot compute the shape.

    Enough warps to keep the memory busy (at least 16 for each multiprocessor, where the
    weight is large enough), few enough registers to let them run.

    Args:
      shape: (O, I).
      rows: of x.
      max_groups: warpgroups of a block of threads at most.
    """
    out_features, in_features = shape
    blocks = in_features // BLOCK
    if out_features % ROWS or in_features % BLOCK or rows > MAX_ROWS:
        return None
    # Eight warpgroups are 1,024 threads of 64 registers; more rows have more sums.
    max_groups = min(max_groups, 8 if rows <= 16 else 4)
    limit = _shared_limit(rows)
    for groups in (8, 4, 2, 1):
        # A tile has 64 scales for each block of in_features, spread over 128 threads:
        # each warpgroup needs an even number of blocks.
        if groups > max_groups or blocks % (2 * groups):
            continue
        tiles, parts = out_features // ROWS, 1
        # Four warpgroups, 16 warps, for each multiprocessor.
        while blocks % (4 * groups * parts) == 0 and (
            (tiles * parts * groups < 4 * MULTIPROCESSORS and parts < 16)
            or _shared_bytes(blocks, rows, groups, parts) > limit
        ):
            parts *= 2
        if _shared_bytes(blocks, rows, groups, parts) > limit:
            continue
        blocks_per_group = blocks // groups // parts
        # What fits in the registers of a thread, 64 of 1,024 threads or 128 of 512;
        # ptxas spills if one more block's codes and inputs are loaded.
        chunk = 2 if rows <= 32 and blocks_per_group % 2 == 0 else 1
        return Split(groups, parts, chunk)
    return None


def _shared_bytes(blocks: int, rows: int, groups: int, parts: int) -> int:
    """Returns the shared memory of a block of threads of `matmul`."""
    # In 4-byte words: the pairs, 32 copies; the table of 8-bit scales and the scales of
    # each warpgroup; and the sums, of x padded to multiples of 8 rows.
    table, quant_maps = 256 * LANES, groups * 256
    scales, sums = ROWS * blocks // parts, groups * ROWS * -(-rows // 8) * 8
    return 4 * (table + quant_maps + scales + sums)


def _shared_limit(rows: int) -> int:
    # What every device since Ampere has, and for many rows what the data-center ones
    # have (CUDA C++ Programming Guide).
    return 99 * 1024 if rows <= 32 else 163 * 1024


def candidates(kind: str, shape: tuple[int, int], rows: int = 0) -> list[dict]:
    """Lists the settings to measure for a shape.

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
        and _shared_bytes(blocks, rows, groups, parts) <= _shared_limit(rows)
    ]


def matmul(
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
      x: [M, I], bfloat16 or float16, M up to `MAX_ROWS`.
      packed: the stack.
      shape: (O, I).
      split: how the sums are divided; default `split_for`.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      float32 [M, O].

    Raises:
      ValueError: a split that does not divide the weight.
    """
    out_features, in_features = shape
    count = x.shape[0]
    if split is None:
        # The interpreter needs a CPU thread for each warpgroup, or waits for ever.
        split = split_for(shape, count, max_groups=2 if interpret else 8)
    assert split is not None
    x = jnp.pad(x, ((0, -count % 8), (0, 0)))
    rows = x.shape[0]
    groups, parts, chunk = split
    blocks = in_features // BLOCK
    blocks_per_group = blocks // groups // parts
    if (
        blocks_per_group * groups * parts != blocks
        or blocks_per_group % chunk
        or blocks_per_group % 2
    ):
        raise ValueError(
            f"`matmul`: {split} does not divide the {blocks} blocks of 64 weights of "
            f"in_features={in_features} into even shares of whole chunks; `split_for` "
            "gives one that does."
        )
    nested = packed.nested is not None
    interpreted = bool(interpret)

    def nf4_matmul(x: Any, layer: Any, codes: Any, absmax: Any, *refs: Any) -> None:
        levels: Any = refs[:3] if nested else ()
        refs = refs[len(levels) :]
        table, out, table_s, scales_s, sums_s, ready, done, *quant_map_s = refs
        layer_index = clip_layer(layer[0], codes.shape[0])
        tile = jax.lax.axis_index("tile")
        part = jax.lax.axis_index("part")
        group = jax.lax.axis_index("group")
        # In blocks of 64 weights, along in_features.
        first_block = (part * groups + group) * blocks_per_group

        def codes_of(block: Any, count: int) -> Any:
            columns = pl.ds(block * (BLOCK // 2), count * (BLOCK // 2))
            return codes.at[layer_index, pl.ds(tile * ROWS, ROWS), columns]

        # The bytes are on their way to L2 while table and scales are prepared.
        mosaic.prefetch(codes_of(first_block, blocks_per_group), interpret=interpreted)
        # Each warpgroup copies its share of the table.
        share = table_s.shape[0] // groups
        entries = pl.ds(group * share, share)
        table_s[entries] = mosaic.load(table.at[entries], 4)
        if nested:
            quant_map_s[0][group] = mosaic.load(levels[2].at[layer_index], 2)
        scales_shape = (ROWS, blocks_per_group)
        index = (tile * ROWS + mosaic.iota(scales_shape, 0)) * blocks
        index = index + (first_block + mosaic.iota(scales_shape, 1))
        scales_s[group] = block_scales(
            absmax,
            levels,
            quant_map_s[0].at[group] if nested else None,
            layer_index,
            index,
            interpret=interpreted,
        )
        # Table and scales are complete when every warpgroup has written its share.
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)

        def step(i: Any, sums: jax.Array) -> jax.Array:
            block = first_block + i * chunk
            return mosaic.coded_product(
                sums,
                codes_of(block, chunk),
                x.at[:, pl.ds(block * BLOCK, chunk * BLOCK)],
                scales_s.at[group, :, pl.ds(i * chunk, chunk)],
                table_s,
                interpret=interpreted,
            )

        # Sums stay in registers from the first block to the last.
        layout = mosaic.accumulator(rows)
        sums = plgpu.layout_cast(jnp.zeros((ROWS, rows), jnp.float32), layout)
        sums = jax.lax.fori_loop(0, blocks_per_group // chunk, step, sums)
        mosaic.store(sums_s.at[group], sums, layout, interpret=interpreted)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(group == 0)
        def _() -> None:
            # In a fixed order, unlike atomic additions: every run has the same bits.
            total = mosaic.load(sums_s.at[0], 4)
            for other in range(1, groups):
                total = total + mosaic.load(sums_s.at[other], 4)
            out[part, pl.ds(tile * ROWS, ROWS)] = total

    scratch = [
        plgpu.SMEM((256 * LANES,), jnp.int32),
        plgpu.SMEM((groups, ROWS, blocks_per_group), jnp.float32),
        plgpu.SMEM((groups, ROWS, rows), jnp.float32),
        plgpu.Barrier(num_arrivals=groups),
        plgpu.Barrier(num_arrivals=groups),
    ]
    if nested:
        scratch.append(plgpu.SMEM((groups, 256), jnp.float32))
    run = kernel(
        nf4_matmul,
        jax.ShapeDtypeStruct((parts, out_features, rows), jnp.float32),
        scratch,
        grid={"tile": out_features // ROWS, "part": parts},
        groups=groups,
        interpret=interpret,
    )
    table = np.repeat(pair_table(jnp.dtype(x.dtype).name), LANES)
    sums = run(x, *operands(packed, out_features, in_features // 2), table)
    # [parts, O, rows] -> [M, O]
    return sums.sum(axis=0)[:, :count].T


# --- What the kernels share, those of `wgmma` too ---


def operands(packed: Packed, *codes_shape: int) -> list[Any]:
    """Lists the arrays of a stack as a kernel takes them.

    Layer [1], codes [L, *codes_shape], absmax [L, N/64]; under double quantization
    also scales [L, ceil(N/16384)], offset [L] and table [L, 256].
    """
    layers = packed.codes.shape[0]
    codes = packed.codes.reshape(layers, *codes_shape)
    arrays = [packed.layer, codes, packed.absmax.reshape(layers, -1)]
    if packed.nested is not None:
        scales, offset, table = packed.nested
        arrays += [scales, offset.reshape(layers), table]
    return arrays


def kernel(
    body: Any,
    out: Any,
    scratch: list[Any],
    *,
    grid: dict[str, int],
    interpret: Any,
    groups: int | None = None,
) -> Any:
    """Makes a kernel that stores `out`, on a grid of blocks of `groups` warpgroups."""
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    if groups is not None:
        settings |= {"num_threads": groups, "thread_name": "group"}
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


def clip_layer(layer: Any, layers: int) -> Any:
    """Returns the layer, or the nearest that exists.

    Called in a kernel: outside, another kernel would run to clip one number.
    """
    return jnp.minimum(jnp.maximum(layer, 0), layers - 1)


def block_scales(
    absmax: Any,
    levels: tuple[Any, ...],
    quant_map: Any,
    layer_index: Any,
    index: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Reads block scales within a kernel, and decodes those of 8 bits.

    Args:
      absmax: [L, N/64] in global memory.
      levels: scales, offset and table of double quantization, in global memory; or ().
      quant_map: float32 [256] in shared memory, the layer's table, with `levels`.
      layer_index: the layer.
      index: int32, which of the layer's blocks; in the layout `mosaic.strided`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      float32 scales, in the shape and layout of `index`.
    """
    gather = functools.partial(mosaic.gather, interpret=interpret)
    if not levels:
        return gather(absmax.at[layer_index], index, jnp.float32)
    scales, offset, _ = levels
    code = gather(absmax.at[layer_index], index, jnp.int32)
    value = gather(quant_map, code, jnp.float32)
    # 256 blocks share a scale of the second level.
    scale = gather(scales.at[layer_index], index >> 8, jnp.float32)
    return _dequantize_absmax(value, scale, offset[layer_index])


def _dequantize_absmax(value: jax.Array, scale: Any, offset: Any) -> jax.Array:
    # As in `reference.dequantize_absmax`: a maximum that changes nothing finite keeps
    # product and sum from being contracted into one rounding.
    lowest = float(np.finfo(np.float32).min)
    return jnp.maximum(value * scale, lowest) + offset


@functools.cache
def pair_table(dtype: str) -> np.ndarray:
    """Returns the two values of each byte as int32, the first in the low 16 bits."""
    # The 16 values are rounded here, once; scales multiply float32 sums and never are.
    values = NF4_CODE.astype(jnp.dtype(dtype)).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return (values[byte >> 4] | values[byte & 0xF] << 16).view(np.int32)
