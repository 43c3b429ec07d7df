"""The devices of a run: how many share a step, and how.

mesh, note = run_mesh(config.mesh, batch_size)    None = one device
"""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from qlora_jax.errors import UserError
from qlora_jax.models import make_mesh
from qlora_jax.runs.config import MeshConfig


def run_mesh(config: MeshConfig, batch_size: int) -> tuple[Mesh | None, str | None]:
    """Chooses the mesh of a run from the devices of all its processes.

    Args:
      config: `[mesh]`.
      batch_size: rows of a micro-batch.

    Returns:
      The mesh, None for one device; and a note for the user.

    Raises:
      UserError: sizes that do not divide the devices.
    """
    devices = jax.device_count()
    if config.data == config.fsdp == config.context == 1:
        return None, None
    if devices == 1 or (batch_size == 1 and config == MeshConfig()):
        note = None
        if devices > 1:
            note = (
                f"Note: one of {devices} devices is used: a batch of one row cannot be "
                "divided. `train.batch_size` = "
                f"{devices} divides rows, and `mesh.context` the tokens of a row."
            )
        return None, note
    fsdp = 1 if config.fsdp == "auto" else config.fsdp
    rest = devices // (fsdp * config.context)
    data = rest if config.data == -1 else config.data
    sizes = {"data": data, "fsdp": fsdp, "context": config.context}
    if math.prod(sizes.values()) != devices:
        raise UserError(f"mesh: {sizes} is not {devices} devices.")
    return make_mesh(sizes), None
