"""`normed_input` and its derivative are the formulas, whatever computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.norm import reference
from pallas_kernels.norm.api import normed_input, refusal

EPS = 1e-5


def draw(features, rank, dtype="bfloat16", *, rows=(2, 8), seed=0):
    """x, weight, A, scaling, and the derivatives of both results."""
    rng = np.random.default_rng(seed)

    def normal(*shape, deviation=1.0):
        return jnp.asarray(deviation * rng.standard_normal(shape), jnp.float32)

    x = normal(*rows, features, deviation=3).astype(dtype)
    arrays = (x, normal(features), normal(rank, features, deviation=0.05))
    scaling = jnp.asarray(rng.uniform(0.5, 2, rank), jnp.float32)
    gradients = (normal(*rows, features + rank), normal(*rows, features))
    return (*arrays, scaling), tuple(g.astype(dtype) for g in gradients)


def exact(arrays, gradients, *, offset):
    """Results and derivatives in float64, and what roundings to 16 bits amount to.

    In units of the last place, halved: y is rounded up to twice, its products with A as
    well, and z = scaling * h, a factor of the derivatives, once.
    """
    x, weight, a, scaling, dx_ext, dres = (
        np.asarray(v, np.float64) for v in (*arrays, *gradients)
    )
    dtype, width = arrays[0].dtype, x.shape[-1]
    a = np.asarray(arrays[2].astype(dtype), np.float64)
    if not offset:
        weight = np.asarray(arrays[1].astype(dtype), np.float64)
    factor = 1 + weight if offset else weight
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    y = x * inverse * factor
    low = scaling * (y @ a.T)
    z = dx_ext[..., width:] * scaling
    dh = dx_ext[..., :width] + z @ a
    dh_error = np.abs(z) @ np.abs(a)

    def through_norm(dh):
        mean = (dh * factor * x).mean(-1, keepdims=True)
        return inverse * dh * factor - x * inverse**3 * mean

    dx = through_norm(dh) + dres
    # The mean takes the sums of z (A y) from the rounded products.
    mean_error = (dh_error * np.abs(factor * x)).mean(-1, keepdims=True)
    dx_error = inverse * dh_error * np.abs(factor)
    dx_error = dx_error + 4 * np.abs(x) * inverse**3 * mean_error
    per_row = x * inverse
    results = {
        "y": (y, 2 * np.abs(y)),
        "low-rank": (low, 2 * scaling * (np.abs(y) @ np.abs(a).T) + 2 * np.abs(low)),
        "dx": (dx, dx_error + np.abs(dx)),
        "dweight": (
            (dh * per_row).sum((0, 1)),
            (dh_error * np.abs(per_row)).sum((0, 1)),
        ),
        "da": (
            np.einsum("bti,btj->ij", z, y),
            3 * np.einsum("bti,btj->ij", np.abs(z), np.abs(y)),
        ),
    }
    return results


@pytest.mark.parametrize(
    "features, rank, dtype, offset",
    [
        (512, 16, "bfloat16", False),
        (640, 48, "bfloat16", True),  # an odd number of chunks, which nobody shares
        (768, 32, "float16", False),
        (256, 128, "float16", True),
    ],
)
def test_results_and_derivatives_are_those_of_the_formula(
    features, rank, dtype, offset, implementation
):
    (x, weight, a, scaling), gradients = draw(features, rank, dtype)
    call = lambda x, weight, a: normed_input(  # noqa: E731
        x, weight, a, scaling, eps=EPS, offset=offset, implementation=implementation
    )
    (extended, same), pullback = jax.vjp(call, x, weight, a)
    np.testing.assert_array_equal(same, x)
    found = (
        *(extended[..., :features], extended[..., features:]),
        *pullback(gradients),
    )
    expected = exact((x, weight, a, scaling), gradients, offset=offset)
    half_unit = 2.0 ** -(8 if dtype == "bfloat16" else 11)
    for got, (name, (want, error)) in zip(found, expected.items(), strict=True):
        # Two per cent for roundings of roundings, and the float32 sums.
        bound = 1.02 * half_unit * error + 1e-6 * np.abs(want).max()
        assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all(), name
    # Both orders of rounding are within these bounds: which one it is, the bits tell.
    y = reference.rms_norm(x, weight, eps=EPS, offset=offset)
    assert (extended[..., :features] != y).mean() < 0.01


@pytest.mark.parametrize("offset", [False, True])
def test_the_derivative_is_that_of_plain_operations(offset):
    (x, weight, a, scaling), gradients = draw(64, 8, "float32")

    def plain(x, weight, a):
        arguments = (x, weight, a, scaling)
        return reference.forward(*arguments, eps=EPS, offset=offset), x

    def ours(x, weight, a):
        named = {"eps": EPS, "offset": offset, "implementation": "xla"}
        return normed_input(x, weight, a, scaling, **named)

    found, expected = (
        jax.vjp(function, x, weight, a)[1](gradients) for function in (ours, plain)
    )
    for got, want in zip(found, expected, strict=True):
        # Float32 sums of 64 terms in another order.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * abs(want).max())


def test_the_gradient_of_a_is_not_rounded(implementation):
    arrays, gradients = draw(256, 16)

    def call(a):
        named = {"eps": EPS, "implementation": implementation}
        return normed_input(*arrays[:2], a, arrays[3], **named)

    (da,) = jax.vjp(call, arrays[2])[1](gradients)
    assert da.dtype == jnp.float32
    assert (da != da.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": "float32"}, "16 bits, not float32"),
        ({"rows": (3, 5)}, "multiple of 16 rows, not 15"),
        ({"features": 192}, "multiple of 128 features up to 16384, not 192"),
        ({"rank": 24}, "multiple of 16 ranks up to 128, not 24"),
        ({"rank": 144}, "multiple of 16 ranks up to 128, not 144"),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused_with_the_reason(change, reason):
    arguments, _ = draw(**({"features": 256, "rank": 16} | change))
    with pytest.raises(ValueError, match=reason):
        normed_input(*arguments, eps=EPS, implementation="interpret")
    # What is best known computes it all the same.
    assert normed_input(*arguments, eps=EPS)[1] is not None


def test_the_kernels_are_for_hopper(simulate_gpu):
    x = jnp.zeros((16, 128), jnp.bfloat16)
    simulate_gpu("8.0")
    assert "this one has 8.0" in refusal(x, 16)
    simulate_gpu("9.0")
    assert device.jax_has_kernels() == (refusal(x, 16) is None)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert "2 devices, and how they divide the rows is not" in refusal(x, 16)
        # A device has half of the rows.
        divided = (("data",),)
        assert "rows, not 8" in refusal(x, 16, divided=divided)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({1: jnp.ones(128)}, "256 features"),
        ({2: jnp.ones((16, 128))}, "256 features"),
        ({3: jnp.ones(8)}, "each of the 16 rows"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, reason, unchecked):
    arguments, _ = draw(256, 16)
    arguments = [change.get(i, v) for i, v in enumerate(arguments)]
    with pytest.raises(ValueError, match=reason):
        unchecked(normed_input)(*arguments, eps=EPS)


@pytest.mark.interpret
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_detector_sees_a_missing_barrier(direction, monkeypatch, detects_race):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.norm import gpu

    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    (x, weight, a, scaling), (dx_ext, dres) = draw(512, 16, rows=(16,))
    named = {"eps": EPS, "interpret": device.interpreter()}
    a = a.astype(x.dtype)
    if direction == "forward":
        arguments = (x, weight, a, scaling)
        assert detects_race(gpu.forward, *arguments, rounds_first=True, **named)
    else:
        arguments = (dx_ext, dx_ext[:, 512:], a, scaling[:1].repeat(16), x, weight)
        assert detects_race(gpu.backward, *arguments, dres, **named)
