"""Sources of rows: every kind of file gives the same rows."""

import gzip
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data.examples import REPEATED_FILES
from qlora_jax.data.sources import list_sources
from qlora_jax.errors import UserError

ROWS = [{"text": f"row {n} " + "x" * n} for n in range(1, 40)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def library(name):
    """An optional library; without it the test is skipped, and fails under CI."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI") == "true":
            pytest.fail(f"`{name}` is not installed", pytrace=False)
        pytest.skip(f"`{name}` is not installed (pip install '.[data]')")


@pytest.fixture
def jsonl(write):
    return Path(write(ROWS, "rows.jsonl"))


def rows_of(path, split=None):
    sources = list_sources(path, split=split, plain_text=False)
    return [row for source in sources for row in source.open().rows]


# --- text files ---


def test_compressed_files_are_the_same_rows(write, jsonl, fingerprint):
    text = "a line\nanother\n" * 30
    for plain, name, content in (
        (jsonl, "rows.jsonl.gz", jsonl.read_bytes()),
        (jsonl, "rows.json.gz", json.dumps(ROWS).encode()),
        (write(text, "book.txt"), "book.txt.gz", text.encode()),
    ):
        packed = write(gzip.compress(content), name)
        assert fingerprint(packed) == fingerprint(plain), name


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"text": "a"}\n' * 5000)[:-20]]
)
def test_a_damaged_compressed_file_is_refused(write, load, content):
    with pytest.raises(UserError, match=r"x\.jsonl\.gz is damaged or not a gzip file"):
        load(write(content, "x.jsonl.gz"))


def test_the_error_locates_a_bad_byte_far_into_a_file(write, load):
    line = ('{"text": "' + "naïve " * 5000 + '"}\n').encode()
    bad = line * 60 + b'{"text": "\xff"}\n'
    offset = bad.index(b"\xff")
    with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {offset}\)"):
        load(write(bad))


# --- several files ---


def test_a_file_that_is_named_twice_is_read_twice_and_noted(write, tmp_path, load):
    first = write(ROWS[:2], "a1.jsonl")
    write(ROWS[2:4], "b1.jsonl")
    (tmp_path / "link.jsonl").symlink_to(first)
    patterns = (f"{tmp_path}/a*.jsonl", f"{tmp_path}/*1.jsonl")
    report = load(patterns).report
    assert report.rows_read == 6 and report.remarks == {REPEATED_FILES: 1}
    assert report.places[REPEATED_FILES] == (os.path.realpath(first),)
    assert load((first, f"{tmp_path}/link.jsonl")).report.remarks
    assert not load(f"{tmp_path}/*1.jsonl").report.remarks


def test_several_files_or_a_pattern_are_a_single_source(write, tmp_path, jsonl, load):
    names = [
        write(ROWS[start : start + 10], f"part-{start}.jsonl")
        for start in range(0, len(ROWS), 10)
    ]
    expected = load(jsonl).report.fingerprint
    for paths in (tuple(names), tmp_path / "part-*.jsonl"):
        report = load(paths).report
        assert (report.fingerprint, report.rows_read) == (expected, len(ROWS))
    assert load(tuple(names[::-1])).report.fingerprint != expected
    # A file with the characters of a pattern in its name.
    assert load(write(ROWS, "rows[1].jsonl")).report.rows_read == len(ROWS)


def test_all_missing_paths_are_listed_together(tmp_path, jsonl, load):
    paths = (str(tmp_path / "no-*.jsonl"), str(jsonl), str(tmp_path / "nothing.jsonl"))
    message = r"(?s)2 problems.*no file matches the pattern.*there is no file .*nothing"
    with pytest.raises(UserError, match=message):
        load(paths)


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        (".", {}, r"is a directory that `datasets` did not .*/\*\.jsonl'"),
        ("openai/gsm8k", {}, r"no file openai/gsm8k\. .* 'hf:openai/gsm8k'"),
        ("rows.jsonl", {"split": "test"}, "`data.split` = 'test' is for data sets"),
        ("hf:", {}, "a data set of the hub is written"),
        ("hf:a/b/c/d", {}, "a data set of the hub is written"),
        ("hf:a//b", {}, "a data set of the hub is written"),
    ],
)
def test_paths_that_name_no_source_are_refused(
    tmp_path, jsonl, load, monkeypatch, path, config, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load(path, **config)


# --- all problems at once ---


def test_every_bad_row_is_listed(write, load):
    lines = ['{"text": "a"}'] * 1000
    lines[3], lines[700], lines[999] = '{"text": 3}', '{"text": ', '["a"]'
    with pytest.raises(UserError) as error:
        load(write("\n".join(lines)))
    message = str(error.value)
    assert message.startswith("3 problems with the data:\n")
    assert ":4: field `text` must be a string, got int" in message
    assert ":701: malformed JSON" in message
    assert ":1000: a row must be a JSON object, got list" in message


ASKED = '{"messages": [{"role": "user", "content": "a"}, %s]}'
CALLING = ASKED % (
    '{"role": "assistant", "tool_calls": [{"name": "f", "arguments": %s}]}'
)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a", "text": "b"}', ":1: malformed JSON: the key 'text' stands"),
        ('[{"a": {"b": 1, "b": 1}}]', "jsonl: malformed JSON list: the key 'b' stands"),
        (CALLING % '"{\\"a\\": 1, \\"a\\": 2}"', "of a call: the key 'a' stands twice"),
        (
            CALLING % '{"a": NaN}',
            "turn 2 of `messages`: `tool_calls` cannot be written",
        ),
        (CALLING % '"{\\"a\\": 1e999}"', "`tool_calls` cannot be written as JSON"),
        (ASKED % '{"role": "tool", "content": {"a": NaN}}', ":1: the result of a tool"),
        (CALLING % f'"{"[" * 800 + "]" * 800}"', "of a call: it is nested too dee"),
        ('{"text": %s}' % ("[" * 10_000), "malformed JSON: it is nested too deeply"),
        ("[" * 10_000, "malformed JSON list: it is nested too deeply"),
    ],
)
def test_json_that_loses_a_value_or_is_no_json_in_a_template_is_refused(
    write, load, byte_tokenizer, row, message
):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | tojson }}"
    with pytest.raises(UserError, match=message):
        load(write(row), tokenizer, format="messages")


def test_problems_of_all_files_are_raised_together(write, load, tmp_path):
    for name, content in (("a", '{"text": 1}\n'), ("b", "["), ("c", " ")):
        write(content, f"{name}.jsonl")
    message = r"(?s)a.jsonl:1: field.*b.jsonl:1: malformed.*c.jsonl is empty"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "*.jsonl")


def test_reading_stops_after_a_hundred_problems(write, load):
    with pytest.raises(UserError) as error:
        load(write('{"body": "a"}\n' * 100_000))
    message = str(error.value)
    assert message.startswith("at least 100 problems with the data:\n")
    assert "data.jsonl:1, 2, 3, 4, 5 and 95 more: no field `text`;" in message
    assert message.count("\n") == 1


# --- Parquet, Arrow ---


def parquet(path, rows, **options):
    pyarrow = library("pyarrow")
    library("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), path, **options
    )
    return path


def test_parquet_and_arrow_are_the_same_rows(tmp_path, jsonl, fingerprint):
    pyarrow = library("pyarrow")
    library("pyarrow.ipc")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet(tmp_path / "rows.parquet", ROWS, row_group_size=7)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    with pyarrow.ipc.new_stream(str(tmp_path / "str.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "file.arrow", "str.arrow"):
        assert fingerprint(tmp_path / name) == fingerprint(jsonl), name


def test_a_row_of_a_column_file_is_named(tmp_path, load):
    rows = [*ROWS[:20], {"text": None}]
    path = parquet(tmp_path / "x.parquet", rows, row_group_size=6)
    with pytest.raises(UserError, match=r"x\.parquet row 21: field `text` is null"):
        load(path)


def test_keys_that_only_other_turns_have_are_removed(tmp_path):
    tools = [{"name": "f", "arguments": None}]
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": tools}]
    path = parquet(tmp_path / "x.parquet", [{"messages": turns}])
    ((where, row),) = rows_of(str(path))
    assert where.endswith("x.parquet row 1")
    assert row["messages"][0] == TURNS[0]
    assert row["messages"][1] == {"role": "assistant", "tool_calls": [{"name": "f"}]}


def test_maps_and_json_of_columns_are_objects(tmp_path):
    pyarrow = library("pyarrow")
    text, json_type = pyarrow.string(), pyarrow.json_()
    maps = pyarrow.array(
        [[{"a": [("b", "c")]}]],
        pyarrow.list_(pyarrow.struct([("a", pyarrow.map_(text, text))])),
    )
    # `datasets.Json` is stored so, e.g. as the arguments of calls.
    stored = pyarrow.array(['{"b": null}', None], text).cast(json_type)
    nested = pyarrow.StructArray.from_arrays([stored], ["a"])
    nested = pyarrow.ListArray.from_arrays([0, 2], nested)
    table = pyarrow.table({"maps": maps, "json": stored[:1], "nested": nested})
    library("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    ((_, row),) = rows_of(str(tmp_path / "x.parquet"))
    assert row == {
        "maps": [{"a": {"b": "c"}}],
        "json": {"b": None},
        "nested": [{"a": {"b": None}}, {}],
    }


def test_columns_that_cannot_be_converted_are_refused(tmp_path, load):
    pyarrow = library("pyarrow")
    path, buffer = tmp_path / "x.parquet", pyarrow.py_buffer
    not_utf8 = pyarrow.StringArray.from_buffers(
        1, buffer(np.array([0, 1], np.int32).tobytes()), buffer(b"\xff")
    )
    text = pyarrow.array([b"a"])
    for names, columns, config, message in (
        ("tt", [text, text], {}, "several columns of the name 't'"),
        ("ab", [text, not_utf8], {}, r"the column 'b' \(string\) cannot be read: 'utf"),
        ("a", [text], {"text": "{a}"}, "`a` of `data.text` must be .* got bytes"),
    ):
        table = pyarrow.Table.from_arrays(columns, names=list(names))
        library("pyarrow.parquet").write_table(table, path)
        with pytest.raises(UserError, match=message):
            load(path, **config)


def test_token_rows_come_from_parquet(tmp_path, load):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    path = parquet(tmp_path / "x.parquet", rows)
    examples = load(path, None, format="tokens")
    assert examples.tokens.tolist() == [5, 6, 7]
    assert examples.labels.tolist() == [-100, 6, 7]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_damaged_and_empty_column_files_are_refused(write, tmp_path, load, name):
    pyarrow = library("pyarrow")
    with pytest.raises(UserError, match=rf"{name}: cannot be read: "):
        load(write(b"nothing of the kind" * 10, name))
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    library("pyarrow.parquet").write_table(table, tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty\.parquet has no rows"):
        load(tmp_path / "empty.parquet")


@pytest.mark.parametrize(
    ("name", "missing"), [("x.parquet", "pyarrow"), ("hf:some/thing", "datasets")]
)
def test_a_missing_library_is_named_with_how_to_get_it(
    write, load, monkeypatch, name, missing
):
    path = name if missing == "datasets" else write(b"PAR1", name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"pip install {missing}\."):
        load(path)


# --- the `datasets` library ---


def test_saved_data_sets_are_the_same_rows(tmp_path, jsonl, load, fingerprint):
    datasets = library("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    splits = {"train": saved, "test": saved.select(range(5))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert fingerprint(tmp_path / name) == fingerprint(jsonl)
    assert load(tmp_path / "two", split="test").report.rows_read == 5
    with pytest.raises(UserError, match="no split 'dev'; .* one of 'train', 'test'"):
        load(tmp_path / "two", split="dev")
    with pytest.raises(UserError, match="has no splits; leave out `data.split`"):
        load(tmp_path / "one", split="train")
    # A selection keeps its order.
    saved.select([7, 3, 30]).save_to_disk(tmp_path / "some")
    rows = [row for _, row in rows_of(str(tmp_path / "some"))]
    assert rows == [ROWS[7], ROWS[3], ROWS[30]]


def test_a_hub_name_reaches_the_library(monkeypatch, fingerprint, jsonl):
    datasets = library("datasets")
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = fingerprint("hf:openai/gsm8k/main@abc", split="test")
    assert found == fingerprint(jsonl)
    expected = {"name": "main", "revision": "abc", "split": "test"}
    assert calls == [("openai/gsm8k", expected)]


def test_without_a_network_a_hub_name_fails_with_a_way_out(load):
    library("datasets")
    with pytest.raises(UserError, match=r"hf:some/thing: .*Without a network, give f"):
        load("hf:some/thing")


def test_supervised_tokens_are_counted_for_each_row(load):
    rows = [{"prompt": "q", "completion": "a" * n} for n in (1, 2, 5, 9)]
    examples = load(rows, format="prompt_completion")
    np.testing.assert_array_equal(examples.supervised, [2, 3, 6, 10])
    assert examples.report.supervised_per_example == (2, 2, 3, 6, 10)
