"""How adapters start.

Most starts leave the adapted model equal to the base: B = 0 (or B A = 0, orthogonal).
PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start A and B from the weight
itself, and take that part out of the weight, W' = W - scaling * B0 A0. Here the base is
not rewritten: `factor_out` puts A0 and B0 beside the weight, where the model subtracts
them. So the start equals the base also where W is packed in 4 bits, nothing is rounded,
and `absorb` can state the trained adapter on the original base, as PEFT does on saving:
A = [A; A0], B = [B, -B0], twice the rank. LoftQ (arXiv:2310.08659, one iteration)
starts from what quantization lost, and leaves the quantized base as it is.

An adapter that is trained further, and the settings given beside it.

An adapter says itself what it is: its rank, its targets, its scaling. Whoever trains it
further, or asks what that takes, may repeat these settings. Some of them can be changed
at no loss, the factor of the update and the dropout; for all others, another value
would mean another adapter, and is refused by name rather than passed over.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from numpy.typing import NDArray

from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.errors import Problems, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import row_norms
from qlora_jax.lora.targets import AdaptedModule, Selection, select
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import EMBEDDING, HEAD, Path, dotted

# Steps of PiSSA's randomized decomposition draw from their own stream.
_OVERSAMPLE = 8


def init_adapters(
    key: Array,
    base: Mapping[str, Any],
    lora: LoraConfig,
    *,
    original: Callable[[str], NDArray] | None = None,
) -> dict[str, Any]:
    """Makes fresh adapters, as `lora.init_lora_weights` says.

    - "default": A Kaiming-uniform with a=sqrt(5), that is U(-1/sqrt(I), 1/sqrt(I)), and
      B = 0, so the adapted model equals the base exactly. "gaussian": A ~ N(0, 1/r^2).
      Embeddings start with A = 0 and B ~ N(0, 1). All as in PEFT.
    - "orthogonal": A and B in orthogonal subspaces, B A = 0.
    - "pissa", "pissa_niter_N", "olora": from the weight; then continue with
      `factor_out(base, adapters, lora)` as the base.
    - "loftq": B A is the best approximation of what quantization lost.

    Every module draws from its own key, derived from its path, so that adding a target
    does not change the others. Tensors trained whole start as copies of the base's,
    DoRA's magnitudes as the norms of the rows of W. What stands for a layer that is not
    trained is zero, and stays zero.

    Args:
      key: PRNG key.
      base: parameter tree. Shapes are enough where the start does not depend on values.
      lora: what to adapt, rank and initialization.
      original: for "loftq": Hugging Face key -> the unquantized tensor [O, I].

    Returns:
      float32 tree; see `qlora_jax.lora.functional`.

    Raises:
      UserError: as `select`; a tensor to be trained whole that is packed in 4 bits; an
        initialization that does not fit the base.
    """
    selection = select(base, lora)
    check_start(base, lora, selection)
    adapters: dict[str, Any] = {}
    for a in selection.adapted:
        own: dict[str, Array] = {}
        module_key = key
        for byte in ".".join(a.path).encode():
            module_key = jax.random.fold_in(module_key, byte)
        weight = _weight(base, a.path)
        if a.tied_to is None:
            own = _start(module_key, a, weight, lora, original)
        if "lora_bias" in a.parts:
            own["lora_bias"] = _zeros(a, a.parts["lora_bias"])
        if a.dora:
            used = [rank > 0 for rank in a.ranks]
            own["lora_magnitude_vector"] = _only(_magnitude(a, weight), used)
        if own:  # a head that follows the embedding may have nothing
            trees.node(adapters, a.path).update(own)
    for w in selection.full_tensors:
        if w.tied_to is not None:
            continue
        leaf = _leaf(base, w.path)
        value = _only(jnp.array(leaf, jnp.float32), w.trained)
        trees.put(adapters, w.path, value)
    for r in selection.rows:
        if r.tied_to is None:
            table = _weight(base, r.path)
            rows = jnp.asarray(table)[np.asarray(r.indices)]
            node = trees.node(adapters, r.path)
            node["trainable_tokens_delta"] = rows.astype(jnp.float32)
    return adapters


def check_start(
    base: Mapping[str, Any], lora: LoraConfig, selection: Selection
) -> None:
    """Refuses adapters that cannot start as `lora` says; shapes are enough.

    Args:
      base: parameter tree of arrays or shapes.
      lora: what to adapt, rank and initialization.
      selection: what `lora` selects in it.

    Raises:
      UserError: tensors to be trained whole that are packed in 4 bits, or an
        initialization that does not fit the base; all of them.
    """
    problems = Problems("the adapter")
    for w in selection.full_tensors:
        if w.tied_to is None and isinstance(_leaf(base, w.path), NF4Tensor):
            problems.add(
                f"`modules_to_save` wants to train `{'.'.join(w.path)}` whole, and it "
                "is packed in 4 bits. Load the base with quantization='none', or adapt "
                "that module with LoRA."
            )
    kind = str(lora.init_lora_weights)
    if kind not in ("default", "gaussian", "orthogonal"):
        for a in filter(_from_weight, selection.adapted):
            rank, largest = max(a.ranks), min(a.shape)
            name = dotted(a.path, a.layers)[a.ranks.index(rank)]
            if rank > largest:
                problems.add(
                    f"lora: {kind!r} needs a rank of at most {largest} in `{name}`, "
                    f"got {rank}."
                )
            packed = isinstance(_weight(base, a.path), NF4Tensor)
            if kind == "loftq" and not packed:
                problems.add(
                    "lora: 'loftq' makes up for what quantization lost, and "
                    f"`{name}.weight` is not quantized. Load the base with "
                    "quantization='nf4', or choose another `init_lora_weights`."
                )
    problems.raise_if_any()


def factor_out(
    base: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Takes the start of the adapters out of the base: W' = W - scaling * B0 A0.

    The weights are not touched: `residual_A` = A0 and `residual_B` = scaling * B0 stand
    beside each adapted one, and the model subtracts their product.

    Args:
      base: parameter tree.
      adapters: as `init_adapters` made them.
      lora: with `changes_base`.

    Returns:
      A base that shares its arrays with the given one.
    """
    out = trees.copy(base)
    for a in select(base, lora).adapted:
        if _from_weight(a):
            node, own = trees.node(out, a.path), trees.node(adapters, a.path)
            scaling = np.asarray(a.scalings, np.float32)
            scaling = scaling[:, None, None] if a.layers else scaling[0]
            node["residual_A"] = jnp.array(own["lora_A"])
            node["residual_B"] = jnp.array(own["lora_B"]) * scaling
    return out


def absorb(
    lora: LoraConfig, adapters: Mapping[str, Any], base: Mapping[str, Any]
) -> tuple[LoraConfig, dict[str, Any]]:
    """States adapters of a factored base as adapters of the original base.

    Args:
      lora: the configuration they were trained with.
      adapters: trained tree.
      base: from `factor_out`.

    Returns:
      A configuration of twice the rank and the same scalings, and its adapters: with
      A = [A; A0] and B = [B, -B0], `scaling * B A` is the sum of both parts.

    Raises:
      UserError: a base that is not from `factor_out`.
    """
    if not lora.changes_base:
        return lora, trees.copy(adapters)
    out = trees.copy(adapters)
    for a in select(base, lora).adapted:
        if a.tied_to is not None:
            continue
        node, frozen = trees.node(out, a.path), trees.node(base, a.path)
        if not _from_weight(a):
            for name in ("lora_embedding_A", "lora_embedding_B"):
                zeros = np.zeros_like(np.asarray(node[name]))
                axis = 0 if name.endswith("A") else 1
                node[name] = np.concatenate([np.asarray(node[name]), zeros], axis)
            continue
        if "residual_A" not in frozen:
            raise UserError(
                f"`{'.'.join(a.path)}` of this base has nothing factored out. Give "
                "the base that the adapters were trained on, `factor_out(base, "
                "adapters, lora_config)` with the adapters as they started."
            )
        scaling = np.asarray(a.scalings, np.float32)
        scaling = np.where(scaling > 0, scaling, 1.0)
        scaling = scaling[:, None, None] if a.layers else scaling[0]
        both_a = [np.asarray(node["lora_A"]), np.asarray(frozen["residual_A"])]
        b0 = np.asarray(frozen["residual_B"]) / scaling
        both_b = [np.asarray(node["lora_B"]), -b0]
        merged_a = np.concatenate(both_a, axis=-2)
        merged_b = np.concatenate(both_b, axis=-1)
        node["lora_A"], node["lora_B"] = _compact(a, merged_a, merged_b)
    return lora.absorbed, out


def _from_weight(a: AdaptedModule) -> bool:
    """Whether the factors start from the weight; those of an embedding do not."""
    return a.kind == "linear" and a.tied_to is None


def _compact(
    a: AdaptedModule, both_a: NDArray, both_b: NDArray
) -> tuple[NDArray, NDArray]:
    """Moves the padding of layers of lower rank to the end."""
    if a.layers is None or len(set(a.ranks)) == 1:
        return both_a, both_b
    out_a, out_b = np.zeros_like(both_a), np.zeros_like(both_b)
    for layer, rank in enumerate(a.ranks):
        used = [*range(rank), *range(a.rank, a.rank + rank)]
        out_a[layer, : 2 * rank] = both_a[layer, used]
        out_b[layer, :, : 2 * rank] = both_b[layer][:, used]
    return out_a, out_b


def _start(
    key: Array,
    a: AdaptedModule,
    weight: Any,
    lora: LoraConfig,
    original: Callable[[str], NDArray] | None,
) -> dict[str, Array]:
    """The low-rank factors of one module."""
    rows, columns = a.shape
    if a.kind == "embedding":
        b = jax.random.normal(key, a.parts["lora_embedding_B"], jnp.float32)
        return {
            "lora_embedding_A": jnp.zeros(a.parts["lora_embedding_A"], jnp.float32),
            "lora_embedding_B": b,
        }
    kind = str(lora.init_lora_weights)
    if kind in ("default", "gaussian"):
        leading = () if a.layers is None else (a.layers,)
        shape = (*leading, *a.parts["lora_A"])
        ranks = jnp.asarray(np.asarray(a.ranks, np.int32).reshape((*leading, 1, 1)))
        if kind == "gaussian":
            values = jax.random.normal(key, shape, jnp.float32)
            values = values / jnp.maximum(ranks, 1).astype(jnp.float32)
        else:
            bound = 1.0 / math.sqrt(columns)
            values = jax.random.uniform(
                key, shape, jnp.float32, minval=-bound, maxval=bound
            )
        used = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2) < ranks
        return {
            "lora_A": jnp.where(used, values, 0.0),
            "lora_B": _zeros(a, a.parts["lora_B"]),
        }
    # One layer at a time, on the host: a decomposition holds several copies of W.
    layers = a.layers or 1
    all_a = np.zeros((layers, a.rank, columns), np.float32)
    all_b = np.zeros((layers, rows, a.rank), np.float32)
    names = dotted(a.path, a.layers)
    for layer, (rank, scaling) in enumerate(zip(a.ranks, a.scalings, strict=True)):
        if rank == 0:
            continue
        layer_key = jax.random.fold_in(key, layer)
        if kind == "orthogonal":
            one = _orthogonal(layer_key, rank, a.shape)
        else:
            dense = _dense(weight, None if a.layers is None else layer)
            if kind == "loftq":
                dense = _lost(dense, f"{names[layer]}.weight", original)
            one = _decompose(layer_key, kind, dense, rank, scaling)
        all_a[layer, :rank], all_b[layer, :, :rank] = one
    out = {"lora_A": jnp.asarray(all_a), "lora_B": jnp.asarray(all_b)}
    return out if a.layers else {name: value[0] for name, value in out.items()}


def _orthogonal(
    key: Array, rank: int, shape: tuple[int, int]
) -> tuple[NDArray, NDArray]:
    """A in the span of the odd rows of a random rotation, B in that of the even ones.

    PEFT's recipe, after https://datta0.github.io/posts/rethink-lora-init.
    """
    rows, columns = shape
    one, two, three = jax.random.split(key, 3)
    q = np.linalg.qr(np.asarray(jax.random.normal(one, (rank, rank))))[0]
    left = np.asarray(jax.random.normal(two, (columns, rank // 2)))
    right = np.asarray(jax.random.normal(three, (rows, rank // 2)))
    return (left @ q[0::2]).T / 10.0, right @ q[1::2] / 10.0


def _decompose(
    key: Array, kind: str, weight: NDArray, rank: int, scaling: float
) -> tuple[NDArray, NDArray]:
    """The part of a weight that A and B start from: scaling * B A."""
    if kind == "olora":
        q, r = np.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if kind.startswith("pissa_niter_"):
        u, s, vt = _randomized_svd(key, weight, rank, int(kind.rpartition("_")[2]))
    else:
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank] / np.float32(scaling))
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _randomized_svd(
    key: Array, weight: NDArray, rank: int, iterations: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Leading singular vectors by subspace iteration (arXiv:0909.4061)."""
    width = min(rank + _OVERSAMPLE, *weight.shape)
    q = weight @ np.asarray(jax.random.normal(key, (weight.shape[1], width)))
    for _ in range(iterations):
        q = np.linalg.qr(weight.T @ np.linalg.qr(q)[0])[0]
        q = weight @ q
    q = np.linalg.qr(q)[0]
    u, s, vt = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vt


def _lost(
    dense: NDArray, name: str, original: Callable[[str], NDArray] | None
) -> NDArray:
    """What quantization took from a weight."""
    if original is None:
        raise UserError(
            "lora: 'loftq' needs the unquantized weights beside the quantized ones "
            "(`original`), and the base was given in 4 bits already. Start from the "
            "16-bit checkpoint."
        )
    return np.asarray(original(name), np.float32) - dense


def _dense(weight: Any, layer: int | None) -> NDArray:
    if layer is not None:
        weight = jax.tree.map(lambda leaf: leaf[layer], weight)
    if isinstance(weight, NF4Tensor):
        weight = nf4.dequantize(weight, jnp.float32)
    return np.asarray(weight, np.float32)


def _magnitude(a: AdaptedModule, weight: Any) -> Float32[Array, "..."]:
    """The norms of W: rows of a linear layer, columns of an embedding."""
    if a.kind == "embedding":
        return row_norms(jnp.asarray(weight).T)
    if a.layers is None:
        return row_norms(jax.tree.map(jnp.asarray, weight))
    # One layer dequantized at a time.
    return jax.lax.map(row_norms, jax.tree.map(jnp.asarray, weight))


def _only(stacked: Array, chosen: Sequence[bool]) -> Array:
    """Zeros in the layers that are not trained."""
    if all(chosen):
        return stacked
    shape = (len(chosen), *[1] * (stacked.ndim - 1))
    return jnp.where(np.asarray(chosen).reshape(shape), stacked, 0.0)


def _zeros(a: AdaptedModule, shape: tuple[int, ...]) -> Array:
    leading = () if a.layers is None else (a.layers,)
    return jnp.zeros((*leading, *shape), jnp.float32)


def _weight(base: Mapping[str, Any], module: Path) -> Any:
    """The weight of a module; a tied head's is the embedding's."""
    return _leaf(base, (*module, "weight"))


def _leaf(base: Mapping[str, Any], path: Path) -> Any:
    if path == (*HEAD, "weight") and "weight" not in base.get(HEAD[-1], {}):
        path = (*EMBEDDING, "weight")
    return trees.at(base, path)


CHANGEABLE = ("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout")
"""Settings that leave the trained arrays what they are."""
# Of the base, or the same in every adapter.
_NOT_COMPARED = (
    "base_model_name_or_path",
    "revision",
    "base_fingerprint",
    "base_config_changes",
    "task_type",
)
_NO_ORDER = ("target_modules", "exclude_modules", "modules_to_save")


def given_fields(lora: LoraConfig) -> set[str]:
    """Fields that are not at their defaults: in Python, those that someone gave."""
    plain = LoraConfig()
    return {
        f.name
        for f in dataclasses.fields(lora)
        if getattr(lora, f.name) != getattr(plain, f.name)
    }


def continued(
    own: LoraConfig,
    wanted: LoraConfig,
    given: Collection[str],
    base: Mapping[str, Any],
    *,
    name: str,
    changeable: Collection[str] = CHANGEABLE,
) -> tuple[LoraConfig, list[str]]:
    """Returns an adapter's configuration with what was given beside it.

    Settings that select the same modules of `base` with the same ranks and factors are
    equal, however they are spelled.

    Args:
      own: the adapter's.
      wanted: holds the values of the fields in `given`.
      given: names of the fields that someone gave.
      base: parameter tree of the model, of arrays or shapes.
      name: what the adapter is called in a message.
      changeable: fields whose value may be another one than the adapter's.

    Returns:
      The configuration, and what it changes ("lora_alpha 8 -> 16").

    Raises:
      UserError: fields that contradict the adapter, all of them.
    """
    other = [
        f.name
        for f in dataclasses.fields(own)
        if f.name in given
        and f.name not in _NOT_COMPARED
        and _plain(own, f.name) != _plain(wanted, f.name)
    ]
    if "init_lora_weights" in other and wanted.init_lora_weights == "default":
        other.remove("init_lora_weights")  # no start of its own is asked for
    changed = [field for field in other if field in changeable]
    fixed = [field for field in other if field not in changeable]
    if fixed and _select_alike(own, wanted, fixed, base):
        fixed = []
    if fixed:
        values = ", ".join(
            f"`{field}`={_short(wanted, field)} (the adapter's: {_short(own, field)})"
            for field in fixed
        )
        raise UserError(
            f"`{name}` is an adapter with settings of its own, which contradict those "
            f"given: {values}. Leave these out"
            + (
                f"; {', '.join(f'`{field}`' for field in changeable)} may be changed."
                if changeable
                else "."
            )
        )
    lora = dataclasses.replace(own, **{f: getattr(wanted, f) for f in changed})
    notes = [f"{f} {_short(own, f)} -> {_short(wanted, f)}" for f in changed]
    return lora, notes


def _plain(lora: LoraConfig, field: str) -> Any:
    """A value without what carries no meaning."""
    value = getattr(lora, field)
    if field in _NO_ORDER and isinstance(value, tuple):
        return sorted(value)
    return lora.token_rows if field == "trainable_token_indices" else value


def _short(lora: LoraConfig, field: str) -> str:
    return f"{getattr(lora, field)!r:.120}"


def _select_alike(
    own: LoraConfig, wanted: LoraConfig, fields: list[str], base: Mapping[str, Any]
) -> bool:
    if "init_lora_weights" in fields:
        return False
    try:
        respelled = dataclasses.replace(own, **{f: getattr(wanted, f) for f in fields})
        one, two = select(base, own), select(base, respelled)
    except UserError:  # no such adapter, or not of this base
        return False
    return (one.adapted, one.full_tensors, one.rows) == (
        two.adapted,
        two.full_tensors,
        two.rows,
    )
