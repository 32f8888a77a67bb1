# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Part of sparse attention's backward on Hopper: the gradient of the queries.

    dQ[n] = sum_k dS[n, k] kv[k]                        over the selected keys k of a query

A CTA computes one share of the columns (192 of 576) for queries one after the other, for all heads:
so what it gathers of a key is needed once. Three warpgroups:

    UPPER, LOWER  dQ of 64 heads each
    LOADER        fills a ring of four slots with tiles of 64 keys and their dS

`products_sm90` runs these CTAs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.sparse_attention.backward_shares import (
    Places,
    SharePlan,
    drain,
    next_slot,
)

HEADS = 64  # of a warpgroup
KEYS = 64  # of a tile
SLOTS = 4  # of the ring
INDEX_SLOTS = 6
UPPER, LOWER, LOADER = range(3)


@dataclasses.dataclass(frozen=True)
class Plan(SharePlan):
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row


@dataclasses.dataclass(frozen=True)
class Shared:
    """SMEM and barriers."""

    places: Places
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    picked_full: Any
    full: Any  # dS of the slot is there
    freed: Any  # and no longer needed, nor the keys
    started: Any
    landing: Landing


def load(plan: Plan, share, first, kv, indices, dscores, s: Shared):
    """LOADER."""

    def fetch_indices(query, tile, index_slot):
        source = indices.at[first + query, pl.ds(tile * KEYS, KEYS)]
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

        plgpu.copy_gmem_to_smem(dscores.at[query, j], s.places.by_head.at[slot], s.full.at[slot])
        plgpu.barrier_wait(s.picked_full.at[index_slot])
        gather_rows(
            kv,
            s.picked.at[index_slot],
            s.places.columns.at[slot],
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


def multiply(plan: Plan, role, share, first, dq, s: Shared):
    """UPPER and LOWER; without heads of its own LOWER only lets go of the slots."""
    columns = pl.ds(share * plan.part, plan.part)
    mine = pl.ds(role * HEADS, HEADS)
    has_heads = role * HEADS < plan.heads

    def tile(_, carry):
        accumulators, slot, phases = carry
        plgpu.barrier_wait(s.full.at[slot])
        steps = [functools.partial(s.landing.wait, slot, phases)]
        if has_heads:
            steps.append(Product(0, s.places.by_head.at[slot, mine], s.places.columns.at[slot]))
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
            s.places.out_tile.at[role][...] = accumulators[0].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.places.out_tile.at[role], dq.at[first + query, mine, columns])
        return carry

    if role == UPPER:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    plan.for_each_query(first, work_item, [jnp.int32(0), jnp.int32(0)])
    plgpu.wait_smem_to_gmem(0)
