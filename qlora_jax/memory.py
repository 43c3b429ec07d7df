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
from qlora_jax.config import LlamaConfig
from qlora_jax.llama import Llama
from qlora_jax.lora import abstract_adapters
from qlora_jax.lora_config import LoraConfig
from qlora_jax.targets import linear_modules, select
from qlora_jax.train import TrainConfig, make_optimizer


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
    """Bytes of AdamW's state."""


def abstract_base(
    config: LlamaConfig, *, quantization: str | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Returns the shapes and dtypes of a base tree.

    Args:
      config: architecture.
      quantization: "nf4" or "nf4_dq" packs the linear layers; None keeps them dense.
      dtype: of dense tensors.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = partial(Llama(config).init, jax.random.key(0))
    tree = jax.eval_shape(init, tokens)["params"]
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree
    )
    if quantization is None:
        return tree
    for path, (out_features, in_features, layers) in linear_modules(tree).items():
        if layers is None:
            continue  # the head stays dense
        node = tree
        for part in path:
            node = node[part]
        node["weight"] = nf4.abstract(
            (out_features, in_features),
            double_quant=quantization == "nf4_dq",
            dtype=dtype,
            leading=(layers,),
        )
    return tree


def parameter_report(
    config: LlamaConfig,
    lora: LoraConfig | None,
    *,
    quantization: str | None = "nf4_dq",
    dtype: str = "bfloat16",
) -> ParameterReport:
    """Counts parameters and bytes; arguments as `abstract_base`.

    Raises:
      UserError: `lora` targets nothing in this model.
    """
    dense = abstract_base(config, dtype=dtype)
    held = abstract_base(config, quantization=quantization, dtype=dtype)
    groups: dict[str, int] = {}
    optimizer_bytes = 0
    if lora is not None:
        groups = select(dense, lora).groups()
        adapters = abstract_adapters(dense, lora)
        optimizer = make_optimizer(TrainConfig(steps=1), 1)
        optimizer_bytes = tree_bytes(jax.eval_shape(optimizer.init, adapters))
    return ParameterReport(
        base_parameters=tree_size(dense),
        base_bytes=tree_bytes(held),
        trainable_parameters=sum(groups.values()),
        groups=groups,
        optimizer_bytes=optimizer_bytes,
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
