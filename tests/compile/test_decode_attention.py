"""Attention of a decoded token to the cache, as an H200 would run it.

Compiled without a GPU (`make compile`); the PTX is then interpreted (ptx.py), and ptxas
tells the registers. Times are absent.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compile import ptx
from tests.compile.requests import each
from tests.compile.test_decode_kernels import run

pytestmark = pytest.mark.compile


def attend(sizes, *, splits=1, window=None, rotated=None, layers=2, **named) -> dict:
    """`sizes`: rows, query heads, key/value heads, width of a head, slots."""
    case = {"kernel": "attend", "sizes": sizes, "splits": splits, "window": window}
    case |= {"rotated": rotated or sizes[3], "layers": layers, "dtype": "bfloat16"}
    return case | {"rank": 0, "norms": False} | named


SMALL = [
    attend((2, 6, 2, 64, 128), slot=70, rotated=32),
    attend((1, 8, 1, 128, 192), slot=128, window=40, dtype="float16"),
    attend((2, 2, 2, 256, 64), slot=0, rank=12),
    attend((1, 4, 1, 128, 192), slot=150, splits=2, norms=True),
    attend((2, 8, 1, 64, 64), slot=20, rotated=32, norms=True),
]
WEIGH = [
    attend((2, 3, 1, 64, 192), kernel="weigh", splits=3, rank=5),
    attend((1, 4, 2, 128, 128), kernel="weigh", splits=2, rank=0),
    attend((2, 8, 2, 64, 128), kernel="weigh", splits=2, rank=200),
]
REAL = [
    attend((1, 32, 8, 128, 1152), splits=18, layers=32),
    attend((16, 32, 8, 128, 1152), splits=2, window=1, layers=32),
    attend((4, 16, 8, 256, 4096), splits=1, layers=26),
    attend((8, 32, 32, 128, 1152), splits=1, layers=32, rank=16),
    attend((1, 32, 8, 128, 1152), splits=18, layers=36, norms=True),
    attend((16, 16, 16, 256, 1152), splits=1, layers=36, rank=16, norms=True),
    attend((1, 32, 8, 128, 1152), kernel="weigh", splits=18, layers=32, rank=16),
    attend((16, 32, 8, 128, 1152), kernel="weigh", splits=2, layers=32, rank=64),
]
ALL = SMALL + WEIGH + REAL


def arguments(case: dict) -> tuple:
    """A cache in use up to the token's slot, the second row of it with padding."""
    from pallas_kernels.attention import decode

    rows, heads, kv_heads, width, slots = case["sizes"]
    rng, slot = np.random.default_rng(0), case["slot"]

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(case["dtype"])

    angle = jnp.asarray(rng.uniform(0, 6, (rows, case["rotated"] // 2)), jnp.float32)
    shape = (case["layers"], rows, kv_heads, slots, width)
    places = jnp.arange(slots)[None]
    ids = (places <= slot) & (places >= 3 * jnp.arange(rows)[:, None])
    one = lambda number: jnp.array([number], jnp.int32)  # noqa: E731
    window = case["window"] and one(case["window"])
    ids = ids.astype(jnp.int32).at[:, slot].set(1)
    token = decode.Token(one(1), one(slot), ids, window)
    qkv = draw(rows, (heads + 2 * kv_heads) * width)
    return qkv, (jnp.cos(angle), jnp.sin(angle)), (draw(*shape), draw(*shape)), token


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls `attend` with its first kernel replaced by a compiled one, interpreted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.attention import decode

    def call(kernel: Any, case: dict, *args: Any) -> Any:
        outs: list[np.ndarray] = []

        def stand_in(body, out_type, *, grid, **settings) -> Any:
            del body, settings
            launched = [g for g in kernel.launch.grid if g > 1]
            assert launched == [g for g in reversed(grid) if g > 1]

            def run(*operands: Any) -> Any:
                *inputs, k, v = operands
                arrays = [np.array(a) for a in (*inputs, k[...], v[...])]
                count = len(arrays)
                outs.extend(np.zeros(t.shape, t.dtype) for t in out_type)
                # The cache is also a result, at the same place.
                order = list(range(count + len(outs))) + [count - 2, count - 1]
                ours = [order[n] for n in kernel.launch.parameters]
                launch = kernel.launch.__class__(
                    *(kernel.launch.grid, kernel.launch.threads),
                    *(kernel.launch.shared, tuple(ours)),
                )
                # The last output is checked to be complete; maxima, if there are.
                updated = range(count - 2, count + len(outs) - 1)
                ptx.run(kernel.program, launch, [*arrays, *outs], updated)
                k[...], v[...] = arrays[count - 2 :]
                return [jnp.asarray(out) for out in outs]

            return run

        with monkeypatch.context() as patch:
            patch.setattr(plgpu, "kernel", stand_in)
            patch.setattr(decode, "_weigh", weigh)
            return decode.attend(*args, splits=case["splits"], **options_of(case))

    return call


def options_of(case: dict) -> dict:
    """The scale, norms, and A of what follows."""
    from pallas_kernels.attention.decode import HeadNorms
    from pallas_kernels.nf4.parts import Following

    _, heads, _, width, _ = case["sizes"]
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(case["dtype"])

    named: dict[str, Any] = {"scale": width**-0.5, "following": None, "norms": None}
    if case["rank"]:
        a = draw(case["layers"], heads * width, case["rank"])
        named["following"] = Following(a)
    if case["norms"]:
        weights = (1 + draw(case["layers"], width) / 8 for _ in range(2))
        named["norms"] = HeadNorms(*weights, 1e-5)
    return named


def weigh(
    sums: Any, maxima: Any, layer: Any, following: Any, dtype: Any, _: Any
) -> Any:
    """Adds up the splits: [B, K, splits, G, H] and [B, K, splits, G, 2]."""
    from pallas_kernels.nf4.parts import Prepared, prepared_reference

    share = jnp.exp2(maxima[..., :1] - maxima[..., :1].max(axis=2, keepdims=True))
    total = (share * maxima[..., 1:]).sum(axis=2)
    out = ((share * sums).sum(axis=2) / total).reshape(sums.shape[0], -1).astype(dtype)
    if following is None:
        return Prepared(out, None)
    return prepared_reference(out, layer, following)


def assert_parts(got: Any, want: Any) -> None:
    """Compares parts, which may be divided differently."""
    assert (got is None) == (want is None)
    if got is not None:
        # Sums of float32 in another order.
        sums = (np.asarray(parts).sum(axis=0) for parts in (got, want))
        np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-3)


@each(WEIGH)
def test_the_compiled_kernel_weighs_the_splits(case, kernel, monkeypatch):
    from pallas_kernels.attention import decode

    rows, heads, kv_heads, width, _ = case["sizes"]
    parts, rng = (
        (rows, kv_heads, case["splits"], heads // kv_heads),
        np.random.default_rng(0),
    )
    sums = jnp.asarray(rng.standard_normal((*parts, width), np.float32))
    maxima = jnp.asarray(rng.uniform(1, 3, (*parts, 2)), jnp.float32)
    following = options_of(case)["following"]
    args = (sums, maxima, jnp.array([1], jnp.int32), following, jnp.bfloat16, False)
    got = run(monkeypatch, kernel, lambda: decode._weigh(*args))
    want = weigh(*args)
    # Rounded once, of values off by few units of float32.
    near = {"atol": 1e-6, "rtol": 2.0**-7}
    np.testing.assert_allclose(
        got.x.astype(jnp.float32), want.x.astype(jnp.float32), **near
    )
    exact = None if following is None else prepared(got.x, following)
    assert_parts(got.parts, exact)


def prepared(out: Any, following: Any) -> Any:
    from pallas_kernels.nf4.parts import prepared_reference

    return prepared_reference(out, jnp.array([1], jnp.int32), following).parts


@each(SMALL)
def test_the_compiled_kernel_attends_to_the_cache(case, kernel, interpreted):
    from pallas_kernels.attention import decode

    args = arguments(case)
    (got, parts), cache = interpreted(kernel, case, *args)
    named = options_of(case)
    (want, _), want_cache = decode.attend_reference(*args, **named)
    if case["rank"]:
        assert_parts(parts, prepared(got, named["following"]))
    # Queries and weights are rounded to the dtype: values of up to 4, weighed.
    unit = 2.0 ** -(8 if case["dtype"] == "bfloat16" else 11)
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), atol=4 * unit, rtol=unit
    )
    for ours, theirs in zip(cache, want_cache, strict=True):
        # A product and a sum may be one rounding on the device.
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2 * unit
        )
        assert jax.numpy.count_nonzero(ours != theirs) <= ours.shape[1] * 8


@each(REAL)
def test_attention_at_real_sizes(case, kernel):
    kernel.assert_fits(threads=128)
    # No slice of the cache is copied; the results of the splits are small.
    rows, heads, _, width, _ = case["sizes"]
    results = 4 * rows * heads * (width + 2) * case["splits"]
    assert kernel.temporaries <= results + 4096


def test_an_older_device_compiles_it_without_spills(compile_kernels):
    (kernel,) = compile_kernels([REAL[0]], "a100-80")
    kernel.assert_fits(threads=128, shared=101376)
