"""Placement of arrays: on the devices of a mesh, and in device or host memory.

A mesh has the axes "data", which divides the rows of the batch and replicates weights,
"fsdp", which divides both, and "context", which divides the tokens of each row. One
table covers every array of a training step:

  batch       [A, B, T]          B over data and fsdp
  weights     [L, O, ...]        their rows O over fsdp, packed ones too: the codes and
              [V, D]             the block scales of a row stay together
  adapters    [L, R, I] A        their long axis over fsdp
              [L, O, R] B
  moments                        as the parameter they belong to
  all others                     replicated: norms, biases, tables of quantization
                                 constants, scalars

The memory of an array is part of its JAX type, so no configuration reaches the model: a
step copies an array that it receives in host memory to the device where it is used
(`on_device`), and gathers the shards of a weight there (`gather_shared`). The mesh
comes from the context that the program is traced in (`traced_on`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.rows import Divided
from qlora_jax.errors import UserError
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, Path

AXES = ("data", "fsdp", "context")
ROWS = ("data", "fsdp")
"""The axes that divide the rows of a batch."""

# An array that fsdp does not divide is replicated below this size, and refused above:
# it is most of what fsdp is to save.
_LARGE_BYTES = 2 << 20


# --- Meshes ---


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
    """Arranges devices so that "context" and "fsdp" stay within a node where they fit.

    Collectives of these axes move most, and the links within a node are ten times as
    fast as those between nodes. The nodes are the processes.

    Args:
      sizes: of the axes; those that are missing have size 1.
      devices: default all of every process.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or an axis would
        be divided unevenly over the nodes.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [sizes.get(name, 1) for name in AXES]
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh: {_product(sizes)} are {math.prod(shape)} devices, and there are "
            f"{len(devices)}."
        )
    nodes = len({device.process_index for device in devices})
    inner, outer = divide_over_nodes(sizes, nodes)
    if nodes == 1:
        array = mesh_utils.create_device_mesh(tuple(inner.values()), devices)
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            tuple(inner.values()),
            tuple(outer.values()),
            devices,
            process_is_granule=True,
        )
    # Axes that GSPMD divides by itself ("auto"), which `jax.make_mesh` is moving from.
    return Mesh(array, AXES)


def divide_over_nodes(
    sizes: Mapping[str, int], nodes: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the sizes of a mesh's axes within a node, and over the nodes.

    Raises:
      UserError: the nodes have no equal part of the mesh.
    """
    inner: dict[str, int] = {name: sizes.get(name, 1) for name in AXES}
    outer: dict[str, int] = {name: 1 for name in AXES}
    # The rows are divided over the nodes first, and the context never: its keys and
    # values are gathered in every layer.
    for name in ROWS:
        outer[name] = math.gcd(inner[name], nodes // math.prod(outer.values()))
        inner[name] //= outer[name]
    if math.prod(outer.values()) != nodes:
        raise UserError(
            f"mesh: {_product(sizes)} cannot be divided over {nodes} nodes: data x "
            f"fsdp must be a multiple of {nodes}. `context` stays within a node."
        )
    return inner, outer


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def check_mesh(
    shape: Mapping[str, int], batch_size: int, name: str = "batch_size"
) -> None:
    """Raises if a mesh does not divide the batch.

    Args:
      shape: sizes of the axes.
      batch_size: rows of a micro-batch, over all devices.
      name: of the setting.

    Raises:
      UserError: an unknown axis, a size below 1, or rows that the devices do not
        divide.
    """
    for axis, size in shape.items():
        if axis not in AXES:
            raise UserError(
                f"a mesh has the axes {', '.join(AXES[:-1])} and {AXES[-1]}, got "
                f"`{axis}`."
            )
        if size < 1:
            raise UserError(f"mesh: `{axis}` must be at least 1, got {size}.")
    parts = math.prod(shape.get(axis, 1) for axis in ROWS)
    if batch_size % parts:
        axes = {axis: shape[axis] for axis in ROWS if axis in shape}
        nearest = -(-batch_size // parts) * parts
        raise UserError(
            f"`{name}`={batch_size} must be a multiple of the {parts} parts that the "
            f"mesh divides the rows into ({_product(axes)}). It counts the rows of all "
            f"devices; {nearest} would do."
        )


def traced_on(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a program for a mesh is traced; None = one device.

    Args:
      mesh: with devices, or abstract.
    """
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh))


# --- The table ---


def shard_step(
    arguments: tuple[Any, Any, Any],
    mesh: Any,
    on_host: Collection[Path] = (),
) -> tuple[Any, Any, Any]:
    """Returns the shapes of (state, base, batch) with their shardings on a mesh.

    Args:
      arguments: `planning.step.abstract_arguments`.
      mesh: with axes among `AXES`.
      on_host: modules of the base whose weights are in pinned host memory.

    Raises:
      UserError: fsdp does not divide a large array.
    """
    state, base, batch = arguments
    trained = {
        _keys(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.adapters)
    }

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        keys = _keys(path)
        for length in range(len(keys)):
            # A moment's path ends with that of its parameter.
            if trained.get(keys[length:], trained.get(keys[length:-1])) == leaf.shape:
                return _shard_weight(keys, leaf, mesh)
        return _with_sharding(leaf, mesh, ())

    return (
        jax.tree_util.tree_map_with_path(place, state),
        shard_base(base, mesh, on_host),
        shard_batch(batch, mesh),
    )


def shard_base(base: Any, mesh: Any, on_host: Collection[Path] = ()) -> Any:
    """Returns the shapes of a base with their shardings; see `shard_step`."""

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        keys = _keys(path)
        kind = "pinned_host" if any(keys[: len(p)] == p for p in on_host) else None
        return _shard_weight(keys, leaf, mesh, kind)

    return jax.tree_util.tree_map_with_path(place, base)


def shard_batch(batch: Any, mesh: Any) -> Any:
    """Returns the shapes of a batch [A, B, T] or [B, T] with their shardings."""
    # Both axes divide the rows: a device computes its own rows from start to end.
    rows = tuple(name for name in ROWS if name in mesh.shape)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        # Micro-batches come one after another, so A is not divided.
        return _with_sharding(leaf, mesh, (*[None] * (len(leaf.shape) - 2), rows))

    return jax.tree.map(place, batch)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _with_sharding(
    leaf: Any, mesh: Any, axes: tuple[Any, ...], kind: str | None = None
) -> jax.ShapeDtypeStruct:
    # A concrete mesh of described devices has no memories: JAX would silently ignore
    # the kind. An abstract mesh keeps it.
    mesh = mesh if kind is None else getattr(mesh, "abstract_mesh", mesh)
    sharding = NamedSharding(mesh, PartitionSpec(*axes), memory_kind=kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shard_weight(
    keys: tuple[str, ...], leaf: Any, mesh: Any, kind: str | None = None
) -> jax.ShapeDtypeStruct:
    parts = mesh.shape.get("fsdp", 1)
    # Not the axis of layers: the scan takes one layer at a time, which a single device
    # would then hold alone.
    first = 1 if all(part in keys for part in LAYERS) else 0
    is_matrix = len(leaf.shape) == first + 2
    if parts == 1 or not is_matrix or keys[-1] == "trainable_tokens_delta":
        return _with_sharding(leaf, mesh, (), kind)
    if keys[-1] == "codes" and keys[-2].startswith("lora_"):
        keys = keys[:-1]  # 8-bit moments have the shape of their array
    # The rows of a packed or dense weight, but the long axis of an adapter's pair: R
    # may be smaller than the mesh.
    axis = first
    if keys[-1].startswith(("lora_", "residual_")):
        axis = max(range(first, len(leaf.shape)), key=lambda i: leaf.shape[i])
    if leaf.shape[axis] % parts == 0:
        return _with_sharding(leaf, mesh, (*[None] * axis, "fsdp"), kind)
    if math.prod(leaf.shape) * leaf.dtype.itemsize < _LARGE_BYTES:
        return _with_sharding(leaf, mesh, (), kind)
    # JAX refuses uneven shards of an argument; this message names the setting.
    raise UserError(
        f"mesh: fsdp={parts} does not divide {'.'.join(keys)} of shape {leaf.shape} "
        f"along axis {axis} ({leaf.shape[axis]}). Choose a divisor of "
        f"{leaf.shape[axis]}."
    )


# --- Arrays ---


def put_on_mesh(tree: Any, shapes: Any, mesh: Mesh) -> Any:
    """Places host arrays, which every process has as a whole, on the devices of a mesh.

    Args:
      tree: of arrays, numpy or of one device.
      shapes: its shapes with shardings, as `shard_step` returns them.
      mesh: with the devices.
    """

    def put(leaf: Any, shape: Any) -> jax.Array:
        kind = shape.sharding.memory_kind
        sharding = NamedSharding(mesh, shape.sharding.spec, memory_kind=kind)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = put(jax.random.key_data(leaf), shape)
            return jax.jit(
                functools.partial(
                    jax.random.wrap_key_data, impl=jax.random.key_impl(leaf)
                )
            )(words)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    return jax.tree.map(put, tree, shapes)


def to_host(tree: Any) -> Any:
    """Copies a tree to numpy arrays, whole in every process.

    A collective where devices of several processes share an array: every process has
    to call it.
    """

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                leaf = _replicate(leaf)
            return np.asarray(leaf.addressable_data(0))
        return jax.device_get(leaf)

    # One after another: a single array is replicated at a time.
    return jax.tree.map(fetch, tree)


def _replicate(array: jax.Array) -> jax.Array:
    sharding = NamedSharding(array.sharding.mesh, PartitionSpec())  # pyright: ignore[reportAttributeAccessIssue]
    return jax.jit(lambda x: x, out_shardings=sharding)(array)


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


def local_shape(rows: int, length: int) -> tuple[int, int]:
    """Returns the rows and tokens of each row that a device of the mesh has.

    Call it while a function is traced: what limits memory by a number of tokens counts
    those of one device, not of all of them.

    Args:
      rows: of the batch, on all devices.
      length: tokens of a row.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape.get(name, 1) for name in ROWS)
    return -(-rows // devices), -(-length // row_devices())


def row_devices() -> int:
    """Returns how many devices share a row under the mesh of the trace."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def row_axes() -> tuple[str, ...]:
    """Returns the axes of the mesh of the trace that divide the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in ROWS if name in mesh.shape)


def divided_rows(x: Array) -> Divided | None:
    """Returns how the devices of the mesh of the trace divide an array [B, T, ...].

    As `pallas_kernels.rows` takes it: None for one device. Rows that the devices do not
    divide, such as those of a sample, are the same on all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    axes = row_axes()
    if x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        axes = ()
    return axes, ("context",) if row_devices() > 1 else ()


def pad_chunks(x: Array, chunks: int, fill: float = 0) -> Array:
    """Pads rows [B, T, ...] so that `cut_chunks` can cut them.

    Args:
      x: B may be divided over "data" and "fsdp", T over "context".
      chunks: their number.
      fill: value of the padding, which is at the end of what each device has of a row.
    """
    rows, length, *features = x.shape
    parts = row_devices()
    pad = -(length // parts) % chunks
    widths = ((0, 0), (0, pad), *((0, 0),) * len(features))
    if parts == 1:
        return jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(rows, parts, length // parts, *features)
    x = jnp.pad(x, ((0, 0), *widths), constant_values=fill)
    return x.reshape(rows, length + parts * pad, *features)


def cut_chunks(x: Array, chunks: int) -> Array:
    """Cuts padded rows [B, T, ...] into chunks [n, B, c, ...], for a scan over n.

    A chunk is a part of what each device has, so all devices work on every chunk.
    """
    rows, length, *features = x.shape
    parts, size = row_devices(), length // chunks
    if parts == 1:
        # [B, n c, ...] -> [n, B, c, ...]: the scan goes over the leading axis.
        return x.reshape(rows, chunks, size, *features).swapaxes(0, 1)
    # [B, p n c, ...] -> [n, B, p c, ...]: the parts of a row stay on their devices.
    x = x.reshape(rows, parts, chunks, size // parts, *features)
    return jnp.moveaxis(x, 2, 0).reshape(chunks, rows, size, *features)


def join_chunks(chunks: Array, length: int) -> Array:
    """Joins what `cut_chunks` cut into [B, T, ...], without the padding.

    Args:
      chunks: [n, B, c, ...].
      length: T.
    """
    number, rows, size, *features = chunks.shape
    parts = row_devices()
    if parts == 1:
        x = chunks.swapaxes(0, 1).reshape(rows, number * size, *features)
        return x[:, :length]
    x = jnp.moveaxis(chunks.reshape(number, rows, parts, -1, *features), 0, 2)
    x = x.reshape(rows, parts, number * size // parts, *features)
    return x[:, :, : length // parts].reshape(rows, length, *features)


def is_on_host(leaf: Any) -> bool:
    """Returns whether an array, or a shape with a sharding, is in host memory."""
    kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
    return kind in ("pinned_host", "unpinned_host")


def local_bytes(leaf: Any) -> int:
    """Returns the bytes of an array, or of a sharded shape, on each of its devices."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
