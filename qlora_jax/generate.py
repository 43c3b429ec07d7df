"""Text generation: a prefill, then one token at a time against a key/value cache.

The whole loop is one jitted program on the device, and the cache one pair of arrays
that every layer writes its new token into. Rows are padded on the left to one
length; a row's padding is masked and its positions start at its first token, so a row
in a batch gets the tokens it gets alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from qlora_jax.errors import UserError
from qlora_jax.llama import Llama, empty_cache

# Prompt lengths and cache sizes are rounded up to this many tokens, so that prompts of
# similar length share one compiled program.
_ROUND = 32


def generate_tokens(
    model: Llama,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    eos_token_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continues each prompt until an end token or `max_new_tokens`.

    Args:
      model: the architecture.
      variables: {"params": base, "lora": adapters}.
      prompts: token ids, one list a row; any lengths.
      max_new_tokens: tokens to add at most.
      temperature: 0 = the likeliest token; else logits are divided by it and sampled.
      top_p: sample among the likeliest tokens that hold this probability.
      top_k: sample among this many of the likeliest tokens.
      seed: of the sampling; row i draws from its own stream.
      eos_token_ids: tokens that end a row (kept in the result).

    Returns:
      Prompt and continuation of each row.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, a setting out of its
        range.
    """
    vocab = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(
                f"prompt {row} is empty: a model without a BOS token needs at least "
                "one token to start from."
            )
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            raise UserError(
                f"prompt {row} has token {outside[0]} outside the vocabulary of "
                f"{vocab}; does the tokenizer belong to this model?"
            )
    if not prompts:
        return []
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if not temperature >= 0.0:
        raise UserError(f"`temperature` must be >= 0, got {temperature}.")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"`top_p` must lie in (0, 1], got {top_p}.")
    if top_k is not None and top_k < 1:
        raise UserError(f"`top_k` must be at least 1, got {top_k}.")

    width = -(-max(map(len, prompts)) // _ROUND) * _ROUND
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    # No gradient is taken, so nothing has to be recomputed for one.
    model = model.clone(compute=dataclasses.replace(model.compute, remat="none"))
    new = _generate(
        model,
        variables,
        tokens,
        mask,
        jax.random.key(seed),
        jnp.float32(temperature),
        jnp.float32(top_p),
        slots=-(-(width + max_new_tokens) // _ROUND) * _ROUND,
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0.0,
        top_k=None if top_k is None else min(top_k, vocab),
        nucleus=top_p < 1.0,
        eos=eos_token_ids,
    )
    out = []
    for prompt, added in zip(prompts, np.asarray(new).tolist(), strict=True):
        ends = [i for i, token in enumerate(added) if token in eos_token_ids]
        out.append([*prompt, *(added[: ends[0] + 1] if ends else added)])
    return out


@partial(
    jax.jit,
    static_argnames=(
        "model",
        "slots",
        "max_new_tokens",
        "greedy",
        "top_k",
        "nucleus",
        "eos",
    ),
)
def _generate(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    key: Array,
    temperature: Float32[Array, ""],
    top_p: Float32[Array, ""],
    *,
    slots: int,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    nucleus: bool,
    eos: tuple[int, ...],
) -> Int32[Array, "B new"]:
    variables = model.compute.place(variables)
    rows = tokens.shape[0]
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))

    def pick(logits: Array, step: Array) -> Array:
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = _filter(logits / temperature, top_p if nucleus else None, top_k)
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)

    def ended(token: Array) -> Array:
        return jnp.isin(token, jnp.array(eos or (-1,), jnp.int32))

    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = empty_cache(model.config, rows, slots, model.compute.dtype)
    logits, cache = model.apply(
        variables,
        tokens,
        cache,
        attention_mask=mask,
        positions=positions,
        method="decode",
    )
    token = pick(logits, jnp.int32(0))
    out = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(token)
    ones = jnp.ones((rows, 1), jnp.int32)

    def step(carry: tuple) -> tuple:
        i, token, done, position, cache, out = carry
        logits, cache = model.apply(
            variables,
            token[:, None],
            cache,
            attention_mask=ones,
            positions=position[:, None],
            method="decode",
        )
        token = jnp.where(done, token, pick(logits, i))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        return i + 1, token, done | ended(token), position + 1, cache, out

    start = (jnp.int32(1), token, ended(token), positions[:, -1] + 1, cache, out)
    end = jax.lax.while_loop(
        lambda carry: (carry[0] < max_new_tokens) & ~carry[2].all(), step, start
    )
    return end[-1]


def _filter(
    logits: Float32[Array, "B V"], top_p: Array | None, top_k: int | None
) -> Float32[Array, "B V"]:
    """Removes tokens outside the `top_k` likeliest and the nucleus of mass `top_p`."""
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        # A token stays if the likelier ones hold less than top_p; the first always.
        before = mass - jax.nn.softmax(descending, axis=-1)
        kept = jnp.where(before < top_p, descending, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits
