"""A run as far as shapes can tell: what is trained, on what data, that it fits.

    prepared = prepare(config)

All of it before anything large is read or compiled, and all that is wrong with it at
once: settings that contradict each other or the model, paths that lead nowhere, an
adapter to start from that does not fit, libraries that are missing, rows that cannot be
used.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

import convert
from convert.tokenizer import load_tokenizer
from qlora_jax.data.arrays import Examples
from qlora_jax.data.batches import Batch, Batches, eval_batches
from qlora_jax.data.examples import data_size, load_examples
from qlora_jax.data.mixture import Mixture
from qlora_jax.data.notes import data_notes
from qlora_jax.errors import Problems, UserError, say
from qlora_jax.lora.init import check_start, continued, given_fields
from qlora_jax.lora.targets import Selection, select
from qlora_jax.models.config import LlamaConfig, apply_changes
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama, add_parameters
from qlora_jax.planning.estimate import warnings
from qlora_jax.runs.compiled_step import CompiledStep, fit
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import CHECKPOINTS, saved_steps
from qlora_jax.runs.eval_data import HeldOut, apart, load_held_out, of_eval
from qlora_jax.runs.evaluation import check_prompts
from qlora_jax.runs.metrics import check_trackers
from qlora_jax.runs.resume import check_continues
from qlora_jax.training.parameter_groups import Group, note_idle, optimizer_groups

# Bytes of data that are read although the settings are refused already, to say what is
# wrong with the rows as well: some seconds of tokenizing.
_READ_ANYWAY = 16 << 20


@dataclass(frozen=True)
class PreparedRun:
    """What is adapted, on what data, and that it fits: all that shapes can say."""

    config: RunConfig
    """With the settings of the adapter that the run starts from."""
    model: Llama
    how: dict[str, Any]
    """Arguments of `convert.load_llama`."""
    drawn: set[str]
    """Parameters of modules of the user's own that are in no file."""
    selection: Selection
    rates: Sequence[Group]
    origin: dict[str, Any] | None
    """Where the run starts from, for its report."""
    examples: Examples | Mixture
    batches: Batches
    held: HeldOut | None
    tokenizer: Any
    fitted: CompiledStep


def prepare(
    config: RunConfig,
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    given: Collection[str] | None = None,
    *,
    problems: Problems,
) -> PreparedRun:
    """Settles on shapes what can be, before anything large is read.

    Args:
      config: as `runner.run` takes it, like the next ones.
      attention_cls: attention modules of yours.
      mlp_cls: MLP modules of yours.
      given: names of the fields of `config.lora` that someone gave.
      problems: what was found wrong so far, to be said with the rest.

    Raises:
      UserError: all that is wrong. Large data are read only where nothing else is.
      CheckpointError: files of the model or of an adapter are missing or damaged, and
        nothing else is wrong.
    """
    small = _check_places(config, problems)
    resumed = bool(saved_steps(Path(config.output_dir) / CHECKPOINTS))
    how: Any = {
        "quantization": None
        if config.model.quantization == "none"
        else config.model.quantization,
        "quantize_lm_head": config.model.lm_head == "nf4",
        "dtype": config.model.dtype,
    }
    found = None
    with problems.collecting():
        found = _shapes(config, how, attention_cls, mlp_cls)
    if found is None:  # all else is a question of the model
        problems.raise_if_any()
    assert found is not None
    model, abstract, drawn = found
    origin = trained = laid_out = None
    architecture = model.config
    initial = config.train.adapter_init
    with problems.collecting():
        if initial is not None:
            given = given_fields(config.lora) if given is None else given
            config, origin = _with_initial_adapter(config, given, abstract, resumed)
    with problems.collecting():
        architecture = apply_changes(architecture, config.model.config_changes, "model")
    if initial is None or origin is not None:
        with problems.collecting():
            trained = _trained(config, architecture, abstract)
    if small or not len(problems):
        with problems.collecting():
            laid_out = _data(config, architecture)
    if resumed and laid_out is not None:
        with problems.collecting():
            check_continues(config, laid_out[0], len(laid_out[1]))
    problems.raise_if_any()
    assert trained is not None and laid_out is not None
    model = model.clone(config=architecture)
    examples, batches, held, tokenizer = laid_out
    _note_length(architecture, examples.report.longest_example)
    compute = Compute(
        dtype=config.model.dtype, kernels=config.model.kernels, lora=config.lora
    )
    fitted = fit(
        model.clone(compute=compute),
        config.model,
        abstract,
        batches[0],
        config.train,
        len(batches),
        held_out=None if held is None else _first_held_out(config, held),
    )
    say(fitted.summary())
    return PreparedRun(
        config,
        model,
        how,
        drawn,
        *trained,
        origin,
        examples,
        batches,
        held,
        tokenizer,
        fitted,
    )


def _check_places(config: RunConfig, problems: Problems) -> bool:
    """Looks for what the settings name; says whether the data are quickly read."""
    with problems.collecting():
        check_trackers(config.log)
    sizes: list[int | None] = []
    with problems.collecting():
        sizes.append(data_size(config.data))
    if config.eval.path:
        with problems.collecting(), of_eval():
            sizes.append(data_size(config.eval.data_config(config.data)))
    if config.eval.idle:
        say(
            f"Note: eval: {', '.join(f'`{name}`' for name in config.eval.idle)} given, "
            "and there is nothing to measure. `path`, `fraction` or `examples` say "
            "what the held-out data are."
        )
    return all(size is not None and size <= _READ_ANYWAY for size in sizes)


def _shapes(
    config: RunConfig,
    how: Mapping[str, Any],
    attention_cls: Callable[..., nn.Module] | None,
    mlp_cls: Callable[..., nn.Module] | None,
) -> tuple[Llama, Any, set[str]]:
    """The model, its parameters as shapes, and those of them that are in no file."""
    architecture, shapes = convert.abstract_llama(config.model.path, **how)
    model = Llama(architecture, Compute(), attention_cls, mlp_cls)
    model, abstract = _abstract(model, shapes)
    drawn = set(model.config.extra_tensors) - set(architecture.extra_tensors)
    return model, abstract, drawn


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


def _with_initial_adapter(
    config: RunConfig, given: Collection[str], base: Any, resumed: bool = False
) -> tuple[RunConfig, dict[str, Any]]:
    """Takes the settings of the adapter that the run starts from, but for those given.

    Its file is checked against the base as well, on shapes.

    Returns:
      The configuration, and what report.json says of where the run started.
    """
    place = config.train.adapter_init
    assert place is not None
    own = convert.check_adapter(place, base)
    # All that was trained is trained again, at the context length it was trained for.
    changes = json.loads(own.base_config_changes or "{}")
    model = dataclasses.replace(
        config.model, **{**changes, **config.model.config_changes}
    )
    lora, notes = continued(own, config.lora, given, base, name=place)
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
    counts = [sum(select(base, one).groups().values()) for one in (own, lora)]
    if not resumed:  # else the checkpoint is where it goes on
        say(
            f"Starting from the adapter `{place}` (r={lora.r}, lora_alpha="
            f"{lora.lora_alpha}, lora_dropout={lora.lora_dropout}): it has "
            f"{counts[0]:,} trained parameters, and this run trains {counts[1]:,}. It "
            "carries no optimizer state, so the optimizer starts afresh."
            + (f" Changed: {', '.join(notes)}." if notes else "")
        )
    origin = {
        "path": place,
        "trainable_parameters_before": counts[0],
        "trainable_parameters": counts[1],
    }
    return dataclasses.replace(config, lora=lora, model=model), origin


def _trained(
    config: RunConfig, architecture: LlamaConfig, abstract: Any
) -> tuple[Selection, Sequence[Group]]:
    """What is trained, and how fast; says what may surprise."""
    selection = select(abstract, config.lora)
    if config.train.adapter_init is None:
        check_start(abstract, config.lora, selection)
    for warning in warnings(architecture, config.lora, abstract):
        say(f"Note: {warning}")
    rates = optimizer_groups(config.train, selection)
    idle = note_idle(rates)
    if idle is not None:
        say(f"Note: {idle}")
    return selection, rates


def _data(
    config: RunConfig, architecture: LlamaConfig
) -> tuple[Examples | Mixture, Batches, HeldOut | None, Any]:
    """Loads the examples and lays them out in batches; held-out ones; tokenizer."""
    needs = config.data.needs_tokenizer
    if config.eval.path:
        needs = needs or config.eval.data_config(config.data).needs_tokenizer
    tokenizer = None
    if needs or config.eval.sample_prompts:
        tokenizer = load_tokenizer(config.model.path)
    if needs and tokenizer is None:
        raise UserError(
            f"`{config.model.path}` has no tokenizer, and data.format="
            f"{config.data.format!r} needs one. Put the model's tokenizer files "
            "there, or give token ids (data.format = 'tokens')."
        )
    vocab_size = architecture.vocab_size
    examples, held, problems = None, None, Problems()
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
        held = load_held_out(config, tokenizer, vocab_size=vocab_size)
    problems.raise_if_any()
    assert examples is not None
    eos = getattr(tokenizer, "eos_token_id", None)
    examples, held = apart(config, examples, held, eos)
    say(examples.report.summary())
    if held is not None:
        say(held.note)
    batches = Batches(
        examples,
        config.data,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        pad_token_id=architecture.pad_token_id or 0,
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    for note in data_notes(examples, config.data, batches, tokenizer):
        say(f"Note: {note}")
    if config.train.longest_warmup > len(batches):
        raise UserError(
            f"train: `warmup_steps`={config.train.longest_warmup} exceeds the "
            f"{len(batches)} steps of this run."
        )
    return examples, batches, held, tokenizer


def _first_held_out(config: RunConfig, held: HeldOut) -> Batch:
    batches = eval_batches(
        held.examples,
        held.config,
        batch_size=config.eval_batch_size,
        pad_token_id=0,
    )
    return next(batches)


def _note_length(architecture: LlamaConfig, longest: int) -> None:
    """Says so where rows are longer than the model is meant for."""
    limit = architecture.max_position_embeddings
    if longest <= limit:
        return
    scaling = architecture.rope_scaling
    say(
        f"Note: the longest example has {longest:,} tokens, and this model is meant "
        f"for {limit:,} (`max_position_embeddings`)"
        + (
            " without scaled positions"
            if scaling is None
            else f" with positions scaled by {scaling.factor:g} ({scaling.rope_type})"
        )
        + ". Training goes on, on positions that it has never seen. A longer context "
        "is a setting: `model.max_position_embeddings` and [model.rope_scaling]; "
        "`data.max_length` makes rows shorter."
    )
