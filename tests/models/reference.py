"""A small model: its weights, adapters and rows, and its logits in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import nf4
from qlora_jax.data.encoding import IGNORE
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import is_projection

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,  # not a multiple of 64: packed flat
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
)


@functools.cache
def base(config=CONFIG, packed=False):
    """Random weights; perhaps with the projections in double-quantized NF4."""
    init = jax.jit(Llama(config, Compute("float32")).init)
    tree = init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    def pack(path, leaf):
        if not is_projection(tuple(key.key for key in path)):
            return leaf
        layers = [nf4.quantize(np.asarray(w), double_quant=True) for w in leaf]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return jax.tree_util.tree_map_with_path(pack, tree) if packed else tree


def dequantized(tree):
    def is_packed(leaf):
        return isinstance(leaf, nf4.NF4Tensor)

    return jax.tree.map(
        lambda leaf: nf4.dequantize(leaf) if is_packed(leaf) else leaf,
        tree,
        is_leaf=is_packed,
    )


@functools.cache
def adapters(lora, config=CONFIG):
    """Adapters of the packed model that do something: B is not zero."""
    tree = init_adapters(jax.random.key(1), base(config, packed=True), lora)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        a + 0.05 * jax.random.normal(k, a.shape)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def prompt(batch=2, length=12, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 61, (batch, length)), jnp.int32)


def rows(count, length=16, seed=0):
    """Tokens and labels; each row is supervised from another position on."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 61, (count, length))
    start = rng.integers(0, length - 2, (count, 1))
    labels = np.where(np.arange(length) < start, IGNORE, tokens)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32),
    }


def equations(jaxpr):
    """Every equation of a program, those of its loops and functions as well."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(dict(equation.params)):
            inner = getattr(value, "jaxpr", value)  # closed or not
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def numpy_llama(tree, tokens, config=CONFIG):
    """The model in float64 numpy, written from the formulas."""
    model = jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width, length = config.head_dim, tokens.shape[1]
    frequency = config.rope_theta ** (-np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * frequency
    turn = np.exp(1j * angle)[None, :, None]

    def norm(x, weight):
        size = np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        return x / size * weight

    def rotated(x):
        z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = model["model"]["embed_tokens"]["weight"][np.asarray(tokens)]
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], model["model"]["layers"])
        a, m = layer["self_attn"], layer["mlp"]
        h = norm(x, layer["input_layernorm"]["weight"])

        def split(name, count, a=a, h=h):
            return (h @ a[name]["weight"].T).reshape(*h.shape[:2], count, width)

        q, k = rotated(split("q_proj", heads)), rotated(split("k_proj", groups))
        v = np.repeat(split("v_proj", groups), heads // groups, 2)
        k = np.repeat(k, heads // groups, 2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(width)
        scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bnts,bsnh->btnh", weights, v).reshape(*x.shape[:2], -1)
        x = x + out @ a["o_proj"]["weight"].T
        h = norm(x, layer["post_attention_layernorm"]["weight"])
        gate = h @ m["gate_proj"]["weight"].T
        h = gate / (1 + np.exp(-gate)) * (h @ m["up_proj"]["weight"].T)
        x = x + h @ m["down_proj"]["weight"].T
    x = norm(x, model["model"]["norm"]["weight"])
    return x @ model.get("lm_head", model["model"]["embed_tokens"])["weight"].T
