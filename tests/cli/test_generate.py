"""Files that are named to `generate` and `plan`: one reader, one clear refusal."""

import json
import os

import pytest

from qlora_jax.cli.generate import TemplateOptions, _read_conversations
from qlora_jax.errors import UserError
from qlora_jax.planning.gpus import find_gpu
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
