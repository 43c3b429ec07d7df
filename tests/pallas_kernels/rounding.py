"""What the roundings of a product may amount to."""

import jax.numpy as jnp
import numpy as np


def assert_within_roundings(got, a, b, *, weight: float = 0.0) -> None:
    """`got` is a @ b, computed in float64, but for roundings: elementwise.

    One rounding to the dtype of `got`; the float32 sum adds 2^-24 for each of its
    terms, in any order. `weight` is the relative error of the elements of b.
    """
    half = float(jnp.finfo(got.dtype).eps) / 2
    a, b = (np.asarray(m, np.float64) for m in (a, b))
    want, size = a @ b, np.abs(a) @ np.abs(b)
    assert got.shape == want.shape
    bound = (weight + a.shape[-1] * 2.0**-24) * size * (1 + half) + half * np.abs(want)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()
