import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import jax_has_kernels
from qlora_jax.errors import UserError
from qlora_jax.models.attention import (
    _decode_by_sums,
    attention,
    causal_mask,
    decode_attention,
    masked_attention,
)

IMPLEMENTATIONS = ("eager", "xla")


def inputs(length, *, batch=2, heads=4, groups=2, width=16, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)

    def draw(count):
        return jnp.asarray(rng.standard_normal((batch, length, count, width)), dtype)

    return draw(heads), draw(groups), draw(groups), draw(heads)


def numpy_attention(q, k, v, dout, segments=None):
    """Output and gradients in float64, one head at a time."""
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    batch, length, heads, width = q.shape
    per_group = heads // k.shape[2]
    seen = np.tril(np.ones((length, length), bool))
    out, dq = np.zeros_like(q), np.zeros_like(q)
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        mask = seen
        if segments is not None:
            ids = np.asarray(segments)[b]
            mask = seen & (ids[:, None] == ids[None, :])
        for n in range(heads):
            g = n // per_group
            scores = q[b, :, n] @ k[b, :, g].T / np.sqrt(width)
            scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, g]
            dweights = dout[b, :, n] @ v[b, :, g].T
            inner = (weights * dweights).sum(1, keepdims=True)
            dscores = weights * (dweights - inner) / np.sqrt(width)
            dq[b, :, n] = dscores @ k[b, :, g]
            dk[b, :, g] += dscores.T @ q[b, :, n]
            dv[b, :, g] += weights.T @ dout[b, :, n]
    return out, dq, dk, dv


@functools.partial(jax.jit, static_argnames="implementation")
def output_and_gradients(q, k, v, dout, segments, *, implementation):
    call = functools.partial(
        attention, segment_ids=segments, implementation=implementation
    )
    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)


def check(implementation, q, k, v, dout, segments=None, *, tolerance):
    got = output_and_gradients(q, k, v, dout, segments, implementation=implementation)
    want = numpy_attention(q, k, v, dout, segments)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == q.dtype and a.shape == b.shape
        worst = np.abs(np.asarray(a, np.float64) - b).max()
        assert worst <= tolerance * max(1.0, np.abs(b).max()), (name, worst)


# float32: exponentials and sums of up to 600 terms, each good to a few 1e-7; measured
# below 2e-6 of the largest element.
FLOAT32 = 5e-6


@pytest.mark.parametrize(
    "length, implementation",
    [(n, "xla") for n in (1, 7, 8, 9, 255, 256, 257, 600)]
    + [(n, "eager") for n in (1, 9, 257)],
)
def test_output_and_gradients_at_any_length(length, implementation):
    batch = 1 if length > 256 else 2
    check(implementation, *inputs(length, batch=batch), tolerance=FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1)])
def test_query_heads_read_their_group(heads, groups, implementation):
    check(implementation, *inputs(20, heads=heads, groups=groups), tolerance=FLOAT32)


SEGMENTS = {
    "left padding": lambda n: np.repeat([[0] * 5 + [1] * (n - 5)], 2, 0),
    "right padding": lambda n: np.stack([[1] * n, [1] * (n - 7) + [0] * 7]),
    "packed": lambda n: np.stack(
        [np.arange(n) // 13 + 1, [1] * 3 + [2] * (n - 8) + [0] * 5]
    ),
    "all padding": lambda n: np.stack([[0] * n, [1] * n]),
    "every token alone": lambda n: np.repeat([np.arange(n) + 1], 2, 0),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("length", [40, 300])
def test_a_query_sees_its_own_segment_only(length, kind, implementation):
    segments = jnp.asarray(SEGMENTS[kind](length), jnp.int32)
    check(implementation, *inputs(length), segments, tolerance=FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_longer_than_a_block_that_start_within_one(implementation):
    # A whole block of keys lies before the segment of a query: the running maximum
    # must not be raised by masked scores.
    segments = jnp.asarray(np.repeat([[1] * 270 + [2] * 300 + [0] * 30], 1, 0))
    check(
        implementation,
        *inputs(600, batch=1),
        segments.astype(jnp.int32),
        tolerance=FLOAT32,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype, half_ulp", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_narrow_inputs_cost_the_rounding_of_weights_and_results(
    dtype, half_ulp, implementation
):
    # Softmax weights (which sum to one), their gradients and the results are rounded to
    # the narrow dtype: three half-ulps of the largest element; sums are float32.
    segments = jnp.asarray(SEGMENTS["packed"](70), jnp.int32)
    tolerance = 3 * half_ulp
    check(implementation, *inputs(70, dtype=dtype), segments, tolerance=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    q, k, v, dout = inputs(50)
    got = output_and_gradients(
        30 * q, 30 * k, v, dout, None, implementation=implementation
    )
    want = numpy_attention(30 * q, 30 * k, v, dout)
    # Scores reach 5,000: half an ulp is 2e-4, and so is the relative error of a weight.
    # Measured: 2e-4 of the largest element.
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * max(1.0, np.abs(b).max()))


def test_no_segments_is_one_segment():
    q, k, v, dout = inputs(30)
    ones = jnp.ones((2, 30), jnp.int32)
    for name in IMPLEMENTATIONS:
        plain = output_and_gradients(q, k, v, dout, None, implementation=name)
        same = output_and_gradients(q, k, v, dout, ones, implementation=name)
        for a, b in zip(plain, same, strict=True):
            # One is compiled with a mask and one without: sums may be reordered.
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_can_be_mapped(implementation):
    sets = [inputs(33, seed=s) for s in range(3)]
    q, k, v, dout = (jnp.stack(parts) for parts in zip(*sets, strict=True))
    segments = jnp.asarray(
        np.stack([SEGMENTS[kind](33) for kind in ("packed", "left padding")] * 2)[:3],
        jnp.int32,
    )
    call = functools.partial(output_and_gradients, implementation=implementation)
    got = jax.vmap(call)(q, k, v, dout, segments)
    for i, one in enumerate(sets):
        want = numpy_attention(*one, segments[i])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[i], b, atol=FLOAT32 * max(1, np.abs(b).max()))


def test_auto_is_xla_on_a_cpu():
    q, k, v, _ = inputs(12)
    np.testing.assert_array_equal(
        attention(q, k, v), attention(q, k, v, implementation="xla")
    )


def test_cudnn_is_refused_on_a_cpu_with_the_reason():
    if jax.default_backend() != "cpu":
        pytest.skip("this process has an accelerator")
    q, k, v, _ = inputs(12, dtype="bfloat16")
    message = r"'cudnn' cannot be used here: it needs an NVIDIA GPU .* Use 'auto' or"
    with pytest.raises(UserError, match=message):
        attention(q, k, v, implementation="cudnn")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segment_ids": jnp.ones((2, 12), jnp.int32)}, "neither segment ids nor pad"),
        ({"dtype": "float32"}, "computes in bfloat16 or float16, not float32"),
        ({"width": 12}, "head_dim=12 is not a multiple of 8 up to 128"),
        ({"width": 136}, "head_dim=136 is not a multiple"),
    ],
)
def test_cudnn_names_what_it_cannot_do_on_a_gpu(change, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    segments = change.pop("segment_ids", None)
    q, k, v, _ = inputs(12, **{"dtype": "bfloat16", **change})
    with pytest.raises(UserError, match=message):
        attention(q, k, v, segment_ids=segments, implementation="cudnn")


# --- The kernels of our own ---


@pytest.mark.interpret
@pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11")
def test_the_kernels_agree_with_the_others():
    case = inputs(200, batch=1, heads=2, groups=1, width=64, dtype="bfloat16")
    segments = jnp.asarray(np.repeat([[1] * 90 + [2] * 80 + [0] * 30], 1, 0), jnp.int32)
    want = numpy_attention(*case, segments)
    for name in ("eager", "xla", "interpret"):
        # Not as one program, for which the interpreter has too few threads.
        call = functools.partial(attention, segment_ids=segments, implementation=name)
        out, pullback = jax.vjp(call, *case[:3])
        for a, b in zip((out, *pullback(case[3])), want, strict=True):
            worst = np.abs(np.asarray(a, np.float64) - b).max()
            # As for narrow inputs above.
            assert worst <= 3 * 2**-8 * max(1.0, np.abs(b).max()), name


def test_the_kernels_say_why_they_cannot_run_here():
    if jax.default_backend() != "cpu":
        pytest.skip("this process has an accelerator")
    q, k, v, _ = inputs(12, width=64, dtype="bfloat16")
    message = r"'pallas' cannot be used here: .*(NVIDIA GPU|jax 0\.11).* Use 'auto' or"
    with pytest.raises(UserError, match=message):
        attention(q, k, v, implementation="pallas")


def test_auto_is_what_was_measured_to_be_best(monkeypatch):
    from pallas_kernels.attention import api as kernels

    asked = []

    def instead(q, k, v, segment_ids, *, implementation):
        asked.append(implementation)
        return q

    monkeypatch.setattr(kernels, "measured", lambda q, ids: ids is not None)
    monkeypatch.setattr(kernels, "refusal", lambda q, interpret: None)
    monkeypatch.setattr(kernels, "flash_attention", instead)
    q, k, v, _ = inputs(12)
    attention(q, k, v)
    assert asked == []
    attention(q, k, v, segment_ids=jnp.ones((2, 12), jnp.int32))
    assert asked == ["pallas"]


def test_an_unknown_implementation_is_refused():
    q, k, v, _ = inputs(4)
    with pytest.raises(UserError, match="attention='flash' does not exist. Choose"):
        attention(q, k, v, implementation="flash")


# --- Memory ---


def temporary_bytes(implementation, length, *, gradient):
    """What the compiled function needs beside its arguments and results."""
    q, k, v, dout = (
        jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)
        for heads in (2, 1, 1, 2)
    )
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    if gradient:
        lowered = output_and_gradients.lower(
            q, k, v, dout, segments, implementation=implementation
        )
    else:
        call = functools.partial(attention, implementation=implementation)
        lowered = jax.jit(lambda q, k, v, s: call(q, k, v, segment_ids=s)).lower(
            q, k, v, segments
        )
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_blockwise_memory_grows_with_the_length_and_eager_with_its_square(gradient):
    short, long = (
        {name: temporary_bytes(name, n, gradient=gradient) for name in IMPLEMENTATIONS}
        for n in (2048, 8192)
    )
    # Four times the length: 4 (linear, less the constant blocks) against 16.
    assert long["xla"] <= 4.2 * short["xla"]
    assert long["eager"] >= 12 * short["eager"]
    # Never the scores of one head, let alone of all.
    assert long["xla"] < 8192 * 8192 * 4 / 8
    assert long["eager"] > 8192 * 8192 * 4


def test_the_backward_pass_keeps_no_scores():
    q, k, v, _ = inputs(512, batch=1)
    call = functools.partial(attention, implementation="xla")
    kept = jax.tree.leaves(jax.vjp(call, q, k, v)[1])
    # q, k, v, the output and one float for each query and head.
    most = 2 * (q.nbytes + k.nbytes) + q.nbytes // 16
    assert sum(a.nbytes for a in kept) <= most + 100


# --- The mask, and one query against a cache ---


def test_the_mask_is_causal_from_where_the_queries_start():
    got = causal_mask(None, None, 2, 5, 2)
    assert got.shape == (1, 2, 5)
    assert got[0].astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_the_mask_joins_equal_segments():
    segments = jnp.asarray([[0, 1, 1, 2]], jnp.int32)
    got = causal_mask(segments, segments, 4, 4, 0)[0].astype(int)
    assert got.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_one_query_against_a_cache_is_the_last_row_of_the_whole():
    q, k, v, dout = inputs(9)
    want = numpy_attention(q, k, v, dout)[0][:, -1:]
    spare = jnp.full((2, 4, 2, 16), 1e3)  # empty slots must not be seen
    k, v = (jnp.concatenate([a, spare], axis=1) for a in (k, v))
    seen = causal_mask(None, None, 1, 13, 8)
    got = masked_attention(q[:, -1:], k, v, seen)
    np.testing.assert_allclose(got, want, atol=FLOAT32)


@pytest.mark.parametrize("length, slots", [(9, 13), (1, 32), (200, 256), (300, 416)])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("compute", [decode_attention, _decode_by_sums])
def test_a_token_reads_its_layer_of_the_cache(compute, heads, groups, length, slots):
    q, k, v, dout = inputs(length, heads=heads, groups=groups)
    segments = jnp.ones((2, length), jnp.int32).at[1, : length // 3].set(0)
    want = numpy_attention(q, k, v, dout, segments)[0][:, -1:]
    pad = ((0, 0), (0, 0), (0, slots - length), (0, 0))

    def cache(a):  # in the second of three layers; what must not be seen is large
        a = jnp.pad(jnp.swapaxes(a, 1, 2), pad, constant_values=1e3)
        return jnp.stack([jnp.full_like(a, 1e3), a, jnp.full_like(a, 1e3)])

    seen = jnp.pad(segments == 1, ((0, 0), (0, slots - length)))
    for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", 0.02)):
        got = jax.jit(compute)(
            q[:, -1:].astype(dtype),
            cache(k).astype(dtype),
            cache(v).astype(dtype),
            jnp.int32(1),
            seen,
        )
        assert got.dtype == dtype
        # bfloat16: inputs and result rounded to 2^-9 of values of order one.
        worst = np.abs(np.asarray(got, np.float64) - want).max()
        assert worst <= tolerance * max(1.0, np.abs(want).max())
