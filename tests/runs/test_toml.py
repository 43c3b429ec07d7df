"""Run files are read strictly, written completely, and read back equal."""

import dataclasses
import re

import pytest

from qlora_jax.data.examples import DataConfig
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.runs.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
)
from qlora_jax.runs.toml import read_config, to_toml
from qlora_jax.training.config import ParameterGroup, TrainConfig

RUN = """
[model]
path = "base"
[data]
path = "rows.jsonl"
[train]
steps = 10
"""


def read(tmp_path, text) -> RunConfig:
    (tmp_path / "run.toml").write_text(text)
    return read_config(tmp_path / "run.toml")


def test_a_missing_setting_has_its_default(tmp_path):
    config = read(tmp_path, RUN)
    assert config == RunConfig(
        model=ModelConfig("base"),
        data=DataConfig("rows.jsonl"),
        train=TrainConfig(steps=10),
    )


def test_values_have_the_types_of_their_fields(tmp_path):
    more = "learning_rate = 1\nmax_grad_norm = 'none'\n[log]\nplot = false\n"
    lora = "[lora]\nr = 4\ntarget_modules = ['q_proj']\nlora_alpha = 8\n"
    config = read(tmp_path, f'output_dir = "out"\n{RUN}{more}{lora}')
    assert config.train.learning_rate == 1.0
    assert type(config.train.learning_rate) is float
    assert config.train.max_grad_norm is None
    assert config.lora.target_modules == ("q_proj",)
    assert config.log.plot is False and config.output_dir == "out"


def test_features_of_peft_that_are_off_are_skipped(tmp_path):
    lora = "[lora]\ninit_lora_weights = true\ntask_type = 'CAUSAL_LM'\n"
    lora += "fan_in_fan_out = false\nlayer_replication = []\n"
    assert read(tmp_path, RUN + lora).lora == LoraConfig()


ODD = 'a "quoted" \\ path\twith\r\nodd\x7f näme """ \U0001f600\n'


SMALLEST = RunConfig(ModelConfig("base"), DataConfig("rows"), TrainConfig(steps=1))
EVERYTHING = RunConfig(
    model=ModelConfig(
        ODD,
        quantization="none",
        dtype="float16",
        remat="none",
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": (1.0, 1.25),
            "long_factor": (1.5, 2.0),
            "original_max_position_embeddings": 4096,
        },
    ),
    data=DataConfig(
        ODD, format="prompt_completion", seed=2**64 - 1, packing=True, shuffle=False
    ),
    train=TrainConfig(
        epochs=0.1, learning_rate=1e-30, max_grad_norm=None, adapter_init="a"
    ),
    lora=LoraConfig(
        r=3,
        lora_alpha=0.5,
        target_modules=r".*\.(q|k)_proj",
        rank_pattern={r"x\d+\.q_proj": 4, "it's": 1, 'say "x"': 2},
        alpha_pattern={"q_proj": 0.5},
        trainable_token_indices={"embed_tokens": (1, 2)},
    ),
    checkpoint=CheckpointConfig(every=7, keep=3),
    eval=EvalConfig(
        path=("a.jsonl", "b.jsonl"),
        early_stopping_patience=2,
        early_stopping_threshold=0.5,
        sample_prompts=('say "é"', "two\nlines"),
    ),
    log=LogConfig(1, False, ("tensorboard", "wandb"), run_name="third"),
    output_dir="läufe/1",
)


@pytest.mark.parametrize("config", [SMALLEST, EVERYTHING], ids=["defaults", "all"])
def test_a_written_file_reads_back_equal(tmp_path, config):
    assert read(tmp_path, to_toml(config)) == config
    # Nothing is left to a default that a later version may change.
    for section in dataclasses.asdict(config).values():
        for name, value in section.items() if isinstance(section, dict) else ():
            assert value is None or f"\n{name} = " in to_toml(config)


def test_the_run_file_of_the_docs_reads_back_equal(tmp_path, repository):
    text = (repository / "docs" / "training.md").read_text()
    (block,) = re.findall(r"^```toml\n(.*?)^```", text, re.S | re.M)
    config = read(tmp_path, block)
    first, second = config.train.groups
    assert first == ParameterGroup(r"layernorm|model\.norm", learning_rate=1e-6)
    assert second.lr_scheduler == "constant" and second.learning_rate is None
    assert config.model.config_changes == {
        "max_position_embeddings": 262144,
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
    }
    written = to_toml(config)
    assert read(tmp_path, written) == config
    assert written.count("[[train.groups]]") == 2
    message = "`groups` 1: `learnign_rate` is not an option here. Did you mean `learn"
    with pytest.raises(UserError, match=message):
        read(tmp_path, block.replace("learning_rate = 1e-6", "learnign_rate = 1e-6"))


EVAL = """
[eval]
fraction = 1.5
every = 0
early_stopping_threshold = 0.1
sample_every = 3
prompt = "{q}"
"""
EVAL_PROBLEMS = (
    "(?s)`prompt`: these apply to `path`, which is not set.*"
    "`fraction` must be between 0 and 1, got 1.5.*`every` must be at least 1, got 0.*"
    "`early_stopping_threshold` needs `early_stopping_patience`.*"
    "`sample_every` needs `sample_prompts`"
)
PATIENT = "[eval]\nearly_stopping_patience = 2\n"
FEATURES = "features .* not supported: "
ONE_OF = "must be one of 'constant', 'linear', 'cosine'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "run.toml` is not valid TOML: "),
        ("[modle]\npath='x'", "`modle` is not an option here. Did you mean `model`"),
        ("model = 3", "`model` must be a table, got 3"),
        ("[data]\npath='x'\n[train]\nsteps=1", r"missing `model`\. Write a table \[mo"),
        ("[model]\n", r"\[model\] missing `path`"),
        (
            RUN + "learning_rat = 1",
            r"\[train\] `learning_rat` is not an option here\. Did",
        ),
        (RUN + "frobnicate = 1", r"`frobnicate` is not an option here\. Options: st"),
        (RUN + "batch_size = '4'", "`batch_size` must be an integer, got '4'"),
        (RUN + "batch_size = true", "`batch_size` must be an integer, got True"),
        (RUN + "batch_size = 2.0", "`batch_size` must be an integer, got 2.0"),
        (RUN + "learning_rate = 'x'", "`learning_rate` must be a number, got 'x'"),
        (RUN + "lr_scheduler = 'step'", ONE_OF),
        (RUN + "lr_scheduler = 3", ONE_OF),
        (RUN + "[log]\nplot = 1", "`plot` must be true or false, got 1"),
        (
            RUN + "[lora]\ntarget_modules = [1]",
            r"`target_modules` must be a list of strings or a string, got \[1\]",
        ),
        (RUN + "epochs = 1", "give either `steps` or `epochs`"),
        (RUN + "[checkpoint]\nevery = 0", "checkpoint: `every` must be at least 1"),
        (RUN + "[log]\nevery = 0", "log: `every` must be at least 1, got 0"),
        (
            RUN + "[log]\nreport_to = ['comet']",
            "knows 'tensorboard', 'wandb', got 'comet'",
        ),
        (RUN + "[log]\nreport_to = ['wandb', 'wandb']", "repeats a name"),
        (RUN + EVAL, EVAL_PROBLEMS),
        (RUN + PATIENT, "needs data to measure"),
        (RUN + "[eval]\npath = 'a'\nexamples = 3", "give one of `path`, `examples`"),
        (
            RUN + PATIENT + "path = 'a'\nearly_stopping_threshold = nan",
            "`early_stopping_threshold` must be >= 0",
        ),
        (
            RUN + "[lora]\nlayer_replication = [[0, 2]]",
            FEATURES + r"`layer_replication`=\[\[0, 2\]\]",
        ),
        (
            RUN + "[lora]\ntarget_parameters = ['a.b']",
            FEATURES + r"`target_parameters`=\['a.b'\]",
        ),
        (
            RUN + "[lora]\nuse_qalora = true\nfan_in_fan_out = true",
            FEATURES + "`fan_in.*, `use_qalora`=True",
        ),
        (
            RUN + "[lora]\ntask_type = 'SEQ_CLS'",
            "`task_type` must be 'CAUSAL_LM'.*'SEQ_CLS'",
        ),
        (
            RUN + "[[data.sources]]\nwight = 1",
            r"sources` 1: `wight` is not an option .*`weight`",
        ),
        (RUN + "[[data.sources]]\nweight = 1", r"`sources` 1: missing `path`"),
        (RUN + "[data.sources]\npath = 'x'", "`sources` must be a list of tables"),
        (
            RUN + "[[data.sources]]\npath = 'x'",
            "`data.path` = 'rows.jsonl' and `data.sourc",
        ),
    ],
)
def test_a_problem_is_named_by_its_key(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nothing.toml` cannot be read: No such file"):
        read_config(tmp_path / "nothing.toml")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe4'")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_config(tmp_path / "latin.toml")


def test_a_mixture_is_written_as_tables_and_read_again(tmp_path):
    first = "path = ['a.jsonl', 'b.jsonl']\nweight = 2\n"
    second = "path = 'hf:some/thing'\nweight = 0.5\nformat = 'prompt_completion'\n"
    second += "completion = '{answer}'\nappend_eos = false\n"
    text = RUN.replace('path = "rows.jsonl"', "")
    table = "[[data.sources]]\n"
    config = read(tmp_path, text + table + first + table + second)
    first, second = config.data.sources
    assert (first.path, first.weight) == (("a.jsonl", "b.jsonl"), 2.0)
    assert second.append_eos is False and second.format == "prompt_completion"
    assert to_toml(config).count("[[data.sources]]") == 2
    assert read(tmp_path, to_toml(config)) == config
