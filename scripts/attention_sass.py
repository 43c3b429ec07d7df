"""Counts instructions of the attention kernels in the code of the GPU compiler.

    python scripts/attention_sass.py [--width 64 128] [--peer]

Compiles the kernels for an H200, which need not be there (`make compile` installs the
compiler; `nvidia-cuda-nvdisasm` the disassembler, or it is on the path), and prints a
table in Markdown. `--peer` adds the kernels of jax.experimental.pallas.ops.gpu, which
have neither segments nor a causal backward pass. Counted, not measured.

Columns describe one step of the innermost loop without a mask, of one warpgroup:
  products     tensor core instructions, in groups that end with a wait for all
  tensor       clocks that they occupy the tensor cores; m64nNk16 takes N / 2
  shared       clocks that reading their operands takes, at 128 bytes a clock
  exp2         exponentials of a thread, of which a warp takes 8 clocks each
  other        instructions besides both, of which a warp takes a clock each
Then, of the kernel: registers used of those granted, bytes spilled, shared memory.
"""

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.planning.compile import ENVIRONMENT, XLA_FLAGS

SIZES = {"batch": 2, "length": 4096, "heads": 32, "groups": 8}
COLUMNS = (
    "kernel",
    "head_dim",
    "products",
    "tensor",
    "shared",
    "exp2",
    "other",
    "registers",
    "spilled",
    "KiB",
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):", re.M)

Instruction = tuple[str, str]
"""Operation and operands."""


def tool(name: str) -> str:
    """Returns the path of a CUDA tool: of the wheels of CUDA 13, or on the path."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / "cu13" / "bin" / name).is_file():
            return str(path)
    if path := shutil.which(name):
        return path
    raise SystemExit(f"{name} is missing: pip install nvidia-cuda-{name}")


# --- Reading ---


def step(sass: str) -> list[Instruction]:
    """Returns the shortest loop that multiplies and takes exponentials."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.search(line):
            instructions.append((match[1], match[2].strip()))
    loops = []
    for end, (operation, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands)
        if operation != "BRA" or target is None or labels[target[0]] > end:
            continue
        loop = instructions[labels[target[0]] : end + 1]
        operations = [operation for operation, _ in loop]
        # A loop that waits for a barrier jumps back as well, to within another one.
        if operations.count("MUFU.EX2") >= 16 and any(map(is_product, operations)):
            loops.append(loop)
    return min(loops, key=len)


def is_product(operation: str) -> bool:
    """Whether this is an instruction of the tensor cores."""
    return operation.startswith("HGMMA")


def count(loop: list[Instruction]) -> dict[str, Any]:
    """Counts a step: see the columns above."""
    groups, tensor, shared = [0], 0, 0
    for operation, operands in loop:
        if is_product(operation):
            columns = int(operation.split("x")[1])
            # Reads 16 columns of the left operand, unless it is in registers.
            left = 0 if re.match(r"R\d+, R\d+, gdesc", operands) else 64
            tensor += columns // 2
            shared += (left + columns) * 16 * 2 // 128
            groups[-1] += 1
        elif operation == "WARPGROUP.DEPBAR.LE" and operands.endswith("0x0"):
            groups.append(0)
    operations = [operation for operation, _ in loop]
    exponentials = operations.count("MUFU.EX2")
    return {
        "products": " + ".join(str(group) for group in groups if group),
        "tensor": tensor,
        "shared": shared,
        "exp2": exponentials,
        "other": len(loop) - exponentials - sum(groups),
    }


def describe(ptx: Path) -> dict[str, Any]:
    """Reads the dump of a kernel."""
    cubin = str(ptx.with_suffix(".cubin"))
    command = [tool("ptxas"), "-arch=sm_90a", "-v", str(ptx), "-o", cubin]
    settings: Any = {"capture_output": True, "text": True, "check": True}
    report = subprocess.run(command, **settings).stderr
    sass = subprocess.run([tool("nvdisasm"), "-c", cubin], **settings).stdout
    used = 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", sass))
    granted = re.findall(r"setmaxnreg\.inc\S* (\d+)", ptx.read_text())
    granted += re.findall(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    host = ptx.with_suffix(".ll").read_text()
    launch = re.search(r"call .*@mosaic_gpu_(?:build_k|launch_k)ernel.*\((.*)\)", host)
    assert spilled is not None and launch is not None
    # Grid, cluster and block, of three numbers each; shared memory.
    shared = int(re.findall(r"i32 (\d+)", launch[1])[9])
    return count(step(sass)) | {
        "registers": f"{used} of {granted[0]}",
        "spilled": int(spilled[1]),
        "KiB": f"{shared / 1024:.1f}",
    }


# --- Compiling ---


def compiled(function: Callable[..., Any], *arrays: Any) -> dict[str, dict[str, Any]]:
    """Compiles a function for an H200 and describes its kernels, by their names."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from qlora_jax.compiler import compiler_options
    from qlora_jax.planning.gpus import CARDS
    from qlora_jax.planning.step import gpu_mesh

    mesh = gpu_mesh(CARDS["h200"])
    device = NamedSharding(mesh, PartitionSpec())
    abstract = [
        None if a is None else jax.ShapeDtypeStruct(*a, sharding=device) for a in arrays
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(function).lower(*abstract)
        # jax 0.10 declares a narrower type.
        options: Any = compiler_options("gpu")
        lowered.compile(compiler_options=options)
        # Their names end with numbers, which depend on what was compiled before.
        return {ptx.stem: describe(ptx) for ptx in Path(folder).glob("*.ptx")}


def ours(width: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Counts our kernels, whole and packed."""
    import jax.numpy as jnp

    from pallas_kernels.attention.backward import backward
    from pallas_kernels.attention.forward import forward

    batch, length, heads, groups = SIZES.values()
    q = ((batch, length, heads, width), jnp.bfloat16)
    k = ((batch, length, groups, width), jnp.bfloat16)
    lse = ((batch, heads, length), jnp.float32)
    for kind, ids in (("", None), (", packed", ((batch, length), jnp.int32))):
        found = compiled(forward, q, k, k, ids)
        found |= compiled(backward, q, k, k, ids, q, lse, q)
        for name in ("forward", "queries", "keys"):
            (counts,) = (found[stem] for stem in found if f"_{name}_" in stem)
            yield name + kind, counts


def peer(width: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Counts jax's kernels: float16, forward causal, backward of every score."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    batch, length, heads, groups = SIZES.values()
    q = ((batch, length, heads, width), jnp.float16)
    k = ((batch, length, groups, width), jnp.float16)
    blocks = {f"block_{name}": 64 for name in ("q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    tiles = {"block_q": 64, "block_kv": 128, "max_concurrent_steps": 2, **blocks}
    config = functools.partial(attention_mgpu.TuningConfig, compute_wgs_bwd=2, **tiles)

    def gradient(q: Any, k: Any, v: Any, dout: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return attention_mgpu.attention(q, k, v, config(causal=False))

        return jax.vjp(attend, q, k, v)[1](dout)

    def forward(q: Any, k: Any, v: Any) -> Any:
        return attention_mgpu.attention(q, k, v, config(causal=True), True)

    (counts,) = compiled(forward, q, k, k).values()
    yield "jax, forward", counts
    # Besides the forward pass, called "entry", two without a name.
    found = compiled(gradient, q, k, k, q)
    both = [counts for stem, counts in found.items() if not stem.startswith("entry")]
    both.sort(key=lambda counts: counts["tensor"])
    yield from zip(("jax, queries", "jax, keys"), both, strict=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--peer", action="store_true", help="jax's kernels as well")
    args = parser.parse_args()
    # Before jax is imported.
    os.environ |= {**ENVIRONMENT, "XLA_FLAGS": " ".join(XLA_FLAGS)}
    os.environ["MOSAIC_GPU_DUMP_HOST_LLVM"] = "1"
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for width in args.width:
        for kernels in (ours, peer) if args.peer else (ours,):
            for name, counts in kernels(width):
                row = {"kernel": name, "head_dim": width, **counts}
                print(f"| {' | '.join(str(row[key]) for key in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
