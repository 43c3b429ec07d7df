"""Packing, and several sources as one stream: shares, order, epochs, fingerprint."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from qlora_jax.data.batches import Batches, eval_batches
from qlora_jax.data.config import DataConfig, Source
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from qlora_jax.data.mixture import Interleaving, Mixture
from qlora_jax.data.packing import pack
from qlora_jax.errors import UserError

# Ids of source `s` start at 1000 * s, so that a token tells its source.
SIZES = (40, 7, 23)
PAD = 9_998


WEIGHTS = (0.5, 0.2, 0.3)
# The first token of each row, source after source.
FIRSTS = [
    1000 * source + row for source, size in enumerate(SIZES) for row in range(size)
]


@pytest.fixture
def mixture(tmp_path):
    """A function: weights, settings -> the examples of a mixture, and the settings."""

    def mixture(weights=WEIGHTS, sizes=SIZES, **config):
        rng = np.random.default_rng(5)
        sources = []
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            path = tmp_path / f"{source}.jsonl"
            lines = []
            for row in range(size):
                more = [1000 * source + 999] * int(rng.integers(1, 20))
                lines.append(json.dumps({"input_ids": [1000 * source + row, *more]}))
            path.write_text("\n".join(lines))
            sources.append(Source(path=str(path), weight=weight))
        options = {"format": "tokens", "train_on": "all", "max_length": 64}
        config = DataConfig(sources=tuple(sources), **options, **config)
        return load_examples(config, None, vocab_size=10_000), config

    return mixture


@pytest.fixture
def batches_of(mixture):
    """A function: weights, settings of batches and data -> batches of a mixture."""

    def batches_of(weights=WEIGHTS, batch_size=4, **config):
        ends = {key: config.pop(key) for key in ("steps", "epochs") if key in config}
        examples = mixture(weights, **config)
        return Batches(*examples, batch_size=batch_size, pad_token_id=PAD, **ends)

    return batches_of


def starts(batch):
    """First token of every example of a batch, row after row."""
    tokens, labels = batch["tokens"], batch["labels"]
    return tokens[(labels == IGNORE) & (tokens != PAD)].tolist()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("weights", [WEIGHTS, (None, None, None)])
def test_a_batch_depends_only_on_its_index(batches_of, packing, shuffle, weights):
    options = dict(packing=packing, shuffle=shuffle, seed=11)
    expected = list(batches_of(weights, steps=60, **options))
    assert len(expected) == 60
    resumed = batches_of(weights, **options)
    for index in np.random.default_rng(1).permutation(60).tolist():
        assert same(resumed[index], expected[index])
    other = batches_of(weights, **(options | {"seed": 12}))
    assert not shuffle or not all(same(other[i], expected[i]) for i in range(60))


@pytest.mark.parametrize("weights", [(5, 2, 3), (1, 1, 1), (0.9, 0.001, 0.1)])
def test_shares_are_kept_within_a_row_at_every_block(weights):
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = tuple(weight / sum(exact) for weight in exact)
    for shuffle in (False, True):
        stream = Interleaving(shares, seed=3, shuffle=shuffle)
        counts = Counter()
        for position in range(3 * stream.block):
            source, before = stream[position]
            assert before == counts[source]  # how many of that source came before
            counts[source] += 1
            if (position + 1) % stream.block == 0:
                for number, share in enumerate(shares):
                    assert abs(counts[number] - share * (position + 1)) <= 1


def test_unshuffled_sources_are_spread_evenly():
    stream = Interleaving((Fraction(3, 4), Fraction(1, 4)), seed=0, shuffle=False)
    sources = [stream[position][0] for position in range(stream.block)]
    gaps = np.diff(np.flatnonzero(sources))
    assert gaps.min() >= 3 and gaps.max() <= 5


@pytest.mark.parametrize("packing", [False, True])
def test_all_rows_of_a_source_are_seen_before_any_repeats(batches_of, packing):
    batches = batches_of(packing=packing, seed=2, steps=150)
    seen = Counter(start for batch in batches for start in starts(batch))
    for source, size in enumerate(SIZES):
        counts = [seen[1000 * source + row] for row in range(size)]
        assert min(counts) >= 2 and max(counts) - min(counts) <= 1, source


def test_without_weights_an_epoch_sees_every_row_once(batches_of):
    for packing in (False, True):
        batches = batches_of((None,) * 3, batch_size=1, packing=packing, epochs=1)
        seen = Counter(start for batch in batches for start in starts(batch))
        assert seen == Counter(FIRSTS)


def test_a_packed_row_never_joins_weighted_sources(batches_of):
    for batch in batches_of(packing=True, steps=40):
        pairs = zip(batch["tokens"][0], batch["segment_ids"][0], strict=True)
        for row, segments in pairs:
            assert len(set((row[segments > 0] // 1000).tolist())) == 1


def test_the_report_has_share_and_passes_of_each_source(mixture):
    examples, _ = mixture((2, 1, 1))
    assert isinstance(examples, Mixture)
    report = examples.report
    assert report.rows_read == report.rows_kept == len(examples) == sum(SIZES)
    assert [source.share for source in report.sources] == [0.5, 0.25, 0.25]
    # 70 rows an epoch: 35 of 40, 17.5 of 7, 17.5 of 23.
    passes = [source.passes_per_epoch for source in report.sources]
    np.testing.assert_allclose(passes, [35 / 40, 17.5 / 7, 17.5 / 23], rtol=1e-12)
    assert "50.0% of the rows, seen 0.875 times in an epoch" in report.summary()
    assert report.tokens == sum(source.report.tokens for source in report.sources)
    json.dumps(report.as_dict())


def test_examples_come_by_index_and_are_evaluated_in_order(mixture):
    examples, config = mixture()
    firsts = [int(examples[i][0][0]) for i in range(len(examples))]
    assert firsts == FIRSTS
    lengths = [len(examples[i][0]) for i in range(len(examples))]
    assert examples.lengths.tolist() == lengths
    seen = []
    for batch in eval_batches(examples, config, batch_size=8, pad_token_id=PAD):
        seen += batch["tokens"][(batch["labels"] != IGNORE).any(-1)][:, 0].tolist()
    assert seen == FIRSTS
    for index in (-1, len(examples)):
        with pytest.raises(IndexError, match=f"example {index} of 70"):
            examples[index]
    assert examples.used().tolist() == sorted({*FIRSTS, 999, 1999, 2999})


def test_the_fingerprint_follows_every_source_and_weight(mixture):
    def fingerprint(weights=WEIGHTS, **config):
        return mixture(weights, **config)[0].report.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    # Weights of the same shares give the same run.
    assert fingerprint((5, 2, 3)) == first
    others = [
        *(fingerprint((0.5, 0.3, 0.2)), fingerprint((None, None, None))),
        *(fingerprint(seed=1), fingerprint(shuffle=False), fingerprint(packing=True)),
        *(fingerprint(sizes=(40, 7, 22)), fingerprint(sizes=(39, 7, 23))),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_problems_of_all_sources_are_raised_together(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"tokens": [1, 2]}\n')
    sources = tuple(Source(path=str(tmp_path / f"{name}.jsonl")) for name in "abc")
    config = DataConfig(sources=sources, format="tokens", train_on="all")
    message = r"(?s)^3 problems.*a.jsonl:2.*b.jsonl:1: no field `input_ids`.*no file "
    with pytest.raises(UserError, match=rf"{message}.*c\.jsonl"):
        load_examples(config, None, vocab_size=9)


# --- packing ---


def naive_row_count(lengths, capacity):
    """Best fit decreasing, written as in the textbook."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [f for f in free if f >= length]
        if fitting:
            tightest = min(fitting)
            free[free.index(tightest)] -= length
        else:
            free.append(capacity - length)
    return len(free)


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_best_fit_decreasing_and_every_example_is_in_one_row(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 300))
    for lengths in (
        rng.integers(1, capacity + 1, int(rng.integers(1, 400))),
        np.clip(rng.lognormal(3, 1, 200).astype(np.int64), 1, capacity),
    ):
        packing = pack(lengths, capacity)
        assert sorted(packing.order.tolist()) == list(range(len(lengths)))
        rows = [packing[i] for i in range(len(packing))]
        assert np.concatenate(rows).tolist() == packing.order.tolist()
        assert all(1 <= lengths[row].sum() <= capacity for row in rows)
        assert packing.capacity == capacity
        # Ties may go to either of two equally full rows; the count is the same.
        assert len(packing) == naive_row_count(lengths.tolist(), capacity)


def test_packing_is_deterministic_and_equal_lengths_keep_their_order():
    packing = pack(np.array([3, 8, 5, 7, 5, 2]), 10)
    rows = sorted(sorted(packing[i].tolist()) for i in range(len(packing)))
    assert rows == [[0, 3], [1, 5], [2, 4]]
    assert pack(np.array([4, 4, 4, 4]), 8).order.tolist() == [0, 1, 2, 3]
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    first, second = pack(lengths, 64), pack(lengths.copy(), 64)
    np.testing.assert_array_equal(first.order, second.order)
    np.testing.assert_array_equal(first.starts, second.starts)
    assert len(pack(np.array([], np.int64), 8)) == 0


def test_a_hundred_thousand_examples_are_packed_tightly():
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64)
    packing = pack(np.clip(lengths, 1, 8192), 8192)
    assert lengths.clip(1, 8192).sum() / (len(packing) * 8192) > 0.99


@pytest.mark.parametrize("bad", [0, 9, -1])
def test_an_example_that_does_not_fit_a_row_is_refused(bad):
    with pytest.raises(UserError, match=rf"be in 1\.\.8 .* got {bad} for example 2"):
        pack(np.array([1, 8, bad]), 8)
