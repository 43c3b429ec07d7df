import inspect
import json

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy reads bfloat16 files through it
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels import NF4_CODE, Nested, dequantize_absmax, nf4_dequantize
from pallas_kernels.nf4.api import nf4_matmul
from pallas_kernels.product import dense_matmul

# One of each kind: aligned, rows that cross blocks, odd count of weights, odd count of
# blocks' bytes, a single partial block, one weight.
SHAPES = [(8, 64), (3, 128), (5, 192), (4, 96), (7, 352), (3, 65), (5, 7), (1, 1)]


FRAGMENT = "model.layers.0.mlp.gate_proj.weight"


def packed(shape, *, nested=False, seed=0):
    """Random codes and scales in the layout of `shape`; every code occurs."""
    rng = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    blocks = -(-size // 64)
    codes = rng.integers(0, 256, -(-size // 2), dtype=np.uint8)
    if shape[1] % 64 == 0:
        rows = (shape[0], shape[1] // 64)
        codes = codes.reshape(shape[0], -1)
    else:
        rows = (blocks,)
    absmax = rng.uniform(0.01, 0.1, rows).astype(np.float32)
    if nested:
        absmax = rng.integers(0, 256, rows, dtype=np.uint8)
    second = second_level(rng, blocks) if nested else None
    return jax.tree.map(jnp.asarray, (codes, absmax, second))


def second_level(rng, blocks):
    return Nested(
        jnp.asarray(rng.uniform(0.001, 0.02, -(-blocks // 256)), jnp.float32),
        jnp.asarray(0.0518790222, jnp.float32),
        jnp.asarray(np.sort(rng.uniform(-1, 1, 256)), jnp.float32),
    )


def numpy_absmax(absmax, nested):
    """`map[code] * scale + offset`, each step rounded to float32."""
    absmax, nested = jax.tree.map(np.asarray, (absmax, nested))
    if nested is None:
        return absmax.reshape(-1)
    flat = nested.quant_map[absmax.reshape(-1)]
    scale = np.repeat(nested.absmax, 256)[: flat.size]
    return (flat * scale + nested.offset).astype(np.float32)


def numpy_dequantize(codes, absmax, nested, shape, dtype=np.float32):
    """High nibble first, table value times the block's scale, one rounding to dtype."""
    size = shape[0] * shape[1]
    flat = np.asarray(codes).reshape(-1)
    index = np.stack([flat >> 4, flat & 15], -1).reshape(-1)[:size]
    scale = np.repeat(numpy_absmax(absmax, nested), 64)[:size]
    return (NF4_CODE[index] * scale).astype(dtype).reshape(shape)


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_the_table_times_the_scale_bit_for_bit(shape, nested):
    arguments = packed(shape, nested=nested)

    def in_all_dtypes(*arguments):
        return [nf4_dequantize(*arguments, shape=shape, dtype=d) for d in DTYPES]

    for dtype, got in zip(DTYPES, jax.jit(in_all_dtypes)(*arguments), strict=True):
        want = numpy_dequantize(*arguments, shape, np.dtype(dtype))
        assert got.dtype == dtype and got.shape == shape
        np.testing.assert_array_equal(np.asarray(got), want)
    # Operation by operation as well: a compiler may fuse product and rounding.
    got = nf4_dequantize(*arguments, shape=shape, dtype=jnp.bfloat16)
    want = numpy_dequantize(*arguments, shape, np.dtype("bfloat16"))
    np.testing.assert_array_equal(np.asarray(got), want)


def test_the_high_nibble_comes_first():
    codes = jnp.zeros((1, 32), jnp.uint8).at[0, 0].set(0x0F)
    got = nf4_dequantize(codes, jnp.ones((1, 1)), shape=(1, 64), dtype=jnp.float32)
    assert got[0, :3].tolist() == [-1.0, 1.0, -1.0]


def test_bf16_is_rounded_once_to_nearest_even():
    # 1.00390625 = 1 + 2^-8 lies between two bf16 numbers: the even one is 1.0. The next
    # float32 above it must go up.
    scales = np.float32(
        [1 + 2**-8, np.nextafter(np.float32(1 + 2**-8), 2), 1 + 3 / 256]
    )
    codes = jnp.full((3, 32), 0xFF, jnp.uint8)
    scales = jnp.asarray(scales)[:, None]
    got = nf4_dequantize(codes, scales, shape=(3, 64), dtype=jnp.bfloat16)
    want = np.float32([1.0, 1 + 2**-7, 1 + 2**-6])
    np.testing.assert_array_equal(np.asarray(got[:, 0], np.float32), want)


def test_double_quantized_scales_round_product_and_sum_apart():
    # A fused multiply-add gives another float32 for about a third of random operands;
    # over 4,096 of them a contraction could not hide.
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (16, 256), dtype=np.uint8))
    nested = second_level(rng, codes.size)
    want = numpy_absmax(codes, nested).reshape(codes.shape)
    got = jax.jit(dequantize_absmax)(codes, nested)
    np.testing.assert_array_equal(np.asarray(got), want)
    scale, offset, table = (np.asarray(part, np.float64) for part in nested)
    fused = (table[codes] * scale[:, None] + offset).astype(np.float32)
    assert (fused != want).sum() > 100  # so the comparison above can tell


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 700])
def test_second_level_groups_may_be_partial(blocks):
    rng = np.random.default_rng(blocks)
    codes = jnp.asarray(rng.integers(0, 256, blocks, dtype=np.uint8))
    nested = second_level(rng, blocks)
    got = dequantize_absmax(codes, nested)
    np.testing.assert_array_equal(np.asarray(got), numpy_absmax(codes, nested))


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama_1b_nf4", "llama_1b_nf4_double_quant"])
def test_real_weights_equal_what_cuda_made_of_them(shared_data, name):
    file = load_file(shared_data / "bnb-fragments" / f"{name}.safetensors")
    expected = file.pop("expected_bf16")
    part = {key.removeprefix(FRAGMENT): jnp.asarray(v) for key, v in file.items()}
    nested = None
    if "double" in name:
        state = json.loads(bytes(file[f"{FRAGMENT}.quant_state.bitsandbytes__nf4"]))
        nested = Nested(
            part[".nested_absmax"],
            jnp.asarray(state["nested_offset"], jnp.float32),
            part[".nested_quant_map"],
        )
    np.testing.assert_array_equal(part[".quant_map"], NF4_CODE)
    for shape, codes, absmax in (  # flat, as the file says, and as one aligned row
        ((4096, 1), part[""].reshape(-1), part[".absmax"]),
        ((1, 4096), part[""].reshape(1, -1), part[".absmax"].reshape(1, -1)),
    ):
        got = nf4_dequantize(codes, absmax, nested, shape=shape, dtype=jnp.bfloat16)
        got = np.asarray(got).reshape(-1)
        np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


def test_sizes_that_do_not_fit_the_shape_are_refused():
    codes, absmax, _ = packed((4, 128))
    with pytest.raises(
        ValueError, match=r"shape \(4, 64\) has 128 code bytes and 4 bl"
    ):
        nf4_dequantize(codes, absmax, shape=(4, 64), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"8 block scales, got 256 and 7"):
        nf4_dequantize(codes, absmax.reshape(-1)[:7], shape=(4, 128), dtype=jnp.float32)


def test_eight_bit_scales_need_their_second_level_and_others_refuse_it():
    codes, absmax, nested = packed((4, 128), nested=True)
    with pytest.raises(ValueError, match="absmax of uint8 and nested=None"):
        nf4_dequantize(codes, absmax, shape=(4, 128), dtype=jnp.float32)
    with pytest.raises(ValueError, match="absmax of float32 and nested=given"):
        nf4_dequantize(
            codes, absmax.astype(np.float32), nested, shape=(4, 128), dtype=jnp.float32
        )


# --- The product ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 64), (24, 192), (7, 352), (5, 7)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_product_and_gradient_equal_the_dense_ones_exactly(shape, lead, nested):
    # Operation by operation the packed product runs the very matrix products of the
    # dense one on the very same weights: no tolerance.
    codes, absmax, second = packed(shape, nested=nested)
    dense = jnp.asarray(numpy_dequantize(codes, absmax, second, shape))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((*lead, shape[1])), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((*lead, shape[0])), jnp.float32)
    y, pullback = jax.vjp(
        lambda x: nf4_matmul(x, codes, absmax, second, shape=shape), x
    )
    want, dense_pullback = jax.vjp(lambda x: dense_matmul(x, dense), x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(pullback(dy)[0], dense_pullback(dy)[0])


@pytest.mark.parametrize("shape", [(48, 192), (32, 352)])
def test_bf16_product_and_gradient_are_within_their_roundings(shape):
    # Against float64 on the unrounded weights, elementwise. u = 2^-8 is half an ulp of
    # bf16: one rounding of each weight (a compiler may skip it), one of the result; the
    # float32 sum of K terms adds K * 2^-24 (any order).
    u, e = 2.0**-8, 2.0**-24
    codes, absmax, _ = packed(shape)
    w = numpy_dequantize(codes, absmax, None, shape).astype(np.float64)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((6, shape[1])), jnp.bfloat16)
    dy = jnp.asarray(rng.standard_normal((6, shape[0])), jnp.bfloat16)

    @jax.jit
    def both(x, dy):
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, codes, absmax, shape=shape), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    for got, a, b in ((y, x, w.T), (dx, dy, w)):
        a = np.asarray(a, np.float64)
        want, size = a @ b, np.abs(a) @ np.abs(b)
        bound = (u + a.shape[1] * e) * size * (1 + u) + u * np.abs(want)
        assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


def test_a_float32_result_of_bf16_inputs_is_not_rounded_to_bf16():
    codes, absmax, _ = packed((8, 192))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 192)), jnp.bfloat16)
    y = nf4_matmul(x, codes, absmax, shape=(8, 192), dtype=jnp.float32)
    assert y.dtype == jnp.float32
    rounded = y.astype(jnp.bfloat16).astype(jnp.float32)
    assert (y != rounded).mean() > 0.9
    # The gradient comes back in the dtype of x whatever the dtype of y.
    dx = jax.grad(
        lambda x: nf4_matmul(x, codes, absmax, shape=(8, 192), dtype=jnp.float32).sum()
    )(x)
    assert dx.dtype == jnp.bfloat16


def residuals(function, *args):
    """What reverse mode keeps between forward and backward."""
    return [leaf for leaf in jax.tree.leaves(jax.vjp(function, *args)[1])]


@pytest.mark.parametrize("nested", [False, True])
def test_the_residual_is_the_packed_bytes_and_no_float_weight(nested):
    shape = (128, 256)
    codes, absmax, second = packed(shape, nested=nested)
    x = jnp.ones((2, shape[1]), jnp.float32)

    def product(x, codes, absmax):
        return nf4_matmul(x, codes, absmax, second, shape=shape)

    kept = residuals(lambda x: product(x, codes, absmax), x)
    floats = [a for a in kept if jnp.issubdtype(a.dtype, jnp.floating)]
    assert any(a.dtype == jnp.uint8 and a.size == codes.size for a in kept)
    # The scales are the largest float array: one for each 64 weights.
    assert max(a.size for a in floats) <= shape[0] * shape[1] // 64
    # The check can fail: a product that dequantizes under autodiff keeps the weight.
    naive = residuals(
        lambda x: (
            x @ nf4_dequantize(codes, absmax, second, shape=shape, dtype=jnp.float32).T
        ),
        x,
    )
    assert max(a.size for a in naive) == shape[0] * shape[1]


def test_nothing_of_the_input_is_kept_either():
    shape = (64, 64)
    codes, absmax, _ = packed(shape)
    x = jnp.ones((1000, 64), jnp.float32)
    kept = residuals(lambda x: nf4_matmul(x, codes, absmax, shape=shape), x)
    assert sum(a.nbytes for a in kept) <= codes.nbytes + absmax.nbytes


def test_the_product_maps_over_inputs_and_over_weights():
    shape = (16, 128)
    parts = [packed(shape, seed=s)[:2] for s in range(3)]
    codes, absmax = (jnp.stack([p[i] for p in parts]) for i in range(2))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 128)), jnp.float32)

    def one(x, c, a):
        return nf4_matmul(x, c, a, shape=shape)

    want = jnp.stack([one(x[i], codes[i], absmax[i]) for i in range(3)])
    # Batched products sum in another order: K = 128 float32 terms of size ~ 0.3.
    np.testing.assert_allclose(jax.vmap(one)(x, codes, absmax), want, atol=1e-5)
    grad = jax.vmap(jax.grad(lambda *a: one(*a).sum()))(x, codes, absmax)
    weights = [nf4_dequantize(c, a, shape=shape, dtype=jnp.float32) for c, a in parts]
    want = jnp.stack([jnp.broadcast_to(w.sum(0), (5, 128)) for w in weights])
    np.testing.assert_allclose(grad, want, atol=1e-5)


def test_an_input_of_another_width_is_refused():
    codes, absmax, _ = packed((8, 64))
    with pytest.raises(ValueError, match=r"takes 64 features, `x` has shape \(2, 63\)"):
        nf4_matmul(jnp.ones((2, 63)), codes, absmax, shape=(8, 64))


def test_what_is_no_floating_point_is_refused():
    """As whole numbers, weights would all be -1, 0 or 1, without a word."""
    codes, absmax, _ = packed((8, 64))
    with pytest.raises(ValueError, match=r"nf4_dequantize`: dtype .* got int8"):
        nf4_dequantize(codes, absmax, shape=(8, 64), dtype=jnp.int8)
    whole = jnp.ones((2, 64), jnp.int32)
    with pytest.raises(ValueError, match=r"the dtype of `x` must .* got int32"):
        # Without the checks of annotations, as users have it.
        inspect.unwrap(nf4_matmul)(whole, codes, absmax, shape=(8, 64))
    with pytest.raises(ValueError, match=r"nf4_matmul`: dtype must .* got int32"):
        nf4_matmul(jnp.ones((2, 64)), codes, absmax, shape=(8, 64), dtype=jnp.int32)
