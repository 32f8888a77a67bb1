# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The rows of `sparse_gradient_sm90` added up by key on Hopper, in fp32: dik.

    dik[s] = sum of rows[p] over the pairs p of a query and a selected key that is s

in an order that is always the same: nothing is added atomically. Keys are taken 64 at a time, a
block. `sparse_lists_sm90` lists for each block the pairs that belong to it, queries ascending. A
CTA takes one block, or a part of its list, after the other:

    LOADER       gathers 64 of the listed rows into a slot of the ring
    LEFT, RIGHT  dik[block] += A rows, each for half of the columns, on the tensor core

where A [key, pair] is 1 if the pair's key is that one, else 0: products with 1 are exact, and the
sum is one in fp32. The work is 64 times what an addition each would take; the time is the memory's.

SMEM at H = 128: 3 x 16,384 of ring, 1,280 of the list.
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
from pallas_kernels.hopper.gather import Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.indexer_loss.sparse_lists_sm90 import BLOCK, KEY_BITS, PAIRS
from pallas_kernels.sparse_attention.backward_shares import drain, next_slot, strided_loop

SLOTS = 3
INDEX_SLOTS = SLOTS + 1  # places for a tile's part of the list: one more than tiles on their way
LEFT, RIGHT = 0, 1
_REGISTERS = 216, 216, 40  # of LEFT, RIGHT, LOADER


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    width: int
    rows: int  # how many there are
    blocks: int
    parts: int  # of a block's list
    cta: Any  # this one's number among those that do this
    ctas: Any
    interpret: bool


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    ring: Any  # bf16 [SLOTS, 64, H]
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    listed: Any  # a tile's part of the list is there
    freed: Any  # LEFT and RIGHT have added what the slot holds
    started: Any
    landing: Landing


def _for_each_unit(plan: _Plan, first_tile, tile_count, body, carry):
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


def _load(plan: _Plan, first_tile, tile_count, rows, entries, s: _Shared):
    """LOADER."""

    def fetch(tile, index_slot):
        source = entries.at[pl.ds(tile * PAIRS, PAIRS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[index_slot], s.listed.at[index_slot])

    def unit(_, first, end, carry):
        @pl.when(first < end)
        def _():
            fetch(first, carry[2])

        def tile(t, carry):
            slot, filled, index_slot = carry

            @pl.when(filled >= SLOTS)
            def _():
                plgpu.barrier_wait(s.freed.at[slot])

            # Whoever freed that has no use for what was listed of its tile either.
            following = next_slot(index_slot, INDEX_SLOTS)

            @pl.when(t + 1 < end)
            def _():
                fetch(t + 1, following)

            plgpu.barrier_wait(s.listed.at[index_slot])
            gather_rows(
                rows,
                s.picked.at[index_slot],
                s.ring.at[slot],
                s.landing,
                slot,
                first_row=jnp.int32(0) * slot,
                rows=plan.rows,
                first_column=0,
                columns=(0, plan.width),
                arrive=True,
                shift=KEY_BITS,
            )
            return next_slot(slot, SLOTS), filled + 1, following

        return lax.fori_loop(first, end, tile, carry)

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = _for_each_unit(plan, first_tile, tile_count, unit, (zero, zero, zero))
    drain(s.freed, slot, filled, SLOTS)


def _add(plan: _Plan, side: int, first_tile, tile_count, fresh, sums, s: _Shared):
    """LEFT or RIGHT."""
    width = plan.width // 2
    start = side * width

    def tile(_, carry):
        total, slot, phases, index_slot = carry
        plgpu.barrier_wait(s.listed.at[index_slot])
        entry = plgpu.load(s.picked.at[index_slot], layout=plgpu.Layout.WGMMA.reduce(0))
        key = lax.bitwise_and(entry, jnp.int32(BLOCK - 1))
        key = lax.broadcast_in_dim(key, (BLOCK, PAIRS), (1,))
        row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, PAIRS), 0, layout=plgpu.Layout.WGMMA)
        is_key = jnp.where(key == row, 1.0, 0.0).astype(jnp.bfloat16)
        wait = functools.partial(s.landing.wait, slot, phases)
        product = Product(0, is_key, s.ring.at[slot, :, pl.ds(start, width)])
        [total] = multiply_add([total], [wait, product], plan.interpret)
        warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.freed.at[slot])
        phases = Landing.next(slot, phases)
        return total, next_slot(slot, SLOTS), phases, next_slot(index_slot, INDEX_SLOTS)

    def unit(number, first, end, carry):
        block = lax.div(number, jnp.int32(plan.parts))
        part = lax.rem(number, jnp.int32(plan.parts))
        place = part, pl.ds(block * BLOCK, BLOCK), pl.ds(start, width)
        before = plgpu.load(sums.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
        total = jnp.where(lax.broadcast_in_dim(fresh, before.shape, ()), 0.0, before)
        total, *carry = lax.fori_loop(first, end, tile, (total, *carry))
        sums.at[place][...] = total
        return carry

    if side == LEFT:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    _for_each_unit(plan, first_tile, tile_count, unit, [zero, zero, zero])


def sum_rows(first, rows, first_tile, tile_count, listed, sums, *, sms, interpret=None):
    """Adds the rows that belong to each key to its sum, or starts the sum with them.

    Args:
        first: i32 `[1]`, 0 where sums start, whatever `sums` holds.
        rows: bf16 `[pairs, H]`, H a multiple of 128.
        first_tile, tile_count, listed: from `sparse_lists_sm90.pairs_by_block`.
        sums: a `jax.Ref`, f32 `[parts, 64 blocks, H]`. A list is cut into parts, each with a sum of
            its own, so that few blocks keep all CTAs busy.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    count, width = rows.shape
    parts, blocks = sums.shape[0], sums.shape[1] // BLOCK
    ctas = min(sms, blocks * parts)

    def assign(first, first_tile, tile_count, rows, entries, sums, **shared):
        s, fresh = _Shared(**shared), first[0] == 0
        plan = _Plan(
            width=width,
            rows=count,
            blocks=blocks,
            parts=parts,
            cta=lax.axis_index("cta"),
            ctas=ctas,
            interpret=interpret is not None,
        )
        add = functools.partial(_add, plan)
        return (
            lambda: add(LEFT, first_tile, tile_count, fresh, sums, s),
            lambda: add(RIGHT, first_tile, tile_count, fresh, sums, s),
            lambda: _load(plan, first_tile, tile_count, rows, entries, s),
        )

    roles.kernel(
        "indexer_loss_sum_rows",
        assign,
        _REGISTERS,
        scratch_types={
            "ring": plgpu.SMEM((SLOTS, PAIRS, width), rows.dtype, transforms=SWIZZLED),
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, PAIRS), jnp.int32),
            "listed": plgpu.Barrier(num_barriers=INDEX_SLOTS),
            "freed": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "started": plgpu.Barrier(),
        },
        landing_slots=SLOTS,
        grid={"cta": ctas},
        interpret=interpret,
    )(first, first_tile, tile_count, rows, listed, sums)
