"""Sources of rows: every kind of file gives the same rows."""

import gzip
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.data.sources import list_sources
from qlora_jax.errors import Problems, UserError

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
    problems = Problems()
    sources = list_sources(path, split=split, plain_text=False)
    rows = [row for source in sources for row in source.open(problems).rows]
    problems.raise_if_any()
    return rows


# --- text files ---


def test_compressed_files_are_the_same_rows(tmp_path, jsonl, load):
    expected = load(jsonl).report.fingerprint
    for name, content in (
        ("rows.jsonl.gz", jsonl.read_bytes()),
        ("rows.json.gz", json.dumps(ROWS).encode()),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert load(tmp_path / name).report.fingerprint == expected


def test_a_compressed_book_is_one_document(tmp_path, load):
    text = "a line\nanother\n" * 30
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = load(tmp_path / "book.txt"), load(tmp_path / "book.txt.gz")
    assert packed.report.fingerprint == plain.report.fingerprint
    assert plain.report.rows_read == 1


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"text": "a"}\n' * 5000)[:-20]]
)
def test_a_damaged_compressed_file_is_refused(tmp_path, load, content):
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jsonl\.gz is damaged or not a gzip file"):
        load(tmp_path / "x.jsonl.gz")


def test_the_error_locates_a_bad_byte_far_into_a_file(tmp_path, load):
    line = ('{"text": "' + "naïve " * 5000 + '"}\n').encode()
    bad = line * 60 + b'{"text": "\xff"}\n'
    (tmp_path / "x.jsonl").write_bytes(bad)
    offset = bad.index(b"\xff")
    with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {offset}\)"):
        load(tmp_path / "x.jsonl")


# --- several files ---


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


def test_a_file_with_the_characters_of_a_pattern_in_its_name(tmp_path, jsonl, load):
    odd = tmp_path / "rows[1].jsonl"
    odd.write_bytes(jsonl.read_bytes())
    assert load(odd).report.rows_read == len(ROWS)


def test_all_missing_paths_are_listed_together(tmp_path, jsonl, load):
    paths = (str(tmp_path / "no-*.jsonl"), str(jsonl), str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError) as error:
        load(paths)
    message = str(error.value)
    assert "2 problems" in message
    assert "no file matches the pattern" in message
    assert "there is no file" in message and "nothing.jsonl" in message


def test_a_directory_of_files_needs_a_pattern(tmp_path, jsonl, load):
    with pytest.raises(
        UserError, match=r"is a directory that `datasets` did not .*/\*\.jsonl'"
    ):
        load(tmp_path)


def test_a_hub_name_without_its_prefix_is_recognised(load):
    with pytest.raises(UserError, match=r"no file openai/gsm8k\. .* 'hf:openai/gsm8k'"):
        load("openai/gsm8k")


def test_a_split_of_a_file_is_refused(jsonl, load):
    with pytest.raises(UserError, match="`data.split` = 'test' is for data sets"):
        load(jsonl, split="test")


# --- all problems at once ---


def test_every_bad_row_is_listed(tmp_path, load):
    lines = ['{"text": "a"}'] * 1000
    lines[3], lines[700], lines[999] = '{"text": 3}', '{"text": ', '["a"]'
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        load(tmp_path / "x.jsonl")
    message = str(error.value)
    assert message.startswith("3 problems with the data:\n")
    assert ":4: field `text` must be a string, got int" in message
    assert ":701: malformed JSON" in message
    assert ":1000: a row must be a JSON object, got list" in message


def test_problems_of_all_files_are_raised_together(tmp_path, load):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "b.jsonl").write_text("[")
    (tmp_path / "c.jsonl").write_text(" ")
    with pytest.raises(UserError) as error:
        load(tmp_path / "*.jsonl")
    for part in ("a.jsonl:1: field", "b.jsonl:1: malformed", "c.jsonl is empty"):
        assert part in str(error.value)


def test_reading_stops_after_a_hundred_problems(tmp_path, load):
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n' * 100_000)
    with pytest.raises(UserError) as error:
        load(tmp_path / "x.jsonl")
    message = str(error.value)
    assert message.startswith("at least 100 problems with the data:\n")
    assert "x.jsonl:1, 2, 3, 4, 5 and 95 more: no field `text`;" in message
    assert message.count("\n") == 1


# --- Parquet, Arrow ---


def parquet(path, rows, **options):
    pyarrow = library("pyarrow")
    library("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), path, **options
    )
    return path


def test_parquet_and_arrow_are_the_same_rows(tmp_path, jsonl, load):
    pyarrow = library("pyarrow")
    library("pyarrow.ipc")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet(tmp_path / "rows.parquet", ROWS, row_group_size=7)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    with pyarrow.ipc.new_stream(str(tmp_path / "str.arrow"), table.schema) as writer:
        writer.write_table(table)
    expected = load(jsonl).report.fingerprint
    for name in ("rows.parquet", "file.arrow", "str.arrow"):
        assert load(tmp_path / name).report.fingerprint == expected, name


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


def test_token_rows_come_from_parquet(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    path = parquet(tmp_path / "x.parquet", rows)
    config = DataConfig(path=str(path), format="tokens")
    examples = load_examples(config, None, vocab_size=9)
    assert examples.tokens.tolist() == [5, 6, 7]
    assert examples.labels.tolist() == [-100, 6, 7]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_damaged_column_files_are_refused(tmp_path, load, name):
    library("pyarrow")
    (tmp_path / name).write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: "):
        load(tmp_path / name)


def test_an_empty_column_file_is_refused(tmp_path, load):
    pyarrow = library("pyarrow")
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    library("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has no rows"):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "missing"), [("x.parquet", "pyarrow"), ("hf:some/thing", "datasets")]
)
def test_a_missing_library_is_named_with_how_to_get_it(
    tmp_path, load, monkeypatch, name, missing
):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, missing, None)
    path = name if name.startswith("hf:") else tmp_path / name
    with pytest.raises(UserError, match=rf"pip install {missing}\."):
        load(path)


# --- the `datasets` library ---


def test_saved_data_sets_are_the_same_rows(tmp_path, jsonl, load):
    datasets = library("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    splits = {"train": saved, "test": saved.select(range(5))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    expected = load(jsonl).report.fingerprint
    assert load(tmp_path / "one").report.fingerprint == expected
    assert load(tmp_path / "two").report.fingerprint == expected
    assert load(tmp_path / "two", split="test").report.rows_read == 5
    with pytest.raises(UserError, match="no split 'dev'; .* one of 'train', 'test'"):
        load(tmp_path / "two", split="dev")
    with pytest.raises(UserError, match="has no splits; leave out `data.split`"):
        load(tmp_path / "one", split="train")


def test_a_selection_that_was_saved_keeps_its_order(tmp_path):
    datasets = library("datasets")
    saved = datasets.Dataset.from_list(ROWS).select([7, 3, 30])
    saved.save_to_disk(tmp_path / "some")
    texts = [row["text"] for _, row in rows_of(str(tmp_path / "some"))]
    assert texts == [ROWS[7]["text"], ROWS[3]["text"], ROWS[30]["text"]]


def test_a_hub_name_reaches_the_library(monkeypatch, load, jsonl):
    datasets = library("datasets")
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load("hf:openai/gsm8k/main@abc", split="test")
    assert examples.report.fingerprint == load(jsonl).report.fingerprint
    expected = {"name": "main", "revision": "abc", "split": "test"}
    assert calls == [("openai/gsm8k", expected)]


def test_without_a_network_a_hub_name_fails_with_a_way_out(load):
    library("datasets")
    with pytest.raises(UserError, match=r"hf:some/thing: .*Without a network, give f"):
        load("hf:some/thing")


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c/d", "hf:a//b"])
def test_malformed_hub_names_are_refused(load, name):
    with pytest.raises(UserError, match="a data set of the hub is written"):
        load(name)


def test_supervised_tokens_are_counted_for_each_row(tmp_path, load):
    rows = [{"prompt": "q", "completion": "a" * n} for n in (1, 2, 5, 9)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = load(tmp_path / "x.jsonl", format="prompt_completion")
    np.testing.assert_array_equal(examples.supervised, [2, 3, 6, 10])
    assert examples.report.supervised_per_example == (2, 2, 3, 6, 10)
