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
