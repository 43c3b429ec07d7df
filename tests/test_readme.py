"""What the README says, done: its Python runs, its settings are read, its commands,
options, targets and files exist."""

import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import convert
from qlora_jax.cli import main as jax_main
from qlora_jax.convert_cli import main as convert_main
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.layers import Embed, Linear, RMSNorm
from qlora_jax.runs.toml import read_config

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MAINS = {"qlora-jax": jax_main, "qlora-convert": convert_main}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def part_of_a_run_file(table: str) -> str:
    """The first run file, with the lines of one more table under its heading."""
    heading, lines = table.split("\n", 1)
    whole = blocks("toml")[0]
    assert heading in whole.splitlines()
    return whole.replace(f"{heading}\n", f"{heading}\n{lines}", 1)


def commands() -> list[list[str]]:
    """Every command line of the sh blocks, continued lines joined, comments cut."""
    found = []
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


def of(*programs: str) -> list[list[str]]:
    return [words for words in commands() if words[0] in programs]


@pytest.fixture
def directories(repository, tmp_path) -> tuple[Path, Path]:
    """A model directory and an adapter directory that leads to it."""
    data = repository.parent / "shared" / "data"
    if data.is_dir():
        return (
            data / "stories260K",
            data / "adapters" / "stories260K-lora-r8-shakespeare",
        )
    subprocess.run(
        [
            *(sys.executable, str(repository / "scripts/story_model.py")),
            *("--output", str(tmp_path), "--steps", "2"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    config, base = convert.load_llama(tmp_path / "base")
    lora = LoraConfig(r=4)
    convert.save_adapter(
        tmp_path / "adapter",
        lora,
        init_adapters(jax.random.key(0), base, lora),
        config,
        base_model_name_or_path="base",
    )
    return tmp_path / "base", tmp_path / "adapter"


def printed_by(example: str, directories) -> list[str]:
    """Lines that an example prints, run on directories that are here."""
    for written, real in zip(
        ("path/to/hf-llama", "path/to/peft-adapter"), directories, strict=True
    ):
        example = example.replace(f'"{written}"', repr(str(real)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    return printed.getvalue().splitlines()


def test_the_first_python_example(directories):
    lines = printed_by(blocks("python")[0], directories)
    assert int(lines[0]) > 0
    assert lines[1].startswith("Once upon a time")
    assert lines[-1].startswith("(1, ")


def test_the_python_example_of_a_layer_of_ones_own(directories):
    (example,) = (block for block in blocks("python") if "GatedAttention" in block)
    (line,) = printed_by(example, directories)
    assert ", 4, " in line  # the rank that `rank_pattern` gives it


def test_the_python_example_of_a_run(directories, tmp_path, monkeypatch):
    (example,) = (block for block in blocks("python") if "RunConfig" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog.\n" * 40)
    (line,) = printed_by(example, directories)
    assert line.startswith("2 ")
    one, two = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("python-run/adapter", "python-adapter")
    )
    assert one == two


@pytest.mark.parametrize("module", [Linear, Embed, RMSNorm])
def test_the_modules_to_build_with_are_as_shown(module):
    (shown,) = re.findall(rf"^\| `{module.__name__}\((.*)\)` \|", README, re.M)
    parameters = list(inspect.signature(module).parameters.values())
    own = parameters[: [p.name for p in parameters].index("parent")]
    for parameter, text in zip(own, shown.split(", "), strict=True):
        name, _, default = text.partition("=")
        assert parameter.name == name
        if default:
            assert repr(parameter.default) == default


def test_the_python_example_of_several_adapters(directories):
    (example,) = (block for block in blocks("python") if "stack_adapters" in block)
    (line,) = printed_by(example, directories)
    rank, _, shape = line.partition(" ")
    assert int(rank) in (8, 16) and shape.startswith("(3, ")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers', of itself
def test_the_python_example_with_peft(directories, tmp_path, monkeypatch, capsys):
    """Our run, continued from an adapter of PEFT, loaded by PEFT."""
    (example,) = (block for block in blocks("python") if "import PeftModel" in block)
    model, adapter = directories
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories260K").symlink_to(model)
    text = "ROMEO: what is it that you say?\n" * 400
    (tmp_path / "shakespeare.txt").write_text(text)
    (settings,) = (b for b in blocks("toml") if "adapter_init" in b)
    settings = settings.replace('"peft-adapter"', repr(str(adapter)))
    (tmp_path / "more.toml").write_text(settings)
    assert jax_main(["train", "more.toml", "--train.steps", "2"]) == 0
    lines = printed_by(example, directories)
    assert float(lines[-1]) < 3e-5


def test_every_command_is_shown():
    shown = {tuple(words[:2]) for words in of("qlora-jax", "qlora-convert")}
    assert shown >= {
        *(("qlora-jax", name) for name in ("train", "eval", "generate", "inspect")),
        ("qlora-jax", "chat"),
        ("qlora-jax", "quantize"),
        ("qlora-jax", "tokens"),
        ("qlora-jax", "plan"),
        ("qlora-jax", "report"),
        *(("qlora-convert", name) for name in ("adapter", "merge", "model", "verify")),
        ("qlora-convert", "combine"),
    }


@pytest.mark.parametrize(
    "words", of("qlora-jax", "qlora-convert"), ids=lambda words: " ".join(words[:3])
)
def test_every_command_and_option_exists(words, capsys):
    program, name = words[:2]
    try:
        status = MAINS[program]([name, "--help"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0
    known = set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
    assert used <= known


@pytest.mark.parametrize("text", blocks("toml"))
def test_a_run_file_is_read(text, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(text if "output_dir" in text else part_of_a_run_file(text))
    config = read_config(path)
    assert config.model.path == "stories260K"
    assert config.train.steps is not None


def test_every_make_target_exists(repository):
    makefile = (repository / "Makefile").read_text()
    used = {words[1] for words in of("make")}
    assert used >= {"demo", "test"}
    for target in used:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_script_and_linked_file_exists(repository):
    named = {word for words in of("python") for word in words if word.endswith(".py")}
    named |= set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
    missing = [name for name in named if not (repository / name).is_file()]
    assert not missing
