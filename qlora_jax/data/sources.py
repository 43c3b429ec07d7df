"""Where rows come from: files of several kinds, patterns, data sets of `datasets`.

The one idea: whatever holds the rows, it is read once from start to end and gives plain
Python values with their places, so that nothing after it knows the difference.

Parquet and Arrow are read by `pyarrow`, saved data sets and those of the hub by
`datasets`; both are imported when such a source is opened and not before.
"""

import dataclasses
import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.rows import Row, RowFile, open_rows
from qlora_jax.errors import Problems, UserError

HUB = "hf:"
# Rows converted from columns at a time.
_BATCH = 512
_SAVED = ("dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True)
class Place:
    """One thing to read: a file, a directory of `datasets`, or a name of the hub.

    Attributes:
      name: the path, or "hf:owner/name".
      size: weight in a bar of progress (bytes, where they are known).
      open: opens it; takes the problems that its rows may have.
      content: a hash of what it holds.
    """

    name: str
    size: int
    open: Callable[[Problems], RowFile]
    content: Callable[[], str]


def find_places(
    path: str | tuple[str, ...], *, split: str | None, plain_text: bool
) -> list[Place]:
    """Finds what a path, a pattern, a list of them or a hub name stands for.

    Args:
      path: as `data.path` has it.
      split: of data sets that have splits.
      plain_text: whether a text file that is no JSON may be one document.

    Returns:
      The places, in the order given; those of a pattern in the order of their names.

    Raises:
      UserError: every path that leads to nothing, at once.
    """
    problems = Problems("the data")
    places: list[Place] = []
    splits = False
    for entry in (path,) if isinstance(path, str) else path:
        if entry.startswith(HUB):
            places.append(_hub(entry, split))
            splits = True
            continue
        found = [entry]
        if not Path(entry).exists() and glob.has_magic(entry):
            found = sorted(glob.glob(entry, recursive=True))
            found = [name for name in found if Path(name).is_file()]
            if not found:
                problems.add(f"`data.path`: no file matches the pattern {entry!r}.")
        for name in found:
            with problems.collecting():
                if any((Path(name) / file).is_file() for file in _SAVED):
                    places.append(_saved(Path(name), split))
                    splits = True
                else:
                    places.append(_file(Path(name), plain_text))
    problems.raise_if_any()
    if split is not None and not splits:
        raise UserError(
            f"`data.split` = {split!r} is for data sets that have splits (a directory "
            f"that `datasets` saved, or {HUB}owner/name), and there is none in "
            f"`data.path` = {path!r}. Leave it out."
        )
    return places


def _file(path: Path, plain_text: bool) -> Place:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w-]+", str(path)):
            hint = f" (A data set of the Hugging Face hub is written '{HUB}{path}'.)"
        raise UserError(f"`data.path`: there is no file {path}.{hint}") from error
    except OSError as error:
        raise UserError(f"`data.path`: cannot read {path}: {error}") from error
    if path.is_dir():
        raise UserError(
            f"`data.path`: cannot read {path}: it is a directory, and none that "
            f"`datasets` saved. Give its files, e.g. '{path}/*.jsonl'."
        )

    def open_file(problems: Problems) -> RowFile:
        if path.suffix in (".parquet", ".arrow"):
            return _columns(path)
        return open_rows(path, plain_text=plain_text, problems=problems)

    return Place(str(path), size, open_file, lambda: _hash_files([path]))


def _columns(path: Path) -> RowFile:
    """Rows of a Parquet or Arrow file."""
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

    def batches() -> Iterator[Any]:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=_BATCH)
            return
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:  # the format of a stream, as `datasets` writes
                source.seek(0)
                file = pyarrow.ipc.open_stream(source)
                yield from file
                return
            for number in range(file.num_record_batches):
                yield file.get_batch(number)

    def pieces() -> Iterator[Any]:
        try:
            for batch in batches():
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.slice(start, _BATCH)
        except errors as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    total = 1
    if path.suffix == ".parquet":
        try:
            total = max(pyarrow.parquet.read_metadata(path).num_rows, 1)
        except errors as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    return _counted(str(path), pieces(), total)


def _saved(path: Path, split: str | None) -> Place:
    """A directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

    def load() -> Any:
        datasets = _datasets(str(path))
        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # its own, pyarrow's and the system's
            raise UserError(f"{path}: `datasets` cannot load it: {error}") from error
        if isinstance(found, dict):
            return found[_split_of(str(path), list(found), split)]
        if split is not None:
            raise UserError(
                f"{path} has no splits; leave out `data.split` = {split!r}."
            )
        return found

    files = sorted(file for file in path.rglob("*") if file.is_file())
    return Place(
        name=str(path),
        size=sum(file.stat().st_size for file in files),
        open=lambda _: _data_set(str(path), load()),
        content=lambda: f"{split}:{_hash_files(files)}",
    )


def _hub(entry: str, split: str | None) -> Place:
    """`hf:owner/name`, `hf:owner/name/config`, each with `@revision` or without."""
    name, _, revision = entry.removeprefix(HUB).partition("@")
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(
            f"`data.path` = {entry!r}: a data set of the hub is written "
            f"'{HUB}owner/name' or '{HUB}owner/name/configuration', with '@revision' "
            "at the end or without."
        )
    repository, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    loaded: list[Any] = []

    def load() -> Any:
        if loaded:
            return loaded[0]
        datasets = _datasets(entry)
        options = dict(name=config, revision=revision or None)
        try:
            found = datasets.load_dataset(repository, split=split, **options)
        except Exception as error:  # of the network, the hub, its files, the split
            raise UserError(
                f"{entry}: `datasets` cannot load it: {error} Without a network, give "
                "files, or a directory that `save_to_disk` wrote."
            ) from error
        if isinstance(found, dict):
            found = found[_split_of(entry, list(found), None)]
        loaded.append(found)
        return found

    return Place(
        name=entry,
        size=1,
        open=lambda _: _data_set(entry, load()),
        content=lambda: f"{entry}:{split}:{load()._fingerprint}",
    )


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: reading it needs the library `datasets`, which is not installed: "
            "pip install datasets."
        ) from error
    return datasets


def _split_of(name: str, known: list[str], split: str | None) -> str:
    """The split asked for, else `train`, else the only one."""
    if split is None:
        split = "train" if "train" in known or len(known) != 1 else known[0]
    if split not in known:
        raise UserError(
            f"{name} has no split {split!r}; `data.split` must be one of "
            f"{', '.join(map(repr, known))}."
        )
    return split


def _data_set(name: str, found: Any) -> RowFile:
    # As tables: nothing is decoded (images, audio) that is not read.
    tables = found.with_format("arrow").iter(batch_size=_BATCH)
    return _counted(name, tables, max(len(found), 1))


def _counted(name: str, tables: Iterable[Any], total: int) -> RowFile:
    """Rows of Arrow tables, numbered from 1."""
    count = 0

    def rows() -> Iterator[Row]:
        nonlocal count
        for table in tables:
            for row in table.to_pylist():
                count += 1
                yield f"{name} row {count}", {k: _pruned(v) for k, v in row.items()}
        if not count:
            raise UserError(f"{name} has no rows.")

    return RowFile(rows(), False, lambda: min(count / total, 1.0))


def _pruned(value: Any) -> Any:
    """Takes out what a column holds only because another row has it.

    A column of objects has every key that any of them has, null where it is missing;
    chat templates ask whether a turn has a key, not whether it is null.
    """
    if isinstance(value, dict):
        return {k: _pruned(v) for k, v in value.items() if v is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_pruned(item) for item in value]
    return value


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
