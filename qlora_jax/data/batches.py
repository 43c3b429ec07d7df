"""Batches as a pure function of an integer.

Batch `i` of a run is computed from the examples, the config and `i` alone. So the data
position that a checkpoint saves is the number of the next batch, and resuming costs
nothing however long the run is.

The examples of all epochs form one endless stream, each epoch in its own order; batch
`i` is the `i`-th block of `accumulation_steps * batch_size` rows. A batch that reaches
past the end of an epoch continues with the next one, so every step is full, no row is
skipped, and a data set smaller than a batch repeats. In a mixture with weights every
source is such a stream, and `Interleaving` chooses the source of each row.

`grain` is not used: its iterators keep their position in a state object, and importing
it takes 1.2 to 1.5 s, where an index is all that is needed.
"""

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.mixture import AnyExamples, Interleaving, lay_out, random_keys
from qlora_jax.data.packing import packs, row_length
from qlora_jax.errors import UserError

Batch = dict[str, Int32[np.ndarray, "..."]]
"""`tokens` and `labels`; with packing also `positions` and `segment_ids`."""


@runtime_checkable
class Indexed(Protocol):
    """Batches by index, as `prefetch` reads them."""

    def __getitem__(self, index: int, /) -> Batch: ...  # noqa: D102


class _Rows:
    """Examples in rows of one length, packed or one per row."""

    def __init__(
        self,
        examples: AnyExamples,
        config: DataConfig,
        pad_token_id: int,
        sequence_length: int | None = None,
    ):
        if type(pad_token_id) is not int or pad_token_id < 0:
            raise UserError(
                f"`pad_token_id` must be a token id, got {pad_token_id!r}. Any id of "
                "the model will do (e.g. 0): padding is masked by labels and segment "
                "ids, never recognised by its token."
            )
        self._examples, self._pad = examples, pad_token_id
        longest = int(examples.lengths.max())
        packing = packs(config.packing, examples.lengths, config.max_length)
        if sequence_length is None:
            # One length for the whole run: batches of several lengths would be as many
            # compiled programs.
            sequence_length = config.max_length
            if not packing:
                sequence_length = row_length(examples.lengths, config.max_length)
        if longest > sequence_length:
            raise UserError(
                f"rows of {sequence_length} tokens cannot hold the longest example, "
                f"{longest} tokens. Load the examples with `data.max_length` = "
                f"{sequence_length} or use longer rows."
            )
        self.length = sequence_length
        layout = lay_out(
            examples,
            packing=packing,
            length=self.length,
            in_order=not config.shuffle,
        )
        self.counts, self.shares = layout.counts, layout.shares
        self._packing = layout.packing
        self._tokens = examples.lengths
        if self._packing is not None:
            # Sums of the examples between consecutive starts.
            packed = examples.lengths[self._packing.order]
            self._tokens = np.add.reduceat(packed, self._packing.starts[:-1])

    def __len__(self) -> int:
        return len(self._examples if self._packing is None else self._packing)

    def tokens(self, rows: list[int]) -> int:
        """Returns the number of tokens in some rows that are not padding."""
        return int(self._tokens[rows].sum())

    def assemble(self, rows: list[int], size: int) -> Batch:
        """Returns arrays [size, T]: these rows, then masked ones up to `size`."""
        shape = (size, self.length)
        batch = {
            "tokens": np.full(shape, self._pad, np.int32),
            # Padding is masked by its labels, and with packing by segment 0 too.
            # Without packing it is on the right, where a causal model's tokens do not
            # see it.
            "labels": np.full(shape, IGNORE, np.int32),
        }
        if self._packing is None:
            for i, row in enumerate(rows):
                tokens, labels = self._examples[row]
                batch["tokens"][i, : len(tokens)] = tokens
                batch["labels"][i, : len(tokens)] = labels
            return batch
        batch["positions"] = np.zeros(shape, np.int32)
        batch["segment_ids"] = np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            start = 0
            # Attention stays within a segment, and positions restart, so each example
            # is computed as in a row of its own.
            for segment, example in enumerate(self._packing[row].tolist(), 1):
                tokens, labels = self._examples[example]
                span = i, slice(start, start + len(tokens))
                batch["tokens"][span] = tokens
                batch["labels"][span] = labels
                batch["positions"][span] = np.arange(len(tokens))
                batch["segment_ids"][span] = segment
                start += len(tokens)
        return batch


class Batches:
    """Training batches by index: `batches[i]` depends on nothing but `i`.

    A batch is a dict of int32 arrays [A, B, T] (A = accumulation_steps, B = batch_size,
    T = `sequence_length`, the same for the whole run):

    - `tokens`; padding is `pad_token_id`.
    - `labels`, aligned with `tokens`, -100 where nothing is supervised: on padding and
      at the first position of every example, so that nothing is predicted across the
      boundary of two packed examples.
    - with packing: `positions`, from 0 in every example, and `segment_ids`, 1, 2, ...
      in each row; both are 0 on padding.

    Args:
      examples: from `load_examples`.
      config: the config they were loaded with (packing, max_length, shuffle, seed).
      batch_size: rows in a microbatch (sequences).
      accumulation_steps: microbatches in a step.
      pad_token_id: any token id of the model.
      steps: number of batches.
      epochs: passes over the data instead of `steps`, rounded up to a full batch. With
        neither, there is no last batch.

    Raises:
      UserError: a size is not a positive integer, both `steps` and `epochs` are given,
        or an example is longer than a row.
    """

    def __init__(
        self,
        examples: AnyExamples,
        config: DataConfig,
        *,
        batch_size: int,
        pad_token_id: int,
        accumulation_steps: int = 1,
        steps: int | None = None,
        epochs: int | float | None = None,
    ):
        sizes = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
        for name, value in sizes.items():
            _check_positive(name, value)
        if steps is not None and epochs is not None:
            raise UserError(
                f"set `steps` (= {steps}) or `epochs` (= {epochs}), not both."
            )
        if steps is not None:
            _check_positive("steps", steps)
        if epochs is not None and not (epochs > 0 and math.isfinite(epochs)):
            raise UserError(f"`epochs` must be a positive number, got {epochs!r}.")
        self._rows = _Rows(examples, config, pad_token_id)
        self._shape = (accumulation_steps, batch_size)
        self._steps = steps
        if epochs is not None:
            # Upwards: the last batch is filled from the epoch after.
            self._steps = math.ceil(epochs * self.steps_per_epoch)
        counts, seed, shuffle = self._rows.counts, config.seed, config.shuffle
        self._interleaving = None
        if self._rows.shares is not None:
            self._interleaving = Interleaving(
                self._rows.shares, seed=seed, shuffle=shuffle
            )

        # A batch touches at most two epochs of a source, unless they are very short.
        @lru_cache(maxsize=2 * len(counts))
        def order(source: int, epoch: int) -> np.ndarray:
            if not shuffle:
                return np.arange(counts[source])
            # Keys that only depend on (seed, epoch, source): an epoch's order can be
            # had without those before it.
            keys = random_keys(seed, epoch, source, counts[source])
            return np.argsort(keys, kind="stable")

        self._order = order
        self._firsts = [0, *itertools.accumulate(counts)]

    @property
    def sequence_length(self) -> int:
        """T: `max_length` with packing, else the longest example rounded up to 64."""
        return self._rows.length

    @property
    def rows_per_step(self) -> int:
        """Rows in a step."""
        return math.prod(self._shape)

    @property
    def rows_per_epoch(self) -> int:
        """Rows, or packed rows, in one pass over the data.

        In a mixture with weights: as many rows as its sources have together.
        """
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the data (in general not an integer)."""
        return len(self._rows) / self.rows_per_step

    def __len__(self) -> int:
        """Number of batches of the run."""
        if self._steps is None:
            raise TypeError("these batches have no end; set `steps` or `epochs`")
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        """Returns batch `index` of the run, from 0: arrays [A, B, T]."""
        rows = self._rows_of(index)
        batch = self._rows.assemble(rows, len(rows))
        return {k: v.reshape(*self._shape, -1) for k, v in batch.items()}

    def tokens(self, index: int) -> int:
        """Returns the number of tokens in a batch that are not padding."""
        return self._rows.tokens(self._rows_of(index))

    def _rows_of(self, index: int) -> list[int]:
        if index < 0 or (self._steps is not None and index >= self._steps):
            raise IndexError(f"batch {index} of {self._steps or 'endlessly many'}")
        size = self.rows_per_step
        rows = []
        # Position of the row in the run; in a mixture, then in its source's stream,
        # which is one epoch after the other.
        for position in range(index * size, (index + 1) * size):
            source = 0
            if self._interleaving is not None:
                source, position = self._interleaving[position]
            epoch, rank = divmod(position, self._rows.counts[source])
            rows.append(self._firsts[source] + int(self._order(source, epoch)[rank]))
        return rows


def prefetch(
    batches: Indexed, start: int, stop: int, *, depth: int = 2
) -> Generator[Batch, None, None]:
    """Yields `batches[start], ..., batches[stop - 1]`, prepared ahead by a thread.

    An exception that a batch raises is raised where that batch is due. Closing the
    generator waits for at most one unfinished batch.

    Args:
      batches: indexable, e.g. `Batches`.
      start: first index; when resuming, the number of batches already used.
      stop: index to stop before.
      depth: batches prepared ahead.

    Raises:
      UserError: `depth` is not a positive integer.
    """
    _check_positive("depth", depth)
    return _prefetch(batches, start, stop, depth)


def _prefetch(
    batches: Indexed, start: int, stop: int, depth: int
) -> Generator[Batch, None, None]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    ahead = iter(range(start, stop))
    pending: deque = deque()
    try:
        for index in ahead:
            pending.append(pool.submit(batches.__getitem__, index))
            # The consumer works on one batch while `depth` others are prepared.
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def eval_batches(
    examples: AnyExamples,
    config: DataConfig,
    *,
    batch_size: int,
    pad_token_id: int,
    sequence_length: int | None = None,
) -> Iterator[Batch]:
    """Yields every example once, in order, as arrays [B, T] (no accumulation axis).

    The last batch is padded with rows whose labels are all -100 (and segment ids 0), so
    that all batches have the same shape and no padding is measured.

    Args:
      examples: from `load_examples`.
      config: the config they were loaded with (packing, max_length).
      batch_size: rows in a batch (sequences).
      pad_token_id: any token id of the model.
      sequence_length: T; default as for `Batches`. With that of the training batches,
        both share one compiled function.

    Raises:
      UserError: `batch_size` is not a positive integer, or an example is longer than
        a row.
    """
    _check_positive("batch_size", batch_size)
    rows = _Rows(examples, config, pad_token_id, sequence_length)
    return (
        rows.assemble(
            list(range(start, min(start + batch_size, len(rows)))), batch_size
        )
        for start in range(0, len(rows), batch_size)
    )


def _check_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"`{name}` must be a positive integer, got {value!r}.")
