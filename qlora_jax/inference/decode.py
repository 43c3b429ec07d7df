"""Token generation: a prefill, then one token at a time against a key/value cache.

The whole loop is one jitted program on the device, and the cache one pair of arrays
that every layer writes its new token into. Rows are padded on the left to one
length; a row's padding is masked and its positions start at its first token, so a row
in a batch gets the tokens it gets alone.

Who wants to see tokens as they come, or to end a row for a reason that is no token,
takes a `Decoding`: the same loop, which comes back to the host every so many tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from qlora_jax.errors import UserError
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.sampling import Rules, Values
from qlora_jax.models.llama import Cache, Llama, empty_cache

# Prompt lengths and cache sizes are rounded up to this many tokens, so that prompts of
# similar length share one compiled program.
_ROUND = 32
# Tokens between two visits of the host: few enough to read along, many enough that the
# visits cost little.
_CHUNK = 16


def generate_tokens(
    model: Llama,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
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
      min_p: sample among tokens at least this probable, as a share of the likeliest
        one's probability.
      repetition_penalty: above 1, tokens of the text so far become less likely.
      seed: of the sampling; row i draws from its own stream.
      eos_token_ids: tokens that end a row (kept in the result).

    Returns:
      Prompt and continuation of each row.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, a setting out of its
        range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    check_prompts(prompts, model.config.vocab_size, max_new_tokens)
    if not prompts:
        return []
    tokens, mask = _pad(prompts, _round(max(map(len, prompts))))
    # No gradient is taken, so nothing has to be recomputed for one.
    model = model.clone(compute=dataclasses.replace(model.compute, remat="none"))
    new = _generate(
        model,
        variables,
        tokens,
        mask,
        Values.of(sampling),
        slots=_round(tokens.shape[1] + max_new_tokens),
        max_new_tokens=max_new_tokens,
        rules=Rules.of(sampling, model.config.vocab_size),
        eos=eos_token_ids,
    )
    out = []
    for prompt, added in zip(prompts, np.asarray(new).tolist(), strict=True):
        ends = [i for i, token in enumerate(added) if token in eos_token_ids]
        out.append([*prompt, *(added[: ends[0] + 1] if ends else added)])
    return out


class Decoding:
    """A generation under way, which the host looks at every so many tokens.

        decoding = Decoding(model, variables, prompts, max_new_tokens=100)
        while not decoding.done:
            new = decoding.advance()  # the new tokens of each row

    The tokens are those of `generate_tokens`.

    Args:
      model: the architecture.
      variables: {"params": base, "lora": adapters}.
      prompts: token ids, one list a row.
      max_new_tokens: tokens to add at most.
      sampling: how tokens are chosen.
      eos_token_ids: tokens that end a row (kept in what `advance` returns).
      doubling: round lengths up to powers of two rather than to multiples of 32, for
        prompts that grow from call to call: few programs are compiled for all of them.

    Attributes:
      ended: which rows have ended, [B] of bool.

    Raises:
      UserError: as `generate_tokens`.
    """

    def __init__(
        self,
        model: Llama,
        variables: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        eos_token_ids: tuple[int, ...] = (),
        doubling: bool = False,
    ) -> None:
        check_prompts(prompts, model.config.vocab_size, max_new_tokens)
        self._model = model.clone(
            compute=dataclasses.replace(model.compute, remat="none")
        )
        self._variables, self._values = variables, Values.of(sampling)
        self._static = {
            "rules": Rules.of(sampling, model.config.vocab_size),
            "eos": eos_token_ids,
        }
        self._eos, self._most, self._count = frozenset(eos_token_ids), max_new_tokens, 0
        self.ended = np.zeros(len(prompts), bool)
        self._state: _State | None = None
        rounded = _double if doubling else _round
        if prompts:
            self._tokens, self._mask = _pad(prompts, rounded(max(map(len, prompts))))
            self._slots = rounded(self._tokens.shape[1] + max_new_tokens)

    @property
    def done(self) -> bool:
        """Whether every row has ended or has `max_new_tokens`."""
        return bool(self.ended.all()) or self._count >= self._most

    def end(self, row: int) -> None:
        """Ends a row, whatever it was about to say."""
        self.ended[row] = True

    def advance(self) -> list[list[int]]:
        """Generates some tokens (the first one alone, then up to 16) and returns them.

        Returns:
          The new tokens of each row; none of a row that had ended.
        """
        if self.done:
            return [[] for _ in self.ended]
        if self._state is None:
            state = _start(
                self._model,
                self._variables,
                self._tokens,
                self._mask,
                self._values,
                slots=self._slots,
                **self._static,
            )
            new = np.asarray(state.token)[:, None]
        else:
            state, out = _continue(
                self._model,
                self._variables,
                self._state._replace(done=jnp.asarray(self.ended)),
                self._values,
                np.int32(self._most - self._count),
                **self._static,
            )
            new = np.asarray(out)[:, : int(state.step) - self._count]
        self._state = state
        self._count += new.shape[1]
        rows = []
        for row, added in enumerate(new.tolist()):
            if self.ended[row]:
                rows.append([])
                continue
            ends = [i for i, token in enumerate(added) if token in self._eos]
            rows.append(added[: ends[0] + 1] if ends else added)
            self.ended[row] = bool(ends)
        return rows


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, max_new_tokens: int
) -> None:
    """Refuses what cannot be continued.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, nothing to add.
    """
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(
                f"prompt {row} is empty: a model without a BOS token needs at least "
                "one token to start from."
            )
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise UserError(
                f"prompt {row} has token {outside[0]} outside the vocabulary of "
                f"{vocab_size}; does the tokenizer belong to this model?"
            )
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")


def _round(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def _double(length: int) -> int:
    return max(1 << (length - 1).bit_length(), 2 * _ROUND)


def _pad(
    prompts: Sequence[Sequence[int]], width: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Tokens padded on the left, and 1 where there is one."""
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask


# --- On the device ---


class _State(NamedTuple):
    """Where a generation stands."""

    step: Int32[Array, ""]
    """Tokens chosen so far in each row."""
    token: Int32[Array, " B"]
    """The last of them, which the model has not seen yet."""
    done: Bool[Array, " B"]
    """Rows that have ended."""
    position: Int[Array, " B"]
    """Of `token`, in its row."""
    cache: Cache
    seen: Bool[Array, "B V"] | None
    """Tokens of the text so far, where the rules ask for them."""


def _begin(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    values: Values,
    slots: int,
    rules: Rules,
    eos: tuple[int, ...],
) -> _State:
    """The prefill, and the first token."""
    rows = tokens.shape[0]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = empty_cache(model.config, rows, slots, model.compute.dtype)
    apply: Any = model.apply  # typed for mutable collections, which this has none of
    logits, cache = apply(
        variables,
        tokens,
        cache,
        attention_mask=mask,
        positions=positions,
        method="decode",
    )
    seen = None
    if rules.repetition_penalty:
        seen = jnp.zeros((rows, model.config.vocab_size), bool)
        seen = seen.at[jnp.arange(rows)[:, None], tokens].max(mask.astype(bool))
    token = rules.pick(logits, values, jnp.int32(0), seen)
    state = _State(
        jnp.int32(0), token, jnp.zeros(rows, bool), positions[:, -1], cache, seen
    )
    return _chosen(state, token, cache, eos)


def _chosen(
    state: _State, token: Int32[Array, " B"], cache: Cache, eos: tuple[int, ...]
) -> _State:
    """The state after a token was chosen for every row; ended rows keep theirs."""
    token = jnp.where(state.done, state.token, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    ended = jnp.isin(token, jnp.array(eos or (-1,), jnp.int32))
    return _State(
        state.step + 1, token, state.done | ended, state.position + 1, cache, seen
    )


def _fill(
    model: Llama,
    variables: Mapping[str, Any],
    state: _State,
    values: Values,
    out: Int32[Array, "B new"],
    first: Int32[Array, ""],
    end: Int32[Array, ""],
    rules: Rules,
    eos: tuple[int, ...],
) -> tuple[_State, Int32[Array, "B new"]]:
    """Generates into `out[:, first:end]`, until every row has ended."""
    ones = jnp.ones((out.shape[0], 1), jnp.int32)
    apply: Any = model.apply

    def step(carry: tuple) -> tuple:
        i, state, out = carry
        logits, cache = apply(
            variables,
            state.token[:, None],
            state.cache,
            attention_mask=ones,
            positions=state.position[:, None],
            method="decode",
        )
        token = rules.pick(logits, values, state.step, state.seen)
        state = _chosen(state, token, cache, eos)
        out = jax.lax.dynamic_update_slice(out, state.token[:, None], (0, i))
        return i + 1, state, out

    return jax.lax.while_loop(
        lambda carry: (carry[0] < end) & ~carry[1].done.all(),
        step,
        (first, state, out),
    )[1:]


@partial(jax.jit, static_argnames=("model", "slots", "max_new_tokens", "rules", "eos"))
def _generate(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    values: Values,
    *,
    slots: int,
    max_new_tokens: int,
    rules: Rules,
    eos: tuple[int, ...],
) -> Int32[Array, "B new"]:
    """All of it in one program."""
    variables = model.compute.arrange(variables)
    state = _begin(model, variables, tokens, mask, values, slots, rules, eos)
    out = jnp.zeros((tokens.shape[0], max_new_tokens), jnp.int32)
    out = out.at[:, 0].set(state.token)
    first, end = jnp.int32(1), jnp.int32(max_new_tokens)
    return _fill(model, variables, state, values, out, first, end, rules, eos)[1]


@partial(jax.jit, static_argnames=("model", "slots", "rules", "eos"))
def _start(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    values: Values,
    *,
    slots: int,
    rules: Rules,
    eos: tuple[int, ...],
) -> _State:
    """The first token of a `Decoding`."""
    variables = model.compute.arrange(variables)
    return _begin(model, variables, tokens, mask, values, slots, rules, eos)


@partial(jax.jit, static_argnames=("model", "rules", "eos"), donate_argnames=("state",))
def _continue(
    model: Llama,
    variables: Mapping[str, Any],
    state: _State,
    values: Values,
    left: Int32[Array, ""],
    *,
    rules: Rules,
    eos: tuple[int, ...],
) -> tuple[_State, Int32[Array, "B chunk"]]:
    """The next tokens of a `Decoding`: a chunk, of which at most `left` are wanted."""
    variables = model.compute.arrange(variables)
    out = jnp.zeros((state.token.shape[0], _CHUNK), jnp.int32)
    end = jnp.minimum(left, _CHUNK)
    return _fill(model, variables, state, values, out, jnp.int32(0), end, rules, eos)
