"""What GPUs exchange in a step, and how much longer the step takes for it.

    transfers = count_transfers(hlo.parse(text), devices=64, per_node=8)
    time_step(work, transfers, gpu)         seconds by a model, not measured

A collective moves its bytes as NCCL's rings do. Over n GPUs, of results of R bytes each
GPU sends

  all-gather          R (n - 1) / n
  reduce-scatter      R (n - 1)
  all-reduce        2 R (n - 1) / n

to its neighbor of the ring. A ring enters and leaves each node once, and as many rings
as a node has GPUs in the group share the bytes, each over the network card of another
GPU: in a group with m GPUs in each of several nodes a GPU sends a part 1 / m of its
bytes over the network, and all others over the links within the node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_jax.planning import categories, hlo

if TYPE_CHECKING:  # imports jax
    from qlora_jax.planning.gpus import GpuSpec

PEAK_SHARE = 0.55
"""Share of the dense 16-bit rate that a step is taken to compute at."""

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class Transfer:
    """A collective, all of its runs in a step together."""

    kind: str
    """By XLA's name, such as "all-gather"."""
    phase: Phase
    """The pass over the layers that it runs in, or the step, between them."""
    count: int
    """Runs."""
    bytes: float
    """Of the results on a GPU."""
    members: int
    """GPUs of a group."""
    nodes: int = 1
    """Nodes that a group spans."""

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends to its neighbor."""
        n = self.members
        if self.kind == "reduce-scatter":
            return self.bytes * (n - 1)
        twice = 2 if self.kind == "all-reduce" else 1
        return twice * self.bytes * (n - 1) / n

    @property
    def network_bytes(self) -> float:
        """Bytes that a GPU sends to other nodes."""
        return self.sent * self.nodes / self.members if self.nodes > 1 else 0.0

    @property
    def node_bytes(self) -> float:
        """Bytes that a GPU sends to others of its node."""
        return self.sent - self.network_bytes

    def seconds(self, gpu: GpuSpec) -> float:
        """Returns how long it takes: rings use both kinds of links at once."""
        return max(self.node_bytes / gpu.node_link, self.network_bytes / gpu.network)


# --- Of a compiled program ---

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
# The axes of a mesh, and those along which groups go: mesh['a'=2,'b'=4] {'b'}. Of an
# axis a part may be named, between the product of the parts before it and its size.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


def count_transfers(
    program: hlo.Program, devices: int, per_node: int
) -> list[Transfer]:
    """Returns the collectives of one run of a program.

    Args:
      program: a scheduled program; device i is in node i // per_node.
      devices: that run it.
      per_node: of a node.
    """
    found: list[Transfer] = []
    for call in hlo.executed(program):
        operation = call.instruction.operation
        kind = operation.removesuffix("-start")
        if kind not in hlo.COLLECTIVES:
            continue
        groups = replica_groups(call.instruction, devices)
        members, nodes = max(
            (len(group), len({device // per_node for device in group}))
            for group in groups
        )
        found.append(
            Transfer(
                kind=kind,
                phase=_phase(call),
                count=call.times,
                bytes=call.times * hlo.result_bytes(call.instruction),
                members=members,
                nodes=nodes,
            )
        )
    return merged(found)


def _phase(call: hlo.Call) -> Phase:
    name = call.instruction.op_name
    part = categories.phase_of(name, call.loops)
    if part == "forward" or part == "backward":
        return part
    # Weights of unrolled layers, which are split before the scopes of the layers.
    if "hidden_states" in name and "_unrolled" in name:
        return "backward" if "transpose(jvp(" in name else "forward"
    return "step"


def replica_groups(instruction: hlo.Instruction, devices: int) -> list[tuple[int, ...]]:
    """Returns the groups of devices that take part in a collective together."""
    attributes = instruction.attributes
    if match := _MESH.search(attributes):
        return _groups_of_mesh(match[1], match[2])
    if match := _IOTA.search(attributes):
        groups, dimensions, order = (
            tuple(int(n) for n in part.split(",")) if part else None
            for part in match.groups()
        )
        assert groups is not None and dimensions is not None
        ids = _transposed(dimensions, order or tuple(range(len(dimensions))))
        return _parts(ids, groups[-1])
    if match := _LISTED.search(attributes):
        return [
            tuple(int(n) for n in re.findall(r"\d+", group))
            for group in re.findall(r"\{([\d, ]+)\}", match[1])
        ]
    return [tuple(range(devices))]


def _groups_of_mesh(axes: str, along: str) -> list[tuple[int, ...]]:
    sizes: list[int] = []
    position: dict[str, int] = {}
    for name, size, *_ in _AXIS.findall(axes):
        position[name] = len(sizes)
        sizes.append(int(size))
    grouped: list[int] = []
    for name, _, before, part in _AXIS.findall(along):
        index = position[name]
        if part:  # split the axis in three, of which the middle one is meant
            after = sizes[index] // (int(before) * int(part))
            sizes[index : index + 1] = [int(before), int(part), after]
            for other, place in position.items():
                position[other] = place + 2 * (place > index)
            grouped = [place + 2 * (place > index) for place in grouped]
            index += 1
        grouped.append(index)
    others = [axis for axis in range(len(sizes)) if axis not in grouped]
    ids = _transposed(sizes, (*others, *grouped))
    return _parts(ids, math.prod(sizes[axis] for axis in grouped))


def _parts(ids: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]


def _transposed(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Returns 0, 1, ... as an array of these sizes, transposed and flattened."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [i + n * strides[axis] for i in ids for n in range(sizes[axis])]
    return ids


def merged(transfers: Iterable[Transfer]) -> list[Transfer]:
    """Returns one transfer for all of a kind, phase and group."""
    sums: dict[tuple, tuple[int, float]] = {}
    for t in transfers:
        key = (t.kind, t.phase, t.members, t.nodes)
        count, total = sums.get(key, (0, 0.0))
        sums[key] = (count + t.count, total + t.bytes)
    return [
        Transfer(kind, phase, count, total, members, nodes)
        for (kind, phase, members, nodes), (count, total) in sums.items()
    ]


def bytes_by_kind(transfers: Iterable[Transfer]) -> dict[str, dict[str, float]]:
    """Returns kind -> {"count", "bytes", "node_bytes", "network_bytes"} of a GPU."""
    rows: dict[str, dict[str, float]] = {}
    for t in transfers:
        row = rows.setdefault(
            t.kind, {"count": 0, "bytes": 0, "node_bytes": 0, "network_bytes": 0}
        )
        for name in row:
            row[name] += round(getattr(t, name))
    return rows


# --- The model of a step's time ---


@dataclass(frozen=True)
class Work:
    """The operations of a step on each GPU."""

    forward: float
    """FLOPs of the forward pass over the layers."""
    backward: float
    """FLOPs of the backward pass, with what it computes again."""
    other: float
    """FLOPs of the loss."""
    tokens: int
    """Of all GPUs."""
    host_seconds: float = 0.0
    """Of transfers to and from the host, beside the kernels."""


def time_step(
    work: Work, transfers: Sequence[Transfer], gpu: GpuSpec
) -> dict[str, Any]:
    """Models the time of a step.

    Collectives of a pass over the layers run beside its kernels, and only what takes
    longer than they do is added; all others are added whole.

    Args:
      work: of each GPU.
      transfers: of a step.
      gpu: the data sheet of each.

    Returns:
      "seconds" and "tokens_per_second" of the step; "compute_seconds";
      "communication_seconds" of all transfers; of these "exposed_seconds", which
      nothing hides, and "exposed_share" of the step; and "assumptions".
    """
    rate = PEAK_SHARE * gpu.flops
    compute = (work.forward + work.backward + work.other) / rate
    exposed = 0.0
    for phase, flops in (
        ("forward", work.forward),
        ("backward", work.backward),
        ("step", 0.0),
    ):
        seconds = sum(t.seconds(gpu) for t in transfers if t.phase == phase)
        exposed += max(seconds - flops / rate, 0.0)
    seconds = max(compute + exposed, work.host_seconds)
    return {
        "seconds": seconds,
        "tokens_per_second": work.tokens / seconds,
        "compute_seconds": compute,
        "communication_seconds": sum(t.seconds(gpu) for t in transfers),
        "exposed_seconds": exposed,
        "exposed_share": exposed / seconds,
        "assumptions": {
            "peak_share": PEAK_SHARE,
            "node_link": gpu.node_link,
            "network": gpu.network,
        },
    }
