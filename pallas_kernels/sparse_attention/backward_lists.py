"""Which pairs of a query and a selected key belong to which keys: what sums of rows go by."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiling import vary_like


def ascending(indices, rows: int):
    """Selections with their entries in rising order, what is outside `0 .. rows - 1` as `rows`.

    Gradients do not depend on the order, and selections usually are in this one already.
    """
    inside = jnp.where((indices >= 0) & (indices < rows), indices, rows)
    shift = [(0, 0, 0)] * (inside.ndim - 1) + [(1, -1, 0)]
    before = lax.pad(inside, jnp.int32(0), shift)  # rather than slices: it fuses into one pass
    falls = (inside < before).sum(axis=-1, dtype=jnp.int32)  # by rows: one pass with other sums
    in_order = lax.cond(
        falls.max(initial=0) == 0, lambda x: x, lax.sort, inside
    )  # of the last axis
    return vary_like(in_order, indices)


def pairs_by_key(keys, *, largest: int):
    """Lists the pairs of queries and selected keys by key, queries ascending.

    Args:
        keys: i32 `[queries, K]`, the selected keys; none where it is larger than any.
        largest: number among them. Of up to 16 bits they are sorted in half the time.

    Returns:
        `(pairs, keys)`, i32 `[queries x K]`: a pair is the number `query K + slot`.
    """
    unsigned = jnp.uint16 if largest < 2**16 else jnp.uint32  # which XLA sorts by radix on a GPU
    flat = keys.reshape(-1).astype(unsigned)
    numbers = jnp.arange(flat.shape[0], dtype=jnp.int32)
    in_order, pairs = lax.sort((flat, numbers), num_keys=1, is_stable=True)
    return pairs, in_order.astype(jnp.int32)
