"""The `eval` command: loss and perplexity of a model, on a file or what a run held out.

A run directory's rows are read as the run read them, unless options say otherwise; the
sources of a mixture are measured one by one as well. What was measured is said with the
numbers: a loss on what was trained on looks as good as any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from qlora_jax.cli.options import ModelOptions, parse
from qlora_jax.cli.output import run_and_print
from qlora_jax.data.arrays import Examples
from qlora_jax.data.batches import eval_batches
from qlora_jax.data.config import DataConfig, name_of
from qlora_jax.data.examples import load_examples
from qlora_jax.data.mixture import Mixture
from qlora_jax.errors import UserError
from qlora_jax.runs.overrides import option_keys

if TYPE_CHECKING:
    from qlora_jax.inference.model import Model
    from qlora_jax.runs.config import RunConfig
    from qlora_jax.runs.eval_data import HeldOut


@dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """Measure loss and perplexity on a data file or held-out examples."""

    data: DataConfig
    held_out: tyro.conf.Suppress[bool] = False
    """Measure what the run `path` held out; `data` is then what it was trained on."""
    batch_size: int = 8
    """Rows at a time."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report.

        Raises:
          UserError: data that cannot be read, or are no longer what a run held out.
        """
        resolved = self.resolve()
        model, settings = self.load(resolved), resolved.settings
        if self.held_out and settings is not None:
            held, measured = _held_out(settings, model)
            examples, config = held.examples, held.config
        else:
            config, measured = self.data, _given(self.data, settings)
            examples = load_examples(
                config,
                model.tokenizer,
                vocab_size=model.config.vocab_size,
                run_directory=self.path if settings is None else settings.output_dir,
            )
        about = {"data": config.name, "measured": measured}
        if not isinstance(examples, Mixture):
            found = measure(model, examples, config, self.batch_size)
            return {**about, **found.report()}
        totals: dict[str, Loss] = {}
        for (source, data), part in zip(config.parts(), examples.parts, strict=True):
            name = name_of(source.path)
            found = measure(model, part, data, self.batch_size)
            totals[name] = totals.get(name, Loss()) + found
        return {
            **about,
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
        from qlora_jax.runs.evaluation import perplexity

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
    from qlora_jax.runs.evaluation import held_out_loss
    from qlora_jax.training.step import jit_eval

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
    """Reads `eval PATH [--options]`.

    Raises:
      UserError: a run without data to measure, and none given.
    """
    options: dict[str, Any] = {}
    if args and not args[0].startswith("-"):
        from qlora_jax.runs.directory import find_run

        run = find_run(Path(args[0]))
        if run is not None:  # rows are read as the run read them, unless told
            options["default"] = _of_a_run(run, args)
    return parse(Eval, args, prog="qlora-jax eval", **options)


def _of_a_run(run: Path, args: Sequence[str]) -> Eval:
    """What is measured of a run before the options are read."""
    from qlora_jax.runs.directory import read_settings

    trained = read_settings(run)
    data = trained.data
    given = [key for key in option_keys(args) if key.startswith("data.")]
    if "data.path" in given:
        # One file is no mixture, and is read once.
        path = data.path or data.sources[0].path
        data = dataclasses.replace(data, path=path, sources=(), cache=None, split=None)
        return Eval(path=args[0], data=data)
    if {"-h", "--help"} & set(args):
        return Eval(path=args[0], data=data)
    if not trained.eval.measures:
        raise UserError(
            f"The run `{run}` held nothing out, and --data.path names no data to "
            "measure. Give it data that the run was not trained on. (What it was "
            f"trained on, whose loss says little, is {data.name}.)"
        )
    if given:
        options = sorted("--" + key.replace("_", "-") for key in given)
        raise UserError(
            f"What the run `{run}` held out is found by reading the data as the run "
            f"did; {', '.join(options)} would read other rows. Leave it out, or name "
            "the data with --data.path."
        )
    return Eval(path=args[0], data=data, held_out=True)


def _held_out(config: RunConfig, model: Model) -> tuple[HeldOut, str]:
    """What a run held out, and what that is called.

    Raises:
      UserError: rows that the run was trained on may be among it.
    """
    from convert.files import read_json
    from qlora_jax.runs.directory import STARTED
    from qlora_jax.runs.eval_data import reload_held_out

    held = reload_held_out(config, model.tokenizer, vocab_size=model.config.vocab_size)
    started = Path(config.output_dir) / STARTED
    same = True  # of a run that was stopped before it noted anything
    if started.is_file():
        known = read_json(started).get("held_out") or {}
        same = known.get("fingerprint") == held.examples.report.fingerprint
    if config.eval.path:
        what = "the data that the run was measured on ([eval])"
        return held, what if same else f"{what}, changed since"
    if not same:
        raise UserError(
            f"The data of the run `{config.output_dir}` ({config.data.name}) are not what they were "
            "when it held a part of them out, so that rows it was trained on would be "
            "measured. Bring them back as they were, or give --data.path."
        )
    return held, "what the run held out of its training data"


def _given(data: DataConfig, trained: RunConfig | None) -> str:
    """What data that were named are to the model."""
    if trained is not None and _places(data) & _places(trained.data):
        return "as given: training data of the run"
    return "as given"


def _places(data: DataConfig) -> set[Path]:
    """The files that are named, wherever they are called from."""
    paths = [source.path for source in data.sources] or [data.path]
    each = [(path,) if isinstance(path, str) else path for path in paths]
    return {Path(name).resolve() for names in each for name in names}


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax eval`; returns the exit status."""
    command = eval_from_arguments(args)
    return run_and_print(command.run, as_json=command.json)
