"""The selection: what a LoraConfig trains in a model.

    selection = select(base, lora_config)

`base` is a parameter tree, of arrays or of their shapes. The selection lists the
adapted modules with rank and scaling of every layer, the tensors trained in full, and
the embedding rows trained alone. Initialization, the forward pass, adapter files and
parameter counts all follow from it.

Matching is PEFT's, rule by rule, on Hugging Face's module paths
(`model.layers.3.self_attn.q_proj`). Any module with a two-dimensional `weight` can be
adapted, custom ones too. It is an embedding if its name contains "embed", else a linear
layer.

Layers are stacked, so one array has the `lora_A` of a module in all layers. Where ranks
differ, the array has the largest; the surplus rows of A and columns of B are zero, have
zero gradients, and so stay zero. A layer that is not adapted has rank 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_jax import tree as trees
from qlora_jax.errors import UserError, did_you_mean
from qlora_jax.lora.config import BEFORE_NUMBER, WITHIN, LoraConfig
from qlora_jax.lora.patterns import match_patterns
from qlora_jax.lora.unmatched import (
    ends_in,
    nothing_matches,
    quoted,
    unmatched_targets,
)
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import (
    EMBEDDING,
    HEAD,
    Path,
    Shape,
    dotted,
    hf_key,
    is_stacked,
)

_TABLES = (EMBEDDING[-1], HEAD[-1])

# Of a tensor: shape in one layer, and number of layers (None outside the stack).
_Tensor = tuple[Shape, int | None]


@dataclass(frozen=True)
class AdaptedModule:
    """One module with a low-rank update, in all its layers."""

    path: Path
    kind: Literal["linear", "embedding"]
    shape: tuple[int, int]
    """Weight in one layer: [out, in], or [rows, features] of an embedding."""
    layers: int | None
    """Length of the leading axis; None outside the stack."""
    ranks: tuple[int, ...]
    """Rank in each layer; 0 where the layer is not adapted."""
    scalings: tuple[float, ...]
    """Factor of `B @ A` in each layer; 0 where the layer is not adapted."""
    dora: bool = False
    lora_bias: bool = False
    tied_to: Path | None = None
    """The module whose update this one shares, transposed (a tied head); the only array
    that is not shared is the DoRA magnitude."""

    @property
    def rank(self) -> int:
        """The largest rank: that of the arrays."""
        return max(self.ranks)

    @property
    def parts(self) -> dict[str, Shape]:
        """Arrays in one layer of the largest rank: name -> shape."""
        # dA = s B^T dy x^T and dB = s dy (A x)^T: rows of A and columns of B that are
        # both zero have zero gradients, so padding needs no mask.
        return self.parts_of(self.rank)

    def parts_of(self, rank: int) -> dict[str, Shape]:
        """Arrays in one layer of this rank: name -> shape."""
        rows, columns = self.shape
        out: dict[str, Shape] = {}
        if self.kind == "embedding":
            # E [V, D] is looked up, not multiplied: column i of A is token i's.
            out["lora_embedding_A"] = (rank, rows)
            out["lora_embedding_B"] = (columns, rank)
        elif self.tied_to is None:
            out["lora_A"] = (rank, columns)
            out["lora_B"] = (rows, rank)
        if self.lora_bias and self.kind == "linear" and self.tied_to is None:
            out["lora_bias"] = (rows,)
        if self.dora:
            # PEFT rescales the columns of an embedding, the rows of a linear layer.
            width = columns if self.kind == "embedding" else rows
            out["lora_magnitude_vector"] = (width,)
        return out


@dataclass(frozen=True)
class FullTensor:
    """One tensor of the base that is trained in full."""

    path: Path
    shape: Shape
    """In one layer."""
    layers: int | None
    trained: tuple[bool, ...]
    """Whether it is trained, layer by layer."""
    tied_to: Path | None = None
    """The tensor it shares its array with (a tied head)."""


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding or head that are trained alone."""

    path: Path
    indices: tuple[int, ...]
    features: int
    tied_to: Path | None = None
    """The module it shares its rows with (a tied head)."""


@dataclass(frozen=True)
class Selection:
    """Everything that is trained."""

    adapted: tuple[AdaptedModule, ...]
    full_tensors: tuple[FullTensor, ...]
    rows: tuple[TokenRows, ...]
    unmatched: tuple[str, ...]
    """Entries of a `target_modules` list that match nothing."""

    def shapes(self) -> dict[Path, Shape]:
        """Returns the trained tree: path of each array -> shape with the layer axis."""
        out: dict[Path, Shape] = {}
        for a in self.adapted:
            for name, shape in a.parts.items():
                out[*a.path, name] = _stacked(a.layers, shape)
        for w in self.full_tensors:
            if w.tied_to is None:
                out[w.path] = _stacked(w.layers, w.shape)
        for r in self.rows:
            if r.tied_to is None:
                shape = (len(r.indices), r.features)
                out[*r.path, "trainable_tokens_delta"] = shape
        return out

    def groups(self) -> dict[str, int]:
        """Counts trained parameters by module name, without the padding of ranks."""
        out: dict[str, int] = {}

        def add(name: str, count: int) -> None:
            out[name] = out.get(name, 0) + count

        for a in self.adapted:
            for rank in a.ranks:
                if rank:
                    add(a.path[-1], sum(map(math.prod, a.parts_of(rank).values())))
        for w in self.full_tensors:
            if w.tied_to is None:
                add(w.path[-2], math.prod(w.shape) * sum(w.trained))
        for r in self.rows:
            if r.tied_to is None:
                add(r.path[-1], len(r.indices) * r.features)
        return out


def _stacked(layers: int | None, shape: Shape) -> Shape:
    return shape if layers is None else (layers, *shape)


def select(base: Mapping[str, Any], lora: LoraConfig) -> Selection:
    """Finds what `lora` trains in a base tree.

    Raises:
      UserError: nothing matches (the message lists near names), a name in
        `modules_to_save` or `trainable_token_indices` that no module has, token ids
        outside the vocabulary, or settings that PEFT cannot combine here.
    """
    inventory = _take_inventory(base)
    full_tensors = _full_tensors(inventory, lora)
    in_full = {t.path[:-1]: t.trained for t in full_tensors if t.path[-1] == "weight"}
    updates = _updates(inventory, lora, in_full)
    shared = (
        inventory.tied
        and lora.ensure_weight_tying
        and in_full.keys().isdisjoint((EMBEDDING, HEAD))
        and _names_table(lora)
    )
    if shared:
        updates |= _shared_updates(lora)
    if not updates:
        raise nothing_matches(inventory.modules, lora)
    adapted = tuple(
        AdaptedModule(
            path=path,
            kind="embedding" if is_embedding(path) else "linear",
            shape=(shape[0], shape[1]),
            layers=layers,
            ranks=tuple(rank for rank, _ in updates[path]),
            scalings=tuple(scaling for _, scaling in updates[path]),
            dora=lora.use_dora,
            lora_bias=lora.lora_bias,
            tied_to=EMBEDDING if shared and path == HEAD else None,
        )
        for path, (shape, layers) in inventory.modules.items()
        if path in updates
    )
    _check_lora_bias(adapted)
    rows = _token_rows(inventory, lora)
    _check_rows(rows, {a.path: a for a in adapted}, in_full)
    return Selection(
        adapted,
        tuple(_with_biases(full_tensors, inventory, updates, lora)),
        tuple(rows),
        unmatched_targets(inventory.modules, lora),
    )


def is_embedding(module: Path) -> bool:
    """Whether a module with a two-dimensional weight is an embedding."""
    return "embed" in module[-1]


def matching(module_paths: Iterable[str], lora: LoraConfig) -> set[str]:
    """Returns the modules that PEFT's rules select for an update, by dotted paths."""
    paths = tuple(module_paths)
    targets = lora.target_modules
    if targets == "all-linear":
        last = {path: path.rpartition(".")[2] for path in paths}
        out = {p for p in paths if last[p] != HEAD[-1] and not is_embedding((last[p],))}
    else:
        out = _named(paths, lora, "target_modules")
        if not isinstance(targets, str):
            # As in PEFT, a full path among the targets counts in any layer.
            out &= _in_layers(paths, lora) | set(targets)
    saved = match_patterns(
        lora.modules_to_save or (),
        paths,
        field="lora: `modules_to_save`",
        inside=WITHIN,
    )
    # Exclusions win, and what is trained in full gets no update.
    return out.difference(_named(paths, lora, "exclude_modules"), *saved.values())


def _names_table(lora: LoraConfig) -> bool:
    """Whether the targets name embed_tokens or lm_head, as PEFT reads them.

    That is the last part of a name, or an expression that matches the bare word.
    """
    targets = lora.target_modules
    if isinstance(targets, str):
        return bool(_named(_TABLES, lora, "target_modules"))
    return any(name.rpartition(".")[2] in _TABLES for name in targets)


def _named(
    paths: tuple[str, ...],
    lora: LoraConfig,
    field: Literal["target_modules", "exclude_modules"],
) -> set[str]:
    """Returns the paths that end in a name of the list, or match the expression."""
    value = getattr(lora, field) or ()
    if isinstance(value, str):
        return set(match_patterns((value,), paths, field=f"lora: `{field}`")[value])
    return {path for path in paths if any(ends_in(path, name) for name in value)}


def _in_layers(paths: tuple[str, ...], lora: LoraConfig) -> set[str]:
    """Returns the paths in one of `layers_to_transform`."""
    layers = lora.layers_to_transform
    if layers is None:
        return set(paths)
    layers = (layers,) if isinstance(layers, int) else layers
    # As in PEFT, a pattern may begin the path, the default name comes after a dot.
    patterns, inside = lora.layers_pattern, BEFORE_NUMBER
    if patterns is None:
        patterns, inside = ("[^.]*",), r".*?\.{}\.(\d+)\."
    field = "lora: `layers_pattern`"
    matched = match_patterns(patterns, paths, field=field, inside=inside)
    # The number is the last group: a pattern may have groups too.
    numbers: dict[str, str | None] = {}
    for pattern in reversed(patterns):  # the first that matches counts
        numbers.update(matched[pattern])
    return {path for path, number in numbers.items() if int(str(number)) in layers}


# --- The tensors of a base ---


@dataclass(frozen=True)
class _Inventory:
    tensors: Mapping[Path, _Tensor]
    modules: Mapping[Path, _Tensor]
    """Those with a two-dimensional weight, a tied head too -> that weight."""
    tied: bool


def _take_inventory(base: Mapping[str, Any]) -> _Inventory:
    tensors = _tensors(base)
    modules = {
        path[:-1]: tensor
        for path, tensor in tensors.items()
        if path[-1] == "weight" and len(tensor[0]) == 2
    }
    # A tied checkpoint has no weight for its head.
    tied = HEAD not in modules and EMBEDDING in modules
    if tied:
        modules[HEAD] = modules[EMBEDDING]
    return _Inventory(tensors, modules, tied)


def _tensors(base: Mapping[str, Any]) -> dict[Path, _Tensor]:
    out: dict[Path, _Tensor] = {}
    for path, leaf in trees.walk(base):
        if path[-1].startswith("residual_"):  # added by `factor_out`
            continue
        if isinstance(leaf, NF4Tensor):
            layers = leaf.codes.shape[0] if is_stacked(path) else None
            out[path] = (tuple(leaf.shape), layers)
        elif is_stacked(path):
            out[path] = (tuple(leaf.shape[1:]), leaf.shape[0])
        else:
            out[path] = (tuple(leaf.shape), None)
    return out


def linear_modules(base: Mapping[str, Any]) -> dict[Path, tuple[int, int, int | None]]:
    """Lists the linear modules of a base tree: path -> (out, in, layers or None)."""
    return {
        path[:-1]: (shape[0], shape[1], layers)
        for path, (shape, layers) in _tensors(base).items()
        if path[-1] == "weight" and len(shape) == 2 and not is_embedding(path[:-1])
    }


# --- Low-rank updates ---


def _updates(
    inventory: _Inventory,
    lora: LoraConfig,
    in_full: Mapping[Path, tuple[bool, ...]],
) -> dict[Path, list[tuple[int, float]]]:
    """Returns rank and scaling in each layer of the modules adapted in any layer.

    A weight that is trained in full has no update.
    """
    names = {path: dotted(path, n) for path, (_, n) in inventory.modules.items()}
    module_paths = [name for layers in names.values() for name in layers]
    selected = matching(module_paths, lora)
    values = lora.ranks_and_scalings(module_paths)
    out = {}
    for path, layers in names.items():
        excluded = in_full.get(path, (False,) * len(layers))
        updates = [
            # One program for all layers: scaling 0 turns the update of a layer off.
            values[name] if name in selected and not full else (0, 0.0)
            for name, full in zip(layers, excluded, strict=True)
        ]
        if any(rank for rank, _ in updates):
            out[path] = updates
    return out


def _shared_updates(lora: LoraConfig) -> dict[Path, list[tuple[int, float]]]:
    """Returns the updates of an embedding and of its tied head, of one rank.

    PEFT adapts the embedding, and the head with the transpose, whatever
    `layers_to_transform` contains.
    """
    if _named((hf_key(EMBEDDING),), lora, "exclude_modules"):
        raise UserError(
            "`ensure_weight_tying` adapts embed_tokens with its head, and "
            "`exclude_modules` excludes embed_tokens; give only one of the two."
        )
    values = lora.ranks_and_scalings((hf_key(EMBEDDING), hf_key(HEAD)))
    # Shared factors have one rank, the embedding's, and a scaling on each side.
    rank, _ = values[hf_key(EMBEDDING)]
    return {path: [(rank, values[hf_key(path)][1])] for path in (EMBEDDING, HEAD)}


def _check_lora_bias(adapted: Iterable[AdaptedModule]) -> None:
    for a in adapted:
        if a.lora_bias and a.kind == "embedding":
            raise UserError(
                f"`lora_bias` cannot be combined with an adapted embedding "
                f"({a.path[-1]}): PEFT has no array for such a bias. Take the "
                "embedding out of `target_modules`, or leave `lora_bias` out."
            )


# --- Tensors trained in full ---


def _full_tensors(inventory: _Inventory, lora: LoraConfig) -> list[FullTensor]:
    """Returns the tensors of `modules_to_save`."""
    names = lora.modules_to_save or ()
    if not names:
        return []
    tensors = dict(inventory.tensors)
    if inventory.tied:
        # As in PEFT, a tied head that is named gets a copy of its own, unless
        # `ensure_weight_tying` shares the embedding's (below).
        tensors[*HEAD, "weight"] = tensors[*EMBEDDING, "weight"]
    matched: set[str] = set()
    saved: set[str] = set()
    out = []
    for path, (shape, layers) in tensors.items():
        trained = []
        for module in dotted(path[:-1], layers):
            # A module is saved with all it contains. PEFT compares ends of paths.
            outer = [*_outer_modules(module), module]
            hits = {n: m for n in names for m in outer if m.endswith(n)}
            matched |= hits.keys()
            saved |= set(hits.values())
            trained.append(bool(hits))
        if any(trained):
            out.append(FullTensor(path, shape, layers, tuple(trained)))
    missing = [name for name in names if name not in matched]
    if missing:
        modules = {path[-2] for path in tensors}
        raise UserError(
            f"`modules_to_save` names {quoted(missing)}, which this model does not "
            f"have.{did_you_mean(missing, modules)} Modules here: "
            f"{', '.join(sorted(modules))}."
        )
    _check_nesting(saved)
    if (
        inventory.tied
        and lora.ensure_weight_tying
        and any(name.rpartition(".")[2] in _TABLES for name in names)
    ):
        table, head = (*EMBEDDING, "weight"), (*HEAD, "weight")
        shape = tensors[table][0]
        out = [t for t in out if t.path not in (table, head)]
        out.append(FullTensor(table, shape, None, (True,)))
        out.append(FullTensor(head, shape, None, (True,), tied_to=table))
    return out


def _outer_modules(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _check_nesting(saved: set[str]) -> None:
    for inner in sorted(saved):
        for outer in reversed(_outer_modules(inner)):
            if outer in saved:
                raise UserError(
                    f"`modules_to_save` selects `{inner}`, and `{outer}` that contains "
                    "it; PEFT fails to load most such adapters. Name only one of them."
                )


def _with_biases(
    full_tensors: Iterable[FullTensor],
    inventory: _Inventory,
    updates: Mapping[Path, list[tuple[int, float]]],
    lora: LoraConfig,
) -> list[FullTensor]:
    """Adds the biases that `bias` trains; some layers of one may be there already."""
    out = {t.path: t for t in full_tensors}
    for path, (shape, layers) in inventory.tensors.items():
        if path[-1] != "bias" or lora.bias == "none":
            continue
        if lora.bias == "all":
            trained = [True] * (layers or 1)
        else:
            trained = [rank > 0 for rank, _ in updates.get(path[:-1], ())]
        if path in out and trained:
            pairs = zip(out[path].trained, trained, strict=True)
            trained = [saved or bias for saved, bias in pairs]
        if any(trained):
            out[path] = FullTensor(path, shape, layers, tuple(trained))
    return list(out.values())


# --- Rows of embeddings ---


def _token_rows(inventory: _Inventory, lora: LoraConfig) -> list[TokenRows]:
    tables = {p: shape for p, (shape, n) in inventory.modules.items() if n is None}
    out: dict[Path, TokenRows] = {}
    # As in PEFT, names are ends of paths.
    indices_by_name = lora.trainable_token_indices or {}
    if not isinstance(indices_by_name, Mapping):
        indices_by_name = {EMBEDDING[-1]: indices_by_name}
    for name, indices in indices_by_name.items():
        hits = [path for path in tables if hf_key(path).endswith(name)]
        if not hits:
            near = did_you_mean(name, {path[-1] for path in inventory.modules})
            raise UserError(
                f"`trainable_token_indices` names {name!r:.80}, which is not an "
                f"embedding or head of this model.{near}"
            )
        for path in hits:
            rows, features = tables[path]
            outside = [i for i in indices if i >= rows]
            if outside:
                raise UserError(
                    f"`trainable_token_indices` has {outside[0]}, and {name!r} has "
                    f"{rows} rows (0 to {rows - 1})."
                )
            out[path] = TokenRows(path, indices, features)
    embedding, head = out.get(EMBEDDING), out.get(HEAD)
    if inventory.tied and embedding is not None:
        if head is None or head.indices == embedding.indices:
            # PEFT's head follows the embedding unless it has rows of its own.
            out[HEAD] = dataclasses.replace(embedding, path=HEAD, tied_to=EMBEDDING)
        elif lora.ensure_weight_tying:
            raise UserError(
                "`trainable_token_indices` gives embed_tokens and lm_head different "
                "rows, and `ensure_weight_tying` makes them one; give only one of the "
                "two."
            )
    return list(out.values())


def _check_rows(
    rows: Iterable[TokenRows],
    adapted: Mapping[Path, AdaptedModule],
    in_full: Mapping[Path, Any],
) -> None:
    """Raises if rows are trained in another way too, as PEFT does."""
    for r in rows:
        name = f"`trainable_token_indices` trains rows of {r.path[-1]!r}"
        if r.path in in_full:
            raise UserError(
                f"{name}, which `modules_to_save` trains in full; give only one of the "
                "two."
            )
        if r.path not in adapted:
            continue
        if r.tied_to is None:
            raise UserError(
                f"{name}, which `target_modules` adapts; give only one of the two."
            )
        if adapted[r.path].dora:
            raise UserError(
                f"{name}, which is tied to the embedding and adapted with `use_dora`; "
                "rows and norms of rows cannot be trained together."
            )
