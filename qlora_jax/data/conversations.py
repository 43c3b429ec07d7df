"""Reads the conversation of a row: turns, roles, tool calls, tools, train flags."""

import json
from typing import Any

from qlora_jax.data.rows import fields_of
from qlora_jax.errors import UserError

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}

# Keys of a turn that say whether it is trained -> what its value means.
_TRAIN_FLAGS = {
    "train": True,
    "trainable": True,
    "weight": True,
    "loss": True,
    "loss_mask": True,
    "masked": False,
}


def to_messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the `messages` of a row, converting ShareGPT `conversations`.

    Args:
      row: `{"messages": [{"role", "content"}, ...]}`, or
        `{"conversations": [{"from", "value"}, ...]}` with an optional `system` string.
      where: location of the row ("file.jsonl:12"), for messages.

    Returns:
      A new list of `{"role": str, "content": str, ...}`; further keys (`tool_calls`,
      `name`, ...) are kept for the template. Arguments of calls that are JSON strings,
      as in OpenAI's API, are decoded, because templates encode them. An empty list of
      calls is left out.

    Raises:
      UserError: the field is missing or empty, has wrong types or an unknown speaker.
    """
    field = next((f for f in ("messages", "conversations") if f in row), None)
    if field is None:
        raise UserError(
            f"{where}: expected `messages` (or ShareGPT `conversations`), "
            f"the row has {fields_of(row)}."
        )
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{where}: `{field}` must be a non-empty list of turns, got "
            f"{'an empty list' if turns == [] else type(turns).__name__}."
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}: turn {number} of `{field}`"
        if not isinstance(turn, dict):
            raise UserError(f"{at} must be an object, got {type(turn).__name__}.")
        if "role" not in turn and "from" in turn:
            speaker = turn["from"]
            if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
                raise UserError(
                    f"{at} is `from` {speaker!r}; known speakers are "
                    f"{', '.join(_SHAREGPT_ROLES)}. Rename it, or write the row with "
                    "`messages`, whose roles are passed to the template unchanged."
                )
            turn = {"role": _SHAREGPT_ROLES[speaker], "content": turn.get("value")}
        if not isinstance(turn.get("role"), str):
            raise UserError(
                f"{at} needs a string `role` (ShareGPT: `from`), it has "
                f"{fields_of(turn)}."
            )
        content = turn.get("content")
        if not isinstance(content, str) and not (
            content is None and turn.get("tool_calls")
        ):
            raise UserError(
                f"{at} ({turn['role']}) needs a string `content` (ShareGPT: `value`), "
                f"got {type(content).__name__}."
            )
        turn = _decode_calls(dict(turn), at)
        if is_trained(turn, at) and turn["role"] != "assistant" and "train" in turn:
            raise UserError(
                f"{at} is to be trained (`train`), and it is of the role "
                f"{turn['role']!r}; only the assistant's turns are."
            )
        messages.append(turn)
    system = row.get("system")
    if field == "conversations" and isinstance(system, str) and system:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    return messages


def _decode_calls(turn: dict[str, Any], at: str) -> dict[str, Any]:
    """Decodes the arguments of a turn's tool calls; drops an empty list of them.

    Raises:
      UserError: `tool_calls` is not a list.
    """
    if not turn.get("tool_calls"):
        turn.pop("tool_calls", None)
        return turn
    calls = turn["tool_calls"]
    if not isinstance(calls, list):
        raise UserError(f"{at}: `tool_calls` must be a list, got {calls!r}.")

    def decoded(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": decoded(call["function"])}
        arguments = call.get("arguments")
        if not isinstance(arguments, str):
            return call
        try:
            value = json.loads(arguments)
        except ValueError:
            return call  # not JSON: the template writes the string
        return {**call, "arguments": value} if isinstance(value, dict) else call

    turn["tool_calls"] = [decoded(call) for call in calls]
    return turn


def is_trained(turn: dict[str, Any], at: str = "turn") -> bool:
    """Returns whether the flags of a turn (`weight`, `train`, ...) leave it trained.

    Raises:
      UserError: a flag that is neither true nor false, 0 nor 1; or two that disagree.
    """
    wishes = {}
    for name, meaning in _TRAIN_FLAGS.items():
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # True and False too
            raise UserError(
                f"{at}: `{name}` must be true or false (1 or 0), got {value!r}. A "
                "weight between them is not supported."
            )
        wishes[name] = bool(value) == meaning
    if len(set(wishes.values())) > 1:
        raise UserError(
            f"{at}: {' and '.join(f'`{name}`' for name in wishes)} disagree on whether "
            "the turn is trained."
        )
    return all(wishes.values())


def tools_of(row: dict[str, Any], where: str) -> list[Any] | None:
    """Returns the `tools` of a row, a list or its JSON; None without any.

    Raises:
      UserError: they are neither.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where}: `tools` is not valid JSON: {error}.") from error
    if tools and not isinstance(tools, list):
        raise UserError(
            f"{where}: `tools` must be a list of functions, or one in JSON, got "
            f"{type(tools).__name__}."
        )
    return tools or None
