"""Files and directories that appear complete or not at all.

What is written is filled under a temporary name next to its final one, synced, and
renamed. A process that is killed meanwhile leaves the temporary name behind; the next
one that writes in the same directory removes it.

The names of leftovers are our own (`.NAME.RANDOM.qlora-jax-partial`), and a lock, which
the system releases when a process ends, tells them from what is being written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError


class _CannotWriteError(UserError):
    """What the system refuses; the cause is its `OSError`."""


_PARTIAL, _REPLACED = "partial", "replaced"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.qlora-jax-(?P<kind>\w+)", re.S)


def is_leftover(name: str) -> bool:
    """Whether a file or directory is named as what is being written, or was."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left in a directory while they wrote in it.

    A directory that had stepped aside for a new one gets its name back where the new
    one never took it. What another process is writing is left alone, as is everything
    on a file system without locks.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            match = _LEFTOVER.fullmatch(name)
            if match is None:
                continue
            path = directory / name
            with contextlib.suppress(OSError), _lock(path):
                target = directory / match["name"]
                if match["kind"] == _REPLACED and not os.path.lexists(target):
                    os.rename(path, target)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the lock of a leftover of this user.

    Raises:
      OSError: another process holds it, it belongs to someone else (in a directory for
        all), or it is a link.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _temporary_path(path: Path, kind: str) -> Path:
    # A name has at most 255 bytes, and a character up to four.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.qlora-jax-{kind}")


@contextlib.contextmanager
def _partial(path: Path, create: Callable[[Path], None]) -> Iterator[tuple[Path, int]]:
    """Yields the temporary path for `path`, created and locked, and its handle.

    At the end it is removed if it is still there.
    """
    remove_leftovers(path.parent)
    while True:
        temporary = _temporary_path(path, _PARTIAL)
        create(temporary)
        handle = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # no locks: nobody removes it either
            fcntl.flock(handle, fcntl.LOCK_EX)
        # In the meantime another process may have taken it for a leftover.
        if temporary.exists():
            break
        os.close(handle)
    try:
        yield temporary, handle
    finally:
        os.close(handle)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write, which is renamed to `path` at the end.

    After an error or a signal nothing is left behind, and `path` is as before.

    Raises:
      UserError: it cannot be written (no directory, disk full, no permission).
    """
    path = Path(os.path.abspath(path))
    with _output_errors(path):
        check_new_file(path)
        with _partial(path, lambda new: new.touch(exist_ok=False)) as (new, handle):
            yield new
            # Before the rename: the new name must not reach the disk before the
            # content.
            os.fsync(handle)
            os.replace(new, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, or replaces it; it is complete at every moment.

    Raises:
      UserError: as for `new_file`.
    """
    with new_file(path) as new:
        new.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, by `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes JSON as transformers and PEFT do, indented, by `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def check_new_file(path: Path) -> None:
    """Raises where `new_file` would; call it before long work.

    Raises:
      UserError: `path` is a directory or a device, its directory does not exist, or
        there is no permission.
    """
    with _output_errors(path):
        if path.is_dir():
            raise UserError(f"Cannot write the file `{path}`: it is a directory.")
        if path.exists() and not path.is_file():
            raise UserError(f"Cannot write `{path}`: it is a pipe or a device.")
        parent = path.absolute().parent
        if not parent.is_dir():
            raise UserError(
                f"Cannot write `{path}`: there is no directory `{parent}`. Make it, or "
                "give another path."
            )
        _check_permission(path, parent)


def _check_home(path: Path) -> None:
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise UserError(
            f"`{path}`: `~` is not expanded here and would become a directory of this "
            "name. Write the path out, or use `pathlib.Path(...).expanduser()`."
        )


def check_new_directory(path: Path, *, overwrite: bool = False) -> None:
    """Raises where `new_directory` would; call it before long work.

    Raises:
      UserError: `path` is a file, or a directory with something in it, or there is no
        permission.
    """
    with _output_errors(path):
        _check_home(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"Cannot write the directory `{path}`: it is a file.")
        if not overwrite and path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"`{path}` exists and is not empty; nothing was written. Give a new "
                "directory, or remove this one."
            )
        existing = next(p for p in path.absolute().parents if p.exists())
        if not existing.is_dir():
            raise UserError(f"Cannot write `{path}`: `{existing}` is a file.")
        _check_permission(path, existing)


def _check_permission(path: Path, parent: Path) -> None:
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write `{path}`: no permission to write in `{parent}`.")


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    if "\0" in str(path):
        raise UserError(f"Cannot write {str(path)!r}: there is a NUL in the name.")
    try:
        yield
    except (OSError, _CannotWriteError) as error:
        # A file within a directory that is being written has a path that the user does
        # not know.
        cause = error.__cause__ if isinstance(error, _CannotWriteError) else error
        assert isinstance(cause, OSError)
        raise _CannotWriteError(
            f"Cannot write `{path}`: {cause.strerror or cause}. Nothing was left "
            "behind."
        ) from cause


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory to fill, which is renamed to `path` at the end.

    After an error or a signal nothing is left behind, and `path` is as before.

    Raises:
      UserError: `path` exists and is not an empty directory (unless `overwrite`), or
        it cannot be written (disk full, no permission).
    """
    # Gives "." and ".." a name and a parent, and keeps symbolic links.
    _check_home(path)
    path = Path(os.path.abspath(path))
    with _output_errors(path):
        check_new_directory(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path, Path.mkdir) as (new, _):
            yield new
            # The entries reach the disk before the rename, and the rename before
            # success is reported.
            _sync(new)
            if overwrite and path.is_dir() and any(path.iterdir()):
                _replace(path, new)
            else:
                # Replaces an empty directory, and fails if it was filled in the
                # meantime.
                os.rename(new, path)
            _sync(path.parent)


def _replace(path: Path, new: Path) -> None:
    """Exchanges a directory for a new one; an error puts the old one back."""
    # POSIX exchanges no two directories at once, so the old one steps aside first.
    old = _temporary_path(path, _REPLACED)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_lock(path))
        try:
            os.rename(path, old)
            os.rename(new, path)
        except BaseException:  # a signal as well, before, between or after the two
            if not path.exists():
                os.rename(old, path)
            elif old.exists():  # the new one is in place
                shutil.rmtree(old)
            raise
        shutil.rmtree(old)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yields a directory for temporary files, which is removed at the end.

    Those of processes that were killed are removed first.
    """
    target = Path(tempfile.gettempdir()) / "scratch"
    with _partial(target, lambda new: new.mkdir(mode=0o700)) as (new, _):
        yield new


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
