"""A page for a browser: a run, as far as it has come.

    RUN/report.html          written when the run is complete
    qlora-jax report RUN     the same at any time

It is made of what lies in the run's directory alone. Texts of the data, the settings
and the model are escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from convert.files import read_json
from convert.output import write_text
from qlora_jax.curves import Curve, chart, legend
from qlora_jax.directories import ADAPTER, BEST, REPORT, STARTED
from qlora_jax.errors import UserError, readable_bytes
from qlora_jax.loss_plot import running_mean
from qlora_jax.page import document, table
from qlora_jax.runs.toml import SETTINGS
from qlora_jax.watch import read_evaluations, read_metrics, read_samples

PAGE = "report.html"

_STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tiles div {
  border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem;
  min-width: 7.5rem;
}
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.faint { stroke-width: 1; opacity: .35; }
.legend { margin: .2rem 0 0; color: var(--soft); font-size: .9rem; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i {
  display: inline-block; width: 1.1rem; height: .2rem; margin-right: .4rem;
  vertical-align: middle;
}
.legend i.faint { opacity: .35; }
.legend i.points { width: .5rem; height: .5rem; border-radius: 50%; }
.charts {
  display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2rem; margin-top: 1.5rem;
}
.charts h3 { margin: .5rem 0 0; font-size: .95rem; font-weight: 600; }
.columns { display: flex; flex-wrap: wrap; gap: 0 4rem; align-items: flex-start; }
.columns h3 { margin: 0; font-size: .95rem; font-weight: 600; }
.columns td { max-width: 24rem; overflow-wrap: anywhere; }
.sample b { font-weight: 600; }
@media (max-width: 45rem) { .charts { grid-template-columns: 1fr; } }
@media print { details { display: block; } }
"""


@dataclass(frozen=True)
class RunFiles:
    """What lies in the directory of a run."""

    directory: Path
    settings: str
    """config.toml."""
    started: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any] | None
    """report.json; None while the run is under way."""


def read_run(directory: Path) -> RunFiles:
    """Reads the directory of a run, finished or not.

    Raises:
      UserError: it is none.
    """
    if not (directory / SETTINGS).is_file():
        raise UserError(
            f"`{directory}` is no run directory: it has no {SETTINGS}. `qlora-jax "
            "train` makes one."
        )
    report = directory / REPORT
    started = directory / STARTED
    return RunFiles(
        directory=directory,
        settings=(directory / SETTINGS).read_text(encoding="utf-8"),
        started=read_json(started) if started.is_file() else {},
        metrics=read_metrics(directory),
        evaluations=read_evaluations(directory),
        samples=read_samples(directory),
        report=read_json(report) if report.is_file() else None,
    )


@dataclass(frozen=True)
class Report:
    """Write a page for a browser about a run, finished or under way."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    output: str | None = None
    """File to write; default report.html in the run directory."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Does it; returns where the page is and the main numbers."""
        files = read_run(Path(self.path))
        page = run_page(files, files.report)
        place = Path(self.output) if self.output else Path(self.path) / PAGE
        try:
            write_text(place, page)
        except OSError as error:
            raise UserError(f"`{place}` cannot be written: {error.strerror}.") from None
        best = _best(files.evaluations)
        return {
            "page": str(place),
            "step": files.metrics[-1]["step"] if files.metrics else 0,
            "loss": files.metrics[-1]["loss"] if files.metrics else None,
            "best_step": None if best is None else best["step"],
            "best_loss": None if best is None else best["eval_loss"],
        }


def run_page(run: RunFiles, report: Mapping[str, Any] | None) -> str:
    """Renders a run as an HTML page.

    Args:
      run: what is in its directory.
      report: what report.json holds, or will; None while the run is under way.
    """
    name = run.directory.absolute().name
    known = {**run.started, **(report or {})}
    body = [
        f"<h1>{escape(name)}</h1>",
        f"<p>{escape(_state(run, report))}{_adapters(run)}</p>",
        _tiles(run, known),
        *_charts(run),
        *_samples(run.samples),
        *_sections(known),
        "<h2>Settings</h2>",
        f"<pre>{escape(run.settings)}</pre>",
    ]
    return document(f"Run: {name}", _STYLE, body)


def _state(run: RunFiles, report: Mapping[str, Any] | None) -> str:
    planned = run.started.get("planned_steps")
    of = "" if planned is None else f" of {planned:,}"
    if report is None:
        step = run.metrics[-1]["step"] if run.metrics else 0
        return f"Under way, or interrupted: step {step:,}{of} when this was written."
    taken = report["steps"]
    if report.get("stopped_early"):
        return f"Ended early after step {taken:,}{of}: {report['stopped_early']}."
    return f"Finished after {taken:,} steps."


def _adapters(run: RunFiles) -> str:
    """Where the trained adapters lie."""
    found = []
    for name, what in ((ADAPTER, "the newest"), (BEST, "the best on held-out data")):
        if (run.directory / name).is_dir():
            found.append(f"{what} in <code>{escape(str(run.directory / name))}</code>")
    return f"<br>Adapters: {', '.join(found)}." if found else ""


def _best(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The lowest held-out loss, among the measurements on the data measured last."""
    if not evaluations:
        return None
    data = evaluations[-1].get("eval_data")
    same = [row for row in evaluations if row.get("eval_data") == data]
    finite = [row for row in same if np.isfinite(row["eval_loss"])]
    return min(finite, key=lambda row: row["eval_loss"]) if finite else None


def _tiles(run: RunFiles, known: Mapping[str, Any]) -> str:
    tiles = []
    rows = run.metrics
    if rows:
        tiles.append(("training loss", f"{rows[-1]['loss']:.4f}"))
    best = _best(run.evaluations)
    if best is not None:
        tiles.append(
            (f"best held-out loss, step {best['step']:,}", f"{best['eval_loss']:.4f}")
        )
        tiles.append(("its perplexity", f"{best['eval_perplexity']:.4g}"))
    if rows:
        speed = float(np.median([row["tokens_per_second"] for row in rows]))
        tiles.append(("tokens/s, median", f"{speed:,.0f}"))
        used = [row["mfu"] for row in rows if "mfu" in row]
        if used:
            tiles.append(("MFU, median", f"{float(np.median(used)):.1%}"))
        seconds = sum(row["seconds"] for row in rows)
        tiles.append(("time in steps", _duration(seconds)))
        peak = max(row["peak_memory_bytes"] for row in rows)
        tiles.append(("peak memory", readable_bytes(peak)))
    if "trainable_parameters" in known:
        tiles.append(("trained parameters", f"{known['trainable_parameters']:,}"))
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>"
        for label, value in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _charts(run: RunFiles) -> list[str]:
    rows = run.metrics
    if not rows:
        return ["<p>No step has been taken yet.</p>"]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    steps = column("step")
    loss = column("loss")
    curves = [Curve("loss of each step", steps, loss)]
    if len(rows) >= 10:
        mean, width = running_mean(np.asarray(loss, float))
        curves = [
            Curve("loss of each step", steps, loss, kind="faint"),
            Curve(f"mean of {width} steps", steps, mean.tolist()),
        ]
    if run.evaluations:
        held = run.evaluations
        curves.append(
            Curve(
                "held-out loss",
                [row["step"] for row in held],
                [row["eval_loss"] for row in held],
                "two",
                "points",
            )
        )
    small = [
        ("Learning rate", Curve("learning rate", steps, column("learning_rate"))),
        ("Gradient norm", Curve("gradient norm", steps, column("grad_norm"))),
        ("Tokens/s", Curve("tokens/s", steps, column("tokens_per_second"))),
    ]
    memory = [value / 1e9 for value in column("peak_memory_bytes")]
    small.append(("Peak memory (GB)", Curve("peak memory", steps, memory)))
    if any("mfu" in row for row in rows):
        used = [row for row in rows if "mfu" in row]
        percent = Curve(
            "MFU", [row["step"] for row in used], [100 * row["mfu"] for row in used]
        )
        small.append(("Model FLOPs utilization (%)", percent))
    return [
        "<h2>Loss <small>nats per supervised token, by step</small></h2>",
        legend(curves),
        chart(curves, label="loss over steps", height=300),
        '<div class="charts">',
        *(
            f"<div><h3>{escape(title)}</h3>"
            + chart([curve], label=title, width=440, height=150, zero=True)
            + "</div>"
            for title, curve in small
        ),
        "</div>",
    ]


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    if not samples:
        return []
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in samples:
        by_prompt.setdefault(row["prompt"], []).append(row)
    parts = ["<h2>Samples <small>the prompt in bold</small></h2>"]
    for prompt, rows in by_prompt.items():
        *earlier, last = rows
        parts.append(_sample(prompt, last))
        if earlier:
            parts.append(
                f"<details><summary>{len(earlier)} earlier</summary>"
                + "".join(_sample(prompt, row) for row in reversed(earlier))
                + "</details>"
            )
    return parts


def _sample(prompt: str, row: Mapping[str, Any]) -> str:
    return (
        f'<pre class="sample"><small>step {row["step"]:,}</small>\n'
        f"<b>{escape(prompt)}</b>{escape(row['text'])}</pre>"
    )


# What has a place of its own on the page, or in a tile.
_ELSEWHERE = {
    *("groups", "optimizer_groups", "data", "held_out", "plan", "versions", "eval"),
    *("steps", "planned_steps", "stopped_early", "final_loss"),
    *("peak_memory_bytes", "trainable_parameters"),
}


def _sections(known: Mapping[str, Any]) -> list[str]:
    parts = []
    if known.get("groups"):
        total = known["trainable_parameters"]
        rows = [
            (name, *_group(value, total)) for name, value in known["groups"].items()
        ]
        parts += [
            "<h2>Parameters</h2>",
            '<div class="columns">',
            table(rows, ("trained", "parameters", "share")),
            table(
                (_words(key), _text(key, value))
                for key, value in _flat(
                    {k: v for k, v in known.items() if k not in _ELSEWHERE}
                )
            ),
            "</div>",
        ]
    if known.get("optimizer_groups"):
        parts += ["<h3>What the optimizer does with them</h3>"]
        parts.append(_records(known["optimizer_groups"]))
    if known.get("data"):
        parts += ["<h2>Data</h2>", '<div class="columns">']
        parts.append(f"<div><h3>Trained on</h3>{_data(known['data'])}</div>")
        if known.get("held_out"):
            parts.append(f"<div><h3>Held out</h3>{_data(known['held_out'])}</div>")
        parts.append("</div>")
    columns = [
        (title, known[key])
        for title, key in (("Plan", "plan"), ("Versions", "versions"))
        if known.get(key)
    ]
    if columns:
        parts.append('<div class="columns">')
        for title, content in columns:
            # A plan lists the bytes of many kinds that are none.
            rows = [(_words(k), _text(k, v)) for k, v in _flat(content) if v != 0]
            parts.append(f"<div><h2>{title}</h2>{table(rows)}</div>")
        parts.append("</div>")
    return parts


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    """One line a record, one column a field."""
    names = list(dict.fromkeys(name for record in records for name in record))
    return table(
        ([_text(name, record.get(name)) for name in names] for record in records),
        [_words(name) for name in names],
    )


def _group(value: Any, total: int) -> tuple[str, str]:
    if isinstance(value, int):
        return f"{value:,}", f"{value / total:.1%}"
    return _text("", value), ""


def _data(report: Mapping[str, Any]) -> str:
    names = (
        *("rows_read", "rows_kept", "examples", "tokens", "supervised_tokens"),
        *("longest_row", "truncated", "packed_rows", "packing_efficiency"),
    )
    rows = [(_words(n), _text(n, report[n])) for n in names if report.get(n)]
    rows += [(f"dropped: {why}", f"{n:,}") for why, n in report["dropped"].items()]
    rows += [
        (source["name"], f"{source['share']:.1%} of the rows")
        for source in report.get("sources") or ()
    ]
    rows.append(("fingerprint", _text("fingerprint", report["fingerprint"])))
    return table(rows)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Entries of nested tables, one after the other."""
    out: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{key}: ")
        else:
            out.append((f"{prefix}{key}", value))
    return out


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(name: str, value: Any) -> str:
    if name.endswith("fingerprint"):
        return str(value)[:16]
    if "bytes" in name and isinstance(value, int):
        return readable_bytes(value)
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1%}" if name == "packing_efficiency" else f"{value:.5g}"
    if isinstance(value, (Mapping, list)):
        return json.dumps(value)
    return str(value)
