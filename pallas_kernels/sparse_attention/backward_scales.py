"""Scales at which rows of dKV are added up as integers: none overflows, in whatever order.

What a query adds to a key is at most its `size` in every column. For each key, with the largest
size `m` of those that are added to it and more than `n` / 2 but fewer than `n` = 2**k of them, the
scale is the power of two with

    m scale < 2**(31 - k)

so that a sum is below 2**31; and below 2**22, which is what a row may be when it is rounded. The
largest of some sizes is the same in any order too: so the scales are, and the integers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.add_integers import LARGEST
from pallas_kernels.hopper.column_sums import ROUNDINGS

_SMALLEST = -96  # exponent of the smallest size that is told from 0


class Scales(NamedTuple):
    """Powers of two for each key, f32."""

    scale: jnp.ndarray
    step: jnp.ndarray  # 1 / scale; NaN where a size is not finite


def scales_of_keys(sizes, keys, *, rows: int, most) -> Scales:
    """Scales of a window of queries.

    Args:
        sizes: f32, of pairs of a query and a key, up to the roundings of `hopper.column_sums`.
        keys: i32, of the pairs; `rows` or larger where there is none.
        rows: how many keys there are.
        most: i32, scalar or `[rows]`: how many pairs of a key there can be, below 2**25.
    """
    # As integers their order is the same, with infinity and NaN above all.
    bits = lax.bitcast_convert_type(sizes.astype(jnp.float32) * (1 + ROUNDINGS), jnp.int32)
    largest = jnp.zeros(rows, jnp.int32).at[keys.reshape(-1)].max(bits.reshape(-1), mode="drop")
    exponent = (largest >> 23) - 127  # the size is below 2**(exponent + 1)
    bits_of_count = 32 - lax.clz(jnp.asarray(most, jnp.int32))
    bits_of_row = jnp.minimum(31 - bits_of_count, LARGEST.bit_length() - 1)
    power = bits_of_row - 1 - jnp.maximum(exponent, _SMALLEST)
    step = jnp.where(exponent == 128, jnp.nan, _power_of_two(-power))
    return Scales(_power_of_two(power), step)


def _power_of_two(exponent):
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
