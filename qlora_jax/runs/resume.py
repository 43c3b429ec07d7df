"""Continues a run from its newest intact checkpoint, if nothing essential changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.data import LOCATION_FIELDS
from qlora_jax.errors import CheckpointError, UserError, say
from qlora_jax.runs.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
)
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import ADAPTER, CHECKPOINTS
from qlora_jax.runs.processes import Peers
from qlora_jax.training import TrainState

# Fields of a LoraConfig that name the base. Its weights are in the fingerprint.
_BASE_FIELDS = (
    *("base_model_name_or_path", "revision", "base_fingerprint"),
    "base_config_changes",
)
_DATA = "data.fingerprint"
_MEANINGS = {
    "base_fingerprint": " (the weights of the base, or how they are quantized)",
    _DATA: " (the rows of the data files, the tokenizer, or the chat template)",
}


def run_record(
    config: RunConfig, base_fingerprint: str, data_fingerprint: str
) -> dict[str, Any]:
    """Returns what must be unchanged for a run to be continued.

    It leaves out what does not change the arithmetic: where files are, how long the run
    is, what is saved and shown during it.

    Args:
      config: the run.
      base_fingerprint: of the base as it was loaded.
      data_fingerprint: of the training examples.
    """
    # Everything in here enters the arithmetic unless it is deleted below, so a setting
    # that is new is compared until someone decides otherwise.
    train = dataclasses.asdict(config.train)
    # The length may change: batches are a function of their index alone.
    del train["steps"], train["epochs"]
    lora = dataclasses.asdict(config.lora)
    for name in (*_BASE_FIELDS, "task_type"):
        del lora[name]
    lora["trainable_token_indices"] = config.lora.token_rows
    # A list of names is a set; a string is a regular expression.
    if not isinstance(lora["target_modules"], str):
        lora["target_modules"] = sorted(lora["target_modules"])
    # The files may be moved: their content is in the fingerprint.
    data = dataclasses.asdict(config.data)
    for name in LOCATION_FIELDS:
        del data[name]
    # Of `lm_head` only "nf4" changes numbers; its other values are memories.
    quantized_head = config.model.lm_head == "nf4"
    return {
        "base_fingerprint": base_fingerprint,
        "data": {"fingerprint": data_fingerprint, **data},
        "lora": lora,
        "train": train,
        "model": {
            "dtype": config.model.dtype,
            "quantization": config.model.quantization,
            "lm_head": "nf4" if quantized_head else "auto, device or host",
            **config.model.config_changes,
        },
    }


def compare_records(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises if base, adapter, data or arithmetic of a run have changed.

    Args:
      saved: record of the checkpoint; a nested mapping of plain values.
      current: the record that the run would write.

    Raises:
      UserError: every entry that differs, with both values.
    """
    before, after = _flatten(saved), _flatten(current)
    keys = {key for key in before | after if before.get(key) != after.get(key)}
    if any(key.startswith("data.") for key in keys - {_DATA}):
        keys.discard(_DATA)  # a consequence of the others
    if keys:
        changed = "".join(
            f"\n- {key}: {before.get(key)!r} -> {after.get(key)!r}"
            f"{_MEANINGS.get(key, '')}"
            for key in sorted(keys)
        )
        raise UserError(
            "This run cannot be continued: what it was started with has changed:"
            f"{changed}\nUndo the change to continue, or give another --output-dir to "
            "start a new run."
        )


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns entries by their dotted names, with the values that JSON gives back."""
    entries: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            entries.update(_flatten(value, f"{prefix}{key}."))
        else:
            # A saved record was JSON, in which tuples became lists.
            entries[prefix + key] = json.loads(json.dumps(value))
    return entries


def newest_record(config: RunConfig, peers: Peers) -> dict[str, Any] | None:
    """Returns the record of a run's newest intact checkpoint, if there is one."""
    directory = Path(config.output_dir) / CHECKPOINTS
    with Checkpoints(
        directory, config.checkpoint, peers=peers, cleanup=False
    ) as checkpoints:
        for step in checkpoints.steps():
            with contextlib.suppress(DamagedCheckpointError):
                return checkpoints.record(step)
    return None


def check_continues(
    config: RunConfig,
    saved: Mapping[str, Any],
    data_fingerprint: str | None = None,
    steps: int | None = None,
) -> None:
    """Raises early what `continue_run` would raise once the base is loaded.

    Ignores what the base contains.

    Args:
      config: the run.
      saved: of `newest_record`.
      data_fingerprint: of the training examples; None = not known yet.
      steps: length of the run, likewise.

    Raises:
      UserError: the run was started with something else, or is longer already.
    """
    data = data_fingerprint or saved["data"]["fingerprint"]
    record = run_record(config, saved["base_fingerprint"], data)
    _check_record(saved, record, saved["batches"] if steps is None else steps)


def _check_record(
    saved: Mapping[str, Any], record: Mapping[str, Any], steps: int
) -> tuple[int, int]:
    """Compares a checkpoint's record with the run's.

    Returns:
      The steps that the checkpoint has taken, and those that its run was to take.
    """
    unchanging = dict(saved)
    start, length = unchanging.pop("batches"), unchanging.pop("steps")
    compare_records(unchanging, record)
    if start > steps:
        raise UserError(
            f"This run has taken {start} steps already, and is now to end after "
            f"{steps}. Raise `steps` or `epochs`, or give another --output-dir."
        )
    return start, length


def continue_run(
    checkpoints: Checkpoints, state: TrainState, record: Mapping[str, Any], steps: int
) -> tuple[TrainState, int]:
    """Returns the newest saved state and its number of steps, or `state` and 0.

    A damaged checkpoint is skipped for an older one, and kept under another name.

    Args:
      checkpoints: of the run.
      state: before the first step; has the structure and devices of the result.
      record: from `run_record`.
      steps: length of the run.

    Raises:
      UserError: the run was started with something else, or is longer already.
      CheckpointError: there are checkpoints, and none can be read.
    """
    damaged: dict[int, DamagedCheckpointError] = {}
    for newest in checkpoints.steps():
        try:
            # The small record first. A setting that changed raises here: no older
            # checkpoint would help.
            saved = checkpoints.record(newest)
            start, length = _check_record(saved, record, steps)
            restored = checkpoints.restore(newest, state)
        except DamagedCheckpointError as error:
            damaged[newest] = error
            continue
        # Only now, with an intact one at hand, are the damaged ones renamed.
        for step, error in damaged.items():
            path = checkpoints.set_aside(step)
            say(
                f"{error} It is damaged; it is kept as `{path}`, for you to delete, "
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
