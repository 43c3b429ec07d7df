"""Finds what ends the answers that a model is trained on: the tokens to stop at."""

from collections import Counter
from typing import Any

import numpy as np

from qlora_jax.data.arrays import Examples
from qlora_jax.data.encoding import IGNORE
from qlora_jax.data.mixture import AnyExamples, Mixture

# A template may write a line break, supervised too, after the token that ends a turn.
_TOKENS_AFTER = 1
# Of what ends the examples of a source, a token with a smaller share is by chance.
_LEAST_SHARE = 0.1
# Of each source, evenly spread: enough to tell a share from chance.
_MOST_EXAMPLES = 10_000


def end_tokens_of(examples: AnyExamples, tokenizer: Any) -> list[tuple[int, ...]]:
    """Returns the tokens that end what is supervised, most frequent first.

    They are special or added tokens that the model is trained to write last: the EOS of
    a text, or the end of a turn. An example that is cut off ends with none.

    Args:
      examples: of one source, or of several.
      tokenizer: the `transformers` tokenizer that wrote them.

    Returns:
      For each source its token ids; none if nothing special ends its examples.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {int(i) for i, token in added.items() if str(token).strip()}
    special.update(getattr(tokenizer, "all_special_ids", ()))
    unknown, eos = (
        getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "eos")
    )
    if unknown != eos:  # what stands for a character ends nothing
        special.discard(unknown)
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    return [_frequent(part, special) for part in parts]


def _frequent(part: Examples, special: set[int]) -> tuple[int, ...]:
    """Returns the special tokens that end the examples of a source."""
    counts: Counter[int] = Counter()
    for index in range(0, len(part), -(-len(part) // _MOST_EXAMPLES)):
        labels = part[index][1]
        supervised = np.flatnonzero(labels != IGNORE)
        # Every example has a supervised token. What comes last in its span counts.
        last = int(supervised[-1])
        span = labels[max(last - _TOKENS_AFTER, 0) : last + 1].tolist()
        for label in reversed(span):
            if label in special:
                counts[label] += 1
                break
            if label == IGNORE:
                break
    least = _LEAST_SHARE * counts.total()
    return tuple(token for token, count in counts.most_common() if count >= least)
