"""The laws of `nf4_dequantize` and `nf4_matmul`, for every implementation.

"interpret" runs the GPU kernels' own programs, block by block and with a race detector,
wherever jax can (0.11 and newer). What their inline instructions do on the device is
checked on compiled code, in tests/compile.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, nf4_dequantize, nf4_matmul
from pallas_kernels.nf4.api import FUSED_ROWS
from pallas_kernels.product import dense_matmul
from tests.pallas_kernels.rounding import assert_within_roundings

LAYERS = 3


def bits(array):
    return np.asarray(array).view(np.uint8)


# --- Dequantization ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dequantize_gives_the_same_bits(implementation, nested, dtype, stack, layer_of):
    shape = (32, 192)
    packed = stack(shape, nested=nested)
    for layer in (0, LAYERS - 1):
        single = layer_of(packed, layer)
        want = nf4_dequantize(*single, shape=shape, dtype=dtype, implementation="xla")
        named = {"shape": shape, "dtype": dtype, "implementation": implementation}
        for got in (
            nf4_dequantize(*single, **named),
            nf4_dequantize(*packed, layer=layer, **named),
            jax.jit(lambda n: nf4_dequantize(*packed, layer=n, **named))(layer),  # noqa: B023
        ):
            assert got.dtype == dtype
            np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize(
    "stored, dtype", [("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_weights_are_rounded_to_the_dtype_they_were_stored_in(
    implementation, stored, dtype, random_packed
):
    shape = (32, 192)
    packed = random_packed(shape, nested=True)
    want = nf4_dequantize(*packed, shape=shape, dtype=stored).astype(dtype)
    named = {"shape": shape, "stored_dtype": stored, "implementation": implementation}
    np.testing.assert_array_equal(nf4_dequantize(*packed, dtype=dtype, **named), want)
    # Few rows too, which are not multiplied from the packed bytes then.
    x = jnp.eye(4, 192, dtype=dtype)
    np.testing.assert_array_equal(nf4_matmul(x, *packed, **named), want[:, :4].T)


def test_a_layer_that_does_not_exist_is_the_nearest_that_does(implementation, stack):
    packed = stack((16, 64), nested=False)
    named = {"shape": (16, 64), "dtype": "float32", "implementation": implementation}
    for layer, nearest in ((LAYERS, LAYERS - 1), (-1, 0)):
        pair = (nf4_dequantize(*packed, layer=n, **named) for n in (layer, nearest))
        np.testing.assert_array_equal(*pair)


def test_nan_in_a_scale_is_seen_in_its_block_alone(implementation, random_packed):
    codes, absmax, _ = random_packed((16, 64), nested=False)
    named = {"shape": (16, 64), "dtype": "float32", "implementation": implementation}
    got = nf4_dequantize(codes, absmax.at[3, 0].set(jnp.nan), **named)
    expected = np.zeros((16, 64), bool)
    expected[3] = True
    # 0 * nan is nan too: every weight of the block says that its scale was lost.
    np.testing.assert_array_equal(np.isnan(got), expected)


# --- The product ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 64), (24, 192), (7, 352), (5, 7)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_product_and_gradient_equal_the_dense_ones_exactly(
    shape, lead, nested, random_packed
):
    # Operation by operation the packed product runs the very matrix products of the
    # dense one on the very same weights: no tolerance.
    packed = random_packed(shape, nested=nested)
    dense = nf4_dequantize(*packed, shape=shape, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((*lead, shape[1])), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((*lead, shape[0])), jnp.float32)
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, *packed, shape=shape), x)
    want, dense_pullback = jax.vjp(lambda x: dense_matmul(x, dense), x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(pullback(dy)[0], dense_pullback(dy)[0])


@pytest.mark.parametrize("shape", [(48, 192), (32, 352)])
def test_bf16_product_and_gradient_are_within_their_roundings(shape, random_packed):
    packed = random_packed(shape, nested=False)
    w = nf4_dequantize(*packed, shape=shape, dtype="float32")
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((6, shape[1])), jnp.bfloat16)
    dy = jnp.asarray(rng.standard_normal((6, shape[0])), jnp.bfloat16)

    @jax.jit
    def both(x, dy):
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, *packed, shape=shape), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    # Each weight may be rounded to bf16, by half an ulp.
    assert_within_roundings(y, x, w.T, weight=2.0**-8)
    assert_within_roundings(dx, dy, w, weight=2.0**-8)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("leading", "dtype"),
    [((1,), "bfloat16"), ((2, 5), "bfloat16"), ((16,), "float16"), ((40,), "bfloat16")],
)
def test_product_is_that_of_the_exact_weight(
    implementation, nested, leading, dtype, stack, layer_of
):
    shape = (128, 512)
    packed = stack(shape, nested=nested)
    x = jax.random.normal(jax.random.key(0), (*leading, shape[1])).astype(dtype)
    for layer in (0, 2):
        exact = nf4_dequantize(*layer_of(packed, layer), shape=shape, dtype="float32")
        named = {"shape": shape, "layer": layer, "implementation": implementation}
        got = nf4_matmul(x, *packed, **named)
        assert got.dtype == x.dtype
        # The weights, or the 16 table values they are made of, are rounded to 16 bits.
        half_ulp = float(jnp.finfo(x.dtype).eps) / 2
        assert_within_roundings(got, x, exact.T, weight=half_ulp)


def test_float32_inputs_are_multiplied_with_all_their_bits(
    implementation, stack, layer_of
):
    shape = (64, 256)
    packed = stack(shape, nested=True)
    x = jax.random.normal(jax.random.key(0), (2, 256))
    exact = nf4_dequantize(*layer_of(packed, 1), shape=shape, dtype=jnp.float32)
    want = jnp.matmul(x, exact.T, precision="highest")
    got = nf4_matmul(x, *packed, shape=shape, layer=1, implementation=implementation)
    # 256 terms of about 0.05, in any order.
    np.testing.assert_allclose(got, want, atol=256 * 2.0**-24, rtol=1e-6)


@pytest.mark.parametrize("rows", [4, FUSED_ROWS + 8])
def test_gradient_is_the_product_with_the_dequantized_weight(
    implementation, rows, stack, layer_of
):
    shape = (64, 256)
    packed = stack(shape, nested=True)
    x = jax.random.normal(jax.random.key(0), (rows, 256)).astype(jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(1), (rows, 64)).astype(jnp.bfloat16)

    named = {"shape": shape, "layer": 1, "implementation": implementation}
    got = jax.vjp(lambda x: nf4_matmul(x, *packed, **named), x)[1](dy)[0]
    assert got.dtype == x.dtype
    weight = nf4_dequantize(*layer_of(packed, 1), shape=shape, dtype=jnp.bfloat16)
    assert_within_roundings(got, dy, weight)


def test_a_float32_result_of_bf16_inputs_is_not_rounded_to_bf16(random_packed):
    codes, absmax, _ = random_packed((8, 192), nested=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 192)), jnp.bfloat16)

    def product(x):
        return nf4_matmul(x, codes, absmax, shape=(8, 192), dtype=jnp.float32)

    y = product(x)
    assert y.dtype == jnp.float32
    assert (y != y.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    # The gradient comes back in the dtype of x whatever the dtype of y.
    assert jax.grad(lambda x: product(x).sum())(x).dtype == jnp.bfloat16


def test_the_product_maps_over_inputs_and_over_weights(random_packed):
    shape = (16, 128)
    codes, absmax, _ = random_packed(shape, nested=False, layers=3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 128)), jnp.float32)

    def product(x, codes, absmax):
        return nf4_matmul(x, codes, absmax, shape=shape)

    want = jnp.stack([product(x[i], codes[i], absmax[i]) for i in range(3)])
    # Batched products sum in another order: K = 128 float32 terms of size ~ 0.3.
    np.testing.assert_allclose(jax.vmap(product)(x, codes, absmax), want, atol=1e-5)
    gradient = jax.vmap(jax.grad(lambda *a: product(*a).sum()))(x, codes, absmax)
    pairs = zip(codes, absmax, strict=True)
    weights = [nf4_dequantize(*p, shape=shape, dtype="float32") for p in pairs]
    want = jnp.stack([jnp.broadcast_to(w.sum(0), (5, 128)) for w in weights])
    np.testing.assert_allclose(gradient, want, atol=1e-5)


# --- What is kept for the backward ---


def residuals(function, *args):
    """What reverse mode keeps between forward and backward."""
    return jax.tree.leaves(jax.vjp(function, *args)[1])


@pytest.mark.parametrize("nested", [False, True])
def test_the_residual_is_the_packed_bytes_and_no_float_weight(nested, random_packed):
    shape = (128, 256)
    packed = random_packed(shape, nested=nested)
    x = jnp.ones((1000, shape[1]), jnp.float32)
    kept = residuals(lambda x: nf4_matmul(x, *packed, shape=shape), x)
    assert any(a.dtype == jnp.uint8 and a.size == packed[0].size for a in kept)
    # Neither the weight nor the input, each many times as large.
    packed_bytes = sum(a.nbytes for a in jax.tree.leaves(packed))
    assert sum(a.nbytes for a in kept) <= packed_bytes
    # The check can fail: a product that dequantizes under autodiff keeps the weight.
    named = {"shape": shape, "dtype": "float32"}
    naive = residuals(lambda x: x @ nf4_dequantize(*packed, **named).T, x)
    assert max(a.size for a in naive) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("interpret", marks=pytest.mark.interpret)]
)
def test_a_scan_over_layers_keeps_packed_bytes_only(implementation, stack):
    shape = (64, 64 * 4)
    packed = stack(shape, nested=False)

    named = {"shape": shape, "implementation": implementation}

    def model(x):
        def layer(x, number):
            y = nf4_matmul(x, *packed, layer=number, **named)
            return x + jnp.tile(y, 4), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0].sum()

    x = jnp.ones((2, 256), jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(model, x)[1], x))
    # No array as large as a layer's weight times the layers, dequantized or copied.
    size = LAYERS * shape[0] * shape[1]
    assert max((a.size for a in kept), default=0) <= size // 2
    floats = [a.size for a in kept if jnp.issubdtype(a.dtype, jnp.floating)]
    assert max(floats, default=0) <= size // 64


# --- What is chosen ---


def test_nothing_measured_means_xla():
    assert device.tuned("A device that nobody has measured", "nf4") == {}


@pytest.mark.interpret
def test_measured_settings_are_used(monkeypatch, stack):
    from pallas_kernels.nf4 import gpu

    shape = (64, 256)
    packed = stack(shape, nested=False)
    tuning = {
        "dequantize 64x256 0": {"words": 2, "steps": 4},
        "matmul 64x256 1": {"groups": 1, "parts": 1, "chunk": 1},
        "matmul 64x256 8": {"groups": 1, "parts": 2, "chunk": 2},
        "matmul 64x512 2": {"groups": 9, "parts": 9, "chunk": 9},
    }
    table = {"fused_rows": {"64x256": 8}, "tuning": tuning}
    monkeypatch.setattr(device, "tuned", lambda kind, operation: table)
    used = []
    kernels = {name: getattr(gpu, name) for name in ("dequantize", "matmul")}
    for name, kernel in kernels.items():

        def recorded(*args, kernel=kernel, name=name, **settings):
            kept = ("words", "steps", "split")
            used.append((name, {k: v for k, v in settings.items() if k in kept}))
            return kernel(*args, **settings)

        monkeypatch.setattr(gpu, name, recorded)
    named = {"shape": shape, "layer": 1, "implementation": "interpret"}
    nf4_dequantize(*packed, dtype="bfloat16", **named)
    for rows in (1, 2, 9):
        nf4_matmul(jnp.ones((rows, 256), jnp.bfloat16), *packed, **named)
    assert used == [
        ("dequantize", {"words": 2, "steps": 4}),
        ("matmul", {"split": (1, 1, 1)}),
        ("matmul", {"split": (1, 2, 2)}),
        ("dequantize", {"words": 2, "steps": 4}),
    ]


# --- What is refused ---


def call(shape=(16, 64), *, codes=None, absmax=None, nested=None, **settings):
    size = shape[0] * shape[1]
    codes = np.zeros(-(-size // 2), np.uint8) if codes is None else codes
    absmax = np.ones(-(-size // 64), np.float32) if absmax is None else absmax
    codes, absmax = jnp.asarray(codes), jnp.asarray(absmax)
    settings = {"dtype": "bfloat16", **settings}
    return nf4_dequantize(codes, absmax, nested, shape=shape, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": np.zeros(512, np.int8)}, "uint8"),
        ({"absmax": np.ones(16, np.float16)}, "float16"),
        ({"absmax": np.ones(16, np.uint8)}, "absmax of uint8 and nested=None"),
        ({"absmax": np.ones(15, np.float32)}, "16 block scales, got 512 and 15"),
        ({"codes": np.zeros(511, np.uint8)}, r"shape \(16, 64\) has 512 code bytes"),
        ({"shape": (0, 64)}, "empty"),
        ({"shape": (16, 0)}, "empty"),
        ({"layer": 1}, "times 512 layers"),
        ({"implementation": "triton"}, "does not exist"),
        # As integers, weights would all be -1, 0 or 1, silently.
        ({"dtype": jnp.int8}, r"nf4_dequantize`: dtype .* got int8"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_a_second_level_of_float32_scales_is_refused(random_packed):
    _, _, nested = random_packed((16, 64), nested=True)
    with pytest.raises(ValueError, match="absmax of float32 and nested=given"):
        call(nested=nested)


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (jnp.ones((2, 63)), None, r"takes 64 features, `x` has shape \(2, 63\)"),
        (jnp.ones((2, 64), jnp.int32), None, r"dtype of `x` must .* got int32"),
        (jnp.ones((2, 64)), jnp.int32, r"nf4_matmul`: dtype must .* got int32"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, dtype, message, random_packed):
    codes, absmax, _ = random_packed((8, 64), nested=False)
    with pytest.raises(ValueError, match=message):
        # Without the checks of annotations, as users have it.
        inspect.unwrap(nf4_matmul)(x, codes, absmax, shape=(8, 64), dtype=dtype)


def test_more_weights_than_indices_is_refused():
    shape = (2**16, 2**15)
    codes = jax.ShapeDtypeStruct((shape[0], shape[1] // 2), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((shape[0], shape[1] // 64), jnp.float32)

    def dequantize(codes, absmax):
        return nf4_dequantize(codes, absmax, shape=shape, dtype="bfloat16")

    with pytest.raises(ValueError, match="split it along out_features"):
        jax.eval_shape(dequantize, codes, absmax)


def test_kernels_that_cannot_run_here_say_why():
    if jax.default_backend() == "gpu":
        pytest.skip("they can")
    with pytest.raises(ValueError, match=r"NVIDIA GPU|jax 0\.11"):
        call(implementation="pallas")


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((15, 64), {}, "multiple of 1024"),
        ((16, 128), {"block_size": 128, "absmax": np.ones(16, np.float32)}, "blocks"),
    ],
)
def test_weights_that_the_kernels_cannot_do_are_refused(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        call(shape, implementation="interpret", **settings)
