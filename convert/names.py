"""The key table: Hugging Face tensor names <-> paths in our parameter tree.

`qlora_jax.tree` spells a path as a Hugging Face key and back. PEFT writes the same
module names behind `base_model.model.`. `shapes` lists the tensors of a configuration;
everything that is read or written is checked against it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import LlamaConfig
from qlora_jax.tree import LAYERS as LAYERS
from qlora_jax.tree import PROJECTIONS
from qlora_jax.tree import Path as Path
from qlora_jax.tree import Shape as Shape
from qlora_jax.tree import hf_key as hf_key
from qlora_jax.tree import is_stacked as is_stacked
from qlora_jax.tree import parse_key as parse_key
from qlora_jax.tree import put as put
from qlora_jax.tree import walk as walk

PEFT_PREFIX = "base_model.model."


def is_projection(path: Path) -> bool:
    """Whether `path` is the weight of one of the linear layers that are quantized."""
    return path[-1] == "weight" and path[-2] in PROJECTIONS


def shapes(config: LlamaConfig) -> dict[Path, Shape]:
    """Lists every tensor of a model and its shape in the file (one layer's).

    Order: embeddings, the parts of a layer, final norm, output head, tensors of modules
    that no Llama has (`config.extra_tensors`). A tied model has no head of its own.
    """
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    out: dict[Path, Shape] = {
        ("model", "embed_tokens", "weight"): (config.vocab_size, d)
    }
    out[*LAYERS, "input_layernorm", "weight"] = (d,)
    for block, biased, linears in (
        (
            "self_attn",
            config.attention_bias,
            {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)},
        ),
        (
            "mlp",
            config.mlp_bias,
            {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)},
        ),
    ):
        for name, shape in linears.items():
            out[*LAYERS, block, name, "weight"] = shape
            if biased:
                out[*LAYERS, block, name, "bias"] = shape[:1]
        if block == "self_attn":
            out[*LAYERS, "post_attention_layernorm", "weight"] = (d,)
    out["model", "norm", "weight"] = (d,)
    if not config.tie_word_embeddings:
        out["lm_head", "weight"] = (config.vocab_size, d)
    for name, shape in config.extra_tensors.items():
        out[tuple(name.split("."))] = tuple(shape)
    return out


def layers_of(path: Path, config: LlamaConfig) -> list[int | None]:
    """The layer numbers to spell `path` with: [None] where it is not stacked."""
    return list(range(config.num_hidden_layers)) if is_stacked(path) else [None]


def keys(config: LlamaConfig) -> dict[str, tuple[Path, int | None]]:
    """Every Hugging Face key of a dense checkpoint, layer by layer."""
    table = list(shapes(config))
    stacked = [p for p in table if is_stacked(p)]
    first = table.index(stacked[0])
    out: dict[str, tuple[Path, int | None]] = {}
    for path in table[:first]:
        out[hf_key(path)] = (path, None)
    for layer in range(config.num_hidden_layers):
        for path in stacked:
            out[hf_key(path, layer)] = (path, layer)
    for path in table[first:]:
        if not is_stacked(path):
            out[hf_key(path)] = (path, None)
    return out


def abstract_base(config: LlamaConfig) -> dict[str, Any]:
    """The parameter tree as shapes only, to ask the core which modules are adapted."""
    tree: dict[str, Any] = {}
    for path, shape in shapes(config).items():
        leading = (config.num_hidden_layers,) if is_stacked(path) else ()
        put(tree, path, jax.ShapeDtypeStruct((*leading, *shape), jnp.float32))
    return tree


def leaf_dtype(leaf: Any) -> str:
    """Name of an array's dtype ("bfloat16"), be it numpy's or jax's."""
    return np.dtype(leaf.dtype).name
