"""FP8 (e4m3) with block scales, and the Hadamard rotation that goes before it.

`x ~ q * s` with q in e4m3 and one fp32 scale s a block. e4m3 has no infinity: what exceeds 448
becomes NaN on some back ends and 448 on others, so every cast here clamps first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from dsa_jax.config_parts import ScaleFormat

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
# Smaller maxima are treated as this one, so that a block of zeros has a scale. The floor is on the
# maximum, not on the scale.
AMAX_FLOOR = 1e-4


def power_of_two_above(s: Float32[Array, "*B"]) -> Float32[Array, "*B"]:
    """The least power of two >= s > 0, on the bits: `log2` in floating point misses exact ones."""
    bits = jax.lax.bitcast_convert_type(s, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def act_quant(
    x: Float[Array, "*B D"], block: int = 128, scale_format: ScaleFormat = "ue8m0"
) -> tuple[Float[Array, "*B D"], Float32[Array, "*B D/block"]]:
    """Quantises activations, one scale per `block` columns.

    s = max(|x|, 1e-4) / 448, with "ue8m0" rounded up to a power of two; q = e4m3(clamp(x / s)).

    Args:
        x: any float type.
        block: columns that share a scale.
        scale_format: "ue8m0" or "float".

    Returns:
        q in e4m3 and s in fp32.

    Raises:
        ValueError: the width is not a multiple of `block`.
    """
    width = x.shape[-1]
    if width % block:
        raise ValueError(f"act_quant: width {width} is not a multiple of block={block}")
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], width // block, block)
    amax = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), AMAX_FLOOR)
    scale = amax * np.float32(1 / E4M3_MAX)
    if scale_format == "ue8m0":
        scale = power_of_two_above(scale)
    q = jnp.clip(wide / scale[..., None], -E4M3_MAX, E4M3_MAX).astype(E4M3)
    # Where the next thing is a cast back, XLA may drop both ("excess precision"), and the rounding.
    return jax.lax.optimization_barrier(q.reshape(x.shape)), scale


def act_dequant(
    q: Float[Array, "*B D"], scale: Float32[Array, "*B D/block"], dtype: DTypeLike
) -> Float[Array, "*B D"]:
    """`q * s`, the inverse of `act_quant` up to its rounding."""
    blocks = q.astype(jnp.float32).reshape(*scale.shape, -1)
    return (blocks * scale[..., None]).reshape(q.shape).astype(dtype)


def round_trip(
    x: Float[Array, "*B D"], block: int = 128, scale_format: ScaleFormat = "ue8m0"
) -> Float[Array, "*B D"]:
    """What is left of `x` after FP8, in its own dtype; the gradient passes straight through.

    (The derivative of rounding is zero almost everywhere, which would teach nothing.)
    """

    @jax.custom_jvp
    def rounded(x: Array) -> Array:
        q, scale = act_quant(x, block, scale_format)
        return act_dequant(q, scale, x.dtype)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), *tangents))
    return jnp.asarray(rounded(x))


def weight_quant(
    w: Float[Array, "*E in out"],
    block: tuple[int, int] = (128, 128),
    scale_format: ScaleFormat = "ue8m0",
) -> tuple[Float[Array, "*E in out"], Float32[Array, "*E in/block out/block"]]:
    """Quantises weights, one scale per tile; ragged last tiles have their own.

    Args:
        w: `[in, out]`, or several of them.
        block: rows and columns of a tile, (in, out).
        scale_format: "ue8m0" or "float".
    """
    tiles = _tiles(w.astype(jnp.float32), block)
    amax = jnp.max(jnp.abs(tiles), axis=(-3, -1))
    scale = jnp.where(amax > 0, amax / E4M3_MAX, 1.0)
    if scale_format == "ue8m0":
        scale = power_of_two_above(scale)
    q = w.astype(jnp.float32) / _spread(scale, block, w.shape)
    return jnp.clip(q, -E4M3_MAX, E4M3_MAX).astype(E4M3), scale


def weight_dequant(
    q: Float[Array, "*E in out"],
    scale: Float32[Array, "*E in/block out/block"],
    block: tuple[int, int],
    dtype: DTypeLike,
) -> Float[Array, "*E in out"]:
    """`q * s`; the published checkpoints call the factor `weight_scale_inv`, but it multiplies."""
    return (q.astype(jnp.float32) * _spread(scale, block, q.shape)).astype(dtype)


def _tiles(w: Array, block: tuple[int, int]) -> Array:
    """`[..., in/a, a, out/b, b]`, zero-padded to whole tiles."""
    a, b = block
    pad = [(0, 0)] * (w.ndim - 2) + [(0, -w.shape[-2] % a), (0, -w.shape[-1] % b)]
    w = jnp.pad(w, pad)
    return w.reshape(*w.shape[:-2], w.shape[-2] // a, a, w.shape[-1] // b, b)


def _spread(scale: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Each tile's scale at each of its entries."""
    wide = jnp.repeat(jnp.repeat(scale, block[0], axis=-2), block[1], axis=-1)
    return wide[..., : shape[-2], : shape[-1]]


def hadamard_matrix(width: int) -> np.ndarray:
    """The Sylvester matrix over sqrt(width): symmetric, orthogonal, its own inverse.

    Raises:
        ValueError: the width is not a power of two.
    """
    if width < 1 or width & (width - 1):
        raise ValueError(f"hadamard: width {width} is not a power of two")
    h = np.ones((1, 1), np.float32)
    while len(h) < width:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(width))


def hadamard(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Rotates the last axis by the Hadamard matrix: fp32 inside, the dtype of `x` outside.

    Rotating queries and keys alike leaves q . k as it is and spreads a large column over all.
    """
    width = x.shape[-1]
    signs = jnp.asarray(np.sign(hadamard_matrix(width)), x.dtype)  # +-1 is exact in any dtype
    y = jnp.einsum(
        "...H,HG->...G",
        x,
        signs,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (y * np.float32(width**-0.5)).astype(x.dtype)
