"""Chooses the next token from the logits.

The settings have the names, the meaning and the order of transformers' generation:
repetition penalty, temperature, `top_k`, `top_p` (Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751), `min_p` (Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082), then one draw.

Which settings are on is static in the compiled loop (`Rules`); their values are
arguments of it (`Values`), so another temperature does not recompile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from qlora_jax.inference.config import Sampling


class Values(NamedTuple):
    """Settings that are arguments of a compiled program."""

    key: Any
    """PRNG key."""
    temperature: Any
    """float32, as all below."""
    top_p: Any
    min_p: Any
    repetition_penalty: Any

    @classmethod
    def of(cls, sampling: Sampling) -> Values:
        """Returns the values of these settings."""
        return cls(
            jax.random.key(sampling.seed),
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
            min_p=jnp.float32(sampling.min_p),
            repetition_penalty=jnp.float32(sampling.repetition_penalty),
        )


@dataclass(frozen=True)
class Rules:
    """Which settings are on; static in a compiled program."""

    greedy: bool = True
    top_k: int | None = None
    top_p: bool = False
    min_p: bool = False
    repetition_penalty: bool = False

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> Rules:
        """Returns which of these settings are on, for a vocabulary of this size."""
        # Greedy, no filter matters: none of them excludes the likeliest token. And no
        # program divides by a temperature of 0.
        greedy, top_k = sampling.temperature == 0.0, sampling.top_k
        return cls(
            greedy=greedy,
            top_k=None if greedy or top_k is None else min(top_k, vocab_size),
            top_p=not greedy and sampling.top_p < 1.0,
            min_p=not greedy and sampling.min_p > 0.0,
            repetition_penalty=sampling.repetition_penalty != 1.0,
        )

    def pick(
        self,
        logits: Float32[Array, "B V"],
        values: Values,
        step: Int32[Array, ""],
        seen: Bool[Array, "B V"] | None,
    ) -> Int32[Array, " B"]:
        """Chooses the next token of each row.

        A row's draw depends only on the seed, the row's index and `step`, not on the
        other rows of the batch.

        Args:
          logits: after the last token.
          values: of the settings.
          step: number of tokens chosen before.
          seen: tokens of the text so far; None without a repetition penalty.
        """
        if self.repetition_penalty and seen is not None:
            logits = penalize(logits, seen, values.repetition_penalty)
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # Temperature before the filters, as transformers orders them: it changes which
        # tokens top_p and min_p keep.
        logits = self.filter(logits / values.temperature, values)
        rows = jnp.arange(logits.shape[0])
        # A key for (row, step), which the shape of the batch does not enter.
        keys = jax.vmap(partial(jax.random.fold_in, values.key))(rows)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def filter(
        self, logits: Float32[Array, "B V"], values: Values
    ) -> Float32[Array, "B V"]:
        """Sets the logits of excluded tokens to minus infinity."""
        if self.top_k is not None:
            # Tokens that equal the k-th stay, as in transformers, so there may be more
            # than k.
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p:
            descending = -jnp.sort(-logits, axis=-1)
            mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
            # A token stays if the more likely ones sum to less than top_p, so the first
            # always does.
            before = mass - jax.nn.softmax(descending, axis=-1)
            # Back to the vocabulary's order through the least logit that stays, which
            # avoids a scatter.
            kept = jnp.where(before < values.top_p, descending, jnp.inf)
            least = kept.min(axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.min_p:
            # p / p_max >= min_p is logit >= max logit + log(min_p).
            least = logits.max(axis=-1, keepdims=True) + jnp.log(values.min_p)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


def penalize(
    logits: Float32[Array, "B V"],
    seen: Bool[Array, "B V"],
    penalty: Float32[Array, ""],
) -> Float32[Array, "B V"]:
    """Lowers the logits of tokens that occurred before.

    Keskar et al. 2019 (https://arxiv.org/abs/1909.05858), as transformers has it: a
    negative logit is multiplied by the penalty, since dividing would raise it.
    """
    lower = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, lower, logits)
