"""Counts of rows read, kept, dropped and truncated, for people and report.json."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qlora_jax.errors import counted

_ASSISTANT_MASKS = {
    "template": "the assistant's text as the chat template marks it",
    "renderer": "the assistant's text is what each turn adds after the generation "
    "prompt (the chat template has no generation marks)",
    "markers": "the assistant's text is what follows `data.response_part`",
}
# Phrases of a kind in a summary.
_MAX_PHRASES = 12
BAD_ROW = "row that cannot be used"
"""Reason in `DataReport.dropped` with `data.on_bad_row` = "skip"."""


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of rows and tokens; after truncation unless stated otherwise."""

    rows_read: int
    """Rows in the files."""
    rows_kept: int
    """Rows with at least one example."""
    examples: int
    """Examples (more than `rows_kept` when documents were cut into windows, or
    conversations split)."""
    dropped: dict[str, int]
    """Rows that were left out (windows or examples, where documents were cut or
    conversations split), by reason."""
    truncated: int
    """Rows that were kept without their end."""
    tokens_lost: int
    """Tokens that truncation removed."""
    documents_cut: int
    """Documents cut into windows of `max_length` tokens, which loses no token."""
    tokens: int
    """Tokens in all examples, without padding."""
    supervised_tokens: int
    """Tokens whose prediction is trained; never the first of an example."""
    supervised_eos: int
    """Supervised tokens that are the tokenizer's EOS; 0 means EOS is never learned."""
    longest_row: int
    """Longest row before truncation (tokens)."""
    longest_example: int
    """Longest example (tokens)."""
    straddling_rows: int
    """Rows in which a token holds characters of an answer and of the text before or
    after it. Such a token is supervised; ending the prompt with a newline, or moving
    its last space to the start of the completion, avoids it at the start."""
    packed_rows: int | None
    """Rows after packing; None without packing."""
    packing_efficiency: float | None
    """Share of the packed rows that is not padding; None without packing."""
    fingerprint: str
    """Hash of tokens, labels and the settings that change content or order. Equal
    fingerprints give equal batches, whatever the path of the file."""
    supervised_per_example: tuple[int, ...] = ()
    """Supervised tokens of an example: minimum, quartiles, maximum (five numbers)."""
    assistant_mask: str | None = None
    """How the assistant's text was located: `template` (`{% generation %}` marks),
    `renderer` (what each turn adds after the generation prompt), `markers`
    (`data.response_part` in a text), or None where it was not needed."""
    remarks: dict[str, int] = dataclasses.field(default_factory=dict)
    """What is not trained on, or was changed, of rows that were kept, and how often:
    parts of turns that the chat template does not write, answers that are not trained,
    conversations that were split."""
    recognised: dict[str, int] = dataclasses.field(default_factory=dict)
    """What was recognised in the rows (fields, roles, parts), and in how many."""
    unread: dict[str, int] = dataclasses.field(default_factory=dict)
    """Fields of the rows, and keys of their turns, that nothing reads, the first
    hundred of them, and how many rows have them."""
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)
    """Characters (words, with some tokenizers) that the tokenizer has no token for, the
    first hundred of them, and how many rows have them."""
    bad_rows: tuple[str, ...] = ()
    """What is wrong with the first rows that cannot be used and were left out."""
    places: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Locations of the first rows that were dropped, by reason, or `truncated`, or of
    which there is a remark."""
    sources: tuple["SourceReport", ...] = ()
    """Of a mixture: the report of each source."""

    def summary(self) -> str:
        """Returns a paragraph for people, and another for each source of a mixture."""
        parts = [
            f"{self.rows_kept:,} of {counted(self.rows_read, 'row')} kept, "
            f"{counted(self.examples, 'example')}, {counted(self.tokens, 'token')}, "
            f"{self.supervised_tokens:,} supervised "
            f"({self.supervised_tokens / self.tokens:.1%}); "
            f"longest row {counted(self.longest_row, 'token')}"
        ]
        if self.recognised:
            parts.append(f"read: {self._counted(self.recognised)}")
        if self.unread:
            fields = {f"`{name}`": count for name, count in self.unread.items()}
            parts.append(f"fields that are not read: {self._counted(fields)}")
        for reason, count in self.dropped.items():
            parts.append(f"dropped {count:,}: {reason}{self._where(reason)}")
        if self.bad_rows:
            parts.append(f"the first of those: {self.bad_rows[0]}".rstrip("."))
        if self.truncated:
            parts.append(
                f"{counted(self.truncated, 'row')} truncated "
                f"({counted(self.tokens_lost, 'token')} lost)"
                f"{self._where('truncated')}"
            )
        for remark, count in self.remarks.items():
            parts.append(f"{remark}: {count:,}{self._where(remark)}")
        if self.documents_cut:
            parts.append(f"{counted(self.documents_cut, 'document')} cut into windows")
        if self.straddling_rows:
            parts.append(
                f"{counted(self.straddling_rows, 'row')} with a token across the start "
                "or the end of an answer"
            )
        if self.assistant_mask is not None:
            parts.append(_ASSISTANT_MASKS[self.assistant_mask])
        if self.packing_efficiency is not None:
            parts.append(
                f"packed into {counted(self.packed_rows or 0, 'row')}, "
                f"{self.packing_efficiency:.1%} full"
            )
        text = "; ".join(parts) + "."
        for source in self.sources:
            text += (
                f"\n  {source.name}: {source.share:.1%} of the rows, seen "
                f"{source.passes_per_epoch:.3g} times in an epoch. "
                f"{source.report.summary()}"
            )
        return text

    def _where(self, reason: str) -> str:
        places = self.places.get(reason, ())
        return f" ({', '.join(places)})" if 0 < len(places) < 4 else ""

    def _counted(self, counts: dict[str, int]) -> str:
        """Joins phrases, each with its number of rows unless it holds for all."""
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        phrases = [
            phrase + ("" if count == self.rows_read else f" ({_rows(count)})")
            for phrase, count in ranked[:_MAX_PHRASES]
        ]
        more = len(ranked) - _MAX_PHRASES
        return ", ".join([*phrases, *[f"and {more:,} more"] * (more > 0)])

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, as JSON decodes them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """One source of a mixture."""

    name: str
    """Its path or paths."""
    share: float
    """Share of the rows of the run."""
    passes_per_epoch: float
    """How often an epoch visits each of its rows."""
    report: DataReport
    """Its own counts."""


def from_dict(values: dict[str, Any]) -> DataReport:
    """Restores the report of one source from the values of `as_dict`."""
    values = dict(values, sources=())
    values["supervised_per_example"] = tuple(values["supervised_per_example"])
    values["bad_rows"] = tuple(values["bad_rows"])
    values["places"] = {k: tuple(v) for k, v in values["places"].items()}
    return DataReport(**values)


def combined(
    sources: Sequence[SourceReport], example_counts: dict[str, Any], fingerprint: str
) -> DataReport:
    """Combines the reports of a mixture's sources.

    Args:
      sources: their reports.
      example_counts: the fields that count the examples of all sources together.
      fingerprint: of the mixture.
    """
    reports = [source.report for source in sources]
    summed = (
        *("rows_read", "rows_kept", "truncated", "tokens_lost", "documents_cut"),
        *("supervised_eos", "straddling_rows"),
    )
    dropped: Counter[str] = Counter()
    recognised: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    locations: dict[str, tuple[str, ...]] = {}
    for report in reports:
        dropped.update(report.dropped)
        recognised.update(report.recognised)
        remarks.update(report.remarks)
        unread.update(report.unread)
        unknown.update(report.unknown)
        for reason, rows in report.places.items():
            locations[reason] = (*locations.get(reason, ()), *rows)
    return DataReport(
        **{name: sum(getattr(report, name) for report in reports) for name in summed},
        **example_counts,
        dropped=dict(dropped),
        recognised=dict(recognised),
        unread=dict(unread),
        unknown=dict(unknown),
        longest_row=max(report.longest_row for report in reports),
        fingerprint=fingerprint,
        assistant_mask=None,  # sources may differ
        remarks=dict(remarks),
        bad_rows=tuple(reason for report in reports for reason in report.bad_rows),
        places=locations,
        sources=tuple(sources),
    )
