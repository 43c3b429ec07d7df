"""One decoder layer of the Llama block: attention and MLP around a residual stream.

`LlamaModel` scans it over the layers. It reads the switches of its configuration and of
`qlora_jax.models.families`, never the name of a family.

Read in order: Block -> Attention, MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.variant import Variant
from qlora_jax.errors import UserError
from qlora_jax.models.attention import (
    attention,
    causal_mask,
    decode_attention,
    within_window,
)
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.joined import (
    can_fuse_norm,
    can_gate,
    can_join,
    gated_linears,
    joined_linear,
    normed_linear,
)
from qlora_jax.models.layers import (
    Compute,
    Linear,
    RMSNorm,
    map_chunks,
    mlp_chunks,
    mlp_tokens,
    multiply,
)
from qlora_jax.models.rope import rope_table, rotate
from qlora_jax.models.sharding import local_shape

# What the backward pass keeps of a layer, by `Compute.remat`; it recomputes the rest.
_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(
        "attention_out", "attention_lse", "dora_norm"
    ),
    # cuDNN's output and log-sum-exp, which cannot be named from outside.
    lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd"),
)
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    # DoRA's norms cost a product with the full weight and are O numbers to keep.
    "full": jax.checkpoint_policies.save_only_these_names("dora_norm"),
    # The inputs of all layers, 2 L T D bytes in bf16 for each row (2.1 GB at 8,192
    # tokens of 8B), wait in host memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["dora_norm"],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Attention costs most to recompute where rows are long: 4 D T numbers less at the
    # price of another 2 L T D bytes.
    "save_attention": _ATTENTION,
    "save_matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("linear_out", "lora_inner"),
        _ATTENTION,
    ),
}


class LayerKinds(NamedTuple):
    """What differs between layers, as data of the scan over them.

    The scan has one program for all layers, so a layer's window and rotary table are
    chosen by an index that it carries.
    """

    config: LlamaConfig
    windows: tuple[int | None, ...]
    ropes: tuple[str, ...]

    @classmethod
    def of(cls, config: LlamaConfig) -> LayerKinds:
        """Lists the kinds of a configuration."""
        kinds = config.layer_kinds
        windows = tuple(dict.fromkeys(kind.window for kind in kinds))
        ropes = tuple(dict.fromkeys(kind.rope for kind in kinds))
        return cls(config, windows, ropes)

    def index(self) -> tuple[Int[Array, " L"] | None, Int[Array, " L"] | None]:
        """Returns which window and which table a layer has; None where all are alike.

        Arrays for the scan; what a layer itself needs is static.
        """
        kinds = self.config.layer_kinds

        def numbers(values: tuple, of_layers: list) -> Array | None:
            if len(values) == 1:
                return None
            return jnp.asarray([values.index(v) for v in of_layers], jnp.int32)

        return (
            numbers(self.windows, [kind.window for kind in kinds]),
            numbers(self.ropes, [kind.rope for kind in kinds]),
        )

    def rope_tables(self, positions: Array, long: Array | None) -> tuple[Array, Array]:
        """Returns cos and sin, stacked by kind where there are several."""
        tables = [rope_table(positions, self.config, rope, long) for rope in self.ropes]
        if len(tables) == 1:
            return tables[0]
        cos, sin = zip(*tables, strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    @property
    def variant(self) -> Variant:
        """How attention differs from the plain formula."""
        config = self.config
        is_plain = config.attention_multiplier is None
        is_plain = is_plain and config.query_pre_attn_scalar is None
        return Variant(
            scale=None if is_plain else config.attention_scale,
            softcap=config.attn_logit_softcapping,
            windows=self.windows,
        )


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Families with `post_norms` normalize both terms before they are added, and
    `residual_multiplier` is a factor of both.
    """

    config: LlamaConfig
    compute: Compute
    attention_cls: Callable[..., nn.Module] | None = None
    mlp_cls: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, tuple[Array, Array] | None],
        rope: tuple[Array, Array],
        segments: Array | None,
        layer: Int[Array, ""] | None,
        kind: tuple[Array | None, Array | None],
        cached: tuple[Array, ...] | None,
    ) -> tuple[tuple[Array, tuple[Array, Array] | None], None]:
        """Returns the new residual stream, and the cache with this layer's tokens."""
        x, kv = carry
        window, table = kind
        if table is not None:
            cos, sin = (
                jax.lax.dynamic_index_in_dim(tables, table, keepdims=False)
                for tables in rope
            )
            rope = (cos, sin)
        # What the scan keeps of each layer; "offload" finds it by this name.
        x = checkpoint_name(x, "layer_input")
        if cached is not None and layer is not None:
            cached = (*cached, layer)
        attention_cls = self.attention_cls or Attention
        self_attn = attention_cls(
            config=self.config, compute=self.compute, name="self_attn"
        )
        # A custom class only has to take a window where there are several.
        options: Any = {} if window is None else {"window": window}
        norm = self._norm("input_layernorm")
        if self.compute.remat == "offload" and type(self_attn) is Attention:
            # Rows are longest here, so the normed input is recomputed, not kept.
            norm = norm.function(x.shape[-1])
            h, kv = self_attn(x, rope, segments, kv, cached, norm, **options)
        elif self.compute.fuses_norms and type(self_attn) is Attention:
            norm = norm.function(x.shape[-1])
            options["with_stream"] = True
            h, kv, x = self_attn(x, rope, segments, kv, cached, norm, **options)
        else:
            h, kv = self_attn(norm(x), rope, segments, kv, cached, **options)
            check_output(self_attn, h, x)
        if self.config.family.post_norms:
            h = self._norm("post_attention_layernorm")(h)
        return (self._add_mlp(x + self._scaled(h), training=kv is None), kv), None

    def _norm(self, name: str) -> RMSNorm:
        config = self.config
        return RMSNorm(config.rms_norm_eps, config.family.norm_offset, name=name)

    def _scaled(self, update: Array) -> Array:
        """Returns what is added to the residual stream."""
        return multiply(update, self.config.residual_multiplier)

    def _add_mlp(self, x: Float[Array, "B T D"], training: bool) -> Array:
        """Returns x + mlp(norm(x)), in chunks of tokens where that saves memory."""
        mlp_cls = self.mlp_cls or MLP
        mlp = mlp_cls(config=self.config, compute=self.compute, name="mlp")
        post_norms = self.config.family.post_norms
        norm = self._norm(
            "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
        )
        features = x.shape[-1]
        after: Callable[[Array], Array] = self._scaled
        if post_norms:
            post_norm = self._norm("post_feedforward_layernorm").function(features)
            after = lambda update: self._scaled(post_norm(update))  # noqa: E731
        chunks = 1
        if training and type(mlp) is MLP:
            limit = mlp_tokens(self.config.intermediate_size, self.compute.remat)
            chunks = mlp_chunks(*local_shape(*x.shape[:2]), limit)
        fuses = self.compute.fuses_norms or self.compute.fuses_activation
        if chunks == 1 and fuses and type(mlp) is MLP:
            update, x = mlp.function(features)(x, norm=norm.function(features))
            return x + after(update)
        if chunks == 1:
            update = mlp(norm(x))
            check_output(mlp, update, x)
            return x + after(update)
        norm = norm.function(features)
        # Unpacked before the loop, in which every chunk would dequantize it again.
        update = mlp.function(features, unpack=True)
        return map_chunks(lambda x, index: x + after(update(norm(x), index)), x, chunks)


def check_output(module: nn.Module, output: Any, x: Array) -> None:
    """Raises if the output of a custom module cannot be added to its input.

    Otherwise the scan over the layers fails, with a message about its carry.

    Raises:
      UserError: another shape or dtype.
    """
    if (output.shape, output.dtype) != (x.shape, x.dtype):
        raise UserError(
            f"`{type(module).__name__}` returns {output.dtype}{list(output.shape)} for "
            f"an input of {x.dtype}{list(x.shape)}. Return the input's shape, in its "
            "dtype (`.astype(x.dtype)`); a product with a float32 array is float32."
        )


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions.

    Families may have queries, keys and values as rows of one `qkv_proj`, and norms over
    each head of queries and keys.
    """

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        segments: Int[Array, "B T"] | None,
        kv: tuple[Array, Array] | None = None,
        cached: tuple[Array, ...] | None = None,
        norm: Callable[[Array], Array] | None = None,
        window: Int[Array, ""] | None = None,
        *,
        with_stream: bool = False,
    ) -> tuple[Any, ...]:
        """Attends within `x` and to the cache, if there is one.

        Args:
          x: normed residual stream.
          rope: cos and sin of `rope_table`.
          segments: segment ids of `x`.
          kv: keys and values of all layers, [L, B, K, S, H]; None in training.
          cached: segment ids [B, S] of the cache including `x`, slots in use before
            `x`, and the index of this layer.
          norm: applied to `x` first, if present; with `remat="offload"` the backward
            pass recomputes the normed stream instead of keeping it.
          window: index of this layer's window, of a model whose layers have different
            ones.
          with_stream: return `x` as well, for the residual connection.

        Returns:
          The output, and `kv` with this layer's keys and values of `x` written in.
          A custom class that calls this one passes `kv`, `cached` and `window` on
          unchanged.
        """
        c = self.config
        variant = LayerKinds.of(c).variant
        projections = self._projections(x)
        q_norm, k_norm = self._head_norms()

        def project(x: Array) -> tuple[Array, Array, Array, Array]:
            parts, x = projections(x, norm)
            q, k = rotate(q_norm(next(parts)), rope), rotate(k_norm(next(parts)), rope)
            return q, k, next(parts), x

        if norm is not None and self.compute.remat == "offload":
            project = jax.checkpoint(project, policy=REMAT_POLICIES["full"])
        q, k, v, x = project(x)
        with jax.named_scope("attention"):
            if kv is not None and cached is not None:
                _, start, layer = cached
                # Written first: decoding reads the cache, and a token sees itself.
                kv = write_tokens(kv, (k, v), layer, start)
            if kv is None or cached is None or x.shape[1] > 1:
                # A prefill starts on an empty cache, so it attends within itself only.
                out = attention(
                    q,
                    k,
                    v,
                    segment_ids=segments,
                    variant=variant,
                    choice=window,
                    implementation=self.compute.attention,
                )
            else:
                out = attend_to_cache(q, kv, segments, cached, variant, window)
        out = out.reshape(*x.shape[:2], c.num_attention_heads * c.head_dim)
        o_proj = self._linear("o_proj", c.hidden_size).function(out.shape[-1])
        (out,) = apply_linears(out, {"o_proj": o_proj}, self.compute)
        return (out, kv, x) if with_stream else (out, kv)

    def _projections(
        self, x: Float[Array, "B T D"]
    ) -> Callable[..., tuple[Iterator[Array], Array]]:
        """Returns the function of inputs like `x` to queries, keys and values.

        It takes a norm to apply first, or None. Its results come one after another,
        each computed when it is asked for; and the input, for the residual connection.
        """
        c = self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        names = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
        if c.family.fused:
            names = {"qkv_proj": heads + 2 * groups}
        layers = {
            name: self._linear(name, n * c.head_dim).function(x.shape[-1])
            for name, n in names.items()
        }

        def heads_of(outputs: Iterator[Array]) -> Iterator[Array]:
            for y in outputs:
                parts = [y.reshape(*y.shape[:2], -1, c.head_dim)]
                if c.family.fused:
                    parts = jnp.split(parts[0], [heads, heads + groups], axis=2)
                yield from parts

        def project(x: Array, norm: Any) -> tuple[Iterator[Array], Array]:
            outputs, x = apply_normed_linears(x, norm, layers, self.compute)
            return heads_of(outputs), x

        return project

    def _head_norms(self) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """Returns the norms of queries and keys over the width of a head."""
        c = self.config
        if not c.family.qk_norm:
            return lambda q: q, lambda k: k
        q_norm, k_norm = (
            RMSNorm(c.rms_norm_eps, c.family.norm_offset, name=name).function(
                c.head_dim
            )
            for name in ("q_norm", "k_norm")
        )
        return q_norm, k_norm

    def _linear(self, name: str, features: int) -> Linear:
        return Linear(
            features,
            self.compute,
            use_bias=self.config.has_bias(name),
            initializer_range=self.config.initializer_range,
            name=name,
        )


def apply_linears(
    x: Float[Array, "B T I"],
    layers: Mapping[str, partial[Array]],
    compute: Compute,
    *,
    interleaved: bool = False,
) -> Iterator[Float[Array, "B T O"]]:
    """Applies linear layers to one input, as one product where that is faster.

    Args:
      x: inputs.
      layers: from `Linear.function`, by name.
      compute: whether they are joined.
      interleaved: as `joined_linear` takes it.

    Yields:
      The outputs one after another, each computed when it is asked for.
    """
    functions = list(layers.values())
    # A single token is a product with the packed weight, which is never written out.
    if compute.joins_products and x.shape[1] > 1 and can_join(functions):
        with jax.named_scope("_".join(layers)):
            yield from joined_linear(x, functions, interleaved=interleaved)
        return
    for name, layer in layers.items():
        with jax.named_scope(name):
            yield layer(x)


def apply_normed_linears(
    x: Float[Array, "B T I"],
    norm: Any,
    layers: Mapping[str, partial[Array]],
    compute: Compute,
    *,
    interleaved: bool = False,
) -> tuple[Iterator[Float[Array, "B T O"]], Float[Array, "B T I"]]:
    """Applies a norm, and linear layers to its output.

    Args:
      x: residual stream.
      norm: from `RMSNorm.function`; None = none.
      layers: as for `apply_linears`.
      compute: whether they are joined, and the norm with them.
      interleaved: as for `apply_linears`.

    Returns:
      The outputs as `apply_linears` yields them; and x, for the residual connection.
    """
    functions = list(layers.values())
    if norm is not None and compute.fuses_norms and x.shape[1] > 1:
        if can_join(functions) and can_fuse_norm(functions):
            with jax.named_scope("_".join(layers)):
                outputs, x = normed_linear(x, norm, functions, interleaved=interleaved)
            return iter(outputs), x
    h = x if norm is None else norm(x)
    return apply_linears(h, layers, compute, interleaved=interleaved), x


def attend_to_cache(
    q: Float[Array, "B 1 N H"],
    kv: tuple[Array, Array],
    segments: Int[Array, "B 1"] | None,
    cached: tuple[Array, ...],
    variant: Variant,
    window: Int[Array, ""] | None,
) -> Float[Array, "B 1 N H"]:
    """Attends to a layer of the cache, which holds the token's own key and value.

    Arguments as for `Attention`.
    """
    all_segments, start, layer = cached
    # Empty slots are of segment 0 and at later indices: never seen.
    mask = causal_mask(segments, all_segments, 1, kv[0].shape[3], start)
    mask = within_window(mask, variant, window, start)
    return decode_attention(q, *kv, layer, mask[:, 0], variant)


def write_tokens(
    kv: tuple[Array, Array],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    layer: Array,
    start: Array,
) -> tuple[Array, Array]:
    """Returns the caches with one layer's new keys and values from slot `start` on."""
    # [B, T, K, H] -> [1, B, K, T, H], the place of these tokens in the stack.
    k, v = (
        jax.lax.dynamic_update_slice(
            stack, tokens.swapaxes(1, 2)[None], (layer, 0, 0, start, 0)
        )
        for stack, tokens in zip(kv, new, strict=True)
    )
    return k, v


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
}


class MLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), with act = silu in most families.

    Families may have gate and up as rows of one `gate_up_proj`.
    """

    config: LlamaConfig
    compute: Compute

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps the normed residual stream to this layer's update."""
        return self.function(x.shape[-1])(x)

    @nn.compact
    def function(self, in_features: int, *, unpack: bool = False) -> Callable:
        """Returns the module as a function of its inputs, to be applied in chunks.

        Args:
          in_features: D.
          unpack: dequantize packed weights now instead of with every call.

        Returns:
          (x [..., D], index or None) -> update [..., D]. With `norm`, from
          `RMSNorm.function`, it is applied to x first, and x is returned as well, for
          the residual connection. `index` is as `map_chunks` gives it.
        """
        c = self.config

        def projection(name: str, inputs: int, outputs: int) -> partial[Array]:
            return Linear(
                outputs,
                self.compute,
                use_bias=c.has_bias(name),
                initializer_range=c.initializer_range,
                name=name,
            ).function(inputs, unpack=self.compute.dtype if unpack else None)

        width = c.intermediate_size
        names = {"gate_proj": width, "up_proj": width}
        if c.family.fused:
            names = {"gate_up_proj": 2 * width}
        inner = {name: projection(name, in_features, n) for name, n in names.items()}
        activation = _ACTIVATIONS[c.hidden_act]
        down_proj = projection("down_proj", c.intermediate_size, in_features)

        def of_tokens(
            layers: Mapping[str, partial[Array]], index: Callable[[], Array] | None
        ) -> Mapping[str, partial[Array]]:
            if index is None:
                return layers
            chosen = {}
            for name, layer in layers.items():
                adapter = layer.keywords["adapter"]
                if adapter.key is not None:
                    # Otherwise all chunks would have the same dropout mask.
                    adapter = adapter._replace(index=index())
                chosen[name] = partial(layer, adapter=adapter)
            return chosen

        def mlp(x: Array, index: Any = None, norm: Any = None) -> Any:
            layers = of_tokens(inner, index)
            if norm is not None and self._gates(x, layers, down_proj):
                with jax.named_scope("_".join([*layers, "down_proj"])):
                    return gated_linears(
                        x,
                        norm,
                        list(layers.values()),
                        down_proj,
                        norm_implementation=None if self.compute.fuses_norms else "xla",
                    )
            outputs, x = apply_normed_linears(
                x, norm, layers, self.compute, interleaved=True
            )
            outputs = list(outputs)
            if c.family.fused:
                outputs = jnp.split(outputs[0], 2, axis=-1)
            gate, up = outputs
            # The exponential in float32: bf16 exp is less accurate and no faster.
            h = activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
            h = h.astype(x.dtype)
            layers = of_tokens({"down_proj": down_proj}, index)
            (update,) = apply_linears(h, layers, self.compute)
            return update if norm is None else (update, x)

        return mlp

    def _gates(
        self, x: Array, layers: Mapping[str, partial[Array]], down: partial[Array]
    ) -> bool:
        """Returns whether the activation is computed with products of adapters."""
        functions = list(layers.values())
        return (
            self.compute.fuses_activation
            and self.config.hidden_act == "silu"
            and x.shape[1] > 1
            and can_join(functions)
            and can_join([down])
            and can_gate(functions, down)
        )
