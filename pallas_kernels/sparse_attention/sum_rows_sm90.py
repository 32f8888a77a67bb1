# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Third part of sparse attention's backward on Hopper: the rows of each key added up, in fp32.

    dKV[s] = sum of rows[p] over the pairs p of a query and a selected key that is s

in an order that is always the same: nothing is added atomically. Keys are taken 64 at a time, a
block. `backward_lists` lists for each block the pairs that belong to it, queries ascending. A CTA
takes one block, or a part of its list, after the other:

    LOADER       gathers 64 of the listed rows into a slot of the ring
    LEFT, RIGHT  dKV[block] += A rows, each for half of the columns, on the tensor core

where A [key, pair] is 1 if the pair's key is that one, else 0: products with 1 are exact, and the
sum is one in fp32. The work is 64 times what an addition each would take and still far below what
the loading of the rows takes.

The ring is that of `weights_sm90`, of parts of up to 192 columns, beside whose CTAs
`weights_and_sums_sm90` runs these. Registers of a thread: LEFT 160 of sums and 16 of A.
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
from pallas_kernels.hopper.tiles import CHUNK
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.sparse_attention.backward_lists import BLOCK, PAIRS
from pallas_kernels.sparse_attention.backward_shares import (
    RING,
    drain,
    next_slot,
    share_columns,
    strided_loop,
)

TILES = 2  # in the ring, at most
INDEX_SLOTS = TILES + 1
LEFT, RIGHT, LOADER = range(3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static numbers of a call."""

    width: int
    rows: int  # how many there are
    blocks: int
    parts: int  # of a block's list
    cta: Any  # this one's number among those that do this
    ctas: Any
    interpret: bool
    tiles: int = TILES  # in the ring, at most

    @property
    def index_slots(self) -> int:
        """Places for the pairs of a tile: one more than tiles that may be on their way."""
        return self.tiles + 1

    @property
    def part(self) -> int:
        """Columns of a part of a tile."""
        return share_columns(self.width)

    @property
    def slots(self) -> int:
        """Of the ring: no more than what `index_slots` are enough for; a tile, at least."""
        return min(RING, self.tiles * (self.width // self.part))

    def columns(self, side: int) -> list[list[tuple[int, int]]]:
        """Start and width in each part of a tile of what a side adds up."""
        middle = (self.width // CHUNK + 1) // 2 * CHUNK
        first, last = (0, middle) if side == LEFT else (middle, self.width)
        found = []
        for start in range(0, self.width, self.part):
            low, high = max(first, start), min(last, start + self.part)
            found.append([(low - start, high - low)] if low < high else [])
        return found


@dataclasses.dataclass(frozen=True)
class Shared:
    """SMEM and barriers."""

    ring: Any  # bf16 [slots or more, 64, part]
    picked: Any  # i32 [2 index slots or more, 64]: pairs, and which keys of the block they are of
    listed: Any  # both are there
    freed: Any  # LEFT and RIGHT have added what the slot holds
    started: Any
    landing: Landing


def _for_each_unit(plan: Plan, first_tile, tile_count, body, carry):
    """`carry = body(unit, first tile, end, carry)` over this CTA's parts of blocks."""

    def unit(number, carry):
        block = lax.div(number, jnp.int32(plan.parts))
        part = lax.rem(number, jnp.int32(plan.parts))
        start, tiles = first_tile[block], tile_count[block]
        first = lax.div(tiles * part, jnp.int32(plan.parts))
        end = lax.div(tiles * (part + 1), jnp.int32(plan.parts))
        return body(number, start + first, start + end, carry)

    units = jnp.int32(plan.blocks * plan.parts)
    return strided_loop(units, unit, carry, mine=plan.cta, ctas=plan.ctas)


def load(plan: Plan, first_tile, tile_count, rows, pairs, keys, s: Shared):
    """LOADER."""

    def fetch(tile, index_slot):
        some = pl.ds(tile * PAIRS, PAIRS)
        for source, row in ((pairs, index_slot), (keys, plan.index_slots + index_slot)):
            plgpu.copy_gmem_to_smem(source.at[some], s.picked.at[row], s.listed.at[index_slot])

    def unit(_, first, end, carry):
        @pl.when(first < end)
        def _():
            fetch(first, carry[2])

        def tile(t, carry):
            slot, filled, index_slot = carry
            for number in range(plan.width // plan.part):

                @pl.when(filled >= plan.slots)
                def _(slot=slot):
                    plgpu.barrier_wait(s.freed.at[slot])

                if number == 0:  # whoever freed that has no use for the keys of its tile either

                    @pl.when(t + 1 < end)
                    def _():
                        fetch(t + 1, next_slot(index_slot, plan.index_slots))

                    plgpu.barrier_wait(s.listed.at[index_slot])
                gather_rows(
                    rows,
                    s.picked.at[index_slot],
                    s.ring.at[slot],
                    s.landing,
                    slot,
                    first_row=jnp.int32(0) * slot,
                    rows=plan.rows,
                    first_column=number * plan.part,
                    columns=(0, plan.part),
                    arrive=True,
                )
                slot, filled = next_slot(slot, plan.slots), filled + 1
            return slot, filled, next_slot(index_slot, plan.index_slots)

        return lax.fori_loop(first, end, tile, carry)

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = _for_each_unit(plan, first_tile, tile_count, unit, (zero, zero, zero))
    drain(s.freed, slot, filled, plan.slots)


def add(plan: Plan, side, first_tile, tile_count, fresh, sums, s: Shared):
    """LEFT or RIGHT."""
    columns = plan.columns(side)

    def tile(_, carry):
        accumulators, slot, phases, index_slot = carry
        plgpu.barrier_wait(s.listed.at[index_slot])
        key = plgpu.load(
            s.picked.at[plan.index_slots + index_slot], layout=plgpu.Layout.WGMMA.reduce(0)
        )
        key = lax.broadcast_in_dim(key, (BLOCK, PAIRS), (1,))
        row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, PAIRS), 0, layout=plgpu.Layout.WGMMA)
        is_key = jnp.where(key == row, 1.0, 0.0).astype(jnp.bfloat16)
        steps, slots = [], []
        for some in columns:
            steps.append(functools.partial(s.landing.wait, slot, phases))
            for start, width in some:
                right = s.ring.at[slot, :, pl.ds(start, width)]
                steps.append(Product(sum(map(len, columns[: len(slots)])), is_key, right))
            slots.append(slot)
            phases = Landing.next(slot, phases)
            slot = next_slot(slot, plan.slots)
        accumulators = multiply_add(accumulators, steps, plan.interpret)
        warpgroup_barrier(plan.interpret)
        for one in slots:
            plgpu.barrier_arrive(s.freed.at[one])
        return accumulators, slot, phases, next_slot(index_slot, plan.index_slots)

    def unit(number, first, end, carry):
        block = lax.div(number, jnp.int32(plan.parts))
        part = lax.rem(number, jnp.int32(plan.parts))
        places = [
            (part, pl.ds(block * BLOCK, BLOCK), pl.ds(i * plan.part + start, width))
            for i, some in enumerate(columns)
            for start, width in some
        ]
        before = [
            plgpu.load(sums.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
            for place in places
        ]
        accumulators = [
            jnp.where(lax.broadcast_in_dim(fresh, total.shape, ()), 0.0, total) for total in before
        ]
        accumulators, *carry = lax.fori_loop(first, end, tile, (accumulators, *carry))
        for place, total in zip(places, accumulators, strict=True):
            sums.at[place][...] = total
        return carry

    if side == LEFT:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    _for_each_unit(plan, first_tile, tile_count, unit, [zero, zero, zero])
