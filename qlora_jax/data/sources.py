"""Opens every kind of data source as one stream of rows.

JSON, CSV and text files, file patterns, Parquet, Arrow, and data sets of the `datasets`
library are all read once from start to end and yield plain Python dicts with their
location, so that no later stage depends on the kind of source.

`pyarrow` (Parquet, Arrow) and `datasets` (saved data sets and those of the hub) are
imported only when such a source is opened.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import re
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.file_patterns import matching_files
from qlora_jax.data.rows import Row, RowFile, name_suffix, open_rows, parse_json
from qlora_jax.data.tables import DELIMITERS, open_table
from qlora_jax.errors import Problems, UserError
from qlora_jax.reading import open_file as open_regular

HUB = "hf:"
# Rows converted from columns at a time.
_TABLE_ROWS = 512
# Rows in a chunk, and their characters: enough to keep a fast tokenizer's threads
# busy, and little memory next to the tokenizer's output (about 100 bytes a token).
_CHUNK_ROWS, _CHUNK_CHARACTERS = 512, 1 << 18
# Suffixes of files of columns, and their names.
_COLUMNS = {".parquet": "Parquet", ".arrow": "Arrow"}
# Files that `save_to_disk` of a DatasetDict or a Dataset always writes.
_SAVED_MARKERS = ("dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True)
class RowSource:
    """A file, a directory of `datasets`, or a data set of the hub, not yet opened.

    Attributes:
      name: the path, or "hf:owner/name".
      size: bytes where they are known, else 1; weight in the progress bar.
      open: opens it.
      content_hash: hashes everything it holds.
    """

    name: str
    size: int
    open: Callable[[], RowFile]
    content_hash: Callable[[], str]

    @property
    def on_hub(self) -> bool:
        """Whether it is a data set of the hub, whose size is unknown."""
        return self.name.startswith(HUB)


def list_sources(
    path: str | tuple[str, ...], *, split: str | None, plain_text: bool
) -> list[RowSource]:
    """Resolves a path, a pattern, a hub name or a tuple of them.

    Args:
      path: `data.path`.
      split: split to read from data sets that have splits.
      plain_text: read a text file that is not JSON as one document.

    Returns:
      The sources in the order of `path`; matches of a pattern sorted by name.

    Raises:
      UserError: lists every path that cannot be read.
    """
    problems = Problems("the data")
    sources: list[RowSource] = []
    has_splits = False
    for entry in (path,) if isinstance(path, str) else path:
        if entry.startswith(HUB):
            sources.append(_hub_source(entry, split))
            has_splits = True
            continue
        names = [entry]
        if glob.has_magic(entry) and not os.path.lexists(entry):
            names = []
            with problems.collecting():
                names = matching_files(entry)
                if not names:
                    problems.add(f"`data.path`: no file matches the pattern {entry!r}.")
        for name in names:
            with problems.collecting():
                if _is_saved(Path(name)):
                    sources.append(_saved_source(Path(name), split))
                    has_splits = True
                else:
                    sources.append(_file_source(Path(name), plain_text))
    problems.raise_if_any()
    if split is not None and not has_splits:
        raise UserError(
            f"`data.split` = {split!r} is for data sets that have splits (a directory "
            f"that `datasets` saved, or {HUB}owner/name), and there is none in "
            f"`data.path` = {path!r}. Leave it out."
        )
    return sources


def read_chunks(
    sources: Iterable[RowSource],
    problems: Problems,
    on_read: Callable[[int, RowFile], None],
) -> Generator[tuple[list[Row], RowFile], None, None]:
    """Yields rows in chunks, each with the file that they are read from.

    Args:
      sources: read one after the other.
      problems: collects what is wrong with a source; reading continues with the next
        one.
      on_read: called after each chunk with the source's index and its open file.
    """
    for index, source in enumerate(sources):
        with problems.collecting():
            file = source.open()
            # Closed here where reading ends early, not when it is collected.
            with contextlib.closing(file.rows) as rows:
                while chunk := _take_chunk(rows):
                    yield chunk, file
                    on_read(index, file)


def _take_chunk(rows: Iterator[Row]) -> list[Row]:
    chunk: list[Row] = []
    size = 0
    for where, row in rows:
        chunk.append((where, row))
        size += 0 if isinstance(row, UserError) else _count_characters(row)
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_CHARACTERS:
            break
    return chunk


def _count_characters(row: dict[str, Any]) -> int:
    """Estimates how much text a row holds."""
    total, pending = 0, [*row.values()]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list) and value and isinstance(value[0], int):
            total += len(value)
        elif isinstance(value, list):
            pending += value
    return total


@contextlib.contextmanager
def progress_bar(
    sources: list[RowSource], *, enabled: bool
) -> Iterator[Callable[[int, RowFile], None]]:
    """Draws reading progress on stderr; yields the `on_read` of `read_chunks`."""
    if not enabled:
        yield lambda index, file: None
        return
    from rich.console import Console
    from rich.progress import Progress

    sizes = [source.size for source in sources]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=max(sum(sizes), 1))

        def update(index: int, file: RowFile) -> None:
            done = sum(sizes[:index]) + sizes[index] * file.done()
            bar.update(task, completed=done)

        yield update


# --- Files ---


def _is_saved(path: Path) -> bool:
    """Whether a directory is one that `datasets` saved."""
    with contextlib.suppress(OSError):  # a name that is too long, or no permission
        return any((path / file).is_file() for file in _SAVED_MARKERS)
    return False


def _file_source(path: Path, plain_text: bool) -> RowSource:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w-]+", str(path)):
            hint = f" (A data set of the Hugging Face hub is written '{HUB}{path}'.)"
        raise UserError(f"`data.path`: there is no file {path}.{hint}") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"`data.path`: cannot read {path}: {reason}") from error
    except ValueError:
        raise UserError(
            f"`data.path`: there is a NUL in the name {str(path)!r}."
        ) from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise UserError(
            f"`data.path`: {path} is a pipe or a device, and data are read more than "
            "once. Write them to a file."
        )
    if path.is_dir():
        raise UserError(
            f"`data.path`: {path} is a directory that `datasets` did not save. Give "
            f"its files, e.g. '{path}/*.jsonl'."
        )

    def open_file() -> RowFile:
        if path.suffix.lower() in _COLUMNS:
            return _open_columns(path)
        if name_suffix(path) in DELIMITERS:
            return open_table(path)
        return open_rows(path, plain_text=plain_text)

    return RowSource(
        str(path), status.st_size, open_file, lambda: _hash_files(path, [path])
    )


def _open_columns(path: Path) -> RowFile:
    """Opens a Parquet or Arrow file."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading {path.suffix} files needs pyarrow, which is not "
            "installed: pip install pyarrow."
        ) from error
    errors = (pyarrow.ArrowException, OSError, ValueError)
    is_parquet = path.suffix.lower() == ".parquet"

    def batches() -> Iterator[Any]:
        if is_parquet:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=_TABLE_ROWS)
            return
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:  # the streaming format, as `datasets` writes
                source.seek(0)
                file = pyarrow.ipc.open_stream(source)
                yield from file
                return
            for number in range(file.num_record_batches):
                yield file.get_batch(number)

    def tables() -> Iterator[Any]:
        try:
            for batch in batches():
                for start in range(0, batch.num_rows, _TABLE_ROWS):
                    yield batch.slice(start, _TABLE_ROWS)
        except errors as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    total = 1
    if is_parquet:
        try:
            total = max(pyarrow.parquet.read_metadata(path).num_rows, 1)
        except errors as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    return _table_rows(str(path), tables(), total, _COLUMNS[path.suffix.lower()])


def _hash_files(name: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for path in paths:
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"`data.path`: cannot read {name}: {error}") from error
    return digest.hexdigest()


# --- The `datasets` library ---


def _saved_source(path: Path, split: str | None) -> RowSource:
    """A directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

    def load() -> Any:
        datasets = _import_datasets(str(path))
        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # of `datasets`, pyarrow or the operating system
            raise UserError(f"{path}: `datasets` cannot load it: {error}") from error
        if isinstance(dataset, dict):
            return dataset[_choose_split(str(path), list(dataset), split)]
        if split is not None:
            raise UserError(
                f"{path} has no splits; leave out `data.split` = {split!r}."
            )
        return dataset

    files = sorted(file for file in path.rglob("*") if file.is_file())
    return RowSource(
        name=str(path),
        size=sum(file.stat().st_size for file in files),
        open=lambda: _open_dataset(str(path), load()),
        content_hash=lambda: f"{split}:{_hash_files(path, files)}",
    )


def _hub_source(entry: str, split: str | None) -> RowSource:
    """`hf:owner/name` or `hf:owner/name/configuration`, optionally `@revision`."""
    name, _, revision = entry.removeprefix(HUB).partition("@")
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(
            f"`data.path` = {entry!r}: a data set of the hub is written "
            f"'{HUB}owner/name' or '{HUB}owner/name/configuration', optionally with "
            "'@revision' at the end."
        )
    repository, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    loaded: list[Any] = []

    def load() -> Any:
        if loaded:
            return loaded[0]
        datasets = _import_datasets(entry)
        options = dict(name=config, revision=revision or None)
        try:
            dataset = datasets.load_dataset(repository, split=split, **options)
        except Exception as error:  # the network, the hub, its files, the split
            raise UserError(
                f"{entry}: `datasets` cannot load it: {error} Without a network, give "
                "files, or a directory that `save_to_disk` wrote."
            ) from error
        if isinstance(dataset, dict):
            dataset = dataset[_choose_split(entry, list(dataset), None)]
        loaded.append(dataset)
        return dataset

    return RowSource(
        name=entry,
        size=1,
        open=lambda: _open_dataset(entry, load()),
        # The hash by which `datasets` itself names the cache of this data set.
        content_hash=lambda: f"{entry}:{split}:{load()._fingerprint}",
    )


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: reading it needs the library `datasets`, which is not installed: "
            "pip install datasets."
        ) from error
    return datasets


def _choose_split(name: str, known: list[str], split: str | None) -> str:
    """Returns the configured split, else `train`, else the only one."""
    if split is None:
        split = "train" if "train" in known or len(known) != 1 else known[0]
    if split not in known:
        raise UserError(
            f"{name} has no split {split!r}; `data.split` must be one of "
            f"{', '.join(map(repr, known))}."
        )
    return split


def _open_dataset(name: str, dataset: Any) -> RowFile:
    # As Arrow tables, so that unused columns (images, audio) are never decoded.
    tables = dataset.with_format("arrow").iter(batch_size=_TABLE_ROWS)
    return _table_rows(name, tables, max(len(dataset), 1), "a data set of `datasets`")


# --- Arrow tables ---


def _table_rows(name: str, tables: Iterable[Any], total: int, kind: str) -> RowFile:
    """Numbers the rows of Arrow tables from 1."""
    count = 0

    def rows() -> Generator[Row, None, None]:
        nonlocal count
        for table in tables:
            for row in _python_rows(name, table):
                count += 1
                yield f"{name} row {count}", row
        if not count:
            raise UserError(f"{name} has no rows.")

    return RowFile(rows(), False, lambda: min(count / total, 1.0), lambda: kind)


def _python_rows(name: str, table: Any) -> Iterator[dict[str, Any]]:
    """Converts an Arrow table or record batch; maps become objects.

    Raises:
      UserError: a column cannot be converted, or two have the same name.
    """
    import pyarrow

    names = table.schema.names
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise UserError(
            f"{name} has several columns of the name {', '.join(map(repr, twice))}; a "
            "row has one value of each name. Rename or remove one of them."
        )
    columns = []
    for field in table.schema:
        decode = _json_decoder(field.type)
        try:
            values = table.column(field.name).to_pylist(maps_as_pydicts="strict")
            values = map(_drop_nulls, values)
            columns.append(list(map(decode, values) if decode else values))
        except (pyarrow.ArrowException, ValueError, LookupError) as error:
            raise UserError(
                f"{name}: the column {field.name!r} ({field.type}) cannot be read: "
                f"{str(error).rstrip('.')}. Convert the column, or leave it out."
            ) from error
    for row in zip(*columns, strict=True):
        yield dict(zip(names, row, strict=True))


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Returns what decodes the JSON in a column, as of `datasets.Json`; None without.

    Args:
      kind: the Arrow type of the column.
    """
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else parse_json(value)
    if types.is_struct(kind):
        decoders = {f.name: d for f in kind if (d := _json_decoder(f.type))}
        if decoders:
            return lambda value: (
                value and {k: decoders.get(k, _same)(v) for k, v in value.items()}
            )
    elif types.is_list(kind) or types.is_large_list(kind):
        decode = _json_decoder(kind.value_type)
        if decode is not None:
            return lambda value: value and list(map(decode, value))
    return None


def _same(value: Any) -> Any:
    return value


def _drop_nulls(value: Any) -> Any:
    """Removes keys that a nested object has only because another row has them.

    Every object of an Arrow column has the union of all keys, null where one is
    missing; chat templates test whether a turn has a key, not whether it is null.
    """
    if isinstance(value, dict):
        return {k: _drop_nulls(v) for k, v in value.items() if v is not None}
    items = value if isinstance(value, list) else ()
    first = next((item for item in items if item is not None), None)
    if isinstance(first, dict | list):
        return [_drop_nulls(item) for item in value]
    return value
