"""The `verify` command of `qlora-convert`: two directories, tensors and logits.

`merge` checks its result with the same notes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qlora_jax.cli.options import FLAGS, parse, path_argument
from qlora_jax.cli.output import console
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig

if TYPE_CHECKING:
    from rich.console import Console

    from convert import Comparison


def trained_form_of(base: Path, lora: LoraConfig) -> str | Literal[False] | None:
    """Returns the form of this base that an adapter was trained on, as "nf4, float32".

    False: it was trained on another base; None: it does not record its base.
    """
    from qlora_jax.inference import trained_form

    if lora.base_fingerprint is None:
        return None
    return trained_form(base, lora.base_fingerprint) or False


def custom_modules_note(base: Path | None) -> str:
    """Returns why the logits of a model with custom modules were not compared."""
    return (
        f"logits were not compared: `{base}` has modules of its own, and a directory "
        "does not say how they compute"
    )


def other_base_note(adapter: Path, base: Path) -> str:
    """Returns the note that an adapter is used on a base it was not trained on."""
    return f"`{adapter}` was trained on another base than `{base}`"


@dataclass(frozen=True)
class Verify:
    """Compare two adapters or two checkpoints tensor by tensor.

    Exit status, as of diff: 0 the same, 1 different, 2 a failure.
    """

    a: Annotated[tyro.conf.Positional[Path], path_argument("A")]
    """PEFT, Hugging Face or run directory, or a name of the hub."""
    b: Annotated[tyro.conf.Positional[Path], path_argument("B")]
    """Another of the same kind."""
    base: Path | None = None
    """The base of two adapters: compare what they select in it and the logits with
    either, and check that they were trained on it."""
    logits: bool = False
    """Compare the logits of two checkpoints as well."""
    probe: str | None = None
    """Text to compare logits on (default: 128 fixed token ids)."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> Comparison:
        """Compares; returns the differences."""
        from convert import (
            compare_adapters,
            local_path,
            open_adapter,
            open_config,
            peft_directory,
        )
        from qlora_jax.inference import compare_logits, load_exact, probe

        a, b = local_path(self.a), local_path(self.b)
        base = None if self.base is None else local_path(self.base)
        config = None if base is None else open_config(base)
        comparison = compare_adapters(a, b, base=config)
        if config is not None and config.extra_tensors:
            comparison.notes.append(custom_modules_note(base))
            return comparison
        if base is not None and config is not None:
            a, b = peft_directory(a), peft_directory(b)
            loras = {path: open_adapter(path)[0] for path in (a, b)}
            tokens = probe(base, config, self.probe, list(loras.values()))
            comparison.notes.extend(
                other_base_note(path, base)
                for path, lora in loras.items()
                if trained_form_of(base, lora) is False
            )
            load_a, load_b = _adapter_loaders(base, a, b)
        elif not self.logits and self.probe is None:
            return comparison
        elif comparison.kind == "model":
            tokens = probe(a, open_config(a), self.probe)
            load_a, load_b = partial(load_exact, a), partial(load_exact, b)
        else:
            raise UserError(
                "The logits of two adapters are compared on their base; give it with "
                "--base."
            )
        logits = compare_logits(load_a, load_b, tokens)
        return dataclasses.replace(comparison, logits=logits)


def _adapter_loaders(base: Path, a: Path, b: Path) -> tuple[Callable[[], Any], ...]:
    """Returns loaders of two adapters that share one base in memory."""
    from convert import load_adapter, with_saved_tables
    from qlora_jax.inference import load_exact
    from qlora_jax.models import apply_changes

    model = load_exact(base)

    def with_adapter(path: Path) -> Any:
        # Two adapters may have grown the vocabulary differently.
        own = with_saved_tables(model.config, model.base, path, resize=True)
        lora, adapters = load_adapter(path, own.base)
        config = apply_changes(own.config, lora.base_config_changes)
        return dataclasses.replace(
            model, config=config, base=own.base, lora_config=lora, adapters=adapters
        )

    return partial(with_adapter, a), partial(with_adapter, b)


# Differences shown; a dense and a 4-bit checkpoint differ in thousands of tensors.
_MAX_ROWS = 40


def print_comparison(report: Comparison) -> None:
    """Prints what was compared: a table of the differences, or that there are none."""
    printer = console()
    if report.equal:
        printer.print(f"The same: {report.tensors} tensors, byte for byte.")
    else:
        _print_differences(report, printer)
    for note in report.notes:
        printer.print(f"Note: {note}.")
    if report.logits is not None:
        printer.print(
            "Logits on {probe_tokens} tokens: max |a - b| {max_abs_difference:.3g} "
            "(largest logit {max_abs_logit:.3g}), KL(a || b) {mean_kl:.3g} on average "
            "and {max_kl:.3g} at most, same top token {same_top_token:.1%}.".format(
                **report.logits
            )
        )


def _print_differences(report: Comparison, printer: Console) -> None:
    from rich.table import Column, Table

    table = Table(
        Column("what", overflow="fold"),
        "a",
        "b",
        "max |a - b|",
        title=f"a = {report.a}, b = {report.b}",
    )
    rows = [
        (name, *("-" if value is None else str(value) for value in values), "")
        for name, values in report.config.items()
    ]
    for d in report.different:
        largest = d.max_abs_difference
        rows.append((d.name, d.a, d.b, "" if largest is None else f"{largest:.3g}"))
    rows += [(name, "present", "missing", "") for name in report.missing]
    rows += [(name, "missing", "present", "") for name in report.extra]
    for row in rows[:_MAX_ROWS]:
        table.add_row(*row)
    printer.print(table)
    if len(rows) > _MAX_ROWS:
        printer.print(f"... and {len(rows) - _MAX_ROWS:,} more (--json lists all).")
    printer.print(
        f"Different: {len(report.different)} of {report.tensors} tensors; "
        f"{len(report.missing)} missing, {len(report.extra)} extra, "
        f"{len(report.config)} configuration fields."
    )


def main(args: Sequence[str]) -> int:
    """Runs `qlora-convert verify`; returns the exit status."""
    command = parse(Verify, args, prog="qlora-convert verify", config=FLAGS)
    report = command.run()
    if command.json:
        print(json.dumps(report.to_json()))
    else:
        print_comparison(report)
    return 0 if report.equal else 1
