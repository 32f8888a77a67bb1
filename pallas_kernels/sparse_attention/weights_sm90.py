# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""First part of sparse attention's backward on Hopper: the weights P again, and dS.

    P  = exp(scale Q K^T - lse)
    dS = scale P (dO V^T - delta)        delta = rowsum(dO O) - dlse

for the selected keys of each query, in bf16, to GMEM. A CTA works through (query, 64 heads) pairs
for its whole life; both head halves of a query run as a cluster of two CTAs that share nothing:
that they ask for the same rows at the same time is what makes the gather fast. Three warpgroups:

    SCORES  holds Q in registers; S of a tile of 64 keys, then P
    VALUES  holds dO in registers; dO V^T, then dS from the P that SCORES left in SMEM
    LOADER  fills the ring

What flows through the ring are parts, up to 192 columns of a tile: of each piece of work first
those of Q, dO and O, which only pass through on their way to registers, then those of its key
tiles. Both SCORES and VALUES read a part, then it is free. VALUES starts with a tile when SCORES
has its S: so the products of one run while the other is in its arithmetic.

`weights_and_sums_sm90` runs these CTAs. Registers of a thread: SCORES 208 (144 of Q, 32 of S),
VALUES 192 (128 of dO, 32 of dP), LOADER 24.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.tiles import CHUNK, LOG2E
from pallas_kernels.hopper.wgmma import add_products, finish
from pallas_kernels.sparse_attention.backward_shares import (
    drain,
    next_slot,
    share_columns,
    strided_loop,
    swept,
    value_start,
)

HEADS = 64  # of a CTA: one wgmma's rows
KEYS = 64  # of a tile
SLOTS = 8  # of the ring
INDEX_SLOTS = 7


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    groups: int  # of 64 heads
    cluster: int  # CTAs of a cluster: 2 or 1
    width: int  # C + R
    values: int  # C
    tiles: int  # of 64 selected keys
    scale: float
    window: int  # queries of a call, at most
    total: int  # queries of all calls
    clusters: int
    interpret: bool

    @property
    def part(self) -> int:
        """Columns of a part."""
        return share_columns(self.width)

    def chunks(self, width):
        """The chunks of so many columns, by part: offsets in the part."""
        return [
            list(range(0, min(self.part, width - start), CHUNK))
            for start in range(0, width, self.part)
        ]

    def value_start(self, number: int) -> int:
        """Where the copy of a part of dO or O starts: it has the whole width of a part."""
        return value_start(number, self.part, self.values)

    def value_columns(self) -> list[tuple[int, int]]:
        """The part and the offset in its copy of every chunk of dO and O."""
        return [
            (number, number * self.part - self.value_start(number) + column)
            for number, columns in enumerate(self.chunks(self.values))
            for column in columns
        ]

    def query(self, work):
        """Of the window."""
        return lax.div(work, jnp.int32(self.groups // self.cluster))

    def tile(self, number, j):
        """The tile that comes jth, of a query of all."""
        return swept(number, j, self.tiles, self.clusters)

    def heads(self, work):
        """Those of this CTA."""
        shared = lax.rem(work, jnp.int32(self.groups // self.cluster))
        return pl.ds((shared * self.cluster + lax.axis_index("half")) * HEADS, HEADS)


@dataclasses.dataclass(frozen=True)
class Shared:
    """SMEM and barriers."""

    ring: Any  # bf16 [SLOTS, 64, part]
    p_tile: Any  # bf16 [2, 64, 64]
    ds_tile: Any  # bf16 [2, 64, 64]
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    query_full: Any  # a part of Q or dO is there
    picked_full: Any
    freed: Any  # SCORES and VALUES have read the part
    scored: Any  # S of the tile is nearly done
    weighed: Any  # P of the tile is there
    weights_read: Any
    started: Any
    landing: Landing


class _Place(NamedTuple):
    """Where a warpgroup is: slot of the ring, and phases of the landing."""

    slot: Any
    phases: Any

    def next(self) -> _Place:
        return self._replace(slot=next_slot(self.slot, SLOTS))


def _for_each_work(plan: Plan, first, body, carry):
    """`carry = body(work, carry)` over this cluster's share of the window from `first`."""
    queries = jnp.clip(plan.total - first, 0, plan.window)
    work = queries * (plan.groups // plan.cluster)
    mine = lax.axis_index("cluster")
    return strided_loop(work, body, carry, mine=mine, ctas=plan.clusters)


def load(plan: Plan, first, q, dout, out, kv, indices, s: Shared):
    """LOADER."""

    def acquire(slot, filled):
        @pl.when(filled >= SLOTS)
        def _():
            plgpu.barrier_wait(s.freed.at[slot])

        return next_slot(slot, SLOTS), filled + 1

    def fetch_indices(query, tile, index_slot):
        source = indices.at[query, pl.ds(plan.tile(query, tile) * KEYS, KEYS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[index_slot], s.picked_full.at[index_slot])

    def work_item(work, carry):
        slot, filled, index_slot = carry
        query, heads = first + plan.query(work), plan.heads(work)
        fetch_indices(query, 0, index_slot)
        for table, width in ((q, plan.width), (dout, plan.values), (out, plan.values)):
            for number in range(len(plan.chunks(width))):
                start = number * plan.part if table is q else plan.value_start(number)
                source = table.at[query, heads, pl.ds(start, plan.part)]
                after = acquire(slot, filled)
                plgpu.copy_gmem_to_smem(source, s.ring.at[slot], s.query_full.at[slot])
                slot, filled = after

        def tile(j, carry):
            slot, filled, index_slot = carry
            plgpu.barrier_wait(s.picked_full.at[index_slot])
            for number in range(len(plan.chunks(plan.width))):
                after = acquire(slot, filled)
                gather_rows(
                    kv,
                    s.picked.at[index_slot],
                    s.ring.at[slot],
                    s.landing,
                    slot,
                    first_row=lax.div(query, jnp.int32(plan.queries)) * plan.rows,
                    rows=plan.rows,
                    first_column=number * plan.part,
                    columns=(0, plan.part),
                    arrive=True,
                )
                slot, filled = after
                if number == 0:

                    @pl.when(j + 1 < plan.tiles)
                    def _():
                        fetch_indices(query, j + 1, next_slot(index_slot, INDEX_SLOTS))

            return slot, filled, next_slot(index_slot, INDEX_SLOTS)

        return lax.fori_loop(0, plan.tiles, tile, (slot, filled, index_slot))

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = _for_each_work(plan, first, work_item, (zero, zero, zero))
    drain(s.freed, slot, filled, SLOTS)


def _chunk_by_chunk(plan: Plan, s: Shared, place: _Place, columns, visit):
    """`visit(chunk)` for the chunks of Q, dO or O as they arrive; returns the place after them.

    `columns` are the part and the offset in it of every chunk.
    """
    for number in range(columns[-1][0] + 1):
        plgpu.barrier_wait(s.query_full.at[place.slot])
        for of, column in columns:
            if of == number:
                chunk = s.ring.at[place.slot, :, pl.ds(column, CHUNK)]
                visit(plgpu.load(chunk, layout=plgpu.Layout.WGMMA))
                # One at a time: LDSM's registers are not wgmma's, and there are none to spare.
                warpgroup_barrier(plan.interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.freed.at[place.slot])
        place = place.next()
    return place


def _skip(plan: Plan, s: Shared, place: _Place, width: int):
    """Lets parts of Q, dO or O pass that are not for this warpgroup."""
    for _ in plan.chunks(width):
        plgpu.barrier_wait(s.query_full.at[place.slot])
        plgpu.barrier_arrive(s.freed.at[place.slot])
        place = place.next()
    return place


def _product(plan: Plan, left, start, place: _Place, width: int, s: Shared, before_last=None):
    """`start + left rows^T` over the columns of a tile's parts, each freed when read.

    `before_last` is called when only the products of the last part are unfinished.
    """
    parts = plan.chunks(width)
    result, freed = start, []
    for number, chunks in enumerate(parts):
        slot = place.slot
        s.landing.wait(slot, place.phases)
        done = sum(map(len, parts[:number]))
        result = add_products(
            result,
            left[done : done + len(chunks)],
            s.ring.at[slot],
            [c // CHUNK for c in chunks],
            first=number == 0,
            interpret=plan.interpret,
        )
        last = number == len(parts) - 1
        if number or (last and before_last is not None):
            if plan.interpret:
                plgpu.commit_smem()  # wgmma reads through the async proxy, the twin did before this
            else:
                plgpu.wgmma_wait(1)
            for one in freed:
                plgpu.barrier_arrive(one)
            if last and before_last is not None:
                before_last()
            freed = []
        freed.append(s.freed.at[slot])
        place = _Place(slot, Landing.next(slot, place.phases)).next()
    result = finish(result, plan.interpret)
    for one in freed:
        plgpu.barrier_arrive(one)
    for _ in range(len(parts), len(plan.chunks(plan.width))):  # the tail, which has no values
        s.landing.wait(place.slot, place.phases)
        plgpu.barrier_arrive(s.freed.at[place.slot])
        place = _Place(place.slot, Landing.next(place.slot, place.phases)).next()
    return result, place


def _zeros():
    return plgpu.layout_cast(jnp.zeros((HEADS, KEYS), jnp.float32), plgpu.Layout.WGMMA)


def _of_heads(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _over_keys(x):
    return lax.broadcast_in_dim(x, (HEADS, KEYS), (0,))


def scores(plan: Plan, first, lse, weights, s: Shared):
    """SCORES. `lse` is in base 2."""

    def tile(work, query, lse, j, carry):
        place, buffer, index_slot, count = carry
        plgpu.barrier_wait(s.picked_full.at[index_slot])
        index = plgpu.load(s.picked.at[index_slot], layout=plgpu.Layout.WGMMA.reduce(0))
        exists = jnp.logical_and(index >= 0, index < plan.rows)
        # S starts from -inf where there is no key: so P is 0 there.
        start = jnp.where(exists, 0.0, -jnp.inf).astype(jnp.float32)
        start = lax.broadcast_in_dim(start, (HEADS, KEYS), (1,))

        @pl.when(count >= 2)
        def _():
            plgpu.barrier_wait(s.weights_read.at[buffer])

        let_values_start = functools.partial(plgpu.barrier_arrive, s.scored.at[buffer])
        raw, place = _product(plan, query, start, place, plan.width, s, let_values_start)
        found = jnp.exp2(raw * (plan.scale * LOG2E) - _over_keys(lse))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        s.p_tile.at[buffer][...] = found.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.weighed.at[buffer])
        at = plan.tile(first + plan.query(work), j)
        target = weights.at[plan.query(work), at, plan.heads(work)]
        plgpu.copy_smem_to_gmem(s.p_tile.at[buffer], target)
        return place, 1 - buffer, next_slot(index_slot, INDEX_SLOTS), count + 1

    def work_item(work, carry):
        place, *rest = carry
        here = _of_heads(lse.at[first + plan.query(work), plan.heads(work)])
        query = []
        columns = [(i, c) for i, part in enumerate(plan.chunks(plan.width)) for c in part]
        place = _chunk_by_chunk(plan, s, place, columns, query.append)
        for _ in ("dO", "O"):
            place = _skip(plan, s, place, plan.values)
        body = functools.partial(tile, work, query, here)
        return lax.fori_loop(0, plan.tiles, body, (place, *rest))

    s.landing.initialize()
    plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    carry = _Place(zero, zero), zero, zero, zero
    count = _for_each_work(plan, first, work_item, carry)[-1]
    for i in range(2):

        @pl.when(count > i)
        def _(i=i):
            plgpu.barrier_wait(s.weights_read.at[i])

    plgpu.wait_smem_to_gmem(0)


def values(plan: Plan, first, dlse, dscores, s: Shared):
    """VALUES."""

    def tile(work, dout, delta, j, carry):
        place, buffer = carry
        plgpu.barrier_wait(s.scored.at[buffer])
        products, place = _product(plan, dout, _zeros(), place, plan.values, s)
        plgpu.barrier_wait(s.weighed.at[buffer])
        weights = plgpu.load(s.p_tile.at[buffer], layout=plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(s.weights_read.at[buffer])
        found = weights.astype(jnp.float32) * (products - _over_keys(delta)) * plan.scale
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        s.ds_tile.at[buffer][...] = found.astype(jnp.bfloat16)
        plgpu.commit_smem()
        at = plan.tile(first + plan.query(work), j)
        target = dscores.at[plan.query(work), at, plan.heads(work)]
        plgpu.copy_smem_to_gmem(s.ds_tile.at[buffer], target)
        return place, 1 - buffer

    def work_item(work, carry):
        place, *rest = carry
        place = _skip(plan, s, place, plan.width)
        dout = []
        place = _chunk_by_chunk(plan, s, place, plan.value_columns(), dout.append)
        unread, totals = iter(dout), [jnp.zeros((), jnp.float32)]

        def add(out):
            totals[0] += next(unread).astype(jnp.float32) * out.astype(jnp.float32)

        place = _chunk_by_chunk(plan, s, place, plan.value_columns(), add)
        here = _of_heads(dlse.at[first + plan.query(work), plan.heads(work)])
        body = functools.partial(tile, work, dout, totals[0].sum(axis=1) - here)
        return lax.fori_loop(0, plan.tiles, body, (place, *rest))

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    _for_each_work(plan, first, work_item, (_Place(zero, zero), zero))
    plgpu.wait_smem_to_gmem(0)
