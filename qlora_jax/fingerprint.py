"""One short text that says which base weights these are.

An adapter, a checkpoint of a run and a report carry the fingerprint of the base they
belong to, so that continuing on another base is noticed. It covers each leaf's place in
the tree, dtype, shape and bytes, and is the same for numpy and jax arrays.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from typing import Any

import jax
import numpy as np

from qlora_jax.nf4 import NF4Tensor


def fingerprint_tree(tree: Any) -> str:
    """Computes BLAKE2b-256 over every leaf's path, dtype, shape and bytes.

    Args:
      tree: arrays and `NF4Tensor`s, on the host or on devices.

    Returns:
      64 hexadecimal digits.
    """
    whole = hashlib.blake2b(digest_size=32)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, NF4Tensor)
    )
    leaves: list[tuple[str, Any]] = []
    for path, leaf in flat:
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, NF4Tensor):
            for f in dataclasses.fields(leaf):
                value = getattr(leaf, f.name)
                if isinstance(value, np.ndarray | jax.Array):
                    leaves.append((f"{name}.{f.name}", value))
                else:
                    whole.update(f"{name}.{f.name}={value!r}\n".encode())
        else:
            leaves.append((name, leaf))
    # hashlib releases the interpreter lock, so threads use all cores; one leaf a
    # thread keeps few host copies of device arrays alive.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(_leaf_line, leaves):
            whole.update(line)
    return whole.hexdigest()


def _leaf_line(item: tuple[str, Any]) -> bytes:
    name, leaf = item
    array = np.ascontiguousarray(np.asarray(leaf))
    data = hashlib.blake2b(array.reshape(-1).view(np.uint8), digest_size=32)
    shape = list(np.shape(leaf))  # ascontiguousarray makes a scalar one-dimensional
    return f"{name} {array.dtype.name} {shape} {data.hexdigest()}\n".encode()
