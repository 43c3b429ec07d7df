"""The device that programs are traced for, and what the kernels may ask of it.

An abstract mesh in effect (`jax.sharding.use_abstract_mesh`) says what a program is
compiled for without having it.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from typing import Any, Literal

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


def interpreter() -> Any:
    """What makes Pallas interpret a kernel, on any device, looking for races."""
    from jax.experimental.pallas import mosaic_gpu

    params: Any = mosaic_gpu  # jax 0.10, which has no kernels, does not have it there
    return params.InterpretGPUParams(detect_races=True)


@functools.cache
def tuned(kind: str, operation: Literal["nf4", "attention"]) -> dict[str, Any]:
    """Reads what was measured on a kind of device; empty if nothing was.

    "nf4", by scripts/bench_kernels.py:
      fused_rows: "OxI" -> rows up to which `nf4.gpu.product` is the fastest.
      wgmma_rows: "OxI" -> [first, last] row for which `nf4.wgmma` is.
      dequantize: "OxI" -> the faster implementation.
      tuning: "kind OxI rows" -> the fastest settings of a kernel.
    "attention", by scripts/bench_attention.py:
      from_length: "head_dim whole" or "head_dim packed" -> the length from which on the
        kernels were the better choice, null where they never were.
    """
    suffix = "" if operation == "nf4" else f"-{operation}"
    folder = importlib.resources.files("pallas_kernels") / "tuned"
    file = folder / f"{device_slug(kind)}{suffix}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
