"""What a run was computed with is compared, and XLA's choices are kept, on resumption.

Without a GPU XLA chooses nothing: the files that it would write are written here.
"""

import json
from pathlib import Path

import jax
import pytest

from qlora_jax.runs.environment import Tuning, changes, environment, note_changes

HERE = {
    "device": "NVIDIA H200",
    "driver": "580.65.06",
    "platform": "cuda 13000",
    "versions": {"jax": "0.12.0", "nvidia-cudnn-cu13": "9.12.0"},
}
FILES = {"NVIDIA H200/a.pb": b"\x00\xff", "b.textproto": b"gemm { algorithm: 7 }"}


@pytest.fixture
def kept(tmp_path):
    """The file of a run that made the choices FILES."""
    path = tmp_path / "autotune.json"
    Tuning(HERE, dict(FILES)).write(path)
    return path


def test_the_environment_names_device_platform_and_libraries():
    found = environment()
    assert found["device"] == jax.devices()[0].device_kind
    assert found["versions"]["jax"] == jax.__version__
    assert found["driver"] is None  # a CPU's program depends on no driver
    assert json.loads(json.dumps(found)) == found
    assert changes(found, found) == []


def test_what_differs_is_said_and_what_was_not_recorded_is_not(capsys):
    now = {
        **HERE,
        "driver": "590.1",
        "versions": {"jax": "0.12.1", "jax-cuda13-plugin": "0.12.1"},
    }
    assert changes(HERE, now) == [
        "driver: 580.65.06 -> 590.1",
        "jax: 0.12.0 -> 0.12.1",
        "nvidia-cudnn-cu13: 9.12.0 -> none",
    ]
    note_changes(HERE, now)
    said = " ".join(capsys.readouterr().err.split())
    assert "driver: 580.65.06 -> 590.1" in said and "round differently" in said
    note_changes(HERE, HERE)
    assert capsys.readouterr().err == ""
    # A run of an older version recorded less.
    assert changes({"versions": {}}, HERE) == []


def test_choices_are_given_to_xla_and_those_it_adds_are_kept(kept, tmp_path, capsys):
    tuning = Tuning.read(kept, HERE)
    assert (tuning.files, capsys.readouterr().err) == (FILES, "")
    with tuning.options("gpu") as options:
        folder = Path(options["xla_gpu_per_fusion_autotune_cache_dir"])
        assert (folder / "NVIDIA H200/a.pb").read_bytes() == b"\x00\xff"
        (folder / "c.pb").write_bytes(b"new")
        # These options are known to this version's compiler.
        lowered = jax.jit(lambda x: x + 1).lower(1.0)
        assert lowered.compile(compiler_options=options)(2.0) == 3.0
    assert not folder.exists()
    tuning.write(kept)
    assert Tuning.read(kept, HERE).files == FILES | {"c.pb": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_only_a_gpu_without_a_cache_of_programs_needs_choices(tmp_path):
    tuning = Tuning(HERE)
    with tuning.options("cpu") as options:
        assert options == {}
    assert tuning.compile(jax.jit(lambda x: x * 2).lower(1.0))(2.0) == 4.0
    tuning.write(tmp_path / "autotune.json")  # nothing to write
    assert not list(tmp_path.iterdir())
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        with tuning.options("gpu") as options:
            assert options == {}
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text(path.read_text()[:-9]), "is damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text("[" * 100_000), "is damaged"),
        (lambda path: path.write_text("9" * 5_000), "is damaged"),
        (
            lambda path: Tuning({"versions": [[1, 2, 3]]}, dict(FILES)).write(path),
            "is damaged",
        ),
        (
            lambda path: path.write_text(path.read_text().replace("AP8", "AP4")),
            "is damaged",
        ),
        (
            lambda path: Tuning(HERE, {"../out": b"1"}).write(path),
            "is damaged",
        ),
        (
            lambda path: Tuning(HERE | {"driver": "1.0"}, dict(FILES)).write(path),
            "is of another device or other software",
        ),
    ],
)
def test_choices_that_cannot_be_used_are_made_anew_and_said(
    kept, damage, problem, capsys
):
    damage(kept)
    assert Tuning.read(kept, HERE).files == {}
    said = " ".join(capsys.readouterr().err.split())
    assert problem in said and "chosen anew" in said
