# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false
"""Which tiles of keys a block of queries goes through, and which of them need no mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.types import KeyRange


class Work(NamedTuple):
    """The tiles of one block: scalars."""

    first: Any  # the first tile that some query sees
    count: Any  # tiles up to the last that some query sees
    whole_from: Any  # tiles that every query sees whole, counted from `first`
    whole_to: Any

    def whole(self, j):
        """Whether every query of the block sees all keys of the block's j-th tile."""
        return (j >= self.whole_from) & (j < self.whole_to)


class Tiles(NamedTuple):
    """`Work` of every block: i32 `[B, blocks]` each."""

    first: Any
    count: Any
    whole_from: Any
    whole_to: Any

    def at(self, batch, block) -> Work:
        """The work of one block."""
        return Work(*(x[batch, block] for x in self))


def pad_rows(x, box: int):
    """`[B, rows, ...]` as TMA takes it: whole groups of 8 rows, no fewer than a box.

    What already is so is not copied.
    """
    missing = max(x.shape[1] + -x.shape[1] % 8, box) - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x


def plan(
    ranges: KeyRange, *, keys: int, block: int, tile: int
) -> tuple[tuple[jax.Array, jax.Array], Tiles]:
    """`((start, end), Tiles)`: the ranges clipped to the keys and padded to whole blocks.

    Args:
        ranges: the keys each query may see.
        keys: S.
        block: queries of a block.
        tile: keys of a tile.
    """
    batch, queries = ranges.start.shape
    padding = ((0, 0), (0, -queries % block))
    # Padded queries repeat the last one: they change nothing about its block.
    start, end = (jnp.pad(jnp.clip(x, 0, keys), padding, mode="edge") for x in ranges)
    empty = start >= end
    start, end = jnp.where(empty, keys, start), jnp.where(empty, 0, end)
    starts, ends = (x.reshape(batch, -1, block) for x in (start, end))
    first = starts.min(axis=2) // tile
    count = jnp.maximum(-(-ends.max(axis=2) // tile) - first, 0)
    whole_from = -(-starts.max(axis=2) // tile) - first
    whole_to = ends.min(axis=2) // tile - first
    return (start, end), Tiles(first, count, whole_from, whole_to)


class QueryTiles(NamedTuple):
    """Which tiles of queries a block of keys goes through: i32.

    `first` and `count` are `[B, blocks]`; `last_start` and `first_end` are `[B, tiles]`: all
    queries of a tile see the keys between them.
    """

    first: Any
    count: Any
    last_start: Any
    first_end: Any


def plan_queries(
    ranges: KeyRange, *, keys: int, block: int, tile: int
) -> tuple[tuple[jax.Array, jax.Array], QueryTiles]:
    """`((start, end), QueryTiles)`: ranges as in `plan`, padded with queries that see nothing.

    Args:
        ranges: the keys each query may see.
        keys: S.
        block: keys of a block.
        tile: queries of a tile.
    """
    batch, queries = ranges.start.shape
    start, end = (jnp.pad(jnp.clip(x, 0, keys), ((0, 0), (0, -queries % tile))) for x in ranges)
    empty = start >= end
    start, end = jnp.where(empty, keys, start), jnp.where(empty, 0, end)
    starts, ends = (x.reshape(batch, -1, tile) for x in (start, end))
    edge = jnp.arange(-(-keys // block)) * block
    low, high = (x[:, None, :] for x in (starts.min(axis=2), ends.max(axis=2)))
    seen = (low < edge[:, None] + block) & (high > edge[:, None])  # [B, blocks, tiles]
    any_seen = seen.any(axis=2)
    first = jnp.where(any_seen, jnp.argmax(seen, axis=2), 0)
    after = seen.shape[2] - jnp.argmax(seen[..., ::-1], axis=2)
    count = jnp.where(any_seen, after - first, 0)
    first, count = first.astype(jnp.int32), count.astype(jnp.int32)
    return (start, end), QueryTiles(first, count, starts.max(axis=2), ends.min(axis=2))


def mask(scores, key, start, end):
    """-inf where a query (row of a WGMMA layout) does not see key `key` + column."""
    columns = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    low, high = (lax.broadcast_in_dim(x - key, scores.shape, [0]) for x in (start, end))
    return jnp.where((columns >= low) & (columns < high), scores, -jnp.inf)
