"""Combines adapters into one that is their weighted sum.

    lora, adapters = combine_adapters([(lora1, a1, 0.7), (lora2, a2, -0.3)], base)

The sum of low-rank updates is a low-rank update: with all factors stacked,
A = [A1; A2] and B = [w1 s1 B1, w2 s2 B2], `B A` is `w1 s1 B1 A1 + w2 s2 B2 A2`. PEFT's
`add_weighted_adapter` calls this "cat". Its "linear" adds the As and the Bs separately,
which is another update, with cross terms, and is not offered.

Only updates that are added to a weight have a sum. DoRA rescales a weight, and tensors
and token rows that are trained in full replace one; both are refused.

The result needs a configuration (`describe`), the inverse of
`qlora_jax.lora.targets.select`. PEFT has no table of modules, only rules:
`target_modules` lists ends of module paths, `rank_pattern` and `alpha_pattern` are
regular expressions. `describe` finds the rules that select the given modules with the
given ranks and no others, naming each module by the shortest end of its path that means
no module of another rank: `q_proj` for all layers, `model.layers.3.self_attn.q_proj`
for one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.targets import AdaptedModule, Selection, select
from qlora_jax.tree import (
    EMBEDDING,
    HEAD,
    LAYERS,
    FrozenDict,
    Path,
    dotted,
    hf_key,
    is_stacked,
)


def combine_adapters(
    parts: Any,
    base: Mapping[str, Any],
    *,
    method: Literal["cat", "svd"] = "cat",
    r: int | None = None,
    errors: dict[str, float] | None = None,
    names: Sequence[str] = (),
) -> tuple[LoraConfig, dict[str, Any]]:
    """Returns one adapter that is a weighted sum: `sum_i w_i s_i B_i A_i`.

    - "cat": the sum itself, to rounding. Ranks add up.
    - "svd": its best approximation of rank `r` (Eckart and Young 1936), by module and
      layer, from QR decompositions of the stacked factors; no array has the size of a
      weight.

    The adapters may differ in rank, scaling, targets and layers; a module that one of
    them lacks counts as zero there. Every scaling of the result is 1.

    Args:
      parts: (configuration, trained tree, weight) of each adapter. Weights may be
        negative; an adapter of weight 0 is left out.
      base: parameter tree of the model, of arrays or shapes.
      method: see above.
      r: rank of the result for "svd"; default the largest rank among the adapters.
      errors: dict that receives the error of "svd", `|sum - result| / |sum|` in the
        Frobenius norm: by module over all its layers, and in all under "total". Zeros
        for "cat".
      names: of the adapters, for messages; default their indices.

    Returns:
      (lora, adapters): float32 tree, for `convert.save_adapter`.

    Raises:
      UserError: no adapters or weights, an adapter that does not fit the base, or one
        with parts that have no sum: DoRA; tensors or token rows that are trained
        in full, unless all adapters have equal ones; `lora_bias` together with an
        adapted embedding, which PEFT lacks; an adapter of a changed base; NaN.
    """
    _check_method(method, r)
    check_parts(parts, weighted=True)
    names = [f"`{name}`" for name in names] or numbered(parts)
    adapters = [
        read_adapter(name, lora, tree, base, weight=weight, index=index)
        for index, (name, (lora, tree, weight)) in enumerate(
            zip(names, parts, strict=True)
        )
        if _check_weight(name, weight)
    ]
    if not adapters:
        raise UserError(
            f"There is nothing to combine: {len(parts)} adapters, none with a weight "
            "other than 0."
        )
    if method == "svd" and r is None:
        r = max(a.rank for adapter in adapters for a in adapter.selection.adapted)
    return _combine(adapters, base, r, {} if errors is None else errors)


def _combine(
    adapters: Sequence[Adapter],
    base: Mapping[str, Any],
    r: int | None,
    errors: dict[str, float],
) -> tuple[LoraConfig, dict[str, Any]]:
    if len({adapter.lora.base_config_changes for adapter in adapters}) > 1:
        raise UserError(
            "The adapters were trained with different changes to the base's "
            "configuration (base_config.json), so no model fits their sum."
        )
    replaced = _replaced_by_all(adapters)
    modules = modules_of(adapters)
    shared = _head_is_shared(adapters)
    if shared:
        # Its update is the embedding's, transposed: summed once.
        del modules[HEAD]  # tied to the embedding in the result too
    biased = _has_biases(adapters, modules)
    sums = {path: _sum(uses, r) for path, uses in modules.items()}
    tree: dict[str, Any] = {}
    for path, total in sums.items():
        trees.node(tree, path).update(total.arrays)
        if biased:
            trees.node(tree, path)["lora_bias"] = _sum_biases(modules[path])
    errors.update(_relative_errors(sums))
    lora = _describe_sum(adapters, sums, base, shared=shared, biased=biased)
    for path, array in replaced.items():
        trees.put(tree, path, array)
    return lora, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _check_method(method: str, r: int | None) -> None:
    if method not in ("cat", "svd"):
        raise UserError(f"`method` must be 'cat' or 'svd', got {method!r}.")
    if r is not None and method == "cat":
        raise UserError(
            "`r` needs the method 'svd' (`method`, --method); 'cat' has the sum of the "
            "ranks, which makes it exact."
        )
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise UserError(f"`r` must be a positive integer, got {r!r}.")


def _check_weight(name: str, weight: Any) -> float:
    try:
        finite = math.isfinite(weight) and not isinstance(weight, bool)
    except TypeError:
        finite = False
    if not finite:
        raise UserError(f"{name}: its weight must be a finite number, got {weight!r}.")
    return weight


# --- Reading adapters, for sums and for stacks (`qlora_jax.lora.multi`) ---


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the base, with the arrays of a tied head written out."""

    name: str
    """For messages."""
    index: int
    lora: LoraConfig
    weight: float
    selection: Selection
    bound: Mapping[str, Any]

    @property
    def replaced(self) -> dict[Path, Any]:
        """The arrays that replace values of the base, by path."""
        paths = [t.path for t in self.selection.full_tensors if t.tied_to is None]
        paths += [
            (*rows.path, "trainable_tokens_delta")
            for rows in self.selection.rows
            if rows.tied_to is None
        ]
        return {path: trees.at(self.bound, path) for path in paths}


class Use(NamedTuple):
    """What one adapter does in one module."""

    adapter: Adapter
    module: AdaptedModule
    arrays: Mapping[str, Any]


def numbered(parts: Sequence[Any]) -> list[str]:
    """Returns names for messages: "adapter 0", "adapter 1"."""
    return [f"adapter {index}" for index in range(len(parts))]


def read_adapter(
    name: str,
    lora: LoraConfig,
    tree: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    index: int,
    weight: float = 1.0,
) -> Adapter:
    """Checks an adapter against the base, and that it adds to weights only."""
    if lora.changes_base:
        raise UserError(
            f"{name}: it belongs to a changed base "
            f"(`init_lora_weights`={lora.init_lora_weights!r}). Give what "
            "`qlora_jax.absorb(lora_config, adapters, base)` returns, which fits the "
            "original one."
        )
    if lora.use_dora:
        raise UserError(
            f"{name}: `use_dora` rescales the weight it is added to, so its "
            "update cannot be added to others. Merge it into the base first, or train "
            "without DoRA."
        )
    bound = bind(tree, base, lora)
    return Adapter(name, index, lora, weight, select(base, lora), bound)


def check_parts(parts: Any, *, weighted: bool) -> None:
    """Raises if `parts` is not a list of (configuration, tree), or with weights."""
    form = "(configuration, trained tree" + (", weight)" if weighted else ")")
    if isinstance(parts, (Mapping, LoraConfig)) or not isinstance(parts, Sequence):
        raise UserError(f"`parts` must be a list of {form}, got {_kind(parts)}.")
    for name, part in zip(numbered(parts), parts, strict=True):
        fits = isinstance(part, (tuple, list)) and len(part) == 2 + weighted
        if fits and isinstance(part[0], LoraConfig) and isinstance(part[1], Mapping):
            continue
        got = _kind(part)
        if isinstance(part, (tuple, list)):
            got = f"({', '.join(map(_kind, part))})"
        raise UserError(
            f"{name}: `parts` must be a list of {form}, in this order, got {got}."
        )


def _kind(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return "configuration"
    if isinstance(value, Mapping):
        return "tree"
    return type(value).__name__


def modules_of(adapters: Iterable[Adapter]) -> dict[Path, list[Use]]:
    """Returns every module that some adapter adapts, with what each does there."""
    out: dict[Path, list[Use]] = {}
    for adapter in adapters:
        for a in adapter.selection.adapted:
            use = Use(adapter, a, trees.at(adapter.bound, a.path))
            out.setdefault(a.path, []).append(use)
    return out


# --- What the sum shares with all adapters ---


def _replaced_by_all(adapters: Sequence[Adapter]) -> dict[Path, Any]:
    """Returns the tensors and rows that all adapters replace alike."""
    first = adapters[0]
    for other in adapters[1:]:
        alike = (
            other.selection.full_tensors == first.selection.full_tensors
            and other.selection.rows == first.selection.rows
            and other.lora.modules_to_save == first.lora.modules_to_save
        )
        for path in {**first.replaced, **other.replaced}:
            ours, theirs = (np.asarray(a.replaced.get(path)) for a in (first, other))
            if alike and np.array_equal(ours, theirs):
                continue
            both = path in first.replaced and path in other.replaced
            differ = f"differs between {first.name} and {other.name}"
            only = f"that only by one of {first.name} and {other.name}"
            raise UserError(
                f"`{'.'.join(path)}` is trained in full, not as a low-rank update, and "
                f"{differ if both else only}. What replaces a "
                "tensor has no sum; all adapters must have the same."
            )
    return first.replaced


def _head_is_shared(adapters: Iterable[Adapter]) -> bool:
    """Whether the head is tied to the embedding wherever one of them is adapted."""
    tables = [
        {a.path: a for a in adapter.selection.adapted if a.path in (EMBEDDING, HEAD)}
        for adapter in adapters
    ]
    used = [table for table in tables if table]
    return bool(used) and all(
        len(table) == 2
        and table[HEAD].tied_to == EMBEDDING
        # The sum has one pair of factors for both, so their scalings must agree.
        and table[HEAD].scalings == table[EMBEDDING].scalings
        for table in used
    )


def _has_biases(adapters: Iterable[Adapter], modules: Mapping[Path, list[Use]]) -> bool:
    biased = any(adapter.lora.lora_bias for adapter in adapters)
    if biased and any(u[0].module.kind == "embedding" for u in modules.values()):
        raise UserError(
            "One adapter has `lora_bias` and one adapts the embedding. PEFT has no "
            "configuration for both in one adapter, so they cannot be combined."
        )
    return biased


def _describe_sum(
    adapters: Sequence[Adapter],
    sums: Mapping[Path, _Sum],
    base: Mapping[str, Any],
    *,
    shared: bool,
    biased: bool,
) -> LoraConfig:
    """Returns the configuration of the sum."""
    ranks: dict[str, int] = {}
    for path, total in sums.items():
        layers = len(total.ranks) if is_stacked(path) else None
        ranks |= dict(zip(dotted(path, layers), total.ranks, strict=True))
    if shared:
        ranks[hf_key(HEAD)] = ranks[hf_key(EMBEDDING)]
    first = adapters[0]
    tied = any(t.tied_to is not None for t in first.selection.full_tensors)

    def common(field: str) -> Any:
        values = {getattr(adapter.lora, field) for adapter in adapters}
        return values.pop() if len(values) == 1 else None

    lora = describe(
        {name: rank for name, rank in ranks.items() if rank},
        base,
        lora_dropout=common("lora_dropout") or 0.0,
        lora_bias=biased,
        modules_to_save=first.lora.modules_to_save,
        trainable_token_indices=first.lora.trainable_token_indices,
        ensure_weight_tying=shared or tied,
        base_model_name_or_path=common("base_model_name_or_path"),
        revision=common("revision"),
        base_fingerprint=common("base_fingerprint"),
        base_config_changes=first.lora.base_config_changes,
    )
    # Adapters with the same trained biases have them under one of these settings.
    settings = (replace(lora, bias=bias) for bias in ("none", "lora_only", "all"))
    full_tensors = first.selection.full_tensors
    return next(x for x in settings if select(base, x).full_tensors == full_tensors)


# --- Sums ---


@dataclass(frozen=True)
class _Sum:
    """The factors of the sum in one module."""

    arrays: dict[str, NDArray[np.float32]]
    ranks: tuple[int, ...]
    """In each layer."""
    lost: float
    """Squared Frobenius norm of what was left out."""
    norm: float
    """Squared Frobenius norm of the exact sum."""


def factor_names(a: AdaptedModule) -> tuple[str, str]:
    """Returns the names of A and B in a module."""
    middle = "embedding_" if a.kind == "embedding" else ""
    return f"lora_{middle}A", f"lora_{middle}B"


def _sum(uses: Sequence[Use], r: int | None) -> _Sum:
    """Sums the updates of one module: all factors stacked, or the best `r`."""
    module = uses[0].module
    names = factor_names(module)
    on_host = [
        use._replace(arrays={n: np.asarray(use.arrays[n], np.float32) for n in names})
        for use in uses
    ]
    factors, lost, norm = [], 0.0, 0.0
    for layer in range(module.layers or 1):
        pairs = [_scaled_factors(use, layer) for use in on_host]
        # [R1 + R2 + ..., I] and [O, R1 + R2 + ...]: `B A` is the weighted sum.
        a = np.concatenate([a for a, _ in pairs])
        b = np.concatenate([b for _, b in pairs], axis=1)
        # A layer that none of them adapts has no factors.
        if r is not None and len(a):
            a, b, layer_lost, layer_norm = _truncate(a, b, r)
            lost, norm = lost + layer_lost, norm + layer_norm
        factors.append((a, b))
    ranks = tuple(len(a) for a, _ in factors)
    # Layers of lower rank are padded with zeros.
    all_a = np.zeros((len(ranks), max(ranks), factors[0][0].shape[1]), np.float32)
    all_b = np.zeros((len(ranks), factors[0][1].shape[0], max(ranks)), np.float32)
    for layer, (rank, (a, b)) in enumerate(zip(ranks, factors, strict=True)):
        all_a[layer, :rank], all_b[layer, :, :rank] = a, b
    if module.layers is None:
        all_a, all_b = all_a[0], all_b[0]
    return _Sum(dict(zip(names, (all_a, all_b), strict=True)), ranks, lost, norm)


def _scaled_factors(use: Use, layer: int) -> tuple[NDArray, NDArray]:
    """Returns A [R, I] and `weight * scaling * B` [O, R] in one layer."""
    module = use.module
    # Arrays have the largest rank of all layers; a layer's own part comes first.
    at = () if module.layers is None else (layer,)
    rank, factor = module.ranks[layer], use.adapter.weight * module.scalings[layer]
    a, b = (use.arrays[name][at] for name in factor_names(module))
    a, b = a[:rank], b[:, :rank]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(
            f"{use.adapter.name}: `{dotted(module.path, module.layers)[layer]}` has "
            "NaN or infinity, and so would the sum."
        )
    # Weight and scaling are folded into B: the result has scalings of 1 in any mixture.
    return a, b * np.float32(factor)


def _truncate(
    a: Float[np.ndarray, "N I"], b: Float[np.ndarray, "O N"], r: int
) -> tuple[NDArray, NDArray, float, float]:
    """Returns the best A and B of rank `r`, and squared norms: lost, exact.

    With QR decompositions B = Qb Rb and A^T = Qa Ra, `B A = Qb (Rb Ra^T) Qa^T`: the
    N x N matrix in the middle has the singular values of the product.
    """
    # In float32 the small singular values, whose squares are the error, would be noise.
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    # Each factor gets the root of a singular value, so that both have gradients of one
    # size if the result is trained further.
    root = np.sqrt(s[:r])
    out_a, out_b = np.zeros((r, a.shape[1])), np.zeros((b.shape[0], r))
    # A product may have fewer singular values than r; the rest of the rank is zero.
    out_a[: len(root)] = root[:, None] * (vt[:r] @ q_a.T)
    out_b[:, : len(root)] = q_b @ u[:, :r] * root
    return (
        out_a.astype(np.float32),
        out_b.astype(np.float32),
        # Eckart and Young: the squared error is what was cut off, of |B A|^2 in all.
        float(np.sum(s[r:] ** 2)),
        float(np.sum(s**2)),
    )


def _sum_biases(uses: Sequence[Use]) -> NDArray[np.float32]:
    module = uses[0].module
    leading = () if module.layers is None else (module.layers,)
    out = np.zeros((*leading, module.shape[0]), np.float32)
    for adapter, a, arrays in uses:
        if "lora_bias" in arrays:
            scaling = np.asarray(a.scalings if a.layers else a.scalings[0], np.float32)
            # The scaling covers the bias, s (B A x + b): its sum has both factors.
            factor = np.float32(adapter.weight) * np.expand_dims(scaling, -1)
            out += factor * np.asarray(arrays["lora_bias"])
    return out


def _relative_errors(sums: Mapping[Path, _Sum]) -> dict[str, float]:
    def ratio(lost: float, norm: float) -> float:
        return math.sqrt(lost / norm) if norm > 0 else 0.0

    # Squared Frobenius norms add over layers and modules; their roots do not.
    out = {".".join(path): ratio(s.lost, s.norm) for path, s in sums.items()}
    lost, norm = (sum(getattr(s, f) for s in sums.values()) for f in ("lost", "norm"))
    return {**out, "total": ratio(lost, norm)}


# --- From ranks to a configuration ---


def describe(
    ranks: Mapping[str, int], base: Mapping[str, Any], **others: Any
) -> LoraConfig:
    """Returns the configuration of adapters of these ranks, with every scaling 1.

    Args:
      ranks: Hugging Face module path -> rank, for every adapted module.
      base: parameter tree of the model, of arrays or shapes.
      others: further fields of the configuration that do not change the selection.

    Raises:
      UserError: see `shortest_ends`.
    """
    # The rank of most modules is `r`, so the fewest need a pattern.
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns: dict[str, int] = {}
    for rank in sorted(set(ranks.values()) - {usual}):
        names = [name for name, value in ranks.items() if value == rank]
        # Patterns of different ranks match different modules: their order, which PEFT
        # loses in writing, does not matter.
        patterns |= {re.escape(end): rank for end in shortest_ends(names, among=ranks)}
    return LoraConfig(
        r=usual,
        # alpha = r, by default and in every pattern: the scalings are already in B.
        lora_alpha=usual,
        target_modules=tuple(shortest_ends(ranks, among=module_names(base))),
        rank_pattern=FrozenDict(patterns),
        alpha_pattern=FrozenDict(patterns),
        **others,
    )


def shortest_ends(names: Iterable[str], *, among: Iterable[str]) -> list[str]:
    """Returns the shortest ends of `names` that are ends of no other name of `among`.

    Raises:
      UserError: a whole name is the end of another one.
    """
    targets = set(names)
    names_by_end: dict[str, set[str]] = {}
    for name in {*among, *targets}:
        for end in _ends(name):
            names_by_end.setdefault(end, set()).add(name)
    out = set()
    for name in targets:
        # Usable if every module with this end is meant.
        unique = (end for end in _ends(name) if names_by_end[end] <= targets)
        end = next(unique, None)
        if end is None:
            other = min(names_by_end[name] - targets)
            raise UserError(
                f"`{name}` cannot be targeted without `{other}`: PEFT matches ends of "
                "module paths, and both have this one. Rename your module."
            )
        out.add(end)
    return sorted(out)


def _ends(name: str) -> list[str]:
    """Returns the ends of a dotted name up to the layer's number, then the name."""
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
        in_layer = is_stacked(path) and path != LAYERS
        yield from dotted(path, layers if in_layer else None)
