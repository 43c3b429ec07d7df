"""The attention of packed rows on the device at hand, chosen by a check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.check import AttentionCheck, check_attention
from pallas_kernels.device import jax_has_kernels
from qlora_jax.choices import Attention
from qlora_jax.models import LayerKinds, Llama, attention_refusals
from qlora_jax.runs.processes import Peers


def packed_attention(
    model: Llama,
    *,
    capability: str | None = None,
    check: Callable[..., AttentionCheck] = check_attention,
) -> tuple[Attention, str | None]:
    """Chooses the attention of packed rows on the device at hand.

    cuDNN, as JAX calls it, takes no packed rows, and plain XLA goes block by block in
    thousands of launches. The kernels for Hopper are taken once they have computed a
    sample right on this device.

    Args:
      model: the architecture.
      capability: compute capability of the GPU, such as "9.0"; default that of the
        device at hand, if it is one.
      check: what computes the sample.

    Returns:
      "pallas", or "auto" for what is known to be the best elsewhere; and a note.
    """
    if capability is None and jax.default_backend() == "gpu":
        capability = str(jax.local_devices()[0].compute_capability)
    config = model.config
    reasons = attention_refusals(
        "pallas",
        dtype=jnp.dtype(model.compute.dtype),
        head_dim=config.head_dim,
        packed=True,
        capability=capability,
    )
    if capability is None or reasons or not jax_has_kernels():
        return "auto", None
    result = check(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        variant=LayerKinds.of(config).variant,
    )
    errors = ", ".join(
        f"{name} {error:.1e} of {result.limits[name]:.1e}"
        for name, error in result.errors.items()
    )
    if result.passed:
        return "pallas", (
            "Packed rows: attention by this project's kernels, which passed their "
            f"check on this device (errors and their limits: {errors})."
        )
    return "auto", (
        "Note: packed rows, and this project's attention kernels failed their check on "
        f"this device (errors and their limits: {errors}); please report it. Attention "
        "is computed in plain XLA, which is slow on a GPU."
    )


def check_on_all(peers: Peers, *args: Any, **settings: Any) -> AttentionCheck:
    """Checks the attention kernels in every process; returns the worst of them."""
    checks = [
        AttentionCheck(*check)
        for check in peers.gather(
            tuple(check_attention(*args, **settings)), "checking the attention kernels"
        )
    ]
    return next((check for check in checks if not check.passed), checks[0])
