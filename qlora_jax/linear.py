"""The linear layer: the one place where a weight, packed or dense, meets an adapter.

`linear` is the computation, `Linear` the thin Flax module that finds its weight in the
"params" collection and its adapter, if it has one, in the "lora" collection under the
same path. A layer of yours that builds its projections with `Linear` can be adapted by
naming them in `target_modules`; no list of accepted modules exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.product import dense_matmul
from qlora_jax import lora as lora_lib
from qlora_jax import nf4
from qlora_jax.config import LoraConfig
from qlora_jax.errors import UserError


@dataclass(frozen=True)
class Compute:
    """How a model is computed; what it is stands in its configuration. Hashable."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Activations and matrix products; sums, norms and softmax are float32."""
    attention: Literal["auto", "eager", "xla", "cudnn"] = "auto"
    """Attention implementation; see `qlora_jax.attention`."""
    remat: Literal["none", "full", "save_matmuls"] = "full"
    """What the backward pass recomputes: nothing, each layer from its input, or each
    layer but for the results of its matrix products and its attention."""
    lora: LoraConfig | None = None
    """Scaling and dropout of the adapters in the "lora" collection."""

    def __post_init__(self) -> None:
        for name, accepted in (
            ("dtype", ("bfloat16", "float16", "float32")),
            ("attention", ("auto", "eager", "xla", "cudnn")),
            ("remat", ("none", "full", "save_matmuls")),
        ):
            if getattr(self, name) not in accepted:
                raise UserError(
                    f"`{name}` must be one of {', '.join(accepted)}, got "
                    f"{getattr(self, name)!r}."
                )


def linear(
    x: Float[Array, "*B I"],
    weight: Any,
    bias: Float[Array, " O"] | None = None,
    adapter: Mapping[str, Array] | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    key: Array | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B O"]:
    """Computes `W x + bias + scaling * B (A x)`.

    Args:
      x: inputs, features last.
      weight: [O, I] array or `NF4Tensor`.
      bias: [O], optional.
      adapter: {"lora_A": [R, I], "lora_B": [O, R]}, optional.
      scaling: factor of the adapter's update.
      dropout: of the adapter's input.
      key: PRNG key for the dropout.
      dtype: of the result; default that of `x`. Products are those of the dtype of
        `x` either way; float32 logits are thus not rounded to bf16 first.

    Returns:
      [..., O] in `dtype`.
    """
    dtype = x.dtype if dtype is None else dtype
    y: Any  # type checkers do not see through `custom_vjp`
    if isinstance(weight, nf4.NF4Tensor):
        y = nf4.matmul(x, weight, dtype)
    else:
        y = dense_matmul(x, weight, dtype)
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
    if adapter is not None:
        update = lora_lib.delta(x, adapter, scaling, dropout=dropout, key=key)
        y = y + update.astype(dtype)
    return checkpoint_name(y, "linear_out")


class Linear(nn.Module):
    """A linear layer with optional bias and optional adapter.

    Collections: "params" {weight: [O, I] or NF4Tensor, bias: [O]}, "lora" {lora_A:
    [R, I], lora_B: [O, R]}. Dropout acts on the adapter's input when a "dropout" PRNG
    key is given to `apply`.
    """

    features: int
    compute: Compute = Compute()
    use_bias: bool = False
    initializer_range: float = 0.02

    @nn.compact
    def __call__(self, x: Array, dtype: DTypeLike | None = None) -> Array:
        """Maps [..., I] to [..., O], in the dtype of `x` unless told otherwise."""
        # `self.param` compares shapes, which a packed leaf does not have.
        if self.has_variable("params", "weight"):
            weight = self.get_variable("params", "weight")
        else:
            weight = self.param(
                "weight",
                nn.initializers.normal(self.initializer_range),
                (self.features, x.shape[-1]),
                jnp.float32,
            )
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            if self.use_bias
            else None
        )
        adapter = None
        scaling = dropout = 0.0
        key = None
        if self.has_variable("lora", "lora_A"):
            config = self.compute.lora
            if config is None:
                raise UserError(
                    f"`{'.'.join(self.path)}` has an adapter, but the model was built "
                    "without a LoRA configuration. Build it with "
                    "`Compute(lora=lora_config)`, which states the scaling."
                )
            adapter = {
                name: self.get_variable("lora", name) for name in ("lora_A", "lora_B")
            }
            scaling, dropout = config.scaling, config.lora_dropout
            if dropout > 0.0 and self.has_rng("dropout"):
                key = self.make_rng("dropout")
        with jax.named_scope(self.name or "linear"):
            return linear(
                x,
                weight,
                bias,
                adapter,
                scaling=scaling,
                dropout=dropout,
                key=key,
                dtype=dtype,
            )
