"""What the backward kernels of sparse attention share: how columns and queries are dealt out."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

_CHUNK = 64  # columns that a 128-byte swizzle spans


def share_columns(width: int) -> int:
    """Columns of a share: the most chunks, up to three, that divide the width."""
    return max(c for c in (_CHUNK, 2 * _CHUNK, 3 * _CHUNK) if width % c == 0)


def value_columns(share: int, columns: int, values: int) -> int:
    """How many columns of a share are value as well."""
    return min(max(values - share * columns, 0), columns)


def value_start(share: int, columns: int, values: int) -> int:
    """Where the copy of a share of dO starts: it has the whole width of a share."""
    return min(share * columns, values - columns)


def next_slot(slot, slots: int):
    """The slot of a ring after a slot."""
    return jnp.where(slot == slots - 1, 0, slot + 1)


def strided_loop(total, body, carry, *, axis: str, ctas: int):
    """`carry = body(i, carry)` for every i below total that falls to this CTA of a grid axis."""
    mine = lax.axis_index(axis)
    count = lax.div(total - 1 - mine + ctas, jnp.int32(ctas))
    return lax.fori_loop(0, count, lambda i, c: body(mine + i * ctas, c), carry)
