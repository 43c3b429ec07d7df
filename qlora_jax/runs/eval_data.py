"""TODO."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_jax.data.arrays import Examples
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.data.held_out import content_keys, hold_out
from qlora_jax.data.mixture import Mixture
from qlora_jax.errors import Problems, UserError
from qlora_jax.runs.config import READING, EvalConfig, RunConfig

# Settings that `[eval]` has too.
_OWN = re.compile(rf"`data\.({'|'.join(READING)})`")


@dataclass(frozen=True)
class HeldOut:
    """Data to measure on."""

    examples: Examples | Mixture
    config: DataConfig
    """What they were read with."""
    note: str
    """One line for people."""


@contextlib.contextmanager
def of_eval() -> Iterator[None]:
    """Names the settings of `[eval]` in what is wrong with its data."""
    try:
        yield
    except UserError as error:
        problems = Problems("the held-out data")
        for problem in error.problems:
            problems.add("[eval] " + _OWN.sub(r"`eval.\1`", problem))
        problems.raise_if_any()


def load_held_out(
    config: RunConfig, tokenizer: Any, *, vocab_size: int
) -> HeldOut | None:
    """Reads the file that `[eval]` names; None if it names none.

    Raises:
      UserError: it cannot be read, or holds nothing to measure.
    """
    if not config.eval.path:
        return None
    how = config.eval.data_config(config.data)
    with of_eval():
        examples = load_examples(
            how, tokenizer, vocab_size=vocab_size, run_directory=config.output_dir
        )
    return HeldOut(examples, how, f"Held out: {examples.report.summary()}")


def held_out_again(config: RunConfig, tokenizer: Any, *, vocab_size: int) -> HeldOut:
    """Reads what a run held out, or had of its own, once more.

    Args:
      config: of the run, which measures something.
      tokenizer: as the run had it.
      vocab_size: of its model.

    Raises:
      UserError: data that cannot be read.
    """
    held = load_held_out(config, tokenizer, vocab_size=vocab_size)
    if held is not None:
        return held
    examples = load_examples(
        config.data, tokenizer, vocab_size=vocab_size, run_directory=config.output_dir
    )
    eos = getattr(tokenizer, "eos_token_id", None)
    return taken_out(config.eval, config.data, examples, eos)[1]


def apart(
    config: RunConfig,
    examples: Examples | Mixture,
    held: HeldOut | None,
    eos_token_id: int | None = None,
) -> tuple[Examples | Mixture, HeldOut | None]:
    """Makes sure that what is measured is not trained on.

    Args:
      config: the run.
      examples: those to train on.
      held: data of its own to measure on, if there is any; else it is taken out of
        the examples, as `eval.fraction` or `eval.examples` say.
      eos_token_id: the tokenizer's.

    Returns:
      Examples to train on, and those to measure on; None without `[eval]` data.

    Raises:
      UserError: all of `eval.path` is trained on too, or nothing is left on one side.
    """
    if held is None:
        if not config.eval.measures:
            return examples, None
        return taken_out(config.eval, config.data, examples, eos_token_id)
    trained = set(content_keys(examples).tolist())
    own = content_keys(held.examples).tolist()
    both = sum(key in trained for key in own)
    if both == len(own):
        raise UserError(
            f"[eval] {held.config.name}: every example there is in the training data "
            "too, so its loss would say nothing about what was not trained on. Give "
            "other data, or hold some out of the training data: `eval.fraction` = "
            "0.05."
        )
    if both:
        note = (
            f"\nNote: {both:,} of the {len(own):,} held-out examples are in the "
            "training data too; the model learns those by heart."
        )
        held = dataclasses.replace(held, note=held.note + note)
    return examples, held


def taken_out(
    config: EvalConfig,
    data: DataConfig,
    examples: Examples | Mixture,
    eos_token_id: int | None = None,
) -> tuple[Examples | Mixture, HeldOut]:
    """Takes the part of the examples that `fraction` or `examples` name out of them.

    Args:
      config: says how many.
      data: what the examples were loaded with.
      examples: all of them.
      eos_token_id: the tokenizer's.

    Returns:
      Examples to train on, and those to measure on.

    Raises:
      UserError: nothing is left on one side.
    """
    before = len(examples)
    examples, chosen = hold_out(
        data,
        examples,
        fraction=config.fraction,
        count=config.examples,
        eos_token_id=eos_token_id,
    )
    copies = before - len(examples) - len(chosen)
    note = f"Held out of the training data: {len(chosen):,} examples, " + (
        f"{chosen.report.supervised_tokens:,} supervised tokens"
    )
    if copies:
        note += f"; {copies:,} copies of them are not trained on either"
    note += f". {len(examples):,} examples are left to train on."
    return examples, HeldOut(chosen, data, note)
