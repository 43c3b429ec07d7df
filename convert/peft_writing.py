"""Our adapter tree -> a PEFT directory, byte for byte as PEFT writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.atomic import new_directory, write_json
from convert.files import DTYPES, FLOAT_DTYPES, Mismatches, check_finite
from convert.names import AdapterTensor, adapter_keys
from convert.output import Entry, safetensors_bytes, write_files, write_safetensors
from convert.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FINGERPRINT
from convert.peft_tables import table_keys
from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig, Selection, select
from qlora_jax.models import CHANGES_FILE, LlamaConfig, abstract_base


def save_adapter(
    directory: str | os.PathLike[str],
    lora_config: LoraConfig,
    adapters: Mapping[str, Any],
    model: LlamaConfig | Mapping[str, Any],
    *,
    base_model_name_or_path: str | None = None,
    base_fingerprint: str | None = None,
    overwrite: bool = False,
    extra_files: Mapping[str, Any] | None = None,
    base_tables: Mapping[trees.Path, Any] | None = None,
) -> None:
    """Writes a PEFT directory that PEFT, vLLM and Unsloth load.

    The directory appears complete or not at all. The same adapter gives the same
    bytes. Tables of the base are copied into it only if `base_tables` has them.

    Args:
      directory: to be created; must not exist or be empty.
      lora_config: of the adapter.
      adapters: trained tree, as `qlora_jax.lora.functional` lists it; written as
        float32.
      model: the base's configuration, or its parameter tree.
      base_model_name_or_path: the base that adapter_config.json names (default: that
        of `lora_config`).
      base_fingerprint: `qlora_jax.fingerprint_tree(base)` of the base it was trained
        on, as it was loaded for training. Kept in the file, it lets a loader notice
        another base (default: that of `lora_config`).
      overwrite: whether an existing directory is replaced.
      extra_files: further files of the directory: name -> bytes, or a value to write as
        JSON.
      base_tables: weights of embedding and head that are not those of the base's
        directory (`BaseWithTables.tables`).

    Raises:
      UserError: an adapter of a changed base (see `absorb`), or a directory that cannot
        be written.
      CheckpointError: a tree that `lora_config` does not describe for this model, or
        NaN or infinity in it.
    """
    if lora_config.changes_base:
        raise UserError(
            f"`init_lora_weights`={lora_config.init_lora_weights!r}: this adapter "
            "belongs to a changed base and would be another one on the original. Save "
            "what `qlora_jax.absorb(lora_config, adapters, base)` returns."
        )
    base = abstract_base(model) if isinstance(model, LlamaConfig) else model
    selection = select(base, lora_config)
    arrays = _checked_arrays(adapters, selection, lora_config)
    tensors = adapter_keys(selection, lora_config)
    for key, tensor in tensors.items():
        # Before anything is written: with `overwrite`, a diverged adapter must not take
        # the place of the last good one.
        check_finite(np.ascontiguousarray(tensor.view(arrays[tensor.path])), key)
    entries = [_entry(key, tensor, arrays) for key, tensor in tensors.items()]
    entries += [
        Entry(
            key, np.dtype(table.dtype), tuple(table.shape), partial(np.asarray, table)
        )
        for key, table in table_keys(base_tables or {}, selection).items()
    ]
    if base_fingerprint is not None:
        lora_config = replace(lora_config, base_fingerprint=base_fingerprint)
    raw = _adapter_config(lora_config, selection)
    if base_model_name_or_path is not None:
        raw["base_model_name_or_path"] = base_model_name_or_path
    with new_directory(Path(directory), overwrite=overwrite) as new:
        write_safetensors(new / ADAPTER_WEIGHTS, entries, _metadata(lora_config))
        # Sorted at the top only: in patterns the first that matches decides.
        write_json(new / ADAPTER_CONFIG, dict(sorted(raw.items())), sort_keys=False)
        if lora_config.base_config_changes is not None:
            changes = json.loads(lora_config.base_config_changes)
            write_json(new / CHANGES_FILE, changes)
        for name, content in (extra_files or {}).items():
            if isinstance(content, bytes):
                write_files(new, {name: content})
            else:
                write_json(new / name, content, sort_keys=False)


def adapter_bytes(
    model: LlamaConfig | Mapping[str, Any],
    lora: LoraConfig,
    *,
    base_tables: Mapping[trees.Path, Any] | None = None,
    table_dtype: str = "float32",
) -> int:
    """Returns the exact size of the adapter_model.safetensors that would be saved.

    Args:
      model: configuration or parameter tree of the base.
      lora: of the adapter.
      base_tables: tables of the base that are saved with it, of shapes or arrays.
      table_dtype: dtype that they are held in.
    """
    # The size follows from the header; no entry is read.
    empty = np.zeros(0, np.float32)
    base = abstract_base(model) if isinstance(model, LlamaConfig) else model
    selection = select(base, lora)
    entries = [
        Entry(key, empty.dtype, tensor.shape, lambda: empty)
        for key, tensor in adapter_keys(selection, lora).items()
    ]
    dtype = DTYPES[FLOAT_DTYPES[table_dtype]]
    entries += [
        Entry(key, dtype, tuple(table.shape), lambda: empty)
        for key, table in table_keys(base_tables or {}, selection).items()
    ]
    return safetensors_bytes(entries, _metadata(lora))


def _adapter_config(lora: LoraConfig, selection: Selection) -> dict[str, Any]:
    raw = lora.to_peft()
    if raw["target_modules"] in ("all-linear", sorted(trees.QUANTIZED)):
        # Spelled out, as PEFT does: not every reader knows the word, and no model has
        # all names of the default.
        raw["target_modules"] = sorted({a.path[-1] for a in selection.adapted})
    return raw


def _checked_arrays(
    adapters: Mapping[str, Any], selection: Selection, lora: LoraConfig
) -> dict[trees.Path, NDArray]:
    """Returns the arrays of a tree on the host.

    Raises:
      CheckpointError: the tree has other arrays than the selection.
    """
    arrays = dict(trees.walk(adapters))
    shapes = selection.shapes()
    problems = Mismatches(
        f"The adapter tree is not the one that `r`={lora.r}, `target_modules`="
        f"{lora.target_modules!r:.200} describes for this model"
    )
    for path, shape in shapes.items():
        name = ".".join(path)
        if path not in arrays:
            problems.add("missing arrays", name)
        elif (actual := tuple(arrays[path].shape)) != shape:
            problems.add(
                "arrays of another shape",
                f"{name} {list(actual)} instead of {list(shape)}",
            )
        elif np.dtype(arrays[path].dtype).name not in FLOAT_DTYPES:
            problems.add("arrays of another dtype", f"{name} {arrays[path].dtype}")
    for path in arrays:
        if path not in shapes:
            problems.add("unexpected arrays", ".".join(path))
    problems.check()
    return {path: np.asarray(array) for path, array in arrays.items()}


def _entry(
    key: str, tensor: AdapterTensor, arrays: Mapping[trees.Path, NDArray]
) -> Entry:
    """Makes an entry that is cut out and widened when its turn comes."""

    def read() -> NDArray:
        view = tensor.view(arrays[tensor.path])
        return np.ascontiguousarray(view.astype(np.float32, copy=False))

    return Entry(key, np.dtype(np.float32), tensor.shape, read)


def _metadata(lora: LoraConfig) -> dict[str, str]:
    metadata = {"format": "pt"}
    if lora.base_fingerprint is not None:
        metadata[FINGERPRINT] = lora.base_fingerprint
    return metadata
