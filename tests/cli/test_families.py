"""The commands on a small model of every family."""

import json

import jax
import numpy as np
import pytest

import convert
import qlora_jax as qj
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.params import abstract_base
from tests.byte_tokenizers import byte_tokenizer
from tests.lora.reference import draw

VOCAB = 259  # the bytes and three more
EXACT = {"dtype": "float32", "quantization": None}
# float32 logits of order one; merged weights are rounded once to float32.
LOGITS = 3e-5


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    """A directory with random weights, which trained ones are about as large as."""
    family = FAMILIES[request.param]
    raw = {
        "model_type": request.param,
        "architectures": [family.architectures[0]],
        **dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64),
        **dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        **dict(head_dim=8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1),
    }
    if "sliding_window" in family.fields:
        raw["sliding_window"] = 8
    if family.window_is_optional:
        raw |= {"use_sliding_window": True, "max_window_layers": 1}
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(0)

    def leaf(path, like):
        value = rng.standard_normal(like.shape, np.float32)
        is_norm = "norm" in jax.tree_util.keystr(path)
        return value * 0.1 + (not family.norm_offset) if is_norm else 0.2 * value

    base = jax.tree_util.tree_map_with_path(leaf, abstract_base(config))
    # Of Qwen2, transformers adds this one to a tokenizer that lacks it.
    specials = ("<s>", "</s>", "<|endoftext|>")
    byte_tokenizer(specials=specials).save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "model"
    convert.save_llama(path, config, base, tokenizer_from=tmp_path / "tokenizer")
    return path, config, base


def logits(path, tokens, **settings):
    return qj.load(path, **EXACT, **settings).logits(tokens)


def test_every_command_takes_every_family(model, tmp_path, cli, run):
    path, config, base = model

    def report(call, *args, status=0):
        got, out, err = call(*args, "--json")
        assert got == status, err
        return json.loads(out)

    tokens = [list(b"once upon a time, twice")]
    plain = logits(path, tokens)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=("model.norm",))
    for name, seed in (("a", 0), ("b", 1)):
        tree = draw(base, lora, seed, spread=0.1)
        tree["model"]["norm"] = draw(base, lora, 0)["model"]["norm"]
        convert.save_adapter(
            *(tmp_path / name, lora, tree, config), base_model_name_or_path=str(path)
        )
    adapted = logits(tmp_path / "a", tokens)
    assert np.abs(adapted - plain).max() > 100 * LOGITS

    # Adapters: merged, compared, summed.
    merged = tmp_path / "merged"
    report(cli, "merge", tmp_path / "a", merged, "--onto", "original")
    bound = LOGITS * max(1, np.abs(adapted).max())
    assert np.abs(logits(merged, tokens) - adapted).max() <= bound
    same = report(run, "verify", path, path, "--logits", status=0)
    assert not same["different"]
    other = report(run, "verify", path, merged, "--logits", status=1)
    assert other["different"] and not other["missing"] and not other["extra"]
    pair = ("--adapters", tmp_path / "a", tmp_path / "b", "--weights", 0.5, 0.5)
    report(run, "combine", tmp_path / "sum", *pair)
    assert convert.check_adapter(tmp_path / "sum", config).r == 4
    counts = report(cli, "inspect", tmp_path / "a")
    assert counts["trainable_parameters"] == sum(
        leaf.size
        for leaf in jax.tree.leaves(convert.load_adapter(tmp_path / "a", base)[1])
    )

    # The vocabulary: a token more, as a row of every table.
    grown = tmp_path / "grown"
    added = report(cli, "tokens", path, "--add", "<ask>", "--output-dir", grown)
    assert added["new_tokens"] == [VOCAB]
    assert np.abs(logits(grown, tokens)[..., :VOCAB] - plain).max() <= bound

    # Text, on the model and in 4 bits.
    packed = tmp_path / "packed"
    report(cli, "quantize", path, packed)
    (tmp_path / "text.txt").write_text("once upon a time, twice upon another\n")
    data = ("--data.path", tmp_path / "text.txt", "--data.max-length", 16)
    assert np.isfinite(report(cli, "eval", packed, *data)["loss"])
    prompt = ("--prompt", "once", "--max-new-tokens", 2, "--temperature", 0)
    status, out, err = cli("generate", tmp_path / "a", *prompt)
    assert status == 0 and out.startswith("once"), err
