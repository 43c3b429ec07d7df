"""The GPUs of `qlora-jax plan`: how many, in which nodes, and their mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.choices import Auto
from qlora_jax.errors import readable_bytes

if TYPE_CHECKING:
    from qlora_jax.planning import GpuSpec, MeshChoice, Plan, Policy, Step


@dataclass(frozen=True)
class MeshOptions:
    """Which GPUs repeat the weights, and which divide them."""

    data: int = -1
    """GPUs that divide the rows and repeat the weights; -1 = as many as are left."""
    fsdp: int | Auto = "auto"
    """GPUs that divide rows and weights; auto = as few as the step fits on."""
    context: int | Auto = "auto"
    """GPUs that divide the tokens of a row; auto = 1, if rows are enough for all."""

    @property
    def devices(self) -> int:
        """The GPUs that the fixed sizes need."""
        sizes = (self.data, self.fsdp, self.context)
        return math.prod(n for n in sizes if isinstance(n, int) and n > 0)


def chosen_mesh(
    options: MeshOptions,
    devices: int | None,
    per_node: int | None,
    step: Step,
    card: GpuSpec,
    candidates: Sequence[Policy],
) -> tuple[MeshChoice, int]:
    """Returns the mesh of a plan, and the GPUs of a node.

    Args:
      options: sizes, as far as they are fixed.
      devices: number of GPUs; None = as many as the fixed sizes need.
      per_node: GPUs of a node; None = 8 of more than 8.
      step: the step to plan.
      card: the GPU.
      candidates: policies that the run may take.
    """
    from qlora_jax.planning import choose_mesh, gpus_per_node

    total = options.devices if devices is None else devices
    inside = gpus_per_node(total, per_node)
    choice = choose_mesh(
        step,
        card,
        candidates,
        nodes=total // inside,
        per_node=inside,
        # As a run does.
        asked=total > inside,
        **dataclasses.asdict(options),
    )
    return choice, inside


def mesh_notes(plan: Plan) -> list[str]:
    """Returns notes on what the mesh of a plan costs."""
    micro = plan.step.train.gradient_accumulation_steps
    again = plan.gathered_again_bytes
    if not again:
        return []
    return [
        f"each of the {micro} micro-batches gathers the weights: "
        f"{readable_bytes(again)} of what a GPU sends in a step would not be sent if "
        "it were one."
    ]


def print_mesh(report: Mapping[str, Any]) -> None:
    """Prints the mesh, what its GPUs exchange, and the modelled time of a step."""
    if report["collectives"]:
        print("\nwhat a GPU sends in a step")
        print(f"  {'':<24}{'runs':>8}{'in its node':>16}{'to other nodes':>16}")
        for kind, row in sorted(report["collectives"].items()):
            sent = (
                readable_bytes(row[f"{name}_bytes"]) for name in ("node", "network")
            )
            print(f"  {kind:<24}{row['count']:>8,}" + "".join(f"{s:>16}" for s in sent))
    if (modelled := report["modelled"]) is None:
        return
    print("\ntime of a step, by a model, not measured")
    for label, name in (
        ("compute", "compute_seconds"),
        ("exchange", "communication_seconds"),
        ("of it not hidden", "exposed_seconds"),
        ("step", "seconds"),
    ):
        share = modelled[name] / modelled["seconds"]
        print(f"  {label:<40}{modelled[name]:>10.3g} s{share:>8.1%}")
    print(f"  {'tokens/s of all GPUs':<40}{modelled['tokens_per_second']:>12,.0f}")
    assumed = modelled["assumptions"]
    print(
        f"  assumed: compute at {assumed['peak_share']:.0%} of the peak, "
        f"{assumed['node_link'] / 1e9:.0f} GB/s from GPU to GPU in a node and "
        f"{assumed['network'] / 1e9:.0f} GB/s a GPU between nodes, rings; what a layer "
        "exchanges runs beside its kernels"
    )
