import inspect
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
from convert.checkpoint import open_model
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import NF4Tensor, fingerprint_tree, quantize

BF16 = ml_dtypes.bfloat16
DENSE = (
    "golden/llama32/fp32",
    "golden/llama2/fp32_sharded",
    "golden/llamabias/fp32",
    "data/stories260K",
    "data/babyllama-char105",
)
PACKED = (
    "golden/llama32/nf4",
    "golden/llama32/nf4_dq",
    "golden/llama2/nf4",
    "data/stories260K-bnb-nf4",
    "data/stories260K-bnb-nf4-dq",
    "data/babyllama-char105-bnb-nf4-dq",
)


def all_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    files = open_model(path)
    return {
        k: (files[k].dtype, files[k].shape, files.read_bytes(k).tobytes())
        for k in files
    }


def equal_trees(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- Laws ---


@pytest.mark.real
@pytest.mark.golden
@pytest.mark.parametrize("name", [*DENSE, *PACKED])
def test_load_then_save_gives_equal_bytes_for_every_tensor(shared, tmp_path, name):
    source = shared / name
    config, base = convert.load_llama(source, quantization=None)
    out = tmp_path / "out"
    convert.save_llama(out, config, base, tokenizer_from=source)
    assert all_bytes(out) == all_bytes(source)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / file).exists():
            assert (out / file).read_bytes() == (source / file).read_bytes()
    if (source / "model.safetensors").exists():
        theirs, ours = (d / "model.safetensors" for d in (source, out))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.golden
@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", None])
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_stay_whatever_quantization_says(shared, name, quantization):
    _, kept = convert.load_llama(shared / name, quantization=None)
    _, base = convert.load_llama(shared / name, quantization=quantization)
    assert equal_trees(base, kept)


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
    assert equal_trees(ours, theirs)


@pytest.mark.golden
def test_double_quantization_differs_from_bitsandbytes_only_in_scales(shared):
    _, ours = convert.load_llama(shared / "golden/llama32/fp32", quantization="nf4_dq")
    _, theirs = convert.load_llama(shared / "golden/llama32/nf4_dq")
    for path, leaf in trees.walk(ours):
        if model_params.is_projection(path):
            other = dict(trees.walk(theirs))[path]
            np.testing.assert_array_equal(leaf.codes, other.codes)
            np.testing.assert_array_equal(leaf.nested_quant_map, other.nested_quant_map)
            # Their mean is summed in another order, their coder is not nearest.
            np.testing.assert_allclose(
                leaf.nested_offset, other.nested_offset, rtol=2e-7
            )


@pytest.mark.golden
def test_both_generations_of_config_json_load_alike(shared, tmp_path):
    source = shared / "golden/llama32/fp32"
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((source / "config_v4_style.json").read_bytes())
    (old / "model.safetensors").symlink_to(source / "model.safetensors")
    (config_a, base_a), (config_b, base_b) = map(convert.load_llama, (source, old))
    assert config_a == config_b
    assert equal_trees(base_a, base_b)


RANDOM = [
    dict(hidden_size=16, intermediate_size=7, head_dim=6, num_hidden_layers=1),
    dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3),
    dict(hidden_size=40, intermediate_size=33, attention_bias=True, mlp_bias=True),
    dict(hidden_size=8, vocab_size=5, tie_word_embeddings=True, num_hidden_layers=11),
    dict(hidden_size=320, intermediate_size=192, num_key_value_heads=4),
]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("changes", RANDOM)
def test_every_tensor_is_read_into_its_array(
    tiny, make_tensors, save_model, changes, dtype, shards
):
    raw = {**tiny, **changes}
    tensors = make_tensors(raw, dtype)
    path = save_model(raw, tensors, shards=shards)
    config, base = convert.load_llama(path, quantization=None)
    leaves = dict(trees.walk(base))
    assert set(leaves) == set(model_params.shapes(config))
    for key, value in tensors.items():
        where, layer = trees.parse_key(key)
        got = leaves[where] if layer is None else leaves[where][layer]
        assert got.dtype == dtype
        assert got.tobytes() == value.tobytes()


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("changes", RANDOM)
def test_only_projections_are_quantized_and_come_back_from_a_file(
    tiny, make_tensors, save_model, tmp_path, changes, dtype, quantization
):
    raw = {**tiny, **changes}
    tensors = make_tensors(raw, dtype)
    config, base = convert.load_llama(
        save_model(raw, tensors), quantization=quantization
    )
    double = quantization == "nf4_dq"
    for path, leaf in trees.walk(base):
        assert isinstance(leaf, NF4Tensor) == model_params.is_projection(path)
    for key, value in tensors.items():
        where, layer = trees.parse_key(key)
        if model_params.is_projection(where):
            leaf = dict(trees.walk(base))[where][layer]
            assert equal_trees(leaf, quantize(value, double_quant=double))
    out = tmp_path / "out"
    convert.save_llama(out, config, base, max_shard_bytes=4000)
    config2, base2 = convert.load_llama(out)
    assert config2 == config
    assert equal_trees(base, base2)
    assert config2.quantization_config["bnb_4bit_use_double_quant"] == double
    again = tmp_path / "again"
    convert.save_llama(again, config2, base2)
    assert all_bytes(again) == all_bytes(out)


def test_trees_on_devices_are_saved_alike(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model, quantization="nf4_dq")
    convert.save_llama(tmp_path / "a", config, base)
    convert.save_llama(tmp_path / "b", config, jax.tree.map(jnp.asarray, base))
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    assert fingerprint_tree(base) == fingerprint_tree(jax.tree.map(jnp.asarray, base))


# --- dtype ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
def test_dtype_casts_what_stays_dense_and_nothing_else(
    tiny, make_tensors, save_model, stored, dtype
):
    tensors = make_tensors(tiny, stored)
    path = save_model(tiny, tensors)
    _, kept = convert.load_llama(path)
    _, base = convert.load_llama(path, dtype=dtype)
    for where, leaf in trees.walk(base):
        other = dict(trees.walk(kept))[where]
        if isinstance(leaf, NF4Tensor):
            assert equal_trees(leaf, other)
        else:
            expected = other.astype(dtype)
            assert (leaf.dtype, leaf.tobytes()) == (expected.dtype, expected.tobytes())


def test_layers_of_different_dtypes_need_a_dtype(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    key = "model.layers.1.self_attn.q_proj.weight"
    tensors[key] = tensors[key].astype(BF16)
    path = save_model(tiny, tensors)
    with pytest.raises(CheckpointError, match=r"mixes dtypes.*q_proj.weight.*`dtype`"):
        convert.load_llama(path)
    _, base = convert.load_llama(path, quantization=None, dtype="bfloat16")
    assert base["model"]["layers"]["self_attn"]["q_proj"]["weight"].dtype == BF16
    _, base = convert.load_llama(path, dtype="float32")
    assert base["model"]["layers"]["self_attn"]["q_proj"]["weight"].dtype == "float32"


def test_float16_overflow_is_named(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    tensors["model.norm.weight"][3] = 1e5
    with pytest.raises(CheckpointError, match="`model.norm.weight`.*65504.*bfloat16"):
        convert.load_llama(save_model(tiny, tensors), dtype="float16")


def test_save_casts_and_says_so_in_config_json(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model, quantization=None)
    convert.save_llama(tmp_path / "out", config, base, dtype="bfloat16")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in raw
    _, expected = convert.load_llama(tiny_model, quantization=None, dtype="bfloat16")
    _, got = convert.load_llama(tmp_path / "out", quantization=None)
    assert equal_trees(got, expected)


# --- What is refused ---


@pytest.mark.parametrize("name", ["int8", "", "NF4"])
def test_unknown_quantization(tiny_model, name):
    with pytest.raises(UserError, match=r"`quantization`='.*' is not supported; expe"):
        # Without the check of annotations that tests put around every function.
        inspect.unwrap(convert.load_llama)(tiny_model, quantization=name)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16"])
def test_unknown_dtype(tiny_model, tmp_path, dtype):
    with pytest.raises(
        UserError, match=f"`dtype`='{dtype}' is not supported; expected"
    ):
        convert.load_llama(tiny_model, dtype=dtype)
    config, base = convert.load_llama(tiny_model)
    with pytest.raises(
        UserError, match=f"`dtype`='{dtype}' is not supported; expected"
    ):
        convert.save_llama(tmp_path / "out", config, base, dtype=dtype)


def test_a_message_lists_everything_wrong(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    del tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 64), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 40), np.float32)
    tensors["lm_head.weight"] = np.zeros((24, 64), np.int8)
    with pytest.raises(CheckpointError) as caught:
        convert.load_llama(save_model(tiny, tensors))
    message = str(caught.value)
    for part in (
        "1 missing tensors: model.norm.weight",
        "2 tensors that this model does not have: "
        "model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight [64, 40] instead of [40, 64]",
        "lm_head.weight I8 instead of F32, BF16, F16",
    ):
        assert part in message, message


def test_long_lists_are_cut(tiny, save_model):
    with pytest.raises(CheckpointError, match="21 missing tensors: .* and 11 more"):
        convert.load_llama(save_model(tiny, {"x": np.zeros(1, np.float32)}))


def test_rotary_frequencies_of_old_files_are_ignored(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    expected = convert.load_llama(save_model(tiny, tensors, "new"))[1]
    for i in range(2):
        key = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        tensors[key] = np.ones(8, np.float32)
    assert equal_trees(convert.load_llama(save_model(tiny, tensors))[1], expected)


def test_tied_head_on_disk_must_equal_the_embeddings(tiny, make_tensors, save_model):
    raw = {**tiny, "tie_word_embeddings": True}
    tensors = make_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    _, base = convert.load_llama(save_model(raw, tensors, "equal"))
    assert "lm_head" not in base
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match="set `tie_word_embeddings` to false"):
        convert.load_llama(save_model(raw, tensors, "different"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(BF16)
    with pytest.raises(CheckpointError, match="set `tie_word_embeddings` to false"):
        convert.load_llama(save_model(raw, tensors, "dtype"))


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", None])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "key", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_nan_is_reported_with_its_tensor(
    tiny, make_tensors, save_model, key, value, quantization
):
    tensors = make_tensors(tiny)
    tensors[key].reshape(-1)[5] = value
    with pytest.raises(CheckpointError, match=f"Tensor `{key}`.* NaN or infinity"):
        convert.load_llama(save_model(tiny, tensors), quantization=quantization)


def test_a_path_that_is_not_a_model_directory_is_described(tiny, make_adapter):
    adapter = make_adapter(tiny)
    for path, match in (
        (adapter, "is a PEFT adapter, not a model"),
        (adapter / "adapter_config.json", "is a file; give the directory that"),
        ("meta-llama/Llama-3.2-1B", "not exist in `.*`, where this runs. A model is"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert.load_llama(path)


@pytest.mark.parametrize(
    "file, change, match",
    [
        ("config.json", Path.unlink, "has no config.json"),
        ("config.json", lambda f: f.write_text("{"), "config.json` is not valid JSON"),
        (
            "config.json",
            lambda f: f.write_text(f.read_text().replace('"llama"', '"mistral"')),
            "Not a Llama causal language model",
        ),
        (
            "model.safetensors",
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            "is truncated or damaged",
        ),
        (
            "model.safetensors",
            lambda f: f.rename(f.with_name("pytorch_model.bin")),
            "pickle files",
        ),
    ],
)
def test_a_damaged_directory_is_refused(tiny_model, file, change, match):
    change(tiny_model / file)
    with pytest.raises(UserError, match=match):
        convert.load_llama(tiny_model)


# --- Saving ---


def test_save_refuses_a_directory_with_content(tiny_model):
    config, base = convert.load_llama(tiny_model)
    before = all_bytes(tiny_model)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.save_llama(tiny_model, config, base)
    assert all_bytes(tiny_model) == before


def test_save_checks_the_tree(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model)
    base["model"]["norm"]["weight"] = np.zeros(3, np.float32)
    base["lm_head"]["bias"] = np.zeros(3, np.float32)
    base["lm_head"]["weight"] = base["lm_head"]["weight"].astype(np.float64)
    base["model"]["layers"]["self_attn"]["q_proj"]["weight"] = base["model"]["layers"][
        "self_attn"
    ]["k_proj"]["weight"]
    base["model"]["embed_tokens"]["weight"] = quantize(
        base["model"]["embed_tokens"]["weight"], double_quant=False
    )
    del base["model"]["layers"]["input_layernorm"]
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


def test_save_with_a_tokenizer_from_nowhere(tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model)
    with pytest.raises(UserError, match="`tokenizer_from`: `.*` is not a directory"):
        convert.save_llama(
            tmp_path / "out", config, base, tokenizer_from=tmp_path / "no"
        )


def test_full_disk_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    config, base = convert.load_llama(tiny_model)
    target = tmp_path / "here" / "out"

    def fsync(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="Cannot write `.*out`: No space left"):
        convert.save_llama(target, config, base)
    assert list(target.parent.iterdir()) == []


def test_a_configuration_without_file_is_written_complete(tmp_path):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    base: dict = {}
    for path, shape in model_params.shapes(config).items():
        leading = (1,) if trees.is_stacked(path) else ()
        trees.put(base, path, np.ones((*leading, *shape), BF16))
    convert.save_llama(tmp_path / "out", config, base)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16"
    config2, base2 = convert.load_llama(tmp_path / "out", quantization=None)
    assert config2 == config
    assert equal_trees(base, base2)


def test_progress_bars_go_to_stderr(tiny_model, tmp_path, capsys):
    config, base = convert.load_llama(tiny_model, progress=True)
    convert.save_llama(tmp_path / "out", config, base, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading" in captured.err
    assert "Writing" in captured.err


# --- Memory ---


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_host_memory_peaks_at_the_output_and_two_tensors(
    tiny_model, big_model, measure, quantization
):
    program = """
warm(convert.load_llama, sys.argv[2])
_, base = peak(convert.load_llama, sys.argv[1], quantization=sys.argv[3])
print(sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
"""
    growth, output = measure(program, big_model, tiny_model, quantization)
    # The contract: output plus two of the largest tensors in float32. What is needed
    # is less: one tensor as it is in the file, its codes and scales, and for each
    # thread some chunks of 2^16 weights. 8 MB for the allocator's pages.
    largest = 8192 * 2048 * 4
    assert growth <= output + 2 * largest + 8e6
    assert growth <= output + 0.8 * largest + 8e6
