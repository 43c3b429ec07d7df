"""RMSNorm and what surrounds it as one pass over memory, for Hopper GPUs (Mosaic GPU).

`forward` normalizes a residual stream and writes, after the features of each row, the
scaled product with the A of the linear layers behind the norm; `backward` is the
derivative of both. A block of threads takes 16 rows, which it goes over twice: once for
the sums over the features, once more to combine. The second time they come from shared
memory and L2. The products with A, which every block reads, are those of the tensor
cores.

These are the kernels; `pallas_kernels.norm.api` chooses, checks and differentiates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.norm.fragments import (
    CHUNK,
    ROWS,
    STEP,
    WARPS,
    across,
    add_inner,
    add_outer,
    layout,
    load,
    load_column,
    load_row,
    load_shared,
    load_shared_column,
    store,
    store_row_sums,
    total_inner,
)

_SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory of a block on Hopper (CUDA C++ Programming Guide)."""


class _Split(NamedTuple):
    """How the features of a row are divided."""

    groups: int
    """Warpgroups of a block of threads."""
    chunks: int
    """Of a warpgroup, one after another in memory."""

    @classmethod
    def of(cls, features: int, most: int) -> _Split:
        chunks = features // CHUNK
        groups = next(g for g in range(most, 0, -1) if chunks % g == 0)
        return cls(groups, chunks // groups)

    @property
    def together(self) -> int:
        """Chunks that the first pass loads at once: enough to keep the memory busy."""
        return 2 if self.chunks % 2 == 0 else 1

    @property
    def parts(self) -> int:
        """Warps that share the sum of a row."""
        return self.groups * WARPS

    def kept(self, dtype: Any, others: int) -> list[Any]:
        """Returns the shared memory for rows; none where they do not fit.

        Args:
          dtype: of the rows.
          others: bytes of the rest.
        """
        # Rows are 64 bytes more than a multiple of 128 apart: two neighbours are in
        # different halves of the banks.
        steps = self.chunks // self.together
        shape = (self.groups, steps, ROWS, self.together * CHUNK + STEP)
        size = self.groups * steps * ROWS * shape[-1] * jnp.dtype(dtype).itemsize
        return [plgpu.SMEM(shape, dtype)] if size + others <= _SHARED_LIMIT else []

    def first_pass(
        self,
        values: Callable[[Any], tuple[jax.Array, list[jax.Array]]],
        kept: Any,
        dtype: Any,
        totals: list[Any],
        ready: Any,
        *,
        interpret: bool,
    ) -> list[jax.Array]:
        """Sums over the features of every row, and keeps the rows.

        Args:
          values: of the columns, those to keep and those to sum, [16, columns].
          kept: where to keep them, or None.
          dtype: in which to keep them.
          totals: float32 [parts, 16] in shared memory, for each sum.
          ready: passed when all sums are there.
          interpret: whether the interpreter runs the kernel.

        Returns:
          The sums, [16].
        """
        group = jax.lax.axis_index("group")
        width = self.together * CHUNK
        zeros = jnp.zeros((ROWS, width), jnp.float32)
        zeros = plgpu.layout_cast(zeros, layout())

        def add(step: Any, sums: list[jax.Array]) -> list[jax.Array]:
            start = (group * (self.chunks // self.together) + step) * width
            rows, terms = values(pl.ds(start, width))
            if kept is not None:
                target = kept.at[group, step, :, pl.ds(0, width)]
                rows = rows.astype(dtype)
                mosaic.store(target, rows, layout(), interpret=interpret)
            return [total + term for total, term in zip(sums, terms, strict=True)]

        steps = self.chunks // self.together
        sums = jax.lax.fori_loop(0, steps, add, [zeros for _ in totals])
        for total, value in zip(totals, sums, strict=True):
            place = total.at[pl.ds(group * WARPS, WARPS)]
            store_row_sums(place, value, interpret=interpret)
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        # In a fixed order, unlike atomic additions: every run has the same bits.
        return [
            functools.reduce(
                lambda a, b: a + b,
                [load_shared_column(total.at[part]) for part in range(self.parts)],
            )
            for total in totals
        ]

    def rows_again(self, kept: Any, rows: Any, step: Any, read: Any) -> jax.Array:
        """Returns a chunk of the rows of the first pass."""
        group = jax.lax.axis_index("group")
        if kept is None:
            return read(rows.at[:, self.columns(step)])
        place = pl.ds(step % self.together * CHUNK, CHUNK)
        return load_shared(kept.at[group, step // self.together, :, place])

    def columns(self, step: Any) -> Any:
        """Returns the columns of a warpgroup's chunk."""
        first = jax.lax.axis_index("group") * self.chunks
        return pl.ds((first + step) * CHUNK, CHUNK)


def forward(
    x: Float[Array, "T D"],
    factor: Float32[Array, " D"],
    a: Float[Array, "R D"],
    scaling: Float32[Array, " R"],
    *,
    eps: float,
    rounds_first: bool,
    interpret: Any = False,
) -> Float[Array, "T K"]:
    """Computes `[y | scaling (a y)]` of y = x / sqrt(mean(x^2) + eps) * factor.

    Each y is rounded, and each `a y` before it is scaled.

    Args:
      x: bfloat16 or float16, T a multiple of 16 and D of 128.
      factor: of each feature.
      a: of the same dtype, R a multiple of 16.
      scaling: factor of each row of `a`.
      eps: added to the mean of the squares.
      rounds_first: whether the quotient is rounded before it is multiplied.
      interpret: False, or what `plgpu.kernel` takes.
    """
    (count, features), rank = x.shape, a.shape[0]
    split = _Split.of(features, 2 if interpret else 4)
    interpreted = bool(interpret)
    read = functools.partial(load, interpret=interpreted)
    gather = functools.partial(mosaic.gather, interpret=interpreted)
    sums_size = rank * mosaic.COLUMN

    def norm_forward(
        x: Any, factor: Any, a: Any, scaling: Any,
        out: Any, total_s: Any, inner_s: Any, ready: Any, done: Any, *kept: Any,
    ) -> None:  # fmt: skip
        group = jax.lax.axis_index("group")
        rows = pl.ds(jax.lax.axis_index("block") * ROWS, ROWS)
        rows_s = kept[0] if kept else None

        def values(columns: Any) -> tuple[jax.Array, list[jax.Array]]:
            wide = read(x.at[rows, columns])
            return wide, [wide * wide]

        (squares,) = split.first_pass(
            values, rows_s, x.dtype, [total_s], ready, interpret=interpreted
        )
        inverse = across(jax.lax.rsqrt(squares * (1.0 / features) + eps), CHUNK)

        def combine(step: Any, sums: jax.Array) -> jax.Array:
            columns = split.columns(step)
            wide = split.rows_again(rows_s, x.at[rows], step, read) * inverse
            if rounds_first:
                wide = wide.astype(x.dtype).astype(jnp.float32)
            y = wide * load_row(factor.at[columns], interpret=interpreted)
            y = y.astype(x.dtype)
            store(out.at[rows, columns], y, interpret=interpreted)
            return add_inner(sums, y, a.at[:, columns], interpret=interpreted)

        zeros = jnp.zeros((WARPS * ROWS, rank), jnp.float32)
        zeros = plgpu.layout_cast(zeros, mosaic.accumulator(rank))
        inner = jax.lax.fori_loop(0, split.chunks, combine, zeros)
        mosaic.store_columns(inner_s.at[group], inner, interpret=interpreted)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(group == 0)
        def _() -> None:
            total = total_inner(inner_s, rank, interpret=interpreted)
            total = total.astype(x.dtype).astype(jnp.float32)
            number = mosaic.iota(total.shape, 0) % rank
            total = total * gather(scaling, number, jnp.float32)
            target = out.at[rows, pl.ds(features, rank)]
            mosaic.store_rows(target, total, interpret=interpreted)

    scratch = [
        plgpu.SMEM((split.parts, ROWS), jnp.float32),
        plgpu.SMEM((split.groups, sums_size), jnp.float32),
        plgpu.Barrier(num_arrivals=split.groups),
        plgpu.Barrier(num_arrivals=split.groups),
    ]
    others = 4 * (split.parts * ROWS + split.groups * sums_size) + 1024
    scratch += split.kept(x.dtype, others)
    out = jax.ShapeDtypeStruct((count, features + rank), x.dtype)
    run = _kernel(norm_forward, out, scratch, count, split, interpret)
    return run(x, factor, a, scaling)


def backward(
    dx_ext: Float[Array, "T K"],
    z: Float[Array, "T R"],
    a: Float[Array, "R D"],
    inner: Float32[Array, " T"],
    x: Float[Array, "T D"],
    factor: Float32[Array, " D"],
    dres: Float[Array, "T D"],
    *,
    eps: float,
    interpret: Any = False,
) -> Float[Array, "T D"]:
    """Computes `dres + i (dh w) - x i^3 mean(dh w x)`, rounded once.

    With `dh = dx_ext[:, :D] + z a`, w the factor and i = 1 / sqrt(mean(x^2) + eps). The
    sum over the features is that of `dx_ext w x` and `inner / i`, so A is read once.

    Args:
      dx_ext: bfloat16 or float16, T a multiple of 16 and D of 128; columns from D on
        are not read.
      z: of the same dtype, R a multiple of 16.
      a: of the same dtype.
      inner: the sum of `z (a y)` of each row, with y the output of the norm.
      x: input of the norm, of the same dtype.
      factor: of each feature.
      dres: added.
      eps: added to the mean of the squares.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The gradient of x, in the dtype of `x`.
    """
    count, features = x.shape
    split = _Split.of(features, 2 if interpret else 4)
    interpreted = bool(interpret)
    read = functools.partial(load, interpret=interpreted)

    def norm_backward(
        dx_ext: Any, z: Any, a: Any, inner: Any, x: Any, factor: Any, dres: Any,
        out: Any, product_s: Any, squares_s: Any, ready: Any, *kept: Any,
    ) -> None:  # fmt: skip
        block = jax.lax.axis_index("block")
        group = jax.lax.axis_index("group")
        rows = pl.ds(block * ROWS, ROWS)
        rows_s = kept[0] if kept else None

        # On its way to L2 while the sums are computed; what is left of 16 rows comes
        # when it is read.
        share = ROWS // split.groups
        mosaic.prefetch(
            dres.at[pl.ds(block * ROWS + group * share, share)], interpret=interpreted
        )

        def values(columns: Any) -> tuple[jax.Array, list[jax.Array]]:
            wide = read(x.at[rows, columns])
            g = read(dx_ext.at[rows, columns])
            return wide, [
                g * load_row(factor.at[columns], interpret=interpreted) * wide,
                wide * wide,
            ]

        product, squares = split.first_pass(
            *(values, rows_s, x.dtype, [product_s, squares_s], ready),
            interpret=interpreted,
        )
        inverse = jax.lax.rsqrt(squares * (1.0 / features) + eps)
        product = product * inverse + load_column(inner.at[rows], interpret=interpreted)
        shrink = across(product * inverse * inverse * (1.0 / features), CHUNK)
        inverse = across(inverse, CHUNK)

        def combine(step: Any, carry: Any) -> Any:
            columns = split.columns(step)
            dh = add_outer(
                read(dx_ext.at[rows, columns]),
                z.at[rows],
                a.at[columns],
                interpret=interpreted,
            )
            wide = split.rows_again(rows_s, x.at[rows], step, read)
            w = load_row(factor.at[columns], interpret=interpreted)
            dx = dh * w * inverse - wide * shrink
            dx = dx + read(dres.at[rows, columns])
            store(out.at[rows, columns], dx.astype(out.dtype), interpret=interpreted)
            return carry

        jax.lax.fori_loop(0, split.chunks, combine, None)

    scratch = [
        plgpu.SMEM((split.parts, ROWS), jnp.float32),
        plgpu.SMEM((split.parts, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=split.groups),
    ]
    scratch += split.kept(x.dtype, 8 * split.parts * ROWS + 1024)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    run = _kernel(norm_backward, out, scratch, count, split, interpret)
    # A by features: the tensor cores take neighbouring numbers along the sum.
    return run(dx_ext, z, a.T, inner, x, factor, dres)


def _kernel(
    body: Any, out: Any, scratch: list[Any], count: int, split: _Split, interpret: Any
) -> Any:
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=tuple(scratch),
        grid=(count // ROWS,),
        grid_names=("block",),
        num_threads=split.groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        **settings,
    )
