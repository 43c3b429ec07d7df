"""Changes that a run makes to its base's config.json follow its adapter."""

import dataclasses
import json

import pytest

import convert
from convert.peft import open_adapter
from qlora_jax.errors import UserError
from qlora_jax.inference.identity import describe_context
from qlora_jax.models.config import (
    CHANGES_FILE,
    LlamaConfig,
    RopeScaling,
    apply_changes,
    changes_to_json,
    undo_changes,
)
from qlora_jax.runs.config import ModelConfig
from qlora_jax.runs.loading import load
from qlora_jax.runs.notes import note_length

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "truncate": False,
}


def longrope(pairs: int) -> dict:
    """Divisors for so many pairs of dimensions."""
    factors = {"short_factor": [1.0] * pairs, "long_factor": [1.5] * pairs}
    native = {"original_max_position_embeddings": 32}
    return {"rope_type": "longrope", **factors, **native}


def test_fields_are_changed_and_restored(tiny):
    config = LlamaConfig.from_hf(tiny)
    changed = apply_changes(
        config, {"max_position_embeddings": 64, "rope_scaling": LLAMA3}
    )
    assert changed.max_position_embeddings == 64
    assert changed.rope_scaling == RopeScaling(**LLAMA3)
    written = changed.to_hf()
    assert written["rope_scaling"] == LLAMA3
    assert LlamaConfig.from_hf(written) == changed
    assert undo_changes(changed) == config
    assert apply_changes(changed, {"rope_scaling": {"rope_type": "default"}}) == (
        dataclasses.replace(config, max_position_embeddings=64)
    )
    assert apply_changes(config, None) == apply_changes(config, {}) == config
    text = changes_to_json({"rope_scaling": LINEAR})
    assert apply_changes(config, text).rope_scaling == RopeScaling("linear", 2.0)
    assert changes_to_json({"rope_scaling": None}) is None


def test_every_rope_type_is_set_saved_and_read_again(tiny):
    config = LlamaConfig.from_hf(tiny)
    for scaling in (LINEAR, LLAMA3, YARN, longrope(config.head_dim // 2)):
        lists = (n for n, value in scaling.items() if isinstance(value, list))
        plain = scaling | {name: tuple(scaling[name]) for name in lists}
        changes = ModelConfig("base", rope_scaling=plain).config_changes
        text = changes_to_json(changes)
        assert json.loads(text) == {"rope_scaling": scaling}
        changed = apply_changes(config, text)
        assert changed == apply_changes(config, changes)
        assert changed.rope_scaling.to_hf() == scaling
        assert LlamaConfig.from_hf(changed.to_hf()) == changed


def test_a_family_takes_the_rope_types_that_its_files_may_have(tiny):
    phi = LlamaConfig.from_hf({**tiny, "model_type": "phi3", "architectures": []})
    with pytest.raises(
        UserError, match="'yarn' is not supported. Supported: 'default'"
    ):
        apply_changes(phi, {"rope_scaling": YARN})
    # The file's own field counts before that of `rope_scaling`.
    scaling = longrope(phi.rotary_dim // 2) | {"original_max_position_embeddings": 16}
    changed = apply_changes(phi, {"rope_scaling": scaling})
    again = LlamaConfig.from_hf(changed.to_hf())
    assert again.rope_scaling == changed.rope_scaling
    assert again.rope_scaling.original_max_position_embeddings == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": longrope(3)}, "numbers, one for each pair of rotated"),
        (
            {"rope_scaling": {**longrope(4), "long_factor": "1.0;2.0"}},
            "`rope_scaling.long_factor` must be a list of numbers, got '1.0;2.0'",
        ),
        ({"rope_theta": 1e6}, "model: `rope_theta` cannot be changed; `max"),
        ({"max_position_embeddings": 0}, "must be a positive integer, got 0"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "model: rope type 'dynamic' is not supported. Supported: 'default', 'lin",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs `factor`"),
        (
            {"rope_scaling": {**LINEAR, "factor": "two"}},
            "`rope_scaling.factor` must be a number, got 'two'",
        ),
        ({"rope_scaling": {**LINEAR, "beta": 1}}, "scaling: `beta` cannot be changed"),
        ({"rope_scaling": 3}, "`rope_scaling` must be a table, got 3"),
        ("{", "model: this is not JSON"),
        ("[]", r"model: must be an object, got \[\]"),
    ],
)
def test_changes_that_are_not_supported_are_refused(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        apply_changes(LlamaConfig.from_hf(tiny), changes, "model")


def test_the_settings_of_a_run_are_checked_at_construction():
    with pytest.raises(UserError, match="model: rope type 'dynamic' is not supported"):
        ModelConfig("base", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UserError, match="must be a positive integer, got -1"):
        ModelConfig("base", max_position_embeddings=-1)
    changes = {"max_position_embeddings": 64, "rope_scaling": LINEAR}
    assert ModelConfig("base", **changes).config_changes == changes
    assert ModelConfig("base").config_changes == {}


def test_changes_are_saved_with_an_adapter_and_apply_wherever_it_is_used(
    tiny, tiny_model, make_adapter, tmp_path
):
    plain = make_adapter(tiny)
    config = LlamaConfig.from_hf(tiny)
    lora, adapters = convert.load_adapter(plain, config)
    assert lora.base_config_changes is None
    changes = {"max_position_embeddings": 64, "rope_scaling": LINEAR}
    longer = dataclasses.replace(lora, base_config_changes=changes_to_json(changes))
    place = tmp_path / "longer"
    convert.save_adapter(place, longer, adapters, config)
    assert json.loads((place / CHANGES_FILE).read_text()) == changes
    assert "base_config_changes" not in (place / "adapter_config.json").read_text()
    assert open_adapter(place)[0] == longer
    convert.save_adapter(place, lora, adapters, config, overwrite=True)
    assert not (place / CHANGES_FILE).exists()
    convert.save_adapter(place, longer, adapters, config, overwrite=True)

    model = load(tiny_model, adapter=place, dtype="float32", quantization="none")
    assert model.config == apply_changes(config, changes)
    assert model.description.endswith(
        f"adapter `{place}`; context 64 tokens (the base's own: 32); positions scaled "
        "by 2 (linear)."
    )
    assert model.attach(None).description.endswith("computed in float32.")
    assert model.attach(plain).config == model.attach(None).config == config
    assert model.attach(plain).attach(place).config == model.config
    tokens = [list(range(20))]
    other = model.attach(plain).logits(tokens)
    assert float(abs(model.logits(tokens) - other).max()) > 1e-2

    # A tokenizer with the base's length gets the new one; another length is its own.
    for length, merged_length in ((32, 64), (48, 48)):
        tokenizer = {"model_max_length": length, "eos_token": "</s>"}
        (tiny_model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        report = convert.merge(tiny_model, place, tmp_path / f"merged-{length}")
        file = tmp_path / f"merged-{length}" / "tokenizer_config.json"
        tokenizer["model_max_length"] = merged_length
        assert json.loads(file.read_text()) == tokenizer
        said = report["config_changes"].get("model_max_length")
        assert said == ([32, 64] if length == 32 else None)

    report = convert.merge(tiny_model, place, tmp_path / "merged")
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert raw["max_position_embeddings"] == 64 and raw["rope_scaling"] == LINEAR
    assert report["config_changes"]["rope_scaling"] == [None, LINEAR]
    assert report["config_changes"]["max_position_embeddings"] == [32, 64]

    (place / CHANGES_FILE).write_text('{"rope_scaling": {"rope_type": "dynamic"}}')
    with pytest.raises(UserError, match=r"base_config.json`: rope type 'dynamic'"):
        open_adapter(place)


def test_rows_longer_than_the_context_are_reported(tiny, capsys):
    config = LlamaConfig.from_hf(tiny)
    note_length(config, 32)
    assert not capsys.readouterr().err
    note_length(config, 33)
    said = capsys.readouterr().err
    assert "the longest example has 33 tokens, and this model is meant for 32" in said
    assert "without scaled positions" in said
    note_length(apply_changes(config, {"rope_scaling": LINEAR}), 33)
    assert "with positions scaled by 2 (linear)" in capsys.readouterr().err
    # LongRoPE needs no factor.
    scaling = longrope(config.head_dim // 2)
    longer = apply_changes(config, {"rope_scaling": scaling})
    note_length(longer, 33)
    said = capsys.readouterr().err
    assert "positions scaled by a factor for each frequency (longrope)" in said
    assert describe_context(longer) in said
