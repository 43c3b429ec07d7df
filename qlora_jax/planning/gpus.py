"""GPUs by their data sheets, as a plan of a training step needs them.

    gpu = find_gpu("rtx-4090")             one of `CARDS`
    gpu = find_gpu("mine.toml")            described in a file
    gpu.target                             the description that XLA's compiler needs

The compiler needs a description of the device, not the device. Sizes and rates are the
vendor's, in 1e9 bytes and without sparsity:

  memory, bandwidth, 16-bit rate, host link: NVIDIA's data sheets of the SXM modules
    H200, H100, A100 (80 GB and 40 GB) and HGX B200; of L40S, L4 and T4; the Ada and
    Ampere GA102 architecture white papers for RTX 4090 and RTX 3090 (16-bit products
    with float32 sums). The host link is PCI Express x16 one way: 16, 32 or 64 GB/s for
    generation 3, 4 or 5.
  link to the GPUs of a node: NVLink of the SXM modules, one way, half of the total in
    the data sheet; the others exchange over the host link. Between nodes 400 Gbit/s for
    each GPU, as servers with eight of them are wired.
  multiprocessors, clock, L2: the same, and the architecture white papers.
  limits of a block and of a multiprocessor: CUDA C++ Programming Guide, technical
    specifications by compute capability.

The memory that a device reports differs by some percent from its data sheet (ECC).

The memory of the device and the machine at hand is read here too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from qlora_jax.errors import UserError, did_you_mean, readable_bytes
from qlora_jax.reading import read_text, reason

ALLOWANCE = 700_000_000
"""Bytes that a process takes beyond the plan of its program: the CUDA context with its
kernels (0.4 to 0.5 GB on current GPUs), cuBLAS's workspace, and what the allocator
loses to rounding and fragmentation."""

PINNED_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
PINNED_BYTES = 64 << 30
"""Host memory that JAX pins for a GPU at most, unless the environment has
`PINNED_VARIABLE`, in GiB."""


@dataclass(frozen=True)
class _Limits:
    """Limits of a compute capability; shared memory in bytes."""

    threads: int
    """Resident on a multiprocessor."""
    lanes: int
    """float32 units of a multiprocessor."""
    shared_memory: int
    """Of a multiprocessor."""
    shared_memory_of_block: int
    """At most, on request."""


# What `jax[cuda13]` needs at least. From driver, runtime and toolkit XLA decides which
# kernels become command buffers (CUDA graphs): without them, nearly none.
_CUDA = "13.0.0"
_CUDNN = (9, 10, 0)

# Steps are compiled ahead of time for these capabilities; others are planned by the
# closed form.
# From 8.0 on, CUDA keeps 1 KiB of each block's shared memory for itself.
_LIMITS = {
    (7, 5): _Limits(1024, 64, 64 << 10, 64 << 10),
    (8, 0): _Limits(2048, 64, 164 << 10, 163 << 10),
    (8, 6): _Limits(1536, 128, 100 << 10, 99 << 10),
    (8, 9): _Limits(1536, 128, 100 << 10, 99 << 10),
    (9, 0): _Limits(2048, 128, 228 << 10, 227 << 10),
    (10, 0): _Limits(2048, 128, 228 << 10, 227 << 10),
    (12, 0): _Limits(1536, 128, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class GpuSpec:
    """A GPU's data sheet."""

    name: str
    memory_bytes: int
    """Device memory."""
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    """Boost clock."""
    bandwidth: float
    """Of the device memory, bytes/s."""
    flops: float
    """Dense 16-bit products with float32 sums, FLOP/s."""
    host_link: float
    """To or from host memory, one way, bytes/s."""
    l2_bytes: int
    description: str = ""
    """`device_kind` of the device."""
    nvlink: float = 0.0
    """To the other GPUs of its node, one way, bytes/s; 0 = over the host link."""
    network: float = 50e9
    """Of each GPU to other nodes, one way, bytes/s."""

    @property
    def node_link(self) -> float:
        """Rate at which a GPU sends to others of its node, bytes/s."""
        return self.nvlink or self.host_link

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 and runs cuDNN's attention (from 8.0 on)."""
        return self.compute_capability >= (8, 0)

    @property
    def compiles(self) -> bool:
        """Whether a step can be compiled for it ahead of time."""
        return self.compute_capability in _LIMITS

    @property
    def float32_flops(self) -> float:
        """Of float32 without tensor cores, FLOP/s: two per lane and cycle."""
        # Where the limits are not known: 128 lanes, as on most.
        known = _LIMITS.get(self.compute_capability)
        lanes = known.lanes if known else 128
        return 2.0 * lanes * self.multiprocessors * self.clock_ghz * 1e9

    @property
    def target(self) -> str:
        """The `GpuTargetConfigProto` that XLA's compiler takes, as text.

        Raises:
          UserError: a compute capability whose limits are not known.
        """
        major, minor = self.compute_capability
        if not self.compiles:
            known = ", ".join(f"{a}.{b}" for a, b in _LIMITS)
            raise UserError(
                f"{self.name}: compute capability {major}.{minor} is not known "
                f"(known: {known}), so no step can be compiled for it."
            )
        limits = _LIMITS[self.compute_capability]
        # sm_90a, sm_100a, ...: wgmma and tcgen05 exist only in targets of this kind.
        features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  core_count: {self.multiprocessors}
  fpus_per_core: {limits.lanes}
  clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {int(self.bandwidth)}
  device_memory_size: {self.memory_bytes}
  l2_cache_size: {self.l2_bytes}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {limits.threads}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {limits.shared_memory_of_block}
  shared_memory_per_core: {limits.shared_memory}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "{_CUDA}"
  runtime_version: "{_CUDA}"
  compile_time_toolkit_version: "{_CUDA}"
  dnn_version: "{".".join(map(str, _CUDNN))}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} patch: {_CUDNN[2]} }}
device_description_str: "{self.description or self.name}"
"""


# name: GB, capability, SMs, GHz, GB/s, TFLOP/s, GB/s to the host, L2 MiB, device_kind
# Data sheets that print two rates of tensor cores have the higher one with sparsity. On
# GeForce cards float32 sums halve the rate: 165 of 330 TFLOP/s on the RTX 4090, 71 of
# 142 on the RTX 3090.
_DATA_SHEETS = {
    "b200": (180, (10, 0), 148, 1.965, 8000, 2250, 64, 126, "NVIDIA B200"),
    "h200": (141, (9, 0), 132, 1.98, 4800, 989, 64, 60, "NVIDIA H200"),
    "h100": (80, (9, 0), 132, 1.98, 3350, 989, 64, 50, "NVIDIA H100 80GB HBM3"),
    "a100-80": (80, (8, 0), 108, 1.41, 2039, 312, 32, 40, "NVIDIA A100-SXM4-80GB"),
    "a100-40": (40, (8, 0), 108, 1.41, 1555, 312, 32, 40, "NVIDIA A100-SXM4-40GB"),
    "l40s": (48, (8, 9), 142, 2.52, 864, 362, 32, 96, "NVIDIA L40S"),
    "l4": (24, (8, 9), 58, 2.04, 300, 121, 32, 48, "NVIDIA L4"),
    "rtx-4090": (24, (8, 9), 128, 2.52, 1008, 165, 32, 72, "NVIDIA GeForce RTX 4090"),
    "rtx-3090": (24, (8, 6), 82, 1.695, 936, 71, 32, 6, "NVIDIA GeForce RTX 3090"),
    "t4": (16, (7, 5), 40, 1.59, 320, 65, 16, 4, "Tesla T4"),
}
# GB/s of NVLink, one way.
_NVLINK = {"b200": 900, "h200": 450, "h100": 450, "a100-80": 300, "a100-40": 300}
_ALL = tuple(
    GpuSpec(
        name=name,
        memory_bytes=gigabytes * 10**9,
        compute_capability=capability,
        multiprocessors=multiprocessors,
        clock_ghz=clock_ghz,
        bandwidth=bandwidth * 1e9,
        flops=teraflops * 1e12,
        host_link=link * 1e9,
        l2_bytes=l2_mib << 20,
        description=device_kind,
        nvlink=_NVLINK.get(name, 0) * 1e9,
    )
    for name, (
        gigabytes,
        capability,
        multiprocessors,
        clock_ghz,
        bandwidth,
        teraflops,
        link,
        l2_mib,
        device_kind,
    ) in _DATA_SHEETS.items()
)
CARDS: Mapping[str, GpuSpec] = MappingProxyType({gpu.name: gpu for gpu in _ALL})
"""Name -> GPU."""

# Field of a TOML file -> (field of `GpuSpec`, factor of its unit).
_UNITS = {
    "memory_gb": ("memory_bytes", 1e9),
    "multiprocessors": ("multiprocessors", 1),
    "clock_ghz": ("clock_ghz", 1.0),
    "bandwidth_gb_s": ("bandwidth", 1e9),
    "tflops": ("flops", 1e12),
    "host_link_gb_s": ("host_link", 1e9),
    "l2_mib": ("l2_bytes", 1 << 20),
    "nvlink_gb_s": ("nvlink", 1e9),
    "network_gb_s": ("network", 1e9),
}
# Fields that a file may leave out.
_OPTIONAL = ("nvlink", "network")


def find_gpu(name: str) -> GpuSpec:
    """Returns a GPU by its name, or the GPU that a TOML file describes.

    The file has `name` and either all of compute_capability ("8.9"), memory_gb,
    multiprocessors, clock_ghz, bandwidth_gb_s, tflops (dense, 16 bits), host_link_gb_s
    and l2_mib, or `like` (a name) and those of them that differ. nvlink_gb_s (without
    it GPUs exchange over the host link) and network_gb_s (50) may be left out.

    Raises:
      UserError: no such GPU or file, or an incomplete or invalid file.
    """
    plain = name.lower().replace("_", "-")
    # "4090" is enough of a name. Of the two A100, the one that is sold today.
    short = {card.rpartition("-")[2]: card for card in CARDS if card.startswith("rtx")}
    plain = {"a100": "a100-80", **short}.get(plain, plain)
    if plain in CARDS:
        return CARDS[plain]
    if name.endswith(".toml"):
        return _read_spec(Path(name))
    raise UserError(
        f"No GPU `{name}` is known.{did_you_mean(plain, CARDS)} "
        f"GPUs: {', '.join(CARDS)}; or give a TOML file that describes yours."
    )


def gpu_named(description: str) -> GpuSpec | None:
    """Returns the GPU whose `device_kind` is `description`, or None.

    The match is exact: a PCI Express board of the same chip has another clock.
    """
    return next((gpu for gpu in _ALL if gpu.description == description), None)


def _read_spec(path: Path) -> GpuSpec:
    try:
        content = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {reason(error)}.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"`{path}` is not valid TOML: {error}.") from error
    fields = ("name", "like", "compute_capability", *_UNITS)
    for key in content:
        if key not in fields:
            raise UserError(
                f"{path}: `{key}` is not a field of a GPU."
                f"{did_you_mean(key, fields)} Fields: {', '.join(fields)}."
            )
    values: dict[str, Any] = {}
    if "like" in content:
        if content["like"] not in CARDS:
            raise UserError(
                f"{path}: `like` must be one of {', '.join(CARDS)}, got "
                f"{content['like']!r}."
            )
        values = dataclasses.asdict(CARDS[content["like"]])
    values["name"] = str(content.get("name", path.stem))
    if "compute_capability" in content:
        values["compute_capability"] = _capability(content["compute_capability"], path)
    for key, (field, unit) in _UNITS.items():
        if key in content:
            value = content[key]
            if not (type(value) in (int, float) and 0 < value and math.isfinite(value)):
                raise UserError(
                    f"{path}: `{key}` must be a positive number, got {value!r}."
                )
            # XLA's description of a device has integers there.
            integral = field in ("memory_bytes", "multiprocessors", "l2_bytes")
            values[field] = round(value * unit) if integral else float(value * unit)
    key_of = {"compute_capability": "compute_capability"}
    key_of |= {field: key for key, (field, _) in _UNITS.items()}
    missing_keys = [
        f"`{key}`"
        for field, key in key_of.items()
        if field not in values and field not in _OPTIONAL
    ]
    if missing_keys:
        raise UserError(
            f"{path}: missing {', '.join(missing_keys)}. Give them, or `like` = one of "
            f"{', '.join(CARDS)}."
        )
    return GpuSpec(**values)


def _capability(value: Any, path: Path) -> tuple[int, int]:
    parts = str(value).split(".")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise UserError(
            f"{path}: `compute_capability` must be like '8.9', got {value!r}."
        )
    return int(parts[0]), int(parts[1])


# --- The device and the machine at hand ---

# Share of JAX's memory that its allocator can give out in the large blocks of a plan.
_USABLE = 0.98
UNLIMITED = 1 << 60
"""Bytes of a memory whose size is not known."""


def this_device() -> GpuSpec:
    """Returns the device at hand; its memory is what a process may use of it."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        # JAX's pool is beyond the CUDA context; plans subtract `ALLOWANCE` for both.
        usable = int(_USABLE * stats["bytes_limit"])
    elif device.platform == "cpu":
        # JAX may make several devices of a CPU.
        usable = available_memory() // len(jax.local_devices())
    else:
        usable = UNLIMITED
    capability = str(getattr(device, "compute_capability", "9.0"))
    major, _, minor = capability.partition(".")
    return GpuSpec(
        name=device.device_kind if device.platform != "cpu" else "this machine",
        memory_bytes=usable + ALLOWANCE,
        compute_capability=(int(major), int(minor or 0)) if major.isdigit() else (0, 0),
        # Not used: only memory is planned for the device at hand.
        multiprocessors=1,
        clock_ghz=1.0,
        bandwidth=1.0,
        flops=1.0,
        host_link=1.0,
        l2_bytes=1,
        description=device.device_kind,
    )


def available_memory() -> int:
    """Returns the available bytes of main memory; 2^60 if the system does not tell."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            # Free memory and what the page cache can give up, in KiB.
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    except OSError:  # not Linux
        try:
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError):
            return UNLIMITED
    try:  # the limit of a container
        # /proc/meminfo is the machine's, whatever the container may use.
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        limits.append(int(limit) - int(used))
    except (OSError, ValueError):  # none, or "max"
        pass
    return min(limits, default=UNLIMITED)


def pinned_limit() -> int:
    """Returns the bytes of host memory that JAX pins for the device at hand at most."""
    if jax.local_devices()[0].platform != "gpu":
        return UNLIMITED
    value = os.environ.get(PINNED_VARIABLE, "")
    # What is not a number JAX ignores as well.
    return int(value) << 30 if value.isdecimal() else PINNED_BYTES


def give_back_freed_memory() -> bool:
    """Returns memory that the compiler has freed to the system; False if it cannot.

    glibc keeps freed memory below allocations in use: about 200 MB after a step is
    compiled, until the process ends.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # another C library
        return False
    trim(0)
    return True


def more_memory_advice() -> str:
    """Returns advice on how to let JAX use more of a GPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return ""
    return (
        f" JAX takes {readable_bytes(stats['bytes_limit'])} of this device, three "
        "quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION in the environment says "
        "more."
    )
