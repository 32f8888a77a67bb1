"""RMSNorm and LayerNorm, computed in fp32 and rounded once.

DeepSeek multiplies by the weight before it casts; transformers casts first and so rounds twice.
`Numerics.round_norm` chooses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def round_to(x: Float[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B"]:
    """`x` with the precision of `dtype`, in its own dtype.

    Not a pair of casts: XLA may drop those for the sake of "excess precision".
    """
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, bits.nexp, bits.nmant)


def rms_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    eps: float,
    dtype: DTypeLike,
    *,
    round_first: bool = False,
) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: any float type. The residual stream comes in fp32, un-rounded.
        weight: one factor a column.
        eps: added to the mean square.
        dtype: of the result.
        round_first: round to `dtype` before multiplying by the weight too.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    if round_first:
        x = round_to(x, dtype)
    return (x * weight.astype(jnp.float32)).astype(dtype)


def layer_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "*B D"]:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight."""

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        round_first: bool = False,
    ):
        self.weight = nnx.Param(jnp.ones((width,), param_dtype))
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.round_first = round_first

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the compute dtype."""
        return rms_norm(x, self.weight[...], self.eps, self.dtype, round_first=self.round_first)


class LayerNorm(nnx.Module):
    """`layer_norm` with its weight and bias, which stay fp32: the indexer's key norm."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the compute dtype."""
        return layer_norm(x, self.weight[...], self.bias[...], self.eps, self.dtype)
