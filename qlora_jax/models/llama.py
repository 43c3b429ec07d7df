"""The Llama model (Touvron et al. 2023, https://arxiv.org/abs/2307.09288) in Flax.

Thin Linen modules over the functions of `layers` and `attention`, equal to Hugging
Face's `LlamaForCausalLM` up to rounding, with its parameter names and orientation.

    logits = Llama(config).apply({"params": base, "lora": adapters}, tokens)

The layers are one scanned module: every leaf under `model.layers` has a leading layer
axis, and neither compile time nor program size grows with depth. Each layer is a
rematerialized block, so training keeps one [B, T, D] array per layer (on the device, or
offloaded to the host) plus the inner results of the layer at work; `_POLICIES` has the
trade-offs.

`apply` has no side effects: dropout is active exactly when a "dropout" key is passed,
and the key/value cache is an argument and a result.

Read in order: Llama -> LlamaModel -> Block -> Attention, MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.models.attention import (
    Variant,
    attention,
    causal_mask,
    decode_attention,
    within_window,
)
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import (
    Compute,
    Embed,
    Linear,
    RMSNorm,
    check_output,
    map_chunks,
    mlp_chunks,
    mlp_tokens,
)
from qlora_jax.models.rope import long_texts, rope_table, rotate

# What the backward pass keeps of a layer, by `Compute.remat`; it recomputes the rest.
_POLICIES: dict[str, Callable[..., bool] | None] = {
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
    "save_matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(
            "attention_out", "attention_lse", "linear_out", "lora_inner", "dora_norm"
        ),
        # cuDNN's output and log-sum-exp, which cannot be named from outside.
        lambda primitive, *_, **__: primitive.name.startswith(
            "dot_product_attention_fwd"
        ),
    ),
}


class Cache(NamedTuple):
    """Keys and values of tokens already seen, for all layers."""

    k: Array
    """[L, B, K, S, H]: the keys of a head are contiguous, as the products read them."""
    v: Array
    """[L, B, K, S, H]."""
    segment_ids: Int[Array, "B S"]
    """1 where a slot holds a real token, 0 for padding and empty slots."""
    length: Int[Array, ""]
    """Slots in use."""


class Llama(nn.Module):
    """A causal language model.

    `attention_cls` and `mlp_cls` replace the modules of every layer. They are built as
    `cls(config=config, compute=compute)` and called like `Attention` and `MLP`.
    """

    config: LlamaConfig
    compute: Compute = Compute()
    attention_cls: Callable[..., nn.Module] | None = None
    mlp_cls: Callable[..., nn.Module] | None = None

    def setup(self) -> None:
        """Builds `model` and `lm_head`, which has no weight if it is tied."""
        self.model = LlamaModel(
            self.config, self.compute, self.attention_cls, self.mlp_cls
        )
        self.lm_head = Linear(
            self.config.vocab_size,
            self.compute,
            initializer_range=self.config.initializer_range,
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T V"]:
        """Computes logits.

        Args:
          tokens: token ids.
          attention_mask: 1 = token, 0 = padding, on either side.
          positions: for the rotary embedding; default 0, 1, 2, ... in every row.
          segment_ids: documents of packed rows, 1, 2, ...; 0 = padding.

        Returns:
          float32 logits, meaningless at padded positions.
        """
        hidden = self.hidden_states(
            tokens,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
        )
        return self.head(hidden)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        attention_mask: Array | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        noise: Float32[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Computes the normed output of the last layer.

        Arguments as for `__call__`; `noise` is added to the embeddings.
        """
        segments = _segments(attention_mask, segment_ids)
        return self.model(tokens, positions, segments, None, noise)[0]

    def head(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Maps hidden states to float32 logits."""
        with jax.named_scope("head"):
            # A tied head reads the frozen table; its adapter is the head's (`bind`).
            tied = self.config.tie_word_embeddings
            table = self.model.embed_tokens.table() if tied else None
            logits = self.lm_head(hidden, dtype=jnp.float32, weight=table)
            if self.config.logits_scaling != 1:
                logits = logits / self.config.logits_scaling
            cap = self.config.final_logit_softcapping
            return logits if cap is None else cap * jnp.tanh(logits / cap)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        attention_mask: Array,
        positions: Int[Array, "B T"],
    ) -> tuple[Float32[Array, "B V"], Cache]:
        """Appends tokens to the cache; returns the logits after the last one.

        The first call on an empty cache takes the prompts (the prefill, T > 1, all
        padded on the left to one length); later calls take T == 1.

        Args:
          tokens: new tokens.
          cache: from `empty_cache` or an earlier call.
          attention_mask: 1 = token, 0 = padding.
          positions: for the rotary embedding.

        Returns:
          float32 logits after the last token, and the longer cache.
        """
        hidden, longer = self.model(
            tokens, positions, attention_mask.astype(jnp.int32), cache
        )
        assert longer is not None
        # Prompts are padded on the left, so the last column has every row's last token.
        return self.head(hidden[:, -1]), longer


class LlamaModel(nn.Module):
    """Embedding, scanned layers, final norm."""

    config: LlamaConfig
    compute: Compute
    attention_cls: Callable[..., nn.Module] | None = None
    mlp_cls: Callable[..., nn.Module] | None = None

    def setup(self) -> None:
        """Builds `embed_tokens`, `layers` and `norm`."""
        self.embed_tokens = Embed(
            self.config.vocab_size,
            self.config.hidden_size,
            self.compute,
            self.config.initializer_range,
        )
        block = Block
        if self.compute.remat != "none":
            # Inside a scan the forward and backward bodies are separate programs, so
            # merging equal expressions cannot undo the recomputation. It lets the
            # recomputation and the input gradient share a weight's dequantization.
            block = nn.remat(
                Block, prevent_cse=False, policy=_POLICIES[self.compute.remat]
            )
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            variable_broadcast="stacks",  # a leaf of "params" has its layer's index
            # Each layer draws its own values and its own dropout masks.
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.config.num_hidden_layers,
        )(self.config, self.compute, self.attention_cls, self.mlp_cls)
        self.norm = RMSNorm(self.config.rms_norm_eps, self.config.family.norm_offset)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segments: Int[Array, "B T"] | None,
        cache: Cache | None,
        noise: Float32[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns normed hidden states, and the longer cache if there is one."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        kinds = LayerKinds.of(self.config)
        capacity = None if cache is None else cache.k.shape[3]
        long = long_texts(self.config, positions, segments, capacity)
        rope = kinds.rope_tables(positions, long)
        x = self._embed(tokens, noise)
        if cache is None:
            (x, _), _ = self.layers((x, None), rope, segments, None, kinds.index, None)
            return self.norm(x), None
        assert segments is not None
        all_segments = jax.lax.dynamic_update_slice(
            cache.segment_ids, segments, (0, cache.length)
        )
        # The stacks of all layers are in the carry, and each layer writes only its new
        # tokens. As scanned inputs and outputs the stacks would be copied completely,
        # layer by layer, for every token.
        layers = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        (x, kv), _ = self.layers(
            (x, (cache.k, cache.v)),
            rope,
            segments,
            layers,
            kinds.index,
            (all_segments, cache.length),
        )
        assert kv is not None
        length = cache.length + tokens.shape[1]
        return self.norm(x), Cache(kv[0], kv[1], all_segments, length)

    def _embed(self, tokens: Array, noise: Array | None) -> Float[Array, "B T D"]:
        """Looks tokens up and scales them; noise is added to what the table gives."""
        x = self.embed_tokens(tokens)
        scale = jnp.asarray(self.config.embedding_scale, jnp.float32)
        if self.config.family.scaled_embeddings:
            # Part of the table's module in Gemma, in the dtype of the table.
            x = x * scale.astype(x.dtype)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if self.config.embedding_multiplier != 1:
            x = (x.astype(jnp.float32) * scale).astype(x.dtype)
        return x


class LayerKinds(NamedTuple):
    """What differs between layers, as data of the scan over them.

    The scan has one program for all layers, so a layer's window and rotary table are
    chosen by an index that it carries.
    """

    config: LlamaConfig
    windows: tuple[int | None, ...]
    ropes: tuple[str, ...]
    index: tuple[Int[Array, " L"] | None, Int[Array, " L"] | None]
    """Which window and which table a layer has; None where all have the same."""

    @classmethod
    def of(cls, config: LlamaConfig) -> LayerKinds:
        """Lists the kinds of a configuration."""
        kinds = config.layer_kinds
        windows = tuple(dict.fromkeys(kind.window for kind in kinds))
        ropes = tuple(dict.fromkeys(kind.rope for kind in kinds))

        def index(values: tuple, of_layers: list) -> Array | None:
            if len(values) == 1:
                return None
            return jnp.asarray([values.index(v) for v in of_layers], jnp.int32)

        return cls(
            config,
            windows,
            ropes,
            (
                index(windows, [kind.window for kind in kinds]),
                index(ropes, [kind.rope for kind in kinds]),
            ),
        )

    def rope_tables(
        self, positions: Array, long: Array | None
    ) -> tuple[Array, Array] | tuple[Array, ...]:
        """Returns cos and sin, stacked by kind where there are several."""
        tables = [
            rope_table(positions, self.config, rope, long) for rope in self.ropes
        ]
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
        options = {} if window is None else {"window": window}
        norm = self._norm("input_layernorm")
        if self.compute.remat == "offload" and type(self_attn) is Attention:
            # Rows are longest here, so the normed input is recomputed, not kept.
            norm = norm.function(x.shape[-1])
            h, kv = self_attn(x, rope, segments, kv, cached, norm, **options)
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
        factor = self.config.residual_multiplier
        return update if factor == 1 else update * jnp.asarray(factor, update.dtype)

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
            chunks = mlp_chunks(x.shape[0], x.shape[1], limit)
        if chunks == 1:
            update = mlp(norm(x))
            check_output(mlp, update, x)
            return x + after(update)
        norm = norm.function(features)
        # Unpacked before the loop, in which every chunk would dequantize it again.
        update = mlp.function(features, unpack=True)
        return map_chunks(lambda x, chunk: x + after(update(norm(x), chunk)), x, chunks)


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
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Attends within `x` and to the cache, if there is one.

        Args:
          x: normed residual stream.
          rope: cos and sin of `rope_table`.
          segments: segment ids of `x`.
          kv: keys and values of all layers, [L, B, K, S, H]; None in training.
          cached: segment ids [B, S] of the cache including `x`, slots in use before
            `x`, and the index of this layer.
          norm: applied to `x` first, if present; the backward pass then recomputes the
            normed stream instead of keeping it.
          window: index of this layer's window, of a model whose layers have different
            ones.

        Returns:
          The output, and `kv` with this layer's keys and values of `x` written in.
          A custom class that calls this one passes `kv`, `cached` and `window` on
          unchanged.
        """
        c = self.config
        variant = LayerKinds.of(c).variant
        projections = self._projections(x)
        q_norm, k_norm = self._head_norms()

        def project(x: Array) -> tuple[Array, Array, Array]:
            q, k, v = projections(x if norm is None else norm(x))
            return rotate(q_norm(q), rope), rotate(k_norm(k), rope), v

        if norm is not None:
            project = jax.checkpoint(project, policy=_POLICIES["full"])
        q, k, v = project(x)
        with jax.named_scope("attention"):
            if kv is not None and cached is not None:
                all_segments, start, layer = cached
                # Written first: decoding reads the cache, and a token sees itself.
                kv = _write_tokens(kv, (k, v), layer, start)
            if kv is None or x.shape[1] > 1:
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
                slots = kv[0].shape[3]
                # Empty slots are of segment 0 and at later indices: never seen.
                mask = causal_mask(segments, all_segments, 1, slots, start)
                mask = within_window(mask, variant, window, start)
                out = decode_attention(q, *kv, layer, mask[:, 0], variant)
        out = out.reshape(*x.shape[:2], c.num_attention_heads * c.head_dim)
        return self._linear("o_proj", c.hidden_size)(out), kv

    def _projections(
        self, x: Float[Array, "B T D"]
    ) -> Callable[[Array], tuple[Array, Array, Array]]:
        """Returns the function of inputs like `x` to queries, keys and values."""
        c = self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        if c.family.fused:
            qkv_proj = self.projection("qkv_proj", x, heads + 2 * groups)

            def split(x: Array) -> tuple[Array, Array, Array]:
                q, k, v = jnp.split(qkv_proj(x), (heads, heads + groups), axis=2)
                return q, k, v

            return split
        q_proj = self.projection("q_proj", x, heads)
        k_proj = self.projection("k_proj", x, groups)
        v_proj = self.projection("v_proj", x, groups)
        return lambda x: (q_proj(x), k_proj(x), v_proj(x))

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

    def projection(
        self, name: str, x: Float[Array, "B T D"], heads: int
    ) -> Callable[[Array], Float[Array, "B T N H"]]:
        """Returns the projection `name` of inputs like `x`, split into heads."""
        features = heads * self.config.head_dim
        layer = self._linear(name, features).function(x.shape[-1])

        def project(x: Array) -> Array:
            with jax.named_scope(name):
                return layer(x).reshape(*x.shape[:2], heads, self.config.head_dim)

        return project

    def _linear(self, name: str, features: int) -> Linear:
        return Linear(
            features,
            self.compute,
            use_bias=self.config.has_bias(name),
            initializer_range=self.config.initializer_range,
            name=name,
        )


def _write_tokens(
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
          (x [..., D], index of the chunk or None) -> update [..., D].
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

        def call(layer: partial[Array], x: Array, chunk: Array | None) -> Array:
            adapter = layer.keywords["adapter"]
            if chunk is None or adapter.key is None:
                return layer(x)
            # Otherwise all chunks would have the same dropout mask.
            key = jax.random.fold_in(adapter.key, chunk)
            return layer(x, adapter=adapter._replace(key=key))

        def mlp(x: Array, chunk: Array | None = None) -> Array:
            outputs = []
            for name, layer in inner.items():
                with jax.named_scope(name):
                    outputs.append(call(layer, x, chunk))
            if c.family.fused:
                outputs = jnp.split(outputs[0], 2, axis=-1)
            gate, up = outputs
            # The exponential in float32: bf16 exp is less accurate and no faster.
            h = activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
            with jax.named_scope("down_proj"):
                return call(down_proj, h.astype(x.dtype), chunk)

        return mlp


def add_parameters(
    model: Llama, base: Mapping[str, Any], key: Array
) -> tuple[Llama, dict[str, Any]]:
    """Draws the parameters of custom modules that the checkpoint does not have.

    Args:
      model: with a custom `attention_cls` or `mlp_cls`.
      base: parameter tree, loaded from a checkpoint.
      key: PRNG key for the initializers of the custom modules.

    Returns:
      The model, whose configuration now lists these tensors (`extra_tensors`), and the
      base with them, in the dtype of the embeddings. Unchanged if nothing is missing.

    Raises:
      UserError: the base lacks tensors that every Llama has, has a custom tensor in
        another shape, or has tensors that the custom modules do not use.
    """
    if not (model.attention_cls or model.mlp_cls or model.config.extra_tensors):
        return model, trees.copy(base)
    plain = _parameter_shapes(Llama(model.config))
    expected, present = _parameter_shapes(model), dict(trees.walk(base))
    extra = {path: leaf for path, leaf in expected.items() if path not in plain}
    _check_llama_tensors(plain.keys() & expected.keys(), present)
    _check_extra_tensors(extra, present, model.config)
    missing = [path for path in extra if path not in present]
    complete = trees.copy(base)
    if missing:

        @jax.jit  # XLA drops the parameters that are not returned
        def draw(key: Array) -> list[Array]:
            leaves = dict(trees.walk(_initialize(model, key)))
            return [leaves[path] for path in missing]

        dtype = base["model"]["embed_tokens"]["weight"].dtype
        for path, value in zip(missing, draw(key), strict=True):
            trees.put(complete, path, value.astype(dtype))
    extra_tensors = {
        ".".join(path): leaf.shape[1:] if trees.is_stacked(path) else leaf.shape
        for path, leaf in extra.items()
    }
    config = dataclasses.replace(model.config, extra_tensors=extra_tensors)
    return model.clone(config=config), complete


def _initialize(model: Llama, key: Array) -> Mapping[str, Any]:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _parameter_shapes(model: Llama) -> dict[trees.Path, jax.ShapeDtypeStruct]:
    tree = jax.eval_shape(partial(_initialize, model), jax.random.key(0))
    return dict(trees.walk(tree))


def _check_llama_tensors(
    expected: Collection[trees.Path], present: Collection[trees.Path]
) -> None:
    missing = sorted(".".join(path) for path in expected if path not in present)
    if missing:
        raise UserError(
            f"The base lacks {', '.join(missing[:5])}, which every Llama of this "
            "configuration has. Load it with `convert.load_llama`."
        )


def _check_extra_tensors(
    extra: Mapping[trees.Path, jax.ShapeDtypeStruct],
    present: Mapping[trees.Path, Any],
    config: LlamaConfig,
) -> None:
    unused = sorted(set(config.extra_tensors) - {".".join(path) for path in extra})
    if unused:
        raise UserError(
            f"This checkpoint has {', '.join(unused[:5])}, of modules that this model "
            "does not have. Pass the classes that use them, in Python "
            "(`attention_cls`, `mlp_cls`); the command line takes none."
        )
    mismatches = [
        f"{'.'.join(path)} {list(present[path].shape)} instead of {list(leaf.shape)}"
        for path, leaf in extra.items()
        if path in present and tuple(present[path].shape) != leaf.shape
    ]
    if mismatches:
        raise UserError(
            f"The base does not fit the custom modules: {'; '.join(mismatches[:5])}."
        )


def empty_cache(
    config: LlamaConfig, batch: int, slots: int, dtype: Any = jnp.bfloat16
) -> Cache:
    """Returns an empty cache for `slots` tokens in each of `batch` rows."""
    shape = (
        config.num_hidden_layers,
        batch,
        config.num_key_value_heads,
        slots,
        config.head_dim,
    )
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def _segments(attention_mask: Array | None, segment_ids: Array | None) -> Array | None:
    if attention_mask is None:
        return segment_ids
    # Padding becomes segment 0, whatever document its position belongs to.
    mask = attention_mask.astype(jnp.int32)
    return mask if segment_ids is None else mask * segment_ids
