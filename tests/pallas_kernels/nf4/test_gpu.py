"""The NF4 kernels under any division of their work, in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, nf4_dequantize
from pallas_kernels.nf4.reference import Packed

pytestmark = pytest.mark.interpret


def packed(arrays, layer):
    return Packed(*arrays, jnp.array([layer]))


@pytest.mark.parametrize(
    ("words", "steps"), [(1, 1), (1, 3), (2, 2), (4, 4), (8, 8), (4, 5)]
)
@pytest.mark.parametrize("nested", [False, True])
def test_any_tiles_give_the_same_bits(words, steps, nested, stack, layer_of):
    from pallas_kernels.nf4 import gpu

    shape = (96, 1024)  # 6 groups of block scales, 96 tiles of one word a thread
    arrays = stack(shape, nested=nested, seed=1)
    named = {"shape": shape, "dtype": jnp.bfloat16}
    tiles = {"words": words, "steps": steps, "interpret": device.interpreter()}
    got = gpu.dequantize(packed(arrays, 1), **named, **tiles)
    want = nf4_dequantize(*layer_of(arrays, 1), **named)
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("groups", [1, 2])  # the interpreter takes a CPU for each
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("chunk", [1, 2])
def test_any_split_of_the_sums_gives_the_product(groups, parts, chunk, stack):
    from pallas_kernels.nf4 import gpu

    shape = (64, 1024)
    weight = packed(stack(shape, nested=True, seed=2), 2)
    x = jax.random.normal(jax.random.key(1), (3, 1024)).astype(jnp.bfloat16)
    named = {"shape": shape, "interpret": device.interpreter()}
    got = gpu.matmul(x, weight, split=gpu.Split(groups, parts, chunk), **named)
    undivided = gpu.matmul(x, weight, split=gpu.Split(1, 1, 1), **named)
    # The same terms in another order: 1,024 of about 0.05.
    np.testing.assert_allclose(got, undivided, atol=1024 * 2.0**-24, rtol=1e-6)


@pytest.mark.parametrize("split", [(3, 1, 1), (1, 1, 3), (2, 4, 1)])
def test_a_split_that_does_not_divide_is_refused(split, stack):
    from pallas_kernels.nf4 import gpu

    shape = (64, 512)  # 8 blocks of 64 weights
    x, weight = jnp.ones((8, 512), jnp.bfloat16), packed(stack(shape, nested=False), 0)
    with pytest.raises(ValueError, match="does not divide the 8 blocks"):
        gpu.matmul(x, weight, shape=shape, split=gpu.Split(*split))


def test_the_detector_sees_a_missing_barrier(monkeypatch, stack, detects_race):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.nf4 import gpu

    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    named = {"shape": (64, 256), "split": gpu.Split(2, 1, 1)}
    named["interpret"] = device.interpreter()
    x, weight = jnp.ones((8, 256), jnp.bfloat16), stack((64, 256), nested=False)
    assert detects_race(gpu.matmul, x, packed(weight, 0), **named)


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096)])
def test_every_candidate_divides_its_shape(shape):
    from pallas_kernels.nf4 import gpu

    tiles = gpu.candidates("dequantize", shape)
    assert {"words": 4, "steps": 4} in tiles
    assert all(gpu.dequantize_refusal(4096**2, c["words"]) is None for c in tiles)
    for rows in (1, 16, 64):
        splits = gpu.candidates("matmul", shape, rows)
        assert gpu.split_for(shape, rows)._asdict() in splits
        for split in splits:
            blocks = shape[1] // 64 / split["groups"] / split["parts"]
            assert blocks % 2 == 0 and blocks % split["chunk"] == 0
