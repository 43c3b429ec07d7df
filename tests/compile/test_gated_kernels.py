"""The kernels of the gated activation, as an H200 would run them.

Compiled without a GPU (`make compile`); the PTX is then interpreted (ptx.py), and ptxas
tells the registers. Times are absent.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import jax_has_kernels
from pallas_kernels.gated import reference
from tests.compile import ptx
from tests.compile.requests import each

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11"),
]


def gated(direction, features, ranks, rows, dtype="bfloat16") -> dict:
    case = {"kernel": f"gated_{direction}", "features": features, "ranks": ranks}
    return case | {"rows": rows, "dtype": dtype}


SMALL = [
    case
    for direction in ("forward", "backward")
    for case in (
        gated(direction, 512, [16, 32, 16], 128),
        gated(direction, 128, [16, 16, 32], 256, "float16"),
    )
]
REAL = [
    gated(direction, features, ranks, 8192)
    for direction in ("forward", "backward")
    # The MLP of 8B; the largest ranks.
    for features, ranks in ((14336, [16, 16, 16]), (14336, [32, 32, 32]))
]
ALL = SMALL + REAL


@each(SMALL)
def test_the_compiled_kernels_are_those_of_the_formula(case, kernel):
    rng = np.random.default_rng(0)
    tokens, features, dtype = case["rows"], case["features"], case["dtype"]
    forward = case["kernel"] == "gated_forward"

    def draw(*shape, deviation=1.0):
        return jnp.asarray(deviation * rng.standard_normal(shape), dtype)

    gate_up, dh = draw(tokens, 2 * features, deviation=3), draw(tokens, features)
    z = tuple(draw(tokens, rank) for rank in case["ranks"])
    a = draw(case["ranks"][-1], features, deviation=0.1)
    if case["kernel"] == "gated_forward":
        operands, want = (gate_up, a), reference.forward(gate_up, a)
    else:
        pairs, products = reference.backward(gate_up, dh, z)
        want = (pairs, jnp.concatenate(products))
        operands = (gate_up, dh, jnp.concatenate([each.T for each in z]))
    got = [np.zeros(v.shape, v.dtype) for v in want]
    if case["kernel"] == "gated_backward":
        parts = kernel.launch.grid[1]
        got[1] = np.zeros((parts, *got[1].shape), np.float32)
    arrays = [*map(np.asarray, operands), *got]
    accesses = ptx.run(kernel.program, kernel.launch, arrays, (len(arrays) - 2,))
    if case["kernel"] == "gated_backward":
        got[1] = got[1].sum(axis=0)
    for value, expected in zip(got, want, strict=True):
        value, expected = (np.asarray(v, np.float32) for v in (value, expected))
        # Of 16 bits: float32 in another order, which now and then rounds the other way,
        # by a unit of the last place. Then products of such numbers.
        unit = float(jnp.finfo(dtype).eps)
        size = np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=unit, atol=unit * 0.01 * size)
        assert (np.abs(value - expected) > 1e-5 * size).mean() < 0.03
    # Whole sectors are read and written: of 32 bytes that a thread reads with two loads
    # the second finds its half in L1.
    wide = [a for a in accesses if a.array is not None and a.width >= 8]
    assert {a.used for a in wide if a.array == 0} == {0.5 if forward else 1}
    assert {a.used for a in wide if a.array != 0} == {1}


@each(REAL)
def test_nothing_spills_and_a_multiprocessor_holds_several_blocks(case, kernel):
    forward = case["kernel"] == "gated_forward"
    kernel.assert_fits(threads=512 if forward else 128)
    strips = case["features"] // 32
    blocks = case["rows"] // 16 if forward else 4 * strips
    assert math.prod(kernel.launch.grid) == blocks
    # The parts of the sums, and their operands with the tokens last.
    parts = 4 * 4 * case["features"] + 2 * case["rows"]
    assert kernel.temporaries <= (0 if forward else parts) * sum(case["ranks"]) + 4096


@each(REAL)
def test_every_access_and_product_is_the_widest_there_is(case, kernel):
    """Each once: no loop is written out twice."""
    ops = [i.op for i in kernel.program.instructions]
    accesses = [op for op in ops if op[0] in ("ld", "st")]
    # None leaves it to the hardware which memory it means.
    assert all(op[1] in ("global", "shared", "param") for op in accesses)
    products = kernel.ptx.count("mma.sync.aligned.m16n8k16")
    if case["kernel"] == "gated_forward":
        assert products == case["ranks"][-1] // 4
    else:
        assert products == 4 * sum(case["ranks"]) // 16
