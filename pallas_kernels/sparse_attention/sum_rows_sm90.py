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

SMEM at 576 columns: 3 x 73,728 of ring, 2,304 of pairs and of their keys. Registers of a thread:
LEFT 216 (160 of sums, 16 of A), RIGHT 216, LOADER 40.
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
from pallas_kernels.hopper.tiles import CHUNK, SWIZZLED
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.sparse_attention.backward_shares import drain, next_slot, strided_loop

BLOCK = 64  # keys
PAIRS = 64  # of a tile
SLOTS = 3
INDEX_SLOTS = 4
LEFT, RIGHT, LOADER = range(3)
_REGISTERS = {LEFT: 216, RIGHT: 216, LOADER: 40}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    width: int
    rows: int  # how many there are
    blocks: int
    parts: int  # of a block's list
    ctas: int
    interpret: bool

    def columns(self, side: int) -> list[tuple[int, int]]:
        """Start and width of the accumulators of a side."""
        chunks = self.width // CHUNK
        middle = (chunks + 1) // 2 * CHUNK
        start, stop = (0, middle) if side == LEFT else (middle, self.width)
        return [(at, min(256, stop - at)) for at in range(start, stop, 256)]


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    ring: Any  # bf16 [SLOTS, 64, C + R]
    pairs: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    keys: Any  # i32 [INDEX_SLOTS, 64]: which key of the block
    listed: Any  # pairs and keys are there
    freed: Any  # LEFT and RIGHT have added the slot's rows
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
    return strided_loop(units, unit, carry, mine=lax.axis_index("cta"), ctas=plan.ctas)


def _load(plan: _Plan, first_tile, tile_count, rows, pairs, keys, s: _Shared):
    """LOADER."""

    def fetch(tile, index_slot):
        some = pl.ds(tile * PAIRS, PAIRS)
        for source, target in ((pairs, s.pairs), (keys, s.keys)):
            plgpu.copy_gmem_to_smem(source.at[some], target.at[index_slot], s.listed.at[index_slot])

    def unit(_, first, end, carry):
        @pl.when(first < end)
        def _():
            fetch(first, carry[2])

        def tile(t, carry):
            slot, filled, index_slot = carry

            @pl.when(filled >= SLOTS)
            def _():
                plgpu.barrier_wait(s.freed.at[slot])

            @pl.when(t + 1 < end)
            def _():
                fetch(t + 1, next_slot(index_slot, INDEX_SLOTS))

            plgpu.barrier_wait(s.listed.at[index_slot])
            gather_rows(
                rows,
                s.pairs.at[index_slot],
                s.ring.at[slot],
                s.landing,
                slot,
                first_row=jnp.int32(0) * slot,
                rows=plan.rows,
                first_column=0,
                columns=(0, plan.width),
                arrive=True,
            )
            return next_slot(slot, SLOTS), filled + 1, next_slot(index_slot, INDEX_SLOTS)

        return lax.fori_loop(first, end, tile, carry)

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    slot, filled, _ = _for_each_unit(plan, first_tile, tile_count, unit, (zero, zero, zero))
    drain(s.freed, slot, filled, SLOTS)


def _sum(plan: _Plan, side, first_tile, tile_count, fresh, sums, s: _Shared):
    """LEFT or RIGHT."""
    columns = plan.columns(side)

    def tile(_, carry):
        accumulators, slot, phases, index_slot = carry
        plgpu.barrier_wait(s.listed.at[index_slot])
        key = plgpu.load(s.keys.at[index_slot], layout=plgpu.Layout.WGMMA.reduce(0))
        key = lax.broadcast_in_dim(key, (BLOCK, PAIRS), (1,))
        row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, PAIRS), 0, layout=plgpu.Layout.WGMMA)
        is_key = jnp.where(key == row, 1.0, 0.0).astype(jnp.bfloat16)
        steps = [functools.partial(s.landing.wait, slot, phases)]
        rows = s.ring.at[slot]
        steps += [
            Product(i, is_key, rows.at[:, pl.ds(start, width)])
            for i, (start, width) in enumerate(columns)
        ]
        accumulators = multiply_add(accumulators, steps, plan.interpret)
        warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.freed.at[slot])
        phases = Landing.next(slot, phases)
        return accumulators, next_slot(slot, SLOTS), phases, next_slot(index_slot, INDEX_SLOTS)

    def unit(number, first, end, carry):
        block = lax.div(number, jnp.int32(plan.parts))
        part = lax.rem(number, jnp.int32(plan.parts))
        places = [(part, pl.ds(block * BLOCK, BLOCK), pl.ds(*column)) for column in columns]
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


def _kernel(first, first_tile, tile_count, rows, pairs, keys, sums, *, plan: _Plan, **shared):
    words = shared.pop("landed", shared["pairs_tile"])
    landing = Landing(words, 4 * INDEX_SLOTS * PAIRS, SLOTS, plan.interpret)
    s = _Shared(
        pairs=shared.pop("pairs_tile"), keys=shared.pop("keys_tile"), **shared, landing=landing
    )
    role = lax.axis_index("role")
    for side in (LEFT, RIGHT):

        @pl.when(role == side)
        def _(side=side):
            plgpu.set_max_registers(_REGISTERS[side], action="increase")
            _sum(plan, side, first_tile, tile_count, first[0] == 0, sums, s)

    @pl.when(role == LOADER)
    def _():
        plgpu.set_max_registers(_REGISTERS[LOADER], action="decrease")
        _load(plan, first_tile, tile_count, rows, pairs, keys, s)


def sum_rows(first, rows, first_tile, tile_count, pairs, keys, sums, *, sms, interpret=None):
    """Adds the rows that belong to each key to its sum, or starts the sum with them.

    Args:
        first: i32 `[1]`, 0 where sums start, whatever `sums` holds.
        rows: bf16 `[pairs, D]`.
        first_tile: i32 `[blocks]`, where a block's list starts, in tiles of 64.
        tile_count: i32 `[blocks]`, how long it is.
        pairs: i32, the lists: a row, or -1.
        keys: i32, which key of the block each of `pairs` belongs to.
        sums: a `jax.Ref`, f32 `[parts, 64 blocks, D]`. A list is cut into parts, each with a sum
            of its own, so that few blocks keep all CTAs busy.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    count, width = rows.shape
    parts, blocks = sums.shape[0], sums.shape[1] // BLOCK
    plan = _Plan(
        width=width,
        rows=count,
        blocks=blocks,
        parts=parts,
        ctas=min(sms, blocks * parts),
        interpret=interpret is not None,
    )
    landed = {"landed": plgpu.Barrier(num_barriers=SLOTS)} if plan.interpret else {}

    def sparse_attention_sum_rows(*refs, **scratch):  # its name is the kernel's
        _kernel(*refs, plan=plan, **scratch)

    plgpu.kernel(
        sparse_attention_sum_rows,
        scratch_types={
            **landed,
            "ring": plgpu.SMEM((SLOTS, PAIRS, width), jnp.bfloat16, transforms=SWIZZLED),
            "pairs_tile": plgpu.SMEM((INDEX_SLOTS + 1, PAIRS), jnp.int32),
            "keys_tile": plgpu.SMEM((INDEX_SLOTS, PAIRS), jnp.int32),
            "listed": plgpu.Barrier(num_arrivals=2, num_barriers=INDEX_SLOTS),
            "freed": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "started": plgpu.Barrier(),
        },
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(first, first_tile, tile_count, rows, pairs, keys, sums)
