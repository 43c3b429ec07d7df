"""Files and directories that appear complete or not at all, and what a kill leaves."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from convert.atomic import (
    check_new_directory,
    check_new_file,
    is_leftover,
    new_directory,
    new_file,
    remove_leftovers,
    write_text,
)
from qlora_jax.errors import UserError
from qlora_jax.runs.directory import check_directory, run_lock


def refused(match: str):
    return pytest.raises(UserError, match=match)


def test_directory_appears_at_the_end_and_with_the_usual_mode(tmp_path):
    target, plain = tmp_path / "deep" / "out", tmp_path / "plain"
    with new_directory(target) as new:
        (new / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_only_an_empty_directory_is_filled_unless_it_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out) as new:
        (new / "x").write_text("1")
    for path, match in (
        (out, "exists and is not empty; nothing was written"),
        (out / "x", "it is a file"),
        (out / "x" / "deeper", "Cannot write `.*deeper`: "),
    ):
        with refused(match), new_directory(path):
            raise AssertionError("not reached")
    assert (out / "x").read_text() == "1"
    with new_directory(out, overwrite=True) as new:
        (new / "new").write_text("2")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", [[], ["out", "out/old"]])
def test_error_leaves_nothing_behind(tmp_path, before):
    for name in before[:1]:
        (tmp_path / name).mkdir()
        (tmp_path / before[1]).write_text("1")
    with pytest.raises(KeyError):
        with new_directory(tmp_path / "out", overwrite=bool(before)) as new:
            (new / "x").write_text("1")
            raise KeyError
    after = sorted(tmp_path.rglob("*"))
    assert [str(p.relative_to(tmp_path)) for p in after] == before


@pytest.mark.parametrize("stop_at", [1, 2])
@pytest.mark.parametrize("done", [False, True])
def test_a_signal_while_a_directory_is_replaced_leaves_one_of_the_two(
    tmp_path, monkeypatch, stop_at, done
):
    out, calls, rename = tmp_path / "out", [], os.rename
    out.mkdir()
    (out / "old").write_text("1")

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) != stop_at or done:
            rename(*paths)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_directory(out, overwrite=True) as new:
        (new / "new").write_text("2")
    name = "new" if (stop_at, done) == (2, True) else "old"
    assert [p.name for p in tmp_path.rglob("*")] == ["out", name]


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    # A file size limit stands in for a full disk: the write fails half-way. In a
    # process of its own, because the limit cannot be raised again.
    code = f"""
import resource, numpy as np
from convert.atomic import new_directory
from convert.output import Entry, write_safetensors
from qlora_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with new_directory(__import__("pathlib").Path({str(tmp_path / "out")!r})) as new:
        big = Entry.of("x", np.zeros(100_000, np.float32))
        write_safetensors(new / "x.safetensors", [big], {{}})
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search("Cannot write `.*out`: File too large. Nothing was", done.stdout)
    assert list(tmp_path.iterdir()) == []


# --- What a process that is killed leaves behind ---


def die_while_writing(enter: str, directory: Path) -> list[str]:
    """The names in a directory after a process was killed in a `with` block."""
    code = (
        "import os, pathlib, signal\n"
        "from convert.atomic import new_directory, new_file, scratch_directory\n"
        f"directory = pathlib.Path({str(directory)!r})\n"
        f"with {enter} as new:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"TMPDIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", code], env=environment)
    assert done.returncode == -signal.SIGKILL
    return [path.name for path in directory.iterdir() if path.name != "out"]


@pytest.mark.parametrize(
    "enter",
    [
        "new_file(directory / 'out')",
        "new_directory(directory / 'out')",
        "scratch_directory()",
    ],
)
def test_the_next_writer_in_a_directory_removes_what_a_kill_left(tmp_path, enter):
    (leftover,) = die_while_writing(enter, tmp_path)
    assert is_leftover(leftover)
    write_text(tmp_path / "other", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("writer", [new_file, new_directory])
def test_what_is_being_written_is_left_alone(tmp_path, writer):
    with writer(tmp_path / "out") as new:
        remove_leftovers(tmp_path)
        assert new.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_names_of_our_own_are_leftovers(tmp_path):
    names = [".out.tmp", "out.partial", ".out.abc.qlora-jax-partial", ".cache", "x.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".out.0123abcd.qlora-jax-partial").symlink_to(tmp_path / ".cache")
    remove_leftovers(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("arrived", [False, True])
def test_a_directory_that_stepped_aside_comes_back_unless_its_successor_is_there(
    tmp_path, arrived
):
    old = tmp_path / ".out.0123abcd.qlora-jax-replaced"
    old.mkdir()
    (old / "old").write_text("1")
    if arrived:
        (tmp_path / "out").mkdir()
    remove_leftovers(tmp_path)
    names = [p.name for p in tmp_path.rglob("*")]
    assert names == (["out"] if arrived else ["out", "old"])


def test_a_run_starts_in_a_directory_that_holds_leftovers_alone(tmp_path):
    (tmp_path / ".config.toml.0123abcd.qlora-jax-partial").touch()
    check_directory(tmp_path)
    with run_lock(tmp_path):
        assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").touch()
    with refused("is not empty and holds no run"):
        check_directory(tmp_path)


# --- Paths that cannot be written ---


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, as_file, as_directory in (
        ("file", None, "it is a file"),
        ("", "it is a directory", None),
        ("pipe", "it is a pipe or a device", "it is a file"),
        ("none/x", "there is no directory", None),
        ("file/x", "there is no directory", "is a file"),
        ("x" * 300, "File name too long", "File name too long"),
        ("a\0b", "a NUL in the name", "a NUL in the name"),
    ):
        if as_file is not None:
            with refused(as_file):
                check_new_file(tmp_path / name)
        if as_directory is not None:
            with refused(as_directory):
                check_new_directory(tmp_path / name)
    write_text(tmp_path / ("é" * 127), "x")  # as long as a name can be


def test_a_file_has_the_usual_mode(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "out", "x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
