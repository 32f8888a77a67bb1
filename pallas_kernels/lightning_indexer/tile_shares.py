"""The work of the scores kernel: live tiles, cut into equal shares.

A tile is live if some query of its block may see one of its keys. The live tiles of all blocks, one
block after another, form a list; every CTA takes an equal, contiguous share of it. So causal,
packed and ragged ranges balance to a tile, whatever they are, and a CTA meets a block once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_FEW_BLOCKS = 4096  # up to here a sum over all pairs of blocks is cheaper than a scan


class Shares(NamedTuple):
    """Who does what.

    Attributes:
        first: i32 `[blocks]`, the first live tile of a block, counted from key 0.
        after: i32 `[blocks]`, live tiles of the block and of those before it.
        first_block: i32 `[ctas]`, the block in which a share begins.
        last_block: i32 `[ctas]`, the block in which it ends.
    """

    first: jax.Array
    after: jax.Array
    first_block: jax.Array
    last_block: jax.Array


def cut(start, end, *, block: int, tile: int, keys: int, ctas: int) -> Shares:
    """Counts the live tiles and cuts their list. Few XLA operations: they run before each launch.

    Args:
        start: i32 `[B, T]`, the first key that each query sees; T a multiple of `block`.
        end: i32 `[B, T]`, the key after the last; both between 0 and S.
        block: queries in a block.
        tile: keys in a tile.
        keys: S.
        ctas: how many shares.
    """
    empty = start >= end
    low = jnp.where(empty, keys, start).reshape(-1, block).min(axis=1)
    high = jnp.where(empty, 0, end).reshape(-1, block).max(axis=1)
    first = jnp.where(high > 0, low // tile, 0)
    # A block that sees nothing keeps one tile: whoever owns it fills the row with -inf.
    count = jnp.maximum((high + tile - 1) // tile - first, 1)
    if count.size <= _FEW_BLOCKS:
        i = jnp.arange(count.size)
        after = jnp.where(i[None, :] <= i[:, None], count[None, :], 0).sum(axis=1, dtype=jnp.int32)
    else:
        after = jnp.cumsum(count, dtype=jnp.int32)
    cta = jnp.arange(ctas, dtype=jnp.int32)
    begin, stop = _bound(after[-1], cta, ctas), _bound(after[-1], cta + 1, ctas)
    # Which block holds a tile: as many as end at or before it.
    first_block = (after[None, :] <= begin[:, None]).sum(axis=1, dtype=jnp.int32)
    last_block = (after[None, :] < stop[:, None]).sum(axis=1, dtype=jnp.int32)
    return Shares(first, after, first_block, last_block)


def over_blocks(shares: Shares, cta, ctas: int, body: Callable):
    """In the kernel: `body(i, block, tiles, from, to, step)` for each block of this CTA's share.

    `i` counts the blocks of the share and `step` its tiles; the block has `tiles` live tiles, of
    which this share covers `[from, to)`.

    Returns:
        How many blocks and how many tiles the share has.
    """
    total = shares.after[shares.after.shape[0] - 1]
    begin, stop = _bound(total, cta, ctas), _bound(total, cta + 1, ctas)
    first_block = shares.first_block[cta]
    blocks = jnp.where(stop > begin, shares.last_block[cta] - first_block + 1, 0)

    def one(i, step):
        block = first_block + i
        before = jnp.where(block > 0, shares.after[jnp.maximum(block - 1, 0)], 0)
        tiles = shares.after[block] - before
        low = jnp.maximum(begin - before, 0)
        high = jnp.minimum(stop - before, tiles)
        body(i, block, tiles, low, high, step)
        return step + high - low

    return blocks, lax.fori_loop(0, blocks, one, jnp.int32(0))


def _bound(total, cta, ctas: int):
    """Where the share of a CTA begins: equal shares, the first ones a tile longer."""
    return cta * (total // ctas) + jnp.minimum(cta, total % ctas)
