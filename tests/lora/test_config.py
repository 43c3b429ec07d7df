"""LoraConfig: what it refuses, and how it goes through PEFT's adapter_config.json."""

import dataclasses
import enum
import json
import math
import pickle

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.tree import QUANTIZED

NAN, INF, BIG = math.nan, math.inf, 10**400
DEFAULTS = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
PATH = "model.layers.12.self_attn.q_proj"


def make(**fields):
    """Past the type checks of the tests, as a caller without them."""
    config = object.__new__(LoraConfig)
    for name, default in DEFAULTS.items():
        object.__setattr__(config, name, fields.get(name, default))
    config.__post_init__()
    return config


def peft(**fields):
    return LoraConfig.from_peft({"peft_type": "LORA", **fields})


def through_a_file(config):
    raw = json.loads(json.dumps(config.to_peft(), allow_nan=False))
    assert raw["peft_type"] == "LORA" and raw["task_type"] == "CAUSAL_LM"
    assert raw["inference_mode"] is True
    return LoraConfig.from_peft(raw)


def rank_and_scaling(config, path=PATH):
    return config.ranks_and_scalings([path])[path]


# --- Scaling ---


@pytest.mark.parametrize(
    "r, alpha, rslora, scaling",
    [
        *((16, 16, False, 1.0), (8, 16, False, 2.0), (16, 8, True, 2.0)),
        *((3, 1, False, 1 / 3), (8, 0.5, False, 1 / 16), (2, 3, True, 3 / 2**0.5)),
    ],
)
def test_scaling_is_alpha_over_rank_or_its_root(r, alpha, rslora, scaling):
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora)
    assert config.scaling == pytest.approx(scaling, rel=1e-15)
    assert rank_and_scaling(config) == (r, config.scaling)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_set_rank_and_alpha_of_a_module_independently(rslora):
    ranks = {"q_proj": 2, "layers.1.mlp.up_proj": 4}
    alphas = {"up_proj": 6, "v_proj": 0.5}
    fields = dict(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    config = LoraConfig(r=8, lora_alpha=16, **fields)
    for name, r, alpha in (
        *(("0.self_attn.q_proj", 2, 16), ("0.mlp.up_proj", 8, 6)),
        *(("1.mlp.up_proj", 4, 6), ("0.self_attn.v_proj", 8, 0.5)),
        ("0.self_attn.k_proj", 8, 16),
    ):
        scaling = alpha / (math.sqrt(r) if rslora else r)
        assert rank_and_scaling(config, f"model.layers.{name}") == (r, scaling)


MATCHING = [
    *("q_proj", PATH, "self_attn.q_proj", "layers.12.self_attn.q_proj"),
    *(r"layers\.\d+\.self_attn\.q_proj", r".*q_proj", "(q|k)_proj", "q_proj|k_proj"),
    *("self.attn.q.proj", f"^{PATH}", r"^model\.layers\.1.*", r"layers\.1[0-9]\..*"),
]
# Not from a dot on; not to the end; "^" is the beginning of the whole path.
NOT_MATCHING = [
    *("_proj", "proj", r"2\.self_attn\.q_proj", "q_pro", "self_attn", "layers.12"),
    *("q_proj.weight", "^q_proj", "^self_attn.q_proj", r"layers\.2\..*", "Q_PROJ"),
]


@pytest.mark.parametrize("key", MATCHING + NOT_MATCHING)
def test_a_pattern_matches_the_end_of_a_path_from_a_dot_on(key):
    config = LoraConfig(rank_pattern={key: 3}, alpha_pattern={key: 5})
    assert rank_and_scaling(config) == ((3, 5 / 3) if key in MATCHING else (16, 1.0))


def test_the_first_pattern_that_matches_counts():
    one = LoraConfig(rank_pattern={"q_proj": 2, "self_attn.q_proj": 4})
    two = LoraConfig(rank_pattern={"self_attn.q_proj": 4, "q_proj": 2})
    assert rank_and_scaling(one)[0] == 2
    assert rank_and_scaling(two)[0] == rank_and_scaling(through_a_file(two))[0] == 4
    assert one != two


def test_a_pattern_for_every_module_of_a_large_model_is_matched():
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(250) for p in "abc"]
    config = LoraConfig(rank_pattern={name: 1 + i for i, name in enumerate(names)})
    ranks = [rank for rank, _ in config.ranks_and_scalings(names).values()]
    assert ranks == [*range(1, 751)]


# --- What is refused ---

FLAGS = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
TABLES = ("rank_pattern", "alpha_pattern")
STRINGS = ("base_model_name_or_path", "revision", "base_fingerprint")
LAYERS, ROWS = "layers_to_transform", "trainable_token_indices"
INIT = "init_lora_weights"


@pytest.mark.parametrize(
    "fields, values, message",
    [
        ("r", (0, -1, True, 1.0, "8", None, 1 << 20, BIG), "must be a positive integ"),
        ("lora_alpha", (0, 0.0, -1, NAN, INF, -INF, True, "16", None, BIG), "be > 0, "),
        (
            "lora_dropout",
            (1.0, 1, -0.1, NAN, True, "0.1", None),
            r"be in \[0, 1\), got",
        ),
        (FLAGS, (1, 0, "true", None, []), "` must be true or false, got"),
        (NAMES, (5, (1,), ("q", 1), ("",), {"q": 1}), "` must be a list of names, got"),
        (NAMES[0], (None,), "` must be a list of names, got None"),
        (NAMES[0], ((), ""), "` is empty. Name modules such as 'q_proj', or gi"),
        (NAMES[2:], (("norm", "("),), r"expression '\(' is not valid: missing \)"),
        (NAMES[:2], ("(q_proj", ("(q_proj",)), r"'\(q_proj' is not valid: missing \)"),
        (NAMES[1], ("*",), "is not valid: nothing to repeat"),
        (TABLES, (None, ["q_proj"], "q_proj", 4), "` must be a table of patterns, got"),
        (TABLES, ({1: 2},), r"` must be a table whose patterns are strings, got \[1\]"),
        (TABLES, ({"(": 2},), r"`: the regular expression '\(' is not valid"),
        # Valid alone, and something else within PEFT's expression.
        (TABLES, ({"a)|(b": 2}, {"(?i)q_proj": 2}), "is not valid"),
        (TABLES[0], ({"q": 0}, {"q": 2.0}, {"q": True}), r"\['q'\]` must be a pos"),
        (TABLES[1], ({"q": -1}, {"q": NAN}), r"pattern\['q'\]` must be > 0, got"),
        (LAYERS, (-1, True, 1.0, "0", {0: 1}, 1 << 31), "` must be layer numbers"),
        (LAYERS, ((0, -1), (0, "1"), (True,)), "` must be layer numbers"),
        (ROWS, (3, "5", (1, -1), (1, 2.0), (True,)), "must be token ids, or module na"),
        (ROWS, ({"embed_tokens": 3},), "must be token ids, or module names with"),
        (ROWS, ((5, 2, 5),), "of 'embed_tokens' must be distinct"),
        (ROWS, ({"lm_head": ()},), "of 'lm_head' must be distinct"),
        ("bias", ("some", None, True), "must be 'none', 'lora_only' or 'all', got"),
        (
            *(INIT, ("eva", "pissa_niter_0", "pissa_niter_", "", False, None, "Pissa")),
            "`init_lora_weights`=.* is not supported. Supported: 'default'",
        ),
        ("task_type", ("SEQ_CLS",), "` must be 'CAUSAL_LM', .*, got 'SEQ_CLS'"),
        (STRINGS, (5,), "` must be a string, got 5"),
    ],
)
def test_an_unusable_value_is_refused(fields, values, message):
    for field in (fields,) if isinstance(fields, str) else fields:
        for value in values:
            with pytest.raises(UserError, match=message) as caught:
                make(**{field: value})
            assert f"lora: `{field}" in str(caught.value)
            assert len(str(caught.value)) < 500  # whatever a file holds


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(target_modules="all-linear", layers_to_transform=1),
            "`layers_to_transform` needs a list of `target_modules`",
        ),
        (
            dict(target_modules=r".*q_proj", layers_to_transform=(0, 1)),
            "put the layers into the expression",
        ),
        (dict(layers_pattern="h"), "`layers_pattern` needs `layers_to_transform`"),
        (dict(lora_bias=True, use_dora=True), "be combined with `use_dora`"),
        *(
            (dict(lora_bias=True, init_lora_weights=init), "needs the default init")
            for init in ("gaussian", "orthogonal", "pissa", "loftq")
        ),
        *(
            (
                dict(use_dora=True, init_lora_weights=init),
                f"`init_lora_weights`='{init}' cannot be combined with `use_dora`",
            )
            for init in ("pissa", "pissa_niter_4", "olora")
        ),
        (dict(init_lora_weights="orthogonal", r=3), r"needs even ranks, got \[3\]"),
        (
            dict(init_lora_weights="orthogonal", r=4, rank_pattern={"q_proj": 5}),
            r"needs even ranks, got \[4, 5\]",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(UserError, match=f"lora: .*{message}"):
        make(**fields)


def test_all_problems_are_reported_together():
    with pytest.raises(UserError, match=r"(?s)^3 problems with the LoRA .*`r`.*`bias`"):
        make(r=0, bias="some", target_modules="(")


# --- What is accepted ---


@pytest.mark.parametrize(
    "fields",
    [
        dict(r=1, lora_alpha=1e-3, lora_dropout=0, layers_to_transform=0),
        dict(r=(1 << 20) - 1, lora_dropout=0.999),
        dict(layers_to_transform=(2, 0), layers_pattern="layers"),
        dict(layers_to_transform=[], target_modules=["q_proj"]),
        *(dict(use_dora=True, init_lora_weights=x) for x in ("orthogonal", "loftq")),
        dict(init_lora_weights="pissa_niter_16", use_rslora=True),
        dict(exclude_modules=r".*\.0\..*", target_modules="ALL-Linear"),
        dict(modules_to_save=["model.norm", "lm_head"], bias="all"),
        dict(trainable_token_indices={"embed_tokens": [3, 1], "lm_head": [0]}),
        dict(trainable_token_indices=[7, 3], ensure_weight_tying=True),
        dict(lora_bias=True, bias="lora_only"),
    ],
)
def test_good_values_are_hashed_pickled_and_written(fields):
    config = make(**fields)
    assert hash(config) == hash(make(**fields))
    assert config == make(**fields) == dataclasses.replace(config)
    assert pickle.loads(pickle.dumps(config)) == config
    json.dumps(config.to_peft(), allow_nan=False)


def test_it_is_frozen_and_adapts_all_projections_by_default():
    table = {"q_proj": 2}
    config = LoraConfig(rank_pattern=table)
    table["q_proj"] = 4
    assert config.rank_pattern == {"q_proj": 2}
    assert config.target_modules == QUANTIZED
    assert LoraConfig() == make(target_modules=list(QUANTIZED))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3
    with pytest.raises(TypeError, match="a FrozenDict cannot be changed"):
        config.rank_pattern["q_proj"] = 3


def test_peft_spells_the_default_with_true_and_an_enumeration():
    class TaskType(str, enum.Enum):  # noqa: UP042 (as PEFT has it)
        CAUSAL_LM = "CAUSAL_LM"

    config = LoraConfig(init_lora_weights=True, task_type=TaskType.CAUSAL_LM)
    assert config == LoraConfig() and type(config.task_type) is str
    assert config.to_peft()["task_type"] == "CAUSAL_LM"
    assert config.to_peft()["init_lora_weights"] is True
    # A file's task changes nothing that is computed.
    assert peft(task_type="FEATURE_EXTRACTION").task_type == "CAUSAL_LM"


def test_token_rows_are_by_module_name():
    for rows in ((5, 6), {"embed_tokens": (5, 6)}, {"model.embed_tokens": (5, 6)}):
        lora = LoraConfig(trainable_token_indices=rows)
        assert lora.token_rows == {"embed_tokens": (5, 6)}
    assert LoraConfig().token_rows == {}


def test_every_field_counts_in_a_comparison_and_goes_through_a_file():
    patterns = {"q_proj": 2, r"^model\.layers\.0.*": 4, "layers.[12].mlp.up_proj": 0.5}
    others = dict(
        **dict(r=4, lora_alpha=1e-3, target_modules=("v_proj", "q_proj")),
        **dict(lora_dropout=0.1, exclude_modules=("x", "lm_head")),
        **dict(layers_to_transform=(2, 0), layers_pattern=("h", "layers")),
        **dict(rank_pattern={"q_proj": 2, ".*": 3}, alpha_pattern=patterns),
        **dict(use_rslora=True, use_dora=True, bias="all", lora_bias=True),
        **dict(modules_to_save=("norm", "lm_head"), ensure_weight_tying=True),
        **dict(trainable_token_indices={"model.embed_tokens": (9, 1), "lm_head": (1,)}),
        **dict(init_lora_weights="gaussian", base_model_name_or_path="/a b/ü"),
        **dict(revision="main", base_fingerprint="f", base_config_changes="{}"),
    )
    assert set(others) == set(DEFAULTS) - {"task_type"}  # it has one value
    seen = {LoraConfig()}
    for name, value in others.items():
        needed = {"layers_to_transform": 1} if name == "layers_pattern" else {}
        config = LoraConfig(**{**needed, name: value})
        seen.add(config)
        # A set in PEFT, which is written sorted; these two are in other files.
        outside = dict(base_fingerprint=None, base_config_changes=None)
        targets = tuple(sorted(config.target_modules))
        want = dataclasses.replace(config, target_modules=targets, **outside)
        assert through_a_file(config) == want and want.to_peft() == config.to_peft()
    assert len(seen) == 1 + len(others)


def test_empty_lists_mean_none():
    lists = (*NAMES[1:], "layers_to_transform", "trainable_token_indices")
    assert make(**dict.fromkeys(lists, ())) == LoraConfig()
    assert LoraConfig(trainable_token_indices={}) == LoraConfig()
    assert peft(layers_pattern="", modules_to_save="") == peft()


def test_a_list_of_one_may_mean_a_pattern():
    # As a command line gives it. A string is a pattern, as in PEFT: "q_proj" would
    # have to be the whole path.
    pattern = r".*\.(q|v)_proj"
    for value in ("all-linear", pattern):
        assert LoraConfig(target_modules=(value,)).target_modules == value
    for value in (("q_proj",), "q_proj"):
        assert LoraConfig(target_modules=value).target_modules == value
    assert LoraConfig(exclude_modules=(pattern,)).exclude_modules == pattern
    config = make(layers_to_transform=1, layers_pattern="h", modules_to_save="norm")
    assert (config.layers_pattern, config.modules_to_save) == (("h",), ("norm",))


def test_a_uniform_configuration_needs_no_constants():
    for fields in ({}, dict(use_rslora=True, lora_bias=True, layers_to_transform=(0,))):
        assert LoraConfig(**fields).uniform
    for fields in (
        *(dict(rank_pattern={"q_proj": 2}), dict(alpha_pattern={"q_proj": 2})),
        *(dict(trainable_token_indices=(1,)), dict(ensure_weight_tying=True)),
        *(dict(use_dora=True), dict(modules_to_save=("norm",)), dict(bias="lora_only")),
    ):
        assert not LoraConfig(**fields).uniform, fields


def test_pissa_and_olora_change_the_base():
    changing = {"pissa", "pissa_niter_4", "olora"}
    for init in ("default", "gaussian", "orthogonal", "loftq", *changing):
        assert LoraConfig(init_lora_weights=init).changes_base is (init in changing)


# --- adapter_config.json ---


def test_a_small_peft_file_has_peft_defaults():
    config = peft()
    assert (config.r, config.lora_alpha, config.scaling) == (8, 8, 1.0)
    assert config.target_modules == ("q_proj", "v_proj")
    for name in set(DEFAULTS) - {"r", "lora_alpha", "target_modules"}:
        assert getattr(config, name) == DEFAULTS[name]
    # What PEFT writes for "nothing" means the same.
    none = ("target_modules", "exclude_modules", "alpha_pattern", "layers_pattern")
    none += ("layers_to_transform", "trainable_token_indices", "eva_config")
    assert config == peft(
        **dict.fromkeys((*none, "layer_replication")),
        **dict(rank_pattern={}, modules_to_save=[], lora_dropout=0.0, loftq_config={}),
        **dict(init_lora_weights=True, fan_in_fan_out=False, qalora_group_size=16),
        **dict(megatron_core="megatron.core", inference_mode=True),
        **dict(auto_mapping={"base_model_class": "LlamaForCausalLM"}),
        **dict(task_type="CAUSAL_LM", peft_version="0.21.2"),
    )


def test_an_integer_stays_an_integer():
    raw = LoraConfig(lora_alpha=16, alpha_pattern={"q_proj": 3}).to_peft()
    assert isinstance(raw["lora_alpha"], int)
    assert isinstance(raw["alpha_pattern"]["q_proj"], int)


@pytest.mark.golden
def test_files_of_peft_come_back_equal_and_are_read_as_written(golden):
    files = sorted((golden / "adapters").glob("*/*/adapter_config.json"))
    assert len(files) == 11
    configs = {f: LoraConfig.from_peft(json.loads(f.read_text())) for f in files}
    assert len(set(configs.values())) >= 9
    for file, config in configs.items():
        assert through_a_file(config) == config
        raw, ours = json.loads(file.read_text()), config.to_peft()
        # PEFT writes more fields, at their defaults; a set in any order.
        assert set(ours) <= set(raw) | {"base_fingerprint"}
        for name, value in ours.items():
            if isinstance(raw[name], list):
                assert sorted(value) == sorted(raw[name]), name
            else:
                assert value == raw[name], name
    by_name = {file.parent.name: config for file, config in configs.items()}
    assert [*by_name["rank_alpha_pattern"].rank_pattern.items()] == [
        *(("down_proj", 12), ("layers.1.self_attn.q_proj", 4)),
        *((r"layers\.[23]\.mlp\.(up|gate)_proj", 2), ("q_proj", 6)),
    ]


# The fields of PEFT's LoraConfig, by the first version that has them (of those that we
# write or could write). Up to 0.13 a field of a later version is a TypeError.
PEFT_FIELDS = {
    "0.6": "peft_type auto_mapping base_model_name_or_path revision task_type "
    "inference_mode r target_modules lora_alpha lora_dropout fan_in_fan_out bias "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern",
    "0.7": "megatron_config megatron_core loftq_config",
    "0.8": "use_rslora",
    "0.9": "use_dora",
    "0.10": "layer_replication",
    "0.14": "exclude_modules eva_config lora_bias",
    "0.15": "trainable_token_indices corda_config",
    "0.18": "ensure_weight_tying peft_version",
}


@pytest.mark.parametrize(
    "fields, version",
    [
        ({}, "0.6"),
        ({"rank_pattern": {"q_proj": 2}, "modules_to_save": ("lm_head",)}, "0.6"),
        ({"layers_to_transform": (0,), "layers_pattern": "layers"}, "0.6"),
        ({"use_rslora": True}, "0.8"),
        ({"use_dora": True}, "0.9"),
        ({"exclude_modules": ("k_proj",)}, "0.14"),
        ({"lora_bias": True}, "0.14"),
        ({"trainable_token_indices": (3,)}, "0.15"),
        ({"ensure_weight_tying": True}, "0.18"),
    ],
)
def test_the_oldest_peft_that_computes_an_adapter_reads_its_file(fields, version):
    versions = list(PEFT_FIELDS)
    known = {
        name
        for older in versions[: versions.index(version) + 1]
        for name in PEFT_FIELDS[older].split()
    }
    written = LoraConfig(**fields).to_peft()
    assert set(written) <= known and set(fields) <= set(written)


def test_how_an_adapter_started_does_not_matter_in_a_file():
    for init in (True, False, None, "gaussian", "orthogonal", "eva", "mica"):
        read = init if init in ("gaussian", "orthogonal") else "default"
        assert peft(init_lora_weights=init).init_lora_weights == read
    # PEFT changes the base for "pissa", "olora" and "loftq" when it loads a file.
    for init in ("default", "gaussian", "orthogonal", "loftq", "pissa"):
        written = LoraConfig(init_lora_weights=init).to_peft()["init_lora_weights"]
        assert written == (init if init in ("gaussian", "orthogonal") else True)


@pytest.mark.parametrize(
    "init",
    ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"],
)
def test_a_file_of_a_changed_base_is_refused_with_the_way_out(init):
    found = f"`init_lora_weights`={init!r} .it was trained on a changed base.*"
    way_out = "PEFT's `path_initial_model_for_weight_conversion`"
    with pytest.raises(UserError, match=found + way_out):
        peft(init_lora_weights=init)


@pytest.mark.parametrize(
    ("init", "reason"),
    [("loftq", "a base that LoftQ changed"), ("dummy", "no PEFT has"), (3, "no PEFT")],
)
def test_other_starts_of_a_file_are_refused_with_their_own_reason(init, reason):
    with pytest.raises(UserError, match=f"{init!r} .*{reason}.*write true"):
        peft(init_lora_weights=init)


@pytest.mark.parametrize(
    "name, value",
    [
        ("fan_in_fan_out", True),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"a": 1}),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_fields_that_peft_passes_over_are_read_and_said(name, value):
    notes: list[str] = []
    raw = {"peft_type": "LORA", name: value}
    assert LoraConfig.from_peft(raw, skipped=notes) == peft()
    (note,) = notes
    assert note.startswith(f"`{name}`={value!r}: ")


@pytest.mark.parametrize(
    "name, value",
    [
        ("layer_replication", [[0, 4], [2, 5]]),
        *(("target_parameters", ["mlp.experts"]), ("alora_invocation_tokens", [1, 2])),
        *(("use_qalora", True), ("use_bdlora", {"target_modules_bd_a": ["q_proj"]})),
        *(("arrow_config", {"top_k": 3}), ("kasa_config", {"a": 1})),
        *(("velora_config", {"num_groups": 8}), ("monteclora_config", {"a": 1})),
        ("megatron_config", {"a": 1}),
    ],
)
def test_lora_features_that_are_not_computed_are_refused_by_name(name, value):
    raw = {"peft_type": "LORA", name: value}
    for strict in (True, False):
        with pytest.raises(UserError) as caught:
            LoraConfig.from_peft(raw, strict=strict)
        message = str(caught.value)
        assert f"features that are not supported: `{name}`={value!r}" in message
    # Switched off, however that is written, it is not refused.
    for off in (None, False, [], {}):
        assert peft(**{name: off}) == peft()


TOKENS = "alora_invocation_tokens"


@pytest.mark.parametrize(
    "raw, message",
    [
        (
            {"use_qalora": True, TOKENS: [1], "init_lora_weights": "olora"},
            f"`{TOKENS}`=.*, `use_qalora`=True, `init_lora_weights`='olora",
        ),
        (
            {"peft_type": "IA3"},
            "`peft_type` is 'IA3'; only 'LORA' adapters.*`merge_and_unload",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 2]},
            r"TRAINABLE_TOKENS'.*rows of an embedding.*\[5, 2\].*as a part of a LoRA",
        ),
        ({"peft_type": None}, "`peft_type` is None"),
        ({"peft_type": ["LORA"]}, r"`peft_type` is \['LORA'\]"),
        *(({"r": r}, "`r` must be a positive integer") for r in (0, "8", None)),
        ({"lora_alpha": None}, "`lora_alpha` must be > 0, got None"),
        ({"target_modules": [1]}, "`target_modules` must be a list of names"),
        ({"target_modules": []}, "`target_modules` is empty"),
        ({"bias": "lora"}, "`bias` must be"),
        ({"rank_pattern": [3]}, "`rank_pattern` must be a table"),
        ({"use_dora": True, "lora_bias": True}, "`lora_bias` cannot be combined with"),
    ],
)
def test_other_methods_and_bad_values_in_a_file_are_refused(raw, message):
    with pytest.raises(UserError, match=message):
        peft(**raw)


def test_a_file_without_an_object_is_refused():
    read = LoraConfig.from_peft.__wrapped__  # past the type checks
    with pytest.raises(UserError, match=r"contain a JSON object, got \['LORA'\]"):
        read(LoraConfig, ["LORA"])


def test_unknown_fields_are_refused_or_skipped():
    raw = {"peft_type": "LORA", "use_dorra": True, "new_thing": {"a": 1}, "off": None}
    with pytest.raises(UserError) as caught:
        LoraConfig.from_peft(raw)
    message = str(caught.value)
    assert "'use_dorra', 'new_thing'. Did you mean `use_dora`?" in message
    assert "off" not in message.split("computes:")[1]
    skipped = ["before"]
    assert LoraConfig.from_peft(raw, strict=False, skipped=skipped) == peft()
    fields = ("'use_dorra'", "'new_thing'")
    assert skipped == ["before", *(f"{f} of adapter_config.json" for f in fields)]
    # The fingerprint is in the other file: PEFT has no such field.
    with pytest.raises(UserError, match="unknown fields.*: 'base_fingerprint'"):
        peft(base_fingerprint="abc")
    assert "base_fingerprint" not in LoraConfig(base_fingerprint="abc").to_peft()


def test_a_set_is_read_in_sorted_order():
    for targets in (["v_proj", "q_proj"], {"v_proj", "q_proj"}):
        assert peft(target_modules=targets).target_modules == ("q_proj", "v_proj")
    config = peft(target_modules=".*proj")
    assert config.target_modules == ".*proj" and through_a_file(config) == config


@pytest.mark.parametrize("value", [0, [0], [], [3, 1], None])
def test_layer_numbers_are_read_and_zero_is_a_number(value):
    config = peft(layers_to_transform=value)
    want = tuple(value) or None if isinstance(value, list) else value
    assert config.layers_to_transform == want
    written = config.to_peft()["layers_to_transform"]
    assert written == (list(want) if isinstance(want, tuple) else want)
