"""Attention by every implementation, against float64.

"interpret" runs the GPU kernels' own programs, block by block and with a race detector,
wherever jax can (0.11 and newer). tests/compile holds what they are compiled to.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, flash_attention
from pallas_kernels.attention import api
from pallas_kernels.attention.check import AttentionCheck, check_attention
from pallas_kernels.attention.variant import PLAIN, Variant
from pallas_kernels.attention.xla import blockwise_attention

FLOAT32 = ("reference", "xla")
"""The implementations that compute in any dtype."""
# float32: exponentials and sums of up to 600 terms, each good to a few 1e-7; measured
# below 2e-6 of the largest element.
FLOAT32_TOLERANCE = 5e-6
# bfloat16: softmax weights (which sum to one), their gradients and the results are
# rounded: three half-ulps of the largest element; sums are float32.
TOLERANCE = 3 * 2.0**-8


def output_and_gradients(
    q, k, v, dout, segments, choice=None, *, implementation, variant=PLAIN
):
    # Not as one program: the interpreter takes a CPU for each of two warpgroups, and
    # the program that starts it a third, or all wait for ever.
    def call(q, k, v):
        return flash_attention(
            *(q, k, v, segments),
            variant=variant,
            choice=choice,
            implementation=implementation,
        )

    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)


jitted = jax.jit(output_and_gradients, static_argnames=("implementation", "variant"))
both_plain = pytest.mark.parametrize("implementation", FLOAT32)


@pytest.fixture
def small(inputs):
    """Draws small inputs in float32."""
    sizes = {"batch": 2, "heads": 4, "groups": 2, "width": 16, "dtype": "float32"}
    return lambda length, **given: inputs(length, **sizes | given)


@pytest.fixture
def check(float64_attention):
    """Compares output and gradients with those in float64."""

    def compare(
        implementation,
        *arrays,
        variant=PLAIN,
        choice=None,
        tolerance=TOLERANCE,
    ):
        q, _, _, _, *segments = arrays
        segments = segments[0] if segments else None
        compute = jitted if implementation in FLOAT32 else output_and_gradients
        got = compute(
            *arrays[:4],
            segments,
            None if choice is None else jnp.asarray(choice),
            implementation=implementation,
            variant=variant,
        )
        want = float64_attention(
            *arrays[:4],
            segments,
            scale=variant.scale,
            softcap=variant.softcap,
            window=variant.windows[choice or 0],
        )
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, want[:4], strict=True):
            assert a.dtype == q.dtype and a.shape == b.shape
            worst = np.abs(np.asarray(a, np.float64) - b).max()
            assert worst <= tolerance * max(1.0, np.abs(b).max()), (name, worst)

    return compare


@pytest.mark.parametrize(
    "length, width, heads, groups",
    [
        (384, 64, 1, 1),  # more steps than buffers
        (256, 128, 2, 1),
        (1, 64, 2, 2),
        (200, 128, 1, 1),  # not a multiple of a block
    ],
)
def test_output_and_gradients(
    implementation, length, width, heads, groups, inputs, check
):
    check(implementation, *inputs(length, heads=heads, groups=groups, width=width))


def test_a_query_sees_its_own_segment_only(implementation, segment_row, inputs, check):
    kind, row = segment_row
    segments = jnp.asarray(row[None], jnp.int32)
    width, heads = (128, 2) if kind == "packed" else (64, 1)
    check(implementation, *inputs(384, heads=heads, width=width), segments)


def test_rows_of_a_batch_have_their_own_segments(
    implementation, packed_row, inputs, check
):
    left_padded = np.repeat([0, 1], [140, 10])
    segments = jnp.asarray(np.stack([packed_row[:150], left_padded]), jnp.int32)
    check(implementation, *inputs(150, batch=2, heads=4, groups=2), segments)


@pytest.mark.parametrize(
    "variant, choice, packed",
    [
        (Variant(windows=(1,)), None, False),  # itself alone
        (Variant(windows=(128,)), None, True),  # a block
        (Variant(windows=(200,), scale=0.3), None, False),
        (Variant(windows=(200,), scale=0.3), None, True),
        (Variant(windows=(None, 70), softcap=2.0), 0, True),
        (Variant(windows=(None, 70), softcap=2.0), 1, False),
        (Variant(windows=(None, 70), softcap=2.0), 1, True),
        (Variant(windows=(1000,)), None, False),  # no row reaches it
    ],
)
def test_windows_caps_and_scales(
    implementation, variant, choice, packed, packed_row, inputs, check
):
    segments = [jnp.asarray(packed_row[None], jnp.int32)] if packed else []
    arrays = (*inputs(384, width=128 if variant.softcap else 64), *segments)
    check(implementation, *arrays, variant=variant, choice=choice)


def test_large_scores_do_not_overflow(implementation, packed_row, inputs, check):
    q, k, v, dout = inputs(256, heads=1)
    segments = jnp.asarray(packed_row[None, :256], jnp.int32)
    # Scores reach 5,000, where half an ulp of float32 is 2e-4: so is the error of a
    # weight, much below its rounding to bfloat16. Gradients of q and k are differences
    # of weights times 30.
    check(implementation, 30 * q, 30 * k, v, dout, segments, tolerance=4 * 2.0**-8)


# --- In float32 and float16, which the kernels do not compute ---


@both_plain
@pytest.mark.parametrize("length", [1, 7, 8, 9, 255, 256, 257, 600])
def test_float32_output_and_gradients_at_any_length(
    length, implementation, small, check
):
    case = small(length, batch=1 if length > 256 else 2)
    check(implementation, *case, tolerance=FLOAT32_TOLERANCE)


@both_plain
@pytest.mark.parametrize("window", [1, 255, 256, 257, 511])
def test_windows_in_float32(window, implementation, small, check):
    # Windows that begin within, at and between blocks of 256 tokens.
    variant = Variant(windows=(window,), softcap=1.5)
    options = {"variant": variant, "tolerance": FLOAT32_TOLERANCE}
    check(implementation, *small(600, batch=1), **options)


@both_plain
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1)])
def test_query_heads_read_their_group(heads, groups, implementation, small, check):
    case = small(20, heads=heads, groups=groups)
    check(implementation, *case, tolerance=FLOAT32_TOLERANCE)


FLOAT32_SEGMENTS = {
    "left padding": lambda n: np.repeat([[0] * 5 + [1] * (n - 5)], 2, 0),
    "right padding": lambda n: np.stack([[1] * n, [1] * (n - 7) + [0] * 7]),
    "packed": lambda n: np.stack(
        [np.arange(n) // 13 + 1, [1] * 3 + [2] * (n - 8) + [0] * 5]
    ),
    "all padding": lambda n: np.stack([[0] * n, [1] * n]),
    "every token its own": lambda n: np.repeat([np.arange(n) + 1], 2, 0),
    # A whole block of keys comes before the segment of a query: the running maximum
    # must not be raised by masked scores.
    "longer than a block": lambda n: np.repeat(
        [np.repeat([1, 2, 0], (270, n - 300, 30))], 2, 0
    ),
}


@both_plain
@pytest.mark.parametrize(
    "kind, length",
    [(kind, n) for kind in [*FLOAT32_SEGMENTS][:-1] for n in (40, 300)]
    + [("longer than a block", 600)],
)
def test_float32_queries_see_their_own_segment_only(
    length, kind, implementation, small, check
):
    segments = jnp.asarray(FLOAT32_SEGMENTS[kind](length), jnp.int32)
    check(implementation, *small(length), segments, tolerance=FLOAT32_TOLERANCE)


@both_plain
@pytest.mark.parametrize("dtype, half_ulp", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_narrow_inputs_cost_the_rounding_of_weights_and_results(
    dtype, half_ulp, implementation, small, check
):
    segments = jnp.asarray(FLOAT32_SEGMENTS["packed"](70), jnp.int32)
    check(implementation, *small(70, dtype=dtype), segments, tolerance=3 * half_ulp)


@both_plain
def test_large_float32_scores_do_not_overflow(implementation, small, check):
    q, k, v, dout = small(50)
    # Scores reach 5,000: half an ulp is 2e-4, and so is the relative error of a weight.
    # Measured: 2e-4 of the largest element.
    check(implementation, 30 * q, 30 * k, v, dout, tolerance=1e-3)


@both_plain
def test_no_segments_is_one_segment(implementation, small):
    case = small(30)
    ones = jnp.ones((2, 30), jnp.int32)
    plain = jitted(*case, None, implementation=implementation)
    same = jitted(*case, ones, implementation=implementation)
    for a, b in zip(plain, same, strict=True):
        # One is compiled with a mask and one without: sums may be reordered.
        np.testing.assert_allclose(a, b, atol=1e-6)


@both_plain
def test_it_can_be_mapped(implementation, small, float64_attention):
    cases = [small(33, seed=seed) for seed in range(3)]
    kinds = ("packed", "left padding", "packed")
    segments = [jnp.asarray(FLOAT32_SEGMENTS[k](33), jnp.int32) for k in kinds]
    call = functools.partial(jitted, implementation=implementation)
    stacked = (jnp.stack(parts) for parts in zip(*cases, strict=True))
    got = jax.vmap(call)(*stacked, jnp.stack(segments))
    for i, case in enumerate(cases):
        want = float64_attention(*case, segments[i])[:4]
        for a, b in zip(got, want, strict=True):
            atol = FLOAT32_TOLERANCE * max(1, np.abs(b).max())
            np.testing.assert_allclose(a[i], b, atol=atol)


# --- Memory ---


def temporary_bytes(implementation, length, *, gradient):
    """What the compiled function needs besides its arguments and results."""
    shapes = [(1, length, heads, 16) for heads in (2, 1, 1, 2)[: 4 if gradient else 3]]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct((1, length), jnp.int32))
    function = jitted if gradient else flash_attention
    call = functools.partial(function, implementation=implementation)
    compiled = jax.jit(call).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_blockwise_memory_grows_with_the_length_and_that_of_scores_with_its_square(
    gradient,
):
    short, long = (
        {name: temporary_bytes(name, n, gradient=gradient) for name in FLOAT32}
        for n in (2048, 8192)
    )
    # Four times the length: 4 (linear, less the constant blocks) against 16.
    assert long["xla"] <= 4.2 * short["xla"]
    assert long["reference"] >= 12 * short["reference"]
    # Never the scores of one head, let alone of all.
    assert long["xla"] < 8192 * 8192 * 4 / 8
    assert long["reference"] > 8192 * 8192 * 4


def assert_no_scores(residuals, q, k, slack=0):
    """Those are q, k, v, the output and a float32 for each query and head."""
    most = 2 * q.nbytes + 2 * k.nbytes + 4 * q.size // q.shape[-1] + slack
    kept = jax.tree.leaves(residuals)
    assert sum(a.size * a.dtype.itemsize for a in kept) <= most


@pytest.mark.interpret
def test_the_backward_of_the_kernels_keeps_no_scores(inputs):
    q, k, v, _ = inputs(384)
    call = functools.partial(flash_attention, implementation="interpret")
    assert_no_scores(jax.eval_shape(lambda *qkv: jax.vjp(call, *qkv)[1], q, k, v), q, k)


def test_the_backward_of_xla_keeps_no_scores(small):
    q, k, v, _ = small(512, batch=1)
    call = functools.partial(flash_attention, implementation="xla")
    # Not traced, or it would keep the residuals for every platform.
    assert_no_scores(jax.vjp(call, q, k, v)[1], q, k, slack=100)


@pytest.mark.interpret
def test_a_policy_can_keep_what_the_backward_needs(inputs, simulate_gpu):
    q, k, v, _ = inputs(128, heads=1)
    simulate_gpu()

    def forwards(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        call = functools.partial(flash_attention, implementation="pallas")
        call = jax.checkpoint(call, policy=policy)

        def loss(q, k, v):
            return call(q, k, v).astype("float32").sum()

        program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
        return count(program.jaxpr)

    def count(program):
        total = 0
        for equation in program.eqns:
            total += equation.params.get("name") == "attention_forward"
            values = [*equation.params.values()]
            for inner in jax.tree.leaves(values, is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns"):
                    total += count(getattr(inner, "jaxpr", inner))
        return total

    assert forwards("attention_out", "attention_lse") == 1
    assert forwards("attention_out") == 2


# --- What is refused ---


ODD_HEADS = {"q": (1, 8, 3, 64), "k": (1, 8, 2, 64), "v": (1, 8, 2, 64)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (1, 9, 1, 64)}, "batch, length and head_dim of the queries"),
        ({"v": (1, 8, 1, 128)}, "batch, length and head_dim of the queries"),
        (ODD_HEADS, "cannot share 2"),
        ({"q": (1, 0, 2, 64), "k": (1, 0, 1, 64), "v": (1, 0, 1, 64)}, "is empty"),
        ({"segment_ids": (1, 9)}, "for every token, \\(1, 8\\)"),
        ({"implementation": "triton"}, "does not exist. Choose 'reference'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (1, 8, 2, 64), "k": (1, 8, 1, 64), "v": (1, 8, 1, 64)} | change
    implementation = shapes.pop("implementation", "xla")
    dtypes = {"segment_ids": jnp.int32}
    arrays = {k: jnp.zeros(s, dtypes.get(k, "bfloat16")) for k, s in shapes.items()}
    with pytest.raises(ValueError, match=message):
        # The annotations would refuse the shapes first, in their own words.
        flash_attention.__wrapped__(**arrays, implementation=implementation)


def test_one_dtype_for_all(inputs):
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match="one dtype, got bfloat16, float32 and bfl"):
        flash_attention(q, k.astype(jnp.float32), v, implementation="xla")


@pytest.mark.interpret
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "float32"}, "compute in bfloat16, not float32. Use 'xla'"),
        ({"width": 96}, "support a head_dim of 64 or 128, not 96"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, message, inputs):
    q, k, v, _ = inputs(8, **change)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, implementation="interpret")


def test_kernels_that_cannot_run_here_say_why(inputs):
    if jax.default_backend() == "gpu":
        pytest.skip("they can")
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match=r"need an NVIDIA GPU|jax 0\.11"):
        flash_attention(q, k, v, implementation="pallas")


@pytest.mark.interpret
@pytest.mark.parametrize("capability", ["8.0", "10.0", ""])
def test_another_gpu_than_hopper_is_refused(capability, inputs, simulate_gpu):
    simulate_gpu(capability)
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match=f"has {capability or 'none'}. Use 'xla'"):
        flash_attention(q, k, v, implementation="pallas")


# --- What is chosen ---


def test_nothing_measured_means_xla(inputs):
    assert device.tuned("A device that nobody has measured", "attention") == {}
    q, k, v, _ = inputs(8)
    if jax.default_backend() == "gpu":
        pytest.skip("this device may have been measured")
    assert not api.measured(q)
    plain = flash_attention(q, k, v, implementation="xla")
    np.testing.assert_array_equal(flash_attention(q, k, v), plain)


@pytest.mark.interpret
def test_the_kernels_are_chosen_from_the_measured_length_on(inputs, simulate_gpu):
    lengths = {"64 packed": 128, "64 whole": None, "128 whole": 1}
    simulate_gpu("9.0", {"from_length": lengths})
    ids = {n: jnp.ones((1, n), jnp.int32) for n in (127, 128)}
    short, long, wide = inputs(127)[0], inputs(128)[0], inputs(128, width=128)[0]
    assert not api.measured(short, ids[127]) and api.measured(long, ids[128])
    assert not api.measured(long) and api.measured(wide)
    assert not api.measured(wide, ids[128])
    assert not api.measured(wide.astype(jnp.float32))


# --- The check on the device at hand ---


@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param("interpret", marks=pytest.mark.interpret),
        pytest.param("pallas", marks=pytest.mark.gpu),
    ],
)
def test_a_right_implementation_passes_the_check(implementation):
    # On a GPU as a run does it.
    short = {} if implementation == "pallas" else {"length": 384}
    result = check_attention(4, 2, 64, implementation=implementation, **short)
    assert result.passed, result
    assert set(result.errors) == {"output", "dq", "dk", "dv"}


@pytest.mark.parametrize("wrong", ["segments", "nan"])
def test_a_wrong_implementation_fails_the_check(wrong, monkeypatch):
    def broken(q, k, v, segments, variant, choice):
        if wrong == "segments":  # sees the documents before its own
            segments = jnp.minimum(segments, 1)
        out = blockwise_attention(q, k, v, segments, variant, choice)
        return out if wrong == "segments" else out.at[0, 300].mul(jnp.nan)

    check = functools.partial(
        check_attention, 4, 2, 64, implementation="xla", length=384
    )
    right = check()
    monkeypatch.setattr(api, "blockwise_attention", broken)
    assert not AttentionCheck(check().errors, right.limits).passed
