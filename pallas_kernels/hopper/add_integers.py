# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Rows scaled to integers and added to rows of a table in the L2, in whatever order.

    table[targets[r]] += round(rows[r] scales[r])

Sums of integers are the same in any order, so that rows may be added by atomics, and the bits of
the result are always the same. A warpgroup leaves its rows in SMEM and hands each to the copy
engine (`cp.reduce.async.bulk`), which adds it up in the L2: nothing waits for that, and the memory
is not touched as long as the table stays in the L2.

Interpret mode has no such reduction: the twin stores each row at a place of its own, and leaves
the sum to its caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

ROWS = 64  # of a tile
LARGEST = 2**22
"""What a scaled value may be at most: up to there adding 1.5 x 2**23 rounds it to an integer."""

OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
_MAGIC = 1.5 * 2**23
_MAGIC_BITS = 0x4B400000
_AT_ONCE = 48  # columns at most
_PLACES = 2  # one is filled while the engine reads another
_PADDING = 8  # words a row, with which a warp's stores are free of bank conflicts


def columns_at_once(columns: int) -> int:
    """How many columns are staged and sent off together."""
    return max(n for n in range(16, _AT_ONCE + 1, 16) if columns % (n * _PLACES) == 0)


def staging(columns: int) -> Any:
    """The SMEM that `add_rows` needs for tiles of so many columns, a multiple of 64."""
    return plgpu.SMEM((_PLACES, ROWS, columns_at_once(columns) + _PADDING), jnp.int32)


def add_rows(
    parts: Sequence[jax.Array],
    scales: jax.Array,
    targets: jax.Array,
    staged: Any,
    table: Any,
    *,
    first_column: int,
    twin_row: jax.Array,
    interpret: bool,
) -> None:
    """Starts to add a tile of 64 rows to a table.

    What was sent off from `staged` before is waited for, also where `staged` held something else.

    Args:
        parts: f32 `[64, columns]` in layout `WGMMA`, side by side the columns of the rows.
        scales: f32 `[64]` in layout `OF_ROWS`; no scaled value is larger than `LARGEST`.
        targets: i32 `[64]`, as `scales`; a row without a target in the table is left out.
        staged: as `staging` describes.
        table: GMEM i32 `[rows, width]`, the width a multiple of 4.
        first_column: where the columns begin in the table, a multiple of 4.
        twin_row: in interpret mode the row of the table where the first of these rows is stored.
        interpret: whether this is the twin.
    """
    if interpret:
        _add_rows_twin(parts, scales, targets, table, first_column, twin_row)
        return
    starts = [sum(part.shape[1] for part in parts[:i]) for i in range(len(parts) + 1)]
    together = columns_at_once(starts[-1])
    rows, width = table.shape

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(),
            OF_ROWS,
            OF_ROWS,
            *[plgpu.Layout.WGMMA] * len(parts),
        )
    )
    def emit(_, staged, table, scales, targets, *parts):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))

        def word(value):
            return arith.constant(i32, value)

        # Of the four lanes that hold a row and the one 8 below, the first two send them off.
        lane = arith.remui(utils.thread_idx(), word(32))
        warp = arith.remui(arith.divui(utils.thread_idx(), word(32)), word(4))
        of_four = arith.remui(lane, word(4))
        row = arith.addi(arith.muli(warp, word(16)), arith.divui(lane, word(4)))
        row = arith.addi(row, arith.muli(of_four, word(8)))
        upper, lower = (utils.bitcast(register, i32) for register in targets.registers.flat)
        target = arith.select(arith.cmpi(arith.CmpIPredicate.eq, of_four, word(0)), upper, lower)
        exists = arith.andi(
            arith.cmpi(arith.CmpIPredicate.ult, of_four, word(2)),
            arith.cmpi(arith.CmpIPredicate.ult, target, word(rows)),
        )
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(table))
        offset = arith.muli(arith.extui(i64, target), arith.constant(i64, 4 * width))
        address = arith.addi(llvm.ptrtoint(i64, pointer), offset)
        source = llvm.ptrtoint(i32, utils.memref_ptr(staged))
        source = arith.addi(source, arith.muli(row, word(4 * (together + _PADDING))))
        place_words = ROWS * (together + _PADDING)
        for number, first in enumerate(range(0, starts[-1], together)):
            place = number % _PLACES
            nvvm.cp_async_bulk_wait_group(_PLACES - 1, read=True)
            utils.warpgroup_barrier()
            for part, start, end in zip(parts, starts, starts[1:], strict=False):
                low, high = max(first, start), min(first + together, end)
                if low < high:
                    piece = part[:, low - start : high - start]
                    scale = scales.broadcast_in_dim((ROWS, high - low), (0,), piece.layout)
                    bits = (piece * scale + _MAGIC).bitcast(i32, output_is_signed=True)
                    columns = slice(low - first, high - first)
                    (bits - _MAGIC_BITS).store_untiled(
                        utils.memref_slice(staged, (place, slice(None), columns)), optimized=False
                    )
            utils.commit_shared()
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [
                    arith.addi(address, arith.constant(i64, 4 * (first_column + first))),
                    arith.addi(source, word(4 * place * place_words)),
                    exists,
                ],
                "@$2 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 "
                f"[$0], [$1], {4 * together};",
                "l,r,b",
                has_side_effects=True,
            )
            nvvm.cp_async_bulk_commit_group()

    emit(staged, table, scales, targets, *parts)


def _add_rows_twin(parts, scales, targets, table, first_column, twin_row) -> None:
    del targets
    start = first_column
    for part in parts:
        scaled = part * lax.broadcast_in_dim(scales, part.shape, (0,))
        bits = lax.bitcast_convert_type(scaled + jnp.float32(_MAGIC), jnp.int32)
        columns = pl.ds(start, part.shape[1])
        table[pl.ds(twin_row, ROWS), columns] = bits - jnp.int32(_MAGIC_BITS)
        start += part.shape[1]
