"""A PEFT adapter directory: its files, opened without reading a tensor.

The directory holds adapter_config.json and adapter_model.safetensors. A run of ours
adds base_config.json (where it changed its base's configuration), training.json (how
the adapter was trained) and the files of `convert.companions`. `convert.peft_reading`
and `convert.peft_writing` convert the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.files import TensorFiles, broken_link, read_header, read_json
from convert.peft_names import plain_names
from convert.peft_text import text_part, text_settings
from qlora_jax.errors import CheckpointError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import CHANGES_FILE, changes_to_json, read_changes

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINING_RECORD = "training.json"
"""How a run trained the adapter, as JSON; see `training_record`."""
FINGERPRINT = "qlora_jax_base_fingerprint"
"""Key in the metadata of the weights file: the base that the adapter was trained on."""


def peft_directory(path: Path) -> Path:
    """Returns a PEFT directory as it is, and of a run directory its `adapter/`."""
    inside = path / "adapter"
    if not (path / ADAPTER_CONFIG).is_file() and (inside / ADAPTER_CONFIG).is_file():
        return inside
    return path


def training_record(path: Path) -> dict[str, Any]:
    """Returns what a run recorded of the adapter it wrote; {} without a record.

    "step" is the optimizer step, "quantization" and "dtype" are the form in which the
    base was held; the adapter with the best held-out loss has "eval_loss" and
    "eval_perplexity" as well.

    Args:
      path: PEFT directory.

    Raises:
      CheckpointError: a record that is not a JSON object.
    """
    file = path / TRAINING_RECORD
    return read_json(file) if file.is_file() else {}


def common_record(*paths: Path) -> dict[str, Any]:
    """Returns the training record for a copy of an adapter, or a sum of several.

    Args:
      paths: PEFT directories.

    Returns:
      Of one, its record; of several, the form of the base if all have the same. As
      `save_adapter` takes `extra_files`: {} if nothing is recorded.

    Raises:
      CheckpointError: a record that is not a JSON object.
    """
    record, *others = map(training_record, paths)
    if others:
        names = ("quantization", "lm_head", "dtype", "config")
        form = {name: record[name] for name in names if name in record}
        differs = any(
            other.get(name) != value for other in others for name, value in form.items()
        )
        record = {} if differs or "quantization" not in form else form
    return {TRAINING_RECORD: record} if record else {}


def open_adapter(
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    skipped: list[str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, TensorFiles]:
    """Opens a PEFT directory: reads its configuration and the names of its tensors.

    Of an adapter of a model of images and text it is the text model's part, under the
    names that this has alone (`convert.peft_text`).

    Args:
      path: the directory.
      strict: raise if the configuration has unknown fields, or other parts of a model
        of images and text are trained.
      skipped: collects such fields and tensors otherwise.
      base: parameter tree of the model that the adapter is used on, if there is one.

    Raises:
      CheckpointError: the path is not a PEFT directory, or a file is damaged.
      UserError: the configuration uses what is not supported.
    """
    path = Path(path)
    _check_directory(path)
    lora = LoraConfig.from_peft(
        read_json(path / ADAPTER_CONFIG),
        strict=strict,
        skipped=[] if skipped is None else skipped,
    )
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(_no_weights(path))
    infos, metadata = read_header(path / ADAPTER_WEIGHTS)
    notes = [] if skipped is None else skipped
    notes += _other_weights(path)
    files = plain_names(infos, path, notes)
    files, prefix = text_part(files, path, strict=strict, notes=notes)
    if prefix is not None:
        lora = text_settings(lora, prefix, files, base, notes)
    lora = replace(
        lora,
        base_fingerprint=metadata.get(FINGERPRINT),
        base_config_changes=_base_config_changes(path),
    )
    return lora, files


_PICKLES = ("adapter_model.bin", "trainable_params.bin", "non_lora_trainables.bin")


def _other_weights(path: Path) -> list[str]:
    """Notes files of weights beside those that are read, which PEFT passes over too.

    One is the new_embeddings.safetensors of vLLM, with the rows of added tokens;
    LongLoRA and LLaVA have what they train beside the adapter in pickle files.
    """
    # A model's own are used, or named, elsewhere.
    names = sorted(
        file.name
        for file in path.glob("*.safetensors")
        if file.name != ADAPTER_WEIGHTS and not file.name.startswith("model")
    )
    names += [name for name in _PICKLES if (path / name).is_file()]
    if not names:
        return []
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return [f"{', '.join(names[:3])}{more}, beside {ADAPTER_WEIGHTS}"]


def _no_weights(path: Path) -> str:
    """Returns the message for a directory without safetensors weights."""
    if (path / "adapter_model.bin").is_file():
        return (
            f"`{path}` holds its weights in adapter_model.bin, a pickle file, which "
            "can run any code when it is opened and is therefore not read. Where torch "
            "is installed, these lines convert it, and refuse anything but tensors:\n"
            "  import torch, safetensors.torch\n"
            f"  tensors = torch.load({str(path / 'adapter_model.bin')!r}, "
            "weights_only=True, map_location='cpu')\n"
            "  tensors = {k: v.clone().contiguous() for k, v in tensors.items()}\n"
            f"  safetensors.torch.save_file(tensors, {str(path / ADAPTER_WEIGHTS)!r}, "
            "metadata={'format': 'pt'})"
        )
    shards = sorted(p.name for p in path.glob("adapter_model-*.safetensors"))
    if shards:
        return (
            f"`{path}` holds its weights in shards ({shards[0]}, ...), "
            "which neither PEFT nor this program reads. Put their tensors into one "
            f"{ADAPTER_WEIGHTS}."
        )
    link = broken_link(path / ADAPTER_WEIGHTS)
    return link or f"`{path}` has no {ADAPTER_WEIGHTS}."


def _check_directory(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(
            f"`{path}` does not exist. An adapter is a local PEFT directory with "
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"`{path}` is a file; give the PEFT directory that holds it."
        )
    if not (path / ADAPTER_CONFIG).is_file():
        link = broken_link(path / ADAPTER_CONFIG)
        if link is not None:
            raise CheckpointError(link)
        kind = "a model" if (path / "config.json").is_file() else "not a PEFT adapter"
        inside = sorted(p.parent.name for p in path.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f" Did you mean `{path / inside[0]}`?" if inside else ""
        if kind == "a model" and not inside:
            hint = " It is given as the base, `model.path` of a run."
        raise CheckpointError(f"`{path}` is {kind}: it has no {ADAPTER_CONFIG}.{hint}")


def other_base_name(lora: LoraConfig, adapter: Path, base: Path) -> list[str]:
    """Notes a base whose name is not the one that an adapter was trained on.

    Where the adapter has the fingerprint of its base, the weights are compared instead.
    Of a name only the last part counts: a download may lie anywhere.

    Args:
      lora: configuration of the adapter.
      adapter: its directory.
      base: directory of the base that it is used on.

    Returns:
      One note, or none.
    """
    name = lora.base_model_name_or_path
    if lora.base_fingerprint is not None or not name:
        return []
    # A download cache has models--OWNER--NAME/snapshots/REVISION.
    here = base.resolve()
    is_snapshot = here.parent.name == "snapshots"
    names = {
        here.name,
        base.name,
        here.parents[1].name.split("--")[-1] if is_snapshot else "",
    }
    config = base / "config.json"
    if config.is_file():
        names.add(os.path.basename(str(read_json(config).get("_name_or_path") or "")))
    paths = (Path(name).resolve(), (adapter / name).resolve())
    unlike = here not in paths and not {_plain(n) for n in names if n} & {
        _plain(os.path.basename(name.rstrip("/")))
    }
    revision = lora.revision
    if revision in (None, "", "main") or (is_snapshot and here.name == revision):
        revision = None
    if not unlike and revision is None:
        return []
    wanted = f"{name!r:.200}" + (f" at revision {revision!r:.80}" if revision else "")
    return [
        f"`{adapter}` names {wanted} as its base and is used on `{base}`; it records "
        "no fingerprint, so whether the weights are the same is not known"
    ]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _base_config_changes(path: Path) -> str | None:
    """Reads how the base's config.json was changed for training."""
    file = path / CHANGES_FILE
    if not file.is_file():
        return None
    changes = read_json(file)
    read_changes(changes, f"`{file}`")
    return changes_to_json(changes)


def shorten(notes: Sequence[str], *, shown: int = 10) -> list[str]:
    """Returns the first of many notes, and a note that counts the others."""
    more = len(notes) - shown
    return [*notes[:shown], *([f"{more:,} more like these"] if more > 0 else [])]
