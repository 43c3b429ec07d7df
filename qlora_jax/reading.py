"""Reads files that others wrote: regular files only, bounded where they are read whole.

A pipe would be waited for, and a device such as /dev/zero has no end. What is wrong
with a path is an `OSError` whose `strerror` says it.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 4_000_000
"""The longest text file that is read whole: a template, or the settings of a run."""


def expand_user(path: Any) -> Any:
    """Returns a path, or several, with `~` at the beginning expanded as a shell does.

    A shell does not expand it in `--output-dir=~/run`, nor does TOML or Python. What is
    not a string is returned as it is.
    """
    if isinstance(path, (list, tuple)):
        return tuple(map(expand_user, path))
    return os.path.expanduser(path) if isinstance(path, str) else path


def expand_fields(settings: Any, *names: str) -> None:
    """Expands `~` in fields of a frozen dataclass, in its `__post_init__`."""
    for name in names:
        object.__setattr__(settings, name, expand_user(getattr(settings, name)))


def open_file(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading.

    Raises:
      OSError: as `open`, or it is a pipe or a device, or no file has such a name.
    """
    try:
        file = open(path, "rb", opener=_open_at_once)
    except ValueError:  # not an OSError in Python
        raise OSError(errno.EINVAL, "there is a NUL in the name", str(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return file


def _open_at_once(path: str, flags: int) -> int:
    # Opening a pipe would otherwise wait for its writer. Regular files ignore the flag.
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Raises:
      OSError: as `open_file`, or the file is longer.
    """
    with open_file(path) as file:
        # One byte more than is allowed tells a longer file without reading it.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(
            errno.EFBIG, f"it is larger than {limit:,} bytes, the most that is read"
        )
    return content


def reason(error: OSError | UnicodeDecodeError) -> str:
    """Returns what a message says about a file that `read_text` could not read."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    return error.strerror or str(error)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Reads a UTF-8 file; a byte order mark and Windows line ends are taken off.

    Raises:
      OSError: as `read_bytes`.
      UnicodeDecodeError: it is not UTF-8.
    """
    text = read_bytes(path, limit).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")
