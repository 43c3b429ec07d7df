"""A run's step, compiled and weighed before its base is loaded.

    fitted = fit(model, settings, base, batch, train, steps)   base and batch: shapes
    fitted.plan                         bytes by kind, beside what the device has
    state, metrics = fitted.step(state, base, batch)
    total, tokens = fitted.eval_step(state.adapters, base, held_out_batch)

The step is compiled for the device at hand with shapes alone, so a run that cannot fit
ends here, in seconds, with the settings that would make it fit. What was compiled is
what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import SingleDeviceSharding

from qlora_jax.errors import UserError, readable_bytes
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.lora.init import factor_out
from qlora_jax.lora.targets import select
from qlora_jax.models.llama import Llama
from qlora_jax.planning.gpus import (
    ALLOWANCE,
    UNLIMITED,
    GpuSpec,
    give_back_freed_memory,
    more_memory_advice,
    this_device,
)
from qlora_jax.planning.plan import Plan, Planner, Policy, device_bytes, policies
from qlora_jax.planning.step import Step, StepMemory
from qlora_jax.runs.config import ModelConfig
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state, jit_eval, jit_step
from qlora_jax.tree import EMBEDDING, HEAD


@dataclass(frozen=True)
class CompiledStep:
    """A step that fits, compiled."""

    plan: Plan
    model: Llama
    """With the settings of the plan's policy."""
    optimizer: optax.GradientTransformation
    step: Callable[..., Any]
    """(state, base, batch) -> (state, metrics); the state is donated."""
    eval_step: Callable[..., Any] | None = None
    """(adapters, base, batch) -> (summed loss, tokens), of held-out batches."""
    eval_bytes: int | None = None
    """Of device memory while it runs, with all that the training keeps there."""

    def summary(self) -> str:
        """One line for a person."""
        plan = self.plan
        limit = plan.gpu.memory_bytes - ALLOWANCE
        kinds = ", ".join(
            f"{name} {readable_bytes(size)}"
            for name, size in device_bytes(plan.memory).items()
            if size
        )
        where = (
            ""
            if limit >= UNLIMITED
            else f" of {readable_bytes(limit)} on {plan.gpu.name}"
        )
        host = plan.memory.host_bytes
        return (
            f"Plan: {readable_bytes(plan.memory.device_bytes)}{where}, policy "
            f"'{plan.policy.name}' ({kinds})"
            + (f"; {readable_bytes(host)} pinned on the host" if host else "")
            + (
                f"; {readable_bytes(self.eval_bytes)} while the held-out loss is "
                "measured"
                if self.eval_bytes is not None
                else ""
            )
            + "."
        )

    def report(self) -> dict[str, Any]:
        """What report.json holds of it."""
        plan = self.plan
        return {
            "policy": plan.policy.name,
            "remat": plan.policy.remat,
            "attention": plan.policy.attention,
            "embed_tokens": plan.policy.embed_tokens,
            "lm_head": plan.policy.lm_head,
            "device_bytes": device_bytes(plan.memory),
            "host_bytes": plan.memory.host_bytes,
            "eval_bytes": self.eval_bytes,
        }


def fit(
    model: Llama,
    settings: ModelConfig,
    base: Any,
    batch: Mapping[str, Any],
    train: TrainConfig,
    steps: int,
    *,
    held_out: Mapping[str, Any] | None = None,
    card: GpuSpec | None = None,
) -> CompiledStep:
    """Compiles the step of a run under the fastest policy that fits.

    Args:
      model: the architecture, with the LoRA configuration in its `compute`.
      settings: `[model]`: remat, attention, and where the tables lie; "auto" is
        prepared here.
      base: shapes of the base.
      batch: one batch of the run, or its shapes.
      train: optimizer and batch.
      steps: optimizer steps of the run.
      held_out: one batch [B, T] of held-out data, or its shapes; None = there are none.
      card: what it has to fit on; default the device at hand.

    Raises:
      UserError: no policy that the settings allow fits; by how much, and which settings
        would. Or measuring the held-out loss does not.
    """
    card = this_device() if card is None else card
    lora = model.compute.lora
    assert lora is not None
    optimizer = make_optimizer(train, steps, select(base, lora))
    adapters = abstract_adapters(base, lora)
    if lora.changes_base:
        base = jax.eval_shape(
            lambda base, adapters: factor_out(base, adapters, lora), base, adapters
        )
    state = jax.eval_shape(
        lambda tree, key: init_state(tree, optimizer, key), adapters, jax.random.key(0)
    )
    batch = _shapes(batch)
    plain = Step(
        config=model.config,
        compute=dataclasses.replace(model.compute, remat="full"),
        length=batch["tokens"].shape[-1],
        train=train,
        quantization=None if settings.quantization == "none" else settings.quantization,
        packed="segment_ids" in batch,
    )
    planner = Planner(card)
    among = policies(
        remat=settings.remat,
        attention=settings.attention,
        embed_tokens=settings.embed_tokens,
        lm_head=settings.lm_head,
        tied=model.config.tie_word_embeddings,
    )
    refused: list[Plan] = []
    for policy in among:
        step = policy.apply(plain)
        # What is far off by the estimate is not worth a compilation.
        far = planner.estimate(plain, policy).total > 1.5 * card.memory_bytes
        if far and policy is not among[-1]:
            continue
        chosen = model.clone(compute=step.compute)
        arguments = (state, _placed(base, policy), batch)
        jitted = jit_step(
            chosen, optimizer, neftune_noise_alpha=train.neftune_noise_alpha
        )
        compiled = jitted.lower(*arguments).compile()
        give_back_freed_memory()
        memory = StepMemory.of(compiled, step, arguments=arguments)
        versions = {"jax": jax.__version__}
        plan = Plan(step, policy, card, {"data": 1}, memory, "compiled", versions, {})
        if not plan.fits:
            refused.append(plan)
            continue
        fitted = CompiledStep(
            plan, chosen, optimizer, _either(compiled, jitted, arguments)
        )
        if held_out is None:
            return fitted
        return _with_eval(fitted, state.adapters, arguments[1], _shapes(held_out))
    nearest = min(refused, key=lambda plan: plan.total)
    raise UserError(planner.too_large(nearest) + more_memory_advice())


def _with_eval(
    fitted: CompiledStep, adapters: Any, base: Any, batch: Any
) -> CompiledStep:
    """Compiles and weighs what measures the held-out loss, before the run needs it."""
    jitted = jit_eval(fitted.model)
    arguments = (adapters, base, batch)
    compiled = jitted.lower(*arguments).compile()
    give_back_freed_memory()
    stats = compiled.memory_analysis()
    kept = fitted.plan.memory
    size = kept.base + kept.adapters + kept.optimizer + stats.temp_size_in_bytes
    size += stats.output_size_in_bytes - stats.alias_size_in_bytes
    size += sum(one.size * one.dtype.itemsize for one in batch.values())
    card = fitted.plan.gpu
    if size + ALLOWANCE > card.memory_bytes:
        rows, length = batch["tokens"].shape
        way = "A smaller `eval.batch_size` needs less"
        if rows == 1:
            way = "Shorter rows need less (`data.max_length`)"
        limit = readable_bytes(card.memory_bytes - ALLOWANCE)
        raise UserError(
            f"Measuring the held-out loss takes {readable_bytes(size)}, and "
            f"{card.name} has {limit}: {rows:,} rows of {length:,} tokens at a time, "
            f"beside what the training keeps. {way}."
        )
    step = _either(compiled, jitted, arguments)
    return dataclasses.replace(fitted, eval_step=step, eval_bytes=size)


def _shapes(batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def _placed(base: Any, policy: Policy) -> Any:
    """Shapes of a base with its tables where the policy has them."""
    places = {EMBEDDING: policy.embed_tokens, HEAD: policy.lm_head}
    host = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")

    def one(path: tuple, leaf: Any) -> Any:
        keys = tuple(str(getattr(key, "key", "")) for key in path)
        on_host = any(
            where == "host" and keys[: len(p)] == p for p, where in places.items()
        )
        if not on_host:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

    return jax.tree_util.tree_map_with_path(one, base)


def _either(compiled: Any, jitted: Any, planned: tuple) -> Callable[..., Any]:
    """The compiled step; for arguments unlike those planned, one compiled for them."""

    def shape(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(a.shape, a.dtype) for a in leaves]

    wanted = shape(planned)
    chosen: list[Any] = []

    def step(*arguments: Any) -> Any:
        if not chosen:
            chosen.append(compiled if shape(arguments) == wanted else jitted)
        return chosen[0](*arguments)

    return step
