"""Trains a run: its steps, and what is done around them.

`run(config)` does what scripts/train_qlora.py does in the open, and adds what a run
needs around the step: data prepared in the background, checkpoints, evaluation, logs, a
plot and a report. Called again with the same configuration and directory it continues
from the newest checkpoint, bit for bit. `qlora_jax.runs.directory` lists the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import convert
from convert import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    open_checkpoint,
    write_text,
)
from qlora_jax.errors import Problems, UsageError, quiet, say
from qlora_jax.inference import base_mismatch
from qlora_jax.lora import Selection, factor_out, init_adapters
from qlora_jax.models import (
    add_parameters,
    check_weights,
    report_untrained,
    tree_bytes,
)
from qlora_jax.nf4 import NF4Tensor, fingerprint_tree
from qlora_jax.runs.adapter_writer import AdapterWriter, adapter_files
from qlora_jax.runs.checkpoint import Checkpoints, disk_errors
from qlora_jax.runs.config import MeshConfig, RunConfig
from qlora_jax.runs.directory import (
    ADAPTER,
    CHECKPOINTS,
    REPORT,
    START,
    STARTED,
    check_directory,
    finished_report,
    run_lock,
    saved_steps,
)
from qlora_jax.runs.environment import TUNING, environment, versions
from qlora_jax.runs.evaluation import Evaluation
from qlora_jax.runs.interruption import RunInterrupted
from qlora_jax.runs.loop import Loop
from qlora_jax.runs.plots import draw_loss
from qlora_jax.runs.prepare import PreparedRun, prepare
from qlora_jax.runs.processes import Peers, connect
from qlora_jax.runs.publishing import publish_run
from qlora_jax.runs.report import REPORT_PAGE, read_run, render_run
from qlora_jax.runs.resume import continue_run, run_record
from qlora_jax.runs.rows import read_evaluations
from qlora_jax.runs.toml import SETTINGS, to_toml
from qlora_jax.training import TrainState


def run(
    config: RunConfig,
    *,
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    explicit_lora: Collection[str] | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains, or continues, a run; returns the content of report.json.

    SIGTERM or SIGINT while it trains (in the main thread) end it after the current
    step, with a checkpoint and without a report.json; the same call continues.

    Args:
      config: the run.
      attention_cls: custom attention modules, as `Llama` takes them.
      mlp_cls: custom MLP modules.
      explicit_lora: names of the fields of `config.lora` that the user set; default
        those that differ from their defaults. With `train.adapter_init` the others are
        taken from that adapter.
      began: `time.perf_counter()` when the user's command started; default now.

    Raises:
      UserError: unusable input (every problem that `prepare` finds), a directory with
        other content, a run whose base, data or arithmetic has changed, or a loss that
        is not finite.
      CheckpointError: model, tokenizer or checkpoint files that are missing or
        damaged, or a run directory that cannot be written.
      RunInterrupted: SIGTERM or SIGINT; a `KeyboardInterrupt`.

    With `hub.model_id` the adapter of a complete run is published last; a failure of
    that is a `CheckpointError`, and the same call tries it again.
    """
    began = time.perf_counter() if began is None else began
    mesh = config.mesh
    with contextlib.ExitStack() as stack:
        # Before any device is touched.
        peers = stack.enter_context(
            connect(mesh.coordinator, mesh.processes, mesh.process)
        )
        if peers.count > 1:
            # What the others would say is said once, by process 0.
            stack.enter_context(quiet(not peers.is_first))
            peers.agree(_facts_to_share(config))
        directory, problems = Path(config.output_dir), Problems()
        with peers.together("opening the run directory"):
            if peers.is_first:
                with problems.collecting():
                    check_directory(directory)
                    # Held to the end: no other run writes into it meanwhile.
                    remove = stack.enter_context(run_lock(directory))
                    peers.before_leaving(remove)
        # What is wrong with it is raised later, with all other problems.
        if peers.broadcast(not problems, "opening the run directory"):
            _check_shared(directory, peers)
        prepared = prepare(
            config,
            attention_cls,
            mlp_cls,
            explicit_lora,
            problems=problems,
            peers=peers,
        )
        report = _train(prepared, began, peers)
        if prepared.config.hub.model_id is not None:
            report["published"] = peers.on_first(
                "publishing", lambda: publish_run(prepared.config, report["steps"])
            )
        return report


def _facts_to_share(config: RunConfig) -> dict[str, str]:
    """Returns what has to be the same in all processes of a run."""
    settings = dataclasses.asdict(_of_all_processes(config))
    return {
        **{
            f"`{section}.{name}`": repr(value)
            for section, values in settings.items()
            if isinstance(values, dict)
            for name, value in values.items()
        },
        "`output_dir`": repr(config.output_dir),
        "number of devices": str(jax.local_device_count()),
        **{f"versions of {name}": text for name, text in versions().items()},
    }


def _process_options(mesh: MeshConfig) -> list[str]:
    """Returns the options that say which process this is; empty if none were given."""
    if mesh.coordinator is None:
        return []
    options = ["--mesh.coordinator", mesh.coordinator]
    options += ["--mesh.processes", str(mesh.processes)]
    return [*options, "--mesh.process", str(mesh.process)]


def _of_all_processes(config: RunConfig) -> RunConfig:
    """Returns the settings without those that say which process this is."""
    alone = dataclasses.replace(
        config.mesh, coordinator=None, processes=None, process=None
    )
    return dataclasses.replace(config, mesh=alone)


def _check_shared(directory: Path, peers: Peers) -> None:
    """Raises unless all processes see the run directory of process 0.

    Raises:
      UserError: a process does not, or sees another.
    """
    if peers.count == 1:
        return
    with disk_errors(directory):
        mark = peers.on_first("marking the run directory", lambda: _mark(directory))
    seen = (directory / mark).exists()
    blind = [i for i, sees in enumerate(peers.gather(seen, "finding it")) if not sees]
    if peers.is_first:
        (directory / mark).unlink(missing_ok=True)
    if blind:
        raise UsageError(
            f"The output directory `{directory}` of process 0 is not that of "
            f"{peers.name(*blind)}. All processes need the same one, on a file system "
            "that they share."
        )


def _mark(directory: Path) -> str:
    """Makes an empty file of a new name in a directory; returns the name."""
    # One of those that the lock removes, should this process be killed now.
    name = f".processes.{secrets.token_hex(4)}.qlora-jax-mark"
    (directory / name).touch()
    return name


@dataclass(frozen=True)
class LoadedBase:
    """The base of a run as it was loaded, in the host's memory."""

    tree: Any
    fingerprint: str
    initial_adapters: Any
    """Those of `train.adapter_init`; None = the run starts with fresh ones."""
    tables: Mapping[tuple[str, ...], Any]
    """Weights of `tree` that come from that adapter's file, by module."""


def _load_base(prepared: PreparedRun) -> LoadedBase:
    """Loads the base into the host's memory; describes what is trained."""
    config, sources = prepared.config, prepared.sources
    say(f"Loading `{config.model.path}`.")
    architecture, base = convert.load_llama(
        sources.base, **prepared.base_options, progress=sys.stderr.isatty()
    )
    fingerprint = fingerprint_tree(base)
    tables: Mapping[tuple[str, ...], Any] = {}
    if sources.adapter is not None:
        with_tables = convert.with_saved_tables(
            architecture,
            base,
            sources.adapter,
            resize=config.model.resize_to_adapter,
        )
        base, tables = with_tables.base, with_tables.tables
    key = jax.random.key(config.train.seed)
    _, base = add_parameters(prepared.model, base, key)
    check_weights(prepared.drawn, base, config.lora, sources.base)
    initial = None
    if sources.adapter is not None:
        skipped: list[str] = []
        start = sources.adapter
        lora, initial = convert.load_adapter(
            start, base, strict=config.train.adapter_init_strict, skipped=skipped
        )
        for note in convert.shorten(skipped):
            say(f"Not used of `{start}`: {note}.")
        mismatch = base_mismatch(
            start,
            sources.base,
            base,
            lora.base_fingerprint,
            fingerprint=fingerprint,
            options="--model.",
        )
        if mismatch is not None:
            say(mismatch)
    groups = prepared.selection.groups()
    say(
        f"Training {sum(groups.values()):,} of {_count_parameters(base):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in groups.items())
        + "."
    )
    for group in prepared.optimizer_groups:
        say(f"  {group}")
    _note_untrained(base, prepared.selection, prepared.data.examples.used())
    return LoadedBase(base, fingerprint, initial, tables)


class Start(NamedTuple):
    """What the steps of a run start from, on its devices."""

    state: TrainState
    base: Any
    fingerprint: str
    """Of the base as it was loaded."""
    tables: Mapping[tuple[str, ...], Any]
    """As `LoadedBase.tables`."""


def _train(prepared: PreparedRun, began: float, peers: Peers) -> dict[str, Any]:
    """Takes the remaining steps; returns the report."""
    config, data, compiled = prepared.config, prepared.data, prepared.compiled
    directory, steps = Path(config.output_dir), len(data.batches)
    data_fingerprint = data.examples.report.fingerprint
    files = adapter_files(
        config,
        prepared.sources,
        prepared.model.config,
        data.tokenizer,
        data.trained_ends,
    )
    evaluation = Evaluation(
        config=config.eval,
        model=compiled.model,
        held_out=data.held_out,
        batch_size=config.eval_batch_size,
        tokenizer=data.tokenizer,
        eos_token_ids=data.eos_token_ids,
        step=compiled.eval_step,
        place_batch=compiled.place_batch,
        mesh=compiled.mesh,
    )
    state, base, fingerprint, tables = _start(prepared, peers)
    record = run_record(config, fingerprint, data_fingerprint)
    with disk_errors(directory):
        with Checkpoints(
            directory / CHECKPOINTS, config.checkpoint, peers=peers
        ) as checkpoints:
            state, start = continue_run(checkpoints, state, record, steps)
            # Not earlier: a refused run keeps the settings it was started with.
            if peers.is_first:
                write_text(directory / SETTINGS, to_toml(_of_all_processes(config)))
            rows = peers.on_first(
                "reading the logs", lambda: read_evaluations(directory, until=start)
            )
            ignored = evaluation.resume(rows)
            if ignored:
                say(
                    f"Note: {ignored} measurements so far are of other held-out data; "
                    "the best loss is searched anew."
                )
            # report.json is written last: the run that it describes is complete.
            finished = peers.on_first(
                "reading the report",
                lambda: _finished(directory, start, steps, evaluation),
            )
            if finished is not None:
                return finished
            facts = _facts(prepared, fingerprint, base, state)
            facts["resumed_from_step"] = start or None
            if peers.is_first:
                # It belongs to a shorter run that this one continues.
                (directory / REPORT).unlink(missing_ok=True)
                write_text(directory / STARTED, json.dumps(facts, indent=2) + "\n")
                compiled.tuning.write(directory / TUNING)
            # The base is an argument of every step and is in no checkpoint; its
            # fingerprint is.
            loop = Loop(
                prepared=prepared,
                base=base,
                checkpoints=checkpoints,
                record=record,
                evaluation=evaluation,
                writer=AdapterWriter(
                    config=config,
                    architecture=prepared.model.config,
                    base=base,
                    fingerprint=fingerprint,
                    base_tables=tables,
                    files=files,
                    writes=peers.is_first,
                ),
                peers=peers,
            )
            if start:
                loop.writer.say_replaced(state)
            state = loop.run(state, start, began)
        taken = int(state.step)
        signal, reason = loop.stopped, None
        if taken < steps:
            reason = evaluation.reason
            if reason is not None:
                say(f"The run ends after step {taken} of {steps}: {reason}.")
            elif signal is not None:
                options = _process_options(config.mesh)
                settings = directory / SETTINGS
                raise RunInterrupted(signal, taken, steps, settings, options)
        return peers.on_first(
            "writing the report", lambda: _write_report(loop, facts, taken, reason)
        )


def _finished(
    directory: Path, start: int, steps: int, evaluation: Evaluation
) -> dict[str, Any] | None:
    """Returns the report of a complete run, and says so; None if steps are left."""
    end = start if evaluation.exhausted else steps
    report = finished_report(directory, start, end)
    if report is not None:
        advice = "More `steps` or `epochs` continue it."
        if start < steps:
            advice = (
                f"It ended early: {evaluation.reason}. A larger "
                "`early_stopping_patience` continues it."
            )
        say(
            f"This run is finished (step {start} of {steps}); nothing was changed. "
            f"{advice}"
        )
    return report


def _facts(
    prepared: PreparedRun, fingerprint: str, base: Any, state: TrainState
) -> dict[str, Any]:
    """Returns what is known of a run before its first step."""
    groups, data = prepared.selection.groups(), prepared.data
    held_out = None
    if data.held_out is not None:
        held_out = data.held_out.examples.report.as_dict()
    return {
        "planned_steps": len(data.batches),
        "trainable_parameters": sum(groups.values()),
        "groups": groups,
        "optimizer_groups": [group.report() for group in prepared.optimizer_groups],
        "continued_from": prepared.origin,
        "base_parameters": _count_parameters(base),
        "base_bytes": tree_bytes(base),
        "optimizer_bytes": tree_bytes(state.opt_state),
        "base_fingerprint": fingerprint,
        "data": data.examples.report.as_dict(),
        "held_out": held_out,
        "plan": prepared.compiled.report(),
        **environment(),
    }


def _write_report(
    loop: Loop, facts: Mapping[str, Any], taken: int, reason: str | None
) -> dict[str, Any]:
    """Writes report.json and report.html of a complete run; returns the former."""
    config = loop.prepared.config
    directory = Path(config.output_dir)
    weights = directory / ADAPTER / ADAPTER_WEIGHTS
    report = {
        "steps": taken,
        "stopped_early": reason,
        "final_loss": loop.watch.last_loss,
        "eval": loop.evaluation.report(),
        **facts,
        "adapter_bytes": weights.stat().st_size,
        "seconds_to_first_step": loop.watch.seconds_to_first_step,
        "peak_memory_bytes": loop.watch.peak_memory,
    }
    if config.log.plot:
        draw_loss(directory)
    # Last of the run's data: a run with this file is complete.
    write_text(directory / REPORT, json.dumps(report, indent=2) + "\n")
    write_text(directory / REPORT_PAGE, render_run(read_run(directory)))
    return report


def _start(prepared: PreparedRun, peers: Peers) -> Start:
    """Loads the base and makes the state before the first step.

    From here on the directory is a run: it has settings. The part that pissa and olora
    factor out of the base is kept in it as a PEFT adapter, since a decomposition may
    give other bits on the machine where the run is continued.
    """
    # Two keys of one seed: the initial adapters, and all randomness of the steps.
    config, compiled = prepared.config, prepared.compiled
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    loaded = _load_base(prepared)
    peers.agree({f"base `{config.model.path}`": loaded.fingerprint})
    lora, base = config.lora, loaded.tree
    start, adapters, fresh = Path(config.output_dir) / START, None, False
    if loaded.initial_adapters is not None:
        adapters = loaded.initial_adapters
    elif lora.changes_base and (start / ADAPTER_CONFIG).is_file():
        saved, adapters = convert.load_adapter(start, base)
        # With a checkpoint the base is compared with that of the run.
        began = saved_steps(start.parent / CHECKPOINTS)
        if saved.base_fingerprint not in (None, loaded.fingerprint) and not began:
            say(
                f"Note: `{start}` was factored out of another base by a start that "
                "took no checkpoint; it is made anew."
            )
            adapters = None
    if adapters is None:
        original = None
        if lora.init_lora_weights == "loftq":
            checkpoint = open_checkpoint(prepared.sources.base)
            original = None if checkpoint.quantized else checkpoint.files.read
        adapters, fresh = init_adapters(init_key, base, lora, original=original), True
    # Settings before START: without them a directory with content would be refused as
    # that of something else.
    settings = start.with_name(SETTINGS)
    with peers.together("writing the settings"), disk_errors(settings.parent):
        if peers.is_first and not settings.is_file():
            write_text(settings, to_toml(_of_all_processes(config)))
        # Under a plain start: this is the part that is factored out of the base, while
        # `save_adapter` refuses adapters that were trained on the rest.
        if peers.is_first and fresh and lora.changes_base:
            plain = dataclasses.replace(lora, init_lora_weights="default")
            convert.save_adapter(
                *(start, plain, jax.device_get(adapters), base),
                base_fingerprint=loaded.fingerprint,
                overwrite=True,
            )
    if lora.changes_base:
        if peers.count > 1:  # the same bits everywhere
            adapters = convert.load_adapter(start, base)[1]
        base = factor_out(base, adapters, lora)
    return Start(
        state=compiled.initial_state(adapters, run_key),
        # The copy on the host is given up with this function.
        base=compiled.place_base(base),
        fingerprint=loaded.fingerprint,
        tables=loaded.tables,
    )


def _note_untrained(base: Any, selection: Selection, used: np.ndarray) -> None:
    """Notes tokens of the data whose rows were never trained and are not now."""
    trained_rows = {r.path[-1]: set(r.indices) for r in selection.rows}
    trained_tables = {w.path[-2] for w in selection.full_tensors}
    for name, ids in report_untrained(base, used.tolist()).rows.items():
        untrained = sorted(set(ids) - trained_rows.get(name, set()))
        if untrained and name not in trained_tables:
            say(
                f"Note: the data use {len(untrained)} tokens whose rows of {name} were "
                f"never trained ({', '.join(map(str, untrained[:10]))}), so they mean "
                "nothing to the model. `qlora-jax tokens --repair` writes a base where "
                "they start from the mean; `lora.trainable_token_indices` trains them."
            )


def _count_parameters(base: Any) -> int:
    """Counts the parameters of a base tree, packed ones by their shape."""
    leaves = jax.tree.leaves(base, is_leaf=lambda x: isinstance(x, NF4Tensor))
    return sum(leaf.size for leaf in leaves)
