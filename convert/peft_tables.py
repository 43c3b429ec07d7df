"""The tables of its base that an adapter's file holds.

PEFT saves the embedding and the head with an adapter where the vocabulary was resized,
or where `save_embedding_layers` asks for them:

    .weight                             of a table that the adapter leaves alone
    .base_layer.weight                  of one with a low-rank update
    .token_adapter.base_layer.weight    of one whose single rows are trained
    .original_module.weight             of one that is trained in full

When it loads the file, all of them become the base's. Here the first kind does
(`with_saved_tables`); the others are copies, which are compared with the base. Where
they have more rows, the base can grow to them, as in PEFT's AutoPeftModel.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import PackedTensor
from convert.files import (
    DTYPES,
    FLOAT_DTYPES,
    FLOAT_NAMES,
    TensorFiles,
    check_finite,
)
from convert.hf import cast, quantize_tensor
from convert.names import adapter_key
from convert.peft import open_adapter
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora import LoraConfig, Selection
from qlora_jax.models import LlamaConfig, add_tokens
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import EMBEDDING, HEAD, hf_key

_TABLES = (EMBEDDING, HEAD)
_COPIES = ("base_layer", "token_adapter.base_layer", "original_module")


@dataclass(frozen=True)
class SavedTables:
    """The keys of the base's tables in an adapter's file, by module."""

    replacing: Mapping[trees.Path, str]
    """Tables that become the base's."""
    copies: Mapping[trees.Path, tuple[str, ...]]
    """Copies of the tables that other tensors of the adapter change or replace."""

    def sources(self, path: trees.Path) -> list[str]:
        """Returns the keys with rows of a table, the best first."""
        replacing = [self.replacing[path]] if path in self.replacing else []
        return [*replacing, *self.copies.get(path, ())]

    @property
    def keys(self) -> dict[str, trees.Path]:
        """Returns all keys, and the module of each."""
        return {key: path for path in _TABLES for key in self.sources(path)}


def saved_tables(lora: LoraConfig, files: TensorFiles) -> SavedTables:
    """Finds the tables of the base in an adapter's file; reads no tensor."""
    names = lora.modules_to_save or ()
    # With tied tables, one that is named stands for both.
    both = lora.ensure_weight_tying and any(
        name.rpartition(".")[2] in (EMBEDDING[-1], HEAD[-1]) for name in names
    )
    replacing, copies = {}, {}
    for path in _TABLES:
        key = adapter_key(path, None, "weight")
        named = both or any(hf_key(path).endswith(name) for name in names)
        keys = [adapter_key(path, None, f"{kind}.weight") for kind in _COPIES]
        copies[path] = tuple(key for key in keys if key in files)
        if key in files and not named and not copies[path]:
            replacing[path] = key
    return SavedTables(replacing, copies)


def saved_vocab_size(lora: LoraConfig, files: TensorFiles, features: int) -> int:
    """Returns the vocabulary that an adapter was trained with, as far as it shows.

    Args:
      lora: configuration of the adapter.
      files: its tensors.
      features: hidden size of the base; tables of another one are left out.
    """
    sizes = [max(rows) + 1 for rows in lora.token_rows.values()]
    trained = ("weight", "modules_to_save.weight", "modules_to_save.default.weight")
    for path in _TABLES:
        keys = [adapter_key(path, None, name) for name in trained]
        keys += saved_tables(lora, files).copies[path]
        sizes += [
            files[key].shape[0]
            for key in keys
            if key in files and files[key].shape[1:] == (features,)
        ]
    # The side of a low-rank update that has a column or row for each token.
    for path, a, b, axis in (
        (EMBEDDING, "lora_embedding_B", "lora_embedding_A", -1),
        (HEAD, "lora_A.weight", "lora_B.weight", 0),
    ):
        a, b = (adapter_key(path, None, name) for name in (a, b))
        if a in files and b in files and files[a].shape and files[b].shape:
            if files[a].shape[0 if path == EMBEDDING else -1] == features:
                sizes.append(files[b].shape[axis])
    return max(sizes, default=0)


@dataclass(frozen=True)
class BaseWithTables:
    """A base, with the tables that an adapter's file has for it."""

    config: LlamaConfig
    base: dict[str, Any]
    taken: tuple[trees.Path, ...] = ()
    """Modules whose tables are not those of the base's directory: an adapter that is
    trained on them has to hold them too (`save_adapter`)."""
    notes: tuple[str, ...] = ()
    dense: Mapping[trees.Path, NDArray] = dataclasses.field(default_factory=dict)
    """The tables among them that `base` has in 4 bits, as they are in the file."""

    @property
    def tables(self) -> dict[trees.Path, Any]:
        """Returns the weights of the modules in `taken`, dense."""
        held = {path: trees.at(self.base, path)["weight"] for path in self.taken}
        return {**held, **self.dense}


def with_saved_tables(
    config: LlamaConfig,
    base: Mapping[str, Any],
    adapter: str | os.PathLike[str],
    *,
    resize: bool = False,
) -> BaseWithTables:
    """Gives a base the tables that an adapter's file holds for it.

    Args:
      config: of the base.
      base: its parameter tree, of arrays or of shapes; not changed.
      adapter: PEFT directory.
      resize: whether the vocabulary grows to the adapter's. Rows that the base has
        stay; new ones are the file's, or means of the others where it has none.

    Returns:
      The base as it was given if the file holds no tables, or (without `resize`) those
      of a larger vocabulary.

    Raises:
      CheckpointError: files that cannot be read, or NaN or infinity in a table.
      UserError: a quantized head that would have to grow.
    """
    lora, files = open_adapter(adapter, strict=False)
    saved = saved_tables(lora, files)
    size = saved_vocab_size(lora, files, config.hidden_size)
    before = config.vocab_size
    if size > before and not resize:
        return BaseWithTables(config, dict(base))
    if size > before:
        config, base = _grow(config, base, size)
    config, base, tied = _untie(config, base, saved, files)
    taken, notes, dense = [], [], {}
    for path in _TABLES if not tied else _TABLES[:1]:
        replaces = [path] if not tied else list(_TABLES)
        shape = (config.vocab_size, config.hidden_size)
        keys = [
            key
            for source in replaces
            for key in saved.sources(source)
            if files[key].shape == shape and files[key].dtype in FLOAT_NAMES
        ]
        whole = any(source in saved.replacing for source in replaces)
        if keys and (whole or size > before):
            rows = slice(None) if whole else slice(before, None)
            if _is_packed(trees.at(base, path)["weight"]):
                notes.append(
                    f"the {path[-1]} that `{adapter}` has for its base is quantized "
                    "here, as this base's is"
                )
            base, table = _replace(base, path, files, keys[0], rows)
            dense.update({} if table is None else {path: table})
        elif size > before and not _is_trained(path, lora):
            notes.append(
                f"`{adapter}` has no rows of {path[-1]} for its tokens {before:,} to "
                f"{size - 1:,}; here they are means of the base's rows"
            )
        if size > before or (keys and whole):
            taken.append(path)
    return BaseWithTables(config, dict(base), tuple(taken), tuple(notes), dense)


def _is_packed(table: Any) -> bool:
    return isinstance(table, (NF4Tensor, PackedTensor))


def _is_trained(path: trees.Path, lora: LoraConfig) -> bool:
    """Whether `modules_to_save` replaces a table anyway."""
    return any(hf_key(path).endswith(name) for name in lora.modules_to_save or ())


def _grow(
    config: LlamaConfig, base: Mapping[str, Any], size: int
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Appends rows to the tables, means of those there are."""
    tables = [EMBEDDING, *([HEAD] if "weight" in base.get(HEAD[-1], {}) else [])]
    leaves = {path: trees.at(base, path)["weight"] for path in tables}
    if any(map(_is_packed, leaves.values())):
        raise UserError(
            "The base's output head is quantized, and its vocabulary would have to "
            "grow to the adapter's. Keep the head dense (model.lm_head = 'auto')."
        )
    grown = config, dict(base)
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        out = trees.copy(base)
        for path, leaf in leaves.items():
            shape = (size, *leaf.shape[1:])
            trees.at(out, path)["weight"] = jax.ShapeDtypeStruct(shape, leaf.dtype)
        grown = dataclasses.replace(config, vocab_size=size), out
    else:
        dense = trees.copy(base)
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                trees.at(dense, path)["weight"] = np.asarray(leaf)
        count = size - config.vocab_size
        grown = add_tokens(config, dense, tokenizer_size=config.vocab_size, count=count)
    # `raw` stays what the base's config.json says.
    return dataclasses.replace(grown[0], raw=config.raw), grown[1]


def _untie(
    config: LlamaConfig,
    base: Mapping[str, Any],
    saved: SavedTables,
    files: TensorFiles,
) -> tuple[LlamaConfig, Mapping[str, Any], bool]:
    """Gives a tied base a head of its own if the file has two different tables.

    Returns:
      Configuration, base, and whether embedding and head are one table.
    """
    keys = [saved.replacing.get(path) for path in _TABLES]
    if not config.tie_word_embeddings:
        return config, base, False
    if None in keys or _equal(files, str(keys[0]), str(keys[1])):
        return config, base, True
    table = trees.at(base, EMBEDDING)["weight"]
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    return untied, {**base, HEAD[-1]: {"weight": table}}, False


def _equal(files: TensorFiles, a: str, b: str) -> bool:
    if (files[a].dtype, files[a].shape) != (files[b].dtype, files[b].shape):
        return False
    return np.array_equal(files.read_bytes(a), files.read_bytes(b))


def _replace(
    base: Mapping[str, Any],
    path: trees.Path,
    files: TensorFiles,
    key: str,
    rows: slice,
) -> tuple[dict[str, Any], NDArray | None]:
    """Sets rows of a table to those of the file, in the form that the base has.

    Returns:
      The base, and the file's table if the base has it in 4 bits.
    """
    leaf = trees.at(base, path)["weight"]
    out = trees.copy(base)
    if isinstance(jax.tree.leaves(leaf)[0], jax.ShapeDtypeStruct):
        return out, None
    table: NDArray = files.read(key)
    check_finite(table, key)
    packed = None
    if isinstance(leaf, NF4Tensor):
        packed = cast(table, DTYPES[FLOAT_DTYPES[leaf.dtype]], key)
        weight: Any = quantize_tensor(table, key, double_quant=leaf.double_quant)
        weight = dataclasses.replace(weight, dtype=leaf.dtype)
        if isinstance(leaf.codes, jax.Array):
            weight = jax.tree.map(jax.numpy.asarray, weight)
    else:
        weight = np.array(leaf)
        weight[rows] = cast(table[rows], weight.dtype, key)
        weight = jax.numpy.asarray(weight) if isinstance(leaf, jax.Array) else weight
    trees.at(out, path)["weight"] = weight
    return out, packed


def check_vocabulary(adapter: str | os.PathLike[str], base: Mapping[str, Any]) -> None:
    """Raises if an adapter was trained with more tokens than the base has.

    Args:
      adapter: PEFT directory.
      base: parameter tree of the base, of arrays or of shapes.

    Raises:
      CheckpointError: it was; says how the base can grow.
    """
    check_vocab_size(*open_adapter(adapter, strict=False), base, adapter)


def check_vocab_size(
    lora: LoraConfig, files: TensorFiles, base: Mapping[str, Any], path: Any
) -> None:
    """Raises if an adapter was trained with more tokens than the base has.

    Raises:
      CheckpointError: it was; says how the base can grow.
    """
    rows, features = trees.at(base, EMBEDDING)["weight"].shape
    size = saved_vocab_size(lora, files, features)
    if size > rows:
        raise CheckpointError(
            f"`{path}` was trained with a vocabulary of {size:,} tokens, and this base "
            f"has {rows:,}. If it is the right base, let its tables grow to the "
            "adapter's: `resize_to_adapter=True` (--resize-to-adapter)."
        )


def table_keys(
    tables: Mapping[trees.Path, Any], selection: Selection
) -> dict[str, Any]:
    """Returns the keys under which an adapter's file holds tables of its base.

    Args:
      tables: weights by module, as in `BaseWithTables`.
      selection: what the adapter trains.

    Returns:
      Key -> weight, without tables that the adapter replaces.
    """
    kinds = {full.path[:-1]: "" for full in selection.full_tensors}
    kinds |= {module.path: f"{_COPIES[0]}.weight" for module in selection.adapted}
    kinds |= {rows.path: f"{_COPIES[1]}.weight" for rows in selection.rows}
    out = {}
    for path, table in tables.items():
        # A tied head keeps the base's table where the embedding gets one of its own.
        if HEAD not in tables and kinds.get(path) == "" and HEAD not in kinds:
            path = HEAD
        name = kinds.get(path, "weight")
        if name:
            out[adapter_key(path, None, name)] = table
    return out
