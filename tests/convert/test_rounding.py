"""Tables that went through several precisions, and tables of another base."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from convert.rounding import rows_beyond_rounding

DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))


def weights(seed=0):
    table = np.random.default_rng(seed).standard_normal((40, 64)).astype(np.float32)
    table *= np.logspace(-9, 1, 40, dtype=np.float32)[:, None]  # subnormals of float16
    table[7] = 0
    return table


@pytest.mark.parametrize(
    "stored, computed, saved", [*itertools.product(DTYPES, repeat=3)]
)
def test_any_two_forms_of_a_table_are_one(stored, computed, saved):
    disk = weights().astype(stored)
    memory = disk.astype(computed)
    copy = memory.astype(saved)
    # The base may be compared as it is stored, or as it was loaded in any dtype.
    assert rows_beyond_rounding(copy, disk) == (0, 0)
    assert rows_beyond_rounding(memory, copy) == (0, 0)
    if computed != saved:
        return
    for loaded in DTYPES:
        assert rows_beyond_rounding(copy, disk.astype(loaded)) == (0, 0)


@pytest.mark.parametrize("a, b", [*itertools.product(DTYPES, repeat=2)])
def test_rows_that_no_rounding_explains_are_counted(a, b):
    table, other = weights(), weights()
    other[[3, 30], 5] *= 1.02
    other[33] *= np.float32(1.02)
    rows, largest = rows_beyond_rounding(table.astype(a), other.astype(b))
    # Row 3 is about 1e-8, which float16 cannot tell.
    assert rows == (2 if "float16" in (a.name, b.name) else 3)
    assert largest == pytest.approx(np.abs(other[33] - table[33]).max(), rel=0.3)
    other[20, 0] = np.nan
    assert rows_beyond_rounding(other.astype(b), table.astype(a))[0] == rows + 1


def test_neighbours_in_one_precision_are_two_tables():
    table = weights(1)[30:].astype(DTYPES[0])
    neighbour = (table.view(np.uint16) + 1).view(DTYPES[0])
    rows = len(table)
    assert rows_beyond_rounding(table, neighbour)[0] == rows
    # In a wider file too.
    assert rows_beyond_rounding(table.astype(np.float32), neighbour)[0] == rows
