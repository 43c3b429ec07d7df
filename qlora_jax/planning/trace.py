"""Sorts the measured kernels of a profiler trace into the categories of the count.

    events = read_trace(directory)          of jax.profiler.trace(directory)
    measured = attribute(events, kernels, sizes)
    measured.rows["attention, forward"].seconds, measured.steps

An event belongs to the instruction that its `hlo_op` names. Kernels of a command
buffer (CUDA graph) name the buffer instead; they are found by the name of the kernel,
which XLA derives from the instruction, and those of libraries by words of their own
names. (XLA keeps every name where command buffers are off:
`--xla_gpu_enable_command_buffer=`.) What is not found is a row of its own.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.planning import categories
from qlora_jax.planning.roofline import Row
from qlora_jax.planning.work import Kernel, Sizes

UNKNOWN = "not in the program"
LIBRARY_PRODUCTS = "products in command buffers"
LIBRARY_ATTENTION = "attention in command buffers"

# Words in the names of kernels of cuDNN and cuBLAS.
_LIBRARIES = (
    (re.compile(r"sdpa|fmha|flash"), LIBRARY_ATTENTION),
    (re.compile(r"nvjet|gemm|cutlass|cublas|splitK"), LIBRARY_PRODUCTS),
)
# They last as long as what they contain.
_CONTROL = re.compile(r"^(while|call|conditional|command_buffer)(\.|$|_)")


@dataclass(frozen=True)
class Event:
    """Something that a device ran."""

    name: str
    """Of the kernel, or of the instruction."""
    seconds: float
    hlo_op: str
    """Instruction that launched it; empty if the trace does not tell."""
    module: str
    """Program that it is part of; empty if the trace does not tell."""


@dataclass(frozen=True)
class Measured:
    """The kernels of a trace by category."""

    rows: Mapping[str, Row]
    """Of one step: seconds and launches, the longest first."""
    steps: int
    """That the trace has."""
    unknown: Mapping[str, float]
    """Name -> seconds of a step, of events that no instruction is known for."""

    @property
    def seconds(self) -> float:
        """Of the kernels of a step."""
        return sum(row.seconds for row in self.rows.values())


def read_trace(directory: Path) -> list[Event]:
    """Reads what the devices ran from the newest trace in a directory.

    Args:
      directory: of `jax.profiler.trace`, or a `*.trace.json.gz` in it.

    Raises:
      UserError: no trace there, or one that cannot be read.
    """
    files = [directory] if directory.is_file() else directory.rglob("*.trace.json.gz")
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"`{directory}` has no *.trace.json.gz: expected a directory written by "
            "jax.profiler.trace."
        )
    try:
        with gzip.open(newest, "rt") as file:
            content = json.load(file)
        return list(_device_events(content["traceEvents"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{newest}` is not a profiler trace: {error!r}.") from error


def _device_events(events: Sequence[Mapping[str, Any]]) -> Iterable[Event]:
    processes: dict[Any, str] = {}
    threads: dict[tuple[Any, Any], str] = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    on_gpu = any("/device:GPU" in name for name in processes.values())
    for event in events:
        if event.get("ph") != "X":
            continue
        thread = threads.get((event["pid"], event["tid"]), "")
        arguments = event.get("args", {})
        if on_gpu:
            # Other rows of a device sum up what its streams ran.
            device = "/device:GPU" in processes.get(event["pid"], "")
            if not (device and thread.startswith("Stream")):
                continue
        elif "hlo_op" not in arguments:
            continue
        yield Event(
            name=event["name"],
            seconds=event.get("dur", 0) / 1e6,
            hlo_op=arguments.get("hlo_op", ""),
            module=arguments.get("hlo_module", ""),
        )


def attribute(
    events: Sequence[Event],
    kernels: Sequence[Kernel],
    sizes: Sizes,
    *,
    module: str = "",
    steps: int | None = None,
) -> Measured:
    """Sums events by the category of the kernel that each is.

    Args:
      events: from `read_trace`.
      kernels: of the program that was traced.
      sizes: of its step.
      module: name of the program; events that name another are left out.
      steps: that the trace has; default by how often each kernel is there.
    """
    of_program = [
        event
        for event in events
        if not (module and event.module and event.module.partition("(")[0] != module)
        and not (_CONTROL.match(event.hlo_op) and event.name == event.hlo_op)
    ]
    names = _Names.of(kernels, sizes)
    counts: collections.Counter[str] = collections.Counter()
    found: list[tuple[Event, Mapping[str, float]]] = []
    for event in of_program:
        instruction, shares = names.find(event)
        counts[instruction] += 1
        found.append((event, shares))
    if steps is None:
        expected = {k.instruction.name: k.times for k in kernels}
        ratios = [n / expected[i] for i, n in counts.items() if expected.get(i)]
        steps = max(round(statistics.median(ratios)), 1) if ratios else 1
    rows: dict[str, Row] = {}
    unknown: dict[str, float] = {}
    launches: collections.Counter[str] = collections.Counter()
    for event, shares in found:
        for category, share in shares.items():
            rows.setdefault(category, Row()).seconds += event.seconds * share / steps
            launches[category] += 1
        if UNKNOWN in shares:
            unknown[event.name] = unknown.get(event.name, 0) + event.seconds / steps
    for category, row in rows.items():
        row.launches = round(launches[category] / steps)
    return Measured(
        rows=dict(sorted(rows.items(), key=lambda item: -item[1].seconds)),
        steps=steps,
        unknown=dict(sorted(unknown.items(), key=lambda item: -item[1])),
    )


@dataclass(frozen=True)
class _Names:
    """What the names in a trace stand for: shares of categories."""

    instructions: Mapping[str, Mapping[str, float]]
    kernels: Mapping[str, Mapping[str, float]]
    """By kernel name, which several instructions of one form share."""

    @classmethod
    def of(cls, kernels: Sequence[Kernel], sizes: Sizes) -> _Names:
        instructions: dict[str, Mapping[str, float]] = {}
        weights: dict[str, dict[str, float]] = {}
        for kernel in kernels:
            category = categories.category(kernel, sizes)
            instructions[kernel.instruction.name] = {category: 1.0}
            # Where the trace cannot tell which of them ran, by what each has to move.
            weight = kernel.times * (kernel.bytes + kernel.flops / 100 + 1)
            for name in _kernel_names(kernel):
                of_name = weights.setdefault(name, {})
                of_name[category] = of_name.get(category, 0) + weight
        shares = {
            name: {category: w / sum(each.values()) for category, w in each.items()}
            for name, each in weights.items()
        }
        return cls(instructions, shares)

    def find(self, event: Event) -> tuple[str, Mapping[str, float]]:
        """Returns the instruction (or "") and the shares of categories."""
        for name in (event.hlo_op, event.name):
            if name in self.instructions:
                return name, self.instructions[name]
        if event.name in self.kernels:
            return "", self.kernels[event.name]
        for pattern, category in _LIBRARIES:
            if pattern.search(event.name):
                return "", {category: 1.0}
        return "", {UNKNOWN: 1.0}


def _kernel_names(kernel: Kernel) -> set[str]:
    """Returns the names under which XLA may have compiled a kernel."""
    instruction = kernel.instruction
    names = {instruction.name}
    # Fusions of one form are compiled once.
    shared = re.search(r'deduplicated_name="([^"]*)"', instruction.attributes)
    if shared:
        names.add(shared[1])
    names = {re.sub(r"[.\-]", "_", name) for name in names}
    if kernel.mosaic:
        names |= {kernel.mosaic, f"{kernel.mosaic}_kernel"}
    return names
