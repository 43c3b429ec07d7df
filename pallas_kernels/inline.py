"""Registers, addresses and single instructions, for the inline code of `mosaic`.

MLIR operations on what `inline_mgpu` passes to an inline function. Everything here runs
within such a function, for one thread.
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
"""Threads of a warp; tables in shared memory have one copy for each."""
WARPGROUP = 128
"""Threads that share a Pallas array."""


# --- Functions and arrays ---


def function(**types: Any) -> Any:
    """Decorates an inline function; typed, as its callers pass one argument fewer."""
    return plgpu.inline_mgpu(**types)


def result_type(shape: tuple[int, ...], dtype: DTypeLike, layout: Any) -> Any:
    """Returns the type of an inline function's result."""
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout)


def map_registers(
    convert: Callable[..., Any],
    array: Any,
    *others: Any,
    layout: Any,
    signed: bool | None,
) -> Any:
    """Applies `convert` to the corresponding registers of arrays."""
    registers = np.empty(array.registers.shape, object)
    for i in np.ndindex(registers.shape):
        registers[i] = convert(
            array.registers[i], *(other.registers[i] for other in others)
        )
    return mgpu.FragmentedArray(
        _registers=registers, _layout=layout.to_mgpu(), _is_signed=signed
    )


def array_of(registers: list[Any], shape: tuple[int, ...], layout: Any) -> Any:
    """Makes a floating-point array of a thread's registers, in the layout's order."""
    flat = np.empty(len(registers), object)
    flat[:] = registers
    # Signedness is a property of integers; floats have None.
    return mgpu.FragmentedArray(
        _registers=flat.reshape(shape), _layout=layout.to_mgpu(), _is_signed=None
    )


# --- Values ---


def i32() -> Any:
    """Returns the type of 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def const(value: int) -> Any:
    """Returns a 32-bit integer."""
    return arith.constant(i32(), value)


def zero() -> Any:
    """Returns 0 in float32."""
    return arith.constant(ir.F32Type.get(), 0.0)


def as_index(value: Any) -> Any:
    """Converts an integer to an index."""
    return arith.index_castui(ir.IndexType.get(), value)


def first_element(register: Any) -> Any:
    """Returns the first element of a register."""
    return vector.extract(register, dynamic_position=[], static_position=[0])


def elements(register: Any, count: int = 2) -> list[Any]:
    """Returns the elements of a register."""
    return [
        vector.extract(register, dynamic_position=[], static_position=[i])
        for i in range(count)
    ]


def pack(elements: list[Any]) -> Any:
    """Returns a register of 32-bit elements."""
    kind = ir.VectorType.get((len(elements),), elements[0].type)
    register = llvm.mlir_undef(kind)
    for i, element in enumerate(elements):
        register = vector.insert(
            element, register, dynamic_position=[], static_position=[i]
        )
    return register


# --- Threads, and which part of a tile each holds ---


def lane() -> Any:
    """Returns the thread's number within its warp."""
    return arith.remui(mgpu.utils.thread_idx(), const(LANES))


def warp() -> Any:
    """Returns the thread's warp within its warpgroup."""
    thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
    return arith.divui(thread, const(LANES))


def fragment() -> tuple[list[Any], Any]:
    """Returns the two rows of a tile of 64 that a thread shares, and its number of 4.

    The fragments of `mma.m16n8k16` and `wgmma`: warp w holds rows 16 w to 16 w + 15,
    and four threads share rows r and r + 8 of them.
    """
    in_warp = lane()
    # PTX ISA, fragments of mma.m16n8k16: lane / 4 is the row (groupID), and lane % 4
    # selects a pair of columns.
    row = arith.addi(arith.muli(warp(), const(16)), arith.divui(in_warp, const(4)))
    return [row, arith.addi(row, const(8))], arith.remui(in_warp, const(4))


def fragment_registers(array: Any) -> list[tuple[Any, Any]]:
    """Returns the registers of both rows, for each tile of 8 columns."""
    # For a tile of 8 columns a thread has two registers: columns 2 q and 2 q + 1 of its
    # upper row, and the same of its lower row.
    flat = array.registers.reshape(-1)
    return list(zip(flat[::2], flat[1::2], strict=True))


# --- Memory ---


def pointer(ref: Any, *indices: Any) -> Any:
    """Returns a global pointer to an element, computed in 64 bits.

    Args:
      ref: an array whose last axis is contiguous.
      indices: int32, one for each axis.
    """
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    element = ir.MemRefType(ref.type).element_type
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.extui(i64, indices[-1])
    for index, stride in zip(indices[:-1], strides[:-1], strict=True):
        step = arith.muli(arith.extui(i64, index), arith.constant(i64, stride))
        offset = arith.addi(offset, step)
    # In the global address space: for a generic pointer the hardware looks up the
    # space at each access.
    base = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), mgpu.utils.memref_ptr(ref))
    return mgpu.utils.getelementptr(base, [offset], element)


def load_words(ref: Any, *indices: Any, count: int, shared: bool = False) -> list[Any]:
    """Loads `count` neighbouring 32-bit words as one access.

    Args:
      ref: an array; a matrix, if it is in shared memory.
      indices: of the element at which the first word begins.
      count: 1, 2 or 4.
      shared: whether `ref` is in shared memory; else in global memory.
    """
    if shared:
        row, column = indices
        strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
        # Shared memory is small, so 32 bits hold its offsets.
        offset = arith.addi(arith.muli(row, const(strides[0])), column)
        element = ir.MemRefType(ref.type).element_type
        start = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], element)
    else:
        start = pointer(ref, *indices)
    # Declared aligned to its whole size, or the compiler would split the access.
    words = llvm.load(ir.VectorType.get((count,), i32()), start, alignment=4 * count)
    return elements(words, count)


def store_if(condition: Any, target: Any, value: Any, dtype: DTypeLike) -> None:
    """Stores float32 as `dtype` where a condition holds, without a branch.

    After a branch the lanes of a warp need not meet again before the next barrier.
    """
    kind, size = (
        mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)),
        jnp.dtype(dtype).itemsize,
    )
    if size == 2:
        value = arith.truncf(kind, value)
    value = llvm.bitcast(ir.IntegerType.get_signless(8 * size), value)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [arith.extui(i32(), condition), target, value],
        f"{{ .reg .pred p; setp.ne.u32 p, $0, 0; @p st.global.b{8 * size} [$1], $2; }}",
        f"r,l,{'h' if size == 2 else 'r'}",
        has_side_effects=True,
    )


def lane_lookup(table: Any, kind: Any = None) -> Callable[[Any], Any]:
    """Returns a function that reads a table in shared memory, without bank conflicts.

    Each lane reads its copy: one of 32 of 4-byte values, or of 16 of 8-byte values,
    which half a warp reads at once.

    Args:
      table: vector of the copies.
      kind: MLIR type of 8-byte values; default the element type of `table`, of 4.
    """
    # Three instructions: shift; select and join in one; load. For that, the address is
    # computed in bytes, and the lane is read from its register: with `thread % 32` the
    # compiler would join the remainder instead, one more instruction for every lookup.
    byte = ir.IntegerType.get_signless(8)
    lane_offset = arith.muli(nvvm.read_ptx_sreg_laneid(), const(4))
    if kind is None:
        kind = ir.MemRefType(table.type).element_type
    else:
        lane_offset = arith.muli(lane_offset, const(2))
        # 16 copies of 8 bytes fill the same 128: lanes i and i + 16 share one.
        lane_offset = arith.andi(lane_offset, const(4 * LANES - 1))
    start = mgpu.utils.memref_ptr(table)

    def look_up(index: Any) -> Any:
        # The entry's offset has its low 7 bits clear and the lane's has no others, so
        # OR is their sum, and fits into the same instruction as a mask.
        offset = arith.ori(arith.muli(index, const(4 * LANES)), lane_offset)
        offset = arith.extui(ir.IntegerType.get_signless(64), offset)
        return llvm.load(kind, mgpu.utils.getelementptr(start, [offset], byte))

    return look_up


def pair_halves(first: Any, second: Any, high: bool) -> Any:
    """Returns the low, or the high, 16 bits of two words as one word."""
    if high:
        first = arith.shrui(first, const(16))
        return arith.ori(first, arith.andi(second, const(-(1 << 16))))
    second = arith.shli(second, const(16))
    return arith.ori(arith.andi(first, const(0xFFFF)), second)


def as_float(word: Any) -> Any:
    """Reads a word as float32."""
    return llvm.bitcast(ir.F32Type.get(), word)


def pack_narrow(elements: list[Any], dtype: DTypeLike) -> Any:
    """Returns two float32 elements as one word of two 16-bit ones."""
    kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
    narrow = arith.truncf(kind, pack(elements))
    return llvm.bitcast(i32(), narrow)


def shuffle(value: Any, source: Any) -> Any:
    """Returns the float32 that lane `source` of the warp has."""
    return nvvm.shfl_sync(const(-1), value, source, const(31), nvvm.ShflKind.idx)


def byte_of(word: Any, number: int) -> Any:
    """Returns byte `number` of a little-endian word."""
    return arith.andi(arith.shrui(word, const(8 * number)), const(0xFF))


# --- Arithmetic ---


def fma(a: Any, b: Any, c: Any) -> Any:
    """Computes `a * b + c`, rounded once."""
    return llvm.intr_fma(a, b, c)


def exp2(a: Any) -> Any:
    """Computes 2 to the power of `a`, to within 2 units of the last place."""
    return llvm.inline_asm(a.type, [a], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def reciprocal(a: Any) -> Any:
    """Computes 1 / a, to within a unit of the last place."""
    return llvm.inline_asm(a.type, [a], "rcp.approx.ftz.f32 $0, $1;", "=f,f")


def mma(kind: str, sums: list[Any], left: list[Any], right: list[Any]) -> list[Any]:
    """Runs one `mma.sync.m16n8k16`: 4 sums, 4 registers of the left, 2 of the right."""
    f32 = ir.F32Type.get()
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*left, *right, *sums],
        # row.col: both operands are read along the axis that is summed, as weights
        # [out, in] and inputs [rows, in] are stored.
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(4)]
