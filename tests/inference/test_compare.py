import dataclasses
import functools
import itertools
import json
import shutil
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert.peft import TRAINING_RECORD
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.inference.compare import (
    PROBE_TOKENS,
    check_plain,
    compare_logits,
    load_exact,
    probe_text,
    probe_tokens,
)
from qlora_jax.inference.identity import describe_adapter, trained_form
from qlora_jax.models.layers import Compute
from qlora_jax.nf4 import fingerprint_tree


def model(llama_dir, **changes):
    """A model whose tensors are changed: dotted path -> function of the array."""
    loaded = load_exact(llama_dir)
    leaves = dict(trees.walk(loaded.base))
    tree: dict = {}
    for path, leaf in leaves.items():
        change = changes.get("_".join(path), lambda leaf: leaf)
        trees.put(tree, path, jnp.asarray(change(leaf)))
    return dataclasses.replace(loaded, base=tree)


def test_a_model_equals_itself(llama_dir):
    tokens = probe_tokens(load_exact(llama_dir).config)
    load = functools.partial(load_exact, llama_dir)
    report = compare_logits(load_exact(llama_dir), load, tokens)
    assert report.pop("max_abs_logit") > 0.01
    zeros = dict.fromkeys(("max_abs_difference", "mean_kl", "max_kl"), 0.0)
    assert report == {"probe_tokens": PROBE_TOKENS, "same_top_token": 1.0, **zeros}


def test_figures_are_those_of_the_logits(llama_dir):
    first = model(llama_dir)
    second = model(llama_dir, lm_head_weight=lambda w: w * 3 + 1)
    tokens = probe_tokens(first.config)
    report = compare_logits(first, second, tokens)
    a, b = (np.asarray(m.logits(tokens)).reshape(-1, 32) for m in (first, second))
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (a, b))
    kl = (np.exp(p) * (p - q)).sum(1)
    assert report["max_abs_logit"] == pytest.approx(np.abs(a).max())
    assert report["max_abs_difference"] == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert report["mean_kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert report["max_kl"] == pytest.approx(kl.max(), rel=1e-4)
    same = (a.argmax(1) == b.argmax(1)).mean()
    assert report["same_top_token"] == pytest.approx(same)


def test_a_constant_added_to_all_logits_has_no_divergence(llama_dir):
    """KL sees distributions: a row that is the same in all tokens drops out."""
    shift = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    first, other = (
        model(llama_dir),
        model(llama_dir, lm_head_weight=lambda w: w + shift),
    )
    report = compare_logits(first, other, probe_tokens(first.config))
    assert report["max_abs_difference"] > 1
    assert report["max_kl"] < 1e-5
    assert report["same_top_token"] == 1.0


def test_the_first_model_is_freed_before_the_second_is_loaded(llama_dir):
    first = []

    def load():
        assert all(model() is None for model in first)
        loaded = load_exact(llama_dir)
        first.append(weakref.ref(loaded))
        return loaded

    compare_logits(load, load, probe_tokens(load_exact(llama_dir).config))
    assert len(first) == 2


def test_probe_tokens(llama_dir):
    config = load_exact(llama_dir).config
    tokens = probe_tokens(config)
    assert tokens.shape == (2, 64)
    assert tokens.dtype == np.int32
    assert 0 <= tokens.min() and tokens.max() < config.vocab_size
    # The same for good: a report of last year can be compared with one of today.
    assert tokens[0, :6].tolist() == [12, 15, 21, 0, 3, 27]
    np.testing.assert_array_equal(tokens, probe_tokens(config))
    short = dataclasses.replace(config, max_position_embeddings=16, vocab_size=100_000)
    ids = (99_999, 70_000, 70_000, 5)
    tokens = probe_tokens(short, ids)
    assert tokens.shape == (2, 16)
    assert set(ids) <= set(tokens.reshape(-1).tolist())
    assert set(range(16)) <= set(probe_tokens(short, range(1000)).reshape(-1).tolist())


def test_vocabularies_of_different_sizes_are_refused(llama_dir):
    first = model(llama_dir)
    config = dataclasses.replace(first.config, vocab_size=20)
    names = ("lm_head_weight", "model_embed_tokens_weight")
    second = model(llama_dir, **dict.fromkeys(names, lambda w: w[:20]))
    second = dataclasses.replace(second, config=config)
    with pytest.raises(UserError, match="vocabularies of 32 and 20 tokens"):
        compare_logits(first, second, probe_tokens(config))


@pytest.mark.real
def test_probe_texts(shared_data, llama_dir):
    path = shared_data / "stories260K"
    config = load_exact(path).config
    tokens = probe_text(path, config, "Once upon a time")
    assert tokens.shape[0] == 1 and 2 < tokens.shape[1] < 20
    long = probe_text(path, config, "Once upon a time " * 200)
    assert long.shape == (1, PROBE_TOKENS)
    config = dataclasses.replace(config, max_position_embeddings=7)
    assert probe_text(path, config, "Once upon a time " * 200).shape == (1, 7)
    with pytest.raises(UserError, match="has no tokenizer to read a probe text with"):
        probe_text(llama_dir, config, "text")


def test_a_probe_text_without_tokens_is_refused(monkeypatch, llama_dir):
    from qlora_jax.inference import compare

    def load_tokenizer(path):
        return lambda text, **_: {"input_ids": [[]] if isinstance(text, list) else []}

    monkeypatch.setattr(compare, "load_tokenizer", load_tokenizer)
    with pytest.raises(UserError, match="The probe text has no tokens"):
        probe_text(llama_dir, load_exact(llama_dir).config, "")


def test_custom_modules_are_refused(llama_dir):
    config = load_exact(llama_dir).config
    check_plain(config, llama_dir)
    custom = dataclasses.replace(config, extra_tensors={"model.gate.weight": (2, 2)})
    with pytest.raises(UserError, match=r"has custom modules \(model.gate.weight"):
        check_plain(custom, llama_dir)


# --- Loading, and what was trained on ---


def test_an_adapter_is_described_with_the_step_that_its_record_has(tmp_path):
    assert describe_adapter(tmp_path) == f"adapter `{tmp_path}`"
    (tmp_path / TRAINING_RECORD).write_text(json.dumps({"step": 1200}))
    assert describe_adapter(tmp_path) == f"adapter `{tmp_path}` (step 1,200)"


def rewritten(llama_dir, tmp_path, dtype, mixed=False):
    """The directory in another dtype; perhaps with one tensor left in float32."""
    path = shutil.copytree(llama_dir, tmp_path / np.dtype(dtype).name)
    tensors = {
        k: v if mixed and "layers.1.mlp.up" in k else v.astype(dtype)
        for k, v in safetensors.numpy.load_file(path / "model.safetensors").items()
    }
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def test_weights_keep_their_dtype(llama_dir, tmp_path):
    path = rewritten(llama_dir, tmp_path, ml_dtypes.bfloat16)
    loaded = load_exact(path)
    assert {x.dtype.name for x in jax.tree.leaves(loaded.base)} == {"bfloat16"}
    assert loaded.compute == Compute(dtype="float32", remat="none")
    tokens = probe_tokens(loaded.config)
    # Widened first or as they are used: the same numbers.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), loaded.base)
    report = compare_logits(loaded, dataclasses.replace(loaded, base=wide), tokens)
    assert report["max_abs_difference"] == 0
    packed = load_exact(path, quantization="nf4")
    assert 0 < compare_logits(loaded, packed, tokens)["max_kl"]


def test_layers_of_different_dtypes(llama_dir, tmp_path):
    path = rewritten(llama_dir, tmp_path, ml_dtypes.bfloat16, mixed=True)
    with pytest.raises(CheckpointError, match="mixes dtypes"):
        convert.load_llama(path, quantization=None)
    loaded = load_exact(path)
    assert {x.dtype.name for x in jax.tree.leaves(loaded.base)} == {"float32"}


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_every_form_a_base_is_trained_in_is_found(llama_dir, tmp_path, stored):
    path = rewritten(llama_dir, tmp_path, stored)
    for quantization, dtype in itertools.product(
        ("nf4", "nf4_dq", None), ("float32", "bfloat16", "float16", None)
    ):
        _, base = convert.load_llama(path, quantization=quantization, dtype=dtype)
        form = trained_form(path, fingerprint_tree(base))
        assert form == f"{quantization or 'none'}, {dtype or np.dtype(stored).name}"
    head = {"quantization": "nf4", "quantize_lm_head": True, "dtype": "bfloat16"}
    form = trained_form(path, fingerprint_tree(convert.load_llama(path, **head)[1]))
    assert form == "nf4 (lm_head too), bfloat16"
    assert trained_form(path, "0" * 64) is None


def test_a_4bit_base_and_one_beyond_float16(llama_dir, tmp_path):
    config, base = convert.load_llama(llama_dir, quantization="nf4_dq")
    base["model"]["norm"]["weight"] = base["model"]["norm"]["weight"] + np.float32(1e5)
    convert.save_llama(tmp_path / "packed", config, base)
    _, wide = convert.load_llama(tmp_path / "packed", dtype="bfloat16")
    form = trained_form(tmp_path / "packed", fingerprint_tree(wide))
    assert form == "4-bit, bfloat16"
    _, dense = convert.load_llama(llama_dir, quantization=None)
    assert trained_form(tmp_path / "packed", fingerprint_tree(dense)) is None
