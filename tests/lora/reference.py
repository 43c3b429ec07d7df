"""Small models and adapters, and what adapters compute, for comparison."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters, bind
from qlora_jax.lora.targets import select
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import abstract_base, is_projection

L, D, F, K, V = 3, 64, 96, 32, 37
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,  # not a multiple of 64: packed flat
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def config_of(tied=False, biases=False):
    return dataclasses.replace(
        CONFIG, tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases
    )


def abstract(tied=False, biases=False, packed=False):
    """Shapes of the model that `random_base` returns."""
    quantization = "nf4_dq" if packed else None
    config = config_of(tied, biases)
    return abstract_base(config, quantization=quantization, dtype="float32")


@functools.cache
def random_base(tied=False, biases=False, packed=False, spread=0.1):
    """Random weights, norms and biases; packed or not, projections are the same."""

    def draw(path, leaf):
        names = tuple(key.key for key in path)
        rng = np.random.default_rng(list(".".join(names).encode()))
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        if "norm" in names[-2]:
            return jnp.asarray(1 + 0.1 * value)
        if packed and is_projection(names):
            layers = [nf4.quantize(spread * w, double_quant=True) for w in value]
            return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        return jnp.asarray(spread * value)

    return jax.tree_util.tree_map_with_path(draw, abstract(tied, biases))


TOKENS = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)
# float32 logits of order one, summed in another order.
LOGITS = 1e-5


def config(*targets, **fields):
    """The configuration of an adapter of these modules, by default q_proj."""
    return LoraConfig(target_modules=targets or ("q_proj",), **fields)


# Different ranks, scalings, targets and layers; each can be combined with each but the
# last two, whose parts replace tensors of the base instead of adding to them.
LORAS = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    "rslora": config("q_proj", "down_proj", r=3, lora_alpha=5, use_rslora=True),
    "patterns": config(
        *("v_proj", "up_proj", "lm_head"),
        **dict(r=2, lora_alpha=3, alpha_pattern={"lm_head": 1.5}),
        rank_pattern={r"layers\.1\.mlp\.up_proj": 5, "v_proj": 1},
    ),
    "one layer": config("o_proj", r=2, lora_alpha=7, layers_to_transform=1),
    "tables": config("embed_tokens", "lm_head", "k_proj", r=3, lora_alpha=2),
    "heads": config(r=2, modules_to_save=("norm", "lm_head")),
    "rows": config(r=2, trainable_token_indices=(3, 1)),
}


def draw(base, lora, seed=0, spread=0.4):
    """A trained tree of random numbers, zero where ranks are padded."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        if any(word in jax.tree_util.keystr(path) for word in ("magnitude", "norm")):
            return rng.uniform(0.5, 1.5, like.shape).astype(np.float32)
        return spread * rng.standard_normal(like.shape, np.float32)

    tree = jax.tree_util.tree_map_with_path(leaf, abstract_adapters(base, lora))
    selection = select(base, lora)
    for a in selection.adapted:
        for name in () if a.tied_to else a.parts:
            array = trees.at(tree, a.path)[name]
            for layer, rank in zip(layers_of(a), a.ranks, strict=True):
                if name.endswith("_A"):
                    array[layer][rank:] = 0
                elif name.endswith("_B"):
                    array[layer][:, rank:] = 0
                elif not rank:
                    array[layer] = 0
    for tensor in selection.full_tensors:
        if not all(tensor.trained):
            trees.at(tree, tensor.path)[~np.array(tensor.trained)] = 0
    return tree


def layers_of(a):
    """What each layer of an adapted module's arrays is indexed with."""
    return [()] if a.layers is None else [(layer,) for layer in range(a.layers)]


def by_layer(base, lora):
    """(Module, dotted name, index, rank, scaling) of each layer that is adapted."""
    for a in select(base, lora).adapted:
        names = trees.dotted(a.path, a.layers)
        for values in zip(names, layers_of(a), a.ranks, a.scalings, strict=True):
            if values[2]:
                yield a, *values


def updates(base, lora, tree):
    """Dense updates by dotted module path, in float64, and biases by path + '+'."""
    out = {}
    bound = bind(tree, base, lora)
    for a, name, layer, _, scaling in by_layer(base, lora):
        part = trees.at(bound, a.path)
        wide = {n: np.asarray(x, np.float64)[layer] for n, x in part.items()}
        middle = "embedding_" if a.kind == "embedding" else ""
        out[name] = scaling * (wide[f"lora_{middle}B"] @ wide[f"lora_{middle}A"])
        if "lora_bias" in wide:
            out[f"{name}+"] = scaling * wide["lora_bias"]
    return out


@functools.cache
def jitted(config, dtype="float32"):
    # Without recomputation, which no gradient needs here: it compiles faster.
    return jax.jit(Llama(config, Compute(dtype, remat="none")).apply)


def logits(config, base, bound=None, tokens=TOKENS, dtype="float32"):
    variables = {"params": base} if bound is None else {"params": base, "lora": bound}
    return jitted(config, dtype)(variables, tokens)
