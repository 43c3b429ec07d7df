"""PEFT adapter directories <-> our adapter tree, strictly and byte for byte.

A PEFT directory is adapter_config.json and adapter_model.safetensors (and, of ours,
base_config.json where the run changed its base's configuration). What has to be in
the file follows from the configuration and the model (`qlora_jax.lora.targets`), tensor by
tensor; a file that has more, less or something of another shape is refused, where PEFT
itself would load what fits and leave the rest at its initial value.

    base_model.model. <module>  .lora_A.weight [r, in], .lora_B.weight [out, r]
                                .lora_B.bias, .lora_magnitude_vector [out]
                                .lora_embedding_A [r, rows], .lora_embedding_B
                                .token_adapter.trainable_tokens_delta [n, features]
                                .base_layer.bias of an adapted module, .bias of others
                                .weight of a module trained whole

PEFT adds copies: `.base_layer.weight` of an adapted embedding or head is the table of
the base itself, and a tied head that follows the embedding has its tensors again. They
are compared with what they are copies of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import names
from convert.files import (
    CHAT_TEMPLATE,
    DTYPES,
    Mismatches,
    TensorFiles,
    check_finite,
    read_header,
    read_json,
)
from convert.names import Slot, slots
from convert.output import (
    Entry,
    new_directory,
    safetensors_bytes,
    write_json,
    write_safetensors,
    write_text,
)
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import Selection, select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import (
    CHANGES_FILE,
    LlamaConfig,
    changes_to_json,
    read_changes,
)
from qlora_jax.tree import EMBEDDING, HEAD

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# How a run trained the adapter: JSON in the adapter directory, see `training_record`.
TRAINING = "training.json"
_READABLE = ("F32", "BF16", "F16")
# With bias="all" PEFT saves the biases of modules trained whole twice more, under names
# that it does not look for when it loads.
_STRAY_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")
# Where the file says which base the adapter was trained on.
_FINGERPRINT = "qlora_jax_base_fingerprint"


def peft_directory(path: Path) -> Path:
    """The PEFT directory meant by `path`: itself, or `adapter/` in a run directory."""
    inside = path / "adapter"
    if not (path / CONFIG).is_file() and (inside / CONFIG).is_file():
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
    file = path / TRAINING
    return read_json(file) if file.is_file() else {}


def chat_template_file(path: Path | None) -> str | None:
    """Returns the chat template file of a PEFT directory; None if it has none."""
    file = None if path is None else path / CHAT_TEMPLATE
    return str(file) if file is not None and file.is_file() else None


def open_adapter(
    path: str | os.PathLike[str], *, strict: bool = True
) -> tuple[LoraConfig, TensorFiles]:
    """Opens a PEFT directory: its configuration, and its tensors unread.

    Args:
      path: the directory.
      strict: raise for settings that are not supported; otherwise they are dropped.

    Raises:
      CheckpointError: a path that is no PEFT directory, or damaged files.
      UserError: a configuration that uses what is not supported.
    """
    return _open(path, strict=strict, skipped=[])


def _open(
    path: str | os.PathLike[str], *, strict: bool, skipped: list[str]
) -> tuple[LoraConfig, TensorFiles]:
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
    raw = read_json(path / CONFIG)
    lora = LoraConfig.from_peft(raw, strict=strict, skipped=skipped)
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"`{path}` holds its weights in adapter_model.bin, a pickle file, "
                "which can run any code when it is opened and is therefore not read. "
                "Load it once with PEFT and save it again; PEFT writes safetensors."
            )
        raise CheckpointError(f"`{path}` has no {WEIGHTS}.")
    infos, metadata = read_header(path / WEIGHTS)
    files = TensorFiles(path, infos)
    lora = replace(
        lora,
        base_fingerprint=metadata.get(_FINGERPRINT),
        base_config_changes=_config_changes(path),
    )
    return _with_tables(lora, files), files


def _config_changes(path: Path) -> str | None:
    """What the adapter was trained with instead of what its base's config.json has."""
    file = path / CHANGES_FILE
    if not file.is_file():
        return None
    changes = read_json(file)
    read_changes(changes, f"`{file}`")
    return changes_to_json(changes)


def load_adapter(
    path: str | os.PathLike[str],
    model: LlamaConfig | Mapping[str, Any],
    *,
    strict: bool = True,
    skipped: list[str] | None = None,
) -> tuple[LoraConfig, dict[str, Any]]:
    """Loads a PEFT LoRA directory for a model.

    A float32 file is read straight into the result, so that an adapter is held once.
    float16 and bfloat16 files are widened.

    Args:
      path: directory with adapter_config.json and adapter_model.safetensors.
      model: the base's configuration, or its parameter tree. With the tree, copies of
        base tables in the file (`base_layer.weight`) are compared with the base.
      strict: raise if anything is missing, unexpected or of another shape. Otherwise
        what does not fit is left out, an update with a missing part as a whole.
      skipped: where to note, item by item, what was not used and why.

    Returns:
      (lora, adapters): float32 numpy arrays under the module paths of the base tree,
      as `qlora_jax.lora.functional` lists them. `lora.unmatched` targets are not an error. Tables
      of embeddings that the file holds though its configuration does not name them (of
      a resized vocabulary) are added to `modules_to_save`.

    Raises:
      CheckpointError: tensors missing, unknown, of another shape, rank or dtype, or
        not finite; or a directory that is something else.
      UserError: an adapter_config.json that uses what is not supported, or targets
        that are not in this model.
    """
    notes: list[str] = [] if skipped is None else skipped
    base = (
        model_params.abstract_base(model) if isinstance(model, LlamaConfig) else model
    )
    found = _match(path, base, strict=strict, notes=notes)
    adapters = _read(found.wanted, found.files, found.selection.shapes(), found.bad)
    _compare_copies(list(found.copies), found.files, base, strict, notes)
    return found.lora, adapters


def check_adapter(
    path: str | os.PathLike[str], model: LlamaConfig | Mapping[str, Any]
) -> LoraConfig:
    """Checks that a PEFT directory fits a model; reads no tensor.

    Args:
      path: directory with adapter_config.json and adapter_model.safetensors.
      model: the base's configuration, or its parameter tree, of arrays or shapes.

    Returns:
      What the adapter is.

    Raises:
      CheckpointError: as `load_adapter`, but for what only the tensors' values tell.
      UserError: as `load_adapter`.
    """
    base = (
        model_params.abstract_base(model) if isinstance(model, LlamaConfig) else model
    )
    return _match(path, base, strict=True, notes=[]).lora


@dataclass(frozen=True)
class _Match:
    """An adapter file beside what a model wants of it."""

    lora: LoraConfig
    files: TensorFiles
    selection: Selection
    wanted: Mapping[str, Slot]
    copies: Mapping[str, Any]
    """Tables of the base in the file."""
    bad: set[str]
    """Keys that are missing, unexpected or of another shape or dtype."""


def _match(
    path: str | os.PathLike[str],
    base: Mapping[str, Any],
    *,
    strict: bool,
    notes: list[str],
) -> _Match:
    lora, files = _open(path, strict=strict, skipped=notes)
    selection = select(base, lora)
    wanted = slots(selection, lora)
    wanted = {_spelled(key, files): slot for key, slot in wanted.items()}
    copies = {key: files[key] for key in _base_copies(selection) if key in files}
    problems = Mismatches(
        f"`{Path(path) / WEIGHTS}` does not hold the adapter that its {CONFIG} "
        f"(`r`={lora.r}, `target_modules`={_listed(lora.target_modules)!r:.200}) "
        "describes for this base model",
        shown=3,
    )
    bad: set[str] = set()
    for key, slot in wanted.items():
        problem = _problem(key, slot, files)
        if problem is not None:
            bad.add(key)
            problems.add(*problem)
    for key in files:
        if lora.bias == "all" and _STRAY_BIAS.search(key):
            notes.append(f"{key}: a stray copy that PEFT writes and does not read")
        elif key not in wanted and key not in copies:
            bad.add(key)
            problems.add("unexpected tensors", key)
    if strict:
        problems.check(cause=_cause(files, wanted, lora))
    else:
        _check_can_skip(bad, wanted, problems)
        notes += [f"{i}: {k}" for k, items in problems.by_kind.items() for i in items]
    return _Match(lora, files, selection, wanted, copies, bad)


def _read(
    wanted: Mapping[str, Slot],
    files: TensorFiles,
    shapes: Mapping[names.Path, tuple[int, ...]],
    bad: set[str],
) -> dict[str, Any]:
    """Fills the tree; updates of modules with a bad part stay zero.

    A copy is of use for nothing but comparison.
    """
    adapters: dict[str, Any] = {}
    leaves: dict[names.Path, NDArray[np.float32]] = {}
    for where, shape in shapes.items():
        leaves[where] = np.zeros(shape, np.float32)
        names.put(adapters, where, leaves[where])
    hurt = [wanted[key] for key in bad if key in wanted]
    broken = {(slot.path[:-1], slot.layer) for slot in hurt if not slot.copy}
    copies = []
    for key in files.in_file_order([k for k in wanted if k in files]):
        slot = wanted[key]
        update = slot.path[-1].startswith("lora_")
        if update and (slot.path[:-1], slot.layer) in broken:
            continue
        if slot.copy:
            copies += [key] * (key not in bad)
            continue
        place = slot.view(leaves[slot.path])
        if files[key].dtype == "F32" and place.flags.c_contiguous:
            files.read_into(key, place)
            check_finite(place, key)
        else:
            array = files.read(key)
            check_finite(array, key)
            place[...] = array
    for key in copies:
        array = files.read(key)
        check_finite(array, key)
        if not np.array_equal(array, wanted[key].view(leaves[wanted[key].path])):
            raise CheckpointError(
                f"`{key}` and `{'.'.join(wanted[key].path)}` are tied "
                "(`ensure_weight_tying`), and differ in the file. Which one was meant "
                "cannot be told; save the adapter again with PEFT."
            )
    return adapters


def _problem(key: str, slot: Slot, files: TensorFiles) -> tuple[str, str] | None:
    if key not in files:
        return "missing tensors", key
    info = files[key]
    if info.dtype not in _READABLE:
        return "tensors of another dtype", f"{key} {info.dtype}"
    if info.shape != slot.shape:
        return (
            "tensors of another shape",
            f"{key} {list(info.shape)} instead of {list(slot.shape)}",
        )
    return None


def _check_can_skip(
    bad: set[str], wanted: Mapping[str, Slot], problems: Mismatches
) -> None:
    """An update that is left out is zero; other tensors have no such value.

    Nor has DoRA: its magnitude without the update is not the base.
    """
    dora = {
        (slot.path[:-1], slot.layer)
        for slot in wanted.values()
        if slot.path[-1] == "lora_magnitude_vector"
    }
    for key in sorted(bad & set(wanted)):
        slot = wanted[key]
        if slot.copy:
            continue  # it is held elsewhere in the file
        whole = not slot.path[-1].startswith("lora_")
        if whole or (slot.path[:-1], slot.layer) in dora:
            problems.check(
                hint=f"`{key}` cannot be left out: nothing says what it would be."
            )
    # Of an update all parts or none are taken; other tensors are parts of their own.
    parts = {
        key: (slot.path[:-1], slot.layer) if slot.path[-1].startswith("lora_") else key
        for key, slot in wanted.items()
        if not slot.copy
    }
    if set(parts.values()) <= {parts[key] for key in bad if key in parts}:
        # What is left would be the base, under the name of an adapter.
        problems.check(hint="None of its tensors could be used.")


def in_short(notes: Sequence[str], *, shown: int = 10) -> list[str]:
    """The first of many notes, and how many more there are."""
    more = len(notes) - shown
    return [*notes[:shown], *([f"{more:,} more like these"] if more > 0 else [])]


def _with_tables(lora: LoraConfig, files: TensorFiles) -> LoraConfig:
    """Adds the embedding tables of a file to `modules_to_save`.

    PEFT saves them unasked where the vocabulary was resized.
    """
    saved = lora.modules_to_save or ()
    tables = (EMBEDDING[-1], HEAD[-1])
    named = any(name.rpartition(".")[2] in tables for name in saved)
    found = tuple(
        path[-1]
        for path in (EMBEDDING, HEAD)
        if f"{names.PEFT_PREFIX}{'.'.join(path)}.weight" in files
        and not any(".".join(path).endswith(name) for name in saved)
        and not (named and lora.ensure_weight_tying)
    )
    return replace(lora, modules_to_save=(*saved, *found)) if found else lora


def _spelled(key: str, files: TensorFiles) -> str:
    """The key as this file spells it.

    Some PEFT versions add `.weight` to a magnitude; and whoever saves the modules by
    themselves leaves in the names what PEFT takes out.
    """
    module, _, name = key.rpartition(".")
    others = [f"{module}.modules_to_save{inner}.{name}" for inner in ("", ".default")]
    if name == "lora_magnitude_vector":
        others = [f"{key}.weight"]
    found = [other for other in others if other in files]
    return found[0] if found and key not in files else key


def _base_copies(selection: Selection) -> list[str]:
    """Keys under which PEFT may have saved tables of the base."""
    return [
        f"{names.PEFT_PREFIX}{'.'.join(a.path)}.base_layer.weight"
        for a in selection.adapted
        if a.path in (EMBEDDING, HEAD)
    ]


def _compare_copies(
    keys: list[str],
    files: TensorFiles,
    base: Mapping[str, Any],
    strict: bool,
    notes: list[str],
) -> None:
    """Compares tables that PEFT saved with those of the base they were trained on."""
    for key in keys:
        module = key.removeprefix(names.PEFT_PREFIX).removesuffix(".base_layer.weight")
        node: Any = base
        path = module.split(".")
        if module == HEAD[-1] and "weight" not in base.get(HEAD[-1], {}):
            path = list(EMBEDDING)
        for part in path:
            node = node[part]
        table = node["weight"]
        if not hasattr(table, "__array__"):
            notes.append(f"{key}: not compared, no weights of the base were given")
            continue
        if _same_table(files, key, np.asarray(table)):
            continue
        message = (
            f"`{key}` is not the table of this base, so the adapter was trained on "
            "another one (or on one of another vocabulary). Give that base"
        )
        if strict:
            raise CheckpointError(
                f"{message}, or let it be used on this one (`strict`=False, "
                "--no-strict)."
            )
        notes.append(f"{key}: differs from the base's own, which is used")


def _same_table(files: TensorFiles, key: str, table: NDArray) -> bool:
    if files[key].dtype not in _READABLE or files[key].shape != table.shape:
        return False
    saved = files.read(key)
    # In the narrower of the two dtypes: one may be a rounded form of the other.
    narrow = min(saved.dtype, table.dtype, key=lambda d: d.itemsize)
    return np.array_equal(saved.astype(narrow), table.astype(narrow))


def save_adapter(
    directory: str | os.PathLike[str],
    lora_config: LoraConfig,
    adapters: Mapping[str, Any],
    model: LlamaConfig | Mapping[str, Any],
    *,
    base_model_name_or_path: str | None = None,
    base_fingerprint: str | None = None,
    overwrite: bool = False,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PEFT directory that PEFT, vLLM and Unsloth load.

    The directory appears complete or not at all. The same adapter gives the same
    bytes. Tables of the base are not copied into it; PEFT does not need them.

    Args:
      directory: to be created; must not exist or be empty.
      lora_config: what the adapter is.
      adapters: trained tree, as `qlora_jax.lora.functional` lists it; written as float32.
      model: the base's configuration, or its parameter tree.
      base_model_name_or_path: what adapter_config.json shall name as the base (default:
        what `lora_config` names).
      base_fingerprint: of the base it was trained on, as it was loaded for that:
        `qlora_jax.fingerprint_tree(base)`. Kept in the file, it lets whoever loads the
        adapter notice another base (default: what `lora_config` has).
      overwrite: whether a directory that is there is replaced.
      beside: further files of the directory, name -> a text that is written there, or
        what is written as JSON.

    Raises:
      UserError: a tree that is not the one `lora_config` describes for this model,
        NaN or infinity in it, an adapter of a changed base (see `absorb`), or a
        directory that cannot be written.
    """
    if lora_config.changes_base:
        raise UserError(
            f"`init_lora_weights`={lora_config.init_lora_weights!r}: this adapter "
            "belongs to a changed base and would be another one on the original. Save "
            "what `qlora_jax.absorb(lora_config, adapters, base)` returns."
        )
    base = (
        model_params.abstract_base(model) if isinstance(model, LlamaConfig) else model
    )
    selection = select(base, lora_config)
    shapes = selection.shapes()
    arrays = dict(names.walk(adapters))
    problems = Mismatches(
        f"The adapter tree is not the one that `r`={lora_config.r}, `target_modules`="
        f"{lora_config.target_modules!r:.200} describes for this model"
    )
    for path, shape in shapes.items():
        if path not in arrays:
            problems.add("missing arrays", ".".join(path))
        elif tuple(arrays[path].shape) != shape:
            problems.add(
                "arrays of another shape",
                f"{'.'.join(path)} {list(arrays[path].shape)} instead of {list(shape)}",
            )
        elif np.dtype(arrays[path].dtype) not in [DTYPES[n] for n in _READABLE]:
            problems.add(
                "arrays of another dtype", f"{'.'.join(path)} {arrays[path].dtype}"
            )
    for path in arrays:
        if path not in shapes:
            problems.add("unexpected arrays", ".".join(path))
    problems.check()
    host = {path: np.asarray(array) for path, array in arrays.items()}
    entries = []
    for key, slot in slots(selection, lora_config).items():
        check_finite(np.ascontiguousarray(slot.view(host[slot.path])), key)
        entries.append(_entry(key, slot, host))
    raw = lora_config.to_peft()
    if raw["target_modules"] == "all-linear":
        # Spelled out, as PEFT does: not every reader knows the word.
        raw["target_modules"] = sorted({a.path[-1] for a in selection.adapted})
    if base_model_name_or_path is not None:
        raw["base_model_name_or_path"] = base_model_name_or_path
    if base_fingerprint is not None:
        lora_config = replace(lora_config, base_fingerprint=base_fingerprint)
    with new_directory(Path(directory), overwrite=overwrite) as new:
        write_safetensors(new / WEIGHTS, entries, _metadata(lora_config))
        # The order within patterns has a meaning: the first that matches holds.
        write_json(new / CONFIG, dict(sorted(raw.items())), sort_keys=False)
        if lora_config.base_config_changes is not None:
            changes = json.loads(lora_config.base_config_changes)
            write_json(new / CHANGES_FILE, changes)
        for name, content in (beside or {}).items():
            if isinstance(content, str):
                write_text(new / name, content)
            else:
                write_json(new / name, content, sort_keys=False)


def _entry(key: str, slot: Slot, host: Mapping[names.Path, NDArray]) -> Entry:
    """A tensor that is cut out and widened when its turn comes."""

    def read() -> NDArray:
        view = slot.view(host[slot.path])
        return np.ascontiguousarray(view.astype(np.float32, copy=False))

    return Entry(key, np.dtype(np.float32), slot.shape, read)


def _metadata(lora: LoraConfig) -> dict[str, str]:
    out = {"format": "pt"}
    if lora.base_fingerprint is not None:
        out[_FINGERPRINT] = lora.base_fingerprint
    return out


def adapter_bytes(model: LlamaConfig | Mapping[str, Any], lora: LoraConfig) -> int:
    """Size of the adapter_model.safetensors that `save_adapter` writes, to the byte."""
    nothing = np.zeros(0, np.float32)
    base = (
        model_params.abstract_base(model) if isinstance(model, LlamaConfig) else model
    )
    entries = [
        Entry(key, nothing.dtype, slot.shape, lambda: nothing)
        for key, slot in slots(select(base, lora), lora).items()
    ]
    return safetensors_bytes(entries, _metadata(lora))


def _listed(modules: Any) -> str:
    return modules if isinstance(modules, str) else ", ".join(modules or ())


def _cause(files: TensorFiles, wanted: Mapping[str, Slot], lora: LoraConfig) -> str:
    """Says what usually causes the disagreement, where the names tell."""
    if not any(k.startswith(names.PEFT_PREFIX) for k in files):
        example = next(iter(wanted))
        return f"PEFT's keys look like {example}; save the adapter with PEFT."
    if any(".lora_A.default." in k for k in files):
        return "The keys carry an adapter name; save the adapter with PEFT."
    others = {
        k.split(".lora_")[0].rpartition(".")[2]
        for k in files
        if k not in wanted and ".lora_" in k
    }
    selected = {slot.path[-2] for slot in wanted.values()}
    if others - selected and all(k in files for k in wanted):
        return (
            f"The file also adapts {', '.join(sorted(others - selected))}, which "
            "`target_modules` does not select: the configuration is not the one of "
            "this file."
        )
    ranks = {
        files[k].shape[0]
        for k, slot in wanted.items()
        if k in files and slot.path[-1] == "lora_A" and files[k].shape
    }
    if len(ranks) == 1 and ranks != {lora.r}:
        return f"The tensors are of rank {ranks.pop()}."
    layers, here = _layers(files), _layers(wanted)
    if layers > here > 0:
        return (
            f"Is it the adapter of another model? The file has layers 0 to {layers - 1}"
            f", this model 0 to {here - 1}."
        )
    return "Is it the adapter of another model?"


def _layers(keys: Iterable[str]) -> int:
    """One more than the highest number of a layer in the names of tensors."""
    found = (re.search(r"\.layers\.(\d{1,9})\.", key) for key in keys)
    return max((int(match[1]) + 1 for match in found if match), default=0)
