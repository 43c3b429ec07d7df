"""The NF4 kernels as an H200 would run them: what they compute, and how.

Compiled without a GPU (`make compile`); the PTX is then interpreted (ptx.py), which
covers what Pallas' own interpreter cannot run: the parts of `pallas_kernels.mosaic`
that are written in instructions. ptxas tells the registers. Times are absent.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4.reference import Packed
from qlora_jax import nf4 as core
from tests.compile import ptx
from tests.compile.requests import LLAMA_8B, each, nf4

pytestmark = pytest.mark.compile

LAYERS, LAYER = 3, 1


def dequantize(shape, dtype="bfloat16", *, nested, **options) -> dict:
    return nf4("dequantize", shape, dtype, nested=nested, **options)


def product(shape, rows, dtype="bfloat16", *, nested, **options) -> dict:
    return nf4("product", shape, dtype, nested=nested, rows=rows, **options)


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
# With default settings, for a stack of 32.
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


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls the function of a request with its kernel replaced by a compiled one.

    That is interpreted, on the arrays that come from the function itself; the grid,
    threads and result that it asks for must be those of the compiled kernel. Returns
    the result and the accesses to memory.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.nf4 import gpu

    def call(kernel: Any, case: dict, weights: Packed, x: Any = None) -> tuple:
        traces = []

        def stand_in(body, out_type, *, grid, num_threads=1, **settings) -> Any:
            del body, settings
            launched = [g for g in kernel.launch.grid if g > 1]
            assert launched == [g for g in reversed(grid) if g > 1]
            assert kernel.launch.threads == 128 * (num_threads or 1)

            def run(*operands: Any) -> Any:
                out = np.zeros(out_type.shape, out_type.dtype)
                arrays = [*map(np.asarray, operands), out]
                traces.append(ptx.run(kernel.program, kernel.launch, arrays))
                return jnp.asarray(out)

            return run

        shape, dtype, options = case["shape"], jnp.dtype(case["dtype"]), case["options"]
        with monkeypatch.context() as patch:
            patch.setattr(plgpu, "kernel", stand_in)
            if case["kernel"] == "dequantize":
                got = gpu.dequantize(weights, shape=shape, dtype=dtype, **options)
            else:
                x = jnp.zeros((case["rows"], shape[1]), dtype) if x is None else x
                split = gpu.Split(*options["split"])
                got = gpu.matmul(x, weights, shape=shape, split=split)
        (trace,) = traces
        return np.asarray(got), trace

    return call


def packed(case: dict) -> Any:
    """A stack of packed weights, and the layer to read.

    Block scales are spread over many powers of two, so that some products are
    subnormal in float16 and one overflows it; one block is all zeros.
    """
    rng = np.random.default_rng(0)
    stack = []
    for _ in range(LAYERS):
        weight = rng.standard_normal(case["shape"], np.float32)
        blocks = weight.reshape(-1, 64)
        if not case["kernel"] == "product":
            blocks *= np.exp2(rng.integers(-20, 8, (len(blocks), 1))).astype(np.float32)
            blocks[3] *= 2.0**20
        blocks[5] = 0
        stack.append(core.quantize(weight, double_quant=case["nested"]))
    fields = ["codes", "absmax"]
    if case["nested"]:
        fields += ["nested_absmax", "nested_offset", "nested_quant_map"]
    arrays = [
        jnp.asarray(np.stack([np.asarray(getattr(w, field)) for w in stack]))
        for field in fields
    ]
    nested = tuple(arrays[2:]) or None
    return Packed(*arrays[:2], nested, jnp.array([LAYER], jnp.int32))


def reference(packed: Any, shape: tuple, dtype: Any) -> np.ndarray:
    """The same weight by XLA."""
    from pallas_kernels import Nested, nf4_dequantize

    nested = packed.nested and Nested(*(a[LAYER] for a in packed.nested))
    codes, absmax = packed.codes[LAYER], packed.absmax[LAYER]
    return np.asarray(nf4_dequantize(codes, absmax, nested, shape=shape, dtype=dtype))


@each(DEQUANTIZE)
def test_the_compiled_dequantize_equals_xla_bit_for_bit(case, kernel, interpreted):
    weights, dtype = packed(case), jnp.dtype(case["dtype"])
    got, trace = interpreted(kernel, case, weights)
    want = reference(weights, case["shape"], dtype)
    bits = np.dtype(f"u{dtype.itemsize}")
    np.testing.assert_array_equal(got.view(bits), want.view(bits))
    assert_codes_and_weights_move_whole_sectors(trace, codes=1, code_bytes=4)


@each(PRODUCT)
def test_the_compiled_product_equals_x_times_the_weight(case, kernel, interpreted):
    shape, rows, dtype = case["shape"], case["rows"], jnp.dtype(case["dtype"])
    weights, rng = packed(case), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((rows, shape[1]), np.float32)).astype(dtype)
    got, trace = interpreted(kernel, case, weights, x)
    assert got.shape == (rows, shape[0]) and got.dtype == np.float32
    x = np.asarray(x).astype(np.float64)
    weight = reference(weights, shape, jnp.float32).astype(np.float64)
    # The values of the table are rounded to the dtype of x (8 or 11 bits): at most so
    # much of each term; sums of at most 1,024 terms in float32 lose far less.
    terms = np.abs(x) @ np.abs(weight).T
    unit = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[case["dtype"]]
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
    seen = [a for a in trace if a.kind != "prefetch"]
    loads = [a for a in seen if a.array == codes]
    stores = [a for a in seen if a.kind == "st" and a.array is not None]
    assert loads and all(a.width == code_bytes and a.used == 1 for a in loads), loads
    assert stores and all(a.width == 16 for a in stores), stores
    # Float32 weights are 32 bytes a thread, in two stores that share sectors.
    assert all(a.used >= 0.5 for a in stores)


@each([DEQUANTIZE[0], PRODUCT[0]])
def test_lookups_of_codes_meet_no_bank_conflicts(case, kernel, interpreted):
    _, trace = interpreted(kernel, case, packed(case))
    loads = [a for a in trace if a.array is None and a.kind == "ld"]
    free = sum(a.width == 4 and a.ways == 1 for a in loads)
    if case["kernel"] == "dequantize":
        # 4 words of 8 weights. Only the block scales, 4 of a warp at once, may meet.
        assert free >= 32 and len(loads) == 36
    else:
        # 16 bytes of a thread in every block of 64 rows and 64 weights.
        assert free >= 16 * blocks(kernel.program.instructions, case["rows"])


def blocks(instructions: list, rows: int) -> float:
    """Blocks of 64 rows and 64 weights: 4 products for each 8 rows of x."""
    return sum(i.op[0] == "mma" for i in instructions) / (rows // 8 * 4)


@each([DEQUANTIZE[0], PRODUCT[5]])
def test_without_its_barriers_a_kernel_is_refused(case, kernel, interpreted):
    # The interpreter would see a barrier that the compiler, or we, forgot.
    nothing = ptx.Instruction("fence", ("fence",), (), None)
    # A wait has a loop around it.
    kinds = {("bar", "sync"): 1, ("mbarrier", "try_wait"): 3}
    for kind in [*kinds][: 1 if case["kernel"] == "dequantize" else 2]:
        kept = list(kernel.program.instructions)
        for at, i in enumerate(kernel.program.instructions):
            if i.op[:2] == kind:
                kept[at : at + kinds[kind]] = [nothing] * kinds[kind]
        program = replace(kernel.program, instructions=tuple(kept))
        with pytest.raises(ptx.Fault, match="race"):
            without = SimpleNamespace(program=program, launch=kernel.launch)
            interpreted(without, case, packed(case))


@each(ALL)
def test_no_sum_of_a_rounded_product_may_be_contracted(case, kernel):
    # ptxas makes one rounding of `mul.f32` and `add.f32`. In the decoding of 8-bit
    # block scales, `max` stands between them.
    assert kernel.program.contractions() == []
    if case["nested"]:
        assert any(i.op[:2] == ("max", "NaN") for i in kernel.program.instructions)


@each(ALL)
def test_every_access_says_which_memory_it_means(case, kernel):
    # Of an address that may be of any kind, the hardware finds out each time.
    for i in kernel.program.instructions:
        if i.op[0] in ("ld", "st"):
            assert i.op[1] in ("global", "shared", "param"), i.text


@each(REAL_DEQUANTIZE)
def test_dequantize_at_real_sizes(case, kernel):
    kernel.assert_fits(threads=128)
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


def assert_lanes_are_read(kernel: Any) -> None:
    """The lane's own copy is chosen by `%laneid`.

    Of `%tid.x & 31` ptxas joins the `and` with the `or` of every lookup, and then needs
    another instruction to select the code: 5 instead of 3 (seen with ptxas 13.5).
    """
    assert any("%laneid" in i.text for i in kernel.program.instructions)


@each(REAL_PRODUCT)
def test_product_at_real_sizes(case, kernel):
    kernel.assert_fits(threads=1024 if case["rows"] <= 16 else 512)
    # The sums of each part, and no slice of the stack.
    sums = 4 * kernel.launch.grid[0] * case["shape"][0] * case["rows"]
    assert kernel.temporaries <= sums
    assert_lanes_are_read(kernel)
    instructions = kernel.program.instructions
    for loop in kernel.program.loops():
        inside = [instructions[i] for i in loop]
        # 32 weights a thread, six for a lookup of two; for each 8 rows of x two loads,
        # four products of the tensor cores and four scaled sums.
        weights = 32 * blocks(inside, case["rows"])
        assert len(inside) / weights <= 3.6 + 0.35 * case["rows"] / 8


@pytest.mark.parametrize("card, shared", [("a100-80", 166912), ("b200", 232448)])
def test_other_devices_compile_them_without_spills(card, shared, compile_kernels):
    large = (8192, 28672)  # the down projection of 70B: the most block scales
    requests = [
        REAL_DEQUANTIZE[0],
        *(product(large, rows, nested=True, layers=2) for rows in (8, 64)),
        *(product((4096, 4096), rows, nested=True, layers=2) for rows in (16, 32)),
    ]
    for kernel in compile_kernels(requests, card):
        kernel.assert_fits(kernel.launch.threads, shared)


def test_the_same_kernels_compute_on_an_older_device(compile_kernels, interpreted):
    case = PRODUCT[0]
    (kernel,) = compile_kernels([case], "a100-80")
    test_the_compiled_product_equals_x_times_the_weight(case, kernel, interpreted)
