import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.verify import compare_adapters as compare
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.tree import PROJECTIONS
from tests.convert.reference import WEIGHTS, adapter_of, edit_json, pack

KEY = "model.layers.1.mlp.up_proj.weight"


def test_shards_and_a_single_file_are_the_same(make_model):
    a, b = make_model(name="a"), make_model(name="b", shards=3)
    result = compare(a, b)
    assert result.equal
    assert (result.kind, result.tensors) == ("model", 21)


def test_every_kind_of_difference(make_model):
    norm_key, shape_key = "model.norm.weight", "model.embed_tokens.weight"
    nan_key = "model.layers.0.input_layernorm.weight"

    def change(tensors):
        del tensors["lm_head.weight"]
        tensors["extra"] = np.zeros(1, np.float32)
        tensors[KEY][3, 4] += 0.5
        tensors[norm_key] = tensors[norm_key].astype(ml_dtypes.bfloat16)
        tensors[shape_key] = tensors[shape_key][:-1]
        tensors[nan_key] = np.full(64, np.nan, np.float32)

    result = compare(make_model(name="a"), make_model(change, "b", rms_norm_eps=0.5))
    assert not result.equal
    nothing = {"missing": [], "extra": [], "different": [], "config": {}}
    for kind in nothing:  # each is enough
        others = {name: none for name, none in nothing.items() if name != kind}
        assert not dataclasses.replace(result, **others).equal
    assert (result.missing, result.extra) == (["lm_head.weight"], ["extra"])
    assert result.config == {"rms_norm_eps": [1e-6, 0.5]}
    different = {d.name: d for d in result.different}
    assert set(different) == {KEY, norm_key, shape_key, nan_key}
    assert different[KEY].max_abs_difference == pytest.approx(0.5, abs=1e-6)
    norm = different[norm_key]
    assert (norm.a, norm.b) == ("F32 [64]", "BF16 [64]")
    assert 0 < norm.max_abs_difference < 0.02
    assert different[shape_key].b == "F32 [23, 64]"
    assert different[shape_key].max_abs_difference is None
    assert different[nan_key].max_abs_difference is None
    assert json.loads(json.dumps(result.to_json()))["equal"] is False


def test_minus_zero_is_another_byte(make_model):
    pair = (
        make_model(lambda t, zero=zero: t[KEY].__setitem__((0, 0), zero), str(zero))
        for zero in (0.0, -0.0)
    )
    assert [d.max_abs_difference for d in compare(*pair).different] == [0.0]


def test_adapters(tiny, make_adapter, tmp_path):
    a = make_adapter(tiny, base_model_name_or_path="elsewhere")
    same = make_adapter(tiny, name="same")
    assert compare(a, same).equal
    # A run directory stands for its adapter.
    assert compare(tmp_path, same).kind == "adapter"
    result = compare(a, make_adapter(tiny, name="alpha", lora_alpha=7))
    assert result.config == {"lora_alpha": [6, 7]}
    assert not result.equal
    result = compare(a, make_adapter(tiny, name="seed", seed=2))
    assert len(result.different) == 8
    result = compare(a, make_adapter(tiny, ("q_proj",), name="fewer"))
    assert len(result.missing) == 4
    assert result.config == {"target_modules": [["down_proj", "q_proj"], ["q_proj"]]}


@pytest.fixture
def save(config, tmp_path):
    """A function: name, settings -> an adapter of the numbers that its shapes give."""

    def numbers(shape):
        return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)

    def save(name, *targets, **fields):
        if targets:
            fields["target_modules"] = targets
        lora = LoraConfig(**{"r": 2, "lora_alpha": 4, **fields})
        adapter = adapter_of(config, lora, numbers)
        convert.save_adapter(tmp_path / name, lora, adapter, config)
        return tmp_path / name

    return save


NORMS = ("model.norm", "input_layernorm", "post_attention_layernorm")
NORM = {"target_modules": ("q_proj",), "modules_to_save": ("norm",)}
SAME = {
    "names in another order": (
        {"target_modules": ("q_proj", "up_proj")},
        {"target_modules": ("up_proj", "q_proj")},
    ),
    "a list and an expression": (
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": r".*\.[qv]_proj"},
    ),
    "a list and all-linear": (
        {"target_modules": PROJECTIONS},
        {"target_modules": "all-linear"},
    ),
    "a name that is excluded again": (
        {"target_modules": ("q_proj",)},
        {"target_modules": ("q_proj", "k_proj"), "exclude_modules": ("k_proj",)},
    ),
    "alpha by pattern": (
        {"lora_alpha": 8},
        {"lora_alpha": 3, "alpha_pattern": {".*": 8}},
    ),
    "rank by pattern": ({}, {"r": 1, "rank_pattern": {"proj": 5, r".*_proj": 2}}),
    "layers and paths": (
        {"target_modules": ("q_proj",), "layers_to_transform": 1},
        {"target_modules": ("model.layers.1.self_attn.q_proj",)},
    ),
    "one factor of r=4": (
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 12},
    ),
    "rows of a named table": (
        {"trainable_token_indices": (3, 1)},
        {"trainable_token_indices": {"model.embed_tokens": (3, 1)}},
    ),
    "what is saved whole": (NORM, {**NORM, "modules_to_save": NORMS}),
}


@pytest.mark.parametrize("name", SAME)
def test_spelling_makes_no_difference(save, config, name):
    directories, texts = [], []
    for which, fields in zip("ab", SAME[name], strict=True):
        file = save(which, **fields) / "adapter_config.json"
        if "target_modules" in fields:  # our writer spells some of them out
            edit_json(file, target_modules=fields["target_modules"])
        texts.append(file.read_text())
        directories.append(file.parent)
    assert texts[0] != texts[1]
    assert compare(*directories).equal
    assert compare(*directories, base=config).equal


def test_what_is_selected_differs(save, config):
    both, pattern = ("q_proj", "v_proj"), {"layers.1.*q_proj": 7}
    a, b = save("a", *both), save("b", *both, alpha_pattern=pattern)
    result = compare(a, b)
    assert result.config == {"alpha_pattern": [{}, pattern]}
    assert not result.different
    q_proj = ["r 2, scaling 2.0", "r 2, scaling [2.0, 3.5]"]
    assert compare(a, b, base=config).config == {
        **{"alpha_pattern": [{}, pattern], "model.layers.self_attn.q_proj": q_proj}
    }
    c = save(
        *("c", "q_proj"),
        modules_to_save=("layers.0.self_attn.v_proj",),
        trainable_token_indices=(4, 2),
        use_dora=True,
    )
    result = compare(a, c, base=config)
    assert result.missing and result.extra
    attention = "model.layers.self_attn"
    trained = "fully trained in layers [0]"
    for name, pair in {
        f"{attention}.q_proj": ["r 2, scaling 2.0", "r 2, scaling 2.0, DoRA"],
        f"{attention}.v_proj": ["r 2, scaling 2.0", None],
        f"{attention}.v_proj.weight": [None, trained],
        "model.embed_tokens": [None, "rows [4, 2]"],
        "use_dora": [False, True],
    }.items():
        assert result.config[name] == pair
    d, e = (
        save(f"rows{rows}", *both, trainable_token_indices=rows)
        for rows in ((2, 4), (4, 2))
    )
    assert compare(d, e).config == {"trainable_token_indices": [(2, 4), (4, 2)]}
    assert json.loads(json.dumps(compare(d, e).to_json()))


def test_bases_they_were_trained_on(save):
    a, b = (save(x, base_fingerprint=x * 64) for x in "ab")
    result = compare(a, b)
    assert result.equal
    assert result.notes == [
        "they were trained on different bases (or on different quantizations or dtypes "
        "of the same base), with fingerprints aaaaaaaaaaaa and bbbbbbbbbbbb"
    ]
    assert compare(a, a).notes == compare(a, save("nowhere")).notes == []


def test_copies_of_tensors_of_the_base_are_no_part_of_an_adapter(save, edit_tensors):
    a, b = (save(name, "embed_tokens", use_dora=True) for name in "ab")
    module = "base_model.model.model.embed_tokens"
    copy, magnitude = f"{module}.base_layer.weight", f"{module}.lora_magnitude_vector"
    table = np.ones((24, 64), np.float32)

    def change(tensors):
        tensors[copy] = table
        # As other versions of PEFT spell it.
        tensors[f"{magnitude}.weight"] = tensors.pop(magnitude)

    edit_tensors(b / WEIGHTS, change)
    for pair in ((a, b), (b, a)):
        result = compare(*pair)
        assert result.equal
        note = f"`{b}` also holds copies of the base's tensors: {copy}"
        assert result.notes == [note]
    edit_tensors(a / WEIGHTS, lambda tensors: tensors.update({copy: 2 * table}))
    assert [d.name for d in compare(a, b).different] == [copy]


def test_packed_and_dense_differ(tiny_model, tmp_path):
    result = compare(tiny_model, pack(tiny_model, tmp_path / "packed"))
    assert len(result.extra) == 14 * 3
    assert len(result.different) == 14


def test_what_cannot_be_compared(tiny, config, tiny_model, make_adapter, make_model):
    with pytest.raises(UserError, match="A base goes with two adapters"):
        compare(tiny_model, tiny_model, base=config)
    with pytest.raises(UserError, match="is an adapter and `.*` is a model; give two"):
        compare(make_adapter(tiny), tiny_model)
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(tiny_model, tiny_model / "no")
    narrow = {"x": np.zeros(4, ml_dtypes.float8_e4m3fn)}
    a, b = (make_model(lambda t: t.update(narrow), name) for name in "ab")
    with pytest.raises(UserError, match="`x`: F8_E4M3 .* cannot be compared"):
        compare(a, b)
