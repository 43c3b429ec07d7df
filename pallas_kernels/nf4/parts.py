"""Sums over all features of a result, left to the kernel that reads it.

An RMSNorm and the `A x` of adapters need all features of x before a product with it can
begin. As kernels of their own they cost more time to start than to run. Here the kernel
that writes x leaves, for every block of threads, the parts of these sums over its own
features, and the kernel that reads x adds the parts up:

    rms(x)^2 = sum_i x_i^2 / I         A norm(x) = sum_i A_i w_i x_i / rms(x)

`1 / rms` is a factor of each row: it multiplies a product's sums in float32, and x
itself is multiplied only with the norm's weight. The parts are added up in a fixed
order, so every run has the same bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import WARPGROUP
from pallas_kernels.nf4.gpu import clip_layer


class Following(NamedTuple):
    """The linear layers that read a result: what they need of all its features."""

    a: Float[Array, "L I R"] | None = None
    """A of their adapters, transposed and side by side, in the dtype of the result."""
    norm: Float[Array, "L I"] | None = None
    """Weight of the RMSNorm before them."""
    ahead: int = 0
    """How many layers later they are."""

    @property
    def squares(self) -> int:
        """Columns of the parts before those of `a`: 1 with a norm."""
        return 0 if self.norm is None else 1

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return 0 if self.a is None else self.a.shape[2]

    @property
    def columns(self) -> int:
        """Numbers for each row that the parts hold."""
        return self.squares + self.rank


class Prepared(NamedTuple):
    """The input of linear layers, as the kernel before them leaves it."""

    x: Float[Array, "M I"]
    """With a norm, times its weight and not yet divided by the root mean square."""
    parts: Float32[Array, "P M C"] | None
    """P parts of each row's sum of squares, if there is a norm, and of A x."""


def prepared_reference(
    x: Float[Array, "M I"], layer: Array, following: Following
) -> Prepared:
    """Computes what a kernel leaves for the linear layers after it, as one part."""
    index = clip_layer(layer.reshape(()) + following.ahead, _layers(following))
    columns, y = [], x
    if following.norm is not None:
        wide = x.astype(jnp.float32)
        columns.append(jnp.sum(wide * wide, axis=1, keepdims=True))
        weight = following.norm[index].astype(jnp.float32)
        y = (wide * weight[None]).astype(x.dtype)
    if following.a is not None:
        a = following.a[index].astype(jnp.float32)
        columns.append(jnp.matmul(y.astype(jnp.float32), a, precision="highest"))
    parts = jnp.concatenate(columns, axis=1)[None] if columns else None
    return Prepared(y, parts)


def added_reference(
    parts: Array | None, width: int, eps: float | None
) -> tuple[Array | None, Array | None]:
    """Returns the factor of each row [M, 1], None without a norm, and A x."""
    if parts is None:
        return None, None
    total = parts.sum(axis=0)
    if eps is None:
        return None, total
    return jax.lax.rsqrt(total[:, :1] / width + eps), total[:, 1:]


def _layers(following: Following) -> int:
    (layers, *_) = {
        array.shape[0] for array in (following.a, following.norm) if array is not None
    } or {1}
    return layers


# --- Within a kernel ---


def lanes_of(numbers: int) -> int:
    """Returns the threads that hold so many numbers: whole warpgroups."""
    return -(-numbers // WARPGROUP) * WARPGROUP


def share_count(numbers: int) -> int:
    """Returns how many threads of a warpgroup share each of so many numbers."""
    return max(1, WARPGROUP // numbers)


def add_up(
    parts: Any,
    shares_s: Any,
    *,
    numbers: int,
    group: Any,
    groups: int,
    interpret: bool,
) -> None:
    """Adds up a warpgroup's share of the parts, to be read after a barrier by `total`.

    Args:
      parts: float32 [P * numbers] in global memory.
      shares_s: float32 [groups * lanes_of(numbers)] in shared memory.
      numbers: M * C.
      group: this warpgroup.
      groups: of the block of threads.
      interpret: whether the interpreter runs the kernel.
    """
    gather = functools.partial(mosaic.gather, interpret=interpret)
    shares, lanes = share_count(numbers), lanes_of(numbers)
    count = parts.shape[0] // numbers
    element = jnp.minimum(mosaic.iota((lanes,), 0), shares * numbers - 1)
    first = group * shares + element // numbers
    step_size = groups * shares
    steps = -(-count // step_size)

    def term(step: Any) -> jax.Array:
        part = first + step * step_size
        index = jnp.minimum(part, count - 1) * numbers + element % numbers
        value = gather(parts, index, jnp.float32)
        return jnp.where(part < count, value, jnp.float32(0))

    # Eight loads at a time are under way.
    unroll = min(steps, 8)
    value = term(0)
    for step in range(1, unroll):
        value = value + term(step)

    def more(i: Any, value: jax.Array) -> jax.Array:
        for k in range(unroll):
            value = value + term(i * unroll + k)
        return value

    value = jax.lax.fori_loop(1, -(-steps // unroll), more, value)
    mosaic.store(
        shares_s.at[pl.ds(group * lanes, lanes)],
        value,
        mosaic.strided((lanes,)),
        interpret=interpret,
    )


def total(shares_s: Any, *, numbers: int, groups: int, interpret: bool) -> jax.Array:
    """Returns the sums whose shares `add_up` has stored: [lanes_of(numbers)]."""
    shares, lanes = share_count(numbers), lanes_of(numbers)
    element = jnp.minimum(mosaic.iota((lanes,), 0), numbers - 1)

    def term(group: Any, value: Any) -> Any:
        for share in range(shares):
            index = element + (group * lanes + share * numbers)
            part = mosaic.gather(shares_s, index, jnp.float32, interpret=interpret)
            value = part if value is None else value + part
        return value

    return jax.lax.fori_loop(1, groups, term, term(0, None))


def terms(
    following: Following,
    x_s: Any,
    y_s: Any,
    a: Any,
    first: Any,
    *,
    rows: int,
    features: int,
    shares: int = 1,
    clip: bool = False,
    interpret: bool,
) -> jax.Array:
    """Returns a block of features' part of the sums.

    Args:
      following: what is needed.
      x_s: float32 [>= rows * features] in shared memory, row after row; read where
        there is a norm.
      y_s: the same, of what is multiplied with A.
      a: [I * R], A of the layer, in global memory; None without.
      first: the first of the features.
      rows: M.
      features: in `x_s` and `y_s`.
      shares: threads that share a number, a divisor of `features`; number n of
        M * C is in elements n, M * C + n, ... of the result.
      clip: whether some of the features are surplus ones, of value 0.
      interpret: whether the interpreter runs the kernel.
    """
    gather = functools.partial(mosaic.gather, interpret=interpret)
    columns, squares, rank = following.columns, following.squares, following.rank
    numbers, each = rows * columns, features // shares
    element = mosaic.iota((lanes_of(shares * numbers),), 0)
    element = jnp.minimum(element, shares * numbers - 1)
    own, number = element // numbers * each, element % numbers
    row, column = number // columns, number % columns
    start = row * features + own
    if rank:
        a_start = (first + own) * rank + jnp.maximum(column - squares, 0)

    def term(i: Any) -> jax.Array:
        new: Any = None
        if following.a is not None:
            index = a_start + i * rank
            index = jnp.minimum(index, a.shape[0] - 1) if clip else index
            factor = gather(a, index, following.a.dtype)
            new = factor.astype(jnp.float32) * gather(y_s, start + i, jnp.float32)
        if squares:
            x = gather(x_s, start + i, jnp.float32)
            new = x * x if new is None else jnp.where(column < squares, x * x, new)
        return new

    # As many loads are under way as there are registers for.
    most = 4 if squares else 8
    unroll = math.gcd(each, max(1, most * WARPGROUP // element.shape[0]))

    def more(n: Any, value: jax.Array) -> jax.Array:
        for k in range(unroll):
            value = value + term(n * unroll + k)
        return value

    value = term(0)
    for k in range(1, unroll):
        value = value + term(k)
    return jax.lax.fori_loop(1, each // unroll, more, value)


def leave_row(
    following: Following,
    value: jax.Array,
    place: Any,
    a: Any,
    first: Any,
    scratch: tuple[Any, Any],
    *,
    features: int,
    interpret: bool,
) -> None:
    """Stores a warpgroup's parts of one row, of adapters without a norm.

    Args:
      following: what is needed.
      value: float32 [>= features], in the layout `mosaic.strided`.
      place: where the parts go, float32 [1, R] in global memory.
      a: [I * R], A of the layer, in global memory.
      first: the first of the features. Those past the last have the value 0.
      scratch: of `leave_row_scratch`, in shared memory.
      features: a multiple of 64.
      interpret: whether the interpreter runs the kernel.
    """
    values_s, shares_s = scratch
    rank, shares = following.rank, _row_shares(following)
    # Assignments are barriers of the warpgroup as well.
    values_s[...] = value
    shares_s[...] = terms(
        following,
        None,
        values_s,
        a,
        first,
        rows=1,
        features=features,
        shares=shares,
        clip=True,
        interpret=interpret,
    )
    number = jnp.minimum(mosaic.iota((lanes_of(rank),), 0), rank - 1)
    total: Any = 0.0
    for share in range(shares):
        index = number + share * rank
        total = total + mosaic.gather(shares_s, index, jnp.float32, interpret=interpret)
    mosaic.store_rows(place, total, interpret=interpret)


def leave_row_scratch(following: Following, values: int) -> list[Any]:
    """Returns the shared memory of `leave_row` for so many values."""
    lanes = lanes_of(_row_shares(following) * following.rank)
    return [plgpu.SMEM((size,), jnp.float32) for size in (values, lanes)]


def _row_shares(following: Following) -> int:
    # A power of two, which divides the features.
    return 1 << min(share_count(following.rank), 64).bit_length() - 1


def layer_of(layer: Any, following: Following) -> Any:
    """Returns the layer of what follows, or the last."""
    return clip_layer(layer + following.ahead, _layers(following))
