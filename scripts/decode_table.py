"""Counts the kernels and the bytes of one decoded token, in a compiled program.

    python scripts/decode_table.py [--size 8b] [--rows 1 16] [--kernels xla pallas]

Compiles generation with adapters of rank 16 on all linear layers for a GPU, which need
not be there (`make compile` installs the compiler), and prints a table in Markdown:
kernels a layer, kernels a token, gigabytes that they must read and write, and the time
of both at the GPU's peak bandwidth (90 % of its data sheet) and 3 microseconds a
kernel. Counted, not measured.

An array counts once for each kernel that reads or writes it: of a stack of layers one
layer, of an array that is updated in place or looked up only what is touched, of the
cache all slots, in use or not.
"""

import argparse
import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import _generate, _Program
from qlora_jax.inference.sampling import Values
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import abstract_base
from qlora_jax.planning.compile import ENVIRONMENT, XLA_FLAGS
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import gpu_mesh

LAUNCH = 3e-6
"""Seconds from one small kernel to the next."""
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u8": 1, "pred": 1}
TOKEN = "jit(_generate)/while"
LAYER = "jit(_generate)/while/body/Llama.decode/model/while"
LAYERS = "Llama.decode/model/layers/"
# What hands arrays on, or is part of another kernel.
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "constant")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)")
_ARRAY = re.compile(r"\b(f32|bf16|f16|s32|u32|u8|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


def compiled(config: LlamaConfig, kernels: Any, rows: int, args: Any) -> str:
    """Returns the scheduled program of `generate`."""
    mesh = gpu_mesh(CARDS[args.gpu])
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    base = abstract_base(config, quantization="nf4_dq")
    variables = {"params": base, "lora": abstract_adapters(base, lora)}
    prompts = jax.ShapeDtypeStruct((rows, args.length), jnp.int32)
    values = jax.eval_shape(lambda: Values.of(Sampling()))
    device = NamedSharding(mesh, PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=device)
    arrays = (variables, prompts, prompts, values)
    arrays = jax.tree.map(lambda a: array(a.shape, a.dtype), arrays)
    model = Llama(config, Compute(lora=lora, kernels=kernels, remat="none"))
    size = args.length + args.new
    program = _Program.of(model, Sampling(), (2,), cache_size=size)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = _generate.lower(program, *arrays, max_new_tokens=args.new)
    return lowered.compile().as_text() or ""


def loops(text: str) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Returns the lines of the loops over layers and tokens, and all computations.

    Where the layers of a token are not a loop, the former has no lines.
    """
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            computations[name] = []
        elif name:
            computations[name].append(line.strip())

    def body(inside: str) -> list[str]:
        found = {
            match[1]
            for line in text.splitlines()
            if " while(" in line and f'op_name="{inside}"' in line
            if (match := re.search(r"body=%?([\w.\-]+)", line))
        }
        return [line for name in found for line in computations[name]]

    return body(LAYER), body(TOKEN), computations


def traffic(
    lines: list[str], computations: dict[str, list[str]], layers: int, within: str = ""
) -> list:
    """Returns the bytes that each kernel of a computation reads and writes.

    Args:
      lines: of the computation.
      computations: those that it calls.
      layers: length of the stacks, of which a kernel reads one layer.
      within: part of the name of all kernels that count.
    """
    shapes: dict[str, str] = {}
    kernels = []
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, result, operation, operands = match.groups()
        shapes[name] = result
        if operation in FREE or within not in line:
            continue
        operands = [shapes.get(o, "") for o in re.findall(r"%([\w.\-]+)", operands)]
        called = re.search(r"\bcalls=%?([\w.\-]+)", line)
        if called is None:
            # Our kernels read a layer of a stack; what they update in place is small.
            reads = sum(_bytes(shape, layers) for shape in operands)
            aliases = line.partition("output_to_operand_aliasing=")[2]
            in_place = {int(n) for n in re.findall(r"\{(\d+)\}: \(", aliases)}
            for number, (kind, dims) in enumerate(_ARRAY.findall(result)):
                reads += 0 if number in in_place else _bytes(f"{kind}[{dims}]")
            kernels.append(reads)
            continue
        parts, saved = _parts(computations[called[1]], result)
        reads = [parts.get(n, _bytes(shape)) for n, shape in enumerate(operands)]
        kernels.append(sum(reads) + _bytes(result) - saved)
    return kernels


def _parts(fused: list[str], result: str) -> tuple[dict[int, float], float]:
    """Returns the bytes that a fusion reads of sliced operands.

    And how much less than its results it writes, because it writes them in place.
    """
    shapes: dict[str, str] = {}
    sources: dict[str, int] = {}
    parts: dict[int, float] = {}
    results = [_bytes(f"{kind}[{dims}]") for kind, dims in _ARRAY.findall(result)]
    saved = 0.0
    for line in fused:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, operands = match.groups()
        shapes[name] = shape
        names = re.findall(r"%([\w.\-]+)", operands)
        if operation == "parameter":
            sources[name] = int(operands)
        elif operation in ("bitcast", "copy", "reshape") and names[0] in sources:
            sources[name] = sources[names[0]]
        elif operation == "dynamic-update-slice" and names[0] in sources:
            # What is changed in a copy, and read again from there, is read once.
            sources[name] = sources[names[0]]
            parts.setdefault(sources[name], 0)
            if _bytes(shape) in results:
                saved += _bytes(shape) - _bytes(shapes[names[1]])
        elif operation in ("gather", "dynamic-slice") and names[0] in sources:
            source = sources[names[0]]
            parts[source] = parts.get(source, 0) + _bytes(shape)
    # Looked up more often than it is large, a table is read once.
    whole = {sources[n]: _bytes(shapes[n]) for n in shapes if n in sources}
    return {n: min(size, whole[n]) for n, size in parts.items()}, saved


def _bytes(shape: str, layers: int = 0) -> float:
    """Returns the bytes of the arrays of a type; of stacks of `layers`, one layer."""
    size = 0.0
    for kind, dims in _ARRAY.findall(shape):
        numbers = [int(n) for n in dims.split(",") if n]
        stacked = len(numbers) > 1 and numbers[0] == layers
        size += BYTES[kind] * math.prod(numbers) / (layers if stacked else 1)
    return size


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(MODELS), default="8b")
    parser.add_argument("--gpu", choices=tuple(CARDS), default="h200")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--kernels", nargs="+", default=["xla", "pallas"])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    args = parser.parse_args()
    # Read when the compiler starts, with the first program.
    os.environ |= {**ENVIRONMENT, "XLA_FLAGS": " ".join(XLA_FLAGS)}
    jax.config.update("jax_platforms", "cpu")
    config = LlamaConfig.from_hf(MODELS[args.size].hf_config)
    layers = config.num_hidden_layers
    bandwidth = 0.9 * CARDS[args.gpu].bandwidth
    print("| kernels | rows | kernels a layer | a token | GB | ms | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for rows in args.rows:
        for kernels in args.kernels:
            layer, token, rest = loops(compiled(config, kernels, rows, args))
            sizes = traffic(token, rest, layers)
            of_layers = traffic(layer, rest, layers) * layers
            if layer:
                sizes += of_layers
            else:
                of_layers = traffic(token, rest, layers, within=LAYERS)
            count, moved, per_layer = len(sizes), sum(sizes), len(of_layers) / layers
            seconds = moved / bandwidth + count * LAUNCH
            print(
                f"| {kernels} | {rows} | {per_layer:.3g} | {count:,} | "
                f"{moved / 1e9:.2f} | {1e3 * seconds:.2f} | {rows / seconds:,.0f} |"
            )


if __name__ == "__main__":
    main()
