"""What a run trains and stores, counted before it starts.

Counts come from abstract shapes (`jax.eval_shape`), so a `config.json` is enough and
nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.config import LlamaConfig
from qlora_jax.errors import did_you_mean, readable_bytes
from qlora_jax.llama import Llama
from qlora_jax.lora import abstract_adapters
from qlora_jax.lora_config import LoraConfig
from qlora_jax.optimizer import make_optimizer
from qlora_jax.targets import absent_layers, linear_modules, select
from qlora_jax.train_config import TrainConfig
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, PROJECTIONS


@dataclass(frozen=True)
class ParameterReport:
    """Counts and bytes of a model with adapters."""

    base_parameters: int
    """Weights and biases of the base."""
    base_bytes: int
    """Bytes of the base as it is held for training."""
    trainable_parameters: int
    """Parameters that the optimizer changes."""
    groups: Mapping[str, int]
    """Trainable parameters by adapted module."""
    optimizer_bytes: int
    """Bytes of the optimizer's state."""


def abstract_base(
    config: LlamaConfig,
    *,
    quantization: str | None = None,
    quantize_lm_head: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Returns the shapes and dtypes of a base tree.

    Args:
      config: architecture.
      quantization: "nf4" or "nf4_dq" packs the linear layers; None keeps them dense.
      quantize_lm_head: packs the output head as well.
      dtype: of dense tensors.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = partial(Llama(config).init, jax.random.key(0))
    tree = jax.eval_shape(init, tokens)["params"]
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree
    )
    for name, shape in config.extra_tensors.items():
        path = tuple(name.split("."))
        if path[:2] == LAYERS:
            shape = (config.num_hidden_layers, *shape)
        trees.put(tree, path, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    if quantization is None:
        return tree
    for path, (out_features, in_features, layers) in linear_modules(tree).items():
        wanted = layers is not None and path[-1] in PROJECTIONS
        if not wanted and not (quantize_lm_head and path == HEAD):
            continue  # modules that no Llama has stay dense
        node = tree
        for part in path:
            node = node[part]
        node["weight"] = nf4.abstract(
            (out_features, in_features),
            double_quant=quantization == "nf4_dq",
            dtype=dtype,
            leading=() if layers is None else (layers,),
        )
    return tree


def parameter_report(
    config: LlamaConfig,
    lora: LoraConfig | None,
    *,
    quantization: str | None = "nf4_dq",
    quantize_lm_head: bool = False,
    dtype: str = "bfloat16",
    train: TrainConfig | None = None,
) -> ParameterReport:
    """Counts parameters and bytes.

    Args:
      config: architecture.
      lora: what is trained; None = nothing.
      quantization: as `abstract_base` takes it.
      quantize_lm_head: the same.
      dtype: of dense tensors.
      train: the optimizer; default AdamW.

    Raises:
      UserError: `lora` targets nothing in this model.
    """
    dense = abstract_base(config, dtype=dtype)
    held = abstract_base(
        config,
        quantization=quantization,
        quantize_lm_head=quantize_lm_head,
        dtype=dtype,
    )
    groups: dict[str, int] = {}
    optimizer_bytes = 0
    if lora is not None:
        selection = select(dense, lora)
        groups = selection.groups()
        adapters = abstract_adapters(dense, lora)
        train = TrainConfig(steps=1) if train is None else train
        optimizer = make_optimizer(train, 1, selection)
        optimizer_bytes = tree_bytes(jax.eval_shape(optimizer.init, adapters))
    return ParameterReport(
        base_parameters=tree_size(dense),
        base_bytes=tree_bytes(held),
        trainable_parameters=sum(groups.values()),
        groups=groups,
        optimizer_bytes=optimizer_bytes,
    )


def warnings(
    config: LlamaConfig, lora: LoraConfig, base: Mapping[str, Any] | None = None
) -> list[str]:
    """What a user may not expect of these settings, with figures.

    Args:
      config: architecture.
      lora: what is to be trained.
      base: parameter tree of the model, of arrays or shapes, where it has modules that
        `config` does not list.

    Raises:
      UserError: as `parameter_report`.
    """
    base = abstract_base(config) if base is None else base
    selection = select(base, lora)
    groups = selection.groups()
    total = sum(groups.values())
    out = [_unmatched(name, base) for name in selection.unmatched]
    absent = absent_layers(lora, config.num_hidden_layers)
    if absent:
        out.append(
            f"`layers_to_transform` names {', '.join(map(str, absent))}; this model "
            f"has layers 0 to {config.num_hidden_layers - 1}."
        )
    biases = [w for w in selection.whole if w.path[-1] == "bias"]
    if lora.bias != "none" and not biases:
        whose = "this model has no biases"
        if lora.bias == "lora_only":
            whose = "no adapted module of this model has one"
        out.append(f"`bias`={lora.bias!r} trains nothing: {whose}.")
    tables = {
        w.path[-2]: math.prod(w.shape)
        for w in selection.whole
        if w.path[:-1] in (EMBEDDING, HEAD) and w.follows is None
    }
    if 2 * sum(tables.values()) > total:
        names = " and ".join(sorted(tables))
        count = sum(tables.values())
        out.append(
            f"{names}, trained whole, make {count:,} of {total:,} trained parameters "
            f"({count / total:.0%}): {readable_bytes(4 * count)} of the adapter file "
            f"and {readable_bytes(8 * count)} of AdamW's state. "
            "`trainable_token_indices` trains single rows."
        )
    held = sum(map(math.prod, selection.shapes().values()))
    if held > 1.1 * total:
        out.append(
            f"ranks differ among layers, so the arrays in memory hold {held:,} numbers "
            f"for {total:,} trained parameters ({readable_bytes(12 * (held - total))} "
            "more with AdamW's state); the adapter file holds the trained ones alone."
        )
    if config.tie_word_embeddings and len(tables) == 1 and not lora.ensure_weight_tying:
        name, other = ("embed_tokens", "lm_head")
        if "lm_head" in tables:
            name, other = other, name
        out.append(
            f"this model ties embed_tokens and lm_head; {name} is trained apart, and "
            f"{other} keeps the base's table. `ensure_weight_tying` trains both as one."
        )
    return out


def _unmatched(name: str, base: Mapping[str, Any]) -> str:
    modules = {path[-2] for path, _ in trees.walk(base)}
    return (
        f"target module {name!r} selects nothing in this model."
        f"{did_you_mean(name, modules)}"
    )


def tree_size(tree: Any) -> int:
    """Number of elements of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
