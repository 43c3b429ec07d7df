"""One training step as a pure function, and its state.

    state, metrics = train_step(state, base, batch, model=model, optimizer=optimizer)

`state` holds everything that changes (step, adapters, optimizer moments, PRNG key) and
nothing else. The frozen base is an argument: it is never copied into the state and
never saved again. Jit the step with the state donated:

    step = jax.jit(
        partial(train_step, model=..., optimizer=...),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )

The gradient is that of the mean loss over the whole accumulation window: summed over
micro-batches and divided once (`qlora_jax.training.objectives`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from qlora_jax.compiler import compiler_options
from qlora_jax.models import Llama
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import (
    NEXT_TOKEN,
    Batch,
    Objective,
    embedding_noise,
)

# Separates the noise key from the dropout key, which folds in the same numbers.
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


def train_step(
    state: TrainState,
    base: Any,
    batch: Batch,
    *,
    model: Llama,
    optimizer: optax.GradientTransformation,
    neftune_noise_alpha: float | None = None,
    objective: Objective = NEXT_TOKEN,
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
      objective: the loss to minimize.

    Returns:
      The state after the step, and scalars: loss (mean over the terms of the
      objective), grad_norm (before clipping), supervised_tokens, finite.
    """
    # Of the whole window [A, B, T]. A mean of the micro-batches' means would weigh the
    # tokens of a micro-batch with few supervised ones more than others.
    tokens = objective.count(batch)
    # A window without supervision has loss 0 and gradient 0, not 0/0.
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    # A function of the run's key and the step's number, so a continued run draws what
    # an uninterrupted one would have drawn.
    step_key = jax.random.fold_in(state.key, state.step)
    lora = model.compute.lora
    has_dropout = lora is not None and lora.lora_dropout > 0.0

    def mean_loss(adapters: Any, micro_batch: Batch, index: Array) -> Array:
        noise = key = None
        if has_dropout:
            # Micro-batches must not share a dropout mask.
            key = jax.random.fold_in(step_key, index)
        if neftune_noise_alpha is not None:
            noise = embedding_noise(
                micro_batch,
                jax.random.fold_in(jax.random.fold_in(step_key, index), _NOISE),
                alpha=neftune_noise_alpha,
                features=model.config.hidden_size,
            )
        total = objective.loss_sum(
            adapters, base, micro_batch, model=model, key=key, noise=noise
        )
        # Divided here, so that losses and gradients of micro-batches can just be added.
        return total / count

    loss, grads = _accumulate(jax.value_and_grad(mean_loss), state.adapters, batch)
    # Before clipping. A NaN or infinity in any gradient shows in the norm.
    norm = optax.tree.norm(grads)
    # optax mixes Python floats with int32 counts, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # A select instead of a branch: both sides exist anyway, and XLA fuses it.
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


def _accumulate(
    value_and_grad: Callable[..., Any], adapters: Any, batch: Batch
) -> tuple[Array, Any]:
    """Sums (loss, gradient) over the micro-batches of [A, B, T]."""
    micro_batches = batch["tokens"].shape[0]
    if micro_batches == 1:
        # No scan, so that no second copy of the gradient is carried.
        only = jax.tree.map(lambda leaf: leaf[0], dict(batch))
        return value_and_grad(adapters, only, jnp.zeros((), jnp.int32))

    def add(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        micro_batch, index = xs
        return jax.tree.map(
            jnp.add, carry, value_and_grad(adapters, micro_batch, index)
        ), None

    # Adapters are float32, and so is this sum over any number of micro-batches.
    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, adapters))
    # One program for every A, with the activations of one micro-batch at a time.
    total, _ = jax.lax.scan(add, zero, (dict(batch), jnp.arange(micro_batches)))
    return total


def jit_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    *,
    platform: str | None = None,
    state: Any = None,
    stop_flags: bool = False,
) -> Any:
    """Jits `train_step` as a run takes it and `plan` plans it.

    Args:
      model: the architecture.
      optimizer: from `make_optimizer`.
      config: the noise.
      platform: as `compiler_options` takes it.
      state: on a mesh, its shapes with their shardings, which the state after the step
        has too.
      stop_flags: take a fourth argument, integers whose sum becomes
        `metrics["stopping"]`: all processes of a run stop by the same number.

    Returns:
      (state, base, batch) -> (state, metrics), with the state donated.
    """
    step = partial(
        train_step,
        model=model,
        optimizer=optimizer,
        neftune_noise_alpha=config.neftune_noise_alpha,
        objective=NEXT_TOKEN,
    )
    if stop_flags:
        step = partial(_with_flags, step)
    settings: dict[str, Any] = {}
    if state is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        settings["out_shardings"] = (shardings, None)
    return jax.jit(
        step,
        donate_argnums=0,
        compiler_options=compiler_options(platform) or None,
        **settings,
    )


def _with_flags(
    step: Callable[..., Any], state: TrainState, base: Any, batch: Batch, flags: Array
) -> tuple[TrainState, dict[str, Array]]:
    state, metrics = step(state, base, batch)
    return state, metrics | {"stopping": flags.sum()}


def eval_step(
    adapters: Any,
    base: Any,
    batch: Batch,
    *,
    model: Llama,
    objective: Objective = NEXT_TOKEN,
) -> tuple[Array, Array]:
    """Returns (summed loss, number of terms) of one batch [B, T].

    Without dropout and without noise.
    """
    total = objective.loss_sum(adapters, base, batch, model=model)
    return total, objective.count(batch)


def jit_eval(model: Llama) -> Any:
    """Returns `eval_step` jitted: (adapters, base, batch) -> (summed loss, tokens)."""
    return jax.jit(
        partial(eval_step, model=model), compiler_options=compiler_options() or None
    )
