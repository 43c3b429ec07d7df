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

    Code of the directory (`auto_map`) is never run. A tokenizer that transformers has a
    class for loads without it.

    Raises:
      CheckpointError: tokenizer files that cannot be read, or that need code of the
        directory.
    """
    path = Path(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((path / name).is_file() for name in files):
        return None
    with _quiet():
        from transformers import AutoTokenizer

    try:
        # Without `trust_remote_code` transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        # transformers compares it with lengths at the first call, and not before.
        longest = tokenizer.model_max_length
        if not isinstance(longest, int | float) or isinstance(longest, bool):
            raise ValueError(f"`model_max_length` must be a number, got {longest!r}")
        return tokenizer
    # transformers raises whatever its parsers raise; a panic of the tokenizers library
    # is not even an `Exception`.
    except BaseException as error:
        if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
            raise
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"The tokenizer in `{path}` needs code of its directory (`auto_map` in "
                "tokenizer_config.json or config.json), which is not run here. Save it "
                "as a tokenizer.json: "
                "`AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)"
                ".backend_tokenizer.save('tokenizer.json')`, if you trust that code, "
                "and name a `tokenizer_class` of transformers, such as "
                "PreTrainedTokenizerFast, without the `auto_map`."
            ) from error
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
