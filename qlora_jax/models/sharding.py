"""Where each array of a training step lies on a mesh of devices.

A mesh has two axes, named as everywhere: over "data" rows of the batch are divided and
weights repeated; over "fsdp" both are divided. One rule for all of them:

  batch      [A, B, T]          B over data and fsdp
  weights    [L, O, ...]        their rows O over fsdp, packed ones too: the codes and
             [V, D]             the block scales of a row stay together
  adapters,  [L, R, I] A        their long axis over fsdp
  moments    [L, O, R] B

Small arrays (norms, tables of quantization constants, scalars) are repeated.

Which memory an array lies in: the device's, or the host's, from where it is fetched.

The memory of an array is part of its type, so nothing has to be told: what a step finds
in the host's memory it copies to the device where it is used (`on_device`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.errors import UserError
from qlora_jax.tree import LAYERS, Path

AXES = ("data", "fsdp")

# Below this an array is not worth a collective of its own: a norm's weights of all
# layers are 0.3 MB in an 8B model and 1.3 MB in one of 70B.
_SMALL_BYTES = 2 << 20


def check_mesh(shape: Mapping[str, int], batch_size: int) -> None:
    """Refuses a mesh that does not divide the batch.

    Args:
      shape: sizes of the axes "data" and "fsdp".
      batch_size: rows of a micro-batch, of all devices together.

    Raises:
      UserError: an axis of another name, a size below 1, or rows that do not come out
        even.
    """
    for name, size in shape.items():
        if name not in AXES:
            raise UserError(
                f"a mesh has the axes {' and '.join(AXES)}; `{name}` is none of them."
            )
        if size < 1:
            raise UserError(f"mesh: `{name}` must be at least 1, got {size}.")
    devices = math.prod(shape.values())
    if batch_size % devices:
        axes = " x ".join(f"{name} {size}" for name, size in shape.items())
        nearest = -(-batch_size // devices) * devices
        raise UserError(
            f"`batch_size`={batch_size} is no multiple of the {devices} devices of the "
            f"mesh ({axes}): each takes whole rows. The batch size counts the rows of "
            f"all devices; {nearest} would do."
        )


def place(
    arguments: tuple[Any, Any, Any],
    mesh: Any,
    on_host: Collection[Path] = (),
) -> tuple[Any, Any, Any]:
    """Gives the shapes of (state, base, batch) their shardings on a mesh.

    Args:
      arguments: `step_memory.abstract_arguments`.
      mesh: with axes among "data" and "fsdp".
      on_host: modules of the base whose weights lie in pinned host memory.

    Raises:
      UserError: a large array has no axis that the mesh divides.
    """
    state, base, batch = arguments
    rows = tuple(name for name in AXES if name in mesh.shape)
    return (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: _weight(path, leaf, mesh), state
        ),
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: _weight(path, leaf, mesh, on_host), base
        ),
        jax.tree.map(lambda leaf: _put(leaf, mesh, (None, rows)), batch),
    )


def lies_on_host(leaf: Any) -> bool:
    """Whether an array, or a shape with a sharding, is in the host's memory."""
    kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
    return kind in ("pinned_host", "unpinned_host")


def local_bytes(leaf: Any) -> int:
    """Bytes of an array, or of a shape with a sharding, on each device that has it."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _put(
    leaf: Any, mesh: Any, axes: tuple[Any, ...], kind: str | None = None
) -> jax.ShapeDtypeStruct:
    # Devices that are not there have no memories to choose from: of their mesh itself,
    # JAX would silently take the kind for None.
    where = mesh if kind is None else mesh.abstract_mesh
    sharding = NamedSharding(where, PartitionSpec(*axes), memory_kind=kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _weight(
    path: tuple, leaf: Any, mesh: Any, on_host: Collection[Path] = ()
) -> jax.ShapeDtypeStruct:
    keys = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    kind = "pinned_host" if any(keys[: len(p)] == p for p in on_host) else None
    parts = mesh.shape.get("fsdp", 1)
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if parts == 1 or size < _SMALL_BYTES:
        return _put(leaf, mesh, (), kind)
    if len(leaf.shape) == 1:  # scales of moments in 8 bits, a sixty-fourth of these
        return _put(leaf, mesh, (), kind)
    if keys[-1] == "codes" and keys[-2].startswith("lora_"):  # such a moment: as it is
        keys = keys[:-1]
    stacked = all(part in keys for part in LAYERS)
    first = 1 if stacked else 0
    # Rows of a packed or dense weight come first; of an adapter's pair the long axis.
    axis = first
    if keys[-1].startswith("lora_"):
        axis = max(range(first, len(leaf.shape)), key=lambda i: leaf.shape[i])
    if leaf.shape[axis] % parts:
        raise UserError(
            f"mesh: fsdp={parts} does not divide {'.'.join(keys)} of shape "
            f"{leaf.shape} along axis {axis} ({leaf.shape[axis]}). Choose a divisor of "
            f"{leaf.shape[axis]}."
        )
    return _put(leaf, mesh, (*[None] * axis, "fsdp"), kind)


def on_device(tree: Any) -> Any:
    """Copies what lies in the host's memory to the device; the rest stays as it is.

    Inside a jitted function the copy is a temporary: it takes no memory before its
    first use and after its last.

    Args:
      tree: of arrays, in a jitted function or outside.
    """

    def one(leaf: Any) -> Any:
        if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
            return jax.device_put(leaf, jax.memory.Space.Device)
        return leaf

    return jax.tree.map(one, tree)


def gathered(tree: Any) -> Any:
    """Brings weights that devices share ("fsdp") together on each of them.

    Packed weights travel packed: half a byte a weight. Left to itself, XLA's
    partitioner gathers the activations as well, which are many times larger.

    Args:
      tree: weights of a layer, in a jitted function traced under a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), tree
    )


def place_base(
    base: Mapping[str, Any], *, embed_tokens: str = "device", lm_head: str = "device"
) -> dict[str, Any]:
    """Moves a base tree to the device, but for tables that are to stay on the host.

    Args:
      base: parameter tree of numpy or jax arrays.
      embed_tokens: "host" keeps the embedding table in (pinned) host memory.
      lm_head: "host" keeps the output head there, where the model has its own.

    Returns:
      The tree as jax arrays.
    """
    places = {("model", "embed_tokens"): embed_tokens, ("lm_head",): lm_head}

    def move(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            here = (*path, name)
            if places.get(here) == "host":
                out[name] = jax.device_put(value, jax.memory.Space.Host)
            elif isinstance(value, Mapping):
                out[name] = move(value, here)
            else:
                out[name] = jax.tree.map(jnp.asarray, value)
        return out

    return move(base, ())
