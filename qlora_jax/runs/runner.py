"""The steps of a run, and what is done around them.

Notes, checkpoints, adapters, measurements on held-out data.

A training run as a directory: start it, watch it, stop it, continue it.

`run(config)` does what the training script under scripts/ does in the open, and adds
what a run needs around the step: data prepared in the background, checkpoints, metrics,
a progress line, a plot and a report. Given the same configuration and directory again
it continues from the newest checkpoint, bit for bit.

    RUN/config.toml     the resolved configuration
    RUN/metrics.jsonl   one object a step, and one a measurement on held-out data
    RUN/samples.jsonl   what the model wrote on the way
    RUN/checkpoints/    Orbax
    RUN/adapter/        the adapter of the newest checkpoint, as a PEFT directory
    RUN/adapter_ema/    with `train.ema_decay`, the moving average beside it
    RUN/best_adapter/   the one with the best held-out loss, see its training.json
    RUN/initial_adapter/  with pissa or olora, what was taken out of the base
    RUN/loss.png        drawn from metrics.jsonl
    RUN/started.json    what is trained, on what, with which versions
    RUN/report.json     the same with what came out, when the run is complete
    RUN/report.html     all of it as a page for a browser
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert.checkpoint import open_checkpoint
from convert.output import write_text
from convert.peft import CHAT_TEMPLATE, TRAINING
from qlora_jax.data.batches import Batches, prefetch
from qlora_jax.errors import Problems, UserError, say
from qlora_jax.inference.identity import base_form
from qlora_jax.lora.init import absorb, factor_out, init_adapters
from qlora_jax.lora.targets import Selection
from qlora_jax.models.config import LlamaConfig, changes_to_json
from qlora_jax.models.llama import add_parameters
from qlora_jax.models.params import check_weights, tree_bytes, tree_size
from qlora_jax.models.sharding import put_base
from qlora_jax.models.vocabulary import report_untrained
from qlora_jax.nf4 import NF4Tensor, fingerprint_tree
from qlora_jax.runs.checkpoint import Checkpoints, disk_errors
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import (
    ADAPTER,
    ADAPTER_EMA,
    BEST,
    CHECKPOINTS,
    REPORT,
    START,
    STARTED,
    alone,
    check_directory,
    finished_report,
    template_text,
)
from qlora_jax.runs.evaluation import Evaluation
from qlora_jax.runs.interruption import Interruption
from qlora_jax.runs.metrics import Watch, open_trackers, read_evaluations, work_of
from qlora_jax.runs.plots import BackgroundPlot, draw_loss
from qlora_jax.runs.prepare import PreparedRun, prepare
from qlora_jax.runs.report import PAGE, read_run, render_run
from qlora_jax.runs.resume import continue_run, run_record, versions
from qlora_jax.runs.toml import SETTINGS, to_toml
from qlora_jax.training.optimizer import averaged
from qlora_jax.training.parameter_groups import schedule
from qlora_jax.training.step import TrainState, init_state


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
    """How the base is held; see `qlora_jax.inference.identity.base_form`."""
    interruption: Interruption
    evaluation: Evaluation
    redrawing: BackgroundPlot | None = None
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
            self.watch.restart_timer()
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
                self.watch.restart_timer()
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
            self.redrawing.start_if_due()

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
                base_config_changes=changes_to_json(self.config.model.config_changes),
            ),
            adapters,
            self.architecture,
            base_model_name_or_path=self.config.model.path,
            overwrite=True,
            extra_files={
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


def run(
    config: RunConfig,
    *,
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    given: Collection[str] | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains, or continues, a run; returns what report.json holds.

    SIGTERM or SIGINT while it trains (in the main thread) end it after the step under
    way, with a checkpoint: it returns `{"interrupted": "SIGTERM", "step": 120}`, there
    is no report.json, and the same call continues.

    Args:
      config: the run.
      attention_cls: attention modules of yours, as `Llama` takes them.
      mlp_cls: MLP modules of yours.
      given: names of the fields of `config.lora` that someone gave; default those that
        are not at their defaults. They matter beside `train.adapter_init`, whose
        adapter has settings of its own.
      began: `time.perf_counter()` when the user's command started; default now.

    Raises:
      UserError: input that cannot be used (all that is wrong with it, as `prepare`
        finds it), a directory of something else, a run whose base, data or arithmetic
        has changed, or a loss that is not finite.
      CheckpointError: model, tokenizer or checkpoint files that are missing or
        damaged, or a run directory that cannot be written.
    """
    began = time.perf_counter() if began is None else began
    directory, problems = Path(config.output_dir), Problems()
    with contextlib.ExitStack() as held:
        with problems.collecting():
            check_directory(directory)
            held.enter_context(alone(directory))
        prepared = prepare(config, attention_cls, mlp_cls, given, problems=problems)
        base, fingerprint, initial = _load(prepared)
        return _train(prepared, base, fingerprint, initial, began)


def _load(prepared: PreparedRun) -> tuple[Any, str, Any]:
    """Loads the base to where the plan has it; says what is trained of it.

    Returns:
      The base, the fingerprint of what was loaded, and the adapters that the run starts
      from; None = fresh ones.
    """
    config, policy = prepared.config, prepared.fitted.plan.policy
    path, progress = config.model.path, sys.stderr.isatty()
    base = convert.load_llama(path, **prepared.how, progress=progress)[1]
    fingerprint = fingerprint_tree(base)
    key = jax.random.key(config.train.seed)
    _, base = add_parameters(prepared.model, base, key)
    base = put_base(base, embed_tokens=policy.embed_tokens, lm_head=policy.lm_head)
    check_weights(prepared.drawn, base, config.lora, Path(path))
    initial = None
    if config.train.adapter_init is not None:
        initial = convert.load_adapter(config.train.adapter_init, base)[1]
    groups = prepared.selection.groups()
    say(
        f"Training {sum(groups.values()):,} of {tree_parameters(base):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in groups.items())
        + "."
    )
    for group in prepared.rates:
        say(f"  {group}")
    _note_untrained(base, prepared.selection, prepared.examples.used())
    return base, fingerprint, initial


def _train(
    prepared: PreparedRun, base: Any, fingerprint: str, initial: Any, began: float
) -> dict[str, Any]:
    """Takes the steps that are left; returns the report."""
    config, fitted, batches = prepared.config, prepared.fitted, prepared.batches
    directory, steps = Path(config.output_dir), len(batches)
    record = run_record(config, fingerprint, prepared.examples)
    template = template_text(config.data, say)
    evaluation = Evaluation(
        config.eval,
        fitted.model,
        prepared.held,
        config.eval_batch_size,
        prepared.tokenizer,
        fitted.eval_step,
    )
    with disk_errors(directory):
        state, base = _first_state(config, base, fitted.optimizer, initial)
        with Checkpoints(directory / CHECKPOINTS, config.checkpoint) as checkpoints:
            state, start = continue_run(checkpoints, state, record, steps)
            # Not before: a refused run keeps the settings it was started with.
            write_text(directory / SETTINGS, to_toml(config))
            others = evaluation.resume(read_evaluations(directory, until=start))
            if others:
                say(
                    f"Note: {others} measurements so far are of other held-out data; "
                    "the best loss is searched anew."
                )
            finished = _finished(directory, start, steps, evaluation)
            if finished is not None:
                return finished
            # Of a shorter run that this one continues.
            (directory / REPORT).unlink(missing_ok=True)
            about = _about(prepared, base, state, fingerprint)
            write_text(directory / STARTED, json.dumps(about, indent=2) + "\n")
            everything = dataclasses.asdict(config)
            with (
                open_trackers(config.log, directory, everything, start) as trackers,
                Watch(
                    directory,
                    start=start,
                    steps=steps,
                    schedule=schedule(config.train, steps),
                    every=config.log.every,
                    began=began,
                    work=work_of(fitted.plan.step, prepared.examples.lengths),
                    trackers=trackers,
                ) as watch,
                Interruption() as interruption,
            ):
                state = Loop(
                    config,
                    prepared.model.config,
                    base,
                    batches,
                    fitted.step,
                    watch,
                    checkpoints,
                    record,
                    fingerprint,
                    base_form(base),
                    interruption,
                    evaluation,
                    BackgroundPlot(directory) if config.log.plot else None,
                    template,
                ).take(state, start)
        taken = int(state.step)
        reason = evaluation.reason if taken < steps else None
        if reason is not None:
            say(f"The run ends after step {taken} of {steps}: {reason}.")
        elif interruption.signal is not None and taken < steps:
            return {"interrupted": interruption.signal, "step": taken}
        report = {
            "steps": taken,
            "stopped_early": reason,
            "final_loss": watch.last_loss,
            "eval": evaluation.report(),
            **about,
            "adapter_bytes": (directory / ADAPTER / "adapter_model.safetensors")
            .stat()
            .st_size,
            "seconds_to_first_step": watch.seconds_to_first_step,
            "peak_memory_bytes": watch.peak_memory,
        }
        if config.log.plot:
            draw_loss(directory)
        # It says that the run is complete.
        write_text(directory / REPORT, json.dumps(report, indent=2) + "\n")
        write_text(directory / PAGE, render_run(read_run(directory)))
    return report


def _finished(
    directory: Path, start: int, steps: int, evaluation: Evaluation
) -> dict[str, Any] | None:
    """The report of a run that has nothing left to do; None if something is left."""
    end = start if evaluation.exhausted else steps
    finished = finished_report(directory, start, end)
    if finished is not None:
        way = "More `steps` or `epochs` continue it."
        if start < steps:
            way = (
                f"It ended early: {evaluation.reason}. A larger "
                "`early_stopping_patience` continues it."
            )
        say(
            f"This run is finished (step {start} of {steps}); nothing was changed. "
            f"{way}"
        )
    return finished


def _about(
    prepared: PreparedRun, base: Any, state: TrainState, fingerprint: str
) -> dict[str, Any]:
    """What is known of a run before its first step."""
    groups, held = prepared.selection.groups(), prepared.held
    return {
        "planned_steps": len(prepared.batches),
        "trainable_parameters": sum(groups.values()),
        "groups": groups,
        "optimizer_groups": [group.report() for group in prepared.rates],
        "continued_from": prepared.origin,
        "base_parameters": tree_parameters(base),
        "base_bytes": tree_bytes(base),
        "optimizer_bytes": tree_bytes(state.opt_state),
        "base_fingerprint": fingerprint,
        "data": prepared.examples.report.as_dict(),
        "held_out": None if held is None else held.examples.report.as_dict(),
        "plan": prepared.fitted.report(),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }


def _first_state(
    config: RunConfig, base: Any, optimizer: Any, initial: Any
) -> tuple[TrainState, Any]:
    """The state before the first step, and the base it trains on.

    Adapters are fresh, or `initial`, those to start from. From here on the directory is
    a run, which its settings say. What pissa and olora take out of the
    base is kept in the run directory, as a PEFT adapter: a decomposition need not give
    the same bits on the machine where the run is continued.
    """
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    lora = config.lora
    start, fresh = Path(config.output_dir) / START, False
    if initial is not None:
        adapters = initial
    elif lora.changes_base and (start / "adapter_config.json").is_file():
        adapters = convert.load_adapter(start, base)[1]
    else:
        original = None
        if lora.init_lora_weights == "loftq":
            checkpoint = open_checkpoint(config.model.path)
            original = None if checkpoint.quantized else checkpoint.files.read
        adapters, fresh = init_adapters(init_key, base, lora, original=original), True
    settings = start.with_name(SETTINGS)
    if not settings.is_file():
        write_text(settings, to_toml(config))
    if fresh and lora.changes_base:
        plain = dataclasses.replace(lora, init_lora_weights="default")
        convert.save_adapter(start, plain, jax.device_get(adapters), base)
    adapters = jax.tree.map(jnp.asarray, adapters)
    if lora.changes_base:
        base = factor_out(base, adapters, lora)
    return init_state(adapters, optimizer, run_key), base


def _note_untrained(base: Any, selection: Selection, used: np.ndarray) -> None:
    """Says so where the data use tokens whose rows no training has ever touched."""
    covered = {r.path[-1]: set(r.indices) for r in selection.rows}
    whole = {w.path[-2] for w in selection.full_tensors}
    for name, ids in report_untrained(base, used.tolist()).rows.items():
        left = sorted(set(ids) - covered.get(name, set()))
        if left and name not in whole:
            say(
                f"Note: the data use {len(left)} tokens whose rows of {name} were "
                f"never trained ({', '.join(map(str, left[:10]))}), so they mean "
                "nothing to the model. `qlora-jax tokens --repair` writes a base where "
                "they start from the mean; `lora.trainable_token_indices` trains them."
            )


def tree_parameters(base: Any) -> int:
    """Counts the parameters of a base tree, packed ones by their shape."""
    total = 0
    leaves = jax.tree.leaves(base, is_leaf=lambda x: isinstance(x, NF4Tensor))
    for leaf in leaves:
        if isinstance(leaf, NF4Tensor):
            total += leaf.size
        else:
            total += tree_size(leaf)
    return total
