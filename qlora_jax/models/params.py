"""Names, shapes and counts of a model's parameters, from its configuration only.

`shapes` is the single list of a configuration's tensors: the converters check files
against it, and plans count with it. Nothing here imports Flax.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig, linear_modules, select
from qlora_jax.models.config import LlamaConfig
from qlora_jax.tree import HEAD, LAYERS, QUANTIZED, Path, Shape, at, is_stacked, put

# After the attention's weights, in the order of the layer. Files with norms on both
# sides of a part name the one after attention as others name the one before the MLP.
NORMS_BEFORE_MLP = {
    False: ["post_attention_layernorm"],
    True: ["post_attention_layernorm", "pre_feedforward_layernorm"],
}


def shapes(config: LlamaConfig) -> dict[Path, Shape]:
    """Lists every tensor of a model and its shape in the file (one layer's).

    In this order: embeddings, the parts of a layer, final norm, output head (unless
    tied), tensors of custom modules (`config.extra_tensors`).
    """
    d, f = config.hidden_size, config.intermediate_size
    # Not always hidden_size: head_dim is a field of its own.
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    tensors: dict[Path, Shape] = {
        ("model", "embed_tokens", "weight"): (config.vocab_size, d)
    }
    family = config.family
    attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d)}
    if family.fused:
        attention = {"qkv_proj": (q + 2 * kv, d)}
        mlp = {"gate_up_proj": (2 * f, d)}
    for norms, block, linears in (
        (["input_layernorm"], "self_attn", {**attention, "o_proj": (d, q)}),
        (NORMS_BEFORE_MLP[family.post_norms], "mlp", {**mlp, "down_proj": (d, f)}),
    ):
        for name in norms:
            tensors[*LAYERS, name, "weight"] = (d,)
        for name, shape in linears.items():
            tensors[*LAYERS, block, name, "weight"] = shape
            if config.has_bias(name):
                tensors[*LAYERS, block, name, "bias"] = shape[:1]
        if family.qk_norm and block == "self_attn":
            for name in ("q_norm", "k_norm"):
                tensors[*LAYERS, block, name, "weight"] = (config.head_dim,)
    if family.post_norms:
        tensors[*LAYERS, "post_feedforward_layernorm", "weight"] = (d,)
    tensors["model", "norm", "weight"] = (d,)
    # A tied head has no tensor: files of such models lack it.
    if not config.tie_word_embeddings:
        tensors["lm_head", "weight"] = (config.vocab_size, d)
    for name, shape in config.extra_tensors.items():
        tensors[tuple(name.split("."))] = tuple(shape)
    return tensors


def is_projection(path: Path) -> bool:
    """Returns whether `path` is the weight of a linear layer that is quantized."""
    return path[-1] == "weight" and path[-2] in QUANTIZED


def can_be_packed(path: Path) -> bool:
    """Returns whether `path` is a weight that may be stored in 4 bits.

    That is a projection or an output head of its own.
    """
    return is_projection(path) or path == (*HEAD, "weight")


def layers_of(path: Path, config: LlamaConfig) -> list[int | None]:
    """Returns the layer numbers for the names of `path`; [None] if not stacked."""
    return list(range(config.num_hidden_layers)) if is_stacked(path) else [None]


def abstract_base(
    config: LlamaConfig,
    *,
    quantization: str | None = None,
    quantize_lm_head: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Returns the parameter tree of a base as shapes and dtypes.

    Args:
      config: architecture.
      quantization: "nf4" or "nf4_dq" packs the linear layers; None keeps them dense.
      quantize_lm_head: packs the output head as well.
      dtype: of dense tensors.
    """
    tree: dict[str, Any] = {}
    for path, shape in shapes(config).items():
        leading = (config.num_hidden_layers,) if is_stacked(path) else ()
        put(tree, path, jax.ShapeDtypeStruct((*leading, *shape), jnp.dtype(dtype)))
    if quantization is None:
        return tree
    for path, (out_features, in_features, layers) in linear_modules(tree).items():
        is_packed = layers is not None and path[-1] in QUANTIZED
        if not is_packed and not (quantize_lm_head and path == HEAD):
            continue  # custom modules stay dense
        at(tree, path)["weight"] = nf4.abstract(
            (out_features, in_features),
            double_quant=quantization == "nf4_dq",
            dtype=dtype,
            leading=() if layers is None else (layers,),
        )
    return tree


def tree_size(tree: Any) -> int:
    """Returns the number of elements of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check_weights(
    drawn: Collection[str],
    base: Any,
    lora: LoraConfig | None,
    path: str | os.PathLike[str],
) -> None:
    """Raises if weights of custom modules are stored nowhere.

    Args:
      drawn: names of the tensors that were drawn, not loaded.
      base: parameter tree.
      lora: configuration of the adapter, which may hold full tensors.
      path: directory of the base, for the message.

    Raises:
      UserError: tensors that neither the directory nor the adapter holds.
    """
    if not drawn:
        return
    full_tensors = () if lora is None else select(base, lora).full_tensors
    stored = {".".join(t.path) for t in full_tensors if all(t.trained)}
    lost = sorted(set(drawn) - stored)
    if lost:
        raise UserError(
            f"`{path}` has no {', '.join(lost)}, which your modules need. Train them "
            "in full, so that the adapter holds them (`modules_to_save`), or save a "
            "base that has them: `model, base = add_parameters(model, base, key)`, "
            "then `convert.save_llama(directory, model.config, base)`."
        )
