"""What the pages for a browser have in common: the frame, the style, tables.

One file without scripts and without anything from elsewhere, so that it can be kept
beside a run and opened anywhere. Texts are escaped here, where they become HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root {
  --ink: #1c1f23; --soft: #667; --line: #dde; --on: #b7e4c7; --ink-on: #0b3d20;
  --bar: #4a90c2; --back: #fff; --note: #fff6db; --one: #33689e; --two: #c8374d;
  --three: #6b705c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e6e6; --soft: #9aa; --line: #333; --on: #1f5c3a; --ink-on: #d9f7e5;
    --bar: #5aa0d0; --back: #16181b; --note: #3a3420; --one: #7db1e3; --two: #f0788a;
    --three: #b7bda6;
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
.note { background: var(--note); padding: .4rem .8rem; border-radius: 4px; }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.7 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 4px; padding: .8rem;
}
small { color: var(--soft); }
"""


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
      title: shown as the heading too; plain text.
      style: further CSS.
      body: HTML, one part a line.
    """
    shown = escape(title)
    head = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
    ]
    parts = [*head, f"<title>{shown}</title><style>{_STYLE}{style}</style>", *body]
    return "\n".join(parts) + "\n"


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of plain texts; columns after the first are set to the right."""
    lines = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    if head:
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines.insert(0, f"<tr>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"
