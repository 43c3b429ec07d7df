"""Encodes rows as tokens and labels.

Every format but `tokens` becomes one string with supervised character spans. The string
is tokenized once, and a token is supervised if any of its characters is inside a span,
as in the masks of transformers. So no label boundary is searched for among the tokens,
and the tokens are those of the complete string as a model reads it, not of concatenated
pieces.

A token that straddles the edge of a span (prompt `"a "` and completion `"b"` may share
the token `" b"`) holds supervised characters and is supervised: masking it would leave
the first or last characters of the answer untrained. Rows with such tokens are counted.
White space that an added token takes with it (`rstrip`, as Phi-3's) is not counted to
the token, which is on one side of the edge by what it says.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.config import DataConfig
from qlora_jax.data.rows import Fields, Reading, Row, fields_of
from qlora_jax.data.segments import Segmented, Segmenter
from qlora_jax.data.unknown import UNKNOWN, UnknownText
from qlora_jax.errors import UserError, did_you_mean

_T = TypeVar("_T")
# Names and characters that are counted.
_MAX_COUNTED = 100
_LABEL_MASKS = ("completion_mask", "assistant_masks")
# Of rows that are packed already: what tells their documents apart.
_PACKED = ("seq_lengths", "segment_ids", "sequence_ids", "document_ids")
ENCLOSED_TWICE = "texts with white space outside of their BOS or EOS, which get another"
"""A remark on texts."""
OTHER_LABELS = "rows whose labels are not their tokens"
"""A remark on rows of tokens."""

IGNORE = -100
"""The label of a token that is not supervised, as in Hugging Face."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens and aligned labels of one string; `IGNORE` where nothing is supervised."""

    tokens: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]
    straddles: bool = False
    """Whether a token holds characters on both sides of an edge of a span."""
    remarks: Counter[str] = dataclasses.field(default_factory=Counter)
    """As those of `Segmented`."""


def text_prefix(tokenizer: Any) -> list[int]:
    """Returns the ids that a tokenizer puts before a string (BOS, or none)."""
    text = "a"
    try:
        _call(tokenizer, text)
    except UserError:  # it knows words alone
        text = ""
    ids = list(_call(tokenizer, text, add_special_tokens=True)["input_ids"])
    bare = list(_call(tokenizer, text, add_special_tokens=False)["input_ids"])
    # What precedes the letter's own ids where special tokens are added is the prefix.
    for start in range(len(ids) - len(bare) + 1):
        if bare and ids[start : start + len(bare)] == bare:
            return [int(i) for i in ids[:start]]
    bos = getattr(tokenizer, "bos_token_id", None)
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text that is to be continued, as training has them.

    They begin with what the tokenizer puts before a string (BOS), once, and end where
    the text ends, also with a tokenizer that adds EOS.

    Raises:
      UserError: the text is not valid Unicode.
    """
    check_encodable(text, "the prompt")
    (encoded,) = tokenize(tokenizer, [Segmented(text)])
    prefix = text_prefix(tokenizer)
    return _enclose(encoded, prefix, [], supervised=False).tokens.tolist()


def with_eos(tokenizer: Any, eos_token: str | None) -> Any:
    """Returns a tokenizer with this EOS token; None leaves it as it is.

    Args:
      tokenizer: a `transformers` tokenizer, which is not changed.
      eos_token: a token of its vocabulary.

    Raises:
      UserError: there is no such token, or no tokenizer.
    """
    if eos_token is None or getattr(tokenizer, "eos_token", None) == eos_token:
        return tokenizer
    if tokenizer is None:
        raise UserError(
            "`data.eos_token` is given and the model came without a tokenizer. Leave "
            "it out; the rows of format='tokens' say what ends them."
        )
    if eos_token not in tokenizer.get_vocab():
        known = map(str, tokenizer.added_tokens_decoder.values())
        raise UserError(
            f"`data.eos_token` = {eos_token!r} is not a token of this tokenizer."
            f"{did_you_mean(eos_token, known)} `qlora-jax tokens --add` writes a base "
            "that has it."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = eos_token
    return tokenizer


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
    texts = [piece.text for piece in pieces]
    encoding = _call(tokenizer, texts, return_offsets_mapping=marked, **options)
    absorbing = [
        int(i)
        for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if (token.lstrip or token.rstrip) and str(token).strip()
    ]
    for number, piece in enumerate(pieces):
        ids = np.array(encoding["input_ids"][number], np.int32)
        if piece.spans is None:
            yield Encoded(ids, ids)
            continue
        spans = np.array(encoding["offset_mapping"][number], np.int64).reshape(-1, 2)
        starts, ends = spans[:, 0], spans[:, 1].copy()
        starts = _with_spaces(piece.text, starts, ends)
        for at in np.flatnonzero(np.isin(ids, absorbing)) if absorbing else ():
            # The white space that it takes with it is not part of what it says.
            taken = piece.text[starts[at] : ends[at]]
            starts[at] += len(taken) - len(taken.lstrip())
            ends[at] -= len(taken) - len(taken.rstrip())
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


def _with_spaces(text: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns where tokens begin, with the white space before them.

    Offsets may leave it out (`trim_offsets`). Other characters that no token has were
    joined to the one before by a normalizer, or dropped.
    """
    reached = np.maximum.accumulate(np.append(0, ends))[:-1]
    gaps = reached < starts
    if gaps.any():
        solid = np.array([not c.isspace() for c in text], np.int64)
        # The place after the last character before each that is no white space.
        after = np.maximum.accumulate(np.append(0, solid * np.arange(1, len(text) + 1)))
        reached = np.where(gaps, np.maximum(reached, after[starts]), reached)
    return np.minimum(starts, reached)


def _call(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """Calls a tokenizer.

    Raises:
      UserError: it has no token for a part of the text, and none for what it does not
        know.
    """
    try:
        return tokenizer(text, **options)
    except Exception as error:  # of a class of its own only in some versions
        raise UserError(
            f"the tokenizer cannot encode the text: {error}. It may have no token for "
            "what it does not know (`unk_token`)."
        ) from error


def _tokenize_segments(
    tokenizer: Any, piece: Segmented, options: dict[str, Any]
) -> Encoded:
    cuts = [0, *(cut for span in piece.spans or () for cut in span), len(piece.text)]
    ids: list[int] = []
    labels: list[int] = []
    for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if start == end:
            continue
        part = list(_call(tokenizer, piece.text[start:end], **options)["input_ids"])
        ids += part
        # The cuts alternate: segments of even number are outside every span.
        labels += part if number % 2 else [IGNORE] * len(part)
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32))


def encode_token_row(
    row: dict[str, Any],
    where: str,
    reading: Reading | None = None,
    *,
    all_supervised: bool,
    vocab_size: int,
) -> Encoded:
    """Checks a row of `input_ids` and `labels` and returns it without its padding.

    `completion_mask` and `assistant_masks` (1 = supervised) restrict the labels, or
    make them where there are none. `attention_mask` marks padding at either end.
    `position_ids` must count from 0, and fields of rows that are packed already
    (`seq_lengths`, `segment_ids`, ...) may name one document.

    Args:
      row: the fields.
      where: location of the row, for messages.
      reading: gets the names of the fields that are read.
      all_supervised: every token is its own label; `labels` is not read.
      vocab_size: ids must be below it.

    Raises:
      UserError: wrong types, ids out of range, lengths that differ, missing labels,
        padding between tokens, positions that do not count from 0, several documents.
    """
    read = None if reading is None else reading.fields

    def integers(name: str, low: int, high: int | None = None) -> np.ndarray:
        values = Fields(row, where, read)[name]
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
    for name in _PACKED:
        values = row.get(name)
        # Lengths are one a document; ids are one a token.
        if not isinstance(values, list):
            continue
        parts = values if name == "seq_lengths" else set(map(str, values))
        if len(parts) > 1:
            raise UserError(
                f"{where}: `{name}` says that the row holds several documents, which "
                "would attend to each other. Split packed rows into one a document; "
                "`data.packing` packs them again."
            )
    ids, labels = ids[kept], labels[kept]
    remarks: Counter[str] = Counter()
    if ((labels != IGNORE) & (labels != ids)).any():
        remarks[OTHER_LABELS] = 1
    return Encoded(ids, labels, remarks=remarks)


class Encoder:
    """Encodes the rows of one source.

    Args:
      config: the source and how to read it.
      tokenizer: a `transformers` tokenizer; None for format `tokens`.
      vocab_size: ids must be below it.

    Attributes:
      recognised: phrases on what was recognised, and in how many rows.
      unread: fields that nothing reads, and how many rows have them.
      unknown: characters that the tokenizer does not know, likewise.

    Raises:
      UserError: the format needs a tokenizer, chat template or EOS and there is none.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, *, vocab_size: int):
        self.recognised: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._config, self._tokenizer = config, tokenizer
        self._vocab_size = vocab_size
        self._segmenter: Segmenter | None = None
        if config.format == "tokens":
            return
        if tokenizer is None:
            raise UserError(
                f"format={config.format!r} needs a tokenizer and the model came "
                "without one. Put the tokenizer's files into the model's directory, or "
                "use format='tokens'."
            )
        self._segmenter = Segmenter(config, tokenizer)
        self._unknown_text = UnknownText(tokenizer)
        # Chat templates write BOS and ends of turns themselves.
        encloses = config.format != "messages"
        self._prefix = text_prefix(tokenizer) if encloses else []
        self._suffix = _eos(tokenizer) if encloses and config.append_eos else []

    @property
    def assistant_mask(self) -> str | None:
        """How the assistant's text is located; `DataReport.assistant_mask`."""
        return self._segmenter and self._segmenter.assistant_mask

    def encode(self, rows: list[Row]) -> list[list[Encoded] | str | UserError]:
        """Returns each row's examples, the reason to drop it, or what is wrong."""
        if self._segmenter is None:
            return [self._read(self._encode_tokens, where, row) for where, row in rows]
        segmented = [self._read(self._segment, where, row) for where, row in rows]
        try:
            return self._encode_texts(segmented)
        except UserError:  # of one of the rows
            return [
                self._encode_row(where, examples)
                for (where, _), examples in zip(rows, segmented, strict=True)
            ]

    def _encode_texts(
        self, segmented: list[list[Segmented] | str | UserError]
    ) -> list[list[Encoded] | str | UserError]:
        pieces = [
            piece
            for examples in segmented
            if isinstance(examples, list)
            for piece in examples
        ]
        encoded = self._tokenize(pieces)
        return [
            self._finished(examples, [next(encoded) for _ in examples])
            if isinstance(examples, list)
            else examples
            for examples in segmented
        ]

    def _encode_row(
        self, where: str, examples: list[Segmented] | str | UserError
    ) -> list[Encoded] | str | UserError:
        try:
            return self._encode_texts([examples])[0]
        except UserError as error:
            return UserError(f"{where}: {error}")

    def _tokenize(self, pieces: list[Segmented]) -> Iterator[Encoded]:
        for piece, encoded in zip(
            pieces, tokenize(self._tokenizer, pieces), strict=True
        ):
            dropped = self._unknown_text.dropped(piece.text)
            if dropped and piece.spans is not None:
                # The character offsets of BPE do not count what it drops, so that the
                # labels would be those of the characters after.
                rest = self._unknown_text.without(piece, dropped)
                (again,) = tokenize(self._tokenizer, [rest])
                if np.array_equal(again.tokens, encoded.tokens):
                    encoded = again
            yield encoded

    def _finished(
        self, pieces: list[Segmented], encoded: list[Encoded]
    ) -> list[Encoded]:
        """Returns the examples of a row; counts what the tokenizer does not know."""
        unknown: set[str] = set()
        for piece, tokens in zip(pieces, encoded, strict=True):
            unknown |= self._unknown_text.dropped(piece.text)
            unknown |= self._unknown_text.replaced(piece.text, tokens.tokens)
        examples = list(map(self._enclosed, pieces, encoded))
        if unknown:
            examples[0].remarks[UNKNOWN] = 1
        for characters in sorted(unknown):
            _count(self.unknown, characters)
        return examples

    def _read(
        self,
        read: Callable[[str, dict[str, Any], Reading], _T],
        where: str,
        row: dict[str, Any] | UserError,
    ) -> _T | UserError:
        """Calls a function with a row and counts what it read; returns its error."""
        if isinstance(row, UserError):
            return row
        reading = Reading()
        try:
            value = read(where, row, reading)
        except UserError as error:
            return error
        self.recognised.update(sorted(reading.recognised))
        unread = [name for name in row if name not in reading.fields]
        for name in (*unread, *sorted(reading.nested)):
            _count(self.unread, name)
        return value

    def _segment(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        assert self._segmenter is not None
        segmented = self._segmenter.segment(where, row, reading)
        for piece in segmented if isinstance(segmented, list) else ():
            check_encodable(piece.text, where)
        return segmented

    def _encode_tokens(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Encoded]:
        encoded = encode_token_row(
            row,
            where,
            reading,
            all_supervised=self._config.supervised == "all",
            vocab_size=self._vocab_size,
        )
        return [encoded]

    def _enclosed(self, piece: Segmented, encoded: Encoded) -> Encoded:
        if piece.complete:
            return dataclasses.replace(encoded, remarks=piece.remarks)
        # What a text ends with is supervised or not; so is the EOS after it.
        open_end = piece.spans is None or piece.spans[-1][1] == len(piece.text)
        example = _enclose(encoded, self._prefix, self._suffix, supervised=open_end)
        if self._adds_another(piece.text, encoded.tokens):
            example.remarks[ENCLOSED_TWICE] = 1
        return example

    def _adds_another(self, text: str, tokens: Int32[np.ndarray, " T"]) -> bool:
        """Whether a text has BOS or EOS already, with white space outside of it."""
        bos, eos = (
            getattr(self._tokenizer, f"{name}_token", None) or ""
            for name in ("bos", "eos")
        )
        before, after = self._prefix, self._suffix
        return (
            bool(before and bos)
            and text.lstrip().startswith(bos)
            and tokens[: len(before)].tolist() != before
        ) or (
            bool(after and eos)
            and text.rstrip().endswith(eos)
            and tokens[-1:].tolist() != after
        )


def _count(counter: Counter[str], name: str) -> None:
    """Counts a name, of the first ones alone.

    Rows whose names are data (ids) would fill the memory with them.
    """
    if len(counter) < _MAX_COUNTED or name in counter:
        counter[name] += 1


def check_encodable(text: str, where: str) -> None:
    """Raises for half a surrogate pair, which JSON can hold and UTF-8 cannot.

    Python also has them for bytes of a command line or of stdin that are not UTF-8.

    Raises:
      UserError: begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of the text is half of a surrogate pair "
            f"({ascii(error.object[error.start])}), which is not valid Unicode. Repair "
            f"or remove it.{_hint_of_bytes(error.object[error.start])}"
        ) from error


def _hint_of_bytes(character: str) -> str:
    # Python's stand-ins for bytes of a command line that are not of its encoding.
    if not "\udc80" <= character <= "\udcff":
        return ""
    return " It may be a byte that is not UTF-8, or the locale is not: LC_ALL=C.UTF-8."


def _eos(tokenizer: Any) -> list[int]:
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise UserError(
            "`data.append_eos` is true and this tokenizer has no EOS token. Set its "
            "`eos_token`, or set `data.append_eos` to false."
        )
    return [int(eos)]


def _enclose(
    encoded: Encoded, prefix: list[int], suffix: list[int], *, supervised: bool
) -> Encoded:
    """Adds BOS and EOS, supervised or not, unless the string already has them."""
    ids = encoded.tokens
    # A row, or a format string of the user, may have them already.
    before = prefix if ids[: len(prefix)].tolist() != prefix else []
    after = suffix if ids[-1:].tolist() != suffix else []
    tokens = np.concatenate([before, ids, after]).astype(np.int32)
    ending = after if supervised else [IGNORE] * len(after)
    labels = np.concatenate([[IGNORE] * len(before), encoded.labels, ending])
    return Encoded(tokens, labels.astype(np.int32), encoded.straddles)
