"""What Mosaic GPU lacks for table-coded weights: a few small operations on registers.

Pallas arrays live spread over the threads of a warpgroup. Mosaic's array operations
cover everything a dequantization does but these: reading four bytes as one word,
looking values up in shared memory, putting arrays side by side within a thread,
multiplying a coded tile on the tensor cores or decoding it as an operand of theirs, and
storing without a barrier. Each is an `inline_mgpu` function of a few instructions, and
beside it stands what it means on ordinary arrays, which is what the interpreter runs
(it cannot run inline code): the rest of a kernel, its indexing, its loops and its
synchronization, is the same program in both.

Uses the internals of `jax.experimental.mosaic` that `inline_mgpu` hands out; checked
with jax 0.11.2 and 0.12.0; 0.10 cannot interpret them. Imported only when a kernel is
asked for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
PAIR_COPIES = 16
"""Of pairs of 8 bytes, which half a warp reads at once."""


def strided(shape: tuple[int, ...], each: int = 1) -> Any:
    """The layout in which a thread holds `each` neighbours of the row-major order."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=each)


def operand(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory for matrices [..., rows, columns] that wgmma reads.

    They lie in tiles of 8 rows by 128 bytes, swizzled, as the copies write them.
    """
    across = 128
    # In jax 0.12 both classes inherit from a protocol whose methods have no body, so
    # that a type checker takes them for abstract; they can be made all the same.
    kinds: Any = plgpu
    tiling = kinds.TilingTransform((8, across // jnp.dtype(dtype).itemsize))
    transforms = (tiling, kinds.SwizzleTransform(across))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


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

    @inline.code(
        arg_types=(strided((4 * size,), 4),),
        return_type=inline.result((size,), jnp.int32, layout),
    )
    def words(ctx: Any, x: Any) -> Any:
        del ctx
        word = ir.VectorType.get((1,), inline.i32())
        return inline.array(x, layout, lambda r: vector.bitcast(word, r), signed=True)

    return words(x)


def gather(
    ref: Any, index: jax.Array, dtype: DTypeLike, *, interpret: bool, copies: int = 1
) -> jax.Array:
    """Looks up `ref[index]`, one element a thread and access.

    Args:
      ref: vector in shared or global memory. With `copies`, every value stands that
        many times in a row, and each thread reads the copy of its own lane: 32 copies
        of 4 bytes put lane i on bank i, so no two lanes ever wait for each other.
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

    @inline.code(
        arg_types=(plgpu.RefType(), layout),
        return_type=inline.result(index.shape, dtype, layout),
    )
    def look_up(ctx: Any, ref: Any, index: Any) -> Any:
        del ctx
        own = inline.own(ref) if copies > 1 else None

        def one(register: Any) -> Any:
            at = inline.first(register)
            if own is not None:
                value = own(at)
            else:
                value = memref.load(ref, [inline.as_index(at)])
            if value.type == ir.IntegerType.get_signless(8):
                value = arith.extui(inline.i32(), value)
            return vector.broadcast(ir.VectorType.get((1,), value.type), value)

        integer = jnp.issubdtype(dtype, jnp.integer)
        return inline.array(index, layout, one, signed=True if integer else None)

    return look_up(ref, index)


def interleave(parts: list[jax.Array], *, interpret: bool) -> jax.Array:
    """Puts arrays side by side: element i of part j becomes element `i * k + j`.

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

    @inline.code(
        arg_types=tuple(strided((size,)) for _ in parts),
        return_type=inline.result((count * size,), jnp.float32, layout),
    )
    def side_by_side(ctx: Any, *parts: Any) -> Any:
        del ctx

        def one(*registers: Any) -> Any:
            joined = llvm.mlir_undef(ir.VectorType.get((count,), ir.F32Type.get()))
            for j, register in enumerate(registers):
                joined = vector.insert(
                    inline.first(register),
                    joined,
                    dynamic_position=[],
                    static_position=[j],
                )
            return joined

        return inline.array(parts[0], layout, one, *parts[1:], signed=None)

    return side_by_side(*parts)


def prefetch(ref: Any, *, interpret: bool) -> None:
    """Asks for the rows of a matrix of bytes in global memory to be brought to L2.

    Args:
      ref: uint8 [rows, bytes].
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        return
    rows, width = ref.shape
    line = 128
    lines = -(-width // line)

    @inline.code(arg_types=(plgpu.RefType(),))
    def ask(ctx: Any, ref: Any) -> None:
        del ctx
        thread = arith.remui(mgpu.utils.thread_idx(), inline.const(WARPGROUP))
        for start in range(0, rows * lines, WARPGROUP):
            at = arith.minui(
                arith.addi(thread, inline.const(start)), inline.const(rows * lines - 1)
            )
            row, column = (
                arith.divui(at, inline.const(lines)),
                arith.remui(at, inline.const(lines)),
            )
            column = arith.muli(column, inline.const(line))
            pointer = inline.pointer(ref, row, column)
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [pointer],
                "prefetch.global.L2 [$0];",
                "l",
                has_side_effects=True,
            )

    ask(ref)


def accumulator(rows: int) -> Any:
    """The layout of the sums [64, rows] of a coded tile."""
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


def store(ref: Any, x: jax.Array, layout: Any, *, interpret: bool) -> None:
    """Stores an array in any layout, and waits for nobody.

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

    @inline.code(arg_types=(plgpu.RefType(), layout))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        x.store_untiled(ref, optimized=False)

    write(ref, x)


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

    Every byte of codes is looked up as the pair of values it stands for, which is one
    register of the left operand of `mma.m16n8k16`. The tensor core sums over a block of
    64 weights, whose sum is then scaled once, in float32: the scale is never rounded,
    the table's values are (to the dtype of `x`).

    The order of the terms of a sum is free as long as both operands agree on it, and
    is chosen so that a thread reads 8 neighbouring bytes of codes and 16 neighbouring
    values of x. Within a block, thread q of the four that share a row holds weights
    16 q to 16 q + 15; step s of four takes 16 q + 4 s + (0, 1) as the operand's columns
    2 q and 2 q + 1, and 16 q + 4 s + (2, 3) as its columns 2 q + 8 and 2 q + 9.

    Args:
      sums: float32 [64, M] in the layout `accumulator(M)`.
      codes: uint8 [64, 32 n] in global memory: n blocks of 64 rows.
      x: bfloat16 or float16 [M, 64 n] in global memory, M a multiple of 8.
      scales: float32 [64, n] in shared memory, one a row and block.
      table: int32 [256 * 32] in shared memory: the pair for each byte, the first
        value in the low half; 32 copies of each.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The sums, in the same layout.
    """
    rows, width = x.shape
    blocks = width // BLOCK
    if interpret:
        pairs = table[...].reshape(-1, LANES)[:, 0][codes[...].astype(jnp.int32)]
        weight = jax.lax.bitcast_convert_type(pairs, x.dtype)  # [64, 32 n, 2]
        weight = weight.reshape(ROWS, blocks, BLOCK).astype(jnp.float32)
        inputs = x[...].reshape(rows, blocks, BLOCK).astype(jnp.float32)
        parts = jnp.einsum("rbk,mbk->brm", weight, inputs)
        return sums + (parts * scales[...].T[:, :, None]).sum(axis=0)
    layout = accumulator(rows)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(x.dtype).name]

    @inline.code(
        arg_types=(layout, *(plgpu.RefType(),) * 4),
        return_type=inline.result(sums.shape, jnp.float32, layout),
    )
    def product(
        ctx: Any, sums: Any, codes: Any, x: Any, scales: Any, table: Any
    ) -> Any:
        del ctx
        (row, below), quad = inline.place()
        # Row of the left operand, column of the result.
        group = arith.divui(inline.lane(), inline.const(4))

        def bytes_at(row: Any, block: int) -> list[Any]:
            column = arith.addi(
                arith.muli(quad, inline.const(8)), inline.const(32 * block)
            )
            return inline.load_words(codes, row, column, 2)

        def inputs_at(tile: int, block: int) -> list[Any]:
            column = arith.addi(
                arith.muli(quad, inline.const(16)), inline.const(64 * block)
            )
            at = arith.addi(group, inline.const(8 * tile))
            return [
                *inline.load_words(x, at, column, 4),
                *inline.load_words(x, at, arith.addi(column, inline.const(8)), 4),
            ]

        # All that comes from far away is asked for before anything is waited for.
        held = [(bytes_at(row, b), bytes_at(below, b)) for b in range(blocks)]
        own = inline.own(table)
        tiles = rows // 8
        out = [
            [inline.elements(r) for r in pair] for pair in inline.pairs(sums.registers)
        ]
        for block, (upper, lower) in enumerate(held):
            left = []
            for step in range(4):
                shift = 16 * (step % 2)
                first = (upper[step // 2], lower[step // 2])
                left.append(
                    [
                        inline.pair(own, word, shift + 8 * half)
                        for half in range(2)
                        for word in first
                    ]
                )
            scale = [
                memref.load(
                    scales, [inline.as_index(r), inline.as_index(inline.const(block))]
                )
                for r in (row, below)
            ]
            for tile in range(tiles):
                right = inputs_at(tile, block)
                part = [inline.zero()] * 4
                for step in range(4):
                    part = inline.mma(
                        kind, part, left[step], right[2 * step : 2 * step + 2]
                    )
                for half in range(2):
                    out[tile][half] = [
                        inline.fma(part[2 * half + i], scale[half], out[tile][half][i])
                        for i in range(2)
                    ]
        flat = [inline.joined(elements) for pair in out for elements in pair]
        registers = np.empty(len(flat), object)
        registers[:] = flat
        return mgpu.FragmentedArray(
            _registers=registers.reshape(sums.registers.shape),
            _layout=layout.to_mgpu(),
            _is_signed=None,
        )

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
    x = x.reshape(rows, width // BLOCK, 4, 4, 2, 2)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(rows, width)


def decoded(
    codes: Any, scales: Any, table: Any, dtype: DTypeLike, *, interpret: bool
) -> jax.Array:
    """Decodes a tile of 64 rows and one block as the left operand of `wgmma`.

    Every byte of codes is looked up as the pair of values it stands for, multiplied
    with the scale of its row and rounded once. The columns come in `operand_order`,
    which the right operand has to follow.

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

    @inline.code(
        arg_types=(plgpu.RefType(),) * 3,
        return_type=inline.result((ROWS, BLOCK), dtype, layout),
    )
    def decode(ctx: Any, codes: Any, scales: Any, table: Any) -> Any:
        del ctx
        rows, quad = inline.place()
        column = arith.muli(quad, inline.const(8))
        words = [inline.load_words(codes, r, column, 2, shared=True) for r in rows]
        scale = [memref.load(scales, [inline.as_index(r)]) for r in rows]
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        own = inline.own(table, pair)
        kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        flat = []
        for byte in range(8):
            for half in range(2):
                found = inline.elements(
                    inline.pair(own, words[half][byte // 4], 8 * (byte % 4))
                )
                value = inline.joined([arith.mulf(v, scale[half]) for v in found])
                flat.append(arith.truncf(kind, value))
        registers = np.empty(len(flat), object)
        registers[:] = flat
        whole = mgpu.FragmentedArray.splat(
            arith.constant(kind.element_type, 0.0), (ROWS, BLOCK), layout.to_mgpu()
        )
        return mgpu.FragmentedArray(
            _registers=registers.reshape(whole.registers.shape),
            _layout=layout.to_mgpu(),
            _is_signed=None,
        )

    return decode(codes, scales, table)


def store_transposed(ref: Any, x: jax.Array, *, interpret: bool) -> None:
    """Stores the accumulator of `wgmma` as its transpose, and waits for nobody.

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
    name = jnp.dtype(ref.dtype)

    @inline.code(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        rows, quad = inline.place()
        column = arith.muli(quad, inline.const(2))
        kind = mgpu.utils.dtype_to_ir_type(name)
        for tile, pair in enumerate(inline.pairs(x.registers)):
            for half, register in enumerate(pair):
                for i, value in enumerate(inline.elements(register)):
                    if name.itemsize == 2:
                        value = arith.truncf(kind, value)
                    at = arith.addi(column, inline.const(8 * tile + i))
                    to = inline.pointer(ref, at, rows[half])
                    llvm.store(value, to, alignment=name.itemsize)

    write(ref, x)
