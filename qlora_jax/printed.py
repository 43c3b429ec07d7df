"""A report as two columns for people; `--json` has every digit for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def print_report(report: Mapping[str, Any]) -> None:
    """Prints a report in two columns; nested entries are indented."""
    lines = list(_lines(report))
    width = max(len(key) for key, _ in lines)
    for key, text in lines:
        print(f"{key:<{width}}  {text}".rstrip())


def _lines(report: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}", ""
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{key}", said(value)


def said(value: Any) -> str:
    """A value in words: no name of Python's, and no digits beyond the sixth.

    What is not there is a dash, an empty list "none".
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(one)}" for key, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(said, value)) or "none"
    return str(value)
