"""Reasoning of answers: where rows have it, and how it follows a generation prompt."""

import re
from typing import Any

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that may hold its reasoning."""

# The name of a marker ("think", "seed:think") and its closing bracket.
_NAME = r"(?P<name>[\w:|]*(?:think|thought|reason)[\w:|]*)(?P<right>[>\]])"
_OPEN = r"(?P<left>[<\[])" + _NAME
# Gemma 4 closes with "<channel|>" what "<|channel>thought" opens.
_CHANNEL, _CHANNEL_CLOSE = r"<\|channel>(?:thought|think\w*)", "<channel|>"
_CLOSE = re.compile(
    rf"[<\[]/{_NAME}|{re.escape(_CHANNEL_CLOSE)}",
    re.IGNORECASE,
)
# What the generation prompt of a reasoning model ends with: "<think>\n", "[THINK]".
_OPENS = re.compile(rf"(?P<open>{_OPEN})\s*\Z", re.IGNORECASE)
_OPENED = re.compile(rf"(?:{_OPEN}|{_CHANNEL})\s*", re.IGNORECASE)


def split_reasoning(message: dict[str, Any]) -> tuple[str, str]:
    """Returns the reasoning of an answer, and what the user sees of it."""
    content = message.get("content")
    content = content if isinstance(content, str) else ""
    # Faster than the pattern.
    if "</" in content or "[/" in content or _CHANNEL_CLOSE in content:
        end = _CLOSE.search(content)
        if end is not None:
            return content[: end.start()], content[end.end() :]
    values = (message.get(name) for name in REASONING_FIELDS)
    return next((text for text in values if isinstance(text, str)), ""), content


def has_empty_reasoning(answer: str) -> bool:
    """Whether an answer closes its reasoning at once; the prompt may have opened it."""
    opened = _OPENED.match(answer)
    rest = answer[opened.end() :] if opened else answer.lstrip()
    return _CLOSE.match(rest) is not None


def open_reasoning(message: dict[str, Any], before: str, after: str) -> str | None:
    """Writes an answer after a generation prompt that opens its reasoning.

    Such a prompt ends in "<think>", and the template leaves out what an answer has
    before "</think>", so it never shows an answer as the model writes it.

    Args:
      message: the turn of the answer.
      before: what the template writes up to the generation prompt.
      after: what it writes up to the end of the answer; does not begin with `before`.

    Returns:
      The text up to the end of the answer, which begins with `before`; an answer
      without reasoning gets an empty one. None if the prompt is not of this kind.
    """
    opening = _OPENS.search(before)
    if opening is None or not after.startswith(before[: opening.start()]):
        return None
    answer = after[opening.start() :]
    close = f"{opening['left']}/{opening['name']}{opening['right']}"
    if answer.startswith(opening["open"]):
        # The prompt and the answer differ in white space alone.
        answer = answer.removeprefix(opening["open"]).lstrip()
        return before + "\n" * answer.startswith(close) + answer
    if close in answer:
        return None
    reasoning, content = split_reasoning(message)
    gap = "\n\n"
    if close in (message.get("content") or ""):
        reasoning = reasoning.rpartition(opening["open"])[2]
        gap = content[: len(content) - len(content.lstrip())]
        gap = "" if answer.startswith(gap) else gap  # the template kept it
    return f"{before}{reasoning.strip()}\n{close}{gap}{answer}"


def follow_prompt(before: str, after: str, start: str) -> str | None:
    """Writes an answer after a generation prompt that the template writes otherwise.

    Some templates prompt with reasoning that is closed already and leave it out of the
    answers (Gemma 4), or write other white space before the last turn (Hermes). What a
    model sees is the prompt.

    Args:
      before: what the template writes up to the generation prompt.
      after: what it writes up to the end of the answer; does not begin with `before`.
      start: what it writes before whatever the answer is.

    Returns:
      The text up to the end of the answer, which begins with `before`. None if the
      prompt differs in more.
    """
    if not start or not after.startswith(start):
        return None
    answer = after[len(start) :]
    if before.startswith(start):
        closed = before[len(start) :]
        opened = _OPENED.match(closed)
        end = _CLOSE.match(closed, opened.end()) if opened else None
        if end is None or closed[end.end() :].strip() or _OPENED.match(answer):
            return None
    elif "".join(before.split()) != "".join(start.split()):
        return None
    return before + answer
