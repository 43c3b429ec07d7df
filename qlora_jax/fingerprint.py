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
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qlora_jax.nf4 import NF4Tensor

# Bytes hashed in one go: large enough to keep threads busy, and several to a leaf.
_PIECE = 1 << 25


def sha256(piece: np.ndarray) -> bytes:
    """SHA-256 of an array of bytes."""
    return hashlib.sha256(piece).digest()


def crc32(piece: np.ndarray) -> bytes:
    """CRC-32 of an array of bytes: no two are told apart that someone made alike.

    It finds what disks and memory do to bytes, at about twice the speed of SHA-256.
    """
    return zlib.crc32(piece).to_bytes(4, "little")


def fingerprint_tree(tree: Any, digest: Callable[[np.ndarray], bytes] = sha256) -> str:
    """Computes SHA-256 over every leaf's path, dtype, shape and bytes.

    Args:
      tree: arrays and `NF4Tensor`s, on the host or on devices.
      digest: what stands for the bytes of a piece of an array.

    Returns:
      64 hexadecimal digits.
    """
    whole = hashlib.sha256()
    # hashlib releases the interpreter lock, so threads use all cores; leaf after leaf
    # keeps one host copy of a device array alive.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, leaf in _leaves(tree):
            if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
                whole.update(f"{name}={leaf!r}\n".encode())
                continue
            array = np.asarray(leaf)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            pieces = [data[i : i + _PIECE] for i in range(0, data.size, _PIECE)]
            digests = b"".join(pool.map(digest, pieces)).hex()
            shape = list(array.shape)
            whole.update(f"{name} {array.dtype.name} {shape} {digests}\n".encode())
    return whole.hexdigest()


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields every array with its path, and the static fields of NF4 tensors."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, NF4Tensor)
    )
    for path, leaf in flat:
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, NF4Tensor):
            for f in dataclasses.fields(leaf):
                yield f"{name}.{f.name}", getattr(leaf, f.name)
        else:
            yield name, leaf
