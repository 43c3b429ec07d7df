"""Notes about data that deserve attention before a run is trained on it."""

from typing import Any

from qlora_jax.data.batches import Batches
from qlora_jax.data.builtin_templates import template_note
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import ENCLOSED_TWICE, OTHER_LABELS, text_prefix
from qlora_jax.data.ends import end_tokens_of
from qlora_jax.data.examples import CUT_ANSWER, REPEATED_FILES
from qlora_jax.data.mixture import AnyExamples, Mixture, lay_out
from qlora_jax.data.packing import WELL_FILLED
from qlora_jax.data.rendering import (
    NO_END,
    PROMPTED,
    SPLIT,
    UNANSWERED,
    without_unused_date,
)
from qlora_jax.data.report import BAD_ROW, DataReport
from qlora_jax.data.unknown import UNKNOWN
from qlora_jax.data.written import (
    EMPTY_ANSWER,
    EMPTY_REASONING,
    NOT_WRITTEN,
    SPECIAL_TOKENS,
)
from qlora_jax.errors import counted, group_rows

# Locations that a note names.
_SHOWN_PLACES = 3
_SHOWN_CHARACTERS = 12


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
    if tokenizer is not None:
        notes += _end_notes(examples, config, tokenizer)
        notes += _bos_notes(examples, config, tokenizer)
    if report.truncated:
        notes.append(
            f"{report.truncated / report.rows_kept:.1%} of the rows lose their end: "
            f"the longest has {report.longest_row:,} tokens, and `data.max_length` is "
            f"{config.max_length:,}."
        )
    cut = report.remarks.get(CUT_ANSWER, 0)
    if cut > report.rows_kept / 2:
        notes.append(
            f"{cut:,} of {counted(report.rows_kept, 'row')} lose the end token of what "
            "is trained, which `data.max_length` cuts off: the model does not learn to "
            "stop from them. A larger `data.max_length`, or `data.too_long` = 'drop', "
            "avoids it."
        )
    dropped = sum(report.dropped.values())
    if dropped:
        reasons = ", ".join(report.dropped)
        notes.append(f"{counted(dropped, 'row')} left out ({reasons}).")
    notes += _remark_notes(report, tokenizer)
    bad = report.dropped.get(BAD_ROW, 0)
    if bad:
        notes.append(
            f"{counted(bad, 'row')} cannot be used and {'is' if bad == 1 else 'are'} "
            "left out (`data.on_bad_row` = 'skip'). The first: "
            + " ".join(line for line, _ in group_rows(report.bad_rows))
        )
    formats = {settings.format for settings in config.each}
    if report.straddling_rows:
        remedies = {
            "alpaca": "write the prompt with a line break at its end as `data.prompt` "
            "of format='prompt_completion'",
            "text": "let `data.response_part` end with a line break",
            "messages": "let the template's generation prompt end with a line break, "
            "and answers begin without one",
            "prompt_completion": "end the prompt with a line break, or move its last "
            "space to the start of the completion",
        }
        remedy = "; or ".join(remedies[f] for f in sorted(formats & remedies.keys()))
        notes.append(
            f"in {counted(report.straddling_rows, 'row')} a token holds the start or "
            "the end of an answer and text beside it. It is supervised, but at the "
            "start a prompt at inference ends with another token. To avoid that, "
            f"{remedy}."
        )
    if config.date is not None and not any(
        without_unused_date(settings, tokenizer).date for settings in config.each
    ):
        notes.append("`data.date` is given, and no chat template writes a date.")
    if tokenizer is not None:
        notes += _template_notes(config, tokenizer)
    return notes


def _remark_notes(report: DataReport, tokenizer: Any) -> list[str]:
    notes = []
    for remark, count in report.remarks.items():
        if remark == SPLIT:
            advice = ' `data.train_on` = "last" trains the last answer alone.'
        elif remark == EMPTY_REASONING:
            advice = (
                " The model learns to answer without reasoning; another chat template, "
                "or reasoning in the rows, avoids it."
            )
        elif remark == EMPTY_ANSWER:
            advice = " The model learns to answer with nothing; leave these rows out."
        elif remark == SPECIAL_TOKENS:
            advice = (
                " They become the tokens that the chat template begins and ends turns "
                "with, not text. Remove them, if that is not meant."
            )
        elif remark == OTHER_LABELS:
            advice = (
                " A label is that of the token at its own place, and the loss shifts "
                "them; labels that are shifted already train the token after the next."
            )
        elif remark == ENCLOSED_TWICE:
            advice = (
                " The second EOS is trained too. Strip the texts, or set "
                "`data.append_eos` = false."
            )
        elif remark == UNKNOWN:
            advice = _unknown_advice(report, getattr(tokenizer, "unk_token", None))
        elif remark == NO_END:
            advice = (
                " The model does not learn to stop there. Another chat template, or "
                '`data.train_on` = "last", avoids it.'
            )
        elif remark == UNANSWERED:
            advice = (
                " What follows the last answer has no effect; if the rows should end "
                "with an answer, it is missing (or of another role)."
            )
        elif remark in (PROMPTED, REPEATED_FILES) or remark.endswith(NOT_WRITTEN):
            advice = ""
        else:
            continue
        first = ", ".join(report.places.get(remark, ())[:_SHOWN_PLACES])
        notes.append(f"{remark}: {count:,}; the first in {first}.{advice}")
    return notes


def _unknown_advice(report: DataReport, unk_token: str | None) -> str:
    ranked = sorted(report.unknown, key=lambda name: (-report.unknown[name], name))
    names = ", ".join(map(repr, ranked[:_SHOWN_CHARACTERS]))
    more = len(ranked) - _SHOWN_CHARACTERS
    becomes = "no token" if unk_token is None else f"{unk_token!r}, or no token"
    return (
        f" These are {names}{f' and {more:,} more' * (more > 0)}, and become {becomes}:"
        " the model is trained on a text without them. Replace them in the rows, or "
        "take a base whose tokenizer knows them."
    )


def _end_notes(examples: AnyExamples, config: DataConfig, tokenizer: Any) -> list[str]:
    """Returns notes on the sources whose answers do not end with EOS."""
    notes = []
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    eos, eos_id = (
        getattr(tokenizer, name, None) for name in ("eos_token", "eos_token_id")
    )
    if eos_id is not None and eos_id == getattr(tokenizer, "unk_token_id", None):
        notes.append(
            f"the tokenizer's EOS is {eos!r}, the token for what it does not know "
            "(`unk_token`), and so is the end that the model learns. Name the EOS of "
            'the model as `data.eos_token`, such as "</s>", or in its '
            "tokenizer_config.json."
        )
    for settings, part, ends in zip(
        config.each, parts, end_tokens_of(examples, tokenizer), strict=True
    ):
        where = f" of {settings.name}" if config.sources else ""
        others = [i for i in ends if i != eos_id]
        if others:
            names = " and ".join(map(repr, tokenizer.convert_ids_to_tokens(others)))
            notes.append(
                f"answers{where} end with {names}, and the tokenizer's EOS is {eos!r}. "
                "What ends answers is saved with the adapters (generation_config.json) "
                "and ends generation."
            )
        elif not ends and not part.report.supervised_eos:
            notes.append(
                f"no supervised token{where} is the tokenizer's EOS ({eos!r}), and no "
                "other special token ends what is supervised. A model trained on this "
                "does not learn to stop."
            )
    return notes


def _bos_notes(examples: AnyExamples, config: DataConfig, tokenizer: Any) -> list[str]:
    """Returns notes on the chat templates that leave out the tokenizer's BOS."""
    prefix = text_prefix(tokenizer)
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    paths: dict[str | None, None] = {}
    for settings, part in zip(config.each, parts, strict=True):
        # All examples of a source begin alike.
        if settings.writes_conversations and prefix and len(part):
            begins = part[0][0][: len(prefix)].tolist()
            if begins != prefix:
                paths[settings.chat_template] = None
    if not paths:
        return []
    name = "".join(map(str, tokenizer.convert_ids_to_tokens(prefix)))
    return [
        f"conversations begin without {name!r}, which this tokenizer puts before other "
        f"texts: the chat template {path or 'of the tokenizer'} does not write it, in "
        "training and in `chat`. If the base model expects it, begin a copy of the "
        "template with {{ bos_token }}."
        for path in paths
    ]


def _layout_notes(
    examples: AnyExamples, config: DataConfig, batches: Batches
) -> list[str]:
    notes = []
    rows, rows_per_step = batches.rows_per_epoch, batches.rows_per_step
    if rows < rows_per_step:
        notes.append(
            f"the data make {counted(rows, 'row')} and a step takes {rows_per_step:,}, "
            "so that rows are repeated within a step. A smaller `train.batch_size` (or "
            "no packing) avoids it."
        )
    report = examples.report
    tokens = report.tokens
    filled = tokens / (rows * batches.sequence_length)
    if not report.packed_rows and filled < WELL_FILLED:
        layout = lay_out(
            examples,
            packing=True,
            length=config.max_length,
            in_order=not config.shuffle,
        )
        packed = sum(layout.counts)
        packed_filled = tokens / (packed * config.max_length)
        if packed_filled > filled:
            notes.append(
                f"{1 - filled:.0%} of the rows is padding; with `data.packing` = true "
                f"it would be {1 - packed_filled:.1%}."
            )
    return notes


def _template_notes(config: DataConfig, tokenizer: Any) -> list[str]:
    paths = {s.chat_template for s in config.each if s.writes_conversations}
    lacks = (template_note(path, tokenizer) for path in paths if path is not None)
    renderers = {path: ChatRenderer(tokenizer, path) for path in paths}
    return [note for note in lacks if note is not None] + [
        f"the chat template {path or 'of the tokenizer'} writes nothing for the "
        "generation prompt (`add_generation_prompt`). What it writes before an answer "
        "is supervised with it, and `chat` prompts without it."
        for path, renderer in renderers.items()
        if not renderer.has_marks and not renderer.writes_generation_prompt
    ]
