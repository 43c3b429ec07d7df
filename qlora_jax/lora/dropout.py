"""Random numbers of tokens, which depend on nothing but the token.

Each token of a batch has a key of its own, made of its row and of its index in the row.
It draws the same numbers however the tokens are ordered, cut into chunks, or divided
over devices, so a run on a mesh repeats a run on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def drop(
    x: Float[Array, "*B I"],
    rate: float,
    key: Array,
    index: Int[Array, " T"] | None = None,
) -> Float[Array, "*B I"]:
    """Drops elements, and divides the others by the share that is kept.

    Args:
      x: features last.
      rate: probability of dropping an element.
      key: PRNG key.
      index: as `draw` takes it.
    """
    keep = draw(
        partial(jax.random.bernoulli, p=1.0 - rate, shape=x.shape[-1:]),
        *(key, x.shape[:-1], index),
    )
    # Inverted dropout: the expectation is x, so evaluation needs no factor.
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def draw(
    function: Callable[[Array], Array],
    key: Array,
    shape: tuple[int, ...],
    index: Int[Array, " T"] | None = None,
) -> Array:
    """Returns function(key of the token) for each token.

    Args:
      function: of a key.
      key: PRNG key of all.
      shape: (B, T). With another number of axes each of their entries is a row of its
        own, of one token.
      index: in the row, of each of the T tokens; None = 0, 1, 2, ...

    Returns:
      [*shape, ...].
    """
    rows, length = shape if len(shape) == 2 else (math.prod(shape), 1)
    if index is None:
        index = jnp.arange(length)
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold_in(key, jnp.arange(rows, dtype=jnp.uint32))
    keys = jax.vmap(fold_in, (0, None))(keys, index.astype(jnp.uint32))
    drawn = jax.vmap(jax.vmap(function))(keys)
    return drawn.reshape(*shape, *drawn.shape[2:])
