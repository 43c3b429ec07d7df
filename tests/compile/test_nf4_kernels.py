"""The NF4 kernels as an H200 would run them: what they compute, and how.

Compiled without a GPU (`make compile`); the PTX is then interpreted (ptx.py), which
covers what Pallas' own interpreter cannot run: the parts of `pallas_kernels.mosaic`
that are written in instructions. ptxas tells the registers. Times are absent.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4 as core

pytestmark = pytest.mark.compile

HERE = Path(__file__).parent
LAYERS, LAYER = 3, 1


def _ptx() -> Any:
    # The tests are not a package.
    if "ptx" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ptx", HERE / "ptx.py")
        sys.modules["ptx"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ptx"])
    return sys.modules["ptx"]


ptx = _ptx()


def dequantize(shape, dtype="bfloat16", *, nested, layers=LAYERS, **options) -> dict:
    wanted = {"kernel": "dequantize", "shape": shape, "dtype": dtype, "nested": nested}
    return wanted | {"layers": layers, "options": options}


def product(shape, rows, dtype="bfloat16", *, nested, layers=LAYERS, **options) -> dict:
    wanted = {"kernel": "product", "shape": shape, "dtype": dtype, "nested": nested}
    return wanted | {"rows": rows, "layers": layers, "options": options}


DEQUANTIZE = [
    dequantize((128, 512), "bfloat16", nested=True),
    dequantize((128, 512), "bfloat16", nested=False),
    dequantize((128, 512), "float16", nested=True),
    dequantize((128, 512), "float32", nested=True),
    dequantize((64, 256), "float16", nested=False, words=1),
    dequantize((64, 256), "float32", nested=False, words=1, steps=3),
    dequantize((128, 512), "bfloat16", nested=True, words=1, steps=5),
    dequantize((128, 512), "bfloat16", nested=True, words=2, steps=1),
    dequantize((128, 512), "float32", nested=True, words=8, steps=4),
    # 9 tiles of 3 groups of block scales, the last of which is not whole.
    dequantize((96, 384), "bfloat16", nested=True, words=4),
]
# (groups, parts, chunk)
PRODUCT = [
    product((64, 512), 8, "bfloat16", nested=True, split=(1, 1, 4)),
    product((64, 512), 16, "float16", nested=False, split=(2, 2, 1)),
    product((64, 1024), 8, "float16", nested=True, split=(8, 1, 1)),
    product((64, 768), 5, "bfloat16", nested=True, split=(1, 2, 3)),
    product((64, 1536), 64, "bfloat16", nested=False, split=(4, 1, 3)),
    product((128, 2048), 8, "bfloat16", nested=False, split=(8, 2, 1)),
    product((128, 1024), 16, "bfloat16", nested=True, split=(8, 1, 2)),
    product((128, 1024), 64, "bfloat16", nested=True, split=(4, 2, 2)),
    product((128, 1024), 64, "float16", nested=True, split=(4, 1, 4)),
    product((128, 1024), 24, "bfloat16", nested=True, split=(2, 2, 2)),
    product((128, 1024), 16, "bfloat16", nested=False, split=(1, 1, 2)),
]
# Linear layers of Llama 3 8B; with default settings, for a stack of 32.
LLAMA_8B = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
REAL_DEQUANTIZE = [
    dequantize((4096, 4096), nested=True, layers=32, words=4),
    dequantize((14336, 4096), nested=True, layers=32),
    dequantize((14336, 4096), nested=False, layers=32),
]
REAL_PRODUCT = [
    *(product(shape, 8, nested=True, layers=32) for shape in LLAMA_8B),
    *(product(shape, 16, nested=True, layers=32) for shape in LLAMA_8B[1:3]),
    *(product(shape, 64, nested=True, layers=32) for shape in LLAMA_8B),
]
ALL = DEQUANTIZE + PRODUCT + REAL_DEQUANTIZE + REAL_PRODUCT


def name(wanted: dict) -> str:
    words = [wanted["kernel"], "x".join(map(str, wanted["shape"]))]
    words += [f"{wanted['rows']}rows"] if "rows" in wanted else []
    words += [wanted["dtype"], "nested" if wanted["nested"] else "flat"]
    options = wanted["options"].items()
    return "-".join([*words, *(f"{k}{v}".replace(" ", "") for k, v in options)])


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel."""

    program: Any
    launch: Any
    registers: int
    spilled: int
    """Bytes stored for want of registers."""
    temporaries: int
    """Bytes of buffers besides arguments and results."""


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[list[dict], str], list[Kernel]]:
    """Compiles kernels for a device, all of them by one process."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.fail("the GPU compiler is not installed: `make compile`", pytrace=False)

    def compile_for(requests: list[dict], device: str) -> list[Kernel]:
        folder = tmp_path_factory.mktemp("kernels")
        script, arguments = HERE / "kernel_for_gpu.py", (json.dumps(requests), folder)
        child = subprocess.run(
            [sys.executable, str(script), *map(str, arguments), device],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if child.returncode != 0:
            pytest.fail(f"compilation failed:\n{child.stderr[-4000:]}", pytrace=False)
        return [read(folder / str(number)) for number in range(len(requests))]

    return compile_for


def read(place: Path) -> Kernel:
    report = (place / "kernel.ptxas").read_text()
    return Kernel(
        ptx.parse((place / "kernel.ptx").read_text()),
        ptx.read_launch((place / "kernel.ll").read_text()),
        int(re.search(r"Used (\d+) registers", report)[1]),
        int(re.search(r"(\d+) bytes spill stores", report)[1]),
        json.loads((place / "memory.json").read_text())["temporaries"],
    )


@pytest.fixture(scope="module")
def kernels(compiled: Callable) -> Callable[[dict], Kernel]:
    """The kernels of this module, for an H200."""
    made = compiled(ALL, "h200")
    return lambda wanted: made[ALL.index(wanted)]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function with its kernel replaced by a compiled one, interpreted.

    The arrays come from the function itself, and what the kernel asks for (its grid,
    its threads, its result) must be what the compiled one is launched with.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def call(kernel: Kernel, function: Callable[[], Any]) -> tuple[np.ndarray, Any]:
        traces = []

        def stand_in(body, out_type, *, grid, num_threads=1, **settings) -> Any:
            del body, settings
            assert tuple(g for g in kernel.launch.grid if g > 1) == tuple(
                g for g in reversed(grid) if g > 1
            )
            assert kernel.launch.threads == 128 * (num_threads or 1)

            def run(*operands: Any) -> Any:
                out = np.zeros(out_type.shape, out_type.dtype)
                arrays = [*map(np.asarray, operands), out]
                traces.append(ptx.run(kernel.program, kernel.launch, arrays))
                return jnp.asarray(out)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(plgpu, "kernel", stand_in)
            result = np.asarray(function())
        (trace,) = traces
        return result, trace

    return call


def packed(wanted: dict) -> Any:
    """A stack of packed weights, and the layer that is meant.

    Block scales are spread over many powers of two, so that some products are
    subnormal in float16 and one overflows it; one block is all zeros.
    """
    from pallas_kernels.nf4 import gpu

    rng = np.random.default_rng(0)
    stack = []
    for _ in range(LAYERS):
        weight = rng.standard_normal(wanted["shape"], np.float32)
        blocks = weight.reshape(-1, 64)
        if not wanted["kernel"] == "product":
            blocks *= np.exp2(rng.integers(-20, 8, (len(blocks), 1))).astype(np.float32)
            blocks[3] *= 2.0**20
        blocks[5] = 0
        stack.append(core.quantize(weight, double_quant=wanted["nested"]))
    fields = ["codes", "absmax"]
    fields += ["nested_absmax", "nested_offset", "nested_quant_map"]
    fields = fields if wanted["nested"] else fields[:2]
    arrays = [
        jnp.asarray(np.stack([np.asarray(getattr(w, field)) for w in stack]))
        for field in fields
    ]
    nested = tuple(arrays[2:]) or None
    return gpu.Packed(*arrays[:2], nested, jnp.array([LAYER], jnp.int32))


def reference(packed: Any, shape: tuple, dtype: Any) -> np.ndarray:
    """The same weight by XLA."""
    from pallas_kernels import Nested, nf4_dequantize

    nested = packed.nested and Nested(*(a[LAYER] for a in packed.nested))
    codes, absmax = packed.codes[LAYER], packed.absmax[LAYER]
    return np.asarray(nf4_dequantize(codes, absmax, nested, shape=shape, dtype=dtype))


@pytest.mark.parametrize("wanted", DEQUANTIZE, ids=name)
def test_the_compiled_dequantize_equals_xla_bit_for_bit(wanted, kernels, interpreted):
    from pallas_kernels.nf4 import gpu

    shape, dtype = wanted["shape"], jnp.dtype(wanted["dtype"])
    weights = packed(wanted)
    kernel = kernels(wanted)
    got, trace = interpreted(
        kernel,
        lambda: gpu.dequantize(weights, shape=shape, dtype=dtype, **wanted["options"]),
    )
    want = reference(weights, shape, dtype)
    bits = np.dtype(f"u{dtype.itemsize}")
    np.testing.assert_array_equal(got.view(bits), want.view(bits))
    assert_codes_and_weights_move_whole_sectors(trace, codes=1, code_bytes=4)


@pytest.mark.parametrize("wanted", PRODUCT, ids=name)
def test_the_compiled_product_equals_x_times_the_weight(wanted, kernels, interpreted):
    from pallas_kernels.nf4 import gpu

    shape, rows = wanted["shape"], wanted["rows"]
    split = gpu.Split(*wanted["options"]["split"])
    weights = packed(wanted)
    rng = np.random.default_rng(1)
    dtype = jnp.dtype(wanted["dtype"])
    x = jnp.asarray(rng.standard_normal((rows, shape[1]), np.float32)).astype(dtype)
    got, trace = interpreted(
        kernels(wanted),
        lambda: gpu.matmul(x, weights, shape=shape, split=split),
    )
    assert got.shape == (rows, shape[0]) and got.dtype == np.float32
    x = np.asarray(x).astype(np.float64)
    weight = reference(weights, shape, jnp.float32).astype(np.float64)
    # The values of the table are rounded to the dtype of x (8 or 11 bits): at most so
    # much of each term; sums of at most 1,024 terms in float32 lose far less.
    terms = np.abs(x) @ np.abs(weight).T
    unit = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[wanted["dtype"]]
    assert (np.abs(got - x @ weight.T) <= 1.01 * unit * terms).all()
    # With the same rounded values, only the rounding of float32 sums remains.
    rounded = rounded_to(weights, shape, dtype)
    assert (np.abs(got - x @ rounded.T) <= 32 * 2.0**-24 * terms).all()
    assert_codes_and_weights_move_whole_sectors(trace, codes=2, code_bytes=8)


def rounded_to(packed: Any, shape: tuple, dtype: Any) -> np.ndarray:
    """The weight with the table's values rounded, the block scales exact."""
    from pallas_kernels import NF4_CODE

    codes = np.asarray(packed.codes[LAYER]).reshape(-1)
    indices = np.stack([codes >> 4, codes & 15], -1).reshape(-1, 64)
    values = NF4_CODE.astype(dtype).astype(np.float64)[indices]
    # The largest value of the table is exactly 1: blocks of it are the scales.
    like = packed._replace(codes=jnp.full_like(packed.codes, 0xFF))
    scales = reference(like, shape, jnp.float32).astype(np.float64)
    return values.reshape(shape) * scales


def assert_codes_and_weights_move_whole_sectors(trace, *, codes, code_bytes) -> None:
    """Each load of codes and each store uses all of every sector it touches."""
    seen = [a for a in trace.accesses.values() if a.kind != "prefetch"]
    loads = [a for a in seen if a.array == codes]
    stores = [a for a in seen if a.kind == "st" and a.array is not None]
    assert loads and all(a.width == code_bytes and a.used == 1 for a in loads), loads
    assert stores and all(a.width == 16 for a in stores), stores
    # Float32 weights are 32 bytes a thread, in two stores that share sectors.
    assert all(a.used >= 0.5 for a in stores)


@pytest.mark.parametrize("wanted", [DEQUANTIZE[0], PRODUCT[0]], ids=name)
def test_lookups_of_codes_meet_no_bank_conflicts(wanted, kernels, interpreted):
    kernel = kernels(wanted)
    _, trace = interpreted(kernel, lambda: call(wanted))
    loads = [a for a in trace.accesses.values() if a.array is None and a.kind == "ld"]
    free = sum(a.width == 4 and a.ways == 1 for a in loads)
    if wanted["kernel"] == "dequantize":
        # 4 words of 8 weights. Only the block scales, 4 of a warp at once, may meet.
        assert free >= 32 and len(loads) == 36
    else:
        # 16 bytes of a thread in every block of 64 rows and 64 weights.
        assert free >= 16 * blocks(kernel.program.instructions, wanted["rows"])


def call(wanted: dict) -> Any:
    """Runs a request's kernel on weights of its own; zeros for x."""
    from pallas_kernels.nf4 import gpu

    shape, dtype = wanted["shape"], jnp.dtype(wanted["dtype"])
    weights, options = packed(wanted), wanted["options"]
    if wanted["kernel"] == "dequantize":
        return gpu.dequantize(weights, shape=shape, dtype=dtype, **options)
    split = gpu.Split(*options["split"])
    x = jnp.zeros((wanted["rows"], shape[1]), dtype)
    return gpu.matmul(x, weights, shape=shape, split=split)


def blocks(instructions: list, rows: int) -> float:
    """Blocks of 64 rows and 64 weights: 4 products for each 8 rows of x."""
    return sum(i.op[0] == "mma" for i in instructions) / (rows // 8 * 4)


@pytest.mark.parametrize("wanted", [DEQUANTIZE[0], PRODUCT[5]], ids=name)
def test_without_its_barriers_a_kernel_is_refused(wanted, kernels, interpreted):
    # The interpreter would see a barrier that the compiler, or we, forgot.
    kernel = kernels(wanted)
    nothing = ptx.Instruction("fence", ("fence",), (), None)
    for kind in ("bar", "mbarrier"):
        if kind == "mbarrier" and wanted["kernel"] == "dequantize":
            continue
        kept = list(kernel.program.instructions)
        for at, i in enumerate(kernel.program.instructions):
            if i.op[:2] == ("bar", "sync") and kind == "bar":
                kept[at] = nothing
            elif i.op[:2] == ("mbarrier", "try_wait") and kind == "mbarrier":
                kept[at : at + 3] = [nothing] * 3  # the wait and the loop around it
        program = replace(kernel.program, instructions=tuple(kept))
        with pytest.raises(ptx.Fault, match="race"):
            interpreted(replace(kernel, program=program), lambda: call(wanted))


@pytest.mark.parametrize("wanted", ALL, ids=name)
def test_no_sum_of_a_rounded_product_may_be_contracted(wanted, kernels):
    # ptxas makes one rounding of `mul.f32` and `add.f32`. In the decoding of 8-bit
    # block scales, `max` stands between them.
    kernel = kernels(wanted)
    assert kernel.program.contractions() == []
    if wanted["nested"]:
        assert any(i.op[:2] == ("max", "NaN") for i in kernel.program.instructions)


@pytest.mark.parametrize("wanted", ALL, ids=name)
def test_every_access_says_which_memory_it_means(wanted, kernels):
    # Of an address that may be of any kind, the hardware finds out each time.
    for i in kernels(wanted).program.instructions:
        if i.op[0] in ("ld", "st"):
            assert i.op[1] in ("global", "shared", "param"), i.text


@pytest.mark.parametrize("wanted", REAL_DEQUANTIZE, ids=name)
def test_dequantize_at_real_sizes(wanted, kernels):
    kernel = kernels(wanted)
    assert kernel.spilled == 0
    assert kernel.registers <= 64
    assert kernel.temporaries == 0, "a slice of the stack is copied"
    (loop,) = kernel.program.loops()
    # Seven for a lookup and its product, half a conversion; per word of 8 weights, the
    # loads, the store and the block scale. Four of the seven are addresses, of which
    # ptxas makes two instructions: 6.8 a weight in its code, if lanes are read (below).
    assert len(loop) <= 10.5 * 8 * 4
    inside = [kernel.program.instructions[i].op[0] for i in loop]
    assert "bar" not in inside, "warps wait for each other in every tile"
    assert_lanes_are_read(kernel)


def assert_lanes_are_read(kernel: Kernel) -> None:
    """The lane's own copy is chosen by `%laneid`.

    Of `%tid.x & 31` ptxas joins the `and` with the `or` of every lookup, and then needs
    another instruction to select the code: 5 instead of 3 (seen with ptxas 13.5).
    """
    assert any("%laneid" in i.text for i in kernel.program.instructions)


@pytest.mark.parametrize("wanted", REAL_PRODUCT, ids=name)
def test_product_at_real_sizes(wanted, kernels):
    kernel = kernels(wanted)
    assert kernel.spilled == 0
    assert kernel.launch.threads == (1024 if wanted["rows"] <= 16 else 512)
    assert kernel.registers * kernel.launch.threads <= 65536
    # Shared memory of a block on request, CUDA C++ Programming Guide.
    assert kernel.launch.shared <= 232448
    # The sums of each part, and no slice of the stack.
    sums = 4 * kernel.launch.grid[0] * wanted["shape"][0] * wanted["rows"]
    assert kernel.temporaries <= sums
    assert_lanes_are_read(kernel)
    instructions = kernel.program.instructions
    for loop in kernel.program.loops():
        inside = [instructions[i] for i in loop]
        # 32 weights a thread, six for a lookup of two; for each 8 rows of x two loads,
        # four products of the tensor cores and four scaled sums.
        weights = 32 * blocks(inside, wanted["rows"])
        assert len(inside) / weights <= 3.6 + 0.35 * wanted["rows"] / 8


@pytest.mark.parametrize("device, shared", [("a100", 166912), ("b200", 232448)])
def test_other_devices_compile_them_without_spills(device, shared, compiled):
    large = (8192, 28672)  # the down projection of 70B: the most block scales
    requests = [
        REAL_DEQUANTIZE[0],
        *(product(large, rows, nested=True, layers=2) for rows in (8, 64)),
        *(product((4096, 4096), rows, nested=True, layers=2) for rows in (16, 32)),
    ]
    for kernel in compiled(requests, device):
        assert kernel.spilled == 0
        assert kernel.launch.shared <= shared


def test_the_same_kernels_compute_on_an_older_device(compiled, interpreted):
    wanted = PRODUCT[0]
    (kernel,) = compiled([wanted], "a100")
    test_the_compiled_product_equals_x_times_the_weight(
        wanted, lambda _: kernel, interpreted
    )
