"""An HTML page of what a run would train on: numbers, lengths, examples by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.runs import render_page


def render_data(report: Mapping[str, Any], name: str) -> str:
    """Renders the report of `DataView.run` as HTML.

    Args:
      report: numbers, histogram, notes and examples.
      name: of the data, for the title.
    """
    data, bins = report["data"], report["lengths"]
    return render_page(
        "data.html",
        title=f"Data: {name}",
        name=name,
        notes=report["notes"],
        numbers=_numbers(data, report["rows"]),
        sources=_sources(data["sources"]),
        layouts=_layouts(report["rows"]),
        bins=bins,
        largest_bin=max(bin["examples"] for bin in bins),
        examples_of_problems=[
            (reason, ", ".join(rows)) for reason, rows in data["places"].items()
        ],
        examples=[
            {**example, "pieces": _pieces(example)} for example in report["examples"]
        ],
    )


def _numbers(
    data: Mapping[str, Any], rows: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yields label and value of each number of the data."""
    least, _, median, _, most = data["supervised_per_example"]
    supervised = data["supervised_tokens"]
    yield "rows read", f"{data['rows_read']:,}"
    yield "rows kept", f"{data['rows_kept']:,}"
    yield "examples", f"{data['examples']:,}"
    yield "tokens", f"{data['tokens']:,}"
    yield "supervised tokens", f"{supervised:,} ({supervised / data['tokens']:.1%})"
    yield "supervised per example", f"{least:,} to {most:,}, median {median:,}"
    yield "supervised EOS", f"{data['supervised_eos']:,}"
    yield "longest row", f"{data['longest_row']:,} tokens"
    yield (
        "truncated rows",
        f"{data['truncated']:,} ({data['tokens_lost']:,} tokens)",
    )
    yield "documents cut into windows", f"{data['documents_cut']:,}"
    yield "steps per epoch", f"{rows['steps_per_epoch']:,.1f}"
    if data["assistant_mask"] is not None:
        yield "assistant's text marked by", f"the {data['assistant_mask']}"
    for phrase, count in data["recognised"].items():
        yield f"read: {phrase}", f"{count:,} rows"
    for name, count in data["unread"].items():
        yield f"field that is not read: {name}", f"{count:,} rows"
    for reason, count in data["dropped"].items():
        yield f"dropped: {reason}", f"{count:,}"


def _sources(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            source["name"],
            f"{source['share']:.1%}",
            f"{source['passes_per_epoch']:.3g}",
            f"{source['report']['rows_kept']:,}",
            f"{source['report']['tokens']:,}",
            f"{source['report']['supervised_tokens']:,}",
        )
        for source in sources
    ]


def _layouts(rows: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Compares rows with and without packing."""
    packing = rows["packing"]
    layouts = (
        ("packed", rows["packed"], packing),
        ("one example a row", rows["one_each"], not packing),
    )
    return [
        (
            label + (" (this run)" if chosen else ""),
            f"{layout['rows']:,}",
            f"{layout['length']:,}",
            f"{layout['efficiency']:.1%}",
        )
        for label, layout, chosen in layouts
    ]


def _pieces(example: Mapping[str, Any]) -> list[tuple[str, int, bool]]:
    """Returns text, id and whether it is supervised, for each token."""
    columns = (example["text"], example["tokens"], example["supervised"])
    return list(zip(*columns, strict=True))
