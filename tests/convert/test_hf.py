import dataclasses
import inspect
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
from convert.checkpoint import open_checkpoint, open_model
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import NF4Tensor, fingerprint_tree, quantize
from tests.convert.reference import (
    MODEL,
    equal_arrays,
    read,
    same_file,
)

BF16 = ml_dtypes.bfloat16
DENSE = (
    *("golden/llama32/fp32", "golden/llama2/fp32_sharded", "golden/llamabias/fp32"),
    *("data/stories260K", "data/babyllama-char105"),
)
PACKED = (
    *("golden/llama32/nf4", "golden/llama32/nf4_dq", "golden/llama2/nf4"),
    *("data/stories260K-bnb-nf4", "data/stories260K-bnb-nf4-dq"),
    "data/babyllama-char105-bnb-nf4-dq",
)


def all_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    files = open_model(path)
    return {
        k: (files[k].dtype, files[k].shape, files.read_bytes(k).tobytes())
        for k in files
    }


# --- Laws ---


@pytest.mark.real
@pytest.mark.golden
@pytest.mark.parametrize("name", [*DENSE, *PACKED])
def test_load_then_save_gives_equal_bytes_for_every_tensor(shared, tmp_path, name):
    source, out = shared / name, tmp_path / "out"
    config, base = convert.load_llama(source, quantization=None)
    convert.save_llama(out, config, base, tokenizer_from=source)
    assert all_bytes(out) == all_bytes(source)
    assert read(out) == read(source)
    companions = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for file in (*companions, MODEL):
        assert not (source / file).exists() or same_file(source, out, file)
    if name in PACKED:
        # Packed weights stay, whatever `quantization` says.
        for quantization in ("nf4", "nf4_dq"):
            _, again = convert.load_llama(source, quantization=quantization)
            assert equal_arrays(again, base)


@pytest.mark.golden
@pytest.mark.parametrize(
    "dense, packed",
    [
        ("golden/llama32/fp32", "golden/llama32/nf4"),
        ("golden/llama2/fp32_sharded", "golden/llama2/nf4"),
        ("data/stories260K", "data/stories260K-bnb-nf4"),
    ],
)
def test_quantizing_gives_the_bytes_of_bitsandbytes(shared, dense, packed):
    _, ours = convert.load_llama(shared / dense, quantization="nf4")
    _, theirs = convert.load_llama(shared / packed)
    assert equal_arrays(ours, theirs)


@pytest.mark.golden
def test_double_quantization_differs_from_bitsandbytes_only_in_scales(golden):
    _, ours = convert.load_llama(golden / "llama32/fp32", quantization="nf4_dq")
    theirs = dict(trees.walk(convert.load_llama(golden / "llama32/nf4_dq")[1]))
    for path, leaf in trees.walk(ours):
        if model_params.is_projection(path):
            other = theirs[path]
            np.testing.assert_array_equal(leaf.codes, other.codes)
            np.testing.assert_array_equal(leaf.nested_quant_map, other.nested_quant_map)
            # Their mean is summed in another order, their coder is not nearest.
            np.testing.assert_allclose(
                leaf.nested_offset, other.nested_offset, rtol=2e-7
            )


RANDOM = [
    dict(hidden_size=16, intermediate_size=7, head_dim=6, num_hidden_layers=1),
    dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3),
    dict(hidden_size=40, intermediate_size=33, attention_bias=True, mlp_bias=True),
    dict(hidden_size=8, vocab_size=5, tie_word_embeddings=True, num_hidden_layers=11),
    dict(hidden_size=320, intermediate_size=192, num_key_value_heads=4),
]


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", None])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("changes", RANDOM)
def test_every_tensor_is_in_its_array_and_only_projections_are_quantized(
    tiny, make_tensors, save_model, tmp_path, changes, dtype, quantization
):
    raw = {**tiny, **changes}
    tensors = make_tensors(raw, dtype)
    path = save_model(raw, tensors, shards=1 if quantization else 3)
    config, base = convert.load_llama(path, quantization=quantization)
    leaves, double = dict(trees.walk(base)), quantization == "nf4_dq"
    assert set(leaves) == set(model_params.shapes(config))
    for key, value in tensors.items():
        where, layer = trees.parse_key(key)
        got = leaves[where] if layer is None else leaves[where][layer]
        if quantization is not None and model_params.is_projection(where):
            value = quantize(value, double_quant=double)
        assert equal_arrays(got, value)
    out, again = tmp_path / "out", tmp_path / "again"
    convert.save_llama(out, config, base, max_shard_bytes=4000)
    config2, base2 = convert.load_llama(out, quantization=None)
    assert config2 == config and equal_arrays(base, base2)
    if quantization is not None:
        assert config2.quantization_config["bnb_4bit_use_double_quant"] == double
    convert.save_llama(again, config2, base2)
    assert all_bytes(again) == all_bytes(out)


def test_trees_on_devices_are_saved_alike(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model, quantization="nf4_dq")
    on_device = jax.tree.map(jnp.asarray, base)
    convert.save_llama(tmp_path / "a", config, base)
    convert.save_llama(tmp_path / "b", config, on_device)
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    assert fingerprint_tree(base) == fingerprint_tree(on_device)


# --- dtype ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
def test_dtype_casts_what_stays_dense_and_nothing_else(make_model, stored, dtype):
    path = make_model(dtype=stored)
    kept = dict(trees.walk(convert.load_llama(path)[1]))
    for where, leaf in trees.walk(convert.load_llama(path, dtype=dtype)[1]):
        expected = kept[where]
        if isinstance(leaf, NF4Tensor):
            # The same codes and scales, of weights in this dtype.
            expected = dataclasses.replace(expected, dtype=dtype)
        else:
            expected = expected.astype(dtype)
        assert equal_arrays(leaf, expected)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_quantized_weights_are_values_of_the_dtype_they_are_loaded_in(
    make_model, tmp_path, dtype
):
    path = make_model(dtype=BF16)
    for source in (path, tmp_path / "packed"):
        config, base = convert.load_llama(source, quantization="nf4", dtype=dtype)
        weight = base["model"]["layers"]["mlp"]["up_proj"]["weight"]
        # Those of a 4-bit directory are what they were packed from.
        assert weight.dtype == ("bfloat16" if source != path or not dtype else dtype)
        if source == path:
            _, stored = convert.load_llama(path, quantization="nf4")
            convert.save_llama(tmp_path / "packed", config, stored)


def test_layers_of_different_dtypes_need_a_dtype(make_model):
    key = "model.layers.1.self_attn.q_proj.weight"
    path = make_model(lambda t: t.update({key: t[key].astype(BF16)}))
    with pytest.raises(CheckpointError, match=r"mixes dtypes.*q_proj.weight.*`dtype`"):
        convert.load_llama(path)
    for options in ({"quantization": None, "dtype": "bfloat16"}, {"dtype": "float32"}):
        _, base = convert.load_llama(path, **options)
        weight = base["model"]["layers"]["self_attn"]["q_proj"]["weight"]
        assert weight.dtype == options["dtype"]


def test_save_casts_and_says_so_in_config_json(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model, quantization=None)
    convert.save_llama(tmp_path / "out", config, base, dtype="bfloat16")
    raw = read(tmp_path / "out")
    assert raw["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in raw
    _, expected = convert.load_llama(tiny_model, quantization=None, dtype="bfloat16")
    _, got = convert.load_llama(tmp_path / "out", quantization=None)
    assert equal_arrays(got, expected)


# --- What is refused ---


@pytest.mark.parametrize("name", ["int8", "", "NF4"])
def test_unknown_quantization(tiny_model, name):
    with pytest.raises(UserError, match=r"`quantization`='.*' is not supported; expe"):
        # Without the check of annotations that tests put around every function.
        inspect.unwrap(convert.load_llama)(tiny_model, quantization=name)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16"])
def test_unknown_dtype(tiny_model, tmp_path, dtype):
    match = f"`dtype`='{dtype}' is not supported; expected"
    with pytest.raises(UserError, match=match):
        convert.load_llama(tiny_model, dtype=dtype)
    config, base = convert.load_llama(tiny_model)
    with pytest.raises(UserError, match=match):
        convert.save_llama(tmp_path / "out", config, base, dtype=dtype)


def test_a_message_lists_everything_wrong(make_model):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 64), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 40), np.float32)
        tensors["lm_head.weight"] = np.zeros((24, 64), np.int8)

    with pytest.raises(CheckpointError) as caught:
        convert.load_llama(make_model(change))
    for part in (
        "1 missing tensors: model.norm.weight",
        "2 tensors that this model does not have: "
        "model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight [64, 40] instead of [40, 64]",
        "lm_head.weight I8 instead of F32, BF16, F16",
    ):
        assert part in str(caught.value)


# What Meta's original release calls the tensors.
META_NAMES = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def meta_name(key):
    *_, module, weight = key.split(".")
    if ".layers." in key:
        return f"layers.{key.split('.')[2]}.{META_NAMES[module]}.{weight}"
    tables = {"embed_tokens": "tok_embeddings", "lm_head": "output"}
    return f"{tables.get(module, module)}.{weight}"


@pytest.mark.parametrize(
    ("rename", "fields", "cause"),
    [
        (lambda k: f"module.{k}", {}, "a `module.` that is extra.*all 21 names fit"),
        (lambda k: f"_orig_mod.{k}", {}, "torch.compile.*all 21 names fit"),
        (lambda k: k.replace("mlp", "module.mlp"), {}, "6 names.*a `module.`.*all 21"),
        (lambda k: f"model.{k}", {}, "one `model.` is extra.*all 21 names fit"),
        (lambda k: f"transformer.{k}", {}, "`transformer.` is extra.*all 21 names fit"),
        (
            lambda k: k.replace("model.layers", "layers"),
            {},
            "`model.` is missing, and with it all 21 names fit",
        ),
        (meta_name, {}, "the original format of Meta's.*convert_llama_weights_to_hf"),
        (lambda k: f"base_model.model.{k}", {}, "with an adapter around the model"),
        (
            lambda k: k.replace("q_proj.", "q_proj.base_layer."),
            {},
            "with an adapter around the model",
        ),
        (lambda k: k.replace("lm_head", "v_head"), {}, "reward, value or class"),
        (lambda k: k, {"num_hidden_layers": 9}, "`num_hidden_layers` is 9"),
        (lambda k: k, {"vocab_size": 999}, r"tables have \d+ rows \(`vocab_size`\)"),
        (
            lambda k: k.replace("lm_head.weight", "model.rotary_emb.inv_freq"),
            {},
            "`tie_word_embeddings` is not set",
        ),
        (
            lambda k: k.replace("embed_tokens.weight", "rotary_emb.inv_freq"),
            {"tie_word_embeddings": True},
            "under the name of the head only",
        ),
    ],
)
def test_the_cause_of_names_that_do_not_fit_is_told(
    make_model, tiny, rename, fields, cause
):
    def change(tensors):
        renamed = {rename(key): array for key, array in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    path = make_model(change)
    raw = {**tiny, **fields}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=cause):
        convert.load_llama(path)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("lost", [("quant_state",), ("quant_state", "absmax", "map")])
def test_packed_weights_without_their_states_are_named(
    tiny_model, tmp_path, edit_tensors, storage, lost
):
    config, base = convert.load_llama(tiny_model, quantization="nf4_dq")
    convert.save_llama(tmp_path / "packed", config, base, quant_storage=storage)

    def change(tensors):
        for key in [k for k in tensors if any(part in k for part in lost)]:
            del tensors[key]

    edit_tensors(tmp_path / "packed" / "model.safetensors", change)
    message = (
        r"14 of its weights are in 4 bits \(such as `model.layers.0.self_attn.q_proj"
        r".weight`\) without the `.quant_state.bitsandbytes__nf4`"
    )
    with pytest.raises(CheckpointError, match=message):
        convert.load_llama(tmp_path / "packed")


def test_what_a_directory_holds_and_is_not_used_is_noted(make_model):
    assert open_checkpoint(make_model()).notes == []
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    nf4["bnb_4bit_quant_type"] = "nf4"
    path = make_model(None, "b", sliding_window=4, quantization_config=nf4)
    shutil.copy(path / "model.safetensors", path / "model-00001-of-00002.safetensors")
    fields, dense, stale = open_checkpoint(path).notes
    assert "`sliding_window`=4" in fields
    assert "weights are in 4 bits" in dense and "as they are stored" in dense
    assert "model-00001-of-00002.safetensors, beside model.safetensors" in stale
    sharded = make_model(None, "c", shards=2)
    (sharded / "model-9.safetensors").touch()
    (note,) = open_checkpoint(sharded).notes
    assert "model-9.safetensors, which model.safetensors.index.json does" in note


def test_rotary_frequencies_of_old_files_are_ignored(tiny_model, make_model):
    layers = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    old = dict.fromkeys(layers, np.ones(8, np.float32))
    path = make_model(lambda tensors: tensors.update(old), "old")
    (_, got), (_, expected) = map(convert.load_llama, (path, tiny_model))
    assert equal_arrays(got, expected)


def test_tied_head_on_disk_must_equal_the_embeddings(make_model):
    def with_head(name, make_head):
        def change(tensors):
            tensors["lm_head.weight"] = make_head(tensors["model.embed_tokens.weight"])

        return make_model(change, name, tie_word_embeddings=True)

    _, base = convert.load_llama(with_head("equal", np.copy))
    assert "lm_head" not in base
    for name, make_head in (
        ("different", lambda table: table + np.eye(*table.shape, dtype=np.float32)),
        ("dtype", lambda table: table.astype(BF16)),
    ):
        with pytest.raises(CheckpointError, match="set `tie_word_embeddings` to false"):
            convert.load_llama(with_head(name, make_head))


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", None])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "key", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_nan_is_reported_with_its_tensor(make_model, key, value, quantization):
    path = make_model(lambda t: t[key].reshape(-1).__setitem__(5, value))
    with pytest.raises(CheckpointError, match=f"Tensor `{key}`.* NaN or infinity"):
        convert.load_llama(path, quantization=quantization)


@pytest.mark.parametrize(
    "value, dtype, match",
    [(1e5, "float16", "65504.*bfloat16"), (3.4e38, "bfloat16", "3.39e38.*float32")],
)
def test_overflow_of_a_cast_is_named(make_model, value, dtype, match):
    path = make_model(lambda t: t["model.norm.weight"].__setitem__(3, value))
    with pytest.raises(CheckpointError, match=f"`model.norm.weight`.*{match}"):
        convert.load_llama(path, dtype=dtype)


def test_a_path_that_is_not_a_model_directory_is_described(tiny, make_adapter):
    adapter = make_adapter(tiny)
    for path, match in (
        (adapter, "is a PEFT adapter, not a model"),
        (adapter / "adapter_config.json", "is a file; give the directory that"),
        ("meta-llama/Llama-3.2-1B", "not exist in `.*`, where this runs. A model is"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert.load_llama(path)


def rename_model(path):
    path.write_text(path.read_text().replace('"llama"', '"mistral"'))


@pytest.mark.parametrize(
    "file, change, match",
    [
        ("config.json", Path.unlink, "has no config.json"),
        ("config.json", lambda f: f.write_text("{"), "config.json` is not valid JSON"),
        ("config.json", rename_model, "Not a causal language model"),
        (MODEL, lambda f: os.truncate(f, f.stat().st_size - 1), "truncated or damaged"),
        (MODEL, lambda f: f.rename(f.with_name("pytorch_model.bin")), "pickle files"),
    ],
)
def test_a_damaged_directory_is_refused(tiny_model, file, change, match):
    change(tiny_model / file)
    with pytest.raises(UserError, match=match):
        convert.load_llama(tiny_model)


# --- Saving ---


def test_save_checks_the_tree(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model)
    model, head = base["model"], base["lm_head"]
    attention, embedding = model["layers"]["self_attn"], model["embed_tokens"]
    model["norm"]["weight"] = head["bias"] = np.zeros(3, np.float32)
    head["weight"] = head["weight"].astype(np.float64)
    attention["q_proj"] = attention["k_proj"]
    embedding["weight"] = quantize(embedding["weight"], double_quant=False)
    del model["layers"]["input_layernorm"]
    with pytest.raises(CheckpointError) as caught:
        convert.save_llama(tmp_path / "out", config, base)
    for part in (
        "1 missing arrays: model.layers.input_layernorm.weight",
        "model.norm.weight [3] instead of [64]",
        "model.layers.self_attn.q_proj.weight (32, 64)",
        "1 arrays of another dtype: lm_head.weight float64",
        "1 unexpected arrays: lm_head.bias",
        "1 quantized arrays that must stay 16-bit: model.embed_tokens.weight",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    config, base = convert.load_llama(tiny_model)
    here, none = tmp_path / "here", tmp_path / "no"
    here.mkdir()
    with pytest.raises(UserError, match="`tokenizer_from`: `.*` is not a directory"):
        convert.save_llama(here / "out", config, base, tokenizer_from=none)

    def fsync(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="Cannot write `.*out`: No space left"):
        convert.save_llama(here / "out", config, base)
    assert list(here.iterdir()) == []


def test_a_configuration_without_file_is_written_complete(tmp_path):
    config = LlamaConfig(
        **{"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        tie_word_embeddings=True,
    )
    abstract = model_params.abstract_base(config)
    base = jax.tree.map(lambda leaf: np.ones(leaf.shape, BF16), abstract)
    convert.save_llama(tmp_path / "out", config, base)
    assert read(tmp_path / "out")["torch_dtype"] == "bfloat16"
    config2, base2 = convert.load_llama(tmp_path / "out", quantization=None)
    assert config2 == config
    assert equal_arrays(base, base2)


def test_progress_bars_go_to_stderr(tiny_model, tmp_path, capsys):
    config, base = convert.load_llama(tiny_model, progress=True)
    convert.save_llama(tmp_path / "out", config, base, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading" in captured.err
    assert "Writing" in captured.err


# --- Memory ---


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_the_peak_of_host_memory(tiny_model, big_model, measure, quantization):
    program = """
warm(convert.load_llama, sys.argv[2])
_, base = peak(convert.load_llama, sys.argv[1], quantization=sys.argv[3])
print(sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
"""
    growth, output = measure(program, big_model, tiny_model, quantization)
    # The contract: output plus two of the largest tensors in float32. What is needed
    # is less: one tensor as it is in the file, its codes and scales, and for each
    # thread some chunks of 2^16 weights. 8 MB for the allocator's pages.
    assert growth <= output + 0.8 * 8192 * 2048 * 4 + 8e6
