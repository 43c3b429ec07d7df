"""What GPUs exchange in a step, in closed form, and what they compute beside it.

Weights that "fsdp" divides are gathered as they are stored: those of a layer in the
forward pass and again in the backward pass (not if the layers are unrolled), the two
tables once in a step. Adapters are gathered in the dtype of the products that they are
joined with (`models.joined`), or else in float32. The gradients of what is trained are
summed over all GPUs; those of joined products come with the blocks between the ranks of
one module and the outputs of another, and of an MLP in chunks those of its `lora_B` are
summed for every chunk. Where "context" divides rows, keys and values are gathered, and
their gradients summed. Every micro-batch repeats it, but for the tables. Tests hold the
bytes to within 5 % of those compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh

from qlora_jax.models import divide_over_nodes, mlp_chunks, mlp_tokens, shard_step
from qlora_jax.planning.estimate import flops_by_pass, step_seconds_floor, unit_step
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.planning.step import Step, abstract_arguments
from qlora_jax.planning.traffic import Transfer, Work
from qlora_jax.tree import LAYERS


def step_work(step: Step, gpu: GpuSpec, devices: int) -> Work:
    """Returns the operations of a step on each GPU.

    Args:
      step: the step, of all GPUs together.
      gpu: the data sheet of each.
      devices: number of GPUs.
    """
    tokens = step.tokens * step.train.gradient_accumulation_steps
    forward, backward, loss = (n * tokens / devices for n in flops_by_pass(step))
    floor = step_seconds_floor(step, gpu, devices=devices)
    return Work(forward, backward, loss, tokens, floor["host_link"])


def expected_transfers(
    step: Step, mesh: Mapping[str, int], per_node: int
) -> list[Transfer]:
    """Returns the collectives of a step.

    Args:
      step: the step, of all GPUs together.
      mesh: sizes of its axes.
      per_node: GPUs of a node.
    """
    devices = math.prod(mesh.values())
    if devices == 1:
        return []
    sizes = _sizes(unit_step(step, devices), tuple(mesh.items()))
    _, over_nodes = divide_over_nodes(mesh, devices // per_node)
    fsdp, context = mesh.get("fsdp", 1), mesh.get("context", 1)
    micro, layers = (
        step.train.gradient_accumulation_steps,
        step.config.num_hidden_layers,
    )
    everyone = (devices, math.prod(over_nodes.values()))
    sharers = (fsdp, over_nodes["fsdp"])
    found = []

    def add(kind: str, phase: Any, size: float, group: tuple[int, int], runs: int):
        if size and group[0] > 1:
            found.append(Transfer(kind, phase, runs, size, *group))

    width = 4 if step.compute.dtype == "float32" else 2
    chunks = _chunks(step, mesh)
    joined = _joins(step)
    # Share of an adapter's float32 bytes that is gathered.
    attention = width / 4 if joined else 1.0
    mlp = width / 4 if joined and chunks == 1 else 1.0
    gathered = sizes.base + attention * sizes.attention + mlp * sizes.mlp
    for phase in ("forward", "backward")[: 1 + step.compute.scan_layers]:
        add("all-gather", phase, micro * gathered, sharers, micro * layers)
    add("all-gather", "step", sizes.tables, sharers, sizes.table_number)
    summed = sizes.trained + joined * sizes.crossed_attention
    # The kernels of the activation compute the gradients of each module on their own.
    crosses = joined and chunks == 1 and step.compute.activation != "fused"
    summed += crosses * sizes.crossed_mlp + (chunks - 1) * sizes.mlp_b
    add("all-reduce", "backward", micro * summed, everyone, micro * layers * chunks)
    if context > 1:
        # [rows, T, K H], twice.
        c, runs = step.config, 2 * micro * layers
        pairs = 2 * width * layers * c.num_key_value_heads * c.head_dim
        size = micro * pairs * step.tokens * context / devices
        group = (context, over_nodes["context"])
        add("all-gather", "forward", size, group, runs)
        add("all-gather", "backward", size, group, runs)
        add("reduce-scatter", "backward", size / context, group, runs)
    return found


@dataclass(frozen=True)
class _Sizes:
    """Bytes of arrays of all layers, undivided; of adapters in float32."""

    base: int
    """Weights of the layers that "fsdp" divides."""
    attention: int
    """Adapters of attention that it divides."""
    mlp: int
    """Those of the MLP."""
    tables: int
    """Weights outside of the layers that it divides."""
    table_number: int
    trained: int
    """Gradients."""
    mlp_b: int
    """Of them those of `lora_B` in the MLP."""
    crossed_attention: int
    """Gradients between the ranks of one and the outputs of another joined module."""
    crossed_mlp: int


@functools.lru_cache(maxsize=64)  # a search tries many lengths of one model
def _sizes(step: Step, mesh: tuple[tuple[str, int], ...]) -> _Sizes:
    names, sizes = zip(*mesh, strict=True)
    arguments = abstract_arguments(step)
    state, base, _ = shard_step(arguments, AbstractMesh(sizes, names), step.on_host)
    # The head and the embedding use a tied table, which is gathered for each.
    uses = 1 + step.config.tie_word_embeddings
    totals = dict.fromkeys(("base", "attention", "mlp", "tables", "table_number"), 0)
    totals |= {"trained": 0, "mlp_b": 0}
    b_shapes: dict[str, tuple[int, ...]] = {}
    for is_base, tree in ((True, base), (False, state.adapters)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            part = "mlp" if "mlp" in keys else "attention"
            if not is_base:
                totals["trained"] += size
                totals["mlp_b"] += size * (part == "mlp" and keys[-1] == "lora_B")
                if keys[-1] == "lora_B" and all(name in keys for name in LAYERS):
                    b_shapes[keys[-2]] = leaf.shape  # [L, O, R]
            if "fsdp" not in leaf.sharding.spec:
                continue
            if all(name in keys for name in LAYERS):
                totals["base" if is_base else part] += size
            else:
                totals["tables"] += size * uses
                totals["table_number"] += uses
    return _Sizes(
        **totals,
        crossed_attention=_crossed(b_shapes, ("q_proj", "k_proj", "v_proj")),
        crossed_mlp=_crossed(b_shapes, ("gate_proj", "up_proj")),
    )


def _crossed(shapes: Mapping[str, tuple[int, ...]], group: tuple[str, ...]) -> int:
    """Returns the bytes of gradients between the modules of a group."""
    present = [shapes[module] for module in group if module in shapes]
    outputs, ranks = (sum(shape[i] for shape in present) for i in (1, 2))
    own = sum(o * r for _, o, r in present)
    return 4 * (present[0][0] if present else 0) * (outputs * ranks - own)


def _chunks(step: Step, mesh: Mapping[str, int]) -> int:
    """Returns the number of chunks of the MLP."""
    context = mesh.get("context", 1)
    rows = step.train.batch_size * context // math.prod(mesh.values())
    limit = mlp_tokens(step.config.intermediate_size, step.compute.remat)
    return mlp_chunks(rows, step.length // context, limit)


def _joins(step: Step) -> bool:
    """Whether a GPU computes products of adapters with those of the weights."""
    compute, lora = step.compute, step.compute.lora
    if lora is None or lora.use_dora or lora.lora_dropout or step.quantization is None:
        return False
    if compute.lora_products == "auto":
        return compute.remat != "offload"
    return compute.lora_products == "joined"
