"""Which blocks the attention kernels look at."""

import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.interpret  # the module needs the jax of the kernels

LENGTH = 384


either_side = pytest.mark.parametrize("queries", [True, False])
either_width = pytest.mark.parametrize("other_rows", [64, 128])


@either_side
@either_width
@pytest.mark.parametrize("window", [None, 1, 64, 130])
def test_no_block_that_is_seen_is_left_out(any_row, other_rows, queries, window):
    """And a clear one is visible throughout."""
    from pallas_kernels.attention.reach import BLOCK, reach

    kind, row = any_row
    visible = np.tril(row[:, None] == row[None, :])
    if window is not None:
        visible = np.triu(visible, 1 - window)
    visible = visible if queries else visible.T  # [rows, rows of the other side]
    shape = (LENGTH // BLOCK, BLOCK, LENGTH // other_rows, other_rows)
    blocks = visible.reshape(shape)
    in_part, throughout = blocks.any((1, 3)), blocks.all((1, 3))
    segments = jnp.asarray(row[None], jnp.int32)
    limits = reach(segments, BLOCK, other_rows, queries=queries, window=window)
    for i in range(LENGTH // BLOCK):
        first, last, clear_from, clear_to = (int(limit[0, i]) for limit in limits)
        assert first <= last
        assert not in_part[i, :first].any() and not in_part[i, last + 1 :].any()
        assert throughout[i, max(first, clear_from) : min(last + 1, clear_to)].all()
        # Contiguous or nearly: not a block too many. With a window, ranges of scattered
        # ids hold blocks that are not seen.
        if kind != "random" and not (window and kind == "any order"):
            assert in_part[i, first] and in_part[i, last]
        if window is not None:
            continue
        if kind == "one" or (kind == "a block within a document" and i > 0):
            # The diagonal, and the one block that holds two documents.
            masked = (last + 1 - first) - max(0, clear_to - max(first, clear_from))
            assert masked <= BLOCK // other_rows * (1 if kind == "one" else 2)


@either_side
@either_width
def test_rows_of_one_segment_need_no_search(other_rows, queries):
    from pallas_kernels.attention.reach import BLOCK, causal_reach, reach

    ones = jnp.ones((2, 640), jnp.int32)
    searched = reach(ones, BLOCK, other_rows, queries=queries)
    known = causal_reach(2, 640, BLOCK, other_rows, queries=queries)
    for a, b in zip(searched, known, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_longest_blocks_come_first():
    """Every block once, and equal ones in their order, so that runs do not differ."""
    from pallas_kernels.attention.reach import BLOCK, longest_first, reach

    rng = np.random.default_rng(0)
    segments = jnp.asarray(np.sort(rng.integers(1, 5, (3, 1024))), jnp.int32)
    limits = reach(segments, BLOCK, 128, queries=True)
    lengths = np.asarray(limits.last - limits.first).reshape(-1)
    want = np.argsort(-lengths, kind="stable")
    np.testing.assert_array_equal(longest_first(limits), want)
