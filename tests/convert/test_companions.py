"""The tokenizer and templates of an adapter: they are used, differences are named."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer

from convert.companions import (
    companion_files,
    sampling_settings,
    with_chat_template,
    with_end_tokens,
    with_eos_token,
    with_tokenizer_class,
)
from convert.output import write_files
from convert.tokenizer import (
    load_tokenization,
    merged_text_files,
    merged_text_notes,
)
from qlora_jax.errors import CheckpointError
from qlora_jax.models.config import LlamaConfig
from tests.byte_tokenizers import byte_tokenizer

EOT, END = "<|im_end|>", "</s>"
CONFIG = LlamaConfig(260, 8, 8, 1, 1, 1, 8)
TEMPLATE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def base(tmp_path):
    """A base directory with a plain tokenizer: 0 = <s>, 1 = </s>, and 256 bytes."""
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 1}')
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    """An adapter directory with a token more, which is its EOS, and a template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": EOT})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_the_tokenizer_of_an_adapter_counts(base, adapter):
    assert load_tokenization(CONFIG, base).eos_token_ids == (1,)
    text = load_tokenization(CONFIG, base, adapter)
    assert text.tokenizer(EOT, add_special_tokens=False).input_ids == [258]
    assert (text.tokenizer.eos_token, text.eos_token_ids) == (EOT, (1, 258))
    assert text.tokenizer.chat_template == TEMPLATE
    (note,) = text.notes
    assert f"EOS is '{EOT}' instead of '{END}'; it adds '{EOT}'." in note
    # Merged, it ends there for those too who read no tokenizer.
    merged = merged_text_files(CONFIG, base, adapter)
    assert json.loads(merged.pop("generation_config.json"))["eos_token_id"] == [1, 258]
    assert merged == companion_files(adapter)


def test_a_base_needs_no_tokenizer_if_the_adapter_has_one(adapter, tmp_path):
    text = load_tokenization(CONFIG, tmp_path, adapter)
    assert text.tokenizer.eos_token == EOT and not text.notes
    small = dataclasses.replace(CONFIG, vocab_size=258)
    (note,) = load_tokenization(small, tmp_path, adapter).notes
    assert "it has token 258, and the model has 258 tokens" in note


def test_a_damaged_tokenizer_of_an_adapter_is_not_passed_over(base, adapter):
    (adapter / "tokenizer.json").write_text("version https://git-lfs.example/v1")
    with pytest.raises(CheckpointError, match="delete the tokenizer files of the adap"):
        load_tokenization(CONFIG, base, adapter)


@pytest.mark.parametrize(
    "entry",
    [3, [3], [{"name": "../x", "template": "t"}], [{"name": "a", "template": 3}]],
    ids=str,
)
def test_a_template_that_could_not_be_a_file_is_refused(base, tmp_path, entry):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": entry})
    )
    with pytest.raises(CheckpointError, match="tokenizer_config.json: .*chat_template"):
        merged_text_files(CONFIG, base, tmp_path)


def test_an_equal_tokenizer_is_not_noted(base, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert not load_tokenization(CONFIG, base, tmp_path / "adapter").notes
    change(base / "tokenizer_config.json", chat_template="{{ messages }}")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "adapter")
    (note,) = load_tokenization(CONFIG, base, tmp_path / "adapter").notes
    assert note.endswith("that of the base: another chat template.")


@pytest.mark.parametrize("form", ["file", "entry", "entries"])
def test_an_adapter_may_have_a_template_only(base, tmp_path, form):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    named = [{"name": "default", "template": TEMPLATE}]
    named += [{"name": "tool_use", "template": "{{ tools }}"}]
    if form == "file":
        (adapter / "chat_template.jinja").write_text(TEMPLATE)
    else:
        entry = {"entry": TEMPLATE, "entries": named}[form]
        config = {"chat_template": entry, "eos_token": EOT}
        (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    text = load_tokenization(CONFIG, base, adapter)
    assert (
        text.tokenizer.apply_chat_template([{"content": "a"}], tokenize=False)
        == f"a{EOT}"
    )
    assert text.tokenizer.eos_token == END
    unused = [note for note in text.notes if "Not used of" in note]
    assert len(unused) == (form != "file")
    assert all("tokenizer_config.json (except the chat template)" in n for n in unused)
    files = merged_text_files(CONFIG, base, adapter)
    write_files(tmp_path / "merged", files)
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == text.tokenizer.chat_template
    assert files["tokenizer.json"] == companion_files(base)["tokenizer.json"]


def test_only_what_changes_is_written_again(base, tmp_path):
    change(base / "tokenizer_config.json", chat_template="old", other="é")
    files = companion_files(base)
    assert with_end_tokens(files, [1], CONFIG) == files
    changed = with_end_tokens(with_eos_token(files, "<s>"), [1, 0], CONFIG)
    changed = with_chat_template(changed, TEMPLATE)
    assert changed["tokenizer.json"] == files["tokenizer.json"]
    assert json.loads(changed["generation_config.json"]) == {"eos_token_id": [1, 0]}
    before, after = (json.loads(f["tokenizer_config.json"]) for f in (files, changed))
    assert after == {**before, "eos_token": "<s>", "chat_template": TEMPLATE}
    write_files(tmp_path / "out", changed)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (0, TEMPLATE)


def test_the_class_is_named_where_only_the_models_configuration_leads_to_it(base):
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    files = with_tokenizer_class(companion_files(base), byte_tokenizer())
    assert files == companion_files(base)
    del config["tokenizer_class"]
    file.write_text(json.dumps(config))
    files = with_tokenizer_class(companion_files(base), byte_tokenizer())
    named = json.loads(files["tokenizer_config.json"])["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"


def test_end_tokens_of_configurations_are_kept_together(base):
    """A generation_config.json hides the `eos_token_id` of config.json."""
    config = dataclasses.replace(CONFIG, eos_token_id=7)
    files = with_end_tokens(companion_files(base), [7], config)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1, 7]
    files = with_end_tokens({}, [8], config)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [7, 8]
    assert with_end_tokens({}, [7], config) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"eos_token_id": 2, "max_length": 40, "do_sample": False}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # not without `do_sample`
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 1.0, "top_k": None},
            {"temperature": 0.6},
        ),
        (
            {"repetition_penalty": 1.3, "suppress_tokens": [5], "num_beams": 1},
            {"repetition_penalty": 1.3, "suppress_tokens": [5]},
        ),
    ],
)
def test_sampling_settings_are_those_that_transformers_computes_with(content, expected):
    files = {"generation_config.json": json.dumps(content).encode()}
    assert sampling_settings(files) == expected
    assert sampling_settings({}) == {}


def test_tokens_that_a_merged_model_lacks_are_noted(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(tmp_path)
    size = len(tokenizer)
    config = dataclasses.replace(CONFIG, vocab_size=size - 1)
    (note,) = merged_text_notes(config, tmp_path)
    assert f"it has token {size - 1}, and the model has {size - 1} tokens" in note
    assert not merged_text_notes(dataclasses.replace(CONFIG, vocab_size=size), tmp_path)
    assert not merged_text_notes(config, tmp_path / "none")
