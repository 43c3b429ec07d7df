"""Policies: the settings that trade the memory of a step for its speed.

for policy in policies(remat="auto"):     fastest first
policy.apply(step)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from qlora_jax.errors import UserError
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.planning.step import Step


@dataclass(frozen=True)
class Policy:
    """Settings that trade the memory of a step for its speed."""

    name: str
    remat: str
    scan_layers: bool = True
    attention: str = "auto"
    embed_tokens: str = "device"
    lm_head: str = "device"

    def apply(self, step: Step) -> Step:
        """Returns the step under this policy."""
        compute = dataclasses.replace(
            step.compute,
            remat=self.remat,  # pyright: ignore[reportArgumentType]
            scan_layers=self.scan_layers,
            attention=self.attention,  # pyright: ignore[reportArgumentType]
        )
        return dataclasses.replace(
            step,
            compute=compute,
            embed_tokens=self.embed_tokens,  # pyright: ignore[reportArgumentType]
            lm_head=self.lm_head,  # pyright: ignore[reportArgumentType]
        )


_UNROLLED = ", unrolled"
LADDER = (
    Policy(f"none{_UNROLLED}", "none", scan_layers=False),
    Policy(f"save_matmuls{_UNROLLED}", "save_matmuls", scan_layers=False),
    Policy("save_matmuls", "save_matmuls"),
    Policy("save_attention", "save_attention"),
    Policy("full", "full"),
    Policy("offload", "offload"),
    Policy("offload, tables", "offload", True, "auto", "host", "host"),
    Policy("offload, tables, xla", "offload", True, "xla", "host", "host"),
)
"""Fastest first, by the count of `planning.roofline`; each needs less device memory
than the previous one. "unrolled": each layer has its own program (`scan_layers` is
False). In a loop "none" is the slowest of all: it writes everything into arrays of all
layers and reads it back. "tables": the embedding and the head are in host memory.
"xla": attention whose backward pass needs no workspace."""


def policies(
    *,
    remat: str = "auto",
    scan_layers: bool | Literal["auto"] = "auto",
    attention: str = "auto",
    embed_tokens: str = "auto",
    lm_head: str = "auto",
    tied: bool = False,
    gpu: GpuSpec | None = None,
    on_cpu: bool = False,
) -> list[Policy]:
    """Returns the policies of `LADDER` that keep the fixed settings, fastest first.

    Args:
      remat: a policy of `Compute.remat`, or "auto" for all of them.
      scan_layers: whether the layers are a loop, or "auto" for what each policy has.
      attention: "auto", or an implementation.
      embed_tokens: "auto", "device" or "host".
      lm_head: the same, or "nf4".
      tied: the model's head is its embedding table.
      gpu: if it cannot run cuDNN, attention="auto" becomes "xla".
      on_cpu: whether a CPU computes the step. There "none" is the fastest in a loop,
        too.

    Raises:
      UserError: different memories for tied tables.
    """
    if tied and lm_head in ("device", "host"):
        if embed_tokens not in ("auto", lm_head):
            raise UserError(
                f"embed_tokens={embed_tokens!r} and lm_head={lm_head!r}: this model's "
                "head is its embedding table. Give `embed_tokens` alone."
            )
        embed_tokens = lm_head
    if attention == "auto" and gpu is not None and not gpu.bfloat16:
        attention = "xla"
    out: dict[tuple, Policy] = {}
    for rung in LADDER:
        if remat not in ("auto", rung.remat):
            continue
        scan = rung.scan_layers if scan_layers == "auto" else scan_layers
        if remat == "auto" and rung.remat == "none" and scan and not on_cpu:
            continue  # the slowest of all, and needs most memory
        policy = Policy(
            rung.name.removesuffix(_UNROLLED) + _UNROLLED * (not scan),
            rung.remat,
            scan,
            rung.attention if attention == "auto" else attention,
            rung.embed_tokens if embed_tokens == "auto" else embed_tokens,
            rung.lm_head if lm_head == "auto" else lm_head,
        )
        key = dataclasses.astuple(policy)[1:]
        # Of rungs that became equal the first has the simplest name.
        out.setdefault(key, policy)
    return list(out.values())
