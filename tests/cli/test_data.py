"""The `data` command: what it shows is what a run trains on."""

import json
import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.cli.data import RESET, SUPERVISED, DataView, mark_supervised, token_texts
from qlora_jax.cli.data_page import render_data
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(shared_data):
    return str(shared_data / "stories260K")


@pytest.fixture(scope="module")
def tokenizer(model):
    return PreTrainedTokenizerFast.from_pretrained(model)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "Who is <b>Tom</b>?\n", "completion": "A cat. 🙂\nReally."},
        {"prompt": "Tell me " * 60, "completion": "no"},
        {"prompt": "Where?\n", "completion": "There. " * 40},
        {"prompt": "Why?\n", "completion": ""},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def data(rows):
    return DataConfig(path=rows, format="prompt_completion", max_length=48)


@pytest.fixture
def call(cli):
    return lambda *args: cli("data", *args)


def test_the_numbers_and_tokens_are_those_of_the_run(model, tokenizer, data):
    report = DataView(model, data, show=9).run()
    examples = load_examples(data, tokenizer, vocab_size=512)
    assert report["data"] == examples.report.as_dict()
    assert len(report["examples"]) == len(examples) == 2
    for number, shown in enumerate(report["examples"]):
        tokens, labels = examples[number]
        assert shown["tokens"] == tokens.tolist()
        assert shown["supervised"] == (labels != IGNORE).tolist()
        assert shown["supervised_tokens"] == int((labels != IGNORE).sum())
        assert "".join(shown["text"]) == tokenizer.decode(tokens)
    assert sum(b["examples"] for b in report["lengths"]) == 2
    lengths = examples.lengths
    for b in report["lengths"]:
        inside = (lengths >= b["from"]) & (lengths <= b["to"])
        assert b["examples"] == int(inside.sum())


def test_the_rows_are_those_of_packing_and_of_none(model, data, rows):
    how = {"format": "prompt_completion", "max_length": 128, "packing": True}
    report = DataView(model, DataConfig(path=rows, **how)).run()
    packed, alone = report["rows"]["packed"], report["rows"]["one_each"]
    assert packed["rows"] == 2 and packed["length"] == 128
    total = report["data"]["tokens"]
    assert packed["efficiency"] == total / 256
    assert alone["efficiency"] == total / (alone["rows"] * alone["length"])


@pytest.mark.parametrize(
    "text", ["plain words", " two  spaces ", "Grüße 🙂🙃 日本\n\n\tx", "🙂", "a\ufffdb"]
)
def test_token_texts_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text * 7)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_every_token_of_random_ids_has_its_text(tokenizer):
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 512, 80).tolist()
        assert len(token_texts(tokenizer, ids)) == len(ids)


def test_brackets_stand_around_what_is_supervised(call, model, rows):
    status, out, err = call(
        *("--model", model, "--data.path", rows),
        *("--data.format", "prompt_completion", "--data.max-length", 48),
    )
    assert status == 0 and "\x1b" not in out
    assert "Who is <b>Tom</b>?\n⟦A cat. 🙂\nReally.</s>⟧" in out
    assert "2 of 4 rows kept" in out
    assert f"every supervised token truncated: 1 ({rows}:2)" in out
    assert f"empty completion: 1 ({rows}:4)" in out
    assert f"truncated: 1 ({rows}:3)" in out
    one_each = r"one example a row: 2 rows of (48|64) tokens, .* <- this run"
    assert re.search(one_each, out)
    assert "steps in an epoch: 2.0, of 1 row each (--rows-per-step: " in out
    assert "50.0% of the rows lose their end" in out
    assert "2 rows left out (" in out


def test_colours_on_a_terminal_end_with_each_line():
    example = {"text": ["ab", "c\n", "d"], "supervised": [False, True, True]}
    example["not_shown"] = 0
    text = mark_supervised(example, colour=True)
    assert text.endswith(f"{SUPERVISED}c{RESET}\n{SUPERVISED}d{RESET}")
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == "abc\nd"
    assert mark_supervised(example, colour=False) == "ab⟦c\nd⟧"


def test_the_page_is_written_of_the_same(call, model, data, rows, tmp_path):
    page = tmp_path / "page.html"
    status, *_ = call(
        *("--model", model, "--data.path", rows, "--html", page, "--example", 0),
        *("--data.format", "prompt_completion", "--data.max-length", 48),
    )
    assert status == 0
    report = DataView(model, data, example=(0,)).run()
    assert page.read_text() == render_data(report, rows)
    assert "Who is &lt;b&gt;" in re.sub("<[^>]*>", "", page.read_text())


def test_json_holds_everything(call, model, rows):
    status, out, _ = call(
        *("--model", model, "--data.path", rows, "--json", "--show", 1),
        *("--data.format", "prompt_completion"),
    )
    report = json.loads(out)
    assert status == 0
    parts = ("data", "held_out", "summary", "rows", "lengths", "examples", "notes")
    assert set(report) == set(parts)
    assert report["held_out"] is None
    assert report["examples"][0]["supervised_tokens"] > 0


def test_a_run_file_is_read_with_its_mixture_and_cache(call, model, rows, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'output_dir = "{tmp_path}/run"\n[model]\npath = "{model}"\n'
        f'[data]\nformat = "prompt_completion"\nmax_length = 48\ncache = "auto"\n'
        f"packing = true\n"
        f'[[data.sources]]\npath = "{rows}"\nweight = 2\n'
        f'[[data.sources]]\npath = "{rows}"\nweight = 1\ntrain_on = "all"\n'
        "[train]\nsteps = 2\nbatch_size = 4\ngradient_accumulation_steps = 8\n"
    )
    status, out, _ = call(file)
    assert status == 0
    assert "66.7% of the rows" in out and "33.3% of the rows" in out
    assert "a step takes 32, so that rows are repeated within a step" in out
    # The second source, which supervises its prompts, begins where the first one ends.
    first = json.loads(call(file, "--json", "--show", 99)[1])["data"]["sources"][0]
    _, out, _ = call(file, "--example", first["report"]["examples"])
    assert "⟦ Who is <b>Tom</b>?" in out
    assert len(list((tmp_path / "run.data").glob("[0-9a-f]*"))) == 2
    assert not (tmp_path / "run").exists()


def test_what_the_run_holds_out_is_not_shown(call, model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Q{i}?\n", "completion": f"A{i}."} for i in range(12)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\npath = "{model}"\n'
        f'[data]\npath = "{rows}"\nformat = "prompt_completion"\n'
        "[train]\nsteps = 2\n[eval]\nfraction = 0.25\n"
    )
    status, out, _ = call(file)
    assert status == 0
    assert "Held out of the training data: 3 examples" in out
    assert "Left to train on: 9 examples." in out
    report = json.loads(call(file, "--json", "--show", 99)[1])
    assert (report["data"]["examples"], report["held_out"]["examples"]) == (9, 3)
    assert len(report["examples"]) == 9
    assert "of which other parts" not in out
    text = tmp_path / "book.txt"
    text.write_text("Once there was a girl. " * 40)
    options = ("--data.path", text, "--data.format", "text", "--data.max-length", "32")
    out = " ".join(call(file, *options)[1].split())
    assert "are windows of documents of which other parts are trained on." in out
    status, out, _ = call(file, "--eval-fraction", "None", "--json")
    assert json.loads(out)["data"]["examples"] == 12
    status, _, error = call(file, "--eval-fraction", "1.5")
    assert status == 1 and "`fraction` must be between 0 and 1" in error


def test_all_problems_are_listed_and_none_is_shown_as_data(call, model, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": 1}\n{"text": "fine"}\n{"text"\n')
    status, out, err = call("--model", model, "--data.path", path)
    assert status == 1 and out == ""
    assert "qlora-jax data: 2 problems with the data:" in err
    assert "bad.jsonl:1: field `text`" in err and "bad.jsonl:3: malformed" in err


def test_an_example_that_is_not_there_is_refused(model, data):
    with pytest.raises(UserError, match=r"no example 2, 5: the data have 2, numbered"):
        DataView(model, data, example=(0, 2, 5)).run()


def test_token_rows_are_shown_without_a_tokenizer(call, llama_dir, rows_file):
    args = ["--model", llama_dir, "--data.path", rows_file, "--data.format", "tokens"]
    status, out, _ = call(*args, "--show", "1")
    assert status == 0
    tokens = json.loads(rows_file.read_text().splitlines()[0])["input_ids"]
    assert [int(n) for n in re.findall(r"\d+", out.splitlines()[-1])] == tokens


def test_a_long_example_is_cut_where_it_is_shown_only(model, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("words " * 5000)
    view = DataView(model, DataConfig(path=str(path), max_length=4000), show=1).run()
    (example,) = view["examples"]
    assert example["length"] == example["supervised_tokens"] + 1 == 4000
    assert example["not_shown"] == 2500 and len(example["tokens"]) == 1500
    assert "... and 2,500 more tokens" in mark_supervised(example, colour=False)


def test_a_template_that_ends_no_turn_with_eos_is_noted(model, tmp_path):
    path, template = tmp_path / "chat.jsonl", tmp_path / "t.jinja"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}))
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data = DataConfig(path=str(path), format="messages", chat_template=str(template))
    (note,) = [n for n in DataView(model, data).run()["notes"] if "EOS" in n]
    assert note.startswith("no supervised token is the tokenizer's EOS ('</s>')")
