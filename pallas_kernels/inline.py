"""The words that inline code of `pallas_kernels.mosaic` is written in.

Registers, addresses and single instructions, as MLIR operations: what `inline_mgpu`
hands out and takes. Everything here runs within such a function, for one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

LANES = 32
"""Threads of a warp; tables in shared memory are kept once for each."""
WARPGROUP = 128
"""Threads that share a Pallas array."""


def code(**types: Any) -> Any:
    """`inline_mgpu`, whose decorated functions lose their first argument."""
    return plgpu.inline_mgpu(**types)


def result(shape: tuple[int, ...], dtype: DTypeLike, layout: Any) -> Any:
    """What an inline function returns."""
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout)


def array(
    like: Any,
    layout: Any,
    one: Callable[..., Any],
    *others: Any,
    signed: bool | None,
) -> Any:
    """Applies `one` to corresponding registers."""
    registers = np.empty(like.registers.shape, object)
    for i in np.ndindex(registers.shape):
        registers[i] = one(like.registers[i], *(o.registers[i] for o in others))
    return mgpu.FragmentedArray(
        _registers=registers, _layout=layout.to_mgpu(), _is_signed=signed
    )


def i32() -> Any:
    """The type of 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def const(value: int) -> Any:
    """A 32-bit integer."""
    return arith.constant(i32(), value)


def zero() -> Any:
    """0 in float32."""
    return arith.constant(ir.F32Type.get(), 0.0)


def as_index(value: Any) -> Any:
    """An integer as an index."""
    return arith.index_castui(ir.IndexType.get(), value)


def lane() -> Any:
    """The thread's number within its warp."""
    return arith.remui(mgpu.utils.thread_idx(), const(LANES))


def place() -> tuple[list[Any], Any]:
    """The two rows of a tile of 64 that a thread holds a part of, and which of four."""
    thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
    warp, in_warp = arith.divui(thread, const(LANES)), lane()
    row = arith.addi(arith.muli(warp, const(16)), arith.divui(in_warp, const(4)))
    return [row, arith.addi(row, const(8))], arith.remui(in_warp, const(4))


def first(register: Any) -> Any:
    """The first element of a register."""
    return vector.extract(register, dynamic_position=[], static_position=[0])


def elements(register: Any) -> list[Any]:
    """Both elements of a register of two."""
    return [
        vector.extract(register, dynamic_position=[], static_position=[i])
        for i in range(2)
    ]


def joined(elements: list[Any]) -> Any:
    """A register of two float32."""
    whole = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for i, element in enumerate(elements):
        whole = vector.insert(element, whole, dynamic_position=[], static_position=[i])
    return whole


def pairs(registers: Any) -> list[tuple[Any, Any]]:
    """The upper and the lower register of each tile of 8 columns."""
    flat = registers.reshape(-1)
    return list(zip(flat[::2], flat[1::2], strict=True))


def pointer(ref: Any, row: Any, column: Any) -> Any:
    """A global pointer to an element of a matrix, computed in 64 bits."""
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    element = ir.MemRefType(ref.type).element_type
    wide = ir.IntegerType.get_signless(64)
    at = arith.addi(
        arith.muli(arith.extui(wide, row), arith.constant(wide, strides[0])),
        arith.extui(wide, column),
    )
    # Said to be global: of a pointer of any kind the hardware finds out at each access.
    base = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), mgpu.utils.memref_ptr(ref))
    return mgpu.utils.getelementptr(base, [at], element)


def load_words(
    ref: Any, row: Any, column: Any, count: int, *, shared: bool = False
) -> list[Any]:
    """Loads `count` neighbouring 32-bit words as one access."""
    kind = ir.VectorType.get((count,), i32())
    if shared:
        strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
        at = arith.addi(arith.muli(row, const(strides[0])), column)
        byte = ir.IntegerType.get_signless(8)
        where = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], byte)
    else:
        where = pointer(ref, row, column)
    loaded = llvm.load(kind, where, alignment=4 * count)
    return [
        vector.extract(loaded, dynamic_position=[], static_position=[i])
        for i in range(count)
    ]


def own(table: Any, kind: Any = None) -> Callable[[Any], Any]:
    """Looks up values of 4 bytes in the lane's own of 32 copies, of 8 in one of 16.

    Three instructions: shift, select and join in one, load. For that, the address is
    computed in bytes, and the lane is read from its register: of `thread % 32` the
    compiler would join the remainder instead, which takes one more for every lookup.
    """
    byte = ir.IntegerType.get_signless(8)
    lane = arith.muli(nvvm.read_ptx_sreg_laneid(), const(4))
    if kind is None:
        kind = ir.MemRefType(table.type).element_type
    else:
        lane = arith.andi(arith.muli(lane, const(2)), const(4 * LANES - 1))
    start = mgpu.utils.memref_ptr(table)

    def look_up(index: Any) -> Any:
        at = arith.ori(arith.muli(index, const(4 * LANES)), lane)
        at = arith.extui(ir.IntegerType.get_signless(64), at)
        return llvm.load(kind, mgpu.utils.getelementptr(start, [at], byte))

    return look_up


def pair(own: Callable[[Any], Any], word: Any, shift: int) -> Any:
    """The two values of byte `shift / 8` of a word."""
    return own(arith.andi(arith.shrui(word, const(shift)), const(0xFF)))


def fma(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    return llvm.intr_fma(a, b, c)


def mma(kind: str, sums: list[Any], left: list[Any], right: list[Any]) -> list[Any]:
    """One `mma.sync.m16n8k16`: 4 sums, 4 registers of the left, 2 of the right."""
    f32 = ir.F32Type.get()
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*left, *right, *sums],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(4)]
