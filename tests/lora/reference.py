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
from qlora_jax.tree import dotted

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

# Different ranks, scalings, targets and layers; each can be combined with each.
LORAS = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    "rslora": LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=("q_proj", "down_proj")
    ),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=("v_proj", "up_proj", "lm_head"),
        rank_pattern={r"layers\.1\.mlp\.up_proj": 5, "v_proj": 1},
        alpha_pattern={"lm_head": 1.5},
    ),
    "one layer": LoraConfig(
        r=2, lora_alpha=7, target_modules=("o_proj",), layers_to_transform=1
    ),
    "tables": LoraConfig(
        r=3, lora_alpha=2, target_modules=("embed_tokens", "lm_head", "k_proj")
    ),
}


# Parts that replace tensors of the base instead of adding to them.
HEADS = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("norm", "lm_head"))
ROWS = LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(3, 1))


def draw(base, lora, seed=0, spread=0.4):
    """A trained tree of random numbers, zero where ranks are padded."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
        lambda leaf: spread * rng.standard_normal(leaf.shape).astype(np.float32),
        abstract_adapters(base, lora),
    )
    for a in select(base, lora).adapted:
        for name, array in ({} if a.tied_to else trees.at(tree, a.path)).items():
            for layer, rank in zip(layers_of(a), a.ranks, strict=True):
                if name.endswith("_A"):
                    array[layer][rank:] = 0
                elif name.endswith("_B"):
                    array[layer][:, rank:] = 0
                elif name == "lora_bias" and not rank:
                    array[layer] = 0
    return tree


def layers_of(a):
    """What each layer of an adapted module's arrays is indexed with."""
    return [()] if a.layers is None else [(layer,) for layer in range(a.layers)]


def updates(base, lora, tree):
    """Dense updates by dotted module path, in float64, and biases by path + '+'."""
    out = {}
    bound = bind(tree, base, lora)
    for a in select(base, lora).adapted:
        wide = {
            n: np.asarray(v, np.float64) for n, v in trees.at(bound, a.path).items()
        }
        middle = "embedding_" if a.kind == "embedding" else ""
        names = dotted(a.path, a.layers)
        for name, layer, scaling in zip(names, layers_of(a), a.scalings, strict=True):
            if scaling:
                product = (
                    wide[f"lora_{middle}B"][layer] @ wide[f"lora_{middle}A"][layer]
                )
                out[name] = scaling * product
                if "lora_bias" in wide:
                    out[f"{name}+"] = scaling * wide["lora_bias"][layer]
    return out


@functools.cache
def jitted(config, dtype="float32"):
    # Without recomputation, which no gradient needs here: it compiles faster.
    return jax.jit(Llama(config, Compute(dtype, remat="none")).apply)


def logits(config, base, bound=None, tokens=TOKENS, dtype="float32"):
    variables = {"params": base} if bound is None else {"params": base, "lora": bound}
    return jitted(config, dtype)(variables, tokens)
