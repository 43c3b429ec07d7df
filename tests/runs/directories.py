"""What run directories hold, and runs that are disturbed after a step."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
from qlora_jax.lora.init import init_adapters
from qlora_jax.runs.checkpoint import Checkpoints
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.metrics import Watch
from qlora_jax.runs.rows import read_metrics
from qlora_jax.runs.toml import to_toml
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state

# Where one of many reads has failed, those that end after Orbax has closed its event
# loop say so from threads of tensorstore, at a time of their own.
LATE_READS = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


def losses(directory: Path) -> list[tuple[int, float, float]]:
    rows = read_metrics(directory)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def weights(directory: Path, adapter: str = "adapter") -> bytes:
    return (directory / adapter / "adapter_model.safetensors").read_bytes()


def final_state(directory: Path, config: RunConfig):
    """The newest saved state, read without the runner."""
    base = convert.load_llama(config.model.path, quantization=None)[1]
    adapters = init_adapters(jax.random.key(9), base, config.lora)
    like = init_state(adapters, make_optimizer(config.train, 1), jax.random.key(9))
    with Checkpoints(directory / "checkpoints", config.checkpoint) as checkpoints:
        newest = checkpoints.latest()
        assert newest is not None
        state = checkpoints.restore(newest, like)
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def assert_same_trees(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_runs(expected: Path, config: RunConfig) -> None:
    """A finished run is another one to the bit, and has no files that it lacks."""
    actual, steps = Path(config.output_dir), config.train.steps
    assert losses(actual) == losses(expected)
    assert [step for step, _, _ in losses(actual)] == list(range(1, steps + 1))
    assert weights(actual) == weights(expected)
    states = [final_state(directory, config) for directory in (expected, actual)]
    assert int(states[0].step) == steps
    assert_same_trees(*states)
    files = [{path.name for path in run.iterdir()} for run in (expected, actual)]
    assert not files[1] - files[0] and "report.json" in files[1]


@contextlib.contextmanager
def after_step(step: int, disturb: Callable[[], None]) -> Iterator[None]:
    """Runs within are disturbed when a step is noted; the next is under way by then."""
    noted = Watch.step

    def note(self, number, *rest):
        noted(self, number, *rest)
        if number == step:
            disturb()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "step", note)
        yield


def train_in_a_process(config: RunConfig, before: str, cache: str | None = None):
    """Runs `qlora-jax train FILE` in a process of its own, after lines of Python.

    It compiles its program itself, as a user's does, unless told where to find it.
    """
    file = Path(f"{config.output_dir}.toml")
    file.write_text(to_toml(config))
    program = f"{before}\nfrom qlora_jax.cli.main import entry\nentry()"
    known = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": cache}
    return subprocess.run(
        [sys.executable, "-c", program, "train", str(file)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | known,
        timeout=300,
    )
