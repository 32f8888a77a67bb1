"""Units of the integers that rows of dKV are added up as: one of each key, one of each column.

    sums[s, c] = sum of round(rows[s, c] per_column[c] per_one[s])

Integers have some 18 bits, so a unit has to suit what it counts. That of a key comes from a bound
of its terms, which the kernel of P and dS finds; that of a column from a guess, for which a sample
of the queries is looked at. The bound is of columns as they are scaled: so no guess can make a sum
overflow, and a bad one only costs bits.

What a term loses is half a unit of its key and column. That is at most

    2**-b sum_n (|dS[n]| max_c per_column[c] |Q[n, c]| + P[n] max_c per_column[c] |dO[n, c]|)
        / per_column[c]                            with b = 30 - log2(queries), at most 21

of the query whose sum is the largest for the key. A term is smaller than its bound by the square
root of the heads and by the largest over the mean, 2**5 for normal ones; so it keeps 13 bits in a
window of 4096 queries, and 8, as many as a row in bf16, where it is 2**-5 of the key's largest.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import fixed_point
from pallas_kernels.hopper.column_sums import ROUNDINGS
from pallas_kernels.tiling import vary_like

_SAMPLE = 64  # queries, and keys
_RANGE = 16  # columns smaller than 2**-16 of the largest have the unit of such


def of_columns(q, dout, kv, scale: float):
    """Powers of two with which columns of dKV are about equally large, f32 `[C + R]`, from 1 on.

    Column c of a row is sum_n dS[n] Q[n, c] + P[n] dO[n, c], and dS about as large as P times
    scale |dO[n]| times a value.

    Args:
        q: bf16 `[queries, N, C + R]`.
        dout: bf16 `[queries, N, C]`.
        kv: bf16 `[keys, C + R]`.
        scale: of the scores.
    """
    q, dout, kv = (x[:: max(1, len(x) // _SAMPLE)].astype(jnp.float32) for x in (q, dout, kv))
    values = dout.shape[-1]
    of_value = jnp.sqrt(jnp.mean(kv[:, :values] ** 2))
    slopes = abs(scale) * of_value * jnp.sqrt(jnp.max(jnp.sum(dout**2, axis=-1)))
    size = slopes * jnp.max(jnp.abs(q), axis=(0, 1))
    size += jnp.pad(jnp.max(jnp.abs(dout), axis=(0, 1)), (0, q.shape[-1] - values))
    told = jnp.isfinite(size) & (size > 0)
    _, exponent = jnp.frexp(jnp.where(told, size, 0.0))
    largest = jnp.max(jnp.where(told, exponent, -(2**9)))
    return fixed_point.power_of_two(jnp.where(told, jnp.minimum(largest - exponent, _RANGE), 0))


def of_keys(bounds, keys, repeats, *, count: int):
    """`fixed_point.units` for a window of queries.

    Args:
        bounds: as `weights_and_sums_sm90` leaves them.
        keys: i32 `[window, K]`; `count` or larger where there is none.
        repeats: whether a query may have a key more than once.
        count: of keys.
    """
    window = len(keys)
    size = jnp.abs(bounds.astype(jnp.float32).sum(axis=(2, 3))) * (1 + ROUNDINGS)
    bits = lax.bitcast_convert_type(size, jnp.int32)  # they rise as the floats do, NaN above all
    found = vary_like(jnp.zeros(count, jnp.int32), (bits, keys))
    found = found.at[keys].max(bits.reshape(keys.shape), mode="drop")
    largest = lax.bitcast_convert_type(found, jnp.float32)

    def more_than_the_window(largest):
        terms = vary_like(jnp.zeros(count, jnp.int32), keys).at[keys].add(1, mode="drop")
        return largest * jnp.maximum(1.0, terms / window)

    largest = lax.cond(repeats, more_than_the_window, lambda largest: largest, largest)
    return fixed_point.units(largest, window)


def repeated(indices, rows: int):
    """Whether a selection, rising, has a key below `rows` more than once."""
    return jnp.any((indices[:, 1:] == indices[:, :-1]) & (indices[:, 1:] < rows))
