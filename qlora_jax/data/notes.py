"""Notes about data that deserve attention before a run is trained on it."""

from typing import Any

from qlora_jax.data.batches import Batches
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.mixture import AnyExamples, lay_out
from qlora_jax.data.packing import WELL_FILLED


def data_notes(
    examples: AnyExamples, config: DataConfig, batches: Batches, tokenizer: Any
) -> list[str]:
    """Returns notes, each of a sentence or two, on what the counts do not make obvious.

    Args:
      examples: the training examples.
      config: the config that they were loaded with.
      batches: their batches.
      tokenizer: the tokenizer of the model; None for format `tokens`.
    """
    report = examples.report
    notes = _layout_notes(examples, config, batches)
    if not report.supervised_eos and tokenizer is not None:
        notes.append(
            "no supervised token is the tokenizer's EOS "
            f"({getattr(tokenizer, 'eos_token', None)!r}). A model trained on this "
            "learns to stop only if another token (an end of turn) stops it."
        )
    if report.truncated:
        notes.append(
            f"{report.truncated / report.rows_kept:.1%} of the rows lose their end: "
            f"the longest has {report.longest_row:,} tokens, and `data.max_length` is "
            f"{config.max_length:,}."
        )
    dropped = sum(report.dropped.values())
    if dropped:
        reasons = ", ".join(report.dropped)
        notes.append(f"{_plural(dropped, 'row')} left out ({reasons}).")
    formats = {settings.format for settings in config.each}
    if report.straddling_rows:
        remedies = {
            "messages": "let the template's generation prompt end with a line break",
            "prompt_completion": "end the prompt with a line break, or move its last "
            "space to the start of the completion",
        }
        remedy = "; or ".join(remedies[f] for f in sorted(formats & remedies.keys()))
        notes.append(
            f"in {_plural(report.straddling_rows, 'row')} a token holds the end of the "
            "prompt and the start of the answer. It is supervised, but a prompt at "
            f"inference ends with another token. To avoid it, {remedy}."
        )
    if "messages" in formats and tokenizer is not None:
        notes += _generation_prompt_notes(config, tokenizer)
    return notes


def _layout_notes(
    examples: AnyExamples, config: DataConfig, batches: Batches
) -> list[str]:
    notes = []
    rows, rows_per_step = batches.rows_per_epoch, batches.rows_per_step
    if rows < rows_per_step:
        notes.append(
            f"the data make {_plural(rows, 'row')} and a step takes {rows_per_step:,}, "
            "so that rows are repeated within a step. A smaller `train.batch_size` (or "
            "no packing) avoids it."
        )
    report = examples.report
    tokens = report.tokens
    filled = tokens / (rows * batches.sequence_length)
    if not report.packed_rows and filled < WELL_FILLED:
        packed = sum(lay_out(examples, packing=True, length=config.max_length).counts)
        packed_filled = tokens / (packed * config.max_length)
        if packed_filled > filled:
            notes.append(
                f"{1 - filled:.0%} of the rows is padding; with `data.packing` = true "
                f"it would be {1 - packed_filled:.1%}."
            )
    return notes


def _generation_prompt_notes(config: DataConfig, tokenizer: Any) -> list[str]:
    paths = {
        settings.chat_template
        for settings in config.each
        if settings.format == "messages"
    }
    renderers = {path: ChatRenderer(tokenizer, path) for path in paths}
    return [
        f"the chat template {path or 'of the tokenizer'} writes nothing for the "
        "generation prompt (`add_generation_prompt`). What it writes before an answer "
        "is supervised with it, and `chat` prompts without it."
        for path, renderer in renderers.items()
        if not renderer.has_marks and not renderer.writes_generation_prompt
    ]


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"
