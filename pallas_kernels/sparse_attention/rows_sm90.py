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

A tile's P and dS are replaced as soon as its products are done; its rows leave from a place of
their own while the next tile's products run. `products_sm90` runs these CTAs.
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
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.sparse_attention.backward_shares import (
    Places,
    SharePlan,
    value_columns,
    value_start,
)

KEYS = 64  # of a tile
SLOTS = 2  # one for EVEN, one for ODD
EVEN, ODD, LOADER = range(3)
HEADS = 64  # of a piece of Q and dO


@dataclasses.dataclass(frozen=True)
class Plan(SharePlan):
    """The static numbers of a call; an even number of tiles."""

    values: int  # C

    @property
    def pieces(self) -> int:
        """Of Q and dO."""
        return self.heads // HEADS

    def value_columns(self, share: int) -> int:
        """How many columns of a share are value as well."""
        return value_columns(share, self.part, self.values)

    def value_start(self, share: int) -> int:
        """Where the copy of a share of dO starts."""
        return value_start(share, self.part, self.values)


@dataclasses.dataclass(frozen=True)
class Shared:
    """SMEM and barriers. P, dS, Q and dO each have half of the places that are for such."""

    places: Places
    query_full: Any
    query_read: Any  # EVEN and ODD need Q and dO no longer
    full: Any  # P and dS of the slot are there
    freed: Any  # and no longer needed

    def p_tile(self, slot):
        """bf16 `[N, 64]`."""
        return self.places.by_head.at[slot]

    def ds_tile(self, slot):
        """bf16 `[N, 64]`."""
        return self.places.by_head.at[SLOTS + slot]

    def query(self, piece):
        """bf16 `[64, part]`, of 64 heads."""
        return self.places.columns.at[piece]

    def dout(self, piece):
        """As `query`."""
        return self.places.columns.at[2 + piece]


def load(plan: Plan, share, first, q, dout, weights, dscores, s: Shared):
    """LOADER."""
    columns = pl.ds(share * plan.part, plan.part)

    def load_query(query, filled):
        @pl.when(filled >= plan.tiles)
        def _():
            plgpu.barrier_wait(s.query_read)

        some = pl.ds(plan.value_start(share), plan.part)
        for piece in range(plan.pieces):
            heads = pl.ds(piece * HEADS, HEADS)
            source = q.at[first + query, heads, columns]
            plgpu.copy_gmem_to_smem(source, s.query(piece), s.query_full)
            if plan.value_columns(share):
                source = dout.at[first + query, heads, some]
                plgpu.copy_gmem_to_smem(source, s.dout(piece), s.query_full)

    def tile(query, j, filled):
        slot = lax.rem(j, jnp.int32(SLOTS))

        @pl.when(filled >= SLOTS)
        def _():
            plgpu.barrier_wait(s.freed.at[slot])

        if plan.value_columns(share):
            plgpu.copy_gmem_to_smem(weights.at[query, j], s.p_tile(slot), s.full.at[slot])
        plgpu.copy_gmem_to_smem(dscores.at[query, j], s.ds_tile(slot), s.full.at[slot])

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
            plgpu.barrier_wait(s.freed.at[slot])


def multiply(plan: Plan, role, share, first, rows, s: Shared):
    """EVEN and ODD."""
    values = plan.value_columns(share)
    shift = share * plan.part - plan.value_start(share) if values else 0
    columns = pl.ds(share * plan.part, plan.part)
    # Apart where a share ends with columns that are no value.
    widths = [w for w in (values, plan.part - values) if w]

    def pair(query, j, _):
        slot = lax.rem(2 * j + role, jnp.int32(SLOTS))  # `role`, but traced
        plgpu.barrier_wait(s.full.at[slot])
        steps = []
        for number in range(plan.pieces):
            heads = pl.ds(number * HEADS, HEADS)
            piece = number + 0 * slot  # traced, which indices of what is multiplied must be
            if values:
                right = s.dout(piece).at[:, pl.ds(shift, values)]
                steps.append(Product(0, s.p_tile(slot).at[heads].T, right))
            for i, width in enumerate(widths):
                right = s.query(piece).at[:, pl.ds(sum(widths[:i]), width)]
                steps.append(Product(i, s.ds_tile(slot).at[heads].T, right))
        zeros = [
            plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), plgpu.Layout.WGMMA)
            for width in widths
        ]
        found = multiply_add(zeros, steps, plan.interpret)
        warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.freed.at[slot])
        plgpu.barrier_arrive(s.query_read, predicate=2 * j + 2 == plan.tiles)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        for i, part in enumerate(found):
            out = s.places.out_tile.at[role, :, pl.ds(sum(widths[:i]), widths[i])]
            out[...] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = rows.at[query, pl.ds((2 * j + role) * KEYS, KEYS), columns]
        plgpu.copy_smem_to_gmem(s.places.out_tile.at[role], target)

    def work_item(query, _):
        plgpu.barrier_wait(s.query_full)
        lax.fori_loop(0, plan.tiles // 2, functools.partial(pair, query), None)

    plan.for_each_query(first, work_item, None)
    plgpu.wait_smem_to_gmem(0)
