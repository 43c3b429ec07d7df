"""The device that programs are traced for, and what the kernels may ask of it.

An abstract mesh in effect (`jax.sharding.use_abstract_mesh`) says what a program is
compiled for without having it.
"""

from __future__ import annotations

import re
from typing import Any

import jax


def this_device() -> Any:
    """The device, real or abstract."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0] if device is None else device


def device_kind() -> str:
    """The kind of device, as JAX names it."""
    return this_device().device_kind


def device_slug(kind: str) -> str:
    """A kind of device as a part of file names, those of measured data among them."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def capability() -> str:
    """Compute capability of an NVIDIA GPU, such as "9.0"; another maker's own word.

    A device that does not say passes for a Hopper: an abstract one does not, and is
    compiled for knowingly.
    """
    return str(getattr(this_device(), "compute_capability", "9.0"))


def jax_has_kernels() -> bool:
    """Whether this jax has the Pallas that the kernels are written in."""
    return tuple(int(n) for n in jax.__version__.split(".")[:2]) >= (0, 11)
