"""The Llama model (Touvron et al. 2023, https://arxiv.org/abs/2307.09288) in Flax.

Thin Linen modules over the functions of `layers` and `attention`, equal to Hugging
Face's `LlamaForCausalLM` up to rounding, with its parameter names and orientation; and
to the models of the other families that share its block, by the switches of their
configuration.

    logits = Llama(config).apply({"params": base, "lora": adapters}, tokens)

The layers are one scanned module: every leaf under `model.layers` has a leading layer
axis, and neither compile time nor program size grows with depth. Each layer is a
rematerialized block, so training keeps one [B, T, D] array per layer (on the device, or
offloaded to the host) plus the inner results of the layer at work; `REMAT_POLICIES`
has the trade-offs.

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
from jaxtyping import Array, Bool, Float, Float32, Int

from qlora_jax import tree as trees
from qlora_jax.errors import UserError
from qlora_jax.models.block import REMAT_POLICIES, Block, LayerKinds
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.context import (
    divide,
    divide_tokens,
    join_tokens,
)
from qlora_jax.models.decode_layers import decode_layers, prepare
from qlora_jax.models.layers import (
    Compute,
    Embed,
    Linear,
    RMSNorm,
    multiply,
)
from qlora_jax.models.rope import long_texts
from qlora_jax.models.sharding import row_devices


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
            # The head is no part of the rematerialized layers.
            dataclasses.replace(self.compute, remat="none"),
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
        return join_tokens(self.head(hidden), tokens.shape[1])

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        attention_mask: Array | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        noise: Float32[Array, "B S D"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Computes the normed output of the last layer.

        Arguments as for `__call__`; `noise` is added to the embeddings.

        S is T. Where the mesh of the trace divides the tokens of a row ("context"),
        noise and result are padded and in the order of `divide_tokens`, the other
        arguments in the order of the row.

        Raises:
          UserError: custom attention, under a mesh that divides the tokens of a row.
        """
        segments = _segments(attention_mask, segment_ids)
        if row_devices() > 1:
            if self.attention_cls is not None:
                raise UserError(
                    f"`attention_cls`={self.attention_cls.__name__}: custom attention "
                    "needs whole rows in their order, and the mesh divides their "
                    "tokens over the devices of `context`. Use a mesh with "
                    "context = 1."
                )
            if positions is None:
                positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            tokens, positions = divide_tokens(tokens), divide_tokens(positions)
            segments = divide_tokens(segments)
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

        Raises:
          UserError: the mesh of the trace divides the tokens of a row.
        """
        if row_devices() > 1:
            raise UserError(
                "Generation needs whole rows, and the mesh divides their tokens over "
                "the devices of `context`. Generate on a mesh without this axis."
            )
        hidden, longer = self.model(
            tokens, positions, attention_mask.astype(jnp.int32), cache
        )
        assert longer is not None
        # Prompts are padded on the left, so the last column has every row's last token.
        return self.head(hidden[:, -1]), longer

    def arrange(self, variables: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
        """Returns the variables in the layout that decoding reads fastest.

        Call it inside the jitted function that calls `decode`, before its loop over the
        tokens. As `Compute.arrange`, and with the arrays of `decode_layers` if it can
        decode the model.

        Args:
          variables: {"params": base, "lora": adapters}.
          rows: of the batch.
        """
        arranged = self.compute.arrange(variables)
        if self.attention_cls is not None or self.mlp_cls is not None:
            return arranged
        return prepare(self.config, self.compute, arranged, rows)


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
                Block, prevent_cse=False, policy=REMAT_POLICIES[self.compute.remat]
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
        positions: Int[Array, "#B T"] | None,
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
        rope, kind = kinds.rope_tables(positions, long), kinds.index()
        x = self._embed(tokens, noise)
        if cache is None:
            # The scan draws the parameters, which then do not depend on the choice.
            if self.compute.scan_layers or self.is_initializing():
                (x, _), _ = self.layers((x, None), rope, segments, None, kind, None)
            else:
                x = self._unrolled(x, rope, segments, kind)
            return self.norm(x), None
        assert segments is not None
        all_segments = jax.lax.dynamic_update_slice(
            cache.segment_ids, segments, (0, cache.length)
        )
        length = cache.length + tokens.shape[1]
        if tokens.shape[1] == 1 and self.has_variable("decode", "qkv"):
            x, kv = decode_layers(
                self.config,
                self.variables,
                x[:, 0],
                (cache.k, cache.v),
                rope,
                (segments, all_segments),
                cache.length,
            )
            x = self.norm(x[:, None])
            return x, Cache(kv[0], kv[1], all_segments, length)
        # The stacks of all layers are in the carry, and each layer writes only its new
        # tokens. As scanned inputs and outputs the stacks would be copied completely,
        # layer by layer, for every token.
        layers = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        (x, kv), _ = self.layers(
            (x, (cache.k, cache.v)),
            rope,
            segments,
            layers,
            kind,
            (all_segments, cache.length),
        )
        assert kv is not None
        return self.norm(x), Cache(kv[0], kv[1], all_segments, length)

    def _unrolled(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        segments: Array | None,
        kind: tuple[Array | None, Array | None],
    ) -> Float[Array, "B T D"]:
        """Applies the layers one after another, as a program of all of them."""
        length, remat = self.config.num_hidden_layers, self.compute.remat
        block = Block(
            self.config, self.compute, self.attention_cls, self.mlp_cls, parent=None
        )

        def layer(variables: Any, x: Array, kind: Any, key: Array | None) -> Array:
            rngs = None if key is None else {"dropout": key}
            carry = (x, None)
            (x, _), _ = block.apply(
                variables, carry, rope, segments, None, kind, None, rngs=rngs
            )
            return x

        if remat != "none":
            # Here both passes are one program, in which merging equal expressions would
            # undo the recomputation.
            layer = jax.checkpoint(
                layer, policy=REMAT_POLICIES[remat], prevent_cse=True
            )
        scanned = {**self.layers.variables}
        shared = {k: scanned.pop(k) for k in ("stacks",) if k in scanned}
        keys = None
        if self.has_rng("dropout"):
            keys = jax.random.split(self.layers.make_rng("dropout"), length)
        for variables, layer_kind, key in _unstack((scanned, kind, keys), length):
            x = layer({**variables, **shared}, x, layer_kind, key)
        return x

    def _embed(self, tokens: Array, noise: Array | None) -> Float[Array, "B T D"]:
        """Looks tokens up and scales them; noise is added to what the table gives."""
        x = self.embed_tokens(tokens)
        if self.config.family.scaled_embeddings:
            # Part of the table's module in Gemma, and rounded to the table's dtype.
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        x = divide(x)
        return multiply(x, self.config.embedding_multiplier)


def _unstack(tree: Any, length: int) -> list[Any]:
    """Returns the entries of the leading axis of all leaves."""
    leaves, structure = jax.tree.flatten(tree)
    # The derivative of a split is a concatenation; that of `length` slices would add up
    # as many arrays of the full size.
    parts = [jax.lax.split(leaf, (1,) * length) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [part[n][0] for part in parts])
        for n in range(length)
    ]


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
