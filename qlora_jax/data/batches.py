"""Batches as a pure function of an integer.

The one idea: batch `i` of a run is computed from the examples, the config and `i`
alone, so the cursor to save in a checkpoint is the number of the next batch, and
continuing costs nothing however far the run has come.

The examples of all epochs form one endless stream, each epoch in its own order; batch
`i` is the `i`-th run of `accumulation_steps * batch_size` rows of it. A batch that
reaches past the end of an epoch goes on into the next one, so every step has a full
window, no row is skipped, and a data set smaller than a batch repeats. In a mixture
with weights each source is such a stream, and `mixture` says whose turn it is.

Why not `grain`: its iterators keep their position in a state object of their own and
importing it takes 1.2 to 1.5 s; all that is needed here is an index.
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

from qlora_jax.data.arrays import Examples
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.mixture import Interleaving, Mixture, lay_out, random_keys
from qlora_jax.errors import UserError

Batch = dict[str, Int32[np.ndarray, "..."]]
"""`tokens` and `labels`, packed also `positions` and `segment_ids`."""

# Row lengths are rounded up to this many tokens (kernels like multiples of 64).
_ROUND = 64


@runtime_checkable
class Indexed(Protocol):
    """Anything `prefetch` can read: batches by index, and their number."""

    def __getitem__(self, index: int, /) -> Batch: ...  # noqa: D102


class _Rows:
    """Examples laid out in rows of one length, packed or one to a row."""

    def __init__(
        self,
        examples: Examples | Mixture,
        config: DataConfig,
        pad_token_id: int,
        sequence_length: int | None = None,
    ):
        if type(pad_token_id) is not int or pad_token_id < 0:
            raise UserError(
                f"`pad_token_id` must be a token id, got {pad_token_id!r}. Any id of "
                "the model serves (0, say): padding is masked by labels and segment "
                "ids, never recognised by its token."
            )
        self._examples, self._pad = examples, pad_token_id
        longest = int(examples.lengths.max())
        if sequence_length is None:
            rounded = -(-longest // _ROUND) * _ROUND
            sequence_length = config.max_length
            if not config.packing:
                sequence_length = min(sequence_length, rounded)
        if longest > sequence_length:
            raise UserError(
                f"rows of {sequence_length} tokens cannot hold the longest example, "
                f"{longest} tokens. Load the examples with `data.max_length` = "
                f"{sequence_length} or use longer rows."
            )
        self.length = sequence_length
        layout = lay_out(examples, packing=config.packing, length=self.length)
        self.counts, self.shares = layout.counts, layout.shares
        self._packing = layout.packing
        self._tokens = examples.lengths
        if self._packing is not None:
            packed = examples.lengths[self._packing.order]
            self._tokens = np.add.reduceat(packed, self._packing.starts[:-1])

    def __len__(self) -> int:
        return len(self._examples if self._packing is None else self._packing)

    def tokens(self, rows: list[int]) -> int:
        """Tokens in the given rows that are not padding."""
        return int(self._tokens[rows].sum())

    def assemble(self, rows: list[int], size: int) -> Batch:
        """The given rows, then fully masked ones up to `size`: arrays [size, T]."""
        shape = (size, self.length)
        batch = {
            "tokens": np.full(shape, self._pad, np.int32),
            "labels": np.full(shape, IGNORE, np.int32),
        }
        if self._packing is None:
            for at, row in enumerate(rows):
                tokens, labels = self._examples[row]
                batch["tokens"][at, : len(tokens)] = tokens
                batch["labels"][at, : len(tokens)] = labels
            return batch
        batch["positions"] = np.zeros(shape, np.int32)
        batch["segment_ids"] = np.zeros(shape, np.int32)
        for at, row in enumerate(rows):
            start = 0
            for segment, example in enumerate(self._packing[row].tolist(), 1):
                tokens, labels = self._examples[example]
                place = at, slice(start, start + len(tokens))
                batch["tokens"][place] = tokens
                batch["labels"][place] = labels
                batch["positions"][place] = np.arange(len(tokens))
                batch["segment_ids"][place] = segment
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
    - packed only: `positions`, from 0 in every example, and `segment_ids`, 1, 2, ...
      in each row; both are 0 on padding.

    Args:
      examples: what `load_examples` returned.
      config: the config they were loaded with (packing, max_length, shuffle, seed).
      batch_size: rows in a microbatch (sequences).
      accumulation_steps: microbatches in a step.
      pad_token_id: any token id of the model.
      steps: number of batches.
      epochs: number of batches as passes over the data, rounded up to a whole batch.
        With neither `steps` nor `epochs`, the batches go on without end.

    Raises:
      UserError: a size is not a positive integer, both `steps` and `epochs` are given,
        or an example is longer than a row.
    """

    def __init__(
        self,
        examples: Examples | Mixture,
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
                f"give `steps` (= {steps}) or `epochs` (= {epochs}), not both."
            )
        if steps is not None:
            _check_positive("steps", steps)
        if epochs is not None and not (epochs > 0 and math.isfinite(epochs)):
            raise UserError(f"`epochs` must be a positive number, got {epochs!r}.")
        self._rows = _Rows(examples, config, pad_token_id)
        self._shape = (accumulation_steps, batch_size)
        self._steps = steps
        if epochs is not None:
            self._steps = math.ceil(epochs * self.steps_per_epoch)
        counts, seed, shuffle = self._rows.counts, config.seed, config.shuffle
        self._interleaving = None
        if self._rows.shares is not None:
            self._interleaving = Interleaving(
                self._rows.shares, seed=seed, shuffle=shuffle
            )

        # A batch touches two epochs of a source at most, or very short ones.
        @lru_cache(maxsize=2 * len(counts))
        def order(source: int, epoch: int) -> np.ndarray:
            if not shuffle:
                return np.arange(counts[source])
            keys = random_keys(seed, epoch, source, counts[source])
            return np.argsort(keys, kind="stable")

        self._order = order
        self._firsts = [0, *itertools.accumulate(counts)]

    @property
    def sequence_length(self) -> int:
        """T: `max_length` when packing, else the longest example rounded up to 64."""
        return self._rows.length

    @property
    def rows_per_step(self) -> int:
        """Rows that a step takes."""
        return math.prod(self._shape)

    @property
    def rows_per_epoch(self) -> int:
        """Rows (packed rows when packing) in one pass over the data.

        In a mixture with weights, as many rows as its sources have together.
        """
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the data (not a whole number in general)."""
        return len(self._rows) / self.rows_per_step

    def __len__(self) -> int:
        """Number of batches of the run."""
        if self._steps is None:
            raise TypeError("these batches have no end; give `steps` or `epochs`")
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        """Batch `index` of the run, from 0: arrays [A, B, T]."""
        rows = self._rows_of(index)
        batch = self._rows.assemble(rows, len(rows))
        return {k: v.reshape(*self._shape, -1) for k, v in batch.items()}

    def tokens(self, index: int) -> int:
        """Tokens of batch `index` that are not padding, supervised or not."""
        return self._rows.tokens(self._rows_of(index))

    def _rows_of(self, index: int) -> list[int]:
        if index < 0 or (self._steps is not None and index >= self._steps):
            raise IndexError(f"batch {index} of {self._steps or 'endlessly many'}")
        size = math.prod(self._shape)
        rows = []
        for place in range(index * size, (index + 1) * size):
            source = 0
            if self._interleaving is not None:
                source, place = self._interleaving[place]
            epoch, at = divmod(place, self._rows.counts[source])
            rows.append(self._firsts[source] + int(self._order(source, epoch)[at]))
        return rows


def prefetch(
    batches: Indexed, start: int, stop: int, *, depth: int = 2
) -> Generator[Batch, None, None]:
    """Yields `batches[start], ..., batches[stop - 1]`, prepared ahead by a thread.

    An exception raised while making a batch is raised where that batch is due. When
    the consumer stops early (or the generator is closed) at most one batch in the
    making is waited for.

    Args:
      batches: indexable, e.g. `Batches`.
      start: first index; after a restart, the number of batches already used.
      stop: index to stop before.
      depth: batches to hold ready.

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
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def eval_batches(
    examples: Examples | Mixture,
    config: DataConfig,
    *,
    batch_size: int,
    pad_token_id: int,
    sequence_length: int | None = None,
) -> Iterator[Batch]:
    """Yields every example once, in order, as arrays [B, T] (no accumulation axis).

    The last batch is filled up with rows whose labels are all -100 (and segment ids
    0), so that all batches have one shape and none of the padding counts.

    Args:
      examples: what `load_examples` returned.
      config: the config they were loaded with; packing is honoured.
      batch_size: rows in a batch (sequences).
      pad_token_id: any token id of the model.
      sequence_length: T; default as in `Batches`. Give the training batches' to share
        one compiled function with them.

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
