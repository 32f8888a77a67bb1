# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""What attention and indexer say of each selected key, on Hopper: mass and score of a pair.

    mass[t, k]  = sum_n exp(scale q[t, n] . kv[s] - lse[t, n])        s = indices[t, k]
    score[t, k] = sum_i iw[t, i] relu(iq[t, i] . ik[s])

and, for the gradient, which of the products of score are positive, a bit each, and how large iq is:

    size[t, i]  = max_h |iq[t, i, h]|

A CTA works through queries for its whole life. The gathered keys are the 64 rows of a product, all
heads of the query its columns: so a key is gathered once, and the sum over heads stays within the
registers of the four lanes that share a row. Three warpgroups:

    EVEN, ODD  every other tile of 64 keys
    LOADER     fills a ring with parts of up to 128 columns: of kv, then of ik

The ring holds less than a tile, so that the parts of one warpgroup's tile arrive while the other
exponentiates. The queries are replaced part by part as the last tile has used them.

SMEM at 576 columns and 128 heads: 147,456 of q, 16,384 of iq, 4 x 16,384 of ring, 1,280 of indices.
Registers of a thread: EVEN and ODD 224 (96 of products, 48 of lse and iw), LOADER 56.
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

from pallas_kernels.hopper import roles, signs
from pallas_kernels.hopper.gather import LANES, Landing, gather_rows
from pallas_kernels.hopper.tiles import LOG2E, SWIZZLED
from pallas_kernels.hopper.wgmma import Product, Until, multiply_add
from pallas_kernels.sparse_attention.backward_shares import drain, next_slot, strided_loop

INDEX_HEADS = 64  # I
KEYS = 64  # of a tile
PART = 128  # columns, at most
SLOTS = 4  # of the ring, at most
INDEX_SLOTS = 4
EVEN, ODD = 0, 1
_REGISTERS = 224, 224, 56  # of EVEN, ODD, LOADER


class _Part(NamedTuple):
    """Some columns of kv and q, or of ik and iq."""

    of_index: bool
    start: int
    width: int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    total: int  # queries of all batch rows
    heads: int  # 64 or 128
    width: int  # C + R
    index_width: int  # H
    scale: float
    ctas: int
    interpret: bool

    @property
    def parts(self) -> list[_Part]:
        """Of a tile."""
        return [
            _Part(of_index, start, min(PART, width - start))
            for of_index, width in ((False, self.width), (True, self.index_width))
            for start in range(0, width, PART)
        ]

    @property
    def slots(self) -> int:
        """Of the ring. No more than a tile: its loads then tell that indices before are read."""
        return min(SLOTS, len(self.parts))

    def for_each_part(self, tiles, body, carry):
        """`carry = body(query, first tile, how many, tiles before, carry)` over this CTA's share.

        Parts are whole queries, as many for each CTA. Queries that are left are divided by tiles.
        """
        whole = self.total // self.ctas * self.ctas
        left = self.total - whole
        pieces = self.ctas // max(left, 1)

        def step(number, state):
            before, carry = state
            piece = jnp.maximum(number - whole, 0)
            query = jnp.minimum(number, whole) + lax.div(piece, jnp.int32(pieces))
            piece = lax.rem(piece, jnp.int32(pieces))
            of = jnp.where(number < whole, 1, pieces)
            first, end = (lax.div(tiles[query] * n, of) for n in (piece, piece + 1))
            some = functools.partial(body, query, first, end - first, before)
            carry = lax.cond(first < end, some, lambda carry: carry, carry)
            return before + end - first, carry

        start = jnp.int32(0), carry
        mine = lax.axis_index("cta")
        total = jnp.int32(whole + left * pieces)
        return strided_loop(total, step, start, mine=mine, ctas=self.ctas)[1]


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    query: list[Any]  # bf16 [1, N, width] of each part, or [1, 64, width] of iq
    ring: Any  # bf16 [slots, 64, PART]
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    picked_full: Any
    query_full: Any  # a part of q or iq is there
    query_read: Any  # and no longer needed, by EVEN and by ODD
    freed: Any  # a slot of the ring
    started: Any
    landing: Landing  # of a slot's part for EVEN, then for ODD: who waits must never miss one


class _Results(NamedTuple):
    """What the kernel writes; the last two if asked for."""

    mass: Any
    scores: Any
    positive: Any = None
    sizes: Any = None


def _load(plan: _Plan, q, iq, kv, ik, indices, tiles, s: _Shared):
    """LOADER."""

    def fetch_indices(query, tile, index_slot):
        source = indices.at[query, pl.ds(tile * KEYS, KEYS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[index_slot], s.picked_full.at[index_slot])

    def load_query(query, number, part, later):
        @pl.when(later)
        def _():
            plgpu.barrier_wait(s.query_read.at[number])

        table = iq if part.of_index else q
        source = table.at[query, :, pl.ds(part.start, part.width)]
        plgpu.copy_gmem_to_smem(source, s.query[number].at[0], s.query_full.at[number])

    def work_item(query, first, count, before, carry):
        first_row = lax.div(query, jnp.int32(plan.queries)) * plan.rows
        fetch_indices(query, first, carry[2])

        def tile(j, carry):
            slot, filled, index_slot = carry
            following = next_slot(index_slot, INDEX_SLOTS)

            @pl.when(j + 1 < count)
            def _():
                fetch_indices(query, first + j + 1, following)

            plgpu.barrier_wait(s.picked_full.at[index_slot])
            whose = lax.rem(before + j, jnp.int32(2))
            for number, part in enumerate(plan.parts):

                @pl.when(j == 0)
                def _(number=number, part=part):
                    load_query(query, number, part, before > 0)

                @pl.when(filled >= plan.slots)
                def _(slot=slot):
                    plgpu.barrier_wait(s.freed.at[slot])

                gather_rows(
                    ik if part.of_index else kv,
                    s.picked.at[index_slot],
                    s.ring.at[slot],
                    s.landing,
                    slot + plan.slots * whose,
                    first_row=first_row,
                    rows=plan.rows,
                    first_column=part.start,
                    columns=(0, part.width),
                    arrive=True,
                )
                slot, filled = next_slot(slot, plan.slots), filled + 1
            return slot, filled, following

        return lax.fori_loop(0, count, tile, carry)

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = plan.for_each_part(tiles, work_item, (zero, zero, zero))
    drain(s.freed, slot, filled, plan.slots)

    @pl.when(filled > 0)
    def _():
        for number in range(len(plan.parts)):
            plgpu.barrier_wait(s.query_read.at[number])


def _products(plan: _Plan, number, first, last, phases, s: _Shared):
    """`(kv . q [keys, N], ik . iq [keys, 64], phases)` of a tile.

    Args:
        plan: what is static.
        number: which tile, of all of this CTA.
        first, last: whether this warpgroup has none of the query before, or after.
        phases: of the landing.
        s: what is shared. The last part of the query is still needed afterwards.
    """
    role, parts = lax.rem(number, jnp.int32(2)), plan.parts
    slots = [lax.rem(number * len(parts) + i, jnp.int32(plan.slots)) for i in range(len(parts))]
    steps = []
    # Known to be 0 to nobody: else the addresses of all parts are kept in registers, and spill.
    nought = jnp.minimum(number, 0)

    def wait(i, phases):
        @pl.when(first)
        def _():
            plgpu.barrier_wait(s.query_full.at[i])

        s.landing.wait(slots[i] + plan.slots * role, phases)

    def free(i):
        plgpu.barrier_arrive(s.freed.at[slots[i]])
        if i + 1 < len(parts):
            plgpu.barrier_arrive(s.query_read.at[i], predicate=last)

    for i, part in enumerate(parts):
        steps.append(functools.partial(wait, i, phases))
        keys = s.ring.at[slots[i], :, pl.ds(0, part.width)]
        steps.append(Product(1 if part.of_index else 0, keys, s.query[i].at[nought].T))
        if i:
            steps += [Until(1), functools.partial(free, i - 1)]
        phases = Landing.next(slots[i] + plan.slots * role, phases)
    zeros = [
        plgpu.layout_cast(jnp.zeros((KEYS, columns), jnp.float32), plgpu.Layout.WGMMA)
        for columns in (plan.heads, INDEX_HEADS)
    ]
    found, index_found = multiply_add(zeros, steps, plan.interpret)
    free(len(parts) - 1)
    return found, index_found, phases


def _weigh(plan: _Plan, role: int, lse, iw, tiles, out: _Results, s: _Shared):
    """EVEN or ODD. `lse` is in base 2."""
    column = plgpu.Layout.WGMMA.reduce(0)

    def measure(query):
        values = plgpu.load(s.query[-1].at[0], layout=plgpu.Layout.WGMMA)
        out.sizes.at[query][...] = jnp.abs(values.astype(jnp.float32)).max(axis=1)
        plgpu.commit_smem()  # the next query's may be written after this

    def over_heads(x):
        return lax.broadcast_in_dim(x, (KEYS, x.shape[0]), (1,))

    def tile(query, first, before, shift, mine, bound, weight, i, phases):
        j = shift + 2 * i
        dots, index_dots, phases = _products(plan, before + j, i == 0, i == mine - 1, phases, s)
        some = pl.ds((first + j) * KEYS, KEYS)
        found = jnp.exp2(dots * (plan.scale * LOG2E) - over_heads(bound)).sum(axis=1)
        out.mass.at[query, some][...] = found
        found = (jnp.maximum(index_dots, 0.0) * over_heads(weight)).sum(axis=1)
        out.scores.at[query, some][...] = found
        if out.positive is not None:
            out.positive.at[query, first + j][...] = signs.pack(index_dots, plan.interpret)
        return phases

    def work_item(query, first, count, before, phases):
        shift = lax.rem(before + role, jnp.int32(2))
        mine = lax.div(count - shift + 1, jnp.int32(2))

        @pl.when(mine == 0)
        def _():
            for i in range(len(plan.parts)):
                plgpu.barrier_wait(s.query_full.at[i])
                plgpu.barrier_arrive(s.query_read.at[i])

        bound, weight = (plgpu.load(x.at[query], layout=column, optimized=False) for x in (lse, iw))
        body = functools.partial(tile, query, first, before, shift, mine, bound, weight)
        phases = lax.fori_loop(0, mine, body, phases)

        @pl.when(mine > 0)
        def _():
            # Whoever had the query's first tile.
            if out.sizes is not None:
                pl.when(first + shift == 0)(functools.partial(measure, query))
            plgpu.barrier_arrive(s.query_read.at[len(plan.parts) - 1])

        return phases

    if role == EVEN:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    plan.for_each_part(tiles, work_item, jnp.int32(0))


def pairs(
    q, iq, kv, ik, lse, iw, indices, tiles, *,
    queries, rows, scale, sms, for_gradient, interpret=None,
):  # fmt: skip
    """`[mass, score]`, f32 `[all queries, K]`; undefined where no key is selected.

    Then, if asked for, i32 `[all queries, K / 64, 128]` of `signs.pack`, undefined in tiles without
    a key; and the sizes, f32 `[all queries, 64]`.

    Args:
        q: bf16 `[all queries, N, C + R]`, N 64 or 128.
        iq: bf16 `[all queries, 64, H]`.
        kv: bf16 `[batch x S, C + R]`.
        ik: bf16 `[batch x S, H]`.
        lse: f32 `[all queries, N]`, in base 2; inf for a head that does not count.
        iw: f32 `[all queries, 64]`.
        indices: i32 `[all queries, K]`, K a multiple of 64.
        tiles: i32 `[all queries]`, how many tiles of 64 hold a key, at least 1.
        queries: T of a batch row.
        rows: S of a batch row.
        scale: of the attention's scores.
        sms: CTAs.
        for_gradient: whether its signs and sizes are asked for.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = q.shape
    plan = _Plan(
        queries=queries,
        rows=rows,
        total=total,
        heads=heads,
        width=width,
        index_width=iq.shape[-1],
        scale=scale,
        ctas=min(sms, total),
        interpret=interpret is not None,
    )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def assign(q, iq, kv, ik, lse, iw, indices, tiles, *out, **shared):
        s = _Shared(**shared)
        weigh, out = functools.partial(_weigh, plan), _Results(*out)
        return (
            lambda: weigh(EVEN, lse, iw, tiles, out, s),
            lambda: weigh(ODD, lse, iw, tiles, out, s),
            lambda: _load(plan, q, iq, kv, ik, indices, tiles, s),
        )

    results = [jax.ShapeDtypeStruct(indices.shape, jnp.float32)] * 2
    if for_gradient:
        words = jax.ShapeDtypeStruct((total, indices.shape[1] // KEYS, LANES), jnp.int32)
        results += [words, jax.ShapeDtypeStruct((total, INDEX_HEADS), jnp.float32)]
    return roles.kernel(
        "indexer_loss_pairs",
        assign,
        _REGISTERS,
        out_type=results,
        scratch_types={
            "query": [
                tile(1, INDEX_HEADS if part.of_index else heads, part.width) for part in plan.parts
            ],
            "ring": tile(plan.slots, KEYS, PART),
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, KEYS), jnp.int32),
            "picked_full": plgpu.Barrier(num_barriers=INDEX_SLOTS),
            "query_full": plgpu.Barrier(num_barriers=len(plan.parts)),
            "query_read": plgpu.Barrier(num_arrivals=2, num_barriers=len(plan.parts)),
            "freed": plgpu.Barrier(num_barriers=plan.slots),
            "started": plgpu.Barrier(),
        },
        landing_slots=2 * plan.slots,
        grid={"cta": plan.ctas},
        interpret=interpret,
    )(q, iq, kv, ik, lse, iw, indices, tiles)
