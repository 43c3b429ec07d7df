"""Plans a training step for a GPU: which policy, length or batch size fits.

    planner = Planner(find_gpu("rtx-4090"), python=find_compiler())
    plan = planner.longest(step, policies(remat="auto"))
    plan.report()

The bytes are those of the compiled step (`planning.compile`), or without the GPU
compiler those of the closed form (`planning.estimate`), as `Plan.method` records. A
search compiles few steps: memory is nearly linear in the number of tokens, so secant
steps reach the limit, and one step on each side of it proves the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from convert import adapter_bytes
from qlora_jax.errors import UserError
from qlora_jax.errors import readable_bytes as _gb
from qlora_jax.models import attention_refusals, check_mesh
from qlora_jax.planning import estimate
from qlora_jax.planning.compile import check_fusion, compile_for
from qlora_jax.planning.exchange import expected_transfers, step_work
from qlora_jax.planning.gpus import ALLOWANCE, PINNED_BYTES, PINNED_VARIABLE, GpuSpec
from qlora_jax.planning.ladder import Policy, policies
from qlora_jax.planning.step import Step, StepMemory
from qlora_jax.planning.traffic import Transfer, bytes_by_kind, time_step
from qlora_jax.tree import Path

PROCESS_BYTES = 4_000_000_000
"""Host memory of a run in addition to its arrays: Python, JAX, the CUDA libraries,
pages of the checkpoint and the data."""

# JAX's default limit.
_DEVICE_FRACTION = 0.75

Quantity = Literal["length", "batch_size"]


@dataclass(frozen=True)
class Plan:
    """A step on a GPU."""

    step: Step
    policy: Policy
    gpu: GpuSpec
    mesh: Mapping[str, int]
    memory: StepMemory
    method: Literal["compiled", "estimate"]
    versions: Mapping[str, str]
    per_node: int = 1
    """GPUs of a machine."""
    transfers: Sequence[Transfer] = ()
    """What the GPUs exchange in a step."""
    counted: Mapping[str, Any] | None = None
    """Of a compiled step, as `planning.roofline.count_step` returns it."""

    @property
    def total(self) -> int:
        """Bytes on each device, the allowance included."""
        return self.memory.device_bytes + ALLOWANCE

    @property
    def fits(self) -> bool:
        """Whether `total` is at most the GPU's memory."""
        return self.total <= self.gpu.memory_bytes

    @property
    def uncertain(self) -> bool:
        """Whether it fits by less than what an estimate may be wrong by."""
        sure = (1 - estimate.ERROR) * self.gpu.memory_bytes
        return self.method == "estimate" and self.fits and self.total > sure

    def report(self, base_tables: Mapping[Path, Any] | None = None) -> dict[str, Any]:
        """Returns the plan as plain data, as `qlora-jax plan --json` prints it.

        Args:
          base_tables: tables of the base that are saved with the adapter, of shapes.
        """
        step, memory = self.step, self.memory
        lora = step.compute.lora
        assert lora is not None
        saved = lora.absorbed
        if saved.base_fingerprint is None:
            # A run writes a fingerprint; only its length counts.
            saved = dataclasses.replace(saved, base_fingerprint="0" * 64)
        devices = math.prod(self.mesh.values())
        return {
            "max_length": step.length,
            "batch_size": step.train.batch_size,
            "gradient_accumulation_steps": step.train.gradient_accumulation_steps,
            "fits": self.fits,
            "uncertain": self.uncertain,
            "method": self.method,
            "policy": self.policy.name,
            "remat": step.compute.remat,
            "scan_layers": step.compute.scan_layers,
            "attention": step.compute.attention,
            "kernels": step.compute.kernels,
            "fusion": step.compute.norms,
            "embed_tokens": step.embed_tokens,
            "lm_head": step.lm_head,
            "dtype": step.compute.dtype,
            "quantization": step.quantization or "none",
            "device_bytes": {
                **device_bytes(memory),
                "allowance": ALLOWANCE,
                "total": self.total,
            },
            "host_bytes": memory.host_bytes,
            "host_bytes_needed": self.host_bytes_needed,
            "adapter_bytes": adapter_bytes(
                step.config,
                saved,
                base_tables=base_tables,
                table_dtype=step.compute.dtype,
            ),
            "flops_per_token": estimate.flops_per_token(step),
            "necessary_flops_per_token": estimate.necessary_flops(step)
            / (step.tokens * step.train.gradient_accumulation_steps),
            "step_seconds_floor": estimate.step_seconds_floor(
                step, self.gpu, devices=devices
            ),
            "counted": None if self.counted is None else dict(self.counted),
            "settings": self.settings,
            "card": self.gpu.name,
            "card_bytes": self.gpu.memory_bytes,
            "mesh": dict(self.mesh),
            "gpus_per_node": self.per_node,
            "collectives": bytes_by_kind(self.transfers),
            "gathered_again_bytes": self.gathered_again_bytes,
            "modelled": self.modelled,
            "compiled_for": self.gpu.description if self.method == "compiled" else None,
            "versions": dict(self.versions),
        }

    @property
    def gathered_again_bytes(self) -> int:
        """Bytes that a GPU sends because each micro-batch gathers the weights again."""
        if self.mesh.get("fsdp", 1) == 1:
            return 0
        # Those between the passes, of the vocabulary's tables, are not repeated.
        gathers = sum(
            transfer.sent
            for transfer in self.transfers
            if transfer.kind == "all-gather" and transfer.phase != "step"
        )
        micro = self.step.train.gradient_accumulation_steps
        return round(gathers * (micro - 1) / micro)

    @property
    def modelled(self) -> dict[str, Any] | None:
        """The time of a step of several GPUs, as `time_step` models it."""
        devices = math.prod(self.mesh.values())
        if devices == 1:
            return None
        return time_step(
            step_work(self.step, self.gpu, devices), self.transfers, self.gpu
        )

    @property
    def host_bytes_needed(self) -> int:
        """Host memory that a machine with its part of the mesh needs.

        The packed base is in host memory once, before anything is pinned.
        """
        devices = min(math.prod(self.mesh.values()), self.per_node)
        # `memory.base` is one device's part.
        base = self.memory.base * self.mesh.get("fsdp", 1) + self.memory.host_base
        return max(base, self.memory.host_bytes * devices) + PROCESS_BYTES

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables that raise JAX's limits where the plan exceeds them."""
        out = {}
        needed = self.memory.device_bytes / self.gpu.memory_bytes
        if needed > _DEVICE_FRACTION:
            # In percent, rounded up, with one to spare.
            fraction = min(math.ceil(100 * needed) / 100 + 0.01, 0.99)
            out["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.2f}"
        if (needed := self.pinned_bytes_needed) > PINNED_BYTES:
            out[PINNED_VARIABLE] = str(math.ceil(needed / 2**30))
        return out

    @property
    def pinned_bytes_needed(self) -> int:
        """What JAX's pool of pinned host memory must be allowed to take.

        10 % more than the arrays, for the gaps between them and for transfers: a pool
        of exactly their size does not hold them.
        """
        return math.ceil(1.1 * self.memory.host_bytes)


def device_bytes(memory: StepMemory) -> dict[str, int]:
    """Returns the kinds of bytes on a device."""
    kinds = dataclasses.asdict(memory)
    return {k: v for k, v in kinds.items() if not k.startswith("host_")}


class Planner:
    """Plans steps for a GPU and caches the plans."""

    def __init__(
        self,
        gpu: GpuSpec,
        *,
        python: str | None = None,
        mesh: Mapping[str, int] | None = None,
        per_node: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Keeps the settings that all steps have in common.

        Args:
          gpu: its data sheet.
          python: from `find_compiler`; None = the closed form.
          mesh: sizes of its axes; default one device.
          per_node: GPUs of a machine; default all of the mesh.
          say: gets a line before each compilation.
        """
        self.gpu = gpu
        self.python = python if gpu.compiles else None
        self.mesh = dict(mesh) if mesh else {"data": 1}
        self.per_node = per_node or self._devices
        self._say = say
        self._plans: dict[Step, Plan] = {}

    def plan(self, step: Step, policy: Policy) -> Plan:
        """Plans one step under one policy.

        Raises:
          UserError: the mesh does not divide the batch, the GPU cannot run this
            attention or fusion, or the compiler fails.
        """
        step = policy.apply(step)
        if step not in self._plans:
            self._check(step)
            check_fusion(step, self.gpu)
            self._plans[step] = self._compile(step, policy)
        return self._plans[step]

    def _check(self, step: Step) -> None:
        """Raises if the GPU or the mesh cannot run the step."""
        check_mesh(self.mesh, step.train.batch_size)
        for name in ("attention", "kernels"):
            # Nothing divides them: every device would compute all rows.
            if self._devices > 1 and getattr(step.compute, name) == "pallas":
                raise UserError(
                    f"{name}='pallas': those kernels run on one device, and the mesh "
                    f"has {self._devices}. Use 'auto' or 'xla'."
                )
        attention = step.compute.attention
        reasons = attention_refusals(
            attention,
            dtype=jnp.dtype(step.compute.dtype),
            head_dim=step.config.head_dim,
            packed=step.packed,
            capability=".".join(map(str, self.gpu.compute_capability)),
        )
        if reasons:
            raise UserError(
                f"attention={attention!r} cannot be used on {self.gpu.name}: "
                f"{'; '.join(reasons)}. Use 'auto' or 'xla'."
            )

    def estimate(self, step: Step, policy: Policy) -> Plan:
        """Plans one step under one policy by the closed form."""
        step = policy.apply(step)
        self._check(step)
        memory = estimate.step_memory(step, self.mesh)
        return Plan(
            step=step,
            policy=policy,
            gpu=self.gpu,
            mesh=self.mesh,
            memory=memory,
            method="estimate",
            versions={"jax": jax.__version__},
            per_node=self.per_node,
            transfers=expected_transfers(step, self.mesh, self.per_node),
        )

    def _compile(self, step: Step, policy: Policy) -> Plan:
        if self.python is None:
            return self.estimate(step, policy)
        self._say(
            f"compiling for {self.gpu.name}: {step.train.batch_size:,} x "
            f"{step.length:,} tokens, {policy.name}"
        )
        mesh = self.mesh if math.prod(self.mesh.values()) > 1 else None
        compiled = compile_for(
            step, self.gpu, python=self.python, mesh=mesh, per_node=self.per_node
        )
        return Plan(
            step=step,
            policy=policy,
            gpu=self.gpu,
            mesh=self.mesh,
            memory=compiled.memory,
            method="compiled",
            versions={"jax": compiled.jax},
            per_node=self.per_node,
            transfers=compiled.transfers,
            counted=compiled.counted,
        )

    def fastest(self, step: Step, among: Sequence[Policy]) -> Plan:
        """Plans under the first policy that fits, else the one that needs least."""
        best: Plan | None = None
        for policy in among:
            if policy is not among[-1] and self.is_hopeless(step, policy):
                continue
            plan = self.plan(step, policy)
            if plan.fits:
                return plan
            if best is None or plan.total < best.total:
                best = plan
        assert best is not None
        return best

    def is_hopeless(self, step: Step, policy: Policy) -> bool:
        """Returns whether a step is so large by the estimate that it is not compiled.

        A loop is compiled in seconds, so what may be off is tried; unrolled layers take
        a minute.
        """
        margin = 1.5 if policy.scan_layers else 1 + estimate.ERROR
        return self.estimate(step, policy).total > margin * self.gpu.memory_bytes

    def longest(
        self, step: Step, among: Sequence[Policy], quantity: Quantity = "length"
    ) -> Plan:
        """Plans the largest length (or batch size) under the policy that fits most.

        A length is a multiple of `granule` tokens, a batch size one of the number of
        parts that the mesh divides rows into. The plan fits, and one unit more does
        not.

        Args:
          step: of any length (or batch size).
          among: policies; the best of them by the estimate is searched.
          quantity: what to maximize.

        Raises:
          DoesNotFit: not even one unit fits; says by how much, and what would help.
        """
        guesses = [(self._guess(step, policy, quantity), policy) for policy in among]
        # `max` returns the first of equals, which is the fastest.
        size, policy = max(guesses, key=lambda guess: guess[0])
        if not size:  # the policy that needs least
            policy = min(among, key=lambda p: self.estimate(step, p).total)
        return self._search(step, policy, quantity, size)

    def longest_of_each(
        self, step: Step, among: Sequence[Policy], quantity: Quantity = "length"
    ) -> list[Plan | None]:
        """Returns `longest` of each policy; None where nothing fits."""
        plans: list[Plan | None] = []
        for policy in among:
            try:
                plans.append(self.longest(step, [policy], quantity))
            except DoesNotFit:
                plans.append(None)
        return plans

    def _sized(self, step: Step, quantity: Quantity, size: int) -> Step:
        if quantity == "length":
            return dataclasses.replace(step, length=size)
        train = dataclasses.replace(step.train, batch_size=size)
        return dataclasses.replace(step, train=train)

    def _unit(self, quantity: Quantity, size: int) -> int:
        if quantity == "batch_size":
            return self._sharers
        # Two parts of a row for each GPU that shares it.
        return math.lcm(granule(size), 2 * self.mesh.get("context", 1))

    @property
    def _devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def _sharers(self) -> int:
        """Number of parts that the rows are divided into."""
        return self._devices // self.mesh.get("context", 1)

    def _max_size(self, step: Step, quantity: Quantity) -> int:
        """Returns the largest size whose tokens can be counted in 32 bits."""
        tokens = (2**31 - 1) // step.train.gradient_accumulation_steps
        if quantity == "length":
            return tokens // step.train.batch_size
        # Every device gets as many rows.
        return tokens // step.length // self._sharers * self._sharers

    def _guess(self, step: Step, policy: Policy, quantity: Quantity) -> int:
        """Returns the largest size that fits by the estimate; 0 if none does."""
        unit = self._unit(quantity, 128)

        def fits(units: int) -> bool:
            sized = self._sized(step, quantity, units * unit)
            return self.estimate(sized, policy).fits

        # Bisection; `low` fits or is 0.
        low, high = 0, max(self._max_size(step, quantity) // unit, 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * unit

    def _search(
        self, step: Step, policy: Policy, quantity: Quantity, guess: int
    ) -> Plan:
        unit = self._unit(quantity, guess)
        most = max(self._max_size(step, quantity) // unit, 1)

        def at(units: int) -> Plan:
            return self.plan(self._sized(step, quantity, units * unit), policy)

        # Invariant: `low` units fit (or are 0), and `high` units do not.
        low, high = 0, most + 1
        below: Plan | None = None
        above: Plan | None = None
        here = min(max(guess // unit, 1), most)
        slope, tried = None, 0
        while high - low > 1:
            plan = at(here)
            tried += 1
            if plan.fits:
                low, below = here, plan
            else:
                high, above = here, plan
            if high - low <= 1:
                break
            if below is not None and above is not None:
                # The secant through the two plans that enclose the limit.
                slope = (above.total - below.total) / (high - low)
            elif slope is None:
                # Until there are two plans, the closed form's.
                slope = self._slope(step, policy, quantity, here * unit) * unit
            start, known = (low, below) if below is not None else (high, above)
            assert known is not None
            step_to = math.floor((self.gpu.memory_bytes - known.total) / slope)
            # If memory were linear, the limit would be there. It is only nearly so:
            # after some steps the search bisects.
            here = start + step_to
            if tried > 4 and above is not None:
                here = (low + high) // 2
            # Strictly between the two, so that every step narrows the bracket.
            here = min(max(here, low + 1), high - 1)
        if below is None:
            assert above is not None
            raise DoesNotFit(self.too_large(above))
        return below

    def _slope(
        self, step: Step, policy: Policy, quantity: Quantity, size: int
    ) -> float:
        """Returns the bytes per unit of size, by the estimate."""
        small = self.estimate(self._sized(step, quantity, size), policy)
        large = self.estimate(self._sized(step, quantity, 2 * size), policy)
        # Offloading may cost no device memory at all; the search divides by this.
        return max((large.total - small.total) / size, 1.0)

    def too_large(self, plan: Plan) -> str:
        """Returns by how much a plan exceeds the GPU's memory, and what would help."""
        over = plan.total - self.gpu.memory_bytes
        enough, others = self.knobs(plan)
        if enough:
            advice = f"By the estimate enough: {'; '.join(enough)}."
        else:
            advice = (
                "By the estimate no setting alone is enough"
                + (f" ({'; '.join(others)})" if others else "")
                + ": take a larger GPU, several (--mesh.fsdp), or a smaller model."
            )
        return (
            f"{plan.step.train.batch_size:,} x {plan.step.length:,} tokens take "
            f"{_gb(plan.total)} under the policy '{plan.policy.name}', {_gb(over)} "
            f"more than the {_gb(self.gpu.memory_bytes)} of {self.gpu.name}. {advice}"
        )

    def knobs(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Returns settings that need less memory, and how much they save.

        Returns:
          Those that are enough alone, and others that save more than 0.5 % of the GPU.
        """
        step, now = plan.step, self.estimate(plan.step, plan.policy).total
        over = plan.total - self.gpu.memory_bytes
        lora = step.compute.lora
        assert lora is not None
        options: list[tuple[str, Step, Policy]] = [
            (f"the policy '{policy.name}'", step, policy)
            for policy in policies(gpu=self.gpu)
            if policy.name != plan.policy.name
        ]
        if step.quantization != "nf4_dq":
            lean = dataclasses.replace(step, quantization="nf4_dq")
            options.append(("quantization='nf4_dq'", lean, plan.policy))
        if step.length >= 256:
            half = dataclasses.replace(step, length=step.length // 2)
            options.append((f"max_length={half.length:,}", half, plan.policy))
        if step.train.batch_size >= 2 * self._sharers:
            size = step.train.batch_size // 2 // self._sharers * self._sharers
            fewer = self._sized(step, "batch_size", size)
            options.append((f"batch_size={size}", fewer, plan.policy))
        if lora.r > 8 and not lora.rank_pattern:
            compute = dataclasses.replace(
                step.compute, lora=dataclasses.replace(lora, r=lora.r // 2)
            )
            smaller = dataclasses.replace(step, compute=compute)
            options.append((f"r={lora.r // 2}", smaller, plan.policy))
        enough, others = [], []
        for text, changed, policy in options:
            # Two estimates, never an estimate and a compiled plan: what the closed form
            # gets wrong cancels.
            saved = now - self.estimate(changed, policy).total
            if saved > 0.005 * self.gpu.memory_bytes:
                (enough if saved >= over else others).append(
                    f"{text} saves {_gb(saved)}"
                )
        return enough, others


class DoesNotFit(UserError):
    """Not even the smallest step fits."""


def granule(length: int) -> int:
    """Returns the unit of searched lengths: 128 below 16,384 tokens, else 1,024."""
    return 128 if length < 16384 else 1024
