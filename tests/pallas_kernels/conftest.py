"""Random packed weights, a simulated GPU, and the interpreter's race detector."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Nested, device


@pytest.fixture(
    params=[
        "xla",
        pytest.param("interpret", marks=pytest.mark.interpret),
        pytest.param("pallas", marks=pytest.mark.gpu),
    ]
)
def implementation(request: pytest.FixtureRequest) -> str:
    """The implementations of the operations."""
    return request.param


@pytest.fixture(
    params=[
        pytest.param("interpret", marks=pytest.mark.interpret),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def interpret(request: pytest.FixtureRequest) -> Any:
    """How a kernel runs that is called by itself."""
    return device.interpreter() if request.param == "interpret" else False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("interpret") and not device.jax_has_kernels():
        pytest.skip("the kernels need jax 0.11, which Python 3.11 cannot have")


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # The detector of the last kernel interpreted; None before any.
    races = gpu_callbacks._races
    return races is not None and races.races_found


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Fails where the interpreter saw two threads meet without a barrier between."""
    yield
    if device.jax_has_kernels():
        assert not races_found()


@pytest.fixture
def detects_race() -> Callable[..., bool]:
    """Returns whether a kernel has a race, which the next test must not see."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    def detects(kernel: Callable, *arguments: Any, **named: Any) -> bool:
        try:
            jax.block_until_ready(kernel(*arguments, **named))
            detected = races_found()
        except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops at the first
            detected = "RACE DETECTED" in str(error)
        gpu_callbacks.reset_gpu_interpret_mode_state()
        return detected

    return detects


@pytest.fixture
def simulate_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the device a GPU of this compute capability, and of measured data."""

    def simulate(capability: str = "9.0", tuned: dict[str, Any] | None = None) -> None:
        gpu = SimpleNamespace(
            platform="gpu", compute_capability=capability, device_kind="simulated"
        )
        monkeypatch.setattr(device, "this_device", lambda: gpu)
        monkeypatch.setattr(device, "tuned", lambda kind, operation: tuned or {})
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    return simulate


@pytest.fixture(scope="session")
def random_packed() -> Callable[..., tuple]:
    """Makes codes, scales and second level in the layout of a shape."""

    def make(shape, *, nested: bool, layers: int | None = None, seed=0) -> tuple:
        rng = np.random.default_rng(seed)
        size = shape[0] * shape[1]
        blocks = -(-size // 64)
        leading = () if layers is None else (layers,)
        flat = shape[1] % 64 != 0
        codes_shape = (-(-size // 2),) if flat else (shape[0], shape[1] // 2)
        scales_shape = (blocks,) if flat else (shape[0], shape[1] // 64)
        scales_shape = (*leading, *scales_shape)
        codes = rng.integers(0, 256, (*leading, *codes_shape), dtype=np.uint8)
        absmax = rng.uniform(0.01, 0.1, scales_shape).astype(np.float32)
        second = None
        if nested:
            absmax = rng.integers(0, 256, scales_shape, dtype=np.uint8)
            second = Nested(
                rng.uniform(0.001, 0.02, (*leading, -(-blocks // 256))),
                rng.uniform(0.04, 0.06, leading),
                np.sort(rng.uniform(-1, 1, (*leading, 256))),
            )
            second = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), second)
        return jnp.asarray(codes), jnp.asarray(absmax), second

    return make


@pytest.fixture
def unchecked() -> Callable[[Callable], Callable]:
    """Takes jaxtyping's check, which only the tests have, away from a function."""
    return lambda function: getattr(function, "__wrapped__", function)
