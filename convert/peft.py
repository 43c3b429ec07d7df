"""PEFT adapter directories <-> our adapter tree, strictly and byte for byte.

A PEFT directory is adapter_config.json and adapter_model.safetensors with one
`lora_A` [r, in] and one `lora_B` [out, r] for each adapted linear of each layer. What
has to be in the file follows from `target_modules` and the model; a file that has
more, less or something of another shape is refused, where PEFT itself would load what
fits and leave the rest at its initial value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import names
from convert.files import (
    DTYPES,
    Problems,
    TensorFiles,
    check_finite,
    read_header,
    read_json,
)
from convert.output import (
    Entry,
    new_directory,
    safetensors_bytes,
    write_json,
    write_safetensors,
)
from qlora_jax.config import LlamaConfig, LoraConfig
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora import targeted_modules, unmatched_targets

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_READABLE = ("F32", "BF16", "F16")


def open_adapter(path: str | os.PathLike[str]) -> tuple[LoraConfig, TensorFiles]:
    """Opens a PEFT directory: its configuration, and its tensors unread.

    Raises:
      CheckpointError: a path that is no PEFT directory, or damaged files.
      UserError: a configuration that uses what is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"`{path}` does not exist. An adapter is a local PEFT directory with "
            f"{CONFIG} and {WEIGHTS}."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"`{path}` is a file; give the PEFT directory that holds it."
        )
    if not (path / CONFIG).is_file():
        what = "a model" if (path / "config.json").is_file() else "no PEFT adapter"
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f" Did you mean `{path / inside[0]}`?" if inside else ""
        raise CheckpointError(f"`{path}` is {what}: it has no {CONFIG}.{hint}")
    lora = LoraConfig.from_peft(read_json(path / CONFIG))
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"`{path}` holds its weights in adapter_model.bin, a pickle file, "
                "which can run any code when it is opened and is therefore not read. "
                "Load it once with PEFT and save it again; PEFT writes safetensors."
            )
        raise CheckpointError(f"`{path}` has no {WEIGHTS}.")
    return lora, TensorFiles(path, read_header(path / WEIGHTS)[0])


def load_adapter(
    path: str | os.PathLike[str], config: LlamaConfig
) -> tuple[LoraConfig, dict[str, Any]]:
    """Loads a PEFT LoRA directory for a model of this configuration.

    Args:
      path: directory with adapter_config.json and adapter_model.safetensors.
      config: the base model's.

    Returns:
      (lora, adapters): float32 numpy arrays, `lora_A` [L, r, in] and `lora_B`
      [L, out, r] under the same module paths as the base tree. float16 and bfloat16
      files are widened.

    Raises:
      CheckpointError: tensors missing, unknown, of another shape, rank or dtype, or
        not finite; or a directory that is something else.
      UserError: an adapter_config.json that uses what is not supported, or targets
        that are not in this model.
    """
    lora, files = open_adapter(path)
    wanted = _keys(config, lora)
    problems = Problems(
        f"`{Path(path) / WEIGHTS}` does not hold the adapter that its {CONFIG} "
        f"(`r`={lora.r}, `target_modules`={lora.target_modules!r}) describes for this "
        "base model"
    )
    for key, (_, _, shape) in wanted.items():
        if key not in files:
            problems.add("missing tensors", key)
        elif files[key].dtype not in _READABLE:
            problems.add("tensors of another dtype", f"{key} {files[key].dtype}")
        elif files[key].shape != shape:
            problems.add(
                "tensors of another shape",
                f"{key} {list(files[key].shape)} instead of {list(shape)}",
            )
    for key in files:
        if key not in wanted:
            problems.add("unexpected tensors", key)
    problems.check(hint=_hint(files, wanted))
    adapters: dict[str, Any] = {}
    leaves: dict[names.Path, np.ndarray] = {}
    for path_, layer, shape in wanted.values():
        if path_ not in leaves:
            leading = () if layer is None else (config.num_hidden_layers,)
            leaves[path_] = np.empty((*leading, *shape), np.float32)
            names.put(adapters, path_, leaves[path_])
    for key in files.in_file_order(list(wanted)):
        where, layer, _ = wanted[key]
        array = files.read(key)
        check_finite(array, key)
        leaves[where][() if layer is None else layer] = array.astype(np.float32)
    return lora, adapters


def save_adapter(
    directory: str | os.PathLike[str],
    lora_config: LoraConfig,
    adapters: Mapping[str, Any],
    config: LlamaConfig,
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a PEFT directory that PEFT, vLLM and Unsloth load.

    The directory appears complete or not at all. The same adapter gives the same
    bytes.

    Args:
      directory: to be created; must not exist or be empty.
      lora_config: what the adapter is.
      adapters: tree of `lora_A` [L, r, in] and `lora_B` [L, out, r]; written as
        float32.
      config: the base model's.
      base_model_name_or_path: what adapter_config.json shall name as the base (default:
        what `lora_config` names).
      overwrite: whether a directory that is there is replaced.

    Raises:
      UserError: a tree that is not the one `lora_config` describes for this model,
        NaN or infinity in it, or a directory that cannot be written.
    """
    wanted = _keys(config, lora_config)
    arrays = dict(names.walk(adapters))
    problems = Problems(
        f"The adapter tree is not the one that `r`={lora_config.r}, `target_modules`="
        f"{lora_config.target_modules!r} describes for this model"
    )
    paths = {path: (layer, shape) for path, layer, shape in wanted.values()}
    for path, (layer, shape) in paths.items():
        leading = () if layer is None else (config.num_hidden_layers,)
        if path not in arrays:
            problems.add("missing arrays", ".".join(path))
        elif tuple(arrays[path].shape) != (*leading, *shape):
            problems.add(
                "arrays of another shape",
                f"{'.'.join(path)} {list(arrays[path].shape)} instead of "
                f"{[*leading, *shape]}",
            )
        elif np.dtype(arrays[path].dtype) not in [DTYPES[n] for n in _READABLE]:
            problems.add(
                "arrays of another dtype", f"{'.'.join(path)} {arrays[path].dtype}"
            )
    for path in arrays:
        if path not in paths:
            problems.add("unexpected arrays", ".".join(path))
    problems.check()
    host = {path: np.asarray(array) for path, array in arrays.items()}
    entries = []
    for key, (path, layer, _) in wanted.items():
        one = host[path] if layer is None else host[path][layer]
        array = np.ascontiguousarray(one.astype(np.float32))
        check_finite(array, key)
        entries.append(Entry.of(key, array))
    raw = lora_config.to_peft()
    if raw["target_modules"] == "all-linear":
        # Spelled out, as PEFT does: not every reader knows the word.
        raw["target_modules"] = sorted({path[-2] for path in paths})
    if base_model_name_or_path is not None:
        raw["base_model_name_or_path"] = base_model_name_or_path
    with new_directory(Path(directory), overwrite=overwrite) as new:
        write_safetensors(new / WEIGHTS, entries, {"format": "pt"})
        write_json(new / CONFIG, raw)


def adapter_bytes(config: LlamaConfig, lora: LoraConfig) -> int:
    """Size of the adapter_model.safetensors that `save_adapter` writes, to the byte."""
    nothing = np.zeros(0, np.float32)
    entries = [
        Entry(key, nothing.dtype, shape, lambda: nothing)
        for key, (_, _, shape) in _keys(config, lora).items()
    ]
    return safetensors_bytes(entries, {"format": "pt"})


def _keys(
    config: LlamaConfig, lora: LoraConfig
) -> dict[str, tuple[names.Path, int | None, tuple[int, int]]]:
    """Every key the adapter file has to have: (path in our tree, layer, shape)."""
    base = names.abstract_base(config)
    unmatched = unmatched_targets(base, lora)
    modules = targeted_modules(base, lora)
    if unmatched:
        raise UserError(
            f"`target_modules` names {', '.join(repr(n) for n in unmatched)}, which "
            "selects no linear module of this model. Linear modules here: "
            f"{', '.join(_linear_names(config))}."
        )
    out = {}
    for module, (out_features, in_features, layers) in modules.items():
        shapes = {"lora_A": (lora.r, in_features), "lora_B": (out_features, lora.r)}
        for layer in [None] if layers is None else range(layers):
            for part, shape in shapes.items():
                key = names.peft_key(module, layer, part)
                out[key] = ((*module, part), layer, shape)
    return out


def _linear_names(config: LlamaConfig) -> list[str]:
    linears = [p[-2] for p in names.shapes(config) if names.is_projection(p)]
    return linears + ([] if config.tie_word_embeddings else ["lm_head"])


def _hint(files: TensorFiles, wanted: Mapping[str, Any]) -> str:
    """Says what usually causes the disagreement, where the names tell."""
    if any(k.startswith(names.PEFT_PREFIX) for k in files):
        if any(".lora_A.default." in k for k in files):
            return "The keys carry an adapter name; save the adapter with PEFT."
        return "Is it the adapter of another model or rank?"
    example = next(iter(wanted))
    return f"PEFT's keys look like {example}; save the adapter with PEFT."
