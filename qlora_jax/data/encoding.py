"""Encodes rows as tokens and labels.

Every format but `tokens` becomes one string with supervised character spans. The string
is tokenized once, and a token is supervised if any of its characters is inside a span,
as in the masks of transformers. So no label boundary is searched for among the tokens,
and the tokens are those of the complete string as a model reads it, not of concatenated
pieces.

A token that straddles the edge of a span (prompt `"a "` and completion `"b"` may share
the token `" b"`) holds supervised characters and is supervised: masking it would leave
the first or last characters of the answer untrained. Rows with such tokens are counted.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.conversations import is_trained, to_messages, tools_of
from qlora_jax.data.rows import Fields, Row, fields_of, text_of
from qlora_jax.errors import Problems, UserError

_LABEL_MASKS = ("completion_mask", "assistant_masks")

IGNORE = -100
"""The label of a token that is not supervised, as in Hugging Face."""


@dataclasses.dataclass(frozen=True)
class Segmented:
    """A string and its supervised character spans; None supervises all of it."""

    text: str
    spans: list[tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens and aligned labels of one string; `IGNORE` where nothing is supervised."""

    tokens: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]
    straddles: bool = False
    """Whether a token holds characters on both sides of an edge of a span."""


def text_prefix(tokenizer: Any) -> list[int]:
    """Returns the ids that a tokenizer puts before a string (BOS, or none)."""
    ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    # What precedes the letter's own ids where special tokens are added is the prefix.
    for start in range(len(ids) - len(bare) + 1):
        if bare and ids[start : start + len(bare)] == bare:
            return [int(i) for i in ids[:start]]
    bos = getattr(tokenizer, "bos_token_id", None)
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []


def tokenize(tokenizer: Any, pieces: list[Segmented]) -> Iterator[Encoded]:
    """Yields the tokens and labels of each string, without special tokens around it.

    A slow tokenizer has no character offsets and tokenizes each segment separately, so
    that boundaries stay exact; the tokens next to a boundary may then differ from those
    of the complete string.
    """
    if not pieces:
        return
    marked = any(piece.spans is not None for piece in pieces)
    options = dict(
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about long rows: they are cut or dropped later
    )
    if marked and not getattr(tokenizer, "is_fast", False):
        for piece in pieces:
            yield _tokenize_segments(tokenizer, piece, options)
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
            # Half-open intervals overlap if each begins before the other ends. An empty
            # token has no character.
            inside = (starts < end) & (ends > start) & (starts < ends)
            supervised |= inside
            straddles |= bool((inside & ((starts < start) | (ends > end))).any())
        labels = np.where(supervised, ids, np.int32(IGNORE))
        yield Encoded(ids, labels, straddles)


def _tokenize_segments(
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
        # The cuts alternate: segments of even number are outside every span.
        labels += part if number % 2 else [IGNORE] * len(part)
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32))


def encode_token_row(
    row: dict[str, Any], where: str, *, all_supervised: bool, vocab_size: int
) -> Encoded:
    """Checks a row of `input_ids` and `labels` and returns it without its padding.

    `completion_mask` and `assistant_masks` (1 = supervised) restrict the labels, or
    make them where there are none. `attention_mask` marks padding at either end.
    `position_ids` must count from 0.

    Args:
      row: the fields.
      where: location of the row, for messages.
      all_supervised: every token is its own label; `labels` is not read.
      vocab_size: ids must be below it.

    Raises:
      UserError: wrong types, ids out of range, lengths that differ, missing labels,
        padding between tokens, positions that do not count from 0.
    """

    def integers(name: str, low: int, high: int | None = None) -> np.ndarray:
        values = Fields(row, where)[name]
        limit = vocab_size if high is None else high
        if not isinstance(values, list) or not all(type(v) is int for v in values):
            raise UserError(f"{where}: `{name}` must be a list of integers.")
        for position, value in enumerate(values):
            if not (low <= value < limit) or IGNORE < value < 0:
                allowed = f"0..{limit - 1}" + (", or -100" if low < 0 else "")
                model = f" (the model has `vocab_size` = {vocab_size})"
                raise UserError(
                    f"{where}: `{name}`[{position}] is {value}; expected {allowed}"
                    f"{model if high is None else ''}."
                )
        return np.array(values, np.int32)

    def aligned(name: str, low: int, high: int | None = None) -> np.ndarray:
        values = integers(name, low, high)
        if len(ids) != len(values):
            raise UserError(
                f"{where}: `input_ids` has {len(ids)} entries and `{name}` "
                f"{len(values)}; they must be aligned one to one (labels are not "
                "shifted)."
            )
        return values

    ids = integers("input_ids", 0)
    masks = [name for name in _LABEL_MASKS if row.get(name) is not None]
    if all_supervised:
        labels = ids
    elif row.get("labels") is not None:
        labels = aligned("labels", IGNORE)
    elif masks:
        labels = ids
    else:
        raise UserError(
            f"{where}: no field `labels`; the row has {fields_of(row)}. Give one label "
            "for each token (-100 = not supervised), or set `data.train_on` to 'all'."
        )
    for name in () if all_supervised else masks:
        labels = np.where(aligned(name, 0, 2) == 1, labels, np.int32(IGNORE))
    kept = slice(None)
    if row.get("attention_mask") is not None:
        real = np.flatnonzero(aligned("attention_mask", 0, 2))
        kept = slice(real[0], real[-1] + 1) if len(real) else slice(0)
        if len(real) != len(ids[kept]):
            raise UserError(
                f"{where}: `attention_mask` has zeros between ones; padding is "
                "expected at the ends. Remove the tokens, or label them -100."
            )
    if row.get("position_ids") is not None:
        positions = aligned("position_ids", 0, 2**31)[kept]
        if not np.array_equal(positions, np.arange(len(positions))):
            raise UserError(
                f"{where}: `position_ids` must count 0, 1, 2, ... in a row. Split "
                "packed rows into one a document; `data.packing` packs them again."
            )
    return Encoded(ids[kept], labels[kept])


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes the rows of one source; `make_encoder` creates it.

    Attributes:
      encode: returns for each row its tokens and labels, the reason to drop it, or None
        if it was added to the problems.
      assistant_mask: `DataReport.assistant_mask`.
    """

    encode: Callable[[list[Row]], list[Encoded | str | None]]
    assistant_mask: str | None


def make_encoder(
    config: DataConfig, tokenizer: Any, *, vocab_size: int, problems: Problems
) -> Encoder:
    """Creates the encoder of a source.

    Args:
      config: the source and how to read it.
      tokenizer: a `transformers` tokenizer; None for format `tokens`.
      vocab_size: ids must be below it.
      problems: collects rows that cannot be encoded.

    Raises:
      UserError: the format needs a tokenizer, chat template or EOS and there is none.
    """
    if config.format == "tokens":
        return Encoder(_token_row_encode(config, vocab_size, problems), None)
    if tokenizer is None:
        raise UserError(
            f"format={config.format!r} needs a tokenizer and the model came without "
            "one. Put the tokenizer's files into the model's directory, or use "
            "format='tokens'."
        )
    chat = mask = None
    prefix: list[int] = []
    suffix: list[int] = []
    if config.format == "messages":  # templates write BOS and end of turn themselves
        chat = ChatRenderer(tokenizer, config.chat_template)
        if config.supervised == "assistant":
            mask = "template" if chat.has_marks else "renderer"
    else:
        prefix = text_prefix(tokenizer)
        suffix = _eos(tokenizer) if config.append_eos else []
    segment = _row_segmenter(config, chat)

    def segment_row(where: str, row: dict[str, Any]) -> Segmented | str | None:
        try:
            segmented = segment(where, row)
            if isinstance(segmented, Segmented):
                _check_encodable(segmented.text, where)
            return segmented
        except UserError as error:
            problems.add(error)
            return None

    def encode(rows: list[Row]) -> list[Encoded | str | None]:
        segmented = [segment_row(where, row) for where, row in rows]
        texts = [text for text in segmented if isinstance(text, Segmented)]
        encoded = tokenize(tokenizer, texts)
        return [
            _enclose(next(encoded), prefix, suffix)
            if isinstance(text, Segmented)
            else text
            for text in segmented
        ]

    return Encoder(encode, mask)


def _token_row_encode(
    config: DataConfig, vocab_size: int, problems: Problems
) -> Callable[[list[Row]], list[Encoded | str | None]]:
    all_supervised = config.supervised == "all"

    def encode_row(where: str, row: dict[str, Any]) -> Encoded | None:
        try:
            return encode_token_row(
                row, where, all_supervised=all_supervised, vocab_size=vocab_size
            )
        except UserError as error:
            problems.add(error)
            return None

    return lambda rows: [encode_row(where, row) for where, row in rows]


def _row_segmenter(
    config: DataConfig, chat: ChatRenderer | None
) -> Callable[[str, dict[str, Any]], Segmented | str]:
    """Returns the function (location, row) -> `Segmented` or the reason to drop it."""
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
            text = prompt + completion
            if config.supervised == "all":
                return Segmented(text)
            return Segmented(text, [(len(prompt), len(text))])

        return prompt_completion
    assert chat is not None

    def messages(where: str, row: dict[str, Any]) -> Segmented | str:
        turns = to_messages(row, where)
        tools = tools_of(row, where)
        if config.supervised == "all":
            if not all(map(is_trained, turns)):
                raise UserError(
                    f"{where}: a turn is not to be trained (`train`, `weight`, ...), "
                    "and `data.train_on` = 'all' trains every turn. Use 'assistant', "
                    "or leave out the flag."
                )
            return Segmented(chat.text(turns, tools=tools, where=where))
        text, spans = chat.spans(turns, tools=tools, where=where)
        if spans:
            return Segmented(text, spans)
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if not answers:
            return "no assistant turn"
        if not any(map(is_trained, answers)):
            return "no assistant turn that is to be trained"
        return "assistant turns that the chat template does not mark"

    return messages


def _check_encodable(text: str, where: str) -> None:
    """Raises for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of the text is half of a surrogate pair "
            f"({ascii(error.object[error.start])}), which is not valid Unicode. Repair "
            "or remove it."
        ) from error


def _eos(tokenizer: Any) -> list[int]:
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise UserError(
            "`data.append_eos` is true and this tokenizer has no EOS token. Set its "
            "`eos_token`, or set `data.append_eos` to false."
        )
    return [int(eos)]


def _enclose(encoded: Encoded, prefix: list[int], suffix: list[int]) -> Encoded:
    """Adds BOS and EOS unless the string already has them; EOS is supervised."""
    ids = encoded.tokens
    # A row, or a format string of the user, may have them already.
    before = prefix if ids[: len(prefix)].tolist() != prefix else []
    after = suffix if ids[-1:].tolist() != suffix else []
    tokens = np.concatenate([before, ids, after]).astype(np.int32)
    labels = np.concatenate([[IGNORE] * len(before), encoded.labels, after])
    return Encoded(tokens, labels.astype(np.int32), encoded.straddles)
