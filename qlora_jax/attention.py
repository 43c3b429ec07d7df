"""Causal self-attention, four ways that compute the same thing.

  eager  the textbook formula, scores [T, S] in memory.
  xla    blockwise with a running softmax (Dao 2023, https://arxiv.org/abs/2307.08691)
         in plain XLA: memory linear in length, blocks above the diagonal skipped,
         forward and backward.
  cudnn  NVIDIA's fused kernel through `jax.nn.dot_product_attention`.
  pallas our own kernels for Hopper GPUs (`pallas_kernels.attention`).

What a query may see is said once, for all of them: keys at its own or an earlier index
whose segment id equals its own. Padding is segment 0, documents of a packed row are
1, 2, ...; a padding mask is thus the case of a single document.

One token at a time against a cache is `decode_attention`, whichever of them computed
the prompt.
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

from pallas_kernels import attention as flash
from pallas_kernels.product import precision
from qlora_jax.errors import UserError

# Large and negative but finite: a row with nothing to see stays finite. The running
# maximum starts lower still, so a block of nothing but masked scores never wins.
_MASKED = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Computes `softmax(q k^T / sqrt(H) + mask) v`, causal, for grouped heads.

    Query head n reads key/value head n // (N // K). The softmax is float32.

    Args:
      q: queries.
      k: keys; S == T.
      v: values.
      segment_ids: 0 = padding, equal ids see each other; None = one document.
      implementation: "eager", "xla", "cudnn", "pallas" ("interpret" for tests of it),
        or "auto": pallas where it was measured to be the best for this case, else cudnn
        where it runs it, xla elsewhere.

    Returns:
      The attention output in the dtype of `q`.

    Raises:
      UserError: an implementation that cannot compute this here, with the reason.
    """
    if implementation == "auto" and flash.measured(q, segment_ids):
        implementation = "pallas"
    if implementation == "auto":
        if _cudnn_refusal(q, k, v, segment_ids) is not None:
            return _blockwise(q, k, v, segment_ids)
        # Chosen when the program is compiled, for the device it is compiled for.
        return jax.lax.platform_dependent(
            q, k, v, cuda=_cudnn, default=lambda q, k, v: _blockwise(q, k, v, None)
        )
    if implementation == "eager":
        seen = causal_mask(segment_ids, segment_ids, q.shape[1], k.shape[1], 0)
        return checkpoint_name(masked_attention(q, k, v, seen), "attention_out")
    if implementation == "xla":
        return _blockwise(q, k, v, segment_ids)
    if implementation == "cudnn":
        refusal = _cudnn_refusal(q, k, v, segment_ids)
        if refusal is not None:
            raise UserError(
                f"attention='cudnn' cannot be used here: {refusal} Use 'auto' or 'xla'."
            )
        return _cudnn(q, k, v)
    if implementation in ("pallas", "interpret"):
        refusal = flash.refusal(q, interpret=implementation == "interpret")
        if refusal is not None:
            raise UserError(
                f"attention='{implementation}' cannot be used here: {refusal} Use "
                "'auto' or 'xla'."
            )
        return flash.flash_attention(
            q, k, v, segment_ids, implementation=implementation
        )
    raise UserError(
        f"attention={implementation!r} does not exist. Choose from 'auto', 'eager', "
        "'xla', 'cudnn', 'pallas'."
    )


def causal_mask(
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    queries: int,
    keys: int,
    start: Int[Array, ""] | int,
) -> Array:
    """Says which keys each query sees, [B or 1, T, S] of bool.

    Query t stands at index `start + t` of the keys.
    """
    index = start + jnp.arange(queries)
    seen = (index[:, None] >= jnp.arange(keys)[None, :])[None]
    if query_segments is not None and key_segments is not None:
        seen = seen & (query_segments[:, :, None] == key_segments[:, None, :])
    return seen


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Array,
) -> Float[Array, "B T N H"]:
    """The plain formula under a mask [B or 1, T, S]; scores are held in memory."""
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        q,
        k,
        precision=precision(q.dtype),
        preferred_element_type=jnp.float32,
    ) * (1.0 / math.sqrt(width))
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
) -> Float[Array, "B 1 N H"]:
    """Attends from one token of each row to what a cache holds for a layer.

    The formula of `masked_attention`. On a GPU block by block of slots (softmax within
    each, the blocks weighted at the end), with sums in place of matrix products: a
    library's product would be handed a copy of the layer's keys and values with every
    token, where a sum reads them in place. No more can be had, since reading them is
    what the time goes to. On a CPU products are faster than sums.

    Args:
      q: queries.
      keys: of all layers.
      values: of all layers.
      layer: which of them to read.
      seen: the slots that hold something to see, at least one in each row.

    Returns:
      The attention output in the dtype of `q`.
    """
    return jax.lax.platform_dependent(
        q, keys, values, layer, seen, cpu=_decode_by_products, default=_decode_by_sums
    )


def _decode_by_products(
    q: Array, keys: Array, values: Array, layer: Array, seen: Array
) -> Array:
    # In float32: XLA's CPU backend has no product of bf16 in every arrangement.
    k, v = (
        jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
        .swapaxes(1, 2)
        .astype(jnp.float32)
        for stack in (keys, values)
    )
    out = masked_attention(q.astype(jnp.float32), k, v, seen[:, None])
    return out.astype(q.dtype)


def _decode_by_sums(
    q: Array, keys: Array, values: Array, layer: Array, seen: Array
) -> Array:
    batch, _, heads, width = q.shape
    groups, slots = keys.shape[2:4]
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
    scores = jnp.where(seen, scores * (1.0 / math.sqrt(width)), _MASKED)
    top = scores.max(axis=-1, keepdims=True)  # [B, K, blocks, heads of a group, 1]
    weights = jnp.exp(scores - top)
    parts = [
        (weights[:, :, :, head, :, None] * v).sum(axis=3) for head in range(per_group)
    ]
    share = jnp.exp(top - top.max(axis=2, keepdims=True))
    out = (share * jnp.stack(parts, axis=3)).sum(axis=2)
    total = (share * weights.sum(axis=-1, keepdims=True)).sum(axis=2)
    return (out / total).reshape(q.shape).astype(q.dtype)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def refusals(
    implementation: str,
    *,
    dtype: Any,
    head_dim: int,
    packed: bool,
    capability: str | None = None,
) -> list[str]:
    """Says why an implementation cannot compute a case, in parts of a sentence.

    What is wrong with the case itself, before any device or library is asked.

    Args:
      implementation: as `attention` takes it; "auto" finds one for every case.
      dtype: of queries, keys and values.
      head_dim: width of a head.
      packed: whether there are segment ids.
      capability: compute capability of the GPU, such as "8.9"; None = not asked.

    Returns:
      The reasons; none if it can.
    """
    if implementation in ("pallas", "interpret"):
        return flash.refusals(dtype, head_dim, capability)
    if implementation != "cudnn":
        return []
    reasons = []
    if packed:
        reasons.append("it takes neither segment ids nor padding masks")
    if dtype not in (jnp.bfloat16, jnp.float16):
        name = jnp.dtype(dtype).name
        reasons.append(f"it computes in bfloat16 or float16, not {name}")
    if head_dim % 8 or head_dim > 128:
        reasons.append(f"head_dim={head_dim} is no multiple of 8 up to 128")
    # "8.0" and the like on NVIDIA's, "gfx90a" and the like on other makers' GPUs.
    known = capability is None or capability[:1].isdigit()
    if not known or (capability is not None and float(capability) < 8.0):
        reasons.append(
            "it needs an NVIDIA GPU of compute capability 8.0 or newer, and this one "
            f"has {capability or 'none'}"
        )
    return reasons


def _cudnn_refusal(
    q: Array, k: Array, v: Array, segment_ids: Array | None
) -> str | None:
    """Says why cuDNN cannot compute this, or None."""
    capability = None
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    reasons = refusals(
        "cudnn",
        dtype=q.dtype,
        head_dim=q.shape[-1],
        packed=segment_ids is not None,
        capability=capability,
    )
    if reasons:
        return "; ".join(reasons) + "."
    try:
        jax.eval_shape(_cudnn, q, k, v)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"it needs an NVIDIA GPU and cuDNN ({error})."
    return None


def _blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Attention block by block, in blocks that suit the platform."""
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
