"""Compiles attention kernels for an H200 on a machine without one.

    python attention_for_gpu.py '[{"kernel": "forward", "width": 128, ...}]' OUT

For request number n, OUT/n holds what Mosaic GPU writes: kernel.ptx, kernel.ptxas (what
ptxas says of it) and kernel.ll (the host code that launches it); and memory.json, the
buffers of the whole program. The kernel "gradient" is the derivative of all of
`flash_attention`, of which only the buffers are kept.

A process of its own: the environment has to stand before jax starts.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from qlora_jax.planning.compile import ENVIRONMENT, XLA_FLAGS

# Before jax is imported.
os.environ |= {**ENVIRONMENT, "XLA_FLAGS": " ".join(XLA_FLAGS)}

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import flash_attention
from pallas_kernels.attention import gpu
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import gpu_mesh

KEPT = ("ptx", "ptxas", "ll")


def lower(wanted: dict[str, Any], device: NamedSharding) -> jax.stages.Lowered:
    """Traces one kernel, or the derivative, for arrays that are yet to come."""

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    batch, length, heads = wanted["batch"], wanted["length"], wanted["heads"]
    q = dout = array((batch, length, heads, wanted["width"]))
    k = v = array((batch, length, wanted["groups"], wanted["width"]))
    segments = array((batch, length), jnp.int32) if wanted["packed"] else None
    numbers = array((batch, heads, 2, length), jnp.float32)
    if wanted["kernel"] == "forward":
        return jax.jit(gpu.forward).lower(q, k, v, segments)
    if wanted["kernel"] == "gradient":

        def gradient(q: Any, k: Any, v: Any, dout: Any, segments: Any) -> Any:
            def call(q: Any, k: Any, v: Any) -> Any:
                return flash_attention(q, k, v, segments, implementation="pallas")

            return jax.vjp(call, q, k, v)[1](dout)

        return jax.jit(gradient).lower(q, k, v, dout, segments)
    kernel = {
        "queries": gpu._backward_queries,
        "keys": gpu._backward_keys,
    }[wanted["kernel"]]

    def backward(*arrays: Any) -> Any:
        return kernel(*arrays, tiles=None, interpret=False)

    return jax.jit(backward).lower(q, k, v, dout, numbers, segments)


def main(requests: list[dict[str, Any]], out: Path) -> None:
    mesh = gpu_mesh(CARDS["h200"])
    device = NamedSharding(mesh, PartitionSpec())
    for number, wanted in enumerate(requests):
        folder = out / str(number)
        folder.mkdir()
        os.environ |= {
            "MOSAIC_GPU_DUMP_TO": str(folder),
            "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
        }
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for whom to trace
            lowered = lower(wanted, device)
        memory = lowered.compile().memory_analysis()
        for kind in KEPT:
            made = list(folder.glob(f"*.{kind}"))
            if wanted["kernel"] == "gradient":
                continue
            if len(made) != 1:
                raise SystemExit(
                    f"{len(made)} files .{kind} for {wanted}: each request must make "
                    "one kernel, and none that an earlier one made."
                )
            made[0].rename(folder / f"kernel.{kind}")
        sizes = {"temporaries": memory.temp_size_in_bytes}
        (folder / "memory.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
