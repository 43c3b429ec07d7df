"""Which modules a LoraConfig selects: the rules of PEFT, one by one."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import linear_modules, matching, select
from qlora_jax.lora.unused import unused_settings
from qlora_jax.tree import PROJECTIONS, dotted
from tests.lora.reference import D, F, K, L, V, by_layer, config
from tests.lora.reference import abstract as base

ATTENTION, MLP = PROJECTIONS[:4], PROJECTIONS[4:]
EMBED, HEAD = "model.embed_tokens", "lm_head"
LINEARS = [
    f"model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
    for i in range(L)
    for name in PROJECTIONS
]


def adapted(lora, **kinds):
    """Dotted names of the adapted modules -> (rank, scaling)."""
    return {name: tuple(x) for _, name, _, *x in by_layer(base(**kinds), lora)}


def full_tensors(lora, **kinds):
    """Dotted names of the tensors trained in full."""
    found = set()
    for part in select(base(**kinds), lora).full_tensors:
        names = dotted(part.path, part.layers)
        found |= {n for n, chosen in zip(names, part.trained, strict=True) if chosen}
    return found


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
    for value in (*away, *kept):
        lora = LoraConfig(target_modules=targets, **{field: value})
        assert selects(lora) is (value in kept)


EXPERT = "model.layers.1.experts.3.q_proj"


@pytest.mark.parametrize(
    "layers, pattern, path, selected",
    [
        *((3, None, PATH, True), (2, None, PATH, False), (0, None, PATH, False)),
        (0, None, "model.layers.0.self_attn.q_proj", True),  # 0 is a layer
        *(((1, 3), None, PATH, True), ((1, 2), None, PATH, False)),
        ((), None, PATH, True),  # an empty list means all
        ((3, 99), None, PATH, True),  # layers that the model lacks are no error
        ((13,), None, PATH, False),
        ((3,), None, "model.layers.13.self_attn.q_proj", False),
        *(((3,), ("layers",), PATH, True), ((3,), "layers", PATH, True)),
        *(((3,), ("h", "layers"), PATH, True), ((3,), ("h", "blocks"), PATH, False)),
        ((3,), ("ayers",), PATH, False),  # from a dot on
        *(((3,), (name,), PATH, True) for name in ("model.layers", "(h|layers)")),
        # The first pattern that matches counts.
        *(((1,), None, EXPERT, True), ((3,), None, EXPERT, False)),
        ((3,), ("experts", "layers"), EXPERT, True),
        # What is outside the layers is selected by its whole name only.
        *(((0,), None, HEAD, True), ((0,), None, EMBED, False)),
        ((0,), None, "model.q_proj", False),
    ],
)
def test_layers_to_transform(layers, pattern, path, selected):
    names = ("q_proj", "lm_head", "embed_tokens")
    fields = dict(layers_to_transform=layers, layers_pattern=pattern)
    assert selects(config(*names, **fields), path) is selected


@pytest.mark.parametrize(
    "fields",
    [
        *(dict(target_modules=HOSTILE), dict(exclude_modules=HOSTILE)),
        dict(modules_to_save=(HOSTILE,)),
        dict(layers_to_transform=1, layers_pattern=HOSTILE),
        *(dict(rank_pattern={HOSTILE: 2}), dict(alpha_pattern={HOSTILE: 2})),
    ],
)
def test_a_pattern_that_takes_too_long_is_refused(fields, monkeypatch):
    monkeypatch.setattr("qlora_jax.lora.patterns.SECONDS", 0.05)
    lora, (*_, field) = LoraConfig(**fields), fields
    match = f"lora: `{field}`: .* takes too long to match"
    with pytest.raises(UserError, match=match):
        selects(lora)
        lora.ranks_and_scalings([PATH])


# --- A whole model ---


@pytest.mark.parametrize("tied", [False, True])
def test_linear_modules_are_the_projections_and_an_untied_head(tied):
    linears = linear_modules(base(tied=tied))
    stack = ("model", "layers")
    assert linears[(*stack, "mlp", "down_proj")] == (D, F, L)
    assert linears[(*stack, "self_attn", "k_proj")] == (K, D, L)
    assert len(linears) == 7 + (not tied)
    assert linears.get(("lm_head",)) == (None if tied else (V, D, None))
    packed = base(tied=tied, packed=True)
    assert linear_modules(packed) == linears
    lora = config(*PROJECTIONS, "lm_head", "embed_tokens")
    assert select(packed, lora) == select(base(tied=tied), lora)


ALL = "all-linear"


@pytest.mark.parametrize(
    "targets, fields, names",
    [
        (ALL, {}, set(LINEARS)),
        (".*", {}, {*LINEARS, EMBED, HEAD}),  # and no norms
        (("layers.1.mlp.up_proj", "k_proj"), {}, named(".*1.mlp.up_proj", ".*k_proj")),
        (r".*\.(0|2)\..*(q|down)_proj", {}, named(r".*\.[02]\..*(q|down)_proj")),
        (("q_proj",), dict(layers_to_transform=1), named(r".*1\..*q_proj")),
        (
            # Whole names pass by the filter of layers.
            ("q_proj", "lm_head", "model.layers.1.mlp.up_proj"),
            dict(layers_to_transform=(0,)),
            named(r".*0\..*q_proj", r".*1\.mlp\.up_proj") | {HEAD},
        ),
        (ALL, dict(exclude_modules=r".*\.1\..*|.*mlp.*"), named(r".*\.[02]\.self.*")),
        (ALL, dict(modules_to_save=("layers.1.mlp",)), named(r".*([02]\.|self).*")),
        # Saved as "proj" they are trained in full, though no part has that name.
        (("q_proj", "lm_head"), dict(modules_to_save=("proj",)), {HEAD}),
        (("lm_head", "embed_tokens"), {}, {HEAD, EMBED}),
        (r"lm_head|.*1\..*q_proj", {}, {HEAD} | named(".*1.*q_proj")),
    ],
)
def test_layers_and_modules_that_are_adapted(targets, fields, names):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **fields)
    assert adapted(lora) == dict.fromkeys(names, (4, 2.0))


def test_ranks_and_scalings_of_single_layers():
    lora = config(
        *("q_proj", "up_proj", "lm_head"),
        **dict(r=8, lora_alpha=16),
        rank_pattern={
            **{r"layers\.[12]\.mlp\.(up|gate)_proj": 2, "up_proj": 32},
            "layers.1.self_attn.q_proj": 4,
        },
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, "lm_head": 1},
    )
    layers = [(8, 3 / 8), (4, 4.0), (8, 2.0)], [(32, 0.5), (2, 8.0), (2, 8.0)]
    assert adapted(lora) == {
        **{f"model.layers.{i}.self_attn.q_proj": x for i, x in enumerate(layers[0])},
        **{f"model.layers.{i}.mlp.up_proj": x for i, x in enumerate(layers[1])},
        "lm_head": (8, 1 / 8),
    }
    up = next(a for a in select(base(), lora).adapted if a.path[-1] == "up_proj")
    assert up.rank == 32 and up.ranks == (32, 2, 2)
    assert up.parts == {"lora_A": (32, D), "lora_B": (F, 32)}
    assert up.parts_of(2) == {"lora_A": (2, D), "lora_B": (F, 2)}


TABLE, DOWN = ("model", "embed_tokens"), ("model", "layers", "mlp", "down_proj")
TABLE_ARRAYS = {
    (*TABLE, "lora_embedding_A"): (4, V),
    (*TABLE, "lora_embedding_B"): (D, 4),
}
LINEAR_ARRAYS = {
    **{(*DOWN, "lora_A"): (L, 4, F), (*DOWN, "lora_B"): (L, D, 4)},
    **{("lm_head", "lora_A"): (4, D), ("lm_head", "lora_B"): (V, 4)},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "field, more",
    [
        (None, TABLE_ARRAYS),
        # Magnitudes of rows, of an embedding of columns.
        ("use_dora", {**TABLE_ARRAYS, (*TABLE, "lora_magnitude_vector"): (D,)}),
        ("lora_bias", {}),  # which an embedding cannot have
    ],
)
def test_the_arrays_of_every_kind_of_module(tied, field, more):
    targets = ["down_proj", "lm_head", *(["embed_tokens"] if more else [])]
    lora = config(*targets, r=4, **({field: True} if field else {}))
    want = {**LINEAR_ARRAYS, **more}
    if field:
        name = "lora_bias" if field == "lora_bias" else "lora_magnitude_vector"
        want |= {(*DOWN, name): (L, D), ("lm_head", name): (V,)}
    assert select(base(tied=tied), lora).shapes() == want


def test_an_embedding_takes_no_lora_bias():
    """As in PEFT: "lora_bias=True is not supported for Embedding."."""
    for targets, tying in (
        *((("q_proj", "embed_tokens"), False), ((r".*embed_tokens",), False)),
        (("lm_head",), True),
    ):
        lora = config(*targets, lora_bias=True, ensure_weight_tying=tying)
        with pytest.raises(UserError, match="`lora_bias` .* embedding .embed_tokens."):
            select(base(tied=True), lora)


def test_custom_modules_are_selected_by_their_name():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    tree = base()
    tree["model"]["layers"]["mixer"] = {"my_linear": {"weight": shape(L, 5, D)}}
    tree["extra"] = {"word_embeddings": {"weight": shape(9, 7)}}
    mine, words = (
        ("model", "layers", "mixer", "my_linear"),
        ("extra", "word_embeddings"),
    )
    assert select(tree, config("my_linear", "word_embeddings", r=2)).shapes() == {
        **{(*mine, "lora_A"): (L, 2, D), (*mine, "lora_B"): (L, 5, 2)},
        (*words, "lora_embedding_A"): (2, 9),
        (*words, "lora_embedding_B"): (7, 2),
    }
    everything = select(tree, LoraConfig(target_modules="all-linear"))
    assert {a.path[-1] for a in everything.adapted} == {*PROJECTIONS, "my_linear"}


# --- What is refused ---

NOWHERE = "matches no linear module and no embedding of this model. Did you mean .*"
HERE = " Modules here: down_proj, embed_tokens, gate_proj"


def saved(*names):
    return config(modules_to_save=names)


@pytest.mark.parametrize(
    "lora, message",
    [
        (config("q_projj"), rf"=\('q_projj',\) {NOWHERE}q_proj.*{HERE}"),
        (config("wq", "wk"), r"=\('wq', 'wk'\) matches no .* Modules he"),
        (config("norm"), "matches no linear module"),
        (
            LoraConfig(target_modules="q_proj"),
            r'a regular expression .* in a list: \["q_proj"\]\.',
        ),
        (config(r".*nothing"), r"='\.\*nothing' matches no linear module"),
        (
            config(layers_to_transform=(7,)),
            r"this model under `layers_to_transform`=\(7,\)\. Layers here: 0 to 2\.",
        ),
        (
            config(layers_to_transform=0, layers_pattern=("h",)),
            r"under `layers_to_transform`=0, `layers_pattern`=\('h',\)\. Did you mean",
        ),
        (config("embed_tokens", layers_to_transform=0), "matches no linear module"),
        (config(exclude_modules=("q_proj",)), r"under `exclude_modules`=\('q_proj',\)"),
        (saved("self_attn"), r"under `modules_to_save`=\('self_attn',\)"),
        # Modules to save that are absent or nested.
        (
            saved("lm_hed"),
            "names 'lm_hed', which this model does not have. Did you mean `lm_h",
        ),
        (saved("norm", "score"), "names 'score', which this model does not have"),
        (
            saved("layers.9.mlp"),
            "names 'layers.9.mlp', which .* Modules here: down_proj,",
        ),
        (saved("a", "b"), "names 'a', 'b', which"),
        (
            saved("mlp", "up_proj"),
            r"selects `model\.layers\.0\.mlp\.up_proj`, and `.*mlp`",
        ),
    ],
)
def test_names_that_select_nothing_are_refused_with_what_is_there(lora, message):
    with pytest.raises(UserError, match=message):
        select(base(), lora)


@pytest.mark.parametrize("tied", [False, True])
def test_targets_that_select_nothing_beside_others_are_listed(tied):
    lora = config("q_proj", "c_attn", "lm_head", "layers.7.mlp.up_proj", "norm")
    unmatched = select(base(tied=tied), lora).unmatched
    assert unmatched == ("c_attn", "layers.7.mlp.up_proj", "norm")
    # What a filter takes away was matched.
    lora = config("q_proj", "k_proj", exclude_modules=("k_proj",))
    assert select(base(tied=tied), lora).unmatched == ()
    assert select(base(tied=tied), config(r"nothing|.*q_proj")).unmatched == ()


def fused():
    """A base whose q, k and v are rows of one weight, and gate and up of another."""
    tree = base()
    layer = tree["model"]["layers"]
    for part, name, others in (
        ("self_attn", "qkv_proj", "qkv"),
        ("mlp", "gate_up_proj", ("gate", "up")),
    ):
        layer[part] = dict(layer[part])
        weights = [layer[part].pop(f"{other}_proj") for other in others]
        layer[part][name] = weights[0]
    return tree


@pytest.mark.parametrize(
    ("tree", "names", "hint"),
    [
        (fused, ("q_proj", "v_proj"), "Here q_proj, k_proj, v_proj are rows of `qkv_p"),
        (fused, ("layers.0.mlp.up_proj",), "Here gate_proj, up_proj are rows of `gate"),
        (base, ("qkv_proj",), "Here it is `q_proj`, `k_proj`, `v_proj`"),
    ],
)
def test_targets_that_are_parts_of_another_weight_are_told_it(tree, names, hint):
    with pytest.raises(UserError, match=f"matches no linear module.*{hint}"):
        select(tree(), config(*names))
    lora = config(*names, "down_proj")  # PEFT passes over them here
    selection = select(tree(), lora)
    notes = unused_settings(lora, selection, tree())
    assert len(notes) == len(names)
    assert all(hint in note for note in notes)


# --- Modules trained in full ---

NORMS = {
    f"model.layers.{i}.{name}_layernorm.weight"
    for i in range(L)
    for name in ("input", "post_attention")
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


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_module_is_trained_in_full_in_some_layers_and_adapted_in_others(bias):
    lora = config("up_proj", r=4, modules_to_save=("layers.1.mlp",), bias=bias)
    (up,) = select(base(biases=True), lora).adapted
    assert up.ranks == (4, 0, 4) and up.scalings == (4.0, 0.0, 4.0)
    biases = LINEARS if bias == "all" else named(".*up_proj")
    want = with_bias(r".*1\.mlp.*") | {f"{name}.bias" for name in biases}
    assert full_tensors(lora, biases=True) == want


# --- Biases ---


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("biases", [False, True])
def test_biases(biases, bias, layers):
    lora = config("q_proj", "down_proj", bias=bias, layers_to_transform=layers)
    one = r"1" if layers else r"\d"
    # Those of the layers that are adapted, or of all layers.
    names = {"lora_only": named(rf".*\.{one}\..*(q|down)_proj"), "all": LINEARS}
    want = {f"{name}.bias" for name in names.get(bias, ()) if biases}
    assert full_tensors(lora, biases=biases) == want
    for part in select(base(biases=biases), lora).full_tensors:
        assert part.tied_to is None


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
    "targets, saved, expected",
    [
        # An expression that matches the bare word; the last part of a name.
        (("lm_head|.*q_proj",), None, both("adapted")),
        ((r".*(embed_tokens|q_proj)",), None, both("adapted")),
        ((r"model\.embed_tokens|.*q_proj",), None, {("adapted", "embed_tokens"): None}),
        ((EMBED, "q_proj"), None, both("adapted")),
        (("some.lm_head", "q_proj"), None, both("adapted")),
        ((ALL,), None, {}),
        ((), ("head",), {("full", "lm_head"): None}),
        ((), ("norm",), {}),
        # A table trained in full has no update.
        (("embed_tokens", HEAD, "o_proj"), (HEAD,), both("full")),
    ],
)
def test_tying_goes_by_the_names_in_the_configuration(targets, saved, expected):
    lora = config(*targets, modules_to_save=saved, ensure_weight_tying=True)
    assert tables(lora) == expected


def test_tying_ignores_layers_and_an_exclusion_of_the_head():
    tying = dict(ensure_weight_tying=True)
    fields = dict(layers_to_transform=(0,), exclude_modules=("lm_head",))
    lora = config("embed_tokens", "q_proj", **tying, **fields)
    assert tables(lora) == both("adapted")
    assert set(adapted(lora, tied=True)) == {EMBED, HEAD, *named(r".*0\..*q_proj")}
    lora = config("lm_head", **tying, exclude_modules=("embed_tokens",))
    with pytest.raises(UserError, match="`exclude_modules` excludes embed_tokens"):
        select(base(tied=True), lora)


@pytest.mark.parametrize(
    "ranks, alphas, embed, head",
    [
        # The embedding's rank for both, each with the scaling of its name.
        ({"embed_tokens": 2}, {}, (2, 3.0), (2, 1.5)),
        ({HEAD: 2}, {}, (4, 1.5), (4, 3.0)),
        (
            {"embed_tokens": 2, HEAD: 3},
            {HEAD: 10, "embed_tokens": 7},
            *((2, 3.5), (2, 10 / 3)),
        ),
    ],
)
def test_a_tied_head_has_the_rank_of_the_embedding_and_its_own_scaling(
    ranks, alphas, embed, head
):
    fields = dict(rank_pattern=ranks, alpha_pattern=alphas, ensure_weight_tying=True)
    lora = config(HEAD, r=4, lora_alpha=6, **fields)
    assert adapted(lora, tied=True) == {EMBED: embed, HEAD: head}


def test_a_tied_head_has_no_arrays_but_its_magnitude():
    selection = select(base(tied=True), config(HEAD, r=4, ensure_weight_tying=True))
    assert selection.shapes() == TABLE_ARRAYS
    assert selection.groups() == {"embed_tokens": 4 * (V + D), "lm_head": 0}
    dora = config(HEAD, r=4, ensure_weight_tying=True, use_dora=True)
    assert select(base(tied=True), dora).shapes() == {
        **TABLE_ARRAYS,
        (*TABLE, "lora_magnitude_vector"): (D,),
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
ADAPTS = "which `target_modules` adapts"
SAVES_HEAD = dict(modules_to_save=(HEAD,))


@pytest.mark.parametrize(
    "indices, targets, fields, tied, message",
    [
        ((3, V), (), {}, 0, rf"{V}, and 'embed_tokens' has {V} rows \(0 to {V - 1}\)"),
        (
            *({"lm_hed": (3,)}, (), {}, False),
            "names 'lm_hed', which is not an embedding or head of this model. Did you",
        ),
        ({"up_proj": (3,)}, (), {}, False, "which is not an embedding or head"),
        (
            *((3,), (), dict(modules_to_save=("embed_tokens",)), False),
            f"_tokens', {SAVED}",
        ),
        (
            *((3,), (), dict(**SAVES_HEAD, ensure_weight_tying=True), True),
            f"'embed_tokens', {SAVED}",
        ),
        ((3,), (), SAVES_HEAD, True, f"'lm_head', {SAVED}"),
        (
            *((3,), ("embed_tokens",), {}, False),
            f"'embed_tokens', {ADAPTS}; give only one of the two",
        ),
        ({HEAD: (3,)}, (HEAD,), {}, True, f"'lm_head', {ADAPTS}"),
        (
            *((3,), (HEAD,), dict(use_dora=True), True),
            "'lm_head', which is tied to the embedding and adapted with `use_dora`",
        ),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(
    indices, targets, fields, tied, message
):
    lora = config(*targets, trainable_token_indices=indices, **fields)
    with pytest.raises(UserError, match=message):
        select(base(tied=bool(tied)), lora)


def test_rows_go_with_other_parts_of_the_tables():
    embed, head = ("rows", "embed_tokens"), ("rows", "lm_head")
    lora = config(HEAD, trainable_token_indices=(3,))
    alone = {("adapted", "lm_head"): None, embed: None}
    assert tables(lora, tied=False) == alone
    assert tables(lora, tied=True) == {**alone, head: "embed_tokens"}
    lora = config(trainable_token_indices=(3,), modules_to_save=("lm_head",))
    assert tables(lora, tied=False) == {("full", "lm_head"): None, embed: None}


# --- Counts ---


def test_groups_count_what_is_trained_without_padding():
    lora = config(
        *("q_proj", "down_proj", "embed_tokens"),
        **dict(r=4, bias="lora_only", use_dora=True),
        rank_pattern={"layers.0.self_attn.q_proj": 1, "layers.2.mlp.down_proj": 8},
        modules_to_save=("model.norm", "layers.1.self_attn.k_proj"),
        trainable_token_indices={"lm_head": (3, 4)},
        exclude_modules=("layers.1.mlp.down_proj",),
    )
    assert select(base(biases=True), lora).groups() == {
        # Ranks 1, 4, 4 and 4, 0, 8; magnitude and bias of each adapted layer.
        "q_proj": (1 + 4 + 4) * (D + D) + L * D + L * D,
        "down_proj": (4 + 8) * (D + F) + 2 * D + 2 * D,
        **{"embed_tokens": 4 * (V + D) + D, "k_proj": K * D + K},
        **{"norm": D, "lm_head": 2 * D},
    }


def test_the_sum_of_all_ways_is_that_of_the_arrays():
    # Without padding, what is counted is what the arrays hold.
    for tied, dora, bias in itertools.product([0, 1], [False, True], ["none", "all"]):
        fields = dict(bias=bias, modules_to_save=("norm",), ensure_weight_tying=True)
        lora = config(*PROJECTIONS, "embed_tokens", use_dora=dora, **fields)
        selection = select(base(tied=bool(tied), biases=True), lora)
        held = sum(map(math.prod, selection.shapes().values()))
        assert sum(selection.groups().values()) == held
