"""Loading directories of every kind, and the methods of the model."""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys

import jax
import jaxtyping
import numpy as np
import pytest

import convert
from convert.companions import companion_files
from convert.tokenizer import end_tokens, load_tokenizer
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.inference.text import (
    check_text,
    check_turns,
    per_token_array,
    token_array,
)
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.runs.loading import load, resolve

ADAPTER = "stories260K-lora-r8-shakespeare"


@pytest.fixture
def adapter_dir(llama_dir, tmp_path):
    """A PEFT directory of `llama_dir` that changes its outputs."""
    config, base = convert.load_llama(llama_dir)
    lora = LoraConfig(r=2, target_modules=("q_proj", "v_proj"))
    adapters = init_adapters(jax.random.key(0), base, lora)
    adapters = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, adapters)
    folder, base = tmp_path / "adapter", str(llama_dir)
    convert.save_adapter(folder, lora, adapters, config, base_model_name_or_path=base)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", None])
def test_a_model_is_plain_data(llama_dir, quantization):
    model = load(llama_dir, quantization=quantization, dtype="float32")
    assert model.adapters is None and model.lora_config is None
    assert model.tokenizer is None and model.path == llama_dir
    weight = model.base["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert isinstance(weight, NF4Tensor) == (quantization is not None)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.base))
    tokens = [1, 2, 3, 4]
    logits = model.logits([tokens])
    assert logits.shape == (1, 4, 32) and logits.dtype == np.float32
    # Padding changes nothing where it is masked.
    longer, mask = [[9, 9, *tokens]], {"attention_mask": [[0, 0, 1, 1, 1, 1]]}
    placed = model.logits(longer, **mask, positions=[[0, 0, 0, 1, 2, 3]])
    np.testing.assert_allclose(placed[:, 2:], logits, atol=1e-5)
    padded = model.logits(longer, **mask)
    np.testing.assert_allclose(padded[:, 2:], logits, atol=1e-4)
    apart = {"segment_ids": [[1] * 4 + [2] * 4], "positions": [[0, 1, 2, 3] * 2]}
    packed = model.logits([tokens * 2], **apart)
    np.testing.assert_allclose(packed[:, 4:], logits, atol=1e-5)


@pytest.mark.parametrize("way", ["adapter=", "path", "run directory", "base="])
def test_an_adapter_is_attached(llama_dir, adapter_dir, tmp_path, way):
    moved = shutil.copytree(llama_dir, tmp_path / "moved")
    arguments = {
        "adapter=": {"path": llama_dir, "adapter": adapter_dir},
        "path": {"path": adapter_dir},
        "run directory": {"path": tmp_path},
        "base=": {"path": adapter_dir, "base": moved},
    }[way]
    model = load(**arguments, dtype="float32")
    assert model.path == (moved if way == "base=" else llama_dir)
    assert model.lora_config.r == 2
    tokens = [[1, 2, 3]]
    plain = load(llama_dir, dtype="float32").logits(tokens)
    assert np.abs(model.logits(tokens) - plain).max() > 1e-3
    _, adapters = convert.load_adapter(adapter_dir, model.config)
    jax.tree.map(np.testing.assert_array_equal, model.adapters, adapters)
    # From memory the same; a tree that does not belong to the configuration is refused.
    lora, logits = model.lora_config, model.logits(tokens)
    bare = model.attach(None)
    np.testing.assert_array_equal(
        bare.with_adapters(adapters, lora).logits(tokens), logits
    )
    with pytest.raises(UserError):
        bare.with_adapters(adapters, dataclasses.replace(lora, r=4))


def test_the_base_of_an_adapter(llama_dir, adapter_dir, tmp_path, monkeypatch):
    file = adapter_dir / "adapter_config.json"

    def name(value):
        raw = json.loads(file.read_text())
        file.write_text(json.dumps({**raw, "base_model_name_or_path": value}))

    shutil.copytree(llama_dir, tmp_path / "beside")
    for value in ("beside", "../beside"):
        name(value)
        assert resolve(adapter_dir).base.samefile(tmp_path / "beside")
    monkeypatch.chdir(tmp_path)
    name("beside")
    assert resolve(adapter_dir).base.samefile(tmp_path / "beside")
    name("meta-llama/Llama-3.2-1B")
    with pytest.raises(CheckpointError, match=r"'meta-llama/Llama-3.2-1B', which is"):
        resolve(adapter_dir)
    name(None)
    with pytest.raises(CheckpointError, match="does not say what its base is"):
        resolve(adapter_dir)
    with pytest.raises(CheckpointError, match="The base `nowhere` is not a directory"):
        resolve(adapter_dir, "nowhere")


@pytest.mark.real
def test_the_base_of_a_shared_adapter_is_found(shared_data):
    adapter = shared_data / "adapters" / ADAPTER
    assert resolve(adapter).base.samefile(shared_data / "stories260K")
    model = load(adapter, quantization=None, dtype="float32")
    texts = model.generate(["Once"], max_new_tokens=8)
    plain = load(shared_data / "stories260K", quantization=None, dtype="float32")
    assert texts[0].startswith("Once")
    assert plain.generate(["Once"], max_new_tokens=8) != texts


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char105"])
def test_greedy_texts_are_those_of_hugging_face(shared_data, name):
    stored = json.loads((shared_data / name / "greedy.json").read_text())
    model = load(shared_data / name, quantization=None, dtype="float32")
    texts = model.generate([row["prompt"] for row in stored], max_new_tokens=60)
    assert texts == [row["text"] for row in stored]


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K-bnb-nf4", "stories260K-bnb-nf4-dq"])
def test_bitsandbytes_directories_generate(shared_data, name):
    """Packed by bitsandbytes and packed here: the same weights, the same text."""
    model = load(shared_data / name, quantization=None, dtype="float32")
    weight = model.base["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert isinstance(weight, NF4Tensor)
    quantization = "nf4_dq" if name.endswith("dq") else "nf4"
    ours = load(shared_data / "stories260K", quantization=quantization, dtype="float32")
    prompts = ["Once upon a time", "The"]
    texts = model.generate(prompts, max_new_tokens=30)
    assert texts == ours.generate(prompts, max_new_tokens=30)
    assert all(map(str.startswith, texts, prompts))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantization": "int8"}, UserError, "`quantization` must be 'nf4', 'nf4_dq'"),
        ({"dtype": "float64"}, UserError, "`dtype` must be one of"),
        ({"attention": "flash"}, UserError, "`attention` must be one of"),
        ({"base": "x"}, UserError, "`base` names the base of an adapter directory"),
        ({"adapter": "nowhere"}, CheckpointError, "`nowhere` does not exist"),
    ],
)
def test_unusable_arguments(llama_dir, arguments, error, message, monkeypatch):
    # The check of annotations, which users do not have, would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=message):
        load(llama_dir, **arguments)


def test_token_ids_that_the_model_does_not_have_are_refused(llama_dir):
    model = load(llama_dir, dtype="float32")
    for tokens, named in (([[1, 32]], "32"), ([[-1, 3]], "-1")):
        with pytest.raises(UserError, match=rf"has {named}, .* 32 tokens .0 to 31."):
            model.logits(tokens)
    with pytest.raises(UserError, match="`tokens` has 40"):
        model.logits(jax.numpy.asarray([[40, 0]]))
    # What is traced is not known.
    shape = jax.eval_shape(model.logits, jax.ShapeDtypeStruct((1, 3), np.int32)).shape
    assert shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2, 3, 4, 5], [6, 7]], r"got rows of 5, 2 tokens. .* `attention_mask`"),
        ([1, 2, 3], r"of shape \[B, T\], .* got shape \[3\]. Put a single text in a"),
        ("Once", r"got text \('Once'\). The tokenizer gives them: `model.logits"),
        (["Once"], "must be token ids, got text"),
        ([[0.5, 2.0]], r"got \[\[0.5, 2.0\]\]"),
        (np.ones((1, 2), np.float32), "got an array of float32"),
        ({"input_ids": [[1]]}, r"got \{'input_ids': \[\[1\]\]\}"),
    ],
)
def test_tokens_that_are_not_ids_are_refused(tokens, message):
    with pytest.raises(UserError, match=message):
        token_array(tokens, 32)


def test_masks_and_positions_have_the_shape_of_the_tokens():
    mask = per_token_array("attention_mask", [[True, False]], (1, 2))
    assert mask.tolist() == [[1, 0]]
    assert per_token_array("positions", [[0, 1]], (3, 2)).shape == (1, 2)
    with pytest.raises(UserError, match=r"`positions` .* \[1, 2\], got shape \[1, 3\]"):
        per_token_array("positions", [[0, 1, 2]], (1, 2))


@pytest.mark.parametrize("messages", ["Who?", {"role": "user"}, ["Who?"]])
def test_a_conversation_is_a_list_of_turns(messages):
    message = r"list of turns, .* One question is \[\{\"role"
    with pytest.raises(UserError, match=message):
        check_turns(messages)


@pytest.mark.real
@pytest.mark.parametrize("text", ["a\ud800", "\udcff"])
def test_text_that_is_no_unicode_is_refused_as_rows_are(shared_data, text):
    model = load(shared_data / "stories260K", quantization=None)
    with pytest.raises(UserError, match=r"the prompt: .* half of a surrogate pair"):
        model.generate([text], max_new_tokens=1)
    with pytest.raises(UserError, match=r"chat: .* half of a surrogate pair"):
        model.chat([{"role": "user", "content": text}], chat_template="chatml")


def test_a_prompt_is_a_string():
    message = r"got \[1, 2\]. Token ids are continued by `ql"
    with pytest.raises(UserError, match=message):
        check_text([1, 2])


def test_an_adapter_takes_no_second_one(adapter_dir):
    with pytest.raises(UserError, match="is an adapter itself; the adapter `x` cannot"):
        load(adapter_dir, adapter="x")


def test_generating_needs_a_tokenizer_and_a_list(llama_dir):
    model = load(llama_dir)
    with pytest.raises(UserError, match="must be a list of strings, got a string"):
        model.generate("Once", max_new_tokens=3)
    with pytest.raises(UserError, match="has no tokenizer. Put its tokenizer.json"):
        model.generate(["Once"], max_new_tokens=3)


# --- tokenizers ---


@pytest.mark.real
def test_end_tokens_are_the_models_and_the_tokenizers(shared_data, llama_dir):
    path = shared_data / "stories260K"
    model = load(path)
    assert end_tokens(model.config, model.tokenizer, {}) == (2,)
    other = load(llama_dir).config
    assert end_tokens(other, None, {}) == other.eos_token_ids


def test_end_tokens_of_a_generation_config(llama_dir, tmp_path):
    """Where Llama 3's chat models name <|eot_id|>, and their config.json does not."""
    config = load(llama_dir).config
    file = tmp_path / "generation_config.json"
    for given, expected in (([9, 4], (4, 9)), (7, (7,)), (None, ())):
        file.write_text(json.dumps({"eos_token_id": given}))
        ids = tuple(sorted({*config.eos_token_ids, *expected}))
        assert end_tokens(config, None, companion_files(tmp_path)) == ids
    for wrong in ("x", [1, None], [-3], [True]):
        file.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match="`eos_token_id` must be a token id"):
            end_tokens(config, None, companion_files(tmp_path))


@pytest.mark.real
def test_a_damaged_tokenizer_is_named(shared_data, tmp_path):
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(shared_data / "stories260K" / file, tmp_path / file)
    assert load_tokenizer(tmp_path).eos_token_id == 2
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"The tokenizer in `.*` cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.real
def test_loading_a_tokenizer_says_nothing(shared_data):
    """transformers remarks at import that PyTorch is missing; loggers stay as set."""
    program = (
        "import logging, sys; from convert.tokenizer import load_tokenizer; "
        "load_tokenizer(sys.argv[1]); assert logging.root.manager.disable == 0; "
        "logging.getLogger('mine').warning('heard')"
    )
    command = [sys.executable, "-c", program, str(shared_data / "stories260K")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == "heard\n"
    assert logging.root.manager.disable == 0
