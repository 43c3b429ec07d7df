"""Adapters of a resized vocabulary, as the installed PEFT saves and loads them."""

import copy

import numpy as np
import pytest

import convert
from qlora_jax.runs.loading import load

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

OLD, NEW = 20, 24
ROWS = {"embed_tokens": [1, OLD], "lm_head": [2, OLD + 1]}
# Settings of PEFT, and what `save_embedding_layers` is.
KINDS = {
    "update of a projection": ({}, "auto"),
    "both in full": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "one in full": ({"modules_to_save": ["embed_tokens"]}, True),
    "rows": ({"trainable_token_indices": [1, OLD]}, "auto"),
    "rows of both": ({"trainable_token_indices": ROWS}, True),
    "updates of both": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "auto",
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, torch, transformers, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=OLD,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=request.param,
    )
    path = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_adapter_computes_what_peft_does(
    torch, transformers, peft, base, tmp_path, kind
):
    fields, save = copy.deepcopy(KINDS[kind])
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(NEW)
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings | fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    tokens = np.arange(NEW)[None]
    want = model.eval()(torch.tensor(tokens)).logits.detach().numpy()

    exact = {"dtype": "float32", "quantization": None, "resize_to_adapter": True}
    ours = load(base, adapter=tmp_path / "adapter", **exact)
    np.testing.assert_allclose(ours.logits(tokens), want, atol=3e-5)
    # Saved again with its tables, PEFT reads it on a base of that size.
    stored, tree = convert.load_llama(base, quantization=None)
    grown = convert.with_saved_tables(stored, tree, tmp_path / "adapter", resize=True)
    lora, adapters = convert.load_adapter(tmp_path / "adapter", grown.base)
    out = tmp_path / "again"
    convert.save_adapter(out, lora, adapters, grown.config, base_tables=grown.tables)
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(NEW)
    theirs = peft.PeftModel.from_pretrained(theirs, out).eval()
    got = theirs(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(got, want, atol=3e-5)
