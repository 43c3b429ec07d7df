from typing import get_args, get_type_hints

import pytest

from qlora_jax.cli.train import from_arguments
from qlora_jax.errors import UsageError, UserError
from qlora_jax.runs.config import config_sections, setting_keys
from qlora_jax.runs.other_names import _NAMES, _VALUES, hint, value_hint
from qlora_jax.runs.toml import read_config


def test_hints_name_settings_that_exist_for_names_that_do_not():
    keys = setting_keys()
    ours = {name.rpartition(".")[2] for name in keys}
    assert not ours & _NAMES.keys()
    assert {key for key in _NAMES.values() if " " not in key} <= keys
    assert hint("num-train-epochs") == " Here it is `train.epochs`."
    assert hint("learning-rate") == " Here it is `train.learning_rate`."
    assert hint("seed") == " Here it is `data.seed` or `train.seed`."
    assert hint("groups.0.match") == hint("") == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--per_device_train_batch_size", "2"), "Here it is `train.batch_size`"),
        (("--train.lr=1",), "no option `--train.lr`. Here it is `train.learning_rate`"),
        (("--rank", "8"), "Here it is `lora.r`"),
        (("--learning_rate", "1e-4"), "Here it is `train.learning_rate`"),
        (("--use-rslora",), "Here it is `lora.use_rslora`"),
        (("--train.lora-dropout=0.1",), "Here it is `lora.lora_dropout`"),
        (("--warmup_ratio", "0.1"), "`train.warmup_steps`: a value below 1 is a share"),
        (("--resume",), "The same command continues"),
        (("--config", "run.toml"), "A run file is given without an option"),
        (("--train.stepz", "3"), "`--train.stepz`. Did you mean `train.steps`"),
        (("--eval.steps", "3"), "Here it is `eval.every`"),
        (("--nothing.like-it",), "no option `--nothing.like-it`. `qlora-jax train"),
        (("--random_state", "3"), "Here it is `train.seed`"),
        (("--dataset_num_proc", "3"), "Not needed"),
        (("--eval_strategy", "steps"), "`eval.every`, in steps"),
        (("--data.format", "sharegpt"), '`--data.format` sharegpt .* "messages" reads'),
        (("--train.optimizer=paged_adamw_8bit",), 'Here it is "adamw_8bit"'),
        (("--log.report-to", "none", "--model.path=m"), "(?s)An empty list|missing"),
        (
            ("--lr", "1", "--rank=8", "--train.steps", "3", "--x-y"),
            r"(?s)3 options .*- .*`--lr`.*- .*`--rank`.*- .* `--x-y`\.\n",
        ),
        (
            ("--model.path", "a"),
            "missing `data`, `train`. Give --data.path and --train.",
        ),
        (
            ("--model.path", "a", "--data.path", "b"),
            "missing `train`. Give --train.epochs or --train.steps",
        ),
        (("owner/name",), "cannot be read: .*If this names a model of the hub"),
    ],
)
def test_names_of_other_libraries_get_ours(options, message):
    with pytest.raises(UserError, match=message):
        from_arguments(options)


def test_a_run_file_behind_options_is_refused(tmp_path):
    file = tmp_path / "run.toml"
    file.touch()
    with pytest.raises(
        UsageError, match=f"comes before .*train {file} --train.steps 3"
    ):
        from_arguments(["--train.steps", "3", str(file)])


def test_in_a_run_file_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "packing = true\n[train]\nnum_train_epochs = 1\nlora_dropout = 0.1\n"
        "optimizer = 'adamw_torch'\n[data]\nformat = 'sharegpt'\n"
        "[lora]\nloftq_config = {loftq_bits = 4}\n[log]\nreport_to = 'none'\n"
        "[model]\nload_in_4bit = true\n[eval]\nsteps = 5\n[peft]\nr = 8\n"
    )
    with pytest.raises(UserError) as refused:
        read_config(file)
    assert "[train] `num_train_epochs` is not an option here. Here it is `train.ep" in (
        str(refused.value)
    )
    assert 'Here it is `model.quantization`: "nf4_dq"' in str(refused.value)
    assert "`packing` is not an option here. Here it is `data.packing`." in (
        str(refused.value)
    )
    assert "[eval] `steps` is not an option here. Here it is `eval.every`." in (
        str(refused.value)
    )
    assert "[train] `lora_dropout` is not an option here. Here it is `lora.lora_d" in (
        str(refused.value)
    )
    for part in (
        "got 'adamw_torch'. Here it is \"adamw\".",
        "got 'sharegpt'. \"messages\" reads ShareGPT's turns too.",
        '`loftq_config` is not an option here. Here it is `lora.init_lora_weights` = "',
        "got 'none'. An empty list, [], means no tracker.",
        "`peft` is not an option here. Here it is the table [lora].",
    ):
        assert part in str(refused.value)
    assert "Options:" not in str(refused.value)  # every name has its own here


def test_every_value_of_another_library_is_refused_here():
    for key, value in _VALUES:
        section, name = key.split(".")
        kind = get_type_hints(config_sections()[section])[name]
        assert value not in get_args(kind) and value_hint(key, value)
