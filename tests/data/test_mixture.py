"""Several sources as one stream: shares, order, epochs, fingerprint."""

import dataclasses
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
from qlora_jax.errors import UserError

# Ids of a source begin with its own thousand, so that a token tells where it is from.
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
def test_a_batch_depends_on_its_index_alone(tmp_path, packing, shuffle, weights):
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
        for place in range(3 * stream.block):
            source, before = stream[place]
            assert before == counts[source]  # how many of that source came before
            counts[source] += 1
            if (place + 1) % stream.block == 0:
                for number, share in enumerate(shares):
                    assert abs(counts[number] - share * (place + 1)) <= 1


def test_unshuffled_sources_are_spread_evenly():
    stream = Interleaving((Fraction(3, 4), Fraction(1, 4)), seed=0, shuffle=False)
    sources = [stream[place][0] for place in range(stream.block)]
    gaps = np.diff(np.flatnonzero(sources))
    assert gaps.min() >= 3 and gaps.max() <= 5


@pytest.mark.parametrize("packing", [False, True])
def test_each_source_is_seen_whole_before_any_of_its_rows_again(tmp_path, packing):
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


def test_a_packed_row_of_a_weighted_source_holds_that_source_alone(tmp_path):
    batches = batches_of(tmp_path, packing=True, steps=40)
    for batch in batches:
        pairs = zip(batch["tokens"][0], batch["segment_ids"][0], strict=True)
        for row, segments in pairs:
            assert len(set((row[segments > 0] // 1000).tolist())) == 1


def test_the_report_says_what_each_source_gives(tmp_path):
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
    # The same shares, written otherwise, are the same run.
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


def test_a_source_has_settings_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "y"}')
    config = DataConfig(
        format="prompt_completion",
        prompt="{q}",
        completion="{a}",
        max_length=77,
        sources=(
            Source(path="a", completion="{b}"),
            Source(path="b", format="text", text="{body}", append_eos=False),
            Source(path="c", format="tokens", train_on="all"),
        ),
    )
    (_, first), (_, second), (_, third) = config.parts()
    assert (first.prompt, first.completion, first.max_length) == ("{q}", "{b}", 77)
    assert (second.format, second.text, second.prompt) == ("text", "{body}", None)
    assert (second.append_eos, third.append_eos) == (False, True)
    assert third.supervised == "all" and third.completion is None
    assert config.needs_tokenizer
    assert not dataclasses.replace(
        config, prompt=None, completion=None, sources=config.sources[2:]
    ).needs_tokenizer


def test_problems_of_all_sources_come_together(tmp_path):
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": (Source("a"),), "path": "b"}, "are both given"),
        (
            {"sources": (Source("a", 1.0), Source("b"))},
            "some sources have a `weight` and these have none: b",
        ),
        (
            {"sources": (Source("a", 1e-6), Source("b", 1.0))},
            "largest may be 100,000 times the smallest",
        ),
        (
            {"sources": (Source("a", format="messages", prompt="{x}"),)},
            "Source a: `data.prompt` is read by format='prompt_completion' only",
        ),
        (
            {"sources": (Source("a"),), "prompt": "{x}"},
            "`data.prompt` is read by none of the `data.sources`",
        ),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(UserError, match="`weight` of the source a must be a positive"):
        Source(path="a", weight=weight)


@pytest.mark.parametrize("path", ["", ()])
def test_a_source_has_a_path(path):
    with pytest.raises(UserError, match="`path` of a source must name a file"):
        Source(path=path)


def test_contradictions_of_the_settings_come_together():
    with pytest.raises(UserError) as error:
        DataConfig(path="", max_length=1, seed=-1, train_on="assistant", prompt="{q}")
    message = str(error.value)
    assert message.startswith("5 problems")
    for name in ("path", "max_length", "seed", "train_on", "prompt"):
        assert f"`data.{name}`" in message
