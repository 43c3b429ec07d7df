"""Conversations to examples: which answers are trained, what is lost or changed."""

import dataclasses
import json

import pytest

from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.notes import data_notes
from qlora_jax.data.rendering import UNANSWERED, plain_row, with_date
from qlora_jax.errors import UserError

# Writes text alone; with "calls", tool calls and tools too, and with "system" nothing.
TEXT = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>"
    "{{ m.content | trim }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = "{{ tools | tojson if tools }}"
CALLS = TOOLS + TEXT.replace("</s>", "{{ m.tool_calls | tojson if m.tool_calls }}</s>")
XML = TOOLS + TEXT.replace(
    "</s>",
    "{% for c in m.tool_calls %}<f={{ c.name }}>{% for k, v in c.arguments | items %}"
    "<p={{ k }}>{{ v if v is string else v | tojson }}</p>{% endfor %}{% endfor %}</s>",
)
CALL = {"name": "look", "arguments": {"city": 'Zürich "Ü"', "days": [1, 2.5, True]}}
ASKED = {"role": "user", "content": " Where?\n\tThere & <x>\n"}


def answer(content="", **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture
def load_chat(write, load):
    """A function: template, rows, settings -> their examples."""

    def load_chat(template, *rows, **config):
        file = write(template, "chat.jinja")
        return load(list(rows), format="messages", chat_template=file, **config)

    return load_chat


@pytest.mark.parametrize("template", [CALLS, XML])
def test_what_a_template_writes_in_another_form_is_not_reported(load_chat, template):
    row = {
        "messages": [ASKED, answer('  "Yes"\n\n é ', tool_calls=[CALL]), ASKED],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    assert load_chat(template, row).report.remarks == {UNANSWERED: 1}
    del row["messages"][-1]
    assert load_chat(template, row).report.remarks == {}


LOST = [
    ({"messages": [ASKED, answer("a", tool_calls=[CALL])]}, "calls of functions"),
    ({"messages": [ASKED, answer("a")], "tools": [CALL]}, "functions in `tools`"),
    (
        {"messages": [ASKED, answer("a")], "system": "Brief"},
        "contents of turns of the role 'system'",
    ),
    (
        {"messages": [ASKED, answer("a", reasoning_content="since b")]},
        "reasonings of answers",
    ),
    (
        {"messages": [{"role": "system", "content": "No\nB"}, ASKED, answer("a")]},
        "contents of turns of the role 'system'",
    ),
]


@pytest.mark.parametrize(("row", "what"), LOST, ids=[what for _, what in LOST])
def test_what_a_template_does_not_write_is_counted_with_the_first_rows(
    load_chat, row, what
):
    examples = load_chat(TEXT, {"messages": [ASKED, answer("a")]}, row, row)
    ((remark, count),) = examples.report.remarks.items()
    assert remark.startswith(what) and remark.endswith("template does not write")
    assert count == 2
    assert [place[-2:] for place in examples.report.places[remark]] == [":2", ":3"]


def test_arguments_that_are_not_written_are_counted(load_chat):
    template = XML.replace("{{ v if v is string else v | tojson }}", "")
    row = {"messages": [ASKED, answer(tool_calls=[CALL])]}
    (remark,) = load_chat(template, row).report.remarks
    assert remark.startswith("arguments of calls")


TOOL = {
    "name": "look",
    "description": 'Looks "up"\na place',
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("written", "lost"),
    [
        ("{{ t | tojson }}", ""),
        ("{{ t.name }} {{ t.description }}", "parameters"),
        ("{{ t.name }} {{ t.parameters.properties | list }}", "descriptions"),
        ("{{ t.name }}", "descriptions parameters"),
        ("{{ t.description }}", "functions"),
    ],
)
def test_parts_of_tools_that_are_not_written_are_counted(load_chat, written, lost):
    template = "{% for t in tools %}" + written + "{% endfor %}" + TEXT
    row = {"messages": [ASKED, answer("a")], "tools": [TOOL]}
    phrases = {
        f"{what} of functions".replace("functions of ", "")
        + " in `tools` that the chat template does not write"
        for what in lost.split()
    }
    assert load_chat(template, row).report.remarks == dict.fromkeys(phrases, 1)


@pytest.mark.parametrize("name", ["arguments", "parameters"])
@pytest.mark.parametrize("encoded", [False, True])
def test_the_parameters_of_a_call_are_its_arguments(load_chat, decoded, name, encoded):
    arguments = {"city": "Oslo"}
    call = {"name": "look", name: json.dumps(arguments) if encoded else arguments}
    calls = "{% for c in m.tool_calls %}{{ c.arguments }}{{ c.name }}{% endfor %}"
    template = TEXT.replace("</s>", calls + "</s>")
    turns = [ASKED, answer(tool_calls=[call | {"id": "1", "thought": "why"}])]
    examples = load_chat(template, {"messages": turns})
    assert "{'city': 'Oslo'}look" in decoded(examples)[1]
    assert examples.report.remarks == {
        "other fields of calls that the chat template does not write": 1
    }
    phrase = "`parameters` of calls as `arguments`"
    assert (phrase in examples.report.recognised) == (name == "parameters")


def test_an_answer_that_is_lost_altogether_is_refused_unless_allowed(load_chat):
    rows = [{"messages": [ASKED, answer(tool_calls=[CALL])]}] * 2
    with pytest.raises(UserError, match=r":1, 2: .* nothing of the answer in turn 2"):
        load_chat(TEXT, *rows)
    report = load_chat(TEXT, *rows, allow_lost_answers=True).report
    assert report.remarks == {
        "answers (all of their text and calls) that the chat template does not write": 2
    }
    # An answer that is empty in the row is no loss.
    (remark,) = load_chat(TEXT, {"messages": [ASKED, answer()]}).report.remarks
    assert remark == "answers trained that have no text and no calls"


TURNS = [ASKED, answer("one"), ASKED, answer("two"), ASKED, answer("three", weight=0)]


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({}, ["one", "two"]),
        ({"answers": (0,)}, ["one"]),
        ({"answers": (-2, 0, 9)}, ["one", "two"]),
        ({"train_on": "last"}, ["three"]),
    ],
)
@pytest.mark.parametrize("marks", [False, True])
def test_the_answers_that_are_trained_can_be_chosen(
    load_chat, decoded, config, trained, marks
):
    template = TEXT
    if marks:
        template = TEXT.replace(
            "{{ m.content | trim }}</s>",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
            "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}",
        )
    turns = TURNS if trained != ["three"] else [*TURNS[:5], answer("three")]
    examples = load_chat(template, {"messages": turns}, **config)
    assert decoded(examples)[1] == "".join(f"{text}</s>" for text in trained)
    ((remark, count),) = examples.report.remarks.items()
    assert remark.startswith("answers that are not trained")
    assert count == 3 - len(trained)


# One block for the reasoning of an answer, and one for its text, if it has them.
TWO_BLOCKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% if m.thinking and not STRIPS %}{% generation %}[{{ m.thinking }}]"
    "{% endgeneration %}{% endif %}{% if m.content %}{% generation %}{{ m.content }}"
    "</s>{% endgeneration %}{% endif %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("first", "written"),
    [(answer("a"), "a</s>"), (answer(), ""), (answer("a", thinking="h"), "[h]a</s>")],
)
def test_the_generation_blocks_of_an_answer_are_those_that_its_turn_adds(
    load_chat, decoded, first, written
):
    row = {"messages": [ASKED, first, ASKED, answer("b", thinking="t")]}
    template = TWO_BLOCKS.replace("STRIPS", "false")
    last = load_chat(template, row, train_on="last")
    assert decoded(last)[1] == "[t]b</s>"
    if written:
        assert decoded(load_chat(template, row, answers=(0,)))[1] == written
    if first.get("thinking"):  # no longer written once there are later turns
        template = TWO_BLOCKS.replace("STRIPS", "not loop.last")
        assert decoded(load_chat(template, row, train_on="last"))[1] == "[t]b</s>"
        with pytest.raises(UserError, match="3 blocks for 2 turns .* cannot be told"):
            load_chat(template, row, answers=(0,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answers": ()}, "`data.answers` must be a list of indices"),
        ({"answers": (0,), "train_on": "last"}, "Leave out one of them"),
        ({"answers": (0,), "format": "text"}, "read by format='messages' only"),
    ],
)
def test_answers_that_cannot_be_chosen_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**{"path": "x", "format": "messages"} | settings)


def test_a_split_conversation_is_one_row_and_is_reported(load_chat):
    strips = TEXT.replace(
        "{{ m.content", "{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content"
    )
    examples = load_chat(strips, {"messages": TURNS[1:4]})
    report = examples.report
    assert (report.rows_read, report.rows_kept, report.examples) == (1, 1, 2)
    (split,) = (remark for remark in report.remarks if "split" in remark)
    assert report.remarks[split] == 1


@pytest.mark.parametrize("written", ["<think>\n\n</think>", "\n</think>", "[/THINK]"])
def test_empty_reasoning_is_counted(load_chat, written):
    template = TEXT.replace("{{ m.content", written + "{{ m.content")
    report = load_chat(template, {"messages": TURNS[:4]}).report
    assert report.remarks == {"answers trained with empty reasoning": 2}


# --- The date ---

CLOCK = "{{ strftime_now('%Y-%m-%d') }}" + TEXT
GIVEN = "{{ date_string }}" + TEXT


def test_the_date_is_part_of_the_data_where_a_template_writes_it(
    load_chat, byte_tokenizer, decoded
):
    tokenizer = byte_tokenizer()
    row = {"messages": [ASKED, answer("a")]}
    for template, dated in ((CLOCK, True), (GIVEN, True), (TEXT, False)):
        examples = [load_chat(template, row, date=f"2024-07-0{day}") for day in (5, 6)]
        fingerprints = {e.report.fingerprint for e in examples}
        assert len(fingerprints) == 1 + dated
    assert decoded(load_chat(CLOCK, row, date="2024-07-05"))[0][:10] == "2024-07-05"
    # A template that takes no date of its own accord has none in its fingerprint.
    config = DataConfig(path="x", format="messages")
    for template, dated in ((CLOCK, True), (GIVEN, False), (TEXT, False)):
        tokenizer.chat_template = template
        assert (with_date(config, tokenizer).date is not None) == dated
        given = dataclasses.replace(config, date="2021-01-01")
        assert with_date(given, tokenizer) == given
    with pytest.raises(UserError, match="`data.date` must be a day in the form"):
        DataConfig(path="x", date="26 Jul 2024")


# --- Rows ---


def test_nulls_of_calls_and_tools_count_as_absent_and_are_counted():
    arguments = {"city": "Rome", "unit": None, "when": {"day": None, "all": [None, 1]}}
    turn = answer(tool_calls=[{"name": "look", "arguments": arguments}], name=None)
    tool = {"name": "look", "parameters": {"default": None, "enum": ["a", None]}}
    row, changes = plain_row({"messages": [turn], "tools": [tool]})
    call = {"city": "Rome", "when": {"all": [None, 1]}}
    assert row["messages"] == [answer(tool_calls=[{"name": "look", "arguments": call}])]
    assert row["tools"] == [{"name": "look", "parameters": {"enum": ["a", None]}}]
    assert list(changes.values()) == [3]
    # In a JSON string they were written on purpose.
    text = answer(tool_calls=[{"name": "look", "arguments": '{"unit": null}'}])
    assert plain_row({"messages": [text], "tools": '[{"a": null}]'}) == (
        {"messages": [text], "tools": '[{"a": null}]'},
        {},
    )


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ({"temp": 21, "sky": "über"}, '{"temp": 21, "sky": "über"}'),
        ([1, 2], "[1, 2]"),
        (21.5, "21.5"),
        ([], "[]"),
        (["a", "b"], '["a", "b"]'),
        ([{"type": "row", "n": 1}], '[{"type": "row", "n": 1}]'),
        (False, "false"),
    ],
)
def test_results_of_tools_become_json(result, content):
    for turn, name in (
        ({"role": "tool"}, "content"),
        ({"role": "Tool"}, "content"),
        ({"from": "tool_response"}, "value"),
    ):
        row, changes = plain_row({"messages": [turn | {name: result}]})
        assert row["messages"] == [turn | {name: content}]
        assert list(changes.values()) == [1]
    parts = [{"type": "text", "text": "a"}]
    kept = {"messages": [{"role": "tool", "content": parts}, {"role": "user", "n": 1}]}
    assert plain_row(kept) == (kept, {})
    row, _ = plain_row(
        {"messages": [{"role": "bot", "content": {}}]}, "", {"bot": "tool"}
    )
    assert row["messages"] == [{"role": "bot", "content": "{}"}]


def test_empty_answers_and_special_tokens_in_texts_are_counted(load_chat):
    # `<s>` is a tag of HTML too; both become BOS and EOS as the template's own do.
    striked = {"role": "user", "content": "<s>old</s>"}
    rows = [
        {"messages": [striked, answer("a</s>")]},
        {"messages": [ASKED, answer(" ")]},
        {"messages": [ASKED, answer("", train=False), ASKED, answer("b")]},
        {"messages": [ASKED, answer("", tool_calls=[CALL])]},
    ]
    remarks = load_chat(CALLS, *rows).report.remarks
    assert remarks["turns whose text has special tokens of the tokenizer"] == 2
    assert remarks["answers trained that have no text and no calls"] == 1
    assert len(remarks) == 3  # and the answer that is not trained


def test_remarks_are_notes_with_their_first_rows(load_chat, byte_tokenizer):
    rows = [{"messages": [ASKED, answer("a")], "tools": [CALL]}] * 5
    rows += [{"messages": [ASKED, answer("a"), ASKED]}]
    examples = load_chat(TEXT, *rows)
    assert "functions in `tools` that the chat template does not write: 5;" in (
        examples.report.summary()
    )
    config = DataConfig(path="x", format="messages")
    batches = Batches(examples, config, batch_size=1, epochs=1, pad_token_id=0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEXT
    notes = data_notes(examples, config, batches, tokenizer)
    (note,) = (note for note in notes if "functions in" in note)
    assert "does not write: 5; the first in " in note
    assert note.count("data.jsonl:") == 3
    (note,) = (note for note in notes if note.startswith(UNANSWERED))
    assert "is not trained: 1; the first in " in note and "data.jsonl:6. What" in note


# The shape of Gemma 4: reasoning is left out of answers, and the prompt closes it.
CLOSED = (
    "{% for m in messages %}<|turn>{{ m.role }}\n"
    "{{ m.content.split('<channel|>')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>assistant\n"
    "{% if not thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
# The shape of Hermes: a line break that depends on whether a turn follows.
SPACED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'tool' and not loop.last %}{{ '\n' }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTED = "answers written after the generation prompt, where"


@pytest.mark.parametrize(
    ("template", "turns", "texts"),
    [
        (
            CLOSED,
            [
                {"role": "user", "content": "q"},
                answer("<|channel>thought\nr<channel|>a"),
            ],
            [
                (
                    "<|turn>user\nq</s>\n<|turn>assistant\n<|channel>thought\n<channel|>",
                    "a",
                )
            ],
        ),
        (
            CLOSED,
            [
                *({"role": "user", "content": "q"}, answer("a")),
                *({"role": "user", "content": "p"}, answer("b")),
            ],
            [
                (
                    "<|turn>user\nq</s>\n<|turn>assistant\n<|channel>thought\n<channel|>",
                    "a",
                ),
                (
                    "<|turn>user\nq</s>\n<|turn>assistant\na</s>\n<|turn>user\np</s>\n"
                    "<|turn>assistant\n<|channel>thought\n<channel|>",
                    "b",
                ),
            ],
        ),
        (
            SPACED,
            [{"role": "tool", "content": "4"}, answer("four")],
            [("<tool>4</s><assistant>", "four")],
        ),
    ],
)
def test_an_answer_follows_the_prompt_that_a_model_sees(
    load_chat, decoded, template, turns, texts
):
    examples = load_chat(template, {"messages": turns})
    assert len(examples) == len(texts)
    for index, (before, text) in enumerate(texts):
        whole, supervised = decoded(examples, index)
        # The line break after the end of a turn is not the model's.
        assert whole.rstrip() == f"{before}{text}</s>"
        assert supervised == f"{text}</s>"
    (said,) = (r for r in examples.report.remarks if r.startswith(PROMPTED))
    assert examples.report.remarks[said] == len(texts)
    lost = "reasonings of answers that the chat template does not write"
    assert (lost in examples.report.remarks) == ("r<channel|>" in turns[1]["content"])


@pytest.mark.parametrize(
    "template",
    [
        CLOSED.replace("\n<channel|>", "\nLet me<channel|>"),  # not empty
        SPACED.replace("}<assistant>", "}<assistant>Well, "),  # words of its own
        # The answer opens its reasoning again.
        CLOSED.replace(".split('<channel|>')[-1]", ""),
    ],
)
def test_a_prompt_that_says_something_else_is_refused(load_chat, template):
    turns = [
        {"role": "user", "content": "q"},
        answer("<|channel>thought\nr<channel|>a"),
    ]
    with pytest.raises(UserError, match="is not how it starts the assistant's turn 2"):
        load_chat(template, {"messages": turns})


def test_an_answer_may_begin_inside_the_generation_prompt(load_chat, decoded):
    template = TEXT.replace("}<assistant>", "}<assistant>Answer: ")
    turns = [{"role": "user", "content": "4"}, answer("Answer: 4")]
    text, supervised = decoded(load_chat(template, {"messages": turns}))
    assert (text, supervised) == ("<user>4</s><assistant>Answer: 4</s>", "4</s>")
    # The question does not count as a lost answer.
    lost = TEXT.replace("m.content | trim", "m.content if m.role == 'user'")
    with pytest.raises(UserError, match="writes nothing of the answer in turn 2"):
        load_chat(lost, {"messages": [turns[0], answer("4")]})


def test_answers_without_the_end_that_others_have_are_counted(load_chat):
    # Metharme writes EOS after the last turn alone.
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )
    turns = [{"role": "user", "content": "q"}, answer("a")]
    said = "answers that end without a special token, unlike others of their"
    remarks = load_chat(template, {"messages": turns * 3}).report.remarks
    assert [n for r, n in remarks.items() if r.startswith(said)] == [2]
    assert not load_chat(template, {"messages": turns}).report.remarks
    assert not load_chat(TEXT, {"messages": turns * 3}).report.remarks
