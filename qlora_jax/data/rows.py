"""Rows of a data file, and the text their fields give.

The one idea: a row travels with its place ("file.jsonl:12"), so that whatever is wrong
with it can be said together with where it is.
"""

import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError

Row = tuple[str, dict[str, Any]]
"""A row's place, for messages, and its fields."""


def fields_of(row: dict[str, Any]) -> str:
    """Names of a row's fields, quoted, for messages."""
    return ", ".join(f"`{name}`" for name in row) or "no fields"


def read_rows(path: Path, *, plain_text: bool) -> tuple[list[Row], bool]:
    """Reads JSONL, a JSON list of objects or, if asked, a plain text file.

    Args:
      path: the file, UTF-8. What it holds decides, not its name alone.
      plain_text: take a file that is not JSON as one row with the field `text`.

    Returns:
      The rows, and whether the file was plain text.

    Raises:
      UserError: no such file, not UTF-8, empty, malformed (with the line), or a row
        that is not an object.
    """
    try:
        content = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"`data.path`: there is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"`data.path`: cannot read {path}: {error}") from error
    if not content.strip():
        raise UserError(f"{path} is empty.")
    is_json = path.suffix in (".json", ".jsonl", ".ndjson")
    if plain_text and not is_json and not _first_line_is_object(content):
        return [(f"{path}", {"text": content})], True
    if content.lstrip().startswith("["):
        rows = _json_list(path, content)
    else:
        rows = _json_lines(path, content)
    if not rows:
        raise UserError(f"{path} has no rows.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a row must be a JSON object, got {type(row).__name__}."
            )
    return rows, False


def _first_line_is_object(content: str) -> bool:
    try:
        return isinstance(json.loads(content.strip().split("\n", 1)[0]), dict)
    except ValueError:
        return False


def _json_list(path: Path, content: str) -> list[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"{path}:{line}: malformed JSON list: {error}") from error
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _json_lines(path: Path, content: str) -> list[tuple[str, Any]]:
    rows = []
    # Not `splitlines`: JSON strings may hold U+2028 and other characters it splits at.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: malformed JSON: {error}. Expected one complete "
                "object on every line (JSONL), or a file that is one list of objects."
            ) from error
    return rows


def check_template(name: str, template: object) -> None:
    """Refuses a format string that cannot be filled from a row (UserError)."""
    if not isinstance(template, str):
        raise UserError(f"`data.{name}` must be text, got {template!r}.")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(
            f"`data.{name}` = {template!r} is not a format string: {error}. Write "
            "a literal brace twice: {{ or }}."
        ) from error
    names = [field for field in fields if field is not None]
    if not names and name != "prompt":  # one prompt for all rows is fine
        raise UserError(
            f"`data.{name}` = {template!r} names no field of a row; write e.g. "
            '"{question}".'
        )
    if any(not n or n[0].isdigit() or "." in n for n in names):
        raise UserError(
            f"`data.{name}` = {template!r} must name a row's fields in its braces, "
            'e.g. "{question}" or "{turns[0]}"; positions and attributes have no '
            "meaning here."
        )


class Fields(Mapping):
    """A row for `str.format_map`, refusing what would be printed as rubbish."""

    def __init__(self, row: dict[str, Any], where: str):
        self._row, self._where = row, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._row:
            raise UserError(
                f"{self._where}: no field `{name}`; the row has {fields_of(self._row)}."
            )
        if self._row[name] is None:
            raise UserError(f"{self._where}: field `{name}` is null.")
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def text_of(
    row: dict[str, Any], where: str, name: str, template: str | None = None
) -> str:
    """Returns the text field `name`, or the row filled into a format string.

    Raises:
      UserError: a field is missing (with those present), null, or not text.
    """
    fields = Fields(row, where)
    if template is not None:
        for _, field, _, _ in string.Formatter().parse(template):
            value = fields[field] if field and "[" not in field else None
            if isinstance(value, dict | list):
                raise UserError(
                    f"{where}: field `{field}` of `data.{name}` must be text or a "
                    f"number, got {type(value).__name__}."
                )
        try:
            return template.format_map(fields)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: cannot fill `data.{name}` = {template!r}: {error!r}"
            ) from error
    value = fields[name]
    if not isinstance(value, str):
        hint = " Use format='messages' for turns." if isinstance(value, list) else ""
        raise UserError(
            f"{where}: field `{name}` must be text, got {type(value).__name__}.{hint}"
        )
    return value
