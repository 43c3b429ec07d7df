"""Streamed text, stop texts and chat prompts, without a model."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.errors import UserError
from qlora_jax.inference.text import ChatPrompts, Detokenizer, resolve_stop

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SINGLE = (
    "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} </s>"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", name="tokenizer")
def of_bytes():
    """One token a byte, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def stream(tokenizer, text, size=1, **settings):
    """Returns the pieces of a text that arrives `size` tokens (bytes) at a time."""
    tokens = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokenizer("Q:")["input_ids"], **settings)
    pieces = []
    for at in range(0, len(tokens), size):
        last = at + size >= len(tokens)
        pieces.append(detokenizer.add(tokens[at : at + size], last=last))
        if detokenizer.stopped:
            break
    assert "".join(pieces) == detokenizer.text
    return pieces


def test_a_character_that_the_prompt_begins_is_completed(tokenizer):
    tokens = tokenizer("Q: ü!")["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokens[:4])  # ends after a byte of ü's two
    assert detokenizer.add(tokens[4:5]) == "ü"
    assert detokenizer.add(tokens[5:], last=True) == "!"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_hold_complete_characters(tokenizer, size):
    text = "Grüß dich 🙂, 你好"
    pieces = stream(tokenizer, text, size)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert size > 1 or pieces[:4] == ["G", "r", "", "ü"]


def test_an_incomplete_last_character_is_left_out(tokenizer):
    tokens = tokenizer("ab🙂")["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer, tokens[:1])
    assert detokenizer.add(tokens[1:], last=True) == "b"


def test_special_tokens_are_left_out(tokenizer):
    assert "".join(stream(tokenizer, "one<|im_end|> two</s>")) == "one two"


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("one ST", ["STOP"], "one ST"),
        ("ababac", ["abac"], "ab"),
        # The first complete stop text counts.
        ("x\nuser: y", ["\nuser:", "user"], "x\n"),
        ("x\nuser: y", ["\nuser", "user"], "x"),
        ("STOP", ["STOP"], ""),
    ],
)
def test_stop_texts_are_never_emitted(tokenizer, text, stop, expected, size):
    assert "".join(stream(tokenizer, text, size, stop=stop)) == expected


def test_white_space_at_both_ends_of_an_answer_is_stripped(tokenizer):
    pieces = stream(tokenizer, "\n two  words \n", strip=True)
    assert "".join(pieces) == "two  words"
    # A stop text may begin with white space that is stripped.
    settings = {"strip": True, "stop": ["\nuser:"]}
    assert "".join(stream(tokenizer, "\nuser: me", **settings)) == ""


def test_a_stop_text_that_is_an_added_token_becomes_an_end_token(tokenizer):
    resolved = resolve_stop(["<|im_end|>", "\n\n"], tokenizer, (1,))
    assert resolved == (("\n\n",), (1, 3))
    message = "`stop` must be a list of non-empty strings"
    for wrong in ("STOP", [""], [3]):
        with pytest.raises(UserError, match=message):
            resolve_stop(wrong, tokenizer, ())


@pytest.mark.parametrize(
    ("template", "stop"),
    [(CHATML, "<|im_end|>"), (PLAIN, "\nuser:"), (SINGLE, "</s>")],
    ids=["chatml", "plain", "single"],
)
def test_prompts_and_ends_of_turns_are_those_of_the_template(
    tokenizer, tmp_path, template, stop
):
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    prompts = ChatPrompts(tokenizer, str(file))
    assert prompts.stop == (stop,)
    text = {  # the beginning of the training text
        CHATML: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        PLAIN: "user: Hi\nassistant:",
        SINGLE: "Hi",
    }[template]
    tokens = prompts.tokens([{"role": "user", "content": "Hi"}])
    assert tokens == tokenizer(text)["input_ids"]


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
REASONING = (
    "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}"
    "{{ 'thinks ' if enable_thinking else 'says ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Hi\nsays "),
        ({"variables": {"enable_thinking": True}}, "Hi\nthinks "),
        ({"tools": TOOLS}, "findHi\nsays "),
    ],
    ids=str,
)
def test_tools_and_variables_reach_the_template(tokenizer, tmp_path, options, expected):
    file = tmp_path / "chat.jinja"
    file.write_text(REASONING)
    prompts = ChatPrompts(tokenizer, str(file), **options)
    tokens = prompts.tokens([{"role": "user", "content": "Hi"}])
    assert tokens == tokenizer(expected)["input_ids"]
    file.write_text(PLAIN)
    if options:
        with pytest.raises(UserError, match="does not read `(tools|enable_thinking)`"):
            ChatPrompts(tokenizer, str(file), **options)
