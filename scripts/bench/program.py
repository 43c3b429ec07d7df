"""Counts what a program does that XLA scheduled for a GPU: kernels, products, bytes.

The program is text (`jax.stages.Compiled.as_text`). What a loop runs counts as often
as it runs, which XLA's own cost analysis leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_jax.planning.hlo import Computation, Program, executed, parse
from qlora_jax.planning.work import product_flops


@dataclass(frozen=True)
class Work:
    """What a program does, loops counted as often as they run."""

    kernels: int = 0
    """Fusions, calls of libraries and of kernels, copies."""
    product_flops: int = 0
    """Of matrix products, by XLA and by cuBLAS; not within cuDNN's or our kernels."""
    bytes: int = 0
    """Of the operands and results of all kernels, each as a whole."""


def count_work(program: str) -> Work:
    """Counts the work of a scheduled program.

    Args:
      program: scheduled HLO as text.

    Raises:
      ValueError: a loop whose number of iterations the compiler does not know, or a
        branch, whose work depends on the data.
    """
    parsed = parse(program)
    for computation in parsed.computations.values():
        for instruction in computation.instructions.values():
            if instruction.operation == "conditional":
                raise ValueError(
                    f"{instruction.name} branches: its work depends on data."
                )
            if instruction.operation == "while" and instruction.trips is None:
                raise ValueError(f"how often {instruction.name} runs is not known.")
    kernels = flops = moved = 0
    for call in executed(parsed):
        kernels += call.times
        operands = call.computation.operands(call.instruction)
        moved += call.times * sum(int(i.bytes) for i in (call.instruction, *operands))
        flops += call.times * _flops(parsed, call.computation, call.instruction.name)
    return Work(kernels, flops, moved)


def _flops(program: Program, computation: Computation, name: str) -> int:
    """Returns the operations of an instruction's products, those it fuses included."""
    instruction = computation.instructions[name]
    if instruction.is_product:
        left = computation.operands(instruction)[0].result
        return product_flops(instruction, left)
    fused = program.computations.get(instruction.called("calls") or "")
    if fused is None:
        return 0
    return sum(_flops(program, fused, inner) for inner in fused.instructions)
