# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Part of sparse attention's backward on Hopper: what each query adds to dKV.

    rows[k] = sum_n dS[n, k] q[n] + P[n, k] dO[n]       one row for each selected key, in bf16

A CTA computes one share of the columns (192 of 576) for queries one after the other, with Q and dO
of all heads in SMEM. The shares of a query are computed at about the same time by different CTAs,
so that P and dS come from the L2 for all but one. Three warpgroups:

    EVEN, ODD  the rows of every other tile of 64 keys
    LOADER     loads P and dS of the tiles, even and odd ones to a place of their own

P and dS are each replaced as soon as the product with it is done, P while the product with dS
runs; the rows leave from a place of their own while the next tile's products run.

SMEM at 576 columns and 128 heads: 49,152 each of Q and dO, 2 x (16,384 P + 16,384 dS), 2 x 24,576
of rows. Registers of a thread: EVEN and ODD 216 (96 of rows), LOADER 40.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import warpgroup_barrier
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.hopper.wgmma import Product, Until, multiply_add
from pallas_kernels.sparse_attention.backward_shares import (
    SharePlan,
    share_columns,
    value_columns,
    value_start,
)

KEYS = 64  # of a tile
SLOTS = 2  # one for EVEN, one for ODD
EVEN, ODD, LOADER = range(3)
_REGISTERS = {EVEN: 216, ODD: 216, LOADER: 40}


@dataclasses.dataclass(frozen=True)
class _Plan(SharePlan):
    """The static numbers of a call; an even number of tiles."""

    values: int  # C

    def value_columns(self, share: int) -> int:
        return value_columns(share, self.part, self.values)

    def value_start(self, share: int) -> int:
        return value_start(share, self.part, self.values)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    query: Any  # bf16 [N, part]
    dout_tile: Any  # bf16 [N, part]
    p_tile: Any  # bf16 [SLOTS, N, 64]
    ds_tile: Any  # bf16 [SLOTS, N, 64]
    out_tile: Any  # bf16 [SLOTS, 64, part]: rows on their way out
    query_full: Any
    query_read: Any  # EVEN and ODD need Q and dO no longer
    p_full: Any  # P of the slot is there
    p_freed: Any  # and no longer needed
    ds_full: Any  # the same of dS
    ds_freed: Any


def _load(plan: _Plan, share, first, q, dout, weights, dscores, s: _Shared):
    """LOADER."""
    columns = pl.ds(share * plan.part, plan.part)

    def load_query(query, filled):
        @pl.when(filled >= plan.tiles)
        def _():
            plgpu.barrier_wait(s.query_read)

        plgpu.copy_gmem_to_smem(q.at[first + query, :, columns], s.query, s.query_full)
        if plan.value_columns(share):
            some = pl.ds(plan.value_start(share), plan.part)
            plgpu.copy_gmem_to_smem(dout.at[first + query, :, some], s.dout_tile, s.query_full)

    def tile(query, j, filled):
        slot = lax.rem(j, jnp.int32(SLOTS))

        def load(source, target, full, freed):
            @pl.when(filled >= SLOTS)
            def _():
                plgpu.barrier_wait(freed.at[slot])

            plgpu.copy_gmem_to_smem(source.at[query, j], target.at[slot], full.at[slot])

        if plan.value_columns(share):
            load(weights, s.p_tile, s.p_full, s.p_freed)
        load(dscores, s.ds_tile, s.ds_full, s.ds_freed)

        # The first tile finds its slot free while the last of the query before is in use.
        @pl.when(j == 0)
        def _():
            load_query(query, filled)

        return filled + 1

    def work_item(query, filled):
        return lax.fori_loop(0, plan.tiles, functools.partial(tile, query), filled)

    filled = plan.for_each_query(first, work_item, jnp.int32(0))

    @pl.when(filled > 0)
    def _():
        plgpu.barrier_wait(s.query_read)
        for slot in range(SLOTS):
            if plan.value_columns(share):
                plgpu.barrier_wait(s.p_freed.at[slot])
            plgpu.barrier_wait(s.ds_freed.at[slot])


def _multiply(plan: _Plan, role, share, first, rows, s: _Shared):
    """EVEN and ODD."""
    values = plan.value_columns(share)
    shift = share * plan.part - plan.value_start(share) if values else 0
    # Apart where a share ends with columns that are no value.
    widths = [w for w in (values, plan.part - values) if w]

    def pair(query, j, _):
        slot = lax.rem(2 * j + role, jnp.int32(SLOTS))  # `role`, as a traced value
        p_tile, ds_tile = s.p_tile.at[slot], s.ds_tile.at[slot]
        steps = []
        if values:
            plgpu.barrier_wait(s.p_full.at[slot])
            steps.append(Product(0, p_tile.T, s.dout_tile.at[:, pl.ds(shift, values)]))
        steps.append(lambda: plgpu.barrier_wait(s.ds_full.at[slot]))
        for i, width in enumerate(widths):
            right = s.query.at[:, pl.ds(sum(widths[:i]), width)]
            steps.append(Product(i, ds_tile.T, right))
        if values:
            steps.append(Until(len(widths)))
            steps.append(lambda: plgpu.barrier_arrive(s.p_freed.at[slot]))
        zeros = [
            plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), plgpu.Layout.WGMMA)
            for width in widths
        ]
        found = multiply_add(zeros, steps, plan.interpret)
        plgpu.barrier_arrive(s.ds_freed.at[slot])
        plgpu.barrier_arrive(s.query_read, predicate=2 * j + 2 == plan.tiles)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        for i, part in enumerate(found):
            out = s.out_tile.at[slot, :, pl.ds(sum(widths[:i]), widths[i])]
            out[...] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        tile = query * plan.tiles + 2 * j + role
        target = rows.at[share, pl.ds(tile * KEYS, KEYS)]
        plgpu.copy_smem_to_gmem(s.out_tile.at[slot], target)

    def work_item(query, _):
        plgpu.barrier_wait(s.query_full)
        lax.fori_loop(0, plan.tiles // 2, functools.partial(pair, query), None)

    plan.for_each_query(first, work_item, None)
    plgpu.wait_smem_to_gmem(0)


def _kernel(first, q, dout, weights, dscores, rows, *, plan: _Plan, **shared):
    role = lax.axis_index("role")
    start = first[0]
    query_full = shared.pop("query_full")

    def run(number, share):
        # It counts the copies: one less where the share has no value columns.
        s = _Shared(**shared, query_full=query_full[1 if plan.value_columns(share) else 0])
        if number == LOADER:
            _load(plan, share, start, q, dout, weights, dscores, s)
        else:
            _multiply(plan, number, share, start, rows, s)

    for number in (EVEN, ODD, LOADER):

        @pl.when(role == number)
        def _(number=number):
            action = "decrease" if number == LOADER else "increase"
            plgpu.set_max_registers(_REGISTERS[number], action=action)
            for share in range(plan.shares):

                @pl.when(lax.axis_index("share") == share)
                def _(share=share):
                    run(number, share)


def rows_of_queries(first, q, dout, weights, dscores, added, *, window, sms, interpret=None):
    """Writes what a window of queries adds to dKV.

    Args:
        first: i32 `[1]`, the first query of the window.
        q: bf16 `[all queries, N, C + R]`, N 64 or 128.
        dout: bf16 `[all queries, N, C]`.
        weights: P, bf16 `[window, K / 64, N, 64]`, K a multiple of 128.
        dscores: dS, as P.
        added: a `jax.Ref`, bf16 `[shares, window x K, columns]`, shares of the C + R columns; what
            lies past the last query stays.
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
        window=window,
        total=total,
        lanes=max(1, min(sms // (width // part), window)),
        interpret=interpret is not None,
    )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def sparse_attention_rows(*refs, **scratch):  # its name is the kernel's
        _kernel(*refs, plan=plan, **scratch)

    plgpu.kernel(
        sparse_attention_rows,
        scratch_types={
            "query": tile(heads, part),
            "dout_tile": tile(heads, part),
            "p_tile": tile(SLOTS, heads, KEYS),
            "ds_tile": tile(SLOTS, heads, KEYS),
            "out_tile": tile(SLOTS, KEYS, part),
            "query_full": [plgpu.Barrier(num_arrivals=n) for n in (1, 2)],
            "query_read": plgpu.Barrier(num_arrivals=2),
            **{
                f"{name}_{state}": plgpu.Barrier(num_barriers=SLOTS)
                for name in ("p", "ds")
                for state in ("full", "freed")
            },
        },
        grid=(plan.shares, plan.lanes),
        grid_names=("share", "lane"),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(first, q, dout, weights, dscores, added)
