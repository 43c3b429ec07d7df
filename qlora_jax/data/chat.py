"""Renders conversations with a chat template and marks what the assistant wrote.

The spans of the assistant are known while a conversation is rendered, so nothing is
searched for in the text or in the tokens.

A template with `{% generation %}` blocks marks them itself (`marks`). With any other
template, what turn `i` adds after the generation prompt is exactly what a model has to
write there, end-of-turn token included. Both are prefixes of the conversation: the
turns before with the prompt, and the turns with `i`. They are known from one pass where
a template can be followed (`TurnEnds`), and rendered otherwise.

A template that rewrites earlier turns (those of reasoning models leave out earlier
reasoning) has no text in which all answers stand as a model writes them. The
conversation then becomes several examples, each with the answers that it shows so.
"""

import contextlib
import copy
import dataclasses
import datetime
import inspect
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qlora_jax.data.bounded_templates import is_linear, render
from qlora_jax.data.builtin_templates import BUILTIN_TEMPLATES, template_file
from qlora_jax.data.conversations import is_trained
from qlora_jax.data.marks import Blocks, choose_blocks, find_blocks, has_marks
from qlora_jax.data.reasoning import follow_prompt, open_reasoning
from qlora_jax.data.turn_ends import TurnEnds
from qlora_jax.errors import UserError
from qlora_jax.reading import read_text

# Where a template reads the clock: `strftime_now("%d %b %Y")`.
_CLOCK = re.compile(
    r"""strftime_now\s*\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)"""
)

# What Python raises inside a template for a row of an unexpected shape, e.g. where
# text is joined to a null `content`.
_DATA_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
    SyntaxError,  # "break" outside of a loop is one of the Python that Jinja writes
)

_WORD = re.compile(r"\w+")
# Answers that begin differently; of Unicode's private use area.
_CONTENTS = ("\ue000", "\ue001")


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A conversation, or its beginning, as text.

    Attributes:
      text: the text.
      spans: (start, end) of the trained text, ascending.
      answers: indices of the turns that the spans are of, ascending.
      prompted: how many of them stand after the generation prompt, and not after what
        the template writes before them.
    """

    text: str
    spans: list[tuple[int, int]]
    answers: tuple[int, ...]
    prompted: int = 0


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer or a file.

    Args:
      tokenizer: a `transformers` tokenizer.
      template_path: a Jinja chat template, or the name of one that is built in; None
        uses the tokenizer's own.
      date: the day that the template takes for today ("2026-11-29"); None leaves it to
        the template, as transformers does.
      variables: further variables of the template, such as `enable_thinking`.

    Raises:
      UserError: there is no template, or it cannot be read or parsed; or how it writes
        a date cannot be told, and `date` is given.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_path: str | None = None,
        date: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        self._template: str | None = None
        self._day = None if date is None else datetime.date.fromisoformat(date)
        self._variables: dict[str, Any] = {}
        if self._day is not None:  # what templates of the Llama 3 family ask for
            self._variables["date_string"] = self._day.strftime("%d %b %Y")
        self._variables.update(variables or {})
        if template_path is not None:
            self._template = _read_template(template_path)
        elif not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "This tokenizer has no chat template, which format='messages' needs. "
                "Base models ship none: name one that is built in as "
                f"`data.chat_template` ({', '.join(BUILTIN_TEMPLATES)}); or take "
                "`chat_template.jinja` (or the `chat_template` of "
                "`tokenizer_config.json`) from the instruct model of the same family, "
                "save it as a file, and give its path there; or write the rows as "
                "format='prompt_completion'."
            )
        specials: set[str] = set(getattr(tokenizer, "all_special_tokens", ()))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        control = {str(t) for t in added.values() if getattr(t, "special", True)}
        pattern = "|".join(re.escape(t) for t in control | specials if t.strip())
        self._control = re.compile(pattern or "(?!)")
        specials.update(str(token) for token in added.values())
        # One that is white space is stripped from the end of a turn before the
        # comparison.
        self._specials = tuple(s for s in specials if s.strip())
        self._check_syntax(template_path)
        if self._day is not None and re.search(
            r"strftime_now\s*\(", self._source(None)
        ):
            raise UserError(
                "The chat template computes the format of the date that it writes, so "
                "that the date of the run (`data.date`) cannot take its place. Give "
                "`data.chat_template` a copy of it that writes "
                'strftime_now("%Y-%m-%d"), or a date.'
            )
        self._ends: dict[str, TurnEnds] = {}
        self._prompts: dict[str, str] = {}
        self._words: dict[bool, set[str]] = {}

    @property
    def has_marks(self) -> bool:
        """Whether the template marks the assistant's text with `{% generation %}`."""
        return has_marks(self._source(None))

    def _source(self, tools: list[Any] | None) -> str:
        """Returns the template that a conversation is rendered with."""
        source = self._template or getattr(self._tokenizer, "chat_template", None)
        if isinstance(source, dict):  # several by name, as in transformers
            name = "tool_use" if tools and "tool_use" in source else "default"
            source = source.get(name)
        return self._dated(source or "")

    def _sources(self) -> set[str]:
        """Returns the templates of conversations without tools and with some."""
        return {self._source(None), self._source([{}])}

    def _dated(self, source: str) -> str:
        """Returns a template that writes the date instead of reading the clock.

        `apply_chat_template` passes no functions on to a template, so its own cannot be
        replaced.
        """
        if self._day is None:
            return source
        day = datetime.datetime.combine(self._day, datetime.time())
        return _CLOCK.sub(lambda m: json.dumps(day.strftime(m["format"])), source)

    @property
    def reads_clock(self) -> bool:
        """Whether the template writes today's date, and was not given another."""
        return any("strftime_now" in source for source in self._sources())

    @property
    def reads_date(self) -> bool:
        """Whether the template writes a date that it is given."""
        return self.reads_clock or any("date_string" in s for s in self._sources())

    def with_variables(self, variables: Mapping[str, Any]) -> "ChatRenderer":
        """Returns a renderer whose template gets these variables too.

        Raises:
          UserError: one has the name of something that the template gets anyway.
        """
        apply = inspect.signature(self._tokenizer.apply_chat_template).parameters
        reserved = {"messages", *apply} & set(variables)
        if reserved:
            raise UserError(
                f"`chat_template_kwargs` has {', '.join(sorted(reserved))}, which "
                "a chat template gets from the conversation or the renderer. Leave it "
                "out."
            )
        renderer = copy.copy(self)
        renderer._variables = {**self._variables, **variables}
        renderer._prompts = {}  # another one may follow from them
        return renderer

    def mentions(self, name: str, *, tools: bool = False) -> bool:
        """Returns whether a name, such as that of a variable, is in the template.

        Args:
          name: the name.
          tools: look into the template for conversations with tools.
        """
        if tools not in self._words:
            source = self._source([{}] if tools else None)
            self._words[tools] = set(_WORD.findall(source))
        return set(_WORD.findall(name)) <= self._words[tools]

    def has_special(self, message: dict[str, Any]) -> bool:
        """Returns whether the text of a turn has special tokens of the tokenizer.

        The tokenizer cannot tell them from those of the template: they may end the
        turn, or begin another one.
        """
        return self._control.search(message.get("content") or "") is not None

    def text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        where: str = "conversation",
    ) -> str:
        """Renders a conversation to text; a BOS comes from the template alone.

        Raises:
          UserError: the template cannot render the conversation.
        """
        return self._render(messages, None, add_generation_prompt, tools, where)

    @property
    def writes_generation_prompt(self) -> bool:
        """Whether `add_generation_prompt` changes the text."""
        turns = [{"role": "user", "content": "a"}]
        try:
            return self.text(turns, add_generation_prompt=True) != self.text(turns)
        except UserError:  # the template needs other turns, so it cannot be tried
            return True

    def _check_syntax(self, template_path: str | None) -> None:
        """Raises syntax errors once, instead of once for every conversation."""
        import jinja2

        try:
            self._apply([{"role": "user", "content": ""}], None, False, None)
        except jinja2.TemplateSyntaxError as error:
            what = (
                "The tokenizer's chat template"
                if template_path is None
                else f"`data.chat_template`: {template_path}"
            )
            why = str(error.message).rstrip(".")
            raise UserError(
                f"{what} is not a valid Jinja template: line {error.lineno}: {why}. "
                "Correct it, or give the path of another one as `data.chat_template`."
            ) from error
        except UserError:  # it takes too much, whatever the turns
            raise
        except (jinja2.TemplateError, *_DATA_ERRORS):
            pass  # this template needs other turns; those of the data may fit

    def _apply(
        self,
        messages: list[dict[str, Any]],
        template: str | None,
        add_generation_prompt: bool,
        tools: list[Any] | None,
    ) -> str:
        return render(
            self._tokenizer,
            messages,
            tools=tools,
            chat_template=self._source(tools) if template is None else template,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )

    def _render(
        self,
        messages: list[dict[str, Any]],
        template: str | None,
        add_generation_prompt: bool,
        tools: list[Any] | None,
        where: str,
    ) -> str:
        import jinja2  # the template engine that transformers uses

        try:
            return self._apply(messages, template, add_generation_prompt, tools)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (jinja2.TemplateError, *_DATA_ERRORS) as error:
            # Some templates join the arguments of calls to the text as strings, or read
            # the content of turns that have none.
            calls = "tool_calls" in (template or self._source(tools))
            for other in _other_forms(messages, calls):
                with contextlib.suppress(jinja2.TemplateError, *_DATA_ERRORS):
                    return self._apply(other, template, add_generation_prompt, tools)
            roles = ", ".join(message["role"] for message in messages) or "none"
            hint = ""
            if any(message.get("tool_calls") for message in messages):
                hint = (
                    ". They call tools: take the template of a model that was trained "
                    "to (the built-in ones write no calls)."
                )
            raise UserError(
                f"{where}: the chat template cannot render the turns ({roles}): "
                f"{str(error).rstrip('.') if hint else error}{hint}"
            ) from error

    def examples(
        self,
        messages: list[dict[str, Any]],
        *,
        answers: Collection[int] | None = None,
        tools: list[Any] | None = None,
        where: str = "conversation",
    ) -> list[Rendering]:
        """Renders a conversation and marks what the assistant wrote.

        With generation marks, the spans are the marked blocks. Without, a span starts
        after the generation prompt and ends after the end-of-turn token. White space
        that the template writes after that token (ChatML's newline) is left out,
        because a model stops at the token and never writes it; where a turn ends
        without a special token, the span runs to the end of the turn.

        Args:
          messages: the turns.
          answers: indices of the turns of the assistant to train; default those that
            their flags leave trained (`is_trained`).
          tools: functions that the template describes.
          where: location of the row, for messages.

        Returns:
          One rendering, or several if the template rewrites earlier turns. Their spans
          are the marked blocks that are not empty, or one for each answer.

        Raises:
          UserError: the template cannot render the conversation, starts an answer
            otherwise than it prompts for one, or has marks that cannot be followed.
        """
        if answers is None:
            answers = trained_answers(messages)
        if has_marks(self._source(tools)):
            return [self._example_by_marks(messages, answers, tools, where)]
        return self._examples_by_prefixes(messages, answers, tools, where)

    def _examples_by_prefixes(
        self,
        messages: list[dict[str, Any]],
        answers: Collection[int],
        tools: list[Any] | None,
        where: str,
    ) -> list[Rendering]:
        full = self._render(messages, None, False, tools, where)
        spans = self._spans_by_ends(full, messages, answers, tools, where)
        if spans is not None:
            return [Rendering(full, spans, tuple(sorted(answers)))]
        examples: list[Rendering] = []
        # From the last one: the text up to it shows most of the answers before.
        for turn in sorted(answers, reverse=True):
            before, after = self._around(turn, messages, full, tools, where)
            prompted = 0
            if not after.startswith(before):
                written = open_reasoning(messages[turn], before, after)
                if written is None:
                    start = self._start(messages[:turn], tools, where)
                    written = follow_prompt(before, after, start)
                    prompted = 1
                if written is None:
                    raise UserError(
                        f"{where}: the chat template's generation prompt "
                        f"({before[-40:]!r}) is not how it starts the assistant's turn "
                        f"{turn + 1}, so where the answer begins is not defined. Give "
                        "`data.chat_template` a Jinja file whose generation prompt is "
                        "the beginning of an assistant turn."
                    )
                after = written
            span = self._trim(after, len(before), len(after))
            if examples and examples[-1].text.startswith(after):
                later = examples.pop()
                spans, shown = [span, *later.spans], (turn, *later.answers)
                prompted += later.prompted
                example = Rendering(later.text, spans, shown, prompted)
            else:
                text = full if not examples and full.startswith(after) else after
                example = Rendering(text, [span], (turn,), prompted)
            examples.append(example)
        return examples[::-1] or [Rendering(full, [], ())]

    def _around(
        self,
        turn: int,
        messages: list[dict[str, Any]],
        full: str,
        tools: list[Any] | None,
        where: str,
    ) -> tuple[str, str]:
        """Returns the texts before and after what a model writes for a turn."""

        def prefix(turns: int, prompt: bool) -> str:
            return self._render(messages[:turns], None, prompt, tools, where)

        last = turn + 1 == len(messages)
        after = full if last else prefix(turn + 1, False)
        before = prefix(turn, True) if turn else self._opening(after, tools, where)
        return before, after

    def _start(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> str:
        """Returns what the template writes before an answer, whatever the answer is."""
        texts = [
            self._render(
                [*messages, {"role": "assistant", "content": content}],
                *(None, False, tools, where),
            )
            for content in _CONTENTS
        ]
        return os.path.commonprefix(texts)

    def ends_special(self, text: str) -> bool:
        """Whether a text ends with a special or added token of the tokenizer."""
        return bool(self._specials) and text.rstrip().endswith(self._specials)

    def _trim(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Returns a span without the white space after a special token at its end."""
        stop = start + len(text[start:end].rstrip())
        return start, stop if self.ends_special(text[start:stop]) else end

    def _spans_by_ends(
        self,
        full: str,
        messages: list[dict[str, Any]],
        answers: Collection[int],
        tools: list[Any] | None,
        where: str,
    ) -> list[tuple[int, int]] | None:
        """Returns the spans in the text of a template that can be followed, or None."""
        source = self._source(tools)
        specials = getattr(self._tokenizer, "special_tokens_map", None)
        if specials is None or not answers or not is_linear(source):
            return None
        if source not in self._ends:
            self._ends[source] = TurnEnds(source)
        context = {**specials, **self._variables, "tools": tools, "documents": None}
        ends = self._ends[source].find(full, messages, context)
        if ends is None or ends[-1] is None:
            return None
        if source not in self._prompts:
            # It does not depend on the turns.
            prompted = self._render(messages, None, True, tools, where)
            if not prompted.startswith(full[: ends[-1]]):
                return None
            self._prompts[source] = prompted[ends[-1] :]
        prompt, spans = self._prompts[source], []
        for turn in sorted(answers):
            begin, end = ends[turn - 1] if turn else None, ends[turn]
            if begin is not None and end is not None:
                start = begin + len(prompt)
                # What ends a conversation belongs to its last turn.
                end = end if turn + 1 < len(messages) else len(full)
                follows = full.startswith(prompt, begin) and start <= end
            else:
                before, after = self._around(turn, messages, full, tools, where)
                start, end = len(before), len(after)
                follows = full.startswith(after) and after.startswith(before)
            if not follows:
                return None
            spans.append(self._trim(full, start, end))
        return spans

    def _opening(self, after: str, tools: list[Any] | None, where: str) -> str:
        """Returns what stands before the answer that opens a conversation.

        Few templates render an empty conversation, so the generation prompt is what it
        adds to a question, and its first occurrence is looked for in the text.

        Args:
          after: the text up to the end of the answer.
          tools: as for `examples`.
          where: as for `examples`.
        """
        question = [{"role": "user", "content": "a"}]
        without, prompted = (
            self._render(question, None, prompt, tools, where)
            for prompt in (False, True)
        )
        prompt = prompted[len(without) :] if prompted.startswith(without) else None
        if prompt is None or prompt not in after:
            raise UserError(
                f"{where}: the conversation begins with the assistant, and the chat "
                "template does not write its generation prompt before that answer, so "
                "where the answer begins is not defined. Begin with a user's turn, or "
                "give `data.chat_template` a Jinja file with generation marks."
            )
        return after[: after.index(prompt) + len(prompt)]

    def _example_by_marks(
        self,
        messages: list[dict[str, Any]],
        answers: Collection[int],
        tools: list[Any] | None,
        where: str,
    ) -> Rendering:
        def blocks_of(count: int) -> Blocks:
            turns, source = messages[:count], self._source(tools)
            text = self.text(turns, tools=tools, where=where)

            def with_template(template: str) -> str:
                return self._render(turns, template, False, tools, where)

            return text, find_blocks(text, source, with_template, where)

        text, blocks = blocks_of(len(messages))
        turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        if len(answers) < len(turns):
            blocks = choose_blocks((text, blocks), turns, answers, blocks_of, where)
        spans = [(start, end) for start, end in blocks if start < end]
        return Rendering(text, spans, tuple(sorted(answers)))


def _read_template(path: str) -> str:
    """Reads a Jinja file, or a template that is built in.

    Raises:
      UserError: it cannot be read, or is empty or JSON.
    """
    try:
        template = read_text(template_file(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"`data.chat_template`: cannot read {path}: {reason}. "
            f"Built in are {', '.join(BUILTIN_TEMPLATES)}."
        ) from error
    if not template.strip():
        raise UserError(f"`data.chat_template`: {path} is empty.")
    try:
        is_json = isinstance(json.loads(template), dict)
    except (ValueError, RecursionError):
        is_json = False
    if is_json:
        raise UserError(
            f"`data.chat_template`: {path} is JSON, which would be written as it is "
            "around the turns. Save the string of its `chat_template` as a file of its "
            "own, and give that."
        )
    return template


def _other_forms(
    messages: list[dict[str, Any]], writes_calls: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yields turns of the same meaning, as some templates expect them."""
    encoded = _with_json_arguments(messages)
    if encoded is not None:
        yield encoded
    if not writes_calls or all("content" in message for message in messages):
        return
    for form in (messages, encoded):
        if form is not None:
            yield [{"content": ""} | message for message in form]


def _with_json_arguments(
    messages: list[dict[str, Any]],
) -> list[dict[str, Any]] | None:
    """Returns the turns with arguments of calls as JSON; None if there are none."""

    def encode(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": encode(call["function"])}
        if not isinstance(call.get("arguments"), dict):
            return call
        text = json.dumps(call["arguments"], ensure_ascii=False)
        return {**call, "arguments": text}

    encoded = [
        {**message, "tool_calls": [encode(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
    return None if encoded == messages else encoded


def trained_answers(messages: list[dict[str, Any]]) -> list[int]:
    """Returns the indices of the assistant's turns that their flags leave trained."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and is_trained(message)
    ]
