"""The gated activation, its derivative and their products are the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.gated import api
from pallas_kernels.gated.api import gated_activation, gated_gradients


def draw(tokens, features, ranks, dtype="bfloat16", seed=0):
    """gate and up, dh, z of all products, and A."""
    rng = np.random.default_rng(seed)

    def normal(*shape, deviation=1.0):
        return jnp.asarray(deviation * rng.standard_normal(shape), dtype)

    gate_up = normal(tokens, 2 * features, deviation=3)
    z = tuple(normal(tokens, rank) for rank in ranks)
    a = normal(ranks[2], features, deviation=0.1)
    return gate_up, normal(tokens, features), z, a


def exact(gate_up, dh, z, a):
    """Results in float64, with the size of the terms that are rounded."""
    gate_up, dh, a = (np.asarray(v, np.float64) for v in (gate_up, dh, a))
    z = [np.asarray(each, np.float64) for each in z]
    gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    sigmoid = 1 / (1 + np.exp(-gate))
    h = gate * sigmoid * up
    dgate = dh * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    # Its factors cancel where silu' changes its sign, so what is rounded is larger.
    dgate_size = np.abs(dh * up) * (sigmoid + np.abs(gate) * sigmoid * (1 - sigmoid))
    dup = dh * gate * sigmoid
    products = [
        (each.T @ v, np.abs(each).T @ np.abs(v))
        for each, v in zip(z, (dgate, dup, h), strict=True)
    ]
    return {
        "h": (h, np.abs(h), 0),
        "inner": (h @ a.T, np.abs(h @ a.T), np.abs(h) @ np.abs(a).T),
        "dgate": (dgate, np.abs(dgate), 1e-3 * dgate_size),
        "dup": (dup, np.abs(dup), 0),
        # Of rounded numbers, summed in float32.
        **{f"product {n}": (p, 0, size) for n, (p, size) in enumerate(products)},
    }


@pytest.mark.parametrize(
    "tokens, features, ranks, dtype",
    [
        (128, 128, (16, 16, 16), "bfloat16"),
        (256, 384, (32, 16, 32), "float16"),
        (640, 256, (16, 32, 16), "bfloat16"),  # several steps, or parts
    ],
)
def test_results_are_those_of_the_formula(
    tokens, features, ranks, dtype, implementation
):
    gate_up, dh, z, a = draw(tokens, features, ranks, dtype)
    named = {"implementation": implementation}
    pairs, products = gated_gradients(gate_up, dh, z, **named)
    assert all(product.dtype == jnp.float32 for product in products)
    got = (*gated_activation(gate_up, a, **named), pairs[:, 0::2], pairs[:, 1::2])
    expected = exact(gate_up, dh, z, a)
    half_unit = 2.0 ** -(8 if dtype == "bfloat16" else 11)
    for value, (name, (want, once, terms)) in zip(
        (*got, *products), expected.items(), strict=True
    ):
        # Two per cent for roundings of roundings, and the float32 sums.
        bound = 1.02 * half_unit * (once + terms) + 1e-6 * np.abs(want).max()
        assert (np.abs(np.asarray(value, np.float64) - want) <= bound).all(), name


def test_the_derivative_is_that_of_plain_operations():
    """Far from 0 as well, where a sigmoid is 0 or 1."""
    gate_up, dh, _, _ = draw(64, 32, (8, 8, 8), "float32")
    gate_up = gate_up.at[0].multiply(100)

    def activation(gate_up):
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        return jax.nn.silu(gate) * up

    (want,) = jax.vjp(activation, gate_up)[1](dh)
    z = (jnp.eye(64),) * 3
    got, products = gated_gradients(gate_up, dh, z, implementation="xla")
    # Float32 in another order of operations.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for product, value in zip(products[:2], (got[:, 0::2], got[:, 1::2]), strict=True):
        np.testing.assert_array_equal(product, value)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": "float32"}, "16 bits, not float32"),
        ({"tokens": 96}, "multiple of 64 tokens, not 96"),
        ({"features": 192}, "multiple of 128 features, not 192"),
        ({"ranks": (16, 16, 24)}, "multiple of 16 ranks up to 32, not 24"),
        ({"ranks": (16, 16, 64)}, "multiple of 16 ranks up to 32, not 64"),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused_with_the_reason(change, reason):
    case = {"tokens": 128, "features": 128, "ranks": (16, 16, 16)} | change
    gate_up, dh, z, a = draw(**case)
    for call in (
        lambda named: gated_activation(gate_up, a, **named),
        lambda named: gated_gradients(gate_up, dh, z, **named),
    ):
        with pytest.raises(ValueError, match=reason):
            call({"implementation": "interpret"})
        # What is best known computes it all the same.
        assert call({})[0] is not None
    with pytest.raises(ValueError, match="does not exist"):
        gated_activation(gate_up, a, implementation="cuda")


def test_the_kernels_are_for_hopper(simulate_gpu):
    gate_up = jnp.zeros((128, 256), jnp.bfloat16)
    simulate_gpu("8.0")
    assert "this one has 8.0" in api.refusal(gate_up, (16,))
    simulate_gpu("9.0")
    assert device.jax_has_kernels() == (api.refusal(gate_up, (16,)) is None)
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh):
        reason = api.refusal(gate_up, (16,))
        assert "2 devices, and how they divide the rows is not" in reason
        # A device has half of the tokens.
        reason = api.refusal(gate_up[:64], (16,), divided=(("data",),))
        assert "64 tokens, not 32" in reason


def test_shapes_that_do_not_fit_are_refused(unchecked):
    gate_up, dh, z, a = draw(128, 128, (16, 16, 16))
    with pytest.raises(ValueError, match="128 features"):
        unchecked(gated_activation)(gate_up[:, :128], a)
    with pytest.raises(ValueError, match="three z of its rows"):
        unchecked(gated_gradients)(gate_up, dh[:, :64], z)


@pytest.mark.interpret
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_detector_sees_a_missing_barrier(direction, monkeypatch, detects_race):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gated import gpu

    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    gate_up, dh, z, a = draw(128, 256, (16, 16, 16))
    named = {"interpret": device.interpreter()}
    if direction == "forward":
        assert detects_race(gpu.forward, gate_up, a, **named)
    else:
        # One warpgroup: nothing that another could see too early.
        assert not detects_race(gpu.backward, gate_up, dh, z, **named)
