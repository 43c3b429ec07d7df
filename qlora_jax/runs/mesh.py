"""The devices of a run: how many share a step, and how.

    for mesh, note in run_meshes(config.mesh, step, gpu, policies):
        ...                              until the compiled step fits

`mesh` is None for one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from qlora_jax.models import make_mesh
from qlora_jax.planning import GpuSpec, Policy, Step, choose_mesh, used_axes
from qlora_jax.runs.config import MeshConfig


def run_meshes(
    config: MeshConfig | None, step: Step, gpu: GpuSpec, candidates: Sequence[Policy]
) -> Iterator[tuple[Mesh | None, str | None]]:
    """Chooses the mesh of a run from the devices of all its processes.

    Args:
      config: `[mesh]`; None = one device.
      step: the step, of all devices together.
      gpu: each of the devices.
      candidates: policies that the run may take, fastest first.

    Yields:
      The mesh, None for one device; and a note for the user, if there is a choice. Then
      those to try if the step does not fit on it, each of which divides the weights
      among more devices.

    Raises:
      UserError: sizes that do not divide the devices or the rows.
    """
    devices, nodes = jax.device_count(), jax.process_count()
    if config is None or (devices == 1 and config.is_open):
        yield None, None
        return
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
    used = devices - choice.idle
    reason = f"{choice.reason[0].upper()}{choice.reason[1:]}"
    yield _mesh(choice.shape, used), _note(choice.shape, reason)
    for fsdp in choice.larger:
        data = used // (fsdp * choice.context)
        shape = {"data": data, "fsdp": fsdp, "context": choice.context}
        reason = f"{fsdp} GPUs divide the weights: with fewer the step does not fit."
        yield _mesh(shape, used), _note(shape, reason)


def _mesh(shape: Mapping[str, int], used: int) -> Mesh | None:
    return None if used == 1 else make_mesh(shape, jax.devices()[:used])


def _note(shape: Mapping[str, int], reason: str) -> str:
    sizes = " x ".join(f"{name} {n}" for name, n in used_axes(shape).items())
    return f"Mesh: {sizes}. {reason}"
