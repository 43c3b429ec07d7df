import json
import stat
import sys

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import compile as module
from qlora_jax.planning.compile import (
    compile_for,
    find_compiler,
    how_to_get_the_compiler,
    main,
)
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import Step
from tests.models.reference import CONFIG

STEP = Step(CONFIG, Compute(lora=LoraConfig(r=4)), length=64)

MEMORY = {
    **{"base": 1, "adapters": 2, "optimizer": 3, "batch": 4, "activations": 5},
    **{"gradients": 6, "loss": 7, "temporaries": 8, "workspace": 9},
    **{"host_base": 10, "host_activations": 11},
}


def fake_python(tmp_path, body: str) -> str:
    """Writes a program that stands in for Python, called with `-c SOURCE FOLDER`."""
    path = tmp_path / "python"
    head = f"#!{sys.executable}\nimport json, os, sys\nfolder = sys.argv[-1]\n"
    path.write_text(head + body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_how_to_get_the_compiler_is_one_line_of_this_version():
    import jax

    line = how_to_get_the_compiler()
    assert "\n" not in line
    assert f"jax-cuda13-plugin=={jax.__version__}" in line
    assert "--no-deps" in line


def test_the_compiler_is_found_where_the_plugin_is(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert find_compiler() == sys.executable
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert find_compiler() is None


def test_another_python_is_checked_for_the_plugin(tmp_path):
    with pytest.raises(UserError, match="cannot be started"):
        find_compiler(str(tmp_path / "nowhere"))
    without = fake_python(
        tmp_path, "sys.exit('ModuleNotFoundError: No module named jax_cuda13_plugin')"
    )
    with pytest.raises(UserError, match="No module named jax_cuda13.*pip install"):
        find_compiler(without)


def test_step_and_gpu_reach_the_child_and_its_answer_is_returned(tmp_path):
    answer = {"memory": MEMORY, "sizes": {"arguments": 1}, "transfers": []}
    answer |= {"seconds": 0.5, "jax": "1.2.3", "counted": {"launches": 7}}
    python = fake_python(
        tmp_path,
        "request = json.load(open(folder + '/request.json'))\n"
        f"json.dump(request, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
        f"json.dump({answer!r}, open(folder + '/answer.json', 'w'))\n"
        "open(folder + '/program.txt', 'w').write('ENTRY')\n",
    )
    mesh = {"data": 2}
    made = compile_for(STEP, CARDS["l4"], python=python, mesh=mesh, program=True)
    assert made.memory.device_bytes == sum(range(1, 10))
    assert made.memory.host_bytes == 21
    assert (made.jax, made.program) == ("1.2.3", "ENTRY")
    assert made.counted == {"launches": 7}
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert Step.from_json(seen["step"]) == STEP
    assert seen["gpu"]["name"] == "l4"
    assert seen["mesh"] == {"data": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "print('LLVM ERROR: no', file=sys.stderr, flush=True)\nos.abort()\n",
            "for t4 was aborted by signal 6: LLVM ERROR: no.*estimate",
        ),
        (  # a UserError is raised unchanged
            "sys.exit('Trace:\\nqlora_jax.errors.UserError: `batch_size`=1 is odd.')",
            "^`batch_size`=1 is odd.$",
        ),
        ("", "stopped with status 0: no message"),
    ],
)
def test_a_child_without_an_answer_is_an_error(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        compile_for(STEP, CARDS["t4"], python=fake_python(tmp_path, body))


def test_a_child_that_takes_too_long_is_stopped(tmp_path):
    python = fake_python(tmp_path, "import time\ntime.sleep(60)\n")
    with pytest.raises(UserError, match="took longer than 1 s"):
        compile_for(STEP, CARDS["l4"], python=python, timeout=1)


def test_the_module_needs_a_folder(capsys):
    assert main([]) == 2
    assert "usage: python -m qlora_jax.planning.compile" in capsys.readouterr().err
