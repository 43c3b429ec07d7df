"""The site builds, and its pages say what is there."""

import os
import re
import subprocess
import sys

import pytest

import qlora_jax
from qlora_jax.runs.config import RunConfig


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory):
    """Directory of the built site."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=repository,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_in_the_navigation(site, repository):
    pages = {p.stem for p in (repository / "docs").glob("*.md")} - {"index"}
    linked = set(re.findall(r'href="([a-z0-9_]+)/"', (site / "index.html").read_text()))
    assert pages <= linked


def test_the_reference_has_every_setting_and_every_name(site):
    page = (site / "run_file" / "index.html").read_text()
    for section, keys in settings().items():
        assert f"<code>[{section}]</code>" in page
        assert all(f"<code>{key}</code>" in page for key in keys), section
    page = (site / "python" / "index.html").read_text()
    for name in qlora_jax.__all__:
        if name != "__version__":
            module = qlora_jax._CONTENTS[name]
            assert f'id="{module}.{name}"' in page, name


def settings():
    import dataclasses
    import typing

    hints = typing.get_type_hints(RunConfig)
    return {
        name: [f.name for f in dataclasses.fields(hint)]
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
    }


@pytest.mark.parametrize("page", ["from_unsloth", "from_peft_trl", "tutorial", "gpu"])
def test_settings_that_a_page_names_exist(page, repository):
    """`[section] key` in a page, and in tables the further keys behind it."""
    text = (repository / "docs" / f"{page}.md").read_text()
    known = settings()
    named = re.findall(r"`\[\[?(\w+)(?:\.(\w+))?\]\]?(?: (\w+))?", text)
    if page.startswith("from_"):
        assert len(named) > 20
    for section, inner, key in named:
        if section == "section":  # how keys are written
            continue
        assert section in known, section
        for word in filter(None, (inner, key)):
            assert word in known[section], (section, word)
