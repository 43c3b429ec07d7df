"""An adapter of a model of images and text, read as one of its text model."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.text_model import TextPrefix
from qlora_jax.errors import CheckpointError
from tests.lora.reference import abstract, config, config_of, draw

FIRST = "base_model.model."
PREFIXES = {
    "newer": TextPrefix("model.language_model.", "model."),
    "older": TextPrefix("language_model.", ""),
}
B = "vision_tower.layers.0.self_attn.q_proj.lora_B.weight"
A = B.replace("lora_B", "lora_A")


@pytest.fixture(params=PREFIXES)
def prefix(request):
    return PREFIXES[request.param]


@pytest.fixture
def within(tmp_path, prefix):
    """A function: (config, vision tensors, settings) -> (its directory, plain tree)."""

    def save(lora, others, **settings):
        path = tmp_path / "adapter"
        tree = draw(abstract(), lora)
        convert.save_adapter(path, lora, tree, config_of())
        file = path / "adapter_model.safetensors"
        tensors = {}
        for key, value in load_file(file).items():
            module, _, rest = key.removeprefix(FIRST).partition("_proj.")
            name = f"{module}_proj" if rest else module
            name = prefix.outside(name) + (f".{rest}" if rest else "")
            tensors[FIRST + name] = value
        tensors |= {FIRST + key: value for key, value in others.items()}
        save_file(tensors, file, {"format": "pt"})
        raw = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(raw | settings))
        return path, tree

    return save


PLAIN = config("q_proj", "up_proj", r=2, lora_alpha=3)


def vision(b=0.0):
    return {A: np.ones((2, 8), np.float32), B: np.full((8, 2), b, np.float32)}


# What the larger model's settings are, and what selects the same in the text model.
SETTINGS = {
    "names": (PLAIN, {}, ()),
    "an expression": (
        PLAIN,
        {"target_modules": r".*language_model.*\.(q|up)_proj"},
        ("`target_modules`",),
    ),
    "an exclusion": (
        PLAIN,
        {"exclude_modules": r".*language_model.*\.(k|v)_proj"},
        (),
    ),
    "paths": (
        config("layers.1.self_attn.q_proj", "up_proj", r=2, lora_alpha=3),
        {"target_modules": ["LAYERS.1.self_attn.q_proj", "up_proj"]},
        ("`target_modules`",),
    ),
    "patterns": (
        config("q_proj", r=2, rank_pattern={r"model\.layers\.1\..*": 3}),
        {"rank_pattern": {r"PATTERN\.1\..*": 3}},
        ("`rank_pattern`",),
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_is_that_of_the_text_model_alone(within, prefix, tmp_path, kind):
    lora, settings, replaced = SETTINGS[kind]
    layers = prefix.outside("model.layers")
    spelled = json.dumps(settings).replace("LAYERS", layers)
    spelled = spelled.replace("PATTERN", json.dumps(re.escape(layers))[1:-1])
    path, tree = within(lora, vision(), **json.loads(spelled))
    notes = []
    read, got = convert.load_adapter(path, config_of(), skipped=notes)
    jax.tree.map(np.testing.assert_array_equal, got, tree)
    count = len(load_file(path / "adapter_model.safetensors")) - 2
    assert notes[0].startswith(f"`{prefix.outer}` in the names of {count} tensors: ")
    assert notes[1] == (
        "2 tensors of vision_tower, which are no part of the text model (0 of them "
        "trained)"
    )
    said = [note for note in notes if "replaced by what selects the same" in note]
    assert [note.split(" as ")[0] for note in said] == list(replaced)
    # It is written with the text model's names.
    convert.save_adapter(tmp_path / "again", read, got, config_of())
    plain, again = convert.load_adapter(tmp_path / "again", config_of(), skipped=[])
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert plain == read


def test_trained_tensors_of_other_parts_are_refused_under_strict(within):
    path, tree = within(PLAIN, vision(0.5))
    expected = r"1 trained tensor of vision_tower \(such as .*--no-strict"
    with pytest.raises(CheckpointError, match=expected):
        convert.load_adapter(path, config_of())
    notes = []
    _, got = convert.load_adapter(path, config_of(), strict=False, skipped=notes)
    jax.tree.map(np.testing.assert_array_equal, got, tree)
    assert "(1 of them trained)" in notes[1]


def test_a_layer_that_the_file_lacks_is_missed(within):
    path, _ = within(PLAIN, {}, target_modules=r".*language_model.*\.(q|up)_proj")
    file = path / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if ".layers.2." not in k}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="4 missing tensors"):
        convert.load_adapter(path, config_of())
    # Without a model the modules are those of the file.
    lora, files = convert.open_adapter(path)
    assert lora.target_modules == ("q_proj", "up_proj") and len(files) == 8


def test_parts_that_are_trained_whole_are_named(within):
    others = {"multi_modal_projector.linear.weight": np.ones((2, 2), np.float32)}
    names = ["multi_modal_projector"]
    path, _ = within(PLAIN, others, modules_to_save=names)
    with pytest.raises(CheckpointError, match="of multi_modal_projector"):
        convert.load_adapter(path, config_of())
    notes = []
    lora, _ = convert.load_adapter(path, config_of(), strict=False, skipped=notes)
    assert lora.modules_to_save is None
    assert "`modules_to_save` as adapter_config.json has them" in notes[2]
