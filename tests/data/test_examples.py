"""Rows to examples: reading, supervision, length, refusals, fingerprints."""

import json
import time

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError

# --- prompt and completion ---


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Q: 1+1?\n", "2"),
        ("Q:", " 2"),
        ("Q: ", "2"),
        ("Q: ", "  2  "),
        ("", "all of it"),
        ("naïve 🙂", "🙂 façade"),
        ("e", "\u0301 combining"),
        ("日本", "語\u2028x"),
        ("a\n", "\n\nb\n"),
        ("2 2", "2"),  # the answer occurs in the prompt: no searching finds it
    ],
)
@pytest.mark.parametrize("name", ["tokenizer", "slow_tokenizer"])
def test_labels_are_the_completion_and_eos(
    write, load, decoded, request, prompt, completion, name
):
    path = write([{"prompt": prompt, "completion": completion}])
    tokenizer = request.getfixturevalue(name)
    examples = load(path, tokenizer, format="prompt_completion")
    text, supervised = decoded(examples)
    assert text == f"<s>{prompt}{completion}</s>"
    assert supervised == f"{completion}</s>"
    assert examples.report.straddling_rows == 0


def test_a_token_across_the_boundary_is_supervised_and_counted(
    write, load, decoded, byte_tokenizer
):
    tokenizer = byte_tokenizer(merges=[("Ġ", "2")])
    path = write([{"prompt": "Q: ", "completion": "2!"}] * 2)
    examples = load(path, tokenizer, format="prompt_completion")
    assert decoded(examples, 1, tokenizer) == ("<s>Q: 2!</s>", " 2!</s>")
    assert examples.report.straddling_rows == 2
    assert "2 rows have a token across" in examples.report.summary()


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [
        (
            {"question": "{why}?", "n": 3, "turns": ["a", "b"]},
            {"prompt": "{{Q}} {question} {n}\n", "completion": "{turns[1]}"},
            ("<s>{Q} {why}? 3\nb</s>", "b</s>"),
        ),
        ({"completion": "x"}, {"prompt": "Go: "}, ("<s>Go: x</s>", "x</s>")),
        (
            {"prompt": "ab", "completion": "c"},
            {"train_on": "all"},
            ("<s>abc</s>", "abc</s>"),
        ),
    ],
)
def test_templates_fill_the_fields_and_train_on_all_supervises_the_prompt(
    write, load, decoded, row, config, expected
):
    examples = load(write([row]), format="prompt_completion", **config)
    assert decoded(examples) == expected
    assert examples.report.supervised_tokens == len(expected[1].replace("</s>", "."))


# --- BOS and EOS ---


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        ("hello", {}, ("<s>hello</s>", "hello</s>")),
        ("<s>hello", {}, ("<s>hello</s>", "hello</s>")),
        ("hello</s>", {}, ("<s>hello</s>", "hello</s>")),
        ("hello", {"append_eos": False}, ("<s>hello", "hello")),
    ],
)
def test_bos_and_eos_stand_once_and_eos_is_supervised(
    write, load, decoded, text, config, expected
):
    examples = load(write([{"text": text}]), **config)
    assert decoded(examples) == expected
    assert examples.report.supervised_eos == expected[1].count("</s>")


def test_no_bos_is_added_for_a_tokenizer_without_bos(
    write, load, decoded, byte_tokenizer
):
    tokenizer = byte_tokenizer(bos=None)
    examples = load(write([{"text": "hello"}]), tokenizer)
    # The first token has nothing before it to be predicted from.
    assert decoded(examples, 0, tokenizer) == ("hello</s>", "ello</s>")


def test_an_eos_that_the_tokenizer_adds_is_not_doubled(
    write, load, decoded, byte_tokenizer
):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    examples = load(write([{"text": "hello"}]), tokenizer)
    assert decoded(examples, 0, tokenizer)[0] == "<s>hello</s>"


def test_a_tokenizer_without_eos_needs_append_eos_false(
    write, load, decoded, byte_tokenizer
):
    tokenizer = byte_tokenizer(eos=None)
    path = write([{"text": "hello"}])
    with pytest.raises(UserError, match="`data.append_eos` is true .* no EOS token"):
        load(path, tokenizer)
    assert decoded(load(path, tokenizer, append_eos=False), 0, tokenizer)[0] == (
        "<s>hello"
    )


def test_problems_of_file_and_tokenizer_are_raised_together(
    load, byte_tokenizer, tmp_path
):
    with pytest.raises(UserError) as error:
        load(str(tmp_path / "absent.txt"), byte_tokenizer(eos=None))
    message = str(error.value)
    assert "2 problems" in message
    assert "no EOS token" in message and "no file" in message


def test_a_tokenizer_without_a_pad_token_trains_as_any_other(
    write, load, byte_tokenizer, tokenizer
):
    # Padding is masked by labels and segment ids, never recognised by its token.
    path = write([{"text": "hello"}, {"text": "a"}])
    assert tokenizer.pad_token_id is None
    padded = byte_tokenizer()
    padded.pad_token = padded.eos_token
    report = load(path).report
    assert load(path, padded).report == report
    assert report.supervised_eos == 2


# --- messages ---

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    return str(path)


def test_messages_supervise_the_assistant(write, load, decoded, template):
    path = write([{"messages": TURNS}])
    examples = load(path, format="messages", chat_template=template)
    text, supervised = decoded(examples)
    assert text == "<s>user:hi\nassistant:yo</s>\nuser:more\nassistant:no</s>\n"
    assert supervised == "yo</s>no</s>"
    everything = load(path, format="messages", chat_template=template, train_on="all")
    assert decoded(everything) == (text, text.removeprefix("<s>"))


def test_messages_without_offsets_give_the_same(write, load, slow_tokenizer, template):
    path = write([{"messages": TURNS}, {"messages": TURNS[:3]}])
    config = dict(format="messages", chat_template=template)
    fast, slow = load(path, **config), load(path, slow_tokenizer, **config)
    np.testing.assert_array_equal(fast.tokens, slow.tokens)
    np.testing.assert_array_equal(fast.labels, slow.labels)


def test_a_conversation_without_an_answer_is_dropped_and_counted(write, load, template):
    path = write([{"messages": TURNS}, {"messages": TURNS[:1]}])
    report = load(path, format="messages", chat_template=template).report
    assert report.dropped == {"no assistant turn": 1}
    assert (report.rows_read, report.rows_kept) == (2, 1)


def test_the_report_says_how_the_assistants_text_was_located(
    write, load, decoded, tmp_path, template
):
    path = write([{"messages": TURNS}])
    config = dict(format="messages", chat_template=template)
    report = load(path, **config).report
    assert report.assistant_mask == "renderer"
    assert "the chat template has no generation marks" in report.summary()
    assert load(path, train_on="all", **config).report.assistant_mask is None
    marked = CHAT.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    (tmp_path / "chat.jinja").write_text(marked)
    examples = load(path, **config)
    assert examples.report.assistant_mask == "template"
    assert "as the chat template marks it" in examples.report.summary()
    # This one marks every turn, and not the ends of them.
    assert decoded(examples)[1] == "hiyomoreno"


def test_rows_are_dropped_if_the_template_marks_no_assistant_turn(
    write, load, tmp_path, template
):
    nothing = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    (tmp_path / "chat.jinja").write_text(CHAT + nothing)
    path = write([{"messages": TURNS}])
    with pytest.raises(UserError, match="1 assistant turns that the chat template do"):
        load(path, format="messages", chat_template=template)


# --- tokens ---


def test_token_rows_are_used_unchanged(write, load):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, -100, 9]},
        {"input_ids": [8, 8], "labels": [-100, 8]},
    ]
    examples = load(write(rows), None, format="tokens")
    assert examples.tokens.tolist() == [5, 6, 7, 8, 8]
    # But for the first label of an example, which nothing in it could predict.
    assert examples.labels.tolist() == [-100, -100, 9, -100, 8]
    assert examples.offsets.tolist() == [0, 3, 5]
    assert examples.tokens.dtype == examples.labels.dtype == np.int32


def test_tokens_with_train_on_all_need_no_labels(write, load):
    path = write([{"input_ids": [5, 6, 7]}])
    examples = load(path, None, format="tokens", train_on="all")
    assert examples.labels.tolist() == [-100, 6, 7]


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
    ],
)
def test_bad_token_rows_are_refused(write, load, row, message):
    path = write([{"input_ids": [1, 2], "labels": [1, 2]}, row])
    with pytest.raises(UserError, match=message):
        load(path, None, format="tokens")


# --- length ---


def test_truncation_keeps_the_beginning_and_is_counted(write, load, decoded):
    rows = [{"prompt": "ab", "completion": "cdefgh"}, {"prompt": "", "completion": "x"}]
    examples = load(write(rows), format="prompt_completion", max_length=6)
    assert decoded(examples) == ("<s>abcde", "cde")
    report = examples.report
    assert (report.truncated, report.tokens_lost) == (1, 4)
    assert (report.longest_row, report.longest_example) == (10, 6)
    assert "1 rows truncated (4 tokens lost)" in report.summary()


def test_rows_that_lose_every_supervised_token_are_dropped(write, load):
    rows = [
        {"prompt": "abcdefgh", "completion": "x"},
        {"prompt": "", "completion": "x"},
    ]
    report = load(write(rows), format="prompt_completion", max_length=6).report
    assert report.dropped == {"every supervised token truncated": 1}
    assert (report.rows_kept, report.truncated, report.tokens_lost) == (1, 0, 0)
    assert "dropped 1: every supervised token truncated" in report.summary()


def test_dropped_and_truncated_rows_are_named(write, load):
    rows = [
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "abcdefgh", "completion": "x"},
        {"prompt": "a", "completion": ""},
    ]
    path = write(rows)
    report = load(path, format="prompt_completion", max_length=6).report
    assert report.places == {
        "truncated": (f"{path}:1",),
        "every supervised token truncated": (f"{path}:2",),
        "empty completion": (f"{path}:3",),
    }
    assert f"every supervised token truncated ({path}:2)" in report.summary()


@pytest.mark.parametrize("packing", [False, True])
def test_long_rows_can_be_dropped(write, load, decoded, packing):
    path = write([{"text": "0123456789"}, {"text": "ab"}])
    examples = load(path, max_length=6, too_long="drop", packing=packing)
    assert decoded(examples)[0] == "<s>ab</s>"
    assert examples.report.dropped == {"longer than max_length=6": 1}


@pytest.mark.parametrize("length", range(3, 40))
def test_windows_of_a_plain_text_lose_nothing(load, tokenizer, tmp_path, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    path = tmp_path / "book.txt"
    path.write_text(text)
    examples = load(str(path), max_length=8)
    pieces = [tokenizer.decode(examples[i][0]) for i in range(len(examples))]
    assert "".join(pieces) == f"<s>{text}</s>"
    assert len(examples) == -(-(length + 2) // 8)
    # Each window predicts all its tokens but its first.
    assert examples.report.supervised_tokens == length + 2 - len(examples)
    assert all(
        (labels[1:] != IGNORE).all()
        for _, labels in map(examples.__getitem__, range(len(examples)))
    )
    assert examples.report.documents_cut == (length + 2 > 8)
    assert not examples.report.dropped and not examples.report.truncated


def test_packed_documents_are_cut_and_unpacked_rows_truncated(write, load, decoded):
    path = write([{"text": "0123456789"}, {"text": "ab"}])
    packed = load(path, max_length=8, packing=True)
    assert [decoded(packed, i)[0] for i in range(3)] == [
        "<s>0123456",
        "789</s>",
        "<s>ab</s>",
    ]
    assert packed.report.documents_cut == 1 and packed.report.tokens_lost == 0
    assert (packed.report.packed_rows, packed.report.packing_efficiency) == (2, 1.0)
    assert packed.report.rows_kept == 2 and packed.report.examples == 3
    unpacked = load(path, max_length=8)
    assert unpacked.report.documents_cut == 0 and unpacked.report.truncated == 1
    assert unpacked.report.packed_rows is unpacked.report.packing_efficiency is None


def test_a_long_answer_is_truncated_in_packed_rows_too(write, load):
    path = write([{"prompt": "ab", "completion": "cdefgh"}])
    config = dict(format="prompt_completion", max_length=6, packing=True)
    report = load(path, **config).report
    assert (report.examples, report.truncated, report.documents_cut) == (1, 1, 0)


# --- files ---


def test_a_json_list_a_jsonl_and_a_txt_of_jsonl_are_the_same_rows(
    write, load, tmp_path
):
    rows = [{"text": "ab"}, {"text": "cd"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    paths = [
        str(tmp_path / "a.json"),
        write(rows, "b.jsonl"),
        write(rows, "c.txt"),
        write(["", json.dumps(rows[0]) + "\r", " ", rows[1]], "d.jsonl"),
        write(["\ufeff" + json.dumps(rows[0]), rows[1]], "e.jsonl"),
    ]
    fingerprints = {load(path).report.fingerprint for path in paths}
    assert len(fingerprints) == 1


def test_a_line_separator_inside_a_string_does_not_end_the_row(load, decoded, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert decoded(load(str(path)))[0] == "<s>a\u2028b\u0085c</s>"


@pytest.mark.parametrize("start", ["[Act 1]", "{ not json", '"quoted"'])
def test_plain_text_may_begin_with_a_bracket(load, decoded, tmp_path, start):
    path = tmp_path / "play.txt"
    path.write_text(start + "\nline")
    assert decoded(load(str(path)))[0] == f"<s>{start}\nline</s>"


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ('{"text": "a"}\n{"text": \n', {}, r"d\.jsonl:2: malformed JSON.*\(JSONL\)"),
        ("[{}, \n{]", {}, r"d\.jsonl:2: malformed JSON list"),
        (
            '{"text": "a"}\n\n{"body": "b"}',
            {},
            r"d\.jsonl:3: no field `text`; .*`body`",
        ),
        ('[{"text": "a"}, {}]', {}, r"d\.jsonl row 2: no field `text`; .* no fields"),
        ('{"text": null}', {}, r"d\.jsonl:1: field `text` is null"),
        ('{"text": 3}', {}, r"d\.jsonl:1: field `text` must be a string, got int"),
        (
            '{"text": "ab\\ud83dc"}',
            {},
            r":1: character 2 .* surrogate pair \('\\ud83d'",
        ),
        ('["a"]', {}, r"row 1: a row must be a JSON object, got str"),
        ("3", {}, r":1: a row must be a JSON object, got int"),
        ("", {}, r"d\.jsonl is empty"),
        (" \n\n", {}, r"d\.jsonl is empty"),
        ("[]", {}, r"d\.jsonl has no rows"),
        ('{"text": ""}', {}, r"no row is left .*: 1 read, dropped: 1 empty text"),
        (
            '{"prompt": [{"role": "user"}], "completion": "x"}',
            {"format": "prompt_completion"},
            r"`prompt` must be a string, got list. Use format='messages'",
        ),
        (
            '{"prompt": "x"}',
            {"format": "prompt_completion"},
            r":1: no field `completion`; the row has `prompt`",
        ),
        (
            '{"q": ["x"]}',
            {"text": "{q}"},
            r":1: field `q` of `data.text` must be a string or a number, got list",
        ),
        ('{"q": ["x"]}', {"text": "{q[3]}"}, r"cannot fill `data.text` = '{q\[3\]}'"),
        ('{"q": "x"}', {"text": "{q:d}"}, r"cannot fill .*Unknown format code"),
        ('{"q": null}', {"text": "{q}"}, r":1: field `q` is null"),
        (
            '{"prompt": "abcdefgh", "completion": "x"}',
            {"format": "prompt_completion", "max_length": 4},
            r"no row is left to train on: 1 read, dropped: 1 every supervised token "
            r"truncated \(`data.max_length` = 4, longest row 11 tokens\)",
        ),
        (
            '{"input_ids": [1, 2], "labels": [1, -100]}\n'
            '{"input_ids": [], "labels": []}',
            {"format": "tokens"},
            r"2 read, dropped: 1 nothing to supervise, 1 no tokens",
        ),
    ],
)
def test_unusable_files_are_refused(load, tmp_path, content, config, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load(str(path), **config)


def test_missing_and_unreadable_files_are_refused(load, tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*absent"):
        load(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="is a directory that"):
        load(str(tmp_path))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        load(str(latin))


def test_a_template_over_plain_text_is_refused(load, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("words")
    with pytest.raises(UserError, match="plain text without fields"):
        load(str(path), text="{text}")


def test_a_token_beyond_the_embeddings_names_the_row(write, load, tokenizer):
    path = write([{"text": "ab"}, {"text": "z"}])
    largest = tokenizer.convert_tokens_to_ids("z")
    with pytest.raises(
        UserError, match=rf"data\.jsonl:2: .* id {largest}, but the mod"
    ):
        load(path, vocab_size=largest)
    load(path, vocab_size=largest + 1)


def test_text_without_a_tokenizer_is_refused(write, load, tokenizer):
    path = write([{"text": "ab"}])
    with pytest.raises(UserError, match="format='text' needs a tokenizer"):
        load(path, None)


# --- the fingerprint ---


def test_the_fingerprint_follows_content_and_order_and_not_the_path(write, load):
    rows = [{"text": "ab"}, {"text": "cd"}]
    path = write(rows)

    def fingerprint(path=path, **config):
        return load(path, **config).report.fingerprint

    same = [
        fingerprint(),
        fingerprint(write(rows, "copy.jsonl")),
        fingerprint(train_on="all"),
    ]
    different = [
        fingerprint(write(rows[::-1], "reversed.jsonl")),
        fingerprint(write([{"text": "ab"}, {"text": "ce"}], "other.jsonl")),
        fingerprint(write([{"text": "abcd"}], "joined.jsonl")),
        fingerprint(seed=1),
        fingerprint(shuffle=False),
        fingerprint(packing=True),
        fingerprint(max_length=512),
        fingerprint(append_eos=False),
        fingerprint(too_long="drop"),
    ]
    assert len(set(same)) == 1
    assert len({*same, *different}) == 1 + len(different)
    assert len(same[0]) == 64 and int(same[0], 16)


def test_the_fingerprint_sees_labels(write, load):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    masked = [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}]
    prints = {
        load(write(r), None, format="tokens").report.fingerprint for r in (rows, masked)
    }
    assert len(prints) == 2


# --- real text ---

GSM8K = dict(format="prompt_completion", prompt="{question}\n", completion="{answer}")


@pytest.mark.real
def test_gsm8k_labels_decode_to_the_answers(write, load, shared_data, mistral):
    with open(shared_data / "text/gsm8k/train.jsonl") as file:
        rows = [json.loads(next(file)) for _ in range(200)]
    path = write(rows)
    for prompt in ("{question}\n", "Question: {question}\nAnswer:", "{question} "):
        examples = load(path, mistral, 32000, **(GSM8K | {"prompt": prompt}))
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
    ("name", "config", "fingerprint"),
    [
        (
            "gsm8k/test.jsonl",
            GSM8K | {"packing": True},
            "efcb15b93915f1febd0869cbfdb45eb6651229dac2e503adc1499e6c31a6a3bf",
        ),
        (
            "tinyshakespeare/input.txt",
            dict(max_length=256),
            "aa2707b16c2558eb592d5d0a1ea15aa9e38565bf232d62ae55780f493e3b9e17",
        ),
    ],
)
def test_fingerprints_of_real_data_never_change(
    load, shared_data, mistral, name, config, fingerprint
):
    report = load(str(shared_data / "text" / name), mistral, 32000, **config).report
    assert report.fingerprint == fingerprint


@pytest.mark.real
def test_gsm8k_loads_within_ten_seconds_of_cpu_time(load, shared_data, mistral):
    start = time.process_time()
    path = shared_data / "text/gsm8k/train.jsonl"
    report = load(path, mistral, 32000, packing=True, **GSM8K).report
    assert time.process_time() - start < 10  # 2 s are usual
    assert report.rows_read == report.rows_kept == report.supervised_eos == 7473
    assert report.packing_efficiency > 0.98 and report.tokens_lost == 0


@pytest.mark.real
def test_alpaca_rows_are_read_by_templates(load, shared_data, mistral):
    path = shared_data / "text/llms-from-scratch/instruction-data.json"
    rows = json.loads(path.read_text())
    config = dict(prompt="{instruction}\n{input}\n", completion="{output}")
    examples = load(path, mistral, 32000, format="prompt_completion", **config)
    assert len(examples) == len(rows) == 1100
    for index in (0, 1, 2, 1099):
        _, labels = examples[index]
        expected = rows[index]["output"] + "</s>"
        assert mistral.decode(labels[labels != IGNORE]) == expected


@pytest.mark.real
@pytest.mark.parametrize("packing", [False, True])
def test_a_book_loses_no_token(load, shared_data, packing):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "stories260K")
    path = shared_data / "text/tinyshakespeare/input.txt"
    examples = load(str(path), tokenizer, 512, max_length=512, packing=packing)
    text = path.read_text()
    expected = tokenizer(text, verbose=False)["input_ids"] + [2]
    assert examples.tokens.tolist() == expected
    assert examples.report.tokens_lost == 0 and examples.report.documents_cut == 1
    assert examples.report.longest_row == len(expected)


def test_the_progress_bar_is_on_stderr_and_changes_nothing(write, tokenizer, capsys):
    config = DataConfig(path=write([{"text": "ab"}] * 600))
    quiet = load_examples(config, tokenizer, vocab_size=300)
    assert capsys.readouterr() == ("", "")
    shown = load_examples(config, tokenizer, vocab_size=300, progress=True)
    assert capsys.readouterr().out == ""
    assert shown.report == quiet.report
