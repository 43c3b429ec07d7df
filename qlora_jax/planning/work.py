"""The work of every kernel of a scheduled program: bytes moved and operations.

    kernels = count_kernels(hlo.parse(text), Sizes.of(step))

A kernel is a fusion, a call of cuBLAS or cuDNN, a Mosaic kernel or a copy. Its bytes
are those that it has to read and write once: of a slice, an in-place update or a gather
what it touches, found by following the demand for its results back through the fusion.
Its operations are those of its matrix products.

Assumed where the program does not tell:

- Attention by cuDNN or by our kernels sees the causal half of its row, or what the
  window leaves of it; documents of packed rows see less, so this is an upper bound.
  XLA's blockwise attention is in the program, and counts as it computes: whole blocks.
- A Mosaic kernel reads its operands whole, and of an operand that stacks all layers the
  part of one layer.
- cuDNN's backward pass sums dQ in float32, written and read once.
- Of a conditional, the branch that moves most bytes runs.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.planning.hlo import (
    COLLECTIVES,
    HOST_MEMORY,
    Array,
    Call,
    Computation,
    Instruction,
    Program,
    executed,
)

if TYPE_CHECKING:  # imports jax
    from qlora_jax.planning.step import Step

_FLOATS = ("bf16", "f16", "f32")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a step on one device, by which its kernels are told apart."""

    layers: int
    rows: int
    """Of a micro-batch on a device."""
    length: int
    """Tokens of a row that a device computes at a time."""
    hidden: int
    intermediate: int
    vocabulary: int
    widths: frozenset[int]
    """Input and output features of the base's linear modules."""
    ranks: frozenset[int]
    """Ranks of the adapters."""
    keys: float
    """That a query sees on average, over all layers."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a device."""
        return self.rows * self.length

    @classmethod
    def of(cls, step: Step, mesh: Mapping[str, int] | None = None) -> Sizes:
        """Returns the sizes of a training step.

        Args:
          step: the step, of all devices together.
          mesh: sizes of its axes; default one device.
        """
        sharers = (mesh or {}).get("context", 1)
        devices = math.prod((mesh or {}).values())
        rows = step.train.batch_size * sharers // devices
        lora = step.compute.lora
        sizes = cls.of_model(step.config, lora, rows=rows, length=step.length)
        # A device has the keys of whole rows, and its part of their queries.
        return dataclasses.replace(sizes, length=step.length // sharers)

    @classmethod
    def of_model(cls, config: Any, lora: Any, *, rows: int, length: int) -> Sizes:
        """Returns the sizes of a model at work on rows of `length` tokens.

        Args:
          config: a `LlamaConfig`.
          lora: a `LoraConfig`, or None.
          rows: on a device.
          length: tokens of a row.
        """
        heads = config.num_attention_heads * config.head_dim
        pairs = config.num_key_value_heads * config.head_dim
        kinds = [mean_keys(length, kind.window) for kind in config.layer_kinds]
        ranks = {lora.r, *lora.rank_pattern.values()} if lora else set()
        return cls(
            layers=config.num_hidden_layers,
            rows=rows,
            length=length,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            widths=frozenset(
                (config.hidden_size, config.intermediate_size, heads, pairs)
            ),
            ranks=frozenset(ranks),
            keys=sum(kinds) / len(kinds),
        )


def mean_keys(length: int, window: int | None) -> float:
    """Returns how many keys a token of a row sees on average.

    Args:
      length: tokens of the row.
      window: keys that a token sees at most; None = all before it.
    """
    if not window or window >= length:
        return length / 2
    # The first tokens see fewer than the window: w - w^2 / 2 T.
    return window - window * window / (2 * length)


@dataclass(frozen=True)
class Product:
    """The shapes of a matrix product."""

    left: Array
    right: Array
    result: Array

    terms: int
    """Of each sum."""

    def features(self, tokens: int) -> list[int]:
        """Returns rows, columns and terms without the one that counts tokens.

        Args:
          tokens: at work at a time.
        """
        terms = max(self.terms, 1)
        sizes = [self.left.count // terms, self.right.count // terms, self.terms]
        if tokens in sizes:
            sizes.remove(tokens)
        return sizes

    def __str__(self) -> str:
        return f"{self.left} x {self.right} -> {self.result}"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Something that a program launches, and its work of one launch."""

    instruction: Instruction
    fused: Computation | None
    """What it fuses."""
    loops: tuple[Instruction, ...]
    """The loops around it, the outermost first."""
    times: int
    """Launches in one run of the program."""
    kind: str
    """"product", "attention forward", "attention backward", "mosaic", "fusion",
    "collective", or the operation."""
    bytes: float
    """Moved to and from device memory."""
    flops: float = 0
    """Of matrix products."""
    host_bytes: float = 0
    """Moved to and from host memory."""
    product: Product | None = None
    mosaic: str = ""
    """Name of a Mosaic kernel."""
    high_precision: bool = False
    """Products of float32 without TF32."""
    graph: int | None = None
    """Index of the command buffer that launches it; None if it is launched alone."""

    @property
    def op_name(self) -> str:
        """The path of scopes that made it, or what it fuses."""
        if self.instruction.op_name or self.fused is None:
            return self.instruction.op_name
        inner = [i for i in self.fused.instructions.values() if i.op_name]
        products = [i for i in inner if i.is_product]
        return (products or inner[-1:] or [self.instruction])[0].op_name

    @property
    def outputs(self) -> tuple[Array, ...]:
        """Its results; the type of an asynchronous start has its operands as well."""
        start = self.instruction.operation.endswith("-start")
        if not start or self.fused is None or self.fused.root is None:
            return self.instruction.results
        return self.fused.root.results

    @property
    def shape(self) -> str:
        """Its product, or its results."""
        if self.product is not None:
            return str(self.product)
        return " ".join(map(str, self.outputs))


def count_kernels(
    program: Program, sizes: Sizes, *, unknown_trips: int = 1
) -> list[Kernel]:
    """Counts the kernels of one run of a program.

    Args:
      program: the program.
      sizes: of the step that it computes.
      unknown_trips: how often a loop runs whose number of iterations the compiler does
        not know.
    """
    # By computation and name; of a conditional every branch is weighed.
    work: dict[tuple[str, str], dict[str, Any]] = {}

    def work_of(call: Call) -> dict[str, Any]:
        key = call.computation.name, call.instruction.name
        if key not in work:
            work[key] = _work(program, call, sizes)
        return work[key]

    calls = executed(
        program, weight=lambda call: work_of(call)["bytes"], unknown_trips=unknown_trips
    )
    return [
        Kernel(
            instruction=call.instruction,
            fused=_fused(program, call.instruction),
            loops=call.loops,
            times=call.times,
            graph=program.in_graph.get(call.instruction.name),
            **work_of(call),
        )
        for call in calls
    ]


def _fused(program: Program, instruction: Instruction) -> Computation | None:
    """Returns the computation of a fusion, asynchronous ones included."""
    name = instruction.called("calls")
    return program.computations.get(name) if name else None


def _work(program: Program, call: Call, sizes: Sizes) -> dict[str, Any]:
    fused = _fused(program, call.instruction)
    if fused is not None:
        return _fusion(program, fused, sizes)
    operands = call.computation.operands(call.instruction)
    return _single(call.instruction, [o.results for o in operands], sizes)


# --- One instruction ---


def _single(
    instruction: Instruction, operands: list[tuple[Array, ...]], sizes: Sizes
) -> dict[str, Any]:
    operation = instruction.operation
    if instruction.is_product:
        return _product(instruction, operands)
    if "fmha" in instruction.target:
        return _cudnn_attention(instruction, operands)
    if instruction.target.startswith("mosaic"):
        return _mosaic(instruction, operands, sizes)
    inputs = [array for arrays in operands for array in arrays]
    kind = operation.removesuffix("-start")
    if kind == "copy":
        # Of an asynchronous copy the results are its target, its source and a context.
        arrays = [instruction.result, *inputs[:1]]
    elif kind == "dynamic-update-slice":
        arrays = [operands[1][0], operands[1][0]]
    elif kind in ("dynamic-slice", "slice"):
        arrays = [instruction.result] * 2
    else:
        arrays = [*inputs, *instruction.results]
    if kind in COLLECTIVES:
        kind = "collective"
    return {"kind": instruction.target or kind, **_moved(arrays)}


def _moved(arrays: list[Array]) -> dict[str, float]:
    """Returns bytes of device and host memory."""
    on_host = sum(a.bytes for a in arrays if a.space == HOST_MEMORY)
    return {"bytes": sum(a.bytes for a in arrays) - on_host, "host_bytes": on_host}


def _product(
    instruction: Instruction, operands: list[tuple[Array, ...]]
) -> dict[str, Any]:
    left, right, result = operands[0][0], operands[1][0], instruction.result
    moved = [left, right, result]
    beta = re.search(r'"beta":\s*(-?[\d.]+)', instruction.attributes)
    if beta and float(beta[1]):
        # The result is added to what is there.
        moved.append(result)
    if "$f8" in instruction.target:  # scales
        moved += [array for arrays in operands[2:] for array in arrays]
    flops = product_flops(instruction, left)
    return {
        "kind": "product",
        "flops": flops,
        "product": Product(left, right, result, flops // max(2 * result.count, 1)),
        "high_precision": '"HIGHEST"' in instruction.attributes
        or "operand_precision={highest" in instruction.attributes,
        **_moved(moved),
    }


_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]([^\]}]*)')


def product_flops(instruction: Instruction, left: Array) -> int:
    """Returns 2 x size of the result x terms of each sum, for any dtype."""
    match = _CONTRACTED.search(instruction.attributes)
    dims = re.findall(r"\d+", match[1]) if match else []
    terms = math.prod(left.sizes[int(d)] for d in dims)
    return 2 * instruction.result.count * terms


def _cudnn_attention(
    instruction: Instruction, operands: list[tuple[Array, ...]]
) -> dict[str, Any]:
    config, query = instruction.attributes, operands[0][0]
    scores = re.search(r'"dimensions":\s*\[([^\]]*)\]', config)
    # [rows, heads, queries, keys]
    keys = float(re.findall(r"\d+", scores[1])[-1]) if scores else 0.0
    window = re.search(r'"sliding_window_length":\s*"?(\d+)', config)
    if re.search(r'"mask_type":\s*"[A-Z_]*CAUSAL', config):
        keys = mean_keys(int(keys), int(window[1]) if window else None)
    moved = [a for arrays in (*operands, instruction.results) for a in arrays]
    moved = [array for array in moved if array.dtype in _FLOATS]
    backward = "Backward" in instruction.target
    if backward:
        dq = Array("f32", query.sizes)
        moved += [dq, dq]
    return {
        "kind": "attention backward" if backward else "attention forward",
        # 2 products forward: scores and values; 5 backward.
        "flops": (10.0 if backward else 4.0) * query.count * keys,
        **_moved(moved),
    }


# Name of a kernel of `pallas_kernels.attention` -> operations of its products per
# element of q and key seen, and its kind.
_ATTENTION = {
    "attention_forward": (4, "attention forward"),
    # The scores again, and dP and dQ; or dP, dV and dK.
    "attention_backward_queries": (6, "attention backward"),
    "attention_backward_keys": (8, "attention backward"),
}
_NF4_PRODUCTS = ("nf4_matmul", "nf4_products")
_MOSAIC_NAME = re.compile(r"(\w+)/(?:mpmd_map|pallas_call|core_map)$")


def _mosaic(
    instruction: Instruction, operands: list[tuple[Array, ...]], sizes: Sizes
) -> dict[str, Any]:
    inputs = [array for arrays in operands for array in arrays]
    moved = [*(_of_one_layer(a, sizes) for a in inputs), *instruction.results]
    match = _MOSAIC_NAME.search(instruction.op_name)
    name = match[1] if match else ""
    kind, flops = "mosaic", 0.0
    if name in _ATTENTION:
        each, kind = _ATTENTION[name]
        flops = each * inputs[0].count * sizes.keys
    elif name in _NF4_PRODUCTS:
        # Operands: x [rows, ...], and codes of one weight or of several.
        packed = [array.count for array in moved if array.dtype == "u8"]
        # Scales of 8 bits have a number for 32 bytes of codes.
        codes = sum(n for n in packed if 32 * n not in packed)
        flops = 2.0 * inputs[0].sizes[0] * 2 * codes  # two weights a byte
    elif name in ("norm_forward", "norm_backward"):
        # Of rows with A, which is the third operand: [ranks, features] or transposed.
        flops = 2.0 * inputs[0].sizes[0] * inputs[2].count
    elif name == "gated_forward":
        # Of the activation with A, which is the second operand.
        flops = 2.0 * inputs[0].sizes[0] * inputs[1].count
    elif name == "gated_backward":
        # Of the third operand, [ranks, tokens], with gradients or the activation.
        flops = 2.0 * inputs[2].count * inputs[1].sizes[1]
    return {"kind": kind, "flops": flops, "mosaic": name, **_moved(moved)}


def _of_one_layer(array: Array, sizes: Sizes) -> Array:
    stacked = len(array.sizes) > 1 and array.sizes[0] == sizes.layers
    return Array(array.dtype, array.sizes[1:]) if stacked else array


# --- Fusions ---

# What a result passes through on its way out unchanged.
_PASSING = ("bitcast", "copy", "reshape")
_SLICES = ("dynamic-slice", "slice")
_PROPORTIONAL = ("reduce", "reduce-window", "scatter", "sort", "pad", "concatenate")


def _fusion(program: Program, fused: Computation, sizes: Sizes) -> dict[str, Any]:
    """Returns the work of a fusion; of one around a single kernel, that kernel's."""
    reads, written = _traffic(fused)
    moved = _moved([*reads, *written])
    for instruction in fused.instructions.values():
        operands = [o.results for o in fused.operands(instruction)]
        if instruction.is_product or instruction.target.startswith("mosaic"):
            # The bytes are those outside the fusion: of a stack one layer's slice.
            return _single(instruction, operands, sizes) | moved
        if instruction.operation == "fusion":
            inner = program.computations.get(instruction.called("calls") or "")
            work = _fusion(program, inner, sizes) if inner else {}
            if work.get("flops"):
                return work | moved
    return {"kind": "fusion", **moved}


def _traffic(fused: Computation) -> tuple[list[Array], list[Array]]:
    """Returns what a fusion reads of its parameters and writes, as flat arrays."""
    demand: dict[str, float] = collections.defaultdict(float)
    written: list[Array] = []
    in_place: set[str] = set()
    for result in _results(fused):
        update = _update_in_place(fused, result)
        if update is None:
            written += _outputs(fused, result)
            demand[result.name] = max(demand[result.name], result.count)
            continue
        # Only the new part is written, in the dtype of the result.
        size, inner = update
        array = result.result
        written.append(Array(array.dtype, (size,), array.space))
        in_place.add(inner)
        demand[inner] = size
    for instruction in reversed(list(fused.instructions.values())):
        wanted = min(demand[instruction.name], instruction.count or 1)
        if wanted:
            operands = fused.operands(instruction)
            shares = _demanded(instruction, operands, wanted, in_place)
            for operand, share in zip(operands, shares, strict=True):
                demand[operand.name] += share
    reads = [
        Array(array.dtype, (math.ceil(share * array.count),), array.space)
        for instruction in fused.instructions.values()
        if instruction.operation == "parameter"
        for share in [min(demand[instruction.name] / max(instruction.count, 1), 1.0)]
        for array in instruction.results
    ]
    return reads, written


def _results(fused: Computation) -> Iterator[Instruction]:
    root = fused.root
    if root is None:
        return
    if root.operation == "tuple":
        yield from fused.operands(root)
    else:
        yield root


def _outputs(fused: Computation, result: Instruction) -> tuple[Array, ...]:
    """Returns the arrays of a result without the workspace of a library's call."""
    source = result
    while source.operation in (*_PASSING, "get-tuple-element"):
        operands = fused.operands(source)
        if not operands:
            break
        source = operands[0]
    if source.target.startswith("__"):
        return tuple(a for a in result.results if a.dtype not in ("s8", "u8"))
    return result.results


def _update_in_place(fused: Computation, result: Instruction) -> tuple[int, str] | None:
    """Returns elements and name of the update that a result is; None if it is none."""
    inner = result
    while inner.operation in _PASSING:
        operands = fused.operands(inner)
        if not operands:
            return None
        inner = operands[0]
    if inner.operation != "dynamic-update-slice":
        return None
    return fused.operands(inner)[1].count, inner.name


def _demanded(
    instruction: Instruction,
    operands: list[Instruction],
    wanted: float,
    in_place: set[str],
) -> list[float]:
    """Returns how many elements of each operand `wanted` elements of a result take."""
    operation = instruction.operation
    if operation in ("parameter", "tuple", "constant", "iota") or not operands:
        return [0.0] * len(operands)
    share = wanted / max(instruction.count, 1)
    counts = [float(o.count) for o in operands]
    if operation == "dynamic-update-slice":
        whole = 0.0 if instruction.name in in_place else wanted
        return [whole, counts[1], *(1.0 for _ in counts[2:])]
    if operation in _SLICES:
        return [wanted, *(1.0 for _ in counts[1:])]
    if operation == "gather":
        # Of the table what is looked up, at most all of it.
        return [min(wanted, counts[0]), *(n * share for n in counts[1:])]
    if instruction.is_product or operation in ("fusion", "call", "custom-call"):
        return counts
    if operation in _PROPORTIONAL:
        return [n * min(share, 1.0) for n in counts]
    # Elementwise, broadcasts and moves.
    return [wanted if n == instruction.count else min(n, wanted) for n in counts]
