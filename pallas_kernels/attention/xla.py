"""Attention in plain XLA: the formula, and block by block with a running softmax.

What a query sees is the same for both: see `pallas_kernels.attention`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.product import precision

# Large and negative but finite: a row with nothing to see stays finite. The running
# maximum starts lower still, so a block of nothing but masked scores never wins.
_MASKED = -1e30


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """The formula: the output, and the log-sum-exp of every query's scores."""
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups, width)
    index = jnp.arange(length)
    seen = (index[:, None] >= index[None, :])[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    product = functools.partial(
        jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32
    )
    scores = product("btkgh,bskh->bkgts", grouped, k) * (1.0 / math.sqrt(width))
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - lse).astype(v.dtype)
    out = product("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
    return out.astype(q.dtype), lse.reshape(batch, heads, length)


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `flash_attention` block by block, in blocks that suit the platform.

    Differentiable, with memory linear in the length; blocks above the diagonal are
    skipped, forward and backward.
    """
    optional = () if segment_ids is None else (segment_ids,)

    def with_block(block: int) -> Callable[..., Array]:
        return lambda q, k, v, *rest: _in_blocks(
            block, q, k, v, rest[0] if rest else None
        )

    # Scores of one block pair: 2^25 of them in float32 are 134 MB. A GPU wants few and
    # large steps, a CPU blocks that stay in its cache.
    side = math.isqrt(2**25 // (q.shape[0] * q.shape[2]))
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        *optional,
        cpu=with_block(256),
        default=with_block(min(max(1 << side.bit_length() - 1, 128), 1024)),
    )


def _in_blocks(
    block: int, q: Array, k: Array, v: Array, segment_ids: Array | None
) -> Array:
    """Pads to whole blocks."""
    length = q.shape[1]
    block = min(block, -(-length // 8) * 8)
    pad = -length % block
    segments = segment_ids
    if pad:
        if segments is None:
            segments = jnp.ones((q.shape[0], length), jnp.int32)
        segments = jnp.pad(segments, ((0, 0), (0, pad)))
        q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k, v))
    out: Any = _flash(block, q, k, v, segments)
    return out[:, :length]


def _rows(
    a: Float[Array, "B T NH"], i: Array, block: int, heads: tuple[int, ...]
) -> Array:
    """Block i of the tokens, heads first: [B, *heads, block, H]."""
    part = _slice(a, i, block)
    part = part.reshape(*part.shape[:2], *heads, -1)
    return jnp.moveaxis(part, 1, -2)


def _put_rows(whole: Float[Array, "B T NH"], part: Array, i: Array) -> Array:
    """Writes block i, as `_rows` gives it, where it belongs."""
    part = jnp.moveaxis(part.astype(whole.dtype), -2, 1)
    part = part.reshape(*part.shape[:2], -1)
    return jax.lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[1], 1)


def _slice(a: Array, i: Array, block: int, axis: int = 1) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, i * block, block, axis)


def _product(equation: str, a: Array, b: Array) -> Float32[Array, "..."]:
    return jnp.einsum(
        equation,
        a,
        b,
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _visible(
    segments: Array | None, i: Array, j: Array, block: int
) -> Bool[Array, "B t s"]:
    """Which keys of block j each query of block i sees; [1, t, s] without segments."""
    rows = i * block + jnp.arange(block)
    columns = j * block + jnp.arange(block)
    seen = (rows[:, None] >= columns[None, :])[None]
    if segments is None:
        return seen
    q_segments = _slice(segments, i, block)
    k_segments = _slice(segments, j, block)
    return seen & (q_segments[:, :, None] == k_segments[:, None, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    block: int, q: Array, k: Array, v: Array, segments: Array | None
) -> Float[Array, "B T N H"]:
    return _flash_fwd(block, q, k, v, segments)[0]


def _pairs(blocks: int, q: Array) -> tuple[Array, Array]:
    """Query and key block of every pair on or below the diagonal, row by row.

    One loop over a known number of pairs: with a trip count that depends on the row, a
    GPU would have to ask the host after every one.

    The barrier ties the indices to `q`. Without it they are constants to the derivative
    of a scan over layers, which then computes the masks of all pairs ahead of the loop
    and holds them: memory that grows with the square of the length.
    """
    i, j = np.tril_indices(blocks)
    pairs = jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)
    return jax.lax.optimization_barrier((pairs, q))[0]


def _flash_fwd(
    block: int, q: Array, k: Array, v: Array, segments: Array | None
) -> tuple[Array, tuple]:
    """Running softmax over key blocks j <= i for each query block i.

    Whole arrays stay as the layers around have them, [B, T, heads * width], and blocks
    alone are rearranged: what the backward pass needs is then held once, for them and
    for us.
    """
    residuals = (q, k, v, segments)
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    scale = 1.0 / math.sqrt(width)
    grouped = (groups, heads // groups)
    rows = (batch, *grouped, block)
    q, k, v = (a.reshape(batch, length, -1) for a in (q, k, v))

    def pair(carry: tuple, ij: tuple[Array, Array]) -> tuple[tuple, None]:
        top, total, acc, out, lse = carry
        i, j = ij
        fresh = j == 0
        top = jnp.where(fresh, 2 * _MASKED, top)
        total = jnp.where(fresh, 0.0, total)
        acc = jnp.where(fresh, 0.0, acc)
        q_i = _rows(q, i, block, grouped)
        k_j, v_j = (_rows(a, j, block, (groups,)) for a in (k, v))
        scores = _product("bkgth,bksh->bkgts", q_i, k_j) * scale
        seen = _visible(segments, i, j, block)
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        total = total * shrink + weights.sum(axis=-1)
        acc = acc * shrink[..., None] + _product(
            "bkgts,bksh->bkgth", weights.astype(v.dtype), v_j
        )
        # Written after every pair; what stays is the row's last, on the diagonal.
        out = _put_rows(out, acc / total[..., None], i)
        row = new_top + jnp.log(total)
        lse = jax.lax.dynamic_update_slice_in_dim(lse, row, i * block, 3)
        return (new_top, total, acc, out, lse), None

    start = (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
        jnp.zeros_like(q),
        jnp.zeros((*rows[:3], length), jnp.float32),
    )
    pairs = _pairs(length // block, q)
    (_, _, _, out, lse), _ = jax.lax.scan(pair, start, pairs)
    out = checkpoint_name(out.reshape(residuals[0].shape), "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (*residuals, out, lse)


def _flash_bwd(block: int, residuals: tuple, dout: Array) -> tuple:
    """Recomputes each block's weights from the saved log-sum-exp."""
    q, k, v, segments, out, lse = residuals
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    scale = 1.0 / math.sqrt(width)
    inner = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    inner = inner.reshape(batch, length, groups, -1).transpose(0, 2, 3, 1)
    grouped = (groups, heads // groups)
    shapes = [a.shape for a in (q, k, v)]
    q, k, v, dout = (a.reshape(batch, length, -1) for a in (q, k, v, dout))

    def pair(carry: tuple, ij: tuple[Array, Array]) -> tuple[tuple, None]:
        q_or_dq, dk, dv, q_i, dq_i = carry
        i, j = ij
        q_i = jnp.where(j == 0, _rows(q_or_dq, i, block, grouped), q_i)
        dout_i = _rows(dout, i, block, grouped)
        lse_i, inner_i = _slice(lse, i, block, 3), _slice(inner, i, block, 3)
        k_j, v_j = (_rows(a, j, block, (groups,)) for a in (k, v))
        # Scores as [key, query]: two of the three products that follow then read
        # their operands in the order they lie in, and only the third transposes.
        scores = _product("bksh,bkgth->bksgt", k_j, q_i) * scale
        seen = _visible(segments, i, j, block).swapaxes(1, 2)[:, None, :, None]
        weights = jnp.exp(jnp.where(seen, scores, _MASKED) - lse_i[:, :, None])
        dweights = _product("bksh,bkgth->bksgt", v_j, dout_i)
        dscores = weights * (dweights - inner_i[:, :, None]) * scale
        dscores = dscores.astype(q.dtype)
        dv_j = _product("bksgt,bkgth->bksh", weights.astype(q.dtype), dout_i)
        dk_j = _product("bksgt,bkgth->bksh", dscores, q_i)
        dq_ij = _product("bksgt,bksh->bkgth", dscores, k_j)
        dq_i = jnp.where(j == 0, dq_ij, dq_i + dq_ij)
        return (
            _put_rows(q_or_dq, dq_i, i),
            _put_rows(dk, _rows(dk, j, block, (groups,)) + dk_j, j),
            _put_rows(dv, _rows(dv, j, block, (groups,)) + dv_j, j),
            q_i,
            dq_i,
        ), None

    # Pairs come row by row: the gradient of a row of queries is summed in float32 for
    # itself, and lies in the end where those queries were, which are needed no more.
    row = (batch, *grouped, block, width)
    start = (
        q,
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
        jnp.zeros(row, q.dtype),
        jnp.zeros(row, jnp.float32),
    )
    pairs = _pairs(length // block, q)
    (dq, dk, dv, _, _), _ = jax.lax.scan(pair, start, pairs)
    dk, dv = dk.astype(k.dtype), dv.astype(v.dtype)
    return *(a.reshape(s) for a, s in zip((dq, dk, dv), shapes, strict=True)), None


_flash.defvjp(_flash_fwd, _flash_bwd)
