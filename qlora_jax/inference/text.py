"""Text in and text out: checks of the inputs, streamed text, chat prompts.

The inputs of `Model` are checked here, because an error of NumPy, JAX or the tokenizer
further in would be about something else.

Text is streamed in pieces, and a piece is emitted only when later tokens cannot change
it: a token may be part of a character, and the last characters may be the beginning of
a stop string. Such characters are held back until the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int32

from qlora_jax.data import (
    ChatRenderer,
    Segmented,
    check_encodable,
    to_messages,
    tokenize,
    tools_of,
)
from qlora_jax.errors import UserError
from qlora_jax.inference.decode import Decoding

# --- Inputs ---


def token_array(tokens: Any, vocab_size: int) -> Int32[Array, "B T"]:
    """Converts token ids to an array.

    Args:
      tokens: an array of integers, or nested lists of one length.
      vocab_size: of the model.

    Raises:
      UserError: not token ids, or ids outside the vocabulary, whose embedding would be
        NaN (unchecked if `tokens` is traced).
    """
    if isinstance(tokens, str) or _begins_with(tokens, str):
        raise UserError(
            f"`tokens` must be token ids, got text ({tokens!r:.60}). The tokenizer "
            'gives them: `model.logits([model.tokenizer(text)["input_ids"]])`.'
        )
    array = _integers(tokens)
    if array is None or array.ndim != 2:
        raise UserError(
            "`tokens` must be token ids of shape [B, T], one row per text and all rows "
            f"of the same length, got {_describe(tokens, array)}. Put a single text in "
            "a list; pad shorter rows with any id, and give `attention_mask`, with 0 "
            "there and 1 elsewhere."
        )
    if isinstance(array, Tracer) or not array.size:
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"`tokens` has {low if low < 0 else high}, and the model has {vocab_size} "
            f"tokens (0 to {vocab_size - 1}). Is it the tokenizer of another model?"
        )
    return array


def per_token_array(
    name: str, value: Any, shape: tuple[int, ...]
) -> Int32[Array, "B T"]:
    """Converts a mask, positions or segments of tokens to an array.

    Args:
      name: of the argument.
      value: an array of integers or booleans, or nested lists.
      shape: of the tokens; a single row is broadcast to all.

    Raises:
      UserError: not integers, or another shape.
    """
    array = _integers(value)
    if array is None or array.shape not in (shape, (1, *shape[1:])):
        raise UserError(
            f"`{name}` must be integers of the shape of `tokens`, {list(shape)}, got "
            f"{_describe(value, array)}."
        )
    return array


def check_text(prompt: Any) -> None:
    """Raises if a prompt is not a string.

    Raises:
      UserError: it is something else.
    """
    if isinstance(prompt, str):
        return
    raise UserError(
        f"a prompt must be a string, got {prompt!r:.60}. Token ids are continued by "
        "`qlora_jax.generate_tokens(model.module, model.variables, rows, "
        "max_new_tokens=...)`."
    )


def check_turns(messages: Any) -> None:
    """Raises if a conversation is not a list of turns.

    Raises:
      UserError: it is something else.
    """
    if not isinstance(messages, (str, Mapping)) and all(
        isinstance(turn, Mapping) for turn in messages
    ):
        return
    raise UserError(
        "`messages` must be a list of turns, each with `role` and `content`, got "
        f'{messages!r:.60}. One question is [{{"role": "user", "content": "..."}}].'
    )


def _begins_with(value: Any, kind: type) -> bool:
    """Whether the first item of nested lists is of a type."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, kind)


def _integers(value: Any) -> Array | None:
    """Returns an int32 array; None for anything but integers or booleans."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return None
    integral = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool
    # An empty list becomes float32: no number in it is wrong.
    return array.astype(jnp.int32) if integral or not array.size else None


def _describe(value: Any, array: Array | None) -> str:
    """Describes a wrong value for an error message."""
    if array is not None:
        return f"shape {list(array.shape)}"
    if isinstance(value, (list, tuple)):
        rows = [len(row) for row in value if isinstance(row, (list, tuple))]
        if len(rows) == len(value) and len(set(rows)) > 1:
            return f"rows of {', '.join(map(str, rows[:8]))} tokens"
    dtype = getattr(value, "dtype", None)
    return f"{value!r:.60}" if dtype is None else f"an array of {dtype}"


# --- Streamed text ---

# Tokens of the prompt that are decoded with the continuation: they decide whether its
# first token starts with a space.
_CONTEXT_TOKENS = 8
# What a decoder writes for bytes that are not a character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns the tokens of a row into text incrementally.

    Incomplete characters and special tokens are left out. Spaces stay as the tokens
    have them: `clean_up_tokenization_spaces` would change text that was emitted.

    Args:
      tokenizer: a `transformers` tokenizer.
      prompt: the tokens that are continued.
      stop: strings that end the continuation and are left out of it.
      strip: leave out white space at both ends.

    Attributes:
      text: what was emitted so far.
      stopped: whether one of `stop` occurred.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        strip: bool = False,
    ) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop, self._strip = tokenizer, tuple(stop), strip
        # Decoded once with the prompt's end, which is cut off again: the same tokens
        # decode differently at the start of a string.
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        # A character that the prompt leaves incomplete belongs to the continuation.
        self._context = self._decode().rstrip(_INCOMPLETE)

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Takes new tokens; returns the text that is final now and was not before.

        Args:
          tokens: new tokens of the row.
          last: none will follow, so nothing is held back.
        """
        self._tokens += tokens
        # All tokens are decoded every time: a decoder of a single token knows neither
        # its leading space nor the bytes of a character before it.
        text = self._decode().removeprefix(self._context).rstrip(_INCOMPLETE)
        # Of several stop strings the one that is complete first counts, so that the
        # result does not depend on how the tokens are split into calls.
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped = True
            text = text[: min(ends)[1]]
        elif not last:
            text = text[: len(text) - _partial_stop(text, self._stop)]
        if self._strip:
            text = text.strip()
        # An incomplete character makes some decoders replace complete ones before it
        # too; emitted text is never taken back.
        piece = text[len(self.text) :] if text.startswith(self.text) else ""
        self.text += piece
        return piece


def _partial_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    # The longest such end is held back: it is a stop string if the next tokens complete
    # it.
    longest = max(map(len, stop), default=0)
    return next(
        (
            n
            for n in range(min(longest, len(text)), 0, -1)
            if any(s.startswith(text[-n:]) for s in stop)
        ),
        0,
    )


class TextStream:
    """A continuation that is being generated: iterate over it for pieces of text.

    Attributes:
      text: the text so far.
      tokens: the tokens so far, an end token included.
      finish_reason: "stop" (an end token or stop string), "length" (`max_new_tokens`),
        or None as long as it has not ended.
    """

    def __init__(self, decoding: Decoding, detokenizer: Detokenizer) -> None:
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._decoding, self._detokenizer = decoding, detokenizer

    @property
    def text(self) -> str:
        """The text so far."""
        return self._detokenizer.text

    def __iter__(self) -> Iterator[str]:
        """Yields pieces as they are generated; none is empty."""
        while self.finish_reason is None:
            (new_tokens,) = self._decoding.advance()
            self.tokens += new_tokens
            done = self._decoding.done
            piece = self._detokenizer.add(new_tokens, last=done)
            if done or self._detokenizer.stopped:
                self.finish_reason = "stop"
                if not self._detokenizer.stopped and not self._decoding.ended[0]:
                    self.finish_reason = "length"
            if piece:
                yield piece


def continue_texts(
    decoding: Decoding, tokenizer: Any, prompts: Sequence[Sequence[int]], stop: Any
) -> list[str]:
    """Runs a decoding to its end; returns the continuation of each row as text.

    Args:
      decoding: of `prompts`.
      tokenizer: a `transformers` tokenizer.
      prompts: token ids, one list a row.
      stop: strings that end a row.
    """
    detokenizers = [Detokenizer(tokenizer, prompt, stop=stop) for prompt in prompts]
    while not decoding.done:
        new_tokens = decoding.advance()
        for row, detokenizer in enumerate(detokenizers):
            last = decoding.done or bool(decoding.ended[row])
            detokenizer.add(new_tokens[row], last=last)
            if detokenizer.stopped:
                decoding.end(row)
    return [detokenizer.text for detokenizer in detokenizers]


def resolve_stop(
    stop: Sequence[Any], tokenizer: Any, eos_token_ids: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Splits stop strings into those to search for and end tokens.

    Args:
      stop: strings; an added token of the tokenizer (`<|eot_id|>`) becomes an end
        token, since special tokens are not in the decoded text.
      tokenizer: a `transformers` tokenizer.
      eos_token_ids: end tokens of the model.

    Returns:
      Stop strings, and all end tokens in ascending order.

    Raises:
      UserError: a string in place of a list, or an empty string.
    """
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise UserError(f"`stop` must be a list of non-empty strings, got {stop!r}.")
    # Decoding skips special tokens, so a stop string that is one would never be found.
    added = tokenizer.get_added_vocab()
    ids = {int(added[s]) for s in stop if s in added}
    return tuple(s for s in stop if s not in added), tuple(
        sorted({*eos_token_ids, *ids})
    )


# --- Chat prompts ---

# Beginnings of answers, tried to see whether a tokenizer merges one with the prompt.
_ANSWERS = ("The", "I", "a", "yes", "1")
# Characters at the end of a prompt that are shown to the user.
_SHOWN_CHARACTERS = 12


class ChatPrompts:
    """Renders conversations as prompts, and knows what ends an answer.

    Args:
      tokenizer: a `transformers` tokenizer.
      chat_template: a Jinja file; None = the tokenizer's template.
      variables: further variables of the template, such as `enable_thinking`.
      tools: functions that the template describes to the model.

    Attributes:
      stop: what ends an answer, read off the text that the template writes between an
        answer and the next turn: the token that ends a turn, or the text that begins
        the next.

    Raises:
      UserError: there is no template, it cannot be read, or it has no use for tools or
        a variable.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> None:
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "This model's tokenizer has no chat template, so how a conversation "
                "is written is not known. Base models ship none: ask them with "
                "`generate`; or take `chat_template.jinja` (or the `chat_template` of "
                "`tokenizer_config.json`) from the instruct model of the same family "
                "and give its path as `chat_template` (--chat-template)."
            )
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, chat_template, variables=variables)
        self._tools = tools_of({"tools": tools and list(tools)}, "chat")
        names = [*(variables or {}), *(["tools"] if self._tools else [])]
        unread = [
            name
            for name in names
            if not self._renderer.mentions(name, tools=bool(self._tools))
        ]
        if unread:
            raise UserError(
                "This chat template does not read "
                f"{' or '.join(f'`{name}`' for name in unread)}, so giving it would "
                "change nothing. Leave it out, or give a template that reads it "
                "(`chat_template`, --chat-template)."
            )
        self.stop = self._end_of_turn()

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the prompt that asks for the next turn, in tokens.

        The tokens equal those of the conversation in training, unless the tokenizer
        merges the end of the prompt with the answer (`joined_end`).

        Raises:
          UserError: no messages, missing fields, text that is not valid Unicode, or
            turns that the template refuses.
        """
        turns = to_messages({"messages": list(map(dict, messages))}, "chat")
        text = self._renderer.text(
            turns, add_generation_prompt=True, tools=self._tools, where="chat"
        )
        check_encodable(text, "chat")
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        (encoded,) = tokenize(self._tokenizer, [Segmented(text)])
        return encoded.tokens.tolist()

    def joined_end(self) -> str | None:
        """Returns the end of the prompt if it can share a token with the answer.

        Training has such a token as part of the answer, but a prompt that ends before
        the answer has other tokens there, which the model never saw in training.

        Returns:
          The last characters of a prompt; None if no answer that was tried changes the
          prompt's tokens.
        """
        question = [{"role": "user", "content": "a"}]
        try:
            text = self._renderer.text(
                question, add_generation_prompt=True, where="chat"
            )
        except UserError:  # a template that needs more than a question
            return None
        prompt = self._encode(text)
        for answer in _ANSWERS:
            if self._encode(text + answer)[: len(prompt)] != prompt:
                return text[-_SHOWN_CHARACTERS:]
        return None

    def _end_of_turn(self) -> tuple[str, ...]:
        answer, question = "qlora answer", "qlora question"
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]
        try:
            text = self._renderer.text(turns, where="chat")
        except UserError:  # a template for single questions
            text = self._renderer.text(turns[:2], where="chat") + question
        # With the start of the user's next turn, up to its content.
        between = text.partition(answer)[2].rpartition(question)[0]
        tokens = [
            (at, -len(token), token)
            for token in self._tokenizer.get_added_vocab()
            if token.strip() and (at := between.find(token)) >= 0
        ]
        if tokens:  # the first one, the longest of several that start there
            return (min(tokens)[2],)
        # Blank lines are not a stop string: answers may contain them.
        return (between.rstrip(),) if between.strip() else ()
