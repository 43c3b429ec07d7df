"""Assistant spans, against the text, the tokens and HF's `{% generation %}` masks."""

import copy
import json

import numpy as np
import pytest

from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.conversations import to_messages, tools_of
from qlora_jax.data.encoding import IGNORE, Segmented, tokenize
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
        text, spans = ChatRenderer(chat_tokenizer(template)).spans(turns, **where)
        return text, [text[start:end] for start, end in spans]

    return supervised


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
    text, spans = renderer.spans(turns)
    assert text == renderer.text(turns)
    (encoded,) = tokenize(tokenizer, [Segmented(text, spans)])
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


def test_no_answer_has_no_span_and_an_empty_one_its_end_of_turn(supervised):
    text, pieces = supervised(CHATML, CONVERSATION[:1])
    assert text == "<|im_start|>user\nHi there<|im_end|>\n" and pieces == []
    turns = [CONVERSATION[0], {"role": "assistant", "content": ""}]
    assert supervised(CHATML, turns)[1] == ["<|im_end|>"]


def test_a_template_file_overrides_that_of_the_tokenizer(chat_tokenizer, write):
    path = write(TEMPLATES["plain"][0], "chat.jinja")
    tokenizer = chat_tokenizer("{{ raise_exception('not this one') }}")
    text = ChatRenderer(tokenizer, path).text(CONVERSATION[:1])
    assert text == "user: Hi there\n"


def test_dated_templates_give_the_same_text_every_day(chat_tokenizer):
    llama32 = (
        "{% if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        "Today: {{ date_string }}"
    )
    text = ChatRenderer(chat_tokenizer(llama32)).text(CONVERSATION)
    assert text == "Today: 26 Jul 2024"


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
            "{% if add_generation_prompt %}<assistant><think>{% endif %}",
            r"generation prompt \('.*<think>'\) is not",
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
        ({"text": 1, "id": 2}, r"f:1: expected `messages` .* has `text`, `id`"),
        ({}, r"the row has no fields"),
        ({"messages": []}, r"`messages` must be a non-empty list .* an empty list"),
        ({"messages": {}}, r"`messages` must be a non-empty list .* got dict"),
        ({"messages": ["hi"]}, r"turn 1 of `messages` must be an object, got str"),
        ({"messages": [{"content": "x"}]}, r"needs a string `role` .* `content`"),
        ({"messages": [{"role": "user"}]}, r"needs a string `content` .* got NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"turn 1 of `messages` \(user\) needs a string `content` .* got list",
        ),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            r"turn 1 of `conversations` is `from` 'alien'; known speakers are system",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"is `from` \['gpt'\]"),
        (
            {"conversations": [{"from": "human", "text": "x"}]},
            r"needs a string `content` \(ShareGPT: `value`\), got NoneType",
        ),
    ],
)
def test_bad_rows_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        to_messages(row, "f:1")


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
    pieces = [Segmented(*renderer.spans(turns)) for turns in conversations]
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
    # Without the marks, the same template cannot be labelled.
    bare = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration -%}", "")
    assert not ChatRenderer(chat_tokenizer(bare)).has_marks
    message = "f:3: .* turn 2 differently once other turns"
    with pytest.raises(UserError, match=message):
        supervised(bare, turns, where="f:3")


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
