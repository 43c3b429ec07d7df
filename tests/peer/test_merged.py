# What was merged, read by transformers: it needs no PEFT, and computes what PEFT does.

import numpy as np
import pytest

import convert

pytestmark = [
    pytest.mark.peer,
    pytest.mark.golden,
    # PEFT advises on tied tables, biases and names; what counts is computed below.
    pytest.mark.filterwarnings("ignore"),
]

LOGITS = 3e-5
BOTH = ["embed_tokens", "lm_head"]
CASES = {
    # (base, arguments of PEFT's LoraConfig)
    "DoRA everywhere": (
        *(
            "llama32",
            dict(target_modules=["q_proj", "down_proj", *BOTH], use_dora=True),
        ),
    ),
    "tied, as one": (
        *("llama32", dict(target_modules=["q_proj", *BOTH], ensure_weight_tying=True)),
    ),
    "biases that the base has not": (
        *("llama2", dict(target_modules=["k_proj", "up_proj"], lora_bias=True)),
    ),
    "biases that it has": (
        *("llamabias", dict(target_modules="all-linear", lora_bias=True, bias="all")),
    ),
    "rows of a tied table, and its head": (
        "llama32",
        dict(target_modules=["lm_head", "v_proj"], trainable_token_indices=[5, 17, 3]),
    ),
    "whole modules": (
        "llama2",
        dict(target_modules=["o_proj"], modules_to_save=["norm", "layers.1.mlp"]),
    ),
}
FOLDERS = {"llama32": "fp32", "llama2": "fp32_sharded", "llamabias": "fp32"}


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_peft_does(
    golden, torch, peft, theirs, their_logits, our_logits, tmp_path, name
):
    family, arguments = CASES[name]
    base = golden / family / FOLDERS[family]
    torch.manual_seed(0)
    # Random, but for biases, which PEFT takes with its default start alone.
    fields = dict(
        init_lora_weights=arguments.get("lora_bias", False), r=4, lora_alpha=6
    )
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields, **arguments)
    model = peft.get_peft_model(theirs(base), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad or "magnitude" in key:
                continue
            if "lora_embedding" in key:  # N(0, 1): logits would be of order 100
                parameter.mul_(0.2)
            parameter.add_(0.05 * torch.randn(parameter.shape))
    expected = their_logits(model)
    model.save_pretrained(tmp_path / "adapter")
    plain = their_logits(theirs(base))
    assert np.abs(expected - plain).max() > 100 * LOGITS
    report = convert.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = their_logits(theirs(tmp_path / "merged"))
    assert np.abs(merged - expected).max() <= LOGITS, report
    assert np.abs(our_logits(tmp_path / "merged") - expected).max() <= LOGITS
