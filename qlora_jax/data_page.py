"""A page for a browser: what a run would train on.

One file without scripts and without anything from elsewhere, so that it can be kept
beside a run and opened anywhere. Every text of the data is escaped.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root {
  --ink: #1c1f23; --soft: #667; --line: #dde; --on: #b7e4c7; --ink-on: #0b3d20;
  --bar: #4a90c2; --back: #fff; --note: #fff6db;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e6e6; --soft: #9aa; --line: #333; --on: #1f5c3a; --ink-on: #d9f7e5;
    --bar: #5aa0d0; --back: #16181b; --note: #3a3420;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th {
  padding: .15rem .9rem .15rem 0; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums;
}
td:first-child, th:first-child, .places td { text-align: left; }
.bins td:last-child { width: 24rem; text-align: left; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; }
.note { background: var(--note); padding: .4rem .8rem; border-radius: 4px; }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.7 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 4px; padding: .8rem;
}
pre span { border-left: 1px solid var(--line); color: var(--soft); }
pre .on, .key { background: var(--on); color: var(--ink-on); }
small { color: var(--soft); }
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
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>Data: {escape(name)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(name)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in report["notes"]),
        _table(numbers),
        *_sources(data["sources"]),
        "<h2>Rows</h2>",
        _table(laid_out, ("", "rows", "tokens each", "full")),
        "<h2>Examples by length</h2>",
        _histogram(report["lengths"]),
        *_places(data["places"]),
        '<h2>Examples</h2><p>Each token in its box; <span class="key">supervised</span>'
        " ones are what the model learns to write. The number of a token shows when "
        "the mouse rests on it.</p>",
        *map(_example, report["examples"]),
    ]
    return "\n".join(parts) + "\n"


def _table(rows: Any, head: tuple[str, ...] = ()) -> str:
    lines = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    if head:
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines.insert(0, f"<tr>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


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
    return ["<h2>Sources</h2>", _table(rows, head)]


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
    return [head, f'<div class="places">{_table(rows)}</div>']


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
