"""A training step described by shapes: its arguments, program and memory.

    lowered = lower(Step(config, compute, length=8192), mesh)
    memory = StepMemory.of(lowered.compile(), step, mesh)

The step is lowered with shapes for the device at hand, or for a GPU that is not
installed (`gpu_mesh`); nothing is loaded and nothing runs. A compiled step plans all of
its buffers. The compiler does not see two things: the workspace that cuDNN's backward
pass allocates when it runs (`StepMemory.workspace`), and what the process takes
(`planning.gpus.ALLOWANCE`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from qlora_jax.choices import EmbeddingMemory, HeadMemory
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig, abstract_adapters, select
from qlora_jax.models import (
    Compute,
    Llama,
    LlamaConfig,
    abstract_base,
    check_mesh,
    is_on_host,
    local_bytes,
    make_mesh,
    shard_step,
    traced_on,
)
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.training import (
    ParameterGroup,
    TrainConfig,
    TrainState,
    init_state,
    jit_step,
    make_optimizer,
)
from qlora_jax.tree import EMBEDDING, HEAD, FrozenDict, Path

_MAX_INT32 = 2**31 - 1
_CUDNN_BACKWARD = "__cudnn$fmhaSoftmaxBackward"


@dataclass(frozen=True)
class Step:
    """The settings that the program of a training step depends on."""

    config: LlamaConfig
    compute: Compute
    """Includes the LoRA configuration."""
    length: int
    """Tokens per row."""
    train: TrainConfig = TrainConfig(steps=1, batch_size=1)
    """Batch size, micro-batches, and the optimizer."""
    quantization: str | None = "nf4_dq"
    """Of the linear modules, as `abstract_base` takes it."""
    packed: bool = False
    """Whether rows hold several documents."""
    embed_tokens: EmbeddingMemory = "device"
    """Memory of the embedding table."""
    lm_head: HeadMemory = "device"
    """Memory of the head, or "nf4" to quantize it; if tied, the embedding's."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(
                f"`max_length` must be at least 1 token, got {self.length}."
            )
        if self.lm_head == "nf4" and self.config.tie_word_embeddings:
            raise UserError(
                "lm_head='nf4': this model's head is its embedding table, which is not "
                "quantized. Use 'device' or 'host'."
            )
        tokens = self.tokens * self.train.gradient_accumulation_steps
        if tokens > _MAX_INT32:
            raise UserError(
                f"a step of {self.train.gradient_accumulation_steps:,} micro-batches x "
                f"{self.train.batch_size:,} rows x {self.length:,} tokens has "
                f"{tokens:,} tokens, and tokens are counted in 32 bits (at most "
                f"{_MAX_INT32:,}). Make `max_length`, `batch_size` or "
                "`gradient_accumulation_steps` smaller."
            )

    @property
    def on_host(self) -> tuple[Path, ...]:
        """Paths of the base's modules in pinned host memory."""
        memories = {EMBEDDING: self.embed_tokens, HEAD: self.lm_head}
        return tuple(path for path, memory in memories.items() if memory == "host")

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.train.batch_size * self.length

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, the inverse of `from_json`."""
        compute = _fields(self.compute)
        if self.compute.lora is not None:
            compute["lora"] = _fields(self.compute.lora)
        return {
            **_fields(self),
            "config": self.config.to_hf(),
            "compute": compute,
            "train": dataclasses.asdict(self.train),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Step:
        """Restores a step from the result of `to_json`."""
        compute = dict(content["compute"])
        if compute["lora"] is not None:
            # JSON has neither tuples nor immutable mappings.
            lora = {name: _frozen(v) for name, v in compute["lora"].items()}
            compute["lora"] = LoraConfig(**lora)
        groups = tuple(ParameterGroup(**g) for g in content["train"]["groups"])
        return cls(
            **{
                **content,
                "config": LlamaConfig.from_hf(content["config"]),
                "compute": Compute(**compute),
                "train": TrainConfig(**{**content["train"], "groups": groups}),
            }
        )


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({key: _frozen(item) for key, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def abstract_arguments(step: Step) -> tuple[TrainState, Any, dict[str, Any]]:
    """Returns state, base and batch of a step, as shapes.

    Raises:
      UserError: no LoRA configuration, or one that targets no module of this model.
    """
    if step.compute.lora is None:
        raise UserError("A training step needs a LoRA configuration (`Compute.lora`).")
    base = abstract_base(
        step.config,
        quantization=step.quantization,
        quantize_lm_head=step.lm_head == "nf4",
        dtype=step.compute.dtype,
    )
    adapters = abstract_adapters(base, step.compute.lora)
    optimizer = _optimizer(step, base)

    def start(adapters: Any) -> TrainState:
        return init_state(adapters, optimizer, jax.random.key(0))

    state = jax.eval_shape(start, adapters)
    shape = (
        step.train.gradient_accumulation_steps,
        step.train.batch_size,
        step.length,
    )
    names = ("tokens", "labels")
    if step.packed:
        names += ("positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    return state, base, batch


def _optimizer(step: Step, base: Any) -> Any:
    assert step.compute.lora is not None
    return make_optimizer(step.train, 1, select(base, step.compute.lora))


def gpu_mesh(
    gpu: GpuSpec, shape: Mapping[str, int] | None = None, per_node: int | None = None
) -> Mesh:
    """Returns a mesh of GPUs that are not installed.

    Needs the CUDA plugin of JAX, in a process whose platform is the CPU. They are
    arranged as those of a run (`make_mesh`), whose nodes are its processes.

    Args:
      gpu: the data sheet of each.
      shape: sizes of the mesh's axes; default one GPU.
      per_node: GPUs of a machine; default all of them.
    """
    shape = shape or {"data": 1}
    devices = math.prod(shape.values())
    per_node = per_node or devices
    # "hosts x 1 x GPUs of a host": XLA describes each host as a slice of its own.
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu.target,
        topology=f"{devices // per_node}x1x{per_node}",
    )
    return make_mesh(shape, topology.devices)


def lower(step: Step, mesh: Any = None) -> jax.stages.Lowered:
    """Lowers the step as a run jits it: only the state is donated.

    Args:
      step: the step.
      mesh: from `gpu_mesh`; default the device at hand.
    """
    model = Llama(step.config, step.compute)
    arguments = abstract_arguments(step)
    if mesh is not None:
        check_mesh(mesh.shape, step.train.batch_size)
    # Of the mesh, whose devices this process does not have.
    platform = None if mesh is None else mesh.devices.flat[0].platform
    optimizer, state = _optimizer(step, arguments[1]), None
    if mesh is not None:
        arguments = shard_step(arguments, mesh, step.on_host)
        state = arguments[0]
    jitted = jit_step(model, optimizer, step.train, platform=platform, state=state)
    # Kernels are chosen by the device kind of the mesh in context.
    with traced_on(mesh):
        return jitted.lower(*arguments)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a compiled step takes on each device and pins on the host."""

    base: int
    """Frozen weights."""
    adapters: int
    optimizer: int
    """Optimizer state, step number and random key."""
    batch: int
    activations: int
    """Kept by the forward pass of all layers for the backward pass."""
    gradients: int
    """Of the trained parameters."""
    loss: int
    """Needed by the loss alone: chunks of logits."""
    temporaries: int
    """Other temporaries, such as those of the current layer."""
    workspace: int
    """Of cuDNN's backward pass, by its formula; the compiler counts 0."""
    host_base: int = 0
    """Frozen weights in pinned host memory."""
    host_activations: int = 0
    """Activations offloaded to pinned host memory."""

    @property
    def device_bytes(self) -> int:
        """Sum of all kinds on a device."""
        return sum(
            getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not f.name.startswith("host_")
        )

    @property
    def host_bytes(self) -> int:
        """Sum of all kinds pinned on the host for a device."""
        return self.host_base + self.host_activations

    @classmethod
    def of(
        cls,
        compiled: Any,
        step: Step,
        mesh: Any = None,
        buffers: str | None = None,
        arguments: tuple[TrainState, Any, Any] | None = None,
    ) -> StepMemory:
        """Reads the memory of a compiled step.

        Args:
          compiled: `lower(step, mesh).compile()`.
          step: the step.
          mesh: the mesh it was lowered for.
          buffers: XLA's text of the buffer assignment, by which `split_temporaries`
            splits the temporaries; without it all of them are `temporaries`.
          arguments: that it was lowered with; default `abstract_arguments(step)`.
        """
        stats = compiled.memory_analysis()
        if arguments is None:
            arguments = abstract_arguments(step)
            if mesh is not None:
                arguments = shard_step(arguments, mesh, step.on_host)
        state, base, batch = arguments
        text = compiled.as_text()
        kinds = {"temporaries": stats.temp_size_in_bytes}
        if buffers is not None:
            sharers = 1 if mesh is None else mesh.shape.get("context", 1)
            split = split_temporaries(buffers, text, step, state.adapters, sharers)
            kinds = split | {
                # Gaps between buffers come from the temporaries.
                "temporaries": stats.temp_size_in_bytes
                - sum(size for kind, size in split.items() if kind != "temporaries")
            }
        adapters = device_tree_bytes(state.adapters)
        # Results that do not alias an argument, and the alignment of arguments.
        kinds["temporaries"] += stats.output_size_in_bytes - stats.alias_size_in_bytes
        return cls(
            base=device_tree_bytes(base),
            adapters=adapters,
            optimizer=device_tree_bytes(state) - adapters,
            batch=device_tree_bytes(batch),
            activations=kinds.get("activations", 0),
            gradients=kinds.get("gradients", 0),
            loss=kinds.get("loss", 0),
            temporaries=kinds["temporaries"],
            workspace=_attention_workspace(text, step, mesh),
            host_base=device_tree_bytes(base, host=True),
            host_activations=stats.host_temp_size_in_bytes,
        )


def device_tree_bytes(tree: Any, *, host: bool = False) -> int:
    """Returns the bytes of a tree on each device, or (`host`) in pinned host memory."""
    leaves = jax.tree.leaves(tree)
    return sum(local_bytes(leaf) for leaf in leaves if is_on_host(leaf) == host)


def _attention_workspace(text: str, step: Step, mesh: Any) -> int:
    """Returns the bytes of dQ in float32, in which cuDNN's backward pass sums."""
    if _CUDNN_BACKWARD not in text:
        return 0
    devices = 1 if mesh is None else math.prod(mesh.shape.values())
    config = step.config
    return 4 * step.tokens // devices * config.num_attention_heads * config.head_dim


# --- Kinds of temporaries ---

_KINDS = ("gradients", "activations", "temporaries", "loss")
# Values in device memory ("@0"); those in host memory have "@5".
_VALUE = re.compile(
    r" value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})?(?: \(phi\))? @0> "
    r"\(size=(\d+),offset=(\d+)\): (\S+)"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_NAMED = re.compile(r'%?([\w.\-]+) = .*op_name="([^"]*)"')


def split_temporaries(
    buffers: str, program: str, step: Step, adapters: Any, sharers: int = 1
) -> dict[str, int]:
    """Splits the bytes of the temporaries by kind.

    Buffers share memory over time. A byte counts for the first of these kinds that ever
    uses it: gradients (arrays of the shapes of trained parameters), activations (arrays
    of all layers and all tokens), temporaries, loss (between the last layer and its
    gradient). `loss` is thus the additional memory of the loss.

    Args:
      buffers: XLA's text of the buffer assignment.
      program: the scheduled program.
      step: the step.
      adapters: shapes of the trained parameters, with their shardings.
      sharers: devices that share a row.
    """
    length = step.length // sharers
    origin = {
        match[1]: match[2]
        for line in program.splitlines()
        # The op name is the path of Python scopes that made the instruction.
        if (match := _NAMED.match(line.strip().removeprefix("ROOT ")))
    }
    trained_shapes = set()
    for leaf in jax.tree.leaves(adapters):
        sharding = getattr(leaf, "sharding", None)
        # The buffers of one device have the shapes of its shards.
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        trained_shapes.add(tuple(shape))
    spans: dict[str, list[tuple[int, int]]] = {kind: [] for kind in _KINDS}
    for block in re.split(r"\nallocation ", buffers):
        # The one allocation that all temporaries share; the others hold arguments,
        # results and constants.
        if "preallocated-temp" not in block.partition("\n")[0]:
            continue
        for match in _VALUE.finditer(block):
            name, size, start, shape = match[1], int(match[2]), int(match[3]), match[4]
            kind = _kind(shape, origin.get(name, ""), step, length, trained_shapes)
            spans[kind].append((start, start + size))
    # What a kind adds to the union of the spans of those before it.
    kind_bytes, counted = {}, []
    for kind in _KINDS:
        before = _union_length(counted)
        counted += spans[kind]
        kind_bytes[kind] = _union_length(counted) - before
    return kind_bytes


def _kind(shape: str, origin: str, step: Step, length: int, trained_shapes: set) -> str:
    match = _SHAPE.match(shape)
    sizes = [int(n) for n in match[2].split(",") if n] if match else []
    if tuple(sizes) in trained_shapes:
        return "gradients"
    # [layers, rows of this device, ..., tokens of each, ...]
    layers, rows = step.config.num_hidden_layers, step.train.batch_size
    if sizes[:1] == [layers] and length in sizes[2:] and not rows % sizes[1]:
        return "activations"
    # Both the layers and the loss are differentiated; only the layers are a method of
    # the model, whose name stands in the op name.
    if "jvp(" in origin and "hidden_states" not in origin:
        return "loss"
    return "temporaries"


def _union_length(spans: Iterable[tuple[int, int]]) -> int:
    """Returns the length of the union of intervals."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total
