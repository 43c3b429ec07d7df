"""The `[data]` section of a run: what to train on, and how rows become examples.

`DataConfig` is one source or, with `sources`, a mixture; `parts` returns the settings
that each source is read with. All problems with the settings are raised at once.
"""

import dataclasses
import datetime
import math
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from qlora_jax.errors import Problems, UserError
from qlora_jax.reading import expand_fields
from qlora_jax.tree import FrozenDict

Format = Literal["text", "prompt_completion", "alpaca", "messages", "tokens"]
TrainOn = Literal["all", "completion", "assistant", "last"]
TooLong = Literal["truncate", "drop"]
OnBadRow = Literal["refuse", "skip"]

# What each format can supervise; the first is its default.
_TRAIN_ON: dict[str, tuple[str | None, ...]] = {
    "text": ("all", "assistant"),
    "prompt_completion": ("completion", "all"),
    "alpaca": ("completion", "all"),
    "messages": ("assistant", "last", "all"),
    "tokens": (None, "all"),
}
_PARTS = ("instruction_part", "response_part")
_CONVERSATION = ("chat_template", "chat_template_kwargs", "roles")
# The settings that some formats read, and not all.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "text": ("text", *_PARTS),
    "prompt_completion": ("prompt", "completion", *_CONVERSATION),
    "alpaca": (),
    "messages": ("messages", "answers", "prompt", "completion", *_CONVERSATION),
    "tokens": (),
}
_SOME_READ = tuple(dict.fromkeys(name for read in _SETTINGS.values() for name in read))
_TABLES = ("roles", "chat_template_kwargs")
_FORMAT_STRINGS = ("text", "prompt", "completion")
# Settings that locate the rows or the cache. The fingerprint of the examples covers
# their content instead, so that a moved or renamed file does not change a run.
LOCATION_FIELDS = ("path", "chat_template", "split", "cache", "sources")
SOURCE_FIELDS = (
    *("split", "format", "train_on", "prompt", "completion", "text", *_PARTS),
    *("messages", "answers", *_CONVERSATION),
    *("on_bad_row", "too_long", "append_eos"),
)
"""Settings of `[data]` that a source or `[eval]` may override."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture (`[[data.sources]]`).

    Settings that are left out come from `[data]`, if the source's format reads them.

    Raises:
      UserError: the path is empty, or the weight is not a positive number.
    """

    path: str | tuple[str, ...]
    """As `data.path`."""
    weight: float | None = None
    """Share of the rows of the run, relative to the other sources. Either all sources
    have one or none has; with none, an epoch visits every row of every source once."""
    split: str | None = None
    """As `data.split`."""
    format: Format | None = None
    """As `data.format`."""
    train_on: TrainOn | None = None
    """As `data.train_on`."""
    prompt: str | None = None
    """As `data.prompt`."""
    completion: str | None = None
    """As `data.completion`."""
    text: str | None = None
    """As `data.text`."""
    instruction_part: str | None = None
    """As `data.instruction_part`."""
    response_part: str | None = None
    """As `data.response_part`."""
    messages: str | None = None
    """As `data.messages`."""
    roles: Mapping[str, str] | None = None
    """As `data.roles`."""
    chat_template: str | None = None
    """As `data.chat_template`."""
    chat_template_kwargs: Mapping[str, bool | int | float | str] | None = None
    """As `data.chat_template_kwargs`."""
    answers: tuple[int, ...] | None = None
    """As `data.answers`."""
    on_bad_row: OnBadRow | None = None
    """As `data.on_bad_row`."""
    too_long: TooLong | None = None
    """As `data.too_long`."""
    append_eos: bool | None = None
    """As `data.append_eos`."""

    def __post_init__(self):
        """Raises if a value cannot be used."""
        _freeze_tables(self)
        expand_fields(self, "path", "chat_template")
        if not _is_path(self.path):
            raise UserError(
                f"`path` of a source must name a file, or several; got {self.path!r}."
            )
        weight = self.weight
        if weight is not None and not (
            type(weight) in (int, float) and 0 < weight < math.inf
        ):
            raise UserError(
                f"`weight` of the source {name_of(self.path)} must be a positive "
                f"number, got {weight!r}."
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and how rows become examples (`[data]` of a run's config).

    Raises:
      UserError: a value is out of range, or two fields contradict each other.
    """

    path: str | tuple[str, ...] = ""
    """The data of one source: a file, several, or a pattern ("part-*.jsonl"). JSONL
    (one object a line), JSON (a list of objects), CSV and TSV (the first line names the
    fields), also as .gz; Parquet; Arrow; a directory that `datasets` saved;
    "hf:owner/name" of the hub; or, for format `text`, a UTF-8 text file (.txt, .md,
    ...), which is one document. Files of other kinds are refused."""
    format: Format = "text"
    """How rows are read. `text`: one document a row. `prompt_completion`: a question
    and its answer, as they are. `alpaca`: `instruction`, `input` and `output` in the
    text of Stanford's Alpaca. `messages`: a conversation, or columns of a question and
    its answer, written by the chat template. `tokens`: `input_ids` and `labels`."""
    max_length: int = 1024
    """Longest example, and length of a packed row (tokens)."""
    packing: bool | Literal["auto"] = "auto"
    """Put several examples in one row of `max_length` tokens; none attends to another.
    auto = if one example a row left more than a fifth to padding, and there are at
    least 64 packed rows."""
    shuffle: bool = True
    """Visit the rows in a new order every epoch; false = in the order of the data, also
    with packing, whose rows then have more padding."""
    seed: int = 0
    """Seed of the order (an integer from 0 to 2**64 - 1)."""
    train_on: TrainOn | None = None
    """Which tokens are supervised. Default: the completion of `prompt_completion` and
    `alpaca`, the assistant's turns of `messages` and of `text` with `response_part`,
    all of other `text`, the labels of `tokens`. `last`: the last of the assistant's
    turns alone."""
    prompt: str | None = None
    """Prompt of `prompt_completion`, or the user's turn of `messages`, as a Python
    format string over the row's fields, e.g. "Q: {question} A: " (in a shell, a line
    break is $'{question}\\n'). Default: the field `prompt`."""
    completion: str | None = None
    """Completion of `prompt_completion`, or the assistant's turn of `messages`, as a
    format string, e.g. "{answer}". Default: the field `completion`."""
    text: str | None = None
    """Document of `text` as a format string, e.g. "{title}\\n\\n{body}". Default: the
    field `text`."""
    instruction_part: str | None = None
    """What stands before each instruction in a `text` that a chat template has written
    already, e.g. "<|im_start|>user\\n"; with `response_part`."""
    response_part: str | None = None
    """What stands before each answer there, e.g. "<|im_start|>assistant\\n". What
    follows it, up to the next of both or the end, is supervised and nothing else. Rows
    without it are left out."""
    messages: str | None = None
    """Field of `messages` that holds the conversation. Default: the one of `messages`,
    `conversations`, `conversation` and `data` that a row has."""
    roles: Mapping[str, str] | None = None
    """Roles of the rows -> roles of the chat template, e.g. {bot = "assistant"}, in
    addition to those that are known ("human", "gpt", "model", ...)."""
    chat_template: str | None = None
    """Jinja chat template for conversations: the path of a file, or the name of one
    that is built in (alpaca, chatml, gemma, llama-3, mistral, vicuna, zephyr). Default:
    the tokenizer's own."""
    chat_template_kwargs: Mapping[str, bool | int | float | str] | None = None
    """Variables for the chat template, e.g. {enable_thinking = false}. Those in a
    row's field `chat_template_kwargs` win."""
    answers: tuple[int, ...] | None = None
    """Which turns of the assistant are trained: 0 is the first, -1 the last. Default:
    all. Those whose flags (`train`, `weight`, ...) exclude them never are."""
    date: str | None = None
    """The day that chat templates write as today's, e.g. "2026-11-29". Default: the day
    on which the run starts, kept in its config.toml, for templates that read the clock.
    """
    allow_lost_answers: bool = False
    """Train on conversations in which the chat template writes nothing of an answer
    (tool calls that it does not know); they are refused otherwise."""
    on_bad_row: OnBadRow = "refuse"
    """What to do with a row that cannot be used (malformed, a field missing, a role
    that the template refuses): refuse the data and list all such rows, or leave the row
    out; how many there are, and why, is reported."""
    too_long: TooLong = "truncate"
    """What to do with an example of more than `max_length` tokens: keep its beginning,
    or drop it. With `truncate`, plain text files and packed `text` (without
    `response_part`) lose nothing: they are cut into consecutive windows of `max_length`
    tokens."""
    append_eos: bool = True
    """End `text`, `prompt_completion` and `alpaca` examples with the tokenizer's EOS,
    supervised. Chat templates write their own end of turn; `tokens` are used unchanged.
    """
    eos_token: str | None = None
    """EOS to train with instead of the tokenizer's own: a token of its vocabulary, such
    as "<|im_end|>". It becomes the EOS of the tokenizer that is saved with adapters."""
    split: str | None = None
    """Split of a `datasets` directory or of a data set of the hub. Default: `train`, or
    the only one."""
    cache: str | None = None
    """For data larger than memory: tokenize it once into this directory and train from
    a memory map. "auto" is the run directory's name with `.data` added. Default: keep
    the tokens in memory."""
    sources: tuple[Source, ...] = ()
    """A mixture instead of `path`: one table [[data.sources]] per source, with `path`,
    `weight` and the settings that differ from these."""

    def __post_init__(self):
        """Raises if a value cannot be used."""
        _freeze_tables(self)
        expand_fields(self, "path", "chat_template", "cache")
        problems = Problems("the data")
        for problem in self._problems():
            problems.add(problem)
        if self.sources and not len(problems):
            for _ in self._build_parts(problems):
                pass
        problems.raise_if_any()

    def _problems(self) -> Iterator[str]:
        if self.sources and self.path:
            yield (
                f"`data.path` = {self.path!r} and `data.sources` are both given; make "
                "the path a source too, or leave one of them out."
            )
        elif not self.sources and not _is_path(self.path):
            yield (
                f"`data.path` must name a file, or several; got {self.path!r}. (A "
                "mixture has tables [[data.sources]] instead.)"
            )
        for name, choices in (
            ("format", get_args(Format)),
            ("too_long", get_args(TooLong)),
            ("on_bad_row", get_args(OnBadRow)),
            ("train_on", (None, *get_args(TrainOn))),
            ("packing", (False, True, "auto")),
            ("shuffle", (False, True)),
            ("append_eos", (False, True)),
            ("allow_lost_answers", (False, True)),
        ):
            value = getattr(self, name)
            # By identity but for strings, because 1 == True.
            if not any(value is c or (value == c and type(c) is str) for c in choices):
                known = ", ".join(repr(c) for c in choices)
                yield f"`data.{name}` must be one of {known}, got {value!r}."
        for name, low, high in (("max_length", 2, 2**31 - 1), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                yield (
                    f"`data.{name}` must be an integer from {low} to {high}, "
                    f"got {value!r}."
                )
        for name in ("eos_token", "split", "cache", "messages"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                yield f"`data.{name}` must be a non-empty string, got {value!r}."
        if self.date is not None and not _is_day(self.date):
            yield (
                '`data.date` must be a day in the form "2026-11-29", got '
                f"{self.date!r}."
            )
        if self.answers is not None and not (
            isinstance(self.answers, tuple)
            and self.answers
            and all(type(index) is int for index in self.answers)
        ):
            yield (
                "`data.answers` must be a list of indices, e.g. [0, -1] for the first "
                f"and the last answer; got {self.answers!r}."
            )
        for key, value in (self.roles or {}).items():
            if not (isinstance(key, str) and isinstance(value, str) and value):
                yield f"`data.roles` must be a table of strings, got {self.roles!r}."
        if self.sources:  # formats are checked source by source, in `_build_parts`
            yield from self._weight_problems()
        elif self.format in _TRAIN_ON:
            yield from self._format_problems()

    def _format_problems(self) -> Iterator[str]:
        allowed = _TRAIN_ON[self.format]
        if self.train_on in get_args(TrainOn) and self.train_on not in allowed:
            known = ", ".join(repr(c) for c in allowed if c)
            yield (
                f"`data.train_on` = {self.train_on!r} does not apply to format="
                f"{self.format!r}; use {known}, or leave it out."
            )
        if self.answers is not None and self.supervised != "assistant":
            yield (
                "`data.answers` chooses among the answers that `data.train_on` = "
                f"'assistant' trains, and it is {self.train_on!r}. Leave out one of "
                "them."
            )
        for name in _SOME_READ:
            value = getattr(self, name)
            if value is None:
                continue
            if name not in _SETTINGS[self.format]:
                readers = [repr(f) for f, names in _SETTINGS.items() if name in names]
                yield (
                    f"`data.{name}` is read by format={' and '.join(readers)} only, "
                    f"and the format is {self.format!r}. Leave one of them out or "
                    "change the other."
                )
            elif name in _FORMAT_STRINGS:
                try:
                    _check_template(name, value)
                except UserError as error:
                    yield str(error)
        yield from self._parts_problems()
        if self.format == "messages" and (self.prompt is None) != (
            self.completion is None
        ):
            yield (
                "`data.prompt` and `data.completion` make the turns of user and "
                "assistant of format='messages' together: give both, or none of them."
            )
        if self.messages is not None and self.prompt is not None:
            yield (
                "`data.messages` names a conversation, and `data.prompt` makes one of "
                "other fields. Leave one of them out."
            )

    def _parts_problems(self) -> Iterator[str]:
        """Yields what is wrong with the markers of format `text`."""
        parts = [getattr(self, name) for name in _PARTS]
        if self.format == "text" and self.train_on == "assistant" and None in parts:
            yield (
                "`data.train_on` = 'assistant' needs `data.instruction_part` and "
                "`data.response_part` with format='text', to tell the answers in it."
            )
        if parts == [None, None]:
            return
        if not all(isinstance(part, str) and part.strip() for part in parts):
            yield (
                "`data.instruction_part` and `data.response_part` mark a text "
                "together: both must be strings that are not blank, got "
                f"{parts[0]!r} and {parts[1]!r}."
            )
        elif parts[0] == parts[1]:
            yield (
                "`data.instruction_part` and `data.response_part` are the same, "
                f"{parts[0]!r}, so answers cannot be told from instructions."
            )
        if self.train_on == "all":
            yield (
                "`data.train_on` = 'all' trains every token, and "
                "`data.response_part` the answers alone. Leave one of them out."
            )

    def _weight_problems(self) -> Iterator[str]:
        weights = [source.weight for source in self.sources]
        missing = [
            name_of(source.path) for source in self.sources if source.weight is None
        ]
        if missing and len(missing) < len(weights):
            yield (
                "`data.sources`: some sources have a `weight` and these have none: "
                f"{', '.join(missing)}. Give all sources a weight, or none of them."
            )
        present = [weight for weight in weights if weight is not None]
        # `Interleaving` orders blocks of at least 4 / (smallest share) rows in memory.
        if present and max(present) > 1e5 * min(present):
            yield (
                f"`data.sources`: weights from {min(present)} to {max(present)}; the "
                "largest may be 100,000 times the smallest."
            )
        # Beyond these indices, streams of `random_keys` have other uses.
        if len(weights) >= 2**16:
            yield f"`data.sources`: {len(weights)} sources; expected at most 65,535."

    def _build_parts(
        self, problems: Problems
    ) -> Iterator[tuple[Source, "DataConfig | None"]]:
        """Yields each source with its settings, None if they contradict each other."""
        unread = {name for name in _SOME_READ if getattr(self, name) is not None}
        for source in self.sources:
            format = source.format or self.format
            unread -= self._inherited(format)
            try:
                yield source, self.read_as(source)
            except UserError as error:
                problems.add(f"Source {name_of(source.path)}: {error}")
                yield source, None
        for name in sorted(unread) if self.sources else ():
            problems.add(f"`data.{name}` is read by none of the `data.sources`.")

    def read_as(self, source: Source) -> "DataConfig":
        """Returns these settings overridden by those of a source.

        Raises:
          UserError: they contradict each other.
        """
        values = {name: getattr(source, name) for name in SOURCE_FIELDS}
        fields: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
        format = fields.get("format", self.format)
        for name in _SOME_READ:
            if name not in fields and name not in self._inherited(format):
                fields[name] = None
        if "train_on" not in fields and self.train_on not in _TRAIN_ON.get(format, ()):
            fields["train_on"] = None
        return dataclasses.replace(self, path=source.path, sources=(), **fields)

    def _inherited(self, format: str) -> set[str]:
        """Returns the settings that a source of a format takes from these."""
        names = set(_SETTINGS.get(format, ()))
        if format == "messages" != self.format:
            # They are those of other sources: their rows have no conversation.
            names -= {"prompt", "completion"}
        return names

    def parts(self) -> list[tuple[Source, "DataConfig"]]:
        """Returns each source of a mixture with its settings; [] without a mixture."""
        problems = Problems("the data")
        parts = [
            (source, part)
            for source, part in self._build_parts(problems)
            if part is not None
        ]
        problems.raise_if_any()
        return parts

    @property
    def each(self) -> list["DataConfig"]:
        """The settings that every source is read with; [self] without a mixture."""
        return [part for _, part in self.parts()] or [self]

    @property
    def supervised(self) -> str | None:
        """`train_on`, or the format's default (None: the labels of the rows)."""
        marked = "assistant" if self.response_part is not None else None
        return self.train_on or marked or _TRAIN_ON[self.format][0]

    @property
    def content_settings(self) -> dict[str, Any]:
        """The settings of one source that change its batches (not where it is).

        Those that are not given and have no default are left out, so that a new one of
        them changes no fingerprint.
        """
        settings = dataclasses.asdict(self) | {"train_on": self.supervised}
        settings |= self.packing_order
        return {
            name: value
            for name, value in settings.items()
            # The EOS is among the tokens.
            if name not in (*LOCATION_FIELDS, "eos_token") and value is not None
        }

    @property
    def packing_order(self) -> dict[str, str]:
        """What fingerprints have of rows that are packed in the order of the data."""
        return {"packed": "in order"} if self.packing and not self.shuffle else {}

    @property
    def writes_conversations(self) -> bool:
        """Whether this one source holds conversations, as far as its settings say."""
        return self.format == "messages" or any(
            getattr(self, name) is not None for name in _CONVERSATION
        )

    @property
    def needs_tokenizer(self) -> bool:
        """Whether any source holds text instead of token ids."""
        return any(config.format != "tokens" for config in self.each)

    @property
    def name(self) -> str:
        """The path or paths, for messages."""
        if self.sources:
            return ", ".join(name_of(source.path) for source in self.sources)
        return name_of(self.path)


def name_of(path: str | tuple[str, ...]) -> str:
    """Joins the paths of a source, for messages."""
    return path if isinstance(path, str) else ", ".join(path)


def _is_day(date: str) -> bool:
    try:
        datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        return False
    return True


def _freeze_tables(config: DataConfig | Source) -> None:
    """Makes the settings that are tables hashable, in the order of their keys."""
    for name in _TABLES:
        table = getattr(config, name)
        if table is not None:
            frozen = FrozenDict(sorted(table.items()))
            object.__setattr__(config, name, frozen)


def _is_path(path: Any) -> bool:
    if isinstance(path, str):
        return bool(path)
    return (
        isinstance(path, tuple)
        and bool(path)
        and all(isinstance(p, str) and p for p in path)
    )


def _check_template(name: str, template: object) -> None:
    """Raises for a format string that no row can fill (UserError)."""
    if not isinstance(template, str):
        raise UserError(f"`data.{name}` must be a string, got {template!r}.")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"`data.{name}` = {template!r} is not a format string: {error}. Write "
            "a literal brace twice: {{ or }}."
        ) from error
    specs = " ".join(spec or "" for _, _, spec, _ in parts)
    if re.search(r"\d{5}", specs):
        raise UserError(
            f"`data.{name}` = {template!r} pads a field to 10,000 characters or more."
        )
    names = [field for _, field, _, _ in parts if field is not None]
    if not names and name != "prompt":  # every row may have the same prompt
        raise UserError(
            f"`data.{name}` = {template!r} names no field of a row; write e.g. "
            '"{question}".'
        )
    if any(not n or n[0].isdigit() or "." in n for n in names):
        raise UserError(
            f"`data.{name}` = {template!r} must name a row's fields in its braces, "
            'e.g. "{question}" or "{turns[0]}"; positions and attributes have no '
            "meaning here."
        )
