"""Layers that combine a weight, packed or dense, with an adapter.

`linear` and `embed` are the computations. `Linear`, `Embed` and `RMSNorm` are thin Flax
modules that read their weight from the "params" collection and trained arrays from the
"lora" collection under the same path. A custom layer built from them can be adapted by
naming its parts in `target_modules` or `modules_to_save`; there is no list of accepted
modules. `map_chunks` applies a layer to a few tokens at a time.

The "lora" collection holds what `qlora_jax.lora.functional.bind` returns. A trained
tree with one rank and scaling for all modules also works unbound; the scaling is then
that of `Compute.lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import device
from pallas_kernels.nf4.api import measured
from pallas_kernels.product import dense_matmul
from qlora_jax import nf4
from qlora_jax.choices import Attention, Dtype, Fusion, Kernels, LoraProducts, Remat
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig
from qlora_jax.lora import functional as lora_lib
from qlora_jax.models.context import row_index
from qlora_jax.models.sharding import (
    cut_chunks,
    gather_shared,
    join_chunks,
    on_device,
    pad_chunks,
)

_LINEAR_ARRAYS = (
    "lora_A",
    "lora_B",
    "lora_bias",
    "lora_magnitude_vector",
    "rows",
    "trainable_tokens_delta",
    "token_indices",
)
_EMBEDDING_ARRAYS = (
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "rows",
    "trainable_tokens_delta",
    "token_indices",
)


@dataclass(frozen=True)
class Compute:
    """How a model is computed (its architecture is in `LlamaConfig`). Hashable."""

    dtype: Dtype = "bfloat16"
    """Activations and matrix products; sums, norms and softmax are float32."""
    attention: Attention = "auto"
    """Attention implementation; see `qlora_jax.models.attention`."""
    remat: Remat = "full"
    """What the backward pass recomputes: nothing; each layer from its input ("full");
    each layer except its attention, or except the results of its matrix products and
    its attention; or each layer from its input, which is kept in host memory until
    then."""
    scan_layers: bool = True
    """Whether the layers are a loop over one program. Otherwise each has its own, so
    that what the backward pass keeps stays where it was computed instead of being
    copied into arrays of all layers; compiling takes longer with every layer. Of
    training; generation has a loop."""
    kernels: Kernels = "auto"
    """Implementation of products with packed weights: XLA, the Pallas kernels for GPUs,
    or the best known for the device; see `pallas_kernels.nf4`."""
    lora_products: LoraProducts = "auto"
    """Products of plain adapters: part of the products with the weights, or products of
    their own; "auto" joins them on a GPU, unless `remat` is "offload". See
    `qlora_jax.models.joined`."""
    norms: Fusion = "auto"
    """The norm before joined products: one with their `A x`, which is a single kernel
    on a Hopper GPU (`pallas_kernels.norm`), or on its own. "auto" keeps it on its own
    as long as the kernel's time is not measured."""
    activation: Fusion = "auto"
    """The gated activation between joined products: one with the narrow products of the
    adapters around it, which is a single kernel in each direction on a Hopper GPU
    (`pallas_kernels.gated`), or on its own. "auto" as for `norms`."""
    lora: LoraConfig | None = None
    """Adapters of the "lora" collection: their dropout, what training binds them with,
    and the scaling of an unbound tree."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", get_args(Dtype)),
            ("attention", get_args(Attention)),
            ("remat", get_args(Remat)),
            ("kernels", get_args(Kernels)),
            ("lora_products", get_args(LoraProducts)),
            ("norms", get_args(Fusion)),
            ("activation", get_args(Fusion)),
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

    @property
    def reads_stacks(self) -> bool:
        """Whether kernels read packed weights out of the stacks of all layers."""
        return self.kernels == "pallas" or (self.kernels == "auto" and measured())

    @property
    def joins_products(self) -> bool:
        """Whether updates of adapters are part of the products with the weights."""
        if self.lora_products != "auto":
            return self.lora_products == "joined"
        # Where rows are longest, there is no room for inputs beside their `A x`: on
        # 24 GB a row of 8B would be 12 % shorter.
        is_gpu = device.this_device().platform in ("gpu", "cuda")
        return is_gpu and self.remat != "offload"

    @property
    def fuses_norms(self) -> bool:
        """Whether a norm is computed with the joined products that follow it."""
        return self.norms == "fused" and self.joins_products

    @property
    def fuses_activation(self) -> bool:
        """Whether an MLP's activation is computed with the products of its adapters."""
        return self.activation == "fused" and self.joins_products

    def arrange(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables in the layout that the chosen kernels read fastest.

        Call it inside the jitted function that calls `apply`. Every module accepts the
        result. Where the Pallas kernels may be chosen, the packed stacks of the layers
        move to the collection "stacks" (`nf4.lift_stacks`).

        Args:
          variables: {"params": base, "lora": adapters}.
        """
        if not self.reads_stacks or "stacks" in variables:
            return dict(variables)
        params, stacks = nf4.lift_stacks(variables["params"])
        return {**variables, "params": params, "stacks": stacks}


class ModuleAdapter(NamedTuple):
    """The adapter of one module, as `linear` and `embed` apply it."""

    arrays: Mapping[str, Array]
    """Arrays by PEFT's names, as `qlora_jax.lora.functional` lists them: a pair A and
    B, optional lora_bias, lora_magnitude_vector and rows; and the pair
    trainable_tokens_delta and token_indices, with or without the others."""
    scaling: float | Array = 1.0
    """Factor of the update."""
    residual: tuple[Array, Array] | None = None
    """(A [R, I], B [O, R]) subtracted from the weight: `(W - B A) x`."""
    dropout: float = 0.0
    """Rate of the dropout on the input of lora_A."""
    key: Array | None = None
    """PRNG key of the dropout; None = no dropout."""
    index: Array | None = None
    """[T], in their row, of the tokens of an input [B, T, I] that is a part of the
    rows; None = an input of whole rows."""


def linear(
    x: Float[Array, "*B I"],
    weight: Any,
    bias: Float[Array, " O"] | None = None,
    adapter: ModuleAdapter | None = None,
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    saved: bool = False,
) -> Float[Array, "*B O"]:
    """Computes `W x + bias + scaling * B (A x)`, or its DoRA.

    With a magnitude m in the adapter, `g (W x + scaling * B (A x)) + bias` with
    `g = m / |W + scaling * B A|` row by row (arXiv:2402.09353). Dropout acts on the
    low-rank branch only; PEFT drops the input of `(g - 1) W x` as well, which takes a
    second product with W.

    Args:
      x: inputs, features last.
      weight: [O, I] array or `NF4Tensor`.
      bias: [O], optional.
      adapter: the module's adapter, if any.
      dtype: of the result; default that of `x`. Products are computed from operands in
        the dtype of `x` either way, so float32 logits are not rounded to bf16 first.
      implementation: of the product with an `NF4Tensor`; see `pallas_kernels.nf4`.
      saved: whether a policy of `jax.checkpoint` keeps the products for the backward
        pass.

    Returns:
      [..., O] in `dtype`.
    """
    dtype = x.dtype if dtype is None else dtype
    arrays, scaling, residual, dropout, key, index = adapter or ModuleAdapter({})
    y: Any  # type checkers do not see through `custom_vjp`
    if isinstance(weight, nf4.NF4Tensor):
        # Only x has a derivative: the packed weight is frozen.
        y = nf4.matmul(x, weight, dtype, implementation=implementation)
    else:
        y = dense_matmul(x, weight, dtype)
    # (W - B0 A0) x without forming W - B0 A0, which a packed W could not hold.
    if residual is not None:
        inner: Any = dense_matmul(x, residual[0])
        y = y - dense_matmul(inner, residual[1], dtype)
    if "trainable_tokens_delta" in arrays:
        # Trained rows replace rows of the weight, so a LoRA update adds to them too.
        rows, indices = arrays["trainable_tokens_delta"], arrays["token_indices"]
        y = lora_lib.replace_columns(y, x, rows, indices)
    magnitude = arrays.get("lora_magnitude_vector")
    # DoRA scales the product with the weight, not the bias: that is then added last.
    if bias is not None and magnitude is None:
        y = y + _broadcast(bias, y)
    if "lora_A" in arrays:
        if index is None and key is not None and x.ndim == 3:
            index = row_index(x.shape[1])
        update = lora_lib.delta(
            x, arrays, scaling, dropout=dropout, key=key, index=index, saved=saved
        )
        y = y + update.astype(dtype)
    # Named before DoRA's rescaling, whose derivative needs its input, not its output.
    y = lora_lib.name_product(y, "linear_out", saved=saved)
    if magnitude is not None:
        norms = lora_lib.row_norms(
            weight, arrays["lora_A"], arrays["lora_B"], scaling, dtype=x.dtype
        )
        # y = g u with u = W x + s B A x: du = g dy, dm = sum(dy u) / norm.
        y = _scale(y, lora_lib.rescale(magnitude, norms, scaling))
        if bias is not None:
            y = y + _broadcast(bias, y)
    return y


def embed(
    tokens: Int[Array, "*B"],
    weight: Float[Array, "V D"],
    adapter: ModuleAdapter | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B D"]:
    """Looks tokens up in `E + scaling * (B A)^T`, or its DoRA, with rows replaced.

    With a magnitude, columns are rescaled: `g = m / |E + scaling * (B A)^T|`, norms
    over the vocabulary, as in PEFT.

    Args:
      tokens: token ids.
      weight: E.
      adapter: the module's adapter, if any.
      dtype: of the result; default that of `weight`.
    """
    dtype = weight.dtype if dtype is None else dtype
    arrays, scaling, *_ = adapter or ModuleAdapter({})
    # Rows first, then the cast: the other order would cast the whole table.
    x = jnp.take(weight, tokens, axis=0).astype(dtype)
    if "trainable_tokens_delta" in arrays:
        # Position of each token's trained row; -1 where it has none.
        slots = jnp.full(weight.shape[0], -1, jnp.int32)
        indices = arrays["token_indices"]
        slots = slots.at[indices].set(jnp.arange(indices.size, dtype=jnp.int32))
        slot = slots[tokens]
        # The derivative scatters into these n rows only; the frozen table gets none.
        trained = arrays["trainable_tokens_delta"][jnp.maximum(slot, 0)].astype(dtype)
        # A choice, not a sum: PEFT's "delta" rows replace those of the table.
        x = jnp.where(jnp.expand_dims(slot >= 0, -1), trained, x)
    if "lora_embedding_A" not in arrays:
        return x
    x = x + _embedding_delta(tokens, arrays, scaling).astype(dtype)
    if "lora_magnitude_vector" in arrays:
        a, b = arrays["lora_embedding_A"], arrays["lora_embedding_B"]
        # Its transpose is E^T + s B A, so columns become rows.
        norms = lora_lib.row_norms(weight.T, a, b, scaling)  # of the columns
        magnitude = arrays["lora_magnitude_vector"]
        x = _scale(x, lora_lib.rescale(magnitude, norms, scaling))
    return x


def _embedding_delta(
    tokens: Int[Array, "*B"], arrays: Mapping[str, Array], scaling: float | Array
) -> Float32[Array, "*B D"]:
    """Returns rows of `scaling * (B A)^T`, of one adapter or one per batch row."""
    a, b = arrays["lora_embedding_A"], arrays["lora_embedding_B"]
    if "rows" not in arrays:
        lora_lib.refuse_stack(a)
        # Columns of A instead of a product with one-hot rows: [R, *B] -> [*B, R].
        inner = jnp.moveaxis(jnp.take(a, tokens, axis=1), 0, -1)
        inner = inner * jnp.asarray(scaling, jnp.float32).reshape((1,) * inner.ndim)
        update: Any = dense_matmul(inner, b)
        return update
    number, has_adapter = lora_lib.pick_rows(arrays["rows"], tokens)
    # [B, T, R]: gathers single columns of A, never a copy of A for each batch row.
    inner = a[jnp.expand_dims(number, 1), :, tokens]
    inner = inner * jnp.expand_dims(jnp.asarray(scaling)[number], (1, 2))
    update = jnp.einsum(
        "btr,bdr->btd", inner, b[number], precision=jax.lax.Precision.HIGHEST
    )
    return jnp.where(has_adapter, update, 0.0)


def _broadcast(vector: Array, like: Array) -> Array:
    # JAX's rank promotion may be set to raise, so the leading axes are explicit.
    return jnp.expand_dims(vector.astype(like.dtype), range(like.ndim - 1))


def multiply(x: Float[Array, "*B D"], factor: float) -> Float[Array, "*B D"]:
    """Multiplies with a number of the configuration, in float32, and rounds once."""
    # As torch does: in bf16 the factor itself would be off by up to 0.4 %.
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def _scale(y: Array, factor: Float32[Array, " O"]) -> Array:
    # In float32: a factor rounded to bf16 would be off by up to 0.4 %.
    factor = jnp.expand_dims(factor, range(y.ndim - 1))
    return (y.astype(jnp.float32) * factor).astype(y.dtype)


class _Adaptable(nn.Module):
    """Reads the parameters of a module, frozen or trained, and its adapter."""

    def trained(self, name: str) -> Any:
        """Returns a value of the "lora" collection at this path, or None."""
        if self.has_variable("lora", name):
            return self.get_variable("lora", name)
        return None

    def parameter(self, name: str, init: Any, shape: tuple[int, ...]) -> Any:
        """Returns a tensor of the base, or the trained one that replaces it."""
        value = self.trained(name)
        is_trained = self.trained(f"{name}_trained")
        if value is not None and is_trained is None:
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
        # Trained in some layers only. The scan has one program for all of them, so the
        # choice between the two tensors is data.
        if isinstance(frozen, nf4.NF4Tensor):
            frozen = nf4.dequantize(frozen, value.dtype)
        return jnp.where(is_trained, value, frozen.astype(value.dtype))

    def adapter(self, compute: Compute, names: tuple[str, ...]) -> ModuleAdapter:
        """Returns the arrays `names` of the "lora" collection with their scaling."""
        arrays = {n: v for n in names if (v := self.trained(n)) is not None}
        scaling: Any = self.trained("scaling")
        if scaling is not None or not any(n.endswith("_A") for n in arrays):
            return ModuleAdapter(arrays, 1.0 if scaling is None else scaling)
        # An unbound tree has no constants, but may need only one: a common scaling.
        config = compute.lora
        if config is None or not config.uniform:
            raise UserError(
                f"`{'.'.join(self.path)}` has an adapter whose scaling is not known. "
                "Give the model `qlora_jax.bind(adapters, base, lora_config)` as its "
                '"lora" collection, or, where one scaling holds for all modules, '
                "build it with `Compute(lora=lora_config)`."
            )
        return ModuleAdapter(arrays, config.scaling)


class Linear(_Adaptable):
    """A linear layer with optional bias and optional adapter.

    Collections: "params" {weight: [O, I] or NF4Tensor, bias: [O], optional residual_A
    and residual_B}, "stacks" {weight} if `Compute.arrange` moved it there, "lora" as
    `qlora_jax.lora.functional` lists it. Dropout acts on the adapter's input when a
    "dropout" PRNG key is passed to `apply`.
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
          weight: of another module, instead of this one's (tied embeddings).
        """
        function = self.function(x.shape[-1], weight)
        with jax.named_scope(self.name or "linear"):
            return function(x, dtype=dtype)

    @nn.compact
    def function(
        self, in_features: int, weight: Any = None, *, unpack: DTypeLike | None = None
    ) -> partial[Array]:
        """Returns the layer as a function of its inputs: `linear` with the rest bound.

        For a caller that applies the layer in chunks: inside `jax.lax.scan` no Flax
        module can be called.

        Args:
          in_features: I.
          weight: of another module, instead of this one's.
          unpack: a dtype to dequantize a packed weight to now, once, rather than with
            every call.
        """
        # A tied head that is trained in full has a weight in "lora", which comes first.
        if weight is None or self.trained("weight") is not None:
            weight = self.parameter(
                "weight",
                nn.initializers.normal(self.initializer_range),
                (self.features, in_features),
            )
        weight = gather_shared(weight)
        implementation = self.compute.implementation
        if unpack is not None and isinstance(weight, nf4.NF4Tensor):
            weight = nf4.dequantize(weight, unpack, implementation=implementation)
        bias = None
        if self.use_bias:
            bias = self.parameter("bias", nn.initializers.zeros, (self.features,))
        return partial(
            linear,
            weight=weight,
            bias=bias,
            adapter=self._adapter(),
            implementation=implementation,
            saved=self.compute.remat == "save_matmuls",
        )

    def _adapter(self) -> ModuleAdapter:
        adapter = self.adapter(self.compute, _LINEAR_ARRAYS)
        if self.has_variable("params", "residual_A"):
            a, b = (self.get_variable("params", f"residual_{n}") for n in "AB")
            adapter = adapter._replace(residual=(a, b))
        config = self.compute.lora
        if "lora_A" in adapter.arrays and config is not None and config.lora_dropout:
            # Without a key (evaluation, generation) nothing is dropped.
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            adapter = adapter._replace(dropout=config.lora_dropout, key=key)
        return adapter._replace(arrays=gather_shared(adapter.arrays))


class Embed(_Adaptable):
    """A token embedding with optional adapter."""

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
        adapter = self.adapter(self.compute, _EMBEDDING_ARRAYS)
        # Of a divided table every device would look up the tokens of all of them.
        weight, arrays = gather_shared((weight, adapter.arrays))
        adapter = adapter._replace(arrays=arrays)
        return embed(tokens, weight, adapter, dtype=self.compute.dtype)

    def table(self) -> Float[Array, "V D"]:
        """Returns the base's weight, for an output head that is tied to it."""
        return on_device(self.get_variable("params", "weight"))


class RMSNorm(_Adaptable):
    """`rms_norm` with its weight as a parameter."""

    eps: float
    offset: bool = False
    """Whether the factor is 1 + weight."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes the last axis."""
        return self.function(x.shape[-1])(x)

    @nn.compact
    def function(self, features: int) -> partial[Array]:
        """Returns the norm as a function of its inputs; `features` is D."""
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        weight = self.parameter("weight", start, (features,))
        return partial(rms_norm, weight=weight, eps=self.eps, offset=self.offset)


def rms_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    eps: float,
    *,
    offset: bool = False,
) -> Float[Array, "*B D"]:
    """Computes x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467).

    Mean and quotient are float32, since a sum of squares over D terms in bf16 loses
    most of its digits; the result has the dtype of `x`.

    Args:
      x: features last.
      weight: factor of each feature.
      eps: added to the mean of the squares.
      offset: the factor is 1 + weight, in float32, as in Gemma.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset:
        factor = 1.0 + weight.astype(jnp.float32)
        return (wide * scale * _broadcast(factor, wide)).astype(x.dtype)
    # Rounded before it is multiplied with the weight, as in transformers.
    return (wide * scale).astype(x.dtype) * _broadcast(weight, x)


# Tokens per chunk of the MLP, by `Compute.remat`: enough for products at full speed,
# few enough that [tokens, intermediate_size] does not limit the length of a row.
_MLP_TOKENS = {"full": 16384, "save_attention": 16384, "offload": 4096}
# These hold up to this width; a wider MLP takes fewer tokens, a power of two.
_MLP_WIDTH = 16384


def mlp_tokens(intermediate_size: int, remat: str) -> int | None:
    """Returns the most tokens per chunk of the MLP; None where nothing is chunked.

    Policies that keep the MLP's inner results would not save memory by chunking.
    """
    limit = _MLP_TOKENS.get(remat)
    if limit is None or intermediate_size <= _MLP_WIDTH:
        return limit
    # The largest power of two that has no more inner numbers in a chunk.
    return 1 << (limit * _MLP_WIDTH // intermediate_size).bit_length() - 1


def mlp_chunks(rows: int, length: int, limit: int | None) -> int:
    """Returns the number of equal chunks of at most `limit` of a device's tokens."""
    if limit is None:
        return 1
    fewest = -(-rows * length // limit)
    # A number that divides the length needs no padding, and so no padded copy.
    divisors = (n for n in range(fewest, 2 * fewest) if length % n == 0)
    return min(next(divisors, fewest), length)


def map_chunks(
    function: Callable[[Array, Callable[[], Array]], Array],
    x: Float[Array, "B T D"],
    chunks: int,
) -> Float[Array, "B T D"]:
    """Applies (x, index) -> y [..., D] chunk by chunk.

    The derivative of a chunk recomputes its inner results, so those of one chunk are
    all that is ever in memory. Arrays that `function` closes over are computed once. A
    chunk is a part of every row on each device, so devices stay independent.

    Args:
      function: `index()` is that of `ModuleAdapter`, of the tokens of a chunk.
      x: rows.
      chunks: their number.
    """
    length = x.shape[1]
    padded = pad_chunks(x, chunks)

    # Inside a scan nothing can undo the recomputation; see `llama.LlamaModel`.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        part, number = chunk
        return None, function(part, lambda: row_index(length, number, chunks))

    parts = cut_chunks(padded, chunks)
    _, out = jax.lax.scan(step, None, (parts, jnp.arange(chunks)))
    return join_chunks(out, length)
