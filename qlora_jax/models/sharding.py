"""Placement of arrays: on the devices of a mesh, and in device or host memory.

A mesh has the axes "data", which divides the rows of the batch and replicates weights,
and "fsdp", which divides both. One rule covers every array of a training step:

  batch      [A, B, T]          B over data and fsdp
  weights    [L, O, ...]        their rows O over fsdp, packed ones too: the codes and
             [V, D]             the block scales of a row stay together
  adapters,  [L, R, I] A        their long axis over fsdp
  moments    [L, O, R] B

Small arrays (norms, tables of quantization constants, scalars) are replicated.

The memory of an array is part of its JAX type, so no configuration reaches the model: a
step copies an array that it receives in host memory to the device where it is used
(`on_device`), and gathers the shards of a weight there (`gather_shared`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.errors import UserError
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, Path

AXES = ("data", "fsdp")

# Below this an array is not worth a collective: a norm's weights of all
# layers are 0.3 MB in an 8B model and 1.3 MB in one of 70B.
_SMALL_BYTES = 2 << 20


def check_mesh(shape: Mapping[str, int], batch_size: int) -> None:
    """Raises if a mesh does not divide the batch.

    Args:
      shape: sizes of the axes "data" and "fsdp".
      batch_size: rows of a micro-batch, over all devices.

    Raises:
      UserError: an unknown axis, a size below 1, or rows that the devices do not
        divide.
    """
    for name, size in shape.items():
        if name not in AXES:
            raise UserError(f"a mesh has the axes {' and '.join(AXES)}, got `{name}`.")
        if size < 1:
            raise UserError(f"mesh: `{name}` must be at least 1, got {size}.")
    devices = math.prod(shape.values())
    if batch_size % devices:
        axes = " x ".join(f"{name} {size}" for name, size in shape.items())
        nearest = -(-batch_size // devices) * devices
        raise UserError(
            f"`batch_size`={batch_size} must be a multiple of the {devices} devices of "
            f"the mesh ({axes}). The batch size counts the rows of all devices; "
            f"{nearest} would do."
        )


def shard_step(
    arguments: tuple[Any, Any, Any],
    mesh: Any,
    on_host: Collection[Path] = (),
) -> tuple[Any, Any, Any]:
    """Returns the shapes of (state, base, batch) with their shardings on a mesh.

    Args:
      arguments: `planning.step.abstract_arguments`.
      mesh: with axes among "data" and "fsdp".
      on_host: modules of the base whose weights are in pinned host memory.

    Raises:
      UserError: a large array has no axis that the mesh divides.
    """
    state, base, batch = arguments
    # Both axes divide the rows: a device computes its own rows from start to end.
    rows = tuple(name for name in AXES if name in mesh.shape)
    return (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: _shard_weight(path, leaf, mesh), state
        ),
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: _shard_weight(path, leaf, mesh, on_host), base
        ),
        # [A, B, T]: micro-batches come one after another, so A is not divided.
        jax.tree.map(lambda leaf: _with_sharding(leaf, mesh, (None, rows)), batch),
    )


def _with_sharding(
    leaf: Any, mesh: Any, axes: tuple[Any, ...], kind: str | None = None
) -> jax.ShapeDtypeStruct:
    # A concrete mesh of described devices has no memories: JAX would silently ignore
    # the kind. An abstract mesh keeps it.
    mesh = mesh if kind is None else mesh.abstract_mesh
    sharding = NamedSharding(mesh, PartitionSpec(*axes), memory_kind=kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shard_weight(
    path: tuple, leaf: Any, mesh: Any, on_host: Collection[Path] = ()
) -> jax.ShapeDtypeStruct:
    keys = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    kind = "pinned_host" if any(keys[: len(p)] == p for p in on_host) else None
    parts = mesh.shape.get("fsdp", 1)
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if parts == 1 or size < _SMALL_BYTES:
        return _with_sharding(leaf, mesh, (), kind)
    if len(leaf.shape) == 1:  # scales of 8-bit moments, a sixty-fourth of their codes
        return _with_sharding(leaf, mesh, (), kind)
    if keys[-1] == "codes" and keys[-2].startswith("lora_"):
        keys = keys[:-1]  # 8-bit moments have the shape of their array
    # Not the axis of layers: the scan takes one layer at a time, which a single device
    # would then hold alone.
    first = 1 if all(part in keys for part in LAYERS) else 0
    # The rows of a packed or dense weight, but the long axis of an adapter's pair: R
    # may be smaller than the mesh.
    axis = first
    if keys[-1].startswith("lora_"):
        axis = max(range(first, len(leaf.shape)), key=lambda i: leaf.shape[i])
    # JAX refuses uneven shards of an argument; this message names the setting.
    if leaf.shape[axis] % parts:
        raise UserError(
            f"mesh: fsdp={parts} does not divide {'.'.join(keys)} of shape "
            f"{leaf.shape} along axis {axis} ({leaf.shape[axis]}). Choose a divisor of "
            f"{leaf.shape[axis]}."
        )
    return _with_sharding(leaf, mesh, (*[None] * axis, "fsdp"), kind)


def put_base(
    base: Mapping[str, Any], *, embed_tokens: str = "device", lm_head: str = "device"
) -> dict[str, Any]:
    """Moves a base tree to the device, except tables to be kept on the host.

    Args:
      base: parameter tree of numpy or jax arrays.
      embed_tokens: "host" keeps the embedding table in (pinned) host memory.
      lm_head: "host" keeps an untied output head there.

    Returns:
      The tree as jax arrays.
    """
    memories = {EMBEDDING: embed_tokens, HEAD: lm_head}

    def move(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            module = (*path, name)
            if memories.get(module) == "host":
                out[name] = jax.device_put(value, jax.memory.Space.Host)
            elif isinstance(value, Mapping):
                out[name] = move(value, module)
            else:
                out[name] = jax.tree.map(jnp.asarray, value)
        return out

    return move(base, ())


def on_device(tree: Any) -> Any:
    """Copies arrays in host memory to the device; others are returned unchanged.

    Inside a jitted function the copy is a temporary: it takes memory from its first use
    to its last.

    Args:
      tree: of arrays, in a jitted function or outside.
    """

    def copy(leaf: Any) -> Any:
        if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
            return jax.device_put(leaf, jax.memory.Space.Device)
        return leaf

    return jax.tree.map(copy, tree)


def gather_shared(tree: Any) -> Any:
    """Gathers weights that are divided over "fsdp" on every device.

    Packed weights are gathered packed: half a byte a weight. Without this constraint
    XLA's partitioner gathers activations as well, which are many times larger.

    Args:
      tree: weights of a layer, in a jitted function traced under a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree
    # No axis is divided: every device has the whole weight.
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, replicated), tree
    )


def is_on_host(leaf: Any) -> bool:
    """Returns whether an array, or a shape with a sharding, is in host memory."""
    kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
    return kind in ("pinned_host", "unpinned_host")


def local_bytes(leaf: Any) -> int:
    """Returns the bytes of an array, or of a sharded shape, on each of its devices."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
