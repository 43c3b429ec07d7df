"""Learning rate, weight decay and schedule of each trained array.

    groups = optimizer_groups(train, selection)

Settings apply in this order: the first of `[[train.groups]]` that matches; LoRA+'s
ratio, for lora_B; `embedding_learning_rate`, for embed_tokens and lm_head; the rate of
the run.

Decoupled weight decay (arXiv:1711.05101) leaves out norms, biases and DoRA's
magnitudes, unless a group sets it. Decay pulls towards 0. For A and B, 0 means the
unchanged base; a norm's scale and a magnitude (arXiv:2402.09353) start from the values
of the base, and 0 would mean no signal.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax import tree as trees
from qlora_jax.errors import raise_problems
from qlora_jax.lora import Selection
from qlora_jax.training.config import TrainConfig
from qlora_jax.tree import EMBEDDING, HEAD, LAYERS, Path, dotted

_TABLES = (EMBEDDING, HEAD)
_LORA_B = ("lora_B", "lora_embedding_B")
_NOT_DECAYED = ("bias", "lora_bias", "lora_magnitude_vector")


@dataclass(frozen=True)
class Rule:
    """How an array is updated."""

    learning_rate: float
    """At its peak."""
    weight_decay: float
    lr_scheduler: str
    warmup_steps: int | float
    """As in `TrainConfig`."""

    def count_warmup(self, steps: int) -> int:
        """Returns the steps of the warm-up in a run of so many."""
        if isinstance(self.warmup_steps, int):
            return self.warmup_steps
        # The decimal that was written: 0.29 of 100 steps is 29.
        return math.floor(Fraction(repr(self.warmup_steps)) * steps)


@dataclass(frozen=True)
class Group:
    """Arrays that share a rule."""

    name: str
    """The pattern of `[[train.groups]]`, "embeddings", "lora_B", "no decay" (where the
    run decays its weights but not these) where those apply, else "default"."""
    rule: Rule
    paths: tuple[Path, ...]
    parameters: int

    def report(self) -> dict[str, Any]:
        """Returns the entry for report.json."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            **dataclasses.asdict(self.rule),
        }

    def __str__(self) -> str:
        """Returns one line for a person."""
        rule = self.rule
        warmup = f"{rule.warmup_steps:,}"
        if isinstance(rule.warmup_steps, float):
            warmup = f"{100 * rule.warmup_steps:g}%"
        return (
            f"{self.name}: {self.parameters:,} parameters, learning rate "
            f"{rule.learning_rate:g} ({rule.lr_scheduler}, warm-up {warmup}), weight "
            f"decay {rule.weight_decay:g}"
        )


def note_idle(groups: Sequence[Group]) -> str | None:
    """Returns a note on arrays whose learning rate is 0; None if there are none.

    A rate of 0 is allowed, since a part may be meant to stay as it is, but it is also
    an easy mistake.
    """
    idle = [group for group in groups if group.rule.learning_rate == 0]
    if not idle:
        return None
    count, total = (sum(g.parameters for g in some) for some in (idle, groups))
    if count == total:
        return (
            f"the learning rate is 0, of all {total:,} trained parameters: this run "
            "will learn nothing. `train.learning_rate` sets it (default "
            f"{TrainConfig.learning_rate:g})."
        )
    names = ", ".join(repr(group.name) for group in idle)
    return (
        f"the learning rate of {count:,} of {total:,} trained parameters is 0 (group "
        f"{names}): they are saved as they started."
    )


class _Trained(NamedTuple):
    """A trained array."""

    path: Path
    names: tuple[str, ...]
    """PEFT's parameter name in each trained layer."""
    parameters: int


def optimizer_groups(
    config: TrainConfig, trained: Selection | Mapping[str, Any]
) -> tuple[Group, ...]:
    """Groups the trained arrays by their rule.

    Args:
      config: optimizer settings.
      trained: the selection, or the tree of its arrays or shapes, whose layers then
        all count as trained.

    Raises:
      UserError: all settings that apply to nothing that is trained, and groups that
        would divide an array.
    """
    arrays = _arrays(trained)
    problems: list[str] = []
    chosen = {array.path: _choice(config, array, problems) for array in arrays}
    taken = set(chosen.values())
    names = [name for array in arrays for name in array.names]
    for number, group in enumerate(config.groups):
        if number in taken:
            continue
        hits = [name for name in names if re.search(group.match, name)]
        if hits:
            what = (
                f"an earlier group has all that it matches, {hits[0]} for one; the "
                "first that matches counts."
            )
        else:
            what = f"it matches nothing that is trained.{_near(group.match, names)}"
        problems.append(f"group {number + 1} (`match` = {group.match!r}): {what}")
    if config.embedding_learning_rate is not None and not any(
        array.path[:-1] in _TABLES for array in arrays
    ):
        problems.append(
            f"`embedding_learning_rate` = {config.embedding_learning_rate:g}, and "
            "nothing of embed_tokens or lm_head is trained. Name them in "
            "`lora.modules_to_save` or `lora.target_modules`, or leave it out."
        )
    if config.loraplus_lr_ratio is not None and not any(
        array.path[-1] in _LORA_B for array in arrays
    ):
        problems.append(
            f"`loraplus_lr_ratio` = {config.loraplus_lr_ratio:g}, and no lora_B is "
            "trained. Leave it out."
        )
    raise_problems("the [train] settings", problems, "train: ")
    members: dict[tuple[str, Rule], list[_Trained]] = {}
    for array in arrays:
        key = _rule(config, array.path, chosen[array.path])
        members.setdefault(key, []).append(array)
    return tuple(
        Group(
            name=name,
            rule=rule,
            paths=tuple(array.path for array in arrays),
            parameters=sum(array.parameters for array in arrays),
        )
        for (name, rule), arrays in members.items()
    )


def _arrays(trained: Selection | Mapping[str, Any]) -> list[_Trained]:
    if not isinstance(trained, Selection):
        out = []
        for path, leaf in trees.walk(trained):
            stacked = path[: len(LAYERS)] == LAYERS
            names = dotted(path, leaf.shape[0] if stacked else None)
            out.append(_Trained(path, tuple(names), math.prod(leaf.shape)))
        return out
    out = []
    for a in trained.adapted:
        # Counted without the padding of ranks, as `Selection.groups` counts.
        present = [i for i, rank in enumerate(a.ranks) if rank]
        for part in a.parts:
            path = (*a.path, part)
            names = dotted(path, a.layers)
            count = sum(math.prod(a.parts_of(a.ranks[i])[part]) for i in present)
            out.append(_Trained(path, tuple(names[i] for i in present), count))
    for w in trained.full_tensors:
        if w.tied_to is None:
            names = dotted(w.path, w.layers)
            chosen = [n for n, c in zip(names, w.trained, strict=True) if c]
            count = math.prod(w.shape) * len(chosen)
            out.append(_Trained(w.path, tuple(chosen), count))
    for r in trained.rows:
        if r.tied_to is None:
            path = (*r.path, "trainable_tokens_delta")
            count = len(r.indices) * r.features
            out.append(_Trained(path, (".".join(path),), count))
    return out


def _choice(config: TrainConfig, array: _Trained, problems: list[str]) -> int | None:
    """Returns the index of the group that an array belongs to."""

    def first(name: str) -> int | None:
        hits = (i for i, g in enumerate(config.groups) if re.search(g.match, name))
        return next(hits, None)

    groups = {name: first(name) for name in array.names}
    indices = set(groups.values())
    if len(indices) <= 1:
        return indices.pop() if indices else None
    number = min(i for i in indices if i is not None)
    inside = [name for name, i in groups.items() if i == number]
    outside = [name for name, i in groups.items() if i != number]
    problems.append(
        f"group {number + 1} (`match` = {config.groups[number].match!r}) would divide "
        f"an array: it takes {inside[0]} and not {outside[0]}, and a module's "
        "parameters of all layers are one array here. Match all trained layers of a "
        "module or none."
    )
    return number


def _rule(config: TrainConfig, path: Path, choice: int | None) -> tuple[str, Rule]:
    """Returns the group name and the rule of an array in group `choice`."""
    group = None if choice is None else config.groups[choice]
    words = [] if group is None else [group.match]
    rate, decay = config.learning_rate, config.weight_decay
    if group is not None and group.learning_rate is not None:
        rate = group.learning_rate
    else:
        if path[:-1] in _TABLES and config.embedding_learning_rate is not None:
            words.append("embeddings")
            rate = config.embedding_learning_rate
        if path[-1] in _LORA_B and config.loraplus_lr_ratio is not None:
            words.append("lora_B")
            # eta_B = ratio * eta_A, also on top of the embedding's own rate.
            rate = rate * config.loraplus_lr_ratio
    words = words or ["default"]
    if group is not None and group.weight_decay is not None:
        decay = group.weight_decay
    elif decay and not _is_decayed(path):
        words.append("no decay")
        decay = 0.0
    kind, warmup = config.lr_scheduler, config.warmup_steps
    if group is not None:
        kind = group.lr_scheduler or kind
        warmup = warmup if group.warmup_steps is None else group.warmup_steps
    return ", ".join(words), Rule(rate, decay, kind, warmup)


def _is_decayed(path: Path) -> bool:
    *module, name = path
    # By name: stacked norms and biases have two axes, like a matrix.
    return name not in _NOT_DECAYED and "norm" not in "".join(module[-1:])


def _near(pattern: str, names: list[str]) -> str:
    """Returns names spelled like a pattern, or examples of names if none is close."""
    plain = re.sub(r"\\d[+*]?|\d+", "0", pattern)
    plain = re.sub(r"[\\^$()*+?|\[\]]", "", plain)
    first = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    # A pattern more often matches a part of a name than all of it.
    parts = {
        ".".join(name.split(".")[start:stop]): name
        for name in first
        for start in range(name.count(".") + 1)
        for stop in range(start + 1, name.count(".") + 2)
    }
    close = difflib.get_close_matches(plain, parts, n=3)
    near = list(dict.fromkeys(first[parts[part]] for part in close))
    if near:
        return f" Near names: {', '.join(near)}."
    return f" Trained are, for example, {', '.join(list(first.values())[:3])}."


# --- Learning rates over the steps ---


def schedule(config: TrainConfig, steps: int) -> Callable[[Any], Array]:
    """Returns step -> learning rate, as the Hugging Face schedules define it.

    Step s (from 0) of warm-up w and total n: rising s / w, then 1, (n - s) / (n - w) or
    (1 + cos(pi (s - w) / (n - w))) / 2.
    """
    return rate_of(
        Rule(config.learning_rate, 0.0, config.lr_scheduler, config.warmup_steps), steps
    )


def rate_of(rule: Rule, steps: int) -> Callable[[Any], Array]:
    """Returns step -> learning rate; see `schedule`."""
    warmup = rule.count_warmup(steps)
    # A run may end with its warm-up.
    rest = max(steps - warmup, 1)

    def rate(step: Any) -> Array:
        # Exact up to 2^24 steps.
        step = jnp.asarray(step, jnp.float32)
        # Beyond the planned end the rate stays where it ended.
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        if rule.lr_scheduler == "linear":
            factor = 1.0 - done
        elif rule.lr_scheduler == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(math.pi * done))
        else:
            factor = jnp.ones_like(done)
        if warmup:
            # The first step has rate 0, as in transformers.
            factor = jnp.where(step < warmup, step / warmup, factor)
        return rule.learning_rate * factor

    return rate
