"""Attention of a decoded token to the cache, in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


CASES = {
    # (rows, heads, key/value heads, width, slots), the token's slot, splits, rank of
    # what follows, norms of heads, ...
    "padding, a window, few features rotated, an odd number of them": (
        *((2, 3, 1, 64, 128), 70, 2, 5, True),
        {"rotated": 32, "window": 40},
    ),
    "one split": ((1, 2, 1, 128, 64), 0, 1, 12, False, {}),
}


def arguments(sizes, slot, rotated=None, window=None):
    from pallas_kernels.attention import decode

    rows, heads, kv_heads, width, slots = sizes
    angle = jnp.linspace(0.0, 6.0, rows * (rotated or width) // 2).reshape(rows, -1)
    place = jnp.arange(slots)[None]
    used = (place <= slot) & (place >= 3 * jnp.arange(rows)[:, None])
    cache = tuple(draw(i, 2, rows, kv_heads, slots, width) for i in range(2))
    numbers = [jnp.array([n], jnp.int32) for n in (1, slot, window or 0)]
    ids = used.astype(jnp.int32).at[:, slot].set(1)
    token = decode.Token(*numbers[:2], ids, numbers[2] if window else None)
    qkv = draw(2, rows, (heads + 2 * kv_heads) * width)
    return qkv, (jnp.cos(angle), jnp.sin(angle)), cache, token


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_token_is_written_and_attends_to_what_it_sees(case, interpret):
    from pallas_kernels.attention import decode
    from pallas_kernels.nf4.parts import Following, prepared_reference

    sizes, slot, splits, rank, has_norms, options = case
    args = arguments(sizes, slot, **options)
    following = Following(draw(3, 2, sizes[1] * sizes[3], rank))
    weights = (1 + 0.2 * draw(i, 2, sizes[3]).astype(jnp.float32) for i in (4, 5))
    norms = decode.HeadNorms(*weights, 1e-5) if has_norms else None
    named = {"scale": sizes[3] ** -0.5, "norms": norms}
    (want, _), want_cache = decode.attend_reference(*args, **named)
    named |= {"splits": splits, "interpret": interpret, "following": following}
    prepared, cache = jax.jit(lambda *a: decode.attend(*a, **named))(*args)
    got, parts = prepared
    # Queries and weights are rounded to 8 bits: values of up to 4, weighed.
    near = {"atol": 4 * 2.0**-8, "rtol": 2.0**-8}
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (got, want)), **near)
    _, want_parts = prepared_reference(got, args[3].layer, following)
    # Sums of float32 in another order.
    added = (p.sum(axis=0) for p in (parts, want_parts))
    np.testing.assert_allclose(*added, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(cache, want_cache, strict=True):
        # On a GPU a product and a sum of the rotation may be one rounding; squares are
        # added up in another order.
        exact = 0 if interpret and not has_norms else 2.0**-7
        ours, theirs = (a.astype(jnp.float32) for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=exact)


@pytest.mark.skipif(not device.jax_has_kernels(), reason="needs jax 0.11")
def test_the_reference_is_the_textbook_formula():
    from pallas_kernels.attention import decode

    qkv, rope, cache, token = arguments((1, 2, 1, 64, 64), 5)
    still = (jnp.ones_like(rope[0]), jnp.zeros_like(rope[1]))
    (got, _), _ = decode.attend_reference(qkv, still, cache, token, scale=0.125)
    q, k, v = np.split(np.asarray(qkv, np.float64).reshape(4, 64), [2, 3])
    keys, values = (
        np.concatenate([np.asarray(a[1, 0, 0, :5], np.float64), new])
        for a, new in zip(cache, (k, v), strict=True)
    )
    weights = np.exp(0.125 * q @ keys.T)
    want = weights / weights.sum(1, keepdims=True) @ values
    # Rounded once.
    np.testing.assert_allclose(
        got.astype(jnp.float32).reshape(2, 64), want, rtol=2.0**-8, atol=1e-6
    )


@pytest.mark.skipif(not device.jax_has_kernels(), reason="needs jax 0.11")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ((32, 8, 128, 1152, None), None),
        ((32, 8, 80, 1152, None), "80 features"),
        ((32, 2, 128, 1152, None), "32 heads for 2"),
        ((32, 8, 128, 1120, None), "1120 slots"),
        ((32, 8, 128, 1152, 50.0), "soft cap"),
    ],
)
def test_other_cases_are_refused(case, reason):
    from pallas_kernels.attention import decode

    refusal = decode.refusal(*case)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.skipif(not device.jax_has_kernels(), reason="needs jax 0.11")
def test_a_call_with_another_case_raises():
    from pallas_kernels.attention import decode

    with pytest.raises(ValueError, match="cannot compute heads of 80"):
        decode.attend(*arguments((1, 1, 1, 80, 64), 3), scale=1.0)


@pytest.mark.skipif(not device.jax_has_kernels(), reason="needs jax 0.11")
def test_splits_fill_the_device():
    from pallas_kernels.attention import decode

    for rows in (1, 2, 4, 8, 16):
        splits = decode.splits_for(rows, 8, 4096)
        assert 132 <= 8 * rows * splits <= 264
    assert decode.splits_for(64, 8, 4096) == 1
    assert decode.splits_for(1, 8, 128) == 2
