"""Runs the notebooks and writes them with their outputs.

    python docs/tooling/run_notebooks.py            # all; writes notebooks/*.ipynb
    python docs/tooling/run_notebooks.py --only 05  # those with this prefix
    python docs/tooling/run_notebooks.py --check    # writes nothing
    python docs/tooling/run_notebooks.py --check --quick  # a fifth of the steps

The source of a notebook is a Python file in notebooks/: cells begin with `# %%`,
Markdown cells with `# %% [markdown]`, so that diffs are readable and an editor can run
it cell by cell. The .ipynb next to it is that source with its outputs, for the web and
for Jupyter. Making it needs no Jupyter server or kernel.

Cells run in this process, in a copy of notebooks/ next to a link to scripts/, so that
the folder `work` of the notebooks is not created in the repository. Later notebooks
reuse what earlier ones made there; each makes it when it runs by itself.

`--check` exits with status 1 if a cell fails or an .ipynb has other cells than its
source; with `--quick` the cells run with a fifth of the training steps that they name,
as the tests run them. `--figures DIR` also writes every figure as a PNG.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before jax is imported: figures go to files, tokenizers do not warn about forks.
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tyro

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
DPI = 80
# A number of training steps, as the notebooks write it: an option of a script, a
# keyword, a constant, or the third argument of `stage`.
STEPS = re.compile(
    r'("--steps", "|\bsteps=|^STEPS\b.*? = |^stage\(.*?, .*?, )(\d+)', re.M
)
QUICK = 5


@dataclass
class Args:
    """Run the notebooks and write them with their outputs."""

    only: tuple[str, ...] = ()
    """Prefixes of file names (`01`); default: all."""
    check: bool = False
    """Write nothing; fail if a notebook has other cells than its source."""
    quick: bool = False
    """Train for a fifth of the steps; with `--check` only."""
    figures: Path | None = None
    """Directory for every figure as a PNG."""
    times: bool = False
    """Print the seconds of each cell."""


@dataclass(frozen=True)
class Cell:
    """A cell of a source file."""

    text: str
    is_code: bool
    line: int
    """Of its first line in the source."""


def read_cells(source: str) -> list[Cell]:
    """Splits a source into cells; lines before the first one are a comment."""
    cells = []
    marks = list(re.finditer(r"^# %%(.*)\n", source, re.M))
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        text = source[mark.end() : after.start() if after else None].strip("\n")
        is_code = "[markdown]" not in mark[1]
        if not is_code:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        line = source.count("\n", 0, mark.end()) + 1
        cells.append(Cell(text, is_code, line))
    return cells


def notebook(cells: list[Cell], outputs: list[list[dict[str, Any]]]) -> str:
    """Returns the .ipynb of cells and their outputs (nbformat 4.5)."""
    entries = []
    number = 0
    for index, (cell, cell_outputs) in enumerate(zip(cells, outputs, strict=True)):
        entry: dict[str, Any] = {
            "cell_type": "code" if cell.is_code else "markdown",
            "id": f"cell-{index:02d}",
            "metadata": {},
            "source": cell.text.splitlines(keepends=True),
        }
        if cell.is_code:
            number += 1
            entry |= {"execution_count": number, "outputs": cell_outputs}
        entries.append(entry)
    metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    content = {
        "cells": entries,
        "metadata": metadata,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def shorten(code: str) -> str:
    """Divides the numbers of training steps in a cell by `QUICK`."""
    return STEPS.sub(lambda match: f"{match[1]}{int(match[2]) // QUICK}", code)


def run_cell(
    cell: Cell, file: Path, namespace: dict[str, Any], figures: list[bytes]
) -> list[dict[str, Any]]:
    """Runs a cell; returns its outputs in the form of nbformat.

    Args:
      cell: the cell to run.
      file: the source, for tracebacks.
      namespace: of the notebook; changed.
      figures: the PNG of each figure is appended to it.
    """
    import matplotlib.pyplot as plt

    tree = ast.parse(cell.text, str(file))
    ast.increment_lineno(tree, cell.line - 1)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # pyright: ignore[reportAttributeAccessIssue]
    printed = io.StringIO()
    value = None
    # Progress bars and logs on stderr change with every run and are not kept.
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, str(file), "exec"), namespace)
        if last is not None:
            value = eval(compile(last, str(file), "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append(
            {
                "name": "stdout",
                "output_type": "stream",
                "text": text.splitlines(keepends=True),
            }
        )
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, dpi=DPI, bbox_inches="tight")
        figures.append(picture.getvalue())
        data = base64.b64encode(picture.getvalue()).decode()
        outputs.append(
            {"data": {"image/png": data}, "metadata": {}, "output_type": "display_data"}
        )
    plt.close("all")
    if value is not None and not cell.text.endswith(";"):  # as in Jupyter
        outputs.append(
            {
                "data": {"text/plain": repr(value).splitlines(keepends=True)},
                "execution_count": None,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


def run_notebook(
    file: Path, times: bool, quick: bool = False
) -> tuple[list[Cell], list[Any], list[bytes]]:
    """Runs a source; returns its cells, their outputs, and its figures.

    Args:
      file: the source.
      times: print the seconds of each cell.
      quick: run the cells with fewer training steps.

    Raises:
      SystemExit: a cell failed; its traceback is on stderr.
    """
    import matplotlib.pyplot as plt

    cells = read_cells(file.read_text("utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[Any] = []
    figures: list[bytes] = []
    with plt.rc_context():
        for cell in cells:
            if not cell.is_code:
                outputs.append([])
                continue
            began = time.perf_counter()
            try:
                text = shorten(cell.text) if quick else cell.text
                run = replace(cell, text=text)
                outputs.append(run_cell(run, file, namespace, figures))
            except Exception:
                traceback.print_exc()
                raise SystemExit(
                    f"{file.name}: the cell at line {cell.line} failed"
                ) from None
            if times:
                print(f"  line {cell.line}: {time.perf_counter() - began:.1f} s")
    for number, code in enumerate(
        (o for cell, o in zip(cells, outputs, strict=True) if cell.is_code), 1
    ):
        for output in code:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    return cells, outputs, figures


def check(file: Path, cells: list[Cell]) -> str | None:
    """Compares the .ipynb with the cells; returns the difference, or None."""
    ipynb = file.with_suffix(".ipynb")
    if not ipynb.is_file():
        return f"{ipynb.name} is missing"
    written = [
        ("".join(cell["source"]), cell["cell_type"] == "code")
        for cell in json.loads(ipynb.read_text("utf-8"))["cells"]
    ]
    if written != [(cell.text, cell.is_code) for cell in cells]:
        return f"{ipynb.name} has other cells than {file.name}"
    return None


def main(args: Args) -> int:
    """Runs the selected notebooks; returns the exit status."""
    if args.quick and not args.check:
        print(
            "run_notebooks.py: `--quick` needs `--check`: a notebook shows the whole "
            "training",
            file=sys.stderr,
        )
        return 1
    files = [
        file
        for file in sorted(NOTEBOOKS.glob("[0-9]*.py"))
        if not args.only or file.name.startswith(args.only)
    ]
    if not files:
        print(
            f"run_notebooks.py: no notebook has a prefix of {args.only}",
            file=sys.stderr,
        )
        return 1
    problems = []
    before = Path.cwd()
    # For this process and those that a notebook starts, installed or not.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as copies:
        (Path(copies) / "scripts").symlink_to(ROOT / "scripts")
        folder = Path(copies) / "notebooks"
        folder.mkdir()
        for file in files:
            began = time.perf_counter()
            copy = Path(shutil.copy(file, folder))
            os.chdir(folder)
            try:
                cells, outputs, figures = run_notebook(copy, args.times, args.quick)
            finally:
                os.chdir(before)
            seconds = time.perf_counter() - began
            print(f"{file.name}: {len(figures)} figures, {seconds:.0f} s", flush=True)
            if args.figures is not None:
                args.figures.mkdir(parents=True, exist_ok=True)
                for number, picture in enumerate(figures, 1):
                    target = args.figures / f"{file.stem}_{number}.png"
                    target.write_bytes(picture)
            if not args.check:
                text = notebook(cells, outputs)
                file.with_suffix(".ipynb").write_text(text, "utf-8")
            elif problem := check(file, cells):
                problems.append(problem)
    for problem in problems:
        print(
            f"run_notebooks.py: {problem}: run `python docs/tooling/run_notebooks.py`",
            file=sys.stderr,
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
