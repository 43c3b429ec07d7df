"""The kernels of an RMSNorm with the low-rank products, as an H200 would run them.

Compiled without a GPU (`make compile`); the PTX is then interpreted (ptx.py), and ptxas
tells the registers. Times are absent.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import jax_has_kernels
from pallas_kernels.norm import reference
from tests.compile import ptx
from tests.compile.requests import each

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11"),
]


def norm(direction, features, rank, rows, **named) -> dict:
    case = {"kernel": f"norm_{direction}", "features": features, "rank": rank}
    return case | {"rows": rows, "dtype": "bfloat16", "rounds_first": True} | named


SMALL = [
    case
    for direction in ("forward", "backward")
    for case in (
        norm(direction, 1024, 48, 32),
        # An odd number of chunks: one warpgroup, and one chunk at a time.
        norm(direction, 640, 16, 16, dtype="float16", rounds_first=False),
    )
]
REAL = [
    norm(direction, features, rank, 8192)
    for direction in ("forward", "backward")
    # q, k and v of 8B; the largest rank; rows that shared memory does not hold.
    for features, rank in ((4096, 48), (4096, 128), (16384, 128))
]
ALL = SMALL + REAL


@each(SMALL)
def test_the_compiled_kernels_are_those_of_the_formula(case, kernel):
    rng = np.random.default_rng(0)
    rows, features, rank = case["rows"], case["features"], case["rank"]
    offset = not case["rounds_first"]

    def draw(*shape, deviation=1.0):
        return jnp.asarray(deviation * rng.standard_normal(shape), case["dtype"])

    x, weight = draw(rows, features, deviation=3), draw(features)
    a = draw(rank, features, deviation=0.05)
    scaling = jnp.asarray(rng.uniform(0.5, 2, rank), jnp.float32)
    factor = reference.factor(weight, x.dtype, offset=offset)
    named = {"eps": 1e-5, "offset": offset}
    extended = reference.forward(x, weight, a, scaling, **named)
    if case["kernel"] == "norm_forward":
        operands, want = (x, factor, a, scaling), extended
    else:
        dx_ext, dres = draw(rows, features + rank), draw(rows, features)
        h = dx_ext[:, features:].astype(jnp.float32)
        z = reference.multiply(h, scaling).astype(x.dtype)
        inner = (h * extended[:, features:].astype(jnp.float32)).sum(axis=1)
        operands = (dx_ext, z, a.T, inner, x, factor, dres)
        want = reference.backward(dx_ext, z, a, x, weight, dres, **named)
    got = np.zeros(want.shape, want.dtype)
    accesses = ptx.run(kernel.program, kernel.launch, [*map(np.asarray, operands), got])
    # Float32 sums in another order, which now and then round the other way: by a unit
    # of the last place.
    unit = float(jnp.finfo(want.dtype).eps)
    got, want = got.astype(np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=unit, atol=unit * 0.01)
    assert (got != want).mean() < 0.02
    # Rows are read and written in whole sectors, and never meet bank conflicts. (The
    # factor, of 32 bits, takes two loads.)
    number = 1 if case["kernel"] == "norm_forward" else 5
    rows = [a for a in accesses if a.width == 16 and a.array != number]
    assert rows and all(a.used == 1 and a.ways == 1 for a in rows)


@each(REAL)
def test_nothing_spills_and_a_multiprocessor_holds_a_block(case, kernel):
    kernel.assert_fits(threads=512)
    assert math.prod(kernel.launch.grid) == case["rows"] // 16
    # A, in the other order; no copy of the rows.
    assert kernel.temporaries <= 2 * case["rank"] * case["features"] + 4096


@each(REAL)
def test_every_access_and_product_is_the_widest_there_is(case, kernel):
    """Each once: no loop is written out twice."""
    accesses = [i.op for i in kernel.program.instructions if i.op[0] in ("ld", "st")]
    # None leaves it to the hardware which memory it means.
    assert all(op[1] in ("global", "shared", "param") for op in accesses)
    stores = [op for op in accesses if op[:2] == ("st", "global") and "v4" in op]
    assert len(stores) == 2  # both rows of a thread
    assert kernel.ptx.count("mma.sync.aligned.m16n8k16") == case["rank"] // 4
