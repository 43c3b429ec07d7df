"""Characters that a tokenizer has no token for: counted, named, and right labels."""

import string

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.ends import end_tokens_of
from qlora_jax.data.examples import load_examples
from qlora_jax.data.notes import data_notes
from qlora_jax.data.unknown import UNKNOWN, unknown_text
from qlora_jax.errors import UserError

SPECIALS = ["<s>", "</s>", "<|end|>"]


def letters(unk=None, **options):
    """A tokenizer of one token an ASCII letter or space, and no other character."""
    pieces = [*SPECIALS, *([unk] if unk else []), *string.ascii_letters, " "]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unk, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unk,
        additional_special_tokens=["<|end|>"],
    )


def words(*vocabulary, unk=None):
    """A tokenizer of words."""
    vocab = {word: i for i, word in enumerate([*SPECIALS, *vocabulary])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unk or "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token=unk
    )


@pytest.fixture
def supervised(load):
    """A function: tokenizer, rows -> the report, and each row's supervised text."""

    def supervised(tokenizer, *rows, **config):
        examples = load(list(rows), tokenizer, **config)
        labels = [examples[i][1] for i in range(len(examples))]
        texts = [tokenizer.convert_ids_to_tokens(row[row >= 0]) for row in labels]
        return examples.report, ["".join(text) for text in texts]

    return supervised


ROW = {"prompt": "Say:\n", "completion": "Hi ☃ naïve\nb☃"}


@pytest.mark.parametrize(
    ("tokenizer", "unknown", "text"),
    [
        (letters(), "\n : ï ☃", "Hi naveb</s>"),
        (letters("?"), "\n : ï ☃", "Hi ? na?ve?b?</s>"),
        (letters("?", fuse_unk=True), "\n : ï ☃", "Hi ? na?ve?b?</s>"),
    ],
)
def test_unknown_characters_are_counted_and_move_no_label(
    supervised, tokenizer, unknown, text
):
    known = {"prompt": "Say ", "completion": "Hi"}
    report, texts = supervised(tokenizer, ROW, known, format="prompt_completion")
    assert report.remarks == {UNKNOWN: 1} and report.rows_kept == 2
    assert report.unknown == dict.fromkeys(unknown.split(" "), 1)
    assert [t.replace("  ", " ") for t in texts] == [text, "Hi</s>"]
    assert report.places[UNKNOWN][0].endswith(":1")


def test_characters_of_added_tokens_are_kept_where_they_are_dropped(supervised):
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    turns = [("user", "<q|>"), ("assistant", "a|b"), ("user", "r"), ("assistant", "c")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    report, texts = supervised(tokenizer, row, format="messages")
    assert texts == ["ab<|end|>c<|end|>"]
    assert report.unknown == dict.fromkeys("\n<>|", 1)


def test_the_token_that_stands_in_a_text_is_not_unknown(supervised):
    tokenizer = letters("?")
    report, texts = supervised(tokenizer, {"text": "why? a"}, format="text")
    assert texts == ["hy? a</s>"] and not report.unknown and not report.remarks


def test_byte_tokenizers_know_everything(supervised, tokenizer, mistral):
    row = {"text": "☃ \x00\u0301\u200b\ufeff\n\t\U000e0020 日本"}
    assert not supervised(tokenizer, row)[0].unknown
    assert not supervised(mistral, row, vocab_size=32000)[0].unknown


def test_a_note_names_them_and_the_unknown_token_ends_no_answer(write):
    tokenizer = letters("?")
    config = DataConfig(
        path=write([{"prompt": "a ", "completion": "b☃"}] * 3),
        format="prompt_completion",
        append_eos=False,
    )
    examples = load_examples(config, tokenizer, vocab_size=300)
    batches = Batches(examples, config, batch_size=1, pad_token_id=0)
    notes = " ".join(data_notes(examples, config, batches, tokenizer))
    assert "does not know: 3; the first in" in notes and "These are '☃'" in notes
    assert end_tokens_of(examples, tokenizer) == [()]


def test_words_are_named_and_a_tokenizer_that_refuses_them_names_the_row(load):
    rows = [{"text": "hello world"}, {"text": "hello wrld"}]
    report = load(rows, words("hello", "world", "[U]", unk="[U]")).report
    assert report.unknown == {"wrld": 1}
    tokenizer = words("hello", "world")
    with pytest.raises(UserError, match="jsonl:2: the tokenizer cannot encode"):
        load(rows, tokenizer)
    report = load(rows, tokenizer, on_bad_row="skip").report
    assert report.rows_kept == 1 and report.recognised == {"JSON lines": 2}


@pytest.mark.parametrize(
    ("tokenizer", "unknown"),
    [(letters(), ["☃", "\n"]), (letters("?"), ["☃", "\n"]), (words("hi"), [])],
)
def test_the_unknown_of_a_prompt_comes_in_its_order(tokenizer, unknown):
    assert unknown_text(tokenizer, "a☃b\nc☃") == unknown
    assert unknown_text(tokenizer, "\ud800") == []


@pytest.mark.parametrize("eos", ["", "<unk>", "</s>"])
def test_an_eos_that_is_the_unknown_token_is_noted(write, shared_data, eos):
    # As in the first conversions of LLaMA, whose `eos_token` is empty.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        shared_data / "stories260K", eos_token=eos
    )
    config = DataConfig(path=write([{"text": "Once upon a time"}]))
    examples = load_examples(config, tokenizer, vocab_size=512)
    batches = Batches(examples, config, batch_size=1, pad_token_id=0)
    notes = " ".join(data_notes(examples, config, batches, tokenizer))
    assert ("the token for what it does not know" in notes) == (eos != "</s>")
