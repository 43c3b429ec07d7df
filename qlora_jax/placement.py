"""Which memory an array lies in: the device's, or the host's, from where it is fetched.

The memory of an array is part of its type, so nothing has to be told: what a step finds
in the host's memory it copies to the device where it is used (`on_device`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


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
