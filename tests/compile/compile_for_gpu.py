"""Compiles kernels for a GPU on a machine without one, and keeps their PTX.

    python kernels_for_gpu.py '[{"kernel": "dequantize", "shape": [128, 512], ...}]' \
        OUT [h200]

For request number n, OUT/n holds what Mosaic GPU writes: kernel.ptx, kernel.ptxas (the
report of ptxas) and kernel.ll (the host code that launches it); and memory.json, the
buffers of the whole program. A request holds the arguments of a kernel of
`pallas_kernels`. The kernel "gradient" is the derivative of all of `flash_attention`,
of which only the buffers are kept.

A process of its own: the environment must be set before jax starts.
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
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import flash_attention, mosaic
from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.nf4 import gpu, wgmma
from pallas_kernels.nf4.reference import Packed
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import gpu_mesh

KEPT = ("ptx", "ptxas", "ll")


def packed_arrays(request: dict[str, Any], array: Any) -> Packed:
    """The stack of a request."""
    rows, columns = request["shape"]
    layers, size = request["layers"], rows * columns
    nested = None
    if request["nested"]:
        nested = (
            array((layers, -(-size // 16384)), jnp.float32),
            array((layers,), jnp.float32),
            array((layers, 256), jnp.float32),
        )
    scale_dtype = jnp.float32 if nested is None else jnp.uint8
    return Packed(
        codes=array((layers, rows, columns // 2), jnp.uint8),
        absmax=array((layers, rows, columns // 64), scale_dtype),
        nested=nested,
        layer=array((1,), jnp.int32),
    )


def lower_nf4(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces one NF4 kernel."""
    shape, dtype = tuple(request["shape"]), jnp.dtype(request["dtype"])
    options, packed = request["options"], packed_arrays(request, array)
    if request["kernel"] == "decoded":
        scales = array((mosaic.ROWS, 2), jnp.float32)
        table = array(wgmma.pair_table().shape, jnp.float32)
        codes = array(shape, jnp.uint8)
        return jax.jit(decoded(dtype, **options)).lower(codes, scales, table)
    if request["kernel"] == "dequantize":

        def dequantize(packed: Any) -> jax.Array:
            return gpu.dequantize(packed, shape=shape, dtype=dtype, **options)

        return jax.jit(dequantize).lower(packed)

    x = array((request["rows"], shape[1]), dtype)
    if request["kernel"] == "wgmma":

        def middle(x: jax.Array, packed: Any) -> jax.Array:
            return wgmma.matmul(x, packed, shape=shape, dtype=dtype, **options)

        return jax.jit(middle).lower(x, packed)

    split = options.get("split")
    split = gpu.Split(*split) if split else gpu.split_for(shape, request["rows"])

    def matmul(x: jax.Array, packed: Any) -> jax.Array:
        return gpu.matmul(x, packed, shape=shape, split=split)

    return jax.jit(matmul).lower(x, packed)


def decoded(dtype: Any, transposed: bool) -> Any:
    """A kernel that decodes a tile of `wgmma.matmul` and writes it as float32.

    With the scales in the second of two columns, as they are in shared memory: apart.
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


def lower_attention(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces one attention kernel, or the derivative of `flash_attention`."""
    batch, length, heads = request["batch"], request["length"], request["heads"]
    q = dout = array((batch, length, heads, request["width"]), jnp.bfloat16)
    k = v = array((batch, length, request["groups"], request["width"]), jnp.bfloat16)
    segments = array((batch, length), jnp.int32) if request["packed"] else None
    if request["kernel"] == "forward":
        return jax.jit(attention_gpu.forward).lower(q, k, v, segments)
    if request["kernel"] == "gradient":

        def gradient(q: Any, k: Any, v: Any, dout: Any, segments: Any) -> Any:
            def call(q: Any, k: Any, v: Any) -> Any:
                return flash_attention(q, k, v, segments, implementation="pallas")

            return jax.vjp(call, q, k, v)[1](dout)

        return jax.jit(gradient).lower(q, k, v, dout, segments)
    kernels = {
        "queries": attention_gpu._backward_queries,
        "keys": attention_gpu._backward_keys,
    }

    def backward(*arrays: Any) -> Any:
        return kernels[request["kernel"]](*arrays, tiles=None, interpret=False)

    numbers = array((batch, heads, 2, length), jnp.float32)
    return jax.jit(backward).lower(q, k, v, dout, numbers, segments)


def main(requests: list[dict[str, Any]], out: Path, card_name: str) -> None:
    card = CARDS[card_name]
    mesh = gpu_mesh(card)
    device = NamedSharding(mesh, PartitionSpec())
    # Mosaic reads the capability of the GPU at hand, and without one assumes an H100.
    infer_arch = mosaic_gpu.utils._infer_arch
    for module in list(sys.modules.values()):
        if getattr(module, "_infer_arch", None) is infer_arch:
            module._infer_arch = lambda *_, **__: card.compute_capability

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    for number, request in enumerate(requests):
        folder = out / str(number)
        folder.mkdir()
        os.environ |= {
            "MOSAIC_GPU_DUMP_TO": str(folder),
            "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
        }
        lower = lower_nf4 if "shape" in request else lower_attention
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for whom to trace
            lowered = lower(request, array)
        memory = lowered.compile().memory_analysis()
        for kind in KEPT if request["kernel"] != "gradient" else ():
            made = list(folder.glob(f"*.{kind}"))
            if len(made) != 1:
                raise SystemExit(
                    f"{len(made)} files .{kind} for {request}: each request must make "
                    "one kernel, and none that an earlier one made."
                )
            made[0].rename(folder / f"kernel.{kind}")
        sizes = {"temporaries": memory.temp_size_in_bytes}
        (folder / "memory.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), (*sys.argv, "h200")[3])
