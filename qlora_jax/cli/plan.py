"""The `plan` command: what a run takes on a card, as a table, JSON or a picture.

What is planned is a run file's run, or a model with settings given on the command line;
no weights and no data are read. The planning itself is `qlora_jax.planning.plan`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from convert.files import read_json
from qlora_jax.choices import (
    Attention,
    Dtype,
    EmbeddingMemory,
    HeadMemory,
    Kernels,
    Quantization,
    RematOrAuto,
)
from qlora_jax.cli.options import parse
from qlora_jax.cli.output import run_and_print
from qlora_jax.errors import UserError, say
from qlora_jax.errors import readable_bytes as _gb
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig, apply_changes
from qlora_jax.models.layers import Compute
from qlora_jax.planning.compile import find_compiler, how_to_get_the_compiler
from qlora_jax.planning.gpus import ALLOWANCE, GpuSpec, find_gpu
from qlora_jax.planning.plan import Plan, Planner, Policy, Quantity, policies
from qlora_jax.planning.step import Step
from qlora_jax.runs.overrides import (
    given_lora,
    option_defaults,
    option_keys,
    values_of,
)
from qlora_jax.runs.toml import read_config
from qlora_jax.training.config import TrainConfig

_FIT = "fit"


def _or(default: str) -> Any:
    """What holds where an option is not given, for its help."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class MeshConfig:
    """Devices of one machine that share the work."""

    data: int = 1
    """Devices that divide the rows and repeat the weights."""
    fsdp: int = 1
    """Devices that divide rows and weights."""


@dataclass(frozen=True)
class PlanCommand:
    """Plan the memory of a run on a GPU; reads no weights and no data.

    CONFIG.toml is a run file, or a run directory with one, whose settings hold where no
    option is given; without it --model is needed. Exit status 0: planned, whether it
    fits or not ("fits" of --json says); 1: no size fits that was searched for, or
    something is wrong.
    """

    config: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CONFIG.toml")
    ] = None
    """Run file."""
    model: str | None = None
    """Model directory or its config.json."""
    gpu: str | None = None
    """GpuSpec: b200, h200, h100, a100-80, a100-40, l40s, l4, rtx-4090, rtx-3090, t4, or a
    TOML file that describes one."""
    max_length: Annotated[int | Literal["fit"] | None, _or("the run file's")] = None
    """Tokens of a row; fit = as many as the card holds."""
    batch_size: Annotated[int | Literal["fit"] | None, _or("the run file's, or 1")] = (
        None
    )
    """Rows of a micro-batch, of all devices together; fit = as many as fit."""
    gradient_accumulation_steps: Annotated[int | None, _or("the run file's, or 1")] = (
        None
    )
    """Micro-batches of a step."""
    packing: Annotated[bool | None, _or("the run file's, or no")] = None
    """Whether rows hold several documents."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: Annotated[Quantization | None, _or("the run file's, or nf4_dq")] = (
        None
    )
    """Of the linear layers."""
    dtype: Annotated[
        Dtype | None,
        _or("the run file's, or what the card has"),
    ] = None
    """Of activations and dense tensors."""
    attention: Annotated[
        Attention | None,
        _or("the run file's, or auto"),
    ] = None
    """Attention implementation."""
    remat: Annotated[
        RematOrAuto | None,
        _or("the run file's, or auto"),
    ] = None
    """What is recomputed or kept on the host; auto = the fastest policy that fits. (In
    a run file the default is full.)"""
    kernels: Annotated[Kernels | None, _or("the run file's, or auto")] = None
    """Of products with packed weights."""
    embed_tokens: Annotated[
        Literal["auto", EmbeddingMemory] | None, _or("the run file's, or auto")
    ] = None
    """Where the embedding's table lies."""
    lm_head: Annotated[
        Literal["auto", HeadMemory] | None, _or("the run file's, or auto")
    ] = None
    """Where the output head lies, or nf4 for a quantized one."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
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

    def run(self, given: Sequence[str] = ()) -> dict[str, Any]:
        """Does it; returns the report.

        Args:
          given: names of the fields of `lora` that were given on the command line.
        """
        if self.plot is not None:
            _check_picture(Path(self.plot))
        settings = _Settings.of(self, given)
        card = _card(self.gpu)
        python = self._compiler(card)
        notes = list(settings.notes(card))
        planner = Planner(card, python=python, mesh=self._mesh(), say=say)
        step = settings.step(card)
        among = policies(
            remat=settings.remat,
            attention=settings.attention,
            embed_tokens=settings.embed_tokens,
            lm_head=settings.lm_head,
            tied=settings.config.tie_word_embeddings,
            gpu=card,
        )
        if settings.fit is None:
            plan = planner.fastest(step, among)
        else:
            plan = planner.longest(step, among, settings.fit)
        report = plan.report()
        if plan.method == "estimate":
            notes.append(self._why_estimated(card))
        if not plan.fits:
            notes.append(planner.too_large(plan))
        if plan.step.length > settings.config.max_position_embeddings:
            notes.append(
                f"rows are longer than the {settings.config.max_position_embeddings:,} "
                "positions the model was made for: this is about memory alone."
            )
        report["notes"] = notes
        if self.compare:
            every = policies(attention=settings.attention, gpu=card)
            report["policies"] = _compared(planner, step, every, settings.fit)
        if self.plot is not None:
            drawn = draw_memory(planner, plan, among, Path(self.plot))
            report["plot"] = None if drawn is None else str(drawn)
        return report

    def _mesh(self) -> dict[str, int]:
        sizes = dataclasses.asdict(self.mesh)
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"--mesh.{name} must be at least 1, got {size}.")
        return {name: size for name, size in sizes.items() if size > 1} or {"data": 1}

    def _compiler(self, card: GpuSpec) -> str | None:
        if self.method == "estimate":
            return None
        python = find_compiler(self.compiler_python)
        if self.method == "compiled" and python is None:
            raise UserError(
                "--method compiled: the GPU compiler is not installed here. Get it "
                f"with: {how_to_get_the_compiler()}; or name a Python that has it "
                "(--compiler-python)."
            )
        if self.method == "compiled" and not card.compiles:
            card.target  # noqa: B018 (says why not)
        return python

    def _why_estimated(self, card: GpuSpec) -> str:
        how_good = "within 10 % of the compiled plan as tested, without collectives."
        if self.method == "estimate":
            return f"an estimate by formula, as asked for; {how_good}"
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


@dataclass(frozen=True)
class _Settings:
    """A run file and the options, put together."""

    config: LlamaConfig
    lora: LoraConfig
    length: int
    batch_size: int
    accumulation: int
    packed: bool
    quantization: str | None
    dtype: str | None
    kernels: str
    remat: str
    attention: str
    embed_tokens: str
    lm_head: str
    fit: Quantity | None
    optimizer: TrainConfig

    @classmethod
    def of(cls, command: PlanCommand, given: Sequence[str]) -> _Settings:
        run = None
        if command.config is not None:
            options = values_of(command, (f"lora.{name}" for name in given))
            run = read_config(Path(command.config), options)
        model = command.model or (run.model.path if run else None)
        if model is None:
            raise UserError(
                "say which model: --model PATH (a directory or a config.json), or a "
                "run file."
            )

        def pick(value: Any, of_run: Any, default: Any) -> Any:
            if value is not None:
                return value
            return default if run is None else of_run(run)

        length = pick(command.max_length, lambda r: r.data.max_length, None)
        batch = pick(command.batch_size, lambda r: r.train.batch_size, 1)
        if length is None:
            raise UserError(
                "say how long rows are: --max-length N, or --max-length fit for as "
                "long as the card holds."
            )
        if length == _FIT and batch == _FIT:
            raise UserError(
                "--max-length fit and --batch-size fit: fix one of them, so that the "
                "other has an answer."
            )
        for name, value in (("max-length", length), ("batch-size", batch)):
            if isinstance(value, int) and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        fit: Quantity | None = None
        if length == _FIT:
            fit, length = "length", 128
        if batch == _FIT:
            fit = "batch_size"
            batch = command.mesh.data * command.mesh.fsdp
        path = Path(model)
        config = LlamaConfig.from_hf(
            read_json(path / "config.json" if path.is_dir() else path)
        )
        lora = command.lora
        if run is not None:
            config = apply_changes(config, run.model.config_changes)
            lora = run.lora
        quantization = pick(
            command.quantization, lambda r: r.model.quantization, "nf4_dq"
        )

        def of_model(name: str) -> Any:
            return pick(
                getattr(command, name), lambda r: getattr(r.model, name), "auto"
            )

        return cls(
            config=config,
            lora=lora,
            length=length,
            batch_size=batch,
            accumulation=pick(
                command.gradient_accumulation_steps,
                lambda r: r.train.gradient_accumulation_steps,
                1,
            ),
            packed=pick(command.packing, lambda r: r.data.packing, False),
            quantization=None if quantization == "none" else quantization,
            dtype=pick(command.dtype, lambda r: r.model.dtype, None),
            kernels=of_model("kernels"),
            remat=of_model("remat"),
            attention=of_model("attention"),
            embed_tokens=of_model("embed_tokens"),
            lm_head=of_model("lm_head"),
            fit=fit,
            optimizer=TrainConfig(steps=1) if run is None else run.train,
        )

    def step(self, card: GpuSpec) -> Step:
        train = dataclasses.replace(
            self.optimizer,
            steps=1,
            epochs=None,
            warmup_steps=0,
            # A plan is of one step, and no warm-up is longer.
            groups=tuple(
                dataclasses.replace(group, warmup_steps=0)
                for group in self.optimizer.groups
            ),
            adapter_init=None,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
        )
        dtype = self.dtype or ("bfloat16" if card.bfloat16 else "float16")
        compute = Compute(
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            kernels=self.kernels,  # pyright: ignore[reportArgumentType]
            lora=self.lora,
        )
        return Step(
            self.config,
            compute,
            length=self.length,
            train=train,
            quantization=self.quantization,
            packed=self.packed,
        )

    def notes(self, card: GpuSpec) -> list[str]:
        out = []
        if not card.bfloat16:
            major, minor = card.compute_capability
            has = f"{card.name} (compute capability {major}.{minor}) has no bfloat16"
            if self.dtype == "bfloat16":
                raise UserError(f"{has}: use --dtype float16 or float32.")
            out.append(f"{has} and no cuDNN attention: planned with float16 and 'xla'.")
        return out


def _card(name: str | None) -> GpuSpec:
    if name is None:
        raise UserError("say for which card: --gpu NAME (or a TOML file; see --help).")
    return find_gpu(name)


def _compared(
    planner: Planner, step: Step, among: Sequence[Policy], fit: Quantity | None
) -> list[dict[str, Any]]:
    """One row a policy: bytes at this size, or the largest size."""
    if fit is None:
        plans: list[Plan | None] = [planner.plan(step, policy) for policy in among]
    else:
        plans = planner.longest_of_each(step, among, fit)
    rows = []
    for policy, plan in zip(among, plans, strict=True):
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
            }
        rows.append(row)
    return rows


# --- What people read ---

_KINDS = {
    "base": "frozen weights",
    "adapters": "adapters (float32)",
    "optimizer": "the optimizer's moments",
    "batch": "batch",
    "activations": "activations kept for the backward pass",
    "gradients": "gradients",
    "loss": "loss, beyond what it shares",
    "temporaries": "temporaries: a layer at work",
    "workspace": "workspace of cuDNN's backward pass",
    "allowance": "CUDA context and allocator",
}


def _check_picture(path: Path) -> None:
    """Refuses what no picture can be drawn to, before anything is compiled."""
    if path.suffix.lower() != ".png":
        raise UserError(f"`plot` draws a PNG, and {str(path)!r} is named otherwise.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"`plot`: the directory of {str(path)!r} does not exist.")


def print_plan(report: Mapping[str, Any]) -> None:
    """Prints a report of `PlanCommand.run` as tables."""
    how = "compiled" if report["method"] == "compiled" else "estimated"
    devices = 1
    for size in report["mesh"].values():
        devices *= size
    where = report["card"] if devices == 1 else f"{devices} x {report['card']}"
    verdict = "fits" if report["fits"] else "does not fit"
    print(
        f"{report['batch_size']:,} x {report['max_length']:,} tokens on {where}: "
        f"{verdict} ({how}; policy '{report['policy']}', attention "
        f"{report['attention']}, {report['dtype']}, {report['quantization']})"
    )
    print("\ndevice bytes" + (" of each device" if devices > 1 else ""))
    for kind, size in report["device_bytes"].items():
        if kind != "total" and size >= 5000:  # less would print as nothing
            print(f"  {_KINDS[kind]:<40}{_gb(size):>12}")
    total, card = report["device_bytes"]["total"], report["card_bytes"]
    print(f"  {'total':<40}{_gb(total):>12}  of {_gb(card)} ({total / card:.0%})")
    print("\nbeside")
    rows = {
        "pinned host memory": _gb(report["host_bytes"]),
        "host memory the machine needs": _gb(report["host_bytes_needed"]),
        "adapter file": _gb(report["adapter_bytes"]),
        "FLOPs a token": f"{report['flops_per_token'] / 1e9:,.1f} G",
    }
    floor = report["step_seconds_floor"]
    rows["a step takes at least"] = (
        f"{max(floor.values()):.3g} s (compute {floor['compute']:.3g}, device memory "
        f"{floor['bandwidth']:.3g}, host link {floor['host_link']:.3g})"
    )
    for name, text in rows.items():
        print(f"  {name:<32}{text}")
    if report["collectives"]:
        print("\ncollectives of a step, of each device")
        for kind, row in sorted(report["collectives"].items()):
            print(f"  {kind:<24}{row['count']:>8,} x {_gb(row['bytes']):>12}")
    if report.get("policies"):
        print("\npolicies")
        print(f"  {'':<24}{'tokens':>16}{'device':>12}{'host':>12}{'at least':>12}")
        for row in report["policies"]:
            if "device_bytes" not in row:
                print(f"  {row['policy']:<24}{'does not fit':>16}")
                continue
            size = f"{row['batch_size']:,} x {row['max_length']:,}"
            least = max(row["step_seconds_floor"].values())
            print(
                f"  {row['policy']:<24}{size:>16}{_gb(row['device_bytes']):>12}"
                f"{_gb(row['host_bytes']):>12}{least:>10.3g} s"
                + ("" if row["fits"] else "  does not fit")
            )
    print("\nin [model] of the run file")
    for name in ("remat", "attention", "embed_tokens", "lm_head"):
        print(f"  {name} = {json.dumps(report[name])}")
    if report["settings"] and report["fits"]:
        print("\nset for the run")
        for name, value in report["settings"].items():
            print(f"  {name}={value}")
    if report.get("plot"):
        print(f"\ndrawn: {report['plot']}")
    for note in report["notes"]:
        print(f"\nNote: {note}")


def draw_memory(
    planner: Planner, plan: Plan, among: Sequence[Policy], path: Path
) -> Path | None:
    """Draws device memory against length for each policy, with the card's limit.

    Returns:
      The picture's path; None (with a line on stderr) without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(
            f"{path} is not drawn: pip install matplotlib.",
            file=sys.stderr,
        )
        return None
    limit = planner.gpu.memory_bytes / 1e9
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for policy in among:
        lengths, totals = zip(*_points(planner, plan.step, policy), strict=True)
        # Between the planned points memory is a straight line over tokens, which a
        # logarithmic axis bends.
        fine = np.geomspace(lengths[0], lengths[-1], 200)
        (line,) = axes.plot(fine, np.interp(fine, lengths, totals), label=policy.name)
        axes.plot(lengths, totals, "o", markersize=3.5, color=line.get_color())
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"{planner.gpu.name}: {limit:,.0f} GB",
        (0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
    )
    axes.set_ylim(0, 1.15 * limit)
    axes.set_xlabel("tokens of a row (k = 1,024)")
    axes.set_ylabel(f"device memory (GB, {ALLOWANCE / 1e9:.1f} of them for context)")
    rows = plan.step.train.batch_size
    axes.set_title(
        f"{rows} row{'s' if rows > 1 else ''} a step; dots: "
        + ("compiled" if planner.python else "estimated"),
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="policy")
    temporary = path.with_suffix(f".tmp{path.suffix or '.png'}")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    return path


def _points(planner: Planner, step: Step, policy: Policy) -> list[tuple[int, float]]:
    """Lengths and GB under a policy, from short rows to beyond the card."""
    limit = planner.gpu.memory_bytes

    def estimated(length: int) -> int:
        longer = dataclasses.replace(step, length=length)
        return planner.estimate(longer, policy).total

    end = 256
    while estimated(end) < 1.25 * limit and 4 * end * step.train.batch_size < 2**31:
        end *= 2
    out = []
    for length in sorted({min(512, end), *(max(end >> n, 128) for n in (4, 2, 1, 0))}):
        plan = planner.plan(dataclasses.replace(step, length=length), policy)
        out.append((length, plan.total / 1e9))
        if plan.total > 1.25 * limit:
            break
    return out


def plan_from_arguments(args: Sequence[str]) -> tuple[PlanCommand, list[str]]:
    """Reads the command line; with a run file, its LoRA settings are the defaults."""
    args = list(args)
    given = sorted(given_lora(None, option_keys(args)))
    default: Any = tyro.MISSING_NONPROP
    if args and not args[0].startswith("-"):
        run = option_defaults(read_config(Path(args[0])))
        default = PlanCommand(config=args[0], lora=run.lora)
    command = parse(PlanCommand, args, prog="qlora-jax plan", default=default)
    return command, given


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax plan`; returns the exit status."""
    command, given = plan_from_arguments(args)
    return run_and_print(
        lambda: command.run(given), as_json=command.json, show=print_plan
    )
