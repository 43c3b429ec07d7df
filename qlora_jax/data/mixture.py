"""Packing: put whole examples side by side in rows of a fixed number of tokens.

The one idea: best fit decreasing. Examples are taken from the longest to the shortest
and each goes into the open row it fills best, so that no example is cut and few rows
hold padding. The guarantee of the method is 11/9 of the smallest possible number of
rows (D. S. Johnson, "Near-optimal bin packing algorithms", 1973); on real chat and
instruction data it stays within a fraction of a percent of full.

The free space of a row is an integer up to the row's length, so the open rows are kept
in one bucket per amount of free space, and one Python integer says which buckets hold
something: the tightest row for an example is the lowest set bit at or above its length.

Several sources as one stream of rows, in given shares.

The one idea: which source the `p`-th row of a run comes from, and which of its rows
that is, is a function of `p`, so a mixture is continued like a single source: by one
number.

The stream is made in blocks of a fixed size. After `n` rows the first `i` sources have
had `floor(n * W_i + 1/2)` of them, where `W_i` is the sum of their shares: integers
that stay within one row of the shares however long the run is. Inside a block the
sources are shuffled, or, without shuffling, spread evenly.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from jaxtyping import Int32, Int64

from qlora_jax.data.arrays import Examples, quartiles
from qlora_jax.data.config import DataConfig, Source, name_of
from qlora_jax.data.report import DataReport, SourceReport, combined
from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which examples share a row; `pack` makes it.

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
        """Indices of the examples in packed row `row`, in the order they lie there."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(lengths: Int64[np.ndarray, " examples"], capacity: int) -> Packing:
    """Packs whole examples into rows of `capacity` tokens, best fit decreasing.

    Deterministic: equal lengths are taken in the order given, and the result depends
    on nothing but the arguments. Costs O(n log n) plus n operations on a bit set of
    `capacity` bits.

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
            f"`pack`: every length must lie in 1..{capacity} (the row's tokens), got "
            f"{lengths[first]} for example {first}. Cut or drop such examples first."
        )
    rows: list[list[int]] = []
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free tokens
    occupied = 0  # bit f is set when buckets[f] holds a row
    descending = np.argsort(-lengths, kind="stable")
    for example, length in zip(
        descending.tolist(), lengths[descending].tolist(), strict=True
    ):
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
        if free:  # a full row takes nothing more
            buckets[free].append(row)
            occupied |= 1 << free
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    order = np.fromiter((e for row in rows for e in row), np.int64, len(lengths))
    return Packing(order=order, starts=starts, capacity=capacity)


# The counter of the random stream that orders blocks; sources have those below it.
BLOCKS = 2**16
_SMALLEST_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The examples of several sources, one source after the other.

    It is read as `Examples` are: by length, index and `lengths`.

    Attributes:
      parts: the examples of each source.
      shares: of each source in the rows of a run, adding up to 1; None where every row
        of every source comes once in an epoch.
      report: of all of them together, and each by itself.
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
        """Tokens and labels of one example."""
        if index >= 0:
            at = index
            for part in self.parts:
                if at < len(part):
                    return part[at]
                at -= len(part)
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
        """The different token ids that occur, ascending."""
        return np.unique(np.concatenate([part.used() for part in self.parts]))


def mix(
    config: DataConfig, sources: Sequence[Source], parts: Sequence[Examples]
) -> Mixture:
    """Puts the examples of several sources together.

    Args:
      config: the mixture.
      sources: its sources.
      parts: the examples of each, loaded with the settings it is read with.
    """
    given = [source.weight for source in sources if source.weight is not None]
    shares = None
    if given:
        # As they are written: 0.1 is a tenth.
        weights = [Fraction(repr(weight)) for weight in given]
        shares = tuple(weight / sum(weights) for weight in weights)
    rows = [part.report.packed_rows or len(part) for part in parts]
    if config.packing and shares is None:
        lengths = np.concatenate([part.lengths for part in parts])
        packed_rows = len(pack(lengths, config.max_length))
    else:
        packed_rows = sum(rows) if config.packing else None
    of_each = [
        SourceReport(
            name=name_of(source.path),
            share=float(shares[i]) if shares else len(parts[i]) / sum(map(len, parts)),
            passes_per_epoch=float(shares[i] * sum(rows) / rows[i]) if shares else 1.0,
            report=parts[i].report,
        )
        for i, source in enumerate(sources)
    ]
    settings = {
        name: getattr(config, name)
        for name in ("max_length", "packing", "shuffle", "seed")
    }
    settings["shares"] = None if shares is None else [str(share) for share in shares]
    settings["sources"] = [part.report.fingerprint for part in parts]
    whole = json.dumps(settings, sort_keys=True)
    report = combined(
        of_each,
        packed_rows=packed_rows,
        max_length=config.max_length,
        supervised_per_example=quartiles(
            np.concatenate([part.supervised for part in parts])
        ),
        fingerprint=hashlib.sha256(whole.encode()).hexdigest(),
    )
    return Mixture(tuple(parts), shares, report)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Examples in rows of one length.

    Attributes:
      packing: which examples share a row; None with one in each.
      counts: rows of each source, one source after the other. A single source, and a
        mixture without shares, is one.
      shares: of each source in the rows of a run; None for one.
    """

    packing: Packing | None
    counts: tuple[int, ...]
    shares: tuple[Fraction, ...] | None


def lay_out(examples: Examples | Mixture, *, packing: bool, length: int) -> Layout:
    """Lays examples out in rows of `length` tokens; sources with shares apart."""
    shares = examples.shares if isinstance(examples, Mixture) else None
    if shares is None:
        packed = pack(examples.lengths, length) if packing else None
        count = len(examples) if packed is None else len(packed)
        return Layout(packed, (count,), None)
    assert isinstance(examples, Mixture)
    if not packing:
        return Layout(None, tuple(len(part) for part in examples.parts), shares)
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
    """The `p`-th row of a run -> its source, and how many of that source came before.

    Args:
      shares: of the sources, adding up to 1.
      seed: of the order inside a block.
      shuffle: whether there is a random order; else sources are spread evenly.
    """

    def __init__(self, shares: tuple[Fraction, ...], *, seed: int, shuffle: bool):
        # Large enough that a block never has less than none of a source: two whole
        # numbers differ from what they are rounded from by less than 1 each.
        self.block = max(_SMALLEST_BLOCK, math.ceil(4 / min(shares)))
        self._ends = tuple(itertools.accumulate(shares))

        @lru_cache(maxsize=2)
        def places(block: int) -> tuple[np.ndarray, np.ndarray]:
            before, after = self._counts(block), self._counts(block + 1)
            counts = after - before
            source = np.repeat(np.arange(len(shares)), counts)
            within = np.concatenate([np.arange(count) for count in counts.tolist()])
            if shuffle:
                keys = random_keys(seed, block, BLOCKS, self.block)
            else:
                keys = (within + 0.5) / counts[source]
            order = np.argsort(keys, kind="stable")
            source = source[order]
            # The rows of a source come in their order whatever the shuffle.
            index = np.empty(self.block, np.int64)
            for number, first in enumerate(before.tolist()):
                mine = source == number
                index[mine] = first + np.arange(int(mine.sum()))
            return source, index

        self._places = places

    def _counts(self, block: int) -> Int64[np.ndarray, " sources"]:
        """Rows that each source has had before a block."""
        rows = block * self.block
        ends = [math.floor(rows * end + Fraction(1, 2)) for end in self._ends]
        return np.diff(np.array([0, *ends], np.int64))

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Source of row `place`, and the number of earlier rows of that source."""
        block, at = divmod(place, self.block)
        source, index = self._places(block)
        return int(source[at]), int(index[at])


def random_keys(seed: int, period: int, stream: int, count: int) -> np.ndarray:
    """uint64 [count] to sort by: random, and the same under any version of numpy.

    The bit stream of Philox is fixed by numpy's compatibility promise (that of
    `Generator.permutation` is not), and a run must continue in the same order under a
    later numpy.

    Args:
      seed: of the run.
      period: an epoch, or a block.
      stream: 0 for a single source; else what is ordered.
      count: how many.
    """
    key = np.array([seed, period], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
