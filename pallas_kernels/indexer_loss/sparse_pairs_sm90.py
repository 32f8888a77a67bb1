# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""What attention and indexer say of each selected key, on Hopper: mass and score of a pair.

    mass[t, g, k] = sum_n exp(scale q[t, n] . kv[s] - lse[t, n])      s = indices[t, k], n in g
    score[t, k]   = sum_i iw[t, i] relu(iq[t, i] . ik[s])

g are groups of 64 heads, one or two. A CTA works through queries for its whole life, so that a key
is gathered once for all its heads. Three warpgroups:

    FIRST, SECOND  hold q of 64 heads each in registers, the rows of their products; the columns
                   are the 64 keys of a tile. With one group they hold the same and take every
                   other tile. The indexer's scores of every other tile are computed by either.
    LOADER         fills a ring with parts of up to 192 columns: of q, which only pass through on
                   their way to registers, then tile by tile of kv, and of ik.

With q in registers, shared memory gives each key twice to the products and takes it once from the
L2, 96 of the 128 bytes a clock that it has; and the ring can hold two tiles.

SMEM at 576 columns: 8 x 24,576 of ring, 16,384 of iq, 2,048 of indices, 6,144 of sums on their way
out. Registers of a thread: FIRST and SECOND 232 (144 of q, 32 of products), LOADER 40.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import roles, row_sum
from pallas_kernels.hopper.gather import Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.tiles import CHUNK, LOG2E, SWIZZLED
from pallas_kernels.hopper.wgmma import add_products, finish, multiply
from pallas_kernels.sparse_attention.backward_shares import drain, next_slot, strided_loop

HEADS = 64  # of a group: one wgmma's rows
KEYS = 64  # of a tile
SLOTS = 8  # of the ring
INDEX_SLOTS = 7  # more than tiles that the ring may hold, by two
FIRST, SECOND = 0, 1
_REGISTERS = 232, 232, 40  # of FIRST, SECOND, LOADER


class _Part(NamedTuple):
    """Some columns of kv and q."""

    start: int
    width: int
    skew: int  # where they start in a copy of q, which is as wide as a slot


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    total: int  # queries of all batch rows
    groups: int  # of 64 heads
    width: int  # C + R
    index_width: int  # H
    scale: float
    ctas: int
    interpret: bool

    @property
    def slot(self) -> int:
        """Columns of a slot."""
        wide = 3 * CHUNK
        return wide if self.width % wide == 0 else max(min(2 * CHUNK, self.width), self.index_width)

    @property
    def parts(self) -> list[_Part]:
        """Of a tile of kv."""
        found = []
        for start in range(0, self.width, self.slot):
            skew = start - min(start, self.width - self.slot)
            found.append(_Part(start, min(self.slot, self.width - start), skew))
        return found

    def for_each_query(self, body, carry):
        """`carry = body(query, carry)` over this CTA's queries."""
        mine = lax.axis_index("cta")
        return strided_loop(self.total, body, carry, mine=mine, ctas=self.ctas)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    ring: Any  # bf16 [SLOTS, 64, slot]
    index_query: Any  # bf16 [64, H]
    partial: Any  # f32 [2 x 3, 4, 64]: sums of a warp's rows
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    picked_full: Any
    query_full: Any  # the slot holds a part of q
    index_query_full: Any
    index_query_read: Any
    freed: Any  # FIRST and SECOND are done with the slot
    started: Any
    landing: Landing


class _Place(NamedTuple):
    """Where a warpgroup is: slot of the ring, and phases of the landing."""

    slot: Any
    phases: Any

    def next(self, landed: bool) -> _Place:
        """After a slot that held rows that landed, or q."""
        phases = Landing.next(self.slot, self.phases) if landed else self.phases
        return _Place(next_slot(self.slot, SLOTS), phases)


def _load(plan: _Plan, q, iq, kv, ik, indices, tiles, s: _Shared):
    """LOADER."""

    def acquire(slot, filled):
        @pl.when(filled >= SLOTS)
        def _():
            plgpu.barrier_wait(s.freed.at[slot])

        return next_slot(slot, SLOTS), filled + 1

    def fetch_indices(query, tile, index_slot):
        source = indices.at[query, pl.ds(tile * KEYS, KEYS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[index_slot], s.picked_full.at[index_slot])

    def fetch_index_query(query, filled):
        @pl.when(filled > plan.groups * len(plan.parts) + len(plan.parts))
        def _():
            plgpu.barrier_wait(s.index_query_read)

        plgpu.copy_gmem_to_smem(iq.at[query], s.index_query, s.index_query_full)

    def work_item(query, carry):
        slot, filled, index_slot = carry
        count = tiles[query]
        first_row = lax.div(query, jnp.int32(plan.queries)) * plan.rows
        fetch_indices(query, 0, index_slot)
        for part in plan.parts:
            for group in range(plan.groups):
                columns = pl.ds(part.start - part.skew, plan.slot)
                source = q.at[query, pl.ds(group * HEADS, HEADS), columns]
                after = acquire(slot, filled)
                plgpu.copy_gmem_to_smem(source, s.ring.at[slot], s.query_full.at[slot])
                slot, filled = after

        def gather(table, index_slot, slot, start, width):
            gather_rows(
                table,
                s.picked.at[index_slot],
                s.ring.at[slot],
                s.landing,
                slot,
                first_row=first_row,
                rows=plan.rows,
                first_column=start,
                columns=(0, width),
                arrive=True,
            )

        def tile(j, carry):
            slot, filled, index_slot = carry
            following = next_slot(index_slot, INDEX_SLOTS)

            @pl.when(j + 1 < count)
            def _():
                fetch_indices(query, j + 1, following)

            plgpu.barrier_wait(s.picked_full.at[index_slot])
            for part in plan.parts:
                after = acquire(slot, filled)
                gather(kv, index_slot, slot, part.start, part.width)
                slot, filled = after

            @pl.when(j == 0)
            def _():
                fetch_index_query(query, filled)

            after = acquire(slot, filled)
            gather(ik, index_slot, slot, 0, plan.index_width)
            return *after, following

        return lax.fori_loop(0, count, tile, (slot, filled, index_slot))

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = plan.for_each_query(work_item, (zero, zero, zero))
    drain(s.freed, slot, filled, SLOTS)

    @pl.when(filled > 0)
    def _():
        plgpu.barrier_wait(s.index_query_read)


def _read_query(plan: _Plan, group: int, place: _Place, s: _Shared):
    """`(q of a group in chunks of 64 columns, the place after)`."""
    chunks = []
    for part in plan.parts:
        for number in range(plan.groups):
            plgpu.barrier_wait(s.query_full.at[place.slot])
            for column in range(0, part.width if number == group else 0, CHUNK):
                chunk = s.ring.at[place.slot, :, pl.ds(part.skew + column, CHUNK)]
                chunks.append(plgpu.load(chunk, layout=plgpu.Layout.WGMMA))
                # One at a time: LDSM's registers are not wgmma's, and there are none to spare.
                warpgroup_barrier(plan.interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.freed.at[place.slot])
            place = place.next(landed=False)
    return chunks, place


def _product(plan: _Plan, query, places, s: _Shared):
    """`q kv^T` of a tile whose parts lie at the places; each is freed when read."""
    result = plgpu.layout_cast(jnp.zeros((HEADS, KEYS), jnp.float32), plgpu.Layout.WGMMA)
    done, unfreed = 0, None
    for part, place in zip(plan.parts, places, strict=True):
        s.landing.wait(*place)
        chunks = range(part.width // CHUNK)
        result = add_products(
            result,
            query[done : done + len(chunks)],
            s.ring.at[place.slot],
            chunks,
            first=done == 0,
            interpret=plan.interpret,
        )
        done += len(chunks)
        if unfreed is not None:
            if plan.interpret:
                plgpu.commit_smem()  # wgmma reads through the async proxy, the twin did before this
            else:
                plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(s.freed.at[unfreed])
        unfreed = place.slot
    result = finish(result, plan.interpret)
    plgpu.barrier_arrive(s.freed.at[unfreed])
    return result


def _skip(places, s: _Shared):
    """Lets parts pass that are not for this warpgroup."""
    for place in places:
        s.landing.wait(*place)
        plgpu.barrier_arrive(s.freed.at[place.slot])


def _weigh(plan: _Plan, role: int, lse, iw, tiles, mass, scores, s: _Shared):
    """FIRST or SECOND. `lse` is in base 2."""
    group = role if plan.groups == 2 else 0

    def of_heads(ref):
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def over_keys(x):
        return lax.broadcast_in_dim(x, (HEADS, KEYS), (0,))

    def weigh(query, chunks, lse, some, places, number):
        dots = _product(plan, chunks, places, s)
        weights = jnp.exp2(dots * (plan.scale * LOG2E) - over_keys(lse))
        scratch = s.partial.at[3 * role + number]
        row_sum.store_row_sum(weights, mass.at[query, group, some], scratch, plan.interpret)

    def score(query, weight, some, place):
        keys = s.ring.at[place.slot, :, pl.ds(0, plan.index_width)]
        wait = functools.partial(s.landing.wait, *place)
        dots = multiply((HEADS, KEYS), [wait, (s.index_query, keys.T)], plan.interpret)
        plgpu.barrier_arrive(s.freed.at[place.slot])
        found = jnp.maximum(dots, 0.0) * over_keys(weight)
        scratch = s.partial.at[3 * role + 2]
        row_sum.store_row_sum(found, scores.at[query, some], scratch, plan.interpret)

    def tile(query, chunks, lse, weight, j, carry):
        place, places = _Place(*carry), []
        for _ in range(len(plan.parts) + 1):
            places.append(place)
            place = place.next(landed=True)
        some = pl.ds(j * KEYS, KEYS)
        parity = lax.rem(j, jnp.int32(2))
        own = parity == role
        if plan.groups == 2:
            weigh(query, chunks, lse, some, places[:-1], parity)
        else:

            @pl.when(own)
            def _():
                weigh(query, chunks, lse, some, places[:-1], 0)

            @pl.when(jnp.logical_not(own))
            def _():
                _skip(places[:-1], s)

        @pl.when(j == 0)
        def _():
            plgpu.barrier_wait(s.index_query_full)

        @pl.when(own)
        def _():
            score(query, weight, some, places[-1])

        @pl.when(jnp.logical_not(own))
        def _():
            _skip(places[-1:], s)

        return tuple(place)

    def work_item(query, carry):
        chunks, place = _read_query(plan, group, _Place(*carry), s)
        bound = of_heads(lse.at[query, pl.ds(group * HEADS, HEADS)])
        body = functools.partial(tile, query, chunks, bound, of_heads(iw.at[query]))
        carry = lax.fori_loop(0, tiles[query], body, tuple(place))
        plgpu.barrier_arrive(s.index_query_read)
        return carry

    if role == FIRST:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    plan.for_each_query(work_item, (jnp.int32(0), jnp.int32(0)))


def pairs(q, iq, kv, ik, lse, iw, indices, tiles, *, queries, rows, scale, sms, interpret=None):
    """`(mass [all queries, N / 64, K], score [all queries, K])`, f32; undefined where no key is.

    Args:
        q: bf16 `[all queries, N, C + R]`, N 64 or 128.
        iq: bf16 `[all queries, 64, H]`.
        kv: bf16 `[batch x S, C + R]`, C + R at least H.
        ik: bf16 `[batch x S, H]`.
        lse: f32 `[all queries, N]`, in base 2; inf for a head that does not count.
        iw: f32 `[all queries, 64]`.
        indices: i32 `[all queries, K]`, K a multiple of 64.
        tiles: i32 `[all queries]`, how many tiles of 64 hold a key, at least 1.
        queries: T of a batch row.
        rows: S of a batch row.
        scale: of the attention's scores.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = q.shape
    plan = _Plan(
        queries=queries,
        rows=rows,
        total=total,
        groups=heads // HEADS,
        width=width,
        index_width=iq.shape[-1],
        scale=scale,
        ctas=min(sms, total),
        interpret=interpret is not None,
    )

    def assign(q, iq, kv, ik, lse, iw, indices, tiles, mass, scores, **shared):
        s = _Shared(**shared)
        return (
            lambda: _weigh(plan, FIRST, lse, iw, tiles, mass, scores, s),
            lambda: _weigh(plan, SECOND, lse, iw, tiles, mass, scores, s),
            lambda: _load(plan, q, iq, kv, ik, indices, tiles, s),
        )

    def barriers(count: int, arrivals: int = 1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    selected = indices.shape[1]
    return roles.kernel(
        "indexer_loss_pairs",
        assign,
        _REGISTERS,
        out_type=[
            jax.ShapeDtypeStruct((total, plan.groups, selected), jnp.float32),
            jax.ShapeDtypeStruct((total, selected), jnp.float32),
        ],
        scratch_types={
            "ring": plgpu.SMEM((SLOTS, KEYS, plan.slot), jnp.bfloat16, transforms=SWIZZLED),
            "index_query": plgpu.SMEM(iq.shape[1:], jnp.bfloat16, transforms=SWIZZLED),
            "partial": plgpu.SMEM((2 * 3, row_sum.WARPS, KEYS), jnp.float32),
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, KEYS), jnp.int32),
            "picked_full": barriers(INDEX_SLOTS),
            "query_full": barriers(SLOTS),
            "index_query_full": barriers(1),
            "index_query_read": barriers(1, 2),
            "freed": barriers(SLOTS, 2),
            "started": barriers(1),
        },
        landing_slots=SLOTS,
        grid={"cta": plan.ctas},
        interpret=interpret,
    )(q, iq, kv, ik, lse, iw, indices, tiles)
