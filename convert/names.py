"""The key table: Hugging Face tensor names <-> paths in our parameter tree.

One rule carries all of it. A path is the dotted name cut at its dots, with the layer
number taken out, because layers are stacked; the inverse puts the number back:

    model.layers.3.self_attn.q_proj.weight  <->  (model, layers, self_attn, q_proj,
                                                  weight), layer 3
    lm_head.weight                          <->  (lm_head, weight), no layer

PEFT writes the same module names behind `base_model.model.`. `shapes` lists what a
configuration has; everything that is read or written is checked against it.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import PROJECTIONS, LlamaConfig
from qlora_jax.tree import put as put
from qlora_jax.tree import walk as walk

Path = tuple[str, ...]
Shape = tuple[int, ...]

LAYERS: Path = ("model", "layers")
PEFT_PREFIX = "base_model.model."

_LAYER_KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")


def hf_key(path: Path, layer: int | None = None) -> str:
    """Spells `path` (of one layer, where stacked) as Hugging Face does."""
    if layer is None:
        return ".".join(path)
    cut = len(LAYERS)
    return ".".join((*path[:cut], str(layer), *path[cut:]))


def parse_key(key: str) -> tuple[Path, int | None]:
    """Inverse of `hf_key`."""
    found = _LAYER_KEY.fullmatch(key)
    if found is None:
        return tuple(key.split(".")), None
    return (*LAYERS, *found[2].split(".")), int(found[1])


def is_stacked(path: Path) -> bool:
    """Whether the tensor at `path` has a leading layer axis."""
    return path[: len(LAYERS)] == LAYERS


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
