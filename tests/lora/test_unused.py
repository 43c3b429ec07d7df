"""Settings of an adapter that select nothing are named."""

import dataclasses

import pytest

import convert
from qlora_jax.lora import LoraConfig, select
from qlora_jax.lora.unused import (
    unused_exclusions,
    unused_patterns,
    unused_settings,
)
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.params import abstract_base


@pytest.mark.parametrize(
    ("patterns", "unused"),
    [
        ({"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 4}, []),
        ({"^model.layers.1.self_attn.q_proj": 4}, []),
        # Paths begin with "model", of which PEFT's own prefix and "^q" are no part.
        (
            {"^q_proj": 4, "base_model.model.model.layers.0.self_attn.q_proj": 8},
            ["^q_proj", "base_model.model.model.layers.0.self_attn.q_proj"],
        ),
        ({"proj": 4}, ["proj"]),  # matched from a dot on
        ({"down_proj": 4}, ["down_proj"]),  # a module that is not adapted
        # The first that matches counts.
        ({".*_proj": 4, "q_proj": 8}, ["q_proj"]),
    ],
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_set_no_modules_value(tiny, field, patterns, unused):
    lora = LoraConfig(target_modules=("q_proj", "v_proj"), **{field: patterns})
    selection = select(abstract_base(LlamaConfig.from_hf(tiny)), lora)
    assert unused_patterns(lora, selection) == [f"`{field}` of {p!r}" for p in unused]


def test_targets_and_layers_that_the_model_lacks(tiny):
    lora = LoraConfig(target_modules=("q_proj", "w1"), layers_to_transform=(0, 2))
    base = abstract_base(LlamaConfig.from_hf(tiny))
    selection = select(base, lora)
    named = ["`target_modules` of 'w1'", "`layers_to_transform` of 2"]
    assert unused_settings(lora, selection, base) == named
    every = dataclasses.replace(lora, target_modules=("q_proj",), layers_to_transform=0)
    assert unused_settings(every, selection, base) == ["`target_modules` of 'w1'"]


@pytest.mark.parametrize(
    ("excluded", "unused"),
    [
        (None, []),
        (("lm_head", "layers.1.self_attn.q_proj", "embed_tokens", "norm"), ["norm"]),
        (("k_prj",), ["k_prj"]),
        (".*vision.*", [".*vision.*"]),
        (".*up_proj", []),
    ],
)
def test_exclusions_of_what_the_model_lacks(tiny, excluded, unused):
    lora = LoraConfig(exclude_modules=excluded)
    got = unused_exclusions(lora, abstract_base(LlamaConfig.from_hf(tiny)))
    assert got == [f"`exclude_modules` of {name!r}" for name in unused]


def test_they_are_noted_when_an_adapter_is_loaded(tiny, make_adapter):
    path = make_adapter(tiny, alpha_pattern={"^q_proj": 64})
    notes: list[str] = []
    convert.load_adapter(path, LlamaConfig.from_hf(tiny), skipped=notes)
    assert notes == [
        "`alpha_pattern` of '^q_proj', which selects nothing in this model"
    ]
