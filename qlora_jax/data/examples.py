"""From files of rows to token and label arrays.

The one idea: nothing that happens to a row goes uncounted, and nothing that is wrong
with one hides what is wrong with the next.

`encoding` labels the rows, `arrays` holds what becomes of them, `packing` puts examples
side by side, `batches` makes batches.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data.arrays import (
    Examples,
    Sink,
    cache_directory,
    cache_key,
    cached,
    fingerprint,
    quartiles,
)
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE, Encoded, make_encoder
from qlora_jax.data.mixture import Mixture, mix, pack
from qlora_jax.data.report import DataReport
from qlora_jax.data.rows import Row, RowFile
from qlora_jax.data.sources import HUB, Place, find_places
from qlora_jax.errors import Problems, UserError

# Rows tokenized at a time, and their characters: enough to keep a fast tokenizer's
# threads busy, and little beside what a tokenizer holds for each (some 100 bytes).
_CHUNK, _CHARACTERS = 512, 1 << 18
# Places written down for each reason to drop a row.
_PLACES = 5


def load_examples(
    config: DataConfig,
    tokenizer: Any,
    *,
    vocab_size: int,
    progress: bool = False,
    run_directory: str | Path | None = None,
) -> Examples | Mixture:
    """Reads, tokenizes and labels a source of rows, or a mixture of sources.

    Begins an example with what the tokenizer puts before a text (BOS), unless the text
    brings it along already; chat templates write their own and get no second one.

    Args:
      config: the data and how to read it.
      tokenizer: a `transformers` tokenizer (unused by format `tokens`).
      vocab_size: rows of the model's embedding table.
      progress: draw a progress bar on stderr.
      run_directory: what `data.cache` = "auto" is beside.

    Returns:
      The examples, in the order of the sources and their rows.

    Raises:
      UserError: rows cannot be used (the message lists them, each with file and line),
        nothing is left to train on, or a token id is not below `vocab_size`.
    """
    directory = cache_directory(config, run_directory)
    parts = config.parts()
    problems = Problems("the data")
    found = []
    for one in [part for _, part in parts] or [config]:
        with problems.collecting():
            found.append(_load_one(one, tokenizer, vocab_size, directory, progress))
    problems.raise_if_any()
    if not parts:
        return found[0]
    return mix(config, [source for source, _ in parts], found)


def data_size(config: DataConfig) -> int | None:
    """Bytes on disk of all that is to be read; None with a data set of the hub.

    Raises:
      UserError: every path that leads to nothing, of all sources.
    """
    problems = Problems("the data")
    places: list[Place] = []
    for one in config.each:
        with problems.collecting():
            places += _places(one)
    problems.raise_if_any()
    if any(place.name.startswith(HUB) for place in places):
        return None
    return sum(place.size for place in places)


def _places(config: DataConfig) -> list[Place]:
    """What one source reads."""
    plain_text = config.format == "text"
    return find_places(config.path, split=config.split, plain_text=plain_text)


def _load_one(
    config: DataConfig,
    tokenizer: Any,
    vocab_size: int,
    directory: Path | None,
    progress: bool,
) -> Examples:
    """Loads one source, through the cache in a directory if there is one."""
    problems = Problems("the data")
    places: list[Place] = []
    encoder = None
    with problems.collecting():
        places = _places(config)
    with problems.collecting():
        encoder = make_encoder(
            config, tokenizer, vocab_size=vocab_size, problems=problems
        )
    problems.raise_if_any()
    assert encoder is not None

    def build(into: Path | None) -> Examples:
        sink = Sink(into)
        eos = getattr(tokenizer, "eos_token_id", None)
        collector = _Collector(config, vocab_size, eos, sink, problems)
        try:
            with _progress(places, progress) as show:
                for rows, plain in _chunks(places, problems, show):
                    if plain and config.text is not None:
                        problems.add(
                            "`data.text` is a template over a row's fields, but "
                            f"{rows[0][0]} is plain text without fields. Leave "
                            "`data.text` out."
                        )
                        continue
                    encoded = encoder.encode(rows)
                    for (where, _), one in zip(rows, encoded, strict=True):
                        collector.add(where, one, plain)
            problems.raise_if_any()
            return collector.finish(encoder.assistant_mask)
        finally:
            sink.close()

    if directory is None:
        return build(None)
    key = cache_key(config, places, tokenizer, vocab_size)
    return cached(directory, key, config, build)


def _chunks(
    places: list[Place],
    problems: Problems,
    show: Callable[[int, RowFile], None],
) -> Iterator[tuple[list[Row], bool]]:
    """Yields rows, some at a time, and whether they are one plain text."""
    for number, place in enumerate(places):
        with problems.collecting():
            file = place.open(problems)
            rows = iter(file.rows)
            while chunk := _take(rows):
                yield chunk, file.plain
                show(number, file)


def _take(rows: Iterator[Row]) -> list[Row]:
    chunk: list[Row] = []
    size = 0
    for where, row in rows:
        chunk.append((where, row))
        size += _characters(row)
        if len(chunk) == _CHUNK or size >= _CHARACTERS:
            break
    return chunk


def _characters(row: dict[str, Any]) -> int:
    """About how much text a row holds."""
    total, left = 0, [*row.values()]
    while left:
        value = left.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list) and value and isinstance(value[0], int):
            total += len(value)
        elif isinstance(value, list):
            left += value
    return total


@contextlib.contextmanager
def _progress(
    places: list[Place], wanted: bool
) -> Iterator[Callable[[int, RowFile], None]]:
    """Gives a function that draws how far the reading is, on stderr if asked."""
    if not wanted:
        yield lambda number, file: None
        return
    from rich.console import Console
    from rich.progress import Progress

    sizes = [place.size for place in places]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=max(sum(sizes), 1))

        def show(number: int, file: RowFile) -> None:
            bar.update(
                task, completed=sum(sizes[:number]) + sizes[number] * file.done()
            )

        yield show


class _Collector:
    """Fits encoded rows to `max_length`, counts, and builds the `Examples`."""

    def __init__(
        self,
        config: DataConfig,
        vocab_size: int,
        eos: int | None,
        sink: Sink,
        problems: Problems,
    ):
        self._config, self._vocab_size, self._eos = config, vocab_size, eos
        self._sink, self._problems = sink, problems
        self._dropped: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}
        self._rows_read = self._supervised_eos = 0
        self._rows_kept = self._truncated = self._tokens_lost = 0
        self._documents_cut = self._straddling = self._longest = 0

    def _drop(self, where: str, reason: str) -> None:
        self._dropped[reason] += 1
        self._place(where, reason)

    def _place(self, where: str, reason: str) -> None:
        places = self._places.setdefault(reason, [])
        if len(places) < _PLACES and where not in places:
            places.append(where)

    def add(self, where: str, encoded: Encoded | str | None, plain: bool) -> None:
        self._rows_read += 1
        if encoded is None:
            return
        if isinstance(encoded, str):
            self._drop(where, encoded)
            return
        tokens, labels = encoded.tokens, encoded.labels
        if not len(tokens):
            self._drop(where, "no tokens")
            return
        largest = int(tokens.max())
        if largest >= self._vocab_size:
            self._problems.add(
                f"{where}: the tokenizer gives token id {largest}, but the model has "
                f"`vocab_size` = {self._vocab_size}. Is this the model's own "
                "tokenizer? If tokens were added to it, the embeddings must be resized "
                "first."
            )
            return
        self._longest = max(self._longest, len(tokens))
        limit = self._config.max_length
        lost = 0
        if len(tokens) <= limit:
            pieces = [slice(0, len(tokens))]
        elif self._config.too_long == "drop":
            self._drop(where, f"longer than max_length={limit}")
            return
        elif self._config.format == "text" and (plain or self._config.packing):
            pieces = list(_windows(len(tokens), limit))
            self._documents_cut += 1
        else:
            pieces, lost = [slice(0, limit)], len(tokens) - limit
        kept = 0
        for piece in pieces:
            label = labels[piece].copy()
            label[0] = IGNORE  # nothing in the example comes before it
            if (label != IGNORE).any():
                self._sink.add(tokens[piece], label)
                if self._eos is not None:
                    self._supervised_eos += int((label == self._eos).sum())
                kept += 1
            elif lost and (labels[1:] != IGNORE).any():
                self._drop(where, "every supervised token truncated")
            else:
                self._drop(where, "nothing to supervise")
        if kept:
            self._rows_kept += 1
            if lost:
                self._truncated += 1
                self._place(where, "truncated")
            self._tokens_lost += lost
            self._straddling += encoded.straddles

    def finish(self, assistant_mask: str | None) -> Examples:
        config, sink = self._config, self._sink
        if not len(sink):
            reasons = ", ".join(f"{n} {why}" for why, n in self._dropped.items())
            raise UserError(
                f"{config.name}: no row is left to train on: {self._rows_read} read, "
                f"dropped: {reasons} (`data.max_length` = {config.max_length}, "
                f"longest row {self._longest} tokens). Check `data.max_length`, "
                "`data.train_on` and the labels."
            )
        lengths, supervised = sink.lengths, sink.supervised
        packed = len(pack(lengths, config.max_length)) if config.packing else None
        total = int(lengths.sum())
        report = DataReport(
            rows_read=self._rows_read,
            rows_kept=self._rows_kept,
            examples=len(lengths),
            dropped=dict(self._dropped),
            truncated=self._truncated,
            tokens_lost=self._tokens_lost,
            documents_cut=self._documents_cut,
            tokens=total,
            supervised_tokens=int(supervised.sum(dtype=np.int64)),
            supervised_eos=self._supervised_eos,
            longest_row=self._longest,
            longest_example=int(lengths.max()),
            straddling_rows=self._straddling,
            packed_rows=packed,
            packing_efficiency=(
                total / (packed * config.max_length) if packed else None
            ),
            fingerprint="",
            supervised_per_example=quartiles(supervised),
            assistant_mask=assistant_mask,
            places={k: tuple(v) for k, v in self._places.items()},
        )
        examples = sink.examples(report)
        report = dataclasses.replace(report, fingerprint=fingerprint(config, examples))
        return dataclasses.replace(examples, report=report)


def _windows(length: int, limit: int) -> Iterator[slice]:
    """Consecutive windows of `limit` tokens that cover `length`.

    A last window of one token could predict nothing, so it takes a second one from the
    window before it where that leaves both something to predict.
    """
    cuts = list(range(0, length, limit)) + [length]
    if length % limit == 1 and limit > 2:
        cuts[-2] -= 1
    for start, end in zip(cuts, cuts[1:], strict=False):
        yield slice(start, end)
