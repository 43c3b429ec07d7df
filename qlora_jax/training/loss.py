"""Next-token cross-entropy that never holds logits for all tokens.

A scan over chunks of tokens computes logits [chunk, V], their log-sum-exp, the loss and
at once the gradient with respect to the hidden states; only that gradient is kept. The
idea is that of fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), with the
head given as a function, so a packed, adapted or trained head takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.data import IGNORE
from qlora_jax.models import cut_chunks, divide_tokens, local_shape, pad_chunks

# Float32 logits held at a time: 2^24 of them are 67 MB, small enough to be reused from
# cache and page tables (on a CPU larger chunks are slower). Never fewer than 512
# tokens, which a GPU needs for full matrix-product speed.
_CHUNK_LOGITS = 1 << 24
_MIN_CHUNK = 512


def shift_labels(labels: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """Aligns each label with the position that predicts it; the last predicts none."""
    shifted = labels[..., 1:]
    return jnp.concatenate([shifted, jnp.full_like(labels[..., :1], IGNORE)], axis=-1)


def supervised_tokens(labels: Int[Array, "*B T"]) -> Int[Array, ""]:
    """Counts the labels that enter the loss, after the shift."""
    return (labels[..., 1:] != IGNORE).sum()


def cross_entropy_sum(
    head: Callable[[Any, Array], Array],
    head_params: Any,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    vocab_size: int,
    chunk: int | None = None,
) -> Float32[Array, ""]:
    """Computes `sum_i logsumexp(z_i) - z_i[y_i]` over supervised tokens.

    `z = head(head_params, h)`; the label of position t is `labels[:, t + 1]`.

    Args:
      head: maps (head_params, [C, D]) to float32 logits [C, V].
      head_params: whatever `head` takes; gradients flow into its float leaves.
      hidden: hidden states; in the order of `divide_tokens`, if the mesh of the trace
        divides the tokens of a row.
      labels: token ids, -100 = not supervised, not shifted.
      vocab_size: V.
      chunk: tokens at a time on a device; default by `vocab_size`.

    Returns:
      The sum; divide by `supervised_tokens` of the whole accumulation window.
    """
    targets = divide_tokens(shift_labels(labels), IGNORE)
    if chunk is None:
        chunk = max(_CHUNK_LOGITS // vocab_size, _MIN_CHUNK)
    # Equal chunks: 2,048 tokens at a limit of 2,000 become two of 1,024, not one of
    # 2,000 and one of padding.
    rows, length = local_shape(*hidden.shape[:2])
    chunks = min(-(-rows * length // chunk), length)
    hidden = pad_chunks(hidden, chunks)
    targets = pad_chunks(targets, chunks, IGNORE)
    return _chunked(
        head,
        head_params,
        cut_chunks(hidden, chunks),
        cut_chunks(targets, chunks),
    )


def _losses(head: Callable, params: Any, hidden: Array, targets: Array) -> Array:
    """Sums the losses of one chunk; hidden [B, c, D], targets [B, c]."""
    return _loss_and_logit_gradient(head(params, hidden), targets)[0]


def _loss_and_logit_gradient(logits: Array, targets: Array) -> tuple[Array, Array]:
    supervised = targets != IGNORE
    lse = jax.nn.logsumexp(logits, axis=-1)
    # -100 would index from the end of the vocabulary. What is picked instead is masked.
    index = jnp.where(supervised, targets, 0)
    picked = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    loss = jnp.where(supervised, lse - picked, 0.0).sum()
    # As a comparison, not a scatter: it fuses into the softmax and stays in registers.
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hot = classes == index[..., None]
    # dL/dz = softmax(z) - onehot(y), the derivative of logsumexp(z) - z[y].
    gradient = jnp.exp(logits - lse[..., None]) - hot.astype(jnp.float32)
    return loss, jnp.where(supervised[..., None], gradient, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    head: Callable, params: Any, hidden: Float[Array, "n B c D"], targets: Array
) -> Float32[Array, ""]:
    # Without a derivative (evaluation) nothing but the sum is computed.
    def step(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _losses(head, params, *chunk), None

    return jax.lax.scan(step, jnp.zeros((), jnp.float32), (hidden, targets))[0]


def _chunked_fwd(head: Callable, params: Any, hidden: Any, targets: Any) -> tuple:
    """Computes the loss and, chunk by chunk, its gradients.

    Of the head only leaves that are differentiated (`perturbed`) get a gradient, so a
    frozen head costs no [V, D] accumulator.
    """
    # `symbolic_zeros`: each leaf comes with whether its derivative is wanted.
    leaves, tree = jax.tree.flatten(params)
    trained = [leaf.perturbed for leaf in leaves]
    leaves = [leaf.value for leaf in leaves]
    hidden, targets = hidden.value, targets.value
    trained_leaves = [leaf for leaf, t in zip(leaves, trained, strict=True) if t]

    def call(trained_leaves: list, h: Array) -> Array:
        some = iter(trained_leaves)
        merged = [
            next(some) if t else leaf for leaf, t in zip(leaves, trained, strict=True)
        ]
        return head(jax.tree.unflatten(tree, merged), h)

    def step(carry: tuple, chunk: tuple[Array, Array]) -> tuple[tuple, Array]:
        total, sums = carry
        h, y = chunk
        # Forward and backward of a chunk in one step: its logits are gone before the
        # next chunk's exist. Only dh stays, as large as h; float32 logits of 8,192
        # tokens and 128,256 words would be 4.2 GB.
        logits, pullback = jax.vjp(call, trained_leaves, h)
        loss, dlogits = _loss_and_logit_gradient(logits, y)
        dtrained, dh = pullback(dlogits)
        # Float32 over all chunks: in bf16 a large sum swallows what later chunks add.
        sums = [s + d.astype(jnp.float32) for s, d in zip(sums, dtrained, strict=True)]
        return (total + loss, sums), dh

    sums = [jnp.zeros(leaf.shape, jnp.float32) for leaf in trained_leaves]
    start = (jnp.zeros((), jnp.float32), sums)
    (total, sums), dhidden = jax.lax.scan(step, start, (hidden, targets))
    grads = iter(sums)
    # None is a zero gradient to JAX, without an array of zeros.
    dleaves = [
        next(grads).astype(leaf.dtype) if t else None
        for leaf, t in zip(leaves, trained, strict=True)
    ]
    # Gradients of the sum itself; the backward pass has only a scalar to multiply by.
    return total, (_Gradient(tree, dleaves), dhidden)


@jax.tree_util.register_pytree_node_class
class _Gradient:
    """Gradients of some leaves of a tree, None for the others."""

    def __init__(self, tree: Any, leaves: list) -> None:
        self.tree, self.leaves = tree, leaves

    def tree_flatten(self) -> tuple[list, Any]:
        return self.leaves, self.tree

    @classmethod
    def tree_unflatten(cls, tree: Any, leaves: Any) -> _Gradient:
        return cls(tree, list(leaves))


def _chunked_bwd(head: Callable, residuals: tuple, dtotal: Any) -> tuple:
    del head
    gradient, dhidden = residuals
    if isinstance(dtotal, jax.custom_derivatives.SymbolicZero):
        dtotal = jnp.zeros((), jnp.float32)

    def scaled(g: Array) -> Array:
        # In float32: 1 / tokens in bf16 would be half a percent off.
        return (g.astype(jnp.float32) * dtotal).astype(g.dtype)

    dparams = jax.tree.unflatten(
        gradient.tree, [None if g is None else scaled(g) for g in gradient.leaves]
    )
    # Targets are integers and have no derivative.
    return dparams, scaled(dhidden), None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
