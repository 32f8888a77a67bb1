# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false
"""Lists the pairs of a window's queries and selected keys by blocks of 64 keys, on Hopper.

A list's entry is 64 p + s: p is the pair's number in the window, `query K + slot`; s says which key
of the block it is of. Queries rise within a list; lists begin at multiples of 64 entries and are
filled up with -1. Two kernels, of a CTA a query:

    find_starts    the first slot of each block, by bisection
    in XLA         where each query's part of a block's list begins
    place_pairs    each pair to where it belongs

The lanes are those of `hopper.simt`; a row of indices is read again and again out of the L1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import simt_floats

KEY_BITS = 6
BLOCK = 1 << KEY_BITS  # keys
PAIRS = 64  # of a tile: lists begin at multiples
THREADS = 128
_GROUP = 32  # queries whose counts are summed up together first


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    window: int  # queries of it
    total: int  # queries
    queries: int  # T, of a batch row
    rows: int  # S, of a batch row
    selected: int  # K
    blocks: int

    def query(self, block: Any, task: Any, first: Any, counts: Any):
        """`(number among all, how many keys it has, what is added to their indices)`."""
        number = simt_floats.word(block, first, 0) + task
        exists = number < self.total
        number = block.select(exists, number, 0)
        count = block.select(exists, simt_floats.word(block, counts, number), 0)
        return number, count, number // self.queries * self.rows


def find_starts(block, plan: _Plan, task, first, counts, indices, starts) -> None:
    """`starts[task, b]`: how many of the query's keys lie before block b, b up to `blocks`."""
    number, count, offset = plan.query(block, task, first, counts)
    row = block.global_row(indices, number, plan.selected)
    out = block.global_row(starts, task, plan.blocks + 1)
    highest = 1 << plan.selected.bit_length() - 1

    def bound(i, carry):
        b = i + block.thread
        end = b * BLOCK
        found, step = block.constant(0), highest
        while step:
            more = found + step
            key = block.load_global(row, block.minimum(more, plan.selected) - 1) + offset
            found = block.select((more <= count) & (key < end), more, found)
            step //= 2
        block.store_global(out, b, found, b <= plan.blocks)
        return carry

    block.loop(0, plan.blocks + 1, block.threads, (), bound)


def place_pairs(block, plan: _Plan, task, first, counts, indices, places, ends, listed) -> None:
    """Writes the query's entries.

    Args:
        block: the lanes.
        plan: the static numbers.
        task: the query, counted from the first of the window.
        first, counts, indices: as of `pairs_by_block`.
        places: `[window, blocks]`, where the query's slot 0 would be in each list.
        ends: `[blocks]`, where the last list's end is, before it is filled up.
        listed: the lists.
    """
    number, count, offset = plan.query(block, task, first, counts)
    row = block.global_row(indices, number, plan.selected)
    place = block.global_row(places, task, plan.blocks)
    out = block.global_row(listed, block.constant(0), 1)

    def some(i, carry):
        slot = i + block.thread
        exists = slot < count
        key = block.load_global(row, block.minimum(slot, plan.selected - 1)) + offset
        of = block.select(exists, key // BLOCK, 0)
        position = block.load_global(place, of) + slot
        entry = (task * plan.selected + slot) * BLOCK + key % BLOCK
        block.store_global(out, position, entry, exists)
        return carry

    block.loop(0, plan.selected, block.threads, (), some)
    nothing = block.constant(0) - 1
    for turn in range(-(-plan.blocks // plan.window)):
        b = task + turn * plan.window
        end = simt_floats.word(block, ends, block.minimum(b, plan.blocks - 1))
        left = (block.constant(0) - end) % PAIRS
        where = (block.thread < left) & (b < plan.blocks)
        block.store_global(out, end + block.thread, nothing, where)


def pairs_by_block(first, counts, indices, *, window, queries, rows, blocks, simulate=False):
    """`(first tile, how many tiles)` of each block's list, in tiles of 64 entries; and the lists.

    Args:
        first: i32 `[1]`, the first query of the window.
        counts: i32 `[all queries]`, how many keys each has.
        indices: i32 `[all queries, K]`, of which the first `counts` are its keys, in rising order.
        window: queries of the window, at most `max_window(K)`; those past the last have no keys.
        queries: T of a batch row.
        rows: S of a batch row.
        blocks: of 64 keys, of all batch rows.
        simulate: runs the same programs on the CPU, with race detection.
    """
    total, selected = indices.shape
    plan = _Plan(window, total, queries, rows, selected, blocks)
    given = first, counts, indices

    def run(name, program, shape, *arrays):
        def lanes(block, task, *refs):
            program(block, plan, task, *refs)

        result = jax.ShapeDtypeStruct(shape, jnp.int32)
        runner = simt_floats.simulate if simulate else simt_floats.launch
        return runner(name, lanes, [result], *arrays, tasks=window, threads=THREADS)[0]

    starts = run("indexer_loss_find_starts", find_starts, (window, blocks + 1), *given)
    first_tile, tile_count, places, ends = _places(starts)
    length = (window * selected // PAIRS + blocks) * PAIRS
    name = "indexer_loss_place_pairs"
    return first_tile, tile_count, run(name, place_pairs, (length,), *given, places, ends)


def max_window(selected: int) -> int:
    """How many queries a window may have, of so many selected keys: an entry has 32 bits."""
    return (1 << 31 - KEY_BITS) // max(selected, 1)


def _places(starts):
    """`(first_tile, tile_count, places, ends)`, given where in each query's slots blocks start."""
    counts = starts[:, 1:] - starts[:, :-1]
    queries, blocks = counts.shape
    # Of each query the sum over those before it; in two steps, each short.
    padded = jnp.pad(counts, ((0, -queries % _GROUP), (0, 0))).reshape(-1, _GROUP, blocks)
    within = jnp.cumsum(padded, axis=1)
    groups = jnp.cumsum(within[:, -1], axis=0)
    before = within - padded + (groups - within[:, -1])[:, None]
    tile_count = -(-groups[-1] // PAIRS)
    first_tile = jnp.cumsum(tile_count) - tile_count
    places = PAIRS * first_tile + before.reshape(-1, blocks)[:queries] - starts[:, :-1]
    return first_tile, tile_count, places, PAIRS * first_tile + groups[-1]


def twin(first, counts, indices, *, window, queries, rows, blocks):
    """`pairs_by_block` without kernels: for interpret mode, and to compare with."""
    number = first + jnp.arange(window)
    exists = (number < len(counts))[:, None]
    number = jnp.where(number < len(counts), number, 0)
    slot = jnp.arange(indices.shape[1], dtype=jnp.int32)
    exists &= slot < counts[number][:, None]
    keys = indices[number] + (number // queries * rows)[:, None]
    keys = jnp.where(exists, keys, blocks * BLOCK)
    bounds = BLOCK * jnp.arange(blocks + 1, dtype=jnp.int32)
    starts = jax.vmap(functools.partial(jnp.searchsorted, v=bounds))(keys).astype(jnp.int32)
    first_tile, tile_count, places, _ = _places(starts)
    length = (window * indices.shape[1] // PAIRS + blocks) * PAIRS
    block = jnp.minimum(keys // BLOCK, blocks - 1)
    position = jnp.where(exists, jnp.take_along_axis(places, block, axis=1) + slot, length)
    pair = jnp.arange(keys.size, dtype=jnp.int32).reshape(keys.shape)
    listed = jnp.full((length,), -1, jnp.int32)
    listed = listed.at[position].set(pair * BLOCK + keys % BLOCK, mode="drop")
    return first_tile, tile_count, listed
