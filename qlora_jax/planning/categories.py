"""Sorts the kernels of a step into categories: what part of the model each serves.

    categories = {kernel: category(kernel, sizes) for kernel in kernels}

The part is read off the scopes in `op_name` (the loop that a kernel runs in, the module
that made it), the sizes of its product, and the name of a Mosaic kernel. A kernel that
none of the rules knows is in "other", which a report shows like the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from qlora_jax.planning.hlo import Array, Instruction
from qlora_jax.planning.work import Kernel, Sizes

# The scope of a layer, in a loop over them or unrolled.
_LAYERS = re.compile(r"/(layers|Block)/")

Phase = Literal["forward", "backward", "loss", "prefill", "token", "step"]

BASE, LORA, HEAD = "base products", "LoRA products", "head products"
ATTENTION, DEQUANTIZE, NF4 = "attention", "dequantization", "NF4 products"
NORM, ROPE, MLP = "RMSNorm", "RoPE", "MLP activation"
SUMS, LOSS, SAMPLING = "residual and gradient sums", "loss without products", "sampling"
STACKS, ZEROS = "reads and writes of layer stacks", "zeroing of layer stacks"
COPIES, SMALL = "copies, slices, transposes", "small: casts, scales, slices"
JOINED = "joining of layer and LoRA inputs"
OPTIMIZER, COLLECTIVES = "optimizer, embedding, step", "collectives"
EMBEDDING = "embedding, positions, mask"
HOST, OTHER = "transfers to and from the host", "other"

# Names of our Mosaic kernels that are not attention.
_MOSAIC = {
    "nf4_dequantize": DEQUANTIZE,
    "nf4_matmul": NF4,
    # Of a decoded token: with updates and sums; and the norm before with lora_A.
    "nf4_products": NF4,
    "nf4_inner": LORA,
    # With the products of A.
    "norm_forward": f"{NORM}, forward",
    "norm_backward": f"{NORM}, backward",
    # With the products of adapters around it.
    "gated_forward": f"{MLP}, forward",
    "gated_backward": f"{MLP}, backward",
}
# Halves of heads are put together again.
_ROPE = re.compile(r"self_attn/(\w+_proj\w*/)?(concatenate|jit)|rotate")
_SIDES = {"forward": ", forward", "backward": ", backward"}


def phase(kernel: Kernel) -> Phase:
    """Returns the part of the step that a kernel belongs to.

    The innermost loop that says so decides. Of unrolled layers the scopes of the kernel
    itself do; what has none belongs to the step as a whole (or to the prefill, of a
    program that generates).
    """
    return phase_of(kernel.op_name, kernel.loops)


def phase_of(name: str, loops: Sequence[Instruction]) -> Phase:
    """Returns `phase` of a kernel by its `op_name` and the loops around it."""
    for loop in reversed(loops):
        if part := _phase_of_loop(loop):
            return part
    if "_generate" in name:
        return "prefill"
    if "hidden_states" in name and _LAYERS.search(name):
        return "backward" if "transpose(jvp(" in name else "forward"
    return "step"


def _phase_of_loop(loop: Instruction) -> Phase | None:
    name = loop.op_name
    if "_generate)" in name:
        # The loop over tokens, which holds one over layers; that of the prefill does
        # not stand in it.
        return "token" if "_generate)/while" in name else "prefill"
    if "hidden_states" in name:
        return "backward" if "transpose(jvp(" in name else "forward"
    return "loss" if "jvp()/while" in name else None


def is_recomputed(kernel: Kernel) -> bool:
    """Whether the backward pass repeats what the forward pass computed."""
    before, marker, after = kernel.op_name.rpartition("rematted_computation")
    return bool(marker) and "transpose" not in after


def category(kernel: Kernel, sizes: Sizes) -> str:
    """Returns the category of a kernel.

    Args:
      kernel: a kernel.
      sizes: of the step that it is part of.
    """
    part = phase(kernel)
    if kernel.kind == "collective":
        return COLLECTIVES
    if kernel.host_bytes:
        return HOST
    if kernel.kind.startswith("attention") or _in_attention(kernel):
        return _attention(kernel, part)
    if kernel.kind == "mosaic":
        return _MOSAIC.get(kernel.mosaic, OTHER)
    if kernel.product is not None:
        return _product(kernel, part, sizes)
    if _dequantizes(kernel):
        return DEQUANTIZE
    if part == "loss":
        return LOSS
    if part == "step":
        return _of_step(kernel, sizes)
    if kernel.kind not in _MOVES_AND_MATH:
        return OTHER
    return _of_layers(kernel, part, sizes)


# Operations of XLA's own, which are known by where they are. A custom call is not.
_MOVES_AND_MATH = {
    *("fusion", "copy", "transpose", "reduce", "sort", "gather", "scatter", "iota"),
    *("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast"),
    *("rng-bit-generator", "convert", "add", "multiply", "select", "pad", "compare"),
}


def _in_attention(kernel: Kernel) -> bool:
    """Whether it is part of attention that XLA computes in blocks."""
    return bool(re.search(r"/attention/", kernel.op_name)) and kernel.kind != "mosaic"


def _attention(kernel: Kernel, part: Phase) -> str:
    if part not in _SIDES:
        return ATTENTION if part == "token" else f"{ATTENTION}, forward"
    if part == "forward":
        return f"{ATTENTION}, forward"
    repeated = kernel.kind == "attention forward" or is_recomputed(kernel)
    return f"{ATTENTION}, {'recomputed' if repeated else 'backward'}"


def _product(kernel: Kernel, part: Phase, sizes: Sizes) -> str:
    assert kernel.product is not None
    tokens = sizes.rows if part == "token" else sizes.tokens
    features = kernel.product.features(tokens)
    if sizes.vocabulary in features:
        return HEAD
    lora = any(_is_rank(n, sizes) for n in features)
    kind = LORA if lora else BASE
    if part not in _SIDES:
        return kind if part in ("token", "prefill") else OTHER
    if part == "forward":
        return f"{kind}, forward"
    if is_recomputed(kernel):
        return f"{kind}, recomputed"
    return f"{kind}, {'backward' if lora else 'input gradient'}"


def _is_rank(size: int, sizes: Sizes) -> bool:
    """Whether a size is a rank, or that of up to four adapters side by side."""
    if size in sizes.widths or size <= 0:
        return False
    return any(not size % rank and size <= 4 * rank for rank in sizes.ranks)


def _dequantizes(kernel: Kernel) -> bool:
    """Whether it looks codes up in a table of 16."""
    if kernel.fused is None:
        return False
    return any(
        instruction.operation == "gather"
        and kernel.fused.operands(instruction)[0].result.sizes == (16,)
        for instruction in kernel.fused.instructions.values()
    )


def _largest(kernel: Kernel) -> int:
    return max((array.count for array in kernel.outputs), default=0)


def _touches_stack(kernel: Kernel, sizes: Sizes) -> bool:
    """Whether it writes one layer's part of a stack of all layers, or only reads it."""
    inner = kernel.fused.instructions.values() if kernel.fused else ()
    operations = {kernel.kind, *(i.operation for i in inner)}
    if "dynamic-update-slice" in operations:
        return any(_is_stack(array, sizes) for array in kernel.outputs)
    if "dynamic-slice" not in operations or not _only_moves(kernel):
        return False
    parameters = [i.result for i in inner if i.operation == "parameter"]
    layer = sizes.tokens * min(sizes.ranks, default=1)
    stacks = any(_is_stack(array, sizes) for array in parameters)
    return stacks and _largest(kernel) >= layer


def _is_stack(array: Array, sizes: Sizes) -> bool:
    """Whether an array holds activations or adapters of all layers."""
    return array.sizes[:1] == (sizes.layers,) and array.count > 1_000_000


def _of_step(kernel: Kernel, sizes: Sizes) -> str:
    activations = sizes.layers * sizes.tokens * min(sizes.ranks, default=1)
    stack = any(
        array.sizes[:1] == (sizes.layers,) and array.count >= activations
        for array in kernel.instruction.results
    )
    inputs = len(kernel.instruction.operands)
    return ZEROS if stack and not inputs else OPTIMIZER


def _of_layers(kernel: Kernel, part: Phase, sizes: Sizes) -> str:
    name, largest = kernel.op_name, _largest(kernel)
    side = _SIDES.get(part, "")
    if part == "token":
        return _of_token(kernel, sizes)
    if _touches_stack(kernel, sizes):
        return STACKS
    # Less than an eighth of the residual stream is none of its arrays.
    small = largest <= sizes.tokens * sizes.hidden // 8
    if _only_moves(kernel):
        return SMALL if small else COPIES
    if small:
        return SMALL
    return _by_scope(name, kernel, sizes) + side


def _by_scope(name: str, kernel: Kernel, sizes: Sizes) -> str:
    if re.search(r"norm\w*/", name):
        return NORM
    last = [array.sizes[-1] for array in kernel.outputs if array.sizes]
    # A layer's input next to its product with lora_A: x and z of W [x; z].
    if any(_is_rank(n - width, sizes) for n in last for width in sizes.widths):
        return JOINED
    if _ROPE.search(name):
        return ROPE
    # Gate and up may be side by side, or a column of one next to that of the other.
    inner = [n for array in kernel.outputs for n in array.sizes[-2:]]
    if any(n % sizes.intermediate == 0 for n in inner):
        return MLP
    return SUMS if re.search(r"(add|add_any|mul|sub)$", name) else OTHER


def _of_token(kernel: Kernel, sizes: Sizes) -> str:
    name = kernel.op_name
    if re.search(r"norm\w*/", name):
        return NORM
    if _ROPE.search(name):
        return ROPE
    if "/layers/" in name:
        # One row times a matrix is no product to XLA: the adapters' are fusions.
        inner = kernel.fused.instructions.values() if kernel.fused else ()
        adapter = any(_is_rank(n, sizes) for i in inner for n in i.result.sizes)
        return LORA if adapter and "proj" in name else SMALL
    if "head/" in name:
        return HEAD
    return EMBEDDING if "/model/" in name else SAMPLING


_MOVES = {
    *("parameter", "bitcast", "transpose", "copy", "reshape", "dynamic-slice", "slice"),
    *("constant", "tuple", "convert", "dynamic-update-slice", "concatenate"),
    "broadcast",
}
# Of scalars: the index of a slice.
_INDEX = ("compare", "add", "select", "subtract")


def _only_moves(kernel: Kernel) -> bool:
    """Whether nothing is computed but indices."""
    if kernel.fused is None:
        return kernel.kind in ("copy", "transpose", "slice", "dynamic-slice")
    return all(
        i.operation in _MOVES or (i.operation in _INDEX and i.count == 1)
        for i in kernel.fused.instructions.values()
    )
