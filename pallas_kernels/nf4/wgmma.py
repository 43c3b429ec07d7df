"""The NF4 product for tens to hundreds of rows, on the `wgmma` of a Hopper GPU.

Between the few rows of `gpu.matmul` and the thousands of a training step, writing a
weight out and reading it back takes longer than multiplying with it. `matmul` decodes
it into registers instead, as the left operand of the tensor cores, while they are busy
with the previous block. docs/nf4_kernels.md has its instruction counts.

Not measured on a GPU, and therefore chosen only where a measurement says so
(`wgmma_rows` in the data of `pallas_kernels.device.tuned`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import BLOCK, ROWS
from pallas_kernels.nf4.gpu import (
    MULTIPROCESSORS,
    block_scales,
    clip_layer,
    kernel,
    operands,
)
from pallas_kernels.nf4.reference import NF4_CODE, Packed

# Rows of x that one `wgmma` takes at most.
MAX_COLUMNS = 256
# Of a Hopper multiprocessor, CUDA C++ Programming Guide: 227 KiB a block of threads,
# less the barriers and what aligning each array takes.
SHARED_LIMIT = 224 * 1024
# A slot is filled again two blocks after it was read, so one more is the least.
MIN_STAGES, MAX_STAGES = 3, 6
# Each part writes float32 sums that are then read again, so more do not pay.
PARTS = (1, 2, 4)


class Tiling(NamedTuple):
    """How a product is cut."""

    columns: int
    """Rows of x that a block of threads multiplies: a multiple of 8, at most 256."""
    parts: int
    """Blocks of threads that share the sums of the same results."""
    stages: int
    """Blocks of 64 weights, with their x, in shared memory at a time."""


def tiling_for(shape: tuple[int, int], rows: int) -> Tiling | None:
    """Cuts a product; None if the kernel cannot compute the shape.

    As few columns of tiles as possible, since each decodes the weight again; then
    enough parts to give most multiprocessors a block of threads.

    Args:
      shape: (O, I).
      rows: of x.
    """
    if refusal(shape) is not None or rows < 1:
        return None
    count, columns = _fewest_columns(rows)
    tiles = shape[0] // (_groups(shape) * ROWS) * count
    # More parts while multiprocessors would be idle, or while a part's scales leave too
    # little shared memory for its slots.
    parts, blocks = 1, shape[1] // BLOCK
    # An even number of blocks for each part: the loop takes two at a time.
    while blocks % (4 * parts) == 0 and (
        (parts < PARTS[-1] and 2 * parts * tiles <= MULTIPROCESSORS)
        or _stages(shape, columns, parts) < MIN_STAGES
    ):
        parts *= 2
    stages = _stages(shape, columns, parts)
    return Tiling(columns, parts, stages) if stages >= MIN_STAGES else None


def refusal(shape: tuple[int, int]) -> str | None:
    """Returns why `matmul` cannot multiply with a weight of this shape, or None."""
    out_features, in_features = shape
    if out_features % ROWS or in_features % (2 * BLOCK):
        return (
            f"it needs out_features in multiples of {ROWS} and in_features of "
            f"{2 * BLOCK}, and this weight is {shape}."
        )
    return None


def candidates(shape: tuple[int, int], rows: int) -> list[dict[str, int]]:
    """Lists the `Tiling`s to measure.

    Args:
      shape: (O, I).
      rows: of x.
    """
    if refusal(shape) is not None:
        return []
    _, widest = _fewest_columns(rows)
    widths = {widest} | {w for w in (64, 128) if w < rows}
    return [
        Tiling(columns, parts, stages)._asdict()
        for columns in sorted(widths)
        for parts in PARTS
        if (shape[1] // BLOCK) % (2 * parts) == 0
        and (stages := _stages(shape, columns, parts)) >= MIN_STAGES
    ]


def _fewest_columns(rows: int) -> tuple[int, int]:
    """Returns the least number of columns of tiles, and the rows of x in each."""
    count = -(-rows // MAX_COLUMNS)
    return count, -(-rows // (8 * count)) * 8


def _groups(shape: tuple[int, int]) -> int:
    """Returns the warpgroups of a block: while one decodes, another multiplies."""
    return 1 if shape[0] % (2 * ROWS) else 2


def _stages(shape: tuple[int, int], columns: int, parts: int) -> int:
    """Returns how many blocks fit in shared memory, up to as many as are of use."""
    rows = _groups(shape) * ROWS
    # Bytes: float32 pairs, float32 tables and scales, then 16-bit x and 4-bit codes.
    table = 4 * 2 * 256 * mosaic.PAIR_COPIES
    quant_maps = 4 * 256 * _groups(shape)
    scales = 4 * rows * (shape[1] // BLOCK // parts + 2)
    per_stage = 2 * BLOCK * columns + BLOCK // 2 * rows
    return min(MAX_STAGES, (SHARED_LIMIT - table - quant_maps - scales) // per_stage)


def matmul(
    x: Float[Array, "M I"],
    packed: Packed,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike = jnp.float32,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> Float[Array, "M O"]:
    """Computes `x @ W.T` from the packed bytes, with the weights of `dequantize`.

    The weights are rounded to the dtype of `x` just as `nf4_dequantize` rounds them;
    sums are float32. A warpgroup takes 64 out_features and up to 256 rows of x, whose
    sums stay in its registers; two of them share x in shared memory. For each block
    of 64 weights it decodes 64 x 64 of them into registers, starts their product and,
    while that runs, decodes the next.

    Args:
      x: bfloat16 or float16.
      packed: the stack.
      shape: (O, I).
      dtype: of the result, rounded once from float32.
      tiling: how the product is cut; default `tiling_for`.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The product.

    Raises:
      ValueError: a weight of another shape, or a tiling that does not divide it.
    """
    tiling = _checked(shape, x.shape[0], tiling)
    columns, parts, stages = tiling
    out_features, in_features = shape
    blocks = in_features // BLOCK
    steps = blocks // parts
    groups = _groups(shape)
    count = x.shape[0]
    # Whole tiles of rows; columns in the order in which a thread decodes its bytes.
    x = mosaic.operand_order(jnp.pad(x, ((0, -count % columns), (0, 0))))
    nested = packed.nested is not None
    interpreted = bool(interpret)

    def nf4_middle_matmul(
        x: Any, layer: Any, codes: Any, absmax: Any, *refs: Any
    ) -> None:
        levels: Any = refs[:3] if nested else ()
        refs = refs[len(levels) :]
        table, out, table_s, codes_s, x_s, scales_s, ready, free, done, *more = refs
        layer_index = clip_layer(layer[0], codes.shape[0])
        column = pl.ds(jax.lax.axis_index("column") * columns, columns)
        group = jax.lax.axis_index("group")
        tile = jax.lax.axis_index("tile")
        first_block = jax.lax.axis_index("part") * steps
        row = (tile * groups + group) * ROWS

        # For both warpgroups, which share x and have neighbouring rows of codes.
        def fetch(k: Any) -> None:
            slot, block = k % stages, first_block + k
            rows = pl.ds(tile * groups * ROWS, groups * ROWS)
            code_bytes = pl.ds(block * (BLOCK // 2), BLOCK // 2)
            plgpu.copy_gmem_to_smem(
                codes.at[layer_index, rows, code_bytes],
                codes_s.at[slot],
                ready.at[slot],
            )
            plgpu.copy_gmem_to_smem(
                x.at[column, pl.ds(block * BLOCK, BLOCK)],
                x_s.at[slot],
                ready.at[slot],
            )

        @pl.when(group == 0)
        def _() -> None:
            for k in range(min(stages, steps)):
                fetch(k)

        # Each warpgroup copies its share of the table.
        share = table_s.shape[0] // groups
        entries = pl.ds(group * share, share)
        table_s[entries] = mosaic.load(table.at[entries], 4)
        if nested:
            more[0][group] = mosaic.load(levels[2].at[layer_index], 2)
        # Two more a row than there are, so that the rows begin in different banks.
        scales_shape = (ROWS, steps + 2)
        index = (row + mosaic.iota(scales_shape, 0)) * blocks
        index = index + first_block
        # The two surplus columns repeat the last block's scale; nothing reads them.
        index = index + jnp.minimum(mosaic.iota(scales_shape, 1), steps - 1)
        scales_s[group] = block_scales(
            absmax,
            levels,
            more[0].at[group] if nested else None,
            layer_index,
            index,
            interpret=interpreted,
        )
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        def sums(total: Any) -> jax.Array:
            def step(k: Any) -> None:
                slot = k % stages
                plgpu.barrier_wait(ready.at[slot])
                weight = mosaic.decoded(
                    codes_s.at[slot, pl.ds(group * ROWS, ROWS)],
                    scales_s.at[group, :, k],
                    table_s,
                    x.dtype,
                    interpret=interpreted,
                )
                if interpreted:  # it takes operands from shared memory only
                    more[-1][group] = weight
                    plgpu.commit_smem()
                    weight = more[-1].at[group]
                plgpu.wgmma(total, weight, x_s.at[slot].T)
                # At most one product may still run: the one just started.
                plgpu.wgmma_wait(1)

                # The product of block k - 1 is done.
                @pl.when((k > 0) & (k - 1 + stages < steps))
                def _() -> None:
                    plgpu.barrier_arrive(free.at[(k - 1) % stages])

                # One block later than possible: the other group may be behind.
                @pl.when((group == 0) & (k > 1) & (k - 2 + stages < steps))
                def _() -> None:
                    plgpu.barrier_wait(free.at[(k - 2) % stages])
                    fetch(k - 2 + stages)

            # Two at a time: the registers that a product still reads must not be
            # those that the next block is decoded into.
            @pl.loop(0, steps, step=2)
            def _(k: Any) -> None:
                step(k)
                step(k + 1)

            return total[...]

        # float32 [64, columns]: columns / 2 of a thread's 255 registers, up to 128.
        total = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((ROWS, columns)))
        mosaic.store_transposed(
            out.at[jax.lax.axis_index("part"), column, pl.ds(row, ROWS)],
            total,
            interpret=interpreted,
        )

    scratch: list[Any] = [
        plgpu.SMEM((256 * mosaic.PAIR_COPIES * 2,), jnp.float32),
        plgpu.SMEM((stages, groups * ROWS, BLOCK // 2), jnp.uint8),
        mosaic.operand((stages, columns, BLOCK), x.dtype),
        plgpu.SMEM((groups, ROWS, steps + 2), jnp.float32),
        # Arrivals: the copies of codes and of x into a slot; the warpgroups done with
        # it; the warpgroups whose share of table and scales is complete.
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups),
    ]
    if nested:
        scratch.append(plgpu.SMEM((groups, 256), jnp.float32))
    if interpreted:
        scratch.append(mosaic.operand((groups, ROWS, BLOCK), x.dtype))
    # A single part is rounded as it is stored; several are added in float32 first.
    stored = dtype if parts == 1 else jnp.float32
    run = kernel(
        nf4_middle_matmul,
        jax.ShapeDtypeStruct((parts, x.shape[0], out_features), stored),
        scratch,
        grid={
            "column": x.shape[0] // columns,
            "tile": out_features // (groups * ROWS),
            "part": parts,
        },
        groups=groups,
        interpret=interpret,
    )
    out = run(x, *operands(packed, out_features, in_features // 2), pair_table())
    out = out[0] if parts == 1 else out.sum(axis=0).astype(dtype)
    return out[:count]


def _checked(shape: tuple[int, int], rows: int, tiling: Tiling | None) -> Tiling:
    """Returns the tiling, by default `tiling_for`; raises if it does not fit."""
    reason = refusal(shape)
    tiling = tiling_for(shape, rows) if tiling is None else tiling
    if reason is not None or tiling is None:
        reason = reason or "its block scales do not fit in shared memory."
        raise ValueError(f"`wgmma.matmul` cannot be used here: {reason}")
    blocks = shape[1] // BLOCK
    if blocks % (2 * tiling.parts) or tiling.columns % 8 or tiling.stages < MIN_STAGES:
        raise ValueError(
            f"`wgmma.matmul`: {tiling} does not fit the {blocks} blocks of 64 "
            f"weights of in_features={shape[1]}: an even number of them for each "
            f"part, columns in multiples of 8 and at least {MIN_STAGES} stages are "
            "needed; `tiling_for` gives one that fits."
        )
    return tiling


def pair_table() -> Float32[np.ndarray, " N"]:
    """Returns the two values of each byte as `mosaic.decoded` reads them.

    Returns:
      float32 [256 * 16 * 2]: the pairs, the first nibble's value first, 16 copies each.
    """
    byte = np.arange(256)
    pairs = np.stack([NF4_CODE[byte >> 4], NF4_CODE[byte & 0xF]], axis=-1)
    return np.repeat(pairs[:, None], mosaic.PAIR_COPIES, axis=1).reshape(-1)
