"""The product on `wgmma`, by Pallas's interpreter: its copies, barriers and sums.

The interpreter takes the left operand from shared memory and knows no `wgmma` that is
still running; what is done about that on the device is checked in tests/compile.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Nested, nf4_dequantize, nf4_matmul
from pallas_kernels import device as devices
from pallas_kernels.device import jax_has_kernels
from pallas_kernels.nf4.shapes import MODELS, ODD, distinct

pytestmark = pytest.mark.skipif(not jax_has_kernels(), reason="kernels need jax 0.11")
interpret = pytest.mark.interpret
LAYERS = 3


def stacks(shape, *, nested, seed=0):
    """Random packed weights of three layers."""
    rng = np.random.default_rng(seed)
    out, size = shape
    groups = -(-out * size // 64 // 256)
    where = (LAYERS, out, size // 64)
    codes = rng.integers(0, 256, (LAYERS, out, size // 2), dtype=np.uint8)
    if not nested:
        absmax = rng.uniform(0.01, 0.1, where).astype(np.float32)
        return jnp.asarray(codes), jnp.asarray(absmax), None
    second = Nested(
        jnp.asarray(rng.uniform(0.001, 0.02, (LAYERS, groups)), "f4"),
        jnp.asarray(rng.uniform(0.04, 0.06, LAYERS), "f4"),
        jnp.asarray(np.sort(rng.uniform(-1, 1, (LAYERS, 256)), axis=1), "f4"),
    )
    absmax = rng.integers(0, 256, where, dtype=np.uint8)
    return jnp.asarray(codes), jnp.asarray(absmax), second


def one(packed, layer):
    return jax.tree.map(lambda leaf: leaf[layer], packed)


def races():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # The detector of the last kernel interpreted; None before any.
    seen = gpu_callbacks._races
    return seen is not None and seen.races_found


def middle(x, packed, layer, shape, *, interpreted=True, **settings):
    from pallas_kernels.nf4 import gpu, wgmma

    if "tiling" in settings:
        settings["tiling"] = wgmma.Tiling(*settings["tiling"])
    return wgmma.matmul(
        x,
        gpu.Packed(*packed, jnp.array([layer])),
        shape=shape,
        interpret=interpreted and devices.interpreter(),
        **settings,
    )


def assert_is_the_product(got, x, weight):
    """That only the rounding of float32 sums remains.

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
def test_product_is_that_of_the_rounded_weight(shape, rows, dtype, tiling, nested):
    packed = stacks(shape, nested=nested)
    x = jax.random.normal(jax.random.key(0), (rows, shape[1])).astype(dtype)
    for layer in (0, 2):
        got = middle(x, packed, layer, shape, tiling=tiling)
        assert not races()
        # The weight exactly as it would be written out: the sums alone may differ.
        weight = nf4_dequantize(*one(packed, layer), shape=shape, dtype=dtype)
        assert_is_the_product(got, x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 4096), (64, 256)])
@pytest.mark.parametrize("rows", [64, 100, 128, 256, 600])
def test_a_hopper_gpu_computes_the_product(shape, rows, nested):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("`wgmma` is Hopper's alone")
    packed = stacks(shape, nested=nested)
    x = jax.random.normal(jax.random.key(0), (rows, shape[1])).astype(jnp.bfloat16)
    got = middle(x, packed, 1, shape, interpreted=False)
    weight = nf4_dequantize(*one(packed, 1), shape=shape, dtype=jnp.bfloat16)
    assert_is_the_product(got, x, weight)


@interpret
def test_every_weight_meets_its_own_input():
    # Rows with a single 1: each result is one weight, and exact.
    shape = (128, 256)
    packed = stacks(shape, nested=True)
    x = jnp.eye(256, dtype=jnp.bfloat16)
    got = middle(x, packed, 1, shape, dtype=jnp.bfloat16)
    want = nf4_dequantize(*one(packed, 1), shape=shape, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(got.view(np.uint16), want.T.view(np.uint16))


@interpret
@pytest.mark.parametrize("first", [3, 4])
def test_measured_rows_alone_are_computed_by_it(first, monkeypatch):
    from pallas_kernels.nf4 import wgmma

    shape = (64, 256)
    packed = stacks(shape, nested=True)
    settings = {"columns": 8, "parts": 2, "stages": 3}
    table = {
        "fused_rows": {"64x256": 8},  # which gives way
        "wgmma_rows": {"64x256": [first, 6]},
        "tuning": {"wgmma 64x256 6": settings},
    }
    monkeypatch.setattr(devices, "tuned", lambda kind, operation: table)
    asked = {"shape": shape, "layer": 1, "implementation": "interpret"}
    used, whole = [], wgmma.matmul

    def watched(x, *args, **named):
        used.append((x.shape[0], named["tiling"]._asdict()))
        return whole(x, *args, **named)

    monkeypatch.setattr(wgmma, "matmul", watched)
    weight = nf4_dequantize(*one(packed, 1), shape=shape, dtype=jnp.bfloat16)
    for leading in ((2,), (3, 1), (6,), (7,)):
        x = jax.random.normal(jax.random.key(0), (*leading, 256)).astype(jnp.bfloat16)
        got = nf4_matmul(
            x,
            *packed,
            shape=shape,
            layer=1,
            dtype="float32",
            implementation="interpret",
        )
        assert got.shape == (*leading, 64) and got.dtype == jnp.float32
        want = x.astype(jnp.float32) @ weight.astype(jnp.float32).T
        # 256 terms; where `product` computes it, table values of 8 bits.
        np.testing.assert_allclose(got, want, atol=2.0**-9 * 16, rtol=2.0**-8)
    assert used == [(rows, settings) for rows in (3, 6) if rows >= first]
    # Inputs of 32 bits keep all of them, and plain XLA was asked for by name.
    for dtype, implementation in (("float32", "interpret"), ("bfloat16", "xla")):
        x = jnp.ones((6, 256), dtype)
        nf4_matmul(x, *packed, **asked | {"implementation": implementation})
    assert len(used) == (2 if first == 3 else 1)


@interpret
def test_without_a_measurement_it_is_never_chosen(monkeypatch):
    from pallas_kernels.nf4 import wgmma

    monkeypatch.setattr(devices, "tuned", lambda kind, operation: {})
    monkeypatch.delattr(wgmma, "matmul")
    shape = (64, 256)
    packed = stacks(shape, nested=False)
    for rows in (1, 100, 256):
        x = jnp.ones((rows, 256), jnp.bfloat16)
        for implementation in ("interpret", None):
            nf4_matmul(x, *packed, shape=shape, layer=1, implementation=implementation)


def test_a_device_without_wgmma_says_so(monkeypatch):
    from pallas_kernels.nf4 import api

    monkeypatch.setattr(api, "_kernel_refusal", lambda meta: None)
    monkeypatch.setattr(devices, "capability", lambda: "10.0")
    table = {"wgmma_rows": {"64x256": [1, 8]}}
    monkeypatch.setattr(devices, "tuned", lambda kind, operation: table)
    packed = one(stacks((64, 256), nested=False), 0)
    x = jnp.ones((4, 256), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"capability 9 \(Hopper\), and this one has 10"
    ):
        nf4_matmul(x, *packed, shape=(64, 256), implementation="pallas")


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
    settings = {} if tiling is None else {"tiling": tiling}
    x = jax.ShapeDtypeStruct((8, shape[1]), jnp.bfloat16)
    packed = (
        jax.ShapeDtypeStruct((1, shape[0], shape[1] // 2), jnp.uint8),
        jax.ShapeDtypeStruct((1, shape[0], shape[1] // 64), jnp.float32),
        None,
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, *p: middle(x, p, 0, shape, **settings), x, *packed)


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
def test_the_detector_sees_a_slot_that_is_filled_too_early(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def but_for(which, function):
        """Leaves out one of the barriers, in the order in which they are used."""
        seen = []

        def call(barrier):
            ref = getattr(barrier, "ref", barrier)
            if not any(ref is other for other in seen):
                seen.append(ref)
            if len(seen) <= which or ref is not seen[which]:
                function(barrier)

        return call

    # What is found here must not be what the next test finds.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    monkeypatch.setattr(gpu_callbacks, "_races", None)
    # Waits: all tables are there, data, free slot. Arrivals: tables, free slot.
    monkeypatch.setattr(plgpu, "barrier_wait", but_for(2, plgpu.barrier_wait))
    monkeypatch.setattr(plgpu, "barrier_arrive", but_for(1, plgpu.barrier_arrive))
    shape = (128, 1024)
    x = jnp.ones((8, 1024), jnp.bfloat16)
    try:
        packed = stacks(shape, nested=False)
        middle(x, packed, 0, shape, tiling=(8, 1, 3)).block_until_ready()
        found = races()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops at the first
        found = "RACE DETECTED" in str(error)
    assert found
