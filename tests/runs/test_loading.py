"""Where the base of an adapter lies; the command that copies one is tested with it."""

from pathlib import Path

from qlora_jax.runs.loading import base_places, leads_nowhere, name_from


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_places_beside_the_adapter(tmp_path, monkeypatch):
    base, adapter = model(tmp_path / "base"), tmp_path / "run" / "adapter"
    monkeypatch.chdir(tmp_path)
    first, *others = base_places(adapter, "base")
    assert first == Path("base") and base in others


def test_a_name_that_is_no_directory_is_left_alone(tmp_path):
    for name in (None, "", "org/name", "/nowhere/base", "../nowhere"):
        assert name_from(name, tmp_path / "a", tmp_path / "b") == name
    assert not leads_nowhere("org/name", tmp_path) and not leads_nowhere(None, tmp_path)
    assert leads_nowhere("../nowhere", tmp_path) and leads_nowhere("/nowhere", tmp_path)


def test_another_model_of_the_same_name_beside_the_copy(tmp_path):
    """A path that leads somewhere else is not kept."""
    base = model(tmp_path / "here" / "base")
    model(tmp_path / "there" / "base")
    source, output = tmp_path / "here" / "a", tmp_path / "there" / "b"
    source.mkdir()
    assert name_from("../base", source, output) == str(base)
    assert name_from("../base", source, tmp_path / "here" / "b") == "../base"
