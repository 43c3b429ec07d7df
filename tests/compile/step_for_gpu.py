"""Compiles a training step, or generation, for an H200 on a machine without a GPU.

    python step_for_gpu.py '{"config": {...}, "batch": 4, "length": 2048, ...}' OUT

With "generate": N in the request, that is generation of N tokens after prompts of that
length, greedily.

XLA's CUDA compiler needs a description of the device, not the device. What it makes is
what would run: the buffers of the whole step and its scheduled program, written to
OUT/memory.json and OUT/program.txt. No times, and cuDNN's workspace counts as 0.

A process of its own for each compilation: the environment has to stand before jax is
imported, and a failed compilation may abort the process.
"""

import functools
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
# Without a device nothing can be timed, and unguided the compiler picks poor Triton
# tiles: cuBLAS then.
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.config import LlamaConfig
from qlora_jax.generate import _generate
from qlora_jax.linear import Compute
from qlora_jax.llama import Llama
from qlora_jax.lora import abstract_adapters
from qlora_jax.lora_config import LoraConfig
from qlora_jax.memory import abstract_base
from qlora_jax.train import (
    TrainConfig,
    TrainState,
    init_state,
    make_optimizer,
    train_step,
)

# NVIDIA H200 SXM, written by hand. SMs, clock, L2, memory and its bandwidth: the H200
# data sheet and the H100 white paper (same chip). Limits of a block, an SM and a grid:
# CUDA C++ Programming Guide, compute capability 9.0 (227 KB of shared memory a block
# on request, 228 KB an SM, 1 KB of each block reserved).
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
  l2_cache_size: 62914560
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@functools.cache
def h200() -> jax.sharding.Mesh:
    """One H200 that is not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


def lower(wanted: dict[str, Any]) -> jax.stages.Lowered:
    """Traces the wanted program of the wanted model, everything on one H200."""
    device = NamedSharding(h200(), PartitionSpec())

    settings = {"target_modules": "all-linear", **wanted["lora"]}
    lora = LoraConfig(r=16, lora_alpha=32, **settings)
    compute = Compute(
        attention=wanted["attention"],
        remat=wanted["remat"],
        kernels=wanted["kernels"],
        lora=lora,
    )
    config = LlamaConfig.from_hf(wanted["config"])
    base = abstract_base(config, quantization="nf4_dq")
    adapters = abstract_adapters(base, lora)

    def on_device(tree: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree
        )

    if wanted["generate"]:
        # The adapters as they are trained: one rank and scaling for all.
        variables = {"params": base, "lora": adapters}
        rows = jax.ShapeDtypeStruct((wanted["batch"], wanted["length"]), jnp.int32)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return _generate.lower(
            Llama(config, compute),
            *on_device((variables, rows, rows, key, scalar, scalar)),
            slots=wanted["length"] + wanted["generate"],
            max_new_tokens=wanted["generate"],
            greedy=True,
            top_k=None,
            nucleus=False,
            eos=(2,),
        )
    optimizer = make_optimizer(TrainConfig(steps=1000), 1000)

    def start(adapters: Any, key: jax.Array) -> TrainState:
        return init_state(adapters, optimizer, key)

    state = jax.eval_shape(start, adapters, jax.random.key(0))
    rows = jax.ShapeDtypeStruct((1, wanted["batch"], wanted["length"]), jnp.int32)
    batch = {"tokens": rows, "labels": rows}
    if wanted["packed"]:
        batch |= {"positions": rows, "segment_ids": rows}
    step = partial(train_step, model=Llama(config, compute), optimizer=optimizer)
    arguments = on_device((state, base, batch))
    return jax.jit(step, donate_argnums=0).lower(*arguments)


def main(wanted: dict[str, Any], out: Path) -> None:
    with jax.sharding.use_abstract_mesh(h200().abstract_mesh):  # for whom to trace
        lowered = lower(wanted)
    compiled = lowered.compile()
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
