"""The MLP's activation with the low-rank products around it, timed and checked.

A request's shape is (ranks, features): those of each adapter, and of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated.api import gated_activation, gated_gradients
from scripts.bench_gpu.timing import random_key

KINDS = ("gated", "gated_backward")

Request = Mapping[str, Any]


def count_bytes(kind: str, shape: tuple[int, int], rows: int) -> int:
    """Counts the bytes that must move: inputs and results once each.

    Forward reads gate and up and A; it writes the activation, and its product with A.
    Backward reads gate and up, the gradient of the activation, and what multiplies the
    three products; it writes the gradients of gate and up, and the products in float32.
    """
    ranks, features = shape
    if kind == "gated":
        return 2 * (rows * (3 * features + ranks) + ranks * features)
    return 2 * rows * (5 * features + 3 * ranks) + 4 * 3 * ranks * features


def count_flops(kind: str, shape: tuple[int, int], rows: int) -> int:
    """Counts the operations of the low-rank products."""
    return (1 if kind == "gated" else 3) * 2 * rows * shape[0] * shape[1]


def operands(request: Request, seed: int = 0) -> tuple[Any, ...]:
    """Makes gate and up, what else is read, all in bf16: dh and z; and A."""
    ranks, features = request["shape"]
    rows = request["rows"]
    keys = jax.random.split(random_key(seed), 6)

    def normal(key: Any, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    z = tuple(normal(key, rows, ranks) for key in keys[2:5])
    a = normal(keys[5], ranks, features) / features**0.5
    return normal(keys[0], rows, 2 * features), normal(keys[1], rows, features), z, a


def weight_call(request: Request) -> Callable[[int], Any]:
    """Returns call(i) for a request, over `copies` inputs in turn."""
    _, dh, z, a = operands(request)
    inputs = [operands(request, seed)[0] for seed in range(request["copies"])]
    named = {"implementation": request["implementation"]}
    if request["kind"] == "gated":
        run = jax.jit(lambda gate_up: gated_activation(gate_up, a, **named))
    else:
        run = jax.jit(lambda gate_up: gated_gradients(gate_up, dh, z, **named))
    return lambda i: run(inputs[i % len(inputs)])


def mismatch(request: Request) -> str | None:
    """Compares with XLA's results; returns the differences, None if equal.

    Both round the same float32 numbers, which differ by the order of the operations: by
    a unit of the last place now and then, and products by as much as their terms do.
    """
    gate_up, dh, z, a = operands(request)

    def results(implementation: str) -> list[jax.Array]:
        named = {"implementation": implementation}
        if request["kind"] == "gated":
            return jax.jit(lambda *args: [*gated_activation(*args, **named)])(
                gate_up, a
            )
        pairs, products = jax.jit(lambda *args: gated_gradients(*args, **named))(
            gate_up, dh, z
        )
        return [pairs, *products]

    differences = []
    both = zip(results(request["implementation"]), results("xla"), strict=True)
    for number, (got, want) in enumerate(both):
        got, want = (v.astype(jnp.float32) for v in (got, want))
        worst = float(jnp.abs(got - want).max())
        bound = 2.0**-7 * max(1.0, float(jnp.abs(want).max()))
        if not worst <= bound:
            name = f"result {number}"
            differences.append(f"{name} by {worst:.3g}, {bound:.3g} is rounding")
    return "; ".join(differences) or None
