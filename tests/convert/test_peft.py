"""PEFT directories: what has to be in them, and what is done where it is not."""

import dataclasses
import functools
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
from tests.convert.reference import PREFIX, WEIGHTS, edit_json, read, same_file

CONFIG = "adapter_config.json"
LLAMA32 = "plain rslora dora emb_lora rank_alpha_pattern mts_embed_head regex_targets "
LLAMA32 += "trainable_tokens layers_to_transform"
BF16 = ml_dtypes.bfloat16
KEY = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"
equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def stored(path: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path / WEIGHTS)


def random_tree(like):
    """Every number random, the padding of an adapter too: it is not written."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    return jax.tree.map(lambda leaf: draw(leaf.shape).astype(np.float32), like)


def random_adapter(config: LlamaConfig, lora: LoraConfig):
    return random_tree(abstract_adapters(model_params.abstract_base(config), lora))


def random_base(config: LlamaConfig):
    return random_tree(model_params.abstract_base(config))


@pytest.mark.golden
@pytest.mark.real
@pytest.mark.parametrize(
    "adapter, base",
    [
        *((f"golden/adapters/llama32/{n}", "llama32/fp32") for n in LLAMA32.split()),
        ("golden/adapters/llama32/qlora_plain", "llama32/nf4_dq"),
        ("golden/adapters/llamabias/bias_lora_only", "llamabias/fp32"),
        ("data/adapters/stories260K-lora-r8-shakespeare", "../data/stories260K"),
    ],
)
def test_load_then_save_gives_the_file_that_peft_wrote(shared, tmp_path, base, adapter):
    config = LlamaConfig.from_hf(read(shared / "golden" / base))
    source, out, again = shared / adapter, tmp_path / "out", tmp_path / "again"
    lora, adapters = convert.load_adapter(source, config)
    convert.save_adapter(out, lora, adapters, config)
    theirs = stored(source)
    # Copies of the base's own tables are not written.
    copies = {k for k in theirs if k.endswith("base_layer.weight")}
    assert bool(copies) == adapter.endswith("emb_lora")
    assert copies or same_file(out, source, WEIGHTS)
    equal(stored(out), {k: v for k, v in theirs.items() if k not in copies})
    ours, theirs = read(out, CONFIG), read(source, CONFIG)
    for raw in (ours, theirs):
        if isinstance(raw["target_modules"], list):
            raw["target_modules"] = sorted(raw["target_modules"])
    # Fields that ours leaves out keep PEFT's defaults.
    assert ours == {k: theirs[k] for k in ours}
    assert list(ours["rank_pattern"]) == list(theirs["rank_pattern"])
    lora2, adapters2 = convert.load_adapter(out, config)
    assert lora2 == lora
    equal(adapters2, adapters)
    convert.save_adapter(again, lora2, adapters2, config)
    assert all(same_file(out, again, file) for file in (WEIGHTS, CONFIG))
    assert adapter_bytes(config, lora) == (out / WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    "dtype, targets, r",
    [
        (np.float32, ("q_proj",), 1),
        (np.float16, ("k_proj", "down_proj"), 3),
        (BF16, ("up_proj",), 70),
        (np.float32, ("k_proj", "down_proj"), 3),
    ],
)
def test_tensors_go_to_their_arrays(tiny, config, make_adapter, dtype, targets, r):
    path = make_adapter(tiny, targets, r, dtype)
    lora, adapters = convert.load_adapter(path, config)
    assert (lora.r, lora.lora_alpha) == (r, 6)
    assert sorted(lora.target_modules) == sorted(targets)
    leaves = dict(trees.walk(adapters))
    assert (len(leaves), len(stored(path))) == (2 * len(targets), 4 * len(targets))
    for key, value in stored(path).items():
        bare = key.removeprefix(PREFIX).removesuffix(".weight")
        where, layer = trees.parse_key(bare)
        assert leaves[where].dtype == np.float32
        np.testing.assert_array_equal(leaves[where][layer], value.astype(np.float32))


def test_fresh_adapters_on_a_device_are_saved_with_their_base(config, tmp_path):
    lora, out = LoraConfig(r=4, target_modules="all-linear"), tmp_path / "out"
    base = model_params.abstract_base(config)
    adapters = init_adapters(jax.random.key(0), base, lora)
    names = {"base_model_name_or_path": "the/base", "base_fingerprint": "ab" * 32}
    convert.save_adapter(out, lora, adapters, config, **names)
    raw = read(out, CONFIG)
    assert raw["base_model_name_or_path"] == "the/base"
    assert raw["target_modules"] == sorted(PROJECTIONS)
    assert open_adapter(out)[0].base_fingerprint == "ab" * 32
    lora2, loaded = convert.load_adapter(out, config)
    assert lora2.r == 4
    equal(loaded, jax.device_get(adapters))


# --- Every kind of adapter: its keys, written by hand ---

V, D, F = 24, 64, 40
EMBED, HEAD = "model.embed_tokens", "lm_head"
Q, K, VALUE, OUT = (f"self_attn.{p}_proj" for p in "qkvo")
GATE, UP, DOWN = (f"mlp.{p}_proj" for p in ("gate", "up", "down"))
CUSTOM = "self_attn.gate"
OUT_IN = {
    **{Q: (D, D), K: (32, D), VALUE: (32, D), OUT: (D, D)},
    **{GATE: (F, D), UP: (F, D), DOWN: (D, F), HEAD: (V, D), CUSTOM: (3, D)},
}
DELTA = "token_adapter.trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"
OF_EMBED = {f"{EMBED}.lora_embedding_A": (4, V), f"{EMBED}.lora_embedding_B": (D, 4)}


def of(module: str, layers=(0, 1)) -> list[str]:
    if module == HEAD:
        return [HEAD]
    return [f"model.layers.{i}.{module}" for i in layers]


def pairs(*modules: str, r=4, layers=(0, 1)) -> dict[str, tuple]:
    shapes = {}
    for module in modules:
        out, inner = OUT_IN[module]
        for name in of(module, layers):
            shapes[f"{name}.lora_A.weight"] = (r, inner)
            shapes[f"{name}.lora_B.weight"] = (out, r)
    return shapes


def outs(suffix: str, *modules: str, layers=(0, 1)) -> dict[str, tuple]:
    """A vector of each module, as long as its output."""
    return {f"{n}.{suffix}": OUT_IN[m][:1] for m in modules for n in of(m, layers)}


def lora_of(*targets: str, **fields) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": targets or ("q_proj",), **fields})


TIED = {"tie_word_embeddings": True}
TYING = {"ensure_weight_tying": True}
ROWS_OF_BOTH = {"embed_tokens": (5, 2), "lm_head": (3,)}
EXTRA = {"model.layers.self_attn.gate.weight": [3, D], "model.layers.scale.weight": [D]}
# name -> (configuration, fields of config.json, keys and shapes)
KINDS = {
    "plain": (lora_of(), {}, pairs(Q)),
    "all-linear": (
        LoraConfig(r=4, target_modules="all-linear"),
        {},
        pairs(Q, K, VALUE, OUT, GATE, UP, DOWN),
    ),
    "lora_bias": (
        lora_of("up_proj", "lm_head", lora_bias=True),
        {},
        pairs(UP, HEAD) | outs("lora_B.bias", UP, HEAD),
    ),
    "dora": (
        lora_of("down_proj", "embed_tokens", "lm_head", use_dora=True),
        {},
        pairs(DOWN, HEAD)
        | OF_EMBED
        | {**outs(MAGNITUDE, DOWN, HEAD), f"{EMBED}.{MAGNITUDE}": (D,)},
    ),
    "ranks": (
        lora_of(
            *("q_proj", "up_proj"),
            rank_pattern={"layers.0.self_attn.q_proj": 1, "up_proj": 6},
            alpha_pattern={"q_proj": 0.5},
        ),
        {},
        pairs(Q, r=1, layers=(0,)) | pairs(Q, layers=(1,)) | pairs(UP, r=6),
    ),
    "one layer": (lora_of(layers_to_transform=1), {}, pairs(Q, layers=(1,))),
    "lora_only": (
        lora_of("q_proj", "layers.1.mlp.up_proj", bias="lora_only"),
        {"attention_bias": True, "mlp_bias": True},
        pairs(Q)
        | pairs(UP, layers=(1,))
        | {**outs("base_layer.bias", Q), **outs("base_layer.bias", UP, layers=(1,))},
    ),
    "all biases": (
        lora_of("layers.1.mlp.up_proj", bias="all", lora_bias=True),
        {"mlp_bias": True},
        pairs(UP, layers=(1,))
        | outs("lora_B.bias", UP, layers=(1,))
        | outs("base_layer.bias", UP, layers=(1,))
        | {**outs("bias", UP, layers=(0,)), **outs("bias", GATE, DOWN)},
    ),
    "full": (
        lora_of(modules_to_save=("model.norm", "layers.0.mlp", "embed_tokens")),
        {},
        pairs(Q)
        | {"model.norm.weight": (D,), f"{EMBED}.weight": (V, D)}
        | {f"{of(m)[0]}.weight": OUT_IN[m] for m in (GATE, UP, DOWN)},
    ),
    "tied, apart": (lora_of("embed_tokens", "lm_head"), TIED, OF_EMBED | pairs(HEAD)),
    # The head's are transposed copies.
    "tied, shared": (lora_of("lm_head", **TYING), TIED, OF_EMBED | pairs(HEAD)),
    "tied, shared, dora": (
        lora_of("embed_tokens", use_dora=True, **TYING),
        TIED,
        OF_EMBED
        | pairs(HEAD)
        | {f"{EMBED}.{MAGNITUDE}": (D,), f"{HEAD}.{MAGNITUDE}": (V,)},
    ),
    "tied, full": (
        lora_of(modules_to_save=("lm_head",), **TYING),
        TIED,
        pairs(Q) | {f"{EMBED}.weight": (V, D), f"{HEAD}.weight": (V, D)},
    ),
    "tokens": (
        lora_of(trainable_token_indices=(5, 2, 9)),
        TIED,
        pairs(Q) | {f"{EMBED}.{DELTA}": (3, D)},
    ),
    "tokens of both": (
        lora_of(trainable_token_indices=ROWS_OF_BOTH),
        TIED,
        pairs(Q) | {f"{EMBED}.{DELTA}": (2, D), f"{HEAD}.{DELTA}": (1, D)},
    ),
    "custom modules": (
        lora_of("gate", modules_to_save=("scale",)),
        {"extra_tensors": EXTRA},
        pairs(CUSTOM) | {f"model.layers.{i}.scale.weight": (D,) for i in (0, 1)},
    ),
}


@pytest.fixture
def saved(tiny, tmp_path):
    """A function: kind, or settings and fields of config.json -> (model, adapter)."""

    def make(kind: str | LoraConfig, **fields) -> tuple[LlamaConfig, Path]:
        lora = kind
        if isinstance(kind, str):
            lora, fields, _ = KINDS[kind]
        config = LlamaConfig.from_hf({**tiny, **fields})
        out = tmp_path / f"saved {kind if isinstance(kind, str) else len(fields)}"
        convert.save_adapter(out, lora, random_adapter(config, lora), config)
        return config, out

    return make


def head_copies(tensors) -> list[str]:
    """The keys of a head that is tied to the embedding's update."""
    return [k for k in tensors if k.startswith(f"{PREFIX}{HEAD}") and "magn" not in k]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_keys_of_peft_and_comes_back(saved, tmp_path, kind):
    lora, _, expected = KINDS[kind]
    config, out = saved(kind)
    tensors, base = stored(out), model_params.abstract_base(config)
    shapes = {key: value.shape for key, value in tensors.items()}
    assert shapes == {PREFIX + key: shape for key, shape in expected.items()}
    assert {v.dtype for v in tensors.values()} == {np.dtype(np.float32)}
    size = (out / WEIGHTS).stat().st_size
    assert adapter_bytes(base, lora) == adapter_bytes(config, lora) == size

    # Whatever the model is given as.
    lora2, loaded = convert.load_adapter(out, config)
    if isinstance(lora.target_modules, tuple):
        names = tuple(sorted(lora.target_modules))
        assert lora2 == dataclasses.replace(lora, target_modules=names)
    equal(convert.load_adapter(out, base)[1], loaded)
    convert.save_adapter(tmp_path / "again", lora2, loaded, base)
    assert all(same_file(out, tmp_path / "again", file) for file in (WEIGHTS, CONFIG))
    # What was written is what was passed; what was not written is zero.
    before, after = random_adapter(config, lora), dict(trees.walk(loaded))
    assert jax.tree.structure(loaded) == jax.tree.structure(before)
    for where, array in trees.walk(before):
        assert after[where].dtype == np.float32
        written = after[where] != 0
        np.testing.assert_array_equal(after[where], np.where(written, array, 0))
    copies = head_copies(tensors) if kind in TIED_KINDS else ()
    written = sum(v.size for k, v in tensors.items() if k not in copies)
    assert sum(map(np.count_nonzero, after.values())) == written


TIED_KINDS = ("tied, shared", "tied, shared, dora", "tied, full")


def test_a_copy_for_a_tied_head_is_transposed(saved):
    tensors = stored(saved("tied, shared")[1])
    for part, source in (("A", "B"), ("B", "A")):
        copy = tensors[f"{PREFIX}lm_head.lora_{part}.weight"]
        original = tensors[f"{PREFIX}{EMBED}.lora_embedding_{source}"]
        np.testing.assert_array_equal(copy, original.T)


def test_the_configuration_file_is_what_peft_reads(saved):
    lora = lora_of(
        *("up_proj", "q_proj"),
        rank_pattern={"q_proj": 2, "layers.0.mlp.up_proj": 3},
        modules_to_save=("model.norm",),
        trainable_token_indices={"lm_head": (3,)},
        base_model_name_or_path="some/base",
        base_fingerprint="abc",
    )
    config, out = saved(lora)
    raw = read(out, CONFIG)
    assert list(raw) == sorted(raw)  # as PEFT writes it
    assert list(raw["rank_pattern"]) == ["q_proj", "layers.0.mlp.up_proj"]  # not this
    assert raw["target_modules"] == ["q_proj", "up_proj"]
    assert raw["trainable_token_indices"] == {"lm_head": [3]}
    assert raw["base_model_name_or_path"] == "some/base"
    assert "base_fingerprint" not in raw
    # It stands in the metadata of the other file, beside what transformers wants.
    with safetensors.safe_open(out / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt", "qlora_jax_base_fingerprint": "abc"}
    assert adapter_bytes(config, lora) == (out / WEIGHTS).stat().st_size
    opened, files = open_adapter(out)
    assert opened == convert.load_adapter(out, config)[0]
    assert opened == dataclasses.replace(lora, target_modules=("q_proj", "up_proj"))
    assert len(files) == 4 * 2 + 2


# --- Memory ---


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


def test_an_adapter_is_held_once_when_it_is_read_or_written(tiny, tmp_path):
    """One of 59 MB in 20 tensors of 2 to 4 MB."""
    shape = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=5)
    config = LlamaConfig.from_hf({**tiny, **shape})
    lora = LoraConfig(r=512, target_modules=("q_proj", "up_proj"))
    tree, out = random_adapter(config, lora), tmp_path / "out"
    size, largest = adapter_bytes(config, lora), 4 * 512 * 2048
    assert size > 5e7
    writing = peak(functools.partial(convert.save_adapter, out, lora, tree, config))
    assert writing < 2 * largest  # a tensor at a time
    load = functools.partial(convert.load_adapter, out, config)
    # Straight into the result, and what it takes to check a million numbers for NaN.
    assert size - 1e5 < peak(load) < size + 6e6
    # A narrow file is widened tensor by tensor.
    narrow = {k: v.astype(BF16) for k, v in stored(out).items()}
    safetensors.numpy.save_file(narrow, out / WEIGHTS, {"format": "pt"})
    del narrow
    assert size - 1e5 < peak(load) < size + 6e6 + largest / 2


# --- What is refused ---


@pytest.fixture
def adapter(tiny, make_adapter) -> Path:
    """Of `tiny_model`: rank 3, of q_proj and down_proj."""
    return make_adapter(tiny)


def test_an_adapter_without_any_update_is_noted(config, adapter, edit_tensors):
    def zero(keys):
        keys = [key for key in keys if key.endswith("lora_B.weight")]
        edit_tensors(adapter / WEIGHTS, lambda t: [t[key].fill(0) for key in keys])
        notes: list[str] = []
        convert.load_adapter(adapter, config, skipped=notes)
        return notes

    *some, last = stored(adapter)
    assert zero([last, *some][:-2]) == []
    (note,) = zero([*some, last])
    assert "all zero (every `lora_B` is): the model is its base" in note


@pytest.fixture
def refused(config):
    """A function: fails unless an adapter is refused with a message of these parts."""

    def refused(path: Path, *parts: str, model=None, error=CheckpointError, **options):
        with pytest.raises(error) as caught:
            convert.load_adapter(path, model or config, **options)
        assert [part for part in parts if part not in str(caught.value)] == []
        return str(caught.value)

    return refused


def test_a_message_lists_everything_wrong(adapter, edit_tensors, refused):
    b, other, value = (
        KEY.replace("lora_A", "lora_B"),
        KEY.replace("layers.1", "layers.0"),
        KEY.replace("q_proj", "v_proj"),
    )

    def change(tensors):
        del tensors[KEY]
        tensors[b] = np.zeros((64, 4), np.float32)
        tensors[other] = tensors[other].astype(np.int32)
        tensors[value] = np.zeros((3, 64), np.float32)

    edit_tensors(adapter / WEIGHTS, change)
    refused(
        adapter,
        "`r`=3, `target_modules`='down_proj, q_proj')",
        f"1 missing tensors: {KEY}",
        f"{b} [64, 4] instead of [64, 3]",
        f"1 tensors of another dtype: {other} I32",
        f"1 unexpected tensors: {value}",
        "read in float16, bfloat16, float32 and float64, and it has I32",
    )


def test_float64_is_narrowed_and_said(adapter, config, edit_tensors):
    before = convert.load_adapter(adapter, config)[1]
    edit_tensors(
        adapter / WEIGHTS,
        lambda tensors: tensors.update(
            {k: v.astype(np.float64) for k, v in tensors.items()}
        ),
    )
    notes: list[str] = []
    after = convert.load_adapter(adapter, config, skipped=notes)[1]
    equal(before, after)
    assert notes == ["the float64 digits of 8 tensors, in float32 here"]


@pytest.mark.parametrize(
    ("rename", "transpose", "cause"),
    [
        (lambda k: k, True, "The tensors are transposed, as those of MLX"),
        (
            lambda k: k.replace("model.model.", "model."),
            False,
            "It was trained on a `LlamaModel`, without the language model",
        ),
    ],
)
def test_tensors_of_another_layout_get_their_cause(
    adapter, edit_tensors, refused, rename, transpose, cause
):
    def change(tensors):
        old = dict(tensors)
        tensors.clear()
        for key, array in old.items():
            array = np.ascontiguousarray(array.T) if transpose else array
            tensors[rename(key)] = array

    edit_tensors(adapter / WEIGHTS, change)
    refused(adapter, cause)


@pytest.mark.parametrize(
    ("name", "base", "revision", "said"),
    [
        ("org/Llama-3.2-1B", "llama_3.2_1b", None, False),
        ("org/Llama-3.2-1B", "models--org--Llama-3.2-1B/snapshots/ab1", "ab1", False),
        ("org/Llama-3.2-1B", "models--org--Llama-3.2-1B/snapshots/ab1", "cd2", True),
        ("org/Llama-3.2-1B", "llama-3.2-1b", "cd2", True),
        ("org/Llama-3.2-1B", "llama-3.2-1b-instruct", None, True),
        ("../base", "base", None, False),
        (None, "base", None, False),
    ],
)
def test_a_base_of_another_name_is_said(tmp_path, name, base, revision, said):
    lora = LoraConfig(base_model_name_or_path=name, revision=revision)
    (tmp_path / base).mkdir(parents=True)
    notes = convert.other_base_name(lora, tmp_path / "adapter", tmp_path / base)
    assert bool(notes) == said
    if said:
        assert repr(name) in notes[0] and "is not known" in notes[0]
    # The fingerprint is compared instead.
    known = dataclasses.replace(lora, base_fingerprint="0" * 64)
    assert not convert.other_base_name(known, tmp_path / "a", tmp_path / base)


def test_wrong_rank_or_targets_in_the_configuration(adapter, refused):
    shapes = ("tensors of another shape: ", "[3, 64] instead of [4, 64]")
    edit_json(adapter / CONFIG, rank_pattern={"q_proj": 4})
    assert "of rank" not in refused(adapter, *shapes)
    edit_json(adapter / CONFIG, rank_pattern={}, r=4)
    refused(adapter, "The tensors are of rank 3. ", *shapes)
    # PEFT's default targets: q_proj and v_proj.
    edit_json(adapter / CONFIG, r=3, target_modules="REMOVED")
    refused(adapter, "4 missing tensors", "4 unexpected tensors")
    edit_json(adapter / CONFIG, target_modules=["q_proj"])
    lost = "The file also adapts down_proj, which `target_modules` does not select"
    refused(adapter, lost, "4 unexpected")


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("dora", "use_dora", False),
        ("lora_bias", "lora_bias", False),
        ("lora_only", "bias", "none"),
        ("all biases", "bias", "lora_only"),
        ("ranks", "rank_pattern", {}),
        ("one layer", "layers_to_transform", None),
        ("tokens", "trainable_token_indices", None),
        ("tied, shared, dora", "ensure_weight_tying", False),
        ("full", "modules_to_save", ["model.norm"]),
    ],
)
def test_a_field_lost_from_the_configuration(saved, refused, kind, field, value):
    config, out = saved(kind)
    edit_json(out / CONFIG, **{field: value})
    refused(out, "does not hold the adapter that its", model=config)


def test_a_tied_head_may_repeat_the_rows_of_the_embedding(saved, edit_tensors, refused):
    config, out = saved("tokens of both")
    edit_json(out / CONFIG, trainable_token_indices=[5, 2])
    # Without the configuration that says so, other rows of the head mean nothing.
    refused(out, "are one tensor in PEFT and differ in the file", model=config)
    twins = [f"{PREFIX}{name}.{DELTA}" for name in (EMBED, HEAD)]
    edit_tensors(out / WEIGHTS, lambda t: t.update({twins[1]: t[twins[0]]}))
    _, adapters = convert.load_adapter(out, config)
    assert list(adapters) == ["model"]


def test_keys_without_the_prefix_of_peft(adapter, edit_tensors, refused):
    def change(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "")] = tensors.pop(key)

    edit_tensors(adapter / WEIGHTS, change)
    hint = "PEFT's keys look like base_model.model.model.lay"
    refused(adapter, hint, "missing tensors", "unexpected")


EXTRA_MODEL = "one `model.` is extra, and without it all 8 names fit"
EXTRA_MODULE = "have a `module.` that is extra, which DistributedDataParallel"


@pytest.mark.parametrize(
    ("rename", "cause"),
    [
        (lambda k: k.replace("model.model.", "model.model.model."), EXTRA_MODEL),
        (lambda k: f"module.{k}", EXTRA_MODULE),
        (lambda k: k.replace("model.model.", "model.module.model."), EXTRA_MODULE),
        (lambda k: k.replace("layers.", "layers.module."), EXTRA_MODULE),
        (
            lambda k: k.replace("base_model.model.", "base_model.model.inner."),
            "one `inner.` is extra, and without it all 8 names fit",
        ),
        (
            lambda k: k.replace("model.model.", "model.language."),
            "with `model.` in place of `language.` all 8 names fit",
        ),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_prefix_too_many_is_named(
    adapter, edit_tensors, refused, rename, cause, strict
):
    def change(tensors):
        for key in list(tensors):
            tensors[rename(key)] = tensors.pop(key)

    edit_tensors(adapter / WEIGHTS, change)
    text = refused(adapter, cause, "Rename the tensors", strict=strict)
    assert text.count("names fit") == 1


def test_a_prefix_and_another_model_are_both_said(tiny, make_adapter, edit_tensors):
    source = make_adapter({**tiny, "num_hidden_layers": 1}, name="one")

    def change(tensors):
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)

    edit_tensors(source / WEIGHTS, change)
    with pytest.raises(CheckpointError, match="without it 4 of 8 names fit"):
        convert.load_adapter(source, LlamaConfig.from_hf(tiny))


def test_adapted_modules_that_the_model_does_not_have_are_named(
    config, adapter, edit_tensors, refused
):
    def change(tensors):
        for key in [k for k in tensors if "q_proj" in k]:
            tensors[key.replace("q_proj", "qkv_proj")] = tensors[key]

    edit_tensors(adapter / WEIGHTS, change)
    edit_json(adapter / CONFIG, target_modules=["q_proj", "down_proj", "qkv_proj"])
    named = "adapts qkv_proj, which `target_modules` names and this model does not have"
    text = refused(adapter, named, "Linear modules here: down_proj, gate_proj, k_proj,")
    assert "does not select" not in text
    edit_json(adapter / CONFIG, target_modules=["q_proj", "down_proj"])
    refused(adapter, "adapts qkv_proj, which this model does not have")


def test_targets_that_are_not_in_the_model(config, adapter, refused):
    edit_json(adapter / CONFIG, target_modules=["q_proj", "down_proj", "c_attn"])
    lora, adapters = convert.load_adapter(adapter, config)
    # As in PEFT; who loads can ask which.
    assert select(model_params.abstract_base(config), lora).unmatched == ("c_attn",)
    assert len(jax.tree.leaves(adapters)) == 4
    edit_json(adapter / CONFIG, target_modules=["c_attn"])
    refused(adapter, "matches no linear module", error=UserError)


def test_the_adapter_of_a_deeper_or_wider_model(tiny, make_adapter, refused):
    """The message does not blame `target_modules` for what it selects."""
    source = make_adapter({**tiny, "num_hidden_layers": 3}, name="three")
    refused(source, "4 unexpected tensors: ", "layers.2.mlp")
    question = "Is it the adapter of another model? It names 'other/base' as its base."
    name = {"base_model_name_or_path": "other/base"}
    source = make_adapter({**tiny, "num_hidden_layers": 5}, name="deep", **name)
    text = refused(source, f"{question} The file has layers 0 to 4, this model 0 to 1.")
    assert "does not select" not in text
    wide = make_adapter({**tiny, "intermediate_size": 48}, name="wide", **name)
    # The question first, then a few names.
    start = f"this base model. {question} 2 tensors of another shape: "
    text = refused(
        wide, start, "mlp.down_proj.lora_A.weight [3, 48] instead of [3, 40]"
    )
    assert text.count(" instead of ") == 2
    wide = make_adapter({**tiny, "intermediate_size": 48}, ("down_proj",), name="all")
    refused(wide, "None of its tensors could be used", strict=False)


def test_biases_that_older_peft_did_not_save_are_named(saved, edit_tensors, refused):
    lora = LoraConfig(r=2, target_modules=("q_proj",), bias="lora_only")
    config, out = saved(lora, attention_bias=True)
    convert.load_adapter(out, config)

    def drop(tensors):
        for key in [key for key in tensors if key.endswith(".bias")]:
            del tensors[key]

    edit_tensors(out / WEIGHTS, drop)
    refused(out, "PEFT before 0.21 does not save the biases", model=config)
    edit_json(out / CONFIG, bias="none")
    convert.load_adapter(out, config)


def test_trained_tables_of_fewer_rows_are_of_another_vocabulary(saved, refused, tiny):
    lora = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=(HEAD, EMBED))
    _, out = saved(lora, vocab_size=tiny["vocab_size"] - 4)
    refused(out, "a vocabulary of", "tokens, fewer than this base has")


def test_a_check_reads_no_tensor(tiny, config, adapter, monkeypatch):
    monkeypatch.setattr("convert.files.TensorFiles.read_into", None)
    assert convert.check_adapter(adapter, config) == open_adapter(adapter)[0]
    other = LlamaConfig.from_hf({**tiny, "intermediate_size": 48})
    with pytest.raises(CheckpointError, match="of another shape"):
        convert.check_adapter(adapter, other)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_is_reported_with_its_tensor(adapter, edit_tensors, refused, value):
    edit_tensors(adapter / WEIGHTS, lambda t: t[KEY].__setitem__((0, 0), value))
    refused(adapter, f"Tensor `{KEY}` contains NaN")


# --- What is left out when asked ---


def test_what_does_not_fit_can_be_left_out(config, adapter, edit_tensors, refused):
    edit_json(adapter / CONFIG, new_field=3)
    _, complete = convert.load_adapter(adapter, config, strict=False)
    other = KEY.replace("q_proj", "v_proj")
    down = KEY.replace("self_attn.q_proj", "mlp.down_proj").replace("lora_A", "lora_B")

    def change(tensors):
        del tensors[KEY]
        tensors[down] = np.zeros((64, 4), np.float32)
        tensors[other] = np.zeros((3, 64), np.float32)

    edit_tensors(adapter / WEIGHTS, change)
    refused(adapter, "unknown fields", "'new_field'", error=UserError)
    notes = ["before"]
    lora, got = convert.load_adapter(adapter, config, strict=False, skipped=notes)
    assert lora.r == 3
    assert notes[:2] == ["before", "'new_field' of adapter_config.json"]
    assert sorted(notes[2:]) == [
        f"{down} [64, 4] instead of [64, 3]: tensors of another shape",
        f"{KEY}: missing tensors",
        f"{other}: unexpected tensors",
    ]
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
        ("dora", f"{of(DOWN)[0]}.{MAGNITUDE}"),
        ("dora", f"{of(DOWN)[0]}.lora_A.weight"),  # |W| is not known here
        ("tied, full", f"{EMBED}.weight"),
    ],
)
def test_what_is_never_left_out(saved, edit_tensors, refused, kind, suffix):
    config, out = saved(kind)
    edit_tensors(out / WEIGHTS, lambda tensors: tensors.pop(PREFIX + suffix))
    message = f"1 missing tensors: {PREFIX}{suffix}"
    refused(out, message, model=config)
    hint = f"`{PREFIX}{suffix}` cannot be skipped: it has no neutral"
    refused(out, message, hint, model=config, strict=False)


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
        for key in [k for k in tensors if k.endswith(MAGNITUDE)][::2]:
            tensors[f"{key}.weight"] = tensors.pop(key)

    edit_tensors(out / WEIGHTS, change)
    assert any(k.endswith("vector.weight") for k in stored(out))
    equal(convert.load_adapter(out, config)[1], want)


@pytest.fixture
def with_tables(saved, edit_tensors):
    """A function: tied? -> (config, base, directory with copies of the tables)."""

    def make(tied, dtype=np.float32, scale=1.0):
        lora = lora_of("embed_tokens", "lm_head")
        config, out = saved(lora, tie_word_embeddings=tied)
        base = random_base(config)
        table = base["model"]["embed_tokens"]["weight"]
        head = table if tied else base["lm_head"]["weight"]
        copies = {
            f"{PREFIX}{name}.base_layer.weight": (scale * copied).astype(dtype)
            for name, copied in ((EMBED, table), (HEAD, head))
        }
        edit_tensors(out / WEIGHTS, lambda tensors: tensors.update(copies))
        return config, base, out

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
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
    equal(convert.load_adapter(path, config, skipped=notes)[1], adapters)
    why = "not compared, no weights of the base were given"
    assert notes == [f"{PREFIX}{n}.base_layer.weight: {why}" for n in (EMBED, HEAD)]


@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_another_base_are_refused(with_tables, tied, edit_tensors, refused):
    _, base, path = with_tables(tied, scale=1.5)
    why = "rows differ by more than rounding, by up to"
    refused(path, why, "`strict`=False (--no", model=base)
    notes = []
    convert.load_adapter(path, base, strict=False, skipped=notes)
    what = "base_layer.weight: the base's own table is used"
    assert [note.partition(";")[0] for note in sorted(notes)] == [
        f"{PREFIX}{name}.{what}" for name in (HEAD, EMBED)
    ]
    shorter = {f"{PREFIX}{EMBED}.base_layer.weight": np.zeros((V - 2, D), np.float32)}
    edit_tensors(path / WEIGHTS, lambda tensors: tensors.update(shorter))
    refused(path, "or another vocabulary", model=base)


@pytest.mark.parametrize("kind", TIED_KINDS)
def test_copies_for_a_tied_head_have_to_agree(saved, edit_tensors, refused, kind):
    config, out = saved(kind)
    _, want = convert.load_adapter(out, config)
    copies = head_copies(stored(out))
    edit_tensors(out / WEIGHTS, lambda t: t[copies[0]].__iadd__(1))
    for strict in (True, False):
        refused(out, f"`{copies[0]}` and ", " are tied", model=config, strict=strict)
    # One that is missing is missed; what it is a copy of is there, however.
    edit_tensors(out / WEIGHTS, lambda t: [t.pop(key) for key in copies])
    refused(out, f"{len(copies)} missing tensors", model=config)
    notes = []
    equal(convert.load_adapter(out, config, strict=False, skipped=notes)[1], want)
    assert sorted(notes) == sorted(f"{key}: missing tensors" for key in copies)


def test_the_lists_that_peft_rewrites_for_tied_tables_are_read(saved):
    # What it saves for modules_to_save=["lm_head"] and target_modules=["lm_head"].
    fields = {"tied, full": "modules_to_save", "tied, shared": "target_modules"}
    for kind, field in fields.items():
        config, out = saved(kind)
        _, want = convert.load_adapter(out, config)
        edit_json(out / CONFIG, **{field: [EMBED]})
        equal(convert.load_adapter(out, config)[1], want)


def test_stray_biases_of_peft_are_skipped(saved, edit_tensors, refused):
    lora = lora_of(bias="all", modules_to_save=("layers.0.mlp",))
    config, out = saved(lora, mlp_bias=True)
    _, want = convert.load_adapter(out, config)
    stray = {
        f"{PREFIX}model.layers.0.mlp.{infix}.gate_proj.bias": np.zeros(F, np.float32)
        for infix in ("modules_to_save.default", "original_module")
    }
    edit_tensors(out / WEIGHTS, lambda tensors: tensors.update(stray))
    notes = []
    equal(convert.load_adapter(out, config, skipped=notes)[1], want)
    why = "a stray copy that PEFT writes and does not read"
    assert sorted(notes) == [f"{key}: {why}" for key in stray]
    edit_json(out / CONFIG, bias="lora_only")
    refused(out, "unexpected tensors: ", "modules_to_save", model=config)


# --- Directories ---


def test_directories_that_are_something_else(adapter, tiny_model, refused):
    refused(adapter / "no", "does not exist. An adapter is a local")
    refused(adapter / WEIGHTS, "is a file; give the PEFT directory")
    refused(tiny_model, "is a model: it has no adapter_config")
    refused(adapter.parent, "is not a PEFT adapter", f"Did you mean `{adapter}`")
    with pytest.raises(CheckpointError, match=f"Did you mean `{adapter}`"):
        convert.open_config(adapter.parent)
    os.truncate(adapter / WEIGHTS, (adapter / WEIGHTS).stat().st_size - 4)
    refused(adapter, "truncated or damaged")
    os.rename(adapter / WEIGHTS, adapter / "adapter_model.bin")
    refused(adapter, "adapter_model.bin, a pickle file")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, "has no adapter_model.safetensors")


# --- Saving ---


def test_save_checks_the_tree(config, adapter, tmp_path):
    lora, adapters = convert.load_adapter(adapter, config)
    out, attention = tmp_path / "out", adapters["model"]["layers"]["self_attn"]
    attention["q_proj"]["lora_A"][1, 2, 3] = np.nan
    with pytest.raises(CheckpointError, match=f"Tensor `{KEY}` contains NaN"):
        convert.save_adapter(out, lora, adapters, config)
    attention["v_proj"] = attention["q_proj"]
    attention["q_proj"] = {"lora_A": np.zeros((2, 4, 64), np.float32)}
    mlp = adapters["model"]["layers"]["mlp"]["down_proj"]
    mlp["lora_A"] = mlp["lora_A"].astype(np.float64)
    with pytest.raises(CheckpointError) as caught:
        convert.save_adapter(out, lora, adapters, config)
    for part in (
        "1 missing arrays: model.layers.self_attn.q_proj.lora_B",
        "self_attn.q_proj.lora_A [2, 4, 64] instead of [2, 3, 64]",
        "1 arrays of another dtype: model.layers.mlp.down_proj.lora_A float64",
        "2 unexpected arrays: model.layers.self_attn.v_proj.lora_A",
    ):
        assert part in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_the_adapter_of_a_changed_base_is_restated(config, tmp_path, init):
    base, out = random_base(config), tmp_path / "out"
    lora = lora_of(
        *("q_proj", "down_proj", "embed_tokens"),
        rank_pattern={"layers.0.mlp.down_proj": 2},
        init_lora_weights=init,
    )
    adapters = init_adapters(jax.random.key(0), base, lora)
    match = rf"`init_lora_weights`='{init}': this adapter belongs to a changed base.*ab"
    with pytest.raises(UserError, match=match):
        convert.save_adapter(out, lora, adapters, config)
    assert not out.exists()
    plain, stated = absorb(lora, adapters, factor_out(base, adapters, lora))
    convert.save_adapter(out, plain, stated, config)
    raw = read(out, CONFIG)
    assert (raw["r"], raw["rank_pattern"]) == (8, {"layers.0.mlp.down_proj": 4})
    assert raw["init_lora_weights"] is True  # nothing is done to the base on loading
    equal(convert.load_adapter(out, config)[1], stated)


def test_bfloat16_trees_are_written_as_float32(tiny, config, make_adapter, tmp_path):
    lora, adapters = convert.load_adapter(make_adapter(tiny, dtype=BF16), config)
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), adapters)
    convert.save_adapter(tmp_path / "a", lora, adapters, config)
    convert.save_adapter(tmp_path / "b", lora, narrow, config)
    assert same_file(tmp_path / "a", tmp_path / "b", WEIGHTS)


def test_save_replaces_a_directory_only_with_overwrite(config, adapter):
    lora, adapters = convert.load_adapter(adapter, config)
    before = stored(adapter)
    adapters = jax.tree.map(lambda a: a + np.float32(1), adapters)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.save_adapter(adapter, lora, adapters, config)
    equal(stored(adapter), before)
    convert.save_adapter(adapter, lora, adapters, config, overwrite=True)
    equal(stored(adapter), {key: value + 1 for key, value in before.items()})
    assert sorted(p.name for p in adapter.iterdir()) == [CONFIG, WEIGHTS]
