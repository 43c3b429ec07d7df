"""What a directory is: a base, an adapter, or a run, and what it says for itself.

A path given to a command may be any of the three. What a run directory was trained with
is taken from its settings, so that it is loaded again as it was, and so is each of the
adapters in it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.files import CHAT_TEMPLATE
from convert.peft import CONFIG, open_adapter, peft_directory
from qlora_jax.bases import base_places
from qlora_jax.data import DataConfig
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.toml import SETTINGS, read_config

# What lies in a run directory, beside its settings.
ADAPTER, START = "adapter", "initial_adapter"
ADAPTER_EMA = "adapter_ema"
REPORT, CHECKPOINTS = "report.json", "checkpoints"
# The adapter with the best held-out loss.
BEST = "best_adapter"
# What is known of a run when its first step is about to be taken.
STARTED = "started.json"
# What is asked and measured as the run is.
_ADAPTERS = (ADAPTER, ADAPTER_EMA, BEST)
_STEP = re.compile(r"step_(\d+)")


def resolve_auto(
    trained: RunConfig | None, quantization: Any, dtype: Any
) -> tuple[Any, Any]:
    """Settles "auto": as a run was trained, or is to be, else nf4_dq, bfloat16.

    Args:
      trained: settings of the run, if there is one.
      quantization: as given.
      dtype: as given.

    Returns:
      Quantization, with None for "none", and dtype.
    """
    if quantization == "auto":
        quantization = "nf4_dq" if trained is None else trained.model.quantization
    if dtype == "auto":
        dtype = "bfloat16" if trained is None else trained.model.dtype
    return None if quantization == "none" else quantization, dtype


def quantizes_lm_head(trained: RunConfig | None, quantization: Any) -> bool:
    """Whether the head is packed too: as a run was trained, or is to be.

    A run that is asked for in another quantization is another model; its head stays
    dense then.

    Args:
      trained: settings of the run, if there is one.
      quantization: as given, "auto" included.
    """
    return (
        trained is not None
        and trained.model.lm_head == "nf4"
        and quantization in ("auto", trained.model.quantization)
    )


def template_text(data: DataConfig, say: Callable[[str], None]) -> str | None:
    """The text of the template file that conversations are written with.

    Args:
      data: of a run. Of several sources with conversations, the first one's counts.
      say: is told where they do not agree.

    Returns:
      The text; None where there are no conversations, or the tokenizer's own template
      writes them.

    Raises:
      UserError: the file cannot be read.
    """
    first, *others = _template_files(data)
    if others:
        own = "the tokenizer's own"
        say(
            "Note: the sources write conversations with several chat templates: "
            f"{', '.join(f or own for f in (first, *others))}. The first is the one "
            "that `chat` takes"
            + ("." if first is None else f", and is kept as {CHAT_TEMPLATE}.")
        )
    if first is None:
        return None
    try:
        return Path(first).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`data.chat_template`: cannot read {first}: {error}"
        ) from error


def _template_files(data: DataConfig) -> list[str | None]:
    """The templates of conversations, each once; None stands for the tokenizer's."""
    found = [one.chat_template for one in data.each if one.format == "messages"]
    return list(dict.fromkeys(found)) or [None]


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or an adapter of; else None."""
    if (path / SETTINGS).is_file():
        return path
    # By its whole path: "." has no name.
    whole = Path(os.path.abspath(path))
    inside = whole.name in _ADAPTERS and (whole / CONFIG).is_file()
    if not inside or not (whole.parent / SETTINGS).is_file():
        return None
    return path.parent if path.name == whole.name else whole.parent


def run_settings(path: Path) -> RunConfig | None:
    """The settings of the run that `path` is, or an adapter of; else None."""
    run = run_of(path)
    return None if run is None else read_config(run)


def kept_settings(run: Path) -> RunConfig:
    """The settings of a run directory, to read its data with once more.

    The directory may have been moved since, and the template file edited: it is named
    where it is, and the text that the run kept takes the place of the file.
    """
    config = read_config(run)
    config = dataclasses.replace(config, output_dir=str(run))
    own = _template_files(config.data)[0]
    places = (run / name / CHAT_TEMPLATE for name in _ADAPTERS)
    kept = next((place for place in places if place.is_file()), None)
    if own is None or kept is None:
        return config

    def swapped(one: Any) -> Any:
        same = one.chat_template == own
        return dataclasses.replace(one, chat_template=str(kept)) if same else one

    sources = tuple(map(swapped, config.data.sources))
    data = dataclasses.replace(swapped(config.data), sources=sources)
    return dataclasses.replace(config, data=data, eval=swapped(config.eval))


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a directory among checkpoints, damaged or not, the newest first.

    Args:
      directory: of the checkpoints; it need not exist.
    """
    found = directory.iterdir() if directory.is_dir() else ()
    matches = (_STEP.fullmatch(path.name) for path in found)
    return sorted((int(m[1]) for m in matches if m), reverse=True)


def adapter_directory(path: Path) -> Path | None:
    """The PEFT directory that `path` is, or holds as a run directory; else None."""
    place = peft_directory(path)
    return place if (place / CONFIG).is_file() else None


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
            f"{CONFIG} is empty). Give it with `base=` (--base)."
        )
    tried = base_places(adapter, name)
    for place in tried:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"The base of `{adapter}` is {name!r}, which is no directory here (looked at "
        f"{', '.join(f'`{p}`' for p in tried)}). Give it with `base=` (--base)."
    )
