# Sums of adapters, as the installed PEFT reads and computes them.

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.lora.combine import combine_adapters
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters, bind
from qlora_jax.lora.targets import select
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama

pytestmark = [
    pytest.mark.peer,
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# The tolerance of tests/test_golden.py: the reference's own float32 spread.
LOGITS = 3e-5

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
    "layers": LoraConfig(
        r=2, lora_alpha=7, target_modules=("o_proj",), layers_to_transform=(1, 3)
    ),
    "tables": LoraConfig(
        r=3, lora_alpha=2, target_modules=("embed_tokens", "k_proj", "lm_head")
    ),
    "tying": LoraConfig(
        r=2, target_modules=("embed_tokens", "q_proj"), ensure_weight_tying=True
    ),
    "biased": LoraConfig(r=2, target_modules=("k_proj", "o_proj"), lora_bias=True),
    "whole": LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)),
}
SUMS = {
    "all": ("plain", "rslora", "patterns", "layers"),
    "few": ("rslora", "layers"),
    "tables": ("tables", "layers", "rslora"),
    "tying": ("tying", "layers"),
    "tying and not": ("tying", "tables"),
    "biased": ("biased", "rslora", "patterns"),
    "whole": ("whole", "whole"),
}
WEIGHTS = (0.7, -1.3, 0.5, 1.0)


def draw(base, lora, seed):
    """A trained tree of random numbers, zero where ranks are padded."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
        abstract_adapters(base, lora),
    )
    if "lm_head" in tree and "weight" in tree["lm_head"]:
        tree["lm_head"]["weight"] = np.array(base["model"]["embed_tokens"]["weight"])
    for a in select(base, lora).adapted:
        if a.layers is None:
            continue
        node = tree
        for part in a.path:
            node = node[part]
        for layer, rank in enumerate(a.ranks):
            node["lora_A"][layer, rank:] = 0
            node["lora_B"][layer, :, rank:] = 0
    return tree


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("model", ["llama32/fp32", "llama2/fp32_sharded"])
@pytest.mark.parametrize("names", SUMS.values(), ids=SUMS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but")
def test_peft_computes_the_sum(
    golden, peft, theirs, their_logits, tokens, tmp_path, names, model, method
):
    config, base = convert.load_llama(golden / model, quantization=None)
    parts = [
        (LORAS[n], draw(base, LORAS[n], seed), weight)
        for seed, (n, weight) in enumerate(zip(names, WEIGHTS, strict=False))
    ]
    lora, tree = combine_adapters(parts, base, method=method)
    convert.save_adapter(tmp_path / "sum", lora, tree, config)
    run = jax.jit(Llama(config, Compute("float32")).apply)
    variables = {"params": base, "lora": bind(tree, base, lora)}
    ours = np.asarray(run(variables, jnp.asarray(tokens)))
    plain = theirs(golden / model)
    without = their_logits(plain, tokens)
    # PEFT warns of missing keys, and a warning is an error here.
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "sum")
    report = adapted.load_adapter(tmp_path / "sum", "default")
    assert not report.unexpected_keys
    got = their_logits(adapted, tokens)
    assert np.abs(got - ours).max() <= LOGITS
    assert np.abs(got - without).max() > 100 * LOGITS


def test_cat_is_what_peft_calls_cat(
    golden, peft, theirs, their_logits, tokens, tmp_path
):
    model = golden / "llama2/fp32_sharded"
    config, base = convert.load_llama(model, quantization=None)
    parts = [
        (LORAS[n], draw(base, LORAS[n], i)) for i, n in enumerate(("plain", "rslora"))
    ]
    adapted = theirs(model)
    for i, (lora, tree) in enumerate(parts):
        convert.save_adapter(tmp_path / str(i), lora, tree, config)
    adapted = peft.PeftModel.from_pretrained(adapted, tmp_path / "0", "zero")
    adapted.load_adapter(tmp_path / "1", "one")
    weights = [0.7, 1.3]
    adapted.add_weighted_adapter(
        ["zero", "one"], weights, "sum", combination_type="cat"
    )
    adapted.set_adapter("sum")
    lora, tree = combine_adapters(
        [(*part, w) for part, w in zip(parts, weights, strict=True)], base
    )
    run = jax.jit(Llama(config, Compute("float32")).apply)
    variables = {"params": base, "lora": bind(tree, base, lora)}
    ours = np.asarray(run(variables, jnp.asarray(tokens)))
    assert np.abs(their_logits(adapted, tokens) - ours).max() <= LOGITS
