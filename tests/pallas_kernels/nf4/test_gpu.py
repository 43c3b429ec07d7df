"""One body of tests for every implementation of the NF4 operations.

"interpret" runs the GPU kernels' own programs, block by block and with a detector of
races, wherever jax can (0.11 and newer). What their inline instructions do on the
device is checked on compiled code, in tests/compile.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Nested, nf4_dequantize, nf4_matmul
from pallas_kernels import device as devices
from pallas_kernels.device import jax_has_kernels
from pallas_kernels.nf4.api import FUSED_ROWS

NEW_JAX = jax_has_kernels()

OLD = "the kernels need jax 0.11, which Python 3.11 cannot have"


def kernels(test):
    """Marks what runs the kernels in the interpreter."""
    return pytest.mark.interpret(pytest.mark.skipif(not NEW_JAX, reason=OLD)(test))


INTERPRETED = [pytest.mark.interpret, pytest.mark.skipif(not NEW_JAX, reason=OLD)]
IMPLEMENTATIONS = [
    "xla",
    pytest.param("interpret", marks=INTERPRETED),
    pytest.param("pallas", marks=pytest.mark.gpu),
]
LAYERS = 3


def stacks(shape, *, nested, seed=0):
    """Random packed weights of three layers; every code occurs."""
    rng = np.random.default_rng(seed)
    out, size = shape
    blocks = out * size // 64
    codes = rng.integers(0, 256, (LAYERS, out, size // 2), dtype=np.uint8)
    where = (LAYERS, out, size // 64)
    absmax = rng.uniform(0.01, 0.1, where).astype(np.float32)
    second = None
    if nested:
        absmax = rng.integers(0, 256, where, dtype=np.uint8)
        second = Nested(
            jnp.asarray(rng.uniform(0.001, 0.02, (LAYERS, -(-blocks // 256))), "f4"),
            jnp.asarray(rng.uniform(0.04, 0.06, LAYERS), "f4"),
            jnp.asarray(np.sort(rng.uniform(-1, 1, (LAYERS, 256)), axis=1), "f4"),
        )
    return jnp.asarray(codes), jnp.asarray(absmax), second


def one(packed, layer):
    return jax.tree.map(lambda leaf: leaf[layer], packed)


@pytest.fixture
def no_races():
    """Fails where the interpreter saw two threads meet without a barrier between."""
    yield
    if NEW_JAX:
        assert not races()


def races():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # The detector of the last kernel interpreted; None before any.
    seen = gpu_callbacks._races
    return seen is not None and seen.races_found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dequantize_gives_the_same_bits(implementation, nested, dtype, no_races):
    shape = (32, 192)
    packed = stacks(shape, nested=nested)
    for layer in (0, LAYERS - 1):
        alone = one(packed, layer)
        want = nf4_dequantize(*alone, shape=shape, dtype=dtype, implementation="xla")
        asked = {"shape": shape, "dtype": dtype, "implementation": implementation}
        for got in (
            nf4_dequantize(*alone, **asked),
            nf4_dequantize(*packed, layer=layer, **asked),
            jax.jit(lambda n: nf4_dequantize(*packed, layer=n, **asked))(layer),  # noqa: B023
        ):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@kernels
@pytest.mark.parametrize(
    ("words", "steps"), [(1, 1), (1, 3), (2, 2), (4, 4), (8, 8), (4, 5)]
)
@pytest.mark.parametrize("nested", [False, True])
def test_any_share_of_the_work_gives_the_same_bits(words, steps, nested, no_races):
    from pallas_kernels.nf4 import gpu

    shape = (96, 1024)  # 6 groups of block scales, 96 tiles of one word a thread
    packed = stacks(shape, nested=nested, seed=1)
    codes, absmax, second = packed
    got = gpu.dequantize(
        gpu.Packed(codes, absmax, second, jnp.array([1])),
        shape=shape,
        dtype=jnp.bfloat16,
        words=words,
        steps=steps,
        interpret=devices.interpreter(),
    )
    want = nf4_dequantize(*one(packed, 1), shape=shape, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def bound(x, weight, y):
    """What the roundings of a product in 16 bits amount to at most.

    The weights (or the 16 table values they are made of) are rounded to the dtype of x,
    half a unit in the last place each, and the result once more; the float32 sums add
    2^-24 for each of their terms.
    """
    half = float(jnp.finfo(x.dtype).eps) / 2
    x, weight = jnp.abs(x.astype(jnp.float32)), jnp.abs(weight)
    total = jnp.matmul(x, weight.T, precision="highest")
    return (half * 1.01 + x.shape[-1] * 2.0**-24) * total + half * 1.01 * jnp.abs(y)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("leading", "dtype"),
    [((1,), "bfloat16"), ((2, 5), "bfloat16"), ((16,), "float16"), ((40,), "bfloat16")],
)
def test_product_is_that_of_the_exact_weight(
    implementation, nested, leading, dtype, no_races
):
    shape = (128, 512)
    packed = stacks(shape, nested=nested)
    x = jax.random.normal(jax.random.key(0), (*leading, shape[1])).astype(dtype)
    for layer in (0, 2):
        exact = nf4_dequantize(*one(packed, layer), shape=shape, dtype=jnp.float32)
        want = jnp.matmul(x.astype(jnp.float32), exact.T, precision="highest")
        got = nf4_matmul(
            x, *packed, shape=shape, layer=layer, implementation=implementation
        )
        assert got.dtype == x.dtype and got.shape == (*leading, shape[0])
        flat = x.reshape(-1, shape[1])
        allowed = bound(flat, exact, want.reshape(-1, shape[0])).reshape(want.shape)
        assert bool((jnp.abs(got.astype(jnp.float32) - want) <= allowed).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_inputs_are_multiplied_with_all_their_bits(implementation):
    shape = (64, 256)
    packed = stacks(shape, nested=True)
    x = jax.random.normal(jax.random.key(0), (2, 256))
    exact = nf4_dequantize(*one(packed, 1), shape=shape, dtype=jnp.float32)
    want = jnp.matmul(x, exact.T, precision="highest")
    got = nf4_matmul(x, *packed, shape=shape, layer=1, implementation=implementation)
    # 256 terms of about 0.05, in any order.
    np.testing.assert_allclose(got, want, atol=256 * 2.0**-24, rtol=1e-6)


@kernels
@pytest.mark.parametrize("groups", [1, 2])  # the interpreter takes a CPU for each
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("chunk", [1, 2])
def test_any_split_of_the_sums_gives_the_product(groups, parts, chunk, no_races):
    from pallas_kernels.nf4 import gpu

    shape = (64, 1024)
    packed = stacks(shape, nested=True, seed=2)
    x = jax.random.normal(jax.random.key(1), (3, 1024)).astype(jnp.bfloat16)
    got = gpu.matmul(
        x,
        gpu.Packed(*packed, jnp.array([2])),
        shape=shape,
        split=gpu.Split(groups, parts, chunk),
        interpret=devices.interpreter(),
    )
    whole = gpu.matmul(
        x,
        gpu.Packed(*packed, jnp.array([2])),
        shape=shape,
        split=gpu.Split(1, 1, 1),
        interpret=devices.interpreter(),
    )
    # The same terms in another order: 1,024 of about 0.05.
    np.testing.assert_allclose(got, whole, atol=1024 * 2.0**-24, rtol=1e-6)


@kernels
@pytest.mark.parametrize("split", [(3, 1, 1), (1, 1, 3), (2, 4, 1)])
def test_a_split_that_does_not_divide_is_refused(split):
    from pallas_kernels.nf4 import gpu

    shape = (64, 512)  # 8 blocks of 64 weights
    with pytest.raises(ValueError, match="does not divide the 8 blocks"):
        gpu.matmul(
            jnp.ones((8, 512), jnp.bfloat16),
            gpu.Packed(*stacks(shape, nested=False), jnp.array([0])),
            shape=shape,
            split=gpu.Split(*split),
            interpret=devices.interpreter(),
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_that_does_not_exist_is_the_nearest_that_does(implementation):
    shape = (16, 64)
    packed = stacks(shape, nested=False)
    asked = {"shape": shape, "dtype": "float32", "implementation": implementation}
    for layer, nearest in ((LAYERS, LAYERS - 1), (-1, 0)):
        np.testing.assert_array_equal(
            nf4_dequantize(*packed, layer=layer, **asked),
            nf4_dequantize(*packed, layer=nearest, **asked),
        )


@kernels
def test_the_detector_sees_a_missing_barrier(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.nf4 import gpu

    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    shape = (64, 256)
    try:
        gpu.matmul(
            jnp.ones((8, 256), jnp.bfloat16),
            gpu.Packed(*stacks(shape, nested=False), jnp.array([0])),
            shape=shape,
            split=gpu.Split(2, 1, 1),
            interpret=devices.interpreter(),
        ).block_until_ready()
        found = races()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops at the first
        found = "RACE DETECTED" in str(error)
    assert found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [4, FUSED_ROWS + 8])
def test_gradient_is_the_product_with_the_dequantized_weight(implementation, rows):
    shape = (64, 256)
    packed = stacks(shape, nested=True)
    x = jax.random.normal(jax.random.key(0), (rows, 256)).astype(jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(1), (rows, 64)).astype(jnp.bfloat16)

    def f(x):
        return nf4_matmul(
            x, *packed, shape=shape, layer=1, implementation=implementation
        )

    _, pull = jax.vjp(f, x)
    weight = nf4_dequantize(*one(packed, 1), shape=shape, dtype=jnp.bfloat16)
    want = jnp.matmul(
        dy.astype(jnp.float32), weight.astype(jnp.float32), precision="highest"
    )
    got = pull(dy)[0]
    assert got.dtype == x.dtype
    # One rounding to bfloat16, and float32 sums of 64 terms in any order.
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, rtol=2.0**-8, atol=64 * 2.0**-22
    )


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("interpret", marks=INTERPRETED)]
)
def test_a_scan_over_layers_keeps_packed_bytes_only(implementation):
    shape = (64, 64 * 4)
    packed = stacks(shape, nested=False)

    def model(x):
        def layer(x, number):
            y = nf4_matmul(
                x, *packed, shape=shape, layer=number, implementation=implementation
            )
            return x + jnp.tile(y, 4), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0].sum()

    x = jnp.ones((2, 256), jnp.bfloat16)
    held = jax.eval_shape(lambda x: jax.vjp(model, x)[1], x)  # for the backward
    sizes = [leaf.size for leaf in jax.tree.leaves(held)]
    # No array as large as a layer's weight times the layers, dequantized or copied.
    assert max(sizes, default=0) <= LAYERS * shape[0] * shape[1] // 2
    floats = [
        leaf.size
        for leaf in jax.tree.leaves(held)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert max(floats, default=0) <= LAYERS * shape[0] * shape[1] // 64


def test_nothing_measured_means_xla():
    assert devices.tuned("A device that nobody has measured", "nf4") == {}


@kernels
def test_measured_settings_are_used(monkeypatch):
    from pallas_kernels.nf4 import gpu

    shape = (64, 256)
    packed = stacks(shape, nested=False)
    table = {
        "fused_rows": {"64x256": 8},
        "tuning": {
            "dequantize 64x256 0": {"words": 2, "steps": 4},
            "matmul 64x256 1": {"groups": 1, "parts": 1, "chunk": 1},
            "matmul 64x256 8": {"groups": 1, "parts": 2, "chunk": 2},
            "matmul 64x512 2": {"groups": 9, "parts": 9, "chunk": 9},
        },
    }
    monkeypatch.setattr(devices, "tuned", lambda kind, operation: table)
    used = []
    for name in ("dequantize", "matmul"):
        whole = getattr(gpu, name)

        def watched(*args, whole=whole, name=name, **settings):
            kept = ("words", "steps", "split")
            used.append((name, {k: v for k, v in settings.items() if k in kept}))
            return whole(*args, **settings)

        monkeypatch.setattr(gpu, name, watched)
    asked = {"shape": shape, "layer": 1, "implementation": "interpret"}
    nf4_dequantize(*packed, dtype="bfloat16", **asked)
    for rows in (1, 2, 9):
        nf4_matmul(jnp.ones((rows, 256), jnp.bfloat16), *packed, **asked)
    assert used == [
        ("dequantize", {"words": 2, "steps": 4}),
        ("matmul", {"split": (1, 1, 1)}),
        ("matmul", {"split": (1, 2, 2)}),
        ("dequantize", {"words": 2, "steps": 4}),
    ]


@kernels
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096)])
def test_every_candidate_divides_its_shape(shape):
    from pallas_kernels.nf4 import gpu

    found = gpu.candidates("dequantize", shape)
    assert {"words": 4, "steps": 4} in found
    assert all(gpu.dequantize_refusal(4096**2, c["words"]) is None for c in found)
    for rows in (1, 16, 64):
        found = gpu.candidates("matmul", shape, rows)
        blocks = shape[1] // 64
        assert gpu.split_for(shape, rows)._asdict() in found
        for one in found:
            share = blocks / one["groups"] / one["parts"]
            assert share % 2 == 0 and share % one["chunk"] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_a_scale_is_seen_in_its_block_alone(implementation):
    shape = (16, 64)
    codes, absmax, _ = one(stacks(shape, nested=False), 0)
    absmax = absmax.at[3, 0].set(jnp.nan)
    got = nf4_dequantize(
        codes, absmax, shape=shape, dtype="float32", implementation=implementation
    )
    expected = np.zeros(shape, bool)
    expected[3] = True
    # 0 * nan is nan too: every weight of the block says that its scale was lost.
    np.testing.assert_array_equal(np.isnan(got), expected)


def call(shape=(16, 64), *, codes=None, absmax=None, nested=None, **settings):
    size = shape[0] * shape[1]
    codes = np.zeros(-(-size // 2), np.uint8) if codes is None else codes
    absmax = np.ones(-(-size // 64), np.float32) if absmax is None else absmax
    codes, absmax = jnp.asarray(codes), jnp.asarray(absmax)
    return nf4_dequantize(
        codes, absmax, nested, shape=shape, dtype="bfloat16", **settings
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": np.zeros(512, np.int8)}, "uint8"),
        ({"absmax": np.ones(16, np.float16)}, "float16"),
        ({"absmax": np.ones(16, np.uint8)}, "nested"),
        ({"absmax": np.ones(15, np.float32)}, "16 block scales"),
        ({"codes": np.zeros(511, np.uint8)}, "512 code bytes"),
        ({"shape": (0, 64)}, "empty"),
        ({"shape": (16, 0)}, "empty"),
        ({"layer": 1}, "times 512 layers"),
        ({"implementation": "triton"}, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_more_weights_than_indices_is_refused():
    shape = (2**16, 2**15)
    codes = jax.ShapeDtypeStruct((shape[0], shape[1] // 2), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((shape[0], shape[1] // 64), jnp.float32)
    with pytest.raises(ValueError, match="split it along out_features"):
        jax.eval_shape(
            lambda c, a: nf4_dequantize(c, a, shape=shape, dtype="bfloat16"),
            codes,
            absmax,
        )


def test_kernels_that_cannot_run_here_say_why():
    if jax.default_backend() == "gpu":
        pytest.skip("they can")
    with pytest.raises(ValueError, match=r"NVIDIA GPU|jax 0\.11"):
        call(implementation="pallas")


@kernels
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
