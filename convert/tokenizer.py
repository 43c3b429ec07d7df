"""A model directory's tokenizer, and the tokens that end generation."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.files import read_json
from qlora_jax.errors import CheckpointError
from qlora_jax.models import LlamaConfig


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
    """Mutes warnings while transformers is imported.

    It warns that PyTorch is missing, which nothing here needs, and configures its own
    loggers, so that a level set on them before would not last.
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
    """Returns the token ids that end generation.

    They come from the model, its tokenizer and generation_config.json: chat models of
    the Llama 3 family name the end of a turn only in the last.

    Args:
      config: of the model, with one or several `eos_token_id`.
      tokenizer: of the model; None if it has none.
      directory: of the model; None skips generation_config.json.

    Raises:
      CheckpointError: a generation_config.json that cannot be read.
    """
    ids = set(config.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    file = None if directory is None else directory / "generation_config.json"
    if file is not None and file.is_file():
        eos = read_json(file).get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        if eos != [None] and not all(type(i) is int and i >= 0 for i in eos):
            raise CheckpointError(
                f"`{file}`: `eos_token_id` must be a token id or a list of them, got "
                f"{eos}."
            )
        ids.update(i for i in eos if i is not None)
    return tuple(sorted(ids))
