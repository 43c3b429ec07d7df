"""From a file of rows to token and label arrays.

The one idea: every text format becomes one string and the character spans of it that
are supervised (`segments` labels the tokens, `chat` marks the spans of a conversation),
and nothing that happens to a row after that goes uncounted.

`packing` puts examples side by side, `batches` makes batches.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int32, Int64

from qlora_jax.config import IGNORE
from qlora_jax.data.chat import ChatRenderer, to_messages
from qlora_jax.data.packing import pack
from qlora_jax.data.rows import Row, check_template, read_rows, text_of
from qlora_jax.data.segments import (
    Encoded,
    Segmented,
    given_tokens,
    text_prefix,
    tokenize,
)
from qlora_jax.errors import UserError

Format = Literal["text", "prompt_completion", "messages", "tokens"]
TrainOn = Literal["all", "completion", "assistant"]

# The supervised parts each format knows; the first is its natural choice.
_TRAIN_ON: dict[str, tuple[str | None, ...]] = {
    "text": ("all",),
    "prompt_completion": ("completion", "all"),
    "messages": ("assistant", "all"),
    "tokens": (None, "all"),
}
# The templates each format reads.
_TEMPLATES = {"text": ("text",), "prompt_completion": ("prompt", "completion")}
# Rows tokenized at a time: enough to keep a fast tokenizer's threads busy.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and how rows become examples (`[data]` of a run's config).

    Raises:
      UserError: a value is out of range, or two fields contradict each other.
    """

    path: str
    """The data file: JSONL (one object a line), JSON (a list of objects) or, for
    format `text`, any UTF-8 text file, which is then one document."""
    format: Format = "text"
    """How rows are read. `text`: one document a row. `prompt_completion`: a question
    and its answer. `messages`: a conversation (ShareGPT `conversations` too).
    `tokens`: rows of `input_ids` and `labels`."""
    max_length: int = 1024
    """Longest example, and length of a packed row (tokens)."""
    packing: bool = False
    """Put several examples in one row of `max_length` tokens; none attends to another.
    """
    shuffle: bool = True
    """Visit the rows in a new order every epoch."""
    seed: int = 0
    """Seed of the order (an integer from 0 to 2**64 - 1)."""
    train_on: TrainOn | None = None
    """Which tokens are supervised. Default: the completion of `prompt_completion`, the
    assistant's turns of `messages`, all of `text`, the labels given with `tokens`."""
    prompt: str | None = None
    """Prompt of `prompt_completion` as a Python format string over the row's fields,
    e.g. "Q: {question} A: " (in a shell, a line break is $'{question}\\n'). Default:
    the field `prompt`."""
    completion: str | None = None
    """Completion of `prompt_completion` as a format string, e.g. "{answer}". Default:
    the field `completion`."""
    text: str | None = None
    """Document of `text` as a format string, e.g. "{title}\\n\\n{body}". Default: the
    field `text`."""
    chat_template: str | None = None
    """Path of a Jinja chat template for `messages`. Default: the tokenizer's own."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What to do with an example of more than `max_length` tokens: keep its beginning,
    or drop it. Truncating never shortens plain text files or packed `text`: those are
    cut into consecutive windows of `max_length` tokens."""
    append_eos: bool = True
    """End `text` and `prompt_completion` examples with the tokenizer's EOS, supervised.
    Chat templates write their own end of turn, `tokens` are taken as they are."""

    def __post_init__(self):
        """Refuses values that no run could use."""
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"`data.path` must name a file, got {self.path!r}.")
        for name, choices in (
            ("format", get_args(Format)),
            ("too_long", ("truncate", "drop")),
            ("train_on", (None, *get_args(TrainOn))),
            ("packing", (False, True)),
            ("shuffle", (False, True)),
            ("append_eos", (False, True)),
        ):
            value = getattr(self, name)
            if not any(value is c or (value == c and type(c) is str) for c in choices):
                known = ", ".join(repr(c) for c in choices)
                raise UserError(f"`data.{name}` must be one of {known}, got {value!r}.")
        for name, low, high in (("max_length", 2, 2**31 - 1), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UserError(
                    f"`data.{name}` must be an integer from {low} to {high}, "
                    f"got {value!r}."
                )
        if self.train_on is not None and self.train_on not in _TRAIN_ON[self.format]:
            known = ", ".join(repr(c) for c in _TRAIN_ON[self.format] if c)
            raise UserError(
                f"`data.train_on` = {self.train_on!r} means nothing for format="
                f"{self.format!r}; use {known}, or leave it out."
            )
        for name in ("text", "prompt", "completion"):
            template = getattr(self, name)
            if template is None:
                continue
            if name not in _TEMPLATES.get(self.format, ()):
                reader = "text" if name == "text" else "prompt_completion"
                raise UserError(
                    f"`data.{name}` is read by format={reader!r} only, and the format "
                    f"is {self.format!r}. Leave one of them out or change the other."
                )
            check_template(name, template)
        if self.chat_template is not None and self.format != "messages":
            raise UserError(
                "`data.chat_template` is read by format='messages' only, and the "
                f"format is {self.format!r}."
            )

    @property
    def supervised(self) -> str | None:
        """`train_on` with the format's natural choice filled in (None: as given)."""
        return self.train_on or _TRAIN_ON[self.format][0]


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the rows; all figures after truncation unless said otherwise."""

    rows_read: int
    """Rows in the file."""
    rows_kept: int
    """Rows that gave at least one example."""
    examples: int
    """Examples (more than `rows_kept` when documents were cut into windows)."""
    dropped: dict[str, int]
    """Rows (of cut documents: windows) left out, by reason."""
    truncated: int
    """Rows that lost their end, and are kept."""
    tokens_lost: int
    """Tokens those rows lost."""
    documents_cut: int
    """Documents cut into windows of `max_length` tokens (they lose nothing)."""
    tokens: int
    """Tokens in all examples, without padding."""
    supervised_tokens: int
    """Tokens whose prediction is trained. The first of an example never is one."""
    supervised_eos: int
    """Supervised tokens that are the tokenizer's EOS; 0 teaches no model to stop."""
    longest_row: int
    """Longest row in the file, before any cut (tokens)."""
    longest_example: int
    """Longest example (tokens)."""
    straddling_rows: int
    """Rows in which a token holds both prompt and answer characters. Such a token is
    supervised; ending the prompt with a newline, or moving its last space to the start
    of the completion, avoids it."""
    packed_rows: int | None
    """Rows after packing; None without packing."""
    packing_efficiency: float | None
    """Share of the packed rows that is not padding; None without packing."""
    fingerprint: str
    """Hash of tokens, labels and the settings that change content or order. Equal
    fingerprints give equal batches, wherever the file lies."""

    def summary(self) -> str:
        """One paragraph for people."""
        parts = [
            f"{self.rows_kept:,} of {self.rows_read:,} rows kept, "
            f"{self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised "
            f"({self.supervised_tokens / self.tokens:.1%}); "
            f"longest row {self.longest_row:,} tokens"
        ]
        for reason, count in self.dropped.items():
            parts.append(f"dropped {count:,}: {reason}")
        if self.truncated:
            parts.append(
                f"{self.truncated:,} rows truncated ({self.tokens_lost:,} tokens lost)"
            )
        if self.documents_cut:
            parts.append(f"{self.documents_cut:,} documents cut into windows")
        if self.straddling_rows:
            parts.append(
                f"{self.straddling_rows:,} rows have a token across the start of the "
                "answer"
            )
        if self.packing_efficiency is not None:
            parts.append(
                f"packed into {self.packed_rows:,} rows, "
                f"{self.packing_efficiency:.1%} full"
            )
        return "; ".join(parts) + "."


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token and label arrays of all examples, one after the other.

    Attributes:
      tokens: int32 [N], token ids.
      labels: int32 [N], aligned with `tokens` (not shifted); `IGNORE` where nothing is
        supervised, and at the first position of every example, which no position of
        the same example predicts.
      offsets: int64 [examples + 1]; example `i` is `offsets[i] : offsets[i + 1]`.
      report: what was read, kept and dropped.
    """

    tokens: Int32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " examples_plus_1"]
    report: DataReport

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.offsets) - 1

    def __getitem__(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
        """Tokens and labels of one example (views)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.labels[span]

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """int64 [examples], tokens in each example."""
        return np.diff(self.offsets)


def load_examples(
    config: DataConfig,
    tokenizer: Any,
    *,
    vocab_size: int,
    progress: bool = False,
) -> Examples:
    """Reads, tokenizes and labels a data file.

    Begins an example with what the tokenizer puts before a text (BOS), unless the text
    brings it along already; chat templates write their own and get no second one.

    Args:
      config: the file and how to read it.
      tokenizer: a `transformers` tokenizer (unused by format `tokens`).
      vocab_size: rows of the model's embedding table.
      progress: draw a progress bar on stderr.

    Returns:
      The examples, in the file's order.

    Raises:
      UserError: a row cannot be used (the message names file and line), nothing is
        left to train on, or a token id is not below `vocab_size`.
    """
    rows, plain = read_rows(Path(config.path), plain_text=config.format == "text")
    if plain and config.text is not None:
        raise UserError(
            f"`data.text` is a template over a row's fields, but {config.path} is "
            "plain text without fields. Leave `data.text` out."
        )
    collector = _Collector(config, vocab_size, cut=plain or config.packing)
    encode = _encoder(config, tokenizer, vocab_size)
    for start in _progress(range(0, len(rows), _CHUNK), len(rows), progress):
        chunk = rows[start : start + _CHUNK]
        for (where, _), encoded in zip(chunk, encode(chunk), strict=True):
            collector.add(where, encoded)
    return collector.finish(len(rows), getattr(tokenizer, "eos_token_id", None))


# --- rows to examples ---


def _segmenter(
    config: DataConfig, tokenizer: Any
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
    chat = ChatRenderer(tokenizer, config.chat_template)

    def messages(where: str, row: dict[str, Any]) -> Segmented | str:
        turns = to_messages(row, where)
        tools = row.get("tools") or None
        if config.supervised == "all":
            return Segmented(chat.text(turns, tools=tools, where=where))
        whole, spans = chat.spans(turns, tools=tools, where=where)
        return Segmented(whole, spans) if spans else "no assistant turn"

    return messages


def _encoder(
    config: DataConfig, tokenizer: Any, vocab_size: int
) -> Callable[[list[Row]], list[Encoded | str]]:
    """The function rows -> one `Encoded`, or the reason to drop it, for each."""
    if config.format == "tokens":
        all_supervised = config.supervised == "all"
        return lambda rows: [
            given_tokens(
                row, where, all_supervised=all_supervised, vocab_size=vocab_size
            )
            for where, row in rows
        ]
    if tokenizer is None:
        raise UserError(
            f"format={config.format!r} needs a tokenizer and the model came without "
            "one. Put the tokenizer's files beside the model, or use format='tokens'."
        )
    segment = _segmenter(config, tokenizer)
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

    def encode(rows: list[Row]) -> list[Encoded | str]:
        pieces = [_encodable(segment(where, row), where) for where, row in rows]
        texts = [piece for piece in pieces if isinstance(piece, Segmented)]
        encoded = tokenize(tokenizer, texts)
        return [
            piece if isinstance(piece, str) else complete(next(encoded))
            for piece in pieces
        ]

    def complete(bare: Encoded) -> Encoded:
        ids = bare.tokens
        before = prefix if ids[: len(prefix)].tolist() != prefix else []
        after = suffix if ids[-1:].tolist() != suffix else []
        tokens = np.concatenate([before, ids, after])
        labels = np.concatenate([[IGNORE] * len(before), bare.labels, after])
        return Encoded(tokens.astype(np.int32), labels.astype(np.int32), bare.straddles)

    return encode


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


class _Collector:
    """Fits encoded rows to `max_length`, counts, and builds the `Examples`."""

    def __init__(self, config: DataConfig, vocab_size: int, cut: bool):
        self._vocab_size = vocab_size
        self._config = config
        self._cut = cut and config.format == "text"
        self._dropped: Counter[str] = Counter()
        self._examples: list[tuple[np.ndarray, np.ndarray]] = []
        self._rows_kept = self._truncated = self._tokens_lost = 0
        self._documents_cut = self._straddling = self._longest = 0

    def add(self, where: str, encoded: Encoded | str) -> None:
        if isinstance(encoded, str):
            self._dropped[encoded] += 1
            return
        tokens, labels = encoded.tokens, encoded.labels
        if not len(tokens):
            self._dropped["no tokens"] += 1
            return
        largest = int(tokens.max())
        if largest >= self._vocab_size:
            raise UserError(
                f"{where}: the tokenizer gives token id {largest}, but the model has "
                f"`vocab_size` = {self._vocab_size}. Is this the model's own "
                "tokenizer? If tokens were added to it, the embeddings must be resized "
                "first."
            )
        self._longest = max(self._longest, len(tokens))
        limit = self._config.max_length
        lost = 0
        if len(tokens) <= limit:
            pieces = [slice(0, len(tokens))]
        elif self._config.too_long == "drop":
            self._dropped[f"longer than max_length={limit}"] += 1
            return
        elif self._cut:
            pieces = list(_windows(len(tokens), limit))
            self._documents_cut += 1
        else:
            pieces, lost = [slice(0, limit)], len(tokens) - limit
        kept = 0
        for piece in pieces:
            label = labels[piece].copy()
            label[0] = IGNORE  # nothing in the example comes before it
            if (label != IGNORE).any():
                self._examples.append((tokens[piece], label))
                kept += 1
            elif lost and (labels[1:] != IGNORE).any():
                self._dropped["every supervised token truncated"] += 1
            else:
                self._dropped["nothing to supervise"] += 1
        if kept:
            self._rows_kept += 1
            self._truncated += bool(lost)
            self._tokens_lost += lost
            self._straddling += encoded.straddles

    def finish(self, rows_read: int, eos: int | None) -> Examples:
        config = self._config
        if not self._examples:
            reasons = ", ".join(f"{n} {why}" for why, n in self._dropped.items())
            raise UserError(
                f"{config.path}: no row is left to train on: {rows_read} read, "
                f"dropped: {reasons} (`data.max_length` = {config.max_length}, "
                f"longest row {self._longest} tokens). Check `data.max_length`, "
                "`data.train_on` and the labels."
            )
        tokens = np.concatenate([t for t, _ in self._examples])
        labels = np.concatenate([lb for _, lb in self._examples])
        offsets = np.zeros(len(self._examples) + 1, np.int64)
        np.cumsum([len(t) for t, _ in self._examples], out=offsets[1:])
        lengths = np.diff(offsets)
        packed = len(pack(lengths, config.max_length)) if config.packing else None
        supervised = labels != IGNORE
        report = DataReport(
            rows_read=rows_read,
            rows_kept=self._rows_kept,
            examples=len(lengths),
            dropped=dict(self._dropped),
            truncated=self._truncated,
            tokens_lost=self._tokens_lost,
            documents_cut=self._documents_cut,
            tokens=len(tokens),
            supervised_tokens=int(supervised.sum()),
            supervised_eos=0 if eos is None else int((labels == eos).sum()),
            longest_row=self._longest,
            longest_example=int(lengths.max()),
            straddling_rows=self._straddling,
            packed_rows=packed,
            packing_efficiency=(
                len(tokens) / (packed * config.max_length) if packed else None
            ),
            fingerprint=_fingerprint(config, tokens, labels, offsets),
        )
        return Examples(tokens=tokens, labels=labels, offsets=offsets, report=report)


def _windows(length: int, limit: int) -> Iterator[slice]:
    """Consecutive windows of `limit` tokens that cover `length`.

    A last window of one token could predict nothing, so it takes a second one from the
    window before it where that leaves both something to predict.
    """
    cuts = list(range(0, length, limit)) + [length]
    if length % limit == 1 and limit > 2:
        cuts[-2] -= 1
    for start, end in zip(cuts, cuts[1:], strict=False):
        yield slice(start, end)


def _fingerprint(config: DataConfig, *arrays: np.ndarray) -> str:
    settings = dataclasses.asdict(config) | {"train_on": config.supervised}
    # What these two point at is in the tokens; how they are spelled changes nothing.
    del settings["path"], settings["chat_template"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(str(len(array)).encode() + b":")
        digest.update(np.ascontiguousarray(little).tobytes())
    return digest.hexdigest()


def _progress(steps: range, rows: int, show: bool) -> Iterator[int]:
    """Yields `steps`, drawing a bar over `rows` on stderr if asked."""
    if not show:
        yield from steps
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=rows)
        for step in steps:
            yield step
            bar.update(task, completed=min(step + _CHUNK, rows))
