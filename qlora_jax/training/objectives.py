"""What a training step minimizes.

An objective is a pair of pure functions: the summed loss of a micro-batch, and the
number of terms in that sum. The step adds both up over the accumulation window and
divides once, so accumulated micro-batches and one large batch have the same gradient.

    train_step(..., objective=NEXT_TOKEN)    the loss of language modelling (default)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from qlora_jax import nf4
from qlora_jax.data import IGNORE
from qlora_jax.lora import bind, draw
from qlora_jax.models import (
    Llama,
    divide_tokens,
    gather_shared,
    on_device,
    row_index,
)
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.training.loss import cross_entropy_sum, supervised_tokens

Batch = Mapping[str, Array]


class Objective(NamedTuple):
    """A loss, as a sum and the number of terms it is divided by."""

    loss_sum: Callable[..., Float32[Array, ""]]
    """(adapters, base, batch, *, model, key, noise) -> summed loss of a micro-batch."""
    count: Callable[[Batch], Int[Array, ""]]
    """batch -> number of terms, over all micro-batches [A, B, T] or one [B, T]."""


def loss_sum(
    adapters: Any,
    base: Any,
    batch: Batch,
    *,
    model: Llama,
    key: Array | None = None,
    noise: Float32[Array, "B T D"] | None = None,
) -> Float32[Array, ""]:
    """Sums the loss over the supervised tokens of one micro-batch.

    Args:
      adapters: trained tree; already bound if `model.compute.lora` is None.
      base: frozen tree.
      batch: tokens, labels [B, T] and optionally positions, segment_ids,
        attention_mask [B, T].
      model: the architecture.
      key: PRNG key for dropout; None = no dropout.
      noise: added to the embeddings; None = none.
    """
    lora = model.compute.lora
    # Within the function that is differentiated, so that an array shared with a tied
    # head gets the gradients of both uses.
    bound = adapters if lora is None else bind(adapters, base, lora)
    variables = model.compute.arrange({"params": base, "lora": bound})
    hidden: Any = model.apply(
        variables,
        batch["tokens"],
        attention_mask=batch.get("attention_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        noise=noise,
        rngs=None if key is None else {"dropout": key},
        method="hidden_states",
    )
    # The head gets only what it reads: the loss sums a gradient for each of these
    # leaves that is trained.
    return cross_entropy_sum(
        partial(_apply_head, model),
        _dequantized(head_variables(variables, model), model.compute.dtype),
        hidden,
        batch["labels"],
        vocab_size=model.config.vocab_size,
    )


def embedding_noise(
    batch: Batch, key: Array, *, alpha: float, features: int
) -> Float32[Array, "B T D"]:
    """Draws NEFTune's noise (arXiv:2310.05914): uniform in +-alpha / sqrt(N D).

    N is the length of the document a token belongs to: in a packed row the length of
    that document, as if each had a row to itself; otherwise the tokens that
    `attention_mask` keeps, or without a mask the row up to its last supervised token.
    Later tokens, padding above all, change no loss.

    Args:
      batch: labels [B, T] and optionally segment_ids or attention_mask [B, T].
      key: PRNG key.
      alpha: `neftune_noise_alpha`.
      features: D.

    Returns:
      Noise as `Llama.hidden_states` takes it: where the mesh of the trace divides the
      tokens of a row, [B, S, D] in the order of `divide_tokens`.
    """
    length = divide_tokens(text_lengths(batch), 1).astype(jnp.float32)
    # The noise on N D numbers then has the norm alpha / sqrt(3) for documents of every
    # length. transformers takes the padded length of the row for N.
    size = alpha / jnp.sqrt(length * features)
    uniform = partial(jax.random.uniform, shape=(features,), minval=-1.0, maxval=1.0)
    drawn = draw(uniform, key, length.shape, row_index(length.shape[1]))
    return drawn * size[..., None]


def text_lengths(batch: Batch) -> Int[Array, "B T"]:
    """Returns the length of the document each token belongs to, at least 1 token."""
    labels = batch["labels"]
    rows, length = labels.shape
    if batch.get("segment_ids") is not None:
        segments = batch["segment_ids"]
        # By searching, because the ids of a batch that a caller has made may be any
        # integers. Padding counts as document 0.
        text_length = jax.vmap(_count_equal)(segments)
    elif batch.get("attention_mask") is not None:
        text_length = (
            batch["attention_mask"].astype(jnp.int32).sum(axis=1, keepdims=True)
        )
    else:
        # Index of the last supervised token, plus 1.
        positions = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
        text_length = jnp.where(labels != IGNORE, positions, 0).max(
            axis=1, keepdims=True
        )
    return jnp.maximum(jnp.broadcast_to(text_length, (rows, length)), 1).astype(
        jnp.int32
    )


def _count_equal(values: Int[Array, " T"]) -> Int[Array, " T"]:
    """Returns how often each value occurs."""
    ordered = jnp.sort(values)
    first, after = (
        jnp.searchsorted(ordered, values, side=side) for side in ("left", "right")
    )
    return after - first


def head_variables(variables: Mapping[str, Any], model: Llama) -> dict[str, Any]:
    """Returns the part of the variables that the output head reads."""
    selected: dict[str, Any] = {}
    for collection, tree in variables.items():
        selected[collection] = {k: tree[k] for k in ("lm_head",) if k in tree}
    if model.config.tie_word_embeddings:
        # The frozen table: a trained one reaches a tied head through `bind`.
        table = variables["params"]["model"]["embed_tokens"]
        selected["params"]["model"] = {"embed_tokens": table}
    return selected


def _dequantized(variables: Any, dtype: str) -> Any:
    """Dequantizes the head once, not again for every chunk of tokens."""

    def dense(leaf: Any) -> Any:
        return nf4.dequantize(leaf, dtype) if isinstance(leaf, NF4Tensor) else leaf

    return jax.tree.map(
        dense,
        gather_shared(on_device(variables)),
        is_leaf=lambda leaf: isinstance(leaf, NF4Tensor),
    )


def _apply_head(model: Llama, variables: Any, hidden: Array) -> Array:
    logits: Any = model.apply(variables, hidden, method="head")
    return logits


def _count_supervised(batch: Batch) -> Int[Array, ""]:
    return supervised_tokens(batch["labels"])


NEXT_TOKEN = Objective(loss_sum, _count_supervised)
"""Cross-entropy of the next token, averaged over the supervised tokens."""
