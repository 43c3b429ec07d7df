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

from pallas_kernels.attention.variant import PLAIN, Variant
from pallas_kernels.product import precision
from pallas_kernels.rows import open_devices

# Large and negative but finite: with -inf a row that sees nothing would be
# exp(-inf + inf) = NaN.
_MASKED = -1e30


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    variant: Variant = PLAIN,
    choice: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Computes the formula, with all scores in memory; arguments as below.

    Returns:
      The output, and the log-sum-exp of every query's scores.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    # [B, T, K, G, H]: query head n = k G + g reads key/value head k.
    grouped = q.reshape(batch, length, groups, heads // groups, width)
    index = jnp.arange(length)
    visible = (index[:, None] >= index[None, :])[None]
    variant = variant.for_length(length)
    window = variant.window(choice, length)
    if window is not None:
        visible = visible & (index[:, None] - index[None, :] < window)[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = _product("btkgh,bskh->bkgts", grouped, k) * variant.scale_of(width)
    if variant.softcap is not None:
        scores = variant.softcap * jnp.tanh(scores / variant.softcap)
    scores = jnp.where(visible[:, None, None], scores, _MASKED)
    # [B, K, G, T, 1]
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # The softmax, e^(s - lse), rounded to the dtype of v as in the other
    # implementations: a product of 16-bit operands runs on the tensor cores.
    weights = jnp.exp(scores - lse).astype(v.dtype)
    out = _product("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
    return out.astype(q.dtype), lse.reshape(batch, heads, length)


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    variant: Variant = PLAIN,
    choice: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `flash_attention` block by block, in blocks that suit the platform.

    The running softmax of Dao 2023 (https://arxiv.org/abs/2307.08691). Differentiable,
    with memory linear in the length; blocks above the diagonal, and those outside of
    the window, are skipped, forward and backward.

    Args:
      q: queries.
      k: keys.
      v: values.
      segment_ids: equal ids see each other; None = one segment.
      variant: scale, soft cap and windows.
      choice: which of several windows; None where there is one.
    """
    variant = variant.for_length(q.shape[1])
    traced = [] if segment_ids is None else [segment_ids]
    if len(variant.windows) > 1:
        assert choice is not None
        traced.append(choice)

    def in_blocks_of(block: int) -> Callable[..., Array]:
        def attend(q: Array, k: Array, v: Array, *traced: Array) -> Array:
            some = iter(traced)
            segments = None if segment_ids is None else next(some)
            return _in_blocks(block, variant, q, k, v, segments, next(some, None))

        return attend

    cpu, default = block_sizes(q)
    return jax.lax.platform_dependent(
        q, k, v, *traced, cpu=in_blocks_of(cpu), default=in_blocks_of(default)
    )


def block_sizes(q: Float[Array, "B T N H"]) -> tuple[int, int]:
    """Returns the side of the blocks on a CPU, and on other devices."""
    # Scores of one block pair: 2^25 of them in float32 are 134 MB. A GPU wants few and
    # large steps, a CPU blocks that stay in its cache.
    rows = -(-q.shape[0] // open_devices())
    side = math.isqrt(2**25 // (rows * q.shape[2]))
    power_of_two = 1 << side.bit_length() - 1
    return 256, min(max(power_of_two, 128), 1024)


def _in_blocks(
    block: int,
    variant: Variant,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
) -> Array:
    """Pads to a multiple of the block; queries never see the padding, which is last."""
    length = q.shape[1]
    # A row shorter than a block is one block, of a multiple of 8 tokens.
    block = min(block, -(-length // 8) * 8)
    pad = -length % block
    if pad:
        if segments is None:
            segments = jnp.ones((q.shape[0], length), jnp.int32)
        segments = jnp.pad(segments, ((0, 0), (0, pad)))
        q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k, v))
    out: Any = _flash(block, variant, q, k, v, segments, choice)
    return out[:, :length]


# --- Blocks of arrays that stay as the layers around have them, [B, T, heads * H] ---


def _rows(
    a: Float[Array, "B T NH"], i: Array, block: int, heads: tuple[int, ...]
) -> Array:
    """Returns block i of the tokens, heads first: [B, *heads, block, H]."""
    rows = slice_block(a, i, block)
    rows = rows.reshape(*rows.shape[:2], *heads, -1)
    # [B, block, *heads, H] -> [B, *heads, block, H]
    return jnp.moveaxis(rows, 1, -2)


def _put_rows(a: Float[Array, "B T NH"], rows: Array, i: Array) -> Array:
    """Writes block i, as `_rows` returns it."""
    rows = jnp.moveaxis(rows.astype(a.dtype), -2, 1)
    rows = rows.reshape(*rows.shape[:2], -1)
    return jax.lax.dynamic_update_slice_in_dim(a, rows, i * rows.shape[1], 1)


def slice_block(a: Array, i: Array, block: int, axis: int = 1) -> Array:
    """Returns block i of an axis, by default that of the tokens."""
    return jax.lax.dynamic_slice_in_dim(a, i * block, block, axis)


def _product(equation: str, a: Array, b: Array) -> Float32[Array, "..."]:
    return jnp.einsum(
        equation,
        a,
        b,
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


class Layout:
    """Which blocks a loop visits, and where they are: a row in order, all of it here.

    `block`, in every method, is the number of tokens of a block.
    """

    def pairs(
        self, blocks: int, block: int, window: int | None, q: Array
    ) -> tuple[Array, Array]:
        """Returns query and key block of every pair that is visited, by rows.

        That is on or below the diagonal, and within the window of a query of the block.

        Args:
          blocks: of queries.
          block: tokens of a block.
          window: of the layer.
          q: queries; ties the result to the loop.
        """
        # One loop over a known number of pairs: with a trip count that depends on the
        # row, a GPU would have to ask the host after every one.
        i, j = np.tril_indices(blocks)
        if window is not None:
            inside = j >= self.first_key(i, block, window)
            i, j = i[inside], j[inside]
        return tie((jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)), q)

    def first_key(self, i: Any, block: int, window: int | None) -> Any:
        """Returns the first key block that the queries of block i see."""
        if window is None:
            return 0
        # The first query, at i * block, sees window - 1 keys before itself.
        first = (i * block - window + 1) // block
        if isinstance(i, jax.Array):
            return jnp.maximum(first, 0)
        return np.maximum(first, 0)

    def key_place(self, j: Array, block: int) -> Array:
        """Returns which block of the arrays of keys and values key block j is."""
        del block
        return j

    def visible(
        self, segments: Array | None, i: Array, j: Array, block: int, window: int | None
    ) -> Bool[Array, "B t s"]:
        """Returns the keys of block j that each query of block i sees.

        [1, t, s] without segments.
        """
        rows = i * block + jnp.arange(block)
        columns = j * block + jnp.arange(block)
        seen = see(rows, columns, window)
        if segments is None:
            return seen
        q_segments = slice_block(segments, i, block)
        k_segments = slice_block(segments, j, block)
        return seen & (q_segments[:, :, None] == k_segments[:, None, :])


def tie(pairs: tuple[Array, Array], q: Array) -> tuple[Array, Array]:
    """Returns the pairs as values that depend on the queries.

    Without the barrier they are constants to the derivative of a scan over layers,
    which then computes the masks of all pairs ahead of the loop and holds them: memory
    that grows with the square of the length.
    """
    return jax.lax.optimization_barrier((pairs, q))[0]


def see(
    rows: Int[Array, " t"], columns: Int[Array, " s"], window: int | None
) -> Bool[Array, "1 t s"]:
    """Returns which keys, by their index in the row, each query sees."""
    causal = (rows[:, None] >= columns[None, :])[None]
    if window is not None:
        causal = causal & (rows[:, None] - columns[None, :] < window)[None]
    return causal


WHOLE = Layout()


def block_under(window: int | None, block: int, q: Float[Array, "B T N H"]) -> int:
    """Returns the side of the blocks that a window is covered with.

    A block of queries visits the keys of a window and of about another block, so blocks
    of half a window visit half as much again as is seen. They are halved only as long
    as a step has 2^23 scores, 34 MB: reading and writing those takes a GPU longer than
    starting the kernels of a step (by bandwidth and usual times to start, not
    measured).
    """
    scores = q.shape[0] * q.shape[2] * block * block
    while window is not None and 2 * block > window and block % 16 == 0:
        scores //= 4
        if scores < 2**23:
            break
        block //= 2
    return block


def by_window(
    variant: Variant, choice: Array | None, function: Callable, *arrays: Array
) -> Any:
    """Calls function(window, *arrays) with the window of the layer.

    The derivative never sees the branches: they are inside of `_flash`.
    """
    if choice is None:
        return function(variant.windows[0], *arrays)
    branches = [functools.partial(function, window) for window in variant.windows]
    return jax.lax.switch(choice, branches, *arrays)


# --- The running softmax, and its derivative ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(
    block: int,
    variant: Variant,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
) -> Float[Array, "B T N H"]:
    return _flash_fwd(block, variant, q, k, v, segments, choice)[0]


def _flash_fwd(
    block: int,
    variant: Variant,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    choice: Array | None,
) -> tuple[Array, tuple]:
    groups, width = k.shape[2:]

    def forward(window: int | None, *arrays: Array) -> tuple[Array, Array]:
        side = block_under(window, block, q)
        return forward_blocks(side, variant, window, groups, width, *arrays)

    arrays = flat(q, k, v)
    arrays = arrays if segments is None else (*arrays, segments)
    out, lse = by_window(variant, choice, forward, *arrays)
    out = out.reshape(q.shape)
    # Both have names: a policy that kept the output alone would have to run the whole
    # forward pass again for the log-sum-exp.
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, choice, out, lse)


def flat(*arrays: Float[Array, "B _ _ H"]) -> tuple[Float[Array, "B _ _"], ...]:
    """Joins heads and their widths: the layout of the layers around.

    Of arrays with an axis of heads XLA may choose another one where they enter a branch
    (`by_window`), and copy them on the way in and out.
    """
    return tuple(a.reshape(*a.shape[:2], -1) for a in arrays)


def forward_blocks(
    block: int,
    variant: Variant,
    window: int | None,
    groups: int,
    width: int,
    q: Float[Array, "B T NH"],
    k: Float[Array, "B S KH"],
    v: Float[Array, "B S KH"],
    segments: Array | None = None,
    *,
    layout: Layout = WHOLE,
) -> tuple[Float[Array, "B T NH"], Float32[Array, "B K G T"]]:
    """Goes over the visible key blocks j <= i for each query block i.

    Arrays keep the layout of the layers around, [B, T, heads * H], and only blocks are
    rearranged: then what the backward pass needs is held once for them and for us.

    Args:
      block: tokens of a block, which divides T and S.
      variant: scale and soft cap.
      window: of this layer.
      groups: K.
      width: H.
      q: queries.
      k: keys; S == T unless `layout` says otherwise.
      v: values.
      segments: of all keys.
      layout: which blocks are visited, and where they are.

    Returns:
      The output, and the log-sum-exp of every query's scores.
    """
    batch, length = q.shape[:2]
    scale, cap = variant.scale_of(width), variant.softcap
    grouped = (groups, q.shape[2] // width // groups)
    rows_shape = (batch, *grouped, block)

    def pair(carry: tuple, ij: tuple[Array, Array]) -> tuple[tuple, None]:
        top, total, acc, out, lse = carry
        i, j = ij
        # A row begins. Its running maximum starts below a masked score, so that the
        # first visible score wipes out what came of masked ones.
        begins = j == layout.first_key(i, block, window)
        top = jnp.where(begins, 2 * _MASKED, top)
        total = jnp.where(begins, 0.0, total)
        acc = jnp.where(begins, 0.0, acc)
        q_i = _rows(q, i, block, grouped)
        at = layout.key_place(j, block)
        k_j, v_j = (_rows(a, at, block, (groups,)) for a in (k, v))
        # [B, K, G, t, s]: the scores of one pair of blocks are all that is in memory.
        scores = _product("bkgth,bksh->bkgts", q_i, k_j) * scale
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        visible = layout.visible(segments, i, j, block, window)
        scores = jnp.where(visible[:, None, None], scores, _MASKED)
        # With m the running maximum, l the sum of exponentials, o the output times l:
        #   m' = max(m, max s),  l' = l e^(m - m') + sum e^(s - m'),
        #   o' = o e^(m - m') + e^(s - m') v.
        new_top = jnp.maximum(top, scores.max(axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        total = total * shrink + weights.sum(axis=-1)
        acc = acc * shrink[..., None] + _product(
            "bkgts,bksh->bkgth", weights.astype(v.dtype), v_j
        )
        # Written after every pair; the last of the row, on the diagonal, remains.
        out = _put_rows(out, acc / total[..., None], i)
        # lse = m + log l, from which the backward pass recovers the weights.
        row_lse = new_top + jnp.log(total)
        lse = jax.lax.dynamic_update_slice_in_dim(lse, row_lse, i * block, 3)
        return (new_top, total, acc, out, lse), None

    # m, l and o of the row of blocks at work; output and log-sum-exp of all of them.
    start = (
        jnp.zeros(rows_shape, jnp.float32),
        jnp.zeros(rows_shape, jnp.float32),
        jnp.zeros((*rows_shape, width), jnp.float32),
        jnp.zeros_like(q),
        jnp.zeros((*rows_shape[:3], length), jnp.float32),
    )
    pairs = layout.pairs(length // block, block, window, q)
    (_, _, _, out, lse), _ = jax.lax.scan(pair, start, pairs)
    return out, lse


def _flash_bwd(block: int, variant: Variant, residuals: tuple, dout: Array) -> tuple:
    q, k, v, segments, choice, out, lse = residuals

    groups, width = k.shape[2:]

    def backward(window: int | None, *arrays: Array) -> tuple[Array, Array, Array]:
        side = block_under(window, block, q)
        return backward_blocks(side, variant, window, groups, width, *arrays)

    arrays = (*flat(q, k, v, out, dout), lse)
    arrays = arrays if segments is None else (*arrays, segments)
    gradients = by_window(variant, choice, backward, *arrays)
    dq, dk, dv = (
        a.reshape(like.shape) for a, like in zip(gradients, (q, k, v), strict=True)
    )
    # Segment ids and the choice are integers and have no derivative.
    return dq, dk, dv, None, None


def backward_blocks(
    block: int,
    variant: Variant,
    window: int | None,
    groups: int,
    width: int,
    q: Float[Array, "B T NH"],
    k: Float[Array, "B S KH"],
    v: Float[Array, "B S KH"],
    out: Float[Array, "B T NH"],
    dout: Float[Array, "B T NH"],
    lse: Float32[Array, "B K G T"],
    segments: Array | None = None,
    *,
    layout: Layout = WHOLE,
) -> tuple[Array, Array, Array]:
    """Recomputes each block's weights p = e^(s - lse); arguments as above.

    ds = p * (dout v^T - inner) with inner = sum(dout * out), which equals the sum over
    the keys of p * dp; then dq = ds k, dk = ds^T q and dv = p^T dout. Under a soft cap
    s = c tanh(z / c), so dz = ds (1 - (s / c)^2) takes its place in dq and dk.
    """
    batch, length = q.shape[:2]
    scale, cap = variant.scale_of(width), variant.softcap
    grouped = (groups, q.shape[2] // width // groups)
    inner = dout.astype(jnp.float32) * out.astype(jnp.float32)
    inner = inner.reshape(batch, length, *grouped, width).sum(axis=-1)
    # [B, T, K, G] -> [B, K, G, T], the layout of lse.
    inner = inner.transpose(0, 2, 3, 1)

    def pair(carry: tuple, ij: tuple[Array, Array]) -> tuple[tuple, None]:
        q_or_dq, dk, dv, q_i, dq_i = carry
        i, j = ij
        # Read once a row, before `_put_rows` writes the gradient over it.
        begins = j == layout.first_key(i, block, window)
        q_i = jnp.where(begins, _rows(q_or_dq, i, block, grouped), q_i)
        dout_i = _rows(dout, i, block, grouped)
        lse_i, inner_i = slice_block(lse, i, block, 3), slice_block(inner, i, block, 3)
        at = layout.key_place(j, block)
        k_j, v_j = (_rows(a, at, block, (groups,)) for a in (k, v))
        # Scores as [key, query]: two of the three products that follow then read
        # their operands in storage order, and only the third transposes.
        scores = _product("bksh,bkgth->bksgt", k_j, q_i) * scale
        slope = scale
        if cap is not None:
            share = jnp.tanh(scores / cap)
            scores, slope = cap * share, scale * (1.0 - share * share)
        visible = layout.visible(segments, i, j, block, window)
        visible = visible.swapaxes(1, 2)[:, None, :, None]
        weights = jnp.exp(jnp.where(visible, scores, _MASKED) - lse_i[:, :, None])
        dweights = _product("bksh,bkgth->bksgt", v_j, dout_i)
        # The scale belongs to s = scale q k^T: here, dq and dk both get it.
        dscores = weights * (dweights - inner_i[:, :, None]) * slope
        # 16-bit operands for the products below, whose sums are float32.
        dscores = dscores.astype(q.dtype)
        dv_j = _product("bksgt,bkgth->bksh", weights.astype(q.dtype), dout_i)
        # The sums run over the G query heads that share the keys, too.
        dk_j = _product("bksgt,bkgth->bksh", dscores, q_i)
        dq_ij = _product("bksgt,bksh->bkgth", dscores, k_j)
        dq_i = jnp.where(begins, dq_ij, dq_i + dq_ij)
        return (
            _put_rows(q_or_dq, dq_i, i),
            _put_rows(dk, _rows(dk, at, block, (groups,)) + dk_j, at),
            _put_rows(dv, _rows(dv, at, block, (groups,)) + dv_j, at),
            q_i,
            dq_i,
        ), None

    # Pairs come row by row: the gradient of a row of queries is summed in float32 on
    # its own, and then overwrites those queries, which no later row reads.
    rows_shape = (batch, *grouped, block, width)
    start = (
        q,
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
        jnp.zeros(rows_shape, q.dtype),
        jnp.zeros(rows_shape, jnp.float32),
    )
    pairs = layout.pairs(length // block, block, window, q)
    (dq, dk, dv, _, _), _ = jax.lax.scan(pair, start, pairs)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_flash.defvjp(_flash_fwd, _flash_bwd)
