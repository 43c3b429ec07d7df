"""Fixtures of the data tests: a byte tokenizer, files of rows, loaded examples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.config import DataConfig
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.examples import load_examples
from tests import byte_tokenizers


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A function that makes tokenizers of one token a byte."""
    return byte_tokenizers.byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The plain byte tokenizer: `<s>` is 0, `</s>` is 1."""
    return byte_tokenizers.byte_tokenizer()


class _SlowTokenizer:
    """Like the slow tokenizers of transformers: no character offsets."""

    is_fast = False
    eos_token_id = 1
    bos_token_id = 0
    all_special_tokens = ("<s>", "</s>")

    def __init__(self, fast: PreTrainedTokenizerFast):
        self._fast = fast

    def __call__(self, text, **options):
        assert not options.pop("return_offsets_mapping", False)
        return self._fast(text, **options)

    def apply_chat_template(self, messages, **options):
        return self._fast.apply_chat_template(messages, **options)


@pytest.fixture(scope="session")
def slow_tokenizer(tokenizer: PreTrainedTokenizerFast) -> _SlowTokenizer:
    """`tokenizer` without character offsets."""
    return _SlowTokenizer(tokenizer)


@pytest.fixture(scope="session")
def mistral(shared_data: Path) -> PreTrainedTokenizerFast:
    """A real tokenizer with 32,000 tokens."""
    return PreTrainedTokenizerFast.from_pretrained(
        shared_data / "tokenizers" / "mistral-v1-32000"
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A function that writes rows, text or bytes to a file; returns its path."""

    def write(content, name: str = "data.jsonl") -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, write) -> Callable[..., Any]:
    """A function that loads rows, or a path, with the settings of a `DataConfig`."""

    def load(source, tokenizer=tokenizer, vocab_size: int = 300, **config):
        path = write(source) if isinstance(source, list) else source
        path = path if isinstance(path, tuple) else str(path)
        config = DataConfig(path=path, **config)
        return load_examples(config, tokenizer, vocab_size=vocab_size)

    return load


@pytest.fixture
def fingerprint(load) -> Callable[..., str]:
    """A function that loads as `load` does and returns the fingerprint."""
    return lambda *args, **config: load(*args, **config).report.fingerprint


@pytest.fixture
def decoded(tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[str, str]]:
    """A function that decodes an example, and its supervised tokens."""

    def decoded(examples, index: int = 0, tokenizer=tokenizer) -> tuple[str, str]:
        tokens, labels = examples[index]
        supervised = labels != IGNORE
        np.testing.assert_array_equal(labels[supervised], tokens[supervised])
        return tokenizer.decode(tokens), tokenizer.decode(labels[supervised])

    return decoded
