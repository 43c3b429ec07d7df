"""Chooses the mesh of a run: which GPUs repeat the weights, and which divide them.

    choice = choose_mesh(step, gpu, policies(), nodes=8, per_node=8)
    choice.shape        {"data": 8, "fsdp": 8}
    choice.reason       a sentence

Dividing weights costs gathers in every layer, so the first of these is taken by which
the step fits without offloading, by the estimate and with its error to spare:

  1. every GPU repeats the weights ("data");
  2. the fewest GPUs of a node divide them ("fsdp"), and groups of them repeat them;
  3. the fewest whole nodes divide them.

Where rows are fewer than GPUs, GPUs of a node share a row ("context"). Nothing is
compiled, and no device is asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_jax.errors import UserError, readable_bytes
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.planning.ladder import Policy
from qlora_jax.planning.plan import Plan, Planner
from qlora_jax.planning.step import Step

_NODE = 8

Fsdp = int | Literal["auto"]


@dataclass(frozen=True)
class MeshChoice:
    """The sizes of a mesh, and why they were chosen."""

    data: int
    fsdp: int
    context: int
    reason: str
    """A sentence."""
    idle: int = 0
    """GPUs that the mesh leaves out."""
    larger: tuple[int, ...] = ()
    """Sizes of "fsdp" by which each GPU would hold less, where it was left open."""

    @property
    def shape(self) -> dict[str, int]:
        """Axis -> size, without axes of size 1; {"data": 1} for one GPU."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "context": self.context}
        return used_axes(sizes)


def used_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the sizes of the axes that divide something; {"data": 1} if none does."""
    return {name: n for name, n in sizes.items() if n > 1} or {"data": 1}


def gpus_per_node(devices: int, asked: int | None = None) -> int:
    """Returns how many of the GPUs of a run are in one node.

    Args:
      devices: GPUs of the run.
      asked: what the user says; default all of up to 8, and of more than 8 the largest
        number up to 8 that divides them.

    Raises:
      UserError: a number that does not divide the GPUs.
    """
    if asked is None:
        return max(n for n in range(1, _NODE + 1) if devices % n == 0)
    if asked < 1 or devices % min(asked, devices):
        raise UserError(
            f"{devices} GPUs in nodes of {asked}: give a number of GPUs for each node "
            "that divides them (--gpus-per-node)."
        )
    return min(asked, devices)


def choose_mesh(
    step: Step,
    gpu: GpuSpec,
    policies: Sequence[Policy],
    *,
    nodes: int = 1,
    per_node: int = 1,
    data: int = -1,
    fsdp: Fsdp = "auto",
    context: Fsdp = "auto",
    asked: bool = True,
) -> MeshChoice:
    """Chooses the sizes of a mesh that are not fixed.

    Args:
      step: the step, of all GPUs together.
      gpu: the data sheet of each.
      policies: those that the run may take, fastest first.
      nodes: machines.
      per_node: GPUs of each.
      data: GPUs that repeat the weights; -1 = those that are left.
      fsdp: GPUs that divide them, or "auto".
      context: GPUs that share a row, or "auto": one, where rows are enough.
      asked: whether the user wants several GPUs. If not, and nothing is fixed, a single
        row stays on one.

    Raises:
      UserError: fixed sizes that do not divide the GPUs or the rows, or a batch that no
        mesh of these GPUs divides; names batch sizes that would do.
    """
    devices, rows = nodes * per_node, step.train.batch_size
    is_open = data == -1 and fsdp == context == "auto"
    if devices == 1 and is_open:
        return MeshChoice(1, 1, 1, "one GPU.")
    if rows == 1 and is_open and not asked:
        return _one_of(devices)
    if is_open:
        context = _context(rows, nodes, per_node)
    elif context == "auto":
        context = _context_beside(rows, nodes, per_node, data, fsdp)
    is_set = fsdp != "auto"
    data, fsdp, used = _fixed(devices, nodes, data, fsdp, context)
    sharers = used // context
    if fsdp != "auto":
        _check_rows(rows, sharers, f"data {data} x fsdp {fsdp}")
        reason = "as set"
        if not is_set:
            reason = f"data = {data} as set; fsdp is what is left"
        if used < devices:
            reason += f"; {devices - used} of {devices} GPUs are idle"
        return MeshChoice(data, fsdp, context, f"{reason}.", devices - used)
    _check_rows(rows, sharers, f"{devices} GPUs, of which {context} share a row")
    inside = per_node // math.gcd(per_node, context)
    sizes = [
        size
        for size in range(1, sharers + 1)
        if sharers % size == 0 and (inside % size == 0 or size % inside == 0)
    ]
    meshes = [MeshChoice(sharers // size, size, context, "") for size in sizes]
    return _first_that_fits(meshes, step, gpu, policies, per_node)


def _one_of(devices: int) -> MeshChoice:
    reason = (
        f"one GPU for one row; {devices - 1} of {devices} GPUs are idle. Use them with "
        f"batch_size={devices}, or let them share the row: [mesh] context = {devices}."
    )
    return MeshChoice(1, 1, 1, reason, devices - 1)


def _context(rows: int, nodes: int, per_node: int) -> int:
    """Returns how many GPUs of a node share a row."""
    if context := _context_of(rows, nodes, per_node):
        return context
    devices = nodes * per_node
    below = next(
        (n for n in range(rows - 1, 0, -1) if _context_of(n, nodes, per_node)),
        None,
    )
    above = next(
        n
        for n in range(rows + 1, rows + devices + 1)
        if _context_of(n, nodes, per_node)
    )
    nearest = f"{below} or {above}" if below else f"{above}"
    shared = ""
    if rows < devices:
        shared = (
            f" Fewer rows must divide them, into GPUs of one node ({per_node}) that "
            "share a row."
        )
    raise UserError(
        f"`batch_size`={rows} cannot be divided among {devices} GPUs: it counts the "
        f"rows of all of them and must be a multiple of {devices}.{shared} Nearest "
        f"that can be: {nearest}."
    )


def _context_of(rows: int, nodes: int, per_node: int) -> int | None:
    """Returns the size of "context" by which rows come out even, or None."""
    devices = nodes * per_node
    if rows % devices == 0:
        return 1
    context, rest = divmod(devices, rows)
    return None if rest or per_node % context else context


def _context_beside(rows: int, nodes: int, per_node: int, data: int, fsdp: Fsdp) -> int:
    """Returns the size of "context" beside a fixed `data` or `fsdp`."""
    if data != -1 and fsdp != "auto":
        return 1
    fixed = data if data > 0 else fsdp
    if not isinstance(fixed, int) or fixed < 1:
        return 1
    context = _context_of(rows, nodes, per_node) or 1
    return 1 if nodes * per_node // context % fixed else context


def _fixed(
    devices: int, nodes: int, data: int, fsdp: Fsdp, context: int
) -> tuple[int, Fsdp, int]:
    """Returns `data` and `fsdp` as far as they follow, and the GPUs in use."""
    known = {"data": data, "fsdp": fsdp, "context": context}
    text = ", ".join(f"{name} = {size}" for name, size in known.items())
    sizes = [n for n in known.values() if isinstance(n, int) and n != -1]
    product = math.prod(sizes)
    if any(n < 1 for n in sizes) or devices % product:
        raise UserError(
            f"[mesh] {text}: sizes are at least 1 (data also -1, what is left; fsdp "
            "and context also 'auto'), and their product must divide the number of "
            f"GPUs, {devices}."
        )
    if data == -1:
        return (
            (1, "auto", devices)
            if fsdp == "auto"
            else (devices // product, fsdp, devices)
        )
    if fsdp == "auto":
        return data, devices // product, devices
    if product < devices and nodes > 1:
        raise UserError(
            f"[mesh] {text}: that is {product} of the {devices} GPUs of {nodes} nodes. "
            "A run over several nodes has all of their GPUs: data = -1 takes the rest."
        )
    return data, fsdp, product


def _check_rows(rows: int, sharers: int, mesh: str) -> None:
    if rows % sharers:
        above = -(-rows // sharers) * sharers
        below = above - sharers
        raise UserError(
            f"`batch_size`={rows} counts the rows of all GPUs and must be a multiple "
            f"of {sharers} ({mesh}). Nearest: "
            + (f"{below} or {above}." if below else f"{above}.")
        )


def _first_that_fits(
    meshes: Sequence[MeshChoice],
    step: Step,
    gpu: GpuSpec,
    policies: Sequence[Policy],
    per_node: int,
) -> MeshChoice:
    on_device = [policy for policy in policies if policy.remat != "offload"]
    refusals: list[UserError] = []
    least: Plan | None = None
    for among in (on_device, policies):
        for mesh in meshes:
            try:
                plans = list(_plans(mesh, step, gpu, among))
            except UserError as refusal:  # sizes that do not divide the weights
                refusals.append(refusal)
                continue
            for plan in plans:
                if plan.fits and not plan.uncertain:
                    larger = tuple(m.fsdp for m in meshes if m.fsdp > mesh.fsdp)
                    chosen = _argued(mesh, plan, least, per_node)
                    return dataclasses.replace(chosen, larger=larger)
                if least is None:
                    least = min(plans, key=lambda plan: plan.total)
    if least is None:
        raise refusals[0]
    # Nothing fits with certainty: most of the weights of all are divided.
    mesh = meshes[-1]
    plan = min(_plans(mesh, step, gpu, policies), key=lambda plan: plan.total)
    return _argued(mesh, plan, least, per_node)


def _plans(
    mesh: MeshChoice, step: Step, gpu: GpuSpec, policies: Sequence[Policy]
) -> Iterator[Plan]:
    planner = Planner(gpu, mesh=mesh.shape)
    for policy in policies:
        yield planner.estimate(step, policy)


def _argued(
    mesh: MeshChoice, plan: Plan, first: Plan | None, per_node: int
) -> MeshChoice:
    """Returns the mesh with its reason.

    Args:
      mesh: the mesh.
      plan: by which it was chosen.
      first: of the mesh that comes before all others, where it does not fit.
      per_node: GPUs of a node.
    """
    limit = readable_bytes(plan.gpu.memory_bytes)
    takes = f"{readable_bytes(plan.total)} of {limit} ('{plan.policy.name}')"
    if plan.uncertain:
        takes += ", which the estimate's error may exceed"
    if mesh.fsdp == 1:
        reason = (
            f"every GPU repeats the weights and takes {takes}, so only gradients of "
            "what is trained are exchanged"
        )
    else:
        nodes, rest = divmod(mesh.fsdp * mesh.context, per_node)
        where = "of a node" if nodes < 1 or (nodes == 1 and not rest) else "of nodes"
        if nodes > 1:
            where = f"of {nodes} nodes"
        reason = f"{mesh.fsdp} GPUs {where} divide the weights, and each takes {takes}"
        if first is not None and first is not plan:
            reason += (
                f"; on every GPU all of them would take {readable_bytes(first.total)} "
                f"('{first.policy.name}')"
            )
    if mesh.context > 1:
        reason += f"; {mesh.context} GPUs share a row, as rows are fewer than GPUs"
        # Each of them has two parts.
        if pad := -plan.step.length % (2 * mesh.context):
            reason += f", and {pad} tokens of padding make their parts equal"
    if not plan.fits:
        reason += "; even so it does not fit"
    return MeshChoice(mesh.data, mesh.fsdp, mesh.context, f"{reason}.")
