"""`wgmma.matmul` as an H200 would run it: compiled, without a GPU.

What it decodes is checked on the compiled PTX, executed by ptx.py in a kernel that
decodes one tile. `wgmma` and the bulk copies are not executed there: Pallas's
interpreter runs what they mean (tests/pallas_kernels/nf4/test_wgmma.py).
"""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compile import ptx
from tests.compile.requests import LLAMA_8B, each, nf4

pytestmark = pytest.mark.compile

SHAPES = [*LLAMA_8B, (8192, 28672), (3072, 8192)]


def middle(shape, rows, dtype="bfloat16", *, nested=True) -> dict:
    return nf4("wgmma", shape, dtype, nested=nested, layers=32, rows=rows)


DECODED = [
    nf4("decoded", (64, 32), dtype, nested=False, layers=1, transposed=transposed)
    for dtype in ("bfloat16", "float16")
    for transposed in (False, True)
]
MIDDLE = [
    *(middle(shape, rows) for shape in SHAPES for rows in (64, 256)),
    *(middle((14336, 4096), rows) for rows in (100, 128, 512, 1000)),
    middle((14336, 4096), 256, nested=False),
    middle((4096, 4096), 128, "float16"),
]
ALL = [*DECODED, *MIDDLE]


@each(DECODED)
def test_a_decoded_tile_is_the_weight_bit_for_bit(case, kernel):
    from pallas_kernels import mosaic, nf4_dequantize
    from pallas_kernels.nf4 import wgmma

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (64, 32), dtype=np.uint8)
    # From subnormal to overflowing in float16.
    powers = rng.integers(-26, 18, (64, 2))
    scales = (rng.uniform(1, 2, (64, 2)) * np.exp2(powers)).astype(np.float32)
    arrays = jnp.asarray(codes), jnp.asarray(scales[:, 1:])
    want = nf4_dequantize(*arrays, shape=(64, 64), dtype=case["dtype"])
    want = np.asarray(mosaic.operand_order(want)).astype(np.float32)
    got = np.zeros((64, 64), np.float32)
    arrays = [codes, scales, wgmma.pair_table(), got]
    accesses = ptx.run(kernel.program, kernel.launch, arrays)
    transposed = case["options"]["transposed"]
    got = got.T if transposed else got
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    # Two loads of codes and 16 lookups of pairs, which never ask a bank for two words.
    loads = [a for a in accesses if a.array is None and a.width == 8]
    assert len(loads) == 18 and all(a.ways == 1 for a in loads)
    if transposed:  # whole sectors
        stores = [a for a in accesses if a.kind == "st" and a.array]
        assert len(stores) == 32 and all(a.used == 1 for a in stores)


@each(MIDDLE)
def test_it_fits_the_device(case, kernel):
    from pallas_kernels.nf4 import wgmma

    (out, width), rows = case["shape"], case["rows"]
    kernel.assert_fits(threads=256)
    # ptxas says so when it makes the products wait for each other.
    assert "wgmma" not in kernel.report.lower()
    tiling = wgmma.tiling_for((out, width), rows)
    columns = -(-rows // tiling.columns)
    assert math.prod(kernel.launch.grid) == columns * out // 128 * tiling.parts
    # x in its order, the sums of the parts and what is cut off; no slice of the stack.
    padded = columns * tiling.columns
    sums = 4 * tiling.parts * out * padded
    assert kernel.temporaries <= 2 * padded * width + sums


@each(MIDDLE)
def test_the_tensor_cores_and_the_decoding_take_turns(case, kernel):
    text = kernel.ptx
    products = re.findall(
        r"wgmma\.mma_async\.sync\.aligned\.(\S+) \{[^}]*\}, \{([^}]*)\}", text
    )
    kind = {"bfloat16": "bf16", "float16": "f16"}[case["dtype"]]
    count = -(-case["rows"] // 256)
    columns = -(-case["rows"] // (8 * count)) * 8
    assert {shape for shape, _ in products} == {f"m64n{columns}k16.f32.{kind}.{kind}"}
    # Two blocks of four: while one is multiplied, the other is decoded, so their
    # registers must differ, and the product before the last must be over.
    left = [register for _, registers in products for register in registers.split(",")]
    assert len(products) == 8 and len(set(left)) == len(left) == 32
    assert text.count("wgmma.wait_group.sync.aligned 1;") == 2
    start = text.index("wgmma.wait_group.sync.aligned 1;")
    between = text[start : text.index("wgmma.mma_async", start)]
    # 32 weights a thread: 16 lookups, 32 products, 16 conversions, and 4 loads.
    assert between.count("ld.shared") == 16 + 4
    assert between.count("mul.rn.f32") == 32
    assert len(re.findall(r"cvt\.rn\.(?:bf16x2|f16x2)\.f32", between)) == 16
