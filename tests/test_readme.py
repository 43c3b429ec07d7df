"""What the README says, done: its Python runs, its settings are read, its commands,
options, targets and files exist."""

import contextlib
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
from qlora_jax.lora_config import LoraConfig
from qlora_jax.lora_init import init_adapters
from qlora_jax.runfile import read_config

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MAINS = {"qlora-jax": jax_main, "qlora-convert": convert_main}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


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


def test_the_python_example_runs(directories):
    (example,) = blocks("python")
    model, adapter = directories
    for written, real in (
        ("path/to/hf-llama", model),
        ("path/to/peft-adapter", adapter),
    ):
        assert example.count(f'"{written}"') == 1
        example = example.replace(written, str(real))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert int(lines[0]) > 0
    assert lines[1].startswith("Once upon a time")
    assert lines[-1].startswith("(1, ")


def test_every_command_is_shown():
    shown = {tuple(words[:2]) for words in of("qlora-jax", "qlora-convert")}
    assert shown >= {
        *(("qlora-jax", name) for name in ("train", "eval", "generate", "inspect")),
        ("qlora-jax", "quantize"),
        *(("qlora-convert", name) for name in ("adapter", "merge", "model", "verify")),
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


def test_the_run_file_is_read(tmp_path):
    (text,) = blocks("toml")
    path = tmp_path / "run.toml"
    path.write_text(text)
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
