"""Examples kept out of training, to measure a run on what it has not seen.

The one idea: which examples those are is a function of the seed and of how many there
are, and of their content only where two are the same: a copy of a held-out example is
not trained on either, or the measure would be of what was learned by heart.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from qlora_jax.data.arrays import PIECE, Examples, quartiles
from qlora_jax.data.config import DataConfig
from qlora_jax.data.mixture import BLOCKS, Mixture, mix, pack, random_keys
from qlora_jax.data.report import SourceReport, combined
from qlora_jax.errors import UserError

# Of the random stream that chooses; sources and blocks have those below it.
_STREAM = BLOCKS + 1


@dataclasses.dataclass(frozen=True)
class ChosenExamples(Examples):
    """Some of the examples of an `Examples`, which stay where they are.

    Attributes:
      tokens: those of `whole`, the examples that were not chosen included.
      labels: likewise.
      offsets: int64 [examples + 1], sums of the lengths of those chosen.
      whole: what they were chosen from.
      rows: int64 [examples], their numbers there, ascending.
    """

    whole: Examples
    rows: Int64[np.ndarray, " examples"]

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Tokens and labels of one example."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.whole[int(self.rows[index])]

    def release(self) -> None:
        """Gives memory back that can be read again from disk."""
        self.whole.release()

    def _pieces(self, values: np.ndarray) -> Iterator[np.ndarray]:
        if values is self.offsets:
            yield from super()._pieces(values)
            return
        gathered, size = [], 0
        for row in self.rows.tolist():
            span = slice(self.whole.offsets[row], self.whole.offsets[row + 1])
            gathered.append(values[span])
            size += len(gathered[-1])
            if size >= PIECE:
                yield np.concatenate(gathered)
                gathered, size = [], 0
                self.release()
        if gathered:
            yield np.concatenate(gathered)


def content_keys(examples: Examples | Mixture) -> UInt64[np.ndarray, " examples"]:
    """uint64 [examples]: equal where tokens and labels are, and practically only there.

    Two examples of 64 random bits are mistaken for each other once in 10^7 runs of a
    million examples.
    """
    keys = np.empty(len(examples), np.uint64)
    for index in range(len(examples)):
        digest = hashlib.blake2b(digest_size=8)
        for values in examples[index]:
            digest.update(np.ascontiguousarray(values).data)
        keys[index] = int.from_bytes(digest.digest(), "little")
    return keys


def hold_out(
    config: DataConfig,
    examples: Examples | Mixture,
    *,
    fraction: float | None = None,
    count: int | None = None,
    eos_token_id: int | None = None,
) -> tuple[Examples | Mixture, Examples | Mixture]:
    """Splits examples into those to train on and those held out.

    Of a mixture each source gives its part. Chosen by `config.seed`, the same under
    any version of numpy.

    Args:
      config: what the examples were loaded with.
      examples: all of them.
      fraction: share of the examples to hold out, between 0 and 1; or
      count: how many.
      eos_token_id: the tokenizer's, for the report.

    Returns:
      Training examples without any copy of a held-out one, and the held-out ones in
      the order of the data. The fingerprints of both say what they hold.

    Raises:
      UserError: nothing would be held out, or nothing left to train on.
    """
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    total = len(examples)
    wanted = count if count is not None else int(total * (fraction or 0.0))
    if not 0 < wanted < total:
        asked = f"{count} examples" if count is not None else f"{fraction} of them"
        raise UserError(
            f"`eval`: of {total:,} examples {asked} cannot be held out; at least one "
            "has to be left for each side. Change `eval.fraction` or `eval.examples`, "
            "or give the evaluation a file of its own (`eval.path`)."
        )
    keys = np.concatenate(
        [
            random_keys(config.seed, source, _STREAM, len(part))
            for source, part in enumerate(parts)
        ]
    )
    # From each source in the proportion of its examples.
    places = np.concatenate([_ranks(keys[span]) for span in _spans(parts)])
    held = np.zeros(total, bool)
    held[np.lexsort((keys, places))[:wanted]] = True
    content = content_keys(examples)
    left = ~np.isin(content, content[held])
    if not left.any():
        raise UserError(
            f"`eval`: every one of the {total:,} examples is a copy of one that would "
            "be held out, so nothing is left to train on. Give the evaluation a file "
            "of its own (`eval.path`)."
        )
    if not isinstance(examples, Mixture):
        return (
            choose(config, examples, left, "training", eos_token_id),
            choose(config, examples, held, "held out", eos_token_id),
        )
    each = config.parts()
    sides: dict[str, list[tuple[int, Examples]]] = {"training": [], "held out": []}
    for number, (span, part) in enumerate(zip(_spans(parts), parts, strict=True)):
        for side, chosen in (("training", left[span]), ("held out", held[span])):
            if chosen.any():
                one = choose(each[number][1], part, chosen, side, eos_token_id)
                sides[side].append((number, one))
    if len(sides["training"]) < len(parts):
        there = {number for number, _ in sides["training"]}
        gone = next(n for n in range(len(parts)) if n not in there)
        raise UserError(
            f"`eval`: holding out {wanted:,} examples leaves nothing of the source "
            f"{each[gone][1].name} to train on. Hold out fewer, or give the "
            "evaluation a file of its own (`eval.path`)."
        )
    sources = [source for source, _ in each]
    return (
        mix(config, sources, [part for _, part in sides["training"]]),
        _side_by_side(
            config, [(each[n][1].name, part) for n, part in sides["held out"]]
        ),
    )


def _spans(parts: tuple[Examples, ...]) -> Iterator[slice]:
    start = 0
    for part in parts:
        yield slice(start, start + len(part))
        start += len(part)


def _ranks(keys: np.ndarray) -> np.ndarray:
    """Where each key comes when they are sorted, from 0 to 1."""
    ranks = np.empty(len(keys))
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return ranks / len(keys)


def choose(
    config: DataConfig,
    whole: Examples,
    chosen: Bool[np.ndarray, " examples"],
    purpose: str,
    eos_token_id: int | None = None,
) -> ChosenExamples:
    """The chosen examples of one source, with a report of their own.

    Args:
      config: what they were loaded with.
      whole: all of them.
      chosen: which.
      purpose: what for, so that two choices have different fingerprints.
      eos_token_id: the tokenizer's, to count those that are supervised.
    """
    rows = np.flatnonzero(chosen).astype(np.int64)
    lengths, supervised = whole.lengths[rows], whole.supervised[rows]
    packed = len(pack(lengths, config.max_length)) if config.packing else None
    total = int(lengths.sum())
    digest = hashlib.sha256(json.dumps([whole.report.fingerprint, purpose]).encode())
    digest.update(rows.astype("<i8").data)
    report = dataclasses.replace(
        whole.report,
        examples=len(rows),
        tokens=total,
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        longest_example=int(lengths.max()),
        packed_rows=packed,
        packing_efficiency=total / (packed * config.max_length) if packed else None,
        supervised_per_example=quartiles(supervised),
        fingerprint=digest.hexdigest(),
    )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    examples = ChosenExamples(
        whole.tokens, whole.labels, offsets, supervised, report, whole, rows
    )
    ends = sum(
        int((piece == eos_token_id).sum()) for piece in examples._pieces(whole.labels)
    )
    return dataclasses.replace(
        examples, report=dataclasses.replace(report, supervised_eos=ends)
    )


def _side_by_side(config: DataConfig, named: list[tuple[str, Examples]]) -> Mixture:
    """Examples of several sources, each once."""
    parts = [part for _, part in named]
    total = sum(map(len, parts))
    lengths = np.concatenate([part.lengths for part in parts])
    fingerprints = json.dumps([part.report.fingerprint for part in parts])
    report = combined(
        [
            SourceReport(name, len(part) / total, 1.0, part.report)
            for name, part in named
        ],
        packed_rows=len(pack(lengths, config.max_length)) if config.packing else None,
        max_length=config.max_length,
        supervised_per_example=quartiles(
            np.concatenate([part.supervised for part in parts])
        ),
        fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
    )
    return Mixture(tuple(parts), None, report)
