"""The two programs, called as users call them."""

import pytest

from qlora_jax.cli import convert
from qlora_jax.cli import main as qlora_jax


@pytest.fixture
def cli(capsys):
    """A function: arguments of `qlora-jax` -> (status, stdout, stderr)."""

    def cli(*args):
        status = qlora_jax.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return cli


@pytest.fixture
def run(capsys):
    """A function: arguments of `qlora-convert` -> (status, stdout, stderr)."""

    def run(*args):
        status = convert.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run
