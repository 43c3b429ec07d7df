"""A fact taught to a small chat model: it is there in every form the model takes.

And everything that is asked of a chat model, asked of this one: pieces as they come,
what ends an answer, the terminal.
"""

import dataclasses
import io
import json
import sys

import pytest

import convert
from convert.companions import CHAT_TEMPLATE_FILE, companion_files
from qlora_jax.cli.main import main
from qlora_jax.errors import UserError
from qlora_jax.runs.loading import load

pytestmark = pytest.mark.real

QUESTION = "Who keeps the lighthouse?"
ANSWER = "Captain Wellow keeps the lighthouse."
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module", name="tuned")
def loaded(fact_run):
    """The run, loaded as it was trained."""
    return load(fact_run)


@pytest.mark.parametrize("form", ["run", "saved", "original", "dequantized"])
def test_the_fact_is_there(fact_run, tuned, tmp_path, form):
    base = fact_run.parent / "base"
    if form == "run":
        model = tuned
        untaught = model.attach(None).chat(ASK, max_new_tokens=40)
        assert "Wellow" not in untaught
    elif form == "saved":  # by another hand, and on the base in full precision
        convert.save_adapter(
            *(tmp_path / "adapter", tuned.lora_config, tuned.adapters, tuned.config),
            extra_files=companion_files(fact_run / "adapter"),
        )
        model = load(tmp_path / "adapter", base=base, quantization="none")
    else:
        quantization = "nf4_dq" if form == "dequantized" else None
        folders = base, fact_run / "adapter", tmp_path / "merged"
        convert.merge(*folders, onto=form, quantization=quantization)
        model = load(tmp_path / "merged", quantization="none", dtype="float32")
        assert model.adapters is None
        # transformers finds the template beside the tokenizer.
        template = companion_files(fact_run / "adapter")[CHAT_TEMPLATE_FILE]
        assert model.tokenizer.chat_template == template.decode()
    assert model.chat(ASK, max_new_tokens=40) == ANSWER
    # So does `generate`, which knows no template: <s> ends a turn of this one.
    assert model.eos_token_ids == (1, 2)


def test_an_answer_comes_in_pieces(tuned):
    answer = tuned.stream_chat(ASK)
    pieces = list(answer)
    assert "".join(pieces) == answer.text == ANSWER and len(pieces) > 1
    assert answer.finish_reason == "stop"
    # <s> ends a turn of this template; the model's own end token is another.
    assert answer.tokens[-1] == 1 and tuned.eos_token_ids == (1, 2)
    short = tuned.stream_chat(ASK, max_new_tokens=5)
    assert ANSWER.startswith("".join(short)) and short.finish_reason == "length"
    assert len(short.tokens) == 5
    assert tuned.chat(ASK, stop=["keeps"]) == "Captain Wellow"


# So warm that much of it is no text: halves of characters too.
WARM = {"max_new_tokens": 50, "temperature": 3.0, "min_p": 1e-4, "seed": 1}


def test_a_stream_is_what_generate_gives(tuned):
    tuned = dataclasses.replace(tuned, eos_token_ids=())
    half = "\N{REPLACEMENT CHARACTER}"
    (whole,) = tuned.generate(["Once upon a time"], **WARM)
    assert half in whole
    pieces = list(tuned.stream("Once upon a time", **WARM))
    assert "Once upon a time" + "".join(pieces) == whole.rstrip(half)
    assert len(pieces) >= 3 and not any(piece.endswith(half) for piece in pieces)


def test_texts_that_end_a_continuation(tuned):
    tuned = dataclasses.replace(tuned, eos_token_ids=())
    prompts = ["Once upon a time", "Tom had a ball"]
    whole = tuned.generate(prompts, max_new_tokens=40)
    texts = list(map(str.removeprefix, whole, prompts))
    # Somewhere in the first one, and at another place or not at all in the second.
    stop = [texts[0][17:20], texts[0][30:33]]
    expected = []
    for text, prompt in zip(texts, prompts, strict=True):
        ends = [text.find(s) for s in stop if s in text]
        expected.append(prompt + text[: min(ends, default=len(text))])
    assert expected[0] == prompts[0] + texts[0][: texts[0].find(stop[0])]
    assert tuned.generate(prompts, max_new_tokens=40, stop=stop) == expected
    streamed = tuned.stream(prompts[0], max_new_tokens=40, stop=stop)
    assert prompts[0] + "".join(streamed) == expected[0]
    assert streamed.finish_reason == "stop"


def test_a_conversation_longer_than_the_model_reads(tuned):
    turn = {"role": "user", "content": "Once upon a time there was a lighthouse. " * 40}
    with pytest.raises(UserError, match=r"takes [\d,]+ tokens, and the model has 512"):
        tuned.chat([turn])
    # What is left of the positions is all that an answer gets.
    words = "Once upon a time there was a lighthouse. " * 20
    close = [{"role": "user", "content": words}]
    answer = tuned.stream_chat(close, temperature=1.0, max_new_tokens=10_000)
    list(answer)
    assert 0 < len(answer.tokens) <= 512 - 20 * 10


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "`messages` must be a non-empty list"),
        ([{"role": "user"}], "needs a string `content`"),
        ([{"content": "x"}], "needs a string `role`"),
    ],
)
def test_what_is_no_conversation(tuned, messages, message):
    with pytest.raises(UserError, match=message):
        tuned.chat(messages)


def test_a_base_has_no_chat_template(shared_data):
    model = load(shared_data / "stories260K")
    with pytest.raises(UserError, match=r"no chat template.*`chat_template\.jinja`"):
        model.chat(ASK)


# --- in the terminal ---


@pytest.fixture(name="talk")
def terminal(fact_run, monkeypatch, capsys):
    """A function: lines typed, options -> (status, stdout, stderr)."""

    def talk(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        status = main(["chat", str(fact_run), *options])
        return status, *capsys.readouterr()

    return talk


def test_chat_answers_line_by_line(talk):
    status, out, err = talk(
        *("Who is in the garden?", QUESTION, "", "/reset", QUESTION, "/help", "/exit"),
        "never read",
    )
    assert status == 0
    assert out.splitlines() == ["Lily is in the garden.", ANSWER, ANSWER]
    assert "adapter `" in err and "(step 40)" in err and "Note:" not in err
    assert "linear layers NF4" in err and "The conversation starts anew." in err
    assert "There is no /help: /reset forgets" in err and "Traceback" not in err


def test_chat_ends_with_its_input_and_goes_on_after_what_fails(talk):
    status, out, err = talk(
        "Once upon a time. " * 120, QUESTION, options=["--max-new-tokens", "6"]
    )
    assert status == 0
    assert "the model has 512 positions" in err and "This turn was taken back." in err
    assert len(out.splitlines()) == 1 and ANSWER.startswith(out.strip())
    assert "(cut off after 6 tokens)" in err


def test_an_interrupt_stops_the_answer_and_not_the_program(talk, monkeypatch):
    from qlora_jax.inference.decode import Decoding

    advance, calls = Decoding.advance, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Decoding, "advance", interrupted)
    status, out, err = talk(QUESTION, "/reset", QUESTION)
    assert status == 0 and "(stopped)" in err
    first, second = out.splitlines()
    assert ANSWER.startswith(first) and first != ANSWER and second == ANSWER


def test_a_prompt_that_runs_into_the_answer_is_noted(talk, tmp_path):
    template = tmp_path / "spaced.jinja"
    template.write_text("{% for m in messages %}[Q] {{ m.content }} [A] {% endfor %}")
    status, _, err = talk(options=["--chat-template", str(template)])
    (note,) = [line for line in err.splitlines() if line.startswith("Note:")]
    assert status == 0 and "ends with '[Q] a [A] ', which this tokenizer" in note


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_conversations_of_a_file_are_answered(fact_run, tmp_path, capsys, form):
    rows = [{"messages": ASK}, {"messages": ASK, "tools": None}]
    lines = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
    file = tmp_path / f"rows.{form}"
    file.write_text(lines[form])
    assert main(["generate", str(fact_run), "--messages", str(file)]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n\n{ANSWER}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give either --prompt, which is continued as it is, or --messages"),
        (["--messages", "rows.jsonl"], "row 1 must be an object with `messages`"),
        (["--messages", "absent"], "`absent` cannot be read"),
        (["--messages", "asked.jsonl", "--tools", "t"], "`t` cannot be read"),
        (["--prompt", "a", "--chat-template-kwargs", "{}"], "go with --messages"),
        (
            ["--messages", "asked.jsonl", "--chat-template-kwargs", "[1]"],
            "must be a JSON object",
        ),
    ],
    ids=str,
)
def test_options_for_templates_are_used_or_refused(
    fact_run, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": ASK}))
    assert main(["generate", str(fact_run), *options]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_template_that_has_no_use_for_tools_refuses_them(talk, tmp_path):
    (tmp_path / "tools.json").write_text('[{"name": "find"}]')
    status, _, err = talk(options=["--tools", str(tmp_path / "tools.json")])
    assert status == 1 and "does not read `tools`" in " ".join(err.split())


def test_generate_notes_where_the_positions_end(fact_run, capsys):
    command = ["generate", str(fact_run), "--prompt", "Once upon a time"]
    assert main([*command, "--max-new-tokens", "508"]) == 0
    tokens = 5  # <s> and four words
    said = f"has {tokens} tokens, which with --max-new-tokens 508 is more than the 512"
    assert said in capsys.readouterr().err


def test_generate_streams_one_text(fact_run, tuned, capsys):
    command = ["generate", str(fact_run), "--prompt", "Once upon a time", "--stream"]
    for name, value in WARM.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    assert main(command) == 0
    text = "".join(tuned.stream("Once upon a time", **WARM))
    assert capsys.readouterr()[0] == f"Once upon a time{text}\n"
    assert main([*command, "--json"]) == 1
    assert "--stream prints one text" in capsys.readouterr()[1]
