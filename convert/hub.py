"""Models and adapters of the Hugging Face hub, read and published.

    directory = local_path("Qwen/Qwen3-0.6B")         # its main branch
    directory = local_path("Qwen/Qwen3-0.6B@v1.0")    # a branch, tag or commit

`huggingface_hub` transfers the files: its cache, token, progress bars and environment
variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT) apply. A file or directory of
the name wins over the hub. Only what is read is fetched: no `.bin` files, no folders
such as `original/`, no second copy of the weights.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convert.checkpoint import open_config
from convert.companions import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG,
    TEMPLATES,
    TOKENIZER_FILES,
)
from convert.files import WEIGHTS_FILE, WEIGHTS_INDEX, read_json
from convert.merging import MERGE_REPORT
from convert.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_jax.errors import CheckpointError, UserError, say

Needed = Literal["configuration", "tokenizer", "weights"]
"""How much of a model is read; each includes those before it."""

_NAME = re.compile(
    r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>(?!\S*\.\.)\S+))?",
    re.A,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What is given in the place of a name.
_ADDRESS = re.compile(r"(https?:/+[^/]+/|hf:/*)(?P<name>[\w.-]+/[\w.-]+).*")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CONFIG = "config.json"
# What is enough to count parameters and memory.
_CONFIGURATION = (_CONFIG, GENERATION_CONFIG)
_CARD = "README.md"
_CARD_MARK = "<!-- Written by qlora-jax; without this line it is never replaced. -->"
# Files of an earlier upload that would be read in the place of the new ones.
_WEIGHTS = re.compile(r"(adapter_)?model.*\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class HubName:
    """The name of a repository on the hub, `owner/name` or `owner/name@revision`."""

    repo_id: str
    revision: str | None = None
    """Branch, tag or commit; None = the main branch."""

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "")

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision or "") is not None


def parse_hub_name(path: str | os.PathLike[str]) -> HubName | None:
    """Returns the name that a path is on the hub; None if it is a path and no name.

    A path to an existing file or directory is no name.
    """
    match = _NAME.fullmatch(os.fspath(path))
    if match is None or os.path.lexists(path):
        return None
    return HubName(match["repo_id"], match["revision"])


def hub_name(directory: Path) -> HubName | None:
    """Returns the name on the hub, with the commit, of a directory of its cache."""
    # models--OWNER--NAME/snapshots/COMMIT
    commit, folder = directory.name, directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    name = folder.removeprefix("models--").replace("--", "/", 1)
    return HubName(name, commit) if _NAME.fullmatch(name) else None


def local_path(path: str | os.PathLike[str], *, needed: Needed = "weights") -> Path:
    """Returns a path on this machine: the given one, or the copy of a hub repository.

    Args:
      path: a path, or `owner/name` or `owner/name@revision` of the hub.
      needed: what is fetched of a model. An adapter comes whole, but for
        "tokenizer".

    Raises:
      UserError: a model of another architecture.
      CheckpointError: there is no such repository or revision, it may not be read, the
        hub cannot be reached and the cache does not have it, it holds no weights in
        safetensors, or the disk is full.
    """
    name = parse_hub_name(path)
    if name is None:
        address = _ADDRESS.fullmatch(os.fspath(path))
        if address is not None and not os.path.lexists(path):
            raise CheckpointError(
                f"`{os.fspath(path)}` is an address. A model or an adapter of the hub "
                "is given by its name, `owner/name` or `owner/name@revision`, here "
                f"`{address['name']}`."
            )
        return Path(path).expanduser()
    from huggingface_hub.errors import HFValidationError

    try:
        with _hub_errors(name):
            directory = _fetch(name, needed)
    except HFValidationError:
        return Path(path)  # such as "a/b--c": no name of the hub, so a missing path
    if not name.is_pinned:
        say(f"`{name}` is commit {directory.name[:12]} of the hub.")
    return directory


def _fetch(name: HubName, needed: Needed) -> Path:
    """Downloads what the cache lacks; returns the directory in the cache."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        found, sizes = _describe(name)
        small = _small_files(sizes, needed)
        if not {_CONFIG, ADAPTER_CONFIG} & small:
            raise CheckpointError(
                f"`{name}` on the hub has neither {_CONFIG} nor {ADAPTER_CONFIG}, so "
                "it is no model of transformers and no adapter of PEFT. Its files: "
                f"{_listed(sizes)}."
            )
        # By its name and not by the commit, so that the cache notes which commit it is.
        directory = _download(name, small, sizes, found)
        if _reads_weights(small, needed):
            weights = _weight_files(directory, sizes, str(name))
            if missing := weights - sizes.keys():
                raise CheckpointError(
                    f"`{name}` on the hub does not have {_listed(missing)}, which its "
                    "weights are read from. Its files: "
                    f"{_listed(sizes)}."
                )
            if ADAPTER_CONFIG not in small:
                open_config(directory)  # a model that is refused costs no download
            commit = directory.name
            _download(HubName(name.repo_id, commit), weights, sizes, commit)
        return directory
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, *_transport()) as error:
        answer = _answer(error)
        # A commit never changes, so its copy in the cache is what the hub had.
        refused = isinstance(answer, HfHubHTTPError) and (
            answer.response.status_code < 500
        )
        directory = _cached(name) if name.is_pinned or not refused else None
        if directory is None:
            raise answer from answer.__cause__
        files = {p.name for p in directory.iterdir() if p.exists()}
        why = "the hub no longer gives it" if refused else "the hub cannot be reached"
        why = f"{why} ({_reason(answer)})"
        if _reads_weights(files, needed):
            missing = _weight_files(directory, files, str(name)) - files
            if missing:
                raise CheckpointError(
                    f"The cache has `{name}` without {_listed(missing)}, and {why}."
                ) from error
        if not isinstance(error, OfflineModeIsEnabled):
            say(f"Note: {why}; `{name}` is taken from the cache.")
        return directory


def _describe(name: HubName) -> tuple[str, dict[str, int]]:
    """Asks the hub for the commit of a name and its files, with their bytes.

    Raises:
      ConnectionError: the answer is no description of a repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    known = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, *_transport())
    try:
        info = HfApi().model_info(
            name.repo_id,
            revision=name.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except known:
        raise
    except Exception as error:
        # The page of a proxy, or an address that is none: the client reads the answer
        # without checks, and fails as it happens.
        raise ConnectionError(f"no answer of a hub: {_reason(error)}") from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    valid = isinstance(info.sha, str) and _COMMIT.fullmatch(info.sha) is not None
    if not valid or not all(type(size) is int for size in sizes.values()):
        raise ConnectionError("no answer of a hub: it names no commit, or no sizes")
    return str(info.sha), sizes


def _answer(error: BaseException) -> BaseException:
    """Returns the answer that a file was refused with, else the error itself."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cause = error.__cause__
    is_refusal = isinstance(cause, HfHubHTTPError)
    return cause if isinstance(error, LocalEntryNotFoundError) and is_refusal else error


def _transport() -> tuple[type[Exception], ...]:
    """Returns the errors of a connection, and of answers that are errors."""
    # The HTTP library below has changed its name between versions; its base class is
    # a name of this module in all of them.
    import huggingface_hub.errors as errors

    return (getattr(errors, "HTTPError", errors.HfHubHTTPError), ConnectionError)


def _reads_weights(files: Collection[str], needed: Needed) -> bool:
    is_adapter = ADAPTER_CONFIG in files and needed == "configuration"
    return needed == "weights" or is_adapter


def _is_template(file: str) -> bool:
    """Whether a file of a repository is one of several chat templates."""
    return file.startswith(f"{TEMPLATES}/") and file.endswith(".jinja")


def _small_files(files: Collection[str], needed: Needed) -> set[str]:
    """Returns the files of a repository that are read, weights aside."""
    if needed == "configuration" and ADAPTER_CONFIG not in files:
        return {name for name in files if name in _CONFIGURATION}
    return {
        name
        for name in files
        if _is_template(name)
        or (
            "/" not in name
            and (
                name.endswith((".json", ".jinja"))
                or name in (*TOKENIZER_FILES, "vocab.txt")
            )
            and (name == WEIGHTS_INDEX or not name.endswith(".index.json"))
        )
    }


def _weight_files(directory: Path, files: Collection[str], name: str) -> set[str]:
    """Returns the weight files of a model and of an adapter.

    Args:
      directory: has the small files.
      files: of the repository, or of the cache.
      name: of the repository, for errors.

    Raises:
      CheckpointError: the weights are in no safetensors file.
    """
    weights = {ADAPTER_WEIGHTS} if ADAPTER_CONFIG in files else set()
    if WEIGHTS_INDEX in files:
        weight_map = read_json(directory / WEIGHTS_INDEX).get("weight_map")
        # What is wrong with an index is said by its reader.
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        weights |= {shard for shard in shards if isinstance(shard, str)}
    elif WEIGHTS_FILE in files or ADAPTER_CONFIG not in files:
        weights.add(WEIGHTS_FILE)
    other = sorted(f for f in files if f.endswith((".bin", ".gguf", ".pth", ".pt")))
    if not weights & set(files) and other:
        raise CheckpointError(
            f"`{name}` has its weights as {_listed(other)} only, and weights are read "
            "from safetensors. Convert it with transformers (`from_pretrained`, then "
            "`save_pretrained`), or find a copy of it on the hub that has safetensors."
        )
    return weights


def _download(
    name: HubName, files: Collection[str], sizes: Mapping[str, int], commit: str | None
) -> Path:
    """Downloads files of a commit into the cache; returns its directory."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = {}
    for file in files:
        path = try_to_load_from_cache(name.repo_id, file, revision=name.revision)
        # A file of a folder has more than one part.
        parent = Path(path).parents[file.count("/")] if isinstance(path, str) else None
        if parent is not None and parent.name == commit:
            cached[file] = parent
    if len(cached) == len(files) > 0:
        return next(iter(cached.values()))
    missing = sum(sizes.get(file, 0) for file in files if file not in cached)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise CheckpointError(
            f"`{name}` needs {missing / 1e9:,.1f} GB more in `{cache}`, and "
            f"{free / 1e9:,.1f} GB are free. HF_HOME names another place; `hf cache` "
            "lists what is in this one."
        )
    # One after another: the threads of `snapshot_download` finish every file before
    # Ctrl-C ends the program. The first by its name, which the cache notes.
    revision, directory = name.revision, None
    for file in sorted(files):
        path = Path(hf_hub_download(name.repo_id, file, revision=revision))
        directory = path.parents[file.count("/")]
        revision = directory.name
    assert directory is not None
    return directory


def _cached(name: HubName) -> Path | None:
    """Returns the directory of the cache, if it has the configuration."""
    from huggingface_hub import try_to_load_from_cache

    for file in (ADAPTER_CONFIG, _CONFIG):
        path = try_to_load_from_cache(name.repo_id, file, revision=name.revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


@contextlib.contextmanager
def _hub_errors(name: HubName, *, writes: bool = False) -> Iterator[None]:
    """Raises what the hub answers as a `CheckpointError` that says what to do."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "Log in (`hf auth login`), or set HF_TOKEN."
    if token := get_token():
        log_in = "The token in use (HF_TOKEN, or of `hf auth login`) has no access."
    if token and not (re.fullmatch("[!-~]+", token) or constants.HF_HUB_OFFLINE):
        # It is a header of the request; the error of that would show it.
        raise CheckpointError(
            "The token in use (HF_TOKEN, or of `hf auth login`) has characters that no "
            "token has, such as spaces. Copy it again from the settings of the account."
        )
    here = "" if writes else f"`{name}` is no file or directory here, and "
    try:
        yield
    except (CheckpointError, HFValidationError):
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"`{name}` is gated: its terms are accepted once, by the account that "
            f"reads it, at {constants.ENDPOINT}/{name.repo_id}. {log_in}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"`{name.repo_id}` has no revision {name.revision!r} on the hub. A branch, "
            "a tag or a commit follows the @; without it the main branch is taken."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{here}the hub shows no repository `{name.repo_id}`: there is none of "
            f"this name, or it is private. {log_in}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{here}the hub is not asked, because HF_HUB_OFFLINE is set"
            + ("." if writes else f"; the cache does not have `{name}`.")
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = f" {log_in}" if status in (401, 403) else ""
        raise CheckpointError(
            f"{here}the hub answers {status} to `{name}` ({_reason(error)}).{advice}"
        ) from error
    except (LocalEntryNotFoundError, *_transport()) as error:
        raise CheckpointError(
            f"{here}the hub ({constants.ENDPOINT}) cannot be reached "
            f"({_reason(error)})"
            + ("." if writes else f"; the cache does not have `{name}`.")
        ) from error
    except OSError as error:
        if writes and error.errno is not None:
            raise  # of a file that is published
        if error.errno is None:
            # How the client says that a file came with another size.
            raise CheckpointError(
                f"`{name}`: a file did not come whole ({_reason(error)}). The same "
                "command fetches it again."
            ) from error
        what = "no space is left" if error.errno in _FULL else f"{error.strerror}"
        raise CheckpointError(
            f"`{name}` cannot be kept in the cache `{constants.HF_HUB_CACHE}`: {what}. "
            "HF_HOME names another place; `hf cache` lists what is in this one."
        ) from error
    except Exception as error:
        if not writes:
            raise
        # A failed upload of a file is a RuntimeError; an answer that is not a hub's
        # fails in the client as it happens.
        what = str(error) if isinstance(error, RuntimeError) else "no answer of a hub"
        raise CheckpointError(f"`{name}`: {what} ({_reason(error)}).") from error


def _reason(error: BaseException) -> str:
    """Returns what caused an error, in one line."""
    cause = error.__cause__ or error
    text = " ".join(str(getattr(error, "server_message", None) or cause).split())
    return text[:200] or type(cause).__name__


def _listed(files: Collection[str]) -> str:
    names = sorted(files)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "none"


# --- Publishing ---


def check_repository_name(name: str) -> None:
    """Raises a `UserError` unless a name can be that of a repository of the hub."""
    match = _NAME.fullmatch(name)
    if match is None or match["revision"] is not None:
        raise UserError(f"A repository of the hub is `owner/name`, got {name!r}.")


def check_push(name: str, *, private: bool = True) -> None:
    """Creates a repository on the hub unless it exists, before work begins.

    Args:
      name: `owner/name`.
      private: of a new repository. One that exists stays as it is, with a note if that
        is public.

    Raises:
      UserError: no name of a repository.
      CheckpointError: no token, no permission, or no connection.
    """
    check_repository_name(name)
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    try:
        with _hub_errors(HubName(name), writes=True):
            api = HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            is_private = api.model_info(name, timeout=timeout).private
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name of a repository: {error}") from error
    if private and not is_private:
        say(f"Note: `{name}` exists on the hub and is public, and stays so.")


def push(directory: Path, name: str, card: str) -> str:
    """Publishes a directory as one commit; returns the address.

    Weights, adapter_config.json and chat templates of an earlier upload that the
    directory does not have are deleted, since they would be read with the new ones. A
    model card that was not written here stays.

    Args:
      directory: of a model or an adapter. Its files are uploaded but for reports that
        name paths of this machine, and of its folders the chat templates.
      name: `owner/name`, which `check_push` has checked.
      card: the model card (README.md).

    Raises:
      CheckpointError: the hub refuses, or cannot be reached; or it has such files, and
        they were not published from here.
    """
    from huggingface_hub import (
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        hf_hub_download,
    )

    left_out = (_CARD, MERGE_REPORT)  # which names paths of this machine
    files = [p for p in sorted(directory.iterdir()) if p.name not in left_out]
    files = [p for p in files if p.is_file()]
    files += sorted(directory.glob(f"{TEMPLATES}/*.jinja"))
    with _hub_errors(HubName(name), writes=True):
        api = HfApi()
        present = set(api.list_repo_files(name))
        operations: list[Any] = [
            CommitOperationAdd(str(path.relative_to(directory)), path) for path in files
        ]
        added = {operation.path_in_repo for operation in operations}
        stale = sorted(filter(_would_be_read, present - added))
        operations += [CommitOperationDelete(file) for file in stale]
        card_is_ours = False
        if _CARD in present:
            text = Path(hf_hub_download(name, _CARD)).read_text(errors="replace")
            card_is_ours = _CARD_MARK in text
        if stale and not card_is_ours:
            raise CheckpointError(
                f"`{name}` has {_listed(stale)}, which would be read with what is "
                "published now, and no model card of qlora-jax says that they are of "
                "an earlier upload. Give another name, or delete them there."
            )
        keeps_card = _CARD in present and not card_is_ours
        if not keeps_card:
            content = f"{card.rstrip()}\n\n{_CARD_MARK}\n".encode()
            operations.append(CommitOperationAdd(_CARD, content))
        url = api.create_commit(
            name, operations, commit_message="Upload with qlora-jax"
        ).commit_url
    if keeps_card:
        say(f"Note: `{name}` has a model card of its own, which stays as it is.")
    if stale:
        say(f"Note: deleted from `{name}`, as of an earlier upload: {_listed(stale)}.")
    return url


def _would_be_read(file: str) -> bool:
    """Whether a file of a repository would be read with those of another upload."""
    return (
        _WEIGHTS.fullmatch(file) is not None
        or file in (ADAPTER_CONFIG, CHAT_TEMPLATE_FILE)
        or _is_template(file)
    )
