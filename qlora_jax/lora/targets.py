"""What a LoraConfig selects in a model: the one table that everything reads.

    selection = select(base, lora_config)

`base` is a parameter tree, of arrays or of their shapes. The selection lists the
adapted modules with rank and scaling of every layer, the tensors trained whole and the
embedding rows trained alone. How adapters start, how they enter the model, what an
adapter file holds, how many parameters are trained: all of it follows from this table.

Matching is PEFT's, to the letter, on Hugging Face's module paths
(`model.layers.3.self_attn.q_proj`). Any module with a two-dimensional `weight` can be
adapted; there is no list of accepted ones. It is a linear layer, or an embedding where
its name contains "embed".

Layers are stacked, so one array holds a module's `lora_A` in all layers. Where ranks
differ, the array has the largest; the surplus rows of A and columns of B are zero, have
zero gradients, and so stay zero. A layer that is not adapted has rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_jax import tree as trees
from qlora_jax.errors import UserError, did_you_mean
from qlora_jax.lora.config import BEFORE_NUMBER, WITHIN, LoraConfig
from qlora_jax.lora.patterns import match_patterns
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, Path, Shape, dotted

_TABLES = (EMBEDDING[-1], HEAD[-1])


@dataclass(frozen=True)
class AdaptedModule:
    """One module with a low-rank update, in all its layers."""

    path: Path
    kind: Literal["linear", "embedding"]
    shape: tuple[int, int]
    """Of the weight in one layer: (out, in), or (rows, features) of an embedding."""
    layers: int | None
    """Length of the leading axis; None outside the stack."""
    ranks: tuple[int, ...]
    """One for each layer; 0 where the layer is not adapted."""
    scalings: tuple[float, ...]
    """Factor of `B @ A` in each layer; 0 where the layer is not adapted."""
    dora: bool = False
    lora_bias: bool = False
    tied_to: Path | None = None
    """The module whose update this one shares, transposed (a tied head); its only own
    array is the DoRA magnitude."""

    @property
    def rank(self) -> int:
        """The largest rank: that of the arrays."""
        return max(self.ranks)

    @property
    def parts(self) -> dict[str, Shape]:
        """Its arrays in one layer of the largest rank: name -> shape."""
        return self.parts_of(self.rank)

    def parts_of(self, rank: int) -> dict[str, Shape]:
        """Its arrays in one layer of this rank."""
        rows, columns = self.shape
        out: dict[str, Shape] = {}
        if self.kind == "embedding":
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
    """One tensor of the base that is trained as it is."""

    path: Path
    """With the name of the tensor at its end."""
    shape: Shape
    """In one layer."""
    layers: int | None
    trained: tuple[bool, ...]
    """Whether it is trained, layer by layer."""
    tied_to: Path | None = None
    """The tensor it is tied to; it has no array of its own then."""


@dataclass(frozen=True)
class TokenRows:
    """Some rows of an embedding or head that are trained alone."""

    path: Path
    indices: tuple[int, ...]
    features: int
    tied_to: Path | None = None
    """The module whose rows these are (a tied head)."""


@dataclass(frozen=True)
class Selection:
    """Everything that is trained; see the module's text."""

    adapted: tuple[AdaptedModule, ...]
    full_tensors: tuple[FullTensor, ...]
    rows: tuple[TokenRows, ...]
    unmatched: tuple[str, ...]
    """Entries of a `target_modules` list that select nothing."""

    def shapes(self) -> dict[Path, Shape]:
        """The trained tree: path of each array -> shape with the layer axis."""
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
        """Trained parameters by module name, without the padding of lower ranks."""
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
    """Finds what `lora` selects in a base tree.

    Raises:
      UserError: nothing matches (near matches are listed), a name in `modules_to_save`
        or `trainable_token_indices` that no module has, or token ids outside the
        vocabulary.
    """
    tensors = _tensors(base)
    modules = {p[:-1]: s for p, s in tensors.items() if p[-1] == "weight"}
    modules = {p: s for p, s in modules.items() if len(s[0]) == 2}
    tied = HEAD not in modules and EMBEDDING in modules
    if tied:
        modules[HEAD] = modules[EMBEDDING]
    share = tied and lora.ensure_weight_tying

    whole = _whole(tensors, modules, lora, tied)
    taken = {w.path[:-1]: w.trained for w in whole if w.path[-1] == "weight"}
    chosen = _ranks(modules, lora, taken)
    follows = {}
    if share and EMBEDDING not in taken and HEAD not in taken and _names_table(lora):
        # PEFT adapts the embedding, and the head with its transpose, whatever
        # `layers_to_transform` says.
        if _named((".".join(EMBEDDING),), lora, "exclude_modules"):
            raise UserError(
                "`ensure_weight_tying` adapts embed_tokens with its head, and "
                "`exclude_modules` takes embed_tokens away; give one of the two."
            )
        rank, _ = lora.rank_and_scaling(".".join(EMBEDDING))
        for path in (EMBEDDING, HEAD):
            chosen[path] = [(rank, lora.rank_and_scaling(".".join(path))[1])]
        follows[HEAD] = EMBEDDING
    if not chosen:
        raise _nothing(lora, modules)
    embeddings = [path[-1] for path in chosen if is_embedding(path)]
    if lora.lora_bias and embeddings:
        raise UserError(
            f"`lora_bias` does not go with an adapted embedding ({embeddings[0]}): "
            "PEFT has no place for such a bias. Take the embedding out of "
            "`target_modules`, or leave `lora_bias` out."
        )
    adapted = []
    for path in [p for p in modules if p in chosen]:
        (rows, columns), layers = modules[path]
        ranks, scalings = zip(*chosen[path], strict=True)
        adapted.append(
            AdaptedModule(
                path=path,
                kind="embedding" if is_embedding(path) else "linear",
                shape=(rows, columns),
                layers=layers,
                ranks=ranks,
                scalings=scalings,
                dora=lora.use_dora,
                lora_bias=lora.lora_bias,
                tied_to=follows.get(path),
            )
        )
    rows = _token_rows(modules, lora, tied)
    _check_rows(rows, {a.path: a for a in adapted}, taken)
    return Selection(
        tuple(adapted),
        tuple(_with_biases(whole, tensors, chosen, lora)),
        tuple(rows),
        _unmatched(modules, lora),
    )


def is_embedding(module: Path) -> bool:
    """Whether a module with a two-dimensional weight looks rows up."""
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
            out &= _in_layers(paths, lora) | set(targets)
    saved = match_patterns(
        lora.modules_to_save or (),
        paths,
        field="lora: `modules_to_save`",
        inside=WITHIN,
    )
    return out.difference(_named(paths, lora, "exclude_modules"), *saved.values())


def _names_table(lora: LoraConfig) -> bool:
    """Whether the targets name embed_tokens or lm_head.

    As PEFT reads them: the last part of a name, or an expression that matches the word.
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
    """The paths that end in a name of the list, or that the expression matches."""
    value = getattr(lora, field) or ()
    if isinstance(value, str):
        return set(match_patterns((value,), paths, field=f"lora: `{field}`")[value])
    return {path for path in paths if any(_ends_in(path, name) for name in value)}


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _in_layers(paths: tuple[str, ...], lora: LoraConfig) -> set[str]:
    """The paths in one of `layers_to_transform`."""
    wanted = lora.layers_to_transform
    if wanted is None:
        return set(paths)
    layers = (wanted,) if isinstance(wanted, int) else wanted
    # PEFT lets a given pattern begin the path, and looks for any name after a dot.
    patterns, inside = lora.layers_pattern, BEFORE_NUMBER
    if patterns is None:
        patterns, inside = ("[^.]*",), r".*?\.{}\.(\d+)\."
    field = "lora: `layers_pattern`"
    matched = match_patterns(patterns, paths, field=field, inside=inside)
    # The number is the last group: a pattern may have groups of its own.
    numbers: dict[str, str | None] = {}
    for pattern in reversed(patterns):  # the first that matches holds
        numbers.update(matched[pattern])
    return {path for path, number in numbers.items() if int(str(number)) in layers}


def _tensors(base: Mapping[str, Any]) -> dict[Path, tuple[Shape, int | None]]:
    """Every tensor of a base: path -> (shape in one layer, layers)."""
    out = {}
    for path, leaf in trees.walk(base):
        if path[-1].startswith("residual_"):  # what `factor_out` put there
            continue
        stacked = path[: len(LAYERS)] == LAYERS
        if isinstance(leaf, NF4Tensor):
            layers = leaf.codes.shape[0] if stacked else None
            out[path] = (tuple(leaf.shape), layers)
        else:
            shape = tuple(leaf.shape)
            out[path] = (shape[1:], shape[0]) if stacked else (shape, None)
    return out


def linear_modules(base: Mapping[str, Any]) -> dict[Path, tuple[int, int, int | None]]:
    """Lists the linear modules of a base tree: path -> (out, in, layers or None)."""
    return {
        path[:-1]: (shape[0], shape[1], layers)
        for path, (shape, layers) in _tensors(base).items()
        if path[-1] == "weight" and len(shape) == 2 and not is_embedding(path[:-1])
    }


def _ranks(
    modules: Mapping[Path, tuple[Shape, int | None]],
    lora: LoraConfig,
    taken: Mapping[Path, tuple[bool, ...]],
) -> dict[Path, list[tuple[int, float]]]:
    """Rank and scaling in each layer of the modules with an update in any layer.

    A weight that is trained whole has no update.
    """
    names = {path: dotted(path, layers) for path, (_, layers) in modules.items()}
    everything = [name for listed in names.values() for name in listed]
    selected = matching(everything, lora)
    values = lora.ranks_and_scalings(everything)
    out = {}
    for path, listed in names.items():
        whole = taken.get(path, (False,) * len(listed))
        ranks = [
            values[name] if name in selected and not saved else (0, 0.0)
            for name, saved in zip(listed, whole, strict=True)
        ]
        if any(rank for rank, _ in ranks):
            out[path] = ranks
    return out


def _whole(
    tensors: Mapping[Path, tuple[Shape, int | None]],
    modules: Mapping[Path, Any],
    lora: LoraConfig,
    tied: bool,
) -> list[FullTensor]:
    """The tensors of `modules_to_save`."""
    names = lora.modules_to_save or ()
    if not names:
        return []
    everything = dict(tensors)
    if tied:
        everything[*HEAD, "weight"] = tensors[*EMBEDDING, "weight"]
    found: set[str] = set()
    saved: set[str] = set()
    out = []
    for path, (shape, layers) in everything.items():
        chosen = []
        for name in dotted(path[:-1], layers):
            # A module is saved with all that is in it. PEFT compares ends of paths.
            parts = name.split(".")
            above = [".".join(parts[: i + 1]) for i in range(len(parts))]
            hits = {n: a for n in names for a in above if a.endswith(n)}
            found |= hits.keys()
            saved |= set(hits.values())
            chosen.append(bool(hits))
        if any(chosen):
            out.append(FullTensor(path, shape, layers, tuple(chosen)))
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"`modules_to_save` names {_quoted(missing)}, which this model does not "
            f"have.{did_you_mean(missing, {p[-2] for p in everything})} Modules here: "
            f"{', '.join(sorted({p[-2] for p in everything}))}."
        )
    for inner in sorted(saved):
        outer = inner.rpartition(".")[0]
        while outer and outer not in saved:
            outer = outer.rpartition(".")[0]
        if outer:
            raise UserError(
                f"`modules_to_save` selects `{inner}`, and `{outer}` that holds it; "
                "PEFT loads few of such adapters. Name one of the two."
            )
    heads = {(*EMBEDDING, "weight"), (*HEAD, "weight")}
    named = any(name.rpartition(".")[2] in _TABLES for name in names)
    if tied and lora.ensure_weight_tying and named:
        # One tensor for both, wherever it was named.
        out = [w for w in out if w.path not in heads]
        shape = tensors[*EMBEDDING, "weight"][0]
        one = (*EMBEDDING, "weight")
        out.append(FullTensor(one, shape, None, (True,)))
        out.append(FullTensor((*HEAD, "weight"), shape, None, (True,), tied_to=one))
    return out


def _with_biases(
    whole: list[FullTensor],
    tensors: Mapping[Path, tuple[Shape, int | None]],
    adapted: Mapping[Path, list[tuple[int, float]]],
    lora: LoraConfig,
) -> list[FullTensor]:
    """Adds what `bias` trains; some layers of a bias may be trained already."""
    out = {w.path: w for w in whole}
    for path, (shape, layers) in tensors.items():
        if path[-1] != "bias" or lora.bias == "none":
            continue
        if lora.bias == "all":
            chosen = [True] * (layers or 1)
        else:
            chosen = [r > 0 for r, _ in adapted.get(path[:-1], ())]
        if path in out and chosen:
            before = out[path].trained
            chosen = [one or two for one, two in zip(before, chosen, strict=True)]
        if any(chosen):
            out[path] = FullTensor(path, shape, layers, tuple(chosen))
    return list(out.values())


def _token_rows(
    modules: Mapping[Path, tuple[Shape, int | None]], lora: LoraConfig, tied: bool
) -> list[TokenRows]:
    wanted = lora.trainable_token_indices
    if wanted is None:
        return []
    if not isinstance(wanted, Mapping):
        wanted = {EMBEDDING[-1]: wanted}
    out: dict[Path, TokenRows] = {}
    for name, indices in wanted.items():
        hits = [p for p, (_, n) in modules.items() if n is None]
        hits = [p for p in hits if ".".join(p).endswith(name)]
        if not hits:
            near = did_you_mean(name, {path[-1] for path in modules})
            raise UserError(
                f"`trainable_token_indices` names {name!r:.80}, which is no embedding "
                f"and no head of this model.{near}"
            )
        for path in hits:
            rows, features = modules[path][0]
            outside = [i for i in indices if i >= rows]
            if outside:
                raise UserError(
                    f"`trainable_token_indices` has {outside[0]}, and {name!r} has "
                    f"{rows} rows (0 to {rows - 1})."
                )
            out[path] = TokenRows(path, indices, features)
    embedding, head = out.get(EMBEDDING), out.get(HEAD)
    if tied and embedding is not None:
        # A tied head has the rows of the embedding, unless it was given others.
        if head is None or head.indices == embedding.indices:
            out[HEAD] = TokenRows(
                HEAD, embedding.indices, embedding.features, tied_to=EMBEDDING
            )
        elif lora.ensure_weight_tying:
            raise UserError(
                "`trainable_token_indices` gives embed_tokens and lm_head different "
                "rows, and `ensure_weight_tying` wants them to be one; give one of the "
                "two."
            )
    return list(out.values())


def _check_rows(
    rows: list[TokenRows],
    adapted: Mapping[Path, AdaptedModule],
    taken: Mapping[Path, Any],
) -> None:
    """Refuses rows of what is trained in another way, as PEFT does."""
    for r in rows:
        name = f"`trainable_token_indices` trains rows of {r.path[-1]!r}"
        if r.path in taken:
            raise UserError(
                f"{name}, which `modules_to_save` trains whole; give one of the two."
            )
        if r.path not in adapted:
            continue
        if r.tied_to is None:
            raise UserError(
                f"{name}, which `target_modules` adapts; give one of the two."
            )
        if adapted[r.path].dora:
            raise UserError(
                f"{name}, which is tied to the embedding and adapted with `use_dora`; "
                "rows and norms of rows cannot be trained at once."
            )


def _unmatched(modules: Mapping[Path, Any], lora: LoraConfig) -> tuple[str, ...]:
    if isinstance(lora.target_modules, str):
        return ()
    paths = [p for path, (_, n) in modules.items() for p in dotted(path, n)]
    return tuple(
        name
        for name in lora.target_modules
        if not any(_ends_in(path, name) for path in paths)
    )


def _nothing(lora: LoraConfig, modules: Mapping[Path, Any]) -> UserError:
    targets = lora.target_modules
    wanted = (targets,) if isinstance(targets, str) else targets
    names = {path[-1] for path in modules}
    limits = {
        "exclude_modules": lora.exclude_modules,
        "layers_to_transform": lora.layers_to_transform,
        "layers_pattern": lora.layers_pattern,
        "modules_to_save": lora.modules_to_save,
    }
    given = [f"`{k}`={v!r:.200}" for k, v in limits.items() if v is not None]
    count = max((n for _, n in modules.values() if n is not None), default=0)
    absent = absent_layers(lora, count)
    return UserError(
        f"`target_modules`={targets!r:.200} matches no linear module and no embedding "
        f"of this model{' under ' + ', '.join(given) if given else ''}."
        + (f" Layers here: 0 to {count - 1}." if absent else "")
        + f"{did_you_mean(wanted, names)} Modules here: {', '.join(sorted(names))}."
    )


def absent_layers(lora: LoraConfig, count: int) -> tuple[int, ...]:
    """Numbers of `layers_to_transform` that a model of so many layers does not have."""
    numbers = lora.layers_to_transform or ()
    numbers = (numbers,) if isinstance(numbers, int) else numbers
    return tuple(n for n in numbers if n >= count)


def _quoted(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(f"{n!r:.80}" for n in names[:10]) + more
