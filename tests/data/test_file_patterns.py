"""Patterns of files: `glob`'s rules, within a bound of what is looked at."""

import glob
import os

import pytest

from qlora_jax.data import file_patterns
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.file_patterns import matching_files
from qlora_jax.data.rows import open_rows, read_rows
from qlora_jax.data.sources import list_sources
from qlora_jax.errors import UserError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files at several depths, hidden ones, and a directory that ends like a file."""
    for name in ("a.json", "b/c.json", "b/d/e.json", "b/.f.json", ".g/h.json", "b/[x]"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / "dir.json").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.json", "**/*.json", "b/**", "**/d/*", "?/[cd]*", "**/.f*", "*/*/*"),
        *("none/*", "**/**/*.json", "b/[[]x]", "*", "**", "./b/*.json", "a.json/*"),
    ],
)
def test_a_pattern_matches_what_glob_matches(tree, pattern):
    for whole in (pattern, os.path.join(tree, pattern)):
        names = (name for name in glob.glob(whole, recursive=True))
        expected = {os.path.normpath(name) for name in names if os.path.isfile(name)}
        found = matching_files(whole)
        assert {os.path.normpath(name) for name in found} == expected
        assert found == sorted(set(found))


def test_a_pattern_that_spans_too_much_is_refused(tree, monkeypatch):
    monkeypatch.setattr(file_patterns, "MAX_ENTRIES", 3)
    for pattern in ("**/*.json", "/**/**/x", "/*/*/*"):
        with pytest.raises(UserError, match="spans more than 3 files"):
            list_sources(pattern, split=None, plain_text=True)


def test_only_files_are_data(tree):
    os.mkfifo(tree / "pipe")
    for path, reason in (
        ("pipe", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("x" * 300, "File name too long"),
        ("a\0b", "a NUL in the name"),
    ):
        with pytest.raises(UserError, match=reason):
            list_sources(path, split=None, plain_text=True)


@pytest.mark.parametrize("levels", [90, 200, 100_000])
def test_a_row_that_is_nested_too_deeply_is_a_problem_of_its_line(tmp_path, levels):
    deep = '{"a": ' + "[" * levels + "]" * levels + "}"
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "x"}}\n{deep}\n{{"text": "y"}}\n')
    rows = [row for _, row in open_rows(tmp_path / "rows.jsonl", plain_text=False).rows]
    refused = [row for row in rows if isinstance(row, UserError)]
    assert (len(rows), len(refused)) == (3, int(levels > 100))
    if levels > 100:
        assert "jsonl:2: " in str(refused[0])
        assert "nested too deeply" in str(refused[0])
        (tmp_path / "rows.json").write_text(f"[{deep}]")
        with pytest.raises(UserError, match="nested too deeply"):
            read_rows(tmp_path / "rows.json", plain_text=False)


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "x" * 300, "a\0b", "long"])
def test_only_a_file_of_moderate_size_is_a_template(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(bytes(5_000_000))
    with pytest.raises(UserError, match="chat_template`: cannot read"):
        ChatRenderer(None, str(tmp_path / name))
