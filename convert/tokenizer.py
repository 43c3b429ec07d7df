"""TODO."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.files import read_json
from qlora_jax.errors import CheckpointError
from qlora_jax.models.config import LlamaConfig


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads a directory's tokenizer through transformers; None if it has none.

    Raises:
      CheckpointError: tokenizer files that cannot be read.
    """
    path = Path(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((path / name).is_file() for name in files):
        return None
    with _quiet():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(
            f"The tokenizer in `{path}` cannot be read: {error}. Copy the tokenizer "
            "files of the original model there again."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes remarks while transformers is imported.

    It remarks that PyTorch is missing, which nothing here needs, and sets up its
    loggers itself, so that no level set before would last.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def end_tokens(
    config: LlamaConfig, tokenizer: Any, directory: Path | None = None
) -> tuple[int, ...]:
    """Token ids that end a text: the model's, the tokenizer's, the directory's.

    Chat models of the Llama 3 family name the end of a turn in generation_config.json
    alone.

    Args:
      config: its `eos_token_id`, one or several.
      tokenizer: its EOS; None = no tokenizer.
      directory: where generation_config.json may be.

    Raises:
      CheckpointError: a generation_config.json that cannot be read.
    """
    ids = set(config.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    file = None if directory is None else directory / "generation_config.json"
    if file is not None and file.is_file():
        given = read_json(file).get("eos_token_id")
        given = given if isinstance(given, list) else [given]
        if given != [None] and not all(type(i) is int and i >= 0 for i in given):
            raise CheckpointError(
                f"`{file}`: `eos_token_id` must be a token id or a list of them, got "
                f"{given}."
            )
        ids.update(i for i in given if i is not None)
    return tuple(sorted(ids))
