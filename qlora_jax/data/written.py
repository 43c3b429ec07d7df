"""Compares a rendered conversation with its row: what the chat template does not write.

A template leaves out what it does not know (tool calls, tools, a system text) without
an error. What it writes may look different from the row: stripped, escaped in JSON or
Python, arguments as XML. So what is looked for is what survives all of that: lines of
text, names of functions, keys and single values of arguments.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_jax.data.chat import Rendering
from qlora_jax.data.reasoning import has_empty_reasoning, split_reasoning
from qlora_jax.errors import UserError

EMPTY_REASONING = "answers trained with empty reasoning"
EMPTY_ANSWER = "answers trained that have no text and no calls"
SPECIAL_TOKENS = "turns whose text has special tokens of the tokenizer"
NOT_WRITTEN = "that the chat template does not write"
# Of calls: what is looked for by itself, or is no text of the model.
_CALL_KEYS = ("name", "arguments", "id", "type", "index")
# A tag alone on its line may be one that the template writes itself.
_TAG = re.compile(r"[<\[]/?[\w:|]+[>\]]")


class _Text:
    """A part of a rendered text in which what turns have is looked for in its order.

    Args:
      text: the rendered text.
      start: of the part. What begins before and ends inside counts: a generation
        prompt may hold the first words of an answer.
      end: of the part.
    """

    def __init__(self, text: str, start: int = 0, end: int | None = None):
        self._text, self._start = text, start
        self._end = len(text) if end is None else end
        self._position = 0

    def __str__(self) -> str:
        return self._text[self._start : self._end]

    def has(self, part: str) -> bool:
        """Whether a string occurs: after the last one, or anywhere."""
        first = max(self._start - len(part) + 1, 0)
        found = self._text.find(part, max(self._position, first), self._end)
        if found < 0:
            return self._text.find(part, first, self._end) >= 0
        self._position = found + len(part)
        return True


def find_unwritten(
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    renderings: Sequence[Rendering],
    where: str,
    *,
    allow_lost_answers: bool,
) -> Counter[str]:
    """Counts what a chat template does not write of a conversation.

    Args:
      messages: the turns.
      tools: the functions that the template was given.
      renderings: of the conversation; each trained answer is in one of them.
      where: location of the row, for messages.
      allow_lost_answers: count trained answers of which nothing is written.

    Returns:
      Phrases for the report, and how often each applies.

    Raises:
      UserError: nothing is written of an answer that is to be trained.
    """
    answers = _answer_texts(renderings)
    whole = _Text(renderings[-1].text)
    unwritten: Counter[str] = Counter()
    # What follows the last trained answer has no effect.
    end = max(answers, default=len(messages) - 1) + 1
    for number, message in enumerate(messages[:end]):
        trained = number in answers
        text = answers[number] if trained else whole
        lost, parts = _missing_parts(message, text, earlier=not trained)
        if trained and lost:
            if not allow_lost_answers:
                raise UserError(
                    f"{where}: the chat template writes nothing of the answer in turn "
                    f"{number + 1} (its {' and '.join(lost)}), so that the model would "
                    f"learn to answer {str(text)!r}. Give `data.chat_template` a "
                    "Jinja file that writes it, leave the row out, or set "
                    "`data.allow_lost_answers` = true to train on it."
                )
            parts = {"answers (all of their text and calls)"}
        unwritten.update(parts)
    described = _Text(renderings[-1].text)
    for tool in tools or ():
        unwritten.update(_missing_of_tool(_function(tool), described))
    remarks = Counter(
        {f"{part} {NOT_WRITTEN}": count for part, count in unwritten.items()}
    )
    remarks[EMPTY_REASONING] = sum(
        has_empty_reasoning(str(text)) for text in answers.values()
    )
    return +remarks


def _answer_texts(renderings: Sequence[Rendering]) -> dict[int, _Text]:
    """Returns the trained text of each answer."""
    texts: dict[int, _Text] = {}
    for rendering in renderings:
        pieces = [_Text(rendering.text, start, end) for start, end in rendering.spans]
        if len(pieces) != len(rendering.answers):  # generation marks
            joined = "".join(map(str, pieces))
            pieces = [_Text(joined) for _ in rendering.answers]
        texts.update(zip(rendering.answers, pieces, strict=True))
    return texts


def _missing_parts(
    message: dict[str, Any], text: _Text, *, earlier: bool
) -> tuple[list[str], set[str]]:
    """Returns what a turn has if nothing of it is written, and what is not written."""
    role = message["role"]
    if role == "assistant":
        reasoning, content = split_reasoning(message)
    else:
        reasoning, content = "", message.get("content") or ""
    calls = message.get("tool_calls") or []
    lines = [content.strip()] if content.strip() else []
    written = [text.has(line) for line in lines]
    if not all(written):  # it may be written in another form
        lines = _lines(content)
        written = [_writes_line(line, text) for line in lines]
    parts: set[str] = set()
    if not all(written):
        parts.add(f"contents of turns of the role {role!r}")
    names = [_function(call).get("name") for call in calls]
    called = [isinstance(name, str) and text.has(name) for name in names]
    if not all(called):
        parts.add("calls of functions")
    elif not all(_writes_value(_function(c).get("arguments"), text) for c in calls):
        parts.add("arguments of calls")
    others = [
        {k: v for k, v in _function(call).items() if k not in _CALL_KEYS}
        for call in calls
    ]
    if not all(_writes_value(list(other.values()), text) for other in others):
        parts.add("other fields of calls")
    if reasoning.strip() and not _writes_text(reasoning, text):
        which = "earlier turns" if earlier else "answers"
        parts.add(f"reasonings of {which}")
    has = [name for name, value in (("text", lines), ("calls", calls)) if value]
    return ([] if any(written) or any(called) else has), parts


def _missing_of_tool(function: dict[str, Any], text: _Text) -> set[str]:
    """Returns what is not written of a function that a model may call."""
    name, description = function.get("name"), function.get("description")
    if isinstance(name, str) and not text.has(name):
        return {"functions in `tools`"}
    parts: set[str] = set()
    if isinstance(description, str) and not _writes_text(description, text):
        parts.add("descriptions of functions in `tools`")
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if isinstance(properties, dict) and not all(map(text.has, map(str, properties))):
        parts.add("parameters of functions in `tools`")
    return parts


def _function(value: Any) -> dict[str, Any]:
    """Returns the function of a call or a tool, which may be wrapped."""
    if not isinstance(value, dict):
        return {}
    inner = value.get("function")
    return inner if isinstance(inner, dict) else value


def _lines(content: str) -> list[str]:
    lines = (line.strip() for line in content.splitlines())
    return [line for line in lines if line and not _TAG.fullmatch(line)]


def _writes_text(content: str, text: _Text) -> bool:
    return text.has(content.strip()) or all(
        _writes_line(line, text) for line in _lines(content)
    )


def _writes_line(line: str, text: _Text) -> bool:
    return any(text.has(form) for form in _forms(line))


def _forms(line: str) -> Iterator[str]:
    """Yields how a line may be written: as it is, and inside JSON or Python."""
    yield line
    yield json.dumps(line, ensure_ascii=False)[1:-1]
    yield json.dumps(line)[1:-1]
    yield repr(line)[1:-1]


def _writes_value(value: Any, text: _Text) -> bool:
    """Whether every key and every single value of arguments is written."""
    if isinstance(value, dict):
        return all(
            text.has(str(k)) and _writes_value(v, text) for k, v in value.items()
        )
    if isinstance(value, list):
        return all(_writes_value(item, text) for item in value)
    if isinstance(value, str):
        return _writes_text(value, text)
    return value is None or text.has(json.dumps(value)) or text.has(str(value))
