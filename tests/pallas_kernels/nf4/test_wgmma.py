"""The product on `wgmma`, in Pallas's interpreter: its copies, barriers and sums.

The interpreter takes the left operand from shared memory and has no `wgmma` that is
still running; what is done about that on the device is checked in tests/compile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, nf4_dequantize, nf4_matmul
from pallas_kernels.nf4.reference import Packed
from pallas_kernels.nf4.shapes import MODELS, ODD, distinct

pytestmark = pytest.mark.skipif(
    not device.jax_has_kernels(), reason="kernels need jax 0.11"
)
interpret = pytest.mark.interpret


def multiply(x, arrays, layer, shape, *, interpreted=True, tiling=None, **named):
    from pallas_kernels.nf4 import wgmma

    named |= {"shape": shape, "interpret": interpreted and device.interpreter()}
    tiling = wgmma.Tiling(*tiling) if tiling else None
    return wgmma.matmul(x, Packed(*arrays, jnp.array([layer])), tiling=tiling, **named)


def assert_is_the_product(got, x, weight):
    """Only the rounding of float32 sums remains.

    Thousands of terms at most, in any order, whose errors do not all point one way.
    """
    assert got.dtype == jnp.float32 and got.shape == (len(x), len(weight))
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    want = jnp.matmul(x, weight.T, precision="highest")
    terms = jnp.matmul(jnp.abs(x), jnp.abs(weight).T, precision="highest")
    assert bool((jnp.abs(got - want) <= 32 * 2.0**-24 * terms).all())


@interpret
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "tiling"),
    [
        ((128, 512), 20, "bfloat16", (8, 1, 3)),  # columns, some of them cut off
        ((64, 768), 16, "bfloat16", (16, 3, 4)),  # one warpgroup; a slot never reused
        ((256, 1024), 24, "float16", (24, 2, 3)),
        ((128, 128), 8, "bfloat16", (8, 1, 6)),  # fewer blocks than slots
    ],
)
def test_product_is_that_of_the_rounded_weight(
    shape, rows, dtype, tiling, nested, stack, layer_of
):
    arrays = stack(shape, nested=nested)
    x = jax.random.normal(jax.random.key(0), (rows, shape[1])).astype(dtype)
    for layer in (0, 2):
        got = multiply(x, arrays, layer, shape, tiling=tiling)
        # The weight exactly as it would be written out: the sums alone may differ.
        weight = nf4_dequantize(*layer_of(arrays, layer), shape=shape, dtype=dtype)
        assert_is_the_product(got, x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 4096), (64, 256)])
@pytest.mark.parametrize("rows", [64, 100, 128, 256, 600])
def test_a_hopper_gpu_computes_the_product(shape, rows, nested, stack, layer_of):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("only Hopper has `wgmma`")
    arrays = stack(shape, nested=nested)
    x = jax.random.normal(jax.random.key(0), (rows, shape[1])).astype(jnp.bfloat16)
    got = multiply(x, arrays, 1, shape, interpreted=False)
    weight = nf4_dequantize(*layer_of(arrays, 1), shape=shape, dtype=jnp.bfloat16)
    assert_is_the_product(got, x, weight)


@interpret
def test_every_weight_meets_its_own_input(stack, layer_of):
    # Rows with a single 1: each result is one weight, and exact.
    shape = (128, 256)
    arrays = stack(shape, nested=True)
    x = jnp.eye(256, dtype=jnp.bfloat16)
    got = multiply(x, arrays, 1, shape, dtype=jnp.bfloat16)
    want = nf4_dequantize(*layer_of(arrays, 1), shape=shape, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(got.view(np.uint16), want.T.view(np.uint16))


@interpret
@pytest.mark.parametrize("first", [3, 4])
def test_measured_rows_alone_are_computed_by_it(first, monkeypatch, stack, layer_of):
    from pallas_kernels.nf4 import wgmma

    shape = (64, 256)
    arrays = stack(shape, nested=True)
    settings = {"columns": 8, "parts": 2, "stages": 3}
    table = {
        "fused_rows": {"64x256": 8},  # which gives way
        "wgmma_rows": {"64x256": [first, 6]},
        "tuning": {"wgmma 64x256 6": settings},
    }
    monkeypatch.setattr(device, "tuned", lambda kind, operation: table)
    used, kernel = [], wgmma.matmul

    def recorded(x, *args, **named):
        used.append((x.shape[0], named["tiling"]._asdict()))
        return kernel(x, *args, **named)

    monkeypatch.setattr(wgmma, "matmul", recorded)
    named = {"shape": shape, "layer": 1, "implementation": "interpret"}
    weight = nf4_dequantize(*layer_of(arrays, 1), shape=shape, dtype=jnp.bfloat16)
    for leading in ((2,), (3, 1), (6,), (7,)):
        x = jax.random.normal(jax.random.key(0), (*leading, 256)).astype(jnp.bfloat16)
        got = nf4_matmul(x, *arrays, dtype="float32", **named)
        assert got.shape == (*leading, 64) and got.dtype == jnp.float32
        want = x.astype(jnp.float32) @ weight.astype(jnp.float32).T
        # 256 terms; where `gpu.matmul` computes it, table values of 8 bits.
        np.testing.assert_allclose(got, want, atol=2.0**-9 * 16, rtol=2.0**-8)
    assert used == [(rows, settings) for rows in (3, 6) if rows >= first]
    # Inputs of 32 bits keep all of them, and plain XLA was asked for by name.
    for dtype, implementation in (("float32", "interpret"), ("bfloat16", "xla")):
        x = jnp.ones((6, 256), dtype)
        nf4_matmul(x, *arrays, **named | {"implementation": implementation})
    assert len(used) == (2 if first == 3 else 1)


@interpret
def test_without_a_measurement_it_is_never_chosen(monkeypatch, stack):
    from pallas_kernels.nf4 import wgmma

    monkeypatch.setattr(device, "tuned", lambda kind, operation: {})
    monkeypatch.delattr(wgmma, "matmul")
    arrays = stack((64, 256), nested=False)
    for rows in (1, 100, 256):
        x = jnp.ones((rows, 256), jnp.bfloat16)
        for name in ("interpret", None):
            nf4_matmul(x, *arrays, shape=(64, 256), layer=1, implementation=name)


def test_a_device_without_wgmma_says_so(simulate_gpu, stack, layer_of):
    simulate_gpu("10.0", {"wgmma_rows": {"64x256": [1, 8]}})
    arrays = layer_of(stack((64, 256), nested=False), 0)
    x = jnp.ones((4, 256), jnp.bfloat16)
    message = r"capability 9 \(Hopper\), and this one has 10"
    with pytest.raises(ValueError, match=message):
        nf4_matmul(x, *arrays, shape=(64, 256), implementation="pallas")


@pytest.mark.parametrize(
    ("shape", "tiling", "message"),
    [
        ((96, 128), None, "out_features in multiples of 64"),
        ((64, 192), None, "in_features of 128"),
        ((64, 64 * 2 * 1009), None, "do not fit in shared memory"),
        ((64, 512), (8, 3, 3), "does not fit the 8 blocks"),
        ((64, 512), (12, 1, 3), "columns in multiples of 8"),
        ((64, 512), (8, 1, 2), "at least 3 stages"),
    ],
)
def test_what_it_cannot_do_is_refused(shape, tiling, message):
    x = jax.ShapeDtypeStruct((8, shape[1]), jnp.bfloat16)
    arrays = (
        jax.ShapeDtypeStruct((1, shape[0], shape[1] // 2), jnp.uint8),
        jax.ShapeDtypeStruct((1, shape[0], shape[1] // 64), jnp.float32),
        None,
    )
    call = functools.partial(multiply, layer=0, shape=shape, tiling=tiling)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, x, arrays)


@pytest.mark.parametrize("rows", [64, 65, 100, 128, 256, 300, 512, 1000, 1024])
def test_each_shape_of_the_models_is_cut_or_refused(rows):
    from pallas_kernels.nf4 import wgmma

    for shape in [*distinct(tuple(MODELS)), *ODD.values()]:
        tiling = wgmma.tiling_for(shape, rows)
        if shape[0] % 64 or shape[1] % 128:
            assert tiling is None and wgmma.refusal(shape)
            assert wgmma.candidates(shape, rows) == []
            continue
        assert tiling is not None and wgmma.refusal(shape) is None, shape
        others = wgmma.candidates(shape, rows)
        for columns, parts, stages in [tiling, *(tuple(c.values()) for c in others)]:
            assert columns % 8 == 0 and columns <= 256 and stages >= 3
            assert (shape[1] // 64) % (2 * parts) == 0
        # No column of tiles more than there must be, hardly any of it empty.
        count = -(-rows // tiling.columns)
        assert count == -(-rows // 256) and count * tiling.columns < rows + 8 * count


@interpret
def test_the_detector_sees_a_slot_that_is_filled_too_early(
    monkeypatch, stack, detects_race
):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def without(which, function):
        """Leaves out one of the barriers, in the order in which they are used."""
        seen = []

        def call(barrier):
            ref = getattr(barrier, "ref", barrier)
            if not any(ref is other for other in seen):
                seen.append(ref)
            if len(seen) <= which or ref is not seen[which]:
                function(barrier)

        return call

    # Waits: all tables are there, data, free slot. Arrivals: tables, free slot.
    monkeypatch.setattr(plgpu, "barrier_wait", without(2, plgpu.barrier_wait))
    monkeypatch.setattr(plgpu, "barrier_arrive", without(1, plgpu.barrier_arrive))
    shape = (128, 1024)
    x, arrays = jnp.ones((8, 1024), jnp.bfloat16), stack(shape, nested=False)
    assert detects_race(multiply, x, arrays, 0, shape, tiling=(8, 1, 3))
