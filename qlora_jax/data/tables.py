"""Reads CSV and TSV files by field: each row is an object named by the header."""

import contextlib
import csv
import io
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.rows import Row, RowFile, decompressed, name_suffix, reading_file
from qlora_jax.errors import UserError
from qlora_jax.reading import open_file

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Suffixes of the files that `open_table` reads -> what stands between fields."""
_OTHER_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# A field may hold a whole document; the limit of the `csv` module is 128 KiB.
_LONGEST_FIELD = 2**31 - 1


def open_table(path: Path) -> RowFile:
    """Opens a CSV or TSV file (also .gz) for one pass with one row in memory.

    Quotes, escaped quotes and line breaks inside them are read as the `csv` module
    reads them. All values are strings. A row with more or fewer fields than the header
    is yielded as a `UserError`.

    Raises:
      UserError: the file cannot be read, has no header or no rows, or its quotes are
        not closed; raised by the rows too if that is found there.
    """
    delimiter = DELIMITERS[name_suffix(path)]
    csv.field_size_limit(_LONGEST_FIELD)
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading_file(path))
        raw = stack.enter_context(open_file(path))
        size = max(os.fstat(raw.fileno()).st_size, 1)
        # Line breaks inside quotes are kept as they are.
        lines = stack.enter_context(
            io.TextIOWrapper(decompressed(path, raw), "utf-8-sig", newline="")
        )
        records = _records(path, csv.reader(lines, delimiter=delimiter, strict=True))
        header = _read_header(path, records, delimiter)
        stack.pop_all()  # the row iterator closes the file

    def rows() -> Generator[Row, None, None]:
        count = 0
        with contextlib.closing(raw), lines, reading_file(path):
            for line, values in records:
                count += 1
                yield f"{path}:{line}", _named(values, header, f"{path}:{line}")
        if not count:
            raise UserError(f"{path} has a header and no rows.")

    kind = name_suffix(path)[1:].upper()
    return RowFile(
        rows(), False, lambda: 1.0 if raw.closed else raw.tell() / size, lambda: kind
    )


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the first line and the fields of each record, no blank one.

    Raises:
      UserError: quotes that are not closed, or have text after them. Reading cannot go
        on there, because where the next row begins is not known.
    """
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: malformed {name_suffix(path)[1:].upper()}: {error}. A "
                'field with quotes is written in quotes, and each of its own is "" '
                "(doubled)."
            ) from error
        if values is None:
            return
        if values:
            yield line, values


def _read_header(
    path: Path, records: Iterator[tuple[int, list[str]]], delimiter: str
) -> list[str]:
    line, header = next(records, (0, []))
    if not header:
        raise UserError(f"{path} is empty.")
    others = [
        name
        for character, name in _OTHER_DELIMITERS.items()
        if character != delimiter and character in header[0]
    ]
    if len(header) == 1 and others:
        raise UserError(
            f"{path}:{line}: the header has one field, {header[0]!r}, and seems to be "
            f"separated by {others[0]}; a {name_suffix(path)} file is separated by "
            f"{_OTHER_DELIMITERS[delimiter]}. Save it so, or rename it."
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}:{line}: the header names {', '.join(map(repr, twice))} several "
            "times. The first line must name the fields of the rows, each once."
        )
    return header


def _named(
    values: list[str], header: list[str], where: str
) -> dict[str, str] | UserError:
    if len(values) == len(header):
        return dict(zip(header, values, strict=True))
    return UserError(
        f"{where}: {len(values)} fields, and the header names {len(header)} "
        f"({', '.join(header)}). A field with the delimiter or a line break in it is "
        "written in quotes."
    )
