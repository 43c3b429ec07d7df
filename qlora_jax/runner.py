"""A training run as a directory: start it, watch it, stop it, continue it.

`run(config)` does what the training script under scripts/ does in the open, and adds
what a run needs around the step: data prepared in the background, checkpoints, metrics,
a progress line, a plot and a report. Given the same configuration and directory again
it continues from the newest checkpoint, bit for bit.

    RUN/config.toml     the resolved configuration
    RUN/metrics.jsonl   one object a step
    RUN/checkpoints/    Orbax
    RUN/adapter/        the adapter of the newest checkpoint, as a PEFT directory
    RUN/initial_adapter/  with pissa or olora, what was taken out of the base
    RUN/loss.png        drawn from metrics.jsonl
    RUN/report.json     what was trained, on what, with which versions
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert.checkpoint import open_checkpoint
from convert.files import read_json
from convert.output import write_text
from qlora_jax.checkpoint import Checkpoints, compare_records, disk_errors
from qlora_jax.config import LlamaConfig
from qlora_jax.continued import continued, given_fields
from qlora_jax.data import Batches, Examples, Mixture, load_examples, prefetch
from qlora_jax.data.settings import PLACES
from qlora_jax.errors import UserError
from qlora_jax.fingerprint import fingerprint_tree
from qlora_jax.fit import fit
from qlora_jax.linear import Compute
from qlora_jax.llama import Llama, add_parameters
from qlora_jax.lora_init import absorb, factor_out, init_adapters
from qlora_jax.memory import tree_bytes, tree_size, warnings
from qlora_jax.model import check_weights, load_tokenizer
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.placement import place_base
from qlora_jax.runfile import RunConfig, to_toml
from qlora_jax.targets import Selection, select
from qlora_jax.train import (
    TrainState,
    init_state,
    schedule,
)
from qlora_jax.vocabulary import report_untrained
from qlora_jax.watch import Watch, draw_loss

SETTINGS, ADAPTER, START = "config.toml", "adapter", "initial_adapter"
REPORT = "report.json"
# Fields of a LoraConfig that say where its base is found, and which it was.
_OF_THE_BASE = ("base_model_name_or_path", "revision", "base_fingerprint")


def run(
    config: RunConfig,
    *,
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    given: Collection[str] | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains, or continues, a run; returns what report.json holds.

    Args:
      config: the run.
      attention_cls: attention modules of yours, as `Llama` takes them.
      mlp_cls: MLP modules of yours.
      given: names of the fields of `config.lora` that someone gave; default those that
        are not at their defaults. They matter beside `train.adapter_init`, whose
        adapter has settings of its own.
      began: `time.perf_counter()` when the user's command started; default now.

    Raises:
      UserError: input that cannot be used, a directory of something else, a run whose
        base, data or arithmetic has changed, or a loss that is not finite.
      CheckpointError: model, tokenizer or checkpoint files that are missing or
        damaged, or a run directory that cannot be written.
    """
    began = time.perf_counter() if began is None else began
    directory = Path(config.output_dir)
    _check_directory(directory)
    # What is adapted and whether it fits is settled on shapes, before anything large
    # is read.
    how: Any = {
        "quantization": None
        if config.model.quantization == "none"
        else config.model.quantization,
        "quantize_lm_head": config.model.lm_head == "nf4",
        "dtype": config.model.dtype,
    }
    architecture, shapes = convert.abstract_llama(config.model.path, **how)
    model = Llama(architecture, Compute(), attention_cls, mlp_cls)
    model, abstract = _abstract(model, shapes)
    drawn = set(model.config.extra_tensors) - set(architecture.extra_tensors)
    architecture = model.config
    if config.train.adapter_init is not None:
        given = given_fields(config.lora) if given is None else given
        config = _with_initial_adapter(config, given, abstract)
    for warning in warnings(architecture, config.lora, abstract):
        _say(f"Note: {warning}")
    examples, batches = _data(config, architecture)
    steps = len(batches)

    compute = Compute(
        dtype=config.model.dtype, kernels=config.model.kernels, lora=config.lora
    )
    fitted = fit(
        model.clone(compute=compute),
        config.model,
        abstract,
        batches[0],
        config.train,
        steps,
    )
    _say(fitted.summary())
    base = convert.load_llama(config.model.path, **how, progress=sys.stderr.isatty())[1]
    fingerprint = fingerprint_tree(base)
    _, base = add_parameters(model, base, jax.random.key(config.train.seed))
    policy = fitted.plan.policy
    base = place_base(base, embed_tokens=policy.embed_tokens, lm_head=policy.lm_head)
    selection = select(base, config.lora)
    check_weights(drawn, base, config.lora, Path(config.model.path))
    initial = None
    if config.train.adapter_init is not None:
        initial = convert.load_adapter(config.train.adapter_init, base)[1]
    groups = selection.groups()
    _say(
        f"Training {sum(groups.values()):,} of {tree_parameters(base):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in groups.items())
        + "."
    )
    _note_untrained(base, selection, examples.used())
    record = _record(config, fingerprint, examples)

    with _alone(directory), disk_errors(directory):
        state, base = _first_state(config, base, fitted.optimizer, initial)
        with Checkpoints(directory / "checkpoints", config.checkpoint) as checkpoints:
            state, start = _continue(checkpoints, state, record, steps)
            # Not before: a refused run keeps the settings it was started with.
            write_text(directory / SETTINGS, to_toml(config))
            finished = _finished_report(directory, start, steps)
            if finished is not None:
                _say(
                    f"This run is finished (step {start} of {steps}); nothing was "
                    "changed. More `steps` or `epochs` continue it."
                )
                return finished
            with Watch(
                directory,
                start=start,
                steps=steps,
                schedule=schedule(config.train, steps),
                every=config.log.every,
                began=began,
            ) as watch:
                state = _Loop(
                    config,
                    architecture,
                    base,
                    batches,
                    fitted.step,
                    watch,
                    checkpoints,
                    record,
                    fingerprint,
                ).take(state, start)
        report = {
            "steps": steps,
            "final_loss": watch.last_loss,
            "trainable_parameters": sum(groups.values()),
            "groups": groups,
            "base_parameters": tree_parameters(base),
            "base_bytes": tree_bytes(base),
            "adapter_bytes": (directory / ADAPTER / "adapter_model.safetensors")
            .stat()
            .st_size,
            "optimizer_bytes": tree_bytes(state.opt_state),
            "base_fingerprint": fingerprint,
            "data": examples.report.as_dict(),
            "plan": fitted.report(),
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "seconds_to_first_step": watch.seconds_to_first_step,
            "peak_memory_bytes": watch.peak_memory,
        }
        if config.log.plot:
            draw_loss(directory)
        # Last: it says that the run is complete.
        write_text(directory / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _abstract(model: Llama, shapes: Any) -> tuple[Llama, Any]:
    """Adds the parameters of the model's own modules, as shapes.

    Without modules of its own it refuses a checkpoint that has some.
    """
    complete = [model]

    def add(base: Any) -> Any:
        complete[0], base = add_parameters(model, base, jax.random.key(0))
        return base

    abstract = jax.eval_shape(add, shapes)
    return complete[0], abstract


def _data(
    config: RunConfig, architecture: LlamaConfig
) -> tuple[Examples | Mixture, Batches]:
    """Loads the examples and lays them out in batches."""
    tokenizer = None
    if config.data.needs_tokenizer:
        tokenizer = load_tokenizer(config.model.path)
        if tokenizer is None:
            raise UserError(
                f"`{config.model.path}` has no tokenizer, and data.format="
                f"{config.data.format!r} needs one. Put the model's tokenizer files "
                "there, or give token ids (data.format = 'tokens')."
            )
    examples = load_examples(
        config.data,
        tokenizer,
        vocab_size=architecture.vocab_size,
        progress=sys.stderr.isatty(),
        run_directory=config.output_dir,
    )
    _say(examples.report.summary())
    batches = Batches(
        examples,
        config.data,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        pad_token_id=architecture.pad_token_id or 0,
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    wanted = config.train.batch_size * config.train.gradient_accumulation_steps
    if batches.rows_per_epoch < wanted:
        _say(
            f"Note: the data make {batches.rows_per_epoch:,} rows and a step takes "
            f"{wanted:,}, so that rows are repeated within a step. A smaller "
            "`train.batch_size` (or no packing) avoids it."
        )
    if config.train.warmup_steps > len(batches):
        raise UserError(
            f"train: `warmup_steps`={config.train.warmup_steps} exceeds the "
            f"{len(batches)} steps of this run."
        )
    return examples, batches


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
            _say(
                f"Note: the data use {len(left)} tokens whose rows of {name} were "
                f"never trained ({', '.join(map(str, left[:10]))}), so they mean "
                "nothing to the model. `qlora-jax tokens --repair` writes a base where "
                "they start from the mean; `lora.trainable_token_indices` trains them."
            )


def _continue(
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
        _say(
            f"Note: the run was to take {length} steps and now takes {steps}; from "
            f"here the learning rate is that of a run of {steps} steps."
        )
    if start < steps:
        _say(f"Continuing from step {start} of {steps}.")
    return checkpoints.restore(newest, state), start


def _finished_report(directory: Path, start: int, steps: int) -> dict[str, Any] | None:
    """The report of a run that has nothing left to do; None if something is left."""
    path = directory / REPORT
    if start < steps or not path.is_file() or not (directory / ADAPTER).is_dir():
        return None
    report = read_json(path)
    return report if report.get("steps") == steps else None


@dataclass
class _Loop:
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

    def take(self, state: TrainState, start: int) -> TrainState:
        """Steps from batch `start` to the end; saves on the way."""
        steps = len(self.batches)
        pending: tuple[int, Any, Any] | None = None
        for index, batch in enumerate(prefetch(self.batches, start, steps), start):
            state, metrics = self.step(state, self.base, batch)
            # The numbers of the step before are read while this one computes.
            if pending is not None:
                self.note(*pending)
            pending = (index, metrics, batch)
            done = index + 1
            if done % self.config.checkpoint.every == 0 or done == steps:
                self.note(*pending)
                pending = None
                self.save(state, done)
        self.checkpoints.wait()
        if start == steps:  # stopped between the last checkpoint and the report
            self.export(state)
        return state

    def save(self, state: TrainState, done: int) -> None:
        """Saves the state after `done` steps, and its adapter."""
        self.watch.sync()
        self.checkpoints.save(
            state, {**self.record, "batches": done, "steps": len(self.batches)}
        )
        self.export(state)

    def export(self, state: TrainState) -> None:
        """Writes adapter/, for the base as it was loaded."""
        lora, adapters = absorb(
            self.config.lora, jax.device_get(state.adapters), self.base
        )
        convert.save_adapter(
            Path(self.config.output_dir) / ADAPTER,
            dataclasses.replace(lora, base_fingerprint=self.fingerprint),
            adapters,
            self.architecture,
            base_model_name_or_path=self.config.model.path,
            overwrite=True,
        )

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


def _check_directory(directory: Path) -> None:
    """Refuses, before any work is done, what cannot become a run directory."""
    above = next(p for p in [directory, *directory.absolute().parents] if p.exists())
    if not above.is_dir():
        raise UserError(f"The output directory `{directory}`: `{above}` is a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"The output directory `{directory}` cannot be written: no permission to "
            f"write in `{above}`."
        )
    if not directory.is_dir() or (directory / SETTINGS).is_file():
        return
    if any(directory.iterdir()):
        raise UserError(
            f"The output directory `{directory}` is not empty and holds no run "
            f"({SETTINGS}). Give an empty or new directory."
        )


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Makes the run directory and keeps other processes from training in it.

    A start that fails before anything was written leaves no empty directory behind.
    """
    places = [directory, *directory.parents]
    made = [place for place in places if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"The output directory `{directory}` cannot be made: {error.strerror}."
        ) from error
    try:
        # The system gives the lock back when the process ends, however it ends.
        # Some network file systems have no locks; there the user has to know.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"Another process is training in `{directory}`. Wait until it "
                    "ends, or give another --output-dir."
                ) from None
        # What a killed process left of an adapter half-written.
        for name in (ADAPTER, START):
            for left in directory.glob(f".{name}.*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # one that holds something stays
            for place in made:
                place.rmdir()


def _with_initial_adapter(
    config: RunConfig, given: Collection[str], base: Any
) -> RunConfig:
    """Takes the settings of the adapter that the run starts from, but for those given.

    Its file is checked against the base as well, on shapes.
    """
    place = config.train.adapter_init
    assert place is not None
    own = convert.check_adapter(place, base)
    # All that was trained is trained again.
    lora, changes = continued(own, config.lora, given, base, name=place)
    lora = dataclasses.replace(
        lora,
        init_lora_weights="default",
        base_model_name_or_path=config.lora.base_model_name_or_path,
        revision=config.lora.revision,
        base_fingerprint=None,
    )
    _say(
        f"Starting from the adapter `{place}` (r={lora.r}, lora_alpha="
        f"{lora.lora_alpha}, lora_dropout={lora.lora_dropout}); it carries no "
        "optimizer state, so AdamW starts afresh."
        + (f" Changed: {', '.join(changes)}." if changes else "")
    )
    return dataclasses.replace(config, lora=lora)


def _record(
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
        },
    }


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
