# A hub on the loopback: the HTTP of huggingface.co, as much of it as `huggingface_hub`
# uses to read a repository and to commit to one.

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_token_of_the_tests"
REPO = r"/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: its commits, oldest first, and what its branches and tags name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        """Adds a commit of these files to main, and to other refs."""
        listing = repr((len(self.commits), sorted(files.items())))
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs.update(dict.fromkeys(("main", *refs), sha))
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """The repositories, and what was asked of them."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int | None = None  # answered to everything, if given
    blobs: dict[str, bytes] = field(default_factory=dict)
    loses_blobs: bool = False
    url: str = ""

    def add(self, name: str, source: Path | Mapping[str, bytes], **kinds: bool) -> str:
        """Adds a repository of a directory's files; returns its commit."""
        if isinstance(source, Path):
            paths = [p for p in source.rglob("*") if p.is_file()]
            source = {p.relative_to(source).as_posix(): p.read_bytes() for p in paths}
        repo = self.repos[name] = Repo(**kinds)
        return repo.commit(source)

    @property
    def downloaded(self) -> set[str]:
        """Names of the files that were fetched."""
        asked = (
            re.fullmatch(rf"GET {REPO}/resolve/[^/]+/(.*)", r) for r in self.requests
        )
        return {m[2] for m in asked if m}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Runs a hub on a free port of the loopback."""
    handler = type("Handler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status is not None:
            return self.send(self.hub.status, {"error": "out of order"})
        for pattern, function in self.ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return function(self, **match.groupdict())
        return self.send(404, {"error": f"no route {path}"})

    @property
    def has_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send(status, X_Error_Code=code, X_Error_Message=f"It is {code}.")

    def find(self, name, rev="main"):
        """The repository and commit; None after a refusal was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.has_token):
            # As the hub does: without a token nobody learns which names exist.
            return self.refuse(404 if self.has_token else 401, "RepoNotFound")
        commit = repo.refs.get(rev, rev)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        return repo, commit

    def info(self, repo, rev="main"):
        if found := self.find(repo, rev):
            one, commit = found
            files = [
                {"rfilename": name, "size": len(data)}
                for name, data in one.commits[commit].items()
            ]
            kinds = {"private": one.private, "gated": "manual" if one.gated else False}
            self.send(200, {"id": repo, "sha": commit, "siblings": files, **kinds})

    def tree(self, repo, rev):
        if found := self.find(repo, rev):
            files = found[0].commits[found[1]].items()
            self.send(
                200,
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for name, data in files
                ],
            )

    def resolve(self, repo, rev, file):
        if not (found := self.find(repo, rev)):
            return None
        one, commit = found
        if one.gated and not self.has_token:
            return self.refuse(401, "GatedRepo")
        if file not in one.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        data = one.commits[commit][file]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.send(200, data, ETag=etag, X_Repo_Commit=commit)

    def create(self):
        if not self.has_token:
            return self.send(401, {"error": "Invalid username or password."})
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name.startswith("others/"):
            return self.send(403, {"error": "You have no rights in this namespace."})
        if name in self.hub.repos:
            return self.send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        # Versions of the client before 2 say it in the second way.
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[name] = Repo(private=private)
        self.hub.repos[name].commit({".gitattributes": b""})
        return self.send(200, {"url": f"{self.hub.url}/{name}"})

    def preupload(self, repo, rev):
        files = [
            {
                "path": f["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
            }
            for f in json.loads(self.body)["files"]
        ]
        self.send(200, {"files": files})

    def lfs(self, repo):
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/blobs/{o['oid']}"}},
            }
            for o in json.loads(self.body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def blob(self, oid):
        if self.hub.loses_blobs:
            return self.send(400, {"error": "the storage is full"})
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        return self.send(200)

    def new_commit(self, repo, rev):
        one = self.hub.repos[repo]
        files = dict(one.commits[one.refs[rev]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = one.commit(files)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.send(200, {"commitUrl": url, "commitOid": sha, "success": True})

    ROUTES = {
        "/api/repos/create": create,
        "/api/validate-yaml": lambda self: self.send(200, {}),
        rf"/api/models{REPO}": info,
        rf"/api/models{REPO}/revision/(?P<rev>.+)": info,
        rf"/api/models{REPO}/tree/(?P<rev>[^/]+)": tree,
        rf"/api/models{REPO}/preupload/(?P<rev>[^/]+)": preupload,
        rf"/api/models{REPO}/commit/(?P<rev>[^/]+)": new_commit,
        rf"{REPO}\.git/info/lfs/objects/batch": lfs,
        rf"{REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)": resolve,
        r"/blobs/(?P<oid>\w+)": blob,
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, an empty cache, and no token."""
    with serving(Hub()) as server:
        point_to(monkeypatch, server.url, tmp_path / "cache")
        yield server


def point_to(monkeypatch, url, cache):
    """Has `huggingface_hub` ask a server and use a cache.

    It reads these settings from the environment when it is imported.
    """
    from huggingface_hub import constants

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Uploads over plain HTTP; the other way is a service of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_TOKEN", raising=False)
