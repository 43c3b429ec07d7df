import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.checkpoint import open_model
from convert.files import Mismatches, TensorFiles, check_finite, read_header, read_json
from convert.output import Entry, new_directory, write_model_files, write_safetensors
from qlora_jax.errors import CheckpointError, UserError

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64)


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(rng.integers(1, 12)):
        shape = tuple(rng.integers(1, 5, size=rng.integers(0, 4)).tolist())
        dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
        data = rng.integers(0, 256, size=int(np.prod(shape)) * dtype.itemsize)
        name = "".join(rng.choice(list('abz.é"_'), size=5)) + str(i)
        out[name] = data.astype(np.uint8).view(dtype).reshape(shape)
    return out


def entries(arrays: dict[str, np.ndarray]) -> list[Entry]:
    return [Entry.of(name, array) for name, array in arrays.items()]


def read_all(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, or of a model directory."""
    if path.is_dir():
        files = open_model(path)
    else:
        files = TensorFiles(path.parent, read_header(path)[0])
    return {name: files.read(name) for name in files}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        (a[k].dtype, a[k].shape, a[k].tobytes())
        == (b[k].dtype, b[k].shape, b[k].tobytes())
        for k in a
    )


@pytest.mark.parametrize("seed", range(20))
def test_writer_and_reader_agree_with_the_library(tmp_path, seed):
    arrays = tensors(seed)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, entries(arrays), {"format": "pt"})
    safetensors.numpy.save_file(arrays, theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    assert same(read_all(ours), arrays)
    assert read_header(ours)[1] == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_shards_hold_everything_once_and_keep_the_limit(tmp_path, limit):
    arrays = {f"t{i:02d}": np.full((i + 1, 7), i, np.float32) for i in range(12)}
    write_model_files(tmp_path, entries(arrays), max_shard_bytes=limit)
    assert same(read_all(tmp_path), arrays)
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        inside = read_header(file)[0]
        assert len(inside) == 1 or sum(i.nbytes for i in inside.values()) <= limit
    if limit == 10**9:
        assert [f.name for f in files] == ["model.safetensors"]
    else:
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"] == {
            "total_parameters": 7 * 78,
            "total_size": 4 * 7 * 78,
        }
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_shard_size_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="`max_shard_bytes` must be positive, got 0"):
        write_model_files(tmp_path, [], max_shard_bytes=0)


# --- Damaged files ---


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [Entry.of("x", np.arange(64, dtype=np.float32))], {})
    return path


@pytest.mark.parametrize("keep", [0, 4, 9, 40, -1, -100])
def test_truncated_file_is_named(good, keep):
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors` is truncated or dam"):
        read_header(good)


def write_header(path: Path, header: str | bytes, data: bytes = bytes(4)) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def header(*pairs: str) -> str:
    return "{" + ",".join(pairs) + "}"


X = f'"x":{entry()}'


def test_empty_metadata_and_unknown_fields_of_an_entry_do_no_harm(tmp_path):
    text = header('"__metadata__":null', X[:-1] + ',"more":1}')
    infos, metadata = read_header(write_header(tmp_path / "x.safetensors", text))
    assert (infos["x"].shape, metadata) == ((1,), {})


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "invalid JSON in header"),
        ("[]", "invalid JSON in header"),
        ("null", "invalid JSON in header"),
        ("{" * 100_000, "invalid JSON in header"),
        ('{"x":' * 100_000, "invalid JSON in header"),
        (header(X)[:-1], "invalid JSON in header"),
        (b'{"\xff":1}', "invalid UTF-8 in header"),
        (header(X).encode("utf-16"), "invalid"),
        (header(f'"\\ud800":{entry()}'), "invalid JSON in header"),
        (header(f"1:{entry()}"), "invalid JSON in header"),
        (header('"x":["F32",[1],[0,4]]'), "the entry of `x` is not a JSON object"),
        (header('"x":' + entry(dtype='{"F32":null}')), "`x` has no dtype and shape"),
        (header(X, f'"\\u0078":{entry()}'), "the same name twice in the header"),
        (header(X, X), "the same name twice in the header"),
        (header(f'"x\\n":{entry()}'), r"a tensor with the name 'x\\n'"),
        (header(f'"\\u001b[2J":{entry()}'), r"a tensor with the name '.x1b\[2J'"),
        (header(f'"":{entry()}'), r"a tensor with the name ''"),
        (header(f'"{"x" * 501}":{entry()}'), r"a tensor with the name 'x{100}'\)"),
        (header('"__metadata__":{"a":1}', X), "invalid JSON in header"),
        (header('"x":' + entry(dtype='"F99"')), "invalid JSON in header"),
        (header('"x":' + entry(shape="[-1]")), "invalid JSON in header"),
        (header('"x":' + entry(shape="[1.0]")), "invalid JSON in header"),
        (header('"x":' + entry(shape=f"[{'9' * 5000}]")), "invalid JSON in header"),
        (header('"x":' + entry(shape="[2]")), "invalid shape"),
        (header('"x":' + entry(shape=f"[{'1,' * 64}1]")), "`x` has no dtype and shape"),
        (header('"x":' + entry(offsets="[4,0]")), "invalid offset for tensor"),
        (header('"x":' + entry(offsets="[0,4,4]")), "invalid JSON in header"),
        (header('"x":' + entry(offsets="[-4,0]")), "invalid JSON in header"),
        (header('"x":' + entry(offsets="[0,8]")), "invalid shape"),
        (header('"x":' + entry(shape="[0]", offsets="[0,0]")), ""),  # trailing bytes
    ],
)
def test_hostile_headers_are_refused(tmp_path, text, match):
    path = write_header(tmp_path / "x.safetensors", text)
    with pytest.raises(
        CheckpointError, match=f"truncated or damaged .*{match}"
    ) as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_shape_without_elements_must_still_be_possible_for_an_array(tmp_path):
    path = tmp_path / "x.safetensors"

    def of(a: int, b: int) -> Path:
        text = header('"x":' + entry(shape=f"[0,{a},{b}]", offsets="[0,0]"))
        return write_header(path, text, b"")

    infos, _ = read_header(of(7, 2**40))
    assert TensorFiles(tmp_path, infos).read("x").shape == (0, 7, 2**40)
    with pytest.raises(CheckpointError, match="`x` has a shape that no array can have"):
        read_header(of(2**40, 2**40))
    with pytest.raises(CheckpointError, match="`x` has no dtype and shape"):
        read_header(of(2**64 - 1, 1))


def test_a_header_longer_than_any_is_not_read(tmp_path):
    path = write_header(tmp_path / "x.safetensors", "{" + " " * 4_000_000 + "}", b"")
    with pytest.raises(CheckpointError, match="header of 4,000,002 bytes, and at most"):
        read_header(path)
    path.write_bytes((99_000_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "text, match",
    [
        ("[]", "the header is not a JSON object"),
        (header(X, X), "the same name twice"),
        (header('"__metadata__":{"a":1}'), "the metadata does not map names to str"),
        (header(X, f'"y":{entry()}'), "tensors overlap, or there is a gap"),
        (header(X, '"y":' + entry(offsets="[8,12]")), "tensors overlap, or there is a"),
        (
            header(X, '"y":' + entry(offsets="[4,8]")),
            "the tensors do not end where the f",
        ),
        (
            header('"x":' + entry(offsets="[0,3]")),
            "the size of `x` does not match its shape",
        ),
        (header('"x":' + entry(offsets="[4,0]")), "`x` has no valid begin and end of"),
        (header('"x":' + entry(offsets="[4]")), "`x` has no valid begin and end of"),
        (header('"x":' + entry(shape="[true]")), "`x` has no dtype and shape"),
    ],
)
def test_our_checks_do_not_rely_on_the_library(tmp_path, monkeypatch, text, match):
    # Between the library's look at the file and ours, another may be put in its place.
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: nothing)
    with pytest.raises(CheckpointError, match=match):
        read_header(write_header(tmp_path / "x.safetensors", text))


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_pipe_device_or_link_is_refused_and_does_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        CheckpointError, match="pipe` is not a file but a pipe or device"
    ):
        read(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a file but a pipe or device"):
        read(Path("/dev/zero"))
    with pytest.raises(CheckpointError, match="Cannot read .*: Is a directory"):
        read(tmp_path)
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(CheckpointError, match="Cannot read .*symbolic links"):
        read(tmp_path / "link")


def test_a_tensor_larger_than_memory_is_named(good, monkeypatch):
    files = TensorFiles(good.parent, read_header(good)[0])

    def refuse(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    for read in (files.read, files.read_bytes):
        with pytest.raises(
            CheckpointError, match="`x` of 256 bytes does not fit in mem"
        ):
            read("x")


@pytest.mark.parametrize(
    "text",
    ["version https://git-lfs.github.com/spec/v1\noid sha256:0", "<!DOCTYPE html>"],
)
def test_pointer_or_web_page_is_called_that(tmp_path, text):
    path = tmp_path / "model.safetensors"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="Git LFS pointer or a web page"):
        read_header(path)


def test_a_file_that_shrinks_or_vanishes_while_open_is_an_error(good):
    files = TensorFiles(good.parent, read_header(good)[0])
    good.write_bytes(good.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ended in the middle of tensor `x`"):
        files.read("x")
    good.unlink()
    with pytest.raises(CheckpointError, match="Cannot read tensor `x` from"):
        files.read("x")
    for read in (read_header, read_json):
        with pytest.raises(CheckpointError, match="does not exist"):
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
        (b"{" + b" " * 4_000_000 + b"}", "is larger than 4,000,000 bytes"),
    ],
)
def test_bad_json(tmp_path, text, match):
    path = tmp_path / "config.json"
    path.write_text('{"a": ' + "[" * 40 + "]" * 40 + ', "b": {}}')
    assert read_json(path)["b"] == {}
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=match):
        read_json(path)


# --- Sharded directories ---


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    path.mkdir()
    arrays = {f"t{i}": np.full(8, i, np.float32) for i in range(4)}
    write_model_files(path, entries(arrays), max_shard_bytes=64)
    return path


INDEX = "model.safetensors.index.json"


def change_index(path: Path, change) -> None:
    index = read_json(path / INDEX)
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_shards(sharded):
    def change(weight_map):
        del weight_map["t0"]
        weight_map["nowhere"] = "model-00001-of-00002.safetensors"
        weight_map["t2"] = "model-00001-of-00002.safetensors"

    change_index(sharded, change)
    with pytest.raises(CheckpointError) as caught:
        open_model(sharded)
    message = str(caught.value)
    assert "1 tensors that the index does not name: t0" in message
    assert "1 tensors that their shard lacks: nowhere" in message
    assert "1 tensors in another shard than the index says: t2" in message


def test_the_same_tensor_in_two_shards(sharded):
    arrays = {"t2": np.zeros(8, np.float32), "t0": np.zeros(8, np.float32)}
    arrays["t3"] = arrays["t2"]
    second = sharded / "model-00002-of-00002.safetensors"
    write_safetensors(second, entries(arrays), {})
    with pytest.raises(CheckpointError, match=r"1 tensors in two shards: t0 \(model-"):
        open_model(sharded)


@pytest.mark.parametrize(
    "name, file",
    [
        ("t0", "../x.safetensors"),
        ("t0", 3),
        ("t0", ""),
        ("t0", "a\nb"),
        ("\x1b[2J", "model-00001-of-00002.safetensors"),
    ],
)
def test_index_with_what_are_no_names(sharded, name, file):
    change_index(sharded, lambda m: m.update({name: file}))
    with pytest.raises(CheckpointError, match="has no `weight_map` of tensor names to"):
        open_model(sharded)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda path: (path / "model-00002-of-00002.safetensors").unlink(),
            "1 missing files: model-00002-of-00002",
        ),
        (lambda path: (path / INDEX).write_text("{}"), "has no `weight_map`"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b""),
            "Remove the stale one",
        ),
        (lambda path: (path / INDEX).unlink(), "download the index file too"),
        (lambda path: [file.unlink() for file in path.iterdir()], "has no weights"),
    ],
)
def test_an_incomplete_or_ambiguous_directory_is_refused(sharded, change, match):
    change(sharded)
    with pytest.raises(CheckpointError, match=match):
        open_model(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "a.pt"])
def test_pickle_weights_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="can run any code.*save_pretrained"):
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
        with pytest.raises(CheckpointError, match="Tensor `w` contains NaN or inf"):
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


# --- Directories that appear complete ---


def test_directory_appears_at_the_end_and_with_the_usual_mode(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target) as new:
        (new / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_only_an_empty_directory_is_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out) as new:
        (new / "x").write_text("1")
    for path, match in (
        (out, "exists and is not empty; nothing was written"),
        (out / "x", "it is a file"),
        (out / "x" / "deeper", "Cannot write `.*deeper`: "),
    ):
        with pytest.raises(UserError, match=match):
            with new_directory(path):
                raise AssertionError("not reached")
    assert (out / "x").read_text() == "1"


def test_overwrite_replaces_everything(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with new_directory(out, overwrite=True) as new:
        (new / "new").write_text("2")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_error_leaves_nothing_behind(tmp_path, overwrite):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old").write_text("1")
    with pytest.raises(KeyError):
        with new_directory(out, overwrite=overwrite) as new:
            (new / "x").write_text("1")
            raise KeyError
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == (
        ["out", "out/old"] if overwrite else []
    )


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    # A file size limit stands in for a full disk: the write fails half-way. In a
    # process of its own, because the limit cannot be raised again.
    code = f"""
import resource, numpy as np
from convert.output import Entry, new_directory, write_safetensors
from qlora_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with new_directory(__import__("pathlib").Path({str(tmp_path / "out")!r})) as new:
        big = Entry.of("x", np.zeros(100_000, np.float32))
        write_safetensors(new / "x.safetensors", [big], {{}})
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert re.search("Cannot write `.*out`: File too large. Nothing was", done.stdout)
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
