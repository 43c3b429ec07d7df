"""What a run was started with: to continue it, all of this has to be the same."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.data.arrays import Examples
from qlora_jax.data.config import LOCATION_FIELDS, DataConfig
from qlora_jax.data.mixture import Mixture
from qlora_jax.errors import CheckpointError, UserError, say
from qlora_jax.lora.config import LoraConfig
from qlora_jax.runs.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    compare_records,
)
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import ADAPTER, CHECKPOINTS
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.step import TrainState

# Fields of a LoraConfig that say where its base is found, and which it was.
_OF_THE_BASE = (
    *("base_model_name_or_path", "revision", "base_fingerprint"),
    "base_config_changes",
)


def run_record(
    config: RunConfig, fingerprint: str, examples: Examples | Mixture
) -> dict[str, Any]:
    """What has to stay the same for a run to be continued.

    What does not change the arithmetic is not in it: where files lie, how long the run
    is, what is saved and shown on the way.
    """
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
    for name in LOCATION_FIELDS:
        del data[name]
    return {
        "base_fingerprint": fingerprint,
        "data": {"fingerprint": examples.report.fingerprint, **data},
        "lora": lora,
        "train": train,
        "model": {
            "dtype": config.model.dtype,
            "quantization": config.model.quantization,
            "lm_head": _head(config),
            **config.model.config_changes,
        },
    }


def _head(config: RunConfig) -> str:
    """What `model.lm_head` says about the numbers; its other values are places."""
    return "nf4" if config.model.lm_head == "nf4" else "auto, device or host"


def _before_they_existed(record: Mapping[str, Any]) -> dict[str, Any]:
    """What settings did in runs that were recorded before the settings existed."""
    kinds = {"data": DataConfig, "lora": LoraConfig, "train": TrainConfig}
    defaults: dict[str, Any] = {}
    for section, kind in kinds.items():
        defaults[section] = {}
        for f in dataclasses.fields(kind):
            if f.default_factory is not dataclasses.MISSING:
                value = f.default_factory()
            else:
                value = f.default
            if value is not dataclasses.MISSING:
                defaults[section][f.name] = _plain(value)
    # Nothing told a head in NF4 from another one but the fingerprint of the base.
    defaults["model"] = {"lm_head": record["model"]["lm_head"]}
    return defaults


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def check_continues(
    config: RunConfig, examples: Examples | Mixture, steps: int
) -> None:
    """Refuses early what `continue_run` would refuse once the base is loaded.

    What the base holds is not looked at, and damaged checkpoints are passed over.

    Raises:
      UserError: the run was started with something else, or is longer already.
    """
    directory = Path(config.output_dir) / CHECKPOINTS
    with Checkpoints(directory, config.checkpoint) as checkpoints:
        for newest in checkpoints.steps():
            try:
                saved = checkpoints.record(newest)
            except DamagedCheckpointError:
                continue
            record = run_record(config, saved["base_fingerprint"], examples)
            _check_record(saved, record, steps)
            return


def _check_record(
    saved: dict[str, Any], record: Mapping[str, Any], steps: int
) -> tuple[int, int]:
    """Compares a checkpoint's record with the run; returns its steps and its length."""
    start, length = saved.pop("batches"), saved.pop("steps")
    compare_records(saved, record, _before_they_existed(record))
    if start > steps:
        raise UserError(
            f"This run has taken {start} steps already, and is now to end after "
            f"{steps}. Raise `steps` or `epochs`, or give another --output-dir."
        )
    return start, length


def continue_run(
    checkpoints: Checkpoints, state: TrainState, record: Mapping[str, Any], steps: int
) -> tuple[TrainState, int]:
    """The newest saved state and its number of steps; else the given one and 0.

    A damaged checkpoint is passed over for the one before, and kept under another name.

    Args:
      checkpoints: of the run.
      state: before the first step; its structure and devices are those of the result.
      record: from `run_record`.
      steps: that the run is to take.

    Raises:
      UserError: the run was started with something else, or is longer already.
      CheckpointError: there are checkpoints, and none can be read.
    """
    damaged: dict[int, DamagedCheckpointError] = {}
    for newest in checkpoints.steps():
        try:
            saved = checkpoints.record(newest)
            start, length = _check_record(saved, record, steps)
            restored = checkpoints.restore(newest, state)
        except DamagedCheckpointError as error:
            damaged[newest] = error
            continue
        for step, error in damaged.items():
            place = checkpoints.set_aside(step)
            say(
                f"{error} It is damaged; it is kept as `{place}`, for you to delete, "
                f"and the run goes on from the checkpoint before, of step {start}: "
                f"{step - start} steps are taken again."
            )
        if length != steps:
            say(
                f"Note: the run was to take {length} steps and now takes {steps}; from "
                f"here the learning rate is that of a run of {steps} steps."
            )
        if start < steps:
            say(f"Continuing from step {start} of {steps}.")
        return restored, start
    if damaged:
        directory = checkpoints.directory
        raise CheckpointError(
            f"{' '.join(map(str, damaged.values()))} There is no checkpoint before to "
            f"continue from. Delete `{directory}` and `{directory.parent / ADAPTER}` "
            "to start over; or give another --output-dir and `train.adapter_init` = "
            f"{str(directory.parent / ADAPTER)!r}, which goes on from the adapter of "
            "the newest one, with a fresh optimizer state."
        )
    return state, 0


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
