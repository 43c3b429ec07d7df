"""Compiles generation for an H200 on a machine without a GPU.

    python step_for_gpu.py '{"config": {...}, "batch": 4, "length": 2048, ...}' OUT

That is generation of "generate" tokens after prompts of "length", greedily. What the
compiler makes is what would run: the buffers of the whole program and its scheduled
form, written to OUT/memory.json and OUT/program.txt. No times.

A training step is compiled by the library itself (`qlora_jax.planning.compile`), in a
process set up in the same way.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from qlora_jax.planning.compile import ENVIRONMENT, XLA_FLAGS

# Before jax is imported.
os.environ |= {**ENVIRONMENT, "XLA_FLAGS": " ".join(XLA_FLAGS)}

import jax
import jax.numpy as jnp

from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import _generate, _Program
from qlora_jax.inference.sampling import Values
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.planning.estimate import abstract_base
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import gpu_mesh

H200 = CARDS["h200"].target


def lower(request: dict[str, Any]) -> jax.stages.Lowered:
    """Traces generation with the requested model, everything on one H200."""
    mesh = gpu_mesh(CARDS["h200"])
    device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    settings = {"target_modules": "all-linear", **request["lora"]}
    lora = LoraConfig(r=16, lora_alpha=32, **settings)
    compute = Compute(
        attention=request["attention"],
        remat=request["remat"],
        kernels=request["kernels"],
        lora=lora,
    )
    config = LlamaConfig.from_hf(request["config"])
    base = abstract_base(config, quantization="nf4_dq")
    # The adapters as they are trained: one rank and scaling for all.
    variables = {"params": base, "lora": abstract_adapters(base, lora)}
    rows = jax.ShapeDtypeStruct((request["batch"], request["length"]), jnp.int32)
    values = jax.eval_shape(lambda: Values.of(Sampling()))
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
        (variables, rows, rows, values),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for whom to trace
        program = _Program.of(
            Llama(config, compute),
            Sampling(),
            (2,),
            cache_size=request["length"] + request["generate"],
        )
        return _generate.lower(program, *arguments, max_new_tokens=request["generate"])


def main(request: dict[str, Any], out: Path) -> None:
    compiled = lower(request).compile()
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "output": memory.output_size_in_bytes,
    }
    (out / "memory.json").write_text(json.dumps(sizes))
    (out / "program.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
