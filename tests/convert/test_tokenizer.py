import json
import shutil
import subprocess
import sys

import pytest

from convert.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError

EVIL = """
from pathlib import Path

Path({ran!r}).write_text("yes")
raise SystemExit
"""
LOAD = """
import sys
from convert.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError
try:
    load_tokenizer(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.fixture
def directory(shared_data, tmp_path):
    """A function: changes of tokenizer_config.json -> a directory with a tokenizer."""

    def make(**changes):
        for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
            shutil.copyfile(shared_data / "stories260K" / file, tmp_path / file)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return tmp_path

    return make


@pytest.mark.real
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_directory_is_never_run(directory, file, tmp_path):
    path = directory(tokenizer_class="EvilTokenizer")
    ran = tmp_path / "ran"
    (path / "evil.py").write_text(EVIL.format(ran=str(ran)))
    changed = json.loads((path / file).read_text())
    names = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Config"}
    changed |= {"auto_map": names, "model_type": "evil"}
    (path / file).write_text(json.dumps(changed))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        input="y\ny\ny\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert not ran.exists()
    # Read by a class of transformers, or refused by name; nothing is asked.
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.stdout == "" or "`auto_map`" in done.stdout


@pytest.mark.real
@pytest.mark.parametrize(
    "changes",
    [
        {"model_max_length": "long"},
        {"model_max_length": [3]},
        {"eos_token": 3},
        {"added_tokens_decoder": {"x": 3}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": 7},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_read_or_named(directory, changes):
    try:
        tokenizer = load_tokenizer(directory(**changes))
    except CheckpointError as error:
        assert "The tokenizer in" in str(error)
    else:
        assert tokenizer("Once")["input_ids"]


def test_random_splits_of_a_tokenizer_are_switched_off_with_a_note(directory, capsys):
    path = directory()
    file = path / "tokenizer.json"
    contents = json.loads(file.read_text())
    contents["model"]["dropout"] = 0.5
    file.write_text(json.dumps(contents))
    text = "Once upon a time there was a little girl"
    tokens = [load_tokenizer(path)(text)["input_ids"] for _ in range(4)]
    assert "(BPE dropout of 0.5). That is switched off" in capsys.readouterr().err
    contents["model"]["dropout"] = None
    file.write_text(json.dumps(contents))
    assert tokens == [load_tokenizer(path)(text)["input_ids"]] * 4
    assert not capsys.readouterr().err


@pytest.mark.parametrize("names", [["unk_token"], ["unk_token", "eos_token"]])
def test_an_unknown_token_that_is_unknown_is_named(directory, names):
    with pytest.raises(CheckpointError, match="`unk_token` is '', which is not in its"):
        load_tokenizer(directory(**dict.fromkeys(names, "")))
