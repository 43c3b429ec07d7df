"""Checks the attention kernels on the device at hand, before a run relies on them.

Their numerics are tested in Pallas's interpreter and their code is compiled, but a
driver, a compiler or a device may still break them. Above all the interpreter finishes
every product at once, so only a device shows whether a buffer is given back while a
product still reads it. The check takes a second: packed rows, forward and backward,
against the formula in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import device
from pallas_kernels.attention.api import flash_attention
from pallas_kernels.attention.variant import PLAIN, Variant

# Tokens of the documents of a row; the rest is padding: documents of one token, of a
# block of the kernels and one more, and across blocks.
_DOCUMENTS = (1, 130, 200, 1, 40)
# A row of one document goes round every ring of buffers several times; and with so many
# tiles of 128 rows and a head, each multiprocessor has more than one of them.
_LENGTH = 1152
_BLOCK = 128
_RESULTS = ("output", "dq", "dk", "dv")


class AttentionCheck(NamedTuple):
    """Errors of the kernels, and of plain XLA in the same dtype."""

    errors: dict[str, float]
    """Result -> norm of the error over the norm of the result."""
    limits: dict[str, float]
    """Twice the error of plain XLA, and at least one rounding to bfloat16."""

    @property
    def passed(self) -> bool:
        """Whether no error is beyond its limit."""
        # A NaN is not below anything.
        return all(self.errors[name] <= self.limits[name] for name in self.errors)


def check_attention(
    heads: int,
    groups: int,
    head_dim: int,
    *,
    variant: Variant = PLAIN,
    implementation: str = "pallas",
    length: int = _LENGTH,
) -> AttentionCheck:
    """Computes packed rows by the kernels, by plain XLA and by the formula.

    A row of several documents, one of padding alone, and others of one document.

    Args:
      heads: query heads.
      groups: key/value heads.
      head_dim: width of a head.
      variant: scale, soft cap and windows; the first window is checked.
      implementation: as `flash_attention` takes it.
      length: tokens of a row, at least 384.

    Raises:
      ValueError: the implementation cannot compute this here; with the reason.
    """
    rng = np.random.default_rng(0)
    # As many query heads to a key/value head, and no more of them than needed.
    groups, heads = min(groups, 2), heads // groups * min(groups, 2)
    tiles = length // _BLOCK * heads
    whole = 1 if length < _LENGTH else -(-2 * device.multiprocessors() // tiles)
    documents = [_DOCUMENTS, (), *[(length,)] * whole]
    shapes = [(len(documents), length, n, head_dim) for n in (heads, groups, groups)]
    *inputs, cotangent = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in (*shapes, shapes[0])
    )
    segments = np.zeros((len(documents), length), np.int32)
    for row, lengths in enumerate(documents):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segments[row, : len(ids)] = ids
    # Padding has no meaning, so nothing comes from there.
    is_token = jnp.asarray(segments > 0)[..., None, None]
    cotangent = jnp.where(is_token, cotangent, 0.0)
    choice = None if len(variant.windows) == 1 else jnp.int32(0)

    def results(implementation: str, dtype: Any) -> list[np.ndarray]:
        def attend(q: Array, k: Array, v: Array) -> Array:
            out = flash_attention(
                *(q, k, v, jnp.asarray(segments)),
                variant=variant,
                choice=choice,
                implementation=implementation,
            )
            return jnp.where(is_token, out, 0.0)

        # Not jitted: as one program the interpreter would wait for itself.
        out, pullback = jax.vjp(attend, *(a.astype(dtype) for a in inputs))
        arrays = (out, *pullback(cotangent.astype(dtype)))
        return [np.asarray(a, np.float64) for a in arrays]

    exact = results("reference", jnp.float32)

    def errors(implementation: str) -> dict[str, float]:
        rounded = results(implementation, jnp.bfloat16)
        return {
            name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for name, a, b in zip(_RESULTS, rounded, exact, strict=True)
        }

    limits = {name: max(2 * e, 2.0**-8) for name, e in errors("xla").items()}
    return AttentionCheck(errors(implementation), limits)
