"""Rows of a data file, and the text their fields give.

The one idea: a row travels with its place ("file.jsonl:12"), so that whatever is wrong
with it can be said together with where it is.
"""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import os
import string
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.errors import Problems, UserError, did_you_mean

Row = tuple[str, dict[str, Any]]
"""A row's place, for messages, and its fields."""


def fields_of(row: dict[str, Any]) -> str:
    """Names of a row's fields, quoted, for messages."""
    return ", ".join(f"`{name}`" for name in row) or "no fields"


@dataclasses.dataclass(frozen=True)
class RowFile:
    """One file (or data set) opened for reading, row after row.

    Attributes:
      rows: the rows with their places, to be taken once.
      plain: the file is plain text, one document.
      done: how much of it has been read, 0 to 1.
    """

    rows: Iterator[Row]
    plain: bool
    done: Callable[[], float]


def read_rows(path: Path, *, plain_text: bool) -> tuple[list[Row], bool]:
    """Reads JSONL, a JSON list of objects or, if asked, a plain text file.

    Args:
      path: the file, UTF-8. What it holds decides, not its name alone.
      plain_text: take a file that is not JSON as one row with the field `text`.

    Returns:
      The rows, and whether the file was plain text.

    Raises:
      UserError: no such file, not UTF-8, empty, malformed (with the lines), or a row
        that is not an object.
    """
    problems = Problems("the data")
    file = open_rows(path, plain_text=plain_text, problems=problems)
    rows = list(file.rows)
    problems.raise_if_any()
    return rows, file.plain


def open_rows(path: Path, *, plain_text: bool, problems: Problems) -> RowFile:
    """Opens what `read_rows` reads, for one pass with one line in memory.

    A JSON list and a plain text are read whole: they are one value. A name ending in
    .gz is decompressed on the way.

    Args:
      path: the file.
      plain_text: as `read_rows` has it.
      problems: where malformed lines go; the lines after them are read all the same.

    Raises:
      UserError: no such file, not UTF-8, or empty; from the rows also a file that
        cannot be read to its end.
    """
    head: list[str] = []  # up to the first line that is not blank
    with contextlib.ExitStack() as stack:
        stack.enter_context(_reading(path))
        raw = stack.enter_context(open(path, "rb"))
        size = max(os.fstat(raw.fileno()).st_size, 1)
        binary: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        # Lines end as in any text file (\n, \r\n, \r), and not at U+2028, which JSON
        # strings may hold.
        lines = stack.enter_context(io.TextIOWrapper(binary, encoding="utf-8-sig"))
        for line in lines:
            head.append(line)
            if line.strip():
                break
        else:
            raise UserError(f"{path} is empty.")
        stack.pop_all()  # the rows close it
    first = head[-1]
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    is_json = suffix in (".json", ".jsonl", ".ndjson")
    plain = plain_text and not is_json and not _is_object(first)

    def rows() -> Iterator[Row]:
        with contextlib.closing(raw), lines:
            if plain:
                with _reading(path):
                    text = "".join(head) + lines.read()
                yield f"{path}", {"text": text}
                return
            if first.lstrip().startswith("["):
                with _reading(path):
                    content = "".join(head) + lines.read()
                found = _json_list(path, content)
                if not found:
                    raise UserError(f"{path} has no rows.")
            else:
                found = _json_lines(path, len(head), first, lines, problems)
            for where, row in found:
                if isinstance(row, dict):
                    yield where, row
                else:
                    problems.add(
                        f"{where}: a row must be a JSON object, got "
                        f"{type(row).__name__}."
                    )

    # Not `tell` of the text, which is slow: the file's own position is near enough.
    return RowFile(rows(), plain, lambda: 1.0 if raw.closed else raw.tell() / size)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what can go wrong with a file into a UserError that says what."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"`data.path`: there is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({_bad_byte(path)}). Convert it to UTF-8."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged or no gzip file: {error}. Compress it anew."
        ) from error
    except OSError as error:
        raise UserError(f"`data.path`: cannot read {path}: {error}") from error


def _bad_byte(path: Path) -> str:
    """Where a file stops being UTF-8; a decoder of a stream knows its own part only."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with open(path, "rb") as raw:
        binary: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        while True:
            piece = binary.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return f"byte {start - pending + error.start}"
            if not piece:
                return "at its end"
            start += len(piece)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line.strip()), dict)
    except ValueError:
        return False


def _json_list(path: Path, content: str) -> list[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"{path}:{line}: malformed JSON list: {error}") from error
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _json_lines(
    path: Path, number: int, first: str, lines: Iterator[str], problems: Problems
) -> Iterator[tuple[str, Any]]:
    """Yields places and values of `first`, which is line `number`, and what follows."""
    line: str | None = first
    while line is not None:
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                problems.add(
                    f"{path}:{number}: malformed JSON: {error}. Expected one complete "
                    "object on every line (JSONL), or a file that is one list of "
                    "objects."
                )
            else:
                yield f"{path}:{number}", row
        with _reading(path):
            line = next(lines, None)
        number += 1


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
                f"{did_you_mean(name, self._row)}"
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
