"""The `eval` command: loss and perplexity, on a data file or what a run held out.

The rows of a run directory are read as the run read them, unless options override that.
The sources of a mixture are also measured one by one. The report names what was
measured, because a loss on training data looks as good as any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from qlora_jax.cli.options import ModelOptions, check_names, parse
from qlora_jax.cli.output import run_and_print
from qlora_jax.data import DataConfig, Mixture, load_examples, name_of
from qlora_jax.errors import UsageError, UserError
from qlora_jax.runs import option_keys

if TYPE_CHECKING:
    from qlora_jax.inference import Model
    from qlora_jax.runs import HeldOut, RunConfig


@dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """Measure loss and perplexity on a data file or held-out examples."""

    data: DataConfig
    held_out: tyro.conf.Suppress[bool] = False
    """Measure what the run `path` held out; `data` is then its training data."""
    batch_size: int = 8
    """Rows at a time."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Measures; returns the report.

        Raises:
          UserError: data that cannot be read, or that changed since a run held it out.
        """
        from qlora_jax.runs import Loss, measure_loss, relative_paths

        resolved = self.resolve()
        model, run = self.load(resolved), resolved.settings
        if self.held_out and run is not None:
            assert resolved.run is not None
            with relative_paths(run, resolved.run):
                held, measured = _held_out(run, model)
            examples, config = held.examples, held.config
        else:
            config, measured = self.data, _origin(self.data, run)
            examples = load_examples(
                config,
                model.tokenizer,
                vocab_size=model.config.vocab_size,
                run_directory=self.path if run is None else run.output_dir,
            )
        header = {"data": config.name, "measured": measured}
        if not isinstance(examples, Mixture):
            loss = measure_loss(model, examples, config, self.batch_size)
            return {**header, **loss.report()}
        totals: dict[str, Loss] = {}
        for (source, data), part in zip(config.parts(), examples.parts, strict=True):
            name = name_of(source.path)
            loss = measure_loss(model, part, data, self.batch_size)
            # Sums of nats and tokens, so that the total is the mean over all tokens.
            totals[name] = totals.get(name, Loss()) + loss
        return {
            **header,
            **sum(totals.values(), Loss()).report(),
            "sources": {name: total.report() for name, total in totals.items()},
        }


def from_arguments(args: Sequence[str]) -> Eval:
    """Reads `eval PATH [--options]`; a run's own data settings are the defaults.

    Raises:
      UserError: a run without data to measure, and no --data.path.
    """
    options: dict[str, Any] = {}
    if args and not args[0].startswith("-"):
        from qlora_jax.runs import find_run

        run = find_run(Path(args[0]))
        if run is not None:
            options["default"] = _run_defaults(run, args)
        elif not any(
            arg.startswith(("--data.path", "--data.sources", "-h", "--help"))
            for arg in args
        ):
            check_names(Eval, args, "qlora-jax eval")
            raise UsageError(
                "Give the data to measure on: --data.path FILE. Only a run directory "
                "with held-out data needs none."
            )
    return parse(Eval, args, prog="qlora-jax eval", **options)


def _run_defaults(run: Path, args: Sequence[str]) -> Eval:
    """Returns what is measured of a run, before the options are parsed."""
    from qlora_jax.runs import read_settings

    config = read_settings(run)
    data = config.data
    data_options = [key for key in option_keys(args) if key.startswith("data.")]
    if "data.path" in data_options:
        # One file is not a mixture, and is read once.
        path = data.path or data.sources[0].path
        data = dataclasses.replace(data, path=path, sources=(), cache=None, split=None)
        return Eval(path=args[0], data=data)
    if {"-h", "--help"} & set(args):
        return Eval(path=args[0], data=data)
    if not config.eval.measures:
        raise UserError(
            f"The run `{run}` held nothing out, and there is no --data.path. Give it "
            "data that the run was not trained on. (It was trained on "
            f"{data.name}, whose loss means little.)"
        )
    if data_options:
        options = sorted("--" + key.replace("_", "-") for key in data_options)
        raise UserError(
            f"What the run `{run}` held out is found by reading the data as the run "
            f"did; {', '.join(options)} would read other rows. Leave it out, or name "
            "the data with --data.path."
        )
    return Eval(path=args[0], data=data, held_out=True)


def _held_out(config: RunConfig, model: Model) -> tuple[HeldOut, str]:
    """Loads what a run held out; returns it with a description.

    Raises:
      UserError: rows that the run was trained on may be among it.
    """
    from convert import read_json
    from qlora_jax.runs import STARTED, reload_held_out

    held = reload_held_out(config, model.tokenizer, vocab_size=model.config.vocab_size)
    started = Path(config.output_dir) / STARTED
    unchanged = True  # of a run that was stopped before it recorded anything
    if started.is_file():
        recorded = read_json(started).get("held_out")
        fingerprint = recorded.get("fingerprint") if isinstance(recorded, dict) else ""
        unchanged = fingerprint == held.examples.report.fingerprint
    if config.eval.path:
        description = "the data that the run was measured on ([eval])"
        return held, description if unchanged else f"{description}, changed since"
    if not unchanged:
        raise UserError(
            f"The data of the run `{config.output_dir}` ({config.data.name}) are not "
            "what they were when it held a part of them out, so that rows it was "
            "trained on would be measured. Restore the data, or give --data.path."
        )
    return held, "what the run held out of its training data"


def _origin(data: DataConfig, run: RunConfig | None) -> str:
    """Describes data that were named, and whether the run was trained on them."""
    if run is not None and _files(data) & _files(run.data):
        return "as given: training data of the run"
    return "as given"


def _files(data: DataConfig) -> set[Path]:
    """Returns the absolute paths of the files that are named."""
    paths = [source.path for source in data.sources] or [data.path]
    each = [(path,) if isinstance(path, str) else path for path in paths]
    return {Path(name).resolve() for names in each for name in names}


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax eval`; returns the exit status."""
    command = from_arguments(args)
    return run_and_print(command.run, as_json=command.json)
