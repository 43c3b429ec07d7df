"""A training run as a directory: start it, watch it, stop it, continue it.

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
    RUN/best_adapter/   the one with the best held-out loss, which best.json says
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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert.checkpoint import open_checkpoint
from convert.output import write_text
from qlora_jax.checkpoint import Checkpoints, disk_errors
from qlora_jax.directories import (
    ADAPTER,
    CHECKPOINTS,
    REPORT,
    START,
    STARTED,
    template_text,
)
from qlora_jax.errors import Problems, say
from qlora_jax.evaluation import Evaluation
from qlora_jax.fingerprint import fingerprint_tree
from qlora_jax.interruptions import Interruption
from qlora_jax.llama import add_parameters
from qlora_jax.loop import Loop
from qlora_jax.lora_init import factor_out, init_adapters
from qlora_jax.loss_plot import Redrawing, draw_loss
from qlora_jax.memory import tree_bytes, tree_size
from qlora_jax.model import check_weights
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.parameter_groups import schedule
from qlora_jax.placement import place_base
from qlora_jax.run_directory import alone, check_directory, finished_report
from qlora_jax.run_page import PAGE, read_run, run_page
from qlora_jax.run_record import continue_run, run_record, versions
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.toml import SETTINGS, to_toml
from qlora_jax.settled import Settled, settle
from qlora_jax.targets import Selection
from qlora_jax.trackers import trackers
from qlora_jax.train import TrainState, init_state
from qlora_jax.vocabulary import report_untrained
from qlora_jax.watch import Watch, measured_until, work_of


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
      UserError: input that cannot be used (all that is wrong with it, as `settle`
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
        settled = settle(config, attention_cls, mlp_cls, given, problems=problems)
        base, fingerprint, initial = _load(settled)
        return _train(settled, base, fingerprint, initial, began)


def _load(settled: Settled) -> tuple[Any, str, Any]:
    """Loads the base to where the plan has it; says what is trained of it.

    Returns:
      The base, the fingerprint of what was loaded, and the adapters that the run starts
      from; None = fresh ones.
    """
    config, policy = settled.config, settled.fitted.plan.policy
    path, progress = config.model.path, sys.stderr.isatty()
    base = convert.load_llama(path, **settled.how, progress=progress)[1]
    fingerprint = fingerprint_tree(base)
    key = jax.random.key(config.train.seed)
    _, base = add_parameters(settled.model, base, key)
    base = place_base(base, embed_tokens=policy.embed_tokens, lm_head=policy.lm_head)
    check_weights(settled.drawn, base, config.lora, Path(path))
    initial = None
    if config.train.adapter_init is not None:
        initial = convert.load_adapter(config.train.adapter_init, base)[1]
    groups = settled.selection.groups()
    say(
        f"Training {sum(groups.values()):,} of {tree_parameters(base):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in groups.items())
        + "."
    )
    for group in settled.rates:
        say(f"  {group}")
    _note_untrained(base, settled.selection, settled.examples.used())
    return base, fingerprint, initial


def _train(
    settled: Settled, base: Any, fingerprint: str, initial: Any, began: float
) -> dict[str, Any]:
    """Takes the steps that are left; returns the report."""
    config, fitted, batches = settled.config, settled.fitted, settled.batches
    directory, steps = Path(config.output_dir), len(batches)
    record = run_record(config, fingerprint, settled.examples)
    template = template_text(config.data, say)
    evaluation = Evaluation(
        config.eval,
        fitted.model,
        settled.held,
        config.eval_batch_size,
        settled.tokenizer,
        fitted.eval_step,
    )
    with disk_errors(directory):
        state, base = _first_state(config, base, fitted.optimizer, initial)
        with Checkpoints(directory / CHECKPOINTS, config.checkpoint) as checkpoints:
            state, start = continue_run(checkpoints, state, record, steps)
            # Not before: a refused run keeps the settings it was started with.
            write_text(directory / SETTINGS, to_toml(config))
            others = evaluation.resume(measured_until(directory, start))
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
            about = _about(settled, base, state, fingerprint)
            write_text(directory / STARTED, json.dumps(about, indent=2) + "\n")
            everything = dataclasses.asdict(config)
            with (
                trackers(config.log, directory, everything, start) as found,
                Watch(
                    directory,
                    start=start,
                    steps=steps,
                    schedule=schedule(config.train, steps),
                    every=config.log.every,
                    began=began,
                    work=work_of(fitted.plan.step, settled.examples.lengths),
                    trackers=found,
                ) as watch,
                Interruption() as interruption,
            ):
                state = Loop(
                    config,
                    settled.model.config,
                    base,
                    batches,
                    fitted.step,
                    watch,
                    checkpoints,
                    record,
                    fingerprint,
                    interruption,
                    evaluation,
                    Redrawing(directory) if config.log.plot else None,
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
        write_text(directory / PAGE, run_page(read_run(directory), report))
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
    settled: Settled, base: Any, state: TrainState, fingerprint: str
) -> dict[str, Any]:
    """What is known of a run before its first step."""
    groups, held = settled.selection.groups(), settled.held
    return {
        "planned_steps": len(settled.batches),
        "trainable_parameters": sum(groups.values()),
        "groups": groups,
        "optimizer_groups": [group.report() for group in settled.rates],
        "continued_from": settled.origin,
        "base_parameters": tree_parameters(base),
        "base_bytes": tree_bytes(base),
        "optimizer_bytes": tree_bytes(state.opt_state),
        "base_fingerprint": fingerprint,
        "data": settled.examples.report.as_dict(),
        "held_out": None if held is None else held.examples.report.as_dict(),
        "plan": settled.fitted.report(),
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
    whole = {w.path[-2] for w in selection.whole}
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
