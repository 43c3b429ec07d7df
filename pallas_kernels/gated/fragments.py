"""Blocks of 64 tokens spread over a warpgroup, and products that sum over them.

Of a block [64, 32] each of the four warps holds 16 tokens. Thread q of the four that
share features holds tokens 4 q to 4 q + 3, and 4 neighbouring features of each: as
right operands of `mma.m16n8k16`, two tokens of a feature are a register. Which token
and which feature is which row and column is free as long as the left operand and
whoever reads the sums agree.

Written for and checked with jax 0.11.2 and 0.12.0; imported only when a kernel is used.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import inline, mosaic
from pallas_kernels.norm import fragments as row_blocks
from pallas_kernels.norm.fragments import WARPS

TOKENS = 64
"""Of a block."""
FEATURES = 32
"""Of a block."""
RANKS = 16
"""Rows of a product of the tensor cores."""
_EACH = 4
"""Neighbouring features of a thread, and neighbouring tokens."""
_OF_WARP = TOKENS // WARPS
"""Tokens of a warp: as many as a product of the tensor cores sums over."""


def layout() -> Any:
    """Returns the layout of [64, 32]."""
    # Tiled, it is [4 warps, 4 threads, 8 threads, 4 tokens, 4 features].
    tiling = plgpu.Tiling(((TOKENS, FEATURES), (_OF_WARP, FEATURES), (_EACH, _EACH)))
    tiled = mgpu.TiledLayout(
        tiling,
        warp_dims=(-6,),
        lane_dims=(-3, -4),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(
        tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim
    )


def logistic(x: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """Computes 1 / (1 + e^-x) in float32, to within 4 units of the last place.

    Four instructions: a division that rounds correctly would take twice the time of all
    others.

    Args:
      x: float32.
      layout: that of `x`.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        return jax.nn.sigmoid(x)

    @inline.function(
        arg_types=(layout,),
        return_type=inline.result_type(x.shape, jnp.float32, layout),
    )
    def approximate(ctx: Any, x: Any) -> Any:
        del ctx
        f32 = ir.F32Type.get()
        factor, one = (arith.constant(f32, v) for v in (-1.4426950408889634, 1.0))

        def element(value: Any) -> Any:
            power = inline.exp2(arith.mulf(value, factor))
            return inline.reciprocal(arith.addf(power, one))

        def convert(register: Any) -> Any:
            (count,) = ir.VectorType(register.type).shape
            return inline.pack([element(v) for v in inline.elements(register, count)])

        return inline.map_registers(convert, x, layout=layout, signed=None)

    return approximate(x)


def load_pairs(
    ref: Any, layout: Any, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Loads numbers that alternate between two arrays, as float32.

    Args:
      ref: 16-bit [tokens, 2 n] in global memory.
      layout: of both arrays, this module's or that of `norm.fragments`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      Both, [tokens, n].
    """
    shape = (ref.shape[0], ref.shape[1] // 2)
    if interpret:
        wide = ref[...].astype(jnp.float32)
        return wide[:, 0::2], wide[:, 1::2]
    kind = inline.result_type(shape, jnp.float32, layout)

    @inline.function(arg_types=(plgpu.RefType(),), return_type=(kind, kind))
    def read(ctx: Any, ref: Any) -> Any:
        del ctx
        halves: tuple[list[Any], list[Any]] = ([], [])
        places, each = _places(shape)
        element = ir.MemRefType(ref.type).element_type
        for token, feature in places:
            column = arith.muli(feature, inline.const(2))
            values: list[Any] = []
            for first in range(0, 2 * each, 8):
                start = arith.addi(column, inline.const(first))
                wide = llvm.load(
                    ir.VectorType.get((8,), element),
                    inline.pointer(ref, token, start),
                    alignment=16,
                )
                wide = arith.extf(ir.VectorType.get((8,), ir.F32Type.get()), wide)
                values += inline.elements(wide, 8)
            for half, registers in enumerate(halves):
                registers.append(inline.pack(values[half::2]))
        registers_shape = layout.to_mgpu().registers_shape(shape)
        return tuple(inline.array_of(r, registers_shape, layout) for r in halves)

    return read(ref)


def load(ref: Any, *, interpret: bool) -> jax.Array:
    """Loads 16-bit numbers [64, 32] from global memory, as float32."""
    if interpret:
        return ref[...].astype(jnp.float32)

    @inline.function(
        arg_types=(plgpu.RefType(),),
        return_type=inline.result_type(ref.shape, ref.dtype, layout()),
    )
    def read(ctx: Any, ref: Any) -> Any:
        del ctx
        places, each = _places((TOKENS, FEATURES))
        kind = ir.VectorType.get((each,), ir.MemRefType(ref.type).element_type)
        registers = [
            llvm.load(kind, inline.pointer(ref, *place), alignment=2 * each)
            for place in places
        ]
        shape = layout().to_mgpu().registers_shape((TOKENS, FEATURES))
        return inline.array_of(registers, shape, layout())

    return read(ref).astype(jnp.float32)


def store_pairs(
    ref: Any, first: jax.Array, second: jax.Array, *, interpret: bool
) -> None:
    """Stores two float32 [64, 32] in turn, rounded, without a barrier.

    Args:
      ref: 16-bit [64, 64] in global memory.
      first: in the layout.
      second: in the layout.
      interpret: whether the interpreter runs the kernel.
    """
    if interpret:
        pairs = jnp.stack([first, second], axis=-1).astype(ref.dtype)
        ref[...] = pairs.reshape(ref.shape)
        return
    dtype = jnp.dtype(ref.dtype)

    @inline.function(arg_types=(plgpu.RefType(), layout(), layout()))
    def write(ctx: Any, ref: Any, first: Any, second: Any) -> None:
        del ctx
        places, each = _places((TOKENS, FEATURES))
        arrays = [array.registers.reshape(-1) for array in (first, second)]
        for (token, feature), *registers in zip(places, *arrays, strict=True):
            parts = [inline.elements(register, each) for register in registers]
            words = [
                inline.pack_narrow([*pair], dtype) for pair in zip(*parts, strict=True)
            ]
            column = arith.muli(feature, inline.const(2))
            target = inline.pointer(ref, token, column)
            llvm.store(inline.pack(words), target, alignment=4 * each)

    write(ref, first, second)


def add_products(
    sums: list[jax.Array], z: Any, x: jax.Array, *, interpret: bool
) -> list[jax.Array]:
    """Adds `z @ x` with a sum over the tokens, on the tensor cores.

    Args:
      sums: float32 [64, 32] in the layout `mosaic.accumulator(32)`, one for each 16
        rows of z: row 16 w + r is warp w's part of the sum of row r, over its own
        tokens; column 8 j + n is feature 4 n + j (`column_of`).
      z: bfloat16 or float16 [16 m, 64] in global memory.
      x: float32 [64, 32] in the layout; multiplied in the dtype of `z`.
      interpret: whether the interpreter runs the kernel.

    Returns:
      The sums, in the same layout.
    """
    dtype = jnp.dtype(z.dtype)
    if interpret:
        left = z[...].astype(jnp.float32).reshape(len(sums), RANKS, WARPS, -1)
        right = x.astype(dtype).astype(jnp.float32).reshape(WARPS, -1, FEATURES)
        terms = jnp.einsum("mrwt,wtf->mwrf", left, right, precision="highest")
        terms = terms.reshape(len(sums), WARPS * RANKS, 8, _EACH).swapaxes(2, 3)
        return [s + t.reshape(s.shape) for s, t in zip(sums, terms, strict=True)]
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype.name]
    sums_layout = mosaic.accumulator(FEATURES)
    types = [inline.result_type(s.shape, jnp.float32, sums_layout) for s in sums]

    @inline.function(
        arg_types=(plgpu.RefType(), layout(), *(sums_layout,) * len(sums)),
        return_type=tuple(types),
    )
    def product(ctx: Any, z: Any, x: Any, *sums: Any) -> Any:
        del ctx
        row = arith.divui(inline.lane(), inline.const(4))
        # [token][feature of the thread]
        held = [inline.elements(r, _EACH) for r in x.registers.reshape(-1)]
        right = [
            [inline.pack_narrow([held[t][j], held[t + 1][j]], dtype) for t in (0, 2)]
            for j in range(_EACH)
        ]
        out = [
            [inline.elements(r) for pair in inline.fragment_registers(s) for r in pair]
            for s in sums
        ]
        for number, tiles in enumerate(out):
            rows = [
                arith.addi(row, inline.const(RANKS * number + half)) for half in (0, 8)
            ]
            # In the order of the instruction: both rows of the first pair of tokens,
            # then of the second.
            words = [inline.load_words(z, r, _token(), count=2) for r in rows]
            left = [words[half][pair] for pair in range(2) for half in range(2)]
            for j in range(_EACH):
                part = tiles[2 * j] + tiles[2 * j + 1]
                part = inline.mma(kind, part, left, right[j])
                tiles[2 * j], tiles[2 * j + 1] = part[:2], part[2:]
        return tuple(
            inline.array_of(
                [inline.pack(elements) for elements in tiles],
                s.registers.shape,
                sums_layout,
            )
            for s, tiles in zip(sums, out, strict=True)
        )

    return list(product(z, x, *sums))


def column_of(feature: jax.Array) -> jax.Array:
    """Returns the column of the sums of `add_products` that is a feature's."""
    return feature % _EACH * (FEATURES // _EACH) + feature // _EACH


def _places(shape: tuple[int, int]) -> tuple[list[tuple[Any, Any]], int]:
    """Returns token and first feature of each register, and how many features it has.

    In the order of the registers, of [64, 32] in the layout of this module or of
    [16, 128 n] in that of `norm.fragments`.
    """
    if shape[0] == row_blocks.ROWS:
        rows, column = row_blocks.thread_place()
        columns = row_blocks.chunk_columns(column, shape[1])
        return [(row, column) for column in columns for row in rows], 8
    feature = arith.divui(inline.lane(), inline.const(4))
    feature = arith.muli(feature, inline.const(_EACH))
    tokens = [arith.addi(_token(), inline.const(i)) for i in range(_EACH)]
    return [(token, feature) for token in tokens], _EACH


def _token() -> Any:
    """Returns the first token of a thread."""
    quad = arith.remui(inline.lane(), inline.const(4))
    token = arith.muli(inline.warp(), inline.const(_OF_WARP))
    return arith.addi(token, arith.muli(quad, inline.const(_EACH)))
