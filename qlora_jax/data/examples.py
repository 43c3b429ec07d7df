"""Loads data: reads rows, encodes them, fits them to `max_length` and counts them.

Every row is counted, whether it is kept, truncated or dropped. A row that cannot be
used is collected as a problem and reading continues, so that one error lists them all.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.arrays import (
    Examples,
    Sink,
    cache_directory,
    cache_key,
    cached,
    fingerprint,
)
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE, Encoded, Encoder, with_eos
from qlora_jax.data.mixture import AnyExamples, count_examples, mix
from qlora_jax.data.rendering import with_date, without_unused_date
from qlora_jax.data.report import BAD_ROW, DataReport
from qlora_jax.data.sources import RowSource, list_sources, progress_bar, read_chunks
from qlora_jax.errors import Problems, UserError, counted, group_rows

REPEATED_FILES = "files that `path` names more than once, whose rows are read as often"
"""A remark on a source."""
CUT_ANSWER = "rows that are cut off inside what is trained, which loses its end"
"""A remark on a row."""
# Locations recorded for each reason to drop a row.
_MAX_LOCATIONS = 5


def load_examples(
    config: DataConfig,
    tokenizer: Any,
    *,
    vocab_size: int,
    progress: bool = False,
    run_directory: str | Path | None = None,
) -> AnyExamples:
    """Reads, tokenizes and labels one source of rows or a mixture of sources.

    An example starts with what the tokenizer puts before a string (BOS), unless the
    row already has it; chat templates write their own and get no second one.

    Args:
      config: the data and how to read it.
      tokenizer: a `transformers` tokenizer (unused by format `tokens`).
      vocab_size: rows of the model's embedding table.
      progress: draw a progress bar on stderr.
      run_directory: names the directory of `data.cache` = "auto".

    Returns:
      The examples, in the order of the sources and their rows.

    Raises:
      UserError: lists the rows that cannot be used, each with file and line; or no row
        is left to train on, or a token id is not below `vocab_size`.
    """
    directory = cache_directory(config, run_directory)
    tokenizer = with_eos(tokenizer, config.eos_token)
    problems = Problems("the data")
    parts = []
    config = with_date(config, tokenizer)
    for settings in config.each:
        settings = without_unused_date(settings, tokenizer)
        with problems.collecting():
            loader = _Loader(settings, tokenizer, vocab_size, progress)
            parts.append(loader.load(directory))
    problems.raise_if_any()
    return mix(config, parts) if config.sources else parts[0]


def data_size(config: DataConfig) -> int | None:
    """Returns the bytes on disk of all sources; None with a data set of the hub.

    Raises:
      UserError: lists every path that cannot be read.
    """
    problems = Problems("the data")
    sources: list[RowSource] = []
    for settings in config.each:
        with problems.collecting():
            sources += _row_sources(settings)
    problems.raise_if_any()
    if any(source.on_hub for source in sources):
        return None
    return sum(source.size for source in sources)


def _row_sources(config: DataConfig) -> list[RowSource]:
    plain_text = config.format == "text"
    return list_sources(config.path, split=config.split, plain_text=plain_text)


class _Loader:
    """Loads one source.

    Raises:
      UserError: lists all problems of the paths and of the tokenizer.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Any, vocab_size: int, progress: bool
    ):
        self._config, self._tokenizer = config, tokenizer
        self._vocab_size, self._progress = vocab_size, progress
        self._problems = Problems("the data")
        with self._problems.collecting():
            self._sources = _row_sources(config)
        with self._problems.collecting():
            self._encoder = Encoder(config, tokenizer, vocab_size=vocab_size)
        self._problems.raise_if_any()

    def load(self, directory: Path | None) -> Examples:
        """Returns the examples, through the cache in a directory if there is one."""
        if directory is None:
            return self._read(None)
        key = cache_key(
            self._config,
            [source.content_hash() for source in self._sources],
            self._tokenizer,
            self._vocab_size,
        )
        return cached(directory, key, self._config, self._read)

    def _read(self, directory: Path | None) -> Examples:
        """Reads all rows into memory or into files in a directory."""
        sink = Sink(directory)
        eos = getattr(self._tokenizer, "eos_token_id", None)
        collector = _Collector(self._config, self._vocab_size, eos, sink)
        problems = self._problems
        try:
            with (
                progress_bar(self._sources, enabled=self._progress) as on_read,
                contextlib.closing(
                    read_chunks(self._sources, problems, on_read)
                ) as chunks,
            ):
                for rows, file in chunks:
                    self._encoder.recognised[file.kind()] += len(rows)
                    if file.plain and self._config.text is not None:
                        problems.add(
                            "`data.text` is a template over a row's fields, but "
                            f"{rows[0][0]} is plain text without fields. Leave "
                            "`data.text` out."
                        )
                        continue
                    encoded_rows = self._encoder.encode(rows)
                    for (where, _), encoded in zip(rows, encoded_rows, strict=True):
                        with problems.collecting():
                            collector.add(where, encoded, file.plain)
            problems.raise_if_any()
            files = Counter(os.path.realpath(source.name) for source in self._sources)
            for file, count in files.items():
                if count > 1:
                    collector.remark(REPEATED_FILES, file)
            return collector.finish(self._encoder)
        finally:
            sink.close()


class _Collector:
    """Fits encoded rows to `max_length`, counts them and writes them to a sink."""

    def __init__(
        self, config: DataConfig, vocab_size: int, eos: int | None, sink: Sink
    ):
        self._config, self._vocab_size, self._eos = config, vocab_size, eos
        self._sink = sink
        self._dropped: Counter[str] = Counter()
        self._locations: dict[str, list[str]] = {}
        self._bad_rows: list[str] = []
        self._rows_read = self._supervised_eos = 0
        self._rows_kept = self._truncated = self._tokens_lost = 0
        self._documents_cut = self._straddling = self._longest = 0
        self._remarks: Counter[str] = Counter()
        self._loses_end = False  # the row that is being added

    def add(
        self, where: str, encoded: list[Encoded] | str | UserError, plain: bool
    ) -> None:
        """Adds what the encoder made of a row.

        Raises:
          UserError: that of the row, unless such rows are skipped; or its ids are not
            those of the model.
        """
        self._rows_read += 1
        if isinstance(encoded, UserError):
            if self._config.on_bad_row == "refuse":
                raise encoded
            self._drop(where, BAD_ROW)
            if len(self._bad_rows) < _MAX_LOCATIONS:
                self._bad_rows.append(str(encoded))
            return
        if isinstance(encoded, str):
            self._drop(where, encoded)
            return
        examples, self._loses_end = len(self._sink), False
        truncated, straddling = self._truncated, self._straddling
        for example in encoded:
            self._add_example(where, example, plain)
        if len(self._sink) == examples:
            return
        # Counted once a row, though a row may have become several examples.
        self._rows_kept += 1
        self._truncated = truncated + (self._truncated > truncated)
        self._straddling = straddling + (self._straddling > straddling)
        if self._loses_end:
            self.remark(CUT_ANSWER, where)
        for example in encoded:
            self._remarks.update(example.remarks)
            for remark in example.remarks:
                self._locate(where, remark)

    def remark(self, remark: str, where: str) -> None:
        """Counts a remark on the source, with a location."""
        self._remarks[remark] += 1
        self._locate(where, remark)

    def _add_example(self, where: str, encoded: Encoded, plain: bool) -> None:
        tokens, labels = encoded.tokens, encoded.labels
        if not len(tokens):
            self._drop(where, "no tokens")
            return
        self._check_ids(where, int(tokens.max()))
        self._longest = max(self._longest, len(tokens))
        windows, lost = self._fit(len(tokens), plain)
        if not windows:
            self._drop(where, f"longer than max_length={self._config.max_length}")
            return
        kept = 0
        for window in windows:
            # A copy: windows share the array, and `labels` may be `tokens` itself.
            label = labels[window].copy()
            label[0] = IGNORE  # no token of the example comes before it
            if (label != IGNORE).any():
                self._sink.add(tokens[window], label)
                cut = len(label)
                if lost and label[-1] != IGNORE and labels[cut] != IGNORE:
                    self._loses_end = True
                if self._eos is not None:
                    self._supervised_eos += int((label == self._eos).sum())
                kept += 1
            elif lost and (labels[1:] != IGNORE).any():
                self._drop(where, "every supervised token truncated")
            else:
                self._drop(where, "nothing to supervise")
        if kept:
            if lost:
                self._truncated += 1
                self._locate(where, "truncated")
            self._tokens_lost += lost
            self._straddling += encoded.straddles

    def _fit(self, length: int, plain: bool) -> tuple[list[slice], int]:
        """Returns the windows of a row to keep, and how many tokens are lost."""
        config, limit = self._config, self._config.max_length
        if length <= limit:
            return [slice(0, length)], 0
        if config.too_long == "drop":
            return [], 0
        # An answer in a window without its question would be trained without it.
        packed = config.packing and config.response_part is None
        if config.format == "text" and (plain or packed):
            self._documents_cut += 1
            return list(_windows(length, limit)), 0
        return [slice(0, limit)], length - limit

    def _check_ids(self, where: str, largest: int) -> None:
        if largest >= self._vocab_size:
            raise UserError(
                f"{where}: the tokenizer returns token id {largest}, but the model has "
                f"`vocab_size` = {self._vocab_size}. Is this the tokenizer of the "
                "model? If tokens were added to it, resize the embeddings first."
            )

    def _drop(self, where: str, reason: str) -> None:
        self._dropped[reason] += 1
        self._locate(where, reason)

    def _locate(self, where: str, reason: str) -> None:
        locations = self._locations.setdefault(reason, [])
        if len(locations) < _MAX_LOCATIONS and where not in locations:
            locations.append(where)

    def finish(self, encoder: Encoder) -> Examples:
        """Returns the examples with their report."""
        config, sink = self._config, self._sink
        if not len(sink):
            raise self._nothing_left()
        report = DataReport(
            **count_examples(config, sink.lengths, sink.supervised),
            rows_read=self._rows_read,
            rows_kept=self._rows_kept,
            dropped=dict(self._dropped),
            truncated=self._truncated,
            tokens_lost=self._tokens_lost,
            documents_cut=self._documents_cut,
            supervised_eos=self._supervised_eos,
            longest_row=self._longest,
            straddling_rows=self._straddling,
            fingerprint="",
            assistant_mask=encoder.assistant_mask,
            remarks=dict(self._remarks),
            recognised=dict(encoder.recognised),
            unread=dict(encoder.unread),
            unknown=dict(encoder.unknown),
            bad_rows=tuple(self._bad_rows),
            places={k: tuple(v) for k, v in self._locations.items()},
        )
        examples = sink.examples(report)
        report = dataclasses.replace(report, fingerprint=fingerprint(config, examples))
        return dataclasses.replace(examples, report=report)

    def _nothing_left(self) -> UserError:
        config, bad = self._config, self._dropped.get(BAD_ROW, 0)
        message = f"{config.name}: no row is left to train on: {self._rows_read} read, "
        first = "".join(f"\n{line}" for line, _ in group_rows(self._bad_rows))
        if bad == self._rows_read:
            return UserError(
                f"{message}and none can be used (`data.on_bad_row` = 'skip' leaves "
                f"such rows out). The first:{first}"
            )
        reasons = ", ".join(
            counted(n, "row") + why.removeprefix("row")
            if why == BAD_ROW
            else f"{n} {why}"
            for why, n in self._dropped.items()
        )
        return UserError(
            f"{message}dropped: {reasons} (`data.max_length` = {config.max_length}, "
            f"longest row {self._longest} tokens). Check `data.max_length`, "
            f"`data.train_on` and the labels.{first}"
        )


def _windows(length: int, limit: int) -> Iterator[slice]:
    """Yields consecutive windows of `limit` tokens that cover `length`.

    A last window of one token could not predict anything, so it takes a second token
    from the window before it, if that leaves both something to predict.
    """
    cuts = list(range(0, length, limit)) + [length]
    if length % limit == 1 and limit > 2:
        cuts[-2] -= 1
    for start, end in zip(cuts, cuts[1:], strict=False):
        yield slice(start, end)
