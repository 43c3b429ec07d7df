"""Adapted linear layers of one input as one matrix product.

`linear` multiplies the update of an adapter on its own and adds it to `W x`, for each
layer. On a GPU most of the time of an update is spent on memory: writing `B (A x)`,
reading `dy` once more for `B^T dy`, and adding up what q_proj, k_proj and v_proj
contribute to the gradient of their input. With the factors as further columns of the
weight a product that runs anyway does all of this. For the layers i that share x:

    A = [A_1; A_2; ...]                              [R, I], the ranks one after another
    W = [[W_1, B_1, 0, ...], [W_2, 0, B_2, ...], ...]            [O, I + R]
    z = s A x                                        [T, R], s = scaling of each rank
    y = W [x; z]                                     all outputs, updates included
    [g; h] = W^T dy                                  g = sum_i W_i^T dy_i, h = B^T dy
    dx = g + A^T (s h),   dA = (s h)^T x,   dB_i = dy_i^T z_i

That is for outputs that are wider than their input (gate and up). Where they are
narrower (down) the further columns would have to be written beside the wide input; the
update is then added as `linear` does, and the factors are rows of the weight in the
backward pass, beside the narrow `dy`:

    dx = [W; A]^T [dy; s B^T dy]

The weights are written when they are dequantized, so joining them costs nothing. The
sums are those of `linear` in another order, and an update is not rounded before it is
added.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.product import contract, dense_matmul, outer
from qlora_jax import nf4
from qlora_jax.lora import functional as lora_lib

_RANK_MULTIPLE = 16
"""Elements to a multiple of which the ranks are padded: rows of 16-bit numbers then
begin where a GPU's widest loads may."""


def can_join(layers: Sequence[partial[Array]]) -> bool:
    """Returns whether the layers compute `W x + scaling * B (A x) + bias` and no more.

    Args:
      layers: from `Linear.function`, of the same input.
    """
    return all(_is_plain(**layer.keywords) for layer in layers)


def _is_plain(weight: Any, adapter: Any, implementation: str | None, **_: Any) -> bool:
    # Only XLA's dequantization writes several weights and factors as one array.
    if implementation not in (None, "xla") or not isinstance(weight, nf4.NF4Tensor):
        return False
    if weight.layer is not None:  # one of a stack, which the kernels read
        return False
    drops = adapter.dropout > 0.0 and adapter.key is not None
    only_pair = set(adapter.arrays) == {"lora_A", "lora_B"}
    only_pair = only_pair and adapter.arrays["lora_A"].ndim == 2
    return only_pair and adapter.residual is None and not drops


def joined_linear(
    x: Float[Array, "*B I"],
    layers: Sequence[partial[Array]],
    *,
    interleaved: bool = False,
) -> list[Float[Array, "*B O"]]:
    """Applies linear layers to one input, as one product.

    Args:
      x: inputs, features last.
      layers: from `Linear.function`, of which `can_join` holds.
      interleaved: whether the rows of the joined weight alternate between the layers,
        which must then have the same number of outputs. An elementwise function of all
        outputs then reads, and its derivative writes, one stretch of memory.

    Returns:
      The output of each layer.
    """
    settings = [layer.keywords for layer in layers]
    adapters = [s["adapter"] for s in settings]
    factors = tuple(
        (adapter.arrays["lora_A"], adapter.arrays["lora_B"]) for adapter in adapters
    )
    static = _Static(interleaved, settings[0]["saved"])
    scaling = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.asarray(adapter.scaling, jnp.float32), a.shape[:1])
            for adapter, (a, _) in zip(adapters, factors, strict=True)
        ]
    )
    weights = tuple(s["weight"] for s in settings)
    y: Any = _joined(static, x, weights, factors, scaling)
    outputs = _split(y, [weight.shape[0] for weight in weights], interleaved)
    biases = [s["bias"] for s in settings]
    return [
        out if bias is None else out + _as_row(bias, out)
        for out, bias in zip(outputs, biases, strict=True)
    ]


class _Static(NamedTuple):
    interleaved: bool
    saved: bool


def _as_row(vector: Array, like: Array) -> Array:
    return jnp.expand_dims(vector.astype(like.dtype), range(like.ndim - 1))


def _split(y: Array, outputs: list[int], interleaved: bool) -> list[Array]:
    if len(outputs) == 1:
        return [y]
    if interleaved:
        parts = y.reshape(*y.shape[:-1], outputs[0], len(outputs))
        return [parts[..., n] for n in range(len(outputs))]
    ends = [sum(outputs[: n + 1]) for n in range(len(outputs) - 1)]
    return jnp.split(y, ends, axis=-1)


def _is_wide(weights: Sequence[nf4.NF4Tensor]) -> bool:
    return sum(weight.shape[0] for weight in weights) > weights[0].shape[1]


def _stack_a(factors: Sequence[tuple[Array, Array]], dtype: Any) -> Float[Array, "R I"]:
    """Returns A, with rows of zeros up to a multiple of `_RANK_MULTIPLE`."""
    rows = jnp.concatenate([a for a, _ in factors]).astype(dtype)
    return jnp.pad(rows, ((0, -rows.shape[0] % _RANK_MULTIPLE), (0, 0)))


def _times_scaling(z: Float[Array, "*B R"], scaling: Float32[Array, " r"]) -> Array:
    # In float32: a factor rounded to bf16 would be off by up to 0.4 %.
    factor = jnp.pad(scaling, (0, z.shape[-1] - scaling.shape[0]))
    wide = z.astype(jnp.float32) * jnp.expand_dims(factor, range(z.ndim - 1))
    return wide.astype(z.dtype)


def _join_weights(
    weights: Sequence[nf4.NF4Tensor],
    factors: Sequence[tuple[Array, Array]],
    dtype: Any,
    interleaved: bool,
) -> Float[Array, "O K"]:
    """Returns `[[W_1, B_1, 0], [W_2, 0, B_2]]`, K = I + R."""
    ranks = [a.shape[0] for a, _ in factors]
    total = sum(ranks) + -sum(ranks) % _RANK_MULTIPLE
    rows, first = [], 0
    for weight, (_, b), rank in zip(weights, factors, ranks, strict=True):
        dense = nf4.dequantize(weight, dtype, implementation="xla")
        beside = jnp.pad(b.astype(dtype), ((0, 0), (first, total - first - rank)))
        rows.append(jnp.concatenate([dense, beside], axis=1))
        first += rank
    if interleaved:
        return jnp.stack(rows, axis=1).reshape(-1, rows[0].shape[1])
    return jnp.concatenate(rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joined(
    static: _Static, x: Array, weights: tuple, factors: tuple, scaling: Array
) -> Array:
    return _joined_fwd(static, x, weights, factors, scaling)[0]


def _joined_fwd(
    static: _Static, x: Array, weights: tuple, factors: tuple, scaling: Array
) -> tuple[Array, tuple]:
    inner: Any = contract(x, _stack_a(factors, x.dtype), 1)
    inner = lora_lib.name_product(inner, "lora_inner", saved=static.saved)
    scaled = _times_scaling(inner, scaling)
    if _is_wide(weights):
        joined = _join_weights(weights, factors, x.dtype, static.interleaved)
        y = contract(jnp.concatenate([x, scaled], axis=-1), joined, 1)
    else:
        ((weight,), ((_, b),)) = (weights, factors)
        dense = nf4.dequantize(weight, x.dtype, implementation="xla")
        update: Any = dense_matmul(scaled[..., : b.shape[1]], b)
        y = contract(x, dense, 1) + update
    y = lora_lib.name_product(y, "linear_out", saved=static.saved)
    return y, (x, inner, weights, factors, scaling)


def _joined_bwd(static: _Static, residuals: tuple, dy: Array) -> tuple:
    x, inner, weights, factors, scaling = residuals
    a = _stack_a(factors, x.dtype)
    features = x.shape[-1]
    if _is_wide(weights):
        joined = _join_weights(weights, factors, x.dtype, static.interleaved)
        both = contract(dy, joined, 0)
        dscaled = _times_scaling(both[..., features:], scaling)
        # Added by whoever reads dx: added into `both`, whose rows are longer, the
        # compiler would copy it first.
        rest = jax.lax.optimization_barrier(contract(dscaled, a, 0))
        dx = both[..., :features] + rest
    else:
        ((weight,), ((_, b),)) = (weights, factors)
        dinner: Any = contract(dy, jnp.pad(b.astype(dy.dtype), _pad_to(b, a)), 0)
        dscaled = _times_scaling(dinner, scaling)
        dense = nf4.dequantize(weight, x.dtype, implementation="xla")
        beside = jnp.concatenate([dy, dscaled], axis=-1)
        dx = contract(beside, jnp.concatenate([dense, a]), 0)
    da = outer(dscaled, x)
    db = outer(dy, _times_scaling(inner, scaling))
    first, gradients = 0, []
    columns = _split(db.T, [w.shape[0] for w in weights], static.interleaved)
    for (a_part, b_part), rows in zip(factors, columns, strict=True):
        last = first + a_part.shape[0]
        gradients.append(
            (
                da[first:last].astype(a_part.dtype),
                rows[first:last].T.astype(b_part.dtype),
            )
        )
        first = last
    return dx, None, tuple(gradients), None


def _pad_to(b: Array, a: Array) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, 0), (0, a.shape[0] - b.shape[1])


_joined.defvjp(_joined_fwd, _joined_bwd)
