"""Memory, work and parameter counts of a training step in closed form.

Everything is counted from abstract shapes (`jax.eval_shape`): a `config.json` is
enough, and nothing is loaded or compiled.

Arguments, gradients and the activations that a policy keeps are exact. The temporaries
of a layer depend on how the compiler schedules it; they are a number of arrays
[tokens, features], read off compiled plans. Tests hold the sum to within 10 % of the
compiled step over models, lengths and policies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from qlora_jax import tree as trees
from qlora_jax.errors import did_you_mean, readable_bytes
from qlora_jax.lora import (
    LoraConfig,
    Selection,
    absent_layers,
    abstract_adapters,
    linear_modules,
    rows_of,
    select,
    unused_exclusions,
    unused_patterns,
)
from qlora_jax.models import (
    LlamaConfig,
    abstract_base,
    mlp_tokens,
    shard_step,
    tree_bytes,
    tree_size,
)
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.planning.step import (
    Step,
    StepMemory,
    abstract_arguments,
    device_tree_bytes,
)
from qlora_jax.planning.work import mean_keys
from qlora_jax.training import TrainConfig, make_optimizer
from qlora_jax.tree import EMBEDDING, HEAD

ERROR = 0.1
"""Share by which an estimate may differ from the compiled plan."""


# Policies under which the backward pass repeats the matrix products of a layer.
_REPEATS_PRODUCTS = ("full", "save_attention", "offload")


@dataclass(frozen=True)
class _Arrays:
    """Temporaries of an MLP, in arrays of activations."""

    weights: float
    """Share of a layer's weights that is dequantized at a time."""
    narrow: float
    """[tokens, hidden_size]."""
    wide: float
    """[tokens of a chunk, intermediate_size]."""


# Read off compiled plans of 1B, 3B and 8B models.
_UNCHUNKED = _Arrays(weights=0.74, narrow=3.1, wide=6.0)
_IN_CHUNKS = {
    "full": _Arrays(weights=0.9, narrow=6.2, wide=7.0),
    "save_attention": _Arrays(weights=0.9, narrow=6.2, wide=7.0),
    # Includes layer inputs that are being copied to and from the host.
    "offload": _Arrays(weights=0.9, narrow=7.2, wide=6.0),
}
_KEPT = _Arrays(weights=0.3, narrow=4.3, wide=3.0)
# Where [tokens, hidden_size] has 2^31 elements or more, the compiler fuses less and
# holds one more.
_LARGE = 1.0
# Bytes per token and layer that "none" in a loop keeps in addition to "save_matmuls",
# for each hidden and each intermediate feature (some of them in float32).
_NONE_NARROW, _NONE_WIDE = 10, 18
# Share of the dequantized weights of all layers that the compiler holds at a time where
# the layers are unrolled and their products are kept; without recomputation it keeps
# those of the forward pass.
_UNROLLED_WEIGHTS = 0.27


@dataclass(frozen=True)
class _Model:
    """Sizes that do not depend on the length or the number of rows."""

    base: int
    host_base: int
    adapters: int
    optimizer: int
    """Bytes on a device."""
    batch_token: int
    """Bytes of the batch per token."""
    layer_weights: int
    """Number of weights in the linear modules of one layer."""
    recomputed_weights: int
    """Number of those whose products are recomputed in the backward pass."""
    layer_features: int
    """Sum of input and output features of these modules."""
    head_weights: int
    """Number of weights in linear modules outside the layers: the head."""
    ranks: int
    """Sum of the ranks of all adapters."""
    factors: int
    """Number of parameters in all lora_A and lora_B."""
    tables: int
    """Bytes of the tables of the vocabulary that devices divide, gathered."""
    head_table: int
    """The same of the head's."""


def _model(step: Step, mesh: Mapping[str, int] | None = None) -> _Model:
    mesh = mesh or {"data": 1}
    return _model_sizes(unit_step(step, math.prod(mesh.values())), tuple(mesh.items()))


def unit_step(step: Step, devices: int = 1) -> Step:
    """Returns the step of one token on each device, with the weights of a step.

    Settings that change no count are set to one value: it is a key of caches.
    """
    train = dataclasses.replace(
        step.train, batch_size=devices, gradient_accumulation_steps=1
    )
    compute = dataclasses.replace(
        step.compute, remat="full", attention="auto", scan_layers=True
    )
    return dataclasses.replace(step, length=1, train=train, compute=compute)


@functools.lru_cache(maxsize=64)  # a search tries many lengths of one model
def _model_sizes(step: Step, mesh: tuple[tuple[str, int], ...]) -> _Model:
    names, sizes = zip(*mesh, strict=True)
    state, base, batch = shard_step(
        abstract_arguments(step), AbstractMesh(sizes, names), step.on_host
    )
    weights = recomputed = features = head = 0
    for path, (rows, columns, layers) in linear_modules(base).items():
        if layers is None:
            head += rows * columns
            continue
        weights += rows * columns
        # A product of T tokens reads T * columns and writes T * rows numbers.
        features += rows + columns
        # The backward pass does not need the result of the last product of a layer.
        recomputed += rows * columns * (path[-1] != "down_proj")
    ranks = factors = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.adapters):
        name = str(getattr(path[-1], "key", ""))
        if name in ("lora_A", "lora_B"):
            factors += math.prod(leaf.shape)
        # lora_A is [layers, r, in]: all axes but the last count the ranks of all
        # layers.
        if name == "lora_A":
            ranks += math.prod(leaf.shape[:-1])
    tables: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        name = next((t for t in ("embed_tokens", "lm_head") if t in str(path)), None)
        if name and "fsdp" in leaf.sharding.spec:
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            tables[name] = tables.get(name, 0) + size
    adapters = device_tree_bytes(state.adapters)
    return _Model(
        base=device_tree_bytes(base),
        host_base=device_tree_bytes(base, host=True),
        adapters=adapters,
        optimizer=device_tree_bytes(state) - adapters,
        batch_token=device_tree_bytes(batch),
        layer_weights=weights,
        recomputed_weights=recomputed,
        layer_features=features,
        head_weights=head,
        ranks=ranks,
        factors=factors,
        tables=sum(tables.values()),
        head_table=tables.get("lm_head", tables.get("embed_tokens", 0)),
    )


def step_memory(step: Step, mesh: Mapping[str, int] | None = None) -> StepMemory:
    """Estimates the memory that `StepMemory.of` reads off a compiled step.

    Args:
      step: the step, of all devices together.
      mesh: sizes of the axes "data" and "fsdp"; default one device.
    """
    model = _model(step, mesh)
    # Both axes of the mesh divide the rows; "fsdp" divides the weights as well.
    tokens = step.tokens // math.prod((mesh or {}).values())
    kept = _kept(step, model) * tokens
    offloaded = step.compute.remat == "offload"
    unrolled = not step.compute.scan_layers
    temporaries = _temporaries(step, model, tokens)
    if unrolled:
        # There are no arrays of all layers, of which activations and gradients are told
        # by their shape.
        temporaries += kept * (not offloaded)
    config = step.config
    cudnn = step.compute.attention in ("auto", "cudnn") and not step.packed
    cudnn = cudnn and step.compute.dtype != "float32" and config.head_dim <= 128
    # It has whole rows, no soft cap, and one window for all layers.
    cudnn = cudnn and (mesh or {}).get("context", 1) == 1
    windows = {kind.window for kind in config.layer_kinds}
    cudnn = cudnn and config.attn_logit_softcapping is None and len(windows) == 1
    wide = config.num_attention_heads * config.head_dim
    return StepMemory(
        base=model.base,
        adapters=model.adapters,
        optimizer=model.optimizer,
        batch=model.batch_token * tokens * step.train.gradient_accumulation_steps,
        activations=0 if offloaded or unrolled else kept,
        gradients=0 if unrolled else model.adapters,
        loss=0,
        temporaries=temporaries,
        # cuDNN's backward pass sums dQ [tokens, heads, head_dim] in float32.
        workspace=4 * tokens * wide if cudnn else 0,
        host_base=model.host_base,
        host_activations=kept if offloaded else 0,
    )


def _width(step: Step) -> int:
    """Bytes of an element of the activations."""
    return 4 if step.compute.dtype == "float32" else 2


def _kept(step: Step, model: _Model) -> int:
    """Bytes per token that the forward pass keeps for the backward pass."""
    c, size = step.config, _width(step)
    narrow = c.hidden_size
    heads = c.num_attention_heads * c.head_dim
    # The input of each layer: 32 x 2 x 4,096 bytes, 256 KiB a token, for an 8B model.
    if step.compute.remat in ("full", "offload"):
        return c.num_hidden_layers * size * narrow
    # And attention with its log-sum-exp, a float32 for each head.
    if step.compute.remat == "save_attention":
        layer = size * (narrow + heads) + 4 * c.num_attention_heads
        return c.num_hidden_layers * layer
    pairs = c.num_key_value_heads * c.head_dim
    wide = c.intermediate_size
    if step.compute.remat == "none" and not step.compute.scan_layers:
        # The residual stream before attention and MLP, and its norms; q and attention;
        # k and v; gate, up and what they make, which the kernel of the activation makes
        # again; and what each lora_A makes, with and without its scaling.
        inner = 2 if step.compute.activation == "fused" else 3
        layer = size * (4 * narrow + 2 * heads + 2 * pairs + inner * wide)
        layer += 4 * c.num_attention_heads
        # Sums that are normed before they are added; and tanh or erf in float32, which
        # the compiler does not repeat, where a sigmoid costs it nothing.
        layer += 2 * size * narrow * c.family.post_norms
        layer += 4 * wide * (c.hidden_act != "silu")
        return c.num_hidden_layers * layer + 2 * size * model.ranks
    # Input; q, k, v; attention and its log-sum-exp; o; gate and up; and the product
    # with each lora_A. The backward pass does not need the result of down.
    # 2 narrow: input and o; 2 heads: q and attention; 2 pairs: k and v; 2 wide: gate
    # and up. The log-sum-exp is a float32 for each head.
    layer = size * (2 * narrow + 2 * heads + 2 * pairs + 2 * wide)
    layer += 4 * c.num_attention_heads
    # Where a norm follows the MLP, its derivative needs the result of down as well.
    layer += size * narrow * c.family.post_norms
    total = c.num_hidden_layers * layer + size * model.ranks
    if step.compute.remat == "none":
        total += c.num_hidden_layers * (_NONE_NARROW * narrow + _NONE_WIDE * wide)
    return total


def _temporaries(step: Step, model: _Model, tokens: int) -> int:
    """Returns the largest of the temporaries of MLP, attention and loss."""
    c, size, remat = step.config, _width(step), step.compute.remat
    narrow, wide = size * c.hidden_size, size * c.intermediate_size
    most = mlp_tokens(c.intermediate_size, remat)
    unrolled = not step.compute.scan_layers
    chunk = tokens if most is None else min(tokens, most)
    arrays = _KEPT if most is None else _UNCHUNKED
    if chunk < tokens:
        arrays = _IN_CHUNKS[remat]
    # Weights that are dequantized at a time, then the arrays of all tokens, then those
    # of a chunk.
    layer = arrays.weights * size * model.layer_weights
    if unrolled:
        share = 1.0 if remat == "none" else _UNROLLED_WEIGHTS
        layer += share * size * c.num_hidden_layers * model.layer_weights
    layer += arrays.narrow * narrow * tokens + arrays.wide * wide * chunk
    if tokens * c.hidden_size >= 2**31:
        layer += _LARGE * narrow * tokens
    attention = 0
    if remat in _REPEATS_PRODUCTS and _windows_differ(step):
        # Its backward pass is a branch, with arrays of its own on the way out: q, out
        # and their gradients; k and v, with gradients in float32 and rounded; and what
        # is added up around. Elsewhere attention needs less than the MLP.
        heads = size * c.num_attention_heads * c.head_dim
        pairs = size * c.num_key_value_heads * c.head_dim
        attention = (3 * narrow + 3 * heads + 8 * pairs) * tokens
        # Two blocks of 2^25 scores in float32.
        attention += 2 * 4 * 2**25
    # A chunk of logits in float32, and their gradient.
    # 512 tokens: the loss's chunk for a large vocabulary. A head that is on the host or
    # packed is on the device as a whole while the loss uses it.
    logits = min(tokens, 512) * c.vocab_size * (4 + size)
    table = size * c.vocab_size * c.hidden_size
    loss = logits + narrow * tokens + table * (step.lm_head != "device")
    # Gathered for the loss; or, by several micro-batches, once for all of them.
    held = model.tables * (step.train.gradient_accumulation_steps > 1)
    loss += model.head_table * (not held)
    # The loss comes after the last layer's forward and before its backward pass, so
    # both use the same memory.
    return int(max(layer, attention, loss) + held)


def _windows_differ(step: Step) -> bool:
    """Whether layers have different windows in rows of this length."""
    windows = {kind.window for kind in step.config.layer_kinds}
    return len({None if (w or step.length) >= step.length else w for w in windows}) > 1


# --- The work of a step ---


def flops_per_token(step: Step) -> float:
    """Returns the floating-point operations of a step per token.

    A product with W weights takes 2 W operations per token. The base is frozen, so its
    backward pass has only the gradient of the input and takes as much as the forward
    pass. Attention is causal over entire rows (documents of packed rows take less); its
    backward pass takes 2.5 times the forward pass (5 products instead of 2).
    Recomputation by the policy is included.
    """
    return sum(flops_by_pass(step))


def flops_by_pass(step: Step) -> tuple[float, float, float]:
    """Returns `flops_per_token` of the forward pass, the backward pass and the loss."""
    c, model = step.config, _model(step)
    recompute = step.compute.remat in _REPEATS_PRODUCTS
    head = model.head_weights
    if c.tie_word_embeddings:
        head = c.vocab_size * c.hidden_size
    wide = c.num_attention_heads * c.head_dim
    # Forward: Q K^T and P V take 2 wide for every key that a token sees.
    keys = sum(mean_keys(step.length, kind.window) for kind in c.layer_kinds)
    attention = 4 * keys * wide
    again = recompute and step.compute.remat != "save_attention"
    # 2 W forward, 2 W for the gradient of the input, 2 W where the forward is repeated.
    layers, weights = c.num_hidden_layers, model.layer_weights
    repeated = recompute * model.recomputed_weights
    # Adapters: forward 2; the gradients of weights and inputs 4; recomputed forward 2.
    forward = 2 * layers * weights + attention + 2 * model.factors
    backward = 2 * layers * (weights + repeated) + attention * (2.5 + again)
    backward += model.factors * (4 + 2 * recompute)
    # 4: the loss computes its gradient along with its value, so nothing is repeated.
    return forward, backward, 4 * head


def necessary_flops(step: Step, *, devices: int = 1) -> float:
    """Returns the operations of a step on each device, without recomputation."""
    compute = dataclasses.replace(step.compute, remat="none")
    tokens = step.tokens * step.train.gradient_accumulation_steps / devices
    return flops_per_token(dataclasses.replace(step, compute=compute)) * tokens


def model_flops_per_token(step: Step, lengths: np.ndarray) -> float:
    """Returns the model FLOPs per token, without recomputation and padding.

    Args:
      step: the step.
      lengths: tokens of each document; attention to other documents and to padding does
        not count.
    """
    # A token attends to half of its document: sum(n^2) / sum(n) is the mean length
    # over tokens, in which the work of attention is linear.
    sizes = lengths.astype(float)
    mean = max(round(float((sizes**2).sum() / sizes.sum())), 1)
    compute = dataclasses.replace(step.compute, remat="none")
    return flops_per_token(dataclasses.replace(step, compute=compute, length=mean))


def step_seconds_floor(
    step: Step, gpu: GpuSpec, *, devices: int = 1
) -> dict[str, float]:
    """Returns lower bounds of a step's time by three limits of the GPU, in seconds.

    - compute: all operations at the GPU's dense rate.
    - bandwidth: every weight dequantized once forward and once backward per micro-batch
      (read, written, read), inputs and results of the products once each, adapters and
      optimizer state read and written.
    - host_link: offloaded activations, both ways; tables on the host, one way.

    A step takes longer than the largest of them: no kernel reaches these rates.
    """
    micro = step.train.gradient_accumulation_steps
    tokens = step.tokens * micro / devices
    rate = gpu.flops
    if step.compute.dtype == "float32":
        rate = gpu.flops / 16  # without tensor cores, on the best of these GPUs
    size, layers = _width(step), step.config.num_hidden_layers
    recompute = step.compute.remat in _REPEATS_PRODUCTS
    memory, model = step_memory(step), _model(step)
    # Written when dequantized, and read by the product.
    unpacked = 2 * size * layers * model.layer_weights if step.quantization else 0
    traffic = 2 * micro * (memory.base + memory.host_base + unpacked)
    # Forward and backward pass, and the forward pass again where it is recomputed.
    traffic += tokens * size * layers * model.layer_features * (2 + recompute)
    traffic += 3 * (memory.adapters + memory.optimizer)
    # To the host in the forward pass, and back in the backward pass.
    offloaded = 2 * memory.host_activations * micro / devices
    fetched = 2 * memory.host_base * micro
    return {
        "compute": flops_per_token(step) * tokens / rate,
        "bandwidth": traffic / gpu.bandwidth,
        "host_link": (offloaded + fetched) / gpu.host_link,
    }


# --- Parameters ---


@dataclass(frozen=True)
class ParameterReport:
    """Counts and bytes of a model with adapters."""

    base_parameters: int
    """Weights and biases of the base."""
    base_bytes: int
    """Bytes of the base in memory."""
    trainable_parameters: int
    """Parameters that the optimizer changes."""
    groups: Mapping[str, int]
    """Trainable parameters by adapted module."""
    optimizer_bytes: int
    """Bytes of the optimizer state."""


def parameter_report(
    config: LlamaConfig,
    lora: LoraConfig | None,
    *,
    quantization: str | None = "nf4_dq",
    quantize_lm_head: bool = False,
    dtype: str = "bfloat16",
    train: TrainConfig | None = None,
) -> ParameterReport:
    """Counts parameters and bytes.

    Args:
      config: architecture.
      lora: the adapters; None = none.
      quantization: as `abstract_base` takes it.
      quantize_lm_head: the same.
      dtype: of dense tensors.
      train: the optimizer; default AdamW.

    Raises:
      UserError: `lora` targets no module of this model.
    """
    dense = abstract_base(config, dtype=dtype)
    held = abstract_base(
        config,
        quantization=quantization,
        quantize_lm_head=quantize_lm_head,
        dtype=dtype,
    )
    groups: dict[str, int] = {}
    optimizer_bytes = 0
    if lora is not None:
        selection = select(dense, lora)
        groups = selection.groups()
        adapters = abstract_adapters(dense, lora)
        train = TrainConfig(steps=1) if train is None else train
        optimizer = make_optimizer(train, 1, selection)
        optimizer_bytes = tree_bytes(jax.eval_shape(optimizer.init, adapters))
    return ParameterReport(
        base_parameters=tree_size(dense),
        base_bytes=tree_bytes(held),
        trainable_parameters=sum(groups.values()),
        groups=groups,
        optimizer_bytes=optimizer_bytes,
    )


def estimate_warnings(
    config: LlamaConfig, lora: LoraConfig, base: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns warnings about settings with surprising effects, with figures.

    Args:
      config: architecture.
      lora: the adapters.
      base: parameter tree of the model, of arrays or shapes, if it has modules that
        `config` does not list.

    Raises:
      UserError: as `parameter_report`.
    """
    base = abstract_base(config) if base is None else base
    selection = select(base, lora)
    # Tables that are trained in full, each counted once.
    tables = {
        w.path[-2]: math.prod(w.shape)
        for w in selection.full_tensors
        if w.path[:-1] in (EMBEDDING, HEAD) and w.tied_to is None
    }
    return [
        *_selection_warnings(config, lora, base, selection),
        *_table_warnings(tables, sum(selection.groups().values())),
        *_padding_warnings(selection),
        *_tying_warnings(config, lora, tables),
    ]


def _selection_warnings(
    config: LlamaConfig,
    lora: LoraConfig,
    base: Mapping[str, Any],
    selection: Selection,
) -> Iterator[str]:
    modules = {path[-2] for path, _ in trees.walk(base)}
    for name in selection.unmatched:
        yield (
            f"target module {name!r} selects nothing in this model."
            f"{rows_of(name, modules) or did_you_mean(name, modules)}"
        )
    absent = absent_layers(lora, config.num_hidden_layers)
    if absent:
        yield (
            f"`layers_to_transform` names {', '.join(map(str, absent))}; this model "
            f"has layers 0 to {config.num_hidden_layers - 1}."
        )
    for name in unused_exclusions(lora, base):
        yield f"{name} names no module of this model."
    for pattern in unused_patterns(lora, selection):
        yield f"{pattern} sets nothing: it is the first to match no adapted module."
    biases = [w for w in selection.full_tensors if w.path[-1] == "bias"]
    if lora.bias != "none" and not biases:
        reason = "this model has no biases"
        if lora.bias == "lora_only":
            reason = "no adapted module of this model has one"
        yield f"`bias`={lora.bias!r} trains nothing: {reason}."


def _table_warnings(tables: Mapping[str, int], total: int) -> Iterator[str]:
    count = sum(tables.values())
    # float32: 4 bytes of the file each, and 2 x 4 of AdamW's moments.
    if 2 * count > total:
        yield (
            f"{' and '.join(sorted(tables))}, trained in full, make {count:,} of "
            f"{total:,} trained parameters ({count / total:.0%}): "
            f"{readable_bytes(4 * count)} of the adapter file and "
            f"{readable_bytes(8 * count)} of AdamW's state. "
            "`trainable_token_indices` trains single rows."
        )


def _padding_warnings(selection: Selection) -> Iterator[str]:
    total = sum(selection.groups().values())
    stored = sum(map(math.prod, selection.shapes().values()))
    if stored > 1.1 * total:
        # Parameter and two moments in float32: 12 bytes for each.
        extra = readable_bytes(12 * (stored - total))
        yield (
            f"ranks differ among layers, so the arrays in memory hold {stored:,} "
            f"numbers for {total:,} trained parameters ({extra} more with AdamW's "
            "state); the adapter file holds only the trained ones."
        )


def _tying_warnings(
    config: LlamaConfig, lora: LoraConfig, tables: Mapping[str, int]
) -> Iterator[str]:
    if config.tie_word_embeddings and len(tables) == 1 and not lora.ensure_weight_tying:
        trained, frozen = "embed_tokens", "lm_head"
        if "lm_head" in tables:
            trained, frozen = frozen, trained
        yield (
            f"this model ties embed_tokens and lm_head; {trained} is trained "
            f"separately, and {frozen} keeps the base's table. `ensure_weight_tying` "
            "trains both as one."
        )
