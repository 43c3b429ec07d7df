"""Causal self-attention: four implementations of one formula, and decoding.

Families change the formula in few ways (`Variant`): the factor of the scores, a soft
cap on them, and windows, which may differ from layer to layer.

  eager   the textbook formula, with scores [T, S] in memory.
  xla     block by block in plain XLA (`pallas_kernels.attention.xla`): memory linear in
          the length.
  cudnn   NVIDIA's fused kernel through `jax.nn.dot_product_attention`.
  pallas  kernels for Hopper GPUs (`pallas_kernels.attention.forward`).

Where the mesh of the trace has an axis "context", devices share the tokens of a row,
and "xla" is the only implementation (`pallas_kernels.attention.context`).

In all of them a query sees the keys at its own or an earlier index whose segment id
equals its own. Padding is segment 0, documents of a packed row are 1, 2, ...; a padding
mask is thus the case of a single document.

`decode_attention` computes one token at a time against a cache, after a prompt by any
of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import api as flash
from pallas_kernels.attention.context import divided_attention
from pallas_kernels.attention.variant import PLAIN, Variant
from pallas_kernels.attention.xla import blockwise_attention
from pallas_kernels.product import precision
from qlora_jax.errors import UserError
from qlora_jax.models.context import AXIS
from qlora_jax.models.sharding import divided_rows, row_axes, row_devices

# Large and negative but finite: with -inf a row that sees nothing would be NaN.
_MASKED = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    variant: Variant = PLAIN,
    choice: Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Computes `softmax(q k^T / sqrt(H) + mask) v`, causal, for grouped heads.

    Query head n reads key/value head n // (N // K). The softmax is float32.

    Args:
      q: queries.
      k: keys; S == T.
      v: values.
      segment_ids: 0 = padding, equal ids see each other; None = one document.
      variant: scale, soft cap and windows.
      choice: index of this layer's window, where the variant has several.
      implementation: "eager", "xla", "cudnn", "pallas" ("interpret" for its tests), or
        "auto": pallas where it was measured to be the best for this case, else cudnn
        where it supports the case, else xla.

    Returns:
      The attention output in the dtype of `q`.

    Raises:
      UserError: the implementation cannot compute this here; with the reason.

    Under a mesh with "context" the tokens are in the order of
    `qlora_jax.models.context`.
    """
    variant = variant.for_length(q.shape[1])
    if len(variant.windows) == 1:
        choice = None
    if row_devices() > 1:
        refusal = context_refusal(implementation)
        if refusal is not None:
            raise UserError(refusal)
        return divided_attention(
            *(q, k, v, segment_ids, variant, choice),
            axis=AXIS,
            row_axes=row_axes(),
        )
    if implementation == "auto":
        return _best_attention(q, k, v, segment_ids, variant, choice)
    if implementation == "eager":
        visible = causal_mask(segment_ids, segment_ids, q.shape[1], k.shape[1], 0)
        visible = within_window(visible, variant, choice)
        out = masked_attention(q, k, v, visible, variant)
        return checkpoint_name(out, "attention_out")
    if implementation == "xla":
        return blockwise_attention(q, k, v, segment_ids, variant, choice)
    if implementation == "cudnn":
        refusal = _cudnn_refusal(q, k, v, segment_ids, variant)
        if refusal is not None:
            raise UserError(
                f"attention='cudnn' cannot be used here: {refusal} Use 'auto' or 'xla'."
            )
        return _cudnn(q, k, v, variant)
    if implementation in ("pallas", "interpret"):
        divided = divided_rows(q)
        interpret = implementation == "interpret"
        refusal = flash.refusal(q, interpret=interpret, divided=divided)
        if refusal is not None:
            raise UserError(
                f"attention='{implementation}' cannot be used here: {refusal} Use "
                "'auto' or 'xla'."
            )
        return flash.flash_attention(
            *(q, k, v, segment_ids),
            variant=variant,
            choice=choice,
            implementation=implementation,
            divided=divided,
        )
    raise UserError(
        f"attention={implementation!r} does not exist. Choose from 'auto', 'eager', "
        "'xla', 'cudnn', 'pallas'."
    )


def context_refusal(implementation: str) -> str | None:
    """Returns why an implementation cannot divide the tokens of a row, or None.

    Args:
      implementation: as `attention` takes it.
    """
    if implementation in ("auto", "xla"):
        return None
    return (
        f"attention={implementation!r} needs whole rows, and the mesh divides their "
        "tokens over the devices of `context`. Use 'auto' or 'xla', or a mesh with "
        "context = 1."
    )


def _best_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    variant: Variant,
    choice: Array | None,
) -> Array:
    divided = divided_rows(q)
    if flash.measured(q, segment_ids, divided):
        return flash.flash_attention(
            *(q, k, v, segment_ids),
            variant=variant,
            choice=choice,
            implementation="pallas",
            divided=divided,
        )
    if _cudnn_refusal(q, k, v, segment_ids, variant) is not None:
        return blockwise_attention(q, k, v, segment_ids, variant, choice)
    # Chosen when the program is compiled, for the device it is compiled for.
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        cuda=lambda q, k, v: _cudnn(q, k, v, variant),
        default=lambda q, k, v: blockwise_attention(q, k, v, None, variant),
    )


def causal_mask(
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    queries: int,
    keys: int,
    start: Int[Array, ""] | int,
) -> Array:
    """Returns which keys each query sees, [B or 1, T, S] of bool.

    Query t is at index `start + t` of the keys.
    """
    index = start + jnp.arange(queries)
    visible = (index[:, None] >= jnp.arange(keys)[None, :])[None]
    if query_segments is not None and key_segments is not None:
        visible = visible & (query_segments[:, :, None] == key_segments[:, None, :])
    return visible


def within_window(
    visible: Array,
    variant: Variant,
    choice: Int[Array, ""] | None,
    start: Int[Array, ""] | int = 0,
) -> Array:
    """Returns `causal_mask` without the keys outside of the layer's window."""
    queries, keys = visible.shape[1:]
    window = variant.window(choice, keys)
    if window is None:
        return visible
    index = start + jnp.arange(queries)
    distance = index[:, None] - jnp.arange(keys)[None, :]
    return visible & (distance < window)[None]


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Array,
    variant: Variant = PLAIN,
) -> Float[Array, "B T N H"]:
    """Computes the formula under a mask [B or 1, T, S], with all scores in memory."""
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    # [B, T, K, G, H]: grouped heads share keys by an axis, not by repeating them.
    q = q.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        q,
        k,
        precision=precision(q.dtype),
        preferred_element_type=jnp.float32,
    ) * variant.scale_of(width)
    if variant.softcap is not None:
        scores = variant.softcap * jnp.tanh(scores / variant.softcap)
    # [B, K, G, T, S], float32 until the softmax is over.
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights,
        v,
        precision=precision(v.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, queries, heads, width).astype(q.dtype)


def decode_attention(
    q: Float[Array, "B 1 N H"],
    keys: Float[Array, "L B K S H"],
    values: Float[Array, "L B K S H"],
    layer: Int[Array, ""],
    seen: Bool[Array, "B S"],
    variant: Variant = PLAIN,
) -> Float[Array, "B 1 N H"]:
    """Computes `masked_attention` of one token of each row against a layer's cache.

    Args:
      q: queries.
      keys: of all layers.
      values: of all layers.
      layer: which of them to read.
      seen: the slots that each row sees, at least one; with `within_window`.
      variant: scale and soft cap.

    Returns:
      The attention output in the dtype of `q`.
    """
    # On a CPU products are faster than sums.
    return jax.lax.platform_dependent(
        q,
        keys,
        values,
        layer,
        seen,
        cpu=functools.partial(_decode_by_products, variant=variant),
        default=functools.partial(_decode_by_sums, variant=variant),
    )


def _decode_by_products(
    q: Array,
    keys: Array,
    values: Array,
    layer: Array,
    seen: Array,
    variant: Variant = PLAIN,
) -> Array:
    # In float32: XLA's CPU backend has no product of bf16 in every arrangement.
    # A layer of [L, B, K, S, H] as [B, S, K, H].
    k, v = (
        jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
        .swapaxes(1, 2)
        .astype(jnp.float32)
        for stack in (keys, values)
    )
    out = masked_attention(q.astype(jnp.float32), k, v, seen[:, None], variant)
    return out.astype(q.dtype)


def _decode_by_sums(
    q: Array,
    keys: Array,
    values: Array,
    layer: Array,
    seen: Array,
    variant: Variant = PLAIN,
) -> Array:
    """Goes block by block of slots: a softmax within each, weighted at the end.

    With sums in place of matrix products, on a GPU: a library's product would be given
    a copy of the layer's keys and values with every token, where a sum reads them in
    place, and reading them is what takes the time.
    """
    batch, _, heads, width = q.shape
    groups, slots = keys.shape[2:4]
    # Equal blocks of at most 128 slots, so the cache needs no padding.
    block = math.gcd(slots, 128)
    blocks = (batch, groups, slots // block, block, width)
    k, v = (
        jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
        .reshape(blocks)
        .astype(jnp.float32)
        for stack in (keys, values)
    )
    per_group = heads // groups
    queries = q.reshape(batch, groups, 1, 1, per_group, width).astype(jnp.float32)
    # Head by head: in one expression, a product for each head would be written first.
    scores = jnp.stack(
        [(k * queries[:, :, :, :, head]).sum(axis=-1) for head in range(per_group)],
        axis=3,
    )
    seen = seen.reshape(batch, 1, slots // block, 1, block)
    scores = scores * variant.scale_of(width)
    if variant.softcap is not None:
        scores = variant.softcap * jnp.tanh(scores / variant.softcap)
    scores = jnp.where(seen, scores, _MASKED)
    top = scores.max(axis=-1, keepdims=True)  # [B, K, blocks, heads of a group, 1]
    # In a block without visible slots the maximum is -1e30 and each weight 1; its share
    # below is exp(-1e30 - max) = 0.
    weights = jnp.exp(scores - top)
    parts = [
        (weights[:, :, :, head, :, None] * v).sum(axis=3) for head in range(per_group)
    ]
    # out = sum_b w_b o_b / sum_b w_b l_b with w_b = exp(m_b - max m): block b has the
    # maximum m_b, the sum of exponentials l_b and the sum of exponentials times v, o_b.
    share = jnp.exp(top - top.max(axis=2, keepdims=True))
    out = (share * jnp.stack(parts, axis=3)).sum(axis=2)
    total = (share * weights.sum(axis=-1, keepdims=True)).sum(axis=2)
    return (out / total).reshape(q.shape).astype(q.dtype)


def _cudnn(q: Array, k: Array, v: Array, variant: Variant = PLAIN) -> Array:
    (window,) = variant.windows
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=variant.scale,
        # Keys on the left and right of a query, itself not counted.
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def attention_refusals(
    implementation: str,
    *,
    dtype: Any,
    head_dim: int,
    packed: bool,
    capability: str | None = None,
    variant: Variant = PLAIN,
) -> list[str]:
    """Returns why an implementation cannot compute a case, as clauses of a sentence.

    Only what is wrong with the case itself; no device or library is queried.

    Args:
      implementation: as `attention` takes it; "auto" supports every case.
      dtype: of queries, keys and values.
      head_dim: width of a head.
      packed: whether there are segment ids.
      capability: compute capability of the GPU, such as "8.9"; None = unknown.
      variant: scale, soft cap and windows.

    Returns:
      The reasons; empty if it can.
    """
    dtype = jnp.dtype(dtype)  # a name does not equal a type
    if implementation in ("pallas", "interpret"):
        return flash.refusals(dtype, head_dim, capability)
    if implementation != "cudnn":
        return []
    reasons = []
    if packed:
        reasons.append("it takes neither segment ids nor padding masks")
    if variant.softcap is not None:
        reasons.append("it has no soft cap on the scores")
    if len(variant.windows) > 1:
        reasons.append("it takes one window for all layers")
    if dtype not in (jnp.bfloat16, jnp.float16):
        name = dtype.name
        reasons.append(f"it computes in bfloat16 or float16, not {name}")
    if head_dim % 8 or head_dim > 128:
        reasons.append(f"head_dim={head_dim} is not a multiple of 8 up to 128")
    # "8.0" and the like on NVIDIA's, "gfx90a" and the like on other makers' GPUs.
    is_nvidia = capability is None or capability[:1].isdigit()
    if not is_nvidia or (capability is not None and float(capability) < 8.0):
        reasons.append(
            "it needs an NVIDIA GPU of compute capability 8.0 or newer, and this one "
            f"has {capability or 'none'}"
        )
    return reasons


def _cudnn_refusal(
    q: Array, k: Array, v: Array, segment_ids: Array | None, variant: Variant = PLAIN
) -> str | None:
    """Returns why cuDNN cannot compute this, or None."""
    capability = None
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    reasons = attention_refusals(
        "cudnn",
        dtype=q.dtype,
        head_dim=q.shape[-1],
        packed=segment_ids is not None,
        capability=capability,
        variant=variant,
    )
    if reasons:
        return "; ".join(reasons) + "."
    try:
        # jax looks for cuDNN while it traces, and raises without one that can do this.
        jax.eval_shape(functools.partial(_cudnn, variant=variant), q, k, v)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"it needs an NVIDIA GPU and cuDNN ({error})."
    return None
