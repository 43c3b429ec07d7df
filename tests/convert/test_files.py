import contextlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.checkpoint import open_config, open_model
from convert.files import Mismatches, TensorFiles, check_finite, read_header, read_json
from convert.output import Entry, write_model_files, write_safetensors
from qlora_jax.errors import CheckpointError, UserError
from tests.convert.reference import MODEL, all_tensors, equal_arrays

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64)


def entries(arrays: dict[str, np.ndarray]) -> list[Entry]:
    return [Entry.of(name, array) for name, array in arrays.items()]


def refused(match: str, error: type[Exception] = CheckpointError):
    return pytest.raises(error, match=match)


@pytest.mark.parametrize("seed", range(20))
def test_writer_and_reader_agree_with_the_library(tmp_path, seed):
    rng = np.random.default_rng(seed)
    arrays = {}
    for i in range(rng.integers(1, 12)):
        shape = tuple(rng.integers(1, 5, size=rng.integers(0, 4)).tolist())
        dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
        data = rng.integers(0, 256, size=int(np.prod(shape)) * dtype.itemsize)
        name = "".join(rng.choice(list('abz.é"_'), size=5)) + str(i)
        arrays[name] = data.astype(np.uint8).view(dtype).reshape(shape)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_safetensors(ours, entries(arrays), {"format": "pt"})
    safetensors.numpy.save_file(arrays, theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    infos, metadata = read_header(ours)
    files = TensorFiles(tmp_path, infos)
    assert equal_arrays({name: files.read(name) for name in files}, arrays)
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_shards_hold_everything_once_and_keep_the_limit(tmp_path, limit):
    arrays = {f"t{i:02d}": np.full((i + 1, 7), i, np.float32) for i in range(12)}
    write_model_files(tmp_path, entries(arrays), max_shard_bytes=limit)
    assert equal_arrays(all_tensors(tmp_path), arrays)
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        inside = read_header(file)[0]
        assert len(inside) == 1 or 0 < sum(i.nbytes for i in inside.values()) <= limit
    if limit == 10**9:
        assert [f.name for f in files] == [MODEL]
    else:
        totals = {"total_parameters": 7 * 78, "total_size": 4 * 7 * 78}
        assert read_json(tmp_path / INDEX)["metadata"] == totals
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_shard_size_must_be_positive(tmp_path):
    with refused("`max_shard_bytes` must be positive, got 0", UserError):
        write_model_files(tmp_path, [], max_shard_bytes=0)


# --- Damaged files ---


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / MODEL
    write_safetensors(path, [Entry.of("x", np.arange(64, dtype=np.float32))], {})
    return path


@pytest.mark.parametrize("keep", [0, 4, 9, 40, -1, -100])
def test_truncated_file_is_named(good, keep):
    good.write_bytes(good.read_bytes()[:keep])
    with refused("model.safetensors` is truncated or dam"):
        read_header(good)


@pytest.fixture
def with_header(tmp_path):
    """A function: header and data -> file."""

    def write(header: str | bytes, data: bytes = bytes(4)) -> Path:
        text = header.encode() if isinstance(header, str) else header
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return write


def entry(
    dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", name: str = '"x"'
) -> str:
    return f'{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def header(*pairs: str) -> str:
    return "{" + ",".join(pairs) + "}"


X = entry()


def test_empty_metadata_and_unknown_fields_of_an_entry_do_no_harm(with_header):
    text = header('"__metadata__":null', X[:-1] + ',"more":1}')
    infos, metadata = read_header(with_header(text))
    assert (infos["x"].shape, metadata) == ((1,), {})


JSON = "invalid JSON in header"
SHAPE = "`x` has no dtype and shape"
TWICE = "the same name twice in the header"


@pytest.mark.parametrize(
    "text, match",
    [
        ("", JSON),
        ("[]", JSON),
        ("null", JSON),
        ("{" * 100_000, JSON),
        ('{"x":' * 100_000, JSON),
        (header(X)[:-1], JSON),
        (b'{"\xff":1}', "invalid UTF-8 in header"),
        (header(X).encode("utf-16"), "invalid"),
        (header(entry(name='"\\ud800"')), JSON),
        (header(entry(name="1")), JSON),
        (header('"x":["F32",[1],[0,4]]'), "the entry of `x` is not a JSON object"),
        (header(entry(dtype='{"F32":null}')), SHAPE),
        (header(X, entry(name='"\\u0078"')), TWICE),
        (header(X, X), TWICE),
        (header(entry(name='"x\\n"')), r"a tensor with the name 'x\\n'"),
        (header(entry(name='"\\u001b[2J"')), r"a tensor with the name '.x1b\[2J'"),
        (header(entry(name='""')), r"a tensor with the name ''"),
        (header(entry(name=f'"{"x" * 501}"')), r"a tensor with the name 'x{100}'\)"),
        (header('"__metadata__":{"a":1}', X), JSON),
        (header(entry(dtype='"F99"')), JSON),
        (header(entry(shape="[-1]")), JSON),
        (header(entry(shape="[1.0]")), JSON),
        (header(entry(shape=f"[{'9' * 5000}]")), JSON),
        (header(entry(shape="[2]")), "invalid shape"),
        (header(entry(shape=f"[{'1,' * 64}1]")), SHAPE),
        (header(entry(offsets="[4,0]")), "invalid offset for tensor"),
        (header(entry(offsets="[0,4,4]")), JSON),
        (header(entry(offsets="[-4,0]")), JSON),
        (header(entry(offsets="[0,8]")), "invalid shape"),
        (header(entry(shape="[0]", offsets="[0,0]")), ""),  # trailing bytes
    ],
)
def test_hostile_headers_are_refused(with_header, text, match):
    with refused(f"truncated or damaged .*{match}") as caught:
        read_header(with_header(text))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_shape_without_elements_must_be_possible_too(tmp_path, with_header):
    def read_shape(a: int, b: int):
        text = header(entry(shape=f"[0,{a},{b}]", offsets="[0,0]"))
        return read_header(with_header(text, b""))[0]

    empty = TensorFiles(tmp_path, read_shape(7, 2**40)).read("x")
    assert empty.shape == (0, 7, 2**40)
    with refused("`x` has a shape that no array can have"):
        read_shape(2**40, 2**40)
    with refused(SHAPE):
        read_shape(2**64 - 1, 1)


def test_a_header_longer_than_any_is_not_read(with_header):
    path = with_header("{" + " " * 4_000_000 + "}", b"")
    with refused("header of 4,000,002 bytes, and at most"):
        read_header(path)
    path.write_bytes((99_000_000).to_bytes(8, "little") + b"{}")
    with refused("truncated or damaged"):
        read_header(path)


GAP = "tensors overlap, or there is a gap"
BEGIN = "`x` has no valid begin and end of"


@pytest.mark.parametrize(
    "text, match",
    [
        ("[]", "the header is not a JSON object"),
        (header(X, X), "the same name twice"),
        (header('"__metadata__":{"a":1}'), "the metadata does not map names to str"),
        (header(X, entry(name='"y"')), GAP),
        (header(X, entry(name='"y"', offsets="[8,12]")), GAP),
        (header(X, entry(name='"y"', offsets="[4,8]")), "do not end where the f"),
        (header(entry(offsets="[0,3]")), "the size of `x` does not match its shape"),
        (header(entry(offsets="[4,0]")), BEGIN),
        (header(entry(offsets="[4]")), BEGIN),
        (header(entry(shape="[true]")), SHAPE),
    ],
)
def test_our_checks_do_not_rely_on_the_library(with_header, monkeypatch, text, match):
    # Between the library's look at the file and ours, another may be put in its place.
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: nothing)
    with refused(match):
        read_header(with_header(text))


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_pipe_device_or_bad_link_is_refused_and_does_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "nowhere").symlink_to("absent")
    for path, match in (
        (tmp_path / "pipe", "pipe`: it is a pipe or a device, not a file"),
        (Path("/dev/zero"), "a pipe or a device, not a file"),
        (tmp_path, "Cannot read .*: Is a directory"),
        (tmp_path / "link", "Cannot read .*symbolic links"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with refused(match):
            read(path)


def test_a_link_to_a_file_is_read(good):
    (good.parent / "link").symlink_to(MODEL)
    assert read_header(good.parent / "link")[0]["x"].shape == (64,)


def test_a_tensor_larger_than_memory_is_named(good, monkeypatch):
    files = TensorFiles(good.parent, read_header(good)[0])

    def refuse(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    for read in (files.read, files.read_bytes):
        with refused("`x` of 256 bytes does not fit in mem"):
            read("x")


@pytest.mark.parametrize(
    "text",
    ["version https://git-lfs.github.com/spec/v1\noid sha256:0", "<!DOCTYPE html>"],
)
def test_pointer_or_web_page_is_called_that(good, text):
    good.write_text(text)
    with refused("Git LFS pointer or a web page"):
        read_header(good)


def test_a_file_that_shrinks_or_vanishes_while_open_is_an_error(good):
    files = TensorFiles(good.parent, read_header(good)[0])
    good.write_bytes(good.read_bytes()[:-8])
    with refused("ended in the middle of tensor `x`"):
        files.read("x")
    good.unlink()
    with refused("Cannot read tensor `x` from"):
        files.read("x")
    for read in (read_header, read_json):
        with refused("does not exist"):
            read(good)


@pytest.mark.parametrize(
    "text, match",
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"NaN", "must hold a JSON object, got float"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON .*BOM"),
        ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
        (b'{"a": %s}' % (b"9" * 5000), "is not valid JSON .*4300 digits"),
        (b'{"a": %s}' % (b"[" * 100_000), "is nested too deeply"),
        (b'{"a": %s%s}' % (b"[" * 60, b"]" * 60), "is nested too deeply"),
        (b"{" + b" " * 4_000_000 + b"}", "it is larger than 4,000,000 bytes"),
    ],
)
def test_bad_json(tmp_path, text, match):
    path = tmp_path / "config.json"
    path.write_text('{"a": ' + "[" * 40 + "]" * 40 + ', "b": {}}')
    assert read_json(path)["b"] == {}
    path.write_bytes(text)
    with refused(match):
        read_json(path)


# --- Sharded directories ---

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """t0 and t1 in the first file, t2 and t3 in the second."""
    path = tmp_path / "sharded"
    path.mkdir()
    arrays = {f"t{i}": np.full(8, i, np.float32) for i in range(4)}
    write_model_files(path, entries(arrays), max_shard_bytes=64)
    return path


def change_index(path: Path, **files) -> None:
    index = read_json(path / INDEX)
    index["weight_map"] |= files
    (path / INDEX).write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_shards(sharded):
    index = read_json(sharded / INDEX)
    del index["weight_map"]["t0"]
    index["weight_map"] |= {"nowhere": FIRST, "t2": FIRST}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_model(sharded)
    for part in (
        "1 tensors that the index does not name: t0",
        "1 tensors that their shard lacks: nowhere",
        "1 tensors in another shard than the index says: t2",
    ):
        assert part in str(caught.value)


def test_the_same_tensor_in_two_shards(sharded):
    arrays = dict.fromkeys(("t2", "t0", "t3"), np.zeros(8, np.float32))
    write_safetensors(sharded / SECOND, entries(arrays), {})
    with refused(r"1 tensors in two shards: t0 \(model-"):
        open_model(sharded)


@pytest.mark.parametrize(
    "name, file",
    [
        ("t0", "../x.safetensors"),
        ("t0", 3),
        ("t0", ""),
        ("t0", "a\nb"),
        ("\x1b", FIRST),
    ],
)
def test_index_with_what_are_no_names(sharded, name, file):
    change_index(sharded, **{name: file})
    with refused("has no `weight_map` of tensor names to"):
        open_model(sharded)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda p: (p / SECOND).unlink(), "1 missing files: model-00002-of-00002"),
        (lambda p: (p / INDEX).write_text("{}"), "has no `weight_map`"),
        (lambda p: (p / MODEL).write_bytes(b""), "Remove the stale one"),
        (lambda p: (p / INDEX).unlink(), "download the index file too"),
        (lambda p: [file.unlink() for file in p.iterdir()], "has no weights"),
    ],
)
def test_an_incomplete_or_ambiguous_directory_is_refused(sharded, change, match):
    change(sharded)
    with refused(match):
        open_model(sharded)


@pytest.mark.parametrize(
    "names",
    [
        ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
        ["consolidated.safetensors", "params.json"],
        ["consolidated.safetensors"],
        ["params.json"],
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_the_original_format_of_meta_is_named(tmp_path, names, has_config):
    directory = tmp_path / "original"
    directory.mkdir()
    for name in names:
        (directory / name).write_bytes(b"{}")
    message = f"{names[0]}.*the original format of Meta's.*convert_llama_weights_to_hf"
    if has_config:
        with refused(message):
            open_model(directory)
        return
    with refused(f"has no config.json.*{message}"):
        open_config(directory)
    (tmp_path / "config.json").write_text("{}")
    with refused(f"{message}.*Did you mean `{tmp_path}`"):
        open_config(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt"])
def test_pickle_weights_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with refused("can run any code.*save_pretrained"):
        open_model(tmp_path)


# --- Values ---


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_noticed_anywhere(dtype, bad):
    array = np.random.default_rng(0).standard_normal((3, 1 << 19)).astype(dtype)
    array[0, 0] = np.finfo(np.float16).max
    check_finite(array, "w")
    for index in ((0, 1), (2, -1)):
        broken = array.copy()
        broken[index] = bad
        with refused("Tensor `w` contains NaN or inf"):
            check_finite(broken, "w")


def test_long_lists_of_problems_are_cut_and_counted():
    problems = Mismatches("Bad")
    problems.check()
    for i in range(13):
        problems.add("missing tensors", f"t{i}")
    problems.add("extra tensors", "u")
    with pytest.raises(CheckpointError) as caught:
        problems.check(hint="Do this.")
    assert str(caught.value) == (
        "Bad. 13 missing tensors: t0, t1, t2, t3, t4, t5, t6, t7, t8, t9 and 3 more; "
        "1 extra tensors: u. Do this."
    )
