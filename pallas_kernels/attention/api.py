"""`flash_attention`: checks, the choice of an implementation, the derivative.

"reference" is the formula, with all scores in memory: what the others are compared
with. "xla" goes block by block in plain XLA. "pallas" are the kernels of
`attention.forward` and `attention.backward`, for NVIDIA's Hopper (H100, H200): their
derivative keeps `q`, `k`, `v`, the output and one float32 for each query and head, and
takes no workspace beyond another two, where cuDNN's takes a float32 of the size of dq.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import device
from pallas_kernels.attention.variant import PLAIN, Variant
from pallas_kernels.attention.xla import blockwise_attention, reference_attention
from pallas_kernels.rows import Divided, by_rows, mesh_refusals

IMPLEMENTATIONS = ("reference", "xla", "pallas", "interpret")
"""What computes: the formula; plain XLA, block by block; the kernels; or those kernels
in Pallas's interpreter, which is slow and runs on any device, for tests."""

HEAD_DIMS = (64, 128)
"""Head widths of the kernels."""

BLOCK = 128
"""Tokens to a multiple of which a sequence is padded for the kernels."""


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    variant: Variant = PLAIN,
    choice: Int[Array, ""] | None = None,
    implementation: str | None = None,
    divided: Divided | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `softmax(q k^T / sqrt(H) + mask) v`, causal and within segments.

    Query head n reads key/value head n // (N // K). Softmax and sums are float32;
    "pallas" rounds the softmax weights to bfloat16 before they are multiplied.

    "xla" and "pallas" are differentiated in reverse mode only, "reference" in any. The
    residuals of the first two are named "attention_out" and
    "attention_lse" for policies of `jax.checkpoint`.

    Args:
      q: queries.
      k: keys.
      v: values.
      segment_ids: equal ids see each other, 0 = padding; None = one segment.
      variant: scale, soft cap and windows.
      choice: index of the window, where the variant has several.
      implementation: one of `IMPLEMENTATIONS`; None = "pallas" where it was measured to
        be better, else "xla".
      divided: how the devices of a mesh divide the rows (`pallas_kernels.rows`), of
        which each must have whole ones.

    Returns:
      The attention output in the dtype of `q`.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot do this here,
        with the reason.
    """
    _check(q, k, v, segment_ids)
    chosen = implementation
    if chosen is None:
        chosen = "pallas" if measured(q, segment_ids, divided) else "xla"
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(
            f"`flash_attention`: implementation={chosen!r} does not exist. Choose "
            "'reference', 'xla', 'pallas', or None for what is known to be best here."
        )
    if chosen == "reference":
        return reference_attention(q, k, v, segment_ids, variant, choice)[0]
    if chosen == "xla":
        return blockwise_attention(q, k, v, segment_ids, variant, choice)
    reason = refusal(q, interpret=chosen == "interpret", divided=divided)
    if reason is not None:
        raise ValueError(
            f"`flash_attention`: implementation={chosen!r} cannot be used here: "
            f"{reason} Use 'xla', or None for the best that can."
        )
    length = q.shape[1]
    pad = -length % BLOCK
    segments = None if segment_ids is None else segment_ids.astype(jnp.int32)
    if pad:
        # After all others, so no query sees them.
        q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k, v))
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, pad)))
    # Data of the kernel, so that layers with other windows share it.
    window = variant.for_length(length).window(choice, length)
    static = _Static(chosen == "interpret", variant.scale, variant.softcap, divided)
    out: Array = _attention(static, q, k, v, segments, window)  # pyright: ignore[reportAssignmentType]
    return out[:, :length]


def measured(
    q: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"] | None = None,
    divided: Divided | None = None,
) -> bool:
    """Returns whether the kernels were measured on this device to be the better choice.

    Better than the alternatives: cuDNN for rows of one segment, "xla" for packed ones.
    """
    if jax.default_backend() != "gpu" or refusal(q, divided=divided) is not None:
        return False
    case = f"{q.shape[-1]} {'whole' if segment_ids is None else 'packed'}"
    table = device.tuned(device.device_kind(), "attention").get("from_length", {})
    min_length = table.get(case)
    return min_length is not None and q.shape[1] >= min_length


def refusal(
    q: Float[Array, "B T N H"],
    *,
    interpret: bool = False,
    divided: Divided | None = None,
) -> str | None:
    """Returns all reasons why the kernels cannot compute this here, or None.

    Args:
      q: queries.
      interpret: whether Pallas's interpreter would run them.
      divided: as for `flash_attention`.
    """
    reasons = device.kernel_refusals(interpret=interpret) + mesh_refusals(divided)
    capability = None if interpret else device.capability()
    reasons += refusals(q.dtype, q.shape[-1], capability)
    return "; ".join(reasons) + "." if reasons else None


def refusals(
    dtype: Any,
    head_dim: int,
    capability: str | None = None,
) -> list[str]:
    """Returns why the kernels cannot compute a case, as clauses of a sentence.

    Args:
      dtype: of queries, keys and values.
      head_dim: width of a head.
      capability: compute capability of the GPU, such as "9.0"; None = unknown.
    """
    reasons = []
    if dtype != jnp.bfloat16:
        reasons.append(f"they compute in bfloat16, not {jnp.dtype(dtype).name}")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"they support a head_dim of 64 or 128, not {head_dim}")
    if capability not in (None, "9.0"):
        reasons.append(
            "they use instructions that only NVIDIA's Hopper has (compute capability "
            f"9.0: H100, H200), and this one has {capability or 'none'}"
        )
    return reasons


def _check(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    batch, length, heads, width = q.shape
    if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (batch, length, width):
        raise ValueError(
            "`flash_attention`: keys and values must have the batch, length and "
            f"head_dim of the queries; got q {q.shape}, k {k.shape} and v {v.shape} as "
            "[B, T, heads, head_dim]."
        )
    if heads % k.shape[2]:
        raise ValueError(
            f"`flash_attention`: {heads} query heads cannot share {k.shape[2]} "
            "key/value heads evenly; give a multiple of them."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "`flash_attention`: q, k and v must have one dtype, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}."
        )
    if min(q.shape) < 1:
        raise ValueError(f"`flash_attention`: q of shape {q.shape} is empty.")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(
            f"`flash_attention`: expected a segment id for every token, "
            f"{(batch, length)}; got segment_ids of shape {segment_ids.shape}."
        )


class _Static(NamedTuple):
    interpret: bool
    scale: float | None
    softcap: float | None
    divided: Divided | None = None

    @property
    def options(self) -> dict[str, Any]:
        interpreter = device.interpreter() if self.interpret else False
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "interpret": interpreter,
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    window: Array | None,
) -> Array:
    return _forward(static, q, k, v, segments, window)[0]


def _forward(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    window: Array | None,
) -> tuple[Array, tuple]:
    from pallas_kernels.attention.forward import forward

    def attend(*arrays: Any) -> tuple[tuple[Array, Array], tuple]:
        return forward(*arrays, **static.options), ()

    rows, shared = (q, k, v, segments), (window,)
    (out, lse), _ = by_rows(attend, static.divided, rows, shared)
    # Without the barrier, the XLA of jax 0.11 runs the kernel twice where both results
    # are kept for all layers: once to use them, once to write them into the stack.
    out, lse = jax.lax.optimization_barrier((out, lse))
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, window, out, lse)


def _backward(
    static: _Static, residuals: tuple, dout: Array
) -> tuple[Array, Array, Array, None, None]:
    from pallas_kernels.attention.backward import backward

    q, k, v, segments, window, out, lse = residuals

    def derive(*arrays: Any) -> tuple[tuple[Array, ...], tuple]:
        return backward(*arrays, **static.options), ()

    rows = (q, k, v, segments, out, lse, dout)
    (dq, dk, dv), _ = by_rows(derive, static.divided, rows, (window,))
    # Segment ids and windows are integers and have no derivative.
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)
