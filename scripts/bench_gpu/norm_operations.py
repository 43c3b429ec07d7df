"""The norms with the low-rank products of their output, timed and checked against XLA.

A request's shape is (ranks, features): those of the adapters that read the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm.api import normed_input
from scripts.bench_gpu.timing import random_key

KINDS = ("norm", "norm_backward")
EPS = 1e-5

Request = Mapping[str, Any]


def count_bytes(kind: str, shape: tuple[int, int], rows: int) -> int:
    """Counts the bytes that must move: inputs and results once each, in bf16.

    Forward reads x and writes the output with the products. Backward reads the
    gradients of both and of the residual stream, x, and the products with their
    gradients in both forms; it writes the gradient of x.
    """
    ranks, features = shape
    wide, narrow = (2, 1) if kind == "norm" else (4, 3)
    return 2 * (rows * (wide * features + narrow * ranks) + (ranks + 1) * features)


def count_flops(kind: str, shape: tuple[int, int], rows: int) -> int:
    """Counts the operations of the low-rank products, the same in both directions."""
    del kind
    return 2 * rows * shape[0] * shape[1]


def operands(request: Request, seed: int = 0) -> tuple[Any, ...]:
    """Makes x, the gradients of both results, and (weight, A, scaling)."""
    ranks, features = request["shape"]
    rows = request["rows"]
    keys = jax.random.split(random_key(seed), 5)
    widths = (features, features + ranks, features)
    x, d_ext, d_x = (
        jax.random.normal(key, (rows, width), jnp.bfloat16)
        for key, width in zip(keys, widths, strict=False)
    )
    weight = 1 + 0.1 * jax.random.normal(keys[3], (features,), jnp.bfloat16)
    # As the kernels take A; a float32 one would be rounded in bf16 alone.
    a = jax.random.normal(keys[4], (ranks, features), jnp.bfloat16) / features**0.5
    scaling = jnp.full((ranks,), 2.0, jnp.float32)
    return x, d_ext, d_x, (weight, a.astype(jnp.float32), scaling)


def function_of(implementation: str, constants: Any) -> Callable[[Any], Any]:
    """Returns f(x): the extended input, and x."""
    return lambda x: normed_input(x, *constants, eps=EPS, implementation=implementation)


def weight_call(request: Request) -> Callable[[int], Any]:
    """Returns call(i) for a request, over `copies` inputs in turn."""
    copies = range(request["copies"])
    _, d_ext, d_x, constants = operands(request)
    inputs = [operands(request, seed)[0] for seed in copies]
    function = function_of(request["implementation"], constants)
    if request["kind"] == "norm":
        forward = jax.jit(lambda x: function(x)[0])
        return lambda i: forward(inputs[i % len(inputs)])
    # Traced once, so that what it keeps of each copy is an input of the same program.
    keep = jax.jit(lambda x: jax.vjp(function, x)[1])
    kept = [keep(x) for x in inputs]
    backward = jax.jit(lambda pull: pull((d_ext, d_x))[0])
    return lambda i: backward(kept[i % len(kept)])


def mismatch(request: Request) -> str | None:
    """Compares with the formula in float32; returns the differences, None if equal.

    Results are rounded to bfloat16, and so are the output before it is multiplied and
    the gradients of the products: three half-ulps of the largest element.
    """
    x, d_ext, d_x, constants = operands(request)
    results = []
    for implementation, dtype in (
        (request["implementation"], jnp.bfloat16),
        ("xla", jnp.float32),
    ):
        run = jax.jit(partial(_both, function_of(implementation, constants)))
        results.append(run(*(a.astype(dtype) for a in (x, d_ext, d_x))))
    differences = []
    for name, got, want in zip(("output", "dx"), *results, strict=True):
        worst = float(jnp.abs(got.astype(jnp.float32) - want).max())
        bound = 3 * 2.0**-8 * max(1.0, float(jnp.abs(want).max()))
        if not worst <= bound:
            differences.append(f"{name} by {worst:.3g}, {bound:.3g} is rounding")
    return "; ".join(differences) or None


def _both(function: Callable[[Any], Any], x: Any, d_ext: Any, d_x: Any) -> Any:
    (ext, _), pull = jax.vjp(function, x)
    return ext, pull((d_ext, d_x))[0]
