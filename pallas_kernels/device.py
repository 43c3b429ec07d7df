"""The device that programs are traced for, and what the kernels need to know of it.

An abstract mesh in effect (`jax.sharding.use_abstract_mesh`) names the device that a
program is compiled for when the machine does not have it.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from typing import Any, Literal

import jax


def this_device() -> Any:
    """Returns the device, real or abstract."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0] if device is None else device


def device_kind() -> str:
    """Returns the kind of device, as JAX names it."""
    return this_device().device_kind


def device_slug(kind: str) -> str:
    """Returns a kind of device as part of a file name, as for measured data."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def capability() -> str:
    """Returns the compute capability of an NVIDIA GPU, such as "9.0".

    A GPU of another maker gives that maker's word, such as "gfx90a". A device without
    the attribute counts as a Hopper: an abstract device has none, and whoever compiles
    for one has chosen it.
    """
    return str(getattr(this_device(), "compute_capability", "9.0"))


def multiprocessors() -> int:
    """Returns the number of multiprocessors of an NVIDIA GPU."""
    device = this_device()
    # An abstract device has the first name, a real one the second.
    for name in ("num_cores", "core_count"):
        if isinstance(count := getattr(device, name, None), int):
            return count
    # Of an H100 or H200: as without a compute capability.
    return 132


def jax_has_kernels() -> bool:
    """Returns whether this jax has the Pallas that the kernels are written in."""
    # 0.11 is the first whose Mosaic covers GPUs before Hopper and is interpreted.
    return tuple(int(n) for n in jax.__version__.split(".")[:2]) >= (0, 11)


def kernel_refusals(*, interpret: bool) -> list[str]:
    """Returns why no kernel can run here, as clauses of a sentence.

    Args:
      interpret: whether Pallas's interpreter would run it, on any device.
    """
    reasons = []
    if not jax_has_kernels():
        reasons.append(
            f"the kernels need jax 0.11 (Python 3.12), and this is {jax.__version__}"
        )
    platform = this_device().platform
    if not interpret and platform not in ("gpu", "cuda"):
        reasons.append(f"they need an NVIDIA GPU, and this is a {platform}")
    return reasons


def hopper_refusals(*, interpret: bool) -> list[str]:
    """Returns why kernels for Hopper cannot run here; as `kernel_refusals`."""
    reasons = kernel_refusals(interpret=interpret)
    if not interpret and capability() != "9.0":
        reasons.append(
            "they are laid out for NVIDIA's Hopper (compute capability 9.0: H100, "
            f"H200), and this one has {capability()}"
        )
    return reasons


def interpreter() -> Any:
    """Returns the parameters with which Pallas interprets a kernel and detects races.

    The interpreter runs on any device.
    """
    from jax.experimental.pallas import mosaic_gpu

    # Typed as Any: the type stubs of jax 0.10, which has no kernels, lack the class.
    module: Any = mosaic_gpu
    return module.InterpretGPUParams(detect_races=True)


@functools.cache
def tuned(kind: str, operation: Literal["nf4", "attention"]) -> dict[str, Any]:
    """Reads what was measured on a kind of device; empty if nothing was.

    "nf4", written by scripts/bench_gpu kernels:
      fused_rows: "OxI" -> rows up to which `nf4.gpu.matmul` is the fastest.
      wgmma_rows: "OxI" -> [first, last] rows for which `nf4.wgmma.matmul` is.
      dequantize: "OxI" -> the faster implementation.
      tuning: "kind OxI rows" -> the fastest settings of a kernel.
    "attention", written by scripts/bench_gpu attention:
      from_length: "head_dim whole" or "head_dim packed" -> the length from which on the
        kernels are the better choice, null where they never are.
    """
    suffix = "" if operation == "nf4" else f"-{operation}"
    directory = importlib.resources.files("pallas_kernels") / "tuned"
    file = directory / f"{device_slug(kind)}{suffix}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
