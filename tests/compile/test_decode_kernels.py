"""The kernels of a decoded token's linear layers, as an H200 would run them.

Compiled without a GPU (`make compile`); the PTX is then interpreted (ptx.py), and ptxas
tells the registers. Times are absent.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4.reference import Nested, Packed
from tests.compile import ptx
from tests.compile.requests import each

pytestmark = pytest.mark.compile

LAYER = 1


def products(shapes, rows, *, layers=3, rank=16, plan=None, **named) -> dict:
    case = {"kernel": "products", "shapes": shapes, "rows": rows, "layers": layers}
    case |= {"dtype": "bfloat16", "nested": True, "rank": rank, "plan": plan}
    # Parts of the sums that are read; (rank, norm, layers ahead) of what follows.
    case |= {"parts": 1 if rank else None, "norm": False, "follows": None}
    case |= {"biased": False}
    return case | {"gated": False, "residual": False} | named


def inner(width, rows, rank, *, norm, layers=3) -> dict:
    case = {"kernel": "inner", "shapes": [(0, width)], "rows": rows, "rank": rank}
    return case | {"layers": layers, "dtype": "bfloat16", "norm": norm}


SMALL = [
    products([(48, 512), (16, 512)], 3, rank=8, plan=(2, 1, 2), parts=5, norm=True)
    | {"biased": True},
    products([(16, 512)] * 2, 9, rank=4, plan=(1, 2, 2), gated=True),
    products([(32, 768)], 8, rank=0, plan=(1, 3, 1), residual=True, nested=False),
    products([(16, 512)], 1, rank=4, plan=(2, 1, 1), dtype="float16", residual=True),
    # 200 numbers for 8 rows; fewer parts than warpgroups; units of one block and two.
    products(
        *([(48, 512)], 8),
        **{"plan": (2, 1, 2), "residual": True, "follows": (24, True, 1)},
    ),
    products(
        *([(32, 512)] * 2, 1),
        **{"plan": (2, 1, 2), "gated": True, "follows": (5, False, 0)},
        **{"rank": 4, "parts": 70, "norm": True},
    ),
    products([(16, 512)], 1, rank=0, plan=(2, 1, 1), follows=(0, True, 2)),
]
D, F, KV = 4096, 14336, 1024


def layer(rows: int, *, parts: bool) -> list[dict]:
    """The products of a layer of 8B, which leave and read parts or do not."""
    read = {"parts": 132, "norm": True} if parts else {}
    of_o, after = ({"parts": 32}, {"parts": 132}) if parts else ({}, {})
    named = {"layers": 32}
    follows = [(32, True, 0), (16, False, 0), (48, True, 1)] if parts else [None] * 3
    return [
        products([(D, D), (KV, D), (KV, D)], rows, **named, **read),
        products([(D, D)], rows, residual=True, follows=follows[0], **named, **of_o),
        products([(F, D)] * 2, rows, gated=True, follows=follows[1], **named, **read),
        products([(D, F)], rows, residual=True, follows=follows[2], **named, **after),
    ]


REAL = [
    *(case for rows in (1, 4) for case in layer(rows, parts=True)),
    *(case for rows in (8, 16) for case in layer(rows, parts=False)),
    # Without adapters; what 16 rows leave for adapters, and read.
    products([(F, D)] * 2, 1, rank=0, layers=32, gated=True, parts=132, norm=True),
    products([(F, D)] * 2, 16, layers=32, gated=True, follows=(16, False, 0)),
    products([(D, F)], 16, layers=32, parts=132, residual=True),
    # With biases.
    products([(D, D), (KV, D), (KV, D)], 1, layers=32, parts=132, norm=True)
    | {"biased": True},
]
REAL_INNER = [
    inner(D, 16, 48, norm=True, layers=32),
    inner(F, 16, 16, norm=False, layers=32),
]
ALL = SMALL + REAL + REAL_INNER


def arrays_of(case: dict) -> tuple:
    """Random x, and a function to draw more: bfloat16 or float16, of deviation 1."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, dtype: Any = case["dtype"]) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

    return draw(case["rows"], case["shapes"][0][1]), draw, rng


def weight_of(shape, case: dict, rng: np.random.Generator) -> Packed:
    """A random stack of packed weights."""
    layers, size = case["layers"], shape[0] * shape[1]
    codes = rng.integers(0, 256, (layers, shape[0], shape[1] // 2), np.uint8)
    scales = (layers, shape[0], shape[1] // 64)
    absmax, nested = rng.uniform(0.01, 0.1, scales).astype(np.float32), None
    if case["nested"]:
        absmax = rng.integers(0, 256, scales, np.uint8)
        second = (
            rng.uniform(0.001, 0.02, (layers, -(-size // 16384))),
            rng.uniform(0.04, 0.06, layers),
            np.sort(rng.uniform(-1, 1, (layers, 256))),
        )
        nested = Nested(*(jnp.asarray(a, jnp.float32) for a in second))
    layer = jnp.array([LAYER], jnp.int32)
    return Packed(jnp.asarray(codes), jnp.asarray(absmax), nested, layer)


def run(monkeypatch: pytest.MonkeyPatch, kernel: Any, function: Any) -> Any:
    """Calls a function with its kernel replaced by a compiled one, interpreted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def stand_in(body, out_type, *, grid, num_threads=1, **settings) -> Any:
        del body, settings
        launched = [g for g in kernel.launch.grid if g > 1]
        assert launched == [g for g in reversed(grid) if g > 1]
        assert kernel.launch.threads == 128 * (num_threads or 1)

        def call(*operands: Any) -> Any:
            outs = [np.zeros(out.shape, out.dtype) for out in out_type]
            arrays = [*map(np.asarray, operands), *outs]
            # The last one is checked to be complete, and written once.
            updated = range(len(operands), len(arrays) - 1)
            ptx.run(kernel.program, kernel.launch, arrays, updated)
            return [jnp.asarray(out) for out in outs]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "kernel", stand_in)
        return function()


@each(SMALL)
def test_the_compiled_products_are_those_of_the_formula(case, kernel, monkeypatch):
    from pallas_kernels.nf4 import decode, decode_plan
    from pallas_kernels.nf4.parts import Following, prepared_reference

    x, draw, rng = arrays_of(case)
    shapes, rank = case["shapes"], case["rank"]
    weights = [weight_of(shape, case, rng) for shape in shapes]
    bs = [draw(case["layers"], shape[0], rank) for shape in shapes if rank]
    named = {"shapes": shapes, "gated": case["gated"]}
    if bs:
        named["updates"] = [decode.Update(b, rank * i) for i, b in enumerate(bs)]
    if case["parts"]:
        shape = (case["parts"], case["rows"], rank * len(bs) + case["norm"])
        parts = draw(*shape, dtype="float32")
        if case["norm"]:
            named["eps"] = 1e-5
            # Squares add up to the width or more: factors of 1 or less.
            parts = parts.at[:, :, 0].set(abs(parts[:, :, 0]) + x.shape[1])
        named["parts"] = parts
    if case["biased"]:
        named["biases"] = [draw(case["layers"], shape[0]) for shape in shapes]
        named["multiplier"] = 0.5
    if case["residual"]:
        named["residual"] = draw(case["rows"], shapes[0][0])
    following = None
    if case["follows"]:
        (next_rank, norm, ahead), features = case["follows"], shapes[0][0]
        following = Following(
            draw(case["layers"], features, next_rank) if next_rank else None,
            draw(case["layers"], features) if norm else None,
            ahead,
        )
    plan = decode_plan.Plan(*case["plan"])
    named["following"] = following
    got, got_next = run(
        *(monkeypatch, kernel),
        lambda: decode.products(x, weights, plan=plan, **named),
    )
    # Not rounded, as x is float32.
    want, _ = decode.products_reference(x.astype("float32"), weights, **named)
    # As in tests/pallas_kernels/nf4/test_decode.py.
    unit = 2.0 ** -(8 if case["dtype"] == "bfloat16" else 11)
    error = 4 * unit * 0.05 * shapes[0][1] ** 0.5 * (16 if case["gated"] else 1)
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, atol=error, rtol=1.01 * unit
    )
    if following is not None:
        want_next = prepared_reference(got, weights[0].layer, following)
        np.testing.assert_array_equal(got_next.x, want_next.x)
        # Sums of float32 in another order.
        added = (p.parts.sum(axis=0) for p in (got_next, want_next))
        np.testing.assert_allclose(*added, rtol=1e-4, atol=1e-2)


@each(REAL)
def test_products_at_real_sizes(case, kernel):
    # Shared memory that every device since Ampere has.
    kernel.assert_fits(kernel.launch.threads, shared=101376)
    # At least 512 threads for each multiprocessor, and no copy of a stack.
    blocks = max(kernel.launch.grid)
    assert blocks in (132, 264) and blocks * kernel.launch.threads >= 132 * 512
    assert kernel.temporaries <= 4096


@each(REAL_INNER)
def test_inner_at_real_sizes(case, kernel):
    kernel.assert_fits(threads=128)
    assert kernel.temporaries <= 4096


@each(REAL + REAL_INNER)
def test_every_access_says_which_memory_it_means(case, kernel):
    for i in kernel.program.instructions:
        if i.op[0] in ("ld", "st"):
            assert i.op[1] in ("global", "shared", "param"), i.text


def test_an_older_device_compiles_them_without_spills(compile_kernels):
    for kernel in compile_kernels([*REAL[:8], REAL_INNER[0]], "a100-80"):
        kernel.assert_fits(kernel.launch.threads, shared=101376)
