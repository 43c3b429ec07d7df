"""A page for a browser: what a run would train on.

Numbers, lengths, and examples token by token; every text of the data is escaped.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from qlora_jax.page import document, table

_STYLE = """
.bins td:last-child { width: 24rem; text-align: left; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; }
pre span { border-left: 1px solid var(--line); color: var(--soft); }
pre .on, .key { background: var(--on); color: var(--ink-on); }
"""


def page(report: Mapping[str, Any], name: str) -> str:
    """Renders what `DataView.run` found as an HTML page.

    Args:
      report: numbers, histogram, notes and examples.
      name: of the data, for the title.
    """
    data, rows = report["data"], report["rows"]
    least, _, middle, _, most = data["supervised_per_example"]
    numbers = [
        ("rows read", f"{data['rows_read']:,}"),
        ("rows kept", f"{data['rows_kept']:,}"),
        ("examples", f"{data['examples']:,}"),
        ("tokens", f"{data['tokens']:,}"),
        (
            "supervised tokens",
            f"{data['supervised_tokens']:,} "
            f"({data['supervised_tokens'] / data['tokens']:.1%})",
        ),
        ("supervised in an example", f"{least:,} to {most:,}, median {middle:,}"),
        ("supervised EOS", f"{data['supervised_eos']:,}"),
        ("longest row", f"{data['longest_row']:,} tokens"),
        ("truncated rows", f"{data['truncated']:,} ({data['tokens_lost']:,} tokens)"),
        ("documents cut into windows", f"{data['documents_cut']:,}"),
        ("steps in an epoch", f"{rows['steps_per_epoch']:,.1f}"),
    ]
    if data["assistant_mask"] is not None:
        numbers.append(("assistant's text marked by", f"the {data['assistant_mask']}"))
    numbers += [(f"dropped: {why}", f"{n:,}") for why, n in data["dropped"].items()]
    laid_out = [
        (
            words + (" (this run)" if rows["packing"] == (key == "packed") else ""),
            f"{rows[key]['rows']:,}",
            f"{rows[key]['length']:,}",
            f"{rows[key]['efficiency']:.1%}",
        )
        for key, words in (("packed", "packed"), ("one_each", "one example a row"))
    ]
    parts = [
        f"<h1>{escape(name)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in report["notes"]),
        table(numbers),
        *_sources(data["sources"]),
        "<h2>Rows</h2>",
        table(laid_out, ("", "rows", "tokens each", "full")),
        "<h2>Examples by length</h2>",
        _histogram(report["lengths"]),
        *_places(data["places"]),
        '<h2>Examples</h2><p>Each token in its box; <span class="key">supervised</span>'
        " ones are what the model learns to write. The number of a token shows when "
        "the mouse rests on it.</p>",
        *map(_example, report["examples"]),
    ]
    return document(f"Data: {name}", _STYLE, parts)


def _sources(sources: list[dict[str, Any]]) -> list[str]:
    if not sources:
        return []
    rows = [
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
    head = ("", "share of rows", "passes an epoch", "rows", "tokens", "supervised")
    return ["<h2>Sources</h2>", table(rows, head)]


def _histogram(bins: list[dict[str, int]]) -> str:
    most = max(b["examples"] for b in bins)
    lines = [
        f"<tr><td>{b['from']:,} - {b['to']:,}</td><td>{b['examples']:,}</td>"
        f'<td><div class="bar" style="width: {100 * b["examples"] / most:.1f}%">'
        "</div></td></tr>"
        for b in bins
    ]
    return '<table class="bins">' + "\n".join(lines) + "</table>"


def _places(places: dict[str, list[str]]) -> list[str]:
    if not places:
        return []
    rows = [(reason, ", ".join(found)) for reason, found in places.items()]
    head = "<h2>The first rows that were cut or left out</h2>"
    return [head, f'<div class="places">{table(rows)}</div>']


def _example(example: Mapping[str, Any]) -> str:
    spans = []
    columns = zip(
        example["tokens"], example["supervised"], example["text"], strict=True
    )
    for position, (token, supervised, text) in enumerate(columns):
        shown = escape(text).replace("\n", "\u21b5\n")
        kind = ' class="on"' if supervised else ""
        title = f"position {position}, token {token}"
        spans.append(f'<span{kind} title="{title}">{shown}</span>')
    more = example["not_shown"]
    tail = f"<small> ... and {more:,} more tokens</small>" if more else ""
    return (
        f"<h3>Example {example['number']} <small>{example['length']:,} tokens, "
        f"{example['supervised_tokens']:,} supervised</small></h3>\n"
        f"<pre>{''.join(spans)}{tail}</pre>"
    )
