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

Behind an RMSNorm, `[x; z]` and the gradient of the residual stream may each be one
kernel (`normed_linear`, `pallas_kernels.norm`): the former with the norm, the latter
with its derivative. In an MLP (`gated_linears`, `pallas_kernels.gated`) the activation
and its derivative may each be one kernel, with every narrow product that would read
arrays as wide as the MLP once more: `A h` of down, and the gradients of its A and of
the B of gate and up. The activation h itself is then not kept.

The weights are written when they are dequantized, so joining them costs nothing. The
sums are those of `linear` in another order, and an update is not rounded before it is
added.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.gated.api import RANKS, gated_activation, gated_gradients
from pallas_kernels.norm.api import normed_input
from pallas_kernels.product import contract, dense_matmul, outer
from pallas_kernels.rows import Divided
from qlora_jax import nf4
from qlora_jax.lora import functional as lora_lib
from qlora_jax.models.sharding import divided_rows

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
    """Applies linear layers to one input, as one product if that is wider than it.

    Args:
      x: inputs, features last.
      layers: from `Linear.function`, of which `can_join` holds.
      interleaved: whether the rows of the joined weight alternate between the layers,
        which must then have the same number of outputs. An elementwise function of all
        outputs then reads, and its derivative writes, one stretch of memory.

    Returns:
      The output of each layer.
    """
    if len(layers) > 1 and not can_fuse_norm(layers):
        # Together no wider than their input: beside it there are no columns to share.
        return [out for layer in layers for out in joined_linear(x, [layer])]
    joined = _Joined.of(layers, interleaved)
    y: Any = _joined(joined.static, x, joined.weights, joined.factors, joined.scaling)
    return joined.outputs(y)


def can_fuse_norm(layers: Sequence[partial[Array]]) -> bool:
    """Returns whether `normed_linear` takes the layers, of which `can_join` holds."""
    return _is_wide([layer.keywords["weight"] for layer in layers])


def normed_linear(
    x: Float[Array, "*B I"],
    norm: partial[Array],
    layers: Sequence[partial[Array]],
    *,
    interleaved: bool = False,
    implementation: str | None = None,
) -> tuple[list[Float[Array, "*B O"]], Float[Array, "*B I"]]:
    """Applies an RMSNorm, and linear layers to its output as one product.

    Args:
      x: residual stream.
      norm: from `RMSNorm.function`.
      layers: from `Linear.function`, of which `can_join` and `can_fuse_norm` hold.
      interleaved: as for `joined_linear`.
      implementation: as `normed_input` takes it.

    Returns:
      The output of each layer; and x, for the residual connection: the derivative
      through it is added by the kernel that computes the norm's.
    """
    joined = _Joined.of(layers, interleaved)
    extended, x = joined.normed_input(x, norm, implementation)
    y: Any = _extended(joined.static, extended, joined.weights, joined.bs)
    return joined.outputs(y), x


def can_gate(gate_up: Sequence[partial[Array]], down: partial[Array]) -> bool:
    """Returns whether `gated_linears` takes the layers, of which `can_join` holds."""
    layers = [*gate_up, down]
    return (
        len(gate_up) == 2
        and can_fuse_norm(gate_up)
        and not can_fuse_norm([down])
        and all(layer.keywords["bias"] is None for layer in layers)
    )


def gated_linears(
    x: Float[Array, "*B D"],
    norm: partial[Array],
    gate_up: Sequence[partial[Array]],
    down: partial[Array],
    *,
    norm_implementation: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Applies an RMSNorm, and to its output y `down(silu(gate(y)) * up(y))`.

    Args:
      x: residual stream.
      norm: from `RMSNorm.function`.
      gate_up: the two, from `Linear.function`; `can_gate` holds.
      down: from `Linear.function`.
      norm_implementation: as `normed_input` takes it.
      implementation: as `gated_activation` takes it.

    Returns:
      The output, and x as `normed_linear` returns it.
    """
    first, last = _Joined.of(gate_up, interleaved=True), _Joined.of([down], False)
    extended, x = first.normed_input(x, norm, norm_implementation)
    static = _Gated(first.static.saved, implementation, divided_rows(x))
    factors = (last.factors[0], last.scaling)
    y: Any = _gated(
        static, extended, (*first.weights, *last.weights), first.bs, factors
    )
    return y, x


class _Joined(NamedTuple):
    """The arrays of layers that are joined."""

    static: _Static
    weights: tuple[nf4.NF4Tensor, ...]
    factors: tuple[tuple[Array, Array], ...]
    scaling: Float32[Array, " r"]
    biases: tuple[Array | None, ...]

    @classmethod
    def of(cls, layers: Sequence[partial[Array]], interleaved: bool) -> _Joined:
        settings = [layer.keywords for layer in layers]
        adapters = [s["adapter"] for s in settings]
        factors = tuple(
            (adapter.arrays["lora_A"], adapter.arrays["lora_B"]) for adapter in adapters
        )
        scaling = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(adapter.scaling, jnp.float32), a.shape[:1])
                for adapter, (a, _) in zip(adapters, factors, strict=True)
            ]
        )
        return cls(
            _Static(interleaved, settings[0]["saved"]),
            tuple(s["weight"] for s in settings),
            factors,
            scaling,
            tuple(s["bias"] for s in settings),
        )

    @property
    def bs(self) -> tuple[Array, ...]:
        """B of each layer."""
        return tuple(b for _, b in self.factors)

    def normed_input(
        self, x: Array, norm: partial[Array], implementation: str | None
    ) -> tuple[Array, Array]:
        """Returns `[y; z]` of the norm y of x, and x."""
        a = jnp.concatenate([a for a, _ in self.factors])
        a = jnp.pad(a, ((0, -a.shape[0] % _RANK_MULTIPLE), (0, 0)))
        scaling = jnp.pad(self.scaling, (0, a.shape[0] - self.scaling.shape[0]))
        return normed_input(
            *(x, norm.keywords["weight"], a, scaling),
            eps=norm.keywords["eps"],
            offset=norm.keywords["offset"],
            implementation=implementation,
            divided=divided_rows(x),
        )

    def outputs(self, y: Array) -> list[Array]:
        """Returns the output of each layer, of the product of all."""
        widths = [weight.shape[0] for weight in self.weights]
        return [
            out if bias is None else out + _as_row(bias, out)
            for out, bias in zip(
                _split(y, widths, self.static.interleaved), self.biases, strict=True
            )
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
    bs: Sequence[Array],
    dtype: Any,
    interleaved: bool,
) -> Float[Array, "O K"]:
    """Returns `[[W_1, B_1, 0], [W_2, 0, B_2]]`, K = I + R."""
    ranks = [b.shape[1] for b in bs]
    total = sum(ranks) + -sum(ranks) % _RANK_MULTIPLE
    rows, first = [], 0
    for weight, b, rank in zip(weights, bs, ranks, strict=True):
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
        bs = [b for _, b in factors]
        joined = _join_weights(weights, bs, x.dtype, static.interleaved)
        y = contract(jnp.concatenate([x, scaled], axis=-1), joined, 1)
    else:
        ((weight,), ((_, b),)) = (weights, factors)
        y = _narrow(x, scaled, weight, b)
    y = lora_lib.name_product(y, "linear_out", saved=static.saved)
    return y, (x, inner, weights, factors, scaling)


def _joined_bwd(static: _Static, residuals: tuple, dy: Array) -> tuple:
    x, inner, weights, factors, scaling = residuals
    a = _stack_a(factors, x.dtype)
    features = x.shape[-1]
    if _is_wide(weights):
        bs = [b for _, b in factors]
        joined = _join_weights(weights, bs, x.dtype, static.interleaved)
        both = contract(dy, joined, 0)
        dscaled = _times_scaling(both[..., features:], scaling)
        # Added by whoever reads dx: added into `both`, whose rows are longer, the
        # compiler would copy it first.
        rest = jax.lax.optimization_barrier(contract(dscaled, a, 0))
        dx = both[..., :features] + rest
    else:
        ((weight,), ((_, b),)) = (weights, factors)
        dx, dscaled = _narrow_gradient(dy, weight, a, b, scaling)
    da = outer(dscaled, x)
    db = outer(dy, _times_scaling(inner, scaling))
    dbs = _gradients_of_b(db, weights, tuple(b for _, b in factors), static)
    first, gradients = 0, []
    for (a_part, _), db_part in zip(factors, dbs, strict=True):
        last = first + a_part.shape[0]
        gradients.append((da[first:last].astype(a_part.dtype), db_part))
        first = last
    return dx, None, tuple(gradients), None


def _narrow(x: Array, scaled: Array, weight: nf4.NF4Tensor, b: Array) -> Array:
    """Returns `W x + B z` of a layer whose output is narrower than x."""
    dense = nf4.dequantize(weight, x.dtype, implementation="xla")
    update: Any = dense_matmul(scaled[..., : b.shape[1]], b)
    return contract(x, dense, 1) + update


def _narrow_gradient(
    dy: Array, weight: nf4.NF4Tensor, a: Array, b: Array, scaling: Array
) -> tuple[Array, Array]:
    """Returns the gradient of x, and `s B^T dy`."""
    dinner: Any = contract(dy, jnp.pad(b.astype(dy.dtype), _pad_to(b, a)), 0)
    dscaled = _times_scaling(dinner, scaling)
    dense = nf4.dequantize(weight, dy.dtype, implementation="xla")
    beside = jnp.concatenate([dy, dscaled], axis=-1)
    return contract(beside, jnp.concatenate([dense, a]), 0), dscaled


def _pad_to(b: Array, a: Array) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, 0), (0, a.shape[0] - b.shape[1])


_joined.defvjp(_joined_fwd, _joined_bwd)


# --- Behind a norm, whose kernel has written [x; z] already ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _extended(static: _Static, x: Array, weights: tuple, bs: tuple) -> Array:
    return _extended_fwd(static, x, weights, bs)[0]


def _extended_fwd(
    static: _Static, x: Array, weights: tuple, bs: tuple
) -> tuple[Array, tuple]:
    y = contract(x, _join_weights(weights, bs, x.dtype, static.interleaved), 1)
    y = lora_lib.name_product(y, "linear_out", saved=static.saved)
    return y, (x, weights, bs)


def _extended_bwd(static: _Static, residuals: tuple, dy: Array) -> tuple:
    x, weights, bs = residuals
    dx = contract(dy, _join_weights(weights, bs, x.dtype, static.interleaved), 0)
    db = outer(dy, x[..., weights[0].shape[1] :])
    return dx, None, tuple(_gradients_of_b(db, weights, bs, static))


def _gradients_of_b(
    db: Float32[Array, "O R"], weights: tuple, bs: tuple, static: _Static
) -> Iterator[Array]:
    """Yields the gradient of each B, cut out of that of all outputs and ranks."""
    first = 0
    columns = _split(db.T, [w.shape[0] for w in weights], static.interleaved)
    for b, rows in zip(bs, columns, strict=True):
        yield rows[first : first + b.shape[1]].T.astype(b.dtype)
        first += b.shape[1]


_extended.defvjp(_extended_fwd, _extended_bwd)


# --- An MLP ---


class _Gated(NamedTuple):
    saved: bool
    implementation: str | None
    divided: Divided | None

    @property
    def of_kernels(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "divided": self.divided}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(
    static: _Gated, x: Array, weights: tuple, bs: tuple, factors: tuple
) -> Array:
    return _gated_fwd(static, x, weights, bs, factors)[0]


def _gated_fwd(
    static: _Gated, x: Array, weights: tuple, bs: tuple, factors: tuple
) -> tuple[Array, tuple]:
    *gate_up, down = weights
    (a, b), scaling = factors
    joined = _join_weights(gate_up, bs, x.dtype, interleaved=True)
    y = lora_lib.name_product(contract(x, joined, 1), "linear_out", saved=static.saved)
    stacked = _stack_a([(a, b)], x.dtype)
    h, inner = gated_activation(y, stacked, **static.of_kernels)
    inner = lora_lib.name_product(inner, "lora_inner", saved=static.saved)
    out = _narrow(h, _times_scaling(inner, scaling), down, b)
    out = lora_lib.name_product(out, "linear_out", saved=static.saved)
    return out, (x, y, inner, weights, bs, factors)


def _gated_bwd(static: _Gated, residuals: tuple, dout: Array) -> tuple:
    x, y, inner, weights, bs, factors = residuals
    *gate_up, down = weights
    (a, b), scaling = factors
    stacked = _stack_a([(a, b)], x.dtype)
    dh, dscaled = _narrow_gradient(dout, down, stacked, b, scaling)
    features = gate_up[0].shape[1]
    middle, last = (features + sum(b.shape[1] for b in bs[: n + 1]) for n in range(2))
    zs = (x[..., features:middle], x[..., middle:last], dscaled)
    gate, up, h = map(_padded, zs)
    dy, (dgate, dup, da) = gated_gradients(y, dh, (gate, up, h), **static.of_kernels)
    joined = _join_weights(gate_up, bs, x.dtype, interleaved=True)
    dx = contract(dy, joined, 0)
    dbs = tuple(
        db[: b.shape[1]].T.astype(b.dtype)
        for b, db in zip(bs, (dgate, dup), strict=True)
    )
    db = outer(dout, _times_scaling(inner, scaling))[:, : b.shape[1]]
    dfactors = (da[: a.shape[0]].astype(a.dtype), db.astype(b.dtype))
    return dx, None, dbs, (dfactors, None)


def _padded(z: Float[Array, "*B R"]) -> Array:
    """Returns z with zeros up to a multiple of the ranks that the kernels take."""
    return jnp.pad(z, (*[(0, 0)] * (z.ndim - 1), (0, -z.shape[-1] % RANKS)))


_gated.defvjp(_gated_fwd, _gated_bwd)
