"""The files that a run writes about itself, read with checks.

    read_metrics(run)      the training steps in metrics.jsonl
    read_evaluations(run)  the measurements on held-out data in it
    read_samples(run)      samples.jsonl
    read_facts(run, name)  started.json or report.json

A run directory may have been damaged, edited, or made by someone else. Rows and fields
that do not have the form in which a run writes them are left out; each function adds a
sentence about them to `notes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from convert import read_json
from qlora_jax.errors import CheckpointError
from qlora_jax.reading import open_file

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

# The longest line: a sample may have thousands of tokens.
_MAX_LINE_BYTES = 4_000_000

Row = dict[str, Any]
Check = Callable[[Any], bool]


# --- What values a run writes ---


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that charts and tables can show."""
    return type(value) in (int, float) and abs(value) < 1e30


def _is_measured(value: Any) -> bool:
    """Whether a value is a number, which for a held-out loss may be NaN or infinite."""
    return _is_number(value) or (type(value) is float and not math.isfinite(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


_STEP_FIELDS: Mapping[str, Check] = {
    "step": _is_count,
    "peak_memory_bytes": _is_count,
    **dict.fromkeys(
        ("loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds"),
        _is_number,
    ),
}
_EVALUATION_FIELDS: Mapping[str, Check] = {
    "step": _is_count,
    "eval_loss": _is_measured,
    "eval_perplexity": _is_measured,
}
_SAMPLE_FIELDS: Mapping[str, Check] = {
    "step": _is_count,
    "prompt": _is_string,
    "text": _is_string,
}


def _is_metrics_row(row: Row) -> bool:
    fields = _STEP_FIELDS if "loss" in row else _EVALUATION_FIELDS
    mfu, data = row.get("mfu", 0), row.get("eval_data", "")
    return _has_fields(row, fields) and _is_number(mfu) and _is_string(data)


def _is_sample(row: Row) -> bool:
    return _has_fields(row, _SAMPLE_FIELDS)


def _has_fields(row: Row, fields: Mapping[str, Check]) -> bool:
    return all(name in row and check(row[name]) for name, check in fields.items())


# --- Rows ---


def read_rows(path: Path, notes: list[str] | None = None) -> list[Row]:
    """Reads metrics.jsonl or samples.jsonl; returns the rows that a run writes.

    A last line that a kill cut off is left out without a note.

    Args:
      path: of the file; need not exist.
      notes: gets a sentence if other lines are left out, or the file cannot be read.
    """
    is_row = _is_sample if path.name == SAMPLES else _is_metrics_row
    rows, damaged, number = [], [], 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                # A kill may cut inside a UTF-8 character, hence `replace`.
                row = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                if line.endswith(b"\n"):
                    damaged.append(number)
                continue
            if isinstance(row, dict) and is_row(row):
                rows.append(row)
            else:
                damaged.append(number)
    except FileNotFoundError:
        return []
    except OSError as error:
        _add(notes, f"`{path.name}` cannot be read: {error.strerror}.")
    if damaged:
        _add(
            notes,
            f"{len(damaged):,} of the {number:,} lines of `{path.name}` are not what a "
            f"run writes, and are left out; the first is line {damaged[0]:,}.",
        )
    return rows


def _lines(path: Path) -> Iterator[bytes]:
    """Yields lines with their ends; one that is too long is shortened to nothing."""
    with open_file(path) as file:
        while line := file.readline(_MAX_LINE_BYTES):
            long = False
            while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                long, line = True, file.readline(_MAX_LINE_BYTES)
            yield b"too long\n" if long else line


def _add(notes: list[str] | None, note: str) -> None:
    if notes is not None:
        notes.append(note)


def read_metrics(directory: Path, notes: list[str] | None = None) -> list[Row]:
    """Returns the training steps in a run's metrics.jsonl."""
    return [row for row in read_rows(directory / METRICS, notes) if "loss" in row]


def read_evaluations(
    directory: Path, *, until: int | None = None, notes: list[str] | None = None
) -> list[Row]:
    """Returns the evaluations in a run's metrics.jsonl, up to step `until`."""
    rows = read_rows(directory / METRICS, notes)
    return [
        row
        for row in rows
        if "loss" not in row and (until is None or row["step"] <= until)
    ]


def read_samples(directory: Path, notes: list[str] | None = None) -> list[Row]:
    """Returns the generated samples in a run's samples.jsonl."""
    return read_rows(directory / SAMPLES, notes)


# --- Facts ---


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_data_report(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("dropped"), dict)):
        return False
    sources = value.get("sources") or ()
    return (
        isinstance(value.get("fingerprint"), str)
        and all(map(_is_count, value["dropped"].values()))
        and isinstance(sources, (list, tuple))
        and all(
            isinstance(source, dict)
            and _is_string(source.get("name"))
            and _is_number(source.get("share"))
            for source in sources
        )
    )


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


_FACTS: Mapping[str, Check] = {
    **dict.fromkeys(
        ("steps", "planned_steps", "trainable_parameters", "adapter_bytes"), _is_count
    ),
    "final_loss": _optional(_is_number),
    "stopped_early": _optional(_is_string),
    "groups": lambda value: (
        _is_table(value) and all(_is_count(v) or _is_string(v) for v in value.values())
    ),
    "optimizer_groups": lambda value: (
        isinstance(value, list) and all(map(_is_table, value))
    ),
    "data": _is_data_report,
    "held_out": _optional(_is_data_report),
    "plan": _is_table,
    "versions": _is_table,
}
"""The fields that a program relies on; others are only shown."""


def read_facts(path: Path, notes: list[str] | None = None) -> Row | None:
    """Reads started.json or report.json.

    Args:
      path: of the file.
      notes: gets a sentence if the file cannot be used, or fields are left out.

    Returns:
      The fields; None without a file that can be used.
    """
    if not path.exists():
        return None
    try:
        facts = read_json(path)
    except CheckpointError as error:
        _add(notes, str(error))
        return None
    damaged = [name for name, check in _FACTS.items() if name in facts]
    damaged = [name for name in damaged if not _FACTS[name](facts[name])]
    if damaged:
        names = ", ".join(f"`{name}`" for name in damaged)
        _add(notes, f"Not what a run writes in `{path.name}`, and left out: {names}.")
    return {name: value for name, value in facts.items() if name not in damaged}
