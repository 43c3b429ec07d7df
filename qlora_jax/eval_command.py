"""The `eval` command: loss and perplexity of a model on a data file.

A run directory's rows are read as the run read them, unless options say otherwise; the
sources of a mixture are measured one by one as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from qlora_jax.data import DataConfig, Examples, Mixture, eval_batches, load_examples
from qlora_jax.data.settings import name_of
from qlora_jax.directories import run_settings
from qlora_jax.evaluation import held_out_loss, jit_eval, perplexity
from qlora_jax.generate_command import Asked
from qlora_jax.model import Model


@dataclass(frozen=True, kw_only=True)
class Eval(Asked):
    """Measure loss and perplexity of a model on a data file."""

    data: DataConfig
    batch_size: int = 8
    """Rows at a time."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        model = self.load()
        examples = load_examples(
            self.data,
            model.tokenizer,
            vocab_size=model.config.vocab_size,
            run_directory=self.path,
        )
        if not isinstance(examples, Mixture):
            return measure(model, examples, self.data, self.batch_size).report()
        totals: dict[str, Loss] = {}
        for (source, data), part in zip(self.data.parts(), examples.parts, strict=True):
            name = name_of(source.path)
            found = measure(model, part, data, self.batch_size)
            totals[name] = totals.get(name, Loss()) + found
        return {
            **sum(totals.values(), Loss()).report(),
            "sources": {name: total.report() for name, total in totals.items()},
        }


@dataclass(frozen=True)
class Loss:
    """A summed loss, and what it was summed over."""

    total: float = 0.0
    """Nats."""
    tokens: int = 0
    """Supervised ones."""
    rows: int = 0

    def __add__(self, other: Loss) -> Loss:
        """Both together."""
        return Loss(
            self.total + other.total, self.tokens + other.tokens, self.rows + other.rows
        )

    def report(self) -> dict[str, Any]:
        """The numbers as they are reported; loss in nats per supervised token."""
        loss = self.total / self.tokens
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "supervised_tokens": self.tokens,
            "rows": self.rows,
        }


def measure(
    model: Model, examples: Examples, data: DataConfig, batch_size: int
) -> Loss:
    """Sums the loss of all examples of one source.

    Args:
      model: what is measured.
      examples: loaded with `data`.
      data: how they are laid out.
      batch_size: rows at a time.

    Raises:
      UserError: `batch_size` is not a positive integer.
    """
    batches = eval_batches(
        examples,
        data,
        batch_size=batch_size,
        pad_token_id=model.config.pad_token_id or 0,
    )
    adapters = model.variables.get("lora", {})
    total, tokens = held_out_loss(jit_eval(model.module), adapters, model.base, batches)
    return Loss(total, tokens, len(examples))


def eval_from_arguments(args: Sequence[str]) -> Eval:
    """Reads `eval PATH [--options]`."""
    options: dict[str, Any] = {}
    if args and not args[0].startswith("-"):
        trained = run_settings(Path(args[0]))
        if trained is not None:  # rows are read as the run read them, unless told
            data = _evaluated(trained.data, args)
            options["default"] = Eval(path=args[0], data=data)
    return tyro.cli(Eval, args=args, prog="qlora-jax eval", **options)


def _evaluated(data: DataConfig, args: Sequence[str]) -> DataConfig:
    """How a run read its rows, for a file given in place of them or for them."""
    if not any(arg.partition("=")[0] == "--data.path" for arg in args):
        return data
    # One file is no mixture, and is read once.
    path = data.path or data.sources[0].path
    return dataclasses.replace(data, path=path, sources=(), cache=None, split=None)
