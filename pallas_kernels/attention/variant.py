"""What a model changes of the attention formula: scale, soft cap, windows."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Variant(NamedTuple):
    """Changes of `softmax(q k^T / sqrt(H) + mask) v`; hashable, hence static.

    A score is `z = scale q k^T`, and with a soft cap c, `c tanh(z / c)` (Gemma 2,
    arXiv:2408.00118). A query sees the last `window` keys up to its own.
    """

    scale: float | None = None
    """Factor of the scores; None = 1 / sqrt(H)."""
    softcap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    """The window of the layer, or, where a traced index chooses, those of all kinds of
    layers; None = no window."""

    def for_length(self, length: int) -> Variant:
        """Leaves out windows that rows of this length do not reach."""
        windows = tuple(
            None if window is None or window >= length else window
            for window in self.windows
        )
        # Alike for every layer: nothing is left to choose.
        return self._replace(windows=windows[:1] if len(set(windows)) == 1 else windows)

    def window(self, choice: Array | None, unlimited: int) -> Array | None:
        """Returns the window of a layer; None if no layer has one.

        Args:
          choice: index of the window, where there are several.
          unlimited: a window that nothing is outside of, for layers without one.
        """
        if self.windows == (None,):
            return None
        windows = jnp.asarray([w or unlimited for w in self.windows], jnp.int32)
        return windows[0 if choice is None else choice]

    def scale_of(self, width: int) -> float:
        """Returns the factor of the scores for heads of this width."""
        return 1.0 / math.sqrt(width) if self.scale is None else self.scale


PLAIN = Variant()
"""The formula as it stands."""
