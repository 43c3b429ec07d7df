"""Layers with weights: the one place where a weight, packed or dense, meets an adapter.

`linear` and `embed` are the computations; `Linear`, `Embed` and `RMSNorm` the thin Flax
modules that find their weight in the "params" collection and what is trained, if
anything is, in the "lora" collection under the same path. A layer of yours that is
built of them can be adapted by naming its parts in `target_modules` or
`modules_to_save`; no list of accepted modules exists.

The "lora" collection holds what `qlora_jax.lora.functional.bind` returns. A trained tree that
needs no constants of its own (one rank and scaling for all) can be given as it is; the
scaling is then that of `Compute.lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.nf4.api import measured
from pallas_kernels.product import dense_matmul
from qlora_jax import nf4
from qlora_jax.choices import Attention, Dtype, Kernels, Remat
from qlora_jax.errors import UserError
from qlora_jax.lora import functional as lora_lib
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.sharding import gathered, on_device


@dataclass(frozen=True)
class Compute:
    """How a model is computed; what it is stands in its configuration. Hashable."""

    dtype: Dtype = "bfloat16"
    """Activations and matrix products; sums, norms and softmax are float32."""
    attention: Attention = "auto"
    """Attention implementation; see `qlora_jax.models.attention`."""
    remat: Remat = "full"
    """What the backward pass recomputes: nothing; each layer from its input; each layer
    but for the results of its matrix products and its attention; or each layer from its
    input, which in the meantime lies in the host's memory."""
    kernels: Kernels = "auto"
    """Of products with packed weights: XLA's, kernels of our own for GPUs, or the best
    known for the device; see `pallas_kernels.nf4`."""
    lora: LoraConfig | None = None
    """Of the adapters in the "lora" collection: their dropout, what training binds them
    with, and the scaling of a tree that is not bound."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", get_args(Dtype)),
            ("attention", get_args(Attention)),
            ("remat", get_args(Remat)),
            ("kernels", get_args(Kernels)),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"`{name}` must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def implementation(self) -> str | None:
        """`kernels` as `pallas_kernels` takes it."""
        return None if self.kernels == "auto" else self.kernels

    def place(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Arranges variables as the chosen kernels read them best.

        To be called inside the jitted function that calls `apply`. What comes back
        means the same to every module; where our kernels may be chosen, the packed
        stacks of the layers are in a collection of their own (`nf4.lift_stacks`).

        Args:
          variables: {"params": base, "lora": adapters}.
        """
        ours = self.kernels == "pallas" or (self.kernels == "auto" and measured())
        if not ours or "stacks" in variables:
            return dict(variables)
        params, stacks = nf4.lift_stacks(variables["params"])
        return {**variables, "params": params, "stacks": stacks}


def linear(
    x: Float[Array, "*B I"],
    weight: Any,
    bias: Float[Array, " O"] | None = None,
    adapter: Mapping[str, Array] | None = None,
    *,
    scaling: float | Array = 1.0,
    residual: tuple[Array, Array] | None = None,
    dropout: float = 0.0,
    key: Array | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B O"]:
    """Computes `W x + bias + scaling * B (A x)`, or its DoRA.

    With a magnitude m in the adapter, `g (W x + scaling * B (A x)) + bias` with
    `g = m / |W + scaling * B A|` row by row (arXiv:2402.09353). Dropout acts on the
    low-rank branch alone; PEFT drops the input of `(g - 1) W x` as well, which takes a
    second product with W.

    Args:
      x: inputs, features last.
      weight: [O, I] array or `NF4Tensor`.
      bias: [O], optional.
      adapter: arrays as `qlora_jax.lora.functional` lists them; lora_A and lora_B, optional
        lora_bias, lora_magnitude_vector and rows, and the pair trainable_tokens_delta
        and token_indices, which may also be alone.
      scaling: factor of the adapter's update.
      residual: (A [R, I], B [O, R]) taken out of the weight: `(W - B A) x`.
      dropout: of the adapter's input.
      key: PRNG key for the dropout.
      dtype: of the result; default that of `x`. Products are those of the dtype of
        `x` either way; float32 logits are thus not rounded to bf16 first.
      implementation: of the product with an `NF4Tensor`; see `pallas_kernels.nf4`.

    Returns:
      [..., O] in `dtype`.
    """
    dtype = x.dtype if dtype is None else dtype
    adapter = adapter or {}
    y: Any  # type checkers do not see through `custom_vjp`
    if isinstance(weight, nf4.NF4Tensor):
        y = nf4.matmul(x, weight, dtype, implementation=implementation)
    else:
        y = dense_matmul(x, weight, dtype)
    if residual is not None:
        inner: Any = dense_matmul(x, residual[0])
        y = y - dense_matmul(inner, residual[1], dtype)
    if "trainable_tokens_delta" in adapter:
        # They are rows of the weight: an update is added to them as to the others.
        rows, indices = adapter["trainable_tokens_delta"], adapter["token_indices"]
        y = lora_lib.replace_columns(y, x, rows, indices)
    magnitude = adapter.get("lora_magnitude_vector")
    if bias is not None and magnitude is None:
        y = y + _row(bias, y)
    if "lora_A" in adapter:
        update = lora_lib.delta(x, adapter, scaling, dropout=dropout, key=key)
        y = y + update.astype(dtype)
    if magnitude is None:
        y = checkpoint_name(y, "linear_out")
    else:
        # What is kept is what the rescaling's derivative needs.
        y = checkpoint_name(y, "linear_out")
        norms = lora_lib.row_norms(
            weight, adapter["lora_A"], adapter["lora_B"], scaling, dtype=x.dtype
        )
        y = _scale(y, lora_lib.rescale(magnitude, norms, scaling))
        if bias is not None:
            y = y + _row(bias, y)
    return y


def embed(
    tokens: Int[Array, "*B"],
    weight: Float[Array, "V D"],
    adapter: Mapping[str, Array] | None = None,
    *,
    scaling: float | Array = 1.0,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B D"]:
    """Looks tokens up in `E + scaling * (B A)^T`, or its DoRA, with rows replaced.

    With a magnitude, columns are rescaled: `g = m / |E + scaling * (B A)^T|`, norms
    over the vocabulary, as PEFT has it.

    Args:
      tokens: token ids.
      weight: E.
      adapter: lora_embedding_A and lora_embedding_B, optional lora_magnitude_vector and
        rows; the pair trainable_tokens_delta and token_indices.
      scaling: factor of the update.
      dtype: of the result; default that of `weight`.
    """
    dtype = weight.dtype if dtype is None else dtype
    adapter = adapter or {}
    x = jnp.take(weight, tokens, axis=0).astype(dtype)
    if "trainable_tokens_delta" in adapter:
        rows, indices = adapter["trainable_tokens_delta"], adapter["token_indices"]
        slots = jnp.full(weight.shape[0], -1, jnp.int32)
        slots = slots.at[indices].set(jnp.arange(indices.size, dtype=jnp.int32))
        slot = slots[tokens]
        own = rows[jnp.maximum(slot, 0)].astype(dtype)
        x = jnp.where(jnp.expand_dims(slot >= 0, -1), own, x)
    if "lora_embedding_A" not in adapter:
        return x
    a, b = adapter["lora_embedding_A"], adapter["lora_embedding_B"]
    if "rows" in adapter:
        number, chosen = lora_lib.pick_rows(adapter["rows"], tokens)
        # [B, T, R]: columns are picked one by one, no adapter is copied for a row.
        inner = a[jnp.expand_dims(number, 1), :, tokens]
        inner = inner * jnp.expand_dims(jnp.asarray(scaling)[number], (1, 2))
        update = jnp.einsum(
            "btr,bdr->btd", inner, b[number], precision=jax.lax.Precision.HIGHEST
        )
        update = jnp.where(chosen, update, 0.0)
    else:
        lora_lib.refuse_stack(a)
        inner = jnp.moveaxis(jnp.take(a, tokens, axis=1), 0, -1)
        inner = inner * jnp.asarray(scaling, jnp.float32).reshape((1,) * inner.ndim)
        update: Any = dense_matmul(inner, b)
    x = x + update.astype(dtype)
    if "lora_magnitude_vector" in adapter:
        norms = lora_lib.row_norms(weight.T, a, b, scaling)  # of the columns
        x = _scale(
            x, lora_lib.rescale(adapter["lora_magnitude_vector"], norms, scaling)
        )
    return x


def _row(bias: Array, like: Array) -> Array:
    return jnp.expand_dims(bias.astype(like.dtype), range(like.ndim - 1))


def _scale(y: Array, factor: Float32[Array, " O"]) -> Array:
    factor = jnp.expand_dims(factor, range(y.ndim - 1))
    return (y.astype(jnp.float32) * factor).astype(y.dtype)


class _Adaptable(nn.Module):
    """Finds the parameters of a module, frozen or trained, and its adapter."""

    def trained(self, name: str) -> Any:
        """A value of the "lora" collection at this path; None if it has none."""
        if self.has_variable("lora", name):
            return self.get_variable("lora", name)
        return None

    def parameter(self, name: str, init: Any, shape: tuple[int, ...]) -> Any:
        """A tensor of the base, or what is trained in its place."""
        value = self.trained(name)
        chosen = self.trained(f"{name}_trained")
        if value is not None and chosen is None:
            return value
        # `self.param` compares shapes, which a packed leaf does not have.
        if self.has_variable("params", name):
            frozen = self.get_variable("params", name)
        else:
            frozen = self.param(name, init, shape, jnp.float32)
        if isinstance(frozen, nf4.NF4Tensor) and frozen.codes is None:
            frozen = nf4.with_stack(frozen, self.get_variable("stacks", name))
        frozen = on_device(frozen)
        if value is None:
            return frozen
        if isinstance(frozen, nf4.NF4Tensor):
            frozen = nf4.dequantize(frozen)
        return jnp.where(chosen, value, frozen.astype(value.dtype))

    def adapter(
        self, compute: Compute, names: tuple[str, ...]
    ) -> tuple[dict[str, Array], float | Array]:
        """What `linear` and `embed` take of the "lora" collection, and the scaling."""
        found = {n: v for n in names if (v := self.trained(n)) is not None}
        scaling: Any = self.trained("scaling")
        if scaling is not None or not any(n.endswith("_A") for n in found):
            return found, 1.0 if scaling is None else scaling
        config = compute.lora
        if config is None or not config.uniform:
            raise UserError(
                f"`{'.'.join(self.path)}` has an adapter whose scaling is not known. "
                "Give the model `qlora_jax.bind(adapters, base, lora_config)` as its "
                '"lora" collection, or, where one scaling holds for all modules, '
                "build it with `Compute(lora=lora_config)`."
            )
        return found, config.scaling


class Linear(_Adaptable):
    """A linear layer with optional bias and optional adapter.

    Collections: "params" {weight: [O, I] or NF4Tensor, bias: [O]; perhaps residual_A
    and residual_B}, "stacks" {weight} where `Compute.place` put it there, "lora" as
    `qlora_jax.lora.functional` lists it. Dropout acts on the adapter's
    input when a "dropout" PRNG key is given to `apply`.
    """

    features: int
    compute: Compute = Compute()
    use_bias: bool = False
    initializer_range: float = 0.02

    def __call__(
        self, x: Array, dtype: DTypeLike | None = None, weight: Any = None
    ) -> Array:
        """Maps [..., I] to [..., O].

        Args:
          x: inputs.
          dtype: of the result; default that of `x`.
          weight: of another module, used in place of an own one (tied embeddings).
        """
        function = self.function(x.shape[-1], weight)
        with jax.named_scope(self.name or "linear"):
            return function(x, dtype=dtype)

    @nn.compact
    def function(
        self, in_features: int, weight: Any = None, *, unpack: DTypeLike | None = None
    ) -> partial[Array]:
        """The layer as a function of its inputs: `linear` with all else filled in.

        For a caller that applies it piece by piece: inside a loop of plain JAX no
        module can be called.

        Args:
          in_features: I.
          weight: of another module, used in place of an own one.
          unpack: a dtype to dequantize a packed weight to now, once, rather than
            whenever the function is called.
        """
        if weight is None or self.trained("weight") is not None:
            weight = self.parameter(
                "weight",
                nn.initializers.normal(self.initializer_range),
                (self.features, in_features),
            )
        weight = gathered(weight)
        if unpack is not None and isinstance(weight, nf4.NF4Tensor):
            weight = nf4.dequantize(
                weight, unpack, implementation=self.compute.implementation
            )
        bias = (
            self.parameter("bias", nn.initializers.zeros, (self.features,))
            if self.use_bias
            else None
        )
        adapter, scaling = self.adapter(
            self.compute,
            (
                "lora_A",
                "lora_B",
                "lora_bias",
                "lora_magnitude_vector",
                "rows",
                "trainable_tokens_delta",
                "token_indices",
            ),
        )
        residual = None
        if self.has_variable("params", "residual_A"):
            residual = (
                self.get_variable("params", "residual_A"),
                self.get_variable("params", "residual_B"),
            )
        dropout, key = 0.0, None
        config = self.compute.lora
        if "lora_A" in adapter and config is not None and config.lora_dropout > 0.0:
            dropout = config.lora_dropout
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return partial(
            linear,
            weight=weight,
            bias=bias,
            adapter=gathered(adapter),
            scaling=scaling,
            residual=residual,
            dropout=dropout,
            key=key,
            implementation=self.compute.implementation,
        )


class Embed(_Adaptable):
    """Token embedding with optional adapter."""

    num_embeddings: int
    features: int
    compute: Compute = Compute()
    initializer_range: float = 0.02

    @nn.compact
    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Looks token ids up."""
        weight = self.parameter(
            "weight",
            nn.initializers.normal(self.initializer_range),
            (self.num_embeddings, self.features),
        )
        adapter, scaling = self.adapter(
            self.compute,
            (
                "lora_embedding_A",
                "lora_embedding_B",
                "lora_magnitude_vector",
                "rows",
                "trainable_tokens_delta",
                "token_indices",
            ),
        )
        return embed(tokens, weight, adapter, scaling=scaling, dtype=self.compute.dtype)

    def table(self) -> Float[Array, "V D"]:
        """The base's weight, for an output head that is tied to it."""
        return on_device(self.get_variable("params", "weight"))


class RMSNorm(_Adaptable):
    """`rms_norm` with a weight of its own."""

    eps: float

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes the last axis."""
        return self.function(x.shape[-1])(x)

    @nn.compact
    def function(self, features: int) -> partial[Array]:
        """The norm as a function of its inputs; `features` is D."""
        weight = self.parameter("weight", nn.initializers.ones, (features,))
        return partial(rms_norm, weight=weight, eps=self.eps)


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Computes x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467).

    Mean and quotient are float32; the result has the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * _row(weight, x)
