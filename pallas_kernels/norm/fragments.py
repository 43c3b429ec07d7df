"""Blocks of 16 rows spread over a warpgroup, and products of them with a narrow matrix.

Of a chunk [16, 128], each of the four warps holds 32 features. A thread holds 8
neighbouring features, 16 bytes of 16-bit numbers, in each of two rows; four threads
share a row. That is the accumulator of `mma.m16n8k16` with its columns in another
order: which feature is which column is free as long as the right operand agrees.

Written for and checked with jax 0.11.2 and 0.12.0; imported only when a kernel is used.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import inline, mosaic

ROWS = 16
"""Rows of a block: those of the tensor cores' `mma`."""
WARPS = 4
"""Of a warpgroup."""
STEP = 32
"""Features of a warp in a chunk: 8 for each of the four threads of a row."""
CHUNK = WARPS * STEP
"""Features of a chunk."""
_LOAD: Any = plgpu.load  # jax 0.10, which has no kernels, declares other arguments


def layout() -> Any:
    """Returns the layout of [16, n `CHUNK`]."""
    # Tiled, [16, 128 n] is [n, 4 warps, 2, 4 threads, 8 rows, 8]: the halves of the
    # rows are different registers of a thread.
    tiling = plgpu.Tiling(((ROWS, CHUNK), (ROWS, STEP), (8, 8)))
    tiled = mgpu.TiledLayout(
        tiling,
        warp_dims=(-5,),
        lane_dims=(-2, -3),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(
        tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim
    )


def load(ref: Any, *, interpret: bool) -> jax.Array:
    """Loads [16, n `CHUNK`] of 16-bit numbers from global memory, as float32."""
    if interpret:
        return ref[...].astype(jnp.float32)

    @inline.function(
        arg_types=(plgpu.RefType(),),
        return_type=inline.result_type(ref.shape, ref.dtype, layout()),
    )
    def read(ctx: Any, ref: Any) -> Any:
        del ctx
        rows, column = thread_place()
        return _array_of(
            [_read(ref, r, c) for c in _columns(column, ref) for r in rows], ref
        )

    return read(ref).astype(jnp.float32)


def load_row(ref: Any, *, interpret: bool) -> jax.Array:
    """Loads a float32 number for each feature, repeated for all rows of a block."""
    shape = (ROWS, *ref.shape)
    if interpret:
        return jnp.broadcast_to(ref[...], shape)

    @inline.function(
        arg_types=(plgpu.RefType(),),
        return_type=inline.result_type(shape, ref.dtype, layout()),
    )
    def read(ctx: Any, ref: Any) -> Any:
        del ctx
        values = [_read(ref, c) for c in _columns(thread_place()[1], ref)]
        # The same for both rows of a thread.
        return _array_of([value for value in values for _ in range(2)], ref)

    return read(ref)


def load_shared(ref: Any) -> jax.Array:
    """Loads what `mosaic.store` has stored in shared memory, as float32."""
    return _LOAD(ref, layout=layout(), optimized=False).astype(jnp.float32)


def load_column(ref: Any, *, interpret: bool) -> jax.Array:
    """Loads a float32 number for each row, [16], from global memory."""
    if interpret:
        return ref[...]
    rows_layout = layout().reduce((1,))

    @inline.function(
        arg_types=(plgpu.RefType(),),
        return_type=inline.result_type((ROWS,), jnp.float32, rows_layout),
    )
    def read(ctx: Any, ref: Any) -> Any:
        del ctx
        values = [
            llvm.load(ir.F32Type.get(), inline.pointer(ref, row), alignment=4)
            for row in thread_place()[0]
        ]
        shape = rows_layout.to_mgpu().registers_shape((ROWS,))
        return inline.array_of([inline.pack([v]) for v in values], shape, rows_layout)

    return read(ref)


def load_shared_column(ref: Any) -> jax.Array:
    """Loads a float32 number for each row, [16], from shared memory."""
    return _LOAD(ref, layout=layout().reduce((1,)), optimized=False)


def store(ref: Any, x: jax.Array, *, interpret: bool) -> None:
    """Stores [16, n `CHUNK`] of 16-bit numbers in global memory, without a barrier."""
    if interpret:
        ref[...] = x
        return

    @inline.function(arg_types=(plgpu.RefType(), layout()))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        rows, column = thread_place()
        places = [(r, c) for c in _columns(column, ref) for r in rows]
        for register, place in zip(x.registers.reshape(-1), places, strict=True):
            llvm.store(register, inline.pointer(ref, *place), alignment=16)

    write(ref, x)


def across(x: jax.Array, width: int) -> jax.Array:
    """Repeats a number for each row, [16], along the features."""
    wide = jax.lax.broadcast_in_dim(x, (ROWS, width), (0,))
    return plgpu.layout_cast(wide, layout())


def thread_place() -> tuple[list[Any], Any]:
    """Returns the two rows of a thread, and its first feature of a chunk."""
    row = arith.divui(inline.lane(), inline.const(4))
    quad = arith.remui(inline.lane(), inline.const(4))
    column = arith.muli(inline.warp(), inline.const(STEP))
    column = arith.addi(column, arith.muli(quad, inline.const(8)))
    return [row, arith.addi(row, inline.const(8))], column


def chunk_columns(column: Any, width: int) -> list[Any]:
    """Returns a thread's first features of all chunks of `width` features."""
    return [arith.addi(column, inline.const(c)) for c in range(0, width, CHUNK)]


def _columns(column: Any, ref: Any) -> list[Any]:
    return chunk_columns(column, ir.MemRefType(ref.type).shape[-1])


def _read(ref: Any, *indices: Any) -> Any:
    """Loads 8 numbers, 16 bytes at a time."""
    kind = ir.VectorType.get((8,), ir.MemRefType(ref.type).element_type)
    return llvm.load(kind, inline.pointer(ref, *indices), alignment=16)


def _array_of(registers: list[Any], ref: Any) -> Any:
    chunks = ir.MemRefType(ref.type).shape[-1] // CHUNK
    shape = layout().to_mgpu().registers_shape((ROWS, chunks * CHUNK))
    return inline.array_of(registers, shape, layout())


def store_row_sums(ref: Any, x: jax.Array, *, interpret: bool) -> None:
    """Stores the sum that each warp holds of every row, without a barrier.

    Args:
      ref: float32 [4, 16] in shared memory.
      x: float32 [16, n `CHUNK`] in the layout.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        ref[...] = x.reshape(ROWS, -1, WARPS, STEP).sum(axis=(1, 3)).T
        return

    @inline.function(arg_types=(plgpu.RefType(), layout()))
    def write(ctx: Any, ref: Any, x: Any) -> None:
        del ctx
        rows, _ = thread_place()
        warp = inline.as_index(inline.warp())
        quad = arith.remui(inline.lane(), inline.const(4))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, quad, inline.const(0))
        registers = x.registers.reshape(-1)
        for half in range(2):
            total, *others = (
                element
                for register in registers[half::2]
                for element in inline.elements(register, 8)
            )
            for other in others:
                total = arith.addf(total, other)
            # The four threads that share the row, in the order of a tree.
            for distance in (1, 2):
                total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
            with mgpu.utils.when(is_first):
                memref.store(total, ref, [warp, inline.as_index(rows[half])])

    write(ref, x)


def add_outer(sums: jax.Array, z: Any, a: Any, *, interpret: bool) -> jax.Array:
    """Adds `z @ a.T` with a sum over the rank, on the tensor cores.

    The rank is summed in an order in which a thread reads 4 neighbouring numbers: of a
    step of 16, thread q of the four that share a row takes 4 q to 4 q + 3.

    Args:
      sums: float32 [16, `CHUNK`] in the layout.
      z: bfloat16 or float16 [16, R] in global memory, R a multiple of 16.
      a: [`CHUNK`, R] in global memory.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The sums, in the layout.
    """
    if interpret:
        left, right = (ref[...].astype(jnp.float32) for ref in (z, a))
        return sums + jnp.dot(left, right.T, precision="highest")
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(z.dtype).name]
    steps = z.shape[-1] // 16

    @inline.function(
        arg_types=(layout(), plgpu.RefType(), plgpu.RefType()),
        return_type=inline.result_type(sums.shape, jnp.float32, layout()),
    )
    def product(ctx: Any, sums: Any, z: Any, a: Any) -> Any:
        del ctx
        rows, _ = thread_place()
        row, quad = rows[0], arith.remui(inline.lane(), inline.const(4))

        def rank(step: int) -> Any:
            first = arith.muli(quad, inline.const(4))
            return arith.addi(first, inline.const(16 * step))

        # In the order of the instruction: both rows of the first pair of a thread's
        # numbers, then of the second.
        left = []
        for step in range(steps):
            words = [inline.load_words(z, r, rank(step), count=2) for r in rows]
            left.append([words[half][pair] for pair in range(2) for half in range(2)])
        # [upper or lower row][8 features of the thread]
        out = [inline.elements(register, 8) for register in sums.registers.reshape(-1)]
        # Column n of tile t is feature 8 (n / 2) + 2 t + n % 2 of the step, so that
        # thread q, which holds columns 2 q and 2 q + 1, has 8 neighbours in 4 tiles.
        even = arith.muli(arith.divui(row, inline.const(2)), inline.const(8))
        feature = arith.addi(even, arith.remui(row, inline.const(2)))
        feature = arith.addi(feature, arith.muli(inline.warp(), inline.const(STEP)))
        for tile in range(4):
            column = arith.addi(feature, inline.const(2 * tile))
            part = [out[half][2 * tile + i] for half in range(2) for i in range(2)]
            for step in range(steps):
                right = inline.load_words(a, column, rank(step), count=2)
                part = inline.mma(kind, part, left[step], right)
            for half in range(2):
                out[half][2 * tile : 2 * tile + 2] = part[2 * half : 2 * half + 2]
        registers = [inline.pack(elements) for elements in out]
        return inline.array_of(registers, sums.registers.shape, layout())

    return product(sums, z, a)


def total_inner(ref: Any, rank: int, *, interpret: bool) -> jax.Array:
    """Adds up what all warps have of the sums of `add_inner`.

    Args:
      ref: float32 [groups, rank * `mosaic.COLUMN`] in shared memory, where each
        warpgroup has put its own with `mosaic.store_columns`.
      rank: R.
      interpret: whether the interpreter runs the kernel.

    Returns:
      float32 [16 R], row by row, in the layout `mosaic.strided`.
    """
    lane = mosaic.iota((ROWS * rank,), 0)
    place = lane % rank * mosaic.COLUMN + lane // rank
    # In a fixed order, unlike atomic additions: every run has the same bits.
    total: Any = None
    for group in range(ref.shape[0]):
        for warp in range(WARPS):
            index = place + ROWS * warp
            part = mosaic.gather(ref.at[group], index, jnp.float32, interpret=interpret)
            total = part if total is None else total + part
    return total


def add_inner(sums: jax.Array, x: jax.Array, a: Any, *, interpret: bool) -> jax.Array:
    """Adds `x @ a.T` with a sum over the features, on the tensor cores.

    The features are summed in an order in which a thread multiplies those it holds: of
    a warp's 32, thread q of the four that share a row has 8 q to 8 q + 7.

    Args:
      sums: float32 [64, R] in the layout `mosaic.accumulator(R)`: row 16 w + r is warp
        w's part of the sum of row r, over its own features.
      x: bfloat16 or float16 [16, `CHUNK`] in the layout.
      a: of the same dtype, [R, `CHUNK`] in global memory, R a multiple of 8.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The sums, in the same layout.
    """
    rank = sums.shape[1]
    if interpret:
        parts = (v.astype(jnp.float32) for v in (x, a[...]))
        left, right = (v.reshape(-1, WARPS, STEP) for v in parts)
        terms = jnp.einsum("twf,rwf->wtr", left, right, precision="highest")
        return sums + terms.reshape(WARPS * ROWS, rank)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(x.dtype).name]
    sums_layout = mosaic.accumulator(rank)

    @inline.function(
        arg_types=(sums_layout, layout(), plgpu.RefType()),
        return_type=inline.result_type(sums.shape, jnp.float32, sums_layout),
    )
    def product(ctx: Any, sums: Any, x: Any, a: Any) -> Any:
        del ctx
        rows, column = thread_place()
        word = ir.VectorType.get((4,), inline.i32())
        # [upper or lower row][4 words, of two features each]
        words = [
            inline.elements(vector.bitcast(word, register), 4)
            for register in x.registers.reshape(-1)
        ]
        registers = []
        for tile, pair in enumerate(inline.fragment_registers(sums)):
            # rows[0] is lane / 4: the column of the right operand that a thread holds.
            row = arith.addi(rows[0], inline.const(8 * tile))
            right = inline.load_words(a, row, column, count=4)
            part = [e for register in pair for e in inline.elements(register)]
            for step in range(2):
                pairs = (2 * step, 2 * step + 1)
                left = [words[half][i] for i in pairs for half in range(2)]
                part = inline.mma(kind, part, left, [right[i] for i in pairs])
            registers += [inline.pack(part[:2]), inline.pack(part[2:])]
        return inline.array_of(registers, sums.registers.shape, sums_layout)

    return product(sums, x, a)
