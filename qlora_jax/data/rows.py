"""Reads the rows of JSON and text files, and text from their fields.

Every row travels with its location ("file.jsonl:12"), so that each message about it
says where to look.
"""

import codecs
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import string
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.errors import Problems, UserError, did_you_mean
from qlora_jax.reading import open_file

# Of a row, in a message.
_FIELDS_SHOWN = 30
_MAX_DEPTH = 100
"""Levels of a JSON row."""

Row = tuple[str, dict[str, Any] | UserError]
"""The location of a row, for messages, and its fields or why it cannot be read."""


_JSON = (".json", ".jsonl", ".ndjson")
# What is trained on as one document, if the format is `text`.
_DOCUMENTS = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", "")
# First bytes of files that are not text -> what to do.
_UNPACK = "unpack it, or compress it by gzip, with a name that ends in .gz"
_MAGIC = {
    b"\x1f\x8b": "It is compressed by gzip: let its name end in .gz.",
    b"PK\x03\x04": "It is a zip archive: unpack it.",
    b"\x28\xb5\x2f\xfd": f"It is compressed by zstd: {_UNPACK}.",
    b"\xfd7zX": f"It is compressed by xz: {_UNPACK}.",
    b"BZh": f"It is compressed by bzip2: {_UNPACK}.",
    b"PAR1": "It is a Parquet file: let its name end in .parquet.",
}


# Names of files that are compressed, or archives, and not read.
_COMPRESSED = (".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".7z", ".rar", ".tar")


@dataclasses.dataclass
class Reading:
    """What was read of a row, and what was recognised in it, for the report.

    Attributes:
      fields: names of the fields that were read.
      recognised: phrases.
      nested: keys inside of fields that nothing reads, as "field[].key".
      turn_keys: fields and keys of their turns that a chat template may read.
    """

    fields: set[str] = dataclasses.field(default_factory=set)
    recognised: set[str] = dataclasses.field(default_factory=set)
    nested: set[str] = dataclasses.field(default_factory=set)
    turn_keys: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def recognise(self, phrase: str, *fields: str) -> None:
        """Notes a phrase and the fields that were read for it."""
        self.recognised.add(phrase)
        self.fields.update(fields)


class UnusableJsonError(ValueError):
    """Valid JSON that has a key twice in an object, or is nested too deeply."""


def parse_json(text: str) -> Any:
    """Decodes JSON.

    What is nested too deeply for templates and messages is an error, and a key that
    stands twice in an object, because one of its values would be lost.

    Raises:
      ValueError: it is malformed.
      UnusableJsonError: it is valid, and one of these errors.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        # Only where brackets could be that deep is the value walked.
        if text.count("[") + text.count("{") > _MAX_DEPTH:
            _check_depth(value)
    except RecursionError:
        raise UnusableJsonError("it is nested too deeply") from None
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnusableJsonError(f"the key {twice!r} stands twice in one object")
    return value


def to_json(value: Any, what: str) -> str:
    """Returns a value as JSON.

    Args:
      value: from a row.
      what: names it, for messages.

    Raises:
      UserError: it holds what JSON does not have (NaN, a date, bytes, ...).
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what} cannot be written as JSON: {error}. Use strings, finite "
            "numbers, true, false and null alone."
        ) from error


def fields_of(row: dict[str, Any]) -> str:
    """Quotes the names of a row's fields, for messages."""
    listed = [f"`{name:.100}`" for name in itertools.islice(row, _FIELDS_SHOWN)]
    more = len(row) - len(listed)
    return ", ".join(listed) + (f" and {more:,} more" if more else "") or "no fields"


@dataclasses.dataclass(frozen=True)
class RowFile:
    """An open file or data set.

    Attributes:
      rows: iterates over the rows once.
      plain: whether the file is plain text, one document.
      done: returns the fraction that has been read, 0 to 1.
      kind: returns what the rows so far were read as, for the report.
    """

    rows: Generator[Row, None, None]
    plain: bool
    done: Callable[[], float]
    kind: Callable[[], str]


def read_rows(
    path: Path, *, plain_text: bool
) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
    """Reads JSONL, a JSON list of objects or, optionally, a plain text file.

    Args:
      path: a UTF-8 file. Its content decides the format, not its name alone.
      plain_text: read a file that is not JSON as one row with the field `text`.

    Returns:
      The rows, and whether the file was plain text.

    Raises:
      UserError: the file is missing, empty, not UTF-8, or malformed (lists the lines),
        or a row is not an object.
    """
    problems = Problems("the data")
    file = open_rows(path, plain_text=plain_text)
    rows = []
    for where, row in file.rows:
        if isinstance(row, UserError):
            problems.add(row)
        else:
            rows.append((where, row))
    problems.raise_if_any()
    return rows, file.plain


def open_rows(path: Path, *, plain_text: bool) -> RowFile:
    """Opens a file as `read_rows` does, for one pass with one line in memory.

    A JSON list and a plain text file are single values and are read completely. A name
    that ends in .gz is decompressed while reading. A file of another kind, whose markup
    or bytes would be trained on by accident, is refused.

    Args:
      path: the file.
      plain_text: as for `read_rows`.

    Raises:
      UserError: the file is missing, empty or not UTF-8; raised by the rows too if it
        cannot be read to its end.
    """
    suffix = name_suffix(path)
    is_named = suffix in (*_JSON, *_DOCUMENTS)
    head: list[str] = []  # up to the first line that is not blank
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading_file(path))
        raw = stack.enter_context(open_file(path))
        size = max(os.fstat(raw.fileno()).st_size, 1)
        # Universal newlines (\n, \r\n, \r): not U+2028, which JSON strings may hold.
        lines = stack.enter_context(
            # -sig: skips the byte order mark that programs of Windows write.
            io.TextIOWrapper(decompressed(path, raw), encoding="utf-8-sig")
        )
        try:
            for line in lines:
                head.append(line)
                if line.strip():
                    break
            else:
                raise UserError(f"{path} is empty.")
        except UnicodeDecodeError:
            if is_named:
                raise
        is_json = suffix in _JSON or bool(head and _is_object(head[-1]))
        if not is_json and suffix not in _DOCUMENTS:
            raise UserError(_unknown_kind(path))
        plain = not is_json
        if plain and not plain_text and not head[-1].lstrip().startswith("["):
            raise UserError(
                f"{path} is plain text, which format='text' reads as one document; "
                "this format reads rows with fields (JSONL, CSV, Parquet, ...)."
            )
        plain = plain and plain_text
        stack.pop_all()  # the row iterator closes the file

    def rows() -> Generator[Row, None, None]:
        with contextlib.closing(raw), lines:
            if plain:
                with reading_file(path):
                    text = "".join(head) + lines.read()
                found = lines.newlines or ()
                newlines.update((found,) if isinstance(found, str) else found)
                if _is_json(text):
                    raise UserError(
                        f"{path} holds JSON over several lines; its name, for a text "
                        "document, would have it trained on as it is. Rename it to "
                        ".json for a list of objects, or write one object a line."
                    )
                yield f"{path}", {"text": text}
                return
            if head[-1].lstrip().startswith("["):
                values = _json_list(path, head, lines)
            else:
                values = _json_lines(path, head, lines)
            for where, row in values:
                if not isinstance(row, dict | UserError):
                    row = UserError(
                        f"{where}: a row must be a JSON object, got "
                        f"{type(row).__name__}."
                    )
                yield where, row

    newlines: set[str] = set()

    def kind() -> str:
        if plain:
            changed = newlines - {"\n"}
            return "plain text, one document a file" + (
                ", its line breaks (CR LF or CR) as LF" if changed else ""
            )
        return "a list in JSON" if head[-1].lstrip().startswith("[") else "JSON lines"

    # `tell` of a text stream is slow; the position in the raw file is close enough.
    return RowFile(
        rows(), plain, lambda: 1.0 if raw.closed else raw.tell() / size, kind
    )


def name_suffix(path: Path) -> str:
    """Returns the suffix of a file in lower case, without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next(
        iter(suffixes[-1:] if suffixes[-1:] != [".gz"] else suffixes[-2:-1]), ""
    )


def _unknown_kind(path: Path) -> str:
    inner, last = name_suffix(path), path.suffix.lower()
    remedy = (
        "Convert it, or, if its text as it is shall be trained on, write it into a "
        ".txt file."
    )
    if last in _COMPRESSED:
        remedy = f"It is compressed: {_UNPACK}."
    elif inner != last:
        remedy = "It is compressed: unpack it."
    return (
        f"{path}: {last if inner == last else inner + last} files are not read. Rows "
        f"are read from {', '.join(_JSON)}, .csv, .tsv (also with .gz), .parquet, "
        ".arrow, a directory that `datasets` saved, or 'hf:owner/name'; with "
        f"format='text' {', '.join(filter(None, _DOCUMENTS))} are documents. {remedy}"
    )


def decompressed(path: Path, raw: Any) -> Any:
    """Returns a binary file that reads the content of one that may be compressed."""
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


@contextlib.contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Raises what can go wrong with a file as a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"`data.path`: there is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({_bad_byte(path)}). {_remedy(path)}"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged or not a gzip file: {error}. Compress it again."
        ) from error
    except OSError as error:
        raise UserError(f"`data.path`: cannot read {path}: {error}") from error


def _remedy(path: Path) -> str:
    """Says what to do with a file that is not text, by its first bytes."""
    with open_file(path) as file:
        first = file.read(4)
    for magic, remedy in _MAGIC.items():
        if first.startswith(magic) and path.suffix.lower() != ".gz":
            return remedy
    return "Convert it to UTF-8."


def _bad_byte(path: Path) -> str:
    """Locates the first byte that is not UTF-8.

    The error of a stream counts from the start of its buffer, not of the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with open_file(path) as raw:
        binary = decompressed(path, raw)
        while True:
            piece = binary.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                # The decoder keeps `pending` bytes of a character that the pieces
                # before did not end, and counts from the first of them.
                return f"byte {start - pending + error.start}"
            if not piece:
                return "at its end"
            start += len(piece)


def _is_json(text: str) -> bool:
    """Returns whether a whole document is a JSON list or object."""
    if text.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line.strip()), dict)
    except (ValueError, RecursionError):
        return False


def _json_list(
    path: Path, head: list[str], lines: io.TextIOWrapper
) -> list[tuple[str, Any]]:
    with reading_file(path):
        content = "".join(head) + lines.read()
    try:
        rows = parse_json(content)
    except ValueError as error:
        malformed = isinstance(error, json.JSONDecodeError)
        where = f"{path}:{error.lineno}" if malformed else f"{path}"
        raise UserError(f"{where}: malformed JSON list: {error}") from error
    if not rows:
        raise UserError(f"{path} has no rows.")
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _json_lines(
    path: Path, head: list[str], lines: io.TextIOWrapper
) -> Iterator[tuple[str, Any]]:
    """Yields locations and values of the last line of `head` and of all later lines.

    The value of a malformed line is a `UserError`.
    """
    number = len(head)
    line: str | None = head[-1]
    while line is not None:
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                row = UserError(
                    f"{path}:{number}: malformed JSON: {error}. Expected one complete "
                    "object on every line (JSONL), or a file that is one list of "
                    "objects."
                )
            yield f"{path}:{number}", row
        with reading_file(path):
            line = next(lines, None)
        number += 1


class _Formatter(string.Formatter):
    """Fills format strings with strings and finite numbers alone."""

    def __init__(self, where: str, name: str):
        self._where, self._name = where, name

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """Returns the value of a field and its name; only of text and numbers."""
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise UserError(f"{self._where}: field `{field_name}` is null.")
        finite = not isinstance(value, float) or math.isfinite(value)
        if isinstance(value, dict | list | bytes) or not finite:
            kind = type(value).__name__ if finite else repr(value)
            raise UserError(
                f"{self._where}: field `{field_name}` of `data.{self._name}` must be a "
                f"string or a finite number, got {kind}."
            )
        return value, first


class Fields(Mapping):
    """A row for `str.format_map` that raises for missing and null fields.

    Args:
      row: the fields.
      where: location of the row, for messages.
      read: gets the names of the fields that are read.
    """

    def __init__(self, row: dict[str, Any], where: str, read: set[str] | None = None):
        self._row, self._where = row, where
        self._read = set() if read is None else read

    def __getitem__(self, name: str) -> Any:
        if name not in self._row:
            raise UserError(
                f"{self._where}: no field `{name}`; the row has {fields_of(self._row)}."
                f"{did_you_mean(name, self._row)}"
            )
        if self._row[name] is None:
            raise UserError(f"{self._where}: field `{name}` is null.")
        self._read.add(name)
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def text_of(
    row: dict[str, Any],
    where: str,
    name: str,
    template: str | None = None,
    reading: Reading | None = None,
) -> str:
    """Returns the text field `name`, or a format string filled from the row.

    Args:
      row: the fields.
      where: location of the row, for messages.
      name: of the field, and of the setting that the format string is.
      template: the format string.
      reading: gets the names of the fields.

    Raises:
      UserError: a field is missing (lists those present), null, or not a string.
    """
    fields = Fields(row, where, None if reading is None else reading.fields)
    if template is not None:
        try:
            return _Formatter(where, name).vformat(template, (), fields)
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
            f"{where}: field `{name}` must be a string, got {type(value).__name__}."
            f"{hint}"
        )
    return value
