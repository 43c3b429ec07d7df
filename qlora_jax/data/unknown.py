"""Finds what a tokenizer has no token for.

It becomes the tokenizer's `<unk>`, or nothing where it has none (BPE without bytes),
and no error tells: a model is then trained on another text than that of the rows.
"""

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.segments import Segmented

UNKNOWN = "rows with characters that the tokenizer does not know"
"""A remark on rows."""

# Of a piece of text, in a message.
_SHOWN = 20
_PLAIN = dict(
    add_special_tokens=False,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,
)


class UnknownText:
    """Finds the characters of texts that a tokenizer does not know.

    Every character is tried once, so that a data set costs as many calls as it has
    different characters.

    Args:
      tokenizer: a `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._unk = getattr(tokenizer, "unk_token_id", None)
        self._tried: set[str] = set()
        self._dropped: set[str] = set()
        self._replaced: set[str] = set()
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._added = re.compile("|".join(re.escape(str(t)) for t in added) or "(?!)")

    def dropped(self, text: str) -> set[str]:
        """Returns the characters of a text that give no token at all."""
        characters = set(text)
        new = characters - self._tried
        if new:
            self._tried |= new
            self._try(sorted(new))
        return self._dropped & characters

    def without(self, piece: Segmented, characters: set[str]) -> Segmented:
        """Returns a text without some characters, and its spans there.

        Those that stand in added tokens (`|` in "<|im_end|>") are kept.
        """
        kept = np.array([c not in characters for c in piece.text], np.int64)
        for match in self._added.finditer(piece.text):
            kept[match.start() : match.end()] = 1
        places = np.append(0, np.cumsum(kept)).tolist()
        return dataclasses.replace(
            piece,
            text="".join(itertools.compress(piece.text, kept)),
            spans=[(places[start], places[end]) for start, end in piece.spans or ()],
        )

    def replaced(self, text: str, tokens: Int32[np.ndarray, " T"]) -> set[str]:
        """Returns the characters, or words, of a text that become `<unk>`.

        Args:
          text: the text; has been given to `dropped`.
          tokens: its ids, without special tokens around it.
        """
        if self._unk is None or not (tokens == self._unk).any():
            return set()
        if not getattr(self._tokenizer, "is_fast", False):
            return self._replaced.intersection(text)
        encoding = self._tokenizer(text, return_offsets_mapping=True, **_PLAIN)
        pieces = {
            text[start:end].strip() or text[start:end]
            for token, (start, end) in zip(
                encoding["input_ids"], encoding["offset_mapping"], strict=True
            )
            if token == self._unk
        }
        # The text may have it as it is.
        return {piece[:_SHOWN] for piece in pieces - {"", self._tokenizer.unk_token}}

    def _try(self, characters: list[str]) -> None:
        """Looks for tokens that come with a character."""
        # A token for the beginning of a text ("▁") may be all that is left of one, so
        # texts with more of it are compared. White space may be joined by design.
        pairs = [(f"a{c}b", "ab") if c.isspace() else (2 * c, c) for c in characters]
        texts = [text for pair in pairs for text in pair]
        try:
            ids = [list(r) for r in self._tokenizer(texts, **_PLAIN)["input_ids"]]
        except Exception:  # it knows words alone, and refuses what it does not know
            return
        for character, more, less in zip(characters, ids[::2], ids[1::2], strict=True):
            if self._unk is not None and self._unk in more:
                self._replaced.add(character)
            elif more == less:
                self._dropped.add(character)


def unknown_text(tokenizer: Any, text: str) -> list[str]:
    """Returns the characters of a text that a tokenizer has no token for, in order.

    None of a text that it refuses; `encode_prompt` says why.
    """
    finder = UnknownText(tokenizer)
    try:
        tokens = np.array(tokenizer(text, **_PLAIN)["input_ids"], np.int32)
    except Exception:
        return []
    found = finder.dropped(text)
    return sorted(found | finder.replaced(text, tokens), key=text.find)
