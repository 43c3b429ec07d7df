"""Sampling settings; imports no JAX, so that `--help` is fast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_jax.errors import raise_problems


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Raises:
      UserError: values out of their ranges; lists all of them.
    """

    temperature: float = 0.0
    """0 chooses the most likely token; higher is more varied."""
    top_k: int | None = None
    """Sample among this many of the likeliest tokens."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this probable, as a share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Tokens of the text so far get their logit divided by this where it is positive,
    multiplied where it is negative; 1 changes nothing."""
    seed: int = 0
    """Seed of the draws; every row of a batch has a random stream of its own."""

    def __post_init__(self) -> None:
        """Raises if values are out of their ranges."""
        raise_problems("the sampling settings", self._problems(), "sampling: ")

    def _problems(self) -> Iterator[str]:
        if not 0.0 <= self.temperature < math.inf:
            yield f"`temperature` must be >= 0, got {self.temperature}."
        if self.top_k is not None and self.top_k < 1:
            yield f"`top_k` must be at least 1, got {self.top_k}."
        if not 0.0 < self.top_p <= 1.0:
            yield f"`top_p` must lie in (0, 1], got {self.top_p}."
        if not 0.0 <= self.min_p <= 1.0:
            yield f"`min_p` must lie in [0, 1], got {self.min_p}."
        if not 0.0 < self.repetition_penalty < math.inf:
            yield (
                "`repetition_penalty` must be positive (1 changes nothing), got "
                f"{self.repetition_penalty}."
            )
