"""Holds examples out of training, to measure a run on unseen data.

Which examples are held out depends on the seed and on the number of examples. Their
content matters only for copies: a copy of a held-out example is not trained on, because
the loss would then measure memorization.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from qlora_jax.data.arrays import CHUNK, Examples
from qlora_jax.data.config import DataConfig
from qlora_jax.data.mixture import (
    HOLD_OUT_STREAM,
    AnyExamples,
    Mixture,
    concatenate,
    count_examples,
    mix,
    random_keys,
)
from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ExampleSubset(Examples):
    """A selection from `Examples`, without a copy of the arrays.

    Attributes:
      tokens: the tokens of `parent`, including examples that are not selected.
      labels: likewise.
      offsets: int64 [examples + 1], sums of the lengths of the selected examples.
      parent: the examples that were selected from.
      rows: int64 [examples], indices in `parent`, ascending.
    """

    parent: Examples
    rows: Int64[np.ndarray, " examples"]

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Returns tokens and labels of one example."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.parent[int(self.rows[index])]

    def release(self) -> None:
        """Frees memory that can be read from disk again."""
        self.parent.release()

    def _chunks(self, values: np.ndarray) -> Iterator[np.ndarray]:
        if values is self.offsets:
            yield from super()._chunks(values)
            return
        gathered, size = [], 0
        for row in self.rows.tolist():
            span = slice(self.parent.offsets[row], self.parent.offsets[row + 1])
            gathered.append(values[span])
            size += len(gathered[-1])
            if size >= CHUNK:
                yield np.concatenate(gathered)
                gathered, size = [], 0
                self.release()
        if gathered:
            yield np.concatenate(gathered)


def content_keys(examples: AnyExamples) -> UInt64[np.ndarray, " examples"]:
    """Hashes each example: uint64 [examples], equal for equal tokens and labels.

    With 64 bits, different examples collide in one of about 4 * 10^7 data sets of a
    million examples.
    """
    keys = np.empty(len(examples), np.uint64)
    for index in range(len(examples)):
        digest = hashlib.blake2b(digest_size=8)
        # Tokens and labels have one length, so no separator is needed.
        for values in examples[index]:
            digest.update(np.ascontiguousarray(values).data)
        keys[index] = int.from_bytes(digest.digest(), "little")
    return keys


def hold_out(
    config: DataConfig,
    examples: AnyExamples,
    *,
    fraction: float | None = None,
    count: int | None = None,
    eos_token_id: int | None = None,
) -> tuple[AnyExamples, AnyExamples]:
    """Splits examples into training and held-out ones.

    Of a mixture, each source contributes in proportion to its examples. The choice
    depends on `config.seed` and is the same under any version of numpy.

    Args:
      config: the config that the examples were loaded with.
      examples: all examples.
      fraction: share of the examples to hold out, between 0 and 1; or
      count: number of examples to hold out.
      eos_token_id: EOS of the tokenizer, for the report.

    Returns:
      Training examples without any copy of a held-out one, and the held-out examples,
      both in the order of the data. Their fingerprints cover the choice.

    Raises:
      UserError: nothing would be held out, or nothing would be left to train on.
    """
    total = len(examples)
    # The share as written in decimals: in binary, 0.29 of 100 is 28.999...
    share = Fraction(repr(float(fraction or 0.0)))
    held_count = count if count is not None else int(total * share)
    if not 0 < held_count < total:
        part = f"{count} examples" if count is not None else f"{fraction} of them"
        raise UserError(
            f"`eval`: of {total:,} examples {part} cannot be held out; at least one "
            "has to be left for each side. Change `eval.fraction` or `eval.examples`, "
            "or give the evaluation a file of its own (`eval.path`)."
        )
    held = _choose_held(config.seed, examples, held_count)
    keys = content_keys(examples)
    # Held-out examples themselves, and every other example with their content.
    training = ~np.isin(keys, keys[held])
    if not training.any():
        raise UserError(
            f"`eval`: every one of the {total:,} examples is a copy of one that would "
            "be held out, so nothing is left to train on. Give the evaluation a file "
            "of its own (`eval.path`)."
        )
    if isinstance(examples, Mixture):
        return _split_mixture(config, examples, training, held, eos_token_id)
    return (
        _select(config, examples, training, "training", eos_token_id),
        _select(config, examples, held, "held out", eos_token_id),
    )


def _choose_held(
    seed: int, examples: AnyExamples, count: int
) -> Bool[np.ndarray, " examples"]:
    """Chooses examples at random, from each source in proportion to its examples.

    Random keys alone would draw a random number from each source. Their ranks within a
    source, scaled to 0..1, are spread evenly: the examples of rank below `x` are a
    share `x` of every source. Keys break the ties between sources.
    """
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    keys = [
        random_keys(seed, source, HOLD_OUT_STREAM, len(part))
        for source, part in enumerate(parts)
    ]
    ranks = np.concatenate([_scaled_ranks(part_keys) for part_keys in keys])
    held = np.zeros(len(examples), bool)
    # `lexsort` sorts by its last key first: by rank, then by random key.
    held[np.lexsort((np.concatenate(keys), ranks))[:count]] = True
    return held


def _scaled_ranks(keys: np.ndarray) -> np.ndarray:
    # The inverse of the sorting permutation.
    ranks = np.empty(len(keys))
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return ranks / len(keys)


def _split_mixture(
    config: DataConfig,
    examples: Mixture,
    training: Bool[np.ndarray, " examples"],
    held: Bool[np.ndarray, " examples"],
    eos_token_id: int | None,
) -> tuple[Mixture, Mixture]:
    train_parts, held_parts, held_names = [], [], []
    for span, part, settings in zip(
        _spans(examples.parts), examples.parts, config.each, strict=True
    ):
        if not training[span].any():
            raise UserError(
                f"`eval`: holding out {int(held.sum()):,} examples leaves nothing of "
                f"the source {settings.name} to train on. Hold out fewer, or give the "
                "evaluation a file of its own (`eval.path`)."
            )
        train_parts.append(
            _select(settings, part, training[span], "training", eos_token_id)
        )
        if held[span].any():
            held_names.append(settings.name)
            held_parts.append(
                _select(settings, part, held[span], "held out", eos_token_id)
            )
    return mix(config, train_parts), concatenate(config, held_names, held_parts)


def _spans(parts: tuple[Examples, ...]) -> Iterator[slice]:
    start = 0
    for part in parts:
        yield slice(start, start + len(part))
        start += len(part)


def _select(
    config: DataConfig,
    examples: Examples,
    mask: Bool[np.ndarray, " examples"],
    purpose: str,
    eos_token_id: int | None,
) -> ExampleSubset:
    """Selects examples of one source and reports on them.

    Args:
      config: the config that they were loaded with.
      examples: all examples of the source.
      mask: selects them.
      purpose: part of the fingerprint.
      eos_token_id: EOS of the tokenizer, to count where it is supervised.
    """
    rows = np.flatnonzero(mask).astype(np.int64)
    lengths, supervised = examples.lengths[rows], examples.supervised[rows]
    # The parent's fingerprint stands for the content, the rows for the choice.
    digest = hashlib.sha256(json.dumps([examples.report.fingerprint, purpose]).encode())
    digest.update(rows.astype("<i8").data)
    subset = ExampleSubset(
        tokens=examples.tokens,
        labels=examples.labels,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        supervised=supervised,
        report=examples.report,
        parent=examples,
        rows=rows,
    )
    report = dataclasses.replace(
        examples.report,
        **count_examples(config, lengths, supervised),
        supervised_eos=subset.count_label(eos_token_id),
        fingerprint=digest.hexdigest(),
    )
    return dataclasses.replace(subset, report=report)
