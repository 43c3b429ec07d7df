import json

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.verify import compare_adapters
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.tree import PROJECTIONS

KEY = "model.layers.1.mlp.up_proj.weight"


def test_shards_and_a_single_file_are_the_same(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    a, b = save_model(tiny, tensors, "a"), save_model(tiny, tensors, "b", shards=3)
    result = compare_adapters(a, b)
    assert result.equal
    assert (result.kind, result.tensors) == ("model", len(tensors))


def test_every_kind_of_difference(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    other = dict(tensors)
    del other["lm_head.weight"]
    other["extra"] = np.zeros(1, np.float32)
    other[KEY] = tensors[KEY].copy()
    other[KEY][3, 4] += 0.5
    other["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    shape_key = "model.embed_tokens.weight"
    other[shape_key] = tensors[shape_key][:-1]
    nan_key = "model.layers.0.input_layernorm.weight"
    other[nan_key] = np.full(64, np.nan, np.float32)
    a = save_model(tiny, tensors, "a")
    b = save_model({**tiny, "rms_norm_eps": 0.5}, other, "b")
    result = compare_adapters(a, b)
    assert not result.equal
    assert (result.missing, result.extra) == (["lm_head.weight"], ["extra"])
    assert result.config == {"rms_norm_eps": [1e-6, 0.5]}
    different = {d.name: d for d in result.different}
    assert set(different) == {KEY, "model.norm.weight", shape_key, nan_key}
    assert different[KEY].max_abs_difference == pytest.approx(0.5, abs=1e-6)
    norm = different["model.norm.weight"]
    assert (norm.a, norm.b) == ("F32 [64]", "BF16 [64]")
    assert 0 < norm.max_abs_difference < 0.02
    assert different[shape_key].b == "F32 [23, 64]"
    assert different[shape_key].max_abs_difference is None
    assert different[nan_key].max_abs_difference is None
    assert json.loads(json.dumps(result.to_json()))["equal"] is False


def test_minus_zero_is_another_byte(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    tensors[KEY][0, 0] = 0.0
    other = {**tensors, KEY: tensors[KEY].copy()}
    other[KEY][0, 0] = -0.0
    result = compare_adapters(
        save_model(tiny, tensors, "a"), save_model(tiny, other, "b")
    )
    assert [d.max_abs_difference for d in result.different] == [0.0]


def test_adapters(tiny, make_adapter):
    a = make_adapter(tiny, name="a")
    same = make_adapter(tiny, name="same", base_model_name_or_path="elsewhere")
    assert compare_adapters(a, same).equal
    result = compare_adapters(a, make_adapter(tiny, name="alpha", lora_alpha=7))
    assert result.config == {"lora_alpha": [6, 7]}
    assert not result.equal
    result = compare_adapters(a, make_adapter(tiny, name="seed", seed=2))
    assert len(result.different) == 8
    result = compare_adapters(a, make_adapter(tiny, ("q_proj",), name="fewer"))
    assert len(result.missing) == 4
    assert result.config == {"target_modules": [["down_proj", "q_proj"], ["q_proj"]]}


def save(tmp_path, tiny, name, fingerprint=None, value=1.0, config=None, **fields):
    """An adapter whose numbers follow from its names and shapes alone."""
    config = LlamaConfig.from_hf({**tiny, **(config or {})})
    fields = {"r": 2, "lora_alpha": 4, "base_fingerprint": fingerprint, **fields}
    lora = LoraConfig(**fields)
    tree: dict = {}
    for path, shape in (
        select(model_params.abstract_base(config), lora).shapes().items()
    ):
        leaf = np.linspace(0, value, int(np.prod(shape)), dtype=np.float32)
        trees.put(tree, path, leaf.reshape(shape))
    convert.save_adapter(tmp_path / name, lora, tree, config)
    return tmp_path / name


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
    "rank by pattern": (
        {"r": 2, "lora_alpha": 4},
        {"r": 1, "lora_alpha": 4, "rank_pattern": {"proj": 5, r".*_proj": 2}},
    ),
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
    "what is saved whole": (
        {"modules_to_save": ("norm",), "target_modules": ("q_proj",)},
        {
            "modules_to_save": (
                *("model.norm", "input_layernorm", "post_attention_layernorm"),
            ),
            "target_modules": ("q_proj",),
        },
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_spelling_makes_no_difference(tiny, tmp_path, name):
    directories, texts = [], []
    for which, fields in zip("ab", SAME[name], strict=True):
        path = save(tmp_path, tiny, which, **fields)
        raw = json.loads((path / "adapter_config.json").read_text())
        # Our writer spells some of them out.
        raw["target_modules"] = fields.get("target_modules", raw["target_modules"])
        texts.append(json.dumps(raw))
        (path / "adapter_config.json").write_text(texts[-1])
        directories.append(path)
    assert texts[0] != texts[1]
    assert compare_adapters(*directories).equal
    assert compare_adapters(*directories, base=LlamaConfig.from_hf(tiny)).equal


def test_what_is_selected_differs(tiny, tmp_path):
    config = LlamaConfig.from_hf(tiny)
    fields = {"target_modules": ("q_proj", "v_proj")}
    a = save(tmp_path, tiny, "a", **fields)
    b = save(tmp_path, tiny, "b", alpha_pattern={"layers.1.*q_proj": 7}, **fields)
    result = compare_adapters(a, b)
    assert result.config == {"alpha_pattern": [{}, {"layers.1.*q_proj": 7}]}
    assert compare_adapters(a, b, base=config).config == {
        **result.config,
        "model.layers.self_attn.q_proj": [
            "r 2, scaling 2.0",
            "r 2, scaling [2.0, 3.5]",
        ],
    }
    assert not result.different
    c = save(
        tmp_path,
        tiny,
        "c",
        target_modules=("q_proj",),
        modules_to_save=("layers.0.self_attn.v_proj",),
        trainable_token_indices=(4, 2),
        use_dora=True,
    )
    result = compare_adapters(a, c, base=config)
    assert result.config["model.layers.self_attn.q_proj"][1] == "r 2, scaling 2.0, DoRA"
    assert result.config["model.layers.self_attn.v_proj"] == ["r 2, scaling 2.0", None]
    assert result.config["model.layers.self_attn.v_proj.weight"] == [
        None,
        "fully trained in layers [0]",
    ]
    assert result.config["model.embed_tokens"] == [None, "rows [4, 2]"]
    assert result.config["use_dora"] == [False, True]
    assert result.missing and result.extra
    d = save(tmp_path, tiny, "d", trainable_token_indices=(2, 4), **fields)
    e = save(tmp_path, tiny, "e", trainable_token_indices=(4, 2), **fields)
    assert compare_adapters(d, e).config == {
        "trainable_token_indices": [(2, 4), (4, 2)]
    }
    assert json.loads(json.dumps(compare_adapters(d, e).to_json()))


def test_bases_they_were_trained_on(tiny, tmp_path):
    a = save(tmp_path, tiny, "a", fingerprint="a" * 64)
    b = save(tmp_path, tiny, "b", fingerprint="b" * 64)
    nowhere = save(tmp_path, tiny, "nowhere")
    result = compare_adapters(a, b)
    assert result.equal
    assert result.notes == [
        "they were trained on different bases (or on different quantizations or dtypes "
        "of the same base), with fingerprints aaaaaaaaaaaa and bbbbbbbbbbbb"
    ]
    assert compare_adapters(a, a).notes == compare_adapters(a, nowhere).notes == []


def test_copies_of_tensors_of_the_base_are_no_part_of_an_adapter(
    tiny, tmp_path, edit_tensors
):
    a = save(tmp_path, tiny, "a", target_modules=("embed_tokens",), use_dora=True)
    b = save(tmp_path, tiny, "b", target_modules=("embed_tokens",), use_dora=True)
    module = "base_model.model.model.embed_tokens"
    copy = f"{module}.base_layer.weight"
    table = np.ones((24, 64), np.float32)

    def change(tensors):
        tensors[copy] = table
        # As other versions of PEFT spell it.
        magnitude = f"{module}.lora_magnitude_vector"
        tensors[f"{magnitude}.weight"] = tensors.pop(magnitude)

    edit_tensors(b / "adapter_model.safetensors", change)
    for pair in ((a, b), (b, a)):
        result = compare_adapters(*pair)
        assert result.equal
        assert result.notes == [
            f"`{b}` also holds copies of the base's tensors: {copy}"
        ]
    table = table * 2
    edit_tensors(
        a / "adapter_model.safetensors", lambda tensors: tensors.update({copy: table})
    )
    assert [d.name for d in compare_adapters(a, b).different] == [copy]


def test_a_base_goes_with_adapters(tiny, tiny_model):
    with pytest.raises(UserError, match="A base goes with two adapters"):
        compare_adapters(tiny_model, tiny_model, base=LlamaConfig.from_hf(tiny))


def test_run_directory_stands_for_its_adapter(tiny, make_adapter, tmp_path):
    make_adapter(tiny)
    assert compare_adapters(tmp_path, tmp_path / "adapter").kind == "adapter"


def test_packed_and_dense_differ(tiny_model, tmp_path):
    out = tmp_path / "packed"
    convert.save_llama(out, *convert.load_llama(tiny_model))
    result = compare_adapters(tiny_model, out)
    assert len(result.extra) == 14 * 3
    assert len(result.different) == 14


def test_adapter_against_model(tiny, tiny_model, make_adapter):
    with pytest.raises(UserError, match="is an adapter and `.*` is a model; give two"):
        compare_adapters(make_adapter(tiny), tiny_model)


def test_unreadable_directory(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        compare_adapters(tiny_model, tmp_path / "no")


def test_dtype_that_cannot_be_compared(tiny, make_tensors, save_model):
    tensors = make_tensors(tiny)
    tensors["x"] = np.zeros(4, ml_dtypes.float8_e4m3fn)
    a, b = save_model(tiny, tensors, "a"), save_model(tiny, tensors, "b")
    with pytest.raises(UserError, match="`x`: F8_E4M3 .* cannot be compared"):
        compare_adapters(a, b)
