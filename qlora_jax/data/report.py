"""What became of the rows: counted while they are read, for people and report.json."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the rows; all figures after truncation unless said otherwise."""

    rows_read: int
    """Rows in the file."""
    rows_kept: int
    """Rows that gave at least one example."""
    examples: int
    """Examples (more than `rows_kept` when documents were cut into windows)."""
    dropped: dict[str, int]
    """Rows (of cut documents: windows) left out, by reason."""
    truncated: int
    """Rows that lost their end, and are kept."""
    tokens_lost: int
    """Tokens those rows lost."""
    documents_cut: int
    """Documents cut into windows of `max_length` tokens (they lose nothing)."""
    tokens: int
    """Tokens in all examples, without padding."""
    supervised_tokens: int
    """Tokens whose prediction is trained. The first of an example never is one."""
    supervised_eos: int
    """Supervised tokens that are the tokenizer's EOS; 0 teaches no model to stop."""
    longest_row: int
    """Longest row in the file, before any cut (tokens)."""
    longest_example: int
    """Longest example (tokens)."""
    straddling_rows: int
    """Rows in which a token holds both prompt and answer characters. Such a token is
    supervised; ending the prompt with a newline, or moving its last space to the start
    of the completion, avoids it."""
    packed_rows: int | None
    """Rows after packing; None without packing."""
    packing_efficiency: float | None
    """Share of the packed rows that is not padding; None without packing."""
    fingerprint: str
    """Hash of tokens, labels and the settings that change content or order. Equal
    fingerprints give equal batches, wherever the file lies."""
    supervised_per_example: tuple[int, ...] = ()
    """Supervised tokens of an example: least, quartiles, most (five numbers)."""
    assistant_mask: str | None = None
    """Who said what the assistant wrote: `template` (its `{% generation %}` marks),
    `renderer` (what each turn adds after the generation prompt), or None where nobody
    was asked."""
    places: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """The first rows that were dropped, by reason, and those `truncated`."""
    sources: tuple["SourceReport", ...] = ()
    """Of a mixture: each source by itself."""

    def summary(self) -> str:
        """One paragraph for people; of a mixture, one more for each source."""
        parts = [
            f"{self.rows_kept:,} of {self.rows_read:,} rows kept, "
            f"{self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised "
            f"({self.supervised_tokens / self.tokens:.1%}); "
            f"longest row {self.longest_row:,} tokens"
        ]
        for reason, count in self.dropped.items():
            parts.append(f"dropped {count:,}: {reason}{self._where(reason)}")
        if self.truncated:
            parts.append(
                f"{self.truncated:,} rows truncated ({self.tokens_lost:,} tokens lost)"
                f"{self._where('truncated')}"
            )
        if self.documents_cut:
            parts.append(f"{self.documents_cut:,} documents cut into windows")
        if self.straddling_rows:
            parts.append(
                f"{self.straddling_rows:,} rows have a token across the start of the "
                "answer"
            )
        if self.assistant_mask is not None:
            parts.append(
                "the assistant's text as the chat template marks it"
                if self.assistant_mask == "template"
                else "the assistant's text is what each turn adds after the "
                "generation prompt (the chat template has no generation marks)"
            )
        if self.packing_efficiency is not None:
            parts.append(
                f"packed into {self.packed_rows:,} rows, "
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """One source of a mixture."""

    name: str
    """Its path or paths."""
    share: float
    """Of the rows of the run."""
    passes_per_epoch: float
    """How often each of its rows is seen in an epoch."""
    report: DataReport
    """What became of its rows."""


def from_dict(values: dict[str, Any]) -> DataReport:
    """Makes the report of one source of what `as_dict` gave, through JSON."""
    values = dict(values, sources=())
    values["supervised_per_example"] = tuple(values["supervised_per_example"])
    values["places"] = {k: tuple(v) for k, v in values["places"].items()}
    return DataReport(**values)


def combined(
    sources: Sequence[SourceReport],
    *,
    packed_rows: int | None,
    max_length: int,
    supervised_per_example: tuple[int, ...],
    fingerprint: str,
) -> DataReport:
    """The report of a mixture: sums and maxima over its sources."""
    reports = [source.report for source in sources]

    def total(name: str) -> int:
        return sum(getattr(report, name) for report in reports)

    dropped: Counter[str] = Counter()
    places: dict[str, tuple[str, ...]] = {}
    for report in reports:
        dropped.update(report.dropped)
        for reason, found in report.places.items():
            places[reason] = (*places.get(reason, ()), *found)
    counts = (
        *("rows_read", "rows_kept", "examples", "truncated", "tokens_lost"),
        *("documents_cut", "tokens", "supervised_tokens", "supervised_eos"),
        "straddling_rows",
    )
    return DataReport(
        **{name: total(name) for name in counts},
        dropped=dict(dropped),
        longest_row=max(report.longest_row for report in reports),
        longest_example=max(report.longest_example for report in reports),
        packed_rows=packed_rows,
        packing_efficiency=(
            None if packed_rows is None else total("tokens") / packed_rows / max_length
        ),
        fingerprint=fingerprint,
        supervised_per_example=supervised_per_example,
        # Each source says its own.
        assistant_mask=None,
        places=places,
        sources=tuple(sources),
    )
