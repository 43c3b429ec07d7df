"""The `data` command: what a run would train on, seen before it runs.

The one idea: everything shown is computed from the examples that a run would train on,
after all cutting, and none of it by another path; what is coloured is what has a label.

    view.run()           the numbers and some examples, as plain values
    print_view(report)   the same for people: ANSI colours, or brackets without them
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from qlora_jax.cli.data_page import render_data
from qlora_jax.cli.options import parse
from qlora_jax.cli.output import run_and_print
from qlora_jax.data.arrays import Examples
from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from qlora_jax.data.mixture import Mixture, lay_out
from qlora_jax.data.notes import data_notes
from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.runs.config import EvalConfig
from qlora_jax.runs.eval_data import exclude_held_out
from qlora_jax.runs.toml import read_config

_BINS = 16
_WIDTH = 40
# Tokens of an example that are shown; the numbers are of all of them.
_SHOWN = 1500
# Tokens before a token that decide how it reads (spaces, parts of characters).
_CONTEXT = 6
SUPERVISED, OTHER, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class DataView:
    """Show what a run would train on: tokens, labels, lengths."""

    model: str
    """Model directory: its tokenizer and the size of its vocabulary. No weights are
    read."""
    data: DataConfig
    rows_per_step: int = 1
    """Rows that a step takes: batch_size times gradient_accumulation_steps."""
    eval_fraction: float | None = None
    """Share of the examples that the run holds out, as its `eval.fraction`; the others
    are shown."""
    eval_examples: int | None = None
    """How many it holds out instead, as its `eval.examples`."""
    show: int = 3
    """How many examples to show, the first ones."""
    example: tuple[int, ...] = ()
    """Examples to show instead, by their numbers."""
    html: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a page for a browser as well."""
    run_directory: str | None = None
    """The run whose cache it is, where data.cache is "auto"."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Loads the examples and looks at them; returns plain values.

        Raises:
          UserError: everything that is wrong with the data, at once.
        """
        from convert.files import read_json
        from convert.output import write_text
        from convert.tokenizer import load_tokenizer

        model = Path(self.model)
        config = LlamaConfig.from_hf(read_json(model / "config.json"))
        tokenizer = load_tokenizer(model)
        examples = load_examples(
            self.data,
            tokenizer,
            vocab_size=config.vocab_size,
            progress=sys.stderr.isatty(),
            run_directory=self.run_directory,
        )
        held_out = None
        evaluation = EvalConfig(
            fraction=self.eval_fraction, examples=self.eval_examples
        )
        if evaluation.measures:
            eos = getattr(tokenizer, "eos_token_id", None)
            examples, held_out = exclude_held_out(evaluation, self.data, examples, eos)
        wanted = self.example or tuple(range(min(self.show, len(examples))))
        absent = [number for number in wanted if not 0 <= number < len(examples)]
        if absent:
            raise UserError(
                f"There is no example {', '.join(map(str, absent))}: the data have "
                f"{len(examples):,}, numbered from 0."
            )
        batches = Batches(
            examples, self.data, batch_size=self.rows_per_step, pad_token_id=0
        )
        report = {
            "data": examples.report.as_dict(),
            "held_out": None
            if held_out is None
            else held_out.examples.report.as_dict(),
            "summary": examples.report.summary()
            + ("" if held_out is None else f"\n{held_out.note}"),
            "rows": _rows(examples, self.data, batches),
            "lengths": _lengths(examples),
            "examples": [_example(examples, n, tokenizer) for n in wanted],
            "notes": data_notes(examples, self.data, batches, tokenizer),
        }
        if self.html is not None:
            write_text(Path(self.html), render_data(report, self.data.name))
        return report


def view_from_arguments(args: Sequence[str]) -> DataView:
    """Reads `data [CONFIG.toml] [--options]`; the file is that of a run."""
    args = list(args)
    default: Any = tyro.MISSING_NONPROP
    if args and not args[0].startswith("-"):
        run = read_config(Path(args.pop(0)))
        default = DataView(
            model=run.model.path,
            data=run.data,
            rows_per_step=run.train.batch_size * run.train.gradient_accumulation_steps,
            run_directory=run.output_dir,
            eval_fraction=run.eval.fraction,
            eval_examples=run.eval.examples,
        )
    return parse(
        DataView,
        args,
        default=default,
        prog="qlora-jax data [CONFIG.toml]",
        description="Show what a run would train on: tokens, labels, lengths.\n\n"
        "Also how full the rows are, what is truncated or left out, and all that is "
        "wrong with the data. CONFIG.toml is the file of a run; options given here "
        "win.",
    )


def _rows(
    examples: Examples | Mixture, config: DataConfig, batches: Batches
) -> dict[str, Any]:
    """The rows of a run, and how full they would be the other way."""
    tokens = examples.report.tokens
    found: dict[str, Any] = {
        "length": batches.sequence_length,
        "packing": config.packing,
        "steps_per_epoch": batches.steps_per_epoch,
    }
    apart = dataclasses.replace(config, packing=False)
    length = Batches(examples, apart, batch_size=1, pad_token_id=0).sequence_length
    for name, packing, row in (
        ("packed", True, config.max_length),
        ("one_each", False, length),
    ):
        count = sum(lay_out(examples, packing=packing, length=row).counts)
        found[name] = {
            "rows": count,
            "length": row,
            "efficiency": tokens / (count * row),
        }
    return found


def _lengths(examples: Examples | Mixture) -> list[dict[str, int]]:
    """Histogram of the examples' lengths, in equal steps up to the longest."""
    lengths = examples.lengths
    longest = int(lengths.max())
    step = max(-(-longest // _BINS), 1)
    counts = np.bincount((lengths - 1) // step, minlength=-(-longest // step))
    return [
        {"from": i * step + 1, "to": (i + 1) * step, "examples": int(count)}
        for i, count in enumerate(counts)
    ]


def _example(
    examples: Examples | Mixture, number: int, tokenizer: Any
) -> dict[str, Any]:
    tokens, labels = examples[number]
    supervised = labels != IGNORE
    ids = tokens[:_SHOWN].tolist()
    return {
        "number": number,
        "length": len(tokens),
        "supervised_tokens": int(supervised.sum()),
        "not_shown": len(tokens) - len(ids),
        "tokens": ids,
        "supervised": supervised[:_SHOWN].tolist(),
        "text": pieces(tokenizer, ids),
    }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token as it reads where it stands; together, the whole text.

    A character that is several tokens stands with the last of them. Without a
    tokenizer the ids stand for themselves.
    """
    if tokenizer is None:
        return [f"{number} " for number in ids]

    def text(some: Sequence[int]) -> str:
        return tokenizer.decode(
            some, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    found: list[str] = []
    start = done = 0  # of the tokens that are decoded together; of those with a text
    for end in range(1, len(ids) + 1):
        before, after = text(ids[start:done]), text(ids[start:end])
        if after.endswith("\ufffd") and end < len(ids) and end - done < 4:
            found.append("")  # a character that is not complete
            continue
        found.append(after[len(before) :])
        done = end
        if done - start >= 2 * _CONTEXT:
            start = done - _CONTEXT
            # Decoding from inside a character would spoil those after it too.
            while start < done and not found[start - 1]:
                start += 1
    return found


# --- for people ---


def print_view(report: Mapping[str, Any], *, colour: bool | None = None) -> None:
    """Prints a view: numbers, lengths, notes and examples.

    Args:
      report: what `DataView.run` returned.
      colour: ANSI colours, or brackets around what is supervised; default by whether
        stdout is a terminal.
    """
    coloured = sys.stdout.isatty() if colour is None else colour
    print(report["summary"])
    least, *_, most = report["data"]["supervised_per_example"]
    middle = report["data"]["supervised_per_example"][2]
    print(
        f"\nsupervised tokens of an example: {least:,} to {most:,}, median {middle:,}"
    )
    rows = report["rows"]
    for name, words in (("packed", "packed"), ("one_each", "one example a row")):
        one = rows[name]
        chosen = " <- this run" if rows["packing"] == (name == "packed") else ""
        print(
            f"{words}: {one['rows']:,} rows of {one['length']:,} tokens, "
            f"{one['efficiency']:.1%} full{chosen}"
        )
    print(f"steps in an epoch: {rows['steps_per_epoch']:,.1f}")
    print("\nexamples by length (tokens)")
    bins = report["lengths"]
    most, width = max(b["examples"] for b in bins), len(f"{bins[-1]['to']:,}")
    for b in bins:
        bar = "#" * -(-b["examples"] * _WIDTH // most)
        span = f"{b['from']:>{width},} - {b['to']:>{width},}"
        print(f"  {span}  {b['examples']:>9,}  {bar}".rstrip())
    for reason, places in report["data"]["places"].items():
        count = report["data"]["dropped"].get(reason, report["data"]["truncated"])
        more = ", ..." if count > len(places) else ""
        print(f"\n{reason}: {count:,} ({', '.join(places)}{more})")
    for note in report["notes"]:
        print(f"\nNote: {note}")
    key = f"{SUPERVISED}supervised{RESET}" if coloured else "\u27e6supervised\u27e7"
    print(f"\nsupervised tokens are shown so: {key}")
    for example in report["examples"]:
        print(
            f"\n--- example {example['number']}: {example['length']:,} tokens, "
            f"{example['supervised_tokens']:,} supervised ---"
        )
        print(marked(example, colour=coloured))


def marked(example: Mapping[str, Any], *, colour: bool) -> str:
    """The text of an example with what is supervised coloured, or in brackets."""
    on, off = (SUPERVISED, OTHER) if colour else ("\u27e6", "")
    end = RESET if colour else "\u27e7"
    runs: list[tuple[bool, str]] = []
    for piece, supervised in zip(example["text"], example["supervised"], strict=True):
        if runs and runs[-1][0] == supervised:
            runs[-1] = supervised, runs[-1][1] + piece
        else:
            runs.append((supervised, piece))
    found = []
    for supervised, text in runs:
        start = on if supervised else off
        stop = end if supervised or colour else ""
        if colour:  # a terminal would colour the rest of the line
            text = text.replace("\n", f"{RESET}\n{start}")
        found.append(f"{start}{text}{stop}")
    if example["not_shown"]:
        found.append(f"\n... and {example['not_shown']:,} more tokens")
    return "".join(found)


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax data`; returns the exit status."""
    view = view_from_arguments(args)
    return run_and_print(view.run, as_json=view.json, show=print_view)
