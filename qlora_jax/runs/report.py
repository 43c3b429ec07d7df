"""The report of a run: one HTML file with its curves, samples, data and settings.

    RUN/report.html          written when the run is complete
    qlora-jax report RUN     the same at any time

`read_run` reads the files of a run directory, `render_run` lays them out, and
`render_page` fills a template. The layout is in templates/; text from files reaches a
page through autoescaping templates only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.errors import UserError, readable_bytes, visible
from qlora_jax.reading import read_bytes
from qlora_jax.runs.directory import ADAPTER, BEST, REPORT, STARTED
from qlora_jax.runs.plots import (
    MIN_STEPS_FOR_MEAN,
    Chart,
    Curve,
    chart,
    running_mean,
)
from qlora_jax.runs.rows import read_evaluations, read_facts, read_metrics, read_samples
from qlora_jax.runs.toml import SETTINGS

if TYPE_CHECKING:
    import jinja2

REPORT_PAGE = "report.html"

Row = Mapping[str, Any]

# Fields of started.json and report.json that have a section or a tile of their own.
_SHOWN_ELSEWHERE = {
    *("groups", "optimizer_groups", "data", "held_out", "plan", "versions", "eval"),
    *("steps", "planned_steps", "stopped_early", "final_loss"),
    *("peak_memory_bytes", "trainable_parameters"),
}
_DATA_FIELDS = (
    *("rows_read", "rows_kept", "examples", "tokens", "supervised_tokens"),
    *("longest_row", "truncated", "packed_rows", "packing_efficiency"),
)


# --- Templates ---


def render_page(template: str, **context: Any) -> str:
    """Renders a template of this package.

    Every value is escaped, and characters that a browser would obey or hide are shown
    by their code points.

    Args:
      template: its file name in templates/.
      **context: a value for each name that the template uses.
    """
    return _environment().get_template(template).render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2  # only commands that write pages wait for it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qlora_jax.runs"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=show_invisible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = "{:,}".format
    return environment


def show_invisible(value: Any) -> Any:
    """Replaces control characters and bidi marks in a string by [U+XXXX]."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value  # a number, or a macro's output, whose strings were replaced
    return visible(value)


# --- Reading ---


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory that the report shows."""

    directory: Path
    settings: str
    """config.toml."""
    started: Row
    """started.json; empty before the first step."""
    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    samples: Sequence[Row]
    report: Row | None
    """report.json; None while the run is not complete."""
    notes: Sequence[str] = ()
    """What is left out, because it is not what a run writes."""


def read_run(directory: Path) -> RunFiles:
    """Reads a run directory, complete or not.

    Raises:
      UserError: `directory` is not a run directory.
    """
    try:
        settings = read_bytes(directory / SETTINGS).decode("utf-8", "replace")
    except FileNotFoundError:
        raise UserError(
            f"`{directory}` is not a run directory: it has no {SETTINGS}. `qlora-jax "
            "train` makes one."
        ) from None
    except OSError as error:
        raise UserError(
            f"`{directory / SETTINGS}` cannot be read: {error.strerror}."
        ) from error
    notes: list[str] = []
    return RunFiles(
        directory=directory,
        settings=settings,
        started=read_facts(directory / STARTED, notes) or {},
        # A note about metrics.jsonl is for both kinds of rows in it.
        metrics=read_metrics(directory, notes),
        evaluations=read_evaluations(directory),
        samples=read_samples(directory, notes),
        report=read_facts(directory / REPORT, notes),
        notes=notes,
    )


def best_evaluation(evaluations: Sequence[Row]) -> Row | None:
    """Returns the evaluation with the lowest loss.

    Losses on different held-out data do not compare, so only those on the data of the
    last evaluation count.
    """
    if not evaluations:
        return None
    data = evaluations[-1].get("eval_data")
    comparable = [
        row
        for row in evaluations
        if row.get("eval_data") == data and np.isfinite(row["eval_loss"])
    ]
    return min(comparable, key=lambda row: row["eval_loss"], default=None)


# --- The page ---


def render_run(run: RunFiles) -> str:
    """Renders the report of a run as HTML."""
    name = run.directory.absolute().name
    facts = {**run.started, **(run.report or {})}
    details = {k: v for k, v in facts.items() if k not in _SHOWN_ELSEWHERE}
    return render_page(
        "run.html",
        title=f"Run: {name}",
        name=name,
        state=_state(run),
        notes=run.notes,
        adapters=_adapters(run.directory),
        tiles=_tiles(run, facts),
        charts=_charts(run),
        samples=_samples_by_prompt(run.samples),
        groups=_groups(facts),
        details=_field_rows(details),
        optimizer_groups=_records(facts.get("optimizer_groups") or ()),
        data=[
            (heading, _data_rows(facts[key]))
            for heading, key in (("Trained on", "data"), ("Held out", "held_out"))
            if facts.get("data") and facts.get(key)
        ],
        # A plan counts bytes of many kinds that this run has none of.
        environment=[
            (heading, _field_rows(facts[key], skip_zero=True))
            for heading, key in (("Plan", "plan"), ("Versions", "versions"))
            if facts.get(key)
        ],
        settings=run.settings,
    )


def _state(run: RunFiles) -> str:
    planned = run.started.get("planned_steps")
    of_planned = "" if planned is None else f" of {planned:,}"
    if run.report is None:
        step = run.metrics[-1]["step"] if run.metrics else 0
        return (
            f"Running or interrupted: step {step:,}{of_planned} when this was written."
        )
    steps, reason = run.report.get("steps"), run.report.get("stopped_early")
    if steps is None:
        return "Finished."
    if reason:
        return f"Ended early after step {steps:,}{of_planned}: {reason}."
    return f"Finished after {steps:,} steps."


def _adapters(directory: Path) -> list[tuple[str, str]]:
    """Returns label and path of each trained adapter."""
    labels = {ADAPTER: "the newest", BEST: "the best on held-out data"}
    return [
        (label, str(directory / name))
        for name, label in labels.items()
        if (directory / name).is_dir()
    ]


def _tiles(run: RunFiles, facts: Row) -> Iterator[tuple[str, str]]:
    """Yields label and value of each main number."""
    rows = run.metrics
    if rows:
        yield "training loss", f"{rows[-1]['loss']:.4f}"
    best = best_evaluation(run.evaluations)
    if best is not None:
        yield f"best held-out loss, step {best['step']:,}", f"{best['eval_loss']:.4f}"
        yield "its perplexity", f"{best['eval_perplexity']:.4g}"
    if rows:
        # The median, which the first step, slowed by the compiler, does not move.
        speed = float(np.median(_column(rows, "tokens_per_second")))
        yield "tokens/s, median", f"{speed:,.0f}"
        mfu = [row["mfu"] for row in rows if "mfu" in row]
        if mfu:
            yield "MFU, median", f"{float(np.median(mfu)):.1%}"
        yield "time in steps", _duration(sum(_column(rows, "seconds")))
        yield "peak memory", readable_bytes(max(_column(rows, "peak_memory_bytes")))
    if "trainable_parameters" in facts:
        yield "trainable parameters", f"{facts['trainable_parameters']:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _charts(run: RunFiles) -> list[Chart]:
    """Returns the loss chart and the small charts below it; none before a step."""
    rows = run.metrics
    if not rows:
        return []
    steps, loss = _column(rows, "step"), _column(rows, "loss")
    losses = [Curve("loss of each step", steps, loss)]
    if len(rows) >= MIN_STEPS_FOR_MEAN:
        mean, width = running_mean(np.asarray(loss, float))
        losses = [
            Curve("loss of each step", steps, loss, style="faint"),
            Curve(f"mean of {width} steps", steps, mean.tolist()),
        ]
    if run.evaluations:
        eval_steps = _column(run.evaluations, "step")
        eval_loss = _column(run.evaluations, "eval_loss")
        losses.append(Curve("held-out loss", eval_steps, eval_loss, "eval", "points"))
    with_mfu = [row for row in rows if "mfu" in row]
    small = [
        ("Learning rate", rows, "learning_rate", 1),
        ("Gradient norm", rows, "grad_norm", 1),
        ("Tokens/s", rows, "tokens_per_second", 1),
        ("Peak memory (GB)", rows, "peak_memory_bytes", 1e-9),
        *([("Model FLOPs utilization (%)", with_mfu, "mfu", 100)] if with_mfu else []),
    ]
    return [
        chart(losses, label="Loss over steps", height=300),
        *(
            chart(
                [Curve(label, _column(r, "step"), [v * unit for v in _column(r, key)])],
                label=label,
                width=440,
                height=150,
                from_zero=True,
            )
            for label, r, key, unit in small
        ),
    ]


def _column(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _samples_by_prompt(samples: Sequence[Row]) -> list[list[Row]]:
    """Groups samples by prompt, the newest first."""
    groups: dict[str, list[Row]] = {}
    for row in samples:
        groups.setdefault(row["prompt"], []).insert(0, row)
    return list(groups.values())


def _groups(facts: Row) -> list[tuple[str, str, str]]:
    """Returns name, size and share of each group of trainable parameters."""
    rows, total = [], facts.get("trainable_parameters")
    for name, value in (facts.get("groups") or {}).items():
        is_count = isinstance(value, int)
        share = f"{value / total:.1%}" if is_count and total else ""
        rows.append((name, _format("", value), share))
    return rows


def _records(records: Sequence[Row]) -> list[list[str]]:
    """Returns a table, header first: a row per record and a column per field."""
    if not records:
        return []
    names = list(dict.fromkeys(name for record in records for name in record))
    return [
        [_words(name) for name in names],
        *([_format(name, record.get(name)) for name in names] for record in records),
    ]


def _data_rows(report: Row) -> list[tuple[str, str]]:
    """Returns the table of a data report."""
    return [
        *((_words(n), _format(n, report[n])) for n in _DATA_FIELDS if report.get(n)),
        *((f"dropped: {why}", f"{n:,}") for why, n in report["dropped"].items()),
        *(
            (source["name"], f"{source['share']:.1%} of the rows")
            for source in report.get("sources") or ()
        ),
        ("fingerprint", _format("fingerprint", report["fingerprint"])),
    ]


def _field_rows(fields: Row, *, skip_zero: bool = False) -> list[tuple[str, str]]:
    """Returns the table of a nested mapping; names are joined by colons."""
    return [
        (_words(name), _format(name, value))
        for name, value in _flatten(fields)
        if not (skip_zero and value == 0)
    ]


def _flatten(fields: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _format(name: str, value: Any) -> str:
    """Formats a value by its type, and by the unit that its name tells."""
    if name.endswith("fingerprint"):
        return str(value)[:16]
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if "bytes" in name and isinstance(value, int) and abs(value) < 1 << 63:
        return readable_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1%}" if name == "packing_efficiency" else f"{value:.5g}"
    if isinstance(value, (Mapping, list)):
        return json.dumps(value)
    return str(value)
