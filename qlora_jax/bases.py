"""Where the base of an adapter lies: the places looked at, and how a copy names it.

An adapter_config.json names its base by a path or by a name on a hub. A path may be
relative, to the directory we are in (what PEFT takes it for) or to the adapter, so that
directories that belong together can be moved together.
"""

from __future__ import annotations

import os
from pathlib import Path


def base_places(adapter: Path, name: str) -> list[Path]:
    """Where the base of an adapter may be; the first place depends on where we are."""
    here = adapter.resolve()
    return [Path(name), here / name, here.parent / name, here.parent.parent / name]


def name_from(
    name: str | None, source: Path, output: Path, base: Path | None = None
) -> str | None:
    """Returns what leads from a copy of an adapter to the base that the adapter names.

    A relative path that does so from the copy too is kept. Another becomes absolute,
    which PEFT finds as well, wherever it is started. What leads to no directory, such
    as a name on a hub, is left alone.

    Args:
      name: `base_model_name_or_path` of the adapter.
      source: its directory.
      output: that of the copy, which need not exist.
      base: a model directory, by whose path the base is called if it is the same one.
    """
    if not name or Path(name).is_absolute():
        return name
    found = _first(base_places(source, name))
    if found is None:
        return name
    # Without "..", which leads nowhere from a directory that does not exist yet.
    places = [Path(os.path.normpath(p)) for p in base_places(output, name)[1:]]
    kept = _first(places)
    if kept is not None and kept.samefile(found):
        return name
    same = base is not None and base.samefile(found)
    return os.path.abspath(base if same and base is not None else found)


def leads_nowhere(name: str | None, source: Path) -> bool:
    """Whether an adapter names a path, and no name on a hub, where no model is."""
    if not name or not (Path(name).is_absolute() or name.startswith(".")):
        return False
    return _first(base_places(source, name)) is None


def _first(places: list[Path]) -> Path | None:
    return next((p for p in places if (p / "config.json").is_file()), None)
