"""The `[train]` section of a run file: length, batch and optimizer of a run.

`TrainConfig` raises at construction if no run could use its values; the message lists
all problems. What depends on the model (a group that matches nothing) is checked by
`qlora_jax.training.parameter_groups` before anything is compiled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qlora_jax.errors import raise_problems
from qlora_jax.reading import expand_fields

Scheduler = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw_8bit", "lion", "adafactor"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a different learning rate, decay or schedule.

    A table [[train.groups]]. A parameter belongs to the first group whose `match` is
    found in its path; a setting that the group leaves out stays as it is without it.
    """

    match: str
    """Regular expression, searched in the paths of the trained parameters as PEFT
    spells them: `model.layers.3.self_attn.q_proj.lora_A`, `model.norm.weight`. A
    module's parameters of all layers are one array, and go to one group."""
    learning_rate: float | None = None
    """Peak learning rate; neither `loraplus_lr_ratio` nor `embedding_learning_rate`
    changes it."""
    weight_decay: float | None = None
    """Decoupled weight decay, also of norms and biases that the group matches."""
    lr_scheduler: Scheduler | None = None
    """As `train.lr_scheduler`."""
    warmup_steps: int | float | None = None
    """As `train.warmup_steps`."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run, batch and optimizer; the `[train]` section of a run file.

    Raises:
      UserError: values that no run could use, all of them.
    """

    steps: int | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the data; give this or `steps`. Every step is full: the last one
    takes the rows that it lacks from the next pass."""
    batch_size: int = 8
    """Rows of a micro-batch. 8 is the default of TRL; QLoRA's paper took 16."""
    gradient_accumulation_steps: int = 1
    """Micro-batches summed into one optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_scheduler: Scheduler = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: int | float = 0.03
    """Steps over which the learning rate rises from 0; below 1, a share of all steps,
    rounded down. 3 % are those of QLoRA's paper."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms, biases and DoRA's magnitudes are not decayed."""
    max_grad_norm: float | None = 1.0
    """Global norm that gradients are clipped to; none = no clipping."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adapter_init: str | None = None
    """Adapter that the run starts from, instead of a new one: a PEFT directory, or a
    name of the hub. Its configuration replaces `[lora]`; of the settings there,
    `lora_alpha`, `alpha_pattern`, `use_rslora` and `lora_dropout` may differ from it,
    and any other difference is an error."""
    adapter_init_strict: bool = True
    """Refuse an `adapter_init` that does not fit the model exactly; false uses what
    fits and says what is left out."""
    seed: int = 0
    """Seed of the adapters' initialization and of dropout."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of the trained parameters of embed_tokens and lm_head: all
    rows, single rows or LoRA; default `learning_rate`."""
    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of each lora_B as a multiple of that of
    its lora_A; the paper's choice is 16."""
    optimizer: Optimizer = "adamw"
    """adamw; adamw_8bit, whose moments take a quarter of the memory; lion, which needs
    learning rates three to ten times smaller; or adafactor. lion reads `adam_beta1` and
    `adam_beta2` (its paper's are 0.9 and 0.99), adafactor none of `adam_*`."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained parameters, and write it as
    adapter_ema/ next to adapter/. A step moves it by 1 - decay, in the first steps by
    more."""
    neftune_noise_alpha: float | None = None
    """NEFTune (arXiv:2310.05914): noise on the embeddings in training; the paper's
    choices are 5 to 15."""
    groups: tuple[ParameterGroup, ...] = ()
    """Tables [[train.groups]]: parameters with a different learning rate, decay or
    schedule."""

    def __post_init__(self) -> None:
        expand_fields(self, "adapter_init")
        raise_problems("the [train] settings", self._problems(), "train: ")

    def _problems(self) -> Iterator[str]:
        if (self.steps is None) == (self.epochs is None):
            yield (
                "give either `steps` or `epochs`, got "
                f"steps={self.steps} and epochs={self.epochs}."
            )
        for name in ("steps", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"`{name}` must be at least 1, got {value}."
        if self.epochs is not None and not self.epochs > 0:
            yield f"`epochs` must be > 0, got {self.epochs}."
        yield from self._rate_problems(self, self.steps, "")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            yield f"`max_grad_norm` must be > 0 or none, got {self.max_grad_norm}."
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                yield f"`{name}` must be at least 0 and less than 1, got {value}."
        if not math.isfinite(self.adam_epsilon) or self.adam_epsilon <= 0:
            yield f"`adam_epsilon` must be > 0, got {self.adam_epsilon}."
        for name in ("loraplus_lr_ratio", "neftune_noise_alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                yield f"`{name}` must be > 0, or left out, got {value}."
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            yield (
                "`ema_decay` must be between 0 and 1, or left out, got "
                f"{self.ema_decay}."
            )
        if self.optimizer not in get_args(Optimizer):
            known = ", ".join(repr(name) for name in get_args(Optimizer))
            yield f"`optimizer` must be one of {known}, got {self.optimizer!r}."
        for number, group in enumerate(self.groups, 1):
            where = f"group {number}: "
            yield from self._rate_problems(group, self.steps, where)
            try:
                re.compile(group.match)
            except re.error as error:
                yield (
                    f"{where}`match` = {group.match!r} is not a regular expression: "
                    f"{error}."
                )
            changes = (group.learning_rate, group.weight_decay)
            if {*changes, group.lr_scheduler, group.warmup_steps} == {None}:
                yield (
                    f"{where}it changes nothing. Give it a `learning_rate`, "
                    "`weight_decay`, `lr_scheduler` or `warmup_steps`, or leave it out."
                )

    @staticmethod
    def _rate_problems(settings: Any, steps: int | None, where: str) -> Iterator[str]:
        """Yields the problems with the rates and schedule of the run or a group."""
        for name in ("learning_rate", "embedding_learning_rate", "weight_decay"):
            value = getattr(settings, name, None)
            # A rate of 0 is accepted: it freezes parameters.
            if value is not None and not (math.isfinite(value) and value >= 0):
                yield f"{where}`{name}` must be >= 0, got {value}."
        scheduler = settings.lr_scheduler
        if scheduler is not None and scheduler not in get_args(Scheduler):
            yield (
                f"{where}`lr_scheduler` must be 'constant', 'linear' or 'cosine', got "
                f"{scheduler!r}."
            )
        warmup = settings.warmup_steps
        if warmup is not None and not (
            warmup >= 0 and (warmup < 1 or isinstance(warmup, int))
        ):
            yield (
                f"{where}`warmup_steps` must be a number of steps, or a share of them "
                f"below 1, got {warmup}."
            )
        if steps is not None and isinstance(warmup, int) and warmup > steps:
            yield (
                f"{where}`warmup_steps`={warmup} exceeds `steps`={steps}; the learning "
                "rate would never reach its peak."
            )

    @property
    def longest_warmup(self) -> int | float:
        """The longest warm-up of any parameter, in steps or as a share of them."""
        return max(self.warmup_steps, *(g.warmup_steps or 0 for g in self.groups), 0)
