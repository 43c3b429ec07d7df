"""Kernels on the devices of a mesh, each of which computes its own rows.

A compiler that divides a program over devices cannot divide a kernel: it would gather
the rows of all devices on each. `by_rows` runs the kernel on every device instead, as
the rows are divided already. How they are is said by whoever has divided them:

    divided = (("data", "fsdp"), ("context",))

is for arrays [B, T, ...] with B over two axes of the mesh and T over a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

Divided = tuple[tuple[str, ...], ...]
"""The axes of the mesh that divide each of the first dimensions of an array of rows."""


def open_devices() -> int:
    """Returns the number of devices that the compiler divides the program over."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(
        n for name, n in mesh.shape.items() if name not in mesh.manual_axes
    )


def mesh_refusals(divided: Divided | None) -> list[str]:
    """Returns why kernels cannot run under the mesh of the trace, as clauses.

    Args:
      divided: as `by_rows` takes it.
    """
    if divided is not None or (count := open_devices()) == 1:
        return []
    return [f"the mesh has {count} devices, and how they divide the rows is not said"]


def own_rows(rows: int, divided: Divided | None) -> int:
    """Returns how many of the rows of all devices each of them has."""
    if divided is None:
        return rows
    mesh = jax.sharding.get_abstract_mesh()
    return rows // math.prod(mesh.shape[name] for axes in divided for name in axes)


def by_rows(
    function: Callable[..., tuple[Any, tuple[Array, ...]]],
    divided: Divided | None,
    rows: tuple[Any, ...],
    shared: tuple[Any, ...] = (),
) -> tuple[Any, tuple[Array, ...]]:
    """Computes `function(*rows, *shared)`, under a mesh on each device of its own rows.

    It has no derivative: use it within the rules of a `jax.custom_vjp`.

    Args:
      function: returns results that are divided as the rows are, and a tuple of sums
        over all rows.
      divided: how the rows are divided; None = one device.
      rows: arrays of rows, or None.
      shared: arrays that every device has as a whole, or None.
    """
    if divided is None:
        return function(*rows, *shared)
    axes = tuple(name for names in divided for name in names)

    def on_device(rows: tuple, shared: tuple) -> tuple[Any, tuple[Array, ...]]:
        results, sums = function(*rows, *shared)
        return results, tuple(jax.lax.psum(each, axes) for each in sums)

    local, whole = PartitionSpec(*divided), PartitionSpec()
    return jax.shard_map(
        on_device,
        in_specs=(local, whole),
        out_specs=(local, whole),
        # What a kernel returns has no type that says on which devices it is the same.
        check_vma=False,
    )(rows, shared)
