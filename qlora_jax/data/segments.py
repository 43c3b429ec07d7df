"""Text with supervised character spans, and the tokens and labels it gives.

The one idea: the whole text is tokenized once, and a token is supervised if its last
character lies in a supervised span. So a label boundary is never found by searching
tokens, and the tokens are those of the text as a model reads it, not of glued-together
pieces.

A token that straddles the start of a span (prompt `"a "` and completion `"b"` may share
the token `" b"`) holds supervised characters and is supervised: leaving it out would
leave the first characters of the answer unlearned. Such texts are counted.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.rows import Fields, fields_of
from qlora_jax.errors import UserError

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
