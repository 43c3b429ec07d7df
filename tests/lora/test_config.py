"""LoraConfig: what it refuses, and how it goes through PEFT's adapter_config.json."""

import dataclasses
import enum
import json
import math
import pickle
import random

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.tree import PROJECTIONS

NAN, INF = math.nan, math.inf


def make(**fields):
    """Past the type checks of the tests, as a caller without them."""
    config = object.__new__(LoraConfig)
    for f in dataclasses.fields(LoraConfig):
        object.__setattr__(config, f.name, fields.get(f.name, f.default))
    config.__post_init__()
    return config


def peft(**fields):
    return LoraConfig.from_peft({"peft_type": "LORA", **fields})


# --- Scaling ---


@pytest.mark.parametrize(
    "r, alpha, rslora, scaling",
    [
        (16, 16, False, 1.0),
        (8, 16, False, 2.0),
        (16, 8, True, 2.0),
        (3, 1, False, 1 / 3),
        (8, 0.5, False, 1 / 16),
        (2, 3, True, 3 / math.sqrt(2)),
    ],
)
def test_scaling(r, alpha, rslora, scaling):
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora)
    assert config.scaling == pytest.approx(scaling, rel=1e-15)
    assert config.rank_and_scaling("any.module") == (r, config.scaling)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_give_rank_and_alpha_of_a_module_one_by_one(rslora):
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 4},
        alpha_pattern={"up_proj": 6, "v_proj": 0.5},
        use_rslora=rslora,
    )
    for name, r, alpha in (
        ("model.layers.0.self_attn.q_proj", 2, 16),
        ("model.layers.0.mlp.up_proj", 8, 6),
        ("model.layers.1.mlp.up_proj", 4, 6),
        ("model.layers.0.self_attn.v_proj", 8, 0.5),
        ("model.layers.0.self_attn.k_proj", 8, 16),
    ):
        scaling = alpha / (math.sqrt(r) if rslora else r)
        assert config.rank_and_scaling(name) == (r, scaling)


# A key is a regular expression for the end of a path, which begins at a dot or at the
# path's beginning.
PATH = "model.layers.12.self_attn.q_proj"


@pytest.mark.parametrize(
    "key, matched",
    [
        ("q_proj", True),
        (PATH, True),
        ("self_attn.q_proj", True),
        ("layers.12.self_attn.q_proj", True),
        (r"layers\.\d+\.self_attn\.q_proj", True),
        (r".*q_proj", True),
        ("(q|k)_proj", True),
        ("q_proj|k_proj", True),
        ("self.attn.q.proj", True),  # a dot is any character
        (f"^{PATH}", True),
        (r"^model\.layers\.1.*", True),
        (r"layers\.1[0-9]\..*", True),
        ("_proj", False),  # not a whole part
        ("proj", False),
        ("q_pro", False),  # to the end
        ("self_attn", False),
        ("layers.12", False),
        ("q_proj.weight", False),
        ("^q_proj", False),  # ^ is the beginning of the whole path
        ("^self_attn.q_proj", False),
        (r"layers\.2\.self_attn\.q_proj", False),
        (r"2\.self_attn\.q_proj", False),
        ("Q_PROJ", False),
    ],
)
def test_a_pattern_matches_the_end_of_a_path_from_a_dot_on(key, matched):
    config = LoraConfig(rank_pattern={key: 3}, alpha_pattern={key: 5})
    want = (3, 5 / 3) if matched else (16, 1.0)
    assert config.rank_and_scaling(PATH) == want


def test_the_first_pattern_that_matches_holds():
    one = LoraConfig(rank_pattern={"q_proj": 2, "self_attn.q_proj": 4})
    two = LoraConfig(rank_pattern={"self_attn.q_proj": 4, "q_proj": 2})
    assert one.rank_and_scaling(PATH)[0] == 2
    assert two.rank_and_scaling(PATH)[0] == 4
    assert one != two
    assert LoraConfig.from_peft(json.loads(json.dumps(two.to_peft()))).rank_and_scaling(
        PATH
    ) == two.rank_and_scaling(PATH)


def test_a_pattern_for_every_module_of_a_large_model_is_no_work():
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(250) for p in "abc"]
    config = LoraConfig(rank_pattern={name: 1 + i for i, name in enumerate(names)})
    ranks = [rank for rank, _ in config.ranks_and_scalings(names).values()]
    assert ranks == [*range(1, 751)]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_too_long_is_refused(field, monkeypatch):
    monkeypatch.setattr("qlora_jax.lora.patterns.SECONDS", 0.05)
    config = LoraConfig(**{field: {r"(?:(?:.|..)+)+[A-Z]": 2}})
    with pytest.raises(UserError, match=f"lora: `{field}`: .* takes too long to match"):
        config.rank_and_scaling(PATH)


# --- What is refused ---

BIG = 10**400


@pytest.mark.parametrize(
    "field, value, message",
    [
        *(
            ("r", bad, "`r` must be a positive integer, got")
            for bad in (0, -1, True, 1.0, "8", None, 1 << 20, BIG)
        ),
        *(
            ("lora_alpha", bad, "`lora_alpha` must be > 0, got")
            for bad in (0, 0.0, -1, NAN, INF, -INF, True, "16", None, BIG)
        ),
        *(
            ("lora_dropout", bad, r"`lora_dropout` must lie in \[0, 1\), got")
            for bad in (1.0, 1, -0.1, NAN, True, "0.1", None)
        ),
        *(
            (field, bad, f"`{field}` must be true or false, got")
            for field in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
            for bad in (1, 0, "true", None, [])
        ),
        ("target_modules", (), "`target_modules` is empty. Name modules such as 'q_pr"),
        ("target_modules", "", "`target_modules` is empty"),
        ("target_modules", 5, "`target_modules` must be a list of names, got 5"),
        ("target_modules", None, "`target_modules` must be a list of names, got None"),
        ("target_modules", {"q_proj": 1}, "must be a list of names, got {'q_proj'"),
        ("target_modules", ("q_proj", 1), r"list of names, got \('q_proj', 1\)"),
        ("target_modules", ("q_proj", ""), r"list of names, got \('q_proj', ''\)"),
        ("target_modules", "(q_proj", r"expression '\(q_proj' is not valid: missing"),
        ("target_modules", ("(q_proj",), "is not valid: missing"),
        ("exclude_modules", 5, "`exclude_modules` must be a list of names, got 5"),
        ("exclude_modules", ("a", 1), "`exclude_modules` must be a list of names"),
        ("exclude_modules", "*", "is not valid: nothing to repeat"),
        ("modules_to_save", 3, "`modules_to_save` must be a list of names, got 3"),
        ("modules_to_save", (1,), "`modules_to_save` must be a list of names"),
        ("modules_to_save", ("",), "`modules_to_save` must be a list of names"),
        ("modules_to_save", {"norm": 1}, "`modules_to_save` must be a list of names"),
        ("modules_to_save", ("norm", "("), r"expression '\(' is not valid"),
        *(
            (field, bad, f"`{field}` must be a table of patterns, got")
            for field in ("rank_pattern", "alpha_pattern")
            for bad in (None, ["q_proj"], "q_proj", 4)
        ),
        ("rank_pattern", {"q_proj": 0}, r"`rank_pattern\['q_proj'\]` must be a posit"),
        ("rank_pattern", {"q_proj": 2.0}, r"`rank_pattern\['q_proj'\]` must be a pos"),
        ("rank_pattern", {"q_proj": True}, r"\['q_proj'\]` must be a positive integer"),
        (
            "rank_pattern",
            {1: 2},
            r"patterns of `rank_pattern` must be texts, got \[1\]",
        ),
        ("rank_pattern", {"(": 2}, r"`rank_pattern`: the regular expression '\(' is n"),
        # Valid alone, and something else within PEFT's expression.
        ("rank_pattern", {"a)|(b": 2}, "is not valid"),
        ("rank_pattern", {"(?i)q_proj": 2}, "is not valid: global flags not at the st"),
        ("alpha_pattern", {"(?i)q_proj": 2}, "is not valid: global flags"),
        ("alpha_pattern", {"q_proj": -1}, r"`alpha_pattern\['q_proj'\]` must be > 0"),
        ("alpha_pattern", {"q_proj": NAN}, r"`alpha_pattern\['q_proj'\]` must be > 0"),
        *(
            ("layers_to_transform", bad, "`layers_to_transform` must be layer numbers")
            for bad in (-1, True, 1.0, "0", (0, -1), (0, "1"), (True,), {0: 1}, 1 << 31)
        ),
        *(
            ("trainable_token_indices", bad, "must be token ids, or module names with")
            for bad in (3, "5", (1, -1), (1, 2.0), (True,), {"embed_tokens": 3})
        ),
        ("trainable_token_indices", (5, 2, 5), r"of 'embed_tokens' must be distinct"),
        ("trainable_token_indices", {"lm_head": ()}, "of 'lm_head' must be distinct"),
        *(
            ("bias", bad, "`bias` must be 'none', 'lora_only' or 'all', got")
            for bad in ("some", None, True)
        ),
        *(
            ("init_lora_weights", bad, "`init_lora_weights`=.* is not supported. Suppo")
            for bad in (
                "eva",
                "pissa_niter_0",
                "pissa_niter_",
                "",
                False,
                None,
                "Pissa",
            )
        ),
        ("task_type", "SEQ_CLS", "`task_type`='SEQ_CLS' is not supported"),
        *(
            (field, 5, f"`{field}` must be a text, got 5")
            for field in ("base_model_name_or_path", "revision", "base_fingerprint")
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused(field, value, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**{field: value})
    assert len(str(caught.value)) < 500  # whatever a file holds


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(target_modules="all-linear", layers_to_transform=1),
            "`layers_to_transform` goes with a list of `target_modules`",
        ),
        (
            dict(target_modules=r".*q_proj", layers_to_transform=(0, 1)),
            "say the layers in the expression",
        ),
        (
            dict(layers_pattern=("layers",)),
            "`layers_pattern` goes with `layers_to_transform`",
        ),
        (
            dict(layers_pattern="(", layers_to_transform=1),
            r"expression '\(' is not valid",
        ),
        (dict(layers_pattern=(3,), layers_to_transform=1), "`layers_pattern` must be"),
        (dict(lora_bias=True, use_dora=True), "`lora_bias` does not go with `use_dora"),
        *(
            (
                dict(lora_bias=True, init_lora_weights=init),
                "`lora_bias` goes with the default initialization",
            )
            for init in ("gaussian", "orthogonal", "pissa", "loftq")
        ),
        *(
            (
                dict(use_dora=True, init_lora_weights=init),
                f"`init_lora_weights`='{init}' does not go with `use_dora`: the magnit",
            )
            for init in ("pissa", "pissa_niter_4", "olora")
        ),
        (
            dict(init_lora_weights="orthogonal", r=3),
            r"orthogonal initialization needs even ranks, got \[3\]",
        ),
        (
            dict(init_lora_weights="orthogonal", r=4, rank_pattern={"q_proj": 5}),
            r"needs even ranks, got \[4, 5\]",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(r=1, lora_alpha=1e-3, lora_dropout=0),
        dict(r=(1 << 20) - 1, lora_dropout=0.999),
        dict(layers_to_transform=0),
        dict(layers_to_transform=(2, 0), layers_pattern="layers"),
        dict(layers_to_transform=[], target_modules=["q_proj"]),
        dict(use_dora=True, init_lora_weights="orthogonal"),
        dict(use_dora=True, init_lora_weights="loftq"),
        dict(init_lora_weights="pissa_niter_16", use_rslora=True),
        dict(exclude_modules=r".*\.0\..*", target_modules="ALL-Linear"),
        dict(modules_to_save=["model.norm", "lm_head"], bias="all"),
        dict(trainable_token_indices={"embed_tokens": [3, 1], "lm_head": [0]}),
        dict(trainable_token_indices=[7, 3], ensure_weight_tying=True),
        dict(lora_bias=True, bias="lora_only"),
    ],
)
def test_good_values_are_taken_hashed_pickled_and_written(fields):
    config = make(**fields)
    assert hash(config) == hash(make(**fields))
    assert config == make(**fields) == dataclasses.replace(config)
    assert pickle.loads(pickle.dumps(config)) == config
    json.dumps(config.to_peft(), allow_nan=False)


def test_it_is_frozen_and_adapts_all_projections_by_default():
    config = LoraConfig()
    assert config.target_modules == PROJECTIONS
    assert config == make(target_modules=list(PROJECTIONS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3
    with pytest.raises(TypeError, match="a FrozenDict cannot be changed"):
        config.rank_pattern["q_proj"] = 3
    table = {"q_proj": 2}
    config = LoraConfig(rank_pattern=table)
    table["q_proj"] = 4
    assert config.rank_pattern == {"q_proj": 2}


def test_the_words_of_peft_for_the_default():
    class TaskType(str, enum.Enum):  # noqa: UP042 (as PEFT has it)
        CAUSAL_LM = "CAUSAL_LM"

    idiom = LoraConfig(init_lora_weights=True, task_type=TaskType.CAUSAL_LM)
    assert idiom == LoraConfig() and type(idiom.task_type) is str
    assert idiom.to_peft()["task_type"] == "CAUSAL_LM"
    assert idiom.to_peft()["init_lora_weights"] is True
    # What a file says of its task changes nothing that is computed.
    raw = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION"}
    assert LoraConfig.from_peft(raw).task_type == "CAUSAL_LM"


def test_rows_are_the_same_however_they_are_given():
    for rows in ((5, 6), {"embed_tokens": (5, 6)}, {"model.embed_tokens": (5, 6)}):
        lora = LoraConfig(trainable_token_indices=rows)
        assert lora.token_rows == {"embed_tokens": (5, 6)}
    assert LoraConfig().token_rows == {}


def test_every_field_counts_in_a_comparison():
    default = LoraConfig()
    others = dict(
        r=4,
        lora_alpha=2,
        target_modules=("q_proj",),
        exclude_modules=("v_proj",),
        layers_to_transform=(0,),
        layers_pattern=("layers",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 2},
        lora_dropout=0.1,
        use_rslora=True,
        use_dora=True,
        bias="all",
        lora_bias=True,
        modules_to_save=("norm",),
        trainable_token_indices=(1,),
        ensure_weight_tying=True,
        init_lora_weights="gaussian",
        base_model_name_or_path="a/b",
        revision="main",
        base_fingerprint="f",
        base_config_changes="{}",
    )
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert set(others) == fields - {"task_type"}  # it has one value
    seen = {default}
    for name, value in others.items():
        needed = {"layers_to_transform": 1} if name == "layers_pattern" else {}
        seen.add(LoraConfig(**{**needed, name: value}))
    assert len(seen) == 1 + len(others)


def test_empty_lists_mean_none():
    config = make(
        exclude_modules=(),
        modules_to_save=[],
        layers_to_transform=(),
        layers_pattern=(),
        trainable_token_indices=(),
    )
    assert config == LoraConfig()
    assert LoraConfig(trainable_token_indices={}) == LoraConfig()


def test_a_list_of_one_from_a_command_line_may_mean_a_pattern():
    assert LoraConfig(target_modules=("all-linear",)).target_modules == "all-linear"
    pattern = r".*\.(q|v)_proj"
    assert LoraConfig(target_modules=(pattern,)).target_modules == pattern
    assert LoraConfig(exclude_modules=(pattern,)).exclude_modules == pattern
    assert LoraConfig(target_modules=("q_proj",)).target_modules == ("q_proj",)
    assert make(modules_to_save="norm").modules_to_save == ("norm",)
    # A string is a pattern, as in PEFT: "q_proj" would have to be the whole path.
    assert LoraConfig(target_modules="q_proj").target_modules == "q_proj"
    assert LoraConfig(
        layers_to_transform=1, layers_pattern="layers"
    ).layers_pattern == ("layers",)


@pytest.mark.parametrize(
    "fields, uniform",
    [
        ({}, True),
        (dict(use_rslora=True, lora_bias=True, layers_to_transform=(0,)), True),
        (dict(rank_pattern={"q_proj": 2}), False),
        (dict(alpha_pattern={"q_proj": 2}), False),
        (dict(trainable_token_indices=(1,)), False),
        (dict(ensure_weight_tying=True), False),
        (dict(use_dora=True), False),
        (dict(modules_to_save=("norm",)), False),
        (dict(bias="lora_only"), False),
    ],
)
def test_one_scaling_for_all_needs_no_constants(fields, uniform):
    assert LoraConfig(**fields).uniform is uniform


def test_which_initializations_change_the_base():
    changing = {"pissa", "pissa_niter_4", "olora"}
    for init in ("default", "gaussian", "orthogonal", "loftq", *changing):
        config = LoraConfig(init_lora_weights=init)
        assert config.changes_base is (init in changing)


# --- adapter_config.json ---


def test_a_small_peft_file_has_peft_defaults():
    config = peft()
    assert (config.r, config.lora_alpha, config.scaling) == (8, 8, 1.0)
    assert config.target_modules == ("q_proj", "v_proj")
    default = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    for name in set(default) - {"r", "lora_alpha", "target_modules"}:
        assert getattr(config, name) == default[name]
    # What PEFT wrote for "nothing" says the same.
    nothing = peft(
        target_modules=None,
        exclude_modules=None,
        rank_pattern={},
        alpha_pattern=None,
        modules_to_save=[],
        layers_to_transform=None,
        layers_pattern=None,
        trainable_token_indices=None,
        lora_dropout=0.0,
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
        layer_replication=None,
        fan_in_fan_out=False,
        megatron_core="megatron.core",
        qalora_group_size=16,
        auto_mapping={"base_model_class": "LlamaForCausalLM"},
        inference_mode=True,
        task_type="CAUSAL_LM",
        peft_version="0.21.2",
    )
    assert nothing == config


def sort_targets(config):
    """PEFT keeps a set: it is written in sorted order."""
    targets = config.target_modules
    if isinstance(targets, str):
        return config
    return dataclasses.replace(config, target_modules=tuple(sorted(targets)))


def through_a_file(config):
    raw = json.loads(json.dumps(config.to_peft(), allow_nan=False))
    assert raw["peft_type"] == "LORA" and raw["task_type"] == "CAUSAL_LM"
    assert raw["inference_mode"] is True
    return LoraConfig.from_peft(raw)


def test_an_integer_stays_one():
    raw = LoraConfig(lora_alpha=16, alpha_pattern={"q_proj": 3}).to_peft()
    assert isinstance(raw["lora_alpha"], int)
    assert isinstance(raw["alpha_pattern"]["q_proj"], int)


def random_config(rng):
    """Any configuration that can be in a file."""
    some = lambda *values: rng.choice(values)  # noqa: E731
    names = [*PROJECTIONS, "lm_head", "embed_tokens", "mlp.up_proj", "layers.1.mlp.x"]
    keys = [*names, r"^model\.layers\.0.*", "layers.[12].mlp.(up|gate)_proj", ".*"]
    listed = rng.random() < 0.6
    fields = dict(
        r=2 * rng.randint(1, 40),
        lora_alpha=some(1, 8, 64, 0.3, 1e-3, 12.5),
        target_modules=rng.sample(names, rng.randint(1, 6))
        if listed
        else some("all-linear", r".*\.(q|v)_proj", r"model\.layers\.1.*down_proj"),
        exclude_modules=some(None, ("k_proj",), ("x", "lm_head"), r".*\.3\..*"),
        lora_dropout=some(0.0, 0.05, 0.5),
        use_rslora=some(True, False),
        bias=some("none", "all", "lora_only"),
        modules_to_save=some(None, ("norm",), ("lm_head", "embed_tokens", "norm")),
        trainable_token_indices=some(
            None,
            (5, 2),
            {"lm_head": (3,)},
            {"model.embed_tokens": (9, 1), "lm_head": (1,)},
        ),
        ensure_weight_tying=some(True, False),
        base_model_name_or_path=some(None, "meta-llama/Llama-3.1-8B", "/a b/ü"),
        revision=some(None, "main"),
    )
    for name in ("rank_pattern", "alpha_pattern"):
        chosen = rng.sample(keys, rng.randint(0, 4))
        values = [2 * rng.randint(1, 9) for _ in chosen]
        fields[name] = dict(zip(chosen, values, strict=True))
    if listed:
        fields["layers_to_transform"] = some(None, 0, 3, (1,), (2, 0))
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = some(None, ("layers",), ("h", "layers"))
    extra = some("dora", "lora_bias", "none")
    fields["use_dora"] = extra == "dora"
    fields["lora_bias"] = extra == "lora_bias"
    if extra != "lora_bias":
        fields["init_lora_weights"] = some("default", "gaussian", "orthogonal")
    return make(**fields)


@pytest.mark.parametrize("seed", range(3))
def test_random_configurations_come_back_equal(seed):
    rng = random.Random(seed)
    for _ in range(6):
        config = random_config(rng)
        again = through_a_file(config)
        assert again == sort_targets(config)
        assert hash(again) == hash(sort_targets(config))
        assert [*again.rank_pattern] == [*config.rank_pattern]
        assert [*again.alpha_pattern] == [*config.alpha_pattern]
        assert again.to_peft() == config.to_peft()


@pytest.mark.golden
def test_files_of_peft_come_back_equal_and_say_what_they_said(golden):
    files = sorted((golden / "adapters").glob("*/*/adapter_config.json"))
    assert len(files) == 11
    told = [LoraConfig.from_peft(json.loads(file.read_text())) for file in files]
    assert len(set(told)) >= 9
    for file, config in zip(files, told, strict=True):
        assert through_a_file(config) == config
        raw, ours = json.loads(file.read_text()), config.to_peft()
        # PEFT writes more fields, at their defaults; a set in any order.
        assert set(ours) <= set(raw) | {"base_fingerprint"}
        for name, value in ours.items():
            if isinstance(raw[name], list):
                assert sorted(value) == sorted(raw[name]), name
            else:
                assert value == raw[name], name
    by_name = {f.parent.name: c for f, c in zip(files, told, strict=True)}
    assert by_name["dora"].use_dora and by_name["rslora"].use_rslora
    assert by_name["bias_lora_only"].bias == "lora_only"
    assert by_name["layers_to_transform"].layers_to_transform == (1, 3)
    assert by_name["mts_embed_head"].modules_to_save == ("embed_tokens", "lm_head")
    assert by_name["trainable_tokens"].trainable_token_indices == (5, 17, 999)
    assert [*by_name["rank_alpha_pattern"].rank_pattern.items()] == [
        ("down_proj", 12),
        ("layers.1.self_attn.q_proj", 4),
        (r"layers\.[23]\.mlp\.(up|gate)_proj", 2),
        ("q_proj", 6),
    ]


@pytest.mark.parametrize(
    "init, read",
    [
        (True, "default"),
        (False, "default"),
        ("gaussian", "gaussian"),
        ("orthogonal", "orthogonal"),
        ("eva", "default"),  # where it started is no matter any more
        ("mica", "default"),
        (None, "default"),
    ],
)
def test_initializations_that_leave_the_base_alone_are_read(init, read):
    assert peft(init_lora_weights=init).init_lora_weights == read


@pytest.mark.parametrize(
    "init", ["default", "gaussian", "orthogonal", "loftq", "pissa"]
)
def test_what_is_written_never_has_peft_change_the_base(init):
    # PEFT acts on "pissa", "olora" and "loftq" when it loads a file.
    written = LoraConfig(init_lora_weights=init).to_peft()["init_lora_weights"]
    assert written == (init if init in ("gaussian", "orthogonal") else True)


@pytest.mark.parametrize(
    "init",
    ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "dummy", 3],
)
def test_a_file_of_a_changed_base_is_refused_with_the_way_out(init):
    with pytest.raises(UserError) as caught:
        peft(init_lora_weights=init)
    message = str(caught.value)
    assert f"`init_lora_weights`={init!r} (it was trained on a changed base" in message
    assert "PEFT's `path_initial_model_for_weight_conversion`" in message


@pytest.mark.parametrize(
    "change",
    [
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"target_parameters": ["mlp.experts"]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"]}},
        {"arrow_config": {"top_k": 3}},
        {"kasa_config": {"a": 1}},
        {"velora_config": {"num_groups": 8}},
        {"monteclora_config": {"a": 1}},
        {"corda_config": {"corda_method": "ipm"}},
        {"lora_ga_config": {"a": 1}},
        {"megatron_config": {"a": 1}},
        {"runtime_config": {"a": 1}},
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_lora_features_that_are_not_computed_are_refused_by_name(change, strict):
    ((name, value),) = change.items()
    raw = {"peft_type": "LORA", **change}
    with pytest.raises(UserError) as caught:
        LoraConfig.from_peft(raw, strict=strict)
    assert f"features that are not supported: `{name}`={value!r}" in str(caught.value)
    # Switched off, in any way of saying it, it is no reason to refuse.
    for off in (None, False, [], {}):
        assert LoraConfig.from_peft({"peft_type": "LORA", name: off}) == peft()


def test_all_that_is_refused_is_said_at_once():
    match = (
        "`alora_invocation_tokens`=.*, `use_qalora`=True, `init_lora_weights`='olora"
    )
    with pytest.raises(UserError, match=match):
        peft(use_qalora=True, alora_invocation_tokens=[1], init_lora_weights="olora")


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'; only 'LORA' adapters"),
        ({}, "`peft_type` is None"),
        ({"peft_type": ["LORA"]}, r"`peft_type` is \['LORA'\]"),
        ({"peft_type": "LORA", "r": 0}, "`r` must be a positive integer"),
        ({"peft_type": "LORA", "r": "8"}, "`r` must be a positive integer"),
        ({"peft_type": "LORA", "target_modules": [1]}, "`target_modules` must be a l"),
        ({"peft_type": "LORA", "target_modules": []}, "`target_modules` is empty"),
        ({"peft_type": "LORA", "bias": "lora"}, "`bias` must be"),
        ({"peft_type": "LORA", "rank_pattern": [3]}, "`rank_pattern` must be a table"),
        (
            {"peft_type": "LORA", "use_dora": True, "lora_bias": True},
            "`lora_bias` does not go with `use_dora`",
        ),
    ],
)
def test_files_of_something_else_and_bad_values_are_refused(raw, message):
    with pytest.raises(UserError, match=message):
        LoraConfig.from_peft(raw)


def test_a_file_without_an_object_is_refused():
    read = LoraConfig.from_peft.__wrapped__  # past the type checks
    with pytest.raises(UserError, match=r"holds no object but \['LORA'\]"):
        read(LoraConfig, ["LORA"])


def test_unknown_fields_are_refused_or_skipped():
    raw = {"peft_type": "LORA", "use_dorra": True, "new_thing": {"a": 1}, "off": None}
    with pytest.raises(UserError) as caught:
        LoraConfig.from_peft(raw)
    message = str(caught.value)
    assert "'use_dorra', 'new_thing'. Did you mean `use_dora`?" in message
    assert "off" not in message.split("computes:")[1]
    skipped = ["before"]
    config = LoraConfig.from_peft(raw, strict=False, skipped=skipped)
    assert config == peft()
    assert skipped == [
        "before",
        "'use_dorra' of adapter_config.json",
        "'new_thing' of adapter_config.json",
    ]
    # The fingerprint stands in the other file: PEFT knows no such field.
    with pytest.raises(UserError, match="not known here .*: 'base_fingerprint'"):
        peft(base_fingerprint="abc")
    assert "base_fingerprint" not in LoraConfig(base_fingerprint="abc").to_peft()


def test_a_set_is_read_in_sorted_order():
    config = peft(target_modules=["v_proj", "q_proj", "down_proj"])
    assert config.target_modules == ("down_proj", "q_proj", "v_proj")
    assert peft(target_modules={"v_proj", "q_proj"}).target_modules == (
        "q_proj",
        "v_proj",
    )
    assert peft(target_modules=".*proj").target_modules == ".*proj"


@pytest.mark.parametrize("value", [0, [0], [], [3, 1], None])
def test_layer_numbers_are_read_and_zero_is_one(value):
    config = peft(layers_to_transform=value)
    want = tuple(value) or None if isinstance(value, list) else value
    assert config.layers_to_transform == want
    written = config.to_peft()["layers_to_transform"]
    assert written == (list(want) if isinstance(want, tuple) else want)
