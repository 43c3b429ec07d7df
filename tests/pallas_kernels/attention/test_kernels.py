"""The attention kernels: what they return besides the output, tiles, barriers."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.attention.xla import reference_attention


@pytest.mark.parametrize(
    "implementation",
    [
        "reference",
        pytest.param("interpret", marks=pytest.mark.interpret),
        pytest.param("pallas", marks=pytest.mark.gpu),
    ],
)
def test_the_log_sum_exp_is_exact(
    implementation, inputs, packed_row, float64_attention
):
    q, k, v, dout = inputs(256)
    segments = jnp.asarray(packed_row[None, :256], jnp.int32)
    if implementation == "reference":
        _, lse = reference_attention(q, k, v, segments)
    else:
        from pallas_kernels.attention.forward import forward

        interpret = device.interpreter() if implementation == "interpret" else False
        _, lse = forward(q, k, v, segments, interpret=interpret)
    assert lse.dtype == jnp.float32
    # Products of bfloat16 are exact in float32; 64 terms and 256 exponentials, whose
    # approximations on a GPU are good to 2^-22.
    want = float64_attention(q, k, v, dout, segments)[4]
    np.testing.assert_allclose(lse, want, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("width", [64, 128])
def test_any_tiles_give_the_result(
    stages, width, inputs, packed_row, float64_attention
):
    from pallas_kernels.attention.backward import backward
    from pallas_kernels.attention.blocks import Tiles
    from pallas_kernels.attention.forward import forward

    q, k, v, dout = inputs(384, heads=1)
    segments = jnp.asarray(packed_row[None], jnp.int32)
    tiles, interpret = Tiles(width, stages), device.interpreter()
    out, lse = forward(q, k, v, segments, tiles=tiles, interpret=interpret)
    named = {"query_tiles": tiles, "key_tiles": tiles, "interpret": interpret}
    gradients = backward(q, k, v, segments, out, lse, dout, **named)
    # Rounded as in test_api.py.
    want = float64_attention(q, k, v, dout, segments)[:4]
    for a, b in zip((out, *gradients), want, strict=True):
        worst = np.abs(np.asarray(a, np.float64) - b).max()
        assert worst <= 3 * 2.0**-8 * max(1.0, np.abs(b).max())


@pytest.mark.interpret
def test_the_detector_sees_a_missing_barrier(monkeypatch, inputs, detects_race):
    from pallas_kernels.attention.blocks import Ring
    from pallas_kernels.attention.forward import forward

    # Operands are read without waiting for their copies.
    monkeypatch.setattr(Ring, "wait", Ring.at)
    # One step, so that no barrier is passed twice, which the interpreter notices too.
    q, k, v, _ = inputs(128, heads=1)
    assert detects_race(forward, q, k, v, None, interpret=device.interpreter())
