import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert import names
from convert.files import read_json
from qlora_jax.config import PROJECTIONS, LlamaConfig
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora_config import LoraConfig
from qlora_jax.lora_init import init_adapters

REAL = (
    ("golden/llama32/fp32", "golden/adapters/llama32/plain"),
    ("golden/llama32/fp32", "golden/adapters/llama32/rslora"),
    ("golden/llama32/nf4_dq", "golden/adapters/llama32/qlora_plain"),
    ("data/stories260K", "data/adapters/stories260K-lora-r8-shakespeare"),
)
WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def config_of(path: Path) -> LlamaConfig:
    return LlamaConfig.from_hf(read_json(path / "config.json"))


@pytest.fixture
def config(tiny) -> LlamaConfig:
    return LlamaConfig.from_hf(tiny)


@pytest.mark.real
@pytest.mark.golden
@pytest.mark.parametrize("base, adapter", REAL)
def test_load_then_save_gives_the_file_that_peft_wrote(shared, tmp_path, base, adapter):
    config, source = config_of(shared / base), shared / adapter
    lora, adapters = convert.load_adapter(source, config)
    convert.save_adapter(tmp_path / "out", lora, adapters, config)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    ours, theirs = (
        read_json(d / "adapter_config.json") for d in (tmp_path / "out", source)
    )
    for raw in (ours, theirs):
        raw["target_modules"] = sorted(raw["target_modules"])
    # Fields that ours leaves out keep PEFT's defaults.
    assert ours == {k: theirs[k] for k in ours}
    assert theirs["lora_alpha"] == lora.lora_alpha
    lora2, adapters2 = convert.load_adapter(tmp_path / "out", config)
    assert lora2 == lora
    convert.save_adapter(tmp_path / "again", lora2, adapters2, config)
    for file in (WEIGHTS, "adapter_config.json"):
        one, two = (tmp_path / d / file for d in ("out", "again"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "targets, r", [(("q_proj",), 1), (("k_proj", "down_proj"), 3), (("up_proj",), 70)]
)
def test_every_tensor_lands_in_its_place(tiny, config, make_adapter, dtype, targets, r):
    path = make_adapter(tiny, targets, r, dtype)
    lora, adapters = convert.load_adapter(path, config)
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (r, 6, targets) or (
        sorted(lora.target_modules) == sorted(targets)
    )
    leaves = dict(names.walk(adapters))
    stored = safetensors.numpy.load_file(path / WEIGHTS)
    assert len(leaves) == 2 * len(targets)
    assert len(stored) == 4 * len(targets)
    for key, value in stored.items():
        bare = key.removeprefix("base_model.model.").removesuffix(".weight")
        where, layer = names.parse_key(bare)
        assert leaves[where].dtype == np.float32
        np.testing.assert_array_equal(leaves[where][layer], value.astype(np.float32))


def test_fresh_adapters_on_a_device_are_saved_and_loaded(config, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    base = names.abstract_base(config)
    adapters = init_adapters(jax.random.key(0), base, lora)
    convert.save_adapter(
        tmp_path / "out", lora, adapters, config, base_model_name_or_path="the/base"
    )
    raw = read_json(tmp_path / "out" / "adapter_config.json")
    assert raw["base_model_name_or_path"] == "the/base"
    assert raw["target_modules"] == sorted(PROJECTIONS)
    lora2, loaded = convert.load_adapter(tmp_path / "out", config)
    assert lora2.r == 4
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(a, b)


def test_output_head_of_an_untied_model_can_be_adapted(config, tmp_path):
    lora = LoraConfig(r=2, target_modules=("lm_head", "q_proj"))
    adapters = init_adapters(jax.random.key(0), names.abstract_base(config), lora)
    convert.save_adapter(tmp_path / "out", lora, adapters, config)
    assert "base_model.model.lm_head.lora_A.weight" in safetensors.numpy.load_file(
        tmp_path / "out" / WEIGHTS
    )
    _, loaded = convert.load_adapter(tmp_path / "out", config)
    np.testing.assert_array_equal(
        loaded["lm_head"]["lora_A"], adapters["lm_head"]["lora_A"]
    )


# --- What is refused, and how it is said ---


@pytest.mark.golden
@pytest.mark.parametrize(
    "name, match",
    [
        ("dora", "`use_dora`=True"),
        ("rank_alpha_pattern", "`rank_pattern`="),
        ("mts_embed_head", "`modules_to_save`="),
        ("trainable_tokens", "`trainable_token_indices`="),
        ("layers_to_transform", "`layers_to_transform`="),
        ("regex_targets", "'q_proj' in 2 of 4 layers|'down_proj' in 2 of 4 layers"),
    ],
)
def test_lora_features_not_computed_here_are_refused_by_name(golden, name, match):
    with pytest.raises(UserError, match=match):
        convert.load_adapter(
            golden / "adapters/llama32" / name, config_of(golden / "llama32/fp32")
        )


def test_everything_wrong_is_said_at_once(tiny, config, make_adapter, edit_tensors):
    path = make_adapter(tiny)

    def change(tensors):
        del tensors[KEY]
        b = KEY.replace("lora_A", "lora_B")
        tensors[b] = np.zeros((64, 4), np.float32)
        other = KEY.replace("layers.1", "layers.0")
        tensors[other] = tensors[other].astype(np.float64)
        tensors[KEY.replace("q_proj", "v_proj")] = np.zeros((3, 64), np.float32)

    edit_tensors(path / WEIGHTS, change)
    with pytest.raises(CheckpointError) as caught:
        convert.load_adapter(path, config)
    for part in (
        "`r`=3, `target_modules`=('down_proj', 'q_proj')",
        f"1 missing tensors: {KEY}",
        f"{KEY.replace('lora_A', 'lora_B')} [64, 4] instead of [64, 3]",
        f"1 tensors of another dtype: {KEY.replace('layers.1', 'layers.0')} F64",
        f"1 unexpected tensors: {KEY.replace('q_proj', 'v_proj')}",
        "Is it the adapter of another model or rank?",
    ):
        assert part in str(caught.value)


def test_wrong_rank_in_the_configuration(tiny, config, make_adapter):
    path = make_adapter(tiny)
    raw = read_json(path / "adapter_config.json")
    (path / "adapter_config.json").write_text(json.dumps({**raw, "r": 4}))
    with pytest.raises(CheckpointError, match=r"\[3, 64\] instead of \[4, 64\]"):
        convert.load_adapter(path, config)


def test_targets_lost_from_the_configuration(tiny, config, make_adapter):
    path = make_adapter(tiny)
    raw = read_json(path / "adapter_config.json")
    del raw["target_modules"]  # PEFT's default: q_proj and v_proj
    (path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        convert.load_adapter(path, config)
    assert "4 missing tensors" in str(caught.value)
    assert "4 unexpected tensors" in str(caught.value)


def test_adapter_of_a_larger_model(tiny, make_adapter):
    path = make_adapter({**tiny, "num_hidden_layers": 3})
    config = LlamaConfig.from_hf(tiny)
    with pytest.raises(CheckpointError, match="4 unexpected tensors: .*layers.2.mlp"):
        convert.load_adapter(path, config)


@pytest.mark.parametrize(
    "old, new, hint",
    [
        ("base_model.model.", "", "PEFT's keys look like base_model.model.model.lay"),
        (".lora_A.", ".lora_A.default.", "The keys carry an adapter name"),
    ],
)
def test_other_spellings_of_the_keys(
    tiny, config, make_adapter, edit_tensors, old, new, hint
):
    path = make_adapter(tiny)

    def change(tensors):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    edit_tensors(path / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=f"missing tensors.*unexpected.*{hint}"):
        convert.load_adapter(path, config)


def test_target_that_is_not_in_the_model(tiny, config, make_adapter):
    path = make_adapter(tiny)
    raw = read_json(path / "adapter_config.json")
    raw["target_modules"] += ["c_attn"]
    (path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="names 'c_attn', which selects no linear"):
        convert.load_adapter(path, config)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_is_reported_with_its_tensor(
    tiny, config, make_adapter, edit_tensors, tmp_path, value
):
    path = make_adapter(tiny)
    edit_tensors(path / WEIGHTS, lambda t: t[KEY].__setitem__((0, 0), value))
    with pytest.raises(CheckpointError, match=f"Tensor `{KEY}` contains NaN"):
        convert.load_adapter(path, config)


def test_directories_that_are_something_else(tiny, config, make_adapter, tiny_model):
    path = make_adapter(tiny)
    with pytest.raises(CheckpointError, match="does not exist. An adapter is a local"):
        convert.load_adapter(path / "no", config)
    with pytest.raises(CheckpointError, match="is a file; give the PEFT directory"):
        convert.load_adapter(path / WEIGHTS, config)
    with pytest.raises(CheckpointError, match="is a model: it has no adapter_config"):
        convert.load_adapter(tiny_model, config)
    with pytest.raises(CheckpointError, match="is no PEFT adapter.*Did you mean `.*ad"):
        convert.load_adapter(path.parent, config)
    os.rename(path / WEIGHTS, path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin, a pickle file"):
        convert.load_adapter(path, config)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        convert.load_adapter(path, config)


def test_truncated_file(tiny, config, make_adapter):
    path = make_adapter(tiny)
    file = path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        convert.load_adapter(path, config)


# --- Saving ---


def test_save_checks_the_tree(tiny, config, make_adapter, tmp_path):
    lora, adapters = convert.load_adapter(make_adapter(tiny), config)
    attention = adapters["model"]["layers"]["self_attn"]
    attention["v_proj"] = attention["q_proj"]
    attention["q_proj"] = {"lora_A": np.zeros((2, 4, 64), np.float32)}
    mlp = adapters["model"]["layers"]["mlp"]["down_proj"]
    mlp["lora_A"] = mlp["lora_A"].astype(np.float64)
    with pytest.raises(CheckpointError) as caught:
        convert.save_adapter(tmp_path / "out", lora, adapters, config)
    for part in (
        "1 missing arrays: model.layers.self_attn.q_proj.lora_B",
        "self_attn.q_proj.lora_A [2, 4, 64] instead of [2, 3, 64]",
        "1 arrays of another dtype: model.layers.mlp.down_proj.lora_A float64",
        "2 unexpected arrays: model.layers.self_attn.v_proj.lora_A",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_save_refuses_nan(tiny, config, make_adapter, tmp_path):
    lora, adapters = convert.load_adapter(make_adapter(tiny), config)
    adapters["model"]["layers"]["self_attn"]["q_proj"]["lora_A"][1, 2, 3] = np.nan
    with pytest.raises(CheckpointError, match=f"Tensor `{KEY}` contains NaN"):
        convert.save_adapter(tmp_path / "out", lora, adapters, config)
    assert not (tmp_path / "out").exists()


def test_bfloat16_trees_are_written_as_float32(tiny, config, make_adapter, tmp_path):
    path = make_adapter(tiny, dtype=ml_dtypes.bfloat16)
    lora, adapters = convert.load_adapter(path, config)
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), adapters)
    convert.save_adapter(tmp_path / "a", lora, adapters, config)
    convert.save_adapter(tmp_path / "b", lora, narrow, config)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (
        tmp_path / "b" / WEIGHTS
    ).read_bytes()


def test_save_replaces_a_directory_only_when_told(tiny, config, make_adapter, tmp_path):
    lora, adapters = convert.load_adapter(make_adapter(tiny), config)
    out = tmp_path / "out"
    convert.save_adapter(out, lora, adapters, config)
    before = (out / WEIGHTS).read_bytes()
    adapters = jax.tree.map(lambda a: a + np.float32(1), adapters)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.save_adapter(out, lora, adapters, config)
    assert (out / WEIGHTS).read_bytes() == before
    convert.save_adapter(out, lora, adapters, config, overwrite=True)
    assert (out / WEIGHTS).read_bytes() != before
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", WEIGHTS]
