"""The `plan` command: what a run takes on a GPU, as tables, JSON or a picture.

It plans a run file's run, or a model with settings from the command line; no weights
and no data are read. `qlora_jax.planning.plan` does the planning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qlora_jax.choices import (
    Attention,
    Auto,
    Dtype,
    EmbeddingMemory,
    Fusion,
    HeadMemory,
    Kernels,
    Quantization,
    RematOrAuto,
)
from qlora_jax.cli.options import parse, path_argument
from qlora_jax.cli.output import run_and_print
from qlora_jax.cli.plan_mesh import MeshOptions, chosen_mesh, mesh_notes
from qlora_jax.errors import UserError, say
from qlora_jax.lora import LoraConfig
from qlora_jax.models import LlamaConfig, apply_changes
from qlora_jax.planning import find_compiler, how_to_get_the_compiler
from qlora_jax.runs import (
    ModelConfig,
    RunConfig,
    given_lora,
    option_defaults,
    option_keys,
    read_config,
    values_of,
)
from qlora_jax.training import TrainConfig
from qlora_jax.tree import Path as TreePath

if TYPE_CHECKING:
    from qlora_jax.planning import GpuSpec, Plan, Planner, Policy, Quantity, Step

_FIT = "fit"
_OrFit = int | Literal["fit"]
# Length of the step that a search for the longest row starts from.
_FIRST_LENGTH = 128


def _default(otherwise: str = "") -> Any:
    """Describes, for `--help`, the value of an option that is not given."""
    either = f", or {otherwise}" if otherwise else ""
    return tyro.conf.arg(help_behavior_hint=f"(default: the run file's{either})")


@dataclass(frozen=True)
class PlanCommand:
    """Plan the memory of a run on a GPU; reads no weights and no data.

    CONFIG.toml is a run file, or a run directory with one; options override it. Without
    it --model is needed. Exit status 0: planned, whether it fits or not (see "fits" of
    --json); 1: --max-length fit or --batch-size fit found no size, or another failure.
    """

    config: Annotated[
        tyro.conf.Positional[str | None], path_argument("CONFIG.toml")
    ] = None
    """Run file."""
    model: str | None = None
    """Model directory or its config.json."""
    gpu: str | None = None
    """GPU: b200, h200, h100, a100-80, a100-40, l40s, l4, rtx-4090, rtx-3090, t4, or a
    TOML file that describes one."""
    max_length: Annotated[_OrFit | None, _default()] = None
    """Tokens of a row; fit = as many as the GPU holds."""
    batch_size: Annotated[_OrFit | None, _default("one for each GPU")] = None
    """Rows of a micro-batch over all GPUs; fit = as many as fit."""
    gradient_accumulation_steps: Annotated[int | None, _default("1")] = None
    """Micro-batches of a step."""
    packing: Annotated[bool | None, _default("no")] = None
    """Whether rows hold several documents."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: Annotated[Quantization | None, _default("nf4_dq")] = None
    """Of the linear layers."""
    dtype: Annotated[Dtype | None, _default("what the GPU has")] = None
    """Of activations and dense tensors."""
    attention: Annotated[Attention | None, _default("auto")] = None
    """Attention implementation."""
    remat: Annotated[RematOrAuto | None, _default("auto")] = None
    """What is recomputed or kept on the host; auto = the fastest policy that fits."""
    scan_layers: Annotated[Literal["auto"] | bool | None, _default("auto")] = None
    """Whether the layers are a loop, or each has a program of its own."""
    kernels: Annotated[Kernels | None, _default("auto")] = None
    """Of products with packed weights."""
    fusion: Annotated[Fusion | None, _default("auto")] = None
    """Norms and the MLP's activation in one pass with products of adapters."""
    embed_tokens: Annotated[Literal[Auto, EmbeddingMemory] | None, _default("auto")] = (
        None
    )
    """Memory of the embedding table."""
    lm_head: Annotated[Literal[Auto, HeadMemory] | None, _default("auto")] = None
    """Memory of the output head, or nf4 for a quantized one."""
    devices: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: those of the mesh)")
    ] = None
    """GPUs of the run."""
    gpus_per_node: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: 8 of more than 8)")
    ] = None
    """GPUs of a machine."""
    mesh: MeshOptions = field(default_factory=MeshOptions)
    method: Literal["auto", "compiled", "estimate"] = "auto"
    """Ask the GPU compiler, or a formula; auto = the compiler where it is installed."""
    compiler_python: str | None = None
    """A Python that has the GPU compiler, where this one has not."""
    compare: bool = False
    """Compare the policies in a table."""
    plot: str | None = None
    """Draw memory against length to this file (PNG; needs matplotlib)."""
    json: bool = False
    """Print a JSON object."""

    def run(self, explicit: Collection[str] = ()) -> dict[str, Any]:
        """Plans; returns the report.

        Args:
          explicit: names of the fields of `lora` that were given as options.
        """
        from qlora_jax.cli.plan_output import check_picture_path, draw_memory
        from qlora_jax.planning import Planner, find_gpu, policies

        if self.plot is not None:
            check_picture_path(Path(self.plot))
        settings = _Settings.merge(self, explicit)
        if self.gpu is None:
            raise UserError("Name the GPU: --gpu NAME (or a TOML file; see --help).")
        card = find_gpu(self.gpu)
        step = settings.step(card)
        attention = settings.model.attention
        candidates = settings.policies(attention, card)
        chosen, per_node = chosen_mesh(
            self.mesh, self.devices, self.gpus_per_node, step, card, candidates
        )
        planner = Planner(
            card,
            python=self._compiler(card),
            mesh=chosen.shape,
            per_node=per_node,
            say=say,
        )
        if "context" not in planner.mesh:  # the kernels take whole rows
            attention = _attention(attention, step, card)
            candidates = settings.policies(attention, card)
        if settings.fit is None:
            plan = planner.fastest(step, candidates)
        else:
            plan = planner.longest(step, candidates, settings.fit)
        report = plan.report(settings.tables)
        report["mesh_reason"] = chosen.reason
        report["notes"] = self._notes(settings, planner, plan)
        if self.compare:
            every = policies(attention=attention, gpu=card)
            report["policies"] = _compare(planner, step, every, settings.fit)
        if self.plot is not None:
            drawn = draw_memory(planner, plan, candidates, Path(self.plot))
            report["plot"] = None if drawn is None else str(drawn)
        return report

    @property
    def all_devices(self) -> int:
        """The number of GPUs."""
        return self.mesh.devices if self.devices is None else self.devices

    def _compiler(self, card: GpuSpec) -> str | None:
        """Returns the Python whose jax compiles the step; None: estimate it."""
        if self.method == "estimate":
            return None
        python = find_compiler(self.compiler_python)
        if self.method == "compiled" and python is None:
            raise UserError(
                "--method compiled: the GPU compiler is not installed here. Get it "
                f"with: {how_to_get_the_compiler()}; or name a Python that has it "
                "(--compiler-python)."
            )
        # Asked for explicitly, a compiled plan must not silently become an estimate.
        if self.method == "compiled" and not card.compiles:
            card.target  # noqa: B018 (raises with the reason)
        return python

    def _notes(self, settings: _Settings, planner: Planner, plan: Plan) -> list[str]:
        card, notes = planner.gpu, []
        if not card.bfloat16:
            notes.append(
                f"{_lacks_bfloat16(card)} and no cuDNN attention: planned with float16 "
                "and 'xla'."
            )
        if plan.method == "estimate":
            notes.append(self._why_estimated(card))
        if not plan.fits:
            notes.append(planner.too_large(plan))
        if plan.uncertain:
            notes.append(
                f"the estimate leaves {1 - plan.total / card.memory_bytes:.1%} of the "
                "memory, and it may be wrong by 10 %: compile to be sure (the same "
                "command with --method compiled)."
                if card.compiles
                else "the estimate leaves less of the memory than the 10 % that it may "
                "be wrong by: shorter or fewer rows are safer."
            )
        attention = plan.step.compute.attention
        if plan.step.packed and settings.model.attention == "auto":
            notes.append(
                "packed rows: planned with attention='pallas', which a run takes if "
                "those kernels pass its check on the device, and else 'xla'."
                if attention == "pallas"
                else "packed rows: attention in plain XLA, block by block; no faster "
                "kernel takes them here."
            )
        if note := _fusion_note(plan):
            notes.append(note)
        notes += mesh_notes(plan)
        positions = settings.config.max_position_embeddings
        if plan.step.length > positions:
            notes.append(
                f"rows are longer than the {positions:,} positions the model was made "
                "for: this is about memory only."
            )
        return notes

    def _why_estimated(self, card: GpuSpec) -> str:
        if self.method == "estimate":
            return (
                "an estimate by formula, as asked for; within 10 % of the compiled "
                "plan as tested."
            )
        if not card.compiles:
            major, minor = card.compute_capability
            return (
                f"an estimate by formula: for compute capability {major}.{minor} "
                "nothing can be compiled ahead of time here."
            )
        return (
            "an estimate by formula, because the GPU compiler is not installed here. "
            f"For the compiled plan: {how_to_get_the_compiler()}"
        )


# Options of `plan` that set what a run file sets: option -> key of the run file.
_KEYS = {
    "model": "model.path",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    **{
        name: f"model.{name}"
        for name in (
            *("quantization", "dtype", "attention", "remat", "scan_layers", "kernels"),
            *("fusion", "embed_tokens", "lm_head"),
        )
    },
}
# Paths of a run file that are read here -> the option that gives another.
_PATHS = {"model.path": "--model", "train.adapter_init": ""}
# What a run must have and a plan of one step does not use.
_UNUSED = {"output_dir": "none", "data.path": "none", "train.steps": 1}
# The smallest step, where they are not given.
_SMALLEST = {"data.packing": False}


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The settings of a run file, overridden by options."""

    config: LlamaConfig
    model: ModelConfig
    """`dtype` is in `dtype`."""
    lora: LoraConfig
    train: TrainConfig
    length: int
    packed: bool
    dtype: Dtype | None
    """None: bfloat16 where the GPU has it, else float16."""
    fit: Quantity | None
    """The size to search for."""
    tables: Mapping[TreePath, Any]
    """Shapes of the base's tables that are saved with the adapter."""

    @classmethod
    def merge(cls, command: PlanCommand, explicit: Collection[str]) -> _Settings:
        """Merges run file and options.

        Args:
          command: the options.
          explicit: names of the fields of `lora` that were given as options.

        Raises:
          UserError: settings that are missing, or that no run can have.
        """
        from qlora_jax.runs import beside_run, relative_paths

        options = {
            key: value
            for name, key in _KEYS.items()
            if (value := getattr(command, name)) not in (None, _FIT, "")
        }
        # A row of one token has nothing to predict.
        for name, least in (("max_length", 2), ("batch_size", 1)):
            value = getattr(command, name)
            if isinstance(value, int) and value < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be at least {least}, got {value}.")
        if command.config is None:
            if not command.model:
                raise UserError(
                    "Name the model: --model PATH (a directory or a config.json), or "
                    "a run file."
                )
            options = {**_UNUSED, **_SMALLEST, **options}
            # One row for each GPU.
            options.setdefault("train.batch_size", command.all_devices)
            run = dataclasses.replace(read_config(None, options), lora=command.lora)
        else:
            options |= values_of(command, (f"lora.{name}" for name in explicit))
            run = read_config(Path(command.config), options)
            run = beside_run(run, Path(command.config), options)
        length, batch_size, fit = _sizes(command, run)
        unnamed = command.config is None and command.dtype is None
        with contextlib.ExitStack() as stack:
            if command.config is not None:
                file = Path(command.config)
                stack.enter_context(relative_paths(run, file, options, _PATHS))
            config, lora, tables = _from_adapter(command, run, explicit)
        return cls(
            config=apply_changes(config, run.model.config_changes),
            model=run.model,
            lora=lora,
            tables=tables,
            train=_single_step(run.train, batch_size),
            length=length,
            packed=bool(run.data.packing),  # "auto" may pack
            dtype=None if unnamed else run.model.dtype,
            fit=fit,
        )

    def policies(self, attention: Attention, card: GpuSpec) -> list[Policy]:
        """Returns the policies that the settings leave open, fastest first."""
        from qlora_jax.planning import policies

        return policies(
            remat=self.model.remat,
            scan_layers=self.model.scan_layers,
            attention=attention,
            embed_tokens=self.model.embed_tokens,
            lm_head=self.model.lm_head,
            tied=self.config.tie_word_embeddings,
            gpu=card,
        )

    def step(self, card: GpuSpec) -> Step:
        """Returns the step to plan.

        Raises:
          UserError: a dtype that the GPU does not have.
        """
        from qlora_jax.models import Compute
        from qlora_jax.planning import Step

        if self.dtype == "bfloat16" and not card.bfloat16:
            raise UserError(f"{_lacks_bfloat16(card)}: use --dtype float16 or float32.")
        compute = Compute(
            dtype=self.dtype or ("bfloat16" if card.bfloat16 else "float16"),
            kernels=self.model.kernels,
            norms=self.model.fusion,
            activation=self.model.fusion,
            lora=self.lora,
        )
        quantization = self.model.quantization
        return Step(
            self.config,
            compute,
            length=self.length,
            train=self.train,
            quantization=None if quantization == "none" else quantization,
            packed=self.packed,
        )


def _sizes(command: PlanCommand, run: RunConfig) -> tuple[int, int, Quantity | None]:
    """Returns length, rows, and which of them is to be searched for."""
    if command.max_length is None and command.config is None:
        raise UserError(
            "Give the length of the rows: --max-length N, or --max-length fit for as "
            "long as the GPU holds."
        )
    if command.max_length == command.batch_size == _FIT:
        raise UserError(
            "--max-length fit and --batch-size fit: fix one of them, so that the "
            "other has an answer."
        )
    length, batch_size = run.data.max_length, run.train.batch_size
    if command.max_length == _FIT:
        return _FIRST_LENGTH, batch_size, "length"
    if command.batch_size == _FIT:
        return length, command.all_devices, "batch_size"
    return length, batch_size, None


def _single_step(train: TrainConfig, batch_size: int) -> TrainConfig:
    """Returns a run's training settings for one step, which has no warm-up."""
    return dataclasses.replace(
        train,
        steps=1,
        epochs=None,
        # A warm-up longer than the single step would be refused; it changes no bytes.
        warmup_steps=0,
        groups=tuple(
            dataclasses.replace(group, warmup_steps=0) for group in train.groups
        ),
        adapter_init=None,
        batch_size=batch_size,
    )


def _from_adapter(
    command: PlanCommand, run: RunConfig, explicit: Collection[str]
) -> tuple[LlamaConfig, LoraConfig, Mapping[TreePath, Any]]:
    """Returns the model, the settings and the saved tables of a run.

    Those of `adapter_init` count where the run has it, as for the run.
    """
    from qlora_jax.runs import continued_settings, read_architecture, resolve

    train, given = run.train, explicit
    if command.config is not None:
        given = {*explicit, *given_lora(Path(command.config), ())}
    resolved = resolve(
        run.model.path,
        adapter=train.adapter_init,
        strict=train.adapter_init_strict,
        needed="configuration",
    )
    return continued_settings(
        dataclasses.replace(resolved, settings=run),
        read_architecture(resolved.base),
        run.lora,
        given,
    )


def _lacks_bfloat16(card: GpuSpec) -> str:
    major, minor = card.compute_capability
    return f"{card.name} (compute capability {major}.{minor}) has no bfloat16"


def _fusion_note(plan: Plan) -> str | None:
    """Returns a note on what is not computed in one pass although it should be."""
    from qlora_jax.lora import abstract_adapters
    from qlora_jax.models import Llama, abstract_base
    from qlora_jax.runs import fusion_note

    step = plan.step
    if step.compute.norms != "fused":
        return None  # nothing to say, so no shapes of a whole model
    assert step.compute.lora is not None
    base = abstract_base(step.config, quantization=step.quantization)
    sharers = plan.mesh.get("context", 1)
    note = fusion_note(
        Llama(step.config, step.compute),
        base,
        abstract_adapters(base, step.compute.lora),
        step.train.batch_size * sharers // math.prod(plan.mesh.values()),
        step.length // sharers,
        planned=True,
    )
    return note and note.removeprefix("Note: model.")


def _attention(attention: Attention, step: Step, card: GpuSpec) -> Attention:
    """Returns the attention that a run takes, if its check on the device passes."""
    from pallas_kernels.device import jax_has_kernels
    from qlora_jax.models import attention_refusals

    if attention != "auto" or not step.packed or not jax_has_kernels():
        return attention
    reasons = attention_refusals(
        "pallas",
        dtype=step.compute.dtype,
        head_dim=step.config.head_dim,
        packed=True,
        capability=".".join(map(str, card.compute_capability)),
    )
    return attention if reasons else "pallas"


def _compare(
    planner: Planner, step: Step, candidates: Sequence[Policy], fit: Quantity | None
) -> list[dict[str, Any]]:
    """Returns a row for each policy: bytes at this size, or at the largest size."""
    if fit is None:
        plans: list[Plan | None] = [planner.plan(step, policy) for policy in candidates]
    else:
        plans = planner.longest_of_each(step, candidates, fit)
    rows = []
    for policy, plan in zip(candidates, plans, strict=True):
        row: dict[str, Any] = {"policy": policy.name, "fits": False}
        if plan is not None:
            report = plan.report()
            row |= {
                "fits": plan.fits,
                "max_length": plan.step.length,
                "batch_size": plan.step.train.batch_size,
                "device_bytes": plan.total,
                "host_bytes": plan.memory.host_bytes,
                "flops_per_token": report["flops_per_token"],
                "step_seconds_floor": report["step_seconds_floor"],
                # At reachable rates, of a compiled plan.
                "counted_tokens_per_second": plan.counted
                and plan.counted["reachable"]["tokens_per_second"],
            }
        rows.append(row)
    return rows


def from_arguments(args: Sequence[str]) -> tuple[PlanCommand, set[str]]:
    """Reads `plan [CONFIG.toml] [--options]`.

    Returns:
      The command, and the names of the fields of `lora` that were given as options.
    """
    default: Any = tyro.MISSING_NONPROP
    if args and not args[0].startswith("-"):
        run = option_defaults(read_config(Path(args[0])))
        mesh = MeshOptions(run.mesh.data, run.mesh.fsdp, run.mesh.context)
        default = PlanCommand(config=args[0], lora=run.lora, mesh=mesh)
    command = parse(PlanCommand, args, prog="qlora-jax plan", default=default)
    return command, given_lora(None, option_keys(args))


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax plan`; returns the exit status."""
    command, explicit = from_arguments(args)

    def show(report: dict[str, Any]) -> None:
        from qlora_jax.cli.plan_output import print_plan

        print_plan(report)

    return run_and_print(lambda: command.run(explicit), as_json=command.json, show=show)
