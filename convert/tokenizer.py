"""The tokenizer of a model or of its adapter, and the tokens that end generation."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.companions import (
    CONFIGURATION_FILES,
    GENERATION_CONFIG,
    Companions,
    chat_templates,
    companion_files,
    generation_end_tokens,
    has_tokenizer,
    text_files,
    with_end_tokens,
)
from qlora_jax.data import text_prefix
from qlora_jax.errors import CheckpointError, say
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
        _special_tokens_have_ids(tokenizer)
        _split_the_same_always(tokenizer, path)
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


def _special_tokens_have_ids(tokenizer: Any) -> None:
    """Looks the special tokens up, which transformers does at their first use only.

    A token that the vocabulary lacks, such as the empty text that early LLaMA
    conversions name, has the id of the unknown token, which is looked up the same way.

    Raises:
      ValueError: the unknown token itself is not in the vocabulary.
    """
    try:
        for name in ("unk_token_id", "bos_token_id", "eos_token_id"):
            getattr(tokenizer, name, None)
    except RecursionError:
        raise ValueError(
            f"`unk_token` is {str(tokenizer.unk_token)!r}, which is not in its "
            "vocabulary (correct `unk_token`, `bos_token` and `eos_token` in "
            "tokenizer_config.json and special_tokens_map.json)"
        ) from None


def _split_the_same_always(tokenizer: Any, path: Path) -> None:
    """Switches off the random splits of a tokenizer (BPE dropout), with a note.

    They are a method of pre-training. With them a run could not be continued, and a
    prompt would have other tokens each time.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    dropout = getattr(model, "dropout", None)
    if dropout:
        model.dropout = None
        say(
            f"Note: the tokenizer in `{path}` splits text at random (BPE dropout of "
            f"{dropout:g}). That is switched off: a text always has the same tokens."
        )


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


@dataclass(frozen=True)
class Tokenization:
    """What a model reads and writes text with."""

    tokenizer: Any
    """A `transformers` tokenizer, with the chat template of the adapter if it has one;
    None if neither model nor adapter has a tokenizer."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end generation, ascending."""
    notes: tuple[str, ...] = ()
    """How the adapter's tokenizer differs from the base's, and what is not used of it.
    """
    adapter_template: str | None = None
    """The main chat template among the adapter's own files."""


def load_tokenization(
    config: LlamaConfig,
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
) -> Tokenization:
    """Loads the tokenizer of an adapter, or else of its base, and what ends generation.

    Args:
      config: of the model.
      base: directory of the base.
      adapter: PEFT directory.

    Raises:
      CheckpointError: files that cannot be read.
    """
    files = text_files(base, adapter)
    if adapter is None:
        tokenizer = load_tokenizer(base)
        return Tokenization(tokenizer, end_tokens(config, tokenizer, files))
    base, adapter = Path(base), Path(adapter)
    own, notes = companion_files(adapter), []
    templates = chat_templates(own, f"`{adapter}`: ")
    if has_tokenizer(adapter):
        try:
            tokenizer = load_tokenizer(adapter)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} To use that of the base, delete the tokenizer files of the "
                "adapter."
            ) from error
    else:
        tokenizer = load_tokenizer(base)
        unused = [name for name in own if name in CONFIGURATION_FILES]
        if unused:
            used = " (except the chat template)" if templates else ""
            notes.append(
                f"Not used of `{adapter}`: {', '.join(unused)}{used}, since it has "
                "no vocabulary (such as a tokenizer.json)."
            )
        if templates and tokenizer is not None:
            only = templates.keys() == {"default"}
            tokenizer.chat_template = templates["default"] if only else templates
    own.pop(GENERATION_CONFIG, None)
    before = companion_files(base)
    before.pop(GENERATION_CONFIG, None)
    if tokenizer is not None and own and own != before:
        original = None
        with contextlib.suppress(CheckpointError):  # the adapter's is what is needed
            original = load_tokenizer(base)
        differences = _differences(tokenizer, original, config)
        if differences:
            notes.append(
                f"Note: the tokenizer of `{adapter}` is used, which differs from that "
                f"of the base: {'; '.join(differences)}."
            )
    return Tokenization(
        tokenizer,
        end_tokens(config, tokenizer, files),
        tuple(notes),
        templates.get("default"),
    )


def end_tokens(
    config: LlamaConfig, tokenizer: Any, files: Companions
) -> tuple[int, ...]:
    """Returns the token ids that end generation.

    They come from the model, its tokenizer and generation_config.json: chat models of
    the Llama 3 family name the end of a turn only in the last.

    Args:
      config: of the model, with one or several `eos_token_id`.
      tokenizer: of the model; None if it has none.
      files: that the model comes with.

    Raises:
      CheckpointError: a generation_config.json that cannot be read.
    """
    ids = {*config.eos_token_ids, *generation_end_tokens(files)}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def _beyond(tokenizer: Any, config: LlamaConfig) -> list[str]:
    """Says that a tokenizer has tokens which the model has not, if it does."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest < config.vocab_size:
        return []
    return [f"it has token {largest:,}, and the model has {config.vocab_size:,} tokens"]


def _differences(tokenizer: Any, base: Any, config: LlamaConfig) -> list[str]:
    """Describes how the text of an adapter becomes other tokens than the base's."""
    vocabulary, differences = tokenizer.get_vocab(), _beyond(tokenizer, config)
    if base is None:
        return differences
    for name in ("BOS", "EOS"):
        own, other = (getattr(t, f"{name.lower()}_token") for t in (tokenizer, base))
        if own != other:
            differences.append(f"{name} is {own!r} instead of {other!r}")
    before = base.get_vocab()
    changed = sorted(t for t, i in vocabulary.items() if before.get(t, i) != i)
    for verb, tokens in (
        ("adds", sorted(vocabulary.keys() - before.keys())),
        ("lacks", sorted(before.keys() - vocabulary.keys())),
        ("renumbers", changed),
    ):
        if tokens:
            more = f" and {len(tokens) - 5:,} more" if len(tokens) > 5 else ""
            differences.append(f"it {verb} {', '.join(map(repr, tokens[:5]))}{more}")
    if text_prefix(tokenizer) != text_prefix(base):
        differences.append("it begins a text with other tokens")
    if base.chat_template and tokenizer.chat_template != base.chat_template:
        differences.append("another chat template")
    return differences


def merged_text_files(
    config: LlamaConfig, base: Path, adapter: Path
) -> dict[str, bytes]:
    """Returns the files for text of a model that an adapter is merged into.

    What ends generation with the adapter is in generation_config.json, where those look
    who read no tokenizer.

    Raises:
      CheckpointError: files that cannot be read.
    """
    files = text_files(base, adapter)
    if not has_tokenizer(adapter):
        return files
    eos = getattr(load_tokenizer(adapter), "eos_token_id", None)
    return files if eos is None else with_end_tokens(files, [eos], config)


def merged_text_notes(config: LlamaConfig, adapter: Path) -> list[str]:
    """Notes a tokenizer of an adapter whose tokens the merged model does not all have.

    Args:
      config: of the merged model.
      adapter: PEFT directory.

    Raises:
      CheckpointError: files that cannot be read.
    """
    if not has_tokenizer(adapter):
        return []
    return [
        f"the tokenizer of `{adapter}` is that of the result, and {text}"
        for text in _beyond(load_tokenizer(adapter), config)
    ]
