"""Batches by index: order, epochs, packing, prefetching, evaluation."""

import dataclasses
import itertools
import json
import math
import threading
import time
from collections import Counter

import numpy as np
import pytest

from qlora_jax.data.batches import Batches, eval_batches, prefetch
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError

PAD = 7


@pytest.fixture
def make(tmp_path):
    """A function: lengths -> examples whose tokens all differ, and their settings."""

    def make(lengths, **config):
        path = tmp_path / "rows.jsonl"
        cuts = np.cumsum([1000, *lengths]).tolist()
        rows = [list(range(*ends)) for ends in itertools.pairwise(cuts)]
        path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
        config = DataConfig(path=str(path), format="tokens", train_on="all", **config)
        return load_examples(config, None, vocab_size=cuts[-1]), config

    return make


@pytest.fixture
def batches_of(make):
    """A function: lengths, batch size and settings -> their batches."""

    def batches_of(lengths, batch_size=2, accumulation_steps=1, **config):
        options = {key: config.pop(key) for key in ("steps", "epochs") if key in config}
        options |= {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
        return Batches(*make(lengths, **config), pad_token_id=PAD, **options)

    return batches_of


def first_tokens(batch):
    return batch["tokens"][..., 0].ravel().tolist()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("packing", "count", "packed"),
    [
        *[("auto", 656, True), ("auto", 600, False)],  # 65 and 59 packed rows
        *[(True, 20, True), (False, 656, False)],
    ],
)
def test_rows_are_packed_unless_too_few_are_left(make, packing, count, packed):
    lengths = [10] * (count - 1) + [60]
    examples, config = make(lengths, packing=packing, max_length=100)
    batches = Batches(examples, config, batch_size=2, pad_token_id=PAD)
    assert ("segment_ids" in batches[0]) == packed
    assert (examples.report.packed_rows is not None) == packed
    assert batches.sequence_length == (100 if packed else 64)


def test_full_rows_are_not_packed(make):
    batches = Batches(*make([62] * 200, max_length=640), batch_size=2, pad_token_id=PAD)
    assert "segment_ids" not in batches[0] and batches.sequence_length == 64


LENGTHS = np.random.default_rng(0).integers(2, 60, 37).tolist()


# --- order ---


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (2, 7)])
@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_sees_every_row_once(batches_of, sizes, packing):
    batches = batches_of(LENGTHS, *sizes, packing=packing, max_length=64)
    count, size = batches.rows_per_epoch, math.prod(sizes)
    assert count == 37 or packing
    stream = [t for i in range(-(-4 * count // size)) for t in first_tokens(batches[i])]
    epochs = [stream[e * count : (e + 1) * count] for e in range(4)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len(set(epochs[0])) == count
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each in its own order


def test_without_shuffling_the_files_order_is_kept(batches_of):
    batches = batches_of([2, 3, 4], 2, shuffle=False)
    firsts = [first_tokens(batches[i]) for i in range(3)]
    assert firsts == [[1000, 1002], [1005, 1000], [1002, 1005]]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([2, 9, 5, 3, 10, 4, 4, 4], [[0], [1], [2, 3], [4], [5, 6], [7]]),
        ([10, 2, 2, 2], [[0], [1, 2, 3]]),
        ([3, 3, 4, 10, 2], [[0, 1, 2], [3], [4]]),
    ],
)
def test_without_shuffling_packed_rows_keep_the_order_too(make, lengths, rows):
    # Best fit decreasing begins with the longest examples, whatever their place.
    examples, config = make(lengths, packing=True, max_length=10, shuffle=False)
    batches = Batches(examples, config, batch_size=1, pad_token_id=PAD)
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    seen = []
    for index in range(batches.rows_per_epoch):
        batch = batches[index]
        tokens = batch["tokens"][batch["segment_ids"] > 0]
        seen.append(list(dict.fromkeys(numbers[tokens - 1000].tolist())))
    assert seen == rows and examples.report.packed_rows == len(rows)
    shuffled = dataclasses.replace(config, shuffle=True)
    assert load_examples(shuffled, None, vocab_size=2000).report.packed_rows <= len(
        rows
    )


def test_the_seed_chooses_the_order_and_its_order_never_changes(batches_of):
    batches = [batches_of(LENGTHS, 37, seed=seed)[0] for seed in (0, 1, 2**64 - 1)]
    assert len({tuple(first_tokens(batch)) for batch in batches}) == 3
    # A run must continue in the same order under every numpy.
    batches = batches_of([2] * 8, 8, seed=5)
    orders = [[(t - 1000) // 2 for t in first_tokens(batches[i])] for i in (0, 1)]
    assert orders == [[2, 4, 3, 1, 5, 0, 6, 7], [7, 4, 5, 1, 6, 0, 2, 3]]


def test_fewer_rows_than_a_batch_repeat(batches_of):
    batches = batches_of([2, 3], 5, 2, epochs=3)
    assert batches.steps_per_epoch == 0.2 and len(batches) == 1
    seen = Counter(first_tokens(batches[0]))
    assert seen == {1000: 5, 1002: 5}


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (2, 19), (0.5, 5), (0.01, 1)])
def test_epochs_are_rounded_up_to_a_full_batch(batches_of, epochs, steps):
    batches = batches_of(LENGTHS, 2, 2, epochs=epochs)
    assert batches.steps_per_epoch == 9.25
    assert len(batches) == steps


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_counts_what_is_not_padding(batches_of, packing):
    batches = batches_of(LENGTHS, 3, 2, packing=packing, max_length=64, epochs=2)
    for index in range(len(batches)):
        assert batches.tokens(index) == (batches[index]["tokens"] != PAD).sum()


def test_batches_end_after_their_steps(batches_of):
    batches = batches_of([2, 3], steps=2)
    assert len(batches) == len(list(batches)) == 2
    with pytest.raises(IndexError, match="batch 2 of 2"):
        batches[2]
    endless = batches_of([2, 3])
    endless[10_000]
    with pytest.raises(TypeError, match="no end; set `steps` or `epochs`"):
        len(endless)
    with pytest.raises(IndexError, match="batch -1 of endlessly many"):
        endless[-1]


# --- contents ---


@pytest.mark.parametrize(
    ("longest", "max_length", "expected"),
    [(10, 1024, 64), (64, 1024, 64), (65, 1024, 128), (65, 100, 100), (40, 40, 40)],
)
def test_rows_are_as_long_as_the_longest_example_needs(
    batches_of, longest, max_length, expected
):
    batches = batches_of([2, longest, 3], max_length=max_length)
    assert batches.sequence_length == expected
    assert {batches[i]["tokens"].shape for i in range(5)} == {(1, 2, expected)}


def test_an_unpacked_row_is_its_example_and_padding(batches_of):
    batches = batches_of([3, 5], 1, 2, max_length=8, shuffle=False)
    batch = batches[0]
    assert batch.keys() == {"tokens", "labels"}
    assert all(array.dtype == np.int32 for array in batch.values())
    assert batch["tokens"].tolist() == [
        [[1000, 1001, 1002, 7, 7, 7, 7, 7]],
        [[1003, 1004, 1005, 1006, 1007, 7, 7, 7]],
    ]
    assert batch["labels"].tolist() == [
        [[-100, 1001, 1002, *[-100] * 5]],
        [[-100, 1004, 1005, 1006, 1007, *[-100] * 3]],
    ]


def test_a_packed_row_restarts_positions_and_labels_in_every_example(batches_of):
    batches = batches_of([2, 5], 1, max_length=8, packing=True, shuffle=False)
    batch = {key: array[0, 0].tolist() for key, array in batches[0].items()}
    assert batch == {
        "tokens": [1000, 1001, 1002, 1003, 1004, 1005, 1006, 7],
        "labels": [-100, 1001, -100, 1003, 1004, 1005, 1006, -100],
        "positions": [0, 1, 0, 1, 2, 3, 4, 0],
        "segment_ids": [1, 1, 2, 2, 2, 2, 2, 0],
    }
    assert batches.sequence_length == 8 and batches.rows_per_epoch == 1


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_and_doubles_no_token(make, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 100, 300).tolist()
    examples, config = make(lengths, packing=True, max_length=100, seed=seed)
    packed = Batches(examples, config, batch_size=1, pad_token_id=PAD, epochs=1)
    tokens, supervised = [], 0
    for batch in packed:
        row = {key: array[0, 0] for key, array in batch.items()}
        supervised += (row["labels"] != IGNORE).sum()
        documents = int(row["segment_ids"].max())
        for segment in range(1, documents + 1):
            inside = np.flatnonzero(row["segment_ids"] == segment)
            assert (np.diff(inside) == 1).all()
            assert row["positions"][inside].tolist() == list(range(len(inside)))
            assert row["labels"][inside[0]] == IGNORE
            tokens.append(row["tokens"][inside].tolist())
        padding = row["segment_ids"] == 0
        assert (row["tokens"][padding] == PAD).all()
        assert (row["labels"][padding] == IGNORE).all()
        assert (row["positions"][padding] == 0).all()
    expected = [examples[i][0].tolist() for i in range(len(examples))]
    assert sorted(tokens) == expected
    assert supervised == examples.report.supervised_tokens == sum(lengths) - 300
    assert len(packed) == examples.report.packed_rows


# --- prefetch ---


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_gives_the_same_batches_in_order(batches_of):
    batches = batches_of(LENGTHS, steps=20)
    for start, stop in ((0, 20), (7, 20), (19, 20), (5, 5)):
        ahead = list(prefetch(batches, start, stop))
        assert len(ahead) == stop - start
        assert all(same(a, batches[i]) for i, a in enumerate(ahead, start))
    assert not threads()


class Numbered:
    """Batches that hold their index; records which are made."""

    def __init__(self, bad_index=None):
        self.made, self._bad_index = [], bad_index

    def __getitem__(self, index):
        if index == self._bad_index:
            raise UserError(f"row {index} is bad")
        self.made.append(index)
        return {"tokens": np.array([index], np.int32)}


def test_prefetch_works_ahead_by_its_depth():
    batches = Numbered()
    stream = prefetch(batches, 0, 100, depth=3)
    assert batches.made == []  # nothing runs before the first batch is due
    next(stream)
    deadline = time.monotonic() + 10
    while len(batches.made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert batches.made == [0, 1, 2, 3]
    stream.close()


def test_prefetch_raises_where_the_batch_is_due():
    seen = []
    with pytest.raises(UserError, match="row 3 is bad"):
        for batch in prefetch(Numbered(bad_index=3), 0, 10):
            seen.append(int(batch["tokens"][0]))
    assert seen == [0, 1, 2] and not threads()
    with pytest.raises(UserError, match="`depth` must be a positive integer, got 0"):
        prefetch(Numbered(), 0, 1, depth=0)


def test_prefetch_ends_when_the_consumer_stops(batches_of):
    batches = batches_of(LENGTHS)
    stream = prefetch(batches, 0, 10**9)
    assert same(next(stream), batches[0])
    assert threads()
    stream.close()
    assert not threads()


# --- evaluation ---


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_sees_every_example_once_in_order(make, packing, batch_size):
    examples, config = make(LENGTHS, max_length=64, packing=packing)
    options = {"batch_size": batch_size, "pad_token_id": PAD}
    batches = list(eval_batches(examples, config, **options))
    assert {b["tokens"].shape for b in batches} == {(batch_size, 64)}
    labels = np.concatenate([b["labels"] for b in batches])
    tokens = np.concatenate([b["tokens"] for b in batches])
    assert (labels != IGNORE).sum() == examples.report.supervised_tokens
    real = np.sort(tokens[tokens >= 1000])
    assert real.tolist() == examples.tokens.tolist()
    filled = (labels != IGNORE).any(axis=1)
    assert filled.tolist() == sorted(filled.tolist(), reverse=True)
    assert (tokens[~filled] == PAD).all()
    if packing:
        segments = np.concatenate([b["segment_ids"] for b in batches])
        assert (segments[~filled] == 0).all()
    else:
        assert filled.sum() == 37
        assert tokens[filled, 0].tolist() == [examples[i][0][0] for i in range(37)]


def test_evaluation_can_take_the_training_length(make):
    examples = make([2, 3])
    options = {"batch_size": 2, "pad_token_id": PAD}
    (batch,) = eval_batches(*examples, **options, sequence_length=256)
    assert batch["tokens"].shape == (2, 256)
    with pytest.raises(UserError, match="rows of 2 tokens cannot hold .* 3 tokens"):
        eval_batches(*examples, **options, sequence_length=2)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"accumulation_steps": 0}, "`accumulation_steps` must be a positive integer"),
        ({"steps": 0}, "`steps` must be a positive integer, got 0"),
        ({"epochs": 0}, "`epochs` must be a positive number, got 0"),
        ({"epochs": float("inf")}, "`epochs` must be a positive number, got inf"),
        ({"steps": 1, "epochs": 1}, r"`steps` \(= 1\) or `epochs` \(= 1\), not both"),
        ({"pad_token_id": -1}, "`pad_token_id` must be a token id, got -1. Any id"),
    ],
)
def test_bad_sizes_are_refused(make, arguments, message):
    examples = make([2, 3])
    with pytest.raises(UserError, match=message):
        Batches(*examples, **{"batch_size": 1, "pad_token_id": 0} | arguments)
    with pytest.raises(UserError, match="`batch_size` must be a positive integer"):
        eval_batches(*examples, batch_size=-1, pad_token_id=0)


def test_a_config_with_shorter_rows_than_the_examples_is_refused(make):
    examples, config = make([2, 30])
    shorter = DataConfig(path=config.path, format="tokens", max_length=16)
    with pytest.raises(UserError, match="rows of 16 tokens cannot hold .* 30 tokens"):
        Batches(examples, shorter, batch_size=1, pad_token_id=0)
