"""Files that are named to `generate` and `plan`: one reader, one clear refusal."""

import json
import os
from types import SimpleNamespace

import pytest

from qlora_jax.cli.generate import (
    TemplateOptions,
    _note_no_template,
    _read_conversations,
)
from qlora_jax.data.config import DataConfig
from qlora_jax.errors import UserError
from qlora_jax.planning.gpus import find_gpu
from qlora_jax.runs.config import ModelConfig, RunConfig
from qlora_jax.training.config import TrainConfig
from tests.byte_tokenizers import byte_tokenizer

NOT_TEXT = {
    "missing": (lambda file: None, "No such file or directory"),
    "a directory": (lambda file: file.mkdir(), "directory"),
    "a pipe": (os.mkfifo, "it is a pipe or a device"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "it is a pipe or a device"),
    "a link to itself": (lambda file: file.symlink_to(file.name), "symbolic links"),
    "UTF-16": (lambda file: file.write_bytes("[1]".encode("utf-16")), "not UTF-8"),
    "too large": (lambda file: os.truncate(file, 1 << 40), "larger than"),
}


@pytest.mark.parametrize("what", NOT_TEXT)
@pytest.mark.parametrize("reader", ["messages", "tools", "gpu"])
def test_what_is_no_text_file_is_refused_and_does_not_block(tmp_path, reader, what):
    file = tmp_path / "file.toml"
    make, message = NOT_TEXT[what]
    if what == "too large":
        file.touch()
    make(file)
    with pytest.raises(UserError, match=message) as error:
        if reader == "messages":
            _read_conversations(file)
        elif reader == "tools":
            TemplateOptions(path="model", tools=file).template_settings(None)
        else:
            find_gpu(str(file))
    assert str(file) in str(error.value)


def test_lines_end_at_line_breaks_only(tmp_path):
    text = "a\u2028b\x85c"
    file = tmp_path / "rows.jsonl"
    row = f'{{"messages": [{{"role": "user", "content": "{text}"}}], "tools": null}}'
    file.write_bytes(f"\ufeff{row}\r\n\r\n{row}".encode())
    rows = _read_conversations(file)
    assert rows == [{"messages": [{"role": "user", "content": text}]}] * 2


def test_sampling_settings_of_a_file_are_named_where_no_option_sets_them(
    tiny, make_tensors, save_model, tmp_path, cli
):
    raw = {**tiny, "vocab_size": 300}
    base = save_model(raw, make_tensors(raw), "base")
    byte_tokenizer().save_pretrained(base)
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "stop_strings": "x",
    }
    (base / "generation_config.json").write_text(json.dumps(settings))
    args = ("generate", base, "--prompt", "a", "--max-new-tokens", "1")
    status, _, err = cli(*args, "--temperature", "0.8")
    note = " ".join(err.split())
    assert status == 0
    assert "and not for stop_strings='x', top_p=0.9, with which transformers" in note
    assert note.endswith("; --top-p 0.9 set these.")


@pytest.mark.parametrize(
    ("template", "format", "prompt", "said"),
    [
        ("x", None, "Hi", "its tokenizer has a chat template"),
        ("x", "messages", "Hi", "it was trained on conversations"),
        ("x", "text", "Hi", ""),
        (None, None, "Hi", ""),
        ("x", None, "<s>Hi", ""),  # rendered already
    ],
)
def test_a_prompt_without_its_template_is_noted(capsys, template, format, prompt, said):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    run = None
    if format is not None:
        data = DataConfig(path="rows", format=format)
        run = RunConfig(ModelConfig("base"), data, TrainConfig(steps=1))
    _note_no_template(SimpleNamespace(tokenizer=tokenizer), run, [prompt])
    out, err = capsys.readouterr()
    assert said in err and ("--messages FILE" in err) == bool(said) and not out
