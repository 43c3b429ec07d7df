# Quantization against the installed bitsandbytes, on tensors made on the spot.

import itertools

import ml_dtypes
import numpy as np
import pytest

from convert import bnb
from qlora_jax import nf4
from qlora_jax.nf4 import DYNAMIC_MAP, NF4_CODE, is_aligned, quantize

pytestmark = pytest.mark.peer

# Whole blocks in a row, blocks over several rows, a partial last block, an odd number
# of weights, fewer weights than a block, one weight.
SHAPES = (
    *((64, 64), (7, 192), (300, 128), (1, 64)),
    *((48, 96), (16, 352), (10, 100), (64, 1)),
    *((7, 9), (5, 13), (129, 127), (3, 1001), (1, 63), (1, 1)),
)
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


@pytest.fixture
def to_torch(torch):
    """A function: numpy array -> torch tensor of the same bytes (bfloat16 too)."""

    def convert(array):
        if array.dtype == ml_dtypes.bfloat16:
            bits = torch.from_numpy(array.view(np.int16).copy())
            return bits.view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    return convert


def weights(shape, dtype, seed, kind):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32)
    if kind == "small":
        x *= 0.02
    elif kind == "wide":
        # Many magnitudes, zeros, and blocks of zeros.
        x *= np.exp(rng.uniform(-8, 4, shape)).astype(np.float32)
        x[rng.random(shape) < 0.2] = 0
        x.reshape(-1)[:128] = 0
    elif kind == "levels":
        # Ties: the midpoints themselves, in blocks whose largest weight is 1.
        middles = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
        x = rng.choice(middles, shape).astype(np.float32)
        x.reshape(-1)[::64] = 1
    return x.astype(dtype)


@pytest.fixture
def theirs(bitsandbytes, to_torch):
    """A function: (weight, double_quant) -> their codes and state."""

    def quantize(weight, double_quant):
        fields = dict(blocksize=64, quant_type="nf4", compress_statistics=double_quant)
        return bitsandbytes.functional.quantize_4bit(to_torch(weight), **fields)

    return quantize


@pytest.mark.parametrize("kind", ["normal", "small", "wide", "levels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_codes_and_scales_are_equal(theirs, dtype, kind):
    for seed, shape in enumerate(SHAPES):
        weight = weights(shape, dtype, seed, kind)
        ours = quantize(weight, double_quant=False)
        codes, state = theirs(weight, False)
        for got, want in ((ours.codes, codes), (ours.absmax, state.absmax)):
            # Bytes: -0 is not 0.
            got, want = (a.reshape(-1).view(np.uint8) for a in (got, want.numpy()))
            np.testing.assert_array_equal(got, want, f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("double_quant", [False, True])
def test_their_codes_dequantize_to_their_weights(
    torch, bitsandbytes, to_torch, theirs, dtype, double_quant
):
    # Not shapes in which their AVX-512 code takes a wrong scale: rows that are a
    # multiple of 16 and not of 64.
    shapes = [s for s in SHAPES if s[1] % 16 or is_aligned(s)]
    assert len(shapes) > 8
    for seed, shape in enumerate(shapes):
        weight = weights(shape, dtype, seed, "normal")
        ours = quantize(weight, double_quant=double_quant)
        codes, state = theirs(weight, double_quant)
        # Their bytes in our container: what a file of theirs becomes.
        parts = {"codes": codes, "absmax": state.absmax}
        if double_quant:
            parts["nested_absmax"] = state.state2.absmax
            parts["nested_offset"] = state.offset
            parts["nested_quant_map"] = state.state2.code
        for name, value in parts.items():
            target = getattr(ours, name)
            target = np.array(value.numpy()).reshape(target.shape)
            object.__setattr__(ours, name, target)
        expected = bitsandbytes.functional.dequantize_4bit(codes, state)
        got = to_torch(np.array(bnb.dequantize(ours)))
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), shape
        # What `matmul_4bit` multiplies with in another dtype.
        got = to_torch(np.array(nf4.dequantize(ours, np.float32)))
        assert torch.equal(got, expected.float()), shape


def test_the_tables_are_equal(theirs):
    _, state = theirs(np.ones((8, 64), np.float32), True)
    np.testing.assert_array_equal(state.code.numpy(), NF4_CODE)
    np.testing.assert_array_equal(state.state2.code.numpy(), DYNAMIC_MAP)
    assert (state.blocksize, state.state2.blocksize) == (64, 256)


def test_scales_of_scales_differ_by_their_lookup_alone(theirs):
    # The largest weight of each block lies on a grid, so that every order of summation
    # gives the same mean, exactly: both have the same offset. What is left is that
    # bitsandbytes on a CPU finds a scale's code through 2^16 bins, not the nearest one.
    total = different = 0
    for seed, blocks in itertools.product(range(4), (64, 256, 1024, 4096)):
        rng = np.random.default_rng(seed)
        largest = rng.integers(1, 1 << 10, blocks).astype(np.float32) / (1 << 10)
        weight = rng.uniform(-1, 1, (blocks, 64)).astype(np.float32)
        weight[:, 5] = 1
        weight *= largest[:, None]
        ours = quantize(weight, double_quant=True)
        codes, state = theirs(weight, True)
        np.testing.assert_array_equal(ours.codes.reshape(-1), codes.numpy().reshape(-1))
        assert ours.nested_offset == state.offset.numpy()
        np.testing.assert_array_equal(ours.nested_absmax, state.state2.absmax.numpy())
        a, b = ours.absmax.reshape(-1), state.absmax.numpy()
        total += a.size
        different += int((a != b).sum())
        assert np.abs(a.astype(int) - b).max() <= 4
        # Ours are never the worse ones, and theirs by no more than one bin of [-1, 1].
        scale = np.repeat(ours.nested_absmax, 256)[: a.size]
        exact = (largest - ours.nested_offset) / scale
        error_a, error_b = (np.abs(DYNAMIC_MAP[c] - exact) for c in (a, b))
        assert (error_a <= error_b + 1e-7).all()  # float32 of values up to 1
        assert (error_b <= error_a + 2 / (1 << 16) + 1e-7).all()
    assert total > 20000
    assert 0 < different <= 0.01 * total
