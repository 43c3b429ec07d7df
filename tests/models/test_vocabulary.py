"""Untrained, repaired and new rows of the vocabulary tables."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
from qlora_jax.errors import UserError
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models import vocabulary
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.vocabulary import (
    add_tokens,
    repair_rows,
    report_untrained,
    untrained_rows,
)
from qlora_jax.nf4 import NF4Tensor

V, D = 40, 16
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def table(dtype=np.float32, seed=0):
    values = np.random.default_rng(seed).standard_normal((V, D))
    return values.astype(np.float32).astype(dtype)


def bare(function):
    """The function past the type checks of the tests."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# --- Detection ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_zero_tiny_equal_and_broken_rows_are_untrained(dtype, kind, chunk, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK", chunk)
    rows = table(dtype)
    rows[3] = 0
    rows[5] = rows[5] * np.asarray(1e-4, dtype)
    rows[[8, 20, 21, 39]] = rows[8]  # four equal rows, far apart
    rows[[30, 31]] = rows[30]  # two: a copy made on purpose
    rows[33, 2] = np.nan
    rows[34, 2] = np.inf
    mask = untrained_rows(kind(rows))
    assert mask.shape == (V,) and mask.dtype == bool
    assert np.flatnonzero(mask).tolist() == [3, 5, 8, 20, 21, 33, 34, 39]


def test_thresholds_are_arguments():
    rows = table()
    rows[3] = 1e-20
    rows[5] *= 0.05
    rows[[30, 31]] = rows[30]
    assert np.flatnonzero(untrained_rows(rows)).tolist() == [3]
    assert np.flatnonzero(untrained_rows(rows, tiny=0.1)).tolist() == [3, 5]
    assert np.flatnonzero(untrained_rows(rows, alike=2)).tolist() == [3, 30, 31]
    assert np.flatnonzero(untrained_rows(rows, eps=0.0, tiny=0.0)).tolist() == []


def test_zeros_are_untrained_even_if_most_rows_are_zero():
    rows = np.zeros((V, D), np.float32)
    assert untrained_rows(rows).all()
    rows[[4, 9]] = table()[:2]
    assert np.flatnonzero(~untrained_rows(rows)).tolist() == [4, 9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_nearly_equal_are_untrained(dtype):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3000, 64)).astype(np.float32)
    noise = 1e-3 * rng.standard_normal((40, 64))
    rows[100:140] = rows[100] + noise
    rows[200:203] = rows[200] + noise[:3]  # three may be copies
    mask = untrained_rows(rows.astype(dtype))
    assert np.flatnonzero(mask).tolist() == list(range(100, 140))
    exact = untrained_rows(rows, near=0.0)
    assert not exact.any()


def test_what_a_small_trained_model_never_saw_is_found(shared_data):
    """Its end of text and nearly all bytes: 168 rows within 5e-4 of that of </s>."""
    _, base = convert.load_llama(shared_data / "stories260K", quantization=None)
    rows = base["model"]["embed_tokens"]["weight"]
    mask = untrained_rows(rows)
    assert mask.sum() == 169 and mask[2] and not mask[1]
    assert not mask[259:].any()  # the words and letters


@pytest.mark.parametrize("name", ["babyllama-char105"])
def test_no_row_of_a_trained_model_counts_as_untrained(shared_data, name):
    _, base = convert.load_llama(shared_data / name, quantization=None)
    rows = base["model"]["embed_tokens"]["weight"]
    assert not untrained_rows(rows).any()
    assert not untrained_rows(rows.astype(ml_dtypes.bfloat16)).any()
    # With room: the docstring's figure.
    size = np.abs(rows).max(axis=1)
    assert size.min() > 0.4 * np.median(size)


# --- Reports and repairs ---


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, llama_dir):
    """(config, base) with rows 4 and 9 untrained, and 11 in an untied head."""
    config, base = convert.load_llama(llama_dir, quantization="nf4_dq")
    base["model"]["embed_tokens"]["weight"][[4, 9]] = 0
    if request.param:
        config = dataclasses.replace(config, tie_word_embeddings=True)
        del base["lm_head"]
    else:
        base["lm_head"]["weight"][[9, 11]] = 0
    return config, jax.tree.map(jnp.asarray, base)


def tables(base):
    nodes = {**base["model"], **base}
    return {n: nodes[n]["weight"] for n in ("embed_tokens", "lm_head") if n in nodes}


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_report_lists_untrained_rows_of_tokens_that_are_used(model):
    _, base = model
    untied = "lm_head" in base
    report = report_untrained(base, [9, 2, 9, 11, 5])
    head = {"lm_head": (9, 11)} if untied else {}
    assert report.rows == {"embed_tokens": (9,), **head}
    assert report.untrained == dict.fromkeys(report.rows, 2)
    assert report.token_ids == ((9, 11) if untied else (9,))
    said = "lm_head: 2 of 2 untrained rows belong to tokens that are used: 9, 11."
    assert (said in str(report)) == untied
    assert "embed_tokens: 1 of 2 untrained rows" in str(report)
    for word in ("repair_rows", "convert.save_llama", "trainable_token_indices"):
        assert word in str(report)
    clean = report_untrained(base, np.asarray([[1, 2], [3, 5]]))
    assert clean.token_ids == () and clean.trainable_token_indices is None
    assert str(clean) == "Every token that is used has trained rows."
    assert report_untrained(base, []).token_ids == ()
    assert report_untrained(base, range(32), tiny=2.0).token_ids == tuple(range(32))


def test_a_long_report_is_cut():
    report = vocabulary.UntrainedReport(
        {"embed_tokens": tuple(range(25))}, {"embed_tokens": 30}
    )
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 15 more." in str(report)


def test_the_rows_can_be_trained_with_the_indices_of_the_report(model):
    report = report_untrained(model[1], [9, 11, 3])
    base, indices = repair_rows(model[1], report.rows), report.trainable_token_indices
    lora = LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=indices)
    adapters = init_adapters(jax.random.key(0), base, lora)
    nodes = {**adapters["model"], **adapters}
    # The adapter starts from, and will carry, the repaired rows.
    for name, ids in report.rows.items():
        start = nodes[name]["trainable_tokens_delta"]
        equal(start, tables(base)[name][jnp.asarray(ids)])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_repaired_rows_are_the_mean_of_the_trained_ones(model, kind):
    base = jax.tree.map(kind, model[1])
    before = jax.tree.map(np.array, base)
    new = repair_rows(base, [9, 3])
    for name, old in tables(before).items():
        got = tables(new)[name]
        assert type(got) is type(tables(base)[name]) and got.dtype == old.dtype
        trained = ~untrained_rows(old)
        trained[[9, 3]] = False
        want = np.array(old)
        want[[9, 3]] = old[trained].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
    # Pure, and all else is shared.
    equal(base, before)
    assert all(new["model"][n] is base["model"][n] for n in ("layers", "norm"))


def test_rows_are_repaired_by_table_and_from_another_token(model):
    _, base = model
    new = repair_rows(base, {"embed_tokens": [4]}, how=7)
    want = np.array(tables(base)["embed_tokens"])
    want[4] = want[7]
    equal(tables(new)["embed_tokens"], want)
    assert new.get("lm_head") is base.get("lm_head")
    assert repair_rows(base, {"embed_tokens": ()}) == base
    # In bf16, rounded once.
    narrow = tables(base)["embed_tokens"].astype(jnp.bfloat16)
    new = repair_rows({"model": {"embed_tokens": {"weight": narrow}}}, [4])
    mean = np.delete(np.asarray(narrow, np.float32), [4, 9], axis=0).mean(axis=0)
    equal(tables(new)["embed_tokens"][4], mean.astype(ml_dtypes.bfloat16))


def test_a_repair_ends_the_report_and_survives_saving(shared_data, tmp_path):
    source = shared_data / "babyllama-char105"
    config, base = convert.load_llama(source, quantization=None)
    base["model"]["embed_tokens"]["weight"][[60, 61]] = 0
    report = report_untrained(base, range(50, 70))
    assert report.rows == {"embed_tokens": (60, 61)}
    repaired = repair_rows(base, report.rows)
    assert report_untrained(repaired, range(105)).token_ids == ()
    convert.save_llama(tmp_path / "base", config, repaired)
    _, again = convert.load_llama(tmp_path / "base", quantization=None)
    equal(again, repaired)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (repair_rows, [[3, 32]], "Token 32 has no row in `embed_tokens`, which"),
        (report_untrained, [[-1]], "Token -1 has no row .*0 to 31.*`add_tokens`"),
        (repair_rows, [{"head": [1]}], "names the table 'head'; .* {last}"),
        (report_untrained, [jnp.ones(1)], "Token ids must be integers, got float32"),
        (repair_rows, [[3], 99], "Token 99 has no row in `embed_tokens`"),
        (repair_rows, [[3], "zero"], "`how` must be 'mean' or a token id, got 'zero'"),
    ],
)
def test_invalid_rows_are_refused(model, function, arguments, message):
    last = list(tables(model[1]))[-1]
    with pytest.raises(UserError, match=message.replace("{last}", last)):
        bare(function)(model[1], *arguments)


def test_a_mean_of_no_trained_rows_is_refused():
    empty = {"model": {"embed_tokens": {"weight": np.zeros((4, 2), np.float32)}}}
    with pytest.raises(UserError, match="`embed_tokens` has no trained row"):
        repair_rows(empty, [1])


# --- New tokens ---


@pytest.mark.parametrize("how", ["mean", "zero", 7])
@pytest.mark.parametrize(
    "size, count, step, vocab",
    [
        *[(32, 3, None, 35), (32, 1, 16, 48)],
        # Rows 28 to 31 are padding: used first, none of the mean's, and never cut off.
        *[(28, 2, None, 32), (28, 6, None, 34), (28, 2, 24, 32)],
        # A tokenizer that is larger than the table: its tokens get means.
        *[(34, 0, None, 34), (34, 2, None, 36)],
    ],
)
def test_new_tokens_get_rows_and_old_ones_stay(model, size, count, step, vocab, how):
    config, base = model
    sizes = {"tokenizer_size": size, "count": count, "pad_to_multiple_of": step}
    larger, new = add_tokens(config, base, how=how, **sizes)
    assert larger == dataclasses.replace(config, vocab_size=vocab)
    assert larger.raw["vocab_size"] == vocab and config.raw["vocab_size"] == 32
    assert larger.to_hf() == {**config.to_hf(), "vocab_size": vocab}
    for name, old in tables(base).items():
        got, old = tables(new)[name], np.asarray(old)
        assert got.shape == (vocab, 64) and got.dtype == old.dtype
        trained = ~untrained_rows(old)
        trained[size:] = False
        mean = old[trained].mean(axis=0)
        want = np.concatenate([old, np.tile(mean, (vocab - 32, 1))])
        want[size : size + count] = {"mean": mean, "zero": 0, 7: old[7]}[how]
        exact = np.arange(vocab) < 32
        exact[size : size + count] = how != "mean"
        assert (np.abs(got - want).max(axis=1) <= np.where(exact, 0, 1e-7)).all()
    assert new["model"]["layers"] is base["model"]["layers"]
    weight = new["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert isinstance(weight, NF4Tensor)


def test_the_larger_model_computes_the_same_and_is_written(model, tmp_path):
    config, base = model
    larger, new = add_tokens(
        config, base, tokenizer_size=32, count=1, pad_to_multiple_of=16
    )
    before, after = (
        Llama(c, Compute("float32")).apply({"params": b}, jnp.asarray([[1, 5, 7, 2]]))
        for c, b in (model, (larger, new))
    )
    np.testing.assert_allclose(after[..., :32], before, atol=1e-6)
    # Neither a new token nor padding is the likeliest: a mean logit is below the top.
    assert (after[..., 32:].max(-1) < before.max(-1)).all()
    module = Llama(larger, Compute("float32"))
    (row,) = generate_tokens(module, {"params": new}, [[32, 47]], max_new_tokens=2)
    assert len(row) == 4
    convert.save_llama(tmp_path / "larger", larger, new)
    read, again = convert.load_llama(tmp_path / "larger", quantization="nf4_dq")
    assert read.vocab_size == 48
    equal(again, new)


def test_numpy_tables_stay_numpy(llama_dir):
    config, base = convert.load_llama(llama_dir, quantization=None, dtype="bfloat16")
    _, new = add_tokens(config, base, tokenizer_size=30, count=4)
    for name, got in tables(new).items():
        assert isinstance(got, np.ndarray) and got.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got[:30], tables(base)[name][:30])
    assert not np.array_equal(tables(base)["lm_head"][30], tables(new)["lm_head"][30])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokenizer_size": 0}, "`tokenizer_size` must be an integer of at least 1"),
        ({"count": -1}, "`count` must be an integer of at least 0, got -1"),
        ({"count": True}, "`count` must be an integer of at least 0, got True"),
        ({"pad_to_multiple_of": -8}, "`pad_to_multiple_of` must be an integer of at"),
        ({"how": "random"}, "`how` must be 'mean', 'zero' or a token id, got 'random'"),
        ({"how": 32}, "Token 32 has no row in `embed_tokens`"),
    ],
)
def test_invalid_sizes_are_refused(model, settings, message):
    config, base = model
    arguments = {"tokenizer_size": 32, "count": 1, **settings}
    with pytest.raises(UserError, match=message):
        bare(add_tokens)(config, base, **arguments)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_tokenizer_size_that_leaves_out_special_tokens_is_refused(model, name):
    config, base = model
    special = (2, 30) if name == "eos_token_id" else 30
    config = dataclasses.replace(config, **{name: special})
    message = rf"=29 leaves out the model's `{name}`=30, .*`len\(tokenizer\)`"
    with pytest.raises(UserError, match=message):
        add_tokens(config, base, tokenizer_size=29, count=1)
    assert add_tokens(config, base, tokenizer_size=31, count=1)[0] == config


def test_a_configuration_fits_its_base_and_may_have_no_file(model):
    config, base = model
    other = dataclasses.replace(config, vocab_size=31)
    with pytest.raises(UserError, match="`embed_tokens` has 32 rows, and .* is 31"):
        add_tokens(other, base, tokenizer_size=31, count=1)
    made = dataclasses.replace(config, raw={})
    larger, _ = add_tokens(made, base, tokenizer_size=32, count=1)
    assert larger.raw == {} and larger.to_hf()["vocab_size"] == 33
