"""Rotary position embedding, plain or stretched by YaRN, in both pair layouts.

MLA turns neighbouring columns (2i, 2i + 1): *interleaved*. V3.2's indexer turns columns
(i, i + R/2): *half-split*. The frequencies are the same; only the layout differs, and the wrong one
costs nothing visible until keys are dropped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig, Yarn, yarn_mscale
from dsa_jax.norms import round_to


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles; one pair of columns each.

    In fp32, or in a lower precision that the products with them are then rounded to as well.
    """

    cos: Float[Array, "B T R/2"]
    sin: Float[Array, "B T R/2"]


def frequencies(width: int, theta: float, yarn: Yarn | None) -> np.ndarray:
    """Radians per position of each pair, `[R/2]`, fp32.

    f_i = theta^(-2i/R). With YaRN, pairs that turn more than `beta_fast` times over the original
    context keep f_i, those below `beta_slow` get f_i / factor, and a linear ramp over i joins them.
    """
    f = 1.0 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    if yarn is None:
        return f.astype(np.float32)

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that turns so many times over the original context."""
        span = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return width * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    span = high - low if high != low else 0.001  # a step instead of a division by zero
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    return (f * (1 - ramp) + f / np.float32(yarn.factor) * ramp).astype(np.float32)


def rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """The angles of some positions: position * frequency.

    YaRN also scales cosine and sine by mscale(factor, mscale) / mscale(factor, mscale_all_dim),
    which is 1 in every published model.
    """
    yarn = config.rope_scaling
    f = frequencies(config.qk_rope_head_dim, config.rope_theta, yarn)
    angle = positions.astype(jnp.float32)[..., None] * f
    magnitude = 1.0
    if yarn is not None:
        magnitude = yarn_mscale(yarn.factor, yarn.mscale)
        magnitude /= yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return Rotation(jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude)


def rotate(
    x: Float[Array, "B T *N R"], turn: Rotation, *, interleaved: bool
) -> Float[Array, "B T *N R"]:
    """Turns every pair of columns by its angle; fp32 inside, the layout and dtype of `x` outside.

    Args:
        x: with or without a head axis.
        turn: the angles of the B x T positions.
        interleaved: pairs are (2i, 2i + 1); else (i, i + R/2).
    """
    cos, sin = turn
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    wide = x.astype(jnp.float32)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = jnp.split(wide, 2, axis=-1)

    def times(y: Array, factor: Array) -> Array:
        return round_to(y * factor.astype(jnp.float32), turn.cos.dtype)

    a, b = times(a, cos) - times(b, sin), times(a, sin) + times(b, cos)
    if interleaved:
        out = jnp.stack([a, b], axis=-1).reshape(x.shape)
    else:
        out = jnp.concatenate([a, b], axis=-1)
    return out.astype(x.dtype)
