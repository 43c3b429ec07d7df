"""`normed_input`: checks, the choice of an implementation, the derivative.

An RMSNorm and the low-rank products with its output, `A y`, together with their
derivative. On a GPU all of them wait for memory alone: one by one they read the rows 4
times in each direction, as one kernel once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import device
from pallas_kernels.norm import reference
from pallas_kernels.product import outer
from pallas_kernels.rows import Divided, by_rows, mesh_refusals, own_rows

IMPLEMENTATIONS = ("xla", "pallas", "interpret")
"""What computes: plain XLA; the kernels; or those kernels in Pallas's interpreter,
which is slow and runs on any device, for tests."""

ROWS = 16
"""The kernels take a multiple of so many rows, and of so many ranks."""
CHUNK = 128
"""They take a multiple of so many features."""
MAX_FEATURES = 16384
"""Up to which they are compiled and checked."""
MAX_RANKS = 128
"""As many as the registers hold without spilling."""


def normed_input(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    a: Float[Array, "R D"],
    scaling: Float32[Array, " R"],
    *,
    eps: float,
    offset: bool = False,
    implementation: str | None = None,
    divided: Divided | None = None,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B D"]]:
    """Computes `[y | scaling (A y)]` of the RMSNorm y of x, K = D + R, and returns x.

    Both derivatives of x, through the norm and through whatever else reads it, are
    added up by one kernel: let the rest of the program read the x that is returned.

    Args:
      x: residual stream.
      weight: of the norm.
      a: A of all low-rank products; rounded to the dtype of x, its gradient is not.
      scaling: factor of each row of A; it has no gradient.
      eps: added to the mean of the squares.
      offset: whether the norm's factor is 1 + weight, as in Gemma.
      implementation: one of `IMPLEMENTATIONS`; None = "pallas" where it can be used,
        else "xla".
      divided: how the devices of a mesh divide the rows (`pallas_kernels.rows`).

    Returns:
      The extended input, and x.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot do this here,
        with the reason.
    """
    features = x.shape[-1]
    if weight.shape != (features,) or a.shape[1:] != (features,):
        raise ValueError(
            f"`normed_input`: x has {features} features, so the norm's weight must be "
            f"[{features}] and A [R, {features}]; got {weight.shape} and {a.shape}."
        )
    if scaling.shape != a.shape[:1]:
        raise ValueError(
            f"`normed_input`: expected a scaling for each of the {a.shape[0]} rows of "
            f"A, got {scaling.shape}."
        )
    chosen = implementation
    if chosen is None:
        chosen = "xla" if refusal(x, a.shape[0], divided=divided) else "pallas"
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(
            f"`normed_input`: implementation={chosen!r} does not exist. Choose "
            f"{', '.join(map(repr, IMPLEMENTATIONS[:2]))}, or None for the kernels "
            "where they can be used."
        )
    if chosen != "xla":
        interpret = chosen == "interpret"
        reason = refusal(x, a.shape[0], interpret=interpret, divided=divided)
        if reason is not None:
            raise ValueError(
                f"`normed_input`: implementation={chosen!r} cannot be used here: "
                f"{reason} Use 'xla', or None for the kernels where they can be used."
            )
    static = _Static(chosen, eps, offset, divided)
    result: Any = _normed_input(static, x, weight, a, scaling)
    return result


def refusal(
    x: Float[Array, "*B D"],
    rank: int,
    *,
    interpret: bool = False,
    divided: Divided | None = None,
) -> str | None:
    """Returns all reasons why the kernels cannot compute this here, or None.

    Args:
      x: residual stream.
      rank: rows of A.
      interpret: whether Pallas's interpreter would run them.
      divided: as for `normed_input`.
    """
    reasons = device.hopper_refusals(interpret=interpret) + mesh_refusals(divided)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"they compute in 16 bits, not {jnp.dtype(x.dtype).name}")
    features = x.shape[-1]
    count = own_rows(x.size // features, divided)
    if count % ROWS or not count:
        reasons.append(f"they take a multiple of {ROWS} rows, not {count}")
    if features % CHUNK or features > MAX_FEATURES:
        reasons.append(
            f"they take a multiple of {CHUNK} features up to {MAX_FEATURES}, not "
            f"{features}"
        )
    if rank % ROWS or not 0 < rank <= MAX_RANKS:
        reasons.append(
            f"they take a multiple of {ROWS} ranks up to {MAX_RANKS}, not {rank}"
        )
    return "; ".join(reasons) + "." if reasons else None


class _Static(NamedTuple):
    implementation: str
    eps: float
    offset: bool
    divided: Divided | None = None

    @property
    def of_kernels(self) -> dict[str, Any]:
        interpreter = self.implementation == "interpret" and device.interpreter()
        return {"eps": self.eps, "interpret": interpreter}

    @property
    def of_norm(self) -> dict[str, Any]:
        return {"eps": self.eps, "offset": self.offset}

    def factor(self, weight: Array, x: Array) -> Array:
        """Returns the factor of each feature, as the kernels take it."""
        return reference.factor(weight, x.dtype, offset=self.offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed_input(
    static: _Static, x: Array, weight: Array, a: Array, scaling: Array
) -> tuple[Array, Array]:
    return _forward(static, x, weight, a, scaling)[0]


def _forward(
    static: _Static, x: Array, weight: Array, a: Array, scaling: Array
) -> tuple[tuple[Array, Array], tuple]:
    narrow = a.astype(x.dtype)
    if static.implementation == "xla":
        ext = reference.forward(x, weight, narrow, scaling, **static.of_norm)
    else:
        from pallas_kernels.norm import gpu

        def extend(x: Array, *shared: Array) -> tuple[Array, tuple]:
            ext = gpu.forward(
                *(_rows(x), *shared),
                rounds_first=not static.offset,
                **static.of_kernels,
            )
            return ext.reshape(*x.shape[:-1], -1), ()

        shared = (static.factor(weight, x), narrow, scaling)
        ext, _ = by_rows(extend, static.divided, (x,), shared)
    return (ext, x), (x, weight, a, scaling, ext)


def _backward(
    static: _Static, residuals: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    x, weight, a, scaling, ext = residuals
    dx_ext, dres = gradients
    features, narrow = x.shape[-1], a.astype(x.dtype)
    # In float32: a factor rounded to bf16 would be off by up to 0.4 %.
    h = dx_ext[..., features:].astype(jnp.float32)
    z = reference.multiply(h, scaling).astype(x.dtype)
    if static.implementation == "xla":
        dx = reference.backward(*(dx_ext, z, narrow, x, weight, dres), **static.of_norm)
    else:
        from pallas_kernels.norm import gpu

        # z (A y) is h (scaling A y), whose second factor the forward pass has written.
        inner = (h * ext[..., features:].astype(jnp.float32)).sum(axis=-1)

        def derive(
            dx_ext: Array,
            z: Array,
            inner: Array,
            x: Array,
            dres: Array,
            narrow: Array,
            factor: Array,
        ) -> tuple[Array, tuple]:
            dx = gpu.backward(
                _rows(dx_ext),
                _rows(z),
                narrow,
                inner.reshape(-1),
                _rows(x),
                factor,
                _rows(dres),
                **static.of_kernels,
            )
            return dx.reshape(x.shape), ()

        rows = (dx_ext, z, inner, x, dres)
        shared = (narrow, static.factor(weight, x))
        dx, _ = by_rows(derive, static.divided, rows, shared)
    # Of the few rows that the product with all of `ext` has, the features are cut out;
    # cut out of `ext` they would be copied.
    da = outer(z, ext)[:, :features].astype(a.dtype)
    dweight = reference.weight_gradient(dx_ext, z, narrow, x, eps=static.eps)
    return dx, dweight.astype(weight.dtype), da, None


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


_normed_input.defvjp(_forward, _backward)
