import time

import numpy as np
import pytest

from qlora_jax.data.mixture import pack
from qlora_jax.errors import UserError


def naive_row_count(lengths, capacity):
    """Best fit decreasing, written as in the textbook."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [f for f in free if f >= length]
        if fitting:
            tightest = min(fitting)
            free[free.index(tightest)] -= length
        else:
            free.append(capacity - length)
    return len(free)


@pytest.mark.parametrize("seed", range(20))
def test_every_example_lies_in_exactly_one_row_and_no_row_overflows(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 300))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 400)))
    packing = pack(lengths, capacity)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    rows = [packing[i] for i in range(len(packing))]
    assert np.concatenate(rows).tolist() == packing.order.tolist()
    assert all(1 <= lengths[row].sum() <= capacity for row in rows)
    assert packing.capacity == capacity


@pytest.mark.parametrize("seed", range(20))
def test_it_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(100 + seed)
    capacity = int(rng.integers(10, 200))
    lengths = np.clip(rng.lognormal(3, 1, 200).astype(np.int64), 1, capacity)
    packing = pack(lengths, capacity)
    # Ties may go to either of two equally full rows; the count is the same.
    assert len(packing) == naive_row_count(lengths.tolist(), capacity)


def test_examples_that_complement_each_other_share_a_row():
    packing = pack(np.array([3, 8, 5, 7, 5, 2]), 10)
    rows = sorted(sorted(packing[i].tolist()) for i in range(len(packing)))
    assert rows == [[0, 3], [1, 5], [2, 4]]


def test_equal_lengths_are_taken_in_the_order_given():
    assert pack(np.array([4, 4, 4, 4]), 8).order.tolist() == [0, 1, 2, 3]


def test_packing_depends_on_its_arguments_alone():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    first, second = pack(lengths, 64), pack(lengths.copy(), 64)
    np.testing.assert_array_equal(first.order, second.order)
    np.testing.assert_array_equal(first.starts, second.starts)


def test_no_examples_give_no_rows():
    assert len(pack(np.array([], np.int64), 8)) == 0


def test_a_hundred_thousand_examples_take_a_couple_of_seconds():
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64)
    start = time.perf_counter()
    packing = pack(np.clip(lengths, 1, 8192), 8192)
    assert time.perf_counter() - start < 5  # 0.1 s on one quiet core
    assert lengths.clip(1, 8192).sum() / (len(packing) * 8192) > 0.99


@pytest.mark.parametrize("bad", [0, 9, -1])
def test_an_example_that_cannot_lie_in_a_row_is_refused(bad):
    with pytest.raises(UserError, match=rf"be in 1\.\.8 .* got {bad} for example 2"):
        pack(np.array([1, 8, bad]), 8)
