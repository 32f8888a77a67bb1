"""Rows of a table in GMEM, by index, into swizzled tiles in SMEM: the load of sparse attention.

Hopper's TMA cannot gather rows, and Mosaic GPU has no other asynchronous load there, so a
warpgroup issues `cp.async` itself: eight lanes copy 128 bytes of a row, 16 bytes each, to where the
128-byte swizzle puts them. A copy arrives on an mbarrier when it lands (`noinc`: each lane of the
warpgroup counts once), so the gatherer never waits for its own loads. Mosaic's barriers cannot be
handed to inline code; `Landing` is therefore an mbarrier array in plain SMEM words.

Every function has a twin in plain Pallas for interpret mode: the same barrier protocol, with a row
copied by loads and stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

LANES = 128
# How a bf16 tile lies in SMEM: 8 rows of 64 columns (1 KB) at a time, 16-byte pieces permuted.
TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
TILE_COLUMNS = 64
_TILE_BYTES = 8 * TILE_COLUMNS * 2


@dataclasses.dataclass(frozen=True)
class Landing:
    """One mbarrier per slot of a ring, on which the copies of `gather_rows` arrive.

    Attributes:
        ref: two 32-bit SMEM words a slot; in interpret mode a `plgpu.Barrier` per slot instead.
        slots: how many.
        gatherers: warpgroups whose copies make one completion.
        interpret: whether this is the twin.
    """

    ref: Any
    slots: int
    gatherers: int
    interpret: bool

    def initialize(self) -> None:
        """To be called by one warpgroup, whose later arrival on a common barrier publishes it."""
        if self.interpret:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def emit(_, words):
            first = utils.single_thread_predicate(scope=utils.ThreadSubset.WARPGROUP)
            for slot in range(self.slots):
                address = _shared_address(words, 8 * slot)
                utils.inline_ptx(
                    f"mbarrier.init.shared::cta.b64 [$0], {LANES * self.gatherers};",
                    address,
                    predicate=first,
                    has_side_effects=True,
                )

        emit(self.ref)

    def wait(self, slot: jax.Array, phases: jax.Array) -> jax.Array:
        """Waits for the next completion of a slot and makes what landed visible to wgmma.

        Args:
            slot: which.
            phases: the caller's count of completions, one bit a slot, modulo 2; starts as 0.

        Returns:
            The next `phases`.
        """
        if self.interpret:
            plgpu.barrier_wait(self.ref.at[slot])
            return phases

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def emit(_, words, slot, parity):
            i32 = ir.IntegerType.get_signless(32)
            offset = arith.muli(slot.registers.item(), arith.constant(i32, 8))
            pointer = utils.getelementptr(
                utils.memref_ptr(words), [offset], ir.IntegerType.get_signless(8)
            )
            ticks = arith.constant(i32, 10_000_000)
            nvvm.mbarrier_try_wait_parity(pointer, parity.registers.item(), ticks)
            # The copies wrote through the generic proxy, wgmma reads through the async one.
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        bit = lax.shift_left(jnp.int32(1), slot)
        emit(self.ref, slot, (lax.bitwise_and(phases, bit) != 0).astype(jnp.int32))
        return lax.bitwise_xor(phases, bit)


def gather_rows(
    table: Any,
    indices: Any,
    tiles: Sequence[Any],
    landing: Landing,
    slot: jax.Array,
    *,
    first_row: jax.Array,
    rows: int,
    first_column: int = 0,
    skip=False,
) -> None:
    """Starts `tiles[..][r, :] = table[first_row + indices[r], columns]` for all r of the tiles.

    Columns from `first_column` on go to the tiles in order. An index outside `0 .. rows - 1` gives zeros. One warpgroup
    calls this; the copies arrive on `landing` slot `slot`.

    Args:
        table: GMEM `[.., D]`, bf16, rows contiguous.
        indices: SMEM i32 `[r]`, r a multiple of 16.
        tiles: SMEM bf16 `[r, columns]` each, laid out as `TILE`; columns add up to at most D.
        landing: where the copies arrive.
        slot: which barrier of it.
        first_row: added to every index.
        rows: how many rows an index may name.
        first_column: a multiple of 64.
    """
    if landing.interpret:
        _gather_rows_twin(table, indices, tiles, first_row, rows, first_column)
        plgpu.barrier_arrive(landing.ref.at[slot])
        return
    keys = indices.shape[0]
    row_bytes = 2 * table.shape[-1]
    columns = [tile.shape[-1] for tile in tiles]
    tile_type = plgpu.RefType(TILE)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(),
            [tile_type] * len(tiles),
            plgpu.RefType(),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
        )
    )
    def emit(_, table, indices, tiles, words, slot, first_row):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))

        def word(value):
            return arith.constant(i32, value)

        lane = arith.remui(utils.thread_idx(), word(LANES))
        row = arith.divui(lane, word(8))
        in_tile = arith.remui(row, word(8))
        piece = arith.remui(lane, word(8))
        swizzled = arith.addi(
            arith.muli(in_tile, word(128)), arith.muli(arith.xori(piece, in_tile), word(16))
        )
        source = llvm.ptrtoint(
            i64,
            llvm.addrspacecast(
                llvm.PointerType.get(address_space=1), utils.memref_ptr(table)
            ),
        )
        start = arith.addi(arith.muli(piece, word(16)), word(2 * first_column))
        source = arith.addi(source, arith.extui(i64, start))
        targets = []
        for tile, width in zip(tiles, columns, strict=True):
            stride = width // TILE_COLUMNS * _TILE_BYTES
            offset = arith.addi(arith.muli(arith.divui(row, word(8)), word(stride)), swizzled)
            targets.append(arith.addi(_shared_address(tile), offset))
        base = arith.extsi(i64, first_row.registers.item())
        for step in range(keys // 16):
            at = arith.addi(row, word(16 * step))
            index = memref.load(indices, [arith.index_cast(ir.IndexType.get(), at)])
            inside = arith.cmpi(arith.CmpIPredicate.ult, index, word(rows))
            index = arith.select(inside, index, word(0))
            size = arith.select(inside, word(16), word(0))
            number = arith.addi(base, arith.extsi(i64, index))
            address = arith.addi(
                source, arith.muli(number, arith.constant(i64, row_bytes))
            )
            if not skip:
                _copy_row(address, size, targets, columns, step)
        offset = arith.muli(slot.registers.item(), word(8))
        utils.inline_ptx(
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
            arith.addi(_shared_address(words), offset),
            has_side_effects=True,
        )

    emit(table, indices, list(tiles), landing.ref, slot, first_row)


def _copy_row(address, size, targets, columns, step) -> None:
    """This lane's 16 bytes of every 128 bytes of a row; `size` 0 writes zeros and reads nothing."""
    lines, done = [], 0
    for number, width in enumerate(columns):
        chunks = width // TILE_COLUMNS
        for chunk in range(chunks):
            to = (2 * step * chunks + chunk) * _TILE_BYTES
            lines.append(
                "cp.async.cg.shared.global.L2::128B "
                f"[${2 + number} + {to}], [$0 + {done}], 16, $1;"
            )
            done += 128
    utils.inline_ptx("\n".join(lines), address, size, *targets, has_side_effects=True)


def _gather_rows_twin(table, indices, tiles, first_row, rows, first_column) -> None:
    def copy(r, _):
        index = indices[r]
        inside = (index >= 0) & (index < rows)
        number = first_row + jnp.where(inside, index, 0)
        done = first_column
        for tile in tiles:
            width = tile.shape[-1]
            values = table[number, done : done + width]
            tile[r, :] = jnp.where(inside, values, jnp.zeros_like(values))
            done += width

    lax.fori_loop(0, indices.shape[0], copy, None)


def warpgroup_barrier(interpret: bool) -> None:
    """Waits until all four warps of this warpgroup are here.

    A wgmma that one warp has waited for may still be reading its operands for another.
    """
    if not interpret:
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def _shared_address(ref, offset: int = 0):
    i32 = ir.IntegerType.get_signless(32)
    address = llvm.ptrtoint(i32, utils.memref_ptr(ref))
    return arith.addi(address, arith.constant(i32, offset)) if offset else address
