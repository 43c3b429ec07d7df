"""Token generation: a prefill, then one token at a time against a key/value cache.

The whole loop is one jitted program on the device, and the cache is one pair of arrays
that every layer writes its new token into. Rows are padded on the left to the same
length; padding is masked and positions start at a row's first token, so a row of a
batch gets the same tokens as in a batch of its own.

`Decoding` runs the same loop in chunks and returns to the host between them, for
streaming and for stop conditions that are not tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from qlora_jax.compiler import device_jit
from qlora_jax.errors import UserError
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.sampling import Rules, Values
from qlora_jax.models import Cache, Llama, empty_cache

# Prompt lengths and cache sizes are rounded up to this many tokens, so that prompts of
# similar length share one compiled program.
_ROUND = 32
# Cache sizes to twice as many: what the kernel of decoding attends to at a time.
_ROUND_CACHE = 64
# Tokens between two returns to the host: few enough to read along, many enough that the
# transfers cost little.
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
      temperature: 0 = the most likely token; else logits are divided by it and sampled.
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
    program = _Program.of(
        model,
        sampling,
        eos_token_ids,
        cache_size=_round(tokens.shape[1] + max_new_tokens, _ROUND_CACHE),
    )
    new_tokens = _generate(
        program,
        variables,
        tokens,
        mask,
        Values.of(sampling),
        max_new_tokens=max_new_tokens,
    )
    return [
        [*prompt, *_until_end(row, eos_token_ids)]
        for prompt, row in zip(prompts, np.asarray(new_tokens).tolist(), strict=True)
    ]


@dataclass(frozen=True)
class DecodingConfig:
    """Settings of a `Decoding`."""

    max_new_tokens: int
    """Tokens to add at most."""
    sampling: Sampling = Sampling()
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a row (kept in what `advance` returns)."""
    power_of_two_lengths: bool = False
    """Round lengths up to powers of two rather than to multiples of 32, so that few
    programs are compiled for prompts that grow from call to call."""


class Decoding:
    """A generation that returns to the host after every chunk of tokens.

        decoding = Decoding(model, variables, prompts, DecodingConfig(100))
        while not decoding.done:
            new_tokens = decoding.advance()  # of each row

    The tokens are those of `generate_tokens`.

    Args:
      model: the architecture.
      variables: {"params": base, "lora": adapters}.
      prompts: token ids, one list a row.
      config: length, sampling and end tokens.

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
        config: DecodingConfig,
    ) -> None:
        check_prompts(prompts, model.config.vocab_size, config.max_new_tokens)
        self._config = config
        self._variables, self._values = variables, Values.of(config.sampling)
        self.ended = np.zeros(len(prompts), bool)
        self._num_tokens = 0
        self._state: _State | None = None
        rounded = _power_of_two if config.power_of_two_lengths else _round
        width = rounded(max(map(len, prompts), default=1))
        self._tokens, self._mask = _pad(prompts, width)
        self._program = _Program.of(
            model,
            config.sampling,
            config.eos_token_ids,
            cache_size=_round(rounded(width + config.max_new_tokens), _ROUND_CACHE),
        )

    @property
    def done(self) -> bool:
        """Whether every row has ended or has `max_new_tokens`."""
        return bool(self.ended.all()) or self._num_tokens >= self._config.max_new_tokens

    def end(self, row: int) -> None:
        """Ends a row before its end token."""
        self.ended[row] = True

    def advance(self) -> list[list[int]]:
        """Generates a chunk: first a single token, then up to 16.

        Returns:
          The new tokens of each row; none for a row that had ended.
        """
        if self.done:
            return [[] for _ in self.ended]
        # The prefill chooses a token anyway: it is shown at once, before the first
        # chunk.
        if self._state is None:
            state = _start(
                self._program, self._variables, self._tokens, self._mask, self._values
            )
            chunk = np.asarray(state.token)[:, None]
        else:
            state, out = _continue(
                self._program,
                self._variables,
                # The host may have ended rows that the device has not: by a stop
                # string.
                self._state._replace(done=jnp.asarray(self.ended)),
                self._values,
                np.int32(self._config.max_new_tokens - self._num_tokens),
            )
            # The loop stops early once every row has ended; later columns are not
            # tokens.
            chunk = np.asarray(out)[:, : int(state.step) - self._num_tokens]
        self._state = state
        self._num_tokens += chunk.shape[1]
        eos_token_ids = self._config.eos_token_ids
        rows = []
        for row, tokens in enumerate(chunk.tolist()):
            new_tokens = [] if self.ended[row] else _until_end(tokens, eos_token_ids)
            rows.append(new_tokens)
            self.ended[row] |= bool(new_tokens) and new_tokens[-1] in eos_token_ids
        return rows


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, max_new_tokens: int
) -> None:
    """Raises if a prompt cannot be continued.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, `max_new_tokens` < 1.
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


def _round(length: int, unit: int = _ROUND) -> int:
    return -(-length // unit) * unit


def _power_of_two(length: int) -> int:
    return max(1 << (length - 1).bit_length(), 2 * _ROUND)


def _until_end(tokens: list[int], eos_token_ids: tuple[int, ...]) -> list[int]:
    """Cuts a row after its first end token."""
    ends = (i for i, token in enumerate(tokens) if token in eos_token_ids)
    return tokens[: next(ends, len(tokens)) + 1]


def _pad(
    prompts: Sequence[Sequence[int]], width: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Returns tokens padded on the left, and a mask that is 1 on tokens."""
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask


# --- On the device ---


@dataclass(frozen=True)
class _Program:
    """What the jitted functions are compiled for: equal ones share compiled code."""

    model: Llama
    rules: Rules
    eos_token_ids: tuple[int, ...]
    cache_size: int
    """Tokens that the cache of a row holds."""

    @classmethod
    def of(
        cls,
        model: Llama,
        sampling: Sampling,
        eos_token_ids: tuple[int, ...],
        *,
        cache_size: int,
    ) -> _Program:
        # No gradient is taken, so rematerialization would only split the program.
        model = model.clone(compute=dataclasses.replace(model.compute, remat="none"))
        rules = Rules.of(sampling, model.config.vocab_size)
        return cls(model, rules, eos_token_ids, cache_size)

    def decode(self, variables: Any, tokens: Any, cache: Cache, **arrays: Any) -> Any:
        """Returns the logits after the last token, and the cache with the new ones."""
        # `apply` is typed for mutable collections; the model has none.
        apply: Any = self.model.apply
        return apply(variables, tokens, cache, **arrays, method="decode")


class _State(NamedTuple):
    """The carry of the generation loop."""

    step: Int32[Array, ""]
    """Number of tokens chosen so far in each row."""
    token: Int32[Array, " B"]
    """The last chosen token, which is not in the cache yet."""
    done: Bool[Array, " B"]
    """Rows that have ended."""
    position: Int[Array, " B"]
    """Of `token`, in its row."""
    cache: Cache
    seen: Bool[Array, "B V"] | None
    """Tokens of the text so far, for the repetition penalty."""


def _prefill(
    program: _Program,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    values: Values,
) -> _State:
    """Reads the prompts into the cache and chooses the first token."""
    model, rules = program.model, program.rules
    rows = tokens.shape[0]
    # Padding is on the left: a token's position is the number of tokens before it.
    # Padding gets 0, which does not matter: it is masked.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = empty_cache(model.config, rows, program.cache_size, model.compute.dtype)
    logits, cache = program.decode(
        variables,
        tokens,
        cache,
        attention_mask=mask,
        positions=positions,
    )
    seen = None
    if rules.repetition_penalty:
        seen = jnp.zeros((rows, model.config.vocab_size), bool)
        # `max`, not `set`: padding has an id too, which must neither count as seen nor
        # erase that the text has it.
        seen = seen.at[jnp.arange(rows)[:, None], tokens].max(mask.astype(bool))
    # The position of the last prompt token: `_advance_state` adds one for `token`.
    token = rules.pick(logits, values, jnp.int32(0), seen)
    state = _State(
        jnp.int32(0), token, jnp.zeros(rows, bool), positions[:, -1], cache, seen
    )
    return _advance_state(program, state, token, cache)


def _advance_state(
    program: _Program, state: _State, token: Int32[Array, " B"], cache: Cache
) -> _State:
    """Returns the state with the next token of every row; ended rows keep theirs."""
    token = jnp.where(state.done, state.token, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    # No token is -1: without end tokens no row ends.
    ended = jnp.isin(token, jnp.array(program.eos_token_ids or (-1,), jnp.int32))
    return _State(
        state.step + 1, token, state.done | ended, state.position + 1, cache, seen
    )


def _fill(
    program: _Program,
    variables: Mapping[str, Any],
    state: _State,
    values: Values,
    out: Int32[Array, "B new"],
    columns: tuple[Int32[Array, ""], Int32[Array, ""]],
) -> tuple[_State, Int32[Array, "B new"]]:
    """Generates into `out[:, slice(*columns)]`, until every row has ended."""
    # `end` is traced: a shorter last chunk does not recompile.
    first, end = columns
    # The mask of the new tokens alone; the cache keeps that of the prompts. Rows that
    # have ended go on with their last token, and nothing reads what comes of it.
    ones = jnp.ones((out.shape[0], 1), jnp.int32)

    def step(carry: tuple) -> tuple:
        i, state, out = carry
        logits, cache = program.decode(
            variables,
            state.token[:, None],
            state.cache,
            attention_mask=ones,
            positions=state.position[:, None],
        )
        token = program.rules.pick(logits, values, state.step, state.seen)
        state = _advance_state(program, state, token, cache)
        out = jax.lax.dynamic_update_slice(out, state.token[:, None], (0, i))
        return i + 1, state, out

    return jax.lax.while_loop(
        lambda carry: (carry[0] < end) & ~carry[1].done.all(),
        step,
        (first, state, out),
    )[1:]


@device_jit(static_argnames=("program", "max_new_tokens"))
def _generate(
    program: _Program,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    values: Values,
    *,
    max_new_tokens: int,
) -> Int32[Array, "B new"]:
    """Runs prefill and loop as one program; `out` has 0 after every row has ended."""
    variables = program.model.arrange(variables, tokens.shape[0])
    state = _prefill(program, variables, tokens, mask, values)
    out = jnp.zeros((tokens.shape[0], max_new_tokens), jnp.int32)
    out = out.at[:, 0].set(state.token)
    columns = (jnp.int32(1), jnp.int32(max_new_tokens))
    return _fill(program, variables, state, values, out, columns)[1]


@device_jit(static_argnames="program")
def _start(
    program: _Program,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    values: Values,
) -> _State:
    """Returns the state of a `Decoding` after its first token."""
    variables = program.model.compute.arrange(variables)
    return _prefill(program, variables, tokens, mask, values)


# Donated, so that the cache is updated in place and not copied for every chunk.
@device_jit(static_argnames="program", donate_argnames="state")
def _continue(
    program: _Program,
    variables: Mapping[str, Any],
    state: _State,
    values: Values,
    remaining: Int32[Array, ""],
) -> tuple[_State, Int32[Array, "B chunk"]]:
    """Generates the next chunk of a `Decoding`, at most `remaining` tokens of it."""
    variables = program.model.arrange(variables, state.token.shape[0])
    out = jnp.zeros((state.token.shape[0], _CHUNK), jnp.int32)
    columns = (jnp.int32(0), jnp.minimum(remaining, _CHUNK))
    return _fill(program, variables, state, values, out, columns)
