"""`gated_activation` and its derivative: checks, the choice of an implementation.

The gated activation of an MLP, `silu(gate) up`, and the narrow products with it and
with its derivative that the adapters around it need. On a GPU all of them wait for
memory alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import device
from pallas_kernels.gated import reference
from pallas_kernels.rows import Divided, by_rows, mesh_refusals, own_rows

IMPLEMENTATIONS = ("xla", "pallas", "interpret")
"""What computes: plain XLA; the kernels; or those kernels in Pallas's interpreter,
which is slow and runs on any device, for tests."""

TOKENS = 64
"""The kernels take a multiple of so many tokens,"""
FEATURES = 128
"""of so many features,"""
RANKS = 16
"""and of so many ranks, of each product:"""
MAX_RANKS = 32
"""as many as the registers hold without spilling."""


def gated_activation(
    gate_up: Float[Array, "*B F2"],
    a: Float[Array, "R F"],
    *,
    implementation: str | None = None,
    divided: Divided | None = None,
) -> tuple[Float[Array, "*B F"], Float[Array, "*B R"]]:
    """Computes `h = silu(gate) up` and `h a^T`.

    It has no derivative of its own: `gated_gradients` computes more than that.

    Args:
      gate_up: 16-bit, gate and up in turn.
      a: of the same dtype.
      implementation: one of `IMPLEMENTATIONS`; None = "pallas" where it can be used,
        else "xla".
      divided: how the devices of a mesh divide the rows (`pallas_kernels.rows`).

    Returns:
      Both in the dtype of `gate_up`.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot do this here,
        with the reason.
    """
    if gate_up.shape[-1] != 2 * a.shape[1]:
        raise ValueError(
            f"`gated_activation`: expected gate and up of the {a.shape[1]} features of "
            f"A, so [..., {2 * a.shape[1]}]; got {gate_up.shape}."
        )
    chosen = _choose(gate_up, (a.shape[0],), implementation, divided)

    if chosen == "xla":
        # The compiler divides it.
        forward, divided = reference.forward, None
    else:
        from pallas_kernels.gated import gpu

        forward = partial(gpu.forward, interpret=_interpreter(chosen))

    def activate(gate_up: Array, a: Array) -> tuple[tuple[Array, ...], tuple]:
        results = forward(_rows(gate_up), a)
        return tuple(v.reshape(*gate_up.shape[:-1], -1) for v in results), ()

    (h, inner), _ = by_rows(activate, divided, (gate_up,), (a,))
    return h, inner


def gated_gradients(
    gate_up: Float[Array, "*B F2"],
    dh: Float[Array, "*B F"],
    z: tuple[Float[Array, "*B R1"], Float[Array, "*B R2"], Float[Array, "*B R3"]],
    *,
    implementation: str | None = None,
    divided: Divided | None = None,
) -> tuple[Float[Array, "*B F2"], tuple[Float32[Array, "R F"], ...]]:
    """Computes the derivative, and `z_1^T dgate`, `z_2^T dup` and `z_3^T h`.

    Args:
      gate_up: as for `gated_activation`.
      dh: gradient of h, of the same dtype.
      z: of the same dtype.
      implementation: as for `gated_activation`.
      divided: as for `gated_activation`.

    Returns:
      The gradients of gate and up in turn, in the dtype of `gate_up`; and the three
      products with the rounded numbers, in float32.

    Raises:
      ValueError: as `gated_activation`.
    """
    *count, width = gate_up.shape
    expected = (*count, width // 2)
    if dh.shape != expected or any(each.shape[:-1] != expected[:-1] for each in z):
        raise ValueError(
            f"`gated_gradients`: expected dh {expected} and three z of its rows; got "
            f"{dh.shape} and {[each.shape for each in z]}."
        )
    ranks = tuple(each.shape[-1] for each in z)
    chosen = _choose(gate_up, ranks, implementation, divided)

    if chosen == "xla":
        backward, divided = reference.backward, None
    else:
        from pallas_kernels.gated import gpu

        backward = partial(gpu.backward, interpret=_interpreter(chosen))

    def derive(gate_up: Array, dh: Array, *z: Array) -> tuple[Array, Any]:
        first, second, third = map(_rows, z)
        arrays = (_rows(gate_up), _rows(dh), (first, second, third))
        dgate_up, products = backward(*arrays)
        return dgate_up.reshape(gate_up.shape), products

    return by_rows(derive, divided, (gate_up, dh, *z))


def refusal(
    gate_up: Float[Array, "*B F2"],
    ranks: tuple[int, ...],
    *,
    interpret: bool = False,
    divided: Divided | None = None,
) -> str | None:
    """Returns all reasons why the kernels cannot compute this here, or None.

    Args:
      gate_up: as for `gated_activation`.
      ranks: of each product.
      interpret: whether Pallas's interpreter would run them.
      divided: as for `gated_activation`.
    """
    reasons = device.hopper_refusals(interpret=interpret) + mesh_refusals(divided)
    if gate_up.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"they compute in 16 bits, not {jnp.dtype(gate_up.dtype).name}")
    features = gate_up.shape[-1] // 2
    count = own_rows(gate_up.size // gate_up.shape[-1], divided)
    if count % TOKENS or not count:
        reasons.append(f"they take a multiple of {TOKENS} tokens, not {count}")
    if features % FEATURES or not features:
        reasons.append(f"they take a multiple of {FEATURES} features, not {features}")
    for rank in ranks:
        if rank % RANKS or not 0 < rank <= MAX_RANKS:
            reasons.append(
                f"they take a multiple of {RANKS} ranks up to {MAX_RANKS}, not {rank}"
            )
            break
    return "; ".join(reasons) + "." if reasons else None


def _choose(
    gate_up: Float[Array, "*B F2"],
    ranks: tuple[int, ...],
    implementation: str | None,
    divided: Divided | None,
) -> str:
    if implementation is None:
        return "xla" if refusal(gate_up, ranks, divided=divided) else "pallas"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} of the gated activation does not "
            f"exist. Choose {', '.join(map(repr, IMPLEMENTATIONS[:2]))}, or None for "
            "the kernels where they can be used."
        )
    if implementation != "xla":
        interpret = implementation == "interpret"
        reason = refusal(gate_up, ranks, interpret=interpret, divided=divided)
        if reason is not None:
            raise ValueError(
                f"implementation={implementation!r} of the gated activation cannot be "
                f"used here: {reason} Use 'xla', or None for the kernels where they "
                "can be used."
            )
    return implementation


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _interpreter(implementation: str) -> object:
    return implementation == "interpret" and device.interpreter()
