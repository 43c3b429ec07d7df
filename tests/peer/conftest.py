"""The peers, imported when a test asks for them: torch, transformers, PEFT, bnb.

They are in an environment of their own (`make peer`); elsewhere these tests are not
selected.
"""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama


def peer(name: str) -> ModuleType:
    with warnings.catch_warnings():  # what peers say about each other's versions
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    module = peer("torch")
    module.set_num_threads(2)
    return module


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    module = peer("transformers")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="session")
def peft() -> ModuleType:
    return peer("peft")


@pytest.fixture(scope="session")
def bitsandbytes() -> ModuleType:
    return peer("bitsandbytes")


@pytest.fixture
def theirs(torch, transformers, peft, bitsandbytes) -> Callable[..., Any]:
    """A function: directory -> transformers' model; no tensor missing or left over."""

    def load(path: Path, dtype: str = "float32") -> Any:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
        )
        assert not any(info.values()), info
        return model

    return load


@pytest.fixture
def their_logits(torch, tokens) -> Callable[[Any], np.ndarray]:
    """A function: model -> logits of `tokens`.

    In training mode, which without dropout computes the same: in evaluation mode
    bitsandbytes computes in bfloat16 on a CPU that has it, and repacks the weights.
    """

    def logits(model: Any) -> np.ndarray:
        model.train()
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))
            return model(input_ids=ids, use_cache=False).logits.numpy()

    return logits


@pytest.fixture
def our_logits(tokens) -> Callable[..., np.ndarray]:
    """A function: (directory of the base, adapter directory) -> logits of `tokens`."""

    def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
        config, base = convert.load_llama(path, quantization=None)
        variables: dict[str, Any] = {"params": base}
        lora = None
        if adapter is not None:
            lora, variables["lora"] = convert.load_adapter(adapter, config)
        run = jax.jit(Llama(config, Compute(dtype="float32", lora=lora)).apply)
        return np.asarray(run(variables, jnp.asarray(tokens, jnp.int32)))

    return logits


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Token ids [2, 40] of every test model's vocabulary."""
    return np.random.default_rng(0).integers(1, 1000, (2, 40)).astype(np.int32)
