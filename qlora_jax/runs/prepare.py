"""Prepares a run from shapes alone: trained parameters, data, compiled step.

    prepared = prepare(config, problems=Problems())

This comes before anything large is read, and collects every problem: settings that
contradict each other or the model, missing files, an adapter to start from that does
not fit, missing libraries, unusable rows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

import convert
from convert import Tokenization, load_tokenization
from qlora_jax.data import (
    Batches,
    Examples,
    Mixture,
    data_notes,
    data_size,
    end_tokens_of,
    eval_batches,
    load_examples,
    with_eos,
)
from qlora_jax.errors import CheckpointError, Problems, UserError, say
from qlora_jax.lora import (
    Selection,
    check_start,
    continued_config,
    given_fields,
    select,
)
from qlora_jax.models import (
    Compute,
    Llama,
    LlamaConfig,
    abstract_base,
    add_parameters,
    apply_changes,
)
from qlora_jax.planning import GpuSpec, estimate_warnings, this_device
from qlora_jax.runs.compiled_step import CompiledStep, StepInputs, compile_step
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.dates import with_run_date, with_saved_date
from qlora_jax.runs.directory import (
    CHECKPOINTS,
    STARTED,
    saved_steps,
)
from qlora_jax.runs.environment import TUNING, Tuning, environment, note_changes
from qlora_jax.runs.eval_data import (
    HeldOut,
    eval_errors,
    load_held_out,
    split_held_out,
)
from qlora_jax.runs.evaluation import check_prompts
from qlora_jax.runs.loading import base_options, say_notes, say_unused
from qlora_jax.runs.metrics import check_trackers
from qlora_jax.runs.notes import note_last_step, note_length, note_other_template
from qlora_jax.runs.packed_attention import check_on_all
from qlora_jax.runs.processes import Peers
from qlora_jax.runs.publishing import published
from qlora_jax.runs.resume import check_continues, newest_record
from qlora_jax.runs.rows import read_facts
from qlora_jax.runs.sources import Sources, find_sources, hub_names
from qlora_jax.training import Group, note_idle, optimizer_groups

# Data up to this size are read even after the settings were refused, so that their
# problems are reported too: some seconds of tokenizing.
_QUICK_BYTES = 16 << 20


@dataclass(frozen=True)
class RunData:
    """What a run is trained and measured on."""

    examples: Examples | Mixture
    batches: Batches
    held_out: HeldOut | None
    tokenizer: Any
    """None if the base, or the adapter that the run starts from, has none."""
    trained_ends: tuple[int, ...]
    """Tokens that the data teach as the end of an answer."""
    eos_token_ids: tuple[int, ...]
    """These, and the tokens that end generation without the run."""


@dataclass(frozen=True)
class PreparedRun:
    """A run that fits the device, before its base is loaded."""

    config: RunConfig
    """With the settings of the adapter that the run starts from."""
    sources: Sources
    model: Llama
    base_options: Mapping[str, Any]
    """Arguments of `convert.load_llama`."""
    drawn: set[str]
    """Parameters of custom modules that are in no file."""
    selection: Selection
    """The trained parameters."""
    optimizer_groups: Sequence[Group]
    origin: dict[str, Any] | None
    """The adapter that the run starts from, for its report."""
    data: RunData
    compiled: CompiledStep


def prepare(
    config: RunConfig,
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    explicit_lora: Collection[str] | None = None,
    *,
    problems: Problems,
    peers: Peers,
) -> PreparedRun:
    """Validates a run and compiles its step, before any large file is read.

    Args:
      config: as `runner.run` takes it, like the next three.
      attention_cls: custom attention modules.
      mlp_cls: custom MLP modules.
      explicit_lora: names of the fields of `config.lora` that the user set.
      problems: problems so far, raised together with those of this function.
      peers: the processes of the run.

    Raises:
      UserError: every problem. Large data are read only if there is no other problem,
        and none if the directory or a changed setting is refused.
      CheckpointError: files of the model or of an adapter are missing or damaged, and
        there is no other problem.
    """
    # A directory that is refused makes all else moot.
    blocked = len(problems) > 0
    quick = _check_paths(config, problems)
    resumed = bool(saved_steps(Path(config.output_dir) / CHECKPOINTS))
    if resumed:
        with problems.collecting():
            config = with_saved_date(config)
    options = base_options(config.model)
    loaded = sources = data = None
    if any(hub_names(config)):
        config, data = _check_before_download(config, resumed, problems, peers)
    with problems.collecting():
        config, sources = find_sources(config)
        loaded = _abstract_model(sources.base, options, attention_cls, mlp_cls)
    if loaded is None:  # nothing else can be checked without the model
        problems.raise_if_any()
    assert loaded is not None and sources is not None
    model, base, drawn = loaded
    starts_fresh = sources.adapter is None
    say_unused(sources.base, sources.adapter)
    say_notes(sources.base)
    if config.model.dtype == "float16":
        say(
            "Note: with model.dtype = 'float16' the loss is not scaled: gradients "
            "below 6e-8 become 0 without a sign of it, and a step with one above "
            "65,504 ends the run. Where the GPU has bfloat16 (Ampere and later), "
            "'bfloat16' has neither limit; 'float32' has it anywhere."
        )
    if not starts_fresh:
        with problems.collecting():
            model, base = _with_adapter_tables(config, sources, model, base)
    elif config.model.resize_to_adapter:
        problems.add(
            "model: `resize_to_adapter` goes with `train.adapter_init`, the adapter "
            "whose vocabulary the base gets."
        )
    origin = trained = saved = None
    with problems.collecting():
        if not starts_fresh:
            config, origin = _with_initial_adapter(
                config, sources, explicit_lora, base, resumed
            )
    with problems.collecting():
        changes = config.model.config_changes
        model = model.clone(config=apply_changes(model.config, changes, "model"))
    if starts_fresh or origin is not None:
        with problems.collecting():
            trained = _select_trained(config, model.config, base)
    if resumed:  # a changed setting needs no data to be seen
        before = len(problems)
        with problems.collecting():
            saved = newest_record(config, peers)
            if saved is not None:
                check_continues(config, saved, steps=config.train.steps)
        blocked = blocked or len(problems) > before
    if data is None and not blocked and (quick or not len(problems)):
        with problems.collecting():
            config, data = _load_data(config, sources, model.config)
    if saved is not None and data is not None:
        with problems.collecting():
            data_fingerprint = data.examples.report.fingerprint
            check_continues(config, saved, data_fingerprint, len(data.batches))
    problems.raise_if_any()
    assert trained is not None and data is not None
    if config.hub.model_id is not None and not published(config):
        # Not after hours of training.
        convert.check_push(config.hub.model_id, private=config.hub.private)
    selection, optimizer_groups = trained
    return PreparedRun(
        config=config,
        sources=sources,
        model=model,
        base_options=options,
        drawn=drawn,
        selection=selection,
        optimizer_groups=optimizer_groups,
        origin=origin,
        data=data,
        compiled=_compile(config, model, base, data, resumed, peers),
    )


def _check_before_download(
    config: RunConfig, resumed: bool, problems: Problems, peers: Peers
) -> tuple[RunConfig, RunData | None]:
    """Checks what needs no weights of the base, so that a mistake costs no download.

    Returns:
      The settings, with the commits that were found and the date of the run; and the
      data, unless an adapter that the run starts from may change the vocabulary.

    Raises:
      UserError: every problem.
    """
    problems.raise_if_any()
    config, sources = find_sources(config, "tokenizer")
    architecture = convert.open_config(sources.base)
    data = None
    if config.hub.model_id is not None:
        with problems.collecting():
            convert.check_repository_name(config.hub.model_id)
    if resumed:
        with problems.collecting():
            saved = newest_record(config, peers)
            if saved is not None:
                check_continues(config, saved, steps=config.train.steps)
    if sources.adapter is None:
        with problems.collecting():
            changes = config.model.config_changes
            architecture = apply_changes(architecture, changes, "model")
            if not architecture.extra_tensors:
                select(abstract_base(architecture), config.lora)
        if not len(problems):
            with problems.collecting():
                config, data = _load_data(config, sources, architecture)
    problems.raise_if_any()
    return config, data


def _check_paths(config: RunConfig, problems: Problems) -> bool:
    """Checks trackers and data files; returns whether the data are quick to read."""
    with problems.collecting():
        check_trackers(config.log)
    sizes: list[int | None] = []
    with problems.collecting():
        sizes.append(data_size(config.data))
    if config.eval.path:
        with problems.collecting(), eval_errors():
            sizes.append(data_size(config.eval.data_config(config.data)))
    if config.eval.idle:
        say(
            f"Note: eval: {', '.join(f'`{name}`' for name in config.eval.idle)} given, "
            "and there is nothing to measure. `path`, `fraction` or `examples` say "
            "what the held-out data are."
        )
    return all(size is not None and size <= _QUICK_BYTES for size in sizes)


def _abstract_model(
    directory: Path,
    options: Mapping[str, Any],
    attention_cls: Callable[..., nn.Module] | None,
    mlp_cls: Callable[..., nn.Module] | None,
) -> tuple[Llama, Any, set[str]]:
    """Returns the model, the shapes of its base, and those of them that are in no file.

    Raises:
      UserError: the checkpoint has custom modules, and no classes were given.
    """
    architecture, shapes = convert.abstract_llama(directory, **options)
    complete = Llama(architecture, Compute(), attention_cls, mlp_cls)

    def add(base: Any) -> Any:
        nonlocal complete
        complete, base = add_parameters(complete, base, jax.random.key(0))
        return base

    # `add` runs on tracers; the module that it completes leaves by the closure.
    base = jax.eval_shape(add, shapes)
    drawn = set(complete.config.extra_tensors) - set(architecture.extra_tensors)
    return complete, base, drawn


def _with_adapter_tables(
    config: RunConfig, sources: Sources, model: Llama, base: Any
) -> tuple[Llama, Any]:
    """Gives the model the vocabulary and tables of `train.adapter_init`."""
    assert sources.adapter is not None
    out = convert.with_saved_tables(
        model.config, base, sources.adapter, resize=config.model.resize_to_adapter
    )
    for note in out.notes:
        say(f"Note: {note}.")
    return model.clone(config=out.config), out.base


def _with_initial_adapter(
    config: RunConfig,
    sources: Sources,
    explicit_lora: Collection[str] | None,
    base: Any,
    resumed: bool = False,
) -> tuple[RunConfig, dict[str, Any]]:
    """Takes over the settings of `train.adapter_init`, except for explicit ones.

    The adapter's file is also checked against the shapes of the base.

    Returns:
      The configuration, and the origin of the run for report.json.
    """
    path, directory = config.train.adapter_init, sources.adapter
    assert path is not None and directory is not None
    if explicit_lora is None:
        explicit_lora = given_fields(config.lora)
    adapter = convert.check_adapter(
        directory, base, strict=config.train.adapter_init_strict
    )
    convert.check_not_merged(sources.base, directory)
    for note in convert.other_base_name(adapter, directory, sources.base):
        say(f"Note: {note}.")
    # The context length that the adapter was trained for is kept.
    changes = json.loads(adapter.base_config_changes or "{}")
    model = dataclasses.replace(
        config.model, **{**changes, **config.model.config_changes}
    )
    lora, notes = continued_config(adapter, config.lora, explicit_lora, base, name=path)
    notes += [
        f"{name} {changes.get(name, 'as in the base')} -> {value}"
        for name, value in config.model.config_changes.items()
        if changes.get(name) != value
    ]
    lora = dataclasses.replace(
        lora,
        init_lora_weights="default",
        base_model_name_or_path=config.lora.base_model_name_or_path,
        revision=config.lora.revision,
        base_fingerprint=None,
        base_config_changes=None,
    )
    before, after = (
        sum(select(base, settings).groups().values()) for settings in (adapter, lora)
    )
    if not resumed:  # else the run continues from its checkpoint
        say(
            f"Starting from the adapter `{path}` (r={lora.r}, lora_alpha="
            f"{lora.lora_alpha}, lora_dropout={lora.lora_dropout}): it has "
            f"{before:,} trained parameters, and this run trains {after:,}. It "
            "carries no optimizer state, so the optimizer starts afresh."
            + (f" Changed: {', '.join(notes)}." if notes else "")
        )
    origin = {
        "path": path,
        "trainable_parameters_before": before,
        "trainable_parameters": after,
    }
    return dataclasses.replace(config, lora=lora, model=model), origin


def _select_trained(
    config: RunConfig, architecture: LlamaConfig, base: Any
) -> tuple[Selection, Sequence[Group]]:
    """Selects the trained parameters and their optimizer groups; notes surprises."""
    selection = select(base, config.lora)
    if config.train.adapter_init is None:
        check_start(base, config.lora, selection)
    for warning in estimate_warnings(architecture, config.lora, base):
        say(f"Note: {warning}")
    groups = optimizer_groups(config.train, selection)
    idle = note_idle(groups)
    if idle is not None:
        say(f"Note: {idle}")
    return selection, groups


def _load_data(
    config: RunConfig, sources: Sources, architecture: LlamaConfig
) -> tuple[RunConfig, RunData]:
    """Loads the examples, holds some out, and arranges the others in batches.

    Returns:
      The settings with the date of the run, and its data.
    """
    text = _load_tokenization(config, sources, architecture)
    tokenizer = with_eos(text.tokenizer, config.data.eos_token)
    config = with_run_date(config, tokenizer)
    note_other_template(config, text.adapter_template)
    vocab_size = architecture.vocab_size
    examples, held_out, problems = None, None, Problems()
    with problems.collecting():
        check_prompts(config.eval, tokenizer, architecture)
    with problems.collecting():
        examples = load_examples(
            config.data,
            tokenizer,
            vocab_size=vocab_size,
            progress=sys.stderr.isatty(),
            run_directory=config.output_dir,
        )
    with problems.collecting():
        held_out = load_held_out(config, tokenizer, vocab_size=vocab_size)
    problems.raise_if_any()
    assert examples is not None
    eos = getattr(tokenizer, "eos_token_id", None)
    ends = [end for ends in end_tokens_of(examples, tokenizer) for end in ends]
    if config.data.eos_token is not None and eos is not None:
        ends.append(eos)
    trained_ends = tuple(dict.fromkeys(ends))
    # Before `Batches`, so that their fingerprint and order are those of what is trained
    # on.
    examples, held_out = split_held_out(config, examples, held_out, eos)
    say(examples.report.summary())
    if held_out is not None:
        say(held_out.note)
    batches = Batches(
        examples,
        config.data,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        pad_token_id=architecture.padding_id,
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    for note in data_notes(examples, config.data, batches, tokenizer):
        say(f"Note: {note}")
    note_last_step(batches, config.train.epochs)
    if config.train.longest_warmup > len(batches):
        raise UserError(
            f"train: `warmup_steps`={config.train.longest_warmup} exceeds the "
            f"{len(batches)} steps of this run. Give fewer of them, or a share (0.03)."
        )
    data = RunData(
        examples=examples,
        batches=batches,
        held_out=held_out,
        tokenizer=tokenizer,
        trained_ends=trained_ends,
        eos_token_ids=tuple(sorted({*text.eos_token_ids, *trained_ends})),
    )
    return config, data


def _load_tokenization(
    config: RunConfig, sources: Sources, architecture: LlamaConfig
) -> Tokenization:
    """Loads the tokenizer of the base, or of the adapter that the run starts from."""
    needed = config.data.needs_tokenizer or bool(config.eval.sample_prompts)
    if config.eval.path:
        needed = needed or config.eval.data_config(config.data).needs_tokenizer
    try:
        text = load_tokenization(architecture, sources.base, sources.adapter)
    except CheckpointError as error:
        if needed:
            raise
        say(f"Note: {error} The run does without, and stops at no trained token.")
        return Tokenization(None, architecture.eos_token_ids)
    for note in text.notes:
        say(note)
    if text.tokenizer is None and config.data.needs_tokenizer:
        raise UserError(
            f"`{config.model.path}` has no tokenizer, and data.format="
            f"{config.data.format!r} needs one. Put the model's tokenizer files there, "
            "or give token ids (data.format = 'tokens')."
        )
    return text


def _compile(
    config: RunConfig,
    model: Llama,
    base: Any,
    data: RunData,
    resumed: bool,
    peers: Peers,
) -> CompiledStep:
    """Compiles the run's step and describes its plan on stderr."""
    directory, recorded = Path(config.output_dir), None
    now = environment()
    tuning = Tuning(now)
    if resumed and (directory / STARTED).is_file():
        problems: list[str] = []
        # What is damaged costs a note, and not the run.
        started = read_facts(directory / STARTED, problems) or {}
        for problem in problems:
            say(f"Note: {problem}")
        recorded = started.get("plan")
        note_changes(started, now)
        if jax.default_backend() == "gpu":
            tuning = Tuning.read(directory / TUNING, now)
    note_length(model.config, data.examples.report.longest_example)
    held_out, eval_batch = data.held_out, None
    if held_out is not None:
        eval_batch = next(
            eval_batches(
                held_out.examples,
                held_out.config,
                batch_size=config.eval_batch_size,
                pad_token_id=0,
            )
        )
    compute = Compute(
        dtype=config.model.dtype,
        kernels=config.model.kernels,
        norms=config.model.fusion,
        activation=config.model.fusion,
        lora=config.lora,
    )
    # A program of several processes is compiled by all of them together.
    peers.agree({"data": data.examples.report.fingerprint})
    rows, length = data.batches[0]["tokens"].shape[1:]
    say(f"Compiling the step, of {rows:,} x {length:,} tokens.")
    compiled = compile_step(
        model.clone(compute=compute),
        # Every batch has the shapes of the first, so one compilation serves the run.
        StepInputs(base, data.batches[0], eval_batch),
        config.model,
        config.train,
        len(data.batches),
        recorded=recorded,
        tuning=tuning,
        mesh=config.mesh,
        attention_check=partial(check_on_all, peers),
        gpu=_smallest_device(peers),
    )
    for note in compiled.notes:
        say(note)
    say(compiled.summary())
    return compiled


def _smallest_device(peers: Peers) -> GpuSpec:
    """Returns the device at hand with the least memory of those of all processes.

    All processes have to take the same mesh and policy.
    """
    device = this_device()
    sizes = peers.gather(device.memory_bytes, "comparing the memory of devices")
    return dataclasses.replace(device, memory_bytes=min(sizes))
