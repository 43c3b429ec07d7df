"""Whether two arrays can be roundings of one array of weights.

A table is stored in one dtype, computed with in a second and saved in a third, so that
neither of two copies need be the other, rounded: fp16 on disk, bf16 in training and
float32 in an adapter's file are one table.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

_DTYPES = ("bfloat16", "float16", "float32")
_CHUNK = 1 << 20  # elements compared at a time


def rows_beyond_rounding(
    a: Float[NDArray, "V D"], b: Float[NDArray, "V D"]
) -> tuple[int, float]:
    """Counts the rows in which no common original rounds to both arrays.

    Args:
      a: weights of any float dtype, in a precision that is inferred from them.
      b: weights of the same shape, likewise.

    Returns:
      The number of such rows, and the largest difference in them.
    """
    precisions_a, precisions_b = (_precisions(array) for array in (a, b))
    rows, largest = 0, 0.0
    for block in _blocks(a):
        x, y = (array[block].astype(np.float64) for array in (a, b))
        difference = np.abs(x - y)
        # A rounding moves a value by half a unit in its last place at most. Of two
        # neighbours in one precision, a whole unit apart, only one is the rounding.
        allowed = (_last_place(x, precisions_a) + _last_place(y, precisions_b)) / 2
        beyond = (~(difference < allowed) & (difference != 0)).any(axis=-1)  # or NaN
        numbers = np.flatnonzero(beyond)
        # Two roundings, one after the other, may move a value further than that.
        unexplained = numbers[~_rounds_to(a[block][numbers], b[block][numbers])]
        rows += len(unexplained)
        largest = max(largest, float(difference[unexplained].max(initial=0.0)))
    return rows, largest


def _blocks(array: NDArray) -> list[slice]:
    step = max(_CHUNK // array.shape[-1], 1)
    return [slice(i, i + step) for i in range(0, len(array), step)]


def _precisions(array: NDArray) -> list[str]:
    """Returns the dtypes that hold every value of an array, its own among them.

    Each of them may have rounded it.
    """
    blocks = [array[block] for block in _blocks(array)]
    with np.errstate(over="ignore", under="ignore"):
        return [
            name
            for name in _DTYPES
            if all(np.array_equal(x.astype(name).astype(x.dtype), x) for x in blocks)
        ] or [array.dtype.name]


def _last_place(
    values: NDArray[np.float64], precisions: list[str]
) -> NDArray[np.float64]:
    """Returns the distance of neighbours in the coarsest precision, at each value."""
    units = []
    for info in map(ml_dtypes.finfo, precisions):
        # x = m 2^e with 0.5 <= m < 1; below the smallest normal number the grid is
        # even.
        exponent = np.where(values == 0, info.minexp, np.frexp(values)[1] - 1)
        units.append(np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant))
    return np.stack(units).max(axis=0)


def _rounds_to(a: NDArray, b: NDArray) -> Bool[np.ndarray, " V"]:
    """Tells the rows of which one is the other, cast to some dtype and to its own."""
    equal = np.zeros(len(a), bool)
    with np.errstate(over="ignore", under="ignore"):
        for source, target in ((a, b), (b, a)):
            for name in _DTYPES:
                cast = source.astype(name).astype(target.dtype)
                equal |= (cast == target).all(axis=-1)
    return equal
