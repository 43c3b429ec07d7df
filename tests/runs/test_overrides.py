"""Options of a command line win over a run file, setting by setting."""

import dataclasses
from typing import get_type_hints

import pytest
import tyro

from qlora_jax.errors import UserError
from qlora_jax.runs import overrides
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.overrides import option_keys, values_of
from qlora_jax.runs.toml import read_config
from qlora_jax.training.config import ParameterGroup

FILE = """
output_dir = "out"
[model]
path = "base"
rope_scaling = { rope_type = "linear", factor = 2 }
[data]
path = "rows.jsonl"
[lora]
rank_pattern = { q_proj = 4 }
alpha_pattern = { q_proj = 8 }
[train]
steps = 10
warmup_steps = 5
[[train.groups]]
match = "norm"
learning_rate = 1e-6
"""
BIAS = ParameterGroup("bias", learning_rate=1e-6)
HINTS = get_type_hints(RunConfig)
KEYS = [
    f"{section}.{field.name}"
    for section, cls in HINTS.items()
    if dataclasses.is_dataclass(cls)
    for field in dataclasses.fields(cls)
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return path


def merge(file, *args) -> RunConfig:
    """Reads file and options as `train` does."""
    default = None if file is None else overrides.option_defaults(read_config(file))
    like, start = overrides.unchecked_config(default)
    start = tyro.MISSING_NONPROP if start is None else start
    options = tyro.cli(like, args=args, default=start)
    return read_config(file, values_of(options, option_keys(args)))


@pytest.mark.parametrize("key", [*KEYS, "output_dir"])
def test_a_setting_is_recognized_in_every_spelling_of_its_option(key):
    section, dot, name = key.rpartition(".")
    prefix, hyphened = f"--{section}{dot}", name.replace("_", "-")
    negated = (f"no-{hyphened}", f"no_{name}")
    for spelling in (name, hyphened, *negated, f"{hyphened}=--x"):
        assert option_keys(["value", prefix + spelling, "-1"]) == {key}


def test_other_options_and_values_are_not_settings():
    args = ["--help", "--lora", "--gpu", "lora.r", "-lora.r", "--model", "--no-such.r"]
    assert option_keys(args) == set()


def test_an_option_changes_its_setting_and_no_other(file):
    plain = read_config(file)
    assert merge(file) == plain
    config = merge(file, "--lora.r", "2", "--train.steps=20")
    assert (config.lora.r, config.train.steps) == (2, 20)
    assert dataclasses.replace(config.lora, r=plain.lora.r) == plain.lora
    assert dataclasses.replace(config.train, steps=10) == plain.train
    assert config.model == plain.model and config.data == plain.data


def test_steps_and_epochs_replace_each_other(file):
    train = merge(file, "--train.epochs", "2").train
    assert (train.steps, train.epochs) == (None, 2.0)
    with pytest.raises(UserError, match="either `steps` or `epochs`"):
        merge(file, "--train.epochs", "2", "--train.steps", "5")


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (("--output-dir", "there"), "output_dir", "there"),
        (("--train.max-grad-norm", "None"), "train.max_grad_norm", None),
        (("--data.no-shuffle",), "data.shuffle", False),
        (("--eval.path", "a", "b"), "eval.path", ("a", "b")),
        (("--lora.target-modules", "q_proj"), "lora.target_modules", ("q_proj",)),
        (("--lora.rank-pattern", "v_proj", "2"), "lora.rank_pattern", {"v_proj": 2}),
        (("--train.groups.0.match", "bias"), "train.groups", (BIAS,)),
        (
            ("--model.rope-scaling", "rope_type", "linear", "factor", "4"),
            "model.rope_scaling",
            {"factor": 4, "rope_type": "linear"},
        ),
        (
            # Lists and switches are text to a parser, in any of these spellings.
            (
                *("--model.rope-scaling", "rope_type", "longrope", "short_factor"),
                *("[1.0, 1.5]", "long_factor", "1,2.5"),
                *("original_max_position_embeddings", "64"),
            ),
            "model.rope_scaling",
            {
                "long_factor": (1, 2.5),
                "original_max_position_embeddings": 64,
                "rope_type": "longrope",
                "short_factor": (1.0, 1.5),
            },
        ),
        (
            (
                *("--model.rope-scaling", "rope_type", "yarn", "truncate", "False"),
                *("factor", "2.0", "original_max_position_embeddings", "64"),
            ),
            "model.rope_scaling",
            {
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "rope_type": "yarn",
                "truncate": False,
            },
        ),
    ],
)
def test_values_of_every_kind_override_the_file(file, args, key, value):
    config = merge(file, *args)
    assert values_of(config, [key]) == {key: value}
    untouched = {"lora.rank_pattern", "lora.alpha_pattern"} - {key}
    plain = read_config(file)
    assert values_of(config, untouched) == values_of(plain, untouched)


def test_options_change_a_run_whose_file_scales_by_lists(file):
    lists = "{ rope_type = 'longrope', short_factor = [1, 1.5], long_factor = [2, 3], "
    scaling = f"{lists}original_max_position_embeddings = 64 }}"
    file.write_text(FILE.replace('{ rope_type = "linear", factor = 2 }', scaling))
    config = merge(file, "--lora.r", "2")
    assert config.lora.r == 2
    assert config.model == read_config(file).model
    assert config.model.rope_scaling["short_factor"] == (1.0, 1.5)


def test_options_alone_make_a_run():
    args = ("--model.path", "base", "--data.path", "rows", "--train.steps", "3")
    values = {"model.path": "base", "data.path": "rows", "train.steps": 3}
    assert merge(None, *args) == read_config(overrides=values)


def test_problems_of_all_options_are_listed(file):
    with pytest.raises(UserError) as raised:
        merge(file, "--train.steps", "4", "--lora.r", "0", "--data.max-length", "1")
    named = [problem.split("`")[1] for problem in raised.value.problems]
    assert named == ["data.max_length", "r", "warmup_steps"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.stepz": 3}, r"\[train\] `stepz` is not an option .*`steps`"),
        ({"tarin.steps": 3}, r"`tarin` is not an option here\. Did you mean `train`"),
        ({"train.steps": "3"}, r"\[train\] `steps` must be an integer, got '3'"),
    ],
)
def test_overrides_are_checked_like_a_file(file, values, message):
    with pytest.raises(UserError, match=message):
        read_config(file, values)
    with pytest.raises(UserError, match="missing `model`, `data`"):
        read_config(None, values)


def test_lora_settings_are_given_by_the_file_or_by_options(file):
    keys = option_keys(["--lora.r", "2", "--train.steps", "3"])
    assert overrides.given_lora(None, keys) == {"r"}
    assert overrides.given_lora(file, keys) == {"r", "rank_pattern", "alpha_pattern"}
