"""Rows of conversations to rendered examples, with what was lost on the way."""

import contextlib
import dataclasses
import datetime
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from qlora_jax.data.chat import ChatRenderer, Rendering
from qlora_jax.data.config import DataConfig
from qlora_jax.data.conversations import is_trained, known_role
from qlora_jax.data.rows import to_json
from qlora_jax.data.written import EMPTY_ANSWER, SPECIAL_TOKENS, find_unwritten
from qlora_jax.errors import UserError

NULLS = "nulls in tool calls and `tools` that count as absent"
SPLIT = (
    "conversations split into several examples, because the chat template writes "
    "earlier answers differently than it prompts for them"
)
NO_END = "answers that end without a special token, unlike others of their conversation"
UNANSWERED = "conversations whose last turn is not the assistant's and is not trained"
PROMPTED = (
    "answers written after the generation prompt, where the chat template writes "
    "something else before them (white space, or no reasoning that is closed at once)"
)
# Roles of a tool's result, to chat templates.
_RESULT_ROLES = ("tool", "function", "observation", "ipython")
# Parts of the content of a turn, which are not data that a tool returns.
_PARTS = re.compile(r"text|(input_)?(image|audio|video|file)(_url)?")


def plain_row(
    row: dict[str, Any], where: str = "row", roles: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Counter[str]]:
    """Returns a row as its templates expect it, and what was changed in it.

    In objects, a key whose value is null counts as absent: `Dataset.to_json` writes
    every object of a column with the keys of all of them. (Arguments that are a JSON
    string are not touched; their nulls are meant.) The result of a tool becomes JSON if
    it is an object, a list of other things than parts of a content, or a number.

    Args:
      row: the fields.
      where: location of the row, for messages.
      roles: role of the row -> role of the template, before those that are known.

    Raises:
      UserError: the result of a tool holds what JSON does not have.
    """
    changes: Counter[str] = Counter()
    fields = {}
    for name, value in row.items():
        if name == "tools":
            value, nulls = _without_nulls(value)
            changes[NULLS] += nulls
        elif isinstance(value, list):
            value = [_plain_turn(turn, changes, where, roles) for turn in value]
        fields[name] = value
    return fields, +changes


def _plain_turn(
    turn: Any, changes: Counter[str], where: str, roles: Mapping[str, str] | None
) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = {name: value for name, value in turn.items() if value is not None}
    if "tool_calls" in turn:
        turn["tool_calls"], nulls = _without_nulls(turn["tool_calls"])
        changes[NULLS] += nulls
    if known_role(turn.get("role", turn.get("from")), roles) in _RESULT_ROLES:
        name = "content" if "content" in turn or "value" not in turn else "value"
        result = turn.get(name)
        if isinstance(result, dict | list | int | float) and not _is_content(result):
            turn[name] = to_json(result, f"{where}: the result of a tool")
            changes["results of tools written as JSON"] += 1
    return turn


def _is_content(value: Any) -> bool:
    """Whether a value is a list of parts, as in OpenAI's API."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict) and _PARTS.fullmatch(str(part.get("type")))
            for part in value
        )
    )


def _without_nulls(value: Any) -> tuple[Any, int]:
    """Returns a value without the null entries of its objects, and their number."""
    if isinstance(value, dict):
        pairs = {k: _without_nulls(v) for k, v in value.items() if v is not None}
        count = len(value) - len(pairs) + sum(n for _, n in pairs.values())
        return {k: v for k, (v, _) in pairs.items()}, count
    if isinstance(value, list):
        items = [_without_nulls(item) for item in value]
        return [item for item, _ in items], sum(n for _, n in items)
    return value, 0


def with_date(config: DataConfig, tokenizer: Any) -> DataConfig:
    """Returns settings whose `date` is today's if a chat template reads the clock.

    Args:
      config: of one source or a mixture; a date that it has is kept.
      tokenizer: of the model; None for format `tokens`.
    """
    if config.date is not None:
        return config
    if not any(_reads(settings, tokenizer, "clock") for settings in config.each):
        return config
    return dataclasses.replace(config, date=datetime.date.today().isoformat())


def without_unused_date(config: DataConfig, tokenizer: Any) -> DataConfig:
    """Returns the settings of a source without a date that no template of it writes."""
    if config.date is None or _reads(config, tokenizer, "date"):
        return config
    return dataclasses.replace(config, date=None)


def _reads(config: DataConfig, tokenizer: Any, what: str) -> bool:
    """Whether the conversations of a source are written with the clock, or a date."""
    conversations = config.writes_conversations or (
        # The columns may hold turns.
        config.format == "prompt_completion"
        and not (config.prompt or config.completion)
    )
    if not conversations or tokenizer is None:
        return False
    with contextlib.suppress(UserError):  # raised when the rows are read
        chat = ChatRenderer(tokenizer, config.chat_template)
        return chat.reads_clock if what == "clock" else chat.reads_date
    return False


class TurnKeys:
    """Finds the keys of turns that a chat template does not read.

    A key that the template names may be that of something else: `name` of a function,
    `tools` of the conversation, `name` of the results of tools. So a conversation is
    rendered without it. What was once seen to change a text is read.
    """

    def __init__(self) -> None:
        self._read: set[tuple[str, str, bool]] = set()

    def unread(
        self,
        chat: ChatRenderer,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        keys: Collection[tuple[str, str]],
    ) -> set[str]:
        """Returns those of the keys that change nothing, as "field[].key".

        Args:
          chat: the renderer.
          messages: the turns.
          tools: the functions of the conversation.
          keys: fields of the row, and keys of their turns.
        """
        unread: set[str] = set()
        for field, key in sorted(keys):
            name = f"{field}[].{key}"
            if not chat.mentions(key, tools=bool(tools)):
                unread.add(name)
                continue
            roles = {m["role"] for m in messages if m.get(key)}
            ignored = {
                role
                for role in roles
                if not self._reads(chat, messages, tools, role, key)
            }
            some = ignored < roles
            unread |= {f"{name} ({role})" if some else name for role in ignored}
        return unread

    def _reads(
        self,
        chat: ChatRenderer,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        role: str,
        key: str,
    ) -> bool:
        """Whether the template reads a key of the turns of a role."""
        if (role, key, bool(tools)) in self._read:
            return True
        without = [
            {k: v for k, v in message.items() if k != key}
            if message["role"] == role
            else message
            for message in messages
        ]
        try:
            reads = chat.text(messages, tools=tools) != chat.text(without, tools=tools)
        except UserError:  # it needs the key, or the row is refused anyway
            reads = True
        if reads:
            self._read.add((role, key, bool(tools)))
        return reads


def select_answers(messages: list[dict[str, Any]], config: DataConfig) -> list[int]:
    """Returns the indices of the turns that `train_on`, `answers` and flags train."""
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    chosen = [-1] if config.supervised == "last" else config.answers
    if chosen is not None:
        count = len(turns)
        turns = sorted({turns[i] for i in chosen if -count <= i < count})
    return [turn for turn in turns if is_trained(messages[turn])]


def render_conversation(
    chat: ChatRenderer,
    config: DataConfig,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    where: str,
) -> tuple[list[Rendering], Counter[str]] | str:
    """Renders the conversation of a row, and compares the result with the row.

    Args:
      chat: the renderer.
      config: of the source.
      messages: the turns.
      tools: the functions of the row.
      where: location of the row, for messages.

    Returns:
      The examples, and phrases for the report with their counts; or the reason to drop
      the row.

    Raises:
      UserError: the template cannot render the row, or writes nothing of an answer.
    """
    if config.supervised == "all":
        if not all(map(is_trained, messages)):
            raise UserError(
                f"{where}: a turn is not to be trained (`train`, `weight`, ...), and "
                "`data.train_on` = 'all' trains every turn. Use "
                f"'{'assistant' if config.format == 'messages' else 'completion'}', "
                "or leave out the flag."
            )
        text = chat.text(messages, tools=tools, where=where)
        renderings = [Rendering(text, [], ())]
        answers = []
    else:
        answers = select_answers(messages, config)
        renderings = chat.examples(messages, answers=answers, tools=tools, where=where)
        roles = [message["role"] for message in messages]
        if not any(rendering.spans for rendering in renderings):
            if "assistant" not in roles:
                return "no assistant turn"
            if not answers:
                return "no assistant turn that is to be trained"
            return "assistant turns that the chat template does not mark"
    remarks = find_unwritten(
        messages,
        tools,
        renderings,
        where,
        allow_lost_answers=config.allow_lost_answers,
    )
    remarks[SPECIAL_TOKENS] = sum(map(chat.has_special, messages))
    if config.supervised != "all":
        ends = [
            chat.ends_special(rendering.text[start:end])
            for rendering in renderings
            if len(rendering.spans) == len(rendering.answers)
            for start, end in rendering.spans
        ]
        remarks[NO_END] = ends.count(False) if any(ends) else 0
        remarks[PROMPTED] = sum(rendering.prompted for rendering in renderings)
        remarks[EMPTY_ANSWER] = sum(_is_empty(messages[turn]) for turn in answers)
        remarks[
            "answers that are not trained (`train_on`, `answers` or flags of turns)"
        ] = roles.count("assistant") - len(answers)
        remarks[UNANSWERED] = roles[-1] != "assistant"
        if len(renderings) > 1:
            remarks[SPLIT] = 1
    return renderings, +remarks


def _is_empty(message: dict[str, Any]) -> bool:
    return not (message.get("content") or "").strip() and not message.get("tool_calls")
