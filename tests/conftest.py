"""Settings and fixtures for every test.

Strict by default: dtype promotion and rank promotion raise, warnings are errors
(pyproject.toml), annotations are checked. No network, no accelerator unless
JAX_PLATFORMS asks for one, no compilation cache from an earlier run.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

# Before jax is imported, and inherited by the processes a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and types of the three packages are checked while the tests run. An int may
# stand where a float is asked for (PEP 484). Here and not as an option of the command
# line, because jaxtyping's option cannot take both an argument and several packages.
install_import_hook(
    ("qlora_jax", "pallas_kernels", "convert"),
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints, texts and stored outputs beside the repository.

    A test that needs it is skipped where it is absent, and fails there under CI=true:
    a green run that compared nothing would say more than it knows.
    """
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        reason = f"no test data: `{folder}` does not exist"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """Trained checkpoints and real text."""
    return shared / "data"


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Stored outputs of HF, PEFT and bitsandbytes."""
    return shared / "golden"


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that gives a fresh PRNG key at each call, the same in each run."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))
