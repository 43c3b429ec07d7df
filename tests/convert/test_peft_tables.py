"""Tables of the base in an adapter's file, after a vocabulary has grown.

tests/peer/test_grown_vocabulary.py compares with PEFT; here are the rules, tensor by
tensor.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert.merging import merge
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import dequantize, quantize
from tests.convert.reference import PREFIX, WEIGHTS

EMBED, HEAD = "model.embed_tokens", "lm_head"
OLD, NEW = 100, 128  # rows before and after, padded
EMBEDDING, OUTPUT = ("model", "embed_tokens"), ("lm_head",)
# What is trained of the tables -> the name of the base's own in the file.
COPIES = {
    "nothing": ("weight", {}),
    "update": ("base_layer.weight", {"target_modules": (EMBED, HEAD, "q_proj")}),
    "rows": (
        "token_adapter.base_layer.weight",
        {"trainable_token_indices": {"embed_tokens": (3, OLD), "lm_head": (3, OLD)}},
    ),
    "all": ("original_module.weight", {"modules_to_save": ("embed_tokens", "lm_head")}),
}
equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def draw(tree, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(dtype), tree)


@pytest.fixture
def grown(tiny, tmp_path):
    """A function: kind, tied -> (base, grown base, adapter) that PEFT would save."""

    def make(kind, tied=False, dtype=np.float32, equal_tables=True):
        name, fields = COPIES[kind]
        config = LlamaConfig.from_hf(
            {**tiny, "vocab_size": OLD, "tie_word_embeddings": tied}
        )
        base = draw(model_params.abstract_base(config), dtype=dtype)
        larger = dataclasses.replace(config, vocab_size=NEW)
        tree = draw(model_params.abstract_base(larger), 1, dtype)
        for path in (EMBEDDING, OUTPUT)[: 1 if tied else 2]:
            old, new = (functools.reduce(dict.get, path, t) for t in (base, tree))
            new["weight"][:OLD] = old["weight"]
        lora = LoraConfig(**{"target_modules": ("q_proj",), "r": 2, **fields})
        adapters = draw(abstract_adapters(tree, lora), 2)
        out = tmp_path / "adapter"
        convert.save_adapter(out, lora, adapters, larger)
        file = safetensors.numpy.load_file(out / WEIGHTS)
        tables = {EMBED: tree["model"]["embed_tokens"]["weight"]}
        tables[HEAD] = tables[EMBED] if tied else tree["lm_head"]["weight"]
        if not equal_tables:
            tables[HEAD] = tables[HEAD] + np.ones((), dtype)
        for module, table in tables.items():
            file[f"{PREFIX}{module}.{name}"] = table
            if kind == "all":  # `save_embedding_layers` repeats it
                trained = file[f"{PREFIX}{module}.weight"]
                file[f"{PREFIX}{module}.modules_to_save.weight"] = trained
        safetensors.numpy.save_file(file, out / WEIGHTS)
        return (config, base), (larger, tree), (lora, adapters, out)

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", COPIES)
def test_a_base_grows_to_the_tables_of_the_file(grown, tmp_path, kind, tied):
    (config, base), (larger, tree), (lora, adapters, path) = grown(kind, tied)
    with pytest.raises(CheckpointError, match="of 128 tokens, and this base has 100"):
        convert.load_adapter(path, base)
    for like in (base, jax.tree.map(jnp.asarray, base)):
        got = convert.with_saved_tables(config, like, path, resize=True)
        assert got.config == larger
        equal(got.base["model"]["embed_tokens"], tree["model"]["embed_tokens"])
        assert tied or equal(got.base["lm_head"], tree["lm_head"])
        # What is trained is what was, and no table beside it.
        read, loaded = convert.load_adapter(path, got.base)
        equal(loaded, adapters)
        assert read.modules_to_save == lora.modules_to_save
    # From shapes too, as a run is prepared.
    shapes = model_params.abstract_base(config)
    abstract = convert.with_saved_tables(config, shapes, path, resize=True)
    expected = model_params.abstract_base(larger)
    assert jax.tree.map(jnp.shape, abstract.base) == jax.tree.map(jnp.shape, expected)
    # An adapter that is trained further holds the tables again.
    again = tmp_path / "again"
    convert.save_adapter(again, read, loaded, got.config, base_tables=got.tables)
    twice = convert.with_saved_tables(config, base, again, resize=True)
    equal(convert.load_adapter(again, twice.base)[1], adapters)
    if kind != "all":  # whose tables are all in the adapter
        equal(twice.base["model"]["embed_tokens"], tree["model"]["embed_tokens"])


@pytest.mark.parametrize("kind", ["nothing", "rows"])
def test_merging_grows_the_base_and_keeps_equal_tables_tied(grown, tmp_path, kind):
    (config, base), (larger, tree), (_, adapters, path) = grown(
        kind, True, ml_dtypes.bfloat16
    )
    convert.save_llama(tmp_path / "base", config, base)
    with pytest.raises(CheckpointError, match="--resize-to-adapter"):
        merge(tmp_path / "base", path, tmp_path / "merged")
    merge(tmp_path / "base", path, tmp_path / "merged", resize_to_adapter=True)
    got, merged = convert.load_llama(tmp_path / "merged", quantization=None)
    assert got.tie_word_embeddings and got.vocab_size == NEW
    want = tree["model"]["embed_tokens"]["weight"].copy()
    if kind == "rows":
        rows = adapters["model"]["embed_tokens"]["trainable_tokens_delta"]
        want[[3, OLD]] = rows.astype(want.dtype)
    np.testing.assert_array_equal(merged["model"]["embed_tokens"]["weight"], want)


def test_different_tables_untie_the_base(grown):
    (config, base), (_, tree), (_, _, path) = grown("nothing", True, equal_tables=False)
    got = convert.with_saved_tables(config, base, path, resize=True)
    assert not got.config.tie_word_embeddings
    table = tree["model"]["embed_tokens"]["weight"]
    np.testing.assert_array_equal(got.base["lm_head"]["weight"], table + 1)
    convert.load_adapter(path, got.base)


def test_tables_of_the_same_size_replace_those_of_the_base(grown):
    _, (larger, tree), (_, _, path) = grown("nothing")
    other = draw(tree, 5, np.float32)
    with pytest.raises(CheckpointError, match="replaces a table of the base"):
        convert.load_adapter(path, other)
    got = convert.with_saved_tables(larger, other, path)
    equal(got.base["lm_head"], tree["lm_head"])
    assert got.taken == (EMBEDDING, OUTPUT)
    convert.load_adapter(path, got.base)


def test_rows_that_no_file_has_are_means_and_named(grown):
    (config, base), _, (_, _, path) = grown("nothing")
    file = safetensors.numpy.load_file(path / WEIGHTS)
    del file[f"{PREFIX}{HEAD}.weight"]
    safetensors.numpy.save_file(file, path / WEIGHTS)
    got = convert.with_saved_tables(config, base, path, resize=True)
    (note,) = got.notes
    assert "has no rows of lm_head for its tokens 100 to 127" in note
    mean = base["lm_head"]["weight"].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(got.base["lm_head"]["weight"][OLD:], [mean] * 28, 1e-5)


def test_copies_that_disagree_and_a_packed_head_are_refused(grown):
    (config, base), _, (_, _, path) = grown("all")
    got = convert.with_saved_tables(config, base, path, resize=True)
    file = safetensors.numpy.load_file(path / WEIGHTS)
    file[f"{PREFIX}{HEAD}.modules_to_save.weight"][0] += 1
    safetensors.numpy.save_file(file, path / WEIGHTS)
    with pytest.raises(CheckpointError, match="are one tensor in PEFT and differ"):
        convert.load_adapter(path, got.base)
    packed = model_params.abstract_base(
        config, quantization="nf4", quantize_lm_head=True
    )
    with pytest.raises(UserError, match="head is quantized, and its vocabulary"):
        convert.with_saved_tables(config, packed, path, resize=True)


def test_old_rows_of_another_base_are_refused(grown):
    (config, base), _, (_, _, path) = grown("update")
    other = draw(base, 7)
    got = convert.with_saved_tables(config, other, path, resize=True)
    with pytest.raises(CheckpointError, match="100 of 128 rows differ by more than"):
        convert.load_adapter(path, got.base)


def test_a_head_in_4_bits_gets_the_table_of_the_file_in_4_bits(grown, tmp_path):
    _, (config, tree), (_, _, path) = grown("nothing")
    table = tree["lm_head"]["weight"]
    expected = np.asarray(dequantize(quantize(table, double_quant=False)))
    convert.save_llama(tmp_path / "dense", config, draw(tree, 5))
    packed = {"quantization": "nf4", "quantize_lm_head": True}
    base = convert.load_llama(tmp_path / "dense", **packed)[1]
    convert.save_llama(tmp_path / "packed", config, base)

    got = convert.with_saved_tables(config, base, path)
    head = got.base["lm_head"]["weight"]
    np.testing.assert_array_equal(np.asarray(dequantize(head)), expected)
    (note,) = got.notes
    assert f"the lm_head that `{path}` has for its base is quantized here" in note
    # What is trained further is saved with the table as it was.
    lora, adapters = convert.load_adapter(path, got.base)
    again = tmp_path / "again"
    convert.save_adapter(again, lora, adapters, config, base_tables=got.tables)
    saved = safetensors.numpy.load_file(again / WEIGHTS)[f"{PREFIX}{HEAD}.weight"]
    np.testing.assert_array_equal(saved, table)

    onto = {"onto": "dequantized"}
    report = merge(tmp_path / "packed", path, tmp_path / "a", **onto)
    assert note in report["notes"] and report["max_abs_change"] > 1
    merge(tmp_path / "dense", path, tmp_path / "b", **onto, **packed)
    for name in "ab":
        merged = convert.load_llama(tmp_path / name, quantization=None)[1]
        np.testing.assert_array_equal(merged["lm_head"]["weight"], expected)


def test_a_head_in_4_bits_is_not_merged_with_more_tokens(grown, tmp_path):
    (config, base), _, (_, _, path) = grown("nothing")
    convert.save_llama(tmp_path / "dense", config, base)
    packed = convert.load_llama(tmp_path / "dense", quantize_lm_head=True)
    convert.save_llama(tmp_path / "packed", *packed)
    options = {"onto": "dequantized", "resize_to_adapter": True}
    with pytest.raises(UserError, match="head is quantized, and its vocabulary"):
        merge(tmp_path / "packed", path, tmp_path / "merged", **options)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_tables_of_fewer_rows_than_the_base_has_are_compared(grown, change):
    """The base's own are used with `strict` false: they are padded further."""
    (_, base), (config, tree), (_, _, path) = grown("nothing")
    file = safetensors.numpy.load_file(path / WEIGHTS)
    for module in (EMBED, HEAD):
        file[f"{PREFIX}{module}.weight"] = file[f"{PREFIX}{module}.weight"][:OLD]
    file[f"{PREFIX}{HEAD}.weight"][3] += change
    safetensors.numpy.save_file(file, path / WEIGHTS)
    got = convert.with_saved_tables(config, tree, path)
    assert not got.taken
    with pytest.raises(CheckpointError, match=r"\[100, \d+\] instead of \[128, \d+\]"):
        convert.load_adapter(path, got.base)
    notes = []
    convert.load_adapter(path, got.base, strict=False, skipped=notes)
    rows = "1 of 100 rows differ by more" if change else "with the rows that this has"
    assert "the base's own table is used" in notes[1] and rows in notes[1]
