"""Which modules a LoraConfig selects: the rules of PEFT, one by one."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import (
    AdaptedModule,
    is_embedding,
    linear_modules,
    matching,
    select,
)
from qlora_jax.tree import PROJECTIONS, dotted

L, D, F, K, V = 3, 64, 96, 32, 50
ATTENTION, MLP = PROJECTIONS[:4], PROJECTIONS[4:]
SHAPES = {
    "q_proj": (D, D),
    "k_proj": (K, D),
    "v_proj": (K, D),
    "o_proj": (D, D),
    "gate_proj": (F, D),
    "up_proj": (F, D),
    "down_proj": (D, F),
}
EMBED, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
LINEARS = [
    f"model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
    for i in range(L)
    for name in PROJECTIONS
]


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def base(*, tied=False, quantized=False, biases=False):
    """Shapes of a small model, of arrays or packed leaves."""

    def linear(name):
        out, inner = SHAPES[name]
        node = {"weight": abstract(L, out, inner)}
        if quantized:
            node["weight"] = nf4.abstract(
                (out, inner), double_quant=True, dtype="float32", leading=(L,)
            )
        return {**node, "bias": abstract(L, out)} if biases else node

    tree = {
        "model": {
            "embed_tokens": {"weight": abstract(V, D)},
            "layers": {
                "input_layernorm": {"weight": abstract(L, D)},
                "self_attn": {name: linear(name) for name in ATTENTION},
                "post_attention_layernorm": {"weight": abstract(L, D)},
                "mlp": {name: linear(name) for name in MLP},
            },
            "norm": {"weight": abstract(D)},
        }
    }
    if not tied:
        tree["lm_head"] = {"weight": abstract(V, D)}
    return tree


def config(*targets, **fields):
    return LoraConfig(target_modules=targets or ("q_proj",), **fields)


def spelled(parts):
    """Dotted names with what was selected of each, layer by layer."""
    out = {}
    for part in parts:
        if isinstance(part, AdaptedModule):
            pairs = zip(part.ranks, part.scalings, strict=True)
            values = [pair if pair[0] else None for pair in pairs]
        else:
            values = [True if c else None for c in part.trained]
        names = dotted(part.path, part.layers)
        out |= {n: v for n, v in zip(names, values, strict=True) if v is not None}
    return out


def adapted(lora, **kinds):
    """Dotted names of the adapted modules -> (rank, scaling)."""
    return spelled(select(base(**kinds), lora).adapted)


def whole(lora, **kinds):
    return set(spelled(select(base(**kinds), lora).full_tensors))


def named(*patterns):
    """The linear modules whose whole name matches one of these."""
    return {n for n in LINEARS if any(re.fullmatch(p, n) for p in patterns)}


# --- One module at a time ---

PATH = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    "targets, path, selected",
    [
        # Names in a list: whole paths, or ends of them that begin behind a dot.
        (("q_proj",), PATH, True),
        (("self_attn.q_proj",), PATH, True),
        (("3.self_attn.q_proj",), PATH, True),
        (("layers.3.self_attn.q_proj",), PATH, True),
        ((PATH,), PATH, True),
        (("v_proj", "q_proj"), PATH, True),
        (("_proj",), PATH, False),
        (("proj",), PATH, False),
        (("attn.q_proj",), PATH, False),
        (("q_proj.weight",), PATH, False),
        (("layers.3",), PATH, False),  # what is above does not count
        (("self_attn",), PATH, False),
        (("layers.2.self_attn.q_proj",), PATH, False),
        (("Q_proj",), PATH, False),
        (("lm_head",), "lm_head", True),
        (("embed_tokens",), EMBED, True),
        ((EMBED,), EMBED, True),
        (("model.lm_head",), "lm_head", False),
        # In a list of several a name is no pattern.
        ((".*q_proj", "v_proj"), PATH, False),
        (("all-linear", "v_proj"), PATH, False),
        # A string is a pattern for the whole path.
        ("q_proj", PATH, False),
        (r".*q_proj", PATH, True),
        (r".*_proj", PATH, True),
        (r".*\.layers\.[12]\..*", PATH, False),
        (r".*\.layers\.[1-3]\..*", PATH, True),
        (r"model\.layers\.3", PATH, False),
        (r"model\.layers\.3.*", PATH, True),
        (r".*(lm_head|q_proj)", "lm_head", True),
        (r".*embed.*", EMBED, True),
        ("lm_head", "lm_head", True),
        # Everything but embedding and head.
        ("all-linear", PATH, True),
        ("ALL-linear", PATH, True),
        ("all-linear", "lm_head", False),
        ("all-linear", EMBED, False),
        ("all-linear", "model.layers.0.mlp.router", True),
    ],
)
def test_target_modules(targets, path, selected):
    lora = LoraConfig(target_modules=targets)
    assert (matching([path], lora) == {path}) is selected


@pytest.mark.parametrize(
    "exclude, selected",
    [
        (("q_proj",), False),
        (("self_attn.q_proj",), False),
        ((PATH,), False),
        (("v_proj", "layers.3.self_attn.q_proj"), False),
        (("self_attn",), True),  # a container's name excludes nothing
        (("layers.3",), True),
        (("proj",), True),
        ("q_proj", True),  # a string is a pattern for the whole path
        (".*q_proj", False),
        (r".*\.3\..*", False),
        (r".*\.[02]\..*", True),
    ],
)
def test_exclude_modules_wins(exclude, selected):
    for targets in (("q_proj",), (PATH,), "all-linear", ".*q_proj"):
        lora = LoraConfig(target_modules=targets, exclude_modules=exclude)
        assert (matching([PATH], lora) == {PATH}) is selected


@pytest.mark.parametrize(
    "saved, selected",
    [
        ("q_proj", False),
        ("self_attn", False),  # with all that is in it
        ("layers.3", False),
        ("3", False),
        ("layers", False),
        ("model", False),
        ("self_attn.q_proj", False),
        ("[kq]_proj", False),  # a name is a pattern here
        (r"layers\.\d", False),
        ("proj", True),  # whole parts of a path
        ("layers.2", True),
        ("attn", True),
        ("v_proj", True),
        ("norm", True),
    ],
)
def test_what_is_trained_whole_is_not_adapted(saved, selected):
    for targets in (("q_proj",), (PATH,), "all-linear", ".*q_proj"):
        lora = LoraConfig(target_modules=targets, modules_to_save=(saved,))
        assert (matching([PATH], lora) == {PATH}) is selected


@pytest.mark.parametrize(
    "layers, pattern, path, selected",
    [
        (3, None, PATH, True),
        (2, None, PATH, False),
        (0, None, "model.layers.0.self_attn.q_proj", True),  # 0 is a layer
        (0, None, PATH, False),
        ((1, 3), None, PATH, True),
        ((1, 2), None, PATH, False),
        ((3, 99), None, PATH, True),  # layers that are not there are no error
        ((13,), None, PATH, False),
        ((3,), None, "model.layers.13.self_attn.q_proj", False),
        ((3,), ("layers",), PATH, True),
        ((3,), "layers", PATH, True),
        ((3,), ("h", "layers"), PATH, True),
        ((3,), ("h", "blocks"), PATH, False),
        ((3,), ("ayers",), PATH, False),  # from a dot on
        ((3,), ("model.layers",), PATH, True),
        ((3,), ("(h|layers)",), PATH, True),
        # The first pattern that matches holds.
        ((1,), None, "model.layers.1.experts.3.q_proj", True),
        ((3,), None, "model.layers.1.experts.3.q_proj", False),
        ((3,), ("experts", "layers"), "model.layers.1.experts.3.q_proj", True),
        # What is in no layer is in none of these, unless its whole name is given.
        ((0,), None, "lm_head", True),
        ((0,), None, EMBED, False),
        ((0,), None, "model.q_proj", False),
    ],
)
def test_layers_to_transform(layers, pattern, path, selected):
    lora = config(
        *("q_proj", "lm_head", "embed_tokens"),
        layers_to_transform=layers,
        layers_pattern=pattern,
    )
    assert (matching([path], lora) == {path}) is selected


def test_an_empty_list_of_layers_means_all_and_whole_names_are_not_asked():
    assert matching([PATH], config(layers_to_transform=()))
    assert matching([PATH], config(PATH, layers_to_transform=(0,)))
    assert matching([EMBED], config(EMBED, layers_to_transform=(0,)))
    assert not matching([EMBED], config("embed_tokens", layers_to_transform=(0,)))
    assert not matching([PATH], config("q_proj", layers_to_transform=(0,)))


HOSTILE = r"(?:(?:.|..)+)+[A-Z]"


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_modules=HOSTILE),
        dict(exclude_modules=HOSTILE),
        dict(modules_to_save=(HOSTILE,)),
        dict(layers_to_transform=1, layers_pattern=HOSTILE),
    ],
)
def test_a_pattern_that_takes_too_long_is_refused(fields, monkeypatch):
    monkeypatch.setattr("qlora_jax.lora.patterns.SECONDS", 0.05)
    lora = LoraConfig(**fields)
    with pytest.raises(UserError, match=f"`{[*fields][-1]}`: .* takes too long to mat"):
        matching([PATH], lora)


# --- A whole model ---


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_modules_are_the_projections_and_an_untied_head(tied, quantized):
    found = linear_modules(base(tied=tied, quantized=quantized))
    stack = ("model", "layers")
    assert found[(*stack, "mlp", "down_proj")] == (D, F, L)
    assert found[(*stack, "self_attn", "k_proj")] == (K, D, L)
    assert (("lm_head",) in found) is not tied
    assert len(found) == 7 + (not tied)
    if not tied:
        assert found[("lm_head",)] == (V, D, None)


@pytest.mark.parametrize("quantized", [False, True])
def test_packed_and_dense_models_select_alike(quantized):
    lora = config(*PROJECTIONS, "lm_head", "embed_tokens", bias="all")
    dense = select(base(biases=True), lora)
    assert select(base(biases=True, quantized=quantized), lora) == dense


@pytest.mark.parametrize(
    "fields, names",
    [
        (dict(target_modules="all-linear"), set(LINEARS)),
        (dict(target_modules=PROJECTIONS), set(LINEARS)),
        (dict(target_modules=("q_proj",)), named(".*q_proj")),
        (dict(target_modules=("mlp.up_proj",)), named(".*up_proj")),
        (
            dict(target_modules=("layers.1.mlp.up_proj", "k_proj")),
            named(r".*1\.mlp\.up_proj", ".*k_proj"),
        ),
        (
            dict(target_modules=r".*\.(0|2)\..*(q|down)_proj"),
            named(r".*\.[02]\..*(q|down)_proj"),
        ),
        (
            dict(target_modules=("q_proj", "v_proj"), layers_to_transform=(0, 2)),
            named(r".*\.[02]\..*(q|v)_proj"),
        ),
        (
            dict(target_modules=("q_proj",), layers_to_transform=1),
            named(r".*1\..*q_proj"),
        ),
        (
            # Whole names pass by the filter of layers.
            dict(
                target_modules=("q_proj", "lm_head", "model.layers.1.mlp.up_proj"),
                layers_to_transform=(0,),
            ),
            named(r".*0\..*q_proj", r".*1\.mlp\.up_proj") | {HEAD},
        ),
        (
            dict(target_modules="all-linear", exclude_modules=("k_proj", "o_proj")),
            named(".*(q|v|gate|up|down)_proj"),
        ),
        (
            dict(target_modules="all-linear", exclude_modules=r".*\.1\..*|.*mlp.*"),
            named(r".*\.[02]\.self_attn.*"),
        ),
        (
            dict(target_modules="all-linear", modules_to_save=("layers.1.mlp",)),
            set(LINEARS) - named(r".*1\.mlp.*"),
        ),
        (
            # Saved as "proj" they are trained whole, though no part is called so.
            dict(target_modules=("q_proj", "lm_head"), modules_to_save=("proj",)),
            {HEAD},
        ),
        (dict(target_modules=("lm_head", "embed_tokens")), {HEAD, EMBED}),
        (dict(target_modules=r"lm_head|.*1\..*q_proj"), {HEAD} | named(".*1.*q_proj")),
    ],
)
def test_layers_and_modules_that_are_adapted(fields, names):
    got = adapted(LoraConfig(r=4, lora_alpha=8, **fields))
    assert got == dict.fromkeys(names, (4, 2.0))


def test_norms_are_never_adapted():
    everything = adapted(LoraConfig(target_modules=".*"))
    assert set(everything) == {*LINEARS, EMBED, HEAD}


def test_ranks_and_scalings_of_single_layers():
    lora = config(
        *("q_proj", "up_proj", "lm_head"),
        r=8,
        lora_alpha=16,
        rank_pattern={
            r"layers\.[12]\.mlp\.(up|gate)_proj": 2,
            "up_proj": 32,
            "layers.1.self_attn.q_proj": 4,
        },
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, "lm_head": 1},
    )
    assert adapted(lora) == {
        "model.layers.0.self_attn.q_proj": (8, 3 / 8),
        "model.layers.1.self_attn.q_proj": (4, 4.0),
        "model.layers.2.self_attn.q_proj": (8, 2.0),
        "model.layers.0.mlp.up_proj": (32, 0.5),
        "model.layers.1.mlp.up_proj": (2, 8.0),
        "model.layers.2.mlp.up_proj": (2, 8.0),
        "lm_head": (8, 1 / 8),
    }
    up = next(a for a in select(base(), lora).adapted if a.path[-1] == "up_proj")
    assert up.rank == 32 and up.ranks == (32, 2, 2)
    assert up.parts == {"lora_A": (32, D), "lora_B": (F, 32)}
    assert up.parts_of(2) == {"lora_A": (2, D), "lora_B": (F, 2)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora, lora_bias", [(0, 0), (1, 0), (0, 1)])
def test_the_arrays_of_every_kind_of_module(tied, dora, lora_bias):
    targets = ["down_proj", "lm_head"]
    if not lora_bias:  # which an embedding cannot have
        targets.append("embed_tokens")
    lora = config(*targets, r=4, use_dora=bool(dora), lora_bias=bool(lora_bias))
    down = ("model", "layers", "mlp", "down_proj")
    table = ("model", "embed_tokens")
    want = {
        (*table, "lora_embedding_A"): (4, V),
        (*table, "lora_embedding_B"): (D, 4),
        (*down, "lora_A"): (L, 4, F),
        (*down, "lora_B"): (L, D, 4),
        ("lm_head", "lora_A"): (4, D),
        ("lm_head", "lora_B"): (V, 4),
    }
    name = "lora_magnitude_vector" if dora else "lora_bias"
    if dora or lora_bias:
        want[*down, name] = (L, D)
        want["lm_head", name] = (V,)
    if dora:  # of an embedding the columns
        want[*table, name] = (D,)
    if lora_bias:
        want = {path: shape for path, shape in want.items() if path[:2] != table}
    assert select(base(tied=tied), lora).shapes() == want


def test_an_embedding_takes_no_lora_bias():
    """As in PEFT: "lora_bias=True is not supported for Embedding."."""
    for targets, more in (
        (("q_proj", "embed_tokens"), {}),
        ((r".*embed_tokens",), {}),
        (("lm_head",), {"ensure_weight_tying": True}),
    ):
        lora = config(*targets, lora_bias=True, **more)
        with pytest.raises(UserError, match="`lora_bias` .* embedding .embed_tokens."):
            select(base(tied=True), lora)
    select(base(), config("lm_head", lora_bias=True))


def test_layers_that_are_not_there_are_said():
    lora = config("q_proj", layers_to_transform=7)
    with pytest.raises(
        UserError, match=r"`layers_to_transform`=7. Layers here: 0 to 2"
    ):
        select(base(), lora)
    with pytest.raises(UserError) as caught:
        select(base(), config("query", layers_to_transform=1))
    assert "Layers here" not in str(caught.value)


def test_paths_are_spelled_as_hugging_face_does():
    path = ("model", "layers", "mlp", "up_proj")
    assert dotted(path, 2) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert dotted(("lm_head",), None) == ["lm_head"]
    assert is_embedding(("model", "embed_tokens")) and not is_embedding(("lm_head",))


def test_modules_of_ones_own_are_selected_by_their_name():
    tree = base()
    tree["model"]["layers"]["mixer"] = {"my_linear": {"weight": abstract(L, 5, D)}}
    tree["extra"] = {"word_embeddings": {"weight": abstract(9, 7)}}
    lora = config("my_linear", "word_embeddings", r=2)
    assert select(tree, lora).shapes() == {
        ("model", "layers", "mixer", "my_linear", "lora_A"): (L, 2, D),
        ("model", "layers", "mixer", "my_linear", "lora_B"): (L, 5, 2),
        ("extra", "word_embeddings", "lora_embedding_A"): (2, 9),
        ("extra", "word_embeddings", "lora_embedding_B"): (7, 2),
    }
    everything = select(tree, LoraConfig(target_modules="all-linear"))
    assert {a.path[-1] for a in everything.adapted} == {*PROJECTIONS, "my_linear"}


# --- Nothing matches ---


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(target_modules=("q_projj",)),
            r"=\('q_projj',\) matches no linear module and no embedding of this model. "
            r"Did you mean .*q_proj.* Modules here: down_proj, embed_tokens, gate_proj",
        ),
        (
            dict(target_modules=("wq", "wk")),
            r"=\('wq', 'wk'\) matches no .* Modules he",
        ),
        (dict(target_modules=("norm",)), "matches no linear module"),
        (dict(target_modules=r".*nothing"), r"='\.\*nothing' matches no linear module"),
        (
            dict(target_modules=("q_proj",), layers_to_transform=(7,)),
            r"of this model under `layers_to_transform`=\(7,\)\.",
        ),
        (
            dict(
                target_modules=("q_proj",), layers_to_transform=0, layers_pattern=("h",)
            ),
            r"under `layers_to_transform`=0, `layers_pattern`=\('h',\)",
        ),
        (
            dict(target_modules=("embed_tokens",), layers_to_transform=0),
            "matches no linear module",
        ),
        (
            dict(target_modules=("q_proj",), exclude_modules=("q_proj",)),
            r"under `exclude_modules`=\('q_proj',\)",
        ),
        (
            dict(target_modules=("q_proj",), modules_to_save=("self_attn",)),
            r"under `modules_to_save`=\('self_attn',\)",
        ),
    ],
)
def test_targets_that_select_nothing_are_refused_with_what_is_there(fields, message):
    with pytest.raises(UserError, match=message):
        select(base(), LoraConfig(**fields))


@pytest.mark.parametrize("tied", [False, True])
def test_targets_that_select_nothing_beside_others_are_listed(tied):
    lora = config("q_proj", "c_attn", "lm_head", "layers.7.mlp.up_proj", "norm")
    unmatched = select(base(tied=tied), lora).unmatched
    assert unmatched == ("c_attn", "layers.7.mlp.up_proj", "norm")
    # What a filter takes away was matched.
    lora = config("q_proj", "k_proj", exclude_modules=("k_proj",))
    assert select(base(tied=tied), lora).unmatched == ()
    pattern = LoraConfig(target_modules=r"nothing|.*q_proj")
    assert select(base(tied=tied), pattern).unmatched == ()


# --- Modules trained whole ---

NORMS = {
    *(f"model.layers.{i}.input_layernorm.weight" for i in range(L)),
    *(f"model.layers.{i}.post_attention_layernorm.weight" for i in range(L)),
}


@pytest.mark.parametrize(
    "names, want",
    [
        # The ends of paths, from anywhere.
        (("model.norm",), {"model.norm.weight"}),
        (("norm",), {"model.norm.weight", *NORMS}),
        (("input_layernorm",), {n for n in NORMS if "input" in n}),
        (("layers.1.input_layernorm",), {"model.layers.1.input_layernorm.weight"}),
        (("embed_tokens",), {"model.embed_tokens.weight"}),
        (("embed_tokens", "lm_head"), {"model.embed_tokens.weight", "lm_head.weight"}),
        (("head",), {"lm_head.weight"}),
        # A module with all that is in it.
        (
            ("layers.1.mlp",),
            {f"model.layers.1.mlp.{n}.{p}" for n in MLP for p in ("weight", "bias")},
        ),
        (
            ("v_proj",),
            {
                f"model.layers.{i}.self_attn.v_proj.{p}"
                for i in range(L)
                for p in ("weight", "bias")
            },
        ),
        (
            ("layers.0.self_attn.v_proj", "layers.2.mlp.up_proj"),
            {
                f"model.layers.{name}.{p}"
                for name in ("0.self_attn.v_proj", "2.mlp.up_proj")
                for p in ("weight", "bias")
            },
        ),
    ],
)
def test_modules_to_save(names, want):
    lora = config("q_proj", modules_to_save=names)
    assert whole(lora, biases=True) == want


def test_a_module_may_be_trained_whole_in_some_layers_and_adapted_in_others():
    lora = config("up_proj", r=4, modules_to_save=("layers.1.mlp",), bias="all")
    selection = select(base(biases=True), lora)
    (up,) = selection.adapted
    assert up.ranks == (4, 0, 4) and up.scalings == (4.0, 0.0, 4.0)
    chosen = {w.path[-2:]: w.trained for w in selection.full_tensors}
    for name in MLP:
        assert chosen[name, "weight"] == (False, True, False)
        assert chosen[name, "bias"] == (True,) * L  # of "all"
    for name in ATTENTION:
        assert chosen[name, "bias"] == (True,) * L
        assert (name, "weight") not in chosen
    only = select(
        base(biases=True),
        config("up_proj", r=4, modules_to_save=("layers.1.mlp",), bias="lora_only"),
    )
    chosen = {w.path[-2:]: w.trained for w in only.full_tensors}
    assert chosen["up_proj", "bias"] == (True,) * L
    assert chosen["gate_proj", "bias"] == (False, True, False)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ("lm_hed",),
            "names 'lm_hed', which this model does not have. Did you mean `lm_h",
        ),
        (("norm", "score"), "names 'score', which this model does not have"),
        (("layers.9.mlp",), "names 'layers.9.mlp', which .* Modules here: down_proj,"),
        (("a", "b"), "names 'a', 'b', which"),
    ],
)
def test_modules_to_save_that_are_not_there_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        select(base(), config("q_proj", modules_to_save=names))


# --- Biases ---


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("biases", [False, True])
def test_biases(biases, bias, layers):
    lora = config("q_proj", "down_proj", bias=bias, layers_to_transform=layers)
    got = whole(lora, biases=biases)
    one = r"1" if layers else r"\d"
    if not biases or bias == "none":
        assert got == set()
    elif bias == "lora_only":  # of the layers that are adapted
        want = named(rf".*\.{one}\..*(q|down)_proj")
        assert got == {f"{n}.bias" for n in want}
    else:  # of all layers
        assert got == {f"{n}.bias" for n in LINEARS}
    for part in select(base(biases=biases), lora).full_tensors:
        assert part.path[-1] == "bias" and part.tied_to is None


# --- Tied embeddings ---


def tables(lora, tied=True):
    """What is adapted or trained of embedding and head: name -> whom it follows."""
    selection = select(base(tied=tied), lora)
    parts = [
        *selection.adapted,
        *(w for w in selection.full_tensors if w.path[-1] == "weight"),
        *selection.rows,
    ]
    out = {}
    for part in parts:
        path = [p for p in part.path if p != "weight"]
        if path[-1] in ("embed_tokens", "lm_head"):
            follows = part.tied_to and [p for p in part.tied_to if p != "weight"][-1]
            out[type(part).__name__, path[-1]] = follows
    return out


def both(kind):
    return {(kind, "embed_tokens"): None, (kind, "lm_head"): "embed_tokens"}


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), (EMBED, HEAD)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensure", [False, True])
def test_adapters_of_tied_tables_are_apart_unless_tying_is_ensured(
    ensure, tied, targets
):
    lora = config(*targets, "q_proj", ensure_weight_tying=ensure)
    apart = {("AdaptedModule", t.rpartition(".")[2]): None for t in targets}
    assert tables(lora, tied) == (both("AdaptedModule") if ensure and tied else apart)


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), (EMBED, HEAD)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensure", [False, True])
def test_tied_tables_trained_whole_are_apart_unless_tying_is_ensured(
    ensure, tied, names
):
    lora = config(modules_to_save=names, ensure_weight_tying=ensure)
    apart = {("FullTensor", t.rpartition(".")[2]): None for t in names}
    assert tables(lora, tied) == (both("FullTensor") if ensure and tied else apart)


@pytest.mark.parametrize(
    "targets, shared",
    [
        ("lm_head|.*q_proj", True),  # an expression that matches the bare word
        (r".*(embed_tokens|q_proj)", True),
        (r"model\.embed_tokens|.*q_proj", False),
        (("embed_tokens", "q_proj"), True),
        ((EMBED, "q_proj"), True),
        (("some.lm_head", "q_proj"), True),  # the last part of a name
    ],
)
def test_tying_acts_by_the_names_that_are_given(targets, shared):
    lora = LoraConfig(target_modules=targets, ensure_weight_tying=True)
    apart = {("AdaptedModule", "embed_tokens"): None}
    assert tables(lora) == (both("AdaptedModule") if shared else apart)


def test_tying_of_modules_trained_whole_acts_by_name_too():
    lora = config(modules_to_save=("head",), ensure_weight_tying=True)
    assert tables(lora) == {("FullTensor", "lm_head"): None}
    lora = config(modules_to_save=("norm",), ensure_weight_tying=True)
    assert tables(lora) == {}
    assert (
        tables(LoraConfig(target_modules="all-linear", ensure_weight_tying=True)) == {}
    )


def test_tying_asks_no_layers_and_no_exclusion_of_the_head():
    lora = config(
        *("embed_tokens", "q_proj"),
        ensure_weight_tying=True,
        layers_to_transform=(0,),
        exclude_modules=("lm_head",),
    )
    assert tables(lora) == both("AdaptedModule")
    assert set(adapted(lora, tied=True)) == {EMBED, HEAD, *named(r".*0\..*q_proj")}
    lora = config(
        "lm_head", ensure_weight_tying=True, exclude_modules=("embed_tokens",)
    )
    with pytest.raises(UserError, match="`exclude_modules` takes embed_tokens away"):
        select(base(tied=True), lora)


@pytest.mark.parametrize(
    "fields, embed, head",
    [
        # The embedding's rank for both, each side's own scaling, by its own name.
        (dict(rank_pattern={"embed_tokens": 2}), (2, 3.0), (2, 1.5)),
        (dict(rank_pattern={"lm_head": 2}), (4, 1.5), (4, 3.0)),
        (
            dict(
                rank_pattern={"embed_tokens": 2, "lm_head": 3},
                alpha_pattern={"lm_head": 10, "embed_tokens": 7},
            ),
            (2, 3.5),
            (2, 10 / 3),
        ),
    ],
)
def test_rank_and_scaling_of_a_head_that_follows(fields, embed, head):
    lora = config("lm_head", r=4, lora_alpha=6, ensure_weight_tying=True, **fields)
    assert adapted(lora, tied=True) == {EMBED: embed, HEAD: head}


def test_a_head_that_follows_has_no_arrays_but_its_magnitude():
    lora = config("lm_head", r=4, ensure_weight_tying=True)
    plain = {
        ("model", "embed_tokens", "lora_embedding_A"): (4, V),
        ("model", "embed_tokens", "lora_embedding_B"): (D, 4),
    }
    assert select(base(tied=True), lora).shapes() == plain
    assert select(base(tied=True), lora).groups() == {
        "embed_tokens": 4 * (V + D),
        "lm_head": 0,
    }
    dora = config("lm_head", r=4, ensure_weight_tying=True, use_dora=True)
    assert select(base(tied=True), dora).shapes() == {
        **plain,
        ("model", "embed_tokens", "lora_magnitude_vector"): (D,),
        ("lm_head", "lora_magnitude_vector"): (V,),
    }


def test_a_table_trained_whole_for_both_takes_its_updates_away():
    lora = config(
        *("embed_tokens", "lm_head", "q_proj"),
        ensure_weight_tying=True,
        modules_to_save=("lm_head",),
    )
    assert tables(lora) == both("FullTensor")


# --- Token rows ---


def rows(lora, tied):
    return {
        r.path[-1]: (r.indices, r.tied_to and r.tied_to[-1])
        for r in select(base(tied=tied), lora).rows
    }


@pytest.mark.parametrize(
    "wanted, tied, want",
    [
        ((5, 2), False, {"embed_tokens": ((5, 2), None)}),
        (
            (5, 2),
            True,  # the head follows
            {"embed_tokens": ((5, 2), None), "lm_head": ((5, 2), "embed_tokens")},
        ),
        (
            {EMBED: (5,)},
            True,
            {"embed_tokens": ((5,), None), "lm_head": ((5,), "embed_tokens")},
        ),
        (
            {"embed_tokens": (5, 2), "lm_head": (5, 2)},
            True,
            {"embed_tokens": ((5, 2), None), "lm_head": ((5, 2), "embed_tokens")},
        ),
        (
            {"embed_tokens": (5, 2), "lm_head": (5, 2)},
            False,
            {"embed_tokens": ((5, 2), None), "lm_head": ((5, 2), None)},
        ),
        # Different rows, or the same in another order: each has its own.
        (
            {"embed_tokens": (5, 2), "lm_head": (3,)},
            True,
            {"embed_tokens": ((5, 2), None), "lm_head": ((3,), None)},
        ),
        (
            {"embed_tokens": (5, 2), "lm_head": (2, 5)},
            True,
            {"embed_tokens": ((5, 2), None), "lm_head": ((2, 5), None)},
        ),
        # The head alone: the embedding does not follow.
        ({"lm_head": (3,)}, True, {"lm_head": ((3,), None)}),
        ({"lm_head": (3,)}, False, {"lm_head": ((3,), None)}),
    ],
)
@pytest.mark.parametrize("ensure", [False, True])
def test_token_rows(wanted, tied, want, ensure):
    lora = config(trainable_token_indices=wanted, ensure_weight_tying=ensure)
    if tied and ensure and len({v for v, _ in want.values()}) > 1:
        with pytest.raises(UserError, match="embed_tokens and lm_head different rows"):
            rows(lora, tied)
        return
    assert rows(lora, tied) == want
    shapes = select(base(tied=tied), lora).shapes()
    deltas = {p[-2]: s for p, s in shapes.items() if p[-1] == "trainable_tokens_delta"}
    assert deltas == {n: (len(v), D) for n, (v, follows) in want.items() if not follows}


@pytest.mark.parametrize(
    "fields, tied, message",
    [
        (
            dict(trainable_token_indices=(3, V)),
            False,
            rf"has {V}, and 'embed_tokens' has {V} rows \(0 to {V - 1}\)",
        ),
        (
            dict(trainable_token_indices={"lm_hed": (3,)}),
            False,
            "names 'lm_hed', which is no embedding and no head of this model. Did yo",
        ),
        (dict(trainable_token_indices={"up_proj": (3,)}), False, "is no embedding and"),
        (
            dict(trainable_token_indices=(3,), modules_to_save=("embed_tokens",)),
            False,
            "of 'embed_tokens', which `modules_to_save` trains whole; give one of the",
        ),
        (
            dict(
                trainable_token_indices=(3,),
                modules_to_save=("lm_head",),
                ensure_weight_tying=True,
            ),
            True,
            "'embed_tokens', which `modules_to_save` trains whole",
        ),
        (  # the head would follow
            dict(trainable_token_indices=(3,), modules_to_save=("lm_head",)),
            True,
            "'lm_head', which `modules_to_save` trains whole",
        ),
        (
            dict(trainable_token_indices=(3,), target_modules=("embed_tokens",)),
            False,
            "'embed_tokens', which `target_modules` adapts; give one of the two",
        ),
        (
            dict(
                trainable_token_indices={"lm_head": (3,)}, target_modules=("lm_head",)
            ),
            True,
            "'lm_head', which `target_modules` adapts",
        ),
        (
            dict(
                trainable_token_indices=(3,), target_modules=("lm_head",), use_dora=True
            ),
            True,
            "'lm_head', which is tied to the embedding and adapted with `use_dora`",
        ),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(fields, tied, message):
    with pytest.raises(UserError, match=message):
        select(base(tied=tied), LoraConfig(**{"target_modules": ("q_proj",), **fields}))


def test_rows_go_with_other_parts_of_the_tables():
    lora = config("lm_head", trainable_token_indices=(3,))
    assert tables(lora, tied=False) == {
        ("AdaptedModule", "lm_head"): None,
        ("TokenRows", "embed_tokens"): None,
    }
    assert tables(lora, tied=True) == {
        ("AdaptedModule", "lm_head"): None,
        ("TokenRows", "embed_tokens"): None,
        ("TokenRows", "lm_head"): "embed_tokens",
    }
    lora = config(trainable_token_indices=(3,), modules_to_save=("lm_head",))
    assert tables(lora, tied=False) == {
        ("FullTensor", "lm_head"): None,
        ("TokenRows", "embed_tokens"): None,
    }


# --- Counts ---


def test_groups_count_what_is_trained_without_padding():
    lora = config(
        *("q_proj", "down_proj", "embed_tokens"),
        r=4,
        rank_pattern={"layers.0.self_attn.q_proj": 1, "layers.2.mlp.down_proj": 8},
        layers_to_transform=None,
        modules_to_save=("model.norm", "layers.1.self_attn.k_proj"),
        trainable_token_indices={"lm_head": (3, 4)},
        bias="lora_only",
        use_dora=True,
    )
    assert select(base(biases=True), lora).groups() == {
        # Ranks 1, 4, 4; magnitude and bias of each layer.
        "q_proj": (1 + 4 + 4) * (D + D) + L * D + L * D,
        "down_proj": (4 + 4 + 8) * (D + F) + L * D + L * D,
        "embed_tokens": 4 * (V + D) + D,
        "k_proj": K * D + K,
        "norm": D,
        "lm_head": 2 * D,
    }


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize(
    "hidden, ffn, layers, heads, groups, unit",
    [
        (2048, 8192, 16, 32, 8, 704_512),  # Llama 3.2 1B
        (3072, 8192, 28, 24, 8, 1_519_616),  # Llama 3.2 3B
        (4096, 14336, 32, 32, 8, 2_621_440),  # Llama 3.1 8B
        (8192, 28672, 80, 64, 8, 12_943_360),  # Llama 3.1 70B
    ],
)
def test_counts_of_published_models(hidden, ffn, layers, heads, groups, unit, rank):
    kv = hidden // heads * groups
    tree = {
        "model": {
            "embed_tokens": {"weight": abstract(128_256, hidden)},
            "layers": {
                "self_attn": {
                    "q_proj": {"weight": abstract(layers, hidden, hidden)},
                    "k_proj": {"weight": abstract(layers, kv, hidden)},
                    "v_proj": {"weight": abstract(layers, kv, hidden)},
                    "o_proj": {"weight": abstract(layers, hidden, hidden)},
                },
                "mlp": {
                    "gate_proj": {"weight": abstract(layers, ffn, hidden)},
                    "up_proj": {"weight": abstract(layers, ffn, hidden)},
                    "down_proj": {"weight": abstract(layers, hidden, ffn)},
                },
            },
        }
    }
    selection = select(tree, LoraConfig(r=rank, target_modules="all-linear"))
    assert sum(selection.groups().values()) == unit * rank
    assert sum(map(math.prod, selection.shapes().values())) == unit * rank


def test_the_sum_of_all_ways_is_that_of_the_arrays():
    # Without padding, what is counted is what the arrays hold.
    for tied, dora, bias in itertools.product(
        [False, True], [False, True], ["none", "all"]
    ):
        lora = config(
            *(*PROJECTIONS, "embed_tokens"),
            use_dora=dora,
            bias=bias,
            modules_to_save=("norm",),
            ensure_weight_tying=True,
        )
        selection = select(base(tied=tied, biases=True), lora)
        held = sum(map(math.prod, selection.shapes().values()))
        assert sum(selection.groups().values()) == held
