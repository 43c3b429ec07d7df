"""What a run was started with: to continue it, all of this has to be the same."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import Any

from qlora_jax.checkpoint import Checkpoints, compare_records
from qlora_jax.data import Examples, Mixture
from qlora_jax.data.settings import PLACES
from qlora_jax.errors import UserError
from qlora_jax.runfile import RunConfig
from qlora_jax.train import TrainState

# Fields of a LoraConfig that say where its base is found, and which it was.
_OF_THE_BASE = (
    *("base_model_name_or_path", "revision", "base_fingerprint"),
    "base_config_changes",
)


def run_record(
    config: RunConfig, fingerprint: str, examples: Examples | Mixture
) -> dict[str, Any]:
    """What has to stay the same for a run to be continued."""
    train = dataclasses.asdict(config.train)
    # The length may change: batches are a function of their index alone.
    del train["steps"], train["epochs"]
    lora = dataclasses.asdict(config.lora)
    for name in (*_OF_THE_BASE, "task_type"):
        del lora[name]
    lora["trainable_token_indices"] = config.lora.token_rows
    if not isinstance(lora["target_modules"], str):
        lora["target_modules"] = sorted(lora["target_modules"])
    # Where the files lie may change; what is in them is in the fingerprint.
    data = dataclasses.asdict(config.data)
    for name in PLACES:
        del data[name]
    return {
        "base_fingerprint": fingerprint,
        "data": {"fingerprint": examples.report.fingerprint, **data},
        "lora": lora,
        "train": train,
        "model": {
            "dtype": config.model.dtype,
            "quantization": config.model.quantization,
            **config.model.config_changes,
        },
    }


def continue_run(
    checkpoints: Checkpoints, state: TrainState, record: Mapping[str, Any], steps: int
) -> tuple[TrainState, int]:
    """The newest saved state and its number of steps; else the given one and 0."""
    newest = checkpoints.latest()
    if newest is None:
        return state, 0
    saved = checkpoints.record(newest)
    start, length = saved.pop("batches"), saved.pop("steps")
    compare_records(saved, record)
    if start > steps:
        raise UserError(
            f"This run has taken {start} steps already, and is now to end after "
            f"{steps}. Raise `steps` or `epochs`, or give another --output-dir."
        )
    if length != steps:
        say(
            f"Note: the run was to take {length} steps and now takes {steps}; from "
            f"here the learning rate is that of a run of {steps} steps."
        )
    if start < steps:
        say(f"Continuing from step {start} of {steps}.")
    return checkpoints.restore(newest, state), start


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("qlora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def say(text: str) -> None:
    """Tells the person who started the run."""
    print(text, file=sys.stderr, flush=True)
