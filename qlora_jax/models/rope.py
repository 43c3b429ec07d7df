"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

`inverse_frequencies` has the scalings that stretch it to longer contexts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope_scaling import RopeScaling


def inverse_frequencies(
    config: LlamaConfig, *, local: bool = False, long: bool = False
) -> Float32[Array, " H2"]:
    """Computes the rotary frequencies from the configuration.

    Without scaling: `rope_theta ** (-2i / H)`, with H the rotated dimensions of a head.

    - "linear" divides them by `factor`.
    - "llama3" (as in Llama 3.1), with c the original context, divides those of a
      wavelength above c / `low_freq_factor`, keeps those of one below
      c / `high_freq_factor`, and interpolates between.
    - "yarn" (arXiv:2309.00071) does so along a ramp over the dimensions.
    - "longrope" (arXiv:2402.13753) divides each by a number of its own.

    Args:
      config: architecture.
      local: of the windowed layers that have a theta of their own.
      long: of texts longer than the original context; "longrope" alone differs.

    Returns:
      float32 [rotary_dim / 2].
    """
    # theta_i = rope_theta^(-2 i / H) for pair i (arXiv:2104.09864, section 3.2.2).
    width = config.rotary_dim
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    theta = config.rope_local_base_freq if local else config.rope_theta
    assert theta is not None
    scaling = None if local else config.rope_scaling
    if scaling is not None and scaling.rope_type == "longrope":
        factors = scaling.long_factor if long else scaling.short_factor
        return 1.0 / (jnp.asarray(factors, jnp.float32) * theta**exponent)
    frequency = 1.0 / (theta**exponent)
    if scaling is None:
        return frequency
    assert scaling.factor is not None
    # Position interpolation (arXiv:2306.15595): the same as dividing the positions.
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    if scaling.rope_type == "yarn":
        kept = _yarn_share(scaling, theta, width)
        interpolated = 1.0 / (scaling.factor * theta**exponent)
        return interpolated * (1.0 - kept) + frequency * kept
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


def _yarn_share(
    scaling: RopeScaling, theta: float, width: int
) -> Float32[Array, " H2"]:
    """Returns how much of each frequency YaRN keeps; the rest is interpolated."""

    def dimension(rotations: float) -> float:
        # The pair that turns so often within the original context:
        # c theta^(-2 d / H) = 2 pi r, solved for d.
        original = scaling.original_max_position_embeddings
        turns = original / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # as transformers has it
    index = jnp.arange(width // 2, dtype=jnp.float32)
    return 1.0 - jnp.clip((index - low) / (high - low), 0.0, 1.0)


def attention_factor(config: LlamaConfig) -> float:
    """Returns the factor of cos and sin, by which YaRN and LongRoPE scale the scores.

    It is squared in q k^T: longer contexts spread the softmax, and this sharpens it.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    original = scaling.original_max_position_embeddings
    factor = scaling.factor or config.max_position_embeddings / original
    if scaling.rope_type == "longrope":
        if factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def long_texts(
    config: LlamaConfig,
    positions: Int[Array, "#B T"],
    segments: Int[Array, "B T"] | None,
    capacity: int | None,
) -> Bool[Array, "B T"] | None:
    """Returns which tokens are of a text longer than the original context.

    LongRoPE has two sets of frequencies, and a text takes one of them from its first
    token to its last: by its own length in training, however rows are padded and
    packed, and by the length that it may reach in generation.

    Args:
      config: architecture.
      positions: of every token in its text.
      segments: the text of every token, 0 = padding; None = one text a row.
      capacity: the longest that a text can become; None = as long as it is.

    Returns:
      None unless the model has LongRoPE.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "longrope":
        return None
    original = scaling.original_max_position_embeddings
    if capacity is not None:
        return jnp.full(positions.shape, capacity > original)
    if segments is None:
        return (positions.max(axis=1, keepdims=True) >= original) | (positions < 0)
    positions = jnp.broadcast_to(positions, segments.shape)
    texts = segments.shape[1] + 1
    last = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, texts)[s])
    return last(positions, segments) >= original


def rope_table(
    positions: Int[Array, "B T"],
    config: LlamaConfig,
    kind: str = "global",
    long: Bool[Array, "B T"] | None = None,
) -> tuple[Float32[Array, "B T 1 H2"], Float32[Array, "B T 1 H2"]]:
    """Computes cos and sin of position times frequency, in float32.

    Args:
      positions: of every token.
      config: architecture.
      kind: `LayerKind.rope` of the layers that use the table.
      long: `long_texts`.
    """
    frequency = inverse_frequencies(config, local=kind == "local")[None, None, :]
    if long is not None and kind == "global":
        longer = inverse_frequencies(config, long=True)
        frequency = jnp.where(long[:, :, None], longer, frequency)
    if kind == "none":
        # An angle of 0 rotates nothing, exactly: cos 1, sin 0.
        frequency = jnp.zeros_like(frequency)
    # bfloat16 has 8 bits: positions above 256 would coincide.
    angle = positions.astype(jnp.float32)[:, :, None] * frequency
    # [B, T, 1, H / 2]: the same for every head.
    angle = angle[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    factor = attention_factor(config) if kind == "global" else 1.0
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(
    x: Float[Array, "B T N H"], rope: tuple[Array, Array]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + R/2) of the first R of each head's dimensions.

    (a, b) -> (a cos - b sin, b cos + a sin), in Hugging Face's layout. R is H in most
    families; the rest stays as it is.
    """
    cos, sin = rope
    width = 2 * cos.shape[-1]
    # Hugging Face's files have the rows of q_proj and k_proj permuted for this; Meta's
    # pair neighbours (2 i, 2 i + 1). Rotated in float32 and rounded once, where
    # transformers rounds cos and sin to the dtype of x first.
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide[..., :width], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < x.shape[-1]:
        parts.append(wide[..., width:])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
