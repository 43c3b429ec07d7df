"""The interpreter of PTX itself: its arithmetic, and the faults that it detects."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.compile import ptx

THREADS = 64
# Each thread has its number in %r1, four times it in %rd9, its element of the input in
# %r2, and in %rd3, %rd4 where its elements of input and output are.
KERNEL = """
.version 9.0
.visible .entry kernel(
    .param .u64 .ptr .align 256 kernel_param_0,
    .param .u64 .ptr .align 256 kernel_param_1
)
.maxntid 64, 1, 1
{{
    .reg .b32 %r<20>;
    .shared .align 16 .b8 __dynamic_shmem__0;
    ld.param::entry.b64 %rd1, [kernel_param_0];
    ld.param::entry.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd9, %r1, 4;
    add.s64 %rd3, %rd1, %rd9;
    add.s64 %rd4, %rd2, %rd9;
    ld.global.b32 %r2, [%rd3];
    mov.b64 %rd5, __dynamic_shmem__0;
    add.s64 %rd6, %rd5, %rd9;
    {body}
    ret;
}}
"""


def run(body: str, x: np.ndarray, shared: int = 256) -> np.ndarray:
    """Runs a block of 64 threads, an element of the input each."""
    program = ptx.parse(KERNEL.format(body=body))
    out = np.zeros(THREADS, np.uint32)
    launch = ptx.Launch((1, 1, 1), THREADS, shared, (0, 1))
    ptx.run(program, launch, [np.ascontiguousarray(x).view(np.uint32), out])
    return out


STORE = "st.global.b32 [%rd4], %r3;"
COUNT = np.arange(THREADS, dtype=np.uint32)


def floats(seed: int) -> np.ndarray:
    """float32 of all magnitudes."""
    bits = np.random.default_rng(seed).integers(0, 2**32, THREADS, np.uint64)
    values = bits.astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(1))


def test_a_fused_product_and_sum_is_rounded_once():
    # x * x - x, and near cancellation: x * x + (-round(x * x)).
    x = np.exp2(np.linspace(-3, 3, THREADS)).astype(np.float32)
    body = "mul.f32 %r4, %r2, %r2; neg.f32 %r4, %r4; fma.rn.f32 %r3, %r2, %r2, %r4;"
    got = run(body + STORE, x).view(np.float32)
    want = [Fraction(float(v)) ** 2 - Fraction(float(v * v)) for v in x]
    assert [Fraction(float(v)) for v in got] == want
    assert any(want)
    # Halfway between two float32 but for the last bits of the product.
    x = np.full(THREADS, 1 + 2.0**-12, np.float32)
    third = np.float32(2.0**24).view(np.uint32)
    got = run(f"fma.rn.f32 %r3, %r2, %r2, 0f{third:08X};" + STORE, x).view(np.float32)
    assert (got == np.float32(2**24 + 2)).all()


def test_conversions_round_to_nearest_even_and_keep_the_order_of_a_pair():
    x = floats(0)
    for kind, dtype in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)):
        got = run(f"cvt.rn.{kind}x2.f32 %r3, %r2, 0f3F800000;" + STORE, x)
        with np.errstate(over="ignore"):
            want = x.astype(dtype).view(np.uint16)
        np.testing.assert_array_equal(got >> 16, want)
        assert (got & 0xFFFF == np.ones(1, dtype).view(np.uint16)[0]).all()


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("shr.s32 %r3, %r2, 1;", lambda x: x.view(np.int32) >> 1),
        ("shr.u32 %r3, %r2, 33;", lambda x: x * 0),
        ("mul.hi.u32 %r3, %r2, %r2;", lambda x: x.astype(np.uint64) ** 2 >> 32),
        ("mul.lo.s32 %r3, %r2, -3;", lambda x: x.view(np.int32) * np.int32(-3)),
        ("min.s32 %r3, %r2, 9;", lambda x: np.minimum(x.view(np.int32), 9)),
        ("max.u32 %r3, %r2, 9;", lambda x: np.maximum(x, 9)),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};",
         lambda x: x >> 16 | x << 16),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;",
         lambda x: np.where(x.view(np.int32) < 0, 1, 2)),
        ("shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;", lambda x: np.repeat(x[[3, 35]], 32)),
    ],
)  # fmt: skip
def test_integers(body, want):
    x = floats(1).view(np.uint32)
    np.testing.assert_array_equal(run(body + STORE, x), want(x).astype(np.uint32))


def test_threads_that_take_different_ways_meet_again():
    body = """
    mov.b32 %r3, 0;
$L1:
    setp.ge.u32 %p1, %r3, %r1;
    @%p1 bra $L2;
    add.s32 %r3, %r3, 1;
    bra.uni $L1;
$L2:
    bar.sync 0;
    """
    np.testing.assert_array_equal(run(body + STORE, COUNT), COUNT)


SWAP = """
    st.shared.b32 [%rd6], %r2;
    {barrier}
    xor.b64 %rd7, %rd9, {other};
    add.s64 %rd8, %rd5, %rd7;
    ld.shared.b32 %r3, [%rd8];
"""
MBARRIER = """
    setp.eq.b32 %p1, %r1, 0;
    cvt.u32.u64 %r9, %rd5;
    add.s32 %r9, %r9, 256;
    mov.b32 %r10, {count};
    @%p1 mbarrier.init.shared.b64 [%r9], %r10;
    bar.sync 0;
    {store}
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%r9], 1;
    {{
    .reg .pred P1;
    WAIT:
    mbarrier.try_wait.parity.shared.b64 P1, [%r9], {parity}, 1000;
    @P1 bra.uni DONE;
    bra.uni WAIT;
    DONE:
    }}
"""


@pytest.mark.parametrize("other", [4, 128])
def test_a_barrier_between_a_store_and_a_load_is_asked_for(other):
    swapped = COUNT ^ np.uint32(other // 4)
    body = SWAP.format(barrier="bar.sync 0;", other=other)
    np.testing.assert_array_equal(run(body + STORE, COUNT), swapped)
    with pytest.raises(ptx.Fault, match="race with an earlier store"):
        run(SWAP.format(barrier="", other=other) + STORE, COUNT)
    # Each warp alone: enough for neighbours, not for the other warp.
    body = "shr.u32 %r8, %r1, 5; add.s32 %r8, %r8, 1;" + SWAP.format(
        barrier="bar.sync %r8, 32;", other=other
    )
    if other == 4:
        np.testing.assert_array_equal(run(body + STORE, COUNT), swapped)
    else:
        with pytest.raises(ptx.Fault, match="race with an earlier store"):
            run(body + STORE, COUNT)


def test_a_barrier_between_a_load_and_a_store_is_asked_for():
    again = "st.shared.b32 [%rd6], %r1;"
    body = SWAP.format(barrier="bar.sync 0;", other=128)
    run(body + "bar.sync 0;" + again + STORE, COUNT)
    with pytest.raises(ptx.Fault, match="race with an earlier load"):
        run(body + again + STORE, COUNT)


def test_an_mbarrier_orders_what_came_before_the_arrivals():
    def body(count: int, parity: int) -> str:
        barrier = MBARRIER.format(count=count, parity=parity, store="")
        head, tail = barrier.split("mbarrier.arrive")
        store, load = SWAP.format(barrier="|", other=128).split("|")
        return head + store + "mbarrier.arrive" + tail + load + STORE

    np.testing.assert_array_equal(run(body(64, 0), COUNT, shared=264), COUNT ^ 32)
    with pytest.raises(ptx.Fault, match="wait for ever"):
        run(body(64, 1), COUNT, shared=264)
    with pytest.raises(ptx.Fault, match="wait for ever"):
        run(body(65, 0), COUNT, shared=264)
    with pytest.raises(ptx.Fault, match="more arrivals"):
        run(body(63, 0), COUNT, shared=264)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("ld.global.b32 %r3, [%rd3+4];" + STORE, "Fault", "out of bounds by 4 bytes"),
        ("prefetch.global.L2 [%rd3+4];" + STORE, "Fault", "out of bounds by 1 bytes"),
        ("ld.global.b32 %r3, [%rd5];" + STORE, "Fault", "address of no array"),
        ("ld.global.b32 %r3, [%rd1+2];" + STORE, "Fault", "misaligned"),
        ("ld.shared.b32 %r3, [%rd6+4];" + STORE, "Fault", "outside of shared"),
        ("ld.shared.b32 %r3, [%rd6];" + STORE, "Fault", "before it is written"),
        ("st.shared.b32 [%rd5], %r2;", "Fault", "two threads store to one word"),
        ("st.global.b32 [%rd3], %r2;", "Fault", "input 0 is written"),
        ("mov.b32 %r3, 0;" + STORE + STORE, "Fault", r"written \[2\] times"),
        ("mov.b32 %r3, %r4;" + STORE, "Fault", "register read before"),
        ("bar.sync 1, 128;", "Fault", "wait for ever"),
        ("setp.eq.b32 %p1, %r1, 0; @%p1 bar.sync 0;", "Fault", "not all lanes"),
        ("vadd.u32 %r3, %r2, %r2;" + STORE, "Unsupported", "unknown instruction"),
        ("add.sat.s32 %r3, %r2, %r2;" + STORE, "Unsupported", "add.sat.s32"),
        ("mul.ftz.f32 %r3, %r2, %r2;" + STORE, "Unsupported", "mul.ftz.f32"),
    ],
)
def test_what_is_wrong_is_said(body, error, message):
    with pytest.raises(getattr(ptx, error), match=message):
        run(body, COUNT)


def test_which_sums_of_products_may_be_rounded_once():
    def contractions(body: str) -> list[str]:
        return ptx.parse(KERNEL.format(body=body)).contractions()

    total = "add.f32 %r3, %r2, %r4;"
    assert contractions("mul.f32 %r4, %r2, %r2;" + total) == [total[:-1]]
    assert contractions("mul.rn.f32 %r4, %r2, %r2;" + total) == []
    apart = "max.NaN.f32 %r4, %r4, 0f00000000;"
    assert contractions("mul.f32 %r4, %r2, %r2;" + apart + total) == []


def test_the_tensor_cores_product():
    # A thread's registers, as the ISA's figures place them, against a plain product.
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((16, 16)), rng.standard_normal((16, 8))
    a, b = (v.astype(np.float16) for v in (a, b))
    lanes = np.arange(32)
    x = np.zeros((32, 2, 8), np.float16)
    for lane, half in np.ndindex(32, 2):
        row, column = lane // 4, lane % 4 * 2 + half
        x[lane, half, :2] = a[row, column], a[row + 8, column]
        x[lane, half, 2:4] = a[row, column + 8], a[row + 8, column + 8]
        x[lane, half, 4:6] = b[column, row], b[column + 8, row]
    words = np.ascontiguousarray(x.transpose(0, 2, 1)).view(np.uint32).reshape(-1)
    body = """
    mov.u32 %r0, %laneid;
    mul.wide.u32 %rd3, %r0, 32;
    add.s64 %rd4, %rd1, %rd3;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd4];
    ld.global.v2.b32 {%r5, %r6}, [%rd4+16];
    mov.b32 %r7, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
      {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7, %r7, %r7, %r7};
    mul.wide.u32 %rd5, %r0, 16;
    add.s64 %rd6, %rd2, %rd5;
    st.global.v4.b32 [%rd6], {%f1, %f2, %f3, %f4};
    """
    program = ptx.parse(KERNEL.format(body=body))
    out = np.zeros((32, 4), np.float32)
    ptx.run(program, ptx.Launch((1, 1, 1), 32, 0, (0, 1)), [words, out])
    want = (1 + a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    row, column = lanes // 4, lanes % 4 * 2
    got = np.zeros((16, 8), np.float32)
    for k in range(4):
        got[row + 8 * (k // 2), column + k % 2] = out[:, k]
    np.testing.assert_array_equal(got, want)
