"""Renders conversations with a chat template and marks what the assistant wrote.

The spans of the assistant are known while a conversation is rendered, so nothing is
searched for in the text or in the tokens.

A template with `{% generation %}` blocks marks them itself: it is rendered with a
private character at both ends of every block, and the characters are removed again.
Any other template is rendered on growing prefixes of the conversation: what turn `i`
adds after the generation prompt is exactly what a model has to write there, end-of-turn
token included. This needs a template that renders an earlier turn the same whatever
follows it. That is checked: a template that rewrites earlier turns is refused, because
its labels would be wrong.
"""

import re
from pathlib import Path
from typing import Any

from qlora_jax.data.conversations import is_trained
from qlora_jax.errors import UserError

# Templates of the Llama 3 family print today's date by default. Tokens must not change
# between the day a run starts and the day it resumes, so the date is fixed to the one
# that those templates use as their own fallback.
_DATE = "26 Jul 2024"

# What Python raises inside a template for a row of an unexpected shape, e.g. where
# text is joined to a null `content`.
_DATA_ERRORS = (TypeError, ValueError, LookupError, AttributeError)

# `{% generation %}`, `{%- endgeneration -%}` and the other spellings.
_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Unicode's private use area: real text rarely holds these characters.
_PRIVATE = range(0xE000, 0xF8FF)


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer or a file.

    Args:
      tokenizer: a `transformers` tokenizer.
      template_path: a Jinja chat template; None uses the tokenizer's own.

    Raises:
      UserError: there is no template, or it cannot be read or parsed.
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
        # One that is white space is stripped from the end of a turn before the
        # comparison.
        self._specials = tuple(s for s in specials if s.strip())
        source = self._template or getattr(tokenizer, "chat_template", None)
        if isinstance(source, dict):  # several by name: transformers uses `default`
            source = source.get("default")
        self._marked = source if source and _MARK.search(source) else None
        self._check_syntax(template_path)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks the assistant's text with `{% generation %}`."""
        return self._marked is not None

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
        return self._render(
            messages, self._template, add_generation_prompt, tools, where
        )

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
            self._apply([{"role": "user", "content": ""}], self._template, False, None)
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
        except (jinja2.TemplateError, *_DATA_ERRORS):
            pass  # this template needs other turns; those of the data may fit

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
                f"{where}: the chat template cannot render the turns ({roles}): {error}"
            ) from error

    def spans(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        where: str = "conversation",
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation and marks what the assistant wrote.

        With generation marks, the spans are the marked blocks. Without, a span starts
        after the generation prompt and ends after the end-of-turn token. White space
        that the template writes after that token (ChatML's newline) is left out,
        because a model stops at the token and never writes it; where a turn ends
        without a special token, the span runs to the end of the turn.

        Turns that their flags exclude (`is_trained`) have no span.

        Returns:
          The rendered text and (start, end) character spans: the marked blocks that
          are not empty, or one span per assistant turn.

        Raises:
          UserError: the template cannot render the conversation, renders a turn
            differently when others follow, or has marks that cannot be followed.
        """
        if self._marked is not None:
            return self._spans_by_marks(messages, tools, where)
        return self._spans_by_prefixes(messages, tools, where)

    def _spans_by_prefixes(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        def prefix(turns: int, prompt: bool) -> str:
            return self._render(messages[:turns], self._template, prompt, tools, where)

        full = prefix(len(messages), False)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or not is_trained(message):
                continue
            # What stands between `before` and `after` is what a model writes for this
            # turn.
            last = turn + 1 == len(messages)
            after = full if last else prefix(turn + 1, False)
            before = prefix(turn, True) if turn else self._opening(after, tools, where)
            if not full.startswith(after):
                raise UserError(
                    f"{where}: the chat template writes turn {turn + 1} differently "
                    "once other turns follow it (templates of reasoning models strip "
                    "earlier answers this way), so the text of that answer cannot be "
                    "supervised. Give `data.chat_template` a Jinja file that writes "
                    "a turn the same wherever it occurs, or split the conversation "
                    "into rows with one answer each."
                )
            if not after.startswith(before):
                raise UserError(
                    f"{where}: the chat template's generation prompt "
                    f"({before[-40:]!r}) is not how it starts the assistant's turn "
                    f"{turn + 1}, so where the answer begins is not defined. Give "
                    "`data.chat_template` a Jinja file whose generation prompt is "
                    "the beginning of an assistant turn."
                )
            # [start, stop) in the characters of `full`, of which `after` is a prefix.
            start = len(before)
            stop = len(after[start:].rstrip()) + start
            ends_special = self._specials and after[start:stop].endswith(self._specials)
            spans.append((start, stop if ends_special else len(after)))
        return full, spans

    def _opening(self, after: str, tools: list[Any] | None, where: str) -> str:
        """Returns what stands before the answer that opens a conversation.

        Few templates render an empty conversation, so the generation prompt is what it
        adds to a question, and its first occurrence is looked for in the text.

        Args:
          after: the text up to the end of the answer.
          tools: as for `spans`.
          where: as for `spans`.
        """
        question = [{"role": "user", "content": "a"}]
        without, prompted = (
            self._render(question, self._template, prompt, tools, where)
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

    def _spans_by_marks(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        assert self._marked is not None
        text = self.text(messages, tools=tools, where=where)
        used = set(text)
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        opening, closing = next(free), next(free)

        def mark(tag: re.Match[str]) -> str:
            # A block tag replaces the tag, so that Jinja trims the white space around
            # it as before.
            character = closing if tag[2] else opening
            return (
                f'{{%{tag[1]} if true %}}{{{{ "{character}" }}}}{{% endif {tag[3]}%}}'
            )

        template = _MARK.sub(mark, self._marked)
        marked = self._render(messages, template, False, tools, where)
        pieces: list[str] = []
        blocks: list[tuple[int, int]] = []
        length, start = 0, None
        for piece in re.split(f"([{opening}{closing}])", marked):
            if piece == opening and start is None:
                start = length
            elif piece == closing and start is not None:
                blocks.append((start, length))
                start = None
            elif piece in (opening, closing):  # nested or unbalanced
                start = -1
                break
            else:
                pieces.append(piece)
                length += len(piece)
        # A filter of the template (`trim`, `length`) may have seen the marks and have
        # changed the rest.
        if start is not None or "".join(pieces) != text:
            raise UserError(
                f"{where}: the chat template's `{{% generation %}}` blocks do not mark "
                "its text plainly (they are nested, or their content is changed "
                "afterwards). Give `data.chat_template` a Jinja file whose blocks "
                "enclose what the assistant writes, or that has none."
            )
        trained = [is_trained(m) for m in messages if m["role"] == "assistant"]
        if not all(trained):
            if len(blocks) != len(trained):
                raise UserError(
                    f"{where}: the chat template marks {len(blocks)} blocks for "
                    f"{len(trained)} turns of the assistant, so the turns that are not "
                    "to be trained cannot be told. Leave out their flags, or mark one "
                    "block a turn."
                )
            blocks = [block for block, t in zip(blocks, trained, strict=True) if t]
        return text, [(start, end) for start, end in blocks if start < end]
