"""The commands as users call them: what they print, what they return, how they fail.

A failure is one paragraph on stderr that names what is wrong, and status 1; wrong usage
is status 2.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.cli.generate import Chat
from qlora_jax.cli.main import main
from qlora_jax.cli.options import join_lines
from qlora_jax.data.batches import eval_batches
from qlora_jax.data.examples import DataConfig, load_examples
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.runs.config import ModelConfig, RunConfig
from qlora_jax.runs.loading import load
from qlora_jax.runs.toml import read_config
from qlora_jax.training.config import TrainConfig
from qlora_jax.tree import PROJECTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model_dir(llama_dir, tmp_path):
    """A copy of the small model, to be damaged."""
    return Path(shutil.copytree(llama_dir, tmp_path / "model"))


@pytest.fixture
def out(tmp_path):
    """The output of the runs of `settings`."""
    return tmp_path / "run"


@pytest.fixture
def settings(tmp_path, out, model_dir, rows_file):
    """A run file for `model_dir`; settings after those of `[train]` can be added."""

    def write(more="", rows=rows_file):
        file = tmp_path / "settings.toml"
        file.write_text(
            f'output_dir = "{out}"\n'
            f'[model]\npath = "{model_dir}"\ndtype = "float32"\n'
            f'[data]\npath = "{rows}"\nformat = "tokens"\nmax_length = 64\n'
            f"[train]\nsteps = 2\nbatch_size = 2\n{more}\n"
        )
        return file

    return write


def paragraph(err: str, command: str) -> str:
    """The failure: the last line of stderr, and no traceback before it."""
    assert "Traceback" not in err and "PyTorch" not in err
    last = err.splitlines()[-1]
    assert last.startswith(f"qlora-jax {command}: ")
    return last


@pytest.fixture
def refused(cli, out):
    """A function: a message and arguments -> a failure of one paragraph, and no run."""

    def refused(message, command, *args):
        status, text, err = cli(command, *args)
        assert status == 1 and text == ""
        assert message in paragraph(err, command)
        assert not (out / "config.toml").exists()

    return refused


# --- usage ---


def test_a_mistyped_command_is_status_2(cli):
    assert cli()[0] == 2
    status, _, err = cli("tain")
    assert status == 2 and "no command 'tain'. Did you mean `train`?" in err


@pytest.mark.parametrize(
    "args",
    [
        ["train"],
        ["train", "--frobnicate"],
        ["inspect"],
        ["inspect", "x", "--lora.rank", "3"],
        ["inspect", "x", "--lora.r", "three"],
        ["inspect", "x", "--lora.r", "0"],
        ["inspect", "x", "--dtype", "float64"],
    ],
)
def test_wrong_usage_is_status_2(cli, args):
    status, out, err = cli(*args)
    assert status == 2 and out == "" and err and "Traceback" not in err


def test_an_option_of_the_command_line_wins(cli, settings, tmp_path):
    file = settings("learning_rate = 0.5")
    options = ["--train.learning-rate", "0.25", "--lora.target-modules", "all-linear"]
    assert cli("train", file, *options, "--output-dir", tmp_path / "r")[0] == 0
    config = read_config(tmp_path / "r" / "config.toml")
    assert config.train.learning_rate == 0.25
    assert config.lora.target_modules == "all-linear"


def test_a_run_needs_no_file(cli, out, model_dir, rows_file):
    options = [
        *("--output-dir", out, "--model.path", model_dir, "--data.path", rows_file),
        *("--data.format", "tokens", "--train.steps", 1),
    ]
    assert cli("train", *options)[0] == 0
    config = read_config(out / "config.toml")
    assert config.model.quantization == "nf4_dq" and config.train.steps == 1


# --- train and what comes after ---


def test_train_then_ask_about_the_run(cli, settings, out, refused, rows_file):
    status, text, err = cli("train", settings("learning_rate = 0.01"))
    assert status == 0 and "step 2/2" in err
    assert f"{out / 'adapter'}" in text and "trained parameters" in text
    assert text.endswith(f"qlora-jax merge {out} merged\n")
    report = json.loads((out / "report.json").read_text())

    # inspect: the same counts, from the configuration alone.
    counted = json.loads(cli("inspect", out, "--json")[1])
    names = "trainable_parameters groups adapter_bytes optimizer_bytes base_bytes"
    for name in names.split():
        assert counted[name] == report[name]
    status, text, _ = cli("inspect", out)
    assert status == 0 and f"{report['trainable_parameters']:,}" in text

    # eval: the base as it was trained (nf4_dq, float32), against a plain computation.
    data = ["--data.path", rows_file, "--data.format", "tokens"]
    status, text, _ = cli("eval", out, *data, "--json", "--batch-size", "5")
    result = json.loads(text)
    model = load(out, quantization="nf4_dq", dtype="float32")
    config = DataConfig(path=str(rows_file), format="tokens")
    examples = load_examples(config, None, vocab_size=32)
    total = count = 0
    for batch in eval_batches(examples, config, batch_size=24, pad_token_id=0):
        logits = np.asarray(model.logits(batch["tokens"]), np.float64)[:, :-1]
        labels = batch["labels"][:, 1:]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0]
        total -= picked[labels != -100].sum()
        count += int((labels != -100).sum())
    # Unless told otherwise the run's own data settings and computation are taken.
    assert load(out).compute == model.compute
    assert load(out).description == model.description
    assert result["data"] == str(rows_file)
    assert result["measured"] == "as given: training data of the run"
    assert result["supervised_tokens"] == count == report["data"]["supervised_tokens"]
    assert result["rows"] == 24
    assert result["loss"] == pytest.approx(total / count, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    status, text, err = cli("eval", out / "adapter", *data[:2], "--batch-size=5")
    assert f"{result['loss']:.6g}" in text and "NF4, double-quantized" in err
    # It held nothing out; the help is there all the same.
    status, _, err = cli("eval", out, "--json")
    message = paragraph(err, "eval")
    assert status == 1 and "held nothing out" in message and str(rows_file) in message
    assert cli("eval", out, "--help")[0] == 0

    # merge: onto what it was trained on, and then eval of that, as it is stored, is
    # eval of the run.
    merged = out.with_name("merged")
    _, text, _ = cli("merge", out, merged, "--json")
    report = json.loads(text)
    assert (report["onto"], report["quantization"]) == ("dequantized", "nf4_dq")
    assert report["trained_on_this_base"] is True
    _, text, err = cli("eval", merged, *data, "--json", "--batch-size", "5")
    assert json.loads(text)["loss"] == pytest.approx(result["loss"], abs=1e-5)
    assert "linear layers dense; computed in float32" in err

    # Without its tokenizer a run cannot be asked for text, and says so.
    status, _, err = cli("generate", out, "--prompt", "Once")
    assert status == 1 and "has no tokenizer" in paragraph(err, "generate")


def test_variables_of_the_template_are_those_of_the_run_and_options_win(capsys):
    data = DataConfig(
        path="rows",
        format="messages",
        chat_template_kwargs={"enable_thinking": False, "style": "short"},
    )
    run = RunConfig(ModelConfig("base"), data, TrainConfig(steps=1))
    options = Chat(path="run", chat_template_kwargs='{"style": "long"}')
    variables = options.template_settings(run)["chat_template_kwargs"]
    assert variables == {"enable_thinking": False, "style": "long"}
    assert '"enable_thinking": false' in capsys.readouterr().err
    assert Chat(path="run").template_settings(None)["chat_template_kwargs"] is None


@pytest.mark.real
def test_generate_prints_prompt_and_continuation(cli, shared_data):
    path = shared_data / "stories260K"
    stored = json.loads((path / "greedy.json").read_text())[:2]
    prompts, texts = ([row[key] for row in stored] for key in ("prompt", "text"))
    exact = ["--max-new-tokens", "60"]  # as it is stored
    status, out, err = cli("generate", path, *exact, "--prompt", *prompts)
    assert status == 0
    assert err == f"`{path}`: linear layers dense; computed in float32.\n"
    assert out == "\n\n".join(texts) + "\n"
    _, out, _ = cli("generate", path, *exact, "--json", "--prompt", *prompts)
    assert json.loads(out) == {"texts": texts}


def test_quantize_writes_what_loads(cli, refused, model_dir, tmp_path):
    status, out, _ = cli("quantize", model_dir, tmp_path / "q", "--json")
    assert status == 0 and json.loads(out)["ratio"] < 0.6
    packed = convert.load_llama(tmp_path / "q", quantization=None)[1]
    direct = convert.load_llama(model_dir, quantization="nf4_dq")[1]
    jax.tree.map(np.testing.assert_array_equal, packed, direct)
    refused("is not empty", "quantize", model_dir, tmp_path / "q")
    twice = tmp_path / "twice"
    refused("is quantized already", "quantize", tmp_path / "q", twice)
    assert not twice.exists()


# --- what users get wrong ---


def remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def rename_architecture(path: Path) -> None:
    raw = json.loads((path / "config.json").read_text())
    raw |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(raw))


def put_nan(path: Path) -> None:
    tensors = dict(safetensors.numpy.load_file(path / "model.safetensors"))
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "has no weights"),
        (put_nan, "`model.norm.weight` contains NaN or infinity"),
        (rename_architecture, "model_type='mamba' is not supported"),
    ],
)
def test_a_damaged_model_is_named(refused, settings, model_dir, out, damage, message):
    damage(model_dir)
    refused(message, "train", settings())
    assert not out.exists()


GOOD = '{"input_ids": [1, 2], "labels": [1, 2]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "\n[1]", ":3: a row must be a JSON object"),
        ('{"text": "x"}', ":1: "),
        ('{"input_ids": [1, 2, 99], "labels": [1, 2, 99]}', "99"),
        ('{"input_ids": [1, 2], "labels": [-100, -100]}', "labels"),
        (None, "there is no file"),
    ],
)
def test_bad_rows_are_named(refused, settings, tmp_path, out, content, message):
    rows = tmp_path / "mine.jsonl"
    if content is not None:
        rows.write_text(content)
    refused(message, "train", settings(rows=rows))
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "eval", "data"])
@pytest.mark.parametrize("found", [True, False])
def test_paths_of_a_run_are_relative_to_where_it_was_started(
    cli, settings, out, tmp_path, monkeypatch, rows_file, command, found
):
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    file = settings("[eval]\nfraction = 0.2", rows="rows.jsonl")
    monkeypatch.chdir(tmp_path)
    if command == "eval":
        assert cli("train", file, "--train.steps", "1")[0] == 0
    else:
        out.mkdir()
        file.rename(out / "config.toml")
    file = out / "config.toml"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if not found:
        (tmp_path / "rows.jsonl").unlink()
    status, _, err = cli(command, out if command == "eval" else file)
    assert status == 1 and "there is no file rows.jsonl" in err
    assert f"`data.path` = 'rows.jsonl' is a relative path of `{file}`" in err
    assert (
        f"current directory, `{tmp_path / 'elsewhere'}`" in err
        and "--data.path" in (err)
    )
    start = f"`{tmp_path}`" if found else "the directory where the run was started"
    assert f"Start the command in {start}, or give" in err
    # Where nothing is elsewhere, it is a file that is missing.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").unlink(missing_ok=True)
    assert "relative" not in cli(command, out if command == "eval" else file)[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.00.pth", "the original format of Meta's"),
        ("q4.gguf", "It has GGUF files (q4.gguf)"),
        ("adapter_config.json", "a PEFT adapter, not a model"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "plan", "generate", "quantize", "data"])
def test_what_a_directory_is_instead_of_a_model_is_said(
    refused, tmp_path, rows_file, command, name, message
):
    directory = tmp_path / "other"
    directory.mkdir()
    (directory / name).write_text("{}")
    if name == "adapter_config.json" and command in ("inspect", "generate"):
        return  # it is an adapter to them
    words = {
        "inspect": [directory],
        "plan": ["--model", directory, "--gpu", "l4", "--max-length", "64"],
        "generate": [directory, "--prompt", "a"],
        "quantize": [directory, tmp_path / "out"],
        "data": ["--model", directory, "--data.path", rows_file],
    }[command]
    if name == "adapter_config.json" and command == "plan":
        message = "adapter_config.json: `peft_type` is None"
    refused(message, command, *words)


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_the_model_of_a_run_is_found_from_elsewhere(
    cli, settings, tmp_path, model_dir, monkeypatch, command
):
    there = tmp_path / "there"
    shutil.copytree(model_dir, there / "base")
    file = settings()
    file.write_text(file.read_text().replace(str(model_dir), "base"))
    run = there / "run"
    run.mkdir()
    shutil.copy(file, run / "config.toml")
    options = ["--gpu", "l4", "--method", "estimate"] * (command == "plan")
    monkeypatch.chdir(there)
    status, want, err = cli(command, "run/config.toml", *options, "--json")
    assert status == 0 and "leads nowhere" not in err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, got, err = cli(command, run / "config.toml", *options, "--json")
    assert status == 0 and got == want
    assert f"is read as `{there / 'base'}`" in err
    # The run file of a run that has not started leads nowhere; the message says where.
    shutil.move(run / "config.toml", there / "mine.toml")
    status, _, err = cli(command, there / "mine.toml", *options)
    assert status == 1 and "`model.path` = 'base' is a relative path" in err
    option = {"plan": "--model", "inspect": "--base"}[command]
    assert f"Start the command in `{there}`, or give {option}." in err
    assert "data.path" not in err
    # Nothing beside the run either.
    (there / "mine.toml").rename(run / "config.toml")
    shutil.rmtree(there / "base")
    status, _, err = cli(command, run / "config.toml", *options)
    assert status == 1 and "the directory where the run was started" in err


def test_rows_that_are_too_long_are_counted(cli, settings, tmp_path, out):
    rows = tmp_path / "mine.jsonl"
    numbers = ([1] * length for length in (5, 70, 90, 8))
    lines = (json.dumps({"input_ids": ids, "labels": ids}) for ids in numbers)
    rows.write_text("\n".join(lines))
    status, _, err = cli("train", settings(rows=rows))
    assert status == 0 and "2 rows truncated (32 tokens lost)" in err
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["truncated"] == 2 and report["data"]["longest_row"] == 90


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("learning_rat = 1", "`learning_rat` is not an option here. Did you mean"),
        ("batch_size = 3", "not valid TOML"),  # given twice
        ("warmup_steps = 3", "`warmup_steps`=3 exceeds `steps`=2"),
        ("[lora]\ntarget_modules = ['query']", "matches no linear module"),
        ("[lora]\nr = '8'", "`r` must be an integer, got '8'"),
        ("adapter_init = 'nowhere'", "`nowhere` does not exist"),
    ],
)
def test_settings_that_cannot_be_used(refused, settings, out, more, message):
    refused(message, "train", settings(more))
    assert not out.exists()


@pytest.fixture
def adapter(model_dir, tmp_path):
    """A PEFT directory of rank 4 for `model_dir`."""
    config, base = convert.load_llama(model_dir)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
    adapters = jax.device_get(init_adapters(jax.random.key(0), base, lora))
    name = {"base_model_name_or_path": "../model"}
    convert.save_adapter(tmp_path / "adapter", lora, adapters, config, **name)
    return tmp_path / "adapter"


def test_settings_must_fit_the_initial_adapter(cli, refused, settings, out, adapter):
    """A default that someone wrote down counts as well as any other value."""
    init = f"adapter_init = '{adapter}'"
    for text, options in (
        (f"{init}\n[lora]\nr = 16\nuse_dora = false", []),
        (init, ["--lora.r", "16", "--lora.no-use-dora"]),
        (init, ["--lora.r=16"]),
    ):
        refused("`r`=16 (the adapter's: 4). Leave", "train", settings(text), *options)
        assert not out.exists()
    alpha = f"{init}\n[lora]\nlora_alpha = 16\nrank_pattern = {{'q_proj' = 4}}"
    status, _, err = cli("train", settings(alpha))
    assert status == 0 and "Changed: lora_alpha 8 -> 16." in err
    lora = read_config(out / "config.toml").lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 16, 0.1)


def test_the_help_explains_joins_lines_and_hides_what_only_runs_set(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = cli("train", "--help")
    text = " ".join(text.replace("│", " ").split())
    assert "Its configuration replaces `[lora]`" in text
    # Each is in two lines of the source.
    sentences = {
        "train": " auto = the fastest policy that fits the device, which a continued ",
        "inspect": " where options win; or an adapter or run directory, ",
    }
    for command, sentence in sentences.items():
        _, text, _ = cli(command, "--help")
        assert sentence in text
        assert "base-fingerprint" not in text and "base-config-changes" not in text
    assert join_lines("one\n    two.\n\n    three") == "one two.\n\n    three"
    assert join_lines(lambda: None) is None


def test_an_adapter_is_inspected_as_it_is(cli, refused, adapter):
    status, out, _ = cli("inspect", adapter, "--lora.r", "4", "--json")
    assert status == 0 and json.loads(out)["r"] == 4
    message = "`r`=2 (the adapter's: 4), `lora_alpha`=16 (the adapter's: 8)."
    refused(message, "inspect", adapter, "--lora.lora-alpha", "16", "--lora.r=2")


def test_a_run_file_is_inspected_and_options_win(cli, settings, model_dir, adapter):
    more = '[lora]\nr = 2\nlora_alpha = 6\ntarget_modules = ["q_proj"]\n'
    file = settings('optimizer = "lion"\n' + more)
    status, out, _ = cli("inspect", file, "--json")
    assert status == 0
    options = ["--lora.r", "2", "--lora.target-modules", "q_proj", "--lora.lora-alpha"]
    options += ["6", "--optimizer", "lion", "--dtype", "float32", "--json"]
    report = json.loads(out)
    assert report == json.loads(cli("inspect", model_dir, *options)[1])
    status, out, _ = cli("inspect", file, "--lora.r", "1", "--dtype=float16", "--json")
    other = json.loads(out)
    assert (other["r"], other["lora_alpha"], other["dtype"]) == (1, 6, "float16")
    assert other["trainable_parameters"] == report["trainable_parameters"] / 2
    # A run that starts from an adapter takes its settings.
    status, out, _ = cli("inspect", settings(f'adapter_init = "{adapter}"'), "--json")
    assert status == 0 and json.loads(out)["r"] == 4


def test_inspect_warns_as_a_run_does(cli, model_dir):
    options = ["--lora.target-modules", "q_prj", "v_proj", "--lora.bias", "all"]
    options += ["--lora.layers-to-transform", "1", "7"]
    status, out, _ = cli("inspect", model_dir, *options, "--json")
    assert status == 0
    assert json.loads(out)["warnings"][:3] == [
        "target module 'q_prj' selects nothing in this model. Did you mean `q_proj`?",
        "`layers_to_transform` names 7; this model has layers 0 to 1.",
        "`bias`='all' trains nothing: this model has no biases.",
    ]


@pytest.mark.parametrize(
    ("options", "ranks", "alphas"),
    [
        ("", {"v_proj": 2}, {"[qv]_proj": 3}),
        ("--lora.rank-pattern q_proj 4", {"q_proj": 4}, {"[qv]_proj": 3}),
        (
            "--lora.alpha_pattern q_proj 4 v_proj 1.5",
            {"v_proj": 2},
            {"q_proj": 4, "v_proj": 1.5},
        ),
    ],
)
def test_an_option_replaces_patterns(cli, settings, out, options, ranks, alphas):
    lora = "[lora]\ntarget_modules = ['q_proj', 'v_proj']\n"
    patterns = "rank_pattern = {'v_proj' = 2}\nalpha_pattern = {'[qv]_proj' = 3}\n"
    file = settings(lora + patterns)
    assert cli("train", file, *options.split(), "--train.steps", "1")[0] == 0
    config = read_config(out / "config.toml").lora
    assert (config.rank_pattern, config.alpha_pattern) == (ranks, alphas)


def test_text_needs_a_tokenizer(refused, settings, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time.")
    file = settings(rows=tmp_path / "text.txt")
    refused("has no tokenizer", "train", file, "--data.format", "text")


def test_a_directory_that_is_not_a_run_is_never_written_to(refused, settings, out):
    out.mkdir()
    (out / "mine").write_text("mine")
    refused("is not empty and holds no run", "train", settings())
    refused("mine` is a file", "train", settings(), "--output-dir", out / "mine")
    refused("`/proc/run` cannot be", "train", settings(), "--output-dir", "/proc/run")
    assert [p.name for p in out.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "command, more",
    [
        ("eval", ["--data.path", "x"]),
        ("generate", ["--prompt", "x"]),
        ("inspect", []),
        ("quantize", ["out"]),
    ],
)
def test_a_path_that_is_not_there(refused, command, more, tmp_path):
    refused("nowhere` does not exist", command, tmp_path / "nowhere", *more)


@pytest.mark.real
def test_a_damaged_tokenizer_through_the_command(shared_data, tmp_path):
    """In a process of its own, where transformers is imported for the first time."""
    model = Path(shutil.copytree(shared_data / "stories260K", tmp_path / "model"))
    os.chmod(model, 0o755)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").write_text(text[:1000])
    program = [sys.executable, "-m", "qlora_jax.cli"]
    command = [*program, "generate", model, "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "The tokenizer in" in paragraph(done.stderr, "generate")


def test_a_reader_that_goes_away_is_no_error(model_dir):
    command = f"{sys.executable} -m qlora_jax.cli inspect {model_dir} | head -c 1"
    shell = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        *("report {}", "train {}", "data {}", "generate {} x", "inspect {}"),
        *("eval {}", "tokens {}", "quantize {} {}2", "train --model.path {}"),
    ],
)
def test_a_path_that_the_system_refuses_is_one_clear_error(args, capsys):
    status = main(args.format("x" * 5000, "x" * 5000).split())
    err = capsys.readouterr().err
    assert status in (1, 2) and "Traceback" not in err and err


def test_a_name_that_is_not_utf8_is_one_clear_error(refused, settings, tmp_path):
    name = "\udce9t\udce9"  # what Python makes of Latin-1 bytes
    out = tmp_path / name
    message = "rename what is not, or set a UTF-8 locale"
    refused(message, "train", settings(), "--output-dir", out)
    assert not out.exists()


def test_inspect_lists_the_targets_that_the_model_has(cli, llama_dir):
    _, text, _ = cli("inspect", llama_dir, "--json")
    assert json.loads(text)["target_modules"] == list(PROJECTIONS)


def test_what_is_spelled_or_left_out_as_elsewhere_is_named(cli, llama_dir, tmp_path):
    _, _, error = cli("plan", "--model.path", llama_dir, "--gpu", "l4")
    assert "no option `--model.path`. Here it is `--model`." in error
    status, _, error = cli("eval", llama_dir)
    assert status == 2 and "--data.path FILE" in " ".join(error.split())
    raw = json.loads((llama_dir / "config.json").read_text())
    text = {**raw, "model_type": "gemma3_text"}
    outer = {"model_type": "gemma3", "text_config": text}
    for kind, said in ((outer, "model of images and text"), (raw, "")):
        (tmp_path / "config.json").write_text(json.dumps(kind))
        _, _, error = cli("inspect", tmp_path)
        assert (said in " ".join(error.split())) and bool(said) == ("images" in error)
