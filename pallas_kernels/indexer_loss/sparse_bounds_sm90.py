# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false
"""How large any query's row of each key can be: what the key's unit as an integer goes by.

    bound[s] = max over the pairs whose key is s of |factors[t] d[t, k]|

A maximum has no order, and the bits of floats of one sign rise as they do. Each CTA has a table of
all keys in shared memory and raises its words by atomics, for its share of the queries; what the
CTAs have found is compared in XLA. More keys than a table holds are parted, and every part sees all
pairs. Lanes are those of `hopper.simt`; a warp takes 512 slots of a query at a time.

SMEM: up to 196,608 of the table, so that a CTA of 1024 threads has an SM to itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.simt import WARP, Words
from pallas_kernels.hopper.simt_floats import launch, word

THREADS = 1024
TABLE = 49152  # keys, at most
_LOADS = 4  # of four slots, of each lane at a time
_SLOTS = 4 * WARP * _LOADS


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    window: int  # queries of it
    total: int  # queries
    queries: int  # T, of a batch row
    rows: int  # S, of a batch row
    keys: int  # of all batch rows
    selected: int  # K, a multiple of 4
    sms: int
    threads: int

    @property
    def parts(self) -> int:
        """Of the keys."""
        return pl.cdiv(self.keys, TABLE)

    @property
    def size(self) -> int:
        """Keys of a part; whole rounds of the lanes."""
        return pl.cdiv(pl.cdiv(self.keys, self.parts), 4 * self.threads) * 4 * self.threads

    @property
    def shares(self) -> int:
        """Of the queries."""
        return max(1, self.sms // self.parts)


def raise_bounds(block: Any, plan: _Plan, task: Any, first, factors, d, indices, out) -> None:
    """A CTA's; arrays as of `bounds`, `out` i32 `[shares, parts x size]`."""
    table, begin = Words(0, plan.size), task % plan.parts * plan.size
    share, of_four = task // plan.parts, plan.size // 4

    def clear(i, carry):
        block.store4(table, 4 * (i + block.thread), [block.constant(0)] * 4)
        return carry

    def take(unit, carry):
        pieces = pl.cdiv(plan.selected, _SLOTS)
        query = word(block, first, 0) + unit // pieces
        # Past the last query, or a query's last slots: these again, which raises nothing.
        query = block.minimum(query, plan.total - 1)
        factor, offset = word(block, factors, query), query // plan.queries * plan.rows - begin
        places = [unit % pieces * (_SLOTS // 4) + n * WARP + block.lane for n in range(_LOADS)]
        last = plan.selected // 4 - 1
        rows = [block.own_row(x, query, plan.selected) for x in (indices, d)]
        loads = [[block.load4_global(x, block.minimum(i, last)) for i in places] for x in rows]
        for picked, slopes in zip(*loads, strict=True):
            for index, slope in zip(picked, slopes, strict=True):
                key, bound = index + offset, block.multiply(slope, factor) & 0x7FFFFFFF
                where = (index < plan.rows) & (key < plan.size)
                block.raise_word(table, key, bound, where)
        return carry

    def turn(i, carry):
        unit = i + block.warp
        return block.when(unit < units, functools.partial(take, unit), carry)

    def write(i, carry):
        at = i + block.thread
        row = block.global_row(out, share * plan.parts + task % plan.parts, plan.size)
        block.store4_global(row, at, block.load4(table, 4 * at), at < of_four)
        return carry

    block.loop(0, of_four, block.threads, (), clear)
    block.barrier()
    units = plan.window * pl.cdiv(plan.selected, _SLOTS)
    block.loop(share * block.warps, units, plan.shares * block.warps, (), turn)
    block.barrier()
    block.loop(0, of_four, block.threads, (), write)


def bounds(
    first, factors, d, indices, *, window, queries, rows, keys, sms, threads=THREADS, run=None
):
    """f32 `[batch x S]`, 0 for a key without pairs; NaN where a pair's is.

    Args:
        first: i32 `[1]`, the first query of the window.
        factors: f32 `[all queries]`.
        d: f32 `[all queries, K]`, K a multiple of 4.
        indices: i32 `[all queries, K]`; one outside `0 .. rows - 1` is no key.
        window: queries of the window. Where so many do not follow, the last is looked at again.
        queries: T of a batch row.
        rows: S of a batch row.
        keys: of all batch rows.
        sms: CTAs.
        threads: of each.
        run: `simt_floats.simulate` to run on the CPU, with race detection.
    """
    plan = _Plan(window, len(d), queries, rows, keys, d.shape[1], sms, threads)

    def program(block, task, *refs):
        raise_bounds(block, plan, task, *refs)

    result = jax.ShapeDtypeStruct((plan.shares, plan.parts * plan.size), jnp.int32)
    arrays, sizes = (first, factors, d, indices), {"threads": threads, "words": plan.size}
    run, tasks = run or launch, plan.shares * plan.parts
    (found,) = run("indexer_loss_bounds", program, [result], *arrays, tasks=tasks, **sizes)
    return lax.bitcast_convert_type(jnp.asarray(found).max(axis=0)[:keys], jnp.float32)
