"""Counts from a configuration alone, against published numbers and written files."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import convert
from convert.peft_writing import adapter_bytes
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.params import tree_bytes, tree_size
from qlora_jax.planning.estimate import (
    abstract_base,
    estimate_warnings,
    parameter_report,
)
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer


def config_of(shared_data, name):
    text = (shared_data / "configs" / name / "config.json").read_text()
    return LlamaConfig.from_hf(json.loads(text))


# Trainable parameters of "all-linear" for each unit of rank: sum of in + out over the
# seven projections, times the layers.
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "unit", "parameters"),
    [
        ("llama-3.2-1b", 704_512, 1_235_814_400),
        ("llama-3.2-3b", 1_519_616, 3_212_749_824),
        ("llama-3.1-8b", 2_621_440, 8_030_261_248),
        ("llama-2-7b", 2_498_560, 6_738_415_616),
    ],
)
def test_published_counts(shared_data, name, unit, parameters):
    config = config_of(shared_data, name)
    for r in (1, 64):
        lora = LoraConfig(r=r, target_modules="all-linear")
        report = parameter_report(config, lora)
        assert report.trainable_parameters == unit * r
        assert sum(report.groups.values()) == unit * r
        # Two float32 moments for each, and two counts of steps.
        assert report.optimizer_bytes == unit * r * 8 + 8
        assert adapter_bytes(config, lora) > unit * r * 4
    assert report.base_parameters == parameters


def test_a_70b_model_is_counted_from_its_configuration():
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    report = parameter_report(config, LoraConfig(r=16, target_modules="all-linear"))
    assert report.trainable_parameters == 16 * 12_943_360
    assert report.base_parameters == 70_553_706_496


# Of LoRA on all projections: of rank 64 in the 8B model, and of rank 8 in the 1B model.
AT_64, AT_8 = 167_772_160, 8 * 704_512
TABLE_8B, TABLE_1B = 128_256 * 4096, 128_256 * 2048
TABLES = ("embed_tokens", "lm_head")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("llama-3.1-8b", dict(modules_to_save=TABLES), AT_64 + 2 * TABLE_8B),
        (
            "llama-3.1-8b",
            dict(modules_to_save=("embed_tokens",), ensure_weight_tying=True),
            AT_64 + TABLE_8B,  # not tied: nothing to ensure
        ),
        ("llama-3.2-1b", dict(modules_to_save=TABLES), AT_8 + 2 * TABLE_1B),
        (
            "llama-3.2-1b",
            dict(modules_to_save=("lm_head",), ensure_weight_tying=True),
            AT_8 + TABLE_1B,
        ),
        (
            "llama-3.2-1b",
            dict(trainable_token_indices=(128_254, 128_255)),
            AT_8 + 2 * 2048,
        ),
        # Magnitudes of the outputs of 16 layers: q, o, down; k, v; gate, up.
        (
            "llama-3.2-1b",
            dict(use_dora=True),
            AT_8 + 16 * (3 * 2048 + 2 * 512 + 2 * 8192),
        ),
        ("llama-3.2-1b", dict(modules_to_save=("norm",)), AT_8 + 33 * 2048),
    ],
)
def test_counts_of_everything_that_can_be_trained(shared_data, name, fields, count):
    r = 64 if name == "llama-3.1-8b" else 8
    lora = LoraConfig(r=r, target_modules="all-linear", **fields)
    report = parameter_report(config_of(shared_data, name), lora)
    assert report.trainable_parameters == count
    # Two float32 moments for each, and two counts of steps.
    assert report.optimizer_bytes == 8 * count + 8


@pytest.mark.real
def test_the_bytes_of_a_packed_base(shared_data):
    config = config_of(shared_data, "llama-3.1-8b")
    report = parameter_report(config, LoraConfig(r=64, target_modules="all-linear"))
    # NF4 with double quantization: 4 bits and a byte for each block of 64, a float for
    # each 256 of those; embeddings, head and norms in bfloat16.
    packed = 6_979_321_856
    blocks = packed / 64
    expected = packed / 2 + blocks + blocks / 256 * 4 + (8_030_261_248 - packed) * 2
    assert report.base_bytes == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_abstract_base_is_the_one_that_is_loaded(llama_dir, quantization, dtype):
    config, base = convert.load_llama(llama_dir, quantization=quantization, dtype=dtype)
    abstract = abstract_base(config, quantization=quantization, dtype=dtype)
    loaded, counted = (
        {
            jax.tree_util.keystr(path): (leaf.shape, jnp.dtype(leaf.dtype))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (base, abstract)
    )
    assert loaded == counted
    report = parameter_report(config, None, quantization=quantization, dtype=dtype)
    assert report.base_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    assert report.trainable_parameters == report.optimizer_bytes == 0


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=3, target_modules="all-linear"),
        LoraConfig(r=3, target_modules=("q_proj", "lm_head", "embed_tokens")),
        LoraConfig(r=4, use_dora=True, modules_to_save=("norm", "lm_head")),
    ],
)
def test_counts_are_those_of_the_arrays_and_the_file(llama_dir, tmp_path, lora):
    config, base = convert.load_llama(llama_dir)
    adapters = init_adapters(jax.random.key(0), base, lora)
    state = make_optimizer(TrainConfig(steps=5), 5).init(adapters)
    report = parameter_report(config, lora)
    assert report.trainable_parameters == tree_size(adapters)
    assert sum(report.groups.values()) == report.trainable_parameters
    assert report.optimizer_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert report.optimizer_bytes == tree_bytes(state)
    convert.save_adapter(tmp_path / "a", lora, jax.device_get(adapters), config)
    written = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert adapter_bytes(config, lora) == written


def test_the_padding_of_ranks_is_held_and_not_counted(llama_dir):
    config, base = convert.load_llama(llama_dir)
    lora = LoraConfig(
        r=2, target_modules=("up_proj",), rank_pattern={"layers.1.mlp.up_proj": 8}
    )
    report = parameter_report(config, lora)
    assert report.trainable_parameters == (2 + 8) * (64 + 128)
    held = tree_size(init_adapters(jax.random.key(0), base, lora))
    assert held == 2 * 8 * (64 + 128)
    assert report.optimizer_bytes == 8 * held + 8


# --- Warnings ---


@pytest.mark.parametrize(
    ("tied", "fields", "patterns"),
    [
        (False, {}, []),
        (
            False,
            dict(modules_to_save=("embed_tokens", "lm_head"), r=1),
            [
                r"embed_tokens and lm_head, trained in full, make 4,096 of 6,144 "
                r"trained parameters \(67%\): 0.02 MB of the adapter file and 0.03 MB "
                "of AdamW's state. `trainable_token_indices` trains single rows."
            ],
        ),
        (
            True,
            dict(modules_to_save=("lm_head",), target_modules=("q_proj",), r=1),
            [
                "^lm_head, trained in full, make",
                "this model ties .*; lm_head is trained separately, and embed_tokens k",
            ],
        ),
        (True, dict(modules_to_save=("lm_head",), ensure_weight_tying=True), []),
        (
            False,
            dict(rank_pattern={"layers.1.mlp.up_proj": 8}, target_modules=("up_proj",)),
            [
                "ranks differ among layers, so the arrays in memory hold 3,072 numbers "
                "for 1,920 trained parameters"
            ],
        ),
        (False, dict(alpha_pattern={"^q_proj": 8}), ["^`alpha_pattern` of '.q_proj'"]),
    ],
)
def test_surprising_settings_give_warnings(llama_dir, tied, fields, patterns):
    config, _ = convert.load_llama(llama_dir)
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    lora = LoraConfig(**{"r": 2, "target_modules": "all-linear", **fields})
    texts = estimate_warnings(config, lora)
    assert len(texts) == len(patterns), texts
    for text, pattern in zip(texts, patterns, strict=True):
        assert re.search(pattern, text), text


@pytest.mark.real
def test_inspect_counts_from_a_config_alone(shared_data):
    command = [sys.executable, "-m", "qlora_jax.cli", "inspect"]
    command += [str(shared_data / "configs" / "llama-3.1-8b" / "config.json")]
    command += ["--lora.r", "64", "--lora.target-modules", "all-linear", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["trainable_parameters"] == 167_772_160
