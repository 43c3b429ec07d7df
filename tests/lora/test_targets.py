"""Which modules a LoraConfig selects: the rules of PEFT, one by one."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import (
    AdaptedModule,
    is_embedding,
    linear_modules,
    matching,
    select,
)
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.params import abstract_base
from qlora_jax.tree import PROJECTIONS, dotted
from tests.lora.reference import D, F, K, L, V
from tests.lora.reference import abstract as base

ATTENTION, MLP = PROJECTIONS[:4], PROJECTIONS[4:]
EMBED, HEAD = "model.embed_tokens", "lm_head"
LINEARS = [
    f"model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
    for i in range(L)
    for name in PROJECTIONS
]


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


def full_tensors(lora, **kinds):
    return set(spelled(select(base(**kinds), lora).full_tensors))


def named(*patterns):
    """The linear modules whose whole name matches one of these."""
    return {n for n in LINEARS if any(re.fullmatch(p, n) for p in patterns)}


# --- One module at a time ---

PATH = "model.layers.3.self_attn.q_proj"
HOSTILE = r"(?:(?:.|..)+)+[A-Z]"


def selects(lora, path=PATH):
    return matching([path], lora) == {path}


@pytest.mark.parametrize(
    "path, targets, others",
    [
        # Names in a list: whole paths, or ends of them that begin behind a dot.
        (
            PATH,
            [
                *(("q_proj",), ("self_attn.q_proj",), ("3.self_attn.q_proj",)),
                *(("layers.3.self_attn.q_proj",), (PATH,), ("v_proj", "q_proj")),
            ],
            [
                *(("_proj",), ("proj",), ("attn.q_proj",), ("q_proj.weight",)),
                *(("layers.3",), ("self_attn",)),  # what contains it does not count
                *(("layers.2.self_attn.q_proj",), ("Q_proj",)),
                # In a list of several a name is not a pattern.
                *((".*q_proj", "v_proj"), ("all-linear", "v_proj")),
            ],
        ),
        (HEAD, [("lm_head",)], [("model.lm_head",)]),
        (EMBED, [("embed_tokens",), (EMBED,)], []),
        # A string is a pattern for the whole path.
        (
            PATH,
            [r".*q_proj", r".*_proj", r".*\.layers\.[1-3]\..*", r"model\.layers\.3.*"],
            ["q_proj", r".*\.layers\.[12]\..*", r"model\.layers\.3"],
        ),
        (HEAD, [r".*(lm_head|q_proj)", "lm_head"], []),
        (EMBED, [r".*embed.*"], []),
        # Everything but embedding and head.
        *((path, ["all-linear", "ALL-linear"], []) for path in (PATH, "a.mlp.router")),
        *((path, [], ["all-linear"]) for path in (EMBED, HEAD)),
    ],
)
def test_target_modules(path, targets, others):
    assert all(selects(LoraConfig(target_modules=t), path) for t in targets)
    assert not any(selects(LoraConfig(target_modules=t), path) for t in others)


@pytest.mark.parametrize("targets", [("q_proj",), (PATH,), "all-linear", ".*q_proj"])
@pytest.mark.parametrize(
    "field, away, kept",
    [
        (
            "exclude_modules",
            [
                *(("q_proj",), ("self_attn.q_proj",), (PATH,)),
                *(("v_proj", "layers.3.self_attn.q_proj"), ".*q_proj", r".*\.3\..*"),
            ],
            # The name of a container excludes nothing; a string is a pattern.
            [("self_attn",), ("layers.3",), ("proj",), "q_proj", r".*\.[02]\..*"],
        ),
        (
            "modules_to_save",
            # With all it contains; whole parts of a path; a name is a pattern here.
            [
                *(("q_proj",), ("self_attn",), ("layers.3",), ("3",), ("layers",)),
                *(("model",), ("self_attn.q_proj",), ("[kq]_proj",), (r"layers\.\d",)),
            ],
            [("proj",), ("layers.2",), ("attn",), ("v_proj",), ("norm",)],
        ),
    ],
)
def test_excluded_and_saved_modules_are_not_adapted(field, away, kept, targets):
    for value in away:
        assert not selects(LoraConfig(target_modules=targets, **{field: value}))
    for value in kept:
        assert selects(LoraConfig(target_modules=targets, **{field: value}))


EXPERT = "model.layers.1.experts.3.q_proj"


@pytest.mark.parametrize(
    "layers, pattern, path, selected",
    [
        (3, None, PATH, True),
        (2, None, PATH, False),
        (0, None, "model.layers.0.self_attn.q_proj", True),  # 0 is a layer
        (0, None, PATH, False),
        ((1, 3), None, PATH, True),
        ((1, 2), None, PATH, False),
        ((3, 99), None, PATH, True),  # layers that the model lacks are no error
        ((13,), None, PATH, False),
        ((3,), None, "model.layers.13.self_attn.q_proj", False),
        ((3,), ("layers",), PATH, True),
        ((3,), "layers", PATH, True),
        ((3,), ("h", "layers"), PATH, True),
        ((3,), ("h", "blocks"), PATH, False),
        ((3,), ("ayers",), PATH, False),  # from a dot on
        ((3,), ("model.layers",), PATH, True),
        ((3,), ("(h|layers)",), PATH, True),
        # The first pattern that matches counts.
        ((1,), None, EXPERT, True),
        ((3,), None, EXPERT, False),
        ((3,), ("experts", "layers"), EXPERT, True),
        # What is outside the layers is selected by its whole name only.
        ((0,), None, HEAD, True),
        ((0,), None, EMBED, False),
        ((0,), None, "model.q_proj", False),
    ],
)
def test_layers_to_transform(layers, pattern, path, selected):
    names = ("q_proj", "lm_head", "embed_tokens")
    fields = dict(layers_to_transform=layers, layers_pattern=pattern)
    assert selects(config(*names, **fields), path) is selected


def test_an_empty_list_of_layers_means_all_and_whole_names_ignore_layers():
    assert selects(config(layers_to_transform=()))
    assert selects(config(PATH, layers_to_transform=(0,)))
    assert selects(config(EMBED, layers_to_transform=(0,)), EMBED)


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
    with pytest.raises(UserError, match=f"`{[*fields][-1]}`: .* takes too long to mat"):
        selects(LoraConfig(**fields))


# --- A whole model ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_modules_are_the_projections_and_an_untied_head(tied, packed):
    linears = linear_modules(base(tied=tied, packed=packed))
    stack = ("model", "layers")
    assert linears[(*stack, "mlp", "down_proj")] == (D, F, L)
    assert linears[(*stack, "self_attn", "k_proj")] == (K, D, L)
    assert (("lm_head",) in linears) is not tied
    assert len(linears) == 7 + (not tied)
    if not tied:
        assert linears[("lm_head",)] == (V, D, None)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_and_dense_models_select_alike(packed):
    lora = config(*PROJECTIONS, "lm_head", "embed_tokens", bias="all")
    dense = select(base(biases=True), lora)
    assert select(base(biases=True, packed=packed), lora) == dense


ALL = "all-linear"
QV = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    "targets, fields, names",
    [
        (ALL, {}, set(LINEARS)),
        (PROJECTIONS, {}, set(LINEARS)),
        (("q_proj",), {}, named(".*q_proj")),
        (("mlp.up_proj",), {}, named(".*up_proj")),
        (("layers.1.mlp.up_proj", "k_proj"), {}, named(".*1.mlp.up_proj", ".*k_proj")),
        (r".*\.(0|2)\..*(q|down)_proj", {}, named(r".*\.[02]\..*(q|down)_proj")),
        (QV, dict(layers_to_transform=(0, 2)), named(r".*\.[02]\..*(q|v)_proj")),
        (("q_proj",), dict(layers_to_transform=1), named(r".*1\..*q_proj")),
        (
            # Whole names pass by the filter of layers.
            ("q_proj", "lm_head", "model.layers.1.mlp.up_proj"),
            dict(layers_to_transform=(0,)),
            named(r".*0\..*q_proj", r".*1\.mlp\.up_proj") | {HEAD},
        ),
        (
            ALL,
            dict(exclude_modules=("k_proj", "o_proj")),
            named(".*(q|v|gate|up|down)_proj"),
        ),
        (
            ALL,
            dict(exclude_modules=r".*\.1\..*|.*mlp.*"),
            named(r".*\.[02]\.self_attn.*"),
        ),
        (
            ALL,
            dict(modules_to_save=("layers.1.mlp",)),
            set(LINEARS) - named(r".*1\.mlp.*"),
        ),
        # Saved as "proj" they are trained in full, though no part has that name.
        (("q_proj", "lm_head"), dict(modules_to_save=("proj",)), {HEAD}),
        (("lm_head", "embed_tokens"), {}, {HEAD, EMBED}),
        (r"lm_head|.*1\..*q_proj", {}, {HEAD} | named(".*1.*q_proj")),
    ],
)
def test_layers_and_modules_that_are_adapted(targets, fields, names):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **fields)
    assert adapted(lora) == dict.fromkeys(names, (4, 2.0))


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


def test_an_embedding_is_known_by_its_name():
    assert is_embedding(("model", "embed_tokens")) and not is_embedding(("lm_head",))


def test_custom_modules_are_selected_by_their_name():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    tree = base()
    tree["model"]["layers"]["mixer"] = {"my_linear": {"weight": shape(L, 5, D)}}
    tree["extra"] = {"word_embeddings": {"weight": shape(9, 7)}}
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
    "targets, fields, message",
    [
        (
            "q_projj",
            {},
            r"=\('q_projj',\) matches no linear module and no embedding of this model. "
            r"Did you mean .*q_proj.* Modules here: down_proj, embed_tokens, gate_proj",
        ),
        (("wq", "wk"), {}, r"=\('wq', 'wk'\) matches no .* Modules he"),
        ("norm", {}, "matches no linear module"),
        (r".*nothing", {}, r"='\.\*nothing' matches no linear module"),
        (
            "q_proj",
            dict(layers_to_transform=(7,)),
            r"this model under `layers_to_transform`=\(7,\)\. Layers here: 0 to 2\.",
        ),
        (
            "q_proj",
            dict(layers_to_transform=0, layers_pattern=("h",)),
            r"under `layers_to_transform`=0, `layers_pattern`=\('h',\)\. Did you mean",
        ),
        ("embed_tokens", dict(layers_to_transform=0), "matches no linear module"),
        (
            "q_proj",
            dict(exclude_modules=("q_proj",)),
            r"under `exclude_modules`=\('q_proj',\)",
        ),
        (
            "q_proj",
            dict(modules_to_save=("self_attn",)),
            r"under `modules_to_save`=\('self_attn',\)",
        ),
    ],
)
def test_targets_that_select_nothing_are_refused_with_what_is_there(
    targets, fields, message
):
    targets = (targets,) if isinstance(targets, str) else targets
    with pytest.raises(UserError, match=message):
        select(base(), config(*targets, **fields))


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


# --- Modules trained in full ---

NORMS = {
    *(f"model.layers.{i}.input_layernorm.weight" for i in range(L)),
    *(f"model.layers.{i}.post_attention_layernorm.weight" for i in range(L)),
}


def with_bias(pattern):
    return {f"{n}.{part}" for n in named(pattern) for part in ("weight", "bias")}


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
        # A module with all it contains.
        (("layers.1.mlp",), with_bias(r".*1\.mlp.*")),
        (("v_proj",), with_bias(".*v_proj")),
        (
            ("layers.0.self_attn.v_proj", "layers.2.mlp.up_proj"),
            with_bias(r".*0\..*v_proj|.*2\..*up_proj"),
        ),
    ],
)
def test_modules_to_save(names, want):
    assert full_tensors(config(modules_to_save=names), biases=True) == want


def test_a_module_may_be_trained_in_full_in_some_layers_and_adapted_in_others():
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
            "lm_hed",
            "names 'lm_hed', which this model does not have. Did you mean `lm_h",
        ),
        (("norm", "score"), "names 'score', which this model does not have"),
        ("layers.9.mlp", "names 'layers.9.mlp', which .* Modules here: down_proj,"),
        (("a", "b"), "names 'a', 'b', which"),
        (("mlp", "up_proj"), r"selects `model\.layers\.0\.mlp\.up_proj`, and `.*mlp`"),
    ],
)
def test_modules_to_save_that_are_absent_or_nested_are_refused(names, message):
    names = (names,) if isinstance(names, str) else names
    with pytest.raises(UserError, match=message):
        select(base(), config(modules_to_save=names))


# --- Biases ---


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("biases", [False, True])
def test_biases(biases, bias, layers):
    lora = config("q_proj", "down_proj", bias=bias, layers_to_transform=layers)
    got = full_tensors(lora, biases=biases)
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


KINDS = {"AdaptedModule": "adapted", "FullTensor": "full", "TokenRows": "rows"}
TIED = {"embed_tokens": None, "lm_head": "embed_tokens"}


def tables(lora, tied=True):
    """How embedding and head are trained: (kind, name) -> what it is tied to."""
    selection = select(base(tied=tied), lora)
    out = {}
    for part in (*selection.adapted, *selection.full_tensors, *selection.rows):
        name, other = (
            next((p for p in reversed(path or ()) if p != "weight"), None)
            for path in (part.path, part.tied_to)
        )
        if name in TIED:
            out[KINDS[type(part).__name__], name] = other
    return out


def both(kind):
    return {(kind, name): other for name, other in TIED.items()}


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), (EMBED, HEAD)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensure", [False, True])
def test_tied_tables_are_trained_apart_unless_tying_is_ensured(ensure, tied, names):
    fields = dict(ensure_weight_tying=ensure)
    for kind, lora in (
        ("adapted", config(*names, "q_proj", **fields)),
        ("full", config(modules_to_save=names, **fields)),
    ):
        apart = {(kind, name.rpartition(".")[2]): None for name in names}
        assert tables(lora, tied) == (both(kind) if ensure and tied else apart)


@pytest.mark.parametrize(
    "fields, expected",
    [
        # An expression that matches the bare word; the last part of a name.
        (dict(target_modules="lm_head|.*q_proj"), both("adapted")),
        (dict(target_modules=r".*(embed_tokens|q_proj)"), both("adapted")),
        (
            dict(target_modules=r"model\.embed_tokens|.*q_proj"),
            {("adapted", "embed_tokens"): None},
        ),
        (dict(target_modules=("embed_tokens", "q_proj")), both("adapted")),
        (dict(target_modules=(EMBED, "q_proj")), both("adapted")),
        (dict(target_modules=("some.lm_head", "q_proj")), both("adapted")),
        (dict(target_modules="all-linear"), {}),
        (dict(modules_to_save=("head",)), {("full", "lm_head"): None}),
        (dict(modules_to_save=("norm",)), {}),
        # A table trained in full has no update.
        (
            dict(target_modules=("embed_tokens", HEAD, "o_proj"), modules_to_save=HEAD),
            both("full"),
        ),
    ],
)
def test_tying_goes_by_the_names_in_the_configuration(fields, expected):
    saved = fields.pop("modules_to_save", None)
    saved = (saved,) if isinstance(saved, str) else saved
    fields = {"target_modules": ("q_proj",), **fields, "modules_to_save": saved}
    assert tables(LoraConfig(**fields, ensure_weight_tying=True)) == expected


def test_tying_ignores_layers_and_an_exclusion_of_the_head():
    lora = config(
        *("embed_tokens", "q_proj"),
        ensure_weight_tying=True,
        layers_to_transform=(0,),
        exclude_modules=("lm_head",),
    )
    assert tables(lora) == both("adapted")
    assert set(adapted(lora, tied=True)) == {EMBED, HEAD, *named(r".*0\..*q_proj")}
    lora = config(
        "lm_head", ensure_weight_tying=True, exclude_modules=("embed_tokens",)
    )
    with pytest.raises(UserError, match="`exclude_modules` excludes embed_tokens"):
        select(base(tied=True), lora)


@pytest.mark.parametrize(
    "fields, embed, head",
    [
        # The embedding's rank for both, each with the scaling of its name.
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
def test_a_tied_head_has_the_rank_of_the_embedding_and_its_own_scaling(
    fields, embed, head
):
    lora = config("lm_head", r=4, lora_alpha=6, ensure_weight_tying=True, **fields)
    assert adapted(lora, tied=True) == {EMBED: embed, HEAD: head}


def test_a_tied_head_has_no_arrays_but_its_magnitude():
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


# --- Token rows ---


def rows(lora, tied):
    return {
        r.path[-1]: (r.indices, r.tied_to and r.tied_to[-1])
        for r in select(base(tied=tied), lora).rows
    }


def apart(embed, head):
    return {"embed_tokens": (embed, None), "lm_head": (head, None)}


@pytest.mark.parametrize(
    "indices, tied, want",
    [
        ((5, 2), False, {"embed_tokens": ((5, 2), None)}),
        *(
            (i, True, {"embed_tokens": ((5, 2), None), HEAD: ((5, 2), "embed_tokens")})
            for i in ((5, 2), {EMBED: (5, 2)}, {"embed_tokens": (5, 2), HEAD: (5, 2)})
        ),
        ({"embed_tokens": (5, 2), HEAD: (5, 2)}, False, apart((5, 2), (5, 2))),
        # Different rows, or the same in another order, are not shared.
        ({"embed_tokens": (5, 2), HEAD: (3,)}, True, apart((5, 2), (3,))),
        ({"embed_tokens": (5, 2), HEAD: (2, 5)}, True, apart((5, 2), (2, 5))),
        # Those of the head alone train nothing of the embedding.
        *(({HEAD: (3,)}, tied, {HEAD: ((3,), None)}) for tied in (True, False)),
    ],
)
@pytest.mark.parametrize("ensure", [False, True])
def test_token_rows(indices, tied, want, ensure):
    lora = config(trainable_token_indices=indices, ensure_weight_tying=ensure)
    if tied and ensure and len({v for v, _ in want.values()}) > 1:
        with pytest.raises(UserError, match="embed_tokens and lm_head different rows"):
            rows(lora, tied)
        return
    assert rows(lora, tied) == want
    shapes = select(base(tied=tied), lora).shapes()
    deltas = {p[-2]: s for p, s in shapes.items() if p[-1] == "trainable_tokens_delta"}
    assert deltas == {n: (len(v), D) for n, (v, other) in want.items() if not other}


SAVED = "which `modules_to_save` trains in full; give only one of the two"


@pytest.mark.parametrize(
    "indices, fields, tied, message",
    [
        ((3, V), {}, False, rf"{V}, and 'embed_tokens' has {V} rows \(0 to {V - 1}\)"),
        (
            {"lm_hed": (3,)},
            {},
            False,
            "names 'lm_hed', which is not an embedding or head of this model. Did you",
        ),
        ({"up_proj": (3,)}, {}, False, "which is not an embedding or head"),
        ((3,), dict(modules_to_save=("embed_tokens",)), False, f"_tokens', {SAVED}"),
        (
            (3,),
            dict(modules_to_save=(HEAD,), ensure_weight_tying=True),
            True,
            f"'embed_tokens', {SAVED}",
        ),
        ((3,), dict(modules_to_save=(HEAD,)), True, f"'lm_head', {SAVED}"),
        (
            (3,),
            dict(target_modules=("embed_tokens",)),
            False,
            "'embed_tokens', which `target_modules` adapts; give only one of the two",
        ),
        (
            {HEAD: (3,)},
            dict(target_modules=(HEAD,)),
            True,
            "'lm_head', which `target_modules` adapts",
        ),
        (
            (3,),
            dict(target_modules=(HEAD,), use_dora=True),
            True,
            "'lm_head', which is tied to the embedding and adapted with `use_dora`",
        ),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(indices, fields, tied, message):
    fields = {"target_modules": ("q_proj",), **fields}
    with pytest.raises(UserError, match=message):
        select(base(tied=tied), LoraConfig(trainable_token_indices=indices, **fields))


def test_rows_go_with_other_parts_of_the_tables():
    lora = config("lm_head", trainable_token_indices=(3,))
    assert tables(lora, tied=False) == {
        ("adapted", "lm_head"): None,
        ("rows", "embed_tokens"): None,
    }
    assert tables(lora, tied=True) == {
        ("adapted", "lm_head"): None,
        ("rows", "embed_tokens"): None,
        ("rows", "lm_head"): "embed_tokens",
    }
    lora = config(trainable_token_indices=(3,), modules_to_save=("lm_head",))
    assert tables(lora, tied=False) == {
        ("full", "lm_head"): None,
        ("rows", "embed_tokens"): None,
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
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
    )
    lora = LoraConfig(r=rank, target_modules="all-linear")
    selection = select(abstract_base(config), lora)
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
