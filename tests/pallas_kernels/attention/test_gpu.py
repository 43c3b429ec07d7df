"""Attention by its formula and by the kernels, against float64.

"interpret" runs the GPU kernels' own programs, block by block and with a detector of
races, wherever jax can (0.11 and newer). tests/compile holds what they are compiled to.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device as devices
from pallas_kernels import flash_attention
from pallas_kernels.attention import api
from pallas_kernels.attention.xla import reference_attention
from pallas_kernels.device import jax_has_kernels

NEW_JAX = jax_has_kernels()
OLD = "the kernels need jax 0.11, which Python 3.11 cannot have"
INTERPRETED = [pytest.mark.interpret, pytest.mark.skipif(not NEW_JAX, reason=OLD)]
IMPLEMENTATIONS = [
    "reference",
    "xla",
    pytest.param("interpret", marks=INTERPRETED),
    pytest.param("pallas", marks=pytest.mark.gpu),
]


def kernels(test):
    """Marks what runs the kernels in the interpreter."""
    return pytest.mark.interpret(pytest.mark.skipif(not NEW_JAX, reason=OLD)(test))


def inputs(length, *, batch=1, heads=2, groups=1, width=64, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)

    def draw(count):
        return jnp.asarray(rng.standard_normal((batch, length, count, width)), dtype)

    return draw(heads), draw(groups), draw(groups), draw(heads)


def exact(q, k, v, dout, segments=None):
    """Output, its gradients and the log-sum-exp in float64, one head at a time."""
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    batch, length, heads, width = q.shape
    shared_by = heads // k.shape[2]
    seen = np.tril(np.ones((batch, length, length), bool))
    if segments is not None:
        ids = np.asarray(segments)
        seen &= ids[:, :, None] == ids[:, None, :]
    out, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
    lse = np.zeros((batch, heads, length))
    for b, n in np.ndindex(batch, heads):
        g = n // shared_by
        scores = np.where(seen[b], q[b, :, n] @ k[b, :, g].T / width**0.5, -np.inf)
        lse[b, n] = np.logaddexp.reduce(scores, axis=1)
        weights = np.exp(scores - lse[b, n][:, None])
        out[b, :, n] = weights @ v[b, :, g]
        dweights = dout[b, :, n] @ v[b, :, g].T
        inner = (weights * dweights).sum(1, keepdims=True)
        dscores = weights * (dweights - inner) / width**0.5
        dq[b, :, n] = dscores @ k[b, :, g]
        dk[b, :, g] += dscores.T @ q[b, :, n]
        dv[b, :, g] += weights.T @ dout[b, :, n]
    return out, dq, dk, dv, lse


def races():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # The detector of the last kernel interpreted; None before any.
    seen = gpu_callbacks._races
    return seen is not None and seen.races_found


@pytest.fixture(autouse=True)
def no_races():
    """Fails where the interpreter saw two threads meet without a barrier between."""
    yield
    if NEW_JAX:
        assert not races()


def output_and_gradients(q, k, v, dout, segments, *, implementation):
    # Not as one program: the interpreter takes a CPU for each of two warpgroups, and
    # the program that starts it a third, or all wait for ever.
    def call(q, k, v):
        return flash_attention(q, k, v, segments, implementation=implementation)

    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)


def check(implementation, q, k, v, dout, segments=None):
    """Compares output and gradients with those in float64.

    Softmax weights (which sum to one), their gradients and the results are rounded to
    bfloat16: three half-ulps of the largest element; sums are float32.
    """
    got = output_and_gradients(q, k, v, dout, segments, implementation=implementation)
    want = exact(q, k, v, dout, segments)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want[:4], strict=True):
        assert a.dtype == q.dtype and a.shape == b.shape
        worst = np.abs(np.asarray(a, np.float64) - b).max()
        assert worst <= 3 * 2.0**-8 * max(1.0, np.abs(b).max()), (name, worst)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "length, width, heads, groups",
    [
        (384, 64, 1, 1),  # more steps than buffers
        (256, 128, 2, 1),
        (1, 64, 2, 2),
        (200, 128, 1, 1),  # no multiple of a block
    ],
)
def test_output_and_gradients(implementation, length, width, heads, groups):
    case = inputs(length, heads=heads, groups=groups, width=width)
    check(implementation, *case)


def spans(*lengths):
    """Segment ids of a row from (id, length)."""
    return np.concatenate([np.full(length, name) for name, length in lengths])


SEGMENTS = {
    # Documents that end within a block, and padding behind: the last block holds both.
    "packed": spans((1, 100), (2, 190), (3, 40), (0, 54)),
    "left padding": spans((0, 140), (1, 244)),
    "a block within a document": spans((1, 20), (2, 364)),
    # Ids need not ascend, nor the tokens of one stand together.
    "any order": spans((7, 130), (-3, 60), (7, 100), (2**31 - 1, 94)),
    "all padding": spans((0, 384)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", SEGMENTS)
def test_a_query_sees_its_own_segment_only(implementation, kind):
    segments = jnp.asarray(SEGMENTS[kind][None], jnp.int32)
    width = 128 if kind == "packed" else 64
    heads = 2 if kind == "packed" else 1
    check(implementation, *inputs(384, heads=heads, width=width), segments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_a_batch_have_their_own_segments(implementation):
    rows = [SEGMENTS["packed"][:150], SEGMENTS["left padding"][:150]]
    segments = jnp.asarray(np.stack(rows), jnp.int32)
    check(implementation, *inputs(150, batch=2, heads=4, groups=2), segments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    q, k, v, dout = inputs(256, heads=1)
    q, k = 30 * q, 30 * k
    segments = jnp.asarray(SEGMENTS["packed"][None, :256], jnp.int32)
    got = output_and_gradients(q, k, v, dout, segments, implementation=implementation)
    want = exact(q, k, v, dout, segments)
    # Scores reach 5,000, where half an ulp of float32 is 2e-4: so is the error of a
    # weight, much below its rounding to bfloat16. Gradients of q and k are differences
    # of weights times 30.
    for a, b in zip(got, want[:4], strict=True):
        worst = np.abs(np.asarray(a, np.float64) - b).max()
        assert worst <= 4 * 2.0**-8 * max(1.0, np.abs(b).max())


@pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name != "xla"]
)
def test_the_log_sum_exp_is_exact(implementation):
    q, k, v, dout = inputs(256)
    segments = jnp.asarray(SEGMENTS["packed"][None, :256], jnp.int32)
    if implementation == "reference":
        _, lse = reference_attention(q, k, v, segments)
    else:
        from pallas_kernels.attention import gpu
        from pallas_kernels.device import interpreter

        interpret = interpreter() if implementation == "interpret" else False
        _, lse = gpu.forward(q, k, v, segments, interpret=interpret)
    assert lse.dtype == jnp.float32
    # Products of bfloat16 are exact in float32; 64 terms and 256 exponentials, whose
    # approximations on a GPU are good to 2^-22.
    np.testing.assert_allclose(lse, exact(q, k, v, dout, segments)[4], atol=1e-5)


@kernels
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("width", [64, 128])
def test_any_tiles_give_the_result(stages, width):
    from pallas_kernels.attention import gpu
    from pallas_kernels.device import interpreter

    q, k, v, dout = inputs(384, heads=1)
    segments = jnp.asarray(SEGMENTS["packed"][None], jnp.int32)
    tiles = gpu.Tiles(width, stages)
    out, lse = gpu.forward(q, k, v, segments, tiles=tiles, interpret=interpreter())
    gradients = gpu.backward(
        *(q, k, v, segments, out, lse, dout),
        query_tiles=tiles,
        key_tiles=tiles,
        interpret=interpreter(),
    )
    # As in `check`.
    want = exact(q, k, v, dout, segments)
    for a, b in zip((out, *gradients), want[:4], strict=True):
        worst = np.abs(np.asarray(a, np.float64) - b).max()
        assert worst <= 3 * 2.0**-8 * max(1.0, np.abs(b).max())


@kernels
def test_the_detector_sees_a_missing_barrier(monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.attention import gpu
    from pallas_kernels.device import interpreter

    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    q, k, v, _ = inputs(384, heads=1)
    try:
        gpu.forward(q, k, v, None, interpret=interpreter())[0].block_until_ready()
        found = races()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops at the first
        found = "RACE DETECTED" in str(error)
    assert found
    gpu_callbacks.reset_gpu_interpret_mode_state()


# --- Which blocks are looked at ---


@kernels
@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("other", [64, 128])
@pytest.mark.parametrize("kind", [*SEGMENTS, "one", "random", "many"])
def test_no_block_that_is_seen_is_left_out(kind, other, queries):
    from pallas_kernels.attention.blocks import BLOCK, reach

    rng = np.random.default_rng(0)
    ids = {
        "one": np.ones(384, int),
        "random": rng.integers(0, 9, 384),
        "many": np.repeat(np.arange(48) + 1, 8),
    } | SEGMENTS
    segments = ids[kind][None]
    seen = np.tril(segments[0][:, None] == segments[0][None, :])
    seen = seen if queries else seen.T  # [own, other]
    blocks = seen.reshape(384 // BLOCK, BLOCK, 384 // other, other)
    some, whole = blocks.any((1, 3)), blocks.all((1, 3))
    found = reach(jnp.asarray(segments, jnp.int32), BLOCK, other, queries=queries)
    for own in range(384 // BLOCK):
        first, last, clear_from, clear_to = (int(limit[0, own]) for limit in found)
        assert first <= last
        assert not some[own, :first].any() and not some[own, last + 1 :].any()
        assert whole[own, max(first, clear_from) : min(last + 1, clear_to)].all()
        if kind != "random":  # contiguous or nearly: not a block too many
            assert some[own, first] and some[own, last]
        if kind == "one" or (kind == "a block within a document" and own > 0):
            # The diagonal, and the one block that holds two documents.
            masked = (last + 1 - first) - max(0, clear_to - max(first, clear_from))
            assert masked <= BLOCK // other * (1 if kind == "one" else 2)


@kernels
@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("other", [64, 128])
def test_rows_of_one_segment_need_no_search(other, queries):
    from pallas_kernels.attention.blocks import BLOCK, causal_reach, reach

    ones = jnp.ones((2, 640), jnp.int32)
    searched = reach(ones, BLOCK, other, queries=queries)
    known = causal_reach(2, 640, BLOCK, other, queries=queries)
    for a, b in zip(searched, known, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- What is kept for the backward ---


@pytest.mark.parametrize(
    "implementation", [pytest.param("interpret", marks=INTERPRETED)]
)
def test_the_backward_keeps_no_scores(implementation):
    q, k, v, _ = inputs(384)
    kept = jax.eval_shape(
        lambda q, k, v: jax.vjp(
            lambda q, k, v: flash_attention(q, k, v, implementation=implementation),
            *(q, k, v),
        )[1],
        *(q, k, v),
    )
    # q, k, v, the output and a float32 for each query and head.
    most = 2 * q.nbytes + 2 * k.nbytes + 4 * q.size // q.shape[-1]
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept)) <= most


@kernels
def test_a_policy_can_keep_what_the_backward_needs(monkeypatch):
    q, k, v, _ = inputs(128, heads=1)
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(devices, "this_device", lambda: hopper)

    def forwards(policy):
        def loss(q, k, v):
            call = functools.partial(flash_attention, implementation="pallas")
            return jax.checkpoint(call, policy=policy)(q, k, v).astype("float32").sum()

        program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
        return count(program.jaxpr)

    def count(program):
        total = 0
        for equation in program.eqns:
            total += equation.params.get("name") == "attention_forward"
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(inner, "eqns"):
                    total += count(getattr(inner, "jaxpr", inner))
        return total

    names = "attention_out", "attention_lse"
    assert forwards(jax.checkpoint_policies.save_only_these_names(*names)) == 1
    assert forwards(jax.checkpoint_policies.save_only_these_names(names[0])) == 2


# --- What is refused ---


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"k": (1, 9, 1, 64)},
            "batch, length and head_dim of the queries",
        ),
        (
            {"v": (1, 8, 1, 128)},
            "batch, length and head_dim of the queries",
        ),
        (
            {"q": (1, 8, 3, 64), "k": (1, 8, 2, 64), "v": (1, 8, 2, 64)},
            "cannot share 2",
        ),
        ({"q": (1, 0, 2, 64), "k": (1, 0, 1, 64), "v": (1, 0, 1, 64)}, "is empty"),
        ({"segment_ids": (1, 9)}, "for every token, \\(1, 8\\)"),
        ({"implementation": "triton"}, "does not exist. Choose 'reference'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (1, 8, 2, 64), "k": (1, 8, 1, 64), "v": (1, 8, 1, 64)} | change
    named = {
        name: jnp.zeros(shape, jnp.int32 if name == "segment_ids" else jnp.bfloat16)
        for name, shape in shapes.items()
        if name != "implementation"
    }
    with pytest.raises(ValueError, match=message):
        # The annotations would refuse the shapes first, in their own words.
        flash_attention.__wrapped__(
            **named, implementation=change.get("implementation", "xla")
        )


def test_one_dtype_for_all():
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match="one dtype, got bfloat16, float32 and bfl"):
        flash_attention(q, k.astype(jnp.float32), v, implementation="xla")


@kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "float32"}, "compute in bfloat16, not float32. Use 'xla'"),
        ({"width": 96}, "support a head_dim of 64 or 128, not 96"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, message):
    q, k, v, _ = inputs(8, **change)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, implementation="interpret")


def test_kernels_that_cannot_run_here_say_why():
    if jax.default_backend() == "gpu":
        pytest.skip("they can")
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match=r"need an NVIDIA GPU|jax 0\.11"):
        flash_attention(q, k, v, implementation="pallas")


@kernels
@pytest.mark.parametrize("capability", ["8.0", "10.0", ""])
def test_another_gpu_than_hopper_is_refused(capability, monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(devices, "this_device", lambda: device)
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match=f"has {capability or 'none'}. Use 'xla'"):
        flash_attention(q, k, v, implementation="pallas")


# --- What is chosen ---


def test_nothing_measured_means_the_formula():
    assert devices.tuned("A device that nobody has measured", "attention") == {}
    q, k, v, _ = inputs(8)
    assert not api.measured(q) or jax.default_backend() == "gpu"


@kernels
def test_the_kernels_are_chosen_from_the_measured_length_on(monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="X")
    monkeypatch.setattr(devices, "this_device", lambda: device)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lengths = {"64 packed": 128, "64 whole": None, "128 whole": 1}
    table = {"from_length": lengths}
    monkeypatch.setattr(devices, "tuned", lambda kind, operation: table)
    ids = {n: jnp.ones((1, n), jnp.int32) for n in (127, 128)}
    short, long, wide = inputs(127)[0], inputs(128)[0], inputs(128, width=128)[0]
    assert [api.measured(short, ids[127]), api.measured(long, ids[128])] == [
        False,
        True,
    ]
    assert not api.measured(long) and api.measured(wide)
    assert not api.measured(wide, ids[128])
    assert not api.measured(wide.astype(jnp.float32))
