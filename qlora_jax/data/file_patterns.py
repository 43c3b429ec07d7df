"""Finds the files of a pattern, within a bound of directory entries.

The rules are those of `glob`: "*", "?" and "[...]" within a name, "**" for any
directories, and hidden files only where a name of the pattern begins with a dot.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import UserError

MAX_ENTRIES = 200_000
"""Files and directories that are looked at for one pattern."""


def matching_files(pattern: str) -> list[str]:
    """Returns the regular files that a pattern matches, sorted.

    Raises:
      UserError: the pattern spans too many files and directories.
    """
    counter = _Counter(pattern)
    absolute = pattern.startswith(os.sep)
    directories = [os.sep if absolute else ""]
    # Several "**" in a row match what one does, and would be tried in every way.
    parts: list[str] = []
    for part in pattern.split(os.sep):
        if part and not (part == "**" and parts[-1:] == ["**"]):
            parts.append(part)
    for part in parts:
        found = (
            path
            for directory in directories
            for path in _step(directory, part, counter)
        )
        directories = list(dict.fromkeys(found))
    return sorted(path for path in directories if Path(path).is_file())


class _Counter:
    """Lists directories until there were too many entries."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._count = pattern, 0

    def entries(self, directory: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(directory or os.curdir) as scan:
                found = []
                for entry in scan:
                    found.append(entry)
                    self._count += 1
                    if self._count > MAX_ENTRIES:
                        raise UserError(
                            f"`data.path`: the pattern {self._pattern!r} spans more "
                            f"than {MAX_ENTRIES:,} files and directories. Begin it "
                            "with the directory of the data."
                        )
        except OSError:  # no directory, or no permission
            return []
        return sorted(found, key=lambda entry: entry.name)


def _step(directory: str, part: str, counter: _Counter) -> Iterator[str]:
    """Yields what one part of a pattern matches in a directory."""
    if part == "**":
        pending, seen = [directory], set()
        while pending:
            directory = pending.pop()
            yield directory
            for entry in counter.entries(directory):
                if entry.name.startswith("."):
                    continue
                path = os.path.join(directory, entry.name)
                if not os.path.isdir(path):
                    yield path
                    continue
                # A link may lead around in a circle.
                status = os.stat(path)
                if (identity := (status.st_dev, status.st_ino)) not in seen:
                    seen.add(identity)
                    pending.append(path)
    elif glob.has_magic(part):
        for entry in counter.entries(directory):
            hidden = entry.name.startswith(".") and not part.startswith(".")
            if not hidden and fnmatch.fnmatchcase(entry.name, part):
                yield os.path.join(directory, entry.name)
    elif os.path.lexists(os.path.join(directory, part)):
        yield os.path.join(directory, part)
