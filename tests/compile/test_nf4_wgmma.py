"""`wgmma.matmul` as an H200 would run it: compiled, without a GPU.

What it decodes is checked on the compiled PTX, executed by ptx.py in a kernel that
decodes one tile. `wgmma` and the bulk copies are not executed there: Pallas's
interpreter runs them (tests/pallas_kernels/nf4/test_wgmma.py), as what they mean.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.compile

HERE = Path(__file__).parent
LLAMA_8B = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
SHAPES = [*LLAMA_8B, (8192, 28672), (3072, 8192)]
TILE = {"kernel": "decoded", "shape": (64, 32), "layers": 1, "nested": False}


def middle(shape, rows, dtype="bfloat16", *, nested=True) -> dict:
    wanted = {"kernel": "middle_product", "shape": shape, "rows": rows, "layers": 32}
    return wanted | {"dtype": dtype, "nested": nested, "options": {}}


def tile(dtype, *, transposed) -> dict:
    return TILE | {"dtype": dtype, "options": {"transposed": transposed}}


DECODED = [
    tile(dtype, transposed=transposed)
    for dtype in ("bfloat16", "float16")
    for transposed in (False, True)
]
MIDDLE = [
    *(middle(shape, rows) for shape in SHAPES for rows in (64, 256)),
    *(middle((14336, 4096), rows) for rows in (100, 128, 512, 1000)),
    middle((14336, 4096), 256, nested=False),
    middle((4096, 4096), 128, "float16"),
]
REQUESTS = [*DECODED, *MIDDLE]


def name(wanted: dict) -> str:
    words = [wanted["kernel"], "x".join(map(str, wanted["shape"]))]
    words += [f"{wanted['rows']}rows"] if "rows" in wanted else []
    words += [f"{k}{v}" for k, v in wanted["options"].items()]
    return "-".join([*words, wanted["dtype"], "nested" if wanted["nested"] else "flat"])


def _ptx() -> Any:
    # The tests are not a package.
    if "ptx" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ptx", HERE / "ptx.py")
        sys.modules["ptx"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ptx"])
    return sys.modules["ptx"]


ptx = _ptx()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Any:
    """The folder of each request's kernel, all compiled by one process."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.fail("the GPU compiler is not installed: `make compile`", pytrace=False)
    out = tmp_path_factory.mktemp("wgmma")
    child = subprocess.run(
        [sys.executable, HERE / "kernel_for_gpu.py", json.dumps(REQUESTS), out],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if child.returncode != 0:
        pytest.fail(f"compilation failed:\n{child.stderr[-4000:]}", pytrace=False)
    return lambda wanted: out / str(REQUESTS.index(wanted))


@pytest.mark.parametrize("wanted", DECODED, ids=name)
def test_a_decoded_tile_is_the_weight_bit_for_bit(wanted, compiled):
    from pallas_kernels import mosaic, nf4_dequantize
    from pallas_kernels.nf4 import wgmma

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (64, 32), dtype=np.uint8)
    # From subnormal to overflowing in float16.
    powers = rng.integers(-26, 18, (64, 2))
    scales = (rng.uniform(1, 2, (64, 2)) * np.exp2(powers)).astype(np.float32)
    dtype = wanted["dtype"]
    want = nf4_dequantize(
        jnp.asarray(codes), jnp.asarray(scales[:, 1:]), shape=(64, 64), dtype=dtype
    )
    want = np.asarray(mosaic.operand_order(want)).astype(np.float32)
    folder, got = compiled(wanted), np.zeros((64, 64), np.float32)
    program = ptx.parse((folder / "kernel.ptx").read_text())
    launch = ptx.read_launch((folder / "kernel.ll").read_text())
    trace = ptx.run(program, launch, [codes, scales, wgmma.pair_table(), got])
    if wanted["options"]["transposed"]:
        got = got.T
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    # Two loads of codes and 16 lookups of pairs, which never ask a bank for two words.
    loads = [a for a in trace.accesses.values() if a.array is None and a.width == 8]
    assert len(loads) == 18 and all(a.ways == 1 for a in loads)
    if wanted["options"]["transposed"]:
        stores = [a for a in trace.accesses.values() if a.kind == "st" and a.array]
        assert len(stores) == 32 and all(a.used == 1 for a in stores), (
            "parts of sectors"
        )


@pytest.mark.parametrize("wanted", MIDDLE, ids=name)
def test_it_fits_the_device(wanted, compiled):
    from pallas_kernels.nf4 import wgmma

    folder, (out, width), rows = compiled(wanted), wanted["shape"], wanted["rows"]
    report = (folder / "kernel.ptxas").read_text()
    launch = ptx.read_launch((folder / "kernel.ll").read_text())
    assert " 0 bytes spill stores, 0 bytes spill loads" in report
    # ptxas says so when it makes the products wait for each other.
    assert "wgmma" not in report.lower()
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert launch.threads == 256 and registers * launch.threads <= 65536
    # Shared memory of a block on request, CUDA C++ Programming Guide.
    assert launch.shared <= 232448
    tiling = wgmma.tiling_for((out, width), rows)
    columns = -(-rows // tiling.columns)
    assert np.prod(launch.grid) == columns * out // 128 * tiling.parts
    # x in its order, the sums of the parts and what is cut off; no slice of the stack.
    padded = columns * tiling.columns
    sums = 4 * tiling.parts * out * padded
    temporaries = json.loads((folder / "memory.json").read_text())["temporaries"]
    assert temporaries <= 2 * padded * width + sums


@pytest.mark.parametrize("wanted", MIDDLE, ids=name)
def test_the_tensor_cores_and_the_decoding_take_turns(wanted, compiled):
    text = (compiled(wanted) / "kernel.ptx").read_text()
    products = re.findall(
        r"wgmma\.mma_async\.sync\.aligned\.(\S+) \{[^}]*\}, \{([^}]*)\}", text
    )
    kind = {"bfloat16": "bf16", "float16": "f16"}[wanted["dtype"]]
    count = -(-wanted["rows"] // 256)
    columns = -(-wanted["rows"] // (8 * count)) * 8
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
