"""What Mosaic GPU lacks for table-coded weights: a few small operations on registers.

A Pallas array is spread over the threads of a warpgroup. Mosaic's array operations
cover everything a dequantization does but these: reading four bytes as one word,
looking values up in shared memory, interleaving arrays within a thread, multiplying a
coded tile on the tensor cores or decoding it as their operand, and storing without a
barrier.

Each is an `inline_mgpu` function of a few instructions, and has next to it what it
means on ordinary arrays, which is what the interpreter runs (it cannot run inline
code): the rest of a kernel, its indexing, its loops and its synchronization, is the
same program in both. tests/compile executes the inline code.

Uses the internals of `jax.experimental.mosaic` that `inline_mgpu` exposes; checked with
jax 0.11.2 and 0.12.0; 0.10 cannot interpret them. Imported only when a kernel is used.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import inline
from pallas_kernels.inline import LANES, WARPGROUP

ROWS = 64
"""Rows of a coded tile: four warps of 16."""
BLOCK = 64
"""Weights of a row that share a scale."""
COLUMN = ROWS + 4
"""Distance of the columns of sums in shared memory: 4 more than rows, so that the lanes
of a warp, which hold 8 rows of 4 pairs of columns, write to 32 different banks."""
PAIR_COPIES = 16
"""Copies of each pair of 8 bytes, which half a warp reads at once."""


# --- Layouts ---


def strided(shape: tuple[int, ...], each: int = 1) -> Any:
    """Returns the layout in which a thread holds `each` row-major neighbours."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=each)


def operand(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Returns shared memory for matrices [..., rows, columns] that wgmma reads.

    Tiles of 8 rows by 128 bytes, swizzled, as the bulk copies write them.
    """
    # The 128-byte swizzle XORs the number of a 16-byte unit with its row in the tile:
    # the same unit of 8 rows falls into 8 different groups of banks.
    row_bytes = 128
    # In jax 0.12 both classes inherit from a protocol whose methods have no body, so
    # that a type checker takes them for abstract; they can be instantiated.
    classes: Any = plgpu
    tiling = classes.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize))
    transforms = (tiling, classes.SwizzleTransform(row_bytes))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulator(rows: int) -> Any:
    """Returns the layout of the sums [64, rows] of a coded tile."""
    # Tiled, [64, rows] is [1, rows / 8, 4 warps, 1, 2, 1, 8 rows, 4 threads, 2]: the
    # accumulator of mma.m16n8k16, tile by tile of 8 columns. Axis -5 (rows r and r + 8)
    # and the tiles are different registers of a thread.
    tiling = plgpu.Tiling(((ROWS, 8), (16, 8), (8, 8), (2,)))
    layout = mgpu.TiledLayout(
        tiling,
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
        _check_canonical=False,
    )
    layout = layout.canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    )


# --- Loads, lookups and stores ---


def load(ref: Any, each: int) -> jax.Array:
    """Loads an array, `each` neighbouring elements a thread and access."""
    return plgpu.layout_cast(ref[...], strided(ref.shape, each))


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Counts along an axis, int32 in the layout `strided(shape)`."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=strided(shape))


def as_words(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Reads each four bytes as one little-endian int32.

    Args:
      x: uint8 [4 n] in the layout `strided((4 n,), 4)`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      int32 [n] in the layout `strided((n,))`.
    """
    size = x.shape[0] // 4
    if interpret:
        return jax.lax.bitcast_convert_type(x.reshape(size, 4), jnp.int32)
    layout = strided((size,))

    @inline.function(
        arg_types=(strided((4 * size,), 4),),
        return_type=inline.result_type((size,), jnp.int32, layout),
    )
    def words(ctx: Any, x: Any) -> Any:
        del ctx
        # A change of type only: four bytes are in one 32-bit register already.
        word = ir.VectorType.get((1,), inline.i32())
        return inline.map_registers(
            lambda register: vector.bitcast(word, register),
            x,
            layout=layout,
            signed=True,
        )

    return words(x)


def gather(
    ref: Any, index: jax.Array, dtype: DTypeLike, *, interpret: bool, copies: int = 1
) -> jax.Array:
    """Looks up `ref[index]`, one element a thread and access.

    Args:
      ref: vector in shared or global memory. With `copies`, every value is repeated
        that many times, and each thread reads the copy of its lane: 32 copies of 4
        bytes put lane i on bank i, so no two lanes ever wait for each other.
      index: int32 of any shape, in the layout `strided(shape)`.
      dtype: of the result: that of `ref`, or int32 for a `ref` of uint8.
      interpret: whether the interpreter runs the kernel.
      copies: of each value in `ref`, 1 or 32.

    Returns:
      The values, in the shape and layout of `index`.
    """
    if interpret:
        return ref[...].reshape(-1, copies)[:, 0][index].astype(dtype)
    layout = strided(index.shape)

    @inline.function(
        arg_types=(plgpu.RefType(), layout),
        return_type=inline.result_type(index.shape, dtype, layout),
    )
    def look_up(ctx: Any, ref: Any, index: Any) -> Any:
        del ctx
        lookup = inline.lane_lookup(ref) if copies > 1 else None

        def element(register: Any) -> Any:
            position = inline.first_element(register)
            if lookup is not None:
                value = lookup(position)
            else:
                value = memref.load(ref, [inline.as_index(position)])
            if value.type == ir.IntegerType.get_signless(8):
                # Codes are unsigned: 128 to 255 must not become negative.
                value = arith.extui(inline.i32(), value)
            return vector.broadcast(ir.VectorType.get((1,), value.type), value)

        signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return inline.map_registers(element, index, layout=layout, signed=signed)

    return look_up(ref, index)


def interleave(parts: list[jax.Array], *, interpret: bool) -> jax.Array:
    """Interleaves arrays: element i of part j becomes element `i * k + j`.

    Costs nothing: the k values of a thread stay in its registers, as one vector.

    Args:
      parts: k float32 arrays [n] in the layout `strided((n,))`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      float32 [n k] in the layout `strided((n k,), k)`.
    """
    if interpret:
        return jnp.stack(parts, axis=-1).reshape(-1)
    count, (size,) = len(parts), parts[0].shape
    layout = strided((count * size,), count)

    @inline.function(
        arg_types=tuple(strided((size,)) for _ in parts),
        return_type=inline.result_type((count * size,), jnp.float32, layout),
    )
    def vectors(ctx: Any, *parts: Any) -> Any:
        del ctx
        return inline.map_registers(
            lambda *registers: inline.pack(
                [inline.first_element(r) for r in registers]
            ),
            *parts,
            layout=layout,
            signed=None,
        )

    return vectors(*parts)


def prefetch(ref: Any, *, interpret: bool) -> None:
    """Starts to bring the rows of an array from global memory to L2.

    Args:
      ref: [rows, ...], all but the first axis contiguous; or one row.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        return
    axes = len(ref.shape)
    rows, *rest = ref.shape if axes > 1 else (1, *ref.shape)
    line = 128 // jnp.dtype(ref.dtype).itemsize
    lines = -(-math.prod(rest) // line)

    @inline.function(arg_types=(plgpu.RefType(),))
    def start(ctx: Any, ref: Any) -> None:
        del ctx
        thread = arith.remui(mgpu.utils.thread_idx(), inline.const(WARPGROUP))
        last = inline.const(rows * lines - 1)
        for first in range(0, rows * lines, WARPGROUP):
            # Threads past the end request the last line again, rather than one outside.
            number = arith.minui(arith.addi(thread, inline.const(first)), last)
            row = arith.divui(number, inline.const(lines))
            column = arith.remui(number, inline.const(lines))
            column = arith.muli(column, inline.const(line))
            place = [row, *[inline.const(0)] * (len(rest) - 1), column]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [inline.pointer(ref, *place[-axes:])],
                "prefetch.global.L2 [$0];",
                "l",
                has_side_effects=True,
            )

    start(ref)


def store(ref: Any, x: jax.Array, layout: Any, *, interpret: bool) -> None:
    """Stores an array in any layout, without a barrier.

    An assignment would put a barrier before and one after, and would refuse layouts
    whose stores meet bank conflicts, which do not matter for a few sums. In shared
    memory the values are ready when the next barrier is passed.

    Args:
      ref: in shared or global memory, of the shape of `x`.
      x: array.
      layout: that of `x`.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        ref[...] = x
        return

    @inline.function(arg_types=(plgpu.RefType(), layout))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        x.store_untiled(ref, optimized=False)

    write(ref, x)


def store_columns(ref: Any, x: jax.Array, *, interpret: bool) -> None:
    """Stores sums in shared memory column by column, without a barrier.

    Args:
      ref: float32 [>= M `COLUMN`] in shared memory: row r of column m comes at
        m `COLUMN` + r.
      x: float32 [64, M] in the layout `accumulator(M)`.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        columns = jnp.pad(x.T, ((0, 0), (0, COLUMN - ROWS)))
        ref[pl.ds(0, columns.size)] = columns.reshape(-1)
        return

    @inline.function(arg_types=(plgpu.RefType(), accumulator(x.shape[1])))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        rows, quad = inline.fragment()
        column = arith.muli(quad, inline.const(2 * COLUMN))
        for tile, registers in enumerate(inline.fragment_registers(x)):
            for row, register in zip(rows, registers, strict=True):
                start = arith.addi(row, column)
                for i, value in enumerate(inline.elements(register)):
                    offset = inline.const((8 * tile + i) * COLUMN)
                    index = inline.as_index(arith.addi(start, offset))
                    memref.store(value, ref, [index])

    write(ref, x)


def store_rows(ref: Any, x: jax.Array, *, interpret: bool) -> None:
    """Stores a matrix by rows, without a barrier; a surplus of `x` is left out.

    Args:
      ref: [M, n] in global memory.
      x: float32 [N] with N >= M n, in the layout `strided((N,))`; rounded to the dtype
        of `ref`.
      interpret: whether the interpreter runs the kernel.
    """
    count, width = ref.shape
    if interpret:
        rows = x.reshape(-1)[: count * width].reshape(count, width)
        ref[...] = rows.astype(ref.dtype)
        return
    dtype = jnp.dtype(ref.dtype)

    @inline.function(arg_types=(plgpu.RefType(), strided(x.shape)))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        thread = arith.remui(mgpu.utils.thread_idx(), inline.const(WARPGROUP))
        for i, register in enumerate(x.registers.reshape(-1)):
            number = arith.addi(thread, inline.const(WARPGROUP * i))
            row = arith.divui(number, inline.const(width))
            column = arith.remui(number, inline.const(width))
            value = inline.first_element(register)
            is_row = arith.cmpi(arith.CmpIPredicate.ult, row, inline.const(count))
            inline.store_if(is_row, inline.pointer(ref, row, column), value, dtype)

    write(ref, x)


def store_transposed(ref: Any, x: jax.Array, *, interpret: bool) -> None:
    """Stores the accumulator of `wgmma` as its transpose, without a barrier.

    Each access of a warp covers 8 neighbouring elements in 4 rows: in 32 bits, whole
    sectors of memory.

    Args:
      ref: [n, 64] in global memory.
      x: float32 [64, n] in the layout `plgpu.Layout.WGMMA`; rounded to the dtype of
        `ref`.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        ref[...] = x.T.astype(ref.dtype)
        return
    dtype = jnp.dtype(ref.dtype)

    @inline.function(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        rows, quad = inline.fragment()
        column = arith.muli(quad, inline.const(2))
        kind = mgpu.utils.dtype_to_ir_type(dtype)
        for tile, registers in enumerate(inline.fragment_registers(x)):
            for row, register in zip(rows, registers, strict=True):
                for i, value in enumerate(inline.elements(register)):
                    if dtype.itemsize == 2:
                        value = arith.truncf(kind, value)
                    # The sums are [out_features, M], the result [M, out_features].
                    out_row = arith.addi(column, inline.const(8 * tile + i))
                    target = inline.pointer(ref, out_row, row)
                    llvm.store(value, target, alignment=dtype.itemsize)

    write(ref, x)


# --- Coded tiles on the tensor cores ---


def coded_product(
    sums: jax.Array,
    codes: Any,
    x: Any,
    scales: Any,
    table: Any,
    *,
    interpret: bool,
) -> jax.Array:
    """Adds `(table[codes] * scales) @ x.T` for a tile of 64 rows of the weight.

    Every byte of codes is looked up as the pair of values it codes, which is one
    register of the left operand of `mma.m16n8k16`. The tensor core sums over a block of
    64 weights, whose sum is then scaled once, in float32: the scale is never rounded,
    the table's values are (to the dtype of `x`).

    The order of the terms of a sum is free as long as both operands agree on it, and
    is chosen so that a thread reads 8 neighbouring bytes of codes and 16 neighbouring
    values of x. Within a block, thread q of the four that share a row holds weights
    16 q to 16 q + 15; step s of four takes 16 q + 4 s + (0, 1) as the operand's columns
    2 q and 2 q + 1, and 16 q + 4 s + (2, 3) as its columns 2 q + 8 and 2 q + 9.

    With three axes, the four warps share 16 rows of the weight: each takes its own
    blocks of them, and "row" 16 w + r of the tile is warp w's part of row r.

    Args:
      sums: float32 [64, M'] in the layout `accumulator(M')`.
      codes: uint8 [64, 32 n] in global memory: n blocks of 64 rows; or [16, 4, 32 n],
        n blocks of 16 rows for each warp.
      x: bfloat16 or float16 [M, 64 n] in global memory, or [M, 4, 64 n]. M' is M
        rounded up to a multiple of 8; the sums of the surplus columns are those of the
        last row.
      scales: float32 [64, n] in shared memory, one a row and block.
      table: int32 [256 * 32] in shared memory: the pair for each byte, the first
        value in the low half; 32 copies of each.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The sums, in the same layout.
    """
    rows, blocks = sums.shape[1], x.shape[-1] // BLOCK
    by_warp = len(x.shape) == 3
    count = x.shape[0]
    if interpret:
        # All copies of an entry are equal.
        pairs = table[...].reshape(-1, LANES)[:, 0][codes[...].astype(jnp.int32)]
        weight = jax.lax.bitcast_convert_type(pairs, x.dtype).astype(jnp.float32)
        # [rows, warps, blocks, 64], with one "warp" where they do not share rows.
        weight = weight.reshape(codes.shape[0], -1, blocks, BLOCK)
        inputs = x[...][jnp.minimum(jnp.arange(rows), count - 1)]
        inputs = inputs.reshape(rows, -1, blocks, BLOCK).astype(jnp.float32)
        # [blocks, 64, M]: a sum for each block, scaled afterwards, as on the device.
        parts = jnp.einsum("rwbk,mwbk->bwrm", weight, inputs)
        parts = parts.reshape(blocks, ROWS, rows)
        return sums + (parts * scales[...].T[:, :, None]).sum(axis=0)
    layout = accumulator(rows)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(x.dtype).name]

    @inline.function(
        arg_types=(layout, *(plgpu.RefType(),) * 4),
        return_type=inline.result_type(sums.shape, jnp.float32, layout),
    )
    def product(
        ctx: Any, sums: Any, codes: Any, x: Any, scales: Any, table: Any
    ) -> Any:
        del ctx
        tile_rows, quad = inline.fragment()
        # Row of x: the column of the right operand that a thread holds.
        x_row = arith.divui(inline.lane(), inline.const(4))
        warp = [inline.warp()] if by_warp else []
        code_rows = [x_row, arith.addi(x_row, inline.const(8))]

        def load_codes(row: Any, block: int) -> list[Any]:
            column = arith.muli(quad, inline.const(8))
            column = arith.addi(column, inline.const(32 * block))
            return inline.load_words(codes, row, *warp, column, count=2)

        # 16 values are 32 bytes, two accesses of the largest size.
        def load_inputs(tile: int, block: int) -> list[Any]:
            column = arith.muli(quad, inline.const(16))
            column = arith.addi(column, inline.const(64 * block))
            row = arith.addi(x_row, inline.const(8 * tile))
            if rows != count and tile == rows // 8 - 1:
                row = arith.minui(row, inline.const(count - 1))
            return [
                word
                for half in range(2)
                for word in inline.load_words(
                    x,
                    row,
                    *warp,
                    arith.addi(column, inline.const(8 * half)),
                    count=4,
                )
            ]

        # All loads from global memory start before anything waits for one.
        words = [
            [load_codes(row, b) for row in (code_rows if by_warp else tile_rows)]
            for b in range(blocks)
        ]
        lookup = inline.lane_lookup(table)
        # [tile of 8 rows of x][upper or lower row of the weight][2 columns]
        out = [
            [inline.elements(register) for register in registers]
            for registers in inline.fragment_registers(sums)
        ]
        for block, block_words in enumerate(words):
            # Step s reads bytes 2 s and 2 s + 1 of the 8 that a thread holds of a row.
            # In the order a0 to a3 of the instruction: the upper and the lower row of
            # columns 2 q, 2 q + 1, then of columns 2 q + 8, 2 q + 9.
            left = [
                [
                    lookup(inline.byte_of(row_words[step // 2], 2 * (step % 2) + half))
                    for half in range(2)
                    for row_words in block_words
                ]
                for step in range(4)
            ]
            block_index = inline.as_index(inline.const(block))
            scale = [
                memref.load(scales, [inline.as_index(row), block_index])
                for row in tile_rows
            ]
            for tile in range(rows // 8):
                right = load_inputs(tile, block)
                # From zero for each block, whose scale multiplies its own sum alone.
                part = [inline.zero()] * 4
                for step in range(4):
                    step_inputs = right[2 * step : 2 * step + 2]
                    part = inline.mma(kind, part, left[step], step_inputs)
                for half in range(2):
                    # c0 and c1 are of the upper row, c2 and c3 of the lower, which has
                    # its own scale.
                    out[tile][half] = [
                        inline.fma(part[2 * half + i], scale[half], out[tile][half][i])
                        for i in range(2)
                    ]
        registers = [inline.pack(elements) for pair in out for elements in pair]
        return inline.array_of(registers, sums.registers.shape, layout)

    return product(sums, codes, x, scales, table)


def operand_order(x: jax.Array) -> jax.Array:
    """Puts in_features in the order of a `decoded` tile, for either operand.

    Within a block, column 16 s + 8 h + 2 q + e is weight 16 q + 4 s + 2 h + e: thread q
    of the four that share a row holds 8 neighbouring bytes of it. As a transposition,
    which XLA fuses with what computes `x`.

    Args:
      x: [M, 64 n].

    Returns:
      `x` with its columns rearranged.
    """
    rows, width = x.shape
    # [M, n, q, s, h, e] -> [M, n, s, h, q, e].
    x = x.reshape(rows, width // BLOCK, 4, 4, 2, 2)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(rows, width)


def decoded(
    codes: Any, scales: Any, table: Any, dtype: DTypeLike, *, interpret: bool
) -> jax.Array:
    """Decodes a tile of 64 rows and one block as the left operand of `wgmma`.

    Every byte of codes is looked up as the pair of values it codes, multiplied with the
    scale of its row and rounded once. The columns come in `operand_order`, which the
    right operand has to follow.

    Args:
      codes: uint8 [64, 32] in shared memory.
      scales: float32 [64] in shared memory, the rows' scales of this block.
      table: float32 [256 * 16 * 2] in shared memory: the pair for each byte, 16 copies
        of each.
      dtype: of the result, bfloat16 or float16.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The weights [64, 64] in the layout `plgpu.Layout.WGMMA`.
    """
    if interpret:
        pairs = table[...].reshape(256, PAIR_COPIES, 2)[:, 0]
        weight = pairs[codes[...].astype(jnp.int32)].reshape(ROWS, BLOCK)
        return operand_order((weight * scales[...][:, None]).astype(dtype))
    layout = plgpu.Layout.WGMMA

    @inline.function(
        arg_types=(plgpu.RefType(),) * 3,
        return_type=inline.result_type((ROWS, BLOCK), dtype, layout),
    )
    def decode(ctx: Any, codes: Any, scales: Any, table: Any) -> Any:
        del ctx
        rows, quad = inline.fragment()
        column = arith.muli(quad, inline.const(8))
        words = [
            inline.load_words(codes, r, column, count=2, shared=True) for r in rows
        ]
        scale = [memref.load(scales, [inline.as_index(r)]) for r in rows]
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        lookup = inline.lane_lookup(table, pair)
        kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        registers = []
        # In the layout's order: 8 tiles of 8 columns, each with an upper and a lower
        # row. Byte b of a thread is its pair of columns in tile b.
        for byte in range(8):
            for half in range(2):
                code = inline.byte_of(words[half][byte // 4], byte % 4)
                values = inline.elements(lookup(code))
                # One float32 product, rounded once: the bits of `reference.dequantize`.
                scaled = inline.pack([arith.mulf(v, scale[half]) for v in values])
                registers.append(arith.truncf(kind, scaled))
        # An array of zeros of the same layout has the shape in which it keeps them.
        like = mgpu.FragmentedArray.splat(
            arith.constant(kind.element_type, 0.0), (ROWS, BLOCK), layout.to_mgpu()
        )
        return inline.array_of(registers, like.registers.shape, layout)

    return decode(codes, scales, table)
