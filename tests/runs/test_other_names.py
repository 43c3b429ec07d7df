import pytest

from qlora_jax.cli.train import from_arguments
from qlora_jax.errors import UsageError, UserError
from qlora_jax.runs.config import setting_keys
from qlora_jax.runs.other_names import _NAMES, hint
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
        "[model]\nload_in_4bit = true\n[eval]\nsteps = 5\n"
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
