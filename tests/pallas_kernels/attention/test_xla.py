"""Blocks in plain XLA: their size under a window. Results are compared in test_api."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import xla
from pallas_kernels.attention.variant import Variant
from pallas_kernels.attention.xla import blockwise_attention


@pytest.mark.parametrize(
    "window, block, heads, expected",
    [
        (None, 1024, 32, 1024),
        (4096, 1024, 32, 1024),  # no longer than half a window
        (2047, 1024, 32, 512),  # longer
        (512, 1024, 32, 512),  # 256 would leave 2^21 scores
        (512, 1024, 128, 256),
        (1, 1024, 512, 128),  # never fewer than 2^23
        (512, 1024, 4, 1024),  # Gemma 3 1B: few heads, already small steps
        (100, 256, 32, 256),  # the blocks of a CPU
        (1, 1000, 64, 1000),  # a short row; half of 1,000 is no multiple of 8
    ],
)
def test_blocks_under_a_window_are_small_but_no_step_is(window, block, heads, expected):
    q = jnp.zeros((1, 1, heads, 1))
    assert xla.block_under(window, block, q) == expected


@pytest.mark.parametrize("choice", [None, 0, 1])
def test_smaller_blocks_under_a_window_change_nothing(choice, inputs, monkeypatch):
    q, k, v, dout = inputs(300, heads=4, groups=2, width=16, dtype="float32")
    segments = jnp.asarray(np.repeat([[1, 2, 0]], (130, 150, 20), axis=1), jnp.int32)
    windows = (70,) if choice is None else (None, 70)
    variant = Variant(softcap=7.25, windows=windows)
    chosen = None if choice is None else jnp.int32(choice)

    def gradient():
        def call(q, k, v):
            return blockwise_attention(q, k, v, segments, variant, chosen)

        out, derivative = jax.vjp(call, q, k, v)
        return out, *derivative(dout)

    whole = gradient()
    used = []

    def smaller(window, block, q):
        used.append(block // 4 if window else block)
        return used[-1]

    monkeypatch.setattr(xla, "block_under", smaller)
    jax.clear_caches()  # of what was traced with larger blocks
    parts = gradient()
    assert {64} <= set(used) <= {64, 256}
    # float32 sums of up to 70 terms (or 150) in another order.
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * float(jnp.abs(a).max()))
