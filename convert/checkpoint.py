"""A model directory, checked against its config.json before any weight is read.

Names, shapes, dtypes and quantization states come from headers and small tensors, so a
wrong download fails in milliseconds, and the message says everything that is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import bnb, names
from convert.files import (
    DTYPES,
    Mismatches,
    TensorFiles,
    check_model_directory,
    open_model,
    read_json,
)
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.tree import EMBEDDING, HEAD

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOAT_NAMES = {v: k for k, v in FLOATS.items()}

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
    def mixed(self) -> tuple[names.Path, ...]:
        """The projections whose layers are not all stored in one form.

        Some layers are in 4 bit and others are not (`llm_int8_skip_modules` named
        single layers), or they differ in double quantization or in the dtype before
        quantization.
        """
        found = []
        for path in filter(
            model_params.is_projection, model_params.shapes(self.config)
        ):
            states = (
                self.packed.get(names.hf_key(path, layer))
                for layer in model_params.layers_of(path, self.config)
            )
            if len({s and (s.dtype, s.double_quant) for s in states}) > 1:
                found.append(path)
        return tuple(found)

    def dtype(self, key: str) -> str:
        """Name of the dtype of a weight, of a packed one that before quantization."""
        if key in self.packed:
            return self.packed[key].dtype
        return FLOAT_NAMES[self.files[key].dtype]


def open_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """Reads the config.json of a Llama directory.

    Raises:
      CheckpointError: a directory that is something else.
      UserError: a config.json of another architecture.
    """
    path = Path(path)
    check_model_directory(path)
    return LlamaConfig.from_hf(read_json(path / "config.json"))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Llama directory and checks all names, shapes and dtypes.

    Raises:
      CheckpointError: anything missing, unknown, duplicate, mis-shaped or of another
        dtype, all in one message; or a directory that is something else.
      UserError: a config.json of another architecture.
    """
    path = Path(path)
    config = open_config(path)
    files = open_model(path)
    problems = Mismatches(f"`{path}` does not fit its config.json")
    packed: dict[str, bnb.QuantState] = {}
    known: set[str] = set()
    shapes = model_params.shapes(config)
    for key, (where, _) in names.keys(config).items():
        kind = bnb.packed_type(files, key)
        if kind == "fp4":
            problems.add("weights in FP4, which is not supported (only NF4 is)", key)
            known.update(n for n in files if n.startswith(f"{key}."))
            known.add(key)
        elif kind is not None and not model_params.is_projection(where):
            problems.add(
                "quantized tensors that have to stay 16-bit (keep them out with "
                "`llm_int8_skip_modules`)",
                key,
            )
            known.update(bnb.part_names(key, double_quant=True))
        elif kind is not None:
            state, parts = bnb.check(files, key, shapes[where], problems)
            known.update(parts)
            if state is not None:
                packed[key] = state
        else:
            known.add(key)
            _check_dense(files, key, shapes[where], problems)
    _check_head(config, files, known, problems)
    for key in files:
        if key not in known and not key.endswith(_DERIVED):
            problems.add("tensors that this model does not have", key)
    problems.check()
    return Checkpoint(path, config, files, packed)


class StoredTensor:
    """A tensor of a directory, read when its values are asked for."""

    def __init__(self, files: TensorFiles, key: str):
        self._files, self._key = files, key
        self.shape = files[key].shape
        self.dtype = DTYPES[files[key].dtype]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        array = self._files.read(self._key)
        return array if dtype is None else array.astype(dtype)


def lazy_base(config: LlamaConfig, files: TensorFiles | None) -> dict[str, Any]:
    """The parameter tree as shapes, with embedding and head that can be read.

    With it `load_adapter` compares the copies of these tables that an adapter file may
    have, and reads no table for a file that has none.

    Args:
      config: of the model.
      files: its tensors; None gives the shapes alone.
    """
    tree = model_params.abstract_base(config)
    for path in (EMBEDDING, HEAD):
        key = ".".join((*path, "weight"))
        if files is not None and key in files and files[key].dtype in FLOAT_NAMES:
            if path != HEAD or not config.tie_word_embeddings:
                names.put(tree, (*path, "weight"), StoredTensor(files, key))
    return tree


def _check_dense(
    files: TensorFiles, key: str, shape: tuple[int, ...], problems: Mismatches
) -> None:
    if key not in files:
        problems.add("missing tensors", key)
        return
    info = files[key]
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
