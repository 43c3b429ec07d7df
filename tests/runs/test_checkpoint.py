"""Checkpoints: what goes in comes out, the newest are kept, differences are named."""

import contextlib
import dataclasses
import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs.channel import PeerError
from qlora_jax.runs.checkpoint import Checkpoints, DamagedCheckpointError, disk_errors
from qlora_jax.runs.config import CheckpointConfig
from qlora_jax.runs.resume import compare_records, continue_run
from qlora_jax.training.step import TrainState, init_state
from tests.runs.directories import LATE_READS

RECORD = {"batches": 3, "lora": {"r": 4, "target_modules": ["q_proj"]}}


def state_at(step: int) -> TrainState:
    """One whose arrays are not kept among the metadata, which Orbax checks itself."""
    key = jax.random.key(step)
    adapters = {"model": {"a": jax.random.normal(key, (40, 50))}}
    state = init_state(adapters, optax.adamw(0.1), jax.random.fold_in(key, 1))
    # Moments of zeros would not suffer from zeros.
    moments = jax.tree.map(
        lambda leaf: jax.random.normal(key, leaf.shape) if leaf.ndim else leaf,
        state.opt_state,
    )
    return dataclasses.replace(state, step=jnp.int32(step), opt_state=moments)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def opened(directory: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(directory, CheckpointConfig(keep=keep))


def test_a_state_comes_back_as_it_was_and_in_its_own_structure_only(tmp_path):
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state_at(3), RECORD)
        checkpoints.wait()
        assert checkpoints.path(3).is_dir()
        checkpoints.save(state_at(3), RECORD)  # the same step again is no second save
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.record(3) == RECORD
        assert_equal(checkpoints.restore(3, state_at(0)), state_at(3))
        adapters = {"model": {"b": jnp.zeros((40, 50))}}
        other = init_state(adapters, optax.adamw(0.1), jax.random.key(0))
        with pytest.raises(CheckpointError, match="step_3` cannot be read"):
            checkpoints.restore(3, other)


def test_a_step_may_take_the_arrays_before_they_are_on_the_disk(tmp_path):
    take = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with opened(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            state = state_at(step)
            checkpoints.save(state, RECORD)
            take((state.adapters, state.opt_state))
    with opened(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            assert_equal(checkpoints.restore(step, state_at(0)), state_at(step))


def test_the_newest_are_kept_and_what_a_kill_left_half_written_is_not(tmp_path):
    with opened(tmp_path) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(state_at(step), RECORD)
    assert names(tmp_path) == {"step_4", "step_6"}
    half = tmp_path / "step_8.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("half")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 6
        checkpoints.save(state_at(8), RECORD)  # the removal is waited for here
    assert names(tmp_path) == {"step_6", "step_8"}


@pytest.mark.parametrize(
    ("number", "is_full"),
    [
        *((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True)),
        *((errno.EIO, True), (errno.EOPNOTSUPP, False)),
    ],
)
def test_a_disk_that_takes_no_more_is_a_checkpoint_error(
    tmp_path, monkeypatch, number, is_full
):
    def reserve(handle, offset, length):
        assert length > 3 * 40 * 50 * 4  # adapters and two moments
        raise OSError(number, os.strerror(number))

    refused = pytest.raises(CheckpointError, match=os.strerror(number))
    with opened(tmp_path, keep=3) as checkpoints:
        checkpoints.save(state_at(2), RECORD)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", reserve)
            with refused if is_full else nullcontext():
                checkpoints.save(state_at(4), RECORD)
        assert (checkpoints.latest() == 4) != is_full
        checkpoints.save(state_at(4), RECORD)
        # Where nothing can be reserved it is written all the same.
        monkeypatch.delattr(os, "posix_fallocate")
        checkpoints.save(state_at(6), RECORD)
    assert names(tmp_path) == {"step_2", "step_4", "step_6"}


UNFORESEEN = """
import pathlib, resource, sys
from tests.runs import test_checkpoint as here

here.Checkpoints._check_space = lambda *_: None
try:
    with here.opened(pathlib.Path(sys.argv[1])) as checkpoints:
        checkpoints.save(here.state_at(2), here.RECORD)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        checkpoints.save(here.state_at(4), here.RECORD)
        checkpoints.wait()
except here.CheckpointError as error:
    print(error)
"""


def test_a_disk_that_fills_while_orbax_writes_is_a_checkpoint_error(tmp_path):
    """Where the reservation said yes."""
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be written: File too large. The checkpoints there" in done.stdout
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        assert_equal(checkpoints.restore(2, state_at(0)), state_at(2))


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckpointError, "No space"),
        (ValueError("Failed: No space left on device"), CheckpointError, "No space"),
        (ValueError("a defect"), ValueError, "^a defect$"),
        (CheckpointError("mine"), CheckpointError, "^mine$"),
        # The disk of another process.
        (PeerError("Process 0: No space left on device"), PeerError, "^Process 0"),
    ],
)
def test_errors_of_the_disk_differ_from_defects(tmp_path, raised, expected, message):
    with pytest.raises(expected, match=message) as error, disk_errors(tmp_path):
        raise raised
    advice = f"`{tmp_path}` cannot be written: No space left"
    assert (message == "No space") == (advice in str(error.value))


def test_an_error_of_closing_does_not_hide_the_first(tmp_path, monkeypatch):
    checkpoints = opened(tmp_path)
    close = checkpoints._manager.close

    def failing():
        close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "close", failing)
    with pytest.raises(UserError, match="first"), checkpoints:
        raise UserError("first")


def test_differences_are_named_with_both_values():
    now = {"base": "x", "lora": {"r": 8, "target_modules": ("q_proj",)}, "new": 1}
    saved = {"base": "x", "lora": {"r": 4, "target_modules": ["q_proj"]}}
    message = "has changed:\n- lora.r: 4 -> 8\n- new: None -> 1\nUndo"
    with pytest.raises(UserError, match=message):
        compare_records(saved, now)
    compare_records(saved, {"base": "x", "lora": dict(saved["lora"])})


# --- damage ---

NOW = {"base_fingerprint": "x", "model": {"dtype": "float32", "lm_head": "dense"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2, 4 and 6 of a run of 8."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with opened(directory, keep=3) as checkpoints:
        for step in (2, 4, 6):
            record = {**NOW, "batches": step, "steps": 8}
            checkpoints.save(state_at(step), record)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of them."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def largest(directory: Path) -> Path:
    """The file with the arrays."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(file: Path) -> None:
    """A bit within an array: Orbax puts one to three of equal size into a file, and
    what lies between two of them, at the middle of a file, may be read by nobody."""
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 1
    file.write_bytes(content)


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def replace(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def make_socket(file: Path) -> None:
    # By a relative name: the path of a socket has at most 107 bytes.
    with contextlib.chdir(file.parent), socket.socket(socket.AF_UNIX) as end:
        end.bind(file.name)


DAMAGE = {
    "a flipped bit": lambda d: flip(largest(d)),
    "an array file cut off": lambda d: os.truncate(largest(d), 99),
    "an array file missing": lambda d: largest(d).unlink(),
    "zeros": lambda d: largest(d).write_bytes(bytes(largest(d).stat().st_size)),
    "no metadata": lambda d: (d / "state" / "_METADATA").unlink(),
    "metadata cut off": lambda d: os.truncate(d / "state" / "_METADATA", 50),
    "no record": lambda d: shutil.rmtree(d / "record"),
    "an empty record": lambda d: os.truncate(d / "record" / "metadata", 0),
    # Read as it is, it would be taken for another base.
    "another letter in the record": lambda d: rewrite(
        d / "record" / "metadata", '"x"', '"y"'
    ),
    "a record without checksums": lambda d: rewrite(
        d / "record" / "metadata", '"checksums"', '"chequesums"'
    ),
    "no state": lambda d: shutil.rmtree(d / "state"),
    "a directory for a file": lambda d: replace(d / "state" / "_METADATA", Path.mkdir),
    "a pipe": lambda d: replace(largest(d), os.mkfifo),
    "a pipe for a record": lambda d: replace(d / "record" / "metadata", os.mkfifo),
    "a socket": lambda d: replace(d / "state" / "_METADATA", make_socket),
    "a link to a device": lambda d: replace(
        d / "state" / "_METADATA", lambda file: file.symlink_to("/dev/zero")
    ),
    "a pipe for a directory": lambda d: (shutil.rmtree(d), os.mkfifo(d)),
    "a file for a directory": lambda d: (shutil.rmtree(d), d.write_text("x")),
    "a link to itself": lambda d: replace(
        largest(d), lambda file: file.symlink_to(file.name)
    ),
    "deep JSON": lambda d: (d / "record" / "metadata").write_text("[" * 100_000),
    "nothing at all": lambda d: [shutil.rmtree(p) for p in d.iterdir() if p.is_dir()],
}


@LATE_READS
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_previous(directory, capsys, damage):
    DAMAGE[damage](directory / "step_6")
    with opened(directory, keep=3) as checkpoints:
        state, start = continue_run(checkpoints, state_at(0), NOW, 8)
        assert start == 4
        assert_equal(state, state_at(4))
        assert checkpoints.steps() == [4, 2] and checkpoints.latest() == 4
        checkpoints.save(state_at(6), {**NOW, "batches": 6, "steps": 8})
        checkpoints.wait()
        assert_equal(checkpoints.restore(6, state_at(0)), state_at(6))
    err = capsys.readouterr().err
    aside = directory / "damaged_step_6"
    assert f"The checkpoint `{directory / 'step_6'}` cannot be read (" in err
    assert f"kept as `{aside}`" in err and "of step 4: 2 steps are taken again" in err
    assert aside.exists()


@pytest.mark.parametrize("place", ["", "pipe", ".space"])
def test_a_pipe_beside_checkpoints_does_not_block(directory, place):
    os.mkfifo(directory / "step_8" if not place else directory / place)
    with opened(directory, keep=3) as checkpoints:
        assert continue_run(checkpoints, state_at(0), NOW, 8)[1] == 6
        checkpoints.save(state_at(8), {**NOW, "batches": 8, "steps": 8})
        checkpoints.wait()
        assert_equal(checkpoints.restore(8, state_at(0)), state_at(8))


def test_links_in_circles_are_no_damage(directory):
    (directory / "step_6" / "state" / "up").symlink_to("../..")
    with opened(directory, keep=3) as checkpoints:
        assert continue_run(checkpoints, state_at(0), NOW, 8)[1] == 6


NOT_DESCRIPTIONS: dict[str, Callable[[Path], object]] = {
    "a list": lambda file: file.write_text("[1]"),
    "deep JSON": lambda file: file.write_text("[" * 100_000),
    "empty": Path.touch,
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to itself": lambda file: file.symlink_to(file.name),
}


@pytest.mark.parametrize("content", NOT_DESCRIPTIONS)
def test_a_description_by_orbax_is_not_needed(directory, capsys, content):
    replace(directory / "step_6" / "_CHECKPOINT_METADATA", NOT_DESCRIPTIONS[content])
    with opened(directory, keep=3) as checkpoints:
        assert continue_run(checkpoints, state_at(0), NOW, 8)[1] == 6
    assert "It is not needed, and is kept as" in capsys.readouterr().err


QUIET = """
import pathlib, sys
from tests.runs import test_checkpoint as here

for step in (6, 4):
    here.DAMAGE[sys.argv[2]](pathlib.Path(sys.argv[1]) / f"step_{step}")
with here.opened(pathlib.Path(sys.argv[1]), keep=3) as checkpoints:
    here.continue_run(checkpoints, here.state_at(0), here.NOW, 8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_checkpoint_nothing_but_our_message_is_shown(directory, damage):
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(directory), damage],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == ""
    assert [line.split()[0] for line in lines] == ["The", "The", "Continuing"]


@LATE_READS
def test_several_damaged_checkpoints_are_kept_under_new_names(directory, capsys):
    (directory / "damaged_step_6").mkdir()
    for step in (6, 4):
        flip(largest(directory / f"step_{step}"))
    with opened(directory, keep=3) as checkpoints:
        assert continue_run(checkpoints, state_at(0), NOW, 8)[1] == 2
    aside = {"damaged_step_4", "damaged_step_6", "damaged_step_6_2"}
    assert names(directory) == {"step_2", *aside}
    err = capsys.readouterr().err
    assert "step_6` cannot be read (ValueError: the state is not what was saved" in err
    assert "4 steps are taken again" in err and "2 steps are taken again" in err


@LATE_READS
def test_without_an_intact_checkpoint_nothing_is_moved(directory):
    for step in (2, 4, 6):
        flip(largest(directory / f"step_{step}"))
    with opened(directory, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match="Delete .*`train.adapter_init` = "):
            continue_run(checkpoints, state_at(0), NOW, 8)
        assert checkpoints.steps() == [6, 4, 2]


def test_a_transient_failure_is_not_damage(saved, monkeypatch):
    with opened(saved, keep=3) as checkpoints:

        def denied(*_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(checkpoints._manager, "restore", denied)
        with pytest.raises(CheckpointError, match="step_6.*Permission denied") as error:
            continue_run(checkpoints, state_at(0), NOW, 8)
        assert not isinstance(error.value, DamagedCheckpointError)
        assert checkpoints.steps() == [6, 4, 2]


def test_reading_deletes_no_half_written_checkpoint(tmp_path):
    half = tmp_path / "step_3.orbax-checkpoint-tmp-7"
    half.mkdir()
    with Checkpoints(tmp_path, CheckpointConfig(), cleanup=False) as checkpoints:
        assert checkpoints.steps() == []
    assert half.is_dir()
