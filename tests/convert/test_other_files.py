"""Files of other programs, and damaged downloads: read, or refused with the cause."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.nf4 import NF4Tensor
from tests.convert.reference import PREFIX, WEIGHTS, edit_json, read
from tests.convert.test_peft import equal

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def adapter(tiny, make_adapter):
    return make_adapter(tiny)


@pytest.fixture
def model(tiny_model):
    return convert.open_config(tiny_model)


# --- Models ---


def test_the_name_of_the_first_conversions_is_read(tiny_model):
    edit_json(tiny_model / "config.json", architectures=["LLaMAForCausalLM"])
    config, base = convert.load_llama(tiny_model, quantization=None)
    convert.save_llama(tiny_model.parent / "out", config, base)
    written = read(tiny_model.parent / "out")
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_a_model_without_a_head_is_read_if_its_embeddings_are_the_head(
    tiny, make_tensors, save_model
):
    raw = {**tiny, "tie_word_embeddings": True}
    tensors = make_tensors(raw)
    whole = save_model(raw, tensors, "whole")
    raw["architectures"] = ["LlamaModel"]
    bare = {key.removeprefix("model."): value for key, value in tensors.items()}
    path = save_model(raw, bare, "bare")
    equal(*(convert.load_llama(p, quantization=None)[1] for p in (path, whole)))
    edit_json(path / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match="`LlamaModel` has no output head"):
        convert.load_llama(path)


def test_a_packed_head_is_read_and_written(tiny_model, tmp_path):
    exact = {"quantization": "nf4_dq", "quantize_lm_head": True}
    config, base = convert.load_llama(tiny_model, **exact)
    convert.save_llama(tmp_path / "packed", config, base)
    # transformers builds a packed head only if the list does not name it.
    raw = read(tmp_path / "packed")["quantization_config"]
    assert raw["llm_int8_skip_modules"] == []
    for options in ({}, exact):
        _, again = convert.load_llama(tmp_path / "packed", **options)
        assert isinstance(again["lm_head"]["weight"], NF4Tensor)
        equal(again, base)


def test_rotary_frequencies_may_be_in_the_index_or_not(
    tiny, make_tensors, save_model, edit_tensors
):
    path = save_model(tiny, make_tensors(tiny), "sharded", shards=2)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    shard = sorted(path.glob("*.safetensors"))[0]
    edit_tensors(shard, lambda t: t.update({name: np.ones(8, np.float32)}))
    convert.load_llama(path, quantization=None)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.layers.1.self_attn.rotary_emb.inv_freq"] = shard.name
    (path / INDEX).write_text(json.dumps(index))
    convert.load_llama(path, quantization=None)


def test_tensors_that_zero_3_left_empty_are_named(tiny_model, adapter, model):
    for path, load in (
        (tiny_model / MODEL, lambda: convert.load_llama(tiny_model)),
        (adapter / WEIGHTS, lambda: convert.load_adapter(adapter, model)),
    ):
        tensors = safetensors.numpy.load_file(path)
        tensors[next(iter(tensors))] = np.zeros(0, np.float32)
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(CheckpointError, match="DeepSpeed ZeRO-3"):
            load()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (None, "is a symbolic link to `blobs/1234`, which does not exist"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", MODEL])
def test_what_a_download_left_instead_of_a_file_is_named(
    tiny_model, name, content, message
):
    (tiny_model / name).unlink()
    if content is None:
        (tiny_model / name).symlink_to("blobs/1234")
    else:
        (tiny_model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert.load_llama(tiny_model)


@pytest.mark.parametrize("missing", ["config.json", MODEL])
def test_a_directory_of_gguf_files_is_pointed_out(tiny_model, missing):
    (tiny_model / missing).unlink()
    (tiny_model / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF files \(q4.gguf\)"):
        convert.load_llama(tiny_model)


# --- Adapters ---


@pytest.mark.parametrize(
    "change, note",
    [
        (lambda k: k.replace("q_proj", "_orig_mod.q_proj"), "`_orig_mod.` in the"),
        (
            lambda k: k.replace("mlp", "_fsdp_wrapped_module.mlp"),
            "`_fsdp_wrapped_module.` in the",
        ),
        (lambda k: PREFIX + k, f"`{2 * PREFIX}` in the names of 8 tensors"),
        (
            lambda k: k.replace(".weight", ".tuned.weight"),
            "the name 'tuned' of the adapter",
        ),
    ],
)
def test_names_of_wrappers_and_adapters_are_left_out_with_a_note(
    adapter, model, edit_tensors, change, note
):
    _, want = convert.load_adapter(adapter, model)

    def rename(tensors):
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    edit_tensors(adapter / WEIGHTS, rename)
    notes = []
    equal(convert.load_adapter(adapter, model, skipped=notes)[1], want)
    assert [line for line in notes if note in line] == notes != []


def test_several_adapters_in_a_file_are_refused(adapter, model, edit_tensors):
    def rename(tensors):
        for i, key in enumerate(list(tensors)):
            name = f".{'ab'[i % 2]}.weight"
            tensors[key.replace(".weight", name)] = tensors.pop(key)

    edit_tensors(adapter / WEIGHTS, rename)
    with pytest.raises(CheckpointError, match="holds several adapters .'a', 'b'"):
        convert.load_adapter(adapter, model)


def test_adapters_of_mlx_are_refused_by_name(adapter, model):
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(mlx))
    with pytest.raises(UserError, match="that of an MLX adapter"):
        convert.load_adapter(adapter, model)


def test_a_pickled_adapter_is_refused_with_the_lines_that_convert_it(adapter, model):
    shutil.move(adapter / WEIGHTS, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="weights_only=True") as caught:
        convert.load_adapter(adapter, model)
    # They are Python.
    _, *lines = str(caught.value).splitlines()
    compile("\n".join(line.strip() for line in lines), "lines", "exec")


def test_a_link_without_an_adapter_is_named(adapter, model):
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("../../blobs/5678")
    with pytest.raises(CheckpointError, match="link to `../../blobs/5678`, which does"):
        convert.load_adapter(adapter, model)


def test_the_root_of_a_download_cache_leads_to_its_snapshot(tiny_model, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    tiny_model.rename(snapshot)
    with pytest.raises(CheckpointError, match=f"Did you mean `{snapshot}`"):
        convert.load_llama(snapshot.parents[1])


def test_an_adapter_in_shards_is_called_that(adapter, model):
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="in shards .*into one adapter_model"):
        convert.load_adapter(adapter, model)
