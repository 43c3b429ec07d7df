"""Lays examples out as rows: packs short ones together, mixes several sources.

`pack` puts complete examples into rows of a fixed number of tokens, best fit
decreasing: from the longest example to the shortest, each goes into the open row that
it fills best. No example is cut. The number of rows is at most about 11/9 of the
smallest possible one (D. S. Johnson, "Near-optimal bin packing algorithms", 1973); on
real chat and instruction data, rows are full to within a fraction of a percent.

`Interleaving` mixes sources by share. The source of the `p`-th row of a run, and which
of the source's rows it is, are functions of `p`, so a mixture resumes like a single
source: from one number. Rows come in blocks of a fixed size. When `n` rows are
complete, the first `i` sources have contributed `floor(n * W_i + 1/2)` of them, where
`W_i` is the sum of their shares, so each stays within one row of its share however long
the run is. Inside a block the sources are shuffled, or spread evenly.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from qlora_jax.data.arrays import Examples
from qlora_jax.data.config import DataConfig, name_of
from qlora_jax.data.report import DataReport, SourceReport, combined
from qlora_jax.errors import UserError

# Streams of `random_keys`. A source has the stream of its index, at most 65,534.
_BLOCK_STREAM = 2**16
HOLD_OUT_STREAM = _BLOCK_STREAM + 1
_SMALLEST_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Packing:
    """Assignment of examples to rows, from `pack`.

    Attributes:
      order: int64 [examples], example indices, row after row.
      starts: int64 [rows + 1]; row `i` holds `order[starts[i] : starts[i + 1]]`.
      capacity: tokens in a row.
    """

    order: Int64[np.ndarray, " examples"]
    starts: Int64[np.ndarray, " rows_plus_1"]
    capacity: int

    def __len__(self) -> int:
        """Number of packed rows."""
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " documents"]:
        """Returns the indices of the examples in a row, in their order."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(lengths: Int64[np.ndarray, " examples"], capacity: int) -> Packing:
    """Packs examples into rows of `capacity` tokens, best fit decreasing.

    The result depends on the arguments alone; equal lengths keep their order. Costs
    O(n log n) plus n operations on an integer of `capacity` bits.

    Args:
      lengths: int64 [examples], the examples' lengths in tokens, each in
        `1..capacity`.
      capacity: tokens in a row.

    Returns:
      The rows; every example is in exactly one of them.

    Raises:
      UserError: an example is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    outside = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if outside.size:
        first = outside[0]
        raise UserError(
            f"`pack`: every length must be in 1..{capacity} (the row's tokens), got "
            f"{lengths[first]} for example {first}. Cut or drop such examples first."
        )
    # The free space of a row is an integer of at most `capacity`, so open rows are kept
    # in one bucket per amount of free space. Bit `f` of `occupied` is set while bucket
    # `f` holds a row: the tightest row that fits is the lowest set bit at or above the
    # length, found without a search.
    rows: list[list[int]] = []
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    descending = np.argsort(-lengths, kind="stable")
    for example, length in zip(
        descending.tolist(), lengths[descending].tolist(), strict=True
    ):
        # x & -x keeps the lowest set bit, and `bit_length` - 1 is its number.
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = buckets[free].pop()
            if not buckets[free]:
                occupied ^= 1 << free
            rows[row].append(example)
        else:
            free, row = capacity, len(rows)
            rows.append([example])
        free -= length
        if free:  # a full row is closed
            buckets[free].append(row)
            occupied |= 1 << free
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    order = np.fromiter((e for row in rows for e in row), np.int64, len(lengths))
    return Packing(order=order, starts=starts, capacity=capacity)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The concatenated examples of several sources.

    Is read like `Examples`: by length, index and `lengths`.

    Attributes:
      parts: the examples of each source.
      shares: share of each source in the rows of a run, with sum 1; None if an epoch
        visits every row of every source once.
      report: of all sources together and of each.
    """

    parts: tuple[Examples, ...]
    shares: tuple[Fraction, ...] | None
    report: DataReport

    def __len__(self) -> int:
        """Number of examples."""
        return sum(len(part) for part in self.parts)

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Returns tokens and labels of one example."""
        if index >= 0:
            local = index
            for part in self.parts:
                if local < len(part):
                    return part[local]
                local -= len(part)
        raise IndexError(f"example {index} of {len(self)}")

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """int64 [examples], tokens in each example."""
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def supervised(self) -> Int32[np.ndarray, " examples"]:
        """int32 [examples], supervised tokens of each."""
        return np.concatenate([part.supervised for part in self.parts])

    def used(self) -> Int32[np.ndarray, " ids"]:
        """Returns the distinct token ids that occur, ascending."""
        return np.unique(np.concatenate([part.used() for part in self.parts]))


AnyExamples = Examples | Mixture
"""Examples of one source or of several."""


def mix(config: DataConfig, parts: Sequence[Examples]) -> Mixture:
    """Mixes the examples of several sources by their weights.

    Args:
      config: the mixture.
      parts: the examples of each of its sources.
    """
    weights = [source.weight for source in config.sources if source.weight is not None]
    shares = None
    if weights:
        # The decimal that was written: 0.1 is exactly a tenth.
        exact = [Fraction(repr(weight)) for weight in weights]
        # As fractions: a float would round the counts of a long run differently.
        shares = tuple(weight / sum(exact) for weight in exact)
    settings = {
        name: getattr(config, name)
        for name in ("max_length", "packing", "shuffle", "seed")
    }
    settings["shares"] = None if shares is None else [str(share) for share in shares]
    settings["sources"] = [part.report.fingerprint for part in parts]
    names = [name_of(source.path) for source in config.sources]
    return _join(config, names, parts, shares, json.dumps(settings, sort_keys=True))


def concatenate(
    config: DataConfig, names: Sequence[str], parts: Sequence[Examples]
) -> Mixture:
    """Joins the examples of named sources without weights."""
    fingerprints = json.dumps([part.report.fingerprint for part in parts])
    return _join(config, names, parts, None, fingerprints)


def _join(
    config: DataConfig,
    names: Sequence[str],
    parts: Sequence[Examples],
    shares: tuple[Fraction, ...] | None,
    content: str,
) -> Mixture:
    """Joins the examples of sources; the fingerprint is the hash of `content`."""
    rows = [part.report.packed_rows or len(part) for part in parts]
    total = sum(map(len, parts))
    reports = [
        SourceReport(
            name=name,
            share=float(shares[i]) if shares else len(parts[i]) / total,
            # An epoch has as many rows as all sources together, of which this one gets
            # its share.
            passes_per_epoch=float(shares[i] * sum(rows) / rows[i]) if shares else 1.0,
            report=parts[i].report,
        )
        for i, name in enumerate(names)
    ]
    counts = count_examples(
        config,
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.supervised for part in parts]),
        # Sources with shares are packed separately.
        packed_rows=sum(rows) if shares else None,
    )
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return Mixture(tuple(parts), shares, combined(reports, counts, fingerprint))


def count_examples(
    config: DataConfig,
    lengths: Int64[np.ndarray, " examples"],
    supervised: Int32[np.ndarray, " examples"],
    *,
    packed_rows: int | None = None,
) -> dict[str, Any]:
    """Returns the fields of a `DataReport` that count examples, not rows read.

    Args:
      config: with packing, the examples are packed to count the rows.
      lengths: int64 [examples], tokens in each.
      supervised: int32 [examples], supervised tokens of each.
      packed_rows: rows after packing, where they are known.
    """
    tokens = int(lengths.sum())
    if not config.packing:
        packed_rows = None
    elif packed_rows is None:
        packed_rows = len(pack(lengths, config.max_length))
    # Counts that occur, so that no quartile is a fraction.
    quartiles = np.percentile(supervised, (0, 25, 50, 75, 100), method="lower")
    return dict(
        examples=len(lengths),
        tokens=tokens,
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        longest_example=int(lengths.max()),
        packed_rows=packed_rows,
        packing_efficiency=(
            tokens / (packed_rows * config.max_length) if packed_rows else None
        ),
        supervised_per_example=tuple(int(value) for value in quartiles),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Assignment of examples to rows of one length.

    Attributes:
      packing: which examples share a row; None puts one in each.
      counts: rows of each stream. Sources with shares are streams of their own, one
        after the other; everything else is a single stream.
      shares: share of each stream in the rows of a run; None for a single one.
    """

    packing: Packing | None
    counts: tuple[int, ...]
    shares: tuple[Fraction, ...] | None


def lay_out(examples: AnyExamples, *, packing: bool, length: int) -> Layout:
    """Assigns examples to rows of `length` tokens; sources with shares separately."""
    shares = examples.shares if isinstance(examples, Mixture) else None
    if shares is None:
        # Sources without shares may meet in one row, which wastes less.
        packed = pack(examples.lengths, length) if packing else None
        count = len(examples) if packed is None else len(packed)
        return Layout(packed, (count,), None)
    assert isinstance(examples, Mixture)
    if not packing:
        return Layout(None, tuple(len(part) for part in examples.parts), shares)
    # Shares are of rows, so a row must belong to one source.
    each = [pack(part.lengths, length) for part in examples.parts]
    firsts = itertools.accumulate((len(part) for part in examples.parts), initial=0)
    order = [packed.order + first for packed, first in zip(each, firsts, strict=False)]
    sizes = [np.diff(packed.starts) for packed in each]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
    return Layout(
        Packing(np.concatenate(order), starts, length),
        tuple(len(packed) for packed in each),
        shares,
    )


class Interleaving:
    """Maps the position of a row in a run to its source and its index there.

    Args:
      shares: share of each source, with sum 1.
      seed: seed of the order in a block.
      shuffle: shuffle each block; else sources are spread evenly.
    """

    def __init__(self, shares: tuple[Fraction, ...], *, seed: int, shuffle: bool):
        # At least 4 rows of the rarest source, so that the counts of a block, which are
        # differences of rounded numbers, are never negative.
        self.block = max(_SMALLEST_BLOCK, math.ceil(4 / min(shares)))
        self._ends = tuple(itertools.accumulate(shares))

        # A batch rarely touches more than two blocks.
        @lru_cache(maxsize=2)
        def block_rows(block: int) -> tuple[np.ndarray, np.ndarray]:
            before, after = self._counts(block), self._counts(block + 1)
            counts = after - before
            source = np.repeat(np.arange(len(shares)), counts)
            within = np.concatenate([np.arange(count) for count in counts.tolist()])
            if shuffle:
                keys = random_keys(seed, block, _BLOCK_STREAM, self.block)
            else:
                # Row k of n at (k + 1/2) / n of the block: as even as rows can be
                # spread.
                keys = (within + 0.5) / counts[source]
            source = source[np.argsort(keys, kind="stable")]
            # The rows of a source keep their order whatever the shuffle.
            index = np.empty(self.block, np.int64)
            for number, first in enumerate(before.tolist()):
                selected = source == number
                index[selected] = first + np.arange(int(selected.sum()))
            return source, index

        self._block_rows = block_rows

    def _counts(self, block: int) -> Int64[np.ndarray, " sources"]:
        """Returns the rows of each source before a block."""
        rows = block * self.block
        # Cumulative shares are rounded, not shares, so that the counts sum to `rows`
        # exactly.
        ends = [math.floor(rows * end + Fraction(1, 2)) for end in self._ends]
        return np.diff(np.array([0, *ends], np.int64))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns the source of a row and how many rows of that source come before."""
        block, offset = divmod(position, self.block)
        source, index = self._block_rows(block)
        return int(source[offset]), int(index[offset])


def random_keys(seed: int, period: int, stream: int, count: int) -> np.ndarray:
    """Returns uint64 [count], random keys to sort by.

    They are raw output of Philox, which numpy promises never to change (unlike that of
    `Generator.permutation`): a run must resume in the same order under a later numpy.

    Args:
      seed: seed of the run.
      period: an epoch, or a block.
      stream: the index of a source, or one of the streams above.
      count: number of keys.
    """
    # Philox counts draws in the lowest word of its counter. The stream is in the
    # highest, so no two streams of one key ever meet.
    key = np.array([seed, period], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
