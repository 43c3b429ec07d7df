"""Packs short examples into rows of a fixed number of tokens.

Best fit decreasing: from the longest example to the shortest, each goes into the open
row that it fills best. No example is cut. The number of rows is at most about 11/9 of
the smallest possible one (D. S. Johnson, "Near-optimal bin packing algorithms", 1973);
on real chat and instruction data, rows are full to within a fraction of a percent.

That order is by length. Where the order of the data counts (`shuffle` is false), a row
takes the examples as they come until one does not fit, and that one begins the next.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int64

from qlora_jax.errors import UserError

WELL_FILLED = 0.8
"""Rows at least this full gain little from packing."""
_FEWEST_ROWS = 64
# Lengths of rows are rounded up to a multiple of this, which kernels can tile.
_LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Packing:
    """Assignment of examples to rows, from `pack`.

    Attributes:
      order: int64 [examples], example indices, row after row.
      starts: int64 [rows + 1]; row `i` holds `order[starts[i] : starts[i + 1]]`.
      capacity: tokens in a row.
    """

    order: Int64[np.ndarray, " examples"]
    starts: Int64[np.ndarray, " rows_plus_1"]
    capacity: int

    def __len__(self) -> int:
        """Number of packed rows."""
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " documents"]:
        """Returns the indices of the examples in a row, in their order."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def packs(
    packing: bool | Literal["auto"],
    lengths: Int64[np.ndarray, " examples"],
    capacity: int,
) -> bool:
    """Returns whether examples are packed; "auto" is decided by their lengths.

    It packs where one example a row would leave more than a fifth of the rows to
    padding, and 64 packed rows are left: eight steps of eight.

    Args:
      packing: as in `DataConfig`.
      lengths: int64 [examples], the examples' lengths in tokens.
      capacity: tokens in a packed row.
    """
    if packing != "auto":
        return packing
    tokens = int(lengths.sum())
    is_full = tokens > WELL_FILLED * len(lengths) * row_length(lengths, capacity)
    # Packing fills rows almost completely, so that counting them takes no packing.
    return not is_full and tokens > _FEWEST_ROWS * capacity


def row_length(lengths: Int64[np.ndarray, " examples"], capacity: int) -> int:
    """Returns the tokens in a row of one example: the longest, rounded up."""
    return min(capacity, -(-int(lengths.max()) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


def pack(
    lengths: Int64[np.ndarray, " examples"], capacity: int, *, in_order: bool = False
) -> Packing:
    """Packs examples into rows of `capacity` tokens, best fit decreasing.

    The result depends on the arguments alone; equal lengths keep their order. Costs
    O(n log n) plus n operations on an integer of `capacity` bits.

    Args:
      lengths: int64 [examples], the examples' lengths in tokens, each in
        `1..capacity`.
      capacity: tokens in a row.
      in_order: fill one row after the other with the examples in their order instead,
        which leaves more padding.

    Returns:
      The rows; every example is in exactly one of them.

    Raises:
      UserError: an example is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    outside = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if outside.size:
        first = outside[0]
        raise UserError(
            f"`pack`: every length must be in 1..{capacity} (the row's tokens), got "
            f"{lengths[first]} for example {first}. Cut or drop such examples first."
        )
    if in_order:
        return _pack_in_order(lengths, capacity)
    # The free space of a row is an integer of at most `capacity`, so open rows are kept
    # in one bucket per amount of free space. Bit `f` of `occupied` is set while bucket
    # `f` holds a row: the tightest row that fits is the lowest set bit at or above the
    # length, found without a search.
    rows: list[list[int]] = []
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    descending = np.argsort(-lengths, kind="stable")
    for example, length in zip(
        descending.tolist(), lengths[descending].tolist(), strict=True
    ):
        # x & -x keeps the lowest set bit, and `bit_length` - 1 is its number.
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = buckets[free].pop()
            if not buckets[free]:
                occupied ^= 1 << free
            rows[row].append(example)
        else:
            free, row = capacity, len(rows)
            rows.append([example])
        free -= length
        if free:  # a full row is closed
            buckets[free].append(row)
            occupied |= 1 << free
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    order = np.fromiter((e for row in rows for e in row), np.int64, len(lengths))
    return Packing(order=order, starts=starts, capacity=capacity)


def _pack_in_order(lengths: np.ndarray, capacity: int) -> Packing:
    """Fills one row after the other."""
    ends = np.cumsum(lengths)
    starts, filled = [0], 0
    while starts[-1] < len(lengths):
        # The examples that end within `capacity` tokens after the row's first one.
        starts.append(int(np.searchsorted(ends, filled + capacity, side="right")))
        filled = int(ends[starts[-1] - 1])
    order = np.arange(len(lengths), dtype=np.int64)
    return Packing(order, np.array(starts, np.int64), capacity)
