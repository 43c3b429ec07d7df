"""Held-out examples: which, how many, and that no copy of one is trained on."""

import dataclasses
import json

import numpy as np
import pytest

from qlora_jax.data.config import DataConfig, Source
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from qlora_jax.data.held_out import content_keys, hold_out
from qlora_jax.data.mixture import Mixture
from qlora_jax.errors import UserError


def rows(path, start, count, copies=1):
    """Writes examples that start with the tokens start, start + 1, ..."""
    lines = [
        json.dumps({"input_ids": [start + n, *range(2, 4 + n % 5)]})
        for n in range(count)
        for _ in range(copies)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def load(**settings):
    config = DataConfig(format="tokens", train_on="all", max_length=16, **settings)
    return config, load_examples(config, None, vocab_size=5000)


def firsts(examples):
    return [int(examples[i][0][0]) for i in range(len(examples))]


@pytest.mark.parametrize("cache", [None, "cache"])
@pytest.mark.parametrize("amount", [{"fraction": 0.29}, {"count": 29}])
def test_the_seed_decides_the_split_and_each_side_reports_its_arrays(
    tmp_path, amount, cache
):
    path, where = rows(tmp_path / "a.jsonl", 100, 100), cache and str(tmp_path / cache)
    config, examples = load(path=path, cache=where, seed=7)
    train, held = hold_out(config, examples, **amount, eos_token_id=2)
    assert len(held) == 29 and len(train) == 71  # 0.29 of 100 is not 28.999
    # Both sides together are all examples, each in the order of the file.
    trained, measured = firsts(train), firsts(held)
    assert sorted(trained + measured) == list(range(100, 200))
    assert trained == sorted(trained) and measured == sorted(measured)
    assert firsts(hold_out(config, examples, **amount)[1]) == measured
    reseeded = hold_out(dataclasses.replace(config, seed=8), examples, **amount)[1]
    assert firsts(reseeded) != measured
    # The report of each side agrees with its arrays.
    for side in (train, held):
        tokens, labels = zip(*(side[i] for i in range(len(side))), strict=True)
        lengths = [len(row) for row in tokens]
        supervised = [int((row != IGNORE).sum()) for row in labels]
        assert side.lengths.tolist() == lengths
        assert side.supervised.tolist() == supervised
        report = side.report
        assert (report.examples, report.tokens) == (len(side), sum(lengths))
        assert report.supervised_tokens == sum(supervised)
        assert report.supervised_eos == sum(int((row == 2).sum()) for row in labels)
        assert report.longest_example == max(lengths)
        assert side.used().tolist() == np.unique(np.concatenate(tokens)).tolist()
    prints = {e.report.fingerprint for e in (examples, train, held, reseeded)}
    assert len(prints) == 4


def test_no_copy_of_a_held_out_example_is_trained_on(tmp_path):
    config, examples = load(path=rows(tmp_path / "a.jsonl", 100, 30, copies=3))
    train, held = hold_out(config, examples, count=10)
    assert len(held) == 10
    assert not set(firsts(train)) & set(firsts(held))
    assert len(train) == 90 - 3 * len(set(firsts(held)))
    # The same tokens with other labels are another example.
    keys = content_keys(examples).tolist()
    assert len(set(keys)) == 30


def test_each_source_of_a_mixture_gives_its_part(tmp_path):
    sources = (
        Source(path=rows(tmp_path / "a.jsonl", 1000, 200), weight=1.0),
        Source(path=rows(tmp_path / "b.jsonl", 2000, 40), weight=3.0),
    )
    config, examples = load(sources=sources, packing=True)
    train, held = hold_out(config, examples, fraction=0.1)
    assert isinstance(train, Mixture) and isinstance(held, Mixture)
    counts = [sum(first // 1000 == s for first in firsts(held)) for s in (1, 2)]
    assert counts == [20, 4]
    assert sorted(firsts(train) + firsts(held)) == sorted(firsts(examples))
    # Training keeps the shares; the held-out examples have none.
    assert train.shares == examples.shares and held.shares is None
    assert train.report.examples == 216 and held.report.examples == 24


def test_a_split_with_an_empty_side_is_refused(tmp_path):
    config, examples = load(path=rows(tmp_path / "a.jsonl", 100, 5))
    for amount in ({"count": 5}, {"fraction": 0.1}):
        with pytest.raises(UserError, match="of 5 examples .* cannot be held out"):
            hold_out(config, examples, **amount)
    config, examples = load(path=rows(tmp_path / "b.jsonl", 100, 1, copies=5))
    with pytest.raises(UserError, match="is a copy of one that would be held out"):
        hold_out(config, examples, count=1)
    sources = (
        Source(path=rows(tmp_path / "c.jsonl", 1000, 50)),
        Source(path=rows(tmp_path / "d.jsonl", 2000, 1)),
    )
    config, examples = load(sources=sources)
    with pytest.raises(UserError, match=r"leaves nothing of the source .*d\.jsonl"):
        hold_out(config, examples, count=10)
