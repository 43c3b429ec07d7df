"""`nf4_dequantize` and `nf4_matmul`: checks, the choice of a kernel, the derivative.

The one idea of `nf4_matmul`: its derivative keeps the packed bytes as the only residual
of the weight and dequantizes once more, so training holds no 16-bit copy of a layer
beyond the layer being computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels import device
from pallas_kernels.nf4.reference import Nested, dequantize
from pallas_kernels.product import contract

FUSED_ROWS = 32
"""Rows that "pallas" multiplies without writing the weight out, where none were
measured: bitsandbytes' own table for an H100 has 4 to 32."""

IMPLEMENTATIONS = ("xla", "pallas", "interpret")
"""What computes: plain XLA; the kernels of `nf4.gpu`; or those run by Pallas's
interpreter, slowly and anywhere, for tests."""


class Unavailable(ValueError):
    """An implementation was asked for that cannot be had; `reason` says why."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def nf4_dequantize(
    codes: Array,
    absmax: Array,
    nested: Nested | None = None,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike,
    block_size: int = 64,
    nested_block_size: int = 256,
    layer: Int32[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "O I"]:
    """Computes `NF4_CODE[codes] * absmax[block]`, rounded once to `dtype`.

    All implementations give the same bits.

    Args:
      codes: uint8, packed 4-bit indices, aligned or flat (see `pallas_kernels.nf4`).
      absmax: block scales in the matching layout; float32, or uint8 with `nested`.
      nested: the second level, exactly when `absmax` is uint8.
      shape: (O, I) of the weight.
      dtype: of the result; the product is float32 and rounded to nearest even.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
      layer: which of the stacked layers, where the arrays are stacks; one that does
        not exist is the nearest that does, as in all of jax's slicing.
      implementation: None = what is known to be fastest here.

    Returns:
      The weight [O, I].

    Raises:
      ValueError: arrays whose size or dtype does not fit, or an implementation that
        cannot do this here, with the reason. A NaN among the scales is not looked for
        (values are not known when a program is traced): it gives NaN weights.
    """
    meta = _Meta(shape, None, block_size, nested_block_size, implementation)
    _check("nf4_dequantize", meta, codes, absmax, nested, layer)
    dtype = _float("nf4_dequantize", "dtype", dtype)
    return _weight(meta, _packed(codes, absmax, nested, layer), dtype)


def nf4_matmul(
    x: Float[Array, "*B I"],
    codes: Array,
    absmax: Array,
    nested: Nested | None = None,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike | None = None,
    block_size: int = 64,
    nested_block_size: int = 256,
    layer: Int32[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B O"]:
    """Computes `x @ W.T` with `W = nf4_dequantize(...)` in the dtype of `x`.

    Sums are float32, rounded to `dtype` (default: that of `x`) at the end. The
    derivative exists for `x` alone (the packed weight is frozen) and keeps only the
    packed bytes.

    "pallas" multiplies few rows of bfloat16 or float16 straight from the packed bytes,
    which rounds the 16 table values instead of the weights, and dequantizes with its
    kernel for more. How many are few was measured for each shape and kind of device
    (`device.tuned`); without a measurement it is `FUSED_ROWS`. A middle range of rows
    goes to `nf4.wgmma` where it was measured to be faster, with the weights that
    `nf4_dequantize` would write.

    Args:
      x: inputs, features last.
      codes: as for `nf4_dequantize`.
      absmax: as for `nf4_dequantize`.
      nested: as for `nf4_dequantize`.
      shape: (O, I) of the weight.
      dtype: of the result; default that of `x`.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
      layer: as for `nf4_dequantize`.
      implementation: as for `nf4_dequantize`.

    Returns:
      The product [..., O].

    Raises:
      ValueError: as for `nf4_dequantize`, and an `x` of other features.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(
            f"`nf4_matmul`: the weight takes {shape[1]} features, `x` has shape "
            f"{x.shape}."
        )
    own = _float("nf4_matmul", "the dtype of `x`", x.dtype)
    name = (own if dtype is None else _float("nf4_matmul", "dtype", dtype)).name
    meta = _Meta(shape, name, block_size, nested_block_size, implementation)
    _check("nf4_matmul", meta, codes, absmax, nested, layer)
    return _matmul(meta, x, _packed(codes, absmax, nested, layer))


def measured() -> bool:
    """Whether kernels were measured on this device, and may be chosen for it."""
    return jax.default_backend() == "gpu" and bool(_tuned())


class _Meta(NamedTuple):
    """Everything static about a packed weight and its use; hashable."""

    shape: tuple[int, int]
    out_dtype: str | None
    block_size: int
    nested_block_size: int
    implementation: str | None

    @property
    def name(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}"


class _Packed(NamedTuple):
    codes: Array
    absmax: Array
    nested: Nested | None
    layer: Array | None

    def cut(self) -> _Packed:
        """The one layer that is meant, without the axis of layers."""
        if self.layer is None:
            return self
        arrays = (self.codes, self.absmax, self.nested)
        layer = jnp.clip(self.layer, 0, self.codes.shape[0] - 1)
        codes, absmax, nested = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), arrays
        )
        return _Packed(codes, absmax, nested, None)


def _packed(
    codes: Array, absmax: Array, nested: Nested | None, layer: Array | int | None
) -> _Packed:
    number = None if layer is None else jnp.asarray(layer, jnp.int32)
    return _Packed(codes, absmax, nested, number)


def _float(caller: str, what: str, given: DTypeLike) -> jnp.dtype:
    """A dtype that weights can have; in another one they would all be -1, 0 or 1."""
    dtype = jnp.dtype(given)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{caller}`: {what} must be one of floating point (bfloat16, float16 or "
            f"float32), got {dtype}."
        )
    return dtype


def _check(
    caller: str,
    meta: _Meta,
    codes: Array,
    absmax: Array,
    nested: Nested | None,
    layer: Array | int | None,
) -> None:
    out_features, in_features = meta.shape
    size = out_features * in_features
    blocks = -(-size // meta.block_size)
    if min(meta.shape) < 1:
        raise ValueError(
            f"`{caller}`: a weight of shape {meta.shape} is empty; give (out_features, "
            "in_features), both at least 1."
        )
    if size >= 2**31:
        raise ValueError(
            f"`{caller}`: a weight of shape {meta.shape} has {size} elements and "
            "indices are 32 bits wide; split it along out_features."
        )
    if codes.dtype != jnp.uint8 or absmax.dtype not in (jnp.uint8, jnp.float32):
        raise ValueError(
            f"`{caller}`: expected codes of uint8 and absmax of float32 or uint8, got "
            f"{codes.dtype} and {absmax.dtype}."
        )
    if (absmax.dtype == jnp.uint8) != (nested is not None):
        raise ValueError(
            f"`{caller}`: `nested` goes with 8-bit `absmax` and only with it, got "
            f"absmax of {absmax.dtype} and nested={'given' if nested else None}."
        )
    layers = 1 if layer is None else codes.shape[0]
    if codes.size != layers * -(-size // 2) or absmax.size != layers * blocks:
        stacked = "" if layer is None else f" and layer, times {layers} layers"
        raise ValueError(
            f"`{caller}`: a weight of shape {meta.shape} has {-(-size // 2)} code "
            f"bytes and {blocks} block scales{stacked}, got {codes.size} and "
            f"{absmax.size}."
        )
    chosen = meta.implementation
    if chosen is not None and chosen not in IMPLEMENTATIONS:
        raise ValueError(
            f"`{caller}`: implementation={chosen!r} does not exist. Choose 'xla', "
            "'pallas', or None for what is known to be fastest here."
        )
    if chosen in ("pallas", "interpret"):
        refusal = _kernel_refusal(meta)
        if refusal is not None:
            raise Unavailable(
                refusal,
                f"`{caller}`: implementation={chosen!r} cannot be used here: {refusal} "
                "Use 'xla', or None for the best that can.",
            )


def _kernel_refusal(meta: _Meta) -> str | None:
    """Says why the kernels cannot do this weight on this device, or None."""
    if not device.jax_has_kernels():
        return (
            f"the kernels need jax 0.11 (Python 3.12), and this is {jax.__version__}."
        )
    if meta.block_size != 64 or meta.nested_block_size != 256:
        return (
            "they know blocks of 64 weights and 256 scales, not "
            f"{meta.block_size} and {meta.nested_block_size}."
        )
    if meta.implementation == "pallas":
        platform = device.this_device().platform
        if platform not in ("gpu", "cuda"):
            return f"they need an NVIDIA GPU, and this is a {platform}."
        found = device.capability()
        if not found[:1].isdigit() or float(found) < 8.0:
            return (
                "they need an NVIDIA GPU of compute capability 8.0 or newer, and this "
                f"one has {found or 'none'}."
            )
    from pallas_kernels.nf4 import gpu

    return gpu.dequantize_refusal(meta.shape[0] * meta.shape[1])


def _tuned() -> dict[str, Any]:
    return device.tuned(device.device_kind(), "nf4")


def _measured(meta: _Meta, use: str) -> Any:
    """What was measured for this shape on the GPU at hand, where kernels may run."""
    if meta.implementation is None and (
        not measured()
        or _kernel_refusal(meta._replace(implementation="pallas")) is not None
    ):
        return None
    return _tuned().get(use, {}).get(meta.name)


def _tuning(meta: _Meta, kind: str, rows: int) -> dict[str, int]:
    """The kernel's fastest settings that were measured for the shape, or none.

    For as many rows, or for the next larger number that was measured.
    """
    found = {}
    for key, choice in _tuned().get("tuning", {}).items():
        measured_kind, name, count = key.split()
        if (measured_kind, name) == (kind, meta.name) and int(count) >= rows:
            found[int(count)] = choice
    return found[min(found)] if found else {}


def _fused(meta: _Meta, rows: int, dtype: jnp.dtype) -> bool:
    """Whether a product of so many rows is computed from the packed bytes."""
    if meta.implementation == "xla" or dtype.itemsize != 2 or rows == 0:
        return False
    limit = _measured(meta, "fused_rows")
    if limit is None:
        limit = 0 if meta.implementation is None else FUSED_ROWS
    if rows > limit:
        return False
    from pallas_kernels.nf4 import gpu

    return gpu.split_for(meta.shape, rows) is not None


def _middle(meta: _Meta, rows: int, dtype: jnp.dtype) -> bool:
    """Whether so many rows go to `nf4.wgmma`: where it was measured to be fastest."""
    if meta.implementation == "xla" or dtype.itemsize != 2:
        return False
    first, last = _measured(meta, "wgmma_rows") or (1, 0)
    return first <= rows <= last


def _on_wgmma(meta: _Meta, x: Array, packed: _Packed) -> Array:
    if meta.implementation != "interpret" and not device.capability().startswith("9."):
        reason = (
            "`nf4.wgmma` needs a GPU of compute capability 9 (Hopper), and this one "
            f"has {device.capability()}; take `wgmma_rows` out of the data of "
            f"{device.device_kind()!r}."
        )
        raise Unavailable(reason, f"`nf4_matmul`: {reason}")
    from pallas_kernels.nf4 import wgmma

    choice = _tuning(meta, "wgmma", x.shape[0])
    return wgmma.middle_product(
        x,
        _stacked(packed),
        shape=meta.shape,
        dtype=meta.out_dtype or x.dtype,
        tiling=wgmma.Tiling(**choice) if choice else None,
        interpret=_interpreter(meta),
    )


def _weight(meta: _Meta, packed: _Packed, dtype: DTypeLike) -> Array:
    chosen = meta.implementation or _measured(meta, "dequantize") or "xla"
    if chosen == "xla":
        codes, absmax, nested, _ = packed.cut()
        return dequantize(
            codes,
            absmax,
            nested,
            shape=meta.shape,
            dtype=dtype,
            block_size=meta.block_size,
            nested_block_size=meta.nested_block_size,
        )
    from pallas_kernels.nf4 import gpu

    return gpu.dequantize(
        _stacked(packed),
        shape=meta.shape,
        dtype=dtype,
        interpret=_interpreter(meta),
        **_tuning(meta, "dequantize", 0),
    )


def _interpreter(meta: _Meta) -> Any:
    return device.interpreter() if meta.implementation == "interpret" else False


def _stacked(packed: _Packed) -> Any:
    """The weight as the kernels take it: a stack of at least one layer."""
    from pallas_kernels.nf4 import gpu

    if packed.layer is None:
        arrays = (packed.codes, packed.absmax, packed.nested)
        codes, absmax, nested = jax.tree.map(lambda a: a[None], arrays)
        return gpu.Packed(codes, absmax, nested, jnp.zeros(1, jnp.int32))
    return gpu.Packed(
        packed.codes, packed.absmax, packed.nested, packed.layer.reshape(1)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(meta: _Meta, x: Array, packed: _Packed) -> Array:
    rows = x.size // x.shape[-1]
    if _middle(meta, rows, x.dtype):
        y = _on_wgmma(meta, x.reshape(rows, -1), packed)
        return y.reshape(*x.shape[:-1], meta.shape[0])
    if _fused(meta, rows, x.dtype):
        from pallas_kernels.nf4 import gpu

        choice = _tuning(meta, "matmul", rows)
        y = gpu.product(
            x.reshape(rows, -1),
            _stacked(packed),
            shape=meta.shape,
            split=gpu.Split(**choice) if choice else None,
            interpret=_interpreter(meta),
        )
        return y.astype(meta.out_dtype).reshape(*x.shape[:-1], meta.shape[0])
    return contract(x, _weight(meta, packed, x.dtype), 1, meta.out_dtype)


def _matmul_fwd(meta: _Meta, x: Array, packed: _Packed) -> tuple[Array, tuple]:
    # The empty array carries the dtype of `x`, which `dy` need not have.
    return _matmul(meta, x, packed), (packed, jnp.zeros((0,), x.dtype))


def _matmul_bwd(meta: _Meta, residuals: tuple, dy: Array) -> tuple[Array, None]:
    packed, like = residuals
    dy = dy.astype(like.dtype)
    return contract(dy, _weight(meta, packed, dy.dtype), 0), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
