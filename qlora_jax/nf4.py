"""The NF4 leaf: a quantized weight as one value in a parameter tree.

`NF4Tensor` holds bitsandbytes' bytes unchanged, so a bitsandbytes file is read and
written back byte for byte. `quantize` runs on the host with exact IEEE arithmetic in
numpy (all cores), which reproduces bitsandbytes' codes and scales. `dequantize` and
`matmul` call `pallas_kernels.nf4`.

`fingerprint_tree` identifies base weights by one short string. An adapter, a checkpoint
of a run and a report carry the fingerprint of the base they belong to, so that
continuing on another base is noticed. It covers each leaf's place in the tree, dtype,
shape and bytes, and is the same for numpy and jax arrays.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from numpy.typing import NDArray

from pallas_kernels.nf4.api import Unavailable, nf4_dequantize, nf4_matmul
from pallas_kernels.nf4.reference import NF4_CODE, Nested
from qlora_jax.choices import Dtype
from qlora_jax.errors import UserError

# What `quantize` makes. transformers has no setting for it, but bitsandbytes has made
# larger blocks on AMD GPUs; those of `READ_BLOCK_SIZES` are read.
BLOCK_SIZE = 64
READ_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

# Midpoints between neighbouring codes in float32. A weight takes the number of
# midpoints strictly below it as its code: ties go to the lower code.
_MIDPOINTS = ((NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)).astype(np.float32)


def _dynamic_map() -> NDArray[np.float32]:
    """Computes the signed 8-bit "dynamic" table with which bitsandbytes codes scales.

    Seven decades, decade i holding 2^i midpoints of an even grid on [0.1, 1], with both
    signs, and 0 and 1.
    """
    # The grid of `torch.linspace` in float32: a fused multiply-add from either end
    # towards the middle, here in float64, where the product is exact, and rounded once.
    # Plain formulas miss bitsandbytes' table in dozens of its 256 entries, in float32
    # as in float64 (72).
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    # Steps are finest near 0. The 2^7 - 1 values of all decades, with both signs, and
    # the two constants fill the 256 codes.
    for decade in range(7):
        points = 2**decade + 1
        step = np.float64(np.float32(np.float32(1) - np.float32(0.1)) / (points - 1))
        # torch computes the step itself in float32.
        step = np.float64(np.float32(step))
        index = np.arange(points)
        from_start = np.float64(np.float32(0.1)) + step * index
        from_end = 1.0 - step * (points - 1 - index)
        grid = np.where(index < points // 2, from_start, from_end).astype(np.float32)
        middle = (grid[:-1] + grid[1:]) / np.float32(2)
        # The last decade ends at 1. The first has the single value 0.55e-6.
        middle = np.float32(10.0 ** (decade - 6)) * middle
        values += [middle, -middle]
    return np.sort(np.concatenate(values))


DYNAMIC_MAP = _dynamic_map()

# Elements handled in one go: small enough for the float32 scratch to stay in cache.
# A multiple of the block size, so no block and no byte belongs to two chunks.
_CHUNK = 1 << 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "codes",
        "absmax",
        "nested_absmax",
        "nested_offset",
        "nested_quant_map",
        "layer",
    ],
    # Static: tracing branches on them, for example on whether blocks cross rows.
    meta_fields=["shape", "dtype", "block_size", "nested_block_size"],
)
@dataclass(frozen=True)
class NF4Tensor:
    """A weight [O, I] in 4 bits; every array may have leading (layer) axes.

    Fields, with blocks of S weights, G = I/S a row and N = ceil(O*I/S) in all:
      codes: uint8, [..., O, I/2] if I % S == 0 else [..., ceil(O*I/2)].
      absmax: float32, or uint8 under double quantization, [..., O, G] or [..., N].
      nested_absmax: float32 [..., ceil(N/256)], or None without double quantization.
      nested_offset: float32 [...], likewise.
      nested_quant_map: float32 [..., 256], likewise.
      shape: (O, I), without the leading axes.
      dtype: name of the dtype before quantization ("bfloat16"). The weights are values
        of this dtype, whatever dtype they are computed in.
      layer: None, or an int32 scalar: the arrays then have one leading axis, and the
        tensor is that layer of them (`lift_stacks`).
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    nested_quant_map: Any
    shape: tuple[int, int]
    dtype: str
    block_size: int = BLOCK_SIZE
    nested_block_size: int = NESTED_BLOCK_SIZE
    layer: Any = None

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def size(self) -> int:
        """Number of weights in all layers."""
        leading = self.codes.shape[: _leading_axes(self)]
        return math.prod((*leading, *self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> NF4Tensor:
        """Returns the tensor(s) at `index` of the leading axes."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def nested(self) -> Nested | None:
        """Returns the second level as the kernels take it."""
        if not self.double_quant:
            return None
        return Nested(self.nested_absmax, self.nested_offset, self.nested_quant_map)


def dequantize(
    tensor: NF4Tensor,
    dtype: DTypeLike | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*L O I"]:
    """Returns the weight in `dtype` (default: the dtype before quantization).

    As bitsandbytes computes it: table value times block scale in float32, rounded to
    the dtype before quantization, then cast to `dtype`.

    Args:
      tensor: the weight, with any leading axes.
      dtype: of the result.
      implementation: as `pallas_kernels.nf4_dequantize` takes it.

    Raises:
      UserError: implementation="pallas" cannot be used here; with the reason.
    """
    dtype = jnp.dtype(tensor.dtype if dtype is None else dtype)

    def dequantize_layer(t: NF4Tensor) -> Array:
        return nf4_dequantize(
            t.codes,
            t.absmax,
            t.nested(),
            shape=t.shape,
            dtype=dtype,
            stored_dtype=t.dtype,
            block_size=t.block_size,
            nested_block_size=t.nested_block_size,
            layer=t.layer,
            implementation=implementation,
        )

    # With `layer` the one leading axis is the stack, of which the kernel reads a layer.
    if tensor.layer is None:
        for _ in range(_leading_axes(tensor)):
            dequantize_layer = jax.vmap(dequantize_layer)
    with _unavailable_as_user_error(implementation):
        return dequantize_layer(jax.tree.map(jnp.asarray, tensor))


def matmul(
    x: Float[Array, "*B I"],
    tensor: NF4Tensor,
    dtype: DTypeLike | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*B O"]:
    """Computes `x @ W.T` in the dtype of `x`; differentiable in `x` alone.

    Args:
      x: inputs, features last.
      tensor: the weight [O, I].
      dtype: of the result; default that of `x`.
      implementation: as `pallas_kernels.nf4_matmul` takes it.

    Returns:
      The product [..., O].

    Raises:
      UserError: implementation="pallas" cannot be used here; with the reason.
    """
    with _unavailable_as_user_error(implementation):
        return nf4_matmul(
            x,
            tensor.codes,
            tensor.absmax,
            tensor.nested(),
            shape=tensor.shape,
            dtype=dtype,
            stored_dtype=tensor.dtype,
            block_size=tensor.block_size,
            nested_block_size=tensor.nested_block_size,
            layer=tensor.layer,
            implementation=implementation,
        )


@contextlib.contextmanager
def _unavailable_as_user_error(implementation: str | None) -> Iterator[None]:
    """Raises `Unavailable` as an error about the setting `kernels`."""
    try:
        yield
    except Unavailable as error:
        raise UserError(
            f"kernels={implementation!r} cannot be used here: {error.reason} "
            "Use 'auto' or 'xla'."
        ) from error


def lift_stacks(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the packed stacks of scanned layers out of a parameter tree.

    A scan passes its body a slice of every array it scans over. An XLA computation
    reads through the slice; a kernel gets a copy. Lifted, the stack itself reaches the
    body, and the kernel reads one layer of it:

        params  {... "weight": NF4Tensor(no arrays, layer=[0, ..., L-1])}
        stacks  {... "weight": NF4Tensor([L, ...])}

    The scan slices `layer` to a number, and `with_stack` puts the two together. Inside
    a jitted function this costs nothing.

    Args:
      params: parameter tree; tensors with one leading axis are lifted, all others stay.

    Returns:
      The tree without the stacks, and the tree of only the stacks.
    """
    rest: dict[str, Any] = {}
    stacks: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            rest[name], inner_stacks = lift_stacks(value)
            if inner_stacks:
                stacks[name] = inner_stacks
        elif isinstance(value, NF4Tensor) and _leading_axes(value) == 1:
            layers = jnp.arange(value.codes.shape[0], dtype=jnp.int32)
            # The shape stays with the index: it is static, and `is_aligned` needs it.
            rest[name] = replace(_without_arrays(value), layer=layers)
            stacks[name] = value
        else:
            rest[name] = value
    return rest, stacks


def with_stack(tensor: NF4Tensor, stack: NF4Tensor) -> NF4Tensor:
    """Returns the layer of a stack that `lift_stacks` took out of the tree."""
    return replace(stack, layer=tensor.layer)


def _without_arrays(tensor: NF4Tensor) -> NF4Tensor:
    return jax.tree.map(lambda _: None, tensor)


def _leading_axes(tensor: NF4Tensor) -> int:
    """Returns the number of leading axes; 0 without arrays."""
    if tensor.codes is None:
        return 0
    aligned = is_aligned(tensor.shape, tensor.block_size)
    return tensor.codes.ndim - (2 if aligned else 1)


def is_aligned(shape: tuple[int, int], block_size: int = BLOCK_SIZE) -> bool:
    """Returns whether no block crosses rows, so that codes are kept as [O, I/2]."""
    return shape[1] % block_size == 0


def quantize(weight: NDArray, *, double_quant: bool) -> NF4Tensor:
    """Quantizes one weight on the host, byte-equal to bitsandbytes.

    Codes and float32 scales equal those of bitsandbytes on a CPU (and on a GPU, but
    for values within one ulp of a threshold, where its division is approximate).
    Under double quantization the 8-bit scales are the nearest table entries.

    Args:
      weight: [O, I], float32, bfloat16 or float16.
      double_quant: whether to quantize the block scales too (0.516 instead of 0.5625
        bytes a weight).

    Returns:
      An `NF4Tensor` of numpy arrays without leading axes.

    Raises:
      UserError: the weight is not a finite, non-empty matrix.
    """
    weight = np.asarray(weight)
    _check_weight(weight)
    codes, absmax = _quantize_blocks(weight)
    nested_absmax = nested_offset = nested_quant_map = None
    if double_quant:
        absmax, nested_absmax, nested_offset = _quantize_absmax(absmax)
        nested_quant_map = DYNAMIC_MAP
    out_features, in_features = weight.shape
    if is_aligned(weight.shape):
        # The flat bytes already come row after row; this only names the rows, which
        # shardings and kernels need.
        codes = codes.reshape(out_features, in_features // 2)
        absmax = absmax.reshape(out_features, in_features // BLOCK_SIZE)
    return NF4Tensor(
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        nested_quant_map=nested_quant_map,
        shape=(out_features, in_features),
        dtype=weight.dtype.name,
    )


def abstract(
    shape: tuple[int, int],
    *,
    double_quant: bool,
    dtype: str,
    leading: tuple[int, ...] = (),
    block_size: int = BLOCK_SIZE,
) -> NF4Tensor:
    """Returns the shapes and dtypes `quantize` would give, with leading axes."""
    blocks = -(-shape[0] * shape[1] // block_size)
    if is_aligned(shape, block_size):
        code_shape: tuple[int, ...] = (shape[0], shape[1] // 2)
        absmax_shape: tuple[int, ...] = (shape[0], shape[1] // block_size)
    else:
        code_shape = (-(-shape[0] * shape[1] // 2),)
        absmax_shape = (blocks,)

    def array(s: tuple[int, ...], d: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *s), d)

    groups = (-(-blocks // NESTED_BLOCK_SIZE),)
    return NF4Tensor(
        codes=array(code_shape, jnp.uint8),
        absmax=array(absmax_shape, jnp.uint8 if double_quant else jnp.float32),
        nested_absmax=array(groups, jnp.float32) if double_quant else None,
        nested_offset=array((), jnp.float32) if double_quant else None,
        nested_quant_map=array((256,), jnp.float32) if double_quant else None,
        shape=shape,
        dtype=dtype,
        block_size=block_size,
    )


def _check_weight(weight: NDArray) -> None:
    if weight.ndim != 2 or weight.size == 0:
        raise UserError(
            "`quantize`: expected a non-empty matrix [out_features, in_features], got "
            f"shape {weight.shape}."
        )
    if weight.dtype.name not in get_args(Dtype):
        raise UserError(
            "`quantize`: expected float32, bfloat16 or float16, got "
            f"{weight.dtype.name}."
        )


def _quantize_blocks(weight: NDArray) -> tuple[NDArray[np.uint8], NDArray]:
    """Returns the codes, and the largest magnitude of each block in float32."""
    size = weight.size
    blocks = -(-size // BLOCK_SIZE)
    flat = np.ascontiguousarray(weight).reshape(-1)
    # Whole blocks; the bytes after the last weight are cut off at the end.
    codes = np.empty(blocks * BLOCK_SIZE // 2, np.uint8)
    absmax = np.empty(blocks, np.float32)
    starts = range(0, size, _CHUNK)
    if len(starts) == 1:
        finite = [_quantize_chunk(flat, 0, codes, absmax)]
    else:
        # Threads write disjoint parts of `codes` and `absmax`, so they need no lock.
        finite = list(
            _pool().map(lambda s: _quantize_chunk(flat, s, codes, absmax), starts)
        )
    if not all(finite):
        raise UserError(
            f"`quantize`: the weight of shape {weight.shape} contains NaN or infinity; "
            "the checkpoint is damaged or its training diverged."
        )
    return codes[: -(-size // 2)], absmax


def _quantize_chunk(
    flat: NDArray, start: int, codes: NDArray[np.uint8], absmax: NDArray[np.float32]
) -> bool:
    """Codes `flat[start:start + _CHUNK]`; returns whether all weights were finite."""
    # 16-bit weights are widened first, as in bitsandbytes: scaled in bf16, some would
    # get other codes.
    x = flat[start : start + _CHUNK].astype(np.float32)
    first, full = start // BLOCK_SIZE, x.size // BLOCK_SIZE * BLOCK_SIZE
    # `rows` and `rest` are views: scaling them in place scales x.
    rows = x[:full].reshape(-1, BLOCK_SIZE)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    # Stored without the clamp below: a block of zeros has scale 0 and codes of 0.0. A
    # NaN or infinity always shows in the maximum, so only that is checked.
    absmax[first : first + rows.shape[0]] = largest
    # NaN and infinity pass through the arithmetic; the caller reports them.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # bitsandbytes multiplies by the reciprocal: a division rounds differently.
        # The clamp keeps the reciprocal finite for a block of zeros.
        inverse = np.float32(1) / np.maximum(largest, np.float32(1e-38))
        rows *= inverse[:, None]
        finite = bool(np.isfinite(largest).all())
        if full < x.size:
            # The last, partial block it divides, and stores a scale of 0 as 1e-38.
            rest = x[full:]
            last = max(np.abs(rest).max(), np.float32(1e-38))
            absmax[first + rows.shape[0]] = last
            rest /= last
            finite &= bool(np.isfinite(last))
    if x.size % 2:  # the low nibble of the last byte codes a zero
        x = np.append(x, np.float32(0))
    # Counting the midpoints below vectorizes, unlike a binary search (40 times slower).
    index = np.greater(x, _MIDPOINTS[0]).view(np.uint8)
    above = np.empty(x.size, np.bool_)
    for midpoint in _MIDPOINTS[1:]:
        np.greater(x, midpoint, out=above)
        index += above.view(np.uint8)
    # The first weight of a pair is in the high nibble.
    pairs = index.reshape(-1, 2)
    codes[start // 2 : start // 2 + pairs.shape[0]] = pairs[:, 0] << 4 | pairs[:, 1]
    return finite


def _quantize_absmax(
    absmax: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Returns 8-bit scales, their scales for each 256, and the offset.

    absmax ~ DYNAMIC_MAP[code] * scale[group] + offset, with the mean as offset.
    """
    # Scales are positive and the table is signed and finest around 0, so the mean is
    # subtracted first. bitsandbytes' float32 mean depends on its order of summation;
    # this one is rounded once.
    offset = np.float32(absmax.mean(dtype=np.float64))
    centred = absmax - offset
    groups = -(-centred.size // NESTED_BLOCK_SIZE)
    # Zeros after the last scale leave the maximum of its group unchanged.
    padded = np.zeros(groups * NESTED_BLOCK_SIZE, np.float32)
    padded[: centred.size] = centred
    rows = padded.reshape(groups, NESTED_BLOCK_SIZE)
    scale = np.abs(rows).max(axis=1)
    safe = np.maximum(scale, np.float32(1e-38))
    normed = np.clip(rows * (np.float32(1) / safe)[:, None], -1, 1).reshape(-1)
    middles = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
    # "left" counts the midpoints strictly below, so ties go to the lower code here too.
    # bitsandbytes on a CPU looks codes up in 65,536 bins instead, and misses the
    # nearest entry in about 0.2 % of them.
    codes = np.searchsorted(middles, normed[: centred.size], side="left")
    return codes.astype(np.uint8), scale, np.asarray(offset)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    # numpy releases the interpreter lock inside its loops, so threads use all cores.
    return concurrent.futures.ThreadPoolExecutor(
        max_workers=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        thread_name_prefix="nf4-quantize",
    )


# Bytes hashed in one go: large enough to keep threads busy, and several to a leaf.
# Part of the definition: with another size every stored fingerprint would differ.
_PIECE = 1 << 25


def fingerprint_tree(tree: Any) -> str:
    """Computes SHA-256 over every leaf's path, dtype, shape and bytes.

    Args:
      tree: arrays and `NF4Tensor`s, on the host or on devices.

    Returns:
      64 hexadecimal digits.
    """

    def digest(piece: np.ndarray) -> bytes:
        return hashlib.sha256(piece).digest()

    whole = hashlib.sha256()
    # hashlib releases the interpreter lock, so threads use all cores; leaf after leaf
    # keeps one host copy of a device array alive.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, leaf in _leaves(tree):
            if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
                whole.update(f"{name}={leaf!r}\n".encode())
                continue
            array = np.asarray(leaf)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            pieces = [data[i : i + _PIECE] for i in range(0, data.size, _PIECE)]
            digests = b"".join(pool.map(digest, pieces)).hex()
            shape = list(array.shape)
            # Place, dtype and shape count: the same bytes elsewhere are another base.
            whole.update(f"{name} {array.dtype.name} {shape} {digests}\n".encode())
    return whole.hexdigest()


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields every array with its path, and the static fields of NF4 tensors."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, NF4Tensor)
    )
    for path, leaf in flat:
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, NF4Tensor):
            for f in dataclasses.fields(leaf):
                yield f"{name}.{f.name}", getattr(leaf, f.name)
        else:
            yield name, leaf
