"""The text model within a checkpoint of images and text."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.checkpoint import open_checkpoint
from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig

pytestmark = pytest.mark.golden

OUTER = {"vision_config": {"hidden_size": 8}, "eos_token_id": [1, 106]}


@pytest.fixture(params=["4", "5"])
def directory(request, golden, tmp_path):
    """Two families' checkpoints within a larger one, as each transformers has it."""
    folders = []
    for name, outer_type in (("gemma3_text", "gemma3"), ("mistral", "mistral3")):
        source = golden / "families" / name / "fp32"
        text = json.loads((source / "config.json").read_text())
        del text["architectures"]
        tensors = {}
        for key, tensor in load_file(source / "model.safetensors").items():
            new = f"language_model.{key}"
            if request.param == "5" and key.startswith("model."):
                new = f"model.language_model.{key.removeprefix('model.')}"
            elif request.param == "5":
                new = key
            tensors[new] = tensor
        first = "model." if request.param == "5" else ""
        tensors[f"{first}vision_tower.patch.weight"] = np.zeros((4, 8), np.float32)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        raw = {"model_type": outer_type, "text_config": text, **OUTER}
        (folder / "config.json").write_text(json.dumps(raw))
        folders.append((source, folder))
    return folders


def test_it_is_the_model_that_stands_alone(directory, tmp_path):
    for source, folder in directory:
        config, base = convert.load_llama(folder, quantization=None)
        alone_config, alone = convert.load_llama(source, quantization=None)
        jax.tree.map(np.testing.assert_array_equal, base, alone)
        assert config.model_type == alone_config.model_type
        assert config.layer_kinds == alone_config.layer_kinds
        (note,) = open_checkpoint(folder).notes
        assert "1 tensors (0.00 GB) of vision_tower" in note
        convert.save_llama(tmp_path / f"out_{source.parent.name}", config, base)
        again, written = convert.load_llama(
            tmp_path / f"out_{source.parent.name}", quantization=None
        )
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, written, alone)


def test_a_text_config_may_leave_out_what_is_as_in_the_class():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    raw = {"model_type": "gemma3", "text_config": text | {"intermediate_size": 10240}}
    config = LlamaConfig.from_hf(raw)
    assert (config.vocab_size, config.num_attention_heads, config.head_dim) == (
        262208,
        8,
        256,
    )
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}},
            "text_config.model_type='ministral3' is not supported",
        ),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}},
            "model_type='llava' is not supported",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "mistral"}},
            "'mistral' within a 'gemma3' is not supported; 'gemma3_text' is",
        ),
        ({"model_type": "gemma3", "text_config": 3}, "needs a `text_config`.*got 3"),
        ({"model_type": "mistral3"}, "needs a `text_config`.*got None"),
        (
            {
                "model_type": "gemma3",
                "architectures": ["Gemma3ForSequenceClassification"],
                "text_config": {"model_type": "gemma3_text"},
            },
            "Not a causal language model.*Gemma3ForConditionalGeneration",
        ),
    ],
)
def test_other_text_models_are_refused(raw, message):
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf(raw)


@pytest.mark.parametrize("has_head", [True, False])
def test_of_two_words_on_tying_the_head_decides(directory, has_head):
    (_, folder) = directory[1]
    raw = json.loads((folder / "config.json").read_text())
    raw["tie_word_embeddings"] = True  # the larger class's default
    raw["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    head = next(key for key in tensors if key.endswith("lm_head.weight"))
    if not has_head:
        del tensors[head]
        save_file(tensors, folder / "model.safetensors")
    config, base = convert.load_llama(folder, quantization=None)
    assert config.tie_word_embeddings is not has_head
    assert ("lm_head" in base) is has_head
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("model_type", "family"), [("gemma3", "gemma3_text"), ("mistral3", "mistral")]
)
def test_a_text_config_may_leave_out_its_family(model_type, family, tiny):
    text = {k: v for k, v in tiny.items() if k not in ("model_type", "architectures")}
    raw = {"model_type": model_type, "text_config": text}
    assert LlamaConfig.from_hf(raw).model_type == family
