"""Plain dequantization against numpy, bit for bit, and against what CUDA made."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy reads bfloat16 files through it
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels import NF4_CODE, Nested, dequantize_absmax, nf4_dequantize

# One of each kind: aligned, rows that cross blocks, odd count of weights, odd count of
# blocks' bytes, a single partial block, one weight.
SHAPES = [(8, 64), (3, 128), (5, 192), (4, 96), (7, 352), (3, 65), (5, 7), (1, 1)]
FRAGMENT = "model.layers.0.mlp.gate_proj.weight"


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
def test_dequantize_is_the_table_times_the_scale_bit_for_bit(
    shape, nested, random_packed
):
    arguments = random_packed(shape, nested=nested)

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
    above = np.nextafter(np.float32(1 + 2**-8), 2)
    scales = jnp.asarray(np.float32([1 + 2**-8, above, 1 + 3 / 256]))[:, None]
    codes = jnp.full((3, 32), 0xFF, jnp.uint8)
    got = nf4_dequantize(codes, scales, shape=(3, 64), dtype=jnp.bfloat16)
    want = np.float32([1.0, 1 + 2**-7, 1 + 2**-6])
    np.testing.assert_array_equal(np.asarray(got[:, 0], np.float32), want)


def test_double_quantized_scales_round_product_and_sum_apart(random_packed):
    # A fused multiply-add gives another float32 for about a third of random operands;
    # over 4,096 of them a contraction could not hide.
    _, codes, nested = random_packed((16, 64 * 256), nested=True)
    want = numpy_absmax(codes, nested).reshape(codes.shape)
    got = jax.jit(dequantize_absmax)(codes, nested)
    np.testing.assert_array_equal(np.asarray(got), want)
    scale, offset, table = (np.asarray(part, np.float64) for part in nested)
    fused = (table[codes] * scale[:, None] + offset).astype(np.float32)
    assert (fused != want).sum() > 100  # so the comparison above can tell


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 700])
def test_second_level_groups_may_be_partial(blocks, random_packed):
    _, codes, nested = random_packed((blocks, 64), nested=True, seed=blocks)
    got = dequantize_absmax(codes.reshape(-1), nested)
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
