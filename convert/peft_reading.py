"""A PEFT directory -> our adapter tree, checked tensor by tensor.

The configuration and the model determine which tensors a file must have
(`convert.names.adapter_keys`). A file with missing, additional or mis-shaped tensors is
refused, where PEFT would load the tensors that match and leave the others at their
initial values.

PEFT adds copies: tables of the base (`convert.peft_tables`), fully trained modules
under several names, and the tensors of an embedding for a tied head that shares them.
Copies are compared with their originals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import PackedTensor
from convert.files import FLOAT_NAMES, Mismatches, TensorFiles, check_finite
from convert.name_prefixes import prefix_cause
from convert.names import PEFT_PREFIX, AdapterTensor, adapter_keys
from convert.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from convert.peft_tables import check_vocab_size, saved_tables
from convert.rounding import rows_beyond_rounding
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, counted
from qlora_jax.lora import (
    LoraConfig,
    Selection,
    linear_modules,
    select,
    unused_settings,
)
from qlora_jax.models import LlamaConfig, abstract_base
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import EMBEDDING, HEAD, hf_key

# With bias="all" PEFT saves the biases of fully trained modules twice more, under names
# that it does not look up when it loads.
# float64 is what a program without torch may save.
_ADAPTER_DTYPES = (*FLOAT_NAMES, "F64")
_PEFT_MODEL = PEFT_PREFIX.partition(".")[0]
_STRAY_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")


def load_adapter(
    path: str | os.PathLike[str],
    model: LlamaConfig | Mapping[str, Any],
    *,
    strict: bool = True,
    skipped: list[str] | None = None,
) -> tuple[LoraConfig, dict[str, Any]]:
    """Loads a PEFT LoRA directory for a model.

    A float32 file is read straight into the result, so that the adapter is held in
    memory once. float16 and bfloat16 files are widened.

    Args:
      path: directory with adapter_config.json and adapter_model.safetensors.
      model: the base's configuration, or its parameter tree. With the tree, copies of
        base tables in the file (`base_layer.weight`) are compared with the base.
      strict: raise if a tensor is missing, unexpected or of another shape. Otherwise
        such tensors are skipped; an update with a missing part is skipped entirely.
      skipped: collects a note on each item that was skipped.

    Returns:
      (lora, adapters): float32 numpy arrays under the module paths of the base tree,
      as `qlora_jax.lora.functional` lists them. `lora.unmatched` targets are not an
      error. Embedding tables that the file holds though its configuration does not name
      them (after a resized vocabulary) belong to the base: `with_saved_tables`.

    Raises:
      CheckpointError: tensors that are missing, unknown, of another shape, rank or
        dtype, or not finite; or the path is not a PEFT directory.
      UserError: an adapter_config.json that uses what is not supported, or targets
        that are not in this model.
    """
    notes: list[str] = [] if skipped is None else skipped
    base = abstract_base(model) if isinstance(model, LlamaConfig) else model
    match = _match(path, base, strict=strict, notes=notes)
    adapters = _read_tree(match)
    _compare_base_copies(match, base, strict=strict, notes=notes)
    notes += [
        f"{setting}, which selects nothing in this model"
        for setting in unused_settings(match.lora, match.selection, base)
    ]
    if _changes_nothing(match.selection, adapters):
        notes.append(
            "the updates of the adapter, all zero (every `lora_B` is): the model is "
            "its base. It was saved before it was trained, or without gathering its "
            "weights (DeepSpeed, FSDP)"
        )
    return match.lora, adapters


def check_adapter(
    path: str | os.PathLike[str],
    model: LlamaConfig | Mapping[str, Any],
    *,
    strict: bool = True,
) -> LoraConfig:
    """Checks that a PEFT directory fits a model; reads no tensor.

    Args:
      path: directory with adapter_config.json and adapter_model.safetensors.
      model: the base's configuration, or its parameter tree, of arrays or shapes.
      strict: as for `load_adapter`.

    Returns:
      The adapter's configuration.

    Raises:
      CheckpointError: as `load_adapter`, except for errors in the tensors' values.
      UserError: as `load_adapter`.
    """
    base = abstract_base(model) if isinstance(model, LlamaConfig) else model
    return _match(path, base, strict=strict, notes=[]).lora


@dataclass(frozen=True)
class _Match:
    """An adapter file, compared with what its configuration selects in a model."""

    lora: LoraConfig
    files: TensorFiles
    selection: Selection
    tensors: Mapping[str, AdapterTensor]
    """Every expected tensor, by its key in this file."""
    base_copies: Mapping[str, trees.Path]
    """Keys of the base's tables in the file, and their modules."""
    same: Mapping[str, str]
    """Keys that repeat another one."""
    bad: set[str]
    """Keys that are missing, unexpected or of another shape or dtype."""


def _match(
    path: str | os.PathLike[str],
    base: Mapping[str, Any],
    *,
    strict: bool,
    notes: list[str],
) -> _Match:
    lora, files = open_adapter(path, strict=strict, skipped=notes, base=base)
    check_vocab_size(lora, files, base, path)
    selection = select(base, lora)
    tensors: dict[str, AdapterTensor] = {}
    same: dict[str, str] = {}
    for key, tensor in adapter_keys(selection, lora).items():
        key, *others = [k for k in _spellings(key) if k in files] or [key]
        tensors[key] = tensor
        same |= dict.fromkeys(others, key)
        # Of a tied head PEFT saves the rows too where it saves the tables.
        twin = key.replace(hf_key(EMBEDDING), hf_key(HEAD))
        if tensor.path[-1] == "trainable_tokens_delta" and twin in files:
            if any(rows.tied_to == tensor.path[:-1] for rows in selection.rows):
                same[twin] = key
    wide = sum(files[key].dtype == "F64" for key in tensors if key in files)
    if wide:
        notes.append(
            f"the float64 digits of {counted(wide, 'tensor')}, in float32 here"
        )
    copies = saved_tables(lora, files).keys
    targets = lora.target_modules
    if not isinstance(targets, str):
        targets = ", ".join(targets or ())
    problems = Mismatches(
        f"`{Path(path) / ADAPTER_WEIGHTS}` does not hold the adapter that its "
        f"{ADAPTER_CONFIG} (`r`={lora.r}, `target_modules`={targets!r:.200}) "
        "describes for this base model",
        shown=3,
    )
    bad: set[str] = set()
    for key, tensor in tensors.items():
        problem = _problem(key, tensor, files)
        if problem is not None:
            bad.add(key)
            problems.add(*problem)
    for key in files:
        if lora.bias == "all" and _STRAY_BIAS.search(key):
            notes.append(f"{key}: a stray copy that PEFT writes and does not read")
        elif key not in tensors and key not in copies and key not in same:
            bad.add(key)
            problems.add("unexpected tensors", key)
    cause = _probable_cause(files, tensors, lora, base) if problems.by_kind else ""
    if strict:
        problems.check(
            cause=cause,
            hint="`strict`=False (--no-strict; of a run, `train.adapter_init_strict` = "
            "false) uses what fits and names the rest.",
        )
    else:
        _check_can_skip(bad, tensors, problems, cause)
        notes += [f"{i}: {k}" for k, items in problems.by_kind.items() for i in items]
    return _Match(lora, files, selection, tensors, copies, same, bad)


def _spellings(key: str) -> list[str]:
    """Lists the names that a tensor may have in a file.

    Some PEFT versions add `.weight` to a magnitude, and a state dict saved without PEFT
    keeps wrapper names that PEFT removes (or repeats, with the tables of the base).
    """
    module, _, name = key.rpartition(".")
    if name == "lora_magnitude_vector":
        return [key, f"{key}.weight"]
    parts = ("", ".default")
    return [key, *(f"{module}.modules_to_save{part}.{name}" for part in parts)]


def _problem(
    key: str, tensor: AdapterTensor, files: TensorFiles
) -> tuple[str, str] | None:
    """Returns the kind of mismatch and its description; None if there is none."""
    if key not in files:
        return "missing tensors", key
    info = files[key]
    if info.dtype not in _ADAPTER_DTYPES:
        return "tensors of another dtype", f"{key} {info.dtype}"
    if info.shape != tensor.shape:
        return (
            "tensors of another shape",
            f"{key} {list(info.shape)} instead of {list(tensor.shape)}",
        )
    return None


def _check_can_skip(
    bad: set[str],
    tensors: Mapping[str, AdapterTensor],
    problems: Mismatches,
    cause: str,
) -> None:
    """Raises if a bad tensor has no neutral value, or nothing would remain.

    A skipped update is zero. Other tensors have no such value, nor has DoRA: its
    magnitude without the update is not the base.
    """
    dora = {
        tensor.module
        for tensor in tensors.values()
        if tensor.path[-1] == "lora_magnitude_vector"
    }
    for key in sorted(bad & set(tensors)):
        tensor = tensors[key]
        if tensor.copy:
            continue  # the file holds the original
        if not tensor.is_update or tensor.module in dora:
            problems.check(
                f"`{key}` cannot be skipped: it has no neutral value.", cause=cause
            )
    # An update is skipped with all its parts; every other tensor by itself.
    units = {
        key: tensor.module if tensor.is_update else key
        for key, tensor in tensors.items()
        if not tensor.copy
    }
    if set(units.values()) <= {units[key] for key in bad if key in units}:
        # What is left would be the base, under the name of an adapter.
        problems.check("None of its tensors could be used.", cause=cause)


def _read_tree(match: _Match) -> dict[str, Any]:
    """Reads the tensors into a new tree; updates with a bad part stay zero."""
    files, tensors = match.files, match.tensors
    adapters: dict[str, Any] = {}
    leaves: dict[trees.Path, NDArray[np.float32]] = {}
    for path, shape in match.selection.shapes().items():
        # Zeros are neutral: in the padding above a layer's rank, and where an update is
        # skipped.
        leaves[path] = np.zeros(shape, np.float32)
        trees.put(adapters, path, leaves[path])
    bad = [tensors[key] for key in match.bad if key in tensors]
    incomplete = {tensor.module for tensor in bad if not tensor.copy}
    copies = []
    for key in files.in_file_order([key for key in tensors if key in files]):
        tensor = tensors[key]
        if tensor.is_update and tensor.module in incomplete:
            continue
        if tensor.copy:
            copies += [key] * (key not in match.bad)
            continue
        destination = tensor.view(leaves[tensor.path])
        # The part [out, :r] of a B with padding is not contiguous and takes the detour.
        if files[key].dtype == "F32" and destination.flags.c_contiguous:
            files.read_into(key, destination)
            check_finite(destination, key)
        else:
            destination[...] = _read_finite(files, key)
    for key, original in match.same.items():
        _compare_twin(key, original, files)
    # Now that every original has been read. Widening is exact, so equality is too.
    for key in copies:
        _compare_tied_copy(key, tensors[key], files, leaves[tensors[key].path])
    return adapters


def _changes_nothing(selection: Selection, adapters: Mapping[str, Any]) -> bool:
    """Whether an adapter consists of low-rank updates, and all of them are zero."""
    # The factor that starts at zero. Magnitudes and whole tensors start as the base's.
    parts = ("lora_B", "lora_embedding_A", "lora_bias")
    return (
        not (selection.full_tensors or selection.rows)
        and not any(module.dora for module in selection.adapted)
        and not any(
            leaf.any() for path, leaf in trees.walk(adapters) if path[-1] in parts
        )
    )


def _read_finite(files: TensorFiles, key: str) -> NDArray:
    """Reads a tensor; float64 is narrowed to float32, as PEFT's parameters are.

    Raises:
      CheckpointError: NaN or infinity, also where float32 has no such number.
    """
    array = files.read(key)
    if array.dtype == np.float64:
        with np.errstate(over="ignore", under="ignore"):
            array = array.astype(np.float32)
    check_finite(array, key)
    return array


def _compare_twin(key: str, original: str, files: TensorFiles) -> None:
    if not np.array_equal(files.read(key), files.read(original)):
        raise CheckpointError(
            f"`{key}` and `{original}` are one tensor in PEFT and differ in the file, "
            "so it is ambiguous which to use. Save the adapter again with PEFT."
        )


def _compare_tied_copy(
    key: str, tensor: AdapterTensor, files: TensorFiles, original: NDArray
) -> None:
    array = _read_finite(files, key)
    if not np.array_equal(array, tensor.view(original)):
        raise CheckpointError(
            f"`{key}` and `{'.'.join(tensor.path)}` are tied (`ensure_weight_tying`) "
            "and differ in the file, so it is ambiguous which to use. Save the adapter "
            "again with PEFT."
        )


def _compare_base_copies(
    match: _Match, base: Mapping[str, Any], *, strict: bool, notes: list[str]
) -> None:
    """Compares tables that PEFT saved with those of the base."""
    replacing = saved_tables(match.lora, match.files).replacing.values()
    for key, path in match.base_copies.items():
        if path == HEAD and "weight" not in base.get(HEAD[-1], {}):
            path = EMBEDDING  # tied
        table = trees.at(base, path)["weight"]
        if isinstance(table, (NF4Tensor, PackedTensor)):
            if key not in replacing:
                notes.append(f"{key}: not compared, the base's is in 4 bits")
            continue
        if not hasattr(table, "__array__"):
            notes.append(f"{key}: not compared, no weights of the base were given")
            continue
        difference = _table_difference(match.files, key, np.asarray(table))
        if difference is None:
            continue
        if key in replacing and match.files[key].shape == table.shape:
            raise CheckpointError(
                f"`{key}` replaces a table of the base ({difference}), so this adapter "
                "cannot share a base with others. Load it with a base of its own: "
                "`qlora_jax.load(base, adapter=...)`."
            )
        if strict:
            raise CheckpointError(
                f"`{key}` is not the table of this base ({difference}), so the adapter "
                "was trained on another base (or another vocabulary). Give that base, "
                "or use the adapter on this one with `strict`=False (--no-strict)."
            )
        notes.append(f"{key}: the base's own table is used; {difference}")


def _table_difference(files: TensorFiles, key: str, table: NDArray) -> str | None:
    """Describes how a copy in the file differs from a table by more than rounding."""
    if files[key].dtype not in FLOAT_NAMES:
        return f"dtype {files[key].dtype}"
    # A resized vocabulary is another table, whatever its rows.
    shape, resized = files[key].shape, ""
    if shape != table.shape:
        resized = f"{list(shape)} instead of {list(table.shape)}"
        if shape[1:] != table.shape[1:] or shape[0] > len(table):
            return resized
        resized += ", "
    rows, largest = rows_beyond_rounding(files.read(key), table[: shape[0]])
    if not rows:
        return f"{resized}with the rows that this has there" if resized else None
    return (
        f"{resized}{rows:,} of {shape[0]:,} rows differ by more than rounding, by up "
        f"to {largest:.2g}"
    )


def _probable_cause(
    files: TensorFiles,
    tensors: Mapping[str, AdapterTensor],
    lora: LoraConfig,
    base: Mapping[str, Any],
) -> str:
    """Returns the usual cause of such mismatches, where names and shapes show it."""
    if not any(f"{_PEFT_MODEL}." in key for key in files):
        example = next(iter(tensors))
        return f"PEFT's keys look like {example}; save the adapter with PEFT."
    if any(0 in files[key].shape for key in files):
        return (
            "It has tensors without elements: DeepSpeed ZeRO-3 divides the weights, "
            "and they were saved without being gathered. Save the adapter with "
            "`stage3_gather_16bit_weights_on_model_save`, or convert the checkpoint "
            "with DeepSpeed's zero_to_fp32.py."
        )
    biases = [key for key in tensors if key.endswith(".base_layer.bias")]
    if lora.bias == "lora_only" and biases and not any(k in files for k in biases):
        return (
            "`bias` is 'lora_only', and PEFT before 0.21 does not save the biases that "
            "it trains then. They are lost; with `bias` 'none' in adapter_config.json "
            "the adapter is used without them."
        )
    found = {key: files[key] for key in tensors if key in files}
    tables = {hf_key(EMBEDDING), hf_key(HEAD)}
    fewer = {
        info.shape[0]
        for key, info in found.items()
        if hf_key(tensors[key].path[:-1]) in tables
        and info.shape[1:] == tensors[key].shape[1:]
        and info.shape[0] < tensors[key].shape[0]
    }
    if fewer:
        return (
            f"It was trained with a vocabulary of {max(fewer):,} tokens, fewer than "
            "this base has. Give the base with this vocabulary."
        )
    dtypes = sorted({i.dtype for i in found.values()} - set(_ADAPTER_DTYPES))
    if dtypes:
        return (
            f"Adapters are read in float16, bfloat16, float32 and float64, and it has "
            f"{', '.join(dtypes)}. Convert its tensors to one of these."
        )
    shapes = [(found[key].shape, tensors[key].shape) for key in found]
    unlike = [(shape, expected) for shape, expected in shapes if shape != expected]
    if unlike and all(shape == expected[::-1] for shape, expected in unlike):
        return (
            "The tensors are transposed, as those of MLX and of Conv1D layers are: "
            "PEFT's `lora_A` is [r, in] and its `lora_B` [out, r]."
        )
    inner = f"{PEFT_PREFIX}model."
    if not any(key.startswith(inner) for key in files) and (
        any(key.startswith(f"{PEFT_PREFIX}layers.") for key in files)
    ):
        return (
            "It was trained on a `LlamaModel`, without the language model around it "
            f"(its names begin with `{PEFT_PREFIX}layers.`), as those of embedding "
            f"models are. As an adapter of a LlamaForCausalLM it has `{inner}layers.`."
        )
    prefix = prefix_cause(files.infos, tensors)
    if prefix:
        return (
            f"{prefix} Rename the tensors, or save the adapter with the "
            "`save_pretrained` of the model that PEFT's `get_peft_model` made, without "
            "a wrapper around or within it."
        )
    others = {
        key.split(".lora_")[0].rpartition(".")[2]
        for key in files
        if key not in tensors and ".lora_" in key
    }
    # Of a tied head the tree has no weight.
    linear = {HEAD[-1], *(path[-1] for path in linear_modules(base))}
    named = () if isinstance(lora.target_modules, str) else lora.target_modules
    absent = others - linear - {EMBEDDING[-1]}
    if absent:
        which = "which `target_modules` names and this model does not have"
        if not absent <= {name.rpartition(".")[2] for name in named}:
            which = "which this model does not have"
        return (
            f"The file adapts {', '.join(sorted(absent))}, {which}: it is the adapter "
            "of another model, or of another form of this one. Linear modules here: "
            f"{', '.join(sorted(linear))}."
        )
    selected = {tensor.path[-2] for tensor in tensors.values()}
    if others - selected and all(key in files for key in tensors):
        return (
            f"The file also adapts {', '.join(sorted(others - selected))}, which "
            "`target_modules` does not select: the configuration is not the one of "
            "this file."
        )
    ranks = {
        # lora_A is [r, in].
        files[key].shape[0]
        for key, tensor in tensors.items()
        if key in files and tensor.path[-1] == "lora_A" and files[key].shape
    }
    if len(ranks) == 1 and ranks != {lora.r}:
        return f"The tensors are of rank {ranks.pop()}."
    name = lora.base_model_name_or_path
    named = f" It names {name!r:.200} as its base." if name else ""
    layers, model_layers = _layer_count(files), _layer_count(tensors)
    if layers > model_layers > 0:
        return (
            f"Is it the adapter of another model?{named} The file has layers 0 to "
            f"{layers - 1}, this model 0 to {model_layers - 1}."
        )
    return f"Is it the adapter of another model?{named}"


def _layer_count(keys: Iterable[str]) -> int:
    """Returns one more than the highest layer number in names of tensors."""
    matches = (re.search(r"\.layers\.(\d{1,9})\.", key) for key in keys)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
