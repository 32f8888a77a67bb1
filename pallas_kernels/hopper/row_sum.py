# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false
"""The rows of an array in registers added up, to device memory, with a twin for interpret mode.

Mosaic GPU's own reduction moves every column through every step of its exchange and leaves the
result in all rows' lanes; here lanes halve the columns they have with each step.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

COLUMNS = 64
WARPS = 4


def store_row_sum(x: jax.Array, out: Any, scratch: Any, interpret: bool) -> None:
    """`out[c] = sum_r x[r, c]`, in an order that is always the same.

    All four warps meet once. Calls that follow each other take different scratch.

    Args:
        x: f32 `[64, 64]`, in layout `WGMMA`.
        out: f32 `[64]` in device memory.
        scratch: SMEM f32 `[4, 64]`.
        interpret: whether to run the twin.
    """
    if interpret:
        out[...] = x.sum(axis=0)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType()))
    def emit(_, x, out, scratch):
        i32, i64, f32 = (
            ir.IntegerType.get_signless(32),
            ir.IntegerType.get_signless(64),
            ir.F32Type.get(),
        )

        def word(value):
            return arith.constant(i32, value)

        def scalar(register):
            return vector.extract(
                register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
            )

        lane = arith.remui(utils.thread_idx(), word(32 * WARPS))
        warp, lane_in_warp = arith.divui(lane, word(32)), arith.remui(lane, word(32))
        # Eight columns at a time a lane has two of row r and the same two of row r + 8.
        registers = [scalar(r) for r in x.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]
        sums = [
            [arith.addf(registers[4 * n + e], registers[4 * n + 2 + e]) for e in range(2)]
            for n in range(COLUMNS // 8)
        ]
        for distance in (16, 8, 4):
            bit = arith.andi(lane_in_warp, word(distance))
            upper = arith.cmpi(arith.CmpIPredicate.ne, bit, word(0))
            half = len(sums) // 2
            after = []
            for low, high in zip(sums[:half], sums[half:], strict=True):
                pair = []
                for a, b in zip(low, high, strict=True):
                    other = utils.shfl_bfly(arith.select(upper, a, b), distance)
                    pair.append(arith.addf(arith.select(upper, b, a), other))
                after.append(pair)
            sums = after
        # Of eight columns each, those in the place that the lane's row says.
        column = arith.addi(
            arith.muli(arith.divui(lane_in_warp, word(4)), word(8)),
            arith.muli(arith.remui(lane_in_warp, word(4)), word(2)),
        )
        start = llvm.ptrtoint(i32, utils.memref_ptr(scratch))
        place = arith.addi(arith.muli(warp, word(COLUMNS)), column)
        address = arith.addi(start, arith.muli(place, word(4)))
        _asm("st.shared.v2.f32 [$0], {$1, $2};", "r,f,f", address, *sums[0])
        utils.warpgroup_barrier()
        mine = arith.minui(lane, word(COLUMNS - 1))
        address = arith.addi(start, arith.muli(mine, word(4)))
        total = None
        for number in range(WARPS):
            code = f"ld.shared.f32 $0, [$1 + {4 * COLUMNS * number}];"
            value = llvm.inline_asm(f32, [address], code, "=f,r", has_side_effects=True)
            total = value if total is None else arith.addf(total, value)
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(out))
        offset = arith.extui(i64, arith.muli(mine, word(4)))
        address = arith.addi(llvm.ptrtoint(i64, pointer), offset)
        has_one = arith.cmpi(arith.CmpIPredicate.ult, lane, word(COLUMNS))
        _asm("@$2 st.global.f32 [$0], $1;", "l,f,b", address, total, has_one)

    emit(x, out, scratch)


def _asm(code: str, constraints: str, *operands: Any) -> None:
    llvm.inline_asm(None, list(operands), code, constraints, has_side_effects=True)
