"""Rows to strings with supervised character spans, by format."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.conversations import (
    has_conversation,
    to_messages,
    to_pair,
    tools_of,
    without_flags,
)
from qlora_jax.data.rendering import TurnKeys, plain_row, render_conversation
from qlora_jax.data.rows import Reading, text_of, to_json
from qlora_jax.data.text_formats import alpaca_texts, field_text, response_spans
from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segmented:
    """A string and its supervised character spans; None supervises all of it.

    Attributes:
      text: the string.
      spans: (start, end) of its supervised parts, ascending.
      complete: whether a chat template wrote it, with BOS and ends of turns.
      remarks: what was lost or changed on the way from the row, and how often.
    """

    text: str
    spans: list[tuple[int, int]] | None = None
    complete: bool = False
    remarks: Counter[str] = dataclasses.field(default_factory=Counter)


class Segmenter:
    """Builds the strings of the rows of one source.

    Args:
      config: the source and how to read it.
      tokenizer: its chat template writes conversations.

    Raises:
      UserError: the format needs a chat template and there is none.
    """

    def __init__(self, config: DataConfig, tokenizer: Any):
        self._config, self._tokenizer = config, tokenizer
        self._chat: ChatRenderer | None = None
        self._with_variables: dict[str, ChatRenderer] = {}
        self._turn_keys = TurnKeys()
        if config.writes_conversations:
            self._chat = self._make_renderer()
        builders: dict[str, _Builder] = {
            "text": self._text,
            "prompt_completion": self._prompt_completion,
            "alpaca": self._alpaca,
            "messages": self._messages,
        }
        self._build = builders[config.format]

    @property
    def assistant_mask(self) -> str | None:
        """How the assistant's text is located; `DataReport.assistant_mask`."""
        if self._config.response_part is not None:
            return "markers"
        if self._chat is None or self._config.supervised == "all":
            return None
        return "template" if self._chat.has_marks else "renderer"

    def segment(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        """Returns the strings of a row, or the reason to drop the row.

        Args:
          where: location of the row, for messages.
          row: the fields.
          reading: gets what was read and recognised.

        Raises:
          UserError: the row cannot be used.
        """
        return self._build(where, row, reading)

    def _text(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        config = self._config
        document = field_text(row, where, "text", config.text, reading)
        if not document:
            return "empty text"
        if config.instruction_part is None or config.response_part is None:
            return [Segmented(document)]
        spans, found = response_spans(
            document, config.instruction_part, config.response_part
        )
        if not found:
            return "no `data.response_part` in the text"
        if not spans:
            return "no text after `data.response_part`"
        if config.instruction_part not in document:
            reading.recognise("no `data.instruction_part` in the text")
        return [Segmented(document, spans)]

    def _alpaca(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        prompt, completion = alpaca_texts(row, where, reading)
        return _answered(prompt, completion, self._config)

    def _prompt_completion(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        config = self._config
        if not (config.prompt or config.completion) and isinstance(
            row.get("completion"), list
        ):
            return self._conversation(where, row, reading)
        if config.writes_conversations:
            raise UserError(
                "`data.chat_template`, `data.chat_template_kwargs` and `data.roles` "
                "are for conversations, and the prompt and completion of the rows are "
                "strings, which are trained on as they are. With format='messages' the "
                "chat template writes them as the turns of user and assistant; else "
                "leave these settings out."
            )
        prompt = field_text(row, where, "prompt", config.prompt, reading)
        completion = field_text(row, where, "completion", config.completion, reading)
        return _answered(prompt, completion, config)

    def _messages(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        return self._conversation(where, row, reading)

    def _turns(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[dict[str, Any]]:
        """Returns the turns of a row; those of a prompt are not trained."""
        config = self._config
        roles = config.roles or {}
        if config.prompt is not None:
            question, answer = (
                text_of(row, where, name, getattr(config, name), reading)
                for name in ("prompt", "completion")
            )
            return [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        if config.messages is None and not has_conversation(row):
            pair = to_pair(row, where, reading, roles=roles)
            if pair is not None:
                prompt, completion = pair
                # The turns of a prompt are context, even those of the assistant.
                untrained = [
                    without_flags(turn) | {"train": False}
                    if turn["role"] == "assistant"
                    else turn
                    for turn in prompt
                ]
                return (prompt if config.supervised == "all" else untrained) + (
                    completion
                )
        return to_messages(row, where, reading, field=config.messages, roles=roles)

    def _conversation(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> list[Segmented] | str:
        config = self._config
        chat, unread = self._renderer(where, row, reading)
        row, changes = plain_row(row, where, config.roles)
        if unread:
            changes[_UNREAD_VARIABLES] += len(unread)
        turns = self._turns(where, row, reading)
        tools = tools_of(row, where, reading)
        reading.nested |= self._turn_keys.unread(chat, turns, tools, reading.turn_keys)
        rendered = render_conversation(chat, config, turns, tools, where)
        if isinstance(rendered, str):
            return rendered
        renderings, remarks = rendered
        whole = config.supervised == "all"
        examples = [
            Segmented(r.text, None if whole else r.spans, complete=True)
            for r in renderings
        ]
        examples[0].remarks.update(changes + remarks)
        return examples

    def _make_renderer(self) -> ChatRenderer:
        config = self._config
        renderer = ChatRenderer(self._tokenizer, config.chat_template, config.date)
        variables = config.chat_template_kwargs
        if not variables:
            return renderer
        unread = [name for name in variables if not renderer.mentions(name)]
        if unread:
            raise UserError(
                f"`data.chat_template_kwargs`: the chat template does not read "
                f"{', '.join(f'`{name}`' for name in unread)}. Correct the name, or "
                "leave it out."
            )
        return renderer.with_variables(variables)

    def _renderer(
        self, where: str, row: dict[str, Any], reading: Reading
    ) -> tuple[ChatRenderer, list[str]]:
        """Returns the renderer of a row, and its variables that are not read."""
        if self._chat is None:  # rows of turns under format `prompt_completion`
            self._chat = self._make_renderer()
        variables = row.get("chat_template_kwargs")
        reading.fields.add("chat_template_kwargs")
        if not variables:
            return self._chat, []
        if not isinstance(variables, dict):
            raise UserError(
                f"{where}: `chat_template_kwargs` must be an object of variables for "
                f"the chat template, got {type(variables).__name__}."
            )
        reading.recognise("variables of the chat template in `chat_template_kwargs`")
        key = to_json(variables, f"{where}: `chat_template_kwargs`")
        if key not in self._with_variables:
            try:
                renderer = self._chat.with_variables(variables)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            self._with_variables[key] = renderer
        unread = [name for name in variables if not self._chat.mentions(name)]
        return self._with_variables[key], unread


_UNREAD_VARIABLES = (
    "variables in `chat_template_kwargs` that the chat template does not read"
)
_Builder = Callable[[str, dict[str, Any], Reading], list[Segmented] | str]


def _answered(
    prompt: str, completion: str, config: DataConfig
) -> list[Segmented] | str:
    """Returns a prompt with its completion, which is supervised."""
    if not completion:
        return "empty completion"
    text = prompt + completion
    if config.supervised == "all":
        return [Segmented(text)]
    return [Segmented(text, [(len(prompt), len(text))])]
