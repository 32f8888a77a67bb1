# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Part of sparse attention's backward on Hopper: the gradient of the queries.

    dQ[n] = sum_k dS[n, k] kv[k]                        over the selected keys k of a query

A CTA computes one share of the columns (192 of 576) for queries one after the other, for all heads:
so what it gathers of a key is needed once. Four warpgroups:

    UPPER, LOWER  dQ of 64 heads each
    LOADER        fills a ring with tiles of 64 keys and their dS
    ADDER         adds up rows of this window that are there already (`hopper.add_rows`)

SMEM at 576 columns and 128 heads: 4 x (16,384 dS + 24,576 keys) of ring, 2 x 24,576 of dQ on its
way out, 2,048 of indices. Registers of a thread: UPPER and LOWER 168 (96 of dQ), LOADER 40, ADDER
128.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import roles
from pallas_kernels.hopper.add_rows import Adder
from pallas_kernels.hopper.gather import Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.sparse_attention.backward_shares import (
    SharePlan,
    drain,
    next_slot,
    share_columns,
    swept,
)

HEADS = 64  # of a warpgroup
KEYS = 64  # of a tile
SLOTS = 4  # of the ring
INDEX_SLOTS = 6
UPPER, LOWER = range(2)
_REGISTERS = 168, 168, 40, 128  # of UPPER, LOWER, LOADER, ADDER
_DEPTH = 24  # rows that a warp of ADDER has on their way


@dataclasses.dataclass(frozen=True)
class _Plan(SharePlan):
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    heads: int  # 64 or 128


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    ds_tile: Any  # bf16 [SLOTS, N, 64]
    keys: Any  # bf16 [SLOTS, 64, part]
    out_tile: Any  # bf16 [N, part]: dQ on its way out
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    picked_full: Any
    full: Any  # dS of the slot is there
    freed: Any  # and no longer needed, nor the keys
    started: Any
    landing: Landing


def _load(plan: _Plan, share, first, kv, indices, dscores, s: _Shared):
    """LOADER."""

    def at(query, tile):
        return swept(first + query, tile, plan.tiles, plan.lanes)

    def fetch_indices(query, tile, index_slot):
        source = indices.at[first + query, pl.ds(at(query, tile) * KEYS, KEYS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[index_slot], s.picked_full.at[index_slot])

    def tile(query, j, carry):
        slot, filled, index_slot = carry
        following = next_slot(index_slot, INDEX_SLOTS)

        @pl.when(j + 1 < plan.tiles)
        def _():
            fetch_indices(query, j + 1, following)

        @pl.when(filled >= SLOTS)
        def _():
            plgpu.barrier_wait(s.freed.at[slot])

        source = dscores.at[query, at(query, j)]
        plgpu.copy_gmem_to_smem(source, s.ds_tile.at[slot], s.full.at[slot])
        plgpu.barrier_wait(s.picked_full.at[index_slot])
        gather_rows(
            kv,
            s.picked.at[index_slot],
            s.keys.at[slot],
            s.landing,
            slot,
            first_row=lax.div(first + query, jnp.int32(plan.queries)) * plan.rows,
            rows=plan.rows,
            first_column=share * plan.part,
            columns=(0, plan.part),
            arrive=True,
        )
        return next_slot(slot, SLOTS), filled + 1, following

    def work_item(query, carry):
        fetch_indices(query, 0, carry[2])
        return lax.fori_loop(0, plan.tiles, functools.partial(tile, query), carry)

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = plan.for_each_query(first, work_item, (zero, zero, zero))
    drain(s.freed, slot, filled, SLOTS)


def _multiply(plan: _Plan, role, share, first, dq, s: _Shared):
    """UPPER and LOWER; without heads of its own LOWER only lets go of the slots."""
    columns = pl.ds(share * plan.part, plan.part)
    mine = pl.ds(role * HEADS, HEADS)
    has_heads = role * HEADS < plan.heads

    def tile(_, carry):
        accumulators, slot, phases = carry
        plgpu.barrier_wait(s.full.at[slot])
        steps = [functools.partial(s.landing.wait, slot, phases)]
        if has_heads:
            steps.append(Product(0, s.ds_tile.at[slot, mine], s.keys.at[slot]))
        accumulators = multiply_add(accumulators, steps, plan.interpret)
        warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.freed.at[slot])
        return accumulators, next_slot(slot, SLOTS), Landing.next(slot, phases)

    def work_item(query, carry):
        zeros = plgpu.layout_cast(jnp.zeros((HEADS, plan.part), jnp.float32), plgpu.Layout.WGMMA)
        carry = [zeros] if has_heads else [], *carry
        accumulators, *carry = lax.fori_loop(0, plan.tiles, tile, carry)
        if has_heads:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            warpgroup_barrier(plan.interpret)
            s.out_tile.at[mine][...] = accumulators[0].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.out_tile.at[mine], dq.at[first + query, mine, columns])
        return carry

    if role == UPPER:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    plan.for_each_query(first, work_item, [jnp.int32(0), jnp.int32(0)])
    plgpu.wait_smem_to_gmem(0)


def _for_this_share(plan: _Plan, run) -> None:
    """`run(share)`, compiled for every share; a CTA has one."""
    for share in range(plan.shares):

        @pl.when(lax.axis_index("share") == share)
        def _(share=share):
            run(share)


def _roles(plan: _Plan, adder: Adder, first, kv, indices, dscores, *refs, **shared):
    """What the warpgroups do."""
    *listed, dq = refs
    s, start = _Shared(**shared), first[0]

    def multiply(role):
        _for_this_share(plan, lambda share: _multiply(plan, role, share, start, dq, s))

    def load():
        _for_this_share(plan, lambda share: _load(plan, share, start, kv, indices, dscores, s))

    def add():
        adder.add(lax.axis_index("share") * plan.lanes + lax.axis_index("lane"), *listed)

    return lambda: multiply(UPPER), lambda: multiply(LOWER), load, add


def _lanes(width: int, sms: int) -> int:
    """CTAs of a share."""
    return max(1, sms // (width // share_columns(width)))


def adder_of(rows: int, width: int, sms: int, interpret=None) -> Adder:
    """What adds so many rows up beside dQ."""
    share = share_columns(width)
    return Adder(
        rows=rows,
        width=width,
        share=share,
        ctas=width // share * _lanes(width, sms),
        depth=_DEPTH,
        interpret=interpret is not None,
    )


def dq_of_queries(
    first, kv, indices, dscores, added, pairs, keys, bounds, sums, dq, *,
    window, queries, rows, sms, interpret=None,
):  # fmt: skip
    """Writes dQ of a window of queries, and adds up some of its rows.

    Args:
        first: i32 `[1]`, the first query of the window.
        kv: bf16 `[batch x S, C + R]`.
        indices: i32 `[all queries, K]`, K a multiple of 64.
        dscores: dS, bf16 `[window, K / 64, N, 64]`.
        added: a `jax.Ref`, bf16 `[shares, window x K, columns]`, the rows.
        pairs: i32 `[window x K]`, rows by key.
        keys: i32 `[window x K]`, their keys.
        bounds: i32, the ranges of `adder_of`.
        sums: a `jax.Ref`, f32 `[batch x S, C + R]`, to which listed rows are added.
        dq: a `jax.Ref`, bf16 `[all queries, N, C + R]`, N 64 or 128, of which it writes the window.
        window: queries of the window.
        queries: T of a batch row.
        rows: S of a batch row.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = dq.shape
    part = share_columns(width)
    plan = _Plan(
        queries=queries,
        rows=rows,
        heads=heads,
        width=width,
        tiles=indices.shape[-1] // KEYS,
        window=window,
        total=total,
        lanes=_lanes(width, sms),
        interpret=interpret is not None,
    )

    adder = adder_of(added.shape[1], width, sms, interpret)

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    roles.kernel(
        "sparse_attention_dq",
        functools.partial(_roles, plan, adder),
        _REGISTERS,
        scratch_types={
            "ds_tile": tile(SLOTS, heads, KEYS),
            "keys": tile(SLOTS, KEYS, part),
            "out_tile": tile(heads, part),
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, KEYS), jnp.int32),
            "picked_full": plgpu.Barrier(num_barriers=INDEX_SLOTS),
            "full": plgpu.Barrier(num_barriers=SLOTS),
            "freed": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "started": plgpu.Barrier(),
        },
        landing_slots=SLOTS,
        grid={"share": plan.shares, "lane": plan.lanes},
        interpret=interpret,
    )(first, kv, indices, dscores, added, pairs, keys, bounds, sums, dq)
