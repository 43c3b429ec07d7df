"""The devices of a run: how many share a step, and how.

    mesh, note = run_mesh(config.mesh, step, gpu, policies)

`mesh` is None for one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from qlora_jax.models import make_mesh
from qlora_jax.planning import GpuSpec, Policy, Step, choose_mesh
from qlora_jax.runs.config import MeshConfig


def run_mesh(
    config: MeshConfig, step: Step, gpu: GpuSpec, candidates: Sequence[Policy]
) -> tuple[Mesh | None, str | None]:
    """Chooses the mesh of a run from the devices of all its processes.

    Args:
      config: `[mesh]`.
      step: the step, of all devices together.
      gpu: each of the devices.
      candidates: policies that the run may take, fastest first.

    Returns:
      The mesh, None for one device; and a note for the user, if there is a choice.

    Raises:
      UserError: sizes that do not divide the devices or the rows.
    """
    devices, nodes = jax.device_count(), jax.process_count()
    is_open = (config.data, config.fsdp, config.context) == (-1, "auto", 1)
    if devices == 1 and is_open:
        return None, None
    choice = choose_mesh(
        step,
        gpu,
        candidates,
        nodes=nodes,
        per_node=devices // nodes,
        data=config.data,
        fsdp=config.fsdp,
        context=config.context,
        # Processes are there to be used.
        asked=nodes > 1,
    )
    sizes = " x ".join(f"{name} {size}" for name, size in choice.shape.items())
    note = f"Mesh: {sizes}. {choice.reason[0].upper()}{choice.reason[1:]}"
    used = devices - choice.idle
    mesh = None if used == 1 else make_mesh(choice.shape, jax.devices()[:used])
    return mesh, note
