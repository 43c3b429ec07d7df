"""Lays examples out as rows, of one source or of several that are mixed by share.

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
from qlora_jax.data.packing import Packing, pack, packs
from qlora_jax.data.report import DataReport, SourceReport, combined

# Streams of `random_keys`. A source has the stream of its index, at most 65,534.
_BLOCK_STREAM = 2**16
HOLD_OUT_STREAM = _BLOCK_STREAM + 1
_SMALLEST_BLOCK = 256


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
    settings |= config.packing_order
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
    lengths = np.concatenate([part.lengths for part in parts])
    rows = list(map(len, parts))
    if packs(config.packing, lengths, config.max_length):
        # A source alone may have been too small to be packed.
        rows = [
            part.report.packed_rows
            or len(pack(part.lengths, config.max_length, in_order=not config.shuffle))
            for part in parts
        ]
    total = len(lengths)
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
        lengths,
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
    if not packs(config.packing, lengths, config.max_length):
        packed_rows = None
    elif packed_rows is None:
        in_order = not config.shuffle
        packed_rows = len(pack(lengths, config.max_length, in_order=in_order))
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


def lay_out(
    examples: AnyExamples, *, packing: bool, length: int, in_order: bool
) -> Layout:
    """Assigns examples to rows of `length` tokens; sources with shares separately.

    Args:
      examples: of one source or of several.
      packing: several examples share a row.
      length: of a row, in tokens.
      in_order: packed rows keep the order of the examples.
    """
    shares = examples.shares if isinstance(examples, Mixture) else None
    if shares is None:
        # Sources without shares may meet in one row, which wastes less.
        packed = None
        if packing:
            packed = pack(examples.lengths, length, in_order=in_order)
        count = len(examples) if packed is None else len(packed)
        return Layout(packed, (count,), None)
    assert isinstance(examples, Mixture)
    if not packing:
        return Layout(None, tuple(len(part) for part in examples.parts), shares)
    # Shares are of rows, so a row must belong to one source.
    each = [pack(part.lengths, length, in_order=in_order) for part in examples.parts]
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
