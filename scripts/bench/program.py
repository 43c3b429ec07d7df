"""Counts what a program does that XLA scheduled for a GPU: kernels, products, bytes.

The program is text (`jax.stages.Compiled.as_text`). What a loop runs counts as often
as it runs, which XLA's own cost analysis leaves out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# `[ROOT] %name = TYPE operation(OPERANDS), ATTRIBUTES`; a tuple type may hold comments.
_INSTRUCTION = re.compile(
    r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, (.*))?$"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d",]*)[\]}]')
# Names for results, and control flow: nothing is launched for them.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("call", "after-all", "opt-barrier", "async-done", "copy-done"),
}


@dataclass
class Work:
    """What a program does, loops counted as often as they run."""

    kernels: int = 0
    """Fusions, calls of libraries and of kernels, copies."""
    product_flops: int = 0
    """Of matrix products, by XLA and by cuBLAS; not within cuDNN's or our kernels."""
    bytes: int = 0
    """Of the operands and results of all kernels, each as a whole."""

    def add(self, other: Work, times: int = 1) -> None:
        """Adds what another part does, as often as it runs."""
        self.kernels += times * other.kernels
        self.product_flops += times * other.product_flops
        self.bytes += times * other.bytes


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: list[str]
    attributes: str


@dataclass
class _Program:
    entry: str = ""
    computations: dict[str, list[_Instruction]] = field(default_factory=dict)


def count_work(program: str) -> Work:
    """Counts the work of a scheduled program.

    Args:
      program: scheduled HLO as text.

    Raises:
      ValueError: a loop whose number of iterations the compiler does not know, or a
        branch, whose work depends on the data.
    """
    parsed = _parse(program)
    return _of_computation(parsed, parsed.entry, launches=True)


def _parse(program: str) -> _Program:
    parsed, name = _Program(), ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            parsed.computations[name] = []
            if match[1]:
                parsed.entry = name
        elif line.startswith("}"):
            name = ""
        elif name and (match := _INSTRUCTION.match(line.strip())):
            operands = re.findall(r"%([\w.\-]+)", match[4])
            parsed.computations[name].append(
                _Instruction(match[1], match[2], match[3], operands, match[5] or "")
            )
    return parsed


def _of_computation(program: _Program, name: str, *, launches: bool) -> Work:
    """Counts a computation; within a fusion (not `launches`) only its products."""
    total = Work()
    types: dict[str, str] = {}
    for instruction in program.computations[name]:
        types[instruction.name] = instruction.type
        operation, attributes = instruction.operation, instruction.attributes
        if operation == "conditional":
            raise ValueError(f"{instruction.name} branches: its work depends on data.")
        if operation == "while":
            trips = _TRIPS.search(attributes)
            if trips is None:
                raise ValueError(f"how often {instruction.name} runs is not known.")
            body = _of_computation(program, _called(attributes, "body"), launches=True)
            total.add(body, int(trips[1]))
            continue
        total.product_flops += _product_flops(instruction, types)
        if operation in ("fusion", "call", "async-start"):
            inside = operation != "fusion"
            called = _called(attributes, "to_apply" if operation == "call" else "calls")
            total.add(_of_computation(program, called, launches=inside and launches))
        if launches and operation not in _FREE:
            total.kernels += 1
            arrays = [instruction.type, *(types[o] for o in instruction.operands)]
            total.bytes += sum(map(_type_bytes, arrays))
    return total


def _called(attributes: str, kind: str) -> str:
    match = re.search(rf"\b{kind}=%?([\w.\-]+)", attributes)
    assert match is not None
    return match[1]


def _product_flops(instruction: _Instruction, types: dict[str, str]) -> int:
    """Returns 2 x size of the result x terms of each sum; 0 if it is no product."""
    is_product = instruction.operation == "dot" or (
        instruction.operation == "custom-call"
        and 'custom_call_target="__cublas' in instruction.attributes
    )
    if not is_product:
        return 0
    contracted = _CONTRACTED.search(instruction.attributes)
    assert contracted is not None
    left = _sizes(types[instruction.operands[0]])
    terms = math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1]))
    return 2 * math.prod(_sizes(instruction.type)) * terms


def _sizes(type_: str) -> list[int]:
    """Returns the dimensions of a type; of a tuple, those of its first array."""
    match = _ARRAY.search(type_)
    assert match is not None
    return [int(size) for size in match[3].split(",") if size]


def _type_bytes(type_: str) -> int:
    total = 0
    for kind, bits, sizes in _ARRAY.findall(type_):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += count * (8 if kind == "pred" else int(bits or 0)) // 8
    return total
