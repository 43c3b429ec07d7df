"""PEFT directories: what has to be in them, and what is done where it is not."""

import dataclasses
import functools
import json
import os
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import convert
from convert.files import read_json
from convert.peft import open_adapter
from convert.peft_writing import adapter_bytes
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.lora.init import absorb, factor_out, init_adapters
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.tree import PROJECTIONS

GOLDEN = (
    *(
        (f"llama32/{name}", "llama32/fp32")
        for name in "plain rslora dora emb_lora rank_alpha_pattern mts_embed_head "
        "regex_targets trainable_tokens layers_to_transform".split()
    ),
    ("llama32/qlora_plain", "llama32/nf4_dq"),
    ("llamabias/bias_lora_only", "llamabias/fp32"),
)
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"


def config_of(path: Path) -> LlamaConfig:
    return LlamaConfig.from_hf(read_json(path / "config.json"))


@pytest.fixture
def config(tiny) -> LlamaConfig:
    return LlamaConfig.from_hf(tiny)


def stored(path: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path / WEIGHTS)


def edit_config(path: Path, **fields) -> None:
    raw = {**read_json(path / "adapter_config.json"), **fields}
    raw = {k: v for k, v in raw.items() if v != "REMOVED"}
    (path / "adapter_config.json").write_text(json.dumps(raw))


def same_files(a: Path, b: Path) -> None:
    for file in (WEIGHTS, "adapter_config.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


@pytest.mark.golden
@pytest.mark.parametrize("adapter, base", GOLDEN)
def test_load_then_save_gives_the_file_that_peft_wrote(golden, tmp_path, base, adapter):
    config, source = config_of(golden / base), golden / "adapters" / adapter
    lora, adapters = convert.load_adapter(source, config)
    out, again = tmp_path / "out", tmp_path / "again"
    convert.save_adapter(out, lora, adapters, config)
    theirs = stored(source)
    # Copies of the base's own tables are not written.
    copies = {k for k in theirs if k.endswith("base_layer.weight")}
    assert bool(copies) == (adapter == "llama32/emb_lora")
    if not copies:
        assert (out / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    ours = stored(out)
    assert set(ours) == set(theirs) - copies
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])
    ours, theirs = (read_json(d / "adapter_config.json") for d in (out, source))
    for raw in (ours, theirs):
        if isinstance(raw["target_modules"], list):
            raw["target_modules"] = sorted(raw["target_modules"])
    # Fields that ours leaves out keep PEFT's defaults.
    assert ours == {k: theirs[k] for k in ours}
    assert list(ours["rank_pattern"]) == list(theirs["rank_pattern"])
    lora2, adapters2 = convert.load_adapter(out, config)
    assert lora2 == lora
    jax.tree.map(np.testing.assert_array_equal, adapters2, adapters)
    convert.save_adapter(again, lora2, adapters2, config)
    same_files(out, again)
    assert adapter_bytes(config, lora) == (out / WEIGHTS).stat().st_size


@pytest.mark.real
def test_an_adapter_trained_by_peft_comes_back_byte_for_byte(shared_data, tmp_path):
    config = config_of(shared_data / "stories260K")
    source = shared_data / "adapters" / "stories260K-lora-r8-shakespeare"
    lora, adapters = convert.load_adapter(source, config)
    convert.save_adapter(tmp_path / "out", lora, adapters, config)
    ours, theirs = (p / WEIGHTS for p in (tmp_path / "out", source))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "targets, r", [(("q_proj",), 1), (("k_proj", "down_proj"), 3), (("up_proj",), 70)]
)
def test_every_tensor_is_read_into_its_array(
    tiny, config, make_adapter, dtype, targets, r
):
    path = make_adapter(tiny, targets, r, dtype)
    lora, adapters = convert.load_adapter(path, config)
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (r, 6, targets) or (
        sorted(lora.target_modules) == sorted(targets)
    )
    leaves = dict(trees.walk(adapters))
    stored = safetensors.numpy.load_file(path / WEIGHTS)
    assert len(leaves) == 2 * len(targets)
    assert len(stored) == 4 * len(targets)
    for key, value in stored.items():
        bare = key.removeprefix("base_model.model.").removesuffix(".weight")
        where, layer = trees.parse_key(bare)
        assert leaves[where].dtype == np.float32
        np.testing.assert_array_equal(leaves[where][layer], value.astype(np.float32))


def test_fresh_adapters_on_a_device_are_saved_and_loaded(config, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    base = model_params.abstract_base(config)
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


# --- Every kind of adapter: its keys, written by hand ---


def of(module: str, layers=(0, 1)) -> list[str]:
    return [f"model.layers.{i}.{module}" for i in layers]


def pairs(modules: list[str], r: int, out: int, inner: int) -> dict[str, tuple]:
    return {
        key: shape
        for m in modules
        for key, shape in (
            (f"{m}.lora_A.weight", (r, inner)),
            (f"{m}.lora_B.weight", (out, r)),
        )
    }


def each(modules: list[str], suffix: str, *shape: int) -> dict[str, tuple]:
    return {f"{m}.{suffix}": shape for m in modules}


Q, UP, DOWN = "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"
V, D, F = 24, 64, 40
EMBED, HEAD = "model.embed_tokens", "lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
OF_EMBED = {
    f"{EMBED}.lora_embedding_A": (4, V),
    f"{EMBED}.lora_embedding_B": (D, 4),
}


def lora_of(*targets: str, **fields) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": targets or ("q_proj",), **fields})


# name -> (configuration, fields of config.json, keys and shapes)
KINDS = {
    "plain": (lora_of(), {}, pairs(of(Q), 4, D, D)),
    "all-linear": (
        LoraConfig(r=4, target_modules="all-linear"),
        {},
        {
            **pairs(of(Q) + of("self_attn.o_proj"), 4, D, D),
            **pairs(of("self_attn.k_proj") + of("self_attn.v_proj"), 4, 32, D),
            **pairs(of("mlp.gate_proj") + of(UP), 4, F, D),
            **pairs(of(DOWN), 4, D, F),
        },
    ),
    "lora_bias": (
        lora_of("up_proj", "lm_head", lora_bias=True),
        {},
        {
            **pairs(of(UP), 4, F, D),
            **each(of(UP), "lora_B.bias", F),
            **pairs([HEAD], 4, V, D),
            f"{HEAD}.lora_B.bias": (V,),
        },
    ),
    "dora": (
        lora_of("down_proj", "embed_tokens", "lm_head", use_dora=True),
        {},
        {
            **pairs(of(DOWN), 4, D, F),
            **each(of(DOWN), "lora_magnitude_vector", D),
            **OF_EMBED,
            f"{EMBED}.lora_magnitude_vector": (D,),
            **pairs([HEAD], 4, V, D),
            f"{HEAD}.lora_magnitude_vector": (V,),
        },
    ),
    "ranks": (
        lora_of(
            *("q_proj", "up_proj"),
            rank_pattern={"layers.0.self_attn.q_proj": 1, "up_proj": 6},
            alpha_pattern={"q_proj": 0.5},
            layers_to_transform=None,
        ),
        {},
        {
            **pairs(of(Q, (0,)), 1, D, D),
            **pairs(of(Q, (1,)), 4, D, D),
            **pairs(of(UP), 6, F, D),
        },
    ),
    "one layer": (
        lora_of("q_proj", layers_to_transform=1),
        {},
        pairs(of(Q, (1,)), 4, D, D),
    ),
    "lora_only": (
        lora_of("q_proj", "layers.1.mlp.up_proj", bias="lora_only"),
        {"attention_bias": True, "mlp_bias": True},
        {
            **pairs(of(Q), 4, D, D),
            **each(of(Q), "base_layer.bias", D),
            **pairs(of(UP, (1,)), 4, F, D),
            **each(of(UP, (1,)), "base_layer.bias", F),
        },
    ),
    "all biases": (
        lora_of("layers.1.mlp.up_proj", bias="all", lora_bias=True),
        {"mlp_bias": True},
        {
            **pairs(of(UP, (1,)), 4, F, D),
            **each(of(UP, (1,)), "lora_B.bias", F),
            **each(of(UP, (1,)), "base_layer.bias", F),
            **each(of(UP, (0,)), "bias", F),
            **each(of("mlp.gate_proj"), "bias", F),
            **each(of(DOWN), "bias", D),
        },
    ),
    "full": (
        lora_of(modules_to_save=("model.norm", "layers.0.mlp", "embed_tokens")),
        {},
        {
            **pairs(of(Q), 4, D, D),
            "model.norm.weight": (D,),
            f"{EMBED}.weight": (V, D),
            **each(of("mlp.gate_proj", (0,)) + of(UP, (0,)), "weight", F, D),
            **each(of(DOWN, (0,)), "weight", D, F),
        },
    ),
    "tied, apart": (
        lora_of("embed_tokens", "lm_head"),
        {"tie_word_embeddings": True},
        {**OF_EMBED, **pairs([HEAD], 4, V, D)},
    ),
    "tied, shared": (
        lora_of("lm_head", ensure_weight_tying=True),
        {"tie_word_embeddings": True},
        {**OF_EMBED, **pairs([HEAD], 4, V, D)},  # the head's are transposed copies
    ),
    "tied, shared, dora": (
        lora_of("embed_tokens", ensure_weight_tying=True, use_dora=True),
        {"tie_word_embeddings": True},
        {
            **OF_EMBED,
            **pairs([HEAD], 4, V, D),
            f"{EMBED}.lora_magnitude_vector": (D,),
            f"{HEAD}.lora_magnitude_vector": (V,),
        },
    ),
    "tied, full": (
        lora_of(modules_to_save=("lm_head",), ensure_weight_tying=True),
        {"tie_word_embeddings": True},
        {**pairs(of(Q), 4, D, D), f"{EMBED}.weight": (V, D), f"{HEAD}.weight": (V, D)},
    ),
    "tokens": (
        lora_of(trainable_token_indices=(5, 2, 9)),
        {"tie_word_embeddings": True},
        {**pairs(of(Q), 4, D, D), f"{EMBED}.{DELTA}": (3, D)},
    ),
    "tokens of both": (
        lora_of(trainable_token_indices={"embed_tokens": (5, 2), "lm_head": (3,)}),
        {"tie_word_embeddings": True},
        {
            **pairs(of(Q), 4, D, D),
            f"{EMBED}.{DELTA}": (2, D),
            f"{HEAD}.{DELTA}": (1, D),
        },
    ),
    "custom modules": (
        lora_of("gate", modules_to_save=("scale",)),
        {
            "extra_tensors": {
                "model.layers.self_attn.gate.weight": [3, D],
                "model.layers.scale.weight": [D],
            }
        },
        {
            **pairs(of("self_attn.gate"), 4, 3, D),
            **each(of("scale"), "weight", D),
        },
    ),
}


def random_tree(config: LlamaConfig, lora: LoraConfig, seed: int = 0):
    """Every number random, the padding too: it is not written."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        abstract_adapters(model_params.abstract_base(config), lora),
    )


@pytest.fixture
def saved(tiny, tmp_path):
    """A function: kind, or settings and fields of config.json -> (model, adapter)."""

    def make(kind: str | LoraConfig, **fields) -> tuple[LlamaConfig, Path]:
        lora = kind
        if isinstance(kind, str):
            lora, fields, _ = KINDS[kind]
        config = LlamaConfig.from_hf({**tiny, **fields})
        out = tmp_path / f"saved {kind if isinstance(kind, str) else len(fields)}"
        convert.save_adapter(out, lora, random_tree(config, lora), config)
        return config, out

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_keys_of_peft_and_comes_back(tiny, tmp_path, kind):
    lora, fields, expected = KINDS[kind]
    config = LlamaConfig.from_hf({**tiny, **fields})
    tree = random_tree(config, lora)
    out = tmp_path / "out"
    convert.save_adapter(out, lora, tree, config)
    tensors = stored(out)
    assert {k: v.shape for k, v in tensors.items()} == {
        PREFIX + key: shape for key, shape in expected.items()
    }
    assert {v.dtype for v in tensors.values()} == {np.dtype(np.float32)}
    assert adapter_bytes(config, lora) == (out / WEIGHTS).stat().st_size
    base = model_params.abstract_base(config)
    assert adapter_bytes(base, lora) == adapter_bytes(config, lora)

    # Whatever the model is given as.
    lora2, loaded = convert.load_adapter(out, config)
    if isinstance(lora.target_modules, tuple):
        assert lora2 == dataclasses.replace(
            lora, target_modules=tuple(sorted(lora.target_modules))
        )
    _, same = convert.load_adapter(out, base)
    jax.tree.map(np.testing.assert_array_equal, same, loaded)
    convert.save_adapter(tmp_path / "again", lora2, loaded, base)
    same_files(out, tmp_path / "again")
    # What was written is what was passed; what was not written is zero.
    selection = select(base, lora)
    before, after = dict(trees.walk(tree)), dict(trees.walk(loaded))
    for module in selection.adapted:
        for part in module.parts:
            array = np.array(before[*module.path, part])
            for i, rank in enumerate(module.ranks if module.layers else ()):
                if part.endswith("_A"):
                    array[i, rank:] = 0
                elif part.endswith("_B"):
                    array[i, :, rank:] = 0
                else:
                    array[i] *= rank > 0
            np.testing.assert_array_equal(after[*module.path, part], array)
    for full in selection.full_tensors:
        if full.tied_to is None:
            array = before[full.path]
            trained = np.asarray(full.trained).reshape(-1, *[1] * (array.ndim - 1))
            array = array * trained if full.layers else array
            np.testing.assert_array_equal(after[full.path], array)
    assert {v.dtype for v in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_a_copy_for_a_tied_head_is_transposed(tiny, tmp_path):
    lora, fields, _ = KINDS["tied, shared"]
    config = LlamaConfig.from_hf({**tiny, **fields})
    tree = random_tree(config, lora)
    convert.save_adapter(tmp_path / "out", lora, tree, config)
    tensors = {k.removeprefix(PREFIX): v for k, v in stored(tmp_path / "out").items()}
    embedding = tree["model"]["embed_tokens"]
    np.testing.assert_array_equal(
        tensors["lm_head.lora_A.weight"], embedding["lora_embedding_B"].T
    )
    np.testing.assert_array_equal(
        tensors["lm_head.lora_B.weight"], embedding["lora_embedding_A"].T
    )


def test_the_configuration_file_is_what_peft_reads(tiny, config, tmp_path):
    lora = lora_of(
        *("up_proj", "q_proj"),
        rank_pattern={"q_proj": 2, "layers.0.mlp.up_proj": 3},
        modules_to_save=("model.norm",),
        trainable_token_indices={"lm_head": (3,)},
        base_model_name_or_path="some/base",
        base_fingerprint="abc",
    )
    convert.save_adapter(tmp_path / "out", lora, random_tree(config, lora), config)
    raw = read_json(tmp_path / "out" / "adapter_config.json")
    assert list(raw) == sorted(raw)  # as PEFT writes it
    assert list(raw["rank_pattern"]) == ["q_proj", "layers.0.mlp.up_proj"]  # not this
    assert raw["target_modules"] == ["q_proj", "up_proj"]
    assert raw["trainable_token_indices"] == {"lm_head": [3]}
    assert raw["base_model_name_or_path"] == "some/base"
    assert "base_fingerprint" not in raw
    # It stands in the metadata of the other file, beside what transformers wants.
    with safetensors.safe_open(tmp_path / "out" / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt", "qlora_jax_base_fingerprint": "abc"}
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert adapter_bytes(config, lora) == size
    opened, files = open_adapter(tmp_path / "out")
    loaded, _ = convert.load_adapter(tmp_path / "out", config)
    assert (
        opened
        == loaded
        == lora_of(
            *("q_proj", "up_proj"),
            **{
                f.name: getattr(lora, f.name)
                for f in dataclasses.fields(lora)
                if f.name not in ("r", "target_modules")
            },
        )
    )
    assert len(files) == 4 * 2 + 2


# --- Memory ---


@pytest.fixture
def large(tiny) -> tuple[LlamaConfig, LoraConfig]:
    """An adapter of 59 MB in 20 tensors of 2 to 4 MB."""
    shape = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=5)
    config = LlamaConfig.from_hf({**tiny, **shape})
    return config, LoraConfig(r=512, target_modules=("q_proj", "up_proj"))


def peak(work) -> int:
    """Bytes allocated at most, above those before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        kept = work()
        most = tracemalloc.get_traced_memory()[1] - before
        del kept
    finally:
        tracemalloc.stop()
    return most


def test_an_adapter_is_held_once_when_it_is_read_or_written(large, tmp_path):
    config, lora = large
    tree, out = random_tree(config, lora), tmp_path / "out"
    size, largest = adapter_bytes(config, lora), 4 * 512 * 2048
    assert size > 5e7
    writing = peak(functools.partial(convert.save_adapter, out, lora, tree, config))
    assert writing < 2 * largest  # a tensor at a time
    reading = peak(functools.partial(convert.load_adapter, out, config))
    # Straight into the result, and what it takes to check a million numbers for NaN.
    assert size - 1e5 < reading < size + 6e6
    # A narrow file is widened tensor by tensor.
    narrow = {k: v.astype(ml_dtypes.bfloat16) for k, v in stored(out).items()}
    safetensors.numpy.save_file(narrow, out / WEIGHTS, {"format": "pt"})
    del narrow
    reading = peak(functools.partial(convert.load_adapter, out, config))
    assert size - 1e5 < reading < size + 6e6 + largest / 2


# --- What is refused ---


def test_a_message_lists_everything_wrong(tiny, config, make_adapter, edit_tensors):
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
        "`r`=3, `target_modules`='down_proj, q_proj')",
        f"1 missing tensors: {KEY}",
        f"{KEY.replace('lora_A', 'lora_B')} [64, 4] instead of [64, 3]",
        f"1 tensors of another dtype: {KEY.replace('layers.1', 'layers.0')} F64",
        f"1 unexpected tensors: {KEY.replace('q_proj', 'v_proj')}",
        "Is it the adapter of another model?",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(r=4),
        dict(rank_pattern={"q_proj": 4}),
    ],
)
def test_wrong_rank_in_the_configuration(tiny, config, make_adapter, fields):
    path = make_adapter(tiny)
    edit_config(path, **fields)
    match = r"tensors of another shape: .*\[3, 64\] instead of \[4, 64\]"
    if "r" in fields:
        match = "The tensors are of rank 3. .*" + match
    with pytest.raises(CheckpointError, match=match):
        convert.load_adapter(path, config)


def test_targets_lost_from_the_configuration(tiny, config, make_adapter):
    path = make_adapter(tiny)
    edit_config(path, target_modules="REMOVED")  # PEFT's default: q_proj and v_proj
    with pytest.raises(CheckpointError) as caught:
        convert.load_adapter(path, config)
    assert "4 missing tensors" in str(caught.value)
    assert "4 unexpected tensors" in str(caught.value)
    edit_config(path, target_modules=["q_proj"])
    message = "file also adapts down_proj, which `target_modules` does not select"
    with pytest.raises(CheckpointError, match=f"The {message}.*4 unexpected"):
        convert.load_adapter(path, config)


def test_a_field_lost_from_the_configuration(saved):
    for kind, field, value in (
        ("dora", "use_dora", False),
        ("lora_bias", "lora_bias", False),
        ("lora_only", "bias", "none"),
        ("all biases", "bias", "lora_only"),
        ("ranks", "rank_pattern", {}),
        ("one layer", "layers_to_transform", None),
        ("tokens", "trainable_token_indices", None),
        ("tokens of both", "trainable_token_indices", [5, 2]),
        ("tied, shared, dora", "ensure_weight_tying", False),
        ("full", "modules_to_save", ["model.norm"]),
    ):
        config, out = saved(kind)
        edit_config(out, **{field: value})
        with pytest.raises(CheckpointError, match="does not hold the adapter that its"):
            convert.load_adapter(out, config)


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
    with pytest.raises(CheckpointError, match=f"{hint}.*missing tensors.*unexpected"):
        convert.load_adapter(path, config)


def test_targets_that_are_not_in_the_model(tiny, config, make_adapter):
    path = make_adapter(tiny)
    edit_config(path, target_modules=["q_proj", "down_proj", "c_attn"])
    lora, adapters = convert.load_adapter(path, config)
    # As in PEFT; who loads can ask which.
    assert select(model_params.abstract_base(config), lora).unmatched == ("c_attn",)
    assert len(jax.tree.leaves(adapters)) == 4
    edit_config(path, target_modules=["c_attn"])
    with pytest.raises(UserError, match="matches no linear module"):
        convert.load_adapter(path, config)


def test_the_adapter_of_a_deeper_and_wider_model(tiny, make_adapter):
    """The message does not blame `target_modules` for what it selects."""
    source = make_adapter({**tiny, "num_hidden_layers": 5})
    config = LlamaConfig.from_hf(tiny)
    with pytest.raises(CheckpointError) as caught:
        convert.load_adapter(source, config)
    text = str(caught.value)
    assert "does not select" not in text
    assert (
        "adapter of another model? The file has layers 0 to 4, this model 0 to 1."
        in (text)
    )
    wide = make_adapter({**tiny, "intermediate_size": 48}, name="wide")
    with pytest.raises(CheckpointError) as caught:
        convert.load_adapter(wide, config)
    assert "mlp.down_proj.lora_A.weight [3, 48] instead of [3, 40]" in str(caught.value)
    # The question first, then a few names.
    _, question, listed = str(caught.value).partition(
        "this base model. Is it the adapter of another model? "
    )
    assert question and listed.startswith("2 tensors of another shape: ")
    assert listed.count(" instead of ") == 2


def test_a_check_reads_no_tensor(tiny, config, make_adapter, monkeypatch):
    source = make_adapter(tiny)
    monkeypatch.setattr("convert.files.TensorFiles.read_into", None)
    assert convert.check_adapter(source, config) == open_adapter(source)[0]
    with pytest.raises(CheckpointError, match="of another shape"):
        other = {**tiny, "intermediate_size": 48}
        convert.check_adapter(source, LlamaConfig.from_hf(other))


def test_an_adapter_of_which_nothing_fits_is_refused(tiny, make_adapter):
    wide = make_adapter({**tiny, "intermediate_size": 48}, ("down_proj",))
    with pytest.raises(CheckpointError, match="None of its tensors could be used"):
        convert.load_adapter(wide, LlamaConfig.from_hf(tiny), strict=False)


def test_a_fingerprint_is_kept_in_the_file(tiny, config, make_adapter, tmp_path):
    lora, adapters = convert.load_adapter(make_adapter(tiny), config)
    out = tmp_path / "out"
    convert.save_adapter(out, lora, adapters, config, base_fingerprint="ab" * 32)
    assert open_adapter(out)[0].base_fingerprint == "ab" * 32


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_is_reported_with_its_tensor(
    tiny, config, make_adapter, edit_tensors, tmp_path, value
):
    path = make_adapter(tiny)
    edit_tensors(path / WEIGHTS, lambda t: t[KEY].__setitem__((0, 0), value))
    with pytest.raises(CheckpointError, match=f"Tensor `{KEY}` contains NaN"):
        convert.load_adapter(path, config)


# --- What is left out when asked ---


def test_without_strictness_what_does_not_fit_is_left_out_and_noted(
    tiny, config, make_adapter, edit_tensors
):
    path = make_adapter(tiny)
    edit_config(path, new_field=3)
    _, complete = convert.load_adapter(path, config, strict=False)
    other = KEY.replace("q_proj", "v_proj")
    down = KEY.replace("self_attn.q_proj", "mlp.down_proj").replace("lora_A", "lora_B")

    def change(tensors):
        del tensors[KEY]
        tensors[down] = np.zeros((64, 4), np.float32)
        tensors[other] = np.zeros((3, 64), np.float32)

    edit_tensors(path / WEIGHTS, change)
    with pytest.raises(UserError, match="unknown fields.*'new_field'"):
        convert.load_adapter(path, config)
    skipped = ["before"]
    lora, got = convert.load_adapter(path, config, strict=False, skipped=skipped)
    assert lora.r == 3
    assert skipped[:2] == ["before", "'new_field' of adapter_config.json"]
    assert sorted(skipped[2:]) == sorted(
        [
            f"{KEY}: missing tensors",
            f"{down} [64, 4] instead of [64, 3]: tensors of another shape",
            f"{other}: unexpected tensors",
        ]
    )
    # Of the two updates with a missing part nothing is left; the others are whole.
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        node, want = (t["model"]["layers"][block][name] for t in (got, complete))
        for part in ("lora_A", "lora_B"):
            assert not node[part][1].any()
            np.testing.assert_array_equal(node[part][0], want[part][0])


@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("full", "model.norm.weight"),
        ("lora_only", f"{of(Q)[0]}.base_layer.bias"),
        ("tokens", f"{EMBED}.{DELTA}"),
        ("dora", f"{of(DOWN)[0]}.lora_magnitude_vector"),
        ("dora", f"{of(DOWN)[0]}.lora_A.weight"),  # |W| is not known here
        ("tied, full", f"{EMBED}.weight"),
    ],
)
def test_what_has_no_neutral_value_cannot_be_left_out(
    saved, edit_tensors, kind, suffix
):
    config, out = saved(kind)
    edit_tensors(out / WEIGHTS, lambda tensors: tensors.pop(PREFIX + suffix))
    message = f"1 missing tensors: {PREFIX}{suffix}"
    with pytest.raises(CheckpointError, match=message):
        convert.load_adapter(out, config)
    match = f"{message}.*`{PREFIX}{suffix}` cannot be skipped: it has no neutral"
    with pytest.raises(CheckpointError, match=match):
        convert.load_adapter(out, config, strict=False)


def test_an_update_that_is_left_out_leaves_the_bias_of_its_module(saved, edit_tensors):
    config, out = saved("lora_only")
    _, complete = convert.load_adapter(out, config)
    edit_tensors(out / WEIGHTS, lambda tensors: tensors.pop(KEY))
    _, got = convert.load_adapter(out, config, strict=False)
    node, want = (t["model"]["layers"]["self_attn"]["q_proj"] for t in (got, complete))
    np.testing.assert_array_equal(node["bias"], want["bias"])
    assert not node["lora_B"][1].any() and node["lora_B"][0].any()


# --- Spellings and copies of PEFT ---


def test_magnitudes_may_be_spelled_as_weights(saved, edit_tensors):
    config, out = saved("dora")
    _, want = convert.load_adapter(out, config)

    def change(tensors):
        for key in [k for k in tensors if k.endswith("lora_magnitude_vector")][::2]:
            tensors[f"{key}.weight"] = tensors.pop(key)

    edit_tensors(out / WEIGHTS, change)
    assert any(k.endswith("vector.weight") for k in stored(out))
    _, got = convert.load_adapter(out, config)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def with_tables(tiny, tmp_path):
    """A function: tied? -> (config, base, directory with copies of the tables)."""

    def make(tied, dtype=np.float32, scale=1.0):
        config = LlamaConfig.from_hf({**tiny, "tie_word_embeddings": tied})
        rng = np.random.default_rng(5)
        base = jax.tree.map(
            lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
            model_params.abstract_base(config),
        )
        lora = lora_of("embed_tokens", "lm_head")
        out = tmp_path / f"out{tied}{np.dtype(dtype).name}{scale}"
        convert.save_adapter(out, lora, random_tree(config, lora), config)
        tensors = stored(out)
        table = base["model"]["embed_tokens"]["weight"]
        head = table if tied else base["lm_head"]["weight"]
        for name, copied in ((EMBED, table), (HEAD, head)):
            value = (scale * copied).astype(dtype)
            tensors[f"{PREFIX}{name}.base_layer.weight"] = value
        safetensors.numpy.save_file(tensors, out / WEIGHTS, {"format": "pt"})
        return config, base, out

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_copies_of_the_base_are_compared_with_it(with_tables, tied, dtype):
    config, base, path = with_tables(tied, dtype)
    notes = []
    lora, adapters = convert.load_adapter(path, base, skipped=notes)
    assert notes == []  # equal, in the narrower of the two dtypes
    assert "weight" not in str(jax.tree.structure(adapters))
    assert lora.modules_to_save is None
    on_device = jax.tree.map(jnp.asarray, base)
    convert.load_adapter(path, on_device, skipped=notes)
    assert notes == []
    # From the configuration alone they cannot be.
    _, same = convert.load_adapter(path, config, skipped=notes)
    jax.tree.map(np.testing.assert_array_equal, same, adapters)
    assert notes == [
        f"{PREFIX}{name}.base_layer.weight: not compared, no weights of the base were "
        "given"
        for name in (EMBED, HEAD)
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_another_base_are_refused(with_tables, tied, edit_tensors):
    _, base, path = with_tables(tied, scale=1.5)
    key = f"{PREFIX}{EMBED}.base_layer.weight"
    match = r"\.base_layer\.weight` is not the table of this base, so the adapter was"
    with pytest.raises(CheckpointError, match=f"{match}.*`strict`=False .--no"):
        convert.load_adapter(path, base)
    notes = []
    convert.load_adapter(path, base, strict=False, skipped=notes)
    assert sorted(notes) == [
        f"{PREFIX}{name}.base_layer.weight: differs from the base's own, which is used"
        for name in (HEAD, EMBED)
    ]

    def longer(tensors):  # of another vocabulary
        tensors[key] = np.zeros((V + 2, D), np.float32)

    edit_tensors(path / WEIGHTS, longer)
    with pytest.raises(CheckpointError, match="or another vocabulary"):
        convert.load_adapter(path, base)


@pytest.mark.parametrize("kind", ["tied, shared", "tied, shared, dora", "tied, full"])
def test_copies_for_a_tied_head_have_to_agree(saved, edit_tensors, kind):
    config, out = saved(kind)
    _, want = convert.load_adapter(out, config)
    copies = [
        k for k in stored(out) if k.startswith(f"{PREFIX}lm_head") and "magn" not in k
    ]
    edit_tensors(out / WEIGHTS, lambda t: t[copies[0]].__iadd__(1))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=f"`{copies[0]}` and .* are tied"):
            convert.load_adapter(out, config, strict=strict)
    # One that is missing is missed; what it is a copy of is there, however.
    edit_tensors(out / WEIGHTS, lambda t: [t.pop(key) for key in copies])
    with pytest.raises(CheckpointError, match=f"{len(copies)} missing tensors"):
        convert.load_adapter(out, config)
    notes = []
    _, got = convert.load_adapter(out, config, strict=False, skipped=notes)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert sorted(notes) == sorted(f"{key}: missing tensors" for key in copies)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_the_configuration_does_not_name_are_fully_trained(
    saved, edit_tensors, tied
):
    # PEFT saves them without being configured to where a vocabulary was resized.
    lora = lora_of(modules_to_save=("model.norm",))
    config, out = saved(lora, tie_word_embeddings=tied)
    tables = {n: np.full((V, D), i, np.float32) for i, n in enumerate((EMBED, HEAD))}

    def add(tensors):
        tensors |= {f"{PREFIX}{n}.weight": table for n, table in tables.items()}

    edit_tensors(out / WEIGHTS, add)
    loaded, adapters = convert.load_adapter(out, config)
    assert loaded.modules_to_save == ("model.norm", "embed_tokens", "lm_head")
    assert open_adapter(out)[0] == loaded
    np.testing.assert_array_equal(
        adapters["model"]["embed_tokens"]["weight"], tables[EMBED]
    )
    np.testing.assert_array_equal(adapters["lm_head"]["weight"], tables[HEAD])
    # Named already, nothing is added.
    edit_config(out, modules_to_save=["model.norm", "embed_tokens", "head"])
    loaded, again = convert.load_adapter(out, config)
    assert loaded.modules_to_save == ("model.norm", "embed_tokens", "head")
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_the_lists_that_peft_rewrites_for_tied_tables_are_read(saved):
    # What it saves for modules_to_save=["lm_head"] and target_modules=["lm_head"].
    for kind, field in (
        ("tied, full", "modules_to_save"),
        ("tied, shared", "target_modules"),
    ):
        config, out = saved(kind)
        _, want = convert.load_adapter(out, config)
        edit_config(out, **{field: [EMBED]})
        _, got = convert.load_adapter(out, config)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_stray_biases_of_peft_are_skipped(saved, edit_tensors):
    lora = lora_of(bias="all", modules_to_save=("layers.0.mlp",))
    config, out = saved(lora, mlp_bias=True)
    _, want = convert.load_adapter(out, config)
    stray = [
        f"{PREFIX}model.layers.0.mlp.{infix}.gate_proj.bias"
        for infix in ("modules_to_save.default", "original_module")
    ]
    edit_tensors(
        out / WEIGHTS, lambda t: t.update({k: np.zeros(F, np.float32) for k in stray})
    )
    notes = []
    _, got = convert.load_adapter(out, config, skipped=notes)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert sorted(notes) == [
        f"{k}: a stray copy that PEFT writes and does not read" for k in stray
    ]
    edit_config(out, bias="lora_only")
    with pytest.raises(CheckpointError, match="unexpected tensors: .*modules_to_save"):
        convert.load_adapter(out, config)


# --- Directories ---


def test_directories_that_are_something_else(tiny, config, make_adapter, tiny_model):
    path = make_adapter(tiny)

    def refused(directory: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert.load_adapter(directory, config)

    refused(path / "no", "does not exist. An adapter is a local")
    refused(path / WEIGHTS, "is a file; give the PEFT directory")
    refused(tiny_model, "is a model: it has no adapter_config")
    refused(path.parent, "is not a PEFT adapter.*Did you mean `.*ad")
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 4)
    refused(path, "truncated or damaged")
    os.rename(path / WEIGHTS, path / "adapter_model.bin")
    refused(path, "adapter_model.bin, a pickle file")
    (path / "adapter_model.bin").unlink()
    refused(path, "has no adapter_model.safetensors")


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


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_of_a_changed_base_is_saved_on_the_original_one(
    tiny, config, tmp_path, init
):
    rng = np.random.default_rng(0)
    base = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        model_params.abstract_base(config),
    )
    lora = lora_of(
        *("q_proj", "down_proj", "embed_tokens"),
        rank_pattern={"layers.0.mlp.down_proj": 2},
        init_lora_weights=init,
    )
    adapters = init_adapters(jax.random.key(0), base, lora)
    match = rf"`init_lora_weights`='{init}': this adapter belongs to a changed base.*ab"
    with pytest.raises(UserError, match=match):
        convert.save_adapter(tmp_path / "out", lora, adapters, config)
    assert not (tmp_path / "out").exists()
    plain, stated = absorb(lora, adapters, factor_out(base, adapters, lora))
    convert.save_adapter(tmp_path / "out", plain, stated, config)
    raw = read_json(tmp_path / "out" / "adapter_config.json")
    assert (raw["r"], raw["rank_pattern"]) == (8, {"layers.0.mlp.down_proj": 4})
    assert raw["init_lora_weights"] is True  # nothing is done to the base on loading
    _, loaded = convert.load_adapter(tmp_path / "out", config)
    jax.tree.map(np.testing.assert_array_equal, loaded, stated)


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


def test_save_replaces_a_directory_only_with_overwrite(
    tiny, config, make_adapter, tmp_path
):
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
