# Sums of adapters, as the installed PEFT reads and computes them.

import dataclasses

import numpy as np
import pytest

import convert
from qlora_jax.lora.combine import combine_adapters
from qlora_jax.lora.functional import bind
from tests.lora.reference import LORAS as PLAIN
from tests.lora.reference import config, draw, logits

pytestmark = [
    pytest.mark.peer,
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# The tolerance of tests/test_golden.py: the reference's own float32 spread.
LOGITS = 3e-5

LORAS = PLAIN | {
    "layers": dataclasses.replace(PLAIN["one layer"], layers_to_transform=(1, 3)),
    "tying": config("embed_tokens", "q_proj", r=2, ensure_weight_tying=True),
    "biased": config("k_proj", "o_proj", r=2, lora_bias=True),
    "whole": config("q_proj", r=2, modules_to_save=("lm_head",)),
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


def drawn(base, names):
    """(Configuration, trained tree, weight) of each, with different numbers."""
    for seed, (name, weight) in enumerate(zip(names, WEIGHTS, strict=False)):
        tree = draw(base, LORAS[name], seed, spread=0.1)
        if name == "whole":  # equal in all, as a sum needs it
            table = base["model"]["embed_tokens"]["weight"]
            tree["lm_head"]["weight"] = np.array(table)
        yield LORAS[name], tree, weight


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("model", ["llama32/fp32", "llama2/fp32_sharded"])
@pytest.mark.parametrize("names", SUMS.values(), ids=SUMS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but")
def test_peft_computes_the_sum(
    golden, peft, theirs, their_logits, tokens, tmp_path, names, model, method
):
    llama, base = convert.load_llama(golden / model, quantization=None)
    lora, tree = combine_adapters([*drawn(base, names)], base, method=method)
    convert.save_adapter(tmp_path / "sum", lora, tree, llama)
    ours = logits(llama, base, bind(tree, base, lora), tokens)
    plain = theirs(golden / model)
    without = their_logits(plain)
    # PEFT warns of missing keys, and a warning is an error here.
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "sum")
    report = adapted.load_adapter(tmp_path / "sum", "default")
    assert not report.unexpected_keys
    got = their_logits(adapted)
    assert np.abs(got - ours).max() <= LOGITS
    assert np.abs(got - without).max() > 100 * LOGITS


def test_cat_is_what_peft_calls_cat(
    golden, peft, theirs, their_logits, tokens, tmp_path
):
    model, weights = golden / "llama2/fp32_sharded", [0.7, 1.3]
    llama, base = convert.load_llama(model, quantization=None)
    pairs = [pair for *pair, _ in drawn(base, ("plain", "rslora"))]
    for name, (lora, tree) in zip(("zero", "one"), pairs, strict=True):
        convert.save_adapter(tmp_path / name, lora, tree, llama)
    adapted = peft.PeftModel.from_pretrained(theirs(model), tmp_path / "zero", "zero")
    adapted.load_adapter(tmp_path / "one", "one")
    names = ["zero", "one"]
    adapted.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    adapted.set_adapter("sum")
    parts = [(*pair, w) for pair, w in zip(pairs, weights, strict=True)]
    lora, tree = combine_adapters(parts, base)
    ours = logits(llama, base, bind(tree, base, lora), tokens)
    assert np.abs(their_logits(adapted) - ours).max() <= LOGITS
