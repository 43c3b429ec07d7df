"""The notebooks run from first cell to last and have the cells of their sources."""

import json
import os
import runpy
import subprocess
import sys

import pytest

SOURCE = '''"""A comment."""

# %% [markdown]
# # Title
#
# Text.

# %%
print("one")
x = 3
x

# %%
import matplotlib.pyplot as plt

plt.plot([1, 2])
plt.title("two");

# %%
print(x / 0)
'''


@pytest.fixture(scope="module", name="runner")
def script(repository):
    """Returns the names of the script, which sets environment variables."""
    before = dict(os.environ)
    yield runpy.run_path(str(repository / "docs/tooling/run_notebooks.py"))
    os.environ.clear()
    os.environ.update(before)


def test_a_source_as_cells_and_outputs(runner, tmp_path, capsys):
    file = tmp_path / "01.py"
    file.write_text(SOURCE.rpartition("# %%")[0])
    cells, outputs, figures = runner["run_notebook"](file, False)
    where = [(cell.is_code, cell.line) for cell in cells]
    assert where == [(False, 4), (True, 9), (True, 14)]
    assert cells[0].text == "# Title\n\nText."
    text, value = outputs[1]
    assert text["text"] == ["one\n"] and value["data"]["text/plain"] == ["3"]
    (picture,) = outputs[2]  # a value is not shown after a semicolon
    assert picture["output_type"] == "display_data" and len(figures) == 1
    assert figures[0].startswith(b"\x89PNG")

    ipynb = file.with_suffix(".ipynb")
    assert runner["check"](file, cells) == "01.ipynb is missing"
    ipynb.write_text(runner["notebook"](cells, outputs))
    assert runner["check"](file, cells) is None
    content = json.loads(ipynb.read_text())
    kinds = [cell["cell_type"] for cell in content["cells"]]
    assert kinds == ["markdown", "code", "code"]
    assert content["cells"][1]["execution_count"] == 1
    content["cells"][2]["source"][0] = "another\n"
    ipynb.write_text(json.dumps(content))
    assert "has other cells than 01.py" in runner["check"](file, cells)


def test_a_cell_that_fails_is_named(runner, tmp_path, capsys):
    file = tmp_path / "02.py"
    file.write_text(SOURCE)
    with pytest.raises(SystemExit, match="02.py: the cell at line 20 failed"):
        runner["run_notebook"](file, False)
    assert "line 20" in capsys.readouterr().err


def test_a_quick_run_trains_for_a_fifth_of_the_steps(runner, repository, capsys):
    shorten = runner["shorten"]
    for code, shorter in (
        ("qj.TrainConfig(steps=120, warmup_steps=10,", "steps=24, warmup_steps=10,"),
        ('"--output", work,\n"--steps", "400"]', '"--steps", "80"]'),
        ("STEPS, ROWS = 70, 16", "STEPS, ROWS = 14, 16"),
        ('stage("both", QUESTIONS, 80, 3e-3)', "QUESTIONS, 16, 3e-3)"),
    ):
        assert shorten(code).endswith(shorter)
    # Every notebook that trains writes its steps in one of these forms.
    for file in (repository / "notebooks").glob("[0-9]*.py"):
        code = file.read_text()
        assert (shorten(code) != code) == ("TrainConfig" in code)
    assert runner["main"](runner["Args"](quick=True)) == 1
    assert "`--quick` needs `--check`" in capsys.readouterr().err


@pytest.mark.slow
def test_the_notebooks_run(repository, tmp_path):
    """All of them, in another process; the folder stays as it is.

    With a fifth of the training steps, which are most of the time: `--check` alone runs
    them all.
    """
    before = {file.name for file in (repository / "notebooks").iterdir()}
    command = [sys.executable, "docs/tooling/run_notebooks.py", "--check", "--quick"]
    # The notebooks compile many programs twice: they train and load the same model.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    settings = {"capture_output": True, "text": True, "cwd": repository}
    done = subprocess.run(command, env=os.environ | cache, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" figures, ") == 5
    assert {file.name for file in (repository / "notebooks").iterdir()} == before
