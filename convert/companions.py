"""The files of a model beside its weights and configuration: tokenizer and templates.

A directory's files are read as bytes, by name, and written again as they were, except
for the entries that a function here changes. So what a tokenizer is does not depend on
the library version that reads and writes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import CheckpointError
from qlora_jax.models import LlamaConfig
from qlora_jax.reading import read_bytes

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""How conversations are written, next to an adapter or a tokenizer."""
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

TEMPLATES = "additional_chat_templates"
_TEMPLATE_FILES = (CHAT_TEMPLATE_FILE, "chat_template.json")
# Any of these makes a tokenizer; the other files only configure one.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONFIGURATION_FILES = (
    *("merges.txt", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
)
"""Files that configure the tokenizer of a vocabulary."""
TOKENIZER_FILES = (*_VOCABULARIES, *CONFIGURATION_FILES, *_TEMPLATE_FILES)
# Vocabularies have some 20 MB.
_MOST_BYTES = 1 << 30

# Settings of transformers' `generate` -> the value that turns each off: of what becomes
# of the logits, and of draws from them (with `do_sample`).
_OF_LOGITS: Mapping[str, Any] = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": 1,
    "num_beams": 1,
    "penalty_alpha": None,
    "stop_strings": None,
}
_OF_DRAWS: Mapping[str, Any] = {
    "temperature": None,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "top_h": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}

Companions = Mapping[str, bytes]
"""Files by their names in a directory."""


def companion_files(directory: Path) -> dict[str, bytes]:
    """Reads the tokenizer, templates and generation configuration of a directory.

    Raises:
      CheckpointError: a file that cannot be read.
    """
    names = [
        name
        for name in (GENERATION_CONFIG, *TOKENIZER_FILES)
        if (directory / name).is_file()
    ]
    folder = directory / TEMPLATES
    names += sorted(f"{TEMPLATES}/{path.name}" for path in folder.glob("*.jinja"))
    return {name: _read(directory / name) for name in names}


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory holds a vocabulary, which makes a tokenizer."""
    return any((directory / name).is_file() for name in _VOCABULARIES)


def text_files(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
) -> dict[str, bytes]:
    """Returns the files that a model reads and writes text with.

    The tokenizer of an adapter replaces that of the base, with its chat templates. Of
    an adapter that has templates only, these replace the base's.

    Args:
      base: directory of the base.
      adapter: PEFT directory.

    Raises:
      CheckpointError: a file that cannot be read.
    """
    files = companion_files(Path(base))
    if adapter is None:
        return files
    adapter = Path(adapter)
    own = companion_files(adapter)
    ends = generation_end_tokens(files, f"`{base}`: ")
    own_ends = generation_end_tokens(own, f"`{adapter}`: ")
    if GENERATION_CONFIG not in own and GENERATION_CONFIG in files:
        own[GENERATION_CONFIG] = files[GENERATION_CONFIG]
    elif set(ends) - set(own_ends):
        ends = tuple(dict.fromkeys([*ends, *own_ends]))
        own = _with_entries(own, GENERATION_CONFIG, eos_token_id=list(ends))
    if has_tokenizer(adapter):
        return own
    templates = chat_templates(own, f"`{adapter}`: ")
    if "default" in templates:
        files = with_chat_template(files, templates.pop("default"))
    for name, text in templates.items():
        files[f"{TEMPLATES}/{name}.jinja"] = text.encode()
    if GENERATION_CONFIG in own:
        files[GENERATION_CONFIG] = own[GENERATION_CONFIG]
    return files


def common_text_files(*adapters: Path) -> dict[str, bytes]:
    """Returns the files for text that all these PEFT directories have alike.

    Raises:
      CheckpointError: a file that cannot be read.
    """
    first, *others = map(companion_files, adapters)
    return first if all(files == first for files in others) else {}


def chat_templates(files: Companions, where: str = "") -> dict[str, str]:
    """Returns the chat templates in files by their names; the main one is "default".

    A template file counts before an entry of tokenizer_config.json, as in transformers.

    Args:
      files: of one directory.
      where: the directory, for messages.

    Raises:
      CheckpointError: a template or configuration that is not UTF-8 or JSON.
    """
    entry = _json(files, TOKENIZER_CONFIG, where).get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(entry, str):
        templates["default"] = entry
    elif isinstance(entry, list):
        templates = dict(_named_template(item, where) for item in entry)
    elif entry is not None:
        raise CheckpointError(
            f"{where}{TOKENIZER_CONFIG}: `chat_template` must be a string, or a list "
            f"of them with names, got {entry!r:.80}."
        )
    for name in files:
        folder, _, file = name.rpartition("/")
        if name == CHAT_TEMPLATE_FILE:
            templates["default"] = _text(files, name, where)
        elif folder == TEMPLATES:
            templates[file.removesuffix(".jinja")] = _text(files, name, where)
    return templates


def _named_template(item: Any, where: str) -> tuple[str, str]:
    """Returns the name and the text of an entry in a list of templates."""
    item = item if isinstance(item, dict) else {}
    name, template = item.get("name"), item.get("template")
    # The name becomes that of a file.
    if isinstance(name, str) and re.fullmatch(r"[\w-]+", name):
        if isinstance(template, str):
            return name, template
    raise CheckpointError(
        f"{where}{TOKENIZER_CONFIG}: an entry of `chat_template` needs a `name` of "
        f"letters and digits and a string `template`, got {item!r:.80}."
    )


def with_chat_template(files: Companions, template: str) -> dict[str, bytes]:
    """Returns files with this as the only chat template."""
    kept = {
        name: content
        for name, content in files.items()
        if name not in _TEMPLATE_FILES and not name.startswith(f"{TEMPLATES}/")
    }
    if TOKENIZER_CONFIG in kept:
        # For readers that know no template files: older versions of transformers.
        kept = _with_entries(kept, TOKENIZER_CONFIG, chat_template=template)
    return {**kept, CHAT_TEMPLATE_FILE: template.encode()}


def with_eos_token(files: Companions, token: str) -> dict[str, bytes]:
    """Returns tokenizer files with this EOS token."""
    changed = _with_entries(files, TOKENIZER_CONFIG, eos_token=token)
    if "special_tokens_map.json" in files:
        changed = _with_entries(changed, "special_tokens_map.json", eos_token=token)
    return changed


def with_tokenizer_class(files: Companions, tokenizer: Any) -> dict[str, bytes]:
    """Names the tokenizer's class where only the model's config.json led to it.

    An adapter directory has no config.json.

    Args:
      files: of the tokenizer.
      tokenizer: as transformers loaded it.
    """
    has_vocabulary = any(name in files for name in _VOCABULARIES)
    if not has_vocabulary or _json(files, TOKENIZER_CONFIG).get("tokenizer_class"):
        return dict(files)
    # The first is the name in transformers 5 of what earlier versions know too.
    names = {"TokenizersBackend": "PreTrainedTokenizerFast"}
    name = type(tokenizer).__name__
    return _with_entries(files, TOKENIZER_CONFIG, tokenizer_class=names.get(name, name))


def with_end_tokens(
    files: Companions, ids: Sequence[int], config: LlamaConfig
) -> dict[str, bytes]:
    """Adds tokens that end generation to generation_config.json.

    Args:
      files: of the model.
      ids: the tokens; the file stays as it is if the model has them already.
      config: of the model; its `eos_token_id` counts where the file has none.
    """
    before = generation_end_tokens(files)
    known = [*before, *(i for i in config.eos_token_ids if i not in before)]
    added = [i for i in ids if i not in (before or known)]
    if not added:
        return dict(files)
    ends = list(dict.fromkeys([*known, *added]))
    return _with_entries(files, GENERATION_CONFIG, eos_token_id=ends)


def generation_end_tokens(files: Companions, where: str = "") -> tuple[int, ...]:
    """Returns `eos_token_id` of generation_config.json, as a tuple.

    Raises:
      CheckpointError: it is neither a token id nor a list of them.
    """
    eos = _json(files, GENERATION_CONFIG, where).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(
            f"{where}{GENERATION_CONFIG}: `eos_token_id` must be a token id or a list "
            f"of them, got {eos}."
        )
    return tuple(ids)


def sampling_settings(files: Companions, where: str = "") -> dict[str, Any]:
    """Returns the settings of generation_config.json that choose other tokens.

    Those that transformers' `generate` computes with; its ends and lengths are not
    among them.

    Raises:
      CheckpointError: a generation_config.json that cannot be read.
    """
    content = _json(files, GENERATION_CONFIG, where)
    off = {**_OF_LOGITS, **(_OF_DRAWS if content.get("do_sample") is True else {})}
    return {
        name: content[name]
        for name in off
        if content.get(name) not in (None, [], {}, off[name])
    }


def _with_entries(files: Companions, name: str, **entries: Any) -> dict[str, bytes]:
    """Returns files with entries of a JSON file set."""
    content = json.dumps({**_json(files, name), **entries}, indent=2) + "\n"
    return {**files, name: content.encode()}


def _json(files: Companions, name: str, where: str = "") -> dict[str, Any]:
    """Returns the content of a JSON file; {} without it."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}{name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}{name} does not hold a JSON object.")
    return content


def _text(files: Companions, name: str, where: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where}{name} cannot be read as text: {error}. Repair it, or delete it "
            "to use the tokenizer's own template."
        ) from error


def _read(file: Path) -> bytes:
    try:
        return read_bytes(file, _MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"`{file}` cannot be read: {error.strerror}.") from error
