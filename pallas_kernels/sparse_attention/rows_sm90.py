# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Part of sparse attention's backward on Hopper: what each query adds to dKV.

    rows[k] = sum_n dS[n, k] q[n] + P[n, k] dO[n]       one row for each selected key

A CTA computes one share of the columns (192 of 576) for queries one after the other, with Q and dO
of all heads in SMEM. The shares of a query are computed at about the same time by different CTAs,
so that P and dS come from the L2 for all but one. Where dKV fits the L2, rows are added up there,
as integers (`hopper.fixed_point`); else they are stored, in bf16, and added up by key elsewhere.
Three warpgroups:

    EVEN, ODD  the rows of every other tile of 64 keys
    LOADER     loads P and dS of the tiles, even and odd ones to a place of their own

P and dS are each replaced as soon as the product with it is done, P while the product with dS
runs. Stored rows leave from a place of their own while the next tile's products run; those that
are added leave while the other warpgroup's products do.

SMEM at 576 columns and 128 heads: 49,152 each of Q and dO, 2 x (16,384 P + 16,384 dS), 2 x 24,576
of rows, or 2 x 16,384 of integers. Registers of a thread: EVEN and ODD 232 (96 of rows), LOADER 40.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import fixed_point
from pallas_kernels.hopper.gather import warpgroup_barrier
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.hopper.wgmma import Product, Until, multiply_add
from pallas_kernels.sparse_attention.backward_shares import (
    SharePlan,
    drain,
    next_slot,
    share_columns,
    value_columns,
    value_start,
)

KEYS = 64  # of a tile
STAGE = 64  # columns that are added together
EVEN, ODD, LOADER = range(3)
_REGISTERS = {EVEN: 232, ODD: 232, LOADER: 40}


@dataclasses.dataclass(frozen=True)
class _Plan(SharePlan):
    """The static numbers of a call; an even number of tiles."""

    values: int  # C
    slots: int  # of a warpgroup, for P and dS in turn

    def value_columns(self, share: int) -> int:
        return value_columns(share, self.part, self.values)

    def value_start(self, share: int) -> int:
        return value_start(share, self.part, self.values)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    query: Any  # bf16 [N, part]
    dout_tile: Any  # bf16 [N, part]
    ring: Any  # bf16 [2 x slots, N, 64]: P and dS of EVEN's tiles, then those of ODD's
    out_tile: Any  # bf16 [2, 64, part], or i32 [2, 64, STAGE]: rows on their way out
    factors: Any  # f32 [part]: of the columns, where rows are added
    factors_full: Any
    query_full: Any
    query_read: Any  # EVEN and ODD need Q and dO no longer
    full: list[Any]  # of each warpgroup: P or dS of the slot is there
    freed: list[Any]  # and no longer needed


class Sums(NamedTuple):
    """Where rows are added up as integers.

    Attributes:
        indices: i32 `[all queries, K]`.
        per_column: f32 `[C + R]`, multiplied with the columns.
        per_one: f32 `[batch x S]`, of `fixed_point.units`.
        sums: a `jax.Ref`, i32 `[batch x S, C + R]`. In interpret mode ODD has sums of its own below
            those of EVEN, and no query is computed beside another: what adds there is not atomic.
        queries: T of a batch row.
        rows: S of a batch row.
    """

    indices: Any
    per_column: Any
    per_one: Any
    sums: Any
    queries: int
    rows: int

    def keys(self, query, tile):
        """Those of a tile's rows."""
        picked = self.indices.at[query, pl.ds(tile * KEYS, KEYS)]
        return plgpu.load(picked, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def first_key(self, query):
        """Where its keys begin among those of the batch."""
        return lax.div(query, jnp.int32(self.queries)) * self.rows

    def units(self, query, keys, interpret: bool):
        """What makes terms of these keys integers."""
        return fixed_point.look_up(self.per_one, keys + self.first_key(query), interpret)


def _load(plan: _Plan, share, first, q, dout, weights, dscores, sums: Sums | None, s: _Shared):
    """LOADER."""
    columns = pl.ds(share * plan.part, plan.part)

    def load_query(query, filled):
        @pl.when(filled > 0)
        def _():
            plgpu.barrier_wait(s.query_read)

        plgpu.copy_gmem_to_smem(q.at[first + query, :, columns], s.query, s.query_full)
        if plan.value_columns(share):
            some = pl.ds(plan.value_start(share), plan.part)
            plgpu.copy_gmem_to_smem(dout.at[first + query, :, some], s.dout_tile, s.query_full)

    def pair(query, j, carry):
        slot, filled = carry
        for role in (EVEN, ODD):
            at, count = slot, filled
            for source in (weights, dscores) if plan.value_columns(share) else (dscores,):

                @pl.when(count >= plan.slots)
                def _(role=role, at=at):
                    plgpu.barrier_wait(s.freed[role].at[at])

                target = s.ring.at[role * plan.slots + at]
                tile = source.at[query, 2 * j + role]
                plgpu.copy_gmem_to_smem(tile, target, s.full[role].at[at])
                at, count = next_slot(at, plan.slots), count + 1

        # The first tiles find a slot free while the last of the query before are in use.
        @pl.when(j == 0)
        def _():
            load_query(query, filled)

        return at, count

    def work_item(query, carry):
        return lax.fori_loop(0, plan.tiles // 2, functools.partial(pair, query), carry)

    if sums is not None:
        plgpu.copy_gmem_to_smem(sums.per_column.at[columns], s.factors, s.factors_full)
    slot, filled = plan.for_each_query(first, work_item, (jnp.int32(0), jnp.int32(0)))
    for freed in s.freed:
        drain(freed, slot, filled, plan.slots)

    @pl.when(filled > 0)
    def _():
        plgpu.barrier_wait(s.query_read)


def _multiply(plan: _Plan, role, share, first, rows, sums: Sums | None, s: _Shared):
    """EVEN and ODD."""
    values = plan.value_columns(share)
    shift = share * plan.part - plan.value_start(share) if values else 0
    # Apart where a share ends with columns that are no value.
    widths = [w for w in (values, plan.part - values) if w]

    def pair(query, j, carry):
        slot, target = carry
        if sums is not None:  # of the next tile: its keys' units are looked up when they are here
            following = jnp.minimum(2 * j + 2 + role, plan.tiles - 1)
            keys = sums.keys(first + query, following)
        steps = []
        if values:
            p_tile, p_slot = s.ring.at[role * plan.slots + slot], slot
            plgpu.barrier_wait(s.full[role].at[slot])
            steps.append(Product(0, p_tile.T, s.dout_tile.at[:, pl.ds(shift, values)]))
            slot = next_slot(slot, plan.slots)
        ds_tile, ds_slot = s.ring.at[role * plan.slots + slot], slot
        steps.append(lambda: plgpu.barrier_wait(s.full[role].at[ds_slot]))
        for i, width in enumerate(widths):
            right = s.query.at[:, pl.ds(sum(widths[:i]), width)]
            steps.append(Product(i, ds_tile.T, right))
        if values:
            steps.append(Until(len(widths)))
            steps.append(lambda: plgpu.barrier_arrive(s.freed[role].at[p_slot]))
        slot = next_slot(slot, plan.slots)
        zeros = [
            plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), plgpu.Layout.WGMMA)
            for width in widths
        ]
        found = multiply_add(zeros, steps, plan.interpret)
        plgpu.barrier_arrive(s.freed[role].at[ds_slot])
        plgpu.barrier_arrive(s.query_read, predicate=2 * j + 2 == plan.tiles)

        starts = [sum(widths[:i]) for i in range(len(widths))]
        if sums is None:
            store(query * plan.tiles + 2 * j + role, starts, found)
            return slot, None
        units = sums.units(first + query, keys, plan.interpret)
        add(target, query, starts, found)
        return slot, (keys, units)

    def add(target, query, starts, found):
        begin = sums.first_key(first + query)
        if plan.interpret:
            begin += role * sums.per_one.shape[0]
        for start, part in zip(starts, found, strict=True):
            some = s.factors.at[pl.ds(start, part.shape[1])]
            factors = plgpu.load(some, layout=plgpu.Layout.WGMMA.reduce(0))
            fixed_point.add_rows(
                sums.sums,
                part * lax.broadcast_in_dim(factors, part.shape, (1,)),
                *target,
                begin,
                s.out_tile.at[role],
                first_column=share * plan.part + start,
                limit=sums.rows,
                interpret=plan.interpret,
            )

    def store(tile, starts, found):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        for start, part in zip(starts, found, strict=True):
            out = s.out_tile.at[role, :, pl.ds(start, part.shape[1])]
            out[...] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = rows.at[share, pl.ds(tile * KEYS, KEYS)]
        plgpu.copy_smem_to_gmem(s.out_tile.at[role], target)

    def work_item(query, slot):
        target = None
        if sums is not None:
            keys = sums.keys(first + query, role)
            target = keys, sums.units(first + query, keys, plan.interpret)
        plgpu.barrier_wait(s.query_full)
        body = functools.partial(pair, query)
        return lax.fori_loop(0, plan.tiles // 2, body, (slot, target))[0]

    if sums is not None:
        plgpu.barrier_wait(s.factors_full)
    plan.for_each_query(first, work_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _kernel(first, q, dout, weights, dscores, rows, sums, *, plan: _Plan, **shared):
    role = lax.axis_index("role")
    start = first[0]
    query_full = shared.pop("query_full")

    def run(number, share):
        # It counts the copies: one less where the share has no value columns.
        s = _Shared(**shared, query_full=query_full[1 if plan.value_columns(share) else 0])
        if number == LOADER:
            _load(plan, share, start, q, dout, weights, dscores, sums, s)
        else:
            _multiply(plan, number, share, start, rows, sums, s)

    for number in (EVEN, ODD, LOADER):

        @pl.when(role == number)
        def _(number=number):
            action = "decrease" if number == LOADER else "increase"
            plgpu.set_max_registers(_REGISTERS[number], action=action)
            for share in range(plan.shares):

                @pl.when(lax.axis_index("share") == share)
                def _(share=share):
                    run(number, share)


def rows_of_queries(
    first, q, dout, weights, dscores, added, sums: Sums | None = None, *,
    window, sms, interpret=None,
):  # fmt: skip
    """Writes or adds up what a window of queries adds to dKV.

    Args:
        first: i32 `[1]`, the first query of the window.
        q: bf16 `[all queries, N, C + R]`, N 64 or 128.
        dout: bf16 `[all queries, N, C]`.
        weights: P, bf16 `[window, K / 64, N, 64]`, K a multiple of 128.
        dscores: dS, as P.
        added: a `jax.Ref`, bf16 `[shares, window x K, columns]`, shares of the C + R columns; what
            lies past the last query stays. None where rows are added up.
        sums: where that is; None where rows are written.
        window: queries of the window.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = q.shape
    part, tiles = share_columns(width), weights.shape[1]
    plan = _Plan(
        width=width,
        values=dout.shape[-1],
        tiles=tiles,
        slots=2 if sums is None else 3,
        window=window,
        total=total,
        lanes=max(1, min(sms // (width // part), window)),
        interpret=interpret is not None,
    )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def sparse_attention_rows(*refs, **scratch):  # its name is the kernel's
        if sums is None:
            *refs, added = refs
            _kernel(*refs, added, None, plan=plan, **scratch)
        else:
            _kernel(*refs[:5], None, Sums(*refs[5:], *sums[4:]), plan=plan, **scratch)

    if sums is None:
        out_tile = tile(2, KEYS, part)
    else:
        out_tile = plgpu.SMEM((2, KEYS, STAGE), jnp.int32)
    plgpu.kernel(
        sparse_attention_rows,
        scratch_types={
            "query": tile(heads, part),
            "dout_tile": tile(heads, part),
            "ring": tile(2 * plan.slots, heads, KEYS),
            "out_tile": out_tile,
            "factors": plgpu.SMEM((part,), jnp.float32),
            "factors_full": plgpu.Barrier(),
            "query_full": [plgpu.Barrier(num_arrivals=n) for n in (1, 2)],
            "query_read": plgpu.Barrier(num_arrivals=2),
            "full": [plgpu.Barrier(num_barriers=plan.slots) for _ in (EVEN, ODD)],
            "freed": [plgpu.Barrier(num_barriers=plan.slots) for _ in (EVEN, ODD)],
        },
        grid=(plan.shares, plan.lanes),
        grid_names=("share", "lane"),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(first, q, dout, weights, dscores, *((added,) if sums is None else sums[:4]))
