import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product import (
    contract,
    dense_matmul,
    padded_row_product,
    precision,
)
from tests.pallas_kernels.rounding import assert_within_roundings


def operands(dtype, lead=(3, 5), features=(24, 40)):
    rng = np.random.default_rng(0)
    out, inner = features
    x = jnp.asarray(rng.standard_normal((*lead, inner)), dtype)
    w = jnp.asarray(rng.standard_normal((out, inner)), dtype)
    dy = jnp.asarray(rng.standard_normal((*lead, out)), dtype)
    return x, w, dy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_contract_sums_in_float32_over_either_axis(dtype, axis):
    x, w, _ = operands(dtype)
    b = w.T if axis == 0 else w
    for asked in (dtype, "float32"):
        got = contract(x, b, axis, *(() if asked == dtype else (jnp.float32,)))
        assert got.dtype == asked
        assert_within_roundings(got, x, w.T)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_padded_row_has_the_product_of_the_row(lead, axis):
    x, w, _ = operands("bfloat16", lead)
    b = w.T if axis == 0 else w
    got = padded_row_product(x, b, axis)
    assert (got.shape, got.dtype) == ((*lead, w.shape[0]), jnp.float32)
    assert_within_roundings(got, x, w.T)
    assert_within_roundings(contract(x, b, axis, jnp.float32), x, w.T)


def test_float32_asks_for_all_bits_and_bf16_for_nothing():
    assert precision(jnp.float32) == jax.lax.Precision.HIGHEST
    assert precision(jnp.bfloat16) is None
    text = str(jax.make_jaxpr(lambda x, w: contract(x, w, 1))(*operands("float32")[:2]))
    assert "HIGHEST" in text


@pytest.mark.parametrize("lead", [(), (4,), (3, 5)])
def test_values_and_gradients_are_those_of_plain_autodiff(lead):
    x, w, dy = operands("float32", lead)
    y, pullback = jax.vjp(dense_matmul, x, w)
    plain = jax.vjp(lambda x, w: jnp.matmul(x, w.T, precision="highest"), x, w)
    # Sums of at most 40 float32 terms of order 1 in two orders.
    np.testing.assert_allclose(y, plain[0], atol=1e-5)
    for got, want in zip(pullback(dy), plain[1](dy), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_values_and_gradients_are_rounded_once(dtype):
    x, w, dy = operands(dtype)
    y, pullback = jax.vjp(dense_matmul, x, w)
    dx, dw = pullback(dy)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    assert_within_roundings(y, x, w.T)
    assert_within_roundings(dx, dy, w)
    rows = dy.reshape(-1, w.shape[0]).T
    assert_within_roundings(dw, rows, x.reshape(-1, w.shape[1]))


def test_a_float32_weight_under_bf16_gets_a_gradient_summed_in_float32():
    # 4,096 rows of ones: a bf16 sum stops at 256, and rounding the sum to bf16 would
    # lose the odd bit of 4,097.
    x = jnp.ones((4097, 2), jnp.bfloat16)
    w = jnp.zeros((1, 2), jnp.float32)
    dw = jax.grad(lambda w: dense_matmul(x, w).astype(jnp.float32).sum())(w)
    assert dw.dtype == jnp.float32
    assert dw.tolist() == [[4097.0, 4097.0]]


def test_the_weight_is_multiplied_in_the_dtype_of_the_input():
    x = jnp.ones((1, 1), jnp.bfloat16)
    w = jnp.full((1, 1), 1 + 2**-12, jnp.float32)  # rounds to 1 in bf16
    assert dense_matmul(x, w, jnp.float32).item() == 1.0


def test_a_float32_result_is_not_rounded_to_bf16_and_its_gradient_fits_the_input():
    x, w, _ = operands("bfloat16")
    y = dense_matmul(x, w, jnp.float32)
    assert y.dtype == jnp.float32
    assert_within_roundings(y, x, w.T)
    dx, dw = jax.grad(lambda *a: dense_matmul(*a, jnp.float32).sum(), (0, 1))(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16


def test_it_maps_over_weights():
    x, w, _ = operands("float32", (4,))
    stacked = jnp.stack([w, 2 * w, -w])
    got = jax.vmap(dense_matmul, (None, 0))(x, stacked)
    want = jnp.stack([dense_matmul(x, m) for m in stacked])
    np.testing.assert_allclose(got, want, atol=1e-5)  # batched sums, another order
