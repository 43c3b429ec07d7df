"""From rows to tokens and labels.

The one idea: every text format becomes one string and the character spans of it that
are supervised (`segments` labels the tokens, `chat` marks the spans of a conversation).
A row that cannot be used is written down as a problem and the next one is read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from qlora_jax.data.chat import ChatRenderer, to_messages
from qlora_jax.data.rows import Row, text_of
from qlora_jax.data.segments import IGNORE as IGNORE
from qlora_jax.data.segments import (
    Encoded,
    Segmented,
    given_tokens,
    text_prefix,
    tokenize,
)
from qlora_jax.data.settings import DataConfig
from qlora_jax.errors import Problems, UserError


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What `make_encoder` makes.

    Attributes:
      encode: rows -> for each its tokens and labels, the reason to drop it, or None
        where it was written down as a problem.
      assistant_mask: as the report has it.
    """

    encode: Callable[[list[Row]], list[Encoded | str | None]]
    assistant_mask: str | None


def _segmenter(
    config: DataConfig, chat: ChatRenderer | None
) -> Callable[[str, dict[str, Any]], Segmented | str]:
    """The function (place, row) -> `Segmented`, or the reason to drop the row."""
    if config.format == "text":

        def text(where: str, row: dict[str, Any]) -> Segmented | str:
            document = text_of(row, where, "text", config.text)
            return Segmented(document) if document else "empty text"

        return text
    if config.format == "prompt_completion":

        def prompt_completion(where: str, row: dict[str, Any]) -> Segmented | str:
            prompt = text_of(row, where, "prompt", config.prompt)
            completion = text_of(row, where, "completion", config.completion)
            if not completion:
                return "empty completion"
            whole = prompt + completion
            if config.supervised == "all":
                return Segmented(whole)
            return Segmented(whole, [(len(prompt), len(whole))])

        return prompt_completion
    assert chat is not None

    def messages(where: str, row: dict[str, Any]) -> Segmented | str:
        turns = to_messages(row, where)
        tools = row.get("tools") or None
        if config.supervised == "all":
            return Segmented(chat.text(turns, tools=tools, where=where))
        whole, spans = chat.spans(turns, tools=tools, where=where)
        if not spans and any(turn["role"] == "assistant" for turn in turns):
            return "assistant turns that the chat template does not mark"
        return Segmented(whole, spans) if spans else "no assistant turn"

    return messages


def _given(
    config: DataConfig, vocab_size: int, problems: Problems
) -> Callable[[list[Row]], list[Encoded | str | None]]:
    all_supervised = config.supervised == "all"

    def one(where: str, row: dict[str, Any]) -> Encoded | None:
        try:
            return given_tokens(
                row, where, all_supervised=all_supervised, vocab_size=vocab_size
            )
        except UserError as error:
            problems.add(error)
            return None

    return lambda rows: [one(where, row) for where, row in rows]


def make_encoder(
    config: DataConfig, tokenizer: Any, *, vocab_size: int, problems: Problems
) -> Encoder:
    """Makes the function from rows to tokens and labels.

    Args:
      config: one source and how to read it.
      tokenizer: a `transformers` tokenizer; None serves format `tokens`.
      vocab_size: ids must be below it.
      problems: where rows go that cannot be used.

    Raises:
      UserError: no tokenizer, no chat template or no EOS where one is needed.
    """
    if config.format == "tokens":
        return Encoder(_given(config, vocab_size, problems), None)
    if tokenizer is None:
        raise UserError(
            f"format={config.format!r} needs a tokenizer and the model came without "
            "one. Put the tokenizer's files beside the model, or use format='tokens'."
        )
    chat = None
    if config.format == "messages":
        chat = ChatRenderer(tokenizer, config.chat_template)
    segment = _segmenter(config, chat)
    prefix: list[int] = []
    suffix: list[int] = []
    if config.format != "messages":
        prefix = text_prefix(tokenizer)
        if config.append_eos:
            eos = getattr(tokenizer, "eos_token_id", None)
            if eos is None:
                raise UserError(
                    "`data.append_eos` is true and this tokenizer has no EOS token. "
                    "Set its `eos_token`, or set `data.append_eos` to false."
                )
            suffix = [int(eos)]

    def piece_of(where: str, row: dict[str, Any]) -> Segmented | str | None:
        try:
            return _encodable(segment(where, row), where)
        except UserError as error:
            problems.add(error)
            return None

    def encode(rows: list[Row]) -> list[Encoded | str | None]:
        pieces = [piece_of(where, row) for where, row in rows]
        texts = [piece for piece in pieces if isinstance(piece, Segmented)]
        encoded = tokenize(tokenizer, texts)
        return [
            complete(next(encoded)) if isinstance(piece, Segmented) else piece
            for piece in pieces
        ]

    def complete(bare: Encoded) -> Encoded:
        ids = bare.tokens
        before = prefix if ids[: len(prefix)].tolist() != prefix else []
        after = suffix if ids[-1:].tolist() != suffix else []
        tokens = np.concatenate([before, ids, after])
        labels = np.concatenate([[IGNORE] * len(before), bare.labels, after])
        return Encoded(tokens.astype(np.int32), labels.astype(np.int32), bare.straddles)

    mask = None
    if chat is not None and config.supervised == "assistant":
        mask = "template" if chat.has_marks else "renderer"
    return Encoder(encode, mask)


def _encodable(piece: Segmented | str, where: str) -> Segmented | str:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        if isinstance(piece, Segmented):
            piece.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of the text is half of a surrogate pair "
            f"({ascii(error.object[error.start])}), which is no valid text. Repair or "
            "remove it."
        ) from error
    return piece
