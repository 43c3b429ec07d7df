"""Initial values of adapters, and adapters that are trained further.

Most initializations leave the adapted model equal to the base: B = 0, or B A = 0
(orthogonal). PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start A and B from
the weight itself and subtract their product from it: W' = W - scaling * B0 A0. Here the
base is not rewritten: `factor_out` stores A0 and B0 next to the weight, and the model
subtracts them. So the adapted model equals the base also where W is packed in 4 bits,
nothing is rounded, and `absorb` can convert the trained adapter to the original base,
as PEFT does on saving: A = [A; A0], B = [B, -B0], twice the rank. LoftQ
(arXiv:2310.08659, one iteration) starts from the quantization error W - dequantize(Q)
and leaves the quantized base as it is.

An adapter that is trained further brings its own settings. `continued_config` merges
them with those of a run: the scaling and the dropout may change, because the trained
arrays keep their meaning; any other difference is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from numpy.typing import NDArray

from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.errors import Problems, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import row_norms
from qlora_jax.lora.targets import AdaptedModule, Selection, select
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import EMBEDDING, HEAD, Path, dotted

# Columns beyond the rank in the randomized SVD (arXiv:0909.4061, section 4.3: 5 or 10).
_OVERSAMPLE = 8

_Factors = tuple[NDArray, NDArray]  # A [R, I] and B [O, R]


def init_adapters(
    key: Array,
    base: Mapping[str, Any],
    lora: LoraConfig,
    *,
    original: Callable[[str], NDArray] | None = None,
) -> dict[str, Any]:
    """Returns fresh adapters, initialized by `lora.init_lora_weights`.

    - "default": A ~ U(-1/sqrt(I), 1/sqrt(I)), which is Kaiming-uniform with a=sqrt(5),
      and B = 0. "gaussian": A ~ N(0, 1/r^2), B = 0. Embeddings have A = 0 and
      B ~ N(0, 1). All as in PEFT; the adapted model equals the base.
    - "orthogonal": A and B in orthogonal subspaces, B A = 0.
    - "pissa", "pissa_niter_N", "olora": from the weight; train with
      `factor_out(base, adapters, lora)` as the base.
    - "loftq": scaling * B A is the best approximation of the quantization error.

    The key of a module comes from its path, so another target does not change it.
    Tensors trained in full are copies of the base's, DoRA's magnitudes the norms of the
    rows of W. Layers that are not trained are zero and stay zero.

    Args:
      key: PRNG key.
      base: parameter tree; shapes are enough where no value depends on the weights.
      lora: configuration.
      original: for "loftq": Hugging Face key -> the unquantized tensor [O, I].

    Returns:
      float32 tree; see `qlora_jax.lora.functional`.

    Raises:
      UserError: as `select` and `check_start`.
    """
    selection = select(base, lora)
    check_start(base, lora, selection)
    adapters: dict[str, Any] = {}
    for a in selection.adapted:
        arrays: dict[str, Array] = {}
        # Byte by byte: `hash` of a string differs between processes.
        module_key = functools.reduce(
            jax.random.fold_in, ".".join(a.path).encode(), key
        )
        weight = _weight(base, a.path)
        if a.tied_to is None:
            arrays = _factors(module_key, a, weight, lora, original)
        if "lora_bias" in a.parts:
            arrays["lora_bias"] = _zeros(a, "lora_bias")
        if a.dora:
            used = [rank > 0 for rank in a.ranks]
            arrays["lora_magnitude_vector"] = _zero_unused(_magnitude(a, weight), used)
        if arrays:  # a tied head may have none
            trees.node(adapters, a.path).update(arrays)
    for t in selection.full_tensors:
        if t.tied_to is None:
            # A copy: a step donates the adapters, and the base must outlive it.
            value = jnp.array(_leaf(base, t.path), jnp.float32)
            trees.put(adapters, t.path, _zero_unused(value, t.trained))
    for r in selection.rows:
        if r.tied_to is None:
            rows = jnp.asarray(_weight(base, r.path))[np.asarray(r.indices)]
            path = (*r.path, "trainable_tokens_delta")
            trees.put(adapters, path, rows.astype(jnp.float32))
    return adapters


def check_start(
    base: Mapping[str, Any], lora: LoraConfig, selection: Selection
) -> None:
    """Raises if the initialization does not fit the base.

    Args:
      base: parameter tree, of arrays or shapes.
      lora: configuration.
      selection: what `lora` selects in the base.

    Raises:
      UserError: tensors to be trained in full that are packed in 4 bits, a rank above
        that of the weight, or LoftQ of weights that are not packed; all of them.
    """
    problems = Problems("the adapter")
    for t in selection.full_tensors:
        if t.tied_to is None and isinstance(_leaf(base, t.path), NF4Tensor):
            problems.add(
                f"`modules_to_save` trains `{'.'.join(t.path)}` in full, and it is "
                "packed in 4 bits. Load the base with quantization='none', or adapt "
                "that module with LoRA."
            )
    init = str(lora.init_lora_weights)
    if init not in ("default", "gaussian", "orthogonal"):
        for a in filter(_from_weight, selection.adapted):
            # A matrix has min(O, I) singular vectors, and as many columns of Q.
            rank, largest = max(a.ranks), min(a.shape)
            name = dotted(a.path, a.layers)[a.ranks.index(rank)]
            if rank > largest:
                problems.add(
                    f"lora: {init!r} needs a rank of at most {largest} in `{name}`, "
                    f"got {rank}."
                )
            packed = isinstance(_weight(base, a.path), NF4Tensor)
            if init == "loftq" and not packed:
                problems.add(
                    "lora: 'loftq' compensates for the quantization error, and "
                    f"`{name}.weight` is not quantized. Load the base with "
                    "quantization='nf4', or choose another `init_lora_weights`."
                )
    problems.raise_if_any()


def factor_out(
    base: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Subtracts the initial product of the adapters: W' = W - scaling * B0 A0.

    The weights are not touched: each adapted one gets `residual_A` = A0 and
    `residual_B` = scaling * B0 next to it, whose product the model subtracts.

    Args:
      base: parameter tree.
      adapters: from `init_adapters`.
      lora: configuration with `changes_base`.

    Returns:
      A tree that shares the arrays of `base`.
    """
    out = trees.copy(base)
    for a in select(base, lora).adapted:
        if _from_weight(a):
            module, arrays = trees.node(out, a.path), trees.node(adapters, a.path)
            # Copies: the first step donates the adapters' own arrays.
            module["residual_A"] = jnp.array(arrays["lora_A"])
            module["residual_B"] = jnp.array(arrays["lora_B"]) * _scalings(a)
    return out


def absorb(
    lora: LoraConfig, adapters: Mapping[str, Any], base: Mapping[str, Any]
) -> tuple[LoraConfig, dict[str, Any]]:
    """Converts adapters of a factored base to adapters of the original base.

    Args:
      lora: the configuration they were trained with.
      adapters: trained tree.
      base: from `factor_out`.

    Returns:
      A configuration of twice the rank and the same scalings, and its adapters: with
      A = [A; A0] and B = [B, -B0], `scaling * B A` is the sum of both products.

    Raises:
      UserError: a base that is not from `factor_out`.
    """
    out = trees.copy(adapters)
    if not lora.changes_base:
        return lora, out
    for a in select(base, lora).adapted:
        if a.tied_to is not None:
            continue
        arrays, module = trees.node(out, a.path), trees.node(base, a.path)
        if not _from_weight(a):  # an embedding: B0 A0 = 0
            for name, axis in (("lora_embedding_A", 0), ("lora_embedding_B", 1)):
                array = np.asarray(arrays[name])
                arrays[name] = np.concatenate([array, np.zeros_like(array)], axis)
            continue
        if "residual_A" not in module:
            raise UserError(
                f"`{'.'.join(a.path)}` of this base has nothing factored out. Give "
                "the base that the adapters were trained on, `factor_out(base, "
                "adapters, lora_config)` with the adapters as they started."
            )
        scalings = _scalings(a)
        # B0 is zero in a layer that is not adapted, where the scaling is 0.
        # s [B, -B0] [A; A0] = s B A - s B0 A0, and residual_B holds s B0.
        b0 = np.asarray(module["residual_B"]) / np.where(scalings > 0, scalings, 1.0)
        both_a = [np.asarray(arrays["lora_A"]), np.asarray(module["residual_A"])]
        both_b = [np.asarray(arrays["lora_B"]), -b0]
        arrays["lora_A"], arrays["lora_B"] = _move_padding(
            a, np.concatenate(both_a, axis=-2), np.concatenate(both_b, axis=-1)
        )
    return lora.absorbed, out


def _from_weight(a: AdaptedModule) -> bool:
    """Whether the factors of PiSSA, OLoRA or LoftQ come from this module's weight."""
    return a.kind == "linear" and a.tied_to is None


def _scalings(a: AdaptedModule) -> Float[np.ndarray, "*L 1 1"]:
    """Returns the scalings, to be broadcast over factors."""
    return np.asarray(a.scalings, np.float32).reshape((*_leading(a), 1, 1))


def _move_padding(a: AdaptedModule, both_a: NDArray, both_b: NDArray) -> _Factors:
    """Moves the padding of layers of lower rank to the end."""
    if a.layers is None or len(set(a.ranks)) == 1:
        return both_a, both_b
    # Stacked, a layer of lower rank r has its values at 0..r and R..R + r of the axis
    # of rank, with padding after each.
    out_a, out_b = np.zeros_like(both_a), np.zeros_like(both_b)
    for layer, rank in enumerate(a.ranks):
        used = [*range(rank), *range(a.rank, a.rank + rank)]
        out_a[layer, : 2 * rank] = both_a[layer, used]
        out_b[layer, :, : 2 * rank] = both_b[layer][:, used]
    return out_a, out_b


# --- Initial factors ---


def _factors(
    key: Array,
    a: AdaptedModule,
    weight: Any,
    lora: LoraConfig,
    original: Callable[[str], NDArray] | None,
) -> dict[str, Array]:
    """Returns the low-rank factors of one module."""
    init = str(lora.init_lora_weights)
    if a.kind == "embedding":
        # The other way round than in a linear layer, as in PEFT; B A = 0 all the same.
        b = jax.random.normal(key, a.parts["lora_embedding_B"], jnp.float32)
        return {
            "lora_embedding_A": _zeros(a, "lora_embedding_A"),
            "lora_embedding_B": b,
        }
    if init in ("default", "gaussian"):
        return {"lora_A": _random_a(key, a, init), "lora_B": _zeros(a, "lora_B")}
    # One layer at a time, on the host: a decomposition has several copies of W.
    layers = a.layers or 1
    rows, columns = a.shape
    all_a = np.zeros((layers, a.rank, columns), np.float32)
    all_b = np.zeros((layers, rows, a.rank), np.float32)
    names = dotted(a.path, a.layers)
    for layer, (rank, scaling) in enumerate(zip(a.ranks, a.scalings, strict=True)):
        if rank == 0:
            continue
        layer_key = jax.random.fold_in(key, layer)
        if init == "orthogonal":
            factors = _orthogonal(layer_key, rank, a.shape)
        else:
            dense = _dense(weight, None if a.layers is None else layer)
            if init == "loftq":
                dense = _quantization_error(dense, f"{names[layer]}.weight", original)
            factors = _decompose(layer_key, init, dense, rank, scaling)
        all_a[layer, :rank], all_b[layer, :, :rank] = factors
    out = {"lora_A": jnp.asarray(all_a), "lora_B": jnp.asarray(all_b)}
    return out if a.layers else {name: value[0] for name, value in out.items()}


def _random_a(key: Array, a: AdaptedModule, init: str) -> Float32[Array, "*L R I"]:
    shape = (*_leading(a), *a.parts["lora_A"])
    ranks = jnp.asarray(a.ranks, jnp.int32).reshape((*_leading(a), 1, 1))
    if init == "gaussian":
        values = jax.random.normal(key, shape, jnp.float32)
        # Each layer's own rank: a standard deviation of 1 / r, as PEFT has it.
        values = values / jnp.maximum(ranks, 1).astype(jnp.float32)
    else:
        # Kaiming-uniform: sqrt(6 / ((1 + a^2) I)) with a = sqrt(5) is 1 / sqrt(I).
        bound = 1.0 / math.sqrt(a.shape[1])
        values = jax.random.uniform(
            key, shape, jnp.float32, minval=-bound, maxval=bound
        )
    # Rows beyond a layer's rank are padding, which starts and stays at zero.
    used = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2) < ranks
    return jnp.where(used, values, 0.0)


def _orthogonal(key: Array, rank: int, shape: tuple[int, int]) -> _Factors:
    """A in the span of the even rows of a random rotation, B in that of the odd ones.

    B A = right Q_odd Q_even^T left^T = 0. PEFT's recipe, with its factors of 1/10,
    after https://datta0.github.io/posts/rethink-lora-init.
    """
    rows, columns = shape
    rotation_key, left_key, right_key = jax.random.split(key, 3)
    square = np.asarray(jax.random.normal(rotation_key, (rank, rank)))
    # The rows of q are orthonormal, so those of even and of odd number span orthogonal
    # halves of the space of the rank.
    q = np.linalg.qr(square)[0]
    left = np.asarray(jax.random.normal(left_key, (columns, rank // 2)))
    right = np.asarray(jax.random.normal(right_key, (rows, rank // 2)))
    return (left @ q[0::2]).T / 10.0, right @ q[1::2] / 10.0


def _decompose(
    key: Array, init: str, weight: NDArray, rank: int, scaling: float
) -> _Factors:
    """Returns the factors that a matrix gives: W, or LoftQ's quantization error."""
    if init == "olora":  # W = Q R; as in PEFT, scaling * B A is subtracted from W
        q, r = np.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init.startswith("pissa_niter_"):
        u, s, vt = _randomized_svd(key, weight, rank, int(init.rpartition("_")[2]))
    else:
        # The leading triplets are the best approximation of that rank.
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
    # scaling * B A = U_r S_r V_r^T, the singular values shared evenly by B and A.
    root = np.sqrt(s[:rank] / np.float32(scaling))
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _randomized_svd(
    key: Array, weight: NDArray, rank: int, iterations: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Returns the leading singular triplets by subspace iteration (arXiv:0909.4061)."""
    # A random sample of the column space; products with W W^T then turn it towards the
    # leading singular vectors.
    width = min(rank + _OVERSAMPLE, *weight.shape)
    q = weight @ np.asarray(jax.random.normal(key, (weight.shape[1], width)))
    for _ in range(iterations):
        # QR between the products keeps the small singular values from drowning.
        q = np.linalg.qr(weight.T @ np.linalg.qr(q)[0])[0]
        q = weight @ q
    q = np.linalg.qr(q)[0]
    # W is nearly Q Q^T W, and Q^T W has only `width` rows to decompose.
    u, s, vt = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vt


def _quantization_error(
    dense: NDArray, name: str, original: Callable[[str], NDArray] | None
) -> NDArray:
    """Returns the original weight less the dequantized one."""
    if original is None:
        raise UserError(
            "lora: 'loftq' needs the unquantized weights as well as the quantized ones "
            "(`original`), and the base was loaded in 4 bits. Start from the 16-bit "
            "checkpoint."
        )
    # One step of LoftQ's alternation: quantizing W - B A again would change the base.
    return np.asarray(original(name), np.float32) - dense


def _dense(weight: Any, layer: int | None) -> Float[np.ndarray, "O I"]:
    if layer is not None:
        weight = jax.tree.map(lambda leaf: leaf[layer], weight)
    if isinstance(weight, NF4Tensor):
        weight = nf4.dequantize(weight, jnp.float32)
    return np.asarray(weight, np.float32)


def _magnitude(a: AdaptedModule, weight: Any) -> Float32[Array, "..."]:
    """Returns DoRA's initial m = |W|: of rows, in an embedding of columns."""
    if a.kind == "embedding":
        return row_norms(jnp.asarray(weight).T)
    weight = jax.tree.map(jnp.asarray, weight)
    if a.layers is None:
        return row_norms(weight)
    # One layer dequantized at a time.
    return jax.lax.map(row_norms, weight)


def _zero_unused(stacked: Array, used: Sequence[bool]) -> Array:
    """Sets the layers that are not trained to zero."""
    if all(used):
        return stacked
    shape = (len(used), *[1] * (stacked.ndim - 1))
    return jnp.where(np.asarray(used).reshape(shape), stacked, 0.0)


def _zeros(a: AdaptedModule, part: str) -> Float32[Array, "..."]:
    return jnp.zeros((*_leading(a), *a.parts[part]), jnp.float32)


def _leading(a: AdaptedModule) -> tuple[int, ...]:
    return () if a.layers is None else (a.layers,)


def _weight(base: Mapping[str, Any], module: Path) -> Any:
    """Returns the weight of a module; that of a tied head is the embedding's."""
    return _leaf(base, (*module, "weight"))


def _leaf(base: Mapping[str, Any], path: Path) -> Any:
    if path == (*HEAD, "weight") and "weight" not in base.get(HEAD[-1], {}):
        path = (*EMBEDDING, "weight")
    return trees.at(base, path)


# --- Adapters that are trained further ---

CHANGEABLE_SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout")
"""Settings that leave the meaning of the trained arrays."""
# Properties of the base, or the same in every adapter.
_NOT_COMPARED = (
    *("base_model_name_or_path", "revision", "base_fingerprint"),
    *("base_config_changes", "task_type"),
)
_UNORDERED = ("target_modules", "exclude_modules", "modules_to_save")


def given_fields(lora: LoraConfig) -> set[str]:
    """Returns the fields that are not at their defaults."""
    default = LoraConfig()
    return {
        f.name
        for f in dataclasses.fields(lora)
        if getattr(lora, f.name) != getattr(default, f.name)
    }


def continued_config(
    trained: LoraConfig,
    requested: LoraConfig,
    fields: Collection[str],
    base: Mapping[str, Any],
    *,
    name: str,
    changeable: Collection[str] = CHANGEABLE_SETTINGS,
) -> tuple[LoraConfig, list[str]]:
    """Returns the configuration of an adapter with the changes of a run.

    Settings that select the same modules of `base` with the same ranks and scalings are
    equal, however they are spelled.

    Args:
      trained: the adapter's configuration.
      requested: the run's configuration.
      fields: names of the fields that the run sets.
      base: parameter tree of the model, of arrays or shapes.
      name: of the adapter, for messages.
      changeable: fields that may differ.

    Returns:
      The configuration, and its changes ("lora_alpha 8 -> 16").

    Raises:
      UserError: fields that contradict the adapter, all of them.
    """
    different = [
        f.name
        for f in dataclasses.fields(trained)
        if f.name in fields
        and f.name not in _NOT_COMPARED
        and _comparable(trained, f.name) != _comparable(requested, f.name)
    ]
    if "init_lora_weights" in different and requested.init_lora_weights == "default":
        different.remove("init_lora_weights")  # the arrays are initialized already
    changed = [field for field in different if field in changeable]
    fixed = [field for field in different if field not in changeable]
    if fixed and not _select_alike(trained, requested, fixed, base):
        values = ", ".join(
            f"`{f}`={_short(requested, f)} (the adapter's: {_short(trained, f)})"
            for f in fixed
        )
        exceptions = ", ".join(f"`{field}`" for field in changeable)
        raise UserError(
            f"The adapter `{name}` has its own settings, which these contradict: "
            f"{values}. Leave these out"
            + (f"; {exceptions} may be changed." if changeable else ".")
        )
    lora = dataclasses.replace(trained, **{f: getattr(requested, f) for f in changed})
    notes = [f"{f} {_short(trained, f)} -> {_short(requested, f)}" for f in changed]
    return lora, notes


def _comparable(lora: LoraConfig, field: str) -> Any:
    """Returns a value without the order or spelling that has no meaning."""
    value = getattr(lora, field)
    if field in _UNORDERED and isinstance(value, tuple):
        return sorted(value)
    return lora.token_rows if field == "trainable_token_indices" else value


def _short(lora: LoraConfig, field: str) -> str:
    return f"{getattr(lora, field)!r:.120}"


def _select_alike(
    trained: LoraConfig,
    requested: LoraConfig,
    fields: list[str],
    base: Mapping[str, Any],
) -> bool:
    """Whether both spellings of `fields` train the same."""
    if "init_lora_weights" in fields:
        return False
    try:
        respelled = dataclasses.replace(
            trained, **{f: getattr(requested, f) for f in fields}
        )
        old, new = select(base, trained), select(base, respelled)
    except UserError:  # settings that contradict each other, or that fit no module
        return False
    # `unmatched` may differ: it lists names.
    return dataclasses.replace(old, unmatched=()) == dataclasses.replace(
        new, unmatched=()
    )
