"""One training step as a pure function, and what it needs: state, optimizer, schedule.

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
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.llama import Llama
from qlora_jax.lora import bind
from qlora_jax.loss import cross_entropy_sum, supervised_tokens
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.placement import gathered, on_device

Batch = Mapping[str, Array]


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run, batch and optimizer; the `[train]` section of a run file."""

    steps: int | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the data; give this or `steps`."""
    batch_size: int = 1
    """Rows of a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches summed into one optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Global norm that gradients are clipped to; none = not clipped."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adapter_init: str | None = None
    """PEFT directory whose adapter the run starts from, instead of a fresh one.
    `[lora]` is then the adapter's own; of what is given there, `lora_alpha`,
    `alpha_pattern`, `use_rslora` and `lora_dropout` may differ from it, and anything
    else that does is an error."""
    seed: int = 0
    """Of the adapters' initialization and of dropout."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                "train: give either `steps` or `epochs`, got "
                f"steps={self.steps} and epochs={self.epochs}."
            )
        for name in ("steps", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train: `{name}` must be at least 1, got {value}.")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"train: `epochs` must be > 0, got {self.epochs}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise UserError(
                f"train: `learning_rate` must be >= 0, got {self.learning_rate}."
            )
        if self.lr_scheduler not in ("constant", "linear", "cosine"):
            raise UserError(
                "train: `lr_scheduler` must be 'constant', 'linear' or 'cosine', got "
                f"{self.lr_scheduler!r}."
            )
        if self.warmup_steps < 0:
            raise UserError(
                f"train: `warmup_steps` must be >= 0, got {self.warmup_steps}."
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise UserError(
                f"train: `warmup_steps`={self.warmup_steps} exceeds "
                f"`steps`={self.steps}; the learning rate would never reach its peak."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(
                f"train: `max_grad_norm` must be > 0 or none, got {self.max_grad_norm}."
            )
        if self.weight_decay < 0:
            raise UserError(
                f"train: `weight_decay` must be >= 0, got {self.weight_decay}."
            )


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


def schedule(config: TrainConfig, steps: int) -> Callable[[Any], Array]:
    """Returns step -> learning rate, as the Hugging Face schedules define it.

    Step s (from 0) of warm-up w and total n: rising s / w, then 1, (n - s) / (n - w) or
    (1 + cos(pi (s - w) / (n - w))) / 2.
    """
    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)

    def rate(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        if config.lr_scheduler == "linear":
            factor = 1.0 - done
        elif config.lr_scheduler == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(math.pi * done))
        else:
            factor = jnp.ones_like(done)
        if warmup:
            factor = jnp.where(step < warmup, step / warmup, factor)
        return config.learning_rate * factor

    return rate


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Builds clipping and AdamW (arXiv:1711.05101) with the run's schedule.

    Args:
      config: optimizer settings.
      steps: total optimizer steps of the run, for the schedule.
    """
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    if config.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


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
) -> Float32[Array, ""]:
    """Sums the loss over the supervised tokens of one micro-batch.

    Args:
      adapters: trained tree; bound already where `model.compute.lora` is None.
      base: frozen tree.
      batch: tokens, labels [B, T] and optionally positions, segment_ids,
        attention_mask [B, T].
      model: the architecture.
      key: PRNG key for dropout; None = no dropout.
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
        key = jax.random.fold_in(step_key, index) if dropout else None
        return loss_sum(adapters, base, part, model=model, key=key) / count

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


def jit_step(model: Llama, optimizer: optax.GradientTransformation) -> Any:
    """`train_step` jitted as runs use it: (state, base, batch), the state donated."""
    step = partial(train_step, model=model, optimizer=optimizer)
    return jax.jit(step, donate_argnums=0)


def eval_step(
    adapters: Any, base: Any, batch: Batch, *, model: Llama
) -> tuple[Array, Array]:
    """Returns (summed loss, supervised tokens) of one batch [B, T], no dropout."""
    total = loss_sum(adapters, base, batch, model=model)
    return total, supervised_tokens(batch["labels"])
