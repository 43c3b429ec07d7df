"""Spellings of rows: every known one gives the examples of the plain one."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest

from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.conversations import to_messages
from qlora_jax.data.examples import load_examples
from qlora_jax.data.notes import data_notes
from qlora_jax.data.rows import Reading
from qlora_jax.data.sources import list_sources
from qlora_jax.errors import UserError
from qlora_jax.runs.config import EvalConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def chatml(byte_tokenizer):
    tokenizer = byte_tokenizer(specials=SPECIALS)
    tokenizer.chat_template = CHATML
    return tokenizer


# --- conversations ---


def spelled(role="role", content="content", **names):
    """TURNS with other keys and roles."""
    return [
        {role: names.get(t["role"], t["role"]), content: t["content"]} for t in TURNS
    ]


PARTS = [
    {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS
]


@pytest.mark.parametrize("content", [None, "", "look!"])
def test_a_function_call_of_openais_first_api_is_a_call(content):
    call = {"name": "f", "arguments": '{"a": 1}'}
    turn = {"role": "assistant", "content": content, "function_call": call}
    reading = Reading()
    (message,) = to_messages({"messages": [turn]}, "r", reading)
    function = {"name": "f", "arguments": {"a": 1}}
    assert message["tool_calls"] == [{"type": "function", "function": function}]
    assert message["content"] == content and "function_call" not in message
    assert "`function_call` of turns as a call" in reading.recognised
    with pytest.raises(UserError, match="`function_call` must be a call.* got 'f'"):
        to_messages({"messages": [turn | {"function_call": "f"}]}, "r")


def test_keys_that_a_template_reads_elsewhere_are_reported(load, chatml):
    # `name` is that of functions and of the results of tools, `tools` the row's.
    chatml.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML
    ).replace("{{ m.content }}", "{{ m.content }}{{ m.name if m.role == 'tool' }}")
    function = {"type": "function", "function": {"name": "f"}}
    system = {"role": "system", "content": "s", "tools": [function]}
    asked = {"role": "user", "name": "Bo", "content": [{"type": "text", "text": "q"}]}
    asked["content"][0]["cache_control"] = {"type": "ephemeral"}
    answer = {"role": "assistant", "content": "a"}
    result = {"role": "tool", "name": "f", "content": "1"}
    report = load(
        [
            {"messages": [system, asked, answer], "tools": [function]},
            {"messages": [asked, answer, result, answer]},
            {"messages": [{**asked, "content": "q"}, answer]},
        ],
        chatml,
        format="messages",
    ).report
    assert report.unread == {
        "messages[].content[].cache_control": 2,
        "messages[].name": 2,
        "messages[].name (user)": 1,
        "messages[].tools": 1,
    }


def test_keys_of_turns_that_nothing_reads_are_reported(load, chatml):
    unread = {"images": ["a.png"], "thought": "hm", "name": "Bo", "empty": []}
    asked = {"role": "user", "content": "hi", "weight": 1} | unread
    row = {"messages": [asked, {"role": "assistant", "content": "yo", "weight": 0}]}
    row["messages"].append({"role": "assistant", "content": "a", "reasoning": "b"})
    chatml.chat_template = "{{ messages[0].name }}" + CHATML
    report = load([row, row], chatml, format="messages").report
    assert report.unread == {"messages[].images": 2, "messages[].thought": 2}
    assert any(r.startswith("`weight` of turns that are") for r in report.recognised)


@pytest.mark.parametrize(
    ("row", "recognised"),
    [
        ({"messages": TURNS}, "conversations in `messages`"),
        ({"conversation": TURNS, "messages": None}, "conversations in `conversation`"),
        ({"data": TURNS, "messages": []}, "conversations in `data`"),
        ({"conversations": json.dumps(TURNS)}, "`conversations` decoded from JSON"),
        ({"messages": PARTS}, "text parts joined to one text"),
        ({"messages": TURNS[1:], "system": "s"}, "`system` as the first turn"),
        (
            {"conversations": spelled("from", "value", user="human", assistant="gpt")},
            "`value` of turns as `content`",
        ),
        *(
            ({"messages": spelled(assistant=name)}, f"role '{name}' as 'assistant'")
            for name in ("gpt", "bing", "bard", "model", "Assistant")
        ),
        ({"data": spelled(user="human")}, "role 'human' as 'user'"),
        ({"messages": spelled(assistant="bot")}, "role 'bot' as 'assistant'"),
    ],
)
def test_spellings_of_a_conversation_are_read_and_said(row, recognised):
    reading = Reading()
    assert to_messages(row, "r", reading, roles={"bot": "assistant"}) == TURNS
    assert recognised in reading.recognised
    assert reading.fields <= row.keys()


def test_roles_of_tools_are_those_of_templates():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "function_response", "value": "4"},
    ]
    assert to_messages({"conversations": turns}, "r", roles={}) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    kept = {"function_call": "assistant", "observation": "observation"}
    first, second, _ = to_messages({"conversations": turns}, "r", roles=kept)
    assert first == {"role": "assistant", "content": json.dumps(call)}
    assert second["role"] == "observation"


def test_parts_are_joined_without_a_separator():
    parts = [{"type": "text", "text": "a "}, "b", {"text": "c"}]
    (turn,) = to_messages({"messages": [{"role": "user", "content": parts}]}, "r")
    assert turn["content"] == "a bc"


def test_flags_of_sharegpt_turns_are_kept(load, chatml, decoded):
    turns = spelled("from", "value", user="human", assistant="gpt")
    turns[2] |= {"weight": 0}
    examples = load([{"conversations": turns}], chatml, format="messages")
    assert decoded(examples, 0, chatml)[1] == "no<|im_end|>"


def test_the_field_and_roles_of_the_settings_are_used_and_the_rest_is_said(
    load, chatml, decoded
):
    rows = [
        {"chat": spelled(assistant="bot"), "messages": "m", "id": 1},
        {"chat": TURNS},
    ]
    settings = {"messages": "chat", "roles": {"bot": "assistant"}}
    examples = load(rows, chatml, format="messages", **settings)
    assert decoded(examples, 0, chatml) == decoded(examples, 1, chatml)
    report = examples.report
    assert report.recognised["role 'bot' as 'assistant'"] == 1
    assert report.unread == {"messages": 1, "id": 1}
    summary = report.summary()
    assert "conversations in `chat`, role 'bot' as 'assistant' (1 row);" in summary
    assert "fields that are not read: `" in summary


@pytest.mark.parametrize("format", ["prompt_completion", "messages"])
def test_turns_of_a_prompt_and_its_completion_are_one_conversation(
    load, chatml, decoded, format
):
    # As in TRL: what the template writes for prompt + completion beyond the prompt with
    # its generation prompt; but for the white space after the end of the turn, which a
    # model never writes.
    rows = [{"prompt": TURNS[:cut], "completion": TURNS[cut:]} for cut in (2, 4)]
    examples = load(rows, chatml, format=format)
    for index, row in enumerate(rows):
        text, supervised = decoded(examples, index, chatml)
        assert text == chatml.apply_chat_template(TURNS, tokenize=False)
        if index == 1:  # the first answer is a part of the prompt
            prompt = chatml.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            assert supervised == text[len(prompt) :].removesuffix("\n")
    assert decoded(examples, 0, chatml)[1] == "yo<|im_end|>no<|im_end|>"
    everything = load(rows[1:], chatml, format=format, train_on="all")
    assert decoded(everything, 0, chatml)[1] == text.removeprefix("<|im_start|>")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"prompt": TURNS[:2], "completion": "yo"},
            {"format": "messages"},
            "must be two strings, or two lists of turns; `prompt` is list",
        ),
        (
            {"prompt": "hi", "completion": TURNS[2:]},
            {"format": "prompt_completion"},
            "two lists of turns; `completion` is list",
        ),
        (
            {"prompt": "hi", "completion": "yo"},
            {"format": "prompt_completion", "roles": {"bot": "assistant"}},
            "`data.roles` are for conversations, .* With format='messages' the chat",
        ),
    ],
)
def test_prompts_of_turns_and_of_text_are_not_mixed(
    load, chatml, row, settings, message
):
    with pytest.raises(UserError, match=message):
        load([row], chatml, **settings)


# --- columns of a question and its answer ---

# Of Stanford's Alpaca, in its two forms.
ALPACA = [
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 {x}\n\n### Response:",
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:",
]


def test_alpaca_rows_have_the_texts_of_alpaca(load, decoded):
    row = {"instruction": "Add.", "output": "2"}
    rows = [row | {"input": "1 {x}"}, row | {"input": ""}, row | {"input": None}, row]
    examples = load(rows, format="alpaca")
    for index in range(4):
        prompt = ALPACA[min(index, 1)]
        assert decoded(examples, index) == (f"<s>{prompt}2</s>", "2</s>")
    assert examples.report.recognised["Alpaca's prompt without `input`"] == 3
    assert not examples.report.unread
    everything = load(rows[-1:], format="alpaca", train_on="all")
    assert decoded(everything)[1] == f"{ALPACA[1]}2</s>"
    with pytest.raises(UserError, match="no field `output`; the row has `instruction`"):
        load([{"instruction": "a"}], format="alpaca")


@pytest.mark.parametrize(
    ("row", "settings", "asked"),
    [
        ({"instruction": "a", "input": "b", "output": "yo"}, {}, "a\nb"),
        ({"instruction": "a", "input": "", "output": "yo"}, {}, "a"),
        ({"instruction": "a", "context": "b", "response": "yo"}, {}, "a\nb"),
        ({"instruction": "a", "input": None, "output": "yo"}, {}, "a"),
        ({"question": "a", "answer": "yo"}, {}, "a"),
        ({"prompt": "a", "completion": "yo"}, {}, "a"),
        ({"prompt": "a", "response": "yo", "messages": "x"}, {}, "a"),
        (
            {"q": "a", "a": "yo", "messages": []},
            {"prompt": "({q})", "completion": "{a}"},
            "(a)",
        ),
    ],
)
def test_a_question_and_its_answer_are_turns_of_the_chat_template(
    load, chatml, decoded, row, settings, asked
):
    rows = [row | {"system": "s"}] if not settings else [row]
    examples = load(rows, chatml, format="messages", **settings)
    text, supervised = decoded(examples, 0, chatml)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yo"}]
    turns[:0] = [] if settings else [{"role": "system", "content": "s"}]
    assert text == chatml.apply_chat_template(turns, tokenize=False)
    assert supervised == "yo<|im_end|>"
    said = " ".join(examples.report.recognised)
    assert settings or "as the user's turn" in said
    assert examples.report.unread.keys() == row.keys() & {"messages"}


@pytest.mark.parametrize(
    ("row", "format", "hint"),
    [
        (
            {"question": "a", "answer": "b"},
            "prompt_completion",
            r"`data.prompt` = '{qu",
        ),
        (
            {"question": "a", "answer": "b"},
            "text",
            "format='messages' writes `question`",
        ),
        ({"instruction": "a", "output": "b"}, "text", "or format='alpaca'"),
        ({"conversations": []}, "prompt_completion", "format='messages' reads conver"),
        ({"text": "a"}, "messages", "format='text' reads `text`"),
        ({"ask": "a", "reply": "b"}, "messages", "`data.prompt` and `data.completion`"),
    ],
)
def test_the_format_of_known_fields_is_named(load, chatml, row, format, hint):
    with pytest.raises(UserError, match=hint):
        load([row], chatml, format=format)


# --- texts that a chat template has written ---

PARTS_OF_CHATML = {
    "instruction_part": "<|im_start|>user\n",
    "response_part": "<|im_start|>assistant\n",
}


@pytest.fixture
def marked(load, chatml, decoded):
    """A function: a text -> the supervised text, and the report."""

    def marked(*texts, **settings):
        settings = PARTS_OF_CHATML | settings
        examples = load([{"text": text} for text in texts], chatml, **settings)
        return decoded(examples, 0, chatml)[1], examples.report

    return marked


@pytest.mark.parametrize(
    ("text", "supervised"),
    [
        # The end of the turn and what follows it belong to the answer, up to the next
        # instruction; the answer that ends the text is followed by EOS.
        (
            "{q}1<|im_end|>\n{a}2<|im_end|>\n{q}3<|im_end|>\n{a}4<|im_end|>\n",
            "2<|im_end|>\n4<|im_end|>\n</s>",
        ),
        ("{q}1{a}2{q}3", "2"),
        # Turns of others have no marker, but begin as the markers do.
        (
            "{q}1{a}2<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n{a}4<|im_end|>\n"
            "<|im_start|>system\n5<|im_end|>\n{q}6{a}7",
            "2<|im_end|>\n4<|im_end|>\n7</s>",
        ),
        ("{q}1{a}{a}2", "2</s>"),
        ("{q}1{a}{q}2{a}3", "3</s>"),
        ("{a}2{q}3{a}4", "24</s>"),
        ("assistant\n{q}user\n{a}2", "2</s>"),
    ],
)
def test_what_follows_the_response_part_is_supervised(marked, text, supervised):
    written = text.format(
        q=PARTS_OF_CHATML["instruction_part"], a=PARTS_OF_CHATML["response_part"]
    )
    found, report = marked(written)
    assert found == supervised
    assert report.assistant_mask == "markers"
    assert "what follows `data.response_part`" in report.summary()


def test_a_marked_text_has_the_labels_of_its_conversation(
    marked, load, chatml, decoded
):
    text = chatml.apply_chat_template(TURNS, tokenize=False)
    found, _ = marked(text, append_eos=False)
    turns = load([{"messages": TURNS}], chatml, format="messages")
    # But for the line breaks after the ends of turns.
    assert found.replace("\n", "") == decoded(turns, 0, chatml)[1]


def test_texts_without_markers_are_left_out_and_counted(marked):
    text = "<|im_start|>assistant\nyo"
    empty = "<|im_start|>user\nhi<|im_start|>assistant\n"
    _, report = marked(text, "no marker", empty)
    assert report.dropped == {
        "no `data.response_part` in the text": 1,
        "no text after `data.response_part`": 1,
    }
    assert report.recognised["no `data.instruction_part` in the text"] == 1
    with pytest.raises(UserError, match="no row is left .*no `data.response_part` in"):
        marked(text.replace("\n", " "))


@pytest.mark.parametrize("packing", [False, True])
def test_a_long_marked_text_keeps_its_beginning(marked, packing):
    text = "<|im_start|>user\na<|im_start|>assistant\n" + "b" * 50
    supervised, report = marked(text, packing=packing, max_length=30)
    assert supervised == "b" * 11 and report.truncated == 1 and report.examples == 1


def test_the_longer_marker_is_meant_where_one_begins_with_the_other(marked):
    parts = {"instruction_part": "### ", "response_part": "### A: "}
    assert marked("### q### A: a### q### A: b", **parts)[0] == "ab</s>"


# --- CSV and TSV ---

FIELDS = [
    {"text": "a, b", "n": "1"},
    {"text": 'she said "hi"\r\nand left', "n": ""},
    {"text": "tab\there", "n": "naïve"},
    {"text": "x" * 200_000, "n": "2"},
]


@pytest.fixture
def table(tmp_path):
    """A function: rows, file name, encoding -> a file that the `csv` module wrote."""

    def table(rows, name, encoding="utf-8", **dialect):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode(encoding)
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return table


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("x.csv", {}),
        ("x.CSV", {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}),
        ("x.csv", {"encoding": "utf-8-sig", "lineterminator": "\n\n"}),
        ("x.csv.gz", {}),
        ("x.tsv", {"delimiter": "\t"}),
        ("x.tsv.gz", {"delimiter": "\t", "encoding": "utf-8-sig"}),
    ],
)
def test_tables_are_read_by_field(table, name, dialect):
    path = table(FIELDS, name, **dialect)
    (source,) = list_sources(str(path), split=None, plain_text=True)
    file = source.open()
    rows = list(file.rows)
    assert [row for _, row in rows] == FIELDS
    assert file.kind() == name.upper()[2:5] and not file.plain
    if "lineterminator" not in dialect:
        # The second row has a line break in quotes.
        assert [where.rpartition(":")[2] for where, _ in rows] == ["2", "3", "5", "6"]


def test_a_table_is_trained_on_by_its_text_field(table, load, decoded):
    examples = load(table(FIELDS[:2], "x.csv"), max_length=100)
    assert decoded(examples, 0)[1] == "a, b</s>"
    assert examples.report.recognised["CSV"] == 2
    assert examples.report.unread == {"n": 2}
    with pytest.raises(UserError, match=r"x\.csv:2: no field `text`; the row has `q`"):
        load(table([{"q": "a", "a": "b"}], "x.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t\.csv is empty"),
        ("\n\n", r"t\.csv is empty"),
        ("text,n\n", r"t\.csv has a header and no rows"),
        ("text,n\na,1\nb\n", r"t\.csv:3: 1 fields, and the header names 2 .text, n."),
        ("text,n\na,1,2\n", r"t\.csv:2: 3 fields, and the header names 2"),
        ('text,n\n"a\nb",1\n"c,2\n', r"t\.csv:4: malformed CSV: unexpected end of d"),
        ('text,n\n"a"b,1\n', r"t\.csv:2: malformed CSV: ',' expected after"),
        ("text;n\na;1\n", r"t\.csv:1: the header .* by semicolons; .* by commas"),
        ("text\tn\na\t1\n", r"t\.csv:1: the header .* by tabs; a .csv file"),
        ("text,text\na,b\n", r"t\.csv:1: the header names 'text' several times"),
        (b"text,n\n\xff,1\n", r"t\.csv is not UTF-8 text .byte 7."),
    ],
)
def test_tables_that_cannot_be_read_are_refused(write, load, content, message):
    with pytest.raises(UserError, match=message):
        load(write(content, "t.csv"))


def test_ragged_rows_may_be_skipped_and_open_quotes_may_not(write, load):
    report = load(write("text,n\na,1\nb\nc,2\n", "t.csv"), on_bad_row="skip").report
    assert (report.rows_kept, report.dropped) == (2, {"row that cannot be used": 1})
    with pytest.raises(UserError, match="unexpected end of data"):
        load(write('text\na\n"b\nc\n', "t.csv"), on_bad_row="skip")


# --- files of other kinds ---


@pytest.mark.parametrize("format", ["text", "messages", "prompt_completion", "tokens"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("x.xml", "<a>b</a>"), ("x.yaml", "text: a"), ("x.html", "<p>a")),
        *(("x.py", "a = 1"), ("x.xls", b"\xd0\xcf\x11\xe0"), ("x.pkl", b"\x80\x04")),
        *(("x.zip", b"PK\x03\x04\xff"), ("x.tar.gz", gzip.compress(b"a", mtime=0))),
        *(("x.ipynb", '{\n "cells": []\n}'), ("x.jsonl.zst", b"\x28\xb5\x2f\xfd")),
    ],
)
def test_files_of_other_kinds_are_refused(write, load, chatml, name, content, format):
    with pytest.raises(
        UserError, match=r"files are not read. Rows are read from .json"
    ):
        load(write(content, name), chatml, format=format)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            gzip.compress(b"{}", mtime=0),
            "compressed by gzip: let its name end in .gz",
        ),
        ("x.csv", b"PK\x03\x04\xff", "a zip archive: unpack it"),
        ("x.txt", b"PAR1\xff", "a Parquet file: let its name end in .parquet"),
        ("x.jsonl", bz2.compress(b"{}"), "compressed by bzip2: unpack it, or compress"),
        ("x.csv", lzma.compress(b"{}"), "compressed by xz: unpack it"),
        ("x.txt", b"\x28\xb5\x2f\xfd\xff", "compressed by zstd: unpack it"),
        ("x.jsonl.bz2", b"BZh", ".bz2 files are not .* compressed: unpack it, or"),
        (
            "x.parquet.gz",
            gzip.compress(b"\xff", mtime=0),
            r".parquet.gz files are not .* compressed: unpack it",
        ),
    ],
)
def test_a_file_with_another_name_is_recognised(write, load, name, content, message):
    with pytest.raises(UserError, match=message):
        load(write(content, name))


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.rst", "corpus"])
def test_documents_are_those_of_format_text_alone(write, load, chatml, name):
    path = write("some words", name)
    report = load(path).report
    assert report.recognised == {"plain text, one document a file": 1}
    for format in ("messages", "prompt_completion", "tokens"):
        with pytest.raises(UserError, match="is plain text, which format='text' reads"):
            load(path, chatml, format=format)


def test_json_over_several_lines_is_no_document(write, load):
    for value in ([{"text": "a"}], {"text": "a"}):
        with pytest.raises(UserError, match=r"x\.txt holds JSON .*Rename it to .json"):
            load(write(json.dumps(value, indent=1), "x.txt"))


def test_rows_in_json_are_known_under_any_name(write, load):
    for name in ("x.jsonl.bak", "x.data", "x.txt", "x"):
        report = load(write([{"text": "a"}], name)).report
        assert report.recognised == {"JSON lines": 1}


# --- variables of the chat template ---

OPENING = "<|im_start|>assistant\n{{ '' if bare else '> ' }}"
PROMPTED = (
    "{% if style %}[{{ style }}]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ m.content }}{% else %}"
    + OPENING
    + "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + OPENING + "{% endif %}"
)


@pytest.fixture
def prompting(byte_tokenizer):
    """A tokenizer whose template starts answers with "> ", unless it is told not to."""
    tokenizer = byte_tokenizer(specials=SPECIALS)
    tokenizer.chat_template = PROMPTED
    return tokenizer


def test_variables_of_settings_and_rows_reach_the_template(load, prompting, decoded):
    rows = [
        {"messages": TURNS[1:3], "chat_template_kwargs": variables}
        for variables in ({}, {"bare": True}, None, {"style": "x"})
    ]
    settings = {"format": "messages", "chat_template_kwargs": {"style": "s"}}
    examples = load(rows, prompting, **settings)
    start = "hi<|im_start|>assistant\n"
    for index, text in enumerate(
        (f"[s]{start}> yo", f"[s]{start}yo", f"[s]{start}> yo", f"[x]{start}> yo")
    ):
        # What the generation prompt writes is not supervised.
        expected = (f"{text}<|im_end|>", "yo<|im_end|>")
        assert decoded(examples, index, prompting) == expected
    recognised = "variables of the chat template in `chat_template_kwargs`"
    assert examples.report.recognised[recognised] == 2
    assert not examples.report.unread and not examples.report.remarks


def test_variables_that_nothing_reads_are_said_or_refused(load, prompting):
    row = {"messages": TURNS[1:3], "chat_template_kwargs": {"bare": True}}
    rows = [row, row | {"chat_template_kwargs": {"think": 1}}]
    remark = "variables in `chat_template_kwargs` that the chat template does not read"
    report = load(rows, prompting, format="messages").report
    assert report.remarks == {remark: 1}
    with pytest.raises(UserError, match="kwargs`: the chat template does not read `th"):
        load([row], prompting, format="messages", chat_template_kwargs={"think": True})
    for variables, message in (
        ({"tools": []}, r":1: `chat_template_kwargs` has tools, which"),
        ([1], r":1: `chat_template_kwargs` must be an object of .*, got list"),
    ):
        with pytest.raises(UserError, match=message):
            load(
                [row | {"chat_template_kwargs": variables}],
                prompting,
                format="messages",
            )


# --- rows that cannot be used ---

BAD = [
    ("{", {}, r"jsonl:2: malformed JSON"),
    ("3", {}, r"jsonl:2: a row must be a JSON object, got int"),
    ('{"body": "x"}', {}, r"jsonl:2: no field `text`"),
    ('{"text": "\\ud800"}', {}, "half of a surrogate pair"),
    ('{"messages": [{"role": "a"}]}', {"format": "messages"}, "has the role 'a'"),
    ('{"input_ids": [999]}', {"format": "tokens", "train_on": "all"}, "is 999; expec"),
]
GOOD = {"text": "ok", "messages": TURNS, "input_ids": [1, 2]}


@pytest.mark.parametrize(("line", "settings", "reason"), BAD)
def test_bad_rows_are_refused_or_left_out_and_said(
    write, load, chatml, line, settings, reason
):
    path = write(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(UserError, match=reason):
        load(path, chatml, **settings)
    report = load(path, chatml, on_bad_row="skip", **settings).report
    assert (report.rows_read, report.rows_kept) == (3, 2)
    assert report.dropped == {"row that cannot be used": 1}
    (message,) = report.bad_rows
    assert message.startswith(f"{path}:2: ") and message.rstrip(".") in report.summary()
    # What is left is that of a file without the row.
    clean = load([GOOD, GOOD], chatml, on_bad_row="skip", **settings).report
    assert report.fingerprint == clean.fingerprint
    path = write(f"{line}\n{line}\n")
    with pytest.raises(
        UserError, match=r"(?s)no row is left .*2 read, and none can .*\n.*:1(, 2)?: "
    ):
        load(path, chatml, on_bad_row="skip", **settings)


def test_bad_rows_get_a_note_and_held_out_data_the_setting(write, tokenizer):
    path = write('{"text": "a"}\n{\n{"text": 3}\n')
    config = DataConfig(path=path, on_bad_row="skip")
    examples = load_examples(config, tokenizer, vocab_size=300)
    batches = Batches(examples, config, batch_size=1, pad_token_id=0)
    notes = " ".join(data_notes(examples, config, batches, tokenizer))
    assert "2 rows cannot be used and are left out" in notes
    assert f"{path}:2: malformed JSON" in notes
    held_out = EvalConfig(path=path).data_config(config)
    assert held_out.on_bad_row == "skip"
    strict = EvalConfig(path=path, on_bad_row="refuse").data_config(config)
    assert strict.on_bad_row == "refuse"


def test_a_report_lists_the_first_of_many_unread_fields(load):
    rows = [{"text": "a", f"id {number}": 0} for number in range(150)]
    report = load(rows).report
    assert len(report.unread) == 100
    assert "`id 0` (1 row), " in report.summary()
    assert "and 88 more" in report.summary()


def test_a_file_that_cannot_be_read_is_refused_even_if_bad_rows_are_skipped(load):
    with pytest.raises(UserError, match="there is no file"):
        load("absent.jsonl", on_bad_row="skip")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "add", "input": 3, "output": "4"}, "`input` .* got int"),
        (
            {"instruction": "a", "context": ["b"], "output": "c"},
            "`context` .* got list",
        ),
        ({"question": "a", "answer": "b", "system": 1}, "`system` .* got int"),
        ({"messages": TURNS, "system": ["s"]}, "`system` .* got list"),
        ({"messages": str(TURNS)}, "a list as Python prints it; write it by json"),
        ({"data": {"turns": TURNS}}, "got dict with `turns`"),
        (
            {
                "messages": [
                    {"role": "Tool", "content": [{"type": "image", "url": "x"}]}
                ]
            },
            "of the type 'image', and only text",
        ),
    ],
)
def test_what_belongs_to_a_prompt_is_text_or_refused(load, chatml, row, message):
    with pytest.raises(UserError, match=message):
        load([row], chatml, format="messages")


def test_line_breaks_that_a_document_loses_are_said(write, load, decoded):
    examples = load(write(b"a\r\nb\n", "book.txt"))
    assert decoded(examples)[1] == "a\nb\n</s>"
    said = "plain text, one document a file, its line breaks (CR LF or CR) as LF"
    assert list(examples.report.recognised) == [said]
    examples = load(write(b"a\nb\n", "book.txt"))
    assert list(examples.report.recognised) == ["plain text, one document a file"]


@pytest.mark.parametrize(("bos", "count"), [("", 1), ("{{ bos_token }}", 0)])
def test_a_template_without_the_tokenizers_bos_gets_a_note(
    write, byte_tokenizer, bos, count
):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = bos + "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write([{"messages": TURNS}])
    config = DataConfig(path=path, format="messages", train_on="all")
    examples = load_examples(config, tokenizer, vocab_size=300)
    batches = Batches(examples, config, batch_size=1, pad_token_id=0)
    notes = data_notes(examples, config, batches, tokenizer)
    said = "conversations begin without '<s>', which this tokenizer puts before"
    assert sum(note.startswith(said) for note in notes) == count
