"""The implementations behind the `attention` setting, masks, and decoding.

The block-by-block path and the kernels are tested in tests/pallas_kernels/attention.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.device import jax_has_kernels
from qlora_jax.errors import UserError
from qlora_jax.models.attention import (
    _decode_by_sums,
    attention,
    causal_mask,
    decode_attention,
    masked_attention,
)

# float32: exponentials and sums of up to 300 terms, each good to a few 1e-7; measured
# below 2e-6 of the largest element.
FLOAT32 = 5e-6


def inputs(length, *, batch=2, heads=4, groups=2, width=16, dtype="float32"):
    rng = np.random.default_rng(0)

    def draw(count):
        return jnp.asarray(rng.standard_normal((batch, length, count, width)), dtype)

    return draw(heads), draw(groups), draw(groups), draw(heads)


@functools.partial(jax.jit, static_argnames="implementation")
def output_and_gradients(q, k, v, dout, segments, *, implementation):
    call = functools.partial(
        attention, segment_ids=segments, implementation=implementation
    )
    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)


def assert_close(got, want, dtype, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        worst = np.abs(np.asarray(a, np.float64) - b).max()
        assert worst <= tolerance * max(1.0, np.abs(b).max()), (name, worst)


SEGMENTS = {
    "left padding": lambda n: np.repeat([[0] * 5 + [1] * (n - 5)], 2, 0),
    "right padding": lambda n: np.stack([[1] * n, [1] * (n - 7) + [0] * 7]),
    "packed": lambda n: np.stack(
        [np.arange(n) // 13 + 1, [1] * 3 + [2] * (n - 8) + [0] * 5]
    ),
    "all padding": lambda n: np.stack([[0] * n, [1] * n]),
    "every token its own": lambda n: np.repeat([np.arange(n) + 1], 2, 0),
}
# Softmax weights (which sum to one), their gradients and the results are rounded to a
# narrow dtype: three half-ulps of the largest element; sums are float32.
NARROW = {"bfloat16": 3 * 2**-8, "float16": 3 * 2**-11}


@pytest.mark.parametrize(
    "case, kind",
    [
        *(({"length": n}, None) for n in (1, 9, 257)),
        *(({"heads": h, "groups": g}, None) for h, g in ((4, 4), (6, 2), (4, 1))),
        *(({"length": n}, kind) for n in (40, 300) for kind in SEGMENTS),
        *(({"length": 70, "dtype": dtype}, "packed") for dtype in NARROW),
    ],
)
def test_eager_is_the_formula(case, kind, float64_attention):
    case = {"length": 20, **case}
    q, k, v, dout = inputs(**case)
    segments = kind and jnp.asarray(SEGMENTS[kind](case["length"]), jnp.int32)
    got = output_and_gradients(q, k, v, dout, segments, implementation="eager")
    want = float64_attention(q, k, v, dout, segments)[:4]
    assert_close(got, want, q.dtype, NARROW.get(q.dtype.name, FLOAT32))


def test_large_scores_do_not_overflow(float64_attention):
    q, k, v, dout = inputs(50)
    q, k = 30 * q, 30 * k
    got = output_and_gradients(q, k, v, dout, None, implementation="eager")
    # Scores reach 5,000: half an ulp is 2e-4, and so is the relative error of a weight.
    # Measured: 2e-4 of the largest element.
    assert_close(got, float64_attention(q, k, v, dout)[:4], q.dtype, 1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["auto", "xla"])
def test_auto_on_a_cpu_is_xla_which_goes_block_by_block(name, packed):
    q, k, v, _ = inputs(12)
    segments = jnp.asarray(SEGMENTS["packed"](12), jnp.int32) if packed else None
    np.testing.assert_array_equal(
        attention(q, k, v, segment_ids=segments, implementation=name),
        flash_attention(q, k, v, segments, implementation="xla"),
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash", "attention='flash' does not exist. Choose"),
        ("cudnn", "'cudnn' cannot be used here: it needs an NVIDIA GPU .* Use 'auto' "),
        ("pallas", "'pallas' .* used here: .*(NVIDIA GPU|jax 0.11).* Use 'auto' or"),
    ],
)
def test_what_cannot_run_here_is_refused_with_the_reason(name, message):
    if name != "flash" and jax.default_backend() != "cpu":
        pytest.skip("this process has an accelerator")
    q, k, v, _ = inputs(12, width=64, dtype="bfloat16")
    with pytest.raises(UserError, match=message):
        attention(q, k, v, implementation=name)


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


# --- The kernels ---


@pytest.mark.interpret
@pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11")
def test_the_kernels_agree_with_the_others(float64_attention):
    case = inputs(200, batch=1, heads=2, groups=1, width=64, dtype="bfloat16")
    segments = jnp.asarray(np.repeat([[1] * 90 + [2] * 80 + [0] * 30], 1, 0), jnp.int32)
    want = float64_attention(*case, segments)[:4]
    for name in ("eager", "xla", "interpret"):
        # Not as one program, for which the interpreter has too few threads.
        call = functools.partial(attention, segment_ids=segments, implementation=name)
        out, pullback = jax.vjp(call, *case[:3])
        assert_close((out, *pullback(case[3])), want, jnp.bfloat16, NARROW["bfloat16"])


def test_auto_is_what_was_measured_to_be_best(monkeypatch):
    from pallas_kernels.attention import api as kernels

    used = []

    def recorded(q, k, v, segment_ids, *, implementation, **_):
        used.append(implementation)
        return q

    monkeypatch.setattr(kernels, "measured", lambda q, ids, _: ids is not None)
    monkeypatch.setattr(kernels, "refusal", lambda q, **_: None)
    monkeypatch.setattr(kernels, "flash_attention", recorded)
    q, k, v, _ = inputs(12)
    attention(q, k, v)
    assert used == []
    attention(q, k, v, segment_ids=jnp.ones((2, 12), jnp.int32))
    assert used == ["pallas"]


# --- The mask, and one query against a cache ---


def test_the_mask_joins_equal_segments_and_is_causal_from_where_the_queries_start():
    got = causal_mask(None, None, 2, 5, 2)
    assert got.astype(int).tolist() == [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]
    segments = jnp.asarray([[0, 1, 1, 2]], jnp.int32)
    got = causal_mask(segments, segments, 4, 4, 0)[0].astype(int)
    assert got.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_one_query_against_a_cache_is_the_last_row_of_all(float64_attention):
    q, k, v, dout = inputs(9)
    want = float64_attention(q, k, v, dout)[0][:, -1:]
    spare = jnp.full((2, 4, 2, 16), 1e3)  # empty slots must not be seen
    k, v = (jnp.concatenate([a, spare], axis=1) for a in (k, v))
    got = masked_attention(q[:, -1:], k, v, causal_mask(None, None, 1, 13, 8))
    np.testing.assert_allclose(got, want, atol=FLOAT32)


@pytest.mark.parametrize("length, slots", [(9, 13), (1, 32), (200, 256), (300, 416)])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("compute", [decode_attention, _decode_by_sums])
def test_a_token_reads_its_layer_of_the_cache(
    compute, heads, groups, length, slots, float64_attention
):
    q, k, v, dout = inputs(length, heads=heads, groups=groups)
    segments = jnp.ones((2, length), jnp.int32).at[1, : length // 3].set(0)
    want = float64_attention(q, k, v, dout, segments)[0][:, -1:]
    pad = ((0, 0), (0, 0), (0, slots - length), (0, 0))

    def cache(a):  # in the second of three layers; what must not be seen is large
        a = jnp.pad(jnp.swapaxes(a, 1, 2), pad, constant_values=1e3)
        return jnp.stack([jnp.full_like(a, 1e3), a, jnp.full_like(a, 1e3)])

    seen = jnp.pad(segments == 1, ((0, 0), (0, slots - length)))
    for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", 0.02)):
        arrays = [a.astype(dtype) for a in (q[:, -1:], cache(k), cache(v))]
        got = jax.jit(compute)(*arrays, jnp.int32(1), seen)
        assert got.dtype == dtype
        # bfloat16: inputs and result rounded to 2^-9 of values of order one.
        worst = np.abs(np.asarray(got, np.float64) - want).max()
        assert worst <= tolerance * max(1.0, np.abs(want).max())
