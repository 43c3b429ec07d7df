"""The stack of packed weights that the tests read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

LAYERS = 3


@pytest.fixture(scope="session")
def stack(random_packed: Callable[..., tuple]) -> Callable[..., tuple]:
    """Makes the arrays of a stack of three layers."""

    return functools.partial(random_packed, layers=LAYERS)


@pytest.fixture(scope="session")
def layer_of() -> Callable[[Any, int], Any]:
    """Cuts a layer out of the arrays of a stack."""
    return lambda packed, layer: jax.tree.map(lambda leaf: leaf[layer], packed)
