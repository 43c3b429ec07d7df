"""Tokens added to the files of a tokenizer, which stay in the form they have.

transformers would write them anew in its own newest form, which older versions and
other readers do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.atomic import write_text
from convert.companions import companion_files
from convert.files import read_json
from convert.output import write_files
from convert.tokenizer import load_tokenizer
from qlora_jax.errors import UserError

# A tokenizer.json has megabytes.
_MAX_BYTES = 1 << 30


def copy_with_added_tokens(source: Path, directory: Path, tokens: list[str]) -> None:
    """Copies a model's tokenizer files, with special tokens added after its own.

    Args:
      source: model directory.
      directory: existing directory.
      tokens: new tokens; they get the ids from `len(tokenizer)` on.

    Raises:
      CheckpointError: files that cannot be read.
      UserError: a tokenizer that gives the tokens other ids.
    """
    first = len(load_tokenizer(source))
    ids = {token: first + i for i, token in enumerate(tokens)}
    write_files(directory, companion_files(source))
    tokenizer_json = directory / "tokenizer.json"
    if tokenizer_json.is_file():
        content = read_json(tokenizer_json, _MAX_BYTES)
        content["added_tokens"] = [
            *(content.get("added_tokens") or ()),
            *({"id": i, **_description(token)} for token, i in ids.items()),
        ]
        _write(tokenizer_json, content)
    _add_to_python_files(directory, ids, alone=not tokenizer_json.is_file())
    tokenizer = load_tokenizer(directory)
    if tokenizer.convert_tokens_to_ids(tokens) != [*ids.values()]:
        raise UserError(
            f"The tokenizer of `{source}` does not take new tokens at {first} and on: "
            "its ids have gaps. Save it once with transformers, and use those files."
        )


def _add_to_python_files(
    directory: Path, ids: Mapping[str, int], *, alone: bool
) -> None:
    """Adds the tokens where the classes without tokenizer.json look for them."""
    config_file, older = (
        directory / name for name in ("tokenizer_config.json", "added_tokens.json")
    )
    config = read_json(config_file, _MAX_BYTES) if config_file.is_file() else {}
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        config["added_tokens_decoder"] = {
            **decoder,
            **{str(i): _description(token) for token, i in ids.items()},
        }
        _write(config_file, config)
    # Read for want of the above.
    if older.is_file() or (alone and decoder is None):
        known = read_json(older, _MAX_BYTES) if older.is_file() else {}
        _write(older, {**known, **ids})


def _description(token: str) -> dict[str, Any]:
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": token, **dict.fromkeys(flags, False), "special": True}


def _write(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
