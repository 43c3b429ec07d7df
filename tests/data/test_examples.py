"""Rows to examples: reading, supervision, length, refusals, fingerprints."""

import json

import numpy as np
import pytest

from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import ENCLOSED_TWICE, IGNORE, encode_prompt
from qlora_jax.data.examples import CUT_ANSWER, load_examples
from qlora_jax.data.notes import data_notes
from qlora_jax.errors import UserError

PAIRS = {"format": "prompt_completion"}


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


# --- prompt and completion ---


@pytest.mark.parametrize("name", ["tokenizer", "slow_tokenizer"])
def test_labels_are_the_completion_and_eos(load, decoded, request, name):
    pairs = [
        *(("Q: 1+1?\n", "2"), ("Q:", " 2"), ("Q: ", "2"), ("Q: ", "  2  ")),
        *(("", "all of it"), ("naïve 🙂", "🙂 façade"), ("e", "\u0301 combining")),
        *(("日本", "語\u2028x"), ("a\n", "\n\nb\n")),
        ("2 2", "2"),  # the answer occurs in the prompt: no searching finds it
    ]
    tokenizer = request.getfixturevalue(name)
    examples = load([pair(*texts) for texts in pairs], tokenizer, **PAIRS)
    for index, (prompt, completion) in enumerate(pairs):
        text, supervised = decoded(examples, index)
        assert text == f"<s>{prompt}{completion}</s>"
        assert supervised == f"{completion}</s>"
    assert examples.report.straddling_rows == 0


def test_a_token_across_the_boundary_is_supervised_and_counted(
    load, decoded, byte_tokenizer
):
    tokenizer = byte_tokenizer(merges=[("Ġ", "2")])
    examples = load([pair("Q: ", "2!")] * 2, tokenizer, **PAIRS)
    assert decoded(examples, 1, tokenizer) == ("<s>Q: 2!</s>", " 2!</s>")
    assert examples.report.straddling_rows == 2
    told = "2 rows with a token across the start or the end of an answer"
    assert told in examples.report.summary()


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [
        (
            {"question": "{why}?", "n": 3, "turns": ["a", "b"]},
            {"prompt": "{{Q}} {question} {n}\n", "completion": "{turns[1]}"},
            ("<s>{Q} {why}? 3\nb</s>", "b</s>"),
        ),
        ({"completion": "x"}, {"prompt": "Go: "}, ("<s>Go: x</s>", "x</s>")),
        (pair("ab", "c"), {"train_on": "all"}, ("<s>abc</s>", "abc</s>")),
    ],
)
def test_templates_fill_the_fields_and_train_on_all_supervises_the_prompt(
    load, decoded, row, config, expected
):
    examples = load([row], **PAIRS, **config)
    assert decoded(examples) == expected
    assert examples.report.supervised_tokens == len(expected[1].replace("</s>", "."))


# --- BOS and EOS ---


@pytest.mark.parametrize(
    ("tokens", "text", "config", "expected"),
    [
        ({}, "hello", {}, ("<s>hello</s>", "hello</s>")),
        ({}, "<s>hello", {}, ("<s>hello</s>", "hello</s>")),
        ({}, "hello</s>", {}, ("<s>hello</s>", "hello</s>")),
        ({}, "hello", {"append_eos": False}, ("<s>hello", "hello")),
        ({"eos": None}, "hello", {"append_eos": False}, ("<s>hello", "hello")),
        # The first token has nothing before it to be predicted from.
        ({"bos": None}, "hello", {}, ("hello</s>", "ello</s>")),
        ({"adds_eos": True}, "hello", {}, ("<s>hello</s>", "hello</s>")),
    ],
)
def test_bos_and_eos_stand_once_and_eos_is_supervised(
    load, decoded, byte_tokenizer, tokens, text, config, expected
):
    tokenizer = byte_tokenizer(**tokens)
    examples = load([{"text": text}], tokenizer, **config)
    assert decoded(examples, 0, tokenizer) == expected
    assert examples.report.supervised_eos == expected[1].count("</s>")


@pytest.mark.parametrize(
    ("text", "written", "count"),
    [
        ("<s>a</s>", "<s>a</s>", 0),
        ("a </s>b\n", "<s>a </s>b\n</s>", 0),
        ("<s>a</s>\n", "<s>a</s>\n</s>", 1),
        (" <s>a</s>", "<s> <s>a</s>", 1),
        ("\n<s>a</s>\n", "<s>\n<s>a</s>\n</s>", 1),
    ],
)
def test_a_second_bos_or_eos_is_counted(load, decoded, text, written, count):
    examples = load([{"text": text}])
    assert decoded(examples)[0] == written
    assert examples.report.remarks == ({ENCLOSED_TWICE: count} if count else {})


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_prompt_has_the_tokens_of_training(byte_tokenizer, load, bos, adds_eos):
    tokenizer = byte_tokenizer(bos=bos, adds_eos=adds_eos)
    trained = load([{"text": "ab"}], tokenizer)[0][0].tolist()
    for prompt in ("ab", f"{bos or ''}ab"):
        assert [*encode_prompt(tokenizer, prompt), 1] == trained


def test_a_tokenizer_without_eos_is_refused_with_the_problems_of_the_file(
    load, byte_tokenizer
):
    tokenizer = byte_tokenizer(eos=None)
    with pytest.raises(UserError, match="`data.append_eos` is true .* no EOS token"):
        load([{"text": "hello"}], tokenizer)
    with pytest.raises(UserError, match=r"(?s)2 problems.*no file.*no EOS token"):
        load("absent.txt", tokenizer)


def test_a_tokenizer_without_a_pad_token_trains_as_any_other(
    load, byte_tokenizer, tokenizer
):
    # Padding is masked by labels and segment ids, never recognised by its token.
    rows = [{"text": "hello"}, {"text": "a"}]
    assert tokenizer.pad_token_id is None
    padded = byte_tokenizer()
    padded.pad_token = padded.eos_token
    report = load(rows).report
    assert load(rows, padded).report == report
    assert report.supervised_eos == 2


# --- messages ---

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = [
    {"role": role, "content": text}
    for texts in (("hi", "yo"), ("more", "no"))
    for role, text in zip(("user", "assistant"), texts, strict=True)
]


@pytest.fixture
def chat(write, load):
    """A function: conversations, settings -> their examples."""

    def chat(*conversations, template=CHAT, **config):
        rows = [{"messages": turns} for turns in conversations]
        file = write(template, "chat.jinja")
        return load(rows, format="messages", chat_template=file, **config)

    return chat


@pytest.mark.parametrize("name", ["tokenizer", "slow_tokenizer"])
def test_messages_supervise_the_assistant(chat, decoded, request, name):
    tokenizer = request.getfixturevalue(name)
    examples = chat(TURNS, TURNS[:3], tokenizer=tokenizer)
    text, supervised = decoded(examples)
    assert text == "<s>user:hi\nassistant:yo</s>\nuser:more\nassistant:no</s>\n"
    assert supervised == "yo</s>no</s>"
    assert decoded(examples, 1) == (text.removesuffix("assistant:no</s>\n"), "yo</s>")
    everything = chat(TURNS, tokenizer=tokenizer, train_on="all")
    assert decoded(everything) == (text, text.removeprefix("<s>"))


def test_a_conversation_without_an_answer_is_dropped_and_counted(chat):
    report = chat(TURNS, TURNS[:1]).report
    assert report.dropped == {"no assistant turn": 1}
    assert (report.rows_read, report.rows_kept) == (2, 1)
    nothing = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(UserError, match="1 assistant turns that the chat template do"):
        chat(TURNS, template=CHAT + nothing)


def test_the_report_says_how_the_assistants_text_was_located(chat, decoded):
    report = chat(TURNS).report
    assert report.assistant_mask == "renderer"
    assert "the chat template has no generation marks" in report.summary()
    assert chat(TURNS, train_on="all").report.assistant_mask is None
    content = "{{ m.content }}"
    marked = CHAT.replace(content, "{% generation %}" + content + "{% endgeneration %}")
    examples = chat(TURNS, template=marked)
    assert examples.report.assistant_mask == "template"
    assert "as the chat template marks it" in examples.report.summary()
    # This one marks every turn, and not the ends of them.
    assert decoded(examples)[1] == "hiyomoreno"


# --- tokens ---


def test_token_rows_are_used_unchanged(load):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, -100, 9]},
        {"input_ids": [8, 8], "labels": [-100, 8]},
    ]
    examples = load(rows, None, format="tokens")
    assert examples.tokens.tolist() == [5, 6, 7, 8, 8]
    # But for the first label of an example, which nothing in it could predict.
    assert examples.labels.tolist() == [-100, -100, 9, -100, 8]
    assert examples.offsets.tolist() == [0, 3, 5]
    assert examples.tokens.dtype == examples.labels.dtype == np.int32
    examples = load([{"input_ids": [5, 6, 7]}], None, format="tokens", train_on="all")
    assert examples.labels.tolist() == [-100, 6, 7]


UNLABELED = {"labels": None}
IDS = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("fields", "tokens", "labels"),
    [
        # Padding at the left and the right leaves the row that it pads.
        ({"attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [-100, 7, 8]),
        ({"attention_mask": [1, 1, 1, 0]}, [5, 6, 7], [-100, 6, 7]),
        ({"attention_mask": [0, 1, 1, 0], "position_ids": [0, 0, 1, 1]}, [6, 7], None),
        ({"position_ids": [0, 1, 2, 3]}, [5, 6, 7, 8], None),
        ({"seq_lengths": [4], "segment_ids": [1, 1, 1, 1]}, [5, 6, 7, 8], None),
        ({"completion_mask": [0, 0, 1, 1]}, [5, 6, 7, 8], [-100, -100, 7, 8]),
        ({"assistant_masks": [0, 1, 0, 1]}, [5, 6, 7, 8], [-100, 6, -100, 8]),
        (
            {"assistant_masks": [0, 1, 0, 1]} | UNLABELED,
            [5, 6, 7, 8],
            [-100, 6, -100, 8],
        ),
        (
            {"completion_mask": [0, 0, 1, 1]} | UNLABELED,
            [5, 6, 7, 8],
            [-100, -100, 7, 8],
        ),
        ({"attention_mask": None, "completion_mask": None}, [5, 6, 7, 8], None),
    ],
)
def test_masks_of_token_rows_are_honoured(load, fields, tokens, labels):
    examples = load([IDS | fields], None, format="tokens")
    assert examples.tokens.tolist() == tokens
    assert examples.labels.tolist() == (labels or [-100, *tokens[1:]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [1]}, r":2: no field `input_ids`; the row has `labels`"),
        ({"input_ids": [1, 2]}, r":2: no field `labels`; .* `data.train_on` to 'all'"),
        ({"input_ids": [1, 2], "labels": [1]}, r":2: .* 2 entries and `labels` 1"),
        ({"input_ids": 1, "labels": []}, r":2: `input_ids` must be a list of integers"),
        ({"input_ids": [1, True], "labels": [1, 1]}, r"must be a list of integers"),
        ({"input_ids": [1, 2.0], "labels": [1, 1]}, r"must be a list of integers"),
        (
            {"input_ids": [1, 300], "labels": [1, 1]},
            r":2: `input_ids`\[1\] is 300; expected 0\.\.299 .*`vocab_size` = 300",
        ),
        ({"input_ids": [-100, 2], "labels": [1, 1]}, r"`input_ids`\[0\] is -100"),
        ({"input_ids": [1, 2], "labels": [1, 300]}, r"`labels`\[1\] is 300; .* -100"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, r"`labels`\[1\] is -1; .* or -100"),
        ({"input_ids": None, "labels": []}, r"field `input_ids` is null"),
        (IDS | {"attention_mask": [1, 0, 1, 1]}, "`attention_mask` has zeros between"),
        (IDS | {"attention_mask": [1, 1]}, "4 entries and `attention_mask` 2"),
        (IDS | {"position_ids": [0, 1, 0, 1]}, "`position_ids` must count 0, 1, 2"),
        (
            IDS | {"seq_lengths": [2, 2]},
            "`seq_lengths` says that the row holds several",
        ),
        (IDS | {"segment_ids": [1, 1, 2, 2]}, "`segment_ids` says that the row holds"),
        (
            IDS | {"completion_mask": [0, 1, 2, 1]},
            r"`completion_mask`\[2\] is 2; .*0..1",
        ),
    ],
)
def test_bad_token_rows_are_refused(load, row, message):
    with pytest.raises(UserError, match=message):
        load([{"input_ids": [1, 2], "labels": [1, 2]}, row], None, format="tokens")


# --- length ---


def test_truncated_and_dropped_rows_are_counted_and_named(write, load, decoded):
    texts = [("ab", "cdefgh"), ("abcdefgh", "x"), ("a", ""), ("", "x")]
    path = write([pair(*text) for text in texts])
    examples = load(path, **PAIRS, max_length=6)
    assert decoded(examples) == ("<s>abcde", "cde")
    report, summary = examples.report, examples.report.summary()
    assert (report.rows_kept, report.truncated, report.tokens_lost) == (2, 1, 4)
    assert (report.longest_row, report.longest_example) == (11, 6)
    lost = "every supervised token truncated"
    assert report.dropped == {lost: 1, "empty completion": 1}
    names = {"truncated": 1, lost: 2, "empty completion": 3, CUT_ANSWER: 1}
    assert report.places == {key: (f"{path}:{line}",) for key, line in names.items()}
    assert "1 row truncated (4 tokens lost)" in summary
    assert f"dropped 1: {lost} ({path}:2)" in summary


@pytest.mark.parametrize(
    ("completions", "said"),
    [
        (["abcdef", "abcdef", "a"], "2 of 3 rows lose the end token of what is"),
        (["abcdef", "a"], ""),
    ],
)
def test_ends_that_most_rows_lose_are_a_note(load, tokenizer, completions, said):
    examples = load([pair("ab", text) for text in completions], **PAIRS, max_length=6)
    config = DataConfig(path="x", **PAIRS, max_length=6)
    batches = Batches(examples, config, batch_size=1, epochs=1, pad_token_id=0)
    notes = " ".join(data_notes(examples, config, batches, tokenizer))
    assert said in notes and ("not learn to stop from them" in notes) == bool(said)


@pytest.mark.parametrize("packing", [False, True])
def test_long_rows_can_be_dropped(load, decoded, packing):
    rows = [{"text": "0123456789"}, {"text": "ab"}]
    examples = load(rows, max_length=6, too_long="drop", packing=packing)
    assert decoded(examples)[0] == "<s>ab</s>"
    assert examples.report.dropped == {"longer than max_length=6": 1}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("length", range(3, 40))
def test_windows_of_a_plain_text_lose_nothing(write, load, tokenizer, length, packing):
    text = "".join(chr(97 + i % 26) for i in range(length))
    examples = load(write(text, "book.txt"), max_length=8, packing=packing)
    pieces = [tokenizer.decode(examples[i][0]) for i in range(len(examples))]
    assert "".join(pieces) == f"<s>{text}</s>"
    assert len(examples) == -(-(length + 2) // 8)
    # Each window predicts all its tokens but its first.
    assert examples.report.supervised_tokens == length + 2 - len(examples)
    for index in range(len(examples)):
        assert (examples[index][1][1:] != IGNORE).all()
    assert examples.report.documents_cut == (length + 2 > 8)
    assert examples.report.longest_row == length + 2
    assert not examples.report.dropped and not examples.report.truncated


def test_packed_documents_are_cut_and_answers_and_unpacked_rows_truncated(
    load, decoded
):
    rows = [{"text": "0123456789"}, {"text": "ab"}]
    packed = load(rows, max_length=8, packing=True)
    pieces = ["<s>0123456", "789</s>", "<s>ab</s>"]
    assert [decoded(packed, i)[0] for i in range(3)] == pieces
    report = packed.report
    assert report.documents_cut == 1 and report.tokens_lost == 0
    assert (report.packed_rows, report.packing_efficiency) == (2, 1.0)
    assert report.rows_kept == 2 and report.examples == 3
    report = load(rows, max_length=8, packing=False).report
    assert report.documents_cut == 0 and report.truncated == 1
    assert report.packed_rows is report.packing_efficiency is None
    answer = [pair("ab", "cdefgh")]
    report = load(answer, **PAIRS, max_length=6, packing=True).report
    assert (report.examples, report.truncated, report.documents_cut) == (1, 1, 0)


# --- files ---


def test_a_json_list_a_jsonl_and_a_txt_of_jsonl_are_the_same_rows(write, fingerprint):
    rows = [{"text": "ab"}, {"text": "cd"}]
    first, second = map(json.dumps, rows)
    paths = [
        *(write(rows, "b.jsonl"), write(rows, "c.txt")),
        write(json.dumps(rows, indent=2), "a.json"),
        write(f"\n{first}\r\n \n{second}\n", "d.jsonl"),
        write(f"\ufeff{first}\n{second}\n", "e.jsonl"),
    ]
    assert len(set(map(fingerprint, paths))) == 1


@pytest.mark.parametrize("start", ["[Act 1]", "{ not json", '"quoted"'])
def test_brackets_and_line_separators_may_be_text(write, load, decoded, start):
    path = write(f"{start}\nline", "play.txt")
    assert decoded(load(path))[0] == f"<s>{start}\nline</s>"
    path = write('{"text": "a\u2028b\u0085c"}\n')
    assert decoded(load(path))[0] == "<s>a\u2028b\u0085c</s>"


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ('{"text": "a"}\n{"text": \n', {}, r"d\.jsonl:2: malformed JSON.*\(JSONL\)"),
        ("[{}, \n{]", {}, r"d\.jsonl:2: malformed JSON list"),
        ('{"text": "a"}\n\n{"body": 0}', {}, r"d\.jsonl:3: no field `text`; .*`body`"),
        ('[{"text": "a"}, {}]', {}, r"d\.jsonl row 2: no field `text`; .* no fields"),
        ('{"text": null}', {}, r"d\.jsonl:1: field `text` is null"),
        ('{"text": 3}', {}, r"d\.jsonl:1: field `text` must be a string, got int"),
        ('{"text": "a\\ud83dc"}', {}, r":1: character 1 .* surrogate pair \('\\ud83d'"),
        ('["a"]', {}, r"row 1: a row must be a JSON object, got str"),
        ("3", {}, r":1: a row must be a JSON object, got int"),
        ("", {}, r"d\.jsonl is empty"),
        (" \n\n", {}, r"d\.jsonl is empty"),
        ("[]", {}, r"d\.jsonl has no rows"),
        ('{"text": ""}', {}, r"no row is left .*: 1 read, dropped: 1 empty text"),
        (
            '{"prompt": [{"role": "user"}], "completion": "x"}',
            PAIRS,
            r"`prompt` must be a string, got list. Use format='messages'",
        ),
        ('{"prompt": "x"}', PAIRS, r":1: no field `completion`; the row has `prompt`"),
        (
            '{"q": ["x"]}',
            {"text": "{q}"},
            "field `q` of `data.text` must be a string or a finite number, got list",
        ),
        ('{"q": ["x"]}', {"text": "{q[3]}"}, r"cannot fill `data.text` = '{q\[3\]}'"),
        ('{"q": "x"}', {"text": "{q:d}"}, r"cannot fill .*Unknown format code"),
        ('{"q": null}', {"text": "{q}"}, r":1: field `q` is null"),
        ('{"q": {"a": null}}', {"text": "{q[a]}"}, r":1: field `q\[a\]` is null"),
        ('{"q": {"a": ["x"]}}', {"text": "{q[a]}"}, r"`q\[a\]` .*got list"),
        ('{"q": [NaN]}', {"text": "{q[0]}"}, r"`q\[0\]` .*finite number, got nan"),
        ('{"q": 1e999}', {"text": "{q}"}, r"`q` .*finite number, got inf"),
        (
            '{"prompt": "abcdefgh", "completion": "x"}',
            {**PAIRS, "max_length": 4},
            r"no row is left to train on: 1 read, dropped: 1 every supervised token "
            r"truncated \(`data.max_length` = 4, longest row 11 tokens\)",
        ),
        (
            '{"input_ids": [1, 2], "labels": [1, -100]}\n'
            '{"input_ids": [], "labels": []}',
            {"format": "tokens"},
            r"2 read, dropped: 1 nothing to supervise, 1 no tokens",
        ),
        (
            '{"text": 3}\n' * 60,
            {"on_bad_row": "skip"},
            r"60 read, and none can be used .*\n.*:1, 2, 3, 4, 5: field `text` must be "
            r"a string, got int[^\n]*$",
        ),
        (
            '{"text": 3}\n{"text": ""}\n{"text": 4}',
            {"on_bad_row": "skip"},
            r"dropped: 2 rows that cannot be used, 1 empty text .*Check `data.max_len",
        ),
    ],
)
def test_unusable_files_are_refused(write, load, content, config, message):
    path = write(content, "d.jsonl")
    with pytest.raises(UserError, match=message):
        load(path, **config)


def test_plain_text_in_another_encoding_and_with_a_template_are_refused(write, load):
    latin, book = write("naïve".encode("latin-1"), "l.txt"), write("words", "book.txt")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        load(latin)
    with pytest.raises(UserError, match="plain text without fields"):
        load(book, text="{text}")


def test_a_token_beyond_the_embeddings_names_the_row(load, tokenizer):
    rows = [{"text": "ab"}, {"text": "z"}]
    largest = tokenizer.convert_tokens_to_ids("z")
    message = rf"data\.jsonl:2: .* id {largest}, but the mod"
    with pytest.raises(UserError, match=message):
        load(rows, vocab_size=largest)
    load(rows, vocab_size=largest + 1)
    with pytest.raises(UserError, match="format='text' needs a tokenizer"):
        load(rows, None)


# --- the fingerprint ---


def test_the_fingerprint_follows_content_and_order_and_not_the_path(write, fingerprint):
    rows = [{"text": "ab"}, {"text": "cd"}]
    first = fingerprint(rows)
    assert len(first) == 64 and int(first, 16)
    assert fingerprint(write(rows, "copy.jsonl")) == first
    assert fingerprint(rows, train_on="all") == first
    different = [
        *(fingerprint(rows[::-1]), fingerprint([rows[0], {"text": "ce"}])),
        fingerprint([{"text": "abcd"}]),
        *(fingerprint(rows, seed=1), fingerprint(rows, shuffle=False)),
        *(fingerprint(rows, packing=True), fingerprint(rows, max_length=512)),
        *(fingerprint(rows, append_eos=False), fingerprint(rows, too_long="drop")),
    ]
    assert len({first, *different}) == 1 + len(different)
    labels = ([1, 2, 3], [1, -100, 3])
    rows = [[{"input_ids": [1, 2, 3], "labels": row}] for row in labels]
    one, other = (fingerprint(row, None, format="tokens") for row in rows)
    assert one != other


# --- real text ---

GSM8K = {**PAIRS, "prompt": "{question}\n", "completion": "{answer}"}


@pytest.mark.real
def test_gsm8k_labels_decode_to_the_answers(load, shared_data, mistral):
    with open(shared_data / "text/gsm8k/train.jsonl") as file:
        rows = [json.loads(next(file)) for _ in range(200)]
    for prompt in ("{question}\n", "Question: {question}\nAnswer:", "{question} "):
        examples = load(rows, mistral, 32000, **(GSM8K | {"prompt": prompt}))
        for index, row in enumerate(rows):
            tokens, labels = examples[index]
            supervised = mistral.decode(labels[labels != IGNORE])
            # A trailing space of the prompt joins the answer's first word in a token,
            # and the decoder drops it again.
            assert supervised == row["answer"] + "</s>"
            assert tokens[0] == 1 and tokens.tolist().count(1) == 1
        straddles = examples.report.straddling_rows
        assert (straddles > 0) == (prompt == "{question} ")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        (
            "gsm8k/test.jsonl",
            GSM8K | {"packing": True},
            "043f8d55a61c0e39b455534d5dd2a914a7dbab6420508d9dd4bfd3a6a69bfaf8",
        ),
        (
            "tinyshakespeare/input.txt",
            dict(max_length=256, packing=False),
            "a85dc1ee9f3956ddad45802bab1d7e51e15832acb2546709539276ad0a04ef28",
        ),
    ],
)
def test_fingerprints_of_real_data_never_change(
    fingerprint, shared_data, mistral, name, config, expected
):
    assert (
        fingerprint(shared_data / "text" / name, mistral, 32000, **config) == expected
    )


@pytest.mark.real
def test_gsm8k_loads_whole(load, shared_data, mistral):
    path = shared_data / "text/gsm8k/train.jsonl"
    report = load(path, mistral, 32000, packing=True, **GSM8K).report
    assert report.rows_read == report.rows_kept == report.supervised_eos == 7473
    assert report.packing_efficiency > 0.98 and report.tokens_lost == 0


def test_the_progress_bar_is_on_stderr_and_changes_nothing(write, tokenizer, capsys):
    config = DataConfig(path=write([{"text": "ab"}] * 600))
    quiet = load_examples(config, tokenizer, vocab_size=300)
    assert capsys.readouterr() == ("", "")
    shown = load_examples(config, tokenizer, vocab_size=300, progress=True)
    assert capsys.readouterr().out == ""
    assert shown.report == quiet.report


def test_labels_that_are_not_the_tokens_of_their_places_are_counted(load):
    shifted = {"input_ids": [5, 6, 7], "labels": [6, 7, -100]}
    own = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    remarks = load([shifted, own], format="tokens").report.remarks
    assert remarks == {"rows whose labels are not their tokens": 1}
