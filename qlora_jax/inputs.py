"""What a model is asked, checked: token ids, texts, turns of a conversation.

Said here in the words of whoever calls; further in, a wrong value would be an error of
NumPy, JAX or a tokenizer about something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int32

from qlora_jax.errors import UserError


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
