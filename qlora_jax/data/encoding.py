"""Text with supervised character spans, and the tokens and labels it gives.

The one idea: the whole text is tokenized once, and a token is supervised if its last
character lies in a supervised span. So a label boundary is never found by searching
tokens, and the tokens are those of the text as a model reads it, not of glued-together
pieces.

A token that straddles the start of a span (prompt `"a "` and completion `"b"` may share
the token `" b"`) holds supervised characters and is supervised: leaving it out would
leave the first characters of the answer unlearned. Such texts are counted.

From rows to tokens and labels.

The one idea: every text format becomes one string and the character spans of it that
are supervised (`segments` labels the tokens, `chat` marks the spans of a conversation).
A row that cannot be used is written down as a problem and the next one is read.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.chat import ChatRenderer, to_messages
from qlora_jax.data.config import DataConfig
from qlora_jax.data.rows import Fields, Row, fields_of, text_of
from qlora_jax.errors import Problems, UserError

IGNORE = -100
"""The label of a token that is not supervised, as in Hugging Face."""


@dataclasses.dataclass(frozen=True)
class Segmented:
    """A text and its supervised character spans; None = all of it."""

    text: str
    spans: list[tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens and aligned labels of one text; `IGNORE` where nothing is supervised."""

    tokens: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]
    straddles: bool = False
    """Whether a token holds characters on both sides of a span's start."""


def text_prefix(tokenizer: Any) -> list[int]:
    """Returns the ids a tokenizer puts before a text (BOS, or nothing)."""
    ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(bare) + 1):
        if bare and ids[start : start + len(bare)] == bare:
            return [int(i) for i in ids[:start]]
    bos = getattr(tokenizer, "bos_token_id", None)
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []


def tokenize(tokenizer: Any, pieces: list[Segmented]) -> Iterator[Encoded]:
    """Yields tokens and labels of each text, without special tokens around it.

    A tokenizer that gives no character offsets (none of the fast ones) tokenizes each
    segment by itself, so that boundaries stay exact; the tokens beside a boundary may
    then differ from those of the whole text.
    """
    if not pieces:
        return
    marked = any(piece.spans is not None for piece in pieces)
    options = dict(
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # lengths are this module's business
    )
    if marked and not getattr(tokenizer, "is_fast", False):
        for piece in pieces:
            yield _tokenize_apart(tokenizer, piece, options)
        return
    encoding = tokenizer(
        [piece.text for piece in pieces], return_offsets_mapping=marked, **options
    )
    for number, piece in enumerate(pieces):
        ids = np.array(encoding["input_ids"][number], np.int32)
        if piece.spans is None:
            yield Encoded(ids, ids)
            continue
        spans = np.array(encoding["offset_mapping"][number], np.int64).reshape(-1, 2)
        starts, ends = spans[:, 0], spans[:, 1]
        supervised = np.zeros(len(ids), bool)
        straddles = False
        for start, end in piece.spans:
            supervised |= (ends > start) & (ends <= end)
            straddles |= bool(((starts < start) & (ends > start)).any())
        labels = np.where(supervised, ids, np.int32(IGNORE))
        yield Encoded(ids, labels, straddles)


def _tokenize_apart(
    tokenizer: Any, piece: Segmented, options: dict[str, Any]
) -> Encoded:
    cuts = [0, *(cut for span in piece.spans or () for cut in span), len(piece.text)]
    ids: list[int] = []
    labels: list[int] = []
    for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if start == end:
            continue
        part = list(tokenizer(piece.text[start:end], **options)["input_ids"])
        ids += part
        labels += part if number % 2 else [IGNORE] * len(part)  # spans are odd
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32))


def given_tokens(
    row: dict[str, Any], where: str, *, all_supervised: bool, vocab_size: int
) -> Encoded:
    """Checks a row of `input_ids` and `labels` and takes it as it is.

    Args:
      row: the fields.
      where: the row's place, for messages.
      all_supervised: every token is its own label; `labels` is not read.
      vocab_size: ids must be below it.

    Raises:
      UserError: wrong types, ids out of range, lengths that differ, no labels.
    """

    def integers(name: str, low: int) -> np.ndarray:
        values = Fields(row, where)[name]
        if not isinstance(values, list) or not all(type(v) is int for v in values):
            raise UserError(f"{where}: `{name}` must be a list of integers.")
        for position, value in enumerate(values):
            if not (low <= value < vocab_size) or IGNORE < value < 0:
                allowed = f"0..{vocab_size - 1}" + (", or -100" if low < 0 else "")
                raise UserError(
                    f"{where}: `{name}`[{position}] is {value}; expected {allowed} "
                    f"(the model has `vocab_size` = {vocab_size})."
                )
        return np.array(values, np.int32)

    ids = integers("input_ids", 0)
    if all_supervised:
        return Encoded(ids, ids)
    if "labels" not in row:
        raise UserError(
            f"{where}: no field `labels`; the row has {fields_of(row)}. Give one label "
            "for each token (-100 = not supervised), or set `data.train_on` to 'all'."
        )
    labels = integers("labels", IGNORE)
    if len(ids) != len(labels):
        raise UserError(
            f"{where}: `input_ids` has {len(ids)} entries and `labels` {len(labels)}; "
            "they must be aligned one to one (labels are not shifted)."
        )
    return Encoded(ids, labels)


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
