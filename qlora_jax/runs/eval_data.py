"""Held-out data: read, split from the training data, and read again later.

`[eval]` names a file to measure on, or a share of the training examples to hold out.
Either way no example is both trained on and measured, and a run directory is enough to
find the same examples again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_jax.data import (
    SPLIT,
    DataConfig,
    Examples,
    Mixture,
    content_keys,
    hold_out,
    load_examples,
)
from qlora_jax.errors import Problems, UserError, counted
from qlora_jax.runs.config import READING, EvalConfig, RunConfig

_SHARED_SETTINGS = re.compile(rf"`data\.({'|'.join(READING)})`")


@dataclass(frozen=True)
class HeldOut:
    """Examples to measure on."""

    examples: Examples | Mixture
    config: DataConfig
    """Settings that they were read with."""
    note: str
    """A line for the user."""


@contextlib.contextmanager
def eval_errors() -> Iterator[None]:
    """Names the settings `eval.*` instead of `data.*` in errors of held-out data."""
    try:
        yield
    except UserError as error:
        problems = Problems("the held-out data")
        for problem in error.problems:
            problems.add("[eval] " + _SHARED_SETTINGS.sub(r"`eval.\1`", problem))
        problems.raise_if_any()


def load_held_out(
    config: RunConfig, tokenizer: Any, *, vocab_size: int
) -> HeldOut | None:
    """Reads the file that `eval.path` names; None if it names none.

    Raises:
      UserError: it cannot be read, or has no supervised token.
    """
    if not config.eval.path:
        return None
    settings = config.eval.data_config(config.data)
    with eval_errors():
        examples = load_examples(
            settings, tokenizer, vocab_size=vocab_size, run_directory=config.output_dir
        )
    return HeldOut(examples, settings, f"Held out: {examples.report.summary()}")


def reload_held_out(config: RunConfig, tokenizer: Any, *, vocab_size: int) -> HeldOut:
    """Reads again what a finished or stopped run was measured on.

    Args:
      config: settings of the run, with `eval.measures`.
      tokenizer: as the run used it.
      vocab_size: of its model.

    Raises:
      UserError: data that cannot be read.
    """
    held_out = load_held_out(config, tokenizer, vocab_size=vocab_size)
    if held_out is not None:
        return held_out
    examples = load_examples(
        config.data, tokenizer, vocab_size=vocab_size, run_directory=config.output_dir
    )
    eos = getattr(tokenizer, "eos_token_id", None)
    return exclude_held_out(config.eval, config.data, examples, eos)[1]


def split_held_out(
    config: RunConfig,
    examples: Examples | Mixture,
    held_out: HeldOut | None,
    eos_token_id: int | None = None,
) -> tuple[Examples | Mixture, HeldOut | None]:
    """Separates the examples to train on from those to measure on.

    Args:
      config: the run.
      examples: training examples.
      held_out: separate data to measure on; None = hold out the part of the training
        examples that `eval.fraction` or `eval.examples` selects, if any.
      eos_token_id: the tokenizer's.

    Returns:
      Examples to train on, and those to measure on; None without `[eval]` data.

    Raises:
      UserError: all of `eval.path` is trained on too, or one side is empty.
    """
    if held_out is None:
        if not config.eval.measures:
            return examples, None
        return exclude_held_out(config.eval, config.data, examples, eos_token_id)
    # Compared by content: the same example may be in two files.
    training_keys = set(content_keys(examples).tolist())
    keys = content_keys(held_out.examples).tolist()
    shared = sum(key in training_keys for key in keys)
    if shared == len(keys):
        raise UserError(
            f"[eval] {held_out.config.name}: every example there is in the training "
            "data too, so its loss would say nothing about what was not trained on. "
            "Give other data, or hold some out of the training data: `eval.fraction` "
            "= 0.05."
        )
    if shared:
        note = (
            f"\nNote: {shared:,} of the {len(keys):,} held-out examples are in the "
            "training data too; the model learns those by heart."
        )
        held_out = dataclasses.replace(held_out, note=held_out.note + note)
    return examples, held_out


def exclude_held_out(
    config: EvalConfig,
    data: DataConfig,
    examples: Examples | Mixture,
    eos_token_id: int | None = None,
) -> tuple[Examples | Mixture, HeldOut]:
    """Removes the part that `fraction` or `examples` selects, with all its copies.

    Args:
      config: how many examples to hold out.
      data: settings that the examples were loaded with.
      examples: all of them.
      eos_token_id: the tokenizer's.

    Returns:
      Examples to train on, and those to measure on.

    Raises:
      UserError: one side is empty.
    """
    total = len(examples)
    examples, chosen = hold_out(
        data,
        examples,
        fraction=config.fraction,
        count=config.examples,
        eos_token_id=eos_token_id,
    )
    copies = total - len(examples) - len(chosen)
    note = f"Held out of the training data: {counted(len(chosen), 'example')}, " + (
        counted(chosen.report.supervised_tokens, "supervised token")
    )
    if copies:
        word = "copy" if copies == 1 else "copies"
        note += f"; {copies:,} {word} of them not trained on either"
    note += f". Left to train on: {counted(len(examples), 'example')}."
    report = chosen.report
    pieces = [
        name
        for name, count in (
            ("windows of documents", report.documents_cut),
            ("answers of conversations", report.remarks.get(SPLIT, 0)),
        )
        if count
    ]
    if pieces:
        note += (
            f"\nNote: some of them are {' and '.join(pieces)} of which other parts are "
            "trained on. `eval.path` measures on data of its own."
        )
    return examples, HeldOut(chosen, data, note)
