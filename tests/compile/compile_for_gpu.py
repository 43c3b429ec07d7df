"""Compiles kernels and generation for a GPU on a machine without one.

    python compile_for_gpu.py '[{"kernel": "dequantize", "shape": [128, 512], ...}]' \
        OUT [h200]

For request number n, OUT/n/memory.json holds the buffers of the whole program. Of a
kernel of `pallas_kernels`, OUT/n has what Mosaic GPU writes as well: kernel.ptx,
kernel.ptxas (the report of ptxas) and kernel.ll (the host code that launches it). The
kernel "gradient" is the derivative of all of `flash_attention`: buffers only. A request
with a "config" is generation of "generate" tokens after prompts of "length", greedily,
and OUT/n/program.txt its scheduled form. (`qlora_jax.planning.compile` compiles a
training step, in a process set up in the same way.)

A process of its own: the environment must be set before jax starts.
"""

import functools
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
from pallas_kernels.attention import backward as attention_backward
from pallas_kernels.attention import decode as cached
from pallas_kernels.attention.blocks import Form
from pallas_kernels.attention.forward import forward as attention_forward
from pallas_kernels.gated import gpu as gated_gpu
from pallas_kernels.nf4 import decode, decode_plan, gpu, wgmma
from pallas_kernels.nf4 import inner as nf4_inner
from pallas_kernels.nf4.parts import Following
from pallas_kernels.nf4.reference import Packed
from pallas_kernels.norm import gpu as norm_gpu
from qlora_jax.compiler import compiler_options
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import _generate, _Program
from qlora_jax.inference.sampling import Values
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.planning.estimate import abstract_base
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
    named = {"shape": tuple(request["shape"]), "dtype": jnp.dtype(request["dtype"])}
    options, packed = request["options"], packed_arrays(request, array)
    kind, rows = request["kernel"], request["rows"]
    if kind == "decoded":
        scales = array((mosaic.ROWS, 2), jnp.float32)
        table = array(wgmma.pair_table().shape, jnp.float32)
        codes = array(named["shape"], jnp.uint8)
        kernel = decoded(named["dtype"], **options)
        return jax.jit(kernel).lower(codes, scales, table)
    if kind == "dequantize":
        return jax.jit(lambda p: gpu.dequantize(p, **named, **options)).lower(packed)
    x = array((rows, named["shape"][1]), named["dtype"])
    if kind == "wgmma":
        return jax.jit(lambda *a: wgmma.matmul(*a, **named, **options)).lower(x, packed)
    shape, split = named["shape"], options.get("split")
    split = gpu.Split(*split) if split else gpu.split_for(shape, rows)
    product = jax.jit(lambda *a: gpu.matmul(*a, shape=shape, split=split))
    return product.lower(x, packed)


def lower_attend(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces a kernel of `attention.decode.attend`: the first, or "weigh"."""
    rows, heads, kv_heads, width, slots = request["sizes"]
    dtype, layers = jnp.dtype(request["dtype"]), request["layers"]
    a = None
    if request["rank"]:
        a = array((layers, heads * width, request["rank"]), dtype)
    if request["kernel"] == "weigh":

        def weigh(sums: Any, maxima: Any, layer: Any, a: Any) -> Any:
            following = None if a is None else Following(a)
            return cached._weigh(sums, maxima, layer, following, dtype, False)

        parts = (rows, kv_heads, request["splits"], heads // kv_heads)
        results = (array((*parts, n), jnp.float32) for n in (width, 2))
        return jax.jit(weigh).lower(*results, array((1,), jnp.int32), a)
    qkv = array((rows, (heads + 2 * kv_heads) * width), dtype)
    rope = (array((rows, request["rotated"] // 2), jnp.float32),) * 2
    cache = (array((layers, rows, kv_heads, slots, width), dtype),) * 2
    one = array((1,), jnp.int32)
    ids = array((rows, slots), jnp.int32)
    token = cached.Token(one, one, ids, one if request["window"] else None)

    norms = (array((layers, width), dtype),) * 2 if request["norms"] else None

    def attend(qkv: Any, rope: Any, cache: Any, token: Any, a: Any, norms: Any) -> Any:
        named = {"scale": width**-0.5, "splits": request["splits"]}
        if norms is not None:
            named["norms"] = cached.HeadNorms(*norms, 1e-5)
        named["following"] = None if a is None else Following(a)
        out, cache = cached.attend(qkv, rope, cache, token, **named)
        # Without its results, the kernel that weighs the splits is left out.
        return (out, cache) if request["splits"] == 1 else cache

    return jax.jit(attend, donate_argnums=2).lower(qkv, rope, cache, token, a, norms)


def lower_decode(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces a kernel of `pallas_kernels.nf4.decode`, of one layer of a stack."""
    kind, rows, rank = request["kernel"], request["rows"], request["rank"]
    shapes = [tuple(shape) for shape in request["shapes"]]
    width, layers, dtype = shapes[0][1], request["layers"], jnp.dtype(request["dtype"])
    x, layer = array((rows, width), dtype), array((1,), jnp.int32)
    if kind == "inner":
        weight = array((layers, width), dtype) if request["norm"] else None
        a = array((layers, rank, width), dtype) if rank else None

        def inner(x: Any, layer: Any, weight: Any, a: Any) -> Any:
            norm = None if weight is None else nf4_inner.Norm(weight, 1e-5)
            return nf4_inner.inner(x, layer, norm=norm, a=a)

        return jax.jit(inner).lower(x, layer, weight, a)
    weights = [packed_arrays({**request, "shape": shape}, array) for shape in shapes]
    bs = [array((layers, shape[0], rank), dtype) for shape in shapes if rank]
    normed = request["parts"] is not None and request["norm"]
    parts = residual = following = None
    if request["parts"] is not None:
        numbers = (request["parts"], rows, rank * len(bs) + normed)
        parts = array(numbers, jnp.float32)
    if request["residual"]:
        residual = array((rows, shapes[0][0]), dtype)
    if request["follows"]:
        next_rank, next_norm, ahead = request["follows"]
        a = array((layers, shapes[0][0], next_rank), dtype) if next_rank else None
        norm = array((layers, shapes[0][0]), dtype) if next_norm else None
        following = (a, norm)
    plan = request["plan"] and decode_plan.Plan(*request["plan"])
    biases = [array((layers, s[0]), dtype) for s in shapes if request["biased"]] or None

    def products(
        x: Any, weights: Any, bs: Any, parts: Any, residual: Any, *rest: Any
    ) -> Any:
        following, biases = rest
        updates = [decode.Update(b, rank * i) for i, b in enumerate(bs)] or None
        named = {"gated": request["gated"], "residual": residual, "plan": plan}
        named |= {"shapes": shapes, "updates": updates, "parts": parts}
        named |= {"biases": biases, "multiplier": 0.5 if biases else 1.0}
        if following is not None:
            named["following"] = Following(*following, ahead)
        return decode.products(x, weights, eps=1e-5 if normed else None, **named)

    arguments = (x, weights, bs, parts, residual, following, biases)
    return jax.jit(products).lower(*arguments)


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
        return jax.jit(attention_forward).lower(q, k, v, segments)
    if request["kernel"] == "gradient":

        def gradient(q: Any, k: Any, v: Any, dout: Any, segments: Any) -> Any:
            def call(q: Any, k: Any, v: Any) -> Any:
                return flash_attention(q, k, v, segments, implementation="pallas")

            return jax.vjp(call, q, k, v)[1](dout)

        return jax.jit(gradient).lower(q, k, v, dout, segments)
    kernel = getattr(attention_backward, f"_backward_{request['kernel']}")
    form = Form.of(request["width"], scale=None, softcap=None)
    options = {"window": None, "form": form, "tiles": None, "interpret": False}
    backward = functools.partial(kernel, **options)
    numbers = array((batch, heads, 2, length), jnp.float32)
    return jax.jit(backward).lower(q, k, v, dout, numbers, segments)


def lower_norm(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces a kernel of `pallas_kernels.norm`."""
    count, features, rank = (request[name] for name in ("rows", "features", "rank"))
    dtype = jnp.dtype(request["dtype"])
    x = array((count, features), dtype)
    factor, a = array((features,), jnp.float32), array((rank, features), dtype)
    if request["kernel"] == "norm_forward":
        forward = functools.partial(
            norm_gpu.forward, eps=1e-5, rounds_first=request["rounds_first"]
        )
        return jax.jit(forward).lower(x, factor, a, array((rank,), jnp.float32))
    backward = functools.partial(norm_gpu.backward, eps=1e-5)
    dx_ext, z = array((count, features + rank), dtype), array((count, rank), dtype)
    inner = array((count,), jnp.float32)
    return jax.jit(backward).lower(dx_ext, z, a, inner, x, factor, x)


def lower_gated(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces a kernel of `pallas_kernels.gated`."""
    count, features, ranks = (request[name] for name in ("rows", "features", "ranks"))
    dtype = jnp.dtype(request["dtype"])
    gate_up = array((count, 2 * features), dtype)
    if request["kernel"] == "gated_forward":
        a = array((ranks[-1], features), dtype)
        return jax.jit(gated_gpu.forward).lower(gate_up, a)
    dh, z = (
        array((count, features), dtype),
        tuple(array((count, r), dtype) for r in ranks),
    )
    return jax.jit(gated_gpu.backward).lower(gate_up, dh, z)


def lower_generation(request: dict[str, Any], array: Any) -> jax.stages.Lowered:
    """Traces generation with the requested model."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    compute = {name: request[name] for name in ("attention", "remat", "kernels")}
    config = LlamaConfig.from_hf(request["config"])
    base = abstract_base(config, quantization="nf4_dq")
    # The adapters as they are trained: one rank and scaling for all.
    variables = {"params": base, "lora": abstract_adapters(base, lora)}
    rows = jax.ShapeDtypeStruct((request["batch"], request["length"]), jnp.int32)
    values = jax.eval_shape(lambda: Values.of(Sampling()))
    arguments = (variables, rows, rows, values)
    arguments = jax.tree.map(lambda a: array(a.shape, a.dtype), arguments)
    model, size = Llama(config, Compute(lora=lora, **compute)), request["generate"]
    cache_size = request["length"] + size
    program = _Program.of(model, Sampling(), (2,), cache_size=cache_size)
    return _generate.lower(program, *arguments, max_new_tokens=size)


def main(requests: list[dict[str, Any]], out: Path, card_name: str) -> None:
    card = CARDS[card_name]
    mesh = gpu_mesh(card)
    device = NamedSharding(mesh, PartitionSpec())
    # Mosaic reads the capability of the GPU at hand, and without one assumes an H100.
    infer_arch = mosaic_gpu.utils._infer_arch
    for module in list(sys.modules.values()):
        if getattr(module, "_infer_arch", None) is infer_arch:
            module._infer_arch = lambda *_, **__: card.compute_capability
    array = functools.partial(jax.ShapeDtypeStruct, sharding=device)
    os.environ["MOSAIC_GPU_DUMP_HOST_LLVM"] = "1"
    for number, request in enumerate(requests):
        folder = out / str(number)
        folder.mkdir()
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
        lower = lower_nf4 if "shape" in request else lower_attention
        lower = lower_decode if "shapes" in request else lower
        lower = lower_norm if "features" in request else lower
        lower = lower_gated if "ranks" in request else lower
        lower = lower_attend if "sizes" in request else lower
        lower = lower_generation if "config" in request else lower
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for whom to trace
            lowered = lower(request, array)
        compiled = lowered.compile(compiler_options=compiler_options("gpu"))
        if "config" in request:
            (folder / "program.txt").write_text(compiled.as_text())
        for kind in KEPT if request.get("kernel", "gradient") != "gradient" else ():
            made = list(folder.glob(f"*.{kind}"))
            # Each request must make one kernel, and none that an earlier one made.
            if len(made) != 1:
                raise SystemExit(f"{len(made)} files .{kind} for {request}")
            made[0].rename(folder / f"kernel.{kind}")
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        (folder / "memory.json").write_text(json.dumps({"temporaries": temporaries}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), (*sys.argv, "h200")[3])
