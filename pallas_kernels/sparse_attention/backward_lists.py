"""Which pairs of a query and a selected key belong to which keys: what sums of rows go by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiling import vary_like

BLOCK = 64  # keys
PAIRS = 64  # of a tile: the lists start at multiples
_GROUP = 32  # queries whose counts are summed up together first


def ascending(indices, rows: int):
    """Selections with their entries in rising order, what is outside `0 .. rows - 1` as `rows`.

    Gradients do not depend on the order, and selections usually are in this one already.
    """
    inside = jnp.where((indices >= 0) & (indices < rows), indices, rows)
    rises = jnp.all(inside[:, 1:] >= inside[:, :-1])
    in_order = lax.cond(rises, lambda x: x, lambda x: lax.sort(x, dimension=1), inside)
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


def pairs_by_block(keys, *, blocks: int):
    """Lists the pairs of queries and selected keys by blocks of 64 keys.

    Args:
        keys: i32 `[queries, K]`, the selected keys in rising order; from `64 blocks` on: none.
        blocks: how many.

    Returns:
        `(first_tile, tile_count, pairs, keys)` as `sum_rows` takes them: a pair is the number
        `query K + slot`; lists start at multiples of 64 and are filled up with -1.
    """
    queries, selected = keys.shape
    bounds = BLOCK * jnp.arange(blocks + 1, dtype=jnp.int32)
    start = jax.vmap(lambda row: jnp.searchsorted(row, bounds, method="scan_unrolled"))(keys)
    start = start.astype(jnp.int32)  # of each block, in the query's slots
    before, total = _sums_before(start[:, 1:] - start[:, :-1])
    tile_count = -(-total // PAIRS)
    first_tile = jnp.cumsum(tile_count) - tile_count
    place = first_tile * PAIRS + before - start[:, :-1]  # of the query's slot 0, were it there
    block = jnp.minimum(keys // BLOCK, blocks - 1)
    slot = jnp.arange(selected, dtype=jnp.int32)
    length = (queries * selected // PAIRS + blocks) * PAIRS
    position = jnp.take_along_axis(place, block, axis=1) + slot
    position = jnp.where(keys < BLOCK * blocks, position, length)
    pairs = jnp.full((length,), -1, jnp.int32)
    numbers = jnp.arange(queries * selected, dtype=jnp.int32)
    pairs = pairs.at[position.reshape(-1)].set(numbers, mode="drop", unique_indices=True)
    listed = keys.reshape(-1)[jnp.maximum(pairs, 0)] % BLOCK
    return first_tile, tile_count, pairs, jnp.where(pairs >= 0, listed, -1)


def _sums_before(counts):
    """Of each row the sum of the rows before, and the sum of all; in two steps, each short."""
    queries, blocks = counts.shape
    padded = jnp.pad(counts, ((0, -queries % _GROUP), (0, 0))).reshape(-1, _GROUP, blocks)
    within = jnp.cumsum(padded, axis=1)
    groups = jnp.cumsum(within[:, -1], axis=0)
    before = within - padded + (groups - within[:, -1])[:, None]
    return before.reshape(-1, blocks)[:queries], groups[-1]
