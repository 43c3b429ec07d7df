"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

`inverse_frequencies` has the scalings that stretch it to longer contexts.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Float32[Array, " H2"]:
    """Computes the rotary frequencies from the configuration.

    Without scaling: `rope_theta ** (-2i / head_dim)`. "linear" divides them by
    `factor`. "llama3" (as in Llama 3.1), with c the original context, divides those of
    a wavelength above c / `low_freq_factor`, keeps those of one below
    c / `high_freq_factor`, and interpolates between.

    Returns:
      float32 [head_dim / 2].
    """
    # theta_i = rope_theta^(-2 i / H) for pair i (arXiv:2104.09864, section 3.2.2).
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Position interpolation (arXiv:2306.15595): the same as dividing the positions.
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # By parts: pairs that turn often within the native context tell near tokens apart
    # and keep their frequency; those that hardly turn are stretched by the factor.
    original = scaling.original_max_position_embeddings
    wavelength = 2.0 * math.pi / frequency
    # 0 at the long end of the interpolated wavelengths, 1 at the short end.
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    interpolated = (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
    stretched = jnp.where(
        wavelength > original / scaling.low_freq_factor,
        frequency / scaling.factor,
        interpolated,
    )
    return jnp.where(
        wavelength < original / scaling.high_freq_factor, frequency, stretched
    )


def rope_table(
    positions: Int[Array, "B T"], config: LlamaConfig
) -> tuple[Float32[Array, "B T 1 H2"], Float32[Array, "B T 1 H2"]]:
    """Computes cos and sin of position times frequency, in float32."""
    # bfloat16 has 8 bits: positions above 256 would coincide.
    frequency = inverse_frequencies(config)
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    # [B, T, 1, H / 2]: the same for every head.
    angle = angle[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], rope: tuple[Array, Array]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head, in Hugging Face's layout.

    (a, b) -> (a cos - b sin, b cos + a sin)
    """
    cos, sin = rope
    # Hugging Face's files have the rows of q_proj and k_proj permuted for this; Meta's
    # pair neighbours (2 i, 2 i + 1). Rotated in float32 and rounded once, where
    # transformers rounds cos and sin to the dtype of x first.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return out.astype(x.dtype)
