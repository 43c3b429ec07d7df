"""Assistant spans, against the text, the tokens and HF's `{% generation %}` masks."""

import copy
import json

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, processors

from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.conversations import to_messages, tools_of
from qlora_jax.data.encoding import IGNORE, tokenize
from qlora_jax.data.rows import Reading
from qlora_jax.data.segments import Segmented
from qlora_jax.data.turn_ends import TurnEnds
from qlora_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The shapes of the common families, cut down to what matters for the spans.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
        "\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}"
        "{% endfor %}",
        "</s>",
    ),
    # No special token ends a turn here; the newline does.
    "plain": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "\n",
    ),
}
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
CONVERSATION = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Grüß dich 🙂"},
    {"role": "user", "content": "assistant: say <x>"},
    {"role": "assistant", "content": "  two  spaces"},
]


@pytest.fixture
def chat_tokenizer(byte_tokenizer):
    """A function: chat template -> a tokenizer with it."""

    def make(template):
        tokenizer = byte_tokenizer(specials=SPECIALS)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def supervised(chat_tokenizer):
    """A function: template, turns -> their text, and the pieces that are supervised."""

    def supervised(template, turns=CONVERSATION, **where):
        renderer = ChatRenderer(chat_tokenizer(template))
        (example,) = renderer.examples(turns, **where)
        return example.text, [example.text[start:end] for start, end in example.spans]

    return supervised


def test_white_space_that_an_added_token_takes_is_on_no_side_of_an_edge(byte_tokenizer):
    # As in Phi-3: the tokens of turns take the line breaks after them.
    tokenizer = byte_tokenizer()
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    added = [AddedToken(name, rstrip=True, special=True) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a"}]
    (example,) = ChatRenderer(tokenizer).examples(turns)
    (encoded,) = tokenize(tokenizer, [Segmented(example.text, example.spans)])
    supervised = encoded.labels[encoded.labels != IGNORE].tolist()
    assert supervised == tokenizer.convert_tokens_to_ids(["a", "<|end|>"])
    assert not encoded.straddles


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_what_the_assistant_writes_with_its_end_of_turn(supervised, name):
    template, end = TEMPLATES[name]
    second = CONVERSATION[3]["content"]
    second = second.strip() if name == "llama-3" else second  # it trims contents
    expected = [CONVERSATION[1]["content"] + end, second + end]
    assert supervised(template)[1] == expected


def assert_as_hf(tokenizer, turns):
    """Tokens and labels are those that HF's generation marks give."""
    renderer = ChatRenderer(tokenizer)
    (example,) = renderer.examples(turns)
    assert example.text == renderer.text(turns)
    (encoded,) = tokenize(tokenizer, [Segmented(example.text, example.spans)])
    hf = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.tokens.tolist() == hf["input_ids"]
    assert (encoded.labels != IGNORE).astype(int).tolist() == hf["assistant_masks"]
    assert 0 < sum(hf["assistant_masks"]) < len(hf["assistant_masks"])


def test_labels_agree_with_generation_marks(chat_tokenizer):
    assert_as_hf(chat_tokenizer(CHATML), CONVERSATION)


def test_a_token_across_the_end_of_an_answer_is_supervised_as_in_hf(byte_tokenizer):
    # "!" of the answer and the template's line break are one token.
    tokenizer = byte_tokenizer(specials=SPECIALS, merges=[("!", "Ċ")])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
        "{% endfor %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b!"}]
    assert_as_hf(tokenizer, turns)
    (encoded,) = tokenize(tokenizer, [Segmented("a\nb!\n", [(2, 4)])])
    assert encoded.straddles and (encoded.labels != IGNORE).tolist()[-1]


def test_spaces_that_offsets_leave_out_are_supervised(byte_tokenizer):
    # The tokenizers of GPT-2 and SmolLM give "   b" the offsets of "b".
    tokenizer = byte_tokenizer(specials=SPECIALS, merges=[("Ġ", "Ġ"), ("Ġ", "b")])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = CHATML
    turns = [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "if a:\n   b  \n   b"},
    ]
    assert_as_hf(tokenizer, turns)
    (encoded,) = tokenize(tokenizer, [Segmented("a b", [(2, 3)])])
    assert encoded.straddles and (encoded.labels != IGNORE).tolist() == [False, True]


@pytest.mark.parametrize("form", [normalizers.NFC, normalizers.NFKC, normalizers.NFD])
def test_characters_that_a_normalizer_joins_are_on_their_side_of_an_edge(
    byte_tokenizer, form
):
    tokenizer = byte_tokenizer(merges=[("\u00c3", "\u00a9")])  # "é" in UTF-8
    tokenizer.backend_tokenizer.normalizer = form()
    text = "e\u0301e\u0301 e\u0301"  # decomposed; offsets have the first half alone
    piece = Segmented(text, [(2, len(text))])
    (encoded,) = tokenize(tokenizer, [piece])
    before = tokenizer("e\u0301", add_special_tokens=False)["input_ids"]
    assert encoded.tokens.tolist()[: len(before)] == before
    supervised = encoded.labels != IGNORE
    assert supervised.tolist() == [False] * len(before) + [True] * (
        len(encoded.tokens) - len(before)
    )
    assert not encoded.straddles


def test_no_answer_has_no_span_and_an_empty_one_its_end_of_turn(supervised):
    text, pieces = supervised(CHATML, CONVERSATION[:1])
    assert text == "<|im_start|>user\nHi there<|im_end|>\n" and pieces == []
    turns = [CONVERSATION[0], {"role": "assistant", "content": ""}]
    assert supervised(CHATML, turns)[1] == ["<|im_end|>"]


# Templates that look at other turns than the one they write, or end as the turns were.
LOOKING = {
    "loop.last": "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{{ '' if loop.last and m.role == 'user' else '' }}</s>{% endfor %}",
    "length": "{% if messages | length > 99 %}x{% endif %}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}</s>{% endfor %}",
    "backwards": "{% for m in messages[::-1] %}{% endfor %}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}</s>{% endfor %}",
    "system": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{{ s }}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}</s>{% endfor %}",
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 1 %}"
    "{{ m.role }}:{{ m.content }}</s>{% endfor %}{{ '' if ns.n else 'x' }}",
    "skips": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{{ m.role }}:{{ m.content }}</s>{% endfor %}",
}


@pytest.mark.parametrize("name", [*TEMPLATES, *LOOKING])
@pytest.mark.parametrize("first", ["user", "system"])
def test_one_pass_gives_the_spans_that_growing_prefixes_give(
    chat_tokenizer, monkeypatch, name, first
):
    if name in TEMPLATES:
        template = TEMPLATES[name][0].replace("{% generation %}", "")
        template = template.replace("{% endgeneration %}", "")
    else:
        prompt = "{% if add_generation_prompt %}assistant:{% endif %}"
        template = LOOKING[name] + prompt
    system = [{"role": "system", "content": "s"}] if first == "system" else []
    if name == "mistral":
        system = []
    turns = [*system, *CONVERSATION, *CONVERSATION, CONVERSATION[0]]
    renderer = ChatRenderer(chat_tokenizer(template))
    (example,) = renderer.examples(turns)
    renders = 0
    apply = renderer._apply

    def count(*args):
        nonlocal renders
        renders += 1
        return apply(*args)

    monkeypatch.setattr(renderer, "_apply", count)
    renderer.examples([*turns, *turns[len(system) + 1 :]])
    # The whole conversation, and the prefixes of the first answers at most.
    assert (renders <= 3) == (name in {*TEMPLATES, "system", "skips"})
    monkeypatch.setattr(TurnEnds, "find", lambda *_: None)
    assert renderer.examples(turns) == [example]


@pytest.mark.parametrize(
    ("reasoning", "written"), [("", "\n</think>yo</s>"), ("hm", "hm</think>yo</s>")]
)
def test_an_answer_may_open_its_reasoning_as_the_prompt_does_without_its_line_break(
    supervised, reasoning, written
):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>"
        "{{ m.thinking }}</think>{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    turn = {"role": "assistant", "content": "yo", "thinking": reasoning}
    assert supervised(template, [CONVERSATION[0], turn])[1] == [written]


def test_the_template_for_tools_labels_conversations_that_have_some(chat_tokenizer):
    plain, _ = TEMPLATES["plain"]
    tokenizer = chat_tokenizer({"default": CHATML, "tool_use": DATED + plain})
    renderer = ChatRenderer(tokenizer, date="2024-07-05")
    assert ChatRenderer(tokenizer).reads_clock
    for tools, start, answer in (
        (None, "<|im_start|>user", "  two  spaces<|im_end|>"),
        ([{"name": "f"}], "05 Jul 2024 2024-07-05user: ", "  two  spaces\n"),
    ):
        (example,) = renderer.examples(CONVERSATION, tools=tools)
        assert example.text.startswith(start)
        assert example.text[slice(*example.spans[-1])] == answer


def test_what_ends_a_conversation_is_no_part_of_earlier_answers(supervised):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
    )
    first, second = (CONVERSATION[turn]["content"] + "<|im_end|>" for turn in (1, 3))
    assert supervised(template)[1] == [first, second + "</s>"]


def test_a_turn_without_content_is_written_by_templates_that_read_it(supervised):
    # DeepSeek's template tells calls without content by `content is none`.
    template = (
        "{% for m in messages %}{% if m.tool_calls and m.content is none %}(none)"
        "{% else %}<{{ m.role }}>{{ m.content + '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.arguments.a }}{% endfor %}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"name": "f", "arguments": {"a": "1"}}
    turns = [{"role": "user", "content": "q"}]
    for content in ({}, {"content": ""}):
        calls = [{"role": "assistant", "tool_calls": [call]} | content]
        assert supervised(template, turns + calls)[1] == ["1</s>"]


def test_arguments_are_written_for_templates_that_join_strings(chat_tokenizer):
    template = (
        "{% for m in messages %}{{ m.tool_calls[0].arguments + '!' }}{% endfor %}"
    )
    call = {"name": "f", "arguments": '{"city": "Zürich"}'}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = to_messages({"messages": [turn]}, "r")
    text = ChatRenderer(chat_tokenizer(template)).text(messages)
    assert text == '{"city": "Zürich"}!'


def test_the_byte_order_mark_of_a_template_file_is_not_written(chat_tokenizer, write):
    path = write(b"\xef\xbb\xbf" + CHATML.encode(), "chat.jinja")
    tokenizer = chat_tokenizer(CHATML)
    chats = ChatRenderer(tokenizer, path), ChatRenderer(tokenizer)
    assert len({chat.text(CONVERSATION) for chat in chats}) == 1


def test_a_template_file_overrides_that_of_the_tokenizer(chat_tokenizer, write):
    path = write(TEMPLATES["plain"][0], "chat.jinja")
    tokenizer = chat_tokenizer("{{ raise_exception('not this one') }}")
    text = ChatRenderer(tokenizer, path).text(CONVERSATION[:1])
    assert text == "user: Hi there\n"


# How Llama 3.2 and gpt-oss write the date.
DATED = (
    "{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} "
    '{{ strftime_now("%Y-%m-%d") }}'
)


def test_a_template_writes_the_date_it_is_given_or_todays(chat_tokenizer):
    tokenizer = chat_tokenizer(DATED)
    given = ChatRenderer(tokenizer, date="2024-07-05")
    assert given.text(CONVERSATION) == "05 Jul 2024 2024-07-05"
    today = ChatRenderer(tokenizer).text(CONVERSATION)
    assert today == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert today != given.text(CONVERSATION)
    computed = chat_tokenizer("{% set f = '%Y' %}{{ strftime_now(f) }}")
    assert ChatRenderer(computed).reads_clock
    with pytest.raises(UserError, match="computes the format of the date"):
        ChatRenderer(computed, date="2024-07-05")


CALLING = (
    "{{ tools[0].name if tools }}{% for m in messages %}{% for c in m.tool_calls %}"
    "{{ (c.function or c).arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"city": "Rome", "days": [1]}', '{"city": "Rome", "days": [1]}'),
        ({"city": "Rome"}, '{"city": "Rome"}'),
        ("{}", "{}"),
        ("not JSON", '"not JSON"'),
        ("[1]", '"[1]"'),
    ],
)
def test_arguments_in_json_are_written_once(chat_tokenizer, nested, arguments, written):
    call = {"name": "weather", "arguments": arguments}
    turn = {"role": "assistant", "content": None}
    turn["tool_calls"] = [{"function": call} if nested else call]
    messages = to_messages({"messages": [turn]}, "r")
    assert ChatRenderer(chat_tokenizer(CALLING)).text(messages) == written
    assert call["arguments"] is arguments  # the row is not changed


@pytest.mark.parametrize("arguments", ['{"a": 1', "{'a': 1}", "", "[1]", "null", '"x"'])
def test_arguments_that_are_no_object_are_written_as_they_are_and_said(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    reading = Reading()
    (message,) = to_messages({"messages": [turn]}, "r", reading)
    assert message["tool_calls"] == [call]
    phrase = "`arguments` of calls that are no JSON object, as a string"
    assert phrase in reading.recognised


def test_tools_are_a_list_or_its_json(chat_tokenizer):
    renderer = ChatRenderer(chat_tokenizer(CALLING))
    for tools in ([{"name": "t"}], '[{"name": "t"}]'):
        found = tools_of({"tools": tools}, "r")
        assert renderer.text(CONVERSATION, tools=found) == "t"
    for nothing in (None, [], "", "[]"):
        assert tools_of({"tools": nothing}, "r") is None
    for wrong in ("{", '{"name": "t"}', 3):
        with pytest.raises(UserError, match="r: `tools`"):
            tools_of({"tools": wrong}, "r")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    for tool in ({"name": "t"}, {"type": "function", "function": {"name": "t"}}):
        inner = tool.get("function", tool)
        tool = copy.deepcopy(tool)
        tool.get("function", tool)["parameters"] = json.dumps(schema)
        whole = copy.deepcopy(tool)
        whole.get("function", whole)["parameters"] = schema
        for written in (tool, json.dumps(tool), json.dumps(whole)):
            reading = Reading()
            assert tools_of({"tools": [written]}, "r", reading) == [whole]
            assert any("decoded from JSON" in r for r in reading.recognised)
        assert "parameters" not in inner
    (none,) = tools_of({"tools": [{"name": "t", "parameters": " "}]}, "r") or ()
    assert none == {"name": "t", "parameters": " "}
    broken = {"name": "t", "parameters": "{"}
    for wrong in ("look", broken, {"type": "function", "function": broken}):
        with pytest.raises(UserError, match="r: a function in `tools`, or its") as said:
            tools_of({"tools": [wrong]}, "r")
        assert str(said.value).count("is text and not") == 1
    turn = {"role": "assistant", "content": "a", "tool_calls": []}
    (message,) = to_messages({"messages": [turn]}, "r")
    assert message == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("name", [*TEMPLATES, "marked"])
@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"masked": True}]
)
def test_an_excluded_turn_has_no_span(supervised, name, flag):
    template = CHATML if name == "marked" else TEMPLATES[name][0]
    if name == "chatml":  # without its marks
        template = template.replace("{% generation %}", "")
        template = template.replace("{% endgeneration %}", "")
    text, (_, second) = supervised(template)
    turns = copy.deepcopy(CONVERSATION)
    turns[1] |= flag
    assert supervised(template, turns) == (text, [second])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"weight": 0.5}, "`weight` must be true or false .1 or 0., got 0.5"),
        ({"train": "no"}, "`train` must be true or false"),
        ({"train": True, "weight": 0}, "`train` and `weight` disagree"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(flags, match):
    turn = {"role": "assistant", "content": "a", **flags}
    with pytest.raises(UserError, match=match):
        to_messages({"messages": [turn]}, "r")
    with pytest.raises(UserError, match="role 'user'; only the assistant's"):
        to_messages({"messages": [{"role": "user", "content": "a", "train": 1}]}, "r")


@pytest.mark.parametrize("name", ["llama-3", "plain", "default system"])
def test_a_conversation_may_begin_with_the_assistant(supervised, name):
    template, end = TEMPLATES["llama-3" if name == "default system" else name]
    if name == "default system":
        template = "{{ bos_token }}system<|eot_id|>" + template.removeprefix(
            "{{ bos_token }}"
        )
    turns = [{"role": "assistant", "content": "Hello"}, *CONVERSATION]
    _, pieces = supervised(template, turns)
    assert pieces[0] == "Hello" + end and len(pieces) == 3


def test_tools_and_tool_calls_reach_the_template(chat_tokenizer):
    template = "{{ tools[0].name }}{{ messages[0].tool_calls[0] }}"
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": ["call"]}]}
    renderer = ChatRenderer(chat_tokenizer(template))
    assert renderer.text(to_messages(row, "r"), tools=[{"name": "t"}]) == "tcall"


# --- templates that cannot be labelled ---


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>Sure: {% endif %}",
            r"generation prompt \('.*Sure: '\) is not",
        ),
        *(
            (template, r"f:3: .* blocks do not mark its text plainly")
            for template in (
                "{% for m in messages %}{% generation %}{% generation %}"
                "{{ m.content }}{% endgeneration %}{% endgeneration %}{% endfor %}",
                "{% set x %}{% for m in messages %}{% generation %}{{ m.content }}"
                "{% endgeneration %}{% endfor %}{% endset %}{{ x[1:] }}",
            )
        ),
    ],
    ids=["prompt", "nested marks", "cut marks"],
)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(
    supervised, template, message
):
    with pytest.raises(UserError, match=message):
        supervised(template, where="f:3")


@pytest.mark.parametrize(
    ("template", "turn", "message"),
    [
        (
            TEMPLATES["mistral"][0],
            {"role": "system", "content": "x"},
            r"f:7: .* \(system\): no such role",
        ),
        (
            "{{ 'a' + messages[0].tool_calls[0] }}",
            {"role": "assistant", "content": None, "tool_calls": [1]},
            r"f:7: .* \(assistant\): can only concatenate",
        ),
        ("{{ 1 / 0 }}", CONVERSATION[0], r"f:7: .* \(user\): division by zero"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            CONVERSATION[0],
            r"f:7: .* \(user\): maximum recursion depth",
        ),
    ],
)
def test_turns_that_the_template_cannot_render_name_the_row(
    chat_tokenizer, template, turn, message
):
    renderer = ChatRenderer(chat_tokenizer(template))
    with pytest.raises(UserError, match=message):
        renderer.text(to_messages({"messages": [turn]}, "f:7"), where="f:7")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template.*`chat_template\.jinja`"),
        ("", r"no chat template.*`chat_template\.jinja`"),
        (
            "{% for m in messages %}{{ m['role'] ",
            "tokenizer's chat template is not a valid.*: l",
        ),
    ],
)
def test_a_missing_template_and_one_with_a_syntax_error_are_refused(
    chat_tokenizer, template, message
):
    with pytest.raises(UserError, match=message):
        ChatRenderer(chat_tokenizer(template))


def test_a_template_file_that_cannot_be_used_is_refused(chat_tokenizer, write):
    file = write("line\n{% nonsense %}", "chat.jinja")
    message = r"chat\.jinja is not a valid Jinja .* line 2: "
    with pytest.raises(UserError, match=message):
        ChatRenderer(chat_tokenizer(CHATML), file)
    with pytest.raises(UserError, match=r"cannot read .*absent\.jinja"):
        ChatRenderer(chat_tokenizer(CHATML), "absent.jinja")
    with pytest.raises(UserError, match=r"chat\.jinja is empty"):
        ChatRenderer(chat_tokenizer(CHATML), write(" \n", "chat.jinja"))
    file = write(json.dumps({"chat_template": CHATML}), "chat_template.json")
    with pytest.raises(UserError, match=r"json is JSON, .* string of its `chat_templ"):
        ChatRenderer(chat_tokenizer(CHATML), file)


# --- rows to messages ---


def test_sharegpt_becomes_messages_and_messages_are_kept_unchanged():
    speakers = {"human": "q", "gpt": "a", "observation": "o"}
    turns = [{"from": speaker, "value": text} for speaker, text in speakers.items()]
    messages = to_messages({"system": "Be brief.", "conversations": turns}, "r")
    roles = {"system": "Be brief.", "user": "q", "assistant": "a", "tool": "o"}
    expected = [{"role": role, "content": text} for role, text in roles.items()]
    assert messages == expected
    assert to_messages({"messages": CONVERSATION}, "r") == CONVERSATION


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 1, "id": 2}, r"f:1: expected a conv.*`messages`, .* `text`, `id`"),
        ({}, r"the row has no fields"),
        ({"messages": []}, r"`messages` must be a non-empty list .* an empty list"),
        ({"messages": {}}, r"`messages` must be a non-empty list .* got dict"),
        ({"messages": ["hi"]}, r"turn 1 of `messages` must be an object, got str"),
        ({"messages": [{"content": "x"}]}, r"needs a string `role` .* `content`"),
        ({"messages": [{"role": "user"}]}, r"needs a string `content` .* got NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"turn 1 of `messages`: part 1 of its `content` is not text; expected",
        ),
        (
            {"messages": [{"role": "user", "content": ["a", {"type": "image_url"}]}]},
            r"part 2 of its `content` is of the type 'image_url', and only text",
        ),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            r"1 of `conversations` has the role 'alien'; .* `data.roles` = {'alien'",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "needs a string `role`"),
        (
            {"messages": [{"role": "function_call", "content": "no JSON"}]},
            "'function_call', whose text must be a call in JSON",
        ),
        (
            {"messages": [{"role": "user"}], "conversations": [{"from": "gpt"}]},
            "the row has `messages` and `conversations`, .* `data.messages`",
        ),
        (
            {"conversations": [{"from": "human", "text": "x"}]},
            r"needs a string `content` \(ShareGPT: `value`\), got NoneType",
        ),
    ],
)
def test_bad_rows_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        to_messages(row, "f:1", roles={})


# --- real text ---


@pytest.mark.real
def test_every_answer_of_the_fastchat_conversations_is_supervised_exactly(
    shared_data, mistral
):
    tokenizer = copy.deepcopy(mistral)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    file = shared_data / "text/fastchat-dummy/dummy_conversation.json"
    rows = json.loads(file.read_text())
    renderer = ChatRenderer(tokenizer)
    conversations = [to_messages(row, "r") for row in rows]
    examples = [e for turns in conversations for e in renderer.examples(turns)]
    pieces = [Segmented(example.text, example.spans) for example in examples]
    answers = 0
    for turns, encoded in zip(conversations, tokenize(tokenizer, pieces), strict=True):
        mask = encoded.labels != IGNORE
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
        runs = [
            tokenizer.decode(encoded.labels[start:end])
            for start, end in edges.reshape(-1, 2)
        ]
        expected = [t["content"] + "</s>" for t in turns if t["role"] == "assistant"]
        assert runs == expected
        assert encoded.tokens.tolist().count(tokenizer.bos_token_id) == 1
        assert not encoded.straddles
        answers += len(runs)
    assert answers > 500


# --- the template's own marks ---

# The same text as CHATML, with what it is to mark in other places: the thinking of a
# model is stripped from earlier turns, which no growing prefix can follow.
MARKED = (
    "{%- for m in messages %}\n"
    "    {{- '<|im_start|>' + m.role + '\n' }}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "        {%- generation %}\n"
    "            {%- if loop.last %}{{- '<think>' + m.thinking + '</think>' }}"
    "{%- endif %}\n            {{- m.content + '<|im_end|>' -}}\n"
    "        {%- endgeneration -%}\n"
    "    {%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}\n"
    "    {{- '\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.mark.parametrize("trim", ["", "-"])
@pytest.mark.parametrize("gap", ["", " ", "\n", "\n   "])
def test_marks_change_no_white_space_of_the_text(chat_tokenizer, trim, gap):
    parts = (
        *("{% for m in messages %}", gap, "[", gap),
        *("{%", trim, " generation ", trim, "%}", gap, "{{ m.content }}", gap),
        *("{%", trim, "endgeneration", trim, "%}", gap, "]{% endfor %}"),
    )
    # HF's mask leaves out the last bytes of a character that is several tokens.
    turns = [{**turn, "content": ascii(turn["content"])} for turn in CONVERSATION]
    assert_as_hf(chat_tokenizer("".join(parts)), turns)


def test_a_template_that_strips_earlier_thinking_is_followed_by_its_marks(
    chat_tokenizer, supervised
):
    turns = [dict(turn) for turn in CONVERSATION]
    turns[1]["thinking"], turns[3]["thinking"] = "hm", "so"
    assert ChatRenderer(chat_tokenizer(MARKED)).has_marks
    first, second = (turns[turn]["content"] + "<|im_end|>" for turn in (1, 3))
    assert supervised(MARKED, turns)[1] == [first, f"<think>so</think>{second}"]


def test_a_template_that_strips_earlier_thinking_gives_one_example_an_answer(
    chat_tokenizer,
):
    turns = [dict(turn) for turn in CONVERSATION]
    turns[1]["thinking"], turns[3]["thinking"] = "hm", "so"
    bare = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration -%}", "")
    renderer = ChatRenderer(chat_tokenizer(bare))
    examples = renderer.examples([*turns, CONVERSATION[0]])
    assert [example.answers for example in examples] == [(1,), (3,)]
    for example, stop in zip(examples, (2, 4), strict=True):
        # Prompt and answer are those of inference.
        prompt = renderer.text(turns[: stop - 1], add_generation_prompt=True)
        (span,) = example.spans
        assert example.text[: span[0]] == prompt
        assert example.text == renderer.text(turns[:stop])
    # The last answer alone takes one; a later turn of the user is left out.
    (last,) = renderer.examples(turns, answers=[3])
    assert last == examples[1]


# A prompt that opens the reasoning, and a template that never writes it.
OPENS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("turn", "written"),
    [
        ({"content": "<think>\nhm\n</think>\n\nyo"}, "hm\n</think>\n\nyo</s>"),
        ({"content": "hm</think> yo"}, "hm\n</think> yo</s>"),
        ({"content": "yo", "reasoning_content": "hm"}, "hm\n</think>\n\nyo</s>"),
        ({"content": "yo"}, "\n</think>\n\nyo</s>"),
    ],
)
def test_an_answer_follows_the_prompt_that_opens_its_reasoning(
    chat_tokenizer, turn, written
):
    renderer = ChatRenderer(chat_tokenizer(OPENS))
    turns = [CONVERSATION[0], {"role": "assistant", **turn}]
    first, second = renderer.examples([*turns, *turns])
    prompt = "<user>Hi there</s><assistant><think>\n"
    assert first.text == prompt + written
    assert first.spans == [(len(prompt), len(first.text))]
    assert second.text == renderer.text(turns) + first.text


def test_marks_may_cover_part_of_a_turn(supervised):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}"
        "{{ m.content }}{% endgeneration %}</s>{% else %}U:{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    contents = [turn["content"] for turn in CONVERSATION]
    assert supervised(template)[1] == contents[1::2]


def test_private_characters_in_the_text_are_no_marks(supervised):
    turns = [
        {"role": "user", "content": "\ue000 and \ue001"},
        {"role": "assistant", "content": "\ue000"},
    ]
    text, pieces = supervised(CHATML, turns)
    assert pieces == ["\ue000<|im_end|>"]
    assert "\ue000 and \ue001" in text
