"""The site builds, and its generated pages are complete."""

import ast
import dataclasses
import html
import os
import re
import runpy
import subprocess
import sys
import typing

import pytest

import qlora_jax
from qlora_jax.models.families import FAMILIES
from tests import test_golden_families as families


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory):
    """Directory of the built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    settings = {"cwd": repository, "capture_output": True, "text": True}
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def page(site, name):
    return html.unescape((site / name / "index.html").read_text("utf-8"))


def test_every_page_is_in_the_navigation(site, repository):
    pages = {p.stem for p in (repository / "docs").glob("*.md")} - {"index"}
    pages |= {f"notebooks/{p.stem}" for p in (repository / "notebooks").glob("*.ipynb")}
    links = re.findall(r'href="([a-z0-9_/]+)/"', (site / "index.html").read_text())
    assert pages <= set(links)


def test_the_site_has_no_source_files(site):
    assert not list(site.rglob("*.py"))


def test_no_marker_is_left(site):
    for path in site.rglob("index.html"):
        assert "{{ " not in re.sub(r"<pre>.*?</pre>", "", path.read_text(), flags=re.S)


def test_the_start_page_has_the_status_of_the_readme(site, repository):
    readme = (repository / "README.md").read_text()
    status = readme.partition("<!-- status -->")[2].partition("<!-- /status -->")[0]
    start = page(site, ".")
    titles = re.findall(r"^- \*\*(\w+)\*\*", status, re.M)
    assert len(titles) == 5
    assert all(f"<strong>{title}</strong>" in start for title in titles)
    assert 'href="memory/"' in start and "context_lengths.png" in start


def test_the_reference_has_every_setting_and_every_name(site):
    reference = page(site, "run_file")
    for section, keys in settings().items():
        assert f"<code>[{section}]</code>" in reference
        assert all(f"<code>{key}</code>" in reference for key in keys), section
    reference = page(site, "python")
    for name in qlora_jax.__all__:
        if name != "__version__":
            module = getattr(qlora_jax, name).__module__
            assert f'id="{module}.{name}"' in reference, name


def test_the_command_line_page_has_the_help_of_every_command(site):
    reference = page(site, "command_line")
    ours = "train eval generate chat data report inspect plan quantize tokens"
    of_convert = "adapter combine merge model verify"
    for program, names in (("qlora-jax", ours), ("qlora-convert", of_convert)):
        for command in names.split():
            assert f'id="{program}-{command}"' in reference
    assert "--train.learning-rate" in reference and "--requantize" in reference


def test_the_map_has_every_module_with_a_description(site, repository):
    tooling = runpy.run_path(str(repository / "docs/tooling/repository.py"))
    table = tooling["module_map"]()
    shown = page(site, "architecture")
    for top in tooling["SOURCE_FOLDERS"]:
        for path in (repository / top).rglob("*.py"):
            folder = path.parent.relative_to(repository).as_posix()
            section = table.partition(f"### {folder}/\n")[2].partition("\n### ")[0]
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
            assert docstring, path
            words = docstring.split()[:3]
            if path.name == "__init__.py":
                assert section.split()[: len(words)] == words, path
            else:
                assert f"| `{path.stem}` | {' '.join(words)}" in section, path
                assert f"<td><code>{path.stem}</code></td>" in shown, path


def test_notebooks_are_shown_with_their_figures(site, repository):
    for path in (repository / "notebooks").glob("*.ipynb"):
        figures = path.read_text("utf-8").count('"image/png"')
        assert len(list((site / "notebooks").glob(f"{path.stem}_*.png"))) == figures > 0
        assert page(site, f"notebooks/{path.stem}").count("<img") == figures


def test_the_picture_of_the_start_page_is_drawn_from_the_stored_plans(
    repository, tmp_path
):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    command = [sys.executable, "docs/tooling/context_lengths.py", "--output", picture]
    subprocess.run(command, cwd=repository, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


def settings():
    hints = typing.get_type_hints(qlora_jax.RunConfig)
    return {
        name: [field.name for field in dataclasses.fields(hint)]
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
    }


def test_settings_that_the_pages_name_exist(repository):
    """`[section] key` in a page."""
    known = settings()
    for path in (repository / "docs").glob("*.md"):
        text = path.read_text("utf-8")
        named = re.findall(r"`\[\[?([a-z]\w*)(?:\.(\w+))?\]\]?(?: (\w+))?", text)
        if path.stem.startswith("from_"):
            assert len(named) > 20
        for section, inner, key in named:
            if section == "section":  # the placeholder of the notation
                continue
            assert section in known, (path.name, section)
            for word in filter(None, (inner, key)):
                assert word in known[section], (path.name, section, word)


# The directories of `tests.test_golden_families`, as the page names the models.
SHOWN = {"phi4_mini": "Phi-4-mini"}
# What is compared of Llama, whose files are older -> the test that does.
OF_LLAMA = {
    "logits": ("test_golden.py", "test_logits"),
    "adapters": ("test_golden.py", "test_adapted_logits"),
    "training": ("test_golden.py", "test_thirty_training_steps"),
    "generation": (
        "inference/test_decode.py",
        "test_greedy_tokens_are_those_of_hugging_face",
    ),
}


def test_the_families_are_compared_as_their_table_says(repository):
    """The last column of the table in docs/models.md is the list of the tests."""
    text = (repository / "docs" / "models.md").read_text("utf-8").partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [line.strip("|").split("|") for line in lines[1:]]  # below the heading
    said = {row[0].strip(" `"): row[-1].strip() for row in rows}
    assert list(said) == list(FAMILIES)
    for model_type, claim in said.items():
        if model_type == "llama":
            for file, name in OF_LLAMA.values():
                assert f"def {name}(" in (repository / "tests" / file).read_text()
            assert claim == ", ".join(OF_LLAMA)
        elif model_type in families.COVERED:
            source = families.COVERED[model_type]
            assert claim == (
                f"configuration; its switches with `{source}`, logits and adapters "
                "with `make peer`"
            )
        else:
            complete, parts = families.compared(model_type)
            exceptions = [
                f"{kind} but for {', '.join(SHOWN[name] for name in sorted(names))}"
                for kind, names in parts.items()
            ]
            assert claim == "; ".join([", ".join(complete), *exceptions]), model_type
