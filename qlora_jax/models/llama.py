"""The Llama model (Touvron et al. 2023, https://arxiv.org/abs/2307.09288) in Flax.

Thin Linen modules over the functions of `linear` and `attention`; the mathematics is
that of Hugging Face's `LlamaForCausalLM`, to rounding. Parameters carry its names and
orientation; the layers are one scanned module, so every leaf under `model.layers` has a
leading layer axis and neither compile time nor the program grows with depth.

    logits = Llama(config).apply({"params": base, "lora": adapters}, tokens)

`apply` takes what it needs and changes nothing: dropout is active exactly when a
"dropout" key is given, the key/value cache goes in and comes out.

Read in order: Llama -> LlamaModel -> Block -> Attention, MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.models import attention as attention_lib
from qlora_jax.models.attention import rope_table, rotate
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute, Embed, Linear, RMSNorm


class Cache(NamedTuple):
    """Keys and values of tokens already seen, for all layers."""

    k: Array
    """[L, B, K, S, H]: a head's keys lie together, as the products read them."""
    v: Array
    """[L, B, K, S, H]."""
    segment_ids: Int[Array, "B S"]
    """1 where a slot holds a real token, 0 for padding and empty slots."""
    length: Int[Array, ""]
    """Slots in use."""


class Llama(nn.Module):
    """A causal language model; see the module's text.

    `attention_cls` and `mlp_cls` put modules of yours into every layer; they are built
    as `cls(config=config, compute=compute)` and called as `Attention` and `MLP` are.
    """

    config: LlamaConfig
    compute: Compute = Compute()
    attention_cls: Callable[..., nn.Module] | None = None
    mlp_cls: Callable[..., nn.Module] | None = None

    def setup(self) -> None:
        """Builds `model` and `lm_head`, which has no weight where it is tied."""
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
          float32 logits. They are meaningless at padded positions.
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
        """Computes the normed output of the last layer; arguments as `__call__`.

        `noise` is added to the embeddings.
        """
        segments = _segments(attention_mask, segment_ids)
        return self.model(tokens, positions, segments, None, noise)[0]

    def head(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Maps hidden states to float32 logits."""
        with jax.named_scope("head"):
            tied = self.config.tie_word_embeddings
            table = self.model.embed_tokens.table() if tied else None
            return self.lm_head(hidden, dtype=jnp.float32, weight=table)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        attention_mask: Array,
        positions: Int[Array, "B T"],
    ) -> tuple[Float32[Array, "B V"], Cache]:
        """Appends tokens to the cache; returns the logits after the last one.

        The first call on an empty cache takes whole prompts (the prefill, T > 1, all
        of them padded on the left to one length); later calls take T == 1.

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
            # merging equal expressions within the backward one is wanted: recomputation
            # and input gradient then share one dequantization of each weight.
            block = nn.remat(
                Block, prevent_cse=False, policy=_POLICIES[self.compute.remat]
            )
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            variable_broadcast="stacks",  # the layer's number is in "params"
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.config.num_hidden_layers,
        )(self.config, self.compute, self.attention_cls, self.mlp_cls)
        self.norm = RMSNorm(self.config.rms_norm_eps)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segments: Int[Array, "B T"] | None,
        cache: Cache | None,
        noise: Float32[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns normed hidden states, and the longer cache if one was given."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        rope = rope_table(positions, self.config)
        x = self.embed_tokens(tokens)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if cache is None:
            (x, _), _ = self.layers((x, None), rope, segments, None, None)
            return self.norm(x), None
        assert segments is not None
        all_segments = jax.lax.dynamic_update_slice(
            cache.segment_ids, segments, (0, cache.length)
        )
        # The stacks of all layers are carried, and each layer writes its new tokens
        # where they belong. As inputs and outputs of the scan they would be copied
        # layer by layer, and whole: with every token.
        layers = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        (x, kv), _ = self.layers(
            (x, (cache.k, cache.v)),
            rope,
            segments,
            layers,
            (all_segments, cache.length),
        )
        assert kv is not None
        length = cache.length + tokens.shape[1]
        return self.norm(x), Cache(kv[0], kv[1], all_segments, length)


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

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
        cached: tuple[Array, ...] | None,
    ) -> tuple[tuple[Array, tuple[Array, Array] | None], None]:
        """Returns the new residual stream, and the cache with this layer's tokens."""
        x, kv = carry
        x = checkpoint_name(x, "layer_input")
        attention = self.attention_cls or Attention
        mlp = (self.mlp_cls or MLP)(
            config=self.config, compute=self.compute, name="mlp"
        )
        eps = self.config.rms_norm_eps
        if cached is not None and layer is not None:
            cached = (*cached, layer)
        self_attn = attention(
            config=self.config, compute=self.compute, name="self_attn"
        )
        norm = RMSNorm(eps, name="input_layernorm")
        if self.compute.remat == "offload" and type(self_attn) is Attention:
            norm = norm.function(x.shape[-1])
            h, kv = self_attn(x, rope, segments, kv, cached, norm)
        else:
            h, kv = self_attn(norm(x), rope, segments, kv, cached)
        x = x + h
        norm = RMSNorm(eps, name="post_attention_layernorm")
        chunks = 1
        if kv is None and type(mlp) is MLP:
            most = mlp_tokens(self.config.intermediate_size, self.compute.remat)
            chunks = _mlp_chunks(x.shape[0], x.shape[1], most)
        if chunks == 1:
            return (x + mlp(norm(x)), kv), None
        norm = norm.function(x.shape[-1])
        update = mlp.function(x.shape[-1], unpack=True)
        return (_in_chunks(lambda x, n: x + update(norm(x), n), x, chunks), kv), None


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

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
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Attends within `x`, or to the cache as well.

        Args:
          x: normed residual stream.
          rope: cos and sin of `rope_table`.
          segments: segment ids of `x`.
          kv: keys and values of all layers, [L, B, K, S, H]; None in training.
          cached: segment ids [B, S] of the cache including `x`, slots in use before
            `x`, and the number of this layer.
          norm: where given, `x` is not normed yet; the backward pass then norms it
            again rather than hold it normed.

        Returns:
          The output, and `kv` with this layer's keys and values of `x` written in.
          A class of yours that calls this one hands `kv` and `cached` on as they are.
        """
        c = self.config
        q_proj = self.projection("q_proj", x, c.num_attention_heads)
        k_proj = self.projection("k_proj", x, c.num_key_value_heads)
        v_proj = self.projection("v_proj", x, c.num_key_value_heads)

        def project(x: Array) -> tuple[Array, Array, Array]:
            x = x if norm is None else norm(x)
            return rotate(q_proj(x), rope), rotate(k_proj(x), rope), v_proj(x)

        if norm is not None:
            project = jax.checkpoint(project, policy=_POLICIES["full"])
        q, k, v = project(x)
        with jax.named_scope("attention"):
            if kv is not None and cached is not None:
                all_segments, start, layer = cached
                place = (layer, 0, 0, start, 0)
                new_k, new_v = (a.swapaxes(1, 2)[None] for a in (k, v))
                kv = (
                    jax.lax.dynamic_update_slice(kv[0], new_k, place),
                    jax.lax.dynamic_update_slice(kv[1], new_v, place),
                )
            if kv is None or x.shape[1] > 1:
                # A prefill starts on an empty cache: it sees nothing but itself.
                out = attention_lib.attention(
                    q,
                    k,
                    v,
                    segment_ids=segments,
                    implementation=self.compute.attention,
                )
            else:
                slots = kv[0].shape[3]
                seen = attention_lib.causal_mask(
                    segments, all_segments, 1, slots, start
                )
                out = attention_lib.decode_attention(q, *kv, layer, seen[:, 0])
        out = out.reshape(*x.shape[:2], c.num_attention_heads * c.head_dim)
        out = Linear(
            c.hidden_size,
            self.compute,
            use_bias=c.attention_bias,
            initializer_range=c.initializer_range,
            name="o_proj",
        )(out)
        return out, kv

    def projection(
        self, name: str, x: Float[Array, "B T D"], heads: int
    ) -> Callable[[Array], Float[Array, "B T N H"]]:
        """The projection `name` of inputs like `x`, its output split into heads."""
        c = self.config
        layer = Linear(
            heads * c.head_dim,
            self.compute,
            use_bias=c.attention_bias,
            initializer_range=c.initializer_range,
            name=name,
        ).function(x.shape[-1])

        def project(x: Array) -> Array:
            with jax.named_scope(name):
                return layer(x).reshape(*x.shape[:2], heads, c.head_dim)

        return project


class MLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    config: LlamaConfig
    compute: Compute

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps the normed residual stream to this layer's update."""
        return self.function(x.shape[-1])(x)

    @nn.compact
    def function(self, in_features: int, *, unpack: bool = False) -> Callable:
        """The module as a function of its inputs, for a caller that chunks them.

        Args:
          in_features: D.
          unpack: dequantize packed weights now rather than with every call.

        Returns:
          (x [..., D], number of the chunk or None) -> update [..., D]; every chunk has
          a dropout of its own.
        """
        c = self.config

        def projection(name: str, inputs: int, outputs: int) -> partial[Array]:
            return Linear(
                outputs,
                self.compute,
                use_bias=c.mlp_bias,
                initializer_range=c.initializer_range,
                name=name,
            ).function(inputs, unpack=self.compute.dtype if unpack else None)

        gate_proj = projection("gate_proj", in_features, c.intermediate_size)
        up_proj = projection("up_proj", in_features, c.intermediate_size)
        down_proj = projection("down_proj", c.intermediate_size, in_features)

        def call(layer: partial[Array], x: Array, chunk: Array | None) -> Array:
            key = layer.keywords["key"]
            if chunk is None or key is None:
                return layer(x)
            return layer(x, key=jax.random.fold_in(key, chunk))

        def mlp(x: Array, chunk: Array | None = None) -> Array:
            with jax.named_scope("gate_proj"):
                gate = call(gate_proj, x, chunk)
            with jax.named_scope("up_proj"):
                up = call(up_proj, x, chunk)
            # The exponential in float32: bf16 exp is less accurate and no faster.
            h = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
            with jax.named_scope("down_proj"):
                return call(down_proj, h.astype(x.dtype), chunk)

        return mlp


# Tokens of an MLP that are at work at a time: enough for products at full speed, few
# enough that [tokens, intermediate_size] does not decide how long a row can be.
_MLP_TOKENS = {"full": 16384, "offload": 4096}
# The width for which they are meant; of a wider MLP fewer, a power of two.
_MLP_WIDTH = 16384


def mlp_tokens(intermediate_size: int, remat: str) -> int | None:
    """Tokens of an MLP at work at a time; None where its inner results are kept."""
    most = _MLP_TOKENS.get(remat)
    if most is None or intermediate_size <= _MLP_WIDTH:
        return most
    return 1 << (most * _MLP_WIDTH // intermediate_size).bit_length() - 1


def _mlp_chunks(rows: int, length: int, most: int | None) -> int:
    """How many equal chunks of at most so many tokens to take the MLP in."""
    if most is None:
        return 1
    fewest = -(-rows * length // most)
    # Chunks that come out even need no padding, so no copy of what is padded.
    even = (n for n in range(fewest, 2 * fewest) if length % n == 0)
    return min(next(even, fewest), length)


def _in_chunks(
    function: Callable[[Array, Array], Array],
    x: Float[Array, "B T D"],
    chunks: int,
) -> Float[Array, "B T D"]:
    """Applies (x, number of the chunk) -> y [..., D] chunk by chunk.

    Each chunk's derivative recomputes what it needs, so one chunk's inner results are
    all that is ever held. What `function` refers to is computed once. A chunk is a part
    of every row: where devices share the rows, each works on its own.
    """
    rows, length, features = x.shape
    size = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - length), (0, 0)))

    @partial(jax.checkpoint, prevent_cse=False)
    def one(_: None, xs: tuple[Array, Array]) -> tuple[None, Array]:
        return None, function(*xs)

    parts = x.reshape(rows, chunks, size, features).swapaxes(0, 1)
    _, out = jax.lax.scan(one, None, (parts, jnp.arange(chunks)))
    return out.swapaxes(0, 1).reshape(x.shape)[:, :length]


def add_parameters(
    model: Llama, base: Mapping[str, Any], key: Array
) -> tuple[Llama, dict[str, Any]]:
    """Makes the parameters of your modules that a Llama checkpoint does not have.

    Args:
      model: with your `attention_cls` or `mlp_cls`.
      base: parameter tree, loaded from a checkpoint.
      key: PRNG key of what is drawn, with your modules' own initializers.

    Returns:
      The model, whose configuration now lists them (`extra_tensors`), and the base with
      them, in the dtype of the embeddings. With nothing to add, what was given.

    Raises:
      UserError: the base lacks tensors that every Llama has, has yours in another
        shape, or has others that your modules do not use.
    """
    known = model.config.extra_tensors
    if model.attention_cls is None and model.mlp_cls is None and not known:
        return model, trees.copy(base)
    tokens = jnp.zeros((1, 1), jnp.int32)

    def shapes(one: Llama) -> dict[tuple[str, ...], Any]:
        tree = jax.eval_shape(one.init, jax.random.key(0), tokens)["params"]
        return dict(trees.walk(tree))

    plain = shapes(Llama(model.config))
    wanted, found = shapes(model), dict(trees.walk(base))
    lacking = [".".join(p) for p in wanted if p in plain and p not in found]
    if lacking:
        raise UserError(
            f"The base lacks {', '.join(lacking[:5])}, which every Llama of this "
            "configuration has. Load it with `convert.load_llama`."
        )
    extra = {p: leaf for p, leaf in wanted.items() if p not in plain}
    unused = sorted(set(known) - {".".join(p) for p in extra})
    if unused:
        raise UserError(
            f"This checkpoint has {', '.join(unused[:5])}, of modules that this model "
            "does not have. Give the classes that use them, in Python "
            "(`attention_cls`, `mlp_cls`); the command line takes none."
        )
    wrong = [
        f"{'.'.join(p)} {list(found[p].shape)} instead of {list(leaf.shape)}"
        for p, leaf in extra.items()
        if p in found and tuple(found[p].shape) != leaf.shape
    ]
    if wrong:
        raise UserError(f"The base does not fit your modules: {'; '.join(wrong[:5])}.")
    missing = [p for p in extra if p not in found]
    out = trees.copy(base)
    if missing:

        @jax.jit  # what is not asked for is never computed
        def draw(key: Array) -> list[Array]:
            leaves = dict(trees.walk(model.init(key, tokens)["params"]))
            return [leaves[p] for p in missing]

        dtype = base["model"]["embed_tokens"]["weight"].dtype
        for path, value in zip(missing, draw(key), strict=True):
            trees.put(out, path, value.astype(dtype))
    listed = {
        ".".join(p): leaf.shape[1:] if p[:2] == ("model", "layers") else leaf.shape
        for p, leaf in extra.items()
    }
    config = dataclasses.replace(model.config, extra_tensors=listed)
    return model.clone(config=config), out


def empty_cache(
    config: LlamaConfig, batch: int, slots: int, dtype: Any = jnp.bfloat16
) -> Cache:
    """Makes a cache for `slots` tokens in each of `batch` rows."""
    shape = (
        config.num_hidden_layers,
        batch,
        config.num_key_value_heads,
        slots,
        config.head_dim,
    )
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch, slots), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def _segments(attention_mask: Array | None, segment_ids: Array | None) -> Array | None:
    if attention_mask is None:
        return segment_ids
    mask = attention_mask.astype(jnp.int32)
    return mask if segment_ids is None else mask * segment_ids


_POLICIES: dict[str, Callable[..., bool] | None] = {
    # DoRA's norms take a product with the whole weight, and a few numbers to keep.
    "full": jax.checkpoint_policies.save_only_these_names("dora_norm"),
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
        # cuDNN's output with its log-sum-exp, which has no name.
        lambda primitive, *_, **__: primitive.name.startswith(
            "dot_product_attention_fwd"
        ),
    ),
}
