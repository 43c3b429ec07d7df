"""Compiles NF4 kernels for a GPU on a machine without one, and keeps their PTX.

    python kernel_for_gpu.py '[{"kernel": "dequantize", "shape": [128, 512], ...}]' \
        OUT [h200|a100|b200]

For request number n, OUT/n holds what Mosaic GPU writes: kernel.ptx, kernel.ptxas (what
ptxas says of it) and kernel.ll (the host code that launches it); and memory.json, the
buffers of the whole program. A request names the arguments of `pallas_kernels.nf4.gpu`,
and how many layers the stack has that is passed.

A process of its own: the environment has to stand before jax starts.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec
from step_for_gpu import H200

from pallas_kernels import mosaic
from pallas_kernels.nf4 import gpu, wgmma

KEPT = ("ptx", "ptxas", "ll")

# What differs from the H200, from NVIDIA's data sheets and the CUDA C++ Programming
# Guide (compute capabilities 8.0 and 10.0): the numbers that a kernel can notice.
A100 = (
    ("major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", "major: 8 minor: 0"),
    ("core_count: 132", "core_count: 108"),
    ("shared_memory_per_block_optin: 232448", "shared_memory_per_block_optin: 166912"),
    ("shared_memory_per_core: 233472", "shared_memory_per_core: 167936"),
    ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"),
)
B200 = (
    ("major: 9 minor: 0", "major: 10 minor: 0"),
    ("core_count: 132", "core_count: 148"),
    ("NVIDIA H200", "NVIDIA B200"),
)
TARGETS = {"h200": ((9, 0), ()), "a100": ((8, 0), A100), "b200": ((10, 0), B200)}


def target(device: str) -> str:
    """Describes a device to XLA, and to Mosaic, which would take any to be an H100."""
    capability, differences = TARGETS[device]
    description = H200
    for old, new in differences:
        assert old in description
        description = description.replace(old, new)
    # Mosaic asks the GPU at hand, and without one is told nothing else.
    asked = mosaic_gpu.utils._infer_arch
    for module in list(sys.modules.values()):
        if getattr(module, "_infer_arch", None) is asked:
            module._infer_arch = lambda *_, **__: capability
    return description


def lower(wanted: dict[str, Any], device: NamedSharding) -> jax.stages.Lowered:
    """Traces one kernel for packed weights that are yet to come."""

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    rows, columns = shape = tuple(wanted["shape"])
    layers, size = wanted["layers"], rows * columns
    nested = None
    if wanted["nested"]:
        nested = (
            array((layers, -(-size // 16384)), jnp.float32),
            array((layers,), jnp.float32),
            array((layers, 256), jnp.float32),
        )
    packed = gpu.Packed(
        codes=array((layers, rows, columns // 2), jnp.uint8),
        absmax=array(
            (layers, rows, columns // 64),
            jnp.float32 if nested is None else jnp.uint8,
        ),
        nested=nested,
        layer=array((1,), jnp.int32),
    )
    dtype = jnp.dtype(wanted["dtype"])
    options = wanted["options"]
    if wanted["kernel"] == "decoded":
        run = decoded(dtype, **options)
        scales = array((mosaic.ROWS, 2), jnp.float32)
        table = array(wgmma.pair_table().shape, jnp.float32)
        return jax.jit(run).lower(array(shape, jnp.uint8), scales, table)
    if wanted["kernel"] == "dequantize":

        def dequantize(packed: Any) -> jax.Array:
            return gpu.dequantize(packed, shape=shape, dtype=dtype, **options)

        return jax.jit(dequantize).lower(packed)

    rows = wanted["rows"]
    if wanted["kernel"] == "middle_product":

        def middle(x: jax.Array, packed: Any) -> jax.Array:
            return wgmma.matmul(x, packed, shape=shape, dtype=dtype, **options)

        return jax.jit(middle).lower(array((rows, columns), dtype), packed)

    split = options.get("split")
    split = gpu.Split(*split) if split else gpu.split_for(shape, rows)

    def product(x: jax.Array, packed: Any) -> jax.Array:
        return gpu.matmul(x, packed, shape=shape, split=split)

    return jax.jit(product).lower(array((rows, columns), dtype), packed)


def decoded(dtype: Any, transposed: bool) -> Any:
    """A kernel that decodes a tile of `middle_product` and writes it as float32.

    With the scales in the second of two columns, as they lie in shared memory: apart.
    """

    def body(codes: Any, scales: Any, table: Any, out: Any, *shared: Any) -> None:
        codes_s, scales_s, table_s = shared
        codes_s[...] = mosaic.load(codes, 4)
        scales_s[...] = mosaic.load(scales, 1)
        table_s[...] = mosaic.load(table, 4)
        tile = mosaic.decoded(
            codes_s, scales_s.at[:, 1], table_s, dtype, interpret=False
        ).astype(jnp.float32)
        if transposed:
            mosaic.store_transposed(out, tile, interpret=False)
        else:  # by Mosaic's own knowledge of the layout
            mosaic.store(out, tile, plgpu.Layout.WGMMA, interpret=False)

    scratch = [
        plgpu.SMEM((mosaic.ROWS, mosaic.BLOCK // 2), jnp.uint8),
        plgpu.SMEM((mosaic.ROWS, 2), jnp.float32),
        plgpu.SMEM(wgmma.pair_table().shape, jnp.float32),
    ]
    out = jax.ShapeDtypeStruct((mosaic.ROWS, mosaic.BLOCK), jnp.float32)
    return gpu.kernel(body, out, scratch, grid={"one": 1}, interpret=False)


def main(requests: list[dict[str, Any]], out: Path, device_name: str) -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target(device_name), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    device = NamedSharding(mesh, PartitionSpec())
    for number, wanted in enumerate(requests):
        folder = out / str(number)
        folder.mkdir()
        os.environ |= {
            "MOSAIC_GPU_DUMP_TO": str(folder),
            "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
        }
        memory = lower(wanted, device).compile().memory_analysis()
        for kind in KEPT:
            made = list(folder.glob(f"*.{kind}"))
            if len(made) != 1:
                raise SystemExit(
                    f"{len(made)} files .{kind} for {wanted}: each request must make "
                    "one kernel, and none that an earlier one made."
                )
            made[0].rename(folder / f"kernel.{kind}")
        for other in folder.glob("*.log"):
            other.unlink()
        sizes = {"temporaries": memory.temp_size_in_bytes}
        (folder / "memory.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), (*sys.argv, "h200")[3])
