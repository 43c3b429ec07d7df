"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Float32[Array, " H2"]:
    """Computes the rotary frequencies, a function of the configuration alone.

    Plain: `rope_theta ** (-2i / head_dim)`. "linear" divides them by `factor`.
    "llama3" (as in Llama 3.1) divides those whose wavelength exceeds the original
    context over `low_freq_factor`, keeps those below it over `high_freq_factor`, and
    interpolates between.

    Returns:
      float32 [head_dim / 2].
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    original = scaling.original_max_position_embeddings
    wavelength = 2.0 * math.pi / frequency
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
    stretched = jnp.where(
        wavelength > original / scaling.low_freq_factor,
        frequency / scaling.factor,
        between,
    )
    return jnp.where(
        wavelength < original / scaling.high_freq_factor, frequency, stretched
    )


def rope_table(
    positions: Int[Array, "B T"], config: LlamaConfig
) -> tuple[Float32[Array, "B T 1 H2"], Float32[Array, "B T 1 H2"]]:
    """Computes cos and sin of position times frequency, in float32."""
    frequency = inverse_frequencies(config)
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    angle = angle[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], rope: tuple[Array, Array]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head, Hugging Face's layout."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return out.astype(x.dtype)
