"""Conversations as text, with the characters the assistant wrote marked.

The one idea: which part of a rendered conversation is the assistant's is known at the
moment it is rendered, so no marker is ever searched for in the text or in the tokens.

A template that has `{% generation %}` blocks says itself what the assistant writes: it
is rendered with a character at each end of every such block, which are taken out again.
Any other is rendered on growing prefixes of the conversation; what turn `i` adds after
the generation prompt is exactly what a model answering at that point has to write,
end-of-turn token included. This needs a template under which an earlier turn reads the
same whatever follows it. That is checked, and a template that rewrites earlier turns is
refused instead of being labelled wrongly.
"""

import re
from pathlib import Path
from typing import Any

from qlora_jax.data.rows import fields_of
from qlora_jax.errors import UserError

# Templates of the Llama 3 family print today's date unless they are given one. Tokens
# must not change between the day a run starts and the day it continues, so they are
# given the date those templates fall back to themselves.
_DATE = "26 Jul 2024"

# What Python raises inside a template when a row has not the shape it expects, e.g.
# `content` null where text is joined to it.
_DATA_ERRORS = (TypeError, ValueError, LookupError, AttributeError)

# `{% generation %}`, `{%- endgeneration -%}` and the like.
_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Unicode's private use area: characters that mean nothing to anyone.
_PRIVATE = range(0xE000, 0xF8FF)

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


def to_messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the `messages` of a row, converting ShareGPT `conversations`.

    Args:
      row: `{"messages": [{"role", "content"}, ...]}`, or
        `{"conversations": [{"from", "value"}, ...]}` with an optional `system` text.
      where: the row's place ("file.jsonl:12"), for messages.

    Returns:
      A new list of `{"role": str, "content": str, ...}`; further keys (`tool_calls`,
      `name`, ...) are kept for the template.

    Raises:
      UserError: no such field, wrong types, an unknown speaker, no turn at all.
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
                    "`messages`, whose roles go to the template as they are."
                )
            turn = {"role": _SHAREGPT_ROLES[speaker], "content": turn.get("value")}
        if not isinstance(turn.get("role"), str):
            raise UserError(
                f"{at} needs a text `role` (ShareGPT: `from`), it has "
                f"{fields_of(turn)}."
            )
        content = turn.get("content")
        if not isinstance(content, str) and not (
            content is None and turn.get("tool_calls")
        ):
            raise UserError(
                f"{at} ({turn['role']}) needs a text `content` (ShareGPT: `value`), "
                f"got {type(content).__name__}."
            )
        messages.append(dict(turn))
    system = row.get("system")
    if field == "conversations" and isinstance(system, str) and system:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    return messages


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template (or a file's).

    Args:
      tokenizer: a `transformers` tokenizer.
      template_path: a Jinja chat template file; None uses the tokenizer's own.

    Raises:
      UserError: neither gives a template, or the file cannot be read.
    """

    def __init__(self, tokenizer: Any, template_path: str | None = None):
        self._tokenizer = tokenizer
        self._template: str | None = None
        if template_path is not None:
            try:
                self._template = Path(template_path).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"`data.chat_template`: cannot read {template_path}: {error}"
                ) from error
        elif not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "This tokenizer has no chat template, which format='messages' needs. "
                "Base models ship none: take `chat_template.jinja` (or the "
                "`chat_template` of `tokenizer_config.json`) from the instruct model "
                "of the same family, save it as a file, and give its path as "
                "`data.chat_template`; or write the rows as format="
                "'prompt_completion'."
            )
        specials: set[str] = set(getattr(tokenizer, "all_special_tokens", ()))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        specials.update(str(token) for token in added.values())
        self._specials = tuple(s for s in specials if s.strip())
        source = self._template or getattr(tokenizer, "chat_template", None)
        if isinstance(source, dict):  # several, by name; transformers takes this one
            source = source.get("default")
        self._marked = source if source and _MARK.search(source) else None
        self._check_syntax(template_path)

    @property
    def has_marks(self) -> bool:
        """Whether the template says itself what the assistant writes."""
        return self._marked is not None

    def text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        where: str = "conversation",
    ) -> str:
        """Renders a conversation to text, with the template's own BOS and no other.

        Raises:
          UserError: the template refuses the conversation.
        """
        return self._render(
            messages, self._template, add_generation_prompt, tools, where
        )

    @property
    def writes_generation_prompt(self) -> bool:
        """Whether the template writes something where an answer is asked for."""
        turns = [{"role": "user", "content": "a"}]
        try:
            asked = self.text(turns, add_generation_prompt=True)
            return asked != self.text(turns)
        except UserError:  # it takes other turns
            return True

    def _check_syntax(self, template_path: str | None) -> None:
        """Refuses once what is wrong with the template for all conversations."""
        import jinja2

        try:
            self._apply([{"role": "user", "content": ""}], self._template, False, None)
        except jinja2.TemplateSyntaxError as error:
            what = (
                "The tokenizer's chat template"
                if template_path is None
                else f"`data.chat_template`: {template_path}"
            )
            why = str(error.message).rstrip(".")
            raise UserError(
                f"{what} is no valid Jinja template: line {error.lineno}: {why}. Mend "
                "it, or give the path of another one as `data.chat_template`."
            ) from error
        except (jinja2.TemplateError, *_DATA_ERRORS):
            pass  # it may well take the turns of the data

    def _apply(
        self,
        messages: list[dict[str, Any]],
        template: str | None,
        add_generation_prompt: bool,
        tools: list[Any] | None,
    ) -> str:
        return self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            date_string=_DATE,
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
        except (jinja2.TemplateError, *_DATA_ERRORS) as error:
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise UserError(
                f"{where}: the chat template refuses the turns ({roles}): {error}"
            ) from error

    def spans(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        where: str = "conversation",
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation and marks what the assistant wrote.

        With a template that has generation marks, the spans are its blocks. Without,
        a span starts after the generation prompt and ends after the end-of-turn token.
        White space that the template puts after that token (ChatML's newline) is left
        out, since a model stops at the token and never writes it; where a turn ends
        without a special token, the span runs to the turn's end.

        Returns:
          The rendered text and (start, end) character spans: the template's blocks
          that hold anything, or one per assistant turn.

        Raises:
          UserError: the template refuses the conversation, renders a turn
            differently when others follow, or has marks that cannot be followed.
        """
        if self._marked is not None:
            return self._spans_by_marks(messages, tools, where)

        def prefix(turns: int, prompt: bool) -> str:
            return self.text(
                messages[:turns],
                add_generation_prompt=prompt,
                tools=tools,
                where=where,
            )

        full = prefix(len(messages), False)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = prefix(turn, True)
            last = turn + 1 == len(messages)
            after = full if last else prefix(turn + 1, False)
            if not full.startswith(after):
                raise UserError(
                    f"{where}: the chat template writes turn {turn + 1} differently "
                    "once other turns follow it (templates of reasoning models strip "
                    "earlier answers this way), so the text of that answer cannot be "
                    "supervised. Give `data.chat_template` a Jinja file that writes "
                    "every turn the same wherever it stands, or split the "
                    "conversation into rows with one answer each."
                )
            if not after.startswith(before):
                raise UserError(
                    f"{where}: the chat template's generation prompt "
                    f"({before[-40:]!r}) is not how it starts the assistant's turn "
                    f"{turn + 1}, so where the answer begins is not defined. Give "
                    "`data.chat_template` a Jinja file whose generation prompt is "
                    "the beginning of an assistant turn."
                )
            start = len(before)
            stop = len(after[start:].rstrip()) + start
            ends_special = self._specials and after[start:stop].endswith(self._specials)
            spans.append((start, stop if ends_special else len(after)))
        return full, spans

    def _spans_by_marks(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        assert self._marked is not None
        text = self.text(messages, tools=tools, where=where)
        taken = set(text)
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        opening, closing = next(free), next(free)

        def mark(found: re.Match[str]) -> str:
            # A block stands where the tag stood, so that white space beside it is
            # trimmed as before.
            character = closing if found[2] else opening
            return (
                f'{{%{found[1]} if true %}}{{{{ "{character}" }}}}'
                f"{{% endif {found[3]}%}}"
            )

        template = _MARK.sub(mark, self._marked)
        marked = self._render(messages, template, False, tools, where)
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        length, start = 0, None
        for piece in re.split(f"([{opening}{closing}])", marked):
            if piece == opening and start is None:
                start = length
            elif piece == closing and start is not None:
                if start < length:
                    spans.append((start, length))
                start = None
            elif piece in (opening, closing):
                start = -1
                break
            else:
                pieces.append(piece)
                length += len(piece)
        if start is not None or "".join(pieces) != text:
            raise UserError(
                f"{where}: the chat template's `{{% generation %}}` blocks do not mark "
                "its text plainly (they are nested, or what is inside is changed "
                "afterwards). Give `data.chat_template` a Jinja file whose blocks "
                "stand around what the assistant writes, or that has none."
            )
        return text, spans
