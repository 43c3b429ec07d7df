"""`nf4_dequantize` and `nf4_matmul`: checks, the choice of a kernel, the derivative.

The derivative of `nf4_matmul` keeps the packed bytes as the only residual of the weight
and dequantizes once more, so training holds no 16-bit copy of a layer other than the
one being computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels import device
from pallas_kernels.nf4.reference import Nested, Packed, dequantize
from pallas_kernels.product import contract

FUSED_ROWS = 32
"""Rows up to which "pallas" multiplies from the packed bytes, where nothing was
measured: bitsandbytes' own table for an H100 has 4 to 32."""

IMPLEMENTATIONS = ("xla", "pallas", "interpret")
"""What computes: plain XLA; the kernels of `nf4.gpu` and `nf4.wgmma`; or those kernels
in Pallas's interpreter, which is slow and runs on any device, for tests."""


class Unavailable(ValueError):
    """An implementation cannot be used here; `reason` says why."""

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
    stored_dtype: DTypeLike | None = None,
    block_size: int = 64,
    nested_block_size: int = 256,
    layer: Int32[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "O I"]:
    """Computes `NF4_CODE[codes] * absmax[block]`, rounded to `dtype`.

    All implementations give the same bits.

    Args:
      codes: uint8, packed 4-bit indices, aligned or flat (see `pallas_kernels.nf4`).
      absmax: block scales in the matching layout; float32, or uint8 with `nested`.
      nested: the second level, exactly when `absmax` is uint8.
      shape: (O, I) of the weight.
      dtype: of the result; the product is float32 and rounded to nearest even.
      stored_dtype: of the weight before it was packed. bitsandbytes rounds the product
        to it first, whatever `dtype` is; None rounds to `dtype` only.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
      layer: which of the stacked layers, where the arrays are stacks; clipped to those
        that exist, as in all of jax's slicing.
      implementation: one of `IMPLEMENTATIONS`; None = the fastest known here.

    Returns:
      The weight [O, I].

    Raises:
      ValueError: arrays whose size or dtype does not fit, or an implementation that
        cannot do this here, with the reason. A NaN among the scales gives NaN weights,
        since values are not known when a program is traced.
    """
    stored = _stored("nf4_dequantize", stored_dtype)
    spec = _Spec(shape, None, stored, block_size, nested_block_size, implementation)
    packed = _packed(codes, absmax, nested, layer)
    _check("nf4_dequantize", spec, packed)
    dtype = _floating("nf4_dequantize", "dtype", dtype)
    return _weight(spec, packed, dtype)


def nf4_matmul(
    x: Float[Array, "*B I"],
    codes: Array,
    absmax: Array,
    nested: Nested | None = None,
    *,
    shape: tuple[int, int],
    dtype: DTypeLike | None = None,
    stored_dtype: DTypeLike | None = None,
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
    kernel for more. The limit is measured for each shape and kind of device
    (`device.tuned`); without a measurement it is `FUSED_ROWS`. A middle range of rows
    goes to `nf4.wgmma` where that was measured to be faster, with the weights that
    `nf4_dequantize` would write.

    Args:
      x: inputs, features last.
      codes: as for `nf4_dequantize`.
      absmax: as for `nf4_dequantize`.
      nested: as for `nf4_dequantize`.
      shape: (O, I) of the weight.
      dtype: of the result; default that of `x`.
      stored_dtype: as for `nf4_dequantize`. Where it is not the dtype of `x`, only
        dequantization rounds as it demands: the kernels that multiply packed bytes
        are left out, unless theirs is the coarser rounding.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
      layer: as for `nf4_dequantize`.
      implementation: as for `nf4_dequantize`.

    Returns:
      The product [..., O].

    Raises:
      ValueError: as for `nf4_dequantize`, or `x` has other features.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(
            f"`nf4_matmul`: the weight takes {shape[1]} features, `x` has shape "
            f"{x.shape}."
        )
    out_dtype = _floating("nf4_matmul", "the dtype of `x`", x.dtype)
    if dtype is not None:
        out_dtype = _floating("nf4_matmul", "dtype", dtype)
    spec = _Spec(
        shape,
        out_dtype.name,
        _stored("nf4_matmul", stored_dtype),
        block_size,
        nested_block_size,
        implementation,
    )
    packed = _packed(codes, absmax, nested, layer)
    _check("nf4_matmul", spec, packed)
    return _matmul(spec, x, packed)


def measured() -> bool:
    """Returns whether kernels were measured on this device and may be chosen."""
    return jax.default_backend() == "gpu" and bool(_tuned())


def kernels_refusal(
    shape: tuple[int, int], block_size: int, nested_block_size: int
) -> str | None:
    """Returns why "pallas" cannot compute with a packed weight here, or None.

    Args:
      shape: (O, I).
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
    """
    sizes = (block_size, nested_block_size)
    return _kernel_refusal(_Spec(shape, None, None, *sizes, "pallas"))


class _Spec(NamedTuple):
    """Everything static about a packed weight and its use; hashable."""

    shape: tuple[int, int]
    out_dtype: str | None
    stored_dtype: str | None
    block_size: int
    nested_block_size: int
    implementation: str | None

    @property
    def name(self) -> str:
        """The key of the shape in measured data."""
        return f"{self.shape[0]}x{self.shape[1]}"

    def rounded_to(self, dtype: DTypeLike) -> str | None:
        """The dtype to round to on the way to `dtype`, if that changes the result."""
        if self.stored_dtype in (None, "float32", jnp.dtype(dtype).name):
            return None
        return self.stored_dtype


def _packed(
    codes: Array, absmax: Array, nested: Nested | None, layer: Array | int | None
) -> Packed:
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    return Packed(codes, absmax, nested, index)


# --- Checks ---


def _floating(caller: str, argument: str, dtype: DTypeLike) -> jnp.dtype:
    """Returns a floating-point dtype; in an integer one weights would be -1, 0 or 1."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{caller}`: {argument} must be a floating-point dtype (bfloat16, float16 "
            f"or float32), got {dtype}."
        )
    return dtype


def _stored(caller: str, dtype: DTypeLike | None) -> str | None:
    return None if dtype is None else _floating(caller, "stored_dtype", dtype).name


def _check(caller: str, spec: _Spec, packed: Packed) -> None:
    _check_arrays(caller, spec, packed)
    chosen = spec.implementation
    if chosen is not None and chosen not in IMPLEMENTATIONS:
        raise ValueError(
            f"`{caller}`: implementation={chosen!r} does not exist. Choose 'xla', "
            "'pallas', or None for what is known to be fastest here."
        )
    if chosen in ("pallas", "interpret"):
        refusal = _kernel_refusal(spec)
        if refusal is not None:
            raise Unavailable(
                refusal,
                f"`{caller}`: implementation={chosen!r} cannot be used here: {refusal} "
                "Use 'xla', or None for the best that can.",
            )


def _check_arrays(caller: str, spec: _Spec, packed: Packed) -> None:
    codes, absmax, nested, layer = packed
    size = spec.shape[0] * spec.shape[1]
    if min(spec.shape) < 1:
        raise ValueError(
            f"`{caller}`: a weight of shape {spec.shape} is empty; give (out_features, "
            "in_features), both at least 1."
        )
    if size >= 2**31:
        raise ValueError(
            f"`{caller}`: a weight of shape {spec.shape} has {size} elements and "
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
    code_bytes, blocks = -(-size // 2), -(-size // spec.block_size)
    if (codes.size, absmax.size) != (layers * code_bytes, layers * blocks):
        stacked = "" if layer is None else f" and layer, times {layers} layers"
        raise ValueError(
            f"`{caller}`: a weight of shape {spec.shape} has {code_bytes} code bytes "
            f"and {blocks} block scales{stacked}, got {codes.size} and {absmax.size}."
        )


def _kernel_refusal(spec: _Spec) -> str | None:
    """Returns why the kernels cannot compute this weight on this device, or None."""
    if not device.jax_has_kernels():
        return (
            f"the kernels need jax 0.11 (Python 3.12), and this is {jax.__version__}."
        )
    if spec.block_size != 64 or spec.nested_block_size != 256:
        return (
            "they know blocks of 64 weights and 256 scales, not "
            f"{spec.block_size} and {spec.nested_block_size}."
        )
    if spec.implementation == "pallas":
        platform = device.this_device().platform
        if platform not in ("gpu", "cuda"):
            return f"they need an NVIDIA GPU, and this is a {platform}."
        capability = device.capability()
        if not capability[:1].isdigit() or float(capability) < 8.0:
            return (
                "they need an NVIDIA GPU of compute capability 8.0 or newer, and this "
                f"one has {capability or 'none'}."
            )
    from pallas_kernels.nf4 import gpu

    return gpu.dequantize_refusal(spec.shape[0] * spec.shape[1])


# --- What computes: measured choices ---


def _tuned() -> dict[str, Any]:
    return device.tuned(device.device_kind(), "nf4")


def _tuned_choice(spec: _Spec, table: str) -> Any:
    """Returns what was measured for the shape, if kernels can run here."""
    # None must not choose what cannot run; a choice by name was checked before.
    if spec.implementation is None and (
        not measured()
        or _kernel_refusal(spec._replace(implementation="pallas")) is not None
    ):
        return None
    return _tuned().get(table, {}).get(spec.name)


def _tuned_settings(spec: _Spec, kernel: str, rows: int) -> dict[str, int]:
    """Returns the fastest settings measured for the shape; empty without any.

    Those of the smallest measured number of rows that is not below `rows`.
    """
    settings_by_rows = {}
    for key, settings in _tuned().get("tuning", {}).items():
        measured_kernel, name, measured_rows = key.split()
        is_same = (measured_kernel, name) == (kernel, spec.name)
        if is_same and int(measured_rows) >= rows:
            settings_by_rows[int(measured_rows)] = settings
    return settings_by_rows[min(settings_by_rows)] if settings_by_rows else {}


def _uses_packed_bytes(spec: _Spec, rows: int, dtype: jnp.dtype) -> bool:
    """Returns whether `gpu.matmul` computes a product of so many rows."""
    # The tensor cores take 16-bit operands; float32 inputs keep all their bits.
    if spec.implementation == "xla" or dtype.itemsize != 2 or rows == 0:
        return False
    # Rounding the table in bfloat16 outweighs that of a float16 weight, not vice versa.
    stored = spec.rounded_to(dtype)
    if stored is not None and jnp.finfo(stored).nmant < jnp.finfo(dtype).nmant:
        return False
    limit = _tuned_choice(spec, "fused_rows")
    if limit is None:
        # Not measured: None stays with XLA, and a choice by name gets the estimate.
        limit = 0 if spec.implementation is None else FUSED_ROWS
    if rows > limit:
        return False
    from pallas_kernels.nf4 import gpu

    return gpu.split_for(spec.shape, rows) is not None


def _uses_wgmma(spec: _Spec, rows: int, dtype: jnp.dtype) -> bool:
    """Returns whether `wgmma.matmul` was measured to be the fastest for the rows."""
    if spec.implementation == "xla" or dtype.itemsize != 2 or spec.rounded_to(dtype):
        return False
    # (1, 0) is an empty range.
    first, last = _tuned_choice(spec, "wgmma_rows") or (1, 0)
    return first <= rows <= last


def _interpret(spec: _Spec) -> Any:
    return device.interpreter() if spec.implementation == "interpret" else False


# --- The computations ---


def _weight(spec: _Spec, packed: Packed, dtype: DTypeLike) -> Array:
    chosen = spec.implementation or _tuned_choice(spec, "dequantize") or "xla"
    rounded_to = spec.rounded_to(dtype)
    if chosen == "xla":
        return dequantize(
            packed,
            shape=spec.shape,
            dtype=dtype,
            rounded_to=rounded_to,
            block_size=spec.block_size,
            nested_block_size=spec.nested_block_size,
        )
    from pallas_kernels.nf4 import gpu

    weight = gpu.dequantize(
        packed.stack(),
        shape=spec.shape,
        # A kernel rounds to the array that it writes.
        dtype=rounded_to or dtype,
        interpret=_interpret(spec),
        **_tuned_settings(spec, "dequantize", 0),
    )
    return weight.astype(dtype)


def _product_of_packed_bytes(spec: _Spec, x: Array, packed: Packed) -> Array:
    from pallas_kernels.nf4 import gpu

    settings = _tuned_settings(spec, "matmul", x.shape[0])
    y = gpu.matmul(
        x,
        packed.stack(),
        shape=spec.shape,
        split=gpu.Split(**settings) if settings else None,
        interpret=_interpret(spec),
    )
    return y.astype(spec.out_dtype)


def _product_on_wgmma(spec: _Spec, x: Array, packed: Packed) -> Array:
    if spec.implementation != "interpret" and not device.capability().startswith("9."):
        reason = (
            "`nf4.wgmma` needs a GPU of compute capability 9 (Hopper), and this one "
            f"has {device.capability()}; take `wgmma_rows` out of the data of "
            f"{device.device_kind()!r}."
        )
        raise Unavailable(reason, f"`nf4_matmul`: {reason}")
    from pallas_kernels.nf4 import wgmma

    settings = _tuned_settings(spec, "wgmma", x.shape[0])
    return wgmma.matmul(
        x,
        packed.stack(),
        shape=spec.shape,
        dtype=spec.out_dtype or x.dtype,
        tiling=wgmma.Tiling(**settings) if settings else None,
        interpret=_interpret(spec),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(spec: _Spec, x: Array, packed: Packed) -> Array:
    rows = x.size // x.shape[-1]
    if _uses_wgmma(spec, rows, x.dtype):
        y = _product_on_wgmma(spec, x.reshape(rows, -1), packed)
    elif _uses_packed_bytes(spec, rows, x.dtype):
        y = _product_of_packed_bytes(spec, x.reshape(rows, -1), packed)
    else:
        # Writing W out and reading it back takes 231 / rows of the product's time on an
        # H200: below 3 % for a micro-batch of training.
        return contract(x, _weight(spec, packed, x.dtype), 1, spec.out_dtype)
    return y.reshape(*x.shape[:-1], spec.shape[0])


def _matmul_fwd(spec: _Spec, x: Array, packed: Packed) -> tuple[Array, tuple]:
    # The empty array carries the dtype of `x`, which `dy` need not have.
    return _matmul(spec, x, packed), (packed, jnp.zeros((0,), x.dtype))


def _matmul_bwd(spec: _Spec, residuals: tuple, dy: Array) -> tuple[Array, None]:
    packed, like_x = residuals
    dy = dy.astype(like_x.dtype)
    # y = x W^T, so dx = dy W; W is frozen and has no dW. It is decoded a second time,
    # so that half a byte a weight is kept between the passes, not two.
    return contract(dy, _weight(spec, packed, dy.dtype), 0), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
