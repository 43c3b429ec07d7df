"""Says where `model.fusion = "fused"` has no effect, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated.api import refusal as gated_refusal
from pallas_kernels.norm.api import refusal as norm_refusal
from qlora_jax import nf4
from qlora_jax.models import Llama, LlamaConfig, mlp_chunks, mlp_tokens

# Of a layer's "lora" node: plain LoRA, and a bias, which is added on its own.
_PLAIN = {"lora_A", "lora_B", "scaling", "bias", "bias_trained"}
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_ACTIVATION = "the MLP's activation"


def fusion_note(
    model: Llama,
    base: Any,
    adapters: Any,
    rows: int,
    length: int,
    *,
    planned: bool = False,
) -> str | None:
    """Returns a note on what is not computed in one pass although it should be.

    Args:
      model: the architecture and how it is computed.
      base: the frozen tree, arrays or shapes.
      adapters: the "lora" tree, likewise.
      rows: of a micro-batch, on each device.
      length: tokens of a row, on each device.
      planned: whether this is not for the device at hand but for a Hopper GPU.
    """
    if planned:
        products = "separate" if model.compute.remat == "offload" else "joined"
        compute = dataclasses.replace(model.compute, lora_products=products)
        model = model.clone(compute=compute)
    if model.compute.norms != "fused":
        return None
    problems = list(_problems(model, base, adapters, rows, length, planned))
    if not problems:
        return None
    joined = "; nor on ".join(problem.removesuffix(".") for problem in problems)
    return f"Note: model.fusion = 'fused' has no effect on {joined}."


def _problems(
    model: Llama, base: Any, adapters: Any, rows: int, length: int, planned: bool
) -> Iterator[str]:
    config, compute = model.config, model.compute
    if not compute.joins_products:
        where = "remat = 'offload'" if compute.remat == "offload" else "a CPU"
        yield f"{where}, where the products of adapters are computed on their own"
        return
    if config.family.fused or compute.reads_stacks:
        yield (
            f"this model: it is for packed {', '.join(_QKV)}, {', '.join(_GATE_UP)} "
            "and down_proj that XLA dequantizes"
        )
        return
    post_norms = config.family.post_norms
    groups = {
        "input_layernorm": ("self_attn", _QKV),
        "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm": (
            *("mlp", _GATE_UP),
        ),
        _ACTIVATION: ("mlp", (*_GATE_UP, "down_proj")),
    }
    limit = mlp_tokens(config.intermediate_size, compute.remat)
    chunks = mlp_chunks(rows, length, limit)
    custom = {"self_attn": model.attention_cls, "mlp": model.mlp_cls}
    for name, (module, linears) in groups.items():
        if custom[module] is not None:
            yield f"{name}: `{module}` is a class of its own"
            continue
        frozen, trained = (
            tree.get("model", {}).get("layers", {}).get(module, {})
            for tree in (base, adapters)
        )
        if reason := _of_layers(frozen, trained, linears):
            yield f"{name}: {reason}"
            continue
        if compute.lora is not None and compute.lora.lora_dropout:
            yield f"{name}: `lora_dropout` acts on the input of each adapter"
            continue
        if module == "mlp" and chunks > 1:
            yield (
                f"{name}: with remat = '{compute.remat}' the MLP takes {rows:,} x "
                f"{length:,} tokens in {chunks} chunks"
            )
            continue
        ranks = [trained[linear]["lora_A"].shape[-2] for linear in linears]
        if name == _ACTIVATION:
            if reason := _of_activation(config, frozen, linears):
                yield f"{name}: {reason}"
                continue
            width = 2 * config.intermediate_size
            refuse: Any = partial(gated_refusal, ranks=tuple(map(_padded, ranks)))
        else:
            width = config.hidden_size
            if sum(frozen[linear]["weight"].shape[0] for linear in linears) <= width:
                yield f"{name}: {', '.join(linears)} are no wider than their input"
                continue
            refuse = partial(norm_refusal, rank=_padded(sum(ranks)))
        shape = (rows * length, width)
        refuse = partial(refuse, interpret=planned)
        if reason := _of_shape(refuse, shape, jnp.dtype(compute.dtype)):
            yield f"{name}: {reason}"


def _of_layers(
    frozen: Mapping[str, Any], trained: Mapping[str, Any], linears: tuple[str, ...]
) -> str | None:
    """Returns why products of the layers are not joined, or None."""
    nodes, names = [frozen[linear] for linear in linears], ", ".join(linears)
    if not all(isinstance(node["weight"], nf4.NF4Tensor) for node in nodes):
        return f"not all of {names} are packed"
    if any("residual_A" in node for node in nodes):
        return f"what the adapters of {names} begin with is subtracted from the weights"
    for linear in linears:
        adapter = trained.get(linear, {})
        if "lora_A" not in adapter or not set(adapter) <= _PLAIN:
            return f"not all of {names} have an adapter of plain LoRA"
    return None


def _of_activation(
    config: LlamaConfig, frozen: Mapping[str, Any], linears: tuple[str, ...]
) -> str | None:
    """Returns why an activation between joined products is on its own, or None."""
    if config.hidden_act != "silu":
        return f"it is {config.hidden_act}, not silu"
    if any("bias" in frozen[linear] for linear in linears):
        return f"{', '.join(linears)} have biases"
    if config.hidden_size > config.intermediate_size:
        return "it is narrower than the residual stream"
    return None


def _padded(rank: int) -> int:
    return rank + -rank % 16


def _of_shape(refuse: Any, shape: tuple[int, int], dtype: Any) -> str | None:
    """Calls a function of an array with an abstract one."""
    reasons: list[str | None] = []
    jax.eval_shape(
        lambda x: reasons.append(refuse(x)), jax.ShapeDtypeStruct(shape, dtype)
    )
    return reasons[0]
