"""Runs the scripts in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_jax.models.config import LlamaConfig


@pytest.fixture(scope="session")
def run_script(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script; `alone` leaves it to the script to find the packages."""

    def run(name, *arguments, alone=False, cwd=None, **more):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
        if not alone:
            environment["PYTHONPATH"] = str(repository)
        command = [sys.executable, str(repository / "scripts" / name)]
        command += map(str, arguments)
        settings = {"capture_output": True, "text": True}
        return subprocess.run(command, env=environment, cwd=cwd, **settings)

    return run


@pytest.fixture(scope="session")
def small() -> LlamaConfig:
    """A two-layer Llama; of its weights, down_proj is stored flat."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaConfig(num_hidden_layers=2, **sizes, **heads)
