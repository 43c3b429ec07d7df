"""LoRA as pure functions on trees: which modules are adapted, how adapters start.

Adapters are a second tree beside the base, with the same module paths; the tree itself
decides what is adapted. A linear layer `y = W x` with adapter {lora_A, lora_B} becomes
`y = W x + scaling * B (A x)` (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    base      {"model": {"layers": {"self_attn": {"q_proj": {"weight": [L, O, I]}}}}}
    adapters  {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": [L, R, I],
                                                             "lora_B": [L, O, R]}}}}}

Layers are stacked on a leading axis L. Module paths in configurations and messages are
those of Hugging Face, `model.layers.3.self_attn.q_proj`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.product import dense_matmul
from qlora_jax.config import LoraConfig
from qlora_jax.errors import UserError
from qlora_jax.nf4 import NF4Tensor

Path = tuple[str, ...]

# The scanned stack of layers: below it every leaf has a leading layer axis.
LAYERS: Path = ("model", "layers")
# Modules with a two-dimensional weight that are no linear layers.
_EMBEDDINGS = ("embed_tokens",)
_HEAD = "lm_head"


def matches(module_path: str, target_modules: tuple[str, ...] | str) -> bool:
    """Whether PEFT's rules select a linear module of this dotted path.

    A tuple matches by equality or as a path suffix; "all-linear" matches everything but
    the output head; any other string is a regular expression for the whole path.
    """
    if target_modules == "all-linear":
        return module_path.rpartition(".")[2] != _HEAD
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module_path) is not None
    return any(
        module_path == name or module_path.endswith(f".{name}")
        for name in target_modules
    )


def linear_modules(base: Mapping[str, Any]) -> dict[Path, tuple[int, int, int | None]]:
    """Lists the linear modules of a base tree: path -> (out, in, layers or None).

    Works on abstract trees too. `layers` is the length of the leading axis where the
    module belongs to the scanned stack.
    """
    found: dict[Path, tuple[int, int, int | None]] = {}
    for path, weight in _weights(base, ()):
        if path[-1] in _EMBEDDINGS:
            continue
        stacked = path[: len(LAYERS)] == LAYERS
        if isinstance(weight, NF4Tensor):
            layers = weight.codes.shape[0] if stacked else None
            found[path] = (*weight.shape, layers)
        elif len(weight.shape) == 2 + stacked:
            found[path] = (*weight.shape[-2:], weight.shape[0] if stacked else None)
    return found


def targeted_modules(
    base: Mapping[str, Any], lora: LoraConfig
) -> dict[Path, tuple[int, int, int | None]]:
    """Selects the linear modules that `lora.target_modules` names.

    Raises:
      UserError: nothing matches (near matches are listed), or a stacked module matches
        in some layers only.
    """
    modules = linear_modules(base)
    chosen: dict[Path, tuple[int, int, int | None]] = {}
    for path, shape in modules.items():
        hits = [matches(p, lora.target_modules) for p in dotted(path, shape[2])]
        if all(hits):
            chosen[path] = shape
        elif any(hits):
            raise UserError(
                f"`target_modules`={lora.target_modules!r} selects {path[-1]!r} in "
                f"{sum(hits)} of {len(hits)} layers; every layer of a projection has "
                "to be adapted, or none."
            )
    if not chosen:
        names = sorted({path[-1] for path in modules})
        wanted = lora.target_modules
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        near = sorted(
            {n for w in wanted for n in difflib.get_close_matches(w, names, n=3)}
        )
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UserError(
            f"`target_modules`={lora.target_modules!r} matches no linear module of "
            f"this model.{hint} Linear modules here: {', '.join(names)}."
        )
    return chosen


def unmatched_targets(base: Mapping[str, Any], lora: LoraConfig) -> tuple[str, ...]:
    """Returns the entries of a `target_modules` list that select nothing."""
    if isinstance(lora.target_modules, str):
        return ()
    paths = [
        p
        for path, shape in linear_modules(base).items()
        for p in dotted(path, shape[2])
    ]
    return tuple(
        name
        for name in lora.target_modules
        if not any(matches(p, (name,)) for p in paths)
    )


def init_adapters(
    key: Array, base: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Makes fresh adapters: B = 0, so the adapted model equals the base exactly.

    A is Kaiming-uniform with a=sqrt(5), that is U(-1/sqrt(I), 1/sqrt(I)), or, for
    "gaussian", N(0, 1/r^2), as in PEFT. Every module draws from its own key, derived
    from its path, so that adding a target does not change the others.

    Args:
      key: PRNG key.
      base: parameter tree (arrays, NF4 leaves, or their shapes).
      lora: what to adapt, rank and initialization.

    Returns:
      float32 tree of {lora_A: [(L,) R, I], lora_B: [(L,) O, R]}.

    Raises:
      UserError: as `targeted_modules`.
    """
    adapters: dict[str, Any] = {}
    for path, (out_features, in_features, layers) in targeted_modules(
        base, lora
    ).items():
        leading = () if layers is None else (layers,)
        module_key = key
        for byte in ".".join(path).encode():
            module_key = jax.random.fold_in(module_key, byte)
        shape = (*leading, lora.r, in_features)
        if lora.init_lora_weights == "gaussian":
            a = jax.random.normal(module_key, shape, jnp.float32) / lora.r
        else:
            bound = 1.0 / math.sqrt(in_features)
            a = jax.random.uniform(
                module_key, shape, jnp.float32, minval=-bound, maxval=bound
            )
        node = adapters
        for part in path:
            node = node.setdefault(part, {})
        node["lora_A"] = a
        node["lora_B"] = jnp.zeros((*leading, out_features, lora.r), jnp.float32)
    return adapters


def delta(
    x: Float[Array, "*B I"],
    adapter: Mapping[str, Array],
    scaling: float,
    *,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "*B O"]:
    """Computes `scaling * B (A dropout(x))` in the dtype of `x`.

    The scale is applied to the rank-wide product, the smallest tensor on the way.

    Args:
      x: inputs, features last.
      adapter: {"lora_A": [R, I], "lora_B": [O, R]}.
      scaling: factor of the update.
      dropout: probability of dropping an input element; 0 or no key = none.
      key: PRNG key for the dropout mask.

    Returns:
      The update [..., O].
    """
    if dropout > 0.0 and key is not None:
        keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros((), x.dtype))
    inner = checkpoint_name(dense_matmul(x, adapter["lora_A"]), "lora_inner")
    return dense_matmul(inner * scaling, adapter["lora_B"])


def dotted(path: Path, layers: int | None) -> list[str]:
    """Spells a module path as Hugging Face does, once for each layer."""
    if layers is None:
        return [".".join(path)]
    cut = len(LAYERS)
    head, tail = ".".join(path[:cut]), ".".join(path[cut:])
    return [f"{head}.{i}.{tail}" for i in range(layers)]


def _weights(node: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    for name, child in node.items():
        if isinstance(child, Mapping):
            yield from _weights(child, (*path, name))
        elif name == "weight":
            yield path, child
