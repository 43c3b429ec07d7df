"""The optimizer of a run: one clip over everything, one rate and decay for each array.

    optimizer = make_optimizer(train, steps)           an optax transformation

The rates and decays of `qlora_jax.training.parameter_groups` are constants of the
program and not part of the state: whatever the groups are, the state is the tree of
`optax.adamw`.

`adamw_8bit` keeps both moments of Adam in 8 bits (Dettmers et al., arXiv:2110.02861):
a byte for each number and a float32 for each 256 of them, 2.03 bytes a parameter
instead of 8. A block is scaled by its largest absolute value to [-1, 1], and each
number is encoded as the nearest of 256 values spaced like a floating-point number with
a movable point: seven decades, finer towards 1. The first moment has a sign; the second
has none and twice the values in each decade. Both are decoded, updated and applied in
float32, and encoded again, a part of a large array at a time, so that no moment is ever
held entirely in float32.

Two rules protect small numbers. An array of fewer than 4,096 numbers stays float32. A
second moment that is not 0 is never encoded as 0 but as the smallest value: the update
divides by its root, and 0 would turn a small gradient into an unbounded update.
(bitsandbytes, which has the same tables, allows 0.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32

from qlora_jax import tree as trees
from qlora_jax.lora import Selection
from qlora_jax.nf4 import DYNAMIC_MAP
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.parameter_groups import Rule, optimizer_groups, rate_of
from qlora_jax.tree import LAYERS, Path


def make_optimizer(
    config: TrainConfig, steps: int, selection: Selection | None = None
) -> optax.GradientTransformation:
    """Builds clipping and the run's optimizer with its rates, decays and schedules.

    AdamW is arXiv:1711.05101, Lion arXiv:2302.06675, Adafactor arXiv:1804.04235 (with
    a fixed learning rate, as in Hugging Face's Trainer: neither relative steps nor
    the parameters' scale), and adamw_8bit arXiv:2110.02861.
    Without groups the state and every bit of the arithmetic are those of
    `optax.chain(optax.clip_by_global_norm, optax.adamw)`.

    Args:
      config: optimizer settings.
      steps: total optimizer steps of the run, for the schedules.
      selection: what is trained. Without it every layer of an array counts as
        trained, which matters only to groups that name layers.

    Returns:
      A transformation; its `init` raises UserError as `optimizer_groups` does.
    """

    def rules(tree: Any) -> list[Rule]:
        """Returns the rule of each leaf."""
        by_path: dict[Path, Rule] = {}
        for group in optimizer_groups(config, tree if selection is None else selection):
            by_path |= dict.fromkeys(group.paths, group.rule)
        # In the order of `jax.tree.leaves`, so that rules and arrays can be zipped.
        return [by_path[path] for path, _ in trees.walk(_sorted(tree))]

    def decay(updates: Any, params: Any) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        pairs = zip(leaves, jax.tree.leaves(params), rules(params), strict=True)
        return structure.unflatten(
            [
                # Decoupled: added after Adam's division, so large second moments do not
                # weaken it. The learning rate then multiplies both terms.
                u + rule.weight_decay * p if rule.weight_decay else u
                for u, p, rule in pairs
            ]
        )

    def scale(updates: Any, params: Any, count: Array) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        leaf_rules = rules(params)
        # Once for each rule, not for each array. Negative, since updates are added.
        rates = {
            rule: -1 * rate_of(rule, steps)(count) for rule in dict.fromkeys(leaf_rules)
        }
        pairs = zip(leaves, leaf_rules, strict=True)
        return structure.unflatten(
            [jnp.array(rates[rule], dtype=u.dtype) * u for u, rule in pairs]
        )

    # The order of `optax.adamw`: direction, decay, rate.
    parts = [_direction(config), _stateless(decay, rules), _scheduled(scale)]
    optimizer = optax.chain(*parts)
    if config.max_grad_norm is not None:
        # Outermost: one norm of the raw gradients of all groups.
        clip = optax.clip_by_global_norm(config.max_grad_norm)
        optimizer = optax.chain(clip, optimizer)
    if config.ema_decay is not None:
        # Last, where updates are what will really be added to the parameters.
        optimizer = optax.chain(optimizer, moving_average(config.ema_decay))
    return optimizer


def _sorted(tree: Any) -> Any:
    """Returns the tree in the order in which `jax.tree.leaves` visits it."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: _sorted(tree[name]) for name in sorted(tree)}


def _direction(config: TrainConfig) -> optax.GradientTransformation:
    """Returns what turns gradients into updates of order one."""
    b1, b2 = config.adam_beta1, config.adam_beta2
    if config.optimizer == "adamw":
        return optax.scale_by_adam(b1, b2, config.adam_epsilon)
    if config.optimizer == "adamw_8bit":
        return scale_by_adam_8bit(b1, b2, config.adam_epsilon)
    if config.optimizer == "lion":
        # sign(b1 m + (1 - b1) g); m itself decays with b2.
        return optax.scale_by_lion(b1, b2)
    # Adafactor factors the two longest axes of at least 128. The layer axis is never
    # among them: no model has that many layers.
    return _then(optax.scale_by_factored_rms(), _clip_by_layer)


def _then(
    first: optax.GradientTransformation, function: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Returns a transformation that applies a function to the updates of another."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = first.update(updates, state, params)
        return function(updates), state

    return optax.GradientTransformation(first.init, update)


def _clip_by_layer(updates: Any) -> Any:
    """Clips updates at a root mean square of 1, layer by layer, as Adafactor does."""

    def clip(path: tuple, leaf: Array) -> Array:
        keys = tuple(str(getattr(key, "key", key)) for key in path)
        stacked = keys[: len(LAYERS)] == LAYERS
        axes = tuple(range(1 if stacked else 0, leaf.ndim))
        # u / max(1, RMS(u) / d) with d = 1. A stack is L arrays here: a large update of
        # one layer does not shrink those of the others.
        rms = jnp.sqrt(jnp.mean(jnp.square(leaf), axis=axes, keepdims=True))
        return leaf / jnp.maximum(1.0, rms)

    return jax.tree_util.tree_map_with_path(clip, updates)


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
        # The count before this step, from 0, as optax has it.
        updates = function(updates, params, state.count)
        return updates, optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformation(init, update)


class EmaState(NamedTuple):
    """State of `moving_average`."""

    count: Array
    """Steps taken, int32 []."""
    ema: Any
    """The average: a tree like the trained one."""


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps a moving average of the parameters; updates pass unchanged.

    It is `a <- d a + (1 - d) p` over the parameters p after each step t (from 1), with
    `d = min(decay, t / (t + 9))`, so that a short run forgets its start too.
    """

    def init(params: Any) -> EmaState:
        # Copies: the step donates the parameters and this state.
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, EmaState]:
        count: Any = optax.safe_increment(state.count)
        taken = count.astype(jnp.float32)
        # 0.1 at the first step, 0.5 at the ninth, 0.99 at the 891st.
        kept = jnp.minimum(decay, taken / (taken + 9.0))
        after = optax.apply_updates(params, updates)
        # Equals d a + (1 - d) p, and is exactly a where p does not change.
        ema = jax.tree.map(lambda a, p: a + (1.0 - kept) * (p - a), state.ema, after)
        return updates, EmaState(count, ema)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> Any | None:
    """Returns the moving average in an optimizer state; None without `ema_decay`."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda n: isinstance(n, EmaState))
    averages = (node.ema for node in nodes if isinstance(node, EmaState))
    return next(averages, None)


# --- adamw_8bit ---

BLOCK = 256
"""Numbers that share a scale, in row-major order."""

SMALLEST = 4096
"""Arrays with fewer numbers than this stay in float32."""

PART = 1 << 14
"""Blocks updated at a time: 4 million numbers."""


def _unsigned_map() -> np.ndarray:
    """Seven decades, decade i holding 2^(i+1) midpoints of an even grid on [0.1, 1]."""
    values = [np.zeros(1), np.ones(1)]
    # 2 (2^7 - 1) values, 0 and 1: all 256 codes for one sign.
    for decade in range(7):
        grid = np.linspace(0.1, 1.0, 2 ** (decade + 1) + 1)
        values.append(10.0 ** (decade - 6) * (grid[:-1] + grid[1:]) / 2)
    return np.sort(np.concatenate(values)).astype(np.float32)


SIGNED, UNSIGNED = DYNAMIC_MAP, _unsigned_map()


class Coded(NamedTuple):
    """An array encoded in 8 bits."""

    codes: Any
    """uint8, in the array's shape."""
    absmax: Any
    """float32 [G], one for each block."""


class Adam8bitState(NamedTuple):
    """Both moments; leaves are `Coded`, or float32 where they are small."""

    count: Any
    """Steps taken, int32 []."""
    mu: Any
    nu: Any


def encode(x: Float32[Array, "G 256"], table: np.ndarray) -> Coded:
    """Encodes blocks, each number as the nearest value of `table`.

    Args:
      x: finite numbers; not below 0 where `table` is not.
      table: float32 [256], ascending, within [-1, 1].
    """
    absmax = jnp.abs(x).max(axis=1)
    # A block of zeros has scale 0 and decodes to zeros.
    scaled = x / jnp.where(absmax > 0, absmax, 1.0)[:, None]
    middle = (table[:-1] + table[1:]) / np.float32(2)
    between = jnp.asarray(middle)
    # A binary search for the number of midpoints below: eight comparisons.
    # Bit by bit from the highest: `codes` midpoints are known to be below, and the last
    # of the next `half` decides whether all of those are.
    codes = jnp.where(scaled > middle[127], 128, 0).astype(jnp.int32)
    for half in (64, 32, 16, 8, 4, 2, 1):
        codes = jnp.where(scaled > between[codes + (half - 1)], codes + half, codes)
    codes = codes.astype(jnp.uint8)
    # Never 0 for a second moment that is not: see the module docstring.
    if table[0] == 0:
        codes = jnp.where((codes == 0) & (x > 0), jnp.uint8(1), codes)
    return Coded(codes, absmax)


def decode(coded: Coded, table: np.ndarray) -> Float32[Array, "G 256"]:
    """Returns the numbers that `encode` chose."""
    return jnp.asarray(table)[coded.codes] * coded.absmax[:, None]


def _blocks(x: Array, count: int) -> Array:
    """Returns the array as [count, 256], padded with zeros."""
    flat = x.reshape(-1)
    missing = count * BLOCK - flat.size
    return (jnp.pad(flat, (0, missing)) if missing else flat).reshape(count, BLOCK)


def _unblocked(blocks: Array, like: Array) -> Array:
    flat = blocks.reshape(-1)
    return (flat if flat.size == like.size else flat[: like.size]).reshape(like.shape)


def _parts(blocks: int) -> tuple[int, int]:
    """Returns (parts, blocks in a part) whose product is at least `blocks`."""
    if blocks <= PART:
        return 1, blocks
    # A size that divides `blocks` needs no padding, and padding is a copy.
    even = (size for size in range(PART, PART // 8, -1) if blocks % size == 0)
    size = next(even, PART)
    return -(-blocks // size), size


def scale_by_adam_8bit(
    b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments of 8 bits.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    def zeros(leaf: Any, table: np.ndarray) -> Any:
        if leaf.size < SMALLEST:
            return jnp.zeros(leaf.shape, jnp.float32)
        # The code of 0: 127 in the signed table, 0 in the other.
        zero = int(np.searchsorted(table, 0.0))
        codes = jnp.full(leaf.shape, zero, jnp.uint8)
        blocks = -(-leaf.size // BLOCK)
        return Coded(codes, jnp.zeros((blocks,), jnp.float32))

    def init(params: Any) -> Adam8bitState:
        return Adam8bitState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda leaf: zeros(leaf, SIGNED), params),
            nu=jax.tree.map(lambda leaf: zeros(leaf, UNSIGNED), params),
        )

    def in_float32(g: Array, mu: Any, nu: Any, first: Array, second: Array) -> tuple:
        """Returns the update and the new moments of an array in float32."""
        # m and v over their bias corrections 1 - b^t: mhat / (sqrt(vhat) + eps).
        m = b1 * mu + (1.0 - b1) * g
        v = b2 * nu + (1.0 - b2) * (g * g)
        return (m / first) / (jnp.sqrt(v / second) + eps), m, v

    def in_8bit(g: Array, mu: Coded, nu: Coded, *corrections: Array) -> tuple:
        """Returns the same for an array in 8 bits, computed part by part."""
        count = mu.absmax.shape[0]
        parts, size = _parts(count)

        def part(i: Array, arrays: tuple) -> tuple:
            # Written over the part that was read, so that no second copy exists.
            g, mu, nu = jax.tree.map(lambda a: a[i], arrays)
            before = decode(mu, SIGNED), decode(nu, UNSIGNED)
            update, m, v = in_float32(g, *before, *corrections)
            new = update, encode(m, SIGNED), encode(v, UNSIGNED)
            return jax.tree.map(lambda a, b: a.at[i].set(b), arrays, new)

        def split(coded: Coded) -> Coded:
            # Padding has scale 0 and decodes to zeros, whatever its codes.
            absmax = jnp.pad(coded.absmax, (0, parts * size - count))
            codes = _blocks(coded.codes, parts * size)
            return Coded(codes.reshape(parts, size, BLOCK), absmax.reshape(parts, size))

        gradient = _blocks(g, parts * size).reshape(parts, size, BLOCK)
        arrays = gradient, split(mu), split(nu)
        update, m, v = jax.lax.fori_loop(0, parts, part, arrays)

        def join(new: Coded) -> Coded:
            absmax = new.absmax.reshape(-1)[:count]
            return Coded(_unblocked(new.codes, g), absmax)

        return _unblocked(update, g), join(m), join(v)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count: Any = optax.safe_increment(state.count)
        taken = count.astype(jnp.float32)
        # Moments start at 0, so after t steps they are too small by a factor 1 - b^t.
        corrections = 1.0 - b1**taken, 1.0 - b2**taken
        leaves, structure = jax.tree.flatten(updates)
        moments = (structure.flatten_up_to(tree) for tree in (state.mu, state.nu))
        rows = [
            (in_8bit if isinstance(mu, Coded) else in_float32)(g, mu, nu, *corrections)
            for g, mu, nu in zip(leaves, *moments, strict=True)
        ]
        out, mu, nu = (
            structure.unflatten(column) for column in zip(*rows, strict=True)
        )
        return out, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)
