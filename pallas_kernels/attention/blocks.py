"""What the attention kernels share: how blocks are copied, masked and multiplied.

A block of threads is `GROUPS` warpgroups that compute and one that copies. The parts of
a kernel's body: `Ring` brings one block of the other side after the other, `masked`
hides what a query may not see, `products` and `add_products` use the tensor cores.

Imported only when a kernel is used; written for and checked with jax 0.11.2 and 0.12.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.reach import GROUPS

MASKED = -(2.0**100)
"""Large and negative but finite, and a power of two: its product with any scale is
exact, so that two masked scores differ by nothing however they are rounded."""
LOG2E = math.log2(math.e)
"""exp2 is one instruction; scores are scaled by this so that it gives exp."""

# Of a thread, in multiples of 8: 65,536 of a multiprocessor, 512 for one thread of each
# warpgroup, less what the first instructions take.
_COMPUTING_REGISTERS, _COPYING_REGISTERS = 240, 24


class Tiles(NamedTuple):
    """How a kernel goes over the other side."""

    width: int
    """Rows of the other side that a step takes: 64 or 128."""
    stages: int
    """Steps whose operands are in shared memory at once, at least 2."""


class Form(NamedTuple):
    """How scores follow from products q k^T."""

    scale: float
    """Factor of the scores, after the cap if there is one."""
    slope: float
    """Factor of the derivative with respect to q and k."""
    inner: float | None
    """Factor of the products within tanh; None = no cap."""

    @classmethod
    def of(cls, width: int, scale: float | None, softcap: float | None) -> Form:
        """Returns the form for heads of a width; as `forward` takes the others."""
        scale = 1.0 / math.sqrt(width) if scale is None else scale
        if softcap is None:
            return cls(scale, scale, None)
        # c tanh(scale q k / c): the cap itself becomes the factor.
        return cls(softcap, scale, scale / softcap)

    def cap(self, products: jax.Array) -> jax.Array:
        """Returns what `scale` multiplies to scores."""
        return products if self.inner is None else jnp.tanh(products * self.inner)

    def through_cap(self, dscores: jax.Array, capped: jax.Array) -> jax.Array:
        """Returns the derivative before the cap; `capped` may be masked."""
        if self.inner is None:
            return dscores
        # A masked score is far outside of the range of tanh, and its square infinite.
        slope = jnp.where(capped < -1.5, 0.0, 1.0 - capped * capped)
        return dscores * slope


# --- Warpgroups and copies ---


def launch(
    copy: Callable[..., None],
    compute: Callable[..., None],
    out: Any,
    scratch: list[Any],
    *,
    name: str,
    grid: dict[str, int],
    interpret: Any,
) -> Any:
    """Makes a kernel of `GROUPS` warpgroups that compute and one that copies.

    Args:
      copy: body of the warpgroup that copies; gets all references.
      compute: body of the others; gets the references and its number.
      out: shapes of the results.
      scratch: shared memory and barriers.
      name: of the kernel.
      grid: sizes of the axes; the last one runs first.
      interpret: False, or what `plgpu.kernel` takes.
    """

    def body(*refs: Any) -> None:
        group = jax.lax.axis_index("group")

        @pl.when(group < GROUPS)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
            compute(group, *refs)

        @pl.when(group == GROUPS)
        def _() -> None:
            plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
            copy(*refs)

    body.__name__ = name
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=tuple(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS + 1,
        thread_name="group",
        # Exponentials as `ex2.approx`. Lane semantics takes the layouts given above;
        # the default since jax 0.11 infers them.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        **settings,
    )


class Ring(NamedTuple):
    """Buffers in shared memory for the operands of some steps, and their barriers."""

    buffers: tuple[Any, ...]
    """[slots, ...] each: all that a step has."""
    ready: Any
    """Passed when the copies into the slot are complete."""
    free: Any
    """Passed when every warpgroup that computes has released the slot."""

    @classmethod
    def of(cls, stages: int, *buffers: Any, arrivals: int | None = None) -> Ring:
        """Returns the scratch of a ring for buffers [stages, ...].

        Args:
          stages: slots.
          buffers: each takes one copy a step.
          arrivals: copies a step, if the only buffer takes several, one after another.
        """
        return cls(
            buffers,
            plgpu.Barrier(num_arrivals=arrivals or len(buffers), num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        )

    def slot(self, step: Any) -> Any:
        """Returns the slot of a step."""
        return jax.lax.rem(step, self.buffers[0].shape[0])

    def copy(self, step: Any, *sources: Any) -> None:
        """Starts the copies of a step, once its slot is free."""
        slot = self.slot(step)

        @pl.when(step >= self.buffers[0].shape[0])
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        targets = [buffer.at[slot] for buffer in self.buffers]
        if len(sources) > len(targets):
            targets = [targets[0].at[i] for i in range(len(sources))]
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source, target, self.ready.at[slot])

    def at(self, step: Any) -> list[Any]:
        """Returns the operands of a step that has been waited for."""
        slot = self.slot(step)
        return [buffer.at[slot] for buffer in self.buffers]

    def wait(self, step: Any) -> list[Any]:
        """Waits for the operands of a step and returns them."""
        plgpu.barrier_wait(self.ready.at[self.slot(step)])
        return self.at(step)

    def release(self, step: Any, *, interpret: bool) -> None:
        """Gives the slot of a step back: this warpgroup has read it."""
        if interpret:
            # It demands a fence between a load and a copy to the same address. A device
            # needs none: a load is over when its thread arrives.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


class Turns(NamedTuple):
    """Lets one warpgroup after the other start products.

    While those of one are computed, the other computes weights.
    """

    turn: Any
    """A barrier for each warpgroup."""
    group: Any

    def wait(self) -> None:
        """Waits until the other warpgroup has started its products."""
        plgpu.barrier_wait(self.turn.at[self.group])

    def give(self) -> None:
        """Lets the other warpgroup start."""
        plgpu.barrier_arrive(self.turn.at[1 - self.group])

    def begin(self) -> None:
        """Gives the first turn to the first warpgroup."""
        pl.when(self.group == 1)(self.give)

    def end(self) -> None:
        """Takes the turn that nobody needs, so that every barrier has been passed."""
        pl.when(self.group == 0)(self.wait)


# --- Masks ---


def masked(
    scores: jax.Array,
    rows: list[jax.Array],
    columns: Any,
    window: Any,
    *,
    transposed: bool,
) -> jax.Array:
    """Hides what a query may not see: later keys, distant ones, other segments.

    Indices are read from memory like the ids. Counted by the threads they would not
    change from step to step, and the compiler would keep them in registers, of which
    there are none to spare.

    Args:
      scores: float32 [queries, keys], or with `transposed` [keys, queries].
      rows: int32, the index and perhaps the segment id of each row.
      columns: the same of the columns, in memory [1 or 2, columns].
      window: keys that a query sees, itself included; None = all before it.
      transposed: whether the keys come first.

    Returns:
      The scores, `MASKED` where hidden.
    """

    def repeated(mark: int) -> tuple[jax.Array, jax.Array]:
        """The marks of all queries and keys."""
        columns_of = across(vector(columns.at[mark], 1), scores.shape, 1)
        rows_of = across(rows[mark], scores.shape)
        return (columns_of, rows_of) if transposed else (rows_of, columns_of)

    queries, keys = repeated(0)
    scores = jnp.where(queries >= keys, scores, MASKED)
    if window is not None:
        scores = jnp.where(queries - window < keys, scores, MASKED)
    if len(rows) > 1:
        # Or all comparisons would come first, and their operands wait in registers.
        scores = jax.lax.optimization_barrier(scores)
        queries, keys = repeated(1)
        scores = jnp.where(queries == keys, scores, MASKED)
    return scores


# --- The tensor cores ---

_WGMMA = plgpu.Layout.WGMMA
_SUMS: Any = plgpu.WGMMAAccumulatorRef
_LOAD: Any = plgpu.load  # jax 0.10, which has no kernels, declares other arguments


def products(
    *pairs: tuple[Any, Any], started: Callable[[], None] | None = None
) -> tuple[jax.Array, ...]:
    """Computes `a @ b` for each pair in shared memory, in float32.

    Args:
      pairs: the operands.
      started: called when all are started, before the first is waited for.
    """

    def multiply(*sums: Any) -> tuple[jax.Array, ...]:
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, b)
        if started is not None:
            started()
        # Reading an accumulator waits for its products.
        return tuple(total[...] for total in sums)

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(multiply, *(_SUMS(s, jnp.float32) for s in shapes))


def add_products(
    *terms: tuple[jax.Array, Any, Any],
    interpret: bool,
    started: Callable[[], None] | None = None,
    first_done: Callable[[], None] | None = None,
) -> tuple[jax.Array, ...]:
    """Computes `sums + a @ b` for each (sums, a, b), one after the other.

    Args:
      terms: `a` is in registers or in shared memory, `b` in shared memory. One in
        registers comes first: registers are handed over before anything is started.
      interpret: whether the interpreter runs the kernel.
      started: called when all are started, before the first is waited for.
      first_done: called when the operands of the first have been read.
    """
    if interpret:
        # It has no product with an operand in registers: an ordinary one replaces it.
        results = tuple(
            sums + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
            if isinstance(a, jax.Array)
            else sums + products((a, b))[0]
            for sums, a, b in terms
        )
        for call in (started, first_done):
            if call is not None:
                call()
        return results

    def multiply(sums: tuple[Any, ...]) -> None:
        for total, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(total, a, b)
        if started is not None:
            started()
        if first_done is not None:
            plgpu.wgmma_wait(len(terms) - 1)
            first_done()

    return pl.run_state(multiply)(tuple(_SUMS.init(sums) for sums, _, _ in terms))


def zeros(rows: int, columns: int) -> jax.Array:
    """Returns sums to add products to."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), _WGMMA)


def full(rows: int, value: float) -> jax.Array:
    """Returns a float32 number for each row of a product."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), _WGMMA.reduce(1))


def vector(ref: Any, axis: int) -> jax.Array:
    """Loads a number for each row (axis 0) or column (axis 1) of a product."""
    return _LOAD(ref, layout=_WGMMA.reduce(1 - axis), optimized=False)


def across(x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """Repeats a number for each row (axis 0) or column (axis 1)."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def opaque(number: Any) -> Any:
    """Returns a number of which the compiler does not know that it never changes.

    What it computes from the number within a loop stays there: kept through all steps,
    the addresses of operands would take registers that sums need.
    """
    return jax.lax.optimization_barrier(number)
