"""Reads programs that XLA has scheduled: computations, instructions and loops.

    program = parse(compiled.as_text())
    for call in executed(program):
        call.instruction, call.times, call.loops

The text is that of `jax.stages.Compiled.as_text`. A line is an instruction,

    [ROOT] %name = TYPE operation(%operand, ...), attribute=..., metadata={op_name=...}

and a fusion, a loop or a branch names the computations that it runs. The compiler's
command buffers (CUDA graphs) are not in that text; `graph_comment` writes them behind
it, as `parse` reads them, from what the compiler dumps of its schedule.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

HOST_MEMORY = 5
"""Number of the memory space of pinned host memory."""
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
# Names for results and control flow: nothing is launched for them.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "domain", "add-dependency"),
}
_GRAPH_COMMENT = "// command buffer:"

_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A type is an array or a tuple, which may hold comments and parentheses.
_INSTRUCTION = re.compile(
    r"\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, (.*))?$"
)
_ARRAY = re.compile(r"\b(token|opaque|pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """An array in memory."""

    dtype: str
    """By XLA's name, such as "bf16"."""
    sizes: tuple[int, ...]
    space: int = 0
    """Memory space; `HOST_MEMORY` is the host's."""

    @functools.cached_property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @functools.cached_property
    def bits(self) -> int:
        """Of an element."""
        if self.dtype == "pred":
            return 8
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 0

    @property
    def bytes(self) -> float:
        """Of all elements."""
        return self.count * self.bits / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


def arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type; those of a tuple in order."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout) if layout else None
        counts = tuple(int(n) for n in sizes.split(",") if n)
        found.append(Array(dtype, counts, int(space[1]) if space else 0))
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    is_root: bool = False
    number: int | None = None
    """Of a parameter."""

    @functools.cached_property
    def results(self) -> tuple[Array, ...]:
        """The arrays of its type."""
        return arrays(self.type)

    @property
    def result(self) -> Array:
        """The first array of its type; a token has none, which is an empty array."""
        return self.results[0] if self.results else Array("token", (0,))

    @property
    def count(self) -> int:
        """Number of elements of all results."""
        return sum(array.count for array in self.results)

    @property
    def bytes(self) -> float:
        """Bytes of all results."""
        return sum(array.bytes for array in self.results)

    @functools.cached_property
    def op_name(self) -> str:
        """The path of Python scopes that made it; empty if the compiler did."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def target(self) -> str:
        """The library function or kernel of a custom call; else empty."""
        if not self.operation.startswith("custom-call"):
            return ""
        match = _TARGET.search(self.attributes)
        return match[1] if match else ""

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, by XLA or by cuBLAS."""
        return self.operation == "dot" or self.target.startswith("__cublas")

    @property
    def launches(self) -> bool:
        """Whether something runs on the device for it."""
        return self.operation not in _FREE and not self.operation.endswith("-done")

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute such as "body" names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def branches(self) -> list[str]:
        """Names of the computations of a conditional."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return [name.strip().lstrip("%") for name in match[1].split(",")]
        either = map(self.called, ("true_computation", "false_computation"))
        return [name for name in either if name]

    @property
    def trips(self) -> int | None:
        """How often a loop runs; None where the compiler does not know."""
        match = _TRIPS.search(self.attributes)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Computation:
    """A list of instructions in the order of the schedule."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction | None:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions.values() if i.is_root), None)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results one of this computation takes."""
        names = (self.instructions.get(name) for name in instruction.operands)
        return [operand for operand in names if operand is not None]


@dataclass(frozen=True)
class Program:
    """A scheduled program."""

    entry: str
    computations: Mapping[str, Computation]
    graphs: tuple[tuple[str, ...], ...] = ()
    """Names of the instructions of each command buffer."""
    module: str = ""
    """Its name."""

    @functools.cached_property
    def in_graph(self) -> Mapping[str, int]:
        """Instruction -> index of its command buffer."""
        return {name: i for i, graph in enumerate(self.graphs) for name in graph}


def parse(text: str) -> Program:
    """Reads the text of a scheduled program.

    Lines that are no instruction (comments, attributes of the module) are skipped; a
    text without an entry computation gives an empty program.
    """
    computations: dict[str, Computation] = {}
    graphs: list[tuple[str, ...]] = []
    entry = name = module = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not name and (match := _COMPUTATION.match(line)):
            name, instructions = match[2], {}
            entry = name if match[1] else entry
        elif line.startswith("}"):
            if name:
                computations[name] = Computation(name, instructions)
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            instructions[match[2]] = _instruction(match)
        elif line.startswith(_GRAPH_COMMENT):
            graphs.append(tuple(line.removeprefix(_GRAPH_COMMENT).split()))
        elif match := _MODULE.match(line):
            module = match[1]
    return Program(entry, computations, tuple(graphs), module)


def _instruction(match: re.Match[str]) -> Instruction:
    root, name, type_, operation, inside, attributes = match.groups()
    values = operation in ("constant", "parameter", "iota")
    return Instruction(
        name=name,
        type=type_,
        operation=operation,
        operands=() if values else tuple(_OPERAND.findall(inside)),
        attributes=attributes or "",
        is_root=bool(root),
        number=int(inside) if operation == "parameter" else None,
    )


# --- What runs how often ---


@dataclass(frozen=True)
class Call:
    """An instruction that launches something, and how often it runs."""

    instruction: Instruction
    computation: Computation
    times: int
    loops: tuple[Instruction, ...]
    """The loops around it, the outermost first."""


def executed(
    program: Program,
    *,
    weight: Callable[[Call], float] | None = None,
    unknown_trips: int = 1,
) -> list[Call]:
    """Returns what one run of the program launches, in the order of the schedule.

    Loops count as often as they run, fusions are one launch, and asynchronous pairs
    count at their start.

    Args:
      program: the program.
      weight: of a conditional, the branch of the largest weight in sum runs; default
        all of them.
      unknown_trips: how often a loop runs whose number of iterations the compiler does
        not know.
    """

    def walk(name: str, times: int, loops: tuple[Instruction, ...]) -> Iterator[Call]:
        computation = program.computations.get(name)
        if computation is None:
            return
        for instruction in computation.instructions.values():
            operation = instruction.operation
            if operation == "while":
                trips = instruction.trips
                trips = unknown_trips if trips is None else trips
                body = instruction.called("body")
                if body:
                    yield from walk(body, times * trips, (*loops, instruction))
            elif operation == "conditional":
                branches = [list(walk(b, times, loops)) for b in instruction.branches]
                if weight is not None and branches:
                    sums = [
                        sum(c.times * weight(c) for c in calls) for calls in branches
                    ]
                    branches = [branches[sums.index(max(sums))]]
                for calls in branches:
                    yield from calls
            elif operation in ("call", "async-start"):
                callee = instruction.called("to_apply") or instruction.called("calls")
                if callee:
                    yield from walk(callee, times, loops)
            elif instruction.launches:
                yield Call(instruction, computation, times, loops)

    return list(walk(program.entry, 1, ()))


def result_bytes(collective: Instruction) -> int:
    """Returns the bytes of the results of a collective on a device."""
    sizes = [int(array.bytes) for array in collective.results]
    if collective.operation.endswith("-start") and len(sizes) > 1:
        # Operands first, results after them.
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


# --- Command buffers ---

_THUNK = re.compile(r"^\s*(\d+): (k\w+)")
_METADATA = re.compile(r'profile_annotation: "([^"]*)"\s*(?:thunk_id: (\d+))?')


def graph_comment(sequence: str, metadata: str) -> str:
    """Returns the lines by which a program's text tells its command buffers.

    The compiler records consecutive launches in command buffers (CUDA graphs) after it
    has scheduled the program, and only where it knows the version of the driver.

    Args:
      sequence: its dump `*.thunk_sequence_after_thunk_passes.txt`: a launch a line,
        indented under its command buffer.
      metadata: its dump `*.thunk_metadata.txt`: launch -> name of the instruction.
    """
    names = {
        int(number): name for name, number in _METADATA.findall(metadata) if number
    }
    graphs: list[list[str]] = []
    depth: int | None = None  # of the command buffer that is open
    for line in sequence.splitlines():
        if not (match := _THUNK.match(line)):
            continue
        indent = len(line) - len(line.lstrip())
        if depth is not None and indent <= depth:
            depth = None
        if depth is None and match[2] == "kCommandBuffer":
            depth = indent
            graphs.append([])
        elif depth is not None and (name := names.get(int(match[1]))):
            graphs[-1].append(name)
    lines = [f"{_GRAPH_COMMENT} {' '.join(names)}" for names in graphs if names]
    return "".join(f"\n{line}" for line in lines)
