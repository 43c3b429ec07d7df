"""What a directory is: a base, an adapter, or a run, and what it says for itself.

A path given to a command may be any of the three. What a run directory was trained with
is taken from its settings, so that it is loaded again as it was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from convert.peft import open_adapter
from qlora_jax.bases import base_places
from qlora_jax.errors import CheckpointError
from qlora_jax.runfile import RunConfig, read_config

ADAPTER_CONFIG = "adapter_config.json"


def resolve_auto(path: Path, quantization: Any, dtype: Any) -> tuple[Any, Any]:
    """Settles "auto": as the run directory `path` was trained, else nf4_dq, bfloat16.

    Returns:
      Quantization, with None for "none", and dtype.
    """
    trained = run_settings(path)
    if quantization == "auto":
        quantization = "nf4_dq" if trained is None else trained.model.quantization
    if dtype == "auto":
        dtype = "bfloat16" if trained is None else trained.model.dtype
    return None if quantization == "none" else quantization, dtype


def quantizes_lm_head(path: Path, quantization: Any) -> bool:
    """Whether the head is packed too: as the run directory `path` was trained.

    A run that is asked for in another quantization is another model; its head stays
    dense then.

    Args:
      path: any directory.
      quantization: as given, "auto" included.
    """
    trained = run_settings(path)
    return (
        trained is not None
        and trained.model.lm_head == "nf4"
        and quantization in ("auto", trained.model.quantization)
    )


def chat_template(trained: RunConfig | None, adapter: Path | None) -> str | None:
    """The template file of a run's conversations, or beside an adapter; else None."""
    if trained is not None:
        parts = [part for _, part in trained.data.parts()] or [trained.data]
        given = {part.chat_template for part in parts if part.format == "messages"}
        (one,) = given if len(given) == 1 else (None,)
        if one is not None:
            return one
    beside = None if adapter is None else adapter / "chat_template.jinja"
    return str(beside) if beside is not None and beside.is_file() else None


def run_settings(path: Path) -> RunConfig | None:
    """The settings of the run directory `path`; None if it is something else."""
    settings = path / "config.toml"
    return read_config(settings) if settings.is_file() else None


def adapter_directory(path: Path) -> Path | None:
    """The PEFT directory that `path` is, or holds as a run directory; else None."""
    for place in (path, path / "adapter"):
        if (place / ADAPTER_CONFIG).is_file():
            return place
    return None


def find_base(adapter: Path, base: str | os.PathLike[str] | None = None) -> Path:
    """Finds the base of a PEFT directory on this machine.

    Looks at `base`, then at `base_model_name_or_path` as a path: as it stands, beside
    the adapter directory, and beside its parent. The network is never asked.

    Raises:
      CheckpointError: no such directory.
    """
    if base is not None:
        if not Path(base).is_dir():
            raise CheckpointError(f"The base `{base}` is no directory.")
        return Path(base)
    name = open_adapter(adapter)[0].base_model_name_or_path
    if not name:
        raise CheckpointError(
            f"`{adapter}` does not say what its base is (`base_model_name_or_path` in "
            f"{ADAPTER_CONFIG} is empty). Give it with `base=` (--base)."
        )
    tried = base_places(adapter, name)
    for place in tried:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"The base of `{adapter}` is {name!r}, which is no directory here (looked at "
        f"{', '.join(f'`{p}`' for p in tried)}). Give it with `base=` (--base)."
    )
