# Names of the hub, against a server on the loopback that speaks its HTTP, and against a
# filled cache.

import json
import shutil
import signal
import socket
import threading

import pytest
from huggingface_hub import constants

from convert.hub import HubName, check_push, hub_name, local_path, parse_hub_name, push
from convert.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_jax.errors import CheckpointError, UserError
from tests.hub import TOKEN, Handler, point_to

# `huggingface_hub` uploads in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# Every file has bytes of its own: equal ones are one file of the cache.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
LLAMA = json.dumps(LLAMA).encode()
CONFIG = {"config.json": LLAMA, "tokenizer.json": b"{ }", "tokenizer.model": b"t"}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX_NAME = "model.safetensors.index.json"
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
MODEL = {
    **CONFIG,
    INDEX_NAME: INDEX,
    **{name: name.encode() for name in SHARDS},
}
NOT_READ = {
    **dict.fromkeys(["pytorch_model-00001-of-00001.bin", "x.gguf"], b"other"),
    **dict.fromkeys(["consolidated.safetensors", "original/params.json"], b"other"),
    **dict.fromkeys(["pytorch_model.bin.index.json", "modeling_x.py"], b"other"),
    **dict.fromkeys(["onnx/config.json", "README.md"], b"other"),
}
TEMPLATES = {"chat_template.jinja": b"x", "additional_chat_templates/a.jinja": b"y"}
ADAPTER = {ADAPTER_CONFIG: b"{  }", ADAPTER_WEIGHTS: b"lora"}


def content(directory):
    """Relative path -> bytes of every file."""
    files = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("me/a_b.c@refs/pr/1", HubName("me/a_b.c", "refs/pr/1")),
        ("./a", None),
        ("/a/b", None),
        ("~/a", None),
        ("a", None),
        ("a/b/c", None),
        ("a/b.c@", None),
        ("../b", None),
        ("a/b c", None),
    ],
)
def test_what_a_name_of_the_hub_is(text, name):
    assert parse_hub_name(text) == name
    assert name is None or str(name) == text


def test_a_directory_wins_over_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/model").mkdir(parents=True)
    hub.add("me/model", MODEL)
    assert local_path("me/model").samefile(tmp_path / "me/model")
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "needed", "read"),
    [
        (MODEL | TEMPLATES, "weights", MODEL | TEMPLATES),
        (MODEL, "configuration", {"config.json": LLAMA}),
        (MODEL | TEMPLATES, "tokenizer", CONFIG | TEMPLATES | {INDEX_NAME: INDEX}),
        (
            CONFIG | {"model.safetensors": b"w"},
            "weights",
            CONFIG | {"model.safetensors": b"w"},
        ),
        (ADAPTER | CONFIG, "weights", ADAPTER | CONFIG),
        (ADAPTER, "configuration", ADAPTER),
        (ADAPTER | CONFIG, "tokenizer", CONFIG | {ADAPTER_CONFIG: b"{  }"}),
        (ADAPTER | MODEL, "weights", ADAPTER | MODEL),
    ],
)
def test_only_what_is_read_is_fetched_and_only_once(hub, files, needed, read):
    commit = hub.add("me/model", {**files, **NOT_READ})
    directory = local_path("me/model", needed=needed)
    assert content(directory) == read
    assert hub.downloaded == set(read)
    assert hub_name(directory) == HubName("me/model", commit)
    hub.requests.clear()
    assert local_path("me/model", needed=needed) == directory
    assert not hub.downloaded and len(hub.requests) == 1


def test_a_revision_is_a_tag_a_branch_or_a_commit(hub, capsys):
    hub.add("me/model", MODEL)
    repo = hub.repos["me/model"]
    first = repo.commit({**MODEL, "tokenizer.model": b"1"}, "v1")
    second = repo.commit({**MODEL, "tokenizer.model": b"2"})
    for revision, commit in {"v1": first, "main": second, first: first}.items():
        directory = local_path(f"me/model@{revision}")
        assert directory.name == commit
    assert (local_path("me/model") / "tokenizer.model").read_bytes() == b"2"
    assert (
        f"`me/model@v1` is commit {first[:12]} of the hub." in capsys.readouterr().err
    )
    with pytest.raises(CheckpointError, match="no revision 'v9' on the hub"):
        local_path("me/model@v9")


@pytest.mark.parametrize("how", ["offline", "refused", "503"])
def test_a_filled_cache_serves_without_the_hub(hub, monkeypatch, capsys, how):
    from huggingface_hub import constants

    hub.add("me/model", MODEL)
    hub.add("me/other", MODEL)
    hub.add("me/half", MODEL)
    directory = local_path("me/model")
    (local_path("me/half") / SHARDS[1]).unlink()
    local_path("me/other", needed="configuration")
    capsys.readouterr()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "503":
        hub.status = 503
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        point_to(monkeypatch, url, constants.HF_HUB_CACHE)
    assert local_path("me/model") == directory
    assert local_path(f"me/model@{directory.name}") == directory
    noted = "the hub cannot be reached" in capsys.readouterr().err
    assert noted == (how != "offline")
    for name, missing in {"me/half": SHARDS[1], "me/other": "safetensors"}.items():
        with pytest.raises(
            CheckpointError, match=f"cache has `{name}` without.*{missing}"
        ):
            local_path(name)
    why = (
        "HF_HUB_OFFLINE is set" if how == "offline" else "cannot be reached|answers 503"
    )
    with pytest.raises(CheckpointError, match=f"no file or directory here.*({why})"):
        local_path("me/unknown")


def test_what_the_hub_refuses_is_said_with_what_to_do(hub, monkeypatch):
    hub.add("me/gated", MODEL, gated=True)
    hub.add("me/private", MODEL, private=True)
    with pytest.raises(CheckpointError, match=f"gated.*{hub.url}/me/gated.*auth login"):
        local_path("me/gated")
    for name in ("me/private", "me/none"):
        with pytest.raises(CheckpointError, match="no file or directory here.*private"):
            local_path(name)
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    with pytest.raises(CheckpointError, match="token in use .* has no access"):
        local_path("me/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("me/gated", "me/private"):
        assert content(local_path(name)) == MODEL


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"x"}, "neither config.json nor adapter_config.json.*README"),
        (CONFIG | {"pytorch_model.bin": b"x"}, "pytorch_model.bin only"),
        ({ADAPTER_CONFIG: b"{}", "adapter_model.bin": b"x"}, "adapter_model.bin only"),
        (CONFIG | {"model-q4.gguf": b"x"}, "model-q4.gguf only"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_it_is_read(
    hub, files, message
):
    hub.add("me/model", files)
    with pytest.raises(CheckpointError, match=message):
        local_path("me/model")
    assert not any(name.endswith((".bin", ".gguf")) for name in hub.downloaded)


def test_a_full_disk_is_refused_before_weights_are_read(hub, monkeypatch):
    hub.add("me/model", MODEL)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CheckpointError, match=r"needs .* GB more .* HF_HOME"):
        local_path("me/model")
    assert not hub.downloaded & set(SHARDS)


# --- Publishing ---


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    (directory / "additional_chat_templates").mkdir(parents=True)
    files = ADAPTER | {
        "additional_chat_templates/a.jinja": b"x",
        "merge_report.json": b"/",
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def test_a_directory_becomes_a_private_repository_with_a_card(
    hub, adapter, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push("me/tuned")
    url = push(adapter, "me/tuned", "# Card")
    repo = hub.repos["me/tuned"]
    assert repo.private and url.startswith(hub.url)
    files = dict(repo.files)
    assert files.pop("README.md").startswith(b"# Card\n")
    del files[".gitattributes"]
    # The report names paths of this machine.
    assert files == {n: d for n, d in content(adapter).items() if "report" not in n}
    # Published again: weights that are gone are gone there too, and the card is new.
    repo.commit(
        repo.files | {"model-00001-of-00009.safetensors": b"old", "eval.md": b""}
    )
    push(adapter, "me/tuned", "# Card 2")
    assert repo.files["README.md"].startswith(b"# Card 2\n")
    assert "model-00001-of-00009.safetensors" not in repo.files
    assert "eval.md" in repo.files
    assert "earlier upload: model-00001-of-00009.safetensors" in capsys.readouterr().err
    # A card that someone wrote stays.
    repo.commit(repo.files | {"README.md": b"mine"})
    push(adapter, "me/tuned", "# Card 3")
    assert repo.files["README.md"] == b"mine"
    assert "a model card of its own" in capsys.readouterr().err


def test_what_cannot_be_published_is_refused_before_work_begins(
    hub, adapter, monkeypatch, capsys
):
    for name in ("tuned", "me/tuned@v1", "/home/me/tuned"):
        with pytest.raises(UserError, match="`owner/name`"):
            check_push(name)
    with pytest.raises(CheckpointError, match="auth login"):
        check_push("me/tuned")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(CheckpointError, match="403.*no rights.*has no access"):
        check_push("others/tuned")
    hub.add("me/public", {})
    check_push("me/public")
    assert "is public, and stays so" in capsys.readouterr().err
    hub.loses_blobs = True
    with pytest.raises(CheckpointError, match="adapter_model.safetensors.*storage"):
        push(adapter, "me/public", "# Card")
    assert not hub.repos["me/public"].files
    hub.status = 500
    with pytest.raises(CheckpointError, match="answers 500"):
        check_push("me/tuned")


@pytest.mark.parametrize(
    ("present", "message"),
    [
        # Of an earlier upload, as the card says: gone.
        ({"README.md": b"x", ADAPTER_CONFIG: b"{}", "chat_template.jinja": b""}, None),
        # Of a model that was not made here: kept, and nothing is published.
        (MODEL, "`me/made` has model-00001.* and no model card of"),
        ({**MODEL, "README.md": b"mine"}, "Give another name, or delete them there"),
    ],
)
def test_what_would_be_read_with_an_upload_is_deleted_only_if_it_was_made_here(
    hub, tmp_path, monkeypatch, present, message
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(b"{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"w")
    hub.add("me/made", {})
    if message is None:
        push(tmp_path / "model", "me/made", "# Card")
        repo = hub.repos["me/made"]
        repo.commit({**present, "README.md": repo.files["README.md"], "a.md": b""})
        push(tmp_path / "model", "me/made", "# Card")
        assert set(repo.files) == {
            *("README.md", "a.md", "config.json", "model.safetensors")
        }
        return
    hub.add("me/made", present)
    with pytest.raises(CheckpointError, match=message):
        push(tmp_path / "model", "me/made", "# Card")
    assert hub.repos["me/made"].files == present


# --- A hub that does not answer as one ---


def answer(monkeypatch, route, function):
    """Has one kind of request answered by a function of the handler and the match."""
    changed = {key: function for key in Handler.ROUTES if route in key}
    monkeypatch.setattr(Handler, "ROUTES", {**Handler.ROUTES, **changed})


SHA = "a" * 40


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Log in to the network</html>",
        b'{"id": "me/mo',
        b"[]",
        b"{}",
        {"id": "me/model", "siblings": [{"rfilename": "config.json", "size": 2}]},
        {"id": "me/model", "sha": "../../x", "siblings": []},
        {"id": "me/model", "sha": SHA, "siblings": [{"rfilename": "a", "size": "x"}]},
    ],
)
def test_an_answer_that_is_no_hubs_is_as_no_answer(hub, monkeypatch, content):
    hub.add("me/model", MODEL)
    hub.add("me/other", MODEL)
    directory = local_path("me/model")
    answer(monkeypatch, "/api/models", lambda self, **_: self.send(200, content))
    assert local_path("me/model") == directory
    with pytest.raises(CheckpointError, match="cannot be reached .no answer of a hub"):
        local_path("me/other")


def test_a_file_that_is_refused_or_comes_broken_is_said(hub, monkeypatch):
    hub.add("me/model", MODEL)

    def longer(self, repo, rev, file):
        # Announces more bytes than the file has.
        data = MODEL[file] + (b"more" if self.command == "HEAD" else b"")
        self.send(200, data, ETag=f'"{file}"', X_Repo_Commit=rev)

    answer(monkeypatch, "/resolve/", longer)
    with pytest.raises(CheckpointError, match="did not come whole.*fetches it again"):
        local_path("me/model")
    answer(monkeypatch, "/resolve/", lambda self, **_: self.send(403, b"no"))
    with pytest.raises(CheckpointError, match="the hub answers 403"):
        local_path("me/model")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/hostname", "model-9.safetensors", "*", "", "."]
)
def test_an_index_of_files_that_the_repository_lacks_is_refused_before_weights(
    hub, shard
):
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": shard}}).encode()
    hub.add("me/model", {**MODEL, INDEX_NAME: index})
    with pytest.raises(CheckpointError, match="on the hub does not have"):
        local_path("me/model")
    assert not hub.downloaded & set(SHARDS)


@pytest.mark.parametrize("how", ["deleted", "private", "rewritten"])
def test_a_commit_in_the_cache_outlives_its_repository(hub, capsys, how):
    commit = hub.add("me/model", MODEL)
    directory = local_path(f"me/model@{commit}")
    repo = hub.repos["me/model"]
    if how == "deleted":
        del hub.repos["me/model"]
    elif how == "private":
        repo.private = True
    else:
        del repo.commits[commit]
    assert local_path(f"me/model@{commit}") == directory
    assert "no longer gives it" in capsys.readouterr().err
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match="no repository|no revision"):
        local_path(f"me/model@{commit}")


def test_a_cache_that_cannot_be_written_is_said(hub, monkeypatch, tmp_path):
    hub.add("me/model", MODEL)
    (tmp_path / "file").touch()
    point_to(monkeypatch, hub.url, tmp_path / "file/hub")
    with pytest.raises(CheckpointError, match="cannot be kept in the cache.*HF_HOME"):
        local_path("me/model")


@pytest.mark.parametrize("token", ["hf_\xe9", "hf_a b"])
def test_a_token_that_is_none_is_said_and_not_shown(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match="characters that no token has") as error:
        local_path("me/model")
    assert "hf_" not in str(error.value)


@pytest.mark.parametrize("text", ["https://huggingface.co/me/model/tree/x", "hf:me/m"])
def test_an_address_is_refused_with_the_name_to_give(hub, text):
    with pytest.raises(CheckpointError, match="given by its name.*here `me/m"):
        local_path(text)


@pytest.mark.parametrize("content", [b"<html>", b"{}"])
def test_a_commit_that_is_answered_by_no_hub_is_said(
    hub, adapter, monkeypatch, content
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("me/public", {})
    answer(monkeypatch, "/commit/", lambda self, **_: self.send(200, content))
    with pytest.raises(CheckpointError, match="me/public.*no answer of a hub"):
        push(adapter, "me/public", "# Card")


def test_ctrl_c_ends_a_transfer_at_once(hub, monkeypatch):
    hub.add("me/model", MODEL)
    # However busy the machine is, neither the client nor the hub gives up first.
    patience = 600
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, patience)
    release, answered = threading.Event(), threading.Event()

    def stalls(self, repo, rev, file):
        if self.command == "GET" and file == SHARDS[0]:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            release.wait(patience)
            answered.set()
        etag = f'"{file}"'
        self.send(200, MODEL[file], ETag=etag, X_Repo_Commit=rev)

    commit = hub.repos["me/model"].refs["main"]
    answer(monkeypatch, "/resolve/", stalls)
    with pytest.raises(KeyboardInterrupt):
        local_path(f"me/model@{commit}")
    assert not answered.is_set()  # ended while the hub still stalls
    release.set()
