"""Reads the conversation of a row: turns, roles, tool calls, tools, train flags.

Data sets spell conversations in many ways. Those that are known are read, and what was
recognised is noted for the report, because it is a guess.
"""

import re
from collections.abc import Mapping
from typing import Any

from qlora_jax.data.reasoning import REASONING_FIELDS
from qlora_jax.data.rows import (
    Reading,
    UnusableJsonError,
    fields_of,
    parse_json,
    to_json,
)
from qlora_jax.errors import UserError

_CONTAINERS = ("messages", "conversations", "conversation", "data")
# Roles that chat templates know, and what else they are called. The keys are lower
# case.
_ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    "ipython": "ipython",  # what the templates of Llama 3.1 call a tool
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
    "function": "tool",
}
# Turns of the assistant whose text is a call in JSON.
_CALL_ROLES = ("function_call", "tool_call")
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("instruction", "output")),
    *(("instruction", "response"), ("question", "answer"), ("question", "response")),
    *(("query", "response"), ("input", "output")),
)
"""Columns of a question and its answer, in the order in which they are looked for."""
# What an `instruction` may be given with.
_INPUTS = ("input", "context")

# Keys of a turn that say whether it is trained -> what its value means.
_TRAIN_FLAGS = {
    "train": True,
    "trainable": True,
    "weight": True,
    "loss": True,
    "loss_mask": True,
    "masked": False,
}
# Keys of a turn that are read here, or compared with what a template writes.
_TURN_KEYS = {"role", "content", "tool_calls", *REASONING_FIELDS, *_TRAIN_FLAGS}
_EMPTY = (None, "", [], {})


def to_messages(
    row: dict[str, Any],
    where: str,
    reading: Reading | None = None,
    *,
    field: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Returns the conversation of a row in the form that chat templates read.

    Args:
      row: `{"messages": [{"role", "content"}, ...]}`, likewise with the field
        `conversations`, `conversation` or `data` and turns of ShareGPT's `from` and
        `value`, and with an optional `system` string.
      where: location of the row ("file.jsonl:12"), for messages.
      reading: gets what was read and recognised.
      field: the field of the turns; None = the one of those that the row has.
      roles: role of the row -> role of the template, before those that are known. None
        leaves unknown roles as they are; with a table they are refused.

    Returns:
      A new list of `{"role": str, "content": str, ...}`; further keys (`tool_calls`,
      `name`, ...) are kept for the template. Arguments of calls that are JSON strings,
      as in OpenAI's API, are decoded, because templates encode them. An empty list of
      calls is left out. Text parts become one string.

    Raises:
      UserError: the field is missing or empty, has wrong types, an unknown role or
        parts that are not text.
    """
    reading = Reading() if reading is None else reading
    field = _container(row, where) if field is None else field
    turns = row.get(field)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = parse_json(turns)
        except ValueError as error:
            python = re.match(r"\[\s*\{\s*'", turns)
            raise UserError(
                f"{where}: `{field}` is not valid JSON: {error}."
                + " It is a list as Python prints it; write it by json.dumps."
                * bool(python)
            ) from error
        reading.recognise(f"`{field}` decoded from JSON")
    messages = read_turns(turns, field, where, reading, roles=roles)
    reading.recognise(f"conversations in `{field}`")
    system = _companion(row, "system", where)
    if system and messages[0]["role"] != "system":
        reading.recognise("`system` as the first turn", "system")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _companion(row: dict[str, Any], name: str, where: str) -> str:
    """Returns a text that belongs to a question or a conversation, or "".

    Raises:
      UserError: it is neither a string nor null or an empty list.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    if value is None or value in ([], {}):
        return ""
    raise UserError(
        f"{where}: field `{name}` belongs to the prompt and must be a string, got "
        f"{type(value).__name__}. Write it as text, or leave the field out."
    )


def has_conversation(row: dict[str, Any]) -> bool:
    """Returns whether one of the known fields holds a list, or a list in JSON."""
    values = (row.get(name) for name in _CONTAINERS)
    return any(
        isinstance(value, list)
        or (isinstance(value, str) and re.match(r"\s*\[\s*\{", value))
        for value in values
    )


def _container(row: dict[str, Any], where: str) -> str:
    """Returns the field that holds the conversation."""
    present = [name for name in _CONTAINERS if name in row]
    if not present:
        raise UserError(
            f"{where}: expected a conversation in one of "
            f"{', '.join(f'`{name}`' for name in _CONTAINERS)} (or in the field that "
            "`data.messages` names), or columns of a question and its answer, e.g. "
            f"`instruction` and `output`; the row has {fields_of(row)}. "
            + (
                "format='text' reads `text`."
                if "text" in row
                else "`data.prompt` and `data.completion` name other columns, e.g. "
                "'{my_question}' and '{my_answer}'."
            )
        )
    filled = [name for name in present if row[name]]
    # `data` is a common name of columns of another kind.
    lists = [name for name in filled if isinstance(row[name], list)] or filled
    if len(lists) > 1:
        raise UserError(
            f"{where}: the row has {' and '.join(f'`{name}`' for name in lists)}, and "
            "each may be its conversation. Name the one to read as `data.messages`."
        )
    return (lists or present)[0]


def read_turns(
    turns: Any,
    field: str,
    where: str,
    reading: Reading,
    *,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Reads a list of turns; arguments and errors as for `to_messages`."""
    reading.fields.add(field)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{where}: `{field}` must be a non-empty list of turns, got "
            f"{'an empty list' if turns == [] else type(turns).__name__}"
            + (f" with {fields_of(turns)}." if isinstance(turns, dict) else ".")
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}: turn {number} of `{field}`"
        if not isinstance(turn, dict):
            raise UserError(f"{at} must be an object, got {type(turn).__name__}.")
        content = turn.get("content", turn.get("value"))
        parts = content if isinstance(content, list) else []
        reading.nested |= {
            f"{field}[].content[].{key}"
            for part in parts
            if isinstance(part, dict)
            for key, value in part.items()
            if key not in ("type", "text") and value not in _EMPTY
        }
        turn = _read_turn(turn, at, reading, roles)
        reading.turn_keys |= {
            (field, key)
            for key, value in turn.items()
            if key not in _TURN_KEYS and value not in _EMPTY
        }
        if is_trained(turn, at) and turn["role"] != "assistant" and "train" in turn:
            raise UserError(
                f"{at} is to be trained (`train`), and it is of the role "
                f"{turn['role']!r}; only the assistant's turns are."
            )
        flags = [name for name in _TRAIN_FLAGS if name != "masked" and turn.get(name)]
        if flags and turn["role"] != "assistant":
            reading.recognise(
                f"`{flags[0]}` of turns that are not the assistant's has no effect"
            )
        messages.append(turn)
    return messages


def _read_turn(
    turn: dict[str, Any],
    at: str,
    reading: Reading,
    roles: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Returns a copy of a turn with `role` and string `content`."""
    turn = dict(turn)
    for name, sharegpt in (("role", "from"), ("content", "value")):
        if name not in turn and sharegpt in turn:
            turn[name] = turn.pop(sharegpt)
            reading.recognise(f"`{sharegpt}` of turns as `{name}`")
    role = turn.get("role")
    if not isinstance(role, str):
        raise UserError(
            f"{at} needs a string `role` (ShareGPT: `from`), it has {fields_of(turn)}."
        )
    if _is_call(role, roles):
        turn = _call_turn(turn, at)
    else:
        turn["role"] = _template_role(role, at, roles)
    if turn["role"] != role:
        reading.recognise(f"role {role!r} as {turn['role']!r}")
    if turn.get("function_call") and not turn.get("tool_calls"):
        turn = _legacy_call(turn, at)
        reading.recognise("`function_call` of turns as a call")
    content = turn.get("content")
    if isinstance(content, list):
        turn["content"] = _joined_parts(content, at)
        reading.recognise("text parts joined to one text")
    elif not isinstance(content, str) and not (
        content is None and turn.get("tool_calls")
    ):
        raise UserError(
            f"{at} ({turn['role']}) needs a string `content` (ShareGPT: `value`), "
            f"got {type(content).__name__}."
        )
    return _decode_calls(turn, at, reading)


def _is_call(role: str, roles: Mapping[str, str] | None) -> bool:
    return role.strip().lower() in _CALL_ROLES and role not in (roles or {})


def known_role(role: Any, roles: Mapping[str, str] | None = None) -> str | None:
    """Returns the role of the chat template for that of a turn; None if unknown.

    Args:
      role: of the turn.
      roles: role of the row -> role of the template, before those that are known.
    """
    if not isinstance(role, str):
        return None
    return (roles or {}).get(role) or _ROLES.get(role.strip().lower())


def _template_role(role: str, at: str, roles: Mapping[str, str] | None) -> str:
    known = known_role(role, roles)
    if known is not None:
        return known
    if roles is None:
        return role
    raise UserError(
        f"{at} has the role {role!r}; known are {', '.join((*_ROLES, *_CALL_ROLES))}. "
        f"Say what it is to the chat template, e.g. `data.roles` = {{{role!r}: "
        "'assistant'}; its own name leaves it as it is."
    )


def _call_turn(turn: dict[str, Any], at: str) -> dict[str, Any]:
    """Turns the JSON of a `function_call` turn into the assistant's `tool_calls`."""
    try:
        calls = parse_json(turn.get("content") or "")
    except (TypeError, ValueError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(
            f"{at} has the role {turn['role']!r}, whose text must be a call in JSON, "
            '{"name": ..., "arguments": {...}}, or a list of them. To train on its '
            f"text as it is, set `data.roles` = {{{turn['role']!r}: 'assistant'}}."
        )
    calls = [{"type": "function", "function": call} for call in calls]
    return turn | {"role": "assistant", "content": "", "tool_calls": calls}


def _legacy_call(turn: dict[str, Any], at: str) -> dict[str, Any]:
    """Turns the `function_call` of a turn, as in OpenAI's first API, into a call."""
    call = turn.pop("function_call")
    if not isinstance(call, dict) or "name" not in call:
        raise UserError(
            f"{at}: `function_call` must be a call, "
            f'{{"name": ..., "arguments": ...}}; got {call!r}.'
        )
    return turn | {"tool_calls": [{"type": "function", "function": call}]}


def _joined_parts(parts: list[Any], at: str) -> str:
    """Joins the text parts of a content, as templates of several modalities do.

    Raises:
      UserError: a part is not text.
    """
    texts = []
    for number, part in enumerate(parts, 1):
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise UserError(
                f"{at}: part {number} of its `content` is "
                + (
                    f"of the type {kind!r}, and only text is trained on. Remove it, or "
                    "leave the row out."
                    if kind != "text"
                    else 'not text; expected {"type": "text", "text": "..."}.'
                )
            )
        texts.append(text)
    return "".join(texts)


def to_pair(
    row: dict[str, Any],
    where: str,
    reading: Reading,
    *,
    roles: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """Returns a question and its answer as turns; None if no columns of them are known.

    Each is a string, or a list of turns as in TRL. An `input` or `context` follows the
    `instruction` on a new line. A `system` string is the first turn.

    Raises:
      UserError: one is a string and the other is not, or turns cannot be read; or what
        belongs to the question is not a string.
    """
    names = next((p for p in PAIRS if row.keys() >= {*p}), None)
    if names is None:
        return None
    question, answer = (row[name] for name in names)
    if isinstance(question, list) and isinstance(answer, list):
        prompt, completion = (
            read_turns(row[name], name, where, reading, roles=roles) for name in names
        )
        reading.recognise(f"turns of `{names[0]}` and, supervised, of `{names[1]}`")
        return prompt, completion
    for name in names:
        if not isinstance(row[name], str):
            raise UserError(
                f"{where}: `{names[0]}` and `{names[1]}` must be two strings, or two "
                f"lists of turns; `{name}` is {type(row[name]).__name__}."
            )
    columns = [names[0]]
    if names[0] == "instruction":
        # Empty where an instruction needs none.
        reading.fields.update(name for name in _INPUTS if name in row)
        columns += [name for name in _INPUTS if row.get(name) is not None]
    texts = (_companion(row, name, where) for name in columns)
    text = "\n".join(filter(None, texts))
    reading.recognise(
        f"{' and '.join(f'`{name}`' for name in columns)} as the user's turn, "
        f"`{names[1]}` as the assistant's",
        *(*columns, names[1]),
    )
    prompt = [{"role": "user", "content": text}]
    system = _companion(row, "system", where)
    if system:
        reading.recognise("`system` as the first turn", "system")
        prompt.insert(0, {"role": "system", "content": system})
    return prompt, [{"role": "assistant", "content": answer}]


def _decode_calls(turn: dict[str, Any], at: str, reading: Reading) -> dict[str, Any]:
    """Decodes the arguments of a turn's tool calls; drops an empty list of them.

    Calls that have `parameters`, as the models of the Llama 3 family write them, get
    `arguments`, which chat templates read.

    Raises:
      UserError: `tool_calls` is not a list, or holds what JSON does not have.
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
        if "arguments" not in call and isinstance(call.get("parameters"), dict | str):
            call = {**call, "arguments": call["parameters"]}
            del call["parameters"]
            reading.recognise("`parameters` of calls as `arguments`")
        arguments = call.get("arguments")
        if not isinstance(arguments, str):
            return call
        try:
            value = parse_json(arguments)
        except UnusableJsonError as error:
            raise UserError(f"{at}: `arguments` of a call: {error}.") from error
        except ValueError:
            value = None
        if isinstance(value, dict):
            return {**call, "arguments": value}
        # The template writes the string, most of them in quotes.
        reading.recognise("`arguments` of calls that are no JSON object, as a string")
        return call

    turn["tool_calls"] = [decoded(call) for call in calls]
    to_json(turn["tool_calls"], f"{at}: `tool_calls`")  # templates do so
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


def without_flags(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn without the flags that `is_trained` reads."""
    return {name: value for name, value in turn.items() if name not in _TRAIN_FLAGS}


def _decode_tool(tool: Any, where: str, reading: Reading | None) -> Any:
    """Returns a function of `tools`, decoded where it is JSON, or its parameters are.

    Raises:
      UserError: it is text that is not JSON.
    """
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return {**tool, "function": _decode_tool(tool["function"], where, reading)}
    try:
        if isinstance(tool, str):
            tool = parse_json(tool)
            phrase = "functions in `tools` decoded from JSON"
        elif isinstance(tool, dict) and _is_text(tool.get("parameters")):
            tool = {**tool, "parameters": parse_json(tool["parameters"])}
            phrase = "`parameters` of `tools` decoded from JSON"
        else:
            return tool
    except ValueError as error:
        raise UserError(
            f"{where}: a function in `tools`, or its `parameters`, is text and not "
            f"valid JSON: {error}. Write it as an object."
        ) from error
    if reading is not None:
        reading.recognise(phrase)
    return _decode_tool(tool, where, reading) if isinstance(tool, dict) else tool


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def tools_of(
    row: dict[str, Any], where: str, reading: Reading | None = None
) -> list[Any] | None:
    """Returns the `tools` of a row, a list or its JSON; None without any.

    A function in JSON, or with `parameters` in JSON, is decoded: an Arrow column cannot
    hold those of several functions.

    Raises:
      UserError: they are neither, or hold what JSON does not have.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise UserError(f"{where}: `tools` is not valid JSON: {error}.") from error
    if tools and not isinstance(tools, list):
        raise UserError(
            f"{where}: `tools` must be a list of functions, or one in JSON, got "
            f"{type(tools).__name__}."
        )
    tools = [_decode_tool(tool, where, reading) for tool in tools or ()]
    to_json(tools, f"{where}: `tools`")  # templates do so
    if reading is not None:
        reading.fields.add("tools")
    return tools or None
