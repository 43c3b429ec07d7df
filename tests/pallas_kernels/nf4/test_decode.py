"""The kernels of a decoded token's linear layers, in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.nf4.reference import Packed
from pallas_kernels.nf4.shapes import MODELS

LAYER = jnp.array([1])


def normal(seed, shape, dtype="bfloat16", scale=1.0):
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def assert_products(
    stack, interpret, shapes, rows, *, ranks=(), plan=None, nested=True, **named
):
    """Compares `products` with the formula on weights that are not rounded."""
    from pallas_kernels.nf4 import decode, decode_plan
    from pallas_kernels.nf4.parts import Following, prepared_reference

    weights = [
        Packed(*stack(shape, nested=nested, seed=i), LAYER)
        for i, shape in enumerate(shapes)
    ]
    dtype = named.pop("dtype", "bfloat16")
    x = normal(1, (rows, shapes[0][1]), dtype)
    updates, offset = [None] * len(shapes), 0
    for i, rank in enumerate(ranks):
        if rank:
            b = normal(10 + i, (3, shapes[i][0], rank), dtype)
            updates[i] = decode.Update(b, offset)
        offset += rank
    named |= {"shapes": shapes, "updates": updates}
    normed = "eps" in named
    if offset or normed:
        blocks = named.pop("blocks", 1)
        parts = normal(2, (blocks, rows, normed + offset), "float32")
        # Squares add up to the width or more: factors of 1 or less.
        squares = abs(parts[:, :, :1]) + shapes[0][1] / blocks
        parts = jnp.concatenate([squares, parts[:, :, 1:]], 2) if normed else parts
        named["parts"] = parts
    if named.pop("biased", False):
        biases = [
            normal(20 + i, (3, shape[0]), dtype) for i, shape in enumerate(shapes)
        ]
        named |= {"biases": [None, *biases[1:]], "multiplier": 0.5}
    if named.pop("residual", False):
        named["residual"] = normal(3, (rows, shapes[0][0]), dtype)
    if follows := named.pop("follows", None):
        rank, norm, ahead = follows
        features = shapes[0][0]
        a = normal(4, (3, features, rank), dtype) if rank else None
        norm = 1 + normal(5, (3, features), dtype, 0.2) if norm else None
        named["following"] = Following(a, norm, ahead)
    plan = None if plan is None else decode_plan.Plan(*plan)
    got, got_next = decode.products(x, weights, plan=plan, interpret=interpret, **named)
    # Not rounded, as x is float32.
    want, _ = decode.products_reference(x.astype("float32"), weights, **named)
    assert got.dtype == dtype and got.shape == want.shape
    # Rounded table values are off by up to a unit of the dtype, in each of 512 or more
    # terms of independent sign and size 0.05: 4 standard deviations of their sum. The
    # result is rounded once, and a gate's error is multiplied by up, which is below 16.
    unit = 2.0 ** -(8 if dtype == "bfloat16" else 11)
    error = 4 * unit * 0.05 * shapes[0][1] ** 0.5 * (16 if named.get("gated") else 1)
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, atol=error, rtol=1.01 * unit
    )
    if (following := named.get("following")) is not None:
        want_next = prepared_reference(got, LAYER, following)
        np.testing.assert_array_equal(got_next.x, want_next.x)
        # Sums of float32 in another order.
        added = (p.parts.sum(axis=0) for p in (got_next, want_next))
        np.testing.assert_allclose(*added, rtol=1e-4, atol=1e-3)


CASES = {
    "side by side, odd ranks, plain scales": (
        *([(32, 256), (16, 256)], 1),
        {"ranks": (5, 0), "nested": False},
    ),
    "float16, more rows than columns of a tile": (
        *([(16, 512)], 9),
        {"dtype": "float16", "ranks": (2,)},
    ),
    "a residual, and a surplus scale": (
        *([(16, 768)], 8),
        {"ranks": (8,), "residual": True, "plan": (1, 3, 1)},
    ),
    "gated": ([(16, 512)] * 2, 3, {"ranks": (4, 4), "gated": True}),
    "one or two units a block of threads, and parts for a norm and adapters": (
        *([(48, 256)], 3),
        {"plan": (1, 1, 2), "residual": True, "follows": (5, True, 1)},
    ),
    "parts of two blocks or more for each thread, and for a norm alone": (
        *([(16, 512)], 16),
        {"ranks": (8,), "eps": 1e-5, "blocks": 19, "follows": (0, True, 2)},
    ),
    "few parts, of a norm and no adapters": (
        *([(16, 256), (32, 256)], 1),
        {"eps": 1e-5, "blocks": 3, "biased": True},
    ),
    "many parts, gated, and parts for adapters": (
        *([(32, 512)] * 2, 1),
        {"ranks": (4, 4), "eps": 1e-5, "blocks": 300, "gated": True}
        | {"follows": (16, False, 0)},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_are_those_of_the_formula(case, stack, interpret):
    assert_products(stack, interpret, *case[:2], **case[2])


@pytest.mark.interpret
def test_the_detector_sees_a_missing_barrier(monkeypatch, stack, detects_race):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.nf4 import decode, decode_plan

    weight = Packed(*stack((16, 512), nested=False), LAYER)
    named = {"shapes": [(16, 512)], "interpret": device.interpreter()}
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    x = jnp.ones((2, 512), jnp.bfloat16)
    plan = decode_plan.Plan(2, 1, 1)
    assert detects_race(decode.products, x, [weight], plan=plan, **named)


@pytest.mark.parametrize(
    ("width", "rank", "norm"), [(384, 3, True), (12288, 2, False), (4096, 0, True)]
)
def test_inner_is_the_norm_and_the_adapters(width, rank, norm, interpret):
    from pallas_kernels.nf4 import inner

    x = normal(1, (2, width), scale=3.0)
    named = {}
    if norm:
        weight = 1 + normal(2, (3, width), scale=0.2)
        named["norm"] = inner.Norm(weight, 1e-5)
    if rank:
        named["a"] = normal(3, (3, rank, width), scale=width**-0.5)
    got = inner.inner(x, LAYER, **named, interpret=interpret)
    want = inner.inner_reference(x, LAYER, **named)
    # A sum of squares in another order may round a normed value the other way.
    near = {"rtol": 2.0**-7, "atol": 1e-6}
    np.testing.assert_allclose(*(y[0].astype(jnp.float32) for y in (got, want)), **near)
    assert (got[1] is None) == (rank == 0)
    if rank:
        # Values of 3, of which few are rounded the other way.
        np.testing.assert_allclose(got[1], want[1], atol=0.02)
        assert got[1].shape == (2, rank)


@pytest.mark.skipif(not device.jax_has_kernels(), reason="needs jax 0.11")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_every_model_has_a_plan_of_all_multiprocessors(model, rows):
    from pallas_kernels.nf4 import decode_plan

    shapes = dict(model.projections[i][:2] for i in range(7))
    for names in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"):
        of_group = [shapes[name] for name in names.split()]
        plan = decode_plan.plan_for(of_group, rows, gated="gate" in names)
        assert plan is not None
        # At least four warpgroups for each of 132 multiprocessors, or for each unit.
        units = sum(shape[0] // 16 for shape in of_group) // (1 + ("gate" in names))
        assert plan.groups * plan.blocks >= 4 * min(132, units)


@pytest.mark.skipif(not device.jax_has_kernels(), reason="needs jax 0.11")
@pytest.mark.parametrize(
    ("shapes", "rows", "gated"),
    [
        ([(64, 512)], 17, False),
        ([(64, 512)], 0, False),
        ([(40, 512)], 1, False),
        ([(64, 96)], 1, False),
        ([(64, 64)], 1, False),
        ([(64, 512), (64, 1024)], 1, False),
        ([(64, 512), (32, 512)], 1, True),
        ([(64, 512)], 1, True),
    ],
)
def test_what_cannot_be_computed_has_no_plan(shapes, rows, gated, stack):
    from pallas_kernels.nf4 import decode, decode_plan

    assert decode_plan.plan_for(shapes, rows, gated=gated) is None
    x = jnp.zeros((rows, shapes[0][1]), jnp.bfloat16)
    with pytest.raises(ValueError, match="`products` cannot compute"):
        decode.products(x, [], shapes=shapes, gated=gated)
