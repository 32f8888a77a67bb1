# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

from pallas_kernels.hopper.operands import global_address
from pallas_kernels.hopper.tiles import CHUNK, SWIZZLED

LANES = 128
_TILE_BYTES = 8 * CHUNK * 2


@dataclasses.dataclass(frozen=True)
class Landing:
    """One mbarrier per slot of a ring, on which the copies of `gather_rows` arrive.

    Attributes:
        ref: SMEM words; in interpret mode a `plgpu.Barrier` per slot instead.
        start: where in `ref`, in bytes, 8 bytes a slot begin.
        slots: how many.
        interpret: whether this is the twin.
    """

    ref: Any
    start: int
    slots: int
    interpret: bool

    def initialize(self) -> None:
        """To be called by one warpgroup, whose later arrival on a common barrier publishes it."""
        if self.interpret:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def emit(_, words):
            first = utils.single_thread_predicate(scope=utils.ThreadSubset.WARPGROUP)
            for slot in range(self.slots):
                address = _shared_address(words, self.start + 8 * slot)
                utils.inline_ptx(
                    f"mbarrier.init.shared::cta.b64 [$0], {LANES};",
                    address,
                    predicate=first,
                    has_side_effects=True,
                )

        emit(self.ref)

    def wait(self, slot: jax.Array, phases: jax.Array) -> None:
        """Waits for the next completion of a slot and makes what landed visible to wgmma.

        Args:
            slot: which.
            phases: how many completions of each slot came before, modulo 2, one bit a slot.
        """
        if self.interpret:
            plgpu.barrier_wait(self.ref.at[slot])
            return

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def emit(_, words, slot, parity):
            i32 = ir.IntegerType.get_signless(32)
            offset = arith.muli(slot.registers.item(), arith.constant(i32, 8))
            offset = arith.addi(offset, arith.constant(i32, self.start))
            pointer = utils.getelementptr(
                utils.memref_ptr(words), [offset], ir.IntegerType.get_signless(8)
            )
            ticks = arith.constant(i32, 10_000_000)
            nvvm.mbarrier_try_wait_parity(pointer, parity.registers.item(), ticks)
            # The copies wrote through the generic proxy, wgmma reads through the async one.
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        bit = lax.shift_left(jnp.int32(1), slot)
        emit(self.ref, slot, (lax.bitwise_and(phases, bit) != 0).astype(jnp.int32))

    @staticmethod
    def next(slot: jax.Array, phases: jax.Array) -> jax.Array:
        """`phases` after a completion of a slot."""
        return lax.bitwise_xor(phases, lax.shift_left(jnp.int32(1), slot))


def gather_rows(
    table: Any,
    indices: Any,
    tile: Any,
    landing: Landing,
    slot: jax.Array,
    *,
    first_row: jax.Array,
    rows: int,
    first_column: int,
    columns: tuple[int, int],
    arrive: bool,
    shift: int = 0,
) -> None:
    """Starts `tile[r, c] = table[first_row + indices[r], first_column + c]` for some columns c.

    An index outside `0 .. rows - 1` gives zeros. One warpgroup calls this, for parts of a tile one
    after the other if it likes, and with the last part has all its copies arrive.

    Args:
        table: GMEM `[.., D]`, bf16, rows contiguous.
        indices: SMEM i32 `[r]`, r a multiple of 16.
        tile: SMEM bf16 `[r, C]`, laid out as `tiles.SWIZZLED`.
        landing: where the copies arrive.
        slot: which barrier of it.
        first_row: added to every index.
        rows: how many rows an index may name.
        first_column: of the table, a multiple of 64.
        columns: start and stop, multiples of 64.
        arrive: whether what this warpgroup has started so far is all that belongs to the slot.
        shift: how many low bits of `indices` say something else.
    """
    if landing.interpret:
        _gather_rows_twin(table, indices, tile, first_row, rows, first_column, columns, shift)
        if arrive:
            plgpu.barrier_arrive(landing.ref.at[slot])
        return
    row_bytes = 2 * table.shape[-1]
    count, width = tile.shape
    eight_rows = width // CHUNK * _TILE_BYTES
    chunks = range(columns[0] // CHUNK, columns[1] // CHUNK)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(),
            plgpu.RefType(SWIZZLED),
            plgpu.RefType(),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
        )
    )
    def emit(_, table, indices, tile, words, slot, first_row):
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
        target = arith.addi(arith.muli(arith.divui(row, word(8)), word(eight_rows)), swizzled)
        target = arith.addi(_shared_address(tile), target)
        start = arith.addi(arith.muli(piece, word(16)), word(2 * first_column))
        source = arith.addi(global_address(table), arith.extui(i64, start))
        base = arith.extsi(i64, first_row.registers.item())
        source = arith.addi(source, arith.muli(base, arith.constant(i64, row_bytes)))
        wanted = []
        for step in range(count // 16):
            at = arith.addi(row, word(16 * step))
            wanted.append(memref.load(indices, [arith.index_cast(ir.IndexType.get(), at)]))
        for step, index in enumerate(wanted):
            if shift:
                index = arith.shrsi(index, word(shift))
            inside = arith.cmpi(arith.CmpIPredicate.ult, index, word(rows))
            index = arith.select(inside, index, word(0))
            size = arith.select(inside, word(16), word(0))  # 0 reads nothing and writes zeros
            if rows * row_bytes <= 2**32:
                offset = arith.extui(i64, arith.muli(index, word(row_bytes)))
            else:
                offset = arith.muli(arith.extui(i64, index), arith.constant(i64, row_bytes))
            address = arith.addi(source, offset)
            copies = "\n".join(
                "cp.async.cg.shared.global.L2::128B "
                f"[$2 + {2 * step * eight_rows + chunk * _TILE_BYTES}], "
                f"[$0 + {chunk * 2 * CHUNK}], 16, $1;"
                for chunk in chunks
            )
            utils.inline_ptx(copies, address, size, target, has_side_effects=True)
        if arrive:
            offset = arith.muli(slot.registers.item(), word(8))
            utils.inline_ptx(
                "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
                arith.addi(_shared_address(words, landing.start), offset),
                has_side_effects=True,
            )

    emit(table, indices, tile, landing.ref, slot, first_row)


def _gather_rows_twin(table, indices, tile, first_row, rows, first_column, columns, shift) -> None:
    start, stop = columns

    def copy(r, _):
        index = lax.shift_right_arithmetic(indices[r], jnp.int32(shift))
        inside = (index >= 0) & (index < rows)
        number = first_row + jnp.where(inside, index, 0)
        values = table[number, first_column + start : first_column + stop]
        tile[r, start:stop] = jnp.where(inside, values, jnp.zeros_like(values))

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
