"""Joined products of adapted layers are the layers one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm import reference
from qlora_jax import nf4
from qlora_jax.models.joined import (
    can_fuse_norm,
    can_join,
    joined_linear,
    normed_linear,
)
from qlora_jax.models.layers import ModuleAdapter, linear, rms_norm
from tests.models.test_layers import DORA, RESIDUAL, draw

IN = 64


def layer(out, rank, seed, *, scaling=2.0, bias=False, double_quant=True):
    """A packed layer as `Linear.function` gives it."""
    weight = nf4.quantize(
        np.asarray(0.1 * draw(out, IN, seed=seed)), double_quant=double_quant
    )
    factors = {
        "lora_A": draw(rank, IN, seed=seed + 1),
        "lora_B": draw(out, rank, seed=seed + 2),
    }
    return partial(
        linear,
        weight=jax.tree.map(jnp.asarray, weight),
        bias=draw(out, seed=seed + 3) if bias else None,
        adapter=ModuleAdapter(factors, scaling),
        implementation=None,
        saved=False,
    )


def with_adapter(layer, **changes):
    adapter = layer.keywords["adapter"]._replace(**changes)
    return partial(layer, adapter=adapter)


CASES = {
    # q, k and v: of other widths and ranks, one of them without its share of a scaling.
    "wider than the input": [layer(96, 4, 0), layer(32, 3, 10, scaling=0.5)],
    "alike, for interleaving": [layer(48, 4, 20), layer(48, 4, 30, double_quant=False)],
    "narrower than the input": [layer(24, 4, 40)],
    "as wide as the input": [layer(64, 5, 50)],
    "no wider together": [layer(24, 4, 110, bias=True), layer(40, 3, 120)],
    "narrow, for interleaving": [layer(24, 4, 130), layer(24, 17, 140)],
    "a rank beyond the padding": [layer(80, 17, 60), layer(16, 16, 70)],
    "with biases": [layer(96, 4, 80, bias=True), layer(32, 4, 90, bias=True)],
    "a traced scaling": [layer(96, 4, 100, scaling=jnp.float32(1.5))],
}


def outputs_and_gradients(function, layers, x, cotangents):
    def of_factors(x, factors):
        bound = [
            with_adapter(one, arrays=arrays)
            for one, arrays in zip(layers, factors, strict=True)
        ]
        return function(x, bound)

    factors = [one.keywords["adapter"].arrays for one in layers]
    y, pullback = jax.vjp(of_factors, x, factors)
    return y, pullback(cotangents)


@pytest.mark.parametrize(
    ("case", "interleaved"),
    [
        *((case, False) for case in CASES),
        ("alike, for interleaving", True),
        ("narrow, for interleaving", True),
    ],
)
def test_outputs_and_gradients_are_those_of_the_layers(case, interleaved):
    layers = CASES[case]
    widths = [one.keywords["weight"].shape[0] for one in layers]
    x = draw(2, 7, IN, seed=5)
    cotangents = [draw(2, 7, width, seed=width) for width in widths]
    joined = partial(joined_linear, interleaved=interleaved)
    found = outputs_and_gradients(joined, layers, x, cotangents)
    one_by_one = lambda x, layers: [one(x) for one in layers]  # noqa: E731
    expected = outputs_and_gradients(one_by_one, layers, x, cotangents)
    # Float32 sums over at most 128 + 33 terms in another order: 161 roundings of 6e-8.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * abs(b).max()
        ),
        found,
        expected,
    )


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_with_the_norm_they_are_the_norm_and_the_layers(interleaved, offset):
    layers = CASES["alike, for interleaving" if interleaved else "with biases"]
    x, weight = draw(2, 7, IN, seed=5), draw(IN, seed=9)
    widths = [one.keywords["weight"].shape[0] for one in layers]
    cotangents = [draw(2, 7, width, seed=width) for width in (*widths, IN)]

    def of_norm(function):
        def call(both, layers):
            x, weight = both
            norm = partial(rms_norm, weight=weight, eps=1e-5, offset=offset)
            outputs, x = function(x, norm, layers)
            return [*outputs, 3 * x]

        return outputs_and_gradients(call, layers, (x, weight), cotangents)

    found = of_norm(partial(normed_linear, interleaved=interleaved))
    expected = of_norm(lambda x, norm, layers: ([one(norm(x)) for one in layers], x))
    # As above.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * abs(b).max()
        ),
        found,
        expected,
    )


@pytest.mark.parametrize("offset", [False, True])
def test_the_norm_has_the_bits_of_the_one_that_is_not_fused(offset):
    x, weight = draw(8, IN, seed=1).astype(jnp.bfloat16), draw(IN, seed=2)
    named = {"eps": 1e-5, "offset": offset}
    expected = rms_norm(x, weight, **named)
    np.testing.assert_array_equal(reference.rms_norm(x, weight, **named), expected)


def test_a_norm_is_fused_only_where_a_is_part_of_the_input():
    wide, narrow = "wider than the input", "narrower than the input"
    assert can_fuse_norm(CASES[wide]) and not can_fuse_norm(CASES[narrow])


def test_in_bfloat16_an_update_is_rounded_once_less():
    (one,) = CASES["a traced scaling"]
    x = draw(64, IN, seed=6)
    exact = one(x)
    errors = [
        jnp.abs(y.astype(jnp.float32) - exact).mean()
        for y in (
            one(x.astype(jnp.bfloat16)),
            joined_linear(x.astype(jnp.bfloat16), [one])[0],
        )
    ]
    assert errors[1] <= errors[0]


# What a joined product has no columns for.
OTHERS = {
    "dense": partial(CASES["as wide as the input"][0], weight=draw(64, IN)),
    "kernels": partial(CASES["as wide as the input"][0], implementation="pallas"),
    "dora": with_adapter(CASES["as wide as the input"][0], arrays=DORA),
    "residual": with_adapter(CASES["as wide as the input"][0], residual=RESIDUAL),
    "no adapter": with_adapter(CASES["as wide as the input"][0], arrays={}),
    "dropout": with_adapter(
        CASES["as wide as the input"][0], dropout=0.1, key=jax.random.key(0)
    ),
    "an adapter for each row": with_adapter(
        CASES["as wide as the input"][0],
        arrays={
            "lora_A": draw(2, 4, IN),
            "lora_B": draw(2, 64, 4),
            "rows": jnp.ones(2),
        },
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_layers_are_not_joined(case):
    plain = CASES["as wide as the input"][0]
    assert can_join([plain])
    # Dropout that is not active, in evaluation, does not count.
    assert can_join([with_adapter(plain, dropout=0.1)])
    assert not can_join([plain, OTHERS[case]])
