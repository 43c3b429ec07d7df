"""The implementations of the NF4 operations, and the stack that tests read."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

LAYERS = 3


@pytest.fixture(
    params=[
        "xla",
        pytest.param("interpret", marks=pytest.mark.interpret),
        pytest.param("pallas", marks=pytest.mark.gpu),
    ]
)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def stack(random_packed: Callable[..., tuple]) -> Callable[..., tuple]:
    """Makes the arrays of a stack of three layers."""

    def make(shape: tuple[int, int], *, nested: bool, seed: int = 0) -> tuple:
        return random_packed(shape, nested=nested, layers=LAYERS, seed=seed)

    return make


@pytest.fixture(scope="session")
def layer_of() -> Callable[[Any, int], Any]:
    """Cuts a layer out of the arrays of a stack."""
    return lambda packed, layer: jax.tree.map(lambda leaf: leaf[layer], packed)
