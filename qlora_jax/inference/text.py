"""What a model is asked, checked: token ids, texts, turns of a conversation.

Said here in the words of whoever calls; further in, a wrong value would be an error of
NumPy, JAX or a tokenizer about something else.

From texts to texts: what a generation says, piece by piece, and conversations.

The one idea: a piece is given out only when nothing that may still come can change it.
Tokens are not characters (half of one may be all there is of it) and a text that ends
the answer may have begun; what that could concern is held back until it is decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int32

from qlora_jax.data.chat import ChatRenderer, to_messages
from qlora_jax.data.encoding import Segmented, tokenize
from qlora_jax.errors import UserError
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import Decoding
from qlora_jax.models.llama import Llama


def token_array(tokens: Any, vocab_size: int) -> Int32[Array, "B T"]:
    """Makes an array of token ids.

    Args:
      tokens: an array of integers, or nested lists of one length.
      vocab_size: tokens of the model.

    Raises:
      UserError: something else, or ids that have no row (they would give NaN), where
        they are known: what is traced is not.
    """
    if isinstance(tokens, str) or _holds(tokens, str):
        raise UserError(
            f"`tokens` must be token ids, got text ({tokens!r:.60}). The tokenizer "
            'gives them: `model.logits([model.tokenizer(text)["input_ids"]])`.'
        )
    array = _integers(tokens)
    if array is None or array.ndim != 2:
        raise UserError(
            "`tokens` must be token ids of shape [B, T], one row a text and all rows "
            f"of one length, got {_described(tokens, array)}. Put a single text in a "
            "list; pad shorter ones with any id, and give `attention_mask`, with 0 "
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


def beside_tokens(name: str, value: Any, shape: tuple[int, ...]) -> Int32[Array, "B T"]:
    """Makes an array of what is given for every token: a mask, positions, segments.

    Args:
      name: of the argument.
      value: an array of integers or booleans, or nested lists.
      shape: that of the tokens; one row may stand for all.

    Raises:
      UserError: something else, or another shape.
    """
    array = _integers(value)
    if array is None or array.shape not in (shape, (1, *shape[1:])):
        raise UserError(
            f"`{name}` must be integers of the shape of `tokens`, {list(shape)}, got "
            f"{_described(value, array)}."
        )
    return array


def check_text(prompt: Any) -> None:
    """Refuses a prompt that is no text.

    Raises:
      UserError: it is none.
    """
    if isinstance(prompt, str):
        return
    raise UserError(
        f"a prompt must be a text, got {prompt!r:.60}. Token ids are continued by "
        "`qlora_jax.generate_tokens(model.module, model.variables, rows, "
        "max_new_tokens=...)`."
    )


def check_turns(messages: Any) -> None:
    """Refuses a conversation that is no list of turns.

    Raises:
      UserError: it is none.
    """
    if not isinstance(messages, (str, Mapping)) and all(
        isinstance(turn, Mapping) for turn in messages
    ):
        return
    raise UserError(
        "`messages` must be a list of turns, each with `role` and `content`, got "
        f'{messages!r:.60}. One question is [{{"role": "user", "content": "..."}}].'
    )


def _holds(value: Any, kind: type) -> bool:
    """Whether nested lists begin with something of a kind."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, kind)


def _integers(value: Any) -> Array | None:
    """An int32 array; None for what is no array of integers."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return None
    whole = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool
    return array.astype(jnp.int32) if whole or not array.size else None


def _described(value: Any, array: Array | None) -> str:
    """What came, in a few words."""
    if array is not None:
        return f"shape {list(array.shape)}"
    if isinstance(value, (list, tuple)):
        rows = [len(row) for row in value if isinstance(row, (list, tuple))]
        if len(rows) == len(value) and len(set(rows)) > 1:
            return f"rows of {', '.join(map(str, rows[:8]))} tokens"
    dtype = getattr(value, "dtype", None)
    return f"{value!r:.60}" if dtype is None else f"an array of {dtype}"


# Tokens of the prompt that are decoded with the continuation: those decide how its
# first token reads (a space before it, or not).
_CONTEXT = 8
# Beginnings of answers, to see whether a tokenizer joins them with what comes before.
_ANSWERS = ("The", "I", "a", "yes", "1")
# Characters of a prompt that show how it ends.
_SHOWN = 12
# What a decoder writes for bytes that are no character (yet).
_HALF = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """Turns the tokens of one row into pieces of text.

    Half a character that nothing completes is left out. Special tokens are too, and
    spaces stay as the tokens have them (no `clean_up_tokenization_spaces`, which
    rewrites what was said before).

    Args:
      tokenizer: a `transformers` tokenizer.
      prompt: the tokens that are continued.
      stop: texts that end the continuation and are left out of it.
      strip: leave out white space at both ends.

    Attributes:
      stopped: whether one of `stop` was found.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        strip: bool = False,
    ) -> None:
        self.stopped = False
        self._tokenizer, self._stop, self._strip = tokenizer, tuple(stop), strip
        self._tokens = list(prompt[-_CONTEXT:])
        self._before = self._decode()
        self._given = ""

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Takes new tokens; returns the text that is certain now and was not before.

        Args:
          tokens: new tokens of the row.
          last: none will follow, so nothing is held back any more.
        """
        self._tokens += tokens
        whole = self._decode()
        text = whole.removeprefix(self._before).rstrip(_HALF)
        # Of several the one that is complete first, so that the size of pieces changes
        # nothing.
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped = True
            text = text[: min(ends)[1]]
        elif not last:
            text = text[: len(text) - _begun(text, self._stop)]
        if self._strip:
            text = text.strip()
        # A half character makes some decoders write the whole ones before it as
        # halves too; what was given out stays.
        new = text[len(self._given) :] if text.startswith(self._given) else ""
        self._given += new
        return new

    @property
    def text(self) -> str:
        """All that was given out."""
        return self._given


def _begun(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of a text that one of `stop` begins with."""
    longest = max(map(len, stop), default=0)
    return next(
        (
            n
            for n in range(min(longest, len(text)), 0, -1)
            if any(s.startswith(text[-n:]) for s in stop)
        ),
        0,
    )


class Answer:
    """A continuation under way: iterate over it for its pieces of text.

    Attributes:
      text: what was said so far.
      tokens: its tokens so far, an end token included.
      finish_reason: "stop" (an end token or text), "length" (`max_new_tokens`), or None
        as long as it has not ended.
    """

    def __init__(
        self,
        decoding: Decoding,
        pieces: Pieces,
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._decoding, self._pieces = decoding, pieces

    @property
    def text(self) -> str:
        """What was said so far."""
        return self._pieces.text

    def __iter__(self) -> Iterator[str]:
        """Yields pieces as they come; none is empty."""
        while self.finish_reason is None:
            (new,) = self._decoding.advance()
            self.tokens += new
            done = self._decoding.done
            piece = self._pieces.add(new, last=done)
            if done or self._pieces.stopped:
                self.finish_reason = "stop"
                if not self._pieces.stopped and not self._decoding.ended[0]:
                    self.finish_reason = "length"
            if piece:
                yield piece


def answer(
    model: Llama,
    variables: Mapping[str, Any],
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
    stop: Sequence[str] = (),
    conversation: bool = False,
) -> Answer:
    """Starts an answer; arguments as `Decoding` and `Pieces` take them.

    Args:
      model: the architecture.
      variables: {"params": base, "lora": adapters}.
      tokenizer: a `transformers` tokenizer.
      prompt: token ids.
      max_new_tokens: tokens to add at most.
      sampling: how tokens are chosen.
      eos_token_ids: tokens that end it.
      stop: texts that end it.
      conversation: leave out white space at both ends, and expect longer prompts soon.

    Raises:
      UserError: as `generate_tokens`.
    """
    stop, eos_token_ids = resolve_stop(stop, tokenizer, eos_token_ids)
    decoding = Decoding(
        model,
        variables,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
        doubling=conversation,
    )
    pieces = Pieces(tokenizer, prompt, stop=stop, strip=conversation)
    return Answer(decoding, pieces)


def continue_texts(
    decoding: Decoding, tokenizer: Any, prompts: Sequence[Sequence[int]], stop: Any
) -> list[str]:
    """Runs a decoding to its end; returns the continuation of each row as text.

    Args:
      decoding: of `prompts`.
      tokenizer: a `transformers` tokenizer.
      prompts: token ids, one list a row.
      stop: texts that end a row.
    """
    rows = [Pieces(tokenizer, prompt, stop=stop) for prompt in prompts]
    while not decoding.done:
        new = decoding.advance()
        for number, (pieces, tokens) in enumerate(zip(rows, new, strict=True)):
            pieces.add(tokens, last=decoding.done or bool(decoding.ended[number]))
            if pieces.stopped:
                decoding.end(number)
    return [pieces.text for pieces in rows]


def resolve_stop(
    stop: Sequence[Any], tokenizer: Any, eos_token_ids: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sorts what ends a text into texts and tokens.

    Args:
      stop: texts; one that is an added token of the tokenizer (`<|eot_id|>`) ends the
        text as that token, since special tokens are not in the decoded text.
      tokenizer: a `transformers` tokenizer.
      eos_token_ids: tokens that do in any case.

    Returns:
      Texts, and token ids in ascending order.

    Raises:
      UserError: one text in place of several, or an empty one.
    """
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise UserError(
            f"`stop` must be a list of texts that are not empty, got {stop!r}."
        )
    added = tokenizer.get_added_vocab()
    ids = {int(added[s]) for s in stop if s in added}
    return tuple(s for s in stop if s not in added), tuple(
        sorted({*eos_token_ids, *ids})
    )


class ChatPrompts:
    """Conversations as prompts, with what ends the answer to one.

    Args:
      tokenizer: a `transformers` tokenizer.
      chat_template: a Jinja file; None = the tokenizer's own template.

    Attributes:
      stop: what the template writes between an answer and the next turn, as far as it
        tells the two apart: the token that ends a turn, or the text that begins one.

    Raises:
      UserError: there is no template, or it cannot be read.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "This model's tokenizer has no chat template, so how a conversation "
                "is written is not known. Base models ship none: ask them with "
                "`generate`; or take `chat_template.jinja` (or the `chat_template` of "
                "`tokenizer_config.json`) from the instruct model of the same family "
                "and give its path as `chat_template` (--chat-template)."
            )
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, chat_template)
        self.stop = self._end_of_turn()

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt that asks for the next turn, in tokens.

        The tokens are those that training on the conversation has up to there, unless
        the tokenizer joins the end of the prompt with the answer (`joined_end`).

        Raises:
          UserError: no messages, fields that are missing, or turns that the template
            refuses.
        """
        turns = to_messages({"messages": list(map(dict, messages))}, "chat")
        text = self._renderer.text(turns, add_generation_prompt=True, where="chat")
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        (encoded,) = tokenize(self._tokenizer, [Segmented(text)])
        return encoded.tokens.tolist()

    def joined_end(self) -> str | None:
        """The end of a prompt that becomes one token with the start of some answer.

        Training supervises such a token whole, and a prompt that ends before the answer
        has others in its place: the model is asked with what it was never trained on.

        Returns:
          The last characters of a prompt; None where every answer that was tried leaves
          its tokens as they are.
        """
        ask = [{"role": "user", "content": "a"}]
        try:
            text = self._renderer.text(ask, add_generation_prompt=True, where="chat")
        except UserError:  # a template that wants more than a question
            return None
        prompt = self._encode(text)
        for said in _ANSWERS:
            if self._encode(text + said)[: len(prompt)] != prompt:
                return text[-_SHOWN:]
        return None

    def _end_of_turn(self) -> tuple[str, ...]:
        said, asked = "qlora answer", "qlora question"
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": asked},
        ]
        try:
            text = self._renderer.text(turns, where="chat")
        except UserError:  # a template for single questions
            text = self._renderer.text(turns[:2], where="chat") + asked
        between = text.partition(said)[2].rpartition(asked)[0]
        first = [
            (at, token)
            for token in self._tokenizer.get_added_vocab()
            if token.strip() and (at := between.find(token)) >= 0
        ]
        if first:
            return (min(first, key=lambda found: (found[0], -len(found[1])))[1],)
        # Blank lines end nothing: an answer may have some of its own.
        return (between.rstrip(),) if between.strip() else ()
