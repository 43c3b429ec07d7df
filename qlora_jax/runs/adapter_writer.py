"""Writes the adapters of a run, with what they read and write text with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from convert import (
    TRAINING_RECORD,
    parse_hub_name,
    text_files,
    training_record,
    with_chat_template,
    with_end_tokens,
    with_eos_token,
    with_tokenizer_class,
)
from qlora_jax.errors import UserError, say
from qlora_jax.inference import base_form
from qlora_jax.lora import LoraConfig, absorb, select
from qlora_jax.models import (
    LlamaConfig,
    changes_to_json,
    computed_fields,
    to_host,
    undo_changes,
)
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import ADAPTER, ADAPTER_EMA, template_text
from qlora_jax.runs.sources import Sources
from qlora_jax.training import TrainState, averaged


def adapter_files(
    config: RunConfig,
    sources: Sources,
    architecture: LlamaConfig,
    tokenizer: Any,
    trained_ends: Sequence[int],
) -> dict[str, bytes]:
    """Returns the files of a run's adapters other than the adapter itself.

    They are those of the base's tokenizer, or of the adapter that the run starts from,
    with what the run changes: chat template, EOS, and what ends generation.

    Args:
      config: of the run.
      sources: its directories.
      architecture: of its model.
      tokenizer: of the run; None if it has none.
      trained_ends: tokens that the data teach as the end of an answer.

    Raises:
      CheckpointError: a file that cannot be read.
      UserError: the chat template cannot be read.
    """
    files = text_files(sources.base, sources.adapter)
    if tokenizer is not None:
        files = with_tokenizer_class(files, tokenizer)
    template = template_text(config.data, say)
    if template is not None:
        files = with_chat_template(files, template)
    if config.data.eos_token is not None:
        files = with_eos_token(files, config.data.eos_token)
    return with_end_tokens(files, trained_ends, architecture)


@dataclass(frozen=True, kw_only=True)
class AdapterWriter:
    """Writes a run's adapters as PEFT directories for the base as it was loaded."""

    config: RunConfig
    architecture: LlamaConfig
    base: Any
    """Tree that the adapters are trained on."""
    fingerprint: str
    """Of the base as it was loaded."""
    files: Mapping[str, bytes]
    """Tokenizer and templates, by `adapter_files`."""
    base_tables: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    """Weights of the base that are not those of its directory, by module."""
    writes: bool = True
    """Whether this process writes; the others share arrays with it."""

    def write(
        self,
        state: TrainState,
        name: str = ADAPTER,
        losses: Mapping[str, float] | None = None,
    ) -> None:
        """Writes an adapter directory.

        Args:
          state: has the adapters.
          name: of the directory within the run directory.
          losses: of a measurement at this step, for the training record.
        """
        lora, adapters = self._absorbed(state)
        if not self.writes:
            return
        base_name = lora.base_model_name_or_path
        if base_name is None:
            base_name = self.config.model.path
            on_hub = parse_hub_name(base_name)
            if on_hub is not None:  # in two fields, as PEFT reads them
                base_name = on_hub.repo_id
                revision = lora.revision or on_hub.revision
                lora = dataclasses.replace(lora, revision=revision)
        lora = dataclasses.replace(
            lora,
            base_fingerprint=self.fingerprint,
            base_config_changes=changes_to_json(self.config.model.config_changes),
        )
        record = {
            "step": int(state.step),
            **base_form(self.base),
            "config": computed_fields(undo_changes(self.architecture)),
            **(losses or {}),
        }
        convert.save_adapter(
            Path(self.config.output_dir) / name,
            lora,
            adapters,
            self.architecture,
            base_model_name_or_path=base_name,
            overwrite=True,
            extra_files={**self.files, TRAINING_RECORD: record},
            base_tables=self.base_tables,
        )

    def _absorbed(self, state: TrainState) -> tuple[LoraConfig, dict[str, Any]]:
        # With pissa and olora the trained adapter belongs to the changed base; what is
        # written is for the base as it was loaded.
        base = self.base
        if self.config.lora.changes_base:
            base = _residuals_on_host(base)
        return absorb(self.config.lora, to_host(state.adapters), base)

    def say_replaced(self, state: TrainState) -> None:
        """Notes a directory that holds another adapter than the state that is written.

        Args:
          state: of the checkpoint that the run continues from.
        """
        for name, own in self._directories(state).items():
            path = Path(self.config.output_dir) / name
            lora, adapters = self._absorbed(own)
            if not self.writes or not path.is_dir():
                continue
            if self._holds(path, lora, adapters):
                continue
            step = _recorded_step(path)
            by_record = "without the record of a run"
            if step is not None:
                by_record = f"by its {TRAINING_RECORD} that of step {step}"
            say(
                f"Note: `{path}` holds another adapter than the checkpoint of step "
                f"{int(state.step)} that this run continues from ({by_record}): it was "
                "replaced, or the run was killed while it was written. The checkpoint "
                "counts, and the directory will be written over. To train on from the "
                "adapter that is there, stop, copy it, and start another run with it "
                "as `train.adapter_init`."
            )

    def _holds(self, path: Path, lora: LoraConfig, adapters: Any) -> bool:
        """Whether a directory holds an adapter."""
        # Shapes alone: copies of the base's tables are not compared.
        shapes = jax.eval_shape(lambda base: base, self.base)
        try:
            saved_lora, saved = convert.load_adapter(path, shapes)
        except UserError:
            return False
        # What is trained, with every rank and factor, however it is spelled.
        there, here = select(shapes, saved_lora), select(shapes, lora)
        same = dataclasses.replace(there, unmatched=here.unmatched) == here
        return same and all(
            jax.tree.leaves(jax.tree.map(np.array_equal, saved, adapters))
        )

    def _directories(self, state: TrainState) -> dict[str, TrainState]:
        """Returns the directories of every checkpoint, with what each one holds."""
        average = averaged(state.opt_state)
        if average is None:
            return {ADAPTER: state}
        of_average = dataclasses.replace(state, adapters=average)
        return {ADAPTER: state, ADAPTER_EMA: of_average}

    def write_all(self, state: TrainState) -> None:
        """Writes adapter/ and, if the run keeps a moving average, adapter_ema/."""
        for name, own in self._directories(state).items():
            self.write(own, name)


def _residuals_on_host(base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the base with what was factored out of it as host arrays."""
    return {
        name: _residuals_on_host(value)
        if isinstance(value, Mapping)
        else to_host(value)
        if name.startswith("residual_")
        else value
        for name, value in base.items()
    }


def _recorded_step(path: Path) -> int | None:
    try:
        step = training_record(path).get("step")
    except UserError:
        return None
    return step if isinstance(step, int) else None
