"""Several adapters: their weighted sum as one, or side by side in one batch.

Adapters are values, a configuration and a tree. Two things are made of several:

    lora, adapters = combine_adapters([(lora1, a1, 0.7), (lora2, a2, -0.3)], base)
    stack = stack_adapters([(lora1, a1), (lora2, a2)], base)
    logits = model.apply({"params": base, "lora": with_rows(stack, [0, 1, -1])}, tokens)

The sum of low-rank updates is a low-rank update: with all factors side by side,
A = [A1; A2] and B = [w1 s1 B1, w2 s2 B2], `B A` is `w1 s1 B1 A1 + w2 s2 B2 A2`. That is
what PEFT's `add_weighted_adapter` calls "cat". Its "linear" adds the As and the Bs one
by one, which is another update, with cross terms, and is not offered here.

Only updates that are added to a weight have a sum. DoRA rescales a weight, tensors and
token rows that are trained whole replace one; what cannot be expressed is refused.

From ranks to a configuration: the inverse of `qlora_jax.lora.targets.select`.

PEFT has no table of modules, only rules: `target_modules` lists ends of module paths,
`rank_pattern` and `alpha_pattern` match them with regular expressions. Here the rules
are found that select given modules with given ranks and nothing else. Each module is
called by the shortest end of its path that means it alone or its equals: `q_proj` where
all are meant, `model.layers.3.self_attn.q_proj` where one is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.targets import AdaptedModule, Selection, select
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, FrozenDict, Path, dotted


def combine_adapters(
    parts: Any,
    base: Mapping[str, Any],
    *,
    method: Literal["cat", "svd"] = "cat",
    r: int | None = None,
    errors: dict[str, float] | None = None,
    names: Sequence[str] = (),
) -> tuple[LoraConfig, dict[str, Any]]:
    """Makes one adapter of the weighted sum of several: `sum_i w_i s_i B_i A_i`.

    - "cat": the sum itself, to rounding. Ranks add up.
    - "svd": the best approximation of it of rank `r` (Eckart and Young 1936), module by
      module and layer by layer, from QR decompositions of the stacked factors; nothing
      of the size of a weight is formed.

    The adapters may differ in rank, scaling, targets and layers; a module that one of
    them lacks counts as zero there. Scalings and weights are folded into B, so every
    scaling of the result is 1 (`lora_alpha` = `r`); where ranks differ, `rank_pattern`
    and `alpha_pattern` say so.

    Args:
      parts: (configuration, trained tree, weight) of each adapter. Weights may be
        negative; an adapter of weight 0 is left out.
      base: parameter tree of the model, of arrays or shapes; only its structure
        matters.
      method: see above.
      r: rank of the result for "svd"; default the largest rank among the adapters.
      errors: where to note what "svd" lost, `|sum - result| / |sum|` in the Frobenius
        norm: by module over all its layers, and of everything under "total". Zeros for
        "cat".
      names: what messages call the adapters; default their numbers.

    Returns:
      (lora, adapters): float32 tree. `convert.save_adapter` writes it as a directory
      that PEFT computes the same with.

    Raises:
      UserError: no adapters or weights, an adapter that does not fit the base, or one
        with parts that have no sum: DoRA; tensors or token rows that are trained
        whole, unless all adapters have equal ones; `lora_bias` together with an adapted
        embedding, which PEFT does not know; an adapter of a changed base; NaN.
    """
    if method not in ("cat", "svd"):
        raise UserError(f"`method` must be 'cat' or 'svd', got {method!r}.")
    if r is not None and method == "cat":
        raise UserError(
            "`r` goes with the method 'svd' (`method`, --method); 'cat' has the sum of "
            "the ranks, which makes it exact."
        )
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise UserError(f"`r` must be a positive integer, got {r!r}.")
    _check_parts(parts, weighted=True)
    called = [f"`{name}`" for name in names] or _numbered(parts)
    read = [
        _read(name, number, lora, tree, weight, base)
        for number, (name, (lora, tree, weight)) in enumerate(
            zip(called, parts, strict=True)
        )
        if _weight(name, weight)
    ]
    if not read:
        raise UserError(
            f"There is nothing to combine: {len(parts)} adapters, none with a weight "
            "other than 0."
        )
    replaced = _replaced(read)
    if method == "svd" and r is None:
        r = max(a.rank for one in read for a in one.selection.adapted)

    modules = _union(read)
    shared = _shared(read)
    if shared:
        modules.pop(HEAD, None)  # it follows the embedding in the result too
    biased = any(one.lora.lora_bias for one in read)
    if biased and any(found[0][1].kind == "embedding" for found in modules.values()):
        raise UserError(
            "One adapter has `lora_bias` and one adapts the embedding. PEFT has no "
            "configuration for both in one adapter, so they cannot be combined."
        )
    ranks: dict[str, int] = {}
    tree: dict[str, Any] = {}
    squares: dict[str, tuple[float, float]] = {}
    for path, found in modules.items():
        one = _sum(found, r)
        node = trees.node(tree, path)
        node.update(one.arrays)
        if biased:
            node["lora_bias"] = _sum_biases(found)
        squares[".".join(path)] = (one.lost, one.whole)
        for name, rank in zip(dotted(path, found[0][1].layers), one.ranks, strict=True):
            if rank:
                ranks[name] = rank
                if shared and path == EMBEDDING:
                    ranks[".".join(HEAD)] = rank
    if errors is not None:
        errors.update({name: _ratio(*pair) for name, pair in squares.items()})
        lost, whole = (sum(column) for column in zip(*squares.values(), strict=True))
        errors["total"] = _ratio(lost, whole)

    first = read[0]
    if len({one.lora.base_config_changes for one in read}) > 1:
        raise UserError(
            "The adapters were trained with different changes to the base's "
            "configuration (base_config.json), so that no model is right for their sum."
        )
    tied = any(w.tied_to is not None for w in first.selection.full_tensors)
    lora = describe(
        ranks,
        base,
        lora_dropout=_common(read, "lora_dropout") or 0.0,
        lora_bias=biased,
        modules_to_save=first.lora.modules_to_save,
        trainable_token_indices=first.lora.trainable_token_indices,
        ensure_weight_tying=shared or tied,
        base_model_name_or_path=_common(read, "base_model_name_or_path"),
        revision=_common(read, "revision"),
        base_fingerprint=_common(read, "base_fingerprint"),
        base_config_changes=first.lora.base_config_changes,
    )
    settings = (replace(lora, bias=bias) for bias in ("none", "lora_only", "all"))
    # Adapters that agree on their biases do so under one setting of the three.
    lora = next(
        x
        for x in settings
        if select(base, x).full_tensors == first.selection.full_tensors
    )
    for where, array in replaced.items():
        trees.put(tree, where, array)
    return lora, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


# --- What is read of one adapter ---


@dataclass(frozen=True)
class _Read:
    """An adapter, checked, with the tied parts written out."""

    name: str
    """What messages call it."""
    number: int
    lora: LoraConfig
    weight: float
    selection: Selection
    bound: Mapping[str, Any]

    @property
    def replaced(self) -> dict[Path, Any]:
        """What it puts in the place of base values, instead of adding to them."""
        where = [w.path for w in self.selection.full_tensors if w.tied_to is None]
        where += [
            (*rows.path, "trainable_tokens_delta")
            for rows in self.selection.rows
            if rows.tied_to is None
        ]
        return {path: trees.at(self.bound, path) for path in where}


# Of one module: the adapter, what it does there, its arrays.
_Found = list[tuple[_Read, AdaptedModule, Mapping[str, Any]]]


def _numbered(parts: Sequence[Any]) -> list[str]:
    return [f"adapter {number}" for number in range(len(parts))]


def _read(
    name: str,
    number: int,
    lora: LoraConfig,
    tree: Mapping[str, Any],
    weight: float,
    base: Mapping[str, Any],
) -> _Read:
    if lora.changes_base:
        raise UserError(
            f"{name}: `init_lora_weights`={lora.init_lora_weights!r}, so it "
            "belongs to a changed base. Give what `qlora_jax.absorb(lora_config, "
            "adapters, base)` returns, which is stated on the original one."
        )
    if lora.use_dora:
        raise UserError(
            f"{name}: `use_dora` rescales the weight it is added to, so its "
            "update cannot be added to others. Merge it into the base first, or train "
            "without DoRA."
        )
    bound = bind(tree, base, lora)
    return _Read(name, number, lora, weight, select(base, lora), bound)


def _check_parts(parts: Any, *, weighted: bool) -> None:
    """Refuses what does not have the form of `parts`, as soon as it is told."""
    form = "(configuration, trained tree" + (", weight)" if weighted else ")")
    if isinstance(parts, (Mapping, LoraConfig)) or not isinstance(parts, Sequence):
        raise UserError(f"`parts` must be a list of {form}, got {_kind(parts)}.")
    for number, part in enumerate(parts):
        fits = isinstance(part, (tuple, list)) and len(part) == 2 + weighted
        if fits and isinstance(part[0], LoraConfig) and isinstance(part[1], Mapping):
            continue
        got = _kind(part)
        if isinstance(part, (tuple, list)):
            got = f"({', '.join(map(_kind, part))})"
        raise UserError(
            f"adapter {number}: `parts` must be a list of {form}, in this order, got "
            f"{got}."
        )


def _kind(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return "configuration"
    if isinstance(value, Mapping):
        return "tree"
    return type(value).__name__


def _weight(name: str, weight: Any) -> float:
    try:
        finite = math.isfinite(weight) and not isinstance(weight, bool)
    except TypeError:
        finite = False
    if not finite:
        raise UserError(f"{name}: its weight must be a finite number, got {weight!r}.")
    return weight


def _replaced(read: Sequence[_Read]) -> dict[Path, Any]:
    """Tensors and rows that all adapters replace alike."""
    first = read[0]
    for one in read[1:]:
        alike = (
            one.selection.full_tensors == first.selection.full_tensors
            and one.selection.rows == first.selection.rows
            and one.lora.modules_to_save == first.lora.modules_to_save
        )
        for where in {**first.replaced, **one.replaced}:
            mine, its = first.replaced.get(where), one.replaced.get(where)
            if alike and np.array_equal(np.asarray(mine), np.asarray(its)):
                continue
            raise UserError(
                f"`{'.'.join(where)}` is trained whole, not as an update of low rank, "
                f"and {first.name} and {one.name} do not agree on it. "
                "What replaces a tensor has no sum; it may only be the same in all."
            )
    return first.replaced


def _shared(read: Sequence[_Read]) -> bool:
    """Whether the head follows the embedding wherever one of them is adapted."""
    tables = [
        {a.path: a for a in one.selection.adapted if a.path in (EMBEDDING, HEAD)}
        for one in read
    ]
    used = [table for table in tables if table]
    return bool(used) and all(
        len(table) == 2
        and table[HEAD].tied_to == EMBEDDING
        and table[HEAD].scalings == table[EMBEDDING].scalings
        for table in used
    )


def _union(read: Sequence[_Read]) -> dict[Path, _Found]:
    """Every module that some adapter adapts."""
    out: dict[Path, _Found] = {}
    for one in read:
        for a in one.selection.adapted:
            out.setdefault(a.path, []).append((one, a, trees.at(one.bound, a.path)))
    return out


# --- Sums ---


@dataclass(frozen=True)
class _Sum:
    arrays: dict[str, NDArray[np.float32]]
    ranks: tuple[int, ...]
    lost: float
    """Square of the norm of what was left out."""
    whole: float
    """Square of the norm of the sum."""


def _names(a: AdaptedModule) -> tuple[str, str]:
    middle = "embedding_" if a.kind == "embedding" else ""
    return f"lora_{middle}A", f"lora_{middle}B"


def _rank(a: AdaptedModule, node: Mapping[str, Any]) -> int:
    return node[_names(a)[0]].shape[-2]


def _sum(found: _Found, r: int | None) -> _Sum:
    """The factors of the sum in one module: all of them, or the best `r`."""
    first = found[0][1]
    names = _names(first)
    host = [
        [np.asarray(node[name], np.float32) for name in names] for *_, node in found
    ]
    factors, lost, whole = [], 0.0, 0.0
    for layer in range(first.layers or 1):
        where = () if first.layers is None else (layer,)
        some_a, some_b = [], []
        for (one, a, _), (all_a, all_b) in zip(found, host, strict=True):
            rank, factor = a.ranks[layer], one.weight * a.scalings[layer]
            one_a, one_b = all_a[where][:rank], all_b[where][:, :rank]
            if not (np.isfinite(one_a).all() and np.isfinite(one_b).all()):
                raise UserError(
                    f"{one.name}: `{dotted(a.path, a.layers)[layer]}` has "
                    "NaN or infinity; a sum with it would be no number either."
                )
            some_a.append(one_a)
            some_b.append(one_b * np.float32(factor))
        both = np.concatenate(some_a), np.concatenate(some_b, axis=1)
        if r is not None and len(both[0]):
            *both, left_out, everything = _truncate(*both, r)
            lost, whole = lost + left_out, whole + everything
        factors.append(both)
    ranks = tuple(len(a) for a, _ in factors)
    pads = [(0, max(ranks) - rank) for rank in ranks]
    sums = (
        np.stack(
            [np.pad(a, (p, (0, 0))) for (a, _), p in zip(factors, pads, strict=True)]
        ),
        np.stack(
            [np.pad(b, ((0, 0), p)) for (_, b), p in zip(factors, pads, strict=True)]
        ),
    )
    if first.layers is None:
        sums = sums[0][0], sums[1][0]
    return _Sum(dict(zip(names, sums, strict=True)), ranks, lost, whole)


def _truncate(a: NDArray, b: NDArray, r: int) -> tuple[NDArray, NDArray, float, float]:
    """The `r` leading singular triplets of `b @ a`, and squared norms: lost, whole.

    With B = Qb Rb and A^T = Qa Ra, `B A = Qb (Rb Ra^T) Qa^T`: the small matrix in the
    middle has the singular values.
    """
    left, small_b = np.linalg.qr(b.astype(np.float64))
    right, small_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(small_b @ small_a.T)
    root = np.sqrt(s[:r])
    out_a, out_b = np.zeros((r, a.shape[1])), np.zeros((b.shape[0], r))
    out_a[: len(root)] = root[:, None] * (vt[:r] @ right.T)
    out_b[:, : len(root)] = left @ u[:, :r] * root
    return (
        out_a.astype(np.float32),
        out_b.astype(np.float32),
        float(np.sum(s[r:] ** 2)),
        float(np.sum(s**2)),
    )


def _sum_biases(found: _Found) -> NDArray[np.float32]:
    first = found[0][1]
    leading = () if first.layers is None else (first.layers,)
    out = np.zeros((*leading, first.shape[0]), np.float32)
    for one, a, node in found:
        if "lora_bias" in node:
            scaling = np.asarray(a.scalings if a.layers else a.scalings[0], np.float32)
            factor = np.float32(one.weight) * np.expand_dims(scaling, -1)
            out += factor * np.asarray(node["lora_bias"])
    return out


def _common(read: Sequence[_Read], name: str) -> Any:
    """What all configurations say, None where they differ."""
    values = {getattr(one.lora, name) for one in read}
    return values.pop() if len(values) == 1 else None


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole > 0 else 0.0


# --- Trees ---


def _adapted_nodes(
    node: dict[str, Any], path: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    if "scaling" in node:
        yield path, node
    for name, child in node.items():
        if isinstance(child, dict):
            yield from _adapted_nodes(child, (*path, name))


def describe(
    ranks: Mapping[str, int], base: Mapping[str, Any], **others: Any
) -> LoraConfig:
    """Returns the configuration of adapters of these ranks, all scalings 1.

    Args:
      ranks: Hugging Face module path -> rank, for every adapted module.
      base: parameter tree of the model, of arrays or shapes.
      others: further fields of the configuration, which leave the selection as it is.

    Raises:
      UserError: as `shortest_ends`.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns: dict[str, int] = {}
    for rank in sorted(set(ranks.values()) - {usual}):
        names = [name for name, own in ranks.items() if own == rank]
        # Expressions of different ranks match different modules: their order, which
        # PEFT loses in writing, does not matter.
        patterns |= {re.escape(end): rank for end in shortest_ends(names, among=ranks)}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=tuple(shortest_ends(ranks, among=module_names(base))),
        rank_pattern=FrozenDict(patterns),
        alpha_pattern=FrozenDict(patterns),
        **others,
    )


def shortest_ends(names: Iterable[str], *, among: Iterable[str]) -> list[str]:
    """Finds the shortest ends of `names` that are ends of no other name of `among`.

    Raises:
      UserError: a name that is an end of another as a whole.
    """
    wanted = set(names)
    meant: dict[str, set[str]] = {}
    for name in {*among, *wanted}:
        for end in _ends(name):
            meant.setdefault(end, set()).add(name)
    found = {}
    for name in wanted:
        found[name] = next((e for e in _ends(name) if meant[e] <= wanted), None)
        if found[name] is None:
            other = min(meant[name] - wanted)
            raise UserError(
                f"`{name}` cannot be named alone: `{other}` ends alike, and PEFT's "
                "lists of modules mean both. Give one of your modules another name."
            )
    return sorted(set(found.values()))


def _ends(name: str) -> list[str]:
    """Ends of a dotted name up to the layer's number, then the whole name."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    start = numbers[-1] + 1 if numbers else 0
    return [*(".".join(parts[i:]) for i in range(len(parts) - 1, start - 1, -1)), name]


def module_names(base: Mapping[str, Any]) -> Iterator[str]:
    """Lists every module of a model, a tied head too, as Hugging Face spells them."""

    def walk(node: Mapping[str, Any], path: Path) -> Iterator[Path]:
        for name, child in node.items():
            if isinstance(child, Mapping):
                yield (*path, name)
                yield from walk(child, (*path, name))

    layers = jax.tree.leaves(base["model"]["layers"])[0].shape[0]
    for path in {HEAD, *walk(base, ())}:
        stacked = path[: len(LAYERS)] == LAYERS and path != LAYERS
        yield from dotted(path, layers if stacked else None)
