"""What is worth a thought before a run is trained on its data."""

from typing import Any

from qlora_jax.data.arrays import Examples
from qlora_jax.data.batches import Batches
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.mixture import Mixture, lay_out

# Less than this of the rows being tokens is worth a word.
_FULL = 0.8


def data_notes(
    examples: Examples | Mixture, config: DataConfig, batches: Batches, tokenizer: Any
) -> list[str]:
    """Says, each in a sentence or two, what the counts alone do not bring home.

    Args:
      examples: what is trained on.
      config: what they were loaded with.
      batches: how they are laid out.
      tokenizer: the model's; None with token ids.
    """
    report, found = examples.report, []
    rows, wanted = batches.rows_per_epoch, batches.rows_per_step
    if rows < wanted:
        found.append(
            f"the data make {_count(rows, 'row')} and a step takes {wanted:,}, so that "
            "rows are repeated within a step. A smaller `train.batch_size` (or no "
            "packing) avoids it."
        )
    full = report.tokens / (rows * batches.sequence_length)
    if not config.packing and full < _FULL:
        packed = sum(lay_out(examples, packing=True, length=config.max_length).counts)
        better = report.tokens / (packed * config.max_length)
        if better > full:
            found.append(
                f"{1 - full:.0%} of the rows is padding; with `data.packing` = true it "
                f"would be {1 - better:.1%}."
            )
    if not report.supervised_eos and tokenizer is not None:
        found.append(
            "no supervised token is the tokenizer's EOS "
            f"({getattr(tokenizer, 'eos_token', None)!r}). A model trained on this "
            "learns to stop only if another token (an end of turn) stops it."
        )
    if report.truncated:
        found.append(
            f"{report.truncated / report.rows_kept:.1%} of the rows lose their end: "
            f"the longest has {report.longest_row:,} tokens, and `data.max_length` is "
            f"{config.max_length:,}."
        )
    lost = sum(report.dropped.values())
    if lost:
        reasons = ", ".join(report.dropped)
        found.append(f"{_count(lost, 'row')} left out ({reasons}).")
    formats = {one.format for one in config.each}
    if report.straddling_rows:
        ways = {
            "messages": "let the template's generation prompt end with a line break",
            "prompt_completion": "end the prompt with a line break, or move its last "
            "space to the start of the completion",
        }
        way = "; or ".join(ways[one] for one in sorted(formats & ways.keys()))
        found.append(
            f"in {_count(report.straddling_rows, 'row')} a token holds the end of the "
            "prompt and the start of the answer. It is supervised whole, and whoever "
            f"asks the model starts with another token. To avoid it, {way}."
        )
    if "messages" in formats and tokenizer is not None:
        found += _silent_templates(config, tokenizer)
    return found


def _silent_templates(config: DataConfig, tokenizer: Any) -> list[str]:
    paths = {one.chat_template for one in config.each if one.format == "messages"}
    silent = [
        path
        for path in paths
        if not (chat := ChatRenderer(tokenizer, path)).has_marks
        and not chat.writes_generation_prompt
    ]
    return [
        f"the chat template {path or 'of the tokenizer'} writes nothing for the "
        "generation prompt (`add_generation_prompt`). What it writes before an answer "
        "is supervised with it, and `chat` asks without it."
        for path in silent
    ]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
