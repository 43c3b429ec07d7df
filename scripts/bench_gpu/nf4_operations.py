"""The operations on NF4 weights that are timed, and their check against XLA.

Calls go round over weights and results that together exceed any cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, nf4_dequantize, nf4_matmul
from pallas_kernels.nf4.shapes import MODELS, Model
from qlora_jax import nf4
from scripts.bench_gpu import gated_operations, norm_operations
from scripts.bench_gpu.timing import ceilings, failure, measure, random_key

Request = Mapping[str, Any]
Shape = tuple[int, int]
PASSES: Mapping[str, Any] = {
    kind: module
    for module in (norm_operations, gated_operations)
    for kind in module.KINDS
}
"""What is no product with a packed weight, and the module that has its operations."""
# In place of a real model, and of any weight, in a dry run.
NARROW = Model("narrow", 128, 256, 2, 2, 1, 64)
# Bytes and width of what shows the ceilings there.
SMALL = {"size": 1 << 16, "width": 64, "traces": 1, "seconds": 1e-3}


def random_weight(
    shape: Shape, double_quant: bool, leading: tuple[int, ...], seed: int = 0
) -> tuple[jax.Array, jax.Array, Any]:
    """Makes codes, absmax and nested on the device, of weights around 0.03."""
    blank = nf4.abstract(
        shape, double_quant=double_quant, dtype="bfloat16", leading=leading
    )
    key = iter(jax.random.split(random_key(seed), 3))

    def bits(leaf: Any) -> jax.Array:
        return jax.random.bits(next(key), leaf.shape, jnp.uint8)

    def uniform(leaf: Any, low: float, high: float) -> jax.Array:
        return jax.random.uniform(next(key), leaf.shape, minval=low, maxval=high)

    if not double_quant:
        return bits(blank.codes), uniform(blank.absmax, 0.02, 0.08), None
    filled = dataclasses.replace(
        blank,
        codes=bits(blank.codes),
        absmax=bits(blank.absmax),
        nested_absmax=uniform(blank.nested_absmax, 0.005, 0.02),
        nested_offset=jnp.full(leading, 0.05, jnp.float32),
        nested_quant_map=jnp.broadcast_to(
            jnp.asarray(nf4.DYNAMIC_MAP), blank.nested_quant_map.shape
        ),
    )
    return filled.codes, filled.absmax, filled.nested()


@contextlib.contextmanager
def force_choice(
    kind: str,
    shape: Shape,
    implementation: str,
    rows: int,
    tuning: dict[str, int] | None,
) -> Iterator[None]:
    """Makes "pallas" choose one way to compute, while a program is traced.

    Which of its ways to multiply so many rows ("fused", "wgmma", or neither), and with
    which settings: this is what is measured here, whatever was measured before.
    """
    before = device.tuned
    name = f"{shape[0]}x{shape[1]}"
    kind = "wgmma" if implementation == "wgmma" else kind
    choices = {
        "fused_rows": {name: rows if implementation == "fused" else 0},
        "wgmma_rows": {name: [rows, rows]} if implementation == "wgmma" else {},
        "tuning": {f"{kind} {name} {rows}": tuning} if tuning else {},
    }
    device.tuned = lambda *_: choices
    try:
        yield
    finally:
        device.tuned = before


def operation(
    request: Request, shape: Shape, **changes: Any
) -> Callable[..., jax.Array]:
    """Returns f(layer, operand, packed): what the request does to one weight."""
    request = {**request, **changes}
    implementation, tuning = request["implementation"], request.get("tuning")
    options: dict[str, Any] = {
        "shape": shape,
        "implementation": (
            "pallas" if implementation in ("fused", "wgmma") else implementation
        ),
    }

    def dequantize(layer: Any, operand: Any, packed: Any) -> jax.Array:
        del operand
        with force_choice("dequantize", shape, "", 0, tuning):
            return nf4_dequantize(*packed, dtype=jnp.bfloat16, layer=layer, **options)

    def matmul(layer: Any, x: Any, packed: Any) -> jax.Array:
        with force_choice("matmul", shape, implementation, x.shape[0], tuning):
            return nf4_matmul(x, *packed, layer=layer, **options)

    def backward(layer: Any, dy: Any, packed: Any) -> jax.Array:
        # Linear in x: the forward product is not needed, and not computed.
        x = jnp.zeros((dy.shape[0], shape[1]), dy.dtype)
        with force_choice("backward", shape, "", 0, None):
            (dx,) = jax.vjp(lambda x: matmul(layer, x, packed), x)[1](dy)
        return dx

    kinds = {"dequantize": dequantize, "matmul": matmul, "backward": backward}
    return kinds[request["kind"]]


def make_operand(request: Request, shape: Shape, basis: bool = False) -> Any:
    """Makes `x`, or dy for backward, in bf16: random, or rows with a single 1."""
    rows = request["rows"]
    if not rows:
        return None
    width = shape[0] if request["kind"] == "backward" else shape[1]
    if basis:
        return jax.nn.one_hot(
            (7919 * jnp.arange(rows)) % width, width, dtype=jnp.bfloat16
        )
    return jax.random.normal(random_key(3), (rows, width), jnp.bfloat16)


def weight_call(request: Request) -> Callable[[int], Any]:
    """Returns call(i) for a request with one shape, over `copies` weights in turn."""
    shape, copies = _pair(request["shape"]), request["copies"]
    x, run = make_operand(request, shape), jax.jit(operation(request, shape))
    if request["stacked"]:
        stack = random_weight(shape, request["double_quant"], (copies,))
        layers = [jnp.int32(i) for i in range(copies)]
        return lambda i: run(layers[i % copies], x, stack)
    weights = [
        random_weight(shape, request["double_quant"], (), seed)
        for seed in range(copies)
    ]
    return lambda i: run(None, x, weights[i % copies])


def projections_of(request: Request) -> tuple[Any, ...]:
    """Returns the projections of the model of a pass."""
    model = NARROW if request.get("dry_run") else MODELS[request["model"]]
    return model.projections


def model_call(request: Request) -> Callable[[int], Any]:
    """Returns call(i) that goes through all layers of a model in one program."""
    projections = projections_of(request)
    layers = request.get("layers") or projections[0].layers
    stacks = [
        random_weight(p.shape, request["double_quant"], (layers,), seed)
        for seed, p in enumerate(projections)
    ]
    inputs = [make_operand(request, p.shape) for p in projections]

    @jax.jit
    def run(inputs: Any, stacks: Any) -> Any:
        def run_layer(layer: jax.Array) -> list[jax.Array]:
            return [
                operation(request, p.shape)(layer, x, stack)
                for p, x, stack in zip(projections, inputs, stacks, strict=True)
            ]

        # The results are carried: each layer writes them, none may be left out. The
        # first layer's start the loop, and a corner of the last one's comes out, so
        # that nothing else is written.
        last = jax.lax.fori_loop(
            1, layers, lambda layer, _: run_layer(layer), run_layer(jnp.int32(0))
        )
        return [a[:1, :64] for a in last]

    return lambda i: run(inputs, stacks)


def _pair(shape: Any) -> Shape:
    out_features, in_features = shape
    return out_features, in_features


def mismatch(request: Request) -> str | None:
    """Compares with "xla" and with float32; returns the differences, None if equal.

    Weights must be equal bit for bit. A product with a row of a single 1 is one weight,
    where a kernel may have rounded the table's value instead of it: a relative 1/128
    at most, and neighbouring table values are over 1/5 apart. Other products are sums,
    whose order an implementation chooses.
    """
    differences = []
    shapes = [request["shape"]]
    if request["shape"] is None:
        shapes = [p.shape for p in projections_of(request)]
    stacked = request["stacked"]
    leading, layer = ((2,), jnp.int32(1)) if stacked else ((), None)
    for shape in dict.fromkeys(map(_pair, shapes)):
        packed = random_weight(shape, request["double_quant"], leading)
        this = jax.jit(operation(request, shape))
        xla = jax.jit(operation(request, shape, implementation="xla", tuning=None))
        basis = make_operand(request, shape, basis=True)
        got, want = this(layer, basis, packed), xla(layer, basis, packed)
        if request["rows"]:
            got, want = got.astype(jnp.float32), want.astype(jnp.float32)
            wrong = int(jnp.sum(~(jnp.abs(got - want) <= jnp.abs(want) / 64)))
        else:
            wrong = int(jnp.sum(got != want))
        if wrong:
            what = "one-hot products" if request["rows"] else "weights"
            differences.append(f"{shape}: {wrong:,} of {got.size:,} {what} differ")
        if request["rows"]:
            for name, wrong in _beyond_rounding(
                request, shape, layer, packed, {"this": this, "xla": xla}
            ).items():
                differences.append(f"{shape}: {wrong:,} of {name} beyond rounding")
    return "; ".join(differences) or None


def _beyond_rounding(
    request: Request,
    shape: Shape,
    layer: Any,
    packed: Any,
    functions: Mapping[str, Callable[..., jax.Array]],
) -> dict[str, int]:
    """Returns how many products of each function differ from those in float32."""
    x = make_operand(request, shape)
    dequantize = operation(
        request, shape, kind="dequantize", implementation="xla", tuning=None
    )
    weight = jax.jit(dequantize)(layer, None, packed).astype(jnp.float32)
    weight = weight if request["kind"] == "backward" else weight.T
    exact = jnp.dot(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    # Results have 8 bits. Table values of 8 bits add an error that does not shrink
    # where terms cancel: of 65,536 products the largest is 1/115 of the typical
    # size, and there are up to 10^8.
    size = jnp.sqrt(jnp.mean(exact * exact))
    bound = jnp.abs(exact) / 256 + size / 64
    counts = {}
    for name, function in functions.items():
        error = jnp.abs(function(layer, x, packed).astype(jnp.float32) - exact)
        if wrong := int(jnp.sum(~(error <= bound))):
            counts[name] = wrong
    return counts


def narrowed(request: Request) -> Request:
    """Returns a request as a dry run answers it: small, and in XLA without a GPU."""
    narrow = {**request, "dry_run": True, "copies": 2, "traces": 1}
    if jax.default_backend() != "gpu":
        narrow |= {"implementation": "xla", "tuning": {}}
    if request["rows"]:
        most = 64 if request["kind"] in PASSES else 16  # what their kernels take
        narrow["rows"] = min(most, request["rows"])
    if request["shape"]:
        narrow["shape"] = (16 if request["kind"] in PASSES else 128, 256)
    return narrow


def answer(request: Request, *, dry_run: bool = False, **how: Any) -> dict[str, Any]:
    """Answers one request: {"ceilings"}, {"timing"}, {"failed"} or {"unavailable"}."""
    if request["do"] == "ceilings":
        return {"ceilings": ceilings(**how, **SMALL if dry_run else {})}
    request = narrowed(request) if dry_run else request
    how = {"traces": request.get("traces", 3), **how}
    if dry_run:
        how["seconds"] = 1e-3
    module = PASSES.get(request["kind"])
    check, call_of = (
        (module.mismatch, module.weight_call)
        if module
        else (mismatch, weight_call if request["shape"] else model_call)
    )
    try:
        checked = dry_run or request["implementation"] != "xla"
        if checked and (wrong := check(request)):
            return {"failed": f"differs from xla: {wrong}"}
        return {"timing": measure(call_of(request), keep=request["copies"], **how)}
    except (ValueError, NotImplementedError) as error:
        return {"unavailable": str(error)[:1000]}
    except Exception as error:
        return failure(error)
