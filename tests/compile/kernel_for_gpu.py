"""Compiles NF4 kernels for an H200 on a machine without a GPU, and keeps their PTX.

    python kernel_for_gpu.py '[{"kernel": "dequantize", "shape": [128, 512], ...}]' OUT

For request number n, OUT/n holds what Mosaic GPU writes: the kernel's PTX, what ptxas
says of it, and the host code (LLVM) that launches it; and memory.json, the buffers of
the whole program. A request names the arguments of `pallas_kernels.nf4_gpu`, and how
many layers the stack has that is passed.

A process of its own: the environment has to stand before jax is imported.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from step_for_gpu import H200

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import nf4_gpu


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
    packed = nf4_gpu.Packed(
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
    if wanted["kernel"] == "dequantize":

        def dequantize(packed: Any) -> jax.Array:
            return nf4_gpu.dequantize(packed, shape=shape, dtype=dtype, **options)

        return jax.jit(dequantize).lower(packed)

    rows = wanted["rows"]
    split = options.get("split")
    split = nf4_gpu.Split(*split) if split else nf4_gpu.split_for(shape, rows)

    def product(x: jax.Array, packed: Any) -> jax.Array:
        return nf4_gpu.product(x, packed, shape=shape, split=split)

    return jax.jit(product).lower(array((rows, columns), dtype), packed)


def main(requests: list[dict[str, Any]], out: Path) -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    device = NamedSharding(mesh, PartitionSpec())
    for number, wanted in enumerate(requests):
        folder = out / str(number)
        folder.mkdir()
        for what in ("PTX", "PTXAS", "HOST_LLVM"):
            os.environ[f"MOSAIC_GPU_DUMP_{what}"] = "1"
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
        memory = lower(wanted, device).compile().memory_analysis()
        sizes = {"temporaries": memory.temp_size_in_bytes}
        (folder / "memory.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
