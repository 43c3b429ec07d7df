"""Packing, and several sources as one stream: shares, order, epochs, fingerprint."""

import json
import time
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


def write(tmp_path, sizes=SIZES):
    """A file for each source; row `n` of source `s` starts with 1000 * s + n."""
    rng = np.random.default_rng(5)
    paths = []
    for source, size in enumerate(sizes):
        path = tmp_path / f"{source}.jsonl"
        lines = []
        for row in range(size):
            more = rng.integers(1, 20)
            ids = [1000 * source + row, *([1000 * source + 999] * int(more))]
            lines.append(json.dumps({"input_ids": ids}))
        path.write_text("\n".join(lines))
        paths.append(str(path))
    return paths


def mixture(tmp_path, weights=(0.5, 0.2, 0.3), sizes=SIZES, **config):
    paths = write(tmp_path, sizes)
    sources = tuple(
        Source(path=path, weight=weight)
        for path, weight in zip(paths, weights, strict=True)
    )
    config = DataConfig(
        sources=sources, format="tokens", train_on="all", max_length=64, **config
    )
    return load_examples(config, None, vocab_size=10_000), config


def batches_of(tmp_path, weights=(0.5, 0.2, 0.3), batch_size=4, sizes=SIZES, **config):
    ends = {key: config.pop(key) for key in ("steps", "epochs") if key in config}
    examples, config = mixture(tmp_path, weights, sizes, **config)
    return Batches(examples, config, batch_size=batch_size, pad_token_id=PAD, **ends)


def starts(batch):
    """First token of every example of a batch, row after row."""
    tokens, labels = batch["tokens"], batch["labels"]
    return tokens[(labels == IGNORE) & (tokens != PAD)].tolist()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), (None, None, None)])
def test_a_batch_depends_only_on_its_index(tmp_path, packing, shuffle, weights):
    options = dict(packing=packing, shuffle=shuffle, seed=11)
    expected = list(batches_of(tmp_path, weights, steps=60, **options))
    resumed = batches_of(tmp_path, weights, **options)
    for index in np.random.default_rng(1).permutation(60).tolist():
        assert same(resumed[index], expected[index])
    other = batches_of(tmp_path, weights, **(options | {"seed": 12}))
    assert not shuffle or not all(same(other[i], expected[i]) for i in range(60))


@pytest.mark.parametrize("weights", [(5, 2, 3), (1, 1, 1), (0.9, 0.001, 0.1)])
def test_shares_are_kept_within_a_row_at_every_block(tmp_path, weights):
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
def test_all_rows_of_a_source_are_seen_before_any_repeats(tmp_path, packing):
    batches = batches_of(tmp_path, packing=packing, seed=2, steps=150)
    seen = Counter(start for batch in batches for start in starts(batch))
    for source, size in enumerate(SIZES):
        counts = [seen[1000 * source + row] for row in range(size)]
        assert min(counts) >= 2 and max(counts) - min(counts) <= 1, source


def test_without_weights_an_epoch_sees_every_row_once(tmp_path):
    for packing in (False, True):
        batches = batches_of(
            tmp_path, (None,) * 3, batch_size=1, packing=packing, epochs=1
        )
        seen = Counter(start for batch in batches for start in starts(batch))
        rows = [1000 * s + row for s, size in enumerate(SIZES) for row in range(size)]
        assert seen == Counter(rows)


def test_a_packed_row_never_joins_weighted_sources(tmp_path):
    batches = batches_of(tmp_path, packing=True, steps=40)
    for batch in batches:
        pairs = zip(batch["tokens"][0], batch["segment_ids"][0], strict=True)
        for row, segments in pairs:
            assert len(set((row[segments > 0] // 1000).tolist())) == 1


def test_the_report_has_share_and_passes_of_each_source(tmp_path):
    examples, _ = mixture(tmp_path, (2, 1, 1))
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


def test_examples_come_by_index_and_are_evaluated_in_order(tmp_path):
    examples, config = mixture(tmp_path)
    firsts = [int(examples[i][0][0]) for i in range(len(examples))]
    expected = [1000 * s + row for s, size in enumerate(SIZES) for row in range(size)]
    assert firsts == expected
    np.testing.assert_array_equal(
        examples.lengths, [len(examples[i][0]) for i in range(len(examples))]
    )
    seen = []
    for batch in eval_batches(examples, config, batch_size=8, pad_token_id=PAD):
        seen += batch["tokens"][(batch["labels"] != IGNORE).any(-1)][:, 0].tolist()
    assert seen == expected
    for index in (-1, len(examples)):
        with pytest.raises(IndexError, match=f"example {index} of 70"):
            examples[index]
    assert examples.used().tolist() == sorted({*expected, 999, 1999, 2999})


def test_the_fingerprint_follows_every_source_and_weight(tmp_path):
    def fingerprint(weights=(0.5, 0.2, 0.3), **config):
        return mixture(tmp_path, weights, **config)[0].report.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    # Weights of the same shares give the same run.
    assert fingerprint((5, 2, 3)) == first
    others = [
        fingerprint((0.5, 0.3, 0.2)),
        fingerprint((None, None, None)),
        fingerprint(seed=1),
        fingerprint(shuffle=False),
        fingerprint(packing=True),
        fingerprint(sizes=(40, 7, 22)),
        fingerprint(sizes=(39, 7, 23)),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_problems_of_all_sources_are_raised_together(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"tokens": [1, 2]}\n')
    sources = tuple(
        Source(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")
    )
    config = DataConfig(sources=sources, format="tokens", train_on="all")
    with pytest.raises(UserError) as error:
        load_examples(config, None, vocab_size=9)
    message = str(error.value)
    assert message.startswith("3 problems")
    for part in ("a.jsonl:2", "b.jsonl:1: no field `input_ids`", "no file", "c.jsonl"):
        assert part in message


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
def test_every_example_is_in_exactly_one_row_and_no_row_overflows(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 300))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 400)))
    packing = pack(lengths, capacity)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    rows = [packing[i] for i in range(len(packing))]
    assert np.concatenate(rows).tolist() == packing.order.tolist()
    assert all(1 <= lengths[row].sum() <= capacity for row in rows)
    assert packing.capacity == capacity


@pytest.mark.parametrize("seed", range(20))
def test_it_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(100 + seed)
    capacity = int(rng.integers(10, 200))
    lengths = np.clip(rng.lognormal(3, 1, 200).astype(np.int64), 1, capacity)
    packing = pack(lengths, capacity)
    # Ties may go to either of two equally full rows; the count is the same.
    assert len(packing) == naive_row_count(lengths.tolist(), capacity)


def test_examples_that_complement_each_other_share_a_row():
    packing = pack(np.array([3, 8, 5, 7, 5, 2]), 10)
    rows = sorted(sorted(packing[i].tolist()) for i in range(len(packing)))
    assert rows == [[0, 3], [1, 5], [2, 4]]


def test_packing_is_deterministic_and_equal_lengths_keep_their_order():
    assert pack(np.array([4, 4, 4, 4]), 8).order.tolist() == [0, 1, 2, 3]
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    first, second = pack(lengths, 64), pack(lengths.copy(), 64)
    np.testing.assert_array_equal(first.order, second.order)
    np.testing.assert_array_equal(first.starts, second.starts)


def test_no_examples_give_no_rows():
    assert len(pack(np.array([], np.int64), 8)) == 0


def test_a_hundred_thousand_examples_take_a_couple_of_seconds():
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64)
    start = time.perf_counter()
    packing = pack(np.clip(lengths, 1, 8192), 8192)
    assert time.perf_counter() - start < 5  # 0.1 s on one quiet core
    assert lengths.clip(1, 8192).sum() / (len(packing) * 8192) > 0.99


@pytest.mark.parametrize("bad", [0, 9, -1])
def test_an_example_that_does_not_fit_a_row_is_refused(bad):
    with pytest.raises(UserError, match=rf"be in 1\.\.8 .* got {bad} for example 2"):
        pack(np.array([1, 8, bad]), 8)
