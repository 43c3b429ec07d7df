"""One training step as a pure function, and its state.

    state, metrics = train_step(state, base, batch, model=model, optimizer=optimizer)

`state` is everything that changes (step, adapters, optimizer moments, PRNG key) and
nothing else; the frozen base is an argument, never copied into the state, never saved
again. jit it with the state donated:

    step = jax.jit(partial(train_step, model=..., optimizer=...), donate_argnums=0)

The gradient is that of the mean loss over the supervised tokens of the whole
accumulation window, summed over micro-batches and divided once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int

from qlora_jax import nf4
from qlora_jax.data.encoding import IGNORE
from qlora_jax.lora.functional import bind
from qlora_jax.models.llama import Llama
from qlora_jax.models.sharding import gathered, on_device
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.training.config import TrainConfig as TrainConfig
from qlora_jax.training.loss import cross_entropy_sum, supervised_tokens
from qlora_jax.training.optimizer import make_optimizer as make_optimizer
from qlora_jax.training.parameter_groups import schedule as schedule

Batch = Mapping[str, Array]

# Tells the key of the noise from what dropout makes of the same key.
_NOISE = 0x6E656674


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "adapters", "opt_state", "key"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that changes in training; a pytree."""

    step: Any
    """Optimizer steps taken, int32 []."""
    adapters: Any
    """The trained tree, float32."""
    opt_state: Any
    """Moments of exactly the trained leaves."""
    key: Any
    """PRNG key of the run; each step folds its number into it."""


def init_state(
    adapters: Any, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """Makes the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        adapters=adapters,
        opt_state=optimizer.init(adapters),
        key=key,
    )


def loss_sum(
    adapters: Any,
    base: Any,
    batch: Batch,
    *,
    model: Llama,
    key: Array | None = None,
    noise: Float32[Array, "B T D"] | None = None,
) -> Float32[Array, ""]:
    """Sums the loss over the supervised tokens of one micro-batch.

    Args:
      adapters: trained tree; bound already where `model.compute.lora` is None.
      base: frozen tree.
      batch: tokens, labels [B, T] and optionally positions, segment_ids,
        attention_mask [B, T].
      model: the architecture.
      key: PRNG key for dropout; None = no dropout.
      noise: added to the embeddings; None = none.
    """
    lora = model.compute.lora
    bound = adapters if lora is None else bind(adapters, base, lora)
    variables = model.compute.place({"params": base, "lora": bound})
    hidden: Any = model.apply(
        variables,
        batch["tokens"],
        attention_mask=batch.get("attention_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        noise=noise,
        rngs=None if key is None else {"dropout": key},
        method="hidden_states",
    )
    return cross_entropy_sum(
        partial(_apply_head, model),
        _unpacked(head_variables(variables, model), model.compute.dtype),
        hidden,
        batch["labels"],
        vocab_size=model.config.vocab_size,
    )


def embedding_noise(
    batch: Batch, key: Array, *, alpha: float, features: int
) -> Float32[Array, "B T D"]:
    """Draws NEFTune's noise (arXiv:2310.05914): uniform in +-alpha / sqrt(N D).

    N is the number of tokens of the text that a token belongs to: of its document in a
    packed row (as if the documents were rows of their own); of the row, as far as
    `attention_mask` goes; and with neither, of the row up to its last supervised token.
    What comes behind that one, padding most of all, changes no loss.

    Args:
      batch: labels [B, T] and optionally segment_ids or attention_mask [B, T].
      key: PRNG key.
      alpha: `neftune_noise_alpha`.
      features: D.
    """
    length = text_lengths(batch).astype(jnp.float32)
    size = alpha / jnp.sqrt(length * features)
    shape = (*batch["labels"].shape, features)
    drawn = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
    return drawn * size[..., None]


def text_lengths(batch: Batch) -> Int[Array, "B T"]:
    """Tokens of the text that each token belongs to, at least 1; see above."""
    labels = batch["labels"]
    rows, length = labels.shape
    if batch.get("segment_ids") is not None:
        segments = batch["segment_ids"]
        counts = jax.vmap(partial(jnp.bincount, length=length + 1))(segments)
        found = jnp.take_along_axis(counts, segments, axis=1)
    elif batch.get("attention_mask") is not None:
        found = batch["attention_mask"].astype(jnp.int32).sum(axis=1, keepdims=True)
    else:
        places = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
        found = jnp.where(labels != IGNORE, places, 0).max(axis=1, keepdims=True)
    return jnp.maximum(jnp.broadcast_to(found, (rows, length)), 1).astype(jnp.int32)


def head_variables(variables: Mapping[str, Any], model: Llama) -> dict[str, Any]:
    """Picks the part of the variables that the output head reads."""
    picked: dict[str, Any] = {}
    for collection, tree in variables.items():
        picked[collection] = {k: tree[k] for k in ("lm_head",) if k in tree}
    if model.config.tie_word_embeddings:
        table = variables["params"]["model"]["embed_tokens"]
        picked["params"]["model"] = {"embed_tokens": table}
    return picked


def _unpacked(variables: Any, dtype: str) -> Any:
    """Head variables as the loss reads them: once, not with every chunk of tokens."""

    def one(leaf: Any) -> Any:
        return nf4.dequantize(leaf, dtype) if isinstance(leaf, NF4Tensor) else leaf

    return jax.tree.map(
        one,
        gathered(on_device(variables)),
        is_leaf=lambda leaf: isinstance(leaf, NF4Tensor),
    )


def _apply_head(model: Llama, variables: Any, hidden: Array) -> Array:
    logits: Any = model.apply(variables, hidden, method="head")
    return logits


def train_step(
    state: TrainState,
    base: Any,
    batch: Batch,
    *,
    model: Llama,
    optimizer: optax.GradientTransformation,
    neftune_noise_alpha: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Takes one optimizer step.

    If the loss or the gradient is not finite the update is not applied: the returned
    state differs from the given one by the step number alone, and
    `metrics["finite"]` is False.

    Args:
      state: before the step; donate it.
      base: frozen parameters; never donated.
      batch: tokens, labels [A, B, T] and optionally positions, segment_ids,
        attention_mask; A micro-batches are accumulated.
      model: the architecture.
      optimizer: from `make_optimizer`.
      neftune_noise_alpha: of `embedding_noise`; None = no noise.

    Returns:
      The state after the step, and scalars: loss (mean over supervised tokens),
      grad_norm (before clipping), supervised_tokens, finite.
    """
    micro = batch["tokens"].shape[0]
    tokens = supervised_tokens(batch["labels"])
    # A window without supervision has loss 0 and gradient 0, not 0/0.
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    step_key = jax.random.fold_in(state.key, state.step)
    config = model.compute.lora
    dropout = config is not None and config.lora_dropout > 0.0

    def mean_loss(adapters: Any, part: Batch, index: Array) -> Array:
        noise = key = None
        if dropout:
            key = jax.random.fold_in(step_key, index)
        if neftune_noise_alpha is not None:
            noise = embedding_noise(
                part,
                jax.random.fold_in(jax.random.fold_in(step_key, index), _NOISE),
                alpha=neftune_noise_alpha,
                features=model.config.hidden_size,
            )
        total = loss_sum(
            adapters,
            base,
            part,
            model=model,
            key=key,
            noise=noise,
        )
        return total / count

    gradient = jax.value_and_grad(mean_loss)
    if micro == 1:
        only = jax.tree.map(lambda leaf: leaf[0], dict(batch))
        loss, grads = gradient(state.adapters, only, jnp.zeros((), jnp.int32))
    else:

        def add(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            part, index = xs
            return jax.tree.map(
                jnp.add, carry, gradient(state.adapters, part, index)
            ), None

        zero = (
            jnp.zeros((), jnp.float32),
            jax.tree.map(jnp.zeros_like, state.adapters),
        )
        (loss, grads), _ = jax.lax.scan(add, zero, (dict(batch), jnp.arange(micro)))
    norm = optax.tree.norm(grads)
    # optax mixes Python floats with int32 counts, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    adapters, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (adapters, opt_state),
        (state.adapters, state.opt_state),
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "supervised_tokens": tokens,
        "finite": finite,
    }
    return (
        dataclasses.replace(
            state, step=state.step + 1, adapters=adapters, opt_state=opt_state
        ),
        metrics,
    )


def jit_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    *,
    neftune_noise_alpha: float | None = None,
) -> Any:
    """`train_step` jitted as runs use it: (state, base, batch), the state donated."""
    step = partial(
        train_step,
        model=model,
        optimizer=optimizer,
        neftune_noise_alpha=neftune_noise_alpha,
    )
    return jax.jit(step, donate_argnums=0)


def eval_step(
    adapters: Any, base: Any, batch: Batch, *, model: Llama
) -> tuple[Array, Array]:
    """Returns (summed loss, supervised tokens) of one batch [B, T].

    Without dropout and without noise.
    """
    total = loss_sum(adapters, base, batch, model=model)
    return total, supervised_tokens(batch["labels"])


def jit_eval(model: Llama) -> Any:
    """`eval_step` jitted: (adapters, base, batch) -> (summed loss, tokens)."""
    return jax.jit(partial(eval_step, model=model))
