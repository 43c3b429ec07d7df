"""The `data` command: what a run would train on, shown before it runs.

Everything shown is computed from the very examples that a run would train on, after
truncation and packing; what is coloured has a label.

    view.run()           the numbers and some examples, as plain values
    print_view(report)   the same for people: ANSI colours, or brackets without them
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from qlora_jax.cli.options import parse
from qlora_jax.cli.output import run_and_print
from qlora_jax.data import (
    IGNORE,
    Batches,
    DataConfig,
    Examples,
    Mixture,
    data_notes,
    lay_out,
    load_examples,
    packs,
    with_eos,
)
from qlora_jax.errors import UserError, counted, say, visible
from qlora_jax.runs import (
    EvalConfig,
    HeldOut,
    exclude_held_out,
    option_keys,
    read_config,
)

_BINS = 16
_BAR_WIDTH = 40
# Of one example; the numbers count all its tokens.
_MAX_TOKENS_SHOWN = 1500
# Tokens before a token that decide its text (spaces, parts of characters).
_CONTEXT = 6
SUPERVISED, OTHER, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class DataView:
    """Show what a run would train on: tokens, labels, lengths."""

    model: str
    """Model directory: its tokenizer and the size of its vocabulary. No weights are
    read."""
    data: DataConfig
    adapter: str | None = None
    """PEFT directory of the adapter that the run starts from: its tokenizer counts, if
    it has one."""
    rows_per_step: int = 1
    """Rows of a step: batch_size times gradient_accumulation_steps."""
    eval_fraction: float | None = None
    """Share of the examples that the run holds out, as its `eval.fraction`; the others
    are shown."""
    eval_examples: int | None = None
    """How many it holds out instead, as its `eval.examples`."""
    show: int = 3
    """How many examples to show, from the first."""
    example: tuple[int, ...] = ()
    """Examples to show instead, by their numbers."""
    html: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write an HTML page as well."""
    run_directory: str | None = None
    """The run whose cache is used, where data.cache is "auto"."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Loads the examples; returns numbers about them and some of them.

        Raises:
          UserError: the data cannot be used; the message lists all problems.
        """
        from convert import (
            check_new_file,
            load_tokenization,
            local_path,
            open_config,
            write_text,
        )

        if self.html is not None:
            check_new_file(Path(self.html))
        model = local_path(self.model, needed="tokenizer")
        adapter = self.adapter and local_path(self.adapter, needed="tokenizer")
        config = open_config(model)
        text = load_tokenization(config, model, adapter)
        for note in text.notes:
            say(note)
        tokenizer = with_eos(text.tokenizer, self.data.eos_token)
        examples = load_examples(
            self.data,
            tokenizer,
            vocab_size=config.vocab_size,
            progress=sys.stderr.isatty(),
            run_directory=self.run_directory,
        )
        examples, held_out = self._split(examples, tokenizer)
        batches = Batches(
            examples, self.data, batch_size=self.rows_per_step, pad_token_id=0
        )
        summary = examples.report.summary()
        if held_out is not None:
            summary += f"\n{held_out.note}"
        report = {
            "data": examples.report.as_dict(),
            "held_out": held_out and held_out.examples.report.as_dict(),
            "summary": summary,
            "rows": _row_counts(examples, self.data, batches),
            "lengths": _length_histogram(examples),
            "examples": [
                _example(examples, number, tokenizer)
                for number in self._shown_numbers(len(examples))
            ],
            "notes": data_notes(examples, self.data, batches, tokenizer),
        }
        if self.html is not None:
            from qlora_jax.cli.data_page import render_data

            write_text(Path(self.html), render_data(report, self.data.name))
        return report

    def _split(
        self, examples: Examples | Mixture, tokenizer: Any
    ) -> tuple[Examples | Mixture, HeldOut | None]:
        """Takes out what the run would measure its loss on."""
        config = EvalConfig(fraction=self.eval_fraction, examples=self.eval_examples)
        if not config.measures:
            return examples, None
        eos = getattr(tokenizer, "eos_token_id", None)
        return exclude_held_out(config, self.data, examples, eos)

    def _shown_numbers(self, count: int) -> tuple[int, ...]:
        numbers = self.example or tuple(range(min(self.show, count)))
        absent = [number for number in numbers if not 0 <= number < count]
        if absent:
            raise UserError(
                f"There is no example {', '.join(map(str, absent))}: the data have "
                f"{count:,}, numbered from 0."
            )
        return numbers


def from_arguments(args: Sequence[str]) -> DataView:
    """Reads `data [CONFIG.toml] [--options]`; the file is that of a run."""
    args = list(args)
    default: Any = tyro.MISSING_NONPROP
    if args and not args[0].startswith("-"):
        run = read_config(Path(args.pop(0)))
        default = DataView(
            model=run.model.path,
            data=run.data,
            adapter=run.train.adapter_init,
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


def _row_counts(
    examples: Examples | Mixture, config: DataConfig, batches: Batches
) -> dict[str, Any]:
    """Counts a run's rows, packed and with one example each, and how full they are."""
    single = dataclasses.replace(config, packing=False)
    longest = Batches(examples, single, batch_size=1, pad_token_id=0).sequence_length

    def layout(packing: bool, length: int) -> dict[str, Any]:
        in_order = not config.shuffle
        layout = lay_out(examples, packing=packing, length=length, in_order=in_order)
        count = sum(layout.counts)
        efficiency = examples.report.tokens / (count * length)
        return {"rows": count, "length": length, "efficiency": efficiency}

    return {
        "length": batches.sequence_length,
        "packing": packs(config.packing, examples.lengths, config.max_length),
        "steps_per_epoch": batches.steps_per_epoch,
        "rows_per_step": batches.rows_per_step,
        "packed": layout(True, config.max_length),
        "one_each": layout(False, longest),
    }


def _length_histogram(examples: Examples | Mixture) -> list[dict[str, int]]:
    """Counts examples by length, in equal bins up to the longest."""
    lengths = examples.lengths
    longest = int(lengths.max())
    step = max(-(-longest // _BINS), 1)
    # Bin i holds lengths i * step + 1 to (i + 1) * step.
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
    ids = tokens[:_MAX_TOKENS_SHOWN].tolist()
    return {
        "number": number,
        "length": len(tokens),
        "supervised_tokens": int(supervised.sum()),
        "not_shown": len(tokens) - len(ids),
        "tokens": ids,
        "supervised": supervised[:_MAX_TOKENS_SHOWN].tolist(),
        "text": token_texts(tokenizer, ids),
    }


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Returns the string of each token in its context; joined, they are the whole one.

    A character of several tokens goes to the last of them. Without a tokenizer each
    token's string is its id.
    """
    if tokenizer is None:
        return [f"{number} " for number in ids]

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    texts: list[str] = []
    start = done = 0  # ids[start:done] is the context, whose strings are known
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[start:done]), decode(ids[start:end])
        # A character of UTF-8 has at most four bytes; beyond that the bytes are
        # invalid.
        if after.endswith("\ufffd") and end < len(ids) and end - done < 4:
            texts.append("")  # a character that is not complete
            continue
        texts.append(after[len(before) :])
        done = end
        if done - start >= 2 * _CONTEXT:
            start = done - _CONTEXT
            # Decoding from inside a character would spoil those after it too.
            while start < done and not texts[start - 1]:
                start += 1
    return texts


# --- for people ---


def print_view(report: Mapping[str, Any], *, colour: bool | None = None) -> None:
    """Prints a view: numbers, lengths, notes and examples.

    Args:
      report: what `DataView.run` returned.
      colour: ANSI colours, or brackets around what is supervised; default by whether
        stdout is a terminal.
    """
    colour = bool(sys.stdout.isatty() if colour is None else colour)
    print(visible(report["summary"]))
    least, _, median, *_, most = report["data"]["supervised_per_example"]
    print(
        f"\nsupervised tokens of an example: {least:,} to {most:,}, median {median:,}"
    )
    _print_rows(report["rows"])
    _print_histogram(report["lengths"])
    counts = {**report["data"]["remarks"], **report["data"]["dropped"]}
    for reason, rows in report["data"]["places"].items():
        count = counts.get(reason, report["data"]["truncated"])
        more = ", ..." if count > len(rows) else ""
        print(visible(f"\n{reason}: {count:,} ({', '.join(rows)}{more})"))
    for note in report["notes"]:
        print(visible(f"\nNote: {note}"))
    key = f"{SUPERVISED}supervised{RESET}" if colour else "\u27e6supervised\u27e7"
    print(f"\nsupervised tokens are shown so: {key}")
    for example in report["examples"]:
        print(
            f"\n--- example {example['number']}: {example['length']:,} tokens, "
            f"{example['supervised_tokens']:,} supervised ---"
        )
        print(mark_supervised(example, colour=colour))


def _print_rows(rows: Mapping[str, Any]) -> None:
    for name, label in (("packed", "packed"), ("one_each", "one example a row")):
        layout = rows[name]
        chosen = " <- this run" if rows["packing"] == (name == "packed") else ""
        print(
            f"{label}: {layout['rows']:,} rows of {layout['length']:,} tokens, "
            f"{layout['efficiency']:.1%} full{chosen}"
        )
    print(
        f"steps in an epoch: {rows['steps_per_epoch']:,.1f}, of "
        f"{counted(rows['rows_per_step'], 'row')} each (--rows-per-step: batch_size "
        "times gradient_accumulation_steps)"
    )


def _print_histogram(bins: Sequence[Mapping[str, int]]) -> None:
    print("\nexamples by length (tokens)")
    most, width = max(b["examples"] for b in bins), len(f"{bins[-1]['to']:,}")
    for b in bins:
        bar = "#" * -(-b["examples"] * _BAR_WIDTH // most)
        span = f"{b['from']:>{width},} - {b['to']:>{width},}"
        print(f"  {span}  {b['examples']:>9,}  {bar}".rstrip())


def mark_supervised(example: Mapping[str, Any], *, colour: bool) -> str:
    """Returns the text of an example, supervised parts coloured or in brackets."""
    on, off = (SUPERVISED, OTHER) if colour else ("\u27e6", "")
    end = RESET if colour else "\u27e7"
    parts = []
    tokens = zip(example["supervised"], example["text"], strict=True)
    for supervised, group in itertools.groupby(tokens, key=lambda pair: pair[0]):
        text = visible("".join(piece for _, piece in group))
        start = on if supervised else off
        stop = end if supervised or colour else ""
        if colour:  # a terminal would colour the rest of the line
            text = text.replace("\n", f"{RESET}\n{start}")
        parts.append(f"{start}{text}{stop}")
    if example["not_shown"]:
        parts.append(f"\n... and {example['not_shown']:,} more tokens")
    return "".join(parts)


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax data`; returns the exit status."""
    view = from_arguments(args)

    def run() -> dict[str, Any]:
        if not args or args[0].startswith("-"):
            return view.run()
        from qlora_jax.runs import (
            relative_paths,
        )  # takes jax, which --help does without

        file = Path(args[0])
        with relative_paths(read_config(file), file, option_keys(args)):
            return view.run()

    return run_and_print(run, as_json=view.json, show=print_view)
