"""A Hugging Face model directory, checked against its config.json.

Names, shapes, dtypes and quantization states come from headers and small tensors, so a
wrong download fails in milliseconds with one message that lists every problem.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import bnb
from convert.files import (
    DTYPES,
    FLOAT_DTYPES,
    FLOAT_NAMES,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    Mismatches,
    TensorFiles,
    TensorInfo,
    broken_link,
    is_name,
    read_header,
    read_json,
)
from convert.name_prefixes import META_FORMAT, is_meta_format, prefix_cause
from convert.names import PEFT_PREFIX, checkpoint_keys
from convert.text_model import text_tensors
from qlora_jax.errors import CheckpointError
from qlora_jax.models import LlamaConfig, unread_fields
from qlora_jax.models import params as model_params
from qlora_jax.tree import EMBEDDING, HEAD, hf_key, put
from qlora_jax.tree import Path as TreePath

# Computed from the configuration; files of old transformers versions carry it.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose headers have been checked against its config.json."""

    path: Path
    config: LlamaConfig
    files: TensorFiles
    packed: Mapping[str, bnb.QuantState] = field(repr=False)
    """Key of each weight stored in 4 bits -> its state."""

    @property
    def quantized(self) -> bool:
        """Whether this is a bitsandbytes-4bit directory."""
        return bool(self.packed)

    @property
    def mixed(self) -> tuple[TreePath, ...]:
        """The projections whose layers are stored in different forms.

        Some layers are in 4 bit and others are not (`llm_int8_skip_modules` names
        single layers), or they differ in double quantization, in the dtype before
        quantization or in the size of blocks.
        """
        paths = []
        for path in filter(
            model_params.is_projection, model_params.shapes(self.config)
        ):
            states = (
                self.packed.get(hf_key(path, layer))
                for layer in model_params.layers_of(path, self.config)
            )
            # None for a dense layer. Offsets differ from layer to layer and do not
            # count.
            if len({s and (s.dtype, s.double_quant, s.block_size) for s in states}) > 1:
                paths.append(path)
        return tuple(paths)

    @property
    def notes(self) -> list[str]:
        """What the directory says and the loaded model is not; sentences."""
        notes = config_notes(self.config, self.path / "config.json")
        if self.files.left_out:
            size = sum(info.nbytes for info in self.files.left_out.values())
            parts = sorted({key.split(".")[0] for key in self.files.left_out})
            notes.append(
                f"of `{self.path}` the text model is read; left out: "
                f"{len(self.files.left_out):,} tensors ({size / 1e9:.2f} GB) of "
                f"{', '.join(parts)}. What is written from it is the text model alone"
            )
        if self.config.quantization_config is not None and not self.packed:
            notes.append(
                f"the config.json of `{self.path}` says that the weights are in 4 bits "
                "(`quantization_config`), and none is: they are used as they are stored"
            )
        used = {info.file.name for info in self.files.infos.values()}
        stale = sorted(
            path.name
            for path in self.path.glob("model*.safetensors")
            if path.name not in used
        )
        if stale:
            more = f" and {len(stale) - 3:,} more" if len(stale) > 3 else ""
            named = WEIGHTS_INDEX if len(used) > 1 or WEIGHTS_FILE not in used else ""
            why = f"which {named} does not name" if named else f"beside {WEIGHTS_FILE}"
            notes.append(
                f"not read of `{self.path}`: {', '.join(stale[:3])}{more}, {why}"
            )
        return notes

    def dtype(self, key: str) -> str:
        """Name of a weight's dtype; of a packed weight, its dtype before packing."""
        if key in self.packed:
            return self.packed[key].dtype
        return FLOAT_NAMES[self.files[key].dtype]


def config_notes(config: LlamaConfig, file: Path) -> list[str]:
    """Returns a note on what a config.json says and is not computed, or none.

    Args:
      config: what was read.
      file: the config.json.
    """
    unread = unread_fields(config.raw, config.vocab_size)
    if not unread:
        return []
    return [
        f"`{file}` has fields that are not read, here as in transformers: "
        f"{', '.join(unread)}"
    ]


def open_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """Reads the config.json of a model directory.

    Raises:
      CheckpointError: the path is not a model directory.
      UserError: a config.json of another architecture.
    """
    path = Path(path)
    check_model_directory(path)
    raw = read_json(path / "config.json")
    return LlamaConfig.from_hf(_with_tying_of_files(raw, path))


def _with_tying_of_files(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Decides whether tables are tied where a config.json says both.

    transformers 5 writes the field for a model of images and text and again for its
    text model, with each class's default. When it reads the file, a head that is there
    counts, and one that is not is the embedding.
    """
    text, name = raw.get("text_config"), "tie_word_embeddings"
    if not isinstance(text, dict) or not (name in raw and name in text):
        return raw
    has_weights = any((path / n).is_file() for n in (WEIGHTS_FILE, WEIGHTS_INDEX))
    if raw[name] == text[name] or not has_weights:
        return raw
    tied = hf_key((*HEAD, "weight")) not in open_model(path)
    return {**raw, "text_config": {**text, name: tied}}


def check_model_directory(path: Path) -> None:
    """Raises if a path is not a Hugging Face model directory.

    Raises:
      CheckpointError: names what the path is instead.
    """
    if not path.exists():
        where = "" if path.is_absolute() else f" in `{Path.cwd()}`, where this runs"
        raise CheckpointError(
            f"`{path}` does not exist{where}. A model is a Hugging Face directory, or "
            "a name on the Hub, `owner/name` or `owner/name@revision`."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"`{path}` is a file; give the directory that holds config.json and the "
            "safetensors files."
        )
    if (path / "config.json").is_file():
        return
    links = (broken_link(path / n) for n in ("config.json", "adapter_config.json"))
    for link in filter(None, links):
        raise CheckpointError(link)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"`{path}` is a PEFT adapter, not a model. Give the directory of its base "
            "model here."
        )
    # Of a download cache, with the model one level further down; and of adapters with
    # names of their own, or checkpoints, each in a folder.
    inside = sorted(path.glob("snapshots/*/config.json"))
    inside += sorted(path.glob("*/adapter_config.json"))
    hint = f" Did you mean `{inside[0].parent}`?" if inside else _gguf_hint(path)
    if not inside and _meta_files(path):
        hint = f" It holds {', '.join(_meta_files(path)[:3])}: {META_FORMAT}."
        if (path.parent / "config.json").is_file():
            hint = f"{hint} Did you mean `{path.parent}`?"
    raise CheckpointError(
        f"`{path}` has no config.json, so it is not a Hugging Face model directory."
        + hint
    )


def _meta_files(path: Path) -> list[str]:
    """Lists the files of a model in the original format of Meta's releases."""
    names = sorted(p.name for p in path.glob("consolidated*"))
    return [*names, *(["params.json"] if (path / "params.json").is_file() else [])]


def _gguf_hint(path: Path) -> str:
    names = sorted(p.name for p in path.glob("*.gguf"))
    if not names:
        return ""
    return (
        f" It has GGUF files ({', '.join(names[:3])}), the form of llama.cpp, which is "
        "not read. Download the original model, which the page of the GGUF names as "
        "its base model."
    )


def open_model(path: Path) -> TensorFiles:
    """Opens the safetensors files of a model directory, sharded or not.

    Raises:
      CheckpointError: no safetensors files, a missing shard, or an index that
        disagrees with its shards; the message lists all disagreements.
    """
    single, index = path / WEIGHTS_FILE, path / WEIGHTS_INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"`{path}` has both {WEIGHTS_FILE} and {WEIGHTS_INDEX}, and only one can "
            "be current. Remove the stale one."
        )
    if single.is_file():
        return TensorFiles(path, *text_tensors(read_header(single)[0]))
    if not index.is_file():
        raise CheckpointError(_no_weights(path))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        is_name(key) and isinstance(f, str) and is_name(f) and f == os.path.basename(f)
        for key, f in weight_map.items()
    ):
        raise CheckpointError(
            f"`{index}` has no `weight_map` of tensor names to file names in the same "
            "directory."
        )
    problems = Mismatches(f"The shards in `{path}` and {WEIGHTS_INDEX} disagree")
    infos: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).is_file():
            link = " (a link to a file that does not exist)"
            problems.add(
                "missing files", name + (link if (path / name).is_symlink() else "")
            )
            continue
        for key, info in read_header(path / name)[0].items():
            if key in infos:
                problems.add(
                    "tensors in two shards", f"{key} ({infos[key].file.name}, {name})"
                )
            elif key not in weight_map and not key.endswith(_DERIVED):
                problems.add("tensors that the index does not name", f"{key} ({name})")
            elif weight_map.get(key, name) != name:
                problems.add(
                    "tensors in another shard than the index says",
                    f"{key} ({name} instead of {weight_map[key]})",
                )
            infos[key] = info
    for key, name in weight_map.items():
        missing = key not in infos and not key.endswith(_DERIVED)
        if missing and (path / name).is_file():
            problems.add("tensors that their shard lacks", f"{key} ({name})")
    problems.check(hint="Download or copy the checkpoint again.")
    return TensorFiles(path, *text_tensors(infos))


def _no_weights(path: Path) -> str:
    """Returns the message for a directory without safetensors weights."""
    names = sorted(p.name for p in path.iterdir())
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    shards = [n for n in names if n.endswith(".safetensors")]
    if all(n.startswith("consolidated") for n in (*pickles, *shards)):
        if files := _meta_files(path):
            return (
                f"`{path}` holds its weights in {', '.join(files[:3])}: {META_FORMAT}."
            )
    if pickles and not shards:
        return (
            f"`{path}` holds its weights in pickle files ({', '.join(pickles[:3])}), "
            "which can run any code when they are opened and are therefore not read. "
            "Convert once with transformers: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)`."
        )
    link = next(filter(None, (broken_link(path / name) for name in names)), None)
    if link is not None:
        return link
    if shards:
        return (
            f"`{path}` has {', '.join(shards[:3])} but neither {WEIGHTS_FILE} nor "
            f"{WEIGHTS_INDEX}; download the index file too."
        )
    return (
        f"`{path}` has no weights: neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX} is there."
        + _gguf_hint(path)
    )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model directory and checks all names, shapes and dtypes.

    Raises:
      CheckpointError: tensors that are missing, unknown, duplicate or of another
        shape or dtype, all in one message; or the path is not a model directory.
      UserError: a config.json of another architecture.
    """
    path = Path(path)
    config = open_config(path)
    files = open_model(path)
    problems = Mismatches(f"`{path}` does not fit its config.json")
    packed: dict[str, bnb.QuantState] = {}
    known: set[str] = set()
    shapes = model_params.shapes(config)
    for key, (tree_path, _) in checkpoint_keys(config).items():
        kind = bnb.packed_type(files, key)
        if kind == "fp4":
            problems.add("weights in FP4, which is not supported (only NF4 is)", key)
            # Its parts are not reported again as unknown tensors.
            known.update(n for n in files if n.startswith(f"{key}."))
            known.add(key)
        elif kind is not None and not model_params.can_be_packed(tree_path):
            problems.add(
                "quantized tensors that must stay 16-bit (keep them out with "
                "`llm_int8_skip_modules`)",
                key,
            )
            known.update(bnb.part_names(key, double_quant=True))
        elif kind is not None:
            state, parts = bnb.check(files, key, shapes[tree_path], problems)
            known.update(parts)
            if state is not None:
                packed[key] = state
        else:
            known.add(key)
            _check_dense(files, key, shapes[tree_path], problems)
    _check_head(config, files, known, problems)
    for key in files:
        if key not in known and not key.endswith(_DERIVED):
            problems.add("tensors that this model does not have", key)
    if problems.by_kind:
        problems.check(cause=_probable_cause(config, files))
    return Checkpoint(path, config, files, packed)


def _probable_cause(config: LlamaConfig, files: TensorFiles) -> str:
    """Returns the usual cause of tensors that do not fit, where their names show it."""
    adapted = [k for k in files if ".lora_" in k or ".base_layer." in k]
    if adapted or any(key.startswith(PEFT_PREFIX) for key in files):
        return (
            "They were saved with an adapter around the model. Save it with PEFT's "
            "`merge_and_unload()`, or use the base and the adapter for themselves."
        )
    if is_meta_format(files.infos):
        return f"Its tensors have the names of {META_FORMAT}."
    prefix = prefix_cause(files.infos, checkpoint_keys(config))
    if prefix:
        return f"{prefix} Save the model itself with `save_pretrained`."
    if any(key.startswith(("v_head.", "score.", "classifier.")) for key in files):
        return (
            "It has the head of a reward, value or classification model, which no "
            "language model has."
        )
    lost = _without_state(config, files)
    if lost:
        return (
            f"{len(lost):,} of its weights are in 4 bits (such as `{lost[0]}`) without "
            "the `.quant_state.bitsandbytes__nf4` that says how to read them. A "
            "program that saves the parameters alone loses these tensors. Take the "
            "files that transformers' `save_pretrained` wrote, or the model that this "
            "one was quantized from."
        )
    numbers = [
        int(part)
        for key in files
        if key.startswith("model.layers.") and (part := key.split(".")[2]).isdecimal()
    ]
    layers = max(numbers, default=-1) + 1
    if layers not in (0, config.num_hidden_layers):
        return (
            f"Its layers are 0 to {layers - 1}, and `num_hidden_layers` is "
            f"{config.num_hidden_layers}."
        )
    forms = sorted({i.dtype for k, i in files.infos.items() if "_proj." in k})
    others = [f for f in forms if f not in FLOAT_NAMES and f not in ("F64", "U8")]
    if others:
        return (
            f"Its weights are quantized ({', '.join(others)}) in another form than "
            "bitsandbytes' 4 bits. Start from the model that it was quantized from."
        )
    head, embedding = "lm_head.weight", hf_key((*EMBEDDING, "weight"))
    if head in files and embedding not in files and config.tie_word_embeddings:
        return (
            "It has the table of its tied head and embedding under the name of the "
            "head only, as safetensors' `save_model` writes it. Save it with "
            "transformers' `save_pretrained`."
        )
    if embedding in files and head not in files and not config.tie_word_embeddings:
        return (
            "It has no output head, and `tie_word_embeddings` is not set: set it to "
            "true if this model's head is its embedding."
        )
    rows = {files[key].shape[0] for key in (head, embedding) if key in files}
    if len(rows) == 1 and rows != {config.vocab_size}:
        return f"Its tables have {rows.pop()} rows (`vocab_size`)."
    return ""


def _without_state(config: LlamaConfig, files: TensorFiles) -> list[str]:
    """Lists the weights that are packed bytes, two to a byte, without their state."""
    shapes = model_params.shapes(config)
    return [
        key
        for key, (path, _) in checkpoint_keys(config).items()
        if key in files
        and model_params.can_be_packed(path)
        and bnb.packed_type(files, key) is None
        # Another dtype than uint8 is a view of the same bytes.
        and files[key].shape[1:] == (1,)
        and files[key].nbytes == -(-math.prod(shapes[path]) // 2)
    ]


class StoredTensor:
    """A tensor of a directory, read when it is converted to an array."""

    def __init__(self, files: TensorFiles, key: str):
        self._files, self._key = files, key
        self.shape = files[key].shape
        self.dtype = DTYPES[files[key].dtype]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        array = self._files.read(self._key)
        return array if dtype is None else array.astype(dtype)


class PackedTensor(StoredTensor):
    """A weight in 4 bits, dequantized when it is converted to an array."""

    def __init__(self, files: TensorFiles, key: str, state: bnb.QuantState):
        super().__init__(files, key)
        self._state = state
        self.shape = state.shape
        self.dtype = DTYPES[FLOAT_DTYPES[state.dtype]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        # A copy, because what jax returns cannot be written to.
        array = np.array(bnb.dequantize(bnb.read(self._files, self._key, self._state)))
        return array if dtype is None else array.astype(dtype)


def lazy_base(config: LlamaConfig, files: TensorFiles | None) -> dict[str, Any]:
    """Returns the parameter tree as shapes, with readable embedding and head.

    With it `load_adapter` compares the copies of these tables that an adapter file may
    hold, and reads no table if the file has none.

    Args:
      config: of the model.
      files: its tensors; None gives shapes only.
    """
    tree = model_params.abstract_base(config)
    for path in (EMBEDDING, HEAD):
        key = ".".join((*path, "weight"))
        tied = path == HEAD and config.tie_word_embeddings
        if files is None or key not in files or tied:
            continue
        if bnb.packed_type(files, key) == "nf4":
            shape = (config.vocab_size, config.hidden_size)
            state, _ = bnb.check(files, key, shape, Mismatches(""))
            if state is not None:
                put(tree, (*path, "weight"), PackedTensor(files, key, state))
        elif files[key].dtype in FLOAT_NAMES:
            put(tree, (*path, "weight"), StoredTensor(files, key))
    return tree


def _check_dense(
    files: TensorFiles, key: str, shape: tuple[int, ...], problems: Mismatches
) -> None:
    if key not in files:
        problems.add("missing tensors", key)
        return
    info = files[key]
    if 0 in info.shape:
        problems.add(
            "tensors without elements (saved under DeepSpeed ZeRO-3 without gathering "
            "them: `stage3_gather_16bit_weights_on_model_save`, or zero_to_fp32.py)",
            key,
        )
        return
    if info.dtype not in FLOAT_NAMES:
        problems.add(
            "tensors of another dtype",
            f"{key} {info.dtype} instead of {', '.join(FLOAT_NAMES)}",
        )
    if info.shape != shape:
        problems.add(
            "tensors of another shape",
            f"{key} {list(info.shape)} instead of {list(shape)}",
        )


def _check_head(
    config: LlamaConfig, files: TensorFiles, known: set[str], problems: Mismatches
) -> None:
    # A tied head is the embedding, and transformers does not save it; a copy that some
    # other program saved is accepted if it is equal.
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tie_word_embeddings or head not in files:
        return
    known.add(head)
    if embedding not in files:
        return
    same = (files[head].dtype, files[head].shape) == (
        files[embedding].dtype,
        files[embedding].shape,
    ) and np.array_equal(files.read_bytes(head), files.read_bytes(embedding))
    if not same:
        problems.add(
            "output heads that differ from the embeddings although config.json ties "
            "them (set `tie_word_embeddings` to false to use this head, or remove it "
            "from the file)",
            head,
        )
