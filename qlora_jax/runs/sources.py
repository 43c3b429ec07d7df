"""Where the base of a run, and the adapter that it starts from, are on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import HubName, Needed, hub_name, local_path, parse_hub_name
from qlora_jax.errors import UserError, say
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.toml import SETTINGS, read_table

# Settings that may name a repository of the hub.
_NAMES = (("model", "path"), ("train", "adapter_init"))


@dataclass(frozen=True)
class Sources:
    """Directories that a run reads its model from."""

    base: Path
    adapter: Path | None = None
    """Of `train.adapter_init`."""


def find_sources(
    config: RunConfig, needed: Needed = "weights"
) -> tuple[RunConfig, Sources]:
    """Finds the base and the initial adapter; downloads those that are on the hub.

    Args:
      config: of the run.
      needed: what is downloaded of the base. An adapter comes whole.

    Returns:
      The settings, in which a name of the hub has the commit that was found; and the
      directories.

    Raises:
      CheckpointError: a name that leads to nothing.
    """
    config = _with_saved_commits(config)
    initial = config.train.adapter_init
    adapter = None if initial is None else local_path(initial)
    base = local_path(config.model.path, needed=needed)
    return _with_commits(config, base, adapter), Sources(base, adapter)


def hub_names(config: RunConfig) -> Iterator[HubName]:
    """Yields the names of the hub that a run has to fetch."""
    for section, field in _NAMES:
        path = getattr(getattr(config, section), field)
        name = None if path is None else parse_hub_name(path)
        if name is not None:
            yield name


def _with_commits(config: RunConfig, base: Path, adapter: Path | None) -> RunConfig:
    """Returns the settings with the commits that were found.

    The main branch of a repository moves on; a run that continues, and all that is done
    with its adapter, must find the base that it was trained on.
    """
    for (section, field), directory in zip(_NAMES, (base, adapter), strict=True):
        name = parse_hub_name(getattr(getattr(config, section), field) or "")
        found = None if directory is None else hub_name(directory)
        if name is not None and found is not None:
            config = _replace(config, section, field, str(found))
    return config


def _with_saved_commits(config: RunConfig) -> RunConfig:
    """Returns the settings of a run that continues, with the commits it began with."""
    directory = Path(config.output_dir)
    if not any(hub_names(config)) or not (directory / SETTINGS).is_file():
        return config
    try:
        table = read_table(directory)
    except UserError:
        return config  # what is wrong with it is said where it is continued
    for section, field in _NAMES:
        given = parse_hub_name(getattr(getattr(config, section), field) or "")
        saved = table.get(section)
        path = saved.get(field) if isinstance(saved, dict) else None
        name = parse_hub_name(path) if isinstance(path, str) else None
        if not given or not name or given.repo_id != name.repo_id:
            continue
        if given.revision is None:
            config = _replace(config, section, field, str(name))
        elif given != name:
            # It is meant, and it may be the same commit.
            say(
                f"Note: the run in `{directory}` began with `{name}`, and `{given}` "
                f"is asked for. Without @{given.revision} it continues with the first."
            )
    return config


def _replace(config: RunConfig, section: str, field: str, value: Any) -> RunConfig:
    changed = dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **{section: changed})
