"""The implementations of attention, and inputs to compare them on."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(
    params=[
        "reference",
        "xla",
        pytest.param("interpret", marks=pytest.mark.interpret),
        pytest.param("pallas", marks=pytest.mark.gpu),
    ]
)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple]:
    """Draws q, k, v and the derivative of the output."""

    def draw(
        length, *, batch=1, heads=2, groups=1, width=64, dtype="bfloat16", seed=0
    ) -> tuple:
        rng = np.random.default_rng(seed)
        return tuple(
            jnp.asarray(rng.standard_normal((batch, length, count, width)), dtype)
            for count in (heads, groups, groups, heads)
        )

    return draw


def spans(*lengths: tuple[int, int]) -> np.ndarray:
    """Segment ids of a row from (id, length)."""
    return np.concatenate([np.full(length, name) for name, length in lengths])


SEGMENTS = {
    # Documents that end within a block, and padding behind: the last block holds both.
    "packed": spans((1, 100), (2, 190), (3, 40), (0, 54)),
    "left padding": spans((0, 140), (1, 244)),
    "a block within a document": spans((1, 20), (2, 364)),
    # Ids need not ascend, nor the tokens of one be contiguous.
    "any order": spans((7, 130), (-3, 60), (7, 100), (2**31 - 1, 94)),
    "all padding": spans((0, 384)),
}
OTHER_SEGMENTS = {
    "one": np.ones(384, int),
    "random": np.random.default_rng(0).integers(0, 9, 384),
    "many": np.repeat(np.arange(48) + 1, 8),
}


@pytest.fixture(scope="session")
def packed_row() -> np.ndarray:
    """Segment ids of a row of 384 packed tokens."""
    return SEGMENTS["packed"]


@pytest.fixture(params=SEGMENTS)
def segment_row(request: pytest.FixtureRequest) -> tuple[str, np.ndarray]:
    """A kind of row of 384 tokens, and its segment ids."""
    return request.param, SEGMENTS[request.param]


@pytest.fixture(params=SEGMENTS | OTHER_SEGMENTS)
def any_row(request: pytest.FixtureRequest) -> tuple[str, np.ndarray]:
    """Rows with one, many and scattered segments as well."""
    return request.param, (SEGMENTS | OTHER_SEGMENTS)[request.param]
