"""Pieces of text, what ends one, and the turns of a conversation, without a model."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.errors import UserError
from qlora_jax.inference.text import ChatPrompts, Pieces, resolve_stop

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


def say(tokenizer, text, size=1, **settings):
    """The pieces of a text that comes `size` tokens (bytes) at a time."""
    tokens = tokenizer(text)["input_ids"]
    pieces = Pieces(tokenizer, tokenizer("Q:")["input_ids"], **settings)
    out = []
    for at in range(0, len(tokens), size):
        last = at + size >= len(tokens)
        out.append(pieces.add(tokens[at : at + size], last=last))
        if pieces.stopped:
            break
    assert "".join(out) == pieces.text
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_piece_is_half_a_character(tokenizer, size):
    text = "Grüß dich 🙂, 你好"
    pieces = say(tokenizer, text, size)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert size > 1 or pieces[:4] == ["G", "r", "", "ü"]


def test_half_a_character_at_the_end_is_left_out(tokenizer):
    tokens = tokenizer("ab🙂")["input_ids"][:-1]
    pieces = Pieces(tokenizer, tokens[:1])
    assert pieces.add(tokens[1:], last=True) == "b"


def test_special_tokens_are_no_text(tokenizer):
    assert "".join(say(tokenizer, "one<|im_end|> two</s>")) == "one two"


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("one ST", ["STOP"], "one ST"),
        ("ababac", ["abac"], "ab"),
        # Which is complete first.
        ("x\nuser: y", ["\nuser:", "user"], "x\n"),
        ("x\nuser: y", ["\nuser", "user"], "x"),
        ("STOP", ["STOP"], ""),
    ],
)
def test_what_ends_a_text_is_never_given_out(tokenizer, text, stop, expected, size):
    assert "".join(say(tokenizer, text, size, stop=stop)) == expected


def test_white_space_at_both_ends_of_a_turn(tokenizer):
    pieces = say(tokenizer, "\n two  words \n", strip=True)
    assert "".join(pieces) == "two  words"
    # It is the turn that begins, although what comes before is taken away.
    settings = {"strip": True, "stop": ["\nuser:"]}
    assert "".join(say(tokenizer, "\nuser: me", **settings)) == ""


def test_a_token_as_a_text_that_ends(tokenizer):
    found = resolve_stop(["<|im_end|>", "\n\n"], tokenizer, (1,))
    assert found == (("\n\n",), (1, 3))
    for wrong in ("STOP", [""], [3]):
        with pytest.raises(UserError, match="`stop` must be a list of texts"):
            resolve_stop(wrong, tokenizer, ())


@pytest.mark.parametrize(
    ("template", "stop"),
    [(CHATML, ("<|im_end|>",)), (PLAIN, ("\nuser:",)), (SINGLE, ("</s>",))],
    ids=["chatml", "plain", "single"],
)
def test_what_ends_a_turn_is_read_off_the_template(tokenizer, tmp_path, template, stop):
    (tmp_path / "chat.jinja").write_text(template)
    prompts = ChatPrompts(tokenizer, str(tmp_path / "chat.jinja"))
    assert prompts.stop == stop


def test_a_prompt_is_the_beginning_of_what_was_trained_on(tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    prompts = ChatPrompts(tokenizer, str(tmp_path / "chat.jinja"))
    turns = [{"role": "user", "content": "Hi"}]
    tokens = prompts.tokens(turns)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == tokenizer(text)["input_ids"]
