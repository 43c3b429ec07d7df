"""The steps of a run, and what is done around them.

Notes, checkpoints, adapters, measurements on held-out data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from convert.files import CHAT_TEMPLATE
from convert.peft import TRAINING
from qlora_jax.checkpoint import Checkpoints
from qlora_jax.config import LlamaConfig
from qlora_jax.config_changes import as_text
from qlora_jax.data import Batches, prefetch
from qlora_jax.directories import ADAPTER, ADAPTER_EMA, BEST
from qlora_jax.errors import UserError
from qlora_jax.evaluation import Evaluation
from qlora_jax.interruptions import Interruption
from qlora_jax.lora_init import absorb
from qlora_jax.loss_plot import Redrawing
from qlora_jax.optimizer import averaged
from qlora_jax.runs.config import RunConfig
from qlora_jax.train import TrainState
from qlora_jax.watch import Watch


@dataclass
class Loop:
    """The steps of a run, with what is done around them."""

    config: RunConfig
    architecture: LlamaConfig
    base: Any
    batches: Batches
    step: Callable[..., Any]
    watch: Watch
    checkpoints: Checkpoints
    record: Mapping[str, Any]
    fingerprint: str
    form: Mapping[str, str]
    """How the base is held; see `qlora_jax.provenance.base_form`."""
    interruption: Interruption
    evaluation: Evaluation
    redrawing: Redrawing | None = None
    chat_template: str | None = None
    """Text of the template that the conversations were written with, if it is a file's.
    """

    def take(self, state: TrainState, start: int) -> TrainState:
        """Steps from batch `start` to the end, or to an interruption.

        Saves and measures on the way.
        """
        steps = len(self.batches)
        pending: tuple[int, Any, Any] | None = None
        if start == 0:
            self.look(state, 0)
            self.watch.go_on()
        ahead = prefetch(self.batches, start, steps)
        saved = start
        for index, batch in enumerate(ahead, start):
            if self.evaluation.exhausted:
                break
            state, metrics = self.step(state, self.base, batch)
            # The numbers of the step before are read while this one computes.
            if pending is not None:
                self.note(*pending)
            pending = (index, metrics, batch)
            done = index + 1
            # Asked once: a signal may come at any moment.
            stopping = self.interruption.signal is not None
            due = stopping or done % self.config.checkpoint.every == 0 or done == steps
            if due or self.looks(done):
                self.note(*pending)
                pending = None
                # Before it is saved: a checkpoint stands for all rows up to its step.
                self.look(state, done)
                if due or self.evaluation.exhausted:
                    self.save(state, done)
                    saved = done
                self.watch.go_on()
            if stopping:
                break
        ahead.close()
        self.checkpoints.wait()
        if saved == start:  # stopped between the last checkpoint and the report
            self.export(state)
            self.export_average(state)
        if self.redrawing is not None:
            self.redrawing.wait()
        return state

    def looks(self, done: int) -> bool:
        """Whether something is measured or sampled after `done` steps."""
        steps = len(self.batches)
        return self.evaluation.measures_at(done, steps) or self.evaluation.samples_at(
            done, steps
        )

    def look(self, state: TrainState, done: int) -> None:
        """Measures the held-out loss and samples, where that is due."""
        evaluation, steps = self.evaluation, len(self.batches)
        known = {row["step"] for row in self.watch.evaluations}
        if evaluation.measures_at(done, steps) and done not in known:
            row = evaluation.measure(state.adapters, self.base, done)
            best = evaluation.best.step == done
            if best:  # before its row, which says that it is there
                losses = {name: row[name] for name in ("eval_loss", "eval_perplexity")}
                self.export(state, BEST, losses)
            self.watch.evaluated(row, "  best so far" if best else "")
        if evaluation.samples_at(done, steps) and done not in self.watch.sampled_steps:
            self.watch.sampled(done, evaluation.sample(state.adapters, self.base))
        if self.redrawing is not None:
            self.redrawing.now_and_then()

    def save(self, state: TrainState, done: int) -> None:
        """Saves the state after `done` steps, and its adapter."""
        self.watch.sync()
        first = self.checkpoints.latest() is None
        self.checkpoints.save(
            state, {**self.record, "batches": done, "steps": len(self.batches)}
        )
        if first:  # adapter/ without a checkpoint is the sign of a lost one
            self.checkpoints.wait()
        self.export(state)
        self.export_average(state)

    def export(
        self,
        state: TrainState,
        name: str = ADAPTER,
        losses: Mapping[str, float] | None = None,
    ) -> None:
        """Writes an adapter directory for the base as it was loaded.

        Args:
          state: whose adapters are written.
          name: of the directory within the run directory.
          losses: of a measurement at this step, for the training record.
        """
        lora, adapters = absorb(
            self.config.lora, jax.device_get(state.adapters), self.base
        )
        template = self.chat_template
        convert.save_adapter(
            Path(self.config.output_dir) / name,
            dataclasses.replace(
                lora,
                base_fingerprint=self.fingerprint,
                base_config_changes=as_text(self.config.model.config_changes),
            ),
            adapters,
            self.architecture,
            base_model_name_or_path=self.config.model.path,
            overwrite=True,
            beside={
                TRAINING: {"step": int(state.step), **self.form, **(losses or {})},
                **({} if template is None else {CHAT_TEMPLATE: template}),
            },
        )

    def export_average(self, state: TrainState) -> None:
        """Writes adapter_ema/, where the run keeps a moving average."""
        average = averaged(state.opt_state)
        if average is not None:
            self.export(dataclasses.replace(state, adapters=average), ADAPTER_EMA)

    def note(
        self, index: int, metrics: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> None:
        """Writes a step's numbers down; stops the run if they are not finite."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if values.pop("finite"):
            self.watch.step(index + 1, values, self.batches.tokens(index))
            return
        directory = Path(self.config.output_dir)
        place = directory / f"nonfinite_step_{index + 1}.npz"
        np.savez(place, allow_pickle=False, **batch)
        self.checkpoints.wait()
        newest = self.checkpoints.latest()
        if newest is None:
            good = "There is no checkpoint yet; the same command starts over."
        else:
            good = (
                f"The last good checkpoint is `{self.checkpoints.path(newest)}`: the "
                "same command tries again from there, and a new run can start from "
                f"its adapter (`train.adapter_init` = {str(directory / ADAPTER)!r})."
            )
        raise UserError(
            f"Step {index + 1} is not finite: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}. Its batch (number {index}) is saved as "
            f"`{place}`; the adapters were not changed by it. {good} A lower learning "
            "rate, a longer warm-up or dtype = 'bfloat16' or 'float32' usually helps."
        )
