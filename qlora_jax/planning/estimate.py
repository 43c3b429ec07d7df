"""The memory and the work of a training step in closed form, without a compiler.

What is certain is counted: arguments, gradients and what a policy keeps, by their
shapes. What a layer needs while it is at work depends on how the compiler schedules it;
that part is a number of arrays [tokens, features], read off compiled plans and held to
within 10 % of them by the tests, over models, lengths and policies.

What a run trains and stores, counted before it starts.

Counts come from abstract shapes (`jax.eval_shape`), so a `config.json` is enough and
nothing is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from qlora_jax import tree as trees
from qlora_jax.errors import did_you_mean, readable_bytes
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.lora.targets import absent_layers, linear_modules, select
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import mlp_tokens
from qlora_jax.models.params import abstract_base, tree_bytes, tree_size
from qlora_jax.models.sharding import is_on_host, local_bytes, shard_step
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.planning.step import Step, StepMemory, abstract_arguments
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.tree import EMBEDDING, HEAD


@dataclass(frozen=True)
class _Arrays:
    """What an MLP needs at work, in arrays of activations."""

    weights: float
    """Of all weights of a layer, those that are unpacked at a time."""
    narrow: float
    """[tokens, hidden_size]."""
    wide: float
    """[tokens of a chunk, intermediate_size]."""


# Read off compiled plans of 1B, 3B and 8B models.
_WHOLE = _Arrays(weights=0.74, narrow=3.1, wide=7.0)
_IN_CHUNKS = {
    "full": _Arrays(weights=0.9, narrow=6.2, wide=7.0),
    # Layer inputs on their way from and to the host.
    "offload": _Arrays(weights=0.9, narrow=7.2, wide=6.0),
}
_KEPT = _Arrays(weights=0.3, narrow=4.3, wide=3.0)
# Where [tokens, hidden_size] has 2^31 elements or more, the compiler fuses less and
# holds half of one more.
_LARGE = 0.5
# Bytes for each token of a layer that "none" keeps beside what "save_matmuls" does: of
# each hidden and each intermediate feature, some of them in float32.
_NONE_NARROW, _NONE_WIDE = 10, 18


@dataclass(frozen=True)
class _Model:
    """What does not depend on the length or the number of rows."""

    base: int
    host_base: int
    adapters: int
    optimizer: int
    """Bytes on a device."""
    row: int
    """Bytes of the batch for each of its tokens."""
    layer_weights: int
    """Weights of the linear layers of one layer of the model, ..."""
    recomputed_weights: int
    """... and of those whose results a recomputation needs."""
    layer_features: int
    """Their inputs and outputs."""
    head_weights: int
    """Of linear layers outside: the head."""
    ranks: int
    """Of all adapters of linear layers together."""
    factors: int
    """Numbers in their As and Bs."""


def _model(step: Step, mesh: Mapping[str, int] | None = None) -> _Model:
    devices = math.prod((mesh or {}).values())
    train = dataclasses.replace(
        step.train, batch_size=devices, gradient_accumulation_steps=1
    )
    compute = dataclasses.replace(step.compute, remat="full", attention="auto")
    usual = dataclasses.replace(step, length=1, train=train, compute=compute)
    return _count(usual, tuple((mesh or {"data": 1}).items()))


@functools.lru_cache(maxsize=64)  # a search asks for many lengths of one model
def _count(step: Step, mesh: tuple[tuple[str, int], ...]) -> _Model:
    names, sizes = zip(*mesh, strict=True)
    state, base, batch = shard_step(
        abstract_arguments(step), AbstractMesh(sizes, names), step.on_host
    )
    weights = again = features = head = 0
    for path, (rows, columns, layers) in linear_modules(base).items():
        if layers is None:
            head += rows * columns
            continue
        weights += rows * columns
        features += rows + columns
        # Nothing needs the result of the last product of a layer again.
        again += rows * columns * (path[-1] != "down_proj")
    ranks = factors = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.adapters):
        name = str(getattr(path[-1], "key", ""))
        if name in ("lora_A", "lora_B"):
            factors += math.prod(leaf.shape)
        if name == "lora_A":
            ranks += math.prod(leaf.shape[:-1])
    adapters = _bytes(state.adapters)
    return _Model(
        base=_bytes(base),
        host_base=_bytes(base, host=True),
        adapters=adapters,
        optimizer=_bytes(state) - adapters,
        row=_bytes(batch),
        layer_weights=weights,
        recomputed_weights=again,
        layer_features=features,
        head_weights=head,
        ranks=ranks,
        factors=factors,
    )


def _bytes(tree: Any, *, host: bool = False) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(local_bytes(leaf) for leaf in leaves if is_on_host(leaf) == host)


def step_memory(step: Step, mesh: Mapping[str, int] | None = None) -> StepMemory:
    """Estimates what `StepMemory.of` reads off a compiled step.

    Args:
      step: the step, of all devices together.
      mesh: sizes of the axes "data" and "fsdp"; default one device.
    """
    model = _model(step, mesh)
    tokens = step.tokens // math.prod((mesh or {}).values())
    kept = _kept(step, model) * tokens
    offloaded = step.compute.remat == "offload"
    config = step.config
    cudnn = step.compute.attention in ("auto", "cudnn") and not step.packed
    cudnn = cudnn and step.compute.dtype != "float32" and config.head_dim <= 128
    wide = config.num_attention_heads * config.head_dim
    return StepMemory(
        base=model.base,
        adapters=model.adapters,
        optimizer=model.optimizer,
        batch=model.row * tokens * step.train.gradient_accumulation_steps,
        activations=0 if offloaded else kept,
        gradients=model.adapters,
        loss=0,
        temporaries=_temporaries(step, model, tokens),
        workspace=4 * tokens * wide if cudnn else 0,
        host_base=model.host_base,
        host_activations=kept if offloaded else 0,
    )


def _width(step: Step) -> int:
    """Bytes of an element of the activations."""
    return 4 if step.compute.dtype == "float32" else 2


def _kept(step: Step, model: _Model) -> int:
    """Bytes that the forward pass keeps for the backward pass, for each token."""
    c, size = step.config, _width(step)
    narrow = c.hidden_size
    if step.compute.remat in ("full", "offload"):
        return c.num_hidden_layers * size * narrow
    heads = c.num_attention_heads * c.head_dim
    pairs = c.num_key_value_heads * c.head_dim
    wide = c.intermediate_size
    # Input; q, k, v; attention and its log-sum-exp; o; gate and up; and the rank-wide
    # product of each adapter. Nothing needs the result of down.
    layer = size * (2 * narrow + 2 * heads + 2 * pairs + 2 * wide)
    layer += 4 * c.num_attention_heads
    total = c.num_hidden_layers * layer + size * model.ranks
    if step.compute.remat == "none":
        total += c.num_hidden_layers * (_NONE_NARROW * narrow + _NONE_WIDE * wide)
    return total


def _temporaries(step: Step, model: _Model, tokens: int) -> int:
    """The larger of what a layer's MLP and the loss need at work.

    Attention needs less than the MLP.
    """
    c, size, remat = step.config, _width(step), step.compute.remat
    narrow, wide = size * c.hidden_size, size * c.intermediate_size
    most = mlp_tokens(c.intermediate_size, remat)
    chunk = tokens if most is None else min(tokens, most)
    arrays = _KEPT if most is None else _WHOLE
    if chunk < tokens:
        arrays = _IN_CHUNKS[remat]
    layer = arrays.weights * size * model.layer_weights
    layer += arrays.narrow * narrow * tokens + arrays.wide * wide * chunk
    if tokens * c.hidden_size >= 2**31:
        layer += _LARGE * narrow * tokens
    # A chunk of logits in float32, and their gradient.
    logits = min(tokens, 512) * c.vocab_size * (4 + size)
    table = size * c.vocab_size * c.hidden_size
    loss = logits + narrow * tokens + table * (step.lm_head != "device")
    return int(max(layer, loss))


# --- The work of a step ---


def flops_per_token(step: Step) -> float:
    """Floating-point operations of a step for each of its tokens.

    A product of matrices counts 2 for each multiplication; the base has no gradient of
    its own, so backward is as much as forward. Attention is causal over whole rows
    (documents of packed rows take less); its backward pass is 2.5 times the forward
    one, which computes the scores once. What the policy recomputes is included.
    """
    c, model = step.config, _model(step)
    again = step.compute.remat in ("full", "offload")
    linear = 4 * model.layer_weights + 2 * again * model.recomputed_weights
    head = model.head_weights
    if c.tie_word_embeddings:
        head = c.vocab_size * c.hidden_size
    wide = c.num_attention_heads * c.head_dim
    attention = 2 * step.length * wide * (1 + 2.5 + again)
    # Forward, their two gradients, the input's, and forward again.
    adapters = model.factors * (2 + 4 + 2 * again)
    return c.num_hidden_layers * (linear + attention) + 4 * head + adapters


def model_flops_per_token(step: Step, lengths: np.ndarray) -> float:
    """What the model needs for each token: nothing recomputed, no padding.

    Args:
      step: the step.
      lengths: tokens of each document that it trains on; attention to other documents
        and to padding is no work of the model.
    """
    # A token attends to half of its document: sum(n^2) / sum(n) is the mean length
    # over tokens, in which the work of attention is linear.
    sizes = lengths.astype(float)
    mean = max(round(float((sizes**2).sum() / sizes.sum())), 1)
    compute = dataclasses.replace(step.compute, remat="none")
    return flops_per_token(dataclasses.replace(step, compute=compute, length=mean))


def step_seconds_floor(
    step: Step, card: GpuSpec, *, devices: int = 1
) -> dict[str, float]:
    """What a step takes at least, by each of three limits of the card, in seconds.

    - compute: all operations at the card's dense rate.
    - bandwidth: every weight unpacked once forward and once backward for each
      micro-batch (read, written, read), inputs and results of the products once each,
      adapters and moments of the optimizer read and written.
    - host_link: what is offloaded, out and back in; tables on the host, in.

    A step takes at least the largest of them, and more: no kernel reaches these rates.
    """
    micro = step.train.gradient_accumulation_steps
    tokens = step.tokens * micro / devices
    rate = card.flops
    if step.compute.dtype == "float32":
        rate = card.flops / 16  # without tensor cores, at the best of these cards
    size, layers = _width(step), step.config.num_hidden_layers
    recompute = step.compute.remat in ("full", "offload")
    memory, model = step_memory(step), _model(step)
    unpacked = 2 * size * layers * model.layer_weights if step.quantization else 0
    traffic = 2 * micro * (memory.base + memory.host_base + unpacked)
    traffic += tokens * size * layers * model.layer_features * (2 + recompute)
    traffic += 3 * (memory.adapters + memory.optimizer)
    offloaded = 2 * memory.host_activations * micro / devices
    fetched = 2 * memory.host_base * micro
    return {
        "compute": flops_per_token(step) * tokens / rate,
        "bandwidth": traffic / card.bandwidth,
        "host_link": (offloaded + fetched) / card.host_link,
    }


@dataclass(frozen=True)
class ParameterReport:
    """Counts and bytes of a model with adapters."""

    base_parameters: int
    """Weights and biases of the base."""
    base_bytes: int
    """Bytes of the base as it is held for training."""
    trainable_parameters: int
    """Parameters that the optimizer changes."""
    groups: Mapping[str, int]
    """Trainable parameters by adapted module."""
    optimizer_bytes: int
    """Bytes of the optimizer's state."""


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
      lora: what is trained; None = nothing.
      quantization: as `abstract_base` takes it.
      quantize_lm_head: the same.
      dtype: of dense tensors.
      train: the optimizer; default AdamW.

    Raises:
      UserError: `lora` targets nothing in this model.
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


def warnings(
    config: LlamaConfig, lora: LoraConfig, base: Mapping[str, Any] | None = None
) -> list[str]:
    """What a user may not expect of these settings, with figures.

    Args:
      config: architecture.
      lora: what is to be trained.
      base: parameter tree of the model, of arrays or shapes, where it has modules that
        `config` does not list.

    Raises:
      UserError: as `parameter_report`.
    """
    base = abstract_base(config) if base is None else base
    selection = select(base, lora)
    groups = selection.groups()
    total = sum(groups.values())
    out = [_unmatched(name, base) for name in selection.unmatched]
    absent = absent_layers(lora, config.num_hidden_layers)
    if absent:
        out.append(
            f"`layers_to_transform` names {', '.join(map(str, absent))}; this model "
            f"has layers 0 to {config.num_hidden_layers - 1}."
        )
    biases = [w for w in selection.full_tensors if w.path[-1] == "bias"]
    if lora.bias != "none" and not biases:
        whose = "this model has no biases"
        if lora.bias == "lora_only":
            whose = "no adapted module of this model has one"
        out.append(f"`bias`={lora.bias!r} trains nothing: {whose}.")
    tables = {
        w.path[-2]: math.prod(w.shape)
        for w in selection.full_tensors
        if w.path[:-1] in (EMBEDDING, HEAD) and w.tied_to is None
    }
    if 2 * sum(tables.values()) > total:
        names = " and ".join(sorted(tables))
        count = sum(tables.values())
        out.append(
            f"{names}, trained whole, make {count:,} of {total:,} trained parameters "
            f"({count / total:.0%}): {readable_bytes(4 * count)} of the adapter file "
            f"and {readable_bytes(8 * count)} of AdamW's state. "
            "`trainable_token_indices` trains single rows."
        )
    held = sum(map(math.prod, selection.shapes().values()))
    if held > 1.1 * total:
        out.append(
            f"ranks differ among layers, so the arrays in memory hold {held:,} numbers "
            f"for {total:,} trained parameters ({readable_bytes(12 * (held - total))} "
            "more with AdamW's state); the adapter file holds the trained ones alone."
        )
    if config.tie_word_embeddings and len(tables) == 1 and not lora.ensure_weight_tying:
        name, other = ("embed_tokens", "lm_head")
        if "lm_head" in tables:
            name, other = other, name
        out.append(
            f"this model ties embed_tokens and lm_head; {name} is trained apart, and "
            f"{other} keeps the base's table. `ensure_weight_tying` trains both as one."
        )
    return out


def _unmatched(name: str, base: Mapping[str, Any]) -> str:
    modules = {path[-2] for path, _ in trees.walk(base)}
    return (
        f"target module {name!r} selects nothing in this model."
        f"{did_you_mean(name, modules)}"
    )
