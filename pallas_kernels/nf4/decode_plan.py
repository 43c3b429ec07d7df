"""How the products of a decoded token are divided among blocks of threads.

For `pallas_kernels.nf4.decode`: what it can compute, and what it leaves for the linear
layers that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.mosaic import BLOCK, COLUMN, LANES, ROWS, WARPGROUP
from pallas_kernels.nf4.parts import Following, lanes_of

MAX_ROWS = 16
"""Rows that `products` takes at most."""
UNIT = 16
"""Out_features that are computed together: the rows of a product of the tensor cores.
Small units divide evenly among the multiprocessors."""
WARPS = 4
"""Of a warpgroup; they share the in_features of a unit."""
# What a block of threads has on every device since Ampere, and a multiprocessor of
# Hopper for all of its blocks, less what each takes for itself (CUDA C++ Programming
# Guide).
_SHARED_LIMIT, _SHARED_OF_ALL = 99 * 1024, 224 * 1024
_MAX_PART_ROWS = 8
"""Rows of which parts are left: more take too many registers."""
_MAX_PARTS = 160 * 1024 // 4
"""Numbers of all parts that a block of threads reads."""


class Plan(NamedTuple):
    """How `products` is divided."""

    groups: int
    """Warpgroups of a block of threads; they share the in_features."""
    chunk: int
    """Blocks of 64 weights whose codes a thread loads at once."""
    blocks: int
    """Blocks of threads, each with every `blocks`-th unit."""


def plan_for(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    *,
    gated: bool = False,
    columns: tuple[int, int] = (0, 0),
    multiprocessors: int = 132,
    max_groups: int = 8,
) -> Plan | None:
    """Divides the products with weights of one input; None if they cannot be computed.

    Args:
      shapes: (O, I) of each.
      rows: of x.
      gated: whether the two weights are those of a gate and its values.
      columns: of the parts that are read, and of those that are written.
      multiprocessors: of the device.
      max_groups: warpgroups of a block of threads at most.
    """
    if not 0 < rows <= MAX_ROWS or len({shape[1] for shape in shapes}) != 1:
        return None
    if gated and (len(shapes) != 2 or shapes[0] != shapes[1]):
        return None
    blocks = shapes[0][1] // BLOCK
    if shapes[0][1] % BLOCK or any(shape[0] % UNIT for shape in shapes):
        return None
    units = sum(shape[0] // UNIT for shape in shapes) // (2 if gated else 1)
    # Eight warpgroups are 1,024 threads of 64 registers: too few for the sums of more
    # rows, to compute two weights in turn, or to leave more than a number each.
    is_small = rows <= 8 and not gated and rows * columns[1] <= WARPGROUP
    max_groups = min(max_groups, 8 if is_small else 4)
    for groups in (8, 4, 2, 1):
        if groups > max_groups or blocks % (WARPS * groups):
            continue
        shared = _shared_bytes(shapes, rows, groups, gated, columns)
        # Enough threads for a multiprocessor's registers, 128 each where there are few.
        at_once = min(max(4 // groups, 1), _SHARED_OF_ALL // shared)
        if shared <= _SHARED_LIMIT:
            chunk = 1 if blocks // (WARPS * groups) % 2 else 2
            return Plan(groups, chunk, min(at_once * multiprocessors, units))
    return None


def leaves_parts(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    following: Following,
    dtype: DTypeLike,
    *,
    gated: bool = False,
    multiprocessors: int = 132,
) -> bool:
    """Returns whether `products` leaves the parts that what follows needs.

    Where it does not, `pallas_kernels.nf4.inner` computes the sums.

    Args:
      shapes: (O, I) of each weight.
      rows: of x.
      following: what reads the result.
      dtype: of x.
      gated: whether the two weights are those of a gate and its values.
      multiprocessors: of the device.
    """
    if following.squares and jnp.dtype(dtype).name == "float16":
        # x times the norm's weight, not yet divided, could be more than 65504.
        return False
    columns = (0, following.columns)
    named = {"gated": gated, "multiprocessors": multiprocessors}
    plan = plan_for(shapes, rows, columns=columns, **named)
    if plan is None or rows > _MAX_PART_ROWS:
        return False
    # Each multiprocessor reads all of them: at the limit, 22 MB from L2, which takes
    # about as long as to start a kernel.
    return 0 < plan.blocks * rows * following.columns <= _MAX_PARTS


def _shared_bytes(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    groups: int,
    gated: bool,
    columns: tuple[int, int],
) -> int:
    """Returns the shared memory of a block of threads of `products`."""
    # In 4-byte words: the pairs, 32 copies; the tables of 8-bit scales; the scales of
    # each warpgroup; the sums, of two units at a time, of each warpgroup.
    table, quant_maps = 256 * LANES, 256 * len(shapes)
    scales = groups * ROWS * scale_columns(shapes[0][1] // BLOCK, groups)
    padded = -(-rows // 8) * 8
    sums = 2 * (2 if gated else 1) * groups * padded * COLUMN
    read, written = (lanes_of(rows * number) for number in columns)
    # The shares of each warpgroup of what is read, and the totals; the sums of what is
    # written, and two values of each result of a unit.
    parts = (groups + 1) * read + (written and written + 2 * padded * UNIT)
    return 4 * (table + quant_maps + scales + sums + parts)


def scale_columns(blocks: int, groups: int) -> int:
    """Returns a warp's scales of a row: even, to spread over 128 threads."""
    share = blocks // (WARPS * groups)
    return share + share % 2
