"""Help and typing errors answer at once; a command imports what it needs."""

import subprocess
import sys

import pytest

from qlora_jax.cli.convert import QLORA_CONVERT
from qlora_jax.cli.main import QLORA_JAX, dispatch

COMMANDS = [(p, name) for p in (QLORA_JAX, QLORA_CONVERT) for name in p.commands]
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers"}


def imported(module: str, *args: str) -> set[str]:
    """Top-level packages that a command imports before it ends."""
    program = (
        "import sys\n"
        f"from qlora_jax.cli.{module} import main\n"
        f"main({list(args)})\n"
        "print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.decode().splitlines()[-1].split())


@pytest.mark.parametrize("module", ["main", "convert"])
@pytest.mark.parametrize("args", [[], ["--help"], ["trian"]])
def test_help_and_typing_errors_import_no_library(module, args):
    assert not (HEAVY | {"numpy", "rich", "tyro"}) & imported(module, *args)


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_the_help_of_a_command_imports_no_large_library(program, name):
    module = "main" if program is QLORA_JAX else "convert"
    assert not HEAVY & imported(module, name, "--help")


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_the_help_of_a_command_begins_with_its_summary(program, name, capsys):
    assert dispatch(program, [name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f" {program.commands[name].summary} " in text
    assert f"usage: {program.name} {name} " in text


@pytest.mark.parametrize("program", [QLORA_JAX, QLORA_CONVERT])
def test_a_program_lists_its_commands(program, capsys):
    assert dispatch(program, ["--help"]) == 0
    out, err = capsys.readouterr()
    for name, command in program.commands.items():
        assert f"\n  {name:<10}{command.summary}\n" in out
        assert len(f"  {name:<10}{command.summary}") <= 80
    assert err == ""
    assert dispatch(program, []) == 2
    assert capsys.readouterr() == ("", out)


def test_a_mistyped_command_gets_the_nearest_one(capsys):
    assert dispatch(QLORA_CONVERT, ["mrege"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qlora-convert: no command 'mrege'. Did you")
    assert "mean `merge`?\n\nusage: qlora-convert COMMAND" in err
