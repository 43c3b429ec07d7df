"""The optimizer of a run: one clip over everything, one rate and decay for each array.

    optimizer = make_optimizer(train, steps)           an optax transformation

What `qlora_jax.parameter_groups` says of each array are numbers in the program, not a
part of the state: whatever the groups are, moments and counts lie in the same tree,
that of `optax.adamw`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from qlora_jax import tree as trees
from qlora_jax.adam8bit import scale_by_adam_8bit
from qlora_jax.parameter_groups import Rule, optimizer_groups, rate_of
from qlora_jax.targets import Selection
from qlora_jax.train_config import TrainConfig
from qlora_jax.tree import LAYERS, Path


def make_optimizer(
    config: TrainConfig, steps: int, selection: Selection | None = None
) -> optax.GradientTransformation:
    """Builds clipping and the run's optimizer with its rates, decays and schedules.

    AdamW is arXiv:1711.05101, Lion arXiv:2302.06675, Adafactor arXiv:1804.04235 (with
    the given learning rate, as in Hugging Face's Trainer: neither relative steps nor
    the parameters' scale), and adamw_8bit arXiv:2110.02861 (`qlora_jax.adam8bit`).
    Without groups the state and every bit of the arithmetic are those of
    `optax.chain(optax.clip_by_global_norm, optax.adamw)`.

    Args:
      config: optimizer settings.
      steps: total optimizer steps of the run, for the schedules.
      selection: what is trained. Without it every layer of an array is taken for
        trained, which matters to groups that name layers alone.

    Returns:
      A transformation; its `init` raises UserError as `optimizer_groups` does.
    """

    def rules(tree: Any) -> list[Rule]:
        """The rule of each leaf."""
        of: dict[Path, Rule] = {}
        for group in optimizer_groups(config, tree if selection is None else selection):
            of |= dict.fromkeys(group.paths, group.rule)
        return [of[path] for path, _ in trees.walk(_sorted(tree))]

    def decay(updates: Any, params: Any) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        pairs = zip(leaves, jax.tree.leaves(params), rules(params), strict=True)
        return structure.unflatten(
            [
                u + rule.weight_decay * p if rule.weight_decay else u
                for u, p, rule in pairs
            ]
        )

    def scale(updates: Any, params: Any, count: Array) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        of = rules(params)
        rates = {rule: -1 * rate_of(rule, steps)(count) for rule in dict.fromkeys(of)}
        pairs = zip(leaves, of, strict=True)
        return structure.unflatten(
            [jnp.array(rates[rule], dtype=u.dtype) * u for u, rule in pairs]
        )

    parts = [_direction(config), _stateless(decay, rules), _scheduled(scale)]
    optimizer = optax.chain(*parts)
    if config.max_grad_norm is not None:
        clip = optax.clip_by_global_norm(config.max_grad_norm)
        optimizer = optax.chain(clip, optimizer)
    if config.ema_decay is not None:
        optimizer = optax.chain(optimizer, moving_average(config.ema_decay))
    return optimizer


def _sorted(tree: Any) -> Any:
    """A tree whose walk visits the leaves as `jax.tree.leaves` does."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: _sorted(tree[name]) for name in sorted(tree)}


def _direction(config: TrainConfig) -> optax.GradientTransformation:
    """Gradients to updates of order one."""
    b1, b2 = config.adam_beta1, config.adam_beta2
    if config.optimizer == "adamw":
        return optax.scale_by_adam(b1, b2, config.adam_epsilon)
    if config.optimizer == "adamw_8bit":
        return scale_by_adam_8bit(b1, b2, config.adam_epsilon)
    if config.optimizer == "lion":
        return optax.scale_by_lion(b1, b2)
    # It factors the two longest axes of 128 and more. Layers are never one of them: no
    # Llama has so many.
    return _then(optax.scale_by_factored_rms(), _clip_by_layer)


def _then(
    first: optax.GradientTransformation, function: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """A transformation with a function of its updates behind it."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = first.update(updates, state, params)
        return function(updates), state

    return optax.GradientTransformation(first.init, update)


def _clip_by_layer(updates: Any) -> Any:
    """Adafactor's clipping of an update at a root mean square of 1, layer by layer."""

    def one(path: tuple, leaf: Array) -> Array:
        keys = tuple(str(getattr(key, "key", key)) for key in path)
        stacked = keys[: len(LAYERS)] == LAYERS
        axes = tuple(range(1 if stacked else 0, leaf.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(leaf), axis=axes, keepdims=True))
        return leaf / jnp.maximum(1.0, rms)

    return jax.tree_util.tree_map_with_path(one, updates)


def _stateless(
    function: Callable[[Any, Any], Any], check: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """(updates, parameters) -> updates, with the state of `add_decayed_weights`."""

    def init(params: Any) -> optax.EmptyState:
        check(params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return function(updates, params), state

    return optax.GradientTransformation(init, update)


def _scheduled(
    function: Callable[[Any, Any, Array], Any],
) -> optax.GradientTransformation:
    """(updates, parameters, count) -> updates; the state of `scale_by_schedule`."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count: Any = optax.safe_increment(state.count)
        updates = function(updates, params, state.count)
        return updates, optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformation(init, update)


class EmaState(NamedTuple):
    """A moving average of what is trained."""

    count: Array
    """Steps taken, int32 []."""
    ema: Any
    """The average, a tree like the trained one."""


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps a moving average of the parameters; updates pass unchanged.

    It is `a <- d a + (1 - d) p` over the parameters p after each step t (from 1), with
    `d = min(decay, t / (t + 9))`, so that the start is forgotten in a short run too.
    """

    def init(params: Any) -> EmaState:
        # Buffers of their own: the step donates both.
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, EmaState]:
        count: Any = optax.safe_increment(state.count)
        taken = count.astype(jnp.float32)
        kept = jnp.minimum(decay, taken / (taken + 9.0))
        after = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda a, p: a + (1.0 - kept) * (p - a), state.ema, after)
        return updates, EmaState(count, ema)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> Any | None:
    """The moving average in an optimizer's state; None without `ema_decay`."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda n: isinstance(n, EmaState))
    found = [node.ema for node in nodes if isinstance(node, EmaState)]
    return found[0] if found else None
