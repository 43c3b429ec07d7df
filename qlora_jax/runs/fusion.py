"""Says where `model.fusion = "fused"` has no effect, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated.api import refusal as gated_refusal
from pallas_kernels.norm.api import refusal as norm_refusal
from qlora_jax.models import Llama

_PLAIN = {"lora_A", "lora_B", "scaling"}
_ACTIVATION = "the MLP's activation"
_GROUPS = {
    "input_layernorm": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "post_attention_layernorm": ("mlp", ("gate_proj", "up_proj")),
    _ACTIVATION: ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def fusion_note(
    model: Llama, adapters: Any, rows: int, *, quantized: bool
) -> str | None:
    """Returns a note on what is not computed in one pass although it should be.

    Args:
      model: the architecture and how it is computed.
      adapters: the "lora" tree, arrays or shapes.
      rows: tokens of a micro-batch, over all of its rows.
      quantized: whether the linear layers are packed.
    """
    if model.compute.norms != "fused":
        return None
    problems = list(_problems(model, adapters, rows, quantized))
    if not problems:
        return None
    joined = "; nor on ".join(problem.removesuffix(".") for problem in problems)
    return f"Note: model.fusion = 'fused' has no effect on {joined}."


def _problems(model: Llama, adapters: Any, rows: int, quantized: bool) -> Iterator[str]:
    config, compute = model.config, model.compute
    layers = adapters.get("model", {}).get("layers", {})
    if not compute.joins_products:
        where = "remat = 'offload'" if compute.remat == "offload" else "a CPU"
        yield f"{where}: there the products of adapters are not part of the weights'"
        return
    if not quantized or config.family.fused or compute.kernels == "pallas":
        yield (
            "this model: it is for packed q_proj, k_proj, v_proj, gate_proj, up_proj "
            "and down_proj that XLA dequantizes"
        )
        return
    dtype = jnp.dtype(compute.dtype)
    for name, (module, linears) in _GROUPS.items():
        tree: Mapping[str, Any] = layers.get(module, {})
        ranks = _ranks(tree, linears)
        if ranks is None:
            names = ", ".join(linears)
            yield f"{name}: not all of {names} have an adapter of plain LoRA"
            continue
        if compute.lora is not None and compute.lora.lora_dropout:
            yield f"{name}: `lora_dropout` acts on the input of each adapter"
            continue
        if name == _ACTIVATION:
            if config.hidden_act != "silu":
                yield f"{name}: it is {config.hidden_act}, not silu"
                continue
            shape = (rows, 2 * config.intermediate_size)
            refuse: Any = lambda x, r=ranks: gated_refusal(x, tuple(map(_padded, r)))  # noqa: E731
        else:
            shape = (rows, config.hidden_size)
            refuse = lambda x, r=ranks: norm_refusal(x, _padded(sum(r)))  # noqa: E731
        if reason := _of_shape(refuse, shape, dtype):
            yield f"{name}: {reason}"


def _ranks(tree: Mapping[str, Any], linears: tuple[str, ...]) -> list[int] | None:
    """Returns the rank of each layer; None if one has no adapter of plain LoRA."""
    ranks = []
    for linear in linears:
        adapter = tree.get(linear, {})
        if "lora_A" not in adapter or not set(adapter) <= _PLAIN:
            return None
        ranks.append(adapter["lora_A"].shape[-2])
    return ranks


def _padded(rank: int) -> int:
    return rank + -rank % 16


def _of_shape(refuse: Any, shape: tuple[int, int], dtype: Any) -> str | None:
    """Calls a function of an array with an abstract one."""
    reasons: list[str | None] = []
    jax.eval_shape(
        lambda x: reasons.append(refuse(x)), jax.ShapeDtypeStruct(shape, dtype)
    )
    return reasons[0]
